"""examples/recipes.py: each does with the default model what it says."""
import sys

import pytest

from checks.common import HERE
from generate import Tokenizer, generate, load_tokenizer
from model import Transformer, load_model

sys.path.insert(0, str(HERE / "examples"))
import recipes


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_model()


@pytest.fixture(scope="module")
def text() -> Tokenizer:
    return load_tokenizer()


def test_banned_words_do_not_come(model: Transformer, text: Tokenizer) -> None:
    said = recipes.without(model, text, "The capital of France is", ["Paris"])
    assert "Paris" not in said and len(said) > 5


def test_the_likeliest_label_is_the_class(model: Transformer, text: Tokenizer) -> None:
    prompt, labels = "Water that freezes becomes", [" steam", " ice", " red wine"]
    assert recipes.classify(model, text, prompt, labels) == " ice"


def test_answers_fit_a_schema(model: Transformer, text: Tokenizer) -> None:
    pytest.importorskip("llguidance")
    fields = {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}}
    schema = {"type": "object", "properties": fields, "required": ["name", "age"]}
    schema["additionalProperties"] = False
    assert recipes.as_json(model, text, "Ann is 31.", schema).keys() == {"name", "age"}


def test_the_best_of_eight_has_the_highest_mean(model: Transformer, text: Tokenizer) -> None:
    prompt = text.encode("The opposite of hot is")
    drawn = generate(model, [prompt] * 8, 16, temperature=1.0, seed=0, logprobs=0,
                     eos_ids=text.eos_ids)
    means = {text.decode(ids): sum(ids.logprobs) / len(ids) for ids in drawn}
    assert len(means) > 3
    assert means[recipes.best_of(model, text, "The opposite of hot is", 8)] == max(means.values())


def test_what_is_behind_a_system_prompt_is_as_without_its_cache(
    model: Transformer, text: Tokenizer
) -> None:
    system, questions = "Be brief.", ["Which is the largest ocean?", "What do bees make?"]
    answers = recipes.behind(model, text, system, questions)
    model.cache = None
    for question, answer in zip(questions, answers, strict=True):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        [ids] = generate(model, [text.chat(messages)], 24, eos_ids=text.eos_ids)
        assert text.decode(ids) == answer
