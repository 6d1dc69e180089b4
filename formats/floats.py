"""Weights that a folder has in FP8 or bitsandbytes' layouts: small numbers times scales.

They are dequantized while loading. On SmolLM2-135M, 8 bits in groups of 32 would add 0.0021 to
0.0030 to the mean KL from the dequantized model, and weights in bfloat16 add 0.0001 to 0.0002."""
from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from formats.integers import check_shape, nvfp4_blocks, read


@dataclass
class Floats:
    """Such a matrix in a file, or a stack of them: to a checkpoint a tensor of plain numbers, read
    when it is asked for."""

    weight: Any  # an InFile of formats/checkpoint.py, or a tensor
    shape: tuple[int, ...]  # [N, K], or [E, N, K]
    scales: Any  # as weight: [N / n, K / k], rounded up, or [E, ...]; a dimension of 1 may lack
    block: tuple[int, int]  # n and k
    pairs: Tensor | None = None  # [256, 2]: what a byte stands for
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        *stack, N, K = self.shape
        n, k = self.block
        each = (*stack, -(-N // n), -(-K // k))
        check_shape("its scale", self.scales.shape, each[:len(self.scales.shape)])

    def __getitem__(self, i: int) -> Floats:
        """One of those that are stacked."""
        return replace(self, weight=self.weight[i], shape=self.shape[1:], scales=self.scales[i])

    def read(self) -> Tensor:
        (N, K), (n, k) = self.shape, self.block
        stored, scales = read(self.weight), read(self.scales).float().view(-(-N // n), -(-K // k))
        w = stored.float() if self.pairs is None else self.pairs[stored.int()].flatten(1)
        size = math.gcd(K, k)  # of a group
        groups = scales.repeat_interleave(n, 0)[:N].repeat_interleave(k // size, 1)[:, :K // size]
        w.unflatten(1, (-1, size)).mul_(groups[..., None])
        return w.to(self.dtype)


def read_floats(name: str, weight: Any, tensors: dict[str, Any], settings: dict[str, Any]) -> Any:
    """A weight with what is beside it, which is taken out of tensors; plain numbers as they are.

    bitsandbytes' int8 is times SCB / 127 for each row. FP8 is times NAME_scale, or NAME_scale_inv,
    which is no inverse: one, one for each row or one for each block. NVFP4, which stays, is times
    an FP8 for 16 inputs and NAME_scale_2, or over NAME_global_scale."""
    if f"{name}.quant_map" in tensors:
        return four_bits(name, weight, tensors)
    if weight.dtype == torch.int8:
        scales = read(tensors.pop(f"{name.removesuffix('weight')}SCB")) / 127
        return Floats(weight, weight.shape, scales, (1, weight.shape[1]))
    if weight.dtype == torch.uint8:
        divisor = tensors.pop(f"{name}_global_scale", None)
        factor = read(tensors.pop(f"{name}_scale_2")) if divisor is None else 1 / read(divisor)
        return nvfp4_blocks(name, weight, tensors.pop(f"{name}_scale"), factor.item())
    if weight.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return weight
    *stack, N, K = weight.shape
    scales = tensors.pop(f"{name}_scale" + "_inv" * (f"{name}_scale_inv" in tensors))
    rows, *columns = (*scales.shape[len(stack):], 1)[:2]
    block = settings.get("weight_block_size") or (128, 128)
    if rows in (1, N) and columns in ([], [1]):
        block = N // rows, K
    return Floats(weight, weight.shape, scales, block)


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
