"""Asks copies of the tree the same: `python checks/in_copies.py CHECKPOINT COPY...`, for tests.py.

Each copy is imported in a process of its own, forked from this one, which imports nothing of ours.
A line of JSON for each says how many of our modules `import model` loads, the tokens and the text
that the checkpoint answers with, and the sentences by which it says what it lacks."""
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy  # what the copies import too takes most of the time
import safetensors.torch
import sentencepiece
import torch


def answer(checkpoint: str, copy: str) -> dict[str, Any]:
    sys.path[0] = copy
    import model
    files = [str(getattr(module, "__file__", "")) for module in sys.modules.values()]
    n_modules = sum(file.startswith(copy) for file in files)
    import generate
    llama = model.load_model(checkpoint, dtype=torch.float32)
    tokenizer = generate.load_tokenizer(checkpoint)
    prompts = [tokenizer.encode(text) for text in ("What is this?", "It is a dog", "import")]
    tokens = generate.generate(llama, prompts, 12)
    yarn = llama.config.hf | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    window = llama.config.hf | {"model_type": "mistral", "sliding_window": 8}
    wants = [
        lambda: model.ModelConfig.from_hf({"model_type": "gemma"}),
        lambda: model.ModelConfig.from_hf(yarn),
        lambda: model.ModelConfig.from_hf(window),
        lambda: model.load_model(f"{checkpoint}/model.gguf"),
        lambda: generate.load_tokenizer(copy),
        lambda: generate.generate(llama, prompts, 2, stop=["x"], tokenizer=tokenizer),
        lambda: generate.generate(llama, prompts, 2, speculate_k=2),
        lambda: model.load_model(checkpoint, quantize="int4", calibrate=[5] * 128),
        lambda: generate.generate(llama, prompts, 2, repetition_penalty=1.2),
    ]
    return dict(
        n_modules=n_modules,
        tokens=tokens,
        text=printed(generate.main, [
            "--checkpoint_path", checkpoint, "--prompt", "It is", "--max_new_tokens", "12",
            "--device", "cpu",
        ]),
        lacks=[sentence for sentence in map(refusal, wants) if sentence],
    )


def printed(main: Callable[[list[str]], None], arguments: list[str]) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        main(arguments)
    return text.getvalue()


def refusal(wants: Callable[[], Any]) -> str | None:
    """The sentence by which a copy says that it lacks what this wants."""
    try:
        wants()
    except ValueError as e:
        lacks = "no folder" in str(e) or "that formats/ made" in str(e)
        return str(e) if lacks else None
    return None


def main(checkpoint: str, copies: list[str]) -> None:
    for copy in copies:
        if os.fork() == 0:
            print(json.dumps(answer(checkpoint, copy)), flush=True)
            os._exit(0)
        os.wait()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
