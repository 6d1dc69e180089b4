"""Products of quantized weights with a few vectors: int8, int4 and MXFP4, of one weight or of the
experts that each token chose.

    int8_linear(x, w, scales)             a scale for each output
    packed_int4_linear(x, packed, lines)  a scale and a zero for 32, 64 or 128 inputs: pack_int4
    experts_linear(x, ids, w, scales)     of a stack of weights, in any of these forms or MXFP4
    dense_weight(w, scales, K, dtype)     the numbers themselves, for many vectors

To lift it, copy this file: it needs torch and triton only. The _reference functions say in float32
what is right; they are also what runs without a GPU or Triton, and for more than 64 vectors with
one weight. It works under torch.compile and in CUDA graphs.

Decoding one token multiplies every weight once, and its time is that of reading them. A weight
takes 2 bytes in bfloat16, 1 in int8, 0.625 in int4 with groups of 32 inputs, 0.53 with groups of
128 or in MXFP4: of Llama-3-8B's layers 14.0, 7.0, 4.4 and 3.7 GB a token. Of a mixture of experts
only those count that a token chose: 4 of 32 in gpt-oss-20b, 1.3 GB a token in MXFP4. Up to 64
vectors share one reading."""
from __future__ import annotations  # Triton reads the kernels' annotations, and may be absent

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
jit = triton.jit if triton else lambda fn: fn

# --- the contract ---


def int8_linear(x: Tensor, w: Tensor, scales: Tensor) -> Tensor:
    """x [..., K] times int8 w [N, K] with a scale per output [N]: (x @ w.T) * scales, summed in
    float32; [..., N]. On a GPU up to 64 vectors are taken in 16-bit steps, as said below."""
    if scales.dim() != 1 or not _fit_experts(x, w[None], scales[None]):
        raise ValueError("int8_linear: needs x [..., K], int8 w [N, K] and scales [N], "
                         f"got {[(*t.shape, t.dtype) for t in (x, w, scales)]}")
    return torch.ops.gpt_flash.quantized_linear(x, w, scales, None)


def packed_int4_linear(x: Tensor, packed: Tensor, lines: Tensor) -> Tensor:
    """x [..., K] times weights of pack_int4 -> [..., N]. On a GPU up to 64 vectors are taken in
    16-bit steps, as said below."""
    if lines.dim() != 3 or not _fit_experts(x, packed[None], lines[None]):
        raise ValueError("packed_int4_linear: needs x [..., K] and what pack_int4 returns, "
                         f"got {[(*t.shape, t.dtype) for t in (x, packed, lines)]}")
    return torch.ops.gpt_flash.quantized_linear(x, packed, lines, None)


def experts_linear(x: Tensor, ids: Tensor, w: Tensor, scales: Tensor | None = None) -> Tensor:
    """Products with the weights that each token chose of a stack: x [R, K], or [R, n_active, K]
    with a vector for each choice, and ids [R, n_active], integers that differ within a token,
    -> [R, n_active, N]. What w and scales may be, float32 sums as in the products of one weight:

    floating point  w [E, N, K]
    int8            w [E, N, K] and scales [E, N]
    int4            w [E, N, blocks, 32] and int32 scales [E, ...]: stacks of what pack_int4 returns
    MXFP4           w [E, N, blocks, 32] of pack_planes, and uint8 scales [E, N, K / 32]

    On a GPU a chosen weight is read once for up to 16 tokens; what nobody chose is not read, and
    the host does not learn what was chosen."""
    R, n_active = ids.shape
    if x.shape[:-1] not in ((R,), (R, n_active)) or not _fit_experts(x, w, scales):
        given = [None if t is None else (*t.shape, t.dtype) for t in (x, ids, w, scales)]
        raise ValueError("experts_linear: needs x [R, K] or [R, n_active, K], ids [R, n_active], "
                         f"and a stack of weights with their scales, got {given}")
    return torch.ops.gpt_flash.quantized_linear(x, w, scales, ids)


def dense_weight(w: Tensor, scales: Tensor, K: int, dtype: torch.dtype, nibbles: int = 1) -> Tensor:
    """What a quantized weight of K inputs, or a stack of them, stands for: w and scales as above ->
    [N, K] or [E, N, K] of dtype, for many vectors.

    nibbles: 2 if a weight is a pair of them, low + 16 * high, which int4 takes for two inputs."""
    if scales.is_floating_point():
        return w * scales[..., None].to(dtype)
    return torch.ops.gpt_flash.dense_weight(w, scales, K, dtype, nibbles)


def _fit_experts(x: Tensor, w: Tensor, scales: Tensor | None) -> bool:
    """Whether w and scales are a stack that experts_linear knows, of weights with x's inputs."""
    if x.dim() == 0 or not x.is_floating_point():
        return False
    K = x.shape[-1]
    E, N = w.shape[:2]
    if scales is None:
        return w.is_floating_point() and w.shape == (E, N, K)
    if scales.is_floating_point():
        return w.dtype == torch.int8 and w.shape == (E, N, K) and scales.shape == (E, N)
    if w.dtype != torch.int8 or w.shape != (E, N, (K + 63) // 64, 32):
        return False
    if scales.dtype == torch.uint8:
        return K % 32 == 0 and scales.shape == (E, N, K // 32)
    if scales.dtype != torch.int32 or scales.dim() != 4:
        return False
    halves = scales.shape[1] == 2 and scales.shape[3] == w.shape[2] and K % 32 == 0
    plain = scales.shape[1] == 1 and K in (64 * scales.shape[3], 128 * scales.shape[3])
    return scales.shape[:3:2] == (E, N) and (halves or plain)

# --- the references ---


def linear_reference(x: Tensor, w: Tensor, scales: Tensor | None) -> Tensor:
    weight = w.float() if scales is None else dense_weight_reference(w, scales, x.shape[-1])
    return F.linear(x.float(), weight).to(x.dtype)


def experts_linear_reference(
    x: Tensor, ids: Tensor, w: Tensor, scales: Tensor | None = None,
) -> Tensor:
    R, n_active = ids.shape
    vectors = x[:, None].expand(R, n_active, -1) if x.dim() == 2 else x
    y = []
    for vector, expert in zip(vectors.flatten(0, 1), ids.flatten().tolist()):
        of_expert = None if scales is None else scales[expert]
        y.append(linear_reference(vector, w[expert], of_expert))
    if not y:
        return x.new_empty(R, n_active, w.shape[1])
    return torch.stack(y).view(R, n_active, -1)


def dense_weight_reference(w: Tensor, scales: Tensor, K: int, nibbles: int = 1) -> Tensor:
    if scales.is_floating_point():
        return w * scales[..., None].float()
    if w.dim() == 4:
        weights = [dense_weight_reference(*of_one, K, nibbles) for of_one in zip(w, scales)]
        return torch.stack(weights)
    if scales.dtype == torch.uint8:
        return mxfp4_values(split_planes(w, K), scales)
    q, scales, zeros = unpack_int4(w, scales, nibbles * K)
    q = q.view(*scales.shape, -1).float() - 8  # (N, K / group, group)
    values = (q * scales[..., None] + zeros[..., None]).flatten(1)
    return values if nibbles == 1 else values[:, ::2] + 16 * values[:, 1::2]

# --- formats ---


def mxfp4_values(nibbles: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 weights, nibbles [..., K] and scales [..., K / 32], both uint8 -> float32 [..., K]:
    E2M1 numbers times 2 ** (scale - 127) for every 32 (the OCP's Microscaling Formats, 1.0)."""
    values = torch.tensor(E2M1, device=nibbles.device)[nibbles.int()]
    values = values.unflatten(-1, (-1, 32))  # (..., K / 32, 32)
    return torch.ldexp(values, scales[..., None].int() - 127).flatten(-2)


# a sign, two bits of exponent and one of mantissa
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def pack_int4(w: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """w, uint8 [N, K / 2] with the even k in the low nibble and the odd k in the high one, scales
    and zeros, bfloat16 [N, K / group] for groups of 32, 64 or 128 inputs, where a weight is
    (nibble - 8) * scale + zero, for packed_int4_linear:

    packed [N, blocks, 32] int8: byte c of a block of 64 inputs has input c in its low and input
        32 + c in its high nibble, as two's complements; zeros behind the last input
    lines int32: the bits of a scale below those of its zero; [1, N, K / group] for groups of 64 or
        128, [2, N, blocks] for groups of 32, those of the low nibbles before those of the high"""
    N, groups = scales.shape
    K = 2 * w.shape[1]
    if scales.dtype != torch.bfloat16 or zeros.dtype != torch.bfloat16:
        raise ValueError("pack_int4: scales and zeros must be torch.bfloat16, "
                         f"got {scales.dtype} and {zeros.dtype}")
    packed = pack_planes(w ^ 0x88)  # nibble - 8 as a two's complement is nibble ^ 8

    pairs = torch.stack((scales, zeros), -1)  # (N, groups, 2)
    lines = pairs.view(torch.int32).squeeze(-1)  # (N, groups)
    if K == 32 * groups:
        lines = F.pad(lines, (0, groups % 2)).view(N, -1, 2)
        return packed, lines.permute(2, 0, 1).contiguous()
    return packed, lines[None]


def pack_planes(w: Tensor) -> Tensor:
    """Nibbles [N, K / 2] uint8, the even input in the low half -> [N, blocks, 32] int8: byte c of a
    block of 64 inputs has input c in its low and input 32 + c in its high nibble; zeros behind the
    last input."""
    nibbles = torch.stack((w & 15, w >> 4), -1).flatten(1)  # (N, K)
    nibbles = F.pad(nibbles, (0, -nibbles.shape[1] % 64))
    low, high = nibbles.view(len(w), -1, 2, 32).unbind(2)  # (N, blocks, 32)
    return (low | high << 4).view(torch.int8)


def split_planes(packed: Tensor, K: int) -> Tensor:
    """What pack_planes has packed: nibbles [N, K] uint8, a byte each."""
    bits = packed.view(torch.uint8)
    nibbles = torch.stack((bits & 15, bits >> 4), 2)  # (N, blocks, 2, 32)
    return nibbles.view(len(packed), -1)[:, :K]


def unpack_int4(packed: Tensor, lines: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """What pack_int4 has packed of K inputs: nibbles [N, K] uint8, a byte each, and scales and
    zeros [N, K / group] bfloat16."""
    N = len(packed)
    nibbles = split_planes(packed, K) ^ 8

    lines = lines.permute(1, 2, 0).flatten()
    pairs = lines.view(torch.bfloat16).view(N, -1, 2)  # (N, groups, 2)
    if K % 64:  # groups of 32, one more than there are
        pairs = pairs[:, :-1]
    scales, zeros = pairs.unbind(-1)
    return nibbles, scales, zeros

# --- the operators ---


def _operator(name: str, schema: str, run: Callable, fake: Callable) -> None:
    """Register an operator: what it runs, and what it returns where there is no data."""
    torch.library.define(f"gpt_flash::{name}", schema)
    torch.library.impl(f"gpt_flash::{name}", "default", run)
    torch.library.register_fake(f"gpt_flash::{name}", fake)


def _linear(x: Tensor, w: Tensor, scales: Tensor | None, ids: Tensor | None) -> Tensor:
    if triton is None or not x.is_cuda or x.numel() == 0:
        if ids is None:
            return linear_reference(x, w, scales)
        return experts_linear_reference(x, ids, w, scales)
    if ids is None and x.numel() > MOST_ROWS * x.shape[-1]:
        return F.linear(x, dense_weight(w, scales, x.shape[-1], x.dtype))
    return _launch_linear(x, w, scales, ids)


MOST_ROWS = 64  # with more, multiplying a weight that was dequantized is faster than 16 at a time


def _dense_weight(w: Tensor, scales: Tensor, K: int, dtype: torch.dtype, nibbles: int) -> Tensor:
    if triton is None or not w.is_cuda:
        return dense_weight_reference(w, scales, K, nibbles).to(dtype)
    kernel, grid, arguments = _dense_arguments(w, scales, K, dtype, nibbles)
    with torch.cuda.device_of(w):
        kernel[grid](**arguments)
    return arguments["y_ptr"]


def _dense_weight_fake(w: Tensor, scales: Tensor, K: int, dtype: torch.dtype, _: int) -> Tensor:
    return w.new_empty(*w.shape[:-2], K, dtype=dtype)


def _linear_fake(x: Tensor, w: Tensor, scales: Tensor | None, ids: Tensor | None) -> Tensor:
    if ids is None:
        return x.new_empty(*x.shape[:-1], w.shape[0])
    return x.new_empty(*ids.shape, w.shape[1])


_operator("quantized_linear", "(Tensor x, Tensor w, Tensor? scales, Tensor? ids) -> Tensor",
          _linear, _linear_fake)
_operator("dense_weight",
          "(Tensor w, Tensor scales, int K, ScalarType dtype, int nibbles) -> Tensor",
          _dense_weight, _dense_weight_fake)

# --- in Triton ---
#
# The time is that of reading the weights, if no more than two or three instructions are spent on a
# byte. Converting them to float costs that alone. So they are multiplied as they are, on the tensor
# cores' int8, and what is converted is x: in 16-bit steps of the largest value of each few inputs,
# which are two int8 halves,
#     x = step * (256 * high + low),
# with less than a seventh of the error of rounding the result to bfloat16, also where some inputs
# are 1000 times larger than the rest. A program has all rows of x, up to 16, and a few outputs, so
# that every weight is read and unpacked once; of more rows each 16, which run one beside the other,
# so that a weight comes from memory once. Where that makes too few programs for the GPU, each has a
# part of the inputs only, and the last to finish, by a counter, sums the parts.


@jit
def _max_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _largest(x):
    return tl.reduce(tl.abs(x), 2, _max_or_nan)


@jit
def _step(largest):
    """The step in which so large a value is 127 * 256, never 0."""
    return (largest + 1e-30) / 32512


@jit
def _times_steps(w, x, step):
    """The dot of w (B, N, C), int8, and round(x / step) for x (B, ROWS, C), step (B, ROWS): exact
    in int32, as 128 * 32512 * C is below 2^31 for C up to 512; (B, N, ROWS) in float32."""
    # next to 1.5 * 2^23 a float's lowest bits are an integer; 128 more, so that high is rounded
    steps = x * (1 / step)[:, :, None] + (12582912.0 + 128)
    steps = steps.to(tl.int32, bitcast=True)
    high = (steps >> 8).to(tl.int8)
    low = steps.to(tl.int8) ^ -128  # less the 128
    dot = tl.dot(w, tl.permute(high, 0, 2, 1), out_dtype=tl.int32) * 256
    dot = tl.dot(w, tl.permute(low, 0, 2, 1), dot, out_dtype=tl.int32)
    return dot.to(tl.float32)


@jit
def _my_part(ALL: tl.constexpr, TURN: tl.constexpr, SPLIT: tl.constexpr):
    """Where a program's part of all inputs, whole turns of its loop, starts and ends."""
    PART: tl.constexpr = (ALL + TURN * SPLIT - 1) // (TURN * SPLIT) * TURN
    start = 0
    if SPLIT > 1:
        start = tl.program_id(2) * PART
    return start, start + PART


@jit
def _sum_parts(part_ptr, counter_ptr, y, SPLIT: tl.constexpr):
    """y (outputs, rows) of all parts, in their order, and whether this program has it: the last of
    them to come does."""
    SIZE: tl.constexpr = y.shape[0] * y.shape[1]
    place = tl.program_id(0)
    at = tl.arange(0, y.shape[0])[:, None] * y.shape[1] + tl.arange(0, y.shape[1])[None, :]
    part_ptrs = part_ptr + place * (SPLIT * SIZE) + at
    tl.store(part_ptrs + tl.program_id(2) * SIZE, y)
    tl.debug_barrier()  # every thread's part is written before one of them counts
    last = tl.atomic_add(counter_ptr + place, 1, sem="acq_rel") == SPLIT - 1
    tl.store(counter_ptr + place, 0, last)
    part = tl.arange(0, SPLIT)[:, None, None]
    # .cg: past L1, which does not see what other SMs wrote
    parts = tl.load(part_ptrs[None, :, :] + part * SIZE, last, other=0, cache_modifier=".cg")
    return tl.sum(parts, 0), last


@jit
def _store_outputs(y_ptr, y, n, row, live, N, part_ptr, counter_ptr, SPLIT: tl.constexpr):
    """y (outputs n, rows) into [rows, N], of the live rows."""
    if SPLIT > 1:
        y, last = _sum_parts(part_ptr, counter_ptr, y, SPLIT)
        live = live & last
    y_ptrs = y_ptr + row[None, :] * N + n[:, None]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), (n < N)[:, None] & live[None, :])


@jit
def _choices(ids_ptr, pair, ROWS, N_ACTIVE: tl.constexpr, ACTIVE: tl.constexpr,
             BLOCK_M: tl.constexpr):
    """Of a pair of token and expert: the expert, and where each token of its block, BLOCK_M of
    them, has the same one: the numbers of these pairs, -1 for a token that has not."""
    token = pair // (BLOCK_M * N_ACTIVE) * BLOCK_M + tl.arange(0, BLOCK_M)
    choice = tl.arange(0, ACTIVE)
    pairs = token[:, None] * N_ACTIVE + choice[None, :]
    live = (token < ROWS)[:, None] & (choice < N_ACTIVE)[None, :]
    ids = tl.load(ids_ptr + pairs, live, other=-1)
    expert = tl.load(ids_ptr + pair)
    return expert.to(tl.int64), tl.max(tl.where(ids == expert, pairs, -1), 1)


@jit
def _rows(ids_ptr, ROWS, N_ACTIVE: tl.constexpr, ACTIVE: tl.constexpr, X_PER_PAIR: tl.constexpr,
          BLOCK_M: tl.constexpr, SLICES: tl.constexpr):
    """What a program multiplies: the number of its weight, the rows of x and of y, which of them
    are live, and whether there is anything to do. Without ids: BLOCK_M rows by the only weight.
    With them: a pair of token and expert, together with the same expert's of the tokens behind it;
    what a token before it has begun is nothing to do."""
    if ids_ptr is None:
        expert = 0
        y_row = tl.program_id(0) % SLICES * BLOCK_M + tl.arange(0, BLOCK_M)
        live = y_row < ROWS
        begins = True
    else:
        pair = tl.program_id(1)
        expert, y_row = _choices(ids_ptr, pair, ROWS, N_ACTIVE, ACTIVE, BLOCK_M)
        live = y_row >= 0
        begins = tl.min(tl.where(live, y_row, pair)) == pair
    x_row = y_row if X_PER_PAIR else y_row // N_ACTIVE
    return expert, x_row, y_row, live, begins


@jit
def _linear_kernel(
    x_ptr, ids_ptr, w_ptr, scales_ptr, y_ptr, part_ptr, counter_ptr, ROWS, N, K: tl.constexpr,
    N_ACTIVE: tl.constexpr, ACTIVE: tl.constexpr, X_PER_PAIR: tl.constexpr, SLICES: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Weights in floating point, without scales, or int8."""
    STAGES: tl.constexpr = 2 if tl.target_info.is_hip() else 3  # AMD has 64 KB for them
    expert, x_row, y_row, row_live, begins = _rows(
        ids_ptr, ROWS, N_ACTIVE, ACTIVE, X_PER_PAIR, BLOCK_M, SLICES)
    if not begins:
        return
    n = tl.program_id(0) // SLICES * BLOCK_N + tl.arange(0, BLOCK_N)
    w_rows = w_ptr + (expert * N + n.to(tl.int64))[None, :, None] * K
    acc = tl.zeros([CHUNKS, BLOCK_N, BLOCK_M], tl.float32)
    start, end = _my_part(K, CHUNKS * CHUNK, SPLIT)
    for at in tl.range(start, end, CHUNKS * CHUNK, num_stages=STAGES):
        # a chunk of inputs, with a step of its own, for each warp
        k = at + tl.arange(0, CHUNKS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        k = k[:, None, :]  # (CHUNKS, 1, CHUNK)
        live = row_live[None, :, None] & (k < K)
        x = tl.load(x_ptr + x_row[None, :, None] * K + k, live, other=0)
        live = (n < N)[None, :, None] & (k < K)
        w = tl.load(w_rows + k, live, other=0, eviction_policy="evict_first")
        if scales_ptr is None:
            acc = tl.dot(w, tl.permute(x, 0, 2, 1), acc, input_precision="ieee")
        else:
            values = x.to(tl.float32)
            step = _step(_largest(values))  # (CHUNKS, BLOCK_M)
            acc += _times_steps(w, values, step) * step[:, None, :]
    y = tl.sum(acc, 0)
    if scales_ptr is not None:
        y *= tl.load(scales_ptr + expert * N + n, n < N, other=0).to(tl.float32)[:, None]
    _store_outputs(y_ptr, y, n, y_row, row_live, N, part_ptr, counter_ptr, SPLIT)


@jit
def _nibbles(w):
    """16 times the low and the high nibbles of bytes, as int8; on NVIDIA of four bytes at once, for
    which Triton has no words of its own."""
    if tl.target_info.is_cuda():
        low = tl.inline_asm_elementwise(
            "{.reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xf0f0f0f0;}", "=r,r", [w],
            dtype=tl.int8, is_pure=True, pack=4)
        high = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xf0f0f0f0;", "=r,r", [w], dtype=tl.int8, is_pure=True, pack=4)
    else:
        low = w << 4
        high = w & -16
    return low, high


@jit
def _e2m1(w):
    """Twice the E2M1 numbers in the low and the high nibbles of bytes, as int8; on NVIDIA four at
    once: a nibble without its sign selects a byte of two words."""
    if tl.target_info.is_cuda():
        left, right = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 4; shr.b32 $1, $2, 4;", "=&r,=r,r", [w], dtype=(tl.int8, tl.int8),
            is_pure=True, pack=4)
        low = _four_e2m1(w, left)
        high = _four_e2m1(right, w)
    else:
        low = _twice_e2m1(w)
        high = _twice_e2m1(w >> 4)
    return low, high


@jit
def _four_e2m1(sizes, signs):
    """Sizes are in the low three bits of bytes, signs in the highest."""
    return tl.inline_asm_elementwise(
        """{.reg .b32 t, m, p, n;
        and.b32 t, $1, 0x07070707; shr.b32 m, t, 4; or.b32 t, t, m;
        prmt.b32 t, t, 0, 0x4420;
        prmt.b32 p, 0x03020100, 0x0c080604, t;
        prmt.b32 n, 0xfdfeff00, 0xf4f8fafc, t;
        prmt.b32 m, $2, 0, 0xba98;
        lop3.b32 $0, m, n, p, 0xca;}""",
        "=r,r,r", [sizes, signs], dtype=tl.int8, is_pure=True, pack=4)


@jit
def _twice_e2m1(w):
    t = w & 7
    large = tl.where(t < 6, 2 * t - 4, 4 * t - 16)
    size = tl.where(t < 4, t, large)
    return tl.where((w & 8) == 0, size, -size).to(tl.int8)


@jit
def _power_of_two(exponents):
    """2 ** (exponents - 127) for uint8 ones, float32; 0 for 2 ** -127."""
    return (exponents.to(tl.int32) << 23).to(tl.float32, bitcast=True)[:, :, None]


@jit
def _line(lines):
    """Scales and zeros, float32, out of the bits of both."""
    scales = (lines << 16).to(tl.float32, bitcast=True)
    zeros = (lines & -65536).to(tl.float32, bitcast=True)
    return scales[:, :, None], zeros[:, :, None]


@jit
def _lines(lines_ptr, n, block, live, N, K: tl.constexpr, GROUP: tl.constexpr,
           MXFP4: tl.constexpr):
    """Scales and zeros of the low nibbles of blocks of 64 at outputs n, and of the high ones."""
    ALL_BLOCKS: tl.constexpr = (K + 63) // 64
    if MXFP4:
        line_ptrs = lines_ptr + n * (K // 32) + 2 * block
        scale_low = _power_of_two(tl.load(line_ptrs, live, other=0))
        live = live & (2 * block + 1 < K // 32)
        scale_high = _power_of_two(tl.load(line_ptrs + 1, live, other=0))
        zero_low = 0.0
        zero_high = 0.0
    elif GROUP == 32:
        line_ptrs = lines_ptr + n * ALL_BLOCKS + block
        scale_low, zero_low = _line(tl.load(line_ptrs, live, other=0))
        scale_high, zero_high = _line(tl.load(line_ptrs + N * ALL_BLOCKS, live, other=0))
    else:
        scale_low, zero_low = _line(
            tl.load(lines_ptr + n * (K // GROUP) + block * 64 // GROUP, live, other=0))
        scale_high = scale_low
        zero_high = zero_low
    return scale_low, zero_low, scale_high, zero_high


@jit
def _int4_linear_kernel(
    x_ptr, ids_ptr, w_ptr, lines_ptr, y_ptr, part_ptr, counter_ptr, ROWS, N, K: tl.constexpr,
    LINES: tl.constexpr, N_ACTIVE: tl.constexpr, ACTIVE: tl.constexpr, X_PER_PAIR: tl.constexpr,
    SLICES: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    STAGES: tl.constexpr = 2 if tl.target_info.is_hip() else 3
    ALL_BLOCKS: tl.constexpr = (K + 63) // 64
    MXFP4: tl.constexpr = lines_ptr.dtype.element_ty == tl.uint8  # else affine
    GROUP: tl.constexpr = 32 if LINES == 2 * ALL_BLOCKS else K // LINES
    expert, x_row, y_row, row_live, begins = _rows(
        ids_ptr, ROWS, N_ACTIVE, ACTIVE, X_PER_PAIR, BLOCK_M, SLICES)
    if not begins:
        return
    n = tl.program_id(0) // SLICES * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.arange(0, 32)[None, None, :]
    w_rows = w_ptr + (expert * N + n.to(tl.int64))[None, :, None] * (ALL_BLOCKS * 32)
    lines_ptr += expert * N * LINES
    acc = tl.zeros([BLOCKS, BLOCK_N, BLOCK_M], tl.float32)
    start, end = _my_part(ALL_BLOCKS, BLOCKS, SPLIT)
    for at in tl.range(start, end, BLOCKS, num_stages=STAGES):
        block = at + tl.arange(0, BLOCKS)
        # inputs of the low nibbles, and 32 further on of the high ones
        k = block[:, None, None] * 64 + byte
        x_ptrs = x_ptr + x_row[None, :, None] * K + k
        live = row_live[None, :, None]
        x_low = tl.load(x_ptrs, live & (k < K), other=0).to(tl.float32)
        x_high = tl.load(x_ptrs + 32, live & (k + 32 < K), other=0).to(tl.float32)
        step = _step(_max_or_nan(_largest(x_low), _largest(x_high)))  # (BLOCKS, BLOCK_M)
        # their weights, scales and zeros
        live = (block < ALL_BLOCKS)[:, None] & (n < N)[None, :]  # (BLOCKS, BLOCK_N)
        w_ptrs = w_rows + block[:, None, None] * 32 + byte
        w = tl.load(w_ptrs, live[:, :, None], other=0, eviction_policy="evict_first")
        w_low, w_high = _e2m1(w) if MXFP4 else _nibbles(w)
        scale_low, zero_low, scale_high, zero_high = _lines(
            lines_ptr, n[None, :], block[:, None], live, N, K, GROUP, MXFP4)
        if not MXFP4:
            acc += zero_low * tl.sum(x_low, 2)[:, None, :]
            acc += zero_high * tl.sum(x_high, 2)[:, None, :]
        dot = _times_steps(w_low, x_low, step) * scale_low
        dot += _times_steps(w_high, x_high, step) * scale_high
        acc += dot * (step / (2 if MXFP4 else 16))[:, None, :]
    _store_outputs(
        y_ptr, tl.sum(acc, 0), n, y_row, row_live, N, part_ptr, counter_ptr, SPLIT)


@jit
def _weights(nibbles, scale, zero, UNIT: tl.constexpr, NIBBLES: tl.constexpr):
    """Of nibbles times UNIT (.., 32), or of pairs of them (.., 16)."""
    w = nibbles.to(tl.float32) * (scale / UNIT) + zero
    if NIBBLES == 2:
        low, high = tl.split(w.reshape(w.shape[0], w.shape[1], 16, 2))
        w = low + 16 * high
    return w


@jit
def _dense_kernel(
    w_ptr, lines_ptr, y_ptr, N, K: tl.constexpr, LINES: tl.constexpr, NIBBLES: tl.constexpr,
):
    """K nibbles of each output, which are K / NIBBLES weights: of 8 outputs 16 blocks."""
    ALL_BLOCKS: tl.constexpr = (K + 63) // 64
    MXFP4: tl.constexpr = lines_ptr.dtype.element_ty == tl.uint8  # else affine
    GROUP: tl.constexpr = 32 if LINES == 2 * ALL_BLOCKS else K // LINES
    WIDTH: tl.constexpr = 32 // NIBBLES
    expert = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * 8 + tl.arange(0, 8)[:, None]
    block = tl.program_id(1) * 16 + tl.arange(0, 16)[None, :]
    live = (n < N) & (block < ALL_BLOCKS)  # (8, 16)
    at = (expert * N + n) * ALL_BLOCKS + block
    w_ptrs = w_ptr + at[:, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    w = tl.load(w_ptrs, live[:, :, None], other=0)
    low, high = _e2m1(w) if MXFP4 else _nibbles(w)
    UNIT: tl.constexpr = 2 if MXFP4 else 16
    lines_ptr += expert * N * LINES
    scale_low, zero_low, scale_high, zero_high = _lines(
        lines_ptr, n, block, live, N, K, GROUP, MXFP4)
    k = block[:, :, None] * (2 * WIDTH) + tl.arange(0, WIDTH)[None, None, :]
    y_ptrs = y_ptr + (expert * N + n)[:, :, None] * (K // NIBBLES) + k
    low = _weights(low, scale_low, zero_low, UNIT, NIBBLES).to(y_ptr.dtype.element_ty)
    tl.store(y_ptrs, low, (n < N)[:, :, None] & (k < K // NIBBLES))
    high = _weights(high, scale_high, zero_high, UNIT, NIBBLES).to(y_ptr.dtype.element_ty)
    tl.store(y_ptrs + WIDTH, high, (n < N)[:, :, None] & (k + WIDTH < K // NIBBLES))


def _dense_arguments(
    w: Tensor, scales: Tensor, K: int, dtype: torch.dtype, nibbles: int,
) -> tuple[Any, tuple[int, int, int], dict[str, Any]]:
    """The kernel of dense_weight, its grid and its arguments."""
    N, blocks = w.shape[-3:-1]
    grid = (triton.cdiv(N, 8), triton.cdiv(blocks, 16), w.numel() // (N * blocks * 32))
    return _dense_kernel, grid, dict(
        w_ptr=w, lines_ptr=scales, y_ptr=_dense_weight_fake(w, scales, K, dtype, nibbles),
        N=N, K=nibbles * K, LINES=scales.numel() // w.shape[:-2].numel(), NIBBLES=nibbles)


def _linear_arguments(
    x: Tensor, w: Tensor, scales: Tensor | None, ids: Tensor | None = None, n_sm: int = 0,
) -> tuple[Any, tuple[int, int, int], dict[str, Any]]:
    """The kernel, its grid and its arguments but the counters. scales: or, after pack_int4, lines;
    ids: of a stack of weights; n_sm: of a GPU whose programs can wait for each other's parts."""
    x = x.contiguous()
    K = x.shape[-1]
    if ids is None:
        N = len(w)
        rows, pairs = x.numel() // K, 1
        of_ids = dict(ids_ptr=None, N_ACTIVE=1, ACTIVE=1, X_PER_PAIR=False)
        y = x.new_empty(*x.shape[:-1], N)
    else:
        N = w.shape[1]
        rows, n_active = ids.shape
        pairs = ids.numel()
        of_ids = dict(
            ids_ptr=ids.contiguous(), N_ACTIVE=n_active,
            ACTIVE=triton.next_power_of_2(n_active), X_PER_PAIR=x.dim() == 3)
        y = x.new_empty(rows, n_active, N)
    # converting x is paid once for BLOCK_N outputs; many rows need many, and leave room for fewer
    # inputs at a time
    BLOCK_M = min(16, triton.next_power_of_2(rows))
    BLOCK_N = 32 if rows <= 8 else 64
    most = 1024 if ids is None else 512  # experts are narrow
    inputs = min(most, 4096 // BLOCK_M)
    slices = triton.cdiv(rows, 16) if ids is None else 1
    blocks = triton.cdiv(N, BLOCK_N) * slices
    arguments = of_ids | dict(
        x_ptr=x, w_ptr=w, y_ptr=y, ROWS=rows, N=N, K=K, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        num_warps=4)
    split = _split(blocks, K // inputs, inputs, n_sm)
    part = x.new_empty(blocks, split, BLOCK_N, BLOCK_M, dtype=torch.float32) if split > 1 else None
    arguments |= dict(SLICES=slices, SPLIT=split, part_ptr=part, counter_ptr=None)
    grid = (blocks, pairs, split)
    if scales is None or scales.is_floating_point():
        inputs //= w.element_size()
        of_form = dict(scales_ptr=scales, CHUNKS=4, CHUNK=inputs // 4)
        return _linear_kernel, grid, arguments | of_form
    lines = scales.numel() // w.shape[:-2].numel()
    of_form = dict(lines_ptr=scales, LINES=lines, BLOCKS=inputs // 64)
    return _int4_linear_kernel, grid, arguments | of_form


def _split(blocks: int, turns: int, inputs: int, n_sm: int) -> int:
    """Into how many parts the inputs are cut, of two turns at least, so that a GPU of n_sm is full:
    of a program for each SM, if it takes 1024 inputs in a turn, else of two."""
    wanted = n_sm * 7 // (8 if inputs == 1024 else 4)
    split = 1
    while blocks * split < wanted and 4 * split <= min(turns, 16):
        split *= 2
    return split


def counters(device: torch.device, n: int) -> Tensor:
    """n zeros, which a launch leaves at zero: whoever keeps some puts a function here that returns
    them, and spares a launch."""
    return torch.zeros(n, dtype=torch.int32, device=device)


def _launch_linear(
    x: Tensor, w: Tensor, scales: Tensor | None, ids: Tensor | None = None,
) -> Tensor:
    n_sm = torch.cuda.get_device_properties(x.device).multi_processor_count
    if torch.version.hip or ids is not None:  # a barrier waits for no other thread's stores there,
        n_sm = 0  # and experts have programs enough
    kernel, grid, arguments = _linear_arguments(x, w, scales, ids, n_sm)
    with torch.cuda.device_of(x):
        if grid[2] > 1:
            arguments["counter_ptr"] = counters(x.device, grid[0])
        kernel[grid](**arguments)
    return arguments["y_ptr"]
