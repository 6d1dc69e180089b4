"""The static KV cache: keys and values of all layers, in the formats that layers may have.

A layer's cache has three methods: write, read and flash_decode (append and attend). Its format is
its own business: floating point or int8, all tokens or, of a layer with a sliding window, a ring
of the last ones. A program without a model of ours can use it too: see examples/whisper.py."""
from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import flash_decode, quantize_kv, triton

MAX_DECODE_TOKENS = 16  # queries per row that one decode attention call takes

# --- the cache of a layer ---


class Positions(NamedTuple):
    """What a layer needs to know of where its tokens stand."""

    input_pos: Tensor  # [B] int32: tokens of each row that are cached already
    index: Tensor  # [B, T] int64: the position of each new token
    start: int | None  # prefill: the largest input_pos; decode: None, as no length is on the host
    alibi_slopes: Tensor | None  # [Hq] float32, or None
    cos: Tensor | None = None  # [B, T, 1, D] float32, or None in a layer without rope
    sin: Tensor | None = None  # the same of its sine
    last: Tensor | None = None  # [B] int64: of each row's last token; None: no row has padding


class LayerCache:
    """The keys and values of one layer for some rows: views into a KVCache.

    kv [2, B, Hkv, S, D], position p at place p. Both come out of one tensor, since torch.compile
    would copy two inputs that share memory. A subclass has another format (pack, unpack and
    flash_decode), or other places (update and flash_decode)."""

    def __init__(self, kv: Tensor, flash: bool):
        self.kv = kv
        self.tensors = [kv]  # what pack makes and unpack takes: [2, B, Hkv, S, ...] each
        self.flash = flash  # how decode attends: flash_decode, or SDPA over the whole cache

    def pack(self, k: Tensor, v: Tensor) -> list[Tensor]:
        """k, v [B, Hkv, T, D] in the cache's format: [2, B, Hkv, T, ...] each."""
        return [torch.stack((k, v))]

    def unpack(self, tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, T, D] of what pack made."""
        keys, values = tensors[0].unbind(0)
        return keys, values

    def write(self, k: Tensor, v: Tensor, place: Tensor) -> None:
        """Put k, v [B, Hkv, T, D] to the places [B, T] of their rows."""
        row = row_numbers(place)
        for held, new in zip(self.tensors, self.pack(k, v)):
            held[:, row, :, place] = new.movedim((1, 3), (0, 1))  # (B, T, 2, Hkv, ...)

    def read(self, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys and values at the first `end` places of every row, [B, Hkv, end, D] each."""
        return self.unpack([held[:, :, :, :end] for held in self.tensors], dtype)

    def update(
        self, k: Tensor, v: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Put the new tokens' k, v [B, Hkv, T, D] into the cache -> the keys and values that they
        attend to, [B, Hkv, S, D] each, and at which positions these stand, [B or 1, S]; positions
        that no new token sees may be among them."""
        self.write(k, v, positions.index)
        if positions.start == 0:  # a prompt from its beginning needs nothing of the cache
            return k, v, positions.index
        if positions.start is None:  # decode does not know the lengths: it reads everything
            end = self.kv.shape[3]
        else:
            end = positions.start + k.shape[2]
        keys, values = self.read(end, k.dtype)
        return keys, values, torch.arange(end, device=k.device)[None]

    def flash_decode(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, input_pos: Tensor, **options: Any
    ) -> Tensor:
        """Append k, v [B, Hkv, T, D] at input_pos [B] and attend with q [B, Hq, T, D].

        kernels.flash_decode says what the options are, and what a call without k and v is."""
        if compiles_lengths() and fits_into_graph(q, k, options):
            return self.decode_in_graph(q, k, v, input_pos, options.get("scale"))
        keys, values = self.kv.unbind(0)
        return flash_decode(q, keys, values, input_pos, k, v, **options)

    def decode_in_graph(
        self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, scale: float | None
    ) -> Tensor:
        """The same for one token of one row, by operators that the compiler knows: it calls them
        without any Python, where flash_decode's takes as long as the attention."""
        n = input_pos.item()  # a symbol in the graph
        if torch.compiler.is_compiling():
            torch._check(n >= 0)
            torch._check(n < self.kv.shape[3])
        self.write(k, v, input_pos.long()[:, None])
        keys, values = self.read(n + 1, q.dtype)  # (1, Hkv, n + 1, D) each
        # a KV head's query heads ride along as query rows, so that no key is repeated
        folded = q.reshape(1, k.shape[1], -1, q.shape[3])  # (1, Hkv, Hq / Hkv, D)
        y, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            folded, keys, values, scale=scale
        )
        return y.reshape(q.shape)


class Int8LayerCache(LayerCache):
    """The same in int8, with a float32 scale per token and head: scale [2, B, Hkv, S].

    k_mean [Hkv, 1, D] is subtracted from every key: that shifts all scores of a query alike, which
    softmax does not notice. (It would under a softcap or with sinks; there it has to be zeros.)"""

    def __init__(self, kv: Tensor, scale: Tensor, k_mean: Tensor, flash: bool):
        super().__init__(kv, flash)
        self.scale = scale
        self.tensors = [kv, scale]
        self.k_mean = k_mean

    def pack(self, k: Tensor, v: Tensor) -> list[Tensor]:
        return list(quantize_kv(torch.stack((self.centred(k), v))))

    def unpack(self, tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        values, scale = tensors
        keys, values = (values * scale[..., None]).to(dtype).unbind(0)
        return keys, values

    def flash_decode(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, input_pos: Tensor, **options: Any
    ) -> Tensor:
        keys, values = self.kv.unbind(0)
        k_scale, v_scale = self.scale.unbind(0)
        if k is not None:
            k = self.centred(k)
        return flash_decode(
            q, keys, values, input_pos, k, v, k_scale=k_scale, v_scale=v_scale, **options
        )

    def centred(self, k: Tensor) -> Tensor:
        return (k - self.k_mean).to(k.dtype)


def compiles_lengths() -> bool:
    """Whether torch.compile is at work, with the switch that makes a length a symbol: without it
    every length would be compiled for itself. compile_model sets it."""
    return torch.compiler.is_compiling() and torch._dynamo.config.capture_scalar_outputs


def fits_into_graph(q: Tensor, k: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether a step can take decode_in_graph: on a CPU one token of one row, so that there is one
    length, and of the options none but scale."""
    one_token = len(q) == 1 and q.shape[2] == 1 and k is not None
    others = [value for name, value in options.items() if name != "scale"]
    return q.is_cpu and one_token and all(value is None for value in others)


class RingLayerCache(LayerCache):
    """The last S tokens of each row, position p at place p % S: enough for a layer with a window.

    While T tokens are written, the first of them still sees window - 1 before it, so S is at
    least window + T - 1. As it is window + MAX_DECODE_TOKENS, a row may also go back over as many
    tokens, proposals that were wrong: what they were written over, nobody sees from there on."""

    def update(
        self, k: Tensor, v: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        index = positions.index
        S = self.kv.shape[3]
        if positions.start is None:
            self.write(k, v, index % S)
            keys, values = self.read(S, k.dtype)
            return keys, values, self.held(index[:, -1:])

        keys, values, key_pos = k, v, index
        if positions.start > 0:  # the ring as it is, and then the new tokens as it will have them
            before = self.read(S, k.dtype)
            new = self.unpack(self.pack(k, v), k.dtype)
            keys, values = (torch.cat(both, 2) for both in zip(before, new))
            key_pos = torch.cat([self.held(index[:, :1] - 1), index], 1)  # (B, S + T)
        last = index[:, -1] if positions.last is None else positions.last
        self.write_last(k, v, index[:, :1], last[:, None])
        return keys, values, key_pos

    def held(self, last: Tensor) -> Tensor:
        """Which positions lie at the places of rows whose last token stands at last [B, 1]: [B, S].
        Where there is none yet, one that no query reaches."""
        position = self.newest(last)
        return position.masked_fill(position < 0, torch.iinfo(position.dtype).max)

    def newest(self, last: Tensor) -> Tensor:
        """The last positions up to last [B, 1] that fall on each place, [B, S]; below 0: none."""
        place = torch.arange(self.kv.shape[3], device=last.device)
        return last - (last - place) % len(place)

    def write_last(self, k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> None:
        """Put what counts of k, v [B, Hkv, T, D], at positions first to last [B, 1], into the
        ring: each place takes the last token that falls on it, or keeps its own."""
        token = self.newest(last) - first  # (B, S)
        row = row_numbers(token)
        for tensor, new in zip(self.tensors, self.pack(k, v)):
            own = tensor.movedim((1, 3), (0, 1))  # (B, S, 2, Hkv, ...)
            taken = new[:, row, :, token.clamp(min=0)]  # the same
            is_new = (token >= 0).view(*token.shape, *[1] * (own.dim() - 2))
            own.copy_(torch.where(is_new, taken, own))

    def flash_decode(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, input_pos: Tensor, **options: Any
    ) -> Tensor:
        return super().flash_decode(q, k, v, input_pos, ring=True, **options)


class Int8RingLayerCache(RingLayerCache, Int8LayerCache):
    """A ring in int8."""


def row_numbers(index: Tensor) -> Tensor:
    return torch.arange(len(index), device=index.device)[:, None]  # (B, 1)

# --- the cache of all layers ---


class Storage:
    """One static allocation for layers with S places a row.

    kv [n_layer, 2, B, Hkv, S, D]; for int8 also scale [n_layer, 2, B, Hkv, S] float32, whose heads
    each start at 16 bytes, otherwise None."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str):
        *heads, S, _ = shape
        self.token_bytes = storage_bytes(shape, dtype) / (shape[2] * S)  # of a row's token
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.scale = None
        if dtype == torch.int8:
            # torch.compile copies an input that does not start at 16 bytes, to and back, each step
            self.scale = torch.zeros(*heads, aligned(S), device=device)[..., :S]

    def copy_row(self, source: int, target: int, length: int) -> None:
        for tensor in (self.kv, self.scale):
            if tensor is not None:
                tensor[:, :, target, :, :length] = tensor[:, :, source, :, :length]


def aligned(n: int) -> int:
    """n float32 numbers, and as many more as fill up the last 16 bytes: how many that is."""
    return 4 * math.ceil(n / 4)


def storage_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Of a Storage."""
    *heads, S, _ = shape
    nbytes = math.prod(shape) * dtype.itemsize
    if dtype == torch.int8:
        nbytes += math.prod(heads) * aligned(S) * torch.float32.itemsize
    return nbytes


class KVCache:
    """Keys and values of all layers in one or two static allocations.

    kv [n_layer, 2, B, Hkv, S, D], S = max_seq_len; of an int8 cache also scale
    [n_layer, 2, B, Hkv, S] float32 and k_mean [n_layer, Hkv, 1, D] float32. attention says how
    decode attends: "flash", "math" or "auto".

    windows: for each layer the tokens that its queries see, or None for all. Layers with a window
    are not in kv, but in ring.kv with MAX_DECODE_TOKENS places more than the largest window, if
    that is less than max_seq_len. Rows can then not go back to any earlier token: see intact.

    nbytes: of what is allocated for tokens.
    It takes plain numbers, so that a program without a ModelConfig can use it.
    ValueError if the device has not the memory."""

    def __init__(
        self, n_layer: int, n_kv_head: int, head_dim: int, max_batch_size: int, max_seq_len: int, *,
        dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu",
        attention: str = "auto", windows: Sequence[int | None] | None = None,
    ):
        if min(max_batch_size, max_seq_len) < 1:
            raise ValueError(f"a KV cache of {max_batch_size} x {max_seq_len} tokens holds none")
        if dtype != torch.int8 and not getattr(dtype, "is_floating_point", False):
            raise ValueError(f"a KV cache has a floating-point dtype or torch.int8, not {dtype}")
        self.max_batch_size = max_batch_size
        self.max_seq_len = max_seq_len
        self.dtype = dtype
        self.attention = choose_attention(attention, torch.device(device), max_seq_len)
        self.may_grow = False  # made to fit one call of generate, which may make a larger one

        # which layers are rings, and of how many places
        windows = windows or [None] * n_layer
        self.windows = tuple(windows)
        self.window = max([window for window in windows if window is not None], default=max_seq_len)
        self.ring_len = self.window + MAX_DECODE_TOKENS
        pays = self.ring_len < max_seq_len
        self.is_ring = [pays and window is not None for window in windows]
        n_ring = self.is_ring.count(True)

        row = (2, max_batch_size, n_kv_head)
        full = (n_layer - n_ring, *row, max_seq_len, head_dim)
        ring = (n_ring, *row, self.ring_len, head_dim)
        self.nbytes = storage_bytes(full, dtype) + storage_bytes(ring, dtype)
        require_memory(
            self.nbytes, device, f"a KV cache of {max_batch_size} x {max_seq_len} tokens",
            "lower --max_seq_len or --batch_size, or take --kv_dtype int8",
        )
        self.full = Storage(full, dtype, device)
        self.ring = Storage(ring, dtype, device) if n_ring else None
        self.k_mean = None
        if dtype == torch.int8:
            self.k_mean = torch.zeros(n_layer, n_kv_head, 1, head_dim, device=device)
        # [B]: how far each row was written since it was last empty
        self.written = torch.zeros(max_batch_size, dtype=torch.int32, device=device)
        self.views: dict[tuple[int, int], list[LayerCache]] = {}
        self.held = [0] * max_batch_size  # tokens of each row, as far as the host knows

    @property
    def kv(self) -> Tensor:
        """Of the layers that are no rings."""
        return self.full.kv

    @property
    def scale(self) -> Tensor | None:
        return self.full.scale

    def layers(self, rows: slice) -> list[LayerCache]:
        """Each layer's cache of those rows, made once: the storage never moves."""
        key = (rows.start, rows.stop)
        if key not in self.views:
            self.views[key] = list(self.make_layers(rows))
        return self.views[key]

    def make_layers(self, rows: slice) -> Iterator[LayerCache]:
        flash = self.attention == "flash"
        for layer, is_ring in enumerate(self.is_ring):
            storage = self.ring if is_ring else self.full
            i = self.is_ring[:layer].count(is_ring)
            kv = storage.kv[i, :, rows]  # (2, B, Hkv, S, D)
            if storage.scale is None:
                kind = RingLayerCache if is_ring else LayerCache
                yield kind(kv, flash)
            else:
                kind = Int8RingLayerCache if is_ring else Int8LayerCache
                yield kind(kv, storage.scale[i, :, rows], self.k_mean[layer], flash)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Give a row what another one holds in its first `length` positions."""
        self.full.copy_row(source, target, length)
        if self.ring is not None:
            self.ring.copy_row(source, target, self.ring_len)
        self.written[target] = self.written[source]
        self.held[target] = length

    def note_written(self, rows: slice, input_pos: Tensor, n: Tensor | int) -> None:
        """Rows are given n tokens, [B] or as many for each, behind input_pos [B]."""
        if self.ring is None:
            return
        end = input_pos + n
        if isinstance(n, Tensor):  # a row whose prompt ended in an earlier chunk gets none
            end = end.masked_fill(n == 0, 0)
        before = self.written[rows].masked_fill(input_pos == 0, 0)
        torch.maximum(before, end, out=self.written[rows])

    def goes_round(self, length: int) -> bool:
        """Whether a row of that length has let go of its first tokens in some layer."""
        return self.ring is not None and length > self.ring_len

    def refuse_lost(self, rows: slice, cached: Tensor | int) -> None:
        """ValueError if rows no longer have all that tokens behind their first `cached` ones see,
        an int or [B]. It waits for the device."""
        if not self.intact(rows, cached):
            raise ValueError(
                f"a row cannot go on behind its first {int(torch.as_tensor(cached).min())} tokens: "
                "it went further since, and layers with a sliding window have let go of them; read "
                "the text again from its beginning, or set up the cache with rings=False"
            )

    def intact(self, rows: slice, cached: Tensor | int) -> bool:
        """Whether rows still have all that tokens behind their first `cached` ones see. A ring
        that went round has so while no more than MAX_DECODE_TOKENS were written behind those."""
        if self.ring is None:
            return True
        written = self.written[rows]
        cached = torch.as_tensor(cached, device=written.device)
        too_far = written > cached + MAX_DECODE_TOKENS
        lost = (written > self.ring_len) & too_far & (cached > 0)
        return not bool(lost.any())

    def bytes_read(self, length: float) -> float:
        """Bytes of the cache that a step reads for a row of that length."""
        nbytes = length * self.full.token_bytes
        if self.ring is not None:
            nbytes += min(length, self.window) * self.ring.token_bytes
        return nbytes


def choose_attention(attention: str, device: torch.device, max_seq_len: int) -> str:
    """"flash" or "math" as asked; "auto" takes what works on the device, and on a CPU what was
    measured faster there at any size of cache: flash, which reads live tokens only."""
    if attention not in ("auto", "flash", "math"):
        raise ValueError(f"no attention {attention!r}; there are auto, flash and math")
    if attention != "auto":
        return attention
    if device.type == "cpu":
        return "flash"
    # a guess, not measured on a GPU: math is plain PyTorch, but reads all the room each step
    small = max_seq_len <= 1024
    return "math" if small or triton is None else "flash"


def require_memory(nbytes: float, device: torch.device | str, what: str, advice: str) -> None:
    """ValueError if a device has not this many bytes free, as far as that is known."""
    free = nbytes
    meminfo = Path("/proc/meminfo")
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
    elif meminfo.exists():
        available = re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())
        free = 1024 * int(available[1])
    if nbytes > free:
        raise ValueError(
            f"{what} needs {nbytes / 1e9:.1f} GB but {device} has {free / 1e9:.1f} GB free; "
            f"{advice}"
        )
