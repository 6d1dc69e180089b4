"""What a step does beside decoding for requests that ask for it: logits are changed before a token
is drawn, and log probabilities noted.

A row of PROCESSORS is a function of tensors on the device and part of the compiled, captured step;
its setting is a field of Request of the same name. Request.processors are called on the host, for
one row after the other: a step that has some is not captured. Both see the tokens in front of each
place, those that a step only proposes too."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import proxy

import torch
from torch import Tensor

from generate import Decoder, Drawn, Request, Tokens

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
    """Those of tokens that have come are divided by it where positive, others multiplied."""
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
        for request in requests:
            self.refuse(request)
        given = {name: [getattr(r, name, "on") for r in requests] for name in PROCESSORS}
        self.on = tuple(name for name, them in given.items() if them.count(None) < len(them))
        self.by_host = any(request.processors for request in requests)
        n_likeliest = [r.logprobs for r in requests if r.logprobs is not None]
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
        listed = given if isinstance(given, (list, tuple)) else [None]
        if not all(callable(getattr(each, "begin", each)) for each in listed):
            raise ValueError(f"processors must be a list of functions, not {given!r:.60}")
        if request.echo and request.logprobs is None:
            raise ValueError("echo goes with logprobs: it gives those of the prompt")
        if request.logprobs is not None and not hasattr(self.decoder, "stats"):
            raise ValueError("logprobs are what a batching.Engine gives, and not a Decoder")

    @property
    def key(self) -> tuple:
        """What steps differ in."""
        return self.on, self.by_host, self.n_likeliest

    # --- prompts ---

    def read_part(
        self, tokens: Tensor, pos: Tensor, rows: slice, cached: int, last: Tensor
    ) -> Tensor:
        """As the Decoder's, with log probabilities of tokens [n, T] where one echoes."""
        model = self.decoder.model
        n, T = tokens.shape
        x = model.prefill(
            tokens, pos, self.decoder.cache, rows=rows, cached=cached, last=last, hidden=True
        )  # (n, T, dim)
        if self.echo:
            before = x[:, :-1] if self.last is None else torch.cat([self.last, x[:, :-1]], 1)
            wanted = tokens[:, T - before.shape[1]:]
            step = max(1, HEAD_TOKENS // n)
            for i in range(0, wanted.shape[1], step):
                logits = model.head(before[:, i:i + step])
                self.parts.append(self.logprobs_of(logits, wanted[:, i:i + step]))
            self.last = x[:, -1:]
        return model.head(x[torch.arange(n, device=x.device), last][:, None])[:, 0]

    def begin(self, rows: slice, requests: Sequence[Request], logits: Tensor) -> Tensor:
        """The prompts of requests were read into rows; logits [n, V] of their ends, changed."""
        self.begins[rows] = self.decoder.input_pos[rows]
        for row, request in enumerate(requests, rows.start):
            prompt = torch.tensor(request.prompt, device=self.history.device)
            self.history[row, request.cached:request.cached + len(prompt)] = prompt
            given = {name: getattr(request, name, None) for name in PROCESSORS}
            settings = [PROCESSORS[k].off if v is None else v for k, v in given.items()]
            self.settings[row] = self.settings.new_tensor(settings)
            functions = [getattr(f, "begin", lambda _, f=f: f) for f in request.processors]
            self.functions[row] = [begin(request) for begin in functions]
        none = [torch.zeros(len(requests), 0, 1)] * 2  # of prompts of one token
        found = [torch.cat(each, 1).cpu() for each in zip(*self.parts)] or none
        for i, request in enumerate(requests):
            if not request.echo:
                continue
            n = len(request.prompt) - 1
            known = known_of(*(each[i, :n] for each in found), request)
            self.echoes[id(request)] = {f"prompt_{k}": [None, *v] for k, v in known.items()}
        self.parts, self.last = [], None
        return self.change(rows, logits[:, None], 0)[:, 0]

    # --- steps ---

    def draw(self, rows: slice, logits: Tensor, ahead: int) -> Tensor:
        """As the Decoder's."""
        tokens = self.decoder.draw(rows, self.change(rows, logits, ahead), ahead)
        self.note(rows, tokens, ahead)
        return tokens

    def change(self, rows: slice, logits: Tensor, ahead: int) -> Tensor:
        """Logits [B, T, V], `ahead` of the rows' last tokens and on, as the rows' requests want
        them, in float32."""
        self.raw = logits
        if not (self.on or self.by_host):
            return logits
        B, T, V = logits.shape
        places = self.places(rows, ahead, T)  # (B, T)
        if T > 1:  # what stands in front of all but the first
            self.history[rows].scatter_(1, places[:, :-1], self.proposals[:, :T - 1])
        held = self.history[rows], self.begins[rows], self.settings[rows]
        history, begins, settings = (x.repeat_interleave(T, 0) for x in held)
        texts = Texts(history, begins, places.flatten())
        logits = logits.to(torch.float32, copy=True).view(B * T, V)
        for (name, each), setting in zip(PROCESSORS.items(), settings.unbind(1), strict=True):
            if name in self.on:
                logits = each.change(logits, texts, setting[:, None])
        if self.by_host:
            active = self.decoder.active[rows].tolist() if ahead else [1] * B
            functions = [self.functions[i] if on else () for i, on in enumerate(active, rows.start)]
            logits = call([functions[i // T] for i in range(B * T)], texts, logits)
        return logits.view(B, T, V)

    def note(self, rows: slice, tokens: Tensor, ahead: int) -> None:
        """Tokens [B, T] were drawn for what change was given."""
        self.history[rows].scatter_(1, self.places(rows, ahead, tokens.shape[1]), tokens)
        if self.n_likeliest is not None:
            self.decoder.known = self.logprobs_of(self.raw, tokens)
        self.raw = None

    def places(self, rows: slice, ahead: int, n: int) -> Tensor:
        """Where n tokens of each row stand, `ahead` of its last one and on: int64 [B, n]."""
        input_pos = self.decoder.input_pos[rows, None]  # (B, 1)
        return input_pos + torch.arange(ahead, ahead + n, device=input_pos.device)

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


def call(functions: Sequence[Sequence[Function]], texts: Texts, logits: Tensor) -> Tensor:
    """Logits [N, V] as the functions of each row change them, one after the other."""
    rows = list(logits)
    for i, n in enumerate(texts.n.tolist()):
        ids = texts.tokens[i, :n]
        for function in functions[i]:
            rows[i] = function(ids[ids >= 0], rows[i])
    return torch.stack(rows)


def known_of(logprobs: Tensor, likeliest: Tensor, request: Request) -> dict[str, list]:
    """Fields of Tokens, from [n, 1 + K] and [n, K]."""
    found, ids = logprobs.tolist(), likeliest[:, :request.logprobs].tolist()
    top = [dict(zip(each, values[1:])) for each, values in zip(ids, found)]
    return {"logprobs": [values[0] for values in found], "top_logprobs": top}
