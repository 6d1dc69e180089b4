"""What each rank of parallel_test.py runs: cases from a file, their tokens into another.

    torchrun --nproc_per_node=2 checks/parallel_worker.py cases.json tokens.json"""
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from generate import compile_model, generate
from model import load_model
from parallel import Team


def run_case(case: dict[str, Any], team: Team) -> dict[str, Any]:
    """Load, generate -> the tokens and how many bytes of weights this rank has."""
    model = load_model(
        case["path"], dtype=torch.float32, quantize=case.get("quantize"), ranks=team.ranks
    )
    kv_dtype = torch.int8 if case.get("int8_kv") else None
    model.setup_caches(len(case["prompts"]), 64, kv_dtype, case.get("attention", "auto"))
    if case.get("compile"):
        compile_model(model)
    tokens = generate(
        model, case["prompts"], case["max_new_tokens"], compile=case.get("compile", False),
        **case.get("options", {}),
    )
    tokens_of_all = [None] * team.ranks.size
    torch.distributed.all_gather_object(tokens_of_all, tokens)
    assert all(other == tokens for other in tokens_of_all), "ranks differ"
    return {"tokens": tokens, "weight_bytes": model.weight_bytes()}


def main() -> None:
    cases, out = sys.argv[1:]
    team = Team(None, "cpu")
    results = []
    for case in json.loads(Path(cases).read_text()):
        results.append(run_case(case, team))
    if team.is_first:
        Path(out).write_text(json.dumps(results))
    team.leave()


if __name__ == "__main__":
    main()
