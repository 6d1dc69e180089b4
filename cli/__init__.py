"""What a terminal wants: more flags, a conversation, files of prompts, what a run took.

This file is read before PyTorch, whose import takes seconds."""
from __future__ import annotations

import os
import signal
import sys
from typing import Any


def begin() -> None:
    """While libraries load: what is missing is said in one sentence, and Ctrl-C ends the program
    without a word. OSError where MKL could not load."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # or the next open would be taken for it
    sys.excepthook = refuse
    if not os.stat(".").st_nlink:
        raise OSError("the current folder has been deleted: MKL does not load in it")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def refuse(kind: type, error: BaseException, traceback: Any) -> None:
    """An excepthook: memory or a package is missing, in one sentence."""
    if not issubclass(kind, (ImportError, MemoryError, OSError)):
        return sys.__excepthook__(kind, error, traceback)
    *_, said = ["there is not enough memory", *str(error).splitlines()]
    print(f"generate.py: error: {said}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None) -> None:
    """generate.main with all flags."""
    from cli.answer import main
    main(argv)
