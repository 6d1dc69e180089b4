"""What a terminal asks for beyond one prompt: files of prompts, chat, measuring, saving."""
import json
import math
import shutil
import time
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from batching import Engine, Stats
from cli.arguments import is_number
from cli.batch import Records, answer_jobs, print_record
from cli.chat import Chat
from cli.files import in_place_of, trying_to
from cli.prompts import (
    SETTINGS, Asked, Job, check_template, read_file, read_jobs, read_lines, read_prompt, read_text,
    samples, standard_input, title_of, with_system,
)
from cli.stats import plural, profile, read_trace, say_cuts, say_library, summarize, watch_prompts
from formats import save_tokenizer
from formats.checkpoint import open_checkpoint, resolve
from generate import (
    NO_TEXT, QUESTION, Request, Tokenizer, few_sizes, generate, load_tokenizer, prepare_steps, say,
)
from model import Checkpoint, ModelConfig, Transformer
from parallel import ALONE, Ranks, Team, load_model
from processors import Grammar
from quantize import QuantizedLinear, new_folder, write_quantized


def run(args: Any, team: Team | None) -> None:
    """Read what is asked, and do what the flags ask for. team: None: this process is alone."""
    team = team or Team()
    single = [flag for flag in ("calibrate", "save", "profile") if getattr(args, flag) is not None]
    if team.n > 1 and single:
        raise ValueError(f"--{single[0]} takes one process: run it without torchrun")
    if args.save is not None:
        return save(args)
    team.form_groups(args.tp, args.device.type)
    asked = Asked(*team.broadcast(read_asked(args) if team.is_first else None))
    records = trace = nullcontext()
    if args.profile is not None:
        trace = in_place_of(args.profile, read_trace)
    elif args.output is not None and team.is_first:
        records = Records(args.output)
    with records as records, trace as trace:
        answer(args, asked, team, records, trace)


def answer(
    args: Any, asked: Asked, team: Team, records: Records | None, trace: Path | None
) -> None:
    """Load, prepare, answer. records: of --output, in the first process; trace: of --profile."""
    tokenizer, engine = None, None
    if not args.benchmark and not str(args.checkpoint_path).endswith(".json"):
        tokenizer = load_tokenizer(args.checkpoint_path)
    began = time.perf_counter()
    checkpoint = open_checkpoint(args.checkpoint_path, args.device)
    config = checkpoint.empty_model().config
    if tokenizer is not None:
        tokenizer.check_fit(config.vocab_size)
    if args.max_seq_len is not None and args.max_seq_len > config.max_seq_len:
        raise ValueError(
            f"--max_seq_len {args.max_seq_len} exceeds the model's context of "
            f"{config.max_seq_len} tokens"
        )
    settings = {name: getattr(args, name, None) for name in SETTINGS}
    jobs = wanted(args, asked, tokenizer, config, settings)
    left = list(range(len(jobs))) if records is None else records.left_of(jobs)
    left = [jobs[number] for number in team.broadcast(left)]
    if len(left) < len(jobs):
        n_done = plural(len(jobs) - len(left), "answer")
        say(f"{args.output} has {n_done} already; {len(left)} are left")
    processors = ()
    if asked.grammar is not None and tokenizer is not None:
        kind = "grammar" if args.json_schema is None else "json_schema"
        processors = (Grammar(kind, asked.grammar, tokenizer, config.vocab_size),)
    more = {"processors": processors, "echo": args.echo or None}
    for job in left:
        job.settings.update(more)
    if args.prompts is None or any(job.error is None for job in left):  # others need no model
        model = load(args, team.ranks, checkpoint, asked.calibrate)
        load_s = time.perf_counter() - began
        engine = make_engine(args, model, tokenizer, jobs, team)
        engine.stats.load_s = load_s
    if args.interactive:
        team.share_input(standard_input())
        watch_prompts(engine)
        Chat(engine, tokenizer, settings | more, asked.system, args.shift).run()
    elif args.profile:
        prompts = [job.prompt for job in jobs if not job.error][:args.batch_size]
        settings["max_new_tokens"] = 16  # to warm up
        generate(model, prompts, stats=engine.stats, engine=engine, **settings | more)
        profile(engine, trace)
    else:
        answer_prompts(args, jobs, left, engine, tokenizer, records, team)
    if engine is not None:
        say_run(args, engine)


def answer_prompts(
    args: Any, jobs: list[Job], left: list[Job], engine: Engine | None,
    tokenizer: Tokenizer | None, records: Records | None, team: Team,
) -> None:
    """Answer those jobs that are left, and say what is to be said of all answers."""
    if args.benchmark:  # one run to warm up and compile; its prefill and steps do not count
        answer_jobs(jobs[:args.batch_size], engine, None)
        engine.stats = Stats(load_s=engine.stats.load_s, compile_s=engine.stats.compile_s)
    elif args.prompts is None:
        watch_prompts(engine)
    write = print_record if args.json and tokenizer is not None else None
    if records is not None:
        write = records.append
    answers = answer_jobs(
        left, engine, tokenizer, write=write, n_done=len(jobs) - len(left),
        team=None if args.prompts is None else team,
    )
    reasons = [record.get("finish_reason", "error") for record in answers]
    if not args.benchmark:
        say_cuts(reasons)
    if all(job.error for job in jobs):
        n = plural(len(jobs), "prompt")
        raise ValueError(f"none of the {n} of {args.prompts} could be answered")
    ended_at_once = any(r == "eos" and x["new_tokens"] == 1 for r, x in zip(reasons, answers))
    if ended_at_once and tokenizer.chat_template and args.prompt and not args.chat:
        say(NO_TEXT)


def say_run(args: Any, engine: Engine) -> None:
    """What it took, also as a line of JSON."""
    measured = not args.interactive and engine.stats.new_tokens > 0
    summary = (summarize(engine, args.benchmark) or {}) if measured else {}
    summary["library"] = say_library(engine.model)
    if args.json:
        print_record(vars(args) | summary)


def read_asked(args: Any) -> Asked:
    """What the flags ask about. ValueError: a file of theirs cannot be read."""
    if args.draft_checkpoint_path is not None:
        resolve(args.draft_checkpoint_path)
    has_text = args.prompt is not None and not is_number(args.prompt)
    grammar = args.grammar if args.json_schema is None else args.json_schema
    return Asked(
        lines=[] if args.prompts is None else read_lines(args.prompts),
        text=read_prompt(args.prompt) if has_text else None,
        system=args.system and read_text(args.system, "the system message").strip(),
        grammar=None if grammar is None else read_file(grammar, f"the grammar {grammar}"),
        calibrate=read_calibrate(args),
    )


def read_calibrate(args: Any) -> str | None:
    file = args.calibrate
    return None if file is None else read_file(file, f"--calibrate {file}")


def load(args: Any, ranks: Ranks, source: Checkpoint, text: str | None) -> Transformer:
    """The model, calibrated on a text. args.dtype becomes the one that it has."""
    calibrate = None if text is None else load_tokenizer(args.checkpoint_path).encode(text)
    model = load_model(
        source, ranks, device=args.device, dtype=args.dtype and getattr(torch, args.dtype),
        quantize=args.quantize, group_size=args.group_size, adapter=args.adapter,
        calibrate=calibrate,
    )
    args.dtype = str(model.dtype).removeprefix("torch.")
    return model


def load_draft(
    args: Any, model: Transformer, tokenizer: Tokenizer | None, ranks: Ranks
) -> Transformer:
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
        path, ranks, device=args.device, dtype=model.dtype, quantize=args.draft_quantize or "auto",
        group_size=args.group_size,
    )


def wanted(
    args: Any, asked: Asked, tokenizer: Tokenizer | None, config: ModelConfig,
    settings: dict[str, Any],
) -> list[Job]:
    """The answers that the flags ask for, with the settings that flags give."""
    if args.interactive and tokenizer is not None:
        return []
    room = args.max_seq_len or config.max_seq_len
    n_samples = args.num_samples
    if args.benchmark or args.profile:  # a measurement is of full rows
        n_samples *= args.batch_size

    def encode(entry: dict[str, Any]) -> list[int]:
        if "messages" in entry:
            prompt = tokenizer.chat(entry["messages"])
        elif args.chat:
            message = {"role": "user", "content": entry["prompt"]}
            prompt = tokenizer.chat(with_system(asked.system, [message]))
        else:
            prompt = tokenizer.encode(entry["prompt"])
        Request(prompt, 1).budget(config.vocab_size, room)
        return prompt

    if is_number(args.prompt):
        n = min(int(args.prompt), room)  # more do not fit anyway
        generator = torch.Generator().manual_seed(args.seed or 0)
        prompt = torch.randint(config.vocab_size, (n,), generator=generator).tolist()
        Request(prompt, 1).budget(config.vocab_size, room)
        if tokenizer is not None and not args.profile:
            say(
                f"--prompt {args.prompt} is {args.prompt} random tokens, as in gpt-fast; for this "
                f"text: printf {args.prompt} | python generate.py --prompt -"
            )
        return samples(0, f"{len(prompt)} random tokens", prompt, settings, n_samples)
    if tokenizer is None:
        raise ValueError(
            "a bare config.json has no tokenizer: give --prompt a number of random tokens"
        )
    if asked.system is not None:
        check_template(tokenizer, asked.system)
    if args.prompts is not None:
        by = answered_by(args, asked, room)
        return read_jobs(asked.lines, encode, settings, args.num_samples, by)
    entry = {"prompt": QUESTION if asked.text is None else asked.text}
    if asked.text is None and tokenizer.chat_template and not args.chat:
        entry = {"messages": [{"role": "user", "content": QUESTION}]}
    return samples(0, title_of(entry), encode(entry), settings, n_samples)


def answered_by(args: Any, asked: Asked, room: int) -> str:
    """What makes the answers of a file, beside prompts and their settings."""
    text = asked.calibrate and sha256(asked.calibrate.encode()).hexdigest()
    return json.dumps([
        files_of(args.checkpoint_path), args.dtype, args.quantize, args.group_size, room, text,
        args.kv_dtype, args.adapter and files_of(args.adapter), asked.grammar,
        *["echo"] * args.echo,
    ])


def files_of(path: str | None) -> list[Any]:
    """What tells a checkpoint from another one, at the same path too: of each file with weights or
    settings its name, size, time and a hash of its beginning, where headers are."""
    source = resolve(path)
    # others come and go, as answers do
    kinds = (".safetensors", ".bin", ".gguf", "config.json", "tokenizer.json", "tokenizer.model")
    found = []
    for file in sorted(source.iterdir()) if source.is_dir() else [source]:
        if file.name.endswith(kinds) and file.is_file():
            with open(file, "rb") as content:
                digest = sha256(content.read(2**16)).hexdigest()
            found.append([file.name, file.stat().st_size, file.stat().st_mtime_ns, digest])
    return found


def make_engine(
    args: Any, model: Transformer, tokenizer: Tokenizer | None, jobs: list[Job], team: Team
) -> Engine:
    """An engine with the rows that the flags say, and room for the longest job."""
    needed = [8192 if args.interactive else 1]
    needed += [len(job.prompt) + job.settings["max_new_tokens"] for job in jobs if not job.error]
    room = args.max_seq_len or min(max(needed), model.config.max_seq_len)
    # groups that share a file of prompts are to have rows for a fair share of them at most
    rows = args.batch_size
    if team.n_groups > 1 and args.prompts is not None:
        rows = min(rows, math.ceil(len(jobs) / team.n_groups))
    kv_dtype = torch.int8 if args.kv_dtype == "int8" else None
    # a step that checks proposals writes as many places behind the last token
    size = room + args.speculate_k
    size = few_sizes(size) if args.compile and args.max_seq_len is None else size
    model.setup_caches(rows, size, kv_dtype, args.attention)
    draft = None
    if args.draft_checkpoint_path is not None:
        draft = load_draft(args, model, tokenizer, team.ranks)
    for each in filter(None, (model, draft)):
        compiled = prepare_steps(each, args.compile, rows, args.compile_prefill)
    return Engine(model, compiled=compiled, speculate_k=args.speculate_k, draft=draft, context=room)


def save(args: Any) -> None:
    """--save: quantize while loading, and write a folder that loads like any checkpoint."""
    args.checkpoint_path = resolve(args.checkpoint_path)
    began = time.perf_counter()
    # what cannot be written shows before the long work
    with trying_to(f"write {args.save}"), new_folder(args.save) as folder:
        save_tokenizer(args.checkpoint_path, folder)
        checkpoint = open_checkpoint(args.checkpoint_path, args.device)
        n_weights = sum(w.numel() for w in checkpoint.empty_model().parameters())
        least = n_weights * (1 if args.quantize == "int8" else 0.5)  # bytes
        if shutil.disk_usage(folder).free < least:
            raise ValueError(
                f"{args.save} takes at least {least / 1e6:.1f} MB, which its disk lacks"
            )
        model = load(args, ALONE, checkpoint, read_calibrate(args))
        write_quantized(model, folder)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    before = sum(layer.out_features * layer.in_features for layer in layers) * model.dtype.itemsize
    after = sum(x.nbytes for layer in layers for x in layer.stored().values())
    loss = f"largest relative error of a layer {max(layer.error for layer in layers):.2%}"
    if args.quantize == "auto":
        loss = "the file's own integers"
    say(
        f"{args.save}: {len(layers)} layers, {before / 1e6:.1f} MB in {args.dtype}, are now "
        f"{after / 1e6:.1f} MB; {loss}; {time.perf_counter() - began:.1f} s"
    )
