"""Models of texts inside of those that take pictures or sound too, and the names of tensors."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from quantize import say_once

# By the model_type of a config.json that has a text_config: the one that this has, always,
OWN = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text",
       "qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3",
       "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
ANY = {  # or if it does not say it; the other way round
    "llama": "llava llava_next vipllava video_llava perception_lm idefics3 smolvlm voxtral",
    "mistral": "mistral3 idefics2",
    "qwen2": "llava_onevision internvl fast_vlm got_ocr2 qwen2_audio audioflamingo3",
    "qwen3": "lighton_ocr",
}
# What a text_config leaves out is what transformers' classes have, where our families do not say
# it: these five by its model_type, and others by that of config.json.
SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
SIZES_OF = {
    "llama": (32000, 4096, 11008, 32, 32),
    "mistral": (32000, 4096, 14336, 32, 32),
    "ministral3": (131072, 4096, 14336, 34, 32),
    "mistral4": (131072, 4096, 12288, 36, 32),
    "qwen2": (151936, 4096, 22016, 32, 32),
    "qwen3": (151936, 4096, 22016, 32, 32),
    "gemma3_text": (262208, 2304, 9216, 26, 8),
    "gemma4_text": (262144, 2304, 9216, 30, 8),
    "gemma4_unified_text": (262144, 2304, 9216, 30, 8),
    "qwen3_5_text": (248320, 4096, 12288, 32, 16),
    "qwen3_5_moe_text": (248320, 2048, 5632, 40, 16),
}
QWEN2_VL = dict(zip(SIZES, (152064, 8192, 29568, 80, 64)), num_key_value_heads=8, rope_theta=1e6,
                rms_norm_eps=1e-5, max_window_layers=80)
OTHERS = {
    "qwen2_vl": QWEN2_VL, "qwen2_5_vl": QWEN2_VL,
    "qwen3_vl": dict(max_position_embeddings=128000, rope_theta=5e5),
}


# architectures of llama.cpp's: that of texts with pictures, and of texts alone
TEXTS = {"qwen2vl": "qwen2", "qwen3vl": "qwen3", "qwen3vlmoe": "qwen3moe"}
# their settings for pictures: tokens of texts turn by one position, and no layer adds to them
OF_PICTURES = {"rope.dimension_sections", "n_deepstack_layers"}
LEFT_OUT = "{} holds a {}, of which pictures and sound are left out"
# tokens that stand for them, or around them
PICTURE = re.compile("image|video|vision|audio|IMG", re.IGNORECASE)


def text_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The configuration of the model of texts, said once; one that is of texts alone as it is."""
    kind = str(config.get("model_type"))
    any_kind = [text for text, wrappers in ANY.items() if kind in wrappers.split()]
    made = str(config.get("architectures") or "ForConditionalGeneration")
    if not (kind in OWN or any_kind) or "ForConditionalGeneration" not in made:
        return config
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config  # older files have all settings there
    model_type = OWN.get(kind) or text.get("model_type") or any_kind[0]
    say_once(LEFT_OUT.format(path, kind))
    tied = [each.get("tie_word_embeddings") for each in (config, text)]
    defaults = dict(zip(SIZES, SIZES_OF.get(str(model_type), ()))) | OTHERS.get(kind, {})
    defaults["quantization_config"] = config.get("quantization_config")
    # an output layer that the file has counts all the same
    tied = any(tied) or tied == [None, None]
    settled = dict(architectures=None, model_type=model_type, tie_word_embeddings=tied)
    return defaults | text | settled | {"wrapper": kind}


# what may stand in front of the names of a model of texts, in place of model.
PREFIX = re.compile(
    r"(((language_|text_|base_|pretrained_)?model|transformer|module|llm)\.)*(?=layers\.\d)"
)


def plain_names(tensors: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The tensors by the names that a model of texts alone has. Others stay as they are, but go
    where pictures and sound are left out."""
    prefixes = [found[0] for name in tensors if (found := PREFIX.match(name))]
    prefix = max(set(prefixes), key=prefixes.count, default="model.")
    plain = {}
    for name, tensor in tensors.items():
        outer, head, rest = name.partition("lm_head.")
        if head and prefix.startswith(outer):
            plain[head + rest] = tensor
        elif name.startswith(prefix):
            plain[f"model.{name.removeprefix(prefix)}"] = tensor
        elif name.startswith("mtp.") and "mtp.fc.weight" in tensors:  # it guesses further tokens
            plain[f"model.{name}"] = tensor
            config["mtp"] = True
        elif "wrapper" not in config:
            plain[name] = tensor
    return plain
