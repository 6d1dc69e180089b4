"""Score a checkpoint on tasks of EleutherAI's lm-evaluation-harness.

    pip install -r requirements.txt -r examples/requirements-evaluate.txt
    python examples/evaluate.py --checkpoint_path X --tasks hellaswag,arc_easy --quantize int4

Tasks, metrics, tables and the flags beside those of --help are the harness's; tokens are scored as
by its Hugging Face backend: in float32 the tables are the same. A context is read once for all its
choices, which are rows of a batch behind copies of it, and so is what many contexts begin with."""
from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from os.path import commonprefix
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from batching import Engine
from batching.saved import copy_row
from cli.arguments import Parser, number
from cli.program import files_of
from generate import Decoder, Request, Tokenizer, ends_at, load_tokenizer, prepare_steps, say
from model import MAX_DECODE_TOKENS, Transformer, first_line, load_model
from quantize import MODES

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models import utils
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    TemplateLM, cli_evaluate = object, None  # scores does without

ALIKE = 32  # tokens: what contexts begin with for so long is read for all of them at once
Ids = tuple[int, ...]
Score = tuple[float, bool]  # log-likelihood, and whether each token was the likeliest


class GptFlash(TemplateLM):
    """What the harness asks. max_length: most tokens of a text. Up to batch_size rows work at a
    time; for log-likelihoods the cache has as many again, upper ones, for contexts."""

    eot_token_id = prefix_token_id = 0  # the second stands before what has no context

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, batch_size: int = 16,
        max_length: int | None = None, kv_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.model, self.text = model, tokenizer
        self.batch_size, self.kv_dtype = batch_size, kv_dtype
        self.at_once = 128 if model.device.type == "cpu" else 2**16  # tokens: more are padded more
        self.max_length = min(max_length or model.config.max_seq_len, model.config.max_seq_len)
        for name in ("eos_token", "bos_token"):
            token = tokenizer.special.get(tokenizer.special_text.get(name))
            self.prefix_token_id = self.prefix_token_id if token is None else token

    @classmethod
    def create_from_arg_obj(cls, flags: dict[str, Any], others: dict[str, Any]) -> GptFlash:
        """By the flags of main."""
        path, options = flags["checkpoint_path"], ("device", "quantize", "group_size")
        dtype, kv_dtype = (getattr(torch, flags[k] or "", None) for k in ("dtype", "kv_dtype"))
        tokenizer = load_tokenizer(path)
        model = load_model(path, dtype=dtype, **{name: flags[name] for name in options})
        tokenizer.check_fit(model.config.vocab_size)
        return cls(model, tokenizer, flags["batch_size"], flags["max_length"], kv_dtype)

    def scores(self, pairs: list[tuple[list[int], list[int]]]) -> Iterator[tuple[int, Score]]:
        """(context, continuation) each -> (a pair's number, its score), in the cheapest order. Of
        what is too long the beginning is left out. ValueError: a continuation alone is."""
        wanted: dict[Ids, dict[Ids, list[int]]] = {}  # pairs by context and what is read behind it
        for i, (context, expected) in enumerate(pairs):
            n = len(expected)
            if not 0 < n <= self.max_length:
                raise ValueError(f"{n} tokens cannot be scored in a context of {self.max_length}")
            ids = (*(context or [self.prefix_token_id]), *expected)[-self.max_length - 1:-1]
            wanted.setdefault(ids[:-n], {}).setdefault(ids[-n:], []).append(i)
        n = sum(len(pair[0]) + len(pair[1]) - 1 > self.max_length for pair in pairs)
        if n:
            say(f"note: {n} texts are cut to their last {self.max_length} tokens")
        room = max([len(c) + max(map(len, wanted[c])) for c in wanted] or [0]) + MAX_DECODE_TOKENS
        self.cache = self.model.setup_caches(2 * self.batch_size, room, self.kv_dtype, rings=False)
        self.decoder = Decoder(self.model)
        self.held: Ids = ()  # what the first of the upper rows has
        many = Counter(context[:ALIKE] for context in wanted)  # of them begin so
        order = sorted(wanted, key=lambda c: (c[:ALIKE] if many[c[:ALIKE]] > 1 else (), -len(c), c))
        for first in range(0, len(order), self.batch_size):
            contexts = sorted(order[first:first + self.batch_size], key=len, reverse=True)
            self.read(contexts)
            rows = [(context, read) for context in contexts for read in wanted[context]]
            rows.sort(key=lambda row: -len(row[1]))
            for n in range(0, len(rows), self.batch_size):
                batch = rows[n:n + self.batch_size]
                for row, (c, _) in enumerate(batch):
                    copy_row(self.cache, self.batch_size + contexts.index(c), row, len(c))
                numbers = [wanted[context][read] for context, read in batch]
                texts = [pairs[i][1] for of_row in numbers for i in of_row]
                yield from zip(sum(numbers, []), self.score(batch, [*map(len, numbers)], texts))

    @torch.inference_mode()
    def score(self, rows: list[tuple[Ids, Ids]], n_texts: list[int], texts: list) -> list[Score]:
        """Read what is behind the rows' contexts, the longest first -> scores of the texts that are
        expected, so many in each row."""
        tokens = pad_sequence([torch.tensor(read) for _, read in rows], True).to(self.model.device)
        texts = pad_sequence([*map(torch.tensor, texts)], True, -1).to(tokens.device)  # (N, T)
        row = torch.arange(len(rows)).repeat_interleave(torch.tensor(n_texts)).to(tokens.device)
        input_pos = torch.tensor([len(c) for c, _ in rows], dtype=torch.int32).to(tokens.device)
        sums = torch.zeros(len(texts), device=tokens.device)
        likeliest = torch.ones(len(texts), dtype=torch.bool, device=tokens.device)
        # few at a time, as in decoding: attention sees those before as the cache keeps them
        width = min(MAX_DECODE_TOKENS, max(1, self.at_once // len(rows)))
        for start in range(0, tokens.shape[1], width):
            n = sum(len(read) > start for _, read in rows)  # those that go on, the first ones
            piece = slice(start, start + width)
            logits = self.model(tokens[:n, piece], input_pos[:n] + start)
            logp = logits.float().log_softmax(-1)  # (n, t, V)
            of = row[row < n]
            ids = texts[:len(of), piece]
            found = logp[of[:, None], torch.arange(ids.shape[1]), ids.clamp(min=0)]  # (N', t)
            sums[:len(of)] += found.masked_fill(ids < 0, 0).sum(1)
            likeliest[:len(of)] &= ((logp.argmax(-1)[of] == ids) | (ids < 0)).all(1)
        return list(zip(sums.tolist(), likeliest.tolist()))

    def read(self, contexts: list[Ids]) -> None:
        """Put contexts into the upper rows; what all begin with, in the first, and copied."""
        cached, alike = 0, commonprefix(contexts)
        if len(contexts) == 1:
            cached = len(commonprefix([self.held, alike]))
        elif len(alike) >= ALIKE:
            self.read([alike])
            cached = len(alike)
            for row in range(1, len(contexts)):
                copy_row(self.cache, self.batch_size, self.batch_size + row, cached)
        texts = [Request(list(c[cached:]), 1, cached=cached) for c in contexts if len(c) > cached]
        n = max(1, 2 * self.at_once // max((len(text.prompt) for text in texts), default=1))
        for first in range(0, len(texts), n):
            part, row = texts[first:first + n], self.batch_size + first
            prefill = self.decoder.prefill(slice(row, row + len(part)), part)
            while not self.decoder.read_on(prefill):
                pass
        self.held = contexts[0]

    def tok_encode(self, string: str, add_special_tokens: bool = True, **_: Any) -> list[int]:
        return self.text.encode(string, bos=add_special_tokens)

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[Score]:
        found = {}
        scores = self.scores([request[1:] for request in requests])
        for i, found[i] in tqdm(scores, "choices", len(requests), disable=None):
            self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        windows, owners, sums = [], [], [0.0] * len(requests)
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            windows += map(make_disjoint_window, pairs)
            owners += [i] * (len(windows) - len(owners))
        left = Counter(owners)
        for n, (logp, _) in tqdm(self.scores(windows), "windows", len(windows), disable=None):
            i = owners[n]
            sums[i] += logp
            left[i] -= 1
            if not left[i]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, sums[i])
        return sums

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        """What is said behind contexts, up to a stop string."""
        jobs = [(i, *self.job(*request.args)) for i, request in enumerate(requests)]
        jobs.sort(key=lambda job: -len(job[1].prompt))
        room = max(len(request.prompt) + request.max_new_tokens for _, request, _ in jobs)
        self.model.setup_caches(min(self.batch_size, len(jobs)), room, self.kv_dtype)
        engine = Engine(self.model, compiled=prepare_steps(self.model, None, self.batch_size))
        said: list[list[int]] = [[] for _ in jobs]
        texts = {}
        with tqdm(desc="answers", total=len(jobs), disable=None) as bar:
            for n, ids in engine.run(request for _, request, _ in jobs):
                said[n] += ids
                if n in engine.finish_reasons:
                    i, _, stop = jobs[n]
                    texts[i] = utils.postprocess_generated_text(self.text.decode(said[n]), stop, "")
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                    bar.update()
        return [texts[i] for i in range(len(jobs))]

    def job(self, context: str, settings: dict[str, Any]) -> tuple[Request, list[str]]:
        """What continues a context, and what ends it. ValueError: nothing does by such settings."""
        known = dict(utils.normalize_gen_kwargs(settings, default_max_gen_toks=256))
        eos = self.text.special_text.get("eos_token")
        stop = [text for text in utils.handle_stop_sequences(known.pop("until"), eos) if text]
        n = known.pop("max_gen_toks")
        drawn = {k: known.pop(k) for k in ("temperature", "top_k", "top_p", "min_p") if k in known}
        others = {name for name, value in known.items() if value != 1} - {"do_sample"}  # 1: off
        if others or n >= self.max_length:
            raise ValueError(f"no text can be made with {settings} in {self.max_length} tokens")
        prompt = self.tok_encode(context)[n - self.max_length:] or [self.prefix_token_id]
        ends = ends_at(stop, self.text, []) if stop else None
        return Request(prompt, n, eos_ids=self.text.eos_ids, ends=ends, **drawn), stop


def main(argv: list[str] | None = None) -> None:
    said = "--tasks, --limit, --output_path and all other flags are those of `lm_eval run --help`."
    parser = Parser("evaluate.py", description=said, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint_path", metavar="PATH", help="as in generate.py; default: its default model")
    add("--quantize", choices=["auto", "none", *MODES], default="auto", help="default: auto")
    add("--group_size", type=int, choices=[32, 64, 128], default=32, help="of int4; default: 32")
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="default: as in generate.py")
    add("--kv_dtype", choices=["int8"], help="of the KV cache; default: --dtype")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda")
    add("--batch_size", metavar="N", type=number(int, 1, 4096), default=16, help="default: 16")
    add("--max_length", metavar="N", type=number(int, 2), help="default: the model's context")
    add("--use_cache", metavar="PATH", help="a file of answers is PATH_...; default: none")
    args, others = parser.parse_known_args(argv)
    try:
        if cli_evaluate is None:
            raise ValueError("no lm_eval here: pip install -r examples/requirements-evaluate.txt")
        flags = {"pretrained": args.checkpoint_path or "SmolLM2-135M-Instruct", **vars(args)}
        if args.use_cache is not None:  # what one model said is no answer of another
            said_by = {**flags, "batch_size": None, "use_cache": None, "device": None}
            of_model = json.dumps([said_by, files_of(args.checkpoint_path)]).encode()
            others += ["--use_cache", f"{args.use_cache}_{sha256(of_model).hexdigest()[:16]}"]
        register_model("gpt-flash")(GptFlash)
        words = ["run", "--model", "gpt-flash", "--model_args", json.dumps(flags)]
        words += ["--device", args.device, "--batch_size", str(args.batch_size), *others]
        in_one_line = patch.object(argparse.ArgumentParser, "error", Parser.error)
        with patch("sys.argv", ["evaluate.py", *words]), in_one_line:
            cli_evaluate()
    except Exception as e:
        known = isinstance(e, (ValueError, OSError, NotImplementedError, torch.OutOfMemoryError))
        if not known and type(e).__module__.partition(".")[0] not in ("datasets", "yaml"):
            raise
        parser.error(first_line(e))


if __name__ == "__main__":
    main()
