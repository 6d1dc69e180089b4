"""Qwen3-Next and Qwen3.5: most layers have a memory of fixed size (delta_rule.py), every fourth one
attends to all tokens, through a gate."""
from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from families import delta_rule
from families.delta_rule import Memory
from families.settings import last_ones, layer_kinds
from model import (
    FAMILIES, Attention, BlockForward, Device, KVCache, LayerCache, ModelConfig, Places, Positions,
    Transformer, apply_rope, positive,
)
from quantize import Linear

# --- settings ---


def windows(hf: dict) -> tuple[int | None, ...]:
    """A layer with a state sees one token, and lets go of it: rows go back no further than in a
    ring of that window."""
    attends = partial(last_ones, key="full_attention_interval")
    kinds = layer_kinds(hf, attends, "linear_attention")
    return tuple(None if kind == "full_attention" else 1 for kind in kinds)

# --- layers with a state ---


class DeltaCache(LayerCache):
    """The Memory of one layer for some rows, in the place of keys and values."""

    def __init__(self, tensors: list[Tensor], places: Places, flash: bool):
        super().__init__(tensors, places, flash)
        self.memory = Memory(*tensors)

    def rows(self, rows: slice) -> LayerCache:
        return type(self)([tensor[rows] for tensor in self.tensors], self.places, self.flash)

    def live(self, row: int, length: int) -> list[Tensor]:
        return [tensor[row] for tensor in self.tensors]


class GatedNorm(nn.RMSNorm):
    """Of each head, times the SiLU of a gate."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        y = F.rms_norm(x.float(), self.normalized_shape, eps=self.eps).to(gate.dtype)
        return (self.weight * y * F.silu(gate.float())).to(gate.dtype)


class GatedDeltaNet(nn.Module):
    """Qwen3-Next's and Qwen3.5's, its modules named as in the checkpoints of the first."""

    stored_name = "linear_attn"
    may_shift_scores = True  # it has none
    divides = False  # over ranks

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        sizes = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
                 "linear_value_head_dim", "linear_conv_kernel_dim")
        self.n_k, self.n_v, self.k_dim, self.v_dim, K = (positive(config.hf, x) for x in sizes)
        if self.n_v % self.n_k:
            raise ValueError(f"{self.n_v} value heads do not divide into {self.n_k} key heads")
        self.conv_dim = 2 * self.n_k * self.k_dim + self.n_v * self.v_dim
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, K, groups=self.conv_dim, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.n_v))
        self.dt_bias = nn.Parameter(torch.empty(self.n_v))
        self.norm = GatedNorm(self.v_dim, config.norm_eps)
        v_size = self.n_v * self.v_dim
        self.rows = {"in_proj_qkvz": [self.conv_dim, v_size], "in_proj_ba": [self.n_v, self.n_v]}
        self.in_proj_qkvz = Linear(config.dim, self.conv_dim + v_size, bias=False)
        self.in_proj_ba = Linear(config.dim, 2 * self.n_v, bias=False)
        self.out_proj = Linear(v_size, config.dim, bias=False)

    def make_cache(self, cache: KVCache, places: Places, device: Device) -> LayerCache:
        memory = Memory.allocate(
            cache.max_batch_size, (self.n_k, self.n_v), (self.k_dim, self.v_dim),
            (self.conv_dim, self.conv1d.weight.shape[2]), self.norm.weight.dtype, device,
        )
        return DeltaCache(list(memory), places, flash=True)

    def forward(self, x: Tensor, positions: Positions, cache: DeltaCache) -> Tensor:
        B, T, _ = x.shape
        qkv, z = self.in_proj_qkvz(x).split(self.rows["in_proj_qkvz"], -1)
        b, a = self.in_proj_ba(x).chunk(2, -1)  # (B, T, n_v)
        fading = self.A_log.float().exp()
        g = -fading * F.softplus(a.float() + self.dt_bias)
        inputs = qkv, g, b.float().sigmoid(), self.conv1d.weight[:, 0], positions.input_pos
        rule = torch.ops.gpt_flash_delta if torch.compiler.is_compiling() else delta_rule
        if positions.prefill:
            y = rule.prefill(*inputs, positions.last, *cache.memory)
        else:
            y = rule.decode(*inputs, *cache.memory)  # (B, T, n_v, v_dim)
        y = self.norm(y, z.view(B, T, self.n_v, self.v_dim))
        return self.out_proj(y.flatten(2))


# as Qwen3.5's files have them
STORED_AS = {"in_proj_qkvz": ("in_proj_qkv", "in_proj_z"), "in_proj_ba": ("in_proj_b", "in_proj_a")}


def by_part(config: ModelConfig, name: str) -> Any:
    """Qwen3-Next's files have the rows of all parts beside each other for each key head; newer
    GGUF files have in_proj_qkvz in parts."""
    hf = config.hf
    n_k, k_dim = hf["linear_num_key_heads"], hf["linear_key_head_dim"]
    group = hf["linear_num_value_heads"] // n_k
    v_size = group * hf["linear_value_head_dim"]
    module = name.split(".")[-2]
    if module == "in_proj_qkvz" and not hf.get("by_part"):
        sizes = [k_dim, k_dim, v_size, v_size]
    elif module == "in_proj_ba":
        sizes = [group, group]
    else:
        return None

    def together(x: Tensor) -> Tensor:
        parts = x.unflatten(0, (n_k, -1)).split(sizes, 1)
        return torch.cat([part.flatten(0, 1) for part in parts])

    return together

# --- layers with attention ---


class GatedAttention(Attention):
    """What a head gives is multiplied with the sigmoid of a gate, which the query's product has."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        n_heads = 2 * (self.n_head + self.n_kv_head)
        self.qkv_proj = Linear(config.dim, n_heads * self.head_dim, bias=config.qkv_bias)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        B, T, _ = x.shape
        heads = self.qkv_proj(x).view(B, T, -1, self.head_dim)
        qg, k, v = heads.split([2 * self.n_head, self.n_kv_head, self.n_kv_head], 2)
        q, gate = qg.unflatten(2, (self.n_head, 2)).unbind(3)  # (B, T, Hq, D)
        qk = torch.cat([self.q_norm(q), self.k_norm(k)], 2)
        qk = apply_rope(qk, positions.cos, positions.sin).transpose(1, 2)
        q, k = qk.split([self.n_head, self.n_kv_head], 1)
        y = self.attend(q, k, v.transpose(1, 2), positions, cache).transpose(1, 2)
        return self.o_proj((y * gate.sigmoid()).reshape(B, T, -1))

# --- the model ---


class NextToken(nn.Module):
    """Guesses the token after the next one (multi-token prediction, arXiv 2412.19437), with the
    model's embedding and output layer, and the Positions of `layer`, its last with attention."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        norm, dim, eps = FAMILIES[config.family].norm, config.dim, config.norm_eps
        self.layer = [i for i, rope in enumerate(config.ropes) if rope is not None][-1]
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = norm(dim, eps), norm(dim, eps)
        self.fc = Linear(2 * dim, dim, bias=False)
        self.layers = nn.ModuleList([FAMILIES[config.family].block(config, self.layer)])
        self.norm = norm(dim, eps)

    def forward(
        self, x: Tensor, before: Tensor, positions: Positions, cache: LayerCache, run: BlockForward
    ) -> Tensor:
        """x [B, T, dim]: the embedding of tokens. before [B, T, dim]: what the output layer was
        given of the token before each, by the model or by this -> what it is to be given."""
        both = [self.pre_fc_norm_embedding(x), self.pre_fc_norm_hidden(before)]
        x = self.fc(torch.cat(both, dim=-1))
        return self.norm(run(self.layers[0], x, positions, cache))


class DeltaTransformer(Transformer):
    """Its rows cannot keep all tokens: what rings=False asks for is not there."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        if config.hf.get("mtp"):
            self.mtp = NextToken(config)

    def run_and_keep(self, *inputs: Any) -> Tensor:
        """run_layers for a draft that wants to see what the output layer is given."""
        x = super().run_layers(*inputs)
        self.hidden = self.norm(x)
        return x

    def setup_caches(self, *args: Any, **options: Any) -> KVCache:
        return super().setup_caches(*args[:4], **options | {"rings": True})
