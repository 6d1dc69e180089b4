"""Rounding by what a text shows: weights that change least what the layers give on it.

The nearest integers are the best ones where inputs are independent of each other. Where they are
not, the error at one input can be made up for at others. Three steps do that, from the grid of the
plain rounding, for the error e H e^T of a row's weights with the second moments H of the inputs:

1. GPTQ (arXiv 2210.17323): one input after the other is rounded, those with the largest moments
   first, and all that are left move so that the error is smallest (round_in_order).
2. Coordinate descent (as QuantEase's, arXiv 2309.01885): each weight goes to its best integer while
   the others stay (improve).
3. After each group of that, its scale and zero become the best ones (fit_lines).

The text goes through the model block by block while it is loaded. A block's moments are those of
its dense layers behind the quantized blocks before it; so that there is one dense block at a time.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from model import KVCache, Transformer
from quantize import (
    MODES, Int4Linear, Linear, QuantizedLinear, pack_nibbles, quantize_linear, say_once,
    unpack_nibbles,
)

PIECE = 512  # tokens that are read at a time
MOST_PIECES = 128  # of longer texts so many are taken, spread over all of it
LEAST_TOKENS = 128
ROWS = 8  # pieces that go through a block together
# of the mean moment, added to all: with 1% and with 10% the error on other texts was larger
DAMPING = 0.03
SWEEPS = 2  # of coordinate descent; further ones change little
CHUNK = 4096  # rows of a weight that are rounded together
BLOCK = 64  # inputs whose errors reach the others at once


class Calibration:
    """Takes the linear layers of a model while it is loaded, and quantizes them a block at a time.

    hidden [pieces, T, dim] is the text between two blocks."""

    def __init__(self, model: Transformer, ids: Sequence[int], mode: str, group_size: int) -> None:
        """ValueError: too few ids, some outside the vocabulary, or no such mode."""
        if mode not in ("int8", "int4"):
            raise ValueError(f"calibrating goes with quantize int8 or int4, not {mode!r}")
        ids = torch.as_tensor(ids).flatten().long()
        if len(ids) < LEAST_TOKENS:
            raise ValueError(
                f"calibrating takes a text of at least {LEAST_TOKENS} tokens, not {len(ids)}"
            )
        vocab_size = model.config.vocab_size
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(f"the text to calibrate with has tokens beyond the {vocab_size}")
        T = min(PIECE, len(ids), model.config.max_seq_len)
        pieces = ids[:len(ids) // T * T].view(-1, T)
        if len(pieces) > MOST_PIECES:
            pieces = pieces[torch.linspace(0, len(pieces) - 1, MOST_PIECES).long()]
        self.model, self.pieces = model, pieces
        self.mode, self.group_size = mode, group_size
        self.waiting: dict[str, Linear] = {}  # dense layers of the block that is read now, by name
        self.block = -1  # its number
        self.seen, self.unseen = 0, 0  # layers that the text reaches, and others
        self.hidden: Tensor | None = None

    def take(self, name: str, layer: Linear) -> None:
        """A layer that has been read, in the order of the model: blocks, and lm_head at last."""
        number = int(name.split(".")[1]) if name.startswith("layers.") else -1
        if number != self.block:
            self.finish_block()
            self.block = number
        self.waiting[name] = layer
        if name == "lm_head":
            self.quantize(lambda: [layer(self.model.norm(x)) for x in self.hidden.split(ROWS)])
            self.say_unseen()

    def finish_block(self) -> None:
        """Quantize the layers that wait, and let the text pass the block as it is then."""
        if self.hidden is None:
            self.prepare()
        if self.block < 0:
            return
        run = partial(self.run, self.model.layers[self.block])
        self.quantize(run)
        self.hidden = run()

    def prepare(self) -> None:
        """The text before the first block, and room for a layer's keys and values."""
        model, config = self.model, self.model.config
        T = self.pieces.shape[1]
        self.hidden = torch.cat([model.embed(x.to(model.device)) for x in self.pieces.split(ROWS)])
        self.cache = KVCache(
            1, config.n_kv_head, config.head_dim, ROWS, T, dtype=model.dtype, device=model.device
        )

    def run(self, block: nn.Module) -> Tensor:
        """hidden behind the block."""
        after = []
        for x in self.hidden.split(ROWS):
            B, T, _ = x.shape
            input_pos = torch.zeros(B, dtype=torch.int32, device=x.device)
            where = self.model.positions(input_pos, T, self.cache, cached=0, even=True)
            [cache] = self.cache.layers(slice(0, B))
            after.append(block(x, where[self.block], cache))
        return torch.cat(after)

    def quantize(self, run: Callable[[], object]) -> None:
        """Quantize the layers that wait by the inputs that they get in run()."""
        moments = second_moments(self.waiting, run)
        for name, linear in self.waiting.items():
            layer = quantize_linear(linear, self.mode, self.group_size, name)
            moment = moments.pop(name, None)
            seen = moment is not None and bool(moment.any())
            self.seen += seen
            self.unseen += not seen
            if seen and isinstance(layer, QuantizedLinear):
                round_by(layer, linear.weight, moment, name)
            self.model.set_submodule(name, layer.pack())
        self.waiting = {}

    def say_unseen(self) -> None:
        if self.unseen:
            say_once(
                f"note: the text to calibrate with reaches {self.seen} of "
                f"{self.seen + self.unseen} layers; the others, of experts, are rounded without it"
            )


def second_moments(layers: dict[str, Linear], run: Callable[[], object]) -> dict[str, Tensor]:
    """x.T @ x of all inputs x [tokens, K] that layers get in run(), [K, K] float32 each. A layer
    without inputs has no entry."""
    moments = {}

    def add(name: str, layer: Linear, inputs: tuple[Tensor]) -> None:
        x = inputs[0].reshape(-1, layer.in_features).float()
        if name not in moments:
            moments[name] = x.new_zeros(layer.in_features, layer.in_features)
        moments[name].addmm_(x.T, x)

    hooks = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
    run()
    for hook in hooks:
        hook.remove()
    return moments

# --- rounding ---


class Grid(NamedTuple):
    """Some rows of a quantized layer, transposed: value k of a row is q[k] * scale[k // size] +
    zero[k // size], in float32."""

    q: Tensor  # [K, rows]
    scale: Tensor  # [groups, rows]
    zero: Tensor  # [groups, rows]; of int8 zeros
    size: int  # of a group
    low: int
    high: int

    def nearest(self, k: int, x: Tensor) -> Tensor:
        """Put the integers nearest to x [rows] into q[k] -> the values that they stand for."""
        scale, zero = self.scale[k // self.size], self.zero[k // self.size]
        torch.div(x - zero, scale.clamp_min(1e-30), out=self.q[k])
        q = self.q[k].round_().clamp_(self.low, self.high)
        return torch.addcmul(zero, q, scale)

    def values(self) -> Tensor:
        """What all of it stands for, [K, rows]."""
        q = self.q.view(len(self.scale), self.size, -1)
        return (q * self.scale[:, None] + self.zero[:, None]).flatten(0, 1)


def grid_of(layer: QuantizedLinear, rows: slice) -> Grid:
    if isinstance(layer, Int4Linear):
        q = unpack_nibbles(layer.weight[rows]).float() - 8
        scale, zero = layer.scales[rows].float(), layer.zeros[rows].float()
        return Grid(*[x.T.contiguous() for x in (q, scale, zero)], layer.group_size, -8, 7)
    scale = layer.scales[rows].float()[None]
    q = layer.weight[rows].float().T.contiguous()
    return Grid(q, scale, torch.zeros_like(scale), len(q), -127, 127)


def put_grid(layer: QuantizedLinear, rows: slice, grid: Grid) -> None:
    if isinstance(layer, Int4Linear):
        layer.weight[rows] = pack_nibbles((grid.q.T + 8).to(torch.uint8))
        layer.zeros[rows] = grid.zero.T
        layer.scales[rows] = grid.scale.T
    else:
        layer.weight[rows] = grid.q.T.to(torch.int8)


def round_by(layer: QuantizedLinear, weight: Tensor, moment: Tensor, name: str) -> None:
    """Round a layer that quantize_linear made of weight [N, K] again, by the second moments of its
    inputs, which are damped in place. layer.error becomes the relative error of its outputs.
    ValueError: the moments are not finite."""
    mean = moment.diagonal().mean()
    if not mean.isfinite():
        raise ValueError(f"the inputs of {name} are not finite: take another --dtype")
    moment.diagonal().add_(DAMPING * mean)
    order = moment.diagonal().argsort(descending=True)
    # upper, and its transpose times itself is the inverse of the moments in that order
    flipped = moment[order][:, order].flip(0, 1)
    factor = torch.linalg.cholesky(flipped).flip(0, 1)
    factor = torch.linalg.solve_triangular(factor, torch.eye(len(order)).to(factor), upper=True)
    error, size = 0.0, 0.0
    for start in range(0, len(weight), CHUNK):
        rows = slice(start, start + CHUNK)
        w = weight[rows].float().T.contiguous()  # (K, rows)
        grid = grid_of(layer, rows)
        round_in_order(w, grid, factor, order)
        for _ in range(SWEEPS):
            improve(w, grid, moment)
        put_grid(layer, rows, grid)
        off = w - grid.values()
        error += float((moment @ off).mul_(off).sum())
        size += float((moment @ w).mul_(w).sum())
    layer.error = (error / max(size, 1e-30)) ** 0.5


def round_in_order(w: Tensor, grid: Grid, factor: Tensor, order: Tensor) -> None:
    """GPTQ: round the inputs of w [K, rows] in this order [K]. After each the weights of those to
    come move by what its error is worth there, which is a row of factor [K, K]."""
    left = w[order]
    for block in torch.arange(len(w)).split(BLOCK):
        start, stop = int(block[0]), int(block[-1]) + 1
        errors = torch.empty_like(left[start:stop])
        for j, k in zip(range(start, stop), order[start:stop].tolist()):
            error = (left[j] - grid.nearest(k, left[j])) / factor[j, j]
            left[j:stop].addr_(factor[j, j:stop], error, alpha=-1)
            errors[j - start] = error
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)


def improve(w: Tensor, grid: Grid, moment: Tensor) -> None:
    """Coordinate descent: every weight of w [K, rows] takes its best integer given all others, and
    every group of int4 then its best line."""
    values = grid.values()
    for block in torch.arange(len(w)).split(min(grid.size, 2 * BLOCK)):
        start, stop = int(block[0]), int(block[-1]) + 1
        within = moment[start:stop, start:stop]
        slope = moment[start:stop] @ (w - values)  # (block, rows): down to a smaller error
        for j, k in enumerate(range(start, stop)):
            old = values[k].clone()
            values[k] = grid.nearest(k, old + slope[j] / within[j, j])
            slope.addr_(within[j], values[k] - old, alpha=-1)
        if grid.high == 7:
            fit_lines(grid, start // grid.size, values[start:stop], slope, within)


def fit_lines(grid: Grid, group: int, values: Tensor, slope: Tensor, within: Tensor) -> None:
    """Move a group's scale and zero to where the error is smallest, rounded to bfloat16, in rows
    where that makes it smaller. values and slope [size, rows] are those of the group, of values
    new ones are put there; within [size, size]: its moments."""
    q = grid.q[group * grid.size:][:grid.size]
    scale, zero = grid.scale[group], grid.zero[group]  # (rows)
    # two equations for the steps of scale and zero
    of_q = within @ q  # (size, rows)
    a, b, c = (of_q * q).sum(0), of_q.sum(0), within.sum()
    down_scale, down_zero = (slope * q).sum(0), slope.sum(0)
    step = (down_scale * c - down_zero * b) / (a * c - b * b)
    new_scale = (scale + step).bfloat16().float()
    step = (down_zero - (new_scale - scale) * b) / c  # the best one for the rounded scale
    new_zero = (zero + step).bfloat16().float()
    change = torch.addcmul(new_zero, q, new_scale) - values
    gain = (2 * slope - within @ change).mul_(change).sum(0)
    better = (gain > 0) & (new_scale > 0)  # not where they have no solution: it is NaN
    scale.copy_(torch.where(better, new_scale, scale))
    zero.copy_(torch.where(better, new_zero, zero))
    values.add_(torch.where(better, change, 0))
