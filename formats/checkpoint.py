"""Checkpoints of any form: Hugging Face folders, hub ids, GGUF files, bare configurations.

They may hold anything, so that settings, names and numbers are checked."""
from __future__ import annotations

import ctypes
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import filterfalse
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import _TYPES as DTYPES
from torch import Tensor

from formats.default import default_model
from formats.experts import settle_experts
from formats.integers import Blocks, Rows, check_shape, fill_layers, put, read
from formats.packed import Floats, settle_quantized
from formats.settings import check_settings, plain_file, read_json, refuse_unsupported
from formats.wrappers import plain_names, text_config
from model import FAMILIES, Checkpoint, Transformer, family_of, first_line, is_number
from quantize import Linear, affine, say_once

Plan = dict[str, dict[str, tuple[int, ...]]]  # by parameter: what it is read from, and its shape
# ends of the names of tensors that may be surplus: they follow from the configuration
HARMLESS = ("inv_freq", "cos_cached", "sin_cached", "rope_freqs.weight",
            "rope_factors_long.weight", "rope_factors_short.weight", "lm_head.weight",
            "act_fn.beta", "act_fn.eps", "attention.bias", "attention.masked_bias")
IN_LAYERS = re.compile(r"(?:model\.)?(?:layers|blk)\.(\d+)\.")  # its number


def open_checkpoint(path: str | Path | None, device: torch.device | str = "cpu") -> Checkpoint:
    """A folder, hub id, .gguf file or bare config.json; None: the default model. ValueError says
    what is missing or cannot be read."""
    path = resolve(path)
    if path.suffix == ".json":
        checkpoint = RandomCheckpoint(path, text_config(read_json(path), path), {}, device)
    elif path.suffix == ".gguf":
        from formats.gguf_file import read_checkpoint  # gguf is slow to import
        checkpoint = read_checkpoint(path)
    else:
        checkpoint = read_folder(path)
    check_settings(checkpoint.config)
    return checkpoint


class CheckedCheckpoint(Checkpoint):
    """A Hugging Face folder, also of a mixture of experts, whose tensors have names of their own,
    or one that save_quantized wrote."""

    put_layer = staticmethod(put)

    def empty_model(self) -> Transformer:
        """ValueError also where settings go together so badly that using them fails."""
        n, n_layer = len(self.tensors), self.config.get("num_hidden_layers")
        if is_number(n_layer, int) and 0 < n < n_layer:  # 0: of a bare configuration
            raise ValueError(f"{self.path} has {n} tensors, too few for {n_layer} layers")
        with making_sense_of(self.path):
            refuse_unsupported(self.config)
            return super().empty_model()

    def put_layers(
        self, model: Transformer, quantize: str | None, device: torch.device | str
    ) -> Callable[[], None]:
        nothing_more = super().put_layers(model, quantize, device)
        for tensor in self.tensors.values():
            if isinstance(tensor, Floats):
                tensor.dtype = model.dtype  # at once: no layer lies in memory in two
        plan = self.plan(model)
        self.check_names(name for parts in plan.values() for name in parts)
        if quantize != "auto" or "gpt_flash" in self.config:
            return nothing_more
        return fill_layers(model, self.integers(model, plan), device)

    def plan(self, model: Transformer) -> Plan:
        """What each parameter of a model is read from."""
        plan = {}
        tied = model.config.tied and isinstance(model.lm_head, Linear)
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            own = not x.is_meta and not self.has(model, name, x)  # a value that no file has
            if not own and not (tied and name == "lm_head.weight"):
                plan[name] = self.parts(model, name, x)
        return plan

    def check_names(self, wanted: Iterable[str]) -> None:
        """wanted: Hugging Face's names of the tensors that a model reads. ValueError names one that
        is missing, or surplus in a layer and not harmless; others, as further heads, are said."""
        stored = {part for name in wanted for part in self.stored_names(name)}
        surplus = set(filterfalse(self.is_harmless, self.tensors.keys() - stored))
        in_layers = set(filter(IN_LAYERS.match, surplus))
        for names, problem in ((stored - self.tensors.keys(), "no tensor"),
                               (in_layers, "an unexpected tensor"), (surplus, "a tensor")):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                said = f"{self.path} has {problem} {min(names)}{more}"
                if problem != "a tensor":
                    raise ValueError(said)
                say_once(f"WARNING: {said} that nothing here reads: left out")

    def is_harmless(self, name: str) -> bool:
        """Whether nothing is lost without it: zeros that AutoGPTQ has for biases, layers behind the
        last one, which predict a further token, and keys of layers that share those of others."""
        layer = IN_LAYERS.match(name)
        n_layer = self.config["num_hidden_layers"]
        if layer and int(layer[1]) >= n_layer and self.config.get("num_nextn_predict_layers"):
            return True
        first_sharing = n_layer - (self.config.get("num_kv_shared_layers") or 0)
        if layer and int(layer[1]) >= first_sharing and re.search(r"\.[kv]_(proj|norm)\.", name):
            return True
        module, is_bias, _ = name.rpartition(".bias")
        if is_bias and f"{module}.weight_packed" in self.tensors:
            return not self.tensors[name].read().any()
        return name.endswith(HARMLESS)

    def integers(self, model: Transformer, plan: Plan) -> dict[str, list[Blocks]]:
        """By the name of a layer, the integers that the file has for it, part below part."""
        stored = {}
        for name, parts in plan.items():
            prefix, _, kind = name.rpartition(".")
            layer = model.get_submodule(prefix)
            if kind != "weight" or not isinstance(layer, (Linear, nn.Embedding)):
                continue
            blocks = []
            for part, shape in parts.items():
                blocks += self.blocks(part, shape) or [None]
            if None not in blocks:
                blocks = self.cut(name, blocks, tuple(layer.weight.shape))
                convert = FAMILIES[model.config.family].convert(model.config, name)
                stored[prefix] = blocks if convert is None else converted(blocks, convert)
        return {prefix: blocks for prefix, blocks in stored.items() if blocks}

    def parameter(
        self, model: Transformer, name: str, x: Tensor, device: torch.device | str = "cpu"
    ) -> Tensor:
        """ValueError for NaN or infinity in a norm or an embedding, which what spoils a file seldom
        spares. Of the ways to ask, the smallest and largest number were measured fastest: 1.9 ms
        for 57 MB in bfloat16, where a sum in float32 takes 64."""
        tensor = super().parameter(model, name, x, device)
        looked_at = tensor.dim() == 1 or name == "embed_tokens.weight"
        if not looked_at or not tensor.is_floating_point():
            return tensor
        low, high = tensor.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise ValueError(f"tensor {name} has numbers that are not finite in {tensor.dtype}: "
                             "the file is damaged, or needs a dtype of a larger range")
        return tensor

    def stored_names(self, name: str) -> list[str]:
        """Hugging Face's name of a tensor -> the file's of what it is made from; _packed is behind
        that of Blocks."""
        packed = f"{name}_packed"
        return [packed if packed in self.tensors else name]

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """As Checkpoint's; of Blocks what they stand for, in float32."""
        blocks = self.blocks(name, shape)
        if blocks is not None:
            q, scale, zero = blocks[0].affine(slice(0, shape[0]))
            return affine(q, 0, scale, zero, torch.float32)
        tensor = super().read(name, shape)
        return tensor.clone() if isinstance(tensor, Tensor) else tensor.read()

    def blocks(self, name: str, shape: tuple[int, ...]) -> list[Blocks] | None:
        """The tensor of that Hugging Face name as the integers that it is stored in, part below
        part; None if it is stored in floating point."""
        [stored] = self.stored_names(name)
        matrix = self.tensors.get(stored)
        if not isinstance(matrix, Blocks):
            return None
        check_shape(matrix.name, matrix.shape, shape)
        return [matrix]


@dataclass
class RandomCheckpoint(CheckedCheckpoint):
    """A bare config.json: the weights are random."""

    device: torch.device | str

    def check_names(self, wanted: Iterable[str]) -> None:
        say_once(f"WARNING: {self.path} is a bare configuration: the weights are RANDOM, for "
                 "benchmarks only")

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(std=0.02)


def converted(blocks: list[Blocks], convert: Callable[[Tensor], Tensor]) -> list[Blocks]:
    """A matrix with its rows where a family's convert takes them, which are of the same part; []
    where it does more than that, so that integers would not stay."""
    numbers = [len(part.rows) for part in blocks]
    order = convert(torch.arange(sum(numbers))[:, None])[:, 0]
    if order.is_floating_point():
        return []
    orders = [rows - rows.min() for rows in order.split(numbers)]
    return [part.reordered(0, rows) for part, rows in zip(blocks, orders)]


@contextmanager
def making_sense_of(path: Path) -> Iterator[None]:
    """ValueError where a configuration's settings fail together."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, re.error) as e:
        raise ValueError(f"the configuration in {path} makes no sense ({first_line(e)})") from None


# --- files ---

@dataclass
class InFile:
    """A tensor in an open file, read when it is asked for, into memory of its own: where a file is
    cut short meanwhile, one that is mapped would end the process."""

    name: str
    dtype: Any  # torch's, or a type of GGUF's
    shape: tuple[int, ...]
    row_bytes: int  # those of the last dimension
    file: BinaryIO
    offset: int  # of its first byte

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes

    def __getitem__(self, i: int) -> InFile:
        """One of those that are stacked."""
        if i >= self.shape[0]:
            raise ValueError(f"tensor {self.name} has shape {self.shape}, no entry {i}")
        nbytes = self.nbytes // self.shape[0]
        return replace(self, shape=self.shape[1:], offset=self.offset + i * nbytes)

    def read(self, rows: Rows | None = None) -> Tensor:
        """All of it, or some rows; of a type of GGUF's bytes. ValueError: the file ends there."""
        if isinstance(rows, Tensor):  # near ones at once: the two halves of a head may interleave
            far = 1 + (rows.diff().abs() > 512).nonzero()[:, 0]
            spans = [(x, range(int(x.min()), int(x.max()) + 1)) for x in rows.tensor_split(far)]
            return torch.cat([self.read(span)[x - span.start] for x, span in spans])
        stored = (*self.shape[:-1], self.row_bytes)
        rows = range(stored[0]) if rows is None else rows
        data = torch.empty(rows[-1] + 1 - rows[0], *stored[1:], dtype=torch.uint8, device="cpu")
        end = self.offset + (rows[-1] + 1) * (self.nbytes // stored[0])
        left = memoryview((ctypes.c_ubyte * data.nbytes).from_address(data.data_ptr()))
        while left:
            n = os.preadv(self.file.fileno(), [left], end - len(left))
            if not n:
                raise ValueError(f"{self.file.name} ends within tensor {self.name}")
            left = left[n:]
        data = data[::rows.step]
        return data.view(self.dtype) if isinstance(self.dtype, torch.dtype) else data


def open_tensors(path: Path) -> dict[str, InFile]:
    """The tensors of a safetensors file, by name. It raises what safetensors does, which checks
    that each has a place of its own in the file."""
    file = open(path, "rb")
    names = safe_open(path, "pt", backend="pread").keys()
    n = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(n))
    tensors = {}
    for name in names:
        dtype, shape, (start, end) = map(header[name].get, ("dtype", "shape", "data_offsets"))
        row_bytes = (end - start) // max(1, math.prod(shape[:-1]))
        tensors[name] = InFile(name, DTYPES[dtype], tuple(shape), row_bytes, file, 8 + n + start)
    return tensors


def resolve(path: str | Path | None) -> Path:
    """A local path as it is, or a hub id as the folder that huggingface_hub keeps it in, its own
    cache first; None: the default model. ValueError if there is neither."""
    if path is None:
        return default_model()
    problem = "it is not a hub id"
    try:
        if str(path) and Path(path).exists():
            return Path(path)
    except OSError as e:  # longer than a name may be, say
        problem = e.strerror
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)):
        for local in (True, False):
            try:
                return hub_folder(str(path), local)
            except Exception as e:  # the hub's and the network's, of many kinds
                problem = first_line(e)
    raise ValueError("no such file or folder, nor a model the hub can give: "
                     f"{str(path)!r} ({problem})")


def hub_folder(name: str, local: bool) -> Path:
    """A model's folder in the cache of huggingface_hub, into which what is read is fetched and no
    copy of it; local: nothing is, and it raises if not all is there."""
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed
    get = partial(snapshot_download, name, ignore_patterns="*/*", local_files_only=local)
    folder = Path(get(allow_patterns=["*.json", "*.jinja", "tokenizer.model"]))
    for weights in WEIGHTS:
        if not local:
            get(allow_patterns=weights)
            parts = [file.name for file in weight_files(folder, weights)]
            get(allow_patterns=parts or weights.replace(".", "-*-of-*."))
        files = weight_files(folder, weights)
        if files:
            break
    if local and not (files and all(file.exists() for file in files)):
        raise FileNotFoundError("the cache has only a part of it")
    return folder


def read_folder(folder: Path) -> CheckedCheckpoint:
    for weights, read_file in WEIGHTS.items():
        files = weight_files(folder, weights)
        if files:
            break
    else:
        raise ValueError(f"{folder} is not a model: expected a .gguf file, a config.json, or a "
                         "folder with it and model.safetensors or pytorch_model.bin, or parts")
    config = text_config(read_json(folder / "config.json"), folder)
    check_settings(config)
    tensors = {}
    for file in files:
        tensors |= read_weights(file, read_file)
    if "gpt_flash" not in config:  # it has names of our own
        tensors = plain_names(tensors, config)
        with making_sense_of(folder):
            settle_quantized(folder, config, tensors)
            settle_head(config, tensors)
            settle_experts(tensors, str(config.get("model_type")))
    return CheckedCheckpoint(folder, config, tensors)


def read_weights(
    file: Path, read: Callable[[Path], dict[str, Any]] = open_tensors
) -> dict[str, Any]:
    try:
        return read(plain_file(file))
    except Exception as e:  # of safetensors, pickle and the file system
        raise ValueError(f"cannot read {file}: {first_line(e)}") from None


def weight_files(folder: Path, name: str) -> list[Path]:
    """The file of that name, else those that its index lists, else its numbered parts; [] if there
    are none of these. Others beside them, as model.fp16.safetensors, are other models' or copies.
    ValueError: it cannot be said which they are, or some are missing."""
    index = folder / f"{name}.index.json"
    if (folder / name).exists():
        return [folder / name]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        listed = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        if not listed or any(Path(each).name != each for each in listed):
            raise ValueError(f"{index} does not list plain file names of its own folder")
        return [folder / each for each in sorted(listed)]
    parts = sorted(folder.glob(name.replace(".", "-[0-9]*-of-[0-9]*.")))
    if not all(f"-of-{len(parts):05d}." in part.name for part in parts):
        raise ValueError(f"{folder} has no {index.name}, and its parts {parts[0].name} to "
                         f"{parts[-1].name} are not one whole set")
    return parts


def settle_head(config: dict, tensors: dict[str, Any]) -> None:
    """Of an output layer and an embedding that the configuration ties, a file may have both, and
    they may differ, so that they are not; or only the first, which is the second then."""
    _, family = family_of(config)
    head = tensors.get("lm_head.weight")
    if head is None or not (family.defaults | config).get("tie_word_embeddings"):
        return
    table = tensors.setdefault("model.embed_tokens.weight", head)
    table, head = read(table), read(head)
    if table.dtype != head.dtype or not torch.equal(table, head):
        config["tie_word_embeddings"] = False


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, also of the old format, which runs no code. ValueError for one
    that lacks some of its numbers: sparse, quantized by PyTorch, or on a device without memory."""
    tensors = dict(torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file)))
    for name, x in tensors.items():
        plain = isinstance(x, Tensor) and x.layout == torch.strided and x.device.type == "cpu"
        if not plain or x.is_quantized or x.is_nested or str(name).endswith("_blocks"):  # MXFP4
            raise ValueError(f"{name!r} is no plain tensor of the CPU's")
    return tensors


# in the order in which they count; consolidated files are copies in most folders that have one
WEIGHTS = {
    "model.safetensors": open_tensors, "pytorch_model.bin": read_pickle,
    "consolidated.safetensors": open_tensors,
}
