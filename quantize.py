"""int8 and int4 weights: the layers that decode with them, saving them as a checkpoint, and what they cost in quality.

    python quantize.py --checkpoint_path X --mode int8         writes the folder X-int8, a checkpoint like any other
    python quantize.py --checkpoint_path X --perplexity FILE   a table of modes: quality on a text, bytes a token reads
"""
import argparse
import copy
import json
import math
import shutil
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import kernels

BF16 = torch.cpu._is_avx512_bf16_supported()

def many_rows_dtype(x):
    """The dtype in which many rows multiply fastest: float32 on a CPU without bfloat16 instructions, by 3x."""
    return x.dtype if BF16 or x.device.type != "cpu" else torch.float32

def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] @ weight.T + bias with weight [N, K] in oneDNN's own blocked layout."""
    if x.numel() > 256 * x.shape[-1] and many_rows_dtype(x) != x.dtype:
        return F.linear(x.float(), weight.to_dense().float(), None if bias is None else bias.float()).to(x.dtype)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

packed_linear_op = torch.library.custom_op("gpt_flash::packed_linear", packed_linear, mutates_args=())
packed_linear_op.register_fake(lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]))

class Linear(nn.Linear):
    """nn.Linear that a CPU runs from weights prepacked for oneDNN: measured 1.6x plain F.linear at batch 1 in bf16."""
    packed = False

    def pack(self):
        onednn = torch.backends.mkldnn.is_available() and (
            self.weight.dtype == torch.float32
            or self.weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        if self.weight.device.type == "cpu" and onednn and not self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 1)
            self.weight, self.packed = nn.Parameter(weight, requires_grad=False), True
        return self

    def stored(self):
        return {"weight": self.weight.to_dense() if self.packed else self.weight}

    def forward(self, x):
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        # opaque to torch.compile, which cannot look into packed weights; eager spares itself an operator's dispatch
        return (packed_linear_op if torch.compiler.is_compiling() else packed_linear)(x, self.weight, self.bias)

class QuantizedLinear(nn.Module):
    """What quantized layers share. One starts out empty, in the place and on the device of a Linear.

    quantize(rows, w) fills a slice of rows from float32 and returns the values they stand for now; stored() gives the
    plain tensors that are saved, dense(dtype) the weight by slices. Up to few_rows, the most that were measured faster
    so, go to product(x), which reads the weight as it is kept, with x in bfloat16 (rounding it is a fifth of int8's
    own error). More rows, as in prefill, pay for dequantizing the weight once."""
    packed = False

    def __init__(self, linear, **buffers):
        super().__init__()
        self.out_features, self.in_features, self.bias = linear.out_features, linear.in_features, linear.bias
        for name, (dtype, *shape) in buffers.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=linear.weight.device))

    def pack(self):
        return self

    def slices(self, *tensors):
        """Rows of the tensors together, on a CPU as many as its cache holds: half the time of all at once."""
        n = 512 if self.weight.device.type == "cpu" else self.out_features
        return zip(*(x.split(n) for x in tensors))

    def forward(self, x):
        rows, dtype = x.reshape(-1, self.in_features), many_rows_dtype(x)
        if len(rows) <= self.few_rows(x.device.type):
            y = self.product(rows.bfloat16())
        else:
            rows = rows.to(dtype)
            y = torch.cat([F.linear(rows, weight) for weight in self.dense(dtype)], -1)
        y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

class Int8Linear(QuantizedLinear):
    """x @ (weight * scales).T with weight [N, K] int8, scales [N] bfloat16: symmetric, one scale per output channel."""
    mode, group_size = "int8", None

    def __init__(self, linear, group_size=None):
        N, K = linear.out_features, linear.in_features
        super().__init__(linear, weight=(torch.int8, N, K), scales=(torch.bfloat16, N))

    def quantize(self, rows, w):
        scales = (w.abs().amax(1) / 127).bfloat16()
        self.weight[rows] = (w / scales.float().clamp_min(1e-30)[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.scales[rows] = scales
        return self.weight[rows] * scales.float()[:, None]

    def stored(self):
        return {"weight": self.weight, "scales": self.scales}

    def dense(self, dtype):
        for weight, scales in self.slices(self.weight, self.scales.to(dtype)):
            yield weight.to(dtype) * scales[:, None]

    def few_rows(self, device):
        """A CPU's operator reads 16 inputs at a time, without looking."""
        return {"cpu": 24 * (self.in_features % 16 == 0), "cuda": 16}.get(device, 0)

    def product(self, x):
        if x.device.type == "cpu":
            return torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scales)
        return F.linear(x, self.weight.to(x.dtype)) * self.scales  # one kernel, compiled with coordinate descent tuning

class Int4Linear(QuantizedLinear):
    """x @ w.T with w = (nibble - 8) * scale + zero: affine, in groups of 32, 64 or 128 inputs.

    weight [N, K/2] uint8 (the low nibble is the even input); scales, zeros [N, K/group_size] bfloat16. Packed for a
    CPU: N a multiple of 64, weight in the operator's layout, scales [K/group_size, N, 2] with the zeros beside them."""
    mode = "int4"

    def __init__(self, linear, group_size=32):
        N, K = linear.out_features, linear.in_features
        if K % group_size:
            raise ValueError(f"a layer of {K} inputs does not divide into int4 groups of {group_size}")
        self.group_size, groups = group_size, (torch.bfloat16, N, K // group_size)
        super().__init__(linear, weight=(torch.uint8, N, K // 2), scales=groups, zeros=groups)

    def quantize(self, rows, w):
        """From a group's range, alternate between rounding to nibbles and the least-squares line through them, as
        llama.cpp does, and keep the best: 7% less error than the range alone on normal weights."""
        w, best = w.view(len(w), -1, self.group_size), None
        low, high = w.aminmax(dim=-1, keepdim=True)
        scale, zero = (high - low) / 15, low + (high - low) * (8 / 15)
        for _ in range(4):
            scale, zero = scale.bfloat16().float(), zero.bfloat16().float()
            q = (w - zero).div_(scale.clamp_min(1e-30)).round_().clamp_(-8, 7)
            error = (q * scale).add_(zero).sub_(w).square_().sum(-1, keepdim=True)
            new = error, q, scale, zero
            best = [torch.where(error < best[0], x, y) for x, y in zip(new, best)] if best else new
            mean = q.mean(-1, keepdim=True)
            scale = ((q - mean) * w).sum(-1, keepdim=True) / (q - mean).square_().sum(-1, keepdim=True).clamp_min(1e-30)
            zero = w.mean(-1, keepdim=True) - scale * mean
        _, q, scale, zero = best
        self.weight[rows] = pack_nibbles((q + 8).flatten(1).to(torch.uint8))
        self.scales[rows], self.zeros[rows] = scale.squeeze(-1), zero.squeeze(-1)
        return (q * scale + zero).flatten(1)

    def pack(self):
        if self.weight.device.type == "cpu" and not self.packed and cpu_layout():
            nibbles, scales, zeros = (F.pad(x, (0, 0, 0, -len(x) % 64)) for x in self.plain())
            self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1)
            self.scales, self.zeros = torch.stack((scales, zeros), -1).transpose(0, 1).contiguous(), None
            self.packed, self.layout = True, cpu_layout()
        return self

    def plain(self):
        """nibbles [N, K] uint8, scales and zeros [N, K/group_size]."""
        if not self.packed:
            return torch.stack((self.weight & 15, self.weight >> 4), -1).flatten(1), self.scales, self.zeros
        N = self.out_features
        return cpu_unpack(self.weight, *self.layout)[:N], *self.scales[:, :N].transpose(0, 1).unbind(-1)

    def stored(self):
        nibbles, scales, zeros = self.plain()
        return {"weight": pack_nibbles(nibbles), "scales": scales, "zeros": zeros}

    def dense(self, dtype):
        for nibbles, scales, zeros in self.slices(*self.plain()):
            groups = nibbles.view(len(nibbles), -1, self.group_size).to(dtype)
            yield groups.sub_(8).mul_(scales[..., None]).add_(zeros[..., None]).flatten(1)

    def few_rows(self, device):
        return {"cpu": 128 * self.packed, "cuda": 16}.get(device, 0)

    def product(self, x):
        if x.device.type == "cuda":
            return kernels.int4_linear(x, self.weight, self.scales, self.zeros)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, self.group_size, self.scales)
        return y[:, :self.out_features].contiguous()

def pack_nibbles(nibbles):
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4

def cpu_unpack(packed, block, dim):
    """PyTorch's int4 layout for a CPU, [N, K/2] uint8 -> nibbles [N, K]: byte j of a block of rows holds, for each
    input, rows j and j + block/2 (dim -2, AVX-512 and AVX2) or rows 2j and 2j + 1 (dim -1)."""
    K = 2 * packed.shape[1]
    tiles = packed.view(-1, K, block // 2)
    return torch.stack((tiles & 15, tiles >> 4), dim).flatten(-2).transpose(1, 2).reshape(-1, K)

@lru_cache
def cpu_layout():
    """(block, dim) of cpu_unpack on this CPU, None if it is none of the known ones."""
    probe = torch.randint(16, (64, 2), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(probe, 1)
    layouts = [(block, dim) for block in (64, 32, 16) for dim in (-2, -1)]
    return next((layout for layout in layouts if torch.equal(cpu_unpack(packed, *layout), probe)), None)

# --- quantizing, saving, loading ---

MODES = {"int8": Int8Linear, "int4": Int4Linear}

@lru_cache
def say_once(message):
    print(message, file=sys.stderr)

@torch.no_grad()
def quantize_linear(linear, mode, group_size=32, name=""):
    """A Linear's quantized counterpart, not packed yet, its relative error in .error; the Linear itself where its shape
    does not fit, said on stderr. The output layer gets int8 in int4 mode too: in int4 it costs SmolLM2-135M a
    mean KL of 0.053, in int8 0.002, and llama.cpp does not go below 6 bits for it either. ValueError for an unknown
    mode or group size."""
    if mode not in MODES or group_size not in (32, 64, 128):
        raise ValueError(f"no quantization {mode!r} in groups of {group_size}; there are int8, int4 and 32, 64, 128")
    try:
        layer = MODES["int8" if name == "lm_head" else mode](linear, group_size)
    except ValueError as e:
        say_once(f"{e}: it keeps its precision")
        return linear
    error = size = 0
    for i, w in enumerate(linear.stored()["weight"].split(512)):  # as many rows as a CPU's cache holds
        w = w.float()
        error += (layer.quantize(slice(512 * i, 512 * i + 512), w) - w).square().sum()
        size += w.square().sum()
    layer.error = float((error / size.clamp_min(1e-30)).sqrt())
    return layer

def quantize_model(model, mode, group_size=32):
    """Quantize a loaded model's linear layers in place -> the model, which then needs setup_caches again. The embedding
    stays as it is, also where the output layer shares it."""
    for name, module in tqdm(list(model.named_modules()), desc="quantizing", unit=" layers", disable=None, leave=False):
        if isinstance(module, Linear):
            model.set_submodule(name, quantize_linear(module, mode, group_size, name).pack())
    model.cache = None
    return model

def quantized_layout(model, hf):
    """Put empty quantized layers where save_quantized's config.json has them -> whether it is one."""
    if "gpt_flash" not in hf:
        return False
    try:
        for name, (mode, group_size) in hf["gpt_flash"]["layers"].items():
            model.set_submodule(name, MODES[mode](model.get_submodule(name), group_size))
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        raise ValueError(f"the gpt_flash entry of config.json does not fit the model: {e}") from None
    return True

def refuse_existing(folder):
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; remove it or choose another --output")

@torch.no_grad()
def save_quantized(model, folder, finish=None):
    """Write a quantized model as a folder that load_model opens on any device: config.json, which says what each layer
    is, and model.safetensors with the layers' stored() tensors. finish(folder) may add files. The folder appears when
    all is written; ValueError if it exists already, unless empty."""
    folder, tensors, layers = Path(folder), {}, {}
    refuse_existing(folder)
    for prefix, module in model.named_modules():
        if prefix == "lm_head" and model.config.tied and isinstance(module, Linear):
            continue
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, (Linear, QuantizedLinear)):
            own |= module.stored()
        if isinstance(module, QuantizedLinear):
            layers[prefix] = module.mode, module.group_size
        tensors |= {f"{prefix}.{name}": x.contiguous().cpu() for name, x in own.items()}
    if not layers:
        raise ValueError("the model has no quantized layers; call quantize_model first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as tmp:
        new = Path(tmp) / folder.name
        new.mkdir()
        save_file(tensors, new / "model.safetensors", {"format": "pt"})
        config = {**model.config.hf, "gpt_flash": {"layers": layers}}
        (new / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        shutil.copymode(new / "config.json", new / "model.safetensors")  # safetensors hides it from other users
        if finish:
            finish(new)
        new.replace(folder)

# --- quality ---

@torch.no_grad()
def perplexity(model, ids, context=512, kv_dtype=None, reference=None):
    """exp of the mean negative log-likelihood of ids[1:], read in pieces of `context` tokens; kv_dtype as in
    setup_caches. With a reference model: (perplexity, mean KL divergence of the next token from the reference's).

    The text goes through 16 tokens a call, as in decoding, so that attention sees the cache as it is stored."""
    if len(ids) < 2 or not 0 <= min(ids) <= max(ids) < model.config.vocab_size:
        raise ValueError(f"perplexity takes at least 2 tokens of the {model.config.vocab_size} of the vocabulary")
    model.setup_caches(1, context, kv_dtype)
    if reference is not None:
        reference.setup_caches(1, context)
    ids, nll, kl = torch.tensor(ids, device=model.embed_tokens.weight.device), 0.0, 0.0
    pieces = zip(ids[:-1].split(context), ids[1:].split(context))
    for piece, targets in tqdm(list(pieces), desc="reading", disable=None, leave=False):
        for i in range(0, len(piece), 16):
            call = piece[None, i:i + 16], torch.tensor([i], dtype=torch.int32, device=ids.device)
            logp = model(*call)[0].float().log_softmax(-1)
            nll += F.nll_loss(logp, targets[i:i + 16], reduction="sum").item()
            if reference is not None:
                expected = reference(*call)[0].float().log_softmax(-1)
                kl += F.kl_div(logp, expected, reduction="sum", log_target=True).item()
    n = len(ids) - 1
    return math.exp(nll / n) if reference is None else (math.exp(nll / n), kl / n)

def print_table(load, ids, modes, dtype):
    """What the modes cost and save, each with a KV cache in the model's dtype and in int8; load(mode) gives a model."""
    reference, first, context = load(None), None, min(512, len(ids))
    print(f"{len(ids)} tokens, {context} at a time; MB: weights and cache that a token reads\n"
          "   weights       cache  perplexity   change   mean KL        MB")
    for mode in (None, *modes):
        model = load(mode) if mode else copy.copy(reference)
        for kv_dtype in (None, torch.int8):
            ppl, kl = perplexity(model, ids, context, kv_dtype, reference)
            first, megabytes = first or ppl, (model.weight_bytes() + model.cache.nbytes) / 1e6
            print(f"{mode or dtype:>10}  {'int8' if kv_dtype else dtype:>10} {ppl:11.4f} {ppl / first - 1:+8.2%} "
                  f"{kl:9.2e} {megabytes:9.1f}", flush=True)

# --- the command line ---

def save_tokenizer(source, folder):
    """The tokenizer of a checkpoint as files beside saved weights; the one inside a .gguf in Hugging Face's form."""
    from generate import load_tokenizer, tokenizers
    if source.is_dir():
        for name in ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "generation_config.json"):
            for file in source.glob(name):
                shutil.copy(file, folder)
        return
    t = load_tokenizer(source)
    if isinstance(t.backend, tokenizers.Tokenizer):
        if t.bos_id is not None:
            bos = t.special_text["bos_token"]
            t.backend.post_processor = tokenizers.processors.TemplateProcessing(f"{bos} $A", None, [(bos, t.bos_id)])
        t.backend.save(str(folder / "tokenizer.json"))
    else:
        (folder / "tokenizer.model").write_bytes(t.backend.serialized_model_proto())
    config = {**t.special_text, "add_bos_token": t.bos_id is not None, "eos_token_id": sorted(t.eos_ids),
              "chat_template": t.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

def parse_args(argv):
    from generate import DTYPES, Parser
    p = Parser("quantize.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--checkpoint_path", metavar="PATH", help="as in generate.py; default: its SmolLM2-135M-Instruct")
    add("--mode", choices=MODES, help="quantize to this and save")
    add("--group_size", type=int, choices=[32, 64, 128], default=32, help="inputs to an int4 scale; default: 32")
    add("--output", type=Path, help="folder to write; default: the checkpoint's name with -int8 or -int4")
    add("--perplexity", metavar="FILE", help="a text to measure --modes on")
    add("--modes", nargs="*", choices=MODES, default=list(MODES), help="rows of the table; default: int8 int4")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...; default: cuda")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of activations and other weights; default: bfloat16")
    args = p.parse_args(argv)
    if bool(args.mode) == bool(args.perplexity):
        p.error("give --mode to save a quantized checkpoint, or --perplexity FILE to measure quality")
    return args

def run(args):
    from generate import DTYPES, default_model, load_model, load_tokenizer, read_text, resolve
    source, dtype, start = resolve(args.checkpoint_path or default_model()), DTYPES[args.dtype], time.perf_counter()
    def load(mode):
        return load_model(source, device=args.device, dtype=dtype, quantize=mode, group_size=args.group_size)
    if args.perplexity:
        ids = load_tokenizer(source).encode(read_text(f"@{args.perplexity}"))
        return print_table(load, ids, args.modes, args.dtype)
    named = Path(args.checkpoint_path or source)
    named = named if named.exists() else Path(named.name)  # a hub id
    folder = args.output or named.with_name(f"{named.stem if named.is_file() else named.name}-{args.mode}")
    refuse_existing(folder)
    model = load(args.mode)
    save_quantized(model, folder, lambda new: save_tokenizer(source, new))
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    before = sum(m.out_features * m.in_features for m in layers) * dtype.itemsize / 1e6
    after = sum(x.nbytes for m in layers for x in m.stored().values()) / 1e6
    print(f"{folder}: {len(layers)} layers, {before:.1f} MB in {args.dtype}, are now {after:.1f} MB; largest relative "
          f"error of a layer {max(m.error for m in layers):.2%}; {time.perf_counter() - start:.1f} s", file=sys.stderr)

def main(argv=None):
    from generate import first_line
    args = parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        print(f"quantize.py: error: {first_line(e)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

if __name__ == "__main__":
    import quantize  # not this copy of the module: model.py's, whose classes it uses
    quantize.main()
