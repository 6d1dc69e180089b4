"""Models that are no Llamas, in one table. Importing it adds its rows to those of model.py, which
says what a row has. "gguf" is what formats/architectures.py reads."""
from __future__ import annotations

from functools import partial

import torch.nn as nn

from families import deltanet, gemma4, gguf, lfm2, mla
from families.blocks import (
    AlibiAttention, AllHeadsAttention, BiasedHeadTransformer, FarQueryAttention, GemmaNorm,
    GemmaTransformer, GraniteTransformer, HeadwiseAttention, LateNormAttention, OneNormBlock,
    ParallelBlock, PlainMLP, PostNormBlock, RenamedBlock, SandwichBlock, ScaledBlock,
    ScaledHeadTransformer, SinkAttention, SoftcapAttention, baichuan_ropes, by_rope, halves_first,
    normalize_head, xielu,
)
from families.experts import ClampedExperts, deepseek_moe, ernie_moe, mixture_of_experts, mlp_or_moe
from families.rings import RingKVCache
from families.settings import (
    by_pattern, every_other_and_last, layer_ropes, longrope, neox_ropes, ropes_in_windows,
    ropes_of_part, ropes_outside, stretched_ropes, windows_of, yarn,
)
from model import (
    ACTIVATIONS, FAMILIES, LLAMA, MISTRAL, QWEN2, ROPES, Attention, Block, Family, positive,
)

__all__ = ["RingKVCache", "windows_of"]  # what model.py takes from here

ROPES |= {"yarn": yarn, "longrope": longrope, "proportional": gemma4.proportional,
          "mrope": ROPES["default"]}  # as it is for texts
ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_fast"), ACTIVATIONS["gelu_pytorch_tanh"])
ACTIVATIONS["xielu"] = xielu

# --- what a config.json means where it leaves a setting out ---
# None: nothing, but files may have it. Some settings are refused where a family does not name them.

EXPERTS = dict(num_experts=None, num_local_experts=None)  # files have one or the other
GELU = {"hidden_activation": "gelu_pytorch_tanh"}
GEMMA = dict(hidden_act="gelu_pytorch_tanh", attention_bias=False, head_dim=256,
             tie_word_embeddings=True)
GEMMA2 = GEMMA | GELU | dict(num_key_value_heads=4, sliding_window=4096, sliding_window_pattern=2,
                             layer_types=None, query_pre_attn_scalar=256,
                             attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
GEMMA3 = GEMMA2 | dict(max_position_embeddings=131072, sliding_window_pattern=6, rope_theta=1e6,
                       rope_local_base_freq=1e4, attn_logit_softcapping=None,
                       final_logit_softcapping=None)
GEMMA4 = GEMMA | GELU | EXPERTS | dict(
    num_key_value_heads=4, max_position_embeddings=131072, sliding_window=512, layer_types=None,
    sliding_window_pattern=6, global_head_dim=512, hidden_size_per_layer_input=256,
    final_logit_softcapping=None, use_bidirectional_attention=None, partial_rotary_factor=None,
    rope_parameters=dict(
        sliding_attention=dict(rope_type="default", rope_theta=1e4),
        full_attention=dict(rope_type="proportional", rope_theta=1e6, partial_rotary_factor=0.25)))
GEMMA4_UNIFIED = GEMMA4 | dict(max_position_embeddings=262144, sliding_window=1024,
                               hidden_size_per_layer_input=0)
LFM2 = dict(num_key_value_heads=8, rope_theta=1e6, layer_types=None, tie_word_embeddings=True,
            block_auto_adjust_ff_dim=True, block_ffn_dim_multiplier=1.0)
LFM2_MOE = LFM2 | EXPERTS | dict(block_auto_adjust_ff_dim=False, num_dense_layers=2, num_experts=32,
                                 norm_topk_prob=True, use_expert_bias=True)
OLMO2 = dict(rms_norm_eps=1e-5, attention_bias=False)
OLMO3 = OLMO2 | dict(layer_types=None, sliding_window=4096, sliding_window_pattern=4,
                     rope_theta=5e5, rope_local_base_freq=5e5)
SMOLLM3 = LLAMA | dict(
    use_sliding_window=False, sliding_window=None, layer_types=None, num_key_value_heads=4,
    max_position_embeddings=32768, rope_theta=2e6, no_rope_layer_interval=4, no_rope_layers=None,
    tie_word_embeddings=True)
PHI3 = dict(rms_norm_eps=1e-5, partial_rotary_factor=1.0, sliding_window=None)
MINISTRAL3 = dict(
    head_dim=128, num_key_value_heads=8, max_position_embeddings=262144, rms_norm_eps=1e-5,
    sliding_window=None, rope_parameters=dict(
        rope_type="yarn", rope_theta=1e6, factor=16.0, original_max_position_embeddings=16384,
        mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1))
SEED_OSS = dict(head_dim=128, num_key_value_heads=8, attention_bias=True, attention_out_bias=False,
                mlp_bias=False)
EXAONE4 = dict(rms_norm_eps=1e-5, layer_types=None, sliding_window=4096, sliding_window_pattern=4)
GLM = dict(num_key_value_heads=2, rms_norm_eps=1.5625e-7, attention_bias=True,
           partial_rotary_factor=0.5)
ERNIE = dict(head_dim=128, num_key_value_heads=2, use_bias=False, rms_norm_eps=1e-5, rope_theta=5e5,
             tie_word_embeddings=True)
COHERE2 = dict(attention_bias=False, tie_word_embeddings=True, layer_types=None,
               sliding_window=4096, sliding_window_pattern=4)
STARCODER2 = dict(hidden_act="gelu_pytorch_tanh", num_key_value_heads=2, sliding_window=None,
                  use_bias=True, tie_word_embeddings=True)
STABLELM = dict(partial_rotary_factor=0.25)
PHI = dict(hidden_act="gelu_new", partial_rotary_factor=0.5)
NEOX = dict(hidden_act="gelu", rotary_emb_base=None, rotary_pct=None, partial_rotary_factor=0.25,
            use_parallel_residual=True)
APERTUS = dict(
    hidden_act="xielu", attention_bias=False, rms_norm_eps=1e-5, rope_theta=12e6,
    rope_parameters=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                         original_max_position_embeddings=8192))
HUNYUAN_MOE = OLMO2 | EXPERTS | dict(num_experts=1, moe_topk=1)
MIXTRAL = MISTRAL | EXPERTS | dict(rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None)
QWEN_MOE = EXPERTS | dict(decoder_sparse_step=1, mlp_only_layers=None, norm_topk_prob=False)
QWEN2_MOE = QWEN2 | QWEN_MOE | dict(num_key_value_heads=16, moe_intermediate_size=1408,
                                    shared_expert_intermediate_size=5632)
QWEN3_MOE = QWEN_MOE | dict(attention_bias=False, num_key_value_heads=4, use_sliding_window=False,
                            sliding_window=4096, moe_intermediate_size=768)
GPT_OSS = EXPERTS | dict(
    head_dim=64, num_key_value_heads=8, rms_norm_eps=1e-5, attention_bias=True, layer_types=None,
    sliding_window=128, sliding_window_pattern=2, swiglu_alpha=1.702, swiglu_limit=7.0,
    rope_theta=150000.0, rope_parameters=dict(
        rope_type="yarn", factor=32.0, truncate=False, original_max_position_embeddings=4096))
DEEPSEEK_V2 = dict(attention_bias=False, n_shared_experts=2, topk_method="greedy",
                   first_k_dense_replace=0)
DEEPSEEK_V3 = dict(attention_bias=False, n_shared_experts=1, first_k_dense_replace=3,
                   norm_topk_prob=True)
GLM4_LITE = DEEPSEEK_V3 | dict(first_k_dense_replace=1, rms_norm_eps=1e-5, n_group=1, topk_group=1)
GLM4_MOE = GLM4_LITE | dict(num_key_value_heads=8, partial_rotary_factor=0.5)
MISTRAL4 = DEEPSEEK_V3 | dict(
    q_lora_rank=1024, first_k_dense_replace=0, max_position_embeddings=2**20,
    partial_rotary_factor=None, rope_parameters=MINISTRAL3["rope_parameters"] | dict(
        rope_theta=1e4, factor=128.0, original_max_position_embeddings=8192))
MINIMAX = EXPERTS | dict(head_dim=128, num_key_value_heads=8, num_local_experts=256,
                         rope_theta=5e6, partial_rotary_factor=None)
ERNIE_MOE = ERNIE | dict(
    head_dim=None, num_key_value_heads=4, moe_num_experts=64, moe_k=6, moe_num_shared_experts=2,
    moe_layer_start_index=1, moe_layer_end_index=-1, moe_layer_interval=1)
DELTA = dict(
    layer_types=None, full_attention_interval=4, partial_rotary_factor=0.25, head_dim=256,
    num_key_value_heads=2, max_position_embeddings=32768, attention_bias=False,
    linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
    linear_value_head_dim=128, linear_conv_kernel_dim=4)
DELTA_MOE = DELTA | QWEN_MOE | dict(intermediate_size=5632, norm_topk_prob=True,
                                    moe_intermediate_size=512, shared_expert_intermediate_size=512)

# --- the table ---

LAYERWISE = dict(windows=partial(windows_of, full_layers=by_pattern), ropes=layer_ropes)
GEMMA_CLASSES = dict(norm=GemmaNorm, model=GemmaTransformer)
GEMMA2_CLASSES = GEMMA_CLASSES | dict(attention=SoftcapAttention, block=SandwichBlock)
GEMMA4_PARTS = dict(
    fields=dict(
        windows=partial(windows_of, full_layers=gemma4.full_layers), ropes=gemma4.ropes,
        moe=lambda hf: mixture_of_experts(
            hf, n_active="top_k_experts") if hf.get("enable_moe_block") else None,
        softmax_scale=1.0, qk_norm=True),
    attention=gemma4.Gemma4Attention, mlp=gemma4.mlp, block=gemma4.Gemma4Block, model=gemma4.model)
LFM2_PARTS = dict(
    fields=dict(
        windows=lfm2.windows, ropes=partial(ropes_outside, windows=lfm2.windows),
        ffn_dim=lfm2.ffn_dim, moe=lfm2.experts,
        norm_eps=partial(positive, key="norm_eps", kind=float), qk_norm=True),
    attention=by_rope(Attention, lfm2.ShortConvolution), mlp=mlp_or_moe,
    block=by_rope(Block, RenamedBlock), stored_as=lfm2.STORED_AS)
LFM2_FILE = dict(
    complete=gguf.lfm2, means=dict(block_auto_adjust_ff_dim=False, routed_scaling_factor=1.0),
    settings=dict(conv_L_cache="shortconv.l_cache", num_dense_layers="leading_dense_block_count",
                  norm_eps="attention.layer_norm_rms_epsilon", scoring="expert_gating_func"))
NO_WINDOW = {"sliding_window": None}  # which most files have, though the default is another
QUERY_SCALE = {
    "softmax_scale": lambda hf: positive(hf, "query_pre_attn_scalar", kind=float) ** -0.5}
BIASES = ("qkv_bias", "o_bias", "mlp_bias")
USE_BIAS = dict.fromkeys(BIASES, lambda hf: hf["use_bias"])
LAYER_NORM_EPS = dict(norm_eps=partial(positive, key="layer_norm_eps", default=1e-5, kind=float))
SHARED_EXPERTS = {"shared_expert": ("shared_experts",)}
BIASED = dict(score="sigmoid", bias_dims=1)
BIASED_MOE = {"moe": partial(deepseek_moe, **BIASED)}
DEEPSEEK = dict(attention=mla.LatentAttention, mlp=mlp_or_moe,
                convert=mla.latent_halves_first, stored_as=SHARED_EXPERTS)
MOE_OF_FFN_DIM = {"moe": partial(mixture_of_experts, ffn_dim="intermediate_size")}

DELTA_FIELDS = dict(windows=deltanet.windows, qk_norm=True,
                    ropes=partial(ropes_outside, windows=deltanet.windows))
DELTA_CLASSES = dict(
    norm=GemmaNorm, attention=by_rope(deltanet.GatedAttention, deltanet.GatedDeltaNet),
    block=by_rope(Block, RenamedBlock), model=deltanet.DeltaTransformer,
    stored_as=deltanet.STORED_AS)
NEXT_CLASSES = DELTA_CLASSES | dict(stored_as={}, convert=deltanet.by_part)

FAMILIES |= {
    "gemma": Family(
        GEMMA,  # whose first files say gelu, and mean its tanh form
        {"act": lambda hf: {"gelu": "gelu_pytorch_tanh"}.get(hf["hidden_act"], hf["hidden_act"])},
        **GEMMA_CLASSES, gguf=dict(name="gemma", norm_shift=1.0)),
    "gemma2": Family(
        GEMMA2, LAYERWISE | QUERY_SCALE, **GEMMA2_CLASSES,
        gguf=dict(name="gemma2", norm_shift=1.0, means=GELU, complete=gguf.gemma)),
    "gemma3_text": Family(
        GEMMA3, LAYERWISE | QUERY_SCALE | {"qk_norm": True}, **GEMMA2_CLASSES,
        gguf=dict(name="gemma3", norm_shift=1.0, means=GELU | NO_WINDOW, complete=gguf.gemma)),
    "gemma4_text": Family(
        GEMMA4, **GEMMA4_PARTS,
        gguf=dict(name="gemma4", means=GELU, complete=gguf.gemma4, settings=dict(
            global_head_dim="attention.key_length", head_dim="attention.key_length_swa",
            num_kv_shared_layers="attention.shared_kv_layers",
            hidden_size_per_layer_input="embedding_length_per_layer_input",
            value_dim="attention.value_length_swa", turned="rope.dimension_count_swa"))),
    "gemma4_unified_text": Family(GEMMA4_UNIFIED, **GEMMA4_PARTS),
    "phi3": Family(
        PHI3, stored_as={"qkv_proj": ("qkv_proj",), "gate_up_proj": ("gate_up_proj",)},
        gguf=dict(name="phi3", complete=gguf.phi3)),
    "olmo2": Family(
        OLMO2, attention=AllHeadsAttention, block=PostNormBlock, gguf=dict(name="olmo2")),
    "olmo3": Family(
        OLMO3, LAYERWISE, attention=AllHeadsAttention, block=PostNormBlock,
        gguf=dict(name="olmo2", when="attention.sliding_window", complete=gguf.windows)),
    "smollm3": Family(
        SMOLLM3, LAYERWISE,
        gguf=dict(name="smollm3", interleaved=True, means={"no_rope_layer_interval": 4})),
    "granite": Family(
        LLAMA | {"attention_multiplier": 1.0},
        {"softmax_scale": partial(positive, key="attention_multiplier", kind=float)},
        block=ScaledBlock, model=GraniteTransformer,
        gguf=dict(name="granite", interleaved=True, complete=gguf.granite)),
    "baichuan": Family(
        fields={"ropes": baichuan_ropes}, attention=by_rope(Attention, AlibiAttention),
        stored_as={"qkv_proj": ("W_pack",)}, convert=normalize_head,
        gguf=dict(name="baichuan", interleaved=True, complete=gguf.baichuan,
                  parts={"W_pack": ("q_proj", "k_proj", "v_proj")})),
    "lfm2": Family(LFM2, **LFM2_PARTS, gguf=LFM2_FILE | {"name": "lfm2"}),
    "lfm2_moe": Family(LFM2_MOE, **LFM2_PARTS, gguf=LFM2_FILE | {"name": "lfm2moe"}),
    "ministral": Family(MISTRAL | {"layer_types": None}),
    "ministral3": Family(
        MINISTRAL3, attention=FarQueryAttention, gguf=dict(name="mistral3", interleaved=True)),
    "seed_oss": Family(
        SEED_OSS, {"o_bias": lambda hf: hf["attention_out_bias"]}, gguf=dict(name="seed_oss")),
    "exaone4": Family(
        EXAONE4, LAYERWISE | {"ropes": ropes_in_windows, "qk_norm": True}, block=PostNormBlock,
        gguf=dict(name="exaone4", means=NO_WINDOW, complete=gguf.windows)),
    "glm4": Family(
        GLM, {"o_bias": False}, convert=halves_first, block=SandwichBlock,
        stored_as={"gate_up_proj": ("gate_up_proj",),
                   "post_attention_layernorm": ("post_self_attn_layernorm",),
                   "pre_feedforward_layernorm": ("post_attention_layernorm",),
                   "post_feedforward_layernorm": ("post_mlp_layernorm",)},
        gguf=dict(name="glm4")),
    "hunyuan_v1_dense": Family(
        OLMO2, {"ropes": stretched_ropes}, attention=LateNormAttention,
        gguf=dict(name="hunyuan-dense")),
    "hunyuan_v1_moe": Family(
        HUNYUAN_MOE, {"ropes": stretched_ropes, "moe": partial(
            mixture_of_experts, n_expert="num_experts", n_active="moe_topk", gated_share=False,
            ffn_dim="intermediate_size", shared="intermediate_size",
        )},
        attention=LateNormAttention, mlp=mlp_or_moe,
        stored_as={"shared_expert": ("shared_mlp",), "gate": ("gate.wg",)},
        gguf=dict(name="hunyuan-moe", settings=dict(
            moe_topk="expert_used_count", num_shared_expert="expert_shared_count"))),
    "ernie4_5": Family(ERNIE, USE_BIAS, convert=halves_first, gguf=dict(name="ernie4_5")),
    "cohere2": Family(
        COHERE2, LAYERWISE | {"ropes": ropes_in_windows} | LAYER_NORM_EPS,
        norm=partial(nn.LayerNorm, bias=False), block=OneNormBlock, model=ScaledHeadTransformer,
        convert=halves_first, gguf=dict(name="cohere2", means={"sliding_window_pattern": 4})),
    "starcoder2": Family(
        STARCODER2, USE_BIAS | {"norm_eps": partial(positive, key="norm_epsilon", kind=float)},
        norm=nn.LayerNorm, mlp=PlainMLP,
        stored_as={"up_proj": ("c_fc",), "down_proj": ("c_proj",)}, gguf=dict(name="starcoder2")),
    "stablelm": Family(
        STABLELM, {"qkv_bias": lambda hf: bool(hf.get("use_qkv_bias"))} | LAYER_NORM_EPS,
        norm=nn.LayerNorm, gguf=dict(name="stablelm")),
    "phi": Family(
        PHI, dict.fromkeys(BIASES, True) | LAYER_NORM_EPS,
        norm=nn.LayerNorm, mlp=PlainMLP, block=OneNormBlock, model=BiasedHeadTransformer,
        stored_as={"o_proj": ("dense",), "up_proj": ("fc1",), "down_proj": ("fc2",),
                   "norm": ("final_layernorm",)},
        gguf=dict(name="phi2")),
    "gpt_neox": Family(
        NEOX, dict.fromkeys(BIASES, True) | LAYER_NORM_EPS | {"ropes": neox_ropes},
        norm=nn.LayerNorm, attention=HeadwiseAttention, mlp=PlainMLP,
        block=lambda config, layer: (
            ParallelBlock if config.hf["use_parallel_residual"] else Block)(config, layer),
        stored_as={"model": ("gpt_neox",), "embed_tokens": ("embed_in",), "o_proj": ("dense",),
                   "lm_head": ("embed_out",), "norm": ("final_layer_norm",),
                   "self_attn": ("attention",), "up_proj": ("dense_h_to_4h",),
                   "down_proj": ("dense_4h_to_h",)},
        gguf=dict(name="gptneox", order=gguf.heads_together,
                  settings=dict(use_parallel_residual="use_parallel_residual"))),
    "apertus": Family(
        APERTUS, {"qk_norm": True, "act": lambda hf: hf["hidden_act"]},
        mlp=PlainMLP,
        stored_as={"input_layernorm": ("attention_layernorm",), "act": ("act_fn",),
                   "post_attention_layernorm": ("feedforward_layernorm",)},
        gguf=dict(name="apertus", settings={
            f"xielu_{name}": f"xielu.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")})),
    "mixtral": Family(
        MIXTRAL, MOE_OF_FFN_DIM, mlp=mlp_or_moe,
        gguf=dict(name="llama", when="expert_count", interleaved=True)),
    "qwen2_moe": Family(
        QWEN2_MOE, {
            "qkv_bias": True, "moe": mixture_of_experts,
            "windows": partial(windows_of, full_layers=every_other_and_last),
        },
        mlp=mlp_or_moe,
        gguf=dict(name="qwen2moe", complete=gguf.qwen_moe,
                  means=NO_WINDOW | {"norm_topk_prob": False})),
    "qwen3_moe": Family(  # whose windows are everywhere, whatever a file says of layers
        QWEN3_MOE, {"qk_norm": True, "moe": mixture_of_experts}, mlp=mlp_or_moe,
        gguf=dict(name="qwen3moe", complete=gguf.qwen_moe,
                  means=NO_WINDOW | {"norm_topk_prob": True})),
    "gpt_oss": Family(
        GPT_OSS, LAYERWISE | MOE_OF_FFN_DIM, attention=SinkAttention,
        mlp=partial(mlp_or_moe, kind=ClampedExperts),
        gguf=dict(name="gpt-oss", complete=gguf.gpt_oss)),
    "deepseek_v2": Family(
        DEEPSEEK_V2, mla.LATENT | {"moe": partial(deepseek_moe, best_of_group=1, normalize=False)},
        **DEEPSEEK),
    "deepseek_v3": Family(
        DEEPSEEK_V3, mla.LATENT | BIASED_MOE, **DEEPSEEK, gguf=dict(
            name="deepseek2", complete=gguf.deepseek2,
            parts={"kv_b_proj": ("k_b_proj", "v_b_proj")},
            means=dict(n_group=1, topk_group=1, first_k_dense_replace=0, norm_topk_prob=False,
                       routed_scaling_factor=1.0),
            settings=gguf.DEEPSEEK_EXPERTS | dict(
                n_group="expert_group_count", topk_group="expert_group_used_count",
                q_lora_rank="attention.q_lora_rank", kv_lora_rank="attention.kv_lora_rank",
                qk_rope_head_dim="rope.dimension_count", head_size="attention.key_length_mla",
                v_head_dim="attention.value_length_mla",
            ))),
    "glm4_moe_lite": Family(GLM4_LITE, mla.LATENT | BIASED_MOE, **DEEPSEEK),
    "mistral4": Family(
        MISTRAL4, mla.LATENT | {"moe": deepseek_moe},
        **DEEPSEEK | {"attention": mla.FarLatentAttention}),
    "glm4_moe": Family(
        GLM4_MOE, BIASED_MOE | {"o_bias": False, "qk_norm": lambda hf: bool(hf.get("use_qk_norm"))},
        mlp=mlp_or_moe, stored_as=SHARED_EXPERTS,
        gguf=dict(name="glm4moe", settings=gguf.DEEPSEEK_EXPERTS)),
    "minimax_m2": Family(
        MINIMAX, {
            "ropes": partial(ropes_of_part, key="rotary_dim"),
            "moe": partial(mixture_of_experts, ffn_dim="intermediate_size", **BIASED),
        },
        attention=AllHeadsAttention, mlp=mlp_or_moe,
        gguf=dict(name="minimax-m2", settings=dict(
            num_local_experts="expert_count", rotary_dim="rope.dimension_count",
            scoring="expert_gating_func"))),
    "ernie4_5_moe": Family(
        ERNIE_MOE, {"moe": ernie_moe}, mlp=mlp_or_moe, convert=halves_first,
        stored_as=SHARED_EXPERTS, gguf=dict(name="ernie4_5-moe", settings=dict(
            moe_num_experts="expert_count", moe_k="expert_used_count",
            moe_num_shared_experts="expert_shared_count",
            moe_layer_interval="interleave_moe_layer_step",
            moe_layer_start_index="leading_dense_block_count"))),
    "qwen3_next": Family(
        DELTA_MOE | dict(num_experts_per_tok=10), DELTA_FIELDS | {"moe": mixture_of_experts},
        mlp=mlp_or_moe, **NEXT_CLASSES,
        gguf=dict(gguf.DELTA, name="qwen3next",
                  parts={"in_proj_qkvz": ("in_proj_qkv", "in_proj_z")})),
    "qwen3_5_text": Family(
        DELTA | dict(num_key_value_heads=4), DELTA_FIELDS, **DELTA_CLASSES,
        gguf=dict(gguf.DELTA, name="qwen35", order=gguf.value_heads)),
    "qwen3_5_moe_text": Family(
        DELTA_MOE | dict(num_experts_per_tok=8), DELTA_FIELDS | {"moe": mixture_of_experts},
        mlp=mlp_or_moe, **DELTA_CLASSES,
        gguf=dict(gguf.DELTA, name="qwen35moe", order=gguf.value_heads)),
}
FAMILIES["kimi_k2"] = FAMILIES["deepseek_v3"]
