"""The engine: rows that are refilled while others run, random numbers of a request's own."""
import dataclasses
import functools
import itertools
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from batching import Engine, Stats
from batching.engine import CHUNK
from checks.common import PROMPTS
from generate import (
    Decoder, Request, Sampling, Tokenizer, filter_probs, generate, key_of, kind_of, noise, sample,
)
from model import Transformer, load_model

Checkpoint = Callable[[str], tuple[Path, PreTrainedModel]]  # the fixture: random ones, by name


def loaded(checkpoint: Checkpoint, name: str = "llama") -> Transformer:
    return load_model(checkpoint(name)[0], dtype=torch.float32)


def random_prompt(n: int) -> list[int]:
    """Tokens of the random checkpoints' vocabulary, the same for each n."""
    return torch.randint(3, 131, (n,), generator=torch.Generator().manual_seed(n)).tolist()


def alone(model: Transformer, requests: Iterable[Request]) -> list[list[int]]:
    """What each request gets in an engine of one row, with nobody before or beside it."""
    out = []
    for request in requests:
        model.setup_caches(1, 96)
        out += collect(Engine(model), [request])
    return out


def collect(engine: Engine, requests: Iterable[Request]) -> list[list[int]]:
    """What an engine yields for each request."""
    out = {}
    for number, tokens in engine.run(requests):
        out.setdefault(number, []).extend(tokens)
    return [out[number] for number in sorted(out)]


def engine_of(model: Transformer, rows: int, lag: int = 0) -> Engine:
    """lag: steps that the host reads behind, as it does behind a GPU."""
    model.setup_caches(rows, 96)
    engine = Engine(model)
    engine.lag = lag
    return engine

# --- random numbers ---


def noise_of(seeds: Iterable[int], positions: Iterable[int], n_tokens: int) -> Tensor:
    """Exponential noise [seeds, positions, n_tokens]."""
    seeds = list(seeds)
    positions = list(positions)
    key = torch.tensor([key_of(seed) for seed in seeds for _ in positions], dtype=torch.int32)
    position = torch.tensor(positions * len(seeds), dtype=torch.int32)
    drawn = noise(key, position, torch.arange(n_tokens)[None])
    return drawn.view(len(seeds), len(positions), n_tokens)


def chi_squared(counts: Tensor, shares: Tensor) -> float:
    """How likely counts are to be as far from shares of their sum, or farther, if drawn so."""
    expected = shares.double() * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(counts) - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


AXES = [(range(300), range(3), 200), (range(3), range(300), 200), ([7], [5], 180000)]


@pytest.mark.parametrize("axes", AXES, ids=["seeds", "positions", "tokens"])
def test_noise_is_exponential(axes: tuple) -> None:
    drawn = noise_of(*axes).flatten()
    assert drawn.min() > 0 and drawn.isfinite().all()
    uniform = (-drawn).exp()
    counts = torch.histc(uniform, bins=64, min=0, max=1)
    assert chi_squared(counts, torch.full((64,), 1 / 64)) > 1e-4


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["seed", "position", "token"])
def test_neighbouring_streams_share_nothing(axis: int) -> None:
    """Noise is uncorrelated with that of the next seed, position or token, and nearly nowhere
    equal to it, nor to it shifted by some tokens."""
    drawn = noise_of(range(40), range(40), 64)
    n = drawn.shape[axis]
    one = drawn.narrow(axis, 0, n - 1)
    other = drawn.narrow(axis, 1, n - 1)
    for shift in (0, 2, 3):
        shifted = other.roll(shift, 2)
        correlation = torch.corrcoef(torch.stack([one.flatten(), shifted.flatten()]))[0, 1]
        assert correlation.abs() < 4 / one.numel() ** 0.5
        assert (one == shifted).float().mean() < 1e-4


@pytest.mark.parametrize("settings, shares", [
    (dict(), [0.4, 0.3, 0.2, 0.1]),
    (dict(top_p=0.65), [4 / 7, 3 / 7, 0, 0]),
    (dict(top_k=3), [4 / 9, 3 / 9, 2 / 9, 0]),
    (dict(min_p=0.4), [4 / 9, 3 / 9, 2 / 9, 0]),
], ids=str)
@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_draws_follow_the_probabilities(settings: dict, shares: list[float], over: str) -> None:
    n = 20000
    seeds = range(n) if over == "seeds" else [1] * n
    positions = torch.full((n,), 9) if over == "seeds" else torch.arange(n)
    requests = [Request([1], 1, temperature=1.0, seed=seed, **settings) for seed in seeds]
    sampling = Sampling.of(requests, torch.device("cpu"))
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().repeat(n, 1)
    drawn = sample(logits, sampling, "filtered", positions.int())
    counts = torch.bincount(drawn, minlength=4)
    wanted = torch.tensor(shares)
    assert not counts[wanted == 0].any()
    assert chi_squared(counts[wanted > 0], wanted[wanted > 0]) > 1e-4


def test_top_p_is_a_share_of_what_top_k_leaves() -> None:
    request = Request([5], 1, temperature=1.0, top_k=2, top_p=0.5)
    sampling = Sampling.of([request], torch.device("cpu"))
    probs, ids = filter_probs(torch.tensor([[0.3, 0.4, 0.1, 0.2]]), sampling, 4)
    assert ids.tolist() == [[1, 0, 3, 2]]
    assert probs.count_nonzero() == 1  # 0.4 is more than half of 0.7


@pytest.mark.parametrize("shares, top_p, n", [
    ([0.5, 0.3, 0.1, 0.1], 0.8, 2),
    ([0.6, 0.2, 0.1, 0.1], 0.8, 2),
    ([0.5, 0.25, 0.125, 0.125], 0.75, 2),
    ([0.5, 0.3, 0.1, 0.1], 0.801, 3),
    ([0.5, 0.3, 0.1, 0.1], 1e-9, 1),
])
def test_top_p_that_is_reached_exactly_takes_no_token_more(
    shares: list[float], top_p: float, n: int
) -> None:
    """Though sums of float32 numbers round to one side or the other."""
    request = Request([5], 1, temperature=1.0, top_p=top_p)
    sampling = Sampling.of([request], torch.device("cpu"))
    probs, _ = filter_probs(torch.tensor([shares]), sampling, 4)
    assert probs.count_nonzero() == n


def test_a_seeded_request_draws_the_same_in_any_company(checkpoint: Checkpoint) -> None:
    """Rows, neighbours, predecessors and the order of steps are nothing to it."""
    model = loaded(checkpoint)
    requests = []
    for seed, n in enumerate((3, 30, 1, 17, 9, 25)):
        settings = dict(temperature=1.5, seed=seed)
        if seed % 2:
            settings["top_p"] = 0.9
        requests.append(Request(random_prompt(n), 8 + n, **settings))
    expected = alone(model, requests)
    for rows in (1, 2, 4, 8):
        for lag in (0, 2):
            assert collect(engine_of(model, rows, lag), requests) == expected
    backwards = collect(engine_of(model, 3), requests[::-1])
    assert backwards[::-1] == expected


def test_requests_without_a_seed_differ(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    one, other = collect(engine_of(model, 2), [Request([5], 12, temperature=2.0)] * 2)
    assert one != other


def test_prompt_i_draws_with_the_seed_plus_i(checkpoint: Checkpoint) -> None:
    """And from the largest seed on from 0 again."""
    model = loaded(checkpoint)
    settings = dict(temperature=1.5, top_p=0.95)
    together = generate(model, PROMPTS, 10, seed=2**63 - 2, **settings)
    for seed, prompt, tokens in zip((2**63 - 2, 2**63 - 1, 0), PROMPTS, together):
        assert generate(model, [prompt], 10, seed=seed, **settings) == [tokens]


@pytest.mark.parametrize("kind", ["plain", "top_k", "filtered"])
def test_a_tiny_temperature_is_greedy(kind: str) -> None:
    """Logits over it are no float32."""
    logits = torch.tensor([[1.0, 90.0, -3.0, 89.0]])
    request = Request([1], 1, temperature=1e-38, top_k=4)
    sampling = Sampling.of([request], torch.device("cpu"))
    for position in range(20):
        assert sample(logits, sampling, kind, torch.tensor([position])).tolist() == [1]

def draw(logits: Tensor, requests: Iterable[Request], kind: str | None = None) -> Tensor:
    """A token [B] for each row of logits [B, V], always with the same random numbers, of one
    stream."""
    requests = [dataclasses.replace(each, seed=0) for each in requests]
    sampling = Sampling.of(requests, torch.device("cpu"))
    position = torch.arange(len(requests), dtype=torch.int32)
    return sample(logits, sampling, kind or kind_of(requests), position)


SETTINGS = [
    dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p
    in itertools.product((0.0, 0.7, 1.5), (None, 1, 40, 700), (None, 0.4, 1.0), (None, 0.1))
]


def test_a_few_kinds_of_step_draw_for_all_settings() -> None:
    requests = [Request([5], 1, **settings) for settings in SETTINGS]
    pairs = itertools.combinations_with_replacement(requests, 2)
    assert len({kind_of(pair) for pair in pairs}) <= 4


def test_settings_differ_by_row() -> None:
    """A row draws what it draws among rows like itself, and a greedy one the likeliest token."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(len(SETTINGS), 1000)
    requests = [Request([5], 1, **settings) for settings in SETTINGS]
    together = draw(logits, requests)
    for row, mine in enumerate(requests):
        alone = draw(logits, [mine] * len(requests))
        assert together[row] == alone[row]
        if mine.temperature == 0:
            assert together[row] == logits[row].argmax()


def test_a_cheaper_kind_of_step_draws_the_same() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(len(SETTINGS), 1000)
    for mine in (Request([5], 1, **settings) for settings in SETTINGS):
        requests = [mine] * len(logits)
        assert torch.equal(draw(logits, requests), draw(logits, requests, "filtered"))

# --- rows that are refilled ---


def insert(engine: Engine, row: int, request: Request) -> None:
    """Read a request's prompt into a row, while the others stand where they do."""
    prefill = engine.prefill(slice(row, row + 1), [request])
    while not engine.read_on(prefill):
        pass


def test_rows_filled_at_different_times(checkpoint: Checkpoint) -> None:
    """A prefill of one row is nothing to the others: each gets what it gets alone."""
    model = loaded(checkpoint, "mistral")
    requests = [Request(prompt, 16) for prompt in PROMPTS]
    expected = alone(model, requests)
    engine = engine_of(model, 3)
    got = [[], [], []]
    for row in (1, 0, 2):
        insert(engine, row, requests[row])
        got[row].append(int(engine.token[row]))
        started = [row for row in range(3) if got[row]]
        for _ in range(4):
            engine.step()
            for row in started:
                got[row].append(int(engine.token[row]))
    assert [len(tokens) for tokens in got] == [9, 13, 5]
    for tokens, want in zip(got, expected):
        assert tokens == want[:len(tokens)]


def test_filled_by_hand_or_by_run(checkpoint: Checkpoint) -> None:
    """Rows that were filled by hand step as run has them step, sampled ones too."""
    model = loaded(checkpoint)
    mine = Request(PROMPTS[0], 12, temperature=1.5, top_p=0.9, seed=3)
    [want] = alone(model, [mine])
    engine = engine_of(model, 1)
    engine.kind = kind_of([mine])
    insert(engine, 0, mine)
    got = [int(engine.token)]
    for _ in range(11):
        engine.step()
        got.append(int(engine.token))
    assert got == want


REQUESTS = [
    Request(PROMPTS[0], 9),
    Request(PROMPTS[2], 2),
    Request(PROMPTS[1], 14),
    Request([40, 41], 1),
    Request(list(range(60, 77)), 30),
    Request(list(range(90, 130)), 5),
]


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_more_requests_than_rows(checkpoint: Checkpoint, rows: int) -> None:
    """Rows that are free take what waits; no request feels its neighbours or its predecessor."""
    model = loaded(checkpoint, "qwen3")
    expected = [generate(model, [each.prompt], each.max_new_tokens)[0] for each in REQUESTS]
    assert collect(engine_of(model, rows), REQUESTS) == expected


def test_a_request_ends_at_its_own_eos(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    requests = []
    expected = []
    for each, full in zip(REQUESTS, alone(model, REQUESTS)):
        eos = full[len(full) // 2]
        requests.append(dataclasses.replace(each, eos_ids=frozenset({eos})))
        expected.append(full[:full.index(eos) + 1])
    assert collect(engine_of(model, 3), requests) == expected


def test_greedy_rows_beside_sampled_ones(checkpoint: Checkpoint) -> None:
    """Rows may differ in their settings; the greedy ones get exactly their tokens."""
    model = loaded(checkpoint)
    expected = alone(model, REQUESTS)
    sampled = [
        Request(PROMPTS[0], 12, temperature=1.0),
        Request(PROMPTS[0], 12, temperature=2.0, top_k=5),
        Request(PROMPTS[0], 12, temperature=0.7, top_p=0.9, min_p=0.01),
    ]
    mixed = [each for pair in zip(REQUESTS, sampled * 2) for each in pair]
    got = collect(engine_of(model, 3), mixed)
    assert got[::2] == expected
    assert all(len(tokens) == 12 for tokens in got[1::2])


def test_generate_with_an_engine(checkpoint: Checkpoint) -> None:
    """A series of calls shares one; prompts beyond its rows wait their turn."""
    model = loaded(checkpoint)
    expected = generate(model, PROMPTS, 12)
    engine = engine_of(model, 2)
    assert generate(model, PROMPTS, 12, engine=engine) == expected
    sampled = generate(model, PROMPTS, 12, temperature=1.5, seed=1, engine=engine)
    assert generate(model, PROMPTS, 12, engine=engine) == expected
    again = generate(model, PROMPTS, 12, temperature=1.5, seed=1, engine=engine)
    assert again == sampled != expected


def test_an_engine_of_another_model_is_refused(checkpoint: Checkpoint) -> None:
    engine = engine_of(loaded(checkpoint, "mistral"), 2)
    with pytest.raises(ValueError, match="the engine is one of another model"):
        generate(loaded(checkpoint), PROMPTS[:2], 4, engine=engine)


def test_a_request_that_is_ended_gets_no_token_more(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    model.setup_caches(2, 64)
    decoder = Decoder(model)
    got = {0: 0, 1: 0}
    for number, tokens in decoder.run([Request(prompt, 4) for prompt in PROMPTS[:2]]):
        got[number] += len(tokens)
        decoder.end(1)
    assert got == {0: 4, 1: 0} and decoder.finish_reasons == {0: "length", 1: "stop"}


@pytest.mark.parametrize("rows, speculate_k", [(1, 0), (1, 3), (3, 0), (3, 3)])
def test_a_request_that_is_ended_before_its_first_token_takes_no_step(
    checkpoint: Checkpoint, small_chunks: int, rows: int, speculate_k: int
) -> None:
    """While it waits for a row, or while its prompt is read; the others get what they get alone."""
    model = loaded(checkpoint)
    for number in (1, 2):
        budgets = [26 if i == number else 9 for i in range(3)]
        requests = [Request(random_prompt(n), budgets[i]) for i, n in enumerate((5, 40, 70))]
        expected = alone(model, requests)
        model.setup_caches(rows, 96)
        engine = Engine(model, speculate_k=speculate_k)
        out: list[list[int]] = [[], [], []]
        for i, tokens in engine.run(requests):
            out[i] += tokens
            engine.end(number)
        assert out == [[] if i == number else tokens for i, tokens in enumerate(expected)]
        assert engine.finish_reasons[number] == "stop"
        assert len(engine.stats.steps_s) <= 16


def test_rows_stay_those_of_their_requests_where_one_is_ended_before_it_begins(
    checkpoint: Checkpoint
) -> None:
    """The one behind it is not read into its row, which has another text."""
    model = loaded(checkpoint)
    engine = engine_of(model, 4)
    prefixes = [random_prompt(n)[:4] for n in range(4, 8)]
    collect(engine, [Request(prefix, 1) for prefix in prefixes])
    prompts = [random_prompt(50), [5, 6], [5, 6], [5, 6]]
    out: list[list[int]] = [[], [], [], []]
    for i, tokens in engine.run([Request(prompt, 5, cached=4) for prompt in prompts]):
        out[i] += tokens
        engine.end(2)
    texts = [Request(prefix + prompt, 5) for prefix, prompt in zip(prefixes, prompts)]
    expected = alone(model, texts)
    assert out == [*expected[:2], [], expected[3]]


def test_requests_in_refilled_rows_are_behind_the_same_tokens(checkpoint: Checkpoint) -> None:
    """One that is behind fewer would write over those of the next."""
    model = loaded(checkpoint)
    prefix = random_prompt(20)
    requests = [Request([5, 6, 7], 6, cached=10), Request([8, 9], 6, cached=20)]
    engine = engine_of(model, 1)
    generate(model, [prefix], 1, engine=engine)
    with pytest.raises(ValueError, match="need as many rows, not 1: some would write over the 20"):
        collect(engine, requests)
    engine = engine_of(model, 2)
    generate(model, [prefix] * 2, 1, engine=engine)
    texts = [Request(prefix[:each.cached] + each.prompt, 6) for each in requests]
    assert collect(engine, requests) == alone(model, texts)


def test_empty_lists_ask_for_nothing(checkpoint: Checkpoint) -> None:
    """No requests are refused by a Decoder, and no processors need no folder."""
    model = loaded(checkpoint)
    model.setup_caches(1, 64)
    decoder = Decoder(model)
    with pytest.raises(ValueError, match="requests"):
        list(decoder.run([]))
    generate(model, PROMPTS[:1], 2, processors=[], engine=decoder)
    assert decoder.extras is None


def test_one_request_given_twice_is_two(checkpoint: Checkpoint) -> None:
    engine = engine_of(loaded(checkpoint), 2)
    request = Request(PROMPTS[0], 3, logprobs=1, echo=True)
    echoes = {}
    for number, tokens in engine.run([request, request]):
        echoes.setdefault(number, []).extend(getattr(tokens, "prompt_logprobs", []))
    assert echoes[0] == echoes[1] and len(echoes[0]) == len(PROMPTS[0])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Prompts are read 8 tokens at a time while others run."""
    monkeypatch.setitem(CHUNK, "cpu", 8)
    return 8


def mixed_requests(chunk: int) -> list[Request]:
    """Prompts around a chunk's edges, budgets of one and more."""
    lengths = [chunk, 1, chunk - 1, 3 * chunk, chunk + 1, 2 * chunk + 1, 5, 4 * chunk - 1]
    budgets = [9, 20, 1, 2, 30, 1, 17, 5]
    return [Request(random_prompt(n), budget) for n, budget in zip(lengths, budgets)]


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_refilled_rows_get_what_they_get_alone(
    checkpoint: Checkpoint, small_chunks: int, name: str, rows: int, lag: int
) -> None:
    model = loaded(checkpoint, name)
    requests = mixed_requests(small_chunks)
    expected = alone(model, requests)
    assert [len(tokens) for tokens in expected] == [each.max_new_tokens for each in requests]
    engine = engine_of(model, rows, lag)
    assert collect(engine, requests) == expected
    assert set(engine.finish_reasons.values()) == {"length"}
    assert collect(engine, requests[::-1]) == expected[::-1]  # the engine is as new


@pytest.mark.parametrize("lag", [0, 2])
def test_a_row_that_ends_early_is_refilled(
    checkpoint: Checkpoint, small_chunks: int, lag: int
) -> None:
    """By an end of text or by what the host says, with steps under way that drew more for it."""
    model = loaded(checkpoint)
    requests = []
    expected = []
    reasons = {}
    plain = mixed_requests(small_chunks)
    for number, (each, full) in enumerate(zip(plain, alone(model, plain))):
        at = (3 * number) % len(full)
        last = full[at]
        until_last = full[:full.index(last) + 1]
        if number % 2:
            requests.append(dataclasses.replace(each, eos_ids=frozenset({last})))
            reasons[number] = "eos"
        else:
            requests.append(dataclasses.replace(each, ends=functools.partial(is_last, last)))
            reasons[number] = "stop"
        expected.append(until_last)
    engine = engine_of(model, 3, lag)
    assert collect(engine, requests) == expected
    assert engine.finish_reasons == reasons


def is_last(last: int, tokens: list[int]) -> bool:
    """Request.ends: once that token comes; each comes in a list of its own."""
    return tokens == [last]


def test_running_rows_wait_for_one_chunk_at_a_time(
    checkpoint: Checkpoint, small_chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(checkpoint)
    calls = []
    for name in ("prefill", "decode"):
        watch(monkeypatch, calls, name)
    requests = [(6, 30), (40, 3), (30, 3)]
    collect(engine_of(model, 2), [Request(random_prompt(n), budget) for n, budget in requests])
    assert [n for name, n in calls if name == "prefill"] == [6, *[8] * 5, *[8, 8, 8, 6]]
    for (name, _), (following, _) in itertools.pairwise(calls):
        assert "decode" in (name, following)


def watch(monkeypatch: pytest.MonkeyPatch, calls: list, name: str) -> None:
    """Note the calls of a method of Transformer, and how many tokens of a row each had."""
    method = getattr(Transformer, name)

    def watched(model: Transformer, tokens: Tensor, *args: object, **options: object) -> Tensor:
        calls.append((name, tokens.shape[1]))
        return method(model, tokens, *args, **options)

    monkeypatch.setattr(Transformer, name, watched)


def test_short_prompts_are_read_together(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not where padding would cost much."""
    model = loaded(checkpoint)
    calls = []
    watch(monkeypatch, calls, "prefill")
    collect(engine_of(model, 5), [Request(random_prompt(n), 2) for n in (3, 9, 80, 70, 4)])
    assert calls == [("prefill", 9), ("prefill", 80), ("prefill", 4)]


def test_the_context_ends_a_request_and_says_so(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    engine = engine_of(model, 2, lag=2)
    requests = [Request(random_prompt(n), 20) for n in (90, 95, 76, 77)]
    got = collect(engine, requests)
    assert [len(tokens) for tokens in got] == [6, 1, 20, 19]
    reasons = [engine.finish_reasons[number] for number in range(4)]
    assert reasons == ["context", "context", "length", "context"]
    with pytest.raises(ValueError, match="of 96 tokens leaves no room .* in the context of 96"):
        collect(engine, [Request(random_prompt(96), 1)])


def test_a_row_that_is_done_keeps_its_text_for_the_next_turn(checkpoint: Checkpoint) -> None:
    """A conversation in each of two rows, one of which had nothing more to say for long."""
    model = loaded(checkpoint)
    first = [random_prompt(7), random_prompt(12)]
    more = [random_prompt(5), random_prompt(6)]
    model.setup_caches(2, 96)
    engine = Engine(model)
    stop = generate(model, first, 40)[1][2]
    turn = generate(model, first, 40, engine=engine, eos_ids={stop})
    assert len(turn[1]) < 4 < len(turn[0])
    texts = [prompt + new for prompt, new in zip(first, turn)]
    cached = len(texts[1]) - 1  # in both rows
    prompts = [text[cached:] + new for text, new in zip(texts, more)]
    whole = [text + new for text, new in zip(texts, more)]
    got = generate(model, prompts, 8, cached=cached, engine=engine)
    assert got == generate(model, whole, 8)


def test_requests_have_rows_of_their_own_where_these_suffice(checkpoint: Checkpoint) -> None:
    """Also where one ends before the next one begins: a caller may continue both."""
    model = loaded(checkpoint)
    prompts = [random_prompt(80), random_prompt(5)]
    engine = engine_of(model, 2)
    first = collect(engine, [Request(prompt, 1) for prompt in prompts])
    turn = [Request([ids[-1]], 4, cached=4) for ids in prompts]
    turn[0] = Request(prompts[0][79:] + first[0], 4, cached=79)
    texts = [prompts[0] + first[0], prompts[1]]
    assert collect(engine, turn) == alone(model, [Request(text, 4) for text in texts])


@pytest.mark.parametrize("speculate_k", [0, 4])
def test_a_run_that_was_given_up_leaves_nothing_behind(
    checkpoint: Checkpoint, speculate_k: int
) -> None:
    model = loaded(checkpoint)
    requests = [Request(random_prompt(n), 30) for n in (60, 3, 9)]
    expected = alone(model, requests)
    model.setup_caches(2, 96)
    engine = Engine(model, speculate_k=speculate_k)
    for stop_after in (1, 2, 40):
        run = engine.run(requests)
        for _ in range(stop_after):
            next(run)
        del run
        assert collect(engine, requests) == expected


@pytest.mark.parametrize("n", [1, 2])
def test_another_run_ends_the_one_before(checkpoint: Checkpoint, n: int) -> None:
    """Which says nothing more, of what was read for another row either, and changes nothing."""
    engine = engine_of(loaded(checkpoint), n)
    expected = collect(engine, [Request([6], 5)] * n)
    first = engine.run([Request([5], 2)] * n)
    next(first)
    second = engine.run([Request([6], 5)] * n)
    answers = [[] for _ in range(n)]
    number, tokens = next(second)
    answers[number] += tokens
    with pytest.raises(RuntimeError, match="another run"):
        next(first)
    for number, tokens in second:
        answers[number] += tokens
    assert answers == expected


# what a run of two rows refuses that have 40 tokens each, of which rings keep the last; those of a
# Decoder alone are behind it
REFUSED = [
    [Request([], 5)],
    [Request([5], 5), Request([131], 5)],
    [Request([5], 5, cached=95)],
    [Request([5], 5, cached=70)],
    [Request([5], 5, cached=9)],
    [Request([5], 5), Request([5], 5, processors=[3])],
    [Request([5], 5, echo=True)],
    [Request([5], 5, cached=each) for each in (0, 2, 0)],
    [Request([5], 5, logprobs=2)],
]


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("kind, refused", [(Engine, REFUSED[:-1]), (Decoder, REFUSED)])
def test_a_run_that_is_refused_leaves_the_one_before_as_it_was(
    checkpoint: Checkpoint, kind: type[Decoder], refused: list[list[Request]], extras: bool
) -> None:
    model = loaded(checkpoint, "mistral")
    processors = [lambda ids, logits: logits.roll(1)] if extras else []
    requests = [Request(random_prompt(40), n, processors=processors) for n in (9, 30)]
    model.setup_caches(2, 96)
    expected = collect(kind(model), requests)
    decoder = kind(model, model.setup_caches(2, 96))
    run, got = decoder.run(requests), [[], []]
    for i, (number, tokens) in enumerate(run):
        got[number] += tokens
        with pytest.raises(ValueError):
            collect(decoder, refused[i % len(refused)])
    assert got == expected and decoder.finish_reasons == {0: "length", 1: "length"}


def test_a_prefix_in_every_row_outlasts_refills(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    prefix = random_prompt(20)
    prompts = [random_prompt(n) for n in (3, 8, 2, 5, 9)]
    want = [generate(model, [prefix + prompt], 6)[0] for prompt in prompts]
    model.setup_caches(2, 64)
    engine = Engine(model)
    generate(model, [prefix] * 2, 1, engine=engine)
    assert generate(model, prompts, 6, cached=20, engine=engine) == want


def test_an_eager_step_asks_no_operator_about_gradients(checkpoint: Checkpoint) -> None:
    """And what it leaves behind can be changed outside of inference mode too."""
    engine = engine_of(loaded(checkpoint), 2)
    assert engine.step().tokens.is_inference()
    caches = [layer.kv for layer in engine.cache.whole]
    for state in (engine.token, engine.input_pos, engine.active, *caches):
        state.zero_()


def test_steps_have_few_rows_without_a_request(checkpoint: Checkpoint) -> None:
    """Where nothing waits any more, requests move together."""
    model = loaded(checkpoint)
    requests = [Request(random_prompt(n), 40 - 3 * n) for n in range(1, 12)]
    expected = alone(model, requests)
    engine = engine_of(model, 4)
    assert collect(engine, requests) == expected
    stats = engine.stats
    assert stats.useful_row_steps == stats.decode_tokens == sum(map(len, expected)) - 11
    assert stats.useful_row_steps > 0.9 * stats.row_steps
    assert len(stats.steps_s) > stats.row_steps / 4 and stats.wall_s > sum(stats.steps_s)


@pytest.mark.parametrize("rows", [1, 2])
def test_stop_strings_end_a_text(smollm: tuple[Transformer, Tokenizer], rows: int) -> None:
    """With the token that completes one; a string may begin in one token and end in another."""
    model, tokenizer = smollm
    texts = ["The capital of France is", "One, two, three,"]
    prompts = [tokenizer.encode(text) for text in texts]
    model.setup_caches(rows, 64)
    engine = Engine(model)
    settings = dict(engine=engine, tokenizer=tokenizer)
    free = [tokenizer.decode(ids) for ids in generate(model, prompts, 12, **settings)]
    assert free[0].startswith(" Paris.") and free[1].startswith(" four, five, six,")
    ended = generate(model, prompts, 12, stop=["is.", "ve, s"], **settings)
    texts = [tokenizer.decode(ids) for ids in ended]
    assert texts[0] == " Paris." and texts[1] == " four, five, six"
    assert engine.finish_reasons == {0: "stop", 1: "stop"}
    with pytest.raises(ValueError, match="need a tokenizer"):
        generate(model, prompts, 12, stop=["x"], engine=engine)


def test_statistics_are_those_of_one_call(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    model.setup_caches(1, 32)
    engine = Engine(model)
    stats = Stats()
    generate(model, [[5, 6]], 6, engine=engine, stats=stats)
    generate(model, [[5, 6]], 6, engine=engine)
    assert stats.new_tokens == 6
    with pytest.raises(ValueError, match="not a Decoder"):
        generate(model, [[5, 6]], 6, engine=Decoder(model), stats=stats)


def test_ends_may_be_any_collection_or_iterator(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    texts = generate(model, [[5, 6], [7]], 6, eos_ids=[3])
    assert generate(model, [[5, 6], [7]], 6, eos_ids=iter([3])) == texts
    assert generate(model, [[5, 6], [7]], 6, eos_ids={3: 0}.keys()) == texts
    for prompts in (None, "ab", [{5}]):
        with pytest.raises(ValueError, match="must be a list"):
            generate(model, prompts, 6)


def test_a_model_can_be_pickled(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint("llama")[0], dtype=torch.float16)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.embed_tokens.weight, model.embed_tokens.weight)


def test_numbers_beyond_float16_are_refused(checkpoint: Checkpoint) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = load_model(checkpoint("llama")[0], dtype=dtype)
        model.layers[0].mlp.down_proj.weight *= 6e4  # within its range: activations leave it
        if dtype == torch.bfloat16:
            generate(model, [[5, 6], [7]], 2)
            continue
        with pytest.raises(ValueError, match="leave float16: take bfloat16 or float32"):
            generate(model, [[5, 6], [7]], 2)
