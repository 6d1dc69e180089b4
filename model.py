"""A transformer of Llama's kind with a static KV cache, and loading it.

A step of decode goes through Transformer.decode, Block.forward, Attention.forward and attend, and
ends in the cache: LayerCache.flash_decode appends the new keys and values and attends to what is
there. What other families, files and devices need is in the folders, which extension() finds."""
from __future__ import annotations

import importlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.backends.cuda import SDPAParams
from torch.nn.attention import SDPBackend, sdpa_kernel

import quantize as quantization
from kernels import flash_decode_unchecked, quantize_kv, triton
from quantize import MODES, Linear, calibrate_k_mean, quantize_linear, quantized_layout

MAX_DECODE_TOKENS = 16  # queries per row that one decode attention call takes


def extension(name: str, required: bool = True) -> ModuleType | None:
    """Import a folder that the core runs without, or a module of one. A copy of gpt-flash that does
    not have it gets None, or ValueError if it is required. All calls:

    families        a model_type or kind of rope without a row here (entry), windows (windows_of,
                    setup_caches)
    formats         other files (open_checkpoint), load_tokenizer, adapters (load_model)
    cpu, products   what a device multiplies faster with (use_products)
    cpu.ahead       steps of a CPU that were compiled before (generate.prepare_steps)
    calibration     rounding by a text (load_model)
    batching        several prompts, proposals, statistics, log probabilities (decoder_for)
    processors      what changes logits, and log probabilities (Decoder.start)
    cli             what a terminal wants beyond gpt-fast's flags (where generate begins, main)"""
    folder = name.partition(".")[0]
    if (Path(__file__).parent / folder / "__init__.py").exists():
        return importlib.import_module(name)
    if required:
        raise ValueError(f"this copy of gpt-flash has no folder {folder}, which this needs")
    return None

# --- the transformer ---


class Transformer(nn.Module):
    """A decoder. Prefill and decode are two methods; forward picks one by the number of tokens."""

    n_texts = 0  # calls of prefill and forward, over all models: cpu/ahead.py looks if it grew

    def __init__(self, config: ModelConfig):
        super().__init__()
        family = FAMILIES[config.family]
        self.config = config
        # nn.Embedding alone would draw numbers, on meta too, which loads half of torch.compile
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim))
        self.layers = nn.ModuleList(family.block(config, i) for i in range(config.n_layer))
        self.norm = family.norm(config.dim, config.norm_eps)
        self.lm_head = Linear(config.dim, config.vocab_size, bias=False)
        self.cache: KVCache | None = None
        # what follows is changed by compile_model
        self.compiled = False
        self.decode_block: BlockForward = run_block
        self.prefill_block: BlockForward = run_block
        self.decode_head: Callable[[Transformer, Tensor], Tensor] = run_head
        self.compiled_lengths = {1}  # with how many tokens a row decode takes these
        self.compile_options: dict[str, Any] = {}  # for Inductor, beside compile_model's

    @torch.no_grad()
    def decode(self, tokens: Tensor, input_pos: Tensor, cache: KVCache | None = None) -> Tensor:
        """1 to 16 tokens of each row, as in forward: lengths stay on the device and shapes never
        change, so that a step can be compiled and captured once."""
        B, T = tokens.shape
        rows = slice(0, B)
        cache = self.check_cache(B, cache)
        cache.note_written(rows, input_pos, T)
        positions = self.positions(input_pos, T, cache)
        compiled = T in self.compiled_lengths
        block_forward = self.decode_block if compiled else run_block
        head = self.decode_head if compiled else run_head
        x = self.run_layers(block_forward, tokens, positions, cache.layers(rows))
        return head(self, x)  # (B, T, vocab_size)

    @torch.no_grad()
    def prefill(
        self, tokens: Tensor, input_pos: Tensor, cache: KVCache | None = None, *,
        rows: slice | None = None, cached: int | None = None, last: Tensor | None = None,
        hidden: bool = False,
    ) -> Tensor:
        """Any number of tokens of the given rows of the cache, by default the first ones.

        cached: what every row's input_pos is, if the caller knows: reading it waits for the device.
        last [B]: the index of each row's last token, after which comes padding (-1: all is), and
        whose logits alone are returned, [B, 1, vocab_size]. hidden: return the head's input."""
        Transformer.n_texts += 1
        quantization.pack_again()
        B, T = tokens.shape
        cache = self.check_cache(B, cache)
        rows = rows or slice(0, B)
        lengths = [cached] * B
        if cached is None:
            lengths = input_pos.tolist()
            cached = max(lengths)
            cache.refuse_lost(rows, input_pos)
        cache.refuse_overflow(lengths, T)
        cache.note_written(rows, input_pos, T if last is None else last + 1)
        positions = self.positions(input_pos, T, cache, cached, last, min(lengths) == cached)
        x = self.run_layers(self.prefill_block, tokens, positions, cache.layers(rows))
        cache.cached[rows] = [n + T if last is None else n for n in lengths]  # or the caller knows
        if last is not None and not hidden:
            x = x[torch.arange(B, device=x.device), last][:, None]  # (B, 1, dim)
        return x if hidden else self.head(x)

    @torch.no_grad()
    def forward(self, tokens: Tensor, input_pos: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens [B, T] integer, input_pos [B] int32: tokens of each row that are cached already
        -> logits [B, T, vocab_size]. cache: model.cache by default.

        Up to 16 tokens decode, more prefill. ValueError if they do not fit, or go back to what a
        sliding window has passed, as far as the host can see."""
        if tokens.shape[1] > MAX_DECODE_TOKENS:
            return self.prefill(tokens, input_pos, cache)
        Transformer.n_texts += 1  # whether a text begins with these tokens is not known
        quantization.pack_again()
        B, T = tokens.shape
        cache = self.check_cache(B, cache)
        cached = [cache.max_seq_len] * B  # reading a GPU would wait: any length is believed then
        if tokens.device.type == "cpu":
            cache.refuse_overflow(input_pos.tolist(), T)
            cache.refuse_lost(slice(0, B), input_pos)
            cached = (input_pos + T).tolist()
        logits = self.decode(tokens, input_pos, cache)
        cache.cached[:B] = cached
        return logits

    def run_layers(
        self, block_forward: BlockForward, tokens: Tensor, positions: list[Positions],
        layers: list[LayerCache],
    ) -> Tensor:
        """positions and layers: of each layer -> what the last one gives, [B, T, dim]."""
        x = self.embed(tokens)  # (B, T, dim)
        for block, where, cache in zip(self.layers, positions, layers, strict=True):
            x = block_forward(block, x, where, cache)
        return x

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embed_tokens(tokens)

    def head(self, x: Tensor) -> Tensor:
        """x [B, T, dim] -> logits [B, T, vocab_size]."""
        return self.lm_head(self.norm(x))

    def positions(
        self, input_pos: Tensor, T: int, cache: KVCache, cached: int | None = None,
        last: Tensor | None = None, even: bool = False, turned: Tensor | None = None,
    ) -> list[Positions]:
        """Each layer's Positions of T tokens behind input_pos. cached: the largest input_pos, None
        for decode. last: see prefill; even: see Positions. turned [B, T]: other positions, for the
        rotary embedding alone."""
        index = input_pos.long()[:, None]  # (B, 1)
        if T > 1:
            index = index + torch.arange(T, device=index.device)  # (B, T)
        if last is not None:
            last = input_pos + last
        positions = Positions(input_pos, index, cached is not None, cached or 0, even, last=last)
        turned = index if turned is None else turned
        of_rope = {None: positions}
        for rope in filter(None, dict.fromkeys(self.config.ropes)):
            if rope not in cache.rope_tables:
                cache.rope_tables[rope] = rope_table(rope, cache.max_seq_len, index.device)
            cos, sin = cache.rope_tables[rope][turned].unbind(2)  # (B, T, 1, D) each
            of_rope[rope] = positions._replace(cos=cos, sin=sin)
        return [of_rope[rope] for rope in self.config.ropes]

    def broadcast(self, value: Any) -> Any:
        """The value; where ranks share a model, parallel/ has the first rank's in its place."""
        return value

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of the weights that are not quantized."""
        return next(self.parameters()).dtype

    def check_cache(self, batch_size: int, cache: KVCache | None) -> KVCache:
        cache = self.cache if cache is None else cache
        if cache is None or batch_size > cache.max_batch_size:
            raise ValueError(f"call setup_caches for a batch of at least {batch_size} first")
        if cache.windows not in (None, self.config.windows):
            raise ValueError("the cache was made for other windows than the model's layers have")
        return cache

    @torch.inference_mode(False)
    @torch.no_grad()
    def setup_caches(
        self, max_batch_size: int, max_seq_len: int, kv_dtype: torch.dtype | None = None,
        attention: str = "auto", rings: bool = True,
    ) -> KVCache:
        """Allocate a cache, kept as model.cache. kv_dtype: None for the model's own, a
        floating-point one, or one that FORMATS has, such as torch.int8. attention: "flash", "math"
        or "auto", decode's path. rings: layers with a sliding window keep as many tokens and
        MAX_DECODE_TOKENS more, by which a row can go back; False: they keep all."""
        self.cache = None  # the old one goes before the new one comes
        config = self.config
        make_cache = KVCache
        if rings and any(config.windows):
            make_cache = partial(extension("families").RingKVCache, windows=config.windows)
        cache = make_cache(
            config.n_layer, config.n_kv_head, config.head_dim, max_batch_size, max_seq_len,
            dtype=kv_dtype or self.dtype, device=self.device, attention=attention,
            makers=[block.self_attn.make_cache for block in self.layers],
        )
        if cache.dtype == torch.int8 and all(b.self_attn.may_shift_scores for b in self.layers):
            calibrate_k_mean(self, cache)
        self.cache = cache
        return cache


def run_block(block: nn.Module, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
    """What is compiled once for all layers. The block is called as a module: its hooks fire."""
    return block(x, positions, cache)


def run_head(model: Transformer, x: Tensor) -> Tensor:
    return model.head(x)


Device = torch.device | str
MakeLayer = Callable[["KVCache", "Places", Device], "LayerCache"]
BlockForward = Callable[[nn.Module, Tensor, "Positions", "LayerCache"], Tensor]


class Block(nn.Module):
    """One layer, its modules named as in Hugging Face's checkpoints."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        family = FAMILIES[config.family]
        self.input_layernorm = family.norm(config.dim, config.norm_eps)
        self.self_attn = family.attention(config, layer)
        self.post_attention_layernorm = family.norm(config.dim, config.norm_eps)
        self.mlp = family.mlp(config, layer)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Grouped-query attention over the cache; query, key and value projections are one product."""

    may_shift_scores = True  # a number added to all scores of a query would change nothing

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.head_dim = config.head_dim
        self.window = config.windows[layer]
        self.softmax_scale = config.softmax_scale
        n_heads = self.n_head + 2 * self.n_kv_head
        self.qkv_proj = Linear(config.dim, n_heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(self.n_head * self.head_dim, config.dim, bias=config.o_bias)
        self.q_norm, self.k_norm = None, None
        if config.qk_norm:
            norm = FAMILIES[config.family].norm
            self.q_norm = norm(self.head_dim, config.norm_eps)
            self.k_norm = norm(self.head_dim, config.norm_eps)

    def make_cache(self, cache: KVCache, places: Places, device: Device) -> LayerCache:
        """This layer's part of a cache, for all rows: a LayerCache of any class."""
        return cache.make_layer(places, device, (self.n_kv_head, self.head_dim))

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
        """Put k, v [B, Hkv, T, D] into the cache; q [B, Hq, T, D] attends to all up to itself."""
        if cache.flash and not positions.prefill:  # cost follows the live length
            return cache.flash_decode(q, k, v, positions.input_pos, **self.options())
        keys, values, key_pos = cache.places.update(cache, k, v, positions)
        return self.attend_to(q, keys, values, positions, key_pos)

    def attend_to(
        self, q: Tensor, keys: Tensor, values: Tensor, positions: Positions, key_pos: Tensor
    ) -> Tensor:
        """attend in PyTorch, for prefill or attention="math": keys and values [B, Hkv, S, D] stand
        at positions key_pos [B or 1, S]."""
        attention, options = math_attention, self.options()
        if positions.prefill:
            attention = prefill_operator if torch.compiler.is_compiling() else prefill_attention
            options["in_order"] = positions.even and keys.shape[2] == positions.cached + q.shape[2]
        return attention(q, keys, values, positions.index, key_pos, **options)

    def options(self) -> dict[str, Any]:
        """How scores become weights: arguments of flash_decode by name."""
        return {"scale": self.softmax_scale, "window": self.window}


GELU_TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": GELU_TANH}


class MLP(nn.Module):
    """The gated feed-forward network; gate and up are one product. ffn_dim: None for config's."""

    def __init__(self, config: ModelConfig, layer: int, ffn_dim: int | None = None):
        super().__init__()
        self.act = ACTIVATIONS[config.act]
        ffn_dim = ffn_dim or config.ffn_dim
        self.gate_up_proj = Linear(config.dim, 2 * ffn_dim, bias=config.mlp_bias)
        self.down_proj = Linear(ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up)

# --- attention in PyTorch ---


QUERY_TILE = 512  # queries of a tile at most; its keys end with its last query
CPU_TILE = 32  # queries of every tile on a CPU, which sums other numbers in other orders
MAX_SCORES = 2**27  # scores of a tile at most: 537 MB in float32


def prefill_attention(
    q: Tensor, keys: Tensor, values: Tensor, index: Tensor, key_pos: Tensor, *,
    scale: float | None = None, window: int | None = None, in_order: bool = False,
) -> Tensor:
    """Causal attention of q [B, Hq, T, D], at positions index [B, T], to keys and values
    [B, Hkv, S, D] at positions key_pos [B or 1, S] -> [B, Hq, T, D]. Query t of T sees no key after
    the one at S - T + t; in_order: it sees all up to that one, within the window.

    PyTorch's flash kernels take what is in order. Elsewhere a mask is needed, with which a GPU
    wants as many key as query heads (ATen's sdp_utils.cpp): so query heads are folded into queries,
    and in tiles. cuDNN, first in PyTorch's order on an H100, takes some 30 ms of the host for each
    new pair of lengths."""
    if window is not None and window >= keys.shape[2]:
        window = None
    whole = window is None and q.shape[2] == keys.shape[2]  # all that AMD's kernel takes
    suits = in_order and not q.is_cpu and (whole or torch.version.hip is None)
    suits = suits and q.shape[3] % 8 == 0  # which PyTorch does not ask below
    parameters = SDPAParams(q, keys, values, None, 0.0, False, True)
    if suits and torch.backends.cuda.can_use_flash_attention(parameters):
        # its mask ends with the last query and key, which F.scaled_dot_product_attention hides
        inputs = [x.transpose(1, 2) for x in (q, keys, values)]  # (B, T or S, H, D) each
        y, *_ = torch.ops.aten._flash_attention_forward(
            *inputs, None, None, q.shape[2], keys.shape[2], 0.0, True, False, scale=scale,
            window_size_left=None if window is None else window - 1, window_size_right=0,
        )
        return y.transpose(1, 2)
    masked = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    options = dict(scale=scale, window=window)
    with sdpa_kernel(masked) if q.is_cuda else nullcontext():
        return in_tiles(folded_attention, q, keys, values, index, key_pos, **options)


def in_tiles(
    attention: Callable[..., Tensor], q: Tensor, keys: Tensor, values: Tensor, index: Tensor,
    key_pos: Tensor, **options: Any,
) -> Tensor:
    """Causal attention, as in prefill_attention, a tile of queries at a time. On a CPU all tiles
    have one size, padded with queries that see nothing: what one gets depends on none behind it."""
    B, Hq, n, D = q.shape
    tile = min(QUERY_TILE, max(1, MAX_SCORES // (B * Hq * (keys.shape[2] + CPU_TILE))))
    if q.is_cpu:
        tile = min(tile, CPU_TILE)
        more = -n % tile
        q, keys, values = (F.pad(x, (0, 0, 0, more)) for x in (q, keys, values))
        index, key_pos = F.pad(index, (0, more)), F.pad(key_pos, (0, more), value=2**62)
    T, S = q.shape[2], keys.shape[2]
    y = q.new_empty(B, T, Hq, D)
    for first in range(0, T, tile):
        last = min(first + tile, T)
        end = S - T + last
        part = attention(
            q[:, :, first:last], keys[:, :, :end], values[:, :, :end], index[:, first:last],
            key_pos[:, :end], **options,
        )
        y[:, first:last] = part.transpose(1, 2)  # (B, tile, Hq, D)
    return y[:, :n].contiguous().transpose(1, 2)


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
    scale: float | None, window: int | None,
) -> Tensor:
    """prefill_attention in plain operators: all scores at once, for keys in any order."""
    seen = visible(index, key_pos, window)  # (B, 1, T, S)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, keys, values, seen, scale=scale, enable_gqa=True)


def visible(index: Tensor, key_pos: Tensor, window: int | None) -> Tensor:
    """Which keys, at positions key_pos [B or 1, S], the queries at positions index [B, T] see:
    [B, 1, T, S] bool."""
    query_pos = index[:, None, :, None]
    key_pos = key_pos[:, None, None]
    seen = key_pos <= query_pos
    if window is not None:
        seen = seen & (key_pos > query_pos - window)
    return seen


# prefill_attention in a compiled prefill: how many tiles there are depends on the prompt
prefill_operator = torch.library.custom_op(
    "gpt_flash::prefill_attention", prefill_attention, mutates_args=()
)


@prefill_operator.register_fake
def fake_prefill_attention(q: Tensor, *_: Any, **options: Any) -> Tensor:
    return q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)

# --- the cache: a format (LayerCache and its subclasses), and places ---


class Positions(NamedTuple):
    """Where the new tokens of each row stand, and whether this is prefill or decode."""

    input_pos: Tensor  # [B] int32: tokens of each row that are cached already
    index: Tensor  # [B, T] int64: the position of each new token
    prefill: bool  # False: decode, where the host knows no lengths
    cached: int  # prefill: the largest input_pos
    even: bool = False  # prefill: whether that is every row's
    cos: Tensor | None = None  # [B, T, 1, D] float32, or None in a layer without rope
    sin: Tensor | None = None  # the same of its sine
    last: Tensor | None = None  # [B] int64: each row's last token; None: no row has padding
    of_layer: Tensor | None = None  # [B, T, ...]: further inputs of a layer, of Gemma 4's


class Places:
    """At which of a row's S places which position lies: here position p at place p."""

    ring = False

    def __init__(self, S: int):
        self.S = S

    def of(self, index: Tensor) -> Tensor:
        """The place of each position."""
        return index

    def update(
        self, cache: LayerCache, k: Tensor, v: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Put the new tokens' k, v [B, Hkv, T, D] into the cache -> the keys and values that they
        attend to, [B, Hkv, S, D] each, and at which positions these stand, [B or 1, S]; positions
        that no new token sees may be among them."""
        cache.write(k, v, positions.index)
        # nothing is cached before, and the cache would give back the same numbers
        if positions.prefill and positions.cached == 0 and cache.kv.dtype == k.dtype:
            return k, v, positions.index
        # decode does not know the lengths: it reads everything
        end = positions.cached + k.shape[2] if positions.prefill else self.S
        keys, values = cache.read(end, k.dtype)
        return keys, values, torch.arange(end, device=k.device)[None]


class LayerCache:
    """The keys and values of one layer for some rows, in a floating-point dtype.

    kv [2, B, Hkv, S, D] is one tensor, since torch.compile would copy two inputs that share memory.
    Another format is a subclass in FORMATS: pack and unpack are enough, flash_decode is faster."""

    def __init__(self, tensors: list[Tensor], places: Places, flash: bool):
        self.tensors = tensors  # what pack makes and unpack takes: [2, B, Hkv, S, ...] each
        self.kv = tensors[0]
        self.places = places
        self.flash = flash  # how decode attends: flash_decode, or SDPA over the whole cache

    @classmethod
    def allocate(cls, shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> list[Tensor]:
        """The tensors of a layer whose kv has this shape, each with a storage of its own."""
        return [torch.zeros(shape, dtype=dtype, device=device)]

    def rows(self, rows: slice) -> LayerCache:
        """The cache of some of the rows."""
        return type(self)([tensor[:, rows] for tensor in self.tensors], self.places, self.flash)

    def live(self, row: int, length: int) -> list[Tensor]:
        """Views of what a step reads of a row with that many tokens."""
        return [tensor[:, row, :, :length] for tensor in self.tensors]

    def pack(self, k: Tensor, v: Tensor) -> list[Tensor]:
        """k, v [B, Hkv, T, D] in the cache's format: [2, B, Hkv, T, ...] each."""
        return [torch.stack((k, v)).to(self.kv.dtype)]

    def unpack(self, tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, T, D] of what pack made."""
        return tensors[0].to(dtype).unbind(0)

    def write(self, k: Tensor, v: Tensor, place: Tensor) -> None:
        """Put k, v [B, Hkv, T, D] to the places [B, T] of their rows."""
        row = torch.arange(len(place), device=place.device)[:, None]  # (B, 1)
        for tensor, new in zip(self.tensors, self.pack(k, v)):
            tensor[:, row, :, place] = new.movedim((1, 3), (0, 1))  # (B, T, 2, Hkv, ...)

    def read(self, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys and values at the first `end` places of every row, [B, Hkv, end, D] each."""
        return self.unpack([tensor[:, :, :, :end] for tensor in self.tensors], dtype)

    def flash_decode(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, input_pos: Tensor, **options: Any
    ) -> Tensor:
        """kernels.flash_decode: append k, v [B, Hkv, T, D] at input_pos [B], and attend. k None:
        they are there already."""
        if self.kv.dtype != q.dtype and "k_scale" not in options:  # which the kernel cannot read
            return self.decode_unpacked(q, k, v, input_pos, options)
        symbols = torch.compiler.is_compiling() and torch._dynamo.config.capture_scalar_outputs
        one_row = q.is_cpu and len(q) * q.shape[2] == 1
        if symbols and one_row and all(options[key] is None for key in options if key != "scale"):
            # our operator would call Python from the graph, which takes as long as these
            n = input_pos.item()
            torch._check(n >= 0)
            if k is not None:
                self.write(k, v, input_pos.long()[:, None])  # one write, compiled in place
            k, v, input_pos = None, None, n + 1
        elif k is None:
            input_pos = input_pos + q.shape[2]
        keys, values = self.kv.unbind(0)
        return flash_decode_unchecked(
            q, keys, values, input_pos, k, v, ring=self.places.ring, **options
        )

    def decode_unpacked(
        self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """flash_decode of keys and values that are unpacked first, on a CPU only the live ones."""
        if k is not None:
            new = torch.arange(k.shape[2], device=q.device)
            self.write(k, v, self.places.of(input_pos.long()[:, None] + new))
        input_pos = input_pos + q.shape[2]
        end = self.places.S
        if q.is_cpu and not self.places.ring and not torch.compiler.is_compiling():
            end = int(input_pos.max())
        keys, values = self.read(end, q.dtype)
        return flash_decode_unchecked(q, keys, values, input_pos, ring=self.places.ring, **options)


class Int8LayerCache(LayerCache):
    """The same in int8, with a float32 scale per token and head: scale [2, B, Hkv, S].

    k_mean [Hkv, 1, D] is subtracted from every key: that shifts all scores of a query alike, which
    softmax does not notice. (It would under a softcap or with sinks; there it has to be zeros.)"""

    def __init__(self, tensors: list[Tensor], places: Places, flash: bool):
        super().__init__(tensors[:2], places, flash)
        _, self.scale, self.k_mean = tensors

    @classmethod
    def allocate(cls, shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> list[Tensor]:
        *heads, S, D = shape
        # torch.compile copies an input, twice a step, whose address is no multiple of 16 bytes
        aligned = 4 * math.ceil(S / 4)
        scale = torch.zeros(*heads, aligned, device=device)[..., :S]
        k_mean = torch.zeros(heads[-1], 1, D, device=device)
        return [*super().allocate(shape, dtype, device), scale, k_mean]

    def rows(self, rows: slice) -> LayerCache:
        views = [tensor[:, rows] for tensor in self.tensors]
        return type(self)([*views, self.k_mean], self.places, self.flash)

    def pack(self, k: Tensor, v: Tensor) -> list[Tensor]:
        return list(quantize_kv(torch.stack((self.centred(k), v))))

    def unpack(self, tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        values, scale = tensors
        return (values * scale[..., None]).to(dtype).unbind(0)

    def flash_decode(
        self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, **options: Any
    ) -> Tensor:
        k_scale, v_scale = self.scale.unbind(0)
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        return super().flash_decode(q, self.centred(k), v, input_pos, **scales, **options)

    def centred(self, k: Tensor | None) -> Tensor | None:
        return None if k is None else (k - self.k_mean).to(k.dtype)


# the class of a cache's layers by its dtype; for any other floating-point one LayerCache
FORMATS: dict[torch.dtype, type[LayerCache]] = {torch.int8: Int8LayerCache}


class KVCache:
    """Keys and values of all layers, each in a static allocation of its own.

    attention: how decode attends: "flash", "math" or "auto". whole: the cache of each layer for all
    rows. cached: tokens of each row, as far as the host knows. makers: a function for each layer
    that makes its cache, at first on meta, to count bytes. ValueError if the device has not the
    memory."""

    windows: tuple[int | None, ...] | None = None  # of layers kept as rings: families/rings.py

    def __init__(
        self, n_layer: int, n_kv_head: int, head_dim: int, max_batch_size: int, max_seq_len: int, *,
        dtype: torch.dtype = torch.bfloat16, device: Device = "cpu",
        attention: str = "auto", makers: Sequence[MakeLayer] | None = None,
    ):
        if min(max_batch_size, max_seq_len) < 1:
            raise ValueError(f"a KV cache of {max_batch_size} x {max_seq_len} tokens holds none")
        if dtype not in FORMATS and not getattr(dtype, "is_floating_point", False):
            raise ValueError(f"a KV cache has a floating-point dtype or torch.int8, not {dtype}")
        self.max_batch_size = max_batch_size
        self.max_seq_len = max_seq_len
        self.dtype = dtype
        self.device = torch.device(device)
        self.attention = choose_attention(attention, self.device, max_seq_len, head_dim)
        self.cached = [0] * max_batch_size
        self.grows = False  # made by generate to fit one call: it may make a larger one
        makers = makers or [partial(KVCache.make_layer, heads=(n_kv_head, head_dim))] * n_layer
        self.nbytes = self.make_layers(makers, "meta")
        require_memory(
            self.nbytes, device, f"a KV cache of {max_batch_size} x {max_seq_len} tokens",
            "lower --max_seq_len or --batch_size, or take --kv_dtype int8",
        )
        self.make_layers(makers, device)
        self.views: dict[tuple[int, int], list[LayerCache]] = {}
        self.rope_tables: dict[Rope, Tensor] = {}  # for max_seq_len positions; graphs read them

    def make_layers(self, makers: Sequence[MakeLayer], device: Device) -> int:
        """Make self.whole -> its bytes. A maker may return a layer that was made before its own."""
        self.whole: list[LayerCache] = []
        for make, places in zip(makers, self.places(len(makers)), strict=True):
            self.whole.append(make(self, places, device))
        values = [x for layer in self.whole for x in vars(layer).values()]
        own = {id(x): x for x in values if isinstance(x, Tensor)}  # layers may share some
        return sum(x.untyped_storage().nbytes() for x in own.values())

    def make_layer(self, places: Places, device: Device, heads: tuple[int, int]) -> LayerCache:
        """A layer of this cache's format. heads: n_kv_head, head_dim."""
        kind = FORMATS.get(self.dtype, LayerCache)
        n_kv_head, head_dim = heads
        shape = (2, self.max_batch_size, n_kv_head, places.S, head_dim)
        return kind(kind.allocate(shape, self.dtype, device), places, self.attention == "flash")

    def places(self, n_layer: int) -> list[Places]:
        return [Places(self.max_seq_len)] * n_layer

    def layers(self, rows: slice) -> list[LayerCache]:
        """Each layer's cache of those rows, made once: the storage never moves."""
        key = (rows.start, rows.stop)
        if key not in self.views:
            self.views[key] = [layer.rows(rows) for layer in self.whole]
        return self.views[key]

    def note_written(self, rows: slice, input_pos: Tensor, n: Tensor | int) -> None:
        """Rows get n tokens, a number or [B], behind their first input_pos [B]: rings ask."""

    def refuse_lost(self, rows: slice, cached: Tensor | int) -> None:
        """ValueError where tokens behind the first `cached` ones of a row, a number or [B], would
        see some that the cache has lost: never here, where all are kept."""

    def refuse_overflow(self, cached: Sequence[int], new: int) -> None:
        """ValueError unless each row has room for new tokens behind its cached ones."""
        if min(cached) < 0 or max(cached) + new > self.max_seq_len:
            tokens = f"{max(cached)} cached and {new} new tokens"
            raise ValueError(f"{tokens} exceed the cache of {self.max_seq_len}")


def choose_attention(attention: str, device: torch.device, max_seq_len: int, head_dim: int) -> str:
    """"flash" or "math" as asked; "auto": on a CPU flash, which was measured faster there."""
    if attention not in ("auto", "flash", "math"):
        raise ValueError(f"no attention {attention!r}; there are auto, flash and math")
    on_cpu = device.type == "cpu"
    fits = on_cpu or head_dim % 8 == 0 and head_dim <= 256  # the kernel
    if attention == "flash" and not fits:
        raise ValueError(f"no kernel takes heads of {head_dim} values; give --attention math")
    if attention == "auto":
        # a guess, not measured on a GPU: math is plain PyTorch, but reads all the room each step
        math_pays = not on_cpu and (max_seq_len <= 1024 or triton is None or not fits)
        attention = "math" if math_pays else "flash"
    return attention


def require_memory(nbytes: float, device: Device, what: str, advice: str) -> None:
    """ValueError if a device has not this many bytes free, as far as that is known."""
    free = nbytes
    meminfo = Path("/proc/meminfo")
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
    elif meminfo.exists():
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1])
    if nbytes > free:
        there = f"{device} has {free / 1e9:.1f} GB free"
        raise ValueError(f"{what} needs {nbytes / 1e9:.1f} GB but {there}; {advice}")

# --- rotary position embedding ---


@dataclass(frozen=True, eq=False)
class Rope:
    """A rotary embedding: how far the pairs of a head's values turn from one token to the next."""

    theta: float
    dim: int  # how many of a head's values turn, the first ones
    kind: str  # a key of ROPES
    hf: dict = field(repr=False)  # the model's settings, with those of this kind among them

    @property
    def original_context(self) -> int:
        """The context before positions were scaled."""
        trained = positive(self.hf, "max_position_embeddings", 2048)
        return positive(self.hf, "original_max_position_embeddings", trained)


def llama3_rope(rope: Rope, inv_freq: Tensor, max_seq_len: int) -> tuple[Tensor, float]:
    """What is kept of a frequency depends on its turns over the original context."""
    low = positive(rope.hf, "low_freq_factor", kind=float)
    high = positive(rope.hf, "high_freq_factor", kind=float)
    turns = rope.original_context * inv_freq / (2 * math.pi)
    return scaled(rope, inv_freq, ((turns - low) / (high - low)).clamp(0, 1)), 1.0


def scaled(rope: Rope, inv_freq: Tensor, kept: Tensor | float) -> Tensor:
    """`kept` of each frequency stays, the rest is divided by a factor, or by one of its own."""
    factors = rope.hf.get("factors") or positive(rope.hf, "factor", kind=float)
    return inv_freq * (kept + (1 - kept) / torch.tensor(factors, dtype=torch.float64, device="cpu"))


# by the rope_type of config.json: f(rope, frequencies [D/2], max_seq_len) -> these scaled, and a
# factor on cos and sin
ROPES: dict[str, Callable[[Rope, Tensor, int], tuple[Tensor, float]]] = {
    "default": lambda rope, inv_freq, max_seq_len: (inv_freq, 1.0),
    "linear": lambda rope, inv_freq, max_seq_len: (scaled(rope, inv_freq, 0.0), 1.0),
    "llama3": llama3_rope,
}


def rope_frequencies(rope: Rope, max_seq_len: int) -> tuple[Tensor, float]:
    half = rope.dim // 2
    inv_freq = rope.theta ** -(torch.arange(half, dtype=torch.float64, device="cpu") / half)
    inv_freq, factor = ROPES[rope.kind](rope, inv_freq, max_seq_len)
    return inv_freq.float(), factor


def rope_table(rope: Rope, max_seq_len: int, device: torch.device) -> Tensor:
    """cos and sin of every position in the half-rotated layout, [S, 2, 1, D] float32, the first
    half of sin negated for apply_rope."""
    inv_freq, factor = rope_frequencies(rope, max_seq_len)
    positions = torch.arange(max_seq_len, device=device)[:, None].float()
    angles = positions * torch.cat([inv_freq, inv_freq]).to(device)  # (S, D)
    table = torch.stack((angles.cos(), angles.sin()), dim=1)[:, :, None] * factor  # (S, 2, 1, D)
    table[:, 1, :, :len(inv_freq)].neg_()
    return table


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D] in the half-rotated layout; cos, sin [B, T, 1, d] float32 of rope_table, where
    only the first d values turn."""
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat([apply_rope(x[..., :dim], cos, sin), x[..., dim:]], dim=-1)
    turned = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, turned, sin).to(x.dtype)


def make_rope(hf: dict) -> Rope:
    """The rotary embedding of settings that rope_settings unfolded."""
    head_dim = positive(hf, "head_dim", hf["hidden_size"] // hf["num_attention_heads"])
    share = positive(hf, "partial_rotary_factor", 1.0, float)
    dim = int(head_dim * share)
    if dim % 2 or dim > head_dim or not dim:
        values = f"{dim} of a head's {head_dim} values"
        raise ValueError(f"unsupported partial_rotary_factor {share}: {values}")
    kind = str(hf.get("rope_type") or hf.get("type") or "default")
    kind = {"none": "default", "su": "longrope"}.get(kind, kind)
    if entry(ROPES, kind) is None:
        raise ValueError(f"unsupported rope type {kind!r}; supported: {', '.join(ROPES)}")
    theta = positive(hf, "rope_theta", 1e4, float)
    if theta <= 1:
        raise ValueError(f"the model's configuration has rope_theta = {theta}, not above 1")
    return Rope(theta, dim, kind, hf)


def rope_settings(hf: dict) -> dict:
    """A copy with the entries of rope_scaling, or else of rope_parameters, beside all others."""
    return hf | (hf.get("rope_scaling") or hf.get("rope_parameters") or {})

# --- what a model is ---


@dataclass(frozen=True)
class ModelConfig:
    """What a model is. The names are those of the papers; from_hf reads Hugging Face's."""

    family: str  # a key of FAMILIES
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    dim: int
    ffn_dim: int
    max_seq_len: int  # the context that the model was trained for
    norm_eps: float
    act: str  # of the feed-forward's gate: a key of ACTIVATIONS
    hf: dict = field(repr=False)  # what this was made from
    windows: tuple[int | None, ...]  # per layer: tokens a query sees, itself included; None: all
    ropes: tuple[Rope | None, ...]  # per layer; layers of one kind share one; None: no positions
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # of every query and key alone
    tied: bool = False  # the output layer is the embedding
    softmax_scale: float | None = None  # None: 1 / sqrt(head_dim)
    moe: Any = None  # a MoEConfig of families/experts.py

    @classmethod
    def from_hf(cls, hf: dict) -> ModelConfig:
        """Of a config.json as a dict. ValueError names what is missing or unsupported."""
        name, family = family_of(hf)
        known = {k: v for k, v in hf.items() if k not in OPTIONAL or k in family.defaults}
        hf = family.defaults | known
        n_layer = positive(hf, "num_hidden_layers")
        n_head = positive(hf, "num_attention_heads")
        dim = positive(hf, "hidden_size")
        bias = bool(hf.get("attention_bias"))
        settings: dict[str, Any] = dict(
            family=name,
            vocab_size=positive(hf, "vocab_size"),
            n_layer=n_layer,
            n_head=n_head,
            n_kv_head=positive(hf, "num_key_value_heads", n_head),
            head_dim=positive(hf, "head_dim", dim // n_head),
            dim=dim,
            ffn_dim=lambda hf: positive(hf, "intermediate_size"),
            max_seq_len=positive(hf, "max_position_embeddings", hf.get("model_max_length")),
            norm_eps=positive(hf, "rms_norm_eps", 1e-6, float),
            act=hf.get("hidden_activation") or hf.get("hidden_act") or "silu",
            hf=hf,
            windows=windows_of,
            ropes=lambda hf: (make_rope(rope_settings(hf)),) * n_layer,
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=bool(hf.get("mlp_bias")),
            tied=bool(hf.get("tie_word_embeddings")),
        )
        for key, value in (settings | family.fields).items():
            settings[key] = value(hf) if callable(value) else value
        ropes = set(settings["ropes"]) - {None}
        if len(ropes) == 1:  # some files give the context before scaling; where layers differ, none
            [rope] = ropes
            scaled_context = int(rope.original_context * positive(rope.hf, "factor", 1.0, float))
            settings["max_seq_len"] = max(settings["max_seq_len"], scaled_context)
        config = cls(**settings)
        config.check()
        return config

    def check(self) -> None:
        """ValueError if settings do not go together."""
        if self.act not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise ValueError(f"unsupported hidden_act {self.act!r}; supported: {names}")
        if self.n_head % self.n_kv_head:
            heads = f"{self.n_head} query heads do not divide into {self.n_kv_head}"
            raise ValueError(f"{heads} key/value heads")
        for rope in filter(None, dict.fromkeys(self.ropes)):
            for room in (1, self.max_seq_len):  # some kinds have other frequencies for each
                rope_frequencies(rope, room)


def windows_of(hf: dict) -> tuple[int | None, ...]:
    """How many tokens each layer's queries see: all (None) here; families/ knows windows."""
    n_layer = positive(hf, "num_hidden_layers")
    has_windows = hf.get("sliding_window") and hf.get("use_sliding_window", True)
    if has_windows or hf.get("layer_types") not in (None, ["full_attention"] * n_layer):
        return extension("families").windows_of(hf)
    return (None,) * n_layer


def positive(hf: dict, key: str, default: Any = None, kind: type = int) -> Any:
    """A setting, which is to be a number above 0 of that kind; or ValueError."""
    value = default if hf.get(key) is None else hf[key]
    if not is_number(value, kind) or not value > 0:
        what = f"{key} = {value!r}, not a positive {kind.__name__}"
        raise ValueError(f"the model's configuration has {what}")
    return kind(value)


def is_number(value: Any, kind: type = float) -> bool:
    return isinstance(value, (int, kind)) and not isinstance(value, bool)

# --- families ---


@dataclass(frozen=True)
class Family:
    """How a family of models differs from Llama."""

    defaults: dict[str, Any] = field(default_factory=dict)  # of config.json's keys; see OPTIONAL
    # fields of ModelConfig, whatever config.json says: values, or functions of its entries
    fields: dict[str, Any] = field(default_factory=dict)
    norm: type[nn.Module] = nn.RMSNorm  # called with (size, eps)
    attention: Callable[[ModelConfig, int], nn.Module] = Attention  # of (config, layer number)
    mlp: Callable[[ModelConfig, int], nn.Module] = MLP
    block: Callable[[ModelConfig, int], nn.Module] = Block
    model: type[Transformer] = Transformer  # called with (config)
    # names of our modules in checkpoints, where they differ; several: ours is these, joined
    stored_as: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # of (config, our parameter's name) -> a function for the tensor that was read, or None
    convert: Callable[[ModelConfig, str], Callable[[Tensor], Tensor] | None] = lambda *_: None
    gguf: dict[str, Any] | None = None  # what formats/architectures.py is to know of GGUF files


# Settings that only some families read. Files may have those of others: one counts only where the
# family has a default for it.
OPTIONAL = {
    "attention_bias", "mlp_bias", "hidden_activation", "sliding_window", "use_sliding_window",
    "layer_types", "no_rope_layers", "no_rope_layer_interval", "rope_local_base_freq",
    "attn_logit_softcapping", "final_logit_softcapping", "norm_topk_prob", "decoder_sparse_step",
    "mlp_only_layers", "shared_expert_intermediate_size", "max_window_layers",
}
LLAMA = dict(attention_bias=False, mlp_bias=False, max_position_embeddings=2048)
MISTRAL = dict(num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
QWEN2 = dict(num_key_value_heads=32, max_position_embeddings=32768, use_sliding_window=False,
             sliding_window=4096, max_window_layers=28, layer_types=None)
# By the model_type of config.json; families/ has the others.
FAMILIES: dict[str, Family] = {
    "llama": Family(LLAMA),
    "mistral": Family(MISTRAL),
    "qwen2": Family(QWEN2, {"qkv_bias": True}),
    "qwen3": Family(QWEN2 | {"head_dim": 128, "attention_bias": False}, {"qk_norm": True}),
}


def entry(table: dict[str, Any], key: str) -> Any | None:
    """A row of FAMILIES or ROPES, to which families/ adds its own; None: nobody knows it."""
    if key not in table:
        extension("families")
    return table.get(key)


def family_of(hf: dict) -> tuple[str, Family]:
    """The family of a configuration; ValueError if it has none."""
    name = hf.get("model_type")
    architectures = hf.get("architectures") or []
    causal = all(str(each).endswith("ForCausalLM") for each in architectures)
    family = entry(FAMILIES, name) if causal else None
    if family is None:
        which = f"architecture {(architectures or [name])[0]!r} (model_type {name!r})"
        raise ValueError(f"unsupported {which}; supported model types: {', '.join(FAMILIES)}")
    return name, family

# --- loading ---


@torch.inference_mode(False)
@torch.no_grad()
def load_model(
    path: str | Path | Checkpoint | None = None, *, device: Device = "cpu",
    dtype: torch.dtype | None = None, quantize: str | None = "auto", group_size: int = 32,
    adapter: str | Path | None = None, calibrate: Sequence[int] | None = None,
) -> Transformer:
    """Load a checkpoint: a Hugging Face folder or hub id, a .gguf file, a folder of save_quantized
    or, for benchmarks, a bare config.json, which gives random weights. None: the default model.

    quantize: "int8" or "int4" (in groups of group_size), layer by layer while loading; "auto": as
    the file is, so that the integers of a GGUF file stay what they are; "none": dequantized. dtype
    None: bfloat16, on a CPU float32 where the integers of a file stay. adapter: a folder with a
    LoRA of PEFT's, which is added to the weights before they are quantized. calibrate: token ids of
    a text on which "int8" and "int4" are calibrated. ValueError says what is wrong."""
    check_target(device, dtype, quantize)
    checkpoint = open_checkpoint(path, device)
    if adapter is not None:
        extension("formats.adapters").adapt(checkpoint, adapter)
    model, by_text = checkpoint.empty_model(), None
    if calibrate is not None:
        make = extension("calibration").Calibration
        by_text = make(model, calibrate, quantize, group_size)
    return fill_model(model, checkpoint, device, dtype, quantize, group_size, by_text)


def check_target(device: Device, dtype: torch.dtype | None, quantize: str | None) -> None:
    """ValueError for a device that does not work, and for an unknown dtype or quantize."""
    try:
        torch.empty(1, device=device).tolist()
    except Exception as e:  # of many kinds, from PyTorch and from what it would import
        raise ValueError(f"no model can be on device {device}: {first_line(e)}") from None
    if dtype not in (None, *WEIGHT_DTYPES):
        raise ValueError(f"no model can have the dtype {dtype}; there are {DTYPE_NAMES}")
    if quantize not in (None, "none", "auto", *MODES):
        raise ValueError(f"no quantize {quantize!r}; there are auto, none, {', '.join(MODES)}")
    use_products(torch.device(device))


def use_products(device: torch.device) -> None:
    """Import what a device multiplies faster with: it adds to quantize.LAYOUTS."""
    folder = {"cpu": "cpu", "cuda": "products"}.get(device.type)
    if folder is not None:
        extension(folder, required=False)


HEAD = "lm_head.weight"  # the embedding's, where a model is tied


def fill_model(
    model: Transformer, checkpoint: Checkpoint, device: Device,
    dtype: torch.dtype | None, quantize: str | None, group_size: int, by_text: Any = None,
) -> Transformer:
    """Read a model on meta onto a device, layer by layer, and quantize what is to be. by_text: a
    Calibration, which runs its text through each block before that is quantized."""
    model.to(dtype or checkpoint.default_dtype(quantize, torch.device(device))).eval()
    fill_layers = checkpoint.put_layers(model, quantize, device)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    each = {"int8": 1, "int4": 0.6}.get(quantize)  # bytes of a weight, with its share of a scale
    if model.config.tied and each is None:
        tensors.pop(HEAD, None)
    nbytes = sum(x.numel() * (each or x.itemsize) for x in tensors.values())
    advice = "take a smaller model, or --quantize"
    require_memory(nbytes, device, f"loading {checkpoint.path}", advice)
    fill_layers()
    names = [name for name, _ in model.named_modules()]
    names.sort(key=lambda name: (name == "lm_head", name.startswith("layers.")))
    for prefix in quantization.progress(names, "loading"):
        module = model.get_submodule(prefix)  # a list of modules would keep the dense ones
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, x in own:
            if not x.is_meta and not checkpoint.has(model, f"{prefix}.{key}", x):
                here = x.device.type == torch.device(device).type
                tensor = x if here else x.to(device)  # a value of its own
            elif model.config.tied and isinstance(module, Linear) and f"{prefix}.{key}" == HEAD:
                module.shared, tensor = True, model.embed_tokens.weight
            else:
                tensor = checkpoint.parameter(model, f"{prefix}.{key}", x, device)
            if isinstance(x, nn.Parameter) and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            setattr(module, key, tensor)
        if by_text is not None and by_text.takes(prefix, module):
            continue
        if isinstance(module, Linear) and quantize in MODES:
            module = quantize_linear(module, quantize, group_size, prefix)
            model.set_submodule(prefix, module)
        if hasattr(module, "pack"):
            module.pack()
    for module in model.modules():
        if hasattr(module, "stack"):  # of experts
            module.stack()
    model.lm_head.is_head = True
    return model


# our joined products, and the layers of Hugging Face that each consists of
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def sources(model: Transformer, name: str, x: Tensor) -> dict[str, tuple[int, ...]]:
    """The Hugging Face tensors that our parameter x joins, and their shapes. Our names are theirs
    but for joined products, and the number of an expert, which ours have last."""
    config = model.config
    if not name.startswith("lm_head."):
        name = "model." + re.sub(r"experts\.(\w+)\.(\d+)", r"experts.\2.\1", name)
    stored_as = JOINED | FAMILIES[config.family].stored_as
    path, module, kind = ["", *name.rsplit(".", 2)][-3:]
    path = ".".join(stored_as.get(part, (part,))[0] for part in path.split("."))
    parts = stored_as.get(module, (module,))
    rows = joined_rows(module, len(x), config) if len(parts) > 1 else [len(x)]
    if len(parts) > 1 and module != "gate_up_proj":  # some layers have other parts than most
        layer = model.get_submodule(path.removeprefix("model."))
        rows = getattr(layer, "rows", {}).get(module, rows)
    names = [f"{path}.{part}.{kind}".removeprefix(".") for part in parts]
    return {part: (n, *x.shape[1:]) for part, n in zip(names, rows)}


def joined_rows(module: str, n_rows: int, config: ModelConfig) -> list[int]:
    """How many rows of a joined product belong to each of its layers."""
    if module == "gate_up_proj":
        return [n_rows // 2] * 2
    kv_size = config.n_kv_head * config.head_dim
    return [n_rows - 2 * kv_size, kv_size, kv_size]


WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPE_NAMES = ", ".join(map(str, WEIGHT_DTYPES))


@dataclass
class Checkpoint:
    """A configuration and named tensors of a folder with safetensors. Those of formats/ are
    subclasses, which check more, and hold the integers of other files as they are."""

    path: Path
    config: dict  # as in Hugging Face's config.json
    tensors: dict[str, Any] = field(repr=False)  # by the file's own names
    put_layer = staticmethod(quantization.put_layer)  # puts an empty quantized one into a model
    cut = staticmethod(lambda name, tensors, shape: tensors)  # parallel/ has one that cuts

    @classmethod
    def from_folder(cls, folder: Path) -> Checkpoint:
        file = folder / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            tensors = {}
            parts = sorted(folder.glob("model-*-of-*.safetensors"))
            for file in list(folder.glob("model.safetensors")) or parts:
                tensors |= load_file(file)
        except Exception as e:  # of JSON, safetensors and the file system
            raise ValueError(f"cannot read {file}: {first_line(e)}") from None
        return cls(folder, config, tensors)

    def empty_model(self) -> Transformer:
        """The model on meta. Not so its configuration: torch.arange there loads torch.compile."""
        config = ModelConfig.from_hf(self.config)
        with torch.device("meta"):
            return FAMILIES[config.family].model(config)

    def default_dtype(self, quantize: str | None, device: torch.device) -> torch.dtype:
        return torch.bfloat16

    def put_layers(
        self, model: Transformer, quantize: str | None, device: Device
    ) -> Callable[[], None]:
        """Put empty layers where the file has integers -> a function that fills those of them which
        are not read by name."""
        if quantized_layout(model, self.config, self.put_layer) and quantize in MODES:
            raise ValueError(f"{self.path} is quantized already; leave out --quantize {quantize}")
        return lambda: None

    def parts(self, model: Transformer, name: str, x: Tensor) -> dict[str, tuple[int, ...]]:
        """What our parameter x is read from; a folder that save_quantized wrote has our names."""
        return {name: tuple(x.shape)} if "gpt_flash" in self.config else sources(model, name, x)

    def has(self, model: Transformer, name: str, x: Tensor) -> bool:
        """Whether the file has a tensor for a parameter that has a value of its own."""
        return all(part in self.tensors for part in self.parts(model, name, x))

    def parameter(
        self, model: Transformer, name: str, x: Tensor, device: Device = "cpu"
    ) -> Tensor:
        """What our parameter x is, in its dtype, on a device, in memory of its own."""
        tensors = [self.read(*part) for part in self.parts(model, name, x).items()]
        tensors = self.cut(name, tensors, tuple(x.shape))
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        del tensors
        convert = FAMILIES[model.config.family].convert(model.config, name)
        if convert is not None and "gpt_flash" not in self.config:
            tensor = convert(tensor)
        storage = tensor.untyped_storage()  # which may hold other tensors, or be a mapped file
        owned = storage.resizable() and storage.nbytes() == tensor.nbytes
        return tensor.to(device, x.dtype, copy=not owned).detach()

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that Hugging Face name in the dtype of the file. ValueError if there is
        none, or one of another shape."""
        if name not in self.tensors:
            raise ValueError(f"{self.path} has no tensor {name}")
        return self.checked(name, self.tensors[name], shape)

    def checked(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}, expected {shape}")
        ours = "gpt_flash" in self.config and tensor.dtype in (torch.int8, torch.uint8)
        if tensor.dtype not in WEIGHT_DTYPES and not ours:
            raise ValueError(f"tensor {name} has dtype {tensor.dtype}, not one of {DTYPE_NAMES}")
        return tensor


def open_checkpoint(path: str | Path | Checkpoint | None, device: Device = "cpu") -> Checkpoint:
    """A checkpoint of any form; an open one is itself. ValueError says what is missing or cannot be
    read."""
    if isinstance(path, Checkpoint):
        return path
    folder = Path(path or "")
    here = path is not None and os.path.exists(folder / "config.json")
    plain = here and any(folder.glob("model*.safetensors"))
    formats = extension("formats", required=not plain)
    return formats.open_checkpoint(path, device) if formats else Checkpoint.from_folder(folder)


def first_line(e: BaseException) -> str:
    """What an exception says, in one line of at most 400 characters."""
    line, *_ = str(e).strip().splitlines() or [type(e).__name__]
    if isinstance(e, KeyError):
        line = f"there is no {line}"
    elif isinstance(e, (AttributeError, IndexError, TypeError)):
        line = f"{type(e).__name__}: {line}"
    return line[:400]
