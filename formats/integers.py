"""Keeping the integers of quantized files: which layers hold them, and filling these."""
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
import torch.nn as nn

import quantize
from formats.layers import TABLE, put
from model import FAMILIES, Transformer
from quantize import Int4Linear, Linear, say_once


class Stored(Protocol):
    """A checkpoint with integers."""

    def blocks(self, name: str, shape: tuple[int, ...]) -> list[Any] | None: ...


def fill_layers(
    checkpoint: Stored, model: Transformer, plan: dict[str, dict[str, tuple[int, ...]]],
    device: torch.device | str,
) -> Callable[[], None]:
    """Put empty quantized layers where a file has integers, which plan says -> what fills them.

    A joined layer takes a form that holds all of its parts. Types that no form holds are said, and
    dequantized."""
    kept: dict[str, list[Any]] = {}  # by the names of layers
    for name, parts in plan.items():
        prefix, _, kind = name.rpartition(".")
        layer = model.get_submodule(prefix)
        if kind != "weight" or not isinstance(layer, (Linear, nn.Embedding)):
            continue
        if FAMILIES[model.config.family].convert(model.config, name) is not None:
            continue  # its integers would not stay
        blocks = []
        for part, shape in parts.items():
            blocks += checkpoint.blocks(part, shape) or [None]
        if None in blocks:  # in floating point
            continue
        unknown = [part.type_name for part in blocks if part.kind is None]
        if unknown:
            say_once(f"{unknown[0]} weights are dequantized: no quantized layer holds them")
            continue
        if prefix == "embed_tokens":
            prefix = TABLE
        put(model, prefix, *form_for(blocks, device))
        kept[prefix] = blocks

    def fill() -> None:
        """Each thread has a layer of its own: the steps are so small that an operator's threads
        would mostly wait for each other."""
        n = torch.get_num_threads()

        def fill_next(prefix: str) -> None:
            repack(model.get_submodule(prefix), prefix, kept[prefix], device)

        with ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            made = threads.map(fill_next, kept)
            for _ in quantize.progress(made, "loading", len(kept)):
                pass
        torch.set_num_threads(n)  # the default of threads to come

    return fill


def form_for(parts: list[Any], device: torch.device | str) -> tuple[str, int]:
    """The smallest quantized layer for the integers of all parts, (mode, group_size). It holds them
    as they are; but Q6_K's groups of 16 are joined, see AffineInt8Linear.take."""
    if torch.device(device).type == "cuda" and {part.type_name for part in parts} == {"MXFP4"}:
        return "mxfp4", 32  # no operator of a CPU takes it
    if all(part.kind.bits <= 4 for part in parts):
        return "int4", 32
    return "int8_grouped", 32


def repack(
    layer: Int4Linear, prefix: str, parts: list[Any], device: torch.device | str
) -> None:
    """The integers of a file, part below part, some rows at a time."""
    for name, meta in list(layer.named_buffers()):
        setattr(layer, name, torch.empty(meta.shape, dtype=meta.dtype, device=device))
    at_once = 64 * max(1, 2**13 // layer.in_features)  # rows that a CPU's cache holds
    first = 0
    for part in parts:
        middle = 2 ** (part.kind.bits - 1)
        for rows in part.slices(at_once):
            ours = slice(first + rows.start, first + rows.stop)
            layer.take(ours, *part.affine(rows), middle)
        first += part.shape[0]
    for name, tensor in layer.named_buffers():
        if tensor.is_floating_point() and not all(map(torch.isfinite, tensor.aminmax())):
            raise ValueError(
                f"tensor {prefix}.{name} has numbers that are not finite: the file is damaged"
            )
    layer.pack()
