"""Caches of which layers with a sliding window keep the last tokens only."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model import MAX_DECODE_TOKENS, KVCache, LayerCache, Places, Positions


class Ring(Places):
    """The last S tokens of each row, position p at place p % S: enough for a layer with a window.

    While T tokens are written, the first of them still sees window - 1 before it, so S is at
    least window + T - 1. As it is window + MAX_DECODE_TOKENS, a row may also go back over as many
    tokens, proposals that were wrong: what they were written over, nobody sees from there on."""

    ring = True

    def of(self, index: Tensor) -> Tensor:
        return index % self.S

    def update(
        self, cache: LayerCache, k: Tensor, v: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        index = positions.index
        if not positions.prefill:
            cache.write(k, v, self.of(index))
            keys, values = cache.read(self.S, k.dtype)
            return keys, values, self.held(index[:, -1:])

        keys, values, key_pos = k, v, index
        if cache.kv.dtype != k.dtype:  # as the ring will have them, however much is read at once
            keys, values = cache.unpack(cache.pack(k, v), k.dtype)
        if positions.cached > 0:  # behind the ring as it is
            before = cache.read(self.S, k.dtype)
            keys, values = (torch.cat(both, 2) for both in zip(before, (keys, values)))
            key_pos = torch.cat([self.held(index[:, :1] - 1), index], 1)  # (B, S + T)
        last = index[:, -1] if positions.last is None else positions.last
        self.write_last(cache, k, v, index[:, :1], last[:, None])
        return keys, values, key_pos

    def held(self, last: Tensor) -> Tensor:
        """Which positions lie at the places of rows whose last token stands at last [B, 1]: [B, S].
        Where there is none yet, one that no query reaches."""
        position = self.newest(last)
        return position.masked_fill(position < 0, torch.iinfo(position.dtype).max)

    def newest(self, last: Tensor) -> Tensor:
        """The last positions up to last [B, 1] that fall on each place, [B, S]; below 0: none."""
        place = torch.arange(self.S, device=last.device)
        return last - (last - place) % self.S

    def write_last(
        self, cache: LayerCache, k: Tensor, v: Tensor, first: Tensor, last: Tensor
    ) -> None:
        """Put what counts of k, v [B, Hkv, T, D], at positions first to last [B, 1], into the
        ring: each place takes the last token that falls on it, or keeps its own."""
        token = self.newest(last) - first  # (B, S)
        row = torch.arange(len(token), device=token.device)[:, None]  # (B, 1)
        for tensor, new in zip(cache.tensors, cache.pack(k, v)):
            own = tensor.movedim((1, 3), (0, 1))  # (B, S, 2, Hkv, ...)
            taken = new[:, row, :, token.clamp(min=0)]  # the same
            is_new = (token >= 0).view(*token.shape, *[1] * (own.dim() - 2))
            own.copy_(torch.where(is_new, taken, own))


class RingKVCache(KVCache):
    """A KVCache whose layers with a window are rings of MAX_DECODE_TOKENS places more than the
    largest window, if that is less than max_seq_len. Rows can then not go back to any earlier
    token: see keeps. windows: for each layer the tokens that its queries see, or None for all."""

    def __init__(self, *shape: int, windows: Sequence[int | None], **options: Any):
        self.windows = tuple(windows)
        self.ring_len = max(window or 0 for window in windows) + MAX_DECODE_TOKENS
        super().__init__(*shape, **options)
        # [B]: how far each row was written since it was last empty
        self.written = torch.zeros(self.max_batch_size, dtype=torch.int32, device=self.device)

    def places(self, n_layer: int) -> list[Places]:
        whole = Places(self.max_seq_len)
        if self.ring_len >= self.max_seq_len:
            return [whole] * n_layer
        ring = Ring(self.ring_len)
        return [whole if window is None else ring for window in self.windows]

    def note_written(self, rows: slice, input_pos: Tensor, n: Tensor | int) -> None:
        end = input_pos + n
        if isinstance(n, Tensor):  # a row whose prompt ended in an earlier chunk gets none
            end = end.masked_fill(n == 0, 0)
        before = self.written[rows].masked_fill(input_pos == 0, 0)
        torch.maximum(before, end, out=self.written[rows])

    def keeps(self, rows: slice, cached: Tensor | int) -> bool:
        """Whether rows still have all that tokens behind their first `cached` ones see. A ring that
        went round has so while no more than MAX_DECODE_TOKENS were written behind those."""
        if not any(layer.places.ring for layer in self.whole):
            return True
        written = self.written[rows]
        cached = torch.as_tensor(cached, device=written.device)
        too_far = written > cached + MAX_DECODE_TOKENS
        lost = (written > self.ring_len) & too_far & (cached > 0)
        return not bool(lost.any())

    def refuse_lost(self, rows: slice, cached: Tensor | int) -> None:
        """It waits for the device."""
        if not self.keeps(rows, cached):
            raise ValueError(
                f"a row cannot go on behind its first {int(torch.as_tensor(cached).min())} tokens: "
                "it went further since, and layers with a sliding window or a state have let go "
                "of them; read the text again from its beginning, or, where there are windows "
                "alone, set up the cache with rings=False"
            )
