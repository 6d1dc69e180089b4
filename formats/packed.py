"""Folders of AutoAWQ, GPTQ and compressed-tensors: (q - zero) * scale, with a scale and a zero for
each group of inputs. An int32 has several integers, the first in its lowest bits."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from formats.integers import Affine, Blocks, check_shape, read
from quantize import unpack_nibbles

KNOWN = {  # what settings may be; a file of compressed-tensors has some for each group of layers
    **dict.fromkeys(["transform_config", "kv_cache_scheme", "input_activations"], (None, {})),
    "bits": (4, 8), "num_bits": (4, 8), "type": ("int",), "zero_point": (None, True),
    "format": (None, "gptq", "gptq_v2", "gemm", "pack-quantized", "int-quantized",
               "mixed-precision", "dense"),
    "checkpoint_format": (None, "gptq", "gptq_v2", "gemm"), "version": (None, "gemm", "GEMM"),
    "is_marlin_format": (None, False), "strategy": ("group", "channel", "tensor"),
}
# what gives some rows of the integers [N, K]; scales and zeros [N or 1, groups]
Loaded = tuple[Callable[[range], Tensor], Tensor, Tensor]


def packed_matrices(tensors: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a folder, those that are packed as Blocks named MODULE.weight_packed, and the
    configuration without its quantization_config. ValueError names a variant that is unknown."""
    settings = config.get("quantization_config") or {}
    method = settings.get("quant_method")
    if method not in ("awq", "gptq", "compressed-tensors"):
        return tensors
    groups = list((settings.get("config_groups") or {}).values())
    check_known(method, [settings, settings.get("sparsity_config") or {}, *groups,
                         *(group["weights"] for group in groups)])
    end, matrix = ".qweight", by_inputs
    if method == "compressed-tensors":
        end, matrix = ".weight_scale", by_outputs
    tensors = dict(tensors)
    for module in [name.removesuffix(end) for name in tensors if name.endswith(end)]:
        tensors[f"{module}.weight_packed"] = matrix(module, tensors, settings)
        if module == "lm_head":
            config["tie_word_embeddings"] = False  # this one counts
    del config["quantization_config"]
    return tensors


def check_known(method: str, parts: list[dict[str, Any]]) -> None:
    for key, known in KNOWN.items():
        for value in (part[key] for part in parts if key in part):
            if value not in known:
                raise ValueError(f"the model is quantized by {method} with {key} {value!r:.200}, "
                                 "which cannot be read")


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

    def load() -> Loaded:
        whole = read(words)

        def q(rows: range) -> Tensor:
            some = whole[:, rows.start // n:-(-rows.stop // n)]
            some = turned(some) if is_awq else unpack(some.t(), bits)
            return some[rows.start % n:][:len(rows)]

        ones = (2**32 - 1) // (2**bits - 1)  # one in each integer, which may carry
        return q, read(scales).t(), turned(read(zeros) + is_less * ones)

    return blocks(f"{module}.qweight", bits, (N, K, groups), load, order)


def by_outputs(module: str, tensors: dict[str, Any], settings: dict[str, Any]) -> Blocks:
    """weight [N, K] int8, or weight_packed [N, K * bits / 32] and weight_shape; weight_scale
    [N, groups], or one; weight_zero_point like it, perhaps packed along N; weight_g_idx [K]."""
    name = f"{module}.weight"
    scales, zeros, order, sizes = (
        tensors.pop(f"{name}_{x}", None) for x in ("scale", "zero_point", "g_idx", "shape"))
    words = tensors.pop(name if sizes is None else f"{name}_packed")
    N, K = words.shape if sizes is None else read(sizes).view(2).tolist()
    bits = 4 if words.shape[1] * 8 == K else 8
    check_shape(name, words.shape, (N, K if sizes is None else K * bits // 32))
    groups = scales.shape[1] if len(scales.shape) == 2 else 1

    def load() -> Loaded:
        whole, scale = read(words), read(scales).reshape(-1, groups)
        z = torch.full_like(scale, 2 ** (bits - 1))
        if zeros is not None:
            z = unpack(read(zeros).t(), bits).t()[:N].reshape(-1, groups)
        return (lambda rows: unpack(whole[rows.start:rows.stop], bits)), scale, z

    return blocks(name, bits, (N, K, groups), load, order)


def blocks(
    name: str, bits: int, shape: tuple[int, int, int], load: Callable[[], Loaded], order: Any
) -> Blocks:
    """shape: N, K, groups. order: the group of each input, None: one after the other."""
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
        return lambda rows: Affine(q(rows), *(x[rows.start:rows.stop][:, ids] for x in lines))

    return Blocks(name, kind, bits if size >= 32 else None, range(N), range(K),
                  lambda rows: hold()(rows), size, hold)


def unpack(words: Tensor, bits: int) -> Tensor:
    """[rows, n] int32 -> [rows, n * 32 / bits] uint8; int8, which is signed, of the same shape."""
    packed = words.contiguous().view(torch.uint8)
    if words.dtype == torch.int8:
        return packed + 2 ** (bits - 1)
    if words.dtype != torch.int32:
        raise ValueError(f"packed integers have dtype {words.dtype}, expected int32")
    return packed if bits == 8 else unpack_nibbles(packed)
