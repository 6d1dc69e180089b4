"""What a model is: the settings of a config.json, for the families that are known, and their
rotary embeddings. Numbers only; model.py builds from them."""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModelConfig:
    """What a model is. The names are those of the papers; from_hf reads Hugging Face's."""

    family: str  # a key of SETTINGS
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    dim: int
    ffn_dim: int
    max_seq_len: int  # the context that the model was trained for
    norm_eps: float
    windows: tuple[int | None, ...]  # per layer: tokens a query sees, itself included; None: all
    ropes: tuple[Rope | None, ...]  # per layer; layers of one kind share one; None: no positions
    hf: dict = field(repr=False)  # what this was made from
    act: str = "silu"  # of the feed-forward's gate: a key of model.ACTIVATIONS
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None  # "head": of every query and key alone; "all": of all of a token
    tied: bool = False  # the output layer is the embedding
    softmax_scale: float | None = None  # None: 1 / sqrt(head_dim)
    softcap: float | None = None  # of attention's scores: c * tanh(score / c)
    sinks: bool = False  # a logit per head that only the softmax's denominator sees
    alibi: bool = False  # scores fall with the distance of a key; see alibi_slopes
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and the feed-forward add
    logits_scale: float = 1.0
    logits_softcap: float | None = None

    @classmethod
    def from_hf(cls, hf: dict) -> ModelConfig:
        """A Hugging Face config.json as a dict -> ModelConfig.

        ValueError names what is missing or unsupported."""
        family = family_of(hf)
        hf = SETTINGS[family].defaults | hf
        refuse_unsupported(hf, FIXED)
        n_head = positive(hf, "num_attention_heads")
        dim = positive(hf, "hidden_size")
        bias = bool(hf.get("attention_bias"))
        kinds = layer_kinds(hf)
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
            windows=layer_windows(hf, kinds),
            ropes=layer_ropes(hf, kinds),
            hf=hf,
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=bool(hf.get("mlp_bias")),
            tied=bool(hf.get("tie_word_embeddings")),
        )
        config = cls(**(settings | SETTINGS[family].fields))
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
        for rope in distinct(self.ropes):
            rope_frequencies(rope, self.max_seq_len)

# --- families: what their config.json means ---


@dataclass(frozen=True)
class Settings:
    """What the config.json of a family means beyond what it says."""

    defaults: dict[str, Any] = field(default_factory=dict)  # of its keys, where it leaves them out
    fields: dict[str, Any] = field(default_factory=dict)  # of ModelConfig, whatever it says


# By model_type. What a family is built of stands in model.FAMILIES, under the same name.
SETTINGS = {
    "llama": Settings(),
    "mistral": Settings({"use_sliding_window": True}),
    "qwen2": Settings(fields={"qkv_bias": True}),
    "qwen3": Settings(fields={"qk_norm": "head"}),
}

# Settings that would go wrong if ignored, with the value that is supported.
FIXED = {
    "hidden_act": "silu",
    "num_experts": 0,
    "num_local_experts": 0,
    "quantization_config": {},
}
FIXED_ROPE = {"partial_rotary_factor": 1, "mscale_all_dim": 0}


def family_of(hf: dict) -> str:
    """The key of SETTINGS that a configuration belongs to; ValueError if there is none."""
    family = hf.get("model_type")
    architectures = hf.get("architectures") or []
    causal = all(str(name).endswith("ForCausalLM") for name in architectures)
    if family not in SETTINGS or not causal:
        architecture = (architectures or [family])[0]
        raise ValueError(
            f"unsupported architecture {architecture!r} (model_type {family!r}); "
            f"supported model types: {', '.join(SETTINGS)}"
        )
    return family


def refuse_unsupported(hf: dict, fixed: dict[str, Any]) -> None:
    for key, supported in fixed.items():
        if hf.get(key) not in (None, supported):
            raise ValueError(f"unsupported {key} {hf[key]!r}: only {supported!r} is supported")


def layer_kinds(hf: dict) -> list[str]:
    """What each layer sees: "full_attention", or "sliding_attention" as far as its window."""
    n_layer = positive(hf, "num_hidden_layers")
    kinds = hf.get("layer_types")
    if not kinds:
        n_full = hf.get("max_window_layers") or 0
        kinds = ["full_attention"] * n_full + ["sliding_attention"] * (n_layer - n_full)
    return kinds[:n_layer]


def layer_windows(hf: dict, kinds: list[str]) -> tuple[int | None, ...]:
    """How many tokens a query of each layer sees, None for all of them."""
    if not hf.get("sliding_window") or not hf.get("use_sliding_window"):
        return (None,) * len(kinds)
    window = positive(hf, "sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


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


@dataclass(frozen=True, eq=False)
class Rope:
    """A rotary embedding: how far the pairs of a head's values turn from one token to the next."""

    theta: float
    dim: int  # how many of a head's values turn, the first ones
    kind: str  # a key of ROPE_KINDS
    hf: dict = field(repr=False)  # Hugging Face's further settings of that kind


def layer_ropes(hf: dict, kinds: list[str]) -> tuple[Rope | None, ...]:
    """Each layer's rotary embedding."""
    rope = make_rope(unfold_rope_settings(hf))
    return (rope,) * len(kinds)


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


def make_rope(hf: dict) -> Rope:
    """The rotary embedding of settings that unfold_rope_settings unfolded."""
    refuse_unsupported(hf, FIXED_ROPE)
    head_dim = positive(hf, "head_dim", hf["hidden_size"] // hf["num_attention_heads"])
    return Rope(
        theta=positive(hf, "rope_theta", 1e4, float),
        dim=head_dim,
        kind=hf.get("rope_type") or hf.get("type") or "default",
        hf=hf,
    )


def distinct(ropes: tuple[Rope | None, ...]) -> list[Rope]:
    return [rope for rope in dict.fromkeys(ropes) if rope is not None]


def rope_frequencies(rope: Rope, max_seq_len: int) -> tuple[Tensor, float]:
    """-> inv_freq [D/2] float32, and the factor on cos and sin, for every rope type supported.

    Each type keeps a part of a frequency as it is and divides the rest by a factor, or by one
    factor per frequency. After transformers' modeling_rope_utils: linear (position
    interpolation), llama3, yarn (arXiv 2309.00071). max_seq_len: of the text."""
    hf = rope.hf
    half = rope.dim // 2
    exponents = torch.arange(half, dtype=torch.float64) / half
    inv_freq = rope.theta ** -exponents  # (D/2)
    kind = rope.kind
    if kind in ("default", "none"):
        return inv_freq.float(), 1.0
    if kind not in ("linear", "llama3", "yarn"):
        supported = "default, linear, llama3, yarn"
        raise ValueError(f"unsupported rope type {kind!r}; supported: {supported}")

    trained = positive(hf, "max_position_embeddings", 2048)
    original = positive(hf, "original_max_position_embeddings", trained)
    factors = hf.get("factors") or positive(hf, "factor", kind=float)
    factor = torch.tensor(factors, dtype=torch.float64)
    keep = torch.zeros(())
    attention_factor = 1.0
    if kind == "llama3":
        keep = llama3_share(hf, inv_freq, original)
    elif kind == "yarn":
        keep = yarn_share(rope, original)
        longer = 0.1 * math.log(max(factor, 1)) + 1
        attention_factor = positive(hf, "attention_factor", longer, float)
    return (inv_freq * (keep + (1 - keep) / factor)).float(), attention_factor


def llama3_share(hf: dict, inv_freq: Tensor, original: int) -> Tensor:
    """How much of each frequency llama3 keeps, [D/2]: by its turns over the original context."""
    low = positive(hf, "low_freq_factor", kind=float)
    high = positive(hf, "high_freq_factor", kind=float)
    turns = original * inv_freq / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def yarn_share(rope: Rope, original: int) -> Tensor:
    """How much of each frequency yarn keeps, [D/2]: a ramp between the dimensions that turn
    beta_fast and beta_slow times over the original context."""
    half = rope.dim // 2

    def dimension(beta: float) -> float:
        return half * math.log(original / (2 * math.pi * beta), rope.theta)

    low = dimension(positive(rope.hf, "beta_fast", 32, float))
    high = dimension(positive(rope.hf, "beta_slow", 1, float))
    if rope.hf.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, rope.dim - 1)
    ramp = (torch.arange(half) - low) / max(high - low, 0.001)
    return 1 - ramp.clamp(0, 1)


def alibi_slopes(n_head: int) -> Tensor:
    """How much a head's score falls with each token of distance, [n_head] float32: powers of two
    from 2^(-8/n) on for n heads, a power of two; other counts take every other slope of twice as
    many for the rest (arXiv 2108.12409)."""
    n = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    slopes += [2 ** (-4 * i / n) for i in range(1, 2 * (n_head - n), 2)]
    return torch.tensor(slopes)
