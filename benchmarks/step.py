"""What a compiled decode step launches on a GPU: `python benchmarks/report.py --step [WORD ...]`.

PyTorch needs no GPU to compile for one. Here it is made to believe in an H100: tensors on "cuda"
are fake, a device guard does nothing, and torch.cuda answers from a table. The decoder's own step
is compiled; Inductor writes its Triton kernels, which are logged instead of launched, and the code
that launches them runs on the fake tensors. A line for each variant says

    layer        launches in the last layer: Inductor's kernels, and operators called between them
    head, rest   launches of the output head, and of what is not compiled (embedding, sampling)
    weights      of a layer and of the head, in MB
    buffers      the largest allocation in a layer and in the head, in MB, beside a layer's cache
    graphs       how many were compiled in the first step, and how many more in a second

WORDs pick the variants that have them all in their names. Not seen: what autotuning chooses, and
time. Needs a machine without a GPU, Triton and g++."""
from __future__ import annotations

import collections
import ctypes
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from torch._C._distributed_c10d import _SymmetricMemory
from torch._dynamo import device_interface
from torch._dynamo.utils import counters
from torch._inductor import async_compile, graph, utils
from torch._inductor.fx_passes import joint_graph
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import products  # the layouts of a GPU
from cli.stats import module_bytes
from generate import Decoder, compile_model
from model import FAMILIES, ModelConfig, Transformer
from parallel import ALONE, Ranks
from parallel.ranks import join, local
from quantize import MODES, Linear, QuantizedLinear

class Variant(NamedTuple):
    """One way to decode."""

    config: str  # a file of benchmarks/configs
    weights: str
    kv: str
    attention: str
    batch: int
    room: int = 2048  # tokens that the cache holds
    ranks: int = 1  # that share the model
    n_layer: int = 3  # as many as show whether layers are alike
    kind: str = "greedy"  # how tokens are drawn

    def __str__(self) -> str:
        name = (
            f"{self.config} {self.weights} kv={self.kv} {self.attention} B={self.batch} "
            f"S={self.room}"
        )
        name += "" if self.kind == "greedy" else f" {self.kind}"
        return name if self.ranks == 1 else f"{name} rank of {self.ranks}"


VARIANTS = [
    *itertools.starmap(Variant, itertools.product(
        ("TinyLlama-1.1B", "Llama-3-8B"), ("bf16", "int8", "int4"), ("auto", "int8"),
        ("flash", "math"), (1, 8),
    )),
    # which draw tokens at random
    *(Variant("TinyLlama-1.1B", "bf16", "auto", "flash", batch, kind=kind)
      for kind in ("plain", "top_k", "filtered") for batch in (1, 8)),
    # mixtures of experts
    Variant("Qwen3-30B-A3B", "bf16", "auto", "flash", 1),
    Variant("Qwen3-30B-A3B", "int4", "auto", "flash", 1),
    Variant("gpt-oss-20b", "bf16", "auto", "flash", 1),
    # a compressed cache, to which no kernel attends
    Variant("GLM-4.7-Flash", "bf16", "auto", "math", 1),
    # three layers with a state, and one that attends
    Variant("Qwen3.6-35B-A3B", "bf16", "auto", "flash", 1, n_layer=4),
    Variant("Qwen3.6-35B-A3B", "int4", "auto", "flash", 1, n_layer=4),
    # what lies in memory at odd places
    Variant("SmolLM2-135M", "bf16", "int8", "flash", 1, room=2047),
    Variant("SmolLM2-135M", "bf16", "int8", "math", 1, room=2047),
    # layers of two kinds, norms before and after, and softcaps or two rotary embeddings
    Variant("Gemma-2-2B", "bf16", "auto", "flash", 1),
    Variant("Gemma-2-2B", "bf16", "auto", "math", 1),
    Variant("Gemma-3-1B", "bf16", "auto", "flash", 1),
    Variant("Gemma-3-1B", "bf16", "int8", "flash", 1),
    # of which those that see all have heads that no kernel takes
    Variant("Gemma-4-31B", "bf16", "auto", "flash", 1),
    Variant("Gemma-4-31B", "int4", "auto", "flash", 1),
    # one of the processes that share a model
    Variant("Llama-3-70B", "bf16", "auto", "flash", 1, ranks=8),
    Variant("Llama-3-70B", "int8", "auto", "flash", 1, ranks=8),
    Variant("Llama-3-70B", "int4", "auto", "flash", 1, ranks=8),
    Variant("Llama-3-70B", "int4", "auto", "flash", 8, ranks=8),
]

# --- what a step does, as it is counted ---


class Event(NamedTuple):
    """Something that was launched or allocated."""

    kind: str  # "kernel" of Inductor, "operator" of PyTorch, "clone" of an input, or "buffer"
    name: str
    nbytes: int  # of what an operator or a clone returns, and of a buffer


LOG: list[Event] = []  # what has happened since the last part of the step began


@dataclass
class Step:
    """The events of a decode step, by its parts."""

    layers: list[list[Event]] = field(default_factory=list)
    head: list[Event] = field(default_factory=list)
    rest: list[Event] = field(default_factory=list)
    graphs: int = 0  # compiled in this step


def launches(events: list[Event]) -> list[tuple[str, str]]:
    return [(event.kind, event.name) for event in events if event.kind != "buffer"]


def largest(events: list[Event]) -> float:
    """The largest event's MB."""
    return max((event.nbytes for event in events), default=0) / 1e6


class LogOperators(TorchDispatchMode):
    """Logs the operators of PyTorch that launch something."""

    NOTHING = re.compile("^prim|empty|detach|_unsafe_view|as_strided|alias|wait_tensor")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not self.NOTHING.search(func.name()):
            nbytes = out.nbytes if isinstance(out, Tensor) else 0
            LOG.append(Event("operator", func.name(), nbytes))
        return out


def take_log() -> list[Event]:
    events = LOG.copy()
    LOG.clear()
    return events


def run_step(decoder: Decoder) -> Step:
    """One step, told apart by the calls of the compiled block, head and draw."""
    step = Step()
    watch = LogOperators()
    model = decoder.model
    compiled = (model.decode_block, model.decode_head)
    sample = decoder.sample

    def part(fn: Callable, keep: Callable[[list[Event]], None]) -> Callable:
        """fn, with its events handed to keep."""
        def run(*args: Any) -> Tensor:
            step.rest += take_log()
            watch.__exit__(None, None, None)  # under a mode, torch.compile steps aside
            FAKE.__exit__(None, None, None)
            try:
                out = fn(*args)
            finally:
                FAKE.__enter__()
                watch.__enter__()
            keep(take_log())
            return out
        return run

    model.decode_block = part(model.decode_block, step.layers.append)
    model.decode_head = part(model.decode_head, step.head.extend)
    decoder.sample = part(sample, step.rest.extend)
    before = counters["stats"]["unique_graphs"]
    LOG.clear()
    with FAKE, watch:
        decoder.advance()
    step.rest += take_log()
    step.graphs = counters["stats"]["unique_graphs"] - before
    model.decode_block, model.decode_head = compiled
    decoder.sample = sample
    return step

# --- a variant ---


def build(variant: Variant) -> Transformer:
    """A model of fake tensors, with its cache."""
    hf = json.loads((ROOT / f"benchmarks/configs/{variant.config}.json").read_text())
    config = ModelConfig.from_hf(hf | {"num_hidden_layers": variant.n_layer})
    ranks = pretend_ranks(variant.ranks)
    with torch.device("meta"):
        model = FAMILIES[config.family].model(local(config, ranks))
        rows = math.ceil(config.vocab_size / ranks.size)
        model.lm_head = Linear(config.dim, rows, bias=False)
    model.to(torch.bfloat16).eval().requires_grad_(False)
    if variant.weights != "bf16":
        quantize(model, variant.weights)
    with FAKE:
        model.to_empty(device="cuda")
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.pack()
        for module in model.modules():
            if hasattr(module, "stack"):  # of experts
                module.stack()
        if ranks.size > 1:
            join(model, ranks)
        kv_dtype = torch.int8 if variant.kv == "int8" else None
        model.setup_caches(variant.batch, variant.room, kv_dtype, variant.attention)
        start = torch.zeros(1, dtype=torch.int32, device=model.device)
        model.positions(start, 1, model.cache)  # else the first step makes the rope tables
    return model


def quantize(model: Transformer, mode: str) -> None:
    """Quantized layers without a value in them; the head is int8 in both modes."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear):
            kind = MODES["int8" if name == "lm_head" else mode]
            model.set_submodule(name, kind(module, 32))


@torch.no_grad()
def measure(variant: Variant) -> tuple[Transformer, Step, Step]:
    """-> the model, its first step, which compiles, and a second one."""
    torch._dynamo.reset()
    counters.clear()
    model = build(variant)
    compile_model(model)
    # no random numbers are drawn: a generator on the CPU stands for the GPU's
    with FAKE, mock.patch.object(torch, "Generator", always(torch.Generator())):
        decoder = Decoder(model, compiled=True)
    decoder.kind = variant.kind
    first = run_step(decoder)
    second = run_step(decoder)
    return model, first, second


def say(layer: list[tuple[str, str]]) -> str:
    """The launches of a layer, by their kinds."""
    operators = collections.Counter(name for kind, name in layer if kind != "kernel")
    called = "".join(f" + {n} {name}" for name, n in operators.items())
    return f"{len(layer)} = {len(layer) - operators.total()} kernels{called}"


def describe(variant: Variant) -> str:
    """The line of a variant."""
    model, first, second = measure(variant)
    layers = [launches(events) for events in second.layers]
    in_layers = max(largest(events) for events in second.layers)
    cache = model.cache.nbytes / variant.n_layer / 1e6
    line = (
        f"{variant}: layer {say(layers[-1])}; "
        f"head {len(launches(second.head))}, rest {len(launches(second.rest))}; "
        f"weights {module_bytes(model.layers[0]) / 1e6:.1f} MB and "
        f"{module_bytes(model.lm_head) / 1e6:.1f} MB, "
        f"buffers {in_layers:.2f} and {largest(second.head):.2f} MB, cache {cache:.2f} MB; "
        f"graphs {first.graphs} + {second.graphs}"
    )
    if any(layer != layers[0] for layer in layers):
        line += f"; LAYERS DIFFER, the first has {say(layers[0])}"
    return line

# --- the GPU that is not there, and the others ---


def give_back(x: Tensor, reduce_op: str, group_name: str, out: Tensor) -> Tensor:
    return out


def pretend_ranks(n: int) -> Ranks:
    """The first of n ranks, whose collectives do nothing."""
    if n == 1:
        return ALONE
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)
        torch.library.register_fake("symm_mem::one_shot_all_reduce_out", give_back)
    return Ranks(0, n, dist.group.WORLD)


FAKE = FakeTensorMode(allow_non_fake_inputs=True)

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar registrar(
    c10::kCUDA, new c10::impl::NoOpDeviceGuardImpl<c10::kCUDA>());
"""

H100 = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
    gcnArchName="", shared_memory_per_block_optin=232448,
)

# what the functions of torch.cuda return
ANSWERS = {
    "is_available": True,
    "is_initialized": True,
    "is_bf16_supported": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_properties": H100,
    "get_device_capability": (9, 0),
    "mem_get_info": (80 << 30, 80 << 30),
    "current_stream": SimpleNamespace(cuda_stream=0),
    "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": None,
    "set_device": None,
    "synchronize": None,
    "empty_cache": None,
    "_lazy_init": None,
    "_exchange_device": 0,
    "_maybe_exchange_device": 0,
}


def pretend_gpu() -> None:
    """Make PyTorch, Inductor and Triton believe in an H100 from now on, and log what they do."""
    # what comes out of a cache on disk is not logged, nor what another process compiles
    torch.compiler.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1
    register_device_guard()
    answer_for_cuda()
    answer_for_triton()
    log_kernels()
    log_buffers()
    fold_constants_on_cpu()


def register_device_guard() -> None:
    """A guard of CUDA devices that does nothing, where there is no driver."""
    home = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/guard.so"
        command = ["g++", "-std=c++20", "-shared", "-fPIC", "-xc++", "-", "-o", library]
        command += [f"-I{home}/include", f"-L{home}/lib", "-lc10"]
        subprocess.run(command, check=True, input=GUARD.encode())
        ctypes.CDLL(library)


def answer_for_cuda() -> None:
    """torch.cuda, and what Dynamo asks instead of it."""
    interface = device_interface.CudaInterface
    for name, value in ANSWERS.items():
        setattr(torch.cuda, name, always(value))
        if hasattr(interface, name):
            setattr(interface, name, staticmethod(getattr(torch.cuda, name)))
    stream = always(0)
    interface.get_raw_stream = stream
    torch._C._cuda_getCurrentRawStream = stream
    device_interface.caching_worker_current_devices["cuda"] = 0
    device_interface.caching_worker_device_properties["cuda"] = [H100]
    torch.version.cuda = "13.0"
    FakeTensorMode.avoid_device_init = True
    fake_tensor.init_gpu_context = always(None)  # a CUDA build would look for a driver
    torch._inductor.config.shape_padding = False  # decided by measuring


def always(value: Any) -> Callable[..., Any]:
    """A function that returns value; each a new one, as Dynamo tells them apart."""
    def answer(*args: Any, value: Any = value, **kwargs: Any) -> Any:
        return value
    return answer


def answer_for_triton() -> None:
    """The part of Triton's driver that compiling asks for."""
    properties = {"max_shared_mem": H100.shared_memory_per_block_optin}
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_device=always(0),
        get_current_stream=always(0),
        get_active_torch_device=always(torch.device("cuda", 0)),
        get_current_target=always(triton.backends.compiler.GPUTarget("cuda", 90, 32)),
        utils=SimpleNamespace(get_device_properties=always(properties)),
    ))


def log_kernels() -> None:
    """Inductor's kernels are logged where they would be launched, and so is every operator that
    its code calls between them."""

    def never_launched(
        self: Any, name: str, source: str, device_str: str = "cuda"
    ) -> SimpleNamespace:
        def run(*args: Any, **kwargs: Any) -> None:
            LOG.append(Event("kernel", name, 0))
        return SimpleNamespace(run=run)

    load = graph.GraphLowering._compile_to_module_lines

    def load_watched(self: Any, lines: Any) -> Any:
        module = load(self, lines)
        module.call = under(LogOperators, module.call)
        return module

    async_compile.AsyncCompile.triton = never_launched
    graph.GraphLowering._compile_to_module_lines = load_watched


def log_buffers() -> None:
    """What Inductor's code allocates, and the inputs that it clones for their alignment."""
    guards = torch._C._dynamo.guards
    clone = utils.clone_preserve_strides

    def empty(size: tuple, stride: tuple, dtype: torch.dtype) -> Tensor:
        with FAKE:
            x = torch.empty_strided(size, stride, dtype=dtype, device="cuda")
        LOG.append(Event("buffer", "", x.nbytes))
        return x

    def reinterpret(x: Tensor, size: tuple, stride: tuple, offset: int = 0) -> Tensor:
        return x.as_strided(size, stride, x.storage_offset() + offset)

    def clone_logged(x: Tensor) -> Tensor:
        LOG.append(Event("clone", "of a misaligned input", x.nbytes))
        return clone(x)

    def empty_for_all(
        size: tuple, stride: tuple, dtype: torch.dtype, *_: Any, **__: Any
    ) -> Tensor:
        return empty(size, stride, dtype)  # what the other ranks read

    guards._empty_strided_cuda = empty
    _SymmetricMemory.empty_strided_p2p = staticmethod(empty_for_all)
    guards._reinterpret_tensor = reinterpret
    utils.clone_preserve_strides = clone_logged


def fold_constants_on_cpu() -> None:
    """Inductor folds constants with real tensors of one element; no fake device has those."""
    class OnCPU(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            kwargs = dict(kwargs or {})
            if "device" in kwargs:
                kwargs["device"] = torch.device("cpu")
            return func(*args, **kwargs)

    folder = joint_graph.UniformValueConstantFolder
    folder._deduce_value = under(OnCPU, folder._deduce_value)


def under(mode: Callable[[], AbstractContextManager], fn: Callable) -> Callable:
    """fn, run inside a mode."""
    def run(*args: Any) -> Any:
        with mode():
            return fn(*args)
    return run


def main(words: list[str]) -> None:
    """Print the lines of the variants that have all these words in their names."""
    if torch.cuda.is_available() or shutil.which("g++") is None:
        print("report.py: error: --step needs a machine without a GPU, and g++", file=sys.stderr)
        sys.exit(2)
    warnings.simplefilter("ignore")  # of caches that are off, and of fake tensors' addresses
    pretend_gpu()
    for variant in VARIANTS:
        if all(word in str(variant) for word in words):
            print(describe(variant), flush=True)
