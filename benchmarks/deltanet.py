"""Layers with a state on a CPU, a token a step: ours beside transformers', in turns.

    python benchmarks/deltanet.py [--dtype float32] [--quantize int8] [--hidden_size 1024]

Milliseconds a layer, medians; what the products of its weights alone take; and what the machine
moves their bytes in, by a copy of its own: no decoder is faster than it reads them. There are
several layers, so that no cache holds their weights. Both have the same; int8 is ours alone."""
import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from transformers import DynamicCache, Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cpu  # products of a CPU put themselves into a table
import families
from cli.stats import copy_bandwidth
from families.delta_rule import BLOCK
from families.deltanet import STORED_AS, GatedDeltaNet
from model import KVCache, ModelConfig, Positions
from quantize import Linear, quantize_model

assert cpu and families
CONFIG = Path(__file__).with_name("configs") / "Qwen3.6-35B-A3B.json"
PROMPT = 1000  # tokens


class Peers:
    """The same layers, ours and theirs."""

    def __init__(self, hf: dict, n_layer: int, dtype: torch.dtype, quantize: str | None) -> None:
        self.dtype = dtype
        self.config = ModelConfig.from_hf(hf)
        kinds = ["linear_attention"] * n_layer
        sizes = {key: hf[key] for key in hf if key == "hidden_size" or key.startswith("linear_")}
        self.hf_config = Qwen3_5MoeTextConfig(
            **sizes, num_hidden_layers=n_layer, layer_types=kinds)
        self.theirs = [Qwen3_5MoeGatedDeltaNet(self.hf_config, i) for i in range(n_layer)]
        self.ours = [GatedDeltaNet(self.config, 0) for _ in range(n_layer)]
        for ours, theirs in zip(self.ours, self.theirs):
            for name, x in theirs.named_parameters():
                x.data = torch.ones_like(x) if name == "norm.weight" else 0.02 * torch.randn_like(x)
            weights = theirs.to(dtype).state_dict()
            for joined, parts in STORED_AS.items():
                rows = [weights.pop(f"{part}.weight") for part in parts]
                weights[f"{joined}.weight"] = torch.cat(rows)
            ours.to(dtype).requires_grad_(False).load_state_dict(weights)
            if quantize:
                quantize_model(ours, quantize)
            for layer in ours.modules():
                if isinstance(layer, Linear):
                    layer.pack()

    def steps(self, n_tokens: int) -> dict[str, Callable[[int, Tensor], Tensor]]:
        """By name, a step of the token x [1, 1, dim] at a position behind so many tokens."""
        makers = [layer.make_cache for layer in self.ours]
        cache = KVCache(len(makers), 1, 1, 1, n_tokens, dtype=self.dtype, makers=makers)
        layers = list(zip(self.ours, cache.layers(slice(0, 1))))
        past = DynamicCache(config=self.hf_config)
        prompt = torch.randn(1, PROMPT, self.config.dim, dtype=self.dtype)
        for (ours, own), theirs in zip(layers, self.theirs):
            ours(prompt, Positions(torch.tensor([0]), None, True, 0), own)
            theirs(prompt, cache_params=past)
            own.memory.folded.fill_((n_tokens // BLOCK - 1) * BLOCK)  # as if it were that long

        def step(position: int, x: Tensor) -> Tensor:
            where = Positions(torch.tensor([position]), None, False, 0)
            return torch.cat([layer(x, where, own) for layer, own in layers])

        def their_step(position: int, x: Tensor) -> Tensor:
            return torch.cat([layer(x, cache_params=past) for layer in self.theirs])

        return {"ours": step, "transformers": their_step,
                "our products": lambda _, x: products(self.ours, x),
                "their products": lambda _, x: products(self.theirs, x)}


def products(layers: list[nn.Module], x: Tensor) -> Tensor:
    """All products of the layers' weights, out_proj's with some of what the first gives."""
    for layer in layers:
        y = [part(x) for name, part in layer.named_children() if name.startswith("in_proj")][0]
        x = layer.out_proj(y[..., :layer.out_proj.in_features])
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--quantize", choices=["int8", "int4"])
    parser.add_argument("--hidden_size", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=48)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    hf = json.loads(CONFIG.read_text()) | {"hidden_size": args.hidden_size}
    peers = Peers(hf, args.layers, getattr(torch, args.dtype), args.quantize)
    nbytes = sum(x.nbytes for layer in peers.theirs for x in layer.parameters()) / args.layers
    print(f"{nbytes / 1e6:.1f} MB of weights a layer, {torch.get_num_threads()} threads, "
          f"load {os.getloadavg()[0]:.1f}; read in "
          f"{1e3 * nbytes / copy_bandwidth('cpu', 2**28):.2f} ms")
    for n_tokens in (1000, 32000):
        steps = peers.steps(n_tokens)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(args.rounds):
            x = torch.randn(1, 1, peers.config.dim, dtype=peers.dtype)
            for name, step in steps.items():
                start = time.perf_counter()
                step(n_tokens + i, x)
                times[name].append(1e3 * (time.perf_counter() - start) / args.layers)
        medians = {name: statistics.median(each) for name, each in times.items()}
        said = ", ".join(f"{name} {ms:.2f}" for name, ms in medians.items())
        ratio = medians["transformers"] / medians["ours"]
        print(f"{n_tokens} tokens, ms a layer: {said}; {ratio:.2f}x", flush=True)


if __name__ == "__main__":
    main()
