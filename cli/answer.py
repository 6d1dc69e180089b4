"""The program: what one prompt and plain flags ask is generate.run's, the rest cli/program.py's."""
import os
import signal
import sys
from contextlib import nullcontext
from typing import Any

import torch

import generate
from cli.arguments import is_plain, parse_args
from cli.errors import become_a_program, catch_signals, sentences
from cli.prompts import read_prompt
from cli.stats import say_cuts, say_library, say_memory, show_loading, watch_prompts
from model import extension


def main(argv: list[str] | None) -> None:
    """generate.main with all flags."""
    try:
        with sentences():
            if argv is None:
                become_a_program()
            several = {"RANK", "WORLD_SIZE"} & os.environ.keys()  # torchrun has started this one
            with extension("parallel").Team() if several else nullcontext() as team:
                answer(argv, team)
    finally:
        if argv is None:
            catch_signals(signal.SIG_DFL, signal.SIG_DFL)  # Python shuts down: nobody would catch


def answer(argv: list[str] | None, team: Any) -> None:
    """team: the processes that torchrun has started; None without it."""
    args = parse_args(argv)
    if sys.stdout is None and args.output is None and args.save is None:
        raise ValueError("standard output is closed: there is no place for an answer")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    show_loading()
    if team is not None or not is_plain(args):
        for folder in ("batching", "formats", "parallel", "processors"):
            extension(folder)  # it says so where this copy has none
        from cli.program import run
        run(args, team)
        return
    if args.prompt is not None:
        args.prompt = read_prompt(args.prompt)
    decoder = generate.run(args, watch_prompts)
    say_cuts(list(decoder.finish_reasons.values()))
    say_memory(decoder)
    say_library(decoder.model)
