"""Models that are no Llamas, in one table. Importing it adds its rows to those of model.py, which
says what a row has. "gguf" is what formats/architectures.py reads."""
from __future__ import annotations

from functools import partial

from families import deltanet, gguf
from families.blocks import (
    AllHeadsAttention, GemmaNorm, GemmaTransformer, GraniteTransformer, PostNormBlock,
    SandwichBlock, ScaledBlock, SinkAttention, SoftcapAttention, baichuan_attention,
    baichuan_ropes, normalize_head,
)
from families.experts import ClampedExperts, mixture_of_experts, mlp_or_moe
from families.rings import RingKVCache
from families.settings import (
    by_pattern, every_other_and_last, gelu_tanh, layer_ropes, longrope, query_scale,
    windows_of, yarn,
)
from model import FAMILIES, LLAMA, MISTRAL, NO_WINDOW, QWEN2, ROPES, Family, positive

__all__ = ["RingKVCache", "windows_of"]  # what model.py takes from here

ROPES |= {"yarn": yarn, "longrope": longrope, "mrope": ROPES["default"]}  # as it is for texts

# --- what a config.json means where it leaves a setting out ---

GEMMA = dict(hidden_act="gelu_pytorch_tanh", attention_bias=False, num_key_value_heads=16,
             head_dim=256, max_position_embeddings=8192, tie_word_embeddings=True)
GEMMA2 = GEMMA | dict(
    hidden_activation="gelu_pytorch_tanh", num_key_value_heads=4, sliding_window=4096,
    sliding_window_pattern=2, layer_types=None, query_pre_attn_scalar=256,
    attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
)
GEMMA3 = GEMMA2 | dict(
    max_position_embeddings=131072, sliding_window_pattern=6, rope_theta=1e6,
    rope_local_base_freq=1e4, attn_logit_softcapping=None, final_logit_softcapping=None,
)
OLMO2 = dict(rms_norm_eps=1e-5, attention_bias=False)
OLMO3 = OLMO2 | dict(layer_types=None, sliding_window=4096, sliding_window_pattern=4,
                     rope_theta=5e5, rope_local_base_freq=5e5)
SMOLLM3 = LLAMA | dict(
    use_sliding_window=False, sliding_window=None, layer_types=None, num_key_value_heads=4,
    max_position_embeddings=32768, rope_theta=2e6, no_rope_layer_interval=4, no_rope_layers=None,
    tie_word_embeddings=True,
)
PHI3 = dict(rms_norm_eps=1e-5, max_position_embeddings=4096, partial_rotary_factor=1.0,
            original_max_position_embeddings=4096, sliding_window=None)
EXPERTS = dict(num_experts=None, num_local_experts=None)  # files have one or the other
MIXTRAL = MISTRAL | EXPERTS | dict(rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None,
                                   num_experts_per_tok=2)
QWEN_MOE = EXPERTS | dict(decoder_sparse_step=1, mlp_only_layers=None, norm_topk_prob=False)
QWEN2_MOE = QWEN2 | QWEN_MOE | dict(
    num_key_value_heads=16, num_experts_per_tok=4, moe_intermediate_size=1408,
    shared_expert_intermediate_size=5632,
)
QWEN3_MOE = QWEN_MOE | dict(
    attention_bias=False, use_sliding_window=False, num_key_value_heads=4, sliding_window=4096,
    max_position_embeddings=32768, num_experts_per_tok=8, moe_intermediate_size=768,
)
GPT_OSS = EXPERTS | dict(
    head_dim=64, num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5,
    rope_theta=150000.0,
    rope_parameters=dict(
        rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
        original_max_position_embeddings=4096,
    ),
    attention_bias=True, layer_types=None, sliding_window=128, sliding_window_pattern=2,
    num_experts_per_tok=4, swiglu_alpha=1.702, swiglu_limit=7.0,
)

DELTA = dict(
    layer_types=None, full_attention_interval=4, partial_rotary_factor=0.25, head_dim=256,
    num_key_value_heads=2, max_position_embeddings=32768, attention_bias=False,
    linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
    linear_value_head_dim=128, linear_conv_kernel_dim=4,
)
DELTA_MOE = DELTA | QWEN_MOE | dict(
    intermediate_size=5632, norm_topk_prob=True, moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
)

# --- the table ---

# layers differ in both
LAYERWISE = dict(windows=partial(windows_of, full_layers=by_pattern), ropes=layer_ropes)
GELU = {"hidden_activation": "gelu_pytorch_tanh"}
MOE_OF_FFN_DIM = {"moe": partial(mixture_of_experts, ffn_dim="intermediate_size")}

DELTA_FIELDS = dict(windows=deltanet.windows, ropes=deltanet.ropes, qk_norm=True)
DELTA_CLASSES = dict(
    norm=GemmaNorm, attention=deltanet.delta_attention, block=deltanet.delta_block,
    model=deltanet.DeltaTransformer,
)

FAMILIES |= {
    "gemma": Family(
        GEMMA, {"act": gelu_tanh}, norm=GemmaNorm, model=GemmaTransformer,
        gguf=dict(name="gemma", norm_shift=1.0),
    ),
    "gemma2": Family(
        GEMMA2, LAYERWISE | {"softmax_scale": query_scale},
        norm=GemmaNorm, attention=SoftcapAttention, block=SandwichBlock, model=GemmaTransformer,
        gguf=dict(name="gemma2", norm_shift=1.0, means=GELU, complete=gguf.gemma),
    ),
    "gemma3_text": Family(
        GEMMA3, LAYERWISE | {"softmax_scale": query_scale, "qk_norm": True},
        norm=GemmaNorm, attention=SoftcapAttention, block=SandwichBlock, model=GemmaTransformer,
        gguf=dict(name="gemma3", norm_shift=1.0, means=GELU | NO_WINDOW, complete=gguf.gemma),
    ),
    "phi3": Family(
        PHI3, stored_joined={"qkv_proj": ("qkv_proj",), "gate_up_proj": ("gate_up_proj",)},
        gguf=dict(name="phi3", complete=gguf.phi3),
    ),
    "olmo2": Family(
        OLMO2, attention=AllHeadsAttention, block=PostNormBlock, gguf=dict(name="olmo2"),
    ),
    "olmo3": Family(
        OLMO3, LAYERWISE, attention=AllHeadsAttention, block=PostNormBlock,
        gguf=dict(name="olmo2", when="attention.sliding_window", complete=gguf.windows),
    ),
    "smollm3": Family(
        SMOLLM3, LAYERWISE,
        gguf=dict(name="smollm3", interleaved=True, means={"no_rope_layer_interval": 4}),
    ),
    "granite": Family(
        LLAMA | {"attention_multiplier": 1.0},
        {"softmax_scale": partial(positive, key="attention_multiplier", kind=float)},
        block=ScaledBlock, model=GraniteTransformer,
        gguf=dict(name="granite", interleaved=True, complete=gguf.granite),
    ),
    "baichuan": Family(
        fields={"ropes": baichuan_ropes}, attention=baichuan_attention,
        stored_joined={"qkv_proj": ("W_pack",)}, convert=normalize_head,
        gguf=dict(
            name="baichuan", interleaved=True, complete=gguf.baichuan,
            # what lies in parts in these files
            parts={"W_pack": ("q_proj", "k_proj", "v_proj")},
        ),
    ),
    "mixtral": Family(
        MIXTRAL, MOE_OF_FFN_DIM, mlp=mlp_or_moe,
        gguf=dict(name="llama", when="expert_count", interleaved=True),
    ),
    "qwen2_moe": Family(
        QWEN2_MOE,
        {
            "qkv_bias": True, "moe": mixture_of_experts,
            "windows": partial(windows_of, full_layers=every_other_and_last),
        },
        mlp=mlp_or_moe,
        gguf=dict(
            name="qwen2moe", means=NO_WINDOW | {"norm_topk_prob": False}, complete=gguf.qwen_moe
        ),
    ),
    "qwen3_moe": Family(  # whose windows are everywhere, whatever a file says of layers
        QWEN3_MOE, {"qk_norm": True, "moe": mixture_of_experts}, mlp=mlp_or_moe,
        gguf=dict(
            name="qwen3moe", means=NO_WINDOW | {"norm_topk_prob": True}, complete=gguf.qwen_moe
        ),
    ),
    "gpt_oss": Family(
        GPT_OSS, LAYERWISE | MOE_OF_FFN_DIM, attention=SinkAttention,
        mlp=partial(mlp_or_moe, kind=ClampedExperts),
        gguf=dict(name="gpt-oss", complete=gguf.gpt_oss),
    ),
    "qwen3_next": Family(
        DELTA_MOE | dict(num_experts_per_tok=10), DELTA_FIELDS | {"moe": mixture_of_experts},
        mlp=mlp_or_moe, convert=deltanet.by_part, **DELTA_CLASSES,
    ),
    "qwen3_5_text": Family(DELTA | dict(num_key_value_heads=4), DELTA_FIELDS, **DELTA_CLASSES),
    "qwen3_5_moe_text": Family(
        DELTA_MOE | dict(num_experts_per_tok=8), DELTA_FIELDS | {"moe": mixture_of_experts},
        mlp=mlp_or_moe, **DELTA_CLASSES,
    ),
}
