"""What several test files use: random checkpoints, vocabularies, running the command line."""
import copy
import fcntl
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as GGML
from safetensors.torch import save_file
from torch import Tensor

import generate
from formats.checkpoint import CheckedCheckpoint
from formats.pretokenizers import PRE_TOKENIZERS
from model import ModelConfig, Transformer
from quantize import cache_folder

HERE = Path(__file__).resolve().parent.parent  # where generate.py is
LLAMA_CPP = "llama-cpp-python==0.3.36"  # a reference; its sources have vocabularies
CUDA = torch.cuda.is_available()
DEVICES = ["cpu", "cuda"] if CUDA else ["cpu"]
# for processes that are to run as a user's do
CPU_ENV = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

# --- random checkpoints, made by transformers ---

BASE = dict(
    vocab_size=131,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=72,
    max_position_embeddings=96,
    bos_token_id=1,
    eos_token_id=2,
)
SEVEN = dict(num_attention_heads=7, num_key_value_heads=1, hidden_size=56)
CONFIG = dict(model_type="llama", architectures=["LlamaForCausalLM"], **BASE)
LINEAR_ROPE = dict(rope_type="linear", factor=4.0)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN_ROPE = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=24)
OTHER_THETA = dict(rope_type="default", rope_theta=500000.0)
BIASES = dict(attention_bias=True, mlp_bias=True)
WINDOW_FIRST = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA2 = dict(
    sliding_window=9,
    query_pre_attn_scalar=20,
    attn_logit_softcapping=3.0,
    final_logit_softcapping=5.0,
)
GEMMA3 = dict(
    sliding_window=9,
    layer_types=WINDOW_FIRST,
    query_pre_attn_scalar=20,
    rope_scaling=LINEAR_ROPE,
)
# of which layers 3 and 4 attend to the keys of 1 and 2
GEMMA4 = dict(
    num_hidden_layers=5, sliding_window=9, layer_types=[*WINDOW_FIRST, *WINDOW_FIRST[:2]],
    num_kv_shared_layers=2, global_head_dim=32, use_double_wide_mlp=True,
    hidden_size_per_layer_input=8, vocab_size_per_layer_input=131, final_logit_softcapping=5.0,
)
# whose layers that see all have keys for values
GEMMA4_UNIFIED = dict(
    sliding_window=9, layer_types=[*WINDOW_FIRST[:2], "full_attention"], global_head_dim=32,
    attention_k_eq_v=True, num_global_key_value_heads=1,
)
GEMMA4_MOE = GEMMA4_UNIFIED | dict(
    hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=8, top_k_experts=3,
    moe_intermediate_size=32,
)
GRANITE = dict(
    embedding_multiplier=12.0,
    attention_multiplier=0.1,
    residual_multiplier=0.22,
    logits_scaling=3.0,
)
PHI3 = dict(pad_token_id=0, hidden_size=96)  # of which its heads are six parts
# a head's eight, or six, frequencies: for texts of at most 24 tokens, and for longer ones; recent
# transformers ask for that length beside them
LONGROPE = dict(
    rope_type="longrope",
    original_max_position_embeddings=24,
    short_factor=[1.0, 1.1, 1.2, 1.3, 1.5, 1.8, 2.0, 2.5],
    long_factor=[1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0],
)
PARTIAL_LONGROPE = LONGROPE | dict(
    partial_rotary_factor=0.75,
    short_factor=LONGROPE["short_factor"][:6],
    long_factor=LONGROPE["long_factor"][:6],
)
DELTA = dict(
    num_hidden_layers=4, head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=16, linear_value_head_dim=24,
)
MANY_EXPERTS = dict(
    num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32,
    shared_expert_intermediate_size=40,
)
# name -> transformers' class, settings that differ from BASE
CHECKPOINTS = {
    "llama": ("Llama", {}),
    "llama-tied-bias": ("Llama", dict(tie_word_embeddings=True, **BIASES, **SEVEN)),
    "llama-linear": ("Llama", dict(rope_scaling=LINEAR_ROPE)),
    "llama-llama3": ("Llama", dict(rope_scaling=LLAMA3_ROPE, head_dim=32)),
    "llama-yarn": ("Llama", dict(rope_scaling=YARN_ROPE)),
    "llama-theta": ("Llama", dict(rope_parameters=OTHER_THETA)),
    "llama-head-of-100": ("Llama", dict(head_dim=100)),
    "mistral": ("Mistral", dict(sliding_window=9, **SEVEN)),
    "mistral-full": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2-window": (
        "Qwen2", dict(use_sliding_window=True, sliding_window=7, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(SEVEN, head_dim=24)),
    "gemma": ("Gemma", SEVEN),
    "gemma2": ("Gemma2", GEMMA2),
    "gemma2-seven": ("Gemma2", GEMMA2 | SEVEN),
    "gemma3": ("Gemma3Text", GEMMA3),
    "gemma3-seven": ("Gemma3Text", GEMMA3 | SEVEN),
    "gemma4": ("Gemma4Text", GEMMA4),
    "gemma4-unified": ("Gemma4UnifiedText", GEMMA4_UNIFIED),
    "gemma4-moe": ("Gemma4Text", GEMMA4_MOE),
    "phi3": ("Phi3", dict(PHI3, sliding_window=9)),
    "phi3-longrope": ("Phi3", PHI3 | SEVEN | dict(
        hidden_size=112, rope_parameters=LONGROPE, original_max_position_embeddings=24)),
    "phi4": ("Phi3", dict(
        PHI3, rope_parameters=PARTIAL_LONGROPE, tie_word_embeddings=True,
        original_max_position_embeddings=24)),
    "olmo2": ("Olmo2", {}),
    "olmo2-seven": ("Olmo2", SEVEN),
    "olmo3": ("Olmo3", dict(sliding_window=9, layer_types=WINDOW_FIRST, rope_scaling=YARN_ROPE)),
    "smollm3": ("SmolLM3", dict(no_rope_layer_interval=2, pad_token_id=0)),
    "smollm3-seven": ("SmolLM3", dict(no_rope_layers=[0, 1, 1], pad_token_id=0, **SEVEN)),
    "granite": ("Granite", GRANITE),
    "granite-seven": ("Granite", GRANITE | SEVEN),
    "gpt-oss": ("GptOss", dict(
        num_local_experts=8, num_experts_per_tok=3, layer_types=WINDOW_FIRST, sliding_window=9,
        rope_parameters=dict(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=24, truncate=False,
            rope_theta=150000.0, beta_fast=32.0, beta_slow=1.0))),
    "gpt-oss-mxfp4": ("GptOss", dict(
        num_local_experts=4, num_experts_per_tok=2, hidden_size=64, intermediate_size=96)),
    "gpt-oss-seven": ("GptOss", dict(num_local_experts=4, num_experts_per_tok=2, **SEVEN)),
    "lfm2": ("Lfm2", dict(
        hidden_size=96, layer_types=["conv", "full_attention", "conv"], block_multiple_of=8,
        conv_L_cache=4, conv_bias=True)),
    "lfm2-moe": ("Lfm2Moe", dict(
        hidden_size=96, layer_types=["conv", "full_attention", "conv"], num_dense_layers=1,
        num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32)),
    "mixtral": ("Mixtral", dict(num_local_experts=4, sliding_window=9, **SEVEN)),
    "qwen2-moe": ("Qwen2Moe", dict(
        num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32, mlp_only_layers=[0],
        shared_expert_intermediate_size=40)),
    "qwen3-moe": ("Qwen3Moe", dict(
        num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32, norm_topk_prob=True,
        decoder_sparse_step=2, **SEVEN)),
    "qwen3.5": ("Qwen3_5Text", DELTA),
    "qwen3.5-moe": ("Qwen3_5MoeText", DELTA | MANY_EXPERTS),
    "qwen3-next": ("Qwen3Next", DELTA | MANY_EXPERTS | dict(linear_num_key_heads=4)),
}
CHECKPOINTS |= {
    "ministral": ("Ministral", dict(sliding_window=9, layer_types=WINDOW_FIRST)),
    "ministral3": ("Ministral3", dict(rope_parameters=dict(
        YARN_ROPE, rope_theta=1e6, factor=16.0, original_max_position_embeddings=11,
        mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1), sliding_window=9,
        pad_token_id=0)),
    "seed-oss": ("SeedOss", SEVEN),
    "exaone4": ("Exaone4", dict(sliding_window=9, layer_types=WINDOW_FIRST)),
    "exaone4-full": ("Exaone4", dict(sliding_window=None, layer_types=["full_attention"] * 3)),
    "glm4": ("Glm4", dict(pad_token_id=0, **SEVEN)),
    "hunyuan": ("HunYuanDenseV1", dict(rope_parameters=dict(
        rope_type="dynamic", rope_theta=1e4, alpha=50.0, factor=1.0, mscale_all_dim=1.0))),
    "ernie": ("Ernie4_5", dict(use_bias=True)),
    "cohere2": ("Cohere2", dict(hidden_size=96, sliding_window=9, layer_types=WINDOW_FIRST)),
    "starcoder2": ("Starcoder2", dict(hidden_size=96, sliding_window=9)),
    "stablelm": ("StableLm", dict(hidden_size=96, use_qkv_bias=True)),
    "phi": ("Phi", dict(hidden_size=96)),
    "neox": ("GPTNeoX", dict(hidden_size=96, num_key_value_heads=6)),
    "neox-in-turn": ("GPTNeoX", dict(
        hidden_size=96, num_key_value_heads=6, use_parallel_residual=False, rotary_pct=0.5,
        rotary_emb_base=3000.0)),
    "apertus": ("Apertus", dict(rope_parameters=dict(LLAMA3_ROPE, rope_theta=12e6))),
    "hunyuan-moe": ("HunYuanMoEV1", dict(num_experts=8, moe_topk=[3] * 3, rope_parameters=dict(
        rope_type="dynamic", rope_theta=1e4, alpha=50.0, factor=1.0, mscale_all_dim=1.0))),
}
LATENT = dict(
    kv_lora_rank=24, q_lora_rank=40, qk_nope_head_dim=12, qk_rope_head_dim=8, head_dim=8,
    v_head_dim=16, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=32,
    num_key_value_heads=6)
CHECKPOINTS |= {
    "deepseek-v2": ("DeepseekV2", dict(
        LATENT, topk_method="group_limited_greedy", n_group=4, topk_group=2,
        routed_scaling_factor=1.5, first_k_dense_replace=2)),
    "deepseek-v2-lite": ("DeepseekV2", dict(LATENT, q_lora_rank=None, n_group=1, topk_group=1)),
    "deepseek-v3": ("DeepseekV3", dict(
        LATENT, n_group=4, topk_group=2, first_k_dense_replace=1, rope_parameters=dict(
            YARN_ROPE, rope_theta=1e4, mscale=1.0, mscale_all_dim=0.7))),
    "glm4-lite": ("Glm4MoeLite", dict(LATENT, v_head_dim=20, rope_interleave=False)),
    "mistral4": ("Mistral4", dict(
        LATENT, head_dim=20, first_k_dense_replace=1, rope_parameters=dict(
            YARN_ROPE, rope_theta=1e4, original_max_position_embeddings=11, mscale=1.0,
            mscale_all_dim=1.0, llama_4_scaling_beta=0.1, partial_rotary_factor=0.4))),
    "glm4-moe": ("Glm4Moe", dict(
        n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=32, head_dim=16,
        use_qk_norm=True, attention_bias=True)),
    "minimax": ("MiniMaxM2", dict(num_local_experts=8, num_experts_per_tok=3, rotary_dim=8)),
    "ernie-moe": ("Ernie4_5_Moe", dict(
        moe_num_experts=8, moe_k=3, moe_intermediate_size=32)),
}
PROMPTS = [[5, 6, 7], [9], list(range(10, 40))]


def random_hf(name: str, **changes: object) -> transformers.PreTrainedModel:
    """A random transformers model with the settings of CHECKPOINTS[name], but for the changes;
    biases and norms too are random."""
    family, settings = CHECKPOINTS[name]
    # a copy, as transformers writes into its arguments
    settings = copy.deepcopy({**BASE, **settings, **changes})
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(0)
    make = getattr(transformers, f"{family}ForCausalLM", None)
    hf = (make or transformers.AutoModelForCausalLM.from_config)(config).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            if name.endswith("q_norm.weight") and family.startswith("Gemma4"):
                parameter *= 0.2  # as scores are not scaled, those of trained models are small too
        for name, buffer in hf.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias", "layer_scalar")):
                buffer.add_(torch.randn_like(buffer) * 0.3)
    return hf


def hf_logits(hf: transformers.PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return hf(tokens).logits


def random_tokens(*shape: int) -> Tensor:
    """Tokens of the random checkpoints' vocabulary, the same at every call."""
    return torch.randint(131, shape, generator=torch.Generator().manual_seed(1))


def positions(*depths: int, device: str = "cpu") -> Tensor:
    """input_pos: how many tokens each row has cached."""
    return torch.tensor(depths, dtype=torch.int32, device=device)


def close(a: Tensor, b: Tensor, tol: float = 2e-4) -> None:
    """Assert that a is b, but for tol of b's largest value, or of 1 if that is smaller."""
    assert a.shape == b.shape
    assert torch.isfinite(a).all()
    largest = b.abs().max().item()
    assert (a.cpu() - b.cpu()).abs().max() < tol * max(1.0, largest)


INTERLEAVED = ("llama", "smollm3", "granite", "baichuan", "mistral3")  # architectures of GGUF files


def write_gguf(path: Path, config: transformers.PreTrainedConfig, state: dict[str, Tensor],
               arch: str = "llama", extra: Sequence[tuple] = (),
               kind_of: Callable[[str], GGML] = lambda name: GGML.F32, older: bool = False,
               changes: dict[str, Tensor] | None = None) -> Path:
    """A GGUF file as llama.cpp's converter writes it. extra: further (method of gguf.GGUFWriter,
    *its arguments). kind_of: a matrix's name in the file -> its type; quantized ones are random.
    older: one that has in_proj_qkvz and kv_b_proj whole. changes: other tensors, by the file's
    names."""
    writer = gguf.GGUFWriter(path, arch)
    rope = config.rope_parameters
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(ModelConfig.from_hf(config.to_dict()).norm_eps)
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    for kind in ("alpha_p", "alpha_n"):  # of Apertus's activation
        numbers = [x.item() for name, x in state.items() if name.endswith(f"act_fn.{kind}")]
        if numbers:
            getattr(writer, f"add_xielu_{kind}")(numbers)
    [gguf_arch] = [number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch]
    names = gguf.get_tensor_name_map(gguf_arch, config.num_hidden_layers)
    for name, tensor in as_converted(state, config, arch, older):
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        tensor = (changes or {}).get(theirs, tensor)
        kind = kind_of(theirs) if tensor.dim() == 2 else GGML.F32
        if kind == GGML.F32:
            writer.add_tensor(theirs, tensor.contiguous().numpy())
        else:
            writer.add_tensor(theirs, random_blocks(tuple(tensor.shape), kind), raw_dtype=kind)
    for method, *arguments in extra:
        getattr(writer, method)(*arguments)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_converted(
    state: dict[str, Tensor], config: transformers.PreTrainedConfig, arch: str, older: bool
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of transformers as llama.cpp's converter changes them, but for their names."""
    heads = dict(q_proj=config.num_attention_heads, k_proj=config.num_key_value_heads)
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module = name.split(".")[-2]
        if arch in INTERLEAVED and module in heads:
            tensor = interleave(tensor, heads[module])
        shifted = arch in ("gemma", "gemma2", "gemma3", "qwen35", "qwen35moe", "qwen3next")
        if shifted and name.endswith("norm.weight") and ".linear_attn." not in name:
            tensor = tensor + 1
        if module == "act_fn":
            continue
        if module == "query_key_value":  # of a head together: all heads of each
            by_head = tensor.unflatten(0, (config.num_attention_heads, 3, -1))
            tensor = by_head.transpose(0, 1).flatten(0, 2)
        if name.endswith("expert_bias"):
            name = f"{name}.bias"
        if name.endswith(("sinks", "layer_scalar")):
            name = f"{name}.weight"
        if name.endswith(("conv.conv.weight", "conv1d.weight")):
            tensor = tensor.squeeze(1)
        if arch == "qwen35moe" and module == "shared_expert_gate":
            tensor = tensor.squeeze(0)  # as llama.cpp's quantizer does
        name = name.replace("_correction_bias", "_correction.bias")
        name = name.replace(".gate.moe_statics.", ".moe_statics.")
        if module == "experts":
            yield from stacks(name, tensor, arch)
        elif ".linear_attn." in name and not (older and "in_proj_qkvz" in name):
            yield from delta_tensors(name, tensor, config, arch)
        elif module == "kv_b_proj" and not older:
            parts = tensor.view(config.num_attention_heads, -1, config.kv_lora_rank)
            k, v = parts.split([config.qk_nope_head_dim, config.v_head_dim], 1)
            yield name.replace("kv_b_proj", "k_b_proj"), k.mT
            yield name.replace("kv_b_proj", "v_b_proj"), v
        else:
            yield name, tensor


def delta_tensors(
    name: str, tensor: Tensor, config: transformers.PreTrainedConfig, arch: str
) -> Iterator[tuple[str, Tensor]]:
    """Those of a layer with a state: Qwen3.5's value heads go round the key heads, Qwen3-Next's
    inputs are the queries of all heads, then their keys, and so on."""
    n_k, n_v = config.linear_num_key_heads, config.linear_num_value_heads
    k_dim, v_dim = config.linear_key_head_dim, config.linear_value_head_dim
    keys = n_k * k_dim * 2
    if name.endswith("A_log"):
        tensor = -tensor.exp()
    if "in_proj_qkvz" in name:
        v = n_v // n_k * v_dim
        parts = tensor.unflatten(0, (n_k, -1)).split([k_dim, k_dim, v, v], 1)
        q, k, v, z = (part.flatten(0, 1) for part in parts)
        yield name.replace("qkvz", "qkv"), torch.cat([q, k, v])
        yield name.replace("qkvz", "z"), z
        return
    if arch != "qwen3next" and not name.endswith("norm.weight"):
        dim = int("out_proj" in name)
        first = keys if "conv1d" in name or "in_proj_qkv" in name else 0
        rest = tensor.narrow(dim, first, tensor.shape[dim] - first)
        rest = rest.unflatten(dim, (n_k, n_v // n_k, -1)).transpose(dim, dim + 1)
        tensor = torch.cat([tensor.narrow(dim, 0, first), rest.flatten(dim, dim + 2)], dim)
    yield name.replace(".dt_bias", ".dt_proj.bias"), tensor


def stacks(name: str, tensor: Tensor, arch: str) -> Iterator[tuple[str, Tensor]]:
    """A layer's experts [E, ...] with gate and up apart: gpt-oss has them in turns and its matrices
    transposed."""
    kind = "bias" if name.endswith("_bias") else "weight"
    name = name.removesuffix("_bias")
    if arch == "gpt-oss" and kind == "weight":
        tensor = tensor.transpose(1, 2)  # (E, N, K)
    if name.endswith("down_proj"):
        yield f"{name}.{kind}", tensor
        return
    gate, up = tensor.chunk(2, dim=1)
    if arch == "gpt-oss":
        gate = tensor[:, 0::2]
        up = tensor[:, 1::2]
    yield f"{name.replace('gate_up', 'gate')}.{kind}", gate
    yield f"{name.replace('gate_up', 'up')}.{kind}", up


def interleave(tensor: Tensor, n_head: int) -> Tensor:
    """Rows (H * D, ...) of heads whose halves rotate together -> the halves' rows in turn."""
    halves = tensor.view(n_head, 2, -1, *tensor.shape[1:])  # (H, 2, D/2, ...)
    return halves.transpose(1, 2).reshape(tensor.shape)


# where the blocks of a type have their halves, and how large, for weights of about 0.05
HALVES = {
    GGML.Q4_0: {0: 0.01},
    GGML.Q4_1: {0: 0.01, 2: -0.075},
    GGML.Q5_0: {0: 5e-3},
    GGML.Q5_1: {0: 5e-3, 2: -0.078},
    GGML.Q8_0: {0: 7e-4},
    GGML.Q2_K: {80: 3e-3, 82: 4.5e-3},
    GGML.Q3_K: {108: 1e-3},
    GGML.Q4_K: {0: 2e-4, 2: 1.5e-3},
    GGML.Q5_K: {0: 1e-4, 2: 1.5e-3},
    GGML.Q6_K: {208: 4e-5},
    GGML.MXFP4: {},  # a byte with an exponent
    GGML.IQ3_S: {0: 4e-4},
    GGML.IQ4_NL: {0: 8e-4},
    GGML.IQ4_XS: {0: 5e-5},
}


def random_blocks(shape: tuple[int, int], kind: GGML) -> np.ndarray:
    """A random matrix as it is stored in blocks: any bytes are valid but for the halves."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    N, K = shape
    random = np.random.default_rng(N + K)
    data = random.integers(0, 256, (N * K // block, nbytes), dtype=np.uint8)
    for start, size in HALVES[kind].items():
        scales = size * random.uniform(0.9, 1.1, (len(data), 1))
        data[:, start:start + 2] = scales.astype(np.float16).view(np.uint8)
    if kind == GGML.MXFP4:
        data[:, 0] = random.integers(119, 122, len(data))
    return data.reshape(N, -1)


# --- random checkpoints that need no transformers ---

def empty_model(hf: dict) -> Transformer:
    """What load_model makes of a configuration before it reads a tensor."""
    with torch.device("meta"):
        return CheckedCheckpoint(Path("model"), hf, {}).empty_model()


SMALL = dict(
    model_type="llama",
    vocab_size=320,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=160,
    max_position_embeddings=128,
)


def hf_folder(folder: Path, **changes: object) -> Path:
    """A Hugging Face folder with random weights, SMALL but for the changes."""
    hf = {**SMALL, **changes}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in hf_shapes(hf).items():
        std = 0.2 if len(shape) == 2 else 1.0
        tensors[f"{name}.weight"] = std * torch.randn(shape, generator=generator)
    if hf["model_type"] == "qwen2":
        tensors |= qwen2_biases(hf, generator)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf))
    return folder


def hf_shapes(hf: dict) -> dict[str, tuple[int, ...]]:
    """The modules of a Llama and the shapes of their weights."""
    dim = hf["hidden_size"]
    ffn = hf["intermediate_size"]
    kv = hf["num_key_value_heads"] * dim // hf["num_attention_heads"]
    shapes = {"model.embed_tokens": (hf["vocab_size"], dim), "model.norm": (dim,)}
    if not hf.get("tie_word_embeddings"):
        shapes["lm_head"] = (hf["vocab_size"], dim)
    block = {
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim),
        "self_attn.o_proj": (dim, dim),
        "mlp.gate_proj": (ffn, dim),
        "mlp.up_proj": (ffn, dim),
        "mlp.down_proj": (dim, ffn),
        "input_layernorm": (dim,),
        "post_attention_layernorm": (dim,),
    }
    for i in range(hf["num_hidden_layers"]):
        for name, shape in block.items():
            shapes[f"model.layers.{i}.{name}"] = shape
    return shapes


def qwen2_biases(hf: dict, generator: torch.Generator) -> dict[str, Tensor]:
    """Random biases of q, k and v; large ones on keys, in channels that turn slowly."""
    dim = hf["hidden_size"]
    head_dim = dim // hf["num_attention_heads"]
    kv = hf["num_key_value_heads"] * head_dim
    biases = {}
    for i in range(hf["num_hidden_layers"]):
        for part, n in (("q", dim), ("k", kv), ("v", kv)):
            bias = torch.randn(n, generator=generator)
            if part == "k":
                halves = bias.view(-1, 2, head_dim // 2)  # (H, 2, D/2)
                halves[..., head_dim // 4:] *= 50
            biases[f"model.layers.{i}.self_attn.{part}_proj.bias"] = bias
    return biases


# --- vocabularies ---

AWKWARD = ["", " ", "   x", "\t\n \n", "Hello  world", " leading", "trailing  ", "don't we'LL",
           "3.14159 1234567890", "d\u00e9j\u00e0 \u1e9e", "\u4f60\u597d,\u4e16\u754c\u3002",
           "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f642", "x\r\n\r\ny",
           "<s> </s> <|im_end|>", "def f(x):\n    return x**2\n", "e\u0301 \u00a0 \x00",
           "\u2581under_score"]
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def byte_level_tokenizer(
    special: list[str]
) -> tuple[tokenizers.Tokenizer, list[str], list[list[str]]]:
    """A byte-level BPE tokenizer of 600 tokens, trained on this file, its tokens and its merges."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = PRE_TOKENIZERS["gpt-2"]
    backend.decoder = tokenizers.decoders.ByteLevel()
    bytes_alone = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=bytes_alone)
    backend.train([__file__], trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return backend, tokens, model["merges"]


# --- processes ---

PATIENCE_S = 600  # until what is waited for counts as hanging: longer than a busy machine takes


def wait_until(reached: Callable[[], object]) -> None:
    """Look again and again until something is reached. Nothing is waited for by a time: how much
    another process gets done in one depends on the machine."""
    end = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def state_of(process: int) -> str:
    """What Linux says a process does: R, run; S, wait. Z: it has ended, also where nobody asks for
    its exit code."""
    try:
        _, _, rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return "Z"
    return rest.split()[0]


def read_to_end(terminal: int) -> str:
    """What a terminal has shown when no process has it open any more. It is closed."""
    shown = b""
    with suppress(OSError):  # the end
        while new := os.read(terminal, 10_000):
            shown += new
    os.close(terminal)
    return shown.decode()


def fetched(name: str, fetch: Callable[[Path], Path]) -> Path:
    """A folder in the cache folder: if it is not there yet, what fetch(an empty folder) returns. Of
    processes that ask at once, as those of a run of tests, one fetches it and the others wait."""
    folder = cache_folder() / name
    cache_folder().mkdir(0o700, parents=True, exist_ok=True)  # or a library is refused there
    folder.parent.mkdir(exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as tmp:
                os.replace(fetch(Path(tmp)), folder)  # at once, so that no run sees half of it
    return folder


# --- the command line ---

def ours(stderr: str) -> str:
    """What a program said, without lines that PyTorch logs, as where it finds CUDA and no GPU."""
    return re.sub(r"^[IWE]\d{4} .*\n", "", stderr, flags=re.MULTILINE)


def run_cli(capfd: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """generate.py with these arguments -> (exit code, stdout, stderr)"""
    code = 0
    try:
        generate.main([str(arg) for arg in args])
    except SystemExit as e:
        code = e.code
    out, err = capfd.readouterr()
    return code, out, ours(err)
