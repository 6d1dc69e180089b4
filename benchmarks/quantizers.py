"""What llama.cpp's quantizer makes of a model, for quality.py.

It needs gguf and llama-cpp-python, which pip builds from source in some 20 minutes."""
import ctypes
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.decode import add_metadata
from model import Transformer, load_model, sources
from quantize import Linear

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PIECE = 512  # tokens of a text that are read at a time


def gguf_name(name: str) -> str:
    """What llama.cpp calls a Hugging Face tensor of a Llama."""
    module = name.removesuffix(".weight")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.weight"
    _, _, layer, module = module.split(".", 3)
    return f"blk.{layer}.{NAMES[module]}.weight"


def write_gguf(model: Transformer, path: Path) -> None:
    """A Llama in float32, as llama.cpp's converter writes it, but for the vocabulary. ValueError:
    it is another model."""
    import gguf
    config = model.config
    scaled = (config.hf.get("rope_scaling") or {}).get("factor")
    if config.family != "llama" or config.qkv_bias or config.mlp_bias or scaled:
        raise ValueError("--llama_cpp takes Llamas without biases and scaled ropes")
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer, config)
    heads = {"q_proj": config.n_head, "k_proj": config.n_kv_head}
    for ours, x in model.named_parameters():
        if ours == "lm_head.weight" and config.tied:
            continue
        parts = sources(model, ours, x)
        for name, part in zip(parts, x.float().cpu().split([n for n, *_ in parts.values()])):
            n_head = heads.get(name.split(".")[-2])
            if n_head is not None:  # rotated values are neighbours there
                halves = part.view(n_head, 2, -1, part.shape[1])
                part = halves.transpose(1, 2).reshape(part.shape)
            writer.add_tensor(gguf_name(name), part.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def importance(model: Transformer, ids: list[int]) -> dict[str, Tensor]:
    """llama.cpp's importance matrix: of each tensor's inputs the mean squares over a text."""
    sums: dict[str, Tensor] = {}

    def add(names: list[str], layer: Linear, inputs: tuple[Tensor]) -> None:
        squares = inputs[0].reshape(-1, layer.in_features).float().square().sum(0).cpu()
        for name in names:
            sums[name] = sums.get(name, 0) + squares

    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            names = [gguf_name(part) for part in sources(model, f"{name}.weight", layer.weight)]
            hooks.append(layer.register_forward_pre_hook(partial(add, names)))
    model.setup_caches(1, PIECE)
    for piece in torch.tensor(ids, device=model.device).split(PIECE):
        model.prefill(piece[None], torch.zeros(1, dtype=torch.int32, device=model.device))
    for hook in hooks:
        hook.remove()
    return {name: x / len(ids) for name, x in sums.items()}


@cache
def silent() -> Callable[..., None]:
    """What llama.cpp is to call instead of printing; it stays."""
    import llama_cpp
    return llama_cpp.llama_log_callback(lambda *_: None)


def quantize(source: Path, kind: str, importance: dict[str, Tensor] | None = None) -> Path:
    """A GGUF file of that kind, such as Q4_K_M, beside the one in float32. ValueError: llama.cpp
    has failed."""
    import llama_cpp
    path = source.with_name(f"{kind}{'' if importance is None else '-imatrix'}.gguf")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if importance is not None:
        entry = llama_cpp.llama_model_imatrix_data
        rows = [
            entry(name.encode(), (ctypes.c_float * len(x))(*x.tolist()), len(x))
            for name, x in importance.items()
        ]
        settings.imatrix = (entry * (len(rows) + 1))(*rows)  # the last one is empty
    llama_cpp.llama_log_set(silent(), None)
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(path).encode(), ctypes.byref(settings)
    )
    if failed:
        raise ValueError(f"llama.cpp could not make {kind} of the model")
    return path


def load(path: Path, **options: object) -> tuple[Transformer, int]:
    """A file's model, dequantized, and the bytes of weights that a token reads."""
    import gguf
    tensors = {tensor.name: tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors}
    nbytes = sum(tensors.values())
    if "output.weight" in tensors:
        nbytes -= tensors["token_embd.weight"]
    return load_model(path, quantize="none", **options), int(nbytes)
