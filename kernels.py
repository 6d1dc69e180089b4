"""Decode attention whose cost follows the tokens that are cached, not the room allocated for them; and products of int8
and int4 weights with single vectors. Needs torch and triton, nothing else: copy the file, or what you need of it.

Decoding one token reads every live key and value once and does next to no arithmetic with them: B * Hkv * len * D * 2 *
itemsize bytes a layer, 134 MB for Llama-3-8B at 32k tokens. Reading them at the memory's full speed takes every SM, and
at batch 1 there are far fewer heads than SMs, so the live length itself has to be split.

flash_decode, int8_linear and int4_linear run in Triton on a GPU, in PyTorch elsewhere, and under torch.compile; their
_reference functions say what is right. `python kernels.py --report [sm_90 ...]` shows what the kernels compile to."""
from __future__ import annotations  # the kernels' annotations are text to Triton, and harmless where it is absent

import math
import pathlib
import runpy
import sys

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:
    triton = None
    def jit(fn=None, **_):
        return fn or jit

# --- attention: what is right ---

def quantize_kv(x):
    """[..., D] -> int8 of that shape and a float32 scale per vector [...]: scale = max|x| / 127, value = x / scale."""
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    return torch.round(x / scale.clamp_min(1e-30)).to(torch.int8), scale.squeeze(-1)

def flash_decode_reference(q, k_cache, v_cache, cache_seqlens, k=None, v=None, *, k_scale=None, v_scale=None,
                           scale=None, causal=True, window=None, softcap=None, alibi_slopes=None, sinks=None,
                           return_lse=False):
    """flash_decode's definition: the same signature and results, in float32 over the whole cache, on any device."""
    (B, Hq, T, D), (Hkv, S), lens, device = q.shape, k_cache.shape[1:3], cache_seqlens.long(), q.device
    if k is not None:  # append the new tokens at each row's own position
        row, pos = torch.arange(B, device=device)[:, None], lens[:, None] + torch.arange(T, device=device)  # (B, T)
        for x, cache, scales in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
            if scales is not None:
                x, s = quantize_kv(x)
                scales[row, :, pos] = s.transpose(1, 2)
            cache[row, :, pos] = x.transpose(1, 2)
        lens = lens + T
    live = torch.arange(S, device=device) < lens[:, None]                                  # (B, S)
    keys, values = (torch.where(live[:, None, :, None], c.float() if s is None else c * s[..., None], 0)
                    .repeat_interleave(Hq // Hkv, 1) for c, s in ((k_cache, k_scale), (v_cache, v_scale)))
    scores = q.float() @ keys.transpose(-1, -2) * (D ** -0.5 if scale is None else scale)  # (B, Hq, T, S)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # how far each key lies behind each query; the queries are the last T of the row's positions
    distance = (lens[:, None] - T + torch.arange(T, device=device))[..., None] - torch.arange(S, device=device)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None] * distance.abs()[:, None]
    seen = live[:, None] & (distance >= 0 if causal else True) & (True if window is None else distance < window)
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    lse = scores.logsumexp(-1)                                                             # (B, Hq, T)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks[:, None])
    out = (scores - lse[..., None]).exp().masked_fill(~seen[:, None], 0) @ values
    return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)

# --- attention: the operator ---

def flash_decode(q, k_cache, v_cache, cache_seqlens, k=None, v=None, *, k_scale=None, v_scale=None, scale=None,
                 causal=True, window=None, softcap=None, alibi_slopes=None, sinks=None, return_lse=False):
    """Attention of T new tokens a row to that row's cached tokens, appending the new ones to the cache on the way.

    q [B, Hq, T, D]: T 1 to 16, Hq a multiple of Hkv, D a multiple of 8 up to 256; bf16, fp16 or fp32
    k_cache, v_cache [B, Hkv, S, D]: of q's dtype, or int8 with k_scale, v_scale [B, Hkv, S] float32 (see quantize_kv);
        any strides with the last one 1
    cache_seqlens [B] int32: tokens cached before the call; what lies beyond them is never read and may be NaN
    k, v [B, Hkv, T, D]: written into the cache at cache_seqlens[b] + t, which must be below S, and attended to: query t
        sees positions 0 ... cache_seqlens[b] + t. Without them the queries are the last T of the cached positions, or,
        with causal=False, see them all (cross-attention)
    scale multiplies the scores, by default 1/sqrt(D). softcap c: c * tanh(score / c). alibi_slopes [Hq]: minus slope *
        |query position - key position|. window w: a query sees w tokens, itself included. sinks [Hq]: a logit per head
        that only the softmax's denominator sees
    Returns [B, Hq, T, D], and with return_lse the log-sum-exp [B, Hq, T] in float32. A query that sees nothing gets
    zeros, and -inf or its sink. Raises ValueError for shapes, dtypes or combinations that are none of these."""
    _check(q, k_cache, v_cache, cache_seqlens, k, v, k_scale, v_scale, causal, window, softcap, alibi_slopes, sinks)
    # on a CPU the dispatcher costs as much as a quarter of a short call; torch.compile needs the operator
    run = torch.ops.gpt_flash.flash_decode if torch.compiler.is_compiling() or not q.is_cpu else _flash_decode_torch
    out, lse = run(q, k_cache, v_cache, cache_seqlens, k, v, k_scale, v_scale, scale, causal, window, softcap,
                   alibi_slopes, sinks)
    return (out, lse) if return_lse else out

def _check(q, k_cache, v_cache, cache_seqlens, k, v, k_scale, v_scale, causal, window, softcap, alibi_slopes, sinks):
    if q.dim() != 4 or k_cache.dim() != 4:
        raise ValueError("flash_decode: q must be [B, Hq, T, D] and k_cache [B, Hkv, S, D], "
                         f"got {list(q.shape)} and {list(k_cache.shape)}")
    (B, Hq, T, D), (_, Hkv, S, _), int8 = q.shape, k_cache.shape, k_cache.dtype == torch.int8
    new, old, device, f32, i32 = (B, Hkv, T, D), (B, Hkv, S, D), q.device, (torch.float32,), (torch.int32,)
    problem = (
        f"T must be 1 to 16 tokens, got {T}" if not 1 <= T <= 16 else
        f"the head size must be a multiple of 8 up to 256, got {D}" if D % 8 or not 8 <= D <= 256 else
        f"query heads must be a multiple of KV heads, got {Hq} and {Hkv}" if Hkv < 1 or Hq % Hkv else
        "k and v go together" if (k is None) != (v is None) else
        "int8 caches, and only they, need k_scale and v_scale" if {k_scale is None, v_scale is None} != {not int8} else
        f"window must be at least 1, got {window}" if window is not None and window < 1 else
        "window needs causal=True" if window is not None and not causal else
        f"softcap must be above 0, got {softcap}" if softcap is not None and softcap <= 0 else None)
    for name, x, shape, dtypes in (
            ("q", q, q.shape, (torch.bfloat16, torch.float16, *f32)), ("cache_seqlens", cache_seqlens, (B,), i32),
            ("k_cache", k_cache, old, (q.dtype, torch.int8)), ("v_cache", v_cache, old, (k_cache.dtype,)),
            ("k", k, new, (q.dtype,)), ("v", v, new, (q.dtype,)), ("alibi_slopes", alibi_slopes, (Hq,), f32),
            ("k_scale", k_scale, old[:3], f32), ("v_scale", v_scale, old[:3], f32), ("sinks", sinks, (Hq,), f32)):
        if problem or x is None:
            continue
        if x.shape != shape or x.dtype not in dtypes or x.device != device:
            problem = (f"{name} must be {list(shape)} {' or '.join(map(str, dtypes))} on {device}, "
                       f"got {list(x.shape)} {x.dtype} on {x.device}")
        elif x.stride()[-1] != 1 and x.shape[-1] > 1:
            problem = f"the last dimension of {name} must be contiguous"
    if problem:
        raise ValueError(f"flash_decode: {problem}")

def _operator(name, schema, run, fake):
    torch.library.define(f"gpt_flash::{name}", schema)
    torch.library.impl(f"gpt_flash::{name}", "default", run)
    torch.library.register_fake(f"gpt_flash::{name}", fake)

def _flash_decode(q, *args):  # on AMD tl.debug_barrier does not wait for stores to memory, which the kernel relies on
    return (_flash_decode_triton if triton and q.is_cuda and not torch.version.hip else _flash_decode_torch)(q, *args)

# In a compiled function take both caches out of one tensor (kv[0], kv[1]): two inputs that share memory are copied.
_operator("flash_decode", "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor? k, "
          "Tensor? v, Tensor(c!)? k_scale, Tensor(d!)? v_scale, float? scale, bool causal, int? window, "
          "float? softcap, Tensor? alibi_slopes, Tensor? sinks) -> (Tensor, Tensor)", _flash_decode,
          lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)))

# --- attention in PyTorch: the CPU, and wherever Triton is not ---

def _flash_decode_torch(q, k_cache, v_cache, cache_seqlens, k, v, k_scale, v_scale, *options):
    """Reads the lengths on the host and touches only live tokens: all rows at once, or one by one where they differ."""
    tensors, lens = (q, k_cache, v_cache, k, v, k_scale, v_scale), cache_seqlens.tolist()
    longest, new, S = max(lens, default=0), 0 if k is None else k.shape[2], k_cache.shape[2]
    if longest + new > S:
        raise ValueError(f"flash_decode: {longest} cached + {new} new tokens do not fit into a cache of {S}")
    if len(set(lens)) <= 1:
        return _attend_live(longest, *tensors, *options)
    rows = [_attend_live(n, *(x if x is None else x[b:b + 1] for x in tensors), *options) for b, n in enumerate(lens)]
    return tuple(torch.cat(x) for x in zip(*rows))

def _attend_live(n, q, k_cache, v_cache, k, v, k_scale, v_scale, scale, causal, window, softcap, alibi_slopes, sinks):
    """flash_decode of rows that all have n tokens cached."""
    (B, Hq, T, D), Hkv, dtype = q.shape, k_cache.shape[1], q.dtype
    end = n if k is None else n + T
    start = 0 if window is None else max(0, end - T - window + 1)  # what no query sees is not read
    live = end - start
    k_cache, v_cache, k_scale, v_scale = (
        x if x is None else x.narrow(2, start, live) for x in (k_cache, v_cache, k_scale, v_scale))
    # the fused operator knows only a CPU and none of the options; it gives NaN to a query before the first position
    if not q.is_cpu or not softcap is alibi_slopes is sinks is None or live < T:
        return flash_decode_reference(
            q, k_cache, v_cache, torch.full((B,), n - start, device=q.device), k, v, k_scale=k_scale, v_scale=v_scale,
            scale=scale, causal=causal, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
            return_lse=True)
    if k is not None:
        if k_scale is not None:
            (k, v), scales = quantize_kv(torch.stack((k, v)))
            k_scale.narrow(2, live - T, T).copy_(scales[0])
            v_scale.narrow(2, live - T, T).copy_(scales[1])
        k_cache.narrow(2, live - T, T).copy_(k)
        v_cache.narrow(2, live - T, T).copy_(v)
    if k_scale is not None:  # in float32: as fast as in bf16 here, and one rounding less
        q, k_cache = q.float(), k_cache.float().mul_(k_scale[..., None])
        v_cache = v_cache.float().mul_(v_scale[..., None])
    mask = None
    if T > 1 and causal:
        mask = torch.full((T, live), -math.inf).triu_(live - T + 1)  # keys after the query
        if window is not None:
            mask += torch.full((T, live), -math.inf).tril_(live - T - window)
        mask = mask.repeat(Hq // Hkv, 1)
    # a KV head's query heads ride along as query rows, so that no key is repeated
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.reshape(B, Hkv, -1, D), k_cache, v_cache, attn_mask=mask, scale=scale)
    return out.reshape(B, Hq, T, D).contiguous().to(dtype), lse.reshape(B, Hq, T).contiguous()

# --- attention in Triton ---
#
# A program attends to one chunk of a row's tokens for one KV head. How many chunks a row gets is worked out on the
# device from the live lengths, by every program for itself, so the grid is fixed and no length ever reaches the host:
# - the tokens of all rows are cut into some n_split chunks of equal size, but none below MIN_TILES tiles: a long row
#   fills the GPU, a short one is a single chunk, and a ragged batch is balanced; surplus programs exit at once;
# - the query heads of a KV head and the T queries are the rows of one tl.dot, so every key and value is loaded once;
# - new tokens are written by the program whose chunk they fall into, before its loop reads them back: nobody waits;
# - a row's chunks leave their unnormalised output, maximum and sum in scratch memory, and the program that finishes
#   last, by a counter, combines them in a fixed order and sets the counter back to zero for the next launch.

LOG2E = tl.constexpr(math.log2(math.e)) if triton else None  # the kernels use exp2, the hardware's exponential

@jit
def _my_chunk(seqlens_ptr, B, S, n_split, NEW: tl.constexpr, REACH: tl.constexpr, PAIRS: tl.constexpr,
              MIN_TILES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which row, which of its PAIRS (KV heads times blocks of query rows) and which chunk of its tokens this program
    has, how many chunks there are, the row's live length, and where the chunk starts and ends. NEW tokens are being
    appended; with a window, only the last REACH tokens are seen."""
    pid, rows = tl.program_id(0), tl.arange(0, BLOCK_B)
    lens = tl.where(rows < B, tl.minimum(tl.load(seqlens_ptr + rows, mask=rows < B, other=0) + NEW, S), 0)
    first = tl.maximum(lens - REACH, 0) // BLOCK_N if REACH else lens * 0
    tiles = tl.cdiv(lens, BLOCK_N) - first
    size = tl.maximum(tl.cdiv(tl.sum(tiles) * PAIRS, n_split), MIN_TILES)
    chunks = tl.where(rows < B, tl.maximum(tl.cdiv(tiles, size), 1), 0)  # an empty row still has zeros to write
    ends = tl.cumsum(chunks * PAIRS)
    row = tl.sum((ends <= pid).to(tl.int32))
    mine = rows == row
    n_chunks = tl.maximum(tl.sum(tl.where(mine, chunks, 0)), 1)
    rank = pid - tl.sum(tl.where(mine, ends - chunks * PAIRS, 0))
    pair, chunk = rank // n_chunks, rank % n_chunks
    first, tiles = tl.sum(tl.where(mine, first, 0)), tl.sum(tl.where(mine, tiles, 0))
    start, end = first + tiles * chunk // n_chunks, first + tiles * (chunk + 1) // n_chunks
    return row, pair, chunk, n_chunks, tl.sum(tl.where(mine, lens, 0)), start * BLOCK_N, end * BLOCK_N

@jit
def _append(x_ptr, cache_ptr, scale_ptr, stride_xt, stride_cn, pos, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write new vectors into the cache at pos where mask says so, quantized as quantize_kv does."""
    d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = mask[:, None] & (d < D)
    x = tl.load(x_ptr + tl.arange(0, pos.shape[0]).to(tl.int64)[:, None] * stride_xt + d, mask_d, other=0)
    if scale_ptr is not None:
        scale = tl.div_rn(tl.max(tl.abs(x.to(tl.float32)), 1), 127.0)
        x = tl.div_rn(x.to(tl.float32), tl.maximum(scale, 1e-30)[:, None])
        x = (x + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 rounds to the nearest integer, ties to even
        tl.store(scale_ptr + pos, scale, mask)
    tl.store(cache_ptr + pos.to(tl.int64)[:, None] * stride_cn + d, x.to(cache_ptr.dtype.element_ty), mask_d)

@jit
def _attend(q, k_ptr, v_ptr, ks_ptr, vs_ptr, stride_kn, stride_vn, start, end, n, q_pos, slope, scale, softcap, top,
            sums, acc, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Attend to tokens start ... end of n: the loop in which the time goes. Online softmax of q [M, D]: returns the
    largest score [M] and, relative to it, the sum of the weights [M] and the unnormalised output [M, D]."""
    M: tl.constexpr = acc.shape[0]
    BLOCK_D: tl.constexpr = acc.shape[1]
    BYTES: tl.constexpr = max(1, min(4, BLOCK_D // 32))
    offs, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)[None, :]
    k_offs, v_offs = offs.to(tl.int64)[:, None] * stride_kn + d, offs.to(tl.int64)[:, None] * stride_vn + d
    for at in tl.range(start, end, BLOCK_N):
        pos = at + offs
        live = pos < n
        mask = live[:, None] & (d < D)  # of the loads too: what is not live may be NaN, and 0 * NaN is NaN
        keys = tl.load(k_ptr + tl.cast(at, tl.int64) * stride_kn + k_offs, mask, other=0)
        values = tl.load(v_ptr + tl.cast(at, tl.int64) * stride_vn + v_offs, mask, other=0)
        s = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision="ieee")
        if ks_ptr is not None:
            s *= tl.load(ks_ptr + pos, live, other=0)[None, :]
        if softcap is None:
            s *= scale * LOG2E
        else:  # tanh(x) = 1 - 2 / (1 + exp(2x))
            s = softcap * LOG2E * (1 - 2 / (1 + tl.exp2(s * (scale / softcap * 2 * LOG2E))))
        distance, seen = q_pos[:, None] - pos[None, :], live[None, :]
        if slope is not None:
            s -= (slope * LOG2E)[:, None] * tl.abs(distance)
        if CAUSAL:
            seen = seen & (distance >= 0)
        if WINDOW:
            seen = seen & (distance < WINDOW)
        s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen so far: no -inf - -inf
        p, decay, top = tl.exp2(s - safe[:, None]), tl.exp2(top - safe), new_top
        sums = sums * decay[:, None] + p  # summed over tokens after the loop, to spare a reduction in it
        if vs_ptr is not None:  # columns in an order that lets a thread take several neighbouring bytes at once
            p *= tl.load(vs_ptr + pos, live, other=0)[None, :]
            values = values.reshape(BLOCK_N, BLOCK_D // BYTES, BYTES).permute(0, 2, 1).reshape(BLOCK_N, BLOCK_D)
        acc = tl.dot(p.to(q.dtype), values.to(q.dtype), acc * decay[:, None], input_precision="ieee")
    if vs_ptr is not None:
        acc = acc.reshape(M, BYTES, BLOCK_D // BYTES).permute(0, 2, 1).reshape(M, BLOCK_D)
    return top, tl.sum(sums, 1), acc

@jit
def _combine(part_ptr, counter_ptr, chunk, n_chunks, mask, top, total, acc, D: tl.constexpr, ROWS: tl.constexpr):
    """Leave this chunk's result in scratch memory; the last program of a row to get here sums them all."""
    r, d = tl.arange(0, acc.shape[0]), tl.arange(0, acc.shape[1])[None, :]
    mask_d = mask[:, None] & (d < D)
    here = part_ptr + (tl.program_id(0).to(tl.int64) * ROWS + r) * (D + 8)
    tl.store(here[:, None] + d, acc, mask_d)
    tl.store(here + D, top, mask)
    tl.store(here + D + 1, total, mask)
    tl.debug_barrier()  # every thread's part is written before one of them counts
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == n_chunks - 1
    if last:
        tl.store(counter_ptr, 0)
        AT_ONCE: tl.constexpr = max(1, 8192 // (acc.shape[0] * acc.shape[1]))  # loads that wait for memory together
        top, total, acc = tl.full(top.shape, float("-inf"), tl.float32), tl.zeros_like(total), tl.zeros_like(acc)
        for first in tl.range(0, n_chunks, AT_ONCE, num_stages=1):
            for i in tl.static_range(AT_ONCE):  # .cg: past L1, which does not see what other SMs wrote
                part, live = here + (first + i - chunk) * ROWS * (D + 8), mask & (first + i < n_chunks)
                part_acc = tl.load(part[:, None] + d, live[:, None] & (d < D), other=0, cache_modifier=".cg")
                part_top = tl.load(part + D, live, other=float("-inf"), cache_modifier=".cg")
                part_total = tl.load(part + D + 1, live, other=0, cache_modifier=".cg")
                new_top = tl.maximum(top, part_top)
                safe = tl.where(new_top == float("-inf"), 0.0, new_top)
                decay, grow, top = tl.exp2(top - safe), tl.exp2(part_top - safe), new_top
                total, acc = total * decay + part_total * grow, acc * decay[:, None] + part_acc * grow[:, None]
    return last, top, total, acc

@jit(do_not_specialize=["B", "S", "n_split"] + [f"stride_{x}{i}" for x in "qkvxyst" for i in range(3)])
def _flash_decode_kernel(  # x, y: new k, v; s, t: scales of k, v
        q_ptr, k_ptr, v_ptr, seqlens_ptr, x_ptr, y_ptr, s_ptr, t_ptr, slopes_ptr, sinks_ptr, out_ptr, lse_ptr, part_ptr,
        counter_ptr, scale, softcap, B, S, n_split, stride_q0, stride_q1, stride_q2, stride_k0, stride_k1, stride_k2,
        stride_v0, stride_v1, stride_v2, stride_x0, stride_x1, stride_x2, stride_y0, stride_y1, stride_y2, stride_s0,
        stride_s1, stride_t0, stride_t1, HKV: tl.constexpr, G: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
        CAUSAL: tl.constexpr, WINDOW: tl.constexpr, VEC: tl.constexpr, MIN_TILES: tl.constexpr, BLOCK_B: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    MBLOCKS: tl.constexpr = (G * T + BLOCK_M - 1) // BLOCK_M
    row, pair, chunk, n_chunks, n, start, end = _my_chunk(
        seqlens_ptr, B, S, n_split, 0 if x_ptr is None else T, T + WINDOW - 1 if WINDOW else 0, HKV * MBLOCKS,
        MIN_TILES, BLOCK_B, BLOCK_N)
    if row >= B:
        return
    # the dot's rows are this KV head's query heads times T tokens; int64 before any stride multiplies
    b, kv_head, d = row.to(tl.int64), (pair // MBLOCKS).to(tl.int64), tl.arange(0, BLOCK_D)[None, :]
    r = pair % MBLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    h, t, mask = kv_head * G + r // T, r % T, r < G * T
    mask_d = mask[:, None] & (d < D)
    q = tl.load(q_ptr + b * stride_q0 + (h * stride_q1 + t.to(tl.int64) * stride_q2)[:, None] + d, mask_d, other=0)
    # the caches' strides come divided by VEC, so that the compiler knows a multiple and loads 16 bytes at a time
    k_ptr += (b * stride_k0 + kv_head * stride_k1) * VEC
    v_ptr += (b * stride_v0 + kv_head * stride_v1) * VEC
    stride_kn, stride_vn = stride_k2 * VEC, stride_v2 * VEC
    if s_ptr is not None:
        s_ptr += b * stride_s0 + kv_head * stride_s1
        t_ptr += b * stride_t0 + kv_head * stride_t1
    if x_ptr is not None:
        if end > n - T:
            pos = n - T + tl.arange(0, 16)
            fits = (pos < n) & (pos >= start) & (pos < end)
            x, y = x_ptr + b * stride_x0 + kv_head * stride_x1, y_ptr + b * stride_y0 + kv_head * stride_y1
            _append(x, k_ptr, s_ptr, stride_x2, stride_kn, pos, fits, D, BLOCK_D)
            _append(y, v_ptr, t_ptr, stride_y2, stride_vn, pos, fits, D, BLOCK_D)
            tl.debug_barrier()
    top, acc = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    slope = None if slopes_ptr is None else tl.load(slopes_ptr + h, mask, other=0)
    if sinks_ptr is not None:  # a weight of 1 at the sink's score, in the first chunk
        top = tl.load(sinks_ptr + h, mask, other=float("-inf")) * LOG2E
        sums += ((tl.arange(0, BLOCK_N) == 0) & (chunk == 0))[None, :].to(tl.float32)
    top, total, acc = _attend(q, k_ptr, v_ptr, s_ptr, t_ptr, stride_kn, stride_vn, start, end, n, n - T + t, slope,
                              scale, softcap, top, sums, acc, CAUSAL and T > 1, WINDOW, D, BLOCK_N)
    last = True
    if n_chunks > 1:
        last, top, total, acc = _combine(part_ptr, counter_ptr + row * HKV * MBLOCKS + pair, chunk, n_chunks, mask, top,
                                         total, acc, D, min(BLOCK_M, G * T))
    if last:
        at, norm = (b * HKV * G + h) * T + t, tl.where(total == 0, 1.0, total)
        tl.store(out_ptr + at[:, None] * D + d, (acc / norm[:, None]).to(out_ptr.dtype.element_ty), mask_d)
        tl.store(lse_ptr + at, (top + tl.log2(norm)) / LOG2E, mask)

def _blocks(itemsize, D, rows, smem):
    """Tile sizes with which two programs fit an SM that has smem bytes of shared memory."""
    BLOCK_D = max(16, triton.next_power_of_2(D))
    most_rows = 16 if itemsize == 4 else 32 if itemsize == 1 or smem <= 65536 else 64
    BLOCK_M = min(max(16, triton.next_power_of_2(rows)), most_rows)
    BLOCK_N = (16384 if smem > 131072 else 8192) // (BLOCK_D * itemsize)
    BLOCK_N = min(128 if BLOCK_M == 16 else 64, max(32, BLOCK_N))
    stages = 1 + (smem // 2 - 6144) // (2 * BLOCK_N * BLOCK_D * itemsize)
    return dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, MIN_TILES=256 // BLOCK_N,
                num_warps=8 if smem > 65536 and (BLOCK_M > 16 or itemsize == 4) else 4,
                num_stages=max(2, min(4, stages)))

def _arguments(q, k_cache, v_cache, cache_seqlens, k, v, k_scale, v_scale, scale, causal, window, softcap, alibi_slopes,
               sinks, blocks, n_programs):
    """The kernel's grid size, and its arguments but the counters. n_programs: how many the GPU runs at once."""
    (B, Hq, T, D), (_, Hkv, S, _), G = q.shape, k_cache.shape, q.shape[1] // k_cache.shape[1]
    pairs = B * Hkv * triton.cdiv(G * T, blocks["BLOCK_M"])
    # few pairs: as many chunks as run at once. Many: several waves of them, so that an uneven last one matters little
    n_split = n_programs - pairs if 2 * pairs <= n_programs else 4 * n_programs
    vec = math.gcd(16, *k_cache.stride()[:3], *v_cache.stride()[:3])
    strides = {f"stride_{name}{i}": 0 if x is None else x.stride(i) // unit for name, x, unit, dims in (
        ("q", q, 1, 3), ("k", k_cache, vec, 3), ("v", v_cache, vec, 3), ("x", k, 1, 3), ("y", v, 1, 3),
        ("s", k_scale, 1, 2), ("t", v_scale, 1, 2)) for i in range(dims)}
    return n_split + pairs, dict(
        q_ptr=q, k_ptr=k_cache, v_ptr=v_cache, seqlens_ptr=cache_seqlens, x_ptr=k, y_ptr=v, s_ptr=k_scale,
        t_ptr=v_scale, slopes_ptr=alibi_slopes, sinks_ptr=sinks, out_ptr=q.new_empty(q.shape),
        lse_ptr=q.new_empty(q.shape[:3], dtype=torch.float32),
        part_ptr=q.new_empty((n_split + pairs, min(blocks["BLOCK_M"], G * T), D + 8), dtype=torch.float32),
        scale=D ** -0.5 if scale is None else float(scale), softcap=softcap, B=B, S=S, n_split=n_split, HKV=Hkv, G=G,
        T=T, D=D, CAUSAL=causal, WINDOW=window or 0, VEC=vec, BLOCK_B=triton.next_power_of_2(B), **strides, **blocks)

_zeros = {}

def _counters(device, n):
    """At least n zeros, which every launch leaves at zero: a set per stream, and one for a device's captured graphs."""
    n, capturing = max(4096, triton.next_power_of_2(n)), torch.cuda.is_current_stream_capturing()
    key = device, "graph" if capturing else torch.cuda.current_stream(device).cuda_stream, n
    if key not in _zeros:
        if capturing:  # nothing was launched before: every replay zeroes its own
            return torch.zeros(n, dtype=torch.int32, device=device)
        for new in {key, (device, "graph", n)} - _zeros.keys():
            _zeros[new] = torch.zeros(n, dtype=torch.int32, device=device)
    return _zeros[key]

def _flash_decode_triton(q, k_cache, *args, blocks=None, n_programs=None):
    """Launch the kernel. blocks and n_programs are for tests: they stand for a device that is not there."""
    if blocks is None:
        gpu, rows = torch.cuda.get_device_properties(q.device), q.shape[1] // k_cache.shape[1] * q.shape[2]
        blocks = _blocks(k_cache.element_size(), q.shape[3], rows, gpu.shared_memory_per_multiprocessor)
        n_programs = 2 * gpu.multi_processor_count
    grid, arguments = _arguments(q, k_cache, *args, blocks, n_programs)
    with torch.cuda.device_of(q):
        _flash_decode_kernel[(grid,)](**arguments, counter_ptr=_counters(q.device, grid))
    return arguments["out_ptr"], arguments["lse_ptr"]

# --- int8 and int4 weights times a few vectors ---
#
# One token multiplies every weight once: the time is that of reading them, so they stay packed until in registers.

def int8_linear_reference(x, w, scales):
    return F.linear(x.float(), w * scales[:, None].float()).to(x.dtype)

def int4_linear_reference(x, w, scales, zeros):
    nibbles = torch.stack((w & 15, w >> 4), -1).view(*scales.shape, -1).float() - 8  # (N, K / group, group)
    return F.linear(x.float(), (nibbles * scales[..., None] + zeros[..., None]).view(len(w), -1)).to(x.dtype)

def int8_linear(x, w, scales):
    """x [..., K] times int8 w [N, K] with a scale per output [N]: (x @ w.T) * scales, summed in float32; [..., N]."""
    if w.shape[1:] != x.shape[-1:] or scales.shape != w.shape[:1]:
        raise ValueError("int8_linear: needs x [..., K], w [N, K] and scales [N], "
                         f"got {[list(t.shape) for t in (x, w, scales)]}")
    return torch.ops.gpt_flash.quantized_linear(x, w, scales, None)

def int4_linear(x, w, scales, zeros):
    """x [..., K] times w, uint8 [N, K / 2] with the even k in the low nibble and the odd k in the high one, and scales
    and zeros [N, K / group] for groups of 32, 64 or 128: weight = (nibble - 8) * scale + zero. Result [..., N]."""
    (N, groups), K = scales.shape, x.shape[-1]
    if zeros.shape != scales.shape or w.shape != (N, K // 2) or K not in (32 * groups, 64 * groups, 128 * groups):
        raise ValueError("int4_linear: needs x [..., K], w [N, K / 2], scales and zeros [N, K / group], group 32, 64 "
                         f"or 128, got {[list(t.shape) for t in (x, w, scales, zeros)]}")
    return torch.ops.gpt_flash.quantized_linear(x, w, scales, zeros)

@jit
def _int8_linear_kernel(x_ptr, w_ptr, s_ptr, y_ptr, N, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    n, row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for at in tl.range(0, K, BLOCK_K, num_stages=4):
        k = at + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * K + k, k < K, other=0, eviction_policy="evict_last")
        w = tl.load(w_ptr + n.to(tl.int64)[:, None] * K + k[None, :], (n < N)[:, None] & (k < K)[None, :], other=0,
                    eviction_policy="evict_first")
        acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(acc, 1) * tl.load(s_ptr + n, n < N, other=0).to(tl.float32)
    tl.store(y_ptr + row * N + n, y.to(y_ptr.dtype.element_ty), n < N)

@jit
def _int4_linear_kernel(x_ptr, w_ptr, s_ptr, z_ptr, y_ptr, N, K: tl.constexpr, GROUP: tl.constexpr,
                        BLOCK_N: tl.constexpr, GROUPS: tl.constexpr):
    n, row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    acc = tl.zeros([BLOCK_N, GROUPS, GROUP // 2], tl.float32)
    for at in tl.range(0, K // GROUP, GROUPS, num_stages=4):
        g = at + tl.arange(0, GROUPS)
        inside, group = g < K // GROUP, n.to(tl.int64)[:, None] * (K // GROUP) + g[None, :]  # (BLOCK_N, GROUPS)
        live = (n < N)[:, None] & inside[None, :]
        x = tl.load(x_ptr + row * K + g[:, None] * GROUP + tl.arange(0, GROUP)[None, :], inside[:, None], other=0,
                    eviction_policy="evict_last")
        even, odd = tl.split(x.to(tl.float32).reshape(GROUPS, GROUP // 2, 2))
        w = tl.load(w_ptr + group[:, :, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, None, :],
                    live[:, :, None], other=0, eviction_policy="evict_first")
        s = tl.load(s_ptr + group, live, other=0, eviction_policy="evict_first").to(tl.float32)
        z = tl.load(z_ptr + group, live, other=0, eviction_policy="evict_first").to(tl.float32)
        dot = ((w & 15).to(tl.float32) - 8) * even[None, :, :] + ((w >> 4).to(tl.float32) - 8) * odd[None, :, :]
        acc += dot * s[:, :, None] + (even + odd)[None, :, :] * z[:, :, None]
    tl.store(y_ptr + row * N + n, tl.sum(tl.sum(acc, 2), 1).to(y_ptr.dtype.element_ty), n < N)

def _linear_arguments(x, w, scales, zeros=None):
    """The kernel, its grid and its arguments."""
    N, K, x = len(w), x.shape[-1], x.contiguous()
    arguments = dict(x_ptr=x, w_ptr=w, s_ptr=scales, y_ptr=x.new_empty(*x.shape[:-1], N), N=N, K=K, BLOCK_N=8)
    grid = triton.cdiv(N, 8), x.numel() // K
    if zeros is None:
        return _int8_linear_kernel, grid, dict(arguments, BLOCK_K=1024)
    group = K // scales.shape[1]
    return _int4_linear_kernel, grid, dict(arguments, z_ptr=zeros, GROUP=group, GROUPS=1024 // group)

def _linear(x, w, scales, zeros):
    if not triton or not x.is_cuda or x.numel() > 16 * x.shape[-1]:
        return int8_linear_reference(x, w, scales) if zeros is None else int4_linear_reference(x, w, scales, zeros)
    kernel, grid, arguments = _linear_arguments(x, w, scales, zeros)
    with torch.cuda.device_of(x):
        kernel[grid](**arguments)
    return arguments["y_ptr"]

_operator("quantized_linear", "(Tensor x, Tensor w, Tensor scales, Tensor? zeros) -> Tensor", _linear,
          lambda x, w, *_: x.new_empty(*x.shape[:-1], w.shape[0]))

if __name__ == "__main__":  # the report is not part of a copy of this file
    path = pathlib.Path(__file__).resolve().with_name("benchmarks") / "report.py"
    if not path.exists():
        print(f"kernels.py: error: --report needs {path}: run it in gpt-flash's own folder", file=sys.stderr)
        sys.exit(2)
    sys.modules["kernels"] = sys.modules["__main__"]  # what the report imports
    runpy.run_path(str(path), run_name="__main__")
