"""Settings: how they are read, and what they may be, before a model is built from them."""
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from model import family_of, first_line, is_number, rope_settings

# far above any model's, and small enough that making one on no device takes seconds at most
LARGEST = {
    **dict.fromkeys(["num_hidden_layers", "num_experts", "num_local_experts"], 2**11),
    **dict.fromkeys(["num_attention_heads", "num_key_value_heads"], 2**16),
    **dict.fromkeys(["head_dim", "global_head_dim"], 2**16),
    "hidden_size": 2**20,
    **dict.fromkeys(["intermediate_size", "moe_intermediate_size"], 2**24),
    **dict.fromkeys(["shared_expert_intermediate_size", "vocab_size"], 2**24),
}
LARGEST_INT = 2**53  # of all others: a float holds them exactly


def is_factor(value: Any) -> bool:
    return is_number(value) and 0 < value <= LARGEST_INT


# keys, what their values are, and that in words
KINDS: list[tuple[set[str], Callable[[Any], bool], str]] = [
    ({"rope_scaling", "rope_parameters", "quantization_config"},
     lambda x: isinstance(x, dict), "an object with settings"),
    ({"attention_bias", "attention_out_bias", "mlp_bias", "tie_word_embeddings", "use_bias",
      "use_parallel_residual", "use_qk_norm", "use_qkv_bias", "use_sliding_window"},
     lambda x: isinstance(x, bool), "true or false"),
    ({"factors", "short_factor", "long_factor"},  # of rope's frequencies
     lambda x: isinstance(x, list) and x != [] and all(map(is_factor, x)),
     "a list of finite numbers above 0"),
    ({"max_window_layers", "num_kv_shared_layers"},
     lambda x: is_number(x, int) and x >= 0, "a whole number from 0"),
]


def check_settings(config: dict[str, Any]) -> None:
    """ValueError names the first setting of a Hugging Face style configuration that is of no kind
    or size that a model can have. What is missing, or not supported, the model says."""
    for key, value in entries(config):
        # it stands in where the other is missing; tokenizers write 10**30 for none
        is_read = key != "model_max_length" or config.get("max_position_embeddings") is None
        problem = problem_of(key, value) if is_read and value is not None else None
        if problem is not None:
            raise ValueError(f"the model's configuration has {key} = {value!r:.60}: it must be "
                             f"{problem}")


def entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings that are read, and those of rope, which have a dictionary of their own, or one
    for each kind of layer."""
    yield from config.items()
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}  # an object: that was seen above
        yield from rope.items()
        for of_kind in rope.values():
            if isinstance(of_kind, dict):
                yield from of_kind.items()


def problem_of(key: str, value: Any) -> str | None:
    """What a setting must be and is not."""
    for keys, holds, words in KINDS:
        if key in keys and not holds(value):
            return words
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    largest = LARGEST.get(key, LARGEST_INT)
    if isinstance(value, int) and abs(value) > largest:
        return f"at most {largest}"
    return None


# Settings that would go wrong if ignored, with the value that is supported; any value is in a
# family that has it among its defaults.
FIXED = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1,
    "num_experts": 0,
    "num_local_experts": 0,
    "quantization_config": {},
    "qk_layernorm": False,
    "use_bidirectional_attention": False,
    "use_parallel_residual": False,
}


def refuse_unsupported(config: dict[str, Any]) -> None:
    """ValueError names a setting that the family of a configuration does not support."""
    name, family = family_of(config)
    settings = rope_settings(family.defaults | config)
    for key, supported in FIXED.items():
        value = settings.get(key)
        if value not in (None, supported) and key not in family.defaults:
            raise ValueError(f"unsupported {key} {value!r} of {name}: only {supported!r}, unless "
                             "its row of FAMILIES has a default of it")


def read_json(path: Path) -> dict:
    """A JSON object; ValueError if the file is anything else."""
    try:
        value = json.loads(plain_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"cannot read {path}: {first_line(e)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"cannot read {path}: not a JSON object")
    return value


def plain_file(path: Path) -> Path:
    """The path; ValueError for a pipe or a device, which one could wait at for ever."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"cannot read {path}: it is no plain file")
    return path
