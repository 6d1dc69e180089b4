"""Five things that one does with a language model, each in a few lines of generate().

    python examples/recipes.py"""
from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from os.path import commonprefix
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from generate import Tokenizer, generate, load_tokenizer
from model import Transformer, load_model
from processors import BadWords, Grammar


def without(model: Transformer, text: Tokenizer, prompt: str, words: Sequence[str]) -> str:
    """What continues a prompt and has none of some words."""
    banned = [text.encode(space + word, bos=False) for word in words for space in ("", " ")]
    [ids] = generate(model, [text.encode(prompt)], 12, processors=[BadWords(banned)])
    return text.decode(ids)


def classify(model: Transformer, text: Tokenizer, prompt: str, labels: Sequence[str]) -> str:
    """The likeliest label behind a prompt, by the log probabilities of its tokens."""
    asked = text.encode(prompt)
    prompts = [asked + text.encode(label, bos=False) for label in labels]
    answers = generate(model, prompts, 1, logprobs=0, echo=True)
    logprobs = [sum(answer.prompt_logprobs[len(asked):]) for answer in answers]
    return labels[logprobs.index(max(logprobs))]


def as_json(model: Transformer, text: Tokenizer, question: str, schema: dict) -> dict:
    """An answer that fits a schema."""
    grammar = Grammar("json_schema", json.dumps(schema), text, model.config.vocab_size)
    prompt = text.chat([{"role": "user", "content": question}])
    [ids] = generate(model, [prompt], 64, processors=[grammar], eos_ids=text.eos_ids)
    return json.loads(text.decode(ids))


def best_of(model: Transformer, text: Tokenizer, prompt: str, n: int) -> str:
    """Of n drawn answers that with the highest mean log probability."""
    prompts = [text.encode(prompt)] * n
    drawn = generate(model, prompts, 16, temperature=1.0, seed=0, logprobs=0, eos_ids=text.eos_ids)
    return text.decode(max(drawn, key=lambda ids: sum(ids.logprobs) / len(ids)))


def behind(model: Transformer, text: Tokenizer, system: str, questions: Sequence[str]) -> list[str]:
    """Answers to questions, of which each begins with a system prompt that is read once."""
    first = {"role": "system", "content": system}
    prompts = [text.chat([first, {"role": "user", "content": each}]) for each in questions]
    shared = len(commonprefix(prompts))
    model.setup_caches(1, max(map(len, prompts)) + 24)
    generate(model, [prompts[0][:shared]], 1)
    answers = []
    for prompt in prompts:
        answers += generate(model, [prompt[shared:]], 24, cached=shared, eos_ids=text.eos_ids)
    return [text.decode(ids) for ids in answers]


def main() -> None:
    model, text = load_model(), load_tokenizer()
    print(without(model, text, "The capital of France is", ["Paris", "the"]))
    print(classify(model, text, "Water that freezes becomes", [" ice", " steam", " wine"]))
    fields = {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}}
    schema = {"type": "object", "properties": fields, "required": ["name", "age"]}
    print(as_json(model, text, "Ann is 31. Give her name and age as JSON.", schema))
    print(best_of(model, text, "The opposite of hot is", 8))
    print(behind(model, text, "Be brief.", ["Which is the largest ocean?", "What do bees make?"]))


if __name__ == "__main__":
    main()
