"""Decode attention, ours against its peers: microseconds a call, share of the copy bandwidth.

    python benchmarks/attention.py [--only llama3-8b ...] [--json FILE] [--plot FILE]

One token attends to what is cached, so a call reads every live key and value once: bytes / copy
bandwidth is the floor, with the bandwidth measured in the same run. All kernels get the same
tensors, run out of a CUDA graph, and go round as many copies of the tensors as it takes to find
nothing in the L2 cache. flash, efficient and cuDNN get caches cut to the live length, which no
decoder can do in a graph; math and flex mask the whole cache. A kernel that cannot do a case, or
does it wrong, shows no time. On a CPU: the PyTorch versions, small shapes. The --json file has all
rows so far, whenever the run ends."""
import argparse
import functools
import importlib
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cli.arguments import Parser, number
from cli.stats import copy_bandwidth
from kernels import flash_decode, flash_decode_reference, quantize_kv, triton

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CALLS = 16  # at least, between two looks at the clock
MAX_COPIES = 32  # of a case's tensors


# --- what is measured ---

class Case(NamedTuple):
    group: str
    n_head: int
    n_kv_head: int
    head_dim: int
    lens: list[int]  # live tokens of each row
    capacity: int
    dtype: torch.dtype
    int8: bool = False  # the cache, with a float32 scale per token and head

    @property
    def nbytes(self) -> int:
        """Bytes of live keys and values, which a call reads at least."""
        if self.int8:
            vector = self.head_dim + 4
        else:
            vector = self.head_dim * self.dtype.itemsize
        return sum(self.lens) * self.n_kv_head * 2 * vector

    @property
    def allocated(self) -> int:
        """Bytes of the whole cache."""
        return self.nbytes * self.capacity * len(self.lens) // sum(self.lens)

    @property
    def common_len(self) -> int | None:
        """The length of all rows, None if they differ."""
        if len(set(self.lens)) > 1:
            return None
        return self.lens[0]


def cases() -> Iterator[Case]:
    return gpu_cases() if CUDA else cpu_cases()


def chosen_cases(groups: list[str] | None) -> list[Case]:
    return [case for case in cases() if not groups or case.group in groups]


def cpu_cases() -> Iterator[Case]:
    small = functools.partial(Case, n_head=8, n_kv_head=2, head_dim=64, dtype=torch.bfloat16)
    for n, batch in ((64, 1), (512, 1), (64, 4)):
        yield small("small", lens=[n] * batch, capacity=n)
    yield small("ragged", lens=[500, 3, 90], capacity=512)
    yield small("int8", lens=[512], capacity=512, int8=True)
    yield small("capacity", lens=[64], capacity=64 * 16)


def gpu_cases() -> Iterator[Case]:
    for batch in (1, 16, 128):
        for n in (2048, 4096, 8192):
            yield Case("flash-attention", 12, 12, 128, [n] * batch, n, torch.float16)

    heads = {"llama2-7b": (32, 32), "llama3-8b": (32, 8), "llama3-70b": (64, 8)}
    for group, (n_head, n_kv_head) in heads.items():
        for batch in (1, 8, 64):
            for n in (512, 1024, 2048, 8192, 32768, 131072):
                yield Case(group, n_head, n_kv_head, 128, [n] * batch, n, torch.bfloat16)

    llama3_8b = functools.partial(
        Case,
        n_head=32,
        n_kv_head=8,
        head_dim=128,
        dtype=torch.bfloat16,
    )
    for batch in (8, 64):  # every length from 512 to 32k as likely as its double
        lens = [int(512 * 64 ** (i / (batch - 1))) for i in range(batch)]
        yield llama3_8b("ragged", lens=lens, capacity=32768)
    for n in (1024, 8192, 32768, 131072):
        yield llama3_8b("int8", lens=[n], capacity=n, int8=True)
    for n in (512, 2048):
        for times in (1, 4, 16, 64):
            yield llama3_8b("capacity", lens=[n], capacity=n * times)


class Inputs(NamedTuple):
    """What each contestant gets."""

    q: Tensor  # [B, Hq, 1, D]
    k: Tensor  # [B, Hkv, S, D]
    v: Tensor
    lens: Tensor  # [B] int32
    k_scale: Tensor | None  # [B, Hkv, S] float32, of an int8 cache
    v_scale: Tensor | None
    common_len: int | None  # of all rows, on the host; None if they differ


def make_inputs(case: Case) -> Inputs:
    B = len(case.lens)
    cache = (B, case.n_kv_head, case.capacity, case.head_dim)
    q = torch.randn(B, case.n_head, 1, case.head_dim, dtype=case.dtype, device=DEVICE)
    k = torch.randn(cache, dtype=case.dtype, device=DEVICE)
    v = torch.randn(cache, dtype=case.dtype, device=DEVICE)
    k_scale, v_scale = None, None
    if case.int8:
        k, k_scale = quantize_kv(k)
        v, v_scale = quantize_kv(v)
    lens = torch.tensor(case.lens, dtype=torch.int32, device=DEVICE)
    return Inputs(q, k, v, lens, k_scale, v_scale, case.common_len)


def reference(x: Inputs, rows: slice) -> Tensor:
    """What is right, for some rows: it is slow."""
    scales = {}
    if x.k_scale is not None:
        scales = {"k_scale": x.k_scale[rows], "v_scale": x.v_scale[rows]}
    return flash_decode_reference(x.q[rows], x.k[rows], x.v[rows], x.lens[rows], **scales)


# --- the contestants; what one cannot do, it refuses with NotImplementedError ---

Kernel = Callable[[Inputs], Tensor]


def ours(x: Inputs) -> Tensor:
    return flash_decode(x.q, x.k, x.v, x.lens, k_scale=x.k_scale, v_scale=x.v_scale)


def sdpa_math(x: Inputs) -> Tensor:
    k, v = x.k, x.v
    if x.k_scale is not None:
        k = (k * x.k_scale[..., None]).to(x.q.dtype)
        v = (v * x.v_scale[..., None]).to(x.q.dtype)
    live = torch.arange(k.shape[2], device=k.device) < x.lens[:, None, None, None]  # (B, 1, 1, S)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(x.q, k, v, live, enable_gqa=True)


def sdpa_fused(backend: SDPBackend, x: Inputs) -> Tensor:
    if x.k_scale is not None or x.common_len is None:
        raise NotImplementedError("no int8, no ragged batch")
    k = x.k[:, :, :x.common_len]
    v = x.v[:, :, :x.common_len]
    if backend == SDPBackend.EFFICIENT_ATTENTION:  # knows no grouped heads
        k = repeat_heads(k, x.q.shape[1])
        v = repeat_heads(v, x.q.shape[1])
    grouped = x.q.shape[1] != k.shape[1]
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(x.q, k, v, enable_gqa=grouped)


def repeat_heads(x: Tensor, n_head: int) -> Tensor:
    """[B, Hkv, S, D] -> [B, Hq, S, D]"""
    group = n_head // x.shape[1]
    return x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)


def compiled(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """In one graph for each shape, however many there are: behind dynamo's limits a kernel that may
    not break ran eagerly, and would be timed so."""
    torch._dynamo.config.recompile_limit = 10_000
    torch._dynamo.config.accumulated_recompile_limit = 10_000
    return torch.compile(kernel, dynamic=False, fullgraph=True)


@functools.cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    return compiled(flex_attention)


@functools.lru_cache(maxsize=MAX_COPIES)
def live_mask(lens: Tensor, capacity: int) -> BlockMask:
    """Made once for each copy of a case's tensors: a tensor is a key by its identity."""

    def live(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < lens[b]

    return create_block_mask(live, len(lens), None, 1, capacity, DEVICE)


def flex(x: Inputs) -> Tensor:
    if x.k_scale is not None:
        raise NotImplementedError("no int8")
    mask = live_mask(x.lens, x.k.shape[2])
    return compiled_flex_attention()(x.q, x.k, x.v, block_mask=mask, enable_gqa=True)


def flash_attn(x: Inputs) -> Tensor:
    if x.k_scale is not None:
        raise NotImplementedError("no int8")
    library = importlib.import_module("flash_attn")
    q, k, v = (tensor.transpose(1, 2) for tensor in (x.q, x.k, x.v))  # (B, S, H, D)
    return library.flash_attn_with_kvcache(q, k, v, cache_seqlens=x.lens).transpose(1, 2)


def flashinfer(x: Inputs) -> Tensor:
    if x.k_scale is not None or len(x.lens) > 1:
        raise NotImplementedError("a batch needs a paged cache, and int8 is not known")
    library = importlib.import_module("flashinfer")
    k = x.k[0, :, :x.common_len]
    v = x.v[0, :, :x.common_len]
    out = library.single_decode_with_kv_cache(x.q[0, :, 0], k, v, kv_layout="HND")  # (Hq, D)
    return out[None, :, None]


def contestants() -> dict[str, Kernel]:
    found = {
        "ours": ours,
        "SDPA math": sdpa_math,
        "SDPA flash": functools.partial(sdpa_fused, SDPBackend.FLASH_ATTENTION),
    }
    if not CUDA:
        return found
    found["SDPA math compiled"] = compiled(sdpa_math)
    found["FlexAttention"] = flex
    found["SDPA efficient"] = functools.partial(sdpa_fused, SDPBackend.EFFICIENT_ATTENTION)
    found["SDPA cuDNN"] = functools.partial(sdpa_fused, SDPBackend.CUDNN_ATTENTION)
    for name, kernel in {"flash_attn": flash_attn, "flashinfer": flashinfer}.items():
        if importlib.util.find_spec(name):
            found[name] = kernel
    return found


# --- measuring ---

def measure(
    case: Case, kernels: dict[str, Kernel], bandwidth: float, rounds: int
) -> Iterator[dict[str, Any]]:
    """One row a contestant, as it comes, its time None where it cannot do the case; no rows if the
    device has not the memory."""
    n_copies = 2
    if CUDA:
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        n_copies = max(1, min(MAX_COPIES, math.ceil(4 * l2 / case.nbytes)))
        free, _ = torch.cuda.mem_get_info()
        if case.allocated * (n_copies + 1.5) > 0.9 * free:
            return
    copies = [make_inputs(case) for _ in range(n_copies)]
    expected = reference(copies[0], slice(0, 2))

    for name, kernel in kernels.items():
        micros, why = None, ""
        try:
            check(kernel(copies[0])[:2], expected)
            micros = 1e6 * seconds(kernel, copies, rounds)
        except torch.AcceleratorError:  # behind which the device can do nothing more
            raise
        except Exception as e:  # that one cannot do a case is a result: others are measured
            why = f"{type(e).__name__}: {e}".splitlines()[0]
        yield row_of(case, name, micros, why, bandwidth)


def check(out: Tensor, expected: Tensor) -> None:
    error = (out - expected).abs().max().item()
    if error > 0.03 * max(1, expected.abs().max().item()):
        raise ArithmeticError(f"wrong by {error:.3f}")


def row_of(
    case: Case, kernel: str, micros: float | None, why: str, bandwidth: float
) -> dict[str, Any]:
    share = None
    if micros is not None:
        share = case.nbytes / (micros / 1e6) / bandwidth
    return {
        "group": case.group,
        "kernel": kernel,
        "heads": case.n_head,
        "kv_heads": case.n_kv_head,
        "head_dim": case.head_dim,
        "batch": len(case.lens),
        "length": max(case.lens),
        "capacity": case.capacity,
        "dtype": dtype_name(case.dtype),
        "int8": case.int8,
        "ragged": case.common_len is None,
        "bytes": case.nbytes,
        "us": micros,
        "why": why,
        "share": share,
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def seconds(kernel: Kernel, copies: list[Inputs], rounds: int) -> float:
    """Median seconds a call, over rounds of CALLS or more calls that go round the copies."""
    calls = copies * math.ceil(CALLS / len(copies))
    times = gpu_times(kernel, calls, rounds) if CUDA else cpu_times(kernel, calls, rounds)
    return statistics.median(times) / len(calls)


def cpu_times(kernel: Kernel, calls: list[Inputs], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds + 1):  # the first warms up
        start = time.perf_counter()
        for inputs in calls:
            kernel(inputs)
        times.append(time.perf_counter() - start)
    return times[1:]


def gpu_times(kernel: Kernel, calls: list[Inputs], rounds: int) -> list[float]:
    """The calls out of one CUDA graph, between events."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compile, tune, allocate
        for inputs in calls * 2:
            kernel(inputs)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in calls:
            kernel(inputs)

    times = []
    for _ in range(rounds + 2):  # the first two warm up
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times[2:]


# --- what is printed and drawn ---

def show_case(case: Case, bandwidth: float) -> None:
    kind = "int8" if case.int8 else dtype_name(case.dtype)
    floor = 1e6 * case.nbytes / bandwidth
    print(
        f"\n{case.group}: {case.n_head}/{case.n_kv_head} heads of {case.head_dim}, "
        f"batch {len(case.lens)}, {min(case.lens)}-{max(case.lens)} tokens, "
        f"capacity {case.capacity}, {kind}: {case.nbytes / 1e6:.1f} MB, floor {floor:.1f} us",
        flush=True,
    )


def show(row: dict[str, Any]) -> None:
    result = f"  {row['why'][:80]}"
    if row["us"] is not None:
        result = f"{row['us']:10.1f} us {row['share']:7.1%}"
    print(f"  {row['kernel']:20}{result}", flush=True)


def group_to_plot(rows: list[dict[str, Any]]) -> str:
    """The group with the most lengths; of several, one of an 8B model, or the first by name."""

    def richness(group: str) -> tuple[int, bool]:
        lengths = {row["length"] for row in rows if row["group"] == group}
        return len(lengths), "8b" in group

    return max(sorted({row["group"] for row in rows}), key=richness)


def plot(
    path: str, pyplot: ModuleType, rows: list[dict[str, Any]], bandwidth: float, device: str
) -> None:
    """Time against length at batch 1, a line a kernel, the floor dashed."""
    single = [row for row in rows if row["batch"] == 1 and row["us"]]
    group = group_to_plot(single)
    points: dict[str, list[tuple[int, float]]] = {}
    floor = set()
    for row in single:
        if row["group"] == group:
            points.setdefault(row["kernel"], []).append((row["length"], row["us"]))
            floor.add((row["length"], row["bytes"] / bandwidth * 1e6))

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for kernel, line in points.items():
        width = 2.5 if kernel == "ours" else 1
        axes.plot(*zip(*sorted(line)), marker="o", label=kernel, linewidth=width)
    axes.plot(*zip(*sorted(floor)), "k--", label=f"copy bandwidth, {bandwidth / 1e9:.0f} GB/s")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="cached tokens",
        ylabel="microseconds",
        title=f"decode attention, batch 1, {group}, {device}",
    )
    axes.legend()
    figure.savefig(path)


# --- the command line ---

def parse_args() -> tuple[argparse.Namespace, ModuleType | None]:
    """-> the flags, and matplotlib's pyplot where --plot needs it."""
    groups = sorted({case.group for case in cases()})
    p = Parser("attention.py", description=__doc__.splitlines()[0])
    add = p.add_argument
    add("--only", nargs="+", metavar="GROUP", choices=groups,
        help="groups of cases to run, of %(choices)s; default: all")
    add("--rounds", metavar="N", type=number(int, 1), default=20,
        help="repetitions whose median counts, from 1; default: 20")
    add("--json", metavar="FILE", help="write the results there too, each as it comes")
    add("--plot", metavar="FILE",
        help="draw time against length there (.png, .svg); needs matplotlib")
    args = p.parse_args()
    for path in (args.json, args.plot):
        if path and not Path(path).parent.is_dir():
            p.error(f"cannot write {path}: there is no folder {Path(path).parent}")
    if not args.plot:
        return args, None
    if not any(len(case.lens) == 1 for case in chosen_cases(args.only)):
        p.error("--plot draws cases of one row, and --only leaves none")
    try:
        importlib.import_module("matplotlib").use("Agg")
        return args, importlib.import_module("matplotlib.pyplot")
    except ImportError:
        p.error("--plot needs matplotlib: pip install matplotlib")


def main() -> None:
    args, pyplot = parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    triton_version = triton.__version__ if triton else None
    bandwidth = copy_bandwidth(DEVICE, 2**30 if CUDA else 2**27)
    print(
        f"{device}, torch {torch.__version__}, triton {triton_version}, "
        f"copies at {bandwidth / 1e9:.0f} GB/s"
    )
    kernels = contestants()
    rows = []
    result = {
        "device": device,
        "torch": torch.__version__,
        "triton": triton_version,
        "copy_bandwidth": bandwidth,
        "command": " ".join(sys.argv),
        "rows": rows,
    }
    for case in chosen_cases(args.only):
        show_case(case, bandwidth)
        before = len(rows)
        for row in measure(case, kernels, bandwidth, args.rounds):
            show(row)
            rows.append(row)
            if args.json:
                Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
        if len(rows) == before:
            print("  left out: not enough memory", flush=True)
    if pyplot:
        plot(args.plot, pyplot, rows, bandwidth, device)
    print(json.dumps(result))
    failed = [row for row in rows if row["kernel"] == "ours" and row["why"]]
    if failed:
        sys.exit(f"attention.py: error: ours failed in {len(failed)} cases: {failed[0]['why']}")


if __name__ == "__main__":
    main()
