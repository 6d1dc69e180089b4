"""Integers of quantized weights as files have them, and layers that hold these as they are.

Integers lie on lines: a weight is q * scale + zero, with one scale and zero for each group of
inputs."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

import quantize
from quantize import (
    MODES, Int4Linear, Linear, QuantizedLinear, affine, pack_nibbles, say_once, unpack_nibbles,
)


class Affine(NamedTuple):
    """Rows of a weight, without any rounding but that of the sum."""

    q: Tensor  # [rows, K] uint8
    scale: Tensor  # [rows, K / group_size] float32
    zero: Tensor  # [rows, K / group_size] float32


Rows = range | Tensor  # which rows of a matrix


@dataclass
class Blocks:
    """A quantized matrix of a file, or a part of one. Its rows are read when they are asked for."""

    name: str  # of the tensor
    kind: str  # how the file stores it
    bits: int | None  # of an integer, None: integers cannot be read
    rows: Rows  # of the whole matrix
    columns: range
    read: Callable[[Rows], Affine]  # some rows, with all columns
    group_size: int = 32  # inputs of a group that stays one: 16, 32, 64 or 128
    is_whole: bool = False  # whether reading some rows takes as long as all

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)

    def narrow(self, dim: int, start: int, length: int) -> Blocks:
        """A part of it, as of a tensor. ValueError if that cuts a group of inputs in two."""
        if dim == 0:
            return replace(self, rows=self.rows[start:start + length])
        if start % 32 or length % 32:  # groups of 16 are two at least
            raise ValueError(f"{length} inputs, a part of {len(self.columns)}, do not divide into "
                             f"the groups of 32 of {self.name}: take fewer ranks")
        group_size = math.gcd(self.group_size, start, length)
        return replace(self, columns=self.columns[start:start + length], group_size=group_size)

    def reordered(self, dim: int, order: Tensor) -> Blocks:
        """With its rows, or inputs, in another order. ValueError if that cuts a group in two."""
        if dim == 0:
            return replace(self, rows=torch.as_tensor(self.rows)[order])
        groups = order.view(-1, 32) // 32
        if groups.diff().any():
            raise ValueError(f"inputs of {self.name} do not move in whole groups of 32")

        def read(rows: Rows) -> Affine:
            parts = (part.unflatten(1, (len(groups), -1)) for part in self.read(rows))
            return Affine(*(part[:, groups[:, 0]].flatten(1) for part in parts))

        return replace(self, read=read)

    def slices(self, n: int) -> Iterator[tuple[slice, Affine]]:
        """All rows, n at a time."""
        N = len(self.rows)
        whole = self.affine(slice(0, N)) if self.is_whole else None
        for start in range(0, N, n):
            rows = slice(start, min(start + n, N))
            yield rows, Affine(*(x[rows] for x in whole)) if whole else self.affine(rows)

    def affine(self, rows: slice) -> Affine:
        whole = self.read(self.rows[rows])
        _, K = whole.q.shape
        parts = []
        for part in whole:
            inputs = K // part.shape[1]  # to each of its values
            parts.append(part[:, self.columns.start // inputs:self.columns.stop // inputs])
        return Affine(*parts)


def check_shape(name: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> None:
    stored = tuple(stored)  # a tensor's is torch.Size
    if stored != shape:
        raise ValueError(f"tensor {name} has shape {stored}, expected {shape}")


def say_dequantized(kinds: str, nbytes: int) -> None:
    if nbytes:
        say_once(f"{kinds} weights are dequantized, as no quantized layer holds them: "
                 f"{nbytes / 1e6:,.1f} MB in bfloat16, or less by --quantize int8 or int4")


def read(tensor: Any) -> Tensor:
    """All of a tensor of a file, of which some kinds are in memory already."""
    return tensor if isinstance(tensor, Tensor) else tensor.read()


# --- E2M1 numbers in nibbles: MXFP4, times a power of two for every 32, and NVFP4 ---

TWICE_E2M1 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])
TWICE_E2M1_AND_16 = (TWICE_E2M1 + 16).to(torch.uint8)


def twice_e2m1(nibbles: Tensor, exponents: Tensor) -> Affine:
    """nibbles [n, K] and exponents [n, K / 32] of MXFP4."""
    scale = torch.ldexp(torch.ones(exponents.shape), exponents.int() - 128)
    return Affine(TWICE_E2M1_AND_16[nibbles.int()], scale, -16 * scale)


def mxfp4_blocks(name: str, packed: Any, exponents: Any, of: range) -> Blocks:
    """As gpt-oss's files have them, of tensors in a file these rows: packed [N, K / 32, 16] uint8,
    whose byte c has input 2c in its low nibble and 2c + 1 above; exponents [N, K / 32] uint8."""
    check_shape(name, packed.shape, (*exponents.shape, 16))

    def read(rows: Rows) -> Affine:
        return twice_e2m1(unpack_nibbles(packed.read(rows).flatten(1)), exponents.read(rows))

    return Blocks(name, "MXFP4", 5, of, range(32 * packed.shape[1]), read)

# --- layers ---


class FileInt4Linear(Int4Linear):
    """An Int4Linear that is filled from a file's integers: of its own, w = (n - MIDDLE) * scale +
    TIMES * zero."""

    MIDDLE = 8
    TIMES = 1

    def take(self, rows: slice, q: Tensor, scale: Tensor, zero: Tensor, middle: int) -> None:
        """From q * scale + zero, q [rows, K] uint8, scale and zero [rows, K/group_size] float32:
        only the rounding of scales and zeros is lost. middle: half of q's range; that is where our
        zeros are taken, since they are small there, and so is their rounding."""
        # the middle of q comes to MIDDLE, if all of q + shift is in range
        largest_q = 2 * middle - 1
        shift = min(self.MIDDLE - middle, 16**self.nibbles - 1 - largest_q)
        integers = q + shift
        self.weight[rows] = pack_nibbles(integers) if self.nibbles == 1 else integers
        self.scales[rows] = scale
        self.zeros[rows] = (zero + (self.MIDDLE - shift) * scale) / self.TIMES


class AffineInt8Linear(FileInt4Linear):
    """8-bit weights in affine groups, of 16 or 32 for what a file has with 5 to 8 bits.

    No operator of PyTorch takes int8 in groups. But a byte is two nibbles, and so K such weights
    are 2K of int4's: byte b = 16 * high + low is high times 16 x plus low times x. It is also as
    fast as the operator for int8 with a scale per channel.

    weight [N, K] uint8; scales, zeros [N, K/group_size] bfloat16; in a layout for a device as int4
    is, with 2K inputs in groups of 2 * group_size."""

    mode = "int8_grouped"
    nibbles = 2
    # int4's operator has (nibble - 8) * scale + zero of both nibbles, the high one 16 times
    TIMES = 16 + 1
    MIDDLE = 8 * TIMES

    def values(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        nibbles, scales, zeros = self.plain(rows)
        zeros = self.TIMES * zeros.float()
        return affine(pack_nibbles(nibbles), self.MIDDLE, scales, zeros, dtype)

    def for_nibbles(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., 2K], what the low and the high nibbles of a weight are multiplied
        by."""
        return torch.stack((x, 16 * x), -1).flatten(-2)


class MXFP4Linear(QuantizedLinear):
    """gpt-oss's experts as its files have them: E2M1 numbers, times a power of two for every 32.

    weight [N, K/2] uint8 (the low nibble is the even input), scales [N, K/32] uint8: a nibble's
    number times 2 ** (scale - 127). A CPU has no operator for it; there AffineInt8Linear holds the
    same numbers exactly."""

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
        values = q.int() - 16
        nibbles = torch.bucketize(values.abs(), TWICE_E2M1[:8]) + 8 * (values < 0)
        self.weight[rows] = pack_nibbles(nibbles.to(torch.uint8))
        _, exponent = torch.frexp(scale)  # of mantissas from 0.5 on
        self.scales[rows] = (exponent + 127).to(torch.uint8)

    def plain(self, rows: slice) -> Tensor:
        """Nibbles [rows, K]."""
        if self.layout is not None:
            return self.layout.plain(self, rows)
        return unpack_nibbles(self.weight[rows])

    def stored(self) -> dict[str, Tensor]:
        nibbles = torch.cat([self.plain(rows) for rows in self.slices()])
        return {"weight": pack_nibbles(nibbles), "scales": self.scales}

    def values(self, rows: slice, dtype: torch.dtype) -> Tensor:
        doubles = TWICE_E2M1.float().to(self.scales.device)
        exponents = self.scales[rows, :, None].int() - 128  # (rows, K / 32, 1)
        groups = doubles[self.plain(rows).int()].unflatten(1, (-1, 32))
        return torch.ldexp(groups, exponents).flatten(1).to(dtype)


class QuantizedEmbedding(nn.Module):
    """An embedding whose table is a quantized layer, perhaps that of a tied output layer."""

    def __init__(self, table: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = table
        self.dtype = dtype  # of what it gives

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedEmbedding:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return super()._apply(fn, recurse)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.table.values(tokens.flatten(), torch.float32).to(self.dtype)
        return rows.view(*tokens.shape, -1)  # (B, T, dim)


# what a file's integers are put into, and a saved model can consist of
FORMS = {**MODES, "int4": FileInt4Linear, "int8_grouped": AffineInt8Linear, "mxfp4": MXFP4Linear}
TABLE = ".table"  # behind an embedding's name: that of a QuantizedEmbedding


def put(model: nn.Module, name: str, mode: str, group_size: int | None) -> None:
    """quantize.put_layer with all FORMS, also for an embedding's table; a tied output layer shares
    that of tokens."""
    if name.endswith(TABLE):
        prefix = name.removesuffix(TABLE)
        weight = model.get_submodule(prefix).weight
        vocab_size, dim = weight.shape
        dense = Linear(dim, vocab_size, False, weight.device)
        model.set_submodule(prefix, QuantizedEmbedding(dense, weight.dtype))
    layer = FORMS[mode](model.get_submodule(name), group_size)
    model.set_submodule(name, layer)
    if model.config.tied and name == f"embed_tokens{TABLE}":
        model.lm_head = layer


# --- filling them ---

def fill_layers(
    model: nn.Module, stored: dict[str, list[Blocks]], device: torch.device | str
) -> Callable[[], None]:
    """Put empty quantized layers where a file has integers -> what fills them. stored: by the name
    of a layer, what it consists of, part below part.

    A joined layer takes a form that holds all of its parts. Types that no form holds are said, and
    dequantized."""
    kept, lost = {}, {}
    for name, parts in stored.items():
        if any(part.bits is None for part in parts):
            lost |= {part.name: part for part in parts}
            continue
        if isinstance(model.get_submodule(name), nn.Embedding):
            name += TABLE
        put(model, name, *form_for(parts, device))
        kept[name] = parts
    kinds = sorted({part.kind for part in lost.values() if part.bits is None})
    say_dequantized(", ".join(kinds), sum(2 * math.prod(part.shape) for part in lost.values()))

    def fill_one(name: str) -> None:
        repack(model.get_submodule(name), name, kept[name], device)

    def fill() -> None:
        """Each thread has a layer of its own: the steps are so small that an operator's threads
        would mostly wait for each other."""
        n = torch.get_num_threads()
        with ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            for _ in quantize.progress(threads.map(fill_one, kept), "loading", len(kept)):
                pass
        torch.set_num_threads(n)  # the default of threads to come

    return fill


def form_for(parts: list[Blocks], device: torch.device | str) -> tuple[str, int]:
    """The smallest quantized layer for the integers of all parts, and its groups. It holds them as
    they are."""
    if torch.device(device).type == "cuda" and {part.kind for part in parts} == {"MXFP4"}:
        return "mxfp4", 32  # no operator of a CPU takes it
    group_size = math.gcd(*(part.group_size for part in parts))
    if group_size >= 32 and all(part.bits <= 4 for part in parts):
        return "int4", group_size
    return "int8_grouped", min(group_size, 64)  # operators have 128 nibbles in a group at most


def repack(layer: Int4Linear, prefix: str, parts: list[Blocks], device: torch.device | str) -> None:
    """The integers of a file, part below part, some rows at a time."""
    for name, meta in list(layer.named_buffers()):
        setattr(layer, name, torch.empty(meta.shape, dtype=meta.dtype, device=device))
    at_once = 64 * max(1, 2**13 // layer.in_features)  # rows that a CPU's cache holds
    first = 0
    first_inputs = torch.arange(0, layer.in_features, layer.group_size)
    for part in parts:
        for rows, (q, scale, zero) in part.slices(at_once):
            ours = slice(first + rows.start, first + rows.stop)
            group = first_inputs // (layer.in_features // scale.shape[1])  # of the file's, for ours
            layer.take(ours, q, scale[:, group], zero[:, group], middle=2 ** (part.bits - 1))
        first += part.shape[0]
    for name, tensor in layer.named_buffers():
        if tensor.is_floating_point() and not all(map(torch.isfinite, tensor.aminmax())):
            raise ValueError(f"tensor {prefix}.{name} has numbers that are not finite: the file is "
                             "damaged")
    layer.pack()
