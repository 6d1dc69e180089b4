"""The model: a transformer of Llama's kind, families that differ from it, loading checkpoints.

A step of decode goes through Transformer.decode, Block.forward, Attention.forward and attend, and
ends in the cache: LayerCache.flash_decode appends the new keys and values and attends to what is
there."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams
from torch.nn.attention import SDPBackend, sdpa_kernel

from cache import MAX_DECODE_TOKENS, KVCache, LayerCache, Positions, require_memory
from config import ModelConfig, Rope, alibi_slopes, distinct, rope_frequencies
from feedforward import MLP, ClampedMoE, Experts, MoE
from formats.checkpoint import (
    WEIGHT_DTYPES, Checkpoint, first_line, nonsense_refused, open_checkpoint, resolve,
)
from parallel import ALONE, Ranks, join, local, piece
from quantize import Linear
from weights import Weights

# --- rotary position embedding ---


def rope_table(rope: Rope, max_seq_len: int, device: torch.device) -> Tensor:
    """cos and sin of every position in the half-rotated layout, [S, 2, 1, D] float32.

    The first half of sin is negated, so that apply_rope needs no negation."""
    inv_freq, factor = rope_frequencies(rope, max_seq_len)
    positions = torch.arange(max_seq_len, device=device)[:, None].float()
    angles = positions * torch.cat([inv_freq, inv_freq]).to(device)  # (S, D)
    cos = angles.cos() * factor
    sin = angles.sin() * factor
    sin[:, :len(inv_freq)].neg_()
    return torch.stack((cos, sin), dim=1)[:, :, None]  # (S, 2, 1, D)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D] in the half-rotated layout; cos, sin [B, T, 1, d] float32 of rope_table, where
    only the first d values turn."""
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat([apply_rope(x[..., :dim], cos, sin), x[..., dim:]], dim=-1)
    turned = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, turned, sin).to(x.dtype)

# --- attention ---


class Attention(nn.Module):
    """Grouped-query attention over the cache; query, key and value projections are one product."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.head_dim = config.head_dim
        self.window = config.windows[layer]
        self.softmax_scale = config.softmax_scale
        self.softcap = config.softcap
        n_heads = self.n_head + 2 * self.n_kv_head
        self.qkv_proj = Linear(config.dim, n_heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(self.n_head * self.head_dim, config.dim, bias=config.o_bias)
        self.sinks = nn.Parameter(torch.empty(self.n_head)) if config.sinks else None
        self.q_norm, self.k_norm = None, None
        if config.qk_norm == "head":
            norm = FAMILIES[config.family].norm
            self.q_norm = norm(self.head_dim, config.norm_eps)
            self.k_norm = norm(self.head_dim, config.norm_eps)
        elif config.qk_norm == "all":
            self.q_norm = AllHeadsNorm(self.n_head * self.head_dim, config.norm_eps)
            self.k_norm = AllHeadsNorm(self.n_kv_head * self.head_dim, config.norm_eps)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        B, T, _ = x.shape
        heads = [self.n_head, self.n_kv_head]
        qkv = self.qkv_proj(x).view(B, T, -1, self.head_dim)  # (B, T, Hq + 2 Hkv, D)
        qk, v = qkv.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=2)
        if self.q_norm is not None:
            q, k = qk.split(heads, dim=2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        if positions.cos is not None:
            qk = apply_rope(qk, positions.cos, positions.sin)
        q, k = qk.transpose(1, 2).split(heads, dim=1)  # (B, Hq, T, D), (B, Hkv, T, D)
        y = self.attend(q, k, v.transpose(1, 2), positions, cache)  # (B, Hq, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Positions, cache: LayerCache
    ) -> Tensor:
        """Put k, v [B, Hkv, T, D] into the cache; q [B, Hq, T, D] attends to them and to all
        that is before them."""
        options = self.options(positions)
        is_decode = positions.start is None
        if is_decode and cache.flash:  # cost follows the live length
            return cache.flash_decode(q, k, v, positions.input_pos, **options)

        keys, values, key_pos = cache.update(k, v, positions)
        if is_decode:
            return math_attention(q, keys, values, positions.index, key_pos, **options)
        attention = prefill_attention
        if torch.compiler.is_compiling():  # how many tiles there are depends on the prompt
            attention = torch.ops.gpt_flash.prefill_attention
        return attention(q, keys, values, positions.index, key_pos, **options)

    def options(self, positions: Positions) -> dict[str, Any]:
        """How scores become weights: what flash_decode and prefill_attention take by name."""
        return {
            "scale": self.softmax_scale,
            "window": self.window,
            "softcap": self.softcap,
            "alibi_slopes": positions.alibi_slopes,
            "sinks": None if self.sinks is None else self.sinks.float(),
        }


class AllHeadsNorm(nn.RMSNorm):
    """Of all heads of a token together, which may lie on several ranks."""

    mean_over_ranks: Callable[[Tensor], Tensor] | None = None  # parallel.join sets it

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)  # (B, T, H * D)
        if self.mean_over_ranks is None:
            return super().forward(flat).view_as(x)
        wide = flat.float()
        mean_square = self.mean_over_ranks(wide.square().mean(-1, keepdim=True))  # (B, T, 1)
        normed = wide * torch.rsqrt(mean_square + self.eps)
        return (normed * self.weight).to(x.dtype).view_as(x)


# --- attention in PyTorch ---

QUERY_TILE = 512  # queries that attend together: their keys end with the last of them
MAX_SCORES = 2**27  # that they may have: 537 MB in float32


def prefill_attention(
    q: Tensor, keys: Tensor, values: Tensor, index: Tensor, key_pos: Tensor, *,
    scale: float | None = None, window: int | None = None, softcap: float | None = None,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of q [B, Hq, T, D], at positions index [B, T], to keys and values
    [B, Hkv, S, D] at positions key_pos [B or 1, S] -> [B, Hq, T, D]. No query sees beyond the key
    as far from the last one as it is from the last query. kernels.flash_decode says what the
    options are.

    The scores of all queries are never in memory, whatever backend PyTorch takes. Its flash
    kernels need no mask for a prompt from its beginning. Everything else has a mask, which they
    refuse on a GPU; there the memory-efficient ones refuse fewer key than query heads
    (ATen/native/transformers/cuda/sdp_utils.cpp), and what is left makes all scores. So query
    heads ride along as queries of their KV head, in tiles of at most MAX_SCORES scores, but of a
    query a row at least, whose scores are smaller than the cache."""
    B, Hq, T, D = q.shape
    S = keys.shape[2]
    from_beginning = S == T and (window is None or T <= window)
    plain = softcap is None and alibi_slopes is None and sinks is None
    if from_beginning and plain and flash_takes(q, keys, values):
        y = F.scaled_dot_product_attention(
            q, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )
        return y.transpose(1, 2).contiguous().transpose(1, 2)

    tile = min(QUERY_TILE, max(1, MAX_SCORES // (B * Hq * S)))
    y = q.new_empty(B, T, Hq, D)
    for first in range(0, T, tile):
        last = min(first + tile, T)
        end = S - T + last
        some = (
            q[:, :, first:last], keys[:, :, :end], values[:, :, :end], index[:, first:last],
            key_pos[:, :end],
        )
        if plain:
            part = folded_attention(*some, scale=scale, window=window)
        else:
            part = math_attention(
                *some, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
                sinks=sinks,
            )
        y[:, first:last] = part.transpose(1, 2)  # (B, tile, Hq, D)
    return y.transpose(1, 2)


def folded_attention(
    q: Tensor, keys: Tensor, values: Tensor, index: Tensor, key_pos: Tensor, *,
    scale: float | None, window: int | None,
) -> Tensor:
    """prefill_attention of a tile: query heads ride along as queries of their KV head."""
    B, Hq, T, D = q.shape
    Hkv = keys.shape[1]
    folded = q.reshape(B, Hkv, -1, D)  # (B, Hkv, Hq / Hkv * T, D)
    mask = visible(index, key_pos, window).repeat(1, 1, Hq // Hkv, 1)
    y = F.scaled_dot_product_attention(folded, keys, values, mask, scale=scale)
    return y.reshape(B, Hq, T, D)  # no view on a GPU, where tokens lie before heads


def math_attention(
    q: Tensor, keys: Tensor, values: Tensor, index: Tensor, key_pos: Tensor, *,
    scale: float | None, window: int | None, softcap: float | None, alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """prefill_attention in plain operators, which make all scores, for keys in any order."""
    B, Hq, T, D = q.shape
    Hkv, S = keys.shape[1:3]
    seen = visible(index, key_pos, window)  # (B, 1, T, S)
    if softcap is None and alibi_slopes is None and sinks is None:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(
                q, keys, values, seen, scale=scale, enable_gqa=True
            )

    # in place where possible: scores are the largest tensors of a prefill
    folded = q.reshape(B, Hkv, -1, D)  # (B, Hkv, Hq / Hkv * T, D)
    scores = (folded @ keys.mT).view(B, Hq, T, S).float()
    scores *= D ** -0.5 if scale is None else scale
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if alibi_slopes is not None:
        distance = index[:, None, :, None] - key_pos[:, None, None]  # (B, 1, T, S)
        scores -= alibi_slopes[:, None, None] * distance
    scores.masked_fill_(~seen, -math.inf)
    if sinks is not None:  # each is the score of one more key, which has no value
        sink = sinks[:, None, None].expand(B, Hq, T, 1)
        scores = torch.cat([scores, sink], dim=-1)  # (B, Hq, T, S + 1)
    weights = scores.softmax(-1)[..., :S].to(values.dtype)
    return (weights.reshape(B, Hkv, -1, S) @ values).view(B, Hq, T, D)


def flash_takes(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether causal attention runs in a flash kernel of PyTorch."""
    if q.device.type == "cpu":
        return torch.backends.cuda.flash_sdp_enabled()  # the switch is the CPU's too
    parameters = SDPAParams(q, keys, values, None, 0.0, True, True)
    return torch.backends.cuda.can_use_flash_attention(parameters)


def visible(index: Tensor, key_pos: Tensor, window: int | None) -> Tensor:
    """Which keys, at positions key_pos [B or 1, S], the queries at positions index [B, T] see:
    [B, 1, T, S] bool."""
    query_pos = index[:, None, :, None]
    key_pos = key_pos[:, None, None]
    seen = key_pos <= query_pos
    if window is not None:
        seen = seen & (key_pos > query_pos - window)
    return seen


# one operator in a compiled prefill; its result lies in memory as [B, T, Hq, D]
torch.library.define(
    "gpt_flash::prefill_attention",
    "(Tensor q, Tensor keys, Tensor values, Tensor index, Tensor key_pos, *, float? scale, "
    "int? window, float? softcap, Tensor? alibi_slopes, Tensor? sinks) -> Tensor",
)
torch.library.impl("gpt_flash::prefill_attention", "default", prefill_attention)


@torch.library.register_fake("gpt_flash::prefill_attention")
def fake_prefill_attention(q: Tensor, *_: Any, **options: Any) -> Tensor:
    B, Hq, T, D = q.shape
    return q.new_empty(B, T, Hq, D).transpose(1, 2)

# --- the rest of the transformer ---


class Block(nn.Module):
    """One layer, its modules named as in Hugging Face's checkpoints."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        family = FAMILIES[config.family]
        self.input_layernorm = family.norm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = family.norm(config.dim, config.norm_eps)
        if config.moe is not None and config.moe.layers[layer]:
            self.mlp = family.moe(config)
        else:
            self.mlp = family.mlp(config)
        self.residual_scale = config.residual_scale

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class SandwichBlock(Block):
    """Gemma 2's: norms before and after."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        norm = FAMILIES[config.family].norm
        self.pre_feedforward_layernorm = norm(config.dim, config.norm_eps)
        self.post_feedforward_layernorm = norm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), positions, cache)
        x = x + self.post_attention_layernorm(y)
        y = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(y)


class PostNormBlock(Block):
    """OLMo 2's: norms after, none before."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.post_feedforward_layernorm = self.input_layernorm
        del self.input_layernorm

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(x, positions, cache))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class ScaledBlock(Block):
    """Granite's: what is added to x is scaled."""

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        scale = self.residual_scale
        x = x + scale * self.self_attn(self.input_layernorm(x), positions, cache)
        return x + scale * self.mlp(self.post_attention_layernorm(x))


class GemmaNorm(nn.RMSNorm):
    """Its weights are distances from 1, and it multiplies in float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight = 1 + self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)


def run_block(block: nn.Module, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
    """What is compiled once for all layers. The block is called as a module, so that its hooks
    fire and a subclass has its way."""
    return block(x, positions, cache)


def run_head(model: Transformer, x: Tensor) -> Tensor:
    return model.head(x)


class Transformer(nn.Module):
    """A decoder. Prefill and decode are two methods; forward picks one by the number of tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        family = FAMILIES[config.family]
        self.config = config
        # nn.Embedding alone would draw numbers, on meta too, which loads half of torch.compile
        table = torch.empty(config.vocab_size, config.dim)
        self.embed_tokens = nn.Embedding.from_pretrained(table)
        self.layers = nn.ModuleList(family.block(config, i) for i in range(config.n_layer))
        self.norm = family.norm(config.dim, config.norm_eps)
        self.lm_head = Linear(config.dim, config.vocab_size, bias=False)
        self.cache: KVCache | None = None
        self.ranks = ALONE  # the processes that share it
        # rope_table of each, for short and for long texts, made when a cache needs it
        self.rope: dict[tuple[Rope, bool], Tensor] = {}
        self.slopes: Tensor | None = None
        # compile_model puts compiled ones here
        self.decode_block: Callable = run_block
        self.prefill_block: Callable = run_block
        self.decode_head: Callable = run_head
        self.compiled_lengths = {1}  # tokens a row of the decode steps that take these

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of the weights that are not quantized."""
        return next(self.parameters()).dtype

    @torch.no_grad()
    def forward(self, tokens: Tensor, input_pos: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens [B, T] integer, input_pos [B] int32: tokens of each row that are cached already
        -> logits [B, T, vocab_size]. cache: model.cache by default.

        Row b's tokens take positions input_pos[b] ... input_pos[b]+T-1; rows may differ. Up to 16
        tokens decode, more prefill. ValueError if they do not fit, or go back to what a sliding
        window has passed, as far as the host can see."""
        if tokens.shape[1] > MAX_DECODE_TOKENS:
            return self.prefill(tokens, input_pos, cache)
        B, T = tokens.shape
        cache = self.check_cache(B, cache)
        held = [cache.max_seq_len] * B  # a GPU does not say, so that the caller is believed
        if tokens.device.type == "cpu":
            refuse_overflow(cache, int(input_pos.max()), T)
            cache.refuse_lost(slice(0, B), input_pos)
            held = (input_pos + T).tolist()
        logits = self.decode(tokens, input_pos, cache)
        cache.held[:B] = held
        return logits

    @torch.no_grad()
    def decode(self, tokens: Tensor, input_pos: Tensor, cache: KVCache | None = None) -> Tensor:
        """1 to 16 tokens of each row, as in forward, without a word to the host: lengths stay on
        the device, shapes never change, so a step can be compiled and captured once."""
        cache = self.check_cache(len(tokens), cache)
        rows = slice(0, len(tokens))
        layers = cache.layers(rows)
        cache.note_written(rows, input_pos, tokens.shape[1])
        positions = self.positions(input_pos, tokens.shape[1], cache)
        compiled = tokens.shape[1] in self.compiled_lengths
        block_forward = self.decode_block if compiled else run_block
        head = self.decode_head if compiled else run_head
        return head(self, self.run_layers(block_forward, tokens, positions, layers))

    @torch.no_grad()
    def prefill(
        self, tokens: Tensor, input_pos: Tensor, cache: KVCache | None = None, *,
        rows: slice | None = None, start: int | None = None, last: Tensor | None = None,
    ) -> Tensor:
        """Any number of tokens of the given rows of the cache, by default the first ones, behind
        what they hold; the other rows keep their state.

        start: the largest input_pos, if the caller knows it: reading it waits for the device.
        last [B]: which of the T is each row's last token, what follows is padding, and only its
        logits are wanted, [B, 1, vocab_size]; -1: the row has no token here, nor logits."""
        B, T = tokens.shape
        cache = self.check_cache(B, cache)
        if rows is None:
            rows = slice(0, B)
        cached = [start] * B
        if start is None:
            cached = input_pos.tolist()
            start = max(cached)
            cache.refuse_lost(rows, input_pos)
        refuse_overflow(cache, start, T)
        cache.note_written(rows, input_pos, T if last is None else last + 1)
        positions = self.positions(input_pos, T, cache, start, last)
        x = self.run_layers(self.prefill_block, tokens, positions, cache.layers(rows))
        cache.held[rows] = [length + T for length in cached]
        if last is not None:
            row = torch.arange(B, device=x.device)
            x = x[row, last][:, None]  # (B, 1, dim)
        return self.head(x)

    def run_layers(
        self, block_forward: Callable, tokens: Tensor, positions: list[Positions],
        layers: list[LayerCache],
    ) -> Tensor:
        """positions and layers: of each layer. -> what the last one gives, [B, T, dim]."""
        x = self.embed_tokens(tokens)  # (B, T, dim)
        if self.config.embedding_scale != 1:
            # rounded as the embedding is: families with a scale were trained so
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)
        for block, where, cache in zip(self.layers, positions, layers, strict=True):
            x = block_forward(block, x, where, cache)
        return x

    def head(self, x: Tensor) -> Tensor:
        """x [B, T, dim] -> logits [B, T, vocab_size]."""
        logits = self.lm_head(self.norm(x))
        if self.config.logits_scale != 1:
            logits = logits * self.config.logits_scale
        softcap = self.config.logits_softcap
        if softcap is not None:
            logits = (logits / softcap).tanh() * softcap
        return logits

    def positions(
        self, input_pos: Tensor, T: int, cache: KVCache, start: int | None = None,
        last: Tensor | None = None,
    ) -> list[Positions]:
        """For each layer, where T tokens stand behind input_pos; start: None for decode. last: see
        prefill."""
        index = input_pos.long()[:, None]  # (B, 1)
        if T > 1:
            index = index + torch.arange(T, device=index.device)  # (B, T)
        if last is not None:
            last = input_pos + last
        positions = Positions(input_pos, index, start, self.alibi_slopes(), last=last)
        return self.turned(positions, index, cache.max_seq_len)

    def turned(self, positions: Positions, index: Tensor, max_seq_len: int) -> list[Positions]:
        """For each layer, positions with its rotary embedding of the tokens at index [B, T]."""
        of_rope = {None: positions}
        for rope, table in zip(distinct(self.config.ropes), self.rope_upto(max_seq_len)):
            cos, sin = table[index].unbind(2)  # (B, T, 1, D) each
            of_rope[rope] = positions._replace(cos=cos, sin=sin)
        return [of_rope[rope] for rope in self.config.ropes]

    def rope_upto(self, max_seq_len: int) -> list[Tensor]:
        """Each rope_table of at least that many positions, made once for the largest cache."""
        tables = []
        for rope in distinct(self.config.ropes):
            key = (rope, rope.is_long(max_seq_len))
            table = self.rope.get(key)
            if table is None or table.device != self.device or len(table) < max_seq_len:
                table = rope_table(rope, max_seq_len, self.device)
                self.rope[key] = table
            tables.append(table)
        return tables

    def alibi_slopes(self) -> Tensor | None:
        """[Hq] float32 where scores fall with distance, made once."""
        if not self.config.alibi:
            return None
        if self.slopes is None or self.slopes.device != self.device:
            n_head = self.config.n_head
            slopes = alibi_slopes(n_head * self.ranks.size)  # of all ranks' heads
            self.slopes = piece(slopes, (n_head,), self.ranks).to(self.device)
        return self.slopes

    def check_cache(self, batch_size: int, cache: KVCache | None) -> KVCache:
        cache = self.cache if cache is None else cache
        if cache is None or batch_size > cache.max_batch_size:
            raise ValueError(f"call setup_caches for a batch of at least {batch_size} first")
        if cache.ring is not None and cache.windows != self.config.windows:
            raise ValueError("the cache was made for other windows than the model's layers have")
        return cache

    @torch.no_grad()
    def setup_caches(
        self, max_batch_size: int, max_seq_len: int, kv_dtype: torch.dtype | None = None,
        attention: str = "auto", rings: bool = True,
    ) -> KVCache:
        """Allocate a cache, kept as model.cache. kv_dtype: None for the model's own dtype,
        torch.int8 for a quantized cache. attention: "flash", "math" or "auto", decode's path.
        rings: layers with a sliding window keep no more tokens than these and MAX_DECODE_TOKENS,
        so that a row can go back over as many. False: all tokens, to go back to any."""
        self.cache = None  # the old one goes before the new one comes
        config = self.config
        cache = KVCache(
            config.n_layer, config.n_kv_head, config.head_dim, max_batch_size, max_seq_len,
            dtype=kv_dtype or self.dtype, device=self.device, attention=attention,
            windows=config.windows if rings else None,
        )
        # a softcap or sinks would notice that all scores of a query are shifted
        if cache.dtype == torch.int8 and config.softcap is None and not config.sinks:
            self.calibrate_k_mean(cache)
        self.cache = cache
        return cache

    def calibrate_k_mean(self, cache: KVCache) -> None:
        """Fill an int8 cache's k_mean: the mean key of each head over random tokens.

        Keys have outlier channels that one int8 scale a token handles badly; subtracting a fixed
        vector removes them, and softmax does not notice (SageAttention, arXiv 2410.02367). The
        tokens are spread over the cache, because keys turn with their position: with 64 of them
        the mean KL on SmolLM2-135M is 9.6e-4 at the first positions, 6.9e-4 spread."""
        config = self.config
        n = min(128, cache.max_seq_len)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.vocab_size, (1, n), generator=generator)
        input_pos = torch.zeros(1, dtype=torch.int32, device=self.device)
        spread = torch.linspace(0, cache.max_seq_len - 1, n).long().to(self.device)
        [positions, *_] = self.positions(input_pos, n, cache, start=0)
        positions = self.turned(positions, spread[None], cache.max_seq_len)
        scratch = KVCache(  # not quantized, and with all n tokens of every layer
            config.n_layer, config.n_kv_head, config.head_dim, 1, n, dtype=self.dtype,
            device=self.device,
        )
        layers = scratch.layers(slice(0, 1))
        self.run_layers(self.prefill_block, tokens.to(self.device), positions, layers)
        keys = scratch.kv[:, 0, 0].float()  # (layer, Hkv, n, D)
        cache.k_mean.copy_(keys.mean(2, keepdim=True))

    def weight_bytes(self, rows: int = 1) -> int:
        """Bytes of weights that a decode step of so many tokens reads: all but the embedding, whose
        rows are few, and, of experts, as many as Experts.share expects the tokens to choose."""
        nbytes = tensor_bytes(self) - tensor_bytes(self.embed_tokens)
        for module in self.modules():
            if isinstance(module, Experts):
                nbytes -= tensor_bytes(module) * (1 - module.share(rows))
        return round(nbytes)


def refuse_overflow(cache: KVCache, cached: int, new: int) -> None:
    if cached < 0 or cached + new > cache.max_seq_len:
        raise ValueError(
            f"{cached} cached and {new} new tokens exceed the cache of {cache.max_seq_len}"
        )


def tensor_bytes(module: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in module.state_dict().values())

# --- families ---


@dataclass(frozen=True)
class Family:
    """What a family of models is built of, where that is not what a Llama is built of."""

    norm: type[nn.Module] = nn.RMSNorm  # called with (size, eps)
    mlp: type[nn.Module] = MLP  # called with (config)
    moe: type[nn.Module] | None = None  # in its place in layers with experts
    block: type[nn.Module] = Block  # called with (config, layer)
    # joined products that checkpoints have as one tensor too, and its name there
    stored_joined: dict[str, str] = field(default_factory=dict)


# By the model_type of config.json; config.SETTINGS says how that is read.
FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma": Family(norm=GemmaNorm),
    "gemma2": Family(norm=GemmaNorm, block=SandwichBlock),
    "gemma3_text": Family(norm=GemmaNorm, block=SandwichBlock),
    "phi3": Family(stored_joined={"qkv_proj": "qkv_proj", "gate_up_proj": "gate_up_proj"}),
    "olmo2": Family(block=PostNormBlock),
    "olmo3": Family(block=PostNormBlock),
    "smollm3": Family(),
    "granite": Family(block=ScaledBlock),
    "baichuan": Family(stored_joined={"qkv_proj": "W_pack"}),
    "mixtral": Family(moe=MoE),
    "qwen2_moe": Family(moe=MoE),
    "qwen3_moe": Family(moe=MoE),
    "gpt_oss": Family(moe=ClampedMoE),
}

# --- loading ---


@torch.no_grad()
def load_model(
    path: str | Path, *, device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.bfloat16, quantize: str | None = None, group_size: int = 32,
    ranks: Ranks = ALONE,
) -> Transformer:
    """Load a checkpoint: a Hugging Face folder or hub id, a .gguf file, a folder of save_quantized
    or, for benchmarks, a bare config.json, which gives random weights.

    quantize: "int8" or "int4" (in groups of group_size), layer by layer while loading, so that a
    model that fits only when quantized can be loaded; "auto": as the file is, so that the integers
    of a GGUF file stay what they are, but for Q6_K's, whose groups are joined in 8 bits; None:
    dequantized. dtype None: float32 where the integers of a file stay, else bfloat16. ranks: of
    several processes, of which each gets its part of the model. ValueError says what is wrong."""
    check_target(device, dtype)
    path = resolve(path)
    checkpoint = open_checkpoint(path)
    with nonsense_refused(path):
        config = ModelConfig.from_hf(checkpoint.config)
    if dtype is None:
        dtype = default_dtype(checkpoint, quantize == "auto")
    with torch.device("meta"):
        whole = Transformer(config).to(dtype)
        model = rank_model(whole, ranks)
    stored_joined = FAMILIES[config.family].stored_joined
    weights = Weights(model, whole, checkpoint, ranks, stored_joined)
    weights.choose_layers(quantize, device)
    stored = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    nbytes = stored * {"int8": 0.5, "int4": 0.3}.get(quantize, 1)
    require_memory(nbytes, device, f"loading {path}", "take a smaller model, or --quantize")
    weights.load(device, quantize, group_size)
    join(model, ranks)
    for module in model.modules():
        if hasattr(module, "stack"):
            module.stack()
    return model.eval()


def check_target(device: torch.device | str, dtype: torch.dtype | None) -> None:
    """ValueError if there is no such device, or if weights have no such dtype."""
    try:
        torch.empty(1, device=device).tolist()
    except Exception as e:  # of many kinds, from PyTorch and from what it would import
        raise ValueError(f"no model can be on device {device}: {first_line(e)}") from None
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        names = ", ".join(map(str, WEIGHT_DTYPES))
        raise ValueError(f"no model can have the dtype {dtype}; there are {names}")


def rank_model(whole: Transformer, ranks: Ranks) -> Transformer:
    """A rank's part of a model without weights."""
    if ranks.size == 1:
        return whole
    dtype = whole.dtype
    config = whole.config
    model = Transformer(local(config, ranks)).to(dtype)
    # of the vocabulary, the last rank's part is padded
    rows = math.ceil(config.vocab_size / ranks.size)
    model.lm_head = Linear(config.dim, rows, bias=False).to(dtype)
    return model


def default_dtype(checkpoint: Checkpoint, keep: bool) -> torch.dtype:
    """Of activations: float32 where the integers of a file are kept. On SmolLM2 in Q4_1 that is a
    mean KL of 8.9e-4 from the dequantized model, of which scales in bfloat16 are 2.2e-4 and
    products in it the rest; everything in bfloat16 is 1.3e-3."""
    if keep and checkpoint.is_quantized():
        return torch.float32
    return torch.bfloat16
