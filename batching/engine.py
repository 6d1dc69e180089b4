"""Continuous batching: rows of a cache that are refilled, one request after the other.

Engine.run turns requests into tokens. A step is the Decoder's of generate.py, or one that checks
proposals."""
from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from batching.prefix import PrefixSharer, pads_little
from generate import PREFILL_CHUNK, Drawn, Request, kind_of, on_its_device
from model import KVCache, Transformer

# most prompt tokens in one pass while rows decode: these wait for one pass at a time, which is to
# cost little more than a step but use the device well
CHUNK = {"cpu": 128, "gpu": 512}


@dataclass
class Running:
    """A request that a row works on.

    drawn_at_least <= tokens drawn on the device <= drawn_at_most: of steps under way that check
    proposals, the host does not know yet how many were accepted."""

    number: int  # of the request, in the order in which run was given them
    request: Request
    budget: int  # most new tokens
    row: int | None = None  # where it is now
    drawn_at_least: int = 0
    drawn_at_most: int = 0
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
        """The next one, None if there is none."""
        self.next = self.next or next(self.requests, None)
        return self.next

    def pop(self) -> Running:
        taken, self.next = self.peek(), None
        return taken


@dataclass
class Launch:
    """Tokens on their way to the host, and the requests they were drawn for: of a step, or the
    first ones behind prompts. Rows may have other requests by the time they are read."""

    drawn: Drawn  # on the host, there once `ended` is reached
    rows: dict[int, Running]  # by the row of drawn
    is_step: bool
    k: int  # proposals that were checked
    began: Mark
    ended: Mark


Mark = float | torch.cuda.Event  # a moment: of the host's clock, or on a GPU's stream


@dataclass
class Reading:
    """The prompts of neighbouring rows on their way into the cache."""

    rows: dict[int, Running]
    began: Mark
    prefill: Iterator[bool]  # Decoder.prefill


@dataclass
class Speculation:
    """What proposals brought."""

    checked: int = 0  # rows times steps that checked proposals
    tokens: int = 0  # that answers got from those
    accepted: list[int] = field(default_factory=list)  # how often proposal i was right
    checking_s: list[float] = field(default_factory=list)  # per step that checked some
    plain_s: list[float] = field(default_factory=list)  # per step that checked none

    def add(self, k: int, agreed: list[int], seconds: float) -> None:
        """A step that checked k proposals a row; agreed: how many were right in each."""
        if k == 0:
            self.plain_s.append(seconds)
            return
        self.checking_s.append(seconds)
        self.checked += len(agreed)
        self.accepted += [0] * (k - len(self.accepted))
        for i in range(k):
            self.accepted[i] += sum(right > i for right in agreed)


@dataclass
class Stats:
    """What a run took: seconds and tokens."""

    load_s: float = 0.0
    compile_s: float = 0.0
    prompt_tokens: int = 0
    shared_tokens: int = 0  # of them that a row took from another one
    new_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)  # per prefill of prompts
    steps_s: list[float] = field(default_factory=list)  # per decode step
    wall_s: float = 0.0  # from a run's first prompt to its last token
    decode_tokens: int = 0  # that requests got from decode steps
    row_steps: int = 0  # rows that decode steps worked on
    useful_row_steps: int = 0  # those whose request got something
    speculation: Speculation = field(default_factory=Speculation)


class Engine(PrefixSharer):
    """A Decoder whose rows are refilled: each serves one request after the other. A step may check
    proposals: see Speculator, which has the options."""

    def __init__(self, model: Transformer, cache: KVCache | None = None, **options: Any):
        super().__init__(model, cache, **options)
        self.held = {}
        self.running: dict[int, Running] = {}  # by rows whose next tokens somebody wants
        self.refills = False  # rows serve one request after the other
        self.started: dict[int, float] = {}  # when run's requests got their rows
        self.stats = Stats()

    # --- prompts ---

    def chunk(self) -> int:
        return self.chunk_beside_steps() if self.running else PREFILL_CHUNK

    def chunk_beside_steps(self) -> int:
        return CHUNK["cpu" if self.device.type == "cpu" else "gpu"]

    def begin(self, rows: dict[int, Running]) -> Reading:
        """Make neighbouring rows ready for the prompts of new requests."""
        requests = [running.request for running in rows.values()]
        for row, running in rows.items():
            running.row = row
            self.started[running.number] = time.perf_counter()
            self.ends[row] = running.prompt_end
        self.stats.prompt_tokens += sum(len(request.prompt) for request in requests)
        where = slice(min(rows), max(rows) + 1)
        return Reading(rows, self.mark(), self.prefill(where, requests))

    # --- requests ---

    def run(
        self, requests: Iterable[Request], take_number: Callable[[], int | None] | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """Work requests off, in order, in the rows that are free -> (a request's number, new
        tokens of it), as they come; on CUDA the host reads LAG steps behind the device.

        take_number: the numbers of the requests that are to be worked off here, one a call, None
        behind the last; by default all. Each turn puts one chunk of prompts into free rows and
        advances the others by a step.

        A request ends with the first of its eos_ids (included), where its `ends` says so, after
        max_new_tokens, or where the cache is full; finish_reasons then has which it was.
        ValueError if one has no room for a token, or builds upon cached tokens that a sliding
        window has passed; RuntimeError if another run of this engine has begun meanwhile."""
        self.wanted = [Running(i, each, self.budget(each)) for i, each in enumerate(requests)]
        waiting = Waiting(self.wanted, take_number)
        self.start([running.request for running in self.wanted])
        self.refuse_lost_prefix(self.wanted)
        self.stats.compile_s += self.prepare_all()
        began = time.perf_counter()
        reading: Reading | None = None
        pending: deque[Launch] = deque()
        mark, rows = self.mark(), self.running
        while reading or self.running or pending or waiting.peek():
            launches = []
            # a chunk of prompts
            has_free_row = len(self.running) < self.cache.max_batch_size
            if reading is None and has_free_row and waiting.peek():
                reading = self.next_prompts(waiting)
            if reading is not None:
                launches += self.read_chunk(reading)
                if launches:
                    reading = None
                mark = self.mark()
            elif self.refills and not self.compiled:
                self.close_gap()
            # a step
            if self.running:
                if not pending:  # the time since the step before was the caller's
                    mark = self.mark()
                launches.append(self.launch(mark))
                mark = launches[-1].ended
            # what the host is to see: all of it once nothing more is under way
            pending += launches
            while len(pending) > (self.lag if launches else 0):
                for answer in self.read(pending.popleft()):
                    yield answer
                    if self.running is not rows:
                        raise RuntimeError("another run of this engine has begun")
        self.stats.wall_s += time.perf_counter() - began

    def start(self, requests: Sequence[Request]) -> None:
        self.started.clear()
        self.held.clear()  # others may have had the cache since
        super().start(requests)
        self.ends = self.input_pos.tolist()
        self.refills = len(requests) > self.cache.max_batch_size

    def refuse_lost_prefix(self, wanted: Sequence[Running]) -> None:
        """ValueError if rows serve one request after the other behind the same cached tokens, and
        those before would drive these out of a layer's ring."""
        if not self.refills or not any(running.request.cached for running in wanted):
            return
        longest = max(running.prompt_end + running.budget for running in wanted)
        longest += (self.lag + 1) * (self.k + 1)  # steps that are under way
        if any(each.places.ring and longest > each.places.S for each in self.cache.whole):
            raise ValueError(
                f"{len(wanted)} prompts behind cached tokens need as many rows, not "
                f"{self.cache.max_batch_size}: layers with a sliding window keep the last "
                f"{self.cache.ring_len} tokens of a row, and no others for the prompt after"
            )

    def next_prompts(self, waiting: Waiting) -> Reading:
        """Begin with the requests that wait, in as many neighbouring free rows as pay."""
        B = self.cache.max_batch_size
        first = waiting.peek().number  # with rows for all, request i has row i
        if self.refills:
            first = next(row for row in range(B) if row not in self.running)
        rows = {first: waiting.pop()}
        cached = rows[first].request.cached
        requests = [rows[first].request]
        for row in range(first + 1, B):
            if row in self.running:
                break
            neighbour = waiting.peek()
            if neighbour is None or neighbour.request.cached != cached:
                break
            requests.append(neighbour.request)
            if not pads_little(requests, self.chunk_beside_steps() // 2):
                break
            if len(requests) * max(len(each.prompt) for each in requests) > self.chunk():
                break  # read together, in smaller chunks than alone, they are summed otherwise
            rows[row] = waiting.pop()
        return self.begin(rows)

    @on_its_device
    def read_chunk(self, reading: Reading) -> list[Launch]:
        """Put the next chunk of prompts into the cache -> their first tokens, if it is the last."""
        if not self.read_on(reading.prefill):
            return []
        rows = slice(min(reading.rows), max(reading.rows) + 1)
        if self.drafter is not None:
            self.drafter.note(self.token[rows], self.input_pos[rows], rows)
        self.running.update(reading.rows)
        for running in reading.rows.values():
            running.drawn_at_least = running.drawn_at_most = 1
        drawn = Drawn(self.token[rows], None, *self.known)
        return [self.send(drawn, dict(enumerate(reading.rows.values())), reading.began)]

    @on_its_device
    def launch(self, began: Mark) -> Launch:
        """Launch a step for the requests that run."""
        ends = list(self.ends)
        for row, running in self.running.items():
            ends[row] = running.prompt_end + running.drawn_at_most - 1
        self.k_now = k = self.next_k(ends)
        rows = dict(self.running)
        if not self.compiled:  # nor is a cheaper kind for these rows
            self.kind = kind_of(running.request for running in rows.values())
        self.stats.row_steps += self.width()
        self.forget_resting(rows)
        drawn = self.step()
        self.k_now = 0
        for running in rows.values():
            running.drawn_at_least += 1
            running.drawn_at_most += k + 1
        return self.send(drawn, rows, began, is_step=True, k=k)

    def send(
        self, drawn: Drawn, rows: dict[int, Running], began: Mark, is_step: bool = False,
        k: int = 0,
    ) -> Launch:
        """Send what was drawn on its way to the host, and free the rows that have all."""
        drawn = Drawn(*map(on_host, drawn))
        for running in rows.values():
            if running.drawn_at_least >= running.budget:
                self.free(running)
        return Launch(drawn, rows, is_step, k, began, self.mark())

    def close_gap(self) -> None:
        """Move the last row's request to a free row before it, so that steps have fewer rows."""
        last = max(self.running, default=0)
        free = next((row for row in range(last) if row not in self.running), None)
        if free is None:
            return
        running = self.running.pop(last)
        self.running[free] = running
        running.row = free
        request = running.request
        length = min(running.prompt_end + running.drawn_at_most, self.cache.max_seq_len)
        self.copy_row(last, free, length)
        if last in self.held:
            self.held[free] = self.held.pop(last)
        for tensor in (self.token, self.input_pos, self.active, *self.sampling):
            tensor[free] = tensor[last]
        if self.extras is not None:
            self.extras.copy_row(last, free)
        self.active[last] = 0
        self.rest(last, request.cached)
        self.cache.cached[last] = request.cached

    def free(self, running: Running) -> None:
        """Let go of a request's row. One that is refilled goes back to its cached tokens, where
        steps cost it least; any other keeps its text, for a caller who continues it."""
        row = running.row
        if self.running.get(row) is running:
            del self.running[row]
            self.active[row] = 0
            self.ends[row] = running.prompt_end + running.drawn_at_most - 1
            if self.refills:
                self.rest(row, running.request.cached)
                self.cache.cached[row] = running.request.cached  # steps write behind that
        if running.done and self.drafter is not None and not self.refills:
            # proposals may have been accepted beyond its last token
            self.rest(row, running.prompt_end + running.read - 1)

    def rest(self, row: int, position: int) -> None:
        self.input_pos[row] = position
        self.ends[row] = position

    def read(self, launch: Launch) -> Iterator[tuple[int, list[int]]]:
        """Wait for a launch and hand its tokens to the requests that still want them."""
        seconds = seconds_between(launch.began, launch.ended)
        if launch.is_step:
            self.note_step(launch, seconds)
        else:
            self.stats.first_token_s.append(seconds)
        tokens = launch.drawn.tokens.tolist()
        agreed = launch.drawn.agreed.tolist() if launch.k else [0] * len(tokens)
        for row, running in launch.rows.items():
            running.drawn_at_least += agreed[row]
            running.drawn_at_most -= launch.k - agreed[row]
            if running.done:
                continue
            taken = self.take(running, tokens[row][:agreed[row] + 1])
            if self.extras is not None:
                taken = self.extras.told(running.request, taken, launch.drawn, row)
            if not self.refills or self.running.get(running.row) is running:
                self.cache.cached[running.row] = running.prompt_end + running.read - 1
            self.stats.new_tokens += len(taken)
            if launch.is_step:
                self.stats.useful_row_steps += 1
                self.stats.decode_tokens += len(taken)
            if launch.k:
                self.stats.speculation.tokens += len(taken)
            if running.done:
                self.free(running)
            yield running.number, taken

    def note_step(self, launch: Launch, seconds: float) -> None:
        """Put what a step took, and how many proposals were right, where it is needed."""
        self.stats.steps_s.append(seconds)
        if self.drafter is None:
            return
        agreed = launch.drawn.agreed.tolist()
        live = {each.number: agreed[row] for row, each in launch.rows.items() if not each.done}
        if self.gauge is not None:
            seconds = self.model.broadcast(seconds)  # all ranks are to decide alike
            self.gauge.observe(launch.k, live, len(agreed), seconds)
        if launch.k or self.gauge is not None:  # a draft model works in plain steps too
            self.stats.speculation.add(launch.k, list(live.values()), seconds)

    def end(self, number: int) -> None:
        running = self.wanted[number]
        running.done = True
        self.finish_reasons.setdefault(number, "stop")
        self.free(running)

    def take(self, running: Running, tokens: list[int]) -> list[int]:
        """Give a request new tokens -> those up to the one that ends it, if one does."""
        for i, token in enumerate(tokens):
            running.read += 1
            reason = running.request.ends_with(token, running.read, running.budget)
            if reason is not None:
                running.done = True
                self.finish_reasons[running.number] = reason
                return tokens[:i + 1]
        return tokens

    @on_its_device
    def mark(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed_steps(self, n: int) -> list[float]:
        """The seconds of n steps, whatever the rows hold."""
        marks = [self.mark()]
        for _ in range(n):
            self.step()
            marks.append(self.mark())
        return [seconds_between(began, ended) for began, ended in pairwise(marks)]


def on_host(tensor: Tensor | None) -> Tensor | None:
    """A copy, on its way."""
    if tensor is None:
        return None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)


def seconds_between(began: Mark, ended: Mark) -> float:
    """Waits for the second of two marks."""
    if isinstance(ended, float):
        return ended - began
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3
