"""Transcribe or translate speech with any Whisper, on gpt-flash's cache and decode attention.

    pip install -r requirements.txt -r examples/requirements.txt
    python examples/whisper.py --checkpoint_path FOLDER recording.mp3

FOLDER is a Hugging Face Whisper: config.json, model.safetensors, tokenizer.json. Two names of
gpt-flash are used and no others, KVCache of model.py and flash_decode of kernels.py: the
decoder's self-attention appends to a cache that grows, its cross-attention reads one that is
filled once a window (causal=False), and on CUDA a step is one graph.

A recording is cut where it is quietest, every 20 to 30 seconds, and --batch_size parts decode
together, each row at a length of its own, which changes no text (but what a fallback draws). Bare
text is printed a line a part.
With timestamps, a segment that a part leaves unfinished is heard again in a window of its own.
Rules and fallback are those of arXiv 2212.04356, section 4.5, without beams, and without the
text before a window, which rows of a batch cannot know."""
from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, NoReturn

import soundfile
import soxr
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels import flash_decode
from model import KVCache

RATE = 16000  # samples a second
HOP = 160  # samples from a frame of the spectrogram to the next: 100 frames a second
N_FFT = 400  # samples that a frame sees
WINDOW = 3000  # frames that the encoder hears at once
FIRST_STAMPS = 51  # a window's first timestamp is at most 1 second into it; they are 0.02 apart
SILENCE = 1e-4  # the loudest sample of what is not worth hearing


@contextmanager
def trying_to(do: str) -> Iterator[None]:
    """Whatever a library raises meanwhile becomes a ValueError of one line."""
    try:
        yield
    except Exception as e:
        reason = " ".join(str(e).split())
        raise ValueError(f"cannot {do}: {reason[:300]}") from None

# --- sound ---


def read_audio(path: str) -> Tensor:
    """A WAV, FLAC, MP3 or Ogg file of any rate -> its mono mix at 16 kHz, float32 [n]."""
    with trying_to(f"read {path}"):
        channels, rate = soundfile.read(path, dtype="float32", always_2d=True)
        samples = torch.from_numpy(soxr.resample(channels.mean(1), rate, RATE))
    if len(samples) < HOP:
        raise ValueError(f"{path} is empty: it holds {len(samples)} samples at {RATE} Hz")
    peak = samples.abs().max().item()
    if not SILENCE < peak < math.inf:
        raise ValueError(f"{path} is silent or damaged: its loudest sample is {peak:.1g} of 1")
    return samples


def quiet_cuts(samples: Tensor) -> list[int]:
    """Frames that cut samples into parts of 20 to 30 seconds, from 0 to the last frame: in the
    middle of the 0.3 seconds whose loudest sample is quietest."""
    n_frames = len(samples) // HOP
    cuts = [0]
    while n_frames - cuts[-1] > WINDOW:
        earliest = cuts[-1] + WINDOW * 2 // 3
        late = samples[earliest * HOP:(cuts[-1] + WINDOW) * HOP]
        peaks = late.abs().unfold(0, 30 * HOP, HOP).amax(1)
        cuts.append(earliest + 15 + int(peaks.argmin()))
    return [*cuts, n_frames]


def mel_filters(n_mels: int) -> Tensor:
    """Triangles of equal area over an FFT's frequencies, [n_mels, N_FFT/2 + 1], evenly spaced on
    Slaney's mel scale: linear up to 1 kHz, logarithmic above."""
    mels = torch.linspace(0, 15 + 27 * math.log(8, 6.4), n_mels + 2, dtype=torch.float64)
    corners = torch.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))  # Hz
    low, centre, high = corners.unfold(0, 3, 1)[..., None].unbind(1)  # (n_mels, 1) each
    hertz = torch.linspace(0, RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)
    rise = (hertz - low) / (centre - low)
    fall = (high - hertz) / (high - centre)
    return (rise.minimum(fall).clamp_min(0) * 2 / (high - low)).float()


def log_mel(samples: Tensor, n_mels: int) -> Tensor:
    """Up to 30 seconds of samples [n], silence behind them -> spectrogram [1, n_mels, WINDOW]."""
    padded = F.pad(samples, (0, WINDOW * HOP - len(samples)))
    stft = torch.stft(padded, N_FFT, HOP, window=torch.hann_window(N_FFT), return_complex=True)
    energies = mel_filters(n_mels) @ stft[:, :-1].abs().square()  # (n_mels, WINDOW)
    mel = energies.clamp_min(1e-10).log10()
    return ((mel.clamp_min(mel.max() - 8) + 4) / 4)[None]

# --- the model ---


class Named(dict):
    """Settings, tokens or tensors by their names in the folder; tensors are what layers are."""

    def __missing__(self, name: str) -> NoReturn:
        raise ValueError(f"this is not a whole Whisper folder: it has no {name!r}")

    def part(self, start: str) -> Named:
        """What has names that begin so, by the rest of its names."""
        mine = [name for name in self if name.startswith(start)]
        return Named({name.removeprefix(start): self[name] for name in mine})

    def layers(self, n: int) -> list[Named]:
        return [self.part(f"layers.{i}.") for i in range(n)]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"])

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x [B, T, K] -> [B, T, N]. On a CPU one product with a few rows keeps one core busy, a
        batch of products all of them: there N is cut into as many blocks as there are cores."""
        weight = self[f"{name}.weight"]
        bias = self.get(f"{name}.bias")  # keys have none
        n = torch.get_num_threads()
        if x.is_cuda or x.shape[1] > 16 or len(weight) % n:
            return F.linear(x, weight, bias)
        blocks = weight.unflatten(0, (n, -1)).transpose(1, 2)  # (n, K, N / n)
        y = x.flatten(0, 1) @ blocks  # (n, B * T, N / n)
        y = y.transpose(0, 1).flatten(1).unflatten(0, x.shape[:2])
        return y if bias is None else y + bias

    def project(self, name: str, kinds: str, x: Tensor, n_head: int) -> list[Tensor]:
        """x [B, T, C] -> an attention's queries, keys, values, as kinds says, [B, H, T, D] each."""
        projected = [self.linear(f"{name}.{kind}_proj", x) for kind in kinds]
        return [y.unflatten(-1, (n_head, -1)).transpose(1, 2) for y in projected]

    def attend(
        self, name: str, kinds: str, x: Tensor, n_head: int, attention: Callable[..., Tensor]
    ) -> Tensor:
        """x [B, T, C] plus an attention of its projections."""
        projected = self.project(name, kinds, self.norm(f"{name}_layer_norm", x), n_head)
        y = attention(*projected).transpose(1, 2).flatten(2)  # (B, T, C)
        return x + self.linear(f"{name}.out_proj", y)

    def feed_forward(self, x: Tensor) -> Tensor:
        y = self.linear("fc1", self.norm("final_layer_norm", x))
        return x + self.linear("fc2", F.gelu(y))


class Whisper:
    """A folder's tokens, and its encoder and decoder as functions of its tensors."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        self.config = Named()
        for path in (folder / "config.json", *folder.glob("generation_config.json")):
            with trying_to(f"read {path}"):
                self.config |= json.loads(path.read_text(encoding="utf-8"))
        if self.config.get("model_type") != "whisper":
            raise ValueError(f"{folder} is not a Whisper: {self.config.get('model_type')!r}")
        tensors = Named()
        for path in sorted(folder.glob("model*.safetensors")):
            with trying_to(f"read {path}"):
                for name, tensor in load_file(path).items():
                    tensors[name.removeprefix("model.")] = tensor.to(device, dtype)
        self.encoder = tensors.part("encoder.")
        self.decoder = tensors.part("decoder.")
        # the output layer is the table of tokens, here up to whole blocks of it; a CPU multiplies
        # a tall matrix twice as fast by columns
        table = self.decoder["embed_tokens.weight"]  # (V, C)
        table = F.pad(table, (0, 0, 0, -len(table) % torch.get_num_threads()))
        self.decoder["proj_out.weight"] = table.t().contiguous().t()
        self.encoder_layers = self.encoder.layers(self.config["encoder_layers"])
        self.decoder_layers = self.decoder.layers(self.config["decoder_layers"])
        self.n_head = self.config["decoder_attention_heads"]
        self.max_tokens = self.config["max_target_positions"] // 2  # of a window, as in the paper

        path = folder / "tokenizer.json"
        with trying_to(f"read {path}"):
            self.tokenizer = Tokenizer.from_file(str(path))
        self.ids = Named(self.tokenizer.get_vocab())
        self.start = self.ids["<|startoftranscript|>"]
        self.end = self.ids["<|endoftext|>"]
        self.first_stamp = self.ids["<|notimestamps|>"] + 1  # timestamps are the last tokens
        if self.first_stamp >= self.config["vocab_size"]:
            raise ValueError(f"{folder} has a tokenizer of another model")
        self.languages = {}  # codes -> tokens; empty in a model that knows only English
        if self.config.get("is_multilingual", self.config["vocab_size"] > 51864):
            for token in range(self.start + 1, self.ids["<|translate|>"]):
                self.languages[self.tokenizer.id_to_token(token).strip("<|>")] = token

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode([token for token in tokens if token < self.end])

    def encode(self, mel: Tensor) -> Tensor:
        """mel [B, n_mels, WINDOW] -> what was heard [B, WINDOW / 2, C]."""
        w = self.encoder
        n_head = self.config["encoder_attention_heads"]
        x = F.gelu(F.conv1d(mel, w["conv1.weight"], w["conv1.bias"], padding=1))
        x = F.gelu(F.conv1d(x, w["conv2.weight"], w["conv2.bias"], stride=2, padding=1))
        x = x.transpose(1, 2) + w["embed_positions.weight"]
        for layer in self.encoder_layers:
            x = layer.attend("self_attn", "qkv", x, n_head, F.scaled_dot_product_attention)
            x = layer.feed_forward(x)
        return w.norm("layer_norm", x)

    def listen(self, heard: Tensor, sound: list[Tensor]) -> None:
        """Fill the cross-attention's cache, sound [2, B, H, WINDOW / 2, D] of each layer."""
        for layer, kv in zip(self.decoder_layers, sound):
            kv[0], kv[1] = layer.project("encoder_attn", "kv", heard, self.n_head)

    def decode(
        self, tokens: Tensor, lengths: Tensor, text: list[Tensor], sound: list[Tensor]
    ) -> Tensor:
        """tokens [B, T] behind lengths [B] int32 cached ones -> logits [B, T, V] float32.

        text, sound [2, B, H, S, D] of each layer: the cache that grows, the one that listen
        fills."""
        w = self.decoder
        frames = torch.full_like(lengths, sound[0].shape[3])
        positions = lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        x = w["embed_tokens.weight"][tokens] + w["embed_positions.weight"][positions]  # (B, T, C)
        for layer, grows, full in zip(self.decoder_layers, text, sound):
            x = layer.attend("self_attn", "qkv", x, self.n_head,
                             lambda q, k, v: flash_decode(q, *grows, lengths, k, v))
            x = layer.attend("encoder_attn", "q", x, self.n_head,
                             lambda q: flash_decode(q, *full, frames, causal=False))
            x = layer.feed_forward(x)
        logits = w.linear("proj_out", w.norm("layer_norm", x))
        return logits[..., :self.config["vocab_size"]].float()

# --- decoding ---


# what a row said last: nothing, text, a timestamp behind text, one that text must follow
NOTHING, TEXT, CLOSED, OPEN = range(4)


class Rows:
    """Windows that decode together, one a row: two caches, and what the next step needs.

    All of it lies on the device, and a step asks nothing of the host; on CUDA it is a graph."""

    def __init__(self, model: Whisper, batch_size: int, stamps: bool, room: int | None = None):
        self.model = model
        self.batch_size = batch_size
        self.stamps = stamps
        config = model.config
        head_dim = config["d_model"] // model.n_head
        shape = config["decoder_layers"], model.n_head, head_dim, batch_size
        table = model.decoder["embed_tokens.weight"]
        kind = dict(dtype=table.dtype, device=table.device)
        text = KVCache(*shape, room or config["max_target_positions"], **kind)
        sound = KVCache(*shape, config["max_source_positions"], **kind)
        self.text = [layer.kv for layer in text.whole]  # (2, B, H, S, D) each
        self.sound = [layer.kv for layer in sound.whole]
        with torch.device(kind["device"]):
            self.lengths = torch.zeros(batch_size, dtype=torch.int32)
            # each row's last token, what it was, the earliest timestamp that may come
            self.token, self.said, self.earliest = torch.zeros(3, batch_size, dtype=torch.int64)
            self.score = torch.zeros(batch_size)  # the log-probability of all its tokens
            self.noise = torch.zeros(batch_size, config["vocab_size"])
            self.rules = self.make_rules()
        self.temperatures = [0.0] * batch_size
        self.launch = self.capture().replay if self.noise.is_cuda else self.advance

    def make_rules(self) -> Tensor:
        """Tokens that must not follow each of NOTHING, TEXT, CLOSED, OPEN: bool [4, V]."""
        self.tokens = torch.arange(self.model.config["vocab_size"])
        self.is_stamp = self.tokens >= self.model.first_stamp
        never = (self.tokens > self.model.end) & ~self.is_stamp
        never[self.model.config.get("suppress_tokens") or []] = True
        rules = never.repeat(4, 1)
        if self.stamps:
            rules[NOTHING] |= ~self.is_stamp
            rules[NOTHING, self.model.first_stamp + FIRST_STAMPS:] = True
            rules[CLOSED, :self.model.end] = True
            rules[OPEN] |= self.is_stamp
        else:
            rules |= self.is_stamp
            rules[NOTHING, self.model.config.get("begin_suppress_tokens") or []] = True
        return rules

    def capture(self) -> torch.cuda.CUDAGraph:
        """A step as a CUDA graph, after two on a side stream that compile and allocate."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.advance()
            self.advance()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.advance()
        return graph

    def hear(self, row: int, samples: Tensor) -> None:
        """Fill a row's sound with a window of samples [n]."""
        mel = log_mel(samples, self.model.config["num_mel_bins"])
        heard = self.model.encode(mel.to(self.sound[0]))
        self.model.listen(heard, [kv[:, row:row + 1] for kv in self.sound])

    def prompt(self, row: int, ids: list[int], temperature: float) -> Tensor:
        """Begin a row with 1 to 16 tokens and draw the next -> their probabilities [T, V]."""
        self.temperatures[row] = temperature
        self.noise[row] = 0
        self.shake()
        for state in (self.lengths, self.said, self.earliest, self.score):
            state[row] = 0
        logits = self.feed(slice(row, row + 1), self.token.new_tensor([ids]))
        return logits[0].softmax(-1)

    def step(self) -> None:
        self.shake()
        self.launch()

    def shake(self) -> None:
        """The largest of log-probability + temperature * Gumbel noise is a fair draw."""
        for row, temperature in enumerate(self.temperatures):
            if temperature > 0:
                self.noise[row].exponential_().clamp_min_(1e-9).log_().mul_(-temperature)

    def advance(self) -> None:
        self.feed(slice(None), self.token[:, None])

    def feed(self, rows: slice, tokens: Tensor) -> Tensor:
        """Give rows tokens [B, T] and draw what comes next -> logits [B, T, V]."""
        text = [kv[:, rows] for kv in self.text]
        sound = [kv[:, rows] for kv in self.sound]
        logits = self.model.decode(tokens, self.lengths[rows], text, sound)
        self.lengths[rows] += tokens.shape[1]
        self.lengths.clamp_(max=self.model.config["max_target_positions"] - 1)  # of idle rows
        logprobs = self.obey(logits[:, -1], rows)
        drawn = (logprobs + self.noise[rows]).argmax(-1)  # (B)
        self.score[rows] += logprobs.gather(1, drawn[:, None])[:, 0]
        self.note(drawn, rows)
        return logits

    def note(self, drawn: Tensor, rows: slice) -> None:
        """drawn [B] is what rows say now."""
        is_stamp = drawn >= self.model.first_stamp
        closes = self.said[rows] == TEXT
        earliest = drawn.where(closes, drawn + 1)  # a segment may begin where another ends
        self.earliest[rows] = earliest.where(is_stamp, self.earliest[rows])
        said = torch.full_like(drawn, OPEN).masked_fill(closes, CLOSED)
        self.said[rows] = said.masked_fill(~is_stamp, TEXT)
        self.token[rows] = drawn

    def obey(self, logits: Tensor, rows: slice) -> Tensor:
        """Logits [B, V] -> log-probabilities under Whisper's rules, -inf for what they forbid."""
        logits = logits.masked_fill(self.rules[self.said[rows]], -math.inf)
        if self.stamps:
            early = self.is_stamp & (self.tokens < self.earliest[rows, None])  # (B, V)
            logits = logits.masked_fill(early, -math.inf)
            # a timestamp comes where all of them together are likelier than any text
            stamps = logits[:, self.model.first_stamp:].logsumexp(-1, keepdim=True)
            text = logits[:, :self.model.first_stamp].amax(-1, keepdim=True)
            logits = logits.masked_fill((stamps > text) & ~self.is_stamp, -math.inf)
        return logits.log_softmax(-1)

# --- a recording ---


class Segment(NamedTuple):
    start: float  # seconds
    end: float
    text: str


@dataclass
class Window:
    """Frames of the recording that are still to be said, and how a row fares with them."""

    start: int
    end: int
    heard: int | None = None  # the frame from which on a row has heard it
    no_speech: float = 0.0
    tokens: list[int] = field(default_factory=list)
    attempts: list[tuple[float, list[int]]] = field(default_factory=list)  # that failed
    segments: list[Segment] = field(default_factory=list)


def transcribe(rows: Rows, samples: Tensor, prompt: list[int]) -> Iterator[Segment]:
    """Samples [n] -> what is said, in order, each segment once nothing before it may change."""
    model = rows.model
    windows = []
    for start, end in pairwise(quiet_cuts(samples)):
        if samples[start * HOP:end * HOP].abs().max() > SILENCE:
            windows.append(Window(start, end))
    waiting = deque(windows)
    running: dict[int, Window] = {}  # by row
    for shown in windows:
        while shown.start < shown.end:
            # a free row takes what waits
            for row in range(rows.batch_size):
                if waiting and row not in running:
                    running[row] = waiting.popleft()

            # what is new, or to be said anew, is heard and prompted
            for row, window in running.items():
                if window.tokens:
                    continue
                if window.heard != window.start:
                    rows.hear(row, samples[window.start * HOP:window.end * HOP])
                    window.heard = window.start
                probs = rows.prompt(row, prompt, 0.2 * len(window.attempts))
                window.no_speech = probs[0, model.first_stamp - 2].item()

            # read what was drawn, and draw the next
            drawn = rows.token.tolist()
            for row, window in list(running.items()):
                window.tokens.append(drawn[row])
                if drawn[row] == model.end or len(window.tokens) == model.max_tokens:
                    settle(window, model, rows.score[row].item())
                if window.start == window.end:
                    del running[row]
            rows.step()
        yield from shown.segments


def settle(window: Window, model: Whisper, score: float) -> None:
    """Turn a window's tokens into segments, and move its start behind them; or drop them, to be
    decoded again, more freely, because they repeat themselves or are unlikely."""
    tokens = window.tokens
    window.tokens = []
    score = score / len(tokens)
    if window.no_speech > 0.6 and score < -1:
        window.start = window.end
        return
    text = model.text(tokens).encode()
    if score < -1 or len(text) > 2.4 * len(zlib.compress(text)):
        window.attempts.append((score, tokens))
        if len(window.attempts) < 6:
            return
        _, tokens = max(window.attempts)
    window.attempts = []

    # a timestamp behind text ends a segment, another one begins the next
    said = []
    begun = False
    begin = settled = window.start
    for token in tokens:
        if token < model.end:
            said.append(token)
        if token >= model.first_stamp:
            frame = min(window.start + 2 * (token - model.first_stamp), window.end)
            begun = not said
            if said:
                window.segments.append(Segment(begin / 100, frame / 100, model.text(said)))
                settled = frame
                said = []
            begin = frame

    # a segment that has no end, or is yet to come, is heard again behind the last that has one
    if begun and settled > window.start:
        window.start = settled
        return
    if said:
        window.segments.append(Segment(begin / 100, window.end / 100, model.text(said)))
    window.start = window.end


def choose_prompt(
    rows: Rows, samples: Tensor, language: str | None, task: str
) -> tuple[str, list[int]]:
    """The language, heard in the first window if it is None, and the tokens that ask for it."""
    model = rows.model
    known = model.languages
    plain = [] if rows.stamps else [model.first_stamp - 1]  # <|notimestamps|>
    if not known:
        if language not in (None, "en") or task == "translate":
            raise ValueError("this Whisper knows English only: no other --language, no translation")
        return "en", [model.start, *plain]
    if language is None:
        rows.hear(0, samples[:WINDOW * HOP])
        probs = rows.prompt(0, [model.start], 0.0)[0]
        language = max(known, key=lambda code: probs[known[code]].item())
    if language not in known:
        raise ValueError(f"--language {language}: this Whisper knows {', '.join(known)}")
    return language, [model.start, known[language], model.ids[f"<|{task}|>"], *plain]

# --- the command line ---


def show(segments: Iterator[Segment], layout: str) -> None:
    """Print segments as they come."""
    if layout == "vtt":
        print("WEBVTT\n")
    for number, segment in enumerate(segments, start=1):
        times = f"{clock(segment.start)} --> {clock(segment.end)}"
        text = segment.text.strip().replace("-->", "->")
        if layout == "srt":
            text = f"{number}\n{times.replace('.', ',')}\n{text}\n"
        if layout == "vtt":
            text = f"{times}\n{text}\n"
        if layout == "timestamps":
            text = f"[{times}] {text}"
        print(text, flush=True)


def clock(seconds: float) -> str:
    return f"{seconds // 3600:02.0f}:{seconds // 60 % 60:02.0f}:{seconds % 60:06.3f}"


def run(args: argparse.Namespace) -> None:
    samples = read_audio(args.audio)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = Whisper(Path(args.checkpoint_path), device, dtype)
    rows = Rows(model, args.batch_size, stamps=args.layout != "text")
    language, prompt = choose_prompt(rows, samples, args.language, args.task)
    segments = transcribe(rows, samples, prompt)
    if args.layout != "json":
        return show(segments, args.layout)
    found = [segment._asdict() for segment in segments]
    text = "".join(segment["text"] for segment in found).strip()
    print(json.dumps(dict(language=language, text=text, segments=found), ensure_ascii=False))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "whisper.py", usage=argparse.SUPPRESS, description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("audio", help="a WAV, FLAC, MP3 or Ogg file of any length and rate")
    add("--checkpoint_path", metavar="FOLDER", required=True, help="a Hugging Face Whisper")
    add("--language", metavar="CODE", help="such as en or de; default: what is heard first")
    add("--task", choices=["transcribe", "translate"], default="transcribe",
        help="translate: into English; default: transcribe")
    add("--batch_size", metavar="N", type=int, default=1,
        help="parts of the recording that decode at once, 1 to 256; default: 1")
    for layout in ("timestamps", "json", "srt", "vtt"):
        add(f"--{layout}", dest="layout", action="store_const", const=layout, default="text",
            help=f"print {layout} in place of bare text")
    args = parser.parse_args(argv)
    if not 1 <= args.batch_size <= 256:
        parser.error(f"--batch_size {args.batch_size} is not from 1 to 256")
    try:
        torch.manual_seed(0)  # what a fallback draws is the same in every run
        with torch.inference_mode():
            run(args)
    except ValueError as e:
        parser.error(str(e))
    except RuntimeError as e:  # such as tensors whose shapes do not fit, or too little memory
        reason = " ".join(str(e).split())
        parser.error(f"cannot run {args.checkpoint_path}: {reason[:300]}")


if __name__ == "__main__":
    main()
