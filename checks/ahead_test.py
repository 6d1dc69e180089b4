"""A CPU's step compiled ahead of time: what it gives, when it is found, and when it is not made."""
import copy
import io
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import weakref
import zipfile
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from types import CodeType, FunctionType

import pytest
import torch
from torch import Tensor
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import BaseTorchDispatchMode
from transformers import PreTrainedModel

import kernels
import model as model_file
from checks.common import HERE, PATIENCE_S, close, run_cli
from cpu import ahead
from cpu.ahead import AheadOfTime, FunctionOfTensors, Snapshot
from generate import compile_model
from model import (
    MLP, LayerCache, Places, Positions, Transformer, apply_rope, load_model, run_block,
)
from quantize import cache_folder

pytestmark = pytest.mark.usefixtures("as_imported")  # what a fingerprint is made of
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
    """The fingerprint of each layer, as a text that begins finds it."""
    found = []
    for seen in (ahead.contents, ahead.surroundings):
        seen.cache_clear()
    layers = model.cache.layers(slice(0, 1))
    where = model.positions(positions(3), 1, model.cache)
    x = torch.zeros(1, 1, model.config.dim, dtype=model.dtype)
    for block, position, cache in zip(model.layers, where, layers):
        found.append(Snapshot(block, x, position, cache).fingerprint)
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
@pytest.mark.parametrize("room", [24, 200])
def test_libraries_give_what_blocks_give(
    built: Callable, name: str, dtype: torch.dtype, mode: str | None, room: int
) -> None:
    """One for all layers, at every position up to the last, in a cache with any room."""
    model, folder = built(name, dtype, mode)
    cache = model.setup_caches(1, room)
    model.decode_block = run_block
    expected = decoded(model, 24)
    kept = [layer.kv.clone() for layer in cache.whole]
    for layer in cache.whole:
        layer.kv.fill_(7)
    ahead_of_time = AheadOfTime(refuse, folder=folder)
    model.decode_block = ahead_of_time
    for got, want in zip(decoded(model, 24), expected, strict=True):
        close(got, want, 2e-4 if dtype == torch.float32 else 3e-2)
    [library] = ahead_of_time.libraries.values()
    assert library is not None
    for layer, kv in zip(cache.whole, kept, strict=True):
        own = layer.kv[..., :24, :].float()
        close(own, kv[..., :24, :].float(), 2e-4 if dtype == torch.float32 else 3e-2)
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
for i in range(2):  # the first is Python's
    logits = model.decode(torch.tensor([[1]]), torch.tensor([i], dtype=torch.int32))
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
    for i in range(2):
        expected = model.decode(torch.tensor([[1]]), positions(i))
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
    """However much room there is; a layer without rope has another."""
    folder, _ = checkpoint("smollm3-seven")
    model = load_model(folder, dtype=torch.float32)
    model.setup_caches(1, 32)
    first, second, third = names(model)
    assert second == third != first
    assert None not in (first, second)
    model.setup_caches(1, 100)
    assert names(model) == [first, second, third]


def test_what_torch_compile_leaves_in_a_module_is_no_edit(
    checkpoint: MakeCheckpoint, dynamo: None
) -> None:
    """It puts the functions that it makes among the names of the module whose function it is."""
    model = load_model(checkpoint("llama")[0], dtype=torch.float32)
    model.setup_caches(1, 16)
    before = names(model)
    known = set(vars(model_file))
    model.decode_block = torch.compile(run_block, backend="eager")
    decoded(model, 1)
    left = vars(model_file).keys() - known
    assert any(callable(vars(model_file)[name]) for name in left)
    assert names(model) == before and None not in before


def test_one_fingerprint_for_layers_that_were_quantized(checkpoint: MakeCheckpoint) -> None:
    """Though each has an error of its own: every other one takes a compiler some 15 seconds."""
    model = load_model(checkpoint("qwen3")[0], dtype=torch.float32, quantize="int8")
    model.setup_caches(1, 32)
    errors = [[getattr(x, "error", None) for x in block.modules()] for block in model.layers]
    assert len(set(map(str, errors))) == len(errors) > 1
    assert len(set(names(model))) == 1


def test_fingerprints_tell_blocks_apart(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By shapes, formats, numbers, what a fork writes, threads and machine, in settings that are
    not nn.Module's own too."""
    folder, _ = checkpoint("llama")

    def made(**options: object) -> Transformer:
        model = load_model(folder, **{"dtype": torch.float32, **options})
        model.setup_caches(1, 32)
        return model

    model = made()
    seen = [names(model)[0]]
    for changed in (made(dtype=torch.bfloat16), made(quantize="int8"), made(quantize="int4")):
        seen.append(names(changed)[0])
    model.layers[0].input_layernorm.eps *= 2
    seen.append(names(model)[0])
    model.layers[0].mlp.act = torch.nn.functional.relu
    seen.append(names(model)[0])
    model.layers[0].mlp.__class__ = OtherMLP
    seen.append(names(model)[0])
    monkeypatch.setattr("checks.ahead_test.FACTOR", 3)
    seen.append(names(model)[0])
    monkeypatch.setattr("cpu.ahead.hash_of", lambda file: "other lines")
    seen.append(names(model)[0])
    monkeypatch.setattr("cpu.ahead.processor", lambda: "another")
    seen.append(names(model)[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    seen.append(names(model)[0])
    assert None not in seen
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("old, new", [
    ((3, 4), (4, 3)), (frozenset({1, 2}), frozenset({1, 5})), (b"a", b"b"), (1.5, 2.5),
])
def test_fingerprints_tell_constants_of_functions_apart(old: object, new: object) -> None:
    """In functions inside of them too."""
    def function(x: int) -> object:
        def inner(x: int) -> object:
            return x in {1, 2}, (3, 4), b"a", 1.5
        return inner

    code = function.__code__
    [inner] = [each for each in code.co_consts if isinstance(each, CodeType)]
    other = with_constant(code, inner, with_constant(inner, old, new))
    assert ahead.of_code(other) != ahead.of_code(code)


NAMES = """
import sys, torch
from cpu.ahead import Snapshot
from model import load_model
model = load_model(sys.argv[1], dtype=torch.float32)
[cache] = model.setup_caches(1, 32).layers(slice(0, 1))[:1]
[where] = model.positions(torch.tensor([3], dtype=torch.int32), 1, model.cache)[:1]
print(Snapshot(model.layers[0], torch.zeros(1, 1, model.config.dim), where, cache).fingerprint)
"""


def copy_sources(folder: Path) -> None:
    for pattern in ("*.py", "cpu/*.py", "families/*.py", "formats/*.py"):
        for source in HERE.glob(pattern):
            (folder / source.parent.relative_to(HERE)).mkdir(exist_ok=True)
            (folder / source.relative_to(HERE)).write_bytes(source.read_bytes())


@pytest.mark.parametrize("file", ["kernels.py", "cpu/products.py"])
def test_an_edited_source_has_another_fingerprint(
    checkpoint: MakeCheckpoint, tmp_path: Path, file: str
) -> None:
    """So that a library which was kept is not used; one that is edited back is again."""
    copy_sources(tmp_path)
    edited = tmp_path / file
    text = edited.read_text()
    found = []
    for extra in ("", "\n# edited\n", ""):
        edited.write_text(text + extra)
        command = [sys.executable, "-c", NAMES, checkpoint("llama")[0]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    assert found[0] == found[2] != found[1]


def test_a_source_that_is_edited_before_a_model_is_loaded_has_no_fingerprint(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """As between two cells of a notebook: what runs is not what a later run will find there."""
    copy_sources(tmp_path)
    program = "import os, model\nos.utime(model.__file__)\n" + NAMES
    command = [sys.executable, "-c", program, checkpoint("llama")[0]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "None\n", done.stderr


class OtherMLP(MLP):
    """A fork's, which reads a number."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * FACTOR


FACTOR = 2


@pytest.mark.parametrize(
    "name", ["gemma2-seven", "gpt-oss-seven", "qwen3-moe", "mistral", "deepseek-v3", "qwen3.5"])
def test_what_no_library_can_run(
    checkpoint: MakeCheckpoint, tmp_path: Path, name: str
) -> None:
    """A softcap, sinks, experts, windows, states go through operators of ours, or Python."""
    folder, _ = checkpoint(name)
    model = load_model(folder, dtype=torch.float32)
    model.setup_caches(1, 200)
    for block, window, found in zip(model.layers, model.config.windows, names(model)):
        plain = window is None and name in ("qwen3-moe", "qwen3.5")
        has_experts = hasattr(block.mlp, "experts")
        assert (found is not None) == (plain and not has_experts)
    model.decode_block = AheadOfTime(run_block, folder=tmp_path)
    decoded(model, 1)
    # of layers without experts, and of those that attend
    assert model.decode_block.missing == (name in ("qwen3-moe", "qwen3.5"))

# --- what is changed is obeyed ---


class Fake:
    """A library that says how often it ran, and is wrong. It is kept for no further blocks once it
    is `closed`."""

    def __init__(self) -> None:
        self.n = 0
        self.closed = False

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        self.n += 1
        return [tensors[1] + 1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """What every block has that may have a library."""
    library = Fake()
    monkeypatch.setattr(
        AheadOfTime, "library", lambda *given: None if library.closed else library.run
    )
    return library


def snapshots(model: Transformer) -> dict[torch.nn.Module, Snapshot]:
    """Of its blocks, as the latest step has them."""
    return {each.block: each for each in model.decode_block.snapshots.values()}


def with_fake(checkpoint: MakeCheckpoint) -> Transformer:
    model = load_model(checkpoint("qwen3")[0], dtype=torch.float32)
    model.setup_caches(1, 32)
    model.decode_block = AheadOfTime(run_block)
    return model


def halve(self: torch.nn.Module, *args: object) -> Tensor:
    return args[0] / 2


def hook(module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output / 2


def register_for_all(patch: pytest.MonkeyPatch) -> None:
    hooks = torch.nn.modules.module._global_forward_hooks
    patch.setitem(hooks, torch.utils.hooks.RemovableHandle.next_id, None)  # so that it is undone
    torch.nn.modules.module.register_module_forward_hook(hook)


class Given:
    """What a class gives in place of its objects' own."""

    def __get__(self, owner: object, kind: type) -> Callable:
        return torch.neg

    def __set__(self, owner: object, value: object) -> None:
        raise AttributeError


class OwnTensor(Tensor):
    pass


def with_constant(code: CodeType, old: object, new: object) -> CodeType:
    assert old in code.co_consts
    return code.replace(co_consts=tuple(new if x == old else x for x in code.co_consts))


Change = Callable[[Transformer, pytest.MonkeyPatch], object]
CHANGES: dict[str, Change] = {
    "a method of a class": lambda model, patch: patch.setattr(MLP, "forward", halve),
    "the cache's attention": lambda model, patch: patch.setattr(
        LayerCache, "flash_decode", lambda self, q, *args, **options: q
    ),
    "a function of kernels.py": lambda model, patch: patch.setattr(
        "kernels._attend_live", lambda q, *args: (q, q)
    ),
    "a function of model.py": lambda model, patch: patch.setattr(
        "model.apply_rope", lambda x, cos, sin: x
    ),
    "a closure": lambda model, patch: setattr(
        model.layers[1].mlp, "forward", lambda x: x + len(model.layers)
    ),
    "a function with a value": lambda model, patch: setattr(
        model.layers[1].mlp, "act", lambda x: x + len(model.layers)
    ),
    "a property of a class": lambda model, patch: patch.setattr(
        MLP, "act", property(lambda self: torch.neg, lambda self, act: None), raising=False
    ),
    "a hook": lambda model, patch: model.layers[1].mlp.register_forward_hook(hook),
    "a hook of all modules": lambda model, patch: register_for_all(patch),
}
MORE_CHANGES: dict[str, Change] = {
    "a setting": lambda model, patch: setattr(model.layers[1].self_attn, "softmax_scale", 0.3),
    "a number of model.py": lambda model, patch: patch.setattr("model.MAX_SCORES", 4),
    "a dtype": lambda model, patch: model.layers[1].post_attention_layernorm.double(),
    "the code of a function": lambda model, patch: patch.setattr(
        MLP.forward, "__code__", halve.__code__
    ),
    "a default": lambda model, patch: patch.setattr(MLP.forward, "__defaults__", (1,)),
    "a default by name": lambda model, patch: patch.setattr(
        kernels.flash_decode_unchecked, "__kwdefaults__",
        kernels.flash_decode_unchecked.__kwdefaults__ | {"softcap": 0.1},
    ),
    "a number in a function": lambda model, patch: patch.setattr(
        apply_rope, "__code__", with_constant(apply_rope.__code__, 2, 3)
    ),
    "the names that a function reads": lambda model, patch: patch.setattr(
        "model.apply_rope", FunctionType(apply_rope.__code__, {**vars(model_file)})
    ),
    "a method that is no function": lambda model, patch: patch.setattr(
        MLP, "forward", partialmethod(halve)
    ),
    "an attribute that a class gives": lambda model, patch: patch.setattr(
        MLP, "act", Given(), raising=False
    ),
    "what calls all modules": lambda model, patch: patch.setattr(
        torch.nn.Module, "_call_impl",
        lambda self, *args: halve(self, *args) if isinstance(self, MLP) else self.forward(*args),
    ),
    "a tensor with operators of its own": lambda model, patch: setattr(
        model.layers[1].input_layernorm, "weight",
        torch.nn.Parameter(torch.ones(model.config.dim).as_subclass(OwnTensor), False),
    ),
    "a tensor that is minus its memory": lambda model, patch: setattr(
        model.layers[1].input_layernorm, "weight",
        torch.nn.Parameter(torch._neg_view(torch.ones(model.config.dim)), False),
    ),
    "a class": lambda model, patch: setattr(model.layers[1].mlp, "__class__", OtherMLP),
    "an attribute that a class had": lambda model, patch: setattr(
        model.layers[1].self_attn, "may_shift_scores", False
    ),
    "a switch": lambda model, patch: patch.setattr(torch, "get_num_threads", lambda: 77),
    "a method of a cache": lambda model, patch: [
        setattr(layer, "flash_decode", lambda q, *args, **options: q)
        for layer in model.cache.layers(slice(0, 1))
    ],
}
NEW_WEIGHTS: dict[str, Change] = {
    "a parameter": lambda model, patch: setattr(
        model.layers[1].input_layernorm, "weight", torch.nn.Parameter(torch.ones(model.config.dim))
    ),
    "a state": lambda model, patch: model.layers[1].load_state_dict(
        {k: v.clone() for k, v in model.layers[0].state_dict().items()}, assign=True
    ),
    "a module": lambda model, patch: setattr(model.layers[1], "mlp", model.layers[0].mlp),
}


AT_ONCE = [
    "a method of a class", "the cache's attention", "a hook", "a hook of all modules",
    "a method that is no function", "what calls all modules",
]


@pytest.mark.parametrize("name", [*CHANGES, *MORE_CHANGES])
def test_python_runs_what_is_changed_later(
    checkpoint: MakeCheckpoint, fake: Fake, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """From the next step on, or from the next text on."""
    model = with_fake(checkpoint)
    n = len(model.layers)
    decoded(model, 3)
    model.prefill(tokens_of(model, 2), positions(0))
    decoded(model, 1)
    assert fake.n == 4 * n - 1  # the first of all is Python's
    fake.closed = True
    {**CHANGES, **MORE_CHANGES}[name](model, monkeypatch)
    layers = list(model.layers)
    if name not in AT_ONCE:
        decoded(model, 1)
        assert fake.n == 5 * n - 1
        model.prefill(tokens_of(model, 2), positions(0))
    decoded(model, 2)
    assert snapshots(model)[layers[1]].library is None


@pytest.mark.parametrize("change", NEW_WEIGHTS.values(), ids=list(NEW_WEIGHTS))
def test_libraries_are_given_the_weights_that_were_put_in_place_of_others(
    checkpoint: MakeCheckpoint, fake: Fake, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    model = with_fake(checkpoint)
    decoded(model, 2)
    fake.closed = True
    change(model, monkeypatch)
    for _ in range(2):  # the first one finds plain weights, which are packed for the next
        model.prefill(tokens_of(model, 2), positions(0))
    before, layers = fake.n, list(model.layers)
    decoded(model, 1)
    assert fake.n == before + len(layers)
    given = {id(x) for x in snapshots(model)[layers[1]].weights}
    assert id(layers[1].input_layernorm.weight) in given
    assert {id(x) for x in layers[1].mlp.down_proj.order.tensors.values()} <= given


def test_a_text_is_noticed_whatever_became_of_the_first_block(
    checkpoint: MakeCheckpoint, fake: Fake
) -> None:
    """At which a step asks what has changed."""
    model = with_fake(checkpoint)
    decoded(model, 2)
    model.layers[0] = copy.deepcopy(model.layers[0])
    for scale in (0.2, 0.3):
        model.layers[1].self_attn.softmax_scale = scale
        model.prefill(tokens_of(model, 2), positions(0))
        fake.closed = True
        decoded(model, 1)
        assert snapshots(model)[model.layers[1]].library is None


def test_a_weight_that_is_changed_within_a_text_is_not_changed_by_half(
    checkpoint: MakeCheckpoint, fake: Fake
) -> None:
    """Python has new ones from then on, a norm's and a product's, and so has the library."""
    model = with_fake(checkpoint)
    model.prefill(tokens_of(model, 2), positions(0))
    decoded(model, 2)
    before, fake.closed = fake.n, True
    with torch.no_grad():
        for parameter in model.layers[1].mlp.parameters():
            parameter.mul_(2)
    decoded(model, 1)
    assert snapshots(model)[model.layers[1]].library is None
    model.prefill(tokens_of(model, 2), positions(0))
    before = fake.n
    decoded(model, 1)
    assert fake.n == before + len(model.layers)


def test_python_runs_what_gives_or_is_given_a_tensor_of_another_class(
    checkpoint: MakeCheckpoint, fake: Fake
) -> None:
    model = with_fake(checkpoint)
    decoded(model, 2)
    before = fake.n
    model.embed = lambda tokens: model.embed_tokens(tokens).as_subclass(OwnTensor)
    decoded(model, 1)
    assert fake.n == before


def test_what_a_class_no_longer_has_is_a_change(
    checkpoint: MakeCheckpoint, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_fake(checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(MLP, "scale", 2, raising=False)
        decoded(model, 2)
    before = fake.n
    decoded(model, 1)
    assert fake.n == before + len(model.layers) - 1  # the first of another kind


@pytest.mark.parametrize("mode", [BaseTorchFunctionMode, BaseTorchDispatchMode])
def test_python_runs_what_a_mode_sees(checkpoint: MakeCheckpoint, fake: Fake, mode: type) -> None:
    """As one that counts operators does, from the next step on and no longer than it is there."""
    model = with_fake(checkpoint)
    decoded(model, 2)
    before = fake.n
    with mode():
        decoded(model, 2)
    assert fake.n == before
    decoded(model, 2)
    assert fake.n > before


def test_weights_that_were_replaced_are_not_kept(checkpoint: MakeCheckpoint, fake: Fake) -> None:
    model = with_fake(checkpoint)
    decoded(model, 2)
    old = weakref.ref(model.layers[1].mlp.down_proj.weight)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    model.prefill(tokens_of(model, 2), positions(0))
    decoded(model, 2)
    assert old() is None


def test_python_runs_what_was_edited_since_it_was_imported(
    checkpoint: MakeCheckpoint, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library of old lines would be kept as one of new ones, or taken for what was reloaded. A
    file's own time may be that of what was copied over it."""
    monkeypatch.setattr("cpu.ahead.BEGAN", Path(kernels.__file__).stat().st_ctime - 1)
    decoded(with_fake(checkpoint), 3)
    assert fake.n == 0


@pytest.mark.parametrize("mode", [None, "int4"])
def test_a_text_that_forward_begins_has_the_weights_as_they_are(
    checkpoint: MakeCheckpoint, fake: Fake, mode: str | None
) -> None:
    """Who looks at a weight has it packed anew."""
    model = load_model(checkpoint("qwen3")[0], dtype=torch.float32, quantize=mode)
    model.setup_caches(1, 32)
    model.decode_block = AheadOfTime(run_block)
    decoded(model, 2)
    layer = model.layers[1].mlp.down_proj
    getattr(layer, "scales", layer.weight).mul_(2)
    model(tokens_of(model, 2), positions(0))
    decoded(model, 1)
    given = {id(x) for x in snapshots(model)[model.layers[1]].weights}
    assert given >= {id(x) for x in layer.order.tensors.values()}


def test_a_model_with_libraries_can_be_copied(checkpoint: MakeCheckpoint, fake: Fake) -> None:
    """The copy finds them anew: what a library is cannot be copied."""
    model = with_fake(checkpoint)
    decoded(model, 2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for _ in range(2):  # the first finds plain weights, which are packed for the next
            other.prefill(tokens_of(other, 2), positions(0))
        before, fake.n = fake.n, 0
        decoded(other, 2)
        assert fake.n == 2 * len(model.layers) - 1
        fake.n = before


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_python_runs_what_was_changed_before(
    checkpoint: MakeCheckpoint, fake: Fake, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    model = with_fake(checkpoint)
    change(model, monkeypatch)
    layers = list(model.layers)
    decoded(model, 3)
    assert snapshots(model)[layers[1]].library is None


class Counting(MLP):
    """A forward with a state."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


def test_python_runs_what_has_a_state(checkpoint: MakeCheckpoint, fake: Fake) -> None:
    model = with_fake(checkpoint)
    for block in model.layers:
        block.mlp.__class__ = Counting
    decoded(model, 3)
    assert fake.n == 0
    assert model.layers[0].mlp.calls == 3


@pytest.mark.parametrize("place", ["cache", "kernels"])
def test_a_compiled_step_obeys_an_edited_cache(
    checkpoint: MakeCheckpoint, place: str, monkeypatch: pytest.MonkeyPatch, dynamo: None,
    no_inductor: None,
) -> None:
    """torch.compile looks into flash_decode, and goes around nothing of it but the way in which
    new tokens are written."""
    model = load_model(checkpoint("qwen3")[0], dtype=torch.float32)
    model.setup_caches(1, 32)
    plain = decoded(model, 4)
    attend, flash_decode = kernels._attend_live, LayerCache.flash_decode
    if place == "kernels":
        monkeypatch.setattr("kernels._attend_live", lambda q, *args: attend(q * 2, *args))
    else:
        monkeypatch.setattr(
            LayerCache, "flash_decode",
            lambda self, q, *args, **options: flash_decode(self, q * 2, *args, **options),
        )
    expected = decoded(model, 4)
    assert (expected[-1] - plain[-1]).abs().max() > 1e-3
    compile_model(model)
    for got, want in zip(decoded(model, 4), expected, strict=True):
        close(got, want)


def test_a_library_is_compared_with_the_python(
    checkpoint: MakeCheckpoint, tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is new, in what it gives and writes."""
    monkeypatch.undo()
    model = with_fake(checkpoint)
    block = model.layers[0]
    [where, *_] = model.positions(positions(0), 1, model.cache)
    function = FunctionOfTensors(block, where)
    x = torch.zeros(1, 1, model.config.dim)
    examples = function.examples(x, model.cache.layers(slice(0, 1))[0].kv)
    assert not function.agrees(fake.run, examples)
    monkeypatch.setattr(fake, "run", lambda tensors: [function(*tensors)])
    assert function.agrees(fake.run, examples)
    ahead.say_once.cache_clear()
    pretend_to_compile(monkeypatch)
    built = AheadOfTime(run_block, build=True, folder=tmp_path)
    layer = model.cache.layers(slice(0, 1))[0]
    seen = []
    monkeypatch.setattr(
        FunctionOfTensors, "agrees", lambda *given: seen.append([*tmp_path.glob("*.pt2")])
    )
    assert built.library("name", block, x, where, layer) is None
    assert seen == [[]] and not list(tmp_path.iterdir())  # nor could another process load it

# --- signals and files ---


def pretend_to_compile(
    patch: pytest.MonkeyPatch, work: Callable[[str], None] = lambda path: Path(path).touch()
) -> None:
    """Let `work` write a library, of any function and by no compiler, which then does nothing."""
    patch.setattr(
        torch._inductor, "aoti_compile_and_package",
        lambda program, package_path: work(package_path),
    )
    patch.setattr(torch.export, "export", lambda *args, **options: None)
    patch.setattr("cpu.ahead.load", lambda path: Fake().run)
    patch.setattr(FunctionOfTensors, "agrees", lambda *given: True)


def compile_any(path: Path) -> None:
    where = Positions(positions(0), positions(0)[:, None], prefill=False, cached=0)
    cache = LayerCache([torch.zeros(2, 1, 1, 1, 1)], Places(1), flash=True)
    ahead.compile_to(path, torch.nn.Linear(2, 2), torch.zeros(1, 1, 2), where, cache)


INTERRUPTED = """
import os, queue, signal, sys, threading, time, torch
from pathlib import Path
from cpu.ahead import AheadOfTime
from model import load_model

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
path, folder = sys.argv[1:]
model = load_model(path, dtype=torch.float32)
model.setup_caches(1, 16)
model.decode_block = AheadOfTime(None, folder=Path(folder))
token, where = torch.tensor([[1]]), torch.tensor([0], dtype=torch.int32)
model.decode(token, where)
wanted = queue.SimpleQueue()

def interrupt():
    while wanted.get():
        time.sleep(0.01)  # somewhere in a step
        os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
for _ in range(60):
    try:
        wanted.put(True)
        while True:
            model.decode(token, where)
    except KeyboardInterrupt:
        print("interrupted")
"""


def test_an_interrupt_reaches_the_caller(built: Callable, checkpoint: MakeCheckpoint) -> None:
    """Wherever in a library it comes, of which oneDNN's products are operators in Python."""
    _, folder = built("llama", torch.float32, None)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", INTERRUPTED, checkpoint("llama")[0], folder]
    done = subprocess.run(
        command, cwd=HERE, capture_output=True, text=True, env=environment, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == 60 * "interrupted\n"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGHUP, signal.SIGALRM])
def test_signals_wait_for_a_library(sent: signal.Signals) -> None:
    ran = []

    def run(tensors: list[Tensor]) -> list[Tensor]:
        signal.raise_signal(sent)
        ran.append(1)
        return tensors

    before = signal.signal(sent, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            ahead.undisturbed(run, [])
        assert signal.getsignal(sent) is signal.default_int_handler
    finally:
        signal.signal(sent, before)
    assert ran == [1]


def test_folders_are_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the umask. A path that is relative is none."""
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    assert cache_folder() == Path.home() / ".cache" / "gpt-flash"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    pretend_to_compile(monkeypatch)
    path = cache_folder() / "blocks" / "name.pt2"
    mask = os.umask(0)
    try:
        compile_any(path)
    finally:
        os.umask(mask)
    made = [path.parent, path.parent.parent, tmp_path / "caches"]
    assert [each.stat().st_mode & 0o777 for each in (path, *made)] == [0o600] + [0o700] * 3


# a list by which user 1000 may write too: tag, rights and user of each entry
LIST = struct.pack("<I" + 5 * "HHi", 2, 1, 7, -1, 2, 7, 1000, 4, 5, -1, 16, 7, -1, 32, 0, -1)


@pytest.mark.parametrize("which", ["pipe", "link", "list", "group"])
def test_what_others_may_have_put_there_is_not_loaded(
    tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A group that has the user's own number is the user's own."""
    ahead.say_once.cache_clear()
    path = tmp_path / "name.pt2"
    if which == "pipe":
        os.mkfifo(path)
    elif which == "link":  # to the user's own, but another one
        zipfile.ZipFile(tmp_path / "other.pt2", "w").close()
        path.symlink_to("other.pt2")
    else:
        zipfile.ZipFile(path, "w").close()
    if which == "list":
        try:
            os.setxattr(tmp_path, "system.posix_acl_access", LIST)
        except OSError:
            pytest.skip("a file system without access control lists")
    if which == "group":
        path.chmod(0o664)
        monkeypatch.setattr(os, "geteuid", lambda: os.getegid() + 1)
    assert AheadOfTime(run_block, folder=tmp_path).library("name") is None
    said = capsys.readouterr().err
    assert "is no plain file" in said or "can be written by other users" in said


@pytest.mark.parametrize("which", ["file", "folder", "folder above"])
def test_what_others_can_write_is_not_loaded(
    tmp_path: Path, which: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ahead.say_once.cache_clear()
    folder = tmp_path / "gpt-flash" / "blocks"
    folder.mkdir(parents=True)
    path = folder / "name.pt2"
    zipfile.ZipFile(path, "w").close()
    ahead.refuse_others(path, path)
    loose = {"file": path, "folder": folder, "folder above": folder.parent}[which]
    loose.chmod(loose.stat().st_mode | 0o002)
    assert AheadOfTime(run_block, folder=folder).library("name") is None
    assert f"{loose} can be written by other users" in capsys.readouterr().err


def test_nothing_is_compiled_where_others_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor runs what it has compiled to try a compiler."""
    wrote: list[str] = []
    pretend_to_compile(monkeypatch, wrote.append)
    tmp_path.chmod(0o777)
    with pytest.raises(ValueError, match=f"{tmp_path} can be written by other users"):
        compile_any(tmp_path / "name.pt2")
    assert not wrote


def test_what_was_looked_at_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though another file has its name by then; and it is unpacked where nobody else can write,
    which is gone afterwards, as what a killed run left is."""
    path = tmp_path / "name.pt2"
    for each, text in [(path, "mine"), (tmp_path / "other.pt2", "another's")]:
        with zipfile.ZipFile(each, "w") as archive:
            archive.writestr("text", text)
    spool = tmp_path / "spool"
    spool.mkdir()
    left = spool / ".gpt-flash-loading-left"
    left.mkdir()
    os.utime(left, (0, 0))
    monkeypatch.setattr("tempfile.tempdir", str(spool))
    loaded = []

    def load(name: str, *options: object) -> Fake:
        os.replace(tmp_path / "other.pt2", path)
        [folder] = spool.iterdir()
        assert os.environ["TMPDIR"] == str(folder) and folder.stat().st_mode & 0o777 == 0o700
        loaded.append(zipfile.ZipFile(name).read("text"))
        return Fake()

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", load)
    before = os.environ.get("TMPDIR")
    ahead.load(path)
    assert loaded == [b"mine"]
    assert list(spool.iterdir()) == [] and os.environ.get("TMPDIR") == before
    spool.chmod(0o777)
    with pytest.raises(ValueError, match="spool can be written by other users"):
        ahead.load(path)


def test_a_compiler_writes_into_the_users_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caches and its headers too, which it would take from the TMPDIR that others share."""
    seen = []

    def compile_in(path: str) -> None:
        folder = str(Path(path).parent)
        seen.append({os.environ["TMPDIR"], os.environ["TORCHINDUCTOR_CACHE_DIR"]} == {folder})
        seen.append(not torch._inductor.config.aot_inductor.precompile_headers)
        Path(path).touch()

    pretend_to_compile(monkeypatch, compile_in)
    compile_any(tmp_path / "name.pt2")
    assert seen == [True, True]
    assert [each.name for each in tmp_path.iterdir()] == ["name.pt2"]



def test_threads_that_load_leave_the_environment_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those with a model each do."""
    monkeypatch.setenv("TMPDIR", "before")
    entered, left = threading.Event(), threading.Event()

    def first() -> None:
        with ahead.scratch(tmp_path, "loading"):
            threads[1].start()
            entered.wait(0.1)  # in vain, where they take turns
        left.set()

    def second() -> None:
        with ahead.scratch(tmp_path, "loading"):
            entered.set()
            left.wait(60)

    threads = [threading.Thread(target=work) for work in (first, second)]
    threads[0].start()
    for thread in threads:
        thread.join(60)
    assert os.environ["TMPDIR"] == "before"

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
    """For each cache; a model whose cache another one had, anew. A library is for each kind."""
    folder, _ = checkpoint("smollm3-seven")
    models = [load_model(folder, dtype=torch.float32) for _ in range(2)]
    cache = models[0].setup_caches(1, 32)
    looked, sought = [], []
    monkeypatch.setattr(
        "cpu.ahead.Snapshot", lambda *given: looked.append(given) or Snapshot(*given)
    )
    monkeypatch.setattr(AheadOfTime, "library", lambda *given: sought.append(given))
    _, otherwise = calls
    both = AheadOfTime(otherwise, folder=tmp_path)
    n = len(models[0].layers)
    of_kinds = 2  # whose first is looked at again when it has run
    for model, expected in [(models[0], n), (models[0], n), (models[1], 2 * n)]:
        model.decode_block = both
        model.decode(torch.tensor([[1]]), positions(0), cache)
        assert len(looked) == expected + of_kinds
        assert len(sought) == of_kinds


@pytest.mark.parametrize("layout", [
    "places behind", "tokens before heads", "values over keys", "a row of two", "another dtype",
    "another class",
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
    elif layout == "a row of two":
        kv = kv.repeat(1, 2, 1, 1, 1)[:, :1]
    elif layout == "another dtype":
        kv = kv.bfloat16()
    else:
        kv = kv.as_subclass(OwnTensor)
    x = torch.zeros(1, 1, model.config.dim)
    plain = kv.as_subclass(Tensor).float().clone(memory_format=torch.contiguous_format)
    [where, *_] = model.positions(positions(3), 1, model.cache)
    for each, has_library in ((plain, True), (kv, False)):
        cache = LayerCache([each], Places(32), flash=True)
        found = Snapshot(model.layers[0], x, where, cache).fingerprint
        assert (found is not None) == has_library


def test_old_libraries_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a new one comes, all but those that were used last."""
    monkeypatch.setattr("cpu.ahead.KEPT", 2)
    pretend_to_compile(monkeypatch)
    for age, name in enumerate(["new", "older", "oldest"]):
        (tmp_path / f"{name}.pt2").touch()
        os.utime(tmp_path / f"{name}.pt2", (1e9 - age, 1e9 - age))
    compile_any(tmp_path / "newest.pt2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.pt2", "newest.pt2"]


@pytest.mark.parametrize("which", ["folder", "libraries"])
def test_two_processes_compile_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """The other one makes the folder in the same moment, or throws old libraries away first."""
    pretend_to_compile(monkeypatch)
    if which == "folder":
        mkdir = Path.mkdir

        def both(path: Path, *args: object, **options: object) -> None:
            if not path.exists():
                os.mkdir(path)
            mkdir(path, *args, **options)

        monkeypatch.setattr(Path, "mkdir", both)
    else:
        (tmp_path / "gone.pt2").symlink_to("nowhere")  # listed, and not there
    path = tmp_path / "blocks" / "name.pt2" if which == "folder" else tmp_path / "name.pt2"
    compile_any(path)
    assert path.exists()


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
    assert "; try --no-compile, " in done.stderr.splitlines()[-1]
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
    assert len(ran) == 3 * len(model.layers) - 1  # the first of a kind is tried in Python
    lines = [line for line in capsys.readouterr().err.splitlines() if "no step" in line]
    reason = "no such graph" if broken == "export" else f"[Errno 17] File exists: '{place}'"
    assert lines == [f"no step is compiled ahead of time: {reason}"]
    if broken == "export":
        assert not list(place.iterdir())
