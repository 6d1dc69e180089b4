"""Loading: what memory it asks for, and which checkpoint is the default one."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import model as model_module
from checks.common import PROMPTS, hf_folder, hf_logits
from generate import generate
from model import load_model


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_memory_is_asked_for_what_loading_takes(
    tied: bool, quantize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any precision, and an output layer that is the embedding once."""
    shape = dict(hidden_size=128, intermediate_size=256, vocab_size=512)
    folder = hf_folder(tmp_path / "model", tie_word_embeddings=tied, **shape)
    asked = []
    monkeypatch.setattr(model_module, "require_memory", lambda nbytes, *_: asked.append(nbytes))
    model = load_model(folder, dtype=torch.float32, quantize=quantize)
    tensors = {id(x): x.nbytes for x in [*model.parameters(), *model.buffers()]}
    assert 0.4 * sum(tensors.values()) < asked[0] < 1.05 * sum(tensors.values())


def test_a_tied_output_layer_has_a_bias_of_its_own(tmp_path: Path) -> None:
    config = transformers.PhiConfig(
        vocab_size=131, hidden_size=96, num_hidden_layers=2, num_attention_heads=6,
        intermediate_size=72, tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    hf = transformers.PhiForCausalLM(config).eval()
    torch.nn.init.normal_(hf.lm_head.bias)
    hf.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    model.setup_caches(1, 32)
    tokens = torch.arange(20)[None]
    got = model(tokens, torch.zeros(1, dtype=torch.int32))
    assert torch.allclose(got, hf_logits(hf, tokens), atol=2e-4)


def test_the_current_folder_is_not_the_default_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hf_folder(tmp_path / "model"))
    monkeypatch.setattr(model_module, "__file__", str(tmp_path / "model.py"))  # without folders
    with pytest.raises(ValueError, match="no folder formats"):
        load_model()
    assert generate(load_model("."), PROMPTS[:1], 2)
