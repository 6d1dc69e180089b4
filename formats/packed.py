"""Folders of quantized weights: what config.json says of them, and how tensors hold them.

AutoAWQ, GPTQ and compressed-tensors pack integers, (q - zero) * scale, with a scale and a zero for
each group of inputs. An int32 has several of them, the first in its lowest bits.

FP8 and bitsandbytes' numbers, times scales, are dequantized while loading. On SmolLM2-135M, 8 bits
in groups of 32 would add 0.0021 to 0.0030 to the mean KL from the dequantized model, and weights in
bfloat16 add 0.0001 to 0.0002. Activations and caches keep their precision."""
from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.integers import (
    TWICE_E2M1_AND_16, Affine, Blocks, Rows, check_shape, read, say_dequantized,
)
from formats.settings import check_settings, read_json
from model import first_line
from quantize import unpack_nibbles

METHODS = "awq bitsandbytes compressed-tensors fbgemm_fp8 fp8 gptq modelopt mxfp4".split()
Tensors = dict[str, Any]  # of a file: an InFile of formats/checkpoint.py, or a tensor
# what settings may be, in a file's own and in those that it has for some layers
KNOWN = {
    "transform_config": (None, {}),
    "bits": (4, 8), "num_bits": (4, 8), "type": ("int", "float"), "zero_point": (None, True),
    "format": (None, "gptq", "gptq_v2", "gemm", "pack-quantized", "int-quantized",
               "mixed-precision", "dense", "float-quantized", "naive-quantized",
               "nvfp4-pack-quantized"),
    "checkpoint_format": (None, "gptq", "gptq_v2", "gemm"), "is_marlin_format": (None, False),
    "quant_algo": (None, "FP8", "FP8_PB_WO", "FP8_BLOCK_SCALES", "FP8_PER_CHANNEL_PER_TOKEN",
                   "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"),
}
AWQ = KNOWN | {"version": (None, "gemm", "GEMM")}  # others have that of a program there
MATRIX = re.compile(r"(.*\.)((q)?weight(_packed)?|experts\.(gate_up|down)_proj)")
# scales of activations and of the cache, and what says nothing
LEFT_OUT = re.compile(r".*[._]((input|output|activation|[qkv]|kv)(_global)?_scale|weight_format"
                      "|input_zero_point)")


def settle_quantized(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    """Put Blocks and Floats in place of what a folder has quantized by METHODS, and take
    quantization_config out; others stay, to be refused. ValueError names a variant that is unknown,
    or a tensor that does not fit what is beside it."""
    older = folder / "hf_quant_config.json"  # of modelopt
    if not config.get("quantization_config") and older.exists():
        config["quantization_config"] = read_json(older).get("quantization")
        check_settings(config)
    settings = config.get("quantization_config") or {}
    method = settings.get("quant_method", "modelopt" if "quant_algo" in settings else None)
    if method not in METHODS:
        return
    check_known(method, settings, AWQ if method == "awq" else KNOWN)
    del config["quantization_config"]
    for name in filter(LEFT_OUT.fullmatch, list(tensors)):
        del tensors[name]
    for name in filter(MATRIX.fullmatch, list(tensors)):
        matrix = name.replace(".qweight", ".weight").removesuffix("_packed")
        try:
            found = read_layout(name, matrix, tensors, settings)
        except Exception as e:  # of many kinds, from numbers that make no sense together
            raise ValueError(f"cannot read tensor {matrix}: {first_line(e)}") from None
        # by another name, where layers hold what has one of theirs already
        tensors[f"{matrix}_packed" if isinstance(found, Blocks) else matrix] = found
    if "lm_head.weight_packed" in tensors:
        config["tie_word_embeddings"] = False  # this one counts
    size = sum(2 * math.prod(x.shape) for x in tensors.values() if isinstance(x, Floats))
    kinds = filter(None, (method, settings.get("quant_algo") or settings.get("format")))
    say_dequantized("/".join(kinds), size)


def check_known(method: str, settings: dict[str, Any], known: dict[str, tuple]) -> None:
    """ValueError names a setting, of the file or of some layers, that is none of those known."""
    for key, value in settings.items():
        if value not in known.get(key, (value,)):
            raise ValueError(f"the model is quantized by {method} with {key} {value!r:.200}, "
                             "which cannot be read")
        if isinstance(value, dict):
            check_known(method, value, known)


def read_layout(name: str, matrix: str, tensors: Tensors, settings: dict[str, Any]) -> Any:
    """A matrix of the file's name with what is beside it, which is taken out of tensors; plain
    numbers as they are."""
    if name.endswith(".qweight"):
        return by_inputs(name.removesuffix(".qweight"), tensors, settings)
    weight = tensors.pop(name)
    has_scale = f"{matrix}_scale" in tensors
    if weight.dtype == torch.int32 or weight.dtype == torch.int8 and has_scale:
        return by_outputs(matrix, weight, tensors)
    if f"{matrix}.quant_map" in tensors:
        return four_bits(matrix, weight, tensors)
    if weight.dtype == torch.int8:  # bitsandbytes'
        scales = read(tensors.pop(f"{matrix.removesuffix('weight')}SCB")) / 127
        return Floats(weight, weight.shape, scales, (1, weight.shape[1]))
    if weight.dtype == torch.uint8:
        return nvfp4(matrix, weight, tensors)
    if weight.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return float8(matrix, weight, tensors, settings.get("weight_block_size") or (128, 128))
    return weight

# --- integers ---


def by_inputs(module: str, tensors: Tensors, settings: dict[str, Any]) -> Blocks:
    """scales [groups, N], qzeros [groups, N * bits / 32]; AutoAWQ's qweight [K, N / 8]; GPTQ's
    [K * bits / 32, N], zeros less 1 but in its second version, and g_idx [K], the groups."""
    words, zeros, scales = (tensors.pop(f"{module}.{x}") for x in ("qweight", "qzeros", "scales"))
    order = tensors.pop(f"{module}.g_idx", None)
    groups, N = scales.shape
    bits = zeros.shape[1] * 32 // N  # of a module alone, perhaps
    is_awq = settings["quant_method"] == "awq"
    if bits not in (4, 8) or is_awq and bits == 8:
        raise ValueError(f"its integers have {bits} bits")
    K = words.shape[0] if is_awq else words.shape[0] * 32 // bits
    check_shape(f"{module}.qweight", words.shape, (words.shape[0], N // 8 if is_awq else N))
    check_shape(f"{module}.qzeros", zeros.shape, (groups, N * bits // 32))
    is_second = "gptq_v2" in (settings.get("checkpoint_format"), settings.get("format"))
    # one in each integer, which may carry
    ones = 0 if is_awq or is_second else (2**32 - 1) // (2**bits - 1)

    def load() -> tuple[Tensor, Tensor, Tensor]:
        zero = unpack(read(zeros) + ones, bits).t()
        if is_awq:
            return from_awq(unpack(read(words), 4).t()), read(scales).t(), from_awq(zero)
        return unpack(read(words).t(), bits), read(scales).t(), zero

    return blocks(f"{module}.qweight", bits, (N, K, groups), load, order)


def from_awq(x: Tensor) -> Tensor:
    """[N, n], of which eight rows are those of outputs 0 2 4 6 1 3 5 7, in order."""
    return x.unflatten(0, (-1, 2, 4)).transpose(1, 2).flatten(0, 2)


def by_outputs(name: str, words: Any, tensors: Tensors) -> Blocks:
    """words: NAME [N, K] int8, or NAME_packed [N, K * bits / 32] with NAME_shape; NAME_scale
    [N, groups], or one; NAME_zero_point like it, perhaps packed along N; NAME_g_idx [K]."""
    scales, zeros, order, sizes = (
        tensors.pop(f"{name}_{x}", None) for x in ("scale", "zero_point", "g_idx", "shape"))
    N, K = words.shape if sizes is None else read(sizes).view(2).tolist()
    bits = 4 if words.shape[1] * 8 == K else 8
    check_shape(name, words.shape, (N, K if sizes is None else K * bits // 32))
    groups = scales.shape[1] if len(scales.shape) == 2 else 1

    def load() -> tuple[Tensor, Tensor, Tensor]:
        scale = read(scales).reshape(-1, groups)
        zero = torch.full_like(scale, 2 ** (bits - 1))
        if zeros is not None:
            zero = unpack(read(zeros).t(), bits).t()[:N].reshape(-1, groups)
        return unpack(read(words), bits), scale, zero

    return blocks(name, bits, (N, K, groups), load, order)


def blocks(
    name: str, bits: int, shape: tuple[int, int, int],
    load: Callable[[], tuple[Tensor, Tensor, Tensor]], order: Any,
) -> Blocks:
    """shape: N, K, groups. load: gives integers [N, K], scales and zeros [N or 1, groups]. order:
    the group of each input, None: one after the other."""
    N, K, groups = shape
    in_order = torch.arange(K) // (K // groups)
    index = in_order if order is None else read(order).long()
    if len(index) != K or index.min() < 0 or index.max() >= groups:
        raise ValueError(f"tensor {name} has {K} inputs, but not each in one of {groups} groups")
    size = math.gcd(K // groups, 128) if torch.equal(index, in_order) else 1
    kind = f"{bits}-bit small-group" if size > 1 else f"{bits}-bit act-order"

    def read_rows(rows: Rows) -> Affine:
        q, scales, zeros = load()
        zeros = -zeros.float() * scales
        each = index[::min(size, 32)]
        scales, zeros = scales.float()[:, each], zeros[:, each]
        return Affine(*(pick(x.expand(N, -1), rows) for x in (q, scales, zeros)))

    kept = bits if size >= 16 else None
    return Blocks(name, kind, kept, range(N), range(K), read_rows, size, is_whole=True)


def pick(x: Tensor, rows: Rows) -> Tensor:
    return x[rows] if isinstance(rows, Tensor) else x[rows.start:rows.stop]  # no copy


def unpack(words: Tensor, bits: int) -> Tensor:
    """[rows, n] int32 -> [rows, n * 32 / bits] uint8; int8, which is signed, of the same shape."""
    packed = words.contiguous().view(torch.uint8)
    if words.dtype == torch.int8:
        return packed + 2 ** (bits - 1)
    if words.dtype != torch.int32:
        raise ValueError(f"packed integers have dtype {words.dtype}, expected int32")
    return packed if bits == 8 else unpack_nibbles(packed)

# --- numbers ---


def nvfp4(name: str, weight: Any, tensors: Tensors) -> Blocks:
    """Which stays as it is: NAME_scale has an FP8 for 16 inputs, and all are times NAME_scale_2, or
    over NAME_global_scale."""
    if f"{name}_global_scale" in tensors:
        factor = 1 / read(tensors.pop(f"{name}_global_scale"))
    else:
        factor = read(tensors.pop(f"{name}_scale_2"))
    scales = tensors.pop(f"{name}_scale")
    N, half = weight.shape  # a byte has input 2c in its low nibble
    check_shape("its scale", scales.shape, (N, half // 8))

    def load(rows: Rows) -> Affine:
        scale = scales.read(rows).float() * (factor.item() / 2)
        nibbles = unpack_nibbles(weight.read(rows))
        return Affine(TWICE_E2M1_AND_16[nibbles.int()], scale, -16 * scale)

    return Blocks(name, "NVFP4", 5, range(N), range(2 * half), load, 16)


def float8(name: str, weight: Any, tensors: Tensors, block: tuple[int, int]) -> Floats:
    """Times NAME_scale, or NAME_scale_inv, which is no inverse: one, one for each row or one for
    each block."""
    *stack, N, K = weight.shape
    inverse = f"{name}_scale_inv"
    scales = tensors.pop(inverse if inverse in tensors else f"{name}_scale")
    rows, columns = (*scales.shape[len(stack):], 1, 1)[:2]
    if rows in (1, N) and columns == 1:
        block = N // rows, K
    return Floats(weight, weight.shape, scales, block)


def four_bits(name: str, weight: Any, tensors: Tensors) -> Floats:
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
        N, K = self.shape
        n, k = self.block
        w = read(self.weight)
        w = w.float() if self.pairs is None else self.pairs[w.int()].flatten(1)
        size = math.gcd(K, k)  # of a group
        scales = read(self.scales).float().view(-(-N // n), -(-K // k))
        scales = scales.repeat_interleave(n, 0)[:N]
        scales = scales.repeat_interleave(k // size, 1)[:, :K // size]
        w.unflatten(1, (-1, size)).mul_(scales[..., None])
        return w.to(self.dtype)
