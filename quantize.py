"""int8 and int4 weights: layers that decode with them, rounding, and saving them.

A layer keeps tensors that any device can multiply with: Int8Linear is the whole idea. Where a
device has a faster operator, a Layout multiplies, and may keep the tensors in an order of its own:
cpu/ and products/ put theirs into LAYOUTS."""
from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

T = TypeVar("T")
CHUNK_ROWS = 512  # rows of a weight that are converted at a time: what a CPU's cache holds
BLOCK = 128  # tokens of a prompt that a CPU multiplies with one dequantized int4 weight
SCALES = torch.bfloat16
BF16 = torch.cpu._is_avx512_bf16_supported()

# --- layers ---


class Packable(nn.Module):
    """A layer whose tensors a device may keep in another order."""

    mode = "float"
    layout: Layout | None = None  # None: PyTorch multiplies with the tensors as they are
    order: Any = None  # of a CPU's layout: cpu/products.py
    shared = False  # whether the weight is the embedding's too
    is_head = False  # whether it gives logits, which are float32's where x is
    # where ranks have parts of each row: largest values of the part -> those of the whole rows, so
    # that the part gets the integers that it has in the whole
    over_ranks: Callable[[Tensor], Tensor] | None = None

    def pack(self) -> Packable:
        """Bring the tensors into the layout of their device, if there is one for this mode."""
        layout = LAYOUTS.get((self.mode, self.weight.device.type))
        if self.layout is None and layout is not None and layout.pack(self):
            self.layout = layout
        return self


class QuantizedLinear(Packable):
    """What quantized layers share. One starts out empty, with the shape and device of a Linear.

    A mode defines quantize(rows, w), which fills a slice of rows from float32 and returns the
    values that they stand for now; stored(), the plain tensors that are saved; and values(rows,
    dtype), what a slice or an index of rows stands for.

    A step's x goes to the operator of the layer's layout, in bfloat16 (rounding it is a fifth of
    int8's own error). Many tokens, as in prefill, pay for dequantizing the weight once. From how
    many on is the layout's choice; for int4 on a CPU it does not depend on other rows."""

    group_size: int | None
    error = 0.0  # relative, of the weight that quantize_linear has quantized

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features = linear.out_features
        self.in_features = linear.in_features
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[-2] if x.dim() > 2 else 1  # experts give single tokens
        rows = x.reshape(-1, self.in_features)
        whole = T  # leading tokens that a dequantized weight multiplies
        gives_logits = self.is_head and (self.layout is None or self.layout.exact_heads)
        exact = gives_logits and x.dtype == torch.float32
        if self.layout is not None and gives_logits:
            whole = T if T > 16 else 0  # more than a step has
        elif self.layout is not None:
            whole = 0 if len(rows) <= self.layout.few_rows else T - T % self.layout.block
        if 0 < whole < T:
            return torch.cat([self.forward(part) for part in x.split([whole, T - whole], -2)], -2)
        if whole == 0:
            y = self.layout.product(self, rows if exact else rows.bfloat16())
        else:
            rows = rows.to(x.dtype if exact else many_rows_dtype(x.device))
            y = torch.cat([F.linear(rows, weight) for weight in self.dense(rows.dtype)], -1)
        y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """What model.to and model.half do. Scales stay bfloat16, as operators want them."""
        scales = {id(x) for x in self._buffers.values() if x is not None and x.dtype == SCALES}
        return super()._apply(
            lambda x: fn(x.view(torch.int16)).view(SCALES) if id(x) in scales else fn(x), recurse
        )

    def dense(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight, by slices of rows."""
        for rows in self.slices():
            yield self.values(rows, dtype)

    def slices(self) -> Iterator[slice]:
        """All rows, on a CPU as many at a time as its cache holds: half the time of all at once."""
        n = self.out_features
        if self.order is not None or self.weight.device.type == "cpu":
            n = CHUNK_ROWS
        for start in range(0, self.out_features, n):
            yield slice(start, min(start + n, self.out_features))


class Int8Linear(QuantizedLinear):
    """x @ (weight * scales).T with weight [N, K] int8, scales [N] bfloat16: symmetric, one scale
    per output channel."""

    mode = "int8"
    group_size = None

    def __init__(self, linear: nn.Linear, group_size: int | None = None) -> None:
        super().__init__(linear)
        N, K = linear.out_features, linear.in_features
        device = linear.weight.device
        self.register_buffer("weight", torch.empty(N, K, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.empty(N, dtype=torch.bfloat16, device=device))

    def quantize(self, rows: slice, w: Tensor) -> Tensor:
        largest = w.abs().amax(1)  # (rows)
        if self.over_ranks is not None:
            largest = self.over_ranks(largest)
        scales = (largest / 127).bfloat16()
        steps = scales.float()[:, None]  # (rows, 1)
        self.weight[rows] = (w / steps.clamp_min(1e-30)).round().clamp(-127, 127).to(torch.int8)
        self.scales[rows] = scales
        return self.weight[rows] * steps

    def stored(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "scales": self.scales}

    def values(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        return self.weight[rows].to(dtype) * self.scales[rows].to(dtype)[:, None]


class Int4Linear(QuantizedLinear):
    """x @ w.T with w = (nibble - 8) * scale + zero: affine, in groups of 32, 64 or 128 inputs.

    weight [N, K/2] uint8 (the low nibble is the even input); scales, zeros [N, K/group_size]
    bfloat16. A layout has other tensors under these names, zeros may be None there."""

    mode = "int4"
    nibbles = 1  # of a weight

    def __init__(self, linear: nn.Linear, group_size: int = 32) -> None:
        super().__init__(linear)
        N, K = linear.out_features, linear.in_features
        if K % group_size:
            raise ValueError(
                f"a layer of {K} inputs does not divide into int4 groups of {group_size}"
            )
        self.group_size = group_size
        device = linear.weight.device
        packed = (N, K * self.nibbles // 2)
        groups = (N, K // group_size)
        # not empty_like, which on meta loads all of sympy: 50 MB and half a second
        self.register_buffer("weight", torch.empty(packed, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.empty(groups, dtype=torch.bfloat16, device=device))
        self.register_buffer("zeros", torch.empty(groups, dtype=torch.bfloat16, device=device))

    def quantize(self, rows: slice, w: Tensor) -> Tensor:
        """From a group's range, alternate between rounding to nibbles and the least-squares line
        through them, as llama.cpp does, and keep the best: 7% less error than the range alone on
        normal weights."""
        w = w.view(len(w), -1, self.group_size)  # (rows, groups, group_size)
        # the line that spreads the 16 nibbles over a group's range
        low, high = w.aminmax(dim=-1, keepdim=True)  # (rows, groups, 1)
        scale = (high - low) / 15
        zero = low + (high - low) * (8 / 15)
        line = best = round_to_line(w, scale, zero)
        for _ in range(3):
            q, *_ = line
            line = round_to_line(w, *least_squares_line(w, q))
            better = line[-1] < best[-1]  # in error
            best = [torch.where(better, new, old) for new, old in zip(line, best)]
        q, scale, zero, _ = best
        self.weight[rows] = pack_nibbles((q + 8).flatten(1).to(torch.uint8))  # of (rows, K)
        self.scales[rows] = scale.squeeze(-1)
        self.zeros[rows] = zero.squeeze(-1)
        return (q * scale + zero).flatten(1)  # (rows, K)

    def plain(self, rows: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Some of the rows (a slice of slices(), or an index): nibbles [rows, K] uint8, scales and
        zeros [rows, K/group_size]."""
        if self.layout is not None:
            return self.layout.plain(self, rows)
        return unpack_nibbles(self.weight[rows]), self.scales[rows], self.zeros[rows]

    def stored(self) -> dict[str, Tensor]:
        parts = [self.plain(rows) for rows in self.slices()]
        nibbles, scales, zeros = [torch.cat(part) for part in zip(*parts)]
        return {"weight": pack_nibbles(nibbles), "scales": scales, "zeros": zeros}

    def values(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        nibbles, scales, zeros = self.plain(rows)
        return affine(nibbles, 8, scales, zeros, dtype)


MODES: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}


class Linear(Packable, nn.Linear):
    """A layer in the model's own precision."""

    def forward(self, x: Tensor) -> Tensor:
        if self.layout is not None:
            return self.layout.product(self, x)
        return F.linear(x, self.weight, self.bias)

    def stored(self) -> dict[str, Tensor]:
        return {"weight": self.weight}


class Layout(Protocol):
    """How the operator of a device wants a layer's tensors."""

    def pack(self, layer: nn.Module) -> bool:
        """Bring the tensors into this layout -> whether that can be: otherwise they stay."""

    def plain(self, layer: nn.Module, rows: slice | Tensor) -> tuple[Tensor, ...]:
        """Some rows as they were before, as Int4Linear.plain says."""

    few_rows: int  # the most rows of x for which product was measured faster than dequantizing
    block: int  # where there are more, whole blocks of so many tokens are for the dequantized one
    exact_heads: bool  # of heads it takes x in float32, and gives the likeliest logits in float32

    def product(self, layer: nn.Module, x: Tensor) -> Tensor:
        """x [rows, in_features] times the weight -> [rows, out_features]."""


# by mode ("float" for Linear) and device type; cpu/ and products/ put theirs here
LAYOUTS: dict[tuple[str, str], Layout] = {}
# layers that somebody has looked at: their tensors are as they were, until the next text begins
PLAIN: WeakSet[nn.Module] = WeakSet()


def pack_again() -> None:
    """A text begins: bring the layers of PLAIN into their layouts."""
    for layer in list(PLAIN):
        layer.layout.pack(layer)


def many_rows_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which many rows multiply fastest: bfloat16, by 2x, but on a CPU without
    instructions for it float32, by 3x."""
    return torch.bfloat16 if BF16 or device.type != "cpu" else torch.float32

# --- quantizing ---


def quantize_model(model: nn.Module, mode: str, group_size: int = 32) -> nn.Module:
    """Quantize a loaded model's linear layers in place -> the model, which then needs setup_caches
    again. The embedding stays as it is, also where the output layer shares it."""
    for name in progress([name for name, _ in model.named_modules()], "quantizing"):
        module = model.get_submodule(name)  # a list of modules would keep the dense ones
        if isinstance(module, Linear):
            model.set_submodule(name, quantize_linear(module, mode, group_size, name).pack())
    for module in model.modules():
        if hasattr(module, "stack"):  # of experts
            module.stack()
    model.cache = None
    return model


@torch.no_grad()
def quantize_linear(
    linear: Linear, mode: str, group_size: int = 32, name: str = ""
) -> Linear | QuantizedLinear:
    """A Linear's quantized counterpart, not packed yet, its relative error in .error; the Linear
    itself where its shape does not fit, said on stderr. ValueError for an unknown mode or group
    size.

    The output layer gets int8 in int4 mode too: in int4 it costs SmolLM2-135M a mean KL of 0.053,
    in int8 0.002, and llama.cpp does not go below 6 bits for it either."""
    if mode not in MODES or group_size not in (32, 64, 128):
        what = f"{mode!r} in groups of {group_size}"
        raise ValueError(f"no quantization {what}; there are int8, int4 and 32, 64, 128")
    if name == "lm_head":
        mode = "int8"
    try:
        layer = MODES[mode](linear, group_size)
    except ValueError as e:
        say_once(f"{e}: it keeps its precision")
        return linear
    layer.over_ranks, layer.is_head = linear.over_ranks, name == "lm_head"
    weight = linear.stored()["weight"]  # (N, K)
    error, size = torch.zeros(2, device=weight.device)
    for start in range(0, len(weight), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        w = weight[rows].float()
        error += (layer.quantize(rows, w) - w).square().sum()
        size += w.square().sum()
    layer.error = float((error / size.clamp_min(1e-30)).sqrt())
    return layer


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The items, one after the other. On a terminal cli/ puts a bar in the place of this."""
    return items


# for str.translate: control characters but \t and \n, by which a text could drive a terminal
HARMLESS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\ufffd")


@lru_cache
def say_once(message: str) -> None:
    print(message.translate(HARMLESS), file=sys.stderr)

# --- rounding ---


def round_to_line(w: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The nearest q * scale + zero to w [..., group_size], q from -8 to 7, with scale and zero
    [..., 1] rounded to bfloat16 -> (q, scale, zero, squared error [..., 1])."""
    scale = scale.bfloat16().float()
    zero = zero.bfloat16().float()
    q = (w - zero).div_(scale.clamp_min(1e-30)).round_().clamp_(-8, 7)
    error = (q * scale).add_(zero).sub_(w).square_().sum(-1, keepdim=True)
    return q, scale, zero, error


def least_squares_line(w: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """scale and zero [..., 1] of the line q * scale + zero closest to w [..., group_size]."""
    mean = q.mean(-1, keepdim=True)
    covariance = ((q - mean) * w).sum(-1, keepdim=True)
    variance = (q - mean).square_().sum(-1, keepdim=True)
    scale = covariance / variance.clamp_min(1e-30)
    return scale, w.mean(-1, keepdim=True) - scale * mean


def affine(q: Tensor, middle: int, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """(q - middle) * scales + zeros, for q [rows, K] and scales and zeros [rows, groups]."""
    # a CPU takes three times as long in bfloat16
    compute = torch.float32 if q.device.type == "cpu" else dtype
    w = q.view(*scales.shape, -1).to(compute)  # (rows, groups, group_size)
    w.sub_(middle).mul_(scales[..., None]).add_(zeros[..., None])
    return w.flatten(1).to(dtype)


def pack_nibbles(nibbles: Tensor) -> Tensor:
    """[N, K] -> [N, K/2], the even inputs in the low halves of the bytes. Two bytes at a time,
    which is six times as fast as taking the even and the odd ones apart."""
    pairs = nibbles.contiguous().view(torch.int16)  # low | high << 8
    return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """[N, K/2] -> [N, K]"""
    pairs = packed.to(torch.int16)
    return (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F).view(torch.uint8)

# --- the int8 cache ---


@torch.no_grad()
def calibrate_k_mean(model: nn.Module, cache: Any) -> None:
    """Fill an int8 cache's k_mean: the mean key of each head over random tokens.

    Keys have outlier channels that one int8 scale a token handles badly; subtracting a fixed vector
    removes them, and softmax does not notice (SageAttention, arXiv 2410.02367). The tokens are
    spread over the first positions of the context, because keys turn with their position, and not
    over those of the cache: what its room is changes no text."""
    n, spread_over = 128, min(4096, model.config.max_seq_len)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, n), generator=generator).to(model.device)
    spread = torch.linspace(0, spread_over - 1, n).long().to(model.device)
    input_pos = torch.zeros(1, dtype=torch.int32, device=model.device)
    # not quantized, and with all n tokens of every layer
    scratch = model.setup_caches(1, n, rings=False)
    scratch.max_seq_len = spread_over  # of its rotary tables
    positions = model.positions(input_pos, n, scratch, cached=0, turned=spread[None])
    model.run_layers(model.prefill_block, tokens, positions, scratch.layers(slice(0, 1)))
    for layer, measured in zip(cache.whole, scratch.whole, strict=True):
        if hasattr(layer, "k_mean"):  # or it has no such keys
            keys = measured.kv[0, 0].float()  # (Hkv, n, D)
            layer.k_mean.copy_(keys.mean(1, keepdim=True))

# --- saving and loading ---


def save_quantized(model: nn.Module, folder: str | Path) -> None:
    """Write a quantized model into a new folder that load_model opens on any device."""
    with new_folder(folder) as new:
        write_quantized(model, new)


@torch.no_grad()
def write_quantized(model: nn.Module, folder: Path) -> None:
    """Put config.json, which says what each layer is, and model.safetensors with the layers'
    stored() tensors into a folder. ValueError: no layer is quantized."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            layers[name] = (module.mode, module.group_size)
    if not layers:
        raise ValueError("the model has no quantized layers: quantize it to int8 or int4 first")
    config = {**model.config.hf, "gpt_flash": {"layers": layers}}
    weights = folder / "model.safetensors"
    save_file(stored_tensors(model), weights, {"format": "pt"})
    settings = folder / "config.json"
    settings.write_text(json.dumps(config, indent=2), encoding="utf-8")
    shutil.copymode(settings, weights)  # safetensors hides its file from other users


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a saved model consists of, by our names, in the CPU's memory and plain layouts."""
    tensors = {}
    for prefix, module in model.named_modules():
        if prefix == "lm_head" and model.config.tied and isinstance(module, Linear):
            continue  # the embedding
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, (Linear, QuantizedLinear)):
            own |= module.stored()
        for name, tensor in own.items():
            tensors[f"{prefix}.{name}"] = tensor.contiguous().cpu()
    return tensors


def quantized_layout(model: nn.Module, hf: dict, put: Callable[..., Any]) -> bool:
    """Put empty quantized layers where save_quantized's config.json has them -> whether hf is one.
    put: put_layer, or one that knows more modes. ValueError where they do not fit the model."""
    if "gpt_flash" not in hf:
        return False
    try:
        for name, (mode, group_size) in hf["gpt_flash"]["layers"].items():
            put(model, name, mode, group_size)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        raise ValueError(
            f"the gpt_flash entry of config.json does not fit the model: {e}"
        ) from None
    return True


def put_layer(model: nn.Module, name: str, mode: str, group_size: int | None) -> nn.Module:
    """Put an empty quantized layer in the place of a Linear -> the layer."""
    layer = MODES[mode](model.get_submodule(name), group_size)
    model.set_submodule(name, layer)
    return layer


def cache_folder() -> Path:
    """Where what can be made again is kept. RuntimeError: the user has no home."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():  # as its specification says
        caches = Path.home() / ".cache"
    return caches / "gpt-flash"


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A hidden folder to write into, which is moved to that path at the end, but not after an
    exception. A path where it could not be is refused at the beginning. ValueError: there is more
    than an empty folder, or it is in use. OSError: no folder can be made there."""
    folder = Path(os.path.realpath(path))  # a link to it stays
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; remove it or choose another folder")
    if folder.is_mount() or folder == Path.cwd():
        raise ValueError(f"{folder} is in use; choose a new folder inside")
    parent = next(parent for parent in folder.parents if parent.exists())
    with workspace(parent, folder.name) as tmp:
        new = tmp / folder.name
        new.mkdir(folder.stat().st_mode if folder.exists() else 0o777)  # as private as it was
        yield new
        folder.parent.mkdir(parents=True, exist_ok=True)
        new.replace(folder)


@contextmanager
def workspace(parent: Path, name: str) -> Iterator[Path]:
    """A new hidden folder in `parent` to write into until all is there; gone at the end, by an
    exception too.

    A process that is killed leaves its own, so those of the same name that no process has locked
    are removed first: the lock ends with the process that has it."""
    prefix = f".gpt-flash-{name[:50]}-"
    for folder in parent.iterdir():
        if folder.name.startswith(prefix) and not folder.is_symlink():
            remove_abandoned(folder)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as folder:
        lock = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks: none removes it there
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield Path(folder)
        finally:
            os.close(lock)


def remove_abandoned(folder: Path) -> None:
    with suppress(OSError):  # another user's, or gone meanwhile
        if time.time() - folder.stat().st_mtime < 1:  # perhaps not locked yet
            return
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # a pipe would be waited for
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(lock)


def perplexity(*args: Any, **options: Any) -> Any:
    """What quantizing costs on a text: benchmarks/quality.py's."""
    from benchmarks import quality
    return quality.perplexity(*args, **options)
