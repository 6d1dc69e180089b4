"""What follows attention in a layer: the gated feed-forward network."""
from collections.abc import Callable

import torch.nn as nn
from torch import Tensor

from quantize import Linear


class MLP(nn.Module):
    """The gated feed-forward network; gate and up are one product."""

    def __init__(
        self, dim: int, ffn_dim: int, act: Callable[[Tensor], Tensor], bias: bool = False
    ):
        super().__init__()
        self.act = act
        self.gate_up_proj = Linear(dim, 2 * ffn_dim, bias=bias)
        self.down_proj = Linear(ffn_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up)
