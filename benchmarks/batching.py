"""Continuous batching beside fixed batches and transformers' generate, in one process.

    python benchmarks/batching.py --quantize int4 --prompts 96 --batch_size 8

Prompts of random tokens and numbers of new ones, both log-uniform from --shortest to --longest, go
through a model of random weights in the shape of --shape; nothing ends early, so all contestants
make the same number of tokens:
- continuous: Engine.run over all prompts, a row taking the next one when its own is done;
- fixed: the same engine, --batch_size prompts at a time, each batch as long as its slowest row;
- transformers: generate on the same batches, padded on the left, in bfloat16, for as many new
  tokens as the batch's longest wants; what the others did not want does not count.
They take turns, --rounds times, and the median of a contestant's wall times counts."""
import argparse
import importlib
import json
import math
import random
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from batching import Engine, Stats
from benchmarks.decode import DTYPES, add_machine, device_facts
from cli.arguments import Parser, number
from formats.settings import read_json
from generate import Request, compile_model, kind_of, say
from model import first_line, load_model


@dataclass
class Turn:
    """What a contestant did once."""

    wall_s: float
    new_tokens: int
    steps: int  # of decode
    row_steps: int  # rows that these worked on
    useful_row_steps: int  # those that gave a request a token

# --- contestants ---


def continuous(engine: Engine, requests: list[Request], rows: int) -> Turn:
    return decode(engine, [requests])


def fixed(engine: Engine, requests: list[Request], rows: int) -> Turn:
    return decode(engine, in_batches(requests, rows))


def in_batches(requests: list[Request], rows: int) -> list[list[Request]]:
    return [requests[start:start + rows] for start in range(0, len(requests), rows)]


def decode(engine: Engine, batches: list[list[Request]]) -> Turn:
    """Run the engine on one batch after the other."""
    stats = Stats()
    engine.stats = stats
    new_tokens = 0
    began = time.perf_counter()
    for batch in batches:
        new_tokens += sum(len(tokens) for _, tokens in engine.run(batch))
    seconds = time.perf_counter() - began
    return Turn(
        seconds, new_tokens, len(stats.steps_s), stats.row_steps, stats.useful_row_steps
    )


class Transformers:
    """transformers' generate, eager, with its default cache."""

    def __init__(self, hf: dict, device: str):
        self.library = importlib.import_module("transformers")
        config = self.library.AutoConfig.for_model(**hf)
        with torch.device(device):
            model = self.library.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self.model = model.eval()
        self.device = device

    def __call__(self, engine: Engine, requests: list[Request], rows: int) -> Turn:
        steps = 0
        row_steps = 0
        began = time.perf_counter()
        for batch in in_batches(requests, rows):
            longest = max(request.max_new_tokens for request in batch)
            self.answer([request.prompt for request in batch], longest)
            steps += longest - 1
            row_steps += (longest - 1) * len(batch)
        seconds = time.perf_counter() - began
        wanted = sum(request.max_new_tokens for request in requests)
        return Turn(seconds, wanted, steps, row_steps, wanted - len(requests))

    @torch.no_grad()
    def answer(self, prompts: list[list[int]], n: int) -> None:
        width = max(map(len, prompts))
        tokens = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        seen = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        self.model.generate(
            torch.tensor(tokens, device=self.device),
            attention_mask=torch.tensor(seen, device=self.device),
            max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0,
        )

# --- the run ---


def make_requests(args: argparse.Namespace, vocab_size: int) -> list[Request]:
    """Requests of log-uniform lengths, always the same."""
    generator = random.Random(args.seed)

    def length() -> int:
        logarithm = generator.uniform(math.log(args.shortest), math.log(args.longest))
        return round(math.exp(logarithm))

    requests = []
    for _ in range(args.prompts):
        prompt = [generator.randrange(vocab_size) for _ in range(length())]
        requests.append(Request(prompt, length()))
    return requests


def run(args: argparse.Namespace) -> None:
    if args.shortest > args.longest:
        raise ValueError(f"--shortest {args.shortest} is more than --longest {args.longest}")
    torch.set_num_threads(args.threads)
    hf = read_json(args.shape)
    model = load_model(
        args.shape, device=args.device, dtype=getattr(torch, args.dtype), quantize=args.quantize
    )
    requests = make_requests(args, model.config.vocab_size)
    model.setup_caches(args.batch_size, 2 * args.longest)
    if args.compile:
        compile_model(model)
    engine = Engine(model, compiled=args.compile)
    engine.kind = kind_of(requests)
    engine.prepare_all()
    contestants: dict[str, Callable[..., Turn]] = {"continuous": continuous, "fixed": fixed}
    if args.transformers:
        contestants["transformers"] = Transformers(hf, args.device)

    turns = {name: [] for name in contestants}
    for name, contestant in contestants.items():  # to warm up
        contestant(engine, [Request(requests[0].prompt[:16], 4)] * 2, args.batch_size)
    for _ in range(args.rounds):
        for name, contestant in contestants.items():
            turns[name].append(contestant(engine, requests, args.batch_size))
            say(f"{name}: {turns[name][-1].wall_s:.1f} s")
    result = device_facts(args.device)
    result["command"] = shlex.join(["python", "benchmarks/batching.py", *sys.argv[1:]])
    result |= summarize(turns)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def summarize(turns: dict[str, list[Turn]]) -> dict[str, object]:
    """Each contestant's median turn, and how many times as long as continuous it took."""
    rows = {}
    for name, done in turns.items():
        turn = sorted(done, key=lambda turn: turn.wall_s)[len(done) // 2]
        rows[name] = asdict(turn) | {
            "tokens_per_s": turn.new_tokens / turn.wall_s,
            "useful_share": turn.useful_row_steps / max(1, turn.row_steps),
        }
    for row in rows.values():
        row["times_continuous"] = row["wall_s"] / rows["continuous"]["wall_s"]
    return {"rows": rows}


def parse_args() -> argparse.Namespace:
    p = Parser("batching.py", description=__doc__.splitlines()[0])
    add = p.add_argument
    count = number(int, 1)
    add("--shape", type=Path, default=HERE / "configs" / "SmolLM2-135M.json",
        help="a config.json; default: SmolLM2-135M's")
    add("--prompts", metavar="N", type=count, default=96, help="from 1; default: 96")
    add("--shortest", metavar="N", type=count, default=16,
        help="tokens of a prompt, and new ones, from 1; default: 16")
    add("--longest", metavar="N", type=count, default=512,
        help="tokens of a prompt, and new ones, from 1; default: 512")
    add("--batch_size", metavar="N", type=count, default=8, help="rows, from 1; default: 8")
    add("--quantize", choices=["int8", "int4"], help="ours; default: not quantized")
    add("--dtype", choices=DTYPES, default="bfloat16", help="ours; default: bfloat16")
    add("--no-transformers", dest="transformers", action="store_false",
        help="leave the peer out")
    add("--compile", action="store_true", help="compile our decode step")
    add_machine(p)
    add("--rounds", metavar="N", type=count, default=1,
        help="turns of each contestant, from 1; default: 1")
    add("--seed", metavar="N", type=int, default=0, help="of the lengths; default: 0")
    add("--json", metavar="FILE", type=Path, help="write the result to this file too")
    return p.parse_args()


def main() -> None:
    args = parse_args()
    try:
        run(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        say(f"batching.py: error: {first_line(e)}")
        sys.exit(2)


if __name__ == "__main__":
    main()
