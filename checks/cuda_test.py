"""A GPU says what a CPU says: captured steps, eager ones, prompts in chunks; small random models.

    python -m pytest --noconftest checks/cuda_test.py

Skipped without a CUDA device. It needs pytest and what the core needs, no other file of checks/, so
that it runs on a machine that was lent for a few minutes. GPT_FLASH_TEST_DEVICE=cpu compares a CPU
with itself: benchmarks/device.py does so where there is no GPU, to know that all of this runs."""
from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import generate as generation
from generate import compile_model, generate
from kernels import flash_decode, flash_decode_reference
from model import Transformer, load_model, math_attention, open_checkpoint, prefill_attention

DEVICE = os.environ.get("GPT_FLASH_TEST_DEVICE", "cuda")
ON_A_GPU = DEVICE == "cuda"
pytestmark = pytest.mark.skipif(
    ON_A_GPU and not torch.cuda.is_available(), reason="needs a CUDA device"
)

BASE = dict(
    model_type="llama",
    vocab_size=320,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=256,
    max_position_embeddings=256,
)
TWO_KINDS = ["sliding_attention", "full_attention"]
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=64)
MODELS = {
    "llama": {},
    "qwen3": dict(model_type="qwen3"),
    "many tokens": dict(vocab_size=32000),
    "ring": dict(model_type="mistral", sliding_window=24),
    "two kinds of layers": dict(
        model_type="gemma2", sliding_window=24, layer_types=TWO_KINDS, query_pre_attn_scalar=20,
        attn_logit_softcapping=3.0, final_logit_softcapping=5.0),
    "experts": dict(model_type="qwen3_moe", num_experts=8, norm_topk_prob=True, **EXPERTS),
    "sinks and experts": dict(
        model_type="gpt_oss", num_local_experts=4, sliding_window=24, layer_types=TWO_KINDS,
        num_experts_per_tok=2),
    "compressed cache": dict(
        model_type="deepseek_v3", kv_lora_rank=24, q_lora_rank=40, qk_nope_head_dim=24,
        qk_rope_head_dim=8, v_head_dim=16, first_k_dense_replace=2, n_routed_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=64, n_shared_experts=1, n_group=1,
        topk_group=1, routed_scaling_factor=1.0, num_key_value_heads=8),
    "states": dict(
        model_type="qwen3_5_text", linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=32, linear_value_head_dim=48, linear_conv_kernel_dim=4,
        layer_types=["linear_attention", "full_attention"]),
}
PROMPTS = [[5, 6, 7], [9], list(range(10, 60))]
Made = Callable[..., Transformer]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """made(name of MODELS, device, options of load_model) -> the model, in float32."""
    folders: dict[str, Path] = {}

    def make(name: str, device: str = DEVICE, **options: Any) -> Transformer:
        if name not in folders:
            folders[name] = random_folder(tmp_path_factory.mktemp("model"), BASE | MODELS[name])
        return load_model(folders[name], device=device, **{"dtype": torch.float32, **options})

    return make


def random_folder(folder: Path, hf: dict[str, Any]) -> Path:
    """A Hugging Face folder with random weights; biases and norms too are random."""
    config = folder / "config.json"
    config.write_text(json.dumps(hf))
    checkpoint = open_checkpoint(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for parts in checkpoint.plan(checkpoint.empty_model()).values():
        for name, shape in parts.items():
            x = torch.randn(shape, generator=generator)
            tensors[name] = 0.1 * x if len(shape) > 1 else 1 + 0.3 * x
    save_file(tensors, folder / "model.safetensors")
    return folder


def error(got: Tensor, want: Tensor) -> float:
    """Of all numbers together, relative to those that are wanted; NaN is no small one."""
    want = want.double().cpu()
    return ((got.double().cpu() - want).norm() / want.norm()).item()


def typical_error(got: Tensor, want: Tensor) -> float:
    """Of a token in the middle, got and want [B, T, V]: where rounding chooses another expert, that
    of its token is large."""
    errors = [error(*both) for both in zip(got.flatten(0, 1), want.flatten(0, 1))]
    return sorted(errors, key=lambda e: (math.isnan(e), e))[(len(errors) - 1) // 2]

# --- logits ---


def logits(
    model: Transformer, kv_dtype: torch.dtype | None, attention: str
) -> list[Tensor]:
    """Of two rows: a prompt in two chunks, and steps of one and of five tokens behind it."""
    model.setup_caches(2, 96, kv_dtype, attention)
    tokens = torch.randint(320, (2, 76), generator=torch.Generator().manual_seed(1))
    tokens = tokens.to(model.device)
    found = []
    done = 0
    for n in (40, 20, 1, 5, 1):
        input_pos = torch.full((2,), done, dtype=torch.int32, device=model.device)
        found.append(model(tokens[:, done:done + n], input_pos))
        done += n
    return found


@pytest.mark.parametrize("name, options, kv_dtype, attention, most", [
    *((name, {}, None, "flash", 1e-3) for name in MODELS),
    ("llama", {}, None, "math", 1e-3),
    ("two kinds of layers", {}, None, "math", 1e-3),
    *((name, {}, torch.int8, "flash", 0.03) for name in ("llama", "ring")),
    # a CPU's products round otherwise
    *((name, dict(quantize=mode), None, "flash", 0.04)
      for name in ("llama", "experts", "sinks and experts") for mode in ("int8", "int4")),
    *((name, dict(dtype=torch.bfloat16), None, "flash", 0.05)
      for name in MODELS if "experts" not in name),  # of which rounding chooses others
], ids=str)
def test_logits_are_a_cpus(
    made: Made, name: str, options: dict[str, Any], kv_dtype: torch.dtype | None, attention: str,
    most: float,
) -> None:
    on_cpu = made(name, "cpu", **{k: v for k, v in options.items() if k != "dtype"})
    want = logits(on_cpu, kv_dtype, "flash")
    got = logits(made(name, **options), kv_dtype, attention)
    of = typical_error if "experts" in name and "quantize" in options else error
    assert all(of(*both) < most for both in zip(got, want, strict=True))


@pytest.mark.parametrize("T, S", [(300, 300), (1, 50), (70, 300), (512, 1536)])
@pytest.mark.parametrize("window", [None, 33, 1000])
@pytest.mark.parametrize("G", [1, 4])
def test_prefill_attention_in_bfloat16(T: int, S: int, window: int | None, G: int) -> None:
    """Of a prompt's first chunk and of later ones: on a GPU PyTorch's flash kernel, in one call."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, n, 64, generator=generator).to(DEVICE, torch.bfloat16)
        for heads, n in ((2 * G, T), (2, S), (2, S))
    )
    index = torch.arange(S - T, S, device=DEVICE).expand(2, T)
    key_pos = torch.arange(S, device=DEVICE)[None]
    options = dict(scale=None, window=window)
    want = math_attention(q.float(), k.float(), v.float(), index, key_pos, **options)
    got = prefill_attention(q, k, v, index, key_pos, **options, in_order=True)
    assert error(got, want) < 0.02


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_experts_of_a_prompt_in_bfloat16(made: Made, quantize: str) -> None:
    """On a GPU one product for all of them, also for the one that no token chooses."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 43, 128, generator=generator)
    weights, ids = torch.rand(2, 43, 7, generator=generator).topk(2)

    def run(model: Transformer) -> Tensor:
        experts = model.layers[0].mlp.experts
        return experts(*(each.to(model.device, model.dtype) for each in (x, weights)),
                       ids.to(model.device))

    want = run(made("experts", "cpu", quantize=quantize))
    got = run(made("experts", dtype=torch.bfloat16, quantize=quantize))
    assert error(got, want) < 0.08


def test_attention_of_a_long_cache() -> None:
    """In all places of a cache that a prompt and steps fill."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 8, 1, 64, generator=generator).to(DEVICE, torch.bfloat16)
    kv = torch.randn(2, 2, 2, 3000, 64, generator=generator).to(DEVICE, torch.bfloat16)
    lens = torch.tensor([2999, 17], dtype=torch.int32, device=DEVICE)
    want = flash_decode_reference(q, *kv, lens)
    assert error(flash_decode(q, *kv, lens), want) < 0.02

# --- tokens ---

# what is asked, and whether all tokens are a CPU's: with rounded weights and caches texts part
# ways, and so only the first tokens of two answers of three are to be
ASKED = {
    "greedy": (dict(), True),
    "sampled": (dict(temperature=1.0, seed=3), True),
    "of the likeliest": (dict(temperature=1.0, seed=3, top_k=20), True),
    "filtered": (dict(temperature=1.0, seed=3, top_p=0.9, min_p=0.02), True),
    "lookup": (dict(speculate_k=4), True),
    "draft": (dict(speculate_k=3, draft=True), True),
    "chunks": (dict(chunk=16), True),
    "refills": (dict(rows=2), True),
    "int8 cache": (dict(kv_dtype=torch.int8), False),
    "int8": (dict(quantize="int8"), False),
    "int4": (dict(quantize="int4"), False),
}


def tokens(
    made: Made, name: str, device: str, compiled: bool, asked: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> list[list[int]]:
    """What a model answers to PROMPTS, twice over where rows are to be refilled."""
    asked = dict(asked)
    monkeypatch.setattr(generation, "PREFILL_CHUNK", asked.pop("chunk", 8192))
    model = made(name, device, quantize=asked.pop("quantize", "none"))
    rows = asked.pop("rows", len(PROMPTS))
    model.setup_caches(rows, 128, asked.pop("kv_dtype", None), "flash")
    if asked.get("draft"):
        asked["draft"] = made("qwen3", device)
    for each in filter(None, (model, asked.get("draft"))):
        if compiled:
            each.compile_options = {"coordinate_descent_tuning": False}
            compile_model(each)
    return generate(model, PROMPTS, 24, compile=compiled, **asked)


@pytest.mark.parametrize("how, name", [
    *(("greedy", name) for name in MODELS),
    *((how, "llama") for how in ASKED if how != "greedy"),
    ("sampled", "many tokens"),
    ("filtered", "many tokens"),
    ("refills", "ring"),
    ("chunks", "ring"),
    ("lookup", "two kinds of layers"),
    ("int4", "experts"),
])
def test_tokens_are_a_cpus(
    made: Made, monkeypatch: pytest.MonkeyPatch, how: str, name: str
) -> None:
    """Eager, and out of a CUDA graph."""
    asked, exact = ASKED[how]
    want = tokens(made, name, "cpu", False, asked, monkeypatch)
    for compiled in (False, True) if ON_A_GPU else (False,):
        got = tokens(made, name, DEVICE, compiled, asked, monkeypatch)
        if exact:
            assert got == want, f"compiled: {compiled}"
        else:
            begin_alike = sum(ours[0] == theirs[0] for ours, theirs in zip(got, want, strict=True))
            assert begin_alike >= 2, f"compiled: {compiled}, {got}, not {want}"
