"""Checkpoints of any form: Hugging Face folders, hub ids, GGUF files, bare configurations.

The tensors lie in mapped files: nothing is read before it is used."""
from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from formats.checked import CheckedCheckpoint
from formats.default import default_model
from formats.experts import EXPERT, check_stack, one_expert, other_names
from formats.files import is_plain, read_json, require_file, weight_files
from formats.mxfp4 import MXFP4Blocks
from formats.settings import check_settings
from model import Checkpoint, first_line
from quantize import say_once


def open_checkpoint(path: str | Path | None, device: torch.device | str = "cpu") -> Checkpoint:
    """A folder, hub id, .gguf file or bare config.json; None: the default model. ValueError says
    what is missing or cannot be read."""
    path = default_model() if path is None else resolve(path)
    checkpoint = read_checkpoint(path, device)
    check_settings(checkpoint.config)
    return checkpoint


def read_checkpoint(path: Path, device: torch.device | str) -> Checkpoint:
    if path.suffix == ".json":
        return RandomCheckpoint(path, read_json(path), device)
    if path.suffix == ".gguf":
        from formats.gguf_file import read_checkpoint as read_gguf  # gguf is slow to import
        return read_gguf(path)
    files = weight_files(path, "model*.safetensors")
    pickles = weight_files(path, "pytorch_model*.bin")
    if not files and not pickles:
        raise ValueError(f"{path} is not a model: expected a .gguf file, a config.json, or a "
                         "folder with a config.json and model*.safetensors or pytorch_model*.bin")
    config = read_json(path / "config.json")
    kind = FolderCheckpoint
    quantization = config.get("quantization_config") or {}
    if config.get("model_type") == "gpt_oss" and quantization.get("quant_method") == "mxfp4":
        kind = MXFP4Checkpoint
    if files:
        for file in files:
            require_file(file)
        checkpoint = kind.from_folder(path, files)
    else:
        tensors = {}
        for file in pickles:
            tensors |= read_pickle(file)
        checkpoint = kind(path, config, tensors)
    if kind is MXFP4Checkpoint:
        del checkpoint.config["quantization_config"]
    return checkpoint


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file; the pickle runs no code."""
    require_file(file)
    try:
        tensors = dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except Exception as e:
        raise ValueError(f"cannot read {file}: {first_line(e)}") from None
    for name, tensor in tensors.items():
        if not is_plain(tensor):
            raise ValueError(f"cannot read {file}: {name!r} is no plain tensor of the CPU's")
    return tensors


class RandomCheckpoint(CheckedCheckpoint):
    """A bare config.json: the weights are random."""

    def __init__(self, path: Path, config: dict, device: torch.device | str):
        super().__init__(path, config, {})
        self.device = device

    def check_names(self, wanted: Iterable[str]) -> None:
        say_once(
            f"WARNING: {self.path} is a bare configuration: the weights are RANDOM, for benchmarks "
            "only"
        )

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(std=0.02)


class FolderCheckpoint(CheckedCheckpoint):
    """A Hugging Face folder, also of a mixture of experts, whose tensors have names of their own,
    or one that save_quantized wrote."""

    def stored_name(self, name: str) -> str:
        """Hugging Face's name of a tensor -> its name in the file."""
        for stored_name in (name, *other_names(name)):
            if stored_name in self.tensors:
                return stored_name
        return name

    def check_names(self, wanted: Iterable[str]) -> None:
        super().check_names(self.stored_name(name) for name in wanted)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        stored_name = self.stored_name(name)
        tensor = self.tensors[stored_name]
        expert = EXPERT.search(name)
        if expert and stored_name != name and "block_sparse_moe" not in stored_name:
            check_stack(stored_name, tensor, self.config)
            tensor = tensor[int(expert["number"])]
            of_gpt_oss = self.config["model_type"] == "gpt_oss"
            if of_gpt_oss:
                tensor = tensor.t()  # of weights, [K, N]
            tensor = one_expert(tensor, expert["part"], by_turns=of_gpt_oss)
        return self.checked(stored_name, tensor, shape)


class MXFP4Checkpoint(FolderCheckpoint):
    """gpt-oss's files, whose experts are MXFP4: each weight is *_blocks and *_scales."""

    def stored_name(self, name: str) -> str:
        stored_name = super().stored_name(name)
        blocks = [f"{other}_blocks" for other in other_names(name)]
        return next((other for other in blocks if other in self.tensors), stored_name)

    def check_names(self, wanted: Iterable[str]) -> None:
        wanted = set(wanted)
        blocks = {self.stored_name(name) for name in wanted}
        scales = {scales_of(name) for name in blocks if name.endswith("_blocks")}
        super().check_names(wanted | scales)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """As Checkpoint's; of MXFP4 what it stands for, in float32."""
        blocks = self.blocks(name, shape)
        if blocks is None:
            return super().read(name, shape)
        q, scale, zero = blocks[0].affine(slice(0, shape[0]))
        groups = q.view(*scale.shape, -1) * scale[..., None] + zero[..., None]  # (N, K / 32, 32)
        return groups.flatten(1)

    def blocks(self, name: str, shape: tuple[int, ...]) -> list[MXFP4Blocks] | None:
        """The tensor of that Hugging Face name as the integers that it is stored in, part below
        part; None if it is stored in floating point."""
        stored_name = self.stored_name(name)
        if not stored_name.endswith("_blocks"):
            return None
        expert = EXPERT.search(name)
        parts = []
        for part in (stored_name, scales_of(stored_name)):
            check_stack(part, self.tensors[part], self.config)
            stored = self.tensors[part][int(expert["number"])]
            parts.append(one_expert(stored, expert["part"], by_turns=True))
        blocks = MXFP4Blocks(*parts)
        if blocks.shape != shape:
            raise ValueError(f"tensor {stored_name} has shape {blocks.shape}, expected {shape}")
        return [blocks]


def scales_of(blocks: str) -> str:
    """The name of the scales of *_blocks."""
    return blocks.removesuffix("blocks") + "scales"


def resolve(path: str | Path) -> Path:
    """A local path as it is, or a hub id as the folder that huggingface_hub keeps it in, its own
    cache first. ValueError if there is neither."""
    problem = "it is not a hub id"
    try:
        if str(path) and Path(path).exists():
            return Path(path)
    except OSError as e:  # longer than a name may be, say
        problem = e.strerror
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)):
        from huggingface_hub import snapshot_download  # slow to import, and rarely needed
        kinds = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
        for local in (True, False):
            try:
                folder = snapshot_download(str(path), allow_patterns=kinds, local_files_only=local)
                return Path(folder)
            except Exception as e:  # the hub's and the network's, of many kinds
                problem = first_line(e)
    raise ValueError("no such file or folder, nor a model the hub can give: "
                     f"{str(path)!r} ({problem})")
