"""Models that take pictures or sound too: the model of texts in them runs. And names of tensors
that begin in other ways."""
from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from quantize import say_once

# What a text_config means where it leaves out what families have no default for, as in
# transformers' classes of the same names.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads")
LLAMA = dict(zip(SIZES, (32000, 4096, 11008, 32, 32)), model_type="llama")
MISTRAL = LLAMA | dict(intermediate_size=14336, model_type="mistral")
QWEN2 = dict(zip(SIZES, (151936, 4096, 22016, 32, 32)), model_type="qwen2")
QWEN3 = QWEN2 | dict(model_type="qwen3")
QWEN2_VL = dict(
    zip(SIZES, (152064, 8192, 29568, 80, 64)), num_key_value_heads=8, rms_norm_eps=1e-5,
    rope_theta=1e6, max_window_layers=80, model_type="qwen2",
)
GEMMA3 = dict(zip(SIZES, (262208, 2304, 9216, 26, 8)), model_type="gemma3_text")
VOXTRAL = dict(
    zip(SIZES, (131072, 3072, 8192, 30, 32)), num_key_value_heads=8, head_dim=128,
    max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=1e8, model_type="llama",
)
# By the model_type of config.json: those with a model of texts of one kind,
OWN = {
    "gemma3": GEMMA3,
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_VL,
    "qwen3_vl": QWEN3 | dict(max_position_embeddings=128000, rope_theta=5e5),
    "voxtral": VOXTRAL,
}
# and those with any, by its model_type; here is the one that is meant if it has none.
ANY = {
    **dict.fromkeys(["llava", "llava_next", "vipllava", "video_llava", "perception_lm"], LLAMA),
    **dict.fromkeys(["idefics3", "smolvlm"], LLAMA),
    **dict.fromkeys(["llava_onevision", "internvl", "fast_vlm", "got_ocr2"], QWEN2),
    **dict.fromkeys(["qwen2_audio", "audioflamingo3"], QWEN2),
    **dict.fromkeys(["mistral3", "idefics2"], MISTRAL),
    "lighton_ocr": QWEN3,
}
TIED = {"gemma3", "mistral3", "internvl", "got_ocr2", "lighton_ocr"}  # if nothing else is said


def text_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The configuration of the model of texts, said once; one that is of texts alone as it is."""
    kind = str(config.get("model_type"))
    made = config.get("architectures") or []
    whole = all(str(each).endswith("ForConditionalGeneration") for each in made)
    if kind not in OWN | ANY or not whole:
        return config
    text = config.get("text_config")
    if not isinstance(text, dict):  # older files have its settings beside the others
        text = config
    defaults = OWN.get(kind)
    if defaults is None:
        name = text.get("model_type") or ANY[kind]["model_type"]
        rows = {row["model_type"]: row for row in (LLAMA, MISTRAL, QWEN2, QWEN3)}
        defaults = rows.get(name, {"model_type": name})
    say_once(f"{path.parent} holds a {kind}, of which pictures and sound are left out")
    tied = config.get("tie_word_embeddings")
    tied = kind in TIED if tied is None else tied
    known = {key: value for key, value in text.items() if key != "architectures"}
    quantization = {"quantization_config": config.get("quantization_config")}
    return defaults | quantization | known | {
        "model_type": defaults["model_type"],
        "tie_word_embeddings": bool(tied or text.get("tie_word_embeddings")),
        "wrapper": kind,
    }


# what may stand in front of the names of a model of texts, in place of model.
PREFIX = re.compile(
    r"((model|language_model|text_model|transformer|module|base_model|pretrained_model|llm)\.)*"
    r"(?=layers\.\d)"
)


def plain_names(tensors: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The tensors by the names that a model of texts alone has. Others stay as they are, but go
    where pictures and sound are left out."""
    prefixes = Counter(found[0] for name in tensors if (found := PREFIX.match(name)))
    if not prefixes:
        return tensors
    [(prefix, _)] = prefixes.most_common(1)
    plain = {}
    for name, tensor in tensors.items():
        outer, head, rest = name.partition("lm_head.")
        if head and prefix.startswith(outer):
            plain[head + rest] = tensor
        elif name.startswith(prefix):
            plain[f"model.{name.removeprefix(prefix)}"] = tensor
        elif "wrapper" not in config:
            plain[name] = tensor
    return plain
