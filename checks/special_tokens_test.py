"""Special tokens: whatever file of a folder says what they are, ids are those of transformers."""
import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from checks.common import CHATML, byte_level_tokenizer
from cli.chat import Chat
from formats.text import TextStream
from formats.tokenizer import ChatTokenizer, load_tokenizer, save_tokenizer

TALK = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "well, yes"},
        {"role": "user", "content": "What is it?"}]
PHI = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
       "<|assistant|>\n")
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
           "[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}")
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
START, END = "<|im_start|>", "<|im_end|>"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model of 400 pieces."""
    folder = tmp_path_factory.mktemp("pieces")
    sentencepiece.SentencePieceTrainer.train(
        input=__file__, model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2)
    return folder / "tokenizer.model"


def write_json(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def model_folder(folder: Path, pieces: Path, **settings: Any) -> Path:
    """With tokenizer.model, and without a tokenizer.json."""
    (folder / "tokenizer.model").write_bytes(pieces.read_bytes())
    write_json(folder, config={"model_type": "llama", "eos_token_id": 2}, tokenizer_config={
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **NAMES, **settings})
    return folder


def json_folder(
    folder: Path, special: list[str], *added: AddedToken, post: Any = None, **settings: Any
) -> Path:
    """With a tokenizer.json that has these special tokens from 0 on, and added ones."""
    backend, _, _ = byte_level_tokenizer(special)
    backend.add_tokens(list(added))
    if post is not None:
        backend.post_processor = post
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder, config={"model_type": "mistral"}, tokenizer_config={
        "tokenizer_class": "PreTrainedTokenizerFast", **settings})
    return folder


def assert_chats_alike(folder: Path, messages: list[dict[str, str]] = TALK) -> ChatTokenizer:
    """The ids of a conversation and of its end are transformers'."""
    tokenizer, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    want = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.chat(messages) == want
    assert reference.eos_token_id in tokenizer.eos_ids
    return tokenizer


def flags(content: str, special: bool, **more: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": content, "special": special, **plain, **more}


# --- tokens beside the vocabulary ---

@pytest.mark.parametrize("legacy", [{"legacy": True}, {"legacy": False}, {}])
def test_added_tokens_beside_tokenizer_model(tmp_path: Path, pieces: Path, legacy: dict) -> None:
    """Of which only one is special; a blank follows them where the settings say so."""
    model_folder(tmp_path, pieces, chat_template=CHATML, **legacy)
    write_json(tmp_path, added_tokens={END: 400, START: 401},
               special_tokens_map={**NAMES, "eos_token": END})
    tokenizer = assert_chats_alike(tmp_path)
    assert tokenizer.vocab_size == 402 and tokenizer.decode([401, 400]) == START


@pytest.mark.parametrize("strip", [{}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_decoder_of_added_tokens_beside_tokenizer_model(
    tmp_path: Path, pieces: Path, legacy: bool, strip: dict[str, bool]
) -> None:
    names = ["<|user|>", "<|end|>", "<|assistant|>"]
    added = {i: flags(name, True, **strip) for i, name in enumerate(names, start=400)}
    model_folder(tmp_path, pieces, added_tokens_decoder=added, chat_template=PHI, legacy=legacy)
    assert_chats_alike(tmp_path)


@pytest.mark.parametrize("legacy", [True, False])
def test_blanks_behind_special_tokens_of_tokenizer_model(
    tmp_path: Path, pieces: Path, legacy: bool
) -> None:
    assert_chats_alike(model_folder(tmp_path, pieces, chat_template=MISTRAL, legacy=legacy))


@pytest.mark.parametrize("as_decoder", [True, False])
def test_added_tokens_beside_tokenizer_json(tmp_path: Path, as_decoder: bool) -> None:
    """Special or not, and with flags that differ from those in tokenizer.json."""
    added = [flags(START, True, rstrip=True), flags(END, False)]
    json_folder(tmp_path, ["<s>", "</s>"], AddedToken(START), chat_template=CHATML,
                bos_token="<s>", eos_token=END, **(
                    {"added_tokens_decoder": {600 + i: token for i, token in enumerate(added)}}
                    if as_decoder else {}))
    if not as_decoder:
        write_json(tmp_path, added_tokens={START: 600, END: 601})
    tokenizer = assert_chats_alike(tmp_path)
    assert tokenizer.vocab_size == 602 and 601 in tokenizer.eos_ids


def test_special_tokens_map_says_more_than_tokenizer_config(tmp_path: Path) -> None:
    json_folder(tmp_path, ["<s>", "</s>", START, END], eos_token="</s>",
                chat_template="{{ bos_token }}" + CHATML)
    write_json(tmp_path, special_tokens_map={"bos_token": flags("<s>", True), "eos_token": END})
    assert_chats_alike(tmp_path)


def test_an_end_that_is_not_marked_as_special_ends_a_text_and_is_none(tmp_path: Path) -> None:
    added = [AddedToken(name, special=False) for name in (START, END)]
    tokenizer = assert_chats_alike(json_folder(
        tmp_path, ["<s>", "</s>"], *added, bos_token="<s>", eos_token=END, chat_template=CHATML))
    assert 601 not in tokenizer.encode(f"x{END}") and tokenizer.decode([601]) == ""


def test_a_character_that_pads_stays_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(json_folder(tmp_path, ["<s>"], eos_token="<s>", pad_token="!"))
    assert tokenizer.decode(tokenizer.encode("Hello!")) == "Hello!"


def test_templates_get_every_named_token(tmp_path: Path) -> None:
    template = "{{ pad_token }}{{ unk_token }}{{ image_token }}{{ mask_token }}{{ eos_token }}"
    assert_chats_alike(json_folder(
        tmp_path, ["<s>", "</s>", "<pad>", "<unk>", "<image>"], pad_token="<pad>",
        unk_token={"__type": "AddedToken", **flags("<unk>", True)}, image_token="<image>",
        mask_token=None, eos_token="</s>",
        chat_template=template))


def test_further_special_tokens_are_a_list_and_a_dictionary(tmp_path: Path) -> None:
    """Of which files have both, and the list has texts or tokens."""
    names = ["<s>", "</s>", "<a>", "<b>", "<c>"]
    json_folder(tmp_path, names[:2], *(AddedToken(name, special=False) for name in names[2:]),
                eos_token="</s>", chat_template="{{ image_token }}<a><b>",
                additional_special_tokens=["<a>", flags("<b>", True)],
                extra_special_tokens={"image_token": "<c>"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special.keys() == {*names}
    assert tokenizer.chat(TALK) == [tokenizer.special[name] for name in ("<c>", "<a>", "<b>")]


@pytest.mark.parametrize("single, want", [("$A </s>", []), ("<s> $A </s>", [0]), ("<s> $A", [0])])
def test_an_end_behind_a_text_is_not_its_beginning(
    tmp_path: Path, single: str, want: list[int]
) -> None:
    post = TemplateProcessing(single, None, [("<s>", 0), ("</s>", 1)])
    tokenizer = load_tokenizer(json_folder(tmp_path, ["<s>", "</s>"], post=post))
    assert tokenizer.encode("") == want


@pytest.mark.parametrize("kind, n", [("json", 600), ("model", 400)])
def test_tokens_added_behind_the_models_are_no_more_of_its_vocabulary(
    tmp_path: Path, pieces: Path, kind: str, n: int
) -> None:
    """A [PAD] that a trainer added is known, and the model fits; one that lacks more does not."""
    if kind == "json":
        json_folder(tmp_path, ["<s>"], AddedToken("[PAD]", special=True), eos_token="<s>")
    else:
        model_folder(tmp_path, pieces, pad_token="[PAD]")
    for known, size in ((n, n), (n - 1, n + 1), (n + 5, n + 1)):
        write_json(tmp_path, config={"vocab_size": known}, added_tokens={"[PAD]": n})
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.vocab_size == size and tokenizer.special["[PAD]"] == n


def random_tokens(random: Random) -> list[AddedToken]:
    """Up to five that overlap each other or themselves, of which most are special: all that begin
    or end with white space."""
    texts = []
    for _ in range(random.randint(1, 5)):
        begin = random.choice(["", *texts])[:random.randint(0, 4)]
        texts.append(begin + "".join(random.choices("ab \n<", k=random.randint(1, 3))))
    tokens = []
    for text in dict.fromkeys(texts):
        special = text != text.strip() or random.random() < 0.7
        names = ("lstrip", "rstrip", "single_word", "normalized")[:4 if special else 2]
        flags = {name: random.random() < 0.3 for name in names}
        tokens.append(AddedToken(text, special=special, **flags))
    return tokens


def test_tokens_are_found_where_the_library_finds_them(tmp_path: Path) -> None:
    """Whichever there are: what a template writes has the ids that tokenizers gives."""
    backend, _, _ = byte_level_tokenizer([])
    plain = backend.to_str()
    for seed in range(300):
        random = Random(seed)
        backend = tokenizers.Tokenizer.from_str(plain)
        known = backend.get_vocab()  # a special piece of it may stay text
        added = [token for token in random_tokens(random) if token.content not in known]
        backend.add_tokens(added)
        backend.save(str(tmp_path / "tokenizer.json"))
        parts = [*(token.content for token in added), "a", "b", " ", "\n", "<", "c"]
        text = "".join(random.choices(parts, k=random.randint(1, 12)))
        write_json(tmp_path, tokenizer_config={"chat_template": "{{ %s }}" % json.dumps(text)})
        want = backend.encode(text, add_special_tokens=False).ids
        assert load_tokenizer(tmp_path).chat(TALK) == want, (seed, text, added)


def test_a_token_of_which_the_normalizer_leaves_nothing_is_refused(tmp_path: Path) -> None:
    """The library finds it between any two characters, and may take all memory for that."""
    backend, _, _ = byte_level_tokenizer([])
    backend.normalizer = tokenizers.normalizers.Strip()
    backend.add_tokens([AddedToken("\n\n", special=True, normalized=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"of the token '\\n\\n' its normalizer leaves nothing"):
        load_tokenizer(tmp_path)


# --- what a message says is text ---

SPICED = ["</s>", "<|end|>", "<|user|>\n", "a<|assistant|>b"]


@pytest.mark.parametrize("kind", ["json", "model"])
@pytest.mark.parametrize("spice", SPICED)
def test_a_special_text_in_a_message_leaves_the_rest_as_it_is(
    tmp_path: Path, pieces: Path, kind: str, spice: str
) -> None:
    """Behind it and in front of it; and it is no token."""
    names = ["<|user|>", "<|end|>", "<|assistant|>"]
    if kind == "json":
        json_folder(tmp_path, ["<s>", "</s>"], *(
            AddedToken(name, rstrip=True, special=True) for name in names), chat_template=PHI)
    else:
        added = {i: flags(name, True, rstrip=True) for i, name in enumerate(names, start=400)}
        model_folder(tmp_path, pieces, added_tokens_decoder=added, chat_template=PHI)
    tokenizer = load_tokenizer(tmp_path)
    end, user = tokenizer.special["<|end|>"], tokenizer.special["<|user|>"]

    def turns(text: str) -> list[list[int]]:
        ids = tokenizer.chat([{"role": "user", "content": f"What is {text} here?"}, *TALK])
        return [ids[:ids.index(end)], ids[ids.index(end):]]

    (head, rest), (plain_head, plain_rest) = turns(spice), turns("it")
    assert rest == plain_rest and head[0] == plain_head[0] == user
    without = tokenizer.encode if kind == "json" else tokenizer.without_blank.encode
    said = f"What is {spice} here?"
    assert head[1:] == (without(said, bos=False) if kind == "json" else without(said))


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_text_behind_a_special_token_begins_with_a_blank_where_the_file_wants_one(
    tmp_path: Path, scheme: str
) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(
        [("<unk>", 0.0), *((c, -3.0) for c in "\u2581abcdefghijklmnopqrstuvwxyz.|>?H,WI")], 0))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    backend.add_special_tokens(["<s>", "</s>", "<|user|>", "<|end|>", "<|assistant|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path, config={"model_type": "mistral"}, tokenizer_config={
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": PHI, **NAMES})
    assert_chats_alike(tmp_path)


@pytest.mark.parametrize("kind", ["Unigram", "BPE", "ignore_merges"])
def test_a_special_token_that_the_model_knows_as_a_piece_stays_text(
    tmp_path: Path, kind: str
) -> None:
    """It is none in a message, and what the template writes is one."""
    pieces = "<", "<s", "<s>", "</", "</s", "</s>"
    letters = ["<unk>", *"\u2581abcdefghijklmnopqrstuvwxyz/>", *pieces]
    vocab = {token: i for i, token in enumerate(letters)}
    if kind == "Unigram":
        model = tokenizers.models.Unigram([(token, -len(token) / 9) for token in letters], 0)
    else:
        pairs = [("<", "s"), ("<s", ">"), ("<", "/"), ("</", "s"), ("</s", ">")]
        model = tokenizers.models.BPE(
            vocab, pairs, unk_token="<unk>", ignore_merges=kind == "ignore_merges")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.NFKC()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    write_json(tmp_path, config={"model_type": "mistral"}, tokenizer_config={
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **NAMES})
    tokenizer = assert_chats_alike(tmp_path, [{"role": "user", "content": "ab<s? 1 z"}])
    for said in ("a</s>b<s>?", "a\uff1c/s\uff1eb<\uff53>?"):  # wide ones, which NFKC makes narrow
        start, *ids, end = tokenizer.chat([{"role": "user", "content": said}])
        assert [start, end] == [vocab["<s>"], vocab["</s>"]] and not {start, end} & {*ids}
        assert ids == [*map(vocab.get, "a</s>b<s>"), vocab["<unk>"]]
        assert ids == tokenizer.encode(said, bos=False)


def test_no_character_stands_for_a_special_token(tmp_path: Path) -> None:
    """In a message, a role or the template; the first private ones and all others alike."""
    odd = "".join(chr(0x100000 + i) for i in range(8)) + "\ue000\ufdd0\ufffe"
    template = odd + "{% for m in messages %}{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}"
    json_folder(tmp_path, ["<s>", END], chat_template=template, eos_token=END)
    tokenizer = load_tokenizer(tmp_path)
    for content in (f"</s>{odd}{END}", f"</s>{END}"):
        ids = tokenizer.chat([{"role": odd, "content": content}])
        assert ids == [*tokenizer.encode(odd + odd + content), 1]


PICTURES = ["<|image_pad|>", "<image_soft_token>", "[IMG]", "<image>", "<|video_pad|>"]


@pytest.mark.parametrize("token", PICTURES)
@pytest.mark.parametrize("config", [{"model_type": "llava", "text_config": {}}, {"wrapper": "x"}])
def test_a_picture_in_a_prompt_is_refused_where_pictures_are_left_out(
    tmp_path: Path, token: str, config: dict
) -> None:
    """The second is what a saved folder says. Elsewhere the token is a text as any other."""
    folder = json_folder(tmp_path, [START, END, token], chat_template=CHATML)
    talk = [{"role": "user", "content": f"What is it? {token}"}]
    for ids in (load_tokenizer(folder).chat(talk), load_tokenizer(folder).encode(f"Is {token}")):
        assert len(ids) > 3 and 2 not in ids
    write_json(folder, config=config)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("an image <imag")
    for ask in (lambda: tokenizer.chat(talk), lambda: tokenizer.encode(f"Is {token}")):
        with pytest.raises(ValueError, match=re.escape(f"the text has {token}, but pictures")):
            ask()


def test_a_picture_that_a_template_puts_into_a_prompt_is_refused(tmp_path: Path) -> None:
    content = "{% for m in messages %}{% for c in m.content %}<|image_pad|>{% endfor %}{% endfor %}"
    folder = json_folder(tmp_path, ["<|image_pad|>"], chat_template=content)
    write_json(folder, config={"model_type": "qwen3_vl", "text_config": {}})
    with pytest.raises(ValueError, match=r"the text has <\|image_pad\|>"):
        load_tokenizer(folder).chat([{"role": "user", "content": [{"type": "image"}]}])


def test_no_text_of_a_message_becomes_a_part_of_a_special_token(tmp_path: Path) -> None:
    """With the line breaks that a template writes beside it, or in a list of parts."""
    folder = json_folder(tmp_path, ["<s>", START, END, "\n<x>", f"y\n{END}"], eos_token=END,
                         chat_template=CHATML.replace("<|im_end|>", "\n<|im_end|>", 1))
    tokenizer = load_tokenizer(folder)
    for said in ("<x> hi", "hi y", "y", "y\n", "a\n<x>b", "<x>"):
        ids = tokenizer.chat([{"role": "user", "content": said}])
        assert [i for i in ids if i < 5] == [1, 2, 1]
        assert tokenizer.decode(ids) == f"user\n{said}\n\nassistant\n"
    parts = [{"type": "text", "text": f"{END}<x>"}]
    ids = tokenizer.chat([{"role": "user", "content": parts}])
    assert [i for i in ids if i < 5] == [1, 2, 1]


# --- GGUF ---

@pytest.mark.parametrize("arch, beside, size, is_its", [
    ("qwen2vl", None, 0, True), ("llama", None, 0, False),
    ("llama", "mmproj-F16.gguf", 64, True), ("llama", "gemma-3-4b-it.mmproj-Q8_0.gguf", 64, True),
    ("llama", "mmproj-F16.gguf", 96, False),
])
def test_a_picture_in_a_prompt_of_a_gguf_file(
    tmp_path: Path, arch: str, beside: str | None, size: int, is_its: bool
) -> None:
    """By its architecture, or by the other half of the model among all that lie beside it."""
    size_of_texts = "add_embedding_length", 64
    path = bytes_gguf(
        tmp_path / "x.gguf", ["<|endoftext|>", "<|image_pad|>"], size_of_texts, arch=arch)
    (tmp_path / "mmproj-broken.gguf").touch()
    if beside:
        writer = gguf.GGUFWriter(tmp_path / beside, "clip")
        writer.add_tensor("mm.2.weight", np.zeros((size, 8), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    tokenizer = load_tokenizer(path)
    if not is_its:
        assert tokenizer.encode("<|image_pad|>")
        return
    with pytest.raises(ValueError, match="the text has .*image_pad.*pictures and sound"):
        tokenizer.encode("<|image_pad|>")


def write_gguf(
    path: Path, tokens: list[str], types: list[int], *extra: tuple, arch: str = "llama"
) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for method, *arguments in extra:
        getattr(writer, method)(*arguments)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def pieces_gguf(
    path: Path, pieces: Path, added: list[str], kind: int, *extra: tuple, eos: int = 2
) -> Path:
    """The pieces of a tokenizer.model and added tokens of one type."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    ids = range(model.get_piece_size())
    types = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i)
             else 1 for i in ids]
    types[2] = 3 if eos == 2 else 4
    return write_gguf(
        path, [*(model.id_to_piece(i) for i in ids), *added], [*types, *[kind] * len(added)],
        ("add_tokenizer_model", "llama"), ("add_eos_token_id", eos), ("add_unk_token_id", 0),
        ("add_token_scores", [*(model.get_score(i) for i in ids), *[-1e3] * len(added)]), *extra)


def bytes_gguf(
    path: Path, special: list[str], *added: str | tuple, arch: str = "llama"
) -> Path:
    """added: tokens, and methods of a GGUFWriter with their arguments."""
    added, extra = ([each for each in added if isinstance(each, kind)] for kind in (str, tuple))
    _, tokens, merges = byte_level_tokenizer(special)
    types = [3] * len(special) + [1] * (len(tokens) - len(special)) + [4] * len(added)
    return write_gguf(
        path, [*tokens, *added], types, ("add_tokenizer_model", "gpt2"), ("add_eos_token_id", 0),
        ("add_tokenizer_pre", "gpt-2"), ("add_token_merges", [" ".join(pair) for pair in merges]),
        *extra, arch=arch)


def test_phi3s_tokens_take_in_the_line_break_whatever_the_file_is_called(
    tmp_path: Path, pieces: Path
) -> None:
    """As in a folder that says so, and as it is saved."""
    names = ["<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>"]
    added = {i: flags(name, True, rstrip=i > 400) for i, name in enumerate(names, start=400)}
    model_folder(tmp_path, pieces, added_tokens_decoder=added, chat_template=PHI, legacy=True)
    path = pieces_gguf(tmp_path / "any.gguf", pieces, names, 3, ("add_chat_template", PHI))
    want = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(TALK, return_dict=False)
    assert load_tokenizer(path).chat(TALK) == want
    (tmp_path / "saved").mkdir()
    save_tokenizer(path, tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat(TALK) == want


def test_phi3s_end_of_llama_is_a_text_that_takes_in_blanks(tmp_path: Path, pieces: Path) -> None:
    """As in its folder, where it is no special token, but rstrip."""
    names = ["<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>"]
    added = {i: flags(name, True, rstrip=i > 400) for i, name in enumerate(names, start=400)}
    end = {2: flags("</s>", False, rstrip=True)}
    model_folder(tmp_path, pieces, added_tokens_decoder=added | end, legacy=True,
                 eos_token="<|endoftext|>")
    path = pieces_gguf(tmp_path / "any.gguf", pieces, names, 3, eos=400)
    reference, tokenizer = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(path)
    for text in ("a</s>b", "a </s>  b</s>", "a</s> "):
        want = reference.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == want
        assert load_tokenizer(tmp_path).encode(text, bos=False) == want
    (tmp_path / "saved").mkdir()
    save_tokenizer(path, tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode(text) == want


def test_the_end_of_a_line_through_text_ends_no_text(tmp_path: Path, pieces: Path) -> None:
    """Gemma's vocabulary has </s> of HTML as text, Llama's as the end."""
    path = pieces_gguf(tmp_path / "m.gguf", pieces, ["</s", "<s >"], 4)
    assert load_tokenizer(path).eos_ids == {2}
    tokens = ["<eos>", "</s>", "a", "b", "ab"]
    path = write_gguf(tmp_path / "n.gguf", tokens, [3, 4, 1, 1, 1], ("add_eos_token_id", 0),
                      ("add_tokenizer_model", "gpt2"), ("add_tokenizer_pre", "gpt-2"),
                      ("add_token_merges", ["a b"]))
    tokenizer = load_tokenizer(path)
    assert tokenizer.eos_ids == {0} and tokenizer.encode("ab</s>") == [4, 1]


def test_what_stands_between_files_ends_a_text_of_a_model_of_code(tmp_path: Path) -> None:
    special = ["<|endoftext|>", END, "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_mid|>"]
    assert load_tokenizer(bytes_gguf(tmp_path / "m.gguf", special)).eos_ids == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("text", ["a B\u00e1c <na\u00efve> b", "B\u00e1cB\u00e1c", "\u00e1 \u4f60"])
def test_an_added_token_may_have_letters_that_stand_for_bytes(tmp_path: Path, text: str) -> None:
    tokenizer = load_tokenizer(bytes_gguf(
        tmp_path / "m.gguf", ["<s>"], "B\u00e1c", "<na\u00efve>"))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = TextStream(tokenizer)
    assert "".join(stream.push([i]) for i in ids) == text


# --- streams ---

@pytest.mark.parametrize("stop, want", [
    ((END,), "a b"), (("b" + END + " c",), "a "), ((" c",), "a b"), (("zz", START), "a b c"),
    ((END + START,), "a b c"), (("<|im_end",), "a b c"),
])
def test_a_stop_string_may_name_a_control_token(
    tmp_path: Path, stop: tuple[str, ...], want: str
) -> None:
    tokenizer = load_tokenizer(json_folder(tmp_path, ["<s>", START, END], eos_token="<s>"))
    ids = [*tokenizer.encode("a b"), 2, *tokenizer.encode(" c")]
    for n in range(1, len(ids) + 1):
        stream = TextStream(tokenizer, (), stop)
        shown = "".join(stream.push(ids[i:i + n]) for i in range(0, len(ids), n))
        assert shown + stream.push([], final=True) == want
        assert stream.stopped == (want != "a b c")
    assert any(map(tokenizer.ends((END,), []), ([i] for i in ids)))


HARMONY = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"]


@pytest.fixture(scope="module")
def harmony(tmp_path_factory: pytest.TempPathFactory, llama_cpp_files: Path) -> ChatTokenizer:
    """A tokenizer with gpt-oss's special tokens and its template."""
    template = llama_cpp_files / "templates" / "openai-gpt-oss-120b.jinja"
    return load_tokenizer(json_folder(
        tmp_path_factory.mktemp("harmony"), HARMONY, eos_token="<|return|>",
        chat_template=template.read_text(encoding="utf-8")))


def ids_of(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """Special tokens are special."""
    ids = []
    for piece in re.split(r"(<\|\w+\|>)", text):
        special = tokenizer.special.get(piece)
        ids += tokenizer.encode(piece) if special is None else [special]
    return ids


@pytest.mark.parametrize("said, want", [
    ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>42",
     "42"),
    ("<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>", ""),
    ("<|channel|>final <|constrain|>json<|message|>{\"x\": 1}<|return|>", '{"x": 1}'),
    ("<|channel|>final<|message|>a<|end|><|start|>assistant<|message|> b", "a b"),
    ("<|channel|>analysis<|message|>cut", ""),
])
def test_only_the_final_channel_is_shown(harmony: ChatTokenizer, said: str, want: str) -> None:
    """However the ids are cut, behind a prompt or not."""
    ids = ids_of(harmony, said)
    random = Random(0)
    for context in ([], harmony.chat(TALK), ids_of(harmony, "<|start|>assistant")):
        stream = TextStream(harmony, context, ["zz"])
        shown, rest = "", ids
        while rest:
            n = random.randint(1, 5)
            shown += stream.push(rest[:n])
            rest = rest[n:]
        assert shown + stream.push([], final=True) == want


def test_a_plain_run_prints_the_final_channel_alone(
    harmony: ChatTokenizer, capsys: pytest.CaptureFixture
) -> None:
    printer = harmony.printer(harmony, [])
    said = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>42"
    for i in ids_of(harmony, said):
        printer(0, [i])
    printer(0, [], final=True)
    assert capsys.readouterr().out == "42"
    assert len(printer.times) == len(ids_of(harmony, said)) + 1


def test_a_text_without_channels_is_shown(harmony: ChatTokenizer) -> None:
    assert TextStream(harmony, harmony.encode("Once")).push(harmony.encode(" upon")) == " upon"


def test_the_conversation_has_the_final_channel_alone(
    harmony: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which the template writes back; no thought, and no name of a channel."""
    settings = {"stop": [], "seed": None, "max_new_tokens": 99}
    chat = Chat(SimpleNamespace(context=10_000), harmony, settings)

    def reply(ids: list[int], cached: int, show: Callable[[int, list[int]], None]) -> str:
        for i in ids_of(harmony, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
                                 "<|channel|>final<|message|>42<|return|>"):
            show(0, [i])
        return "eos"

    monkeypatch.setattr(chat, "reply", reply)
    chat.take("What?")
    assert capsys.readouterr().out == "42\n"
    assert chat.messages[1] == {"role": "assistant", "content": "42"}
    again = harmony.chat([*chat.messages, {"role": "user", "content": "And?"}])
    want = ids_of(harmony, "<|start|>assistant<|channel|>final<|message|>42<|end|>")
    assert any(again[i:i + len(want)] == want for i in range(len(again)))
