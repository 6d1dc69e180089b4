"""Products of a GPU for the layers of quantize.py: linear.py has the kernels and no import of ours.

Importing it puts a layout for each kind of layer into quantize.LAYOUTS."""
from __future__ import annotations

import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import kernels
from products import linear
from quantize import LAYOUTS, Int4Linear, Int8Linear


class Int8OnGPU:
    """Takes Int8Linear's tensors as they are."""

    few_rows, block, exact_heads = sys.maxsize, 1, False  # the operator dequantizes for many

    def pack(self, layer: Int8Linear) -> bool:
        return True

    def product(self, layer: Int8Linear, x: Tensor) -> Tensor:
        widens = layer.in_features <= layer.out_features
        if len(x) == 1 and torch.compiler.is_compiling() and widens:
            # a launch less a layer: Inductor fuses one row with the norm before it. It spends 4 to
            # 7 instructions on a byte where our kernel spends 1: which is faster is to be measured.
            # Not in down_proj, where every program would compute the activation anew, at 10 to 31;
            # and more rows it would multiply after writing the whole weight in bfloat16
            return F.linear(x, layer.weight.to(x.dtype)) * layer.scales
        return linear.int8_linear(x, layer.weight, layer.scales)


class Int4OnGPU:
    """weight and scales are what linear.pack_int4 returns, the zeros again with the scales."""

    few_rows, block, exact_heads = sys.maxsize, 1, False

    def pack(self, layer: Int4Linear) -> bool:
        layer.weight, layer.scales = linear.pack_int4(layer.weight, layer.scales, layer.zeros)
        layer.zeros = None
        return True

    def plain(self, layer: Int4Linear, rows: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs = layer.nibbles * layer.in_features
        return linear.unpack_int4(layer.weight[rows], layer.scales[:, rows], inputs)

    def product(self, layer: Int4Linear, x: Tensor) -> Tensor:
        if layer.nibbles == 2:
            if len(x) > linear.MOST_ROWS // 2:  # the kernel has twice the work
                K = layer.in_features
                return F.linear(x, linear.dense_weight(layer.weight, layer.scales, K, x.dtype, 2))
            x = layer.for_nibbles(x)
        return linear.packed_int4_linear(x, layer.weight, layer.scales)


class MXFP4OnGPU:
    """weight is what linear.pack_planes returns; the kernel is for stacks of experts."""

    few_rows, block, exact_heads = 0, 1, False

    def pack(self, layer: nn.Module) -> bool:
        layer.weight = linear.pack_planes(layer.weight)
        return True

    def plain(self, layer: nn.Module, rows: slice | Tensor) -> Tensor:
        """Nibbles [rows, K]."""
        return linear.split_planes(layer.weight[rows], layer.in_features)


class ExpertsOnGPU:
    """The products of a stack of weights with what the experts of each token read."""

    def product(self, layer: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
        if hasattr(layer[0], "for_nibbles"):
            x = layer[0].for_nibbles(x)
        return linear.experts_linear(x, ids, layer.weight, getattr(layer, "scales", None))

    def dense(self, layer: nn.Module) -> Tensor:
        """All weights [n_expert, N, K] in bfloat16, or as they are if they are not quantized."""
        if not hasattr(layer, "scales"):
            return layer.weight
        nibbles = getattr(layer[0], "nibbles", 1)
        K = layer[0].in_features
        return linear.dense_weight(layer.weight, layer.scales, K, torch.bfloat16, nibbles)


linear.counters = kernels._counters  # zeros that are kept
LAYOUTS |= {
    ("int8", "cuda"): Int8OnGPU(),
    ("int4", "cuda"): Int4OnGPU(),
    ("int8_grouped", "cuda"): Int4OnGPU(),  # bytes are two nibbles each
    ("mxfp4", "cuda"): MXFP4OnGPU(),
    ("experts", "cuda"): ExpertsOnGPU(),
}
