"""Gemma 4: layers that see all tokens have larger heads, and fewer keys, than those with a window;
the last ones attend to the keys of a layer before; some have experts, or inputs of their own."""
from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from families.blocks import GemmaTransformer, SandwichBlock
from families.experts import Experts, choose
from families.settings import by_pattern, layer_kinds, rope_settings_of
from model import (
    ACTIVATIONS, MLP, Attention, BlockForward, Device, KVCache, LayerCache, ModelConfig, Places,
    Positions, Rope, apply_rope, make_rope, positive,
)
from quantize import Linear

# --- settings ---


def full_layers(hf: dict) -> list[bool]:
    """The last of every few, and the last of all."""
    return [*by_pattern(hf)[:-1], True]


def settings_of_layers(hf: dict) -> list[dict]:
    """The settings as each layer has them. What differs by layer is said for layers that see all,
    or, as transformers writes it, by the number of each."""
    kinds = layer_kinds(hf, full_layers)
    if kinds[-1] != "full_attention" or hf["use_bidirectional_attention"] not in (None, "vision"):
        raise ValueError("unsupported use_bidirectional_attention, or a window in the last layer")
    of_full = {"head_dim": hf["global_head_dim"]}
    if hf.get("attention_k_eq_v") and hf.get("num_global_key_value_heads") is not None:
        of_full["num_key_value_heads"] = hf["num_global_key_value_heads"]
    given = hf.get("per_layer_config")
    if given is None:
        given = {i: of_full for i, kind in enumerate(kinds) if kind == "full_attention"}
    own = {int(i): settings for i, settings in given.items()}
    return [hf | own.get(i, {}) | {"kind": kind} for i, kind in enumerate(kinds)]


def ropes(hf: dict) -> tuple[Rope, ...]:
    """Layers of a kind have one together."""
    layers = settings_of_layers(hf)
    of_kind = {own["kind"]: own for own in reversed(layers)}  # the first of each
    ropes = {kind: make_rope(rope_settings_of(own, kind)) for kind, own in of_kind.items()}
    return tuple(ropes[own["kind"]] for own in layers)


def proportional(rope: Rope, inv_freq: Tensor, max_seq_len: int) -> tuple[Tensor, float]:
    """A kind of rope: pairs and frequencies are those of a whole head, of which the first turn."""
    half = positive(rope.hf, "head_dim") // 2
    inv_freq = rope.theta ** -(torch.arange(half, dtype=torch.float64, device="cpu") / half)
    inv_freq[rope.dim // 2:] = 0
    return inv_freq / positive(rope.hf, "factor", 1.0, float), 1.0


def sources_of_keys(hf: dict) -> list[int]:
    """Which layer's keys and values each one attends to: its own, or the last ones, which have
    none, those of the last of their kind that has some."""
    kinds = layer_kinds(hf, full_layers)
    n_sharing = hf.get("num_kv_shared_layers") or 0
    first = len(kinds) - n_sharing
    last = {kind: i for i, kind in enumerate(kinds[:max(first, 0)])}
    if not last.keys() >= set(kinds):
        raise ValueError(f"of {len(kinds)} layers, num_kv_shared_layers = {n_sharing} share the "
                         "keys of none")
    return [i if i < first else last[kind] for i, kind in enumerate(kinds)]

# --- layers ---


class Gemma4Attention(Attention):
    """Values are normed, and may be the keys. A layer without any has those of its source."""

    divides = False  # over ranks

    def __init__(self, config: ModelConfig, layer: int):
        own = settings_of_layers(config.hf)[layer]
        head_dim, n_kv_head = positive(own, "head_dim"), own["num_key_value_heads"]
        config = replace(config, head_dim=head_dim, n_kv_head=n_kv_head)
        config.check()
        super().__init__(config, layer)
        sources = sources_of_keys(config.hf)
        self.source = sources[layer] if sources[layer] != layer else None
        self.is_source = sources.count(layer) > 1
        self.heads = [self.n_head, n_kv_head, n_kv_head]  # of queries, keys, and values
        if own["kind"] == "full_attention" and own.get("attention_k_eq_v"):
            self.heads.pop()
        if self.source is not None:
            self.heads, self.k_norm = [self.n_head], None
        rows = [n * head_dim for n in self.heads]
        self.rows = {"qkv_proj": rows}  # of products, by their parts
        self.qkv_proj = Linear(config.dim, sum(rows), bias=config.qkv_bias)

    def make_cache(self, cache: KVCache, places: Places, device: Device) -> LayerCache:
        """A source keeps all tokens: a ring has let go of some when it is the others' turn."""
        if self.source is not None:
            return cache.whole[self.source]
        places = Places(cache.max_seq_len) if self.is_source else places
        own = super().make_cache(cache, places, device)
        own.flash &= cache.device.type == "cpu" or self.head_dim <= 256  # which the kernel takes
        return own

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        B, T, _ = x.shape
        cos, sin = positions.cos, positions.sin
        heads = self.qkv_proj(x).view(B, T, -1, self.head_dim)
        q, *kv = heads.split(self.heads, dim=2)  # (B, T, H, D) each
        q = apply_rope(self.q_norm(q), cos, sin).transpose(1, 2)
        k, v = None, None
        if kv:  # of which the values may be the keys
            k = apply_rope(self.k_norm(kv[0]), cos, sin).transpose(1, 2)
            v = F.rms_norm(kv[-1], (self.head_dim,), eps=self.q_norm.eps).transpose(1, 2)
        y = self.attend(q, k, v, positions, cache)  # (B, Hq, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))

    def attend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, positions: Positions,
        cache: LayerCache,
    ) -> Tensor:
        """k and v are None where the source has put them into the cache."""
        if k is not None or cache.flash and not positions.prefill:
            return super().attend(q, k, v, positions, cache)
        end = positions.cached + q.shape[2] if positions.prefill else cache.places.S
        keys, values = cache.read(end, q.dtype)
        return self.attend_to(q, keys, values, positions, torch.arange(end, device=q.device)[None])


def mlp(config: ModelConfig, layer: int) -> MLP:
    is_wide = config.hf.get("use_double_wide_mlp") and sources_of_keys(config.hf)[layer] != layer
    return MLP(config, layer, config.ffn_dim * (2 if is_wide else 1))


class Gemma4Router(nn.Module):
    """Which experts a token goes to. The weight of each has a factor of its own."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.moe, self.eps = config.moe, config.norm_eps
        self.scale = nn.Parameter(torch.empty(config.dim))
        self.proj = nn.Linear(config.dim, config.moe.n_expert, bias=False)
        self.per_expert_scale = nn.Parameter(torch.empty(config.moe.n_expert))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As MoE.route."""
        x = F.rms_norm(x, x.shape[-1:], self.scale, self.eps) * x.shape[-1] ** -0.5
        weights, ids = choose(self.proj(x), self.moe)
        return (weights * self.per_expert_scale[ids]).to(x.dtype), ids


class Gemma4Block(SandwichBlock):
    """With experts beside the MLP, or an input for each token behind it, and a factor on all."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        norm = partial(nn.RMSNorm, config.dim, config.norm_eps)
        self.layer_scalar = nn.Parameter(torch.empty(1))
        self.experts = None
        if config.moe is not None:
            self.router = Gemma4Router(config)
            self.experts = Experts(config)
            self.pre_feedforward_layernorm_2 = norm()
            self.post_feedforward_layernorm_1 = norm()
            self.post_feedforward_layernorm_2 = norm()
        self.per_layer_input_gate = None
        size = config.hf["hidden_size_per_layer_input"]
        if size:
            self.act = ACTIVATIONS[config.act]
            self.per_layer_input_gate = Linear(config.dim, size, bias=False)
            self.per_layer_projection = Linear(size, config.dim, bias=False)
            self.post_per_layer_input_norm = norm()

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        x = super().forward(x, positions, cache)
        if self.per_layer_input_gate is not None:
            y = self.act(self.per_layer_input_gate(x)) * positions.of_layer
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(y))
        return x * self.layer_scalar

    def feed_forward(self, x: Tensor) -> Tensor:
        y = super().feed_forward(x)
        if self.experts is None:
            return y
        z = self.experts(self.pre_feedforward_layernorm_2(x), *self.router(x))
        return self.post_feedforward_layernorm_1(y) + self.post_feedforward_layernorm_2(z)


class Gemma4Transformer(GemmaTransformer):
    """Layers are given vectors for each token, of a table and of its embedding."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.size = config.hf["hidden_size_per_layer_input"]
        if self.size:
            n = config.n_layer * self.size
            self.n_tokens = positive(config.hf, "vocab_size_per_layer_input", 262144)
            table = torch.empty(self.n_tokens, n)
            self.embed_tokens_per_layer = nn.Embedding.from_pretrained(table)
            self.per_layer_model_projection = Linear(config.dim, n, bias=False)
            self.per_layer_projection_norm = nn.RMSNorm(self.size, config.norm_eps)

    def run_layers(
        self, block_forward: BlockForward, tokens: Tensor, positions: list[Positions],
        layers: list[LayerCache],
    ) -> Tensor:
        if self.size:
            inputs = self.inputs_of_layers(tokens)
            positions = [each._replace(of_layer=y) for each, y in zip(positions, inputs)]
        return super().run_layers(block_forward, tokens, positions, layers)

    def inputs_of_layers(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> [n_layer, B, T, size]."""
        shape = *tokens.shape, self.config.n_layer, self.size
        y = self.per_layer_model_projection(self.embed(tokens)) * self.config.dim ** -0.5
        y = self.per_layer_projection_norm(y.view(shape))
        known = tokens.masked_fill(tokens >= self.n_tokens, 0)
        table = self.embed_tokens_per_layer(known).view(shape)
        scale = torch.tensor(math.sqrt(self.size), dtype=table.dtype)
        y = (y + table * scale) * 2 ** -0.5  # (B, T, n_layer, size)
        return y.movedim(2, 0).contiguous()


def model(config: ModelConfig) -> GemmaTransformer:
    """A plain one where layers take nothing but what the one before gives."""
    takes_more = config.hf["hidden_size_per_layer_input"] or config.hf.get("num_kv_shared_layers")
    return (Gemma4Transformer if takes_more else GemmaTransformer)(config)
