"""The flags of generate.py: what they are, what they may be, and which go together."""
import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from generate import RANGES, Range, add_flags, say
from model import first_line
from quantize import MODES


def number(*limits: Any) -> Callable[[str], int | float]:
    """An argparse type: a number in a Range of generate.py, or of RANGES by its name."""
    allowed = RANGES.get(limits[0]) or Range(*limits)

    def parse(text: str) -> int | float:
        value = allowed.kind(text)
        try:
            return allowed.check("", value)
        except ValueError as e:
            raise argparse.ArgumentTypeError(text + str(e).removeprefix(f": {value}")) from None

    # by which argparse calls it
    parse.__name__ = "whole number" if allowed.kind is int else "number"
    return parse


# what only this folder reads
MORE = {"--prompt": dict(
    help="text, @FILE, - for stdin, or a number of random tokens, as in gpt-fast; @@ begins a "
    "text with @; default: a question")}


def make_parser() -> argparse.ArgumentParser:
    parser = OurParser(
        "generate.py", description="Generate text from a Hugging Face or GGUF checkpoint."
    )
    group = parser.add_argument_group("a prompt and its answer")

    def add(flag: str, **options: Any) -> None:
        group.add_argument(flag, **options | MORE.get(flag, {}))

    add_flags(add, number)
    add_asking(parser)
    add_drawing(parser)
    add_running(parser)
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags of a command line (None: this process's), with their defaults filled in: device as
    a torch.device; compile may stay None, which takes what an earlier run compiled. ValueError
    where a value or a combination is impossible."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check_combinations(parser, args)

    # of the processes that torchrun starts on a machine, each has a GPU of its own
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:
        args.device += f":{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)  # before anything: each process has one to itself

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
    args.group_size = args.group_size or 32
    args.quantize = args.quantize or "auto"
    if args.compile is None and args.device.type == "cuda":
        args.compile = True
    if args.compile_prefill and not args.compile:
        parser.error("--compile_prefill goes with --compile")
    say_what_does_nothing(args)
    return args


def is_number(prompt: str | None) -> bool:
    """Whether --prompt is a number of random tokens."""
    return prompt is not None and prompt.isdecimal()


def is_plain(args: argparse.Namespace) -> bool:
    """Whether one prompt, as it stands, and flags that generate.run knows are all there is."""
    known = ["threads"]  # it is nothing to know of
    add_flags(lambda flag, **options: known.append(flag.removeprefix("--")))
    usual = vars(parse_args([f"--device={args.device}"]))
    if any(value != usual[name] for name, value in vars(args).items() if name not in known):
        return False
    return not (is_number(args.prompt) or str(args.checkpoint_path).endswith(".json"))


def say_what_does_nothing(args: argparse.Namespace) -> None:
    """Greedy decoding draws nothing. Lines of --prompts may have temperatures of their own."""
    if args.temperature > 0 or args.prompts is not None:
        return
    names = ["top_k", "top_p", "min_p"]
    if not is_number(args.prompt):  # random tokens are drawn by the seed
        names.append("seed")
    given = [f"--{name}" for name in names if getattr(args, name) is not None]
    if given:
        say(f"note: {', '.join(given)} changes nothing at --temperature 0, which draws no tokens")


def add_asking(parser: argparse.ArgumentParser) -> None:
    """Other prompts, and how many answers."""
    add = parser.add_argument_group("more to say").add_argument
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
    add("--shift", action="store_true",
        help="with --interactive: forget the oldest turns where the context is full; default: ask")
    add("--num_samples", metavar="N", type=number(int, 1, 10**6), default=1,
        help="answers to each prompt, from 1; with --benchmark or --profile: runs of all rows; "
        "default: 1")
    add("--batch_size", metavar="N", type=number(int, 1, 4096), default=1,
        help="rows at once, 1 to 4096; default: 1")
    add("--stop", metavar="TEXT", action="append", default=[],
        help="end an answer in front of this text; may be given several times; default: none")


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn, and what is said of them."""
    add = parser.add_argument_group("more about drawing tokens").add_argument
    add("--top_p", metavar="P", type=number("top_p"),
        help="sample from the fewest tokens that hold this probability, above 0 to 1; default: 1")
    add("--min_p", metavar="P", type=number("min_p"),
        help="sample from tokens at least P times as likely as the likeliest, 0 to 1; default: 0")
    add("--repetition_penalty", metavar="P", type=number("repetition_penalty"),
        help="divide what speaks for tokens that have come, in the prompt too, above 0 to 100; "
        "default: 1")
    add("--presence_penalty", metavar="P", type=number("presence_penalty"),
        help="take P off the logits of tokens that have come in the answer, -2 to 2; default: 0")
    add("--frequency_penalty", metavar="P", type=number("frequency_penalty"),
        help="the same for each time that they have come, -2 to 2; default: 0")
    add("--json_schema", metavar="FILE",
        help="answer in JSON of this schema (pip install llguidance); default: in any text")
    add("--grammar", metavar="FILE",
        help="answer by this grammar, GBNF or Lark (pip install llguidance); default: none")
    add("--logprobs", metavar="K", type=number("logprobs"),
        help="with --json or --output: log probabilities of each token and of the K likeliest in "
        "its place, from 0; default: none")
    add("--echo", action="store_true", help="with --logprobs: those of the prompt too")
    add("--seed", metavar="N", type=number("seed"),
        help="of the first answer, the next one has the next; the same seed, the same text; "
        "default: new ones")


def add_running(parser: argparse.ArgumentParser) -> None:
    """In which formats it runs, how, what is kept of it, and what it says about itself."""
    add = parser.add_argument_group("speed and memory").add_argument
    add("--max_seq_len", metavar="N", type=number(int, 1),
        help="room in the KV cache, from 1; default: prompt and answer, or one of few sizes above "
        "that, as each is compiled anew: powers of two to 1024, steps of 1024")
    add("--dtype", choices=["bfloat16", "float16", "float32"],
        help="of activations, and of weights that are not quantized; default: bfloat16, on a CPU "
        "float32 where the integers of a GGUF file are kept")
    add("--kv_dtype", choices=["auto", "int8"], default="auto",
        help="of the KV cache; auto, the default: --dtype")
    add("--attention", choices=["auto", "flash", "math"], default="auto",
        help="how decode attends; default: auto")
    add("--compile_prefill", action="store_true", help="with --compile: prefill too")
    add("--tp", metavar="N", type=number(int, 1, 1024),
        help="split the model over N processes that torchrun starts; with more of them, groups of "
        "N share the prompts of --prompts; default: all processes")
    add("--adapter", metavar="FOLDER",
        help="a LoRA as the PEFT library writes it, added to the weights before they are "
        "quantized; what it changes of integers in a file is dequantized; default: none")
    add("--threads", metavar="N", type=number(int, 1, 1024),
        help="of the CPU; default: one a core, or OMP_NUM_THREADS")
    add("--group_size", type=int, choices=[32, 64, 128],
        help="inputs to a scale of --quantize int4; default: 32")
    add("--calibrate", metavar="FILE",
        help="a text like those to come, by which --quantize int8 or int4 rounds better: a few "
        "thousand tokens are enough; default: none")
    add("--save", metavar="FOLDER", type=Path,
        help="write what --quantize makes to this new folder and end; default: nothing written")
    add("--speculate_k", metavar="K", type=number(int, 0, 15), default=0,
        help="check K proposed tokens a step, 0 to 15: those of --draft_checkpoint_path, of a "
        "layer of the checkpoint's own, or what followed in prompt and answer before; the text "
        "stays the same; default: 0")
    add("--draft_checkpoint_path", metavar="PATH",
        help="with --speculate_k: a smaller model with the same tokenizer that proposes; default: "
        "none, but the checkpoint itself, or prompt and answer")
    add("--draft_quantize", choices=MODES,
        help="quantize the draft's weights while loading; default: as the file has them")
    add = parser.add_argument_group("measuring").add_argument
    add("--benchmark", action="store_true",
        help="measure --prompt N random tokens (128) and --max_new_tokens steps")
    add("--json", action="store_true",
        help="print a JSON line for each answer as it comes, as --output does, and at the end one "
        "of flags and statistics")
    add("--profile", metavar="FILE",
        help="write a Chrome trace of 16 decode steps and say what they consist of")


# each is said as it stands where it is broken
RULES = (
    "--prompt goes without --prompts and --interactive",
    "--prompts goes without --interactive and --benchmark",
    "--interactive goes without --json, --benchmark, --profile, --num_samples and --batch_size",
    "--output goes with --prompts",
    "--output goes without --profile",
    "--system goes with --interactive or --chat",
    "--shift goes with --interactive",
    "--stop goes without --benchmark and --profile",
    "--json_schema goes without --grammar",
    "--logprobs goes with --json or --output",
    "--echo goes with --logprobs",
    "--save goes without --prompt, --prompts, --interactive, --benchmark and --profile",
    "--draft_checkpoint_path goes with --speculate_k",
    "--draft_quantize goes with --draft_checkpoint_path",
)


def check_combinations(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """ValueError where flags contradict each other."""
    given = {f"--{name}" for name, value in vars(args).items() if value != parser.get_default(name)}
    for rule in RULES:
        flag, *others = re.findall(r"--\w+", rule)
        if flag in given and given.isdisjoint(others) == (" with " in rule):
            parser.error(rule)
    rounds = args.quantize in MODES
    contradictions = {
        "--group_size goes with --quantize": "--group_size" in given and not rounds,
        "--calibrate goes with --quantize int8 or int4": "--calibrate" in given and not rounds,
        "--save goes with --quantize": "--save" in given and args.quantize in (None, "none"),
        "--output goes to another file than --prompts comes from":
            all(name and os.path.exists(name) for name in (args.output, args.prompts))
            and os.path.samefile(args.output, args.prompts),
        "--stop takes no empty text, which would end every answer at once": "" in args.stop,
        "--benchmark takes its --prompt as a number of random tokens":
            args.benchmark and bool(args.prompt) and not is_number(args.prompt),
    }
    for message, wrong in contradictions.items():
        if wrong:
            parser.error(message)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage, and if help finds a full disk too."""

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse would let go of an OSError

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message:.600}\n")


class OurParser(Parser):
    """Raises what is wrong, for whoever says it of a run."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)
