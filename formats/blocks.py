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


# --- fields of n blocks by name, [n, ...] -> q [n, block], scale and zero [n, groups] ---

Fields = dict[str, Tensor]


def q8_0(x: Fields) -> Affine:
    return Affine(x["signed"] ^ 128, x["d"], -128 * x["d"])


def of_32(x: Fields) -> Affine:
    """q * d + m, or without an m (q - 8) * d, (q - 16) * d of 5 bits."""
    q, middle = pieces(x["low"], 4).flatten(1), 8
    if "fifth" in x:
        q, middle = q | pieces(x["fifth"], 1).mT.flatten(1) << 4, 16
    return Affine(q, x["d"], x["m"] if "m" in x else -middle * x["d"])


def of_256(x: Fields) -> Affine:
    """q * d * scale - m * minimum, for 8 scales and minima of 6 bits: the first four have a byte of
    their own, of which the upper two bits belong to the last four, whose low nibbles are behind.
    Bit j of byte i of fifth is of input i in group j."""
    scale, minimum, low = x["scales"].unbind(1)  # (n, 4) each
    scales = torch.cat((scale & 63, low & 15 | scale >> 2 & 48), 1)
    minima = torch.cat((minimum & 63, low >> 4 | minimum >> 2 & 48), 1)
    q = pieces(x["low"], 4).view(-1, 8, 32)
    if "fifth" in x:
        q = q | pieces(x["fifth"], 1) << 4
    return Affine(q.flatten(1), x["d"] * scales.float(), -x["m"] * minima.float())


def q6_k(x: Fields) -> Affine:
    """(q - 32) * d * scale."""
    low = pieces(x["low"], 4).view(-1, 2, 4, 32)
    q = low | pieces(x["upper"], 2) << 4
    scale = x["d"] * x["scales"].float()  # (n, 16)
    return Affine(q.flatten(1), scale, -32 * scale)


def q2_k(x: Fields) -> Affine:
    """q * d * scale - m * minimum; minima are above the scales."""
    scale, minimum = pieces(x["scales"], 4).float().unbind(1)  # (n, 16) each
    return Affine(pieces(x["q"], 2).flatten(1), x["d"] * scale, -x["m"] * minimum)


def q3_k(x: Fields) -> Affine:
    """(q - 4) * d * (scale - 32), for scales of 6 bits."""
    q = pieces(x["low"], 2).view(-1, 8, 32) | pieces(x["third"], 1) << 2
    scale = pieces(x["scales"], 4).flatten(1) | pieces(x["upper"], 2).flatten(1) << 4
    scale = x["d"] * (scale.float() - 32)
    return Affine(q.flatten(1), scale, -4 * scale)


def iq4(x: Fields) -> Affine:
    """Places in a table, times d, or times d * (scale - 32), for scales of 6 bits."""
    scale = x["d"]
    if "scales" in x:
        low, upper = pieces(x["scales"], 4), pieces(x["upper"], 2)
        scale = scale * ((low.mT.flatten(1) | upper.mT.flatten(1) << 4).float() - 32)
    q = IQ4[pieces(x["places"], 4).int()].flatten(1)
    return Affine(q, scale, -128 * scale)


def mxfp4(x: Fields) -> Affine:
    """E2M1 numbers times 2 ** (e - 127)."""
    return twice_e2m1(pieces(x["q"], 4).flatten(1), x["e"])


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
TYPES: dict[GGML, tuple[int, int, Callable[[Fields], Affine], str, str]] = {
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
    GGML.IQ4_NL: (8, 32, iq4, "d places", "(1,)f2, 16u1"),
    GGML.IQ4_XS: (8, 32, iq4, "d upper scales places", "(1,)f2, 2u1, 4u1, (8, 16)u1"),
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
    layout = layout_of(kind)
    blocks = data.numpy().view(layout)[:, 0]
    fields = {name: torch.from_numpy(blocks[name]) for name in layout.names}
    return affine({name: x.float() if name in "dm" else x for name, x in fields.items()})


def file_blocks(stored: InFile) -> Blocks:
    """A quantized matrix of a GGUF file."""
    N, K = stored.shape
    bits, group_size, *_ = TYPES.get(stored.dtype, (None, 32))
    _, block_bytes = gguf.GGML_QUANT_SIZES[stored.dtype]

    def read(rows: Rows) -> Affine:
        parts = unpack(stored.dtype, stored.read(rows).view(-1, block_bytes))
        return Affine(*(part.view(len(rows), -1) for part in parts))

    return Blocks(stored.name, stored.dtype.name, bits, range(N), range(K), read, group_size)
