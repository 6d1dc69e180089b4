"""Products of a CPU: PyTorch's operators for int8 and int4 weights, oneDNN's for float ones.

Importing it puts a layout for each into quantize.LAYOUTS."""
from __future__ import annotations

import math
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cpu.packed import Order, can_pack, packed_of
from quantize import (
    BF16, BLOCK, CHUNK_ROWS, LAYOUTS, Int4Linear, Int8Linear, Linear, QuantizedLinear,
    many_rows_dtype, pack_nibbles, unpack_nibbles,
)


class Int8OnCPU:
    """Takes Int8Linear's tensors as they are. For a step of many rows, dequantizing is a third
    faster, so that what a row gets depends on whether there are more than 24."""

    few_rows, block = 24, 1

    def pack(self, layer: Int8Linear) -> bool:
        return layer.in_features % 16 == 0  # the operator reads 16 inputs at a time, unasked

    def product(self, layer: Int8Linear, x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), layer.weight, layer.scales)
        return y if x.dtype == y.dtype else exact_likeliest(layer, x, y)


class Int4OnCPU:
    """In an Order: weight in the operator's layout, see untile, N a multiple of 64, and lines, the
    scales with the zeros beside them, [K/group_size, N, 2].

    The operator sums each row in one order, however many there are, and oneDNN those of blocks.
    With few_rows = 128 and block = 1 many short prompts are read together a third faster, and what
    one gets depends on which are."""

    few_rows, block = 0, BLOCK
    names = ("weight", "scales", "zeros")
    tiling: tuple[int, int] | None = None  # asked for while packing, where nothing is compiled

    def pack(self, layer: Int4Linear) -> bool:
        self.tiling = tiling()
        if self.tiling is None or not can_pack(layer, self.names):
            return False
        N = layer.out_features
        weight, scales, zeros = layer.weight, layer.scales, layer.zeros
        if N % 64 > 0:  # rows of zeros
            weight, scales, zeros = [F.pad(x, (0, 0, 0, -N % 64)) for x in (weight, scales, zeros)]
        elif layer.layout is not None:  # an interrupt leaves it whole; a new layer is lost with it
            weight = weight.clone()
        # in place, and by as many rows as a CPU's cache holds, of which 64 are packed together
        for part in weight.split(64 * max(1, 2**13 // layer.in_features)):
            part.copy_(tile(unpack_nibbles(part), *self.tiling))
        tensors = {"weight": weight, "lines": torch.stack((scales.t(), zeros.t()), -1)}
        layer.order = Order(layer, self.names, tensors, partial(self.shown, N))
        return True

    def shown(self, N: int, packed: dict[str, Tensor], name: str) -> Tensor:
        """A tensor of the layer as it was."""
        if name == "weight":
            parts = packed[name].split(CHUNK_ROWS)
            return torch.cat([pack_nibbles(untile(part, *self.tiling)) for part in parts])[:N]
        return packed["lines"][:, :N, self.names.index(name) - 1].t().contiguous()

    def plain(self, layer: Int4Linear, rows: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nibbles, scales and zeros of some rows; a slice begins at a multiple of 64."""
        packed = packed_of(layer)
        if packed is None:
            return unpack_nibbles(layer.weight[rows]), layer.scales[rows], layer.zeros[rows]
        if isinstance(rows, Tensor):
            nibbles = untile_rows(packed["weight"], rows, *self.tiling)
        else:
            whole = slice(rows.start, 64 * math.ceil(rows.stop / 64))
            nibbles = untile(packed["weight"][whole], *self.tiling)[:rows.stop - rows.start]
        scales, zeros = packed["lines"][:, rows].transpose(0, 1).unbind(-1)
        return nibbles, scales, zeros

    def product(self, layer: Int4Linear, x: Tensor) -> Tensor:
        packed = packed_of(layer)
        if packed is None:
            return torch.cat([F.linear(x, weight) for weight in layer.dense(x.dtype)], -1)
        inputs = layer.for_nibbles(x.bfloat16()) if layer.nibbles == 2 else x.bfloat16()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            inputs, packed["weight"], layer.group_size * layer.nibbles, packed["lines"]
        )
        if y.shape[1] > layer.out_features:  # rows that fill 64
            y = y[:, :layer.out_features].contiguous()
        return y if x.dtype == y.dtype else exact_likeliest(layer, x, y)


def exact_likeliest(layer: QuantizedLinear, x: Tensor, y: Tensor) -> Tensor:
    """Logits y [rows, N] that an operator gave in bfloat16 for x [rows, K] -> what they are in
    float32: the likeliest 32 of each row to the last digit, and so in their order. The others move
    by the mean of what these moved, which is most of what x lost."""
    logits = y.float()
    for x, y in zip(x.split(64), logits.split(64)):
        ranked = y if layer.bias is None else y + layer.bias
        likeliest = ranked.topk(min(32, y.shape[1])).indices  # (rows, 32)
        weights = layer.values(likeliest.flatten(), torch.float32).view(*likeliest.shape, -1)
        exact = weights.mul_(x[:, None]).sum(-1)  # of each row by itself
        moved = exact - y.gather(1, likeliest)
        y.add_(moved.mean(1, keepdim=True)).scatter_(1, likeliest, exact)
    return logits


class OneDNN:
    """A float weight in oneDNN's own blocks: measured 1.6x plain F.linear at batch 1 in bf16."""

    names = ("weight",)

    def pack(self, layer: Linear) -> bool:
        if not can_pack(layer, self.names) or not onednn_takes(layer.weight.dtype):
            return False
        packed = {"weight": torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 1)}
        layer.order = Order(layer, self.names, packed, lambda packed, name: packed[name].to_dense())
        return True

    def product(self, layer: Linear, x: Tensor) -> Tensor:
        packed, bias = packed_of(layer), layer._parameters.get("bias")
        if packed is None:
            return F.linear(x, layer.weight, layer.bias)
        weight = packed["weight"]
        if x.dtype != weight.dtype:  # under autocast
            x = x.to(weight.dtype)
        if torch.compiler.is_compiling():  # it cannot look into packed weights
            return packed_linear_op(x, weight, bias)
        return packed_linear(x, weight, bias)  # spares an operator's dispatch


LAYOUTS |= {
    ("float", "cpu"): OneDNN(),
    ("int8", "cpu"): Int8OnCPU(),
    ("int4", "cpu"): Int4OnCPU(),
    ("int8_grouped", "cpu"): Int4OnCPU(),  # bytes are two nibbles each
}

# --- PyTorch's layout of int4 weights ---


def untile(packed: Tensor, block: int, dim: int) -> Tensor:
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


def tile(nibbles: Tensor, block: int, dim: int) -> Tensor:
    """nibbles [N, K] -> PyTorch's int4 layout for a CPU, as in untile: in a fifth of the time
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


def untile_rows(packed: Tensor, index: Tensor, block: int, dim: int) -> Tensor:
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
def tiling() -> tuple[int, int] | None:
    """(block, dim) of untile on this CPU, None if it is none of the known ones."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(16, (64, 2), generator=generator, dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(probe, 1)
    nibbles = probe.to(torch.uint8)
    for block in (64, 32, 16):
        for dim in (-2, -1):
            if torch.equal(tile(nibbles, block, dim), packed):
                return block, dim
    return None

# --- oneDNN ---


def onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] @ weight.T + bias with weight [N, K] in oneDNN's own blocked layout."""
    slow = x.dtype == torch.bfloat16 and many_rows_dtype(x.device) != x.dtype
    if slow and x.numel() > 256 * x.shape[-1]:
        if bias is not None:
            bias = bias.float()
        return F.linear(x.float(), weight.to_dense().float(), bias).to(x.dtype)
    one_row = x.numel() == x.shape[-1]
    if one_row and (x.dtype == torch.float32 or BF16 and weight.numel() >= 2**22):
        # oneDNN reads a weight 10 to 15% faster for four rows than for one, and sums those of
        # float32 as it does any larger number
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
