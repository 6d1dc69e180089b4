"""Tokenizers: text <-> token ids, chat templates, and reading and writing vocabularies."""
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, decoders

from formats.checkpoint import first_line, read_gguf, read_json, resolve
from formats.pretokenizers import PRE_TOKENIZERS, WHOLE_WORDS
from formats.templates import render_template


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """The tokenizer of a checkpoint: a folder or hub id with tokenizer.json or tokenizer.model,
    such a file itself, or the vocabulary inside a .gguf. ValueError says what is wrong."""
    path = resolve(path)
    try:
        if path.suffix == ".gguf":
            return gguf_tokenizer(path)
        return folder_tokenizer(path)
    except Exception as e:  # tokenizers raises plain ones
        raise ValueError(f"cannot read the tokenizer of {path}: {first_line(e)}") from None


@dataclass
class Tokenizer:
    """Text <-> token ids."""
    backend: tokenizers.Tokenizer | SentencePieceProcessor
    vocab_size: int
    special: dict[str, int]  # the control tokens
    bos_id: int | None  # put before a text by encode(bos=True), None where the model takes none
    eos_ids: set[int]
    chat_template: str | None
    # as a template writes them: encode may begin with none, and a text may end in several ways
    bos_token: str = ""
    eos_token: str = ""

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The ids of a text. Special tokens written in it are plain text."""
        if isinstance(self.backend, tokenizers.Tokenizer):
            ids = self.backend.encode(text, add_special_tokens=False).ids
        else:
            ids = self.backend.encode(text)
        if bos and self.bos_id is not None:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, control tokens left out, and those of a model that has more tokens than
        its tokenizer."""
        control = set(self.special.values())
        shown = [i for i in ids if i not in control]
        if isinstance(self.backend, SentencePieceProcessor):  # which ends the program at others
            shown = [i for i in shown if i < self.vocab_size]
        return self.backend.decode(shown)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """[{"role": ..., "content": ...}, ...] -> the ids of the conversation in the model's own
        template, up to where the assistant answers. The template's special tokens are special,
        those inside a message are text. ValueError if there is no template or it fails."""
        if not self.chat_template:
            raise ValueError("this model has no chat template; use --prompt")
        # special tokens inside messages travel through the template as private-use characters
        stand_ins = {token: chr(0x100000 + i) for i, token in enumerate(self.special)}
        special = any_of(stand_ins)

        def hide(found: re.Match) -> str:
            return stand_ins[found[0]]

        hidden = [{**m, "content": re.sub(special, hide, m["content"])} for m in messages]
        text = self.render(hidden)
        show = str.maketrans({char: token for token, char in stand_ins.items()})
        # without any, the backend itself knows the template's special tokens
        if isinstance(self.backend, tokenizers.Tokenizer) and text == text.translate(show):
            self.backend.encode_special_tokens = False
            ids = self.encode(text, bos=False)
            self.backend.encode_special_tokens = True
            return ids
        # otherwise cut at the template's own special tokens
        ids = []
        for piece in re.split(f"({special})", text):
            if piece in self.special:
                ids.append(self.special[piece])
            else:
                ids += self.encode(piece.translate(show), bos=False)
        return ids

    def render(self, messages: list[dict[str, str]]) -> str:
        """The chat template's text for messages."""
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


def any_of(tokens: Iterable[str]) -> str:
    """A regular expression for any of the tokens, the longest first; without any, for nothing."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return "|".join(re.escape(token) for token in longest_first) or "(?!)"


class TextStream:
    """Turns ids into text piece by piece, up to a stop string.

    context: the ids before the first ones, so that a leading space is right. stop: strings that
    end the text and are no part of it; the one that is complete first counts. What may still
    become one is held back, and so is a character until its bytes are all there: the text is the
    same however the ids are cut into pieces. stopped: a stop string was met."""

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.ids = self.tail(list(context))
        self.shown = tokenizer.decode(self.ids)
        self.stop = stop
        self.stopped = False
        self.held = ""  # the start of a stop string, perhaps

    def push(self, ids: list[int], final: bool = False) -> str:
        """The text that new ids complete; final: no more will come. Nothing behind a stop
        string."""
        if self.stopped:
            return ""
        text = self.held + self.decode(ids, final)
        self.held = ""

        # a stop string ends the text in front of it
        found = [(text.find(stop) + len(stop), stop) for stop in self.stop if stop in text]
        if found:
            self.stopped = True
            end, stop = min(found, key=lambda each: (each[0], -len(each[1])))
            return text[:end - len(stop)]

        # what may become a stop string waits
        if not final:
            n_held = max((overlap(text, stop) for stop in self.stop), default=0)
            self.held = text[len(text) - n_held:]
        return text[:len(text) - len(self.held)]

    def decode(self, ids: list[int], final: bool) -> str:
        """The text of new ids behind those before; nothing while a character lacks bytes."""
        self.ids += ids
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\ufffd") and not final:
            return ""
        new = text[len(self.shown):]
        if new:
            self.ids = self.tail(self.ids)
            self.shown = self.tokenizer.decode(self.ids)
        return new

    def tail(self, ids: list[int]) -> list[int]:
        """The last ids, enough for a word's leading space: eight, or up to three more where these
        begin inside a character, since some decoders give up all bytes of a run that has half a
        character (ByteFallback of tokenizers)."""
        for n in range(8, 12):
            if not self.tokenizer.decode(ids[-n:]).startswith("\ufffd"):
                return ids[-n:]
        return ids[-8:]


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the start of a stop string, not all of it."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


# --- Hugging Face folders ---

def folder_tokenizer(path: Path) -> Tokenizer:
    """From tokenizer.json or tokenizer.model, and the settings in the files beside it."""
    file = tokenizer_file(path)
    if file.name.endswith("tokenizer.json"):
        tokenizer = json_tokenizer(file)
    else:
        tokenizer = sentencepiece_tokenizer(file)
    add_settings(tokenizer, file.parent)
    return tokenizer


def tokenizer_file(path: Path) -> Path:
    """The file with the vocabulary: the path itself, or in the folder that it is."""
    files = [path]
    if path.is_dir():
        files = [path / "tokenizer.json", path / "tokenizer.model"]
    for file in files:
        if file.is_file() and file.name.endswith(("tokenizer.json", ".model")):
            return file
    raise ValueError("no tokenizer.json or tokenizer.model there")


def json_tokenizer(file: Path) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # as plain text
    added = backend.get_added_tokens_decoder()
    special = {token.content: i for i, token in added.items() if token.special}
    before_text = backend.encode("").ids
    bos_id = before_text[0] if before_text else None
    return Tokenizer(backend, backend.get_vocab_size(), special, bos_id, set(), None)


def sentencepiece_tokenizer(file: Path) -> Tokenizer:
    backend = SentencePieceProcessor(model_file=str(file))
    size = backend.get_piece_size()
    special = {backend.id_to_piece(i): i for i in range(size) if backend.is_control(i)}
    bos_id = backend.bos_id() if backend.bos_id() >= 0 else None
    return Tokenizer(backend, size, special, bos_id, set(), None)


def add_settings(tokenizer: Tokenizer, folder: Path) -> None:
    """What a folder's JSON files say about the ends of a text, its start and the chat template."""
    settings = {}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            continue
        config = read_json(folder / name)
        tokenizer.eos_ids |= token_ids(config.get("eos_token_id"), folder / name)
        settings |= config
    tokenizer.bos_token = token_text(settings.get("bos_token"))
    tokenizer.eos_token = token_text(settings.get("eos_token"))
    tokenizer.eos_ids.add(tokenizer.special.get(tokenizer.eos_token))
    tokenizer.eos_ids.discard(None)
    if settings.get("add_bos_token") is False:
        tokenizer.bos_id = None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = template


def token_ids(value: object, file: Path) -> set[int]:
    """The ids that eos_token_id has: one, a list of them, or none. ValueError: anything else."""
    ids = value if isinstance(value, list) else [value]
    ids = [i for i in ids if i is not None]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise ValueError(f"{file.name} has eos_token_id {value!r}, which is no token")
    return set(ids)


def token_text(token: str | dict | None) -> str:
    """A special token of tokenizer_config.json, which is a text or an object with one."""
    if isinstance(token, dict):
        token = token["content"]
    return token or ""


# --- the vocabulary inside a GGUF file ---

# tokens that end what a model says, whatever else a file says of them
END_OF_TURN = {"<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>",
               "<end_of_turn>", "<|eom_id|>", "<|return|>", "<|call|>", "</s>"}
CONTROL, USER_DEFINED = 3, 4  # token types of GGUF, the same numbers as sentencepiece's


def gguf_tokenizer(path: Path) -> Tokenizer:
    """From the metadata of a GGUF file, SentencePiece or BPE with a known pre-tokenizer."""
    meta = {key.removeprefix("tokenizer.ggml."): v for key, v in read_gguf(path)[0].items()}
    tokens = meta.get("tokens")
    kind = meta.get("model")
    pre = meta.get("pre")
    if kind not in ("gpt2", "llama") or kind == "gpt2" and pre not in PRE_TOKENIZERS:
        raise ValueError(f"unsupported tokenizer {kind!r}, pre-tokenizer {pre!r}; supported: llama "
                         f"(SentencePiece) and gpt2 (BPE) with {', '.join(PRE_TOKENIZERS)}")
    types = list(meta.get("token_type") or [1] * len(tokens))
    ends = {i for i, token in enumerate(tokens) if token in END_OF_TURN}
    for i in ends:
        types[i] = CONTROL  # some files have them as plain text
    if kind == "gpt2":
        backend = byte_level_bpe(tokens, meta["merges"], types, pre)
        takes_bos = pre in WHOLE_WORDS
    else:
        unknown = meta.get("unknown_token_id", 0)
        space_prefix = meta.get("add_space_prefix", True)
        backend = sentencepiece_bpe(tokens, meta["scores"], types, unknown, space_prefix)
        takes_bos = True
    bos_id = meta.get("bos_token_id") if meta.get("add_bos_token", takes_bos) else None
    special = {tokens[i]: i for i, token_type in enumerate(types) if token_type == CONTROL}
    if {"<|return|>", "<|call|>"} <= special.keys():
        ends.discard(special.get("<|end|>"))  # of a message, behind which gpt-oss goes on
    ends |= {meta.get(f"{name}_token_id") for name in ("eos", "eot", "eom")}
    ends.discard(None)
    template = meta.get("tokenizer.chat_template")
    return Tokenizer(backend, len(tokens), special, bos_id, ends, template,
                     bos_token=token_named("bos", meta), eos_token=token_named("eos", meta))


def token_named(name: str, meta: dict) -> str:
    """The text of the token at the start ("bos") or the end ("eos") of texts; "": there is none."""
    i = meta.get(f"{name}_token_id", -1)
    return meta["tokens"][i] if 0 <= i < len(meta["tokens"]) else ""


def byte_level_bpe(
    tokens: list[str], merges: list[str], types: list[int], pre: str
) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    bpe = tokenizers.models.BPE(vocab, pairs, ignore_merges=pre in WHOLE_WORDS)
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    backend.encode_special_tokens = True  # as plain text
    added = []
    for token, token_type in zip(tokens, types):
        if token_type in (CONTROL, USER_DEFINED):
            added.append(AddedToken(token, special=token_type == CONTROL, normalized=False))
    backend.add_tokens(added)
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
    """Put the tokenizer of a checkpoint into a folder, as files of Hugging Face's form."""
    if source.is_dir():
        for name in ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json",
                     "generation_config.json"):
            for file in source.glob(name):
                shutil.copy(file, folder)
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
