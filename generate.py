"""Generate text: generate() for programs, the decode step, sampling, and the command line.

    python generate.py --checkpoint_path PATH --prompt "The capital of France is"
"""
from __future__ import annotations

import importlib
import os
import sys

if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    if sys.flags.safe_path:  # python -P and -I leave out the folder that a script is in
        sys.path.insert(0, here)
    sys.modules["generate"] = sys.modules["__main__"]  # for folders, which import this module
    if os.path.exists(os.path.join(here, "cli", "__init__.py")):
        importlib.import_module("cli").begin()  # before the imports below, which take seconds

import argparse
import hashlib
import json
import random
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import KW_ONLY, dataclass
from functools import wraps
from inspect import signature
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

# How often an idle OpenMP thread spins before it sleeps, which libgomp reads while it loads. Its
# own 300,000 take cores from the threads that have work; 2,000 cost a step nothing.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from model import KVCache, Transformer, extension, load_model, run_block, run_head
from quantize import HARMLESS, MODES

PREFILL_CHUNK = 8192  # most prompt tokens in one pass; bounds the activations' memory
IDS_WANTED = "list of token ids (as tokenizer.encode(text) or tensor.tolist() gives)"
LAG = 2  # how many steps after a GPU the host reads its tokens, so that reading never stalls it

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

    An answer ends with the first of eos_ids (included), with a stop string (which the tokenizer
    finds), after max_new_tokens, or where the context is full. temperature 0 is greedy. cached:
    tokens that each row of the cache has before its prompt. stream(number, ids) is called as tokens
    come, and ends an answer by returning False. Equal seeds give equal answers, and prompt i draws
    with seed + i: on a CPU, with int4 or GGUF integers, in any company; elsewhere sums over other
    numbers of rows round differently, which may decide a tie. compile: True compiles the model,
    False undoes that. speculate_k, draft: how many proposals a step checks, and of which model, for
    the same answer. stats: a batching.Stats to fill. settings: further fields of Request.

    A cache that was set up before is used, otherwise one is made that fits. An engine lets a series
    of calls share captured steps; compile, speculate_k and draft are then its own. Threads with one
    model or cache take turns. ValueError says what does not fit."""
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
    with turn_at(model):
        engine = engine or decoder_for(model, requests, compile, speculate_k, draft, stats)
        if engine.model is not model:
            raise ValueError("the engine is one of another model")
        if hasattr(engine, "stats"):
            engine.stats = stats or type(engine.stats)()
        elif stats is not None:
            raise ValueError("statistics are what a batching.Engine keeps, and not a Decoder")
        with turn_at(engine.cache):  # another model may have it too
            for number, tokens in engine.run(requests):
                out[number].add(tokens)
                if stream and stream(number, tokens) is False:
                    engine.end(number)
                out[number].finish_reason = engine.finish_reasons.get(number)
    return out


class Tokens(list[int]):
    """An answer's tokens, why it ended, and if asked for the log probabilities that the model gave,
    before any setting changed them, to each token and to the likeliest ones at its place."""

    finish_reason: str | None = None  # eos, stop, length, context
    logprobs: Sequence[float] = ()
    top_logprobs: Sequence[dict[int, float]] = ()  # likeliest first
    prompt_logprobs: Sequence[float | None] = ()  # with echo; the first token's is None
    prompt_top_logprobs: Sequence[dict[int, float] | None] = ()

    def add(self, more: list[int]) -> None:
        self += more
        for name, values in getattr(more, "__dict__", {}).items():  # log probabilities
            self.__dict__.setdefault(name, []).extend(values)


def decoder_for(
    model: Transformer, requests: list[Request], compile: bool | None, k: int,
    draft: Transformer | None, stats: Any,
) -> Decoder:
    """Compile a model if wanted, give it a cache that fits -> what decodes with it. Engine, in
    batching/, is for proposals, statistics and log probabilities, and better for prompts that are
    not read together well or begin alike."""
    if compile and model.decode_block is run_block:
        compile_model(model)
    elif compile is False:
        model.decode_block = model.prefill_block = run_block
        model.decode_head = run_head
    model.compiled = model.compiled if compile is None else compile
    fit_cache(model, requests, Range(int, 0).check("speculate_k", k))
    known = any(request.logprobs is not None for request in requests)
    needed = k > 0 or draft is not None or stats is not None or known
    batching = extension("batching", required=needed) if needed or len(requests) > 1 else None
    if batching is not None and (needed or batching.reads_better(requests)):
        return batching.Engine(model, compiled=model.compiled, speculate_k=k, draft=draft)
    return Decoder(model, compiled=model.compiled)


LOCKS: WeakKeyDictionary[Transformer | KVCache, threading.RLock] = WeakKeyDictionary()


def turn_at(shared: Transformer | KVCache) -> threading.RLock:
    """What a thread holds while it generates with a model or cache; others wait. ValueError where
    it holds it already: a stream has called generate."""
    lock = LOCKS.setdefault(shared, threading.RLock())
    if lock._is_owned():
        raise ValueError("generate is at work with this model or cache; wait until it returns")
    return lock


def fit_cache(model: Transformer, requests: Sequence[Request], k: int) -> None:
    """Give a model a cache with room for all requests. One that has too few rows is replaced, and
    one that was made here also where it is too short. k: further places, for proposals."""
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
        raise ValueError(
            f"behind {cached} cached tokens these prompts need a cache of {n_rows} x {needed} "
            "tokens: call setup_caches before the first"
        )
    room = few_sizes(needed) if model.compiled and grows else needed
    model.setup_caches(n_rows, room, *kind).grows = grows


def few_sizes(n: int) -> int:
    """n or some more: every size that comes is compiled for, which takes seconds; so few come."""
    return 2 ** (n - 1).bit_length() if n <= 1024 else -(-n // 1024) * 1024


def ends_at(stop: Sequence[str], tokenizer: Any, prompt: list[int]) -> Callable[..., bool]:
    """Request.ends for stop strings. ValueError if they are none, or have no tokenizer."""
    listed = isinstance(stop, (list, tuple))
    if not listed or not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop must be a list of texts, none of them empty, not {stop!r}")
    if not hasattr(tokenizer, "ends"):
        raise ValueError(f"stop strings ({', '.join(stop)}) need a tokenizer that formats/ made")
    return tokenizer.ends(stop, prompt)


class Range(NamedTuple):
    """The numbers that a setting may be: of a kind, from low to high; above: low itself is none."""

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
    # f(tokens so far [n] int64, logits [V] float32) -> logits; called on the host, in this order
    processors: Sequence[Callable[[Tensor, Tensor], Tensor]] = ()
    logprobs: int | None = None  # for so many of the likeliest tokens, beside the drawn one
    echo: bool | None = None  # log probabilities of the prompt's tokens too
    eos_ids: Collection[int] = ()
    cached: int = 0  # tokens of the row that are in the cache already, in front of the prompt
    seed: int | None = None  # equal seeds, equal answers; None: a new one when the prompt is read
    # f([token]) is called on the host for each new token; True: it was the last
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
        """How many new tokens fit. ValueError: none, or the prompt is empty or has an unknown
        token."""
        if not self.prompt:
            raise ValueError("a prompt is empty: it has no token to start from")
        for i in (min(self.prompt), max(self.prompt)):
            if not 0 <= i < vocab_size:
                raise ValueError(f"a prompt has token {i}, outside the vocabulary of {vocab_size}")
        n, room = len(self.prompt), max(0, context - self.cached)
        if n >= room:
            room = f"{room} places that are left" if self.cached else f"context of {room}"
            raise ValueError(f"a prompt of {n} tokens leaves no room for a new one in the {room}")
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
    agreed: Tensor | None = None  # int64 [B]: how many proposals come before the first wrong one
    logprobs: Tensor | None = None  # float32 [B, k + 1, 1 + n]: the token's, the n likeliest ones'
    likeliest: Tensor | None = None  # int64 [B, k + 1, n]: which tokens are the likeliest


def on_its_device(method: Callable) -> Callable:
    """Run a Decoder's method with its GPU as the current one. An eager Decoder on a CPU runs in
    inference mode, which takes a tenth off a step."""

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
    host; a compiled decoder captures it in a CUDA graph, one for each kind of sampling."""

    @torch.inference_mode(False)  # what is kept is written into outside of it too
    def __init__(
        self, model: Transformer, cache: KVCache | None = None, *, compiled: bool = False
    ):
        self.model = model
        self.cache = model.check_cache(1, cache)
        self.context = min(self.cache.max_seq_len, model.config.max_seq_len)  # of a row, at most
        self.compiled = compiled
        self.device = model.device
        B = self.cache.max_batch_size
        self.token = torch.zeros(B, 1, dtype=torch.int64, device=self.device)
        self.input_pos = torch.zeros(B, dtype=torch.int32, device=self.device)
        self.active = torch.zeros(B, dtype=torch.int32, device=self.device)  # 1: a step moves it on
        self.sampling = Sampling.of([Request([], 1)] * B, self.device)
        self.kind = "greedy"
        self.extras: Any = None  # processors.Extras, once a request has one of EXTRAS
        self.known: Sequence[Tensor] = ()  # Drawn.logprobs and Drawn.likeliest of a step
        self.running: dict[int, Request] = {}  # by the row: requests that want further tokens
        self.finish_reasons: dict[int, str] = {}  # how the requests of a run ended
        # by step_key: where prepared steps put what they draw, and their graphs
        self.prepared: dict[Any, Drawn] = {}
        self.graphs: dict[Any, torch.cuda.CUDAGraph] = {}
        self.lag = LAG if self.device.type == "cuda" else 0
        on_gpu = compiled and self.device.type == "cuda"
        self.sample = compiled_whole(sample) if on_gpu else sample  # noise is some thirty operators

    @on_its_device
    def step(self) -> Drawn:
        """Launch one step of all rows: decode, draw, move on."""
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
        """Draw tokens [B, T] for logits [B, T, V]; the first stand `ahead` places after the rows'
        last tokens."""
        if self.kind == "greedy":
            return logits.argmax(-1)
        B, T, V = logits.shape
        offsets = torch.arange(ahead, ahead + T, dtype=torch.int32, device=logits.device)
        position = self.input_pos[rows, None] + offsets  # (B, T)
        sampling = self.sampling.rows(rows, T)
        tokens = self.sample(logits.view(B * T, V), sampling, self.kind, position.flatten())
        return tokens.view(B, T)

    def move(self, rows: slice, last: Tensor, n: Tensor) -> None:
        """Make `last` the rows' last tokens, n places further. n is 0 for rows without a request:
        they stay where they are, and what a step writes there is never read."""
        self.token[rows] = last
        self.input_pos[rows].add_(n).clamp_(max=self.cache.max_seq_len - 1)

    def width(self) -> int:
        """How many rows a step works on: a compiled step has one shape."""
        if self.compiled or not self.running:
            return self.cache.max_batch_size
        return max(self.running) + 1

    @property
    def step_key(self) -> Any:
        """What tells kinds of steps apart: each has a graph of its own."""
        return self.kind, self.extras and self.extras.key

    def prepare(self) -> float:
        """Compile and capture the next kind of step, unless that was done -> seconds it took."""
        if not self.compiled or self.step_key in self.prepared:
            return 0.0
        return self.try_step()

    @on_its_device
    def try_step(self) -> float:
        """Compile a step by running it, and capture it on CUDA -> seconds it took. Rows keep their
        state: a trial writes into the cache only where the next step will write anyway."""
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
        """Read the prompts of neighbouring rows into the cache, yielding after each chunk but the
        last, and draw their first tokens. done: tokens of each prompt that are there. Steps of
        other rows in between write into these rows too: where the next chunk will."""
        cached = requests[0].cached
        cpu = torch.device("cpu")  # whatever the default is
        new = Sampling.of(requests, cpu)
        if any(request.seed is None for request in requests):  # all ranks take one rank's keys
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
            # a prompt's logits come from the chunk in which it ends
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
        if self.extras is not None and self.extras.echo:  # which wants logits of all tokens
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
        """Decode requests, number i in row i -> (i, its new tokens), as they come; finish_reasons
        has then how each ended. ValueError if one has no room for a token, or the cache has lost
        its cached tokens; RuntimeError if another run has begun meanwhile."""
        requests = list(requests)
        budgets = [self.budget(request) for request in requests]
        self.model.check_cache(len(requests), self.cache)  # a row for each
        if len({request.cached for request in requests}) != 1:
            raise ValueError("a Decoder's requests have the same number of tokens cached")
        self.start(requests)
        self.prepare()
        prefill = self.prefill(slice(0, len(requests)), requests)
        while not self.read_on(prefill):
            pass
        self.running = running = dict(enumerate(requests))
        pending = deque([self.to_host(self.token)])
        n_launched = 1
        while running:
            longest = max(budgets[row] for row in running)
            if len(pending) <= self.lag and n_launched < longest:
                pending.append(self.to_host(self.step().tokens))
                n_launched += 1
                continue
            tokens = pending.popleft()()
            n = n_launched - len(pending)  # of each request's tokens this is the n-th
            for row, request in list(running.items()):
                if row not in running:  # its caller has ended it meanwhile
                    continue
                self.cache.cached[row] = request.cached + len(request.prompt) + n - 1
                reason = request.ends_with(tokens[row], n, budgets[row])
                if reason is not None:
                    self.end(row, reason)
                yield row, [tokens[row]]
                if self.running is not running:
                    raise RuntimeError("another run of this decoder has begun")

    def end(self, number: int, reason: str = "stop") -> None:
        """Stop a request of this run; a caller may do that at any time."""
        if self.running.pop(number, None) is not None:
            self.finish_reasons[number] = reason
            self.active[number].zero_()

    def budget(self, request: Request) -> int:
        return request.budget(self.model.config.vocab_size, self.context)

    @torch.inference_mode(False)
    def start(self, requests: Sequence[Request]) -> None:
        """Take the rows for these requests, whatever they did. ValueError: what runs goes on."""
        cached = self.cache.cached
        for row, (request, there) in enumerate(zip(requests, cached)):
            if request.cached > there:
                raise ValueError(f"{request.cached} tokens are not cached: one row has {there}")
            if request.cached:
                self.cache.refuse_lost(slice(row, row + 1), request.cached)
        asks = any(getattr(r, name) not in (None, (), []) for r in requests for name in EXTRAS)
        if self.extras is not None or asks:
            extras = self.extras or extension("processors").Extras(self)
            extras.start(requests, asks)
            self.extras = extras
        self.running = {}  # the run before sees that it is no longer its own
        self.finish_reasons.clear()
        self.active.zero_()
        # rows, also those without a request, and trials write after what is cached
        cached[:len(requests)] = [request.cached for request in requests[:len(cached)]]
        self.input_pos[:] = self.input_pos.new_tensor(cached).clamp(max=self.cache.max_seq_len - 1)
        self.kind = kind_of(requests)  # of all of them: a step is compiled before the first begins

    def to_device(self, *tensors: Tensor) -> list[Tensor]:
        """Copy tensors in one transfer, which a GPU's host need not wait for. Those of 8-byte
        numbers come first, so that all are aligned."""
        flat = torch.cat([x.flatten().view(torch.int32) for x in tensors])
        flat = flat.pin_memory() if self.device.type == "cuda" else flat
        parts = flat.to(self.device, non_blocking=True).split([x.nbytes // 4 for x in tensors])
        return [part.view(x.dtype).view_as(x) for part, x in zip(parts, tensors)]

    @on_its_device
    def to_host(self, tensor: Tensor) -> Callable[[], list[int]]:
        """Start copying tokens [B, 1] to the host -> a function that waits for them."""
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
        # the last two: one launch, and not up to three, cuts q, k and v out of their product
        wanted = "coordinate_descent_tuning", "combo_kernels", "combo_kernels_pointwise_only"
        options = dict.fromkeys(wanted, True) | model.compile_options
        model.decode_head = compiled_whole(run_head, options=options)
    else:
        torch._dynamo.config.capture_scalar_outputs = True  # a length's item() is a symbol
    model.compiled = True
    model.decode_block = compiled_whole(run_block, options=options)
    if prefill:
        model.prefill_block = compiled_whole(run_block, dynamic=True, options=options)


def compiled_whole(function: Callable, **settings: Any) -> Callable:
    """torch.compile in one graph, but anew for each window and each shape of a cache: hence a limit
    and compiled code of its own. Before torch 2.13 a code object has these, so it is copied."""
    settings = dict(dynamic=False, fullgraph=True) | settings
    if "isolate_recompiles" in signature(torch.compile).parameters:
        return torch.compile(function, isolate_recompiles=True, recompile_limit=64, **settings)
    torch._dynamo.config.recompile_limit = 64
    # nor does it compile sums along several long rows for a GPU
    inductor = importlib.import_module("torch._inductor.lowering")
    inductor.lowerings[torch.ops.aten.cumsum.default] = inductor.fallback_cumsum
    alone = type(function)(function.__code__.replace(), function.__globals__)
    return torch.compile(alone, **settings)

# --- sampling ---


class Filter(NamedTuple):
    """Which tokens may be drawn: a function of probabilities [N, n], likeliest first in each row,
    and the rows' setting [N, 1], which returns them with zeros for the tokens that it drops."""

    keep: Callable[[Tensor, Tensor], Tensor]
    off: float  # the setting with which nothing is dropped


def keep_top_k(probs: Tensor, k: Tensor) -> Tensor:
    """The k likeliest."""
    return probs.masked_fill(torch.arange(probs.shape[1], device=probs.device) >= k, 0)


def keep_top_p(probs: Tensor, p: Tensor) -> Tensor:
    """The fewest tokens with a share p of what is left, to a millionth: sums are rounded."""
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
# Applied in this order. The setting is the Request's field of that name, None: off. A filter
# without such a field is on for every row that samples, and called with its `off`.
FILTERS = {
    "top_k": Filter(keep_top_k, float("inf")),
    "top_p": Filter(keep_top_p, 1.0),
    "min_p": Filter(keep_min_p, 0.0),
}
LEAST_TEMPERATURE = 1e-5  # below it rows are greedy: logits divided by less may overflow
CANDIDATES = 256  # where each row has a top_k up to this, only that many tokens are sorted


class Sampling(NamedTuple):
    """How rows draw their tokens: tensors [B], so that one captured step serves any settings."""

    temperature: Tensor  # float32; 0: greedy
    filters: Tensor  # float32 [B, number of FILTERS]: their settings
    key: Tensor  # int32 [B, 2], from the seed: it selects the request's random numbers

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> Sampling:
        filters = [settings_of(request, FILTERS) for request in requests]
        return cls(
            torch.tensor([r.temperature for r in requests], dtype=torch.float32, device=device),
            torch.tensor(filters, dtype=torch.float32, device=device),
            torch.tensor([key_of(r.seed) for r in requests], dtype=torch.int32, device=device),
        )

    def rows(self, rows: slice, T: int = 1) -> Sampling:
        """Of some rows, each T times: views where T is 1."""
        each = (x[rows].unsqueeze(1).expand(-1, T, *x.shape[1:]) for x in self)
        return Sampling(*(x.flatten(0, 1) for x in each))


def settings_of(request: Request, table: dict[str, Any]) -> list[float]:
    """A request's settings for a table such as FILTERS; `off` where it has none."""
    given = [getattr(request, name, None) for name in table]
    return [each.off if value is None else value for each, value in zip(table.values(), given)]


def key_of(seed: int | None) -> tuple[int, int]:
    """Two int32 numbers from a seed, None: a new one. Those of neighbouring seeds are unrelated."""
    seed = random.getrandbits(64) if seed is None else seed
    return struct.unpack("<ii", hashlib.blake2b(str(seed).encode(), digest_size=8).digest())


def kind_of(requests: Iterable[Request]) -> str:
    """The cheapest kind of step that draws for all of these rows: "greedy" where none samples,
    "plain" from all tokens, "top_k" from CANDIDATES, "filtered" from the sorted vocabulary."""
    if filter_probs is not FILTER_PROBS:
        return "filtered"  # for greedy rows too: it may drop the likeliest token
    sampled = [request for request in requests if request.temperature >= LEAST_TEMPERATURE]
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
    equal numbers to tokens that differ in the same bits."""
    stream = scramble(key + position[:, None])  # (N, 2)
    bits = scramble(ids.int() ^ stream[:, :1])  # (N, n)
    bits = scramble(bits + stream[:, 1:])
    # the middles of 2^31 steps from 0 to 1; small ones win, and float32 is finest near 0
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
    special: dict[str, int]  # control tokens, by their text
    bos_id: int | None  # put before a text by encode(bos=True), None where the model takes none
    eos_ids: set[int]
    chat_template: str | None = None

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The ids of a text. Special tokens written in it are plain text."""
        ids = self.backend.encode(text)
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without control tokens and those that a model has beyond its
        tokenizer."""
        control = set(self.special.values())
        return self.backend.decode([i for i in ids if i not in control and i < self.vocab_size])

    def check_fit(self, n_tokens: int) -> None:
        """ValueError if encode may give ids that a model of n_tokens lacks. Control tokens may lie
        beyond, such as [PAD] or one for images: no text gives them."""
        n = self.vocab_size - sum(i >= n_tokens for i in set(self.special.values()))
        if n > n_tokens:
            raise ValueError(f"the tokenizer has {n} tokens but the model only {n_tokens}")


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint, None: the default model's. formats/ reads all kinds of files,
    and its tokenizers have chat(messages) -> ids. ValueError says what is wrong."""
    folder = Path(path or "")
    file = folder / "tokenizer.model"
    formats = extension("formats", required=path is None or not os.path.exists(file))
    if formats is not None:
        return formats.load_tokenizer(path)
    backend = SentencePieceProcessor(model_file=str(file))
    size, bos_id, eos_ids = backend.get_piece_size(), backend.bos_id(), set()
    special = {backend.id_to_piece(i): i for i in range(size) if backend.is_control(i)}
    for settings in folder.glob("*config.json"):
        ends = json.loads(settings.read_text(encoding="utf-8")).get("eos_token_id")
        eos_ids |= set(ends if isinstance(ends, list) else [ends]) - {None}
    return Tokenizer(backend, size, special, bos_id if bos_id >= 0 else None, eos_ids)


class Printer:
    """Prints an answer's text as its tokens come, whole characters only."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]):
        self.tokenizer = tokenizer
        self.times: list[float] = []  # when it was called
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
    """The flags of a run; cli/ has more. add: argparse's add_argument. number(name) -> argparse's
    type of a setting of RANGES."""
    number = number or (lambda name: RANGES[name].kind)
    add("--checkpoint_path", metavar="PATH",
        help="Hugging Face folder or hub id, .gguf file, folder that --save wrote, or a bare "
        "config.json for random weights; default: SmolLM2-135M-Instruct, fetched once")
    add("--prompt", metavar="TEXT", help="default: a question")
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
    fit_cache(model, [Request(ids, args.max_new_tokens)], 0)
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
    """Compile a model if wanted (None: on CUDA) -> whether it is compiled. On a CPU, steps of one
    row are compiled into libraries that are kept, and used by later runs unless wanted is False."""
    compiled = model.device.type == "cuda" if wanted is None else wanted
    if compiled:
        compile_model(model, prefill)
    if model.device.type == "cpu" and (compiled or wanted is None and n_rows == 1):
        ahead = extension("cpu.ahead", required=False)
        if ahead is not None:
            model.decode_block = ahead.AheadOfTime(model.decode_block, build=compiled)
    return compiled


def say(text: str, end: str = "\n") -> None:
    """Print on stderr: stdout is for what the model says. A closed stderr is no error."""
    with suppress(OSError):
        print(text.translate(HARMLESS), end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
