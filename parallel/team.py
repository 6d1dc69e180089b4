"""The processes that torchrun started: groups of ranks with a model each, and one queue of work."""
from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from parallel.ranks import ALONE, Ranks, T, from_first

CONNECT_S = 4.0  # to find torchrun's table, which is there before any process is
JOIN_S = 8.0  # for all processes to come: torchrun starts them together
PATIENCE = timedelta(days=1)  # of one that waits for another: a user may think before typing
POLL_S = 0.05  # between looks at what other groups have answered


class Team:
    """All processes of a run: groups of ranks with a model each, which share one queue of work. As
    a context it ends them together: of those that fail, which is all of them where one does, the
    first says why.

    tp: the ranks of a group, by default all processes. ValueError: there are too few, they do not
    come, or do not divide into groups."""

    def __init__(self, tp: int | None, device: str):
        self.n = n_processes()
        self.number = process_number()
        self.ranks = ALONE
        self.n_groups = 1
        self.everyone: dist.ProcessGroup | None = None  # moves the host's objects
        self.store: dist.Store | None = None  # torchrun's table of keys and values
        self.looked = 0.0  # when answers were last looked for
        self.n_received = 0
        tp = tp or self.n
        if self.n == 1 and tp > 1:
            raise ValueError(
                f"--tp {tp} takes {tp} processes: torchrun --nproc_per_node={tp} generate.py ..."
            )
        if self.n % tp:
            raise ValueError(f"{self.n} processes do not divide into groups of --tp {tp}")
        if self.n > 1:
            self.n_groups = self.n // tp
            self.store = meet(self.number, self.n)
            self.form_groups(tp, device)

    def form_groups(self, tp: int, device: str) -> None:
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("everyone", self.store), rank=self.number,
            world_size=self.n, timeout=PATIENCE,
        )
        self.everyone = dist.group.WORLD
        # every process takes part in making every group
        for first in range(0, self.n, tp):
            members = list(range(first, first + tp))
            control = dist.new_group(members, timeout=PATIENCE, backend="gloo")
            tensors = control
            if device == "cuda":
                tensors = dist.new_group(members, timeout=PATIENCE, backend="nccl")
            if self.number in members:
                self.ranks = Ranks(self.number - first, tp, tensors, control)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that reads and speaks."""
        return self.number == 0

    def broadcast(self, value: T) -> T:
        """What the first process says, for all of them."""
        return from_first(value, self.everyone)

    def share_input(self) -> None:
        """From now on all processes read together what the first one reads from standard input."""
        if self.everyone is not None:
            sys.stdin = io.TextIOWrapper(io.BufferedReader(SharedInput(self)), encoding="utf-8")

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        if self.everyone is None:
            return
        if error is None:
            dist.barrier(self.everyone)  # who leaves earlier breaks the others' ties
            dist.destroy_process_group()
        elif isinstance(error, Exception):
            sys.stderr = open(os.devnull, "w")
            if self.is_first_to_fail():
                sys.stderr = sys.__stderr__
            if is_lost_peer(error):
                reason = str(error).splitlines()[0]
                raise ValueError(f"another process has gone: {reason}") from error

    # --- one queue of work for all groups ---

    def queue(self, n: int) -> Callable[[], int | None]:
        """What takes the numbers up to n that no group has taken yet, None behind the last. All
        ranks of a group take the same."""

        def take_number() -> int | None:
            number = None
            if self.ranks.rank == 0:
                number = self.store.add("taken", 1) - 1
            number = self.ranks.broadcast(number)
            return number if number < n else None

        return take_number

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

    def is_first_to_fail(self) -> bool:
        """Whether no other process has failed before: then the others fail because this one did."""
        mine = str(self.number)
        try:
            return self.store.compare_set("failed", "", mine).decode() == mine
        except RuntimeError:  # torchrun has gone
            return False


def n_processes() -> int:
    """How many torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def process_number() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", 0))


def mute_all_but_the_first() -> None:
    """Of several processes that torchrun started, let the first one speak."""
    if process_number() > 0:
        sys.stdout = open(os.devnull, "w")
        sys.stderr = sys.stdout


class SharedInput(io.RawIOBase):
    """Standard input of the first process, read by all of them together."""

    def __init__(self, team: Team):
        self.team = team

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = None
        if self.team.is_first:
            data = os.read(0, len(buffer))
        data = self.team.broadcast(data)
        buffer[:len(data)] = data
        return len(data)


def meet(number: int, n: int) -> dist.Store:
    """The table that n processes share, once all of them have come."""
    patience = timedelta(seconds=CONNECT_S)
    try:
        store, _, _ = next(dist.rendezvous("env://", number, n, timeout=patience))
    except (RuntimeError, ValueError, KeyError) as e:
        sys.stderr = sys.__stderr__  # the others cannot know
        reason = str(e).splitlines()[0]
        raise ValueError(f"process {number} of {n} finds no others: {reason}") from None
    store.set_timeout(PATIENCE)  # NCCL asks it long after: behind loading and compiling
    store = dist.PrefixStore("gpt-flash", store)
    there = store.add("joined", 1)
    began = time.perf_counter()
    while there < n:
        if time.perf_counter() - began > JOIN_S:
            raise ValueError(f"only {there} of {n} processes have come within {JOIN_S:.0f} s")
        time.sleep(0.02)
        there = store.add("joined", 0)
    return store


def is_lost_peer(error: Exception) -> bool:
    """Whether talking to another process failed."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
