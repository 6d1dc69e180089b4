"""A CPU's decode step, compiled ahead of time and kept for the runs to come.

What a CUDA graph is to a GPU, a shared library is to a CPU: the operators of a block, fused where
they can be and called from C++, without the Python between them. torch.export and AOTInductor make
it in some 15 seconds. It takes the weights as arguments, so that all layers of a kind share one. It
lies in the user's cache folder under a fingerprint of all that the block does, so that a run finds
it without a compiler, of which the import alone takes seconds."""
from __future__ import annotations

import hashlib
import inspect
import os
import platform
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import kernels
import model
import quantize
from cpu.cache import CPULayerCache, fits_into_graph
from model import BlockForward, LayerCache, Places, Positions, first_line
from quantize import cache_folder, say_once, workspace

PLACES = 64  # of the cache that a block is recorded and exported with; compiled, it takes any
KEPT = 64  # libraries, of 2 MB each: those that were used last


class AheadOfTime:
    """Runs blocks from their libraries; meant for Transformer.decode_block.

    Libraries are for steps of one token of one row with a plain cache, and for blocks of PyTorch's
    operators and our oneDNN product. Everything else goes to `otherwise`, as does a block without
    a library, unless `build` says to make it. A block is looked at once for each cache: who
    changes anything of it then makes this anew."""

    def __init__(self, otherwise: BlockForward, build: bool = False, folder: Path | None = None):
        self.otherwise = otherwise
        self.build = build
        self.folder = folder
        # a layer's cache -> its block, and what runs that
        self.ready: WeakKeyDictionary[LayerCache, tuple[nn.Module, BlockForward]]
        self.ready = WeakKeyDictionary()
        self.libraries: dict[Any, Any] = {}  # by structure_of; None: there is none
        self.missing = False  # whether a block goes elsewhere because nobody built its library

    def __call__(
        self, block: nn.Module, x: Tensor, positions: Positions, cache: LayerCache
    ) -> Tensor:
        if x.shape[0] * x.shape[1] > 1:
            return self.otherwise(block, x, positions, cache)
        looked_at, run = self.ready.get(cache, (None, None))
        if looked_at is not block:
            run = self.prepare(block, x, positions, cache)
            self.ready[cache] = block, run
        return run(block, x, positions, cache)

    def prepare(
        self, block: nn.Module, x: Tensor, positions: Positions, cache: LayerCache
    ) -> BlockForward:
        """What runs this block from now on: its library, or what runs it otherwise."""
        if not can_be_exported(block, x, cache):
            return self.otherwise
        function = FunctionOfTensors(block, positions, cache)
        structure = structure_of(function, x)
        if structure not in self.libraries:
            with torch.inference_mode(False), torch.no_grad():
                self.libraries[structure] = self.library(function, x)
        library = self.libraries[structure]
        if library is None:
            return self.otherwise
        always = [cache.kv, *function.weights.values()]

        def run(block: nn.Module, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
            [y] = library.run([x, *tensors_in(positions), *always])
            return y

        return run

    def library(self, function: FunctionOfTensors, x: Tensor) -> Any | None:
        """A block's library, None if there is none or it cannot be made."""
        try:
            folder = self.folder or cache_folder() / "blocks"
            examples = function.examples(x)
            path = folder / f"{fingerprint(function, examples)}.pt2"
            if not path.exists() and not self.build:
                self.missing = True
                return None
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                compile_to(path, function, examples)
            return load(path)
        except NoLibrary:
            return None
        except Exception as error:  # of what a block does, of a compiler, or of a file system
            say_once(f"no step is compiled ahead of time: {first_line(error)}")
            return None


def can_be_exported(block: nn.Module, x: Tensor, cache: LayerCache) -> bool:
    """Whether a library may be for it: only the plain cache's attention is a few operators, experts
    are chosen by Python, and hooks want to be called."""
    kv = cache.kv
    plain = type(cache) in (LayerCache, CPULayerCache) and type(cache.places) is Places
    if not plain or not cache.flash or not kv.is_cpu or kv.dtype != x.dtype:
        return False
    n_rows, rest = divmod(kv.stride(0), kv[0].numel())
    if not kv[0].is_contiguous() or n_rows < 1 or rest:  # no row of a KVCache: see cache_like
        return False
    for module in block.modules():
        has_experts = hasattr(module, "stack")
        if has_experts or module._forward_hooks or module._forward_pre_hooks:
            return False
    return True


def cache_like(kv: Tensor, places: int) -> Tensor:
    """Zeros with the strides that the row kv [2, 1, Hkv, S, D] of a KVCache would have if that had
    so many places."""
    n_rows = kv.stride(0) // kv[0].numel()
    return torch.zeros(2, n_rows, kv.shape[2], places, kv.shape[4], dtype=kv.dtype)[:, :1]


def tensors_in(positions: Positions) -> list[Tensor]:
    return [value for value in positions if isinstance(value, Tensor)]


class NoLibrary(Exception):
    """A block does what no library can do."""


class ExportedCache(CPULayerCache):
    """The cache of a block that is being recorded or exported."""

    def flash_decode(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, input_pos: Tensor, **options: Any
    ) -> Tensor:
        if not fits_into_graph(q, k, options):
            raise NoLibrary
        return self.decode_in_graph(q, k, v, input_pos, options.get("scale"))


class FunctionOfTensors(nn.Module):
    """A block as a function of x, the tensors of its positions, its cache's kv and its weights,
    one after the other, which torch.export wants; everything else is part of what it does."""

    def __init__(self, block: nn.Module, positions: Positions, cache: LayerCache):
        super().__init__()
        self.blocks = [block]  # hidden from nn.Module: its weights are to be arguments
        self.positions = positions
        self.kv = cache.kv
        self.weights = {**dict(block.named_parameters()), **dict(block.named_buffers())}

    def examples(self, x: Tensor) -> list[Tensor]:
        """Arguments like those of a step, of the first token of a small cache."""
        of_positions = [torch.zeros_like(value) for value in tensors_in(self.positions)]
        kv = cache_like(self.kv, PLACES)
        return [torch.zeros_like(x), *of_positions, kv, *self.weights.values()]

    def dynamic_shapes(self) -> tuple[dict | None, ...]:
        """Which sizes of the arguments stay symbols: the places of the cache."""
        before = [None] * (1 + len(tensors_in(self.positions)))
        return (*before, {3: torch.export.Dim.DYNAMIC}, *[None] * len(self.weights))

    def forward(self, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        x = next(given)
        where = [next(given) if isinstance(v, Tensor) else v for v in self.positions]
        kv = next(given)
        cache = ExportedCache([kv], Places(kv.shape[3]), flash=True)
        weights = dict(zip(self.weights, given, strict=True))
        [block] = self.blocks
        return torch.func.functional_call(block, weights, (x, Positions(*where), cache))

# --- which blocks do the same ---


OF_ALL_MODULES = vars(nn.Module()).keys()


def structure_of(function: FunctionOfTensors, x: Tensor) -> tuple:
    """Blocks of one structure do the same, as far as can be seen without running them: modules of
    the same classes and settings, tensors of the same shapes."""
    parts: list[Any] = [describe(x), describe(cache_like(function.kv, PLACES))]
    for value in function.positions:
        parts.append(describe(value) if isinstance(value, Tensor) else value)
    for name, weight in function.weights.items():
        parts += [name, describe(weight)]
    [block] = function.blocks
    for name, module in block.named_modules():
        parts += [name, type(module)]
        for setting, value in vars(module).items():
            if setting not in OF_ALL_MODULES:
                plain = isinstance(value, (bool, int, float, str, tuple, type(None)))
                parts += [setting, repr(value) if plain else id(value)]
    return tuple(parts)


def describe(tensor: Tensor) -> str:
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return f"{tensor.dtype} {tuple(tensor.shape)} {strides} {tensor.layout}"


def fingerprint(function: FunctionOfTensors, examples: list[Tensor]) -> str:
    """A name for what a block does: its operators one by one, with the shapes and numbers that they
    were given, the files that it is written in, and the machine that it is compiled for.

    Raises NoLibrary if no library can do that."""
    recorder = Recorder(examples)
    with recorder:
        function(*examples)
    machine = [torch.__version__, torch.get_num_threads(), processor()]
    text = "\n".join([*map(str, machine), *sources(function), *recorder.lines])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def sources(function: FunctionOfTensors) -> list[str]:
    """What is exported may be written in other lines than those that run eagerly."""
    [block] = function.blocks
    classes = {LayerCache}
    for module in block.modules():
        classes.update(type(module).__mro__)
    files = {inspect.getsourcefile(each) for each in classes - {object}}
    files |= set(map(str, Path(__file__).parent.glob("*.py")))
    files |= {model.__file__, kernels.__file__, quantize.__file__}
    return [Path(file).read_text() for file in sorted(files)]


class Recorder(TorchDispatchMode):
    """Writes down which operators run on what."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or it is imported, which takes a second

    def __init__(self, given: list[Tensor]):
        super().__init__()
        self.seen: list[Tensor] = []  # kept, so that no other takes their place in memory
        self.numbers: dict[int, int] = {}
        self.lines = [self.meet(tensor) for tensor in given]

    def meet(self, tensor: Tensor) -> str:
        """A new tensor, from now on known by its number."""
        self.numbers[id(tensor)] = len(self.seen)
        self.seen.append(tensor)
        return describe(tensor)

    def number(self, tensor: Tensor) -> str:
        if id(tensor) not in self.numbers:
            raise NoLibrary  # nobody's argument: a library would keep that of the first layer
        return f"%{self.numbers[id(tensor)]}"

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if operator.namespace == "gpt_flash":
            raise NoLibrary  # its Python would be called all the same
        arguments = tree_map_only(Tensor, self.number, (args, kwargs or {}))
        result = operator(*args, **(kwargs or {}))
        made: list[str] = []

        def note(tensor: Tensor) -> None:
            if id(tensor) not in self.numbers:
                made.append(self.meet(tensor))

        tree_map_only(Tensor, note, result)
        self.lines.append(f"{operator} {arguments} -> {made}")
        return result


def processor() -> str:
    """Which CPU this is: a library has the instructions of the one that it was compiled on."""
    known = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("model name", "flags", "Features")) and line not in known:
                known.append(line)
    return " ".join(known)

# --- compiling ---


def compile_to(path: Path, function: FunctionOfTensors, examples: list[Tensor]) -> None:
    """Write a function's library, for a cache with room for any number of tokens."""
    say_once("compiling a block for this CPU, which takes some 15 seconds and is kept")
    with workspace(path.parent, "compiling") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch about itself
        program = torch.export.export(
            function, tuple(examples), dynamic_shapes=(function.dynamic_shapes(),), strict=False
        )
        unfinished = folder / path.name
        torch._inductor.aoti_compile_and_package(program, package_path=str(unfinished))
        os.replace(unfinished, path)
    newest_first = sorted(path.parent.glob("*.pt2"), key=os.path.getmtime, reverse=True)
    for old in newest_first[KEPT:]:
        old.unlink(missing_ok=True)


def load(path: Path) -> Any:
    """Something with run(list of tensors) -> list of tensors. ValueError: the file is damaged, and
    gone now. RuntimeError: it cannot be loaded here. (torch._inductor.aoti_load_package makes the
    same, and imports Inductor for it.)"""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # which the loader would run
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {Path(damaged).name} is another")
    except zipfile.BadZipFile as error:
        path.unlink(missing_ok=True)
        raise ValueError(f"{path} was damaged, and is removed: {first_line(error)}") from error
    with suppress(OSError):  # of a folder that may only be read
        os.utime(path)  # the last that is thrown away
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
