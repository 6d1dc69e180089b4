"""Gemma 3n: with the attention and the inputs of Gemma 4. A token has several vectors: each layer
works on one, and corrects the others by what came of it (AltUp, arXiv 2301.13310)."""
from __future__ import annotations

from collections.abc import Iterable
from statistics import NormalDist

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from families.blocks import SandwichBlock
from families.gemma4 import Gemma4Transformer
from families.settings import of_layers
from model import ACTIVATIONS, MLP, BlockForward, LayerCache, ModelConfig, Positions, positive
from quantize import Linear


def ffn_dims(hf: dict) -> list[int]:
    """Of each layer; a file may have one for all."""
    if isinstance(hf["intermediate_size"], list):
        sizes = of_layers(hf, "intermediate_size")
        return [positive({"intermediate_size": size}, "intermediate_size") for size in sizes]
    return [positive(hf, "intermediate_size")] * positive(hf, "num_hidden_layers")


class SparseMLP(MLP):
    """In the first layers only the largest gates count: those above what as many of normally
    distributed ones are below."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer, ffn_dims(config.hf)[layer])
        first = 10 if config.n_layer > 10 else 0
        shares = of_layers(config.hf, "activation_sparsity_pattern") or [0.95] * first
        share = shares[layer] if layer < len(shares) else 0
        self.cutoff = NormalDist().inv_cdf(share) if share else None

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        if self.cutoff is not None:
            std, mean = torch.std_mean(gate, dim=-1, keepdim=True, correction=0)
            gate = F.relu(gate - mean - std * self.cutoff)
        return self.down_proj(self.act(gate) * up)


class AltUp(nn.Module):
    """What becomes of a token's n vectors in a layer, of which one is active."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        n = positive(config.hf, "altup_num_inputs")
        self.active = config.hf["altup_active_idx"]
        self.scales_output = config.hf["altup_correct_scale"]
        self.correct_output_scale = nn.Parameter(torch.empty(config.dim))
        self.prediction_coefs = nn.Linear(n, n * n, bias=False)
        self.correction_coefs = nn.Linear(n, n, bias=False)
        self.modality_router = nn.Linear(config.dim, n, bias=False)
        self.router_norm = nn.RMSNorm(config.dim, config.norm_eps)

    def route(self, x: Tensor) -> Tensor:
        """x [B, T, dim] -> [B, T, n]."""
        return self.modality_router(self.router_norm(x) / x.shape[-1]).float().tanh().to(x.dtype)

    def predict(self, x: Tensor) -> Tensor:
        """x [n, B, T, dim] -> what the vectors will be as far as they say themselves."""
        coefs = self.prediction_coefs(self.route(x[self.active])).unflatten(-1, (len(x), len(x)))
        return x + torch.einsum("btji,ibtd->jbtd", coefs, x)

    def correct(self, x: Tensor, y: Tensor) -> Tensor:
        """x [n, B, T, dim]: predicted; y [B, T, dim]: what came of the active one."""
        coefs = self.correction_coefs(self.route(y)) + 1  # (B, T, n)
        return x + (y - x[self.active]) * coefs.movedim(-1, 0)[..., None]

    def output(self, x: Tensor) -> Tensor:
        x = x[self.active]
        return x * self.correct_output_scale if self.scales_output else x


class Laurel(nn.Module):
    """Beside attention, a product of low rank."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        rank = positive(config.hf, "laurel_rank")
        self.linear_left = Linear(config.dim, rank, bias=False)
        self.linear_right = Linear(rank, config.dim, bias=False)
        self.post_laurel_norm = nn.RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.post_laurel_norm(self.linear_right(self.linear_left(x)))


class Gemma3nBlock(SandwichBlock):
    """Its x are n vectors for each token, [n, B, T, dim]."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        size = positive(config.hf, "hidden_size_per_layer_input")
        self.altup = AltUp(config)
        self.laurel = Laurel(config)
        self.act = ACTIVATIONS[config.act]
        self.per_layer_input_gate = Linear(config.dim, size, bias=False)
        self.per_layer_projection = Linear(size, config.dim, bias=False)
        self.post_per_layer_input_norm = nn.RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        x = self.altup.predict(x)
        active = x[self.altup.active]
        y = self.input_layernorm(active)
        attended = self.post_attention_layernorm(self.self_attn(y, positions, cache))
        y = (active + attended + self.laurel(y)) * 2 ** -0.5
        y = y + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(y)))
        x = self.altup.correct(x, y)
        y = self.act(self.per_layer_input_gate(self.altup.output(x))) * positions.of_layer
        y = self.post_per_layer_input_norm(self.per_layer_projection(y))
        return torch.cat([x[:1], x[1:] + y])


class Gemma3nTransformer(Gemma4Transformer):
    """The embedding makes n vectors of a token, and the last layer's become one again."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        others = range(positive(config.hf, "altup_num_inputs") - 1)
        sizes = config.dim, config.dim
        self.altup_projections = nn.ModuleList(Linear(*sizes, bias=False) for _ in others)
        self.altup_unembed_projections = nn.ModuleList(Linear(*sizes, bias=False) for _ in others)

    def embed(self, tokens: Tensor) -> Tensor:
        x = super().embed(tokens)
        return as_large([x] * len(self.altup_projections), self.altup_projections, x)

    def run_layers(
        self, block_forward: BlockForward, tokens: Tensor, positions: list[Positions],
        layers: list[LayerCache],
    ) -> Tensor:
        x = super().run_layers(block_forward, tokens, positions, layers)
        return as_large(x[1:], self.altup_unembed_projections, x[0]).mean(0)


def as_large(vectors: Iterable[Tensor], projections: nn.ModuleList, x: Tensor) -> Tensor:
    """x [B, T, dim] and projected vectors, which are made as large -> [n, B, T, dim]."""
    size = x.square().mean(-1, keepdim=True).sqrt()
    made = [x]
    for vector, projection in zip(vectors, projections):
        y = projection(vector)
        made.append(y * size / y.square().mean(-1, keepdim=True).clamp(min=1e-5).sqrt())
    return torch.stack(made)
