"""Generate text: generate() for programs, the decode step, sampling, and the command line.

    python generate.py --checkpoint_path PATH --prompt "The capital of France is"
"""
from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    if sys.flags.safe_path:  # python -P and -I leave out the folder that a script is in
        sys.path.insert(0, here)
    sys.modules["generate"] = sys.modules["__main__"]  # for folders, which import this module
    if os.path.exists(os.path.join(here, "cli")):
        from cli import begin
        begin()  # before the imports below, which take seconds

import argparse
import hashlib
import json
import random
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import KW_ONLY, dataclass
from functools import wraps
from inspect import signature
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

# How many turns a thread of a CPU spins before it sleeps, which libgomp reads while it loads. Its
# own 300,000 take the cores from threads that are waited for; a few thousand cost nothing.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "4000"

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from model import KVCache, Transformer, extension, load_model, run_block, run_head
from quantize import HARMLESS, MODES

PREFILL_CHUNK = 8192  # most prompt tokens in one pass; bounds the activations' memory
IDS_WANTED = "list of token ids (as tokenizer.encode(text) or tensor.tolist() gives)"
LAG = 2  # steps that the host reads behind a GPU, so that looking at tokens never stalls it

# --- generate ---


@torch.no_grad()
def generate(
    model: Transformer, prompts: list[list[int]], max_new_tokens: int, *,
    temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
    min_p: float | None = None, eos_ids: Iterable[int] = (), seed: int | None = None,
    stop: Sequence[str] = (), tokenizer: Tokenizer | None = None,
    stream: Callable[[int, list[int]], bool | None] | None = None, cached: int = 0,
    compile: bool | None = None, speculate_k: int = 0, draft: Transformer | None = None,
    stats: Any = None, engine: Decoder | None = None, **settings: Any,
) -> list[Tokens]:
    """Continue prompts, lists of token ids of any lengths -> the new tokens of each, as lists.

    A text ends with the first of eos_ids (included), where it has one of the stop strings (of this
    tokenizer), after max_new_tokens, or where the context is full. temperature 0 is greedy. cached:
    tokens of each row that are in the cache already. stream(number, ids) is called as tokens come,
    and ends an answer by returning False. The same seed, the same text: prompt i draws with
    seed + i. So it is in any company on a CPU, for int4 and the integers of GGUF files; elsewhere a
    tie may go the other way where sums are of other numbers of rows. compile: by compiled steps or
    plain ones; None: as the model's are. speculate_k, draft: check that many proposals a step, for
    the same text. stats: a batching.Stats to fill. settings: more of a Request's.

    A cache that was set up before is used, otherwise one is made that fits. With an engine, a
    series of calls shares its captured steps. Threads with one model or cache take turns.
    ValueError says what does not fit."""
    seed = seed if seed is None else RANGES["seed"].check("seed", seed)
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be a list, each a {IDS_WANTED}, not {prompts!r:.60}")
    eos_ids = frozenset(eos_ids) if isinstance(eos_ids, Iterator) else eos_ids
    requests = [Request(
        prompt, max_new_tokens, temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        eos_ids=eos_ids, cached=cached, seed=seed if seed is None else (seed + i) % 2**63,
        ends=ends_at(stop, tokenizer, prompt) if stop else None, **settings,
    ) for i, prompt in enumerate(prompts)]
    if not requests:
        raise ValueError("there is no prompt")
    out = [Tokens() for _ in requests]
    with taking_turns(model):
        if engine is None:
            fit_cache(model, requests, speculate_k, bool(compile))
            engine = decoder_for(model, requests, compile, speculate_k, draft, stats is not None)
        if hasattr(engine, "stats"):
            engine.stats = stats or type(engine.stats)()
        elif stats is not None:
            raise ValueError("statistics are what a batching.Engine keeps, and not a Decoder")
        with taking_turns(engine.cache):  # another model may have it too
            for number, tokens in engine.run(requests):
                out[number].add(tokens)
                if stream and stream(number, tokens) is False:
                    engine.end(number)
                out[number].finish_reason = engine.finish_reasons.get(number)
    return out


class Tokens(list[int]):
    """An answer's tokens, with what was asked for: the model's own log probabilities, before any
    setting changes them, of each token and of the likeliest in its place, likeliest first."""

    finish_reason: str | None = None  # eos, stop, length, context
    logprobs: Sequence[float] = ()
    top_logprobs: Sequence[dict[int, float]] = ()
    prompt_logprobs: Sequence[float | None] = ()  # with echo; None: of the first token
    prompt_top_logprobs: Sequence[dict[int, float] | None] = ()

    def add(self, more: list[int]) -> None:
        self += more
        for name, known in getattr(more, "__dict__", {}).items():  # of a part that has some
            self.__dict__.setdefault(name, []).extend(known)


def decoder_for(
    model: Transformer, requests: list[Request], compile: bool | None, k: int,
    draft: Transformer | None, measured: bool,
) -> Decoder:
    """What decodes in model.cache. batching/'s Engine is for more requests than rows, proposals and
    statistics, and better for prompts that are not read together well or begin alike."""
    if compile and model.decode_block is run_block:
        compile_model(model)
    elif compile is False:
        model.decode_block = model.prefill_block = run_block
        model.decode_head = run_head
    beyond = len(requests) > model.cache.max_batch_size or k > 0 or draft is not None or measured
    beyond = beyond or any(request.logprobs is not None for request in requests)
    batching = extension("batching", required=beyond) if beyond or len(requests) > 1 else None
    if batching is not None and (beyond or batching.reads_better(requests)):
        return batching.Engine(model, compiled=bool(compile), speculate_k=k, draft=draft)
    return Decoder(model, compiled=bool(compile))


LOCKS: WeakKeyDictionary[Transformer | KVCache, threading.RLock] = WeakKeyDictionary()
BUSY: WeakSet[Transformer | KVCache] = WeakSet()


@contextmanager
def taking_turns(what: Transformer | KVCache) -> Iterator[None]:
    """One thread after the other. ValueError where this one is at it already, in a stream."""
    with LOCKS.setdefault(what, threading.RLock()):
        if what in BUSY:
            raise ValueError("generate is at work with this model or cache; wait until it returns")
        BUSY.add(what)
        try:
            yield
        finally:
            BUSY.discard(what)


def fit_cache(model: Transformer, requests: Sequence[Request], k: int, compiled: bool) -> None:
    """Make a cache, or a larger one where the model's has not the rows, or was made here and has
    not the length. k: places behind a text. compiled: by few_sizes."""
    cached = requests[0].cached
    known = model.config.vocab_size, model.config.max_seq_len
    needed = cached + max(len(each.prompt) + each.budget(*known) for each in requests) + k
    n_rows, kind, grows, cache = len(requests), (), True, model.cache
    if cache is not None:
        grows = cache.grows
        if n_rows <= cache.max_batch_size and not (grows and needed > cache.max_seq_len):
            return
        n_rows = max(n_rows, cache.max_batch_size)
        needed = max(cache.max_seq_len, needed if grows else 0)
        kind = cache.dtype, cache.attention, cache.windows is not None
        del cache  # the old one goes before the new one comes
    if cached:
        raise ValueError(f"no cache with {cached} tokens has {n_rows} rows with room for {needed}")
    room = few_sizes(needed) if compiled and grows else needed
    model.setup_caches(n_rows, room, *kind).grows = grows


def few_sizes(n: int) -> int:
    """Room for n tokens or some more. A size is compiled anew, which takes seconds: hence few."""
    return 2 ** (n - 1).bit_length() if n <= 1024 else -(-n // 1024) * 1024


def ends_at(stop: Sequence[str], tokenizer: Any, prompt: list[int]) -> Callable[..., bool]:
    """Request.ends for stop strings. ValueError if they are none, or have no tokenizer."""
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop must be a list of texts, none of them empty, not {stop!r}")
    if not hasattr(tokenizer, "ends"):
        raise ValueError(f"stop strings ({', '.join(stop)}) need a tokenizer that formats/ made")
    return tokenizer.ends(stop, prompt)


class Range(NamedTuple):
    """What a setting may be: a number of that kind from low (above: just over it) to high."""

    kind: type
    low: float
    high: float = float("inf")
    above: bool = False

    def check(self, name: str, value: Any) -> int | float:
        """The value, or ValueError."""
        noun, kinds = ("whole number", Integral) if self.kind is int else ("number", Real)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ValueError(f"{name} must be a {noun}, not {value!r:.60}")
        if not self.low <= value <= self.high or self.above and value == self.low:
            bounds = f"{'above' if self.above else 'at least'} {self.low}"
            bounds += f" and at most {self.high}" if self.high < float("inf") else ""
            raise ValueError(f"{name}: {value} is not {bounds}")
        return int(value) if isinstance(value, Integral) else float(value)


RANGES = {
    "max_new_tokens": Range(int, 1),
    "temperature": Range(float, 0, 1000),
    "top_k": Range(int, 1, 2**31 - 1),
    "top_p": Range(float, 0, 1, above=True),
    "min_p": Range(float, 0, 1),
    "repetition_penalty": Range(float, 0, 100, above=True),
    "presence_penalty": Range(float, -2, 2),
    "frequency_penalty": Range(float, -2, 2),
    "logprobs": Range(int, 0),
    "seed": Range(int, 0, 2**63 - 1),
    "cached": Range(int, 0),
}
EXTRAS = "repetition_penalty presence_penalty frequency_penalty processors logprobs echo".split()


@dataclass(frozen=True)
class Request:
    """What one row is to do: a prompt, how to draw, and when to stop."""

    prompt: list[int]
    max_new_tokens: int
    temperature: float = 0.0  # 0: greedy
    _: KW_ONLY
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    # of tokens so far, int64 [n], and logits, float32 [V] -> logits; called on the host, in order
    processors: Sequence[Callable[[Tensor, Tensor], Tensor]] = ()
    logprobs: int | None = None  # of so many likeliest tokens, beside each one's own
    echo: bool | None = None  # of the prompt's tokens too
    eos_ids: Collection[int] = ()
    cached: int = 0  # tokens of the row that are in the cache already, in front of the prompt
    seed: int | None = None  # the same, the same text; None: a new one when the request starts
    # called on the host with each new token, in a list of its own; True: it was the last
    ends: Callable[[list[int]], bool] | None = None

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if value is not None or name in ("max_new_tokens", "temperature", "cached"):
                object.__setattr__(self, name, allowed.check(name, value))
        for name, kind in ("prompt", (list, tuple)), ("eos_ids", Collection):
            ids = getattr(self, name)
            kinds = {type(i) for i in ids} if isinstance(ids, kind) else {bool}
            if bool in kinds or not all(issubclass(each, Integral) for each in kinds):
                raise ValueError(f"{name} must be a {IDS_WANTED}, not {ids!r:.60}")
        object.__setattr__(self, "prompt", list(self.prompt))

    def budget(self, vocab_size: int, context: int) -> int:
        """The most new tokens that it can have. ValueError: none, or a token of its prompt is
        unknown."""
        if not self.prompt:
            raise ValueError("a prompt is empty: it has no token to start from")
        for i in (min(self.prompt), max(self.prompt)):
            if not 0 <= i < vocab_size:
                raise ValueError(f"a prompt has token {i}, outside the vocabulary of {vocab_size}")
        n, room = len(self.prompt), context - self.cached
        if n >= room:
            why = f"leaves no room for a new one in the context of {room}"
            raise ValueError(f"a prompt of {n} tokens {why}")
        return min(self.max_new_tokens, room - n)

    def ends_with(self, token: int, n: int, budget: int) -> str | None:
        """Why it ends with its n-th new token, of at most `budget`; None: it goes on."""
        if token in self.eos_ids:
            return "eos"
        if self.ends is not None and self.ends([token]):
            return "stop"
        if n == self.max_new_tokens:
            return "length"
        return "context" if n == budget else None

# --- the decode step ---


class Drawn(NamedTuple):
    """The tokens of a step: one a row, or k + 1 where it checks k proposals."""

    tokens: Tensor  # int64 [B, k + 1], of which those up to the first wrong proposal count
    agreed: Tensor | None = None  # int64 [B]: how many proposals were right, one after the other
    logprobs: Tensor | None = None  # float32 [B, k + 1, 1 + n]: theirs, of the n likeliest
    likeliest: Tensor | None = None  # int64 [B, k + 1, n]


def on_its_device(method: Callable) -> Callable:
    """A method of Decoder with its GPU as the current one. An eager one on a CPU runs in inference
    mode, which takes a tenth off a step."""

    @wraps(method)
    def guarded(decoder: Decoder, *args: Any, **options: Any) -> Any:
        eager = decoder.device.type == "cpu" and not decoder.compiled
        mode = torch.inference_mode() if eager else nullcontext()
        index = decoder.device.index
        with mode, torch.accelerator.device_index(index) if index is not None else nullcontext():
            return method(decoder, *args, **options)

    return guarded


class Decoder:
    """Rows of one cache that decode together, each at its own position with its own request.

    Tokens, positions and sampling settings live on the device, so a step needs nothing from the
    host; a compiled decoder captures it in a CUDA graph, one for each kind of sampling. context:
    most tokens of a row, by default all that the cache and the model have room for."""

    def __init__(
        self, model: Transformer, cache: KVCache | None = None, *, compiled: bool = False,
        context: int | None = None,
    ):
        self.model = model
        self.cache = model.check_cache(1, cache)
        room = self.cache.max_seq_len
        self.context = context or min(room, model.config.max_seq_len)
        if self.context > room:
            raise ValueError(f"a context of {context} does not fit into a cache of {room}")
        self.compiled = compiled
        self.device = model.device
        B = self.cache.max_batch_size
        self.token = torch.zeros(B, 1, dtype=torch.int64, device=self.device)
        self.input_pos = torch.zeros(B, dtype=torch.int32, device=self.device)
        self.active = torch.zeros(B, dtype=torch.int32, device=self.device)  # 1: a step moves it on
        self.sampling = Sampling.of([Request([], 1)] * B, self.device)
        self.kind = "greedy"
        self.extras: Any = None  # processors.Extras, once a request has one of EXTRAS
        self.known: Sequence[Tensor] = ()  # Drawn.logprobs and Drawn.likeliest
        self.running: dict[int, Request] = {}  # by the row; whose next tokens somebody wants
        self.finish_reasons: dict[int, str] = {}  # how the requests of a run ended
        # by step_key: where prepared steps put what they draw, and their graphs
        self.prepared: dict[Any, Drawn] = {}
        self.graphs: dict[Any, torch.cuda.CUDAGraph] = {}
        self.owner: object = None  # the run that drives the rows
        self.lag = LAG if self.device.type == "cuda" else 0
        self.sample = sample
        if compiled and self.device.type == "cuda":  # noise alone is some thirty operators
            self.sample = compiled_whole(sample)

    @on_its_device
    def step(self) -> Drawn:
        """Launch one step of all rows: forward, sample, advance."""
        if self.compiled and self.device.type == "cuda":
            self.prepare()
            if self.step_key in self.graphs:
                self.graphs[self.step_key].replay()
                return self.prepared[self.step_key]
        return self.advance()

    def advance(self) -> Drawn:
        rows = slice(0, self.width())
        input_pos = self.input_pos[rows]
        logits = self.model.decode(self.token[rows], input_pos, self.cache)  # (B, 1, V)
        tokens = (self.extras or self).draw(rows, logits, 1)  # (B, 1)
        self.move(rows, tokens, self.active[rows])
        return Drawn(tokens, None, *self.known)

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

    def move(self, rows: slice, last: Tensor, n: Tensor) -> None:
        """The rows' last tokens are these now, n positions on. n is 0 for rows without a request:
        they stay where they are, and what a step writes there is nobody's."""
        self.token[rows] = last
        self.input_pos[rows].add_(n).clamp_(max=self.cache.max_seq_len - 1)

    def width(self) -> int:
        """How many rows a step works on: a compiled step has one shape."""
        if self.compiled or not self.running:
            return self.cache.max_batch_size
        return max(self.running) + 1

    @property
    def step_key(self) -> Any:
        """What steps differ in: one graph is captured for each."""
        return self.kind, self.extras and self.extras.key

    def prepare(self) -> float:
        """Prepare the step that is next, if it is compiled and was not -> seconds it took."""
        if not self.compiled or self.step_key in self.prepared:
            return 0.0
        return self.try_step()

    @on_its_device
    def try_step(self) -> float:
        """Compile a step by running it, and capture it on CUDA -> seconds it took. Rows keep their
        state: a trial writes into the cache where the next step does."""
        began = time.perf_counter()
        state = self.token, self.input_pos, self.active
        before = [tensor.clone() for tensor in state]
        self.active.zero_()  # so that all trials write at the same place
        by_host = self.extras is not None and self.extras.by_host  # which no graph holds
        if self.device.type == "cuda" and not by_host:
            self.graphs[self.step_key] = self.capture()
        else:
            self.prepared[self.step_key] = self.advance()
        for tensor, value in zip(state, before):
            tensor.copy_(value)
        return time.perf_counter() - began

    def capture(self) -> torch.cuda.CUDAGraph:
        """One step as a CUDA graph, after two on a side stream that compile and allocate."""
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.advance()
            self.advance()
            # on a stream of this device: by default it is of the first one that captured
            with torch.cuda.graph(graph, stream=side):
                self.prepared[self.step_key] = self.advance()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        return graph

    def prefill(self, rows: slice, requests: Sequence[Request], done: int = 0) -> Iterator[bool]:
        """Put the prompts of neighbouring rows into the cache, a chunk before each yield, and draw
        their first tokens. done: tokens of each prompt that are there. Steps of other rows write in
        these too: where the next chunk will."""
        cached = requests[0].cached
        if cached:
            self.cache.refuse_lost(rows, cached)
        cpu = torch.device("cpu")  # whatever the default is
        new = Sampling.of(requests, cpu)
        if any(request.seed is None for request in requests):  # keys are drawn, by each rank others
            new = new._replace(key=new.key.new_tensor(self.model.broadcast(new.key.tolist())))
        prompts = [torch.tensor(each.prompt, dtype=torch.int64, device=cpu) for each in requests]
        tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)  # (n, width)
        lengths = torch.tensor(list(map(len, prompts)), device=cpu)
        lengths, tokens, *new = self.to_device(lengths, tokens, *new)
        for setting, values in zip(self.sampling, new):
            setting[rows] = values
        self.input_pos[rows] = cached + done
        width, ends = tokens.shape[1], None
        while done < width:
            part = tokens[:, done:done + max(1, self.chunk() // len(requests))]  # (n, T)
            last = (lengths - 1 - done).clamp(-1, part.shape[1] - 1)
            logits = self.read_part(part, rows, cached + done, last)  # (n, V)
            # what counts is the chunk in which a prompt ends
            ends = logits if ends is None else torch.where((lengths > done)[:, None], logits, ends)
            done += part.shape[1]
            self.input_pos[rows] = cached + lengths.clamp(max=done).int()
            if done < width:
                yield False
        if ends.dtype == torch.float16 and ends.isnan().any():
            raise ValueError("this model's numbers leave float16: take bfloat16 or float32")
        if self.extras is not None:
            ends = self.extras.begin(rows, requests, ends)
        sampling = self.sampling.rows(rows)
        self.token[rows, 0] = sample(ends, sampling, kind_of(requests), self.input_pos[rows])
        if self.extras is not None:
            self.extras.note(self.token[rows])
        self.active[rows] = 1

    def read_part(self, tokens: Tensor, rows: slice, cached: int, last: Tensor) -> Tensor:
        """Put tokens [n, T] behind the first `cached` ones of rows -> logits [n, V] of the last."""
        pos = torch.full_like(last, cached, dtype=torch.int32)
        where = dict(rows=rows, cached=cached, last=last)
        if self.extras is not None and self.extras.echo:
            x = self.model.prefill(tokens, pos, self.cache, hidden=True, **where)  # (n, T, dim)
            return self.extras.note_prompts(tokens, x, last)
        return self.model.prefill(tokens, pos, self.cache, **where)[:, 0]

    @on_its_device
    def read_on(self, prefill: Iterator[bool]) -> bool:
        """Put the next chunk of prompts into the cache -> whether it was the last."""
        return next(prefill, True)

    def chunk(self) -> int:
        return PREFILL_CHUNK

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, list[int]]]:
        """Requests, each in the row of its number -> (that number, new tokens of it), as they come;
        finish_reasons has then how each ended. ValueError if one has no room for a token, or its
        cached ones are lost; RuntimeError if another run has begun meanwhile."""
        requests = list(requests)
        budgets = [self.budget(request) for request in requests]
        self.model.check_cache(len(requests), self.cache)  # a row for each
        if len({request.cached for request in requests}) > 1:
            raise ValueError("a Decoder's requests have the same number of tokens cached")
        me = self.start(requests)
        self.prepare()
        prefill = self.prefill(slice(0, len(requests)), requests)
        while not self.read_on(prefill):
            pass
        self.running = dict(enumerate(requests))
        pending = deque([self.to_host(self.token)])
        n_launched = 1
        while self.running:
            longest = max(budgets[row] for row in self.running)
            if len(pending) <= self.lag and n_launched < longest:
                pending.append(self.to_host(self.step().tokens))
                n_launched += 1
                continue
            tokens = pending.popleft()()
            n = n_launched - len(pending)  # of each request's tokens this is the n-th
            for row, request in list(self.running.items()):
                self.cache.cached[row] = request.cached + len(request.prompt) + n - 1
                reason = request.ends_with(tokens[row], n, budgets[row])
                if reason is not None:
                    self.end(row, reason)
                yield row, [tokens[row]]
                if self.owner is not me:
                    raise RuntimeError("another run of this decoder has begun")

    def end(self, number: int, reason: str = "stop") -> None:
        """A request of this run goes no further, as its caller may want."""
        if self.running.pop(number, None) is not None:
            self.finish_reasons[number] = reason
            self.active[number] = 0

    def budget(self, request: Request) -> int:
        return request.budget(self.model.config.vocab_size, self.context)

    def start(self, requests: Sequence[Request]) -> object:
        """Give up what the rows did, for these requests -> whose run that is now."""
        cached = self.cache.cached
        if len(requests) > len(cached):  # a request's row may be any
            cached = [min(cached)] * len(requests)
        for request, there in zip(requests, cached):
            if request.cached > there:
                raise ValueError(f"{request.cached} tokens are not cached: one row has {there}")
        self.running.clear()
        self.finish_reasons.clear()
        self.active.zero_()
        # what is cached is not written over by rows without a request, nor by a trial
        self.input_pos.clamp_(min=max((request.cached for request in requests), default=0))
        self.kind = kind_of(requests)  # for all that will come: a compiled step is prepared before
        wanted = any(getattr(each, name) not in (None, ()) for each in requests for name in EXTRAS)
        if wanted or self.extras is not None:
            self.extras = self.extras or extension("processors").Extras(self)
            self.extras.start(requests)
        self.owner = object()
        return self.owner

    def to_device(self, *tensors: Tensor) -> list[Tensor]:
        """Tensors of 4-byte numbers behind those of 8, in one copy that a GPU's host outruns."""
        flat = torch.cat([x.flatten().view(torch.int32) for x in tensors])
        flat = flat.pin_memory() if self.device.type == "cuda" else flat
        parts = flat.to(self.device, non_blocking=True).split([x.nbytes // 4 for x in tensors])
        return [part.view(x.dtype).view_as(x) for part, x in zip(parts, tensors)]

    @on_its_device
    def to_host(self, tensor: Tensor) -> Callable[[], list[int]]:
        """Send tokens [B, 1] on their way -> what waits for them."""
        if self.device.type != "cuda":
            tokens = tensor[:, 0].tolist()
            return lambda: tokens
        copy = tensor.to("cpu", non_blocking=True)  # into pinned memory
        event = torch.cuda.Event()
        event.record()
        return lambda: event.synchronize() or copy[:, 0].tolist()  # it returns None


def compile_model(model: Transformer, prefill: bool = False) -> None:
    """Compile one block for decoding, which all layers share, so that compile time does not grow
    with depth; on CUDA also the output head. prefill: also the block over prompts of any length.
    Hooks are compiled in: after adding one, call this again, and make decoders anew."""
    options = {}
    if model.device.type == "cuda":
        # the last two make q, k and v of their product in one launch and not up to three
        wanted = "coordinate_descent_tuning", "combo_kernels", "combo_kernels_pointwise_only"
        options = dict.fromkeys(wanted, True) | model.compile_options
        model.decode_head = compiled_whole(run_head, options=options)
    else:
        torch._dynamo.config.capture_scalar_outputs = True  # lengths as symbols
    model.decode_block = compiled_whole(run_block, options=options)
    if prefill:
        model.prefill_block = compiled_whole(run_block, dynamic=True, options=options)


def compiled_whole(function: Callable, **settings: Any) -> Callable:
    """In one graph, but for every window and every shape of cache that it meets, of any model:
    hence a limit and a cache of its own, as before torch 2.13 each code object has one."""
    settings = dict(dynamic=False, fullgraph=True) | settings
    if "isolate_recompiles" in signature(torch.compile).parameters:
        return torch.compile(function, isolate_recompiles=True, recompile_limit=64, **settings)
    torch._dynamo.config.recompile_limit = 64
    alone = type(function)(function.__code__.replace(), function.__globals__)
    return torch.compile(alone, **settings)

# --- sampling ---


class Filter(NamedTuple):
    """Which tokens may be drawn: a function of probabilities [N, n], likeliest first in each row,
    and the rows' setting [N, 1], that gives them with zeros for what is dropped."""

    keep: Callable[[Tensor, Tensor], Tensor]
    off: float  # the setting with which nothing is dropped


def keep_top_k(probs: Tensor, k: Tensor) -> Tensor:
    """The k likeliest."""
    return probs.masked_fill(torch.arange(probs.shape[1], device=probs.device) >= k, 0)


def keep_top_p(probs: Tensor, p: Tensor) -> Tensor:
    """The fewest tokens that reach p of what is left, to a millionth: sums are no more exact."""
    likelier = probs.cumsum(-1) - probs  # the mass of likelier tokens
    enough = p * (1 - 1e-6) * probs.sum(-1, keepdim=True)
    return probs.masked_fill((likelier >= enough) & (p < 1), 0)


def keep_min_p(probs: Tensor, p: Tensor) -> Tensor:
    """Those at least p times as likely as the likeliest."""
    return probs.masked_fill(probs < p * probs[:, :1], 0)


def filter_probs(probs: Tensor, sampling: Sampling, n: int) -> tuple[Tensor, Tensor]:
    """The n likeliest of probabilities [N, V], likeliest first, with zeros for what a row's FILTERS
    drop; and their token ids: [N, n] each."""
    probs, ids = probs.topk(n) if n < probs.shape[1] else probs.sort(descending=True)
    for setting, each in zip(sampling.filters.unbind(1), FILTERS.values(), strict=True):
        probs = each.keep(probs, setting[:, None])
    return probs, ids


FILTER_PROBS = filter_probs  # another one in its place is called by all kinds of steps
# One after the other. The setting is a Request's of the same name, None: off. A filter whose name
# is no setting is on for every row that samples, and is given `off`.
FILTERS = {
    "top_k": Filter(keep_top_k, float("inf")),
    "top_p": Filter(keep_top_p, 1.0),
    "min_p": Filter(keep_min_p, 0.0),
}
LEAST_TEMPERATURE = 1e-5  # what is below is greedy: logits over it would leave float32
CANDIDATES = 256  # tokens that are left for sampling when every row has a top_k up to that


class Sampling(NamedTuple):
    """How rows draw their tokens: tensors [B], so that one captured step serves any settings."""

    temperature: Tensor  # float32; 0: greedy
    filters: Tensor  # float32 [B, number of FILTERS]: their settings
    key: Tensor  # int32 [B, 2], made from the seed: which random numbers are the request's

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> Sampling:
        filters = [settings_of(request, FILTERS) for request in requests]
        return cls(
            torch.tensor([r.temperature for r in requests], dtype=torch.float32, device=device),
            torch.tensor(filters, dtype=torch.float32, device=device),
            torch.tensor([key_of(r.seed) for r in requests], dtype=torch.int32, device=device),
        )

    def rows(self, rows: slice) -> Sampling:
        return Sampling(*(setting[rows] for setting in self))


def settings_of(request: Request, table: dict[str, Any]) -> list[float]:
    """What a request sets of a table as FILTERS; what changes nothing where it sets none."""
    given = [getattr(request, name, None) for name in table]
    return [each.off if value is None else value for each, value in zip(table.values(), given)]


def key_of(seed: int | None) -> tuple[int, int]:
    """Two int32 numbers from a seed, None: a new one, so that neighbouring seeds share nothing."""
    seed = random.getrandbits(64) if seed is None else seed
    return struct.unpack("<ii", hashlib.blake2b(str(seed).encode(), digest_size=8).digest())


def kind_of(requests: Iterable[Request]) -> str:
    """The cheapest kind of step that draws for all of these rows: "greedy" where none samples,
    "plain" from all tokens, "top_k" from CANDIDATES, "filtered" from the sorted vocabulary."""
    if filter_probs is not FILTER_PROBS:
        return "filtered"  # for greedy rows too: it may drop the likeliest token
    sampled = [request for request in requests if request.temperature > 0]
    if not sampled:
        return "greedy"
    if all(request.top_k is not None and request.top_k <= CANDIDATES for request in sampled):
        return "top_k"
    given = [getattr(request, name, "on") for request in sampled for name in FILTERS]
    return "plain" if given.count(None) == len(given) else "filtered"


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
    else:
        probs, ids = filter_probs(probs, sampling, min(CANDIDATES, V) if kind == "top_k" else V)
    best = (probs / noise(sampling.key, position, ids)).argmax(-1, keepdim=True)  # (N, 1)
    drawn = ids.expand(N, -1).gather(-1, best)[:, 0]
    if filter_probs is not FILTER_PROBS:
        likeliest = ids.gather(-1, probs.argmax(-1, keepdim=True))[:, 0]
    return torch.where(greedy, likeliest, drawn)


def noise(key: Tensor, position: Tensor, ids: Tensor) -> Tensor:
    """Exponential noise [N, n] for tokens ids [N, n] at positions [N], from keys [N, 2].

    Each is a hash of its key, position and token alone (counter-based random numbers: Salmon et
    al., Random123, SC 2011), so that a request draws the same in any row, batch or order of steps.
    Each half of the key has a round of its own: with one, keys that differ in a few bits would give
    the same numbers to such tokens."""
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

# --- text ---


@dataclass
class Tokenizer:
    """Text <-> token ids, by a tokenizer.model. formats/ has those of other files, and chat."""

    backend: Any
    vocab_size: int
    special: dict[str, int]  # the control tokens
    bos_id: int | None  # put before a text by encode(bos=True), None where the model takes none
    eos_ids: set[int]
    chat_template: str | None = None

    @classmethod
    def from_model(cls, file: Path) -> Tokenizer:
        backend = SentencePieceProcessor(model_file=str(file))
        size = backend.get_piece_size()
        special = {backend.id_to_piece(i): i for i in range(size) if backend.is_control(i)}
        bos_id = backend.bos_id() if backend.bos_id() >= 0 else None
        return cls(backend, size, special, bos_id, set())

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The ids of a text. Special tokens written in it are plain text."""
        ids = self.backend.encode(text)
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, control tokens left out, and those of a model that has more tokens than
        its tokenizer."""
        control = set(self.special.values())
        return self.backend.decode([i for i in ids if i not in control and i < self.vocab_size])

    def check_fit(self, known: int) -> None:
        """ValueError if a text may have tokens beyond the `known` ones of a model. Control tokens
        are none of those, such as [PAD] or one for images: no text gives them."""
        n = self.vocab_size - sum(i >= known for i in set(self.special.values()))
        if n > known:
            raise ValueError(f"the tokenizer has {n} tokens but the model only {known}")


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint, None: the default model's. formats/ reads all kinds of files,
    and its tokenizers have chat(messages) -> ids. ValueError says what is wrong."""
    folder = Path(path or "")
    file = folder / "tokenizer.model"
    formats = extension("formats", required=path is None or not os.path.exists(file))
    if formats is not None:
        return formats.load_tokenizer(path)
    tokenizer = Tokenizer.from_model(file)
    for settings in folder.glob("*config.json"):
        ends = json.loads(settings.read_text(encoding="utf-8")).get("eos_token_id")
        tokenizer.eos_ids |= set(ends if isinstance(ends, list) else [ends]) - {None}
    return tokenizer


class Printer:
    """Prints the text of tokens as they come behind a prompt, whole characters only."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]):
        self.tokenizer = tokenizer
        self.times: list[float] = []  # when they came
        self.ids = prompt[-8:]  # so that a leading space is right
        self.shown = tokenizer.decode(self.ids)

    def __call__(self, number: int, ids: list[int], final: bool = False) -> None:
        self.times.append(time.perf_counter())
        self.ids = self.ids + ids
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\ufffd") and not final:
            return
        print(text[len(self.shown):], end="", flush=True)
        self.shown, tail = text, self.ids[-8:]
        end = self.tokenizer.decode(tail)
        if not end.startswith("\ufffd"):
            self.ids, self.shown = tail, end

# --- the command line ---

QUESTION = "Name the capital of France."  # the prompt where none is given
NO_TEXT = "the model ended at once; --chat puts a prompt into its template, as it may expect"


def main(argv: list[str] | None = None) -> None:
    """The program. It leaves by exit code 2 and one sentence where it cannot do what is asked."""
    cli = extension("cli", required=False)
    if cli is not None:
        return cli.main(argv)
    parser = argparse.ArgumentParser("generate.py", description="Generate text.")
    add_flags(parser.add_argument)
    try:
        run(parser.parse_args(argv))
    except ValueError as e:
        parser.exit(2, f"generate.py: error: {e}\n".translate(HARMLESS))


def add_flags(add: Callable[..., Any], number: Callable[[str], Any] | None = None) -> None:
    """The flags of a run; cli/ has more. add: argparse's add_argument. number: what makes a setting
    of RANGES of a flag's text."""
    number = number or (lambda name: RANGES[name].kind)
    add("--checkpoint_path", metavar="PATH",
        help="Hugging Face folder or hub id, .gguf file, folder that --save wrote, or a bare "
        "config.json for random weights; default: SmolLM2-135M-Instruct, fetched once")
    add("--prompt", metavar="TEXT",
        help="text, @FILE, - for stdin, or a number of random tokens, as in gpt-fast; @@ begins a "
        "text with @; default: a question")
    add("--max_new_tokens", metavar="N", type=number("max_new_tokens"), default=200,
        help="most new tokens, from 1; default: 200")
    add("--temperature", metavar="T", type=number("temperature"), default=0.0,
        help="0 to 1000, 0 is greedy; default: 0")
    add("--top_k", metavar="K", type=number("top_k"),
        help="sample from the K likeliest tokens, from 1; default: all")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, ...; default: cuda where there is one, here %(default)s")
    add("--quantize", choices=["auto", "none", *MODES],
        help="auto: weights as the file has them, those of a quantized GGUF as integers; none: "
        "dequantized; int8, int4: quantized while loading; default: auto")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="compile the decode step; default: on CUDA. On a CPU that takes some 15 "
        "seconds; later runs find what it made for one row, and decode with it")


def run(args: argparse.Namespace, ready: Callable[[Decoder], None] = lambda _: None) -> Decoder:
    """Answer one prompt. ready: called before it begins."""
    began = time.perf_counter()
    tokenizer = load_tokenizer(args.checkpoint_path)
    model = load_model(args.checkpoint_path, device=args.device, quantize=args.quantize or "auto")
    tokenizer.check_fit(model.config.vocab_size)
    loaded = time.perf_counter()
    if args.prompt is None and tokenizer.chat_template:
        ids = tokenizer.chat([{"role": "user", "content": QUESTION}])
    else:
        ids = tokenizer.encode(QUESTION if args.prompt is None else args.prompt)
    compiled = prepare_steps(model, args.compile)
    fit_cache(model, [Request(ids, args.max_new_tokens)], 0, compiled)
    decoder = Decoder(model, compiled=compiled)
    ready(decoder)
    compile_s = decoder.prepare()
    printer = getattr(tokenizer, "printer", Printer)(tokenizer, ids)
    asked = time.perf_counter()
    generate(
        model, [ids], args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
        eos_ids=tokenizer.eos_ids, stream=printer, engine=decoder,
    )
    printer(0, [], final=True)
    print(flush=True)
    n, first_s = len(printer.times) - 1, printer.times[0] - asked
    step_ms = 1e3 * (printer.times[-1] - printer.times[0]) / max(1, n - 1)
    also = f", compiled in {compile_s:.1f} s" if compile_s else ""
    say(
        f"loaded in {loaded - began:.1f} s{also}; {len(ids)} prompt tokens, first token after "
        f"{first_s:.2f} s; {n} new tokens, {step_ms:.2f} ms a token"
    )
    if args.prompt and n == 1 and decoder.finish_reasons[0] == "eos" and tokenizer.chat_template:
        say(NO_TEXT)
    return decoder


def prepare_steps(
    model: Transformer, wanted: bool | None, n_rows: int = 1, prefill: bool = False
) -> bool:
    """Compile a model as --compile wants, None: on CUDA -> whether it is. On a CPU, steps of one
    row come from libraries that are kept for later runs, which take them unless wanted is False."""
    compiled = model.device.type == "cuda" if wanted is None else wanted
    if compiled:
        compile_model(model, prefill)
    if model.device.type == "cpu" and (compiled or wanted is None and n_rows == 1):
        ahead = extension("cpu.ahead", required=False)
        if ahead is not None:
            model.decode_block = ahead.AheadOfTime(model.decode_block, build=compiled)
    return compiled


def say(text: str, end: str = "\n") -> None:
    """Print on stderr: stdout is for what the model says. Nobody has to listen."""
    with suppress(OSError):
        print(text.translate(HARMLESS), end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
