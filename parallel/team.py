"""The processes that torchrun started: groups of ranks with a model each, and one queue of work."""
from __future__ import annotations

import atexit
import ctypes
import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TextIO

import torch
import torch.distributed as dist

from parallel.ranks import ALONE, Ranks, T

CONNECT_S = 4.0  # to find torchrun's table, which is there before any process is
JOIN_S = 8.0  # for all processes to come: torchrun starts them together
SAY_S = 5.0  # for the one that failed first to say why
PATIENCE = timedelta(days=1)  # of one that waits for another: a user may think before typing
POLL_S = 0.05  # between looks at what other groups have answered


class Team:
    """All processes of a run, of which the first one speaks. As a context it ends them together: of
    those that fail, which is all of them where one does, the first to fail says why, and no other
    leaves before, since torchrun ends all when one has left.

    ValueError: what torchrun sets in the environment makes no sense, or its table is not found."""

    def __init__(self) -> None:
        self.number, self.n = 0, 1  # of this process, from 0, and of all
        if {"RANK", "WORLD_SIZE"} & os.environ.keys():  # torchrun says so
            self.n = from_environment("WORLD_SIZE", 1, 2**15)
            self.number = from_environment("RANK", 0, self.n - 1)
        self.ranks = ALONE
        self.n_groups = 1
        self.everyone = ALONE  # all processes, for the host's values
        self.store: dist.Store | None = None  # torchrun's table of keys and values
        self.looked = 0.0  # when answers were last looked for
        self.n_received = 0
        self.stderr = sys.stderr  # where one that is muted says why it fails
        if self.n > 1:
            end_with_torchrun()
            self.store = find_store(self.number, self.n)
        if not self.is_first:
            sys.stdout = sys.stderr = open(os.devnull, "w")

    def form_groups(self, tp: int | None, device: str) -> None:
        """Wait for all processes, and make groups of tp ranks, by default one of all. ValueError:
        there are too few, they do not come, do not divide, or have other arguments."""
        tp = tp or self.n
        if self.n == 1 and tp > 1:
            raise ValueError(
                f"--tp {tp} takes {tp} processes: torchrun --nproc_per_node={tp} generate.py ..."
            )
        if self.n % tp:
            raise ValueError(f"{self.n} processes do not divide into groups of --tp {tp}")
        if self.n == 1:
            return
        self.n_groups = self.n // tp
        self.wait_for_all()
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("everyone", self.store), rank=self.number,
            world_size=self.n, timeout=PATIENCE,
        )
        self.everyone = Ranks(self.number, self.n, control=dist.group.WORLD)
        self.check_arguments()
        # each of tp neighbours
        control, _ = dist.new_subgroups(tp, timeout=PATIENCE, backend="gloo")
        tensors = control
        if device == "cuda":
            tensors, _ = dist.new_subgroups(tp, timeout=PATIENCE, backend="nccl")
        self.ranks = Ranks(self.number % tp, tp, tensors, control)

    def wait_for_all(self) -> None:
        there = self.store.add("joined", 1)
        began = time.perf_counter()
        while there < self.n:
            if time.perf_counter() - began > JOIN_S:
                raise ValueError(
                    f"only {there} of {self.n} processes have come within {JOIN_S:.0f} s"
                )
            time.sleep(0.02)
            there = self.store.add("joined", 0)

    def check_arguments(self) -> None:
        """ValueError: they are not the same, and processes would wait for each other. Paths are,
        where each machine has its own."""
        ours = sys.argv[1:]
        first = self.broadcast(ours)
        pairs = zip_longest(ours, first, fillvalue="")
        differs = any(a != b and not os.path.exists(a) for a, b in pairs)
        other = int(self.everyone.largest(torch.tensor(self.number * differs)))
        if other:
            raise ValueError(f"process {other} was started with other arguments than the first")

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that reads and speaks."""
        return self.number == 0

    def broadcast(self, value: T) -> T:
        """What the first process says, for all of them; see Ranks.broadcast."""
        return self.everyone.broadcast(value)

    def share_input(self, source: TextIO) -> None:
        """From now on all processes read together what the first one reads from its source."""
        if self.everyone is not ALONE:
            sys.stdin = SharedInput(self, source)

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        if error is None and self.everyone is not ALONE:
            with suppress(RuntimeError):  # nobody is missed now
                dist.barrier()  # who leaves earlier breaks the others' ties
            dist.destroy_process_group()
        elif isinstance(error, Exception) and self.store is not None:
            self.let_the_first_to_fail_speak()
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                reason = str(error).splitlines()[0]
                raise ValueError(f"another process has gone: {reason}") from error

    def let_the_first_to_fail_speak(self) -> None:
        sys.stderr = open(os.devnull, "w")
        mine = str(self.number)
        with suppress(RuntimeError):  # torchrun, whose table it is, has gone
            if self.store.compare_set("failed", "", mine).decode() == mine:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                sys.stderr = self.stderr
                atexit.register(self.have_spoken)
            else:
                self.store.wait(["said"], timedelta(seconds=SAY_S))

    def have_spoken(self) -> None:
        with suppress(RuntimeError):
            self.store.set("said", "")

    # --- one queue of work for all groups ---

    def take_number(self, n: int) -> int | None:
        """The next of n numbers that no group has taken yet, the same for all ranks of a group;
        None behind the last."""
        is_first = self.ranks.rank == 0
        number = self.ranks.broadcast(self.store.add("taken", 1) - 1 if is_first else None)
        return number if number < n else None

    def send(self, number: int, record: dict[str, Any]) -> None:
        """Give an answer to the first process, which keeps them."""
        if self.ranks.rank == 0:
            place = self.store.add("answers", 1) - 1
            self.store.set(f"answer {place}", json.dumps([number, record]))

    def receive(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The answers that other groups have sent since the last look, but for the very latest."""
        if self.n_groups == 1 or time.perf_counter() - self.looked < POLL_S:
            return
        self.looked = time.perf_counter()
        for place in range(self.n_received, self.store.add("answers", 0)):
            number, record = json.loads(self.store.get(f"answer {place}"))
            self.n_received += 1
            yield number, record


def from_environment(name: str, low: int, high: int) -> int:
    """A number that torchrun sets. ValueError: it is none from low to high."""
    text = os.environ.get(name, "")
    if not text.isdecimal() or len(text) > 9 or not low <= int(text) <= high:
        raise ValueError(
            f"{name}={text} in the environment is no number from {low} to {high}: torchrun sets it "
            "for the processes that it starts; without torchrun, unset RANK and WORLD_SIZE"
        )
    return int(text)


def end_with_torchrun() -> None:
    """Let Linux end this process when torchrun has ended, which one that waits cannot see."""
    if dist.is_torchelastic_launched() and sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class SharedInput(io.TextIOBase):
    """Standard input of the first process, whose lines all of them read together."""

    def __init__(self, team: Team, source: TextIO):
        self.team = team
        self.source = source

    def readline(self) -> str:
        return self.team.broadcast(self.source.readline() if self.team.is_first else None)


def find_store(number: int, n: int) -> dist.Store:
    """torchrun's table, of which each start of n processes has a part of its own."""
    from_environment("MASTER_PORT", 0, 2**16 - 1)
    patience = timedelta(seconds=CONNECT_S)
    try:
        store, _, _ = next(dist.rendezvous("env://", number, n, timeout=patience))
    except (RuntimeError, ValueError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f"process {number} of {n} finds no others: {reason}") from None
    store.set_timeout(PATIENCE)  # NCCL asks it long after: behind loading and compiling
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"gpt-flash {restarts}", store)
