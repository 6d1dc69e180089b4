"""Products of a CPU: PyTorch's operators for int8 and int4 weights, oneDNN's for float ones.

Importing it puts a layout for each into quantize.LAYOUTS.

Weights lie in the order of an operator, and everybody else sees them as they were: a layer's tensor
whose values are in an Order stays the same object, of the class Packed. Whatever looks at it brings
its values back first, and the layer is plain until the next text begins."""
from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any
from weakref import ref

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._C import _disabled_torch_function_impl
from torch.utils._pytree import tree_leaves

from quantize import (
    BF16, BLOCK, CHUNK_ROWS, LAYOUTS, PLAIN, Int4Linear, Int8Linear, Linear, QuantizedLinear,
    many_rows_dtype, pack_nibbles, unpack_nibbles,
)


class Int8OnCPU:
    """Takes Int8Linear's tensors as they are. For a step of many rows, dequantizing is a third
    faster, so that what a row gets depends on whether there are more than 24; but not of a head,
    which int4 models have too."""

    few_rows, block, exact_heads = 24, 1, True

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

    few_rows, block, exact_heads = 0, BLOCK, True
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
        dtype = layer.weight.dtype
        takes = dtype == torch.float32
        if dtype == torch.bfloat16:
            takes = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        available = torch.backends.mkldnn.is_available()
        if not (available and takes and can_pack(layer, self.names)):
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

# --- tensors whose values an operator has ---


# what may be asked of a tensor whose values are elsewhere
METADATA = {
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.is_meta.__get__,
    Tensor.ndim.__get__, Tensor.nbytes.__get__, Tensor.itemsize.__get__, Tensor.element_size,
    Tensor.requires_grad.__get__, Tensor.is_floating_point, Tensor.dim, Tensor.size, Tensor.numel,
    Tensor.__len__,  # loading asks for it
}


class Order:
    """The values of a layer's tensors of these names for an operator, which gives the memory of
    those free. plain(tensors, name): one as it was. A copy of a layer has none, and is plain."""

    @torch.inference_mode(False)
    def __init__(
        self, layer: nn.Module, names: tuple[str, ...], tensors: dict[str, Tensor],
        plain: Callable[[dict[str, Tensor], str], Tensor],
    ):
        self.layer, self.names, self.plain = ref(layer), names, plain
        self.shared = layer.shared  # an embedding reads the tensor all the time
        self.tensors = {name: nn.Parameter(x, False) for name, x in tensors.items()}
        for name in names:
            x = (layer._parameters | layer._buffers)[name]
            x.order, x.key, x.kind = self, name, type(x)
            x.__class__ = Packed
            if not layer.shared:
                nothing = torch.zeros((), dtype=x.dtype, device="cpu").expand(x.shape)
                unseen(Tensor.data.__set__, x, nothing)
        PLAIN.discard(layer)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


class Packed(Tensor):
    """A tensor whose values are in an Order until somebody looks."""

    order: Order
    key: str  # in its layer
    kind: type  # what it was

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        looked_at = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Packed)]
        if func in METADATA or func is F.embedding and looked_at[0].order.shared:
            return unseen(func, *args, **kwargs)
        for x in looked_at:
            x.unpack()
        return func(*args, **kwargs)

    @torch.inference_mode(False)
    @torch.no_grad()
    def unpack(self) -> None:
        """An interrupt anywhere leaves it to the next look: a layer without an order is plain."""
        layer = self.order.layer()
        if layer is not None:
            be_plain(layer)
        unseen(Tensor.data.__set__, self, self.order.plain(self.order.tensors, self.key))
        self.__class__ = self.kind
        del self.order, self.key, self.kind

    def __deepcopy__(self, memo: dict) -> Tensor:
        self.unpack()
        return copy.deepcopy(self, memo)

    @property
    def _is_param(self) -> bool:  # what isinstance(x, nn.Parameter) asks for
        return self.kind is nn.Parameter


def unseen(func: Callable, *args: Any, **kwargs: Any) -> Any:
    """What a function does to tensors, Packed or not; no interrupt leaves that switched off."""
    return _disabled_torch_function_impl(func, (Tensor,), args, kwargs)


def be_plain(layer: nn.Module) -> None:
    """A layer decodes with what it shows, from now on until the next text."""
    if layer.layout is not None:
        PLAIN.add(layer)
    layer.order = None


def can_pack(layer: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether nobody else has a view of a layer's tensors, or wants gradients."""
    for name in names:
        x = (layer._parameters | layer._buffers).get(name)
        if type(x) not in (Tensor, nn.Parameter, Packed) or x.requires_grad:
            return False
        n_users = torch._C._storage_Use_Count(x.untyped_storage()._cdata)
        if n_users > 2 or x.is_inference() or not x.is_cpu:  # 2: the tensor, and who asks
            return False
    return True


def packed_of(layer: nn.Module) -> dict[str, Tensor] | None:
    """The tensors that a layer's operator reads; None: the layer's own, where others were put in
    the place of those, are plain from now on. While compiling, nobody looks at them."""
    order = layer.order
    if torch.compiler.is_compiling():
        return None if order is None else order.tensors
    tensors = layer._parameters | layer._buffers
    for name in () if order is None else order.names:
        if getattr(tensors.get(name), "order", None) is not order:
            order = None
    if order is None:
        be_plain(layer)
        return None
    return order.tensors

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
