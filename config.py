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
    act: str = "silu"  # of the feed-forward's gate: a key of feedforward.ACTIVATIONS
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None  # "head": of every query and key alone; "all": of all of a token
    tied: bool = False  # the output layer is the embedding
    moe: MoEConfig | None = None  # None: no layer is a mixture of experts
    softmax_scale: float | None = None  # None: 1 / sqrt(head_dim)
    softcap: float | None = None  # of attention's scores: c * tanh(score / c)
    sinks: bool = False  # a logit per head that only the softmax's denominator sees
    alibi: bool = False  # instead of rope: scores fall with distance; see alibi_slopes
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and the feed-forward add
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    normalized_head: bool = False  # the output layer's rows are divided by their lengths

    @classmethod
    def from_hf(cls, hf: dict) -> ModelConfig:
        """A Hugging Face config.json as a dict -> ModelConfig.

        ValueError names what is missing or unsupported."""
        family = family_of(hf)
        hf = SETTINGS[family].defaults | hf
        kinds = layer_kinds(hf)
        for kind in dict.fromkeys(kinds):
            refuse_unsupported(rope_settings(hf, kind), family)
        fields = {}
        for name, value in SETTINGS[family].fields.items():
            fields[name] = value(hf) if callable(value) else value
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
            max_seq_len=positive(hf, "max_position_embeddings", hf.get("model_max_length", 2048)),
            norm_eps=positive(hf, "rms_norm_eps", 1e-6, float),
            windows=layer_windows(hf, kinds),
            ropes=(None,) * len(kinds) if fields.get("alibi") else layer_ropes(hf, kinds),
            hf=hf,
            act=activation(hf),
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=bool(hf.get("mlp_bias")),
            tied=bool(hf.get("tie_word_embeddings")),
            softmax_scale=softmax_scale(hf),
            softcap=maybe_positive(hf, "attn_logit_softcapping"),
            embedding_scale=positive(hf, "embedding_multiplier", 1.0, float),
            residual_scale=positive(hf, "residual_multiplier", 1.0, float),
            logits_scale=1 / positive(hf, "logits_scaling", 1.0, float),
            logits_softcap=maybe_positive(hf, "final_logit_softcapping"),
        )
        config = cls(**(settings | fields))
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
            for room in (1, self.max_seq_len):  # longrope has settings of its own for each
                rope_frequencies(rope, room)



@dataclass(frozen=True)
class MoEConfig:
    """What the layers with a mixture of experts are."""

    n_expert: int
    n_active: int  # experts that a token goes to
    ffn_dim: int  # of an expert
    layers: tuple[bool, ...]  # which layers have experts; the others have an MLP
    shared_ffn_dim: int = 0  # of an expert that all tokens go to; 0: there is none
    normalize: bool = True  # the weights of a token's experts add up to 1
    bias: bool = False  # of the router and of the experts
    glu_alpha: float | None = None  # of gpt-oss's gated linear unit: see ClampedExperts
    glu_limit: float | None = None

# --- families: what their config.json means ---


@dataclass(frozen=True)
class Settings:
    """What the config.json of a family means beyond what it says."""

    defaults: dict[str, Any] = field(default_factory=dict)  # of its keys, where it leaves them out
    # of ModelConfig, whatever it says: values, or functions of its entries
    fields: dict[str, Any] = field(default_factory=dict)


def root_of_dim(hf: dict) -> float:
    return math.sqrt(positive(hf, "hidden_size"))


GEMMA = dict(
    hidden_act="gelu_pytorch_tanh",
    num_key_value_heads=16,
    head_dim=256,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
GEMMA2 = GEMMA | dict(
    hidden_activation="gelu_pytorch_tanh",
    num_key_value_heads=4,
    use_sliding_window=True,
    sliding_window=4096,
    sliding_window_pattern=2,
    query_pre_attn_scalar=256,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
)
GEMMA3 = GEMMA2 | dict(
    max_position_embeddings=131072,
    sliding_window_pattern=6,
    rope_theta=1e6,
    rope_local_base_freq=1e4,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
)
OLMO3 = dict(
    rms_norm_eps=1e-5,
    use_sliding_window=True,
    sliding_window=4096,
    sliding_window_pattern=4,
    rope_theta=5e5,
    rope_local_base_freq=5e5,
)
SMOLLM3 = dict(
    num_key_value_heads=4,
    max_position_embeddings=32768,
    rope_theta=2e6,
    no_rope_layer_interval=4,
    tie_word_embeddings=True,
)
PHI3 = dict(
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
    original_max_position_embeddings=4096,
    partial_rotary_factor=1.0,
    use_sliding_window=True,
)
MISTRAL = dict(
    num_key_value_heads=8,
    max_position_embeddings=131072,
    use_sliding_window=True,
    sliding_window=4096,
)
QWEN2 = dict(
    num_key_value_heads=32,
    max_position_embeddings=32768,
    sliding_window=4096,
    max_window_layers=28,
)
# files have one or the other
EXPERTS = dict(num_experts=None, num_local_experts=None)
MIXTRAL = MISTRAL | dict(
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    sliding_window=None,
    **EXPERTS,
    num_experts_per_tok=2,
)
QWEN2_MOE = QWEN2 | dict(
    num_key_value_heads=16,
    **EXPERTS,
    num_experts_per_tok=4,
    moe_intermediate_size=1408,
    shared_expert_intermediate_size=5632,
    norm_topk_prob=False,
)
QWEN3_MOE = dict(
    num_key_value_heads=4,
    max_position_embeddings=32768,
    sliding_window=4096,
    **EXPERTS,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    norm_topk_prob=False,
)
GPT_OSS = dict(
    head_dim=64,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=150000.0,
    rope_scaling=dict(
        rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
        original_max_position_embeddings=4096,
    ),
    attention_bias=True,
    use_sliding_window=True,
    sliding_window=128,
    sliding_window_pattern=2,
    **EXPERTS,
    num_experts_per_tok=4,
    swiglu_alpha=1.702,
    swiglu_limit=7.0,
)
# By model_type. What a family is built of stands in model.FAMILIES, under the same name.
SETTINGS = {
    "llama": Settings(),
    "mistral": Settings(MISTRAL),
    "qwen2": Settings(QWEN2, {"qkv_bias": True}),
    "qwen3": Settings(QWEN2 | {"head_dim": 128}, {"qk_norm": "head"}),
    "gemma": Settings(GEMMA, {"embedding_scale": root_of_dim}),
    "gemma2": Settings(GEMMA2, {"embedding_scale": root_of_dim}),
    "gemma3_text": Settings(GEMMA3, {"embedding_scale": root_of_dim, "qk_norm": "head"}),
    "phi3": Settings(PHI3),
    "olmo2": Settings({"rms_norm_eps": 1e-5}, {"qk_norm": "all"}),
    "olmo3": Settings(OLMO3, {"qk_norm": "all"}),
    "smollm3": Settings(SMOLLM3),
    "granite": Settings({"attention_multiplier": 1.0}),
    # told apart as others do: its 13B models name no max_position_embeddings and use ALiBi;
    # of Baichuan 2, with its larger vocabulary, the output layer is normalized
    "baichuan": Settings(fields={
        "alibi": lambda hf: "max_position_embeddings" not in hf,
        "normalized_head": lambda hf: hf.get("vocab_size") == 125696,
    }),
    "mixtral": Settings(MIXTRAL, {
        "moe": lambda hf: mixture_of_experts(hf, "intermediate_size"),
    }),
    "qwen2_moe": Settings(QWEN2_MOE, {
        "qkv_bias": True,
        "windows": lambda hf: layer_windows(hf, hf.get("layer_types") or every_other_layer(hf)),
        "moe": lambda hf: mixture_of_experts(hf, "moe_intermediate_size"),
    }),
    "qwen3_moe": Settings(QWEN3_MOE, {
        "qk_norm": "head",
        "moe": lambda hf: mixture_of_experts(hf, "moe_intermediate_size"),
        # whatever max_window_layers says
        "windows": lambda hf: layer_windows(hf, ["sliding_attention"] * hf["num_hidden_layers"]),
    }),
    "gpt_oss": Settings(GPT_OSS, {
        "sinks": True,
        "moe": lambda hf: mixture_of_experts(hf, "intermediate_size", bias=True),
    }),
}

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
MOST_EXPERTS = 2**16  # of all layers: far above any model's, and each is made of modules
# Settings that would go wrong if ignored, with the value that is supported; any value is in a
# family that has it among its defaults.
FIXED = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1,
    "mscale_all_dim": 0,
    "num_experts": 0,
    "num_local_experts": 0,
    "quantization_config": {},
    "use_bidirectional_attention": False,
}


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


def refuse_unsupported(hf: dict, family: str) -> None:
    for key, supported in FIXED.items():
        free = key in SETTINGS[family].defaults
        if hf.get(key) not in (None, supported) and not free:
            raise ValueError(f"unsupported {key} {hf[key]!r}: only {supported!r} is supported")


def activation(hf: dict) -> str:
    """The function of the feed-forward's gate."""
    name = hf.get("hidden_activation") or hf.get("hidden_act") or "silu"
    if name not in ACTIVATIONS:
        raise ValueError(f"unsupported hidden_act {name!r}; supported: {', '.join(ACTIVATIONS)}")
    return name


def softmax_scale(hf: dict) -> float | None:
    """What scores are multiplied by, None for the usual 1 / sqrt(head_dim)."""
    if hf.get("query_pre_attn_scalar") is not None:
        return positive(hf, "query_pre_attn_scalar", kind=float) ** -0.5
    return maybe_positive(hf, "attention_multiplier")


def layer_kinds(hf: dict) -> list[str]:
    """What each layer sees: "full_attention", or "sliding_attention" as far as its window."""
    n_layer = positive(hf, "num_hidden_layers")
    if hf.get("layer_types"):
        kinds = for_each_layer(hf, "layer_types")
        if any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
            raise ValueError(
                f"unsupported layer_types {kinds!r}: only full_attention and sliding_attention "
                "are supported"
            )
        return kinds
    # how a file without layer_types tells which layers see all: the last of every few, or those
    # with rope, or the first ones
    full = [False] * n_layer
    if hf.get("max_window_layers"):
        n_full = positive(hf, "max_window_layers")
        full = [layer < n_full for layer in range(n_layer)]
    if hf.get("sliding_window_pattern"):
        period = positive(hf, "sliding_window_pattern")
        full = [layer % period == period - 1 for layer in range(n_layer)]
    elif not all(layers_with_rope(hf)):
        full = layers_with_rope(hf)
    return ["full_attention" if each else "sliding_attention" for each in full]


def layer_windows(hf: dict, kinds: list[str]) -> tuple[int | None, ...]:
    """How many tokens a query of each layer sees, None for all of them."""
    if not hf.get("sliding_window") or not hf.get("use_sliding_window"):
        return (None,) * len(kinds)
    window = positive(hf, "sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def every_other_layer(hf: dict) -> list[str]:
    """The kinds of layers of a Qwen2-MoE that does not name them: among the first ones, of which
    there are max_window_layers, every other one has a window."""
    kinds = ["full_attention"] * positive(hf, "num_hidden_layers")
    n_first = hf.get("max_window_layers") or 0
    for layer in range(0, min(len(kinds), n_first), 2):
        kinds[layer] = "sliding_attention"
    return kinds


def mixture_of_experts(hf: dict, ffn_dim: str, bias: bool = False) -> MoEConfig | None:
    """The mixture of experts of a configuration, None if no layer has one. ffn_dim: the setting
    that has the experts'."""
    key = "num_experts" if hf["num_local_experts"] is None else "num_local_experts"
    if hf[key] is None:
        raise ValueError("the model's configuration has neither num_experts nor num_local_experts")
    if hf[key] == 0:
        return None
    n_layer = positive(hf, "num_hidden_layers")
    step = positive(hf, "decoder_sparse_step", 1)
    dense = hf.get("mlp_only_layers") or []
    config = MoEConfig(
        n_expert=positive(hf, key),
        n_active=positive(hf, "num_experts_per_tok"),
        ffn_dim=positive(hf, ffn_dim),
        layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(n_layer)),
        shared_ffn_dim=shared_ffn_dim(hf),
        normalize=bool(hf.get("norm_topk_prob", True)),
        bias=bias,
        glu_alpha=maybe_positive(hf, "swiglu_alpha"),
        glu_limit=maybe_positive(hf, "swiglu_limit"),
    )
    if config.n_active > config.n_expert:
        raise ValueError(
            f"num_experts_per_tok is {config.n_active}, but there are {config.n_expert} experts"
        )
    if n_layer * config.n_expert > MOST_EXPERTS:
        raise ValueError(
            f"the model's configuration has {key} = {config.n_expert} in each of {n_layer} layers: "
            f"there may be {MOST_EXPERTS} experts in all"
        )
    return config


def shared_ffn_dim(hf: dict) -> int:
    """The size of the expert that all tokens go to, 0 if there is none."""
    key = "shared_expert_intermediate_size"
    size = hf.get(key)
    if size is None or (is_number(size, int) and size == 0):
        return 0
    return positive(hf, key)


def positive(hf: dict, key: str, default: Any = None, kind: type = int) -> Any:
    """A setting as a number above 0 of that kind; ValueError if it is anything else."""
    value = hf.get(key)
    if value is None:
        value = default
    if not is_number(value, kind) or not value > 0:
        raise ValueError(
            f"the model's configuration has {key} = {value!r}, not a positive {kind.__name__}"
        )
    return kind(value)


def is_number(value: Any, kind: type = float) -> bool:
    return isinstance(value, (int, kind)) and not isinstance(value, bool)


def for_each_layer(hf: dict, key: str) -> list:
    """A setting that has an entry for each layer; ValueError if it has not."""
    n_layer = positive(hf, "num_hidden_layers")
    entries = hf[key]
    if not isinstance(entries, list) or len(entries) < n_layer:
        raise ValueError(
            f"the model's configuration has {key} = {entries!r}, not an entry for each of "
            f"{n_layer} layers"
        )
    return entries[:n_layer]


def maybe_positive(hf: dict, key: str) -> float | None:
    """A setting as a float above 0, None where it is not set."""
    if hf.get(key) is None:
        return None
    return positive(hf, key, kind=float)

# --- rotary position embedding ---


ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True, eq=False)
class Rope:
    """A rotary embedding: how far the pairs of a head's values turn from one token to the next."""

    theta: float
    dim: int  # how many of a head's values turn, the first ones
    kind: str  # one of ROPE_KINDS
    hf: dict = field(repr=False)  # the model's settings, with those of this kind among them

    def original_context(self) -> int:
        """How long texts were before their positions were scaled."""
        trained = positive(self.hf, "max_position_embeddings", 2048)
        return positive(self.hf, "original_max_position_embeddings", trained)

    def is_long(self, max_seq_len: int) -> bool:
        """Whether frequencies are those of texts beyond the original context."""
        return self.kind == "longrope" and max_seq_len > self.original_context()


def layer_ropes(hf: dict, kinds: list[str]) -> tuple[Rope | None, ...]:
    """Each layer's rotary embedding."""
    ropes = {}
    for kind in dict.fromkeys(kinds):
        rope = make_rope(rope_settings(hf, kind))
        same = [other for other in ropes.values() if other.hf == rope.hf]
        ropes[kind] = same[0] if same else rope
    with_rope = layers_with_rope(hf)
    return tuple(ropes[kind] if turns else None for kind, turns in zip(kinds, with_rope))


def layers_with_rope(hf: dict) -> list[bool]:
    """Which layers have a rotary embedding; the others know no positions."""
    n_layer = positive(hf, "num_hidden_layers")
    if hf.get("no_rope_layers"):  # 1 where there is one, in spite of its name
        return [bool(flag) for flag in for_each_layer(hf, "no_rope_layers")]
    if hf.get("no_rope_layer_interval"):
        period = positive(hf, "no_rope_layer_interval")
        return [layer % period != period - 1 for layer in range(n_layer)]
    return [True] * n_layer


def rope_settings(hf: dict, kind: str) -> dict:
    """A copy with the entries of rope_scaling and rope_parameters for layers of that kind beside
    all others.

    transformers 5 writes the latter, with rope_theta in it, or one for each kind of layer; older
    files have rope_scaling. Where layers with a window have a base of their own, that is meant for
    the other layers."""
    settings = dict(hf)
    local = kind == "sliding_attention" and hf.get("rope_local_base_freq") is not None
    if local:
        settings["rope_theta"] = hf["rope_local_base_freq"]
    for key in ("rope_scaling", "rope_parameters"):
        given = hf.get(key) or {}
        if not isinstance(given, dict):
            raise ValueError(
                f"the model's configuration has {key} = {given!r}; it must be an object"
            )
        if any(isinstance(value, dict) for value in given.values()):
            settings.update(given.get(kind) or {})
        elif not local:
            settings.update(given)
    return settings


def make_rope(hf: dict) -> Rope:
    """The rotary embedding of settings that rope_settings unfolded."""
    head_dim = positive(hf, "head_dim", hf["hidden_size"] // hf["num_attention_heads"])
    share = positive(hf, "partial_rotary_factor", 1.0, float)
    dim = int(head_dim * share)
    if dim % 2 or dim > head_dim or not dim:
        raise ValueError(
            f"unsupported partial_rotary_factor {share}: {dim} of a head's {head_dim} values"
        )
    kind = str(hf.get("rope_type") or hf.get("type") or "default")
    kind = {"none": "default", "su": "longrope"}.get(kind, kind)
    if kind not in ROPE_KINDS:
        supported = ", ".join(ROPE_KINDS)
        raise ValueError(f"unsupported rope type {kind!r}; supported: {supported}")
    theta = positive(hf, "rope_theta", 1e4, float)
    if theta <= 1:
        raise ValueError(f"the model's configuration has rope_theta = {theta}, not above 1")
    return Rope(theta, dim, kind, hf)


def distinct(ropes: tuple[Rope | None, ...]) -> list[Rope]:
    return [rope for rope in dict.fromkeys(ropes) if rope is not None]


def rope_frequencies(rope: Rope, max_seq_len: int) -> tuple[Tensor, float]:
    """-> inv_freq [D/2] float32, and the factor on cos and sin, for every rope type supported.

    Each type keeps a part of a frequency as it is and divides the rest by a factor, or by one
    factor per frequency. After transformers' modeling_rope_utils: linear (position
    interpolation), llama3, yarn (arXiv 2309.00071), longrope (arXiv 2402.13753).
    max_seq_len: the room for the text, by which longrope chooses."""
    hf = rope.hf
    half = rope.dim // 2
    exponents = torch.arange(half, dtype=torch.float64) / half
    inv_freq = rope.theta ** -exponents  # (D/2)
    if rope.kind == "default":
        return inv_freq.float(), 1.0
    if rope.kind == "longrope":
        return longrope_frequencies(rope, inv_freq, max_seq_len)

    factors = hf.get("factors") or positive(hf, "factor", kind=float)
    factor = torch.tensor(factors, dtype=torch.float64)
    keep = torch.zeros(())
    attention_factor = 1.0
    if rope.kind == "llama3":
        keep = llama3_share(rope, inv_freq)
    elif rope.kind == "yarn":
        keep = yarn_share(rope)
        longer = 0.1 * math.log(max(factor, 1)) + 1
        attention_factor = positive(hf, "attention_factor", longer, float)
    return (inv_freq * (keep + (1 - keep) / factor)).float(), attention_factor


def longrope_frequencies(
    rope: Rope, inv_freq: Tensor, max_seq_len: int
) -> tuple[Tensor, float]:
    """rope_frequencies of longrope: a divisor of each frequency, from one list for texts that fit
    the original context and from another for longer ones.

    Keys in a cache have turned for good: the room for the text decides, not its length so far."""
    original = rope.original_context()
    name = "long_factor" if rope.is_long(max_seq_len) else "short_factor"
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
    return (inv_freq / torch.tensor(factors, dtype=torch.float64)).float(), attention_factor


def llama3_share(rope: Rope, inv_freq: Tensor) -> Tensor:
    """How much of each frequency llama3 keeps, [D/2]: by its turns over the original context."""
    low = positive(rope.hf, "low_freq_factor", kind=float)
    high = positive(rope.hf, "high_freq_factor", kind=float)
    turns = rope.original_context() * inv_freq / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def yarn_share(rope: Rope) -> Tensor:
    """How much of each frequency yarn keeps, [D/2]: a ramp between the dimensions that turn
    beta_fast and beta_slow times over the original context."""
    half = rope.dim // 2
    original = rope.original_context()

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
