"""One model over several processes: tensor parallelism on torch.distributed.

A rank has a smaller model: a part of the heads, of the feed-forward and of the vocabulary (local),
its parameters cut out of the checkpoint's while they are read (PartOfCheckpoint). What attention
and the feed-forward give are then parts of sums: an all-reduce after each makes them whole, an
all-gather behind the output layer the logits (join). After Megatron-LM, arXiv 1909.08053.

Every rank runs the same program on the same requests. Logits are gathered, so that all ranks have
the same bits of them, and random numbers are made from seeds, so that all draw the same tokens;
what only one process can know, such as standard input or a clock, the first one tells (broadcast).
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
import torch.nn as nn
from torch import Tensor

import model as core
from model import FAMILIES, JOINED, Checkpoint, ModelConfig, Transformer, joined_rows, sources
from quantize import Linear

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

    def broadcast(self, value: T) -> T:
        """The first rank's value, for all of them."""
        return from_first(value, self.control)

    def largest(self, x: Tensor) -> Tensor:
        """The largest of each element over the ranks."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x


ALONE = Ranks()


# --- a rank's part of a model ---

def local(config: ModelConfig, ranks: Ranks) -> ModelConfig:
    """The configuration of a rank's model, with its part of the heads and the feed-forward. Its
    output layer is never tied: it is a part of the vocabulary.

    Fewer key/value heads than ranks are shared: several ranks keep the same one. ValueError if
    something does not divide."""
    n = ranks.size
    if n == 1:
        return config
    parts: dict[str, Any] = {"tied": False}
    for name, what in SPLIT.items():
        whole = getattr(config, name)
        shared = name == "n_kv_head" and n % whole == 0
        if whole % n and not shared:
            raise ValueError(f"{whole} {what} do not divide over {n} ranks")
        parts[name] = max(1, whole // n)
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


# --- loading a part ---


@torch.no_grad()
def load_model(
    path: str | Path | None, ranks: Ranks, *, device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None, quantize: str | None = "auto", group_size: int = 32,
) -> Transformer:
    """model.load_model of a rank's part. ValueError also where it does not divide over the ranks.
    """
    options = dict(dtype=dtype, quantize=quantize, group_size=group_size)
    if ranks.size == 1:
        return core.load_model(path, device=device, **options)
    core.check_target(device, dtype, quantize)
    checkpoint = core.open_checkpoint(path, device)
    whole = checkpoint.empty_model()
    with torch.device("meta"):
        model = FAMILIES[whole.config.family].model(local(whole.config, ranks))
        # of the vocabulary, the last rank's part is padded
        rows = math.ceil(whole.config.vocab_size / ranks.size)
        model.lm_head = Linear(whole.config.dim, rows, bias=False)
    check_norms(whole, ranks)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            n_inputs = whole.get_submodule(name).in_features
            share_rows(name, layer, n_inputs, ranks, quantize, group_size)
    part = part_of(checkpoint, whole, ranks)
    core.fill_model(model, part, device, dtype, quantize, group_size)
    join(model, ranks)
    return model


def check_norms(whole: Transformer, ranks: Ranks) -> None:
    """ValueError if a norm over all heads cannot be taken over the ranks."""
    n_kv_head = whole.config.n_kv_head
    over_heads = any(hasattr(module, "mean_over_ranks") for module in whole.modules())
    if over_heads and n_kv_head % ranks.size:
        raise ValueError(
            f"the norm over {n_kv_head} key heads, as {whole.config.family} has, cannot be taken "
            f"over {ranks.size} ranks that share them"
        )


def share_rows(
    name: str, layer: Linear, n_inputs: int, ranks: Ranks, quantize: str | None, group_size: int
) -> None:
    """Let a layer whose rows, of n_inputs, lie on several ranks be quantized as the whole is."""
    ours = layer.in_features
    if ours == n_inputs:
        return
    layer.over_ranks = ranks.largest
    if quantize == "int4" and ours % group_size:
        raise ValueError(
            f"{ours} inputs of {name}, a part of {n_inputs}, do not divide into groups of "
            f"{group_size}: take fewer ranks"
        )


class PartOfCheckpoint(Checkpoint):
    """What gives a rank's part of each tensor: in front of a checkpoint's own class, see part_of.
    """

    checkpoint: Checkpoint  # the whole one
    whole: Transformer  # the model that it is of, on meta
    ranks: Ranks
    saved: bool  # it has our names
    shapes: dict[str, tuple[int, ...]]  # of the whole tensors

    def stored_as(self, name: str) -> str:
        """Where a tensor is read from: the whole model's output layer may be its embedding."""
        tied = self.whole.config.tied and name.startswith("lm_head.")
        if not tied or self.saved and name in self.shapes:  # a quantized one is no embedding
            return name
        if not self.saved:
            return "model.embed_tokens.weight"
        tied = name.replace("lm_head.", "embed_tokens.table.")
        return tied if tied in self.shapes else "embed_tokens.weight"

    def check_names(self, wanted: Any) -> None:
        self.checkpoint.check_names(map(self.stored_as, wanted))

    def put_layers(
        self, model: Transformer, quantize: str | None, device: torch.device | str
    ) -> Callable[[], None]:
        head = self.whole.lm_head
        if head is getattr(self.whole.embed_tokens, "table", None):
            model.lm_head = type(head)(model.lm_head, head.group_size)
        return super().put_layers(model, quantize, device)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if not self.checkpoint.tensors:  # random weights
            return self.checkpoint.read(name, shape)
        stored = self.stored_as(name)
        tensor = self.checkpoint.read(stored, self.shapes[stored])
        if without_number(name).endswith(ADDED_UP_BIASES) and self.ranks.rank > 0:
            return tensor.new_zeros(shape)  # the sum over ranks is to have it once
        parts = self.pieces(name, [tensor], shape)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def blocks(self, name: str, shape: tuple[int, ...]) -> list[Any] | None:
        stored = self.stored_as(name)
        blocks = self.checkpoint.blocks(stored, self.shapes[stored])
        return None if blocks is None else self.pieces(name, blocks, shape)

    def pieces(self, name: str, whole: list[Any], shape: tuple[int, ...]) -> list[Any]:
        """A rank's parts, of that shape in all, of a tensor. What joins several layers is cut at
        their borders first."""
        [tensor] = whole
        config = self.whole.config
        ours = {theirs: name for name, theirs in FAMILIES[config.family].stored_joined.items()}
        module = without_number(name).split(".")[-2]
        module = ours.get(module, module)
        if module not in JOINED:
            return [piece(tensor, shape, self.ranks)]
        parts = []
        first = 0
        rows = joined_rows(module, tensor.shape[0], config)
        our_rows = joined_rows(module, shape[0], local(config, self.ranks))
        for n, our_n in zip(rows, our_rows, strict=True):
            part = tensor.narrow(0, first, n)
            parts.append(piece(part, (our_n, *shape[1:]), self.ranks))
            first += n
        return parts


def part_of(checkpoint: Checkpoint, whole: Transformer, ranks: Ranks) -> PartOfCheckpoint:
    """A rank's part of a checkpoint of any class, which is the whole one in all else."""
    kind = type("PartOfCheckpoint", (PartOfCheckpoint, type(checkpoint)), {})
    part = kind.__new__(kind)
    vars(part).update(vars(checkpoint))
    checkpoint.put_layers(whole, None, "meta")
    part.checkpoint = checkpoint
    part.whole = whole
    part.ranks = ranks
    part.saved = "gpt_flash" in checkpoint.config
    part.shapes = {}
    for name, x in [*whole.named_parameters(), *whole.named_buffers()]:
        if not part.saved:
            part.shapes |= sources(whole, name, x)
        elif name in checkpoint.tensors:  # all but a tied output layer
            part.shapes[name] = tuple(x.shape)
    return part


def without_number(name: str) -> str:
    """A parameter's name without the number of an expert, which ours have last."""
    return re.sub(r"\.\d+(?=\.\w+$)", "", name)


# of layers that multiply parts of their inputs on each rank: what they give is added up
ADDED_UP_BIASES = ("o_proj.bias", "down_proj.bias")

# --- what ranks do together in a step ---

def join(model: nn.Module, ranks: Ranks) -> None:
    """Make a rank's model give what the whole one gives, by hooks on the modules whose outputs
    are parts. They are traced into compiled steps and captured with them."""
    model.broadcast = ranks.broadcast
    if can_reduce_in_one_shot(model.device, ranks):
        model.compile_options["_collective.auto_select"] = True
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
        if hasattr(module, "set_slopes"):  # of all ranks' heads
            slopes = module.slopes_of(module.n_head * ranks.size)
            module.set_slopes(piece(slopes, (module.n_head,), ranks).to(model.device))
    for block in model.layers:
        block.self_attn.register_forward_hook(add_up)
        block.mlp.register_forward_hook(add_up)
    model.lm_head.register_forward_hook(put_together)


def all_reduce(x: Tensor, group_name: str) -> Tensor:
    """The sum of x over the ranks of a group."""
    total = torch.ops._c10d_functional.all_reduce(x, "sum", group_name)
    return torch.ops._c10d_functional.wait_tensor(total)


def can_reduce_in_one_shot(device: torch.device, ranks: Ranks) -> bool:
    """Whether GPUs read each other's memory over NVLink: then Inductor adds small tensors up in one
    kernel, which reads those of all ranks (PyTorch's symmetric memory), where NCCL takes several
    turns. Not run yet: no machine with several GPUs was at hand."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    symmetric_memory.enable_symm_mem_for_group(ranks.group.group_name)
    return True


def all_gather(x: Tensor, size: int, group_name: str) -> Tensor:
    """x [B, T, N] of each of `size` ranks -> [B, T, size * N]."""
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, group_name)
    gathered = torch.ops._c10d_functional.wait_tensor(gathered)  # (size * B, T, N)
    by_rank = gathered.view(size, *x.shape)
    return by_rank.movedim(0, 2).flatten(2)
