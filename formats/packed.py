"""Folders of quantized weights: what config.json says of them, and integers as AutoAWQ, GPTQ and
compressed-tensors pack them.

These are (q - zero) * scale, with a scale and a zero for each group of inputs. An int32 has several
integers, the first in its lowest bits. Activations and caches keep their precision."""
from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.floats import Floats, read_floats
from formats.integers import Affine, Blocks, check_shape, read, say_dequantized
from formats.settings import check_settings, read_json
from model import first_line
from quantize import unpack_nibbles

METHODS = "awq bitsandbytes compressed-tensors fbgemm_fp8 fp8 gptq modelopt mxfp4".split()
KNOWN = {  # what settings may be; some files have some for each group of layers
    "transform_config": (None, {}),
    "bits": (4, 8), "num_bits": (4, 8), "type": ("int", "float"), "zero_point": (None, True),
    "format": (None, "gptq", "gptq_v2", "gemm", "pack-quantized", "int-quantized",
               "mixed-precision", "dense", "float-quantized", "naive-quantized",
               "nvfp4-pack-quantized"),
    "checkpoint_format": (None, "gptq", "gptq_v2", "gemm"), "version": (None, "gemm", "GEMM"),
    "is_marlin_format": (None, False),
    "quant_algo": (None, "FP8", "FP8_PB_WO", "FP8_BLOCK_SCALES", "FP8_PER_CHANNEL_PER_TOKEN",
                   "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"),
}
MATRIX = re.compile(r"(.*\.)((q)?weight(_packed)?|experts\.(gate_up|down)_proj)")
# scales of activations and of the cache, and what says nothing
LEFT_OUT = re.compile(r".*[._]((input|output|activation|[qkv]|kv)(_global)?_scale|weight_format"
                      "|input_zero_point)")


def settle_quantized(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Put Blocks and Floats in place of what a folder has quantized by METHODS, and take
    quantization_config out; others stay, to be refused. ValueError names a variant that is unknown,
    or a tensor that does not fit what is beside it."""
    older = folder / "hf_quant_config.json"  # of modelopt
    if not config.get("quantization_config") and older.exists():
        config["quantization_config"] = read_json(older).get("quantization")
        check_settings(config)
    settings = config.get("quantization_config") or {}
    method = settings.get("quant_method") or "modelopt" * ("quant_algo" in settings)
    if method not in METHODS:
        return
    check_known(method, settings)
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


def check_known(method: str, settings: dict[str, Any]) -> None:
    groups = list((settings.get("config_groups") or {}).values())
    layers = (settings.get("quantized_layers") or {}).values()
    parts = [settings, settings.get("sparsity_config") or {}, *groups, *layers,
             *(group["weights"] for group in groups)]
    for key, known in KNOWN.items():
        for value in (part[key] for part in parts if key in part):
            if value not in known:
                raise ValueError(f"the model is quantized by {method} with {key} {value!r:.200}, "
                                 "which cannot be read")


def read_layout(
    name: str, matrix: str, tensors: dict[str, Any], settings: dict[str, Any]
) -> Any:
    """A matrix of the file's name with what is beside it, which is taken out of tensors."""
    if name.endswith(".qweight"):
        return by_inputs(name.removesuffix(".qweight"), tensors, settings)
    weight = tensors.pop(name)
    of_8_bits = weight.dtype == torch.int8 and f"{matrix}_scale" in tensors
    if weight.dtype == torch.int32 or of_8_bits:
        return by_outputs(matrix, weight, tensors)
    return read_floats(matrix, weight, tensors, settings)


def by_inputs(module: str, tensors: dict[str, Any], settings: dict[str, Any]) -> Blocks:
    """scales [groups, N], qzeros [groups, N * bits / 32]; AutoAWQ's qweight [K, N / 8]; GPTQ's
    [K * bits / 32, N], zeros less 1 but in its second version, and g_idx [K], the groups."""
    words, zeros, scales = (tensors.pop(f"{module}.{x}") for x in ("qweight", "qzeros", "scales"))
    order = tensors.pop(f"{module}.g_idx", None)
    bits, is_awq = settings["bits"], settings["quant_method"] == "awq"
    n_rows, (groups, N) = words.shape[0], scales.shape
    n, K = (8, n_rows) if is_awq else (1, n_rows * 32 // bits)  # n: outputs of an int32
    check_shape(f"{module}.qweight", words.shape, (n_rows, N // n))
    check_shape(f"{module}.qzeros", zeros.shape, (groups, N * bits // 32))
    is_less = not is_awq and "gptq_v2" not in map(settings.get, ("checkpoint_format", "format"))

    def turned(packed: Tensor) -> Tensor:
        """[rows, m * bits / 32] -> [m, rows]. AutoAWQ's 8 outputs are 0 2 4 6 1 3 5 7."""
        x = unpack(packed, bits).t()
        return x.unflatten(0, (-1, 2, 4)).transpose(1, 2).reshape(x.shape) if is_awq else x

    def load() -> tuple[Tensor, Tensor, Tensor]:
        q = turned(read(words)) if is_awq else unpack(read(words).t(), bits)
        ones = (2**32 - 1) // (2**bits - 1)  # one in each integer, which may carry
        return q, read(scales).t(), turned(read(zeros) + is_less * ones)

    return blocks(f"{module}.qweight", bits, (N, K, groups), load, order)


def by_outputs(name: str, words: Any, tensors: dict[str, Any]) -> Blocks:
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
        z = torch.full_like(scale, 2 ** (bits - 1))
        if zeros is not None:
            z = unpack(read(zeros).t(), bits).t()[:N].reshape(-1, groups)
        return unpack(read(words), bits), scale, z

    return blocks(name, bits, (N, K, groups), load, order)


def blocks(
    name: str, bits: int, shape: tuple[int, int, int],
    load: Callable[[], tuple[Tensor, Tensor, Tensor]], order: Any,
) -> Blocks:
    """shape: N, K, groups. load: gives integers [N, K], scales and zeros [N or 1, groups]. order:
    the group of each input, None: one after the other."""
    N, K, groups = shape
    size = K // groups
    index = torch.arange(K) // size if order is None else read(order).long()
    if len(index) != K or index.min() < 0 or index.max() >= groups:
        raise ValueError(f"tensor {name} has {K} inputs, but not each in one of {groups} groups")
    in_order = torch.equal(index, torch.arange(K) // size)
    size = math.gcd(size, 128) if in_order else 1  # of groups that can be kept
    kind = f"{bits}-bit {f'groups of {size}:' if in_order else 'act-order'}"

    def hold() -> Callable[[range], Affine]:
        q, scales, zeros = load()
        lines = scales.float().expand(N, -1), (-zeros.float() * scales).expand(N, -1)
        ids = index[::min(size, 32)]
        lines = q, *(x[:, ids] for x in lines)
        return lambda rows: Affine(*(x[rows] for x in lines))

    return Blocks(name, kind, bits if size >= 16 else None, range(N), range(K),
                  lambda rows: hold()(rows), size, hold)


def unpack(words: Tensor, bits: int) -> Tensor:
    """[rows, n] int32 -> [rows, n * 32 / bits] uint8; int8, which is signed, of the same shape."""
    packed = words.contiguous().view(torch.uint8)
    if words.dtype == torch.int8:
        return packed + 2 ** (bits - 1)
    if words.dtype != torch.int32:
        raise ValueError(f"packed integers have dtype {words.dtype}, expected int32")
    return packed if bits == 8 else unpack_nibbles(packed)
