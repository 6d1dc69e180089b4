"""LFM2: most layers have a short convolution between two gates in place of attention.

The last inputs of a convolution lie in its cache where others have keys and values, so that a row
goes back over proposals as in a layer with a window."""
from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from families.experts import MoEConfig, deepseek_moe
from families.settings import layer_kinds
from model import Device, KVCache, LayerCache, ModelConfig, Places, Positions, positive
from quantize import Linear

STORED_AS = {
    "input_layernorm": ("operator_norm",), "q_norm": ("q_layernorm",), "k_norm": ("k_layernorm",),
    "o_proj": ("out_proj",), "post_attention_layernorm": ("ffn_norm",), "mlp": ("feed_forward",),
    "gate_up_proj": ("w1", "w3"), "down_proj": ("w2",), "norm": ("embedding_norm",),
}


def windows(hf: dict) -> tuple[int | None, ...]:
    """How many tokens the convolution of each layer sees; None: it has attention."""
    n_seen, given = positive(hf, "conv_L_cache"), hf.get("full_attn_idxs")
    attends = [given is None or i in given for i in range(positive(hf, "num_hidden_layers"))]
    kinds = layer_kinds(hf, lambda hf: attends, "conv")
    return tuple(n_seen if kind == "conv" else None for kind in kinds)


def ffn_dim(hf: dict) -> int:
    """Files have the size of a network without a gate, to which one with a gate is adjusted."""
    size = positive(hf, "intermediate_size" if hf.get("block_ff_dim") is None else "block_ff_dim")
    if hf["block_auto_adjust_ff_dim"]:
        size = int(2 * size / 3)
        if hf["block_ffn_dim_multiplier"] is not None:
            size = int(positive(hf, "block_ffn_dim_multiplier", kind=float) * size)
            multiple = positive(hf, "block_multiple_of")
            size = -(-size // multiple) * multiple
    return size


def experts(hf: dict) -> MoEConfig | None:
    """All but the first layers have some, in the models that have any."""
    if "num_experts" not in hf:
        return None
    return deepseek_moe(hf | dict(
        first_k_dense_replace=hf["num_dense_layers"], n_shared_experts=0, topk_method="greedy",
    ), "num_experts", score="sigmoid", bias_dims=int(hf["use_expert_bias"]))


class ShortConvolution(nn.Module):
    """Each channel's values are weighted sums over the last few tokens."""

    stored_name = "conv"
    may_shift_scores = True  # it has none
    divides = False  # over ranks

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        dim, bias = config.dim, bool(config.hf.get("conv_bias"))
        self.n_seen = config.windows[layer]
        self.in_proj = Linear(dim, 3 * dim, bias=bias)
        self.conv = nn.Conv1d(dim, dim, self.n_seen, groups=dim, bias=bias)
        self.out_proj = Linear(dim, dim, bias=bias)

    def make_cache(self, cache: KVCache, places: Places, device: Device) -> LayerCache:
        """Half of an input is its key, the other half its value; they are never quantized."""
        shape = (2, cache.max_batch_size, 1, places.S, self.conv.in_channels // 2)
        return LayerCache(LayerCache.allocate(shape, self.conv.weight.dtype, device), places, False)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        T = x.shape[1]
        gate, out_gate, x = self.in_proj(x).chunk(3, dim=-1)  # (B, T, dim) each
        x = gate * x
        before = self.inputs_before(positions, cache)
        k, v = x[:, None].chunk(2, dim=-1)  # (B, 1, T, dim / 2) each
        if positions.prefill:
            cache.places.update(cache, k, v, positions)
        else:
            cache.write(k, v, cache.places.of(positions.index))
        x = torch.cat([before, x], dim=1)  # (B, n_seen - 1 + T, dim)
        y = 0 if self.conv.bias is None else self.conv.bias
        for i in range(self.n_seen):
            y = y + x[:, i:i + T] * self.conv.weight[:, 0, i]
        return self.out_proj(out_gate * y)

    def inputs_before(self, positions: Positions, cache: LayerCache) -> Tensor:
        """Of the tokens that the first new one sees, [B, n_seen - 1, dim]; zeros before a text."""
        first = positions.index[:, :1]
        index = first + torch.arange(1 - self.n_seen, 0, device=first.device)
        place = cache.places.of(index.clamp(min=0))
        row = torch.arange(len(place), device=place.device)[:, None]  # (B, 1)
        inputs = cache.kv[:, row, 0, place]  # (2, B, n_seen - 1, dim / 2)
        return torch.cat(inputs.unbind(0), -1).masked_fill((index < 0)[..., None], 0)
