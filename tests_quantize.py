"""Tests of quantize.py: numbers, round trips, refusals, and the quality of a real model."""
import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import quantize
from generate import default_model, generate, load_tokenizer
from generate import main as generate_main
from model import load_model
from quantize import Int4Linear, Int8Linear, Linear, perplexity, quantize_linear, quantize_model, save_quantized

GPL = "/usr/share/common-licenses/GPL-3"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = {"model_type": "llama", "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 160, "max_position_embeddings": 128}

def hf_folder(folder, **changes):
    """A Hugging Face folder with random weights."""
    hf = {**SMALL, **changes}
    dim, ffn, head_dim = hf["hidden_size"], hf["intermediate_size"], hf["hidden_size"] // hf["num_attention_heads"]
    kv = hf["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens": (hf["vocab_size"], dim), "model.norm": (dim,)}
    if not hf.get("tie_word_embeddings"):
        shapes["lm_head"] = (hf["vocab_size"], dim)
    for i in range(hf["num_hidden_layers"]):
        block = {"self_attn.q_proj": (dim, dim), "self_attn.k_proj": (kv, dim), "self_attn.v_proj": (kv, dim),
                 "self_attn.o_proj": (dim, dim), "mlp.gate_proj": (ffn, dim), "mlp.up_proj": (ffn, dim),
                 "mlp.down_proj": (dim, ffn), "input_layernorm": (dim,), "post_attention_layernorm": (dim,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) * (0.2 if len(shape) == 2 else 1)
               for name, shape in shapes.items()}
    if hf["model_type"] == "qwen2":  # biases: large ones on keys, in channels that turn slowly
        for i in range(hf["num_hidden_layers"]):
            for part, n in (("q", dim), ("k", kv), ("v", kv)):
                bias = torch.randn(n, generator=generator)
                if part == "k":
                    bias.view(-1, 2, head_dim // 2)[..., head_dim // 4:] *= 50
                tensors[f"model.layers.{i}.self_attn.{part}_proj.bias"] = bias
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf))
    return folder

def random_linear(N, K, bias=True, dtype=torch.float32):
    torch.manual_seed(N * K)
    return Linear(K, N, bias=bias).to(dtype).requires_grad_(False)

# --- layers ---

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode, N, K, group_size", [
    ("int8", 64, 64, 32), ("int8", 65, 96, 32), ("int8", 33, 40, 32), ("int8", 1, 7, 32), ("int8", 1030, 48, 32),
    ("int4", 64, 64, 32), ("int4", 65, 96, 32), ("int4", 1, 32, 32), ("int4", 1030, 128, 64), ("int4", 600, 256, 128)])
def test_layer_computes_with_what_it_stores(mode, N, K, group_size, dtype):
    linear = random_linear(N, K, N % 2 == 1, dtype)
    dense = linear.weight.float()
    layer = quantize_linear(linear.pack(), mode, group_size)
    if mode == "int8":
        stored = layer.weight.float() * layer.scales.float()[:, None]
        assert (stored - dense).abs().max() <= 0.51 * dense.abs().amax() / 127 + dense.abs().amax() * 2**-8
    else:
        nibbles = torch.stack((layer.weight & 15, layer.weight >> 4), -1).view(N, -1, group_size).float()
        stored = ((nibbles - 8) * layer.scales.float()[..., None] + layer.zeros.float()[..., None]).flatten(1)
    error = float((stored - dense).norm() / dense.norm())
    assert layer.error == pytest.approx(error, rel=1e-3) and error < {"int8": 0.01, "int4": 0.08}[mode]
    layer = layer.pack()
    assert torch.equal(layer.dense(slice(0, N), torch.float32), stored)
    for rows in (1, 3, 24, 25, 128, 129):
        x = torch.randn(1, rows, K).to(dtype)
        y, expected = layer(x), F.linear(x.float(), stored, None if linear.bias is None else linear.bias.float())
        assert y.dtype == dtype and y.shape == (1, rows, N)
        # few rows are rounded to bfloat16
        assert (y - expected).norm() < 6e-3 * expected.norm()

def test_weights_on_the_grid_come_back_exactly():
    levels = torch.arange(-127, 128).repeat(4, 1)[:, :240].float() / 64
    levels[:, 0] = 127 / 64
    linear = random_linear(4, 240, False)
    linear.weight.copy_(levels)
    assert quantize_linear(linear, "int8").error == 0
    linear = random_linear(4, 64, False)
    linear.weight.copy_((torch.arange(64) * 7 % 16 - 3.0) / 8)
    assert quantize_linear(linear, "int4").error == 0

@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_extreme_weights(mode):
    linear = random_linear(64, 64, False)
    linear.weight[0], linear.weight[1], linear.weight[2] = 0, 5, 1e-6
    linear.weight[3, 0] = 1e4
    layer = quantize_linear(linear, mode).pack()
    dense = layer.dense(slice(0, 64), torch.float32)
    assert dense.isfinite().all() and (dense[0] == 0).all() and torch.allclose(dense[1], torch.tensor(5.0), rtol=5e-3)
    assert layer(torch.ones(1, 64)).isfinite().all() and torch.allclose(dense[2], torch.tensor(1e-6), rtol=5e-3)

def test_int4_beats_plain_ranges():
    linear = random_linear(256, 256, False)
    linear.weight.normal_()
    layer, w = quantize_linear(linear, "int4"), linear.weight.view(256, -1, 32)
    low, high = w.aminmax(dim=-1, keepdim=True)
    plain = ((w - low) / (high - low) * 15).round() / 15 * (high - low) + low
    assert layer.error < 0.95 * (plain - w).norm() / w.norm()

def test_what_does_not_fit_keeps_its_precision_and_is_said(capsys):
    quantize.say_once.cache_clear()
    linear = random_linear(16, 40)
    assert quantize_linear(linear, "int4") is linear
    assert quantize_linear(linear, "int4", 64) is linear
    err = capsys.readouterr().err
    assert "40 inputs" in err and "groups of 32" in err and "groups of 64" in err
    for mode, group_size in (("int3", 32), ("int4", 48)):
        with pytest.raises(ValueError, match=f"{mode}.*{group_size}"):
            quantize_linear(linear, mode, group_size)

@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_compiles_to_one_graph_for_all_layers(mode):
    layers = [quantize_linear(random_linear(96, 64), mode).pack() for _ in range(3)]
    torch._dynamo.reset()
    step = torch.compile(lambda layer, x: F.silu(layer(x)) * 2, fullgraph=True, dynamic=False)
    x = torch.randn(1, 1, 64)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for layer in layers:
            torch.testing.assert_close(step(layer, x), F.silu(layer(x)) * 2, rtol=1e-2, atol=1e-2)
    many = torch.compile(lambda layer, x: layer(x), fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (5, 40, 300):
            x = torch.randn(1, rows, 64)
            torch.testing.assert_close(many(layers[0], x), layers[0](x), rtol=1e-2, atol=1e-2)

# --- models ---

def new_tokens(model, kv_dtype=None):
    model.setup_caches(2, 64, kv_dtype)
    return generate(model, [[1, 2, 3], list(range(5, 45))], 12)

@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_save_load_generate(tmp_path, mode, tied, dtype):
    source = hf_folder(tmp_path / "m", tie_word_embeddings=tied)
    model = load_model(source, dtype=dtype)
    before, embedding = model.weight_bytes(), model.embed_tokens.weight.clone()
    assert quantize_model(model, mode) is model
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, (Linear, Int4Linear, Int8Linear))}
    assert kinds.pop("lm_head") is Int8Linear and set(kinds.values()) == {Int8Linear if mode == "int8" else Int4Linear}
    assert torch.equal(model.embed_tokens.weight, embedding)
    assert model.weight_bytes() < before * {("int8", 4): 0.3, ("int4", 4): 0.25, ("int8", 2): 0.6, ("int4", 2): 0.5}[mode, dtype.itemsize]
    tokens = new_tokens(model)
    save_quantized(model, tmp_path / "q")
    assert new_tokens(load_model(tmp_path / "q", dtype=dtype)) == tokens
    assert new_tokens(load_model(source, dtype=dtype, quantize=mode)) == tokens
    assert {x.dtype for name, x in load_file(tmp_path / "q/model.safetensors").items() if name.endswith("down_proj.weight")} == {
        torch.int8 if mode == "int8" else torch.uint8}
    # again from the loaded one: the same bytes
    save_quantized(load_model(tmp_path / "q", dtype=dtype), tmp_path / "r")
    assert (tmp_path / "q/model.safetensors").read_bytes() == (tmp_path / "r/model.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "q", "r"]

def test_quantized_model_is_close(tmp_path):
    source = hf_folder(tmp_path / "m")
    ids = torch.randint(320, (1, 40), generator=torch.Generator().manual_seed(0))
    def logits(mode):
        model = load_model(source, dtype=torch.float32, quantize=mode)
        model.setup_caches(1, 64)
        return model(ids, torch.zeros(1, dtype=torch.int32))
    exact = logits(None)
    for mode, bound in (("int8", 0.06), ("int4", 0.4)):
        assert 1e-4 < (logits(mode) - exact).norm() / exact.norm() < bound

def test_layers_that_do_not_fit_are_saved_as_they_are(tmp_path):
    source = hf_folder(tmp_path / "m", hidden_size=48, num_attention_heads=2, intermediate_size=96, tie_word_embeddings=True)
    model = load_model(source, dtype=torch.bfloat16, quantize="int4")
    assert type(model.layers[0].self_attn.o_proj) is Linear and type(model.layers[0].mlp.down_proj) is Int4Linear
    tokens = new_tokens(model)
    save_quantized(model, tmp_path / "q")
    assert new_tokens(load_model(tmp_path / "q")) == tokens

def test_a_tied_output_that_was_left_dense(tmp_path):
    model = load_model(hf_folder(tmp_path / "m", tie_word_embeddings=True), dtype=torch.float32)
    block = model.layers[0].mlp
    block.down_proj = quantize_linear(block.down_proj, "int8").pack()
    tokens = new_tokens(model)
    save_quantized(model, tmp_path / "q")
    assert "lm_head.weight" not in load_file(tmp_path / "q/model.safetensors")
    assert new_tokens(load_model(tmp_path / "q", dtype=torch.float32)) == tokens

def test_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    model = load_model(hf_folder(tmp_path / "m"), quantize="int8")
    def broken(tensors, file, metadata):
        file.write_bytes(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(quantize, "save_file", broken)
    with pytest.raises(KeyboardInterrupt):
        save_quantized(model, tmp_path / "q")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]

def test_save_refuses(tmp_path):
    source = hf_folder(tmp_path / "m")
    model = load_model(source)
    with pytest.raises(ValueError, match="no quantized layers"):
        save_quantized(model, tmp_path / "q")
    quantize_model(model, "int8")
    before = sorted(source.iterdir())
    with pytest.raises(ValueError, match="m exists already"):
        save_quantized(model, source)
    assert sorted(source.iterdir()) == before
    (tmp_path / "empty").mkdir()
    save_quantized(model, tmp_path / "empty")
    assert (tmp_path / "empty/config.json").exists()

def test_quantized_folders_are_refused_by_name(tmp_path):
    save_quantized(load_model(hf_folder(tmp_path / "m"), quantize="int4"), tmp_path / "q")
    file, config = tmp_path / "q/model.safetensors", json.loads((tmp_path / "q/config.json").read_text())
    tensors, name = load_file(file), "layers.1.self_attn.o_proj.scales"
    def refused(match, tensors=tensors, config=config, **options):
        save_file(tensors, file)
        (tmp_path / "q/config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=match):
            load_model(tmp_path / "q", **options)
    refused(f"no tensor {name}", {k: v for k, v in tensors.items() if k != name})
    refused(f"{name} has shape", {**tensors, name: tensors[name][:, :1].contiguous()})
    refused("unexpected tensor surplus", {**tensors, "surplus": torch.zeros(1)})
    refused("quantized already", quantize="int8")
    for layers in ({"layers.7.self_attn.o_proj": ["int8", None]}, {"lm_head": ["int2", None]}, {"lm_head": ["int4", 33]},
                   {"lm_head": ["int4", 0]}, {"lm_head": ["int4", "x"]}, {"lm_head": 3}, {"norm": ["int8", None]}, []):
        refused("gpt_flash entry", config={**config, "gpt_flash": {"layers": layers}})
    refused("gpt_flash entry", config={**config, "gpt_flash": 1})

# --- the int8 cache and quality ---

@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_int8_cache_gives_the_same_numbers_by_flash_and_math(tmp_path, family):
    model = load_model(hf_folder(tmp_path / "m", model_type=family), dtype=torch.float32)
    ids, logits = torch.randint(320, (2, 60), generator=torch.Generator().manual_seed(0)), {}
    for attention in ("flash", "math"):
        model.setup_caches(2, 64, torch.int8, attention)
        pos = torch.zeros(2, dtype=torch.int32)
        logits[attention] = torch.cat([model(ids[:, i:i + 4], pos + i) for i in range(0, 60, 4)], 1)
    torch.testing.assert_close(logits["flash"], logits["math"], rtol=0, atol=5e-3)

def test_large_key_biases_survive_the_int8_cache(tmp_path):
    model = load_model(hf_folder(tmp_path / "m", model_type="qwen2"), dtype=torch.float32)
    ids = torch.randint(320, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    _, kl = perplexity(model, ids, 120, torch.int8, copy.copy(model))
    model.calibrate_k_mean, smoothed = lambda: None, kl
    _, kl = perplexity(model, ids, 120, torch.int8, copy.copy(model))
    assert smoothed < 0.1 * kl

def test_perplexity_of_a_uniform_model_is_its_vocabulary(tmp_path):
    model = load_model(hf_folder(tmp_path / "m"), dtype=torch.float32)
    model.lm_head = Linear(64, 320, bias=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, list(range(50)), 33) == pytest.approx(320, rel=1e-5)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        perplexity(model, [1])

def test_perplexity_is_that_of_one_pass(tmp_path):
    model = load_model(hf_folder(tmp_path / "m"), dtype=torch.float32)
    ids = torch.randint(320, (61,), generator=torch.Generator().manual_seed(0))
    model.setup_caches(1, 64)
    logits = model(ids[None, :-1], torch.zeros(1, dtype=torch.int32))[0]
    assert perplexity(model, ids.tolist()) == pytest.approx(math.exp(F.cross_entropy(logits, ids[1:])), rel=1e-4)

@pytest.fixture(scope="module")
def smol():
    path = default_model()
    with open(GPL) as f:
        ids = load_tokenizer(path).encode(f.read())[:1537]
    return path, ids, load_model(path, dtype=torch.float32)

def test_int8_cache_is_near_lossless_on_a_real_model(smol):
    _, ids, model = smol
    reference = copy.copy(model)
    exact = perplexity(reference, ids)
    ppl, kl = perplexity(model, ids, kv_dtype=torch.int8, reference=reference)
    assert kl < 8e-4 and abs(ppl / exact - 1) < 0.003

@pytest.mark.parametrize("mode, most_kl, most_change", [("int8", 6e-3, 0.01), ("int4", 7e-3, 0.01)])
def test_weights_keep_the_quality_of_a_real_model(smol, mode, most_kl, most_change):
    path, ids, reference = smol
    model = load_model(path, dtype=torch.float32, quantize=mode)
    ppl, kl = perplexity(model, ids[:769], reference=reference)
    exact = perplexity(reference, ids[:769])
    assert 1e-4 < kl < most_kl and abs(ppl / exact - 1) < most_change

# --- the command line ---

def test_command_line_saves_what_generate_opens(tmp_path, capsys):
    folder = tmp_path / "smol-int8"
    quantize.main(["--mode", "int8", "--output", str(folder), "--dtype", "float32"])
    out = capsys.readouterr()
    assert out.out == "" and "121 layers, 538.0 MB in float32, are now 134.5 MB" in out.err and "relative error" in out.err
    a, b = load_tokenizer(default_model()), load_tokenizer(folder)
    text = "Naïve café 12345 <|im_end|> \n\n\tprint('hi')  日本"
    assert a.encode(text) == b.encode(text) and a.decode(a.encode(text)) == b.decode(b.encode(text)) == text
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert a.chat(chat) == b.chat(chat) and (a.eos_ids, a.bos_id, a.special) == (b.eos_ids, b.bos_id, b.special)
    generate_main(["--checkpoint_path", str(folder), "--dtype", "float32", "--chat", "--prompt", chat[0]["content"]])
    assert capsys.readouterr().out.strip() == "The capital of France is Paris."
    with pytest.raises(SystemExit, match="2"):
        quantize.main(["--mode", "int8", "--output", str(folder)])
    assert "exists already" in capsys.readouterr().err

def test_command_line_prints_a_table(tmp_path, capsys):
    source = hf_folder(tmp_path / "m", vocab_size=49152)
    quantize.save_tokenizer(default_model(), source)
    (tmp_path / "text").write_text("It was the best of times, it was the worst of times, " * 5)
    quantize.main(["--checkpoint_path", str(source), "--perplexity", str(tmp_path / "text"), "--dtype", "float32"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[w, kv] for w in ("float32", "int8", "int4") for kv in ("float32", "int8")]
    assert rows[0][3:5] == ["+0.00%", "0.00e+00"] and all(float(row[4]) > 0 for row in rows[1:])
    sizes = [float(row[5]) for row in rows]
    assert sizes == sorted(sizes, reverse=True)

@pytest.mark.parametrize("arguments, says", [
    ([], "give --mode"), (["--mode", "int3"], "invalid choice"), (["--mode", "int8", "--perplexity", "x"], "give --mode"),
    (["--mode", "int8", "--checkpoint_path", "/nowhere/at-all"], "no such file"),
    (["--perplexity", "/nowhere/at-all"], "cannot read"), (["--mode", "int4", "--group_size", "48"], "invalid choice")])
def test_command_line_errors_are_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as e:
        quantize.main(arguments)
    err = capsys.readouterr().err
    assert e.value.code == 2 and says in err and err.count("\n") == 1
