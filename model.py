"""The model: configuration, static KV cache, a Llama-family transformer, and loading it from any checkpoint."""
import json
import math
import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import gguf
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from kernels import flash_decode, quantize_kv, triton
from quantize import Linear, quantize_linear, quantized_layout

MAX_DECODE_TOKENS = 16  # queries per row that one decode attention call takes
# What each family does differently from Llama. A new family of the same build is one line here.
FAMILIES = {"llama": {}, "mistral": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
# Settings that would go wrong if ignored, with the value that is supported.
FIXED = {"hidden_act": "silu", "partial_rotary_factor": 1, "num_experts": 0, "num_local_experts": 0,
         "quantization_config": {}, "mscale_all_dim": 0, "truncate": True}

# --- configuration ---

@dataclass(frozen=True)
class ModelConfig:
    family: str
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    dim: int
    ffn_dim: int
    max_seq_len: int  # the context the model was trained for
    norm_eps: float
    rope_theta: float
    windows: tuple  # per layer: how many tokens a query sees with itself, None for all
    hf: dict = field(repr=False)  # what this was made from, with rope_scaling and rope_parameters unfolded into it
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False

    @classmethod
    def from_hf(cls, hf):
        """A Hugging Face config.json as a dict -> ModelConfig. ValueError names what is missing or unsupported."""
        family, architectures = hf.get("model_type"), hf.get("architectures") or []
        if family not in FAMILIES or not all(str(a).endswith("ForCausalLM") for a in architectures):
            raise ValueError(f"unsupported architecture {(architectures or [family])[0]!r} (model_type {family!r}); "
                             f"supported model types: {', '.join(FAMILIES)}")
        hf = dict(hf)
        for key in ("rope_scaling", "rope_parameters"):  # transformers 5 writes the latter, with rope_theta in it
            if not isinstance(hf.get(key) or {}, dict):
                raise ValueError(f"the model's configuration has {key} = {hf[key]!r}; it must be an object")
            hf |= hf.get(key) or {}
        for key, fine in FIXED.items():
            if hf.get(key) not in (None, fine):
                raise ValueError(f"unsupported {key} {hf[key]!r}: only {fine!r} is supported")
        n_layer, n_head = positive(hf, "num_hidden_layers"), positive(hf, "num_attention_heads")
        dim, bias = positive(hf, "hidden_size"), bool(hf.get("attention_bias"))
        sliding = hf.get("sliding_window") and hf.get("use_sliding_window", family == "mistral")
        window, n_full = positive(hf, "sliding_window") if sliding else None, hf.get("max_window_layers") or 0
        kinds = hf.get("layer_types") or ["full_attention"] * n_full + ["sliding_attention"] * (n_layer - n_full)
        config = cls(**dict(
            family=family, vocab_size=positive(hf, "vocab_size"), n_layer=n_layer, n_head=n_head,
            n_kv_head=positive(hf, "num_key_value_heads", n_head), head_dim=positive(hf, "head_dim", dim // n_head),
            dim=dim, ffn_dim=positive(hf, "intermediate_size"), norm_eps=positive(hf, "rms_norm_eps", 1e-6, float),
            rope_theta=positive(hf, "rope_theta", 1e4, float), tied=bool(hf.get("tie_word_embeddings")), hf=hf,
            max_seq_len=positive(hf, "max_position_embeddings", 2048), mlp_bias=bool(hf.get("mlp_bias")),
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds[:n_layer]),
            qkv_bias=bias, o_bias=bias) | FAMILIES[family])
        if config.n_head % config.n_kv_head:
            raise ValueError(f"{config.n_head} query heads do not divide into {config.n_kv_head} key/value heads")
        if config.head_dim % 8 or config.head_dim > 256:
            raise ValueError(f"head_dim {config.head_dim} is not a multiple of 8 up to 256")
        rope_frequencies(config)  # refuses what it cannot do
        return config

def positive(hf, key, default=None, kind=int):
    """A setting as a number above 0."""
    value = default if hf.get(key) is None else hf[key]
    if not isinstance(value, (int, kind)) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"the model's configuration has {key} = {value!r}, not a positive {kind.__name__}")
    return kind(value)

def rope_frequencies(config):
    """inv_freq [D/2] float32 and the factor on cos and sin, for every rope type supported.

    Each type keeps a part of a frequency as it is and divides the rest by a factor, or by one factor per frequency.
    After transformers' modeling_rope_utils: linear (position interpolation), llama3, yarn (arXiv 2309.00071)."""
    hf, half = config.hf, config.head_dim // 2
    inv_freq = config.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
    kind, keep, attention_factor = hf.get("rope_type") or hf.get("type") or "default", 0, 1.0
    if kind in ("default", "none"):
        return inv_freq.float(), attention_factor
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(f"unsupported rope type {kind!r}; supported: default, linear, llama3, yarn")
    original = positive(hf, "original_max_position_embeddings", config.max_seq_len)
    factor = torch.tensor(hf.get("factors") or positive(hf, "factor", kind=float), dtype=torch.float64)
    if kind == "llama3":
        low, high = positive(hf, "low_freq_factor", kind=float), positive(hf, "high_freq_factor", kind=float)
        turns = original * inv_freq / (2 * math.pi)  # over the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    elif kind == "yarn":  # by the dimensions that turn beta times over the original context
        betas = positive(hf, "beta_fast", 32, float), positive(hf, "beta_slow", 1, float)
        low, high = (half * math.log(original / (2 * math.pi * beta), config.rope_theta) for beta in betas)
        low, high = max(math.floor(low), 0), min(math.ceil(high), config.head_dim - 1)
        keep = 1 - ((torch.arange(half) - low) / max(high - low, 0.001)).clamp(0, 1)
        attention_factor = positive(hf, "attention_factor", 0.1 * math.log(max(factor, 1)) + 1, float)
    return (inv_freq * (keep + (1 - keep) / factor)).float(), attention_factor

# --- the static KV cache ---

class KVCache:
    """Keys and values of all layers in one static, left-aligned allocation [n_layer, 2, B, Hkv, S, D]."""

    def __init__(self, config, max_batch_size, max_seq_len, dtype, device):
        self.max_batch_size, self.max_seq_len = max_batch_size, max_seq_len
        shape = (config.n_layer, 2, max_batch_size, config.n_kv_head, max_seq_len, config.head_dim)
        self.nbytes = math.prod(shape[:-1]) * (config.head_dim * dtype.itemsize + 4 * (dtype == torch.int8))
        require_memory(self.nbytes, device, f"a KV cache of {max_batch_size} x {max_seq_len} tokens",
                       "lower --max_seq_len or --batch_size, or take --kv_dtype int8")
        self.kv, self.scale, self.k_mean = torch.zeros(shape, dtype=dtype, device=device), None, None
        if dtype == torch.int8:
            self.scale = torch.zeros(shape[:-1], dtype=torch.float32, device=device)
            self.k_mean = torch.zeros(config.n_layer, config.n_kv_head, 1, config.head_dim, device=device)
        self.may_grow = False  # generate made it to fit one call, and may make a larger one
        self.steps = {}  # decode steps prepared for this cache

    def layers(self, batch_size):
        """Each layer's views of the first rows: kv [2, B, Hkv, S, D] and, of an int8 cache only, scale [2, B, Hkv, S]
        float32 and k_mean [Hkv, 1, D], which is subtracted from every key."""
        if self.scale is None:
            return [(kv, None, None) for kv in self.kv[:, :, :batch_size]]
        return zip(self.kv[:, :, :batch_size], self.scale[:, :, :batch_size], self.k_mean)

def require_memory(nbytes, device, what, advice):
    """ValueError if a device has not this many bytes free, as far as that is known."""
    free, meminfo = nbytes, Path("/proc/meminfo")
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
    elif meminfo.exists():
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1])
    if nbytes > free:
        raise ValueError(f"{what} needs {nbytes / 1e9:.1f} GB but {device} has {free / 1e9:.1f} GB free; {advice}")

# --- the transformer ---

def apply_rope(x, cos, sin):
    """x [B, T, H, D] in the half-rotated layout; cos, sin [B, T, 1, D] float32, the first half of sin negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)

class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.window = config.windows[layer]
        self.flash = False  # flash_decode or math, set by setup_caches
        self.qkv_proj = Linear(config.dim, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(config.n_head * config.head_dim, config.dim, bias=config.o_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x, cos, sin, input_pos, cache, start):
        B, T, _ = x.shape
        qkv = self.qkv_proj(x).view(B, T, -1, self.head_dim)
        qk, v = qkv.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=2)
        if self.q_norm is not None:
            q, k = qk.split([self.n_head, self.n_kv_head], dim=2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        qk = apply_rope(qk, cos, sin)
        q, k = qk.transpose(1, 2).split([self.n_head, self.n_kv_head], dim=1)  # (B, H, T, D)
        y = self.attend(q, k, v.transpose(1, 2), input_pos, cache, start)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))

    def attend(self, q, k, v, input_pos, cache, start):
        """Append k, v [B, Hkv, T, D] to the cache and attend with q [B, Hq, T, D]; start as in Transformer.forward."""
        (B, _, T, _), (kv, scale, k_mean), device = q.shape, cache, q.device
        if k_mean is not None:
            k = (k - k_mean).to(k.dtype)  # shifts all scores of a query alike: softmax does not notice
        if start is None and self.flash:  # decode: cost follows the live length
            k_scale, v_scale = (None, None) if scale is None else scale.unbind(0)
            return flash_decode(q, *kv.unbind(0), input_pos, k, v, k_scale=k_scale, v_scale=v_scale, window=self.window)
        # write each token to its row [B, 1] and position [B, T]
        row, pos = torch.arange(B, device=device)[:, None], input_pos[:, None] + torch.arange(T, device=device)
        new = torch.stack((k, v))
        if scale is not None:
            new, new_scale = quantize_kv(new)
            scale[:, row, :, pos] = new_scale.permute(1, 3, 0, 2)  # (B, T, 2, Hkv)
        kv[:, row, :, pos] = new.permute(1, 3, 0, 2, 4)  # (B, T, 2, Hkv, D)
        if start == 0 and (self.window is None or T <= self.window):  # prefill: fused causal SDPA on fresh keys
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        # read: decode the whole static cache, a chunk of prompt the live part of it
        end = kv.shape[3] if start is None else start + T
        kv = kv[:, :, :, :end]
        if scale is not None:
            kv = (kv * scale[:, :, :, :end, None]).to(q.dtype)
        key_pos, query_pos = torch.arange(end, device=device), pos[..., None]
        mask = key_pos <= query_pos  # (B, T, end)
        if self.window is not None:
            mask &= key_pos > query_pos - self.window
        with sdpa_kernel(SDPBackend.MATH) if start is None else nullcontext():
            return F.scaled_dot_product_attention(q, *kv.unbind(0), attn_mask=mask[:, None], enable_gqa=True)

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = Linear(config.dim, 2 * config.ffn_dim, bias=config.mlp_bias)  # gate and up in one product
        self.down_proj = Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)

class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, input_pos, cache, start):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, input_pos, cache, start)
        return x + self.mlp(self.post_attention_layernorm(x))

class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.lm_head = Linear(config.dim, config.vocab_size, bias=False)
        self.cache = None
        self.decode_block = self.prefill_block = Block.forward  # generate.py may put compiled ones here
        self.decode_head = Transformer.head

    @torch.no_grad()
    def setup_caches(self, max_batch_size, max_seq_len, kv_dtype=None, attention="auto"):
        """Allocate the cache. kv_dtype: None for the model's own dtype, torch.int8 for a quantized cache.
        attention: "flash", "math" or "auto", the path that decode takes."""
        self.cache = None  # the old one goes before the new one comes
        device, dtype = self.embed_tokens.weight.device, kv_dtype or self.embed_tokens.weight.dtype
        self.cache = KVCache(self.config, max_batch_size, max_seq_len, dtype, device)
        flash = attention == "flash" or attention == "auto" and prefer_flash(device)
        for block in self.layers:
            block.self_attn.flash = flash
        inv_freq, factor = rope_frequencies(self.config)
        self.positions = torch.arange(max_seq_len, device=device)
        angles = self.positions[:, None].float() * torch.cat([inv_freq, inv_freq]).to(device)  # (S, D)
        self.cos, self.sin = angles.cos() * factor, angles.sin() * factor
        self.sin[:, :len(inv_freq)].neg_()
        if kv_dtype == torch.int8:
            self.calibrate_k_mean()

    def calibrate_k_mean(self):
        """The mean key of each head over random tokens. Keys have outlier channels that one int8 scale a token handles
        badly; subtracting a fixed vector removes them, and softmax does not notice (SageAttention, arXiv 2410.02367).
        The tokens are spread over the cache, because keys turn with their position: with 64 of them the mean KL on
        SmolLM2-135M is 9.6e-4 at the first positions, 6.9e-4 spread."""
        cache, positions, n = self.cache, self.positions, min(128, self.cache.max_seq_len)
        tokens = torch.randint(self.config.vocab_size, (1, n), generator=torch.Generator().manual_seed(0))
        self.positions = positions[torch.linspace(0, len(positions) - 1, n).long()]
        self(tokens.to(positions.device), torch.zeros(1, dtype=torch.int32, device=positions.device), start=0)
        self.positions = positions
        cache.k_mean = (cache.kv[:, 0, 0, :, :n] * cache.scale[:, 0, 0, :, :n, None]).mean(2, keepdim=True)

    @torch.no_grad()
    def forward(self, tokens, input_pos, *, start=None, last=None):
        """tokens [B, T] integer, input_pos [B] int32: tokens of each row already cached -> logits [B, T, vocab_size].

        Row b's tokens take positions input_pos[b] ... input_pos[b]+T-1; rows may differ. Up to 16 tokens decode:
        nothing is read back to the host. More, or a given `start` (the largest input_pos, a host integer), prefill.
        `last` [B]: compute the logits of that one token of each row, [B, 1, vocab_size]."""
        B, T = tokens.shape
        if self.cache is None or B > self.cache.max_batch_size:
            raise ValueError(f"call setup_caches for a batch of at least {B} first")
        if start is None and (T > MAX_DECODE_TOKENS or tokens.device.type == "cpu"):
            largest = int(input_pos.max())
            if largest + T > self.cache.max_seq_len:
                raise ValueError(f"{largest} cached and {T} new tokens exceed the cache of {self.cache.max_seq_len}")
            start = largest if T > MAX_DECODE_TOKENS else None
        decode = start is None and T == 1
        block_forward = self.decode_block if decode else self.prefill_block
        pos = input_pos[:, None] + self.positions[:T]  # (B, T)
        cos, sin = self.cos[pos][:, :, None], self.sin[pos][:, :, None]  # (B, T, 1, D)
        x = self.embed_tokens(tokens)
        for block, cache in zip(self.layers, self.cache.layers(B)):
            x = block_forward(block, x, cos, sin, input_pos, cache, start)
        if last is not None:
            x = x[torch.arange(B, device=x.device), last][:, None]
        return self.decode_head(self, x) if decode else self.head(x)

    def head(self, x):
        return self.lm_head(self.norm(x))

    def weight_bytes(self):
        """Bytes of weights that one decode step reads: all but the embedding, whose rows are few."""
        return tensor_bytes(self) - tensor_bytes(self.embed_tokens)

def tensor_bytes(module):
    return sum(x.numel() * x.element_size() for x in module.state_dict().values())

def prefer_flash(device):
    """What attention="auto" takes. On a CPU flash_decode was measured faster at any cache size, as it reads live tokens
    only; on a GPU it is taken wherever Triton runs, since math reads the whole cache."""
    return device.type == "cpu" or triton is not None

# --- checkpoints: a configuration as Hugging Face writes it, and the tensors by name ---

def first_line(e):
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]

def resolve(path):
    """A local path as it is, or a hub id as the folder that huggingface_hub keeps it in, its own cache first."""
    if str(path) and Path(path).exists():
        return Path(path)
    problem = "it is not a hub id"
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)):
        from huggingface_hub import snapshot_download  # slow to import, and rarely needed
        kinds = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
        for local in (True, False):
            try:
                return Path(snapshot_download(str(path), allow_patterns=kinds, local_files_only=local))
            except Exception as e:  # the hub's and the network's, of many kinds
                problem = first_line(e)
    raise ValueError(f"no such file or folder, nor a model the hub can give: {str(path)!r} ({problem})")

def read_json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"cannot read {path}: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"cannot read {path}: not a JSON object")
    return value

def open_checkpoint(path):
    """-> (Hugging Face style configuration, {tensor name: torch.Tensor or gguf.ReaderTensor}, None for random ones).

    The tensors lie in memory-mapped files: nothing is read before it is used."""
    if path.suffix == ".json":
        return read_json(path), None
    if path.suffix == ".gguf":
        meta, tensors = read_gguf(path)
        return gguf_config(meta, tensors), tensors
    tensors, files = {}, weight_files(path, "model*.safetensors") or weight_files(path, "pytorch_model*.bin")
    if not files:
        raise ValueError(f"{path} is not a model: expected a .gguf file, a config.json, or a folder with a config.json "
                         "and model*.safetensors or pytorch_model*.bin")
    for file in files:
        try:
            tensors |= (load_file(file) if file.suffix == ".safetensors" else
                        torch.load(file, map_location="cpu", weights_only=True, mmap=True))
        except Exception as e:
            raise ValueError(f"cannot read {file}: {first_line(e)}") from None
    return read_json(path / "config.json"), tensors

def weight_files(folder, pattern):
    """The files of that pattern, or those that their index lists."""
    index = folder / f"{pattern.replace('*', '')}.index.json"
    if not index.exists():
        return sorted(folder.glob(pattern))
    weight_map = read_json(index).get("weight_map")
    files = {folder / str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
    if not files or any(file.parent != folder for file in files):
        raise ValueError(f"{index} does not list plain file names of its own folder")
    return sorted(files)

@lru_cache(maxsize=2)  # the tokenizer asks for the same file
def read_gguf(path):
    """-> (metadata, {tensor name: gguf.ReaderTensor})"""
    try:
        reader = gguf.GGUFReader(path)
        meta = {key: value.contents() for key, value in reader.fields.items()}
    except Exception as e:
        raise ValueError(f"cannot read {path}: not a GGUF file, or a truncated one ({first_line(e)})") from None
    if meta.get("split.count", 1) > 1:
        raise ValueError(f"{path} is one part of a split GGUF; join the parts with llama.cpp's gguf-split --merge")
    return meta, {tensor.name: tensor for tensor in reader.tensors}

# Hugging Face's name of a setting -> its name in a GGUF file, behind the architecture's
GGUF_SETTINGS = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base", "num_experts": "expert_count",
    "sliding_window": "attention.sliding_window", "rope_type": "rope.scaling.type", "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length"}

def gguf_config(meta, tensors):
    """The metadata and tensors of a GGUF file -> a Hugging Face style configuration."""
    arch = meta.get("general.architecture")
    hf = {name: meta.get(f"{arch}.{theirs}") for name, theirs in GGUF_SETTINGS.items()}
    rotary_dim = meta.get(f"{arch}.rope.dimension_count")
    hf["head_dim"] = hf["head_dim"] or rotary_dim
    hf["partial_rotary_factor"] = rotary_dim and rotary_dim / hf["head_dim"]
    if "rope_freqs.weight" in tensors:  # llama3's scaling, as a factor for each frequency
        hf |= {"rope_type": "linear", "factors": tensors["rope_freqs.weight"].data.tolist()}
    return hf | {
        "model_type": arch, "use_sliding_window": True, "tie_word_embeddings": "output.weight" not in tensors,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in tensors else None,
        "attention_bias": "blk.0.attn_output.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}

# --- loading: our parameters from the checkpoint's tensors ---

def sources(name, shape, config, rename):
    """Our parameter -> {the checkpoint's name: shape} of the tensors that make it, one below the other. Our names are
    Hugging Face's but for the projections that are joined; rename makes the checkpoint's own out of those."""
    *path, module, kind = (name if name.startswith("lm_head") else f"model.{name}").split(".")
    q, kv, ffn = config.n_head * config.head_dim, config.n_kv_head * config.head_dim, config.ffn_dim
    joined = {"qkv_proj": {"q_proj": q, "k_proj": kv, "v_proj": kv}, "gate_up_proj": {"gate_proj": ffn, "up_proj": ffn}}
    parts = joined.get(module, {module: shape[0]})
    return {rename(".".join([*path, part, kind])): (rows, *shape[1:]) for part, rows in parts.items()}

def check_names(wanted, given, path):
    """ValueError names a tensor that is missing, or surplus and not known to be harmless."""
    harmless = "rotary_emb.inv_freq", "rope_freqs.weight", "lm_head.weight"
    surplus = {name for name in given - wanted if not name.endswith(harmless)}
    for names, problem in ((wanted - given, "no tensor"), (surplus, "an unexpected tensor")):
        if names:
            raise ValueError(f"{path} has {problem} {min(names)}" + f" (and {len(names) - 1} more)" * (len(names) > 1))

def read_tensor(name, shape, tensors, config):
    """A tensor as Hugging Face has it, GGUF's in float32; ValueError if it has another shape."""
    x = tensors[name]
    if isinstance(x, gguf.ReaderTensor):
        try:
            x = torch.tensor(gguf.dequantize(x.data, x.tensor_type))
        except Exception as e:  # a quantization that gguf does not know
            raise ValueError(f"cannot read tensor {name}: {first_line(e)}") from None
    if x.shape != shape:
        raise ValueError(f"tensor {name} has shape {tuple(x.shape)}, expected {tuple(shape)}")
    n_head = {"attn_q": config.n_head, "attn_k": config.n_kv_head}.get(name.split(".")[-2])
    if n_head and config.family == "llama":  # llama.cpp interleaves the rotated halves
        x = x.view(n_head, -1, 2, *shape[1:]).transpose(1, 2).reshape(shape)
    return x

@torch.no_grad()
def load_model(path, *, device="cpu", dtype=torch.bfloat16, quantize=None, group_size=32):
    """Load a checkpoint: a Hugging Face folder or hub id, a .gguf file, a folder saved by quantize.py or, for
    benchmarks, a bare config.json, which gives random weights. quantize: None, "int8" or "int4" (in groups of
    group_size), layer by layer while loading, so that a model that fits only when quantized can be loaded. ValueError
    says what is wrong, by name."""
    path = resolve(path)
    hf, tensors = open_checkpoint(path)
    config = ModelConfig.from_hf(hf)
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    own = tensors is not None and quantized_layout(model, hf)  # quantize.py's folders have our names and its layers
    if own and quantize:
        raise ValueError(f"{path} is quantized already; leave out --quantize {quantize}")
    rename = str
    if path.suffix == ".gguf":
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.n_layer)  # has every name that is used here
        rename = partial(names.get_name, try_suffixes=(".weight", ".bias"))
    state = model.state_dict()
    plan = {name: {name: x.shape} if own else sources(name, x.shape, config, rename) for name, x in state.items()}
    if config.tied and isinstance(model.lm_head, Linear):
        del plan["lm_head.weight"]
    if tensors is None:
        print(f"WARNING: {path} is a bare configuration: the weights are RANDOM, for benchmarks only", file=sys.stderr)
    else:
        check_names(set().union(*plan.values()), tensors.keys(), path)
    nbytes = sum(x.nbytes for x in state.values()) * {"int8": 0.5, "int4": 0.3}.get(quantize, 1)
    require_memory(nbytes, device, f"loading {path}", "take a smaller model, or --quantize")
    for prefix, module in tqdm(list(model.named_modules()), desc="loading", unit=" layers", disable=None, leave=False):
        for name, meta in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            full = f"{prefix}.{name}"
            if full not in plan:  # a tied output layer
                tensor = model.embed_tokens.weight
            elif tensors is None:
                tensor = torch.empty_like(meta, device=device).normal_(std=0.02)
            else:
                parts = [read_tensor(part, shape, tensors, config) for part, shape in plan[full].items()]
                tensor = (torch.cat(parts) if parts[1:] else parts[0]).to(device, meta.dtype, copy=True)
            setattr(module, name, nn.Parameter(tensor, False) if isinstance(meta, nn.Parameter) else tensor)
        if isinstance(module, Linear) and quantize:
            module = quantize_linear(module, quantize, group_size, prefix)
            model.set_submodule(prefix, module)
        if hasattr(module, "pack"):
            module.pack()
    return model.eval()
