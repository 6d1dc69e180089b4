"""Weights that a folder has in FP8, NVFP4 or bitsandbytes' layouts: small numbers times scales.

They are dequantized while loading. On SmolLM2-135M, 8 bits in groups of 32 would add 0.0021 to
0.0030 to the mean KL from the dequantized model, and weights in bfloat16 add 0.0001 to 0.0002."""
from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from formats.integers import TWICE_E2M1, Blocks, check_shape, mxfp4_blocks, read

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass
class Floats:
    """Such a matrix in a file, or a stack of them: to a checkpoint a tensor of plain numbers, read
    when it is asked for."""

    weight: Any  # an InFile of formats/checkpoint.py, or a tensor
    shape: tuple[int, ...]  # [N, K], or [E, N, K]
    scales: Any  # as weight: [N / n, K / k], rounded up, or [E, ...]; a dimension of 1 may lack
    block: tuple[int, int]  # n and k
    pairs: Tensor | None = None  # [256, 2]: what a byte stands for
    factor: Tensor = torch.ones(1)  # of all numbers, or [E]
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        *stack, N, K = self.shape
        n, k = self.block
        each = (*stack, -(-N // n), -(-K // k))
        check_shape("its scale", self.scales.shape, each[:len(self.scales.shape)])

    def __getitem__(self, i: int) -> Floats:
        """One of those that are stacked."""
        factor = self.factor[i:i + 1] if len(self.factor) > 1 else self.factor
        return replace(self, weight=self.weight[i], shape=self.shape[1:], scales=self.scales[i],
                       factor=factor)

    def read(self) -> Tensor:
        (N, K), (n, k) = self.shape, self.block
        stored, scales = read(self.weight), read(self.scales)
        if scales.dtype == torch.uint8:  # powers of two
            scales = torch.ldexp(torch.ones(scales.shape), scales.int() - 127)
        scales = scales.float().view(-(-N // n), -(-K // k)) * self.factor
        w = stored.float() if self.pairs is None else self.pairs[stored.int()].flatten(1)
        size = math.gcd(K, k)  # of a group
        groups = scales.repeat_interleave(n, 0)[:N].repeat_interleave(k // size, 1)[:, :K // size]
        w.unflatten(1, (-1, size)).mul_(groups[..., None])
        return w.to(self.dtype)


def read_floats(name: str, weight: Any, tensors: dict[str, Any], settings: dict[str, Any]) -> Any:
    """A weight with what is beside it, which is taken out of tensors; plain numbers as they are.

    bitsandbytes' int8 is times SCB / 127 for each row. FP8 is times NAME_scale, or NAME_scale_inv,
    which is no inverse: one, one for each row or one for each block, or for 32 inputs a byte, which
    is a power of two."""
    if f"{name}.quant_map" in tensors:
        return four_bits(name, weight, tensors)
    if weight.dtype == torch.int8:
        scales = read(tensors.pop(f"{name.removesuffix('weight')}SCB")) / 127
        return Floats(weight, weight.shape, scales, (1, weight.shape[1]))
    if weight.dtype not in (torch.uint8, *FP8):
        return weight
    scales = tensors.pop(f"{name}_scale" + "_inv" * (f"{name}_scale_inv" in tensors))
    if weight.dtype == torch.uint8:
        return fp4(name, weight, scales, tensors)
    *stack, N, K = weight.shape
    rows, *columns = (*scales.shape[len(stack):], 1)[:2]
    if rows in (1, N) and columns in ([], [1]):
        block = N // rows, K
    elif scales.dtype == torch.uint8:
        block = 1, 32
    else:
        block = settings.get("weight_block_size") or (128, 128)
    return Floats(weight, weight.shape, scales, block)


def fp4(name: str, weight: Any, scales: Any, tensors: dict[str, Any]) -> Floats | Blocks:
    """E2M1 numbers, the even input in the low nibble. NVFP4: times an FP8 for 16 inputs and
    NAME_scale_2, or over NAME_global_scale. MXFP4 stays: its scales are bytes, for 32 inputs."""
    *stack, N, half = weight.shape
    if scales.dtype == torch.uint8:
        check_shape("its scale", scales.shape, (N, half // 16))
        groups = replace(weight, shape=(N, half // 16, 16), row_bytes=16)
        return mxfp4_blocks(name, groups, scales, range(N))
    divisor = tensors.pop(f"{name}_global_scale", None)
    factor = read(tensors.pop(f"{name}_scale_2")) if divisor is None else 1 / read(divisor)
    if factor.numel() > 1:
        check_shape("its second scale", factor.shape, tuple(stack))
    pairs = torch.cartesian_prod(TWICE_E2M1 / 2, TWICE_E2M1 / 2).flip(1)
    return Floats(weight, (*stack, N, 2 * half), scales, (1, 16), pairs, factor.float().view(-1))


def four_bits(name: str, weight: Any, tensors: dict[str, Any]) -> Floats:
    """bitsandbytes': places in a table, the first of two in the high nibble, times absmax for a
    block of them. absmax may be nested: places in another table, times scales, plus an offset."""
    def take(end: str) -> Tensor:
        return read(tensors.pop(f"{name}.{end}"))

    kind = "fp4" if f"{name}.quant_state.bitsandbytes__fp4" in tensors else "nf4"
    state = json.loads(bytes(take(f"quant_state.bitsandbytes__{kind}").tolist()))
    (N, K), block = state["shape"], state["blocksize"]
    table, scales = take("quant_map"), take("absmax")
    if "nested_offset" in state:
        inner = take("nested_absmax").repeat_interleave(state["nested_blocksize"])
        scales = take("nested_quant_map")[scales.int()] * inner[:len(scales)]
        scales += state["nested_offset"]
    check_shape(name, weight.shape, (N * K // 2, 1))
    check_shape("quant_map", table.shape, (16,))
    rows = replace(weight, shape=(N, K // 2), row_bytes=K // 2)
    pairs = torch.cartesian_prod(table, table)
    return Floats(rows, (N, K), scales.view(N, -1), (1, block), pairs)
