"""On a CPU a row gets the same bits whatever rows are beside it, from a file's integers too."""
from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from batching import Engine
from checks.common import close
from generate import Request, generate
from kernels import flash_decode
from model import Transformer, load_model, prefill_attention, use_products
from quantize import LAYOUTS, Linear, quantize_linear

LENGTHS = [3, 17, 140, 40, 9, 257, 31, 7]  # some are read in blocks, and some in chunks
OTHERS = [(3, 0), (8, 0), (3, 4)]  # rows and proposals


@pytest.fixture(scope="module")
def default_model() -> Transformer:
    """As it is loaded by default: in float32, of integers."""
    return load_model()


def fingerprint(logits: Tensor, *_: Any) -> Tensor:
    """In the place of sample: tokens in which each bit of all logits counts, and which repeat
    themselves, so that proposals are right now and then."""
    factors = torch.arange(1, logits.shape[1] + 1) * 2654435761 % 1000003
    return (logits.view(torch.int32).long() * factors).sum(-1) % 3 + 100


def texts(model: Transformer, rows: int, k: int, kv_dtype: torch.dtype | None) -> list[list[int]]:
    """What an engine of so many rows, with room of its own, gives for prompts of all lengths."""
    model.setup_caches(rows, 290 + 100 * rows, kv_dtype)
    engine = Engine(model, speculate_k=k)
    if k:
        engine.gauge = None  # check proposals at every step
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 40000, (n,), generator=generator).tolist() for n in LENGTHS]
    prompts += [prompts[5][:200] + prompts[1], prompts[3][:36] + prompts[0]]  # which share
    out: list[list[int]] = [[] for _ in prompts]
    requests = [Request(prompt, 5 + i % 4, 1.0) for i, prompt in enumerate(prompts)]
    for number, tokens in engine.run(requests):
        out[number] += tokens
    return out


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_logits_are_the_same_bits_in_any_company(
    default_model: Transformer, monkeypatch: pytest.MonkeyPatch, kv_dtype: torch.dtype | None
) -> None:
    """For any number of rows, refilled or not, any room, chunks of prompts, what these share, and
    proposals."""
    monkeypatch.setattr("generate.sample", fingerprint)
    alone = texts(default_model, 1, 0, kv_dtype)
    for rows, k in OTHERS:
        assert texts(default_model, rows, k, kv_dtype) == alone


@pytest.mark.parametrize("n", [1, 2, 5, 16, 64, 128, 129, 300])
def test_an_int4_product_sums_each_row_in_one_order(default_model: Transformer, n: int) -> None:
    """Those of whole blocks by dequantizing, whatever other rows have such."""
    layer = default_model.layers[0].mlp.down_proj
    x = torch.randn(3, n, layer.in_features, generator=torch.Generator().manual_seed(n))
    y = layer(x)
    assert torch.equal(torch.cat([layer(row) for row in x.split(1)]), y)
    many = n // LAYOUTS["int4", "cpu"].block * 128
    assert torch.equal(layer(x[:, :many]), y[:, :many])
    assert torch.equal(layer(x[:, many:].flatten(0, 1)), y[:, many:].flatten(0, 1))
    weight = torch.cat(list(layer.dense(torch.float32)))
    close(y, F.linear(x, weight), 0.02 * float(y.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_of_an_int4_model_gives_a_step_the_same_in_any_company(dtype: torch.dtype) -> None:
    use_products(torch.device("cpu"))
    torch.manual_seed(0)
    head = quantize_linear(Linear(576, 300, bias=False), "int4", name="lm_head").pack()
    x = torch.randn(70, 1, 576, generator=torch.Generator().manual_seed(0)).to(dtype)
    for n in (1, 24, 25, 69):
        assert torch.equal(head(x[:n]), head(x)[:n])


@pytest.mark.parametrize("mode", ["int8_grouped", "int8"])
def test_the_likeliest_logits_are_those_of_float32(default_model: Transformer, mode: str) -> None:
    """So that none of them tie where operators round to bfloat16, alone and beside other rows."""
    head, n = default_model.lm_head, 256
    weight = torch.cat(list(head.dense(torch.float32)))
    if mode == "int8":
        linear = Linear(*weight.shape[::-1]).requires_grad_(False)
        linear.weight, linear.bias = nn.Parameter(weight, False), nn.Parameter(weight[:, 0], False)
        head = quantize_linear(linear, mode, name="lm_head").pack()
        weight = torch.cat(list(head.dense(torch.float32)))
    default_model.setup_caches(1, n)
    tokens = torch.randint(3, 40000, (1, n), generator=torch.Generator().manual_seed(0))
    start = torch.zeros(1, dtype=torch.int32)
    x = default_model.norm(default_model.prefill(tokens, start, hidden=True)).view(n, 1, -1)
    logits, want = head(x), F.linear(x, weight, head.bias)
    assert (logits == logits.amax(-1, keepdim=True)).sum() == n
    close(want.gather(-1, logits.topk(10).indices), want.topk(10).values, 1e-4)
    close(logits.topk(10).values, want.topk(10).values, 1e-4)
    close(logits.logsumexp(-1), want.logsumexp(-1), 0.03)
    close(head(x.view(1, n, -1)), want.view(1, n, -1), 1e-4)
    assert torch.equal(head(x[:1]), logits[:1])


def test_log_probabilities_of_a_prompt_are_those_of_float32(default_model: Transformer) -> None:
    """Of tokens that nobody would have drawn, too."""
    prompts = [[5, 40000, 77, 12000, 9], [8, 30001], list(range(100, 600, 7))]
    answers = generate(default_model, prompts, 1, logprobs=0, echo=True)
    weight = torch.cat(list(default_model.lm_head.dense(torch.float32)))
    for ids, answer in zip(prompts, answers):
        start = torch.zeros(1, dtype=torch.int32)
        x = default_model.norm(default_model.prefill(torch.tensor([ids]), start, hidden=True)[0])
        known = F.linear(x, weight).log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        assert answer.prompt_logprobs[1:] == pytest.approx(known.tolist(), abs=1e-3)


def test_a_float32_product_of_one_row_is_that_of_many() -> None:
    layer = Linear(576, 320, bias=False, device="cpu").requires_grad_(False).pack()
    x = torch.randn(70, 576)
    for n in (1, 2, 7, 70):
        parts = [layer(part) for part in x.split(n)]
        assert torch.equal(torch.cat(parts), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_head, window", [(3, None), (4, None), (8, 20)])
def test_tokens_that_attend_together_get_what_they_get_alone(
    dtype: torch.dtype, n_head: int, window: int | None
) -> None:
    for cached in (0, 1, 15, 40, 100):
        together, alone = (torch.randn(2, 1, 1, 120, 64).to(dtype) for _ in range(2))
        alone.copy_(together)
        q, k, v = (torch.randn(1, heads, 5, 64).to(dtype) for heads in (n_head, 1, 1))
        lens = torch.tensor([cached], dtype=torch.int32)
        want = flash_decode(q, *together, lens, k, v, window=window)
        for t in range(5):
            one = [x[:, :, t:t + 1] for x in (q, k, v)]
            got = flash_decode(one[0], *alone, lens + t, *one[1:], window=window)
            assert torch.equal(got, want[:, :, t:t + 1])


@pytest.mark.parametrize("n", [3, 16, 33, 130])
def test_attention_to_a_prompt_depends_on_nothing_behind_it_nor_on_chunks(n: int) -> None:
    q, k, v = (torch.randn(2, heads, 200, 64) for heads in (6, 2, 2))
    at = torch.arange(200)[None]

    def attend(first: int, last: int) -> Tensor:
        return prefill_attention(
            q[:, :, first:last], k[:, :, :last], v[:, :, :last], at[:, first:last], at[:, :last]
        )

    whole = attend(0, 200)
    assert torch.equal(attend(0, n), whole[:, :, :n])
    cut = n // 32 * 16
    assert torch.equal(torch.cat([attend(0, cut), attend(cut, n)], 2), whole[:, :, :n])
