"""torch.compile over many lengths, prompts and sizes of cache: how many graphs there are."""
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from checks.common import PROMPTS, close
from checks.prefill_test import loaded, positions, random_tokens
from generate import compile_model, generate
from model import Transformer

Checkpoint = Callable[[str], tuple[Path, PreTrainedModel]]  # the fixture: random ones, by name


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_compiled_prefill(checkpoint: Checkpoint, dynamo: None) -> None:
    model = loaded(checkpoint, "qwen3")
    eager = [generate(model, [prompt], 6) for prompt in PROMPTS]
    compile_model(model, prefill=True)
    assert [generate(model, [prompt], 6) for prompt in PROMPTS] == eager


def test_prefill_compiles_once_behind_any_prefix(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, dynamo: None, no_inductor: None
) -> None:
    """However many tiles of queries there are: the graphs are one for prompts from the beginning,
    one for those behind a prefix."""
    monkeypatch.setattr("model.QUERY_TILE", 8)
    model = loaded(checkpoint)
    model.setup_caches(1, 96)
    tokens = random_tokens(1, 96)
    eager = [model.prefill(tokens[:, :n], positions(0)) for n in (24, 45)]
    eager += [model.prefill(tokens[:, n:n + m], positions(n)) for n, m in [(40, 30), (45, 51)]]
    compile_model(model, prefill=True)
    model.prefill(tokens[:, :20], positions(0))
    model.prefill(tokens[:, 20:40], positions(20))
    compiled = graphs()
    again = [model.prefill(tokens[:, :n], positions(0)) for n in (24, 45)]
    again += [model.prefill(tokens[:, n:n + m], positions(n)) for n, m in [(40, 30), (45, 51)]]
    assert graphs() == compiled
    for a, b in zip(again, eager):
        close(a, b)


def check_many_cache_sizes(model: Transformer) -> None:
    """More of them than torch.compile allows a function to be compiled anew."""
    eager = generate(model, PROMPTS[:1], 4)
    compile_model(model)
    for size in range(10):
        model.setup_caches(1, 16 + 8 * size)
        assert generate(model, PROMPTS[:1], 4, compile=True) == eager


def test_many_cache_sizes(checkpoint: Checkpoint, dynamo: None, no_inductor: None) -> None:
    check_many_cache_sizes(loaded(checkpoint, "mistral"))


def test_a_cache_that_grows(checkpoint: Checkpoint, dynamo: None, no_inductor: None) -> None:
    """The same where generate itself replaces the cache, in a model whose layers differ."""
    model = loaded(checkpoint, "qwen2-window")
    eager = generate(model, PROMPTS[:1], 60)[0]
    model.cache = None
    compile_model(model)
    for n in range(4, 60, 10):
        assert generate(model, PROMPTS[:1], n, compile=True) == [eager[:n]]


@pytest.fixture
def torch_2_11(
    monkeypatch: pytest.MonkeyPatch, dynamo: None, no_inductor: None
) -> Iterator[None]:
    """torch.compile as before torch 2.13: without a limit and a cache for each call."""
    compiled = torch.compile

    def of_2_11(
        model: Callable, *, fullgraph: bool = False, dynamic: bool | None = None,
        options: dict | None = None,
    ) -> Callable:
        return compiled(model, fullgraph=fullgraph, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", of_2_11)
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


def test_many_cache_sizes_under_an_older_torch(checkpoint: Checkpoint, torch_2_11: None) -> None:
    check_many_cache_sizes(loaded(checkpoint, "mistral"))


def test_what_was_compiled_before_is_not_taken_for_what_is_compiled_anew(
    checkpoint: Checkpoint, torch_2_11: None
) -> None:
    """Guards do not look at hooks."""
    model = loaded(checkpoint)
    plain = generate(model, PROMPTS[:1], 8)
    compile_model(model)
    assert generate(model, PROMPTS[:1], 8, compile=True) == plain
    for block in model.layers:
        block.register_forward_hook(lambda block, inputs, output: inputs[0] - output)
    hooked = generate(model, PROMPTS[:1], 8, compile=False)
    assert hooked != plain
    compile_model(model)
    assert generate(model, PROMPTS[:1], 8, compile=True) == hooked


def test_generate_compiles_where_that_is_asked_and_does_not_where_it_is_not(
    checkpoint: Checkpoint, dynamo: None, no_inductor: None
) -> None:
    model = loaded(checkpoint)
    eager = generate(model, PROMPTS[:1], 4)
    assert not graphs()
    assert generate(model, PROMPTS[:1], 4, compile=True) == eager
    made = graphs()
    assert made
    model.cache = None
    assert generate(model, PROMPTS, 6, compile=False)[0][:4] == eager[0]
    assert graphs() == made


def test_generate_leaves_a_model_compiled_that_is(
    checkpoint: Checkpoint, dynamo: None, no_inductor: None
) -> None:
    """And then its steps have one shape: rows that end one by one compile nothing anew."""
    model = loaded(checkpoint)
    compile_model(model)
    generate(model, PROMPTS[:3], 4)
    made = graphs()
    generate(model, PROMPTS[:3], 6, stream=lambda number, ids: False if number else None)
    assert graphs() == made
