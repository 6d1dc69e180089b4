"""What a step does beside decoding for requests that ask for it: logits are changed before a token
is drawn, and log probabilities noted (logprobs.py).

A row of PROCESSORS is a function of tensors on the device and part of the compiled, captured step;
its setting is a field of Request of the same name. Request.processors are called on the host, for
one row after the other: a step that has some is not captured. Both see all tokens before a place,
also proposals that may turn out wrong."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import proxy

import torch
from torch import Tensor

from generate import Decoder, Request, settings_of
from processors.functions import Function
from processors.logprobs import LogProbs


class Texts(NamedTuple):
    """The tokens of N rows, on the device, as far as their decoder has read or drawn them."""

    tokens: Tensor  # int64 [N, S + 1], by position; -1 where they are unknown
    begins: Tensor  # int32 [N]: where the new ones begin
    n: Tensor  # int64 [N]: how many tokens there are

    def counts(self, n_tokens: int, new: bool = False) -> Tensor:
        """How often each token has come, of the new ones or of all: float32 [N, n_tokens]."""
        device = self.tokens.device
        position = torch.arange(self.tokens.shape[1], device=device)
        counted = (position < self.n[:, None]) & (self.tokens >= 0)
        if new:
            counted &= position >= self.begins[:, None]
        counts = torch.zeros(len(self.n), n_tokens, device=device)
        return counts.scatter_add_(1, self.tokens.clamp(min=0), counted.float())


def penalize_repetition(logits: Tensor, texts: Texts, penalty: Tensor) -> Tensor:
    """Logits of tokens that have come: divided by it where positive, else multiplied."""
    has_come = texts.counts(logits.shape[1]) > 0
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(has_come, penalized, logits)


def penalize_presence(logits: Tensor, texts: Texts, penalty: Tensor) -> Tensor:
    """Logits of tokens that have come in the answer: less it."""
    has_come = texts.counts(logits.shape[1], new=True) > 0
    return logits - penalty * has_come


def penalize_frequency(logits: Tensor, texts: Texts, penalty: Tensor) -> Tensor:
    """The same, as often as they have come."""
    return logits - penalty * texts.counts(logits.shape[1], new=True)


class Processor(NamedTuple):
    """How logits [N, V], float32, change within a step: a function of them, of what the rows hold
    and of the rows' setting [N, 1]."""

    change: Callable[[Tensor, Texts, Tensor], Tensor]
    off: float  # the setting with which nothing changes


# One after the other. The setting is a Request's of the same name, None: off. One whose name is no
# setting is on in each run of which a request has a setting of generate.EXTRAS, and is given `off`.
PROCESSORS = {
    "repetition_penalty": Processor(penalize_repetition, 1.0),
    "presence_penalty": Processor(penalize_presence, 0.0),
    "frequency_penalty": Processor(penalize_frequency, 0.0),
}


class Extras:
    """What a Decoder's rows have beside the tokens and settings that it keeps itself."""

    def __init__(self, decoder: Decoder):
        self.decoder = proxy(decoder)  # which has this
        B, S = decoder.cache.max_batch_size, decoder.cache.max_seq_len
        device = decoder.input_pos.device
        # these two: see Texts
        self.tokens = torch.full((B, S + 1), -1, device=device)
        self.begins = torch.zeros(B, dtype=torch.int32, device=device)
        self.settings = torch.zeros(B, len(PROCESSORS), device=device)
        self.functions: dict[int, list[Function]] = {}  # by the row

    def start(self, requests: Sequence[Request], asks: bool) -> None:
        """A run begins: what its requests ask for, if they do. ValueError: they cannot have it."""
        for request in requests:
            self.refuse(request)
        self.on = {name for name in PROCESSORS  # those that change something
                   if any(getattr(each, name, asks or None) is not None for each in requests)}
        self.by_host = any(request.processors for request in requests)
        self.functions.clear()
        self.proposals: Tensor | None = None  # [B, T - 1 or T] that a step checks
        self.logprobs = LogProbs(self.decoder.model, requests)
        self.echo = self.logprobs.echo
        self.note_prompts = self.logprobs.note_prompts
        self.key = frozenset(self.on), self.by_host, self.logprobs.n  # what steps differ in
        self.decoder.known = ()

    def refuse(self, request: Request) -> None:
        """ValueError if a request asks for what makes no sense, or what the decoder has not."""
        given = request.processors
        listed = isinstance(given, Sequence)
        if not listed or not all(callable(getattr(each, "begin", each)) for each in given):
            raise ValueError(f"processors must be a list of functions, not {given!r:.60}")
        if request.echo and request.logprobs is None:
            raise ValueError("echo goes with logprobs: it gives those of the prompt")
        if request.logprobs is not None and not hasattr(self.decoder, "stats"):
            raise ValueError("logprobs are what a batching.Engine gives, and not a Decoder")

    def begin(self, rows: slice, requests: Sequence[Request], logits: Tensor) -> Tensor:
        """The prompts of requests were read into rows; logits [n, V] of their ends, changed."""
        self.begins[rows] = self.decoder.input_pos[rows]
        for row, request in enumerate(requests, rows.start):
            end = request.cached + len(request.prompt)
            self.tokens[row, request.cached:end] = torch.tensor(request.prompt)
            self.settings[row] = torch.tensor(settings_of(request, PROCESSORS))
            # what has a method begin makes a function for this answer
            self.functions[row] = [
                each.begin(request) if hasattr(each, "begin") else each
                for each in request.processors
            ]
        if self.echo:
            self.logprobs.keep_echoes(requests)
        return self.change(rows, logits[:, None], 0)[:, 0]

    def draw(self, rows: slice, logits: Tensor, ahead: int) -> Tensor:
        """As the Decoder's."""
        logits = self.change(rows, logits, ahead)
        tokens = self.decoder.draw(rows, logits, ahead)
        self.note(tokens)
        return tokens

    def change(self, rows: slice, logits: Tensor, ahead: int) -> Tensor:
        """Logits [B, T, V], `ahead` of the rows' last tokens and on, as the rows' requests want
        them, in float32."""
        T = logits.shape[1]
        offsets = torch.arange(ahead, ahead + T, device=logits.device)
        places = self.decoder.input_pos[rows, None] + offsets  # (B, T)
        self.raw, self.rows, self.places = logits, rows, places
        if not self.on and not self.by_host:
            return logits
        if T > 1:  # what stands in front of all but the first
            proposals = self.proposals[:, :T - 1]
            self.tokens[rows].scatter_(1, places[:, :-1], proposals)
        of_rows = (self.tokens, self.begins, self.settings)
        tokens, begins, settings = (x[rows].repeat_interleave(T, 0) for x in of_rows)  # (B * T)
        texts = Texts(tokens, begins, places.flatten())
        logits = logits.to(torch.float32, copy=True).flatten(0, 1)  # (B * T, V)
        for name, setting in zip(PROCESSORS, settings.split(1, 1)):
            if name in self.on:
                logits = PROCESSORS[name].change(logits, texts, setting)
        if self.by_host:
            self.call(rows, texts, logits, ahead)
        return logits.view_as(self.raw)

    def call(self, rows: slice, texts: Texts, logits: Tensor, ahead: int) -> None:
        """Change logits [N, V] by the functions of each row, one after the other. A row that does
        not run has none; its prompt may just have been read. ValueError: one gives no logits."""
        runs = self.decoder.active[rows].tolist()  # by the row
        T = len(logits) // len(runs)
        for i, n in enumerate(texts.n.tolist()):
            row = i // T
            if not runs[row] and ahead > 0:
                continue
            ids, mine = texts.tokens[i, :n], logits[i]
            for function in self.functions[rows.start + row]:
                new = function(ids[ids >= 0], mine)
                if not isinstance(new, Tensor) or new.shape != mine.shape:
                    raise ValueError(f"a processor gives logits of all tokens, not {new!r:.60}")
                mine.copy_(new)

    def note(self, tokens: Tensor) -> None:
        """Keep tokens [B, T] or [B] that were drawn from what `change` gave last."""
        tokens = tokens.view_as(self.places)
        self.tokens[self.rows].scatter_(1, self.places, tokens)
        if self.logprobs.n is not None:
            self.decoder.known = self.logprobs.of(self.raw, tokens)
        self.raw = None

    def copy_row(self, source: int, target: int) -> None:
        """Another row goes on with a row's request."""
        for tensor in (self.tokens, self.begins, self.settings):
            tensor[target] = tensor[source]
        self.functions[target] = self.functions[source]
