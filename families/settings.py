"""What the config.json of other families means: windows, scales and ropes of each layer."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from model import Rope, is_number, make_rope, positive, rope_settings, scaled


def maybe_positive(hf: dict, key: str) -> float | None:
    """A setting as a float above 0, None where it is not set."""
    return None if hf.get(key) is None else positive(hf, key, kind=float)

# --- which layers have a window, or a rope ---


def windows_of(
    hf: dict, full_layers: Callable[[dict], list[bool]] | None = None
) -> tuple[int | None, ...]:
    """How many tokens a query of each layer sees, None for all of them. full_layers: as in
    layer_kinds."""
    kinds = layer_kinds(hf, full_layers or first_layers)
    if not hf.get("sliding_window") or not hf.get("use_sliding_window", True):
        return (None,) * len(kinds)
    window = positive(hf, "sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def layer_kinds(
    hf: dict, full_layers: Callable[[dict], list[bool]], other: str = "sliding_attention"
) -> list[str]:
    """What each layer sees: "full_attention", or "sliding_attention" as far as its window, or what
    else there is. full_layers: which layers see all if a file has no layer_types."""
    kinds = of_layers(hf, "layer_types")
    if kinds is None:
        return ["full_attention" if each else other for each in full_layers(hf)]
    if not {"full_attention", other}.issuperset(kinds):
        raise ValueError(f"unsupported layer_types {kinds!r}: only full_attention and {other}")
    return kinds


def of_layers(hf: dict, key: str) -> list[Any] | None:
    """A setting with an entry for each layer; None where it is not set."""
    entries, n_layer = hf.get(key), positive(hf, "num_hidden_layers")
    if not entries:
        return None
    if not isinstance(entries, list) or len(entries) < n_layer:
        what = f"{key} = {entries!r}, not an entry for each of {n_layer} layers"
        raise ValueError(f"the model's configuration has {what}")
    return entries[:n_layer]


def last_ones(hf: dict, key: str) -> list[bool]:
    """The last of every few layers, as many as a setting says."""
    period = positive(hf, key)
    return [layer % period == period - 1 for layer in range(positive(hf, "num_hidden_layers"))]


def first_layers(hf: dict) -> list[bool]:
    n_full = hf.get("max_window_layers") or 0
    return [layer < n_full for layer in range(positive(hf, "num_hidden_layers"))]


def every_other_and_last(hf: dict) -> list[bool]:
    """Qwen2-MoE's: of the first max_window_layers every other one, and those behind them."""
    return [layer % 2 == 1 or not first for layer, first in enumerate(first_layers(hf))]


def by_pattern(hf: dict) -> list[bool]:
    """The last of every few layers, or those with a rope."""
    if hf.get("sliding_window_pattern") is None:
        return layers_with_rope(hf)
    return last_ones(hf, "sliding_window_pattern")


def layers_with_rope(hf: dict) -> list[bool]:
    """Which layers have a rotary embedding; the others know no positions."""
    flags = of_layers(hf, "no_rope_layers")  # 1 where there is one, in spite of its name
    if flags is not None:
        return [bool(flag) for flag in flags]
    if hf.get("no_rope_layer_interval"):
        return [not last for last in last_ones(hf, "no_rope_layer_interval")]
    return [True] * positive(hf, "num_hidden_layers")


def layer_ropes(hf: dict) -> tuple[Rope | None, ...]:
    """Each layer's rotary embedding. Layers with the same settings share one."""
    kinds = layer_kinds(hf, by_pattern)
    ropes: dict[str, Rope] = {}
    for kind in dict.fromkeys(kinds):
        settings = rope_settings_of(hf, kind)
        same = [rope for rope in ropes.values() if rope.hf == settings]
        ropes[kind] = same[0] if same else make_rope(settings)
    turned = layers_with_rope(hf)
    return tuple(ropes[kind] if turns else None for kind, turns in zip(kinds, turned))


def rope_settings_of(hf: dict, kind: str) -> dict:
    """model.rope_settings for layers of a kind, by which rope_parameters may differ. A rope_scaling
    replaces those of full attention then. Where layers with a window have a base of their own, what
    else is said of rope is meant for the other layers."""
    given = hf.get("rope_parameters") or {}
    in_window = kind == "sliding_attention"
    local = hf.get("rope_local_base_freq") if in_window else None
    if local is not None and not isinstance(given.get(kind), dict):
        return hf | {"rope_theta": local}
    if not any(isinstance(value, dict) for value in given.values()):
        return rope_settings(hf)
    scaling = None if in_window else hf.get("rope_scaling")
    return hf | (given.get(kind) or {}) | (scaling or {})


def ropes_of(settings: dict, layers: Iterable[Any] | None = None) -> tuple[Rope | None, ...]:
    """One rotary embedding, of settings that were unfolded, for all layers or some of them."""
    rope = make_rope(settings)
    layers = [True] * positive(settings, "num_hidden_layers") if layers is None else layers
    return tuple(rope if turns else None for turns in layers)


def ropes_in_windows(hf: dict) -> tuple[Rope | None, ...]:
    """Only layers with a window know positions. Where there is no window at all, all do."""
    return ropes_of(rope_settings(hf), windows_of(hf, by_pattern) if hf["sliding_window"] else None)


def ropes_of_part(hf: dict, key: str) -> tuple[Rope | None, ...]:
    """A setting says how many values of a head turn."""
    own = {"head_dim": positive(hf, key), "partial_rotary_factor": None}
    return ropes_of(rope_settings(hf) | own)


def ropes_outside(hf: dict, windows: Callable[[dict], Iterable[Any]]) -> tuple[Rope | None, ...]:
    """Layers that see some tokens only know no positions."""
    return ropes_of(rope_settings(hf), (window is None for window in windows(hf)))


def stretched_ropes(hf: dict) -> tuple[Rope | None, ...]:
    """Hunyuan's: files say "dynamic", but with alpha it is one larger base for all lengths."""
    settings = rope_settings(hf)
    if settings.get("rope_type", settings.get("type")) == "dynamic" and settings.get("alpha"):
        rope = make_rope(settings | {"rope_type": "default"})
        larger = positive(settings, "alpha", kind=float) ** (rope.dim / (rope.dim - 2))
        settings |= {"rope_type": "default", "rope_theta": rope.theta * larger}
    return ropes_of(settings)


def neox_ropes(hf: dict) -> tuple[Rope | None, ...]:
    """GPT-NeoX's first files have names of their own."""
    older = {"rope_theta": hf["rotary_emb_base"], "partial_rotary_factor": hf["rotary_pct"]}
    return ropes_of(rope_settings(hf | {key: x for key, x in older.items() if x is not None}))

# --- kinds of rope: rows of model.ROPES, after transformers' modeling_rope_utils ---


def yarn(rope: Rope, inv_freq: Tensor, max_seq_len: int) -> tuple[Tensor, float]:
    """A share of each frequency is kept: a ramp between the dimensions that turn beta_fast and
    beta_slow times over the original context (arXiv 2309.00071)."""

    def dimension(beta: float) -> float:
        return half * math.log(rope.original_context / (2 * math.pi * beta), rope.theta)

    half = rope.dim // 2
    low = dimension(positive(rope.hf, "beta_fast", 32, float))
    high = dimension(positive(rope.hf, "beta_slow", 1, float))
    if rope.hf.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, rope.dim - 1)
    ramp = (torch.arange(half) - low) / max(high - low, 0.001)  # (D/2,)
    kept = 1 - ramp.clamp(0, 1)
    longer = mscale(rope)
    if rope.hf.get("mscale") and rope.hf.get("mscale_all_dim"):
        longer = mscale(rope, "mscale") / mscale(rope, "mscale_all_dim")
    scale = positive(rope.hf, "attention_factor", longer, float)
    return scaled(rope, inv_freq, kept), scale


def mscale(rope: Rope, key: str | None = None) -> float:
    """How much larger yarn makes cos and sin, by the weight of that name."""
    weight = 1.0 if key is None else positive(rope.hf, key, kind=float)
    return 0.1 * weight * math.log(max(positive(rope.hf, "factor", kind=float), 1)) + 1


def longrope(rope: Rope, inv_freq: Tensor, max_seq_len: int) -> tuple[Tensor, float]:
    """A divisor of each frequency, from one list for texts that fit the original context and from
    another for longer ones (arXiv 2402.13753).

    Keys in a cache have turned for good: the room for the text decides, not its length so far."""
    original = rope.original_context
    name = "long_factor" if max_seq_len > original else "short_factor"
    factors = rope.hf.get(name)
    n = len(inv_freq)
    if not isinstance(factors, list) or len(factors) != n or not all(map(is_number, factors)):
        raise ValueError(f"longrope needs {name}, a list of {n} numbers, not {factors!r}")
    if original < 2:
        raise ValueError(f"unsupported original_max_position_embeddings {original} of longrope")
    longer = positive(rope.hf, "max_position_embeddings") / original
    factor = positive(rope.hf, "factor", longer, float)
    growth = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
    attention_factor = positive(rope.hf, "attention_factor", growth, float)
    return inv_freq / torch.tensor(factors, dtype=torch.float64), attention_factor
