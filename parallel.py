"""One model over several processes: tensor parallelism on torch.distributed.

    torchrun --nproc_per_node=4 generate.py --checkpoint_path PATH --prompt "The capital is"

A rank has a smaller model: a part of the heads, of the feed-forward and of the vocabulary (local),
its parameters cut out of the checkpoint's while they are read (piece). What attention and the
feed-forward give are then parts of sums: an all-reduce after each makes them whole, an all-gather
behind the output layer the logits (join). After Megatron-LM, arXiv 1909.08053.

Every rank runs the same program on the same requests. Logits are gathered, so that all ranks have
the same bits of them, and random numbers are made from seeds, so that all draw the same tokens;
what only one process can know, such as standard input or a clock, the first one tells (agree)."""
from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
import torch.nn as nn
from torch import Tensor

T = TypeVar("T")


def from_first(value: T, group: dist.ProcessGroup | None) -> T:
    """The value of a group's first process, for all of them; waits for the slowest. None: nobody
    else is asked."""
    if group is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


@dataclass(frozen=True)
class Ranks:
    """The processes that share a model, as one of them sees them."""

    rank: int = 0  # of this process, from 0
    size: int = 1
    group: dist.ProcessGroup | None = None  # moves tensors; None: there is one process
    control: dist.ProcessGroup | None = None  # moves the host's objects

    def agree(self, value: T) -> T:
        """The first rank's value, for all of them."""
        return from_first(value, self.control)

    def largest(self, x: Tensor) -> Tensor:
        """The largest of each element over the ranks."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x


ALONE = Ranks()


# --- a rank's part of a model ---

def local(config: Any, ranks: Ranks) -> Any:
    """A ModelConfig -> that of a rank's model, with its part of the heads and the feed-forward.

    Fewer key/value heads than ranks are shared: several ranks keep the same one. ValueError if
    something does not divide."""
    n = ranks.size
    if n == 1:
        return config
    parts = {}
    for name, what in SPLIT.items():
        whole = getattr(config, name)
        if whole is None:
            continue
        shared = name == "n_kv_head" and n % whole == 0
        if whole % n and not shared:
            raise ValueError(f"{whole} {what} do not divide over {n} ranks")
        parts[name] = max(1, whole // n)
    if config.qk_norm == "all" and config.n_kv_head % n:
        raise ValueError(
            f"the norm over {config.n_kv_head} key heads, as {config.family} has, cannot be taken "
            f"over {n} ranks that share them"
        )
    if config.moe is not None:
        parts["moe"] = local_experts(config.moe, n)
    if config.vocab_size < n * n:
        raise ValueError(f"a vocabulary of {config.vocab_size} is too small for {n} ranks")
    return replace(config, **parts)


def local_experts(moe: Any, n: int) -> Any:
    """Every rank has a part of each expert, so that all have the same to do whatever is chosen."""
    for size in (moe.ffn_dim, moe.shared_ffn_dim):
        if size % n:
            raise ValueError(f"{size} hidden units of an expert do not divide over {n} ranks")
    return replace(moe, ffn_dim=moe.ffn_dim // n, shared_ffn_dim=moe.shared_ffn_dim // n)


# fields of ModelConfig that are divided among ranks, and what they count
SPLIT = {
    "n_head": "query heads",
    "n_kv_head": "key/value heads",
    "ffn_dim": "hidden units of the feed-forward",
}


class Cuttable(Protocol):
    """A tensor, or what stands for one in a file."""

    shape: tuple[int, ...]

    def narrow(self, dim: int, start: int, length: int) -> Cuttable: ...


def piece(whole: Cuttable, shape: tuple[int, ...], ranks: Ranks) -> Cuttable:
    """The part of a checkpoint's tensor that makes a rank's parameter of that shape, a view.

    Along a dimension that is smaller than the whole, ranks take the parts in turn. Where there
    are fewer parts than ranks, neighbours have the same one; where the last one is short, it is
    padded with zeros."""
    part = whole
    for dim, (size, total) in enumerate(zip(shape, whole.shape, strict=True)):
        if size == total:
            continue
        n_parts = math.ceil(total / size)
        first = ranks.rank * n_parts // ranks.size * size
        part = part.narrow(dim, first, min(size, total - first))
        if part.shape[dim] < size:
            if not isinstance(part, Tensor):
                raise ValueError(
                    f"{total} rows of a quantized tensor do not divide over {ranks.size} ranks: "
                    "take --quantize none, or fewer ranks"
                )
            missing = list(part.shape)
            missing[dim] = size - part.shape[dim]
            part = torch.cat([part, part.new_zeros(missing)], dim)
    return part


# --- what ranks do together in a step ---

def join(model: nn.Module, ranks: Ranks) -> None:
    """Make a rank's model give what the whole one gives, by hooks on the modules whose outputs
    are parts. They are traced into compiled steps and captured with them."""
    model.ranks = ranks
    if ranks.size == 1:
        return
    name = ranks.group.group_name
    vocab_size = model.config.vocab_size

    def add_up(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return all_reduce(output, name)

    def put_together(module: nn.Module, inputs: tuple, logits: Tensor) -> Tensor:
        return all_gather(logits, ranks.size, name)[..., :vocab_size]

    def mean_over_ranks(x: Tensor) -> Tensor:
        return all_reduce(x, name) / ranks.size

    for module in model.modules():
        if hasattr(module, "mean_over_ranks"):
            module.mean_over_ranks = mean_over_ranks
    for block in model.layers:
        block.self_attn.register_forward_hook(add_up)
        block.mlp.register_forward_hook(add_up)
    model.lm_head.register_forward_hook(put_together)


def all_reduce(x: Tensor, group_name: str) -> Tensor:
    """The sum of x over the ranks of a group."""
    total = torch.ops._c10d_functional.all_reduce(x, "sum", group_name)
    return torch.ops._c10d_functional.wait_tensor(total)


def can_reduce_in_one_shot(ranks: Ranks) -> bool:
    """Whether GPUs read each other's memory over NVLink: then Inductor adds small tensors up in one
    kernel, which reads those of all ranks (PyTorch's symmetric memory), where NCCL takes several
    turns. Not run yet: no machine with several GPUs was at hand."""
    if ranks.size == 1 or torch.cuda.get_device_capability() < (9, 0):
        return False
    symmetric_memory.enable_symm_mem_for_group(ranks.group.group_name)
    return True


def all_gather(x: Tensor, size: int, group_name: str) -> Tensor:
    """x [B, T, N] of each of `size` ranks -> [B, T, size * N]."""
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, group_name)
    gathered = torch.ops._c10d_functional.wait_tensor(gathered)  # (size * B, T, N)
    by_rank = gathered.view(size, *x.shape)
    return by_rank.movedim(0, 2).flatten(2)


# --- the processes that torchrun started ---

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

    def agree(self, value: T) -> T:
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
        """What draws the numbers up to n that no group has drawn yet, None behind the last. All
        ranks of a group draw alike."""

        def draw() -> int | None:
            number = None
            if self.ranks.rank == 0:
                number = self.store.add("drawn", 1) - 1
            number = self.ranks.agree(number)
            return number if number < n else None

        return draw

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
        data = self.team.agree(data)
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
