"""Filling a model with a checkpoint: which tensors make a parameter, which layers keep the integers
of a quantized file, and which part of it all a rank of several processes takes."""
from __future__ import annotations

import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from formats.blocks import Blocks
from formats.checkpoint import Checkpoint
from parallel import Ranks, piece
from quantize import (
    MODES, Int4Linear, Linear, QuantizedLinear, put_layer, quantize_linear, quantized_layout,
    rows_at_once, say_once,
)

# layers that multiply parts of their inputs on each rank: what they give is added up
ADDED_UP = ("o_proj", "down_proj")


class Weights:
    """A model on the meta device, and the checkpoint that is to fill it.

    whole: the same model, or what it is a rank's part of. stored_joined: our joined products that
    checkpoints of the family have as one tensor too, and its name there. A parameter is made of the
    checkpoint's tensors one below the other. ValueError where these are not what the model needs.
    """

    def __init__(
        self, model: nn.Module, whole: nn.Module, checkpoint: Checkpoint, ranks: Ranks,
        stored_joined: dict[str, str],
    ) -> None:
        self.model = model
        self.whole = whole
        self.checkpoint = checkpoint
        self.ranks = ranks
        self.stored_joined = stored_joined
        self.plan: dict[str, dict[str, tuple[int, ...]]] = {}  # our parameter -> {name: shape}
        self.kept: dict[str, list[Blocks]] = {}  # a layer that keeps a file's integers -> these

    def choose_layers(self, quantize: str | None, device: torch.device | str) -> None:
        """Put empty quantized layers where the checkpoint has integers, those of save_quantized or,
        if quantize is "auto", of a GGUF file; plan where the rest comes from."""
        checkpoint = self.checkpoint
        ours = False
        for model in {self.model, self.whole}:
            ours = checkpoint.tensors is not None and quantized_layout(model, checkpoint.config)
        if ours and quantize in MODES:
            raise ValueError(
                f"{checkpoint.path} is quantized already; leave out --quantize {quantize}"
            )
        config = self.whole.config
        for name, x in [*self.whole.named_parameters(), *self.whole.named_buffers()]:
            if ours:  # such a folder has our names
                self.plan[name] = {name: tuple(x.shape)}
            else:
                self.plan[name] = self.sources(name, tuple(x.shape))
        if config.tied and isinstance(self.whole.lm_head, Linear):
            del self.plan["lm_head.weight"]
        if config.tied and self.ranks.size > 1 and isinstance(self.whole.lm_head, QuantizedLinear):
            self.cut_tied_table()

        if checkpoint.tensors is None:
            warning = "is a bare configuration: the weights are RANDOM, for benchmarks only"
            print(f"WARNING: {checkpoint.path} {warning}", file=sys.stderr)
            return
        checkpoint.check_names(name for parts in self.plan.values() for name in parts)
        if quantize == "auto":
            self.keep_blocks(device)

    def cut_tied_table(self) -> None:
        """A rank's output layer is a part of the embedding's table, which is quantized."""
        table = self.whole.lm_head
        put_layer(self.model, "lm_head", table.mode, table.group_size)
        for name, _ in table.named_buffers():
            stored = f"embed_tokens.table.{name}"
            self.plan[f"lm_head.{name}"] = self.plan[stored]

    def sources(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The Hugging Face tensors of a parameter of the whole model, and their shapes. Our names
        are theirs but for the joined ones, and the number of an expert, which ours have last."""
        prefix, _, kind = name.rpartition(".")
        theirs = re.sub(r"experts\.(\w+)\.(\d+)", r"experts.\2.\1", prefix)
        if not theirs.startswith("lm_head"):
            theirs = f"model.{theirs}"
        path, _, module = theirs.rpartition(".")
        if module in self.stored_joined:
            return {f"{path}.{self.stored_joined[module]}.{kind}": shape}
        if module not in JOINED:
            return {f"{theirs}.{kind}": shape}
        parts = {}
        rows = joined_rows(prefix, shape[0], self.whole.config)
        for part, n in zip(JOINED[module], rows, strict=True):
            parts[f"{path}.{part}.{kind}"] = (n, *shape[1:])
        return parts

    def keep_blocks(self, device: torch.device | str) -> None:
        """Put empty quantized layers where a GGUF file has integers.

        A joined layer takes a form that holds all of its parts. Types that no form holds are said,
        and dequantized."""
        for name, parts in self.plan.items():
            prefix, _, kind = name.rpartition(".")
            layer = self.model.get_submodule(prefix)
            if kind != "weight" or not isinstance(layer, (Linear, nn.Embedding)):
                continue
            if prefix == "lm_head" and self.model.config.normalized_head:
                continue  # its integers would not stay
            blocks = [self.checkpoint.blocks(part, shape) for part, shape in parts.items()]
            if None in blocks:  # in floating point
                continue
            unknown = [part.type_name for part in blocks if part.kind is None]
            if unknown:
                say_once(f"{unknown[0]} weights are dequantized: no quantized layer holds them")
                continue
            if prefix == "embed_tokens":
                self.keep(f"{prefix}.table", blocks, device)
                if not self.model.config.tied or self.ranks.size == 1:
                    continue
                prefix = "lm_head"  # on this rank a part of the same
                layer = self.model.lm_head
            self.keep(prefix, self.pieces(prefix, blocks, layer.weight), device)

    def keep(self, prefix: str, blocks: list[Blocks], device: torch.device | str) -> None:
        put_layer(self.model, prefix, *form_for(blocks, device))
        self.kept[prefix] = blocks

    def load(self, device: torch.device | str, quantize: str | None, group_size: int) -> None:
        """Read the weights onto a device, layer by layer, and quantize what is to be."""
        self.fill_from_blocks(device)
        model = self.model
        modules = list(model.named_modules())
        for prefix, module in tqdm(modules, "loading", unit=" layers", disable=None, leave=False):
            self.fill(module, prefix, device)
            if isinstance(module, Linear) and quantize in MODES:
                groups = group_size if quantize == "int4" else 1
                module = quantize_linear(
                    module, quantize, group_size, prefix, self.over_ranks(prefix, groups)
                )
                model.set_submodule(prefix, module)
            if hasattr(module, "pack"):
                module.pack()

    def fill_from_blocks(self, device: torch.device | str) -> None:
        """Give quantized layers the integers of a file, each thread a layer of its own: the steps
        are so small that an operator's threads would mostly wait for each other."""
        n = torch.get_num_threads()

        def fill_next(prefix: str) -> None:
            repack(self.model.get_submodule(prefix), prefix, self.kept[prefix], device)

        with ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            made = threads.map(fill_next, self.kept)
            total = len(self.kept)
            for _ in tqdm(made, "loading", total, unit=" layers", disable=None, leave=False):
                pass
        torch.set_num_threads(n)  # the default of threads to come

    def fill(self, module: nn.Module, prefix: str, device: torch.device | str) -> None:
        """Give a module its own parameters and buffers, in place of those on meta."""
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, meta in own:
            if not meta.is_meta:
                continue
            parts = self.plan.get(f"{prefix}.{name}")
            if parts is None:  # a tied output layer
                tensor, = self.pieces(prefix, [self.model.embed_tokens.weight], meta)
            elif self.checkpoint.tensors is None:
                tensor = torch.empty_like(meta, device=device).normal_(std=0.02)
            else:
                tensor = self.read(prefix, parts, meta)
                if prefix == "lm_head" and self.model.config.normalized_head:
                    tensor = F.normalize(tensor.float(), dim=-1)
                tensor = tensor.to(device, meta.dtype, copy=True)
                if tensor.dim() == 1 or isinstance(module, nn.Embedding):
                    require_finite(f"{prefix}.{name}", tensor)
                if name == "bias" and layer_kind(prefix) in ADDED_UP and self.ranks.rank > 0:
                    tensor.zero_()  # the sum over ranks is to have it once
            if isinstance(meta, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            setattr(module, name, tensor)

    def read(self, prefix: str, parts: dict[str, tuple[int, ...]], meta: Tensor) -> Tensor:
        """A parameter's tensors, one below the other."""
        tensors = [self.checkpoint.read(name, shape) for name, shape in parts.items()]
        tensors = self.pieces(prefix, tensors, meta)
        if len(tensors) == 1:
            return tensors[0]
        return torch.cat(tensors)

    def pieces(
        self, prefix: str, tensors: list[Tensor | Blocks], meta: Tensor
    ) -> list[Tensor | Blocks]:
        """A rank's parts of the tensors of the whole parameter that is `meta` on this rank."""
        if self.ranks.size == 1:
            return tensors
        ours = joined_rows(prefix, len(meta), self.model.config)
        if len(tensors) < len(ours):  # a checkpoint that has them joined too
            rows = joined_rows(prefix, tensors[0].shape[0], self.whole.config)
            tensors = split_rows(tensors[0], rows)
        parts = []
        for tensor, n in zip(tensors, ours, strict=True):
            parts.append(piece(tensor, (n, *meta.shape[1:]), self.ranks))
        return parts

    def over_ranks(self, prefix: str, groups: int) -> Callable[[Tensor], Tensor] | None:
        """For a layer whose rows lie on several ranks: what makes the largest values of a row's
        parts those of the whole row, so that a part gets the integers that it has in the whole."""
        whole = self.whole.get_submodule(prefix).in_features
        ours = self.model.get_submodule(prefix).in_features
        if whole == ours:
            return None
        if ours % groups:
            raise ValueError(
                f"{ours} inputs of {prefix}, a part of {whole}, do not divide into groups of "
                f"{groups}: take fewer ranks"
            )
        return self.ranks.largest


# our products, and the layers of Hugging Face that they do at once
JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def layer_kind(prefix: str) -> str:
    """The last part of a layer's name that is no number, as of an expert."""
    return re.sub(r"(\.\d+)+$", "", prefix).rpartition(".")[2]


def joined_rows(prefix: str, n_rows: int, config: Any) -> list[int]:
    """How many of a layer's rows belong to each of the layers that it joins."""
    module = layer_kind(prefix)
    if module == "qkv_proj":
        kv_size = config.n_kv_head * config.head_dim
        return [n_rows - 2 * kv_size, kv_size, kv_size]
    if module == "gate_up_proj":
        return [n_rows // 2] * 2
    return [n_rows]


def split_rows(tensor: Tensor | Blocks, rows: list[int]) -> list[Tensor | Blocks]:
    parts = []
    first = 0
    for n in rows:
        parts.append(tensor.narrow(0, first, n))
        first += n
    return parts


def form_for(parts: list[Blocks], device: torch.device | str) -> tuple[str, int]:
    """The smallest quantized layer for the integers of all parts, (mode, group_size). It holds them
    as they are; but Q6_K's groups of 16 are joined, see GroupedInt8Linear.take."""
    if torch.device(device).type == "cuda" and {part.type_name for part in parts} == {"MXFP4"}:
        return "mxfp4", 32  # no operator of a CPU takes it
    if all(part.kind.bits <= 4 for part in parts):
        return "int4", 32
    return "int8_grouped", 32


def repack(
    layer: Int4Linear, prefix: str, parts: list[Blocks], device: torch.device | str
) -> None:
    """The integers of a file, part below part, some rows at a time."""
    for name, meta in list(layer.named_buffers()):
        setattr(layer, name, torch.empty(meta.shape, dtype=meta.dtype, device=device))
    first = 0
    for part in parts:
        middle = 2 ** (part.kind.bits - 1)
        for rows in part.slices(rows_at_once(layer.in_features)):
            ours = slice(first + rows.start, first + rows.stop)
            layer.take(ours, *part.affine(rows), middle)
        first += part.shape[0]
    for name, tensor in layer.named_buffers():
        require_finite(f"{prefix}.{name}", tensor)
    layer.pack()


def require_finite(name: str, tensor: Tensor) -> None:
    """ValueError if a tensor has NaN or infinity. What spoils a file seldom spares its norms, its
    embedding and all scales of its integers, so that no more is looked at. Of the ways to ask, the
    smallest and largest number were measured fastest: 1.9 ms for 57 MB in bfloat16, where a sum in
    float32 takes 64."""
    if not tensor.is_floating_point():
        return
    low, high = tensor.aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(
            f"tensor {name} has numbers that are not finite in {tensor.dtype}: the file is "
            "damaged, or needs a dtype of a larger range"
        )
