"""What a run says of itself: how far it is, what it took, and a profile of the decode step."""
from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from errno import ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch.autograd import DeviceType
from torch.utils.benchmark import Timer
from tqdm import tqdm

import quantize
from cli.errors import afterthought
from generate import Decoder, say
from model import KVCache, Transformer

if TYPE_CHECKING:
    from batching import Engine

# why an answer ends though its model would go on -> what is said of it
CUTS = {
    "length": "cut after --max_new_tokens",
    "context": "cut where the context is full",
    "error": "missing, as what asks for them is wrong: see above",
}
PROFILED = 16  # decode steps in a trace
NO_TIME = 1e-9  # seconds that stand for none, where a clock has not moved
SAID_EVERY_S = 10
LONG = 512  # tokens; shorter ones are read while rows decode, whose text a bar would cover

# --- while it runs ---


def with_bar(block_forward: Callable, layers: Sequence[Any]) -> Callable:
    """What runs each layer in turn over prompts, x [B, T, dim], with a bar on stderr, if that is a
    terminal, that counts the layers done of a long one. On a CPU a call returns when it is done."""
    bar = None

    def counted(block: Any, x: Any, *rest: Any) -> Any:
        nonlocal bar
        n_tokens = x.shape[0] * x.shape[1]
        if n_tokens < LONG:
            return block_forward(block, x, *rest)
        if block is layers[0]:
            bar = tqdm(
                total=len(layers), desc=f"reading {n_tokens} tokens", unit="layer", disable=None,
                leave=False, delay=0.5,
            )
        y = None
        try:
            y = block_forward(block, x, *rest)
            bar.update()
        finally:
            if y is None or block is layers[-1]:  # by Ctrl-C too
                bar.close()
        return y

    return counted


def watch_prompts(decoder: Decoder) -> None:
    """Show how far a long prompt is; on a GPU, which is asked for all layers at once, nothing."""
    if decoder.device.type == "cpu":
        model = decoder.model
        model.prefill_block = with_bar(model.prefill_block, model.layers)


def show_loading() -> None:
    """From now on loading shows how far it is."""
    quantize.progress = counted


def counted(items: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
    """The same items: on a terminal with a bar, elsewhere with a line now and then."""
    if sys.stderr.isatty():
        yield from tqdm(items, what, total, unit=" layers", leave=False)
        return
    total = len(items) if total is None else total
    began = said = time.perf_counter()
    for n, item in enumerate(items, start=1):
        yield item
        if time.perf_counter() - said > SAID_EVERY_S:
            said = time.perf_counter()
            say(f"{what}: {n} of {total} layers after {said - began:.0f} s")


@afterthought()
def say_library(model: Transformer) -> bool:
    """Say whether steps ran by a library that --compile makes -> the same."""
    libraries = getattr(model.decode_block, "libraries", {})
    ran = any(library is not None for library in libraries.values())
    if ran:
        say("decoded by the library that --compile made")
    elif getattr(model.decode_block, "missing", False):
        threads = plural(torch.get_num_threads(), "thread")
        say(f"--compile makes a library for {threads}, in some 15 seconds; later runs with "
            f"{threads} decode faster by it")
    return ran

# --- what it took ---


def weight_bytes(model: Transformer, rows: int = 1) -> int:
    """Bytes of weights that a decode step of so many tokens reads: all but embeddings, whose rows
    are few, and a layer that only proposes, and of experts as many as Experts.share expects the
    tokens to choose."""
    others = [each for name, each in model.named_children() if name.startswith(("embed_", "mtp"))]
    nbytes = module_bytes(model) - sum(map(module_bytes, others))
    for module in model.modules():
        if hasattr(module, "share"):
            nbytes -= module_bytes(module) * (1 - module.share(rows))
    return round(nbytes)


def module_bytes(module: nn.Module) -> int:
    return sum(x.nbytes for x in module.state_dict(keep_vars=True).values())


def bytes_read(cache: KVCache, length: float) -> float:
    """Bytes of the cache that a step reads for a row of that length."""
    return sum(x.nbytes for layer in cache.whole for x in layer.live(0, int(length)))


@afterthought()
def summarize(engine: Engine, measure: bool = False) -> dict[str, float]:
    """Say what a run took -> the same as a dict of plain numbers, which --json prints. measure:
    also beside how fast this machine copies, which takes half a second and memory of its own."""
    stats = engine.stats
    n_requests = stats.new_tokens - stats.decode_tokens  # each one's first token is prefill's
    if not stats.useful_row_steps:  # of single tokens: prefill stands for decode steps
        stats = replace(
            stats, steps_s=stats.first_token_s, decode_tokens=n_requests, row_steps=n_requests,
            useful_row_steps=n_requests,
        )
    steps = sorted(max(seconds, NO_TIME) for seconds in stats.steps_s)
    tenth = len(steps) // 10
    # a step reads all weights, a draft's once for each proposal, and the tokens cached
    model, *drafts = engine.models()
    rows = engine.cache.max_batch_size
    read = weight_bytes(model, rows * (engine.k + 1))
    read += sum(engine.k * weight_bytes(draft, rows) for draft in drafts)
    length = (stats.prompt_tokens + stats.new_tokens / 2) / n_requests  # of a row, on average
    read += stats.useful_row_steps / len(steps) * bytes_read(engine.cache, length)
    summary = {
        "load_s": stats.load_s,
        "compile_s": stats.compile_s,
        "prompts": n_requests,
        "prompt_tokens": stats.prompt_tokens,
        "shared_prompt_tokens": stats.shared_tokens,
        "first_token_s": statistics.median(stats.first_token_s),
        "new_tokens": stats.new_tokens,
        "ms_per_step": 1e3 * statistics.median(steps),
        "ms_per_step_p10": 1e3 * steps[tenth],
        "ms_per_step_p90": 1e3 * steps[-1 - tenth],
        "tokens_per_s": stats.decode_tokens / sum(steps),
        "wall_s": stats.wall_s,
        "wall_tokens_per_s": stats.new_tokens / max(stats.wall_s, NO_TIME),
        "useful_row_share": stats.useful_row_steps / stats.row_steps,
        "bytes_per_step": round(read),
        "kv_cache_bytes": engine.cache.nbytes,
    }
    say_summary(summary)
    summary["peak_memory_gb"] = say_memory(engine)
    if measure:
        summary |= say_bandwidth(read, statistics.median(steps), engine.device) or {}
    if stats.speculation.checked:
        summary["speculation"] = say_speculation(stats.speculation)
    return summary


def say_summary(summary: dict[str, float]) -> None:
    """What a run took, in two sentences on stderr."""
    ready = "loaded in {load_s:.1f} s"
    if summary["compile_s"]:
        ready += ", compiled in {compile_s:.1f} s"
    ready += "; {prompt_tokens} prompt tokens, first token after {first_token_s:.2f} s"
    if summary["prompts"] > 1:
        ready = ready.replace("prompt tokens, first", "tokens in {prompts} prompts, median first")
    if summary["shared_prompt_tokens"]:
        ready += "; {shared_prompt_tokens} of them were read for others before"
    say(ready.format_map(summary))
    speed = (
        "{new_tokens} new tokens in {wall_s:.2f} s, {wall_tokens_per_s:.1f} tokens/s; "
        "{ms_per_step:.2f} ms a step, median; {useful_row_share:.0%} of its rows had work"
    )
    say(speed.format_map(summary))


@afterthought()
def say_memory(decoder: Decoder) -> float:
    """-> the most memory that was in use, GB."""
    if decoder.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(decoder.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    say(f"KV cache {decoder.cache.nbytes / 1e6:.1f} MB, peak memory {peak / 1e9:.2f} GB")
    return peak / 1e9


def say_cuts(reasons: list[str]) -> None:
    """Say how many answers ended before their model ended them, or had a line that was no prompt.
    reasons: of each one's end."""
    for reason, where in CUTS.items():
        n = reasons.count(reason)
        if n:
            say(f"{n} of {plural(len(reasons), 'answer')} {where}")


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


@afterthought()
def say_bandwidth(read: float, step_s: float, device: torch.device) -> dict[str, float]:
    """How much of the speed at which a device copies a step makes, that reads so many bytes."""
    bandwidth = copy_bandwidth(device, 2**30 if device.type == "cuda" else 2**27)
    share = read / step_s / bandwidth
    say(
        f"a step reads {read / 1e9:.3f} GB: {share:.0%} of the {bandwidth / 1e9:.0f} GB/s this "
        "machine copies at"
    )
    return {"bandwidth_gb_s": bandwidth / 1e9, "bandwidth_share": share}


def say_speculation(found: Any) -> dict[str, float | list[float]]:
    """What proposals brought, as a sentence -> the same as numbers."""
    shares = [right / found.checked for right in found.accepted]
    tokens = found.tokens / found.checked  # not those behind the end of a text
    checking_s = statistics.median(found.checking_s)
    summary = {
        "accepted_by_position": shares,
        "checking_steps": len(found.checking_s),
        "tokens_per_checking_step": tokens,
        "ms_per_checking_step": 1e3 * checking_s,
    }
    text = f"proposals accepted by position: {' '.join(f'{share:.0%}' for share in shares)}; "
    text += "{tokens_per_checking_step:.2f} tokens a step in {checking_steps} steps of "
    text += "{ms_per_checking_step:.2f} ms"
    if found.plain_s:
        plain_s = statistics.median(found.plain_s)
        summary["ms_per_plain_step"] = 1e3 * plain_s
        summary["times_plain"] = tokens * plain_s / max(checking_s, NO_TIME)
        text += ", {times_plain:.2f}x the tokens/s of plain ones of {ms_per_plain_step:.2f} ms"
    say(text.format_map(summary))
    return summary


def copy_bandwidth(device: torch.device | str, nbytes: int) -> float:
    """Bytes a second that this device moves in a large copy, read and written counted: the median
    of half a second."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    tensors = {"source": source, "target": torch.empty_like(source)}
    timer = Timer("target.copy_(source)", globals=tensors, num_threads=torch.get_num_threads())
    with torch.accelerator.device_index(torch.device(device).index):  # on which the timer waits
        return 2 * nbytes / timer.blocked_autorange(min_run_time=0.5).median


def profile(engine: Engine, file: Path) -> None:
    """Trace warm decode steps, say what a step consists of, and write a Chrome trace. OSError: it
    cannot be written."""
    with torch.profiler.profile() as trace:
        seconds = engine.timed_steps(PROFILED)
    say_kernels(trace, 1e6 * sum(seconds) / PROFILED, len(engine.model.layers), engine.device)
    trace.export_chrome_trace(str(file))
    if file.suffix != ".gz" and b'"traceName"' not in file.read_bytes()[-9999:]:
        raise OSError(ENOSPC, os.strerror(ENOSPC), str(file))  # of which PyTorch says nothing
    say("open the trace in chrome://tracing or ui.perfetto.dev")


def read_trace(file: Path) -> None:
    """ValueError: it is none."""
    if not file.is_file() or b'"schemaVersion"' not in file.open("rb").read(100):
        raise ValueError(f"--profile {file} is there and no trace")


def say_kernels(
    trace: torch.profiler.profile, wall_us: float, n_layer: int, device: torch.device
) -> list[tuple[float, float, str]]:
    """Say in which kernels a step of wall_us is -> microseconds, calls and name of each."""
    rows = trace.key_averages()
    own_time = "self_cpu_time_total"
    if device.type == "cuda":
        # operators and marked regions have their kernels' time too, and would count it again
        rows = [r for r in rows if r.device_type == DeviceType.CUDA and not r.is_user_annotation]
        own_time = "self_device_time_total"
    kernels = [(getattr(r, own_time) / PROFILED, r.count / PROFILED, r.key) for r in rows]
    kernels.sort(reverse=True)
    busy_us = sum(step_us for step_us, _, _ in kernels)
    gaps_us = max(0, wall_us - busy_us)
    say(
        f"a decode step takes {wall_us:.0f} us, the kernels {busy_us:.0f} of them and gaps "
        f"{gaps_us:.0f}; the twelve kernels with most time: share of the step, calls in a layer, "
        "time of one"
    )
    for step_us, calls, name in kernels[:12]:
        say(
            f"  {step_us / wall_us:5.1%}  {calls / n_layer:5.1f} x {step_us / calls:8.1f} us  "
            f"{name[:80]}"
        )
    return kernels
