"""What files call the tensors of a mixture of experts, and how they stack them."""
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

# names of the tensors of a mixture of experts; in our model a layer has an expert's number
EXPERT = re.compile(r"experts\.(?P<number>\d+)\.(?P<part>gate|up|down)_proj\.(?P<kind>weight|bias)")
MIXTRAL = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def other_names(name: str) -> Iterator[str]:
    """What else files call a tensor of a mixture of experts: Mixtral's name, gpt-oss's of the
    router, and that of the stack in which gpt-oss and transformers 5 have all experts."""
    mixtral = name
    for part, theirs in MIXTRAL.items():
        mixtral = mixtral.replace(part, theirs)
    yield mixtral
    yield name.replace(".mlp.gate.", ".mlp.router.")
    expert = EXPERT.search(name)
    if expert:
        part = "down_proj" if expert["part"] == "down" else "gate_up_proj"
        bias = "_bias" if expert["kind"] == "bias" else ""
        yield f"{name[:expert.start()]}experts.{part}{bias}"


def n_experts(config: dict[str, Any]) -> int | None:
    """How many experts a layer has, by the name that files of Mixtral have or by the other."""
    if config.get("num_local_experts") is not None:
        return config["num_local_experts"]
    return config.get("num_experts")


def one_expert(stored: Tensor, part: str, by_turns: bool) -> Tensor:
    """A projection out of what a stack has of an expert: the rows [N, ...] of down, or [2 N, ...]
    of gate and up, one below the other or, in gpt-oss, by turns."""
    if part == "down":
        return stored
    if by_turns:
        gate, up = stored[::2], stored[1::2]
    else:
        gate, up = stored.chunk(2)
    return gate if part == "gate" else up


def check_stack(name: str, stack: Any, config: dict) -> None:
    """ValueError unless a stack has as many experts as the configuration says."""
    n_expert = n_experts(config)
    if tuple(stack.shape[:1]) != (n_expert,):
        raise ValueError(
            f"tensor {name} has shape {tuple(stack.shape)}, not an entry for each of {n_expert} "
            "experts"
        )
