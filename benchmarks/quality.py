"""What int8 and int4 weights and an int8 KV cache cost on a text, and the bytes that a token reads.

    python benchmarks/quality.py --perplexity FILE --checkpoint_path X --modes int8 int4
    python benchmarks/quality.py --own_text 4096 --checkpoint_path X
    python benchmarks/quality.py --perplexity FILE --calibrate OTHER_FILE --llama_cpp

A row is a mode of the weights and a dtype of the cache: perplexity, its change from the first row,
the mean and the largest KL divergence of a next token from the unquantized model's, the share of
next tokens of which another one is likeliest now, and megabytes of weights and cache that a decoded
token reads. The text is a file's, or what the unquantized model says by itself. Behind + is what
another text was used for: calibrating here, an importance matrix in llama.cpp."""
import argparse
import copy
import importlib.util
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import quantizers
from cli.arguments import Parser, number
from cli.prompts import read_file
from cli.stats import weight_bytes
from generate import Tokenizer, generate, load_tokenizer, say
from model import Transformer, first_line, load_model
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
    tokenizer = load_tokenizer(source)
    ids, other_ids = (
        None if file is None else tokenizer.encode(read_file(file, file))
        for file in (args.perplexity, args.calibrate)
    )
    load = partial(
        load_model, source, device=args.device, dtype=getattr(torch, args.dtype),
        group_size=args.group_size,
    )
    reference = load(quantize="none")
    ids = ids or own_text(reference, tokenizer, args.own_text)
    context = min(CONTEXT, reference.config.max_seq_len, len(ids))
    print(f"{len(ids)} tokens, {context} at a time; MB: weights and cache that a token reads")
    print("        weights       cache  perplexity   change   mean KL    max KL changed        MB")
    first = None  # perplexity of the first row
    for weights, model, nbytes in compared(args, load, reference, other_ids):
        plain = weights in (args.dtype, *args.modes)
        for kv_dtype in (None, torch.int8) if plain else (None,):
            cost = measure(model, ids, context, kv_dtype, reference)
            first = first or cost.perplexity
            change = cost.perplexity / first - 1
            megabytes = (nbytes + model.cache.nbytes) / 1e6
            cache = "int8" if kv_dtype else args.dtype
            print(
                f"{weights:>15}  {cache:>10} {cost.perplexity:11.4f} {change:+8.2%} {cost.kl:9.2e} "
                f"{cost.max_kl:9.2e} {cost.changed:7.2%} {megabytes:9.1f}",
                flush=True,
            )


def compared(
    args: argparse.Namespace, load: Callable[..., Transformer], reference: Transformer,
    other_ids: list[int] | None,
) -> Iterator[tuple[str, Transformer, int]]:
    """The models of the table, their names, and the bytes of weights that a token reads."""
    # the reference keeps its own cache beside that of its shallow copy
    yield args.dtype, copy.copy(reference), weight_bytes(reference)
    for mode in args.modes:
        model = load(quantize=mode)
        yield mode, model, weight_bytes(model)
        if other_ids is not None and mode in MODES:
            model = load(quantize=mode, calibrate=other_ids)
            yield f"{mode}+text", model, weight_bytes(model)
    if not args.llama_cpp:
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "f32.gguf")
        quantizers.write_gguf(reference, source)
        matrix = None if other_ids is None else quantizers.importance(reference, other_ids)
        for kind in ("Q4_0", "Q4_K_M"):
            for used in (None, matrix)[:1 if matrix is None else 2]:
                path = quantizers.quantize(source, kind, used)
                name = kind if used is None else f"{kind}+text"
                yield name, *quantizers.load(path, device=args.device, dtype=reference.dtype)
                path.unlink()


def own_text(model: Transformer, tokenizer: Tokenizer, n: int) -> list[int]:
    """n tokens that a model draws by itself, the same ones each time: texts as long as what is read
    at a time, each behind the token that is put before a text, or one that ends another."""
    start = tokenizer.bos_id if tokenizer.bos_id is not None else min(tokenizer.eos_ids, default=0)
    length = min(n, CONTEXT, model.config.max_seq_len)
    prompts = [[start]] * math.ceil(n / length)
    texts = generate(model, prompts, length - 1, temperature=1.0, seed=0)
    return [i for text in texts for i in (start, *text)][:n]


class Cost(NamedTuple):
    """What a model says of a text, and how far that is from what a reference model says."""

    perplexity: float
    kl: float  # mean KL divergence of the next token from the reference's
    max_kl: float  # the largest one of any token
    changed: float  # share of tokens behind which another one is likeliest


def perplexity(
    model: nn.Module, ids: list[int], context: int = 512, kv_dtype: torch.dtype | None = None,
    reference: nn.Module | None = None,
) -> float | tuple[float, float]:
    """The perplexity of measure; with a reference model: (perplexity, mean KL divergence)."""
    cost = measure(model, ids, context, kv_dtype, reference)
    return cost.perplexity if reference is None else (cost.perplexity, cost.kl)


@torch.no_grad()
def measure(
    model: nn.Module, ids: list[int], context: int = 512, kv_dtype: torch.dtype | None = None,
    reference: nn.Module | None = None,
) -> Cost:
    """Perplexity, exp of the mean negative log-likelihood of ids[1:], read in pieces of `context`
    tokens, and what a reference model says otherwise; kv_dtype as in setup_caches.

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
    kl = torch.zeros(0)  # of each token
    changed = 0
    for piece, targets in tqdm(pieces, "reading", disable=None, leave=False):
        for start in range(0, len(piece), 16):
            read = piece[start:start + 16]
            expected = targets[start:start + 16]
            logp = log_probabilities(model, read, start)  # (16, vocab_size)
            nll += F.nll_loss(logp, expected, reduction="sum").item()
            if reference is not None:
                theirs = log_probabilities(reference, read, start)
                each = F.kl_div(logp, theirs, reduction="none", log_target=True).sum(-1)
                kl = torch.cat([kl, each.cpu()])
                changed += (logp.argmax(-1) != theirs.argmax(-1)).sum().item()
    n = len(ids) - 1
    largest = kl.max().item() if len(kl) else 0.0
    return Cost(math.exp(nll / n), kl.sum().item() / n, largest, changed / n)


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
    text = p.add_mutually_exclusive_group(required=True)
    text.add_argument("--perplexity", metavar="FILE", help="the text to read")
    text.add_argument("--own_text", metavar="N", type=number(int, 2),
        help="read N tokens, from 2, that the unquantized model draws at temperature 1")
    add("--checkpoint_path", metavar="PATH",
        help="as in generate.py; default: its SmolLM2-135M-Instruct")
    add("--modes", nargs="*", choices=["auto", *MODES], default=list(MODES),
        help="quantized weights to compare, auto: as a GGUF file has them; default: int8 int4")
    add("--group_size", type=int, choices=[32, 64, 128], default=32,
        help="inputs to an int4 scale; default: 32")
    add("--calibrate", metavar="FILE", help="round by this text too; default: none")
    add("--llama_cpp", action="store_true",
        help="compare llama.cpp's Q4_0 and Q4_K_M too; needs pip install llama-cpp-python gguf")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, ...; default: cuda")
    add("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16",
        help="of activations and other weights; default: bfloat16")
    args = p.parse_args(argv)
    lacking = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if args.llama_cpp and lacking:
        p.error("--llama_cpp needs pip install llama-cpp-python gguf")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        p.error(f"--device {args.device}: {first_line(e)}")
    return args


if __name__ == "__main__":
    main()
