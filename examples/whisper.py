"""Transcribe or translate speech with any Whisper, on gpt-flash's cache and decode attention.

    pip install -r requirements.txt -r examples/requirements.txt
    python examples/whisper.py --checkpoint_path FOLDER recording.mp3

FOLDER is a Hugging Face Whisper: config.json, model.safetensors, tokenizer.json. Two names of
gpt-flash are used and no others, KVCache of model.py and flash_decode of kernels.py: the
decoder's self-attention appends to a cache that grows, its cross-attention reads one that is
filled once a window (causal=False), and on CUDA a step is one graph.

A recording is cut where it is quietest, every 20 to 30 seconds, and --batch_size parts decode
together, each row at a length of its own, which changes no text (but what a fallback draws).
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
from itertools import groupby, pairwise
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
    hann = torch.hann_window(N_FFT)
    stft = torch.stft(padded, N_FFT, HOP, window=hann, return_complex=True)
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
        mine = {name: x for name, x in self.items() if name.startswith(start)}
        return Named((name.removeprefix(start), x) for name, x in mine.items())

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self[f"{name}.weight"], self.get(f"{name}.bias"))  # keys have no bias

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"])

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
                    tensor = tensor.to(device, dtype)
                    if tensor.dim() == 2 and len(tensor) > tensor.shape[1]:
                        # by columns: for one row a CPU multiplies a tall matrix twice as fast
                        tensor = tensor.t().contiguous().t()
                    tensors[name.removeprefix("model.")] = tensor
        self.encoder, self.decoder = tensors.part("encoder."), tensors.part("decoder.")
        n_layer = self.config["encoder_layers"]
        self.encoder_layers = [self.encoder.part(f"layers.{i}.") for i in range(n_layer)]
        n_layer = self.config["decoder_layers"]
        self.decoder_layers = [self.decoder.part(f"layers.{i}.") for i in range(n_layer)]
        self.n_head = self.config["decoder_attention_heads"]
        self.max_tokens = self.config["max_target_positions"] // 2  # of a window, as in the paper
        self.head = self.decoder["embed_tokens.weight"]  # (V, C): it is the output layer too

        path = folder / "tokenizer.json"
        with trying_to(f"read {path}"):
            self.tokenizer = Tokenizer.from_file(str(path))
        self.ids = Named(self.tokenizer.get_vocab())
        self.start = self.ids["<|startoftranscript|>"]
        self.end = self.ids["<|endoftext|>"]
        self.first_stamp = self.ids["<|notimestamps|>"] + 1  # timestamps are the last tokens
        if self.first_stamp >= len(self.head):
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

    def listen(self, heard: Tensor, sound: Tensor) -> None:
        """Fill the cross-attention's cache, sound [n_layer, 2, B, H, WINDOW / 2, D]."""
        for layer, kv in zip(self.decoder_layers, sound):
            kv[0], kv[1] = layer.project("encoder_attn", "kv", heard, self.n_head)

    def decode(self, tokens: Tensor, lengths: Tensor, text: Tensor, sound: Tensor) -> Tensor:
        """tokens [B, T] behind lengths [B] int32 cached ones -> logits [B, T, V] float32.

        text, sound [n_layer, 2, B, H, S, D]: the cache that grows, the one that listen fills."""
        w = self.decoder
        frames = torch.full_like(lengths, sound.shape[4])
        positions = lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        x = self.head[tokens] + w["embed_positions.weight"][positions]  # (B, T, C)
        for layer, grows, full in zip(self.decoder_layers, text, sound):
            x = layer.attend("self_attn", "qkv", x, self.n_head,
                             lambda q, k, v: flash_decode(q, *grows, lengths, k, v))
            x = layer.attend("encoder_attn", "q", x, self.n_head,
                             lambda q: flash_decode(q, *full, frames, causal=False))
            x = layer.feed_forward(x)
        return F.linear(w.norm("layer_norm", x), self.head).float()

# --- decoding ---


class Rows:
    """Windows that decode together, one a row: two caches, and what the next step needs.

    All of it lies on the device, and a step asks nothing of the host; on CUDA it is a graph."""

    def __init__(self, model: Whisper, batch_size: int, stamps: bool, room: int | None = None):
        self.model = model
        self.stamps = stamps
        config, device = model.config, model.head.device
        head_dim = config["d_model"] // model.n_head
        shape = len(model.decoder_layers), model.n_head, head_dim, batch_size
        kind = dict(dtype=model.head.dtype, device=device)
        self.text = KVCache(*shape, room or config["max_target_positions"], **kind).kv
        self.sound = KVCache(*shape, config["max_source_positions"], **kind).kv
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        # each row's last token, the one before it, its last timestamp
        state = torch.zeros(3, batch_size, dtype=torch.int64, device=device)
        self.token, self.previous, self.stamp = state
        self.score = torch.zeros(batch_size, device=device)  # the log-probability of all its tokens
        self.noise = torch.zeros(batch_size, len(model.head), device=device)
        self.temperatures = [0.0] * batch_size

        # tokens that are never drawn, or not as the first one
        self.tokens = torch.arange(len(model.head), device=device)
        self.is_stamp = self.tokens >= model.first_stamp
        self.never = (self.tokens > model.end) & ~self.is_stamp
        self.never[config.get("suppress_tokens") or []] = True
        self.not_first = ~self.is_stamp | (self.tokens >= model.first_stamp + FIRST_STAMPS)
        if not stamps:
            self.never |= self.is_stamp
            self.not_first = torch.zeros_like(self.never)
            self.not_first[config.get("begin_suppress_tokens") or []] = True
        self.launch = self.capture().replay if device.type == "cuda" else self.advance

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
        heard = self.model.encode(mel.to(self.model.head))
        self.model.listen(heard, self.sound[:, :, row:row + 1])

    def prompt(self, row: int, ids: list[int], temperature: float) -> Tensor:
        """Begin a row with 1 to 16 tokens and draw the next -> their probabilities [T, V]."""
        self.temperatures[row] = temperature
        self.noise[row] = 0
        self.shake()
        for state in (self.lengths, self.token, self.stamp, self.score):
            state[row] = 0
        tokens = self.token.new_tensor([ids])
        logits = self.feed(slice(row, row + 1), tokens, self.never | self.not_first)
        self.previous[row] = self.model.first_stamp  # the first timestamp is as the end of a pair
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
        self.feed(slice(None), self.token[:, None], self.never)

    def feed(self, rows: slice, tokens: Tensor, never: Tensor) -> Tensor:
        """Give rows tokens [B, T] and draw what comes next -> logits [B, T, V]."""
        text, sound = self.text[:, :, rows], self.sound[:, :, rows]
        logits = self.model.decode(tokens, self.lengths[rows], text, sound)
        self.lengths[rows] += tokens.shape[1]
        self.lengths.clamp_(max=self.model.max_tokens * 2 - 1)  # a row that is done runs on
        logprobs = self.obey(logits[:, -1], rows, never)
        drawn = (logprobs + self.noise[rows]).argmax(-1)  # (B)
        self.score[rows] += logprobs.gather(1, drawn[:, None])[:, 0]
        self.previous[rows] = self.token[rows]
        self.token[rows] = drawn
        self.stamp[rows] = drawn.where(self.is_stamp[drawn], self.stamp[rows])
        return logits

    def obey(self, logits: Tensor, rows: slice, never: Tensor) -> Tensor:
        """Logits [B, V] -> log-probabilities under Whisper's rules, -inf for what they forbid."""
        if not self.stamps:
            return logits.masked_fill(never, -math.inf).log_softmax(-1)
        after_stamp = self.is_stamp[self.token[rows]]  # (B)
        pair = after_stamp & self.is_stamp[self.previous[rows]]  # text follows
        alone = (after_stamp & ~pair)[:, None]  # its partner follows, or the end
        early = self.tokens < self.stamp[rows, None] + ~alone  # (B, V)
        forbidden = never | (self.is_stamp & (early | pair[:, None]))
        forbidden |= alone & (self.tokens < self.model.end)
        logprobs = logits.masked_fill(forbidden, -math.inf).log_softmax(-1)

        # a timestamp comes where all of them together are likelier than any text
        stamps = logprobs[:, self.model.first_stamp:].logsumexp(-1, keepdim=True)
        text = logprobs[:, :self.model.first_stamp].amax(-1, keepdim=True)
        return logprobs.masked_fill((stamps > text) & ~self.is_stamp, -math.inf).log_softmax(-1)


@dataclass
class Window:
    """What a row works on: frames of the recording, the tokens so far, attempts that failed."""

    start: int
    end: int
    no_speech: float = 0.0
    tokens: list[int] = field(default_factory=list)
    attempts: list[tuple[float, list[int]]] = field(default_factory=list)


class Segment(NamedTuple):
    start: float  # seconds
    end: float
    text: str


def transcribe(rows: Rows, samples: Tensor, prompt: list[int]) -> Iterator[Segment]:
    """Samples [n] -> what is said, in order, each segment once nothing before it may change."""
    model = rows.model
    waiting = deque()
    for start, end in pairwise(quiet_cuts(samples)):
        if samples[start * HOP:end * HOP].abs().max() > SILENCE:
            waiting.append(Window(start, end))
    running: dict[int, Window] = {}
    ready: list[Segment] = []
    while waiting or running:
        # free rows hear what waits; what is new, or to be said anew, is prompted
        for row in range(len(rows.token)):
            if row not in running and waiting:
                window = running[row] = waiting.popleft()
                rows.hear(row, samples[window.start * HOP:window.end * HOP])
            window = running.get(row)
            if window and not window.tokens:
                probs = rows.prompt(row, prompt, 0.2 * len(window.attempts))
                window.no_speech = probs[0, model.first_stamp - 2].item()

        # read what was drawn; a row that has ended is accepted, or begins again
        drawn = rows.token.tolist()
        for row, window in list(running.items()):
            window.tokens.append(drawn[row])
            if drawn[row] == model.end or len(window.tokens) == model.max_tokens:
                segments, settled = accept(window, model, rows.score[row].item())
                ready += segments
                if settled > window.start:
                    del running[row]
                if window.start < settled < window.end:
                    waiting.appendleft(Window(settled, window.end))
        rows.step()

        ready.sort()
        undecided = [window.start / 100 for window in (*waiting, *running.values())]
        while ready and ready[0].start < min(undecided, default=math.inf):
            yield ready.pop(0)


def accept(window: Window, model: Whisper, score: float) -> tuple[list[Segment], int]:
    """A window's segments, and the frame up to which they settle it: its own beginning if it is
    to be decoded again, more freely, because its tokens repeat themselves or are unlikely."""
    tokens = window.tokens
    score = score / len(tokens)
    if window.no_speech > 0.6 and score < -1:
        return [], window.end
    text = model.text(tokens).encode()
    if score < -1 or len(text) > 2.4 * len(zlib.compress(text)):
        window.attempts.append((score, tokens))
        if len(window.attempts) < 6:
            window.tokens = []
            return [], window.start
        _, tokens = max(window.attempts)

    # timestamps and texts take turns; a pair of timestamps is an end and a beginning
    said = [token for token in tokens if token != model.end]
    turns = groupby([model.first_stamp, *said], key=lambda token: token >= model.first_stamp)
    groups = [list(group) for _, group in turns]
    segments = []
    for before, said, after in zip(groups[::2], groups[1::2], [*groups[2::2], []]):
        start = window.start + 2 * (before[-1] - model.first_stamp)
        end = window.end
        if after:
            end = min(end, window.start + 2 * (after[0] - model.first_stamp))
        segments.append(Segment(start / 100, end / 100, model.text(said)))

    # a segment that has no end, or is yet to come, is heard again behind the last that has one
    n_ended = len(groups[2::2])
    if n_ended and (len(segments) > n_ended or len(groups[-1]) > 1):
        return segments[:n_ended], round(segments[n_ended - 1].end * 100)
    return segments, window.end


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


LAYOUTS = {
    "text": "{text}",
    "timestamps": "[{start} --> {end}] {text}\n",
    "srt": "{number}\n{start} --> {end}\n{text}\n\n",
    "vtt": "{start} --> {end}\n{text}\n\n",
}


def show(segments: Iterator[Segment], layout: str) -> None:
    """Print segments as they come."""
    if layout == "vtt":
        print("WEBVTT\n")
    for number, (start, end, text) in enumerate(segments, start=1):
        if layout != "text" or number == 1:
            text = text.strip().replace("-->", "->")
        times = dict(start=clock(start, layout), end=clock(end, layout))
        print(LAYOUTS[layout].format(number=number, text=text, **times), end="", flush=True)
    if layout == "text":
        print()


def clock(seconds: float, layout: str) -> str:
    minutes, milliseconds = divmod(round(1000 * seconds), 60000)
    text = f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds / 1000:06.3f}"
    return text.replace(".", ",") if layout == "srt" else text


def run(args: argparse.Namespace) -> None:
    samples = read_audio(args.audio)
    with trying_to(f"use --device {args.device}"):
        device = torch.empty(0, device=args.device).device
    dtype = torch.float32
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose streams and graphs are meant
        dtype = torch.float16
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
    add("--batch_size", metavar="N", type=int, default=1, choices=range(1, 257),
        help="parts of the recording that decode at once, 1 to 256; default: 1")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where there is one")
    for layout in ("timestamps", "json", "srt", "vtt"):
        add(f"--{layout}", dest="layout", action="store_const", const=layout, default="text",
            help=f"print {layout} in place of bare text")
    args = parser.parse_args(argv)
    try:
        torch.manual_seed(0)  # what a fallback draws is the same in every run
        with torch.inference_mode():
            run(args)
    except ValueError as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
