"""Milliseconds a token of examples/whisper.py and of transformers, with the same weights in turns.

    python benchmarks/whisper_decode.py --checkpoint_path FOLDER examples/jfk.flac --rounds 5

Every contestant decodes the same window of the recording, --tokens tokens behind the same prompt,
--rounds times in turns; the median of a contestant's steps counts. Ours is a whole step of
Rows: the model, Whisper's rules, the draw and the token read on the host, with a cache of 448 and
of 4,096 tokens. transformers' is a token of generate, which does as much, and a bare forward call
with an argmax, on its growing cache and on static ones of the same two sizes."""
import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutput

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE / "examples"))
import whisper

Decode = Callable[[int], list[float]]  # tokens to decode -> the seconds that each one took


def timed(step: Callable[[], object], n_tokens: int) -> list[float]:
    seconds = []
    for _ in range(n_tokens):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return seconds


def ours(model: whisper.Whisper, samples: torch.Tensor, room: int) -> Decode:
    rows = whisper.Rows(model, 1, stamps=False, room=room)
    rows.hear(0, samples)

    def step() -> list[int]:
        rows.step()
        return rows.token.tolist()

    def decode(n_tokens: int) -> list[float]:
        rows.prompt(0, [model.start, model.first_stamp - 1], 0.0)
        return timed(step, n_tokens)

    return decode


def forward_calls(
    hf: transformers.WhisperForConditionalGeneration, encoder_outputs: BaseModelOutput,
    prompt: list[int], room: int | None,
) -> Decode:
    """room: of static caches; None: caches that grow."""
    def decode(n_tokens: int) -> list[float]:
        past = EncoderDecoderCache(DynamicCache(), DynamicCache())
        if room is not None:
            frames = hf.config.max_source_positions
            past = EncoderDecoderCache(
                StaticCache(config=hf.config, max_cache_len=room),
                StaticCache(config=hf.config, max_cache_len=frames),
            )
        tokens = torch.tensor([prompt], device=hf.device)

        def step() -> list[int]:
            nonlocal tokens
            logits = hf(
                encoder_outputs=encoder_outputs, decoder_input_ids=tokens, past_key_values=past
            ).logits
            tokens = logits[:, -1:].argmax(-1)
            return tokens.tolist()

        step()
        return timed(step, n_tokens)

    return decode


class Clock(BaseStreamer):
    """Notes when generate hands out a token."""

    def __init__(self) -> None:
        self.marks = []

    def put(self, value: torch.Tensor) -> None:
        self.marks.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate_calls(
    hf: transformers.WhisperForConditionalGeneration, encoder_outputs: BaseModelOutput,
    prompt: list[int],
) -> Decode:
    def decode(n_tokens: int) -> list[float]:
        clock = Clock()
        hf.generate(
            encoder_outputs=encoder_outputs, streamer=clock, max_new_tokens=n_tokens + 1,
            min_new_tokens=n_tokens + 1, decoder_input_ids=torch.tensor([prompt]).to(hf.device),
        )
        return [ended - began for began, ended in pairwise(clock.marks[-n_tokens - 1:])]

    return decode


def measure(contestants: dict[str, Decode], n_tokens: int, rounds: int) -> dict[str, float]:
    """Milliseconds of each one's median token."""
    seconds = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, decode in contestants.items():
            seconds[name] += decode(n_tokens)
    return {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("audio", help="at least one window of speech")
    parser.add_argument("--checkpoint_path", required=True, help="a Hugging Face Whisper folder")
    parser.add_argument("--tokens", type=int, default=100, help="a round; default: 100")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with torch.inference_mode():
        model = whisper.Whisper(Path(args.checkpoint_path), device, dtype)
        samples = whisper.read_audio(args.audio)[:whisper.WINDOW * whisper.HOP]
        hf = transformers.WhisperForConditionalGeneration.from_pretrained(
            args.checkpoint_path, dtype=dtype
        ).to(device).eval()
        mel = whisper.log_mel(samples, model.config["num_mel_bins"]).to(device, dtype)
        heard = hf.model.encoder(mel)
        prompt = [model.start, model.first_stamp - 1]
        contestants = {
            "ours, cache of 448": ours(model, samples, 448),
            "ours, cache of 4096": ours(model, samples, 4096),
            "transformers, generate": generate_calls(hf, heard, prompt),
            "transformers, growing cache": forward_calls(hf, heard, prompt, None),
            "transformers, static cache of 448": forward_calls(hf, heard, prompt, 448),
            "transformers, static cache of 4096": forward_calls(hf, heard, prompt, 4096),
        }
        measure(contestants, 3, 1)  # a warm-up
        medians = measure(contestants, args.tokens, args.rounds)
    for name, milliseconds in medians.items():
        print(f"{name:36} {milliseconds:7.2f} ms a token", file=sys.stderr)
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
