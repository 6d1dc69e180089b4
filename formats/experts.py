"""The tensors of a mixture of experts, by the names that most models have for them."""
from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, dtype

from formats.integers import mxfp4_blocks, read
from formats.settings import LARGEST

# other names, in files of Mixtral, and of gpt-oss, ERNIE and LFM2
MIXTRAL = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w3.": ".up_proj.",
           ".w2.": ".down_proj.", ".mlp.e_score": ".mlp.gate.e_score"}
OTHERS = {".mlp.router.": ".mlp.gate.", ".moe_statics.e_score": ".gate.e_score",
          ".expert_bias": ".gate.e_score_correction_bias"}
# of all experts of a layer, as gpt-oss and transformers 5 have them; in MXFP4 with _scales beside
STACK = re.compile(r"(.*\.experts\.)(gate_up|down)_proj(_bias|_blocks|)")
LARGEST_N = 2**18  # of all tensors: far above any model's
ENDS = {"": "weight", "_bias": "bias", "_blocks": "weight_packed"}


def settle_experts(tensors: dict[str, Any], model_type: str) -> None:
    """Give tensors their plain names, and put one for each expert in the place of a stack."""
    for name in list(tensors):
        plain = name
        for theirs, ours in (MIXTRAL if ".block_sparse_moe." in name else OTHERS).items():
            plain = plain.replace(theirs, ours)
        tensors[plain] = tensors.pop(name)
    for name in filter(STACK.fullmatch, list(tensors)):
        scales = name.replace("_blocks", "_scales")  # of others their own name
        is_odd = tensors[name].shape[0] > LARGEST["num_experts"] or len(tensors) > LARGEST_N
        if is_odd or scales not in tensors:
            continue  # the model will say that it lacks them
        stack, exponents = tensors.pop(name), tensors.pop(scales, None)
        prefix, joined, kind = STACK.fullmatch(name).groups()
        is_turned = model_type == "gpt_oss" and kind == ""
        rows = range(stack.shape[-1 if is_turned else 1])
        half = len(rows) // 2
        parts = {"down": rows}
        if joined == "gate_up":
            parts = {"gate": rows[:half], "up": rows[half:]}
            if model_type == "gpt_oss":  # by turns
                parts = {"gate": rows[::2], "up": rows[1::2]}
        for i in range(stack.shape[0]):
            whole = stack[i]
            for part, rows in parts.items():
                own = Part(whole, rows, is_turned)
                if exponents is not None:
                    own = mxfp4_blocks(name, whole, exponents[i], rows)
                tensors[f"{prefix}{i}.{part}_proj.{ENDS[kind]}"] = own


@dataclass
class Part:
    """Some rows of a tensor of a file, or of its transpose."""

    whole: Any  # a tensor, an InFile of formats/checkpoint.py or Floats of formats/packed.py
    rows: range
    is_turned: bool

    @property
    def dtype(self) -> dtype:
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.whole.shape)
        return len(self.rows), *(shape[::-1] if self.is_turned else shape)[1:]

    def read(self) -> Tensor:
        whole = read(self.whole)
        whole = whole.t() if self.is_turned else whole
        return whole[self.rows.start:self.rows.stop:self.rows.step]
