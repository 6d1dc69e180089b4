"""How GGUF files store quantized weights: blocks of integers, and the line that they lie on.

Every type here is affine: a weight is q * scale + zero, with one scale and zero for each group of
inputs. The layouts are those of llama.cpp's ggml-common.h."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GGML
from torch import Tensor

from formats.mxfp4 import Affine, Kind, twice_e2m1


# --- the types: blocks [n, bytes of a block] uint8 -> q [n, block], scale and zero [n, groups] ---

def q4_0(blocks: Tensor) -> Affine:
    """half d, then 32 nibbles: (q - 8) * d."""
    d = half(blocks, 0)
    return Affine(planes(blocks[:, 2:]), d, -8 * d)


def q4_1(blocks: Tensor) -> Affine:
    """half d, half m, then 32 nibbles: q * d + m."""
    return Affine(planes(blocks[:, 4:]), half(blocks, 0), half(blocks, 2))


def q5_0(blocks: Tensor) -> Affine:
    """half d, the 32 fifth bits, 32 nibbles: (q - 16) * d."""
    d = half(blocks, 0)
    return Affine(planes(blocks[:, 6:]) | fifth_bits(blocks[:, 2:6]), d, -16 * d)


def q5_1(blocks: Tensor) -> Affine:
    """half d, half m, the 32 fifth bits, 32 nibbles: q * d + m."""
    q = planes(blocks[:, 8:]) | fifth_bits(blocks[:, 4:8])
    return Affine(q, half(blocks, 0), half(blocks, 2))


def q8_0(blocks: Tensor) -> Affine:
    """half d, then 32 signed bytes."""
    d = half(blocks, 0)
    return Affine(blocks[:, 2:] ^ 128, d, -128 * d)


def q4_k(blocks: Tensor) -> Affine:
    """half d, half m, 8 scales and minima in 12 bytes, 256 nibbles: q * d * scale - m * minimum."""
    scale, zero = lines_of_k(blocks)
    q = planes(blocks[:, 16:].view(-1, 4, 32))
    return Affine(q.flatten(1), scale, zero)


def q5_k(blocks: Tensor) -> Affine:
    """As q4_k, with 32 bytes of fifth bits before the nibbles: bit j of byte i is of input i in
    group j."""
    scale, zero = lines_of_k(blocks)
    low = planes(blocks[:, 48:].view(-1, 4, 32))
    group = torch.arange(8, dtype=torch.uint8)[:, None]
    fifth = blocks[:, None, 16:48] >> group & 1  # (n, 8, 32)
    q = low.view(-1, 8, 32) | fifth << 4
    return Affine(q.flatten(1), scale, zero)


def q6_k(blocks: Tensor) -> Affine:
    """256 low nibbles, 256 upper pairs of bits, 16 signed scales, half d: (q - 32) * d * scale."""
    low = planes(blocks[:, :128].view(-1, 2, 64))  # (n, 2, 128)
    shift = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    upper = blocks[:, 128:192].view(-1, 2, 1, 32) >> shift & 3  # (n, 2, 4, 32)
    q = low.view(-1, 2, 4, 32) | upper << 4
    signed = blocks[:, 192:208].view(torch.int8)
    scale = half(blocks, 208) * signed.float()  # (n, 16)
    return Affine(q.flatten(1), scale, -32 * scale)


def mxfp4(blocks: Tensor) -> Affine:
    """A byte e, then 32 nibbles: E2M1 numbers times 2 ** (e - 127). Twice an E2M1 number is an
    integer."""
    return twice_e2m1(planes(blocks[:, 1:]), blocks[:, :1])


def half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at a byte of each block, [n, 1] float32."""
    return blocks[:, start:start + 2].contiguous().view(torch.float16).float()


def planes(packed: Tensor) -> Tensor:
    """[..., n] bytes -> [..., 2n]: their low nibbles, then their high ones. Eight at a time: n is a
    multiple of 8."""
    words = aligned_copy(packed).view(torch.int64)  # (..., n / 8)
    low = words & LOW_NIBBLES
    high = words >> 4 & LOW_NIBBLES
    return torch.cat((low, high), -1).view(torch.uint8)


LOW_NIBBLES = 0x0F0F_0F0F_0F0F_0F0F


def aligned_copy(x: Tensor) -> Tensor:
    """What is contiguous already, such as a part of a single block, may begin anywhere."""
    return x.clone(memory_format=torch.contiguous_format)


def fifth_bits(packed: Tensor) -> Tensor:
    """[n, 4] bytes -> [n, 32]: their bits, the lowest first, as 0 or 16."""
    bits = aligned_copy(packed).view(torch.int32)  # (n, 1)
    fifth = bits >> torch.arange(32, dtype=torch.int32) & 1  # (n, 32)
    return fifth.to(torch.uint8) << 4


def lines_of_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The first 16 bytes of a K-quant's block -> scale and zero of its 8 groups, [n, 8] each.

    Behind two halves lie scales and minima of 6 bits: the first four have a byte of their own, of
    which the upper two bits belong to the last four; those keep their low nibbles in the last 4
    bytes."""
    scale, minimum, low = blocks[:, 4:16].split(4, dim=1)  # (n, 4) each
    last_scale = low & 15 | scale >> 2 & 48
    last_minimum = low >> 4 | minimum >> 2 & 48
    scales = torch.cat((scale & 63, last_scale), 1)
    minima = torch.cat((minimum & 63, last_minimum), 1)
    d = half(blocks, 0)
    m = half(blocks, 2)
    return d * scales.float(), -m * minima.float()


# by type: bits of an integer and inputs to a scale, and what unpacks a block
KINDS = {
    GGML.Q4_0: (Kind(4, 32), q4_0),
    GGML.Q4_1: (Kind(4, 32), q4_1),
    GGML.Q5_0: (Kind(5, 32), q5_0),
    GGML.Q5_1: (Kind(5, 32), q5_1),
    GGML.Q8_0: (Kind(8, 32), q8_0),
    GGML.Q4_K: (Kind(4, 32), q4_k),
    GGML.Q5_K: (Kind(5, 32), q5_k),
    GGML.Q6_K: (Kind(6, 16), q6_k),
    GGML.MXFP4: (Kind(5, 32), mxfp4),
}
FLOATS = (GGML.F32, GGML.F16, GGML.BF16, GGML.F64)


# --- a tensor of a file, by rows ---

@dataclass
class Blocks:
    """A quantized matrix of a GGUF file. Its rows are read when they are asked for, not mapped, so
    that a file takes no memory beside the layers made from it."""

    path: Path
    stored: gguf.ReaderTensor
    order: Tensor | None  # [N] the file's row of each row, None: as they lie
    # which part of it this is, None: all
    rows: range | None = None
    columns: range | None = None

    def __post_init__(self) -> None:
        K, N = self.stored.shape.tolist()
        self.rows = self.rows or range(N)
        self.columns = self.columns or range(K)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)

    def narrow(self, dim: int, start: int, length: int) -> Blocks:
        """A part of it, as of a tensor. ValueError if that cuts a group of inputs in two."""
        if dim == 0:
            return replace(self, rows=self.rows[start:start + length])
        group_size = max(32, self.kind.group_size)  # layers have no smaller ones
        if start % group_size or length % group_size:
            raise ValueError(
                f"{length} inputs, a part of {len(self.columns)}, do not divide into the groups of "
                f"{group_size} of {self.stored.name}: take fewer ranks"
            )
        return replace(self, columns=self.columns[start:start + length])

    @property
    def type_name(self) -> str:
        return self.stored.tensor_type.name

    @property
    def kind(self) -> Kind | None:
        """None for a type that only gguf can read."""
        kind, _ = KINDS.get(self.stored.tensor_type, (None, None))
        return kind

    def slices(self, n: int) -> Iterator[slice]:
        """All rows, n at a time."""
        N, _ = self.shape
        for start in range(0, N, n):
            yield slice(start, min(start + n, N))

    def affine(self, rows: slice) -> Affine:
        """Some rows, of a tensor that has a kind."""
        data = torch.from_numpy(self.read(self.rows[rows]))  # (rows, bytes of a row)
        _, block_bytes = gguf.GGML_QUANT_SIZES[self.stored.tensor_type]
        _, unpack = KINDS[self.stored.tensor_type]
        parts = []
        for part in unpack(data.view(-1, block_bytes)):
            part = part.view(len(data), -1)  # (rows, inputs), or (rows, groups)
            inputs = self.stored.shape[0] // part.shape[1]  # to each of its values
            columns = self.columns
            parts.append(part[:, columns.start // inputs:columns.stop // inputs])
        return Affine(*parts)

    def read(self, rows: range) -> np.ndarray:
        """The bytes of some rows, [rows, bytes of a row]."""
        _, row_bytes = self.stored.data.shape
        order = np.array(rows)
        if self.order is not None:
            order = self.order.numpy()[order]
        # the rows that they lie among: where heads are interleaved, a few more
        first = order.min()
        n = order.max() + 1 - first
        offset = int(self.stored.data_offset + first * row_bytes)
        data = np.fromfile(self.path, np.uint8, int(n * row_bytes), offset=offset)
        data = data.reshape(n, row_bytes)
        return data if self.order is None else data[order - first]
