"""Multi-head latent attention (arXiv 2405.04434): keys and values of a token are products of one
short vector for all heads. Only that is cached, with a part that turns and belongs to all keys.

Prefill makes keys and values of the vectors. Decode does not: what makes keys is multiplied into
the query, what makes values into the result, and heads attend to the vectors as they are."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from families.blocks import FarQueryAttention, in_halves, special_attention
from families.settings import mscale, ropes_of_part
from model import (
    Attention, Device, KVCache, LayerCache, ModelConfig, Places, Positions, apply_rope, positive,
)
from quantize import Linear


class LatentCache(LayerCache):
    """A vector of each token, which is its key and its value: kv [1, B, 1, S, D]."""

    def pack(self, k: Tensor, v: Tensor) -> list[Tensor]:
        return [k[None].to(self.kv.dtype)]

    def unpack(self, tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        latent = tensors[0][0].to(dtype)  # (B, 1, S, D)
        return latent, latent

    def flash_decode(
        self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, **options: Any
    ) -> Tensor:
        return self.decode_unpacked(q, k, v, input_pos, options)


class LatentAttention(Attention):
    """DeepSeek's. kv_b_proj, which decode multiplies by in two parts, is never quantized."""

    def __init__(self, config: ModelConfig, layer: int):
        nn.Module.__init__(self)
        hf, bias = config.hf, config.qkv_bias
        self.n_head = config.n_head
        self.window = config.windows[layer]
        self.softmax_scale = config.softmax_scale
        self.rank = positive(hf, "kv_lora_rank")
        self.turned = positive(hf, "qk_rope_head_dim")
        self.plain = positive(hf, "qk_nope_head_dim")
        self.head_dim = self.plain + self.turned
        self.v_head_dim = positive(hf, "v_head_dim")
        if self.v_head_dim > self.head_dim:
            raise ValueError(f"unsupported v_head_dim {self.v_head_dim} above {self.head_dim}")
        q_size = self.n_head * self.head_dim
        self.q_a_proj = None
        if hf.get("q_lora_rank") is None:
            self.q_proj = Linear(config.dim, q_size, bias=False)
        else:
            q_rank = positive(hf, "q_lora_rank")
            self.q_a_proj = Linear(config.dim, q_rank, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(q_rank, 1e-6)  # whatever other norms have
            self.q_b_proj = Linear(q_rank, q_size, bias=False)
        self.kv_a_proj_with_mqa = Linear(config.dim, self.rank + self.turned, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(self.rank, 1e-6)
        kv_size = self.n_head * (self.plain + self.v_head_dim)
        self.kv_b_proj = nn.Linear(self.rank, kv_size, bias=False)
        self.o_proj = Linear(self.n_head * self.v_head_dim, config.dim, bias=config.o_bias)

    def make_cache(self, cache: KVCache, places: Places, device: Device) -> LatentCache:
        if cache.dtype == torch.int8:
            raise ValueError("a compressed cache has no int8 form: leave --kv_dtype out")
        shape = (1, cache.max_batch_size, 1, places.S, self.rank + self.turned)
        tensors = LatentCache.allocate(shape, cache.dtype, device)
        return LatentCache(tensors, places, cache.attention == "flash")

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        B, T, _ = x.shape
        if self.q_a_proj is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(B, T, self.n_head, self.head_dim)
        q, q_turned = q.split([self.plain, self.turned], dim=-1)
        latent, k_turned = self.kv_a_proj_with_mqa(x).split([self.rank, self.turned], dim=-1)
        turned = torch.cat([q_turned, k_turned[:, :, None]], dim=2)  # (B, T, Hq + 1, turned)
        turned = apply_rope(turned, positions.cos, positions.sin).transpose(1, 2)
        q_turned, k_turned = turned.split([self.n_head, 1], dim=1)
        latent = torch.cat([self.kv_a_layernorm(latent)[:, None], k_turned], dim=-1)
        # a head's parts of kv_b_proj: what makes its keys, and its values
        parts = self.kv_b_proj.weight.view(self.n_head, -1, self.rank)
        of_keys, of_values = parts.split([self.plain, self.v_head_dim], dim=1)
        q = q.transpose(1, 2)  # (B, Hq, T, plain)
        if not positions.prefill:
            q = torch.einsum("bhtd,hdr->bhtr", q, of_keys)
        y = self.attend(torch.cat([q, q_turned], dim=-1), latent, latent, positions, cache)
        if not positions.prefill:
            y = torch.einsum("bhtr,hdr->bhtd", y[..., :self.rank], of_values)
        return self.o_proj(y[..., :self.v_head_dim].transpose(1, 2).reshape(B, T, -1))

    def attend_to(
        self, q: Tensor, keys: Tensor, values: Tensor, positions: Positions, key_pos: Tensor
    ) -> Tensor:
        """In prefill to keys and values made of the vectors, of one size for PyTorch's kernels:
        shorter values end in zeros. In decode to the vectors, which no head repeats."""
        if not positions.prefill:
            return special_attention(q, keys, values, positions.index, key_pos, **self.options())
        latent, turned = keys[:, 0].split([self.rank, self.turned], dim=-1)
        made = self.kv_b_proj(latent).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        keys, values = made.split([self.plain, self.v_head_dim], dim=-1)
        turned = turned[:, None].expand(-1, self.n_head, -1, -1)
        keys = torch.cat([keys, turned], dim=-1)
        values = F.pad(values, (0, self.head_dim - self.v_head_dim))
        return super().attend_to(q, keys, values, positions, key_pos)


class FarLatentAttention(FarQueryAttention, LatentAttention):
    """Mistral 4's."""

# --- what a config.json means ---


def latent_scale(hf: dict) -> float:
    """Of scores. Where yarn stretches the rotary embedding, it grows by what cos and sin do not."""
    scale = (positive(hf, "qk_nope_head_dim") + positive(hf, "qk_rope_head_dim")) ** -0.5
    rope, *_ = ropes_of_part(hf, "qk_rope_head_dim")
    if rope.kind != "default" and rope.hf.get("mscale_all_dim"):
        scale *= mscale(rope, "mscale_all_dim") ** 2
    return scale


# fields of ModelConfig; what is cached is that of one head
LATENT = dict(
    head_dim=lambda hf: positive(hf, "kv_lora_rank") + positive(hf, "qk_rope_head_dim"),
    n_kv_head=1, softmax_scale=latent_scale,
    ropes=lambda hf: ropes_of_part(hf, "qk_rope_head_dim"),
)


def latent_halves_first(config: ModelConfig, name: str) -> Callable[[Tensor], Tensor] | None:
    """blocks.halves_first, for the parts of heads and of the vectors that turn."""
    before = {"kv_a_proj_with_mqa": "kv_lora_rank"} | dict.fromkeys(
        ("q_proj", "q_b_proj"), "qk_nope_head_dim")
    key = before.get(name.split(".")[-2])
    if key is None or not config.hf.get("rope_interleave", True):
        return None
    first, dim = config.hf[key], config.hf["qk_rope_head_dim"]
    return lambda tensor: in_halves(tensor, first + dim, first, dim)
