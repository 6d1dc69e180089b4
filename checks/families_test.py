"""What families of models do in their own way, beside the parity of all of them in tests.py:
Baichuan, which transformers no longer has; rotary embeddings far out; what is refused."""
import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import families
from batching.saved import load_row, save_row
from checks.common import (
    BASE, CHECKPOINTS, CONFIG, GEMMA4, HERE, LINEAR_ROPE, LLAMA3_ROPE, WINDOW_FIRST, YARN_ROPE,
    close, empty_model, hf_folder, hf_logits,
)
from cli.stats import bytes_read
from families.blocks import AlibiAttention, prefill_special, special_attention
from generate import compile_model, generate
from kernels import flash_decode_reference
from model import (
    ACTIVATIONS, FAMILIES, Family, KVCache, ModelConfig, Transformer, load_model, math_attention,
    prefill_attention, rope_frequencies,
)
from quantize import quantize_model, save_quantized

MakeCheckpoint = Callable[[str], tuple[Path, PreTrainedModel]]  # the fixture
# families with something of their own, in one build of each
NAMES = [
    "gemma", "gemma2", "gemma3", "gemma4", "phi3", "phi4", "olmo2", "olmo3", "smollm3", "granite",
    "ministral3", "hunyuan", "hunyuan-moe", "cohere2", "phi", "neox", "apertus", "lfm2",
]


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(131, shape, generator=torch.Generator().manual_seed(1))


def start(*depths: int) -> Tensor:
    """input_pos: how many tokens each row has cached."""
    return torch.tensor(depths, dtype=torch.int32)


def loaded(checkpoint: MakeCheckpoint, name: str) -> tuple[Transformer, PreTrainedModel]:
    folder, hf = checkpoint(name)
    return load_model(folder, dtype=torch.float32), hf

# --- decode, compiled ---


def kinds_of_layers(model: Transformer) -> int:
    """How many of a model's layers differ in what is compiled: a window, whether they turn, and
    sizes."""
    config = model.config
    turns = [rope is not None for rope in config.ropes]
    sizes = [tuple(x.shape for x in block.parameters()) for block in model.layers]
    rooms = [layer.kv.shape for layer in model.cache.whole]
    return len(set(zip(config.windows, turns, sizes, rooms)))


@pytest.mark.parametrize("attention", ["flash", "math"])
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_for_each_kind_of_layer(
    checkpoint: MakeCheckpoint, name: str, attention: str, dynamo: None, no_inductor: None
) -> None:
    """Not for each layer: two rotary embeddings share one, two windows do not."""
    model, hf = loaded(checkpoint, name)
    model.setup_caches(1, 64, attention=attention)
    compile_model(model)
    tokens = random_tokens(1, 30)
    model.prefill(tokens[:, :20], start(0))
    want = hf_logits(hf, tokens)
    for i in range(20, 30):
        close(model.decode(tokens[:, i:i + 1], start(i)), want[:, i:i + 1])
    assert counters["stats"]["unique_graphs"] == kinds_of_layers(model)


def test_compiled_text_is_the_same(checkpoint: MakeCheckpoint, dynamo: None) -> None:
    """Of the family with the most of its own, compiled as users have it."""
    model, _ = loaded(checkpoint, "gemma3")
    prompts = [[5, 6, 7], list(range(10, 40))]
    eager = generate(model, prompts, 12)
    model.setup_caches(2, 64)
    compile_model(model)
    assert generate(model, prompts, 12, compile=True) == eager


@pytest.mark.parametrize("name", ["gemma2", "phi4"])
def test_compiled_prefill_is_the_same(
    checkpoint: MakeCheckpoint, name: str, dynamo: None, no_inductor: None
) -> None:
    model, hf = loaded(checkpoint, name)
    model.setup_caches(1, 64)
    compile_model(model, prefill=True)
    tokens = random_tokens(1, 60)
    want = hf_logits(hf, tokens)
    close(model.prefill(tokens[:, :25], start(0)), want[:, :25])
    close(model.prefill(tokens[:, 25:], start(25)), want[:, 25:])

# --- how scores become weights ---

OPTIONS = {
    "scale": 0.3,
    "window": 5,
    "softcap": 2.0,
    "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.7, 0.0, 1.0]),
    "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0, -9.0]),
}


OF_ALL = ["scale", "window"]  # the others are of families with an attention of their own
CHOSEN = [
    ["scale"], ["softcap"], ["alibi_slopes"], ["sinks"], ["window", "sinks"], OF_ALL, list(OPTIONS),
]


@pytest.mark.parametrize("attention, chosen", [
    *[(attention, OF_ALL[:n]) for attention in (math_attention, prefill_attention) for n in (1, 2)],
    *[(attention, chosen) for attention in (special_attention, prefill_special)
      for chosen in CHOSEN],
], ids=lambda value: "-".join(value) if isinstance(value, list) else value.__name__)
def test_options_mean_what_they_mean_to_the_kernel(
    attention: Callable, chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In prefill, also in tiles, and in decode by math."""
    monkeypatch.setattr("model.QUERY_TILE", 3)
    torch.manual_seed(0)
    known = OPTIONS if attention in (special_attention, prefill_special) else OF_ALL
    options = {name: OPTIONS[name] if name in chosen else None for name in known}
    q = 2 * torch.randn(2, 6, 11, 16)
    keys, values = torch.randn(2, 2, 2, 20, 16)
    want = flash_decode_reference(q, keys, values, start(20, 20), **options)
    index = torch.arange(9, 20).repeat(2, 1)
    key_pos = torch.arange(20)[None]
    close(attention(q, keys, values, index, key_pos, **options), want, 1e-5)


@pytest.mark.parametrize("name, shifted", [("qwen2", True), ("gemma2", False)])
def test_keys_are_shifted_only_where_softmax_does_not_notice(
    checkpoint: MakeCheckpoint, name: str, shifted: bool
) -> None:
    """k_mean of an int8 cache: under a softcap it has to be zeros."""
    model, hf = loaded(checkpoint, name)
    cache = model.setup_caches(1, 64, torch.int8)
    assert all(layer.k_mean.any() == shifted for layer in cache.whole)
    tokens = random_tokens(1, 30)
    model.prefill(tokens[:, :20], start(0))
    got = torch.cat([model.decode(tokens[:, i:i + 1], start(i)) for i in range(20, 30)], dim=1)
    close(got, hf_logits(hf, tokens)[:, 20:], 0.05)


@pytest.mark.parametrize("name", ["gemma", "granite"])
def test_embeddings_are_scaled_as_in_training(
    checkpoint: MakeCheckpoint, name: str
) -> None:
    """In bfloat16 to the last bit."""
    folder, hf = checkpoint(name)
    model = load_model(folder, dtype=torch.bfloat16)
    model.setup_caches(1, 32)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    tokens = random_tokens(1, 20)
    model(tokens, start(0))
    theirs = copy.deepcopy(hf.model.embed_tokens).to(torch.bfloat16)(tokens)
    if name == "granite":
        theirs = theirs * hf.config.embedding_multiplier
    assert torch.equal(seen[0], theirs)


@pytest.mark.parametrize("name", [
    "gemma2", "gemma4", "gemma4-moe", "phi3", "olmo2", "smollm3", "phi", "glm4", "deepseek-v3",
    "lfm2", "qwen3.5", "qwen3-next", "neox", "apertus", "hunyuan-moe",
])
def test_a_quantized_model_of_a_family_is_saved_and_loaded(
    checkpoint: MakeCheckpoint, name: str, tmp_path: Path
) -> None:
    model, _ = loaded(checkpoint, name)
    quantize_model(model, "int8")
    save_quantized(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved", dtype=torch.float32)
    assert dataclasses.replace(again.config, hf={}, ropes=()) == dataclasses.replace(
        model.config, hf={}, ropes=())
    tokens = random_tokens(1, 40)
    for each in (model, again):
        each.setup_caches(1, 64)
    close(again(tokens, start(0)), model(tokens, start(0)), 1e-5)

# --- layers that differ in what they keep ---


@pytest.mark.parametrize("name", ["gemma4", "lfm2", "qwen3.5"])
def test_rejected_proposals_leave_nothing(checkpoint: MakeCheckpoint, name: str) -> None:
    """To the last bit, while a ring goes round too."""
    model, _ = loaded(checkpoint, name)
    tokens = random_tokens(2, 60)
    plain, proposing = model.setup_caches(2, 64), model.setup_caches(2, 64)
    for cache in (plain, proposing):
        model.prefill(tokens[:, :20], start(0, 0), cache)
    for i in range(20, 60):
        for n in (4, 15):
            model.decode(random_tokens(2, min(n, 64 - i)), start(i, i), proposing)
        one, other = (
            model.decode(tokens[:, i:i + 1], start(i, i), cache) for cache in (plain, proposing))
        assert torch.equal(one, other)


def test_layers_that_share_keys_have_one_cache(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Gemma 4's last two: each reads it, and it has its room once, in files too."""
    model, _ = loaded(checkpoint, "gemma4")
    cache = model.setup_caches(2, 64, rings=False)
    own = [layer.kv for layer in cache.whole[:3]]
    assert [layer.kv.data_ptr() for layer in cache.whole[3:]] == [
        own[2].data_ptr(), own[1].data_ptr()]
    assert [kv.shape[-1] for kv in own] == [16, 32, 16]
    assert cache.nbytes == sum(kv.nbytes for kv in own)
    assert bytes_read(cache, 64) == sum(kv.nbytes for kv in [*own, own[2], own[1]]) / 2
    prompt = list(range(10, 40))
    expected = generate(model, [prompt + [5, 6]] * 2, 8)
    generate(model, [prompt], 1)
    save_row(model, prompt, tmp_path / "row.safetensors")
    assert len(load_file(tmp_path / "row.safetensors")) == 3
    model.setup_caches(2, 64, rings=False)
    load_row(model, tmp_path / "row.safetensors")
    assert generate(model, [[5, 6]] * 2, 8, cached=30) == expected


def test_keys_that_no_layer_reads_are_left_out(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Files of Gemma 4 have them for the layers that share those of others."""
    folder, hf = checkpoint("gemma4")
    tensors = load_file(folder / "model.safetensors")
    attention = "model.layers.4.self_attn"
    tensors |= {f"{attention}.{part}_proj.weight": torch.ones(64, 48) for part in "kv"}
    tensors[f"{attention}.k_norm.weight"] = torch.ones(32)
    save_file(tensors, tmp_path / "model.safetensors")
    config = (folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    model = load_model(tmp_path, dtype=torch.float32)
    model.setup_caches(1, 32)
    tokens = random_tokens(1, 20)
    close(model(tokens, start(0)), hf_logits(hf, tokens))
    tensors["model.layers.2.self_attn.q_proj.surplus"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="unexpected tensor model.layers.2.self_attn.q_proj.surp"):
        load_model(tmp_path)


def test_masks_in_the_first_files_of_gpt_neox_are_left_out(
    checkpoint: MakeCheckpoint, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a word: they follow from the context."""
    folder, _ = checkpoint("neox")
    tensors = load_file(folder / "model.safetensors")
    attention = "gpt_neox.layers.0.attention"
    tensors |= {f"{attention}.bias": torch.ones(1, 1, 96, 96, dtype=torch.uint8),
                f"{attention}.masked_bias": torch.tensor(-1e9)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    load_model(tmp_path)
    assert "nothing here reads" not in capfd.readouterr().err


@pytest.mark.parametrize("device, head_dim, attention", [
    ("cpu", 32, ["flash"] * 5), ("meta", 32, ["flash"] * 5),
    ("meta", 512, ["flash", "math", "flash", "flash", "math"]),
])
def test_a_layer_that_no_kernel_takes_attends_by_math(
    device: str, head_dim: int, attention: list[str]
) -> None:
    """And the others by flash."""
    config = transformers.Gemma4TextConfig(**BASE | GEMMA4 | {"global_head_dim": head_dim})
    model = empty_model(json.loads(config.to_json_string()) | {"architectures": None})
    parts = [block.self_attn.make_cache for block in model.layers]
    cache = KVCache(5, 2, 16, 1, 64, device=device, attention="flash", makers=parts)
    assert ["flash" if layer.flash else "math" for layer in cache.whole] == attention


@pytest.mark.parametrize("attention_k_eq_v", [False, True])
def test_what_differs_by_layer_is_said_in_two_ways(attention_k_eq_v: bool) -> None:
    """For all layers that see all tokens, as the first files do, and by the number of each."""
    settings = dict(
        attention_k_eq_v=attention_k_eq_v, global_head_dim=32, num_global_key_value_heads=1)
    new = json.loads(transformers.Gemma4TextConfig(**BASE, **settings).to_json_string())
    old = {key: value for key, value in new.items() if key != "per_layer_config"} | settings
    assert "per_layer_config" in new and "global_head_dim" not in new
    sizes = [
        [(block.self_attn.head_dim, block.self_attn.n_kv_head) for block in empty_model(hf).layers]
        for hf in (new, old)
    ]
    assert sizes[0] == sizes[1] == [(16, 2), (16, 2), (32, 1 if attention_k_eq_v else 2)]

# --- Baichuan, from its formulas ---

BAICHUAN = dict(
    model_type="baichuan",
    architectures=["BaichuanForCausalLM"],
    vocab_size=131,
    hidden_size=56,
    num_hidden_layers=2,
    num_attention_heads=7,
    intermediate_size=72,
    hidden_act="silu",
    rms_norm_eps=1e-6,
    model_max_length=96,
)


def baichuan_folder(folder: Path, hf: dict) -> dict[str, Tensor]:
    """A random Baichuan in that folder -> its tensors."""
    torch.manual_seed(0)
    dim = hf["hidden_size"]
    ffn = hf["intermediate_size"]
    shapes = {"model.embed_tokens": (hf["vocab_size"], dim), "model.norm": (dim,)}
    shapes["lm_head"] = (hf["vocab_size"], dim)
    for i in range(hf["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.W_pack": (3 * dim, dim),
            f"{layer}.self_attn.o_proj": (dim, dim),
            f"{layer}.mlp.gate_proj": (ffn, dim),
            f"{layer}.mlp.up_proj": (ffn, dim),
            f"{layer}.mlp.down_proj": (dim, ffn),
            f"{layer}.input_layernorm": (dim,),
            f"{layer}.post_attention_layernorm": (dim,),
        }
    tensors = {f"{name}.weight": 0.2 * torch.randn(shape) for name, shape in shapes.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf))
    return tensors


def slopes_of(n_head: int) -> list[float]:
    """ALiBi's, as its authors' function makes them."""
    if math.log2(n_head).is_integer():
        first = 2 ** (-(2 ** -(math.log2(n_head) - 3)))
        return [first ** (i + 1) for i in range(n_head)]
    closest = 2 ** math.floor(math.log2(n_head))
    return slopes_of(closest) + slopes_of(2 * closest)[0::2][:n_head - closest]


def turned(x: Tensor) -> Tensor:
    """Rotary embedding of x [H, T, D], base 10000, its halves as the two parts of numbers."""
    T, D = x.shape[1:]
    angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)  # (T, D/2)
    numbers = torch.complex(x[..., :D // 2], x[..., D // 2:]) * torch.polar(
        torch.ones_like(angles), angles)
    return torch.cat([numbers.real, numbers.imag], dim=-1)


def baichuan_logits(w: dict[str, Tensor], hf: dict, tokens: Tensor) -> Tensor:
    """tokens [T] -> logits [T, V] of the 13B models, and of the 7B ones if the configuration names
    their max_position_embeddings."""
    T = len(tokens)
    H = hf["num_attention_heads"]

    def norm(x: Tensor, name: str) -> Tensor:
        rms = (x.pow(2).mean(-1, keepdim=True) + hf["rms_norm_eps"]).sqrt()
        return x / rms * w[f"model.{name}.weight"]

    position = torch.arange(T)
    bias = -torch.tensor(slopes_of(H))[:, None, None] * (position[:, None] - position)  # (H, T, T)
    future = torch.full((T, T), -math.inf).triu(1)
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(hf["num_hidden_layers"]):
        layer = f"layers.{i}"

        def linear(x: Tensor, name: str, layer: str = layer) -> Tensor:
            return x @ w[f"model.{layer}.{name}.weight"].T

        packed = linear(norm(x, f"{layer}.input_layernorm"), "self_attn.W_pack")
        q, k, v = packed.view(T, 3, H, -1).permute(1, 2, 0, 3)  # (H, T, D)
        if "max_position_embeddings" in hf:
            q, k, bias = turned(q), turned(k), torch.zeros(())
        scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias + future
        y = (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1)
        x = x + linear(y, "self_attn.o_proj")
        y = norm(x, f"{layer}.post_attention_layernorm")
        gated = F.silu(linear(y, "mlp.gate_proj")) * linear(y, "mlp.up_proj")
        x = x + linear(gated, "mlp.down_proj")
    head = w["lm_head.weight"]
    if hf["vocab_size"] == 125696:
        head = head / head.norm(dim=-1, keepdim=True)
    return norm(x, "norm") @ head.T


@pytest.mark.parametrize("attention", ["flash", "math"])
@pytest.mark.parametrize("change", [
    dict(), dict(vocab_size=125696, num_attention_heads=1), dict(max_position_embeddings=96),
], ids=["13b", "baichuan2-head", "7b"])
def test_baichuan_is_its_formulas(tmp_path: Path, change: dict, attention: str) -> None:
    """Prefill, a chunk behind it, and rows at different depths."""
    hf = {**BAICHUAN, **change}
    tensors = baichuan_folder(tmp_path / "baichuan", hf)
    model = load_model(tmp_path / "baichuan", dtype=torch.float32)
    is_alibi = isinstance(model.layers[0].self_attn, AlibiAttention)
    assert is_alibi == ("max_position_embeddings" not in hf)
    model.setup_caches(2, 64, attention=attention)
    tokens = random_tokens(2, 50)
    want = torch.stack([baichuan_logits(tensors, hf, row) for row in tokens])
    close(model(tokens[:, :20], start(0, 0)), want[:, :20])
    close(model(tokens[:, 20:], start(20, 20)), want[:, 20:])
    close(model(torch.stack([tokens[0, 30:33], tokens[1, 7:10]]), start(30, 7)),
          torch.stack([want[0, 30:33], want[1, 7:10]]))

# --- what a family reads ---


@pytest.mark.parametrize("model_type, other", [
    ("llama", dict(sliding_window=8, use_sliding_window=True)),
    ("llama", dict(layer_types=["sliding_attention"] * 3, sliding_window=8)),
    ("mistral", dict(attention_bias=True, use_sliding_window=False, mlp_bias=True)),
    ("qwen2", dict(attention_bias=True, mlp_bias=True)),
    ("qwen3", dict(mlp_bias=True)),
    ("gemma", dict(hidden_activation="silu", final_logit_softcapping=3.0)),
    ("gemma2", dict(use_sliding_window=False, no_rope_layers=[0, 0, 0])),
    ("phi3", dict(attention_bias=True, use_sliding_window=False)),
    ("mixtral", dict(norm_topk_prob=False, mlp_only_layers=[0], decoder_sparse_step=2)),
    ("qwen3_moe", dict(shared_expert_intermediate_size=8)),
    ("gpt_oss", dict(rope_local_base_freq=3.0, norm_topk_prob=False)),
])
def test_a_setting_of_another_family_means_nothing(model_type: str, other: dict) -> None:
    """Files keep such; the classes of transformers do not read them."""
    hf = {**CONFIG, "model_type": model_type, "sliding_window": 9}
    hf |= dict(num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    without, both = [
        dataclasses.replace(ModelConfig.from_hf(each), hf={}, ropes=()) for each in (hf, hf | other)
    ]
    assert both == without


@pytest.mark.parametrize("act, meant", [
    ("gelu", "gelu_pytorch_tanh"), ("gelu_pytorch_tanh", "gelu_pytorch_tanh"), ("silu", "silu")])
def test_gemma_means_the_tanh_form(act: str, meant: str) -> None:
    """Its first files say gelu."""
    hf = {**CONFIG, "model_type": "gemma", "hidden_act": act}
    assert ModelConfig.from_hf(hf).act == meant


def test_the_first_files_of_lfm2_have_another_name_for_a_size() -> None:
    hf = class_settings("lfm2") | {"block_ff_dim": 12288}
    del hf["intermediate_size"]
    assert ModelConfig.from_hf(hf).ffn_dim == 8192


def test_the_first_files_of_gpt_neox_have_other_names_for_its_rope() -> None:
    hf = class_settings("gpt_neox") | dict(rotary_pct=0.5, rotary_emb_base=3000)
    [rope] = set(ModelConfig.from_hf(hf | {"rope_parameters": None}).ropes)
    assert (rope.dim, rope.theta) == (48, 3000)
    [rope] = set(ModelConfig.from_hf(hf).ropes)  # where a file has both
    assert (rope.dim, rope.theta) == (24, 10000)


def test_files_of_hunyuan_mixtures_may_have_a_number_for_each_layer() -> None:
    hf = class_settings("hunyuan_v1_moe") | dict(num_experts=[8] * 32, moe_topk=[3] * 32)
    moe = ModelConfig.from_hf(hf).moe
    assert (moe.n_expert, moe.n_active) == (8, 3)

# --- rotary embeddings ---


@pytest.mark.parametrize("scaling", [LINEAR_ROPE, LLAMA3_ROPE, YARN_ROPE], ids=str)
def test_rope_scaling_replaces_rope_parameters(scaling: dict) -> None:
    """Where a file has both, as in transformers."""
    both = dict(
        rope_theta=5e5, rope_scaling=scaling,
        rope_parameters=dict(rope_type="yarn", rope_theta=1e6, factor=3.0, beta_fast=20.0),
    )
    theirs = transformers.LlamaConfig(**BASE, **copy.deepcopy(both))
    want, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, "cpu")
    inv_freq, scale = rope_frequencies(ModelConfig.from_hf(CONFIG | both).ropes[0], 96)
    assert torch.allclose(inv_freq, want) and scale == pytest.approx(factor)


def test_rope_scaling_is_of_full_attention() -> None:
    """Where rope_parameters differ by the kind of layer."""
    both = dict(rope_scaling=LINEAR_ROPE, layer_types=WINDOW_FIRST, rope_parameters=dict(
        sliding_attention=dict(rope_type="default", rope_theta=3e3),
        full_attention=dict(rope_type="default", rope_theta=7e5),
    ))
    sliding, full, _ = ModelConfig.from_hf(CONFIG | {"model_type": "gemma3_text", **both}).ropes
    assert (sliding.kind, sliding.theta) == ("default", 3e3)
    assert (full.kind, full.theta, full.hf["factor"]) == ("linear", 7e5, 4.0)


@pytest.mark.parametrize("scaling, context", [
    (dict(rope_type="linear", factor=4.0), 384),
    (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32), 128),
    (dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=32), 96),
    (LLAMA3_ROPE, 256),
    (dict(rope_type="default"), 96),
], ids=str)
def test_a_scaled_context_is_one(scaling: dict, context: int) -> None:
    """Where max_position_embeddings, 96 here, is that before scaling."""
    assert ModelConfig.from_hf(CONFIG | {"rope_scaling": scaling}).max_seq_len == context

# --- rotary embeddings far out ---


@pytest.mark.parametrize("name, original", [
    ("llama-llama3", 32), ("llama-yarn", 24), ("olmo3", 24), ("llama-linear", 24),
    ("phi3-longrope", 24), ("phi4", 24),
])
def test_four_times_the_original_context(
    checkpoint: MakeCheckpoint, name: str, original: int
) -> None:
    model, hf = loaded(checkpoint, name)
    n = 4 * original
    model.setup_caches(1, n)
    tokens = random_tokens(1, n)
    want = hf_logits(hf, tokens)
    close(model(tokens[:, :n - 4], start(0)), want[:, :n - 4], 5e-4)
    for i in range(n - 4, n):
        close(model(tokens[:, i:i + 1], start(i)), want[:, i:i + 1], 5e-4)


def test_longrope_goes_by_the_room(checkpoint: MakeCheckpoint) -> None:
    """Short factors where the cache has no room beyond the original context, also after a longer
    cache: keys have turned for good."""
    model, hf = loaded(checkpoint, "phi3-longrope")
    tokens = random_tokens(1, 40)
    for room in (64, 24, 64):
        cache = model.setup_caches(1, room)
        n = min(room, 40)
        close(model(tokens[:, :n], start(0), cache), hf_logits(hf, tokens[:, :n]))


LLAMA31 = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
    high_freq_factor=4.0, original_max_position_embeddings=8192)
QWEN25_LONG = dict(
    rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32768)
GPT_OSS = dict(
    rope_type="yarn", rope_theta=150000.0, factor=32.0, beta_fast=32.0, beta_slow=1.0,
    truncate=False, original_max_position_embeddings=4096)
LINEAR = dict(rope_type="linear", rope_theta=1e6, factor=8.0)
PHI3_LONG = dict(
    rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=4096,
    short_factor=[1 + i / 50 for i in range(64)], long_factor=[1.0 + i for i in range(64)])


@pytest.mark.parametrize("rope", [LLAMA31, QWEN25_LONG, GPT_OSS, LINEAR, PHI3_LONG],
                         ids=lambda rope: rope["rope_type"])
def test_frequencies_of_real_settings(rope: dict) -> None:
    """Against transformers, for texts of 131072 tokens."""
    sizes = dict(hidden_size=1024, num_attention_heads=8, max_position_embeddings=131072)
    theirs = transformers.LlamaConfig(**sizes, rope_parameters=dict(rope))
    want, want_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, seq_len=131072)
    ours = ModelConfig.from_hf({**CONFIG, **sizes, "head_dim": 128, "rope_parameters": rope})
    frequencies, factor = rope_frequencies(ours.ropes[0], 131072)
    assert factor == pytest.approx(want_factor)
    torch.testing.assert_close(frequencies, want, rtol=1e-5, atol=0)

# --- what is read, and what is refused ---

# settings of the supported classes that do not change what a trained model computes, or are
# written beside layer_types, which are read
HARMLESS = set("""
    _name_or_path _sliding_window_pattern attention_dropout bos_token_id
    chunk_size_feed_forward classifier_dropout dtype embd_pdrop embedding_dropout eod_token_id
    eos_token_id hidden_dropout id2label initializer_range is_decoder is_encoder_decoder label2id
    moe_norm_min
    num_nextn_predict_layers output_attentions output_hidden_states output_router_logits
    pad_token_id pretraining_tp problem_type qk_head_dim resid_pdrop residual_dropout return_dict
    router_aux_loss_coef router_jitter_noise sep_token_id transformers_version use_cache
""".split())


# what a class leaves open, and every file says
UNSET = {"deepseek_v2": dict(num_experts_per_tok=6), "glm4_moe": dict(num_attention_heads=32),
         "minimax_m2": dict(rotary_dim=64)}


def class_settings(model_type: str) -> dict:
    """The config.json of a transformers class with its default fields."""
    config = transformers.AutoConfig.for_model(model_type)
    hf = json.loads(config.to_json_string(use_diff=False))
    hf |= {"model_type": model_type} | UNSET.get(model_type, {})
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if model_type == "mistral4":  # which files have in a wrapper
        name = "Mistral4ForCausalLM"
    hf["architectures"] = [name or f"{type(config).__name__[:-6]}ForConditionalGeneration"]
    return hf


IN_TRANSFORMERS = [family for family in FAMILIES if family in transformers.CONFIG_MAPPING]


@pytest.mark.parametrize("family", IN_TRANSFORMERS)
def test_every_setting_of_a_family_is_read_or_harmless(family: str) -> None:
    files = [HERE / "model.py", HERE / "formats/settings.py", *(HERE / "families").glob("*.py")]
    source = "".join(file.read_text() for file in files)
    known = {key for key in class_settings(family) if f'"{key}"' in source}
    assert class_settings(family).keys() - known <= HARMLESS


@pytest.mark.parametrize("family", IN_TRANSFORMERS)
def test_a_setting_left_out_means_what_it_means_in_transformers(family: str) -> None:
    """Or it is asked for by name."""
    hf = class_settings(family)
    want = comparable(ModelConfig.from_hf(hf))
    for key in hf.keys() - {"model_type"}:
        less = {name: value for name, value in hf.items() if name != key}
        try:
            got = ModelConfig.from_hf(less)
        except ValueError as e:
            assert key in str(e)
        else:
            assert comparable(got) == want, key


def comparable(config: ModelConfig) -> dict:
    fields = dataclasses.asdict(config)
    del fields["hf"]
    fields["ropes"] = [rope and (rope.theta, rope.dim, rope.kind) for rope in config.ropes]
    return fields


# the decoder models of transformers that are used most, and some of every unusual kind
MODEL_TYPES = """
    apertus arcee bamba bitnet bloom blt codegen cohere cohere2 cwm dbrx deepseek_v2
    deepseek_v3 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 falcon falcon_h1
    falcon_mamba flex_olmo gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4
    gemma4_text gemma4_unified gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt2
    gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid
    granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe internvl jamba jetmoe
    kyutai_speech_to_text lfm2 lfm2_moe llama llama4 llama4_text llava longcat_flash mamba
    mamba2 minimax minimax_m2 ministral ministral3 mistral mistral3 mistral4 mixtral mllama
    moshi mpt nanochat nemotron olmo olmo2 olmo3 olmoe opt paligemma persimmon phi phi3
    phi4_multimodal phimoe qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe
    qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_vl recurrent_gemma rwkv seed_oss
    smollm3 stablelm starcoder2 t5gemma vaultgemma whisper xglm zamba2
""".split()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_family_is_shown_right_or_refused_by_name(model_type: str) -> None:
    """With the default fields of its class; one sentence says which."""
    hf = class_settings(model_type)
    if model_type in FAMILIES:
        ModelConfig.from_hf(hf)
        return
    with pytest.raises(ValueError, match=model_type) as refused:
        ModelConfig.from_hf(hf)
    assert hf["architectures"][0] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_family_is_compared() -> None:
    """With transformers in tests.py, or with its formulas here."""
    compared = {getattr(transformers, f"{name}Config") for name, _ in CHECKPOINTS.values()}
    in_tests = {each.model_type for each in compared}
    assert families and FAMILIES.keys() == in_tests | {"baichuan", "kimi_k2"}
    assert FAMILIES["kimi_k2"] is FAMILIES["deepseek_v3"]
    assert FAMILIES.keys() - {"baichuan", "kimi_k2"} <= set(MODEL_TYPES)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_that_of_transformers(name: str) -> None:
    config = ModelConfig.from_hf(class_settings("gemma2") | {"hidden_activation": name})
    assert config.act == name
    x = torch.linspace(-5, 5, 1001)
    tol = dict(rtol=1e-2, atol=1e-2) if name == "xielu" else {}  # its slopes are bfloat16 there
    torch.testing.assert_close(ACTIVATIONS[config.act](x), ACT2FN[name](x).float(), **tol)


def test_apertuss_activation_is_what_its_file_calls_it() -> None:
    model = empty_model(class_settings("apertus"))
    assert model.config.act == "xielu"
    slopes = dict(model.layers[0].mlp.act.named_parameters())
    assert slopes.keys() == {"alpha_p", "alpha_n"}
    plain = empty_model(class_settings("apertus") | {"hidden_act": "silu"})
    assert plain.layers[0].mlp.act is ACTIVATIONS["silu"]


@pytest.mark.parametrize("model_type", ["mamba", "", None])
def test_an_unknown_family_is_one_sentence(tmp_path: Path, model_type: str | None) -> None:
    """Which names it, and the ones that there are."""
    folder = hf_folder(tmp_path / "model", model_type=model_type)
    with pytest.raises(ValueError) as refused:
        load_model(folder)
    known = ", ".join(FAMILIES)
    assert str(refused.value) == (
        f"unsupported architecture {model_type!r} (model_type {model_type!r}); "
        f"supported model types: {known}"
    )

# --- a family of one's own ---


class NormedTransformer(Transformer):
    """A Llama with a norm behind the embedding."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.embed_norm = torch.nn.RMSNorm(config.dim, config.norm_eps)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embed_norm(super().embed(tokens))


@pytest.mark.parametrize("mode", ["none", "int8"])
def test_a_family_of_ones_own_is_a_row(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """A norm behind the embedding is loaded, used, saved and loaded again."""
    folder, hf = checkpoint("llama")
    tensors = load_file(folder / "model.safetensors")
    weight = 1 + 0.3 * torch.randn(hf.config.hidden_size)
    tensors["model.embed_norm.weight"] = weight
    config = json.loads((folder / "config.json").read_text())
    config |= dict(model_type="normed", architectures=["NormedForCausalLM"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="'NormedForCausalLM'"):
        load_model(tmp_path)

    monkeypatch.setitem(FAMILIES, "normed", Family(model=NormedTransformer))
    model = load_model(tmp_path, dtype=torch.float32, quantize=mode)
    if mode == "int8":
        save_quantized(model, tmp_path / "saved")
        model = load_model(tmp_path / "saved", dtype=torch.float32)
    model.setup_caches(1, 32)
    tokens = random_tokens(1, 25)
    x = F.rms_norm(hf.model.embed_tokens(tokens), weight.shape, weight, hf.config.rms_norm_eps)
    with torch.no_grad():
        want = hf(inputs_embeds=x).logits
    tol = 2e-4 if mode == "none" else 0.1
    close(model(tokens[:, :20], start(0)), want[:, :20], tol)
    for i in range(20, 25):
        close(model(tokens[:, i:i + 1], start(i)), want[:, i:i + 1], tol)

# --- settings that are refused ---


@pytest.mark.parametrize("n_first", [0, None])
def test_no_first_layers_of_qwen2_moe_have_a_window(n_first: int | None) -> None:
    hf = class_settings("qwen2_moe") | dict(
        layer_types=None, use_sliding_window=True, sliding_window=8, max_window_layers=n_first,
    )
    assert set(ModelConfig.from_hf(hf).windows) == {None}


@pytest.mark.parametrize("family, change, message", [
    ("gemma3_text", dict(use_bidirectional_attention=True), "use_bidirectional_attention True"),
    ("gemma4_text", dict(use_bidirectional_attention="all"), "use_bidirectional_attention"),
    ("gemma4_text", dict(num_kv_shared_layers=30), "num_kv_shared_layers = 30"),
    ("gemma4_text", dict(num_kv_shared_layers=26), "num_kv_shared_layers = 26"),
    ("gemma4_text", dict(per_layer_config={"5": dict(head_dim=0)}), "head_dim = 0"),
    ("gemma4_text", dict(per_layer_config={"5": 3}), "makes no sense"),
    ("gemma4_text", dict(enable_moe_block=True), "neither num_experts nor"),
    ("lfm2", dict(layer_types=["sliding_attention"] * 32), "layer_types.*only full_attention and"),
    ("lfm2", dict(conv_L_cache=0), "conv_L_cache = 0"),
    ("gemma2", dict(hidden_activation="relu2"), "hidden_act 'relu2'"),
    ("gemma2", dict(attn_logit_softcapping=-1.0), "attn_logit_softcapping = -1.0"),
    ("gemma2", dict(query_pre_attn_scalar=0), "query_pre_attn_scalar = 0"),
    ("gemma3_text", dict(sliding_window_pattern=-2, layer_types=None), "sliding_window_pattern"),
    ("qwen3", dict(layer_types=["chunked_attention"] * 32), "layer_types.*chunked_attention"),
    ("qwen3", dict(layer_types=["full_attention"]), "each of 32 layers"),
    ("olmo2", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0)), "'dynamic'"),
    ("qwen2", dict(rope_parameters=dict(rope_type="xpos")), "'xpos'"),
    ("qwen2", dict(rope_parameters=dict(rope_type=["yarn"])), "rope type"),
    ("qwen2", dict(rope_parameters=dict(rope_type="yarn", factor=2.0, rope_theta=1.0)), "above 1"),
    ("llama", dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor 0.5"),
    ("phi3", dict(partial_rotary_factor=0.35, rope_parameters=None), "0.35: 33 of .* 96 values"),
    ("phi3", dict(rope_parameters=dict(rope_type="longrope")), "short_factor, a list of 48"),
    ("qwen3", dict(layer_types=5), "layer_types = 5"),
    ("phi3", dict(max_position_embeddings=8192, rope_parameters=dict(
        rope_type="longrope", long_factor=[1.0] * 48)), "short_factor"),
    ("phi3", dict(rope_parameters=dict(rope_type="longrope", short_factor=["1"] * 48,
                                       long_factor=["1"] * 48)), "list of 48 numbers"),
    ("smollm3", dict(no_rope_layers=[1, 0]), "each of 36 layers"),
    ("granite", dict(residual_multiplier="0.2"), "residual_multiplier = '0.2'"),
    ("qwen2_moe", dict(shared_expert_intermediate_size=True), "intermediate_size = True, not a"),
    ("qwen2_moe", dict(shared_expert_intermediate_size=False), "intermediate_size = False, not a"),
    ("qwen2_moe", dict(shared_expert_intermediate_size=-8), "intermediate_size = -8, not a"),
    ("qwen2_moe", dict(num_experts=2048, num_hidden_layers=33, layer_types=None),
     "num_experts = 2048 in each of 33 layers: there may be 65536"),
    ("granite", dict(quantization_config={"quant_method": "fp8"}), "fp8"),
    ("gpt_neox", dict(rope_parameters=None, rotary_pct="0.5"), "partial_rotary_factor = '0.5'"),
    ("gpt_neox", dict(rope_parameters=None, rotary_emb_base=0), "rope_theta = 0"),
    ("gpt_neox", dict(layer_norm_eps=-1), "layer_norm_eps = -1"),
    ("gpt_neox", dict(hidden_act="relu2"), "hidden_act 'relu2'"),
    ("apertus", dict(hidden_act="relu2"), "hidden_act 'relu2'"),
    ("apertus", dict(hidden_act=None), "hidden_act None"),
    ("apertus", dict(xielu_alpha_p=[0.5]), "xielu_alpha_p = .*each of 32 layers"),
    ("apertus", dict(xielu_alpha_p=["x"] * 32), "makes no sense"),
    ("apertus", dict(rope_parameters=dict(rope_type="llama3")), "low_freq_factor = None"),
    ("hunyuan_v1_moe", dict(moe_topk=[1, 2]), r"moe_topk = \[1, 2\]"),
    ("hunyuan_v1_moe", dict(moe_topk=[]), "makes no sense"),
    ("hunyuan_v1_moe", dict(moe_topk=2), "moe_topk is 2"),
    ("hunyuan_v1_moe", dict(num_experts=None), "num_experts = None"),
    ("hunyuan_v1_moe", dict(num_experts=[10**9] * 2), "there may be 65536"),
    ("lfm2_moe", dict(num_dense_layers="2"), "makes no sense"),
    ("ernie4_5_moe", dict(moe_norm_min=0.5), "unsupported moe_norm_min 0.5"),
])
def test_what_would_go_wrong_is_refused(family: str, change: dict, message: str) -> None:
    """Before any tensor is read."""
    with pytest.raises(ValueError, match=message):
        empty_model(class_settings(family) | change)
