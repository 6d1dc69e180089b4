"""The model, generation and the command line; `python tests.py` runs this file and checks/.

Arguments go to pytest, as in `python tests.py -k cache`; where one names a file, only that runs.
Without a GPU the Triton kernels run in Triton's interpreter; with one the tests also run there.
"""
import checks  # before Triton is imported: it says whether Triton interprets

import ast
import copy
import dataclasses
import functools
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from checks.common import CHECKPOINTS, CONFIG, CPU_ENV, DEVICES, HERE, PROMPTS
from checks.common import close, hf_logits, run_cli
from engine import Engine, compile_model
from formats.tokenizer import Tokenizer
from generate import generate
from kernels import flash_decode_reference
from model import FAMILIES, Block, KVCache, LayerCache, Transformer, load_model
from sampling import Request, Sampling, kind_of, sample

Checkpoint = Callable[[str], tuple[Path, PreTrainedModel]]  # the fixture: random ones, by name
Run = tuple[int, str, str]  # exit code, stdout, stderr

# --- every family equals transformers ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attention", ["flash", "math"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_equals_transformers(
    checkpoint: Checkpoint, name: str, attention: str, device: str
) -> None:
    """Prefill, token by token, several at once, and rows of one batch at different depths."""
    folder, hf = checkpoint(name)
    model = load_model(folder, device=device, dtype=torch.float32)
    model.setup_caches(3, 64, attention=attention, rings=False)  # rows go back to any token
    tokens = random_tokens(3, 40)
    expected = hf_logits(hf, tokens)  # (B, T, vocab)

    def check(depths: list[int], n: int) -> None:
        """n tokens of each row, row b's behind depths[b] cached ones."""
        chunk = torch.stack([tokens[b, at:at + n] for b, at in enumerate(depths)])
        want = torch.stack([expected[b, at:at + n] for b, at in enumerate(depths)])
        close(model(chunk.to(device), positions(*depths, device=device)), want)

    check([0, 0, 0], 20)
    for depth in range(20, 25):
        check([depth, depth, depth], 1)
    check([25, 25, 25], 5)
    check([20, 20, 20], 20)  # a chunk of a prompt behind a cached prefix
    check([3, 39, 17], 1)
    check([5, 22, 0], 18)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3"])
def test_greedy_equals_transformers(checkpoint: Checkpoint, name: str) -> None:
    """A ragged batch gives each prompt what it gets alone in transformers."""
    folder, hf = checkpoint(name)
    model = load_model(folder, dtype=torch.float32)
    torch.manual_seed(2)
    prompts = [torch.randint(3, 131, (n,)).tolist() for n in (1, 13, 30, 2)]
    settings = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    for prompt, new in zip(prompts, generate(model, prompts, 20)):
        want = hf.generate(torch.tensor([prompt]), min_new_tokens=20, **settings)
        assert new == want[0, len(prompt):].tolist()


def random_tokens(*shape: int) -> Tensor:
    """Tokens of the random checkpoints' vocabulary, the same at every call."""
    return torch.randint(131, shape, generator=torch.Generator().manual_seed(1))


def positions(*depths: int, device: str = "cpu") -> Tensor:
    """input_pos: how many tokens each row has cached."""
    return torch.tensor(depths, dtype=torch.int32, device=device)


def loaded(checkpoint: Checkpoint, name: str = "llama") -> Transformer:
    """A random checkpoint in float32, where parity is exact enough to compare tokens."""
    return load_model(checkpoint(name)[0], dtype=torch.float32)

# --- the cache ---


def test_context_beyond_memory(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    with pytest.raises(ValueError, match="KV cache of 1 x 10000000000 tokens needs .* GB"):
        model.setup_caches(1, 10**10)


def test_cache_overflow_is_refused(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    with pytest.raises(ValueError, match="setup_caches"):
        model(random_tokens(1, 1), positions(0))
    model.setup_caches(1, 8)
    with pytest.raises(ValueError, match="exceed the cache of 8"):
        model(random_tokens(1, 5), positions(4))


@pytest.mark.parametrize("attention", ["flash", "math"])
def test_dead_positions_are_never_seen(checkpoint: Checkpoint, attention: str) -> None:
    """What lies beyond a row's live length does not change its logits, whatever the capacity."""
    model = loaded(checkpoint)
    tokens = random_tokens(1, 30)

    def decode(capacity: int, poison: float) -> Tensor:
        model.setup_caches(1, capacity, attention=attention)
        model.cache.kv.fill_(poison)
        model(tokens[:, :20], positions(0))
        steps = [model(tokens[:, i:i + 1], positions(i)) for i in range(20, 25)]
        return torch.cat(steps)

    clean = decode(32, 0.0)
    close(decode(32, 1e4), clean, 1e-5)
    close(decode(96, -1e4), clean, 1e-5)


def test_a_cache_needs_no_model() -> None:
    """Plain integers make one, and flash_decode runs through its layers."""
    cache = KVCache(2, 2, 16, max_batch_size=3, max_seq_len=32, dtype=torch.float32)
    assert len(cache.layers(slice(0, 3))) == 2
    torch.manual_seed(0)
    for layer, kv in zip(cache.layers(slice(1, 3)), cache.kv):
        q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16)
        kv.normal_()
        # the reference appends too: it gets a copy of rows 1 and 2
        keys, values = kv[:, 1:3].clone()
        want = flash_decode_reference(q, keys, values, positions(5, 20), k, v)
        close(layer.flash_decode(q, k, v, positions(5, 20)), want, 1e-5)
        assert torch.equal(kv[0, 1:3], keys) and torch.equal(kv[1, 1:3], values)


@pytest.mark.parametrize("max_seq_len", [1, 3, 2047, 2048])
@pytest.mark.parametrize("rows, n_kv_head, head_dim", [(1, 1, 8), (1, 3, 64), (3, 5, 24)])
def test_every_layer_of_an_int8_cache_is_aligned(
    rows: int, n_kv_head: int, head_dim: int, max_seq_len: int
) -> None:
    """torch.compile copies inputs that do not start at 16 bytes. No layer's values share memory."""
    cache = KVCache(3, n_kv_head, head_dim, rows, max_seq_len, dtype=torch.int8)
    for layer in cache.layers(slice(0, rows)):
        assert layer.kv.data_ptr() % 16 == 0
        assert layer.scale.data_ptr() % 16 == 0
        assert layer.scale.shape == (2, rows, n_kv_head, max_seq_len)
        layer.scale += 1
    assert (cache.scale == 1).all()
    allocated = cache.kv.untyped_storage().nbytes() + cache.scale.untyped_storage().nbytes()
    assert cache.nbytes == allocated


def test_two_caches_in_turn(checkpoint: Checkpoint) -> None:
    """model(..., cache) reads and writes the cache that it is given, and no other."""
    folder, hf = checkpoint("llama")
    model = load_model(folder, dtype=torch.float32)
    first, second = random_tokens(2, 1, 30)
    texts = [(first, model.setup_caches(1, 32)), (second, model.setup_caches(1, 48))]
    for tokens, cache in texts:
        close(model(tokens[:, :20], positions(0), cache), hf_logits(hf, tokens)[:, :20])
    for i in range(20, 25):
        for tokens, cache in texts:
            close(model(tokens[:, i:i + 1], positions(i), cache), hf_logits(hf, tokens)[:, i:i + 1])


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
    model.prefill(swapped[:, :20], positions(0, 0), rows=slice(1, 3), start=0)
    last = torch.tensor([9, 4])
    got = model.prefill(swapped[:, 20:], positions(20, 20), rows=slice(1, 3), start=20, last=last)
    close(got, torch.stack([expected[2, 29:30], expected[1, 24:25]]))
    assert all(torch.equal(layer.kv, before) for layer, before in zip(layers, kept, strict=True))


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that an operator makes."""

    n = 0

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.n = max(self.n, out.numel())
        return out


@pytest.mark.parametrize("backend", [None, SDPBackend.MATH], ids=["default", "math"])
@pytest.mark.parametrize("name, cached", [
    ("llama", 0), ("llama", 30), ("mistral", 0), ("gemma2", 0), ("gemma2", 30),
])
def test_prefill_never_holds_all_scores(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, name: str, cached: int,
    backend: SDPBackend | None,
) -> None:
    """Not from the beginning, behind a prefix or with a window, and not if PyTorch has no kernel
    that does without them; the logits are the same."""
    model = loaded(checkpoint, name)
    model.setup_caches(1, 80)
    tokens = random_tokens(1, 80)
    last = torch.tensor([49])

    def prefill() -> Tensor:
        if cached:
            model.prefill(tokens[:, :cached], positions(0))
        return model.prefill(tokens[:, cached:cached + 50], positions(cached), last=last)

    want = prefill()
    bound = 50 * 160  # the product with most outputs
    assert model.config.n_head * 50 * (cached + 50) > bound
    monkeypatch.setattr("model.MAX_SCORES", bound)
    with nullcontext() if backend is None else sdpa_kernel(backend), Largest() as largest:
        close(prefill(), want, 1e-5)
    assert largest.n <= bound


@pytest.fixture
def tokens_before_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's result lies in memory as that of PyTorch's memory-efficient kernels on a GPU."""
    attention = F.scaled_dot_product_attention

    def as_on_a_gpu(*args: Any, **options: Any) -> Tensor:
        return attention(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", as_on_a_gpu)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("tile", [1, 7, 50])
def test_tiles_of_queries_change_nothing(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tokens_before_heads: None, name: str,
    tile: int,
) -> None:
    """Nor rows of different depths."""
    monkeypatch.setattr("model.QUERY_TILE", tile)
    folder, hf = checkpoint(name)
    model = load_model(folder, dtype=torch.float32)
    model.setup_caches(2, 64)
    tokens = random_tokens(2, 60)
    close(model.prefill(tokens[:, :20], positions(0, 0)), hf_logits(hf, tokens)[:, :20])
    behind = torch.stack((tokens[0, 20:60], tokens[1, 9:49]))
    logits = model.prefill(behind, positions(20, 9))
    close(logits[:1], hf_logits(hf, tokens[:1])[:, 20:])
    close(logits[1:], hf_logits(hf, tokens[1:])[:, 9:49])


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
    memory = [StorageWeakRef(model.setup_caches(1, 32).kv.untyped_storage())]
    freed = []
    allocate = KVCache.__init__

    def watched(cache: KVCache, *args: object, **options: object) -> None:
        freed.append(memory.pop().expired())
        allocate(cache, *args, **options)
        memory.append(StorageWeakRef(cache.kv.untyped_storage()))

    monkeypatch.setattr(KVCache, "__init__", watched)
    model.setup_caches(1, 48)
    generate(model, PROMPTS[:2], 8, compile=compiled)  # two rows: a larger one
    generate(model, PROMPTS[:2], 40, compile=compiled)  # more tokens
    generate(model, PROMPTS, 40, compile=compiled)  # more rows
    assert len(freed) >= 3 and all(freed)

# --- sampling ---


PROBABILITIES = [0.5, 0.3, 0.15, 0.05]


def request(prompt: list[int] = PROMPTS[0], n: int = 12, **settings: object) -> Request:
    return Request(prompt, n, **settings)


def draw(logits: Tensor, requests: list[Request], kind: str | None = None) -> Tensor:
    """A token [B] for each row of logits [B, V], always with the same random numbers, of one
    stream."""
    requests = [dataclasses.replace(each, seed=0) for each in requests]
    sampling = Sampling.of(requests, logits.shape[1], torch.device("cpu"))
    position = torch.arange(len(requests), dtype=torch.int32)
    return sample(logits, sampling, kind or kind_of(requests), position)


def draws(settings: dict, n: int = 4000) -> Tensor:
    """How often each token of PROBABILITIES is drawn."""
    logits = torch.tensor(PROBABILITIES).log().repeat(n, 1)
    picks = draw(logits, [request(**settings)] * n)
    return torch.bincount(picks, minlength=len(PROBABILITIES)) / n


@pytest.mark.parametrize("settings, want", [
    (dict(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
    (dict(temperature=0.0), [1, 0, 0, 0]),
    (dict(temperature=0.5), [0.685, 0.247, 0.062, 0.007]),
    (dict(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0]),
    (dict(temperature=1.0, top_k=9), [0.5, 0.3, 0.15, 0.05]),
    (dict(temperature=1.0, top_p=0.5), [1, 0, 0, 0]),
    (dict(temperature=1.0, top_p=0.6), [0.625, 0.375, 0, 0]),
    (dict(temperature=1.0, top_p=0.01), [1, 0, 0, 0]),
    (dict(temperature=1.0, min_p=0.5), [0.625, 0.375, 0, 0]),
    (dict(temperature=1.0, min_p=1.0), [1, 0, 0, 0]),
    (dict(temperature=1.0, top_k=3, top_p=0.9, min_p=0.5), [0.625, 0.375, 0, 0]),
], ids=str)
def test_sampling_distribution(settings: dict, want: list[float]) -> None:
    got = draws(settings)
    expected = torch.tensor(want)
    assert (got - expected).abs().max() < 0.03
    assert torch.equal(got > 0, expected > 0)


SETTINGS = [
    dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p
    in itertools.product((0.0, 0.7, 1.5), (None, 1, 40, 700), (None, 0.4, 1.0), (None, 0.1))
]


def test_a_few_kinds_of_step_draw_for_all_settings() -> None:
    requests = [request(**settings) for settings in SETTINGS]
    pairs = itertools.combinations_with_replacement(requests, 2)
    assert len({kind_of(pair) for pair in pairs}) <= 4


def test_settings_differ_by_row() -> None:
    """A row draws what it draws among rows like itself, and a greedy one the likeliest token."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(len(SETTINGS), 1000)
    requests = [request(**settings) for settings in SETTINGS]
    together = draw(logits, requests)
    for row, mine in enumerate(requests):
        alone = draw(logits, [mine] * len(requests))
        assert together[row] == alone[row]
        if mine.temperature == 0:
            assert together[row] == logits[row].argmax()


def test_a_cheaper_kind_of_step_draws_the_same() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(len(SETTINGS), 1000)
    for mine in (request(**settings) for settings in SETTINGS):
        requests = [mine] * len(logits)
        assert torch.equal(draw(logits, requests), draw(logits, requests, "filtered"))

# --- generate ---


def test_generate_stops_at_eos_per_row(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    free = generate(model, PROMPTS, 12)
    eos = {free[0][3], free[2][7]}
    streamed = [[], [], []]

    def stream(row: int, ids: list[int]) -> None:
        streamed[row].extend(ids)

    out = generate(model, PROMPTS, 12, eos_ids=eos, stream=stream)
    for row, full in zip(out, free):
        ends = [i for i, token in enumerate(full) if token in eos]
        assert row == full[:min(ends, default=11) + 1]
    assert streamed == out and len(out[0]) <= 4


def test_seeds(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)

    def answers(seed: int | None) -> list[list[int]]:
        return generate(model, PROMPTS, 10, temperature=1.5, top_p=0.95, seed=seed)

    assert answers(1) == answers(1) != answers(2)
    assert answers(None) != answers(None)


def test_generate_continues_a_cache(checkpoint: Checkpoint) -> None:
    """Feeding a conversation turn by turn gives what feeding it whole gives."""
    model = loaded(checkpoint, "mistral")
    ids = random_tokens(45).tolist()
    whole = generate(model, [ids], 8)
    model.setup_caches(1, 60)
    generate(model, [ids[:20]], 1)
    assert generate(model, [ids[20:]], 8, cached=20) == whole


def test_long_prompts_prefill_in_chunks(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(checkpoint)
    whole = generate(model, PROMPTS, 8)
    monkeypatch.setattr("engine.PREFILL_CHUNK", 7)
    assert generate(model, PROMPTS, 8) == whole


def test_context_ends_generation(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    model.setup_caches(3, 34)
    assert [len(row) for row in generate(model, PROMPTS, 30)] == [30, 30, 4]
    model.setup_caches(3, 30)
    with pytest.raises(ValueError, match="30 tokens leaves no room"):
        generate(model, PROMPTS, 5)


@pytest.mark.parametrize("prompts, n, message", [
    ([], 5, "no prompt"),
    ([[]], 5, "empty"),
    ([[3], [131]], 5, "token 131"),
    ([[-1]], 5, "token -1"),
    ([[3]], 0, "max_new_tokens"),
])
def test_generate_refuses_before_it_allocates(
    checkpoint: Checkpoint, prompts: list[list[int]], n: int, message: str
) -> None:
    model = loaded(checkpoint)
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, n)
    assert model.cache is None


# --- the engine ---
REQUESTS = [
    request(PROMPTS[0], 9),
    request(PROMPTS[2], 2),
    request(PROMPTS[1], 14),
    request([40, 41], 1),
    request(list(range(60, 77)), 30),
    request(list(range(90, 130)), 5),
]


def alone(model: Transformer, requests: list[Request]) -> list[list[int]]:
    """What generate gives to each greedy request by itself."""
    return [generate(model, [each.prompt], each.max_new_tokens)[0] for each in requests]


def test_rows_inserted_at_different_times(checkpoint: Checkpoint) -> None:
    """A prefill of one row is nothing to the others: each gets what it gets alone."""
    model = loaded(checkpoint, "mistral")
    requests = [request(prompt, 16) for prompt in PROMPTS]
    expected = alone(model, requests)
    model.setup_caches(3, 64)
    engine = Engine(model)
    got = [[], [], []]
    for row in (1, 0, 2):
        engine.insert(row, [requests[row]])
        got[row].append(int(engine.token[row]))
        started = [row for row in range(3) if got[row]]
        for _ in range(4):
            engine.step()
            for row in started:
                got[row].append(int(engine.token[row]))
    assert [len(tokens) for tokens in got] == [9, 13, 5]
    for tokens, want in zip(got, expected):
        assert tokens == want[:len(tokens)]


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_more_requests_than_rows(checkpoint: Checkpoint, rows: int) -> None:
    """Rows that are free take what waits; no request feels its neighbours or its predecessor."""
    model = loaded(checkpoint, "qwen3")
    expected = alone(model, REQUESTS)
    assert collect(model, REQUESTS, rows) == expected


def test_a_request_ends_at_its_own_eos(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    requests = []
    expected = []
    for each, full in zip(REQUESTS, alone(model, REQUESTS)):
        eos = full[len(full) // 2]
        requests.append(dataclasses.replace(each, eos_ids=frozenset({eos})))
        expected.append(full[:full.index(eos) + 1])
    assert collect(model, requests, rows=3) == expected


def test_greedy_rows_beside_sampled_ones(checkpoint: Checkpoint) -> None:
    """Rows may differ in their settings; the greedy ones get exactly their tokens."""
    model = loaded(checkpoint)
    expected = alone(model, REQUESTS)
    sampled = [
        request(temperature=1.0),
        request(temperature=2.0, top_k=5),
        request(temperature=0.7, top_p=0.9, min_p=0.01),
    ]
    mixed = [each for pair in zip(REQUESTS, sampled * 2) for each in pair]
    got = collect(model, mixed, rows=3)
    assert got[::2] == expected
    assert all(len(tokens) == 12 for tokens in got[1::2])


def test_inserted_by_hand_or_by_run(checkpoint: Checkpoint) -> None:
    """Rows that insert was given step as run has them step, sampled ones too."""
    model = loaded(checkpoint)
    mine = request(PROMPTS[0], 12, temperature=1.5, top_p=0.9)
    model.setup_caches(1, 64)
    want = generate(model, [mine.prompt], 12, temperature=1.5, top_p=0.9, seed=3)[0]
    engine = Engine(model)
    engine.insert(0, [dataclasses.replace(mine, seed=3)])
    got = [int(engine.token)]
    for _ in range(11):
        engine.step()
        got.append(int(engine.token))
    assert got == want


def test_generate_with_an_engine(checkpoint: Checkpoint) -> None:
    """A series of calls shares one; prompts beyond its rows wait their turn."""
    model = loaded(checkpoint)
    expected = generate(model, PROMPTS, 12)
    model.setup_caches(2, 64)
    engine = Engine(model)
    assert generate(model, PROMPTS, 12, engine=engine) == expected
    sampled = generate(model, PROMPTS, 12, temperature=1.5, seed=1, engine=engine)
    assert generate(model, PROMPTS, 12, engine=engine) == expected
    again = generate(model, PROMPTS, 12, temperature=1.5, seed=1, engine=engine)
    assert again == sampled != expected


def collect(model: Transformer, requests: list[Request], rows: int) -> list[list[int]]:
    """What an engine of that many rows yields for each request."""
    model.setup_caches(rows, 64)
    out = [[] for _ in requests]
    for number, tokens in Engine(model).run(requests):
        out[number] += tokens
    return out

# --- compile ---


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("attention", ["flash", "math"])
def test_compiled_decode(checkpoint: Checkpoint, attention: str, dynamo: None) -> None:
    """The blocks share one graph; neither prompts nor positions nor batches compile another."""
    model = loaded(checkpoint, "qwen2")
    eager = [generate(model, [prompt], 12)[0] for prompt in PROMPTS]
    model.setup_caches(2, 64, attention=attention)
    compile_model(model)
    for picked in ([0, 1], [2], [1, 2], [0]):
        prompts = [PROMPTS[i] for i in picked]
        assert generate(model, prompts, 12, compile=True) == [eager[i] for i in picked]
    assert graphs() == 1


def test_a_compiled_row_attends_without_python(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, dynamo: None
) -> None:
    """In one graph for every length, up to the last place of the cache."""
    model = loaded(checkpoint)
    tokens = random_tokens(1, 24)
    model.setup_caches(1, 24)
    eager = [model.decode(tokens[:, i:i + 1], positions(i)) for i in range(24)]
    monkeypatch.setattr("cache.flash_decode", None)
    compile_model(model)
    for i, expected in enumerate(eager):
        close(model.decode(tokens[:, i:i + 1], positions(i)), expected)
    assert graphs() == 1


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


def test_many_cache_sizes(checkpoint: Checkpoint, dynamo: None, no_inductor: None) -> None:
    """More of them than torch.compile allows a function to be compiled anew."""
    model = loaded(checkpoint, "mistral")
    eager = generate(model, PROMPTS[:1], 4)
    compile_model(model)
    for size in range(10):
        model.setup_caches(1, 16 + 8 * size)
        assert generate(model, PROMPTS[:1], 4, compile=True) == eager


def test_a_cache_that_grows(checkpoint: Checkpoint, dynamo: None, no_inductor: None) -> None:
    """The same where generate itself replaces the cache, in a model whose layers differ."""
    model = loaded(checkpoint, "qwen2-window")
    eager = generate(model, PROMPTS[:1], 60)[0]
    model.cache = None
    compile_model(model)
    for n in range(4, 60, 10):
        assert generate(model, PROMPTS[:1], n, compile=True) == [eager[:n]]

# --- what a fork changes is obeyed ---


class Halved(Block):
    """A block that adds half of what it computes."""

    def forward(self, x: Tensor, *where: object) -> Tensor:
        return (x + super().forward(x, *where)) / 2


def decode_logits(model: Transformer, compiled: bool) -> Tensor:
    """One step of decode behind a prompt of 9 tokens."""
    model.setup_caches(1, 32)
    if compiled:
        compile_model(model)
    tokens = random_tokens(1, 10)
    model.prefill(tokens[:, :9], positions(0))
    return model.decode(tokens[:, 9:], positions(9))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_hooks_on_blocks_fire(checkpoint: Checkpoint, compiled: bool, dynamo: None) -> None:
    """Forward hooks change what a block returns, in prefill and in decode; one graph for all."""
    expected = decode_logits(with_blocks(checkpoint, Halved), compiled=False)
    model = loaded(checkpoint)
    fired = torch.zeros(1)

    def halve(block: Block, args: tuple, output: Tensor) -> Tensor:
        fired.add_(1)
        return (args[0] + output) / 2

    for block in model.layers:
        block.register_forward_hook(halve)
    close(decode_logits(model, compiled), expected, 1e-5)
    assert fired == 2 * model.config.n_layer
    assert graphs() == (1 if compiled else 0)


def test_compile_model_anew_takes_later_hooks(
    checkpoint: Checkpoint, dynamo: None, no_inductor: None
) -> None:
    expected = decode_logits(with_blocks(checkpoint, Halved), compiled=False)
    model = loaded(checkpoint)
    decode_logits(model, compiled=True)

    def halve(block: Block, args: tuple, output: Tensor) -> Tensor:
        return (args[0] + output) / 2

    for block in model.layers:
        block.register_forward_hook(halve)
    close(decode_logits(model, compiled=True), expected, 1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("how", ["family", "class"])
def test_a_block_of_ones_own(
    checkpoint: Checkpoint, how: str, compiled: bool, dynamo: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A subclass's forward is what runs, given to a family or swapped in; one graph for all."""
    plain = decode_logits(loaded(checkpoint), compiled=False)
    expected = decode_logits(with_blocks(checkpoint, Halved), compiled=False)
    assert (expected - plain).abs().max() > 0.1
    if how == "class":
        model = with_blocks(checkpoint, Halved)
    else:
        family = dataclasses.replace(FAMILIES["llama"], block=Halved)
        monkeypatch.setitem(FAMILIES, "llama", family)
        model = loaded(checkpoint)
    close(decode_logits(model, compiled), expected, 1e-5)
    assert graphs() == (1 if compiled else 0)


def with_blocks(checkpoint: Checkpoint, kind: type[Block]) -> Transformer:
    model = loaded(checkpoint)
    for block in model.layers:
        block.__class__ = kind
    return model

# --- the real model ---


def test_capital_of_france(smollm: tuple[Transformer, Tokenizer]) -> None:
    model, tokenizer = smollm
    ids = tokenizer.encode("The capital of France is")
    assert tokenizer.decode(generate(model, [ids], 2)[0]) == " Paris."
    ids = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    out = generate(model, [ids], 50, eos_ids=tokenizer.eos_ids)[0]
    assert tokenizer.decode(out) == "The capital of France is Paris." and out[-1] == 2

# --- the command line ---


@pytest.fixture
def cli(capfd: pytest.CaptureFixture) -> Callable[..., Run]:
    """generate.py's main on the CPU."""
    return functools.partial(run_cli, capfd, "--device", "cpu")


def test_default_run(cli: Callable[..., Run]) -> None:
    code, out, err = cli()
    assert code == 0 and out == "The capital of France is Paris.\n"
    for said in ("tokens/s", "first token after", "peak memory"):
        assert said in err


def test_prompts_file(
    cli: Callable[..., Run], tmp_path: Path, smollm: tuple[Transformer, Tokenizer]
) -> None:
    model, tokenizer = smollm
    lines = [
        "The capital of France is",
        "One, two,",
        "The capital of Italy, a country in southern Europe, is",
    ]
    file = tmp_path / "p.txt"
    file.write_text("\n\n".join(lines) + "\n")
    alone = []
    for line in lines:
        new = generate(model, [tokenizer.encode(line)], 6)[0]
        alone.append(tokenizer.decode(new))
    words = ["--quantize", "none", "--batch_size", 2, "--max_new_tokens", 6]
    code, out, err = cli("--prompts", file, *words, "--json")
    records = sorted(map(json.loads, out.splitlines()), key=lambda record: record["index"])
    assert code == 0 and [record["text"] for record in records] == alone
    assert {record["finish_reason"] for record in records} == {"length"}
    assert "18 new tokens" in err
    code, out, _ = cli("--prompts", file, *words)
    shown = [f"[{i}] {line}\n{text}\n\n" for i, (line, text) in enumerate(zip(lines, alone))]
    assert code == 0 and out == "".join(shown)


def test_interactive_keeps_the_cache(
    cli: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, smollm: tuple[Transformer, Tokenizer]
) -> None:
    """The second turn prefills only what is new, and answers as the whole conversation does."""
    model, tokenizer = smollm
    fed = []
    prefill = Transformer.prefill

    def watched(model: Transformer, tokens: Tensor, *args: object, **options: object) -> Tensor:
        fed.append(tokens[0].tolist())
        return prefill(model, tokens, *args, **options)

    monkeypatch.setattr(Transformer, "prefill", watched)
    question, more = "What is the capital of France?", "And of Italy?"
    chat_with(monkeypatch, model, f"{question}\n{more}")
    code, out, _ = cli("--interactive", "--max_new_tokens", 12)
    assert code == 0 and len(fed) == 2
    first, second = out.splitlines()
    ids = tokenizer.chat([
        {"role": "user", "content": question},
        {"role": "assistant", "content": first},
        {"role": "user", "content": more},
    ])
    assert len(fed[1]) < 20 and ids[-len(fed[1]):] == fed[1]
    model.setup_caches(1, 200)
    whole = generate(model, [ids], 12, eos_ids=tokenizer.eos_ids)[0]
    assert second == tokenizer.decode(whole)


def test_interactive_says_when_the_context_is_full(
    cli: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, smollm: tuple[Transformer, Tokenizer]
) -> None:
    chat_with(monkeypatch, smollm[0], "Tell me a story.\n" * 3 + "/clear\nHi\n")
    code, out, err = cli("--interactive", "--max_seq_len", 64)
    assert code == 0 and len(out.splitlines()) >= 2
    assert err.count("the context of 64 tokens is full") == 3


def chat_with(monkeypatch: pytest.MonkeyPatch, model: Transformer, said: str) -> None:
    """The next command line gets this model, and this on standard input."""
    def load(*args: object, **options: object) -> Transformer:
        return model

    monkeypatch.setattr("generate.load_model", load)
    monkeypatch.setattr("sys.stdin", io.StringIO(said))


@pytest.mark.parametrize("arguments, message", [
    ("--temperature -1", "--temperature: -1 is not at least 0"),
    ("--temperature warm", "invalid number value"),
    ("--temperature nan", "--temperature"),
    ("--top_p 0", "above 0"),
    ("--top_p 1.5", "at most 1"),
    ("--top_k 0", "--top_k"),
    ("--min_p 2", "--min_p"),
    ("--max_new_tokens 0", "--max_new_tokens"),
    ("--batch_size 1.5", "whole number"),
    ("--batch_size 1000000000000", "--batch_size"),
    ("--batch_size 4000 --prompt 8000", "KV cache"),
    ("--num_samples 1000000000000", "--num_samples"),
    ("--seed -3", "--seed"),
    ("--device abacus", "--device abacus"),
    ("--device cuda:99", "--device cuda:99"),
    ("--dtype int3", "--dtype"),
    ("--quantize int9", "--quantize"),
    ("--nonsense", "--nonsense"),
    ("--prompt x --interactive", "exclude"),
    ("--interactive --json", "--interactive"),
    ("--prompt @/no/such/file", "/no/such/file"),
    ("--prompts /no/such/file", "/no/such/file"),
    ("--prompt @/", "cannot read"),
    ("--prompt=", "empty"),
    ("--prompt 0", "empty"),
    ("--prompt 9000", "context of 8192"),
    ("--prompt 20 --max_seq_len 20", "no room"),
    ("--max_seq_len 9000", "8192"),
    ("--checkpoint_path /no/such/model", "/no/such/model"),
    ("--checkpoint_path /etc/hostname", "hostname"),
    ("--checkpoint_path /etc", "/etc"),
    ("--checkpoint_path=", "no such file"),
    ("--benchmark --prompt hello", "number of random tokens"),
    ("--compile_prefill", "goes with --compile"),
    ("--save never-made", "--quantize"),
    ("--save never-made --quantize int8 --prompt x", "--save"),
    ("--save /tmp --quantize int8", "exists already"),
    ("--quantize int4 --group_size 48", "--group_size"),
])
def test_mistakes_get_one_sentence(
    cli: Callable[..., Run], arguments: str, message: str
) -> None:
    code, out, err = cli(*arguments.split())
    last = err.strip().splitlines()[-1]
    assert code == 2 and out == "" and "Traceback" not in err
    assert last.startswith("generate.py: error: ") and message in last


def test_swapped_tokenizer(
    cli: Callable[..., Run], checkpoint: Checkpoint, tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder, _ = checkpoint("llama")
    shutil.copy(folder / "config.json", tmp_path)
    shutil.copy(folder / "model.safetensors", tmp_path)
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    code, _, err = cli("--checkpoint_path", tmp_path, "--prompt", "x")
    assert code == 2 and "the tokenizer has 600 tokens but the model only 131" in err


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    """A bare config.json, which gives random weights."""
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(CONFIG))
    return path


def test_benchmark(cli: Callable[..., Run], shape: Path) -> None:
    options = "--benchmark --prompt 20 --max_new_tokens 5 --json --compile".split()
    code, out, _ = cli("--checkpoint_path", shape, *options)
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["compile_s"] > 0
    assert (result["prompt_tokens"], result["new_tokens"]) == (20, 5)
    steps = [result[f"ms_per_step{suffix}"] for suffix in ("_p10", "", "_p90")]
    assert steps == sorted(steps)


def test_profile(cli: Callable[..., Run], shape: Path, tmp_path: Path) -> None:
    trace = tmp_path / "t.json"
    code, _, err = cli("--checkpoint_path", shape, "--prompt", 20, "--profile", trace)
    assert code == 0 and "_linear_pointwise" in err and "self_attn.qkv_proj" in err
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.fixture
def ctrl_c_counts() -> Iterator[None]:
    """Programs that a test starts are interrupted as from a terminal, though the shell that runs
    the tests ignores it, as for a job in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_cleanly(ctrl_c_counts: None) -> None:
    """A real process, interrupted while it writes a long text."""
    command = [sys.executable, HERE / "generate.py", "--device", "cpu"]
    command += ["--prompt", "Once upon a time", "--max_new_tokens", "5000"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, env=CPU_ENV)
    assert process.stdout.read(20)  # it is writing
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err

# --- imports point one way ---


# what a file, or a folder's files, may import of all that lies in this repository
MAY_IMPORT = {
    "generate": {"engine", "ahead", "sampling", "model", "parallel", "quantize", "cli", "formats"},
    "engine": {"ahead", "sampling", "speculate", "model", "parallel", "cli", "formats"},
    "ahead": {"cache", "feedforward", "quantize", "formats"},
    "sampling": {"cli"},
    "speculate": {"model", "quantize", "kernels", "formats"},
    "model": {"cache", "config", "feedforward", "weights", "parallel", "quantize", "formats"},
    "cache": {"kernels"},
    "weights": {"parallel", "quantize", "formats"},
    "parallel": set(),
    "feedforward": {"config", "quantize", "kernels"},
    "config": set(),
    "quantize": {"kernels", "formats"},
    "kernels": set(),
    "cli": {"cli", "formats"},
    "formats": {"formats"},
}
# huggingface_hub is slow to import, and needed for hub ids only
HIDDEN = {("formats/checkpoint.py", "huggingface_hub")}
FILES = [f"{name}.py" for name in MAY_IMPORT if (HERE / f"{name}.py").exists()]
for name in ("cli", "formats"):
    FILES += [f"{name}/{path.name}" for path in sorted(HERE.glob(f"{name}/*.py"))]


def modules(statement: ast.AST) -> list[str]:
    """What an import statement imports, by full names; a relative one keeps its dots."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    if isinstance(statement, ast.ImportFrom):
        return ["." * statement.level + (statement.module or "")]
    return []


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file: str) -> None:
    ours = {child.stem for child in HERE.iterdir() if child.is_dir() or child.suffix == ".py"}
    tree = ast.parse((HERE / file).read_text())
    imported = {name.split(".")[0] for node in ast.walk(tree) for name in modules(node)}
    assert imported & ours <= MAY_IMPORT[file.split("/")[0].removesuffix(".py")]
    assert "" not in imported  # none is relative

    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        hidden = {(file, name) for node in ast.walk(function) for name in modules(node)}
        assert hidden <= HIDDEN


def run_tests(arguments: list[str]) -> int:
    """pytest on the files that are named, or on everything, in a process for each core; threads of
    their own would only get into each other's way."""
    named = [argument for argument in arguments if Path(argument.split("::")[0]).is_file()]
    if named:
        return pytest.main(["-q", *arguments])
    os.environ["OMP_NUM_THREADS"] = "1"
    everything = ["-n", "auto", "--dist", "worksteal", str(HERE / "tests.py"), str(HERE / "checks")]
    return pytest.main(["-q", *everything, *arguments])


if __name__ == "__main__":
    sys.exit(run_tests(sys.argv[1:]))
