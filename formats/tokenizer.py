"""Tokenizers of any form: Hugging Face folders and GGUF files, read and written; chat."""
from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, decoders

from formats.checkpoint import plain_file, read_json, resolve
from formats.default import default_model
from formats.pretokenizers import PRE_TOKENIZERS, WHOLE_WORDS
from formats.templates import render_template
from formats.text import TextStream
from generate import Tokenizer
from model import first_line, is_number


def load_tokenizer(path: str | Path | None = None) -> ChatTokenizer:
    """The tokenizer of a checkpoint: a folder or hub id with tokenizer.json or tokenizer.model,
    such a file itself, or the vocabulary inside a .gguf; None: the default model's. ValueError says
    what is wrong."""
    path = default_model() if path is None else resolve(path)
    read = gguf_tokenizer if path.suffix == ".gguf" else folder_tokenizer
    return ask(read, path, failed=f"cannot read the tokenizer of {path}")


def ask(function: Callable, *args: Any, failed: str = "the tokenizer fails") -> Any:
    """What a function that goes into tokenizers gives. ValueError says what failed: it raises plain
    exceptions, and panics of Rust are not even these. (They say so on stderr by themselves.)"""
    try:
        return function(*args)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        raise ValueError(f"{failed}: {first_line(e)}") from None


class ChatTokenizer(Tokenizer):
    """A Tokenizer of a checkpoint that may have a chat template."""

    # as a template writes them: encode may begin with none, and a text may end in several ways
    bos_token: str = ""
    eos_token: str = ""

    def ends(self, stop: Sequence[str], prompt: list[int]) -> Callable[[list[int]], bool]:
        """Request.ends for the text behind a prompt: whether new ids complete a stop string."""
        text = TextStream(self, prompt, stop)

        def ends(ids: list[int]) -> bool:
            text.push(ids)
            return text.stopped

        return ends

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """[{"role": ..., "content": ...}, ...] -> the ids of the conversation in the model's own
        template, up to where the assistant answers. The template's special tokens are special,
        those inside a message are text. ValueError if there is no template or it fails."""
        if not self.chat_template:
            raise ValueError("this model has no chat template; use --prompt")
        # special tokens in messages travel through the template as characters that nobody wrote
        written = set("".join(message["content"] for message in messages))
        unused = (chr(i) for i in range(0x100000, 0x110000) if chr(i) not in written)
        stand_ins = dict(zip(self.special, unused))
        special = re.compile(any_of(stand_ins))
        hidden = []
        for message in messages:
            content = special.sub(lambda found: stand_ins[found[0]], message["content"])
            hidden.append({**message, "content": content})
        show = str.maketrans({char: token for token, char in stand_ins.items()})
        return self.template_ids(self.render(hidden), show)

    def template_ids(self, text: str, show: dict[int, str]) -> list[int]:
        """The ids of a template's text, in which special tokens are special. show: what stands in
        for some that are none."""
        special = any_of(self.special)
        ids = []
        for piece in re.split(f"({special})", text):
            if piece in self.special:
                ids.append(self.special[piece])
            else:
                ids += self.encode(piece.translate(show), bos=False)
        return ids

    def render(self, messages: list[dict[str, str]]) -> str:
        try:
            return render_template(
                self.chat_template, messages=messages, add_generation_prompt=True, tools=None,
                documents=None, **self.special_text)
        except Exception as e:  # a template is a program of the checkpoint's author
            raise ValueError("the model's chat template failed or refuses the messages: "
                             f"{first_line(e)}") from None

    @property
    def special_text(self) -> dict[str, str]:
        """What a chat template may ask for."""
        names = {i: token for token, i in self.special.items()}
        ends = [names[i] for i in sorted(self.eos_ids) if i in names]
        return {
            "bos_token": self.bos_token or names.get(self.bos_id, ""),
            "eos_token": self.eos_token or "".join(ends[:1]),
        }


class JSONTokenizer(ChatTokenizer):
    """By a tokenizers.Tokenizer."""

    def encode(self, text: str, bos: bool = True) -> list[int]:
        ids = ask(lambda: self.backend.encode(text, add_special_tokens=False).ids)
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids: list[int]) -> str:
        control = set(self.special.values())
        return ask(self.backend.decode, [i for i in ids if i not in control])

    def template_ids(self, text: str, show: dict[int, str]) -> list[int]:
        if text != text.translate(show):
            return super().template_ids(text, show)
        return ask(lambda: self.knowing.encode(text, add_special_tokens=False).ids)

    @cached_property
    def knowing(self) -> tokenizers.Tokenizer:
        """A backend to which special tokens in a text are special. It is another one: whether they
        are is a state, and others may be encoding."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        return backend


def any_of(tokens: Iterable[str]) -> str:
    """A regular expression for any of the tokens, the longest first; without any, for nothing."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return "|".join(re.escape(token) for token in longest_first) or "(?!)"


# --- Hugging Face folders ---

def folder_tokenizer(path: Path) -> ChatTokenizer:
    """From tokenizer.json or tokenizer.model, and the settings in the files beside it."""
    files = [path, path / "tokenizer.json", path / "tokenizer.model"]
    kinds = ("tokenizer.json", ".model")
    found = [file for file in files if file.is_file() and file.name.endswith(kinds)]
    if not found:
        raise ValueError("no tokenizer.json or tokenizer.model there")
    file = found[0]
    read = json_tokenizer if file.suffix == ".json" else ChatTokenizer.from_model
    tokenizer = read(file)
    add_settings(tokenizer, file.parent)
    return tokenizer


def json_tokenizer(file: Path) -> JSONTokenizer:
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # as plain text
    added = backend.get_added_tokens_decoder()
    special = {token.content: i for i, token in added.items() if token.special}
    before_text = backend.encode("").ids
    bos_id = before_text[0] if before_text else None
    return JSONTokenizer(backend, backend.get_vocab_size(), special, bos_id, set())


def add_settings(tokenizer: ChatTokenizer, folder: Path) -> None:
    """What a folder's JSON files say about the ends of a text, its start and the chat template."""
    settings = {}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            continue
        config = read_json(folder / name)
        tokenizer.eos_ids |= token_ids(config.get("eos_token_id"), folder / name)
        settings |= config
    for name in ("bos_token", "eos_token"):
        token = settings.get(name) or ""
        setattr(tokenizer, name, token["content"] if isinstance(token, dict) else token)
    tokenizer.eos_ids.add(tokenizer.special.get(tokenizer.eos_token))
    tokenizer.eos_ids.discard(None)
    if settings.get("add_bos_token") is False:
        tokenizer.bos_id = None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / "chat_template.jinja").exists():
        template = plain_file(folder / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = template


def token_ids(value: object, file: Path) -> set[int]:
    """The ids that eos_token_id has: one, a list of them, or none. ValueError: anything else."""
    ids = value if isinstance(value, list) else [value]
    ids = [i for i in ids if i is not None]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise ValueError(f"{file.name} has eos_token_id {value!r}, which is no token")
    return set(ids)


# --- the vocabulary inside a GGUF file ---

# tokens that end what a model says, whatever else a file says of them
END_OF_TURN = {"<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>",
               "<end_of_turn>", "<|eom_id|>", "<|return|>", "<|call|>", "</s>"}
CONTROL, USER_DEFINED = 3, 4  # token types of GGUF, the same numbers as sentencepiece's


def gguf_tokenizer(path: Path) -> ChatTokenizer:
    """From the metadata of a GGUF file, SentencePiece or BPE with a known pre-tokenizer."""
    from formats.gguf_file import read_gguf  # gguf is slow to import
    meta = {key.removeprefix("tokenizer.ggml."): v for key, v in read_gguf(path)[0].items()}
    kind, pre = meta.get("model"), meta.get("pre")
    if kind not in ("gpt2", "llama") or kind == "gpt2" and str(pre) not in PRE_TOKENIZERS:
        raise ValueError(f"unsupported tokenizer {kind!r}, pre-tokenizer {pre!r}; supported: llama "
                         f"(SentencePiece) and gpt2 (BPE) with {', '.join(PRE_TOKENIZERS)}")
    tokens = meta["tokens"]
    types = meta.get("token_type") or [1] * len(tokens)
    special_ids = {name: token_id(meta, name, tokens) for name in ("bos", "eos", "eot", "eom")}
    ends = {i for i, token in enumerate(tokens) if token in END_OF_TURN}
    for i in ends:
        types[i] = CONTROL  # some files have them as plain text
    if kind == "gpt2":
        backend = byte_level_bpe(tokens, meta["merges"], types, pre)
        takes_bos = pre in WHOLE_WORDS
    else:
        unknown = token_id(meta, "unknown", tokens) or 0
        space_prefix = meta.get("add_space_prefix", True)
        backend = sentencepiece_bpe(tokens, meta["scores"], types, unknown, space_prefix)
        takes_bos = True
    bos_id = special_ids["bos"] if meta.get("add_bos_token", takes_bos) else None
    special = {tokens[i]: i for i, token_type in enumerate(types) if token_type == CONTROL}
    if {"<|return|>", "<|call|>"} <= special.keys():
        ends.discard(special.get("<|end|>"))  # of a message, behind which gpt-oss goes on
    ends |= {special_ids[name] for name in ("eos", "eot", "eom")} - {None}
    template = meta.get("tokenizer.chat_template")
    kind_of_tokenizer = JSONTokenizer if kind == "gpt2" else ChatTokenizer
    tokenizer = kind_of_tokenizer(backend, len(tokens), special, bos_id, ends, template)
    for name in ("bos", "eos"):
        i = special_ids[name]
        setattr(tokenizer, f"{name}_token", "" if i is None else tokens[i])
    return tokenizer


def token_id(meta: dict[str, Any], name: str, tokens: list[str]) -> int | None:
    """The id of a special token, None: there is none. ValueError if it is no token."""
    i = meta.get(f"{name}_token_id")
    if i is not None and (not is_number(i, int) or not 0 <= i < len(tokens)):
        raise ValueError(f"{name}_token_id is {i!r:.60}, none of {len(tokens)} tokens")
    return i


def byte_level_bpe(
    tokens: list[str], merges: list[str], types: list[int], pre: str
) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [merge.partition(" ")[::2] for merge in merges]
    bpe = tokenizers.models.BPE(vocab, pairs, ignore_merges=pre in WHOLE_WORDS)
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    backend.encode_special_tokens = True  # as plain text
    backend.add_tokens([
        AddedToken(token, special=token_type == CONTROL, normalized=False)
        for token, token_type in zip(tokens, types) if token_type in (CONTROL, USER_DEFINED)
    ])
    return backend


def sentencepiece_bpe(
    tokens: list[str], scores: list[float], types: list[int], unknown: int, space_prefix: bool
) -> SentencePieceProcessor:
    """A SentencePieceProcessor from a vocabulary, by way of the file that it would be read from.
    unknown: the id of the one token for what is unknown, which such a file has to have."""
    Piece = ModelProto.SentencePiece
    proto = ModelProto()
    for i, (token, score, token_type) in enumerate(zip(tokens, scores, types, strict=True)):
        kind = token_type or Piece.NORMAL  # 0: undefined
        if i == unknown:
            kind = Piece.UNKNOWN
        elif kind == Piece.UNKNOWN:  # padding, in files of Phi-3
            kind = Piece.UNUSED
        proto.pieces.add(piece=token or f"[EMPTY_{i}]", score=score, type=kind)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.unk_piece = tokens[unknown]
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = space_prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    return SentencePieceProcessor(model_proto=proto.SerializeToString())


# --- writing ---

def save_tokenizer(source: Path, folder: Path) -> None:
    """Put the tokenizer of a checkpoint into a folder, as files of Hugging Face's form. ValueError
    for a file that is none, or a link that leads out of the checkpoint."""
    if source.is_dir():
        home = source.resolve()
        if home.parent.name == "snapshots":  # of the hub's cache, where files are links
            home = home.parents[1]
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                     "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
                     "generation_config.json"):
            file = source / name
            if file.is_file() and file.resolve().is_relative_to(home):
                shutil.copy(file, folder)
            elif os.path.lexists(file):  # a copy would give away what is elsewhere
                raise ValueError(f"cannot copy {file}: it is no plain file of its folder")
        return
    tokenizer = load_tokenizer(source)
    backend = tokenizer.backend
    special_text = tokenizer.special_text
    if isinstance(backend, tokenizers.Tokenizer):
        if tokenizer.bos_id is not None:
            bos = special_text["bos_token"]
            backend.post_processor = tokenizers.processors.TemplateProcessing(
                f"{bos} $A", None, [(bos, tokenizer.bos_id)])
        backend.save(str(folder / "tokenizer.json"))
    else:
        (folder / "tokenizer.model").write_bytes(backend.serialized_model_proto())
    config = {
        **special_text,
        "add_bos_token": tokenizer.bos_id is not None,
        "eos_token_id": sorted(tokenizer.eos_ids),
        "chat_template": tokenizer.chat_template,
    }
    text = json.dumps(config, indent=2)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
