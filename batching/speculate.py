"""Speculative decoding: where proposals for the next tokens come from, and whether they pay.

A step that checks k proposals feeds the model a row's last token and the proposals behind it, and
draws a token at every one of these k + 1 positions as plain decoding would. Proposals that equal
what was drawn are accepted; the first that differs is replaced by what was drawn, and ends the
step. This is exact whatever is proposed, because a token's random numbers belong to its request
and position: the texts are those of plain decoding, token by token, at any temperature. Drafting
with the same noise makes two models agree about as often as their distributions allow (Daliri,
Musco and Suresh, "Coupling without communication and drafter-invariant speculative decoding",
arXiv 2408.07978); the usual acceptance rule (Leviathan et al., arXiv 2211.17192) needs no common
noise, but makes the text depend on the draft."""
from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from batching.saved import copy_row
from generate import Decoder, Drawn
from model import MAX_DECODE_TOKENS, KVCache, Transformer, run_block

# logits [n, T, V] and how far ahead of the rows' last tokens the first are -> tokens [n, T]
Draw = Callable[[Tensor, int], Tensor]


class Drafter:
    """Proposes tokens for the rows of an engine, on the device: engine.drafter, which may be of a
    class of your own that has propose.

    history [B, S + 1] int64 holds the tokens of each row, by position, as far as this engine has
    read or drawn them; what lies behind a row's last token is no part of it."""

    cache: KVCache | None = None  # of its own

    def __init__(self, cache: KVCache):
        shape = (cache.max_batch_size, cache.max_seq_len + 1)
        self.history = torch.zeros(shape, dtype=torch.int64, device=cache.device)

    def read(self, tokens: Tensor, rows: slice, cached: int, last: Tensor) -> None:
        """A chunk of the rows' prompts, tokens [n, T], stands behind `cached` tokens; last [n] is
        each row's last token, as in Transformer.prefill."""
        self.history[rows, cached:cached + tokens.shape[1]] = tokens

    def note(self, tokens: Tensor, position: Tensor, rows: slice, n: Tensor | None = None) -> None:
        """Tokens [n, T] were drawn for position [n] and those behind it. n [n]: how many of each
        row's count, by a step; None: they are the first ones behind prompts."""
        offsets = torch.arange(tokens.shape[1], device=tokens.device)
        self.history[rows].scatter_(1, position.long()[:, None] + offsets, tokens)

    def propose(self, token: Tensor, input_pos: Tensor, rows: slice, k: int, draw: Draw) -> Tensor:
        """What may follow token [n, 1] at input_pos [n]: [n, k]."""
        raise NotImplementedError

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Another row goes on with what a row has in its first `length` positions."""
        self.history[target] = self.history[source]
        if self.cache is not None:
            copy_row(self.cache, source, target, length)


class PromptLookup(Drafter):
    """What followed the last tokens the last time that they stood in the row: the last three, or
    where these are new together, the last two, or the last one (Saxena, github.com/apoorvumang/
    prompt-lookup-decoding). It costs no second model.

    Measured on code, edits, summaries, chat and stories: down to one token brings up to 9% more
    tokens a step than down to two, and looking for more than three nothing."""

    def propose(self, token: Tensor, input_pos: Tensor, rows: slice, k: int, draw: Draw) -> Tensor:
        history = self.history[rows]  # (n, S)
        S = history.shape[1]
        end = input_pos.long()[:, None]  # (n, 1)

        # how many of the last three tokens stand at each place, up to there
        stand = history == token  # (n, S)
        length = stand.long()
        for back in (1, 2):
            before = history.gather(1, (end - back).clamp(min=0))  # (n, 1)
            stand = stand[:, 1:] & (history[:, :-back] == before)
            length[:, back:] += stand

        # the longest match, and of these the last, that ends before the row's own end
        at = torch.arange(S, device=history.device)
        best = (length * S + at).masked_fill(at >= end, 0).amax(1, keepdim=True)  # (n, 1)
        found = torch.where(best >= S, best % S, end - 1)  # or propose the last token again

        # what followed, over and over where it reaches the end
        offsets = torch.arange(k, device=history.device)
        return history.gather(1, (found + 1 + offsets % (end - found)))  # (n, k)


class DraftModel(Drafter):
    """A smaller model's own draws, with the settings and the noise of the row's request.

    Its cache has the same rows. The first call of a step feeds two tokens, the row's last and the
    one before: that one is new to the draft where a step before accepted all that was proposed."""

    def __init__(self, draft: Transformer, cache: KVCache, compiled: bool, n_tokens: int):
        super().__init__(cache)
        self.model = draft
        self.n_tokens = n_tokens  # that both know: what either has behind them is padding
        own = draft.cache  # is somebody else's business
        self.cache = draft.setup_caches(
            cache.max_batch_size, cache.max_seq_len, attention=cache.attention
        )
        draft.cache = own
        if compiled:
            draft.compiled_lengths |= {1, 2}

    def read(self, tokens: Tensor, rows: slice, cached: int, last: Tensor) -> None:
        super().read(tokens, rows, cached, last)
        input_pos = torch.full_like(last, cached, dtype=torch.int32)
        known = tokens.clamp(max=self.n_tokens - 1)
        self.model.prefill(known, input_pos, self.cache, rows=rows, cached=cached, last=last)

    def propose(self, token: Tensor, input_pos: Tensor, rows: slice, k: int, draw: Draw) -> Tensor:
        before = (input_pos - 1).clamp(min=0)
        previous = self.history[rows].gather(1, before.long()[:, None])  # (n, 1)
        feed = torch.cat([previous, token], 1).clamp(max=self.n_tokens - 1)  # (n, 2)
        position = before
        proposals = []
        for i in range(1, k + 1):
            logits = self.model.decode(feed, position, self.cache)[:, -1:]  # (n, 1, V)
            feed = draw(logits[..., :self.n_tokens], i)  # (n, 1)
            position = input_pos + i
            proposals.append(feed)
        return torch.cat(proposals, 1)  # (n, k)


class OwnLayer(Drafter):
    """The model's own layer that guesses the token after the next one: families/deltanet.py. It is
    given tokens, each with what the model gave its output layer for the one before: the token at
    position p is at its place p - 1.

    hidden [B, 1, dim]: what the output layer was given for each row's last token: while a prompt is
    read, by the model, then by this layer, for the first proposal. Where another row's beginning is
    taken it may be another token's: one guess is worse, and no text another."""

    def __init__(self, model: Transformer, cache: KVCache):
        super().__init__(cache)
        config, B = model.config, cache.max_batch_size
        self.main = model
        model.run_layers = model.run_and_keep
        self.cache = KVCache(
            1, config.n_kv_head, config.head_dim, B, cache.max_seq_len, dtype=cache.dtype,
            device=cache.device, attention=cache.attention,
        )
        self.hidden = torch.zeros(B, 1, config.dim, dtype=model.dtype, device=cache.device)

    def run(
        self, tokens: Tensor, before: Tensor, rows: slice, position: Tensor,
        cached: int | None = None,
    ) -> Tensor:
        """What the layer gives for tokens [n, T], at its places from position [n] on. cached: the
        same in every row, where a prompt is read."""
        main, T = self.main, tokens.shape[1]
        decode = main.decode_block if T in main.compiled_lengths else run_block
        run = decode if cached is None else main.prefill_block
        where = main.positions(position, T, self.cache, cached, even=True)[main.mtp.layer]
        [layer] = self.cache.layers(rows)
        return main.mtp(main.embed(tokens), before, where, layer, run)

    def read(self, tokens: Tensor, rows: slice, cached: int, last: Tensor) -> None:
        super().read(tokens, rows, cached, last)
        given = self.main.hidden  # (n, T, dim)
        before = torch.cat([self.hidden[rows], given[:, :-1]], 1)
        if cached == 0:  # there is none before the first
            tokens, before, cached = tokens[:, 1:], before[:, 1:], 1
        if tokens.shape[1] > 0:
            self.run(tokens, before, rows, torch.full_like(last, cached - 1).int(), cached - 1)
        self.keep(given, rows, last + 1)

    def keep(self, given: Tensor, rows: slice, n: Tensor) -> None:
        """Of what was given for tokens, [n, T, dim], that of each row's n-th; n [n], 0: of none."""
        at = (n.long() - 1).clamp(min=0)[:, None, None].expand(-1, 1, given.shape[2])
        own = self.hidden[rows]
        own.copy_(torch.where(n[:, None, None] > 0, given.gather(1, at), own))

    def note(self, tokens: Tensor, position: Tensor, rows: slice, n: Tensor | None = None) -> None:
        super().note(tokens, position, rows)
        before = self.hidden[rows] if n is None else self.main.hidden
        given = self.run(tokens, before, rows, position - 1)
        self.keep(given, rows, torch.ones_like(position) if n is None else n)

    def propose(self, token: Tensor, input_pos: Tensor, rows: slice, k: int, draw: Draw) -> Tensor:
        hidden = self.hidden[rows]
        proposals = [draw(self.main.lm_head(hidden), 1)]
        for i in range(1, k):
            hidden = self.run(proposals[-1], hidden, rows, input_pos + (i - 1))
            proposals.append(draw(self.main.lm_head(hidden), i + 1))
        return torch.cat(proposals, 1)  # (n, k)

    def copy_row(self, source: int, target: int, length: int) -> None:
        super().copy_row(source, target, length)
        self.hidden[target] = self.hidden[source]


def make_drafter(
    k: int, model: Transformer, draft: Transformer | None, cache: KVCache, compiled: bool
) -> Drafter | None:
    """A draft model's, or without one the model's own, or prompt lookup; None for k = 0. ValueError
    says what does not go together."""
    if not 0 <= k < MAX_DECODE_TOKENS:
        raise ValueError(f"speculate_k must be 0 to {MAX_DECODE_TOKENS - 1}, not {k}")
    if k == 0:
        if draft is not None:
            raise ValueError("a draft model goes with speculate_k, the tokens it is to propose")
        return None
    if compiled:
        model.compiled_lengths.add(k + 1)
    if draft is None:
        return OwnLayer(model, cache) if hasattr(model, "mtp") else PromptLookup(cache)
    sizes = sorted((draft.config.vocab_size, model.config.vocab_size))
    if sizes[0] < 0.9 * sizes[1]:  # more than padding
        raise ValueError(
            f"the draft has a vocabulary of {draft.config.vocab_size} tokens and the model one of "
            f"{model.config.vocab_size}: they must share one"
        )
    return DraftModel(draft, cache, compiled, sizes[0])


class Gauge:
    """Whether checking k proposals pays, from what the host reads anyway.

    Plain steps look up one proposal too, and compare: as many of them in a row as were right would
    have been accepted at once. So the tokens that a checking step would bring are known without
    taking one, and it is taken where they are more than the plain steps of the same time. Only
    the speed depends on this, never a token."""

    RATE = 0.15  # of a step in the moving average
    COST = 1.5  # of a checking step in plain ones, before it is measured
    KEPT = 8  # times of each kind; the least of them counts, as disturbances only add

    def __init__(self, k: int):
        self.k = k
        self.tokens = 1.0  # that a checking step brings a row, on average
        self.streaks: dict[int, int] = {}  # by request: proposals that were right without a break
        self.seconds: dict[tuple[int, int], deque[float]] = {}  # by rows and proposals of a step

    def observe(self, k: int, agreed: dict[int, int], n_rows: int, seconds: float) -> None:
        """A step of n_rows that checked k proposals; agreed: how many were right, by request; of
        a plain step, whether its one was."""
        self.seconds.setdefault((n_rows, k), deque(maxlen=self.KEPT)).append(seconds)
        if not agreed:
            return
        streaks = {}
        for number, right in agreed.items():
            if k == 0 and right:
                right = min(self.k, self.streaks.get(number, 0) + 1)
            streaks[number] = right
        self.streaks = streaks
        tokens = 1 + sum(streaks.values()) / len(streaks)
        self.tokens += self.RATE * (tokens - self.tokens)

    def pays(self, n_rows: int) -> bool:
        return self.tokens > self.cost(n_rows)

    def cost(self, n_rows: int) -> float:
        """Of a checking step of n_rows, in plain ones."""
        plain = self.seconds.get((n_rows, 0), ())
        checking = self.seconds.get((n_rows, self.k), ())
        if min(len(plain), len(checking)) < 3:
            return self.COST
        return min(checking) / min(plain)


class Speculator(Decoder):
    """A Decoder whose steps may check proposals for a row's next tokens.

    speculate_k: that many, of a draft model or of prompt lookup. context: most tokens of a row, by
    default all that cache and model have room for; steps that check proposals need k more."""

    @torch.inference_mode(False)
    def __init__(
        self, model: Transformer, cache: KVCache | None = None, *, compiled: bool = False,
        speculate_k: int = 0, draft: Transformer | None = None, context: int | None = None,
    ):
        super().__init__(model, cache, compiled=compiled)
        self.context = context or self.context
        if self.context > self.cache.max_seq_len:
            room = self.cache.max_seq_len
            raise ValueError(f"a context of {context} does not fit into a cache of {room}")
        self.k = speculate_k
        self.k_now = 0  # proposals that the next step checks
        self.drafter = make_drafter(speculate_k, model, draft, self.cache, compiled)
        looks_up = isinstance(self.drafter, PromptLookup)  # other drafts are asked at every step
        self.gauge = Gauge(speculate_k) if looks_up else None
        # where each row stands at most: the host does not know yet which proposals were accepted
        self.furthest = [0] * self.cache.max_batch_size

    @property
    def step_key(self) -> Any:
        return super().step_key, self.k_now

    def advance(self) -> Drawn:
        """Feed each row's last token and k proposals, and keep what is drawn up to the first
        wrong one. A plain step, k = 0, compares one: a gauge wants to know, and a draft model has
        to read the row's tokens in any case."""
        if self.drafter is None:
            return super().advance()
        k = self.k_now
        rows = slice(0, self.width())
        token = self.token[rows]
        input_pos = self.input_pos[rows]
        draw = partial(self.draw, rows)
        proposals = self.drafter.propose(token, input_pos, rows, max(k, 1), draw)
        feed = torch.cat([token, proposals[:, :k]], 1)  # (B, k + 1)
        logits = self.model.decode(feed, input_pos, self.cache)  # (B, k + 1, V)
        if self.extras is not None:
            self.extras.proposals = proposals
        tokens = (self.extras or self).draw(rows, logits, 1)  # (B, k + 1)

        right = tokens[:, :max(k, 1)] == proposals
        agreed = right.long().cumprod(1).sum(1)  # (B)
        accepted = agreed.clamp(max=k)
        last = tokens.gather(1, accepted[:, None])  # (B, 1)
        n = self.active[rows] * (accepted + 1)
        self.drafter.note(tokens, input_pos + 1, rows, n)
        self.move(rows, last, n)
        return Drawn(tokens, agreed, *self.known)

    def prepare_all(self) -> float:
        """Prepare the steps of self.kind, with proposals where a trial has room, and without ->
        seconds it took."""
        seconds = 0.0
        for self.k_now in sorted({0, self.k if self.has_room() else 0}, reverse=True):
            seconds += self.prepare()
        return seconds

    def models(self) -> list[Transformer]:
        """The model, and the draft's if there is one."""
        draft = getattr(self.drafter, "model", None)
        return [self.model] if draft is None else [self.model, draft]

    def copy_row(self, source: int, target: int, length: int) -> None:
        """A row goes on with the first `length` tokens of another one."""
        copy_row(self.cache, source, target, length)
        if self.drafter is not None:
            self.drafter.copy_row(source, target, length)

    def read_part(self, tokens: Tensor, rows: slice, cached: int, last: Tensor) -> Tensor:
        logits = super().read_part(tokens, rows, cached, last)
        if self.drafter is not None:
            self.drafter.read(tokens, rows, cached, last)
        return logits

    def has_room(self) -> bool:
        """Whether each row of a step surely has room for k proposals behind its last token."""
        return max(self.furthest[:self.width()]) + self.k < self.cache.max_seq_len
