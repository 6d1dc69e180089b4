"""Generate text: sampling, the Engine that decodes rows of a cache together, the command line.

    python generate.py --checkpoint_path PATH --prompt "The capital of France is"

One step of decode is Engine.step: the model's forward, sampling and the advance of every row,
all on the device. Engine.run turns requests into tokens; generate() and the command line drive
it."""
from __future__ import annotations

import json
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cli.arguments import DTYPES, parse_args, say
from cli.batch import Show, read_lines, read_text, run_batches
from cli.chat import chat
from cli.stats import Memory, Stats, profile, summarize
from formats.checkpoint import default_model, first_line, resolve
from formats.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from model import KVCache, Transformer, load_model, run_block, run_head, tensor_bytes
from quantize import QuantizedLinear, refuse_existing, save_quantized

PREFILL_CHUNK = 8192  # longest run of prompt tokens in one pass; bounds the activations' memory
LAG = 2  # steps that the host reads behind a GPU, so that looking at tokens never stalls it
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


# --- sampling ---

class Sampling(NamedTuple):
    """How rows draw their tokens: tensors [B], so that one captured step serves any settings."""

    temperature: Tensor  # float32; 0: greedy
    top_k: Tensor  # int64; the vocabulary's size: all
    top_p: Tensor  # float32; infinity: all
    min_p: Tensor  # float32; 0: all

    @classmethod
    def of(cls, requests: Sequence[Request], vocab_size: int, device: torch.device) -> Sampling:
        temperature = [request.temperature for request in requests]
        top_k = [request.top_k or vocab_size for request in requests]
        top_p = []
        for request in requests:
            keeps_all = request.top_p is None or request.top_p >= 1
            top_p.append(float("inf") if keeps_all else request.top_p)
        min_p = [request.min_p or 0.0 for request in requests]
        return cls(
            torch.tensor(temperature, dtype=torch.float32, device=device),
            torch.tensor(top_k, dtype=torch.int64, device=device),
            torch.tensor(top_p, dtype=torch.float32, device=device),
            torch.tensor(min_p, dtype=torch.float32, device=device),
        )

    def rows(self, rows: slice) -> Sampling:
        return Sampling(*(setting[rows] for setting in self))


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


def sample(logits: Tensor, sampling: Sampling, kind: str, generator: torch.Generator) -> Tensor:
    """logits [B, vocab_size] -> token ids [B], by a step of that kind.

    The draw divides by exponential noise and takes the largest (a Gumbel-max draw), so that
    nothing is read back to the host."""
    likeliest = logits.argmax(-1)
    if kind == "greedy":
        return likeliest
    greedy = sampling.temperature == 0
    temperature = sampling.temperature.masked_fill(greedy, 1.0)
    probs = (logits.float() / temperature[:, None]).softmax(-1)  # (B, V)
    if kind == "top_k":
        probs = filter_probs(probs, sampling, min(CANDIDATES, probs.shape[-1]))
    elif kind == "filtered":
        probs = filter_probs(probs, sampling, probs.shape[-1])
    noise = torch.empty_like(probs).exponential_(generator=generator)
    drawn = (probs / noise).argmax(-1)
    return torch.where(greedy, likeliest, drawn)


def filter_probs(probs: Tensor, sampling: Sampling, n_candidates: int) -> Tensor:
    """Zero the probabilities [B, V] that a row's filters drop, one filter after the other.

    top_k: the k likeliest. top_p: the fewest tokens whose probabilities reach p of what is left,
    the one that crosses it included. min_p: those at least min_p times as likely as the likeliest.
    Only the n_candidates likeliest tokens stay in any case."""
    if n_candidates < probs.shape[-1]:
        ordered, order = probs.topk(n_candidates)  # (B, n_candidates), likeliest first
    else:
        ordered, order = probs.sort(descending=True)
    rank = torch.arange(n_candidates, device=probs.device)
    ordered = ordered.masked_fill(rank >= sampling.top_k[:, None], 0)
    likelier = ordered.cumsum(-1) - ordered  # the mass of likelier tokens
    enough = sampling.top_p[:, None] * ordered.sum(-1, keepdim=True)
    ordered = ordered.masked_fill(likelier >= enough, 0)
    least = sampling.min_p[:, None] * ordered[:, :1]
    ordered = ordered.masked_fill(ordered < least, 0)
    return torch.zeros_like(probs).scatter(-1, order, ordered)


# --- the engine ---

@dataclass
class Running:
    """A request that a row works on."""

    number: int  # of the request, in the order in which run was given them
    request: Request
    budget: int  # most new tokens
    drawn: int = 0  # tokens that were drawn on the device
    read: int = 0  # tokens that the host has seen
    done: bool = False


@dataclass
class Launch:
    """The tokens of one step on their way to the host, and the rows they were drawn for."""

    tokens: Tensor  # [B] int64 on the host, there once `ended` is reached
    rows: dict[int, Running]
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
    def guarded(engine: Engine, *args: Any) -> Any:
        try:
            with torch.accelerator.device_index(engine.device.index):  # a CPU's index is None
                return method(engine, *args)
        except Exception as error:
            refuse_what_the_device_refuses(error, engine)
            raise

    return guarded


class Engine:
    """Rows of one cache that decode together, each at its own position with its own request.

    Tokens, positions, sampling settings and random state live on the device, so a step needs
    nothing from the host; a compiled engine captures it in a CUDA graph, one for each kind of
    sampling. compile_model compiles what a step runs. One engine drives a cache at a time."""

    def __init__(
        self, model: Transformer, cache: KVCache | None = None, *, compiled: bool = False
    ):
        self.model = model
        self.cache = model.check_cache(1, cache)
        self.compiled = compiled
        self.device = model.device
        B = self.cache.max_batch_size
        self.token = torch.zeros(B, 1, dtype=torch.int64, device=self.device)
        self.input_pos = torch.zeros(B, dtype=torch.int32, device=self.device)
        idle = [Request(prompt=[], max_new_tokens=0)] * B
        self.sampling = Sampling.of(idle, model.config.vocab_size, self.device)
        self.generator = torch.Generator(self.device)
        self.kind = "greedy"
        self.requests: dict[int, Request] = {}  # of the rows that are in use
        self.running: dict[int, Running] = {}  # what run knows of them
        self.prepared: set[str] = set()  # kinds of step that are compiled
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self.tables: list[Tensor] = []  # what the graphs read that the model may replace
        self.owner: object = None  # the run that drives the rows
        self.stats = Stats()

    def seed(self, seed: int | None) -> None:
        """The same seed, the same draws; None: a new one."""
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    @on_its_device
    def step(self) -> None:
        """Launch one step of all rows: forward, sample, advance."""
        if self.compiled and self.device.type == "cuda":
            self.prepare_once(self.kind)
            self.graphs[self.kind].replay()
        else:
            self.advance()

    def advance(self) -> None:
        rows = slice(0, self.width())
        token = self.token[rows]
        input_pos = self.input_pos[rows]
        logits = self.model.decode(token, input_pos, self.cache)[:, -1]  # (B, V)
        drawn = sample(logits, self.sampling.rows(rows), self.kind, self.generator)
        token.copy_(drawn[:, None])
        last = self.cache.max_seq_len - 1
        input_pos.add_(1).clamp_(max=last)  # a row that is done steps on, unseen

    def width(self) -> int:
        """How many rows a step works on: a compiled step has one shape."""
        if self.compiled or not self.requests:
            return self.cache.max_batch_size
        return max(self.requests) + 1

    def prepare_once(self, kind: str) -> float:
        """Prepare what a compiled engine has not prepared yet -> seconds it took."""
        if not self.compiled or kind in self.prepared:
            return 0.0
        return self.prepare(kind)

    @on_its_device
    def prepare(self, kind: str = "greedy") -> float:
        """Compile a step of that kind by running it, and capture it on CUDA -> seconds it took.

        Rows keep their state: what the trial puts into the cache lies where the next real step
        writes. Only the random numbers move on."""
        began = time.perf_counter()
        token = self.token.clone()
        input_pos = self.input_pos.clone()
        active = self.kind
        self.kind = kind
        if self.device.type == "cuda":
            self.graphs[kind] = self.capture()
        else:
            self.advance()
        self.prepared.add(kind)
        self.kind = active
        self.token.copy_(token)
        self.input_pos.copy_(input_pos)
        return time.perf_counter() - began

    def capture(self) -> torch.cuda.CUDAGraph:
        """One step as a CUDA graph, after two on a side stream that compile and allocate."""
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.advance()
            self.advance()
            # on a stream of this device: by default it is of the first one that captured
            with torch.cuda.graph(graph, stream=side):
                self.advance()
        torch.cuda.current_stream().wait_stream(side)
        self.tables.append(self.model.rope_upto(self.cache.max_seq_len))
        torch.cuda.synchronize()
        return graph

    @on_its_device
    def insert(self, row: int, requests: Sequence[Request]) -> None:
        """Prefill consecutive rows from `row` on, in one pass padded to the longest prompt, while
        the others keep their state, and draw their first tokens into self.token.

        ValueError if the requests differ in how many tokens are cached."""
        cached = requests[0].cached
        if any(request.cached != cached for request in requests):
            raise ValueError("requests that are inserted together have as many tokens cached")
        rows = slice(row, row + len(requests))
        self.requests.update(enumerate(requests, start=row))
        self.kind = kind_of(self.requests.values())
        new = Sampling.of(requests, self.model.config.vocab_size, self.device)
        for setting, values in zip(self.sampling, new):
            setting[rows] = values
        prompts = [request.prompt for request in requests]
        logits, lengths = prefill(self.model, self.cache, rows, prompts, cached)
        self.token[rows, 0] = sample(logits, new, kind_of(requests), self.generator)
        self.input_pos[rows] = lengths + cached

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[int]]]:
        """Work requests off, in order, in the rows that are free -> (a request's number, new
        tokens of it), as they come; on CUDA the host reads LAG steps behind the device.

        A request ends with the first of its eos_ids (included), after max_new_tokens, or where
        the cache is full. ValueError if one has no room for a token, RuntimeError if another run
        of this engine has begun meanwhile. Tokens have to be checked before: see check_prompts."""
        waiting = deque(Running(i, request, self.budget(request))
                        for i, request in enumerate(requests))
        pending: deque[Launch] = deque()
        lag = LAG if self.device.type == "cuda" else 0
        self.requests.clear()
        self.running.clear()
        me = self.owner = object()
        mark = self.mark()
        while waiting or self.running:
            if waiting and len(self.running) < self.cache.max_batch_size:
                yield from self.start(waiting)
                mark = self.mark()
            elif any(running.drawn < running.budget for running in self.running.values()):
                if not pending:  # the time since the step before was the caller's
                    mark = self.mark()
                self.step()
                pending.append(self.launch(mark))
                mark = pending[-1].ended
                if len(pending) > lag:
                    yield from self.read(pending.popleft())
            else:  # all is drawn that was asked for, and what is not read yet is pending
                yield from self.read(pending.popleft())
            if self.owner is not me:
                raise RuntimeError("another run of this engine has begun")

    def budget(self, request: Request) -> int:
        """The most new tokens that a request can have."""
        room = self.cache.max_seq_len - request.cached - len(request.prompt)
        budget = min(request.max_new_tokens, room)
        if budget < 1:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens behind {request.cached} cached, with "
                f"{request.max_new_tokens} new ones, does not fit into {self.cache.max_seq_len}"
            )
        return budget

    def start(self, waiting: deque[Running]) -> list[tuple[int, list[int]]]:
        """Give waiting requests to the first free rows that lie together, in one prefill."""
        began = time.perf_counter()
        first = next(row for row in range(self.cache.max_batch_size) if row not in self.running)
        started: dict[int, Running] = {}
        for row in range(first, self.cache.max_batch_size):
            if row in self.running or not waiting:
                break
            if started and waiting[0].request.cached != started[first].request.cached:
                break
            started[row] = waiting.popleft()
        self.running.update(started)
        self.insert(first, [running.request for running in started.values()])
        tokens = self.token[:, 0].tolist()
        self.stats.first_token_s.append(time.perf_counter() - began)
        for running in started.values():
            running.drawn = 1
        return self.hand_out(tokens, started)

    @on_its_device
    def launch(self, began: Mark) -> Launch:
        """Send the tokens that a step has drawn on their way to the host."""
        on_gpu = self.device.type == "cuda"
        tokens = torch.empty(len(self.token), dtype=torch.int64, pin_memory=on_gpu)
        tokens.copy_(self.token[:, 0], non_blocking=True)
        for running in self.running.values():
            running.drawn += 1
        return Launch(tokens, dict(self.running), began, self.mark())

    def read(self, launch: Launch) -> list[tuple[int, list[int]]]:
        """Wait for a launch and hand its tokens to the requests that still want them."""
        self.stats.steps_s.append(seconds_between(launch.began, launch.ended))
        return self.hand_out(launch.tokens.tolist(), launch.rows)

    def hand_out(
        self, tokens: list[int], rows: dict[int, Running]
    ) -> list[tuple[int, list[int]]]:
        """Give each row's token to its request, and free the rows that are done with theirs."""
        news = []
        for row, running in rows.items():
            if running.done:
                continue
            token = tokens[row]
            running.read += 1
            if token in running.request.eos_ids or running.read == running.budget:
                running.done = True
                del self.running[row]
                del self.requests[row]
            news.append((running.number, [token]))
        return news

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


def prefill(
    model: Transformer, cache: KVCache, rows: slice, prompts: list[list[int]], cached: int
) -> tuple[Tensor, Tensor]:
    """Put prompts into rows of the cache behind `cached` tokens, PREFILL_CHUNK tokens at a time
    -> the logits of each one's last token [n, vocab_size], and their lengths [n]."""
    width = max(map(len, prompts))
    padded = [prompt + [0] * (width - len(prompt)) for prompt in prompts]
    tokens = torch.tensor(padded, device=model.device)  # (n, width)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    last_logits = None
    for start in range(0, width, PREFILL_CHUNK):
        chunk = tokens[:, start:start + PREFILL_CHUNK]
        behind = cached + start
        input_pos = torch.full((len(prompts),), behind, dtype=torch.int32, device=model.device)
        last = (lengths - 1 - start).clamp(0, chunk.shape[1] - 1)
        logits = model.prefill(chunk, input_pos, cache, rows=rows, start=behind, last=last)[:, 0]
        if last_logits is None:
            last_logits = logits
        else:  # what counts is the chunk in which a prompt ends
            reaches_here = lengths > start
            last_logits = torch.where(reaches_here[:, None], logits, last_logits)
    return last_logits, lengths


def compile_model(model: Transformer, prefill: bool = False) -> None:
    """Compile one block for decoding, which all layers share, so that compile time does not grow
    with depth; on CUDA also the output head (two operators on a CPU). prefill: also the block over
    prompts of any length.

    Each is recompiled for every window and every shape of cache that it meets, of any model:
    hence a limit of its own. Hooks are compiled in: after adding one, call this again, and make
    engines anew."""
    on_gpu = model.device.type == "cuda"
    options = {"coordinate_descent_tuning": True} if on_gpu else {}
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
    stream: Show | None = None, cached: int = 0, compile: bool = False,
    stats: Stats | None = None, engine: Engine | None = None,
) -> list[list[int]]:
    """Continue prompts, lists of token ids of any lengths -> the new tokens of each, as lists.

    A row ends with the first of eos_ids (included), after max_new_tokens, or where the cache is
    full. temperature 0 is greedy; filter_probs says what the filters do. cached: tokens of each
    row that are in the cache already, in front of the prompts. stream(row, ids) is called as
    tokens come. seed: the same seed, the same text. stats: a Stats to fill.

    A cache that was set up before is used, otherwise one is made that fits. compile: take the
    steps that compile_model compiled. Each call without an engine makes its own; with one, a
    series of calls shares its captured steps, and prompts beyond its rows wait their turn.
    ValueError says what does not fit."""
    check_prompts(prompts, max_new_tokens, model.config.vocab_size)
    longest = max(map(len, prompts))
    if engine is None:
        fit_cache(model, len(prompts), cached + longest + max_new_tokens, cached)
        engine = Engine(model, compiled=compile)
    check_room(longest, engine.cache.max_seq_len - cached)
    request = partial(
        Request, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, eos_ids=frozenset(eos_ids), cached=cached,
    )
    requests = [request(prompt) for prompt in prompts]
    stats = stats or Stats()
    engine.stats = stats
    # preparing, and rows without a request, write from their position on: not over what is cached
    engine.input_pos.clamp_(min=cached)
    stats.compile_s += engine.prepare_once(kind_of(requests))
    engine.seed(seed)
    out = [[] for _ in prompts]
    for number, tokens in engine.run(requests):
        out[number] += tokens
        if stream:
            stream(number, tokens)
    stats.prompt_tokens += sum(map(len, prompts))
    stats.new_tokens += sum(map(len, out))
    return out


def check_prompts(prompts: list[list[int]], max_new_tokens: int, vocab_size: int) -> None:
    """ValueError if there is nothing to do, or a token that the model does not know."""
    if not prompts:
        raise ValueError("there is no prompt")
    if not all(prompts):
        raise ValueError("a prompt is empty: it has no token to start from")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    for token in (min(map(min, prompts)), max(map(max, prompts))):
        if not 0 <= token < vocab_size:
            raise ValueError(f"a prompt has token {token}, outside the vocabulary of {vocab_size}")


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
    may_grow = cache.may_grow
    del cache  # the old one goes before the new one comes
    model.setup_caches(rows, length, dtype, attention).may_grow = may_grow


# --- the command line ---

def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.save is not None:
            save(args)
        else:
            run(args)
    except torch.OutOfMemoryError as e:
        fail(first_line(e))
    except (ValueError, StepFailed) as e:
        fail(str(e))
    except KeyboardInterrupt:
        say("")
        sys.exit(130)


def fail(message: str) -> None:
    say(f"generate.py: error: {message}")
    sys.exit(2)


def run(args: Any) -> None:
    """Load, prepare, and do what the flags ask for."""
    path = default_model() if args.checkpoint_path is None else args.checkpoint_path
    stats = Stats()
    tokenizer = None
    if not args.benchmark and not str(path).endswith(".json"):
        tokenizer = load_tokenizer(path)
    began = time.perf_counter()
    model = load(args, path)
    stats.load_s = time.perf_counter() - began
    check_fit(model, tokenizer, args.max_seq_len)

    prompts = read_prompts(args, tokenizer, model.config.vocab_size)
    longest = max(map(len, prompts))
    check_prompts(prompts, args.max_new_tokens, model.config.vocab_size)
    check_room(longest, args.max_seq_len or model.config.max_seq_len)

    needed = 8192 if args.interactive else longest + args.max_new_tokens
    room = args.max_seq_len or min(needed, model.config.max_seq_len)
    kv_dtype = torch.int8 if args.kv_dtype == "int8" else None
    model.setup_caches(args.batch_size, room, kv_dtype, args.attention)
    if args.compile:
        compile_model(model, args.compile_prefill)
    engine = Engine(model, compiled=args.compile)

    if args.interactive:
        converse(engine, tokenizer, args, stats)
    elif args.profile:
        profile_engine(engine, prompts, args, stats)
        summarize(stats, memory_of(engine))
    else:
        answer_all(engine, tokenizer, prompts, args, stats)


def load(args: Any, path: str | Path) -> Transformer:
    """The model; args.dtype becomes the one that it has."""
    model = load_model(
        path, device=args.device, dtype=DTYPES.get(args.dtype),
        quantize=None if args.quantize == "none" else args.quantize,
        group_size=args.group_size or 32,
    )
    args.dtype = str(model.dtype).removeprefix("torch.")
    return model


def check_fit(model: Transformer, tokenizer: Tokenizer | None, max_seq_len: int | None) -> None:
    config = model.config
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model only "
            f"{config.vocab_size}"
        )
    if max_seq_len is not None and max_seq_len > config.max_seq_len:
        raise ValueError(
            f"--max_seq_len {max_seq_len} exceeds the model's context of {config.max_seq_len} "
            "tokens"
        )


def read_prompts(args: Any, tokenizer: Tokenizer | None, vocab_size: int) -> list[list[int]]:
    """The prompts as token lists, one a sample."""
    copies = args.num_samples
    if args.prompts is None:
        copies *= args.batch_size
    if args.prompt and args.prompt.isdecimal():  # random tokens, as in gpt-fast
        generator = torch.Generator().manual_seed(args.seed or 0)
        tokens = torch.randint(vocab_size, (int(args.prompt),), generator=generator)
        return [tokens.tolist()] * copies
    if tokenizer is None:
        raise ValueError(
            "a bare config.json has no tokenizer: give --prompt a number of random tokens"
        )
    in_template = args.chat or args.interactive
    if args.prompts is not None:
        texts = read_lines(args.prompts)
    elif args.prompt is not None:
        texts = [read_text(args.prompt)]
    else:
        texts = ["What is the capital of France?"]
        in_template = in_template or tokenizer.chat_template
    if in_template:
        prompts = [tokenizer.chat([{"role": "user", "content": text}]) for text in texts]
    else:
        prompts = [tokenizer.encode(text) for text in texts]
    return prompts * copies


def options(args: Any, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """generate's keyword arguments."""
    return dict(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p,
        seed=args.seed, eos_ids=tokenizer.eos_ids if tokenizer else (),
    )


def answer_all(
    engine: Engine, tokenizer: Tokenizer | None, prompts: list[list[int]], args: Any, stats: Stats
) -> None:
    """Continue all prompts, batch by batch, and say what it took."""
    settings = options(args, tokenizer)

    def answer(batch: list[list[int]], show: Show | None) -> list[list[int]]:
        out = generate(
            engine.model, batch, args.max_new_tokens, stream=show, stats=stats, engine=engine,
            **settings,
        )
        if args.seed is not None:
            settings["seed"] += 1
        return out

    if args.benchmark:  # one run to warm up and compile; its prefill and steps do not count
        warm = Stats()
        generate(
            engine.model, prompts[:args.batch_size], args.max_new_tokens, stats=warm,
            engine=engine, **settings,
        )
        stats.compile_s = warm.compile_s
    live = not args.json
    texts = run_batches(prompts, args.batch_size, tokenizer, answer, live=live, quiet=args.json)
    summary = summarize(stats, memory_of(engine))
    if args.json:
        print(json.dumps(vars(args) | summary | {"texts": texts}, default=str))


def converse(engine: Engine, tokenizer: Tokenizer, args: Any, stats: Stats) -> None:
    """A conversation in the terminal, its cache kept between turns."""

    def reply(ids: list[int], cached: int, show: Show) -> list[int]:
        out, = generate(
            engine.model, [ids], args.max_new_tokens, cached=cached, stream=show, stats=stats,
            engine=engine, **options(args, tokenizer),
        )
        return out

    chat(tokenizer, reply, engine.cache.max_seq_len)


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
    live = int(engine.input_pos.sum()) + 8 * len(engine.input_pos)  # on average over 16 steps
    slots = cache.max_batch_size * cache.max_seq_len * len(model.layers)
    parts["attention"] = live * cache.nbytes / slots
    profile(
        engine.timed_steps, len(model.layers), parts, tensor_bytes(model.lm_head), args.profile,
        args.device,
    )


def memory_of(engine: Engine) -> Memory:
    cache = engine.cache
    return Memory(
        device=engine.device, weight_bytes=engine.model.weight_bytes(), cache_bytes=cache.nbytes,
        cache_tokens=cache.max_batch_size * cache.max_seq_len, rows=cache.max_batch_size,
    )


def save(args: Any) -> None:
    """--save: quantize while loading, and write a folder that loads like any checkpoint."""
    source = resolve(default_model() if args.checkpoint_path is None else args.checkpoint_path)
    refuse_existing(args.save)
    began = time.perf_counter()
    model = load(args, source)
    try:
        save_quantized(model, args.save, partial(save_tokenizer, source))
    except OSError as e:
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


if __name__ == "__main__":
    main()
