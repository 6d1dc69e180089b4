"""Folders in FP8, NVFP4 and bitsandbytes' layouts: the model is that of the dequantized weights.

The folders are written here by plain arithmetic, as the formats' documentation says: DeepSeek-V3's
weight_dequant and transformers' finegrained_fp8, compressed-tensors' float-quantized, modelopt's
export of a Hugging Face checkpoint, bitsandbytes' QuantState."""
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checks.common import close, hf_folder, hf_logits, random_hf
from model import Transformer, load_model
from quantize import say_once, save_quantized

SIZES = dict(hidden_size=192, intermediate_size=320)  # which blocks of 128 do not divide
Written = tuple[dict[str, Tensor], Tensor]  # what is stored beside or below a name, what it means
E4M3 = torch.float8_e4m3fn


# --- the layouts: w [N, K] -> the tensors of a file by the ends of their names, what they mean ---

def fp8_blocks(w: Tensor, size: int = 128) -> Written:
    N, K = w.shape
    scale = torch.rand(-(-N // size), -(-K // size)) + 0.5
    q, meant = w.to(E4M3), torch.empty(N, K)
    for i in range(N):
        for j in range(0, K, 16):
            meant[i, j:j + 16] = q[i, j:j + 16].float() * scale[i // size, j // size]
    return {"weight": q, "weight_scale_inv": scale}, meant


def fp8_tensor(w: Tensor) -> Written:
    scale = w.abs().max() / 448
    q = (w / scale).to(E4M3)
    beside = {"weight_scale": scale, "input_scale": torch.ones(())}
    return {"weight": q, **beside}, q.float() * scale


def fp8_channels(w: Tensor) -> Written:
    scale = w.abs().amax(1, keepdim=True) / 448
    q = (w / scale).to(E4M3)
    return {"weight": q, "weight_scale": scale.bfloat16()}, q.float() * scale.bfloat16().float()


def nvfp4(w: Tensor) -> Written:
    N, K = w.shape
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    scale = (torch.rand(N, K // 16) + 0.1).to(E4M3)
    packed = codes[:, 0::2] + 16 * codes[:, 1::2]
    meant = numbers[codes.int()] * scale.float().repeat_interleave(16, 1) * 0.125
    stored = {"weight": packed, "weight_scale": scale, "weight_scale_2": torch.tensor(0.125),
              "input_scale": torch.ones(())}
    return stored, meant


def packed_nvfp4(w: Tensor) -> Written:
    """compressed-tensors' names, and its global scale, which divides."""
    stored, meant = nvfp4(w)
    return {"weight_packed": stored["weight"], "weight_scale": stored["weight_scale"],
            "weight_global_scale": 1 / stored["weight_scale_2"][None],
            "input_global_scale": torch.ones(1)}, meant


def mixed(w: Tensor) -> Written:
    """A folder may have several layouts: here one for wide matrices, one for others."""
    N, K = w.shape
    return packed_nvfp4(w) if N > K else fp8_channels(w)


def int8(w: Tensor) -> Written:
    largest = w.abs().amax(1)
    q = (w * 127 / largest[:, None]).round().to(torch.int8)
    stored = {"weight": q, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, q.float() * (largest / 127)[:, None]


def four_bits(w: Tensor, nested: bool) -> Written:
    """16 numbers in a table, in blocks of 64 that run on over the ends of rows."""
    N, K = w.shape
    table = torch.linspace(-1, 1, 16)
    codes = torch.randint(0, 16, (N * K,), dtype=torch.uint8)
    n = N * K // 64
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [N, K]}
    stored = {"weight": (16 * codes[0::2] + codes[1::2])[:, None], "weight.quant_map": table}
    if nested:
        places = torch.randint(0, 256, (n,), dtype=torch.uint8)
        inner, scales = torch.linspace(-1, 1, 256), torch.rand(-(-n // 256)) / 8
        absmax = inner[places.int()] * scales.repeat_interleave(256)[:n] + 0.25
        stored |= {"weight.absmax": places, "weight.nested_absmax": scales,
                   "weight.nested_quant_map": inner}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
    else:
        absmax = stored["weight.absmax"] = torch.rand(n) / 2
    said = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    stored["weight.quant_state.bitsandbytes__nf4"] = said
    return stored, (table[codes.int()].view(n, 64) * absmax[:, None]).view(N, K)


BNB = dict(quant_method="bitsandbytes")
CHANNEL = dict(num_bits=8, type="float", strategy="channel", symmetric=True)
CT = dict(quant_method="compressed-tensors", ignore=["lm_head"])
FP4 = dict(num_bits=4, type="float", strategy="tensor_group", group_size=16)
LAYOUTS: dict[str, tuple[Callable[[Tensor], Written], dict]] = {
    "blocks": (fp8_blocks, dict(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128],
                                activation_scheme="dynamic", modules_to_not_convert=["lm_head"])),
    "tensor": (fp8_tensor, dict(quant_method="modelopt", quant_algo="FP8", ignore=["lm_head"])),
    "channels": (fp8_channels, dict(
        quant_method="compressed-tensors", format="float-quantized", ignore=["lm_head"],
        config_groups={"group_0": {"targets": ["Linear"], "weights": CHANNEL}})),
    "nvfp4": (nvfp4, dict(quant_method="modelopt", quant_algo="NVFP4", ignore=["lm_head"])),
    "packed nvfp4": (packed_nvfp4, dict(CT, format="nvfp4-pack-quantized",
                                        config_groups={"group_0": {"weights": FP4}})),
    "mixed": (mixed, dict(CT, format="mixed-precision",
                          config_groups={"0": {"weights": FP4}, "1": {"weights": CHANNEL}})),
    "mixed by modelopt": (fp8_tensor, dict(
        quant_method="modelopt", quant_algo="MIXED_PRECISION",
        quantized_layers={"model.layers.0.mlp.up_proj": {"quant_algo": "FP8"}})),
    "int8": (int8, dict(BNB, load_in_8bit=True)),
    "nf4": (lambda w: four_bits(w, nested=False), dict(BNB, load_in_4bit=True)),
    "nested": (lambda w: four_bits(w, nested=True), dict(BNB, load_in_4bit=True)),
}


def write(folder: Path, layout: str, **changes: object) -> tuple[Path, Path]:
    """A folder in a layout, with one matrix in plain numbers -> (it, that of what it means)."""
    torch.manual_seed(0)
    plain = hf_folder(folder / "plain", **(SIZES | changes))
    stored, meant = {}, {}
    quantized, settings = LAYOUTS[layout]
    for name, x in load_file(plain / "model.safetensors").items():
        if "layers" not in name or x.dim() == 1 or "1.mlp.down" in name:
            stored[name] = meant[name] = x
            continue
        parts, meant[name] = quantized(0.2 * x)
        stored |= {name.replace("weight", end): part for end, part in parts.items()}
    save_file(meant, plain / "model.safetensors")
    (folder / "q").mkdir()
    stored["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(())  # of a cache in FP8
    save_file({k: x.contiguous() for k, x in stored.items()}, folder / "q" / "model.safetensors")
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "q" / "config.json").write_text(json.dumps(config))
    return folder / "q", plain


def logits_of(model: Transformer) -> Tensor:
    model.setup_caches(1, 32)
    return model(torch.arange(3, 20)[None], torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_means_what_its_documentation_says(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dequantized, which is said once."""
    say_once.cache_clear()
    folder, plain = write(tmp_path, layout)
    model = load_model(folder, dtype=torch.float32, quantize="none")
    said = capsys.readouterr().err
    assert said.count("as no quantized layer holds them") == ("nvfp4" not in layout)
    expected = load_model(plain, dtype=torch.float32)
    for x, y in zip(model.parameters(), expected.parameters(), strict=True):
        close(x, y, 1e-6)
    close(logits_of(model), logits_of(expected), 1e-5)


@pytest.mark.parametrize("layout", ["nvfp4", "packed nvfp4"])
def test_nvfp4_keeps_its_numbers(layout: str, tmp_path: Path) -> None:
    """In 8 bits, in its groups of 16."""
    folder, plain = write(tmp_path, layout)
    model, expected = load_model(folder), load_model(plain, dtype=torch.float32)
    layer, exact = (each.layers[0].mlp.gate_up_proj for each in (model, expected))
    assert (layer.mode, layer.group_size) == ("int8_grouped", 16)
    kept = torch.cat(list(layer.dense(torch.float32)))
    assert (kept - exact.weight).norm() < 3e-3 * exact.weight.norm()


@pytest.mark.parametrize("name, layout", [
    ("qwen3.5-moe", "blocks"), ("qwen3-next", "blocks"),
])
def test_experts_that_are_stored_in_one_stack(name: str, layout: str, tmp_path: Path) -> None:
    """Quantized as one tensor [E, N, K], with scales beside it, as transformers holds them."""
    hf = random_hf(name)
    hf.save_pretrained(tmp_path / "plain")
    stored, meant = {}, hf.state_dict()
    for key, x in meant.items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[key] = x
            continue
        pairs = [nvfp4(w) if layout == "nvfp4" else fp8_blocks(w, 16) for w in x]
        parts = {end: torch.stack([part[end] for part, _ in pairs]) for end in pairs[0][0]}
        meant[key] = torch.stack([numbers for _, numbers in pairs])
        stored |= {key + end.removeprefix("weight"): part for end, part in parts.items()
                   if end != "input_scale"}
    (tmp_path / "q").mkdir()
    save_file({key: x.contiguous() for key, x in stored.items()}, tmp_path / "q/model.safetensors")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["quantization_config"] = LAYOUTS[layout][1] | {"weight_block_size": [16, 16]}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    hf.load_state_dict(meant)
    tokens = torch.arange(3, 20)[None]
    close(logits_of(load_model(tmp_path / "q", dtype=torch.float32)), hf_logits(hf, tokens), 1e-4)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_it_is_quantized_while_loading_and_saved(mode: str, tmp_path: Path) -> None:
    folder, plain = write(tmp_path, "blocks")
    model = load_model(folder, dtype=torch.float32, quantize=mode)
    expected = logits_of(load_model(plain, dtype=torch.float32, quantize=mode))
    assert torch.equal(logits_of(model), expected)
    save_quantized(model, tmp_path / "saved")
    assert torch.equal(logits_of(load_model(tmp_path / "saved", dtype=torch.float32)), expected)


def test_older_files_of_modelopt_say_it_beside_the_configuration(tmp_path: Path) -> None:
    folder, plain = write(tmp_path, "nvfp4")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(said))
    models = [load_model(each, dtype=torch.float32, quantize=None) for each in (folder, plain)]
    close(*map(logits_of, models), 1e-5)


def test_a_list_in_place_of_settings_is_named(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, "nvfp4")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": ["NVFP4"]}))
    with pytest.raises(ValueError, match="quantization_config = .*NVFP4"):
        load_model(folder)


@pytest.mark.parametrize("settings, message", [
    (dict(quant_method="modelopt", quant_algo="W4A8_AWQ"), "W4A8_AWQ"),
    (dict(quant_method="modelopt", quant_algo="MIXED_PRECISION",
          quantized_layers={"model.layers.0.mlp": {"quant_algo": "NVFP4_SVDQUANT"}}), "SVDQUANT"),
    (dict(quant_method="compressed-tensors", format="mxfp6-pack-quantized"), "mxfp6"),
    (dict(quant_method="compressed-tensors", format="sparse-24-bitmask"), "sparse-24-bitmask"),
    (dict(quant_method="compressed-tensors", format="float-quantized",
          transform_config={"config_groups": {"R1": {}}}), "transform_config"),
    (dict(quant_method="hqq"), "hqq"),
    (dict(quant_method="fp8", weight_block_size=[64, 64]), "scale has shape"),
    (dict(quant_method="fp8", weight_block_size=[0, 128]), "down_proj.weight"),
    (dict(quant_method="fp8", weight_block_size="all"), "down_proj.weight"),
    (dict(quant_method=["fp8"]), "unsupported quantization_config"),
])
def test_what_is_not_known_is_refused_by_name(
    settings: dict, message: str, tmp_path: Path
) -> None:
    folder, _ = write(tmp_path, "blocks")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize("layout, part, change", [
    ("blocks", "weight_scale_inv", None),
    ("blocks", "weight", Tensor.float),
    ("nvfp4", "weight_scale_2", None),
    ("nvfp4", "weight_scale", lambda x: x[:, :-1]),
    ("int8", "SCB", lambda x: x[:-1]),
    ("nf4", "weight.absmax", None),
    ("nf4", "weight.absmax", lambda x: x[:-1]),
    ("nf4", "weight.quant_map", lambda x: x[:-1]),
    ("nf4", "weight", lambda x: x[:-1]),
    ("nf4", "weight.quant_state.bitsandbytes__nf4", lambda x: x[:-1]),
    ("nf4", "weight.quant_state.bitsandbytes__nf4", lambda x: x[:0]),
    ("nested", "weight.nested_absmax", lambda x: x[:0]),
])
def test_a_damaged_file_is_named(
    layout: str, part: str, change: Callable | None, tmp_path: Path
) -> None:
    folder, _ = write(tmp_path, layout)
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.0.mlp.up_proj.{part}"
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="up_proj.weight"):
        load_model(folder, dtype=torch.float32)
