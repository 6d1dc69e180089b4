"""Tests of kernels.py. Without a CUDA device the Triton kernels run in Triton's interpreter."""
import itertools
import json
import math
import os
import random
import subprocess
import sys

import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import numpy as np
import pytest

import kernels
from kernels import flash_decode, flash_decode_reference, quantize_kv

triton = pytest.importorskip("triton")
import triton.language as tl

HERE = os.path.dirname(os.path.abspath(kernels.__file__))
DEVICE = "cuda" if CUDA else "cpu"
F16, BF16, F32, I8 = torch.float16, torch.bfloat16, torch.float32, torch.int8
COUNTERS = torch.zeros(4096, dtype=torch.int32)

if not CUDA:  # the interpreter keeps bf16 as its bits, and forgets so in two places
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    cast = InterpreterBuilder.cast_impl

    def cast_through_float32(self, x, dtype):
        if tl.bfloat16 in (x.dtype.scalar, dtype.scalar) and tl.float32 not in (x.dtype.scalar, dtype.scalar):
            x = cast(self, x, tl.float32)
        return cast(self, x, dtype)

    def dot(self, a, b, acc, *_):
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return TensorHandle(np.matmul(a.data, b.data, dtype=acc.data.dtype) + acc.data, acc.dtype.scalar)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_through_float32, dot


# --- how a case is made and run ---

def make(lens, Hkv=2, G=2, T=1, D=16, S=None, dtype=F32, int8=False, append=False, seed=0, device=DEVICE, **options):
    """Arguments of a call; everything that is not live is NaN, in the caches or in the scales of int8 caches."""
    g = torch.Generator().manual_seed(seed)
    B, S = len(lens), S or max(lens) + T
    q, k, v = (torch.randn(B, h, T, D, generator=g).to(dtype) for h in (Hkv * G, Hkv, Hkv))
    caches = [torch.randn(B, Hkv, S, D, generator=g).to(dtype) for _ in range(2)]
    scales = [None, None]
    if int8:
        caches, scales = map(list, zip(*map(quantize_kv, caches)))
    for x in scales if int8 else caches:
        for b, n in enumerate(lens):
            x[b, :, n:] = math.nan
    for name in ("alibi_slopes", "sinks"):
        if options.get(name) is True:
            options[name] = (torch.rand(Hkv * G, generator=g) * 2).to(device)
    to = lambda x: x if x is None else x.to(device)
    args = [q, *caches, torch.tensor(lens, dtype=torch.int32), *((k, v) if append else (None, None))]
    return list(map(to, args)), dict(options, k_scale=to(scales[0]), v_scale=to(scales[1]))


def copies(args, options):
    clone = lambda x: x.clone() if isinstance(x, torch.Tensor) else x
    return [clone(x) for x in args], {name: clone(x) for name, x in options.items()}


def run_torch(args, options):
    return flash_decode(*args, **options, return_lse=True)


def run_triton(args, options, n_programs=16, **blocks):
    """Through the operator on a GPU; else the kernel's interpreted launch, as on a device of n_programs / 2 SMs."""
    o = dict(scale=None, causal=True, window=None, softcap=None, alibi_slopes=None, sinks=None) | options
    if CUDA and not blocks:
        return flash_decode(*args, **options, return_lse=True)
    rows, D = args[0].shape[1] // args[1].shape[1] * args[0].shape[2], args[0].shape[3]
    if not CUDA:
        blocks = dict(BLOCK_M=max(16, min(32, triton.next_power_of_2(rows))), BLOCK_N=32, MIN_TILES=2,
                      BLOCK_D=max(16, triton.next_power_of_2(D))) | blocks
    return kernels._flash_decode_triton(
        *args, o["k_scale"], o["v_scale"], o["scale"], o["causal"], o["window"], o["softcap"], o["alibi_slopes"],
        o["sinks"], blocks=blocks, n_programs=n_programs)


RUNS = {"torch": run_torch, "triton": run_triton}
both = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


@pytest.fixture(autouse=True)
def counters(monkeypatch):
    """Interpreted launches have no stream to keep counters for; every launch must leave them at zero."""
    if not CUDA:
        monkeypatch.setattr(kernels, "_counters", lambda device, n: COUNTERS)
    yield
    assert not COUNTERS.any()
    COUNTERS.zero_()


def check(run, args, options):
    """run against the reference: results, log-sum-exp, and every bit of the caches and scales."""
    (mine, o1), (theirs, o2) = copies(args, options), copies(args, options)
    out, lse = run(mine, o1)
    expected, expected_lse = flash_decode_reference(*theirs, **o2, return_lse=True)
    assert out.shape == args[0].shape and out.dtype == args[0].dtype and lse.dtype == F32
    tolerance = {F32: 2e-5, F16: 5e-3, BF16: 2e-2}[out.dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=tolerance, atol=tolerance)
    for a, b in zip((*mine[1:3], o1["k_scale"], o1["v_scale"]), (*theirs[1:3], o2["k_scale"], o2["v_scale"])):
        assert a is None or torch.equal(a.float().nan_to_num(-7), b.float().nan_to_num(-7))
    return out, lse


# --- the definition itself ---

def by_hand(args, options):
    """The definition again, one query, head and key at a time; no int8, nothing appended."""
    q, keys, values, lens = (x.cpu() for x in args[:4])
    o, out, lse = options, torch.zeros(q.shape), torch.full(q.shape[:3], -math.inf)
    B, Hq, T, D = q.shape
    for b, h, t in itertools.product(range(B), range(Hq), range(T)):
        weights, terms = [], [] if o.get("sinks") is None else [math.exp(o["sinks"][h])]
        for j in range(lens[b]):
            p = lens[b].item() - T + t
            if (o.get("causal", True) and j > p) or (o.get("window") and j <= p - o["window"]):
                continue
            s = float(q[b, h, t] @ keys[b, h * keys.shape[1] // Hq, j]) * (o.get("scale") or D ** -0.5)
            if o.get("softcap"):
                s = o["softcap"] * math.tanh(s / o["softcap"])
            if o.get("alibi_slopes") is not None:
                s -= float(o["alibi_slopes"][h]) * abs(p - j)
            weights.append(math.exp(s))
            out[b, h, t] += weights[-1] * values[b, h * keys.shape[1] // Hq, j]
        total = sum(weights) + sum(terms)
        if total:
            out[b, h, t] /= total
            lse[b, h, t] = math.log(total)
    return out, lse


@pytest.mark.parametrize("options", [
    {}, dict(causal=False), dict(window=3), dict(softcap=2.0), dict(alibi_slopes=True), dict(sinks=True),
    dict(scale=0.5), dict(causal=False, alibi_slopes=True),
    dict(window=2, softcap=1.5, alibi_slopes=True, sinks=True)], ids=str)
def test_reference_is_the_definition(options):
    for T in (1, 3):
        args, o = make([0, 2, 7], Hkv=2, G=3, T=T, D=8, S=9, device="cpu", **options)
        out, lse = flash_decode_reference(*args, **o, return_lse=True)
        expected, expected_lse = by_hand(args, o)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_quantize_kv():
    x = torch.randn(3, 5, 16)
    x[1] = 0
    values, scale = quantize_kv(x)
    assert values.dtype == I8 and scale.dtype == F32 and scale.shape == (3, 5)
    assert not values[1].any() and not scale[1].any()
    assert values[0].abs().amax(-1).eq(127).all()
    assert ((values * scale[..., None] - x).abs() <= scale[..., None] / 2 + 1e-6).all()


# --- both implementations against the reference ---

EDGES = [0, 1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 159, 160, 191, 192, 193]


@both
@pytest.mark.parametrize("append", [False, True], ids=["read", "append"])
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_lengths_around_tiles_and_chunks(run, append, int8):
    check(run, *make(EDGES, Hkv=1, G=3, D=24, append=append, int8=int8))


@both
@pytest.mark.parametrize("T", [1, 2, 5, 16])
def test_appended_tokens_across_tiles_and_chunks(run, T):
    if run is run_triton and not CUDA:  # every tile a chunk of its own
        run = lambda args, options: run_triton(args, options, n_programs=64, MIN_TILES=1)
    for append in (False, True):
        check(run, *make([0, 1, 30, 31, 62, 63, 64, 65, 120, 126, 127, 128], Hkv=1, G=1, T=T, append=append, S=160))


@both
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_dtypes(run, dtype, int8):
    check(run, *make([5, 150, 33], G=4, D=64, dtype=dtype, int8=int8, append=True))


@both
@pytest.mark.parametrize("Hkv,G", [(4, 1), (2, 3), (1, 4), (1, 5), (1, 6), (2, 7), (1, 8), (1, 17), (1, 40)])
def test_head_groups(run, Hkv, G):
    check(run, *make([70, 3], Hkv=Hkv, G=G, append=True))
    check(run, *make([70, 3], Hkv=Hkv, G=G, T=3, append=True, S=90))


@both
@pytest.mark.parametrize("D", [8, 24, 64, 72, 80, 96, 128, 192, 256])
def test_head_sizes(run, D):
    check(run, *make([70, 3], Hkv=1, D=D, append=True))
    check(run, *make([70, 3], Hkv=1, D=D, append=True, int8=True))


OPTIONS = [dict(causal=False), dict(scale=0.3), dict(softcap=3.0), dict(alibi_slopes=True), dict(sinks=True),
           dict(window=1), dict(window=5), dict(window=32), dict(window=33), dict(window=100), dict(window=1000),
           dict(causal=False, sinks=True, alibi_slopes=True),
           dict(window=40, softcap=3.0, alibi_slopes=True, sinks=True)]


@both
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(run, options):
    check(run, *make([0, 1, 40, 190], Hkv=1, G=2, T=1, append=True, **options))
    check(run, *make([0, 1, 2, 40, 190], Hkv=1, G=2, T=4, S=200, **options))
    check(run, *make([0, 64, 190], Hkv=1, G=2, T=3, append=True, int8=True, **options))


@both
def test_nothing_to_see(run):
    out, lse = check(run, *make([0, 0], T=2))
    assert not out.any() and lse.eq(-math.inf).all()
    args, options = make([0, 1], T=3, sinks=True)
    out, lse = check(run, args, options)
    assert not out[0].any() and lse[0].eq(options["sinks"][:, None]).all()
    assert not out[1, :, :2].any() and out[1, :, 2].any()


@both
def test_fuzz(run):
    rng, n = random.Random(1), {"torch": 150, "triton": 30}
    for seed in range(n["torch"] if run is run_torch else n["triton"] * (5 if CUDA else 1)):
        append, causal, T = rng.random() < 0.5, rng.random() < 0.7, rng.choice([1, 1, 2, 5, 16])
        S = rng.choice([40, 130, 300])
        most = S - T if append else S
        lens = [rng.randint(0, most) for _ in range(rng.choice([1, 2, 3]))]
        if rng.random() < 0.3:
            lens = [lens[0]] * len(lens)
        case = dict(
            lens=lens, Hkv=rng.choice([1, 2]), G=rng.choice([1, 2, 3, 7]), T=T, D=rng.choice([16, 64, 72]), S=S,
            seed=seed, dtype=rng.choice([F32, F16, BF16]), int8=rng.random() < 0.4, append=append, causal=causal,
            window=rng.choice([None, 1, 5, 64]) if causal else None, softcap=rng.choice([None, None, 5.0]),
            alibi_slopes=rng.choice([None, True]), sinks=rng.choice([None, True]), scale=rng.choice([None, 0.3]))
        shape = {} if run is run_torch or CUDA else dict(
            n_programs=rng.choice([4, 16, 64]), BLOCK_N=rng.choice([32, 64]), MIN_TILES=rng.choice([1, 2]))
        try:
            check(lambda *x: run(*x, **shape), *make(**case))
        except Exception as e:
            raise AssertionError(f"{case} {shape}") from e


# --- what must not matter: capacity, views, neighbours, earlier calls ---

@both
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_same_bits_whatever_the_capacity(run, int8):
    args, options = make([150, 33], append=True, int8=int8)
    expected = run(*copies(args, options))
    for S in (160, 1024):
        wide, o = copies(args, options)
        for i, x in enumerate((wide[1], wide[2], o["k_scale"], o["v_scale"])):
            if x is not None:  # a slice of a larger cache, amid NaN
                dead = 77 if x.dtype == I8 else math.nan
                big = torch.full((3, 5, 2, S, *x.shape[3:]), dead, dtype=x.dtype, device=x.device)
                view = big[1, 1:3]
                view[:, :, :x.shape[2]] = x
                if i < 2:
                    wide[1 + i] = view
                else:
                    o["kv"[i - 2] + "_scale"] = view
        for a, b in zip(expected, run(wide, o)):
            assert torch.equal(a, b)


@both
def test_any_strides(run):
    args, options = make([70, 9], Hkv=2, G=3, T=2, D=24, append=True)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x for x in args]
    turned[5] = torch.randn(*args[5].shape[:3], 31, device=DEVICE)[..., 3:27].copy_(args[5])
    turned[2] = torch.full((*args[2].shape[:3], 31), math.nan, device=DEVICE)[..., 3:27].copy_(args[2])
    for a, b in zip(run(*copies(args, options)), run(turned, options)):
        torch.testing.assert_close(a, b)
    check(run, args, options)


@both
def test_a_row_does_not_feel_its_neighbours(run):
    args, options = make([150, 0, 33, 7], append=True)
    together = run(*copies(args, options))
    for b in range(4):
        alone, o = copies(args, options)
        for x, y in zip(together, run([x[b:b + 1] for x in alone], o)):
            torch.testing.assert_close(x[b:b + 1], y, rtol=1e-5, atol=1e-6)


@both
def test_decoding_token_by_token_is_like_reading_it_all(run):
    for int8 in (False, True):
        args, options = make([60, 3], int8=int8, append=True, S=80)
        final, new = copies(args, options)[0], torch.Generator().manual_seed(5)
        for _ in range(8):
            tokens = [torch.randn(x.shape, generator=new).to(DEVICE) for x in (final[0], final[4], final[5])]
            final[0], final[4], final[5] = tokens
            out, lse = run(final, options)
            final[3] = final[3] + 1
        expected = flash_decode_reference(*final[:4], **options, return_lse=True)
        torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=1e-5)


def test_the_same_twice():
    args, options = make([190, 150], append=True)
    first, second = run_triton(*copies(args, options)), run_triton(*copies(args, options))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("n_programs", [2, 6, 32, 100])
def test_split_over_any_number_of_programs(n_programs):
    for lens in ([300], [300, 0, 20]):
        check(lambda a, o: run_triton(a, o, n_programs=n_programs, **(dict(MIN_TILES=1) if not CUDA else {})),
              *make(lens, Hkv=1, append=True, sinks=True))


def test_a_full_row_writes_nothing_outside_its_cache():
    room = torch.full((4, 1, 32, 16), 5.0, device=DEVICE)
    args, options = make([32, 31], Hkv=1, T=3, append=True, S=40)
    args[1], args[2] = room[1:3], room[1:3].clone()
    with pytest.raises(ValueError, match="32 cached . 3 new tokens do not fit into a cache of 32"):
        kernels._flash_decode_torch(*args, None, None, None, True, None, None, None, None)
    out, _ = run_triton(args, options)
    assert out.isfinite().all() and room[0].eq(5).all() and room[3].eq(5).all()


@both
@pytest.mark.skipif(CUDA, reason="would need the memory")
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_strides_beyond_32_bits(run, dim, tmp_path):
    """Caches and scales whose rows, heads or tokens lie 2^31 elements apart, in sparse files hardly touched."""
    args, options = make([3, 2], Hkv=2, G=1, D=16, S=4, int8=True, append=True)
    expected = flash_decode_reference(*copies(args, options)[0], **copies(args, options)[1])

    def apart(x, name, step):
        strides = list(x.stride())
        strides[dim] = step
        size = step * (x.shape[dim] - 1) + x.numel()
        file = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=x.dtype)
        return file.as_strided(x.shape, strides).copy_(x)

    for i in (1, 2):
        args[i] = apart(args[i], f"cache{i}", 2 ** 31 if dim < 2 else 2 ** 30)
    if dim < 2:
        options["k_scale"] = apart(options["k_scale"], "k_scale", 2 ** 31)
        options["v_scale"] = apart(options["v_scale"], "v_scale", 2 ** 31)
    out, _ = run(args, options)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


# --- the operator ---

@pytest.mark.parametrize("change,message", [
    (dict(q=torch.zeros(2, 4, 17, 16)), "T must be 1 to 16 tokens, got 17"),
    (dict(q=torch.zeros(2, 4, 16)), r"q must be \[B, Hq, T, D\]"),
    (dict(q=torch.zeros(2, 3, 1, 16)), "query heads must be a multiple of KV heads, got 3 and 2"),
    (dict(q=torch.zeros(2, 4, 1, 16, dtype=torch.float64)), "q must be .*float32 on cpu, got"),
    (dict(k_cache=torch.zeros(2, 2, 9, 16, dtype=F16)), "k_cache must be .*float32 or torch.int8 on cpu, got"),
    (dict(v_cache=torch.zeros(2, 2, 8, 16)), r"v_cache must be \[2, 2, 9, 16\] .* got \[2, 2, 8, 16\]"),
    (dict(cache_seqlens=torch.zeros(2, dtype=torch.int64)), r"cache_seqlens must be \[2\] torch.int32"),
    (dict(cache_seqlens=torch.zeros(3, dtype=torch.int32)), r"cache_seqlens must be \[2\]"),
    (dict(k=None), "k and v go together"),
    (dict(k=torch.zeros(2, 2, 2, 16)), r"k must be \[2, 2, 1, 16\]"),
    (dict(k_scale=torch.zeros(2, 2, 9)), "int8 caches, and only they, need"),
    (dict(k_cache=torch.zeros(2, 2, 9, 16).to(I8), v_cache=torch.zeros(2, 2, 9, 16).to(I8)), "int8 caches, and only they, need"),
    (dict(window=0), "window must be at least 1"),
    (dict(window=4, causal=False), "needs causal=True"),
    (dict(softcap=0.0), "softcap must be above 0"),
    (dict(sinks=torch.zeros(3)), r"sinks must be \[4\]"),
    (dict(alibi_slopes=torch.zeros(4, dtype=F16)), "alibi_slopes must be"),
    (dict(k_cache=torch.zeros(2, 2, 16, 9).transpose(2, 3)), "the last dimension of k_cache must be contiguous"),
    (dict(v_cache=torch.zeros(2, 2, 9, 16, device="meta")), "v_cache must be .* on cpu, got .* on meta"),
    (dict(cache_seqlens=torch.tensor([9, 1], dtype=torch.int32)), "9 cached . 1 new tokens do not fit"),
], ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_mistakes_get_a_sentence(change, message):
    args, options = make([3, 2], T=1, S=9, append=True, device="cpu")
    call = dict(zip(("q", "k_cache", "v_cache", "cache_seqlens", "k", "v"), args), **options) | change
    with pytest.raises(ValueError, match=message):
        flash_decode(**call)


def test_head_size_is_checked():
    for D in (4, 12, 264):
        args, options = make([3], D=D)
        with pytest.raises(ValueError, match=f"multiple of 8 up to 256, got {D}"):
            flash_decode(*args, **options)


def test_operators_are_registered_properly():
    flat = lambda a, o: (*a, o["k_scale"], o["v_scale"], None, True, None, None, o.get("alibi_slopes"), o.get("sinks"))
    for case in (make([3, 7], append=True), make([4, 4], T=3, G=1), make([3, 7], Hkv=1, T=2, sinks=True, append=True),
                 make([4, 4], T=2, append=True, int8=True, sinks=True, alibi_slopes=True)):
        torch.library.opcheck(torch.ops.gpt_flash.flash_decode.default, flat(*case))
    x, w = torch.randn(3, 64, device=DEVICE), torch.randint(-127, 127, (8, 64), dtype=I8, device=DEVICE)
    torch.library.opcheck(torch.ops.gpt_flash.int8_linear.default, (x, w, torch.rand(8, device=DEVICE)))
    w, s = torch.randint(0, 256, (8, 32), dtype=torch.uint8, device=DEVICE), torch.rand(8, 2, device=DEVICE)
    torch.library.opcheck(torch.ops.gpt_flash.int4_linear.default, (x, w, s, s))


def test_compiled_it_updates_the_cache_in_place():
    """One graph for all layers of a stacked cache; nothing in it copies a cache."""
    from torch._inductor.utils import run_and_get_code
    layers = torch.randn(3, 2, 2, 2, 32, 16, device=DEVICE)
    (q, _, _, lens, k, v), _ = make([3, 7], append=True, S=32)

    def block(q, kv, k, v):
        return flash_decode(q * 2, kv[0], kv[1], lens, k + 1, v).transpose(1, 2).flatten(2) + 1

    eager, compiled = layers.clone(), torch.compile(block, fullgraph=True)
    with torch.inference_mode():
        expected = [block(q, kv, k, v) for kv in eager]
        out, code = run_and_get_code(lambda: [compiled(q, kv, k, v) for kv in layers])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(layers, eager)
    assert len(code) == 1 and "gpt_flash.flash_decode.default(" in code[0] and "clone" not in code[0]


# --- int8 and int4 weights ---

@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("N,K,rows", [(24, 96, 1), (5, 1152, 3), (130, 2048, 1), (16, 256, 16)])
def test_linear(dtype, N, K, rows):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 1, K, generator=g).to(DEVICE, dtype)
    cases = [(kernels.int8_linear, kernels.int8_linear_reference,
              (torch.randint(-127, 128, (N, K), generator=g, dtype=I8), torch.rand(N, generator=g)))]
    for group in (32, 64, 128):
        if K % group == 0:
            w = torch.randint(0, 256, (N, K // 2), generator=g, dtype=torch.uint8)
            scales = torch.rand(N, K // group, generator=g), torch.randn(N, K // group, generator=g)
            cases.append((kernels.int4_linear, kernels.int4_linear_reference, (w, *scales)))
    for linear, reference, weights in cases:
        weights = [w.to(DEVICE) for w in weights]
        expected = reference(x, *weights)
        kernel, grid, arguments = kernels._linear_arguments(x, *weights)
        kernel[grid](**arguments)
        tolerance = {F32: 1e-5, F16: 2e-3, BF16: 1e-2}[dtype] * expected.abs().max().item()
        for y in (arguments["y_ptr"], linear(x, *weights)):
            assert y.shape == (rows, 1, N) and y.dtype == dtype
            torch.testing.assert_close(y, expected, rtol=0, atol=tolerance)


def test_linear_layouts_are_what_they_are_said_to_be():
    w = torch.tensor([[0x1F, 0x80] + [0x88] * 14], dtype=torch.uint8)
    x, one, zero = torch.eye(32), torch.ones(1, 1), torch.zeros(1, 1)
    assert kernels.int4_linear(x, w, one, zero).flatten().tolist() == [7, -7, -8, 0] + [0] * 28
    assert kernels.int4_linear(x, w, one * 2, one).flatten()[:4].tolist() == [15, -13, -15, 1]
    for call in (lambda: kernels.int8_linear(x, w.to(I8), one[0]), lambda: kernels.int4_linear(x, w[:, :8], one, zero)):
        with pytest.raises(ValueError, match="int._linear: needs x"):
            call()


# --- ahead of time, and without Triton ---

def python(*args, **env):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | env
    return subprocess.run([sys.executable, *args], cwd=HERE, env=env, capture_output=True, text=True)


def test_report():
    done = python("kernels.py", "--report", "sm_90")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()[1:]
    assert len(lines) == 16 and all(line.startswith("sm_90 ") and "16 B" in line for line in lines)
    assert sum("mma" in line for line in lines) == 12  # all of flash_decode but float32


def test_report_of_a_gpu_it_does_not_know():
    done = python("kernels.py", "--report", "sm_70")
    assert done.returncode == 2 and "invalid choice: 'sm_70'" in done.stderr and not done.stdout


def test_report_sees_narrow_loads_and_spills():
    done = python("-c", """if True:
        import kernels
        real, seen = kernels._variants, kernels._compile
        def narrow(smem):
            name, kernel, arguments, needed = next(real(smem))
            yield name, kernel, arguments | dict(VEC=1), needed  # nothing known of the strides
            yield name, kernel, arguments | dict(maxnreg=64), needed
        def limited(arch, kernel, arguments):
            limit = {"maxnreg": arguments.pop("maxnreg")} if "maxnreg" in arguments else {}
            compile = kernels.triton.compile
            kernels.triton.compile = lambda *a, options, **k: compile(*a, options=options | limit, **k)
            try:
                return seen(arch, kernel, arguments)
            finally:
                kernels.triton.compile = compile
        kernels._variants, kernels._compile = narrow, limited
        raise SystemExit(kernels.report(["sm_80"]))""")
    assert done.returncode == 1, done.stderr
    narrow, spills = done.stdout.splitlines()[1:]
    assert "NARROW LOADS" in narrow and "SPILLS" not in narrow and "SPILLS" in spills


def test_without_triton():
    done = python("-c", """if True:
        import sys
        sys.modules["triton"] = None
        import torch, kernels
        q, cache = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 9, 16)
        lens = torch.tensor([5], dtype=torch.int32)
        out, expected = (f(q, cache, cache, lens) for f in (kernels.flash_decode, kernels.flash_decode_reference))
        torch.testing.assert_close(out, expected)""")
    assert done.returncode == 0, done.stderr
    done = python("-c", """if True:
        import runpy, sys
        sys.modules["triton"], sys.argv = None, ["kernels.py", "--report"]
        runpy.run_path("kernels.py", run_name="__main__")""")
    assert done.returncode == 2 and "needs Triton" in done.stderr, done.stderr


# --- the benchmark ---

def test_benchmark_runs(tmp_path):
    file = tmp_path / "results.json"
    done = python("benchmarks/attention.py", "--only", "ragged", "int8", "--rounds", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(file.read_text()) and result["copy_bandwidth"] > 0
    assert {r["group"] for r in result["rows"]} == {"ragged", "int8"}
    assert all(r["us"] > 0 for r in result["rows"] if r["kernel"] == "ours")
    assert all(r["why"] for r in result["rows"] if r["us"] is None)
    done = python("-c", """if True:
        import runpy, sys
        sys.modules["matplotlib"], sys.argv = None, ["attention.py", "--plot", "x.png"]
        runpy.run_path("benchmarks/attention.py", run_name="__main__")""")
    assert done.returncode == 2 and "needs matplotlib" in done.stderr


# --- only on a GPU ---

@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_cuda_graph_follows_the_lengths():
    args, options = make([5, 900], Hkv=4, G=4, D=128, dtype=BF16, append=True, S=2048)
    args[1].nan_to_num_(0), args[2].nan_to_num_(0)
    expected, o = copies(args, options)
    static = run_torch(*copies(args, options))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = run_torch(args, options)
        args[3] += 1
    for _ in range(40):
        graph.replay()
        want = flash_decode_reference(*expected, **o, return_lse=True)
        expected[3] += 1
        torch.testing.assert_close(static[0], want[0], rtol=2e-2, atol=2e-2)
    assert torch.equal(args[1], expected[1])


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_lengths_and_capacity_never_recompile():
    def compiled():
        return sum(len(cache[0]) for cache in kernels._flash_decode_kernel.device_caches.values())
    for S, n in ((256, 16), (1001, 999), (4096, 17), (4096, 1), (131072, 100000)):
        args, options = make([1], Hkv=1, G=4, D=64, dtype=F16, S=S)
        args[3].fill_(n)
        args[1].nan_to_num_(0), args[2].nan_to_num_(0)
        run_torch(args, options)
        assert compiled() == (first := compiled() if S == 256 else first)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, *sys.argv[1:]]))
