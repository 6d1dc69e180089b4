"""What a row has read, for another row, or in a file: a long text is read once for many runs."""
from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import Device, KVCache, Transformer, first_line, rope_frequencies


def save_row(model: Transformer, ids: list[int], file: Path, row: int = 0) -> None:
    """Write what a row of model.cache holds of ids, its first tokens. ValueError: it has not all
    of them any more. OSError or SafetensorError: the file cannot be written."""
    cache = model.check_cache(row + 1, None)
    if cache.cached[row] < len(ids):
        raise ValueError(f"{len(ids)} tokens are not cached: the row has {cache.cached[row]}")
    cache.refuse_lost(slice(row, row + 1), len(ids))
    tensors = {name: x.contiguous() for name, x in parts_of_row(cache, row, len(ids)).items()}
    said = {"ids": json.dumps(ids), "model": fingerprint(model)}
    said["sums"] = sums_of(tensors)
    save_file(tensors, file, said)


@torch.no_grad()
def load_row(model: Transformer, file: Path) -> list[int]:
    """Give every row of model.cache what save_row wrote -> its ids: pass generate their number as
    `cached`. ValueError: the file cannot be read, or is of another model or kind of cache."""
    cache = model.check_cache(1, None)
    ids, of, tensors = read_row(file, model.device)
    if of != fingerprint(model):
        raise ValueError(f"{file} was written with another model, or with other settings of it")
    if not all(0 <= i < model.config.vocab_size for i in ids):
        raise ValueError(f"{file} has ids that are no tokens of the model")
    cache.refuse_overflow([len(ids)], 1)
    if kinds(parts_of_row(cache, 0, len(ids))) != kinds(tensors):
        raise ValueError(f"{file} is of another kind of cache: set one up as it was then")
    for row in range(cache.max_batch_size):
        fill_row(cache, row, len(ids), tensors)
    return ids


def kinds(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Their shapes and dtypes."""
    return {name: (x.shape, x.dtype) for name, x in tensors.items()}


def read_row(file: Path, device: Device = "cpu") -> tuple[list[int], str, dict[str, Tensor]]:
    """The ids, the model's fingerprint and the tensors of a file that save_row wrote, or
    ValueError."""
    try:
        with safe_open(file, "pt", device=str(device)) as stored:
            said = stored.metadata() or {}
            ids = [int(i) for i in json.loads(said["ids"])]
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        if said["sums"] != sums_of(tensors):
            raise ValueError("it is damaged")
        return ids, said["model"], tensors
    except Exception as e:  # of safetensors, JSON and the file system
        raise ValueError(f"cannot read what a row holds from {file}: {first_line(e)}") from None


def copy_row(cache: KVCache, source: int, target: int, length: int) -> None:
    """Give a row what another one holds in its first `length` positions."""
    fill_row(cache, target, length, parts_of_row(cache, source, length))


def fill_row(cache: KVCache, row: int, length: int, parts: dict[str, Tensor]) -> None:
    """Give a row the parts of one of that length."""
    for name, x in parts_of_row(cache, row, length).items():
        x.copy_(parts[name])
    cache.cached[row] = length


def parts_of_row(cache: KVCache, row: int, length: int) -> dict[str, Tensor]:
    """Views of what a row of that many tokens has in a cache."""
    parts = {}
    for i, layer in enumerate(dict.fromkeys(cache.whole)):  # which layers may share
        for j, x in enumerate(layer.live(row, length)):
            parts[f"layers.{i}.{j}"] = x
    if hasattr(cache, "written"):  # of one with rings
        parts["written"] = cache.written[row:row + 1]
    return parts


def fingerprint(model: Transformer) -> str:
    """What tells a model from another: its settings, those of its layers, how keys turn where its
    cache has that room, and its weights."""
    ropes = filter(None, dict.fromkeys(model.config.ropes))
    turns = [rope_frequencies(rope, model.cache.max_seq_len)[0].tolist() for rope in ropes]
    plain = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            passing = key in ("training", "compiled", "error")
            if isinstance(value, (int, float, str)) and not passing:
                plain.append((name, key, value))
    said = [model.config.hf, turns, plain, sums_of(model.state_dict())]
    return sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def sums_of(tensors: dict[str, Tensor]) -> str:
    """A hash of all their bits, added up in 64 parts of each: at the speed at which these are read,
    where they are."""
    sums = {}
    for name, x in tensors.items():
        content = x.detach().flatten().view(torch.uint8)
        if content.storage_offset() % 8:  # of a part, no beginning of an int64
            content = content.clone()
        end = len(content) // 512 * 512
        words = content[:end].view(torch.int64)
        sums[name] = words.view(64, -1).sum(1).tolist() + content[end:].tolist()
    return sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
