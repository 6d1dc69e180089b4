"""A CPU's step compiled ahead of time: what it gives, when it is found, and when it is not made."""
import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from checks.common import HERE, close, run_cli
from cpu import ahead
from cpu.ahead import (
    AheadOfTime, FunctionOfTensors, NoLibrary, can_be_exported, fingerprint, structure_of,
)
from cpu.cache import CPULayerCache
from model import LayerCache, Places, Positions, Transformer, load_model, run_block
from quantize import quantize_model

MakeCheckpoint = Callable[[str], tuple[Path, PreTrainedModel]]  # the fixture
Calls = list[torch.nn.Module]


def positions(n: int) -> Tensor:
    return torch.tensor([n], dtype=torch.int32)


def tokens_of(model: Transformer, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (1, n), generator=generator)


def decoded(model: Transformer, n: int) -> list[Tensor]:
    """Logits of n tokens, one step each."""
    tokens = tokens_of(model, n)
    return [model.decode(tokens[:, i:i + 1], positions(i)) for i in range(n)]


def names(model: Transformer) -> list[str | None]:
    """The fingerprint of each layer."""
    found = []
    layers = model.cache.layers(slice(0, 1))
    where = model.positions(positions(3), 1, model.cache)
    x = torch.zeros(1, 1, model.config.dim, dtype=model.dtype)
    for block, position, cache in zip(model.layers, where, layers):
        function = FunctionOfTensors(block, position, cache)
        name = None
        with suppress(NoLibrary):
            name = fingerprint(function, function.examples(x))
        found.append(name)
    return found


@pytest.fixture
def calls() -> tuple[Calls, Callable]:
    """What runs blocks that have no library, and which it ran."""
    ran: Calls = []

    def otherwise(block: torch.nn.Module, *arguments: object) -> Tensor:
        ran.append(block)
        return run_block(block, *arguments)

    return ran, otherwise

# --- what a library gives ---


@pytest.fixture(scope="module")
def built(
    checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Transformer, Path]]:
    """built(name of a checkpoint, dtype, quantize) -> the model, and a folder with its library,
    made once."""
    made: dict[str, tuple[Transformer, Path]] = {}

    def make(name: str, dtype: torch.dtype, mode: str | None) -> tuple[Transformer, Path]:
        if name not in made:
            model = load_model(checkpoint(name)[0], dtype=dtype, quantize=mode)
            folder = tmp_path_factory.mktemp("blocks")
            model.setup_caches(1, 24)
            model.decode_block = AheadOfTime(refuse, build=True, folder=folder)
            decoded(model, 1)
            assert len(list(folder.glob("*.pt2"))) == len(list(folder.iterdir())) == 1
            made[name] = model, folder
        return made[name]

    return make


def refuse(*arguments: object) -> None:
    raise AssertionError("a block without a library")


BUILT = [("granite-seven", torch.float32, "int4"), ("qwen3", torch.bfloat16, None)]


@pytest.mark.parametrize("name, dtype, mode", BUILT)
@pytest.mark.parametrize("rows, room", [(1, 24), (1, 200), (3, 24)])
def test_libraries_give_what_blocks_give(
    built: Callable, name: str, dtype: torch.dtype, mode: str | None, rows: int, room: int
) -> None:
    """One for all layers, at every position up to the last, in a cache with any room. What other
    rows have stays."""
    model, folder = built(name, dtype, mode)
    cache = model.setup_caches(rows, room)
    model.decode_block = run_block
    expected = decoded(model, 24)
    kept = [layer.kv.clone() for layer in cache.whole]
    for layer in cache.whole:
        layer.kv.fill_(7)
    ahead_of_time = AheadOfTime(run_block if rows > 1 else refuse, rows > 1, folder)
    model.decode_block = ahead_of_time
    for got, want in zip(decoded(model, 24), expected, strict=True):
        close(got, want, 2e-4 if dtype == torch.float32 else 3e-2)
    [library] = ahead_of_time.libraries.values()
    assert library is not None
    for layer, kv in zip(cache.whole, kept, strict=True):
        own = layer.kv[:, :1, :, :24].float()
        close(own, kv[:, :1, :, :24].float(), 2e-4 if dtype == torch.float32 else 3e-2)
        assert (layer.kv[:, 1:] == 7).all()
        assert (layer.kv[..., 24:, :] == 7).all()


LATER = """
import sys, torch
from pathlib import Path
from cpu.ahead import AheadOfTime
from model import load_model, run_block

def refuse(*arguments):
    raise AssertionError("a block without a library")

path, folder, dtype, mode = sys.argv[1:]
model = load_model(path, dtype=getattr(torch, dtype), quantize=mode or None)
model.setup_caches(1, 16)
model.decode_block = AheadOfTime(refuse if folder else run_block, folder=Path(folder or "nowhere"))
logits = model.decode(torch.tensor([[1]]), torch.tensor([0], dtype=torch.int32))
torch.save(logits, sys.stdout.buffer)
assert model.decode_block.missing == (not folder)
print([name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules],
      file=sys.stderr)
"""


@pytest.mark.parametrize("name, dtype, mode, found", [
    (*BUILT[0], True), (*BUILT[0], False), (*BUILT[1], True),
])
def test_a_later_process_needs_no_compiler(
    built: Callable, checkpoint: MakeCheckpoint, name: str, dtype: torch.dtype, mode: str | None,
    found: bool,
) -> None:
    """Whether it finds the library or not: importing one takes longer than many steps."""
    model, folder = built(name, dtype, mode)
    model.setup_caches(1, 16)
    model.decode_block = run_block
    expected = model.decode(torch.tensor([[1]]), positions(0))
    path, _ = checkpoint(name)
    command = [sys.executable, "-c", LATER, path, folder if found else "",
               str(dtype).removeprefix("torch."), mode or ""]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=HERE, capture_output=True, env=environment)
    assert done.stderr.decode().splitlines()[-1:] == ["[]"], done.stderr.decode()
    got = torch.load(io.BytesIO(done.stdout))
    close(got, expected, 2e-4 if dtype == torch.float32 else 3e-2)


def test_a_run_takes_what_an_earlier_one_compiled(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From the command line. A library that is damaged is removed, and the text is the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ahead.say_once.cache_clear()
    flags = ["--checkpoint_path", tiny, "--device", "cpu", "--dtype", "float32",
             "--prompt", "hello", "--max_new_tokens", 12]
    code, text, said = run_cli(capfd, *flags)
    assert code == 0
    assert "--compile makes a library" in said
    assert not list(tmp_path.glob("gpt-flash/blocks/*"))

    assert run_cli(capfd, *flags, "--compile")[:2] == (0, text)
    [library] = tmp_path.glob("gpt-flash/blocks/*")
    taken = []
    load = ahead.load
    monkeypatch.setattr("cpu.ahead.load", lambda path: taken.append(path) or load(path))
    code, again, said = run_cli(capfd, *flags)
    assert (code, again) == (0, text)
    assert taken == [library]
    assert "--compile makes" not in said
    assert run_cli(capfd, *flags, "--no-compile")[:2] == (0, text)
    assert len(taken) == 1

    whole = bytearray(library.read_bytes())
    whole[len(whole) // 2] ^= 1
    for damaged in (whole, whole[:1000], b""):
        library.write_bytes(damaged)
        ahead.say_once.cache_clear()
        code, again, said = run_cli(capfd, *flags)
        assert (code, again) == (0, text)
        assert f"{library} was damaged, and is removed" in said
        assert not library.exists()

# --- fingerprints ---


def test_one_fingerprint_for_layers_that_do_the_same(checkpoint: MakeCheckpoint) -> None:
    """Wherever a row stands and however much room there is; a layer without rope has another."""
    folder, _ = checkpoint("smollm3-seven")
    model = load_model(folder, dtype=torch.float32)
    model.setup_caches(1, 32)
    first, second, third = names(model)
    assert second == third != first
    assert None not in (first, second)
    model.setup_caches(1, 100)
    assert names(model) == [first, second, third]


def test_fingerprints_tell_blocks_apart(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By shapes, formats, numbers, what a fork writes, rows of the cache, threads and machine."""
    folder, _ = checkpoint("llama")

    def made(**options: object) -> Transformer:
        model = load_model(folder, **{"dtype": torch.float32, **options})
        model.setup_caches(1, 32)
        return model

    model = made()
    seen = [names(model)[0]]
    for changed in (made(dtype=torch.bfloat16), made(quantize="int8"), made(quantize="int4")):
        seen.append(names(changed)[0])
    model.setup_caches(3, 32)
    seen.append(names(model)[0])
    model.setup_caches(1, 32)
    model.layers[0].input_layernorm.eps *= 2
    seen.append(names(model)[0])
    monkeypatch.setattr(type(model.layers[0].mlp), "forward", lambda self, x: -x)
    seen.append(names(model)[0])
    monkeypatch.setattr("cpu.ahead.sources", lambda function: ["other lines"])
    seen.append(names(model)[0])
    monkeypatch.setattr("cpu.ahead.processor", lambda: "another")
    seen.append(names(model)[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    seen.append(names(model)[0])
    assert None not in seen
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("name", ["gemma2-seven", "gpt-oss-seven", "qwen3-moe", "mistral"])
def test_what_no_library_can_run(
    checkpoint: MakeCheckpoint, tmp_path: Path, name: str
) -> None:
    """A softcap, sinks, experts and windows go through operators of ours, or through Python."""
    folder, _ = checkpoint(name)
    model = load_model(folder, dtype=torch.float32)
    model.setup_caches(1, 200)
    layers = model.cache.layers(slice(0, 1))
    x = torch.zeros(1, 1, model.config.dim)
    for block, cache, found in zip(model.layers, layers, names(model)):
        plain = block.self_attn.window is None and name == "qwen3-moe"
        has_experts = hasattr(block.mlp, "experts")
        has_library = can_be_exported(block, x, cache) and found is not None
        assert has_library == (plain and not has_experts)
    model.decode_block = AheadOfTime(run_block, folder=tmp_path)
    decoded(model, 1)
    assert model.decode_block.missing == (name == "qwen3-moe")  # of its layers without experts

# --- everything else goes another way ---


def test_other_steps_go_another_way(
    checkpoint: MakeCheckpoint, tmp_path: Path, calls: tuple[Calls, Callable]
) -> None:
    """Several rows, several tokens, other caches, hooks."""
    folder, _ = checkpoint("llama")
    model = load_model(folder, dtype=torch.float32)
    n = len(model.layers)
    ran, otherwise = calls
    model.decode_block = AheadOfTime(otherwise, folder=tmp_path)
    model.compiled_lengths = {1, 3}
    model.setup_caches(2, 32)
    model.decode(torch.ones(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int32))
    model.decode(torch.ones(1, 3, dtype=torch.int64), positions(0))
    model.setup_caches(1, 32, torch.int8)
    model.decode(torch.ones(1, 1, dtype=torch.int64), positions(0))
    model.setup_caches(1, 32, attention="math")
    model.decode(torch.ones(1, 1, dtype=torch.int64), positions(0))
    assert len(ran) == 4 * n
    assert not model.decode_block.missing

    model.setup_caches(1, 32)
    heard = []
    model.layers[0].mlp.register_forward_hook(lambda module, args, y: heard.append(y))
    model.decode(torch.ones(1, 1, dtype=torch.int64), positions(0))
    assert len(heard) == 1
    assert model.decode_block.missing  # of the other layers
    assert not list(tmp_path.iterdir())


def test_a_block_is_looked_at_once(
    checkpoint: MakeCheckpoint, tmp_path: Path, calls: tuple[Calls, Callable],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For each cache; a model whose cache another one had, anew. Of each kind one is recorded."""
    folder, _ = checkpoint("smollm3-seven")
    models = [load_model(folder, dtype=torch.float32) for _ in range(2)]
    cache = models[0].setup_caches(1, 32)
    looked, recorded = [], []
    monkeypatch.setattr(
        "cpu.ahead.structure_of", lambda *given: looked.append(given) or structure_of(*given)
    )
    monkeypatch.setattr(
        "cpu.ahead.fingerprint", lambda *given: recorded.append(given) or fingerprint(*given)
    )
    _, otherwise = calls
    both = AheadOfTime(otherwise, folder=tmp_path)
    n = len(models[0].layers)
    for model, expected in [(models[0], n), (models[0], n), (models[1], 2 * n)]:
        model.decode_block = both
        model.decode(torch.tensor([[1]]), positions(0), cache)
        assert len(looked) == expected
        assert len(recorded) == 2


def test_structures_of_blocks(checkpoint: MakeCheckpoint) -> None:
    """Other settings, classes or shapes make another one, in what is not nn.Module's own too."""
    folder, _ = checkpoint("llama")
    model = load_model(folder, dtype=torch.float32)
    model.setup_caches(1, 32)
    x = torch.zeros(1, 1, model.config.dim)
    [where, *_] = model.positions(positions(3), 1, model.cache)
    cache = model.cache.layers(slice(0, 1))[0]

    def structure(layer: int) -> tuple:
        return structure_of(FunctionOfTensors(model.layers[layer], where, cache), x)

    assert structure(0) == structure(1) == structure(2)
    model.layers[1].input_layernorm.eps *= 2
    model.layers[2].self_attn.settings = {"a": 1}
    seen = [structure(0), structure(1), structure(2)]
    model.layers[2].mlp.act = torch.nn.functional.relu
    seen.append(structure(2))
    quantize_model(model, "int8")
    seen.append(structure(0))
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("layout", [
    "places behind", "tokens before heads", "values over keys", "another dtype",
])
def test_caches_of_another_layout_go_another_way(
    checkpoint: MakeCheckpoint, layout: str
) -> None:
    """A library would read and write at wrong addresses."""
    folder, _ = checkpoint("llama")
    model = load_model(folder, dtype=torch.float32)
    kv = model.setup_caches(1, 32).layers(slice(0, 1))[0].kv  # (2, 1, Hkv, S, D)
    if layout == "places behind":
        kv = torch.nn.functional.pad(kv, (0, 0, 0, 8))[:, :, :, :32]
    elif layout == "tokens before heads":
        kv = kv.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "values over keys":
        kv = kv[:1].expand(2, -1, -1, -1, -1)
    else:
        kv = kv.bfloat16()
    x = torch.zeros(1, 1, model.config.dim)
    plain = kv.float().clone(memory_format=torch.contiguous_format)
    for kind in (LayerCache, CPULayerCache):
        assert not can_be_exported(model.layers[0], x, kind([kv], Places(32), flash=True))
        assert can_be_exported(model.layers[0], x, kind([plain], Places(32), flash=True))


def test_old_libraries_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a new one comes, all but those that were used last."""
    monkeypatch.setattr("cpu.ahead.KEPT", 2)
    monkeypatch.setattr(
        torch._inductor, "aoti_compile_and_package",
        lambda program, package_path: Path(package_path).touch(),
    )
    for age, name in enumerate(["new", "older", "oldest"]):
        (tmp_path / f"{name}.pt2").touch()
        os.utime(tmp_path / f"{name}.pt2", (1e9 - age, 1e9 - age))
    monkeypatch.setattr(torch.export, "export", lambda *args, **options: None)
    block = torch.nn.Linear(2, 2)
    where = Positions(positions(0), positions(0)[:, None], prefill=False, cached=0)
    cache = LayerCache([torch.zeros(2, 1, 1, 1, 1)], Places(1), flash=True)
    ahead.compile_to(tmp_path / "newest.pt2", FunctionOfTensors(block, where, cache), [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.pt2", "newest.pt2"]


def test_without_a_compiler(tiny: Path, tmp_path: Path) -> None:
    """Who asks for a library is told; who does not, needs none."""
    environment = {
        **os.environ, "CXX": "/no/compiler", "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    command = [sys.executable, "generate.py", "--checkpoint_path", tiny, "--device", "cpu",
               "--prompt", "hello", "--max_new_tokens", "4"]
    done = subprocess.run(
        [*command, "--compile"], cwd=HERE, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "no step is compiled ahead of time: InvalidCxxCompiler" in done.stderr
    assert done.stderr.splitlines()[-1].endswith("; try --no-compile")
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("broken", ["export", "folder"])
def test_what_cannot_be_made_is_said_once(
    checkpoint: MakeCheckpoint, tmp_path: Path, calls: tuple[Calls, Callable], broken: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    ahead.say_once.cache_clear()
    folder, _ = checkpoint("llama")
    model = load_model(folder, dtype=torch.float32)
    model.setup_caches(1, 32)
    want = decoded(model, 3)
    ran, otherwise = calls
    place = tmp_path / "blocks"
    if broken == "folder":
        place.write_text("a file")
    else:
        def fail(*args: object, **options: object) -> None:
            raise RuntimeError("no such graph\nand much more")

        monkeypatch.setattr(torch.export, "export", fail)
    model.decode_block = AheadOfTime(otherwise, build=True, folder=place)
    for got, expected in zip(decoded(model, 3), want):
        close(got, expected)
    assert len(ran) == 3 * len(model.layers)
    lines = [line for line in capsys.readouterr().err.splitlines() if "no step" in line]
    reason = "no such graph" if broken == "export" else f"[Errno 17] File exists: '{place}'"
    assert lines == [f"no step is compiled ahead of time: {reason}"]
    if broken == "export":
        assert not list(place.iterdir())
