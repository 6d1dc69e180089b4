"""Functions for Request.processors: those that transformers has too, which give the same tokens,
and grammars.

f(ids, logits) -> logits, of the tokens so far, int64 [n], and logits of the next one, float32 [V].
What has a method begin(request) makes a function for each answer."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from generate import Request

Function = Callable[[Tensor, Tensor], Tensor]  # one of Request.processors


class NoRepeatNgram:
    """No n tokens in a row come twice."""

    def __init__(self, n: int):
        self.n = n

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        if len(ids) < self.n:
            return logits
        grams = ids.unfold(0, self.n, 1)  # (len(ids) - n + 1, n)
        begun = (grams[:, :-1] == ids[len(ids) - self.n + 1:]).all(1)
        return logits.index_fill(0, grams[begun, -1], float("-inf"))


class LogitBias:
    """Numbers to add, by tokens."""

    def __init__(self, bias: Mapping[int, float]):
        self.bias = dict(bias)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        known = {i: value for i, value in self.bias.items() if i < len(logits)}
        index = torch.tensor([*known], dtype=torch.int64, device=logits.device)
        values = torch.tensor([*known.values()], dtype=torch.float32, device=logits.device)
        return logits.index_add(0, index, values)


class BadWords:
    """Lists of tokens, of which none that has begun is ended."""

    def __init__(self, words: Sequence[Sequence[int]]):
        self.words = [list(word) for word in words]
        if not all(self.words):
            raise ValueError("a bad word has no token")

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        longest = max(map(len, self.words), default=1)
        tail = ids[max(0, len(ids) + 1 - longest):].tolist()
        return forbid(logits, [w[-1] for w in self.words if [*tail, w[-1]][-len(w):] == w])


class MinNewTokens:
    """None of a request's eos_ids before n new tokens."""

    def __init__(self, n: int):
        self.n = n

    def begin(self, request: Request) -> Function:
        def later(new: Tensor, logits: Tensor) -> Tensor:
            return forbid(logits, request.eos_ids) if len(new) < self.n else logits

        return of_new_tokens(later)


def of_new_tokens(function: Function) -> Function:
    """A function of the new tokens as one of all: the first call is with the prompt."""
    begins: list[int] = []  # where the new ones begin

    def of_all(ids: Tensor, logits: Tensor) -> Tensor:
        begins[:] = begins or [len(ids)]
        return function(ids[begins[0]:], logits)

    return of_all


def forbid(logits: Tensor, ids: Iterable[int]) -> Tensor:
    """Those beyond the model's vocabulary, which a tokenizer may have, never come anyway."""
    known = [i for i in ids if i < len(logits)]
    index = torch.tensor(known, dtype=torch.int64, device=logits.device)
    return logits.index_fill(0, index, float("-inf"))


class Grammar:
    """Only tokens with which the text behind the prompt can still become one of a grammar. kind:
    "json_schema", or "grammar" for GBNF as in llama.cpp, or Lark.

    https://github.com/guidance-ai/llguidance says on the host which tokens may come next; what is
    masked are the logits, where they are. A token that a step only proposes is checked under the
    mask of the tokens in front of it, and the grammar goes back where it was wrong.

    ValueError: it is none, or llguidance is not installed, or cannot read the tokenizer."""

    def __init__(self, kind: str, text: str, tokenizer: Any, vocab_size: int):
        try:
            import llguidance
        except ImportError:
            raise ValueError("grammars take a package: pip install llguidance") from None
        if not hasattr(tokenizer.backend, "to_str"):
            raise ValueError("a grammar takes a tokenizer.json or the vocabulary of a GGUF file")
        if not tokenizer.eos_ids:
            raise ValueError("a grammar takes a model that knows where a text ends")
        self.tokens = llguidance.LLTokenizer(
            tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=sorted(tokenizer.eos_ids)
        )
        self.matcher = llguidance.LLMatcher
        try:
            self.grammar = llguidance.grammar_from(kind, text)
            wrong = self.matcher.validate_grammar(self.grammar, self.tokens)
        except ValueError as e:
            wrong = str(e)
        if not wrong or wrong.startswith("WARNING"):
            first = self.matcher(self.tokens, self.grammar)
            first.compute_logit_bias()
            wrong = first.is_error() and "no text is one of it"
        if wrong:
            raise ValueError(f"no {kind}: {' '.join(wrong.split())}")

    def begin(self, request: Request) -> Function:
        """What masks the logits of one answer."""
        matcher = self.matcher(self.tokens, self.grammar)
        taken: list[int] = []  # tokens that the matcher stands behind

        def mask(ids: Tensor, logits: Tensor) -> Tensor:
            new = ids.tolist()
            same = len(os.path.commonprefix([new, taken]))
            if same < len(taken):
                matcher.rollback(len(taken) - same)
            n = matcher.try_consume_tokens(new[same:])
            taken[same:] = new[same:same + n]
            allowed = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)
            if len(taken) < len(new) or not allowed.any():  # behind a refused token, or the end
                return logits
            allowed = allowed[:len(logits)].to(logits.device, non_blocking=True)
            return logits.masked_fill(allowed == 0, float("-inf"))

        return of_new_tokens(mask)
