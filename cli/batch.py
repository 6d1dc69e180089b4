"""Prompts from files, and their answers batch by batch."""
import sys
from collections.abc import Callable
from pathlib import Path

from formats.tokenizer import TextStream, Tokenizer

Show = Callable[[int, list[int]], None]
Answer = Callable[[list[list[int]], Show | None], list[list[int]]]


def run_batches(
    prompts: list[list[int]],
    batch_size: int,
    tokenizer: Tokenizer | None,
    answer: Answer,
    *,
    live: bool,
    quiet: bool,
) -> list[str]:
    """Continue all prompts, batch_size at a time -> the texts, in the prompts' order.

    answer(batch, show) continues one batch -> each row's new tokens; where show is not None it
    calls show(row, ids) as tokens come. tokenizer: None answers without making text.
    live: with batch_size 1, print text as it comes instead of a batch at its end.
    quiet: print nothing."""
    texts = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start:start + batch_size]
        if tokenizer is None:
            answer(batch, None)
        elif live and batch_size == 1 and not quiet:
            texts.append(answer_live(batch[0], tokenizer, answer))
        else:
            rows = answer(batch, None)
            new = [new_text(tokenizer, prompt, ids) for prompt, ids in zip(batch, rows)]
            if not quiet:
                print(*new, sep="\n", flush=True)
            texts += new
    return texts


def answer_live(prompt: list[int], tokenizer: Tokenizer, answer: Answer) -> str:
    """Continue one prompt and print its text as it comes -> the text."""
    stream = TextStream(tokenizer, prompt)
    pieces = []

    def show(row: int, ids: list[int]) -> None:
        piece = stream.push(ids)
        print(piece, end="", flush=True)
        pieces.append(piece)

    answer([prompt], show)
    rest = stream.push([], final=True)
    print(rest, flush=True)
    return "".join(pieces) + rest


def new_text(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    """The text of new tokens behind a prompt's."""
    return TextStream(tokenizer, prompt).push(ids, final=True)


def read_text(source: str) -> str:
    """--prompt's text: as it is, @FILE, or - for standard input. ValueError: it cannot be read."""
    try:
        if source == "-":
            return sys.stdin.read()
        if source.startswith("@"):
            return Path(source[1:]).read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise ValueError(f"cannot read the prompt {source}: {e}") from None
    return source


def read_lines(path: str) -> list[str]:
    """The lines of a file that are not blank. ValueError: it has none, or cannot be read."""
    lines = [line for line in read_text(f"@{path}").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"no prompts in {path}")
    return lines
