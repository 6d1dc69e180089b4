"""GGUF files: their own names, quantized tensors, and for some architectures rows in another
order."""
from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GGML
from gguf import GGUFValueType as Kind
from torch import Tensor

from formats.architectures import hf_config
from formats.blocks import FLOATS, dequantized, file_blocks
from formats.checkpoint import CheckedCheckpoint, InFile, making_sense_of
from formats.integers import Blocks, check_shape
from formats.settings import plain_file
from formats.wrappers import LEFT_OUT, TEXTS
from model import first_line, is_number
from quantize import say_once


def read_checkpoint(path: Path) -> GGUFCheckpoint:
    meta, tensors = read_gguf(path)
    with making_sense_of(path):
        if has_pictures(path, meta):
            say_once(LEFT_OUT.format(path, meta.get("general.architecture")))
        config, file = hf_config(meta, tensors)
        n_expert = meta.get(f"{meta['general.architecture']}.expert_count")
        for name, tensor in tensors.items():
            if "_exps." in name:  # a stack
                check_shape(name, tensor.shape, (n_expert, *tensor.shape[1:]))
    return GGUFCheckpoint(path, config, tensors, file)


NUMBERS = gguf.GGUFReader.gguf_scalar_to_np  # numpy's types of numbers in the metadata
PART = re.compile(r"-\d{5}(?=-of-\d{5}\.gguf$)")  # in the name of a file that is one
# the number of an expert in the name of its tensor; GGUF files have those of a layer in one stack
EXPERT_NUMBER = re.compile(r"(?<=experts)\.(\d+)(?=\.)")


@dataclass
class GGUFCheckpoint(CheckedCheckpoint):
    """A .gguf file."""

    file: dict[str, Any]  # how such files differ: Family.gguf

    @cached_property
    def names(self) -> gguf.TensorNameMap:
        """Hugging Face's names of tensors -> those of the architecture's files."""
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        n_layer = self.config["num_hidden_layers"]
        return gguf.get_tensor_name_map(numbers[self.file["name"]], n_layer)

    def alone(self, name: str) -> list[str]:
        """The names of the tensors that lie in the file in place of one, joined in that order."""
        for module, parts in self.file.get("parts", {}).items():
            if f".{module}." in name and self.stored_name(name) not in self.tensors:
                return [name.replace(module, part) for part in parts]
        return [name]

    def stored_names(self, name: str) -> list[str]:
        return [self.stored_name(part) for part in self.alone(name)]

    def stored_name(self, name: str) -> str:
        name = EXPERT_NUMBER.sub("", name).replace("_correction_bias", "_correction.bias")
        name = name.replace(".dt_bias", ".dt_proj.bias")
        name = name.replace("feed_forward.gate.e_score_correction.", "feed_forward.expert_bias.")
        known = (self.names.get_name(each, try_suffixes=(".weight", ".bias"))
                 for each in (name, name.removeprefix("model.")))  # LFM2's experts have none
        stored = next(filter(None, known), name)
        if stored not in self.tensors and f"{stored}.weight" in self.tensors:
            return f"{stored}.weight"  # the sinks of attention, parameters without a module
        return stored

    def stored(self, name: str) -> InFile:
        """As it lies in the file, an expert's out of its stack."""
        tensor = self.tensors[self.stored_name(name)]
        expert = EXPERT_NUMBER.search(name)
        return tensor if expert is None else tensor[int(expert[1])]

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor of that Hugging Face name as Hugging Face has it, dequantized to float32.
        ValueError if it has another shape, where one is given, or cannot be read."""
        parts = self.alone(name)
        if len(parts) > 1:
            with making_sense_of(self.path):  # parts of all heads, or of each
                tensor = torch.cat([self.read(part) for part in parts], -2).flatten(0, -2)
            check_shape(name, tensor.shape, shape)
            return tensor
        stored = self.stored(name)
        shape = stored.shape if shape is None else shape
        # a convolution's weight has one dimension less, and files may leave out any of 1
        flat = shape if stored.shape == shape else tuple(n for n in shape if n > 1)
        check_shape(stored.name, stored.shape, flat)
        tensor = dequantized(stored).view(shape)
        shift = self.file.get("norm_shift", 0)
        if name.endswith("norm.weight") and ".linear_attn." not in name:
            tensor = tensor - shift
        if name.endswith(".A_log"):
            tensor = (-tensor).log()
        if ".k_b_proj." in name:  # what makes keys of a vector, for each head
            tensor = tensor.mT
        order = self.order(name, shape)
        return tensor if order is None else tensor.index_select(*order)

    def default_dtype(self, quantize: str | None, device: torch.device) -> torch.dtype:
        """On a CPU float32 where integers are kept: on SmolLM2 in Q4_1 a mean KL of 8.9e-4 from the
        dequantized model, of which scales in bfloat16 are 2.2e-4 and products in it the rest;
        everything in bfloat16 is 1.3e-3, and what the flash kernels of GPUs take."""
        quantized = any(stored.dtype not in FLOATS for stored in self.tensors.values())
        kept = quantized and quantize == "auto" and device.type != "cuda"
        return torch.float32 if kept else torch.bfloat16

    def blocks(self, name: str, shape: tuple[int, ...]) -> list[Blocks] | None:
        """None also where one part of it is stored in floating point."""
        names = self.alone(name)
        parts = [self.stored(part) for part in names]
        if any(stored.dtype in FLOATS for stored in parts):
            return None
        rows = [stored.shape[0] for stored in parts[:-1]]
        rows.append(shape[0] - sum(rows))
        blocks = []
        for part, stored, n in zip(names, parts, rows):
            check_shape(stored.name, stored.shape, (n, *shape[1:]))
            block = file_blocks(stored)
            order = self.order(part, stored.shape)
            blocks.append(block if order is None else block.reordered(*order))
        return blocks

    def order(self, name: str, shape: tuple[int, ...]) -> tuple[int, Tensor] | None:
        """A dimension, and the file's place along it of each of Hugging Face's; None: the same. In
        files of Llamas the two halves of a head of q or k, which rotate together, interleave."""
        if "order" in self.file:
            return self.file["order"](self.config, name, shape)
        module = name.split(".")[-2]
        if module not in ("q_proj", "k_proj") or not self.file.get("interleaved"):
            return None
        n_head = self.config["num_attention_heads"]
        if module == "k_proj":
            n_head = self.config.get("num_key_value_heads") or n_head
        pairs = torch.arange(shape[0]).view(n_head, -1, 2)  # (H, D/2, 2)
        return 0, pairs.transpose(1, 2).flatten()


# --- the other half of a model that takes pictures or sound: a file of its own, an mmproj ---

def has_pictures(path: Path, meta: dict[str, Any]) -> bool:
    """Whether a GGUF file with that metadata holds the texts of a model that takes pictures: by its
    architecture, or an mmproj beside it that gives vectors of its size."""
    arch = meta.get("general.architecture")
    size = meta.get(f"{arch}.embedding_length")
    beside = path.parent.glob("*mmproj*.gguf")
    return arch in TEXTS or any(size in sizes_in(file) for file in beside)


def sizes_in(mmproj: Path) -> set[int]:
    try:
        _, tensors = read_part(mmproj)
    except ValueError:
        return set()
    return {n for tensor in tensors.values() for n in tensor.shape}


# --- reading ---

def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, InFile]]:
    """A .gguf file -> (metadata, {name: tensor}); of one that was split by llama.cpp all parts,
    whichever is given, and the metadata of the first. ValueError if one is truncated, no part of
    that file, or claims what cannot be."""
    meta, tensors = read_part(path)
    if meta.get("general.architecture") == "clip":
        raise ValueError(f"{path} is an mmproj, no model: give the model's file beside it")
    count = meta.get("split.count", 1)
    if count == 1:
        return meta, tensors
    meta, tensors = {}, {}
    for i in range(count if is_number(count, int) else 0):
        file = path.with_name(PART.sub(f"-{i + 1:05d}", path.name))
        its_meta, its_tensors = read_part(file)
        place = (its_meta.get("split.no"), its_meta.get("split.count"))
        if place != (i, count) or tensors.keys() & its_tensors.keys():
            raise ValueError(f"{file} is not part {i + 1} of {count} of a split GGUF, which it is "
                             "to be by its name, as in -00001-of-00002.gguf")
        meta = meta or its_meta
        tensors |= its_tensors
    return meta, tensors


def read_part(path: Path) -> tuple[dict[str, Any], dict[str, InFile]]:
    try:
        header = Header(open(plain_file(path), "rb"))
        meta = header.settings()
        return meta, header.tensors(meta)
    except (OSError, ValueError) as e:
        raise ValueError(f"cannot read {path}: not a GGUF file, or a truncated one "
                         f"({first_line(e)})") from None


class Header:
    """What a GGUF file says in front of its tensors, read once from its start. Whatever it claims
    to have, no more is read, or kept, than it has bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.left = self.size  # bytes
        version = self.number() if self.take(4) == b"GGUF" else None
        if version in (2 << 24, 3 << 24):
            raise ValueError("it is big-endian, made for machines of the other byte order")
        if version not in (2, 3):
            raise ValueError(f"it has version {version}")
        self.n_tensors, self.n_settings = self.numbers(Kind.UINT64, 2)

    def take(self, n: int) -> bytes:
        """The next n bytes."""
        taken = self.file.read(n) if n <= self.left else b""
        if len(taken) < n:
            raise ValueError("it ends too early")
        self.left -= n
        return taken

    def text(self) -> str:
        return self.take(int.from_bytes(self.take(8), "little")).decode()

    def numbers(self, kind: int, n: int = 1) -> list[int | float | bool]:
        if kind not in NUMBERS:
            raise ValueError(f"it has a value of type {kind}")
        nbytes = n * np.dtype(NUMBERS[kind]).itemsize
        return np.frombuffer(self.take(nbytes), NUMBERS[kind]).tolist()

    def number(self, kind: int = Kind.UINT32) -> int | float | bool:
        return self.numbers(kind)[0]

    def value(self) -> Any:
        """A number, a text, or a list of them."""
        kind = self.number()
        if kind == Kind.STRING:
            return self.text()
        if kind != Kind.ARRAY:
            return self.number(kind)
        kind, n = self.number(), self.number(Kind.UINT64)
        return [self.text() for _ in range(n)] if kind == Kind.STRING else self.numbers(kind, n)

    def settings(self) -> dict[str, Any]:
        meta = {self.text(): self.value() for _ in range(self.n_settings)}
        if len(meta) < self.n_settings:
            raise ValueError("it has a setting twice")
        return meta

    def tensors(self, meta: dict[str, Any]) -> dict[str, InFile]:
        """By name. Each has a place of its own, so that they are as large as the file at most."""
        tensors = [self.tensor() for _ in range(self.n_tensors)]
        alignment = meta.get("general.alignment", 32)
        if not is_number(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its general.alignment is {alignment!r:.60}, no power of two")
        end = start = (self.left - self.size) // alignment * -alignment  # rounded up
        placed = {}
        for tensor in sorted(tensors, key=lambda each: each.offset):
            tensor.offset += start
            if tensor.offset % alignment or tensor.offset < end or tensor.name in placed:
                raise ValueError(f"tensor {tensor.name} lies over others")
            end = tensor.offset + tensor.nbytes
            if end > self.size:
                raise ValueError(f"it ends before tensor {tensor.name} does")
            placed[tensor.name] = tensor
        return placed

    def tensor(self) -> InFile:
        """The next one, its offset that behind the header."""
        name = self.text()
        dims = self.numbers(Kind.UINT64, self.number())
        kind, offset = self.number(), self.number(Kind.UINT64)
        block, nbytes = gguf.GGML_QUANT_SIZES.get(kind, (0, 0))
        if not block or not 1 <= len(dims) <= 4 or min(dims) < 1 or dims[0] % block:
            raise ValueError(f"tensor {name} has type {kind} and shape {dims!r:.60}")
        row_bytes = dims[0] // block * nbytes
        return InFile(name, GGML(kind), tuple(dims[::-1]), row_bytes, self.file, offset)
