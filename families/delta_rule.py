"""The gated delta rule: layers whose memory of a text is one matrix a head (Gated Delta Networks,
Yang et al., arXiv 2412.06464). To lift it, copy this file: it needs torch and triton only.

A state S [Dk, Dv] has values for keys. A token has a query q and a key k of length 1, a value v, a
gate g <= 0 and a strength beta. It lets the state fade, moves what that has for its key towards its
value, and reads with its query:

    S = exp(g) S;   u = beta (v - k S);   S = S + k^T u;   o = q S

What u a token has does not depend on those behind it. So a row's memory is kept as the state of
its first `folded` tokens, and k, u and g of the 16 to 47 tokens behind these: a step reads the
state, and writes it once in 16 tokens only. A token that was wrong is one that the next step writes
over, as in a cache of keys: rows may go back by the last 16 tokens that were written.

There are H heads of keys, each with G heads of values: tensors are [..., H, 1 or G, tokens, D]."""
from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
jit = triton.jit if triton else lambda fn: fn

BLOCK = 16  # tokens that go into the state together, all whole blocks but the last one
TILE = 32  # values of a head that a program of the kernel has
# for tokens that are not in the state: up to 47, and room for 16 new ones, so that a program of the
# kernel writes over none that another has yet to fold
PLACES = 4 * BLOCK
CHUNK = 64  # tokens of a prompt that are multiplied together
SEGMENT = 16 * CHUNK  # whose products are in memory together


def reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, in float32: q, k [..., H, 1, T, Dk], v [..., H, G, T, Dv], g and beta
    [..., H, G, T, 1], S [..., H, G, Dk, Dv] -> o [..., H, G, T, Dv] and the new S."""
    out = []
    tokens = (x.split(1, dim=-2) for x in (q, k, v, g, beta))
    for q, k, v, g, beta in zip(*tokens):
        S = g.exp() * S
        u = beta * (v - k @ S)  # (..., H, G, 1, Dv)
        S = S + k.mT @ u
        out.append(q @ S)
    return torch.cat(out, dim=-2), S


class Memory(NamedTuple):
    """What a layer keeps of B rows. Where there are n places, position p of a text is at p % n."""

    state: Tensor  # [B, H, G, Dk, Dv] float32: S of the first `folded` tokens
    keys: Tensor  # [B, H, 1, PLACES, Dk] float32: k of those behind them
    updates: Tensor  # [B, H, G, PLACES, Dv] float32: u
    gates: Tensor  # [B, H, G, PLACES, 1] float32: g
    inputs: Tensor  # [B, 1, 1, BLOCK + K, C]: the last inputs of the convolution
    # [B, programs] int32, a multiple of BLOCK: the same for each of the kernel's programs of a row,
    # as one may end before another begins
    folded: Tensor

    @classmethod
    def allocate(
        cls, n_rows: int, heads: tuple[int, int], sizes: tuple[int, int], kernel: tuple[int, int],
        dtype: torch.dtype, device: torch.device | str,
    ) -> Memory:
        """heads: of keys, of values. sizes: Dk, Dv. kernel: C, K of the convolution."""
        H, n_values = heads
        Dk, Dv = sizes
        C, K = kernel
        G = n_values // H
        n_tiles = -(-Dv // TILE)
        zeros = partial(torch.zeros, device=device)
        return cls(
            state=zeros(n_rows, H, G, Dk, Dv),
            keys=zeros(n_rows, H, 1, PLACES, Dk),
            updates=zeros(n_rows, H, G, PLACES, Dv),
            gates=zeros(n_rows, H, G, PLACES, 1),
            inputs=zeros(n_rows, 1, 1, BLOCK + K, C, dtype=dtype),
            folded=zeros(n_rows, n_values * n_tiles, dtype=torch.int32),
        )

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.keys, self.updates, self.gates


def absorb(S: Tensor, k: Tensor, u: Tensor, g: Tensor) -> Tensor:
    """The state after more tokens, all of whose numbers are 0 where there is none."""
    total = g.sum(-2, keepdim=True)
    behind = g.flip(-2).cumsum(-2).flip(-2) - g  # the gates of those behind each
    return total.exp() * S + k.mT @ (behind.exp() * u)


def convolved(window: Tensor, weight: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
    """window [..., K - 1 + T, C]: inputs, K - 1 of them before the new ones; weight [C, K] -> in
    float32, q / sqrt(Dk) and k [..., T, 2, H, 1, Dk], and v [..., T, H, G, Dv]."""
    H, G, Dk, Dv = memory.state.shape[-4:]
    window, taps = window.float(), weight.float().unbind(1)
    T = window.shape[-2] - len(taps) + 1
    y = window.narrow(-2, 0, T) * taps[0]
    for i in range(1, len(taps)):
        y.addcmul_(window.narrow(-2, i, T), taps[i])
    qk, v = F.silu(y).tensor_split([2 * H * Dk], -1)
    qk = qk.view(*y.shape[:-1], 2, H, 1, Dk)
    qk = qk * torch.rsqrt(qk.square().sum(-1, keepdim=True) + 1e-6)
    qk.select(-4, 0).mul_(Dk ** -0.5)
    return qk, v.view(*y.shape[:-1], H, G, Dv)

# --- decode ---


def decode(
    x: Tensor, g: Tensor, beta: Tensor, weight: Tensor, input_pos: Tensor, *memory: Tensor
) -> Tensor:
    """T new tokens, 1 to BLOCK, of each row behind its first input_pos [B]: x [B, T, C] are the
    inputs of the convolution, g, beta [B, T, H G] float32, weight [C, K] -> o [B, T, H G, Dv]
    float32. Where a row goes on at what its memory has let go of, what it gets is nobody's."""
    if triton and x.is_cuda:
        return decode_triton(x, g, beta, weight, input_pos, Memory(*memory))
    out = []
    for p, tokens, parts in zip(input_pos.tolist(), zip(x, g, beta), zip(*memory)):
        row = Memory(*parts)
        folded = fold(p, x.shape[1], row)
        for t, token in enumerate(zip(*tokens)):  # each is what it would be alone, to the bit
            out.append(decode_token(*token, weight, p + t, folded, row))
    return torch.stack(out).view(*g.shape, -1)


def decode_token(
    x: Tensor, g: Tensor, beta: Tensor, weight: Tensor, p: int, folded: int, memory: Memory
) -> Tensor:
    """A row's token at position p: x [C], g, beta [H G] -> o [H, G, Dv]."""
    H, G = memory.gates.shape[:2]
    K = weight.shape[1]
    memory.inputs[..., p % (BLOCK + K), :] = x
    window = torch.cat(pieces(memory.inputs[0, 0], p + 1 - K, p + 1))  # (K, C)
    if p < K - 1:
        window[:K - 1 - p] = 0
    qk, v = convolved(window, weight, memory)
    qk = qk[0].movedim(0, -2)  # (H, 1, 2, Dk)

    # it is behind the state as those before it are; its update is 0 until it is known
    place = p % PLACES
    memory.keys[..., place, :] = qk[..., 1, :]
    memory.updates[..., place, :] = 0
    memory.gates[..., place, :] = g.view(H, G, 1)
    keys, updates, gates = (pieces(part, folded, p + 1) for part in memory.tokens)

    gate = torch.cat(gates, -2).cumsum(-2)  # (H, G, n, 1), from the state on
    total = gate[..., -1:, :]
    decays = (total - gate).exp().split([part.shape[-2] for part in gates], -2)
    read = total.exp() * (qk @ memory.state)  # (H, G, 2, Dv)
    for key, update, decay in zip(keys, updates, decays):
        scores = decay.mT * (qk @ key.mT)  # (H, G, 2, n)
        read = read + scores @ update
    u = beta.view(H, G, 1) * (v[0] - read[..., 1, :])  # (H, G, Dv)
    memory.updates[..., place, :] = u
    return read[..., 0, :] + scores[..., 0, -1:] * u


def fold(p: int, T: int, memory: Memory) -> int:
    """Bring a row's state to position p, by one block at most -> how many tokens are in it."""
    folded = int(memory.folded[0])
    target = max(0, p // BLOCK * BLOCK - BLOCK)
    if p == 0:
        memory.state.zero_()
    elif folded < target and p - folded < PLACES:
        block = (part.narrow(-2, folded % PLACES, BLOCK) for part in memory.tokens)
        memory.state.copy_(absorb(memory.state, *block))
        folded += BLOCK
    if not 0 <= p - folded <= PLACES - T:  # begun anew, or nobody's
        folded = target
    memory.folded.fill_(folded)
    return folded


def pieces(x: Tensor, first: int, end: int) -> list[Tensor]:
    """What x [..., n, D] has of the positions from first to before end, in one piece or two."""
    n = x.shape[-2]
    start, stop = first % n, (end - 1) % n + 1
    if start < stop:
        return [x.narrow(-2, start, stop - start)]
    return [x.narrow(-2, start, n - start), x.narrow(-2, 0, stop)]

# --- decode, in Triton: one launch; what is in capitals is known when it is compiled ---


@jit
def _convolved(x_ptr, inputs_ptr, weight_ptr, channel, mask, t, p, stride, C, K, R):
    """Some channels of a row's token at p + t, in float32; their inputs go into the memory."""
    y = tl.zeros_like(channel).to(tl.float32)
    for i in tl.static_range(K):
        token = t + i - (K - 1)
        position = p + token
        before = inputs_ptr + (position + R) % R * C
        ptr = tl.where(token < 0, before, x_ptr + token * stride)
        x = tl.load(ptr + channel, mask=mask & (position >= 0), other=0)
        tap = tl.load(weight_ptr + channel * K + i, mask=mask, other=0)
        y += x.to(tl.float32) * tap.to(tl.float32)
    # the last one is the token's own
    tl.store(inputs_ptr + (p + t) % R * C + channel, x, mask=mask)
    return y * tl.sigmoid(y)


@jit
def _unit(x):
    return x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)


@jit
def _fold(state_ptr, keys_ptr, updates_ptr, gates_ptr, folded_ptr, p, dk, dv, in_k, in_v,
          T, DV, DK, BLOCK, PLACES):
    """A part of the state at position p, and how many tokens it has: a block of them goes in."""
    state_ptrs = state_ptr + dk[:, None] * DV + dv[None]
    in_state = in_k[:, None] & in_v[None]
    S = tl.load(state_ptrs, mask=in_state & (p > 0), other=0)
    folded = tl.load(folded_ptr)
    target = tl.maximum(p // BLOCK * BLOCK - BLOCK, 0)
    more = (folded < target) & (p - folded < PLACES)
    if more:
        for i in range(BLOCK):
            place = (folded + i) % PLACES
            k = tl.load(keys_ptr + place * DK + dk, mask=in_k, other=0)
            u = tl.load(updates_ptr + place * DV + dv, mask=in_v, other=0)
            g = tl.load(gates_ptr + place)
            S = tl.exp(g) * S + k[:, None] * u[None]
        folded += BLOCK
    if more | (p == 0):
        tl.store(state_ptrs, S, mask=in_state)
    if (p < folded) | (p + T > folded + PLACES):  # begun anew, or nobody's
        folded = target
    tl.store(folded_ptr, folded)
    return S, folded


@jit
def _behind(ptr, folded, n, d, inside, D, PLACES):
    """Of the first n tokens behind the state, in order: [PLACES, d]; 0 where there is none yet."""
    i = tl.arange(0, PLACES)[:, None]
    ptrs = ptr + (folded + i) % PLACES * D + d[None]
    return tl.load(ptrs, mask=(i < n) & inside[None], other=0)


@jit
def _read(x, S, keys, updates, decay, kept):
    scores = decay * tl.sum(keys * x[None], 1)
    of_tokens = tl.sum(scores[:, None] * updates, 0)
    return of_tokens + kept * tl.sum(S * x[:, None], 0)


@jit
def _decode_kernel(
    x_ptr, g_ptr, beta_ptr, weight_ptr, pos_ptr, state_ptr, keys_ptr, updates_ptr, gates_ptr,
    inputs_ptr, folded_ptr, out_ptr, stride, C, T: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, H: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr,
):
    """A program has TILE values of a head of a row. It alone reads and writes its part of state,
    updates and folded; keys, gates and inputs it writes as its neighbours do."""
    b, head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    key_head, value_head = b * H + head // G, b * H * G + head
    dk, dv = tl.arange(0, BLOCK_K), tile * TILE + tl.arange(0, TILE)
    in_k, in_v = dk < DK, dv < DV
    x_ptr += b * T * stride
    inputs_ptr += b * R * C
    keys_ptr += key_head * PLACES * DK
    updates_ptr += value_head * PLACES * DV
    gates_ptr += value_head * PLACES
    state_ptr += value_head * DK * DV
    folded_ptr += value_head * tl.num_programs(2) + tile
    p = tl.load(pos_ptr + b)
    S, folded = _fold(state_ptr, keys_ptr, updates_ptr, gates_ptr, folded_ptr, p, dk, dv, in_k,
                      in_v, T, DV, DK, BLOCK, PLACES)
    n = p - folded
    keys = _behind(keys_ptr, folded, n, dk, in_k, DK, PLACES)
    updates = _behind(updates_ptr, folded, n, dv, in_v, DV, PLACES)
    i = tl.arange(0, PLACES)
    gates = tl.load(gates_ptr + (folded + i) % PLACES, mask=i < n, other=0)
    of_q = head // G * DK + dk  # channels
    of_v = 2 * H * DK + head * DV + dv
    for t in range(T):
        q = _convolved(x_ptr, inputs_ptr, weight_ptr, of_q, in_k, t, p, stride, C, K, R)
        k = _convolved(x_ptr, inputs_ptr, weight_ptr, H * DK + of_q, in_k, t, p, stride, C, K, R)
        v = _convolved(x_ptr, inputs_ptr, weight_ptr, of_v, in_v, t, p, stride, C, K, R)
        q, k = _unit(q) * DK ** -0.5, _unit(k)
        at = (b * T + t) * H * G + head
        g, beta = tl.load(g_ptr + at), tl.load(beta_ptr + at)
        own = i == n + t
        gates = tl.where(own, g, gates)
        total = tl.sum(gates, 0)
        decay, kept = tl.exp(total - tl.cumsum(gates, 0)), tl.exp(total)
        u = beta * (v - _read(k, S, keys, updates, decay, kept))
        keys = tl.where(own[:, None], k[None], keys)
        updates = tl.where(own[:, None], u[None], updates)
        o = _read(q, S, keys, updates, decay, kept)
        tl.store(out_ptr + at * DV + dv, o, mask=in_v)
        new = (p + t) % PLACES
        tl.store(keys_ptr + new * DK + dk, k, mask=in_k)
        tl.store(updates_ptr + new * DV + dv, u, mask=in_v)
        tl.store(gates_ptr + new, g)


def kernel_arguments(
    x: Tensor, g: Tensor, beta: Tensor, weight: Tensor, input_pos: Tensor, memory: Memory
) -> dict[str, Any]:
    B, T, C = x.shape
    K = weight.shape[1]
    H, G, Dk, Dv = memory.state.shape[1:]
    x = x.flatten(0, 1)  # (B T, C): each row's values lie together
    out = torch.empty(B, T, H * G, Dv, device=x.device)
    tensors = memory._asdict() | dict(g=g, beta=beta, weight=weight, pos=input_pos, out=out)
    pointers = {f"{name}_ptr": tensor.contiguous() for name, tensor in tensors.items()}
    return pointers | dict(
        x_ptr=x, stride=x.stride(0), C=C, T=T, K=K, R=BLOCK + K, H=H, G=G, DK=Dk, DV=Dv,
        BLOCK_K=triton.next_power_of_2(Dk), TILE=TILE, BLOCK=BLOCK, PLACES=PLACES)


def decode_triton(*inputs: Any) -> Tensor:
    arguments = kernel_arguments(*inputs)
    out = arguments["out_ptr"]
    B, _, n_heads, Dv = out.shape
    with torch.cuda.device_of(out):  # Triton launches on the current one
        _decode_kernel[(B, n_heads, triton.cdiv(Dv, TILE))](**arguments)
    return out

# --- prefill ---


def prefill(
    x: Tensor, g: Tensor, beta: Tensor, weight: Tensor, input_pos: Tensor, last: Tensor | None,
    *memory: Tensor,
) -> Tensor:
    """decode of any number of tokens. last [B]: the position of each row's last token, what is
    behind it is padding; below input_pos: the row has none. None: all T are tokens."""
    kept = Memory(*memory)
    T = x.shape[1]
    start = input_pos.long()[:, None]  # (B, 1)
    end = start + T if last is None else last.long()[:, None] + 1
    begins = (start == 0) & (end > 0)
    kept.state.masked_fill_(of_tokens(begins), 0)
    kept.folded.masked_fill_(begins, 0)
    padded = (F.pad(each, (0, 0, 0, -T % CHUNK)) for each in (x, g, beta))
    out = []
    for segment in zip(*(each.split(SEGMENT, dim=1) for each in padded)):
        until = end.minimum(start + SEGMENT)
        out.append(prefill_segment(*segment, weight, start, until, kept))
        start = start + SEGMENT
    return torch.cat(out, 1)[:, :T]


def prefill_segment(
    x: Tensor, g: Tensor, beta: Tensor, weight: Tensor, start: Tensor, end: Tensor, memory: Memory
) -> Tensor:
    """prefill of some whole chunks from start [B, 1] on; tokens from end [B, 1] on are none."""
    x = x[:, None, None]  # (B, 1, 1, T, C)
    before = start + torch.arange(1 - weight.shape[1], 0, device=x.device)  # (B, K - 1)
    inputs = shown(at_places(memory.inputs, before), before >= 0)
    qk, v = convolved(torch.cat([inputs, x], -2)[:, 0, 0], weight, memory)
    q, k = qk.movedim(1, -2).unbind(1)  # (B, H, 1, T, Dk) each
    v = v.movedim(1, -2)  # (B, H, G, T, Dv)
    new = start + torch.arange(x.shape[-2], device=x.device)  # (B, T)
    g, beta = (shown(y.mT.view(*v.shape[:-1], 1), new < end) for y in (g, beta))

    # what the memory has: a state, and tokens behind it
    folded = memory.folded[:, :1].long()  # (B, 1)
    old = folded + torch.arange(PLACES, device=x.device)  # (B, PLACES)
    tokens = [shown(at_places(part, old), old < start) for part in memory.tokens]
    o, u = chunks(q, k, v, g, beta, absorb(memory.state, *tokens))

    # what it is to have: more of all these tokens in the state
    target = (end // BLOCK * BLOCK - BLOCK).maximum(folded)
    target = target.where(end > start, folded)  # (B, 1)
    is_folded = torch.cat([old, new], 1) < target
    both = (torch.cat(pair, -2) for pair in zip(tokens, (k, u, g)))
    memory.state.copy_(absorb(memory.state, *(shown(part, is_folded) for part in both)))
    memory.folded.copy_(target)
    for part, values in zip((*memory.tokens, memory.inputs), (k, u, g, x)):
        put_last(part, values, start, end)
    return o.flatten(1, 2).transpose(1, 2)  # (B, T, H G, Dv)


def put_last(part: Tensor, x: Tensor, start: Tensor, end: Tensor) -> None:
    """Each place of a part takes the last token of x [B, H, G, T, D] that falls on it, or keeps its
    own. The tokens stand at positions from start [B, 1] to before end [B, 1]."""
    n = part.shape[-2]
    place = torch.arange(n, device=x.device)
    newest = end - 1 - (end - 1 - place) % n  # (B, n): its position
    taken = at_places(x, newest - start)
    part.copy_(torch.where(of_tokens(newest >= start), taken, part))


def of_tokens(x: Tensor) -> Tensor:
    """x [B, T] for tensors [B, H, G, T, D]."""
    return x[:, None, None, :, None]


def at_places(x: Tensor, position: Tensor) -> Tensor:
    """What x [B, H, G, n, D] has at positions [B, T]: [B, H, G, T, D]."""
    return x.take_along_dim(of_tokens(position % x.shape[-2]), -2)


def shown(x: Tensor, which: Tensor) -> Tensor:
    """x [B, H, G, T, D], and 0 for those tokens that which [B, T] is not true of."""
    return x.masked_fill(~of_tokens(which), 0)


def chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    """The reference's outputs and u, CHUNK tokens at a time: all of what they do to each other is
    a triangular system (Yang et al., arXiv 2406.06484)."""
    q, k, v, g, beta = (x.unflatten(-2, (-1, CHUNK)) for x in (q, k, v, g, beta))
    total = g.cumsum(-2)  # (B, H, G, n, CHUNK, 1)
    decay = (total - total.mT).tril().exp().tril()
    system = beta * decay * (k @ k.mT)  # below the diagonal, which counts as 1
    right = beta * torch.cat([v, total.exp() * k], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    own, seen = solved.split([v.shape[-1], k.shape[-1]], -1)
    scores = decay * (q @ k.mT)
    q = total.exp() * q

    out, updates = [], []
    by_chunk = (x.unbind(3) for x in (q, k, g, own, seen, scores))
    for q, k, g, own, seen, scores in zip(*by_chunk):
        u = own - seen @ S
        out.append(q @ S + scores @ u)
        updates.append(u)
        S = absorb(S, k, u, g)
    return torch.cat(out, -2), torch.cat(updates, -2)


def prefill_fake(x: Tensor, g: Tensor, *rest: Any) -> Tensor:
    memory = Memory(*rest[-len(Memory._fields):])
    return x.new_empty(*g.shape, memory.state.shape[-1], dtype=torch.float32)


SCHEMA = (
    "(Tensor x, Tensor g, Tensor beta, Tensor weight, Tensor input_pos, {}Tensor(a!) state, "
    "Tensor(b!) keys, Tensor(c!) updates, Tensor(d!) gates, Tensor(e!) inputs, Tensor(f!) folded)"
    " -> Tensor"
)
for name, run, more in ("decode", decode, ""), ("prefill", prefill, "Tensor? last, "):
    torch.library.define(f"gpt_flash_delta::{name}", SCHEMA.format(more))
    torch.library.impl(f"gpt_flash_delta::{name}", "default", run)
    torch.library.register_fake(f"gpt_flash_delta::{name}", prefill_fake)
