"""Fixtures that several test files use: a plugin of pytest, see conftest.py."""
import json
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path

import checks  # before Triton is imported: it says whether Triton interprets

import kernels
import numpy
import products  # puts what a GPU has into LAYOUTS
import pytest
import torch
import transformers
from torch._dynamo.utils import counters

from checks.common import CHATML, LLAMA_CPP, byte_level_tokenizer, fetched, hf_folder, random_hf
from formats.default import default_model
from generate import Tokenizer, load_tokenizer
from model import Transformer, load_model
from quantize import LAYOUTS

GPL = Path("/usr/share/common-licenses/GPL-3")


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """Every fixture and every test draws the same random numbers, whatever ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    pytest_fixture_setup()
    torch._dynamo.reset()  # it puts what it compiles into the module whose function that is


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, transformers.PreTrainedModel]]:
    """checkpoint(name of checks.common.CHECKPOINTS) -> (folder, transformers model), made once."""
    made = {}

    @torch.random.fork_rng(devices=[])  # a test draws the same whether it was made before or not
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
    model = load_model(path, dtype=torch.float32, quantize="none")
    return model, load_tokenizer(path)


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


KERNELS_OWN = set(vars(kernels))


@pytest.fixture
def as_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """kernels.py has the names that it has in a new process, and none of those that Triton's
    interpreter puts there when it runs a kernel, as other tests may have had it do."""
    for name in vars(kernels).keys() - KERNELS_OWN:
        monkeypatch.delattr(kernels, name)


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile stops at the graphs, and runs them as they are: their number is the same."""
    compiled = torch.compile

    @wraps(compiled)
    def trace_only(fn: Callable, **options: object) -> Callable:
        options.pop("options", None)
        return compiled(fn, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", trace_only)


@pytest.fixture
def gpu_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers on a CPU are packed as on a GPU, and multiplied by its kernels."""
    for mode, device in list(LAYOUTS):
        if device == "cpu":
            monkeypatch.delitem(LAYOUTS, (mode, "cpu"))
    for (mode, device), layout in list(LAYOUTS.items()):
        if device == "cuda":
            monkeypatch.setitem(LAYOUTS, (mode, "cpu"), layout)


MakeFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def talking_folder(tokenizer_folder: Path) -> MakeFolder:
    """talking_folder(folder, **changes) -> the folder: checks.common.hf_folder with a tokenizer and
    a chat template."""

    def make(folder: Path, **changes: object) -> Path:
        hf_folder(folder, vocab_size=600, **changes)
        for file in tokenizer_folder.iterdir():
            shutil.copy(file, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, talking_folder: MakeFolder) -> Path:
    """A checkpoint with small random weights, a tokenizer and a chat template."""
    return talking_folder(tmp_path_factory.mktemp("tiny") / "model", max_position_embeddings=256)


@pytest.fixture(scope="session")
def gpl(smollm: tuple[Transformer, Tokenizer]) -> list[int]:
    """The beginning of the GPL-3 as 1537 tokens of the default model."""
    if not GPL.exists():
        pytest.skip(f"no text to read: {GPL}")
    _, tokenizer = smollm
    return tokenizer.encode(GPL.read_text(encoding="utf-8"))[:1537]


@pytest.fixture(scope="session")
def llama_cpp_files() -> Path:
    """The folder models/ of llama.cpp: vocabularies, texts with their ids, chat templates."""
    return fetched("llama.cpp/models", fetch_llama_cpp)


def fetch_llama_cpp(folder: Path) -> Path:
    """The files of vendor/llama.cpp/models in a source distribution -> folder/models."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "0",
           "--timeout", "60", "--no-binary", "llama-cpp-python"]
    done = subprocess.run([*pip, "--dest", folder, LLAMA_CPP], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot fetch the sources of {LLAMA_CPP}: {done.stderr[-200:]}")
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, name = member.name.partition("vendor/llama.cpp/")
            if name.startswith("models/") and member.isfile():
                member.name = name
                tar.extract(member, folder, filter="data")
    return folder / "models"
