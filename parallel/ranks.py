"""One model over several processes: tensor parallelism on torch.distributed.

A rank has a smaller model: a part of the heads, of the feed-forward and of the vocabulary (local),
its parameters cut out of the checkpoint's while they are read (take_part). What attention
and the feed-forward give are then parts of sums: an all-reduce after each makes them whole, an
all-gather behind the output layer the logits (join). After Megatron-LM, arXiv 1909.08053.

Every rank runs the same program on the same requests. Logits are gathered, so that all ranks have
the same bits of them, and random numbers are made from seeds, so that all draw the same tokens;
what only one process can know, such as standard input or a clock, the first one tells (broadcast).
"""
from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
import torch.nn as nn
from torch import Tensor

import model as core
from model import FAMILIES, JOINED, Checkpoint, ModelConfig, Transformer, joined_rows
from quantize import Linear

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that share a model, as one of them sees them."""

    rank: int = 0  # of this process, from 0
    size: int = 1
    group: dist.ProcessGroup | None = None  # moves tensors; None: there is one process
    control: dist.ProcessGroup | None = None  # moves the host's values

    def broadcast(self, value: T) -> T:
        """The first rank's value, for all of them; waits for the slowest. It is what JSON holds,
        and travels so, since a pickle can run code and whoever reaches torchrun's MASTER_PORT could
        send one. Tuples arrive as lists."""
        if self.control is None:
            return value
        text = bytearray(json.dumps(value).encode())
        size = torch.tensor(len(text))
        dist.broadcast(size, group=self.control, group_src=0)
        if self.rank > 0:
            text = bytearray(int(size))
        dist.broadcast(torch.frombuffer(text, dtype=torch.uint8), group=self.control, group_src=0)
        return json.loads(text)

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
        parts[name] = 1 if shared else divided(whole, what, n)
    if config.moe is not None:  # every rank has a part of each expert: as much to do as others
        sizes = config.moe.ffn_dim, config.moe.shared_ffn_dim
        own, common = [divided(size, "hidden units of an expert", n) for size in sizes]
        parts["moe"] = replace(config.moe, ffn_dim=own, shared_ffn_dim=common)
    if config.vocab_size < n * n:
        raise ValueError(f"a vocabulary of {config.vocab_size} is too small for {n} ranks")
    return replace(config, **parts)


def divided(whole: int, what: str, n: int) -> int:
    """A rank's part of so many, or ValueError."""
    if whole % n:
        would = ", ".join(str(size) for size in range(1, 65) if whole % size == 0)
        raise ValueError(f"{whole} {what} do not divide over {n} ranks; they would over {would}")
    return whole // n


# fields of ModelConfig that are divided among ranks, and what they count
SPLIT = {
    "n_head": "query heads",
    "n_kv_head": "key/value heads",
    "ffn_dim": "hidden units of the feed-forward",
}


def piece(whole: Any, shape: tuple[int, ...], ranks: Ranks) -> Any:
    """The part of a checkpoint's tensor, or of what stands for one in a file, that makes a rank's
    parameter of that shape, a view.

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


def load_model(
    path: str | Path | Checkpoint | None, ranks: Ranks, **options: Any
) -> Transformer:
    """model.load_model of a rank's part, with its options. ValueError also where it does not divide
    over them."""
    if ranks.size == 1:
        return core.load_model(path, **options)
    if options.get("calibrate") is not None:
        raise ValueError("calibrating takes one process: save what it makes for the ranks to load")
    checkpoint = core.open_checkpoint(path, options.get("device", "cpu"))
    group_size = options.get("group_size", 32) if options.get("quantize") == "int4" else 1
    make_whole = checkpoint.empty_model
    # which is asked for when an adapter, if there is one, is in the checkpoint
    checkpoint.empty_model = lambda: part_of(make_whole(), checkpoint, ranks, group_size)
    return join(core.load_model(checkpoint, **options), ranks)


def part_of(
    whole: Transformer, checkpoint: Checkpoint, ranks: Ranks, group_size: int
) -> Transformer:
    """A rank's part of a model, both on meta, for which the checkpoint is read from now on."""
    check_layers(whole, ranks)
    with torch.device("meta"):
        model = FAMILIES[whole.config.family].model(local(whole.config, ranks))
        # of the vocabulary, the last rank's part is padded
        rows = math.ceil(whole.config.vocab_size / ranks.size)
        model.lm_head = Linear(whole.config.dim, rows, bias=model.lm_head.bias is not None)
    share_rows(model, whole, ranks, group_size)
    take_part(checkpoint, whole, ranks)
    return model


def check_layers(whole: Transformer, ranks: Ranks) -> None:
    """ValueError if a norm over all heads cannot be taken over the ranks, or layers are not made to
    be divided."""
    n, family = whole.config.n_kv_head, whole.config.family
    if not all(getattr(each.self_attn, "divides", True) for each in whole.layers):
        raise ValueError(f"the layers of {family} do not divide over ranks: take one process")
    if n % ranks.size and any(hasattr(module, "mean_over_ranks") for module in whole.modules()):
        raise ValueError(
            f"the norm over {n} key heads, as {family} has, cannot be taken over {ranks.size} "
            "ranks that share them"
        )


def share_rows(model: Transformer, whole: Transformer, ranks: Ranks, group_size: int) -> None:
    """Let layers whose rows lie on several ranks be quantized as the whole ones are."""
    for name, layer in model.named_modules():
        n_inputs = getattr(whole.get_submodule(name), "in_features", None)
        ours = getattr(layer, "in_features", None)
        if ours == n_inputs:
            continue
        layer.over_ranks = ranks.largest
        if ours % group_size:
            raise ValueError(
                f"{ours} inputs of {name}, a part of {n_inputs}, do not divide into groups of "
                f"{group_size}: take fewer ranks"
            )


def take_part(checkpoint: Checkpoint, whole: Transformer, ranks: Ranks) -> None:
    """From now on a checkpoint is read for a rank's model: its plan says what each parameter of the
    whole one, on meta, is read from, and of that a rank keeps its part."""
    checkpoint.put_layers(whole, None, "meta")
    tensors = dict([*whole.named_parameters(), *whole.named_buffers()])
    parts_of_whole, put_one = checkpoint.parts, checkpoint.put_layer

    def parts(model: Transformer, name: str, x: Tensor) -> dict[str, tuple[int, ...]]:
        saved = "gpt_flash" in checkpoint.config and name in checkpoint.tensors
        if whole.config.tied and name.startswith("lm_head.") and not saved:  # it is the embedding
            name = name.replace("lm_head.", "embed_tokens.table.")
            name = name if name in tensors else "embed_tokens.weight"
        return parts_of_whole(whole, name, tensors.get(name, x))

    def put_layer(model: Transformer, name: str, mode: str, group_size: int | None) -> None:
        put_one(model, name, mode, group_size)
        if whole.config.tied and name == "embed_tokens.table":
            put_one(model, "lm_head", mode, group_size)

    checkpoint.parts = parts
    checkpoint.put_layer = put_layer
    checkpoint.cut = partial(cut, whole.config, ranks)


def cut(
    config: ModelConfig, ranks: Ranks, name: str, tensors: list[Any], shape: tuple[int, ...]
) -> list[Any]:
    """A rank's parts, of that shape in all, of the tensors that make a parameter. What joins
    several layers is cut at their borders first. config: of the whole model."""
    name = re.sub(r"\.\d+(?=\.\w+$)", "", name)  # without the number of an expert
    if name.endswith(("o_proj.bias", "down_proj.bias")) and ranks.rank > 0:
        return [torch.zeros(shape)]  # what they give is added up, and is to have it once
    module = name.split(".")[-2]
    our_rows = [shape[0]]
    if module in JOINED:
        our_rows = joined_rows(module, shape[0], local(config, ranks))
        if len(tensors) == 1:  # the file has them joined
            [tensor] = tensors
            rows = joined_rows(module, tensor.shape[0], config)
            ends = accumulate(rows)
            tensors = [tensor.narrow(0, end - n, n) for n, end in zip(rows, ends)]
    return [piece(x, (n, *shape[1:]), ranks) for x, n in zip(tensors, our_rows, strict=True)]

# --- what ranks do together in a step ---

def join(model: Transformer, ranks: Ranks) -> Transformer:
    """Make a rank's model give what the whole one gives, by hooks on the modules whose outputs
    are parts -> the model. They are traced into compiled steps and captured with them."""
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
    return model


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
    return gathered.view(size, *x.shape).movedim(0, 2).flatten(2)
