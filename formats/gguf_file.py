"""GGUF files: their own names, quantized tensors, and for some architectures rows in another
order."""
from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from formats.architectures import hf_config, names_of
from formats.blocks import FLOATS, Blocks
from formats.checked import CheckedCheckpoint
from formats.experts import check_stack
from formats.files import require_file
from model import Checkpoint, first_line


def read_checkpoint(path: Path) -> Checkpoint:
    meta, tensors = read_gguf(path)
    try:
        config, file = hf_config(meta, tensors)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as e:
        why = f"the configuration in {path} makes no sense ({first_line(e)})"
        raise ValueError(why) from None
    return GGUFCheckpoint(path, config, tensors, file)


# the number of an expert in the name of its tensor; GGUF files have those of a layer in one stack
EXPERT_NUMBER = re.compile(r"(?<=experts)\.(\d+)(?=\.)")


class GGUFCheckpoint(CheckedCheckpoint):
    """A .gguf file: its own names, quantized tensors, and for some architectures rows in another
    order."""

    def __init__(self, path: Path, config: dict, tensors: dict, file: dict[str, Any]):
        super().__init__(path, config, tensors)
        self.file = file  # how such files differ: Family.gguf

    @cached_property
    def names(self) -> gguf.TensorNameMap:
        return names_of(self.file["name"], self.config["num_hidden_layers"])

    def stored_name(self, name: str) -> str:
        name = EXPERT_NUMBER.sub("", name)
        stored = self.names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        if stored not in self.tensors and f"{stored}.weight" in self.tensors:
            return f"{stored}.weight"  # the sinks of attention, parameters without a module
        return stored

    def alone(self, name: str) -> list[str]:
        """The names of the tensors that lie in the file in place of one, joined in that order."""
        for module, parts in self.file.get("parts", {}).items():
            if f".{module}." in name:
                return [name.replace(module, part) for part in parts]
        return [name]

    def check_names(self, wanted: Iterable[str]) -> None:
        alone = (part for name in wanted for part in self.alone(name))
        super().check_names(self.stored_name(part) for part in alone)

    def stored(self, name: str) -> gguf.ReaderTensor:
        """The tensor of that Hugging Face name as it lies in the file, an expert's out of its
        stack. ValueError if that has another number of experts than the configuration."""
        tensor = self.tensors[self.stored_name(name)]
        expert = EXPERT_NUMBER.search(name)
        if expert is None:
            return tensor
        check_stack(tensor.name, tensor.data, self.config)
        number = int(expert[1])
        nbytes = tensor.data[0].nbytes
        return tensor._replace(
            shape=tensor.shape[:-1],
            data=tensor.data[number],
            data_offset=tensor.data_offset + number * nbytes,
            n_elements=tensor.n_elements // len(tensor.data),
            n_bytes=nbytes,
        )

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that Hugging Face name as Hugging Face has it, dequantized to float32.
        ValueError if it has another shape or cannot be read."""
        parts = self.alone(name)
        size = shape[0] // len(parts)
        tensors = [self.read_alone(part, (size, *shape[1:])) for part in parts]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def read_alone(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The same of a tensor that the file does not have in parts."""
        stored = self.stored(name)
        try:
            tensor = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type))
        except Exception as e:  # a quantization that gguf does not know
            raise ValueError(f"cannot read tensor {stored.name}: {first_line(e)}") from None
        check_shape(stored.name, tuple(tensor.shape), shape)
        shift = self.file.get("norm_shift", 0)
        if name.endswith("norm.weight") and shift:
            tensor = tensor - shift
        order = self.row_order(name, shape[0])
        return tensor if order is None else tensor[order]

    def default_dtype(self, quantize: str | None) -> torch.dtype:
        """float32 where integers are kept. On SmolLM2 in Q4_1 that is a mean KL of 8.9e-4 from the
        dequantized model, of which scales in bfloat16 are 2.2e-4 and products in it the rest;
        everything in bfloat16 is 1.3e-3."""
        quantized = any(stored.tensor_type not in FLOATS for stored in self.tensors.values())
        return torch.float32 if quantized and quantize == "auto" else torch.bfloat16

    def blocks(self, name: str, shape: tuple[int, ...]) -> list[Blocks] | None:
        """The tensor of that Hugging Face name as the integers that it is stored in, part below
        part; None if it is stored in floating point."""
        if self.alone(name) != [name]:
            return None
        stored = self.stored(name)
        if stored.tensor_type in FLOATS:
            return None
        blocks = Blocks(self.path, stored, self.row_order(name, shape[0]))
        check_shape(stored.name, blocks.shape, shape)
        return [blocks]

    def row_order(self, name: str, N: int) -> Tensor | None:
        """The file's row of each of the N rows that Hugging Face has; None where it is the same.
        llama.cpp interleaves the two halves of a head that rotate together."""
        n_head = self.interleaved_heads(name)
        if n_head == 0:
            return None
        pairs = torch.arange(N).view(n_head, -1, 2)  # (H, D/2, 2)
        return pairs.transpose(1, 2).flatten()

    def interleaved_heads(self, name: str) -> int:
        """How many heads of a tensor have interleaved halves: those of Llama's q and k, else 0."""
        if not self.file.get("interleaved"):
            return 0
        n_head = self.config["num_attention_heads"]
        n_kv_head = self.config.get("num_key_value_heads") or n_head
        return {"q_proj": n_head, "k_proj": n_kv_head}.get(name.split(".")[-2], 0)


def check_shape(name: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if stored != shape:
        raise ValueError(f"tensor {name} has shape {stored}, expected {shape}")


class Reader(gguf.GGUFReader):
    """Slices a plain array: slices of numpy's memmap, of which a vocabulary takes 250,000, are
    three times as slow."""

    @property
    def data(self) -> np.ndarray:
        return self.plain

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self.plain = np.asarray(mapped)


@lru_cache(maxsize=2)  # the tokenizer asks for the same file
def read_gguf(path: Path) -> tuple[dict, dict[str, gguf.ReaderTensor]]:
    """A .gguf file -> (metadata, {name: tensor}); ValueError if it is truncated or a part."""
    require_file(path)
    try:
        reader = Reader(path)
        meta = {key: value.contents() for key, value in reader.fields.items()}
    except Exception as e:
        raise ValueError(f"cannot read {path}: not a GGUF file, or a truncated one "
                         f"({first_line(e)})") from None
    if meta.get("split.count", 1) != 1:
        raise ValueError(f"{path} is one part of a split GGUF; join the parts with llama.cpp's "
                         "gguf-split --merge")
    return meta, {tensor.name: tensor for tensor in reader.tensors}
