"""The cache: where its layers lie, some of its rows, and what becomes of it."""
from __future__ import annotations

import checks  # before Triton is imported: it says whether Triton interprets

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from checks.common import PROMPTS, close, hf_logits, positions, random_tokens
from generate import Decoder, Request, compile_model, generate
from model import KVCache, LayerCache, Transformer, load_model

Checkpoint = Callable[[str], tuple[Path, PreTrainedModel]]  # the fixture: random ones, by name


def loaded(checkpoint: Checkpoint, name: str = "llama") -> Transformer:
    """A random checkpoint in float32, where parity is exact enough to compare tokens."""
    return load_model(checkpoint(name)[0], dtype=torch.float32)

# --- the cache ---


@pytest.mark.parametrize("max_seq_len", [1, 3, 2047, 2048])
@pytest.mark.parametrize("rows, n_kv_head, head_dim", [(1, 1, 8), (1, 3, 64), (3, 5, 24)])
def test_every_layer_of_an_int8_cache_is_aligned(
    rows: int, n_kv_head: int, head_dim: int, max_seq_len: int
) -> None:
    """torch.compile copies inputs that do not start at 16 bytes. No layers share memory: a view
    into a common storage would be written to in another layer."""
    cache = KVCache(3, n_kv_head, head_dim, rows, max_seq_len, dtype=torch.int8)
    for layer in cache.layers(slice(0, rows)):
        assert layer.kv.data_ptr() % 16 == 0
        assert layer.scale.data_ptr() % 16 == 0
        assert layer.scale.shape == (2, rows, n_kv_head, max_seq_len)
        layer.scale += 1
    assert all((layer.scale == 1).all() for layer in cache.whole)
    storages = {}
    for layer in cache.whole:
        for tensor in (layer.kv, layer.scale, layer.k_mean):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert len(storages) == 9
    assert cache.nbytes == sum(storages.values())


def test_prefill_of_some_rows(checkpoint: Checkpoint) -> None:
    """rows: the others keep what they hold; last: the logits of one token of each row."""
    folder, hf = checkpoint("mistral")
    model = load_model(folder, dtype=torch.float32)
    model.setup_caches(3, 32)
    tokens = random_tokens(3, 30)
    expected = hf_logits(hf, tokens)  # (B, T, vocab)
    model.prefill(tokens, positions(0, 0, 0))
    layers = model.cache.layers(slice(0, 1))
    kept = [layer.kv.clone() for layer in layers]
    swapped = tokens[[2, 1]]  # rows 1 and 2 get the tokens of rows 2 and 1
    model.prefill(swapped[:, :20], positions(0, 0), rows=slice(1, 3), cached=0)
    last = torch.tensor([9, 4])
    got = model.prefill(swapped[:, 20:], positions(20, 20), rows=slice(1, 3), cached=20, last=last)
    close(got, torch.stack([expected[2, 29:30], expected[1, 24:25]]))
    assert all(torch.equal(layer.kv, before) for layer, before in zip(layers, kept, strict=True))


def test_a_copy_of_a_model_has_its_own_attention(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(checkpoint)
    model.setup_caches(1, 32, attention="flash")
    other = copy.copy(model)
    other.setup_caches(1, 32, attention="math")
    assert (model.cache.attention, other.cache.attention) == ("flash", "math")
    calls = []
    flash_decode = LayerCache.flash_decode

    def counted(*args: object, **options: object) -> Tensor:
        calls.append(1)
        return flash_decode(*args, **options)

    monkeypatch.setattr(LayerCache, "flash_decode", counted)
    other(random_tokens(1, 1), positions(0))
    assert len(calls) == 0
    model(random_tokens(1, 1), positions(0))
    assert len(calls) == model.config.n_layer


def test_a_larger_cache_keeps_its_kind(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    model.setup_caches(1, 64, torch.int8, attention="math")
    generate(model, PROMPTS[:2], 4)
    cache = model.cache
    assert cache.max_batch_size >= 2 and cache.max_seq_len >= 64
    assert (cache.dtype, cache.attention) == (torch.int8, "math")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_old_cache_goes_before_the_new_one_comes(
    checkpoint: Checkpoint, compiled: bool, monkeypatch: pytest.MonkeyPatch, no_inductor: None
) -> None:
    model = loaded(checkpoint)
    if compiled:
        compile_model(model)
    memory = [weak(model.setup_caches(1, 32))]
    freed = []
    allocate = KVCache.__init__

    def watched(cache: KVCache, *args: object, **options: object) -> None:
        freed.append(memory.pop().expired())
        allocate(cache, *args, **options)
        memory.append(weak(cache))

    monkeypatch.setattr(KVCache, "__init__", watched)
    model.setup_caches(1, 48)
    generate(model, PROMPTS[:2], 8, compile=compiled)  # two rows: a larger one
    generate(model, PROMPTS[:2], 40, compile=compiled)  # more tokens
    generate(model, PROMPTS, 40, compile=compiled)  # more rows
    assert len(freed) >= 3 and all(freed)


def weak(cache: KVCache) -> StorageWeakRef:
    return StorageWeakRef(cache.whole[0].kv.untyped_storage())


def test_a_row_that_would_begin_before_its_cache_is_refused(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    model.setup_caches(2, 64)
    for n in (20, 1):
        with pytest.raises(ValueError, match="exceed the cache"):
            model(random_tokens(2, n), positions(-1, 3))


def test_padding_is_not_cached(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    model.setup_caches(2, 32)
    model.prefill(random_tokens(2, 10), positions(0, 0), last=torch.tensor([9, 1]))
    with pytest.raises(ValueError, match="10 tokens are not cached"):
        generate(model, [[5], [5]], 2, cached=10)


def test_steps_leave_rows_without_a_request_what_they_have(checkpoint: Checkpoint) -> None:
    """A compiled step works on all rows. A new Decoder knows of them what the cache says."""
    model = loaded(checkpoint)
    cache = model.setup_caches(3, 40)
    generate(model, [PROMPTS[0], [*PROMPTS[0], 7, 8], [5] * 38], 2)
    rows = [(row, n) for row, n in enumerate(cache.cached) if row]
    before = [[layer.kv[:, row, :, :n].clone() for row, n in rows] for layer in cache.whole]
    list(Decoder(model, compiled=True).run([Request([3, 4], 4, cached=2)]))
    for layer, held in zip(cache.whole, before):
        assert all(torch.equal(layer.kv[:, row, :, :n], x) for (row, n), x in zip(rows, held))
