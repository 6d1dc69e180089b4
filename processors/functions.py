"""Functions for Request.processors, which transformers has too: they give the same tokens.

f(ids, logits) -> logits, of the tokens so far, int64 [n], and logits of the next one, float32 [V].
What has a method begin(request) makes a function for each answer."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from generate import Request


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
        self.ids, self.values = list(bias.keys()), list(bias.values())

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        values = torch.tensor(self.values, dtype=torch.float32, device=logits.device)
        return logits.index_add(0, torch.tensor(self.ids, device=logits.device), values)


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

    def begin(self, request: Request) -> Callable[[Tensor, Tensor], Tensor]:
        lengths: list[int] = []  # of the prompt: the first that is seen

        def later(ids: Tensor, logits: Tensor) -> Tensor:
            lengths[:] = lengths or [len(ids)]
            too_soon = len(ids) - lengths[0] < self.n
            return forbid(logits, list(request.eos_ids)) if too_soon else logits

        return later


def forbid(logits: Tensor, ids: list[int]) -> Tensor:
    index = torch.tensor(ids, dtype=torch.int64, device=logits.device)
    return logits.index_fill(0, index, float("-inf"))
