"""Decode attention whose cost follows the tokens that are cached, not the room that was allocated for them.

Decoding one token reads every live key and value once and does next to no arithmetic with them: B * Hkv * len * D * 2 *
itemsize bytes a layer, 134 MB for Llama-3-8B at 32k tokens. Reading them at the memory's full speed takes every SM, and
at batch 1 there are far fewer heads than SMs, so the live length itself has to be split.

flash_decode            the operator: Triton on a GPU, PyTorch elsewhere; eager, torch.compile and CUDA graphs
flash_decode_reference  the same in plain PyTorch: the definition of what is right
quantize_kv             how keys and values become int8
"""
import math

import torch
from torch import Tensor

# --- attention: what is right ---

def quantize_kv(x):
    """[..., D] -> int8 of that shape and a float32 scale per vector [...]: scale = max|x| / 127, value = x / scale."""
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    return torch.round(x / scale.clamp_min(1e-30)).to(torch.int8), scale.squeeze(-1)

def flash_decode_reference(q, k_cache, v_cache, cache_seqlens, k=None, v=None, *, k_scale=None, v_scale=None, scale=None,
                           causal=True, window=None, softcap=None, alibi_slopes=None, sinks=None, return_lse=False):
    """flash_decode's definition: the same signature and results, in float32 over the whole cache, on any device."""
    (B, Hq, T, D), (Hkv, S), lens = q.shape, k_cache.shape[1:3], cache_seqlens.long()
    if k is not None:  # append the new tokens at each row's own position
        row, pos = torch.arange(B, device=q.device)[:, None], lens[:, None] + torch.arange(T, device=q.device)  # (B, T)
        for x, cache, scales in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
            if scales is not None:
                x, s = quantize_kv(x)
                scales[row, :, pos] = s.transpose(1, 2)
            cache[row, :, pos] = x.transpose(1, 2)
        lens = lens + T
    live = torch.arange(S, device=q.device) < lens[:, None]                                   # (B, S)
    keys, values = (torch.where(live[:, None, :, None], c.float() if s is None else c * s[..., None], 0)
                    .repeat_interleave(Hq // Hkv, 1) for c, s in ((k_cache, k_scale), (v_cache, v_scale)))
    scores = q.float() @ keys.transpose(-1, -2) * (D ** -0.5 if scale is None else scale)      # (B, Hq, T, S)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # how far each key lies behind each query; the queries are the last T of the row's positions
    distance = (lens[:, None] - T + torch.arange(T, device=q.device))[..., None] - torch.arange(S, device=q.device)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None] * distance.abs()[:, None]
    seen = live[:, None] & (distance >= 0 if causal else True) & (True if window is None else distance < window)
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    lse = scores.logsumexp(-1)                                                                # (B, Hq, T)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks[:, None].float())
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
    out, lse = torch.ops.gpt_flash.flash_decode(q, k_cache, v_cache, cache_seqlens, k, v, k_scale, v_scale, scale,
                                                causal, window, softcap, alibi_slopes, sinks)
    return (out, lse) if return_lse else out

def _check(q, k_cache, v_cache, cache_seqlens, k, v, k_scale, v_scale, causal, window, softcap, alibi_slopes, sinks):
    def wrong(x, shape, *dtypes):
        return x.shape != shape or x.dtype not in dtypes or x.device != q.device
    if q.dim() != 4 or k_cache.dim() != 4:
        raise ValueError("flash_decode: q must be [B, Hq, T, D] and k_cache [B, Hkv, S, D], "
                         f"got {list(q.shape)} and {list(k_cache.shape)}")
    (B, Hq, T, D), (_, Hkv, S, _), int8 = q.shape, k_cache.shape, k_cache.dtype == torch.int8
    problem = (
        f"q's dtype must be bfloat16, float16 or float32, not {q.dtype}"
        if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) else
        f"T must be 1 to 16 tokens, got {T}" if not 1 <= T <= 16 else
        f"head size must be a multiple of 8 up to 256, got {D}" if D % 8 or not 8 <= D <= 256 else
        f"query heads must be a multiple of KV heads, got {Hq} and {Hkv}" if not Hkv or Hq % Hkv else
        f"k_cache and v_cache must be [{B}, {Hkv}, S, {D}] in q's dtype ({q.dtype}) or int8 on {q.device}, got "
        f"{list(k_cache.shape)} {k_cache.dtype} on {k_cache.device} and {list(v_cache.shape)} {v_cache.dtype}"
        if wrong(k_cache, (B, Hkv, S, D), q.dtype, torch.int8) or wrong(v_cache, (B, Hkv, S, D), k_cache.dtype) else
        f"cache_seqlens must be int32 [{B}] on {q.device}" if wrong(cache_seqlens, (B,), torch.int32) else
        "k and v go together" if (k is None) != (v is None) else
        f"k and v must be [{B}, {Hkv}, {T}, {D}] {q.dtype} on {q.device}"
        if k is not None and (wrong(k, (B, Hkv, T, D), q.dtype) or wrong(v, (B, Hkv, T, D), q.dtype)) else
        "k_scale and v_scale are needed exactly when the cache is int8"
        if not (k_scale is None) == (v_scale is None) == (not int8) else
        f"k_scale and v_scale must be [{B}, {Hkv}, {S}] float32"
        if int8 and any(wrong(s, (B, Hkv, S), torch.float32) for s in (k_scale, v_scale)) else
        f"alibi_slopes and sinks must be [{Hq}] float32"
        if any(x is not None and wrong(x, (Hq,), torch.float32) for x in (alibi_slopes, sinks)) else
        f"window must be at least 1 and needs causal=True, got {window} and causal={causal}"
        if window is not None and (window < 1 or not causal) else
        f"softcap must be above 0, got {softcap}" if softcap is not None and softcap <= 0 else
        "the last dimension of q, k, v and the caches must be contiguous"
        if any(x is not None and x.stride(-1) != 1 for x in (q, k_cache, v_cache, k, v)) else None)
    if problem:
        raise ValueError(f"flash_decode: {problem}")

_lib = torch.library.Library("gpt_flash", "FRAGMENT")
_lib.define("flash_decode(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor? k, Tensor? v, "
            "Tensor(c!)? k_scale, Tensor(d!)? v_scale, float? scale, bool causal, SymInt? window, float? softcap, "
            "Tensor? alibi_slopes, Tensor? sinks) -> (Tensor, Tensor)")

@torch.library.impl(_lib, "flash_decode", "CompositeExplicitAutograd")
def _flash_decode(q, k_cache, v_cache, cache_seqlens, k, v, k_scale, v_scale, *options):
    return _flash_decode_torch(q, k_cache, v_cache, cache_seqlens, k, v, k_scale, v_scale, *options)

@torch.library.register_fake("gpt_flash::flash_decode", lib=_lib)
def _(q, *_):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)

# --- attention in PyTorch: the CPU, and wherever Triton is not ---

def _flash_decode_torch(q, k_cache, v_cache, cache_seqlens, k, v, k_scale, v_scale, *options):
    """Reads the lengths on the host and touches only live tokens: all rows at once, or one by one where they differ."""
    lens, T, S = cache_seqlens.tolist(), q.shape[2] if k is not None else 0, k_cache.shape[2]
    if lens and max(lens) + T > S:
        raise ValueError(f"flash_decode: {max(lens)} cached + {T} new tokens do not fit into a cache of {S}")
    if len(set(lens)) == 1:
        return _attend_live(lens[0], q, k_cache, v_cache, k, v, k_scale, v_scale, *options)
    rows = [_attend_live(n, *(x if x is None else x[b:b + 1] for x in (q, k_cache, v_cache, k, v, k_scale, v_scale)),
                         *options) for b, n in enumerate(lens)]
    return tuple(torch.cat(x) for x in zip(*rows)) if rows else (torch.empty_like(q), q.new_empty(q.shape[:3]).float())

def _attend_live(n, q, k_cache, v_cache, k, v, k_scale, v_scale, scale, causal, window, softcap, alibi_slopes, sinks):
    (B, Hq, T, D), Hkv = q.shape, k_cache.shape[1]
    if k is not None:
        if k_scale is not None:
            (k, v), scales = quantize_kv(torch.stack((k, v)))
            k_scale.narrow(2, n, T).copy_(scales[0]), v_scale.narrow(2, n, T).copy_(scales[1])
        k_cache.narrow(2, n, T).copy_(k), v_cache.narrow(2, n, T).copy_(v)
        n += T
    start = 0 if window is None else max(0, n - T - window + 1)
    n -= start
    keys, values = k_cache.narrow(2, start, n), v_cache.narrow(2, start, n)
    dtype = q.dtype
    if k_scale is not None:  # in float32: as fast as in bf16 here, and one rounding less
        q, keys, values = q.float(), keys.float(), values.float()
        keys.mul_(k_scale.narrow(2, start, n)[..., None]), values.mul_(v_scale.narrow(2, start, n)[..., None])
    if softcap is not None or not q.is_cpu or n == 0:
        out, lse = flash_decode_reference(q, keys, values, torch.full((B,), n, device=q.device), scale=scale, causal=causal,
            window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, return_lse=True)
        return out.to(dtype), lse
    mask = None
    if T > 1 and causal or alibi_slopes is not None:
        distance = torch.arange(n - T, n)[:, None] - torch.arange(n)                           # (T, n)
        mask = torch.zeros(1, 1, T, n) if alibi_slopes is None else -alibi_slopes.view(Hkv, -1, 1, 1) * distance.abs()
        if causal:
            mask = mask.masked_fill((distance < 0) | (distance >= (window or n)), -math.inf)
        mask = mask.expand(-1, Hq // Hkv, T, n).reshape(1, -1, Hq // Hkv * T, n)
    # a KV head's query heads ride along as query rows, so that no key is repeated
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.reshape(B, Hkv, -1, D), keys, values, attn_mask=mask, scale=scale)
    out, lse = out.reshape(q.shape), lse.reshape(B, Hq, T)
    if causal and n < T:  # the first queries lie before the first position
        out[:, :, :T - n], lse[:, :, :T - n] = 0, -math.inf
    if sinks is not None:
        lse, seen = torch.logaddexp(lse, sinks[:, None]), lse
        out = out * (seen - lse).exp()[..., None].to(q.dtype)
    return out.to(dtype), lse
