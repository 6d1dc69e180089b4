"""Tokenizers of any form: Hugging Face folders and GGUF files, read and written; chat."""
from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, decoders

from formats.checkpoint import resolve
from formats.pretokenizers import PRE_TOKENIZERS, WHOLE_WORDS
from formats.settings import plain_file, read_json
from formats.templates import render_template
from formats.text import StreamPrinter, TextStream
from formats.wrappers import PICTURE
from generate import Tokenizer
from model import first_line, is_number

# nobody knows it: what stands, with a number, for a special token that a message has
WRITTEN = f"{secrets.randbits(64)}:"
ASKED_FOR = {"role", "type", "id", "tool_call_id"}  # by templates: Mistral's wants nine letters
Piece = ModelProto.SentencePiece


def load_tokenizer(path: str | Path | None = None) -> ChatTokenizer:
    """The tokenizer of a checkpoint: a folder or hub id with tokenizer.json or tokenizer.model,
    such a file itself, or the vocabulary inside a .gguf; None: the default model's. ValueError says
    what is wrong."""
    path = resolve(path)
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

    # bos_token, pad_token, ... as the settings name them, for a template: encode may begin with
    # none, and a text may end in several ways
    names: dict[str, str] = {}
    added: dict[str, int] = {}  # tokens that are text, and that the backend does not find in one
    flags: dict[str, AddedToken] = {}  # of such and special ones: which white space they take in
    pictures: str = "(?!)"  # an expression for the tokens of pictures and sound that are left out
    # whether the text behind such and special tokens begins with a blank as a text's first word
    legacy: bool = True
    printer = StreamPrinter  # what generate.run prints with

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """ValueError for a token that stands for a picture, where these are left out."""
        ids = self.ids(self.cut(text, self.added))
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def ends(self, stop: Sequence[str], prompt: list[int]) -> Callable[[list[int]], bool]:
        """Request.ends for the text behind a prompt: whether new ids complete a stop string."""
        return TextStream(self, prompt, stop).ends

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """[{"role": ..., "content": ...}, ...] -> the ids of the conversation in the model's own
        template, up to where the assistant answers. The template's special tokens are special,
        those inside a message are text. ValueError if there is no template or it fails."""
        if not self.chat_template:
            raise ValueError("this model has no chat template; use --prompt")
        pieces = self.pieces(messages, any_of(self.special))
        # a line break of the template, say, and the beginning of a message may be a token: only
        # those count that it writes around messages of which it sees nothing
        alone = self.pieces(messages, "(?s).+")
        found, right = ([token for token in each[1::2] if token in self.special]
                        for each in (pieces, alone))
        return self.ids(pieces if found == right else alone)

    def pieces(self, messages: list[dict[str, str]], hidden: str) -> list[str]:
        """A conversation in the template, cut so that every second piece is a token. hidden: an
        expression for what, of each message, the template does not see."""
        written: list[str] = []
        special = any_of(self.special)

        def mark(found: re.Match) -> str:
            written.append(found[0])
            return f"{WRITTEN}{len(written) - 1};"

        def hide(said: Any, key: str = "") -> Any:
            if isinstance(said, dict):
                return {key: hide(each, key) for key, each in said.items()}
            if isinstance(said, list):
                return [hide(each, key) for each in said]
            what = special if key in ASKED_FOR else hidden
            return re.sub(what, mark, said) if isinstance(said, str) else said

        pieces = self.cut(self.render(hide(messages)), self.special | self.added)
        show = partial(re.sub, rf"{WRITTEN}(\d+);", lambda found: written[int(found[1])])
        return [show(piece) for piece in pieces]

    def cut(self, text: str, known: Collection[str]) -> list[str]:
        """A text in pieces, of which every second one is one of the known tokens."""
        found = ask(self.finder.encode, text)
        tokens = self.finder.get_added_tokens_decoder()
        pieces, end = [], 0
        for i, (start, stop) in zip(found.ids, found.offsets):
            if i in tokens and tokens[i].content in known:
                pieces += [text[end:start], tokens[i].content]
                end = stop
        return [*pieces, text[end:]]

    @cached_property
    def finder(self) -> tokenizers.Tokenizer:
        """It finds tokens with the white space that they take in; between them all is unknown."""
        finder = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))
        finder.normalizer = getattr(self.backend, "normalizer", None)
        plain = {name: AddedToken(name, normalized=False) for name in self.added | self.special}
        finder.add_tokens([*(plain | self.flags).values()])
        return finder

    def ids(self, pieces: list[str]) -> list[int]:
        """The ids of a text in pieces, of which every second one is a token. ValueError for one
        that stands for a picture, where these are left out."""
        found = re.search(self.pictures, "".join(pieces))
        if found:
            raise ValueError(f"the text has {found[0]}, but pictures and sound are left out")
        known = self.added | self.special
        ids = []
        for n, piece in enumerate(pieces):
            ids += [known[piece]] if n % 2 else self.plain_ids(piece, self.legacy or n == 0)
        return ids

    def plain_ids(self, text: str, blank: bool) -> list[int]:
        """The ids of a text without tokens; blank: whether its first word may get one in front."""
        return (self.backend if blank else self.without_blank).encode(text)

    @cached_property
    def without_blank(self) -> SentencePieceProcessor:
        """A backend that puts no blank in front of a text."""
        proto = ModelProto.FromString(self.backend.serialized_model_proto())
        proto.normalizer_spec.add_dummy_prefix = False
        return SentencePieceProcessor(model_proto=proto.SerializeToString())

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
        tokens = {i: token for token, i in self.special.items()}
        ends = [tokens[i] for i in sorted(self.eos_ids) if i in tokens]
        known = {"bos_token": tokens.get(self.bos_id, ""), "eos_token": "".join(ends[:1])}
        return known | self.names


class JSONTokenizer(ChatTokenizer):
    """By a tokenizers.Tokenizer."""

    def plain_ids(self, text: str, blank: bool) -> list[int]:
        backend = self.backend if blank else self.without_blank
        encoded = ask(lambda: backend.encode(text, add_special_tokens=False))
        if {*self.special.values()}.isdisjoint(encoded.ids):
            return encoded.ids
        ids = []  # some models know special tokens as pieces: of these texts, their characters
        unknown = getattr(backend.model, "unk_token", None)
        for i, token, (start, end) in zip(encoded.ids, encoded.tokens, encoded.offsets):
            is_unknown = token == unknown != text[start:end]  # a character that has no piece
            parts = token if self.special.get(token) == i and not is_unknown else ()
            ids += [each.id for part in parts for each in backend.model.tokenize(part)] or [i]
        return ids

    @cached_property
    def without_blank(self) -> tokenizers.Tokenizer:
        """Another one, as others may be encoding. With "first" a text's first word gets a blank."""
        text = self.backend.to_str().replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
        backend = tokenizers.Tokenizer.from_str(text)
        backend.encode_special_tokens = True
        return backend

    def decode(self, ids: list[int]) -> str:
        """Control tokens left out. (An added token is text, though its letters may be those that
        ByteLevel has for bytes.)"""
        control = set(self.special.values())
        runs = groupby((i for i in ids if i not in control), self.mistaken.get)
        return "".join(
            ask(self.backend.decode, list(run)) if text is None else text * len(list(run))
            for text, run in runs)

    @cached_property
    def mistaken(self) -> dict[int, str]:
        """The added tokens that the backend decodes to broken characters."""
        added = self.backend.get_added_tokens_decoder()
        return {i: token.content for i, token in added.items() if not token.special
                and not token.content.isascii() and "\ufffd" in ask(self.backend.decode, [i])}


def any_of(tokens: Iterable[str]) -> str:
    """A regular expression for any of the tokens, the longest first; without any, for nothing."""
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"


# --- Hugging Face folders ---

@dataclass
class Settings:
    """What a folder's JSON files say of its tokenizer."""

    values: dict[str, Any]  # of all files, those of the last one that has them
    eos_ids: set[int]  # of tokens that end a text
    names: dict[str, str]  # of special tokens, as bos_token, and their texts
    special: set[str]  # the texts of all tokens that are to be special
    added: dict[int, AddedToken]


def folder_tokenizer(path: Path) -> ChatTokenizer:
    """From tokenizer.json or tokenizer.model, and the settings in the files beside it."""
    files = [path, path / "tokenizer.json", path / "tokenizer.model"]
    kinds = ("tokenizer.json", ".model")
    found = [file for file in files if file.is_file() and file.name.endswith(kinds)]
    if not found:
        other = "it is a file of another kind; give a folder, or a .gguf file"
        raise ValueError(other if path.is_file() else "no tokenizer.json or tokenizer.model there")
    file = found[0]
    settings = read_settings(file.parent)
    values = settings.values
    read = json_tokenizer if file.suffix == ".json" else model_tokenizer
    tokenizer = read(file, settings)
    special = tokenizer.special
    tokenizer.names = settings.names
    tokenizer.eos_ids = settings.eos_ids | {special.get(settings.names.get("eos_token"))} - {None}
    if values.get("add_bos_token"):
        tokenizer.bos_id = special.get(settings.names.get("bos_token"), tokenizer.bos_id)
    elif values.get("add_bos_token") is not None:
        tokenizer.bos_id = None
    # tokens that were added behind the model's own, for padding or pictures, are none of a text
    n = (values.get("text_config") or values).get("vocab_size")
    surplus = {*special.values(), *tokenizer.added.values()}
    if is_number(n, int) and surplus.issuperset(range(n, tokenizer.vocab_size)):
        tokenizer.vocab_size = min(n, tokenizer.vocab_size)
    if {"wrapper", "text_config", "vision_config"} & values.keys():
        tokenizer.pictures = any_of(filter(PICTURE.search, special))
    template = values.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (file.parent / "chat_template.jinja").exists():
        template = plain_file(file.parent / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = template
    return tokenizer


def json_tokenizer(file: Path, settings: Settings) -> JSONTokenizer:
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # as plain text
    own = backend.get_added_tokens_decoder().values()
    beside = settings.added.values()
    last = [*own, *beside] if "added_tokens_decoder" in settings.values else [*beside, *own]
    added = {token.content: token for token in last}  # the last one counts
    for text in settings.special:
        if text in added or backend.token_to_id(text) is not None:
            added.setdefault(text, AddedToken(text)).special = True
    backend.add_tokens(list(added.values()))
    known = backend.get_added_tokens_decoder()
    normalized = backend.normalizer.normalize_str if backend.normalizer else str
    for token in known.values():
        if token.normalized and not normalized(token.content):
            raise ValueError(f"of the token {token.content!r} its normalizer leaves nothing")
    special = {token.content: i for i, token in known.items() if token.special}
    encoded = backend.encode("a")
    is_put = encoded.special_tokens_mask
    bos_id = encoded.ids[0] if 0 in is_put and is_put[0] else None  # not what is put behind a text
    tokenizer = JSONTokenizer(backend, backend.get_vocab_size(), special, bos_id, set())
    tokenizer.flags = {token.content: token for token in known.values()}
    tokenizer.legacy = "prepend_scheme=first" not in str(backend.pre_tokenizer)
    return tokenizer


def model_tokenizer(file: Path, settings: Settings) -> ChatTokenizer:
    """By tokenizer.model, with the added tokens among its pieces."""
    proto = ModelProto.FromString(file.read_bytes())
    pieces = proto.pieces
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    added = {ids[text]: AddedToken(text, special=True) for text in settings.special & ids.keys()}
    added |= {ids.get(token.content, i): token for i, token in settings.added.items()}
    if max(added, default=0) > len(ids) + len(added):
        raise ValueError("the added tokens have ids far behind those of the others")
    for i, token in added.items():
        while len(pieces) <= i:
            pieces.add(piece=f"[EMPTY_{len(pieces)}]", type=Piece.UNUSED)
        pieces[i].piece = token.content.replace(" ", "\u2581")
        if pieces[i].type != Piece.UNKNOWN:
            pieces[i].type = CONTROL if token.special else USER_DEFINED
    proto.normalizer_spec.add_dummy_prefix &= settings.values.get("add_prefix_space") is not False
    backend = SentencePieceProcessor(model_proto=proto.SerializeToString())
    special = {piece.piece: i for i, piece in enumerate(pieces) if piece.type == CONTROL}
    special |= {token.content: i for i, token in added.items() if token.special}
    bos_id = backend.bos_id() if backend.bos_id() >= 0 else None
    tokenizer = ChatTokenizer(backend, len(pieces), special, bos_id, set())
    tokenizer.added = {token.content: i for i, token in added.items() if not token.special}
    tokenizer.legacy = settings.values.get("legacy", False)
    tokenizer.flags = {token.content: token for token in added.values()}
    return tokenizer


def read_settings(folder: Path) -> Settings:
    values, eos_ids = {}, set()
    for name in ("config.json", "generation_config.json", "tokenizer_config.json",
                 "special_tokens_map.json"):
        if not (folder / name).exists():
            continue
        found = read_json(folder / name)
        eos_ids |= token_ids(found.get("eos_token_id"), folder / name)
        if name != "special_tokens_map.json" or "added_tokens_decoder" not in values:
            values |= found
    tokens = {name: token for name, token in values.items() if name.endswith("_token")}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        others = values.get(key) or []
        tokens |= others if isinstance(others, dict) else {
            (key, i): each for i, each in enumerate(others)}
    texts = {name: token["content"] if isinstance(token, dict) else token
             for name, token in tokens.items() if isinstance(token, (dict, str))}
    special = {text for text in texts.values() if len(text) > 1}  # as padding, ! is a text's too
    decoder = values.get("added_tokens_decoder")
    if decoder is None and (folder / "added_tokens.json").exists():
        older = read_json(folder / "added_tokens.json")
        decoder = {i: {"content": text} for text, i in older.items()}
    added = {}
    for i, token in (decoder or {}).items():
        fields = {name: value for name, value in token.items() if name != "__type"}
        fields["special"] = token.get("special", False) or token["content"] in special
        added[int(i)] = AddedToken(**fields)
    names = {name: text for name, text in texts.items() if isinstance(name, str)}
    return Settings(values, eos_ids, names, special, added)


def token_ids(value: object, file: Path) -> set[int]:
    """The ids that eos_token_id has: one, a list of them, or none. ValueError: anything else."""
    ids = value if isinstance(value, list) else [value]
    ids = [i for i in ids if i is not None]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise ValueError(f"{file.name} has eos_token_id {value!r}, which is no token")
    return set(ids)


# --- the vocabulary inside a GGUF file ---

# tokens that end what a model says, whatever else a file says of them; the last ones are what a
# model of code puts between files
ENDS = {"<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>",
        "<|eom_id|>", "<|return|>", "<|call|>", "<EOT>", "_<EOT>", "<end_of_utterance>",
        "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>",
        "<|file_sep|>"}
CONTROL, USER_DEFINED = 3, 4  # token types of GGUF, the same numbers as sentencepiece's


def gguf_tokenizer(path: Path) -> ChatTokenizer:
    """From the metadata of a GGUF file, SentencePiece or BPE with a known pre-tokenizer."""
    from formats.gguf_file import has_pictures, read_gguf  # gguf is slow to import
    whole, _ = read_gguf(path)
    meta = {key.removeprefix("tokenizer.ggml."): value for key, value in whole.items()}
    kind, pre = meta.get("model"), meta.get("pre")
    is_bpe = kind == "gpt2"
    if not is_bpe and kind != "llama" or is_bpe and str(pre) not in PRE_TOKENIZERS:
        raise ValueError(f"unsupported tokenizer {kind!r}, pre-tokenizer {pre!r}; supported: llama "
                         f"(SentencePiece) and gpt2 (BPE) with {', '.join(PRE_TOKENIZERS)}")
    tokens = meta["tokens"]
    types = meta.get("token_type") or [1] * len(tokens)
    # some files have them as plain text, which is right where </s> ends what HTML strikes through
    types = [CONTROL if token in ENDS else given for token, given in zip(tokens, types)]
    special = {token: i for i, token in enumerate(tokens) if types[i] == CONTROL and token}
    if is_bpe:
        backend = byte_level_bpe(tokens, meta["merges"], types, pre)
    else:
        unknown = token_id(meta, "unknown", tokens) or 0
        space_prefix = meta.get("add_space_prefix", True)
        backend = sentencepiece_bpe(tokens, meta["scores"], types, unknown, space_prefix)
    takes_bos = not is_bpe or pre in WHOLE_WORDS and pre != "glm4"
    bos_id = token_id(meta, "bos", tokens)
    bos_id = bos_id if meta.get("add_bos_token", takes_bos) else None
    ends = {special[token] for token in special.keys() & {*ENDS, "</s>"}}
    if {"<|return|>", "<|call|>"} <= special.keys():
        ends.discard(special.get("<|end|>"))  # of a message, behind which gpt-oss goes on
    ends |= {token_id(meta, name, tokens) for name in ("eos", "eot", "eom")} - {None}
    make = JSONTokenizer if is_bpe else ChatTokenizer
    template = meta.get("tokenizer.chat_template")
    tokenizer = make(backend, len(tokens), special, bos_id, ends, template)
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: meta.get(f"{theirs}_token_id") for name, theirs in named.items()}
    tokenizer.names = {f"{name}_token": tokens[i] for name, i in ids.items()
                       if is_number(i, int) and 0 <= i < len(tokens)}
    if has_pictures(path, whole):
        tokenizer.pictures = any_of(filter(PICTURE.search, special))
    if not is_bpe and {"<|user|>", "<|assistant|>", "<|end|>"} <= special.keys():  # Phi-3
        tokenizer.added = {tokens[2]: 2} if types[2] == USER_DEFINED else {}  # </s>, a text here
        names = {*special, *tokenizer.added} - {"<s>", "<unk>", "<|endoftext|>"}
        tokenizer.flags = {name: AddedToken(name, rstrip=True, special=name in special)
                           for name in names}
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
        "legacy": tokenizer.legacy,
        "added_tokens_decoder": {
            (tokenizer.added | tokenizer.special)[name]: flags.__getstate__()
            for name, flags in tokenizer.flags.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
