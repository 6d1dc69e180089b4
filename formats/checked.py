"""What all checkpoints here share: names and numbers are checked, and integers kept."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from formats.integers import fill_layers, put
from model import Checkpoint, Transformer, family_of, first_line, rope_settings
from quantize import MODES, Linear, quantized_layout

# ends of the names of tensors that may be surplus: they follow from the configuration
HARMLESS = ("rotary_emb.inv_freq", "rope_freqs.weight", "rope_factors_long.weight",
            "rope_factors_short.weight", "lm_head.weight")


class CheckedCheckpoint(Checkpoint):
    """A Checkpoint of a file that may be anything."""

    def empty_model(self) -> Transformer:
        """ValueError also where settings go together so badly that using them fails."""
        try:
            refuse_unsupported(self.config)
            return super().empty_model()
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as e:
            why = f"the configuration in {self.path} makes no sense ({first_line(e)})"
            raise ValueError(why) from None

    def put_layers(
        self, model: Transformer, quantize: str | None, device: torch.device | str
    ) -> Callable[[], None]:
        saved = quantized_layout(model, self.config, put)
        if saved and quantize in MODES:
            raise ValueError(f"{self.path} is quantized already; leave out --quantize {quantize}")
        plan = self.plan(model)
        self.check_names(name for parts in plan.values() for name in parts)
        if quantize != "auto" or saved:
            return lambda: None
        return fill_layers(self, model, plan, device)

    def plan(self, model: Transformer) -> dict[str, dict[str, tuple[int, ...]]]:
        """What each parameter of a model is read from."""
        plan = {}
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            tied = model.config.tied and isinstance(model.lm_head, Linear)
            own = not x.is_meta and not self.has(model, name, x)  # a value that no file has
            if not own and not (tied and name == "lm_head.weight"):
                plan[name] = self.parts(model, name, x)
        return plan

    def check_names(self, wanted: Iterable[str]) -> None:
        """wanted: Hugging Face's names of the tensors that a model reads. ValueError names a tensor
        that is missing, or surplus and not known to be harmless."""
        wanted = set(wanted)
        missing = wanted - self.tensors.keys()
        surplus = {name for name in self.tensors.keys() - wanted if not name.endswith(HARMLESS)}
        for names, problem in ((missing, "no tensor"), (surplus, "an unexpected tensor")):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise ValueError(f"{self.path} has {problem} {min(names)}{more}")

    def blocks(self, name: str, shape: tuple[int, ...]) -> list[Any] | None:
        """The tensor of that Hugging Face name as the integers that it is stored in, part below
        part; None if it is stored in floating point."""
        return None

    def check_filled(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        """What spoils a file seldom spares its norms and its embedding, so that no more is looked
        at."""
        if tensor.dim() == 1 or isinstance(module, nn.Embedding):
            require_finite(name, tensor)


# Settings that would go wrong if ignored, with the value that is supported; any value is in a
# family that has it among its defaults.
FIXED = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1,
    "mscale_all_dim": 0,
    "num_experts": 0,
    "num_local_experts": 0,
    "quantization_config": {},
    "use_bidirectional_attention": False,
}


def refuse_unsupported(config: dict) -> None:
    """ValueError names a setting that the family of a configuration does not support."""
    _, family = family_of(config)
    settings = rope_settings(family.defaults | config)
    for key, supported in FIXED.items():
        value = settings.get(key)
        if value not in (None, supported) and key not in family.defaults:
            raise ValueError(f"unsupported {key} {value!r}: only {supported!r} is supported")


def require_finite(name: str, tensor: Tensor) -> None:
    """ValueError if a tensor has NaN or infinity. Of the ways to ask, the smallest and largest
    number were measured fastest: 1.9 ms for 57 MB in bfloat16, where a sum in float32 takes 64."""
    if not tensor.is_floating_point():
        return
    low, high = tensor.aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(
            f"tensor {name} has numbers that are not finite in {tensor.dtype}: the file is "
            "damaged, or needs a dtype of a larger range"
        )
