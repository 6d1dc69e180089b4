"""Log probabilities that the model gives to drawn tokens and to those of prompts."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from generate import Drawn, Request, Tokens
from model import MAX_DECODE_TOKENS, Transformer

HEAD_TOKENS = 512  # most tokens of prompts whose logits are held at once


class LogProbs:
    """What the requests of a run are told beside their tokens.

    n: for how many of the likeliest tokens, None: nobody asks. echo: whether a request wants its
    prompt's too. What is noted of the prompts that are being read is kept by position, that of all
    of them beside each other."""

    def __init__(self, model: Transformer, requests: Sequence[Request]):
        self.model = model
        asked = [request.logprobs for request in requests if request.logprobs is not None]
        self.n = min(max(asked), model.config.vocab_size) if asked else None
        self.echo = any(request.echo for request in requests)
        self.noted: list[tuple[Tensor, Tensor]] = []
        self.last: list[Tensor] = []  # [1, n, dim]: the head's input for the last tokens noted
        self.echoes: dict[int, dict[str, list]] = {}  # fields of Tokens, by the request's id

    def of(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of logits [..., V] and tokens [...]: Drawn.logprobs and Drawn.likeliest."""
        logits = logits.float()
        best, likeliest = logits.topk(self.n)
        own = logits.gather(-1, tokens[..., None])
        total = logits.logsumexp(-1, keepdim=True)
        return torch.cat([own, best], -1) - total, likeliest

    def note_prompts(self, tokens: Tensor, x: Tensor, last: Tensor) -> Tensor:
        """Note those of a chunk of prompts, tokens [n, T] of which the model's head is given x [n,
        T, dim] -> the logits [n, V] of the `last` ones, [n]."""
        row = torch.arange(len(x), device=x.device)
        ends = x[row, last]  # (n, dim)
        # a token's come from the logits of the token before it; the very first has none
        x = x.transpose(0, 1)  # (T, n, dim)
        before = torch.cat([*self.last, x[:-1]])  # (T or T - 1, n, dim)
        wanted = tokens.T[len(x) - len(before):]
        self.last = [x[-1:]]
        inputs = before.flatten(0, 1).split(HEAD_TOKENS)
        ids = wanted.flatten().split(HEAD_TOKENS)
        for some, some_ids in zip(inputs, ids):
            self.noted.append(self.of(self.logits_of_many(some), some_ids))
        return self.model.head(ends[:, None])[:, 0]

    def logits_of_many(self, x: Tensor) -> Tensor:
        """Logits [n, V] of the head's inputs [n, dim]. A quantized head rounds what a step gives
        it; of more tokens than a step has, padding among them, it gives what float32 does."""
        missing = max(0, MAX_DECODE_TOKENS + 1 - len(x))
        padded = F.pad(x, (0, 0, 0, missing))
        return self.model.head(padded[None])[0, :len(x)]

    def keep_echoes(self, requests: Sequence[Request]) -> None:
        """The prompts of requests were read: keep what was noted until their first tokens are
        told."""
        logprobs, likeliest = (torch.cat(each).cpu() for each in zip(*self.noted))
        self.noted, self.last = [], []
        n = len(requests)
        for i, request in enumerate(requests):
            if not request.echo:
                continue
            end = n * (len(request.prompt) - 1)  # of what prompts of this length have
            mine = slice(i, end, n)
            known = fields_of(logprobs[mine], likeliest[mine], request)
            self.echoes[id(request)] = {
                f"prompt_{name}": [None, *values] for name, values in known.items()
            }

    def told(self, request: Request, tokens: list[int], drawn: Drawn, row: int) -> list[int]:
        """New tokens of a request, from a row of what was drawn, with what it asks to know."""
        if request.logprobs is None:
            return tokens
        n = len(tokens)
        known = fields_of(drawn.logprobs[row, :n], drawn.likeliest[row, :n], request)
        echo = self.echoes.pop(id(request), {})
        told = Tokens(tokens)
        vars(told).update(known | echo)
        return told


def fields_of(logprobs: Tensor, likeliest: Tensor, request: Request) -> dict[str, list]:
    """Fields of Tokens, from [n, 1 + K] and [n, K]."""
    own = logprobs[:, 0].tolist()
    best = logprobs[:, 1:].tolist()
    ids = likeliest[:, :request.logprobs].tolist()
    top = [dict(zip(*each)) for each in zip(ids, best)]
    return {"logprobs": own, "top_logprobs": top}
