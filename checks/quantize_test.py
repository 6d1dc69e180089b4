"""Tests of quantize.py: layers, saved models, the int8 cache, quality, the flags that save."""
import copy
import io
import json
import math
import os
import subprocess
import sys
import weakref
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import cpu.products  # puts what a CPU has into LAYOUTS
import generate
import quantize
from benchmarks.quality import perplexity
from checks.common import CPU_ENV, HERE, hf_folder, ours, run_cli
from cli.stats import weight_bytes
from formats import save_tokenizer
from formats.default import default_model
from generate import Tokenizer, load_tokenizer
from model import KVCache, Transformer, load_model
from quantize import (
    Int4Linear, Int8Linear, Linear, QuantizedLinear, new_folder, quantize_linear, quantize_model,
    save_quantized,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_linear(
    N: int, K: int, bias: bool = True, dtype: torch.dtype = torch.float32
) -> Linear:
    torch.manual_seed(N * K)
    return Linear(K, N, bias=bias).to(dtype).requires_grad_(False)


def random_ids(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(320, shape, generator=generator)


def whole(layer: QuantizedLinear) -> Tensor:
    """The weight that a layer stands for, float32."""
    return torch.cat(list(layer.dense(torch.float32)))


# --- layers ---

def stored_weight(layer: QuantizedLinear) -> Tensor:
    """By the definition, from the tensors of a layer that is not packed."""
    scales = layer.scales.float()[..., None]
    if layer.mode == "int8":
        return layer.weight.float() * scales
    nibbles = torch.stack((layer.weight & 15, layer.weight >> 4), -1)  # (N, K/2, 2)
    groups = nibbles.view(layer.out_features, -1, layer.group_size).float()
    zeros = layer.zeros.float()[..., None]
    return ((groups - 8) * scales + zeros).flatten(1)


@pytest.mark.parametrize("bf16", [False, True])  # with a CPU's instructions for it, or without
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode, N, K, group_size", [
    ("int8", 64, 64, 32),
    ("int8", 65, 96, 32),
    ("int8", 33, 40, 32),
    ("int8", 1, 7, 32),
    ("int8", 1030, 48, 32),
    ("int4", 64, 64, 32),
    ("int4", 65, 96, 32),
    ("int4", 1, 32, 32),
    ("int4", 1030, 128, 64),
    ("int4", 600, 256, 128),
])
def test_layer_computes_with_what_it_stores(
    mode: str, N: int, K: int, group_size: int, dtype: torch.dtype, bf16: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantize, "BF16", bf16)
    monkeypatch.setattr(cpu.products, "BF16", bf16)
    linear = random_linear(N, K, N % 2 == 1, dtype)
    dense = linear.weight.float()
    layer = quantize_linear(linear.pack(), mode, group_size)

    # what is stored is close to the weight, by as much as the layer says
    stored = stored_weight(layer)
    if mode == "int8":
        largest = dense.abs().amax()
        assert (stored - dense).abs().max() <= 0.51 * largest / 127 + largest * 2**-8
    error = float((stored - dense).norm() / dense.norm())
    assert layer.error == pytest.approx(error, rel=1e-3)
    assert error < {"int8": 0.01, "int4": 0.08}[mode]

    # and it is what the packed layer multiplies with
    layer = layer.pack()
    assert (layer.layout is None) == (mode == "int8" and K % 16 > 0)
    assert torch.equal(whole(layer), stored)
    bias = None if linear.bias is None else linear.bias.float()
    for rows in (1, 3, 24, 25, 128, 129):
        x = torch.randn(1, rows, K).to(dtype)
        y = layer(x)
        expected = F.linear(x.float(), stored, bias)
        assert y.dtype == dtype
        assert y.shape == (1, rows, N)
        # few rows are rounded to bfloat16
        assert (y - expected).norm() < 6e-3 * expected.norm()


def test_weights_on_the_grid_come_back_exactly() -> None:
    linear = random_linear(4, 240, False)
    steps = torch.arange(-127, 128).repeat(4, 1)[:, :240].float()
    steps[:, 0] = 127
    linear.weight.copy_(steps / 64)
    assert quantize_linear(linear, "int8").error == 0

    linear = random_linear(4, 64, False)
    steps = torch.arange(64) * 7 % 16 - 3.0
    linear.weight.copy_(steps / 8)
    assert quantize_linear(linear, "int4").error == 0


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_extreme_weights(mode: str) -> None:
    linear = random_linear(64, 64, False)
    linear.weight[0] = 0
    linear.weight[1] = 5
    linear.weight[2] = 1e-6
    linear.weight[3, 0] = 1e4
    layer = quantize_linear(linear, mode).pack()
    dense = whole(layer)
    assert dense.isfinite().all()
    assert (dense[0] == 0).all()
    assert torch.allclose(dense[1], torch.tensor(5.0), rtol=5e-3)
    assert torch.allclose(dense[2], torch.tensor(1e-6), rtol=5e-3)
    assert layer(torch.ones(1, 64)).isfinite().all()


@pytest.mark.parametrize("K, group_size", [(96, 32), (128, 64), (256, 128)])
def test_int4_packed_for_a_gpu_is_the_same_layer(
    gpu_layouts: None, K: int, group_size: int
) -> None:
    """What is saved, and what many and few rows are multiplied with."""
    layer = quantize_linear(random_linear(70, K), "int4", group_size)
    stored = {name: tensor.clone() for name, tensor in layer.stored().items()}
    weight = whole(layer)
    x = torch.randn(3, K).bfloat16()
    expected = F.linear(x.float(), weight).to(x.dtype)
    assert layer.pack().layout is not None
    for name, tensor in layer.stored().items():
        assert torch.equal(tensor, stored[name])
    assert torch.equal(whole(layer), weight)
    assert torch.equal(layer.layout.product(layer, x), expected)


def test_int4_beats_plain_ranges() -> None:
    linear = random_linear(256, 256, False)
    linear.weight.normal_()
    layer = quantize_linear(linear, "int4")
    w = linear.weight.view(256, -1, 32)
    low, high = w.aminmax(dim=-1, keepdim=True)
    step = (high - low) / 15
    plain = ((w - low) / step).round() * step + low
    assert layer.error < 0.95 * (plain - w).norm() / w.norm()


def test_what_does_not_fit_keeps_its_precision_and_is_said(
    capsys: pytest.CaptureFixture[str]
) -> None:
    quantize.say_once.cache_clear()
    linear = random_linear(16, 40)
    assert quantize_linear(linear, "int4") is linear
    assert quantize_linear(linear, "int4", 64) is linear
    err = capsys.readouterr().err
    assert "40 inputs" in err
    assert "groups of 32" in err
    assert "groups of 64" in err


@pytest.mark.parametrize("mode, group_size", [("int3", 32), ("int4", 48)])
def test_unknown_quantizations_are_refused(mode: str, group_size: int) -> None:
    with pytest.raises(ValueError, match=f"{mode}.*{group_size}"):
        quantize_linear(random_linear(16, 40), mode, group_size)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_compiles_to_one_graph_for_all_layers(mode: str) -> None:
    layers = [quantize_linear(random_linear(96, 64), mode).pack() for _ in range(3)]

    def step(layer: QuantizedLinear, x: Tensor) -> Tensor:
        return F.silu(layer(x)) * 2

    def many(layer: QuantizedLinear, x: Tensor) -> Tensor:
        return layer(x)

    torch._dynamo.reset()
    compiled_step = torch.compile(step, fullgraph=True, dynamic=False)
    x = torch.randn(1, 1, 64)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for layer in layers:
            y = compiled_step(layer, x)
            torch.testing.assert_close(y, step(layer, x), rtol=1e-2, atol=1e-2)

    compiled_many = torch.compile(many, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (5, 40, 300):
            x = torch.randn(1, rows, 64)
            y = compiled_many(layers[0], x)
            torch.testing.assert_close(y, many(layers[0], x), rtol=1e-2, atol=1e-2)


def test_one_row_of_a_large_weight_is_that_row() -> None:
    """It may go through a product with more rows."""
    large = random_linear(2304, 2048, dtype=torch.bfloat16)
    x = torch.randn(3, 1, 2048).bfloat16()
    expected = F.linear(x.float(), large.weight.float(), large.bias.float())
    large.pack()
    for row, want in zip(x, expected):
        got = large(row[None])
        assert got.shape == (1, 1, 2304) and got.dtype == torch.bfloat16 and got.is_contiguous()
        assert (got[0] - want).norm() < 4e-3 * want.norm()
    assert large(x[0, 0]).shape == (2304,)


# --- models ---

def new_tokens(model: Transformer, kv_dtype: torch.dtype | None = None) -> list[list[int]]:
    model.setup_caches(2, 64, kv_dtype)
    prompts = [[1, 2, 3], list(range(5, 45))]
    return generate.generate(model, prompts, 12)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_save_load_generate(tmp_path: Path, mode: str, tied: bool, dtype: torch.dtype) -> None:
    source = hf_folder(tmp_path / "m", tie_word_embeddings=tied)
    model = load_model(source, dtype=dtype)
    before = weight_bytes(model)
    embedding = model.embed_tokens.weight.clone()

    # every linear layer is quantized, the output layer to int8, and the embedding is not
    assert quantize_model(model, mode) is model
    kinds = {}
    for name, module in model.named_modules():
        if isinstance(module, (Linear, QuantizedLinear)):
            kinds[name] = type(module)
    assert kinds.pop("lm_head") is Int8Linear
    assert set(kinds.values()) == {Int8Linear if mode == "int8" else Int4Linear}
    assert torch.equal(model.embed_tokens.weight, embedding)
    bounds = {("int8", 4): 0.3, ("int4", 4): 0.25, ("int8", 2): 0.6, ("int4", 2): 0.5}
    assert weight_bytes(model) < before * bounds[mode, dtype.itemsize]

    # saved and loaded, and quantized while loading, it says the same
    tokens = new_tokens(model)
    save_quantized(model, tmp_path / "q")
    assert new_tokens(load_model(tmp_path / "q", dtype=dtype)) == tokens
    assert new_tokens(load_model(source, dtype=dtype, quantize=mode)) == tokens
    stored = load_file(tmp_path / "q/model.safetensors")
    kinds = {x.dtype for name, x in stored.items() if name.endswith("down_proj.weight")}
    assert kinds == {torch.int8 if mode == "int8" else torch.uint8}

    # again from the loaded one: the same bytes
    save_quantized(load_model(tmp_path / "q", dtype=dtype), tmp_path / "r")
    once = (tmp_path / "q/model.safetensors").read_bytes()
    assert (tmp_path / "r/model.safetensors").read_bytes() == once
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "q", "r"]


@pytest.mark.parametrize("when", ["while loading", "loaded"])
def test_dense_layers_go_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Quantizing takes no more memory than what stays and a layer."""
    alive = weakref.WeakSet()
    most = 0
    one_layer = quantize.quantize_linear

    def watched(linear: quantize.Linear, *args: object) -> torch.nn.Module:
        nonlocal most
        alive.add(linear)
        most = max(most, len(alive))
        return one_layer(linear, *args)

    monkeypatch.setattr(quantize, "quantize_linear", watched)
    monkeypatch.setattr("model.quantize_linear", watched)
    folder = hf_folder(tmp_path / "model", tie_word_embeddings=True)
    if when == "loaded":
        quantize_model(load_model(folder), "int8")
    else:
        load_model(folder, quantize="int8")
    assert 0 < most <= 2  # the one before is let go of a moment later


def test_quantized_model_is_close(tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "m")
    ids = random_ids(1, 40)

    def logits(mode: str | None) -> Tensor:
        model = load_model(source, dtype=torch.float32, quantize=mode)
        model.setup_caches(1, 64)
        return model(ids, torch.zeros(1, dtype=torch.int32))

    exact = logits(None)
    for mode, bound in (("int8", 0.06), ("int4", 0.4)):
        assert 1e-4 < (logits(mode) - exact).norm() / exact.norm() < bound


def test_layers_that_do_not_fit_are_saved_as_they_are(tmp_path: Path) -> None:
    source = hf_folder(
        tmp_path / "m", hidden_size=48, num_attention_heads=2, intermediate_size=96,
        tie_word_embeddings=True,
    )
    model = load_model(source, dtype=torch.bfloat16, quantize="int4")
    block = model.layers[0]
    assert type(block.self_attn.o_proj) is Linear
    assert type(block.mlp.down_proj) is Int4Linear
    tokens = new_tokens(model)
    save_quantized(model, tmp_path / "q")
    assert new_tokens(load_model(tmp_path / "q")) == tokens


def test_a_tied_output_that_was_left_dense(tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "m", tie_word_embeddings=True)
    model = load_model(source, dtype=torch.float32)
    block = model.layers[0].mlp
    block.down_proj = quantize_linear(block.down_proj, "int8").pack()
    tokens = new_tokens(model)
    save_quantized(model, tmp_path / "q")
    assert "lm_head.weight" not in load_file(tmp_path / "q/model.safetensors")
    assert new_tokens(load_model(tmp_path / "q", dtype=torch.float32)) == tokens


def test_interrupted_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(hf_folder(tmp_path / "m"), quantize="int8")

    def broken(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "save_file", broken)
    with pytest.raises(KeyboardInterrupt):
        save_quantized(model, tmp_path / "q")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_save_refuses(tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "m")
    model = load_model(source)
    with pytest.raises(ValueError, match="no quantized layers"):
        save_quantized(model, tmp_path / "q")
    quantize_model(model, "int8")
    before = sorted(source.iterdir())
    with pytest.raises(ValueError, match="m exists already; remove it or choose another folder$"):
        save_quantized(model, source)
    assert sorted(source.iterdir()) == before


@pytest.mark.parametrize("place", ["empty", "link", "link to nothing", "new/and/new"])
def test_a_folder_appears_where_none_or_an_empty_one_is(place: str, tmp_path: Path) -> None:
    """A link to it stays a link, and what is for its owner alone stays so."""
    there, other = tmp_path / place, tmp_path / "other"
    other.mkdir()
    if place == "empty":
        there.mkdir(0o700)
    elif place.startswith("link"):
        there.symlink_to(tmp_path / "target")
        if place == "link":
            (tmp_path / "target").mkdir()
    with pytest.raises(KeyboardInterrupt):
        with new_folder(there) as new:
            (new / "half").touch()
            raise KeyboardInterrupt
    assert not any(tmp_path.rglob("*half")) and not (tmp_path / "new").exists()
    with new_folder(there) as new:
        (new / "whole").touch()
    assert [path.name for path in there.iterdir()] == ["whole"]
    assert there.is_symlink() == place.startswith("link")
    usual = other.stat().st_mode & 0o777  # as the umask has it
    assert there.stat().st_mode & 0o777 == (0o700 if place == "empty" else usual)
    assert not list(tmp_path.glob(".gpt-flash-*"))


def test_a_folder_that_cannot_be_replaced_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loop = tmp_path / "inside" / "loop"
    for place, message in [
        (".", "is in use; choose a new folder inside"), ("", "is in use"), ("/", "exists already"),
        ("/dev/null", "exists already"), ("/dev/null/x", "Not a directory"),
        ("x" * 300, "File name too long"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            with new_folder(place):
                raise AssertionError("begun")
    loop.parent.mkdir()
    loop.symlink_to(loop)
    with pytest.raises(ValueError, match="exists already"):
        with new_folder(loop):
            raise AssertionError("begun")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the configuration of a model saved in int4."""
    folder = tmp_path_factory.mktemp("saved")
    model = load_model(hf_folder(folder / "m"), quantize="int4")
    save_quantized(model, folder / "q")
    config = json.loads((folder / "q/config.json").read_text())
    return load_file(folder / "q/model.safetensors"), config


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_tensors_of_quantized_folders_are_refused_by_name(
    tmp_path: Path, saved: tuple[dict[str, Tensor], dict]
) -> None:
    tensors, config = saved
    name = "layers.1.self_attn.o_proj.scales"
    missing = {key: tensor for key, tensor in tensors.items() if key != name}
    narrow = {**tensors, name: tensors[name][:, :1].contiguous()}
    surplus = {**tensors, "layers.1.surplus": torch.zeros(1)}
    for wrong, message in (
        (missing, f"no tensor {name}"),
        (narrow, f"{name} has shape"),
        (surplus, "unexpected tensor layers.1.surplus"),
    ):
        write_folder(tmp_path, wrong, config)
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)


def test_a_quantized_folder_is_not_quantized_again(
    tmp_path: Path, saved: tuple[dict[str, Tensor], dict]
) -> None:
    write_folder(tmp_path, *saved)
    with pytest.raises(ValueError, match="quantized already"):
        load_model(tmp_path, quantize="int8")


@pytest.mark.parametrize("entry", [
    {"layers": {"layers.7.self_attn.o_proj": ["int8", None]}},
    {"layers": {"lm_head": ["int2", None]}},
    {"layers": {"lm_head": ["int4", 33]}},
    {"layers": {"lm_head": ["int4", 0]}},
    {"layers": {"lm_head": ["int4", "x"]}},
    {"layers": {"lm_head": 3}},
    {"layers": {"norm": ["int8", None]}},
    {"layers": []},
    1,
], ids=str)
def test_layouts_that_do_not_fit_the_model_are_refused(
    tmp_path: Path, saved: tuple[dict[str, Tensor], dict], entry: object
) -> None:
    tensors, config = saved
    write_folder(tmp_path, tensors, {**config, "gpt_flash": entry})
    with pytest.raises(ValueError, match="gpt_flash entry"):
        load_model(tmp_path)


# --- the int8 cache and quality ---

@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_int8_cache_gives_the_same_numbers_by_flash_and_math(tmp_path: Path, family: str) -> None:
    model = load_model(hf_folder(tmp_path / "m", model_type=family), dtype=torch.float32)
    ids = random_ids(2, 60)

    def logits(attention: str) -> Tensor:
        model.setup_caches(2, 64, torch.int8, attention)
        parts = []
        for start in range(0, 60, 4):
            input_pos = torch.full((2,), start, dtype=torch.int32)
            parts.append(model(ids[:, start:start + 4], input_pos))
        return torch.cat(parts, 1)

    torch.testing.assert_close(logits("flash"), logits("math"), rtol=0, atol=5e-3)


def test_large_key_biases_survive_the_int8_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(hf_folder(tmp_path / "m", model_type="qwen2"), dtype=torch.float32)
    ids = random_ids(120).tolist()

    def leave(model: Transformer, cache: KVCache) -> None:
        """In place of calibrate_k_mean: nothing is subtracted from keys."""

    _, smoothed = perplexity(model, ids, 120, torch.int8, copy.copy(model))
    monkeypatch.setattr("model.calibrate_k_mean", leave)
    _, plain = perplexity(model, ids, 120, torch.int8, copy.copy(model))
    assert smoothed < 0.2 * plain  # 0.14: keys turn by up to 1.2 rad in this context


def test_perplexity_of_a_uniform_model_is_its_vocabulary(tmp_path: Path) -> None:
    model = load_model(hf_folder(tmp_path / "m"), dtype=torch.float32)
    model.lm_head = Linear(64, 320, bias=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, list(range(50)), 33) == pytest.approx(320, rel=1e-5)
    assert quantize.perplexity(model, list(range(50)), context=33) == pytest.approx(320, rel=1e-5)
    for ids in ([1], [1, 320], [-1, 1]):
        with pytest.raises(ValueError, match="at least 2 tokens of the 320"):
            perplexity(model, ids)


def test_perplexity_is_that_of_one_pass(tmp_path: Path) -> None:
    model = load_model(hf_folder(tmp_path / "m"), dtype=torch.float32)
    ids = random_ids(61)
    model.setup_caches(1, 64)
    logits = model(ids[None, :-1], torch.zeros(1, dtype=torch.int32))[0]
    expected = math.exp(F.cross_entropy(logits, ids[1:]))
    assert perplexity(model, ids.tolist()) == pytest.approx(expected, rel=1e-4)


def test_int8_cache_is_near_lossless_on_a_real_model(
    smollm: tuple[Transformer, Tokenizer], gpl: list[int]
) -> None:
    model, _ = smollm
    reference = copy.copy(model)
    exact = perplexity(reference, gpl)
    ppl, kl = perplexity(copy.copy(model), gpl, kv_dtype=torch.int8, reference=reference)
    assert kl < 8e-4
    assert abs(ppl / exact - 1) < 0.003


@pytest.mark.parametrize("mode, most_kl, most_change", [
    ("int8", 6e-3, 0.01),
    ("int4", 7e-3, 0.01),
])
def test_weights_keep_the_quality_of_a_real_model(
    smollm: tuple[Transformer, Tokenizer], gpl: list[int], mode: str, most_kl: float,
    most_change: float,
) -> None:
    reference = copy.copy(smollm[0])
    model = load_model(default_model(), dtype=torch.float32, quantize=mode)
    ids = gpl[:769]
    ppl, kl = perplexity(model, ids, reference=reference)
    exact = perplexity(reference, ids)
    assert 1e-4 < kl < most_kl
    assert abs(ppl / exact - 1) < most_change


# --- the command line ---

@pytest.fixture(scope="module")
def smollm_int8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The default model as --save writes it in int8, and what that said on stdout and stderr."""
    folder = tmp_path_factory.mktemp("save") / "smol-int8"
    words = ["--device", "cpu", "--quantize", "int8", "--save", str(folder), "--dtype", "float32"]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        generate.main(words)
    return folder, out.getvalue(), err.getvalue()


def test_saving_says_what_became_smaller(smollm_int8: tuple[Path, str, str]) -> None:
    folder, out, err = smollm_int8
    assert out == ""
    sizes = "121 layers, 537.9 MB in float32, are now 134.9 MB; largest relative error"
    assert f"{folder}: {sizes}" in err


def test_generate_opens_what_it_has_saved(
    smollm: tuple[Transformer, Tokenizer], smollm_int8: tuple[Path, str, str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    _, before = smollm
    folder, _, _ = smollm_int8
    after = load_tokenizer(folder)
    text = "Naïve café 12345 <|im_end|> \n\n\tprint('hi')  日本"
    ids = before.encode(text)
    assert after.encode(text) == ids
    assert before.decode(ids) == text
    assert after.decode(ids) == text
    question = "What is the capital of France?"
    chat = [{"role": "user", "content": question}]
    assert after.chat(chat) == before.chat(chat)
    assert after.eos_ids == before.eos_ids
    assert after.bos_id == before.bos_id
    assert after.special == before.special
    code, out, err = run_cli(
        capfd, "--checkpoint_path", folder, "--dtype", "float32", "--chat", "--prompt", question
    )
    assert code == 0, err
    assert out.strip() == "The capital of France is Paris."


def test_saving_into_a_folder_that_exists_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = hf_folder(tmp_path / "m")
    before = sorted(folder.iterdir())
    code, out, err = run_cli(capfd, "--quantize", "int8", "--save", folder)
    assert code == 2
    assert out == ""
    assert err.endswith("m exists already; remove it or choose another folder\n")
    assert err.count("\n") == 1
    assert sorted(folder.iterdir()) == before


def test_a_disk_without_room_is_refused_before_the_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.program.load_model", None)  # which is not reached
    monkeypatch.setattr("cli.program.shutil.disk_usage", lambda folder: SimpleNamespace(free=9999))
    source = hf_folder(tmp_path / "m")
    words = ["--checkpoint_path", source, "--quantize", "int8", "--save", tmp_path / "q"]
    code, _, err = run_cli(capfd, "--device", "cpu", *words)
    assert code == 2 and "q takes at least 0.1 MB, which its disk lacks\n" in err
    assert os.listdir(tmp_path) == ["m"]


def test_what_lies_outside_is_not_copied_with_a_tokenizer(tmp_path: Path) -> None:
    """Nor what only has such a name; in the hub's cache all files are links to a folder beside."""
    folder = tmp_path / "m"
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer.txt").symlink_to(tmp_path / "secret")
    (folder / "tokenizer.old").mkdir()
    (tmp_path / "copy").mkdir()
    save_tokenizer(folder, tmp_path / "copy")
    assert os.listdir(tmp_path / "copy") == ["tokenizer.json"]
    for make in (lambda file: file.symlink_to(tmp_path / "secret"), os.mkfifo, os.mkdir):
        file = folder / "chat_template.jinja"
        make(file)
        with pytest.raises(ValueError, match="cannot copy .*jinja: it is no plain file of its"):
            save_tokenizer(folder, tmp_path / "copy")
        file.rmdir() if file.is_dir() else file.unlink()
    snapshot = tmp_path / "models--x--y" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blob").write_text("{}")
    (snapshot / "tokenizer_config.json").symlink_to("../../blob")
    save_tokenizer(snapshot, tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer_config.json").read_text() == "{}"


@pytest.mark.parametrize("arguments, says", [
    (["--save", "x"], "--quantize"),
    (["--quantize", "int3"], "invalid choice"),
    (["--quantize", "int8", "--save", "x", "--prompt", "x"], "--save goes without --prompt"),
    (["--quantize", "int8", "--save", "x", "--checkpoint_path", "/nowhere/at-all"],
     "no such file"),
    (["--quantize", "int4", "--save", "x", "--group_size", "48"], "invalid choice"),
], ids=str)
def test_mistakes_in_saving_are_one_line(
    arguments: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_cli(capfd, *arguments)
    assert code == 2
    assert out == ""
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments, says", [
    ([], "--perplexity"),
    (["--perplexity", "/nowhere/at-all"], "cannot read"),
], ids=str)
def test_mistakes_in_measuring_quality_are_one_line(arguments: list[str], says: str) -> None:
    command = [sys.executable, HERE / "benchmarks/quality.py", *arguments]
    done = subprocess.run(command, env=CPU_ENV, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert says in done.stderr
    assert ours(done.stderr).count("\n") == 1


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_gpu_multiplies_a_prompts_logits_by_its_own_product(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dequantizes within: the whole head in plain operators would be held twice."""
    layer = quantize_linear(random_linear(70, 64), mode)
    layer.is_head, layer.layout = True, quantize.LAYOUTS[mode, "cuda"]
    given = []

    def product(layer: torch.nn.Module, x: Tensor) -> Tensor:
        given.append(x)
        return x.new_zeros(len(x), layer.out_features)

    monkeypatch.setattr(layer.layout, "product", product)
    layer(torch.randn(2, 40, 64))
    assert [(x.dtype, x.shape) for x in given] == [(torch.bfloat16, (80, 64))]
