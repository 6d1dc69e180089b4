"""Rounding by what a text shows: integers that change least what the layers give on it.

The nearest integers are the best ones where inputs are independent of each other. Where they are
not, the error at one input can be made up for at others. From the lines of plain rounding, the
error e H e^T of a row, by the second moments H [K, K] of its inputs, is made small in two ways:
GPTQ (arXiv 2210.17323) rounds one input after the other, those with large moments first, and lets
what is left make up for it; coordinate descent (as QuantEase's, arXiv 2309.01885) then gives all of
them their best integers again, and each group its best line.

The text goes through the model while it is loaded: one block is dense at a time."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from model import KVCache, Transformer
from quantize import MODES, Int4Linear, Linear, QuantizedLinear
from quantize import pack_nibbles, quantize_linear, say_once

PIECE = 512  # tokens that are read at a time
MOST_PIECES = 128  # what follows is left out
LEAST_TOKENS = 128
BATCH = 8  # pieces that go through a block together
DAMPING = 0.3  # inputs are taken for as much less dependent than in the text, which is short
SWEEPS = 2  # of coordinate descent: more change little
CHUNK = 4096  # rows of a weight that are rounded together
BLOCK = 64  # inputs whose errors reach all others at once


class Calibration:
    """Takes the layers of a model's blocks while it is loaded, and quantizes a block at a time.
    The output layer, which is int8 in any case, is left to plain rounding."""

    def __init__(self, model: Transformer, ids: Sequence[int], mode: str, group_size: int) -> None:
        """ValueError: another mode than int8 and int4, ids that are too few or no tokens, or layers
        that take more than what the one before gives."""
        if mode not in MODES:
            raise ValueError(f"calibrating goes with quantize int8 or int4, not {mode}")
        if type(model).run_layers is not Transformer.run_layers:
            raise ValueError(f"calibrating is not possible for {model.config.family}")
        ids = torch.as_tensor(ids, device="cpu")
        n, vocab_size = len(ids), model.config.vocab_size
        if n < LEAST_TOKENS or ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(f"calibrating takes at least {LEAST_TOKENS} tokens of the {vocab_size}"
                             f" of the vocabulary; the text has {n}")
        T = min(PIECE, n, model.config.max_seq_len)
        n_pieces = min(n // T, MOST_PIECES)
        # (pieces, T) ids; from the first block on (pieces, T, dim), what the next block is given
        self.hidden = ids[:n_pieces * T].view(n_pieces, T)
        self.model = model
        self.kind = mode, group_size
        self.block: int | None = None  # the number of the one that is read now
        self.waiting: dict[str, Linear] = {}  # its layers, dense
        self.unseen = 0  # layers that the text did not reach

    def takes(self, name: str, module: nn.Module) -> bool:
        """Whether a module is left to it, of all as they are read: those of blocks behind those
        around them, lm_head at last. Where the next block begins the last one is quantized."""
        number = int(name.split(".")[1]) if name.startswith("layers.") else None
        if self.block not in (None, number):
            self.pass_block()
            if number is None and self.unseen:
                say_once(f"the text does not reach {self.unseen} layers of experts: they are "
                         "rounded without it")
        self.block = number
        if number is None or not isinstance(module, Linear):
            return False
        self.waiting[name] = module
        return True

    def pass_block(self) -> None:
        """Quantize a block's layers by what the text brings them, and let it go through them."""
        model, config = self.model, self.model.config
        if self.block == 0:
            self.hidden = model.embed(self.hidden.to(model.device))
        block, T = model.layers[self.block], self.hidden.shape[1]
        cache = KVCache(
            1, config.n_kv_head, config.head_dim, BATCH, T, dtype=model.dtype, device=model.device,
            makers=[block.self_attn.make_cache],
        )

        def forward(x: Tensor) -> Tensor:
            input_pos = torch.zeros(len(x), dtype=torch.int32, device=x.device)
            positions = model.positions(input_pos, T, cache, cached=0, even=True)
            return block(x, positions[self.block], *cache.layers(slice(0, len(x))))

        moments = {}  # of each layer's inputs: x.T @ x, [K, K] float32

        def add(layer: Linear, inputs: tuple[Tensor]) -> None:
            K = layer.in_features
            x = inputs[0].reshape(-1, K).float()
            if layer not in moments:
                moments[layer] = x.new_zeros(K, K)
            moments[layer].addmm_(x.T, x)

        hooks = [layer.register_forward_pre_hook(add) for layer in self.waiting.values()]
        self.run(forward)
        for hook in hooks:
            hook.remove()
        for name, linear in self.waiting.items():
            layer = quantize_linear(linear, *self.kind, name)
            moment = moments.pop(linear, None)
            if moment is None or not moment.any():
                self.unseen += 1
            elif isinstance(layer, QuantizedLinear):
                round_by(moment, layer, linear.weight)
            model.set_submodule(name, layer.pack())
        self.waiting = {}
        self.hidden = self.run(forward)

    def run(self, forward: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([forward(x) for x in self.hidden.split(BATCH)])

# --- rounding ---


class Grid:
    """Rows of a quantized layer in float32, transposed: q * scale + zero in groups of inputs."""

    def __init__(self, layer: QuantizedLinear, rows: slice) -> None:
        self.layer, self.rows = layer, rows
        self.has_zeros = isinstance(layer, Int4Linear)
        if self.has_zeros:
            self.low, self.high = -8, 7
            q, scale, zero = layer.plain(rows)
            q = q.float() - 8
        else:
            self.low, self.high = -127, 127
            q, scale = layer.weight[rows], layer.scales[rows, None]
            zero = torch.zeros_like(scale)
        q, self.scale, self.zero = [x.float().T.contiguous() for x in (q, scale, zero)]
        # q (groups, group_size, rows); scale, zero (groups, rows)
        self.q = q.unflatten(0, (len(self.scale), -1))

    def nearest(self, k: int, x: Tensor) -> Tensor:
        """Give input k the integers nearest to x [rows] -> the values that they stand for."""
        group, i = divmod(k, self.q.shape[1])
        scale, zero = self.scale[group], self.zero[group]
        q = (x - zero).div_(scale.clamp_min(1e-30)).round_().clamp_(self.low, self.high)
        self.q[group, i] = q
        return torch.addcmul(zero, q, scale)

    def values(self) -> Tensor:
        """What all integers stand for, [K, rows]."""
        return (self.q * self.scale[:, None] + self.zero[:, None]).flatten(0, 1)

    def put(self) -> None:
        """Bring it all into the layer."""
        layer, rows = self.layer, self.rows
        q = self.q.flatten(0, 1).T  # (rows, K)
        if self.has_zeros:
            layer.weight[rows] = pack_nibbles((q + 8).to(torch.uint8))
            layer.scales[rows] = self.scale.T
            layer.zeros[rows] = self.zero.T
        else:
            layer.weight[rows] = q.to(torch.int8)


def round_by(moment: Tensor, layer: QuantizedLinear, weight: Tensor) -> None:
    """Round again what quantize_linear made of weight [N, K]; layer.error becomes that of outputs.
    moment [K, K]: of the inputs, damped in place. ValueError: it is not finite."""
    squares = moment.diagonal()
    mean = squares.mean()
    if not mean.isfinite():
        raise ValueError("the text leads to numbers that are not finite: take another dtype")
    squares.mul_(1 + DAMPING).add_(1e-3 * mean)  # which some inputs lack
    order = squares.argsort(descending=True)
    # upper; its transpose times itself is the inverse of the moments in that order
    factor = torch.linalg.cholesky(moment[order][:, order].flip(0, 1)).flip(0, 1)
    ones = torch.eye(len(order), device=factor.device)
    factor = torch.linalg.solve_triangular(factor, ones, upper=True)
    error, size = 0.0, 0.0
    for start in range(0, len(weight), CHUNK):
        rows = slice(start, start + CHUNK)
        w = weight[rows].float().T.contiguous()  # (K, rows)
        grid = Grid(layer, rows)
        round_in_order(w, grid, factor, order)
        for _ in range(SWEEPS):
            descend(w, grid, moment)
        grid.put()
        off = w - grid.values()
        error += float((moment @ off).mul_(off).sum())
        size += float((moment @ w).mul_(w).sum())
    layer.error = (error / max(size, 1e-30)) ** 0.5


def round_in_order(w: Tensor, grid: Grid, factor: Tensor, order: Tensor) -> None:
    """GPTQ: the inputs of w [K, rows] are rounded in this order. By each one's error those that are
    left move as a row of factor says."""
    left = w[order]
    stop = 0
    for inputs, block in zip(order.split(BLOCK), left.split(BLOCK)):
        start, stop = stop, stop + len(block)
        reach = factor[start:stop]
        within = reach[:, start:stop]
        errors = torch.empty_like(block)
        for j, k in enumerate(inputs.tolist()):
            error = (block[j] - grid.nearest(k, block[j])) / within[j, j]
            block[j:].addr_(within[j, j:], error, alpha=-1)
            errors[j] = error
        left[stop:].addmm_(reach[:, stop:].T, errors, alpha=-1)


def descend(w: Tensor, grid: Grid, moment: Tensor) -> None:
    """Coordinate descent: each input takes the integers that are best beside all others', and each
    group of int4 then its best line."""
    values = grid.values()
    size = grid.q.shape[1] if grid.has_zeros else BLOCK
    for start in range(0, len(w), size):
        block = slice(start, start + size)
        within = moment[block, block]
        slope = moment[block] @ (w - values)  # (block, rows): half of what more would lessen
        for j, value in enumerate(values[block]):
            new = grid.nearest(start + j, value + slope[j] / within[j, j])
            slope.addr_(within[j], new - value, alpha=-1)
            value.copy_(new)
        if grid.has_zeros:
            fit_line(grid, start // size, values[block], slope, within)


def fit_line(grid: Grid, group: int, values: Tensor, slope: Tensor, within: Tensor) -> None:
    """Move scale and zero of a group to where the error is smallest, in the rows where that is a
    gain after rounding to bfloat16. values, slope [group_size, rows]: see descend."""
    q = grid.q[group]
    scale = grid.scale[group]
    zero = grid.zero[group]
    # two linear equations for the steps of scale and zero
    of_q = within @ q  # (group_size, rows)
    a = (of_q * q).sum(0)
    b = of_q.sum(0)
    c = within.sum()
    for_scale = (slope * q).sum(0)
    for_zero = slope.sum(0)
    step = (for_scale * c - for_zero * b) / (a * c - b * b)
    new_scale = (scale + step).bfloat16().float()
    step = (for_zero - (new_scale - scale) * b) / c  # the best one beside the rounded scale
    new_zero = (zero + step).bfloat16().float()
    change = torch.addcmul(new_zero, q, new_scale) - values
    gain = (2 * slope - within @ change) * change
    better = (gain.sum(0) > 0) & (new_scale > 0)  # NaN, where all q are alike, is not
    scale[better] = new_scale[better]
    zero[better] = new_zero[better]
    values.copy_(torch.addcmul(zero, q, scale))
