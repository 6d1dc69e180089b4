"""What GGUF files say of a model, in the terms of Hugging Face's config.json.

The names are those of llama.cpp's converter. How the files of an architecture differ says "gguf"
in the rows of families, a dictionary:

    name         general.architecture of the file
    when         the setting by which such a file is of this family, if several have that name
    settings     of config.json, and their names in such a file behind the architecture's: beyond
                 SETTINGS, or in place of those for the same
    means        settings of config.json that go without saying
    complete     a function that completes a configuration: see families/gguf.py
    interleaved  whether the two halves of a head of q and k lie in turns
    order        a function for another order: see GGUFCheckpoint.order
    norm_shift   what was added to the weights of norms
    parts        a module of Hugging Face's checkpoints, and what it is called in parts"""
from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import gguf

from formats.blocks import dequantized
from formats.checkpoint import InFile
from formats.settings import check_settings
from formats.wrappers import OF_PICTURES, TEXTS
from model import FAMILIES, extension, is_number

Tensors = dict[str, InFile]
# of the families of model.py
LLAMAS: dict[str, dict[str, Any]] = {
    "llama": dict(name="llama", interleaved=True),
    "qwen2": dict(name="qwen2", means={"sliding_window": None}),
    "qwen3": dict(name="qwen3", means={"sliding_window": None}),
}


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
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "norm_epsilon": "attention.layer_norm_epsilon",
    "sliding_window": "attention.sliding_window",
    "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "logit_scale": "logit_scale",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "num_nextn_predict_layers": "nextn_predict_layers",
}
ROPE_SETTINGS = {  # of rope_scaling
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
    "mscale": "rope.scaling.yarn_log_multiplier",
    "mscale_all_dim": "rope.scaling.yarn_log_multiplier",
    "llama_4_scaling_beta": "attention.temperature_scale",
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


def hf_config(meta: dict, tensors: Tensors) -> tuple[dict, dict[str, Any]]:
    """The metadata and tensors of a GGUF file -> a configuration as in a config.json, and the
    "gguf" of its family.

    ValueError names an architecture or a setting that is not known, or one of impossible size."""
    name = meta.get("general.architecture")
    prefix = f"{name}."
    settings = {
        key.removeprefix(prefix): value for key, value in meta.items()
        if key.startswith((prefix, "xielu."))
    }
    model_type, file = family_of(TEXTS.get(name, name), settings)
    own = file.get("settings", {})
    refuse_unknown(prefix, settings, {*own.values(), *(OF_PICTURES if name in TEXTS else ())})
    config = {"model_type": model_type, "use_sliding_window": True}
    config |= file.get("means", {})
    names = {name: theirs for name, theirs in SETTINGS.items() if theirs not in own.values()}
    config |= renamed(settings, names | own)
    if config.get("num_nextn_predict_layers"):  # the last layers, which guess further tokens
        config["num_hidden_layers"] -= config["num_nextn_predict_layers"]
    if not config.get("head_dim"):
        config["head_dim"] = None
        with suppress(KeyError, TypeError, ZeroDivisionError):  # the model says what is wrong
            config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    config["rope_scaling"] = rope_scaling(settings, tensors)
    if settings.get("rope.dimension_count") and config["head_dim"]:
        config["partial_rotary_factor"] = settings["rope.dimension_count"] / config["head_dim"]

    # the rest is told by which tensors there are
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["attention_bias"] = config["use_qkv_bias"] = "blk.0.attn_q.bias" in tensors
    config["attention_out_bias"] = config["use_bias"] = "blk.0.attn_output.bias" in tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in tensors
    if "token_embd.weight" in tensors:
        config["vocab_size"] = tensors["token_embd.weight"].shape[0]
    check_settings(config)  # what completes it goes through the layers, as many as it says
    if "complete" in file:
        file["complete"](config, settings, tensors)
    return config, file


def family_of(name: str | None, settings: dict) -> tuple[str, dict[str, Any]]:
    """The model_type of the files of an architecture, and the "gguf" of its family; ValueError if
    it is not known."""
    extension("families", required=False)
    files = LLAMAS | {kind: row.gguf for kind, row in FAMILIES.items() if row.gguf is not None}
    found = [
        (kind, file) for kind, file in files.items()
        if file["name"] == name and ("when" not in file or settings.get(file["when"]))
    ]
    if not found:
        names = dict.fromkeys(file["name"] for file in files.values())
        raise ValueError(f"unsupported GGUF architecture {name!r}; supported: {', '.join(names)}")
    return max(found, key=lambda row: "when" in row[1])


def refuse_unknown(prefix: str, settings: dict, own: set[str]) -> None:
    """ValueError if a file has a setting that nothing here reads: it would change the model. own:
    those that its family reads."""
    known = {*SETTINGS.values(), *ROPE_SETTINGS.values(), *OTHER_SETTINGS, *own}
    for key, value in settings.items():
        if key not in known and value and value != NEUTRAL.get(key):
            shown = repr(value)[:60]
            raise ValueError(f"unsupported setting {prefix}{key} = {shown} in the GGUF file")


def renamed(settings: dict, names: dict[str, str]) -> dict:
    """The settings that are there, by Hugging Face's names."""
    return {name: settings[theirs] for name, theirs in names.items() if theirs in settings}


def rope_scaling(settings: dict, tensors: Tensors) -> dict:
    """How the frequencies of the rotary embedding are stretched; {}: not at all."""
    scaling = renamed(settings, ROPE_SETTINGS)
    if "rope_freqs.weight" in tensors:  # llama3's scaling, as a divisor of each frequency
        factors = dequantized(tensors["rope_freqs.weight"]).clamp(max=2.0**53)  # or 1e30: no turn
        scaling |= {"rope_type": "linear", "factors": factors.tolist()}
    if "rope_factors_long.weight" in tensors:
        scaling["rope_type"] = "longrope"
        for length in ("long", "short"):
            factors = dequantized(tensors[f"rope_factors_{length}.weight"])
            scaling[f"{length}_factor"] = factors.tolist()
    kind = scaling.setdefault("rope_type", "linear" if scaling.get("factor") else "default")
    attn_factor = settings.get("rope.scaling.attn_factor")
    if kind in ("yarn", "longrope") and is_number(attn_factor):
        growth = 1.0 if kind == "longrope" else 1 + 0.1 * math.log(max(scaling.get("factor", 1), 1))
        scaling["attention_factor"] = attn_factor * growth
    elif attn_factor not in (None, 1.0):
        raise ValueError(f"unsupported rope.scaling.attn_factor {attn_factor!r:.40} of rope {kind}")
    return scaling
