"""What a run took: times, tokens, memory, and a profile of the decode step."""
import os
import resource
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.utils.benchmark import Timer

from cli.arguments import say
from formats.checkpoint import first_line

PROFILED = 16  # decode steps in a trace


@dataclass
class Speculation:
    """What proposals brought."""
    checked: int = 0  # row-steps that checked some
    accepted: list[int] = field(default_factory=list)  # by position: of how many they were right
    checking_s: list[float] = field(default_factory=list)  # per step that checked some
    plain_s: list[float] = field(default_factory=list)  # per step that checked none

    def add(self, k: int, agreed: list[int], seconds: float) -> None:
        """A step that checked k proposals a row; agreed: how many were right in each."""
        if k == 0:
            self.plain_s.append(seconds)
            return
        self.checking_s.append(seconds)
        self.checked += len(agreed)
        self.accepted += [0] * (k - len(self.accepted))
        for right in agreed:
            for position in range(right):
                self.accepted[position] += 1


@dataclass
class Stats:
    """What a run took: seconds and tokens."""
    load_s: float = 0.0
    compile_s: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)  # per prefill of prompts
    steps_s: list[float] = field(default_factory=list)  # per decode step
    wall_s: float = 0.0  # from a run's first prompt to its last token
    decode_tokens: int = 0  # that requests got from decode steps
    row_steps: int = 0  # rows that decode steps worked on
    useful_row_steps: int = 0  # those whose request got something
    speculation: Speculation = field(default_factory=Speculation)


@dataclass
class Memory:
    """What a decode step reads, and where it lies."""
    device: torch.device
    weight_bytes: int  # that a step reads
    cache_bytes: int  # of the whole KV cache
    row_bytes: Callable[[float], float]  # of it that a step reads for a row of so many tokens


def summarize(stats: Stats, memory: Memory) -> dict[str, float]:
    """Say what a run took -> the same as a dict of plain numbers, which --json prints."""
    cuda = memory.device.type == "cuda"
    if cuda:
        peak = torch.cuda.max_memory_allocated(memory.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    # after the peak, to which its buffers would add
    bandwidth = copy_bandwidth(memory.device, 2**30 if cuda else 2**27)

    # a run of single tokens has no decode steps: prefill stands for them
    steps = sorted(stats.steps_s or stats.first_token_s)
    step_s = statistics.median(steps)
    tenth = len(steps) // 10

    # a step reads all weights and the tokens cached
    n_rows, length = live_rows(stats)
    read = memory.weight_bytes + n_rows * memory.row_bytes(length)
    if stats.steps_s:
        tokens_per_s = stats.decode_tokens / sum(stats.steps_s)
        useful_share = stats.useful_row_steps / stats.row_steps
    else:
        tokens_per_s = stats.new_tokens / sum(stats.first_token_s)
        useful_share = 1.0
    summary = {
        "load_s": stats.load_s,
        "compile_s": stats.compile_s,
        "prompt_tokens": stats.prompt_tokens,
        "first_token_s": statistics.median(stats.first_token_s),
        "new_tokens": stats.new_tokens,
        "ms_per_step": 1e3 * step_s,
        "ms_per_step_p10": 1e3 * steps[tenth],
        "ms_per_step_p90": 1e3 * steps[-1 - tenth],
        "tokens_per_s": tokens_per_s,
        "wall_s": stats.wall_s,
        "wall_tokens_per_s": stats.new_tokens / stats.wall_s,
        "useful_row_steps": useful_share,
        "bytes_per_step": round(read),
        "bandwidth_gb_s": bandwidth / 1e9,
        "bandwidth_share": read / step_s / bandwidth,
        "kv_cache_bytes": memory.cache_bytes,
        "peak_memory_gb": peak / 1e9,
    }
    say_summary(summary)
    if stats.speculation.checked:
        summary["speculation"] = say_speculation(stats.speculation)
    return summary


def live_rows(stats: Stats) -> tuple[float, float]:
    """How many rows with a request a step has, and how many tokens it finds cached in one of them,
    on average."""
    n_requests = stats.new_tokens - stats.decode_tokens  # each one's first token is prefill's
    length = (stats.prompt_tokens + stats.new_tokens / 2) / n_requests
    if stats.steps_s:
        return stats.useful_row_steps / len(stats.steps_s), length
    return n_requests / len(stats.first_token_s), length


def say_summary(summary: dict[str, float]) -> None:
    """The summary as three sentences."""
    ready = "loaded in {load_s:.1f} s"
    if summary["compile_s"]:
        ready += ", compiled in {compile_s:.1f} s"
    prompt = "{prompt_tokens} prompt tokens, first token after {first_token_s:.2f} s"
    say(f"{ready}; {prompt}".format(**summary))
    say(
        "{new_tokens} new tokens in {wall_s:.2f} s, {wall_tokens_per_s:.1f} tokens/s; decoding "
        "alone {tokens_per_s:.1f} tokens/s ({ms_per_step:.2f} ms a step, median; "
        "{useful_row_steps:.0%} of its rows had work), reading {read_gb:.3f} GB a step: "
        "{bandwidth_share:.0%} of the {bandwidth_gb_s:.0f} GB/s this machine copies at"
        .format(**summary, read_gb=summary["bytes_per_step"] / 1e9)
    )
    cache_mb = summary["kv_cache_bytes"] / 1e6
    say(f"KV cache {cache_mb:.1f} MB, peak memory {summary['peak_memory_gb']:.2f} GB")


def say_speculation(found: Speculation) -> dict[str, float | list[float]]:
    """What proposals brought, as a sentence -> the same as numbers."""
    shares = [right / found.checked for right in found.accepted]
    tokens = 1 + sum(shares)
    checking_s = statistics.median(found.checking_s)
    summary = {
        "accepted_by_position": shares,
        "checking_steps": len(found.checking_s),
        "tokens_per_checking_step": tokens,
        "ms_per_checking_step": 1e3 * checking_s,
    }
    text = (
        f"proposals accepted by position: {' '.join(f'{share:.0%}' for share in shares)}; "
        f"{tokens:.2f} tokens a step in {len(found.checking_s)} steps of {1e3 * checking_s:.2f} ms"
    )
    if found.plain_s:
        plain_s = statistics.median(found.plain_s)
        summary["ms_per_plain_step"] = 1e3 * plain_s
        summary["times_plain"] = tokens * plain_s / checking_s
        text += (
            f", {summary['times_plain']:.2f}x the tokens/s of plain ones of {1e3 * plain_s:.2f} ms"
        )
    say(text)
    return summary


def copy_bandwidth(device: torch.device | str, nbytes: int) -> float:
    """Bytes a second that this device moves in a large copy, read and written counted: the median
    of half a second."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    tensors = {"source": source, "target": torch.empty_like(source)}
    threads = torch.get_num_threads()
    timer = Timer("target.copy_(source)", globals=tensors, num_threads=threads)
    with torch.accelerator.device_index(torch.device(device).index):  # on which the timer waits
        measured = timer.blocked_autorange(min_run_time=0.5)
    return 2 * nbytes / measured.median


def profile(
    run_steps: Callable[[int], list[float]],
    n_layer: int,
    parts: dict[str, float],
    head_bytes: int,
    path: str,
    device: torch.device,
) -> None:
    """Trace decode steps, write the trace, and say what a step consists of and must take.

    run_steps(n): runs n warm decode steps to their end -> the seconds of each.
    parts: name -> bytes that this part of a layer reads at least. head_bytes: what lm_head reads.
    path: of the Chrome trace; ValueError where it cannot be written."""
    with torch.profiler.profile() as trace:
        seconds = run_steps(PROFILED)
    try:
        open(path, "ab").close()  # PyTorch only logs where it cannot write
        trace.export_chrome_trace(path)
    except (OSError, RuntimeError) as e:
        raise ValueError(f"cannot write --profile {path}: {first_line(e)}") from None
    wall_us = 1e6 * sum(seconds) / PROFILED
    say_kernels(trace, wall_us, n_layer, device)
    say_least_times(parts, head_bytes, copy_bandwidth(device, 2**28))
    say(f"trace written to {path}; open it in chrome://tracing or ui.perfetto.dev")


def check_writable(path: str) -> None:
    """ValueError where a trace could not be written, said before a model is loaded for it."""
    file = Path(path)
    place = file if file.exists() else file.parent
    if file.is_dir():
        problem = "it is a folder"
    elif not place.exists():
        problem = f"there is no folder {place}"
    elif not os.access(place, os.W_OK):
        problem = f"{place} may not be written"
    else:
        return
    raise ValueError(f"cannot write --profile {path}: {problem}")


def say_kernels(
    trace: torch.profiler.profile, wall_us: float, n_layer: int, device: torch.device
) -> None:
    """Which kernels a step's time goes to. wall_us: microseconds of one step."""
    rows = trace.key_averages()
    own_time = "self_cpu_time_total"
    if device.type == "cuda":
        # operators and marked regions have their kernels' time too, and would count it again
        rows = [row for row in rows if is_kernel(row)]
        own_time = "self_device_time_total"

    def step_us(row: FunctionEventAvg) -> float:
        return getattr(row, own_time) / PROFILED

    rows = sorted(rows, key=step_us, reverse=True)
    busy_us = sum(map(step_us, rows))
    gaps_us = max(0, wall_us - busy_us)
    say(
        f"a decode step takes {wall_us:.0f} us, the kernels {busy_us:.0f} of them and gaps "
        f"{gaps_us:.0f}; the twelve kernels with most time: share of the step, calls in a layer, "
        "time of one"
    )
    for row in rows[:12]:
        calls = row.count / PROFILED
        share = step_us(row) / wall_us
        call_us = step_us(row) / calls
        say(f"  {share:5.1%}  {calls / n_layer:5.1f} x {call_us:8.1f} us  {row.key[:80]}")


def is_kernel(row: FunctionEventAvg) -> bool:
    return row.device_type == DeviceType.CUDA and not row.is_user_annotation


def say_least_times(parts: dict[str, float], head_bytes: int, bandwidth: float) -> None:
    """How long reading weights and cache takes at the bandwidth of a copy, bytes a second."""
    say(
        "what a layer's parts take at least, at the "
        f"{bandwidth / 1e9:.0f} GB/s that this machine copies at:"
    )
    for name, nbytes in {**parts, "of all layers: lm_head": head_bytes}.items():
        least_us = nbytes / bandwidth * 1e6
        say(f"  {least_us:8.1f} us  {nbytes / 1e6:8.2f} MB  {name}")
