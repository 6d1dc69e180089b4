"""What speculative decoding brings: prompt lookup on texts that repeat themselves and on others,
and a quantized draft of the model itself.

    python benchmarks/speculate.py --dtype bfloat16 --draft_quantize int4

The default model continues
- edit: a file of code and the first line of its copy, greedily, which it goes on copying;
- story: the beginning of a story, drawn at temperature 1, in which little returns,
by plain steps and by steps that check proposals. All make the same tokens, in turns, --rounds
times; the least wall time of decoding counts, as disturbances only add.

For the draft it also says how often the two models agree on a token of such texts drawn at
temperature 1: when both draw with the same noise, as here, and when they are coupled as well as
any two can be, as in rejection sampling (1 minus the distance in total variation)."""
import argparse
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from batching import Engine, Stats
from benchmarks.decode import DTYPES, add_machine, device_facts
from cli.arguments import Parser, number
from generate import Request, Sampling, compile_model, generate, load_tokenizer, sample, say
from model import Transformer, first_line, load_model

CODE = '''import math


def mean(values):
    """The arithmetic mean of some numbers."""
    if not values:
        raise ValueError("there are no values")
    return sum(values) / len(values)


def variance(values):
    """The mean squared distance from the mean."""
    center = mean(values)
    return mean([(value - center) ** 2 for value in values])


def standard_deviation(values):
    """The square root of the variance."""
    return math.sqrt(variance(values))


def median(values):
    """The number in the middle, or the mean of the two."""
    ordered = sorted(values)
    half = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[half]
    return mean(ordered[half - 1:half + 1])
'''
EDIT = f"# statistics.py\n{CODE}\n\n# statistics.py, with average instead of mean\nimport math\n"
STORY = "On the morning the lighthouse went dark, Ilse was already awake and"
TEXTS = {"edit": (EDIT, 0.0), "story": (STORY, 1.0)}  # text, temperature
AGREEMENT_SEEDS = 64  # draws of each token of a text


@dataclass
class Setup:
    """One way to decode."""

    name: str
    k: int
    draft: Transformer | None = None


def measure(
    model: Transformer, prompt: list[int], setups: list[Setup], args: argparse.Namespace,
    temperature: float,
) -> list[dict]:
    """Each setup's least time to decode the same tokens, and what its proposals brought."""
    engines = {}
    for setup in setups:
        room = len(prompt) + args.max_new_tokens + setup.k
        cache = model.setup_caches(args.batch_size, room)
        engines[setup.name] = Engine(
            model, cache, compiled=args.compile, speculate_k=setup.k, draft=setup.draft
        )
    best: dict[str, Stats] = {}
    texts = []
    for turn in range(args.rounds + 1):  # the first to warm up
        for name, engine in engines.items():
            stats = Stats()
            texts.append(generate(
                model, [prompt] * args.batch_size, args.max_new_tokens, temperature=temperature,
                seed=1, engine=engine, stats=stats,
            ))
            faster = name not in best or sum(stats.steps_s) < sum(best[name].steps_s)
            if turn == 1 or turn > 1 and faster:
                best[name] = stats
    same = sum(text == texts[0] for text in texts) / len(texts)
    plain = best[setups[0].name]
    return [describe(setup, best[setup.name], plain, same) for setup in setups]


def describe(setup: Setup, stats: Stats, plain: Stats, same: float) -> dict:
    seconds = sum(stats.steps_s)
    found = stats.speculation
    row = {
        "how": setup.name,
        "k": setup.k,
        "tokens_per_s": stats.decode_tokens / seconds,
        "times_plain": sum(plain.steps_s) / seconds,
        "tokens_per_row_step": stats.decode_tokens / stats.useful_row_steps,
        "checking_steps": len(found.checking_s),
        "steps": len(stats.steps_s),
        "accepted_by_position": [right / found.checked for right in found.accepted],
        "runs_with_the_same_text": same,
    }
    say(
        f"  {setup.name}: {row['tokens_per_s']:.1f} tokens/s, {row['times_plain']:.2f}x plain, "
        f"{row['tokens_per_row_step']:.2f} tokens a step, accepted by position "
        + " ".join(f"{share:.0%}" for share in row["accepted_by_position"])
    )
    return row


@torch.no_grad()
def agreement(model: Transformer, draft: Transformer, text: list[int]) -> dict[str, float]:
    """How often a draft proposes what the model draws at temperature 1, over a text's tokens."""
    tokens = torch.tensor([text], device=model.device)
    input_pos = torch.zeros(1, dtype=torch.int32, device=model.device)
    logits = []
    for each in (model, draft):
        each.setup_caches(1, len(text))
        logits.append(each.prefill(tokens, input_pos, cached=0)[0].float())  # (T, V)
    p, q = [x.softmax(-1) for x in logits]
    overlap = torch.minimum(p, q).sum(-1).mean()
    agreed = [same_draws(*logits, seed) for seed in range(AGREEMENT_SEEDS)]
    result = {
        "agreement_of_rejection_sampling": float(overlap),
        "agreement_of_common_noise": sum(agreed) / len(agreed),
    }
    say("  " + ", ".join(f"{name} {share:.1%}" for name, share in result.items()))
    return result


def same_draws(logits: Tensor, other: Tensor, seed: int) -> float:
    """The share of rows [T, V] of which both draw the same token."""
    T = len(logits)
    sampling = Sampling.of([Request([], 1, temperature=1.0, seed=seed)] * T, logits.device)
    position = torch.arange(T, dtype=torch.int32, device=logits.device)
    one, two = [sample(x, sampling, "plain", position) for x in (logits, other)]
    return float((one == two).float().mean())


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.checkpoint_path)

    def load(quantize: str | None) -> Transformer:
        model = load_model(
            args.checkpoint_path, device=args.device, dtype=getattr(torch, args.dtype),
            quantize=quantize,
        )
        if args.compile:
            compile_model(model)
        return model

    model = load(args.quantize)
    setups = [Setup("plain", 0)]
    setups += [Setup(f"lookup {k}", k) for k in args.speculate_k]
    draft = None
    if args.draft_quantize is not None:
        draft = load(args.draft_quantize)
        setups += [Setup(f"{args.draft_quantize} draft {k}", k, draft) for k in args.speculate_k]
    result = device_facts(args.device)
    result["command"] = shlex.join(["python", "benchmarks/speculate.py", *sys.argv[1:]])
    result["rows"] = []
    for name, (text, temperature) in TEXTS.items():
        prompt = tokenizer.encode(text)
        say(f"{name}: {len(prompt)} tokens, {args.max_new_tokens} new ones")
        rows = measure(model, prompt, setups, args, temperature)
        result["rows"] += [{"text": name, **row} for row in rows]
    if draft is not None:
        result["agreement"] = {}
        for name, (text, _) in TEXTS.items():
            ids = tokenizer.encode(text)
            model.cache = None  # generate makes one that fits
            ids += generate(model, [ids], args.max_new_tokens, temperature=1.0, seed=2)[0]
            result["agreement"][name] = agreement(model, draft, ids)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def parse_args() -> argparse.Namespace:
    p = Parser("speculate.py", description=__doc__.splitlines()[0])
    add = p.add_argument
    count = number(int, 1)
    add("--checkpoint_path", metavar="PATH", help="default: SmolLM2-135M-Instruct")
    add("--speculate_k", metavar="K", type=number(int, 1, 15), nargs="+", default=[4, 8],
        help="proposals a step, in turn, 1 to 15; default: 4 8")
    add("--quantize", choices=["int8", "int4"], help="the model; default: not quantized")
    add("--draft_quantize", choices=["int8", "int4"],
        help="the model as its own draft, quantized so; default: none")
    add("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    add("--batch_size", metavar="N", type=count, default=1, help="rows, from 1; default: 1")
    add("--max_new_tokens", metavar="N", type=number(int, 2), default=256,
        help="of each text, from 2; default: 256")
    add("--compile", action="store_true", help="compile the steps")
    add_machine(p)
    add("--rounds", metavar="N", type=count, default=3,
        help="turns of each, from 1; default: 3")
    add("--json", metavar="FILE", type=Path, help="write the result to this file too")
    return p.parse_args()


def main() -> None:
    args = parse_args()
    try:
        run(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        say(f"speculate.py: error: {first_line(e)}")
        sys.exit(2)


if __name__ == "__main__":
    main()
