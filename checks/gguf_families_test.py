"""GGUF files of every family: written as llama.cpp's converter writes them, they are Hugging Face's
configuration and tensors again."""
import copy
import math
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as GGML
from torch import Tensor

from checks.common import BASE, close, hf_logits, interleave, random_blocks, write_gguf
from families.deltanet import by_part
from formats.architectures import hf_config
from formats.checkpoint import open_checkpoint
from formats.gguf_file import GGUFCheckpoint
from model import ModelConfig, load_model
from quantize import Linear, QuantizedLinear


class Case(NamedTuple):
    """A small model of a family, and what its GGUF file says beyond what all say."""

    arch: str
    transformers: str  # the class, without ForCausalLM
    settings: dict
    extra: list[tuple]  # (method of gguf.GGUFWriter, *its arguments)
    same: list[str]  # settings of config.json that have to be there, beyond those of all
    tol: float | None = 1e-4  # of llama.cpp's logits, None: it does not know such
    older: bool = False  # as files were once
    other: tuple[str, ...] = ()  # settings that mean the same in other words


HALF = 8  # of a head of 16
SHORT = [1.0 + i / 8 for i in range(HALF)]
LONG = [2.0 + i / 2 for i in range(HALF)]
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=SHORT, long_factor=LONG)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
MOE = [("add_expert_count", 4), ("add_expert_used_count", 2)]
OF_EXPERTS = ["num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "mlp_only_layers"]
WINDOW = ("add_sliding_window", 8)
OF_WINDOWS = ["sliding_window", "windows"]
LOCAL_FIRST = ["sliding_attention", "full_attention"] * 2
GEMMA4 = [
    WINDOW, ("add_sliding_window_pattern", [True, False] * 2), ("add_rope_freq_base_swa", 1e4),
    ("add_final_logit_softcapping", 5.0), ("add_key_length", 32), ("add_value_length", 32),
    ("add_key_length_swa", 16), ("add_value_length_swa", 16), ("add_rope_dimension_count", 32),
    ("add_rope_dimension_count_swa", 16),
    ("add_tensor", "rope_freqs.weight", np.float32([1.0] * 4 + [1e30] * 12)),
]
OF_GEMMA4 = [*OF_WINDOWS, "final_logit_softcapping", "global_head_dim",
             "hidden_size_per_layer_input", "num_kv_shared_layers"]
SIGMOID = ("add_expert_gating_func", gguf.ExpertGatingFuncType.SIGMOID)
OF_GRANITE = ["embedding_multiplier", "attention_multiplier", "residual_multiplier",
              "logits_scaling"]
SECTIONS = ("add_rope_dimension_sections", [3, 3, 2, 0])
DELTA = dict(
    linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=16,
    linear_value_head_dim=16, linear_conv_kernel_dim=4, head_dim=32, num_hidden_layers=5)
OF_DELTA = [
    ("add_ssm_conv_kernel", 4), ("add_ssm_state_size", 16), ("add_ssm_group_count", 2),
    ("add_ssm_time_step_rank", 6), ("add_ssm_inner_size", 96), ("add_rope_dimension_count", 8),
    ("add_full_attention_interval", 4), ("add_value_length", 32)]
SHARING = dict(EXPERTS, shared_expert_intermediate_size=40)
OF_SHARING = [*MOE, ("add_expert_feed_forward_length", 32),
              ("add_expert_shared_feed_forward_length", 40)]
LATENT = dict(
    q_lora_rank=40, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=16,
    head_dim=8, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=32,
    n_shared_experts=1, first_k_dense_replace=1, num_key_value_heads=6)
OF_LATENT = [
    ("add_kv_lora_rank", 24), ("add_rope_dimension_count", 8), ("add_expert_count", 8),
    ("add_expert_used_count", 3), ("add_expert_feed_forward_length", 32),
    ("add_expert_shared_count", 1), ("add_leading_dense_block_count", 1)]
OF_SIZES = [
    ("add_head_count_kv", 1), ("add_key_length", 32), ("add_value_length", 24),
    ("add_key_length_mla", 20), ("add_value_length_mla", 16)]
OF_CACHE = ("num_key_value_heads", "head_dim")  # files have what is cached
SAME_LATENT = ["moe", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"]
DEEP = [SECTIONS, ("add_num_deepstack_layers", 1)]
CASES = {
    "mixtral": Case("llama", "Mixtral", dict(num_local_experts=4), MOE,
                    ["moe", "num_experts_per_tok"]),
    "qwen2_moe": Case(
        "qwen2moe", "Qwen2Moe", dict(shared_expert_intermediate_size=40, **EXPERTS),
        [*MOE, ("add_expert_feed_forward_length", 32),
         ("add_expert_shared_feed_forward_length", 40)],
        [*OF_EXPERTS, "num_experts", "shared_expert_intermediate_size"]),
    "qwen3_moe": Case("qwen3moe", "Qwen3Moe", dict(norm_topk_prob=True, **EXPERTS),
                      [*MOE, ("add_expert_feed_forward_length", 32)], OF_EXPERTS),
    "gpt_oss": Case(
        "gpt-oss", "GptOss",
        dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
        [*MOE, WINDOW, ("add_expert_feed_forward_length", 72),
         ("add_rope_scaling_type", gguf.RopeScalingType.YARN),
         ("add_rope_scaling_factor", 32.0), ("add_rope_scaling_orig_ctx_len", 4096),
         ("add_rope_scaling_yarn_beta_fast", 32.0), ("add_rope_scaling_yarn_beta_slow", 1.0)],
        [*OF_WINDOWS, "moe", "num_experts_per_tok", "attention_bias"],
        tol=2e-2),  # llama.cpp rounds the ends of yarn's ramp
    "gemma": Case("gemma", "Gemma", dict(num_key_value_heads=1), [], [], tol=1e-3),
    "gemma2": Case(
        "gemma2", "Gemma2", dict(sliding_window=8, query_pre_attn_scalar=16),
        [WINDOW, ("add_attn_logit_softcapping", 50.0), ("add_final_logit_softcapping", 30.0)],
        [*OF_WINDOWS, "attn_logit_softcapping", "final_logit_softcapping",
         "query_pre_attn_scalar", "hidden_activation"], tol=1e-3),
    "gemma3_text": Case(
        "gemma3", "Gemma3",
        dict(sliding_window=8, query_pre_attn_scalar=16, num_hidden_layers=7),
        [WINDOW, ("add_rope_freq_base_swa", 1e4)],
        [*OF_WINDOWS, "query_pre_attn_scalar", "hidden_activation"], tol=1e-3),
    "gemma4_text": Case(
        "gemma4", "Gemma4", dict(
            sliding_window=8, num_hidden_layers=4, layer_types=LOCAL_FIRST, global_head_dim=32,
            num_kv_shared_layers=2, use_double_wide_mlp=True, hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=131, final_logit_softcapping=5.0),
        [*GEMMA4, ("add_shared_kv_layers", 2), ("add_feed_forward_length", [72, 72, 144, 144]),
         ("add_embedding_length_per_layer_input", 8)],
        [*OF_GEMMA4, "use_double_wide_mlp", "vocab_size_per_layer_input"],
        tol=4e-3),  # llama.cpp has a table of GELU in halves
    "gemma4-without-values": Case(
        "gemma4", "Gemma4", dict(
            sliding_window=8, num_hidden_layers=4, layer_types=LOCAL_FIRST, global_head_dim=32,
            attention_k_eq_v=True, num_global_key_value_heads=1, num_kv_shared_layers=0,
            hidden_size_per_layer_input=0, final_logit_softcapping=5.0),
        [*GEMMA4, ("add_shared_kv_layers", 0), ("add_head_count_kv", [2, 1] * 2),
         ("add_embedding_length_per_layer_input", 0)],
        [*OF_GEMMA4, "attention_k_eq_v", "num_global_key_value_heads"], tol=2e-3),
    "phi3": Case(
        "phi3", "Phi3",
        dict(rope_parameters=LONGROPE, original_max_position_embeddings=512,
             max_position_embeddings=1024),
        [("add_sliding_window", 0), ("add_rope_scaling_orig_ctx_len", 512),
         ("add_rope_dimension_count", 2 * HALF),
         ("add_rope_scaling_attn_factors", math.sqrt(1 + math.log(2) / math.log(512))),
         ("add_tensor", "rope_factors_short.weight", np.float32(SHORT)),
         ("add_tensor", "rope_factors_long.weight", np.float32(LONG))],
        ["sliding_window", "original_max_position_embeddings"]),
    "olmo2": Case("olmo2", "Olmo2", {}, [], []),
    "olmo3": Case("olmo2", "Olmo3", dict(sliding_window=8, num_hidden_layers=4),
                  [WINDOW, ("add_sliding_window_pattern", [True, True, True, False])], OF_WINDOWS),
    "smollm3": Case("smollm3", "SmolLM3", dict(num_hidden_layers=4, no_rope_layer_interval=4),
                    [("add_rope_dimension_count", 16)], ["no_rope_layer_interval"]),
    "granite": Case(
        "granite", "Granite",
        dict(embedding_multiplier=12.0, attention_multiplier=0.015625, residual_multiplier=0.25,
             logits_scaling=8.0),
        [("add_attention_scale", 0.015625), ("add_embedding_scale", 12.0),
         ("add_residual_scale", 0.25), ("add_logit_scale", 8.0)], OF_GRANITE),
    "ministral3": Case(
        "mistral3", "Ministral3", dict(head_dim=16, rope_parameters=dict(
            rope_type="yarn", rope_theta=1e6, factor=16.0, original_max_position_embeddings=6,
            beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
            llama_4_scaling_beta=0.1)),
        [("add_rope_scaling_type", gguf.RopeScalingType.YARN), ("add_rope_scaling_factor", 16.0),
         ("add_rope_scaling_orig_ctx_len", 6), ("add_rope_scaling_yarn_beta_fast", 32.0),
         ("add_rope_scaling_yarn_beta_slow", 1.0), ("add_rope_scaling_yarn_log_mul", 1.0),
         ("add_attn_temperature_scale", 0.1)], []),
    "seed_oss": Case("seed_oss", "SeedOss", {}, [], ["attention_bias", "attention_out_bias"]),
    "exaone4": Case("exaone4", "Exaone4", dict(sliding_window=8, num_hidden_layers=4),
                    [WINDOW, ("add_sliding_window_pattern", [True, True, True, False])],
                    OF_WINDOWS, tol=None),  # llama.cpp knows windows where there are 64 layers
    "exaone4-full": Case(
        "exaone4", "Exaone4", dict(sliding_window=None, layer_types=["full_attention"] * 3), [],
        []),
    "glm4": Case("glm4", "Glm4", {}, [("add_rope_dimension_count", HALF)], ["attention_bias"]),
    "hunyuan_v1_dense": Case(
        "hunyuan-dense", "HunYuanDenseV1", {},
        [("add_rope_scaling_type", gguf.RopeScalingType.NONE)], []),
    "ernie4_5": Case("ernie4_5", "Ernie4_5", dict(use_bias=False), [], ["use_bias"]),
    "cohere2": Case(
        "cohere2", "Cohere2", dict(sliding_window=8, num_hidden_layers=4),
        [WINDOW, ("add_logit_scale", 0.0625), ("add_rope_dimension_count", 16),
         ("add_rope_scaling_type", gguf.RopeScalingType.NONE)], [*OF_WINDOWS, "logit_scale"]),
    "starcoder2": Case("starcoder2", "Starcoder2", {}, [], ["use_bias"], tol=1e-3),
    "stablelm": Case("stablelm", "StableLm", dict(use_qkv_bias=True),
                     [("add_rope_dimension_count", 4), ("add_parallel_residual", False)],
                     ["use_qkv_bias"]),
    "phi": Case("phi2", "Phi", {}, [("add_rope_dimension_count", HALF)], [], tol=1e-3),
    "gpt_neox": Case(
        "gptneox", "GPTNeoX", dict(num_key_value_heads=6),
        [("add_rope_dimension_count", 4), ("add_parallel_residual", True)],
        ["use_parallel_residual"], tol=1e-3),
    "gpt_neox-in-turn": Case(
        "gptneox", "GPTNeoX",
        dict(num_key_value_heads=6, use_parallel_residual=False, rotary_pct=0.5),
        [("add_rope_dimension_count", HALF), ("add_parallel_residual", False)],
        ["use_parallel_residual"], tol=1e-3),
    "apertus": Case(
        "apertus", "Apertus", dict(rope_parameters=dict(rope_type="default", rope_theta=12e6)),
        [("add_xielu_beta", [0.5] * 3), ("add_xielu_eps", [-1e-6] * 3)], []),
    "hunyuan_v1_moe": Case(
        "hunyuan-moe", "HunYuanMoEV1", dict(num_experts=4, moe_topk=2),
        [*MOE, ("add_rope_scaling_type", gguf.RopeScalingType.NONE),
         ("add_expert_shared_count", 1), ("add_expert_feed_forward_length", 72),
         ("add_expert_shared_feed_forward_length", 72)], ["moe"]),
    "qwen2 with pictures": Case("qwen2vl", "Qwen2", {}, [SECTIONS], [], tol=1e-3),
    "qwen3 with pictures": Case("qwen3vl", "Qwen3", {}, DEEP, [], tol=1e-3),
    "qwen3_moe with pictures": Case(
        "qwen3vlmoe", "Qwen3Moe", dict(norm_topk_prob=True, **EXPERTS),
        [*DEEP, *MOE, ("add_expert_feed_forward_length", 32)], OF_EXPERTS, tol=1e-3),
    "lfm2": Case(
        "lfm2", "Lfm2", dict(
            layer_types=["conv", "full_attention", "conv"], conv_L_cache=3, block_multiple_of=8,
            block_auto_adjust_ff_dim=False),
        [("add_head_count_kv", [0, 2, 0]), ("add_shortconv_l_cache", 3),
         ("add_layer_norm_rms_eps", 1e-5)], ["conv_L_cache", "windows"]),
    "lfm2_moe": Case(
        "lfm2moe", "Lfm2Moe", dict(
            layer_types=["conv", "full_attention", "conv"], num_dense_layers=1, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=32),
        [*MOE, SIGMOID, ("add_head_count_kv", [0, 2, 0]), ("add_shortconv_l_cache", 3),
         ("add_layer_norm_rms_eps", 1e-5), ("add_expert_feed_forward_length", 32),
         ("add_leading_dense_block_count", 1)], ["conv_L_cache", "windows", "moe"]),
    "glm4_moe": Case(
        "glm4moe", "Glm4Moe", dict(
            n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16,
            use_qk_norm=True, routed_scaling_factor=1.5, num_nextn_predict_layers=1),
        [*MOE, SIGMOID, ("add_expert_feed_forward_length", 32), ("add_rope_dimension_count", HALF),
         ("add_expert_shared_count", 1), ("add_leading_dense_block_count", 1),
         ("add_expert_weights_scale", 1.5), ("add_expert_weights_norm", True)],
        ["moe", "use_qk_norm"]),
    "minimax_m2": Case(
        "minimax-m2", "MiniMaxM2", dict(num_local_experts=4, num_experts_per_tok=2, rotary_dim=8),
        [*MOE, SIGMOID, ("add_expert_feed_forward_length", 72),
         ("add_rope_dimension_count", HALF)], ["moe", "rotary_dim"]),
    "qwen3_5_text": Case("qwen35", "Qwen3_5", DELTA, [*OF_DELTA, SECTIONS], ["windows"]),
    "qwen3_5_moe_text": Case(
        "qwen35moe", "Qwen3_5Moe", DELTA | SHARING, [*OF_DELTA, *OF_SHARING, SECTIONS],
        ["windows", "moe"]),
    "qwen3_next": Case("qwen3next", "Qwen3Next", DELTA | SHARING, [*OF_DELTA, *OF_SHARING],
                       ["windows", "moe"]),
    "older qwen3_next": Case("qwen3next", "Qwen3Next", DELTA | SHARING, [*OF_DELTA, *OF_SHARING],
                             ["windows", "moe"], older=True),
    "deepseek_v3": Case(
        "deepseek2", "DeepseekV3", dict(
            LATENT, n_group=4, topk_group=2, routed_scaling_factor=2.5, rope_parameters=dict(
                rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=24,
                beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)),
        [*OF_LATENT, *OF_SIZES, SIGMOID, ("add_expert_weights_norm", True),
         ("add_expert_weights_scale", 2.5), ("add_expert_group_count", 4),
         ("add_expert_group_used_count", 2), ("add_q_lora_rank", 40),
         ("add_rope_scaling_type", gguf.RopeScalingType.YARN), ("add_rope_scaling_factor", 4.0),
         ("add_rope_scaling_orig_ctx_len", 24), ("add_rope_scaling_yarn_beta_fast", 32.0),
         ("add_rope_scaling_yarn_beta_slow", 1.0), ("add_rope_scaling_yarn_log_mul", 0.1)],
        SAME_LATENT, other=OF_CACHE),
    "deepseek_v2": Case(
        "deepseek2", "DeepseekV2", dict(
            LATENT, topk_method="group_limited_greedy", n_group=4, topk_group=2,
            routed_scaling_factor=1.5),
        [*OF_LATENT, *OF_SIZES, ("add_q_lora_rank", 40), ("add_expert_weights_scale", 1.5),
         ("add_expert_group_count", 4), ("add_expert_group_used_count", 2),
         ("add_expert_gating_func", gguf.ExpertGatingFuncType.SOFTMAX)],
        SAME_LATENT, None, other=OF_CACHE),  # the best of a group are two there
    "older deepseek_v2": Case(
        "deepseek2", "DeepseekV2",
        dict(LATENT, q_lora_rank=None, n_group=1, topk_group=1, routed_scaling_factor=1.0),
        [*OF_LATENT, ("add_head_count_kv", 6), ("add_key_length", 20), ("add_value_length", 16)],
        SAME_LATENT, None, older=True, other=OF_CACHE),  # which it tells by their layers
    "glm4_moe_lite": Case(
        "deepseek2", "Glm4MoeLite",
        dict(LATENT, n_group=1, topk_group=1, routed_scaling_factor=1.75),
        [*OF_LATENT, *OF_SIZES, ("add_expert_weights_norm", True), ("add_q_lora_rank", 40),
         ("add_expert_weights_scale", 1.75), ("add_vocab_size", 131), SIGMOID],
        SAME_LATENT, other=(*OF_CACHE, "model_type")),
    "ernie4_5_moe": Case(
        "ernie4_5-moe", "Ernie4_5_Moe",
        dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=32, head_dim=16),
        [*MOE, ("add_expert_feed_forward_length", 32), ("add_expert_shared_count", 2),
         ("add_expert_shared_feed_forward_length", 64), ("add_interleave_moe_layer_step", 1),
         ("add_leading_dense_block_count", 1)], ["moe"]),
}
ALWAYS = ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
          "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
          "tie_word_embeddings"]
N_VOCAB = BASE["vocab_size"]
VOCABULARY = [  # SentencePiece's, for llama.cpp
    ("add_tokenizer_model", "llama"),
    ("add_token_list", ["<unk>", "<s>", "</s>", "<0x0A>", *map(str, range(N_VOCAB - 4))]),
    ("add_token_scores", [0.0] * N_VOCAB),
    ("add_token_types", [2, 3, 3, 6, *[1] * (N_VOCAB - 4)]),
]


class Written(NamedTuple):
    hf: transformers.PreTrainedModel
    path: Path


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    case = CASES[request.param]
    sizes = dict(BASE, hidden_size=96, pad_token_id=0)  # phi3 has no head_dim but dim / n_head
    config_class = getattr(transformers, f"{case.transformers}TextConfig", None)
    config_class = config_class or getattr(transformers, f"{case.transformers}Config")
    config = config_class(**copy.deepcopy({**sizes, **case.settings}))
    torch.manual_seed(0)
    hf = getattr(transformers, f"{case.transformers}ForCausalLM")(config).eval()
    hf.config.allow_global_per_layer_attribute_access = True  # of what differs by layer
    with torch.no_grad():
        biases = [x for name, x in hf.named_buffers() if name.endswith("correction_bias")]
        for parameter in [*hf.parameters(), *biases]:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    path = tmp_path_factory.mktemp("family") / f"{request.param}.gguf"
    write_gguf(path, hf.config, hf.state_dict(), case.arch, [*case.extra, *VOCABULARY],
               older=case.older)
    return Written(hf, path)


def case_of(written: Written) -> Case:
    return CASES[written.path.stem]


def test_the_configuration_is_hugging_faces(written: Written) -> None:
    hf = written.hf.config.to_dict()
    ours = open_checkpoint(written.path).config
    for settings in (hf, ours):  # what they come to, by whatever names
        config = ModelConfig.from_hf(settings)
        settings |= dict(windows=config.windows, moe=config.moe, norm_eps=config.norm_eps)
    for name in [*ALWAYS, *case_of(written).same]:
        if name in hf and name not in case_of(written).other:
            assert ours[name] == hf[name], name
    assert ours["norm_eps"] == pytest.approx(hf["norm_eps"])


def test_the_rotary_embedding_is_hugging_faces(written: Written) -> None:
    hf = written.hf.config.rope_parameters
    ours = open_checkpoint(written.path).config
    if "sliding_attention" in hf and "rope_local_base_freq" in ours:
        assert ours["rope_local_base_freq"] == hf["sliding_attention"]["rope_theta"]
    hf = hf.get("full_attention", hf)
    assert ours["rope_theta"] == hf["rope_theta"]
    scaling = ours.get("rope_scaling") or ours["rope_parameters"]["full_attention"]
    assert scaling.get("rope_type", "none").replace("none", "default") == hf["rope_type"]
    for name in ("factor", "beta_fast", "beta_slow", "truncate", "short_factor", "long_factor"):
        assert scaling.get(name) == hf.get(name), name


def expert_tensors(name: str, stack: Tensor, arch: str) -> Iterator[tuple[str, Tensor]]:
    """transformers' stacks of all experts -> each expert's tensors by their usual names."""
    prefix, part = name.split("experts.")
    kind = "bias" if part.endswith("_bias") else "weight"
    for number, tensor in enumerate(stack):
        if arch == "gpt-oss" and kind == "weight":
            tensor = tensor.T
        if part.startswith("down"):
            yield f"{prefix}experts.{number}.down_proj.{kind}", tensor
            continue
        halves = (tensor[0::2], tensor[1::2]) if arch == "gpt-oss" else tensor.chunk(2)
        for half, of_it in zip(("gate", "up"), halves, strict=True):
            yield f"{prefix}experts.{number}.{half}_proj.{kind}", of_it


def test_every_tensor_is_hugging_faces(written: Written) -> None:
    checkpoint = open_checkpoint(written.path)
    wanted = {}
    for name, tensor in written.hf.state_dict().items():
        if re.search(r"experts\.\w+$", name):
            wanted |= dict(expert_tensors(name, tensor, case_of(written).arch))
        elif ".act_fn." in name:  # which is read from the settings
            continue
        elif name.endswith("in_proj_qkvz.weight") and not case_of(written).older:
            config = ModelConfig.from_hf(written.hf.config.to_dict())
            wanted[name] = by_part(config, name)(tensor)
        elif name != "lm_head.weight" or not written.hf.config.tie_word_embeddings:
            name = name.replace(".moe_statics", "")
            wanted[name.replace(".expert_bias", ".gate.e_score_correction_bias")] = tensor
    checkpoint.check_names(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(checkpoint.read(name, tuple(tensor.shape)), tensor)


def test_the_model_is_hugging_faces(written: Written) -> None:
    tokens = torch.arange(3, 27)[None]
    model = load_model(written.path, dtype=torch.float32)
    model.setup_caches(1, 32)
    close(model(tokens, torch.zeros(1, dtype=torch.int32)), hf_logits(written.hf, tokens))


def test_the_inputs_of_gemmas_layers_stay_integers(tmp_path: Path) -> None:
    case = CASES["gemma4_text"]
    sizes = dict(BASE, hidden_size=96, intermediate_size=96, pad_token_id=0, **case.settings)
    sizes["hidden_size_per_layer_input"] = 32
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(**copy.deepcopy(sizes))
    hf = transformers.Gemma4ForCausalLM(config)
    hf.config.allow_global_per_layer_attribute_access = True
    extra = [*case.extra, ("add_feed_forward_length", [96, 96, 192, 192]),
             ("add_embedding_length_per_layer_input", 32)]
    path = write_gguf(tmp_path / "m.gguf", hf.config, hf.state_dict(), "gemma4", extra,
                      lambda name: GGML.Q8_0)
    logits = []
    for quantize in "auto", "none":
        model = load_model(path, dtype=torch.float32, quantize=quantize)
        model.setup_caches(1, 32)
        logits.append(model(torch.arange(3, 27)[None], torch.zeros(1, dtype=torch.int32)))
    close(*logits, 3e-2)  # inputs are rounded to int8
    tables = load_model(path).embed_tokens_per_layer, load_model(path).embed_tokens
    assert all(hasattr(each, "table") for each in tables)


LARGE = dict(hidden_size=256, intermediate_size=256, num_attention_heads=8)
KEPT = {  # class, architecture, settings, and what their files say
    "qwen35": ("Qwen3_5", DELTA | dict(linear_num_value_heads=4, linear_value_head_dim=64),
               [*OF_DELTA, SECTIONS, ("add_ssm_time_step_rank", 4), ("add_ssm_inner_size", 256)]),
    "qwen3next": ("Qwen3Next", DELTA | EXPERTS | dict(
        linear_num_value_heads=4, linear_value_head_dim=64, shared_expert_intermediate_size=256,
    ), [*OF_DELTA, *OF_SHARING, ("add_ssm_time_step_rank", 4), ("add_ssm_inner_size", 256),
        ("add_expert_shared_feed_forward_length", 256)]),
    "deepseek2": ("DeepseekV3", LATENT | dict(
        q_lora_rank=256, num_attention_heads=16, num_key_value_heads=16,
        moe_intermediate_size=256, n_group=1, topk_group=1,
    ), [*OF_LATENT, *OF_SIZES, SIGMOID, ("add_q_lora_rank", 256),
        ("add_expert_feed_forward_length", 256)]),
    "glm4": ("Glm4", dict(num_attention_heads=16), [("add_rope_dimension_count", HALF)]),
}


def kept_file(
    folder: Path, arch: str, kind: GGML, changes: dict[str, Tensor] | None = None
) -> Path:
    """A file of KEPT with matrices of that kind, and some tensors replaced."""
    name, settings, extra = KEPT[arch]
    kind_of_config = getattr(transformers, f"{name}TextConfig", None)
    kind_of_config = kind_of_config or getattr(transformers, f"{name}Config")
    config = kind_of_config(**{**BASE, "pad_token_id": 0, **LARGE, **settings})
    with torch.device("meta"):
        hf = getattr(transformers, f"{name}ForCausalLM")(config)
    state = {name: torch.rand(x.shape) for name, x in hf.state_dict().items()}
    return write_gguf(
        folder / "m.gguf", config, state, arch, extra,
        lambda name: GGML.F32 if "conv1d" in name or "gate_inp" in name else kind,
        changes=changes)


@pytest.mark.parametrize("arch", KEPT)
@pytest.mark.parametrize("kind", [GGML.Q8_0, GGML.Q4_0, GGML.Q6_K], ids=lambda kind: kind.name)
def test_integers_stay_whatever_their_order(tmp_path: Path, arch: str, kind: GGML) -> None:
    """Of every product, and they stand for the numbers that their tensors stand for."""
    path = kept_file(tmp_path, arch, kind)
    kept = load_model(path, dtype=torch.float32)
    plain = load_model(path, dtype=torch.float32, quantize="none")
    layers = {name: x for name, x in plain.named_modules() if type(x) is Linear}
    assert len(layers) > 10
    for name, layer in layers.items():
        ours = kept.get_submodule(name)
        if ".experts." not in name:
            assert isinstance(ours, QuantizedLinear)
            size = layer.weight.abs().max()
            values = ours.values(slice(0, len(layer.weight)), torch.float32)
            close(values / size, layer.weight / size, 1e-2)  # scales are bfloat16


def baichuan_file(path: Path, n_layer: int) -> tuple[Path, Tensor]:
    """A GGUF file of a Baichuan of that many layers -> it, and W_pack of the first one."""
    q, k, v = torch.randn(3, 64, 64).unbind()
    writer = gguf.GGUFWriter(path, "baichuan")
    writer.add_block_count(n_layer)
    writer.add_embedding_length(64)
    writer.add_context_length(4096)
    writer.add_head_count(4)
    writer.add_tensor_data_layout("Meta AI original pth")
    writer.add_rope_dimension_count(16)
    for name, tensor in (("q", interleave(q, 4)), ("k", interleave(k, 4)), ("v", v)):
        writer.add_tensor(f"blk.0.attn_{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, torch.cat((q, k, v))


@pytest.mark.parametrize("n_layer, context", [
    (32, "max_position_embeddings"),
    (40, "model_max_length"),  # as the 13B models call it, which have no rotary embedding
])
def test_baichuan_is_joined_again(tmp_path: Path, n_layer: int, context: str) -> None:
    path, joined = baichuan_file(tmp_path / "m.gguf", n_layer)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["model_type"] == "baichuan"
    assert checkpoint.config[context] == 4096
    assert ("max_position_embeddings" in checkpoint.config) == (n_layer == 32)
    name = "model.layers.0.self_attn.W_pack.weight"
    checkpoint.check_names([name])
    assert torch.equal(checkpoint.read(name, (192, 64)), joined)


def test_an_experts_blocks_are_its_own(tmp_path: Path) -> None:
    """An expert of a quantized stack is read without the others."""
    raw = random_blocks((4 * 64, 32), GGML.Q8_0).reshape(4, 64, -1)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(1)
    writer.add_expert_count(4)
    writer.add_tensor("blk.0.ffn_up_exps.weight", raw, raw_dtype=GGML.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(path)
    for number in range(4):
        name = f"model.layers.0.mlp.experts.{number}.up_proj.weight"
        want = gguf.dequantize(raw[number], GGML.Q8_0)
        assert np.array_equal(checkpoint.read(name, (64, 32)), want)
        [blocks] = checkpoint.blocks(name, (64, 32))
        q, scale, zero = blocks.affine(slice(5, 60))
        assert np.allclose(q * scale + zero, want[5:60], atol=1e-6)


@pytest.mark.parametrize("arch, name, tensor, message", [
    ("qwen35", "blk.0.ssm_a", torch.ones(4), "A_log has numbers that are not finite"),
    ("qwen35", "blk.0.ssm_dt.bias", torch.ones(3), "ssm_dt.bias has shape .3,., expected .4,."),
    ("deepseek2", "blk.0.attn_k_b.weight", torch.ones(16, 24, 9), "kv_b_proj.* has shape"),
    ("deepseek2", "blk.0.attn_k_b.weight", torch.ones(16, 9, 12), "makes no sense"),
    ("deepseek2", "blk.0.attn_v_b.weight", torch.ones(24), "makes no sense"),
    ("qwen3next", "blk.1.ffn_up_exps.weight", torch.ones(5, 32, 256), r"\(5, .*expected \(4, "),
    ("qwen3next", "blk.1.ffn_up_exps.weight", torch.ones(3, 32, 256), r"\(3, .*expected \(4, "),
])
def test_parts_that_do_not_fit_are_refused(
    tmp_path: Path, arch: str, name: str, tensor: Tensor, message: str
) -> None:
    path = kept_file(tmp_path, arch, GGML.Q8_0, {name: tensor})
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_value_heads_that_cut_groups_of_inputs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    random = random_blocks((64, 96), GGML.Q8_0)
    writer = gguf.GGUFWriter(path, "qwen35")
    for add, n in ((writer.add_block_count, 1), (writer.add_ssm_inner_size, 96),
                   (writer.add_ssm_group_count, 2), (writer.add_ssm_time_step_rank, 4)):
        add(n)
    writer.add_tensor("blk.0.ssm_out.weight", random, raw_dtype=GGML.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="ssm_out.weight do not move in whole groups of 32"):
        open_checkpoint(path).blocks("model.layers.0.linear_attn.out_proj.weight", (64, 96))


def metadata(arch: str, settings: dict[str, int]) -> dict[str, int | str]:
    """What a file says of a small model, and these settings."""
    sizes = {
        "embedding_length": 64, "feed_forward_length": 96, "attention.head_count": 4,
        "attention.head_count_kv": 2, "context_length": 96,
    }
    own = {f"{arch}.{name}": value for name, value in (sizes | settings).items()}
    return {"general.architecture": arch, **own}


def config_of(meta: dict[str, int | str]) -> ModelConfig:
    """Of a file without tensors."""
    hf, _ = hf_config(meta, {})
    return ModelConfig.from_hf(hf | {"vocab_size": 100})


@pytest.mark.parametrize("arch, experts", [
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen2moe", {"expert_count": 4, "expert_used_count": 2}),
    ("qwen3moe", {"expert_count": 4, "expert_used_count": 2}),
])
def test_a_qwen_has_a_window_only_if_its_file_says_so(arch: str, experts: dict[str, int]) -> None:
    meta = metadata(arch, {"block_count": 40, **experts})
    config = config_of(meta)
    assert set(config.windows) == {None}
    meta[f"{arch}.attention.sliding_window"] = 8
    config = config_of(meta)
    assert 8 in config.windows


@pytest.mark.parametrize("arch, more", [
    ("glm4moe", {}),
    ("qwen35", {"ssm.inner_size": 64, "ssm.time_step_rank": 4}),
    ("deepseek2", {"rope.dimension_count": 8, "attention.key_length": 20,
                   "attention.value_length": 16}),
])
def test_layers_that_guess_further_tokens_are_left_out(arch: str, more: dict[str, int]) -> None:
    settings = {"block_count": 4, "nextn_predict_layers": 1, "expert_count": 4, **more}
    config, file = hf_config(metadata(arch, settings), {})
    assert config["num_hidden_layers"] == 3
    checkpoint = GGUFCheckpoint(Path("m.gguf"), config, {}, file)
    assert checkpoint.is_harmless("blk.3.nextn.eh_proj.weight")
    assert not checkpoint.is_harmless("blk.2.attn_q.bias")


def test_deepseeks_experts_are_scored_as_its_file_says() -> None:
    sizes = {"block_count": 2, "rope.dimension_count": 8, "attention.key_length": 20,
             "attention.value_length": 16}
    biased = {"blk.1.exp_probs_b.bias": None}
    for score, tensors, family in ((0, {}, "deepseek_v2"), (0, biased, "deepseek_v3"),
                                   (1, {}, "deepseek_v2"), (2, {}, "deepseek_v3")):
        config, _ = hf_config(metadata("deepseek2", sizes | {"expert_gating_func": score}), tensors)
        assert config["model_type"] == family
    with pytest.raises(ValueError, match="unsupported expert_weights_norm"):
        hf_config(metadata("deepseek2", sizes | {"expert_weights_norm": True}), {})


@pytest.mark.parametrize("rope, kind, factor", [
    ({"scaling.factor": 4.0}, "linear", None),  # as llama.cpp takes one without a type
    ({"scaling.factor": 0.0}, "default", None),
    ({"scaling.type": "yarn", "scaling.factor": 4.0}, "yarn", None),
    ({"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.attn_factor": 1.5}, "yarn",
     1.5 * (1 + 0.1 * math.log(4))),
    ({"scaling.attn_factor": 1.0}, "default", None),
])
def test_ropes_are_scaled_as_llama_cpp_does(rope: dict, kind: str, factor: float | None) -> None:
    settings = {f"rope.{key}": value for key, value in rope.items()}
    config, _ = hf_config(metadata("llama", settings | {"block_count": 1}), {})
    scaling = config["rope_scaling"]
    assert scaling["rope_type"] == kind
    assert scaling.get("attention_factor") == (None if factor is None else pytest.approx(factor))


def test_an_attention_factor_of_other_ropes_is_refused() -> None:
    with pytest.raises(ValueError, match="rope.scaling.attn_factor 1.5 of rope default"):
        config_of(metadata("llama", {"rope.scaling.attn_factor": 1.5}))


@pytest.mark.parametrize("arch", ["gemma2", "qwen3moe", "gpt-oss"])
def test_impossible_numbers_of_layers_are_not_gone_through(arch: str) -> None:
    with pytest.raises(ValueError, match="num_hidden_layers = 100000: it must be at most 2048"):
        config_of(metadata(arch, {"block_count": 100_000}))


def test_a_number_of_dense_layers_beyond_those_there_are_takes_no_memory() -> None:
    hf = transformers.DeepseekV3Config(**BASE | LATENT, n_group=1, topk_group=1).to_dict()
    tracemalloc.start()
    config = ModelConfig.from_hf(hf | dict(first_k_dense_replace=2**22))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1e6 and not any(config.moe.layers)


@pytest.mark.parametrize("arch, setting, message", [
    ("mamba", (), "architecture 'mamba'; supported: llama"),
    ("llama", ("add_clamp_kqv", 8.0), "llama.attention.clamp_kqv = 8.0"),
    ("qwen2", ("add_rope_dimension_sections", [4, 2, 2, 0]), "qwen2.rope.dimension_sections"),
    ("llama", ("add_rope_scaling_yarn_attn_factor", 2.0), "yarn_attn_factor = 2.0"),
    ("stablelm", ("add_parallel_residual", True), "stablelm.use_parallel_residual = True"),
])
def test_what_is_unknown_is_refused_by_name(
    tmp_path: Path, arch: str, setting: tuple, message: str
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", arch)
    if setting:
        getattr(writer, setting[0])(*setting[1:])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "m.gguf")


def test_llama_cpp_reads_it_as_we_do(written: Written) -> None:
    """What the tests write is what llama.cpp understands by these files."""
    pytest.importorskip("llama_cpp", reason="needs pip install llama-cpp-python==0.3.36")
    if case_of(written).tol is None:
        pytest.skip("llama.cpp knows no such files")
    tokens = list(range(3, 27))
    logits = llama_cpp_logits(written.path, tokens)
    close(logits, hf_logits(written.hf, torch.tensor([tokens]))[0], case_of(written).tol)


def llama_cpp_logits(path: Path, tokens: list[int]) -> Tensor:
    """llama.cpp's logits of every token, with a cache in float32."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,
        type_k=0, type_v=0, flash_attn=False)
    model.eval(tokens)
    logits = torch.tensor(model.scores[:len(tokens)])
    model.close()
    return logits
