"""Decode attention: a few new tokens of each row attend to all that is cached before them, at a
cost that follows the tokens cached, not the room allocated for them.

    out = flash_decode(q, k_cache, v_cache, cache_seqlens, k, v)

To lift it, copy this file: it needs torch and triton only, and without a GPU or Triton it runs in
PyTorch. It works under torch.compile and in CUDA graphs. flash_decode's docstring is the contract;
flash_decode_reference, after it, says in float32 what is right.

Such a step reads every live key and value once and does next to no arithmetic with them:
B * Hkv * len * D * 2 * itemsize bytes a layer, 134 MB for Llama-3-8B at 32k tokens. Reading them at
the memory's full speed takes every SM, and at batch 1 there are far fewer heads than SMs, so the
live length itself is split. `python kernels.py --report [sm_90 ...]` shows what is compiled."""
from __future__ import annotations  # Triton reads the kernels' annotations, and may be absent

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:
    triton = None

    def jit(fn: Callable | None = None, **_: Any) -> Callable:
        return fn or jit

# --- the contract ---


def flash_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor,
    k: Tensor | None = None, v: Tensor | None = None, *,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    scale: float | None = None, causal: bool = True, window: int | None = None,
    softcap: float | None = None, alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None, ring: bool = False, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of T new tokens a row to that row's cached tokens, appending the new ones to the
    cache on the way.

    q [B, Hq, T, D]: T 1 to 16, Hq a multiple of Hkv, D a multiple of 8 up to 256; bf16, fp16, fp32
    k_cache, v_cache [B, Hkv, S, D]: of q's dtype, or int8 with k_scale, v_scale [B, Hkv, S] float32
        (see quantize_kv); any strides with the last one 1
    cache_seqlens [B] int32: tokens cached before the call; what lies beyond them is never read and
        may be NaN
    k, v [B, Hkv, T, D]: written into the cache at cache_seqlens[b] + t, which must be below S, and
        attended to: query t sees positions 0 ... cache_seqlens[b] + t. Without them the queries are
        the last T of the cached positions, or, with causal=False, see them all (cross-attention)
    scale multiplies the scores, by default 1/sqrt(D). softcap c: c * tanh(score / c)
    alibi_slopes [Hq]: minus slope * |query position - key position|
    window w: a query sees w tokens, itself included
    sinks [Hq]: a logit per head that only the softmax's denominator sees
    ring: the caches hold the last S positions, position p at place p % S, so that cache_seqlens may
        exceed S. It needs a window, and S at least window + T - 1
    In CUDA graphs: call it once before capturing, which compiles; what is captured may be replayed
        on any streams
    Returns [B, Hq, T, D], and with return_lse the log-sum-exp [B, Hq, T] in float32. A query that
    sees nothing gets zeros, and -inf or its sink. Raises ValueError for shapes, dtypes or
    combinations that are none of these."""
    _check(q, k_cache, v_cache, cache_seqlens, k, v, k_scale, v_scale, causal, window, softcap,
           alibi_slopes, sinks, ring)
    return flash_decode_unchecked(
        q, k_cache, v_cache, cache_seqlens, k, v, k_scale=k_scale, v_scale=v_scale, scale=scale,
        causal=causal, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        ring=ring, return_lse=return_lse)

# --- the reference ---


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] -> int8 of that shape and a float32 scale per vector [...]:
    scale = max|x| / 127, value = x / scale."""
    # times 1 / 127, to which PyTorch turns a division by a number on a GPU, and nowhere else
    scale = x.abs().amax(-1, keepdim=True).float() * (1 / 127)  # (..., 1)
    values = torch.round(x / scale.clamp_min(1e-30))
    return values.to(torch.int8), scale.squeeze(-1)


def flash_decode_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor,
    k: Tensor | None = None, v: Tensor | None = None, *,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    scale: float | None = None, causal: bool = True, window: int | None = None,
    softcap: float | None = None, alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None, ring: bool = False, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of flash_decode, on any device: in float32, over the whole cache."""
    B, Hq, T, D = q.shape
    Hkv, S = k_cache.shape[1:3]
    new_token = torch.arange(T, device=q.device)
    lens = cache_seqlens.long()  # (B,)
    if k is not None:  # append the new tokens at each row's own position
        places = lens[:, None] + new_token  # (B, T)
        if ring:
            places = places % S
        _append_reference(k, k_cache, k_scale, places)
        _append_reference(v, v_cache, v_scale, places)
        lens = lens + T

    # scores of what is live; at a place lies the last position that falls there, below 0: nothing
    last = lens[:, None] - 1
    position = last - (last - torch.arange(S, device=q.device)) % S  # (B, S)
    live = position >= 0
    keys = _read_reference(k_cache, k_scale, live).repeat_interleave(Hq // Hkv, 1)
    values = _read_reference(v_cache, v_scale, live).repeat_interleave(Hq // Hkv, 1)
    scale = D ** -0.5 if scale is None else scale
    scores = q.float() @ keys.transpose(-1, -2) * scale  # (B, Hq, T, S)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    # how far each key lies behind each query; the queries are the last T of the row's positions
    distance = (last + 1 - T + new_token)[..., None] - position[:, None]  # (B, T, S)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None] * distance.abs()[:, None]
    hidden = ~live[:, None, None]  # (B, 1, 1, S)
    if causal:
        hidden = hidden | (distance < 0)[:, None]
    if window is not None:
        hidden = hidden | (distance >= window)[:, None]

    # softmax, its denominator kept as a logarithm
    scores = scores.masked_fill(hidden, -math.inf)
    lse = scores.logsumexp(-1)  # (B, Hq, T)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks[:, None])
    weights = (scores - lse[..., None]).exp().masked_fill(hidden, 0)
    out = (weights @ values).to(q.dtype)  # (B, Hq, T, D)
    return (out, lse) if return_lse else out


def _append_reference(x: Tensor, cache: Tensor, scale: Tensor | None, places: Tensor) -> None:
    """Write x [B, H, T, D] into cache [B, H, S, D] at places [B, T]."""
    row = torch.arange(len(x), device=x.device)[:, None]
    if scale is not None:
        x, x_scale = quantize_kv(x)
        scale[row, :, places] = x_scale.transpose(1, 2)
    cache[row, :, places] = x.transpose(1, 2)


def _read_reference(cache: Tensor, scale: Tensor | None, live: Tensor) -> Tensor:
    """The cache [B, H, S, D] in float32, and zeros where live [B, S] is not."""
    x = cache.float() if scale is None else cache * scale[..., None]
    return torch.where(live[:, None, :, None], x, 0)

# --- the operator ---


def flash_decode_unchecked(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor | int,
    k: Tensor | None = None, v: Tensor | None = None, *,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    scale: float | None = None, causal: bool = True, window: int | None = None,
    softcap: float | None = None, alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None, ring: bool = False, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_decode for a caller who has checked: the model's own cache. What flash_decode would
    refuse is not noticed here."""
    # torch.compile needs the dispatcher, which costs a quarter of a short call on a CPU
    run = torch.ops.gpt_flash.flash_decode
    if not isinstance(cache_seqlens, Tensor):  # the length of all rows, in a graph a symbol
        run = _attend_live
    elif q.is_cpu and not torch.compiler.is_compiling():
        run = _flash_decode_torch
    out, lse = run(q, k_cache, v_cache, cache_seqlens, k, v, k_scale, v_scale, scale, causal,
                   window, softcap, alibi_slopes, sinks, ring)
    return (out, lse.reshape(q.shape[:3])) if return_lse else out


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor,
    k: Tensor | None, v: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
    causal: bool, window: int | None, softcap: float | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, ring: bool,
) -> None:
    """ValueError for what flash_decode does not take."""
    needed = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": cache_seqlens}
    for name, x in needed.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"flash_decode: {name} must be a tensor, got {x!r:.60}")
    if q.dim() != 4 or k_cache.dim() != 4:
        raise ValueError("flash_decode: q must be [B, Hq, T, D] and k_cache [B, Hkv, S, D], "
                         f"got {list(q.shape)} and {list(k_cache.shape)}")
    B, Hq, T, D = q.shape
    _, Hkv, S, _ = k_cache.shape
    device = q.device
    int8 = k_cache.dtype == torch.int8
    problem = None
    if not 1 <= T <= 16:
        problem = f"T must be 1 to 16 tokens, got {T}"
    elif D % 8 or not 8 <= D <= 256:
        problem = f"the head size must be a multiple of 8 up to 256, got {D}"
    elif Hkv < 1 or Hq % Hkv:
        problem = f"query heads must be a multiple of KV heads, got {Hq} and {Hkv}"
    elif (k is None) != (v is None):
        problem = "k and v go together"
    elif (k_scale is None) == int8 or (v_scale is None) == int8:
        problem = "int8 caches, and only they, need k_scale and v_scale"
    elif window is not None and (isinstance(window, float) or window < 1):
        problem = f"window must be at least 1, and whole, got {window}"
    elif window is not None and not causal:
        problem = "window needs causal=True"
    elif ring and (window is None or window + T - 1 > S):
        problem = f"a ring of {S} places needs a window of at most {S - T + 1}, got {window}"
    elif softcap is not None and not 0 < softcap < math.inf:
        problem = f"softcap must be above 0, and finite, got {softcap}"
    if problem:
        raise ValueError(f"flash_decode: {problem}")

    _check_tensor("q", q, q.shape, (torch.bfloat16, torch.float16, torch.float32), device)
    _check_tensor("cache_seqlens", cache_seqlens, (B,), (torch.int32,), device)
    _check_tensor("k_cache", k_cache, (B, Hkv, S, D), (q.dtype, torch.int8), device)
    _check_tensor("v_cache", v_cache, (B, Hkv, S, D), (k_cache.dtype,), device)
    _check_tensor("k", k, (B, Hkv, T, D), (q.dtype,), device)
    _check_tensor("v", v, (B, Hkv, T, D), (q.dtype,), device)
    _check_tensor("alibi_slopes", alibi_slopes, (Hq,), (torch.float32,), device)
    _check_tensor("k_scale", k_scale, (B, Hkv, S), (torch.float32,), device)
    _check_tensor("v_scale", v_scale, (B, Hkv, S), (torch.float32,), device)
    _check_tensor("sinks", sinks, (Hq,), (torch.float32,), device)


def _check_tensor(
    name: str, x: Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """ValueError for an x that is given and is not of that kind."""
    if x is None:
        return
    if getattr(x, "shape", None) != shape or x.dtype not in dtypes or x.device != device:
        wanted = f"{list(shape)} {' or '.join(map(str, dtypes))} on {device}"
        got = f"{list(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else f"{x!r:.60}"
        raise ValueError(f"flash_decode: {name} must be {wanted}, got {got}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"flash_decode: the last dimension of {name} must be contiguous")


def _flash_decode(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if triton and q.is_cuda:
        return _flash_decode_triton(q, *args)
    out, lse = _flash_decode_torch(q, *args)
    return out, lse.reshape(q.shape[:3]).contiguous()


def _flash_decode_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


# In a compiled function take both caches out of one tensor (kv[0], kv[1]): two inputs that share
# memory are copied.
torch.library.define(
    "gpt_flash::flash_decode",
    "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor? k, "
    "Tensor? v, Tensor(c!)? k_scale, Tensor(d!)? v_scale, float? scale, bool causal, int? window, "
    "float? softcap, Tensor? alibi_slopes, Tensor? sinks, bool ring) -> (Tensor, Tensor)")
torch.library.impl("gpt_flash::flash_decode", "default", _flash_decode)
torch.library.register_fake("gpt_flash::flash_decode", _flash_decode_fake)

# --- in PyTorch: the CPU, and wherever Triton is not ---


def _flash_decode_torch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor,
    k: Tensor | None, v: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Reads the lengths on the host and touches only live tokens: all rows at once, or one by one
    where they differ. The log-sum-exp is [B, Hkv, Hq / Hkv * T]: few ask for it."""
    if not len(q):
        return _flash_decode_fake(q)
    lens = cache_seqlens.tolist()
    longest = max(lens)
    new = 0 if k is None else k.shape[2]
    S, T = k_cache.shape[2], q.shape[2]
    _, causal, *_, ring = options
    if min(lens) < 0 or longest + new > S and not ring:
        raise ValueError(f"flash_decode: rows of {min(lens)} to {longest} cached + {new} new "
                         f"tokens do not fit into a cache of {S}")
    if T > 1 and causal:
        # each token alone: among others, its weights would be summed in another order
        parts = []
        before = cache_seqlens if new else cache_seqlens + (1 - T)
        for t in range(T):
            one, k_one, v_one = (None if x is None else x[:, :, t:t + 1] for x in (q, k, v))
            parts.append(_flash_decode_torch(
                one, k_cache, v_cache, (before + t).clamp(min=0), k_one, v_one, k_scale, v_scale,
                *options))
        outs, lses = zip(*parts)
        return torch.cat(outs, 2), torch.stack(lses, -1).flatten(2)
    tensors = (q, k_cache, v_cache, k, v, k_scale, v_scale)
    if len(set(lens)) <= 1:
        return _attend_live(*tensors[:3], longest, *tensors[3:], *options)

    results = []
    for b, n in enumerate(lens):
        row = [None if x is None else x[b:b + 1] for x in tensors]
        results.append(_attend_live(*row[:3], n, *row[3:], *options))
    outs, lses = zip(*results)
    return torch.cat(outs), torch.cat(lses)


def _attend_live(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, n: int, k: Tensor | None, v: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None, scale: float | None, causal: bool,
    window: int | None, softcap: float | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    ring: bool,
) -> tuple[Tensor, Tensor]:
    """flash_decode of rows that all have n tokens cached. T is 1, unless it is not causal."""
    B, Hq, T, D = q.shape
    Hkv, S = k_cache.shape[1:3]
    end = n if k is None else n + T
    wrapped = ring and end > S
    start = 0
    live = S  # all of a ring that went round
    if not wrapped:
        if window is not None:
            start = max(0, end - window)  # what the query does not see is not read
        live = end - start
    k_cache = k_cache.narrow(2, start, live)
    v_cache = v_cache.narrow(2, start, live)
    if k_scale is not None:
        k_scale = k_scale.narrow(2, start, live)
        v_scale = v_scale.narrow(2, start, live)

    # the fused operator knows only a CPU and none of the options; it gives NaN where nothing is
    plain = softcap is None and alibi_slopes is None and sinks is None
    if not q.is_cpu or not plain or live == 0:
        out, lse = flash_decode_reference(
            q, k_cache, v_cache, torch.full((B,), n - start, device=q.device), k, v,
            k_scale=k_scale, v_scale=v_scale, scale=scale, causal=causal, window=window,
            softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, ring=wrapped, return_lse=True)
        return out, lse.reshape(B, Hkv, -1)

    if k is not None:
        _append_at((n - start) % live, k, v, k_cache, v_cache, k_scale, v_scale)
    dtype = q.dtype
    if k_scale is not None:  # in float32: as fast as in bf16 here, and one rounding less
        q = q.float()
        k_cache = k_cache.float().mul_(k_scale[..., None])
        v_cache = v_cache.float().mul_(v_scale[..., None])
    # a KV head's query heads ride along as query rows, so that no key is repeated; at least 4, as
    # the order in which MKL sums with fewer depends on where in memory a thread has them
    n_rows = Hq // Hkv * T
    rows = torch.nn.functional.pad(q.reshape(B, Hkv, n_rows, D), (0, 0, 0, max(0, 4 - n_rows)))
    mask = None
    if wrapped:  # the oldest tokens, from the place behind the last one's on, are in no window
        hidden = (torch.arange(S) - end) % S < S - window
        mask = torch.zeros(S).masked_fill_(hidden, -math.inf).expand(rows.shape[2], -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, k_cache, v_cache, attn_mask=mask, scale=scale)
    return out[:, :, :n_rows].reshape(B, Hq, T, D).contiguous().to(dtype), lse[:, :, :n_rows]


def _append_at(
    first: int, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:
    """Write new keys and values [B, Hkv, T, D] into the caches from place `first` on."""
    caches = [(k_cache, k), (v_cache, v)]
    if k_scale is not None:
        kv, scales = quantize_kv(torch.stack((k, v)))
        caches = [(k_cache, kv[0]), (v_cache, kv[1]), (k_scale, scales[0]), (v_scale, scales[1])]
    for cache, new in caches:
        cache.narrow(2, first, k.shape[2]).copy_(new)

# --- in Triton ---
#
# A program attends to one chunk of a row's tokens for one KV head. How many chunks a row gets is
# worked out on the device from the live lengths, by every program for itself, so the grid is fixed
# and no length ever reaches the host:
# - the tokens of all rows are cut into some n_split chunks of equal size, none below min_tiles
#   tiles: a long row fills the GPU, a short one is a single chunk; surplus programs exit at once;
# - the query heads of a KV head and the T queries are the rows of one tl.dot, so every key and
#   value is loaded once;
# - new tokens are written by the program whose chunk they fall into, before its loop reads them
#   back: nobody waits;
# - a row's chunks leave their unnormalised output, maximum and sum in scratch memory, and the
#   program that finishes last, by a counter, sums them in a fixed order and zeroes the counter.
# The last two need a barrier that waits for a program's stores to memory. AMD's does not, so there
# new tokens are written by a launch before, and parts are summed by a launch after.
#
# In the kernels m_i is a query's largest score so far, as a power of two, l_i the sum of its
# weights relative to it, and acc its unnormalised output; M queries, N tokens of a tile.

# the kernels use exp2, the hardware's exponential
LOG2E = tl.constexpr(math.log2(math.e)) if triton else None

# the dimensions of each tensor whose strides the kernel is given; the last one's is 1
DIMS = {"q": "bht", "k": "bhn", "v": "bhn", "k_new": "bht", "v_new": "bht",
        "k_scale": "bh", "v_scale": "bh"}
STRIDES = [f"stride_{name}_{dim}" for name, dims in DIMS.items() for dim in dims]
# numbers that must not make Triton compile anew when they change
CHANGING = ["B", "S", "n_split", "n_fill", "min_tiles", *STRIDES]


@jit
def _of_row(x, mine):
    """The sum of a vector over those rows where `mine` is true."""
    return tl.sum(tl.where(mine, x, 0))


@jit
def _cut_rows(seqlens_ptr, B, S, n_split, n_fill, min_tiles, NEW: tl.constexpr, T: tl.constexpr,
              WINDOW: tl.constexpr, RING: tl.constexpr, PAIRS: tl.constexpr,
              BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of every row: its live length, the first tile that is seen, how many tiles are, and into how
    many chunks they are cut for each of its PAIRS (KV heads times blocks of query rows)."""
    REACH: tl.constexpr = T + WINDOW - 1  # with a window, only so many of the last are seen
    rows = tl.arange(0, BLOCK_B)
    is_row = rows < B
    cached = tl.load(seqlens_ptr + rows, mask=is_row, other=0)
    lens = tl.where(is_row, tl.minimum(cached + NEW, S), 0)
    first = lens * 0
    if WINDOW and not RING:
        first = tl.maximum(lens - REACH, 0) // BLOCK_N
    tiles = tl.cdiv(lens, BLOCK_N) - first
    # the tiles of a chunk; an empty row still has zeros to write
    all_tiles = tl.sum(tiles) * PAIRS
    fill = tl.maximum(tl.cdiv(all_tiles, n_fill), 1)
    size = tl.maximum(tl.cdiv(all_tiles, n_split), tl.minimum(fill, min_tiles))
    chunks = tl.where(is_row, tl.maximum(tl.cdiv(tiles, size), 1), 0)
    return lens, first, tiles, chunks


@jit
def _my_chunk(lens, first, tiles, chunks, PAIRS: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's row, pair and chunk, as _cut_rows cuts them; the row's number of chunks and
    live length; and the tokens at which the chunk starts and ends."""
    pid = tl.program_id(0)
    # programs are handed out row by row, pair by pair, chunk by chunk
    ends = tl.cumsum(chunks * PAIRS)
    row = tl.sum((ends <= pid).to(tl.int32))
    mine = tl.arange(0, chunks.shape[0]) == row
    n_chunks = tl.maximum(_of_row(chunks, mine), 1)
    rank = pid - _of_row(ends - chunks * PAIRS, mine)
    pair = rank // n_chunks
    chunk = rank % n_chunks
    # the row's tiles, as evenly as they go into its chunks
    first = _of_row(first, mine)
    tiles = _of_row(tiles, mine)
    start = first + tiles * chunk // n_chunks
    end = first + tiles * (chunk + 1) // n_chunks
    n = _of_row(lens, mine)
    return row, pair, chunk, n_chunks, n, start * BLOCK_N, end * BLOCK_N


@jit
def _last_place(seqlens_ptr, row, S, n, NEW: tl.constexpr, RING: tl.constexpr):
    """Where in the cache the last token of a row of n lies. In a ring, what lies behind it is S
    tokens older."""
    last = n - 1
    if RING:
        last = (tl.load(seqlens_ptr + row) + NEW - 1) % S
    return last


@jit
def _append(k_new_ptr, v_new_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr,
            stride_k_new_t, stride_v_new_t, stride_kn, stride_vn, start, end, last, S,
            T: tl.constexpr, D: tl.constexpr, RING: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write those of the T new tokens, of which the last lies at `last`, that fall into
    start ... end."""
    t = tl.arange(0, triton.next_power_of_2(T))
    d = tl.arange(0, BLOCK_D)[None, :]
    pos = last + 1 - T + t
    if RING:
        pos = tl.where(pos < 0, pos + S, pos)
    mask = (t < T) & (pos >= start) & (pos < end)
    mask_d = mask[:, None] & (d < D)
    t = t.to(tl.int64)[:, None]
    k_new = tl.load(k_new_ptr + t * stride_k_new_t + d, mask_d, other=0)
    v_new = tl.load(v_new_ptr + t * stride_v_new_t + d, mask_d, other=0)
    _write(k_new, k_ptr + d, k_scale_ptr, stride_kn, pos, mask, mask_d)
    _write(v_new, v_ptr + d, v_scale_ptr, stride_vn, pos, mask, mask_d)


@jit
def _write(x, cache_ptr, scale_ptr, stride_n, pos, mask, mask_d):
    """Write vectors x into the cache at pos, quantized as quantize_kv does."""
    if scale_ptr is not None:
        x = x.to(tl.float32)
        scale = tl.max(tl.abs(x), 1) * (1 / 127)
        x = tl.div_rn(x, tl.maximum(scale, 1e-30)[:, None])
        x = (x + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 rounds to nearest, ties to even
        tl.store(scale_ptr + pos, scale, mask)
    offs = pos.to(tl.int64) * stride_n
    cache_ptrs = cache_ptr + offs[:, None]
    tl.store(cache_ptrs, x.to(cache_ptrs.dtype.element_ty), mask_d)


@jit
def _scores(s, q_pos, pos, live, slope, scale, softcap,
            CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Products of queries and keys [M, N] -> scores as powers of two, -inf for what is not seen."""
    if softcap is None:
        s *= scale * LOG2E
    else:  # tanh(x) = 1 - 2 / (1 + exp(2x))
        cap = softcap * LOG2E
        s = cap * (1 - 2 / (1 + tl.exp2(s * (scale / softcap * 2 * LOG2E))))
    distance = q_pos[:, None] - pos[None, :]
    seen = live[None, :]
    if slope is not None:
        s -= (slope * LOG2E)[:, None] * tl.abs(distance)
    if CAUSAL:
        seen = seen & (distance >= 0)
    if WINDOW:
        seen = seen & (distance < WINDOW)
    return tl.where(seen, s, float("-inf"))


@jit
def _first_weights(sinks_ptr, h, mask, chunk, M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What the softmax starts with: m_i [M], and sums of weights by token of a tile [M, N]."""
    m_i = tl.full([M], float("-inf"), tl.float32)
    sums = tl.zeros([M, BLOCK_N], tl.float32)
    if sinks_ptr is not None:  # a weight of 1 at the sink's score, in the first chunk
        m_i = tl.load(sinks_ptr + h, mask, other=float("-inf")) * LOG2E
        is_sink = (tl.arange(0, BLOCK_N) == 0) & (chunk == 0)
        sums += is_sink[None, :].to(tl.float32)
    return m_i, sums


@jit
def _attend(q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, slopes_ptr, sinks_ptr, stride_kn, stride_vn,
            start, end, n, last, S, chunk, h, t, mask, scale, softcap,
            CAUSAL: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, T: tl.constexpr,
            D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Attend to tokens start ... end of n: the loop in which the time goes. Online softmax of
    q [M, D]: returns m_i [M], acc [M, D] and l_i [M]."""
    M: tl.constexpr = q.shape[0]
    BLOCK_D: tl.constexpr = q.shape[1]
    BYTES: tl.constexpr = max(1, min(4, BLOCK_D // 32))
    slope = None if slopes_ptr is None else tl.load(slopes_ptr + h, mask, other=0)
    m_i, sums = _first_weights(sinks_ptr, h, mask, chunk, M, BLOCK_N)
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    q_pos = last + 1 - T + t
    offs = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)[None, :]
    k_offs = offs.to(tl.int64)[:, None] * stride_kn + d
    v_offs = offs.to(tl.int64)[:, None] * stride_vn + d
    for at in tl.range(start, end, BLOCK_N):
        pos = at + offs
        live = pos < n
        live_d = live[:, None] & (d < D)  # what is not live may be NaN, and 0 * NaN is NaN
        k_tile = k_ptr + tl.cast(at, tl.int64) * stride_kn
        keys = tl.load(k_tile + k_offs, live_d, other=0)
        v_tile = v_ptr + tl.cast(at, tl.int64) * stride_vn
        values = tl.load(v_tile + v_offs, live_d, other=0)
        s = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision="ieee")
        if k_scale_ptr is not None:
            s *= tl.load(k_scale_ptr + pos, live, other=0)[None, :]
        k_pos = pos
        if RING:
            k_pos = tl.where(pos > last, pos - S, pos)
        s = _scores(s, q_pos, k_pos, live, slope, scale, softcap, CAUSAL and T > 1, WINDOW)
        # what was summed so far decays to the new maximum
        new_m = tl.maximum(m_i, tl.max(s, 1))
        safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)  # nothing seen so far: no -inf - -inf
        p = tl.exp2(s - safe_m[:, None])
        decay = tl.exp2(m_i - safe_m)
        m_i = new_m
        sums = sums * decay[:, None] + p  # over tokens after the loop, to spare a reduction in it
        if v_scale_ptr is not None:
            # columns in an order that lets a thread take several neighbouring bytes at once
            p *= tl.load(v_scale_ptr + pos, live, other=0)[None, :]
            values = values.reshape(BLOCK_N, BLOCK_D // BYTES, BYTES)
            values = values.permute(0, 2, 1).reshape(BLOCK_N, BLOCK_D)
        acc = tl.dot(p.to(q.dtype), values.to(q.dtype), acc * decay[:, None],
                     input_precision="ieee")
    if v_scale_ptr is not None:
        acc = acc.reshape(M, BYTES, BLOCK_D // BYTES)
        acc = acc.permute(0, 2, 1).reshape(M, BLOCK_D)
    return m_i, acc, tl.sum(sums, 1)


@jit
def _leave_part(part_ptr, mask, m_i, l_i, acc, ROWS: tl.constexpr, D: tl.constexpr):
    """Leave this chunk's result in scratch memory: for each of ROWS queries acc, m_i and l_i."""
    r = tl.arange(0, acc.shape[0])
    d = tl.arange(0, acc.shape[1])[None, :]
    program = tl.program_id(0).to(tl.int64)
    here = part_ptr + (program * ROWS + r) * (D + 8)
    mask_d = mask[:, None] & (d < D)
    tl.store(here[:, None] + d, acc, mask_d)
    tl.store(here + D, m_i, mask)
    tl.store(here + D + 1, l_i, mask)


@jit
def _sum_parts(part_ptr, first_program, n_chunks, mask, ROWS: tl.constexpr, D: tl.constexpr,
               BLOCK_D: tl.constexpr):
    """m_i, l_i and acc of a whole row: the sum of what the programs of its chunks left."""
    M: tl.constexpr = mask.shape[0]
    AT_ONCE: tl.constexpr = max(1, min(16, 8192 // (M * BLOCK_D)))  # they wait for memory together
    r = tl.arange(0, M)
    d = tl.arange(0, BLOCK_D)[None, None, :]
    part = first_program.to(tl.int64) * ROWS + r
    part_ptr += part[None, :] * (D + 8)
    m_i = tl.full([M], float("-inf"), tl.float32)
    l_i = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    for first in tl.range(0, n_chunks, AT_ONCE, num_stages=1):
        chunk = first + tl.arange(0, AT_ONCE)[:, None]
        live = mask[None, :] & (chunk < n_chunks)  # (AT_ONCE, M)
        live_d = live[:, :, None] & (d < D)
        parts = part_ptr + chunk * (ROWS * (D + 8))
        # .cg: past L1, which does not see what other SMs wrote
        part_m = tl.load(parts + D, live, other=float("-inf"), cache_modifier=".cg")
        part_l = tl.load(parts + D + 1, live, other=0, cache_modifier=".cg")
        part_acc = tl.load(parts[:, :, None] + d, live_d, other=0, cache_modifier=".cg")
        new_m = tl.maximum(m_i, tl.max(part_m, 0))
        safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
        decay = tl.exp2(m_i - safe_m)
        grow = tl.exp2(part_m - safe_m[None, :])
        m_i = new_m
        l_i = l_i * decay + tl.sum(part_l * grow, 0)
        acc = acc * decay[:, None] + tl.sum(part_acc * grow[:, :, None], 0)
    return m_i, l_i, acc


@jit
def _queries_of(pair, M: tl.constexpr, G: tl.constexpr, T: tl.constexpr, BLOCK_M: tl.constexpr):
    """The KV head of a pair; the head and token of its first M queries, and which of them exist."""
    BLOCKS: tl.constexpr = (G * T + BLOCK_M - 1) // BLOCK_M
    kv_head = pair // BLOCKS
    r = pair % BLOCKS * BLOCK_M + tl.arange(0, M)
    h = kv_head * G + r // T
    t = r % T
    return kv_head, h, t, r < G * T


@jit
def _load_queries(q_ptr, b, h, t, mask, stride_b, stride_h, stride_t,
                  D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Queries [M, BLOCK_D] of row b, heads h and tokens t."""
    d = tl.arange(0, BLOCK_D)[None, :]
    offs = b * stride_b + h.to(tl.int64) * stride_h + t.to(tl.int64) * stride_t
    return tl.load(q_ptr + offs[:, None] + d, mask[:, None] & (d < D), other=0)


@jit
def _store(out_ptr, lse_ptr, row, h, t, mask, m_i, l_i, acc,
           HQ: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    """Write the results of a row's queries of heads h and tokens t."""
    at = (row * HQ + h).to(tl.int64) * T + t
    d = tl.arange(0, acc.shape[1])[None, :]
    mask_d = mask[:, None] & (d < D)
    norm = tl.where(l_i == 0, 1.0, l_i)
    out = acc / norm[:, None]
    out_ptrs = out_ptr + at[:, None] * D + d
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask_d)
    lse = (m_i + tl.log2(norm)) / LOG2E
    tl.store(lse_ptr + at, lse, mask)


@jit
def _store_sum(out_ptr, lse_ptr, part_ptr, row, pair, first_program, n_chunks,
               HKV: tl.constexpr, G: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the results of a row that several programs worked on."""
    ROWS: tl.constexpr = min(BLOCK_M, G * T)
    M: tl.constexpr = triton.next_power_of_2(ROWS)
    _, h, t, mask = _queries_of(pair, M, G, T, BLOCK_M)
    m_i, l_i, acc = _sum_parts(part_ptr, first_program, n_chunks, mask, ROWS, D, BLOCK_D)
    _store(out_ptr, lse_ptr, row, h, t, mask, m_i, l_i, acc, HKV * G, T, D)


@jit(do_not_specialize=CHANGING)
def _flash_decode_kernel(
    q_ptr, k_ptr, v_ptr, seqlens_ptr, k_new_ptr, v_new_ptr, k_scale_ptr, v_scale_ptr,
    slopes_ptr, sinks_ptr, out_ptr, lse_ptr, part_ptr, counter_ptr,
    scale, softcap, B, S, n_split, n_fill, min_tiles, stride_q_b, stride_q_h, stride_q_t,
    stride_k_b, stride_k_h, stride_k_n, stride_v_b, stride_v_h, stride_v_n,
    stride_k_new_b, stride_k_new_h, stride_k_new_t, stride_v_new_b, stride_v_new_h, stride_v_new_t,
    stride_k_scale_b, stride_k_scale_h, stride_v_scale_b, stride_v_scale_h,
    HKV: tl.constexpr, G: tl.constexpr, T: tl.constexpr, D: tl.constexpr, NEW: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, VEC: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    lens, first, tiles, chunks = _cut_rows(seqlens_ptr, B, S, n_split, n_fill, min_tiles,
                                           NEW, T, WINDOW, RING, PAIRS, BLOCK_B, BLOCK_N)
    row, pair, chunk, n_chunks, n, start, end = _my_chunk(
        lens, first, tiles, chunks, PAIRS, BLOCK_N)
    if row >= B:
        return
    kv_head, h, t, mask = _queries_of(pair, BLOCK_M, G, T, BLOCK_M)
    last = _last_place(seqlens_ptr, row, S, n, NEW, RING)
    b = row.to(tl.int64)  # int64 before any stride multiplies
    kv_head = kv_head.to(tl.int64)
    q = _load_queries(q_ptr, b, h, t, mask, stride_q_b, stride_q_h, stride_q_t, D, BLOCK_D)
    k_ptr += (b * stride_k_b + kv_head * stride_k_h) * VEC
    v_ptr += (b * stride_v_b + kv_head * stride_v_h) * VEC
    stride_kn = stride_k_n * VEC  # the caches' strides come divided by it, see _arguments
    stride_vn = stride_v_n * VEC
    if k_scale_ptr is not None:
        k_scale_ptr += b * stride_k_scale_b + kv_head * stride_k_scale_h
        v_scale_ptr += b * stride_v_scale_b + kv_head * stride_v_scale_h
    if k_new_ptr is not None and (RING or end > n - T):
        k_new_ptr += b * stride_k_new_b + kv_head * stride_k_new_h
        v_new_ptr += b * stride_v_new_b + kv_head * stride_v_new_h
        _append(k_new_ptr, v_new_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, stride_k_new_t,
                stride_v_new_t, stride_kn, stride_vn, start, end, last, S, T, D, RING, BLOCK_D)
        tl.debug_barrier()
    m_i, acc, l_i = _attend(q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, slopes_ptr, sinks_ptr,
                            stride_kn, stride_vn, start, end, n, last, S, chunk, h, t, mask, scale,
                            softcap, CAUSAL, WINDOW, RING, T, D, BLOCK_N)
    if n_chunks == 1:
        _store(out_ptr, lse_ptr, row, h, t, mask, m_i, l_i, acc, HKV * G, T, D)
    else:
        _leave_part(part_ptr, mask, m_i, l_i, acc, min(BLOCK_M, G * T), D)
        if counter_ptr is not None:
            tl.debug_barrier()  # every thread's part is written before one of them counts
            counter_ptr += row * PAIRS + pair
            if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == n_chunks - 1:
                tl.store(counter_ptr, 0)
                _store_sum(out_ptr, lse_ptr, part_ptr, row, pair, tl.program_id(0) - chunk,
                           n_chunks, HKV, G, T, D, BLOCK_M, BLOCK_D)


@jit(do_not_specialize=CHANGING)
def _append_kernel(
    k_ptr, v_ptr, seqlens_ptr, k_new_ptr, v_new_ptr, k_scale_ptr, v_scale_ptr, S,
    stride_k_b, stride_k_h, stride_k_n, stride_v_b, stride_v_h, stride_v_n,
    stride_k_new_b, stride_k_new_h, stride_k_new_t, stride_v_new_b, stride_v_new_h, stride_v_new_t,
    stride_k_scale_b, stride_k_scale_h, stride_v_scale_b, stride_v_scale_h,
    HKV: tl.constexpr, T: tl.constexpr, D: tl.constexpr, NEW: tl.constexpr, RING: tl.constexpr,
    VEC: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Write the new tokens of a row and KV head."""
    b = tl.program_id(0).to(tl.int64) // HKV
    kv_head = tl.program_id(0).to(tl.int64) % HKV
    n = tl.minimum(tl.load(seqlens_ptr + b) + NEW, S)
    last = _last_place(seqlens_ptr, b, S, n, NEW, RING)
    k_ptr += (b * stride_k_b + kv_head * stride_k_h) * VEC
    v_ptr += (b * stride_v_b + kv_head * stride_v_h) * VEC
    if k_scale_ptr is not None:
        k_scale_ptr += b * stride_k_scale_b + kv_head * stride_k_scale_h
        v_scale_ptr += b * stride_v_scale_b + kv_head * stride_v_scale_h
    k_new_ptr += b * stride_k_new_b + kv_head * stride_k_new_h
    v_new_ptr += b * stride_v_new_b + kv_head * stride_v_new_h
    _append(k_new_ptr, v_new_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, stride_k_new_t,
            stride_v_new_t, stride_k_n * VEC, stride_v_n * VEC, 0, n, last, S, T, D, RING, BLOCK_D)


@jit(do_not_specialize=CHANGING)
def _sum_kernel(
    seqlens_ptr, out_ptr, lse_ptr, part_ptr, B, S, n_split, n_fill, min_tiles,
    HKV: tl.constexpr, G: tl.constexpr, T: tl.constexpr, D: tl.constexpr, NEW: tl.constexpr,
    WINDOW: tl.constexpr, RING: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Sum what the programs of _flash_decode_kernel left of a row and pair."""
    row = tl.program_id(0) // PAIRS
    pair = tl.program_id(0) % PAIRS
    _, _, _, chunks = _cut_rows(seqlens_ptr, B, S, n_split, n_fill, min_tiles,
                                NEW, T, WINDOW, RING, PAIRS, BLOCK_B, BLOCK_N)
    rows = tl.arange(0, BLOCK_B)
    n_chunks = _of_row(chunks, rows == row)
    if n_chunks > 1:
        first_program = _of_row(chunks, rows < row) * PAIRS + pair * n_chunks
        _store_sum(out_ptr, lse_ptr, part_ptr, row, pair, first_program, n_chunks,
                   HKV, G, T, D, BLOCK_M, BLOCK_D)


def _blocks(itemsize: int, D: int, rows: int, smem: int, warp_size: int) -> dict[str, int]:
    """Tile sizes with which two programs fit an SM that has smem bytes of shared memory."""
    BLOCK_D = max(16, triton.next_power_of_2(D))
    if warp_size == 64:
        smem = min(smem, 65536)  # AMD's gfx9: larger tiles spill registers, also on gfx950
    if smem <= 65536 and warp_size == 32:
        # AMD's gfx11 and gfx12 have 256 registers a thread, and hold every operand of a dot twice
        return dict(BLOCK_M=16, BLOCK_N=max(16, 2048 // BLOCK_D), BLOCK_D=BLOCK_D,
                    num_warps=8, num_stages=2)
    # rows of the dot
    if itemsize == 4:
        most_rows = 16
    elif itemsize == 1 or smem <= 65536:
        most_rows = 32
    else:
        most_rows = 64
    BLOCK_M = min(max(16, triton.next_power_of_2(rows)), most_rows)
    # tokens of a tile
    tile_bytes = 16384 if smem > 131072 else 8192
    most_tokens = 128 if BLOCK_M == 16 else 64
    BLOCK_N = min(most_tokens, max(32, tile_bytes // (BLOCK_D * itemsize)))
    # tiles of keys and values that are on their way at once
    stages = 1 + (smem // 2 - 6144) // (2 * BLOCK_N * BLOCK_D * itemsize)
    blocks = dict(
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
        num_warps=4,
        num_stages=max(2, min(4, stages)))
    if smem > 65536:  # NVIDIA's
        if BLOCK_M > 16 or itemsize == 4:
            blocks["num_warps"] = 8
        else:
            # two programs may have them all; unasked, the compiler spills some to fit in a third
            blocks["maxnreg"] = 255
    return blocks


def _strides(name: str, x: Tensor | None, unit: int = 1) -> dict[str, int]:
    """The kernel's stride_NAME_* of x, in units of so many elements; zeros without an x."""
    names = [f"stride_{name}_{dim}" for dim in DIMS[name]]
    if x is None:
        return dict.fromkeys(names, 0)
    return {name: stride // unit for name, stride in zip(names, x.stride())}


def _arguments(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor,
    k: Tensor | None, v: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
    scale: float | None, causal: bool, window: int | None, softcap: float | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, ring: bool, blocks: dict[str, int],
    n_programs: int,
) -> dict[str, Any]:
    """The kernels' arguments but the counters. n_programs: how many the GPU runs at once."""
    B, Hq, T, D = q.shape
    _, Hkv, S, _ = k_cache.shape
    G = Hq // Hkv
    part_rows = min(blocks["BLOCK_M"], G * T)
    n_pairs = B * Hkv * triton.cdiv(G * T, blocks["BLOCK_M"])
    split = _split(n_pairs, n_programs, blocks["BLOCK_N"])
    n_parts = split["n_split"] + n_pairs  # at most: one for every program of the grid
    # what the caches' strides share, so that the compiler knows to load 16 bytes at once
    cache_strides = (*k_cache.stride()[:3], *v_cache.stride()[:3])
    vec = math.gcd(16, *cache_strides)
    out, lse = _flash_decode_fake(q)
    return dict(
        q_ptr=q, k_ptr=k_cache, v_ptr=v_cache, seqlens_ptr=cache_seqlens,
        k_new_ptr=k, v_new_ptr=v, k_scale_ptr=k_scale, v_scale_ptr=v_scale,
        slopes_ptr=alibi_slopes, sinks_ptr=sinks, out_ptr=out, lse_ptr=lse,
        part_ptr=q.new_empty((n_parts, part_rows, D + 8), dtype=torch.float32),
        scale=D ** -0.5 if scale is None else float(scale),
        softcap=softcap,
        B=B, S=S, **split, **_strides("q", q),
        **_strides("k", k_cache, vec), **_strides("v", v_cache, vec),
        **_strides("k_new", k), **_strides("v_new", v),
        **_strides("k_scale", k_scale), **_strides("v_scale", v_scale),
        HKV=Hkv, G=G, T=T, D=D, NEW=0 if k is None else T,
        CAUSAL=causal, WINDOW=window or 0, RING=ring, VEC=vec, PAIRS=n_pairs // B,
        BLOCK_B=triton.next_power_of_2(B),
        **blocks)


MIN_CHUNK = 256  # tokens: starting a program and summing what it leaves must be worth it


def _split(n_pairs: int, n_programs: int, BLOCK_N: int) -> dict[str, int]:
    """How the tokens of so many pairs of a row and a KV head are cut, in tiles of BLOCK_N tokens:
    into n_split chunks, none below min_tiles unless there were fewer than n_fill, and SMs idle."""
    n_split = n_programs - n_pairs  # as many chunks as run at once
    min_chunk = MIN_CHUNK
    if n_pairs > n_programs // 2:
        # the pairs fill the GPU: in several waves of chunks an uneven last one matters little, and
        # short rows are better left whole
        n_split = 4 * n_programs
        min_chunk = 2 * MIN_CHUNK
    return dict(n_split=n_split, n_fill=n_programs // 2, min_tiles=min_chunk // BLOCK_N)


Launch = tuple[Any, int, dict[str, Any]]  # a kernel, how many programs, its arguments


def _launches(arguments: dict[str, Any], counters: Tensor | None) -> list[Launch]:
    """What flash_decode launches. With counters, a zero for each pair of a row and a KV head, one
    kernel does it all; without, one appends before it and one sums the parts after it."""
    n_parts = len(arguments["part_ptr"])
    if counters is not None:
        return [_launch(_flash_decode_kernel, n_parts, arguments, counter_ptr=counters)]
    attend = _launch(_flash_decode_kernel, n_parts, arguments,
                     k_new_ptr=None, v_new_ptr=None, counter_ptr=None)
    sum_up = _launch(_sum_kernel, arguments["B"] * arguments["PAIRS"], arguments)
    if not arguments["NEW"]:
        return [attend, sum_up]
    append = _launch(_append_kernel, arguments["B"] * arguments["HKV"], arguments)
    return [append, attend, sum_up]


def _launch(kernel: Any, grid: int, arguments: dict[str, Any], **changes: Tensor | None) -> Launch:
    """A launch with those of the arguments that the kernel knows."""
    known = {*kernel.arg_names, "num_warps", "num_stages", "maxnreg"}
    arguments = arguments | changes
    for name in arguments.keys() - known:
        del arguments[name]
    return kernel, grid, arguments


_unused: dict[torch.device, Tensor] = {}  # counters, all zero, that no stream or graph has yet
_slabs: list[Tensor] = []  # all tensors of counters: a graph would not keep its own alive
_of_streams: dict[tuple, Tensor] = {}  # the counters of each stream
SLAB = 2 ** 18  # 1 MB: for 256 captures of 32 layers with up to 32 pairs each


def _counters(device: torch.device, n: int) -> Tensor:
    """n zeros, which every launch leaves at zero, for launches that cannot overlap: a stream's own
    or, as a graph may be replayed beside any other work, a captured launch's own for good."""
    n = 32 * triton.cdiv(n, 32)  # cache lines; and Triton would compile anew for odd addresses
    if torch.cuda.is_current_stream_capturing():
        if device not in _unused or len(_unused[device]) < n:
            # memory made here is a graph's to fill: it writes zeros in every replay
            return torch.zeros(n, dtype=torch.int32, device=device)
        return _take(device, n)
    if device not in _unused or len(_unused[device]) < n + SLAB // 2:
        _unused[device] = torch.zeros(n + SLAB, dtype=torch.int32, device=device)
        _slabs.append(_unused[device])
        torch.cuda.synchronize(device)  # other streams do not wait until it is zeroed
    stream = (device, torch.cuda.current_stream(device).cuda_stream)
    if stream not in _of_streams or len(_of_streams[stream]) < n:
        _of_streams[stream] = _take(device, n)
    return _of_streams[stream]


def _take(device: torch.device, n: int) -> Tensor:
    """n zeros that nobody else will get."""
    taken = _unused[device][:n]
    _unused[device] = _unused[device][n:]
    return taken


def _flash_decode_triton(
    q: Tensor, k_cache: Tensor, *args: Any, blocks: dict[str, int] | None = None,
    n_programs: int | None = None, one_launch: bool = not torch.version.hip,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels: one, or on AMD up to three. The keywords are for tests: they stand for a
    device that is not there."""
    if not len(q):
        return _flash_decode_fake(q)
    if blocks is None:
        gpu = torch.cuda.get_device_properties(q.device)
        rows = q.shape[1] // k_cache.shape[1] * q.shape[2]
        blocks = _blocks(k_cache.element_size(), q.shape[3], rows,
                         gpu.shared_memory_per_multiprocessor, gpu.warp_size)
        n_programs = 2 * gpu.multi_processor_count
    arguments = _arguments(q, k_cache, *args, blocks, n_programs)
    counters = None
    with torch.cuda.device_of(q):
        if one_launch:
            counters = _counters(q.device, arguments["B"] * arguments["PAIRS"])
        for kernel, grid, kernel_arguments in _launches(arguments, counters):
            kernel[(grid,)](**kernel_arguments)
    return arguments["out_ptr"], arguments["lse_ptr"]

if __name__ == "__main__":  # the report, which a copy of this file is without
    import runpy
    import sys
    from pathlib import Path

    report = Path(__file__).resolve().with_name("benchmarks") / "report.py"
    if not report.exists():
        print(f"kernels.py: error: --report needs {report}", file=sys.stderr)
        sys.exit(2)
    sys.modules["kernels"] = sys.modules["__main__"]  # what the report imports
    runpy.run_path(str(report), run_name="__main__")
