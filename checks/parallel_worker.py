"""What each rank of parallel_test.py runs."""
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import parallel
from cli.stats import weight_bytes
from generate import compile_model, generate
from model import JOINED, ModelConfig, Transformer, joined_rows, load_model
from parallel import Ranks, Team
from parallel.ranks import piece
from quantize import QuantizedLinear


def run_case(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Load a rank's part and generate -> what each rank got, and the share of weights it has."""
    options = dict(dtype=torch.float32, quantize=case["quantize"])
    whole = load_model(case["path"], **options)
    model = parallel.load_model(case["path"], ranks, **options)
    n_same = compare_integers(model, whole, ranks)
    kv_dtype = torch.int8 if case["int8_kv"] else None
    model.setup_caches(len(case["prompts"]), 64, kv_dtype, case["attention"])
    if case["compile"]:
        compile_model(model)
    tokens = generate(
        model, case["prompts"], case["max_new_tokens"], compile=case["compile"], **case["options"]
    )
    of_all = [None] * ranks.size
    dist.all_gather_object(of_all, tokens)
    prompt = torch.tensor(case["prompts"][-1:])
    logits = model.prefill(prompt, torch.zeros(1, dtype=torch.int32))
    return {
        "tokens": of_all,
        "logits": logits[0, -1].tolist(),
        "share": weight_bytes(model) / weight_bytes(whole),
        "layers_compared": n_same,
    }


def compare_integers(model: Transformer, whole: Transformer, ranks: Ranks) -> int:
    """Assert that a rank's quantized layers are parts of the whole's -> how many there are."""
    n = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        theirs = whole.get_submodule(name).stored()
        for kind, tensor in layer.stored().items():
            rows = rows_of(name, len(theirs[kind]), whole.config)
            ours = rows_of(name, len(tensor), model.config)
            parts = []
            for part, n_rows in zip(theirs[kind].split(rows), ours, strict=True):
                parts.append(piece(part, (n_rows, *tensor.shape[1:]), ranks))
            assert torch.equal(tensor, torch.cat(parts)), (name, kind)
        n += 1
    return n


def rows_of(name: str, n_rows: int, config: ModelConfig) -> list[int]:
    """How many of a layer's rows belong to each of the layers that it joins."""
    module = name.split(".")[-1]
    return joined_rows(module, n_rows, config) if module in JOINED else [n_rows]


def run_cases(cases: list[dict[str, Any]], out: Path) -> None:
    """What a rank runs: the first one writes all results."""
    results = []
    with Team() as team:
        team.form_groups(None, "cpu")
        for case in cases:
            results.append(run_case(case, team.ranks))
        if team.is_first:
            out.write_text(json.dumps(results))
