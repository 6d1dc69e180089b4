"""What the settings of a configuration may be, before a model is built from them."""
import json
import math
from collections.abc import Iterator
from typing import Any

TEXTS = ("model_type", "hidden_act", "rope_type", "type")
TEXT_LISTS = ("architectures", "layer_types")
TABLES = ("rope_scaling", "rope_parameters", "quantization_config")
SWITCHES = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window")
FACTORS = ("factors", "short_factor", "long_factor")  # of rope's frequencies
# far above any model's, and small enough that making one on no device takes seconds at most
LARGEST = {
    "num_hidden_layers": 2**11,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "vocab_size": 2**24,
    "num_experts": 2**11,
    "num_local_experts": 2**11,
    "moe_intermediate_size": 2**24,
    "shared_expert_intermediate_size": 2**24,
}
LARGEST_INT = 2**53  # of all others: a float holds them exactly


def check_settings(config: dict[str, Any]) -> None:
    """ValueError names the first setting of a Hugging Face style configuration that is of no kind
    or size that a model can have. What is missing, or not supported, the model says."""
    for key, value in entries(config):
        problem = None
        if value is not None:
            problem = problem_of(key, value)
        if problem is not None:
            raise ValueError(f"the model's configuration has {key} = {short(value)}: {problem}")


def entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings that are read, and those of rope, which have a dictionary of their own, or one
    for each kind of layer."""
    for key, value in config.items():
        # it stands in where the other is missing; tokenizers write 10**30 for none
        if key != "model_max_length" or config.get("max_position_embeddings") is None:
            yield key, value
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(key), dict):
            yield from config[key].items()
            for of_kind in config[key].values():
                if isinstance(of_kind, dict):
                    yield from of_kind.items()


def problem_of(key: str, value: Any) -> str | None:
    """What is wrong with a setting, None where nothing is."""
    if key in TEXTS and not isinstance(value, str):
        return "it must be a text"
    if key in TEXT_LISTS and not is_text_list(value):
        return "it must be a list of texts"
    if key in TABLES and not isinstance(value, dict):
        return "it must be an object with settings"
    if key in SWITCHES and not isinstance(value, bool):
        return "it must be true or false"
    if key in FACTORS:
        return problem_of_factors(value)
    if key == "max_window_layers" and not is_whole(value):
        return "it must be a whole number from 0"
    if isinstance(value, float) and not math.isfinite(value):
        return "it must be a finite number"
    if isinstance(value, int):
        largest = LARGEST.get(key, LARGEST_INT)
        if abs(value) > largest:
            return f"it must be at most {largest}"
    return None


def problem_of_factors(value: Any) -> str | None:
    if isinstance(value, list) and value and all(is_factor(factor) for factor in value):
        return None
    return "it must be a list of finite numbers above 0"


def is_text_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def is_factor(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 < value <= LARGEST_INT


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def short(value: Any) -> str:
    """A value as JSON, cut to some length."""
    try:
        text = json.dumps(value, default=repr)
    except ValueError:  # an integer of more digits than Python writes
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
