"""What int8 and int4 weights and an int8 KV cache cost on a text, and the bytes that a token reads.

    python benchmarks/quality.py --perplexity FILE --checkpoint_path X --modes int8 int4

A row is a mode of the weights and a dtype of the cache: perplexity, its change from the first row,
the mean KL divergence of the next token from the unquantized model's, and megabytes of weights and
cache that a decoded token reads."""
import argparse
import copy
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cli.arguments import DTYPES, Parser, say
from cli.prompts import read_text
from formats.checkpoint import default_model, first_line, resolve
from formats.tokenizer import load_tokenizer
from model import load_model
from quantize import MODES, perplexity

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
    source = resolve(args.checkpoint_path or default_model())
    ids = load_tokenizer(source).encode(read_text(f"@{args.perplexity}"))
    load = partial(
        load_model, source, device=args.device, dtype=DTYPES[args.dtype],
        group_size=args.group_size,
    )
    reference = load()
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
            megabytes = (model.weight_bytes() + model.cache.nbytes) / 1e6
            weights = mode or args.dtype
            cache = "int8" if kv_dtype else args.dtype
            print(
                f"{weights:>10}  {cache:>10} {ppl:11.4f} {change:+8.2%} {kl:9.2e} {megabytes:9.1f}",
                flush=True,
            )


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
    add("--dtype", choices=DTYPES, default="bfloat16",
        help="of activations and other weights; default: bfloat16")
    args = p.parse_args(argv)
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        p.error(f"--device {args.device}: {first_line(e)}")
    return args


if __name__ == "__main__":
    main()
