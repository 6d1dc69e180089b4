"""What README shows runs as it stands, and takes effect."""
from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import generate
import model
from checks.common import HERE, PROMPTS, hf_folder
from generate import FILTERS, Filter, Request
from model import FAMILIES, FORMATS, load_model
from quantize import save_quantized

README = (HERE / "README.md").read_text()
Checkpoint = Callable[[str], tuple[Path, PreTrainedModel]]  # the fixture: random ones, by name


def code_behind(words: str) -> str:
    """The first indented block behind some words of README."""
    _, _, rest = README.partition(words)
    return textwrap.dedent(re.search(r"\n\n((?: {4}.*\n|\n)+)", rest)[1])


def run_code(words: str) -> dict[str, Any]:
    """The names that a snippet makes, with those around it that a fork's file has."""
    names = {**vars(generate), **vars(model)}
    exec(code_behind(words), names)
    return names


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What snippets add to tables is gone behind a test."""
    for table in (FAMILIES, FORMATS, FILTERS):
        for key in [*table, "likely", "normed", "gated", torch.float8_e4m3fn]:
            if key in table:
                monkeypatch.setitem(table, key, table[key])
            else:
                monkeypatch.setitem(table, key, None)
                monkeypatch.delitem(table, key)


def test_the_snippet_for_programs_runs(capsys: pytest.CaptureFixture) -> None:
    run_code("## From Python")
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_a_file_of_a_fork_is_imported_where_readme_says(tmp_path: Path) -> None:
    """Of the program, which is __main__ while it imports that file."""
    assert "imports above its last `if`:" in README
    words = ("**A sampler**", "**A cache**", "**A family**", "**An attention layer**")
    imports = (
        "import torch\nfrom generate import FILTERS, Filter\n"
        "from model import FAMILIES, FORMATS, Attention, Family, LayerCache, Transformer\n"
    )
    (tmp_path / "mine.py").write_text(imports + "".join(map(code_behind, words)))
    for name in ("model.py", "kernels.py", "quantize.py"):
        shutil.copy(HERE / name, tmp_path)
    above, last, below = (HERE / "generate.py").read_text().rpartition("if __name__")
    (tmp_path / "generate.py").write_text(f"{above}import mine\n{last}{below}")
    run = [sys.executable, tmp_path / "generate.py", "--help"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_added_sampler_drops_unlikely_tokens() -> None:
    request = Request([5], 1, 1.0)
    logits = torch.tensor([[0.0, -1.0, -9.0]]).repeat(4000, 1)
    position = torch.arange(4000, dtype=torch.int32)

    def drawn() -> set[int]:
        sampling = generate.Sampling.of([request] * 4000, torch.device("cpu"))
        kind = generate.kind_of([request])
        return set(generate.sample(logits, sampling, kind, position).tolist())

    FILTERS["likely"] = Filter(lambda probs, least: probs, 3e-4)
    run_code("**A sampler**")
    assert drawn() == {0, 1}


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("attention", ["flash", "math"])
def test_the_float8_cache_works(checkpoint: Checkpoint, name: str, attention: str) -> None:
    names = run_code("**A cache**")
    loaded = load_model(checkpoint(name)[0], dtype=torch.float32)
    plain = generate.generate(loaded, PROMPTS, 8)
    cache = loaded.setup_caches(3, 64, torch.float8_e4m3fn, attention)
    assert type(cache.whole[0]) is names["Float8LayerCache"]
    assert [len(text) for text in generate.generate(loaded, PROMPTS, 8)] == [8, 8, 8]
    loaded.setup_caches(3, 64, attention=attention)
    assert generate.generate(loaded, PROMPTS, 8) == plain


def test_a_family_with_a_norm_behind_the_embedding_loads(tmp_path: Path) -> None:
    names = run_code("**A family**")
    from safetensors.torch import load_file, save_file
    folder = hf_folder(tmp_path / "model", model_type="normed", architectures=None)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    weight = torch.linspace(0.5, 2, tensors["model.norm.weight"].numel())
    save_file(tensors | {"model.embed_norm.weight": weight}, file, {"format": "pt"})
    loaded = load_model(folder, dtype=torch.float32)
    assert type(loaded) is names["NormedEmbedding"]
    assert torch.equal(loaded.embed_norm.weight, weight)
    x = loaded.embed(torch.tensor([[3, 4]]))
    rms = x.div(weight).square().mean(-1).sqrt()
    assert torch.allclose(rms, torch.ones(1, 2), atol=1e-3)


def test_gates_of_heads_take_effect(tmp_path: Path) -> None:
    run_code("**An attention layer**")
    from safetensors.torch import load_file, save_file
    folder = hf_folder(tmp_path / "model")
    plain = generate.generate(load_model(folder, dtype=torch.float32), PROMPTS, 8)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"gated"'))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    n_head, n_layer = 4, 2

    def tokens(gate: float) -> list[list[int]]:
        gates = {
            f"model.layers.{i}.self_attn.gates": torch.full((n_head, 1), gate)
            for i in range(n_layer)
        }
        save_file(tensors | gates, file, {"format": "pt"})
        return generate.generate(load_model(folder, dtype=torch.float32), PROMPTS, 8)

    assert generate.generate(load_model(folder, dtype=torch.float32), PROMPTS, 8) == plain
    assert tokens(1.0) == plain
    assert tokens(-2.0) != plain
    quantized = load_model(folder, dtype=torch.float32, quantize="int8")
    save_quantized(quantized, tmp_path / "saved")
    again = load_model(tmp_path / "saved", dtype=torch.float32)
    assert (again.layers[1].self_attn.gates == -2).all()


