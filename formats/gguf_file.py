"""GGUF files: their own names, quantized tensors, and for some architectures rows in another
order."""
from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from formats.architectures import hf_config
from formats.blocks import FLOATS, file_blocks
from formats.checkpoint import (
    CheckedCheckpoint, check_shape, check_stack, making_sense_of, require_file,
)
from formats.integers import Blocks
from model import first_line


def read_checkpoint(path: Path) -> GGUFCheckpoint:
    meta, tensors = read_gguf(path)
    with making_sense_of(path):
        config, file = hf_config(meta, tensors)
    return GGUFCheckpoint(path, config, tensors, file)


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
            if f".{module}." in name:
                return [name.replace(module, part) for part in parts]
        return [name]

    def stored_names(self, name: str) -> list[str]:
        return [self.stored_name(part) for part in self.alone(name)]

    def stored_name(self, name: str) -> str:
        name = EXPERT_NUMBER.sub("", name)
        stored = self.names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        if stored not in self.tensors and f"{stored}.weight" in self.tensors:
            return f"{stored}.weight"  # the sinks of attention, parameters without a module
        return stored

    def part_of(self, stored: str, name: str) -> gguf.ReaderTensor:
        """As it lies in the file, an expert's out of its stack."""
        tensor = self.tensors[stored]
        expert = EXPERT_NUMBER.search(name)
        if expert is None:
            return tensor
        check_stack(stored, tensor.data, self.config)
        data = tensor.data[int(expert[1])]
        offset = tensor.data_offset + int(expert[1]) * data.nbytes
        return tensor._replace(shape=tensor.shape[:-1], data=data, data_offset=offset)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that Hugging Face name as Hugging Face has it, dequantized to float32.
        ValueError if it has another shape or cannot be read."""
        parts = self.alone(name)
        size = shape[0] // len(parts)
        tensors = [self.read_alone(part, (size, *shape[1:])) for part in parts]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def read_alone(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The same of a tensor that the file does not have in parts."""
        stored = self.part_of(self.stored_name(name), name)
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

    def default_dtype(self, quantize: str | None, device: torch.device) -> torch.dtype:
        """On a CPU float32 where integers are kept: on SmolLM2 in Q4_1 a mean KL of 8.9e-4 from the
        dequantized model, of which scales in bfloat16 are 2.2e-4 and products in it the rest;
        everything in bfloat16 is 1.3e-3, and what the flash kernels of GPUs take."""
        quantized = any(stored.tensor_type not in FLOATS for stored in self.tensors.values())
        kept = quantized and quantize == "auto" and device.type != "cuda"
        return torch.float32 if kept else torch.bfloat16

    def blocks(self, name: str, shape: tuple[int, ...]) -> list[Blocks] | None:
        """None also where the file has a tensor in parts."""
        if self.alone(name) != [name]:
            return None
        stored = self.part_of(self.stored_name(name), name)
        if stored.tensor_type in FLOATS:
            return None
        blocks = file_blocks(self.path, stored, self.row_order(name, shape[0]))
        check_shape(stored.name, blocks.shape, shape)
        return [blocks]

    def row_order(self, name: str, N: int) -> Tensor | None:
        """The file's row of each of the N rows that Hugging Face has; None where it is the same.
        In files of Llamas the two halves of a head of q or k, which rotate together, interleave."""
        module = name.split(".")[-2]
        if module not in ("q_proj", "k_proj") or not self.file.get("interleaved"):
            return None
        n_head = self.config["num_attention_heads"]
        if module == "k_proj":
            n_head = self.config.get("num_key_value_heads") or n_head
        pairs = torch.arange(N).view(n_head, -1, 2)  # (H, D/2, 2)
        return pairs.transpose(1, 2).flatten()


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
