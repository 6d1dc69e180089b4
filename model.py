"""The model: configuration, a static KV cache, a Llama-family transformer, loading checkpoints.

A step of decode goes through Transformer.decode, Block.forward, Attention.forward and attend, and
ends in the cache: LayerCache.flash_decode appends the new keys and values and attends to what is
there."""
from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from formats.blocks import Blocks
from formats.checkpoint import (
    WEIGHT_DTYPES, Checkpoint, first_line, nonsense_refused, open_checkpoint, resolve,
)
from kernels import flash_decode, quantize_kv, triton
from quantize import (
    MODES, Int4Linear, Linear, put_layer, quantize_linear, quantized_layout, rows_at_once, say_once,
)

MAX_DECODE_TOKENS = 16  # queries per row that one decode attention call takes

# --- configuration ---


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
    rope_theta: float
    windows: tuple[int | None, ...]  # per layer: tokens a query sees, itself included; None: all
    hf: dict = field(repr=False)  # what this was made from, rope's settings unfolded into it
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False  # the output layer is the embedding

    @classmethod
    def from_hf(cls, hf: dict) -> ModelConfig:
        """A Hugging Face config.json as a dict -> ModelConfig.

        ValueError names what is missing or unsupported."""
        family = family_of(hf)
        hf = unfold_rope_settings(hf)
        refuse_unsupported(hf)
        n_head = positive(hf, "num_attention_heads")
        dim = positive(hf, "hidden_size")
        bias = bool(hf.get("attention_bias"))
        settings = dict(
            family=family,
            vocab_size=positive(hf, "vocab_size"),
            n_layer=positive(hf, "num_hidden_layers"),
            n_head=n_head,
            n_kv_head=positive(hf, "num_key_value_heads", n_head),
            head_dim=positive(hf, "head_dim", dim // n_head),
            dim=dim,
            ffn_dim=positive(hf, "intermediate_size"),
            max_seq_len=positive(hf, "max_position_embeddings", 2048),
            norm_eps=positive(hf, "rms_norm_eps", 1e-6, float),
            rope_theta=positive(hf, "rope_theta", 1e4, float),
            windows=layer_windows(hf, FAMILIES[family]),
            hf=hf,
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=bool(hf.get("mlp_bias")),
            tied=bool(hf.get("tie_word_embeddings")),
        )
        config = cls(**(settings | FAMILIES[family].fields))
        config.check()
        return config

    def check(self) -> None:
        """ValueError if heads do not divide, or rope is of a kind that is not known."""
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"{self.n_head} query heads do not divide into {self.n_kv_head} key/value heads"
            )
        if self.head_dim % 8 or self.head_dim > 256:
            raise ValueError(f"head_dim {self.head_dim} is not a multiple of 8 up to 256")
        rope_frequencies(self)


# Settings that would go wrong if ignored, with the value that is supported.
FIXED = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1,
    "num_experts": 0,
    "num_local_experts": 0,
    "quantization_config": {},
    "mscale_all_dim": 0,
    "truncate": True,
}


def family_of(hf: dict) -> str:
    """The key of FAMILIES that a configuration belongs to; ValueError if there is none."""
    family = hf.get("model_type")
    architectures = hf.get("architectures") or []
    causal = all(str(name).endswith("ForCausalLM") for name in architectures)
    if family not in FAMILIES or not causal:
        architecture = (architectures or [family])[0]
        raise ValueError(
            f"unsupported architecture {architecture!r} (model_type {family!r}); "
            f"supported model types: {', '.join(FAMILIES)}"
        )
    return family


def unfold_rope_settings(hf: dict) -> dict:
    """A copy with the entries of rope_scaling and rope_parameters beside all others.

    transformers 5 writes the latter, with rope_theta in it; older files have rope_scaling."""
    hf = dict(hf)
    for key in ("rope_scaling", "rope_parameters"):
        settings = hf.get(key) or {}
        if not isinstance(settings, dict):
            raise ValueError(
                f"the model's configuration has {key} = {settings!r}; it must be an object"
            )
        hf.update(settings)
    return hf


def refuse_unsupported(hf: dict) -> None:
    for key, supported in FIXED.items():
        if hf.get(key) not in (None, supported):
            raise ValueError(f"unsupported {key} {hf[key]!r}: only {supported!r} is supported")


def layer_windows(hf: dict, family: Family) -> tuple[int | None, ...]:
    """How many tokens a query of each layer sees, None for all of them."""
    n_layer = positive(hf, "num_hidden_layers")
    if not hf.get("sliding_window") or not hf.get("use_sliding_window", family.window_by_default):
        return (None,) * n_layer
    window = positive(hf, "sliding_window")
    kinds = hf.get("layer_types")
    if not kinds:
        n_full = hf.get("max_window_layers") or 0
        kinds = ["full_attention"] * n_full + ["sliding_attention"] * (n_layer - n_full)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds[:n_layer])


def positive(hf: dict, key: str, default: Any = None, kind: type = int) -> Any:
    """A setting as a number above 0 of that kind; ValueError if it is anything else."""
    value = hf.get(key)
    if value is None:
        value = default
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not is_number or not value > 0:
        raise ValueError(
            f"the model's configuration has {key} = {value!r}, not a positive {kind.__name__}"
        )
    return kind(value)

# --- rotary position embedding ---


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """-> inv_freq [D/2] float32, and the factor on cos and sin, for every rope type supported.

    Each type keeps a part of a frequency as it is and divides the rest by a factor, or by one
    factor per frequency. After transformers' modeling_rope_utils: linear (position
    interpolation), llama3, yarn (arXiv 2309.00071)."""
    hf = config.hf
    half = config.head_dim // 2
    exponents = torch.arange(half, dtype=torch.float64) / half
    inv_freq = config.rope_theta ** -exponents  # (D/2)
    kind = hf.get("rope_type") or hf.get("type") or "default"
    if kind in ("default", "none"):
        return inv_freq.float(), 1.0
    if kind not in ("linear", "llama3", "yarn"):
        supported = "default, linear, llama3, yarn"
        raise ValueError(f"unsupported rope type {kind!r}; supported: {supported}")

    original = positive(hf, "original_max_position_embeddings", config.max_seq_len)
    factors = hf.get("factors") or positive(hf, "factor", kind=float)
    factor = torch.tensor(factors, dtype=torch.float64)
    keep = torch.zeros(())
    attention_factor = 1.0
    if kind == "llama3":
        keep = llama3_share(hf, inv_freq, original)
    elif kind == "yarn":
        keep = yarn_share(hf, config, original)
        longer = 0.1 * math.log(max(factor, 1)) + 1
        attention_factor = positive(hf, "attention_factor", longer, float)
    return (inv_freq * (keep + (1 - keep) / factor)).float(), attention_factor


def llama3_share(hf: dict, inv_freq: Tensor, original: int) -> Tensor:
    """How much of each frequency llama3 keeps, [D/2]: by its turns over the original context."""
    low = positive(hf, "low_freq_factor", kind=float)
    high = positive(hf, "high_freq_factor", kind=float)
    turns = original * inv_freq / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def yarn_share(hf: dict, config: ModelConfig, original: int) -> Tensor:
    """How much of each frequency yarn keeps, [D/2]: a ramp between the dimensions that turn
    beta_fast and beta_slow times over the original context."""
    half = config.head_dim // 2

    def dimension(beta: float) -> float:
        return half * math.log(original / (2 * math.pi * beta), config.rope_theta)

    low = max(math.floor(dimension(positive(hf, "beta_fast", 32, float))), 0)
    high = math.ceil(dimension(positive(hf, "beta_slow", 1, float)))
    high = min(high, config.head_dim - 1)
    ramp = (torch.arange(half) - low) / max(high - low, 0.001)
    return 1 - ramp.clamp(0, 1)


def rope_table(config: ModelConfig, max_seq_len: int, device: torch.device) -> Tensor:
    """cos and sin of every position in the half-rotated layout, [S, 2, 1, D] float32.

    The first half of sin is negated, so that apply_rope needs no negation."""
    inv_freq, factor = rope_frequencies(config)
    positions = torch.arange(max_seq_len, device=device)[:, None].float()
    angles = positions * torch.cat([inv_freq, inv_freq]).to(device)  # (S, D)
    cos = angles.cos() * factor
    sin = angles.sin() * factor
    sin[:, :len(inv_freq)].neg_()
    return torch.stack((cos, sin), dim=1)[:, :, None]  # (S, 2, 1, D)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D] in the half-rotated layout; cos, sin [B, T, 1, D] float32 of rope_table."""
    turned = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, turned, sin).to(x.dtype)

# --- the static KV cache ---


class Positions(NamedTuple):
    """What a layer needs to know of where its tokens stand."""

    input_pos: Tensor  # [B] int32: tokens of each row that are cached already
    index: Tensor  # [B, T] int64: the position of each new token
    cos: Tensor  # [B, T, 1, D] float32
    sin: Tensor  # [B, T, 1, D] float32
    start: int | None  # prefill: the largest input_pos; decode: None, as no length is on the host


class LayerCache:
    """The keys and values of one layer for some rows: views into a KVCache.

    kv [2, B, Hkv, S, D]. Both come out of one tensor, since torch.compile would copy two inputs
    that share memory. A subclass with another format has the same three methods."""

    def __init__(self, kv: Tensor, flash: bool):
        self.kv = kv
        self.flash = flash  # how decode attends: flash_decode, or SDPA over the whole cache

    def write(self, k: Tensor, v: Tensor, index: Tensor) -> None:
        """Put k, v [B, Hkv, T, D] to the positions index [B, T] of their rows."""
        new = torch.stack((k, v))  # (2, B, Hkv, T, D)
        self.kv[:, row_numbers(index), :, index] = new.permute(1, 3, 0, 2, 4)  # (B, T, 2, Hkv, D)

    def read(self, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The first `end` keys and values of every row, [B, Hkv, end, D] each."""
        keys, values = self.kv[:, :, :, :end].unbind(0)
        return keys, values

    def flash_decode(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, input_pos: Tensor, **options: Any
    ) -> Tensor:
        """Append k, v [B, Hkv, T, D] at input_pos [B] and attend with q [B, Hq, T, D].

        kernels.flash_decode says what the options are, and what a call without k and v is."""
        keys, values = self.kv.unbind(0)
        return flash_decode(q, keys, values, input_pos, k, v, **options)


class Int8LayerCache(LayerCache):
    """The same in int8, with a float32 scale per token and head: scale [2, B, Hkv, S].

    k_mean [Hkv, 1, D] is subtracted from every key: that shifts all scores of a query alike, which
    softmax does not notice. (It would under a softcap or with sinks; there it has to be zeros.)"""

    def __init__(self, kv: Tensor, scale: Tensor, k_mean: Tensor, flash: bool):
        super().__init__(kv, flash)
        self.scale = scale
        self.k_mean = k_mean

    def write(self, k: Tensor, v: Tensor, index: Tensor) -> None:
        new = torch.stack((self.centred(k), v))  # (2, B, Hkv, T, D)
        values, scale = quantize_kv(new)
        row = row_numbers(index)
        self.kv[:, row, :, index] = values.permute(1, 3, 0, 2, 4)  # (B, T, 2, Hkv, D)
        self.scale[:, row, :, index] = scale.permute(1, 3, 0, 2)  # (B, T, 2, Hkv)

    def read(self, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        kv = self.kv[:, :, :, :end] * self.scale[:, :, :, :end, None]
        keys, values = kv.to(dtype).unbind(0)
        return keys, values

    def flash_decode(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, input_pos: Tensor, **options: Any
    ) -> Tensor:
        keys, values = self.kv.unbind(0)
        k_scale, v_scale = self.scale.unbind(0)
        if k is not None:
            k = self.centred(k)
        return flash_decode(
            q, keys, values, input_pos, k, v, k_scale=k_scale, v_scale=v_scale, **options
        )

    def centred(self, k: Tensor) -> Tensor:
        return (k - self.k_mean).to(k.dtype)


def row_numbers(index: Tensor) -> Tensor:
    return torch.arange(len(index), device=index.device)[:, None]  # (B, 1)


class KVCache:
    """Keys and values of all layers in one static, left-aligned allocation.

    kv [n_layer, 2, B, Hkv, S, D]; of an int8 cache also scale [n_layer, 2, B, Hkv, S] float32,
    whose heads each start at 16 bytes, and k_mean [n_layer, Hkv, 1, D] float32. attention says how
    decode attends: "flash", "math" or "auto". nbytes: of what is allocated for every token.
    It takes plain numbers, so that a program without a ModelConfig can use it.
    ValueError if the device has not the memory."""

    def __init__(
        self, n_layer: int, n_kv_head: int, head_dim: int, max_batch_size: int, max_seq_len: int, *,
        dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu",
        attention: str = "auto",
    ):
        if min(max_batch_size, max_seq_len) < 1:
            raise ValueError(f"a KV cache of {max_batch_size} x {max_seq_len} tokens holds none")
        if dtype != torch.int8 and not getattr(dtype, "is_floating_point", False):
            raise ValueError(f"a KV cache has a floating-point dtype or torch.int8, not {dtype}")
        self.max_batch_size = max_batch_size
        self.max_seq_len = max_seq_len
        self.dtype = dtype
        self.attention = choose_attention(attention, torch.device(device), max_seq_len)
        self.may_grow = False  # made to fit one call of generate, which may make a larger one

        heads = (n_layer, 2, max_batch_size, n_kv_head)
        aligned = 4 * math.ceil(max_seq_len / 4)  # scales of a head that fill whole 16 bytes
        self.nbytes = math.prod(heads) * max_seq_len * head_dim * dtype.itemsize
        if dtype == torch.int8:
            self.nbytes += math.prod(heads) * aligned * torch.float32.itemsize
        require_memory(
            self.nbytes, device, f"a KV cache of {max_batch_size} x {max_seq_len} tokens",
            "lower --max_seq_len or --batch_size, or take --kv_dtype int8",
        )
        self.kv = torch.zeros(*heads, max_seq_len, head_dim, dtype=dtype, device=device)
        self.scale, self.k_mean = None, None
        if dtype == torch.int8:
            # torch.compile copies an input that does not start at 16 bytes, to and back, each step
            self.scale = torch.zeros(*heads, aligned, device=device)[..., :max_seq_len]
            self.k_mean = torch.zeros(n_layer, n_kv_head, 1, head_dim, device=device)
        self.views: dict[tuple[int, int], list[LayerCache]] = {}
        self.held = [0] * max_batch_size  # tokens of each row, as far as the host knows

    def layers(self, rows: slice) -> list[LayerCache]:
        """Each layer's cache of those rows, made once: the storage never moves."""
        key = (rows.start, rows.stop)
        if key not in self.views:
            self.views[key] = list(self.make_layers(rows))
        return self.views[key]

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Give a row what another one holds in its first `length` positions."""
        for tensor in (self.kv, self.scale):
            if tensor is not None:
                tensor[:, :, target, :, :length] = tensor[:, :, source, :, :length]
        self.held[target] = length

    def make_layers(self, rows: slice) -> Iterator[LayerCache]:
        flash = self.attention == "flash"
        for layer, kv in enumerate(self.kv[:, :, rows]):  # (2, B, Hkv, S, D)
            if self.scale is None:
                yield LayerCache(kv, flash)
            else:
                yield Int8LayerCache(kv, self.scale[layer, :, rows], self.k_mean[layer], flash)


def choose_attention(attention: str, device: torch.device, max_seq_len: int) -> str:
    """"flash" or "math" as asked; "auto" takes what works on the device, and on a CPU what was
    measured faster there at any size of cache: flash, which reads live tokens only."""
    if attention not in ("auto", "flash", "math"):
        raise ValueError(f"no attention {attention!r}; there are auto, flash and math")
    if attention != "auto":
        return attention
    if device.type == "cpu":
        return "flash"
    # a guess, not measured on a GPU: math is plain PyTorch, but reads all the room each step
    small = max_seq_len <= 1024
    return "math" if small or triton is None else "flash"


def require_memory(nbytes: float, device: torch.device | str, what: str, advice: str) -> None:
    """ValueError if a device has not this many bytes free, as far as that is known."""
    free = nbytes
    meminfo = Path("/proc/meminfo")
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
    elif meminfo.exists():
        available = re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())
        free = 1024 * int(available[1])
    if nbytes > free:
        raise ValueError(
            f"{what} needs {nbytes / 1e9:.1f} GB but {device} has {free / 1e9:.1f} GB free; "
            f"{advice}"
        )

# --- the transformer ---


class Attention(nn.Module):
    """Grouped-query attention over the cache; query, key and value projections are one product."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.head_dim = config.head_dim
        self.window = config.windows[layer]
        n_heads = self.n_head + 2 * self.n_kv_head
        self.qkv_proj = Linear(config.dim, n_heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(self.n_head * self.head_dim, config.dim, bias=config.o_bias)
        self.q_norm, self.k_norm = None, None
        if config.qk_norm:
            norm = FAMILIES[config.family].norm
            self.q_norm = norm(self.head_dim, config.norm_eps)
            self.k_norm = norm(self.head_dim, config.norm_eps)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        B, T, _ = x.shape
        heads = [self.n_head, self.n_kv_head]
        qkv = self.qkv_proj(x).view(B, T, -1, self.head_dim)  # (B, T, Hq + 2 Hkv, D)
        qk, v = qkv.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=2)
        if self.q_norm is not None:
            q, k = qk.split(heads, dim=2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        qk = apply_rope(qk, positions.cos, positions.sin)
        q, k = qk.transpose(1, 2).split(heads, dim=1)  # (B, Hq, T, D), (B, Hkv, T, D)
        y = self.attend(q, k, v.transpose(1, 2), positions, cache)  # (B, Hq, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Positions, cache: LayerCache
    ) -> Tensor:
        """Put k, v [B, Hkv, T, D] into the cache; q [B, Hq, T, D] attends to them and to all
        that is before them."""
        T = q.shape[2]
        start = positions.start
        if start is None and cache.flash:  # decode; cost follows the live length
            return cache.flash_decode(q, k, v, positions.input_pos, window=self.window)

        cache.write(k, v, positions.index)
        if start is None:  # decode by math reads the whole cache
            keys, values = cache.read(cache.kv.shape[3], q.dtype)
            mask = visible(positions.index, keys.shape[2], self.window)
            with sdpa_kernel(SDPBackend.MATH):
                return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)

        keys, values = k, v  # a prompt from its beginning needs nothing of the cache
        if start > 0:
            keys, values = cache.read(start + T, q.dtype)
        attention = prefill_attention
        if torch.compiler.is_compiling():  # how many tiles there are depends on the prompt
            attention = torch.ops.gpt_flash.prefill_attention
        return attention(q, keys, values, positions.index, self.window)


# --- attention of prefill ---

QUERY_TILE = 512  # queries that attend together: their keys end with the last of them
MAX_SCORES = 2**27  # that they may have: 537 MB in float32


def prefill_attention(
    q: Tensor, keys: Tensor, values: Tensor, index: Tensor, window: int | None
) -> Tensor:
    """Causal attention of q [B, Hq, T, D], at positions index [B, T], to keys and values
    [B, Hkv, S, D] -> [B, Hq, T, D]. The furthest query stands at S-1.

    The scores of all queries are never in memory, whatever backend PyTorch takes. Its flash
    kernels need no mask for a prompt from its beginning. Everything else has a mask, which they
    refuse on a GPU; there the memory-efficient ones refuse fewer key than query heads
    (ATen/native/transformers/cuda/sdp_utils.cpp), and what is left makes all scores. So query
    heads ride along as queries of their KV head, in tiles of at most MAX_SCORES scores, but of a
    query a row at least, whose scores are smaller than the cache."""
    B, Hq, T, D = q.shape
    Hkv, S = keys.shape[1:3]
    from_beginning = S == T and (window is None or T <= window)
    if from_beginning and flash_takes(q, keys, values):
        y = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).contiguous().transpose(1, 2)

    tile = min(QUERY_TILE, max(1, MAX_SCORES // (B * Hq * S)))
    y = q.new_empty(B, T, Hq, D)
    for first in range(0, T, tile):
        last = min(first + tile, T)
        end = S - T + last
        folded = q[:, :, first:last].reshape(B, Hkv, -1, D)  # (B, Hkv, Hq / Hkv * tile, D)
        mask = visible(index[:, first:last], end, window).repeat(1, 1, Hq // Hkv, 1)
        part = F.scaled_dot_product_attention(folded, keys[:, :, :end], values[:, :, :end], mask)
        part = part.reshape(B, Hq, -1, D)  # no view on a GPU, where tokens lie before heads
        y[:, first:last] = part.transpose(1, 2)  # (B, tile, Hq, D)
    return y.transpose(1, 2)


def flash_takes(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether causal attention runs in a flash kernel of PyTorch."""
    if q.device.type == "cpu":
        return torch.backends.cuda.flash_sdp_enabled()  # the switch is the CPU's too
    parameters = SDPAParams(q, keys, values, None, 0.0, True, True)
    return torch.backends.cuda.can_use_flash_attention(parameters)


def visible(index: Tensor, end: int, window: int | None) -> Tensor:
    """Which of `end` keys the queries at positions index [B, T] see: [B, 1, T, end] bool."""
    query_pos = index[:, None, :, None]
    key_pos = torch.arange(end, device=index.device)
    seen = key_pos <= query_pos
    if window is not None:
        seen = seen & (key_pos > query_pos - window)
    return seen


# one operator in a compiled prefill; its result lies in memory as [B, T, Hq, D]
torch.library.define(
    "gpt_flash::prefill_attention",
    "(Tensor q, Tensor keys, Tensor values, Tensor index, int? window) -> Tensor",
)
torch.library.impl("gpt_flash::prefill_attention", "default", prefill_attention)


@torch.library.register_fake("gpt_flash::prefill_attention")
def fake_prefill_attention(q: Tensor, *_: Any) -> Tensor:
    B, Hq, T, D = q.shape
    return q.new_empty(B, T, Hq, D).transpose(1, 2)

# --- the rest of the transformer ---


class MLP(nn.Module):
    """The gated feed-forward network; gate and up are one product."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.act = FAMILIES[config.family].act
        self.gate_up_proj = Linear(config.dim, 2 * config.ffn_dim, bias=config.mlp_bias)
        self.down_proj = Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up)


class Block(nn.Module):
    """One layer, its modules named as in Hugging Face's checkpoints."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        family = FAMILIES[config.family]
        self.input_layernorm = family.norm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = family.norm(config.dim, config.norm_eps)
        self.mlp = family.mlp(config)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


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
        self.rope: Tensor | None = None
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
        tokens decode, more prefill. ValueError if they do not fit, as far as the host can see."""
        if tokens.shape[1] > MAX_DECODE_TOKENS:
            return self.prefill(tokens, input_pos, cache)
        B, T = tokens.shape
        cache = self.check_cache(B, cache)
        held = [cache.max_seq_len] * B  # a GPU does not say, so that the caller is believed
        if tokens.device.type == "cpu":
            refuse_overflow(cache, int(input_pos.max()), T)
            held = (input_pos + T).tolist()
        logits = self.decode(tokens, input_pos, cache)
        cache.held[:B] = held
        return logits

    @torch.no_grad()
    def decode(self, tokens: Tensor, input_pos: Tensor, cache: KVCache | None = None) -> Tensor:
        """1 to 16 tokens of each row, as in forward, without a word to the host: lengths stay on
        the device, shapes never change, so a step can be compiled and captured once."""
        cache = self.check_cache(len(tokens), cache)
        layers = cache.layers(slice(0, len(tokens)))
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
        last [B]: only the logits of that token of each row, [B, 1, vocab_size]."""
        B, T = tokens.shape
        cache = self.check_cache(B, cache)
        if rows is None:
            rows = slice(0, B)
        if start is None:
            start = int(input_pos.max())
        refuse_overflow(cache, start, T)
        positions = self.positions(input_pos, T, cache)._replace(start=start)
        x = self.run_layers(self.prefill_block, tokens, positions, cache.layers(rows))
        cache.held[rows] = [start + T] * B
        if last is not None:
            row = torch.arange(B, device=x.device)
            x = x[row, last][:, None]  # (B, 1, dim)
        return self.head(x)

    def run_layers(
        self, block_forward: Callable, tokens: Tensor, positions: Positions,
        layers: list[LayerCache],
    ) -> Tensor:
        x = self.embed_tokens(tokens)  # (B, T, dim)
        for block, cache in zip(self.layers, layers, strict=True):
            x = block_forward(block, x, positions, cache)
        return x

    def head(self, x: Tensor) -> Tensor:
        return self.lm_head(self.norm(x))

    def positions(self, input_pos: Tensor, T: int, cache: KVCache) -> Positions:
        """Where T tokens stand behind input_pos, for decode."""
        index = input_pos.long()[:, None]  # (B, 1)
        if T > 1:
            index = index + torch.arange(T, device=index.device)  # (B, T)
        cos, sin = self.rope_upto(cache.max_seq_len)[index].unbind(2)  # (B, T, 1, D) each
        return Positions(input_pos, index, cos, sin, start=None)

    def rope_upto(self, max_seq_len: int) -> Tensor:
        """rope_table of at least that many positions, made once for the largest cache."""
        made = self.rope is not None and self.rope.device == self.device
        if not made or len(self.rope) < max_seq_len:
            self.rope = rope_table(self.config, max_seq_len, self.device)
        return self.rope

    def check_cache(self, batch_size: int, cache: KVCache | None) -> KVCache:
        cache = self.cache if cache is None else cache
        if cache is None or batch_size > cache.max_batch_size:
            raise ValueError(f"call setup_caches for a batch of at least {batch_size} first")
        return cache

    @torch.no_grad()
    def setup_caches(
        self, max_batch_size: int, max_seq_len: int, kv_dtype: torch.dtype | None = None,
        attention: str = "auto",
    ) -> KVCache:
        """Allocate a cache, kept as model.cache. kv_dtype: None for the model's own dtype,
        torch.int8 for a quantized cache. attention: "flash", "math" or "auto", decode's path."""
        self.cache = None  # the old one goes before the new one comes
        config = self.config
        cache = KVCache(
            config.n_layer, config.n_kv_head, config.head_dim, max_batch_size, max_seq_len,
            dtype=kv_dtype or self.dtype, device=self.device,
            attention=attention,
        )
        if cache.dtype == torch.int8:
            self.calibrate_k_mean(cache)
        self.cache = cache
        return cache

    def calibrate_k_mean(self, cache: KVCache) -> None:
        """Fill an int8 cache's k_mean: the mean key of each head over random tokens.

        Keys have outlier channels that one int8 scale a token handles badly; subtracting a fixed
        vector removes them, and softmax does not notice (SageAttention, arXiv 2410.02367). The
        tokens are spread over the cache, because keys turn with their position: with 64 of them
        the mean KL on SmolLM2-135M is 9.6e-4 at the first positions, 6.9e-4 spread."""
        n = min(128, cache.max_seq_len)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.config.vocab_size, (1, n), generator=generator)
        input_pos = torch.zeros(1, dtype=torch.int32, device=self.device)
        spread = torch.linspace(0, cache.max_seq_len - 1, n).long().to(self.device)
        cos, sin = self.rope_upto(cache.max_seq_len)[spread][None].unbind(2)
        positions = self.positions(input_pos, n, cache)._replace(cos=cos, sin=sin, start=0)
        layers = cache.layers(slice(0, 1))
        self.run_layers(self.prefill_block, tokens.to(self.device), positions, layers)
        keys = cache.kv[:, 0, 0, :, :n] * cache.scale[:, 0, 0, :, :n, None]  # (layer, Hkv, n, D)
        cache.k_mean.copy_(keys.mean(2, keepdim=True))

    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step reads: all but the embedding, whose rows are few."""
        return tensor_bytes(self) - tensor_bytes(self.embed_tokens)


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
    """What a family of models does differently from Llama, as values."""

    norm: type[nn.Module] = nn.RMSNorm  # called with (size, eps)
    mlp: type[nn.Module] = MLP  # called with (config)
    block: type[nn.Module] = Block  # called with (config, layer)
    act: Callable[[Tensor], Tensor] = F.silu  # of the feed-forward's gate
    fields: dict[str, Any] = field(default_factory=dict)  # of ModelConfig
    window_by_default: bool = False  # sliding_window counts without use_sliding_window


# A new family of the same build is one line here, by its config.json's model_type.
FAMILIES = {
    "llama": Family(),
    "mistral": Family(window_by_default=True),
    "qwen2": Family(fields={"qkv_bias": True}),
    "qwen3": Family(fields={"qk_norm": True}),
}

# --- loading: our parameters from a checkpoint's tensors ---


@torch.no_grad()
def load_model(
    path: str | Path, *, device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.bfloat16, quantize: str | None = None, group_size: int = 32,
) -> Transformer:
    """Load a checkpoint: a Hugging Face folder or hub id, a .gguf file, a folder of save_quantized
    or, for benchmarks, a bare config.json, which gives random weights.

    quantize: "int8" or "int4" (in groups of group_size), layer by layer while loading, so that a
    model that fits only when quantized can be loaded; "auto": as the file is, so that the integers
    of a GGUF file stay what they are; None: dequantized. dtype None: float32 where the integers of
    a file stay, else bfloat16. ValueError says what is wrong."""
    check_target(device, dtype)
    path = resolve(path)
    checkpoint = open_checkpoint(path)
    with nonsense_refused(path):
        config = ModelConfig.from_hf(checkpoint.config)
    keep = quantize == "auto"
    if dtype is None:
        dtype = default_dtype(checkpoint, keep)
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    plan = tensor_plan(model, checkpoint, quantize)
    if checkpoint.tensors is None:
        warning = "is a bare configuration: the weights are RANDOM, for benchmarks only"
        print(f"WARNING: {path} {warning}", file=sys.stderr)
    else:
        checkpoint.check_names(name for parts in plan.values() for name in parts)
    kept = keep_blocks(model, plan, checkpoint) if keep else {}

    tensors = [*model.parameters(), *model.buffers()]
    stored = sum(x.nbytes for x in tensors)
    nbytes = stored * {"int8": 0.5, "int4": 0.3}.get(quantize, 1)
    require_memory(nbytes, device, f"loading {path}", "take a smaller model, or --quantize")

    fill_from_blocks(model, kept, device)
    modules = list(model.named_modules())
    for prefix, module in tqdm(modules, "loading", unit=" layers", disable=None, leave=False):
        fill(module, prefix, model, plan, checkpoint, device)
        if isinstance(module, Linear) and quantize and not keep:
            module = quantize_linear(module, quantize, group_size, prefix)
            model.set_submodule(prefix, module)
        if hasattr(module, "pack"):
            module.pack()
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


def default_dtype(checkpoint: Checkpoint, keep: bool) -> torch.dtype:
    """Of activations: float32 where the integers of a file are kept. On SmolLM2 in Q4_1 that is a
    mean KL of 9.0e-4 from the dequantized model, of which scales in bfloat16 are 2.2e-4 and
    products in it the rest; everything in bfloat16 is 1.3e-3."""
    if keep and checkpoint.is_quantized():
        return torch.float32
    return torch.bfloat16


Plan = dict[str, dict[str, tuple[int, ...]]]  # our parameter -> {the checkpoint's name: shape}


def tensor_plan(model: Transformer, checkpoint: Checkpoint, quantize: str | None) -> Plan:
    """The tensors that make each parameter, one below the other.

    The layers that a folder of save_quantized has are put into the model first."""
    ours = checkpoint.tensors is not None and quantized_layout(model, checkpoint.config)
    if ours and quantize in MODES:
        raise ValueError(
            f"{checkpoint.path} is quantized already; leave out --quantize {quantize}"
        )
    plan = {}
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if ours:  # such a folder has our names
            plan[name] = {name: tuple(x.shape)}
        else:
            plan[name] = sources(name, tuple(x.shape), model.config)
    if model.config.tied and isinstance(model.lm_head, Linear):
        del plan["lm_head.weight"]
    return plan


def sources(
    name: str, shape: tuple[int, ...], config: ModelConfig
) -> dict[str, tuple[int, ...]]:
    """The Hugging Face tensors of a parameter. Our names are theirs but for the joined ones."""
    q_size = config.n_head * config.head_dim
    kv_size = config.n_kv_head * config.head_dim
    joined = {
        "qkv_proj": {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
        "gate_up_proj": {"gate_proj": config.ffn_dim, "up_proj": config.ffn_dim},
    }
    if not name.startswith("lm_head"):
        name = f"model.{name}"
    *path, module, kind = name.split(".")
    if module not in joined:
        return {name: shape}
    parts = {}
    for part, size in joined[module].items():
        parts[".".join([*path, part, kind])] = (size, *shape[1:])
    return parts


def keep_blocks(
    model: Transformer, plan: Plan, checkpoint: Checkpoint
) -> dict[str, list[Blocks]]:
    """Put empty quantized layers where a file has integers -> {the layer's name: what fills it}.

    A joined layer takes a form that holds all of its parts. Types that no form holds are said, and
    dequantized."""
    kept = {}
    for name, parts in plan.items():
        prefix, _, kind = name.rpartition(".")
        if kind != "weight" or not isinstance(model.get_submodule(prefix), (Linear, nn.Embedding)):
            continue
        blocks = [checkpoint.blocks(part, shape) for part, shape in parts.items()]
        if None in blocks:  # in floating point
            continue
        unknown = [part.type_name for part in blocks if part.kind is None]
        if unknown:
            say_once(f"{unknown[0]} weights are dequantized: no quantized layer holds them")
            continue
        if prefix == "embed_tokens":
            prefix = "embed_tokens.table"
        put_layer(model, prefix, *form_for(blocks))
        kept[prefix] = blocks
    return kept


def form_for(parts: list[Blocks]) -> tuple[str, int]:
    """The smallest quantized layer that holds the integers of all parts: (mode, group_size)."""
    bits = max(part.kind.bits for part in parts)
    group_size = min(part.kind.group_size for part in parts)
    if bits <= 4 and group_size == 32:
        return "int4", 32
    return "int8_grouped", group_size


def fill_from_blocks(
    model: Transformer, kept: dict[str, list[Blocks]], device: torch.device | str
) -> None:
    """Give quantized layers the integers of a file, each thread a layer of its own: the steps are
    so small that an operator's threads would mostly wait for each other."""
    n = torch.get_num_threads()

    def fill_next(prefix: str) -> None:
        repack(model.get_submodule(prefix), prefix, kept[prefix], device)

    with ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        made = threads.map(fill_next, kept)
        for _ in tqdm(made, "loading", len(kept), unit=" layers", disable=None, leave=False):
            pass
    torch.set_num_threads(n)  # the default of threads to come


def repack(
    layer: Int4Linear, prefix: str, parts: list[Blocks], device: torch.device | str
) -> None:
    """The integers of a file, part below part, some rows at a time."""
    for name, meta in list(layer.named_buffers()):
        setattr(layer, name, torch.empty(meta.shape, dtype=meta.dtype, device=device))
    first = 0
    for part in parts:
        middle = 2 ** (part.kind.bits - 1)
        for rows in part.slices(rows_at_once(layer.in_features)):
            ours = slice(first + rows.start, first + rows.stop)
            layer.take(ours, *part.affine(rows), middle)
        first += part.shape[0]
    for name, tensor in layer.named_buffers():
        require_finite(f"{prefix}.{name}", tensor)
    layer.pack()


def fill(
    module: nn.Module, prefix: str, model: Transformer, plan: Plan, checkpoint: Checkpoint,
    device: torch.device | str,
) -> None:
    """Give a module its own parameters and buffers, in place of those on meta."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for name, meta in own:
        if not meta.is_meta:
            continue
        parts = plan.get(f"{prefix}.{name}")
        if parts is None:  # a tied output layer
            tensor = model.embed_tokens.weight
        elif checkpoint.tensors is None:
            tensor = torch.empty_like(meta, device=device).normal_(std=0.02)
        else:
            tensor = read_joined(checkpoint, parts).to(device, meta.dtype, copy=True)
            if tensor.dim() == 1 or isinstance(module, nn.Embedding):
                require_finite(f"{prefix}.{name}", tensor)
        if isinstance(meta, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(module, name, tensor)


def require_finite(name: str, tensor: Tensor) -> None:
    """ValueError if a tensor has NaN or infinity. What spoils a file seldom spares its norms, its
    embedding and all scales of its integers, so that no more is looked at. Of the ways to ask, the
    smallest and largest number were measured fastest: 1.9 ms for 57 MB in bfloat16, where a sum in
    float32 takes 64."""
    if not tensor.is_floating_point():
        return
    low, high = tensor.aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(
            f"tensor {name} has numbers that are not finite in {tensor.dtype}: the file is "
            "damaged, or needs a dtype of a larger range"
        )


def read_joined(checkpoint: Checkpoint, parts: dict[str, tuple[int, ...]]) -> Tensor:
    tensors = [checkpoint.read(name, shape) for name, shape in parts.items()]
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat(tensors)
