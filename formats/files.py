"""Reading files that others wrote, which may be anything."""
from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from model import first_line


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


def require_file(path: Path) -> None:
    """ValueError for a pipe or a device, which one could wait at for ever."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"cannot read {path}: it is no plain file")


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


def is_plain(value: object) -> bool:
    """Whether something from a pickle is a tensor with all of its numbers: none that is sparse,
    quantized by PyTorch, or on a device without memory."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
        return False
    return value.device.type == "cpu" and not value.is_nested
