"""How GGUF files store quantized weights: in blocks, whose layouts are those of llama.cpp's
ggml-common.h."""
from __future__ import annotations

from collections.abc import Callable

import gguf
import torch
from gguf import GGMLQuantizationType as GGML
from torch import Tensor

from formats.checkpoint import InFile
from formats.integers import Affine, Blocks, Rows, twice_e2m1
from model import first_line


# --- the types: blocks [n, bytes of a block] uint8 -> q [n, block], scale and zero [n, groups] ---

def of_32(blocks: Tensor) -> Affine:
    """half d, then half m where there is one, then 32 integers: q * d + m, or q * d where q is
    signed. They are bytes, or nibbles, behind the fifth bits if there are some."""
    _, nbytes = blocks.shape
    bits = (nbytes - 2) // 4
    has_minimum = nbytes == 4 * bits + 4
    d = half(blocks, 0)
    zero = half(blocks, 2) if has_minimum else -2 ** (bits - 1) * d
    integers = blocks[:, -4 * bits:]
    if bits == 8:
        return Affine(integers ^ 128, d, zero)
    q = pieces(integers[:, -16:], 4).flatten(1)
    if bits == 5:
        q = q | pieces(integers[:, :4], 1).mT.flatten(1) << 4
    return Affine(q, d, zero)


def of_256(blocks: Tensor) -> Affine:
    """half d, half m, 8 scales and minima of 6 bits, 256 integers: q * d * scale - m * minimum.

    The first four scales and minima have a byte of their own, of which the upper two bits belong to
    the last four; those keep their low nibbles in 4 more bytes. Of 5 bits, bit j of byte i before
    the nibbles is of input i in group j."""
    scale, minimum, low = blocks[:, 4:16].split(4, dim=1)  # (n, 4) each
    last_scale = low & 15 | scale >> 2 & 48
    last_minimum = low >> 4 | minimum >> 2 & 48
    scales = torch.cat((scale & 63, last_scale), 1)
    minima = torch.cat((minimum & 63, last_minimum), 1)
    q = pieces(blocks[:, -128:].view(-1, 4, 32), 4).view(-1, 8, 32)
    fifth = blocks[:, 16:-128]  # (n, 32), or none
    if fifth.numel():
        q = q | pieces(fifth, 1) << 4
    return Affine(q.flatten(1), half(blocks, 0) * scales.float(), -half(blocks, 2) * minima.float())


def q6_k(blocks: Tensor) -> Affine:
    """256 low nibbles, 256 upper pairs of bits, 16 signed scales, half d: (q - 32) * d * scale."""
    low = pieces(blocks[:, :128].view(-1, 2, 64), 4)  # (n, 2, 2, 64)
    upper = pieces(blocks[:, 128:192].view(-1, 2, 32), 2)  # (n, 2, 4, 32)
    q = low.view(-1, 2, 4, 32) | upper << 4
    scale = half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()  # (n, 16)
    return Affine(q.flatten(1), scale, -32 * scale)


def q2_k(blocks: Tensor) -> Affine:
    """16 scales in low nibbles, under 16 minima, 256 pairs of bits, half d, half m."""
    scale, minimum = pieces(blocks[:, :16], 4).float().unbind(1)  # (n, 16) each
    q = pieces(blocks[:, 16:80].view(-1, 2, 32), 2)  # (n, 2, 4, 32)
    return Affine(q.flatten(1), half(blocks, 80) * scale, -half(blocks, 82) * minimum)


def q3_k(blocks: Tensor) -> Affine:
    """256 third bits, 256 lower pairs of bits, 16 scales of 6 bits, half d: (q - 4) * d * (scale -
    32). Low nibbles of the scales come first, then their upper pairs of bits."""
    low, third = blocks[:, 32:96].view(-1, 2, 32), blocks[:, :32]
    q = pieces(low, 2).view(-1, 8, 32) | pieces(third, 1) << 2
    scale = pieces(blocks[:, 96:104], 4).flatten(1) | pieces(blocks[:, 104:108], 2).flatten(1) << 4
    scale = half(blocks, 108) * (scale.float() - 32)
    return Affine(q.flatten(1), scale, -4 * scale)


def iq4(blocks: Tensor) -> Affine:
    """half d, then 32 nibbles, which are places in a table; or 256 of them behind 8 scales of 6
    bits, d * (scale - 32), whose upper pairs of bits come before their low nibbles."""
    scale = half(blocks, 0)
    if blocks.shape[1] > 18:
        upper = pieces(blocks[:, 2:4], 2).mT.flatten(1)
        low = pieces(blocks[:, 4:8], 4).mT.flatten(1)
        scale = scale * ((low | upper << 4).float() - 32)
    nibbles = pieces(blocks[:, -16 * scale.shape[1]:].unflatten(1, (-1, 16)), 4)
    q = IQ4[nibbles.int()].view(len(blocks), -1)
    return Affine(q, scale, -128 * scale)


def pieces(packed: Tensor, bits: int) -> Tensor:
    """[..., n] bytes, n even -> [..., 8 / bits, n]: the lowest bits of each, then the next. Two
    bytes at a time, which is four times as fast; a copy, as parts may begin anywhere."""
    pairs = packed.clone(memory_format=torch.contiguous_format).view(torch.int16)
    mask = 0x0101 * (2**bits - 1)
    shifted = [pairs >> i & mask for i in range(0, 8, bits)]
    return torch.stack(shifted, -2).view(torch.uint8)


def mxfp4(blocks: Tensor) -> Affine:
    """A byte e, then 32 nibbles: E2M1 numbers times 2 ** (e - 127)."""
    return twice_e2m1(pieces(blocks[:, 1:], 4).flatten(1), blocks[:, :1])


def half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at a byte of each block, [n, 1] float32."""
    return blocks[:, start:start + 2].contiguous().view(torch.float16).float()


IQ4 = torch.tensor(gguf.quants.IQ4_NL.kvalues).add(128).to(torch.uint8)
# by type: bits of an integer, inputs of a group, and what unpacks blocks
TYPES: dict[GGML, tuple[int, int, Callable[[Tensor], Affine]]] = {
    GGML.Q2_K: (2, 16, q2_k),
    GGML.Q3_K: (3, 16, q3_k),
    **dict.fromkeys((GGML.Q4_0, GGML.Q4_1), (4, 32, of_32)),
    **dict.fromkeys((GGML.Q5_0, GGML.Q5_1), (5, 32, of_32)),
    GGML.Q8_0: (8, 32, of_32),
    GGML.Q4_K: (4, 32, of_256),
    GGML.Q5_K: (5, 32, of_256),
    GGML.Q6_K: (6, 16, q6_k),
    **dict.fromkeys((GGML.IQ4_NL, GGML.IQ4_XS), (8, 32, iq4)),
    GGML.MXFP4: (5, 32, mxfp4),
}
FLOATS = (GGML.F32, GGML.F16, GGML.BF16, GGML.F64)


# --- a tensor of a file, by rows ---

def dequantized(stored: InFile) -> Tensor:
    """All of a tensor of a GGUF file in float32."""
    try:
        return torch.from_numpy(gguf.dequantize(stored.read().numpy(), stored.dtype))
    except Exception as e:  # a type that gguf only knows by name
        raise ValueError(f"cannot read tensor {stored.name}: {first_line(e)}") from None


def file_blocks(stored: InFile) -> Blocks:
    """A quantized matrix of a GGUF file."""
    N, K = stored.shape
    bits, group_size, unpack = TYPES.get(stored.dtype, (None, 32, None))
    _, block_bytes = gguf.GGML_QUANT_SIZES[stored.dtype]

    def read(rows: Rows) -> Affine:
        parts = unpack(stored.read(rows).view(-1, block_bytes))
        return Affine(*(part.view(len(rows), -1) for part in parts))

    return Blocks(stored.name, stored.dtype.name, bits, range(N), range(K), read, group_size)
