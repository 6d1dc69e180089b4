"""Mixtures of experts: every token goes to the few feed-forward networks that a router scores
highest for it. Decoding reads the bytes of these experts only, so that a model costs what its
active weights do: 3 of 30 billion in Qwen3-30B-A3B."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from families.settings import of_layers
from model import ACTIVATIONS, MLP, ModelConfig, is_number, positive
from quantize import LAYOUTS, Linear

MOST_EXPERTS = 2**16  # of all layers: far above any model's, and each is made of modules

# --- what they are ---


@dataclass(frozen=True)
class MoEConfig:
    """What the layers with a mixture of experts are."""

    n_expert: int
    n_active: int  # experts that a token goes to
    ffn_dim: int  # of an expert
    layers: tuple[bool, ...]  # which layers have experts; the others have an MLP
    shared_ffn_dim: int  # of an expert that all tokens go to; 0: there is none
    normalize: bool  # the weights of a token's experts add up to 1
    gated_share: bool = True  # how much of the shared expert a token gets is learned, too
    score: str = "softmax"  # or "sigmoid"
    bias_dims: int = 0  # of what is added to scores to choose by; 0: nothing is
    n_group: int = 1  # of which the best topk_group may be chosen from
    topk_group: int = 1
    best_of_group: int = 2  # how many of its scores a group's is the sum of
    scale: float = 1.0  # of the weights


def mixture_of_experts(
    hf: dict, n_expert: str | None = None, n_active: str = "num_experts_per_tok",
    ffn_dim: str = "moe_intermediate_size", shared: str = "shared_expert_intermediate_size",
    **fields: Any,
) -> MoEConfig | None:
    """None if no layer has one. n_expert, n_active, ffn_dim and shared: names of the settings that
    have these numbers, n_expert's by default one of two; fields: of a MoEConfig, whatever settings
    say."""
    if n_expert is None:
        n_expert = "num_experts" if hf["num_local_experts"] is None else "num_local_experts"
        if hf[n_expert] is None:
            raise ValueError("the configuration has neither num_experts nor num_local_experts")
    if hf.get(n_expert) == 0:
        return None
    n_layer = positive(hf, "num_hidden_layers")
    step = positive(hf, "decoder_sparse_step", 1)
    dense = hf.get("mlp_only_layers") or []
    has_none = hf.get(shared) is None or is_number(hf[shared]) and hf[shared] == 0
    settings: dict[str, Any] = dict(
        n_expert=of_all_layers(hf, n_expert),
        n_active=of_all_layers(hf, n_active),
        ffn_dim=positive(hf, ffn_dim),
        layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(n_layer)),
        shared_ffn_dim=0 if has_none else positive(hf, shared),
        normalize=bool(hf.get("norm_topk_prob", True)),
    )
    config = MoEConfig(**settings | fields)
    if config.n_active > config.n_expert:
        there = f"there are {config.n_expert} experts"
        raise ValueError(f"{n_active} is {config.n_active}, but {there}")
    if n_layer * config.n_expert > MOST_EXPERTS:
        each = f"{n_expert} = {config.n_expert} in each of {n_layer} layers"
        most = f"there may be {MOST_EXPERTS} experts in all"
        raise ValueError(f"the model's configuration has {each}: {most}")
    in_groups = config.n_expert // config.n_group * config.topk_group  # a token's best ones
    if config.n_expert % config.n_group or not config.n_active <= in_groups <= config.n_expert:
        groups = f"the best {config.topk_group} of {config.n_group} groups of them"
        raise ValueError(f"{config.n_active} of {config.n_expert} experts cannot be in {groups}")
    return config


def of_all_layers(hf: dict, key: str) -> int:
    """A number above 0, for which a file may have a list of the same for each layer."""
    value = hf.get(key)
    if isinstance(value, list) and value.count(value[0]) == len(value):
        value = value[0]
    return positive({key: value}, key)


def deepseek_moe(hf: dict, n_expert: str = "n_routed_experts", **fields: Any) -> MoEConfig | None:
    """The first layers have none; a token's experts are of some groups."""
    dense = range(hf["first_k_dense_replace"])
    kinds = of_layers(hf, "mlp_layer_types")
    if kinds is not None:
        dense = [layer for layer, kind in enumerate(kinds) if kind == "dense"]
    shared = hf["n_shared_experts"] * positive(hf, "moe_intermediate_size")
    if hf.get("topk_method") != "greedy":
        fields |= dict(n_group=positive(hf, "n_group"), topk_group=positive(hf, "topk_group"))
    scale = positive(hf, "routed_scaling_factor", kind=float)
    settings = dict(mlp_only_layers=dense, shared_expert_intermediate_size=shared)
    return mixture_of_experts(hf | settings, n_expert, gated_share=False, scale=scale, **fields)


def ernie_moe(hf: dict) -> MoEConfig | None:
    last = hf["moe_layer_end_index"] % positive(hf, "num_hidden_layers")
    if hf["use_bias"] or last + 1 != positive(hf, "num_hidden_layers"):
        raise ValueError("unsupported use_bias or moe_layer_end_index of ERNIE's experts")
    if (hf.get("moe_norm_min") or 0) > hf["moe_k"] / hf["moe_num_experts"]:
        raise ValueError(f"unsupported moe_norm_min {hf['moe_norm_min']}: some weights are less")
    return deepseek_moe(hf | dict(
        n_shared_experts=hf["moe_num_shared_experts"], decoder_sparse_step=hf["moe_layer_interval"],
        first_k_dense_replace=hf["moe_layer_start_index"], topk_method="greedy",
        routed_scaling_factor=1.0,
    ), "moe_num_experts", n_active="moe_k", bias_dims=2)

# --- the layers ---


class Router(nn.Linear):
    """Its bias is for choosing alone, and stays float32 whatever a model's dtype is."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        bias = self.e_score_correction_bias
        return super()._apply(
            lambda x: fn(x.view(torch.int32)).view(x.dtype) if x is bias else fn(x), recurse
        )


class MoE(nn.Module):
    """A mixture of experts, its modules named as in Hugging Face's checkpoints."""

    def __init__(self, config: ModelConfig, kind: type[Experts]):
        super().__init__()
        moe = config.moe
        self.moe = moe
        # the router and the shared expert's gate are small: they are never quantized
        self.gate = nn.Linear(config.dim, moe.n_expert, bias=kind.bias)
        if moe.bias_dims:
            self.gate = Router(config.dim, moe.n_expert, bias=False)
            bias = torch.empty([1] * (moe.bias_dims - 1) + [moe.n_expert])
            self.gate.e_score_correction_bias = nn.Parameter(bias)
        self.experts = kind(config)
        self.shared_expert = None
        if moe.shared_ffn_dim:
            self.shared_expert = MLP(config, 0, moe.shared_ffn_dim)
        if moe.shared_ffn_dim and moe.gated_share:
            self.shared_expert_gate = nn.Linear(config.dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        y = self.experts(x, weights, ids)
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            if self.moe.gated_share:
                shared = self.shared_expert_gate(x).sigmoid() * shared
            y = y + shared
        return y

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, dim] -> the weights of each token's experts and their numbers, [B, T, n_active]
        each."""
        bias = self.gate.e_score_correction_bias if self.moe.bias_dims else None
        weights, ids = choose(self.gate(x), self.moe, bias)
        return weights.to(x.dtype), ids


def choose(scores: Tensor, moe: MoEConfig, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """scores [B, T, n_expert] of a router -> weights, in float32, and numbers of each token's
    experts. bias: what is added to scores to choose by."""
    scores = scores.float()
    scores = scores.sigmoid() if moe.score == "sigmoid" else scores.softmax(-1)
    choice = scores if bias is None else scores + bias
    if moe.n_group > 1:
        choice = in_best_groups(choice, moe)
    weights, ids = choice.topk(moe.n_active, dim=-1, sorted=False)  # a GPU sorts in a launch more
    if choice is not scores:
        weights = scores.gather(-1, ids)
    if moe.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return (weights if moe.scale == 1 else weights * moe.scale), ids


def in_best_groups(choice: Tensor, moe: MoEConfig) -> Tensor:
    """choice [B, T, n_expert], -inf in all groups but a token's best ones."""
    groups = choice.unflatten(-1, (moe.n_group, -1))
    of_group = groups.topk(moe.best_of_group)[0].sum(-1)  # (B, T, n_group)
    best = of_group.topk(moe.topk_group)[1]
    others = torch.ones_like(of_group, dtype=torch.bool).scatter(-1, best, False)
    return groups.masked_fill(others[..., None], -torch.inf).flatten(-2)


class Experts(nn.Module):
    """The experts of a layer: each is a gated feed-forward network."""

    bias = False  # of the router too

    def __init__(self, config: ModelConfig):
        super().__init__()
        moe = config.moe
        self.n_expert = moe.n_expert
        self.n_active = moe.n_active
        self.act = ACTIVATIONS[config.act]
        self.gate_up_proj = StackedLinear(moe.n_expert, config.dim, 2 * moe.ffn_dim, self.bias)
        self.down_proj = StackedLinear(moe.n_expert, moe.ffn_dim, config.dim, self.bias)
        self.register()

    def glu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act(gate) * up

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """x [B, T, dim] and, of each token, its experts' weights and numbers [B, T, n_active] ->
        [B, T, dim].

        Up to 16 tokens a row, as in decode, never wait for the host on a GPU. More, as in prefill,
        are grouped by expert, in bfloat16 without the host too, and so is everything on a CPU,
        where the host has the numbers."""
        few = x.shape[1] <= 16 and ids.numel() < 2**16  # programs of a grid's second dimension
        if self.gate_up_proj.layout is not None and few:
            rows = x.flatten(0, 1)
            ids = ids.flatten(0, 1)
            hidden = self.glu(self.gate_up_proj(rows, ids))  # (B T, n_active, ffn_dim)
            y = self.down_proj(hidden, ids)  # (B T, n_active, dim)
            return (y * weights.view(*ids.shape, 1)).sum(1).view_as(x)
        of_16_bytes = x.shape[-1] % 8 == self.down_proj[0].in_features % 8 == 0
        if self.gate_up_proj.layout is not None and x.dtype == torch.bfloat16 and of_16_bytes:
            return self.in_groups(x, weights, ids)
        if torch.compiler.is_compiling():  # which experts there are depends on the tokens
            return one_by_one(x, weights, ids, self.key)
        return self.one_by_one(x, weights, ids)

    def in_groups(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The same, with one product for all experts: it wants bfloat16 in rows of 16 bytes."""
        experts, pairs = ids.flatten().sort()  # of token and expert, by expert
        rows = x.reshape(-1, x.shape[-1])[pairs // self.n_active]  # (B T n_active, dim)
        hidden = self.glu(self.gate_up_proj.in_groups(rows, experts))
        out = self.down_proj.in_groups(hidden, experts)
        y = torch.empty_like(out).index_copy_(0, pairs, out).view(*ids.shape, -1)
        return (y * weights[..., None]).sum(-2)

    def one_by_one(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The same, with a product for each chosen expert."""
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
        """Let the operator one_by_one find these experts by a key. It is a tensor, so that one
        compiled graph serves all layers."""
        self.key = torch.tensor(id(self), device="cpu")
        EXPERTS[id(self)] = self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.register()  # a copy is not what it was copied from


class ClampedExperts(Experts):
    """gpt-oss's: up in -limit ... limit, 1 more, times gate, at most limit, times the sigmoid of
    alpha * gate."""

    bias = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.alpha = positive(config.hf, "swiglu_alpha", kind=float)
        self.limit = positive(config.hf, "swiglu_limit", kind=float)

    def glu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gate = gate.clamp(max=self.limit)
        up = up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * (gate * self.alpha).sigmoid()


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

    Where products/ has a kernel for the device, their tensors lie in one stack [n_expert, ...]
    each, from which it takes what the tokens chose. Elsewhere they lie alone."""

    layout: Any = None  # quantize.LAYOUTS["experts", device type]; None: there are no stacks

    def __init__(self, n: int, in_features: int, out_features: int, bias: bool):
        super().__init__(Linear(in_features, out_features, bias=bias) for _ in range(n))

    def stack(self) -> None:
        """Bring the tensors of the layers into stacks, where a kernel reads them."""
        self.layout = LAYOUTS.get(("experts", self[0].weight.device.type))
        if self.layout is None:
            return
        for name, _ in [*self[0].named_parameters(), *self[0].named_buffers()]:
            stack = torch.stack([getattr(layer, name) for layer in self])
            for layer, tensor in zip(self, stack, strict=True):
                if isinstance(getattr(layer, name), nn.Parameter):
                    tensor = nn.Parameter(tensor, requires_grad=False)
                setattr(layer, name, tensor)
            self.register_buffer(name, stack, persistent=False)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """x [R, K], a vector of each token, or [R, n_active, K], one for each of its experts ->
        [R, n_active, N]: the products with the experts ids [R, n_active]."""
        y = self.layout.product(self, x, ids)
        if self[0].bias is not None:
            y = y + self.bias[ids]
        return y

    def in_groups(self, x: Tensor, experts: Tensor) -> Tensor:
        """x [pairs, K] -> [pairs, N]: each row times the weight of its expert; experts [pairs],
        ascending. On GPUs that PyTorch has such a product for, the host does not learn of them."""
        numbers = torch.arange(len(self), device=x.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        y = F.grouped_mm(x, self.layout.dense(self).mT, offs=ends)
        return y if self[0].bias is None else y + self.bias[experts]


def mlp_or_moe(config: ModelConfig, layer: int, kind: type[Experts] = Experts) -> nn.Module:
    """A layer's feed-forward network: some layers have no experts. kind: those of the others."""
    has_experts = config.moe is not None and config.moe.layers[layer]
    return MoE(config, kind) if has_experts else MLP(config, layer)
