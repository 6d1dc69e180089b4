"""What GGUF files of other families mean without saying it, as llama.cpp's loader has it.

A function that completes a configuration has (config, settings, tensors): what is known so far in
the terms of config.json, the file's settings without the architecture in front, and its tensors."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def windows(config: dict, settings: dict[str, Any], tensors: dict[str, Any]) -> None:
    """A file may say which layers have a window: a list of them, or every how many have none."""
    pattern = settings.get("attention.sliding_window_pattern")
    if isinstance(pattern, int):
        config["sliding_window_pattern"] = pattern
    elif pattern:
        config["layer_types"] = ["sliding_attention" if x else "full_attention" for x in pattern]


def gemma(config: dict, settings: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Scores are scaled by the size of a head, but in the models of 27B by that of dim / n_head."""
    windows(config, settings, tensors)
    size = config["head_dim"]
    if config.get("num_hidden_layers") in (46, 62):  # Gemma 2 and 3 of 27B
        size = config["hidden_size"] // config["num_attention_heads"]
    config["query_pre_attn_scalar"] = size


def gemma4(config: dict, settings: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Sizes may be those of each layer. Frequencies of a head that do not turn are divided by a
    large factor."""
    windows(config, settings, tensors)
    kinds = config["layer_types"]
    full, local = map(kinds.index, ("full_attention", "sliding_attention"))
    heads, sizes = config["num_key_value_heads"], config["intermediate_size"]
    if isinstance(heads, list):
        config |= {"num_key_value_heads": heads[local], "num_global_key_value_heads": heads[full]}
    if isinstance(sizes, list):
        config |= {"intermediate_size": sizes[0], "use_double_wide_mlp": sizes[-1] > sizes[0]}
    factors = config.pop("rope_scaling")["factors"]
    turning = factors.count(1.0) / len(factors)
    config["rope_parameters"] = {
        "sliding_attention": {"rope_theta": config["rope_local_base_freq"]},
        "full_attention": {"rope_theta": config["rope_theta"], "rope_type": "proportional",
                           "partial_rotary_factor": turning},
    }
    config["attention_k_eq_v"] = f"blk.{full}.attn_v.weight" not in tensors
    config |= {"partial_rotary_factor": None, "vocab_size_per_layer_input": config["vocab_size"]}


def qwen_moe(config: dict, settings: dict, tensors: dict[str, Any]) -> None:
    """Layers without a router have no experts."""
    layers = range(config.get("num_hidden_layers") or 0)
    config["mlp_only_layers"] = [i for i in layers if f"blk.{i}.ffn_gate_inp.weight" not in tensors]


def lfm2(config: dict, settings: dict, tensors: dict[str, Any]) -> None:
    """A layer without keys is a convolution."""
    heads = config["num_key_value_heads"]
    config["layer_types"] = ["full_attention" if n else "conv" for n in heads]
    config["num_key_value_heads"] = max(heads)


def gpt_oss(config: dict, settings: dict, tensors: dict[str, Any]) -> None:
    windows(config, settings, tensors)
    config["intermediate_size"] = config.get("moe_intermediate_size")
    config["rope_scaling"]["truncate"] = False


def phi3(config: dict, settings: dict, tensors: dict[str, Any]) -> None:
    """A window of 0 is none."""
    config["sliding_window"] = config.get("sliding_window") or None
    key = "original_max_position_embeddings"
    if key in config["rope_scaling"]:
        config[key] = config["rope_scaling"].pop(key)


def granite(config: dict, settings: dict, tensors: dict[str, Any]) -> None:
    if not config.get("attention_multiplier"):
        config["attention_multiplier"] = config["head_dim"] ** -0.5


def baichuan(config: dict, settings: dict, tensors: dict[str, Any]) -> None:
    """The 13B models have ALiBi in place of a rotary embedding; their config.json has another name
    for the context."""
    if config.get("num_hidden_layers") == 40:
        config["model_max_length"] = config.pop("max_position_embeddings", None)


def delta(config: dict, settings: dict, tensors: dict[str, Any]) -> None:
    """A layer with a decay has a state. Older files of Qwen3-Next have its inputs in one."""
    has_state = [f"blk.{i}.ssm_a" in tensors for i in range(config["num_hidden_layers"])]
    config["layer_types"] = ["linear_attention" if x else "full_attention" for x in has_state]
    config["linear_value_head_dim"] = config["inner_size"] // config["linear_num_value_heads"]
    config["by_part"] = any("attn_qkv" in name for name in tensors)


DELTA = dict(norm_shift=1.0, complete=delta, settings=dict(
    linear_conv_kernel_dim="ssm.conv_kernel", linear_key_head_dim="ssm.state_size",
    linear_num_key_heads="ssm.group_count", linear_num_value_heads="ssm.time_step_rank",
    inner_size="ssm.inner_size", full_attention_interval="full_attention_interval",
    recurrent_layers="attention.recurrent_layers", sections="rope.dimension_sections",
))


def heads_together(config: dict, name: str, shape: tuple[int, ...]) -> tuple[int, Tensor] | None:
    """GGUFCheckpoint.order of GPT-NeoX, whose files have all heads of q, then of k, then of v."""
    if ".query_key_value." not in name:
        return None
    heads = torch.arange(shape[0]).view(3, config["num_attention_heads"], -1)
    return 0, heads.transpose(0, 1).flatten()


def value_heads(config: dict, name: str, shape: tuple[int, ...]) -> tuple[int, Tensor] | None:
    """GGUFCheckpoint.order of Qwen3.5, whose files have the first value head of each key head, then
    all second ones: rows of what makes them, behind queries and keys, and columns of out_proj."""
    n_k, n_v = config["linear_num_key_heads"], config["linear_num_value_heads"]
    if ".linear_attn." not in name or ".norm." in name or n_k == n_v:
        return None
    dim = int(".out_proj." in name)
    order = torch.arange(shape[dim])
    values = order[-n_v * config["linear_value_head_dim"]:]  # all, where there is one of each head
    values[:] = values.view(n_v // n_k, n_k, -1).transpose(0, 1).flatten()
    return dim, order


SIGMOID = 2  # as expert_gating_func has it
DEEPSEEK_EXPERTS = dict(
    n_routed_experts="expert_count", n_shared_experts="expert_shared_count",
    first_k_dense_replace="leading_dense_block_count", scoring="expert_gating_func",
    routed_scaling_factor="expert_weights_scale", norm_topk_prob="expert_weights_norm",
)


def deepseek2(config: dict, settings: dict, tensors: dict[str, Any]) -> None:
    """Newer files say of heads what is cached, and beside it what they are. DeepSeek V2's experts
    have softmax for a score, and no bias."""
    head_dim, config["v_head_dim"] = (
        settings.get(f"attention.{part}_length_mla") or settings[f"attention.{part}_length"]
        for part in ("key", "value"))
    config["qk_nope_head_dim"] = head_dim - config["qk_rope_head_dim"]
    config["partial_rotary_factor"] = None
    scaling = config["rope_scaling"]
    scaling |= {key: 10 * scaling[key] for key in ("mscale", "mscale_all_dim") if key in scaling}
    biased = any("exp_probs_b" in name for name in tensors)
    if (config.get("scoring") or SIGMOID * biased) != SIGMOID:
        config |= {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy"}
        if config["norm_topk_prob"]:
            raise ValueError("unsupported expert_weights_norm of experts scored by softmax")
