"""The products of quantized weights, in Triton and in PyTorch, compute what their references say.

A copy needs only linear.py and interpreter.py beside it: `python products_test.py`, or
`pytest products_test.py`. Without a GPU the Triton kernels run in Triton's interpreter; with one
the same tests run there."""
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

triton = pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))
from interpreter import mend

if (HERE / "linear.py").exists():
    import linear
else:
    sys.path.append(str(HERE.parent))
    from products import linear

DEVICE = "cuda" if CUDA else "cpu"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
I8, U8 = torch.int8, torch.uint8

# --- how it is run ---


@pytest.fixture(autouse=True)
def mended_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if not CUDA:
        mend(monkeypatch)


Weights = tuple[Tensor, ...]


def run_linear_kernel(
    x: Tensor, w: Tensor, scales: Tensor | None, ids: Tensor | None = None, n_sm: int = 0,
) -> Tensor:
    """The kernel: on the GPU, or interpreted. Outputs that it forgets are NaN."""
    kernel, grid, arguments = linear._linear_arguments(x, w, scales, ids, n_sm)
    arguments["y_ptr"].fill_(math.nan)
    if n_sm:
        assert arguments["SPLIT"] == grid[2] > 1
        arguments["part_ptr"].fill_(math.nan)
        arguments["counter_ptr"] = torch.zeros(grid[0], dtype=torch.int32, device=DEVICE)
    kernel[grid](**arguments)
    if n_sm:
        assert not arguments["counter_ptr"].any()  # for the next launch
    return arguments["y_ptr"]


def vectors(rows: int, K: int, outliers: bool = False) -> Tensor:
    """Random ones [rows, 1, K] in float32; with outliers some are 1000 times larger."""
    generator = torch.Generator().manual_seed(rows * K)
    x = torch.randn(rows, 1, K, generator=generator)
    if outliers:
        large = torch.rand(rows, 1, K, generator=generator) < 0.004
        x[large] *= 1000
    return x.to(DEVICE)


def int8_weights(N: int, K: int) -> Weights:
    generator = torch.Generator().manual_seed(N * K)
    w = torch.randint(-128, 128, (N, K), generator=generator, dtype=I8)
    scales = torch.rand(N, generator=generator)
    return w.to(DEVICE), scales.to(DEVICE)


def int4_weights(N: int, K: int, group: int) -> Weights:
    generator = torch.Generator().manual_seed(N * K + group)
    w = torch.randint(0, 256, (N, K // 2), generator=generator, dtype=U8)
    scales = torch.rand(N, K // group, generator=generator).bfloat16()
    zeros = torch.randn(N, K // group, generator=generator).bfloat16()
    return w.to(DEVICE), scales.to(DEVICE), zeros.to(DEVICE)


def relative_error(y: Tensor, expected: Tensor) -> float:
    return ((y.double() - expected).norm() / expected.double().norm()).item()


def check_linear(y: Tensor, expected: Tensor) -> None:
    """y against the reference of float32 vectors; it may be rounded to its dtype besides, and the
    interpreter cuts what it stores as bfloat16."""
    assert y.shape == expected.shape
    rounding = {F32: 0, F16: 2.0**-11, BF16: 2.0**-7}[y.dtype]
    assert relative_error(y, expected) < 1e-4 + rounding


def int4_reference(x: Tensor, w: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """x [..., K] times what pack_int4 takes."""
    nibbles = torch.stack((w & 15, w >> 4), -1).view(*scales.shape, -1).float()
    weight = ((nibbles - 8) * scales[..., None] + zeros[..., None]).flatten(1)  # (N, K)
    return torch.nn.functional.linear(x.float(), weight).to(x.dtype)

# --- against the references ---


SHAPES = pytest.mark.parametrize("N, K, rows, dtype", [
    (24, 96, 1, F32),
    (40, 2048, 1, BF16),
    (5, 1152, 2, BF16),
    (70, 352, 3, F16),
    (33, 32, 5, BF16),
    (40, 1024, 8, F32),
    (1, 576, 13, F16),
    (65, 512, 16, BF16),
    (40, 256, 17, BF16),
    (70, 96, 64, F32),
], ids=str)


@SHAPES
def test_int8_linear(N: int, K: int, rows: int, dtype: torch.dtype) -> None:
    x = vectors(rows, K).to(dtype)
    weights = int8_weights(N, K)
    expected = linear.linear_reference(x.float(), *weights)
    for y in (run_linear_kernel(x, *weights), linear.int8_linear(x, *weights)):
        assert y.dtype == dtype
        check_linear(y, expected)


@pytest.mark.parametrize("group", [32, 64, 128])
@SHAPES
def test_int4_linear(N: int, K: int, rows: int, group: int, dtype: torch.dtype) -> None:
    K = -(-K // group) * group
    x = vectors(rows, K).to(dtype)
    weights = int4_weights(N, K, group)
    packed = linear.pack_int4(*weights)
    expected = int4_reference(x.float(), *weights)
    for y in (run_linear_kernel(x, *packed), linear.packed_int4_linear(x, *packed)):
        assert y.dtype == dtype
        check_linear(y, expected)


@pytest.mark.parametrize("N, K, rows, split", [(24, 4096, 2, 2), (20, 2080, 17, 4)])
def test_parts_of_the_inputs_add_up(N: int, K: int, rows: int, split: int) -> None:
    """On a GPU that few outputs do not fill; K need not divide into turns of a loop or parts."""
    x = vectors(rows, K)
    int4 = int4_weights(N, K, 32)
    for weights, expected in (
        (int8_weights(N, K), linear.linear_reference(x, *int8_weights(N, K))),
        (linear.pack_int4(*int4), int4_reference(x, *int4)),
    ):
        assert linear._linear_arguments(x, *weights, n_sm=132)[1][2] == split
        check_linear(run_linear_kernel(x, *weights, n_sm=132), expected)


@pytest.mark.parametrize("rows, dense", [(1, False), (17, False), (64, False), (65, True)])
def test_up_to_64_vectors_no_weight_is_written_out(
    monkeypatch: pytest.MonkeyPatch, rows: int, dense: bool
) -> None:
    """On a GPU, here a pretended one."""
    class OnGPU(torch.Tensor):
        is_cuda = True

    written = []
    monkeypatch.setattr(linear, "_launch_linear", lambda x, *_: x)
    monkeypatch.setattr(linear, "dense_weight", lambda w, *_: written.append(w) or w.float())
    linear._linear(torch.zeros(rows, 64).as_subclass(OnGPU), *int8_weights(24, 64), None)
    assert bool(written) == dense


def test_a_launch_has_counters_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """From whoever keeps zeros, who finds them as they were."""
    gpu = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    kept = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    asked = []
    monkeypatch.setattr(linear, "counters", lambda device, n: asked.append(n) or kept)
    x = vectors(17, 1056)
    weights = int8_weights(20, 1056)
    for _ in range(2):
        y = linear._launch_linear(x, *weights)
        check_linear(y, linear.linear_reference(x, *weights))
    assert asked == [2, 2]  # of 20 outputs two slices of 16 rows
    assert not kept.any()


@pytest.mark.parametrize("rows, K, outliers", [(1, 1024, False), (4, 1000, True), (8, 704, True)])
def test_linear_kernels_err_less_than_bfloat16_rounds(rows: int, K: int, outliers: bool) -> None:
    """By 7 times at least, also where a few inputs are 1000 times larger than the rest."""
    x = vectors(rows, K, outliers)
    weights = int8_weights(64, K)
    expected = linear.linear_reference(x, *weights)
    rounding = relative_error(expected.bfloat16(), expected)
    assert relative_error(run_linear_kernel(x, *weights), expected) < rounding / 7

    x = x[..., :K // 32 * 32]
    weights = int4_weights(64, x.shape[-1], 32)
    expected = int4_reference(x, *weights)
    rounding = relative_error(expected.bfloat16(), expected)
    packed = linear.pack_int4(*weights)
    assert relative_error(run_linear_kernel(x, *packed), expected) < rounding / 7


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_and_in_its_row(bad: float) -> None:
    for weights in (int8_weights(24, 512), linear.pack_int4(*int4_weights(24, 512, 32))):
        x = vectors(3, 512)
        alone = run_linear_kernel(x, *weights)
        x[1, 0, 300] = bad
        y = run_linear_kernel(x, *weights)
        assert not y[1].isfinite().any()
        assert torch.equal(y[::2], alone[::2])


def test_largest_and_smallest_vectors() -> None:
    weights = int8_weights(16, 512)
    for size in (1e-25, 1e30):
        x = vectors(2, 512) * size
        expected = linear.linear_reference(x, *weights)
        check_linear(run_linear_kernel(x, *weights), expected)
    assert not run_linear_kernel(x * 0, *weights).any()


def test_a_vector_gives_the_same_bits_in_any_company() -> None:
    for weights in (int8_weights(40, 1024), linear.pack_int4(*int4_weights(40, 1024, 64))):
        x = vectors(4, 1024)
        together = run_linear_kernel(x, *weights)
        for row in range(4):
            assert torch.equal(run_linear_kernel(x[row:row + 1], *weights), together[row:row + 1])


def test_no_vectors_give_no_outputs() -> None:
    int4 = int4_weights(24, 96, 32)
    for dtype in (F32, BF16):
        x = torch.empty(2, 0, 96, dtype=dtype, device=DEVICE)
        for y in (
            linear.int8_linear(x, *int8_weights(24, 96)),
            linear.packed_int4_linear(x, *linear.pack_int4(*int4)),
        ):
            assert y.shape == (2, 0, 24)
            assert y.dtype == dtype


@pytest.mark.parametrize("K, group", [(32, 32), (96, 32), (256, 32), (192, 64), (384, 128)])
def test_packed_weights_come_back(K: int, group: int) -> None:
    w, scales, zeros = int4_weights(7, K, group)
    packed, lines = linear.pack_int4(w, scales, zeros)
    assert packed.shape == (7, (K + 63) // 64, 32)
    # input 0 in the low nibble of the first byte, in two's complement, and 32 in the high one
    values = (w.int().cpu() & 15) - 8
    first = packed[:, 0, 0].int().cpu()
    assert torch.equal((first << 28) >> 28, values[:, 0])
    if K > 32:
        assert torch.equal(first >> 4, values[:, 16])

    nibbles, their_scales, their_zeros = linear.unpack_int4(packed, lines, K)
    assert torch.equal(nibbles[:, ::2] | nibbles[:, 1::2] << 4, w)
    assert torch.equal(their_scales, scales)
    assert torch.equal(their_zeros, zeros)


@pytest.mark.parametrize("form", ["int8", "int4", "int4 of 128", "mxfp4", "pairs"])
@pytest.mark.parametrize("E, N, K", [(None, 13, 96), (3, 20, 1184)])
def test_dense_weights(form: str, E: int | None, N: int, K: int) -> None:
    """Of one weight and of a stack."""
    if form == "int4 of 128":
        K = -(-K // 128) * 128
    nibbles = 2 if form == "pairs" else 1
    w, scales = expert_weights("int4" if nibbles == 2 else form, E or 1, N, nibbles * K, F32)
    if E is None:
        w, scales = w[0], scales[0]
    expected = linear.dense_weight_reference(w, scales, K, nibbles)
    if form != "int8":
        kernel, grid, arguments = linear._dense_arguments(w, scales, K, F32, nibbles)
        arguments["y_ptr"].fill_(math.nan)
        kernel[grid](**arguments)
        torch.testing.assert_close(arguments["y_ptr"], expected)
    y = linear.dense_weight(w, scales, K, BF16, nibbles)
    torch.testing.assert_close(y, expected.bfloat16())


FORMS = ["float", "int8", "int4", "int4 of 128", "mxfp4"]


def expert_weights(form: str, E: int, N: int, K: int, dtype: torch.dtype) -> Weights:
    """A stack of them: what experts_linear takes."""
    generator = torch.Generator().manual_seed(E * N * K)
    if form == "float":
        return (torch.randn(E, N, K, generator=generator).to(DEVICE, dtype),)
    if form == "mxfp4":
        w = torch.randint(0, 256, (E * N, K // 2), generator=generator, dtype=U8)
        scales = torch.randint(120, 130, (E, N, K // 32), generator=generator, dtype=U8)
        return linear.pack_planes(w).view(E, N, -1, 32).to(DEVICE), scales.to(DEVICE)
    if form == "int8":
        weights = [int8_weights(N, K) for _ in range(E)]
    else:
        group = 128 if "128" in form else 32
        weights = [linear.pack_int4(*int4_weights(N, K, group)) for _ in range(E)]
    stacks = [torch.stack(parts) for parts in zip(*weights)]
    # of each expert, other scales, so that a mistaken one is seen
    for i, scales in enumerate(stacks[1]):
        if form == "int8":
            scales *= 1 + i
        else:
            scales.copy_(scales.roll(i, dims=1))
    return tuple(stacks)


def random_choices(R: int, n_active: int, E: int) -> Tensor:
    generator = torch.Generator().manual_seed(R)
    ids = [torch.randperm(E, generator=generator)[:n_active] for _ in range(R)]
    return torch.stack(ids).to(DEVICE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("R, n_active, E, N, K, per_choice, dtype", [
    (1, 2, 4, 40, 256, False, F32),
    (3, 4, 5, 33, 384, True, BF16),
    (16, 3, 8, 70, 128, False, F32),
    (21, 2, 3, 20, 640, True, F32),
], ids=str)
def test_experts_linear(
    form: str, R: int, n_active: int, E: int, N: int, K: int, per_choice: bool, dtype: torch.dtype
) -> None:
    """One vector of a token for all of its experts, or one for each; more tokens than a program
    has rows; experts that nobody chose."""
    weights = expert_weights(form, E, N, K, dtype)
    ids = random_choices(R, n_active, E)
    x = vectors(R * n_active, K).view(R, n_active, K).to(dtype)
    if not per_choice:
        x = x[:, 0]
    expected = linear.experts_linear_reference(x.float(), ids, *weights)
    scales = weights[1] if len(weights) > 1 else None
    by_kernel = run_linear_kernel(x, weights[0], scales, ids)
    for y in (by_kernel, linear.experts_linear(x, ids, *weights)):
        assert y.dtype == dtype
        check_linear(y, expected)


def test_experts_linear_reads_what_was_chosen_only() -> None:
    w, = expert_weights("float", 6, 24, 64, F32)
    ids = torch.tensor([[4, 1], [1, 0]], device=DEVICE)
    x = vectors(2, 64).flatten(1)
    w[[2, 3, 5]] = math.nan
    y = run_linear_kernel(x, w, None, ids)
    check_linear(y, linear.experts_linear_reference(x, ids, w))


def test_mxfp4_is_what_it_is_said_to_be() -> None:
    nibbles = torch.arange(16, dtype=U8).repeat(2)[None]  # (1, 32)
    values = linear.mxfp4_values(nibbles, torch.tensor([[128]], dtype=U8))[0]
    positive = [0, 1, 2, 3, 4, 6, 8, 12]
    assert values.tolist() == 2 * (positive + [-value for value in positive])
    values = linear.mxfp4_values(nibbles, torch.tensor([[0]], dtype=U8))[0]
    assert values[1].item() == 0.5 * 2.0 ** -127


def test_experts_linear_arguments_are_checked() -> None:
    ids = random_choices(2, 2, 3)
    for form in FORMS:
        w, *scales = expert_weights(form, 3, 8, 128, F32)
        with pytest.raises(ValueError, match="experts_linear: needs x"):
            linear.experts_linear(vectors(2, 64).flatten(1), ids, w, *scales)
        with pytest.raises(ValueError, match="experts_linear: needs x"):
            linear.experts_linear(vectors(3, 128).flatten(1), ids, w, *scales)
        if scales:
            with pytest.raises(ValueError, match="experts_linear: needs x"):
                linear.experts_linear(vectors(2, 128).flatten(1), ids, w, scales[0][:2])


def test_experts_linear_is_registered_properly() -> None:
    operator = torch.ops.gpt_flash.quantized_linear.default
    x = vectors(2, 128).flatten(1)
    w, scales = expert_weights("int8", 3, 8, 128, F32)
    torch.library.opcheck(operator, (x, w, scales, random_choices(2, 2, 3)))


def test_linear_layouts_are_what_they_are_said_to_be() -> None:
    w = torch.tensor([[0x1F, 0x80] + [0x88] * 14], dtype=U8)
    x = torch.eye(32)
    one = torch.ones(1, 1)
    zero = torch.zeros(1, 1)
    # the even input in the low nibble, the odd one in the high nibble, each minus 8
    y = int4_reference(x, w, one, zero)
    assert y.flatten().tolist() == [7, -7, -8, 0] + [0] * 28
    y = int4_reference(x, w, one * 2, one)
    assert y.flatten()[:4].tolist() == [15, -13, -15, 1]


def test_linear_arguments_are_checked() -> None:
    x = vectors(1, 64)
    w, scales, zeros = int4_weights(3, 64, 32)
    packed, lines = linear.pack_int4(w, scales, zeros)
    with pytest.raises(ValueError, match="int8_linear: needs x"):
        linear.int8_linear(x, packed.flatten(1), scales)
    with pytest.raises(ValueError, match="packed_int4_linear: needs x"):
        linear.packed_int4_linear(x[..., :32], packed, lines[:, :, :0])
    with pytest.raises(ValueError, match="packed_int4_linear: needs x"):
        linear.packed_int4_linear(x, packed[:2], lines)
    q, one = torch.ones(3, 64, dtype=I8, device=DEVICE), torch.ones(3, device=DEVICE)
    wrong = (x.long(), q, one), (x, q.float(), one), (x, q.byte(), one), (x, q, one.int())
    for given in (*wrong, (x[0, 0, 0], q, one), (x, q, one[:, None])):
        with pytest.raises(ValueError, match="int8_linear: needs x"):
            linear.int8_linear(*given)
    for given in ((x, packed, lines.float()), (x, packed.byte(), lines), (x, packed, lines.long())):
        with pytest.raises(ValueError, match="packed_int4_linear: needs x"):
            linear.packed_int4_linear(*given)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    for given in ((x[0], ids, q[None], one[None].int()), (x[0].int(), ids, q.float()[None])):
        with pytest.raises(ValueError, match="experts_linear: needs x"):
            linear.experts_linear(*given)
    with pytest.raises(ValueError, match="must be torch.bfloat16, got torch.float32"):
        linear.pack_int4(w, scales.float(), zeros)


def test_quantized_linear_is_registered_properly() -> None:
    operator = torch.ops.gpt_flash.quantized_linear.default
    x = torch.randn(3, 64, device=DEVICE)
    w = torch.randint(-127, 127, (8, 64), dtype=I8, device=DEVICE)
    torch.library.opcheck(operator, (x, w, torch.rand(8, device=DEVICE), None))
    w = torch.randint(0, 256, (8, 32), dtype=U8, device=DEVICE)
    scales = torch.rand(8, 2, device=DEVICE).bfloat16()
    packed = linear.pack_int4(w, scales, scales)
    torch.library.opcheck(operator, (x, *packed, None))
    operator = torch.ops.gpt_flash.dense_weight.default
    torch.library.opcheck(operator, (*packed, 64, BF16, 1))

# --- without Triton ---


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from linear import int8_linear, linear_reference
x = torch.randn(2, 16)
w = torch.randint(-127, 127, (4, 16), dtype=torch.int8)
scales = torch.rand(4)
torch.testing.assert_close(int8_linear(x, w, scales), linear_reference(x, w, scales))
"""


def test_without_triton() -> None:
    folder = Path(linear.__file__).parent  # where the file is alone, as where it is lifted to
    command = [sys.executable, "-c", WITHOUT_TRITON]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))
