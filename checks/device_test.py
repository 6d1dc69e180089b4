"""What the engine and the statistics ask of a GPU, with stand-ins for one.

Tensors stay on the CPU. The functions of torch.cuda that an engine calls are replaced by ones that
keep which device was the current one."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._python_dispatch import TorchDispatchMode

import cli.stats
from batching import Engine, Stats
from checks.common import hf_folder, run_cli
from checks.engine_test import insert
from cli.arguments import parse_args
from cli.errors import sentence_for, sentences
from cli.stats import copy_bandwidth, summarize
from generate import Decoder, Drawn, Request, few_sizes, fit_cache, key_of
from model import KVCache, choose_attention, load_model

GPU_1 = torch.device("cuda", 1)


@dataclass
class FakeGPU:
    """Two GPUs of which 0 is the current one: what was called while which one was."""

    current: int = 0
    calls: list[tuple[str, int]] = field(default_factory=list)
    capture_streams: list[object] = field(default_factory=list)
    capture_fails: bool = False

    def note(self, name: str) -> None:
        self.calls.append((name, self.current))

    @contextlib.contextmanager
    def device_index(self, index: int | None) -> Iterator[None]:
        before = self.current
        if index is not None:
            self.current = index
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def capture(self, graph: object, stream: FakeStream) -> Iterator[None]:
        self.note("graph")
        self.capture_streams.append(stream)
        try:
            yield
        finally:
            if self.capture_fails:
                masks = "operation failed due to a previous error during capture"
                raise torch.AcceleratorError(f"CUDA error: {masks}")


class FakeStream:
    """A stream, an event or a graph of the device that is current where it is made."""

    def __init__(self, gpu: FakeGPU, name: str):
        self.gpu = gpu
        self.device = gpu.current
        gpu.note(name)

    def wait_stream(self, stream: FakeStream) -> None:
        self.gpu.note("wait_stream")

    def record(self) -> None:
        self.gpu.note("record")

    def replay(self) -> None:
        self.gpu.note("replay")

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: FakeStream) -> float:
        return 1.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGPU:
    gpu = FakeGPU()

    def new(name: str) -> Callable[..., FakeStream]:
        return lambda **options: FakeStream(gpu, name)

    for name in ("Stream", "current_stream", "CUDAGraph", "Event"):
        monkeypatch.setattr(torch.cuda, name, new(name))
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", gpu.capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: gpu.note("synchronize"))
    monkeypatch.setattr(torch.accelerator, "device_index", gpu.device_index)
    return gpu


@pytest.fixture
def engine(tmp_path: Path, gpu: FakeGPU) -> Engine:
    """A compiled engine that takes itself for one on cuda:1."""
    model = load_model(hf_folder(tmp_path / "model"), dtype=torch.float32)
    engine = Engine(model, model.setup_caches(2, 32), compiled=True)
    engine.device = GPU_1
    return engine

# --- the current device ---


def test_every_call_is_of_the_engines_gpu(engine: Engine, gpu: FakeGPU) -> None:
    seconds = engine.timed_steps(2)
    assert seconds == [1e-3, 1e-3]
    names = {name for name, _ in gpu.calls}
    assert names == {
        "Stream", "current_stream", "wait_stream", "CUDAGraph", "graph", "synchronize", "replay",
        "Event", "record",
    }
    assert {device for _, device in gpu.calls} == {1}
    assert gpu.current == 0  # the caller's


def test_a_capture_takes_a_stream_of_its_own_gpu(engine: Engine, gpu: FakeGPU) -> None:
    """By default torch.cuda.graph takes the stream of the first capture, of whatever GPU."""
    engine.prepare()
    stream, = gpu.capture_streams
    assert stream.device == 1


def test_functions_on_the_host_are_in_no_graph(engine: Engine, gpu: FakeGPU) -> None:
    """Those of tensors are; a step of each is prepared once."""
    by_host = dict(processors=[lambda ids, logits: logits])
    for settings in (dict(repetition_penalty=1.2), dict(logprobs=2), by_host, {}):
        engine.start([Request([1, 2, 3], 5, **settings)])
        engine.prepare()
        gpu.calls.clear()
        engine.step()
        assert (("replay", 1) in gpu.calls) == (settings is not by_host)
        assert ("graph", 1) not in gpu.calls


def test_all_trials_of_a_step_write_at_the_same_place(
    engine: Engine, gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row may have room for one step only."""
    engine.device = torch.device("cpu")
    insert(engine, 0, Request([1, 2, 3], 5))
    engine.device = GPU_1
    advance = engine.advance
    places = []

    def noted() -> Drawn:
        places.append(engine.input_pos.tolist())
        return advance()

    monkeypatch.setattr(engine, "advance", noted)
    engine.prepare()
    assert places == [[3, 0]] * 3
    assert engine.input_pos.tolist() == [3, 0]
    assert engine.active.tolist() == [1, 0]


def test_peak_memory_is_of_the_engines_gpu(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = {torch.device("cuda", 0): 10**9, GPU_1: 3 * 10**9}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peaks.get)
    monkeypatch.setattr(cli.stats, "copy_bandwidth", lambda device, nbytes: 1e10)
    engine.stats = Stats(first_token_s=[1.0], new_tokens=1, wall_s=1.0)
    assert engine.device == GPU_1 and summarize(engine)["peak_memory_gb"] == 3


def test_copies_are_waited_for_where_they_run(
    gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []

    class OneRun:
        median = 1.0

        def __init__(self, *args: object, **options: object):
            pass

        def blocked_autorange(self, min_run_time: float) -> OneRun:
            waits.append(gpu.current)
            return self

    monkeypatch.setattr(cli.stats, "Timer", OneRun)
    assert copy_bandwidth(torch.device("meta", 1), 16) == 32
    assert waits == [1]


def test_a_rank_takes_its_gpu_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or all ranks have a context on the first one too."""
    calls = []

    def empty(*shape: int, device: str) -> None:
        calls.append(("empty", device))
        raise RuntimeError("there is none")

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set", device)))
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(ValueError, match="cuda:1: there is none"):
        parse_args(["--device", "cuda"])
    assert calls == [("set", "cuda:1"), ("empty", "cuda:1")]

# --- what the host sends ---


def test_a_request_is_sent_in_one_copy(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of pinned memory, which the host does not wait for; nothing comes back."""
    requests = [Request([3, 4, 5], 4, 1.0, top_p=0.9), Request([6], 4, 1.0, seed=5)]
    rows = slice(0, 2)
    copies = []
    to = torch.Tensor.to

    def sent(x: torch.Tensor, device: object, *args: object, **options: bool) -> torch.Tensor:
        if device != GPU_1:
            return to(x, device, *args, **options)
        copies.append(options)
        return x.clone()

    def never(x: torch.Tensor) -> None:
        raise AssertionError("the host waits for the device")

    monkeypatch.setattr(torch.Tensor, "to", sent)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "cpu", never)
    prefill = engine.prefill(rows, requests)
    while not engine.read_on(prefill):
        pass
    assert copies == [{"non_blocking": True}]
    assert engine.input_pos.tolist() == [3, 1]
    assert torch.allclose(engine.sampling.filters[0], torch.tensor([float("inf"), 0.9, 0.0]))
    assert engine.sampling.key[1].tolist() == list(key_of(5))
    assert engine.sampling.temperature.tolist() == [1, 1]

class Noted(TorchDispatchMode):
    """Keeps the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_row_is_let_go_without_a_copy(engine: Engine) -> None:
    """x[i] = 0 would copy a number of the host's, which waits for all steps under way."""
    engine.device = torch.device("cpu")
    for decoder, n_requests in ((engine, 3), (Decoder(engine.model), 2)):
        run = decoder.run([Request([1, 2, 3], 5)] * n_requests)
        next(run)
        with Noted() as noted:
            decoder.end(0)
        assert noted.names and "aten::copy_" not in noted.names

# --- the size of a cache ---


def test_compiled_steps_have_caches_of_few_sizes(tmp_path: Path) -> None:
    """A size is compiled anew, and prompts have any length; a cache of the caller's stays."""
    assert [few_sizes(n) for n in (1, 3, 512, 513, 1024, 1025, 3000)] == [
        1, 4, 512, 1024, 1024, 2048, 3072]
    model = load_model(hf_folder(tmp_path / "model"), dtype=torch.float32)
    sizes = {True: set(), False: set()}
    for compiled in sizes:
        for n in range(1, 60):
            model.cache = None
            model.compiled = compiled
            fit_cache(model, [Request([3] * n, 5)], 0)
            sizes[compiled].add(model.cache.max_seq_len)
    assert sizes == {True: {8, 16, 32, 64}, False: set(range(6, 65))}
    model.setup_caches(1, 50)
    model.compiled = True
    fit_cache(model, [Request([3], 5)] * 2, 0)
    assert model.cache.max_seq_len == 50

# --- what a device refuses ---


def raised_in(module: str, error: Exception) -> Callable[[], None]:
    """A function of that module which raises error."""
    names = {"__name__": module, "error": error}
    exec("def fail():\n    raise error", names)
    return names["fail"]


def told(run: Callable[[], object]) -> str:
    """What the command line says of what run raises."""
    with pytest.raises(Exception) as e:
        run()
    return sentence_for(e.value)


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee ...")
TOO_BIG = RuntimeError("out of resource: shared memory\nRequired: 300000")
NO_COMPILER = BackendCompilerFailed(print, TOO_BIG, None)
LAUNCH = torch.AcceleratorError("CUDA error: no kernel image is available\nCompile with ...")
REFUSED = [
    (raised_in("triton.runtime.driver", TOO_BIG), "RuntimeError says: out of resource: shared"),
    (raised_in("torch._inductor", NO_COMPILER), "RuntimeError says: out of resource: shared"),
    (raised_in("model", LAUNCH), "AcceleratorError says: CUDA error: no kernel image"),
]


@pytest.mark.parametrize("capture_fails", [False, True])
def test_no_memory_for_a_capture(
    engine: Engine, gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch, capture_fails: bool
) -> None:
    """Even where the end of the capture fails too, and says something else."""
    gpu.capture_fails = capture_fails
    advance = engine.advance

    def advance_once_captured() -> Drawn:
        if gpu.capture_streams:
            raise OUT_OF_MEMORY
        return advance()

    monkeypatch.setattr(engine, "advance", advance_once_captured)
    assert told(engine.step) == "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert gpu.current == 0


@pytest.mark.parametrize("fail, says", REFUSED)
def test_a_kernel_that_the_device_refuses(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None], says: str
) -> None:
    """The sentence names the flags that may help."""
    monkeypatch.setattr(engine, "advance", fail)
    message = told(engine.step)
    assert message.startswith("a step does not compile or run here, as ")
    assert says in message and "\n" not in message
    assert message.endswith("; try --no-compile, --attention math or --device cpu")


def test_a_masked_kernel_error_is_the_one_that_is_told(
    engine: Engine, gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail, says = REFUSED[0]
    gpu.capture_fails = True
    monkeypatch.setattr(engine, "advance", lambda: gpu.capture_streams and fail())
    assert says in told(engine.prepare)


@pytest.mark.parametrize("error", [
    KeyError("x"), RuntimeError("shapes differ"), TypeError("no"), TOO_BIG, LAUNCH, OUT_OF_MEMORY,
], ids=repr)
def test_python_callers_see_the_error_itself(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(engine, "advance", raised_in("model", error))
    engine.compiled = False
    with pytest.raises(type(error)) as e:
        engine.step()
    assert e.value is error


@pytest.mark.parametrize("bug", [KeyError("x"), RuntimeError("shapes differ"), TypeError("no")])
def test_a_bug_stays_what_it_is(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, bug: Exception
) -> None:
    monkeypatch.setattr(engine, "advance", raised_in("model", bug))
    with pytest.raises(type(bug)) as e, sentences():
        engine.step()
    assert e.value is bug


@pytest.mark.parametrize("fail, says", [
    *REFUSED, (raised_in("model", OUT_OF_MEMORY), "CUDA out of memory."),
])
def test_the_command_says_it_in_one_sentence(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    fail: Callable[[], None], says: str,
) -> None:
    monkeypatch.setattr(Engine, "advance", lambda engine: fail())
    folder = hf_folder(tmp_path / "model")
    (tmp_path / "shape.json").write_text((folder / "config.json").read_text())
    code, out, err = run_cli(
        capfd, "--device", "cpu", "--checkpoint_path", tmp_path / "shape.json", "--prompt", 3,
    )
    warning, error = err.splitlines()
    assert "RANDOM" in warning
    assert code == 2
    assert out == ""
    assert error.startswith("generate.py: error: ")
    assert says in error

# --- the attention that is taken ---


@pytest.mark.parametrize("room, attention", [(1024, "math"), (1025, "flash")])
def test_auto_is_careful_on_a_gpu(room: int, attention: str) -> None:
    assert choose_attention("auto", GPU_1, room, 64) == attention
    assert choose_attention("flash", GPU_1, room, 64) == "flash"
    assert choose_attention("auto", torch.device("cpu"), room, 100) == "flash"


def test_heads_that_the_kernel_does_not_take() -> None:
    """On a GPU they have math; PyTorch takes any on a CPU."""
    for head_dim in (100, 264):
        assert choose_attention("auto", GPU_1, 10**6, head_dim) == "math"
        with pytest.raises(ValueError, match=f"no kernel takes heads of {head_dim} values"):
            choose_attention("flash", GPU_1, 10**6, head_dim)


def test_auto_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.triton", None)
    assert choose_attention("auto", GPU_1, 10**6, 64) == "math"
    assert KVCache(1, 1, 8, 1, 4).attention == "flash"  # on a CPU it is PyTorch
