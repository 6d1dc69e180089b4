"""What int8 and int4 weights and an int8 KV cache cost on a text, and the bytes that a token reads.

    python benchmarks/quality.py --perplexity FILE --checkpoint_path X --modes int8 int4

A row is a mode of the weights and a dtype of the cache: perplexity, its change from the first row,
the mean KL divergence of the next token from the unquantized model's, and megabytes of weights and
cache that a decoded token reads."""
import argparse
import copy
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cli.arguments import Parser
from cli.prompts import read_text
from cli.stats import weight_bytes
from generate import load_tokenizer, say
from model import first_line, load_model
from quantize import MODES

CONTEXT = 512  # tokens that are read at a time


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        say(f"quality.py: error: {first_line(e)}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(args: argparse.Namespace) -> None:
    """Print the table: every mode with a KV cache in --dtype and in int8. ValueError says what
    cannot be read."""
    source = args.checkpoint_path
    ids = load_tokenizer(source).encode(read_text(f"@{args.perplexity}"))
    load = partial(
        load_model, source, device=args.device, dtype=getattr(torch, args.dtype),
        group_size=args.group_size,
    )
    reference = load(quantize="none")
    context = min(CONTEXT, len(ids))
    print(f"{len(ids)} tokens, {context} at a time; MB: weights and cache that a token reads")
    print("   weights       cache  perplexity   change   mean KL        MB")
    first = None  # perplexity of the first row
    for mode in (None, *args.modes):
        # the reference keeps its own cache beside that of its shallow copy
        model = load(quantize=mode) if mode else copy.copy(reference)
        for kv_dtype in (None, torch.int8):
            ppl, kl = perplexity(model, ids, context, kv_dtype, reference)
            first = first or ppl
            change = ppl / first - 1
            megabytes = (weight_bytes(model) + model.cache.nbytes) / 1e6
            weights = mode or args.dtype
            cache = "int8" if kv_dtype else args.dtype
            print(
                f"{weights:>10}  {cache:>10} {ppl:11.4f} {change:+8.2%} {kl:9.2e} {megabytes:9.1f}",
                flush=True,
            )


@torch.no_grad()
def perplexity(
    model: nn.Module, ids: list[int], context: int = 512, kv_dtype: torch.dtype | None = None,
    reference: nn.Module | None = None,
) -> float | tuple[float, float]:
    """exp of the mean negative log-likelihood of ids[1:], read in pieces of `context` tokens;
    kv_dtype as in setup_caches. With a reference model: (perplexity, mean KL divergence of the next
    token from the reference's).

    The text goes through 16 tokens a call, as in decoding, so that attention sees the cache as it
    is stored. ValueError for fewer than 2 tokens, or some outside the vocabulary."""
    vocab_size = model.config.vocab_size
    if len(ids) < 2 or min(ids) < 0 or max(ids) >= vocab_size:
        raise ValueError(
            f"perplexity takes at least 2 tokens of the {vocab_size} of the vocabulary"
        )
    model.setup_caches(1, context, kv_dtype)
    if reference is not None:
        reference.setup_caches(1, context)
    tokens = torch.tensor(ids, device=model.device)
    pieces = list(zip(tokens[:-1].split(context), tokens[1:].split(context)))
    nll = 0.0
    kl = 0.0
    for piece, targets in tqdm(pieces, "reading", disable=None, leave=False):
        for start in range(0, len(piece), 16):
            read = piece[start:start + 16]
            expected = targets[start:start + 16]
            logp = log_probabilities(model, read, start)  # (16, vocab_size)
            nll += F.nll_loss(logp, expected, reduction="sum").item()
            if reference is not None:
                theirs = log_probabilities(reference, read, start)
                kl += F.kl_div(logp, theirs, reduction="sum", log_target=True).item()
    n = len(ids) - 1
    if reference is None:
        return math.exp(nll / n)
    return math.exp(nll / n), kl / n


def log_probabilities(model: nn.Module, tokens: Tensor, start: int) -> Tensor:
    """tokens [T] at positions from start -> the model's log probabilities of the token behind each,
    [T, vocab_size] float32."""
    input_pos = torch.tensor([start], dtype=torch.int32, device=tokens.device)
    logits = model(tokens[None], input_pos)  # (1, T, vocab_size)
    return logits[0].float().log_softmax(-1)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(
        "quality.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--perplexity", metavar="FILE", required=True, help="the text to read")
    add("--checkpoint_path", metavar="PATH",
        help="as in generate.py; default: its SmolLM2-135M-Instruct")
    add("--modes", nargs="*", choices=["auto", *MODES], default=list(MODES),
        help="quantized weights to compare, auto: as a GGUF file has them; default: int8 int4")
    add("--group_size", type=int, choices=[32, 64, 128], default=32,
        help="inputs to an int4 scale; default: 32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, ...; default: cuda")
    add("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16",
        help="of activations and other weights; default: bfloat16")
    args = p.parse_args(argv)
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        p.error(f"--device {args.device}: {first_line(e)}")
    return args


if __name__ == "__main__":
    main()
