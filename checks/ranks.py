"""Ranks for tests, forked from a process that has imported everything: a Python that imports torch
takes seconds of a core, a fork takes milliseconds. What they share is as torchrun gives it."""
from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

import cli.program
import generate
from checks.common import CPU_ENV, PATIENCE_S

ENV = {**CPU_ENV, "OMP_NUM_THREADS": "1"}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["checks.ranks", "checks.parallel_worker"])


class Run:
    """n ranks that run a function, each with arguments of its own, and print into one folder."""

    def __init__(
        self, folder: Path, function: Callable[..., Any], arguments: Sequence[tuple],
        stdin: str = "",
    ):
        self.folder = folder
        folder.mkdir()
        (folder / "in").write_text(stdin)
        for name in ("out", "err"):
            (folder / name).touch()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.ranks: list[BaseProcess] = []
        with mock.patch.dict(os.environ, ENV, clear=True):  # of the process that forks, too
            for rank, each in enumerate(arguments):
                place = {
                    "RANK": str(rank), "WORLD_SIZE": str(len(arguments)),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port),
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                }
                process = FORKS.Process(target=start, args=(place, folder, function, *each))
                process.start()
                self.ranks.append(process)

    def wait(self) -> int:
        """As torchrun does: end all when one has failed -> that one's exit code, or 0."""
        end = time.monotonic() + PATIENCE_S
        code = 0
        while any(rank.is_alive() for rank in self.ranks):
            assert time.monotonic() < end, self.said()
            failed = [rank.exitcode for rank in self.ranks if rank.exitcode]
            if failed and not code:
                code = failed[0]
                for rank in self.ranks:
                    rank.terminate()
            time.sleep(0.01)
        return code or max(abs(rank.exitcode) for rank in self.ranks)

    def said(self) -> str:
        return (self.folder / "err").read_text()


def start(place: dict[str, str], folder: Path, function: Callable[..., Any], *args: Any) -> None:
    """Become a rank, whose standard streams are files of that folder."""
    os.environ.update(place)
    for fd, name in enumerate(("in", "out", "err")):
        os.dup2(os.open(folder / name, os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_APPEND), fd)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    try:
        function(*args)
    finally:  # what Python does at its end, and not at that of a fork
        atexit._run_exitfuncs()


def program(flags: Sequence[object], late_s: float = 0.0) -> None:
    """generate.py with these flags. Between ranks nothing may travel as a pickle, which runs code.
    """
    time.sleep(late_s)
    sys.addaudithook(refuse_pickles)
    sys.argv = ["generate.py", *map(str, flags)]
    generate.main()


def refuse_pickles(event: str, args: tuple) -> None:
    if event == "pickle.find_class":
        raise AssertionError(f"a pickle brings in {args}")
