"""Vocabularies inside GGUF files: the ids are llama.cpp's on its own reference vocabularies.

They come with the sources of llama-cpp-python, which are fetched once; what llama.cpp itself gives
is asked of that package where it is installed."""
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import ModuleType
from typing import NamedTuple

import gguf
import pytest

from checks.common import AWKWARD, LLAMA_CPP
from formats import gguf_file
from formats.gguf_file import read_gguf
from formats.pretokenizers import PRE_TOKENIZERS, WHOLE_WORDS
from formats.tokenizer import load_tokenizer
from generate import Tokenizer

VOCABULARIES = ["gpt-2", "llama-bpe", "qwen2", "qwen35", "refact", "starcoder", "mpt", "command-r",
                "deepseek-coder", "deepseek-llm", "llama-spm", "phi-3", "baichuan"]
PIECES = [  # what awkward texts are put together from
    *AWKWARD, "Hello", " world", "don't", "WE'LL", "it\u2019s", " 'd", "'T", "1", "23", "456",
    "3.14", "1,000,000", "\u0663\u0664", "\u00bd", "\u2167", "\u00b2", " ", "  ", "   ", "\t",
    "\n", "\n\n", "\r\n", "\u00a0", "\u3000", "\u2028", "\x0b", "\x85", "\x1c", "\x7f", "\u200b",
    "\ufeff", "e\u0301", "\u00d6sterreich", "hello\u00c4pfel", "\u00c0\u00c9", "\u017f", "\u01c5",
    "\u00aa", "\u4e16\u754c\u3002", "\uff0c", "\u3053\u3093\u306b", "\u30ab\u30bf\u30fc",
    "\uc548\ub155", "\u0928\u092e\u0938\u094d\u0924\u0947", "\u0e44\u0e17\u0e22",
    "\u0627\u0644\u0639", "\u05e2\u05b4\u05d1", "\u0440\u0443\u0301", "\u0395\u03bb",
    "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\U0001d4b3", "?!", "...", "--", "//", "\\", "__init__",
    "()", "{}[]", "<s>", "</s>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<unk>",
    "<0x0A>", "\u2581\u2581x", "$", "\u20ac", "+=", "^~`|", "@#%&*", "camelCaseWord", "HTTPServer",
    "iPhone", "a1b2", "\ufb01", "\u2460", "\u201cq\u201d", "\u00b0C", "\ud7ff", "\uff41\uff11",
]


def awkward_texts(n: int) -> list[str]:
    random = Random(0)
    texts = list(PIECES)
    while len(texts) < n:
        pieces = random.choices(PIECES, k=random.randint(2, 9))
        texts.append("".join(piece + random.choice(["", "", " "]) for piece in pieces))
    return texts


@pytest.fixture(scope="session")
def llama_cpp() -> ModuleType:
    module = pytest.importorskip("llama_cpp", reason=f"needs pip install {LLAMA_CPP}")
    return module


Encode = Callable[[str], list[int]]


def llama_cpp_encoder(llama_cpp: ModuleType, path: Path, pre: str | None = None) -> Encode:
    """llama.cpp's way from a text to ids, special tokens as plain text. pre: in place of the
    pre-tokenizer that the file names."""
    overrides = {"tokenizer.ggml.pre": pre} if pre else None
    model = llama_cpp.Llama(
        str(path), vocab_only=True, verbose=False, kv_overrides=overrides)
    return lambda text: model.tokenize(text.encode(), add_bos=True, special=False)


class Vocabulary(NamedTuple):
    path: Path
    tokenizer: Tokenizer


@pytest.fixture(scope="module", params=VOCABULARIES)
def vocabulary(request: pytest.FixtureRequest, llama_cpp_files: Path) -> Vocabulary:
    path = llama_cpp_files / f"ggml-vocab-{request.param}.gguf"
    return Vocabulary(path, load_tokenizer(path))


def test_ids_are_those_that_llama_cpp_expects(vocabulary: Vocabulary) -> None:
    """Its own tests' texts and ids, which were made by Hugging Face's tokenizers."""
    texts = vocabulary.path.with_suffix(".gguf.inp")
    if not texts.exists():
        pytest.skip("llama.cpp has no texts of this vocabulary")
    lines = texts.with_suffix(".out").read_text().splitlines()
    separator = "\n__ggml_vocab_test__\n"
    for text, line in zip(texts.read_text(encoding="utf-8").split(separator), lines):
        want = [int(i) for i in line.split()]
        assert vocabulary.tokenizer.encode(text, bos=False) == want, text


def test_ids_are_llama_cpps(llama_cpp: ModuleType, vocabulary: Vocabulary) -> None:
    """But for </s> of Phi-3, a text by its folder and its file: llama.cpp holds it for an end, of
    which a text has none."""
    encode = llama_cpp_encoder(llama_cpp, vocabulary.path)
    for text in awkward_texts(500):
        if "</s>" in text and vocabulary.tokenizer.added:
            continue
        assert vocabulary.tokenizer.encode(text) == encode(text), text


# one name of each way to split, and of each that takes words which are tokens as they are
WAYS = {id(way): name for name, way in PRE_TOKENIZERS.items() if name not in WHOLE_WORDS}
WAYS |= {name: name for name in ("llama-bpe", "tekken", "glm4")}


@pytest.mark.parametrize("pre", WAYS.values())
def test_every_pre_tokenizer_splits_as_llama_cpps(
    llama_cpp: ModuleType, llama_cpp_files: Path, pre: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that have no reference vocabulary: with the vocabulary of Llama 3."""
    path = llama_cpp_files / "ggml-vocab-llama-bpe.gguf"
    meta, tensors = read_gguf(path)
    changed = meta | {"tokenizer.ggml.pre": pre}
    monkeypatch.setattr(gguf_file, "read_gguf", lambda _: (changed, tensors))
    tokenizer = load_tokenizer(path)
    encode = llama_cpp_encoder(llama_cpp, path, pre)
    for text in awkward_texts(300):
        assert tokenizer.encode(text) == encode(text), text


# --- which tokens end a text ---

def write_vocabulary(path: Path, tokens: list[str], types: list[int]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list([*tokens, "a", "b", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_token_types([*types, 1, 1, 1])
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tokens, ends", [
    (["<|return|>", "<|end|>", "<|call|>", "x"], {0, 2}),  # gpt-oss goes on behind a message
    (["<|endoftext|>", "<|end|>", "<|user|>", "x"], {0, 1}),  # Phi does not
    (["<eos>", "<end_of_turn>", "<start_of_turn>", "x"], {0, 1}),
])
def test_the_ends_of_a_familys_texts(tmp_path: Path, tokens: list[str], ends: set[int]) -> None:
    """Though the file says that some of these tokens are plain text."""
    path = write_vocabulary(tmp_path / "m.gguf", tokens, [3, 4, 1, 1])
    tokenizer = load_tokenizer(path)
    assert tokenizer.eos_ids == ends
    assert 1 in tokenizer.special.values()


@pytest.mark.parametrize("model, pre, message", [
    ("t5", None, "unsupported tokenizer 't5'"),
    ("gemma4", None, "unsupported tokenizer 'gemma4'"),
    ("gpt2", "kimi-k2", "pre-tokenizer 'kimi-k2'; supported: llama .*gpt-2"),
    ("gpt2", None, "pre-tokenizer None"),
])
def test_unknown_vocabularies_are_refused_by_name(
    tmp_path: Path, model: str, pre: str | None, message: str
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / "m.gguf")
