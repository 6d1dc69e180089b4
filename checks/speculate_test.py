"""Speculative decoding: whatever is proposed, the texts are those of plain decoding."""
import copy
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from batching import Engine, Stats
from batching.speculate import Gauge, PromptLookup
from checks.common import hf_folder, run_cli
from checks.engine_test import alone, chi_squared, collect, is_last, loaded, random_prompt
from formats.default import default_model
from generate import Request, Sampling, Tokenizer, compile_model, generate
from model import KVCache, Transformer, load_model
from quantize import quantize_model

Checkpoint = Callable[[str], tuple[Path, PreTrainedModel]]  # the fixture: random ones, by name


@pytest.fixture(scope="module")
def nearly(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    """A draft that often agrees with the random llama: its weights and a little noise."""
    hf = copy.deepcopy(checkpoint("llama")[1])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("draft")
    hf.save_pretrained(folder)
    return load_model(folder, dtype=torch.float32)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt lookup is tried at every step."""
    monkeypatch.setattr(Gauge, "pays", lambda gauge, n_rows: True)


def speculating(
    model: Transformer, rows: int, k: int, draft: Transformer | None = None, lag: int = 0,
    room: int = 96, **options: object,
) -> Engine:
    model.setup_caches(rows, room, options.pop("kv_dtype", None))
    engine = Engine(model, speculate_k=k, draft=draft, **options)
    engine.lag = lag
    return engine


REPEATED = [5, 6, 7, 8, 9, 10, 11] * 4
GREEDY = [
    Request(random_prompt(3), 50),
    Request(REPEATED, 60),
    Request(random_prompt(9), 30),
    Request(random_prompt(1), 95),  # to the end of the context
    Request(random_prompt(20), 1),
    Request(random_prompt(40), 80),  # the same
]
SETTINGS = [
    dict(temperature=0.7, top_p=0.9),
    dict(temperature=1.0),
    dict(temperature=1.5, top_k=20),
    dict(temperature=0.3, min_p=0.1),
    dict(),
    dict(temperature=1.0, top_k=50, top_p=0.8, min_p=0.01),
]
SEEDED = [
    dataclasses.replace(request, seed=seed, **settings)
    for seed, (request, settings) in enumerate(zip(GREEDY, SETTINGS))
]
REQUESTS = {"greedy": GREEDY, "seeded": SEEDED}


@pytest.fixture(scope="module")
def plain_texts(checkpoint: Checkpoint) -> Callable[[str], list[list[int]]]:
    """What plain decoding says to REQUESTS[name]."""
    return functools.cache(lambda name: alone(loaded(checkpoint), REQUESTS[name]))


@pytest.mark.parametrize("requests", REQUESTS)
@pytest.mark.parametrize("k, rows, lag", [(1, 8, 0), (4, 3, 2), (15, 2, 1)])
@pytest.mark.parametrize("how", ["lookup", "itself", "nearly"])
def test_texts_are_those_of_plain_decoding(
    checkpoint: Checkpoint, nearly: Transformer, always: None, plain_texts: Callable,
    requests: str, k: int, rows: int, lag: int, how: str,
) -> None:
    """At any temperature, whatever the draft, k, the batch and what is under way; rows are
    refilled, and reach the end of the context by plain steps."""
    model = loaded(checkpoint)
    drafts = {"lookup": None, "itself": model, "nearly": nearly}
    engine = speculating(model, rows, k, drafts[how], lag)
    assert collect(engine, REQUESTS[requests]) == plain_texts(requests)
    reasons = [engine.finish_reasons[number] for number in range(6)]
    assert reasons == ["length"] * 5 + ["context"]
    found = engine.stats.speculation
    assert found.checked > 0 and len(found.accepted) == k
    if how == "itself":  # every proposal is right
        assert found.accepted == [found.checked] * k


@pytest.mark.parametrize("how", ["lookup", "nearly"])
@pytest.mark.parametrize("lag", [0, 2])
def test_a_row_ends_inside_an_accepted_run(
    checkpoint: Checkpoint, nearly: Transformer, always: None, plain_texts: Callable, how: str,
    lag: int,
) -> None:
    """At an end of text, or where the host says so; what was accepted behind it is dropped."""
    model = loaded(checkpoint)
    draft = nearly if how == "nearly" else None
    full = plain_texts("greedy")
    requests = []
    expected = []
    for number, (request, tokens) in enumerate(zip(GREEDY, full)):
        last = tokens[len(tokens) * 2 // 3]
        if number % 2:
            ended = dataclasses.replace(request, ends=functools.partial(is_last, last))
        else:
            ended = dataclasses.replace(request, eos_ids=frozenset({last}))
        requests.append(ended)
        expected.append(tokens[:tokens.index(last) + 1])
    engine = speculating(model, 2, 6, draft, lag)
    assert collect(engine, requests) == expected
    reasons = [engine.finish_reasons[number] for number in range(6)]
    assert reasons == ["eos", "stop"] * 3


def test_steps_bring_several_tokens(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    requests = [Request(random_prompt(5), 41)]
    engine = speculating(model, 1, 4, model)
    assert [len(tokens) for _, tokens in engine.run(requests)] == [1] + [5] * 8
    assert engine.stats.decode_tokens == 40
    assert engine.stats.useful_row_steps == engine.stats.row_steps == 8


@pytest.mark.parametrize("how", ["lookup", "nearly"])
def test_int8_cache_and_quantized_weights(
    checkpoint: Checkpoint, nearly: Transformer, always: None, how: str
) -> None:
    """What they compute is rounded, and depends a little on how many tokens go together: here
    nothing hinges on it."""
    model = quantize_model(loaded(checkpoint), "int8")
    draft = nearly if how == "nearly" else None
    requests = GREEDY[:3]
    plain = speculating(model, 3, 0, kv_dtype=torch.int8)
    expected = collect(plain, requests)
    engine = speculating(model, 3, 4, draft, kv_dtype=torch.int8)
    assert collect(engine, requests) == expected
    assert sum(engine.stats.speculation.accepted) > 0


@pytest.mark.parametrize("how", ["lookup", "itself"])
def test_checking_steps_are_compiled(
    checkpoint: Checkpoint, always: None, how: str, dynamo: None
) -> None:
    """One graph for plain steps and one for checking ones, which a draft's calls of two tokens
    and of one share or add to; nothing is compiled later."""
    model = loaded(checkpoint)
    expected = alone(model, GREEDY)
    compile_model(model)
    engine = speculating(model, 2, 3, model if how == "itself" else None, compiled=True)
    for k in (0, 3):
        engine.k_now = k
        assert engine.prepare() > 0
    n_graphs = counters["stats"]["unique_graphs"]
    assert n_graphs == (3 if how == "itself" else 2)
    assert collect(engine, GREEDY) == expected
    assert counters["stats"]["unique_graphs"] == n_graphs
    assert engine.stats.speculation.checked > 0


@pytest.mark.parametrize("how", ["lookup", "itself"])
def test_a_conversation_goes_on(checkpoint: Checkpoint, always: None, how: str) -> None:
    """The draft and the lookup know what the turns before said."""
    model = loaded(checkpoint)
    engine = speculating(model, 1, 4, model if how == "itself" else None)
    first = [*random_prompt(8), *REPEATED]
    answer, = generate(model, [first], 9, engine=engine)
    text = first + answer
    whole, = alone(model, [Request([*text, 5, 6], 20)])
    again, = generate(model, [[text[-1], 5, 6]], 20, cached=len(text) - 1, engine=engine)
    assert again == whole
    found = engine.stats.speculation
    if how == "itself":
        assert found.accepted == [found.checked] * 4

@pytest.mark.parametrize("room", [40, 43, 44])
def test_a_context_ends_where_plain_decoding_ends(
    checkpoint: Checkpoint, always: None, room: int
) -> None:
    """With room for proposals behind it or without."""
    model = loaded(checkpoint)
    prompts = [random_prompt(3), random_prompt(9), REPEATED]
    model.setup_caches(3, 40)
    expected = generate(model, prompts, 99)
    engine = speculating(model, 3, 4, room=room, context=40)
    assert generate(model, prompts, 99, engine=engine) == expected
    assert [len(tokens) for tokens in expected] == [37, 31, 12]
    assert set(engine.finish_reasons.values()) == {"context"}
    if room == 44:  # they never have to do without
        assert not engine.stats.speculation.plain_s


def test_a_row_that_is_done_keeps_its_text_beside_checks(
    checkpoint: Checkpoint, always: None
) -> None:
    """Steps of another row write nothing into a conversation that ended near the cache's end."""
    model = loaded(checkpoint)
    long, short = random_prompt(91), random_prompt(4)
    engine = speculating(model, 2, 8)
    (*_, last), _ = turn = collect(engine, [Request(long, 2), Request(short, 60)])
    assert len(engine.stats.speculation.plain_s) > 20  # checks had no room beside it
    more, _ = collect(engine, [Request([last], 3, cached=92), Request(short, 1)])
    assert [more] == alone(model, [Request(long + turn[0], 3)])

def test_a_full_row_without_a_request_is_no_reason_against_proposals(
    checkpoint: Checkpoint, always: None
) -> None:
    """Steps of the rows before it do not reach it."""
    model = loaded(checkpoint)
    engine = speculating(model, 2, 4)
    full = random_prompt(90)
    _, said = collect(engine, [Request([5], 1), Request(full, 5)])
    engine.stats = Stats()
    got = collect(engine, [Request(REPEATED, 30)])
    assert engine.stats.speculation.checked > 0 and not engine.stats.speculation.plain_s
    _, more = collect(engine, [Request([5], 1), Request(said[-1:], 9, cached=94)])
    whole = [Request(REPEATED, 30), Request(full + said, 9)]
    assert [got[0], more] == alone(model, whole)

# --- the distribution ---


VOCABULARY = 6
TARGET = torch.tensor([0.35, 0.25, 0.2, 0.1, 0.07, 0.03])
DRAFTS = {
    "good": torch.tensor([0.3, 0.3, 0.2, 0.1, 0.05, 0.05]),
    "bad": torch.full((6,), 1 / 6),
    "adversarial": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.02, 0.98]),
}


class Fixed(torch.nn.Module):
    """A model whose next token depends on the one before: probabilities rolled by it."""

    def __init__(self, probs: Tensor):
        super().__init__()
        self.table = torch.stack([probs.roll(i) for i in range(VOCABULARY)]).log()  # (V, V)

    def decode(self, tokens: Tensor, input_pos: Tensor, cache: object) -> Tensor:
        return self.table[tokens]  # (B, T, V)


@pytest.mark.parametrize("settings, kept", [(dict(), 6), (dict(top_p=0.7), 3)], ids=str)
@pytest.mark.parametrize("draft", DRAFTS)
def test_the_distribution_is_the_models(
    checkpoint: Checkpoint, draft: str, settings: dict, kept: int
) -> None:
    """Over many seeds, each of three tokens that a step checks and brings follows the model's
    filtered probabilities, given the one before; a better draft has more accepted."""
    n = 4000
    model = loaded(checkpoint)
    model.setup_caches(n, 16)
    engine = Engine(model, speculate_k=2, draft=model)
    engine.model = Fixed(TARGET)
    engine.drafter.model = Fixed(DRAFTS[draft])
    requests = [Request([1], 9, temperature=1.0, seed=seed, **settings) for seed in range(n)]
    engine.sampling = Sampling.of(requests, torch.device("cpu"))
    engine.kind = "filtered"
    engine.active.fill_(1)
    engine.input_pos.fill_(1)
    before = engine.token[:, 0].clone()
    engine.k_now = 2
    drawn = engine.step()
    shares = TARGET[:kept] / TARGET[:kept].sum()
    counted = torch.ones(n, dtype=torch.bool)
    for position in range(3):
        if not counted.any():  # top_p leaves the adversary nothing that it leaves the model
            assert draft == "adversarial" and settings
            break
        tokens = drawn.tokens[:, position]
        steps = (tokens - before)[counted] % VOCABULARY
        counts = torch.bincount(steps, minlength=VOCABULARY)
        assert not counts[kept:].any()
        assert chi_squared(counts[:kept], shares) > 1e-4
        before = tokens
        counted = drawn.agreed > position
    overlap = {"good": (0.7, 1), "bad": (0.4, 0.8), "adversarial": (0, 0.15)}
    low, high = overlap[draft]
    assert low <= (drawn.agreed > 0).float().mean() <= high

# --- prompt lookup ---


@pytest.mark.parametrize("text, proposals", [
    ([1, 2, 3, 4, 5, 9, 2, 3], [4, 5, 9]),  # the last two stood there before
    ([1, 2, 3, 4, 7, 2, 3, 5, 1, 2, 3], [4, 7, 2]),  # three count for more than two
    ([2, 3, 4, 7, 2, 3, 5, 8, 2, 3], [5, 8, 2]),  # of two places the last
    ([7, 1, 2, 1, 2], [1, 2, 1]),  # over and over
    ([4, 4, 4], [4, 4, 4]),
    ([3, 8, 5, 3], [8, 5, 3]),  # better than nothing
    ([1, 2, 3], [3, 3, 3]),  # nothing to go by
    ([6], [6, 6, 6]),
])
def test_prompt_lookup(text: list[int], proposals: list[int]) -> None:
    cache = KVCache(1, 1, 8, max_batch_size=2, max_seq_len=16)
    drafter = PromptLookup(cache)
    drafter.history.fill_(2)  # what is behind a row's end is not looked at
    drafter.read(torch.tensor([text]), slice(1, 2), cached=0, last=None)
    input_pos = torch.tensor([len(text) - 1], dtype=torch.int32)
    got = drafter.propose(torch.tensor([text[-1:]]), input_pos, slice(1, 2), 3, None)
    assert got.tolist() == [proposals]

# --- when it pays ---


def test_looking_up_stops_where_it_does_not_pay() -> None:
    gauge = Gauge(4)
    assert not gauge.pays(1)
    for _ in range(20):
        gauge.observe(0, {0: 1}, 1, 0.010)  # one proposal after the other is right
    assert gauge.pays(1)
    for _ in range(5):
        gauge.observe(4, {0: 4}, 1, 0.014)
    assert gauge.cost(1) == pytest.approx(1.4) and gauge.tokens > 4 and gauge.pays(1)
    for _ in range(20):
        gauge.observe(4, {0: 0}, 1, 0.014)
    assert not gauge.pays(1)


def test_random_text_is_decoded_by_plain_steps(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    engine = speculating(model, 2, 4, room=600)
    collect(engine, [Request([seed], 500, temperature=5.0, seed=seed) for seed in range(2)])
    found = engine.stats.speculation
    assert len(found.plain_s) > 0.95 * len(engine.stats.steps_s)


def test_proposals_behind_the_end_of_a_text_count_for_nothing(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    text, = generate(model, [[5, 6, 7]], 30)
    end = next(token for i, token in enumerate(text) if i > 2 and token not in text[:i])
    engine = speculating(model, 1, 15, draft=model)  # which is right each time
    got, = collect(engine, [Request([5, 6, 7], 30, eos_ids=[end])])
    found = engine.stats.speculation
    assert got == text[:text.index(end) + 1]
    assert len(got) == 1 + found.tokens < sum(found.accepted)


@pytest.mark.parametrize("sizes", [(320, 300), (300, 320)], ids=str)
def test_a_draft_may_have_other_padding(
    sizes: tuple[int, int], always: None, tmp_path: Path
) -> None:
    """Behind the tokens of one tokenizer, to which the sizes are rounded up."""
    folders = [hf_folder(tmp_path / str(size), vocab_size=size) for size in sizes]
    model, draft = [load_model(folder, dtype=torch.float32) for folder in folders]
    prompt = [5, sizes[0] - 1, 7]  # the model's own last token, padding too
    settings = dict(temperature=1.0, seed=0)
    plain = generate(model, [prompt], 40, **settings)
    assert generate(model, [prompt], 40, speculate_k=3, draft=draft, **settings) == plain

# --- mistakes ---


def test_what_does_not_go_together_is_refused(
    checkpoint: Checkpoint, smollm: tuple[Transformer, Tokenizer]
) -> None:
    model = loaded(checkpoint)
    model.setup_caches(1, 32)
    with pytest.raises(ValueError, match="49152 tokens and the model one of 131"):
        Engine(model, speculate_k=4, draft=smollm[0])
    for k in (-1, 16):
        with pytest.raises(ValueError, match="0 to 15"):
            Engine(model, speculate_k=k)
    with pytest.raises(ValueError, match="goes with speculate_k"):
        Engine(model, draft=model)

# --- the real model ---


@pytest.fixture(scope="module")
def real_prompts(smollm: tuple[Transformer, Tokenizer]) -> list[list[int]]:
    """Chat and code."""
    _, tokenizer = smollm
    code = "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n"
    code += "    return total / len(values)\n\n\ndef mean_of_squares(values):\n"
    texts = [code, "1, 2, 3,"]
    questions = ["What is the capital of France?", "Say hello three times.", "Who wrote Hamlet?"]
    chats = [tokenizer.chat([{"role": "user", "content": text}]) for text in questions]
    return chats + [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_smollm_says_the_same(
    smollm: tuple[Transformer, Tokenizer], real_prompts: list[list[int]], always: None,
    temperature: float,
) -> None:
    model, _ = smollm
    settings = dict(temperature=temperature, top_p=0.95)
    model.setup_caches(5, 128)
    expected = generate(model, real_prompts, 20, seed=7, **settings)
    engine = Engine(model, speculate_k=4)
    assert generate(model, real_prompts, 20, seed=7, engine=engine, **settings) == expected
    model.setup_caches(1, 128)
    engine = Engine(model, speculate_k=15)
    code = generate(model, real_prompts[3:4], 20, seed=10, engine=engine, **settings)
    assert code == expected[3:4]

# --- the command line ---


def test_flags(
    capfd: pytest.CaptureFixture, smollm: tuple[Transformer, Tokenizer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer is the same, and what the proposals brought is said."""
    monkeypatch.setattr("generate.load_model", lambda *args, **options: smollm[0])
    speculate = ("--device", "cpu", "--speculate_k", 3, "--draft_checkpoint_path", default_model())
    code, out, err = run_cli(capfd, *speculate)
    assert code == 0 and out == "The capital of France is Paris.\n"
    assert "proposals accepted by position: 100% 100% 100%; 3.50 tokens a step" in err

    code, out, _ = run_cli(capfd, *speculate, *"--benchmark --max_new_tokens 9 --json".split())
    found = json.loads(out)["speculation"]
    assert code == 0 and 2 <= found["checking_steps"] < 8


@pytest.mark.parametrize("arguments, message", [
    ("--speculate_k 16", "at most 15"),
    ("--speculate_k few", "whole number"),
    ("--draft_checkpoint_path x", "goes with --speculate_k"),
    ("--speculate_k 2 --draft_quantize int4", "goes with --draft_checkpoint_path"),
    ("--speculate_k 2 --draft_checkpoint_path /no/such/model", "/no/such/model"),
])
def test_mistakes_get_one_sentence(
    capfd: pytest.CaptureFixture, arguments: str, message: str
) -> None:
    code, out, err = run_cli(capfd, "--device", "cpu", *arguments.split())
    last = err.strip().splitlines()[-1]
    assert code == 2 and out == "" and "Traceback" not in err
    assert last.startswith("generate.py: error: ") and message in last


def test_a_draft_of_another_tokenizer_is_refused(
    capfd: pytest.CaptureFixture, tokenizer_folder: Path
) -> None:
    arguments = ("--speculate_k", 2, "--draft_checkpoint_path", tokenizer_folder)
    code, _, err = run_cli(capfd, "--device", "cpu", *arguments)
    assert code == 2 and "has another tokenizer than the model" in err


def test_a_draft_keeps_a_cache_of_its_own(checkpoint: Checkpoint, nearly: Transformer) -> None:
    model = loaded(checkpoint)
    own = nearly.setup_caches(1, 32)
    generate(model, [REPEATED], 5, speculate_k=3, draft=nearly)
    assert nearly.cache is own


def test_timed_steps_are_plain_ones(checkpoint: Checkpoint, nearly: Transformer) -> None:
    model = loaded(checkpoint)
    engine = speculating(model, 1, 3, nearly)
    generate(model, [REPEATED], 60, engine=engine)
    assert len(engine.timed_steps(3)) == 3  # a row at the end of the cache has no room for four
    assert engine.k_now == 0
