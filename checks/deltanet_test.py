"""Layers with a state: the gated delta rule beside its definition, and what rows may do."""
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

import checks  # before Triton is imported: it says whether Triton interprets
from families import delta_rule
from families.delta_rule import BLOCK, Memory, convolved, reference
from generate import compile_model, generate
from model import load_model

assert checks
CUDA = torch.cuda.is_available()
B, HK, HV, DK, DV, K = 2, 1, 2, 8, 12, 4
C = 2 * HK * DK + HV * DV
N = 150  # tokens
RUNS = ["torch", "triton"]


class Text:
    """Random tokens of B rows, and what the definition gives for them."""

    def __init__(self) -> None:
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        self.x = draw(B, N, C + 5)[..., :C]  # as a part of a product lies
        self.weight = draw(C, K)
        self.g, self.beta = -draw(B, N, HV).abs() / 4, draw(B, N, HV).sigmoid()
        kept = memory()
        window = torch.cat([torch.zeros(B, K - 1, C), self.x], 1)
        qk, v = convolved(window, self.weight, kept)
        heads = (y.movedim(1, -2) for y in (*qk.unbind(2), v))  # (B, H, 1 or G, N, D)
        gates = (each.mT.reshape(B, HK, -1, N, 1) for each in (self.g, self.beta))
        out, self.state = reference(*heads, *gates, kept.state)
        self.out = out.flatten(1, 2).transpose(1, 2)  # (B, N, HV, DV)

    def run(
        self, kind: str, memory: Memory, first: int, last: int, at: int | None = None
    ) -> Tensor:
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


def test_a_launch_is_on_the_gpu_of_its_tensors(
    text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which need not be the current one, on which Triton launches."""
    of = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: of.append(x.device) or nullcontext())
    text.run("triton", memory(), 0, 1)
    assert [device.type for device in of] == ["cuda" if CUDA else "cpu"]


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("cuts", [
    [0, N], [0, 1, 2, 18, 34, 35, 100, 101, 117], [0, 64, 65, 80, N],
])
def test_prompts_and_steps_are_what_the_definition_says(
    text: Text, kind: str, cuts: list[int]
) -> None:
    kept = memory()
    for first, last in zip(cuts, cuts[1:]):
        assert near(text.run(kind, kept, first, last), text.out[:, first:last])


def test_a_long_prompt_is_read_in_segments(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_rule, "SEGMENT", delta_rule.CHUNK)
    kept = memory()
    assert near(text.run("prefill", kept, 0, 140), text.out[:, :140])
    assert near(text.run("torch", kept, 140, 141), text.out[:, 140:141])
    assert kept.folded.unique().tolist() == [112]


@pytest.mark.parametrize("kind", RUNS)
def test_token_by_token_far_on(text: Text, kind: str) -> None:
    kept = memory()
    text.run(kind, kept, 0, 30)
    for t in range(30, 50 if kind == "triton" else 90):
        assert near(text.run(kind, kept, t, t + 1), text.out[:, t:t + 1])


@pytest.mark.parametrize("kind, n_wrong, n", [
    ("torch", 1, 45), ("torch", 5, 45), ("torch", 15, 45), ("triton", 2, 9),
])
def test_wrong_proposals_leave_nothing_behind(
    text: Text, kind: str, n_wrong: int, n: int
) -> None:
    """To the bit, whatever was proposed, and where a block goes into the state meanwhile."""
    proposed, never = memory(), memory()
    for each in (proposed, never):
        text.run(kind, each, 0, 30)
    for t in range(30, 30 + n):
        # the token that counts, and others of the text behind it that do not
        wrong = slice(100, 100 + n_wrong)
        both = Text.__new__(Text)
        both.weight = text.weight
        for name in ("x", "g", "beta"):
            own = getattr(text, name)
            setattr(both, name, torch.cat([own[:, t:t + 1], own[:, wrong]], 1))
        a = both.run(kind, proposed, 0, 1 + n_wrong, at=t)[:, :1]
        assert torch.equal(a, text.run(kind, never, t, t + 1))
    assert torch.equal(proposed.state, never.state) and bool(proposed.state.any())


@pytest.mark.parametrize("kind", [*RUNS, "prefill"])
def test_a_row_goes_back_and_begins_anew(text: Text, kind: str) -> None:
    kept = memory()
    text.run(kind, kept, 0, 90)
    kept.keys[..., 90 % delta_rule.PLACES, :] = torch.nan  # nobody's
    for at in (90 - BLOCK, 90 - BLOCK, 80):
        assert near(text.run(kind, kept, at, at + 3), text.out[:, at:at + 3])
    for part in kept[:4]:
        part.fill_(torch.nan)
    assert near(text.run(kind, kept, 0, 3), text.out[:, :3])

# --- the models ---

NAMES = ["qwen3.5", "qwen3.5-moe", "qwen3-next"]
Checkpoint = Callable[[str], tuple[Path, PreTrainedModel]]  # the fixture


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_rows_that_are_refilled_and_proposals_give_what_one_row_gives(
    checkpoint: Checkpoint, name: str, kv_dtype: torch.dtype | None
) -> None:
    model = load_model(checkpoint(name)[0], dtype=torch.float32)
    prompts = [[5, 6, 7], [9], list(range(10, 40)), [4] * 20, [8, 3]]
    alone = []
    for prompt in prompts:
        model.setup_caches(1, 80, kv_dtype)
        alone += generate(model, [prompt], 24)
    for rows, k in (2, 0), (2, 3), (5, 5):
        model.setup_caches(rows, 80, kv_dtype)
        assert generate(model, prompts, 24, speculate_k=k) == alone


@pytest.mark.parametrize("name", NAMES[:1])
def test_going_back_too_far_is_refused(checkpoint: Checkpoint, name: str) -> None:
    model = load_model(checkpoint(name)[0], dtype=torch.float32)
    model.setup_caches(1, 64, rings=False)
    generate(model, [list(range(3, 43))], 4)
    assert generate(model, [[9]], 4, cached=40) != []
    with pytest.raises(ValueError, match="window or a state have let go"):
        generate(model, [[9]], 4, cached=20)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_compiled_once_for_each_kind_of_layer(checkpoint: Checkpoint, name: str) -> None:
    model = load_model(checkpoint(name)[0], dtype=torch.float32)
    want = generate(model, [[5, 6, 7], list(range(30))], 30)
    compile_model(model)
    counters.clear()
    assert generate(model, [[5, 6, 7], list(range(30))], 30, compile=True) == want
    assert counters["stats"]["unique_graphs"] == 2
