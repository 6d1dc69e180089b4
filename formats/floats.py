"""Weights that a folder has in FP8, NVFP4 or bitsandbytes' layouts: small numbers times scales.

They are dequantized while loading. On SmolLM2-135M, 8 bits in groups of 32 would add 0.0021 to
0.0030 to the mean KL from the dequantized model, and weights in bfloat16 add 0.0001 to 0.0002."""
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

from formats.integers import TWICE_E2M1, check_shape
from formats.settings import check_settings, read_json
from model import first_line
from quantize import say_once

# scales of activations and of the cache, which keep their precision, and what says nothing
LEFT_OUT = re.compile(r".*\.((input|output|[qkv])_scale|weight_format)")
# what a configuration may say of its quantization, by these; older files of modelopt, the second
SETTINGS = ("quant_method", "quant_algo", "format", "transform_config")
KNOWN = ("mxfp4 fp8 bitsandbytes FP8 NVFP4 modelopt/FP8 modelopt/NVFP4 "
         "compressed-tensors/float-quantized")


@dataclass
class Floats:
    """Such a matrix in a file: to a checkpoint a tensor of float32, read when it is asked for."""

    weight: Any  # an InFile of formats/checkpoint.py
    shape: tuple[int, int]
    scales: Tensor  # [N / n, K / k], rounded up
    block: tuple[int, int]  # n and k
    pairs: Tensor | None = None  # [256, 2]: what a byte stands for
    dtype = torch.float32

    def __post_init__(self) -> None:
        (N, K), (n, k) = self.shape, self.block
        check_shape("its scale", self.scales.shape, (-(-N // n), -(-K // k)))

    def read(self) -> Tensor:
        (N, K), (n, k) = self.shape, self.block
        stored = self.weight.read()
        w = stored.float() if self.pairs is None else self.pairs[stored.int()].flatten(1)
        scales = self.scales.float().repeat_interleave(n, 0)[:N]
        return w.mul_(scales.repeat_interleave(k, 1)[:, :K])


def settle_floats(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Put Floats in place of what KNOWN layouts store; settings of others stay, to be refused.
    ValueError names a tensor that does not fit what is beside it."""
    older = folder / "hf_quant_config.json"
    if not config.get("quantization_config") and older.exists():
        config["quantization_config"] = read_json(older).get("quantization")
        check_settings(config)
    settings = config.get("quantization_config") or {}
    stated = [str(settings[key]) for key in SETTINGS if settings.get(key)]
    if "/".join(stated) not in KNOWN.split():
        return
    del config["quantization_config"]
    for name in filter(LEFT_OUT.fullmatch, list(tensors)):
        del tensors[name]
    for name in [name for name in tensors if name.endswith(".weight")]:
        try:
            tensors[name] = read_layout(name, tensors, settings)
        except Exception as e:  # of many kinds, from numbers that make no sense together
            raise ValueError(f"cannot read tensor {name}: {first_line(e)}") from None
    size = sum(2 * math.prod(x.shape) for x in tensors.values() if isinstance(x, Floats)) / 1e6
    if size:
        say_once(f"{folder} has weights in {'/'.join(stated)}, which no layer here holds: read as "
                 f"plain numbers, {size:,.1f} MB in bfloat16, or less by --quantize int8 or int4")


def read_layout(name: str, tensors: dict[str, Any], settings: dict[str, Any]) -> Any:
    """A weight with what is beside it, which is taken out of tensors; plain numbers as they are.

    FP8 is times weight_scale, or weight_scale_inv, which is no inverse: one, one for each row or
    one for each block. bitsandbytes' int8 is times SCB / 127 for each row. NVFP4: E2M1 numbers,
    the even input in the low nibble, times an FP8 for 16 inputs and weight_scale_2."""
    weight, module = tensors[name], name.removesuffix("weight")

    def take(end: str) -> Tensor:
        return tensors.pop(module + end).read()

    if f"{name}.quant_map" in tensors:
        return nf4(weight, take)
    if weight.dtype == torch.uint8:
        table = TWICE_E2M1 * (take("weight_scale_2").item() / 2)
        shape, pairs = (weight.shape[0], 2 * weight.shape[1]), torch.cartesian_prod(table, table)
        return Floats(weight, shape, take("weight_scale"), (1, 16), pairs.flip(1))
    if weight.dtype == torch.int8:
        scales = take("SCB") / 127
    elif weight.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        scales = take("weight_scale" + "_inv" * (f"{name}_scale_inv" in tensors))
    else:
        return weight
    N, K = weight.shape
    block = settings.get("weight_block_size") or (128, 128)
    if scales.shape in ((1,), (1, 1), (N,), (N, 1)):
        scales, block = scales.view(-1, 1), (N // scales.numel(), K)
    return Floats(weight, (N, K), scales, block)


def nf4(weight: Any, take: Callable[[str], Tensor]) -> Floats:
    """Places in a table, the first of two in the high nibble, times absmax for a block of them.
    absmax may be nested: places in another table, times scales, plus an offset."""
    state = json.loads(bytes(take("weight.quant_state.bitsandbytes__nf4").tolist()))
    (N, K), block = state["shape"], state["blocksize"]
    table, scales = take("weight.quant_map"), take("weight.absmax")
    if "nested_offset" in state:
        inner = take("weight.nested_absmax").repeat_interleave(state["nested_blocksize"])
        scales = take("weight.nested_quant_map")[scales.int()] * inner[:len(scales)]
        scales += state["nested_offset"]
    check_shape(weight.name, weight.shape, (N * K // 2, 1))
    check_shape("quant_map", table.shape, (16,))
    rows = replace(weight, shape=(N, K // 2), row_bytes=K // 2)
    return Floats(rows, (N, K), scales.view(N, -1), (1, block), torch.cartesian_prod(table, table))
