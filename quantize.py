"""int8 and int4 weights: the layers that decode with them, saving them, what they cost in quality.

A library: `python generate.py --quantize int8 --save FOLDER` writes a checkpoint like any other,
and `python benchmarks/quality.py --perplexity FILE` prints what the modes cost on a text."""
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import kernels
from formats.workspace import workspace

BF16 = torch.cpu._is_avx512_bf16_supported()
CHUNK_ROWS = 512  # rows of a weight that are converted at a time: what a CPU's cache holds


# --- quantizing ---

def quantize_model(model: nn.Module, mode: str, group_size: int = 32) -> nn.Module:
    """Quantize a loaded model's linear layers in place -> the model, which then needs setup_caches
    again. The embedding stays as it is, also where the output layer shares it."""
    modules = list(model.named_modules())
    for name, module in tqdm(modules, "quantizing", unit=" layers", disable=None, leave=False):
        if isinstance(module, Linear):
            layer = quantize_linear(module, mode, group_size, name)
            model.set_submodule(name, layer.pack())
    for module in model.modules():
        if hasattr(module, "stack"):
            module.stack()
    model.cache = None
    return model


@torch.no_grad()
def quantize_linear(
    linear: "Linear", mode: str, group_size: int = 32, name: str = "",
    over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> "Linear | QuantizedLinear":
    """A Linear's quantized counterpart, not packed yet, its relative error in .error; the Linear
    itself where its shape does not fit, said on stderr. ValueError for an unknown mode or group
    size. over_ranks: of a layer whose rows lie on several ranks, see weights.py.

    The output layer gets int8 in int4 mode too: in int4 it costs SmolLM2-135M a mean KL of 0.053,
    in int8 0.002, and llama.cpp does not go below 6 bits for it either."""
    if mode not in MODES or group_size not in (32, 64, 128):
        raise ValueError(
            f"no quantization {mode!r} in groups of {group_size}; "
            "there are int8, int4 and 32, 64, 128"
        )
    if name == "lm_head":
        mode = "int8"
    try:
        layer = MODES[mode](linear, group_size)
    except ValueError as e:
        say_once(f"{e}: it keeps its precision")
        return linear
    layer.over_ranks = over_ranks
    weight = linear.stored()["weight"]  # (N, K)
    error = torch.zeros((), device=weight.device)
    size = torch.zeros((), device=weight.device)
    for start in range(0, len(weight), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        w = weight[rows].float()
        error += (layer.quantize(rows, w) - w).square().sum()
        size += w.square().sum()
    layer.error = float((error / size.clamp_min(1e-30)).sqrt())
    return layer


@lru_cache
def say_once(message: str) -> None:
    print(message, file=sys.stderr)


# --- quantized layers ---

class QuantizedLinear(nn.Module):
    """What quantized layers share. One starts out empty, with the shape and device of a Linear.

    quantize(rows, w) fills a slice of rows from float32 and returns the values they stand for now;
    stored() gives the plain tensors that are saved, dense(dtype) the weight by slices. What may
    hold integers from a file also has take(rows, ...), and rows(index) for an embedding.

    Up to few_rows, the most that were measured faster so, go to product(x), which reads the weight
    as it is kept, with x in bfloat16 (rounding it is a fifth of int8's own error). More rows, as
    in prefill, pay for dequantizing the weight once."""
    mode: str
    group_size: int | None
    error = 0.0  # relative, of the weight that quantize_linear has quantized
    # the largest values of rows of which this is a part, from those of the part
    over_ranks: Callable[[Tensor], Tensor] | None = None
    packed = False

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features = linear.out_features
        self.in_features = linear.in_features
        self.bias = linear.bias

    def pack(self) -> "QuantizedLinear":
        return self

    def slices(self) -> Iterator[slice]:
        """All rows, on a CPU as many at a time as its cache holds: half the time of all at once."""
        n = self.out_features
        if self.weight.device.type == "cpu":
            n = CHUNK_ROWS
        for start in range(0, self.out_features, n):
            yield slice(start, min(start + n, self.out_features))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if rows.shape[0] <= self.few_rows(x.device.type):
            y = self.product(rows.bfloat16())
        else:
            dtype = many_rows_dtype(x.device)
            rows = rows.to(dtype)
            y = torch.cat([F.linear(rows, weight) for weight in self.dense(dtype)], -1)
        y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class Int8Linear(QuantizedLinear):
    """x @ (weight * scales).T with weight [N, K] int8, scales [N] bfloat16: symmetric, one scale
    per output channel."""
    mode = "int8"
    group_size = None

    def __init__(self, linear: nn.Linear, group_size: int | None = None) -> None:
        super().__init__(linear)
        N, K = linear.out_features, linear.in_features
        device = linear.weight.device
        self.register_buffer("weight", torch.empty(N, K, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.empty(N, dtype=torch.bfloat16, device=device))

    def quantize(self, rows: slice, w: Tensor) -> Tensor:
        largest = w.abs().amax(1)  # (rows)
        if self.over_ranks is not None:
            largest = self.over_ranks(largest)
        scales = (largest / 127).bfloat16()
        steps = scales.float()[:, None]  # (rows, 1)
        q = (w / steps.clamp_min(1e-30)).round().clamp(-127, 127)
        self.weight[rows] = q.to(torch.int8)
        self.scales[rows] = scales
        return self.weight[rows] * steps

    def stored(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "scales": self.scales}

    def dense(self, dtype: torch.dtype) -> Iterator[Tensor]:
        for rows in self.slices():
            yield self.weight[rows].to(dtype) * self.scales[rows].to(dtype)[:, None]

    def few_rows(self, device: str) -> int:
        """A CPU's operator reads 16 inputs at a time, without looking."""
        if device == "cuda":
            return 16  # what the kernel takes
        if device == "cpu" and self.in_features % 16 == 0:
            return 24
        return 0

    def product(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scales)
        if len(x) == 1 and torch.compiler.is_compiling():
            # a launch less a layer: Inductor fuses one row with the norm before it. It spends 4 to
            # 7 instructions on a byte where our kernel spends 1: which is faster is to be measured.
            # More rows it would multiply after writing the whole weight in bfloat16
            return F.linear(x, self.weight.to(x.dtype)) * self.scales
        return kernels.int8_linear(x, self.weight, self.scales)


class Int4Linear(QuantizedLinear):
    """x @ w.T with w = (nibble - 8) * scale + zero: affine, in groups of 32, 64 or 128 inputs.

    weight [N, K/2] uint8 (the low nibble is the even input); scales, zeros [N, K/group_size]
    bfloat16. Packed for a CPU: N a multiple of 64, weight in the operator's layout, scales
    [K/group_size, N, 2] with the zeros beside them. Packed for a GPU: weight and scales are what
    kernels.pack_int4 returns, the zeros again with the scales."""
    mode = "int4"
    nibbles = 1  # of a weight
    layout: tuple[int, int] | None = None  # of weight packed for a CPU, see cpu_unpack

    def __init__(self, linear: nn.Linear, group_size: int = 32) -> None:
        super().__init__(linear)
        N, K = linear.out_features, linear.in_features
        if K % group_size:
            raise ValueError(
                f"a layer of {K} inputs does not divide into int4 groups of {group_size}"
            )
        self.group_size = group_size
        device = linear.weight.device
        packed = (N, K * self.nibbles // 2)
        groups = (N, K // group_size)
        # not empty_like, which on meta loads all of sympy: 50 MB and half a second
        self.register_buffer("weight", torch.empty(packed, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.empty(groups, dtype=torch.bfloat16, device=device))
        self.register_buffer("zeros", torch.empty(groups, dtype=torch.bfloat16, device=device))

    def quantize(self, rows: slice, w: Tensor) -> Tensor:
        """From a group's range, alternate between rounding to nibbles and the least-squares line
        through them, as llama.cpp does, and keep the best: 7% less error than the range alone on
        normal weights."""
        w = w.view(len(w), -1, self.group_size)  # (rows, groups, group_size)
        # the line that spreads the 16 nibbles over a group's range
        low, high = w.aminmax(dim=-1, keepdim=True)  # (rows, groups, 1)
        scale = (high - low) / 15
        zero = low + (high - low) * (8 / 15)
        q, scale, zero, error = round_to_line(w, scale, zero)
        best_q, best_scale, best_zero, best_error = q, scale, zero, error
        for _ in range(3):
            scale, zero = least_squares_line(w, q)
            q, scale, zero, error = round_to_line(w, scale, zero)
            better = error < best_error
            best_q = torch.where(better, q, best_q)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
            best_error = torch.where(better, error, best_error)
        nibbles = (best_q + 8).flatten(1).to(torch.uint8)  # (rows, K)
        self.weight[rows] = pack_nibbles(nibbles)
        self.scales[rows] = best_scale.squeeze(-1)
        self.zeros[rows] = best_zero.squeeze(-1)
        return (best_q * best_scale + best_zero).flatten(1)  # (rows, K)

    def take(self, rows: slice, q: Tensor, scale: Tensor, zero: Tensor, middle: int) -> None:
        """From q * scale + zero, q [rows, K] uint8, scale and zero [rows, K/group_size] float32:
        only the rounding of scales and zeros is lost. middle: half of q's range; that is where our
        zeros are taken, since they are small there, and so is their rounding."""
        self.weight[rows] = pack_nibbles(q + (8 - middle))
        self.scales[rows] = scale
        self.zeros[rows] = zero + middle * scale

    def pack(self) -> "Int4Linear":
        """Bring the tensors into the layout of the device's operator, where there is a known
        one."""
        device = self.weight.device.type
        if self.packed:
            return self
        if device == "cuda":
            self.pack_for_gpu()
        elif device == "cpu" and cpu_layout() is not None:
            self.pack_for_cpu(cpu_layout())
        return self

    def pack_for_gpu(self) -> None:
        self.weight, self.scales = kernels.pack_int4(self.weight, self.scales, self.zeros)
        self.zeros = None
        self.packed = True

    def pack_for_cpu(self, layout: tuple[int, int]) -> None:
        # rows of zeros up to a multiple of 64
        missing = -self.out_features % 64
        weight, scales, zeros = [
            F.pad(x, (0, 0, 0, missing)) if missing else x
            for x in (self.weight, self.scales, self.zeros)
        ]
        # in place and by slices, so that packing takes no memory beside the layer
        for part in weight.split(rows_at_once(self.in_features)):
            part.copy_(cpu_pack(unpack_nibbles(part), *layout))
        self.weight = weight
        self.scales = torch.stack((scales.t(), zeros.t()), -1)  # (K/group_size, N, 2)
        self.zeros = None
        self.layout = layout
        self.packed = True

    def unpack_for_gpu(self, rows: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lines = self.scales[:, rows]
        return kernels.unpack_int4(self.weight[rows], lines, self.nibbles * self.in_features)

    def plain(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Some of the rows, from a multiple of 64 on: nibbles [rows, K] uint8, scales and zeros
        [rows, K/group_size]."""
        if not self.packed:
            return unpack_nibbles(self.weight[rows]), self.scales[rows], self.zeros[rows]
        if self.layout is None:
            return self.unpack_for_gpu(rows)
        whole = slice(rows.start, 64 * math.ceil(rows.stop / 64))
        nibbles = cpu_unpack(self.weight[whole], *self.layout)[:rows.stop - rows.start]
        scales, zeros = self.scales[:, rows].transpose(0, 1).unbind(-1)
        return nibbles, scales, zeros

    def rows(self, index: Tensor) -> Tensor:
        """The rows of an index [n] -> [n, K] float32, as an embedding gives them."""
        if not self.packed:
            nibbles = unpack_nibbles(self.weight[index])
            scales, zeros = self.scales[index], self.zeros[index]
        elif self.layout is None:
            nibbles, scales, zeros = self.unpack_for_gpu(index)
        else:
            nibbles = cpu_unpack_rows(self.weight, index, *self.layout)
            scales, zeros = self.scales[:, index].transpose(0, 1).unbind(-1)
        return self.line(nibbles, scales, zeros, torch.float32)

    def stored(self) -> dict[str, Tensor]:
        parts = [self.plain(rows) for rows in self.slices()]
        nibbles, scales, zeros = [torch.cat(part) for part in zip(*parts)]
        return {"weight": pack_nibbles(nibbles), "scales": scales, "zeros": zeros}

    def dense(self, dtype: torch.dtype) -> Iterator[Tensor]:
        for rows in self.slices():
            yield self.line(*self.plain(rows), dtype)

    def line(
        self, nibbles: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The weights that some rows of plain() stand for."""
        return affine(nibbles, 8, scales, zeros, dtype)

    def few_rows(self, device: str) -> int:
        if device == "cuda" and self.packed:
            return 16  # what the kernel takes
        if device == "cpu" and self.packed:
            return 128 // self.nibbles
        return 0

    def product(self, x: Tensor) -> Tensor:
        if x.device.type == "cuda":
            return kernels.packed_int4_linear(x, self.weight, self.scales)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.weight, self.group_size * self.nibbles, self.scales
        )
        if y.shape[1] > self.out_features:  # rows that fill 64
            y = y[:, :self.out_features].contiguous()
        return y


class GroupedInt8Linear(Int4Linear):
    """8-bit weights in affine groups, of 32 for what is stored with 5 to 8 bits in a file.

    No operator of PyTorch takes int8 in groups. But a byte is two nibbles, and so K such weights
    are 2K of int4's: byte b = 16 * high + low is high times 16 x plus low times x. With int4's
    nibble - 8 on both sides, w = (b - 136) * scale + 17 * zero. It is also as fast as the operator
    for int8 with a scale per channel.

    weight [N, K] uint8; scales, zeros [N, K/group_size] bfloat16; packed as int4 is, with 2K
    inputs in groups of 2 * group_size."""
    mode = "int8_grouped"
    nibbles = 2

    def take(self, rows: slice, q: Tensor, scale: Tensor, zero: Tensor, middle: int) -> None:
        """As Int4Linear's; groups of the file may be smaller than ours, as those of Q6_K."""
        if scale.shape[1] > self.scales.shape[1]:
            q, scale, zero = in_larger_groups(q, scale, zero, middle, self.group_size)
            middle = 128
        shift = min(136 - middle, 256 - 2 * middle)  # all of q + shift is a byte
        self.weight[rows] = q + shift
        self.scales[rows] = scale
        self.zeros[rows] = (zero + (136 - shift) * scale) / 17

    def line(
        self, nibbles: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype
    ) -> Tensor:
        return affine(pack_nibbles(nibbles), 136, scales, 17 * zeros.float(), dtype)

    def product(self, x: Tensor) -> Tensor:
        return super().product(self.for_nibbles(x))

    def for_nibbles(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., 2K], what the low and the high nibbles of a weight are multiplied
        by."""
        return torch.stack((x, 16 * x), -1).flatten(-2)


class MXFP4Linear(QuantizedLinear):
    """gpt-oss's experts as its files have them: E2M1 numbers, times a power of two for every 32.

    weight [N, K/2] uint8 (the low nibble is the even input), scales [N, K/32] uint8, see
    kernels.mxfp4_values. On a GPU weight is what kernels.pack_planes returns. On a CPU there is no
    operator for it; there GroupedInt8Linear holds the same numbers exactly."""
    mode = "mxfp4"

    def __init__(self, linear: nn.Linear, group_size: int = 32) -> None:
        super().__init__(linear)
        N, K = linear.out_features, linear.in_features
        if K % group_size or group_size != 32:
            raise ValueError(f"a layer of {K} inputs in groups of {group_size} is not MXFP4")
        self.group_size = group_size
        device = linear.weight.device
        self.register_buffer("weight", torch.empty(N, K // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.empty(N, K // 32, dtype=torch.uint8, device=device))

    def take(self, rows: slice, q: Tensor, scale: Tensor, zero: Tensor, middle: int) -> None:
        """From (q - 16) * scale, where q - 16 is twice an E2M1 number and scale half the power."""
        twice = 2 * torch.tensor(kernels.E2M1[:8])
        values = q.int() - 16
        nibbles = torch.bucketize(values.abs(), twice) + 8 * (values < 0)
        self.weight[rows] = pack_nibbles(nibbles.to(torch.uint8))
        _, exponent = torch.frexp(scale)  # of mantissas from 0.5 on
        self.scales[rows] = (exponent + 127).to(torch.uint8)

    def pack(self) -> "MXFP4Linear":
        if self.weight.device.type == "cuda" and not self.packed:
            self.pack_for_gpu()
        return self

    def pack_for_gpu(self) -> None:
        self.weight = kernels.pack_planes(self.weight)
        self.packed = True

    def stored(self) -> dict[str, Tensor]:
        weight = self.weight
        if self.packed:
            weight = pack_nibbles(kernels.split_planes(weight, self.in_features))
        return {"weight": weight, "scales": self.scales}

    def dense(self, dtype: torch.dtype) -> Iterator[Tensor]:
        nibbles = unpack_nibbles(self.stored()["weight"])
        for rows in self.slices():
            yield kernels.mxfp4_values(nibbles[rows], self.scales[rows]).to(dtype)

    def few_rows(self, device: str) -> int:
        return 0  # the kernel is for stacks


class QuantizedEmbedding(nn.Module):
    """An embedding whose table is a quantized layer, perhaps that of a tied output layer."""

    def __init__(self, table: Int4Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = table
        self.dtype = dtype  # of what it gives

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.table.rows(tokens.flatten()).to(self.dtype)
        return rows.view(*tokens.shape, -1)  # (B, T, dim)


# what can be made of a model's own weights
MODES: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}
# what a saved model can consist of
LAYERS = {**MODES, "int8_grouped": GroupedInt8Linear, "mxfp4": MXFP4Linear}


def round_to_line(
    w: Tensor, scale: Tensor, zero: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The nearest q * scale + zero to w [..., group_size], q from -8 to 7, with scale and zero
    [..., 1] rounded to bfloat16 -> (q, scale, zero, squared error [..., 1])."""
    scale = scale.bfloat16().float()
    zero = zero.bfloat16().float()
    q = (w - zero).div_(scale.clamp_min(1e-30)).round_().clamp_(-8, 7)
    error = (q * scale).add_(zero).sub_(w).square_().sum(-1, keepdim=True)
    return q, scale, zero, error


def least_squares_line(w: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """scale and zero [..., 1] of the line q * scale + zero closest to w [..., group_size]."""
    mean = q.mean(-1, keepdim=True)
    covariance = ((q - mean) * w).sum(-1, keepdim=True)
    variance = (q - mean).square_().sum(-1, keepdim=True)
    scale = covariance / variance.clamp_min(1e-30)
    zero = w.mean(-1, keepdim=True) - scale * mean
    return scale, zero


def affine(
    q: Tensor, middle: int, scales: Tensor, zeros: Tensor, dtype: torch.dtype
) -> Tensor:
    """(q - middle) * scales + zeros, for q [rows, K] and scales and zeros [rows, groups]."""
    # a CPU takes three times as long in bfloat16
    compute = torch.float32 if q.device.type == "cpu" else dtype
    w = q.view(*scales.shape, -1).to(compute)  # (rows, groups, group_size)
    w.sub_(middle).mul_(scales[..., None]).add_(zeros[..., None])
    return w.flatten(1).to(dtype)


def in_larger_groups(
    q: Tensor, scales: Tensor, zeros: Tensor, middle: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Affine weights, q [rows, K] uint8 below 2 * middle, scales and zeros [rows, groups] float32,
    in fewer groups, of group_size inputs each, and in 8 bits -> (q, scales, zeros). A step of Q6_K
    in groups of 32 is about a quarter of what it was, so that this adds a sixteenth to the square
    of the error that the file has itself."""
    groups = q.shape[1] // group_size
    scales = scales.unflatten(1, (groups, -1))  # (rows, groups, old groups in each)
    zeros = zeros.unflatten(1, (groups, -1))
    ends = torch.stack((zeros, zeros + (2 * middle - 1) * scales))
    low = ends.amin((0, 3))  # (rows, groups)
    high = ends.amax((0, 3))
    steps = ((high - low) / 254).bfloat16().float()  # as stored; 254: their rounding needs room
    # the lines from the old integers to the new ones
    divisor = steps.clamp_min(1e-30)[..., None]
    scales = scales / divisor
    zeros = (zeros - low[..., None]) / divisor
    line = q.view(*scales.shape, -1).float()  # (rows, groups, old groups in each, inputs)
    line.mul_(scales[..., None]).add_(zeros[..., None]).round_()
    return line.flatten(1).to(torch.uint8), steps, low


def pack_nibbles(nibbles: Tensor) -> Tensor:
    """[N, K] -> [N, K/2], the even inputs in the low halves of the bytes. Two bytes at a time,
    which is six times as fast as taking the even and the odd ones apart."""
    pairs = nibbles.contiguous().view(torch.int16)  # low | high << 8
    return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """[N, K/2] -> [N, K]"""
    pairs = packed.to(torch.int16)
    return (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F).view(torch.uint8)


def cpu_unpack(packed: Tensor, block: int, dim: int) -> Tensor:
    """PyTorch's int4 layout for a CPU, [N, K/2] uint8 -> nibbles [N, K]: byte j of a block of rows
    holds, for each input, rows j and j + block/2 (dim -2, AVX-512 and AVX2) or rows 2j and 2j + 1
    (dim -1)."""
    K = 2 * packed.shape[1]
    tiles = packed.view(-1, K, block // 2)
    pairs = tiles.transpose(1, 2).contiguous()  # (N/block, block/2, K)
    halves = (pairs & 15, pairs >> 4)
    if dim == -2:
        return torch.cat(halves, 1).view(-1, K)
    return torch.stack(halves, 2).view(-1, K)


def cpu_pack(nibbles: Tensor, block: int, dim: int) -> Tensor:
    """nibbles [N, K] -> PyTorch's int4 layout for a CPU, as in cpu_unpack: in a fifth of the time
    of PyTorch's own conversion, and without its int32."""
    N, K = nibbles.shape
    if dim == -2:
        low, high = nibbles.view(-1, 2, block // 2, K).unbind(1)
    else:
        low, high = nibbles.view(-1, block // 2, 2, K).unbind(2)
    tiles = low | high << 4  # (N/block, block/2, K)
    return transpose_bytes(tiles).view(N, K // 2)


def transpose_bytes(x: Tensor) -> Tensor:
    """[n, R, K] uint8 -> [n, K, R], R a multiple of 4. Single bytes move slowly: four rows are
    joined into one of int32 first, which is three times as fast."""
    pairs = x.short()
    pairs = pairs[:, 0::2] | pairs[:, 1::2] << 8  # (n, R/2, K)
    fours = pairs.int() & 0xFFFF
    fours = fours[:, 0::2] | fours[:, 1::2] << 16  # (n, R/4, K)
    return fours.transpose(1, 2).contiguous().view(torch.uint8)


def cpu_unpack_rows(packed: Tensor, index: Tensor, block: int, dim: int) -> Tensor:
    """Single rows [n] of the same layout -> nibbles [n, K]."""
    K = 2 * packed.shape[1]
    tiles = packed.view(-1, K, block // 2)
    row = index % block
    if dim == -2:
        byte = row % (block // 2)
        high = row >= block // 2
    else:
        byte = row // 2
        high = row % 2 == 1
    columns = tiles[index // block, :, byte]  # (n, K)
    return torch.where(high[:, None], columns >> 4, columns & 15)


@lru_cache
def cpu_layout() -> tuple[int, int] | None:
    """(block, dim) of cpu_unpack on this CPU, None if it is none of the known ones."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(16, (64, 2), generator=generator, dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(probe, 1)
    nibbles = probe.to(torch.uint8)
    for block in (64, 32, 16):
        for dim in (-2, -1):
            if torch.equal(cpu_pack(nibbles, block, dim), packed):
                return block, dim
    return None


def rows_at_once(K: int) -> int:
    """How many rows of K inputs are repacked at a time: what a CPU's cache holds, and a multiple of
    the 64 rows that are packed together."""
    return 64 * max(1, 2**13 // K)


# --- layers in the model's own precision ---

class Linear(nn.Linear):
    """nn.Linear that a CPU runs from weights prepacked for oneDNN: measured 1.6x plain F.linear at
    batch 1 in bf16."""
    packed = False

    def pack(self) -> "Linear":
        """Prepack the weight where oneDNN multiplies its dtype on this CPU."""
        if self.weight.device.type != "cpu" or self.packed:
            return self
        if not onednn_takes(self.weight.dtype):
            return self
        weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 1)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.packed = True
        return self

    def stored(self) -> dict[str, Tensor]:
        return {"weight": self.weight.to_dense() if self.packed else self.weight}

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        if torch.compiler.is_compiling():  # it cannot look into packed weights
            return packed_linear_op(x, self.weight, self.bias)
        return packed_linear(x, self.weight, self.bias)  # spares itself an operator's dispatch


def onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def many_rows_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which many rows multiply fastest: bfloat16, by 2x, but on a CPU without
    instructions for it float32, by 3x."""
    if BF16 or device.type != "cpu":
        return torch.bfloat16
    return torch.float32


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] @ weight.T + bias with weight [N, K] in oneDNN's own blocked layout."""
    slow = x.dtype == torch.bfloat16 and many_rows_dtype(x.device) != x.dtype
    if slow and x.numel() > 256 * x.shape[-1]:
        if bias is not None:
            bias = bias.float()
        return F.linear(x.float(), weight.to_dense().float(), bias).to(x.dtype)
    one_row = x.numel() == x.shape[-1]
    if one_row and x.dtype == torch.bfloat16 and BF16 and weight.numel() >= 2**22:
        # oneDNN reads a weight 10 to 15% faster for four rows than for one
        four = x.view(1, -1).expand(4, -1).contiguous()
        y = torch.ops.mkldnn._linear_pointwise(four, weight, bias, "none", [], "")
        return y[:1].view(*x.shape[:-1], -1)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# one operator in a graph. torch.library.custom_op would do the same, with 40 us around each call
torch.library.define(
    "gpt_flash::packed_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
)
torch.library.impl("gpt_flash::packed_linear", "default", packed_linear)
packed_linear_op = torch.ops.gpt_flash.packed_linear.default


@torch.library.register_fake("gpt_flash::packed_linear")
def packed_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# --- saving and loading ---

@torch.no_grad()
def save_quantized(
    model: nn.Module, folder: str | Path, finish: Callable[[Path], None] | None = None,
) -> None:
    """Write a quantized model as a folder that load_model opens on any device: config.json, which
    says what each layer is, and model.safetensors with the layers' stored() tensors. finish(folder)
    may add files. The folder appears when all is written; ValueError if it exists already, unless
    empty."""
    folder = Path(folder)
    refuse_existing(folder)
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            layers[name] = (module.mode, module.group_size)
    if not layers:
        raise ValueError(
            "the model has no quantized layers; call quantize_model first, or load it with "
            "quantize int8 or int4"
        )
    config = {**model.config.hf, "gpt_flash": {"layers": layers}}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with workspace(folder.parent, folder.name) as tmp:
        new = tmp / folder.name
        new.mkdir()
        weights = new / "model.safetensors"
        save_file(stored_tensors(model), weights, {"format": "pt"})
        settings = new / "config.json"
        settings.write_text(json.dumps(config, indent=2), encoding="utf-8")
        shutil.copymode(settings, weights)  # safetensors hides its file from other users
        if finish is not None:
            finish(new)
        new.replace(folder)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a saved model consists of, by our names, in the CPU's memory and plain layouts."""
    tensors = {}
    for prefix, module in model.named_modules():
        if prefix == "lm_head" and model.config.tied and isinstance(module, Linear):
            continue  # the embedding
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, (Linear, QuantizedLinear)):
            own |= module.stored()
        for name, tensor in own.items():
            tensors[f"{prefix}.{name}"] = tensor.contiguous().cpu()
    return tensors


def quantized_layout(model: nn.Module, hf: dict) -> bool:
    """Put empty quantized layers where save_quantized's config.json has them -> whether hf is one.
    ValueError where they do not fit the model."""
    if "gpt_flash" not in hf:
        return False
    try:
        for name, (mode, group_size) in hf["gpt_flash"]["layers"].items():
            put_layer(model, name, mode, group_size)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        raise ValueError(
            f"the gpt_flash entry of config.json does not fit the model: {e}"
        ) from None
    return True


def put_layer(model: nn.Module, name: str, mode: str, group_size: int | None) -> nn.Module:
    """Put an empty quantized layer in the place of a Linear -> the layer. The embedding's is its
    table, embed_tokens.table, which a tied output layer shares."""
    if name != "embed_tokens.table":
        layer = LAYERS[mode](model.get_submodule(name), group_size)
        model.set_submodule(name, layer)
        return layer
    weight = model.embed_tokens.weight  # (vocab_size, dim)
    vocab_size, dim = weight.shape
    table = LAYERS[mode](Linear(dim, vocab_size, False, weight.device), group_size)
    model.embed_tokens = QuantizedEmbedding(table, weight.dtype)
    if model.config.tied and model.lm_head.out_features == vocab_size:
        model.lm_head = table
    return table


def refuse_existing(folder: Path) -> None:
    """ValueError unless the folder does not exist or is empty."""
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty:
        raise ValueError(f"{folder} exists already; remove it or choose another folder")


# --- quality ---

@torch.no_grad()
def perplexity(
    model: nn.Module, ids: list[int], context: int = 512, kv_dtype: torch.dtype | None = None,
    reference: nn.Module | None = None,
) -> float | tuple[float, float]:
    """exp of the mean negative log-likelihood of ids[1:], read in pieces of `context` tokens;
    kv_dtype as in setup_caches. With a reference model: (perplexity, mean KL divergence of the next
    token from the reference's).

    The text goes through 16 tokens a call, as in decoding, so that attention sees the cache as it
    is stored. ValueError for fewer than 2 tokens, or some outside the vocabulary."""
    vocab_size = model.config.vocab_size
    if len(ids) < 2 or min(ids) < 0 or max(ids) >= vocab_size:
        raise ValueError(
            f"perplexity takes at least 2 tokens of the {vocab_size} of the vocabulary"
        )
    model.setup_caches(1, context, kv_dtype)
    if reference is not None:
        reference.setup_caches(1, context)
    tokens = torch.tensor(ids, device=model.device)
    pieces = list(zip(tokens[:-1].split(context), tokens[1:].split(context)))
    nll = 0.0
    kl = 0.0
    for piece, targets in tqdm(pieces, "reading", disable=None, leave=False):
        for start in range(0, len(piece), 16):
            read = piece[start:start + 16]
            expected = targets[start:start + 16]
            logp = log_probabilities(model, read, start)  # (16, vocab_size)
            nll += F.nll_loss(logp, expected, reduction="sum").item()
            if reference is not None:
                theirs = log_probabilities(reference, read, start)
                kl += F.kl_div(logp, theirs, reduction="sum", log_target=True).item()
    n = len(ids) - 1
    if reference is None:
        return math.exp(nll / n)
    return math.exp(nll / n), kl / n


def log_probabilities(model: nn.Module, tokens: Tensor, start: int) -> Tensor:
    """tokens [T] at positions from start -> the model's log probabilities of the token behind each,
    [T, vocab_size] float32."""
    input_pos = torch.tensor([start], dtype=torch.int32, device=tokens.device)
    logits = model(tokens[None], input_pos)  # (1, T, vocab_size)
    return logits[0].float().log_softmax(-1)
