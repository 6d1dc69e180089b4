"""The gated delta rule: layers whose memory of a text is one matrix a head (Yang et al.,
arXiv 2412.06464). To lift it, copy this file: it needs torch and triton only.

With S [Dk, Dv] of a head, and of each token q, k (of length 1), v, a gate g <= 0 and beta:

    S = exp(g) S;   u = beta (v - k S);   S = S + k^T u;   o = q S

What u a token has does not depend on those behind it. So a row's memory is kept as the state of
its first `folded` tokens, and k, u and g of the 16 to 47 tokens behind these: a step reads the
state and writes it once in 16 tokens only, and a token that was wrong is one that the next step
writes over, as in a cache of keys. Rows may go back by the last 16 tokens that were written."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:
    triton = None

    def jit(fn: Any) -> Any:
        return fn

BLOCK = 16  # tokens that go into the state together, and that a row may go back
TILE = 32  # values of a head that a program of the kernel has
PLACES = 3 * BLOCK  # of tokens that are not in the state: position p at place p % PLACES
CHUNK = 64  # tokens of a prompt that are multiplied together
SEGMENT = 16 * CHUNK  # whose products are in memory together


class Memory(NamedTuple):
    """What a layer keeps of B rows."""

    state: Tensor  # [B, Hv, Dk, Dv] float32: of the first `folded` tokens
    keys: Tensor  # [B, Hk, PLACES, Dk] float32: k of those behind them
    updates: Tensor  # [B, Hv, PLACES, Dv] float32: u
    gates: Tensor  # [B, Hv, PLACES] float32: g
    inputs: Tensor  # [B, BLOCK + K, C]: the last inputs of the convolution, p at p % (BLOCK + K)
    # [B, programs] int32, a multiple of BLOCK: the same for each of the kernel's programs of a row,
    # as one may end before another begins
    folded: Tensor

    @classmethod
    def allocate(
        cls, n_rows: int, heads: tuple[int, int], sizes: tuple[int, int], kernel: tuple[int, int],
        dtype: torch.dtype, device: torch.device | str,
    ) -> Memory:
        """heads: Hk, Hv. sizes: Dk, Dv. kernel: C, K of the convolution."""
        (Hk, Hv), (Dk, Dv), (C, K) = heads, sizes, kernel
        return cls(
            torch.zeros(n_rows, Hv, Dk, Dv, device=device),
            torch.zeros(n_rows, Hk, PLACES, Dk, device=device),
            torch.zeros(n_rows, Hv, PLACES, Dv, device=device),
            torch.zeros(n_rows, Hv, PLACES, device=device),
            torch.zeros(n_rows, BLOCK + K, C, dtype=dtype, device=device),
            torch.zeros(n_rows, Hv * -(-Dv // TILE), dtype=torch.int32, device=device),
        )


def foldable(position: Any) -> Any:
    """How many tokens of a row go into its state where its next one stands at this position: all
    whole blocks but the last."""
    return position // BLOCK * BLOCK - BLOCK


def reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition: q, k [B, T, H, Dk] (k of length 1), v [B, T, H, Dv], g, beta [B, T, H],
    state [B, H, Dk, Dv], all float32 -> o [B, T, H, Dv] and the new state."""
    out = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        read = (k[:, t, :, None] @ state)[:, :, 0]  # (B, H, Dv)
        u = beta[:, t, :, None] * (v[:, t] - read)
        state = state + k[:, t, :, :, None] * u[:, :, None]
        out.append((q[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(out, 1), state


def convolved(window: Tensor, weight: Tensor, memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
    """window [..., K - 1 + T, C]: inputs, K - 1 of them before the new ones; weight [C, K] -> q, k
    [..., T, Hk, Dk], v [..., T, Hv, Dv] in float32; q and k of length 1, q divided by sqrt(Dk)."""
    K = weight.shape[1]
    T = window.shape[-2] - K + 1
    window, weight = window.float(), weight.float()
    y = window.narrow(-2, 0, T) * weight[:, 0]
    for i in range(1, K):
        y = y + window.narrow(-2, i, T) * weight[:, i]
    (Hk, _, Dk), (Hv, _, Dv) = memory.keys.shape[-3:], memory.updates.shape[-3:]
    q, k, v = F.silu(y).split([Hk * Dk, Hk * Dk, Hv * Dv], -1)
    q, k = (unit(x.unflatten(-1, (Hk, Dk))) for x in (q, k))
    return q * Dk ** -0.5, k, v.unflatten(-1, (Hv, Dv))


def unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def absorb(state: Tensor, k: Tensor, u: Tensor, g: Tensor) -> Tensor:
    """The state [..., Hv, Dk, Dv] after n tokens more: k [..., Hk, n, Dk], u [..., Hv, n, Dv] and
    g [..., Hv, n], where g and k are 0 for a token that is none."""
    total = g.cumsum(-1)
    left = (total[..., -1:] - total).exp()[..., None]  # (..., Hv, n, 1)
    return state * total[..., -1:, None].exp() + (for_values(k, g) * left).mT @ u


def for_values(x: Tensor, like: Tensor) -> Tensor:
    """x [..., Hk, n, D] of each key head, for its value heads: [..., Hv, n, D]."""
    return x.repeat_interleave(like.shape[-2] // x.shape[-3], -3)

# --- decode ---


def decode(
    x: Tensor, g: Tensor, beta: Tensor, weight: Tensor, input_pos: Tensor, *memory: Tensor
) -> Tensor:
    """T new tokens, 1 to BLOCK, of each row behind its first input_pos [B]: x [B, T, C] are the
    inputs of the convolution, g, beta [B, T, Hv] float32, weight [C, K] -> [B, T, Hv, Dv] float32.
    memory: the tensors of a Memory, which then has the tokens. A row at 0 begins anew; at a
    position that its memory has let go of, what it gets is nobody's."""
    if triton and x.is_cuda:
        return decode_triton(x, g, beta, weight, input_pos, Memory(*memory))
    rows = [
        decode_row(x[b], g[b], beta[b], weight, p, Memory(*(part[b] for part in memory)))
        for b, p in enumerate(input_pos.tolist())
    ]
    return torch.stack(rows)


def decode_row(
    x: Tensor, g: Tensor, beta: Tensor, weight: Tensor, p: int, memory: Memory
) -> Tensor:
    """decode of one row at p, token by token: each is what it would be alone, to the bit."""
    T, K = len(x), weight.shape[1]
    folded = fold(p, T, memory)
    R = len(memory.inputs)
    before = memory.inputs[[(p - i) % R for i in range(K - 1, 0, -1)]]  # (K - 1, C)
    before[:max(0, K - 1 - p)] = 0
    memory.inputs[[(p + t) % R for t in range(T)]] = x
    window = torch.cat([before, x])  # (K - 1 + T, C)
    out = []
    for t in range(T):
        qkv = [part[0] for part in convolved(window[t:t + K], weight, memory)]
        out.append(decode_token(*qkv, g[t], beta[t], p + t, folded, memory))
    return torch.stack(out)


def fold(p: int, T: int, memory: Memory) -> int:
    """Put into a row's state what is to be there at position p -> how many tokens are."""
    folded, target = int(memory.folded[0]), max(0, foldable(p))
    if p == 0:
        memory.state.zero_()
    elif folded < target and p - folded < PLACES:
        place = slice(folded % PLACES, folded % PLACES + BLOCK)
        block = (part[:, place] for part in memory[1:4])
        memory.state.copy_(absorb(memory.state, *block))
        folded += BLOCK
    if not folded <= p < folded + PLACES - T + 1 or p == 0:  # it is nobody's
        folded = target
    memory.folded.fill_(folded)
    return folded


def decode_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, p: int, folded: int, memory: Memory
) -> Tensor:
    """q, k [Hk, Dk], v [Hv, Dv], g, beta [Hv] of the token at p -> its output [Hv, Dv]."""
    kq = torch.stack((k, q), 1)  # (Hk, 2, Dk)
    total = g[:, None]  # (Hv, 1)
    gates = behind(memory.gates, folded, p).cumsum(-1)  # (Hv, n)
    if p > folded:
        total = total + gates[:, -1:]
    read = for_values(kq, v) @ memory.state * total[..., None].exp()  # (Hv, 2, Dv)
    if p > folded:
        scores = kq @ behind(memory.keys, folded, p).mT  # (Hk, 2, n)
        scores = for_values(scores, v) * (total - gates).exp()[:, None]
        read = read + scores @ behind(memory.updates, folded, p)
    u = beta[:, None] * (v - read[:, 0])
    place = p % PLACES
    memory.keys[:, place], memory.updates[:, place], memory.gates[:, place] = k, u, g
    own = (q * k).sum(-1).repeat_interleave(len(v) // len(k))[:, None]  # (Hv, 1)
    return read[:, 1] + own * u


def behind(x: Tensor, folded: int, p: int) -> Tensor:
    """What x [H, PLACES, ...] has of the tokens from `folded` to before p: [H, p - folded, ...]."""
    start, n = folded % PLACES, p - folded
    if start + n <= PLACES:
        return x.narrow(1, start, n)
    return torch.cat([x[:, start:], x[:, :start + n - PLACES]], 1)

# --- decode, in Triton: one launch ---


@jit
def _convolved(
    x_ptr, inputs_ptr, weight_ptr, channel, mask, t, p, C, T: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr,
):
    """Some channels of a row's token t, which stands at p + t, in float32, and what is new of it,
    for the memory."""
    y = tl.zeros_like(channel).to(tl.float32)
    for i in tl.static_range(K):
        at = t + i - (K - 1)
        old = tl.load(inputs_ptr + (p + at + R) % R * C + channel,
                      mask=mask & (at < 0) & (p + at >= 0), other=0).to(tl.float32)
        new = tl.load(x_ptr + at * C + channel, mask=mask & (at >= 0), other=0).to(tl.float32)
        y += (old + new) * tl.load(weight_ptr + channel * K + i, mask=mask, other=0).to(tl.float32)
    x = tl.load(x_ptr + t * C + channel, mask=mask, other=0)
    tl.store(inputs_ptr + (p + t) % R * C + channel, x, mask=mask)
    return y * tl.sigmoid(y)


@jit
def _fold(
    state_ptr, keys_ptr, updates_ptr, gates_ptr, folded, p, dk, dv, in_k, in_v, T: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr,
):
    """A part of the state at position p, and how many tokens it has: a block of them goes in."""
    in_state = in_k[:, None] & in_v[None]
    state = tl.load(state_ptr, mask=in_state & (p > 0), other=0)
    target = tl.maximum(p // BLOCK * BLOCK - BLOCK, 0)
    if (folded < target) & (p - folded < PLACES):
        for i in range(BLOCK):
            place = (folded + i) % PLACES
            k = tl.load(keys_ptr + place * DK + dk, mask=in_k, other=0)
            u = tl.load(updates_ptr + place * DV + dv, mask=in_v, other=0)
            state = state * tl.exp(tl.load(gates_ptr + place)) + k[:, None] * u[None]
        folded += BLOCK
        tl.store(state_ptr, state, mask=in_state)
    if p == 0:
        tl.store(state_ptr, state, mask=in_state)
    if (p == 0) | (p < folded) | (p + T > folded + PLACES):
        folded = target
    return state, folded


@jit
def _decode_kernel(
    x_ptr, g_ptr, beta_ptr, weight_ptr, pos_ptr, state_ptr, keys_ptr, updates_ptr, gates_ptr,
    inputs_ptr, folded_ptr, out_ptr, C, T: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """A program has TILE values of a head of a row. It alone reads and writes its part of state,
    updates and folded; keys, gates and inputs it writes as its neighbours do."""
    b, h, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dk = tl.arange(0, BLOCK_K)
    dv = tile * TILE + tl.arange(0, TILE)
    in_k, in_v = dk < DK, dv < DV
    p = tl.load(pos_ptr + b)
    folded_ptr += (b * HV + h) * tl.cdiv(DV, TILE) + tile
    folded = tl.load(folded_ptr)
    state_ptr += (b * HV + h).to(tl.int64) * DK * DV + dk[:, None] * DV + dv[None]
    keys_ptr += (b * HK + h // (HV // HK)).to(tl.int64) * PLACES * DK
    updates_ptr += (b * HV + h).to(tl.int64) * PLACES * DV
    gates_ptr += (b * HV + h) * PLACES
    x_ptr += b.to(tl.int64) * T * C
    inputs_ptr += b.to(tl.int64) * R * C

    state, folded = _fold(state_ptr, keys_ptr, updates_ptr, gates_ptr, folded, p, dk, dv, in_k,
                          in_v, T, DK, DV, BLOCK, PLACES)
    tl.store(folded_ptr, folded)

    # what is behind it, in order
    n = p - folded
    i = tl.arange(0, WINDOW)
    place = (folded + i) % PLACES
    there = i < n
    keys = tl.load(keys_ptr + place[:, None] * DK + dk[None], other=0,
                   mask=there[:, None] & in_k[None])
    updates = tl.load(updates_ptr + place[:, None] * DV + dv[None], other=0,
                      mask=there[:, None] & in_v[None])
    gates = tl.load(gates_ptr + place, mask=there, other=0)
    key_channel = h // (HV // HK) * DK + dk
    for t in range(T):
        q = _convolved(x_ptr, inputs_ptr, weight_ptr, key_channel, in_k, t, p, C, T, K, R)
        k = _convolved(x_ptr, inputs_ptr, weight_ptr, HK * DK + key_channel, in_k, t, p, C, T, K,
                       R)
        v = _convolved(x_ptr, inputs_ptr, weight_ptr, 2 * HK * DK + h * DV + dv, in_v, t, p, C, T,
                       K, R)
        q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * DK ** -0.5
        k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
        at = (b * T + t) * HV + h
        g, beta = tl.load(g_ptr + at), tl.load(beta_ptr + at)
        mine = i == n + t
        gates = tl.where(mine, g, gates)
        total = tl.sum(gates, 0)
        decay, kept = tl.exp(total - tl.cumsum(gates, 0)), tl.exp(total)
        weights = tl.sum(keys * k[None], 1) * decay  # 0 where there is no token yet
        read = tl.sum(state * k[:, None], 0) * kept + tl.sum(updates * weights[:, None], 0)
        u = beta * (v - read)
        keys = tl.where(mine[:, None], k[None], keys)
        updates = tl.where(mine[:, None], u[None], updates)
        weights = tl.sum(keys * q[None], 1) * decay
        out = tl.sum(state * q[:, None], 0) * kept + tl.sum(updates * weights[:, None], 0)
        to = (p + t) % PLACES
        tl.store(keys_ptr + to * DK + dk, k, mask=in_k)
        tl.store(updates_ptr + to * DV + dv, u, mask=in_v)
        tl.store(gates_ptr + to, g)
        tl.store(out_ptr + at.to(tl.int64) * DV + dv, out, mask=in_v)


def decode_triton(
    x: Tensor, g: Tensor, beta: Tensor, weight: Tensor, input_pos: Tensor, memory: Memory
) -> Tensor:
    (B, T, C), K = x.shape, weight.shape[1]
    (_, Hk, _, Dk), (_, Hv, _, Dv) = memory.keys.shape, memory.updates.shape
    out = torch.empty(B, T, Hv, Dv, device=x.device)
    inputs = [each.contiguous() for each in (x, g, beta, weight, input_pos)]
    _decode_kernel[(B, Hv, triton.cdiv(Dv, TILE))](
        *inputs, *memory, out, C, T=T, K=K, R=BLOCK + K, HK=Hk, HV=Hv, DK=Dk, DV=Dv,
        BLOCK_K=triton.next_power_of_2(Dk), TILE=TILE, BLOCK=BLOCK, PLACES=PLACES, WINDOW=64,
    )
    return out

# --- prefill ---


def prefill(
    x: Tensor, g: Tensor, beta: Tensor, weight: Tensor, input_pos: Tensor, last: Tensor | None,
    *parts: Tensor,
) -> Tensor:
    """decode of any number of tokens. last [B]: the position of each row's last token, what is
    behind it is padding; below input_pos: the row has none. None: all T are tokens."""
    memory = Memory(*parts)
    B, T, C = x.shape
    K, R = weight.shape[1], memory.inputs.shape[1]
    start = input_pos.long()[:, None]  # (B, 1)
    end = start + T if last is None else last.long()[:, None] + 1
    index = start + torch.arange(T, device=x.device)  # (B, T)
    where = start + torch.arange(1 - K, 0, device=x.device)  # (B, K - 1)
    before = memory.inputs.gather(1, (where % R)[..., None].expand(-1, -1, C))
    before = before.masked_fill(where[..., None] < 0, 0)
    q, k, v = (y.transpose(1, 2) for y in convolved(torch.cat([before, x], 1), weight, memory))
    is_token = (index < end)[..., None]  # (B, T, 1)
    g, beta = ((y * is_token).transpose(1, 2) for y in (g, beta))  # (B, Hv, T)

    # from what the memory has: the state before the new tokens, and the one that is to be kept
    held = memory.folded[:, :1].long().masked_fill(start == 0, 0)
    kept = torch.maximum(foldable(end), held)
    whole = resumed(memory, start, held, start)
    folded = resumed(memory, start, held, torch.minimum(start, kept))
    inside = (index < kept)[:, None]  # (B, 1, T)
    out, updates = torch.empty_like(v), torch.empty_like(v)
    for first in range(0, T, SEGMENT):
        part = slice(first, min(first + SEGMENT, T))
        inputs = (each[:, :, part] for each in (q, k, v, g, beta, inside))
        out[:, :, part], updates[:, :, part], whole, folded = chunks(*inputs, whole, folded)

    has_some = end > start  # (B, 1)
    memory.state.copy_(torch.where(has_some[..., None, None], folded, memory.state))
    memory.folded.copy_(torch.where(has_some, kept, memory.folded))
    for tensor, new in zip(memory[1:4], (k, updates, g)):
        keep_last(tensor, new, start, end)
    keep_last(memory.inputs[:, None], x[:, None], start, end)
    return out.transpose(1, 2)


def resumed(memory: Memory, start: Tensor, held: Tensor, upto: Tensor) -> Tensor:
    """The states after each row's first `upto` tokens: those of its first `held` ones, and what
    is kept behind; all [B, 1]. Nothing where a row begins anew."""
    index = held + torch.arange(PLACES, device=held.device)  # (B, PLACES)
    parts = []
    for part in memory[1:4]:
        shape = index.shape[0], 1, PLACES, *[1] * (part.dim() - 3)
        behind = part.gather(2, (index % PLACES).view(shape).expand_as(part))
        parts.append(behind.masked_fill((index >= upto).view(shape), 0))
    return absorb(memory.state.masked_fill((start == 0)[..., None, None], 0), *parts)


def chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, inside: Tensor, whole: Tensor,
    folded: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens behind the state `whole`, CHUNK of them at a time: all of what they do to each other
    is a triangular system (Yang et al., arXiv 2406.06484). inside [B, 1, T]: which of them are to
    be in the state `folded` -> outputs and u [B, Hv, T, Dv], and the two states."""
    T, Dv = v.shape[2:]
    n = -(-T // CHUNK)
    q, k, v = (F.pad(x, (0, 0, 0, n * CHUNK - T)).unflatten(2, (n, CHUNK)) for x in (q, k, v))
    g, beta, inside = (
        F.pad(x, (0, n * CHUNK - T)).unflatten(2, (n, CHUNK)) for x in (g, beta, inside)
    )
    group = v.shape[1] // k.shape[1]
    keys, q = k.repeat_interleave(group, 1), q.repeat_interleave(group, 1)
    total = g.cumsum(-1)  # (B, Hv, n, CHUNK)
    decay = (total[..., None] - total[..., None, :]).tril().exp().tril()
    system = (keys * beta[..., None]) @ keys.mT * decay  # below the diagonal, which counts as 1
    right = torch.cat([v, keys * total.exp()[..., None]], -1) * beta[..., None]
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    alone, seen = solved[..., :Dv], solved[..., Dv:]
    scores = q @ keys.mT * decay
    q = q * total.exp()[..., None]
    out, updates = torch.empty_like(v), torch.empty_like(v)
    for i in range(n):
        u = alone[:, :, i] - seen[:, :, i] @ whole
        out[:, :, i] = q[:, :, i] @ whole + scores[:, :, i] @ u
        updates[:, :, i] = u
        whole = absorb(whole, k[:, :, i], u, g[:, :, i])
        counts = inside[:, :, i]
        folded = absorb(folded, k[:, :, i] * counts[..., None], u, g[:, :, i] * counts)
    out, updates = (x.flatten(2, 3)[:, :, :T] for x in (out, updates))
    return out, updates, whole, folded


def keep_last(tensor: Tensor, new: Tensor, start: Tensor, end: Tensor) -> None:
    """Put what counts of new [B, H, T, ...], the tokens start to end [B, 1], to their places in
    tensor [B, H, S, ...]: each takes the last token that falls on it, or keeps its own."""
    S = tensor.shape[2]
    last = end - 1
    token = last - (last - torch.arange(S, device=last.device)) % S - start  # (B, S)
    token = token.view(len(token), 1, S, *[1] * (tensor.dim() - 3))
    taken = new.gather(2, token.clamp(min=0).expand_as(tensor))
    tensor.copy_(torch.where(token >= 0, taken, tensor))


def prefill_fake(x: Tensor, g: Tensor, beta: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    *_, updates, _, _, _ = rest
    return x.new_empty((*g.shape, updates.shape[-1]), dtype=torch.float32)


TENSORS = "Tensor x, Tensor g, Tensor beta, Tensor weight, Tensor input_pos, "
MEMORY = ", ".join(f"Tensor({a}!) {name}" for a, name in zip("abcdef", Memory._fields))
for name, run, more in ("decode", decode, ""), ("prefill", prefill, "Tensor? last, "):
    torch.library.define(f"gpt_flash::delta_{name}", f"({TENSORS}{more}{MEMORY}) -> Tensor")
    torch.library.impl(f"gpt_flash::delta_{name}", "default", run)
    torch.library.register_fake(f"gpt_flash::delta_{name}", prefill_fake)
