"""A layer's cache whose decode step torch.compile can look into."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model import LayerCache


class CPULayerCache(LayerCache):
    """A LayerCache of a CPU: compiled, one token of one row attends without any Python, where
    flash_decode's takes as long as the attention."""

    def flash_decode(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, input_pos: Tensor, **options: Any
    ) -> Tensor:
        same = self.kv.dtype == q.dtype and not self.places.ring
        compiling = torch.compiler.is_compiling()
        if compiling and same and compiles_lengths() and fits_into_graph(q, k, options):
            return self.decode_in_graph(q, k, v, input_pos, options.get("scale"))
        return super().flash_decode(q, k, v, input_pos, **options)

    def decode_in_graph(
        self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, scale: float | None
    ) -> Tensor:
        """flash_decode for one token of one row, by operators that the compiler knows."""
        n = input_pos.item()  # a symbol in the graph
        if torch.compiler.is_compiling():
            torch._check(n >= 0)
            torch._check(n < self.kv.shape[3])
        self.write(k, v, input_pos.long()[:, None])
        keys, values = self.read(n + 1, q.dtype)  # (1, Hkv, n + 1, D) each
        # a KV head's query heads ride along as query rows, so that no key is repeated
        folded = q.reshape(1, k.shape[1], -1, q.shape[3])  # (1, Hkv, Hq / Hkv, D)
        y, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            folded, keys, values, scale=scale
        )
        return y.reshape(q.shape)


def compiles_lengths() -> bool:
    """Whether torch.compile makes a length a symbol: without this switch, which compile_model sets,
    every length would be compiled for itself."""
    return torch._dynamo.config.capture_scalar_outputs


def fits_into_graph(q: Tensor, k: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether a step can take decode_in_graph: one token of one row, so that there is one length,
    and of the options none but scale."""
    one_token = len(q) == 1 and q.shape[2] == 1 and k is not None
    others = [value for name, value in options.items() if name != "scale"]
    return q.is_cpu and one_token and all(value is None for value in others)
