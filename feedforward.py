"""What follows attention in a layer: the gated feed-forward network, and mixtures of experts.

In a mixture every token goes to the few experts that a router scores highest for it. Decoding reads
the bytes of these experts only, so that a model costs what its active weights do: 3 of 30 billion
in Qwen3-30B-A3B."""
import itertools
from functools import partial
from weakref import WeakValueDictionary

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import kernels
from config import ModelConfig
from quantize import GroupedInt8Linear, Linear

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class MLP(nn.Module):
    """The gated feed-forward network; gate and up are one product. ffn_dim: None for config's."""

    def __init__(self, config: ModelConfig, ffn_dim: int | None = None):
        super().__init__()
        self.act = ACTIVATIONS[config.act]
        ffn_dim = ffn_dim or config.ffn_dim
        self.gate_up_proj = Linear(config.dim, 2 * ffn_dim, bias=config.mlp_bias)
        self.down_proj = Linear(ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up)

# --- mixtures of experts ---


class MoE(nn.Module):
    """A mixture of experts, its modules named as in Hugging Face's checkpoints."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        moe = config.moe
        self.n_active = moe.n_active
        self.normalize = moe.normalize
        # the router and the shared expert's gate are small: they are never quantized
        self.gate = nn.Linear(config.dim, moe.n_expert, bias=moe.bias)
        self.experts = self.make_experts(config)
        self.shared_expert = None
        if moe.shared_ffn_dim:
            self.shared_expert = MLP(config, moe.shared_ffn_dim)
            self.shared_expert_gate = nn.Linear(config.dim, 1, bias=False)

    def make_experts(self, config: ModelConfig) -> "Experts":
        return Experts(config)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        y = self.experts(x, weights, ids)
        if self.shared_expert is not None:
            share = self.shared_expert_gate(x).sigmoid()  # (B, T, 1)
            y = y + share * self.shared_expert(x)
        return y

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, dim] -> the weights of each token's experts and their numbers, [B, T, n_active]
        each."""
        scores = self.gate(x).float().softmax(-1)  # (B, T, n_expert)
        weights, ids = scores.topk(self.n_active, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), ids


class Experts(nn.Module):
    """The experts of a layer: each is a gated feed-forward network."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        moe = config.moe
        self.n_expert = moe.n_expert
        self.n_active = moe.n_active
        self.act = ACTIVATIONS[config.act]
        self.gate_up_proj = StackedLinear(moe.n_expert, config.dim, 2 * moe.ffn_dim, moe.bias)
        self.down_proj = StackedLinear(moe.n_expert, moe.ffn_dim, config.dim, moe.bias)
        self.register()

    def glu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act(gate) * up

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """x [B, T, dim] and, of each token, its experts' weights and numbers [B, T, n_active] ->
        [B, T, dim].

        Up to 16 tokens a row, as in decode, never wait for the host on a GPU. More, as in prefill,
        are grouped by expert, and so is everything on a CPU, where the host has the numbers."""
        if self.gate_up_proj.stacked and x.shape[1] <= 16:
            rows = x.flatten(0, 1)
            ids = ids.flatten(0, 1)
            hidden = self.glu(self.gate_up_proj(rows, ids))  # (B T, n_active, ffn_dim)
            y = self.down_proj(hidden, ids)  # (B T, n_active, dim)
            return (y * weights.view(*ids.shape, 1)).sum(1).view_as(x)
        if torch.compiler.is_compiling():  # which experts there are depends on the tokens
            return one_by_one(x, weights, ids, self.key)
        return self.one_by_one(x, weights, ids)

    def one_by_one(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The same, with each chosen expert's tokens together."""
        rows = x.reshape(-1, x.shape[-1])  # (B T, dim)
        weights = weights.reshape(-1, 1)
        ids = ids.flatten()
        pairs = ids.argsort()  # of token and expert, by expert
        counts = ids.bincount(minlength=self.n_expert).tolist()
        y = torch.zeros_like(rows)
        for expert, mine in enumerate(pairs.split(counts)):
            if len(mine) == 0:
                continue
            token = mine // self.n_active
            hidden = self.glu(self.gate_up_proj[expert](rows[token]))
            out = self.down_proj[expert](hidden)  # (tokens of this expert, dim)
            y.index_add_(0, token, out * weights[mine])
        return y.view_as(x)

    def share(self, rows: int) -> float:
        """The share of the experts that a step of so many tokens reads, if each token's are as good
        as drawn at random: 1 - (1 - n_active / n_expert) ** rows."""
        return 1 - (1 - self.n_active / self.n_expert) ** rows

    def register(self) -> None:
        """Take a number by which the operator one_by_one finds these experts. It is a tensor, so
        that one compiled graph serves all layers."""
        number = next(NUMBERS)
        self.key = torch.tensor(number, device="cpu")
        EXPERTS[number] = self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.register()  # a copy is not what it was copied from


class ClampedExperts(Experts):
    """gpt-oss's: up in -limit ... limit, 1 more, times gate, at most limit, times the sigmoid of
    alpha * gate."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.alpha = config.moe.glu_alpha
        self.limit = config.moe.glu_limit

    def glu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gate = gate.clamp(max=self.limit)
        up = up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * (gate * self.alpha).sigmoid()


class ClampedMoE(MoE):
    """gpt-oss's mixture of experts."""

    def make_experts(self, config: ModelConfig) -> Experts:
        return ClampedExperts(config)


NUMBERS = itertools.count()
EXPERTS: WeakValueDictionary[int, Experts] = WeakValueDictionary()


@torch.library.custom_op("gpt_flash::experts_one_by_one", mutates_args=())
def one_by_one(x: Tensor, weights: Tensor, ids: Tensor, key: Tensor) -> Tensor:
    """Experts.one_by_one, in a compiled graph."""
    return EXPERTS[int(key)].one_by_one(x, weights, ids)


@one_by_one.register_fake
def one_by_one_fake(x: Tensor, weights: Tensor, ids: Tensor, key: Tensor) -> Tensor:
    return x.new_empty(x.shape)


class StackedLinear(nn.ModuleList):
    """The same projection of all experts: a layer each, quantized, saved and loaded like any other.

    On a GPU their tensors lie in one stack [n_expert, ...] each, from which a kernel takes what the
    tokens chose. On a CPU they lie alone, each as its operator wants it."""
    devices = ("cuda",)
    stacked = False

    def __init__(self, n: int, in_features: int, out_features: int, bias: bool):
        super().__init__(Linear(in_features, out_features, bias=bias) for _ in range(n))

    def stack(self) -> None:
        """Bring the tensors of the layers into stacks, where a kernel reads them."""
        if self[0].weight.device.type not in self.devices:
            return
        first = [*self[0].named_parameters(), *self[0].named_buffers()]
        for name, _ in first:
            stack = torch.stack([getattr(layer, name) for layer in self])
            for layer, tensor in zip(self, stack, strict=True):
                if isinstance(getattr(layer, name), nn.Parameter):
                    tensor = nn.Parameter(tensor, requires_grad=False)
                setattr(layer, name, tensor)
            self.register_buffer(name, stack, persistent=False)
        self.stacked = True

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """x [R, K], a vector of each token, or [R, n_active, K], one for each of its experts ->
        [R, n_active, N]: the products with the experts ids [R, n_active]."""
        if isinstance(self[0], GroupedInt8Linear):
            x = self[0].for_nibbles(x)
        y = kernels.experts_linear(x, ids, self.weight, getattr(self, "scales", None))
        if self[0].bias is not None:
            y = y + self.bias[ids]
        return y
