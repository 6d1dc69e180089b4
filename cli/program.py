"""What a terminal asks for beyond one prompt: files of prompts, chat, measuring, saving."""
from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from batching import Engine, Stats
from cli.batch import News, Records, Run, answer_file, answer_live, help_answer
from cli.chat import Chat, Show
from cli.progress import say_missing_library, watch_prompts
from cli.prompts import (
    SETTINGS, Asked, Job, check_template, read_jobs, read_lines, read_system, read_text, samples,
    title_of, with_system,
)
from cli.stats import (
    bytes_read, check_writable, memory_of, module_bytes, profile, say_cuts, summarize,
)
from formats import save_tokenizer
from formats.checkpoint import resolve
from formats.default import default_model
from generate import (
    QUESTION, Request, Tokenizer, compile_model, generate, load_tokenizer, prepare_steps, say,
)
from model import ModelConfig, Transformer, first_line
from parallel import ALONE, Ranks, Team, load_model, n_processes
from quantize import QuantizedLinear, refuse_existing, save_quantized


def run(args: Any) -> None:
    if n_processes() > 1 and (args.save is not None or args.profile is not None):
        raise ValueError("--save and --profile take one process: run them without torchrun")
    if args.save is not None:
        save(args)
        return
    with Team(args.tp, args.device.type) as team:
        run_together(args, team)


def run_together(args: Any, team: Team) -> None:
    """Read what is asked, load, prepare, and do what the flags ask for."""
    asked = team.broadcast(read_asked(args) if team.is_first else None)
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
            profile_engine(engine, [job for job in jobs if job.error is None], args, stats)
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
    is_number = args.prompt is not None and args.prompt.isdecimal()
    return Asked(
        lines=[] if args.prompts is None else read_lines(args.prompts),
        text=None if args.prompt is None or is_number else read_text(args.prompt),
        system=None if args.system is None else read_system(args.system),
    )


def load_both(args: Any, stats: Stats, ranks: Ranks) -> tuple[Tokenizer | None, Transformer]:
    """The tokenizer, None where no text is made, and the model."""
    tokenizer = None
    if not args.benchmark and not str(args.checkpoint_path).endswith(".json"):
        tokenizer = load_tokenizer(args.checkpoint_path)
    began = time.perf_counter()
    model = load(args, args.checkpoint_path, ranks)
    stats.load_s = time.perf_counter() - began
    if tokenizer is not None:
        check_fit(model.config.vocab_size, tokenizer)
    if args.max_seq_len is not None and args.max_seq_len > model.config.max_seq_len:
        raise ValueError(
            f"--max_seq_len {args.max_seq_len} exceeds the model's context of "
            f"{model.config.max_seq_len} tokens"
        )
    return tokenizer, model


def check_fit(n: int, tokenizer: Tokenizer) -> None:
    """ValueError if a tokenizer is not that of a model with n tokens."""
    if tokenizer.vocab_size > n:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {n}")
    if max(tokenizer.eos_ids, default=0) >= n:
        last = max(tokenizer.eos_ids)
        raise ValueError(f"eos_token_id {last} is none of the model's {n} tokens")


def load(args: Any, path: str | Path | None, ranks: Ranks) -> Transformer:
    """The model; args.dtype becomes the one that it has."""
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    model = load_model(
        path, ranks, device=args.device, dtype=dtype, quantize=args.quantize,
        group_size=args.group_size,
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
        path, ranks, device=args.device, dtype=getattr(torch, args.dtype),
        quantize=args.draft_quantize or "auto",
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
        Request(prompt, 1).check_fit(config.vocab_size, room)
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
    if n_tokens >= room:
        raise ValueError(
            f"a prompt of {n_tokens} tokens leaves no room for a new one in the context of {room}"
        )
    generator = torch.Generator().manual_seed(args.seed or 0)
    prompt = torch.randint(config.vocab_size, (n_tokens,), generator=generator).tolist()
    Request(prompt, 1).check_fit(config.vocab_size, room)
    return prompt


def make_engine(
    args: Any, model: Transformer, tokenizer: Tokenizer | None, jobs: list[Job], team: Team
) -> Engine:
    """An engine with the rows that the flags say, and room for the longest job."""
    needed = [8192 if args.interactive else 1]
    for job in jobs:
        if job.error is None:
            needed.append(len(job.prompt) + job.settings["max_new_tokens"])
    room = args.max_seq_len or min(max(needed), model.config.max_seq_len)
    # groups that share a file of prompts are to have rows for a fair share of them at most
    rows = args.batch_size
    if team.n_groups > 1 and args.prompts is not None:
        rows = min(rows, math.ceil(len(jobs) / team.n_groups))
    kv_dtype = torch.int8 if args.kv_dtype == "int8" else None
    # steps that check proposals write as far behind the last token
    model.setup_caches(rows, room + args.speculate_k, kv_dtype, args.attention)
    draft = None
    if args.draft_checkpoint_path is not None:
        draft = load_draft(args, tokenizer, team.ranks)
    for each in filter(None, (model, draft)):
        compiled = prepare_steps(each, args.compile, rows)
        if args.compile_prefill:
            compile_model(each, prefill=True, keep=True)
    return Engine(
        model, compiled=compiled, speculate_k=args.speculate_k, draft=draft, context=room
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
            ends = tokenizer.ends(stop, job.prompt) if stop else None
            requests.append(Request(job.prompt, eos_ids=eos_ids, ends=ends, **settings))
        engine.stats = stats
        take_number = None
        if team is not None and team.n_groups > 1:
            take_number = team.queue(len(requests))
        for i, tokens in engine.run(requests, take_number):
            yield News(i, tokens, engine.finish_reasons.get(i), engine.started[i])

    return run_jobs


def answer_prompt(
    engine: Engine, tokenizer: Tokenizer | None, jobs: list[Job], args: Any, stats: Stats
) -> None:
    """Continue one prompt, once or several times, and say what it took."""
    if args.benchmark:  # one run to warm up and compile; its prefill and steps do not count
        warm = Stats()
        for _ in runner(engine, tokenizer, warm)(jobs[:args.batch_size]):
            pass
        stats.compile_s = warm.compile_s
    else:
        watch_prompts(engine)
    answers = answer_live(jobs, runner(engine, tokenizer, stats), tokenizer, quiet=args.json)
    if args.benchmark and stats.speculation is not None and stats.speculation.checked:
        middle = len(jobs[0].prompt) + args.max_new_tokens // 2
        stats.speculation.plain_s = plain_steps(engine, min(middle, engine.context - 1), 16)
    elif not args.benchmark:
        say_cuts([answer.finish_reason for answer in answers])
    summary = summarize(stats, memory_of(engine), args.benchmark)
    say_missing_library(engine.model)
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
        answer_file(jobs, run_jobs, tokenizer, as_json=args.json, records=records, team=team)
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

    def reply(ids: list[int], cached: int, show: Show, attempt: int) -> tuple[list[int], str]:
        settings = {name: getattr(args, name) for name in SETTINGS}
        if args.seed is not None:
            settings["seed"] = (args.seed + attempt) % 2**63
        answer, = generate(
            engine.model, [ids[cached:]], cached=cached, stream=show, engine=engine,
            eos_ids=tokenizer.eos_ids, stop=args.stop, tokenizer=tokenizer, **settings,
        )
        return answer, engine.finish_reasons[0]

    Chat(tokenizer, reply, engine.context, args.stop, system).run()
    say_missing_library(engine.model)


def profile_engine(engine: Engine, jobs: list[Job], args: Any, stats: Stats) -> None:
    """Trace decode steps, after as many to warm up."""
    model = engine.model
    cache = engine.cache
    settings = {name: getattr(args, name) for name in SETTINGS} | {"max_new_tokens": 16}
    prompts = [job.prompt for job in jobs[:args.batch_size]]
    generate(model, prompts, stats=stats, engine=engine, **settings)
    parts = {}
    for name, module in model.layers[0].named_modules():
        if name.endswith("_proj"):
            parts[name] = module_bytes(module)
            if ".experts." in name:  # of which a step reads some
                parts[name] *= model.layers[0].mlp.experts.share(cache.max_batch_size)
    live = sum(bytes_read(cache, length) for length in engine.input_pos.tolist())
    parts["attention"] = live / len(model.layers)
    profile(
        engine.timed_steps, len(model.layers), parts, module_bytes(model.lm_head), args.profile,
        args.device,
    )


def save(args: Any) -> None:
    """--save: quantize while loading, and write a folder that loads like any checkpoint."""
    source = args.checkpoint_path
    source = default_model() if source is None else resolve(source)
    try:
        refuse_existing(args.save)
        began = time.perf_counter()
        model = load(args, source, ALONE)
        save_quantized(model, args.save, partial(save_tokenizer, source))
    except (OSError, SafetensorError) as e:
        raise ValueError(f"cannot write {args.save}: {first_line(e)}") from None
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    n_weights = sum(layer.out_features * layer.in_features for layer in layers)
    before = n_weights * model.dtype.itemsize
    after = sum(x.nbytes for layer in layers for x in layer.stored().values())
    worst = max(layer.error for layer in layers)
    loss = f"largest relative error of a layer {worst:.2%}"
    if args.quantize == "auto":
        loss = "the file's own integers"
    say(
        f"{args.save}: {len(layers)} layers, {before / 1e6:.1f} MB in {args.dtype}, are now "
        f"{after / 1e6:.1f} MB; {loss}; {time.perf_counter() - began:.1f} s"
    )
