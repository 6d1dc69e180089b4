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
# of tokens that are not in the state, position p at place p % PLACES: up to 47, and room for 16 new
# ones, so that a program of the kernel writes over none that another has yet to fold
PLACES = 4 * BLOCK
CHUNK = 64  # tokens of a prompt that are multiplied together
SEGMENT = 16 * CHUNK  # whose products are in memory together


class Memory(NamedTuple):
    """What a layer keeps of B rows."""

    state: Tensor  # [B, Hv, Dk, Dv] float32: of the first `folded` tokens
    keys: Tensor  # [B, Hk, PLACES, Dk] float32: k of those behind them
    updates: Tensor  # [B, Hv, PLACES, Dv] float32: u
    gates: Tensor  # [B, Hv, PLACES, 1] float32: g
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
        shapes = (Hv, Dk, Dv), (Hk, PLACES, Dk), (Hv, PLACES, Dv), (Hv, PLACES, 1)
        return cls(
            *(torch.zeros(n_rows, *shape, device=device) for shape in shapes),
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
    g [..., Hv, n, 1], where g and k are 0 for a token that is none."""
    later = g.flip(-2).cumsum(-2).flip(-2) - g  # the sum of those behind each
    left = for_values(k, g) * later.exp()
    return state * g.sum(-2, keepdim=True).exp() + left.mT @ u


def for_values(x: Tensor, like: Tensor) -> Tensor:
    """x [..., Hk, n, D] of each key head, for the value heads that like [..., Hv, n, D] has."""
    return x.repeat_interleave(like.shape[-3] // x.shape[-3], -3)

# --- decode ---


def decode(
    x: Tensor, g: Tensor, beta: Tensor, weight: Tensor, input_pos: Tensor, *memory: Tensor
) -> Tensor:
    """T new tokens, 1 to BLOCK, of each row behind its first input_pos [B]: x [B, T, C] are the
    inputs of the convolution, g, beta [B, T, Hv] float32, weight [C, K] -> [B, T, Hv, Dv] float32.
    Where a row goes on at what its memory has let go of, what it gets is nobody's."""
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
    T, K, R = len(x), weight.shape[1], len(memory.inputs)
    folded = fold(p, T, memory)
    before = memory.inputs[[(p - i) % R for i in range(K - 1, 0, -1)]]  # (K - 1, C)
    before[:max(0, K - 1 - p)] = 0
    memory.inputs[[(p + t) % R for t in range(T)]] = x
    window = torch.cat([before, x])  # (K - 1 + T, C)
    out = []
    for t in range(T):
        # q, k (Hk, Dk), v (Hv, Dv)
        q, k, v = (part[0] for part in convolved(window[t:t + K], weight, memory))
        keys, updates, gates = (behind(part, folded, p + t) for part in memory[1:4])
        total = g[t, :, None, None] + gates.sum(1, keepdim=True)  # (Hv, 1, 1)
        kq = torch.stack((k, q), 1)  # (Hk, 2, Dk)
        scores = for_values(kq @ keys.mT, gates) * (total - gates.cumsum(1)).exp().mT  # (Hv, 2, n)
        read = for_values(kq, gates) @ memory.state * total.exp() + scores @ updates  # (Hv, 2, Dv)
        u = beta[t, :, None] * (v - read[:, 0])
        for part, new in zip(memory[1:4], (k, u, g[t, :, None])):
            part[:, (p + t) % PLACES] = new
        own = (q * k).sum(-1, keepdim=True).repeat_interleave(len(v) // len(k), 0)  # (Hv, 1)
        out.append(read[:, 1] + own * u)
    return torch.stack(out)


def fold(p: int, T: int, memory: Memory) -> int:
    """Put into a row's state what is to be there at position p -> how many tokens are."""
    folded, target = int(memory.folded[0]), max(0, foldable(p))
    if p == 0:
        memory.state.zero_()
    elif folded < target and p - folded < PLACES:
        block = (behind(part, folded, folded + BLOCK) for part in memory[1:4])
        memory.state.copy_(absorb(memory.state, *block))
        folded += BLOCK
    if not 0 <= p - folded <= PLACES - T:  # begun anew, or nobody's
        folded = target
    memory.folded.fill_(folded)
    return folded


def behind(x: Tensor, first: int, last: int) -> Tensor:
    """What x [H, PLACES, D] has of the tokens from first to before last: [H, last - first, D]."""
    start, n = first % PLACES, last - first
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
def _unit(x):
    return x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)


@jit
def _fold(
    state_ptr, keys_ptr, updates_ptr, gates_ptr, folded_ptr, p, dk, dv, in_k, in_v,
    T: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr,
):
    """A part of the state at position p, and how many tokens it has: a block of them goes in."""
    in_state = in_k[:, None] & in_v[None]
    state = tl.load(state_ptr, mask=in_state & (p > 0), other=0)
    folded, target = tl.load(folded_ptr), tl.maximum(p // BLOCK * BLOCK - BLOCK, 0)
    more = (folded < target) & (p - folded < PLACES)
    if more:
        for i in range(BLOCK):
            place = (folded + i) % PLACES
            k = tl.load(keys_ptr + place * DK + dk, mask=in_k, other=0)
            u = tl.load(updates_ptr + place * DV + dv, mask=in_v, other=0)
            state = state * tl.exp(tl.load(gates_ptr + place)) + k[:, None] * u[None]
        folded += BLOCK
    if more | (p == 0):
        tl.store(state_ptr, state, mask=in_state)
    if (p < folded) | (p + T > folded + PLACES):
        folded = target
    tl.store(folded_ptr, folded)
    return state, folded


@jit
def _behind(ptr, folded, n, d, inside, D: tl.constexpr, PLACES: tl.constexpr):
    """Of the first n tokens behind the state, in order: [PLACES, d]; 0 where there is none."""
    i = tl.arange(0, PLACES)
    place = (folded + i) % PLACES
    return tl.load(ptr + place[:, None] * D + d[None], mask=(i < n)[:, None] & inside[None],
                   other=0)


@jit
def _read(x, state, keys, updates, decay, kept):
    weights = tl.sum(keys * x[None], 1) * decay
    return tl.sum(state * x[:, None], 0) * kept + tl.sum(updates * weights[:, None], 0)


@jit
def _decode_kernel(
    x_ptr, g_ptr, beta_ptr, weight_ptr, pos_ptr, state_ptr, keys_ptr, updates_ptr, gates_ptr,
    inputs_ptr, folded_ptr, out_ptr, C, T: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr,
):
    """A program has TILE values of a head of a row. It alone reads and writes its part of state,
    updates and folded; keys, gates and inputs it writes as its neighbours do."""
    b, h, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    dk, dv = tl.arange(0, BLOCK_K), tile * TILE + tl.arange(0, TILE)
    in_k, in_v = dk < DK, dv < DV
    key_head = h // (HV // HK)
    keys_ptr += (b * HK + key_head) * PLACES * DK
    updates_ptr += (b * HV + h) * PLACES * DV
    gates_ptr += (b * HV + h) * PLACES
    state_ptr += (b * HV + h) * DK * DV + dk[:, None] * DV + dv[None]
    folded_ptr += (b * HV + h) * tl.cdiv(DV, TILE) + tile
    x_ptr += b * T * C
    inputs_ptr += b * R * C

    p = tl.load(pos_ptr + b)
    state, folded = _fold(state_ptr, keys_ptr, updates_ptr, gates_ptr, folded_ptr, p, dk, dv, in_k,
                          in_v, T, DK, DV, BLOCK, PLACES)
    n = p - folded
    keys = _behind(keys_ptr, folded, n, dk, in_k, DK, PLACES)
    updates = _behind(updates_ptr, folded, n, dv, in_v, DV, PLACES)
    i = tl.arange(0, PLACES)
    gates = tl.load(gates_ptr + (folded + i) % PLACES, mask=i < n, other=0)
    channel = key_head * DK + dk
    for t in range(T):
        q = _convolved(x_ptr, inputs_ptr, weight_ptr, channel, in_k, t, p, C, T, K, R)
        k = _convolved(x_ptr, inputs_ptr, weight_ptr, HK * DK + channel, in_k, t, p, C, T, K, R)
        v = _convolved(x_ptr, inputs_ptr, weight_ptr, 2 * HK * DK + h * DV + dv, in_v, t, p, C, T,
                       K, R)
        at = (b * T + t) * HV + h
        g, k = tl.load(g_ptr + at), _unit(k)
        mine = i == n + t
        gates = tl.where(mine, g, gates)
        total = tl.sum(gates, 0)
        decay, kept = tl.exp(total - tl.cumsum(gates, 0)), tl.exp(total)
        # updates are 0 where there is no token yet
        u = tl.load(beta_ptr + at) * (v - _read(k, state, keys, updates, decay, kept))
        keys = tl.where(mine[:, None], k[None], keys)
        updates = tl.where(mine[:, None], u[None], updates)
        out = _read(_unit(q) * DK ** -0.5, state, keys, updates, decay, kept)
        tl.store(out_ptr + at * DV + dv, out, mask=in_v)
        place = (p + t) % PLACES
        tl.store(keys_ptr + place * DK + dk, k, mask=in_k)
        tl.store(updates_ptr + place * DV + dv, u, mask=in_v)
        tl.store(gates_ptr + place, g)


def kernel_arguments(
    x: Tensor, g: Tensor, beta: Tensor, weight: Tensor, input_pos: Tensor, memory: Memory
) -> dict[str, Any]:
    (B, T, C), K = x.shape, weight.shape[1]
    (_, Hk, _, Dk), (_, Hv, _, Dv) = memory.keys.shape, memory.updates.shape
    inputs = (each.contiguous() for each in (x, g, beta, weight, input_pos))
    tensors = *inputs, *memory, torch.empty(B, T, Hv, Dv, device=x.device)
    return dict(
        zip(_decode_kernel.arg_names, tensors), C=C, T=T, K=K, R=memory.inputs.shape[1],
        HK=Hk, HV=Hv, DK=Dk, DV=Dv, BLOCK_K=triton.next_power_of_2(Dk), TILE=TILE, BLOCK=BLOCK,
        PLACES=PLACES,
    )


def decode_triton(*inputs: Any) -> Tensor:
    arguments = kernel_arguments(*inputs)
    B, _, Hv, Dv = arguments["out_ptr"].shape
    _decode_kernel[(B, Hv, triton.cdiv(Dv, TILE))](**arguments)
    return arguments["out_ptr"]

# --- prefill ---


def prefill(
    x: Tensor, g: Tensor, beta: Tensor, weight: Tensor, input_pos: Tensor, last: Tensor | None,
    *memory: Tensor,
) -> Tensor:
    """decode of any number of tokens. last [B]: the position of each row's last token, what is
    behind it is padding; below input_pos: the row has none. None: all T are tokens."""
    T = x.shape[1]
    start = input_pos.long()[:, None]
    end = start + T if last is None else last.long()[:, None] + 1
    x, g, beta = (F.pad(each, (0, 0, 0, -T % CHUNK)) for each in (x, g, beta))
    out = []
    for first in range(0, T, SEGMENT):
        new = (each[:, first:first + SEGMENT] for each in (x, g, beta))
        until = end.minimum(start + first + SEGMENT)
        out.append(prefill_segment(*new, weight, start + first, until, Memory(*memory)))
    return torch.cat(out, 1)[:, :T]


def prefill_segment(
    x: Tensor, g: Tensor, beta: Tensor, weight: Tensor, start: Tensor, end: Tensor, memory: Memory
) -> Tensor:
    """prefill of some whole chunks from start [B, 1] on; tokens from end [B, 1] on are none."""
    K, R = weight.shape[1], memory.inputs.shape[1]
    place = start + torch.arange(1 - K, 0, device=x.device)  # (B, K - 1)
    before = shown(taken(memory.inputs[:, None], place % R), place >= 0)[:, 0]
    q, k, v = (y.transpose(1, 2) for y in convolved(torch.cat([before, x], 1), weight, memory))
    index = start + torch.arange(x.shape[1], device=x.device)  # (B, T)
    g, beta = (shown(y.transpose(1, 2)[..., None], index < end) for y in (g, beta))

    # from what the memory has: the state before the new tokens, and the one that is to be kept
    held = memory.folded[:, :1].long().masked_fill(start == 0, 0)
    kept = torch.maximum(foldable(end), held)
    place = held + torch.arange(PLACES, device=x.device)  # (B, PLACES)
    behind = [taken(part, place % PLACES) for part in memory[1:4]]
    state = memory.state.masked_fill((start == 0)[..., None, None], 0)
    whole = absorb(state, *(shown(part, place < start) for part in behind))
    folded = absorb(state, *(shown(part, place < start.minimum(kept)) for part in behind))
    out, u, folded = chunks(q, k, v, g, beta, index < kept, whole, folded)

    has_some = end > start  # (B, 1)
    memory.state.copy_(torch.where(has_some[..., None, None], folded, memory.state))
    memory.folded.copy_(torch.where(has_some, kept, memory.folded))
    for tensor, new in zip((*memory[1:4], memory.inputs[:, None]), (k, u, g, x[:, None])):
        keep_last(tensor, new, start, end)
    return out.transpose(1, 2)


def taken(x: Tensor, place: Tensor) -> Tensor:
    """x [B, H, S, D] at places [B, n] of its rows: [B, H, n, D]."""
    return x.gather(2, place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def shown(x: Tensor, which: Tensor) -> Tensor:
    """x [B, H, n, D], and 0 for those tokens that which [B, n] is not true of."""
    return x.masked_fill(~which[:, None, :, None], 0)


def chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, inside: Tensor, whole: Tensor,
    folded: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens behind the state `whole`, CHUNK of them at a time: all of what they do to each other
    is a triangular system (Yang et al., arXiv 2406.06484). inside [B, T]: which of them are to be
    in the state `folded` -> outputs and u [B, Hv, T, Dv], and that state."""
    kept = [shown(x, inside) for x in (k, g)]
    q, k, v, g, beta, *kept = (x.unflatten(2, (-1, CHUNK)) for x in (q, k, v, g, beta, *kept))
    group = v.shape[1] // k.shape[1]
    keys, q = k.repeat_interleave(group, 1), q.repeat_interleave(group, 1)
    total = g.cumsum(-2)  # (B, Hv, n, CHUNK, 1)
    decay = (total - total.mT).tril().exp().tril()
    system = (keys * beta) @ keys.mT * decay  # below the diagonal, which counts as 1
    right = torch.cat([v, keys * total.exp()], -1) * beta
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    alone, seen = solved.split([v.shape[-1], k.shape[-1]], -1)
    scores = q @ keys.mT * decay
    q = q * total.exp()
    out, updates = torch.empty_like(v), torch.empty_like(v)
    for i in range(v.shape[2]):
        u = updates[:, :, i] = alone[:, :, i] - seen[:, :, i] @ whole
        out[:, :, i] = q[:, :, i] @ whole + scores[:, :, i] @ u
        whole = absorb(whole, k[:, :, i], u, g[:, :, i])
        folded = absorb(folded, kept[0][:, :, i], u, kept[1][:, :, i])
    return out.flatten(2, 3), updates.flatten(2, 3), folded


def keep_last(tensor: Tensor, new: Tensor, start: Tensor, end: Tensor) -> None:
    """Put what counts of new [B, H, T, D], the tokens start to end [B, 1], to their places in
    tensor [B, H, S, D]: each takes the last token that falls on it, or keeps its own."""
    S, last = tensor.shape[2], end - 1
    token = last - (last - torch.arange(S, device=last.device)) % S - start  # (B, S)
    is_new = (token >= 0)[:, None, :, None]
    tensor.copy_(torch.where(is_new, taken(new, token.clamp(min=0)), tensor))


def prefill_fake(x: Tensor, g: Tensor, beta: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    *_, updates, _, _, _ = rest
    return x.new_empty((*g.shape, updates.shape[-1]), dtype=torch.float32)


TENSORS = "Tensor x, Tensor g, Tensor beta, Tensor weight, Tensor input_pos, "
MEMORY = ", ".join(f"Tensor({a}!) {name}" for a, name in zip("abcdef", Memory._fields))
for name, run, more in ("decode", decode, ""), ("prefill", prefill, "Tensor? last, "):
    torch.library.define(f"gpt_flash::delta_{name}", f"({TENSORS}{more}{MEMORY}) -> Tensor")
    torch.library.impl(f"gpt_flash::delta_{name}", "default", run)
    torch.library.register_fake(f"gpt_flash::delta_{name}", prefill_fake)
