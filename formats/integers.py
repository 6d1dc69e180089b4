"""Integers of quantized weights as files have them, and the lines that they lie on: a weight is
q * scale + zero, with one scale and zero for each group of inputs."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantize import say_once, unpack_nibbles


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
    rows: Rows  # of the whole matrix, in this order, as are columns
    columns: Rows
    read: Callable[[Rows], Affine]  # some rows, with all columns
    group_size: int = 32  # inputs of a group that stays one: 16, 32, 64 or 128
    hold: Callable[[], Callable[[Rows], Affine]] | None = None  # -> a read that has all in memory

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

    def reordered(self, order: Tensor, dim: int = 0) -> Blocks:
        """With its rows, or columns, in another order. ValueError if that divides a group."""
        if dim == 0:
            return replace(self, rows=torch.tensor(self.rows)[order])
        if (order.view(-1, 32) // 32).diff().any():
            raise ValueError(f"inputs of {self.name} do not move in whole groups of 32")
        return replace(self, columns=order)

    def held(self) -> Blocks:
        """For reading all of it, where its rows do not lie one after the other in the file."""
        return self if self.hold is None else replace(self, read=self.hold())

    def slices(self, n: int) -> Iterator[slice]:
        """All rows, n at a time."""
        for start in range(0, len(self.rows), n):
            yield slice(start, min(start + n, len(self.rows)))

    def affine(self, rows: slice) -> Affine:
        whole = self.read(self.rows[rows])
        _, K = whole.q.shape
        parts = []
        for part in whole:
            inputs = K // part.shape[1]  # to each of its values
            if isinstance(self.columns, Tensor):
                groups = self.columns[::32] // 32
                parts.append(part.unflatten(1, (K // 32, -1))[:, groups].flatten(1))
            else:
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
    def read(rows: range) -> Affine:
        some = of[rows.start:rows.stop]
        return twice_e2m1(unpack_nibbles(packed.read(some).flatten(1)), exponents.read(some))

    return Blocks(name, "MXFP4", 5, range(len(of)), range(32 * packed.shape[1]), read)


def nvfp4_blocks(name: str, packed: Any, scales: Any, factor: float) -> Blocks:
    """packed [N, K / 2] uint8, whose byte c has input 2c in its low nibble; scales [N, K / 16] FP8,
    times a factor."""
    N, half = packed.shape
    check_shape("its scale", scales.shape, (N, half // 8))

    def read(rows: range) -> Affine:
        scale = scales.read(rows).float() * (factor / 2)
        q = TWICE_E2M1_AND_16[unpack_nibbles(packed.read(rows)).int()]
        return Affine(q, scale, -16 * scale)

    return Blocks(name, "NVFP4", 5, range(N), range(2 * half), read, 16)
