"""How GGUF files store quantized weights: in blocks, whose layouts are those of llama.cpp's
ggml-common.h."""
from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GGML
from torch import Tensor

from formats.checkpoint import InFile
from formats.integers import Affine, Blocks, twice_e2m1
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
    q = planes(integers[:, -16:])
    if bits == 5:
        q = q | fifth_bits(integers[:, :4])
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
    d = half(blocks, 0)
    m = half(blocks, 2)
    q = planes(blocks[:, -128:].view(-1, 4, 32)).view(-1, 8, 32)
    fifth = blocks[:, None, 16:-128]  # (n, 1, 32), or none
    if fifth.numel():
        group = torch.arange(8, dtype=torch.uint8)[:, None]
        q = q | (fifth >> group & 1) << 4
    return Affine(q.flatten(1), d * scales.float(), -m * minima.float())


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
    """A byte e, then 32 nibbles: E2M1 numbers times 2 ** (e - 127)."""
    return twice_e2m1(planes(blocks[:, 1:]), blocks[:, :1])


def half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at a byte of each block, [n, 1] float32."""
    return blocks[:, start:start + 2].contiguous().view(torch.float16).float()


LOW_NIBBLES = 0x0F0F_0F0F_0F0F_0F0F


def planes(packed: Tensor) -> Tensor:
    """[..., n] bytes -> [..., 2n]: their low nibbles, then their high ones. Eight at a time: n is a
    multiple of 8."""
    words = aligned_copy(packed).view(torch.int64)  # (..., n / 8)
    low = words & LOW_NIBBLES
    high = words >> 4 & LOW_NIBBLES
    return torch.cat((low, high), -1).view(torch.uint8)


def aligned_copy(x: Tensor) -> Tensor:
    """What is contiguous already, such as a part of a single block, may begin anywhere."""
    return x.clone(memory_format=torch.contiguous_format)


def fifth_bits(packed: Tensor) -> Tensor:
    """[n, 4] bytes -> [n, 32]: their bits, the lowest first, as 0 or 16."""
    bits = aligned_copy(packed).view(torch.int32)  # (n, 1)
    fifth = bits >> torch.arange(32, dtype=torch.int32) & 1  # (n, 32)
    return fifth.to(torch.uint8) << 4


# by type: bits of an integer, and what unpacks blocks
TYPES: dict[GGML, tuple[int, Callable[[Tensor], Affine]]] = {
    GGML.Q4_0: (4, of_32),
    GGML.Q4_1: (4, of_32),
    GGML.Q5_0: (5, of_32),
    GGML.Q5_1: (5, of_32),
    GGML.Q8_0: (8, of_32),
    GGML.Q4_K: (4, of_256),
    GGML.Q5_K: (5, of_256),
    GGML.Q6_K: (6, q6_k),
    GGML.MXFP4: (5, mxfp4),
}
FLOATS = (GGML.F32, GGML.F16, GGML.BF16, GGML.F64)


# --- a tensor of a file, by rows ---

def dequantized(stored: InFile) -> Tensor:
    """All of a tensor of a GGUF file in float32."""
    try:
        return torch.from_numpy(gguf.dequantize(stored.read().numpy(), stored.dtype))
    except Exception as e:  # a type that gguf only knows by name
        raise ValueError(f"cannot read tensor {stored.name}: {first_line(e)}") from None


def file_blocks(stored: InFile, order: Tensor | None) -> Blocks:
    """A quantized matrix of a GGUF file. order [N]: the file's row of each, None: as they lie."""
    N, K = stored.shape
    bits, unpack = TYPES.get(stored.dtype, (None, None))
    _, block_bytes = gguf.GGML_QUANT_SIZES[stored.dtype]

    def read(rows: range) -> Affine:
        parts = unpack(read_rows(stored, order, rows).view(-1, block_bytes))
        return Affine(*(part.view(len(rows), -1) for part in parts))

    return Blocks(stored.name, stored.dtype.name, bits, range(N), range(K), read)


def read_rows(stored: InFile, order: Tensor | None, rows: range) -> Tensor:
    """The bytes of some rows, [rows, bytes of a row]."""
    wanted = np.array(rows)
    if order is not None:
        wanted = order.numpy()[wanted]
    # the rows that they lie among: where heads are interleaved, a few more
    first = int(wanted.min())
    data = stored.read(range(first, int(wanted.max()) + 1))
    return data if order is None else data[wanted - first]
