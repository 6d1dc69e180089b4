"""Every test. `python tests.py` runs them all; arguments go to pytest, as in `python tests.py -k tokenizer`.

Without a GPU the Triton kernels run in Triton's interpreter; with one the same tests also run there."""
import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import copy
import json
import shutil
import subprocess
from pathlib import Path

import gguf
import safetensors.torch
import transformers

from generate import TextStream, generate, load_tokenizer, sample
from model import ModelConfig, load_model, rope_frequencies

HERE = Path(__file__).parent
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
CPU_ENV = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

# --- the model: every family equals transformers ---

BASE = dict(vocab_size=131, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
            head_dim=16, intermediate_size=72, max_position_embeddings=96, bos_token_id=1, eos_token_id=2)
SEVEN = dict(num_attention_heads=7, num_key_value_heads=1, hidden_size=56)
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32)
CHECKPOINTS = {
    "llama": ("Llama", {}),
    "llama-tied-bias": ("Llama", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, **SEVEN)),
    "llama-linear": ("Llama", dict(rope_scaling=dict(rope_type="linear", factor=4.0))),
    "llama-llama3": ("Llama", dict(rope_scaling=LLAMA3_ROPE, head_dim=32)),
    "llama-yarn": ("Llama", dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=24))),
    "llama-theta": ("Llama", dict(rope_parameters=dict(rope_type="default", rope_theta=500000.0))),
    "mistral": ("Mistral", dict(sliding_window=9, **SEVEN)),
    "mistral-full": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2-window": ("Qwen2", dict(use_sliding_window=True, sliding_window=7, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(SEVEN, head_dim=24)),
}

def random_hf(name):
    """A random transformers model with the settings of CHECKPOINTS[name]; biases and norms too are random."""
    family, settings = CHECKPOINTS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**copy.deepcopy({**BASE, **settings}))  # it writes into its arguments
    hf = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.normal_(std=0.15) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.3)
    return hf

@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(name) -> (folder, transformers model), made once."""
    made = {}
    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            hf = random_hf(name)
            hf.save_pretrained(folder)
            made[name] = folder, hf
        return made[name]
    return make

def hf_logits(hf, tokens):
    with torch.no_grad():
        return hf(tokens).logits

def close(a, b, tol=2e-4):
    assert a.shape == b.shape
    assert torch.isfinite(a).all()
    assert (a.cpu() - b.cpu()).abs().max() < tol * max(1.0, b.abs().max())

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attention", ["flash", "math"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_equals_transformers(checkpoint, name, attention, device):
    """Prefill, then token by token, then several tokens at once, then the rows of one batch at different depths."""
    folder, hf = checkpoint(name)
    model = load_model(folder, device=device, dtype=torch.float32)
    tokens = torch.randint(131, (3, 40), generator=torch.Generator().manual_seed(1))
    want = hf_logits(hf, tokens)
    model.setup_caches(3, 64, attention=attention)
    zeros, tokens = torch.zeros(3, dtype=torch.int32, device=device), tokens.to(device)
    close(model(tokens[:, :20], zeros), want[:, :20])
    for i in range(20, 25):
        close(model(tokens[:, i:i + 1], zeros + i), want[:, i:i + 1])
    close(model(tokens[:, 25:30], zeros + 25), want[:, 25:30])
    close(model(tokens[:, 20:40], zeros + 20), want[:, 20:40])  # a chunk behind a cached prefix
    depth = torch.tensor([3, 39, 17], dtype=torch.int32, device=device)
    picked = torch.stack([tokens[b, p:p + 1] for b, p in enumerate(depth.tolist())])
    close(model(picked, depth), torch.stack([want[b, p:p + 1] for b, p in enumerate(depth.tolist())]))
    depth = torch.tensor([5, 22, 0], dtype=torch.int32, device=device)
    chunk = torch.stack([tokens[b, p:p + 18] for b, p in enumerate(depth.tolist())])
    close(model(chunk, depth), torch.stack([want[b, p:p + 18] for b, p in enumerate(depth.tolist())]))

@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_greedy_equals_transformers(checkpoint, name):
    """A ragged batch gives each prompt what it gets alone in transformers."""
    folder, hf = checkpoint(name)
    model = load_model(folder, dtype=torch.float32)
    torch.manual_seed(2)
    prompts = [torch.randint(3, 131, (n,)).tolist() for n in (1, 13, 30, 2)]
    out = generate(model, prompts, 20)
    for prompt, new in zip(prompts, out):
        want = hf.generate(torch.tensor([prompt]), max_new_tokens=20, min_new_tokens=20, do_sample=False, eos_token_id=None,
                           pad_token_id=0)[0, len(prompt):].tolist()
        assert new == want

# --- loading ---

def logits_of(path, **options):
    model = load_model(path, dtype=torch.float32, **options)
    model.setup_caches(1, 32)
    return model(torch.arange(3, 20)[None], torch.zeros(1, dtype=torch.int32))

@pytest.mark.parametrize("form", ["sharded", "sharded without index", "pickle", "sharded pickle"])
def test_checkpoint_forms(checkpoint, form, tmp_path):
    folder, hf = checkpoint("llama-tied-bias" if form == "pickle" else "llama")
    if form == "pickle":
        shutil.copy(folder / "config.json", tmp_path)
        torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin")
    elif form == "sharded pickle":
        shutil.copy(folder / "config.json", tmp_path)
        items = list(hf.state_dict().items())
        torch.save(dict(items[:7]), tmp_path / "pytorch_model-00001-of-00002.bin")
        torch.save(dict(items[7:]), tmp_path / "pytorch_model-00002-of-00002.bin")
    else:
        hf.save_pretrained(tmp_path, max_shard_size="40KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
        if form == "sharded without index":
            (tmp_path / "model.safetensors.index.json").unlink()
    assert torch.equal(logits_of(tmp_path), logits_of(folder))

def write_gguf(path, config, state, arch="llama", extra=()):
    """A float32 GGUF file as llama.cpp's converter writes it: for arch llama, q and k with interleaved rotary halves."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), config.num_hidden_layers)
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if arch == "llama" and heads:
            tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.contiguous().numpy())
    for add, *args in extra:
        getattr(writer, add)(*args)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return path

@pytest.mark.parametrize("name, arch", [("llama", "llama"), ("llama-tied-bias", "llama"), ("qwen2", "qwen2"),
                                        ("qwen3", "qwen3")])
def test_gguf_equals_hugging_face(checkpoint, name, arch, tmp_path):
    folder, hf = checkpoint(name)
    path = write_gguf(tmp_path / "m.gguf", hf.config, hf.state_dict(), arch)
    close(logits_of(path), logits_of(folder), 1e-5)

@pytest.mark.parametrize("name", ["llama-linear", "llama-yarn", "llama-llama3"])
def test_gguf_rope(checkpoint, name, tmp_path):
    folder, hf = checkpoint(name)
    rope, factors = hf.config.rope_parameters, []
    if name == "llama-llama3":  # GGUF keeps llama3's scaling as one divisor per frequency
        plain = rope["rope_theta"] ** -(torch.arange(16) / 16)
        factors = [("add_tensor", "rope_freqs.weight", (plain / hf.model.rotary_emb.inv_freq).numpy())]
    else:
        factors = [("add_rope_scaling_type", gguf.RopeScalingType(rope["rope_type"])),
                   ("add_rope_scaling_factor", rope["factor"])]
        if name == "llama-yarn":
            factors.append(("add_rope_scaling_orig_ctx_len", rope["original_max_position_embeddings"]))
    close(logits_of(write_gguf(tmp_path / "m.gguf", hf.config, hf.state_dict(), extra=factors)), logits_of(folder), 1e-4)

def test_old_style_rope_settings():
    new = dict(model_type="llama", **BASE, rope_parameters={"rope_theta": 500000.0, **LLAMA3_ROPE})
    old = dict(model_type="llama", **BASE, rope_theta=500000.0,
               rope_scaling={"type": "llama3", **{k: v for k, v in LLAMA3_ROPE.items() if k != "rope_type"}})
    a, b = (rope_frequencies(ModelConfig.from_hf(c))[0] for c in (new, old))
    assert torch.equal(a, b) and ModelConfig.from_hf(old).rope_theta == 500000.0

CONFIG = dict(model_type="llama", architectures=["LlamaForCausalLM"], **BASE)

@pytest.mark.parametrize("change, message", [
    (dict(model_type="gpt_neox"), "gpt_neox"),
    (dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    (dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "dynamic"),
    (dict(rope_scaling={"rope_type": "longrope"}), "longrope"),
    (dict(rope_scaling={"rope_type": "linear"}), "factor"),
    (dict(rope_scaling="linear"), "rope_scaling"),
    (dict(hidden_act="gelu"), "gelu"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    (dict(quantization_config={"quant_method": "awq"}), "awq"),
    (dict(num_key_value_heads=4), "4 key/value heads"),
    (dict(hidden_size=None), "hidden_size"),
    (dict(num_hidden_layers="3"), "num_hidden_layers"),
    (dict(vocab_size=-5), "vocab_size"),
    (dict(head_dim=20), "head_dim 20"),
    (dict(rms_norm_eps="small"), "rms_norm_eps"),
    (dict(rope_theta=0.0), "rope_theta"),
])
def test_refused_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**CONFIG, **change})

def tampered(folder, tmp_path, change):
    """A copy of a safetensors checkpoint whose tensors went through change(dict)."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    safetensors.torch.save_file(change(tensors), tmp_path / "model.safetensors")
    return tmp_path

def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}

NORM = "model.layers.1.input_layernorm.weight"

@pytest.mark.parametrize("change, message", [
    (without(NORM), f"no tensor {NORM}"),
    (lambda t: {**t, "model.layers.9.mlp.up_proj.weight": t[NORM].clone()}, "unexpected tensor model.layers.9.mlp.up_proj"),
    (lambda t: {**t, NORM: torch.zeros(47)}, rf"{NORM} has shape \(47,\), expected \(48,\)"),
    (lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": torch.zeros(96)}, "unexpected tensor .*q_proj.bias"),
    (lambda t: {**t, "model.layers.0.self_attn.k_proj.weight": torch.zeros(96, 48)}, "k_proj.weight has shape"),
])
def test_refused_tensors(checkpoint, change, message, tmp_path):
    folder, _ = checkpoint("llama")
    with pytest.raises(ValueError, match=message):
        load_model(tampered(folder, tmp_path, change))

@pytest.mark.parametrize("cut", [0, 5, 100, 3000, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "gguf"])
def test_truncated_weights(checkpoint, kind, cut, tmp_path):
    folder, hf = checkpoint("llama")
    shutil.copy(folder / "config.json", tmp_path)
    file = tmp_path / {"safetensors": "model.safetensors", "bin": "pytorch_model.bin", "gguf": "m.gguf"}[kind]
    if kind == "safetensors":
        shutil.copy(folder / "model.safetensors", file)
    elif kind == "bin":
        torch.save(hf.state_dict(), file)
    else:
        write_gguf(file, hf.config, hf.state_dict())
    data = file.read_bytes()
    file.write_bytes(data[:int(cut * len(data)) if isinstance(cut, float) else cut])
    with pytest.raises(ValueError, match="m.gguf" if kind == "gguf" else file.name):
        load_model(file if kind == "gguf" else tmp_path)

def test_index_outside_the_folder(checkpoint, tmp_path):
    folder, hf = checkpoint("llama")
    hf.save_pretrained(tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][NORM] = f"../{folder.name}/model.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="own folder"):
        load_model(tmp_path)

def test_pickle_runs_no_code(tmp_path, checkpoint):
    folder, _ = checkpoint("llama")
    shutil.copy(folder / "config.json", tmp_path)
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)
    torch.save({"model.norm.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        load_model(tmp_path)
    assert not (tmp_path / "owned").exists()

def test_random_weights_are_announced(tmp_path, capsys):
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(CONFIG))
    model = load_model(path)
    assert "RANDOM" in capsys.readouterr().err
    assert model.config.n_layer == 3 and model.layers[0].attention.wo.dense_weight().float().std() > 0

# --- the cache ---

def test_context_beyond_memory(checkpoint):
    model = load_model(checkpoint("llama")[0])
    with pytest.raises(ValueError, match="KV cache of 1 x 10000000000 tokens needs .* GB"):
        model.setup_caches(1, 10**10)

def test_cache_overflow_is_refused(checkpoint):
    model = load_model(checkpoint("llama")[0])
    with pytest.raises(ValueError, match="setup_caches"):
        model(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32))
    model.setup_caches(1, 8)
    with pytest.raises(ValueError, match="exceed the cache of 8"):
        model(torch.zeros(1, 5, dtype=torch.int64), torch.full((1,), 4, dtype=torch.int32))

@pytest.mark.parametrize("attention", ["flash", "math"])
def test_dead_positions_are_never_seen(checkpoint, attention):
    """What lies beyond a row's live length does not change its logits, whatever the capacity."""
    model = load_model(checkpoint("llama")[0], dtype=torch.float32)
    tokens, results = torch.arange(3, 33)[None], []
    for capacity, poison in ((32, 0.0), (32, 1e4), (96, -1e4)):
        model.setup_caches(1, capacity, attention=attention)
        model.cache.kv.fill_(poison)
        zeros = torch.zeros(1, dtype=torch.int32)
        model(tokens[:, :20], zeros)
        results.append(torch.cat([model(tokens[:, i:i + 1], zeros + i) for i in range(20, 25)]))
    close(results[1], results[0], 1e-5), close(results[2], results[0], 1e-5)

if __name__ == "__main__":
    sys.exit(pytest.main([str(Path(__file__)), "-q", *sys.argv[1:]]))
