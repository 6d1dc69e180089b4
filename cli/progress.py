"""Bars that show how far a long prompt is, and loading."""
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

import quantize
from cli.errors import afterthought
from cli.stats import plural
from generate import Decoder, say
from model import Transformer

LONG = 512  # tokens; shorter ones are read while rows decode, whose text a bar would cover


def with_bar(block_forward: Callable, layers: Sequence[Any]) -> Callable:
    """What runs each layer in turn over prompts, x [B, T, dim], with a bar on stderr, if that is a
    terminal, that counts the layers done of a long one. On a CPU a call returns when it is done."""
    bar = None

    def counted(block: Any, x: Any, *rest: Any) -> Any:
        nonlocal bar
        n_tokens = x.shape[0] * x.shape[1]
        if n_tokens < LONG:
            return block_forward(block, x, *rest)
        if block is layers[0]:
            bar = tqdm(
                total=len(layers), desc=f"reading {n_tokens} tokens", unit="layer", disable=None,
                leave=False, delay=0.5,
            )
        y = None
        try:
            y = block_forward(block, x, *rest)
            bar.update()
        finally:
            if y is None or block is layers[-1]:  # by Ctrl-C too
                bar.close()
        return y

    return counted


def watch_prompts(decoder: Decoder) -> None:
    """Show how far a long prompt is; on a GPU, which is asked for all layers at once, nothing."""
    if decoder.device.type == "cpu":
        model = decoder.model
        model.prefill_block = with_bar(model.prefill_block, model.layers)


def show_loading() -> None:
    """From now on loading has a bar, if stderr is a terminal."""
    quantize.progress = partial(tqdm, unit=" layers", disable=None, leave=False)


@afterthought()
def say_library(model: Transformer) -> bool:
    """Say whether steps ran by a library that --compile makes -> the same."""
    libraries = getattr(model.decode_block, "libraries", {})
    ran = any(library is not None for library in libraries.values())
    if ran:
        say("decoded by the library that --compile made")
    elif getattr(model.decode_block, "missing", False):
        threads = plural(torch.get_num_threads(), "thread")
        say(f"--compile makes a library for {threads}, in some 15 seconds, by which later runs "
            "with as many decode faster")
    return ran
