"""Decode attention, ours against its peers: microseconds a call, and the share of the device's copy bandwidth reached.

    python benchmarks/attention.py [--only llama3-8b ...] [--json FILE] [--plot FILE]

One token attends to what is cached, so a call reads every live key and value once: bytes / copy bandwidth is the floor,
with the bandwidth measured in the same run. All kernels get the same tensors, run out of a CUDA graph, and go round as
many copies of the tensors as it takes to find nothing in the L2 cache. flash, efficient and cuDNN get caches cut to the
live length, which no decoder can do in a graph; math and flex mask the whole cache. A kernel that cannot do a case, or
does it wrong, shows no time. On a CPU: the PyTorch versions, small shapes."""
import argparse
import functools
import importlib
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels import flash_decode, flash_decode_reference, quantize_kv, triton

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

def cases():
    """Group, query heads, KV heads, head size, live length of each row, capacity, dtype, int8 cache."""
    bf16, fp16 = torch.bfloat16, torch.float16
    if not CUDA:
        for n, batch in ((64, 1), (512, 1), (64, 4)):
            yield "small", 8, 2, 64, [n] * batch, n, bf16, False
        yield "ragged", 8, 2, 64, [500, 3, 90], 512, bf16, False
        yield "int8", 8, 2, 64, [512], 512, bf16, True
        yield "capacity", 8, 2, 64, [64], 64 * 16, bf16, False
        return
    for batch in (1, 16, 128):
        for n in (2048, 4096, 8192):
            yield "flash-attention", 12, 12, 128, [n] * batch, n, fp16, False
    for group, Hq, Hkv in (("llama2-7b", 32, 32), ("llama3-8b", 32, 8), ("llama3-70b", 64, 8)):
        for batch in (1, 8, 64):
            for n in (512, 1024, 2048, 8192, 32768, 131072):
                yield group, Hq, Hkv, 128, [n] * batch, n, bf16, False
    for batch in (8, 64):  # every length from 512 to 32k as likely as its double
        yield "ragged", 32, 8, 128, [int(512 * 64 ** (i / (batch - 1))) for i in range(batch)], 32768, bf16, False
    for n in (1024, 8192, 32768, 131072):
        yield "int8", 32, 8, 128, [n], n, bf16, True
    for n in (512, 2048):
        for times in (1, 4, 16, 64):
            yield "capacity", 32, 8, 128, [n], n * times, bf16, False

def inputs(Hq, Hkv, D, lens, S, dtype, int8):
    q, k, v = (torch.randn(len(lens), h, s, D, dtype=dtype, device=DEVICE) for h, s in ((Hq, 1), (Hkv, S), (Hkv, S)))
    (k, k_scale), (v, v_scale) = (quantize_kv(k), quantize_kv(v)) if int8 else ((k, None), (v, None))
    return q, k, v, torch.tensor(lens, dtype=torch.int32, device=DEVICE), k_scale, v_scale

# --- the contestants: (q, k, v, lens, k_scale, v_scale, n) -> output, n the length if all rows share it, else None ---

def ours(q, k, v, lens, k_scale, v_scale, n):
    return flash_decode(q, k, v, lens, k_scale=k_scale, v_scale=v_scale)

def math(q, k, v, lens, k_scale, v_scale, n):
    if k_scale is not None:
        k, v = (k * k_scale[..., None]).to(q.dtype), (v * v_scale[..., None]).to(q.dtype)
    mask = torch.arange(k.shape[2], device=q.device) < lens[:, None, None, None]
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

def fused(backend, q, k, v, lens, k_scale, v_scale, n):
    if k_scale is not None or n is None:
        raise NotImplementedError("no int8, no ragged batch")
    if backend == SDPBackend.EFFICIENT_ATTENTION:  # knows no grouped heads: the copies are made outside, by expand
        k, v = (x[:, :, None].expand(-1, -1, q.shape[1] // k.shape[1], -1, -1).flatten(1, 2) for x in (k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k[:, :, :n], v[:, :, :n], enable_gqa=q.shape[1] != k.shape[1])

def flex(q, k, v, lens, k_scale, v_scale, n):
    from torch.nn.attention.flex_attention import create_block_mask
    if k_scale is not None:
        raise NotImplementedError("no int8")
    if id(lens) not in flex.masks:
        flex.masks[id(lens)] = create_block_mask(lambda b, h, i, j: j < lens[b], len(lens), None, 1, k.shape[2], DEVICE)
    return flex.compiled(q, k, v, block_mask=flex.masks[id(lens)], enable_gqa=True)

def flash_attn(q, k, v, lens, k_scale, v_scale, n):
    if k_scale is not None:
        raise NotImplementedError("no int8")
    from flash_attn import flash_attn_with_kvcache
    return flash_attn_with_kvcache(*(x.transpose(1, 2) for x in (q, k, v)), cache_seqlens=lens).transpose(1, 2)

def flashinfer(q, k, v, lens, k_scale, v_scale, n):
    if k_scale is not None or len(lens) > 1:
        raise NotImplementedError("a batch needs a paged cache, and int8 is not known")
    from flashinfer import single_decode_with_kv_cache
    return single_decode_with_kv_cache(q[0, :, 0], k[0, :, :n], v[0, :, :n], kv_layout="HND")[None, :, None]

def contestants():
    found = {"ours": ours, "SDPA math": math, "SDPA flash": functools.partial(fused, SDPBackend.FLASH_ATTENTION)}
    if CUDA:
        from torch.nn.attention.flex_attention import flex_attention
        flex.compiled = torch.compile(flex_attention, dynamic=False)
        found |= {"SDPA math compiled": torch.compile(math, dynamic=False), "FlexAttention": flex,
                  "SDPA efficient": functools.partial(fused, SDPBackend.EFFICIENT_ATTENTION),
                  "SDPA cuDNN": functools.partial(fused, SDPBackend.CUDNN_ATTENTION)}
        for name, function in (("flash_attn", flash_attn), ("flashinfer", flashinfer)):
            if importlib.util.find_spec(name):
                found[name] = function
    return found

# --- measuring ---

def seconds(calls, rounds):
    """Median seconds a call, over rounds of all calls; on a GPU out of a CUDA graph, between events."""
    if not CUDA:
        def once():
            start = time.perf_counter()
            for call in calls:
                call()
            return time.perf_counter() - start
        once()
        return statistics.median(once() for _ in range(rounds)) / len(calls)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # warm up: compile, tune, allocate
        for call in calls * 2:
            call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(), graph.replay(), end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[2:]) / len(calls)

def copy_bandwidth(rounds):
    """Bytes a second, read and written, of a large copy."""
    x = torch.empty(2 ** 30 if CUDA else 2 ** 27, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.numel() / seconds([lambda: y.copy_(x)] * 4, rounds)

def measure(case, found, bandwidth, rounds):
    """One row a contestant; microseconds None where it cannot do the case."""
    group, Hq, Hkv, D, lens, S, dtype, int8 = case
    size = sum(lens) * Hkv * 2 * (D + 4 if int8 else D * dtype.itemsize)
    allocated = size * S * len(lens) / sum(lens)
    n_copies = max(1, min(32, -(-4 * torch.cuda.get_device_properties(0).L2_cache_size // size))) if CUDA else 2
    if CUDA and allocated * (n_copies + 1.5) > 0.9 * torch.cuda.mem_get_info()[0]:
        return [], size
    same = lens[0] if len(set(lens)) == 1 else None
    copies = [(*inputs(Hq, Hkv, D, lens, S, dtype, int8), same) for _ in range(n_copies)]
    q, k, v, seqlens, k_scale, v_scale, _ = copies[0]
    flex.masks, few, rows = {}, slice(0, 2), []  # the reference is slow: two rows are enough
    expected = flash_decode_reference(*(x[few] for x in (q, k, v, seqlens)), **dict(
        k_scale=k_scale[few], v_scale=v_scale[few]) if int8 else {})
    for name, function in found.items():
        micros, why = None, ""
        try:
            error = (function(*copies[0])[few] - expected).abs().max().item()
            if error > 0.03 * max(1, expected.abs().max().item()):
                raise ArithmeticError(f"wrong by {error:.3f}")
            micros = seconds([functools.partial(function, *c) for c in copies] * -(-16 // n_copies), rounds) * 1e6
        except Exception as e:  # a peer that refuses a case is a result, and must not end the run
            if name == "ours":
                raise
            why = f"{type(e).__name__}: {e}".splitlines()[0]
        rows.append(dict(
            group=group, kernel=name, heads=Hq, kv_heads=Hkv, head_dim=D, batch=len(lens), length=max(lens), capacity=S,
            dtype=str(dtype)[6:], int8=int8, ragged=same is None, bytes=size, us=micros, why=why,
            share=micros and size / (micros / 1e6) / bandwidth))
    return rows, size

def plot(path, pyplot, rows, bandwidth, device):
    """Time against length, batch 1, a line per kernel, of the group with the most lengths; the floor dashed."""
    groups = {r["group"] for r in rows}
    single = lambda g: [r for r in rows if r["group"] == g and r["batch"] == 1 and r["us"]]
    group = max(sorted(groups), key=lambda g: len({r["length"] for r in single(g)}) + ("8b" in g) / 2)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for kernel in dict.fromkeys(r["kernel"] for r in single(group)):
        points = sorted((r["length"], r["us"]) for r in single(group) if r["kernel"] == kernel)
        axes.plot(*zip(*points), marker="o", label=kernel, linewidth=2.5 if kernel == "ours" else 1)
    floor = sorted({(r["length"], r["bytes"] / bandwidth * 1e6) for r in single(group)})
    axes.plot(*zip(*floor), "k--", label=f"copy bandwidth, {bandwidth / 1e9:.0f} GB/s")
    axes.set(xscale="log", yscale="log", xlabel="cached tokens", ylabel="microseconds",
             title=f"decode attention, batch 1, {group}, {device}")
    axes.legend()
    figure.savefig(path)

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="GROUP", choices=sorted({c[0] for c in cases()}),
                        help="groups of cases to run, of %(choices)s; default: all")
    parser.add_argument("--rounds", type=int, default=20, help="repetitions whose median counts; default: 20")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    parser.add_argument("--plot", metavar="FILE", help="draw time against length there (.png, .svg); needs matplotlib")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.plot:
        try:
            import matplotlib
            matplotlib.use("Agg")
            from matplotlib import pyplot
        except ImportError:
            parser.error("--plot needs matplotlib: pip install matplotlib")
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    bandwidth, found, rows = copy_bandwidth(args.rounds), contestants(), []
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__ if triton else None}, "
          f"copies at {bandwidth / 1e9:.0f} GB/s")
    for case in cases():
        if args.only and case[0] not in args.only:
            continue
        group, Hq, Hkv, D, lens, S, dtype, int8 = case
        new, size = measure(case, found, bandwidth, args.rounds)
        print(f"\n{group}: {Hq}/{Hkv} heads of {D}, batch {len(lens)}, {min(lens)}-{max(lens)} tokens, capacity {S}, "
              f"{'int8' if int8 else str(dtype)[6:]}: {size / 1e6:.1f} MB, floor {size / bandwidth * 1e6:.1f} us"
              + ", left out: not enough memory" * (not new), flush=True)
        for r in new:
            time_and_share = f"{r['us']:10.1f} us {r['share']:7.1%}" if r["us"] else f"  {r['why'][:80]}"
            print(f"  {r['kernel']:20}{time_and_share}", flush=True)
        rows += new
    result = dict(device=device, torch=torch.__version__, triton=triton and triton.__version__,
                  copy_bandwidth=bandwidth, command=" ".join(sys.argv), rows=rows)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(args.plot, pyplot, rows, bandwidth, device)
    print(json.dumps(result))

if __name__ == "__main__":
    main()
