"""The Engine, which decodes rows of a cache together, each with a request of its own.

One step of decode is Engine.step: the model's forward, sampling and the advance of every row, all
on the device. Engine.run turns requests into tokens."""
from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ahead import AheadOfTime
from cli.stats import Stats
from formats.checkpoint import first_line
from model import KVCache, Transformer, run_block, run_head
from parallel import can_reduce_in_one_shot
from sampling import Request, Sampling, kind_of, sample
from speculate import Drafter, Gauge, make_drafter

PREFILL_CHUNK = 8192  # most prompt tokens in one pass; bounds the activations' memory
# most of them while rows decode: these wait for one pass at a time, which is to cost little more
# than a step but use the device well
CHUNK = {"cpu": 128, "gpu": 512}
LAG = 2  # steps that the host reads behind a GPU, so that looking at tokens never stalls it


@dataclass
class Running:
    """A request that a row works on."""

    number: int  # of the request, in the order in which run was given them
    request: Request
    budget: int  # most new tokens
    row: int | None = None  # where it is now
    # tokens that were drawn on the device, at least and at most: steps under way that check
    # proposals accept the host does not know how many
    least: int = 0
    most: int = 0
    read: int = 0  # tokens that the host has seen
    done: bool = False

    @property
    def prompt_end(self) -> int:
        return self.request.cached + len(self.request.prompt)


class Waiting:
    """Requests without a row yet, in the order that draw() gives their numbers in, None behind the
    last. Groups of ranks that share the requests draw from one queue, and none sooner than it has
    to: what one has drawn, no other can take."""

    def __init__(self, requests: Sequence[Running], draw: Callable[[], int | None] | None = None):
        if draw is None:  # all of them, one after the other
            draw = partial(next, iter(range(len(requests))), None)
        self.requests = requests
        self.draw = draw
        self.drawn: Running | None = None
        self.over = False  # others need not be asked any more

    def peek(self) -> Running | None:
        """The next one, None if there is none."""
        if self.drawn is None and not self.over:
            number = self.draw()
            self.over = number is None
            if number is not None:
                self.drawn = self.requests[number]
        return self.drawn

    def pop(self) -> Running:
        taken = self.peek()
        self.drawn = None
        return taken


class Drawn(NamedTuple):
    """The tokens of a step."""

    tokens: Tensor  # int64 [B, k + 1], of which those up to the first wrong proposal count
    # int64 [B]: how many proposals were right, one after the other; of a plain step whether its
    # one was, None where there was none
    agreed: Tensor | None


@dataclass
class Launch:
    """Tokens on their way to the host, and the requests they were drawn for: of a step, or the
    first ones behind prompts. Rows may have other requests by the time they are read."""

    drawn: Drawn  # on the host, there once `ended` is reached
    rows: dict[int, Running]
    is_step: bool
    k: int  # proposals that were checked
    began: Mark
    ended: Mark


Mark = float | torch.cuda.Event  # a moment: of the host's clock, or on a GPU's stream


class StepFailed(RuntimeError):
    """What a step runs does not compile or launch on this device; __cause__ says where."""


def on_its_device(method: Callable) -> Callable:
    """A method of Engine, run with the engine's GPU as the current one, since streams, events,
    captures and Triton's launches are those of the current device. An eager one on a CPU runs in
    inference mode, which takes a tenth off a step: no operator asks about gradients.

    Raises OutOfMemoryError or StepFailed for what the device refuses; a bug stays what it is."""

    @wraps(method)
    def guarded(engine: Engine, *args: Any, **options: Any) -> Any:
        mode = nullcontext()
        if engine.device.type == "cpu" and not engine.compiled:
            mode = torch.inference_mode()
        try:
            # a CPU's index is None
            with mode, torch.accelerator.device_index(engine.device.index):
                return method(engine, *args, **options)
        except Exception as error:
            refuse_what_the_device_refuses(error, engine)
            raise

    return guarded


class Reading:
    """The prompts of neighbouring rows on their way into the cache, chunk by chunk."""

    def __init__(self, rows: dict[int, Running], began: Mark, device: torch.device):
        self.requests = rows  # neighbours, with as many tokens cached
        self.began = began
        self.rows = slice(min(rows), max(rows) + 1)
        prompts = [running.request.prompt for running in rows.values()]
        self.cached = rows[self.rows.start].request.cached
        self.width = max(map(len, prompts))
        padded = [prompt + [0] * (self.width - len(prompt)) for prompt in prompts]
        self.tokens = torch.tensor(padded, device=device)  # (n, width)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (n)
        self.done = 0  # tokens of each that are in the cache
        self.last_logits: Tensor | None = None  # of each prompt's last token, once all is done

    def chunk(
        self, model: Transformer, cache: KVCache, drafter: Drafter | None, most: int
    ) -> None:
        """Put the next tokens of each prompt into the cache, up to `most` of all together."""
        n, start = len(self.tokens), self.done
        chunk = self.tokens[:, start:start + max(1, most // n)]  # (n, T)
        behind = self.cached + start
        input_pos = torch.full((n,), behind, dtype=torch.int32, device=chunk.device)
        last = (self.lengths - 1 - start).clamp(-1, chunk.shape[1] - 1)
        logits = model.prefill(
            chunk, input_pos, cache, rows=self.rows, start=behind, last=last
        )[:, 0]
        if drafter is not None:
            drafter.read(chunk, input_pos, self.rows, behind, last)
        if self.last_logits is None:
            self.last_logits = logits
        else:  # what counts is the chunk in which a prompt ends
            reaches_here = self.lengths > start
            self.last_logits = torch.where(reaches_here[:, None], logits, self.last_logits)
        self.done += chunk.shape[1]


class Engine:
    """Rows of one cache that decode together, each at its own position with its own request.

    Tokens, positions and sampling settings live on the device, so a step needs nothing from the
    host; a compiled engine captures it in a CUDA graph, one for each kind of sampling, with
    proposals to check and without. compile_model compiles what a step runs. One engine drives a
    cache at a time.

    speculate_k: steps may check that many proposals, of a draft model or of prompt lookup: see
    speculate.py. context: most tokens of a row, by default all that the cache has room for and the
    model was made for; steps that check proposals need room for k more."""

    def __init__(
        self, model: Transformer, cache: KVCache | None = None, *, compiled: bool = False,
        speculate_k: int = 0, draft: Transformer | None = None, context: int | None = None,
    ):
        self.model = model
        self.cache = model.check_cache(1, cache)
        self.context = context or min(self.cache.max_seq_len, model.config.max_seq_len)
        if self.context > self.cache.max_seq_len:
            raise ValueError(
                f"a context of {context} does not fit into a cache of {self.cache.max_seq_len}"
            )
        self.k = speculate_k
        self.drafter = make_drafter(speculate_k, model, draft, self.cache, compiled)
        self.gauge: Gauge | None = None  # a draft model is asked at every step
        if speculate_k and draft is None:
            self.gauge = Gauge(speculate_k)
        self.compiled = compiled
        self.device = model.device
        B = self.cache.max_batch_size
        self.token = torch.zeros(B, 1, dtype=torch.int64, device=self.device)
        self.input_pos = torch.zeros(B, dtype=torch.int32, device=self.device)
        self.active = torch.zeros(B, dtype=torch.int32, device=self.device)  # 1: a step moves it on
        idle = [Request(prompt=[], max_new_tokens=1)] * B
        self.sampling = Sampling.of(idle, model.config.vocab_size, self.device)
        self.kind = "greedy"
        self.running: dict[int, Running] = {}  # rows whose next tokens somebody wants
        self.refills = False  # rows serve one request after the other
        self.started: dict[int, float] = {}  # when run's requests got their rows
        self.finish_reasons: dict[int, str] = {}  # and how they ended: eos, stop, length, context
        self.ends = [0] * B  # at most where the other rows stand
        # kinds of step and the proposals they check -> where prepared ones put what they draw
        self.prepared: dict[tuple[str, int], Drawn] = {}
        self.graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        self.tables: list[Tensor] = []  # what the graphs read that the model may replace
        self.owner: object = None  # the run that drives the rows
        self.stats = Stats()
        self.lag = LAG if self.device.type == "cuda" else 0
        self.sample = sample
        if compiled and self.device.type == "cuda":  # noise alone is some thirty operators
            self.sample = torch.compile(
                sample, dynamic=False, fullgraph=True, isolate_recompiles=True, recompile_limit=64
            )

    # --- a step ---

    @on_its_device
    def step(self, k: int = 0) -> Drawn:
        """Launch one step of all rows: forward, sample, advance. k: 0, or speculate_k to check as
        many proposals, for which every row has to have room."""
        if self.compiled and self.device.type == "cuda":
            self.prepare_once(self.kind, k)
            if (self.kind, k) in self.graphs:
                self.graphs[self.kind, k].replay()
                return self.prepared[self.kind, k]
        return self.advance(k)

    def advance(self, k: int = 0) -> Drawn:
        rows = slice(0, self.width())
        if self.drafter is not None:
            return self.advance_by_proposals(rows, k)
        input_pos = self.input_pos[rows]
        logits = self.model.decode(self.token[rows], input_pos, self.cache)  # (B, 1, V)
        tokens = self.draw(rows, logits, 1)  # (B, 1)
        self.move(rows, tokens, self.active[rows])
        return Drawn(tokens, None)

    def advance_by_proposals(self, rows: slice, k: int) -> Drawn:
        """Feed each row's last token and k proposals, and keep what is drawn up to the first
        wrong one. A plain step, k = 0, compares one: a gauge wants to know, and a draft model has
        to read the row's tokens in any case."""
        token = self.token[rows]
        input_pos = self.input_pos[rows]
        draw = partial(self.draw, rows)
        proposals = self.drafter.propose(token, input_pos, rows, max(k, 1), draw)
        feed = torch.cat([token, proposals[:, :k]], 1)  # (B, k + 1)
        logits = self.model.decode(feed, input_pos, self.cache)  # (B, k + 1, V)
        tokens = draw(logits, 1)  # (B, k + 1)
        self.drafter.note(tokens, input_pos + 1, rows)

        right = tokens[:, :max(k, 1)] == proposals
        agreed = right.long().cumprod(1).sum(1)  # (B)
        accepted = agreed.clamp(max=k)
        last = tokens.gather(1, accepted[:, None])  # (B, 1)
        self.move(rows, last, self.active[rows] * (accepted + 1))
        return Drawn(tokens, agreed)

    def move(self, rows: slice, last: Tensor, n: Tensor) -> None:
        """The rows' last tokens are these now, n positions on. n is 0 for rows without a request:
        they stay where they are, and what a step writes there is nobody's."""
        self.token[rows] = last
        self.input_pos[rows].add_(n).clamp_(max=self.cache.max_seq_len - 1)

    def draw(self, rows: slice, logits: Tensor, ahead: int) -> Tensor:
        """Tokens [B, T] of rows for logits [B, T, V], `ahead` of their last ones and on."""
        if self.kind == "greedy":
            return logits.argmax(-1)
        B, T, V = logits.shape
        offsets = torch.arange(ahead, ahead + T, dtype=torch.int32, device=logits.device)
        position = self.input_pos[rows, None] + offsets  # (B, T)
        sampling = self.sampling.rows(rows)
        if T > 1:
            sampling = Sampling(*(setting.repeat_interleave(T, 0) for setting in sampling))
        tokens = self.sample(logits.view(B * T, V), sampling, self.kind, position.flatten())
        return tokens.view(B, T)

    def width(self) -> int:
        """How many rows a step works on: a compiled step has one shape."""
        if self.compiled or not self.running:
            return self.cache.max_batch_size
        return max(self.running) + 1

    def prepare_kind(self, kind: str) -> float:
        """Prepare the steps of a kind, with proposals and without -> seconds it took."""
        return sum(self.prepare_once(kind, k) for k in {0, self.k})

    def prepare_once(self, kind: str, k: int = 0) -> float:
        """Prepare what a compiled engine has not prepared yet, if there is room for a trial ->
        seconds it took."""
        has_room = max(self.ends) + k + 1 <= self.cache.max_seq_len
        if not self.compiled or not has_room or (kind, k) in self.prepared:
            return 0.0
        return self.prepare(kind, k)

    @on_its_device
    def prepare(self, kind: str = "greedy", k: int = 0) -> float:
        """Compile a step of that kind by running it, and capture it on CUDA -> seconds it took.

        Rows keep their state: what the trial puts into the cache lies where the next real step
        writes, for which there has to be room."""
        began = time.perf_counter()
        token = self.token.clone()
        input_pos = self.input_pos.clone()
        active = self.active.clone()
        self.active.zero_()  # so that all trials write at the same place
        kind_before = self.kind
        self.kind = kind
        if self.device.type == "cuda":
            self.graphs[kind, k] = self.capture(k)
        else:
            self.prepared[kind, k] = self.advance(k)
        self.kind = kind_before
        self.token.copy_(token)
        self.input_pos.copy_(input_pos)
        self.active.copy_(active)
        return time.perf_counter() - began

    def capture(self, k: int) -> torch.cuda.CUDAGraph:
        """One step as a CUDA graph, after two on a side stream that compile and allocate."""
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.advance(k)
            self.advance(k)
            # on a stream of this device: by default it is of the first one that captured
            with torch.cuda.graph(graph, stream=side):
                self.prepared[self.kind, k] = self.advance(k)
        torch.cuda.current_stream().wait_stream(side)
        for model in self.models():
            self.tables.append(model.rope_upto(self.cache.max_seq_len))
        torch.cuda.synchronize()
        return graph

    def models(self) -> list[Transformer]:
        """The model, and the draft's if there is one."""
        draft = getattr(self.drafter, "model", None)
        return [self.model] if draft is None else [self.model, draft]

    def keep(self, cached: int) -> None:
        """Rows without a request write, like a trial, from their position on: from now on not
        over their first `cached` tokens."""
        self.input_pos.clamp_(min=cached)
        self.ends = self.input_pos.tolist()

    # --- prompts ---

    @on_its_device
    def insert(self, row: int, requests: Sequence[Request]) -> None:
        """Prefill consecutive rows from `row` on, padded to the longest prompt, while the others
        keep their state, and draw their first tokens into self.token.

        ValueError if the requests differ in how many tokens are cached, or one does not fit."""
        if any(request.cached != requests[0].cached for request in requests):
            raise ValueError("requests that are inserted together have as many tokens cached")
        rows = {}
        for i, request in enumerate(requests, start=row):
            rows[i] = Running(i, request, self.budget(request))
        reading = self.begin(rows)
        while reading.done < reading.width:
            self.read_on(reading, PREFILL_CHUNK)
        self.finish(reading)
        self.kind = kind_of(running.request for running in self.running.values())

    def begin(self, rows: dict[int, Running]) -> Reading:
        """Make neighbouring rows ready for the prompts of new requests."""
        reading = Reading(rows, self.mark(), self.device)
        if reading.cached:
            self.cache.refuse_lost(reading.rows, reading.cached)
        requests = [running.request for running in rows.values()]
        new = Sampling.of(requests, self.model.config.vocab_size, self.device)
        if any(request.seed is None for request in requests):  # keys are drawn, by each rank others
            key = self.model.ranks.agree(new.key.cpu())
            new = new._replace(key=key.to(self.device))
        for setting, values in zip(self.sampling, new):
            setting[reading.rows] = values
        for row, running in rows.items():
            running.row = row
            self.started[running.number] = time.perf_counter()
            self.ends[row] = running.prompt_end
        self.input_pos[reading.rows] = reading.cached
        self.stats.prompt_tokens += sum(len(request.prompt) for request in requests)
        return reading

    def read_on(self, reading: Reading, most: int) -> None:
        """Put the next chunk of prompts into the cache. Until they are all there, the others' steps
        write in these rows too: behind what is there already, where the next chunk will."""
        reading.chunk(self.model, self.cache, self.drafter, most)
        self.input_pos[reading.rows] = reading.cached + reading.lengths.clamp(max=reading.done)

    def finish(self, reading: Reading) -> None:
        """Draw the first tokens behind prompts that are in the cache; from now on steps count."""
        rows = reading.rows
        kind = kind_of(running.request for running in reading.requests.values())
        sampling = self.sampling.rows(rows)
        input_pos = self.input_pos[rows]
        self.token[rows, 0] = sample(reading.last_logits, sampling, kind, input_pos)
        if self.drafter is not None:
            self.drafter.note(self.token[rows], input_pos, rows)
        self.active[rows] = 1
        self.running.update(reading.requests)
        for running in reading.requests.values():
            running.least = 1
            running.most = 1

    # --- requests ---

    def run(
        self, requests: Iterable[Request], draw: Callable[[], int | None] | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """Work requests off, in order, in the rows that are free -> (a request's number, new
        tokens of it), as they come; on CUDA the host reads LAG steps behind the device.

        draw: the numbers of the requests that are to be worked off here, one a call, None behind
        the last; by default all. Each turn puts one chunk of prompts into free rows and advances
        the others by a step.
        A request ends with the first of its eos_ids (included), where its `ends` says so, after
        max_new_tokens, or where the cache is full; finish_reasons then has which it was.
        ValueError if one has no room for a token, or builds upon cached tokens that a sliding
        window has passed; RuntimeError if another run of this engine has begun meanwhile. Tokens
        have to be checked before: see check_prompts."""
        wanted = [Running(i, request, self.budget(request)) for i, request in enumerate(requests)]
        waiting = Waiting(wanted, draw)
        self.reset(wanted)
        self.refuse_lost_prefix(wanted)
        self.stats.compile_s += self.prepare_kind(self.kind)
        began = time.perf_counter()
        me = self.owner = object()
        reading: Reading | None = None
        pending: deque[Launch] = deque()
        mark = self.mark()
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
                yield from self.read(pending.popleft())
                if self.owner is not me:
                    raise RuntimeError("another run of this engine has begun")
        self.stats.wall_s += time.perf_counter() - began

    def budget(self, request: Request) -> int:
        """The most new tokens that a request can have."""
        room = self.context - request.cached - len(request.prompt)
        budget = min(request.max_new_tokens, room)
        if budget < 1:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens behind {request.cached} cached, with "
                f"{request.max_new_tokens} new ones, does not fit into {self.context}"
            )
        return budget

    def reset(self, requests: Sequence[Running]) -> None:
        """Give up what the rows did, for these requests."""
        self.running.clear()
        self.started.clear()
        self.finish_reasons.clear()
        self.active.zero_()
        self.ends = self.input_pos.tolist()
        self.refills = len(requests) > self.cache.max_batch_size
        # one kind of step for all that will come: a compiled one is prepared before
        self.kind = kind_of(running.request for running in requests)

    def refuse_lost_prefix(self, wanted: Sequence[Running]) -> None:
        """ValueError if rows serve one request after the other behind the same cached tokens, and
        those before would drive these out of a layer's ring."""
        overshoot = (self.lag + 1) * (self.k + 1)
        longest = max((running.prompt_end + running.budget for running in wanted), default=0)
        has_prefix = any(running.request.cached for running in wanted)
        if self.refills and has_prefix and self.cache.goes_round(longest + overshoot):
            raise ValueError(
                f"{len(wanted)} prompts behind cached tokens need as many rows, not "
                f"{self.cache.max_batch_size}: layers with a sliding window keep the last "
                f"{self.cache.ring_len} tokens of a row, and no others for the prompt after"
            )

    def next_prompts(self, waiting: Waiting) -> Reading:
        """Begin with the requests that wait, in as many neighbouring free rows as pay.

        A pass of few tokens takes as long as reading the weights, and there padding is free;
        beyond, it costs what other tokens cost, and may be a quarter of them."""
        B = self.cache.max_batch_size
        first = waiting.peek().number  # where there are rows for all, a caller may rely on its own
        if self.refills:
            first = next(row for row in range(B) if row not in self.running)
        rows = {first: waiting.pop()}
        cached = rows[first].request.cached
        lengths = [len(rows[first].request.prompt)]
        for row in range(first + 1, B):
            if row in self.running:
                break
            neighbour = waiting.peek()
            if neighbour is None or neighbour.request.cached != cached:
                break
            lengths.append(len(neighbour.request.prompt))
            padded = len(lengths) * max(lengths)
            if padded > max(self.chunk() // 2, 1.25 * sum(lengths)):
                break
            rows[row] = waiting.pop()
        return self.begin(rows)

    def chunk(self) -> int:
        return CHUNK["cpu" if self.device.type == "cpu" else "gpu"]

    @on_its_device
    def read_chunk(self, reading: Reading) -> list[Launch]:
        """Put the next chunk of prompts into the cache -> their first tokens, if it is the last."""
        most = self.chunk() if self.running else PREFILL_CHUNK
        self.read_on(reading, most)
        if reading.done < reading.width:
            return []
        self.finish(reading)
        return [self.send(Drawn(self.token, None), reading.requests, reading.began)]

    @on_its_device
    def launch(self, began: Mark) -> Launch:
        """Launch a step for the requests that run."""
        k = self.next_k()
        rows = dict(self.running)
        if not self.compiled:  # nor is a cheaper kind for these rows
            self.kind = kind_of(running.request for running in rows.values())
        self.stats.row_steps += self.width()
        drawn = self.step(k)
        for running in rows.values():
            running.least += 1
            running.most += k + 1
        return self.send(drawn, rows, began, is_step=True, k=k)

    def next_k(self) -> int:
        """How many proposals the next step checks: none where that does not pay, or where a row,
        whether anybody wants its tokens or not, may be too near the end of the cache."""
        if self.k == 0 or self.gauge is not None and not self.gauge.pays(self.width()):
            return 0
        ends = list(self.ends)
        for row, running in self.running.items():
            ends[row] = running.prompt_end + running.most - 1
        if max(ends) + self.k + 1 > self.cache.max_seq_len:
            return 0
        return self.k

    def send(
        self, drawn: Drawn, rows: dict[int, Running], began: Mark, is_step: bool = False,
        k: int = 0,
    ) -> Launch:
        """Send what was drawn on its way to the host, and free the rows that have all."""
        drawn = Drawn(self.to_host(drawn.tokens), self.to_host(drawn.agreed))
        for running in rows.values():
            if running.least >= running.budget:
                self.free(running)
        return Launch(drawn, rows, is_step, k, began, self.mark())

    def to_host(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        copy = torch.empty(
            tensor.shape, dtype=tensor.dtype, pin_memory=self.device.type == "cuda"
        )
        return copy.copy_(tensor, non_blocking=True)

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
        length = min(running.prompt_end + running.most, self.cache.max_seq_len)
        self.cache.copy_row(last, free, length)
        if self.drafter is not None:
            self.drafter.copy_row(last, free, length)
        for tensor in (self.token, self.input_pos, self.active, *self.sampling):
            tensor[free] = tensor[last]
        self.active[last] = 0
        self.rest(last, request.cached)
        self.cache.held[last] = request.cached

    def free(self, running: Running) -> None:
        """Let go of a request's row. One that serves one request after the other goes where steps
        cost it least; any other keeps its text, for a caller who continues it."""
        row = running.row
        if self.running.get(row) is running:
            del self.running[row]
            self.active[row] = 0
            self.ends[row] = running.prompt_end + running.most - 1
            if self.refills:
                self.rest(row, running.request.cached)
                self.cache.held[row] = running.request.cached  # steps write behind that
        if running.done and self.drafter is not None and not self.refills:
            # proposals may have been accepted beyond its last token
            self.rest(row, running.prompt_end + running.read - 1)

    def rest(self, row: int, position: int) -> None:
        self.input_pos[row] = position
        self.ends[row] = position

    def read(self, launch: Launch) -> Iterator[tuple[int, list[int]]]:
        """Wait for a launch and hand its tokens to the requests that still want them."""
        seconds = self.wait_for(launch)
        if launch.is_step:
            self.note_step(launch, seconds)
        else:
            self.stats.first_token_s.append(seconds)
        tokens = launch.drawn.tokens.tolist()
        agreed = [0] * len(tokens)
        if launch.k:
            agreed = launch.drawn.agreed.tolist()
        for row, running in launch.rows.items():
            running.least += agreed[row]
            running.most -= launch.k - agreed[row]
            if running.done:
                continue
            taken = self.take(running, tokens[row][:agreed[row] + 1])
            if not self.refills or self.running.get(running.row) is running:
                self.cache.held[running.row] = running.prompt_end + running.read - 1
            self.stats.new_tokens += len(taken)
            if launch.is_step:
                self.stats.useful_row_steps += 1
                self.stats.decode_tokens += len(taken)
            if running.done:
                self.free(running)
            yield running.number, taken

    @on_its_device
    def wait_for(self, launch: Launch) -> float:
        """Until a launch's tokens are on the host -> the seconds that it took."""
        return seconds_between(launch.began, launch.ended)

    def note_step(self, launch: Launch, seconds: float) -> None:
        """Put what a step took, and how many proposals were right, where it is needed."""
        self.stats.steps_s.append(seconds)
        if self.drafter is None:
            return
        agreed = launch.drawn.agreed.tolist()
        live = {}
        for row, running in launch.rows.items():
            if not running.done:
                live[running.number] = agreed[row]
        if self.gauge is not None:
            seconds = self.model.ranks.agree(seconds)  # all ranks are to decide alike
            self.gauge.observe(launch.k, live, len(agreed), seconds)
        if launch.k or self.gauge is not None:  # a draft model works in plain steps too
            self.stats.speculation.add(launch.k, list(live.values()), seconds)

    def take(self, running: Running, tokens: list[int]) -> list[int]:
        """Give a request new tokens -> those up to the one that ends it, if one does."""
        request = running.request
        for i, token in enumerate(tokens):
            running.read += 1
            reason = None
            if token in request.eos_ids:
                reason = "eos"
            elif request.ends is not None and request.ends([token]):
                reason = "stop"
            elif running.read == request.max_new_tokens:
                reason = "length"
            elif running.read == running.budget:
                reason = "context"
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


def refuse_what_the_device_refuses(error: Exception, engine: Engine) -> None:
    """Raise OutOfMemoryError or StepFailed, in one sentence, where these are what went wrong."""
    if isinstance(error, (torch.OutOfMemoryError, StepFailed)):
        return  # it says so
    for cause in causes(error):
        if isinstance(cause, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(str(cause)) from error
    reason = error
    while isinstance(reason, torch.AcceleratorError) and reason.__context__ is not None:
        reason = reason.__context__  # the end of a capture fails too, and masks what broke it
    if not is_of_the_device(reason):
        return
    advice = []
    if engine.cache.attention == "flash" and engine.device.type != "cpu":  # there it is no kernel
        advice.append("--attention math")
    if engine.compiled:
        advice.append("--no-compile")
    reason = getattr(reason, "inner_exception", reason)  # what the compiler stumbled over
    said = getattr(reason, "error_message", None)  # Triton's, without the source around it
    raise StepFailed(
        f"a step does not compile or run on {engine.device}, as {type(reason).__name__} says: "
        f"{said or first_line(reason)}; try {' or '.join(advice) or '--device cpu'}"
    ) from error


def is_of_the_device(error: BaseException) -> bool:
    """Whether compiling or launching failed: PyTorch's compiler, a GPU, or anything in Triton."""
    if isinstance(error, (torch._dynamo.exc.ShortenTraceback, torch.AcceleratorError)):
        return True
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("triton.") for frame, _ in frames)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, the one that it came from, and so on."""
    seen = set()
    while error is not None and error not in seen:
        yield error
        seen.add(error)
        error = error.__cause__ or error.__context__


def seconds_between(began: Mark, ended: Mark) -> float:
    """Waits for the second of two marks."""
    if isinstance(ended, float):
        return ended - began
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


def compile_model(model: Transformer, prefill: bool = False, keep: bool = False) -> None:
    """Compile one block for decoding, which all layers share, so that compile time does not grow
    with depth; on CUDA also the output head (two operators on a CPU). prefill: also the block over
    prompts of any length. keep: on a CPU, steps of one row come from libraries that are kept for
    later runs; see ahead.py.

    Each is recompiled for every window and every shape of cache that it meets, of any model:
    hence a limit of its own. Hooks are compiled in: after adding one, call this again, and make
    engines anew."""
    on_gpu = model.device.type == "cuda"
    options = {}
    if on_gpu:
        options["coordinate_descent_tuning"] = True
        # what makes q, k and v of their product is one launch and not up to three
        options["combo_kernels"] = True
        options["combo_kernels_pointwise_only"] = True
        if can_reduce_in_one_shot(model.ranks):
            options["_collective.auto_select"] = True
    else:
        torch._dynamo.config.capture_scalar_outputs = True  # lengths as symbols: decode_in_graph
    settings = dict(fullgraph=True, options=options, isolate_recompiles=True, recompile_limit=64)
    model.decode_block = torch.compile(run_block, dynamic=False, **settings)
    if keep and model.device.type == "cpu":
        model.decode_block = AheadOfTime(otherwise=model.decode_block, build=True)
    if on_gpu:
        model.decode_head = torch.compile(run_head, dynamic=False, **settings)
    if prefill:
        model.prefill_block = torch.compile(run_block, dynamic=True, **settings)
