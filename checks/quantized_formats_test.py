"""Folders that other programs quantized to integers: AutoAWQ, GPTQ, compressed-tensors.

The files are written here, number by number, as their formats are documented: AutoAWQ's
WQLinear_GEMM, GPTQModel's qweight, qzeros, scales and g_idx, and compressed-tensors'
pack_to_int32. What they stand for is plain arithmetic, (q - zero) * scale."""
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checks.common import close, hf_folder
from model import Transformer, load_model
from quantize import say_once

Tensors = dict[str, Tensor]
# of one matrix: q [N, K], zeros and scales [N, groups], the group of each input [K], bits
Pack = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensors]


def int32(values: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[rows, n] -> [rows, n * bits / 32], one number after the other."""
    each = 32 // bits
    words = torch.zeros(len(values), -(-values.shape[1] // each), dtype=torch.int64)
    for i in range(values.shape[1]):
        place = i % each if order is None else order.index(i % each)
        words[:, i // each] |= values[:, i].long() << bits * place
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def awq(q: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int) -> Tensors:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": int32(q.t(), 4, order), "qzeros": int32(zeros.t(), 4, order),
            "scales": scales.t()}


def gptq(q: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int) -> Tensors:
    return gptq_v2(q, (zeros - 1) % 2**bits, scales, g_idx, bits)


def gptq_v2(q: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int) -> Tensors:
    return {"qweight": int32(q, bits).t(), "qzeros": int32(zeros.t(), bits),
            "scales": scales.t(), "g_idx": g_idx.int(), "bias": torch.zeros(len(q))}


def compressed(q: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int) -> Tensors:
    tensors = {"weight_packed": int32(q, bits), "weight_shape": torch.tensor(q.shape),
               "weight_scale": scales.bfloat16()}
    if (zeros != 2 ** (bits - 1)).any():
        tensors["weight_zero_point"] = int32(zeros.t(), bits).t()
    if (g_idx.diff() < 0).any():
        tensors["weight_g_idx"] = g_idx.int()
    return tensors


def int_quantized(q: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int) -> Tensors:
    return {"weight": (q - 128).to(torch.int8), "weight_scale": scales.bfloat16()}


def groups_of(format: str, bits: int = 4) -> dict:
    weights = dict(type="int", num_bits=bits, strategy="group", dynamic=False)
    group = dict(targets=["Linear"], weights=weights, input_activations=None)
    return dict(quant_method="compressed-tensors", format=format, ignore=["lm_head"],
                config_groups={"group_0": group})


AWQ = dict(quant_method="awq", bits=4, version="gemm", zero_point=True)
GPTQ = dict(quant_method="gptq", bits=4, desc_act=False)
GPTQ_V2 = dict(GPTQ, checkpoint_format="gptq_v2")
PACKED, PACKED_8 = groups_of("pack-quantized"), groups_of("pack-quantized", 8)
INTS = groups_of("int-quantized", 8)  # W8A8, of which activations keep their precision
INTS["config_groups"]["group_0"]["input_activations"] = dict(num_bits=8, type="int", dynamic=True)
# of each: how it is packed, what config.json says, group size, "symmetric" or "act-order"
KINDS = {
    "awq": (awq, AWQ, 128, ""),
    "awq in groups of 64": (awq, AWQ, 64, ""),
    "awq in small groups": (awq, AWQ, 16, ""),
    "gptq": (gptq, GPTQ, 32, ""),
    "gptq by channels": (gptq, GPTQ, None, "symmetric"),
    "gptq of 8 bits": (gptq, dict(GPTQ, bits=8), 128, ""),
    "gptq with act-order": (gptq, dict(GPTQ, desc_act=True), 64, "act-order"),
    "gptq_v2": (gptq_v2, GPTQ_V2, 128, ""),
    "W4A16": (compressed, PACKED, 128, "symmetric"),
    "W4A16 with zeros": (compressed, PACKED, 64, ""),
    "W4A16 with act-order": (compressed, PACKED, 64, "act-order"),
    "W8A16": (compressed, PACKED_8, None, "symmetric"),
    "W8A16 with zeros": (compressed, PACKED_8, 32, ""),
    "int-quantized": (int_quantized, INTS, None, "symmetric"),
}


def write(folder: Path, kind: str) -> tuple[Path, Path]:
    """A random folder of that kind, and a plain one with what it stands for."""
    torch.manual_seed(0)
    pack, settings, group_size, how = KINDS[kind]
    group = settings.get("config_groups", {}).get("group_0", {"weights": {}})
    bits = group["weights"].get("num_bits") or settings["bits"]
    plain = hf_folder(folder / "plain", hidden_size=128, intermediate_size=256)
    dense, packed = load_file(plain / "model.safetensors"), {}
    for name, weight in list(dense.items()):
        if not name.endswith("_proj.weight") or "layers.1.self_attn.o_proj" in name:
            packed[name] = weight
            continue
        N, K = weight.shape
        size = group_size or K
        q = torch.randint(2**bits, (N, K))
        zeros = torch.randint(1, 2**bits, (N, K // size))
        if how == "symmetric":
            zeros[:] = 2 ** (bits - 1)
        scales = (torch.rand(zeros.shape) + 0.5).mul(0.3 / 2**bits)
        scales = (scales if pack in (awq, gptq, gptq_v2) else scales.bfloat16()).half()
        g_idx = torch.arange(K) // size
        if how == "act-order":
            g_idx = g_idx[torch.randperm(K)]
        dense[name] = (q - zeros[:, g_idx]) * scales.float()[:, g_idx]
        parts = pack(q, zeros, scales, g_idx, bits)
        packed |= {f"{name[:-6]}{part}": x.contiguous() for part, x in parts.items()}
    save_file(dense, plain / "model.safetensors")
    (folder / "packed").mkdir()
    save_file(packed, folder / "packed" / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    rewrite(folder / "packed", config | {"quantization_config": settings})
    return folder / "packed", plain


def rewrite(folder: Path, config: dict) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def load(path: Path, quantize: str = "none") -> Transformer:
    model = load_model(path, dtype=torch.float32, quantize=quantize)
    model.setup_caches(1, 64)
    return model


def logits_of(model: Transformer) -> Tensor:
    return model(torch.arange(3, 35)[None], torch.zeros(1, dtype=torch.int32))


def weight(model: Transformer) -> Tensor:
    layer = model.layers[1].mlp.down_proj
    return torch.cat(list(layer.dense(torch.float32))) if layer.mode != "float" else layer.weight


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_folder_is_what_it_stands_for(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, group_size, how = KINDS[kind]
    packed, plain = write(tmp_path, kind)
    expected = logits_of(load(plain))
    close(logits_of(load(packed)), expected, 1e-4)
    say_once.cache_clear()
    model = load(packed, "auto")
    close(logits_of(model), expected, 5e-2)  # activations are rounded to bfloat16
    block = model.layers[1]
    assert model.lm_head.mode == block.self_attn.o_proj.mode == "float"
    if how == "act-order":
        assert block.mlp.down_proj.mode == "float"
        assert "are dequantized" in capsys.readouterr().err
        return
    w, rounded = weight(load(plain)), weight(model)
    assert (rounded - w).norm() < 2e-3 * w.norm()  # of scales and zeros in bfloat16
    is_int4 = "8" not in kind and kind != "int-quantized" and group_size != 16
    assert block.mlp.down_proj.mode == ("int4" if is_int4 else "int8_grouped")
    assert block.mlp.down_proj.group_size == min(group_size or 128, 128 if is_int4 else 64)


@pytest.mark.parametrize("kind, change, message", [
    ("awq", dict(version="gemv"), "awq with version 'gemv'"),
    ("awq", dict(bits=3), "awq with bits 3"),
    ("gptq", dict(bits=2), "gptq with bits 2"),
    ("gptq", dict(checkpoint_format="marlin"), "gptq with checkpoint_format 'marlin'"),
    ("gptq", dict(quant_method="aqlm"), "aqlm"),
    ("W4A16", dict(format="marlin-24"), "compressed-tensors with format 'marlin-24'"),
    ("W4A16", dict(sparsity_config={"format": "sparse-24"}), "format 'sparse-24'"),
    ("W4A16", dict(config_groups={"a": {"weights": {"num_bits": 2}}}), "num_bits 2"),
    ("gptq", dict(dynamic={"+:.*up_proj": {"bits": 3}}), "gptq with bits 3"),
])
def test_other_variants_are_refused_by_name(
    kind: str, change: dict, message: str, tmp_path: Path
) -> None:
    packed, _ = write(tmp_path, kind)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] |= change
    rewrite(packed, config)
    with pytest.raises(ValueError, match=message):
        load_model(packed)


@pytest.mark.parametrize("kind, change", [
    ("W4A16", dict(version="0.14.0.1", sparsity_config=None, transform_config={})),
    ("W4A16", dict(config_groups={"of attention": {"weights": None}})),
    ("gptq of 8 bits", dict(bits=4, dynamic={"-:.*head": {}, "+:.*": {"bits": 8}})),
])
def test_what_programs_write_of_themselves_or_of_some_layers_is_read(
    kind: str, change: dict, tmp_path: Path
) -> None:
    packed, plain = write(tmp_path, kind)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] |= change
    rewrite(packed, config)
    close(logits_of(load(packed)), logits_of(load(plain)), 1e-4)


@pytest.mark.parametrize("kind, part", [
    ("awq", "qzeros"), ("gptq", "scales"), ("W4A16", "weight_packed"), ("gptq", "g_idx"),
])
def test_a_part_that_is_missing_or_of_another_shape_is_named(
    kind: str, part: str, tmp_path: Path
) -> None:
    packed, _ = write(tmp_path, kind)
    file = packed / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.1.mlp.up_proj.{part}"
    tensor = tensors.pop(name)
    if part != "g_idx":  # which old files lack
        save_file(tensors, file)
        with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj"):
            load_model(packed)
    save_file(tensors | {name: tensor[:-1].clone()}, file)
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj"):
        load_model(packed)
