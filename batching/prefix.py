"""Prompts that are read together, and those that begin alike: what they share is read once."""
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from batching.speculate import Speculator
from batching.stats import Stats
from generate import Request
from quantize import BLOCK

LEAST_SHARED = 32  # tokens that prompts begin with; fewer are read again in hardly more time


def reads_better(requests: Sequence[Request]) -> bool:
    """Whether several prompts take an Engine less time than a Decoder, which reads all together."""
    return not pads_little(requests) or len(begin_alike(requests)) > 0


def pads_little(requests: Sequence[Request], free: int = 256) -> bool:
    """Whether prompts cost little more together than alone. A pass of few tokens takes as long as
    reading the weights, and there padding is free; beyond, it may be a quarter. None has a block
    that another lacks: its tokens would be multiplied as none of the other's are alone."""
    lengths = [len(request.prompt) for request in requests]
    alike = len({n // BLOCK for n in lengths}) == 1
    return alike and len(lengths) * max(lengths) <= max(free, 1.25 * sum(lengths))


def begin_alike(requests: Sequence[Request]) -> list[int]:
    """The tokens with which several prompts begin, none if these are few or not the first that are
    cached. One that is left of each prompt is fed for its logits."""
    prompts = [request.prompt for request in requests]
    shared = os.path.commonprefix(prompts)[:min(map(len, prompts)) - 1]
    shared = shared[:in_blocks(len(shared), prompts)]
    first = not any(request.cached for request in requests)
    return shared if first and len(shared) >= LEAST_SHARED else []


def in_blocks(n: int, prompts: Sequence[list[int]]) -> int:
    """How many of n tokens are multiplied in the same way whichever of the prompts they begin: all
    if none has as many as quantize.BLOCK, otherwise those of whole blocks."""
    return n if max(map(len, prompts)) < BLOCK else n // BLOCK * BLOCK


class PrefixSharer(Speculator):
    """A Speculator whose rows take the beginning of a prompt from a row that has it.

    held: the prompts that stand in rows, from the first place on. A row without a request has its
    own until the next step, which writes where that row rests."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.held: dict[int, list[int]] = {}
        self.stats = Stats()

    def prefill(self, rows: slice, requests: Sequence[Request], done: int = 0) -> Iterator[bool]:
        shared = begin_alike(requests)
        if shared and not (self.extras and self.extras.echo):  # which wants to see all
            self.input_pos[rows] = 0
            done = self.take_from_other(rows.start, shared, requests[0].prompt)
            others = range(rows.start + 1, rows.stop)
            if others:
                yield from self.read_alone(rows.start, shared, done)
                done = len(shared)
            for row in others:
                self.copy_row(rows.start, row, done)
            self.stats.shared_tokens += done * len(others)
        for row in range(rows.start, rows.stop):
            self.held.pop(row, None)
        yield from super().prefill(rows, requests, done)
        for row, request in zip(range(rows.start, rows.stop), requests):
            if not request.cached:
                self.held[row] = request.prompt

    def take_from_other(self, row: int, shared: list[int], prompt: list[int]) -> int:
        """Give a row, that is to have a prompt, what another has of its first tokens, the shared
        ones -> how many."""
        found = {}
        for source, held in self.held.items():
            n = len(os.path.commonprefix([shared, held]))
            found[source] = in_blocks(n, [held, prompt])
        source = max(found, key=found.get, default=None)
        n = found.get(source, 0)
        if n < LEAST_SHARED:
            return 0
        try:
            self.cache.refuse_lost(slice(source, source + 1), n)
        except ValueError:  # a ring has let go of some
            return 0
        if source != row:
            self.copy_row(source, row, n)
        self.stats.shared_tokens += n
        return n

    def read_alone(self, row: int, prompt: list[int], done: int) -> Iterator[bool]:
        """Put the tokens of a prompt behind the first `done` into one row, a chunk a yield."""
        where = slice(row, row + 1)
        [tokens] = self.to_device(torch.tensor([prompt], device="cpu"))
        while done < len(prompt):
            part = tokens[:, done:done + self.chunk()]
            last = torch.full((1,), part.shape[1] - 1, device=self.device)
            self.read_part(part, where, done, last)
            done += part.shape[1]
            self.input_pos[where] = done
            yield False
