"""flash_decode, in Triton and in PyTorch, computes what its reference says.

Needs only interpreter.py beside this file, and kernels.py there or one folder up:
`python kernels_test.py`, or `pytest kernels_test.py`. Without a GPU the Triton
kernels run in Triton's interpreter; with one the same tests run there."""
import inspect
import itertools
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

triton = pytest.importorskip("triton")
import triton.language as tl

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]
import kernels
from interpreter import mend
from kernels import flash_decode, flash_decode_reference, flash_decode_unchecked, quantize_kv

DEVICE = "cuda" if CUDA else "cpu"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
I8, I32 = torch.int8, torch.int32
DTYPES = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
INT8 = pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
ON_A_GPU = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")

Call = dict[str, Any]  # every argument of flash_decode, by name
Result = tuple[Tensor, Tensor]  # output and log-sum-exp
Run = Callable[..., Result]

# --- how a case is made ---

ARGUMENTS = (
    "q", "k_cache", "v_cache", "cache_seqlens", "k", "v", "k_scale", "v_scale",
    "scale", "causal", "window", "softcap", "alibi_slopes", "sinks", "ring",
)


def make(
    lens: list[int],
    Hkv: int = 2,
    G: int = 2,
    T: int = 1,
    D: int = 16,
    S: int | None = None,
    dtype: torch.dtype = F32,
    int8: bool = False,
    append: bool = False,
    seed: int = 0,
    device: str = DEVICE,
    **options: Any,
) -> Call:
    """A random call of flash_decode on rows with lens tokens cached; options are its keywords,
    where alibi_slopes=True and sinks=True become random tensors.

    Everything that is not live is NaN, in the caches or in the scales of int8 caches."""
    generator = torch.Generator().manual_seed(seed)
    B = len(lens)
    Hq = Hkv * G
    S = S or max(lens) + T

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    call = dict.fromkeys(ARGUMENTS) | options
    call["causal"] = options.get("causal", True)
    call["ring"] = options.get("ring", False)
    call["cache_seqlens"] = torch.tensor(lens, dtype=I32)
    call["q"] = draw(B, Hq, T, D)
    new_tokens = {"k": draw(B, Hkv, T, D), "v": draw(B, Hkv, T, D)}
    if append:
        call |= new_tokens
    for name in ("k", "v"):
        cache = draw(B, Hkv, S, D)
        must_be_live = cache
        if int8:
            cache, must_be_live = quantize_kv(cache)
            call[f"{name}_scale"] = must_be_live
        for row, n in enumerate(lens):
            must_be_live[row, :, n:] = math.nan
        call[f"{name}_cache"] = cache
    for name in ("alibi_slopes", "sinks"):
        if call[name] is True:
            call[name] = torch.rand(Hq, generator=generator) * 2
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in call.items()}


def copy_of(call: Call) -> Call:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in call.items()}


def in_order(call: Call) -> list[Any]:
    """The arguments as the operator takes them, without names."""
    return [call[name] for name in ARGUMENTS]

# --- how it is run ---


def run_torch(call: Call) -> Result:
    """Through the public function: PyTorch on a CPU, the kernel on a GPU."""
    return flash_decode(**call, return_lse=True)


def run_triton(
    call: Call, n_programs: int | None = None, one_launch: bool = True, **blocks: int
) -> Result:
    """The kernel: on the GPU, or interpreted, as on a device that runs n_programs at once.

    n_programs and blocks override how the work is cut."""
    if CUDA and one_launch and n_programs is None and not blocks:
        return run_torch(call)
    _, Hq, T, D = call["q"].shape
    rows = Hq // call["k_cache"].shape[1] * T
    if CUDA:
        gpu = torch.cuda.get_device_properties()
        itemsize = call["k_cache"].element_size()
        tiles = kernels._blocks(
            itemsize, D, rows, gpu.shared_memory_per_multiprocessor, gpu.warp_size)
    else:
        tiles = dict(
            BLOCK_M=max(16, min(32, triton.next_power_of_2(rows))),
            BLOCK_N=32,
            BLOCK_D=max(16, triton.next_power_of_2(D)),
        )
    return kernels._flash_decode_triton(
        *in_order(call), blocks=tiles | blocks, n_programs=n_programs or 16, one_launch=one_launch)


def run_apart(call: Call, **cut: int) -> Result:
    """The kernels as AMD needs them: one that appends, one that attends, one that sums."""
    return run_triton(call, one_launch=False, **cut)


RUNS = {"torch": run_torch, "triton": run_triton, "apart": run_apart}
if CUDA:  # where run_triton, unless it cuts otherwise, is run_torch
    del RUNS["torch"]
every = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
both = pytest.mark.parametrize("run", list(RUNS.values())[:-1], ids=list(RUNS)[:-1])

COUNTERS = torch.zeros(4096, dtype=I32)
REAL_COUNTERS = kernels._counters


@pytest.fixture(autouse=True)
def counters(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What an interpreted launch needs: a mended interpreter, and counters, as it has no stream to
    keep some for. Every launch must leave them at zero."""
    if not CUDA:
        mend(monkeypatch)
        monkeypatch.setattr(kernels, "_counters", lambda device, n: COUNTERS)
        monkeypatch.setattr(kernels, "MIN_CHUNK", 32)  # a tile: short rows are cut too
    yield
    left_at_zero = not COUNTERS.any()
    COUNTERS.zero_()
    assert left_at_zero


def check(run: Run, call: Call) -> Result:
    """run against the reference: results, log-sum-exp, and every bit of the caches and scales."""
    ours = copy_of(call)
    theirs = copy_of(call)
    out, lse = run(ours)
    expected, expected_lse = flash_decode_reference(**theirs, return_lse=True)
    assert out.shape == call["q"].shape
    assert out.dtype == call["q"].dtype
    assert lse.dtype == F32
    tolerance = {F32: 2e-5, F16: 5e-3, BF16: 2e-2}[out.dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=tolerance, atol=tolerance)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        if call[name] is not None:
            written = ours[name].float().nan_to_num(-7)
            expected_written = theirs[name].float().nan_to_num(-7)
            assert torch.equal(written, expected_written)
    return out, lse

# --- the definition itself ---


def seen_by_hand(call: Call, query_pos: int, key_pos: int) -> bool:
    if call["causal"] and key_pos > query_pos:
        return False
    return call["window"] is None or key_pos > query_pos - call["window"]


def score_by_hand(call: Call, q: Tensor, key: Tensor, head: int, distance: int) -> float:
    """The score of a query [D] and a key [D] that lie that far apart, before the softmax."""
    score = float(q @ key)
    if call["scale"] is None:
        score *= len(q) ** -0.5
    else:
        score *= call["scale"]
    if call["softcap"] is not None:
        score = call["softcap"] * math.tanh(score / call["softcap"])
    if call["alibi_slopes"] is not None:
        score -= float(call["alibi_slopes"][head]) * distance
    return score


def by_hand(call: Call) -> Result:
    """The definition again, one query, head and key at a time; no int8, nothing appended."""
    q = call["q"]
    B, Hq, T, _ = q.shape
    out = torch.zeros(q.shape)
    lse = torch.full(q.shape[:3], -math.inf)
    for b, head, t in itertools.product(range(B), range(Hq), range(T)):
        n = int(call["cache_seqlens"][b])
        kv_head = head * call["k_cache"].shape[1] // Hq
        query_pos = n - T + t
        total = 0.0
        if call["sinks"] is not None:
            total = math.exp(call["sinks"][head])
        for key_pos in range(n):
            if not seen_by_hand(call, query_pos, key_pos):
                continue
            key = call["k_cache"][b, kv_head, key_pos]
            distance = abs(query_pos - key_pos)
            weight = math.exp(score_by_hand(call, q[b, head, t], key, head, distance))
            out[b, head, t] += weight * call["v_cache"][b, kv_head, key_pos]
            total += weight
        if total > 0:
            out[b, head, t] /= total
            lse[b, head, t] = math.log(total)
    return out, lse


@pytest.mark.parametrize("options", [
    {},
    dict(causal=False),
    dict(window=3),
    dict(softcap=2.0),
    dict(alibi_slopes=True),
    dict(sinks=True),
    dict(scale=0.5),
    dict(causal=False, alibi_slopes=True),
    dict(window=2, softcap=1.5, alibi_slopes=True, sinks=True),
], ids=str)
def test_reference_is_the_definition(options: Call) -> None:
    for T in (1, 3):
        call = make([0, 2, 7], Hkv=2, G=3, T=T, D=8, S=9, device="cpu", **options)
        out, lse = flash_decode_reference(**call, return_lse=True)
        expected, expected_lse = by_hand(call)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_quantize_kv() -> None:
    x = torch.randn(3, 5, 16)
    x[1] = 0
    values, scale = quantize_kv(x)
    assert values.dtype == I8
    assert scale.dtype == F32
    assert scale.shape == (3, 5)
    assert not values[1].any()
    assert not scale[1].any()
    assert values[0].abs().amax(-1).eq(127).all()
    step = scale[..., None]
    assert ((values * step - x).abs() <= step / 2 + 1e-6).all()

class DivideAsOnAGPU(TorchDispatchMode):
    """By a number: times its reciprocal, as in PyTorch's BinaryDivTrueKernel.cu."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten.div.Tensor and not isinstance(args[1], Tensor):
            return args[0] * (1 / torch.tensor(args[1], dtype=args[0].dtype))
        return func(*args, **kwargs or {})


def test_quantize_kv_has_the_same_bits_on_a_gpu() -> None:
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    with DivideAsOnAGPU():
        on_a_gpu = quantize_kv(x)
    for ours, theirs in zip(quantize_kv(x), on_a_gpu):
        assert torch.equal(ours, theirs)

# --- both implementations against the reference ---


EDGES = [0, 1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 159, 160, 191, 192, 193]


@every
@pytest.mark.parametrize("append", [False, True], ids=["read", "append"])
@INT8
def test_lengths_around_tiles_and_chunks(run: Run, append: bool, int8: bool) -> None:
    check(run, make(EDGES, Hkv=1, G=3, D=24, append=append, int8=int8))


@every
@pytest.mark.parametrize("T", [1, 2, 5, 16])
def test_appended_tokens_across_tiles_and_chunks(run: Run, T: int) -> None:
    def run_every_tile_a_chunk(call: Call) -> Result:
        return run(call, n_programs=64)

    check_run = run if run is run_torch else run_every_tile_a_chunk
    lens = [0, 1, 30, 31, 62, 63, 64, 65, 120, 126, 127, 128]
    check(check_run, make(lens, Hkv=1, G=1, T=T, S=160))
    check(check_run, make(lens, Hkv=1, G=1, T=T, S=160, append=True))


@every
@DTYPES
@INT8
def test_dtypes(run: Run, dtype: torch.dtype, int8: bool) -> None:
    check(run, make([5, 150, 33], G=4, D=64, dtype=dtype, int8=int8, append=True))


HEADS = [(4, 1), (2, 3), (1, 4), (1, 5), (1, 6), (2, 7), (1, 8), (1, 17), (1, 40)]


@every
@pytest.mark.parametrize("Hkv, G", HEADS)
def test_head_groups(run: Run, Hkv: int, G: int) -> None:
    check(run, make([70, 3], Hkv=Hkv, G=G, append=True))
    check(run, make([70, 3], Hkv=Hkv, G=G, T=3, append=True, S=90))


@both
@pytest.mark.parametrize("D", [8, 24, 64, 72, 80, 96, 128, 192, 256])
def test_head_sizes(run: Run, D: int) -> None:
    check(run, make([70, 3], Hkv=1, D=D, append=True))
    check(run, make([70, 3], Hkv=1, D=D, append=True, int8=True))


OPTIONS = [
    dict(causal=False),
    dict(scale=0.3),
    dict(softcap=3.0),
    dict(alibi_slopes=True),
    dict(sinks=True),
    dict(window=1),
    dict(window=5),
    dict(window=32),
    dict(window=33),
    dict(window=100),
    dict(window=1000),
    dict(causal=False, sinks=True, alibi_slopes=True),
    dict(window=40, softcap=3.0, alibi_slopes=True, sinks=True),
]


@every
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(run: Run, options: Call) -> None:
    check(run, make([0, 1, 40, 190], Hkv=1, G=2, T=1, append=True, **options))
    check(run, make([0, 1, 2, 40, 190], Hkv=1, G=2, T=4, S=200, **options))
    check(run, make([0, 64, 190], Hkv=1, G=2, T=3, append=True, int8=True, **options))


def as_ring(call: Call, lens: list[int], S: int) -> Call:
    """The call on rings of S places that hold the last of lens cached tokens; the rest is NaN."""
    held = {"ring": True}
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        cache = call[name]
        if cache is None:
            continue
        held[name] = torch.zeros_like(cache[:, :, :1]).expand(*cache.shape[:2], S, *cache.shape[3:])
        held[name] = held[name].clone()
        if cache.is_floating_point():
            held[name].fill_(math.nan)
        for row, n in enumerate(lens):
            for position in range(max(0, n - S), n):
                held[name][row, :, position % S] = cache[row, :, position]
    return call | held


RINGS = [
    dict(T=1, window=33),
    dict(T=5, window=29, softcap=3.0, alibi_slopes=True, sinks=True),
    dict(T=3, window=1),
    dict(T=16, window=18, int8=True),
]


@every
@pytest.mark.parametrize("append", [False, True], ids=["read", "append"])
@pytest.mark.parametrize("options", RINGS, ids=str)
def test_a_ring_is_as_good_as_a_whole_cache(run: Run, append: bool, options: Call) -> None:
    """With 33 places, rows that have not reached their end, reach it now, and went round often."""
    lens = [0, 17, 28, 32, 33, 47, 150]
    T = options["T"]
    whole = make(lens, Hkv=1, G=3, append=append, **options)
    ring = as_ring(whole, lens, S=33)
    out, lse = check(run, ring)
    expected, expected_lse = flash_decode_reference(**whole, return_lse=True)
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=2e-5, atol=2e-5)

    # what was appended lies where the ring's next call looks for it
    run(ring)
    if append:
        lens = [n + T for n in lens]
    held = as_ring(whole, lens, S=33)
    for name in ("k_cache", "v_cache"):
        for row, n in enumerate(lens):
            live = min(n, 33)
            assert torch.equal(ring[name][row, :, :live], held[name][row, :, :live])


@both
def test_a_ring_in_tiles_and_chunks(run: Run) -> None:
    """The first and the last tokens of a window fall into any two of its tiles."""
    lens = [137, 168, 199, 230, 261, 272]
    whole = make(lens, Hkv=1, G=1, T=2, append=True, window=130)
    expected = flash_decode_reference(**copy_of(whole))
    out, _ = check(run, as_ring(whole, lens, S=136))
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


@every
def test_nothing_to_see(run: Run) -> None:
    out, lse = check(run, make([0, 0], T=2))
    assert not out.any()
    assert lse.eq(-math.inf).all()
    # three queries on one token: the last sees it, the first two see nothing but their sinks
    call = make([0, 1], T=3, sinks=True)
    out, lse = check(run, call)
    assert not out[0].any()
    assert lse[0].eq(call["sinks"][:, None]).all()
    assert not out[1, :, :2].any()
    assert out[1, :, 2].any()


def random_case(rng: random.Random, seed: int) -> Call:
    """Arguments of make."""
    case = dict(
        append=rng.random() < 0.5,
        causal=rng.random() < 0.7,
        T=rng.choice([1, 1, 2, 5, 16]),
        S=rng.choice([40, 130, 300]),
    )
    most = case["S"]
    if case["append"]:
        most -= case["T"]
    lens = [rng.randint(0, most) for _ in range(rng.choice([1, 2, 3]))]
    if rng.random() < 0.3:
        lens = [lens[0]] * len(lens)
    case |= dict(
        lens=lens,
        Hkv=rng.choice([1, 2]),
        G=rng.choice([1, 2, 3, 7]),
        D=rng.choice([16, 64, 72]),
        seed=seed,
        dtype=rng.choice([F32, F16, BF16]),
        int8=rng.random() < 0.4,
    )
    if case["causal"]:
        case["window"] = rng.choice([None, 1, 5, 64])
    return case | dict(
        softcap=rng.choice([None, None, 5.0]),
        alibi_slopes=rng.choice([None, True]),
        sinks=rng.choice([None, True]),
        scale=rng.choice([None, 0.3]),
    )


@both
@pytest.mark.parametrize("tenth", range(10))  # a GPU compiles for each case: side by side
def test_fuzz(run: Run, tenth: int) -> None:
    interpreted = run is run_triton and not CUDA
    for seed in range(tenth, 30 if interpreted else 150, 10):
        rng = random.Random(seed)
        case = random_case(rng, seed)
        cut = {}
        if interpreted:
            cut["n_programs"] = rng.choice([4, 16, 64])
            cut["BLOCK_N"] = rng.choice([32, 64])
            cut["one_launch"] = rng.random() < 0.7
        try:
            check(lambda call: run(call, **cut), make(**case))
        except Exception as e:
            raise AssertionError(f"{case} {cut}") from e

# --- what must not matter: capacity, views, neighbours, earlier calls ---


def amid_others(x: Tensor, S: int) -> Tensor:
    """x [2, 2, s, ...] as a slice of a larger cache with room for S tokens a row, amid NaN."""
    dead = 77 if x.dtype == I8 else math.nan
    larger = torch.full((3, 5, 2, S, *x.shape[3:]), dead, dtype=x.dtype, device=x.device)
    view = larger[1, 1:3]  # (2, 2, S, ...)
    view[:, :, :x.shape[2]] = x
    return view


@every
@INT8
def test_same_bits_whatever_the_capacity(run: Run, int8: bool) -> None:
    call = make([150, 33], append=True, int8=int8)
    expected, expected_lse = run(copy_of(call))
    for S in (160, 1024):
        wide = copy_of(call)
        for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
            if wide[name] is not None:
                wide[name] = amid_others(wide[name], S)
        out, lse = run(wide)
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)


def part_of_wider(x: Tensor, dead: float) -> Tensor:
    """x [..., 24] as columns 3 to 27 of rows of 31, at addresses that divide by nothing."""
    wider = torch.full((*x.shape[:3], 31), dead, dtype=x.dtype, device=x.device)
    return wider[..., 3:27].copy_(x)


@every
def test_any_strides(run: Run) -> None:
    call = make([70, 9], Hkv=2, G=3, T=2, D=24, append=True)
    turned = copy_of(call)
    for name in ("q", "k_cache", "k"):
        turned[name] = turned[name].transpose(1, 2).contiguous().transpose(1, 2)
    turned["v"] = part_of_wider(call["v"], dead=1.0)
    turned["v_cache"] = part_of_wider(call["v_cache"], dead=math.nan)
    expected, expected_lse = run(copy_of(call))
    out, lse = run(turned)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    check(run, call)


@every
def test_a_row_does_not_feel_its_neighbours(run: Run) -> None:
    call = make([150, 0, 33, 7], append=True)
    together, together_lse = run(copy_of(call))
    for b in range(4):
        alone = copy_of(call)
        for name in ("q", "k_cache", "v_cache", "cache_seqlens", "k", "v"):
            alone[name] = alone[name][b:b + 1]
        out, lse = run(alone)
        torch.testing.assert_close(together[b:b + 1], out, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together_lse[b:b + 1], lse, rtol=1e-5, atol=1e-6)


@both
def test_decoding_token_by_token_is_like_reading_it_all(run: Run) -> None:
    for int8 in (False, True):
        call = make([60, 3], int8=int8, append=True, S=80)
        generator = torch.Generator().manual_seed(5)
        for _ in range(8):
            for name in ("q", "k", "v"):
                call[name] = torch.randn(call[name].shape, generator=generator).to(DEVICE)
            out, lse = run(call)
            call["cache_seqlens"] = call["cache_seqlens"] + 1
        all_cached = call | dict(k=None, v=None)
        expected, expected_lse = flash_decode_reference(**all_cached, return_lse=True)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_the_same_twice() -> None:
    call = make([190, 150], append=True)
    first, first_lse = run_triton(copy_of(call))
    second, second_lse = run_triton(copy_of(call))
    assert torch.equal(first, second)
    assert torch.equal(first_lse, second_lse)


@pytest.mark.parametrize("n_programs", [2, 6, 32, 100])
@pytest.mark.parametrize("lens", [[300], [300, 0, 20]], ids=str)
def test_split_over_any_number_of_programs(lens: list[int], n_programs: int) -> None:
    def run(call: Call) -> Result:
        return run_triton(call, n_programs=n_programs)

    check(run, make(lens, Hkv=1, append=True, sinks=True))


def test_one_launch_and_launches_apart_give_the_same_bits() -> None:
    for int8 in (False, True):
        call = make([190, 0, 33], T=3, append=True, int8=int8, dtype=BF16, sinks=True)
        together = copy_of(call)
        apart = copy_of(call)
        for ours, theirs in zip(run_triton(together), run_apart(apart)):
            assert torch.equal(ours, theirs)
        for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
            if call[name] is not None:
                live = together[name].float().nan_to_num(-7)
                assert torch.equal(live, apart[name].float().nan_to_num(-7))


@every
def test_no_rows_give_empty_results(run: Run) -> None:
    call = make([4], T=2, append=True)
    for name in ("q", "k_cache", "v_cache", "cache_seqlens", "k", "v"):
        call[name] = call[name][:0]
    out, lse = run(call)
    assert out.shape == (0, 4, 2, 16)
    assert lse.shape == (0, 4, 2)
    assert lse.dtype == F32


@triton.jit
def chunks_kernel(
    chunks_ptr, seqlens_ptr, B, S, n_split, n_fill, min_tiles,
    PAIRS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):
    lens, first, tiles, chunks = kernels._cut_rows(
        seqlens_ptr, B, S, n_split, n_fill, min_tiles, 0, 1, 0, False, PAIRS, BLOCK_B, BLOCK_N)
    row, pair, _, _, _, start, end = kernels._my_chunk(
        lens, first, tiles, chunks, PAIRS, BLOCK_N)
    chunk_ptr = chunks_ptr + tl.program_id(0) * 4
    tl.store(chunk_ptr, row)
    tl.store(chunk_ptr + 1, pair)
    tl.store(chunk_ptr + 2, start)
    tl.store(chunk_ptr + 3, end)


def chunks_of(lens: list[int], pairs: int, n_programs: int) -> list[tuple[int, ...]]:
    """Row, pair, start and end of every chunk of rows that have so many tokens, and pairs each."""
    B = len(lens)
    split = kernels._split(B * pairs, n_programs, BLOCK_N=64)
    grid = split["n_split"] + B * pairs
    chunks = torch.zeros(grid, 4, dtype=I32, device=DEVICE)
    seqlens = torch.tensor(lens, dtype=I32, device=DEVICE)
    chunks_kernel[(grid,)](
        chunks, seqlens, B, 2 ** 20, **split,
        PAIRS=pairs, BLOCK_B=triton.next_power_of_2(B), BLOCK_N=64)
    return [tuple(chunk) for chunk in chunks.tolist() if chunk[0] < B]


@pytest.mark.parametrize("lens", [[0], [1], [1000], [5, 3000, 0, 64, 65], [300] * 9], ids=str)
def test_chunks_cover_every_token_once(lens: list[int]) -> None:
    chunks = chunks_of(lens, pairs=2, n_programs=10)
    for row, n in enumerate(lens):
        for pair in range(2):
            mine = [chunk[2:] for chunk in chunks if chunk[:2] == (row, pair)]
            edges = [0, *(end for _, end in mine)]
            assert [start for start, _ in mine] == edges[:-1]
            assert edges[-1] == -(-n // 64) * 64


@pytest.mark.parametrize("B, n, of_a_row", [
    (1, 512, 8),  # a tile of 64 tokens for each of 8 SMs
    (1, 1024, 8),
    (1, 2048, 8),  # 256 tokens are worth a program of their own
    (1, 2304, 9),
    (1, 65536, 15),  # as many as run at once
    (12, 512, 1),  # the rows fill the GPU
    (12, 1024, 2),
])
def test_chunks_fill_the_gpu_and_no_more(
    B: int, n: int, of_a_row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MIN_CHUNK", 256)
    assert len(chunks_of([n] * B, pairs=1, n_programs=16)) == B * of_a_row


@pytest.mark.parametrize("one_launch", [True, False])
def test_a_full_row_writes_nothing_outside_its_cache(one_launch: bool) -> None:
    room = torch.full((4, 1, 32, 16), 5.0, device=DEVICE)
    call = make([32, 31], Hkv=1, T=3, append=True, S=40)
    call["k_cache"] = room[1:3]
    call["v_cache"] = room[1:3].clone()
    with pytest.raises(ValueError, match="32 cached . 3 new tokens do not fit into a cache of 32"):
        kernels._flash_decode_torch(*in_order(call))
    # the kernel cannot know the lengths on the host: it drops what does not fit
    out, _ = run_triton(call, one_launch=one_launch)
    assert out.isfinite().all()
    assert room[0].eq(5).all()
    assert room[3].eq(5).all()


@every
@pytest.mark.skipif(CUDA, reason="would need the memory")
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_strides_beyond_32_bits(run: Run, dim: int, tmp_path: Path) -> None:
    """Caches and scales whose rows, heads or tokens lie 2^31 elements apart, in sparse files."""
    call = make([3, 2], Hkv=2, G=1, D=16, S=4, int8=True, append=True)
    expected = flash_decode_reference(**copy_of(call))

    def apart(name: str, step: int) -> Tensor:
        x = call[name]
        strides = list(x.stride())
        strides[dim] = step
        size = step * (x.shape[dim] - 1) + x.numel()
        file = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=x.dtype)
        return file.as_strided(x.shape, strides).copy_(x)

    if dim == 2:  # four tokens 2^30 apart
        call["k_cache"] = apart("k_cache", 2 ** 30)
        call["v_cache"] = apart("v_cache", 2 ** 30)
    else:
        for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
            call[name] = apart(name, 2 ** 31)
    out, _ = run(call)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

# --- counters ---


class Stream:
    """A stand-in for a device and its current stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cuda_stream = 1
        self.capturing = False
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        for name in ("_unused", "_of_streams"):
            monkeypatch.setattr(kernels, name, {})
        monkeypatch.setattr(kernels, "_slabs", [])

    def counters(self, n: int) -> Tensor:
        return REAL_COUNTERS(torch.device("cpu"), n)


def share_memory(a: Tensor, b: Tensor) -> bool:
    begin = max(a.data_ptr(), b.data_ptr())
    return begin < min(a.data_ptr() + a.nbytes, b.data_ptr() + b.nbytes)


def test_only_launches_of_one_stream_share_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(monkeypatch)
    first = stream.counters(40)
    assert stream.counters(40).data_ptr() == first.data_ptr()
    assert len(first) >= 40
    stream.cuda_stream = 2
    other = stream.counters(40)
    stream.capturing = True
    captured = [stream.counters(n) for n in (8, 8, 70)]
    for a, b in itertools.combinations([first, other, *captured], 2):
        assert not share_memory(a, b)
    for counters in captured:  # part of what was zeroed before: no launch of its own
        assert any(share_memory(counters, slab) for slab in kernels._slabs)
        assert not counters.any()
        assert counters.data_ptr() % 16 == 0


def test_captured_counters_outlast_their_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SLAB", 128)
    stream = Stream(monkeypatch)
    # before anything was launched, and where a slab has too little left, graphs zero their own
    stream.capturing = True
    assert len(stream.counters(8)) == 32
    assert not kernels._slabs
    stream.capturing = False
    stream.counters(8)
    stream.capturing = True
    captured = [stream.counters(100) for _ in range(3)]
    assert share_memory(captured[0], kernels._slabs[0])
    assert not share_memory(captured[2], kernels._slabs[0])
    # the next launch outside makes another, and keeps the one that a graph points into
    stream.capturing = False
    stream.counters(8)
    assert len(kernels._slabs) == 2
    assert share_memory(captured[0], kernels._slabs[0])

# --- the operator ---


CACHE = torch.zeros(2, 2, 9, 16)
MISTAKES = [
    (dict(q=torch.zeros(2, 4, 17, 16)),
     "T must be 1 to 16 tokens, got 17"),
    (dict(q=torch.zeros(2, 4, 16)),
     r"q must be \[B, Hq, T, D\]"),
    (dict(q=torch.zeros(2, 3, 1, 16)),
     "query heads must be a multiple of KV heads, got 3 and 2"),
    (dict(q=torch.zeros(2, 4, 1, 16).double()),
     "q must be .*float32 on cpu, got"),
    (dict(k_cache=CACHE.half()),
     "k_cache must be .*float32 or torch.int8 on cpu, got"),
    (dict(v_cache=torch.zeros(2, 2, 8, 16)),
     r"v_cache must be \[2, 2, 9, 16\] .* got \[2, 2, 8, 16\]"),
    (dict(cache_seqlens=torch.zeros(2).long()),
     r"cache_seqlens must be \[2\] torch.int32"),
    (dict(cache_seqlens=torch.zeros(3).int()),
     r"cache_seqlens must be \[2\]"),
    (dict(k=None), "k and v go together"),
    (dict(k=torch.zeros(2, 2, 2, 16)),
     r"k must be \[2, 2, 1, 16\]"),
    (dict(k_scale=torch.zeros(2, 2, 9)),
     "int8 caches, and only they, need"),
    (dict(k_cache=CACHE.to(I8), v_cache=CACHE.to(I8)),
     "int8 caches, and only they, need"),
    (dict(window=0), "window must be at least 1"),
    (dict(window=2.5), "window must be at least 1, and whole, got 2.5"),
    (dict(window=4, causal=False), "needs causal=True"),
    (dict(softcap=0.0), "softcap must be above 0"),
    (dict(softcap=math.nan), "softcap must be above 0, and finite, got nan"),
    (dict(softcap=math.inf), "softcap must be above 0, and finite, got inf"),
    (dict(ring=True), "a ring of 9 places needs a window of at most 9, got None"),
    (dict(ring=True, window=10), "a ring of 9 places needs a window of at most 9, got 10"),
    (dict(sinks=torch.zeros(3)),
     r"sinks must be \[4\]"),
    (dict(alibi_slopes=torch.zeros(4).half()),
     "alibi_slopes must be"),
    (dict(k_cache=torch.zeros(2, 2, 16, 9).transpose(2, 3)),
     "the last dimension of k_cache must be contiguous"),
    (dict(v_cache=CACHE.to("meta")),
     "v_cache must be .* on cpu, got .* on meta"),
    (dict(cache_seqlens=torch.tensor([9, 1]).int()),
     "9 cached . 1 new tokens do not fit"),
    (dict(cache_seqlens=torch.tensor([-1, 1]).int()),
     "rows of -1 to 1 cached . 1 new tokens do not fit"),
    (dict(cache_seqlens=torch.tensor([-3, -3]).int(), k=None, v=None),
     "rows of -3 to -3 cached . 0 new tokens do not fit"),
    (dict(cache_seqlens=[3, 2]), r"cache_seqlens must be a tensor, got \[3, 2\]"),
    (dict(v_cache=None), "v_cache must be a tensor, got None"),
    (dict(sinks=[0.0] * 4), r"sinks must be \[4\] torch.float32 on cpu, got \[0.0, 0.0"),
]


@pytest.mark.parametrize("change, message", MISTAKES, ids=[next(iter(x)) for x, _ in MISTAKES])
def test_mistakes_get_a_sentence(change: Call, message: str) -> None:
    call = make([3, 2], T=1, S=9, append=True, device="cpu")
    with pytest.raises(ValueError, match=message):
        flash_decode(**call | change)


def test_only_the_public_one_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    monkeypatch.setattr(kernels, "_check", lambda *_: checked.append(True))
    call = make([3, 2], append=True)
    expected = flash_decode(**copy_of(call))
    assert checked == [True]
    assert torch.equal(flash_decode_unchecked(**call), expected)
    assert checked == [True]
    public = inspect.signature(flash_decode)
    assert inspect.signature(flash_decode_reference) == public
    unchecked = dict(inspect.signature(flash_decode_unchecked).parameters)
    # in a graph it takes a length for all rows too
    unchecked["cache_seqlens"] = public.parameters["cache_seqlens"]
    assert unchecked == dict(public.parameters)


@pytest.mark.parametrize("D", [4, 12, 264])
def test_head_size_is_checked(D: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 8 up to 256, got {D}"):
        flash_decode(**make([3], D=D))


@pytest.mark.parametrize("case", [
    dict(lens=[3, 7], append=True),
    dict(lens=[4, 4], T=3, G=1),
    dict(lens=[3, 7], Hkv=1, T=2, sinks=True, append=True),
    dict(lens=[4, 4], T=2, append=True, int8=True, sinks=True, alibi_slopes=True),
    dict(lens=[9, 4], T=2, append=True, ring=True, window=5, S=7),
], ids=str)
def test_flash_decode_is_registered_properly(case: Call) -> None:
    operator = torch.ops.gpt_flash.flash_decode.default
    torch.library.opcheck(operator, tuple(in_order(make(**case))))


def test_compiled_it_updates_the_cache_in_place() -> None:
    """One graph for all layers of a stacked cache; nothing in it copies a cache."""
    from torch._inductor.utils import run_and_get_code
    layers = torch.randn(3, 2, 2, 2, 32, 16, device=DEVICE)  # (n_layer, 2, B, Hkv, S, D)
    call = make([3, 7], append=True, S=32)
    q, k, v = call["q"], call["k"], call["v"]
    lens = call["cache_seqlens"]

    def block(q: Tensor, kv: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_decode(q * 2, kv[0], kv[1], lens, k + 1, v)
        return out.transpose(1, 2).flatten(2) + 1

    compiled = torch.compile(block, fullgraph=True)

    def run_compiled() -> list[Tensor]:
        return [compiled(q, kv, k, v) for kv in layers]

    expected_layers = layers.clone()
    with torch.inference_mode():
        expected = [block(q, kv, k, v) for kv in expected_layers]
        out, code = run_and_get_code(run_compiled)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(layers, expected_layers)
    assert len(code) == 1
    assert "gpt_flash.flash_decode.default(" in code[0]
    assert "clone" not in code[0]

# --- without Triton ---


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from kernels import flash_decode, flash_decode_reference
q = torch.randn(1, 4, 1, 16)
cache = torch.randn(1, 2, 9, 16)
lens = torch.tensor([5], dtype=torch.int32)
out = flash_decode(q, cache, cache, lens)
torch.testing.assert_close(out, flash_decode_reference(q, cache, cache, lens))
"""


def test_without_triton() -> None:
    folder = Path(kernels.__file__).parent
    command = [sys.executable, "-c", WITHOUT_TRITON]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

# --- only on a GPU ---


@ON_A_GPU
def test_cuda_graph_follows_the_lengths() -> None:
    call = make([5, 900], Hkv=4, G=4, D=128, dtype=BF16, append=True, S=2048)
    call["k_cache"].nan_to_num_(0)
    call["v_cache"].nan_to_num_(0)
    theirs = copy_of(call)
    run_torch(copy_of(call))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run_torch(call)
        call["cache_seqlens"] += 1
    for _ in range(40):
        graph.replay()
        expected, expected_lse = flash_decode_reference(**theirs, return_lse=True)
        theirs["cache_seqlens"] += 1
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, expected_lse, rtol=2e-2, atol=2e-2)
    assert torch.equal(call["k_cache"], theirs["k_cache"])


@ON_A_GPU
def test_two_graphs_can_replay_on_two_streams() -> None:
    call = make([30000], Hkv=2, G=4, D=128, dtype=BF16)
    expected, _ = run_torch(call)
    torch.cuda.synchronize()
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [run_torch(call)[0] for _ in range(20)]
        graphs.append((graph, torch.cuda.Stream(), outs))
    for _ in range(20):
        for graph, stream, _ in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for _, _, outs in graphs:
        for out in outs:
            assert torch.equal(out, expected)


@ON_A_GPU
def test_lengths_and_capacity_never_recompile() -> None:
    counts = []
    for S, n in ((256, 16), (1001, 999), (4096, 17), (4096, 1), (131072, 100000)):
        call = make([1], Hkv=1, G=4, D=64, dtype=F16, S=S)
        call["cache_seqlens"].fill_(n)
        call["k_cache"].nan_to_num_(0)
        call["v_cache"].nan_to_num_(0)
        run_torch(call)
        compiled_for = kernels._flash_decode_kernel.device_caches.values()
        counts.append(sum(len(cache[0]) for cache in compiled_for))
    assert counts == counts[:1] * 5


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))
