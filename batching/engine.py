"""Continuous batching: rows of a cache that are refilled, one request after the other.

Engine.run turns requests into tokens. A step is the Decoder's of generate.py, or one that checks
proposals."""
from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from batching.prefix import PrefixSharer, pads_little
from generate import PREFILL_CHUNK, Drawn, Request, kind_of, on_its_device
from model import KVCache, Transformer

# most prompt tokens in one pass while rows decode: these wait for one pass at a time, which is to
# cost little more than a step but use the device well
CHUNK = {"cpu": 128, "gpu": 512}


class Engine(PrefixSharer):
    """A Decoder whose rows are refilled: each serves one request after the other. A step may check
    proposals: see Speculator, which has the options."""

    def __init__(self, model: Transformer, cache: KVCache | None = None, **options: Any):
        super().__init__(model, cache, **options)
        self.wanted: list[Running] = []  # run's requests
        self.running: dict[int, Running] = {}  # by the row: those that want further tokens
        self.refills = False  # whether rows serve one request after the other
        self.started: dict[int, float] = {}  # when run's requests got their rows
        self.chunk_beside_steps = CHUNK["cpu" if self.device.type == "cpu" else "gpu"]

    def run(
        self, requests: Iterable[Request], take_number: Callable[[], int | None] | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """Work requests off, in order, in the rows that are free -> (a request's number, new
        tokens of it), as they come; on CUDA the host reads LAG steps behind the device.

        take_number: the numbers of the requests that are to be worked off here, one a call, None
        behind the last; by default all. Each turn puts one chunk of prompts into free rows and
        advances the others by a step.

        A request ends with the first of its eos_ids (included), where its `ends` says so, after
        max_new_tokens, or where the cache is full; finish_reasons then has which it was. ValueError
        if one has no room for a token, or the cache has lost or would lose the cached tokens in
        front of it; RuntimeError if another run of this engine has begun meanwhile."""
        wanted = [Running(i, each, self.budget(each)) for i, each in enumerate(requests)]
        waiting = Waiting(wanted, take_number)
        if len(wanted) > self.cache.max_batch_size:
            self.refuse_lost_prefix(wanted)
        self.start([running.request for running in wanted])
        self.wanted = wanted
        self.stats.compile_s += self.prepare_all()
        began = time.perf_counter()
        reading: Reading | None = None
        pending: deque[Launch] = deque()
        while reading or self.running or pending or waiting.peek():
            launches = []
            # a chunk of prompts
            has_free_row = len(self.running) < self.cache.max_batch_size
            if reading is None and has_free_row and waiting.peek():
                reading = self.next_prompts(waiting)
            reads = reading is not None
            if reads:
                launches += self.read_chunk(reading)
                if launches:
                    reading = None
            elif self.refills and not self.compiled:
                self.close_gap()
            # a step; its time begins where the one before ended, unless something came in between
            if self.running:
                follows = pending and not reads
                launches.append(self.launch(pending[-1].ended if follows else self.mark()))
            # what the host is to see: all of it once nothing more is under way
            pending += launches
            while len(pending) > (self.lag if launches else 0):
                for answer in self.read(pending.popleft()):
                    yield answer
                    if self.wanted is not wanted:
                        raise RuntimeError("another run of this engine has begun")
        self.stats.wall_s += time.perf_counter() - began

    def start(self, requests: Sequence[Request]) -> None:
        super().start(requests)
        self.started.clear()
        self.held.clear()  # others may have had the cache since
        self.furthest = self.input_pos.tolist()
        self.refills = len(requests) > self.cache.max_batch_size

    def refuse_lost_prefix(self, wanted: Sequence[Running]) -> None:
        """ValueError if a request that has a row would drive cached tokens out of it that the next
        one is to have in front of its prompt: by writing over them, or out of a layer's ring."""
        cached = {running.request.cached for running in wanted}
        longest = max(running.prompt_end + running.budget for running in wanted)
        longest += (self.lag + 1) * (self.k + 1)  # steps that are under way
        lost = any(each.places.ring and longest > each.places.S for each in self.cache.whole)
        why = ""
        if len(cached) > 1:
            why = f"some would write over the {max(cached)} tokens that others are behind"
        elif lost and cached != {0}:
            why = "layers with a sliding window keep the last "
            why += f"{self.cache.ring_len} tokens of a row, and no others for the prompt after"
        if why:
            n, B = len(wanted), self.cache.max_batch_size
            raise ValueError(f"{n} prompts behind cached tokens need as many rows, not {B}: {why}")

    # --- prompts and steps ---

    def chunk(self) -> int:
        return self.chunk_beside_steps if self.running else PREFILL_CHUNK

    def next_prompts(self, waiting: Waiting) -> Reading:
        """Give rows to the request that waits, and to those behind it that are better read with it
        than alone, as far as the rows beside its own are free."""
        B = self.cache.max_batch_size
        first = waiting.peek().number  # with rows for all, request i has row i
        if self.refills:
            first = next(row for row in range(B) if row not in self.running)
        group = [waiting.pop()]
        for row in range(first + 1, B):
            neighbour = waiting.peek()
            if row in self.running or not neighbour or not self.read_together(group, neighbour):
                break
            group.append(waiting.pop())
        for row, running in enumerate(group, first):
            running.row = row
            self.started[running.number] = time.perf_counter()
            self.furthest[row] = running.prompt_end
        rows = slice(first, first + len(group))
        requests = [running.request for running in group]
        self.stats.prompt_tokens += sum(len(request.prompt) for request in requests)
        return Reading(rows, group, self.mark(), self.prefill(rows, requests))

    def read_together(self, group: Sequence[Running], other: Running) -> bool:
        """Whether another prompt is read with those of a group."""
        requests = [running.request for running in (*group, other)]
        has_next_row = self.refills or other.number == group[-1].number + 1
        if not has_next_row or requests[0].cached != requests[-1].cached:
            return False
        if not pads_little(requests, self.chunk_beside_steps // 2):
            return False
        # in smaller chunks than alone, they would be summed otherwise
        return len(requests) * max(len(each.prompt) for each in requests) <= self.chunk()

    @on_its_device
    def read_chunk(self, reading: Reading) -> list[Launch]:
        """Put the next chunk of prompts into the cache -> their first tokens, if it is the last."""
        if not self.read_on(reading.prefill):
            return []
        rows = reading.rows
        if self.drafter is not None:
            self.drafter.note(self.token[rows], self.input_pos[rows], rows)
        for running in reading.group:
            self.running[running.row] = running
            running.drawn = 1
        drawn = Drawn(self.token[rows], None, *self.known)
        return [self.send(drawn, dict(enumerate(reading.group)), reading.began, k=None)]

    @on_its_device
    def launch(self, began: Mark) -> Launch:
        """Launch a step for the requests that run."""
        pays = self.gauge is None or self.gauge.pays(self.width())
        self.k_now = k = self.k if pays and self.has_room() else 0
        rows = dict(self.running)
        if not self.compiled:  # nor is a cheaper kind for these rows
            self.kind = kind_of(running.request for running in rows.values())
        self.stats.row_steps += self.width()
        # it writes into the rows that rest, at places that these held
        self.held = {row: prompt for row, prompt in self.held.items() if row in rows}
        drawn = self.step()
        for row, running in rows.items():
            running.drawn += 1
            self.furthest[row] += k + 1
        return self.send(drawn, rows, began, k)

    def send(self, drawn: Drawn, rows: dict[int, Running], began: Mark, k: int | None) -> Launch:
        """Send what was drawn on its way to the host, and free the rows that have all."""
        copies = [x if x is None else x.to("cpu", non_blocking=True, copy=True) for x in drawn]
        for running in rows.values():
            if running.done or running.drawn >= running.budget:
                self.free(running)
        return Launch(Drawn(*copies), rows, k, began, self.mark())

    def read(self, launch: Launch) -> Iterator[tuple[int, list[int]]]:
        """Wait for a launch and hand its tokens to the requests that still want them."""
        seconds = seconds_between(launch.began, launch.ended)
        tokens = launch.drawn.tokens.tolist()
        agreed = [0] * len(tokens)
        if launch.drawn.agreed is not None:
            agreed = launch.drawn.agreed.tolist()
        if launch.k is None:
            self.stats.first_token_s.append(seconds)
        else:
            self.note_step(launch, agreed, seconds)
        k = launch.k or 0
        for row, running in launch.rows.items():
            if running.done:
                continue
            accepted = min(agreed[row], k)
            running.drawn += accepted
            if not self.refills or self.running.get(running.row) is running:
                self.furthest[running.row] -= k - accepted
                self.cache.cached[running.row] = running.prompt_end + running.read + accepted
            taken = self.take(running, tokens[row][:accepted + 1])
            if self.extras is not None:
                taken = self.extras.logprobs.told(running.request, taken, launch.drawn, row)
            self.stats.new_tokens += len(taken)
            if launch.k is not None:
                self.stats.useful_row_steps += 1
                self.stats.decode_tokens += len(taken)
            if launch.k:
                self.stats.speculation.tokens += len(taken)
            yield running.number, taken

    def note_step(self, launch: Launch, agreed: list[int], seconds: float) -> None:
        """Put what a step took, and how many proposals were right, where it is needed."""
        self.stats.steps_s.append(seconds)
        if self.drafter is None:
            return
        live = {each.number: agreed[row] for row, each in launch.rows.items() if not each.done}
        if self.gauge is not None:
            seconds = self.model.broadcast(seconds)  # all ranks are to decide alike
            self.gauge.observe(launch.k, live, len(agreed), seconds)
        if launch.k or self.gauge is not None:  # a draft model works in plain steps too
            self.stats.speculation.add(launch.k, list(live.values()), seconds)

    def take(self, running: Running, tokens: list[int]) -> list[int]:
        """Give a request new tokens -> those up to the one that ends it, if one does."""
        for i, token in enumerate(tokens):
            running.read += 1
            reason = running.request.ends_with(token, running.read, running.budget)
            if reason is not None:
                self.end(running.number, reason)
                return tokens[:i + 1]
        return tokens

    # --- rows ---

    def end(self, number: int, reason: str = "stop") -> None:
        """Stop a request of this run; a caller may do that at any time."""
        running = self.wanted[number]
        running.done = True
        self.finish_reasons.setdefault(number, reason)
        self.free(running)

    def free(self, running: Running) -> None:
        """Let go of a request's row, if it has one. A row that is refilled goes back to its cached
        tokens, where steps cost least; any other keeps its text, for a caller who goes on."""
        row = running.row
        had_row = self.running.get(row) is running
        if had_row:
            del self.running[row]
            self.active[row].zero_()
        if had_row and self.refills:
            self.rest(row, running.request.cached)
        elif running.done and running.drawn and not self.refills:
            # proposals may have been accepted beyond its last token
            self.rest(row, running.prompt_end + running.read - 1)

    def rest(self, row: int, cached: int) -> None:
        """Let a row stand behind its first `cached` tokens: steps write there."""
        self.input_pos[row].fill_(cached)
        self.furthest[row] = self.cache.cached[row] = cached

    def close_gap(self) -> None:
        """Move the last row's request to a free row before it, so that steps have fewer rows."""
        last = max(self.running, default=0)
        free = next((row for row in range(last) if row not in self.running), None)
        if free is None:
            return
        running = self.running.pop(last)
        self.running[free] = running
        running.row = free
        self.furthest[free] = self.furthest[last]
        self.copy_row(last, free, min(self.furthest[last], self.cache.max_seq_len))
        if last in self.held:
            self.held[free] = self.held.pop(last)
        for tensor in (self.token, self.input_pos, self.active, *self.sampling):
            tensor[free] = tensor[last]
        if self.extras is not None:
            self.extras.copy_row(last, free)
        self.active[last].zero_()
        self.rest(last, running.request.cached)

    @on_its_device
    def mark(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed_steps(self, n: int) -> list[float]:
        """The seconds of n plain steps, whatever the rows hold."""
        self.k_now = 0
        marks = [self.mark()]
        for _ in range(n):
            self.step()
            marks.append(self.mark())
        return [seconds_between(began, ended) for began, ended in pairwise(marks)]


Mark = float | torch.cuda.Event  # a moment: of the host's clock, or on a GPU's stream


def seconds_between(began: Mark, ended: Mark) -> float:
    """Waits for the second of two marks."""
    if isinstance(ended, float):
        return ended - began
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


@dataclass
class Running:
    """A request of a run: it waits, has a row, or is done."""

    number: int  # in the order in which run was given them
    request: Request
    budget: int  # most new tokens
    row: int | None = None  # where it is, or was last
    drawn: int = 0  # tokens, at least: the host has not seen yet which proposals were accepted
    read: int = 0  # tokens that the host has seen
    done: bool = False

    def __post_init__(self) -> None:
        self.request = copy(self.request)  # one may be given twice; processors/ tells them by id()

    @property
    def prompt_end(self) -> int:
        return self.request.cached + len(self.request.prompt)


class Waiting:
    """Requests without a row yet, in the order in which take_number() gives their numbers, and None
    behind the last. Groups of ranks that share the requests take from one queue, and none sooner
    than it has to: what one has taken, no other can."""

    def __init__(self, requests: Sequence[Running], take_number: Callable[[], int | None] | None):
        numbers = iter(take_number, None) if take_number else range(len(requests))
        self.requests = map(requests.__getitem__, numbers)
        self.next: Running | None = None

    def peek(self) -> Running | None:
        """The next one that a caller has not ended, None if there is none."""
        if self.next is None or self.next.done:
            self.next = next((each for each in self.requests if not each.done), None)
        return self.next

    def pop(self) -> Running:
        taken, self.next = self.peek(), None
        return taken


@dataclass
class Reading:
    """The prompts of a group of requests, on their way into neighbouring rows of the cache."""

    rows: slice
    group: list[Running]
    began: Mark
    prefill: Iterator[bool]  # Decoder.prefill


@dataclass
class Launch:
    """Tokens on their way to the host, and the requests they were drawn for: of a step, or the
    first ones behind prompts. Rows may have other requests by the time they are read."""

    drawn: Drawn  # on the host, there once `ended` is reached
    rows: dict[int, Running]  # by the row of drawn
    k: int | None  # proposals that a step checked; None: these are first tokens
    began: Mark
    ended: Mark
