"""Fixtures that several test files use."""
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import checks  # before Triton is imported: it says whether Triton interprets

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

from checks.common import CHATML, byte_level_tokenizer, hf_folder, random_hf
from formats.checkpoint import default_model
from formats.tokenizer import Tokenizer, load_tokenizer
from model import Transformer, load_model

GPL = Path("/usr/share/common-licenses/GPL-3")


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, transformers.PreTrainedModel]]:
    """checkpoint(name of checks.common.CHECKPOINTS) -> (folder, transformers model), made once."""
    made = {}

    def make(name: str) -> tuple[Path, transformers.PreTrainedModel]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            hf = random_hf(name)
            hf.save_pretrained(folder)
            made[name] = folder, hf
        return made[name]

    return make


@pytest.fixture(scope="session")
def smollm() -> tuple[Transformer, Tokenizer]:
    """The default model, in float32, and its tokenizer."""
    path = default_model()
    return load_model(path, dtype=torch.float32), load_tokenizer(path)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer.json of 600 tokens, a chat template and two ends of a text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend, _, _ = byte_level_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHATML,
    )
    fast.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    return folder


@pytest.fixture
def dynamo() -> Iterator[None]:
    """torch.compile as in a new process; the graphs it makes are counted from here."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile stops at the graphs, and runs them as they are: their number is the same."""
    compiled = torch.compile

    def trace_only(fn: Callable, **options: object) -> Callable:
        options.pop("options", None)
        return compiled(fn, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", trace_only)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A checkpoint with small random weights, a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    hf_folder(folder, vocab_size=600, max_position_embeddings=256)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def gpl(smollm: tuple[Transformer, Tokenizer]) -> list[int]:
    """The beginning of the GPL-3 as 1537 tokens of the default model."""
    if not GPL.exists():
        pytest.skip(f"no text to read: {GPL}")
    _, tokenizer = smollm
    return tokenizer.encode(GPL.read_text(encoding="utf-8"))[:1537]
