"""Layers with a state: the gated delta rule beside its definition, and what rows may do."""
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

import checks  # before Triton is imported: it says whether Triton interprets
from families import delta_rule
from families.delta_rule import BLOCK, Memory, convolved, reference

assert checks
CUDA = torch.cuda.is_available()
B, HK, HV, DK, DV, K = 2, 2, 4, 16, 40, 4
C = 2 * HK * DK + HV * DV
N = 150  # tokens
RUNS = ["torch", "triton"]


class Text:
    """Random tokens of B rows, and what the definition gives for them."""

    def __init__(self) -> None:
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        self.x, self.weight = draw(B, N, C), draw(C, K)
        self.g, self.beta = -draw(B, N, HV).abs() / 4, draw(B, N, HV).sigmoid()
        q, k, v = convolved(torch.cat([torch.zeros(B, K - 1, C), self.x], 1), self.weight, memory())
        q, k = (each.repeat_interleave(HV // HK, 2) for each in (q, k))
        start = torch.zeros(B, HV, DK, DV)
        self.out, self.state = reference(q, k, v, self.g, self.beta, start)

    def run(self, kind: str, memory: Memory, first: int, last: int, at: int | None = None) -> Tensor:
        """Tokens first to last behind the first `at`, by default where they stand."""
        part = slice(first, last)
        position = torch.full((B,), first if at is None else at, dtype=torch.int32)
        inputs = self.x[:, part], self.g[:, part], self.beta[:, part], self.weight, position
        if last - first > BLOCK or kind == "prefill":
            return delta_rule.prefill(*inputs, None, *memory)
        if kind == "torch":
            return delta_rule.decode(*inputs, *memory)
        device = "cuda" if CUDA else "cpu"
        there = Memory(*(part.to(device) for part in memory))
        out = delta_rule.decode_triton(*(each.to(device) for each in inputs), there)
        for part, new in zip(memory, there):
            part.copy_(new)
        return out.cpu()


def memory() -> Memory:
    return Memory.allocate(B, (HK, HV), (DK, DV), (C, K), torch.float32, "cpu")


@pytest.fixture(scope="module")
def text() -> Text:
    return Text()


def near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() < 2e-5)


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("cuts", [
    [0, N], [0, 1, 2, 3, 19, 35, 36, 100, 101, 117], [0, 64, 80, 81, 97, 113, 129, N],
])
def test_prompts_and_steps_are_what_the_definition_says(
    text: Text, kind: str, cuts: list[int]
) -> None:
    kept = memory()
    for first, last in zip(cuts, cuts[1:]):
        assert near(text.run(kind, kept, first, last), text.out[:, first:last])


@pytest.mark.parametrize("kind", RUNS)
def test_token_by_token_far_on(text: Text, kind: str) -> None:
    kept = memory()
    text.run(kind, kept, 0, 30)
    for t in range(30, 90):
        assert near(text.run(kind, kept, t, t + 1), text.out[:, t:t + 1])


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("n_wrong", [1, 5, 15])
def test_wrong_proposals_leave_nothing_behind(text: Text, kind: str, n_wrong: int) -> None:
    """To the bit, whatever was proposed, and where a block goes into the state meanwhile."""
    proposed, never = memory(), memory()
    for each in (proposed, never):
        text.run(kind, each, 0, 25)
    for t in range(25, 70):
        # the token that counts, and others of the text behind it that do not
        wrong = slice(100, 100 + n_wrong)
        both = Text.__new__(Text)
        both.weight = text.weight
        for name in ("x", "g", "beta"):
            own = getattr(text, name)
            setattr(both, name, torch.cat([own[:, t:t + 1], own[:, wrong]], 1))
        a = both.run(kind, proposed, 0, 1 + n_wrong, at=t)[:, :1]
        assert torch.equal(a, text.run(kind, never, t, t + 1))
    assert torch.equal(proposed.state, never.state) and proposed.state.any()


@pytest.mark.parametrize("kind", [*RUNS, "prefill"])
def test_a_row_goes_back_and_begins_anew(text: Text, kind: str) -> None:
    kept = memory()
    text.run(kind, kept, 0, 90)
    kept.keys[:, :, 90 % delta_rule.PLACES] = torch.nan  # nobody's
    for at in (90 - BLOCK, 90 - BLOCK, 80):
        assert near(text.run(kind, kept, at, at + 9), text.out[:, at:at + 9])
    for part in kept[:4]:
        part.fill_(torch.nan)
    assert near(text.run(kind, kept, 0, 9), text.out[:, :9])
