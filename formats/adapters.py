"""LoRA adapters as the PEFT library writes them, added to weights while these are read."""
from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.nn as nn
from torch import Tensor

from formats.checkpoint import CheckedCheckpoint, Plan, making_sense_of, read_weights
from formats.integers import Blocks, check_shape, read
from formats.settings import is_factor, read_json
from formats.wrappers import plain_names
from model import FAMILIES, WEIGHT_DTYPES

# settings of how it was trained, and those that are read here; any other one is refused if set
KNOWN = set(
    "alpha_pattern auto_mapping base_model_name_or_path bias eva_config exclude_modules "
    "fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform "
    "loftq_config lora_alpha lora_dropout megatron_core modules_to_save peft_type peft_version "
    "qalora_group_size r rank_pattern revision target_modules task_type use_dora use_rslora".split()
)
ONLY = {  # what they may be; other starts change the base model too
    "peft_type": ["LORA"], "init_lora_weights": [None, True, False, "gaussian", "eva", "orthogonal"]
}
PART = re.compile(r"\.lora_(?P<embedding>embedding_)?(?P<part>A|B|magnitude)(_vector)?(\.weight)?$")
ENDLESS = re.compile(r"\)[*+{]|([*+{].*){4}")  # in a pattern, which may take for ever then
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def adapt(checkpoint: CheckedCheckpoint, folder: str | Path) -> None:
    """From now on a checkpoint is read with what an adapter makes of it; integers that it changes
    are dequantized. ValueError: the folder holds none that is known, or that of another model."""
    adapter = Adapter(Path(folder))
    changes, config = adapter.changes, checkpoint.config
    if "gpt_flash" in config:
        raise ValueError(f"{checkpoint.path} is what --save wrote: give the adapter to that run")
    tied = (FAMILIES[config["model_type"]].defaults | config).get("tie_word_embeddings")
    untied = tied and not changes.keys().isdisjoint((EMBEDDING, HEAD))
    if untied:  # as while it was trained: the other one stays what both were
        config["tie_word_embeddings"] = False
        changes.setdefault(HEAD, {})
    integers_of, check, read_plain = checkpoint.integers, checkpoint.check_names, checkpoint.read

    def base_of(name: str) -> str:
        return EMBEDDING if untied and name == HEAD else name

    def integers(model: nn.Module, plan: Plan) -> dict[str, list[Blocks]]:
        kept = {name: parts for name, parts in plan.items() if changes.keys().isdisjoint(parts)}
        return integers_of(model, kept)

    def check_names(wanted: Iterable[str]) -> None:
        wanted = list(wanted)
        for name in changes.keys() - wanted:
            whose = adapter.config.get("base_model_name_or_path")
            raise ValueError(f"{folder}, an adapter of {whose!r:.60}, changes {name}, which "
                             f"{checkpoint.path} does not have")
        check(map(base_of, wanted))

    def read_changed(name: str, shape: tuple[int, ...]) -> Tensor:
        weight = read_plain(base_of(name), shape)
        return adapter.change(name, weight) if name in changes else weight

    checkpoint.integers, checkpoint.check_names = integers, check_names
    checkpoint.read = read_changed


class Adapter:
    """changes: by the name of a weight or a bias, what takes its place, whole, or A [r, K] and
    B [N, r], and perhaps DoRA's magnitude [N]."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "adapter_config.json")
        for key, allowed in ONLY.items():
            self.refuse(key, self.config.get(key) not in allowed)
        for key, value in self.config.items():
            self.refuse(key, value and key not in KNOWN)
        self.changes: dict[str, dict[str, Any]] = {}
        for name, x in plain_names(self.tensors(), {}).items():
            found = PART.search(name)
            key, part = name.replace(".base_layer.", "."), "whole"
            if found:
                key, part = f"{name[:found.start()]}.weight", found["part"]
            if found and found["embedding"]:  # which multiplies from the other side
                part = {"A": "B", "B": "A"}.get(part, part)
                x = read(x).movedim(0, -1)
            self.changes.setdefault(key, {})[part] = x
        together = {"A", "B", "magnitude"} if self.config.get("use_dora") else {"A", "B"}
        for key, parts in self.changes.items():
            if parts.keys() - {"whole"} not in (set(), together):
                raise ValueError(f"{folder} has {', '.join(sorted(parts))} of {key}, where "
                                 f"{', '.join(sorted(together))} belong together")

    def tensors(self) -> dict[str, Any]:
        file = self.folder / "adapter_model.safetensors"
        tensors = read_weights(file)
        if not tensors:
            raise ValueError(f"{file} has no tensor: it changes nothing")
        return {name.removeprefix("base_model.model."): x for name, x in tensors.items()}

    def refuse(self, key: str, problem: Any) -> None:
        if problem:
            raise ValueError(f"unsupported {key} {self.config.get(key)!r:.60} of {self.folder}")

    def setting(self, name: str, patterns: str, key: str) -> float:
        """Of PEFT's patterns the first that matches the end of a module's name counts."""
        value = self.config.get(name)
        given = self.config.get(patterns) or {}
        self.refuse(patterns, any(map(ENDLESS.search, given)))
        for end in reversed(given):
            if re.match(rf"(.*\.)?({end})\.weight$", key):
                value = given[end]
        if not is_factor(value):
            raise ValueError(f"{name} of {self.folder} is {value!r:.60}, no number above 0")
        return value

    def change(self, key: str, weight: Tensor) -> Tensor:
        """What becomes of a weight or a bias."""
        tensors = {part: read(x) for part, x in self.changes[key].items()}
        shapes = {"whole": tuple(weight.shape)}
        if "A" in tensors:
            with making_sense_of(self.folder / "adapter_config.json"):
                rank = self.setting("r", "rank_pattern", key)
                scale = self.setting("lora_alpha", "alpha_pattern", key)
            scale /= math.sqrt(rank) if self.config.get("use_rslora") else rank
            if weight.dim() != 2:
                raise ValueError(f"{self.folder} has A and B of {key}, which is no matrix")
            N, K = weight.shape
            shapes |= {"A": (rank, K), "B": (N, rank), "magnitude": (N,)}
        for part, x in tensors.items():
            check_shape(f"{part} of {key} in {self.folder}", x.shape, shapes[part])
            if x.dtype not in WEIGHT_DTYPES or not x.isfinite().all():
                raise ValueError(f"{part} of {key} in {self.folder} is not of finite numbers")
        weight = tensors.get("whole", weight)
        if "A" in tensors:
            weight = weight.float().addmm(tensors["B"].float(), tensors["A"].float(), alpha=scale)
        if "magnitude" in tensors:
            weight *= (tensors["magnitude"].float() / weight.norm(dim=1))[:, None]
        return weight
