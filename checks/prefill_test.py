"""Prefill: attention in tiles of queries, and what it holds in memory."""
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import model as model_module
from checks.common import close, hf_logits
from model import Transformer, load_model

Checkpoint = Callable[[str], tuple[Path, PreTrainedModel]]  # the fixture: random ones, by name


def random_tokens(*shape: int) -> Tensor:
    """Tokens of the random checkpoints' vocabulary, the same at every call."""
    return torch.randint(131, shape, generator=torch.Generator().manual_seed(1))


def positions(*depths: int) -> Tensor:
    """input_pos: how many tokens each row has cached."""
    return torch.tensor(depths, dtype=torch.int32)


def loaded(checkpoint: Checkpoint, name: str = "llama") -> Transformer:
    return load_model(checkpoint(name)[0], dtype=torch.float32)


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that an operator makes."""

    n = 0

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.n = max(self.n, out.numel())
        return out


@pytest.mark.parametrize("backend", [None, SDPBackend.MATH], ids=["default", "math"])
@pytest.mark.parametrize("name, cached", [
    ("llama", 0), ("llama", 30), ("mistral", 0), ("gemma2", 0), ("gemma2", 30),
])
def test_prefill_never_holds_all_scores(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, name: str, cached: int,
    backend: SDPBackend | None,
) -> None:
    """Not from the beginning, behind a prefix or with a window, and not if PyTorch has no kernel
    that does without them; the logits are the same."""
    model = loaded(checkpoint, name)
    model.setup_caches(1, 80)
    tokens = random_tokens(1, 80)
    last = torch.tensor([49])

    def prefill() -> Tensor:
        if cached:
            model.prefill(tokens[:, :cached], positions(0))
        return model.prefill(tokens[:, cached:cached + 50], positions(cached), last=last)

    want = prefill()
    bound = 50 * 160  # the product with most outputs
    assert model.config.n_head * 50 * (cached + 50) > bound
    monkeypatch.setattr("model.MAX_SCORES", bound)
    with nullcontext() if backend is None else sdpa_kernel(backend), Largest() as largest:
        close(prefill(), want, 1e-5)
    assert largest.n <= bound


@pytest.fixture
def tokens_before_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's result lies in memory as that of PyTorch's memory-efficient kernels on a GPU."""
    attention = F.scaled_dot_product_attention

    def as_on_a_gpu(*args: Any, **options: Any) -> Tensor:
        return attention(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", as_on_a_gpu)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("tile", [1, 7, 50])
def test_tiles_of_queries_change_nothing(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tokens_before_heads: None, name: str,
    tile: int,
) -> None:
    """Nor rows of different depths."""
    monkeypatch.setattr("model.QUERY_TILE", tile)
    folder, hf = checkpoint(name)
    model = load_model(folder, dtype=torch.float32)
    model.setup_caches(2, 64)
    tokens = random_tokens(2, 60)
    close(model.prefill(tokens[:, :20], positions(0, 0)), hf_logits(hf, tokens)[:, :20])
    behind = torch.stack((tokens[0, 20:60], tokens[1, 9:49]))
    logits = model.prefill(behind, positions(20, 9))
    close(logits[:1], hf_logits(hf, tokens[:1])[:, 20:])
    close(logits[1:], hf_logits(hf, tokens[1:])[:, 9:49])

# --- on a GPU, pretended ---


def flash_of_a_gpu(
    q: Tensor, keys: Tensor, values: Tensor, cum_seq_q: None, cum_seq_k: None, max_q: int,
    max_k: int, dropout_p: float, is_causal: bool, return_debug_mask: bool, *,
    scale: float | None = None, window_size_left: int | None = None,
    window_size_right: int | None = None, **_: Any,
) -> tuple[Tensor, ...]:
    """aten._flash_attention_forward, as flash-attention defines its masks."""
    assert (max_q, max_k) == (q.shape[1], keys.shape[1]) and dropout_p == 0
    assert q.shape[3] % 8 == 0, "head_size must be a multiple of 8"  # as flash_api.cpp says
    distance = torch.arange(max_k - max_q, max_k)[:, None] - torch.arange(max_k)  # (T, S)
    right = 0 if is_causal else window_size_right
    seen = distance >= -right
    if window_size_left is not None and window_size_left >= 0:
        seen &= distance <= window_size_left
    y = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, keys, values)), seen, scale=scale, enable_gqa=True)
    return y.transpose(1, 2), *(torch.empty(0) for _ in range(4))


@pytest.fixture
def flash_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Prefill's attention believes in a GPU -> the calls of its flash kernel."""
    calls = []

    class OnGPU(torch.Tensor):
        is_cpu = False
        is_cuda = True

    def called(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        calls.append(args)
        return flash_of_a_gpu(*args, **options)

    plain = model_module.prefill_attention

    def with_gpu(q: Tensor, *args: Any, **options: Any) -> Tensor:
        return plain(q.as_subclass(OnGPU), *args, **options).as_subclass(Tensor)

    monkeypatch.setattr(model_module, "prefill_attention", with_gpu)
    monkeypatch.setattr(model_module, "SDPAParams", lambda *args: args)
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda parameters: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", called)
    return calls


@pytest.mark.parametrize("name, flash", [
    # a call a layer for each of two chunks; of rings, whose places go round, for the first alone
    ("llama", 6), ("qwen3", 6), ("mistral", 3), ("qwen2-window", 4), ("gemma2", 0),
])
def test_a_gpus_flash_kernel_takes_chunks_and_windows(
    checkpoint: Checkpoint, flash_calls: list[tuple], name: str, flash: int
) -> None:
    folder, hf = checkpoint(name)
    model = load_model(folder, dtype=torch.float32)
    model.setup_caches(2, 64)
    tokens = random_tokens(2, 60)
    close(model.prefill(tokens[:, :40], positions(0, 0)), hf_logits(hf, tokens)[:, :40])
    close(model.prefill(tokens[:, 40:], positions(40, 40)), hf_logits(hf, tokens)[:, 40:])
    assert len(flash_calls) == flash
    # rows of different depths have a mask of their own
    behind = torch.stack((tokens[0, 20:50], tokens[1, 9:39]))
    if name in ("llama", "qwen3"):
        close(model.prefill(behind, positions(20, 9))[1:], hf_logits(hf, tokens[1:])[:, 9:39])
        assert len(flash_calls) == flash


def test_a_gpus_flash_kernel_takes_no_heads_of_100_values(flash_calls: list[tuple]) -> None:
    """As OpenLLaMA 3B has: PyTorch finds that they suit, and its kernel raises."""
    q, k, v = torch.randn(3, 1, 2, 9, 100, generator=torch.Generator().manual_seed(0))
    index = torch.arange(9)[None]
    options = dict(scale=None, window=None)
    want = model_module.math_attention(q, k, v, index, index, **options)
    close(model_module.prefill_attention(q, k, v, index, index, **options, in_order=True), want)
    assert not flash_calls
