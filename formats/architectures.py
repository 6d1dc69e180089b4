"""What GGUF files say of a model, in the terms of Hugging Face's config.json.

The names are those of llama.cpp's converter; what an architecture means without saying it stands
in llama.cpp's loader."""
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gguf

from formats.settings import check_settings

Tensors = dict[str, gguf.ReaderTensor]


@dataclass(frozen=True)
class Architecture:
    """How the files of an architecture differ from Hugging Face's checkpoints."""

    model_type: str  # in config.json
    interleaved: bool = False  # the two halves of a head of q and k lie in turns
    norm_shift: float = 0.0  # what was added to the weights of norms
    means: dict[str, Any] = field(default_factory=dict)  # settings that go without saying
    # a function that completes a configuration: (config, metadata without prefix, tensors)
    complete: Callable[[dict, dict, Tensors], None] | None = None


# Hugging Face's name of a setting -> its name in a GGUF file, behind the architecture's
SETTINGS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
    "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
ROPE_SETTINGS = {  # of rope_scaling
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
# settings that are read in another way, or follow from others
OTHER_SETTINGS = {
    "vocab_size", "attention.value_length", "attention.sliding_window_pattern",
    "rope.dimension_count", "rope.scaling.attn_factor", "rope.scaling.finetuned",
    "tensor_data_layout",
}
NEUTRAL = {  # settings that nothing reads, with the value that changes nothing
    "attention.causal": True,
    "expert_gating_func": gguf.ExpertGatingFuncType.SOFTMAX,
    "expert_weights_scale": 1.0,
    "rope.scale_linear": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}


def hf_config(meta: dict, tensors: Tensors) -> dict:
    """The metadata and tensors of a GGUF file -> a configuration as in a config.json.

    ValueError names an architecture or a setting that is not known, or one of impossible size."""
    name, architecture = architecture_of(meta)
    prefix = f"{name}."
    settings = {
        key.removeprefix(prefix): value for key, value in meta.items() if key.startswith(prefix)
    }
    refuse_unknown(prefix, settings)
    config = {"model_type": architecture.model_type, "use_sliding_window": True}
    config |= architecture.means
    config |= renamed(settings, SETTINGS)
    config["head_dim"] = settings.get("attention.key_length") or usual_head_dim(config)
    config["rope_scaling"] = rope_scaling(settings, tensors)
    if settings.get("rope.dimension_count") and config["head_dim"]:
        config["partial_rotary_factor"] = settings["rope.dimension_count"] / config["head_dim"]

    # the rest is told by which tensors there are
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["attention_bias"] = "blk.0.attn_output.bias" in tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if "token_embd.weight" in tensors:
        config["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    check_settings(config)  # what completes it goes through the layers, as many as it says
    if architecture.complete:
        architecture.complete(config, settings, tensors)
    return config


def architecture_of(meta: dict) -> tuple[str, Architecture]:
    """The architecture of a file, by its name; ValueError if it is not known."""
    name = meta.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(f"unsupported GGUF architecture {name!r}; "
                         f"supported: {', '.join(ARCHITECTURES)}")
    return name, ARCHITECTURES[name]


def refuse_unknown(prefix: str, settings: dict) -> None:
    """ValueError if a file has a setting that nothing here reads: it would change the model."""
    known = {*SETTINGS.values(), *ROPE_SETTINGS.values(), *OTHER_SETTINGS}
    for key, value in settings.items():
        if key not in known and value and value != NEUTRAL.get(key):
            shown = repr(value)[:60]
            raise ValueError(f"unsupported setting {prefix}{key} = {shown} in the GGUF file")


def renamed(settings: dict, names: dict[str, str]) -> dict:
    """The settings that are there, by Hugging Face's names."""
    return {name: settings[theirs] for name, theirs in names.items() if theirs in settings}


def usual_head_dim(config: dict) -> int | None:
    n_head = config.get("num_attention_heads")
    dim = config.get("hidden_size")
    if not isinstance(n_head, int) or not isinstance(dim, int) or n_head < 1:
        return None
    return dim // n_head


def rope_scaling(settings: dict, tensors: Tensors) -> dict:
    """How the frequencies of the rotary embedding are stretched; {}: not at all."""
    scaling = renamed(settings, ROPE_SETTINGS)
    if "rope_freqs.weight" in tensors:  # llama3's scaling, as a divisor of each frequency
        scaling |= {"rope_type": "linear", "factors": tensors["rope_freqs.weight"].data.tolist()}
    if "rope_factors_long.weight" in tensors:
        scaling["rope_type"] = "longrope"
        for length in ("long", "short"):
            factors = tensors[f"rope_factors_{length}.weight"].data
            scaling[f"{length}_factor"] = factors.tolist()
        if "rope.scaling.attn_factor" in settings:
            scaling["attention_factor"] = settings["rope.scaling.attn_factor"]
    return scaling

# --- what architectures mean without saying it ---


def window_every(period: int) -> Callable[[dict, dict, Tensors], None]:
    """All layers but every period-th one have a window, unless the file says which."""

    def complete(config: dict, settings: dict, tensors: Tensors) -> None:
        n_layer = config.get("num_hidden_layers")
        pattern = settings.get("attention.sliding_window_pattern", period)
        if isinstance(pattern, int):
            pattern = [layer % pattern != pattern - 1 for layer in range(n_layer or 0)]
        kinds = {True: "sliding_attention", False: "full_attention"}
        config["layer_types"] = [kinds[bool(window)] for window in pattern]

    return complete


def complete_llama(config: dict, settings: dict, tensors: Tensors) -> None:
    """Mixtral is a Llama with experts."""
    if not config.pop("num_experts", 0):
        config.pop("num_experts_per_tok", None)
        return
    config["model_type"] = "mixtral"
    config["num_local_experts"] = settings["expert_count"]


def complete_qwen_moe(config: dict, settings: dict, tensors: Tensors) -> None:
    """Layers without a router have no experts."""
    layers = range(config.get("num_hidden_layers") or 0)
    config["mlp_only_layers"] = [
        layer for layer in layers if f"blk.{layer}.ffn_gate_inp.weight" not in tensors
    ]


def complete_gpt_oss(config: dict, settings: dict, tensors: Tensors) -> None:
    window_every(2)(config, settings, tensors)
    config["num_local_experts"] = config.pop("num_experts", None)
    config["intermediate_size"] = settings.get("expert_feed_forward_length")
    config["rope_scaling"]["truncate"] = False


def gemma(period: int, n_layer_of_27b: int) -> Callable[[dict, dict, Tensors], None]:
    """Scores are scaled by the size of a head, but in the models of 27B by that of dim / n_head."""

    def complete(config: dict, settings: dict, tensors: Tensors) -> None:
        window_every(period)(config, settings, tensors)
        size = config["head_dim"]
        if config.get("num_hidden_layers") == n_layer_of_27b:
            size = usual_head_dim(config)
        config["query_pre_attn_scalar"] = size

    return complete


def complete_phi3(config: dict, settings: dict, tensors: Tensors) -> None:
    """A window of 0 is none."""
    config["sliding_window"] = config.get("sliding_window") or None
    scaling = config["rope_scaling"]
    if "original_max_position_embeddings" in scaling:
        original = scaling.pop("original_max_position_embeddings")
        config["original_max_position_embeddings"] = original


def complete_olmo2(config: dict, settings: dict, tensors: Tensors) -> None:
    """OLMo 3 is OLMo 2 with windows."""
    if config.get("sliding_window"):
        config["model_type"] = "olmo3"
        window_every(4)(config, settings, tensors)


def complete_granite(config: dict, settings: dict, tensors: Tensors) -> None:
    if not config.get("attention_multiplier"):
        config["attention_multiplier"] = config["head_dim"] ** -0.5


def complete_baichuan(config: dict, settings: dict, tensors: Tensors) -> None:
    """The 13B models have ALiBi in place of a rotary embedding; their config.json has another name
    for the context."""
    if config.get("num_hidden_layers") == 40:
        config["model_max_length"] = config.pop("max_position_embeddings", None)


GEMMA = {"hidden_activation": "gelu_pytorch_tanh"}
QWEN = {"sliding_window": None}  # Hugging Face's default is one that most of them do not use
# by general.architecture of a GGUF file
ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True, complete=complete_llama),
    "qwen2": Architecture("qwen2", means=QWEN),
    "qwen3": Architecture("qwen3", means=QWEN),
    "qwen2moe": Architecture(
        "qwen2_moe", means={**QWEN, "norm_topk_prob": False}, complete=complete_qwen_moe),
    "qwen3moe": Architecture(
        "qwen3_moe", means={**QWEN, "norm_topk_prob": True}, complete=complete_qwen_moe),
    "gpt-oss": Architecture("gpt_oss", complete=complete_gpt_oss),
    "gemma": Architecture("gemma", norm_shift=1.0, means=GEMMA),
    "gemma2": Architecture("gemma2", norm_shift=1.0, means=GEMMA, complete=gemma(2, 46)),
    "gemma3": Architecture(
        "gemma3_text", norm_shift=1.0, means={**GEMMA, "sliding_window": None},
        complete=gemma(6, 62)),
    "phi3": Architecture("phi3", complete=complete_phi3),
    "olmo2": Architecture("olmo2", complete=complete_olmo2),
    "smollm3": Architecture("smollm3", interleaved=True, means={"no_rope_layer_interval": 4}),
    "granite": Architecture("granite", interleaved=True, complete=complete_granite),
    "baichuan": Architecture("baichuan", interleaved=True, complete=complete_baichuan),
}

# --- names of tensors ---

# modules of Hugging Face's checkpoints whose parts lie alone in a GGUF file
JOINED = {"W_pack": ("q_proj", "k_proj", "v_proj")}


def names_of(architecture: str, n_layer: int) -> gguf.TensorNameMap:
    """Hugging Face's names of tensors -> those of that architecture's files."""
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(numbers[architecture], n_layer)
