"""A bar that shows how far a long prompt is."""
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

LONG = 512  # tokens; shorter ones are read while rows decode, whose text a bar would cover


def with_bar(block_forward: Callable, layers: Sequence[Any]) -> Callable:
    """What a model runs of each layer while it reads prompts, with a bar on stderr that counts the
    layers done, if that is a terminal.

    A pass over a long prompt calls block_forward(block, x, ...) for each of the layers in turn,
    with x [B, T, dim]; on a CPU each call returns when it is done."""
    bar = None

    def counted(block: Any, x: Any, *rest: Any) -> Any:
        nonlocal bar
        n_tokens = x.shape[0] * x.shape[1]
        if n_tokens < LONG:
            return block_forward(block, x, *rest)
        if block is layers[0]:
            bar = tqdm(total=len(layers), desc=f"reading {n_tokens} tokens", unit="layer",
                       disable=None, leave=False, delay=0.5)
        try:
            y = block_forward(block, x, *rest)
        except BaseException:  # Ctrl-C too
            bar.close()
            raise
        bar.update()
        if block is layers[-1]:
            bar.close()
        return y

    return counted
