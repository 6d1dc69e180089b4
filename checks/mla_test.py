"""Multi-head latent attention, and routers of its families: what tests.py does not ask of all."""
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from batching import Engine
from batching.engine import CHUNK
from batching.saved import load_row, save_row
from batching.speculate import Gauge
from checks.common import HERE, close, empty_model, hf_logits
from cli.stats import bytes_read
from generate import Request, compile_model, generate
from model import ModelConfig, Transformer, load_model
from quantize import quantize_model, save_quantized

Checkpoint = Callable[[str], tuple[Path, PreTrainedModel]]  # the fixture: random ones, by name


def loaded(checkpoint: Checkpoint, name: str = "deepseek-v3") -> Transformer:
    return load_model(checkpoint(name)[0], dtype=torch.float32)


def tokens_of(*shape: int) -> Tensor:
    return torch.randint(3, 131, shape, generator=torch.Generator().manual_seed(1))


def start(*depths: int) -> Tensor:
    return torch.tensor(depths, dtype=torch.int32)

# --- the cache ---


def test_a_token_costs_what_the_paper_says(checkpoint: Checkpoint) -> None:
    """One vector of kv_lora_rank + qk_rope_head_dim values in each layer, whatever the heads."""
    cache = loaded(checkpoint).setup_caches(2, 64)
    assert cache.nbytes == 3 * 2 * 64 * (24 + 8) * 4
    assert bytes_read(cache, 10) == 3 * 10 * (24 + 8) * 4
    flash = json.loads((HERE / "benchmarks/configs/GLM-4.7-Flash.json").read_text())
    config = ModelConfig.from_hf(flash)
    assert config.n_kv_head * config.head_dim == 512 + 64


def test_an_int8_cache_is_refused_in_a_sentence(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="has no int8 form: leave --kv_dtype out"):
        loaded(checkpoint).setup_caches(1, 64, torch.int8)


def test_a_bfloat16_cache_of_a_float32_model(checkpoint: Checkpoint) -> None:
    model, (_, hf) = loaded(checkpoint), checkpoint("deepseek-v3")
    tokens = tokens_of(1, 30)
    want = hf_logits(hf, tokens)
    for attention in ("flash", "math"):
        model.setup_caches(1, 64, torch.bfloat16, attention)
        model.prefill(tokens[:, :20], start(0))
        for i in range(20, 25):
            close(model(tokens[:, i:i + 1], start(i)), want[:, i:i + 1], 0.05)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_on_a_cpu_reads_live_tokens_only(
    checkpoint: Checkpoint, dynamo: None, no_inductor: None, compiled: bool
) -> None:
    """What lies beyond may be NaN, which math would carry into each sum."""
    model = loaded(checkpoint)
    tokens = tokens_of(2, 30)
    want = hf_logits(checkpoint("deepseek-v3")[1], tokens)
    cache = model.setup_caches(2, 64)
    if compiled:
        compile_model(model)
    for layer in cache.whole:
        layer.kv.fill_(math.nan)
    model.prefill(tokens[:, :20], start(0, 0))
    for i in range(20, 23):
        close(model.decode(tokens[:, i:i + 1], start(i, i)), want[:, i:i + 1])


@pytest.mark.parametrize("attention", ["flash", "math"])
@pytest.mark.parametrize("name", ["deepseek-v2", "glm4-lite"])
def test_compiled_steps_have_a_graph_for_dense_layers_and_one_for_the_others(
    checkpoint: Checkpoint, name: str, attention: str, dynamo: None, no_inductor: None
) -> None:
    model, (_, hf) = loaded(checkpoint, name), checkpoint(name)
    model.setup_caches(1, 64, attention=attention)
    compile_model(model)
    tokens = tokens_of(1, 30)
    want = hf_logits(hf, tokens)
    model.prefill(tokens[:, :20], start(0))
    for i in range(20, 25):
        close(model.decode(tokens[:, i:i + 1], start(i)), want[:, i:i + 1])
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("rows, k", [(2, 0), (2, 4), (5, 15)])
def test_refilled_rows_and_proposals_say_what_each_says_alone(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, rows: int, k: int
) -> None:
    """Prompts are read in chunks while others run; rejected proposals are written over."""
    monkeypatch.setitem(CHUNK, "cpu", 8)
    monkeypatch.setattr(Gauge, "pays", lambda gauge, n_rows: True)
    model = loaded(checkpoint)
    lengths = [(5, 40), (50, 5), (33, 30), (1, 44), (27, 27)]
    requests = [Request((tokens_of(min(n, 9)).tolist() * n)[:n], new) for n, new in lengths]
    alone = [generate(model, [each.prompt], each.max_new_tokens)[0] for each in requests]
    model.setup_caches(rows, 96)
    said: dict[int, list[int]] = {}
    for number, tokens in Engine(model, speculate_k=k).run(requests):
        said.setdefault(number, []).extend(tokens)
    assert [said[number] for number in range(len(requests))] == alone


def test_a_row_is_copied_and_goes_on_from_a_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = loaded(checkpoint)
    prefix = tokens_of(40).tolist()
    prompts = [prefix + [n, n + 1] for n in (5, 9, 7)]
    alone = [generate(model, [prompt], 8)[0] for prompt in prompts]
    model.setup_caches(3, 96)
    engine = Engine(model)
    said: dict[int, list[int]] = {}
    for number, tokens in engine.run([Request(prompt, 8) for prompt in prompts]):
        said.setdefault(number, []).extend(tokens)
    assert [said[number] for number in range(3)] == alone
    assert engine.stats.shared_tokens > 0
    save_row(model, prefix, tmp_path / "row.safetensors")
    assert (tmp_path / "row.safetensors").stat().st_size < 40 * 3 * (24 + 8) * 4 + 4096
    model.setup_caches(2, 80)
    load_row(model, tmp_path / "row.safetensors")
    assert generate(model, [prompt[40:] for prompt in prompts[:2]], 8, cached=40) == alone[:2]


def test_values_beyond_the_size_of_a_key_are_refused(checkpoint: Checkpoint) -> None:
    hf = json.loads((checkpoint("deepseek-v2")[0] / "config.json").read_text())
    with pytest.raises(ValueError, match="v_head_dim 24 above 20"):
        empty_model(hf | {"v_head_dim": 24})

# --- routers ---


@pytest.mark.parametrize("name", ["deepseek-v3", "ernie-moe"])
def test_the_bias_of_a_router_stays_float32(
    checkpoint: Checkpoint, name: str, tmp_path: Path
) -> None:
    """In a model of bfloat16, quantized, saved and loaded: its differences are small."""
    folder, hf = checkpoint(name)
    [want, *_] = [x for key, x in hf.state_dict().items() if key.endswith("correction_bias")]
    model = load_model(folder, quantize="int8")
    save_quantized(model, tmp_path / "saved")
    for each in (model, model.half(), load_model(tmp_path / "saved")):
        assert torch.equal(each.layers[1].mlp.gate.e_score_correction_bias, want)
        assert each.layers[1].mlp.gate.weight.dtype != torch.float32


@pytest.mark.parametrize("change, message", [
    (dict(n_group=3), "3 of 8 experts cannot be in the best 2 of 3 groups"),
    (dict(topk_group=5), "the best 5 of 4 groups"),
    (dict(topk_group=1), "3 of 8 experts cannot be in the best 1 of 4 groups"),
    (dict(topk_group=None), "topk_group = None"),
    (dict(n_routed_experts=2048, num_hidden_layers=40), "2048 in each of 40 layers"),
])
def test_groups_that_cannot_be_are_refused(
    checkpoint: Checkpoint, change: dict, message: str
) -> None:
    hf = json.loads((checkpoint("deepseek-v3")[0] / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(hf | change)


def test_layers_that_predict_a_further_token_are_left_out(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """They lie behind the last one in files, if the configuration says so."""
    folder, hf = checkpoint("deepseek-v3")
    tensors = load_file(folder / "model.safetensors")
    more = {f"model.layers.3.{name}.weight": torch.ones(2, 2) for name in ("eh_proj", "norm")}
    save_file(tensors | more, tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(ValueError, match="unexpected tensor model.layers.3.eh_proj.weight"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(tmp_path, dtype=torch.float32)
    model.setup_caches(1, 32)
    tokens = tokens_of(1, 20)
    close(model(tokens, start(0)), hf_logits(hf, tokens))


@pytest.mark.parametrize("mode", ["none", "int8"])
def test_a_quantized_model_decodes_as_its_prompt_was_read(
    checkpoint: Checkpoint, mode: str
) -> None:
    """Absorbed products and made keys come of the same weights."""
    model = loaded(checkpoint, "deepseek-v2-lite")
    if mode != "none":
        quantize_model(model, mode)
    tokens = tokens_of(1, 40)
    model.setup_caches(1, 64)
    want = model.prefill(tokens, start(0))
    for i in range(30, 35):
        tol = 0.05 if mode == "int8" else 1e-5
        close(model(tokens[:, i:i + 1], start(i)), want[:, i:i + 1], tol)
