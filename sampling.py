"""What a request asks for, and how its tokens are drawn: with settings of each row, and random
numbers that are made from its seed and the position, whatever its row and neighbours."""
from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cli.arguments import SETTINGS, number
from cli.prompts import checked_number

FROM_ZERO = number(int, 0)  # a check of a whole number
LEAST_TEMPERATURE = 1e-5  # what is below is greedy: logits over it would leave float32
CANDIDATES = 256  # tokens that are left for sampling when every row has a top_k up to that


@dataclass(frozen=True)
class Request:
    """What one row is to do: a prompt, how to draw, and when to stop."""

    prompt: list[int]
    max_new_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    eos_ids: frozenset[int] = frozenset()
    cached: int = 0  # tokens of the row that are in the cache already, in front of the prompt
    seed: int | None = None  # the same, the same text; None: a new one when the request starts
    # called on the host with each new token, in a list of its own; True: it was the last
    ends: Callable[[list[int]], bool] | None = None

    def __post_init__(self) -> None:
        """ValueError names a setting that no row can have."""
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p"):
            value = getattr(self, name)
            if value is not None or name in ("max_new_tokens", "temperature"):
                checked_number(name, value, SETTINGS[name])
        checked_number("cached", self.cached, FROM_ZERO)


class Sampling(NamedTuple):
    """How rows draw their tokens: tensors [B], so that one captured step serves any settings."""

    temperature: Tensor  # float32; 0: greedy
    top_k: Tensor  # int64; the vocabulary's size: all
    top_p: Tensor  # float32; infinity: all
    min_p: Tensor  # float32; 0: all
    key: Tensor  # int32 [B, 2], made from the seed: which random numbers are the request's

    @classmethod
    def of(cls, requests: Sequence[Request], vocab_size: int, device: torch.device) -> Sampling:
        temperature = [request.temperature for request in requests]
        top_k = [request.top_k or vocab_size for request in requests]
        top_p = []
        for request in requests:
            keeps_all = request.top_p is None or request.top_p >= 1
            top_p.append(float("inf") if keeps_all else request.top_p)
        min_p = [request.min_p or 0.0 for request in requests]
        key = [key_of(request.seed) for request in requests]
        return cls(
            torch.tensor(temperature, dtype=torch.float32, device=device),
            torch.tensor(top_k, dtype=torch.int64, device=device),
            torch.tensor(top_p, dtype=torch.float32, device=device),
            torch.tensor(min_p, dtype=torch.float32, device=device),
            torch.tensor(key, dtype=torch.int32, device=device),
        )

    def rows(self, rows: slice) -> Sampling:
        return Sampling(*(setting[rows] for setting in self))


def key_of(seed: int | None) -> tuple[int, int]:
    """Two int32 numbers from any seed, by a hash, so that neighbouring seeds share nothing; None:
    from a new seed."""
    if seed is None:
        seed = random.getrandbits(64)
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    return struct.unpack("<ii", digest)


def kind_of(requests: Iterable[Request]) -> str:
    """The cheapest kind of step that draws for all of these rows.

    "greedy": no row samples; "plain": from all tokens; "top_k": from at most CANDIDATES;
    "filtered": any settings, which sorts the vocabulary."""
    sampled = [request for request in requests if request.temperature > 0]
    if not sampled:
        return "greedy"
    if all(request.top_k is not None and request.top_k <= CANDIDATES for request in sampled):
        return "top_k"
    for request in sampled:
        if (request.top_k, request.top_p, request.min_p) != (None, None, None):
            return "filtered"
    return "plain"


def sample(logits: Tensor, sampling: Sampling, kind: str, position: Tensor) -> Tensor:
    """logits [N, vocab_size] -> token ids [N], by a step of that kind.

    position [N] int32: where the tokens will stand. The draw divides by exponential noise and
    takes the largest (a Gumbel-max draw), so that nothing is read back to the host."""
    likeliest = logits.argmax(-1)
    if kind == "greedy":
        return likeliest
    greedy = sampling.temperature < LEAST_TEMPERATURE
    temperature = sampling.temperature.masked_fill(greedy, 1.0)
    probs = (logits.float() / temperature[:, None]).softmax(-1)  # (N, V)
    N, V = probs.shape
    if kind == "plain":
        ids = torch.arange(V, device=probs.device)[None]
    elif kind == "top_k":
        probs, ids = filter_probs(probs, sampling, min(CANDIDATES, V))
    else:
        probs, ids = filter_probs(probs, sampling, V)
    best = (probs / noise(sampling.key, position, ids)).argmax(-1, keepdim=True)  # (N, 1)
    drawn = ids.expand(N, -1).gather(-1, best)[:, 0]
    return torch.where(greedy, likeliest, drawn)


def filter_probs(
    probs: Tensor, sampling: Sampling, n_candidates: int
) -> tuple[Tensor, Tensor]:
    """The n_candidates likeliest of probabilities [N, V], likeliest first, with zeros for what a
    row's filters drop, one filter after the other; and their token ids: [N, n_candidates] each.

    top_k: the k likeliest. top_p: the fewest tokens whose probabilities reach p of what is left,
    the one that crosses it included. min_p: those at least min_p times as likely as the
    likeliest."""
    if n_candidates < probs.shape[-1]:
        probs, ids = probs.topk(n_candidates)
    else:
        probs, ids = probs.sort(descending=True)
    rank = torch.arange(n_candidates, device=probs.device)
    probs = probs.masked_fill(rank >= sampling.top_k[:, None], 0)
    likelier = probs.cumsum(-1) - probs  # the mass of likelier tokens
    enough = sampling.top_p[:, None] * probs.sum(-1, keepdim=True)
    probs = probs.masked_fill(likelier >= enough, 0)
    least = sampling.min_p[:, None] * probs[:, :1]
    return probs.masked_fill(probs < least, 0), ids


def noise(key: Tensor, position: Tensor, ids: Tensor) -> Tensor:
    """Exponential noise [N, n] for tokens ids [N, n] at positions [N], from keys [N, 2].

    Each number is a hash of its key, position and token and of nothing else: no state to keep, in
    a captured graph either, and a request draws the same in any row, batch or order of steps.
    Counter-based random numbers are an idea of Salmon et al., Random123 (SC 2011). The position
    goes into both halves of the key, and each half into a round of its own: with one round, two
    keys that differ in a few bits would give the same numbers to tokens that differ in them."""
    stream = scramble(key + position[:, None])  # (N, 2)
    bits = scramble(ids.int() ^ stream[:, :1])  # (N, n)
    bits = scramble(bits + stream[:, 1:])
    # the middles of 2^31 steps from 0 to 1; float32 is finest near 0, where winners come from
    uniform = (bits & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
    uniform.clamp_(max=1 - 2.0**-24)  # the largest float32 below 1, to which others round
    return uniform.neg_().log1p_().neg_()


def scramble(x: Tensor) -> Tensor:
    """A bijection of int32 numbers that looks random, in place: Chris Wellons' lowbias32
    (github.com/skeeto/hash-prospector). Products wrap; the mask makes a shift a logical one."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x
