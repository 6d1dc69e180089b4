"""Generate text: generate() for programs, and the command line.

    python generate.py --checkpoint_path PATH --prompt "The capital of France is"

Both drive the Engine of engine.py, which decodes the rows of a cache together."""
from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the long imports without a word

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

# The OpenMP of PyTorch's wheels for CPUs, libgomp, reads this while it loads: how many turns a
# thread that waits for the others spins before it sleeps. Its own choice is 300,000, which on a
# machine with other work to do takes the cores from those that are waited for; with less than a
# few thousand, steps of small models are slower on a quiet one. What the user has chosen stays.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "4000"

import torch
from safetensors import SafetensorError

from ahead import AheadOfTime
from cli.arguments import DTYPES, SETTINGS, cut, parse_args, say
from cli.batch import News, Records, Run, answer_file, answer_live, help_answer, say_cuts
from cli.chat import Chat, Show
from cli.progress import with_bar
from cli.prompts import (
    Asked, Job, check_template, checked_number, read_jobs, read_lines, read_system, read_text,
    samples, title_of, with_system,
)
from cli.stats import Memory, Stats, check_writable, profile, summarize
from engine import Engine, StepFailed, compile_model
from formats.checkpoint import default_model, first_line, resolve
from formats.tokenizer import TextStream, Tokenizer, load_tokenizer, save_tokenizer
from model import KVCache, ModelConfig, Transformer, load_model, tensor_bytes
from parallel import ALONE, Ranks, Team, mute_all_but_the_first, n_processes
from quantize import QuantizedLinear, refuse_existing, save_quantized
from sampling import FROM_ZERO, Request, Sampling, sample

__all__ = [  # what programs take from here
    "Engine", "Request", "Sampling", "compile_model", "generate", "load_tokenizer", "sample",
]

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
        if n_processes() > 1 and (args.save is not None or args.profile is not None):
            raise ValueError("--save and --profile take one process: run them without torchrun")
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
            team.share_input()
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
    if team.n_groups > 1 and args.prompts is not None:
        rows = min(rows, math.ceil(len(jobs) / team.n_groups))
    # steps that check proposals write as far behind the last token
    model.setup_caches(rows, room + args.speculate_k, kv_dtype, args.attention)
    draft = None
    if args.draft_checkpoint_path is not None:
        draft = load_draft(args, tokenizer, team.ranks)
    for each in filter(None, (model, draft)):
        if args.compile:
            compile_model(each, args.compile_prefill, keep=True)
        elif args.compile is None and rows == 1:  # what an earlier run compiled
            each.decode_block = AheadOfTime(each.decode_block)
    return Engine(
        model, compiled=bool(args.compile), speculate_k=args.speculate_k, draft=draft,
        context=room,
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
    say_what_is_missing(engine.model)
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


def say_what_is_missing(model: Transformer) -> None:
    block_forward = model.decode_block
    if isinstance(block_forward, AheadOfTime) and block_forward.missing:
        say("--compile makes a library, in some 15 seconds, by which all later runs decode faster")


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

    def reply(ids: list[int], cached: int, show: Show, attempt: int) -> tuple[list[int], str]:
        settings = options(args, tokenizer)
        if args.seed is not None:
            settings["seed"] = (args.seed + attempt) % 2**63
        answer, = generate(
            engine.model, [ids[cached:]], args.max_new_tokens, cached=cached, stream=show,
            engine=engine, **settings,
        )
        return answer, engine.finish_reasons[0]

    Chat(tokenizer, reply, engine.context, args.stop, system).run()
    say_what_is_missing(engine.model)


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
            if ".experts." in name:  # of which a step reads some
                parts[name] *= model.layers[0].mlp.experts.share(cache.max_batch_size)
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
