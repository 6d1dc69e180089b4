"""Folders of AutoAWQ, GPTQ and compressed-tensors: (q - zero) * scale, with a scale and a zero for
each group of inputs. An int32 has several integers, the first in its lowest bits."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from formats.integers import Affine, Blocks, check_shape
from quantize import unpack_nibbles

# What settings may be, None: left out. Of compressed-tensors also those of a group of layers.
FORMATS = ["pack-quantized", "int-quantized"]
OF_GROUPS = dict(
    format=[None, *FORMATS], input_activations=[None], output_activations=[None],
    type=["int"], num_bits=[4, 8], strategy=["group", "channel", "tensor"])
SUPPORTED = {
    "awq": dict(bits=[4], zero_point=[None, True], version=[None, "gemm", "GEMM"]),
    "gptq": dict(bits=[4, 8], checkpoint_format=[None, "gptq", "gptq_v2"],
                 is_marlin_format=[None, False]),
    "compressed-tensors": dict(
        format=[*FORMATS, "mixed-precision"], sparsity_config=[None, "dense"],
        transform_config=[None, {}], kv_cache_scheme=[None]),
}
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where AutoAWQ has 8 outputs in an int32


def packed_matrices(tensors: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a folder, those that are packed as Blocks named MODULE.weight_packed, and the
    configuration without its quantization_config. ValueError names a variant that is unknown."""
    settings = config.get("quantization_config") or {}
    method = settings.get("quant_method")
    if method not in SUPPORTED:
        return tensors
    sparsity = (settings.get("sparsity_config") or {}).get("format")
    check_variant(method, settings | {"sparsity_config": sparsity}, SUPPORTED[method])
    end, matrix = ".qweight", by_inputs
    if method == "compressed-tensors":
        end, matrix = ".weight_scale", by_outputs
        for group in settings["config_groups"].values():
            check_variant(method, group | (group.get("weights") or {}), OF_GROUPS)
    tensors = dict(tensors)
    for module in [name.removesuffix(end) for name in tensors if name.endswith(end)]:
        try:
            tensors[f"{module}.weight_packed"] = matrix(module, tensors, settings)
        except KeyError as e:
            raise ValueError(f"there is no tensor {e.args[0]}") from None
        if module == "lm_head":
            config["tie_word_embeddings"] = False  # this one counts
    del config["quantization_config"]
    return tensors


def check_variant(method: str, settings: dict[str, Any], supported: dict[str, list[Any]]) -> None:
    for key, values in supported.items():
        if settings.get(key) not in values:
            raise ValueError(f"the model is quantized by {method} with {key} {settings.get(key)!r}:"
                             f" only {', '.join(map(repr, values))} are supported")


def by_inputs(module: str, tensors: dict[str, Any], settings: dict[str, Any]) -> Blocks:
    """scales [groups, N], qzeros [groups, N * bits / 32]; AutoAWQ's qweight [K, N / 8]; GPTQ's
    [K * bits / 32, N], zeros less 1 but in its second version, and g_idx [K], the groups."""
    words, zeros, scales = (tensors.pop(f"{module}.{x}") for x in ("qweight", "qzeros", "scales"))
    bits, is_awq = settings["bits"], settings["quant_method"] == "awq"
    n_rows, (groups, N) = words.shape[0], scales.shape
    K, across = (n_rows, N // 8) if is_awq else (n_rows * 32 // bits, N)
    check_shape(f"{module}.qweight", words.shape, (n_rows, across))
    check_shape(f"{module}.qzeros", zeros.shape, (groups, N * bits // 32))
    less = 0 if is_awq or settings.get("checkpoint_format") == "gptq_v2" else 1

    def outputs(packed: Tensor) -> Tensor:
        """[rows, n * bits / 32] -> [n, rows]"""
        x = unpack(packed, bits)
        return (x.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1) if is_awq else x).t()

    def q(whole: Tensor, rows: range) -> Tensor:
        if not is_awq:
            return unpack(whole[:, rows.start:rows.stop].t(), bits)
        start, skip = divmod(rows.start, 8)
        return outputs(whole[:, start:-(-rows.stop // 8)])[skip:skip + len(rows)]

    def lines() -> tuple[Tensor, Tensor]:
        return read(scales).t(), outputs(read(zeros)) + less & 2**bits - 1

    return blocks(f"{module}.qweight", bits, (N, K, groups), words, q, lines,
                  tensors.pop(f"{module}.g_idx", None))


def by_outputs(module: str, tensors: dict[str, Any], settings: dict[str, Any]) -> Blocks:
    """compressed-tensors' weight [N, K] int8, or weight_packed [N, K * bits / 32] and weight_shape;
    weight_scale [N, groups], or one; weight_zero_point like it, perhaps packed along N; with
    act-order weight_g_idx [K], the groups."""
    name = f"{module}.weight"
    scales, zeros, order, sizes = (tensors.pop(f"{name}_{x}", None) for x in (
        "scale", "zero_point", "g_idx", "shape"))
    words = tensors.pop(name if sizes is None else f"{name}_packed")
    N, K = words.shape if sizes is None else read(sizes).view(2).tolist()
    bits = 4 if words.shape[1] * 8 == K else 8
    check_shape(name, words.shape, (N, K if sizes is None else K * bits // 32))
    groups = scales.shape[1] if len(scales.shape) == 2 else 1

    def lines() -> tuple[Tensor, Tensor]:
        scale = read(scales).reshape(-1, groups)
        if zeros is None:
            return scale, torch.full_like(scale, 2 ** (bits - 1))
        return scale, unpack(read(zeros).t(), bits).t()[:N].reshape(-1, groups)

    def q(whole: Tensor, rows: range) -> Tensor:
        return unpack(whole[rows.start:rows.stop], bits)

    return blocks(name, bits, (N, K, groups), words, q, lines, order)


def blocks(
    name: str, bits: int, shape: tuple[int, int, int], words: Any,
    q: Callable[[Tensor, range], Tensor], lines: Callable[[], tuple[Tensor, Tensor]], order: Any,
) -> Blocks:
    """shape: N, K, groups. q: all words and some rows -> [rows, K] uint8. lines: -> scales, zeros
    [N or 1, groups]. order: the group of each input, None: one after the other."""
    N, K, groups = shape
    size = K // groups
    in_order = torch.arange(K) // size
    index = in_order if order is None else read(order).long()
    check_shape(f"{name} (its groups)", index.shape, (K,))
    if index.min() < 0 or index.max() >= groups:
        raise ValueError(f"tensor {name} has inputs in groups that are not there")
    act_order = not torch.equal(index, in_order)
    size = 1 if act_order else math.gcd(size, 128)
    index = index[::min(size, 32)]

    def hold() -> Callable[[range], Affine]:
        whole, (scales, zeros) = read(words), lines()
        scales = scales.float().expand(N, -1)
        lows = -zeros.float() * scales
        return lambda rows: Affine(q(whole, rows), *(
            x[rows.start:rows.stop][:, index] for x in (scales, lows)))

    kind = f"{bits}-bit act-order" if act_order else f"{bits}-bit, groups of {size}:"
    return Blocks(name, kind, bits if size >= 32 else None, range(N), range(K),
                  lambda rows: hold()(rows), size, hold)


def unpack(words: Tensor, bits: int) -> Tensor:
    """[rows, n] int32 -> [rows, n * 32 / bits] uint8; int8, which is signed, of the same shape."""
    if words.dtype not in (torch.int8, torch.int32):
        raise ValueError(f"packed integers have dtype {words.dtype}, expected int32")
    packed = words.contiguous().view(torch.uint8)
    if words.dtype == torch.int8:
        return packed + 2 ** (bits - 1)
    return packed if bits == 8 else unpack_nibbles(packed)


def read(tensor: Any) -> Tensor:
    return tensor if isinstance(tensor, Tensor) else tensor.read()
