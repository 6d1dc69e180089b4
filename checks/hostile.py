"""Files that somebody made to do harm, as bytes by name: what the tests and the soak try."""
from __future__ import annotations

import json
import struct
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import numpy as np

# --- GGUF ---

U8, U32, I32, F32, TEXT, LIST, U64 = 0, 4, 5, 6, 8, 9, 10
STRUCT = {U8: "B", U32: "I", I32: "i", F32: "f", U64: "Q"}
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
GGML_TOKENIZER = "tokenizer.ggml."


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def entry(key: str, kind: int, value: Any) -> bytes:
    """A setting of the metadata. value: of a list (type, values); bytes: as they are."""
    return text(key) + struct.pack("<I", kind) + packed(kind, value)


def packed(kind: int, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if kind == TEXT:
        return text(value)
    if kind == LIST:
        of, values = value
        head = struct.pack("<IQ", of, len(values))
        return head + b"".join(packed(of, each) for each in values)
    return struct.pack(f"<{STRUCT[kind]}", value)


class GGUF:
    """A small Llama in float32, whose parts can be changed before it is written."""

    def __init__(self) -> None:
        n = len(TOKENS)
        self.settings = {
            "general.architecture": (TEXT, "llama"),
            "llama.block_count": (U32, 1),
            "llama.context_length": (U32, 64),
            "llama.embedding_length": (U32, 32),
            "llama.feed_forward_length": (U32, 64),
            "llama.attention.head_count": (U32, 4),
            "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
            "tokenizer.ggml.model": (TEXT, "llama"),
            "tokenizer.ggml.tokens": (LIST, (TEXT, TOKENS)),
            "tokenizer.ggml.scores": (LIST, (F32, [0.0] * n)),
            "tokenizer.ggml.token_type": (LIST, (I32, [2, 3, 3] + [6] * 256 + [1])),
            "tokenizer.ggml.bos_token_id": (U32, 1),
            "tokenizer.ggml.eos_token_id": (U32, 2),
        }
        shapes = {"token_embd": (32, n), "output_norm": (32,)}
        for name in ("attn_norm", "ffn_norm"):
            shapes[f"blk.0.{name}"] = (32,)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.0.{name}"] = (32, 32)
        shapes |= {"blk.0.ffn_gate": (32, 64), "blk.0.ffn_up": (32, 64), "blk.0.ffn_down": (64, 32)}
        self.tensors: dict[str, list[Any]] = {}  # name -> [name, dims, type, offset]
        self.data = b""
        for name, dims in shapes.items():
            self.tensors[name] = [f"{name}.weight", dims, 0, len(self.data)]
            self.data += np.full(dims, 0.1, "<f4").tobytes()
        self.counts: dict[str, int] = {}
        self.start = b"GGUF" + struct.pack("<I", 3)

    def content(self) -> bytes:
        n_tensors = self.counts.get("tensors", len(self.tensors))
        n_settings = self.counts.get("settings", len(self.settings))
        head = self.start + struct.pack("<QQ", n_tensors, n_settings)
        for key, (kind, value) in self.settings.items():
            head += entry(key.removesuffix(" again"), kind, value)
        for name, dims, kind, offset in self.tensors.values():
            head += text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
            head += struct.pack("<IQ", kind, offset % 2**64)
        return head + bytes(-len(head) % 32) + self.data


NUMBERS_OF_TOKENS = {
    "NaN": (F32, float("nan")), "-1": (I32, -1), "1.5": (F32, 1.5), "text": (TEXT, "x"),
    "beyond": (U32, len(TOKENS)), "2^63": (U64, 2**63), "list": (LIST, (U32, [1])),
}


class Made(dict[str, bytes]):
    """Files by what is wrong with them."""

    def add(self, name: str, change: Callable[[GGUF], Any]) -> None:
        file = GGUF()
        change(file)
        self[name] = file.content()

    def setting(self, name: str, key: str, kind: int, value: Any) -> None:
        self.add(name, lambda file: file.settings.update({key: (kind, value)}))

    def tensor(self, name: str, place: int, value: Any, which: str = "blk.0.attn_q") -> None:
        self.add(name, lambda file: file.tensors[which].__setitem__(place, value))


def hostile_gguf() -> dict[str, bytes]:
    """Files that are to be refused by a sentence, quickly and without much memory."""
    made = Made()
    spoil_settings(made)
    spoil_tensors(made)
    spoil_tokens(made)
    for version in (1, 99):
        made.add(f"version {version}",
            lambda file: setattr(file, "start", b"GGUF" + struct.pack("<I", version)))
    whole = GGUF().content()
    for size in (0, 3, 10, 30, 1000, len(whole) - 1):
        made[f"cut to {size}"] = whole[:size]
    return made


def spoil_settings(made: Made) -> None:
    for power in (24, 40, 60, 63):
        for kind in (U8, TEXT, LIST, 99):
            head = struct.pack("<IQ", kind, 2**power)
            made.setting(f"list of 2^{power} of type {kind}", "x", LIST, head)
        made.setting(f"text of 2^{power}", "x", TEXT, struct.pack("<Q", 2**power))
        for what in ("settings", "tensors"):
            made.add(f"2^{power} {what}", lambda file: file.counts.update({what: 2**power}))
    made.setting("lists in lists", "x", LIST, struct.pack("<IQ", LIST, 1) * 10_000)
    made.setting("unknown type", "x", 99, b"")
    made.setting("no UTF-8", "general.architecture", TEXT, text(b"\xff"))
    made.setting("key twice", "llama.block_count again", U32, 1)
    for alignment in (0, 3):
        made.setting(f"alignment {alignment}", "general.alignment", U32, alignment)
    made.setting("alignment text", "general.alignment", TEXT, "x")


def spoil_tensors(made: Made) -> None:
    for name, offset in {"wraps": -32, "beyond": 2**40, "2^63": 2**63, "unaligned": 4}.items():
        made.tensor(f"offset {name}", 3, offset)
    made.tensor("overlap", 3, 0)
    made.tensor("tensor twice", 0, "blk.0.attn_k.weight")
    shapes = {
        "0": (32, 0), "negative": (2**64 - 32, 32), "overflow": (2**32, 2**32), "huge": (2**62,),
        "none": (), "five": (1,) * 5, "three": (32, 32, 1), "one": (1024,),
    }
    for name, dims in shapes.items():
        made.tensor(f"dims {name}", 1, dims)
    made.tensor("half a block", 2, 2, "blk.0.ffn_norm")
    made["half a block"] = made["half a block"].replace(struct.pack("<IQI", 1, 32, 2),
                                                        struct.pack("<IQI", 1, 33, 2))
    for kind in (4, 31, 99, 2**31):
        made.tensor(f"type {kind}", 2, kind)


def spoil_tokens(made: Made) -> None:
    for token in ("bos", "eos", "eot", "eom", "unknown"):
        for name, (kind, value) in NUMBERS_OF_TOKENS.items():
            made.setting(f"{token} {name}", f"{GGML_TOKENIZER}{token}_token_id", kind, value)
    made.setting("tokens", f"{GGML_TOKENIZER}tokens", LIST, (U32, [1]))
    made.setting("scores", f"{GGML_TOKENIZER}scores", LIST, (F32, [0.0]))


# --- tokenizer.json ---

def regex(pattern: str) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern},
                              "behavior": "Isolated", "invert": False}}


def charsmap(content: bytes) -> dict[str, Any]:
    encoded = b64encode(content).decode()
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": encoded}}


def nested(kind: dict[str, Any], key: str, n: int) -> dict[str, Any]:
    for _ in range(n):
        kind = {"type": "Sequence", key: [kind]}
    return kind


def template(*pieces: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    return {"post_processor": {"type": "TemplateProcessing", "single": list(pieces), "pair": [],
                               "special_tokens": special}}


def unigram(vocab: list[list[Any]], unknown: int | None) -> dict[str, Any]:
    return {"model": {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": False}}


START = {"SpecialToken": {"id": "[X]", "type_id": 0}}
SLOW = r"(x+x+)+y"  # gives up after ten million steps, in a panic
WORDS = {"vocab": {"a": 0}, "unk_token": "[UNK]"}
PIECES = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
# what of a good tokenizer.json is replaced
HOSTILE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "bad regex": regex("("),
    "slow regex": regex(SLOW),
    "endless regex": regex(r"(?<a>\g<a>)"),
    "bad pattern": {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
    "slow pattern": {"normalizer": {"type": "Replace", "pattern": {"Regex": SLOW}, "content": ""}},
    "empty pattern": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
    "bad decoder": {"decoder": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
    "unknown decoder": {"decoder": {"type": "\x1b[2J"}},
    "decoder strips": {"decoder": {"type": "Strip", "content": "a", "start": 3, "stop": 3}},
    "nested decoders": {"decoder": nested({"type": "Fuse"}, "decoders", 10_000 // 60)},
    "odd metaspace": {"decoder": {"type": "Metaspace", "replacement": "xx", "split": True}},
    "no metaspace": {"pre_tokenizer": {"type": "Metaspace", "replacement": "", "split": True}},
    "fixed length 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "no such behavior": {"pre_tokenizer": {"type": "Split", "pattern": {"String": "a"},
                                           "behavior": "Nope", "invert": False}},
    "post: missing": template(START, special={}),
    "post: huge id": template(
        START, special={"[X]": {"id": "[X]", "ids": [2**40], "tokens": ["[X]"]}}),
    "charsmap: none": charsmap(b""),
    "charsmap: junk": charsmap(b"junk" * 9),
    "charsmap: long": charsmap(struct.pack("<I", 2**31)),
    "charsmap: zero": charsmap(bytes(64)),
    "charsmap: beyond": charsmap(struct.pack("<66I", 256, *[2**31 + 7919 * i for i in range(65)])),
    "no unknown piece": unigram([["a", -1.0]], None),
    "unknown piece beyond": unigram([["a", -1.0]], 50),
    "no pieces": unigram([], None),
    "nan": unigram([["a", float("nan")]], 0),
    "no unknown word": {"model": {"type": "WordLevel", **WORDS}},
    "no unknown part": {"model": {"type": "WordPiece", **WORDS, **PIECES}},
    "unknown model": {"model": {"type": "x\n\x1b[2J"}},
    "merge of nothing": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
    "merge of one": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}},
    "prefix": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]],
                         "continuing_subword_prefix": "x" * 8}},
    "id below 0": {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
    "huge id": {"added_tokens": [{
        "id": 2**40, "content": "<h>", "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True}]},
}


def hostile_tokenizers(good: str) -> dict[str, bytes]:
    """By the text of a good tokenizer.json. Reading these, or encoding and decoding by them, is to
    fail by a sentence."""
    made = {}
    for name, changes in HOSTILE_TOKENIZERS.items():
        made[name] = json.dumps({**json.loads(good), **changes}).encode()
    made |= {f"cut to {size}": good[:size].encode() for size in (0, 1, 50, len(good) // 2)}
    return made
