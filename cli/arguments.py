"""The flags of generate.py: what they are, what they may be, and which go together."""
import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from formats.checkpoint import first_line

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def number(
    kind: type[int] | type[float], low: float, high: float = float("inf"), above: bool = False
) -> Callable[[str], Any]:
    """An argparse type, which takes numbers too: from low (above: just over it) to high."""
    bounds = f"{'above' if above else 'at least'} {low}"
    if high < float("inf"):
        bounds += f" and at most {high}"

    def parse(text: str | int | float) -> int | float:
        value = kind(text)
        too_low = above and value == low
        if too_low or not low <= value <= high:  # NaN fails the second
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    # argparse names the type where kind(text) fails
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


# what a request may set for itself, by flag or in a line of --prompts, and what it may be
SETTINGS = {
    "max_new_tokens": number(int, 1),
    "temperature": number(float, 0, 1000),
    "top_k": number(int, 1, 2**31 - 1),
    "top_p": number(float, 0, 1, above=True),
    "min_p": number(float, 0, 1),
    "seed": number(int, 0, 2**63 - 1),
}


def stop_text(text: str) -> str:
    """An argparse type: a text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("an empty text would end every answer at once")
    return text


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags of a command line (None: this process's), checked, with their defaults filled in.

    Leaves by exit code 2 and one line on stderr where a value or a combination is impossible.
    In the result device is a torch.device, dtype a key of DTYPES or None, which leaves it to the
    file, and compile True, False, or None, which takes what an earlier run compiled."""
    parser = Parser(
        "generate.py", description="Generate text from a Hugging Face or GGUF checkpoint."
    )
    add_text(parser.add_argument_group("what to say"))
    add_sampling(parser.add_argument_group("sampling"))
    add_speed(parser.add_argument_group("speed and memory"))
    add_measuring(parser.add_argument_group("measuring"))
    args = parser.parse_args(argv)
    check_combinations(parser, args)

    # of the processes that torchrun starts on a machine, each has a GPU of its own
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:
        n = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if n > torch.cuda.device_count():
            parser.error(f"{n} processes need as many GPUs; here are {torch.cuda.device_count()}")
        args.device += f":{os.environ['LOCAL_RANK']}"

    # a device is checked by using it
    try:
        probe = torch.empty(1, device=args.device)
        probe.tolist()
        args.device = probe.device
    except Exception as e:  # of many kinds, from PyTorch and from what it would import
        parser.error(f"--device {args.device}: {first_line(e)}")

    # defaults that depend on other flags
    if args.benchmark and not args.prompt:
        args.prompt = "128"
    if args.group_size is None:
        args.group_size = 32
    if args.quantize is None:
        args.quantize = "auto"
    if args.dtype is None:
        args.dtype = default_dtype(args.checkpoint_path)
    if args.compile is None and args.device.type == "cuda":
        args.compile = True
    if args.compile_prefill and not args.compile:
        parser.error("--compile_prefill goes with --compile")
    say_what_does_nothing(args)
    return args


def say_what_does_nothing(args: argparse.Namespace) -> None:
    """Greedy decoding draws nothing. Lines of --prompts may have temperatures of their own."""
    if args.temperature > 0 or args.prompts is not None:
        return
    names = ["top_k", "top_p", "min_p"]
    if not (args.prompt and args.prompt.isdecimal()):  # random tokens are drawn by the seed
        names.append("seed")
    given = [f"--{name}" for name in names if getattr(args, name) is not None]
    if given:
        say(f"note: {', '.join(given)} changes nothing at --temperature 0, which draws no tokens")


def default_dtype(path: str | None) -> str | None:
    if path is None:
        return "float32"
    if path.endswith(".gguf"):
        return None  # by whether its weights are quantized
    return "bfloat16"


def add_text(group: argparse._ArgumentGroup) -> None:
    """Which model, which prompts, how many answers and how long."""
    add = group.add_argument
    add("--checkpoint_path", metavar="PATH",
        help="Hugging Face folder or hub id, .gguf file, folder that --save wrote, or a bare "
        "config.json for random weights; default: SmolLM2-135M-Instruct, fetched once")
    add("--prompt", metavar="TEXT",
        help="text, @FILE, - for stdin, or a number of random tokens, as in gpt-fast; @@ begins a "
        "text with @; default: a question")
    add("--prompts", metavar="FILE",
        help="one prompt a line, - for stdin. JSON lines if FILE ends in .jsonl or its first line "
        "begins with {: objects of prompt (text) or messages (a conversation) and, instead of the "
        "flags, max_new_tokens, temperature, top_k, top_p, min_p, seed, stop (a list). A bad line "
        "is reported and skipped; exit code 2 if no prompt could be answered")
    add("--output", metavar="FILE",
        help="with --prompts: append a JSON line for each answer as it comes; started again, go on "
        "behind those that FILE has; default: answers are printed")
    add("--interactive", action="store_true",
        help="chat in the model's own template; /help lists its commands, Ctrl-C ends an answer, "
        "Ctrl-D the chat")
    add("--chat", action="store_true",
        help="put each prompt into the model's chat template")
    add("--system", metavar="TEXT",
        help="with --interactive or --chat: text or @FILE that says how to answer; default: the "
        "template's own")
    add("--num_samples", metavar="N", type=number(int, 1, 10**6), default=1,
        help="answers to each prompt, from 1; with --benchmark or --profile: runs of all rows; "
        "default: 1")
    add("--max_new_tokens", metavar="N", type=SETTINGS["max_new_tokens"], default=200,
        help="most new tokens, from 1; default: 200")
    add("--batch_size", metavar="N", type=number(int, 1, 4096), default=1,
        help="rows at once, 1 to 4096; default: 1")
    add("--stop", metavar="TEXT", type=stop_text, action="append", default=[],
        help="end an answer in front of this text; may be given several times; default: none")


def add_sampling(group: argparse._ArgumentGroup) -> None:
    """How the next token is drawn."""
    add = group.add_argument
    add("--temperature", metavar="T", type=SETTINGS["temperature"], default=0.0,
        help="0 to 1000, 0 is greedy; default: 0")
    add("--top_k", metavar="K", type=SETTINGS["top_k"],
        help="sample from the K likeliest tokens, from 1; default: all")
    add("--top_p", metavar="P", type=SETTINGS["top_p"],
        help="sample from the fewest tokens that hold this probability, above 0 to 1; default: 1")
    add("--min_p", metavar="P", type=SETTINGS["min_p"],
        help="sample from tokens at least P times as likely as the likeliest, 0 to 1; default: 0")
    add("--seed", metavar="N", type=SETTINGS["seed"],
        help="of the first answer, the next one has the next; the same seed, the same text; "
        "default: new ones")


def add_speed(group: argparse._ArgumentGroup) -> None:
    """Where the model runs, in which formats, and whether it is compiled."""
    add = group.add_argument
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--max_seq_len", metavar="N", type=number(int, 1),
        help="room in the KV cache; default: prompt and answer")
    add("--tp", metavar="N", type=number(int, 1, 1024),
        help="split the model over N processes that torchrun starts; with more of them, groups of "
        "N share the prompts of --prompts; default: all processes")
    add("--device", default=default_device,
        help="cpu, cuda, ...; default: cuda")
    add("--threads", metavar="N", type=number(int, 1, 1024),
        help="of the CPU; default: one a core, or OMP_NUM_THREADS")
    add("--dtype", choices=DTYPES,
        help="of activations, and of weights that are not quantized; default: bfloat16, float32 "
        "for the default model and where the integers of a GGUF file are kept")
    add("--quantize", choices=["auto", "none", "int8", "int4"],
        help="auto: weights as the file has them, those of a quantized GGUF as integers; none: "
        "dequantized; int8, int4: quantized while loading; default: auto")
    add("--group_size", type=int, choices=[32, 64, 128],
        help="inputs to a scale of --quantize int4; default: 32")
    add("--save", metavar="FOLDER", type=Path,
        help="write what --quantize makes to this new folder and end; default: nothing written")
    add("--kv_dtype", choices=["auto", "int8"], default="auto",
        help="of the KV cache; auto, the default: --dtype")
    add("--speculate_k", metavar="K", type=number(int, 0, 15), default=0,
        help="check K proposed tokens a step, 0 to 15: those of --draft_checkpoint_path, or what "
        "followed in prompt and answer before; the text stays the same; default: 0")
    add("--draft_checkpoint_path", metavar="PATH",
        help="with --speculate_k: a smaller model with the same tokenizer that proposes; default: "
        "none, but prompt and answer themselves")
    add("--draft_quantize", choices=["int8", "int4"],
        help="quantize the draft's weights while loading; default: as the file has them")
    add("--attention", choices=["auto", "flash", "math"], default="auto",
        help="how decode attends; default: auto")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="compile the decode step; default: on CUDA. On a CPU that takes some 15 "
        "seconds; later runs find what it made for one row, and decode with it")
    add("--compile_prefill", action="store_true",
        help="with --compile: prefill too")


def add_measuring(group: argparse._ArgumentGroup) -> None:
    """What a run says about itself."""
    add = group.add_argument
    add("--benchmark", action="store_true",
        help="measure --prompt N random tokens (128) and --max_new_tokens steps")
    add("--json", action="store_true",
        help="print texts and statistics as one JSON line; with --prompts, a line for each answer "
        "as it comes")
    add("--profile", metavar="FILE",
        help="write a Chrome trace of 16 decode steps and say what they consist of")


def check_combinations(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Leave with a sentence where flags contradict each other."""
    # one source of prompts
    sources = [args.prompt is not None, args.prompts is not None, args.interactive]
    if sources.count(True) > 1:
        parser.error("--prompt, --prompts and --interactive exclude each other")
    if args.output is not None and (args.prompts is None or args.profile):
        parser.error("--output goes with --prompts and without --profile")
    if args.interactive:
        measured = args.json or args.benchmark or args.profile
        if measured or args.num_samples > 1 or args.batch_size > 1:
            parser.error(
                "--interactive goes without --json, --benchmark, --profile, --num_samples and "
                "--batch_size"
            )

    if args.system is not None and not (args.interactive or args.chat):
        parser.error("--system goes with --interactive or --chat")

    # quantizing, and saving what it makes
    quantizes = args.quantize in ("int8", "int4")
    if args.group_size is not None and not quantizes:
        parser.error("--group_size goes with --quantize")
    if args.save is not None:
        if args.quantize in (None, "none"):
            parser.error("--save goes with --quantize")
        if any(sources) or args.benchmark or args.profile:
            parser.error(
                "--save goes without --prompt, --prompts, --interactive, --benchmark and --profile"
            )

    # a draft proposes to somebody
    if args.draft_checkpoint_path is not None and not args.speculate_k:
        parser.error("--draft_checkpoint_path goes with --speculate_k")
    if args.draft_quantize is not None and args.draft_checkpoint_path is None:
        parser.error("--draft_quantize goes with --draft_checkpoint_path")

    # a benchmark makes no text of tokens, and its prompt is a number of them
    if args.stop and (args.benchmark or args.profile):
        parser.error("--stop goes without --benchmark and --profile")
    if args.benchmark:
        words = args.prompt and not args.prompt.isdecimal()
        if args.prompts is not None or words:
            parser.error("--benchmark takes its --prompt as a number of random tokens")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {cut(message)}\n")


def say(text: str, end: str = "\n") -> None:
    """Print on stderr: stdout is for what the model says. Nobody has to listen."""
    with suppress(OSError):
        print(text, end=end, file=sys.stderr, flush=True)


def cut(message: str) -> str:
    """A message with the middle left out if it is long, as a path of thousands of characters is."""
    if len(message) <= 600:
        return message
    return f"{message[:300]} ... {message[-250:]}"
