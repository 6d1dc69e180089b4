"""A CPU's decode step, compiled ahead of time and kept for the runs to come.

What a CUDA graph is to a GPU, a shared library is to a CPU: the operators of a block, fused where
they can be and called from C++. torch.export and AOTInductor make it in some 15 seconds. It takes
the weights as arguments, so that all layers of a kind share one, and lies in the user's cache
folder under a fingerprint of the block: later runs need no compiler.

A library runs only where it gives what the Python gives now. A block has one only if all that it
does is written in files and in plain settings, which the fingerprint covers; and every step looks
whether any of that was replaced since, after which Python runs."""
from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import stat
import sys
import threading
import warnings
import zipfile
from _signal import getsignal, signal  # in `signal` they take 9 us each, for names of numbers
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import chain
from operator import attrgetter, is_
from pathlib import Path
from signal import SIGINT, SIGTERM
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules import module as torch_module
from torch.utils import _contextlib
from torch.utils.hooks import RemovableHandle

import kernels
import model
import quantize
from cpu import products
from model import Attention, BlockForward, LayerCache, Places, Positions, first_line, run_block
from quantize import LAYOUTS, cache_folder, say_once, workspace

PLACES = 64  # of the cache that a block is exported with; compiled, it takes any
DTYPE_OF = attrgetter("dtype")
KEPT = 64  # libraries, of 2 MB each: those that were used last


class AheadOfTime:
    """Runs blocks from their libraries; meant for Transformer.decode_block.

    Libraries are for steps of one token of one row with a plain cache. Everything else goes to
    `otherwise`: a block without a library, unless `build` says to make it, and all blocks once
    anything of one has changed, until compile_model is called again."""

    def __init__(self, otherwise: BlockForward, build: bool = False, folder: Path | None = None):
        self.otherwise = otherwise
        self.build = build
        self.folder = folder
        self.ready: WeakKeyDictionary[LayerCache, Step] = WeakKeyDictionary()
        self.libraries: dict[str, Any] = {}  # by fingerprint; None: there is none
        self.first: nn.Module | None = None  # the block that looks at what all of them share
        self.missing = False  # whether a block goes elsewhere because nobody built its library
        self.changed = False

    def __call__(
        self, block: nn.Module, x: Tensor, positions: Positions, cache: LayerCache
    ) -> Tensor:
        if self.changed or x.shape[0] * x.shape[1] > 1:
            return self.otherwise(block, x, positions, cache)
        step = self.ready.get(cache)
        if step is None or step.block is not block:
            step = self.ready[cache] = Step(block, cache)
            if self.find_library(step, x, positions, cache):
                y = run_block(block, x, positions, cache)
                step.works = not step.has_changed()  # else it has a state
                if step.works:
                    self.first = self.first or block
                return y
        if block is self.first and self.has_changed():  # of all at once, which is faster
            self.changed = True
            say_once("what a step runs was changed: its libraries rest until compile_model")
        if self.changed or not step.works:
            return self.otherwise(block, x, positions, cache)
        return step.run(x, positions)

    def has_changed(self) -> bool:
        return any(step.works and step.has_changed() for step in self.ready.values())

    def find_library(
        self, step: Step, x: Tensor, positions: Positions, cache: LayerCache
    ) -> bool:
        """Give a step its library -> whether there is one."""
        if any(step.hooks):
            return False
        try:
            traits = Traits(step.block, x, positions, cache)
        except NoLibrary:
            return False
        step.watch(traits.shared() if self.first in (None, step.block) else [])
        name = traits.fingerprint()
        if name not in self.libraries:
            function = FunctionOfTensors(step.block, positions)
            with torch.inference_mode(False), torch.no_grad():
                self.libraries[name] = self.library(name, function, function.examples(x, cache.kv))
        step.library = self.libraries[name]
        return step.library is not None

    def library(self, name: str, function: FunctionOfTensors, examples: list[Tensor]) -> Any | None:
        """The library of that fingerprint, None if there is none or it cannot be made."""
        try:
            path = (self.folder or cache_folder() / "blocks") / f"{name}.pt2"
            if path.exists():
                return load(path)
            if not self.build:
                self.missing = True
                return None
            compile_to(path, function, examples)
            library = load(path)
            if not function.agrees(library, examples):
                path.unlink()
                raise ValueError("a library gives something else than the Python")
            return library
        except Exception as error:  # of what a block does, of a compiler, or of a file system
            say_once(f"no step is compiled ahead of time: {first_line(error)}")
            return None


class Step:
    """A block with its cache and its library, and what they were when that was found."""

    def __init__(self, block: nn.Module, cache: LayerCache):
        self.block = block
        self.library: Any | None = None
        self.works = False
        self.tensors = [cache.kv, *block.parameters(), *block.buffers()]
        self.hooks = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        self.own = [vars(cache)]
        self.items = [(vars(cache), name) for name in vars(cache)]
        for module in block.modules():
            self.hooks += [module._forward_hooks, module._forward_pre_hooks]
            self.own.append(vars(module))
            self.items += [(vars(module), name) for name in settings_of(module)]
            for each in (module._parameters, module._buffers, module._modules):
                self.items += [(each, name) for name in each]

    def watch(self, shared: list[tuple[Any, str]]) -> None:
        """Remember how all is now, and objects that have attributes of these names."""
        self.shared = shared
        self.switches = switches()
        self.n_hooks = RemovableHandle.next_id  # of all that anything has had
        self.sizes = [*map(len, self.own)]
        self.columns = [*zip(*self.items)], [*zip(*shared)] or ((), ())
        self.seen = [*self.state()]

    def state(self) -> Iterator[Any]:
        items, shared = self.columns
        return chain(map(dict.get, *items), map(getattr, *shared), map(DTYPE_OF, self.tensors))

    def has_changed(self) -> bool:
        """Whether anything is another object now: what is in a list or a dictionary is not looked
        at."""
        if self.n_hooks != RemovableHandle.next_id and any(self.hooks):
            return True
        if [*map(len, self.own)] != self.sizes:
            return True
        if self.shared and self.switches != switches():
            return True
        return not all(map(is_, self.state(), self.seen))

    def run(self, x: Tensor, positions: Positions) -> Tensor:
        where = [value for value in positions if isinstance(value, Tensor)]
        [y] = undisturbed(self.library.run, [x, *where, *self.tensors])
        return y


def undisturbed(run: Any, tensors: list[Tensor]) -> list[Tensor]:
    """Run a library. An exception that a signal raises in the one operator of it that is Python
    would end the process, so Python's handlers are called after it."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets any
        return run(tensors)
    held: list[tuple[Any, ...]] = []
    handlers = {n: getsignal(n) for n in (SIGINT, SIGTERM) if callable(getsignal(n))}
    for number in handlers:
        signal(number, lambda *received: held.append(received))
    try:
        return run(tensors)
    finally:
        for number, handler in handlers.items():
            signal(number, handler)
        for received in held:
            handlers[received[0]](*received)


class FunctionOfTensors(nn.Module):
    """A block as a function of x, the tensors of its positions, its cache's kv and its weights,
    one after the other, which torch.export wants; everything else is part of what it does."""

    def __init__(self, block: nn.Module, positions: Positions):
        super().__init__()
        self.blocks = [block]  # hidden from nn.Module: its weights are to be arguments
        self.positions = positions
        self.weights = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        self.index_of_kv = 1 + sum(map(torch.is_tensor, positions))

    def examples(self, x: Tensor, kv: Tensor) -> list[Tensor]:
        """Arguments of a step in the middle of a small cache: a row, as kv [2, 1, Hkv, S, D] is, of
        one with as many rows as that has."""
        generator = torch.Generator().manual_seed(0)

        def like(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():  # of tokens
                return torch.full_like(tensor, PLACES // 2)
            return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

        n_rows = kv.stride(0) // kv[0].numel()
        cache = kv.new_empty(2, n_rows, kv.shape[2], PLACES, kv.shape[4])
        where = [like(value) for value in self.positions if isinstance(value, Tensor)]
        return [like(x), *where, like(cache)[:, :1], *self.weights.values()]

    def forward(self, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        x = next(given)
        where = [next(given) if isinstance(v, Tensor) else v for v in self.positions]
        kv = next(given)
        cache = LayerCache([kv], Places(kv.shape[3]), flash=True)
        weights = dict(zip(self.weights, given, strict=True))
        [block] = self.blocks
        return torch.func.functional_call(block, weights, (x, Positions(*where), cache))

    def agrees(self, library: Any, examples: list[Tensor]) -> bool:
        """Whether a library gives what the block does, which is compiled in other lines of Python,
        and by a compiler, of the same."""
        i = self.index_of_kv
        mine, theirs = [[*examples[:i], examples[i].clone(), *examples[i + 1:]] for _ in range(2)]
        results = (self(*mine), mine[i]), (library.run(theirs)[0], theirs[i])
        for want, got in zip(*results):
            if not (want - got).abs().max() <= 0.02 * want.abs().max():
                return False
        return True

# --- what a block is ---


PLAIN = (type(None), bool, int, float, str, torch.dtype)
OF_ALL_MODULES = vars(nn.Module()).keys()


class NoLibrary(Exception):
    """A block is not plainly a function of tensors."""


class Traits:
    """All that a block does, in files and in lines, and the modules and classes that hold it.

    Raises NoLibrary if that cannot be all: of what no file has, of experts, which Python chooses,
    and of options of attention, which are operators in Python."""

    def __init__(self, block: nn.Module, x: Tensor, positions: Positions, cache: LayerCache):
        refuse_unless_plain(cache, x)
        kv = cache.kv
        n_rows = kv.stride(0) // kv[0].numel()
        self.lines = {f"x {describe(x)}", f"cache {n_rows} {kv.shape[2]} {kv.shape[4]}"}
        for name, value in positions._asdict().items():
            self.lines.add(f"{name} {describe(value) if torch.is_tensor(value) else value}")
        self.files = {__file__, str(Path(model.__file__).with_name("generate.py"))}
        self.modules: set[ModuleType] = set()
        self.kinds: set[type] = set()  # classes of the block's modules, and of what these hold
        for module in (model, kernels, quantize, products):
            self.add_source(module)
        for each in (cache, cache.places):
            self.add_class(type(each))
        for name, module in block.named_modules():
            self.add_part(name, module)
        for module in self.modules:
            self.add_names(module)

    def add_part(self, name: str, module: nn.Module) -> None:
        options = module.options() if isinstance(module, Attention) else {}
        has_options = any(v is not None for key, v in options.items() if key != "scale")
        if has_options or hasattr(module, "stack"):
            raise NoLibrary
        self.add_class(type(module))
        for key, tensor in chain(module._parameters.items(), module._buffers.items()):
            self.lines.add(f"{name}.{key} {None if tensor is None else describe(tensor)}")
        for key in settings_of(module):
            self.lines.add(f"{name}.{key} = {self.described(vars(module)[key])}")

    def described(self, value: Any) -> str:
        """A setting, of which nothing changes unless it is replaced."""
        if isinstance(value, PLAIN):
            return repr(value)
        if isinstance(value, tuple):
            return str([self.described(each) for each in value])
        if isinstance(value, partial):
            return self.described((value.func, value.args, *value.keywords.items()))
        if isinstance(value, FunctionType):
            self.add_source(home(value))
        elif type(value) in map(type, LAYOUTS.values()):
            self.add_class(type(value))
            return self.described((type(value).__qualname__, *vars(value).items()))
        elif not isinstance(value, BuiltinFunctionType) or not is_torch(value):
            raise NoLibrary
        return f"{value.__module__}.{value.__qualname__}"

    def add_class(self, kind: type) -> None:
        self.kinds.add(kind)
        for each in kind.__mro__[:-1]:
            self.add_source(sys.modules[each.__module__])
            self.add_names(each)

    def add_names(self, holder: type | ModuleType) -> None:
        """What a class or a module holds: functions of its own file, or imported, and numbers."""
        for key in names_of(holder):
            value = vars(holder)[key]
            if isinstance(value, FunctionType) and key != "progress":  # which cli/ replaces
                module = home(value)
                self.files.add(module.__file__)
                self.lines.add(f"{holder.__name__}.{key} is a function")
                foreign = module.__name__ != getattr(holder, "__module__", holder.__name__)
                if foreign and (isinstance(holder, type) or key != value.__name__):
                    raise NoLibrary  # in the place of another
            elif isinstance(value, PLAIN) and not key.startswith("__"):
                self.lines.add(f"{holder.__name__}.{key} = {value!r}")

    def add_source(self, module: ModuleType) -> None:
        if module.__name__ == "__main__" or getattr(module, "__file__", None) is None:
            raise NoLibrary  # a script's names change all the time
        self.files.add(module.__file__)
        if not module.__name__.startswith("torch."):
            self.modules.add(module)

    def shared(self) -> list[tuple[Any, str]]:
        """What blocks have in common that may be replaced: functions and numbers, by name."""
        names = {(each, name) for each in self.modules for name in vars(each)}
        for kind in self.kinds:
            names |= {(kind, name) for each in kind.__mro__ for name in names_of(each)}
        kinds = (FunctionType, *PLAIN)
        return [pair for pair in names if isinstance(getattr(*pair), kinds)]

    def fingerprint(self) -> str:
        machine = [torch.__version__, torch.__config__.show(), processor(), *switches()]
        text = [*map(str, machine), *map(read, sorted(self.files)), *sorted(self.lines)]
        return hashlib.sha256("\n".join(text).encode()).hexdigest()[:32]


def names_of(holder: type | ModuleType) -> list[str]:
    """Those that matter: to PyTorch's classes other packages add some."""
    if is_torch(holder):
        return [name for name in ("__call__", "forward") if name in vars(holder)]
    return [*vars(holder)]


def settings_of(module: nn.Module) -> list[str]:
    return [name for name in vars(module) if name == "training" or name not in OF_ALL_MODULES]


def refuse_unless_plain(cache: LayerCache, x: Tensor) -> None:
    """NoLibrary for a cache that is not laid out as a row of a KVCache, or has another format."""
    kv = cache.kv
    plain = type(cache) is LayerCache and type(cache.places) is Places and cache.flash
    if not plain or not kv.is_cpu or kv.dtype != x.dtype or not kv[0].is_contiguous():
        raise NoLibrary
    n_rows, rest = divmod(kv.stride(0), kv[0].numel())
    if n_rows < 1 or rest:
        raise NoLibrary


@lru_cache(maxsize=None)
def home(function: FunctionType) -> ModuleType:
    """The module of a function. NoLibrary: it is written elsewhere, as one that was put into the
    place of another is, or it has values of its own, as closures have."""
    module = sys.modules.get(function.__module__)
    code = function.__code__
    if code.co_filename in (contextlib.__file__, _contextlib.__file__):  # their decorators
        return module
    own = set(code.co_freevars) - {"__class__"}  # which super() reads
    if own or code.co_filename != getattr(module, "__file__", None):
        raise NoLibrary
    return module


def is_torch(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).startswith("torch.")


def describe(tensor: Tensor) -> str:
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return f"{tensor.dtype} {tuple(tensor.shape)} {strides} {tensor.layout}"


def switches() -> tuple[Any, ...]:
    """What PyTorch's operators heed, and a library perhaps not."""
    return (
        torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled, torch.backends.cuda.flash_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu"),
    )


@lru_cache
def read(file: str) -> str:
    """A hash of a source as it is when first asked for: what is edited later does not run here."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


@lru_cache
def processor() -> str:
    """Which CPU this is: a library has the instructions of the one that it was compiled on."""
    known = {platform.machine(), torch.backends.cpu.get_cpu_capability()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        kinds = ("model name", "flags", "Features")
        known |= {line for line in cpuinfo.read_text().splitlines() if line.startswith(kinds)}
    return " ".join(sorted(known))

# --- files ---


def compile_to(path: Path, function: FunctionOfTensors, examples: list[Tensor]) -> None:
    """Write a function's library, for a cache with room for any number of tokens."""
    say_once("compiling a block for this CPU, which takes some 15 seconds and is kept")
    for folder in reversed([path.parent, *path.parent.parents]):
        if not folder.is_dir():
            folder.mkdir()
            folder.chmod(0o700)
    shapes = [None] * len(examples)
    shapes[function.index_of_kv] = {3: torch.export.Dim.DYNAMIC}
    lengths = torch._dynamo.config.patch(capture_scalar_outputs=True)  # as symbols
    with workspace(path.parent, "compiling") as folder, warnings.catch_warnings(), lengths:
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch about itself
        program = torch.export.export(
            function, tuple(examples), dynamic_shapes=(tuple(shapes),), strict=False
        )
        unfinished = folder / path.name
        torch._inductor.aoti_compile_and_package(program, package_path=str(unfinished))
        unfinished.chmod(0o600)
        os.replace(unfinished, path)
    newest_first = sorted(path.parent.glob("*.pt2"), key=os.path.getmtime, reverse=True)
    for old in newest_first[KEPT:]:
        old.unlink(missing_ok=True)


def load(path: Path) -> Any:
    """Something with run(list of tensors) -> list of tensors. ValueError: the file is damaged, and
    gone now, or others may have written it. RuntimeError: it cannot be loaded here.
    (torch._inductor.aoti_load_package makes the same, and imports Inductor for it.)"""
    refuse_others(path.resolve())
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # which the loader would run
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {Path(damaged).name} is another")
    except zipfile.BadZipFile as error:
        path.unlink(missing_ok=True)
        raise ValueError(f"{path} was damaged, and is removed: {first_line(error)}") from error
    with contextlib.suppress(OSError):  # of a folder that may only be read
        os.utime(path)  # the last that is thrown away
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)


def refuse_others(path: Path) -> None:
    """ValueError if anybody but the user, their own group and root can put a file there."""
    for each in (path, *path.parents):
        found = each.stat()
        writable = stat.S_IWOTH if found.st_gid == os.getegid() else stat.S_IWOTH | stat.S_IWGRP
        sticky = each.is_dir() and found.st_mode & stat.S_ISVTX
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & writable and not sticky:
            raise ValueError(f"{each} can be written by other users, who might have made it")
