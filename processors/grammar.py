"""Answers that follow a grammar, or are JSON of a schema, by llguidance.

https://github.com/guidance-ai/llguidance says on the host which tokens may come next; what is
masked are the logits, where they are. A token that a step only proposes is checked under the mask
of the tokens in front of it, and the grammar goes back where it was wrong."""
from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from generate import Request


class Grammar:
    """For Request.processors: only tokens with which the text behind the prompt can still become
    one of the grammar. kind: "json_schema", or "grammar" for GBNF as in llama.cpp, or Lark.

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

    def begin(self, request: Request) -> Callable[[Tensor, Tensor], Tensor]:
        """What masks the logits of one answer."""
        matcher = self.matcher(self.tokens, self.grammar)
        lengths: list[int] = []  # of the prompt: the first that is seen
        taken: list[int] = []  # tokens that the matcher stands behind

        def mask(ids: Tensor, logits: Tensor) -> Tensor:
            lengths[:] = lengths or [len(ids)]
            new = ids[lengths[0]:].tolist()
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

        return mask
