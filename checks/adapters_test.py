"""LoRA adapters of PEFT: what they make of a model's weights, and what is refused."""
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from checks.common import close, hf_logits
from generate import generate
from model import Transformer, load_model
from quantize import quantize_model

Checkpoint = Callable[[str], tuple[Path, transformers.PreTrainedModel]]
IDS = torch.tensor([[5, 6, 7, 9, 20, 33]])
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "base_model_name_or_path": "its/base"}


def write_adapter(
    folder: Path, state: dict[str, Tensor], modules: dict[str, int], **settings: object
) -> dict[str, Tensor]:
    """Random matrices for modules of these ranks -> those of each module, by PEFT's names."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(1)
    tensors = {}
    for module, rank in modules.items():
        N, K = state[f"{module}.weight"].shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, K) * 0.2
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(N, rank) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | settings))
    return tensors


def product(tensors: dict[str, Tensor], module: str) -> Tensor:
    """B @ A"""
    a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
    return b @ a


def logits(model: Transformer) -> Tensor:
    model.setup_caches(1, 32)
    return model(IDS, torch.zeros(1, dtype=torch.int32))


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"
SCALES = [
    ({Q: 4, DOWN: 4}, {}, {Q: 3, DOWN: 3}),
    ({Q: 4, DOWN: 4}, {"use_rslora": True}, {Q: 6, DOWN: 6}),
    ({Q: 2, DOWN: 4}, {"rank_pattern": {r"layers\.[01]\..*q_proj": 2}}, {Q: 6, DOWN: 3}),
    ({Q: 4, DOWN: 4}, {"alpha_pattern": {"down_proj": 2, "mlp.down_proj": 9}}, {Q: 3, DOWN: 0.5}),
]


@pytest.mark.parametrize("modules, settings, scales", SCALES)
def test_an_adapter_is_a_scaled_product_beside_each_weight(
    modules: dict[str, int], settings: dict, scales: dict[str, float], checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    folder, hf = checkpoint("llama")
    state = hf.state_dict()
    tensors = write_adapter(tmp_path, state, modules, **settings)
    merged = transformers.AutoModelForCausalLM.from_config(hf.config).eval()
    changed = {f"{name}.weight": scale * product(tensors, name) for name, scale in scales.items()}
    merged.load_state_dict({name: x + changed.get(name, 0) for name, x in state.items()})
    model = load_model(folder, dtype=torch.float32, adapter=tmp_path)
    close(logits(model), hf_logits(merged, IDS))


def test_dora_gives_rows_the_length_that_was_learnt(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, hf = checkpoint("llama")
    tensors = write_adapter(tmp_path, hf.state_dict(), {DOWN: 4}, use_dora=True)
    lengths = torch.rand(48) + 1
    tensors[f"base_model.model.{DOWN}.lora_magnitude_vector"] = lengths
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = load_model(folder, dtype=torch.float32, adapter=tmp_path)
    close(model.layers[2].mlp.down_proj.weight.norm(dim=1), lengths)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_what_is_quantized_has_the_adapter_in_it(
    quantize: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder, hf = checkpoint("llama")
    write_adapter(tmp_path, hf.state_dict(), {Q: 4, DOWN: 4})
    merged = load_model(folder, dtype=torch.float32, adapter=tmp_path)
    want = logits(quantize_model(merged, quantize))
    model = load_model(folder, dtype=torch.float32, adapter=tmp_path, quantize=quantize)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("changed", ["model.embed_tokens", "lm_head"])
def test_of_what_is_tied_an_adapter_changes_one_alone(
    changed: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder, hf = checkpoint("qwen2")
    table = hf.state_dict()["model.embed_tokens.weight"]
    write_adapter(tmp_path, {}, {})
    new = {f"base_model.model.{changed}.weight": table.flip(0).contiguous()}
    save_file(new, tmp_path / "adapter_model.safetensors")
    model = load_model(folder, dtype=torch.float32, adapter=tmp_path)
    tables = {"model.embed_tokens": model.embed_tokens, "lm_head": model.lm_head}
    for name, module in tables.items():
        [weight] = module.stored().values() if name == "lm_head" else [module.weight]
        assert torch.equal(weight, table.flip(0) if name == changed else table)


def test_weights_that_an_adapter_changes_are_dequantized(
    smollm: tuple[Transformer, object], tmp_path: Path
) -> None:
    plain, tokenizer = smollm
    ids = tokenizer.encode("The capital of France is")
    N, K = 576, 1536
    tensors = write_adapter(tmp_path, {f"{DOWN}.weight": torch.empty(N, K)}, {DOWN: 4})
    model = load_model(adapter=tmp_path)
    assert [layer.mlp.down_proj.mode == "float" for layer in model.layers[:4]] == [0, 0, 1, 0]
    [got] = model.layers[2].mlp.down_proj.stored().values()
    [was] = plain.layers[2].mlp.down_proj.stored().values()
    close(got.float(), was + 3 * product(tensors, DOWN))
    assert generate(model, [ids], 3)


def spoil(**changes: object) -> Callable[[dict, dict], None]:
    def change(tensors: dict, config: dict) -> None:
        config.update(changes)
    return change


def without_b(tensors: dict, config: dict) -> None:
    del tensors[f"base_model.model.{Q}.lora_B.weight"]


def of_another_model(tensors: dict, config: dict) -> None:
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 48)
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight"] = torch.ones(96, 4)


def not_finite(tensors: dict, config: dict) -> None:
    tensors[f"base_model.model.{Q}.lora_A.weight"][0, 0] = math.nan


def wider(tensors: dict, config: dict) -> None:
    tensors[f"base_model.model.{Q}.lora_A.weight"] = torch.ones(4, 49)


def of_a_norm(tensors: dict, config: dict) -> None:
    for part in "AB":
        tensors[f"base_model.model.model.norm.lora_{part}.weight"] = torch.ones(4, 4)


def of_three_dimensions(tensors: dict, config: dict) -> None:
    part = "base_model.model.model.embed_tokens.lora_embedding_"
    tensors.update({f"{part}A": torch.ones(4, 131, 1), f"{part}B": torch.ones(48, 4)})


@pytest.mark.parametrize("change, message", [
    (lambda tensors, config: tensors.clear(), "has no tensor: it changes nothing"),
    (of_a_norm, "has A and B of model.norm.weight, which is no matrix"),
    (of_three_dimensions, r"of model.embed_tokens.weight .* has shape \(131, 1, 4\)"),
    (spoil(peft_type="LOHA"), "unsupported peft_type 'LOHA'"),
    (spoil(init_lora_weights="pissa"), "unsupported init_lora_weights 'pissa'"),
    (spoil(lora_bias=True), "unsupported lora_bias True"),
    (spoil(target_parameters=["x"]), "unsupported target_parameters"),
    (spoil(something_new=3), "unsupported something_new 3"),
    (spoil(r=5), r"A of .*q_proj.weight .* has shape \(4, 48\), expected \(5, 48\)"),
    (spoil(r=None), "r of .* is None, no number above 0"),
    (spoil(lora_alpha="x"), "lora_alpha of .* is 'x'"),
    (spoil(rank_pattern={"(a+)+": 2}), "unsupported rank_pattern"),
    (spoil(rank_pattern={"(a": 2}), "makes no sense"),
    (spoil(rank_pattern=[2]), "makes no sense"),
    (spoil(use_dora=True), "has A, B of .*, where A, B, magnitude belong together"),
    (without_b, "has A of .*, where A, B belong together"),
    (of_another_model, "an adapter of 'its/base', changes model.layers.9.* does not have"),
    (not_finite, "A of .* is not of finite numbers"),
    (wider, r"has shape \(4, 49\), expected \(4, 48\)"),
])
def test_what_is_no_adapter_of_this_model_is_refused(
    change: Callable[[dict, dict], None], message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder, hf = checkpoint("llama")
    tensors, config = write_adapter(tmp_path, hf.state_dict(), {Q: 4}), dict(CONFIG)
    change(tensors, config)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_model(folder, adapter=tmp_path)


def test_a_folder_without_an_adapter_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, _ = checkpoint("llama")
    with pytest.raises(ValueError, match="cannot read .*adapter_config.json"):
        load_model(folder, adapter=tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match="cannot read .*adapter_model.safetensors"):
        load_model(folder, adapter=tmp_path)


PEFT = [
    ("llama", dict(target_modules="all-linear")),
    ("llama", dict(target_modules="all-linear", use_dora=True)),
    ("llama", dict(target_modules=["q_proj", "lm_head", "embed_tokens"])),
    ("llama", dict(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])),
    ("llama-tied-bias", dict(target_modules=["q_proj", "lm_head"])),
    ("llama-tied-bias", dict(target_modules=["q_proj", "o_proj"], bias="all")),
    ("qwen2", dict(
        target_modules="all-linear", rank_pattern={"q_proj": 2, r"layers\.[01]\.mlp\.up_proj": 8},
        alpha_pattern={"q_proj": 5, "^model.layers.2.self_attn.o_proj": 1.5})),
    ("phi3", dict(target_modules="all-linear", use_rslora=True)),
]


@pytest.mark.parametrize("name, settings", PEFT)
def test_equals_peft(name: str, settings: dict, checkpoint: Checkpoint, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder, hf = checkpoint(name)
    base = type(hf)(hf.config)
    base.load_state_dict(hf.state_dict())
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, **settings)
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in filter(lambda x: x.requires_grad, theirs.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path)
    model = load_model(folder, dtype=torch.float32, adapter=tmp_path)
    close(logits(model), hf_logits(theirs, IDS))
