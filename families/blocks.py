"""What layers of other families do differently: norms, attention, blocks, embedding and head."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from families.settings import maybe_positive, of_layers, ropes_of
from model import (
    ACTIVATIONS, FAMILIES, Attention, Block, LayerCache, ModelConfig, Positions, Rope, Transformer,
    fake_prefill_attention, in_tiles, positive, rope_settings, visible,
)
from quantize import Linear

# --- norms ---


class GemmaNorm(nn.RMSNorm):
    """Its weights are distances from 1, and it multiplies in float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight = 1 + self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)


class AllHeadsNorm(nn.RMSNorm):
    """Of all heads of a token together, which may lie on several ranks."""

    mean_over_ranks: Callable[[Tensor], Tensor] | None = None  # parallel/ sets it

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)  # (B, T, H * D)
        if self.mean_over_ranks is None:
            return super().forward(flat).view_as(x)
        wide = flat.float()
        mean_square = self.mean_over_ranks(wide.square().mean(-1, keepdim=True))  # (B, T, 1)
        normed = wide * torch.rsqrt(mean_square + self.eps)
        return (normed * self.weight).to(x.dtype).view_as(x)

# --- attention ---


class AllHeadsAttention(Attention):
    """OLMo 2's: the norms of q and k are over all heads."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.q_norm = AllHeadsNorm(self.n_head * self.head_dim, config.norm_eps)
        self.k_norm = AllHeadsNorm(self.n_kv_head * self.head_dim, config.norm_eps)


class LateNormAttention(Attention):
    """Hunyuan's: the norms of q and k come behind the rotary embedding."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.query_layernorm = nn.RMSNorm(self.head_dim, config.norm_eps)
        self.key_layernorm = nn.RMSNorm(self.head_dim, config.norm_eps)

    def attend(self, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        return super().attend(self.query_layernorm(q), self.key_layernorm(k), *rest)


class FarQueryAttention(Attention):
    """Ministral 3's: queries grow with the logarithm of how many original contexts lie before."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.beta = maybe_positive(config.ropes[layer].hf, "llama_4_scaling_beta") or 0.0
        self.original_context = config.ropes[layer].original_context

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Positions, *rest: Any) -> Tensor:
        scale = 1 + self.beta * (positions.index // self.original_context).float().log1p()
        q = q * scale[:, None, :, None].to(q.dtype)
        return super().attend(q, k, v, positions, *rest)


class HeadwiseAttention(Attention):
    """GPT-NeoX's: the file has q, k and v of a head together, head after head."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.query_key_value = self._modules.pop("qkv_proj")

    def qkv_proj(self, x: Tensor) -> Tensor:
        qkv = self.query_key_value(x).unflatten(-1, (self.n_head, 3, -1))
        return qkv.transpose(2, 3).flatten(2)  # (B, T, 3 H D)


def halves_first(config: ModelConfig, name: str) -> Callable[[Tensor], Tensor] | None:
    """For files where neighbours of a head of q or k turn as pairs. Scores do not change."""
    if ".qkv_proj." not in name:
        return None
    dim = max(rope.dim for rope in config.ropes if rope is not None)
    n = (config.n_head + config.n_kv_head) * config.head_dim
    return lambda x: torch.cat([in_halves(x[:n], config.head_dim, 0, dim), x[n:]])


def in_halves(tensor: Tensor, size: int, first: int, dim: int) -> Tensor:
    """The rows of heads of some size in the order of our layout, where halves turn: `dim` of them,
    from `first` on."""
    rows = torch.arange(size)
    rows[first:first + dim] = rows[first:first + dim].view(-1, 2).T.flatten()
    return tensor.unflatten(0, (-1, size))[:, rows].flatten(0, 1)


class SpecialAttention(Attention):
    """With options that PyTorch's attention does not know."""

    def attend_to(
        self, q: Tensor, keys: Tensor, values: Tensor, positions: Positions, key_pos: Tensor
    ) -> Tensor:
        attention = special_attention
        if positions.prefill:
            attention = prefill_special
            if torch.compiler.is_compiling():  # how many tiles there are depends on the prompt
                attention = torch.ops.gpt_flash.prefill_special
        return attention(q, keys, values, positions.index, key_pos, **self.options())


def prefill_special(
    q: Tensor, keys: Tensor, values: Tensor, index: Tensor, key_pos: Tensor, **options: Any
) -> Tensor:
    return in_tiles(special_attention, q, keys, values, index, key_pos, **options)


def special_attention(
    q: Tensor, keys: Tensor, values: Tensor, index: Tensor, key_pos: Tensor, *,
    scale: float | None, window: int | None, softcap: float | None = None,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor:
    """model.math_attention with softcap, alibi_slopes and sinks; kernels.flash_decode says what
    they are."""
    B, Hq, T, D = q.shape
    Hkv, S = keys.shape[1:3]
    # in place where possible: scores are the largest tensors of a prefill
    folded = q.reshape(B, Hkv, -1, D)  # (B, Hkv, Hq / Hkv * T, D)
    scores = (folded @ keys.mT).view(B, Hq, T, S).float()
    scores *= D ** -0.5 if scale is None else scale
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if alibi_slopes is not None:
        distance = index[:, None, :, None] - key_pos[:, None, None]  # (B, 1, T, S)
        scores -= alibi_slopes[:, None, None] * distance
    scores.masked_fill_(~visible(index, key_pos, window), -math.inf)
    if sinks is not None:  # each is the score of one more key, which has no value
        sink = sinks[:, None, None].expand(B, Hq, T, 1)
        scores = torch.cat([scores, sink], dim=-1)  # (B, Hq, T, S + 1)
    weights = scores.softmax(-1)[..., :S].to(values.dtype)
    return (weights.reshape(B, Hkv, -1, S) @ values).view(B, Hq, T, D)


# one operator in a compiled prefill, as model.py has one
torch.library.define(
    "gpt_flash::prefill_special",
    "(Tensor q, Tensor keys, Tensor values, Tensor index, Tensor key_pos, *, float? scale, "
    "int? window, float? softcap=None, Tensor? alibi_slopes=None, Tensor? sinks=None) -> Tensor",
)
torch.library.impl("gpt_flash::prefill_special", "default", prefill_special)
torch.library.register_fake("gpt_flash::prefill_special", fake_prefill_attention)


class SoftcapAttention(SpecialAttention):
    """Gemma 2's: scores are c * tanh(score / c)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.softcap = maybe_positive(config.hf, "attn_logit_softcapping")
        self.may_shift_scores = self.softcap is None

    def options(self) -> dict[str, Any]:
        return super().options() | {"softcap": self.softcap}


class SinkAttention(SpecialAttention):
    """gpt-oss's: each head has a logit that only the softmax's denominator sees."""

    may_shift_scores = False

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.sinks = nn.Parameter(torch.empty(self.n_head))

    def options(self) -> dict[str, Any]:
        return super().options() | {"sinks": self.sinks.float()}


class AlibiAttention(SpecialAttention):
    """Baichuan 13B's: in place of a rotary embedding, scores fall with distance."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.set_slopes(self.slopes_of(self.n_head))

    def set_slopes(self, slopes: Tensor) -> None:
        """slopes: [Hq] float32, kept as bits, which no change of the model's dtype rounds."""
        self.register_buffer("slope_bits", slopes.view(torch.int32), persistent=False)

    @staticmethod
    def slopes_of(n_head: int) -> Tensor:
        """How much a head's score falls with each token of distance, [n_head] float32: powers of
        two from 2^(-8/n) on for n heads, a power of two; other counts take every other slope of
        twice as many for the rest (arXiv 2108.12409)."""
        n = 2 ** math.floor(math.log2(n_head))
        slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
        slopes += [2 ** (-4 * i / n) for i in range(1, 2 * (n_head - n), 2)]
        return torch.tensor(slopes, device="cpu")

    def options(self) -> dict[str, Any]:
        return super().options() | {"alibi_slopes": self.slope_bits.view(torch.float32)}


def baichuan_ropes(hf: dict) -> tuple[Rope | None, ...]:
    """Told apart as others do: Baichuan's 13B models name no max_position_embeddings."""
    has_ropes = "max_position_embeddings" in hf
    return ropes_of(rope_settings(hf), [has_ropes] * positive(hf, "num_hidden_layers"))


def normalize_head(config: ModelConfig, name: str) -> Callable[[Tensor], Tensor] | None:
    """The rows of the output layer of Baichuan 2, with its larger vocabulary, have length 1."""
    if name != "lm_head.weight" or config.vocab_size != 125696:
        return None
    return lambda tensor: F.normalize(tensor.float(), dim=-1)

# --- blocks ---


def by_rope(
    kind: Callable[..., nn.Module], other: Callable[..., nn.Module]
) -> Callable[[ModelConfig, int], nn.Module]:
    """A module of the first kind in layers with a rotary embedding, of the other in the rest."""
    return lambda config, layer: (other if config.ropes[layer] is None else kind)(config, layer)


class RenamedBlock(Block):
    """Checkpoints call what is in the place of attention by its stored_name."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        attention = self._modules.pop("self_attn")
        self.stored_name = attention.stored_name
        self.add_module(self.stored_name, attention)

    @property
    def self_attn(self) -> nn.Module:
        return getattr(self, self.stored_name)


class SandwichBlock(Block):
    """Gemma 2's: norms before and after attention and MLP."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        norm = FAMILIES[config.family].norm
        self.pre_feedforward_layernorm = norm(config.dim, config.norm_eps)
        self.post_feedforward_layernorm = norm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), positions, cache)
        x = x + self.post_attention_layernorm(y)
        return x + self.post_feedforward_layernorm(self.feed_forward(x))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.pre_feedforward_layernorm(x))


class PostNormBlock(SandwichBlock):
    """OLMo 2's: norms after, none before."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.input_layernorm = nn.Identity()
        self.pre_feedforward_layernorm = nn.Identity()


class ParallelBlock(Block):
    """GPT-NeoX's: attention and MLP have the same input, each with a norm of its own."""

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), positions, cache)
        return x + y + self.mlp(self.post_attention_layernorm(x))


class OneNormBlock(Block):
    """Phi's and Cohere's: or one norm for both."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.post_attention_layernorm = nn.Identity()

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        y = self.input_layernorm(x)
        return x + self.self_attn(y, positions, cache) + self.mlp(y)


class ScaledBlock(Block):
    """Granite's: what is added to x is scaled."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.scale = positive(config.hf, "residual_multiplier", 1.0, float)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        x = x + self.scale * self.self_attn(self.input_layernorm(x), positions, cache)
        return x + self.scale * self.mlp(self.post_attention_layernorm(x))


class PlainMLP(nn.Module):
    """A feed-forward network without a gate."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.act = TrainedXIELU(config, layer) if config.act == "xielu" else ACTIVATIONS[config.act]
        self.up_proj = Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.down_proj = Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


def xielu(x: Tensor, above: float | Tensor = 0.8, below: float | Tensor = 0.3) -> Tensor:
    """Of arXiv 2411.13010; slopes above and below 0: as they are before training."""
    y = torch.where(x > 0, above * x * x, (0.5 + below) * (x.clamp(max=-1e-6).expm1() - x))
    return y + 0.5 * x


class TrainedXIELU(nn.Module):
    """Apertus's, with slopes of each layer. GGUF files have them among their settings."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        for name in ("alpha_p", "alpha_n"):
            given = of_layers(config.hf, f"xielu_{name}")
            x = torch.empty(1) if given is None else torch.full((1,), given[layer], device="cpu")
            setattr(self, name, nn.Parameter(x))

    def forward(self, x: Tensor) -> Tensor:
        return xielu(x, F.softplus(self.alpha_p), F.softplus(self.alpha_n))

# --- embedding and head ---


class ScaledTransformer(Transformer):
    """The embedding is multiplied by a number, rounded as it is: so it was trained."""

    embedding_scale: float

    def embed(self, tokens: Tensor) -> Tensor:
        x = super().embed(tokens)
        return x * torch.tensor(self.embedding_scale, dtype=x.dtype)


class GemmaTransformer(ScaledTransformer):
    """The scale is the root of the embedding's size; Gemma 2's logits have a softcap."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.embedding_scale = math.sqrt(config.dim)
        self.softcap = maybe_positive(config.hf, "final_logit_softcapping")

    def head(self, x: Tensor) -> Tensor:
        logits = super().head(x)
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        return logits


class BiasedHeadTransformer(Transformer):
    """The output layer has a bias."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.lm_head = Linear(config.dim, config.vocab_size, bias=True)


class ScaledHeadTransformer(Transformer):
    """Cohere's: logits are multiplied by a number."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.logits_scale = positive(config.hf, "logit_scale", 0.0625, float)

    def head(self, x: Tensor) -> Tensor:
        return super().head(x) * self.logits_scale


class GraniteTransformer(ScaledTransformer, ScaledHeadTransformer):
    """Embedding and logits are scaled."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.embedding_scale = positive(config.hf, "embedding_multiplier", 1.0, float)
        self.logits_scale = 1 / positive(config.hf, "logits_scaling", 1.0, float)
