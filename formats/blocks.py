"""How GGUF files store quantized weights: in blocks, whose layouts are those of llama.cpp's
ggml-common.h. TYPES has them."""
from __future__ import annotations

from collections.abc import Callable
from functools import cache

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GGML
from torch import Tensor

from formats.checkpoint import InFile
from formats.integers import Affine, Blocks, Rows, twice_e2m1
from model import first_line


# --- the fields of n blocks, [n, ...] each -> q [n, block], scale and zero [n, groups] ---

def q8_0(d: Tensor, signed: Tensor) -> Affine:
    return Affine(signed ^ 128, d, -128 * d)


def of_32(
    d: Tensor, low: Tensor, m: Tensor | None = None, fifth: Tensor | None = None
) -> Affine:
    """q * d + m, or without an m (q - 8) * d, (q - 16) * d of 5 bits."""
    q = pieces(low, 4).flatten(1)
    middle = 8
    if fifth is not None:
        q = q | pieces(fifth, 1).mT.flatten(1) << 4
        middle = 16
    return Affine(q, d, -middle * d if m is None else m)


def of_256(
    d: Tensor, m: Tensor, scales: Tensor, low: Tensor, fifth: Tensor | None = None
) -> Affine:
    """q * d * scale - m * minimum, for 8 scales and minima of 6 bits: the first four have a byte of
    their own, of which the upper two bits belong to the last four, whose low nibbles are behind.
    Bit j of byte i of fifth is of input i in group j."""
    first, second, last = scales.unbind(1)  # (n, 4) each
    scale = torch.cat((first & 63, last & 15 | first >> 2 & 48), 1)
    minimum = torch.cat((second & 63, last >> 4 | second >> 2 & 48), 1)
    q = pieces(low, 4).view(-1, 8, 32)
    if fifth is not None:
        q = q | pieces(fifth, 1) << 4
    return Affine(q.flatten(1), d * scale.float(), -m * minimum.float())


def q6_k(low: Tensor, upper: Tensor, scales: Tensor, d: Tensor) -> Affine:
    """(q - 32) * d * scale."""
    q = pieces(low, 4).view(-1, 2, 4, 32) | pieces(upper, 2) << 4
    scale = d * scales.float()  # (n, 16)
    return Affine(q.flatten(1), scale, -32 * scale)


def q2_k(scales: Tensor, q: Tensor, d: Tensor, m: Tensor) -> Affine:
    """q * d * scale - m * minimum; minima are above the scales."""
    scale, minimum = pieces(scales, 4).float().unbind(1)  # (n, 16) each
    return Affine(pieces(q, 2).flatten(1), d * scale, -m * minimum)


def q3_k(third: Tensor, low: Tensor, scales: Tensor, upper: Tensor, d: Tensor) -> Affine:
    """(q - 4) * d * (scale - 32), for scales of 6 bits."""
    q = pieces(low, 2).view(-1, 8, 32) | pieces(third, 1) << 2
    scale = pieces(scales, 4).flatten(1) | pieces(upper, 2).flatten(1) << 4
    scale = d * (scale.float() - 32)
    return Affine(q.flatten(1), scale, -4 * scale)


def iq4_nl(d: Tensor, places: Tensor) -> Affine:
    """Places in a table, times d."""
    return Affine(IQ4[pieces(places, 4).int()].flatten(1), d, -128 * d)


def iq4_xs(d: Tensor, upper: Tensor, scales: Tensor, places: Tensor) -> Affine:
    """The same times d * (scale - 32), for scales of 6 bits."""
    scale = pieces(scales, 4).mT.flatten(1) | pieces(upper, 2).mT.flatten(1) << 4
    return iq4_nl(d * (scale.float() - 32), places)


def mxfp4(e: Tensor, q: Tensor) -> Affine:
    """E2M1 numbers times 2 ** (e - 127)."""
    return twice_e2m1(pieces(q, 4).flatten(1), e)


def pieces(packed: Tensor, bits: int) -> Tensor:
    """[..., n] bytes, n even -> [..., 8 / bits, n]: the lowest bits of each, then the next. Two
    bytes at a time, which is four times as fast; a copy, as parts may begin anywhere."""
    pairs = packed.clone(memory_format=torch.contiguous_format).view(torch.int16)
    mask = 0x0101 * (2**bits - 1)
    shifted = [pairs >> i & mask for i in range(0, 8, bits)]
    return torch.stack(shifted, -2).view(torch.uint8)


IQ4 = torch.tensor(gguf.quants.IQ4_NL.kvalues).add(128).to(torch.uint8)
# by type: bits of an integer, inputs of a group, what unpacks the fields of a block, their names in
# order, and what they are
TYPES: dict[GGML, tuple[int, int, Callable[..., Affine], str, str]] = {
    GGML.Q4_0: (4, 32, of_32, "d low", "(1,)f2, 16u1"),
    GGML.Q4_1: (4, 32, of_32, "d m low", "(1,)f2, (1,)f2, 16u1"),
    GGML.Q5_0: (5, 32, of_32, "d fifth low", "(1,)f2, 4u1, 16u1"),
    GGML.Q5_1: (5, 32, of_32, "d m fifth low", "(1,)f2, (1,)f2, 4u1, 16u1"),
    GGML.Q8_0: (8, 32, q8_0, "d signed", "(1,)f2, 32u1"),
    GGML.Q2_K: (2, 16, q2_k, "scales q d m", "16u1, (2, 32)u1, (1,)f2, (1,)f2"),
    GGML.Q3_K: (3, 16, q3_k, "third low scales upper d", "32u1, (2, 32)u1, 8u1, 4u1, (1,)f2"),
    GGML.Q4_K: (4, 32, of_256, "d m scales low", "(1,)f2, (1,)f2, (3, 4)u1, (4, 32)u1"),
    GGML.Q5_K: (5, 32, of_256, "d m scales fifth low",
                "(1,)f2, (1,)f2, (3, 4)u1, 32u1, (4, 32)u1"),
    GGML.Q6_K: (6, 16, q6_k, "low upper scales d", "(2, 64)u1, (2, 32)u1, 16i1, (1,)f2"),
    GGML.IQ4_NL: (8, 32, iq4_nl, "d places", "(1,)f2, 16u1"),
    GGML.IQ4_XS: (8, 32, iq4_xs, "d upper scales places", "(1,)f2, 2u1, 4u1, (8, 16)u1"),
    GGML.MXFP4: (5, 32, mxfp4, "e q", "(1,)u1, 16u1"),
}
FLOATS = (GGML.F32, GGML.F16, GGML.BF16, GGML.F64)


# --- a tensor of a file, by rows ---

def dequantized(stored: InFile) -> Tensor:
    """All of a tensor of a GGUF file in float32."""
    try:
        return torch.from_numpy(gguf.dequantize(stored.read().numpy(), stored.dtype))
    except Exception as e:  # a type that gguf only knows by name
        raise ValueError(f"cannot read tensor {stored.name}: {first_line(e)}") from None


@cache
def layout_of(kind: GGML) -> np.dtype:
    *_, names, formats = TYPES[kind]
    layout = np.dtype(formats)
    layout.names = names.split()
    return layout


def unpack(kind: GGML, data: Tensor) -> Affine:
    """Whole blocks [n, bytes of one]."""
    _, _, affine, *_ = TYPES[kind]
    blocks = data.numpy().view(layout_of(kind))[:, 0]
    fields = {name: torch.from_numpy(blocks[name]) for name in blocks.dtype.names}
    for name in fields.keys() & {"d", "m"}:  # halves
        fields[name] = fields[name].float()
    return affine(**fields)


def file_blocks(stored: InFile) -> Blocks:
    """A quantized matrix of a GGUF file."""
    N, K = stored.shape
    bits, group_size, *_ = TYPES.get(stored.dtype, (None, 32))
    _, block_bytes = gguf.GGML_QUANT_SIZES[stored.dtype]

    def read(rows: Rows) -> Affine:
        parts = unpack(stored.dtype, stored.read(rows).view(-1, block_bytes))
        return Affine(*(part.view(len(rows), -1) for part in parts))

    return Blocks(stored.name, stored.dtype.name, bits, range(N), range(K), read, group_size)
