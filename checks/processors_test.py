"""Logits that are changed before tokens are drawn, and log probabilities: processors/."""
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import generate as generation
from batching import Engine
from batching.speculate import Gauge
from checks.common import PROMPTS, run_cli
from checks.engine_test import collect, engine_of, loaded, random_prompt
from generate import Decoder, Request, Tokenizer, Tokens, generate, load_tokenizer
from model import Transformer
from processors import (
    PROCESSORS, BadWords, Grammar, LogitBias, MinNewTokens, NoRepeatNgram, Processor,
)

Checkpoint = Callable[[str], tuple[Path, PreTrainedModel]]  # the fixture: random ones, by name
N = 40  # new tokens
WORDS = [[7], [90, 12], [5, 6, 30]]
BIAS = {3: 9.0, 60: -20.0, 61: 1e3, 100: 2.5}


def text_of(hf: PreTrainedModel, prompt: list[int], **options: object) -> list[int]:
    """What transformers continues greedily with."""
    settings = dict(max_new_tokens=N, do_sample=False, eos_token_id=None, pad_token_id=0) | options
    ids = torch.tensor([prompt])
    text = hf.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return text[0, len(prompt):].tolist()


# --- equal to transformers ---

@pytest.mark.parametrize("theirs, ours", [
    (dict(repetition_penalty=1.3), dict(repetition_penalty=1.3)),
    (dict(repetition_penalty=0.7), dict(repetition_penalty=0.7)),
    (dict(no_repeat_ngram_size=1), dict(processors=[NoRepeatNgram(1)])),
    (dict(no_repeat_ngram_size=3), dict(processors=[NoRepeatNgram(3)])),
    (dict(bad_words_ids=WORDS), dict(processors=[BadWords(WORDS)])),
    (
        dict(sequence_bias=[[[i], b] for i, b in BIAS.items()], repetition_penalty=1.0),
        dict(processors=[LogitBias(BIAS)]),
    ),
    (
        dict(repetition_penalty=1.2, no_repeat_ngram_size=2, bad_words_ids=WORDS),
        dict(repetition_penalty=1.2, processors=[NoRepeatNgram(2), BadWords(WORDS)]),
    ),
], ids=lambda given: "-".join(given))
def test_equal_to_transformers(checkpoint: Checkpoint, theirs: dict, ours: dict) -> None:
    _, hf = checkpoint("llama")
    model = loaded(checkpoint)
    prompts = [*PROMPTS, [5, 6, 5, 6, 5]]
    want = [text_of(hf, prompt, **theirs) for prompt in prompts]
    assert want != [text_of(hf, prompt) for prompt in prompts]
    assert generate(model, prompts, N, **ours) == want


@pytest.mark.parametrize("n", [1, 5, 12])
def test_no_end_comes_too_soon(checkpoint: Checkpoint, n: int) -> None:
    _, hf = checkpoint("llama")
    model = loaded(checkpoint)
    for prompt in PROMPTS:
        ends = text_of(hf, prompt)[2:12:4]
        want = text_of(hf, prompt, eos_token_id=ends, min_new_tokens=n)
        got = generate(model, [prompt], N, eos_ids=ends, processors=[MinNewTokens(n)])
        assert got == [want]


def test_penalties_are_of_how_often_new_tokens_came(checkpoint: Checkpoint) -> None:
    """As OpenAI defines them: the prompt does not count."""
    model = loaded(checkpoint)

    def penalize(n: int) -> Callable[[Tensor, Tensor], Tensor]:
        def by_hand(ids: Tensor, logits: Tensor) -> Tensor:
            counts = torch.bincount(ids[n:], minlength=len(logits))
            return logits - 0.5 * counts - 1.5 * (counts > 0)
        return by_hand

    settings = dict(frequency_penalty=0.5, presence_penalty=1.5)
    for prompt in PROMPTS:
        [plain] = generate(model, [prompt], N)
        [got] = generate(model, [prompt], N, **settings)
        assert plain != got
        assert generate(model, [prompt], N, processors=[penalize(len(prompt))]) == [got]


# --- the same text, however it is decoded ---

def count_calls(ids: Tensor, logits: Tensor) -> Tensor:
    """Depends on all that stands before."""
    weights = torch.arange(len(ids)) % 7
    return logits.index_fill(0, (ids * weights).sum() % 131 + torch.arange(3) - 2, 5.0)


MIXED = [
    Request(random_prompt(3), 50, repetition_penalty=1.4),
    Request([5, 6, 7, 8, 9, 10, 11] * 4, 60, frequency_penalty=0.7),
    Request(random_prompt(9), 30, temperature=1.3, seed=1, presence_penalty=-1.0),
    Request(random_prompt(1), 40, processors=[count_calls], repetition_penalty=0.9),
    Request(random_prompt(20), 1, repetition_penalty=1.4),
    Request(random_prompt(30), 50, 0.8, top_k=20, seed=5, processors=[NoRepeatNgram(2)]),
    Request(random_prompt(5), 40),
]


@pytest.mark.parametrize("rows, k", [(1, 0), (3, 0), (8, 0), (1, 4), (3, 4)])
def test_rows_neighbours_and_proposals_change_no_text(
    checkpoint: Checkpoint, rows: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gauge, "pays", lambda gauge, n_rows: True)
    model = loaded(checkpoint)
    want = []
    for request in MIXED:  # one after the other, in a Decoder
        model.setup_caches(1, 96)
        decoder = Decoder(model)
        want.append([token for _, tokens in decoder.run([request]) for token in tokens])
    for lag in (0, 2):
        model.setup_caches(rows, 96)
        engine = Engine(model, speculate_k=k)
        engine.lag = lag
        assert collect(engine, MIXED) == want
        if k:
            assert sum(engine.stats.speculation.accepted)


# --- a seam that nothing goes around ---

def test_a_row_of_processors_is_never_skipped(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a setting, or is on for all; the step knows where the new tokens begin."""
    model = loaded(checkpoint)

    def push(logits: Tensor, texts: object, setting: Tensor) -> Tensor:
        """The token of how many new ones there are."""
        new = (texts.n - texts.begins).long()[:, None]
        return logits.scatter_add(1, new, setting)

    monkeypatch.setitem(PROCESSORS, "pushed", Processor(push, off=1e4))
    for prompt in PROMPTS:
        assert generate(model, [prompt], 5, presence_penalty=0.0) == [[0, 1, 2, 3, 4]]
    got = generate(model, PROMPTS, 5, presence_penalty=0.0, temperature=2.0, top_k=5)
    assert got == [[0, 1, 2, 3, 4]] * len(PROMPTS)


@pytest.mark.parametrize("settings", [{}, dict(temperature=1.0), dict(temperature=1.0, top_k=3)])
def test_filter_probs_of_ones_own_is_never_skipped(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, settings: dict
) -> None:
    model = loaded(checkpoint)

    def odd(probs: Tensor, sampling: object, n: int) -> tuple[Tensor, Tensor]:
        probs, ids = probs.topk(n)
        return probs.masked_fill(ids % 2 == 0, 0), ids

    monkeypatch.setattr(generation, "filter_probs", odd)
    for engine in (None, engine_of(model, 2)):
        for tokens in generate(model, PROMPTS[:2], 20, seed=1, engine=engine, **settings):
            assert {token % 2 for token in tokens} == {1}


def test_an_engine_remembers_what_was_cached(checkpoint: Checkpoint) -> None:
    """And what it has not seen does not count."""
    model = loaded(checkpoint)
    prompt = random_prompt(30)
    [whole] = generate(model, [prompt], 12, repetition_penalty=1.5)
    engine = engine_of(model, 1)
    generate(model, [prompt[:20]], 1, engine=engine, repetition_penalty=1.5)
    options = dict(cached=20, engine=engine)
    assert generate(model, [prompt[20:]], 12, repetition_penalty=1.5, **options) == [whole]
    model.setup_caches(1, 96)
    model(torch.tensor([prompt[:20]]), torch.zeros(1, dtype=torch.int32))
    seen = []

    def note(ids: Tensor, logits: Tensor) -> Tensor:
        seen.append(ids.tolist())
        return logits

    generate(model, [prompt[20:]], 2, cached=20, processors=[note])
    assert seen[0] == prompt[20:]


# --- log probabilities ---

def of_transformers(hf: PreTrainedModel, ids: list[int]) -> Tensor:
    """Log probabilities [n, V] of what follows each token."""
    with torch.no_grad():
        return hf(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("k", [0, 4])
@pytest.mark.parametrize("settings", [{}, dict(temperature=2.0, seed=3, repetition_penalty=1.5)])
def test_log_probabilities_are_the_models_own(
    checkpoint: Checkpoint, settings: dict, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of drawn tokens and of the prompts', whatever draws them, and however they are decoded."""
    monkeypatch.setattr(Gauge, "pays", lambda gauge, n_rows: True)
    model = loaded(checkpoint)
    _, hf = checkpoint("llama")
    prompts = [*PROMPTS, [5], random_prompt(40)]
    plain = generate(model, prompts, 12, **settings)
    for options in ({}, dict(speculate_k=3), dict(engine=engine_of(model, 2, lag=2))):
        got = generate(model, prompts, 12, logprobs=k, echo=True, **settings, **options)
        assert got == plain
        for prompt, answer in zip(prompts, got):
            want = of_transformers(hf, prompt + answer)[:-1]
            assert answer.prompt_logprobs[0] is answer.prompt_top_logprobs[0] is None
            logprobs = [*answer.prompt_logprobs[1:], *answer.logprobs]
            chosen = want.gather(1, torch.tensor([(prompt + answer)[1:]]).T)[:, 0]
            assert torch.allclose(torch.tensor(logprobs), chosen, atol=2e-4)
            top = [*answer.prompt_top_logprobs[1:], *answer.top_logprobs]
            assert [list(each) for each in top] == want.topk(k).indices.tolist()
            values = torch.tensor([list(each.values()) for each in top])
            assert torch.allclose(values, want.topk(k).values, atol=2e-4)


def test_prompts_log_probabilities_do_not_depend_on_chunks(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(checkpoint, "mistral")
    prompts = [random_prompt(n) for n in (50, 7, 61)]
    want = generate(model, prompts, 2, logprobs=2, echo=True)
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 5)
    monkeypatch.setattr("processors.logprobs.HEAD_TOKENS", 7)
    engine = engine_of(model, 3)
    for engine.chunk in (lambda: 15, lambda: 1):
        got = generate(model, prompts, 2, logprobs=2, echo=True, engine=engine)
        for answer, other, prompt in zip(got, want, prompts):
            assert len(answer.prompt_logprobs) == len(prompt)
            same = pytest.approx(other.prompt_logprobs[1:], abs=2e-4)
            assert answer.prompt_logprobs[1:] == same


def test_a_prompt_is_echoed_for_those_who_ask(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    requests = [Request(PROMPTS[0], 2, logprobs=0, echo=echo) for echo in (True, None, False)]
    told = [vars(ids) for _, ids in engine_of(model, 3, 0).run(requests)]
    assert ["prompt_logprobs" in known for known in told] == [True] + [False] * 5


def test_a_stream_has_log_probabilities_and_ends_answers(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    plain = generate(model, PROMPTS, 12)
    for options in ({}, dict(logprobs=1), dict(speculate_k=3), dict(engine=engine_of(model, 2, 2))):
        streamed = [Tokens() for _ in PROMPTS]

        def stream(number: int, ids: list[int]) -> bool:
            streamed[number].add(ids)
            return not (number == 1 and len(streamed[1]) >= 4)

        got = generate(model, PROMPTS, 12, stream=stream, **options)
        assert [answer.finish_reason for answer in got] == ["length", "stop", "length"]
        assert 4 <= len(got[1]) < 8 and got[1] == plain[1][:len(got[1])]
        assert got[::2] == plain[::2] and got == streamed
        assert [answer.logprobs for answer in got] == [answer.logprobs for answer in streamed]


def test_finish_reasons_stand_beside_the_tokens(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    [free] = generate(model, PROMPTS[:1], 12)
    for k in (0, 2):
        [answer] = generate(model, PROMPTS[:1], 12, eos_ids=[free[5]], speculate_k=k)
        assert answer == free[:6] and answer.finish_reason == "eos" and not answer.logprobs
        assert generate(model, [random_prompt(90)], 12, speculate_k=k)[0].finish_reason == "context"


def test_numbers_of_numpy_and_tuples_are_numbers_and_lists(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    settings = dict(temperature=0.5, top_k=9, top_p=0.5, seed=2, eos_ids=[3])
    want = generate(model, [[5, 6], [7]], 6, **settings)
    got = generate(
        model, ((np.int64(5), np.int32(6)), (7,)), np.int64(6), temperature=np.float32(0.5),
        top_k=np.int16(9), top_p=np.float64(0.5), seed=np.uint64(2), eos_ids=(np.int64(3),),
        cached=np.int64(0), speculate_k=np.int64(0), stop=(), processors=(),
    )
    assert got == want
    assert generate(model, [[5]], 6, temperature=1.0, seed=np.int64(2**63 - 1))
    for name, bad in ("top_k", np.float64(2)), ("temperature", np.bool_(True)), ("top_p", want):
        with pytest.raises(ValueError, match="must be a"):
            generate(model, [[5]], 6, **{name: bad})


@pytest.mark.parametrize("options, message", [
    (dict(processors=LogitBias({})), "processors must be a list of functions"),
    (dict(processors=[3]), r"processors must be a list of functions, not \[3\]"),
    (dict(echo=True), "echo goes with logprobs"),
    (dict(processors=[lambda ids, logits: None]), "a processor gives logits .*, not None"),
    (dict(processors=[lambda ids, logits: logits[1:]]), "a processor gives logits of all tokens"),
    (dict(logprobs=-1), "logprobs: -1 is not at least 0"),
    (dict(repetition_penalty=0), "repetition_penalty: 0 is not above 0"),
    (dict(presence_penalty="1"), "presence_penalty must be a number"),
])
def test_what_makes_no_sense_is_refused(
    checkpoint: Checkpoint, options: dict, message: str
) -> None:
    model = loaded(checkpoint)
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPTS, 4, **options)
    assert len(generate(model, PROMPTS[:1], 4)[0]) == 4  # it is no worse for it
    with pytest.raises(ValueError, match="batching.Engine gives, and not a Decoder"):
        generate(model, PROMPTS, 4, logprobs=1, engine=Decoder(model, model.setup_caches(3, 96)))


def test_rows_that_share_a_beginning_know_all_of_it(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    prompts = [[*random_prompt(45), i] for i in (7, 8, 9, 10)]
    settings = dict(repetition_penalty=1.4, processors=[NoRepeatNgram(2)])
    want = [generate(model, [prompt], 20, **settings)[0] for prompt in prompts]
    echoes = [generate(model, [prompt], 1, logprobs=0, echo=True)[0] for prompt in prompts]
    for rows in (2, 4):
        engine = engine_of(model, rows)
        assert generate(model, prompts, 20, engine=engine, **settings) == want
        assert engine.stats.shared_tokens
        got = generate(model, prompts, 1, logprobs=0, echo=True, engine=engine)
        for one, other in zip(got, echoes, strict=True):
            same = pytest.approx(other.prompt_logprobs[1:], abs=2e-4)
            assert one.prompt_logprobs[1:] == same


def test_tokens_beyond_the_vocabulary_change_nothing(checkpoint: Checkpoint) -> None:
    """A tokenizer may have some that its model has not, ends of a text among them."""
    model = loaded(checkpoint)
    functions = [MinNewTokens(2), BadWords([[5, 500], [500]]), LogitBias({500: 1.0})]
    want = generate(model, PROMPTS, 4)
    assert generate(model, PROMPTS, 4, eos_ids=[500], processors=functions) == want


def test_a_row_of_processors_without_a_setting_is_on_by_what_a_run_asks(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not by what the engine was asked before."""
    model = loaded(checkpoint)
    off = generate(model, PROMPTS, 3)

    def want_one(logits: Tensor, *_: object) -> Tensor:
        return logits.index_fill(1, torch.tensor([1]), 1e4)

    monkeypatch.setitem(PROCESSORS, "one", Processor(want_one, off=0.0))
    engine = engine_of(model, 3)
    for settings, want in ({}, off), (dict(logprobs=0), [[1] * 3] * 3), ({}, off):
        assert generate(model, PROMPTS, 3, engine=engine, **settings) == want


# --- the command line ---

SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["city", "n"],
    "properties": {"city": {"type": "string", "maxLength": 12}, "n": {"type": "integer"}},
}


def test_lines_have_settings_of_their_own_and_log_probabilities(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": "a a a"}, {"prompt": "a a a", "repetition_penalty": 1.9, "logprobs": 2}]
    file = tmp_path / "jobs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, err = run_cli(
        capfd, "--checkpoint_path", tiny, "--device", "cpu", "--prompts", file, "--json",
        "--max_new_tokens", 24, "--logprobs", 0, "--echo",
    )
    assert code == 0, err
    one, other = sorted(map(json.loads, out.splitlines()[:2]), key=lambda record: record["index"])
    assert one["text"] != other["text"]
    for record, k in (one, 0), (other, 2):
        assert len(record["logprobs"]) == record["new_tokens"]
        assert len(record["prompt_logprobs"]) == record["prompt_tokens"]
        assert {len(each["top_logprobs"]) for each in record["logprobs"]} == {k}
        assert "".join(each["token"] for each in record["prompt_logprobs"]) == "a a a"


@pytest.mark.parametrize("options, message", [
    (["--logprobs", 1], "--logprobs goes with --json or --output"),
    (["--json", "--echo"], "--echo goes with --logprobs"),
    (["--repetition_penalty", 0], "0 is not above 0"),
    (["--json_schema", "none.json"], "cannot read the grammar none.json"),
    (["--json_schema", ""], "cannot read the grammar : "),
])
def test_flags_that_make_no_sense_are_refused(
    tiny: Path, capfd: pytest.CaptureFixture[str], options: list, message: str
) -> None:
    code, _, err = run_cli(capfd, "--checkpoint_path", tiny, "--device", "cpu", *options)
    assert code == 2 and message in err and err.count("\n") == 1


# --- grammars ---

@pytest.mark.parametrize("k", [0, 4])
def test_json_of_a_schema(
    smollm: tuple[Transformer, Tokenizer], k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and sampled, with proposals and without: the same."""
    pytest.importorskip("llguidance")
    monkeypatch.setattr(Gauge, "pays", lambda gauge, n_rows: True)
    model, tokenizer = smollm
    grammar = Grammar("json_schema", json.dumps(SCHEMA), tokenizer, model.config.vocab_size)
    prompt = tokenizer.encode("In JSON, a city and a number:")
    options = dict(eos_ids=tokenizer.eos_ids, processors=[grammar])
    for settings in (dict(), dict(temperature=1.5, seed=3)):
        plain = generate(model, [prompt], 60, **options, **settings)
        assert generate(model, [prompt], 60, speculate_k=k, **options, **settings) == plain
        assert plain[0].finish_reason == "eos"
        answer = json.loads(tokenizer.decode(plain[0]))
        assert set(answer) == {"city", "n"} and isinstance(answer["n"], int)


@pytest.mark.parametrize("kind, text, message", [
    ("grammar", "root ::= foo", "no grammar: .*foo"),
    ("json_schema", '{"type":', "no json_schema"),
    ("json_schema", '{"type": "foo"}', "no json_schema: Invalid type: foo"),
    ("json_schema", '{"$ref": "#"}', "no json_schema: no text is one of it"),
])
def test_what_is_no_grammar_gets_a_sentence(tiny: Path, kind: str, text: str, message: str) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(ValueError, match=message):
        Grammar(kind, text, load_tokenizer(tiny), 600)


def test_a_missing_package_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match="pip install llguidance"):
        Grammar("json_schema", "{}", load_tokenizer(tiny), 600)


# --- what people write ---

def test_a_word_is_banned(smollm: tuple[Transformer, Tokenizer]) -> None:
    model, tokenizer = smollm
    prompt = tokenizer.encode("The capital of France is")
    banned = BadWords([tokenizer.encode(word, bos=False) for word in (" Paris", "Paris")])
    [answer] = generate(model, [prompt], 12, processors=[banned])
    assert "Paris" not in tokenizer.decode(answer)


def test_a_classifier_by_two_tokens(smollm: tuple[Transformer, Tokenizer]) -> None:
    model, tokenizer = smollm
    labels = {tokenizer.encode(f" {name}", bos=False)[0]: name for name in ("positive", "negative")}
    only = LogitBias(dict.fromkeys(labels, 1e3))
    found = []
    for review in ("I love it, great!", "I hate it, awful!"):
        prompt = tokenizer.encode(f"Review: {review}\nSentiment (positive or negative):")
        [answer] = generate(model, [prompt], 1, processors=[only], logprobs=0)
        found.append(labels[answer[0]])
        assert answer.logprobs[0] < 0
    assert found == ["positive", "negative"]


def test_the_best_of_eight(smollm: tuple[Transformer, Tokenizer]) -> None:
    model, tokenizer = smollm
    prompt = tokenizer.encode("Once upon a time")
    answers = generate(model, [prompt] * 8, 8, temperature=1.0, seed=1, logprobs=0)
    best = max(answers, key=lambda answer: sum(answer.logprobs) / len(answer))
    assert len({tuple(answer) for answer in answers}) > 4
    assert sum(best.logprobs) == max(sum(answer.logprobs) for answer in answers)
