"""What a step does beside decoding for requests that ask for it: logits are changed before a token
is drawn, and log probabilities noted.

A row of PROCESSORS is a function of tensors on the device and part of the compiled, captured step;
its setting is a field of Request of the same name. Request.processors are called on the host, for
one row after the other: a step that has some is not captured. Both see all tokens before a place,
also proposals that may turn out wrong."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import proxy

import torch
import torch.nn.functional as F
from torch import Tensor

from generate import Decoder, Drawn, Request, Tokens, settings_of
from model import MAX_DECODE_TOKENS

HEAD_TOKENS = 512  # most positions whose logits are held at once for a prompt's log probabilities
Function = Callable[[Tensor, Tensor], Tensor]  # one of Request.processors


class Texts(NamedTuple):
    """The tokens of N rows, on the device, as far as their decoder has read or drawn them."""

    tokens: Tensor  # int64 [N, S + 1], by position; -1 where they are unknown
    begins: Tensor  # int32 [N]: where the new ones begin
    n: Tensor  # int32 [N]: how many tokens there are

    def counts(self, n_tokens: int, new: bool = False) -> Tensor:
        """How often each token has come, of the new ones or of all: float32 [N, n_tokens]."""
        at = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        counted = (at < self.n[:, None]) & (self.tokens >= 0)
        if new:
            counted &= at >= self.begins[:, None]
        counts = torch.zeros(len(self.n), n_tokens, device=self.tokens.device)
        return counts.scatter_add_(1, self.tokens.clamp(min=0), counted.float())


def penalize_repetition(logits: Tensor, texts: Texts, penalty: Tensor) -> Tensor:
    """Logits of tokens that have come: divided by it where positive, else multiplied."""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(texts.counts(logits.shape[1]) > 0, penalized, logits)


def penalize_presence(logits: Tensor, texts: Texts, penalty: Tensor) -> Tensor:
    return logits - penalty * (texts.counts(logits.shape[1], new=True) > 0)


def penalize_frequency(logits: Tensor, texts: Texts, penalty: Tensor) -> Tensor:
    return logits - penalty * texts.counts(logits.shape[1], new=True)


class Processor(NamedTuple):
    """How logits [N, V], float32, change within a step: a function of them, of what the rows hold
    and of the rows' setting [N, 1]."""

    change: Callable[[Tensor, Texts, Tensor], Tensor]
    off: float  # the setting with which nothing changes


# One after the other. The setting is a Request's of the same name, None: off. One whose name is no
# setting is on wherever a request has a setting of generate.EXTRAS, and is given `off`.
PROCESSORS = {
    "repetition_penalty": Processor(penalize_repetition, 1.0),
    "presence_penalty": Processor(penalize_presence, 0.0),
    "frequency_penalty": Processor(penalize_frequency, 0.0),
}


class Extras:
    """What a Decoder's rows have beside the tokens and settings that it keeps itself."""

    def __init__(self, decoder: Decoder):
        self.decoder = proxy(decoder)  # which has this
        B, device = decoder.cache.max_batch_size, decoder.input_pos.device
        self.history = torch.full((B, decoder.cache.max_seq_len + 1), -1, device=device)
        self.begins = torch.zeros(B, dtype=torch.int32, device=device)  # these two: see Texts
        self.settings = torch.zeros(B, len(PROCESSORS), device=device)
        self.functions: dict[int, list[Function]] = {}  # by the row

    def start(self, requests: Sequence[Request]) -> None:
        """A run begins: what its requests ask for. ValueError: they cannot have it."""
        self.on: set[str] = set()  # the names of PROCESSORS that change something
        for request in requests:
            self.refuse(request)
            self.on |= {name for name in PROCESSORS if getattr(request, name, "on") is not None}
        self.by_host = any(request.processors for request in requests)
        n_likeliest = [each.logprobs for each in requests if each.logprobs is not None]
        self.n_likeliest = max(n_likeliest, default=None)
        self.echo = any(request.echo for request in requests)
        self.proposals: Tensor | None = None  # [B, T - 1 or T] that a step checks
        self.echoes: dict[int, dict[str, list]] = {}  # of prompts, by the request's id
        self.parts: list[tuple[Tensor, Tensor]] = []  # log probabilities of those being read
        self.last: Tensor | None = None  # [n, 1, dim] where these were left
        self.functions.clear()
        self.decoder.known = ()

    def refuse(self, request: Request) -> None:
        given = request.processors
        listed = isinstance(given, (list, tuple))
        if not listed or not all(callable(getattr(each, "begin", each)) for each in given):
            raise ValueError(f"processors must be a list of functions, not {given!r:.60}")
        if request.echo and request.logprobs is None:
            raise ValueError("echo goes with logprobs: it gives those of the prompt")
        if request.logprobs is not None and not hasattr(self.decoder, "stats"):
            raise ValueError("logprobs are what a batching.Engine gives, and not a Decoder")

    @property
    def key(self) -> tuple:
        """What steps differ in."""
        return frozenset(self.on), self.by_host, self.n_likeliest

    # --- prompts ---

    def note_prompts(self, tokens: Tensor, x: Tensor, last: Tensor) -> Tensor:
        """Log probabilities of a chunk of prompts, tokens [n, T] of which the model's head is given
        x [n, T, dim] -> the logits [n, V] of the `last` ones, [n]."""
        head = self.decoder.model.head
        # a token's come from the logits of the token before it; the very first has none
        before, wanted = x[:, :-1], tokens[:, 1:]
        if self.last is not None:
            before, wanted = torch.cat([self.last, before], 1), tokens
        step = max(1, HEAD_TOKENS // len(x))
        for i in range(0, wanted.shape[1], step):
            n, t = wanted[:, i:i + step].shape
            together = before[:, i:i + step].reshape(1, n * t, -1)
            # of more than a step has, the head of a float32 model gives all logits as float32 does
            more = max(0, MAX_DECODE_TOKENS + 1 - n * t)
            logits = head(F.pad(together, (0, 0, 0, more)))[:, :n * t].view(n, t, -1)
            self.parts.append(self.logprobs_of(logits, wanted[:, i:i + step]))
        self.last = x[:, -1:]
        return head(x[torch.arange(len(x), device=x.device), last][:, None])[:, 0]

    def begin(self, rows: slice, requests: Sequence[Request], logits: Tensor) -> Tensor:
        """The prompts of requests were read into rows; logits [n, V] of their ends, changed."""
        self.begins[rows] = self.decoder.input_pos[rows]
        for row, request in enumerate(requests, rows.start):
            prompt = torch.tensor(request.prompt, device=self.history.device)
            self.history[row, request.cached:request.cached + len(prompt)] = prompt
            self.settings[row] = self.settings.new_tensor(settings_of(request, PROCESSORS))
            # what has a method begin makes a function for this answer
            self.functions[row] = [each.begin(request) if hasattr(each, "begin") else each
                                   for each in request.processors]
        if self.echo:
            self.keep_echoes(requests)
        return self.change(rows, logits[:, None], 0)[:, 0]

    def keep_echoes(self, requests: Sequence[Request]) -> None:
        """Keep what was noted of each prompt until its first token is told."""
        none = [torch.zeros(len(requests), 0, 1)] * 2  # of prompts of one token
        logprobs, ids = [torch.cat(each, 1).cpu() for each in zip(*self.parts)] or none
        for i, request in enumerate(requests):
            if not request.echo:
                continue
            n = len(request.prompt) - 1
            known = known_of(logprobs[i, :n], ids[i, :n], request)
            self.echoes[id(request)] = {f"prompt_{name}": [None, *x] for name, x in known.items()}
        self.parts, self.last = [], None

    # --- steps ---

    def draw(self, rows: slice, logits: Tensor, ahead: int) -> Tensor:
        """As the Decoder's."""
        tokens = self.decoder.draw(rows, self.change(rows, logits, ahead), ahead)
        self.note(tokens)
        return tokens

    def change(self, rows: slice, logits: Tensor, ahead: int) -> Tensor:
        """Logits [B, T, V], `ahead` of the rows' last tokens and on, as the rows' requests want
        them, in float32."""
        B, T, V = logits.shape
        input_pos = self.decoder.input_pos[rows, None]  # (B, 1)
        places = input_pos + torch.arange(ahead, ahead + T, device=input_pos.device)  # (B, T)
        self.raw, self.history_here, self.places = logits, self.history[rows], places
        if not (self.on or self.by_host):
            return logits
        if T > 1:  # what stands in front of all but the first
            self.history_here.scatter_(1, places[:, :-1], self.proposals[:, :T - 1])
        history = self.history_here.repeat_interleave(T, 0)
        texts = Texts(history, self.begins[rows].repeat_interleave(T), places.flatten())
        settings = self.settings[rows].repeat_interleave(T, 0)
        logits = logits.to(torch.float32, copy=True).view(B * T, V)
        for i, (name, processor) in enumerate(PROCESSORS.items()):
            if name in self.on:
                logits = processor.change(logits, texts, settings[:, i:i + 1])
        if self.by_host:
            logits = self.call(rows, texts, logits, ahead)
        return logits.view(B, T, V)

    def call(self, rows: slice, texts: Texts, logits: Tensor, ahead: int) -> Tensor:
        """Logits [N, V] as the functions of each row change them, one after the other. A row that
        does not run has none; its prompt may just have been read. ValueError: one gives none."""
        runs = self.decoder.active[rows].tolist()
        T = len(logits) // len(runs)
        changed = list(logits)
        for i, n in enumerate(texts.n.tolist()):
            ids = texts.tokens[i, :n]
            if runs[i // T] or ahead == 0:
                for function in self.functions[rows.start + i // T]:
                    new = function(ids[ids >= 0], changed[i])
                    if not isinstance(new, Tensor) or new.shape != changed[i].shape:
                        raise ValueError(f"a processor gives logits of all tokens, not {new!r:.60}")
                    changed[i] = new
        return torch.stack(changed)

    def note(self, tokens: Tensor) -> None:
        """Keep tokens [B, T] or [B] that were drawn from what `change` gave last."""
        tokens = tokens.view_as(self.places)
        self.history_here.scatter_(1, self.places, tokens)
        if self.n_likeliest is not None:
            self.decoder.known = self.logprobs_of(self.raw, tokens)
        self.raw = None

    def logprobs_of(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of logits [B, T, V] and tokens [B, T]: Drawn.logprobs and Drawn.likeliest."""
        logits = logits.float()
        best, ids = logits.topk(min(self.n_likeliest, logits.shape[-1]))
        found = torch.cat([logits.gather(-1, tokens[..., None]), best], -1)
        return found - logits.logsumexp(-1, keepdim=True), ids

    # --- what the host wants ---

    def told(self, request: Request, tokens: list[int], drawn: Drawn, row: int) -> list[int]:
        """New tokens of a request, from a row of what was drawn, with what it asks to know."""
        if request.logprobs is None:
            return tokens
        n, told = len(tokens), Tokens(tokens)
        known = known_of(drawn.logprobs[row, :n], drawn.likeliest[row, :n], request)
        vars(told).update(known, **self.echoes.pop(id(request), {}))
        return told

    def copy_row(self, source: int, target: int) -> None:
        """Another row goes on with a row's request."""
        for tensor in (self.history, self.begins, self.settings):
            tensor[target] = tensor[source]
        self.functions[target] = self.functions[source]


def known_of(logprobs: Tensor, likeliest: Tensor, request: Request) -> dict[str, list]:
    """Fields of Tokens, from [n, 1 + K] and [n, K]."""
    found, ids = logprobs.tolist(), likeliest[:, :request.logprobs].tolist()
    top = [dict(zip(each, values[1:])) for each, values in zip(ids, found)]
    return {"logprobs": [values[0] for values in found], "top_logprobs": top}
