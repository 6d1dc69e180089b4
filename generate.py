"""Generate text: sampling, the Engine that decodes rows of a cache together, the command line.

    python generate.py --checkpoint_path PATH --prompt "The capital of France is"

One step of decode is Engine.step: the model's forward, sampling and the advance of every row,
all on the device. Engine.run turns requests into tokens; generate() and the command line drive
it."""
from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the long imports without a word

import hashlib
import json
import math
import os
import random
import struct
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

# The OpenMP of PyTorch's wheels for CPUs, libgomp, reads this while it loads: how many turns a
# thread that waits for the others spins before it sleeps. Its own choice is 300,000, which on a
# machine with other work to do takes the cores from those that are waited for; with less than a
# few thousand, steps of small models are slower on a quiet one. What the user has chosen stays.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "4000"

import torch
from safetensors import SafetensorError
from torch import Tensor

from cli.arguments import DTYPES, SETTINGS, cut, number, parse_args, say
from cli.batch import News, Records, Run, answer_file, answer_live, help_answer, say_cuts
from cli.chat import Chat, Show
from cli.progress import with_bar
from cli.prompts import (
    Asked, Job, check_template, checked_number, read_jobs, read_lines, read_system, read_text,
    samples, title_of, with_system,
)
from cli.stats import Memory, Stats, check_writable, profile, summarize
from formats.checkpoint import default_model, first_line, resolve
from formats.tokenizer import TextStream, Tokenizer, load_tokenizer, save_tokenizer
from model import KVCache, ModelConfig, Transformer, load_model, run_block, run_head, tensor_bytes
from parallel import ALONE, Ranks, Team, can_reduce_in_one_shot, mute_all_but_the_first
from quantize import QuantizedLinear, refuse_existing, save_quantized
from speculate import Drafter, Gauge, make_drafter

PREFILL_CHUNK = 8192  # most prompt tokens in one pass; bounds the activations' memory
# most of them while rows decode: these wait for one pass at a time, which is to cost little more
# than a step but use the device well
CHUNK = {"cpu": 128, "gpu": 512}
LAG = 2  # steps that the host reads behind a GPU, so that looking at tokens never stalls it
LEAST_TEMPERATURE = 1e-5  # what is below is greedy: logits over it would leave float32
FROM_ZERO = number(int, 0)  # a check of a whole number
CANDIDATES = 256  # tokens that are left for sampling when every row has a top_k up to that


@dataclass(frozen=True)
class Request:
    """What one row is to do: a prompt, how to draw, and when to stop."""

    prompt: list[int]
    max_new_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    eos_ids: frozenset[int] = frozenset()
    cached: int = 0  # tokens of the row that are in the cache already, in front of the prompt
    seed: int | None = None  # the same, the same text; None: a new one when the request starts
    # called on the host with each new token, in a list of its own; True: it was the last
    ends: Callable[[list[int]], bool] | None = None

    def __post_init__(self) -> None:
        """ValueError names a setting that no row can have."""
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p"):
            value = getattr(self, name)
            if value is not None or name in ("max_new_tokens", "temperature"):
                checked_number(name, value, SETTINGS[name])
        checked_number("cached", self.cached, FROM_ZERO)


# --- sampling ---

class Sampling(NamedTuple):
    """How rows draw their tokens: tensors [B], so that one captured step serves any settings."""

    temperature: Tensor  # float32; 0: greedy
    top_k: Tensor  # int64; the vocabulary's size: all
    top_p: Tensor  # float32; infinity: all
    min_p: Tensor  # float32; 0: all
    key: Tensor  # int32 [B, 2], made from the seed: which random numbers are the request's

    @classmethod
    def of(cls, requests: Sequence[Request], vocab_size: int, device: torch.device) -> Sampling:
        temperature = [request.temperature for request in requests]
        top_k = [request.top_k or vocab_size for request in requests]
        top_p = []
        for request in requests:
            keeps_all = request.top_p is None or request.top_p >= 1
            top_p.append(float("inf") if keeps_all else request.top_p)
        min_p = [request.min_p or 0.0 for request in requests]
        key = [key_of(request.seed) for request in requests]
        return cls(
            torch.tensor(temperature, dtype=torch.float32, device=device),
            torch.tensor(top_k, dtype=torch.int64, device=device),
            torch.tensor(top_p, dtype=torch.float32, device=device),
            torch.tensor(min_p, dtype=torch.float32, device=device),
            torch.tensor(key, dtype=torch.int32, device=device),
        )

    def rows(self, rows: slice) -> Sampling:
        return Sampling(*(setting[rows] for setting in self))


def key_of(seed: int | None) -> tuple[int, int]:
    """Two int32 numbers from any seed, by a hash, so that neighbouring seeds share nothing; None:
    from a new seed."""
    if seed is None:
        seed = random.getrandbits(64)
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    return struct.unpack("<ii", digest)


def kind_of(requests: Iterable[Request]) -> str:
    """The cheapest kind of step that draws for all of these rows.

    "greedy": no row samples; "plain": from all tokens; "top_k": from at most CANDIDATES;
    "filtered": any settings, which sorts the vocabulary."""
    sampled = [request for request in requests if request.temperature > 0]
    if not sampled:
        return "greedy"
    if all(request.top_k is not None and request.top_k <= CANDIDATES for request in sampled):
        return "top_k"
    for request in sampled:
        if (request.top_k, request.top_p, request.min_p) != (None, None, None):
            return "filtered"
    return "plain"


def sample(logits: Tensor, sampling: Sampling, kind: str, position: Tensor) -> Tensor:
    """logits [N, vocab_size] -> token ids [N], by a step of that kind.

    position [N] int32: where the tokens will stand. The draw divides by exponential noise and
    takes the largest (a Gumbel-max draw), so that nothing is read back to the host."""
    likeliest = logits.argmax(-1)
    if kind == "greedy":
        return likeliest
    greedy = sampling.temperature < LEAST_TEMPERATURE
    temperature = sampling.temperature.masked_fill(greedy, 1.0)
    probs = (logits.float() / temperature[:, None]).softmax(-1)  # (N, V)
    N, V = probs.shape
    if kind == "plain":
        ids = torch.arange(V, device=probs.device)[None]
    elif kind == "top_k":
        probs, ids = filter_probs(probs, sampling, min(CANDIDATES, V))
    else:
        probs, ids = filter_probs(probs, sampling, V)
    best = (probs / noise(sampling.key, position, ids)).argmax(-1, keepdim=True)  # (N, 1)
    drawn = ids.expand(N, -1).gather(-1, best)[:, 0]
    return torch.where(greedy, likeliest, drawn)


def filter_probs(
    probs: Tensor, sampling: Sampling, n_candidates: int
) -> tuple[Tensor, Tensor]:
    """The n_candidates likeliest of probabilities [N, V], likeliest first, with zeros for what a
    row's filters drop, one filter after the other; and their token ids: [N, n_candidates] each.

    top_k: the k likeliest. top_p: the fewest tokens whose probabilities reach p of what is left,
    the one that crosses it included. min_p: those at least min_p times as likely as the
    likeliest."""
    if n_candidates < probs.shape[-1]:
        probs, ids = probs.topk(n_candidates)
    else:
        probs, ids = probs.sort(descending=True)
    rank = torch.arange(n_candidates, device=probs.device)
    probs = probs.masked_fill(rank >= sampling.top_k[:, None], 0)
    likelier = probs.cumsum(-1) - probs  # the mass of likelier tokens
    enough = sampling.top_p[:, None] * probs.sum(-1, keepdim=True)
    probs = probs.masked_fill(likelier >= enough, 0)
    least = sampling.min_p[:, None] * probs[:, :1]
    return probs.masked_fill(probs < least, 0), ids


def noise(key: Tensor, position: Tensor, ids: Tensor) -> Tensor:
    """Exponential noise [N, n] for tokens ids [N, n] at positions [N], from keys [N, 2].

    Each number is a hash of its key, position and token and of nothing else: no state to keep, in
    a captured graph either, and a request draws the same in any row, batch or order of steps.
    Counter-based random numbers are an idea of Salmon et al., Random123 (SC 2011). The position
    goes into both halves of the key, and each half into a round of its own: with one round, two
    keys that differ in a few bits would give the same numbers to tokens that differ in them."""
    stream = scramble(key + position[:, None])  # (N, 2)
    bits = scramble(ids.int() ^ stream[:, :1])  # (N, n)
    bits = scramble(bits + stream[:, 1:])
    # the middles of 2^31 steps from 0 to 1; float32 is finest near 0, where winners come from
    uniform = (bits & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
    uniform.clamp_(max=1 - 2.0**-24)  # the largest float32 below 1, to which others round
    return uniform.neg_().log1p_().neg_()


def scramble(x: Tensor) -> Tensor:
    """A bijection of int32 numbers that looks random, in place: Chris Wellons' lowbias32
    (github.com/skeeto/hash-prospector). Products wrap; the mask makes a shift a logical one."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


# --- the engine ---

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

    def peek(self) -> Running | None:
        """The next one, None if there is none."""
        if self.drawn is None:
            number = self.draw()
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
    captures and Triton's launches are those of the current device.

    Raises OutOfMemoryError or StepFailed for what the device refuses; a bug stays what it is."""

    @wraps(method)
    def guarded(engine: Engine, *args: Any, **options: Any) -> Any:
        try:
            with torch.accelerator.device_index(engine.device.index):  # a CPU's index is None
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
        the last; by default all. Each turn puts one chunk of prompts into free rows and advances the others by a step.
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
    if engine.cache.attention == "flash":
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


def compile_model(model: Transformer, prefill: bool = False) -> None:
    """Compile one block for decoding, which all layers share, so that compile time does not grow
    with depth; on CUDA also the output head (two operators on a CPU). prefill: also the block over
    prompts of any length.

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
    if on_gpu:
        model.decode_head = torch.compile(run_head, dynamic=False, **settings)
    if prefill:
        model.prefill_block = torch.compile(run_block, dynamic=True, **settings)


# --- generate ---

@torch.no_grad()
def generate(
    model: Transformer, prompts: list[list[int]], max_new_tokens: int, *,
    temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
    min_p: float | None = None, eos_ids: Iterable[int] = (), seed: int | None = None,
    stop: Sequence[str] = (), tokenizer: Tokenizer | None = None, stream: Show | None = None,
    cached: int = 0, compile: bool = False, speculate_k: int = 0,
    draft: Transformer | None = None, stats: Stats | None = None, engine: Engine | None = None,
) -> list[list[int]]:
    """Continue prompts, lists of token ids of any lengths -> the new tokens of each, as lists.

    A prompt's text ends with the first of eos_ids (included), the token that completes one of the
    stop strings (their tokenizer goes with them), after max_new_tokens, or where the cache or the
    model's context is full. temperature 0 is greedy; filter_probs says what the filters do.
    cached: tokens of each row that are in the cache already, in front of the prompts.
    stream(number, ids) is called as tokens come. seed: the same seed, the same text; prompt i draws
    with seed + i. stats: a Stats to fill.

    A cache that was set up before is used, otherwise one is made that fits. compile: take the
    steps that compile_model compiled. speculate_k, draft: see Engine; the text is the same. Each
    call without an engine makes its own of these; with one, a series of calls shares its captured
    steps, and prompts beyond its rows wait their turn. Threads that call this with one model take
    turns. ValueError says what does not fit."""
    check_prompts(prompts, max_new_tokens, model.config.vocab_size)
    if seed is not None:
        checked_number("seed", seed, FROM_ZERO)
    eos_ids = token_set(eos_ids)
    requests = []
    for i, prompt in enumerate(prompts):
        requests.append(Request(
            prompt, max_new_tokens, temperature, top_k, top_p, min_p, eos_ids, cached,
            seed=None if seed is None else seed + i,
            ends=stops_at(stop, tokenizer, prompt) if stop else None,
        ))
    longest = max(map(len, prompts))
    out = [[] for _ in prompts]
    with taking_turns(model):
        if engine is None:
            needed = min(cached + longest + max_new_tokens, model.config.max_seq_len)
            fit_cache(model, len(prompts), needed + speculate_k, cached)
            engine = Engine(model, compiled=compile, speculate_k=speculate_k, draft=draft)
        check_held(engine.cache, len(prompts), cached)
        check_room(longest, engine.context - cached)
        engine.stats = stats or Stats()
        engine.keep(cached)
        for number, tokens in engine.run(requests):
            out[number] += tokens
            if stream:
                stream(number, tokens)
    return out


LOCKS: WeakKeyDictionary[Transformer, threading.RLock] = WeakKeyDictionary()
BUSY: WeakSet[Transformer] = WeakSet()


@contextmanager
def taking_turns(model: Transformer) -> Iterator[None]:
    """One thread after the other works with a model, which has one cache. ValueError where this
    thread is at it already, in a stream or ends of its own."""
    with LOCKS.setdefault(model, threading.RLock()):
        if model in BUSY:
            raise ValueError("generate is at work with this model; wait until it has returned")
        BUSY.add(model)
        try:
            yield
        finally:
            BUSY.discard(model)


def token_set(eos_ids: Iterable[int]) -> frozenset[int]:
    """ValueError unless these are token ids."""
    ids = [None] if isinstance(eos_ids, (Integral, str)) else list(eos_ids)
    if not all(isinstance(i, Integral) for i in ids):
        raise ValueError(f"eos_ids must be token ids, as tokenizer.eos_ids has, not {eos_ids!r}")
    return frozenset(ids)


def stops_at(
    stop: Sequence[str], tokenizer: Tokenizer | None, prompt: list[int]
) -> Callable[[list[int]], bool]:
    """Request.ends for the text behind a prompt. ValueError if there is no tokenizer, or if one of
    the stop strings is none."""
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop must be a list of texts, none of them empty, not {stop!r}")
    if tokenizer is None:
        raise ValueError(f"stop strings ({', '.join(map(repr, stop))}) need a tokenizer")
    text = TextStream(tokenizer, prompt, stop)

    def ends(ids: list[int]) -> bool:
        text.push(ids)
        return text.stopped

    return ends


def check_prompts(prompts: list[list[int]], max_new_tokens: int, vocab_size: int) -> None:
    """ValueError if there is nothing to do, what is no list of token ids, or a token that the model
    does not know."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(
            "prompts must be a list of prompts, each a list of token ids as tokenizer.encode(text) "
            f"or tensor.tolist() gives, and not a {type(prompts).__name__}"
        )
    if not prompts:
        raise ValueError("there is no prompt")
    for prompt in prompts:
        check_kind(prompt)
    if not all(prompts):
        raise ValueError("a prompt is empty: it has no token to start from")
    checked_number("max_new_tokens", max_new_tokens, SETTINGS["max_new_tokens"])
    for token in (min(map(min, prompts)), max(map(max, prompts))):
        if not 0 <= token < vocab_size:
            raise ValueError(f"a prompt has token {token}, outside the vocabulary of {vocab_size}")


def check_kind(prompt: list[int]) -> None:
    """ValueError unless this is a list of token ids."""
    kind = type(prompt)
    if isinstance(prompt, list):
        kinds = set(map(type, prompt))
        others = [other for other in kinds if other is bool or not issubclass(other, Integral)]
        if not others:
            return
        kind = others[0]
    raise ValueError(
        "a prompt must be a list of token ids, as tokenizer.encode(text) or tensor.tolist() gives; "
        f"this has a {kind.__name__}"
    )


def check_held(cache: KVCache, rows: int, cached: int) -> None:
    """ValueError unless each of the first rows has that many tokens."""
    held = min(cache.held[:rows])
    if cached > held:
        raise ValueError(
            f"{cached} tokens cannot be cached already: the cache has {held} in one of the rows"
        )


def check_room(longest: int, room: int) -> None:
    if longest >= room:
        raise ValueError(
            f"a prompt of {longest} tokens leaves no room for a new one in the context of {room}"
        )


def fit_cache(model: Transformer, rows: int, needed: int, cached: int) -> None:
    """Make a cache where there is none, or a larger one of the same kind where the model's has
    not the rows, or was made by this function and has not the length."""
    cache = model.cache
    if cache is not None:
        too_short = cache.may_grow and needed > cache.max_seq_len
        if rows <= cache.max_batch_size and not too_short:
            return
    if cached:
        raise ValueError(
            f"there is no cache with {cached} tokens cached that has room for {rows} prompts and "
            f"{needed} tokens"
        )
    if cache is None:
        model.setup_caches(rows, needed).may_grow = True
        return
    rows = max(rows, cache.max_batch_size)
    length = cache.max_seq_len
    if cache.may_grow:
        length = max(length, needed)
    dtype = cache.dtype
    attention = cache.attention
    rings = cache.windows == model.config.windows
    may_grow = cache.may_grow
    del cache  # the old one goes before the new one comes
    model.setup_caches(rows, length, dtype, attention, rings).may_grow = may_grow


# --- the command line ---

QUESTION = "What is the capital of France?"  # the prompt where none is given


def main(argv: list[str] | None = None) -> None:
    """The program. It leaves by exit code 2 and one sentence where it cannot do what is asked."""
    try:
        do(argv)
    except torch.OutOfMemoryError as e:
        fail(first_line(e))
    except (ValueError, StepFailed) as e:
        fail(str(e))
    except KeyboardInterrupt:
        say("")
        sys.exit(130)
    except BrokenPipeError:  # whoever read stdout has left, as head does
        discard_output()
        sys.exit(141)  # as a process that the signal ends
    except OSError as e:
        discard_output()
        fail(f"cannot read or write {e.filename or 'the output'}: {e.strerror or first_line(e)}")
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        fail(
            "there is not enough memory; lower --max_seq_len or --batch_size, or take a smaller "
            "model or --quantize"
        )


def do(argv: list[str] | None) -> None:
    mute_all_but_the_first()
    try:
        args = parse_args(argv)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        if args.save is not None:
            save(args)
            return
        with Team(args.tp, args.device.type) as team:
            run(args, team)
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where it is known what to say if that fails


def discard_output() -> None:
    """What stdout still holds goes nowhere, so that Python does not try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_out_of_memory(e: Exception) -> bool:
    """Whether it is Python's memory that is used up, or that of PyTorch on a CPU."""
    return isinstance(e, MemoryError) or "DefaultCPUAllocator" in str(e)


def fail(message: str) -> None:
    say(f"generate.py: error: {cut(message)}")
    sys.exit(2)


def run(args: Any, team: Team) -> None:
    """Read what is asked, load, prepare, and do what the flags ask for."""
    asked = team.agree(read_asked(args) if team.is_first else None)
    output = nullcontext()
    if args.output is not None and team.is_first:
        output = Records(args.output)
    with output as records:
        stats = Stats()
        tokenizer, model = load_both(args, stats, team.ranks)
        jobs = wanted(args, asked, tokenizer, model.config)
        engine = make_engine(args, model, tokenizer, jobs, team)
        if args.interactive:
            converse(engine, tokenizer, asked.system, args)
        elif args.profile:
            profile_engine(engine, [job.prompt for job in jobs if job.prompt], args, stats)
            summarize(stats, memory_of(engine))
        elif args.prompts is not None:
            answer_prompts(engine, tokenizer, jobs, records, args, stats, team)
        else:
            answer_prompt(engine, tokenizer, jobs, args, stats)


def read_asked(args: Any) -> Asked:
    """What the flags ask about. ValueError: a file of theirs cannot be read, or be written."""
    if args.profile is not None:
        check_writable(args.profile)
    if args.draft_checkpoint_path is not None:
        resolve(args.draft_checkpoint_path)
    lines = []
    if args.prompts is not None:
        lines = read_lines(args.prompts)
    text = None
    if args.prompt is not None and not args.prompt.isdecimal():
        text = read_text(args.prompt)
    system = None
    if args.system is not None:
        system = read_system(args.system)
    return Asked(lines, text, system)


def load_both(
    args: Any, stats: Stats, ranks: Ranks
) -> tuple[Tokenizer | None, Transformer]:
    """The tokenizer, None where no text is made, and the model."""
    path = default_model() if args.checkpoint_path is None else args.checkpoint_path
    tokenizer = None
    if not args.benchmark and not str(path).endswith(".json"):
        tokenizer = load_tokenizer(path)
    began = time.perf_counter()
    model = load(args, path, ranks)
    stats.load_s = time.perf_counter() - began
    check_fit(model, tokenizer, args.max_seq_len)
    return tokenizer, model


def load(args: Any, path: str | Path, ranks: Ranks = ALONE) -> Transformer:
    """The model; args.dtype becomes the one that it has."""
    model = load_model(
        path, device=args.device, dtype=DTYPES.get(args.dtype),
        quantize=None if args.quantize == "none" else args.quantize,
        group_size=args.group_size or 32, ranks=ranks,
    )
    args.dtype = str(model.dtype).removeprefix("torch.")
    return model


def load_draft(args: Any, tokenizer: Tokenizer | None, ranks: Ranks) -> Transformer:
    """The draft model. ValueError if its tokens have other meanings than the model's."""
    path = args.draft_checkpoint_path
    if tokenizer is not None:
        theirs = load_tokenizer(path)
        probe = "The quick brown fox: {x: 1.5e-3, 'Ünïcödé'}\n\t\t日本"
        if theirs.encode(probe) != tokenizer.encode(probe) or theirs.special != tokenizer.special:
            raise ValueError(
                f"the draft {path} has another tokenizer than the model: its proposals would be "
                "tokens of other words; give one of the same family"
            )
    return load_model(
        path, device=args.device, dtype=DTYPES[args.dtype], quantize=args.draft_quantize or "auto",
        ranks=ranks,
    )


def check_fit(model: Transformer, tokenizer: Tokenizer | None, max_seq_len: int | None) -> None:
    config = model.config
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model only "
            f"{config.vocab_size}"
        )
    if tokenizer is not None and max(tokenizer.eos_ids, default=0) >= config.vocab_size:
        raise ValueError(
            f"eos_token_id {max(tokenizer.eos_ids)} is none of the model's {config.vocab_size} "
            "tokens"
        )
    if max_seq_len is not None and max_seq_len > config.max_seq_len:
        raise ValueError(
            f"--max_seq_len {max_seq_len} exceeds the model's context of {config.max_seq_len} "
            "tokens"
        )


def wanted(
    args: Any, asked: Asked, tokenizer: Tokenizer | None, config: ModelConfig
) -> list[Job]:
    """The answers that the flags ask for."""
    if args.interactive and tokenizer is not None:
        return []
    defaults = {name: getattr(args, name) for name in (*SETTINGS, "stop")}
    room = args.max_seq_len or config.max_seq_len
    n_samples = args.num_samples
    if args.benchmark or args.profile:  # a measurement is of full rows
        n_samples *= args.batch_size

    if args.prompt and args.prompt.isdecimal():
        prompt = random_prompt(args, room, config)
        if tokenizer is not None and not args.profile:
            say(
                f"--prompt {args.prompt} is {args.prompt} random tokens, as in gpt-fast; for this "
                f"text: printf {args.prompt} | python generate.py --prompt -"
            )
        return samples(0, f"{len(prompt)} random tokens", prompt, defaults, n_samples)

    if tokenizer is None:
        raise ValueError(
            "a bare config.json has no tokenizer: give --prompt a number of random tokens"
        )
    if asked.system is not None:
        check_template(tokenizer, asked.system)

    def encode(entry: dict[str, Any]) -> list[int]:
        if "messages" in entry:
            prompt = tokenizer.chat(entry["messages"])
        elif args.chat:
            message = {"role": "user", "content": entry["prompt"]}
            prompt = tokenizer.chat(with_system(asked.system, [message]))
        else:
            prompt = tokenizer.encode(entry["prompt"])
        check_prompts([prompt], args.max_new_tokens, config.vocab_size)
        check_room(len(prompt), room)
        return prompt

    if args.prompts is not None:
        answering = [args.checkpoint_path, args.dtype, args.quantize, args.kv_dtype]
        return read_jobs(asked.lines, encode, defaults, args.num_samples, json.dumps(answering))
    entry = {"prompt": QUESTION if asked.text is None else asked.text}
    if asked.text is None and tokenizer.chat_template and not args.chat:
        entry = {"messages": [{"role": "user", "content": QUESTION}]}
    return samples(0, title_of(entry), encode(entry), defaults, n_samples)


def random_prompt(args: Any, room: int, config: ModelConfig) -> list[int]:
    """As many random tokens as --prompt says. ValueError: there is no room for them."""
    n_tokens = int(args.prompt)
    check_room(n_tokens, room)
    generator = torch.Generator().manual_seed(args.seed or 0)
    prompt = torch.randint(config.vocab_size, (n_tokens,), generator=generator).tolist()
    check_prompts([prompt], args.max_new_tokens, config.vocab_size)
    return prompt


def make_engine(
    args: Any, model: Transformer, tokenizer: Tokenizer | None, jobs: list[Job], team: Team
) -> Engine:
    """An engine with the rows that the flags say, and room for the longest job."""
    needed = 1
    for job in jobs:
        if job.error is None:
            needed = max(needed, len(job.prompt) + job.settings["max_new_tokens"])
    if args.interactive:
        needed = 8192
    room = args.max_seq_len or min(needed, model.config.max_seq_len)
    kv_dtype = torch.int8 if args.kv_dtype == "int8" else None
    # groups that share a file of prompts are to have rows for a fair share of them at most
    rows = args.batch_size
    if team.n_groups > 1:
        rows = min(rows, math.ceil(len(jobs) / team.n_groups))
    # steps that check proposals write as far behind the last token
    model.setup_caches(rows, room + args.speculate_k, kv_dtype, args.attention)
    draft = None
    if args.draft_checkpoint_path is not None:
        draft = load_draft(args, tokenizer, team.ranks)
    if args.compile:
        for each in filter(None, (model, draft)):
            compile_model(each, args.compile_prefill)
    return Engine(
        model, compiled=args.compile, speculate_k=args.speculate_k, draft=draft, context=room
    )


def options(args: Any, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """generate's keyword arguments."""
    return dict(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p,
        seed=args.seed, eos_ids=tokenizer.eos_ids if tokenizer else (), stop=args.stop,
        tokenizer=tokenizer,
    )


def runner(
    engine: Engine, tokenizer: Tokenizer | None, stats: Stats, team: Team | None = None
) -> Run:
    """What runs jobs for cli/batch.py; with a team, those that no other of its groups runs."""
    eos_ids = frozenset(tokenizer.eos_ids) if tokenizer else frozenset()

    def run_jobs(jobs: list[Job]) -> Iterator[News]:
        requests = []
        for job in jobs:
            settings = dict(job.settings)
            stop = settings.pop("stop")
            ends = stops_at(stop, tokenizer, job.prompt) if stop else None
            requests.append(Request(job.prompt, eos_ids=eos_ids, ends=ends, **settings))
        engine.stats = stats
        draw = None
        if team is not None and team.n_groups > 1:
            draw = team.queue(len(requests))
        for i, tokens in engine.run(requests, draw):
            yield News(i, tokens, engine.finish_reasons.get(i), engine.started[i])

    return run_jobs


def answer_prompt(
    engine: Engine, tokenizer: Tokenizer | None, jobs: list[Job], args: Any, stats: Stats
) -> None:
    """Continue one prompt, once or several times, and say what it took."""
    if args.benchmark:  # one run to warm up and compile; its prefill and steps do not count
        warm = Stats()
        batch = [job.prompt for job in jobs[:args.batch_size]]
        generate(
            engine.model, batch, args.max_new_tokens, stats=warm, engine=engine,
            **options(args, tokenizer),
        )
        stats.compile_s = warm.compile_s
    else:
        watch_prompts(engine)
    answers = answer_live(jobs, runner(engine, tokenizer, stats), tokenizer, quiet=args.json)
    if args.benchmark and stats.speculation.checked:
        middle = len(jobs[0].prompt) + args.max_new_tokens // 2
        stats.speculation.plain_s = plain_steps(engine, min(middle, engine.context - 1), 16)
    elif not args.benchmark:
        say_cuts(answers)
    summary = summarize(stats, memory_of(engine))
    if args.json:
        result = {
            "texts": [answer.text for answer in answers if tokenizer],
            "finish_reasons": [answer.finish_reason for answer in answers],
        }
        print(json.dumps(vars(args) | summary | result, default=str, allow_nan=False))


def answer_prompts(
    engine: Engine, tokenizer: Tokenizer, jobs: list[Job], records: Records | None, args: Any,
    stats: Stats, team: Team,
) -> None:
    """Continue the prompts of a file, and say what it took. ValueError: none could be."""
    run_jobs = runner(engine, tokenizer, stats, team)
    if team.is_first:
        answer_file(
            jobs, run_jobs, tokenizer, as_json=args.json, records=records, team=team
        )
    else:
        help_answer(jobs, run_jobs, tokenizer, team)
    if stats.new_tokens:
        summarize(stats, memory_of(engine))
    if all(job.error is not None for job in jobs):
        raise ValueError(f"none of the {len(jobs)} prompts of {args.prompts} could be answered")


def plain_steps(engine: Engine, position: int, n: int) -> list[float]:
    """The seconds of n steps without proposals of rows that stand at a position."""
    plain = Engine(engine.model, engine.cache, compiled=engine.compiled)
    plain.kind = engine.kind
    plain.input_pos.fill_(position)
    plain.step()  # to compile
    return plain.timed_steps(n)


def converse(engine: Engine, tokenizer: Tokenizer, system: str | None, args: Any) -> None:
    """A conversation in the terminal, its cache kept between turns."""
    watch_prompts(engine)

    text = []  # what the row holds

    def reply(ids: list[int], cached: int, show: Show, attempt: int) -> tuple[list[int], str]:
        settings = options(args, tokenizer)
        if args.seed is not None:
            settings["seed"] = (args.seed + attempt) % 2**63
        text[cached:] = ids
        if not engine.cache.intact(slice(0, 1), cached):
            cached = 0  # a sliding window has passed what the conversation goes back to
        answer, = generate(
            engine.model, [text[cached:]], args.max_new_tokens, cached=cached, stream=show,
            engine=engine, **settings,
        )
        text.extend(answer)
        return answer, engine.finish_reasons[0]

    Chat(tokenizer, reply, engine.context, args.stop, system).run()


def watch_prompts(engine: Engine) -> None:
    """Show how far a long prompt is; on a GPU, which is asked for all layers at once, nothing."""
    if engine.device.type == "cpu":
        model = engine.model
        model.prefill_block = with_bar(model.prefill_block, model.layers)


def profile_engine(engine: Engine, prompts: list[list[int]], args: Any, stats: Stats) -> None:
    """Trace decode steps, after as many to warm up."""
    model = engine.model
    cache = engine.cache
    batch = prompts[:args.batch_size]
    generate(model, batch, 16, stats=stats, engine=engine, **options(args, None))
    parts = {}
    for name, module in model.layers[0].named_modules():
        if name.endswith("_proj"):
            parts[name] = tensor_bytes(module)
    live = sum(map(cache.bytes_read, engine.input_pos.tolist()))
    parts["attention"] = live / len(model.layers)
    profile(
        engine.timed_steps, len(model.layers), parts, tensor_bytes(model.lm_head), args.profile,
        args.device,
    )


def memory_of(engine: Engine) -> Memory:
    cache = engine.cache
    model, *drafts = engine.models()
    rows = cache.max_batch_size
    weight_bytes = model.weight_bytes(rows * (engine.k + 1))
    for draft in drafts:  # a step asks it k times
        weight_bytes += engine.k * draft.weight_bytes(rows)
    return Memory(
        device=engine.device, weight_bytes=weight_bytes, cache_bytes=cache.nbytes,
        row_bytes=cache.bytes_read,
    )


def save(args: Any) -> None:
    """--save: quantize while loading, and write a folder that loads like any checkpoint."""
    source = resolve(default_model() if args.checkpoint_path is None else args.checkpoint_path)
    try:
        refuse_existing(args.save)
        began = time.perf_counter()
        model = load(args, source)
        save_quantized(model, args.save, partial(save_tokenizer, source))
    except (OSError, SafetensorError) as e:
        raise ValueError(f"cannot write {args.save}: {first_line(e)}") from None
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    n_weights = sum(layer.out_features * layer.in_features for layer in layers)
    before = n_weights * DTYPES[args.dtype].itemsize
    after = sum(x.nbytes for layer in layers for x in layer.stored().values())
    worst = max(layer.error for layer in layers)
    loss = f"largest relative error of a layer {worst:.2%}"
    if args.quantize == "auto":
        loss = "the file's own integers"
    say(
        f"{args.save}: {len(layers)} layers, {before / 1e6:.1f} MB in {args.dtype}, are now "
        f"{after / 1e6:.1f} MB; {loss}; {time.perf_counter() - began:.1f} s"
    )


def become_a_program() -> None:
    """Signals end this process by exceptions, so that whatever is half-written goes; characters
    that the terminal cannot show are no reason to end."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as of a shell's background jobs
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, end_by_signal)
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")


def end_by_signal(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # while what is half-written goes
    sys.exit(128 + number)


if __name__ == "__main__":
    become_a_program()
    main()
