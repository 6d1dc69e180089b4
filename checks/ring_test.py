"""Caches of which layers with a sliding window keep only the last tokens: as good as whole ones.

A ring is never much larger than its window, so what lies in it was often written over: by rows
that wait, by padding, by proposals that were wrong. Everything here compares with a cache that
keeps all tokens, or with transformers."""
import io
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from batching import Engine
from batching.engine import CHUNK
from batching.speculate import Gauge
from checks.common import close, hf_logits, run_cli
from cli.stats import bytes_read
from families import RingKVCache
from generate import Request, compile_model, generate
from model import (
    FORMATS, MAX_DECODE_TOKENS, KVCache, LayerCache, Places, Transformer, load_model,
)

Checkpoint = Callable[[str], tuple[Path, PreTrainedModel]]  # the fixture: random ones, by name

ROOM = 96  # tokens of a row
WINDOWS = {"mistral": 9, "qwen2-window": 7}
# and models whose layers differ in more than a window
MODELS = pytest.mark.parametrize("name", [*WINDOWS, "gemma4", "lfm2"])
PATHS = pytest.mark.parametrize("attention", ["flash", "math"])
KV = pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=["float", "int8"])


def loaded(checkpoint: Checkpoint, name: str) -> Transformer:
    return load_model(checkpoint(name)[0], dtype=torch.float32)


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(3, 131, shape, generator=torch.Generator().manual_seed(sum(shape)))


def positions(*depths: int) -> Tensor:
    return torch.tensor(depths, dtype=torch.int32)


def whole_cache(
    model: Transformer, rows: int, kv_dtype: torch.dtype | None = None, attention: str = "auto"
) -> KVCache:
    cache = model.setup_caches(rows, ROOM, kv_dtype, attention, rings=False)
    assert not isinstance(cache, RingKVCache)
    return cache


def ring_cache(
    model: Transformer, rows: int, kv_dtype: torch.dtype | None = None, attention: str = "auto"
) -> RingKVCache:
    cache = model.setup_caches(rows, ROOM, kv_dtype, attention)
    assert cache.ring_len < ROOM / 2
    return cache

# --- what is allocated ---


@KV
def test_only_layers_without_a_window_have_room_for_all(
    checkpoint: Checkpoint, kv_dtype: torch.dtype | None
) -> None:
    model = loaded(checkpoint, "qwen2-window")
    cache = ring_cache(model, 3, kv_dtype)
    rooms = [layer.kv.shape[3] for layer in cache.layers(slice(0, 3))]
    assert rooms == [ROOM, 7 + MAX_DECODE_TOKENS, 7 + MAX_DECODE_TOKENS]
    allocated = 0
    for layer in cache.whole:
        of_layer = [tensor for tensor in vars(layer).values() if isinstance(tensor, Tensor)]
        assert len(of_layer) == (1 if kv_dtype is None else 3)  # int8 has scales and a mean
        allocated += sum(tensor.untyped_storage().nbytes() for tensor in of_layer)
    assert cache.nbytes == allocated
    for layer in cache.layers(slice(0, 3)):
        for tensor in layer.tensors:
            assert tensor.data_ptr() % 16 == 0
            assert not tensor.any()
            tensor += 1  # no layer shares memory with another


@KV
@MODELS
def test_a_prompt_may_come_in_parts(
    checkpoint: Checkpoint, name: str, kv_dtype: torch.dtype | None
) -> None:
    model = loaded(checkpoint, name)
    ring_cache(model, 1, kv_dtype)
    tokens = random_tokens(1, 60)
    whole = model.prefill(tokens, positions(0))
    parts = [model.prefill(tokens[:, i:i + 30], positions(i)) for i in (0, 30)]
    close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("room, is_ring", [(25, False), (26, True)])
def test_a_ring_is_made_where_it_is_smaller(
    checkpoint: Checkpoint, room: int, is_ring: bool
) -> None:
    model = loaded(checkpoint, "mistral")
    cache = model.setup_caches(1, room)
    assert [layer.places.ring for layer in cache.whole] == [is_ring] * 3
    token = 2 * model.config.n_kv_head * model.config.head_dim * 4
    assert cache.nbytes == 3 * token * 25


def test_a_long_context_costs_what_its_windows_keep() -> None:
    """32 layers of which every other one sees 1024 tokens of 131072."""
    windows = [1024, None] * 16
    cache = RingKVCache(
        32, 8, 128, 1, 131072, dtype=torch.bfloat16, device="meta", windows=windows
    )
    token = 2 * 8 * 128 * 2
    assert cache.nbytes == 16 * token * (131072 + 1024 + MAX_DECODE_TOKENS)
    assert bytes_read(cache, 100) == 32 * token * 100
    assert bytes_read(cache, 100_000) == 16 * token * (100_000 + 1024 + MAX_DECODE_TOKENS)


@pytest.mark.parametrize("windows", [(None, None), (9, None)])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8])
def test_layers_of_one_cache_have_heads_of_their_own(
    windows: tuple[int | None, ...], kv_dtype: torch.dtype
) -> None:
    heads = (2, 16), (1, 32)
    makers = [partial(KVCache.make_layer, heads=each) for each in heads]
    options = dict(dtype=kv_dtype, makers=makers)
    cache = RingKVCache(2, 4, 8, 3, ROOM, windows=windows, **options)
    alone = [
        RingKVCache(1, *each, 3, ROOM, windows=[window], dtype=kv_dtype)
        for each, window in zip(heads, windows)
    ]
    assert [layer.kv.shape for layer in cache.whole] == [each.whole[0].kv.shape for each in alone]
    assert cache.nbytes == sum(each.nbytes for each in alone)
    assert bytes_read(cache, 50) == sum(bytes_read(each, 50) for each in alone)


def test_a_layer_may_be_made_of_one_before_it() -> None:
    def same(cache: KVCache, places: Places, device: torch.device | str) -> LayerCache:
        [first] = cache.whole
        return LayerCache(first.tensors, places, first.flash)

    cache = KVCache(2, 1, 8, 1, 16, makers=[partial(KVCache.make_layer, heads=(1, 8)), same])
    first, second = cache.layers(slice(0, 1))
    first.kv.fill_(3)
    assert second.kv.eq(3).all()
    assert cache.nbytes == first.kv.nbytes


@pytest.mark.parametrize("rings", [True, False])
def test_a_larger_cache_has_rings_where_the_smaller_one_had(
    checkpoint: Checkpoint, rings: bool
) -> None:
    model = loaded(checkpoint, "mistral")
    model.setup_caches(1, ROOM, rings=rings)
    generate(model, [[5], [6]], 2)
    assert model.cache.max_batch_size == 2
    assert isinstance(model.cache, RingKVCache) == rings


def test_a_cache_of_other_windows_is_refused(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint, "mistral")
    config = model.config
    cache = RingKVCache(3, config.n_kv_head, config.head_dim, 1, ROOM, windows=[5, 5, 5])
    with pytest.raises(ValueError, match="other windows"):
        model(random_tokens(1, 1), positions(0), cache)

# --- the same logits ---


@MODELS
@PATHS
@KV
def test_parity_with_transformers(
    checkpoint: Checkpoint, name: str, attention: str, kv_dtype: torch.dtype | None
) -> None:
    """A prompt, chunks behind it, several tokens and single ones, at different depths."""
    folder, hf = checkpoint(name)
    model = load_model(folder, dtype=torch.float32)
    ring_cache(model, 2, kv_dtype, attention)
    tokens = random_tokens(2, ROOM)
    expected = hf_logits(hf, tokens)
    rough = 0.2 if name == "gemma4" else 0.05  # it multiplies what comes of a layer
    tol = 2e-4 if kv_dtype is None else rough

    def check(depths: list[int], n: int) -> None:
        chunk = torch.stack([row[at:at + n] for row, at in zip(tokens, depths)])
        want = torch.stack([row[at:at + n] for row, at in zip(expected, depths)])
        close(model(chunk, positions(*depths)), want, tol)

    check([0, 0], 33)
    check([33, 20], 30)
    check([60, 50], 16)  # three tokens of row 0 again
    for step in range(6):
        check([76 + step, 66 + step], 1)
    check([82, 65], 5)
    check([87, 68], 2)
    check([0, 70], 17)  # a new text in row 0 only


@dataclass
class Row:
    """What a random row has been through."""

    length: int = 0  # of its text
    written: int = 0  # the longest that it has been since it was empty

    def next_depth(self, rng: random.Random, n: int) -> int:
        """Where n tokens may go: behind the text, some way back, as where proposals were wrong, or
        into an empty row."""
        least = max(0, self.written - MAX_DECODE_TOKENS)
        depth = rng.choice([self.length, self.length, rng.randint(least, self.length)])
        if depth + n > ROOM or rng.random() < 0.05:
            return 0
        return depth

    def add(self, depth: int, n: int) -> None:
        self.length = depth + n
        if depth == 0:
            self.written = 0
        self.written = max(self.written, self.length)


@MODELS
@PATHS
@KV
def test_whatever_happens_to_its_rows_a_ring_is_as_good_as_a_whole_cache(
    checkpoint: Checkpoint, name: str, attention: str, kv_dtype: torch.dtype | None
) -> None:
    """Prompts in chunks, padded to the longest, decode, proposals that were wrong, new texts."""
    model = loaded(checkpoint, name)
    ring = ring_cache(model, 3, kv_dtype, attention)
    whole = whole_cache(model, 3, kv_dtype, attention)
    rng = random.Random(name)
    rows = [Row() for _ in range(3)]
    went_round = 0
    tol = 1e-4 if kv_dtype is None else 0.02  # rounding may go the other way
    for _ in range(60):
        is_prompt = rng.random() < 0.4
        T = rng.randint(1, 40) if is_prompt else rng.randint(1, MAX_DECODE_TOKENS)
        depths = [row.next_depth(rng, T) for row in rows]
        lengths = [rng.randint(0, T) if is_prompt else T for _ in rows]
        tokens = random_tokens(3, T)
        both = []
        for cache in (ring, whole):
            if is_prompt:
                last = torch.tensor(lengths) - 1
                both.append(model.prefill(tokens, positions(*depths), cache, last=last)[:, 0])
            else:
                both.append(model.decode(tokens, positions(*depths), cache)[:, -1])
        live = [row for row, length in enumerate(lengths) if length]
        if live:
            close(both[0][live], both[1][live], tol)
        for row, depth, length in zip(rows, depths, lengths):
            row.add(depth, length)
        assert ring.written.tolist() == [row.written for row in rows]
        went_round += max(row.length for row in rows) > ring.ring_len
    assert went_round > 10


@PATHS
@pytest.mark.parametrize("T", [1, MAX_DECODE_TOKENS])
def test_a_row_goes_back_over_as_many_tokens_as_a_step_may_reject(
    checkpoint: Checkpoint, attention: str, T: int
) -> None:
    """And no further: what is lost then is refused, and would be missed."""
    model = loaded(checkpoint, "mistral")
    ring = ring_cache(model, 1, attention=attention)
    whole = whole_cache(model, 1, attention=attention)
    tokens = random_tokens(1, ROOM)

    def write(n: int) -> None:
        for cache in (ring, whole):
            model.prefill(tokens[:, :n], positions(0), cache)

    def same(depth: int) -> bool:
        new = random_tokens(1, T)
        one, other = (model.decode(new, positions(depth), cache) for cache in (ring, whole))
        return torch.allclose(one, other, atol=1e-4)

    for written in (30, 41, 60):
        for back in range(MAX_DECODE_TOKENS + 1):
            write(written)
            assert ring.keeps(slice(0, 1), written - back)
            assert same(written - back)
        write(written)
        too_far = written - MAX_DECODE_TOKENS - 2
        with pytest.raises(ValueError, match=f"behind its first {too_far} tokens"):
            model(tokens[:, :T], positions(too_far), ring)
        assert not same(too_far)

# --- formats of one's own ---


class ScaledFloat8(LayerCache):
    """float8 with a scale for each token and head: pack and unpack, and nothing else."""

    @classmethod
    def allocate(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> list[Tensor]:
        *places, _ = shape
        return [*super().allocate(shape, dtype, device), torch.zeros(*places, device=device)]

    def pack(self, k: Tensor, v: Tensor) -> list[Tensor]:
        kv = torch.stack((k, v))  # (2, B, Hkv, T, D)
        scale = kv.abs().amax(-1) / torch.finfo(self.kv.dtype).max
        return [(kv / scale[..., None]).to(self.kv.dtype), scale]

    def unpack(self, tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        values, scale = tensors
        keys, values = (values.float() * scale[..., None]).to(dtype).unbind(0)
        return keys, values


class Int16(LayerCache):
    """Thousandths, in a dtype that is not of floating point."""

    def pack(self, k: Tensor, v: Tensor) -> list[Tensor]:
        return [(1000 * torch.stack((k, v))).round().to(torch.int16)]

    def unpack(self, tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys, values = (tensors[0].to(dtype) / 1000).unbind(0)
        return keys, values


FLOAT8 = torch.float8_e4m3fn
# of two rows: how many tokens each has cached, and how many it is given
COURSE = [
    ([0, 0], 33), ([33, 20], 30), ([60, 50], 16), *[([76 + i, 66 + i], 1) for i in range(6)],
    ([82, 65], 5), ([87, 68], 2), ([0, 70], 17),
]


@pytest.mark.parametrize("own, kv_dtype, tol", [
    (ScaledFloat8, FLOAT8, 0.07), (Int16, torch.int16, 1e-3), (None, FLOAT8, 0.08),
    (None, torch.bfloat16, 6e-3),
], ids=["own-float8", "own-int16", "float8", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", *WINDOWS])
def test_any_format_works_by_flash_and_math_in_plain_caches_and_rings(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, name: str,
    own: type[LayerCache] | None, kv_dtype: torch.dtype, tol: float,
) -> None:
    """A prompt, a chunk behind it, proposals, single tokens, and some of them again. own: a class
    of a user's; None: keys and values are rounded to the dtype."""
    if own is not None:
        monkeypatch.setitem(FORMATS, kv_dtype, own)
    folder, hf = checkpoint(name)
    model = load_model(folder, dtype=torch.float32)
    tokens = random_tokens(2, ROOM)
    logits = hf_logits(hf, tokens)

    def parts_of(rows: Tensor, depths: list[int], n: int) -> Tensor:
        return torch.stack([row[at:at + n] for row, at in zip(rows, depths)])

    want = torch.cat([parts_of(logits, *part) for part in COURSE], 1)  # (2, T, V)
    got = {}
    for attention in ("flash", "math"):
        cache = model.setup_caches(2, ROOM, kv_dtype, attention)
        assert isinstance(cache, RingKVCache) == (name in WINDOWS)
        assert {layer.kv.dtype for layer in cache.whole} == {kv_dtype}
        parts = [model(parts_of(tokens, *part), positions(*part[0])) for part in COURSE]
        got[attention] = torch.cat(parts, 1)
        assert relative_error(got[attention], want) < tol
    assert relative_error(got["flash"], got["math"]) < tol / 10  # rounding may go the other way


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@PATHS
@pytest.mark.parametrize("name", ["llama", *WINDOWS])
def test_texts_of_a_format_are_the_same_refilled_and_compiled(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, name: str, attention: str,
    dynamo: None, no_inductor: None,
) -> None:
    monkeypatch.setitem(FORMATS, FLOAT8, ScaledFloat8)
    model = loaded(checkpoint, name)
    prompts = [request.prompt for request in REFILLS[2:6]]
    expected = []
    for prompt in prompts:
        model.setup_caches(1, ROOM, FLOAT8, attention)
        expected += generate(model, [prompt], 12)
    model.setup_caches(2, ROOM, FLOAT8, attention)
    assert generate(model, prompts, 12) == expected
    compile_model(model)
    assert generate(model, prompts, 12, compile=True) == expected

# --- the same texts ---


def requests_of(*lengths: tuple[int, int]) -> list[Request]:
    """Requests with so many tokens in the prompt, of which many repeat, and so many new ones."""
    requests = []
    for n, budget in lengths:
        phrase = random_tokens(min(n, 11)).tolist()
        requests.append(Request((phrase * n)[:n], budget))
    return requests


def collect(engine: Engine, requests: Iterable[Request]) -> list[list[int]]:
    out = {}
    for number, tokens in engine.run(requests):
        out.setdefault(number, []).extend(tokens)
    return [out[number] for number in sorted(out)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read 8 tokens at a time while others run, and proposals are always checked."""
    monkeypatch.setitem(CHUNK, "cpu", 8)
    monkeypatch.setattr(Gauge, "pays", lambda gauge, n_rows: True)


REFILLS = requests_of((5, 70), (70, 5), (44, 30), (1, 60), (33, 33), (60, 9), (8, 1), (27, 50))


@pytest.mark.parametrize("name, rows, lag, k, draft", [
    *[(name, *course) for name in WINDOWS for course in [
        (5, 0, 0, False), (2, 2, 0, False), (2, 0, 4, False), (5, 2, 15, False), (2, 0, 4, True),
    ]], ("gemma4", 5, 2, 15, False), ("lfm2", 5, 2, 15, False),
])
def test_refilled_rows_say_what_they_say_with_a_whole_cache(
    checkpoint: Checkpoint, small_chunks: None, name: str, rows: int, lag: int, k: int, draft: bool
) -> None:
    """Prompts are read while others run and move on, proposals are right and wrong, and steps are
    under way when a text ends."""
    model = loaded(checkpoint, name)
    expected = []
    for request in REFILLS:
        whole_cache(model, 1)
        expected += collect(Engine(model), [request])
    ring_cache(model, rows)
    engine = Engine(model, speculate_k=k, draft=model if draft else None)
    engine.lag = lag
    assert collect(engine, REFILLS) == expected
    assert collect(engine, REFILLS[::-1]) == expected[::-1]
    if k:
        found = engine.stats.speculation
        assert 0 < found.accepted[0] and (draft or found.accepted[-1] < found.checked)


@pytest.mark.parametrize("name", [*WINDOWS, "lfm2"])
@pytest.mark.parametrize("k", [0, 15])
def test_prompts_of_any_lengths_are_read_together(
    checkpoint: Checkpoint, name: str, k: int
) -> None:
    """The padding of the short ones drives nothing out of a ring."""
    model = loaded(checkpoint, name)
    prompts = [request.prompt for request in requests_of((70, 1), (20, 1), (1, 1), (45, 1))]
    whole_cache(model, 4)
    expected = generate(model, prompts, 11)
    ring_cache(model, 4)
    engine = Engine(model, speculate_k=k)
    reading = engine.prefill(slice(0, 4), [Request(prompt, 11) for prompt in prompts])
    while not engine.read_on(reading):
        pass
    assert engine.token[:, 0].tolist() == [tokens[0] for tokens in expected]
    assert generate(model, prompts, 11, speculate_k=k, engine=engine) == expected


def test_compiled_steps_say_the_same(
    checkpoint: Checkpoint, dynamo: None, no_inductor: None
) -> None:
    """A graph for layers with a ring and one for the others."""
    model = loaded(checkpoint, "qwen2-window")
    prompts = [request.prompt for request in requests_of((40, 1), (13, 1))]
    whole_cache(model, 2)
    expected = generate(model, prompts, 30)
    compile_model(model, prefill=True)
    for attention in ("flash", "math"):
        ring_cache(model, 2, attention=attention)
        assert generate(model, prompts, 30, compile=True, speculate_k=4) == expected

# --- texts that go on ---


def test_a_text_goes_on_where_it_ended(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint, "mistral")
    ring_cache(model, 1)
    engine = Engine(model)
    text = random_tokens(30).tolist()
    for new in ([5, 6, 7], [8], [9] * 20):
        cached = len(text) - 1 if engine.input_pos.any() else 0
        text += new
        answer, = generate(model, [text[cached:]], 6, cached=cached, engine=engine)
        text += answer
    whole_cache(model, 1)
    assert generate(model, [text[:-6]], 6) == [text[-6:]]


def test_cached_tokens_that_a_window_has_passed_are_refused(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint, "mistral")
    ring_cache(model, 2)
    engine = Engine(model)
    prefix = random_tokens(12).tolist()
    generate(model, [prefix] * 2, 40, engine=engine)
    with pytest.raises(ValueError, match="cannot go on behind its first 12 tokens"):
        generate(model, [[5]] * 2, 4, cached=12, engine=engine)


def test_a_prefix_outlasts_refills_only_where_rings_do_not_go_round(
    checkpoint: Checkpoint
) -> None:
    model = loaded(checkpoint, "mistral")
    prefix = random_tokens(6).tolist()
    prompts = [request.prompt for request in requests_of((3, 1), (7, 1), (2, 1))]
    expected = []
    for prompt in prompts:
        whole_cache(model, 1)
        expected += generate(model, [prefix + prompt], 9)
    ring_cache(model, 1)
    engine = Engine(model)
    generate(model, [prefix], 1, engine=engine)
    assert generate(model, prompts, 9, cached=6, engine=engine) == expected
    with pytest.raises(ValueError, match="3 prompts behind cached tokens need as many rows, not 1"):
        generate(model, prompts, 20, cached=6, engine=engine)


@pytest.fixture
def windowed(tmp_path: Path, talking_folder: Callable[..., Path]) -> Path:
    """A random model with a window of 9 that can hold a conversation."""
    return talking_folder(
        tmp_path / "model", model_type="mistral", sliding_window=9, max_position_embeddings=512
    )


def test_a_conversation_that_goes_back_is_read_again(
    windowed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A new one begins with the same words of the template, which a window has passed."""
    lines = "hello\nand then?\n/clear\nhello\n/clear\nhe said that\nwhy?"
    caches = []
    setup_caches = Transformer.setup_caches

    def talk(rings: bool) -> str:
        def watched(*args: object, **options: object) -> KVCache:
            caches.append(setup_caches(*args, **options, rings=rings))
            return caches[-1]

        monkeypatch.setattr(Transformer, "setup_caches", watched)
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        code, out, _ = run_cli(
            capfd, "--checkpoint_path", windowed, "--interactive", "--dtype", "float32",
            "--device", "cpu", "--no-compile", "--max_new_tokens", 40,
        )
        assert code == 0 and len(out) > 200
        return out

    assert talk(rings=True) == talk(rings=False)
    assert [isinstance(cache, RingKVCache) for cache in caches] == [True, False]
    assert not caches[0].keeps(slice(0, 1), 2)


def test_the_summary_counts_the_bytes_of_rings(
    windowed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint_path", windowed, "--device", "cpu", "--no-compile", "--json"]
    _, out, _ = run_cli(capfd, *flags, "--prompt", "hello", "--max_new_tokens", 9,
                        "--max_seq_len", 512, "--kv_dtype", "int8")
    slots = 9 + MAX_DECODE_TOKENS
    of_a_head = slots * 16 + (slots + 3) // 4 * 4 * 4  # values, and scales to whole 16 bytes
    mean_key = 16 * 4  # in float32
    assert json.loads(out.splitlines()[-1])["kv_cache_bytes"] == 2 * 2 * (2 * of_a_head + mean_key)
