"""MXFP4: E2M1 numbers in nibbles, times a power of two for every 32. And what all quantized
tensors of files give: integers and the lines that they lie on."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Affine(NamedTuple):
    """Rows of a weight as they are stored: q * scale + zero in float32, without any rounding but
    that of the sum."""

    q: Tensor  # [rows, K] uint8
    scale: Tensor  # [rows, K / group_size] float32
    zero: Tensor  # [rows, K / group_size] float32


class Kind(NamedTuple):
    """A type of stored weight."""

    bits: int  # of an integer
    group_size: int  # inputs to a scale


def twice_e2m1(nibbles: Tensor, exponents: Tensor) -> Affine:
    """nibbles [n, K] and exponents [n, K / 32] of MXFP4."""
    scale = torch.ldexp(torch.ones(exponents.shape), exponents.int() - 128)
    return Affine(TWICE_E2M1_AND_16[nibbles.int()], scale, -16 * scale)


TWICE_E2M1 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])
TWICE_E2M1_AND_16 = (TWICE_E2M1 + 16).to(torch.uint8)


@dataclass
class MXFP4Blocks:
    """The same of a matrix whose nibbles and exponents are two tensors, as gpt-oss's files have
    them."""

    packed: Tensor  # [N, K / 32, 16] uint8; byte c has input 2c in its low nibble, 2c + 1 above
    exponents: Tensor  # [N, K / 32] uint8

    type_name = "MXFP4"
    kind = Kind(5, 32)

    @property
    def shape(self) -> tuple[int, int]:
        N, groups, _ = self.packed.shape
        return N, 32 * groups

    def slices(self, n: int) -> Iterator[slice]:
        """All rows, n at a time."""
        for start in range(0, len(self.packed), n):
            yield slice(start, min(start + n, len(self.packed)))

    def narrow(self, dim: int, start: int, length: int) -> MXFP4Blocks:
        """A part of it, as of a tensor. ValueError if that cuts a group of inputs in two."""
        if dim == 1:
            if start % 32 or length % 32:
                raise ValueError(
                    f"{length} inputs, a part of {self.shape[1]}, do not divide into MXFP4's "
                    "groups of 32: take fewer ranks"
                )
            start //= 32
            length //= 32
        return MXFP4Blocks(
            self.packed.narrow(dim, start, length), self.exponents.narrow(dim, start, length)
        )

    def affine(self, rows: slice) -> Affine:
        packed = self.packed[rows]
        nibbles = torch.stack((packed & 15, packed >> 4), -1)  # (rows, K / 32, 16, 2)
        return twice_e2m1(nibbles.flatten(1), self.exponents[rows])
