"""A CPU's decode step, compiled ahead of time and kept for the runs to come.

What a CUDA graph is to a GPU, a shared library is to a CPU: the operators of a block, fused where
they can be and called from C++. torch.export and AOTInductor make it in some 15 seconds. It takes
the weights as arguments, so that all layers of a kind share one, and lies in the user's cache
folder under a fingerprint of the block: later runs need no compiler.

A library runs only where it gives what the Python gives now:

- The fingerprint is made of all that a block does: its files, what has been put into the place of
  their functions since, and plain settings. A block that does anything else has no library.
- When a text begins, in prefill or forward, the fingerprints are taken anew.
- Each step asks whether a hook has come, a method of a class been replaced, or a weight looked at.

Nobody notices what changes inside a table, a tensor or an object that a function reads by a name of
its module, or other functions that are put into torch.nn.functional: call compile_model, which has
no library."""
from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import stat
import sys
import tempfile
import threading
import warnings
import zipfile
from _signal import getsignal, signal  # in `signal` they take 9 us each, for names of numbers
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import chain, starmap
from pathlib import Path
from signal import SIGALRM, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules import module as of_all
from torch.utils import _contextlib
from torch.utils.hooks import RemovableHandle

import kernels
import model
import quantize
from cpu import BEGAN, products
from model import (
    Attention, BlockForward, LayerCache, Places, Positions, Transformer, first_line, run_block,
)
from quantize import LAYOUTS, QuantizedLinear, cache_folder, say_once, workspace

Library = Callable[[list[Tensor]], list[Tensor]]  # kv, x, positions and weights -> [y]
PLACES = 64  # of the cache that a block is exported with; compiled, it takes any
KEPT = 64  # libraries, of 2 MB each: those that were used last
SIGNALS = (SIGALRM, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2)  # which programs have handlers for
TMPDIR = threading.RLock()  # of the thread that has set it, for the whole process


class AheadOfTime:
    """Runs blocks from their libraries; meant for Transformer.decode_block.

    Libraries are for steps of one token with a plain cache of one row. Everything else goes to
    `otherwise`: a block without a library, unless `build` says to make it."""

    def __init__(self, otherwise: BlockForward, build: bool = False, folder: Path | None = None):
        self.otherwise = otherwise
        self.build = build
        self.folder = folder
        # of the layers whose caches these are, since the text began
        self.snapshots: WeakKeyDictionary[LayerCache, Snapshot] = WeakKeyDictionary()
        self.libraries: dict[str, Library | None] = {}  # by fingerprint; None: there is none
        self.index: Tensor | None = None  # of the latest step's positions
        # what that step found: how many texts, hooks and looks; and methods and numbers of classes,
        # by what getattr takes: a class, a name, and None for none
        self.counts: tuple[int, ...] = ()
        self.methods: dict[tuple[type, str, None], Any] = {}
        self.missing = False  # whether a block goes elsewhere because nobody built its library

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:  # a copy finds its libraries anew
        return AheadOfTime, (self.otherwise, self.build, self.folder)

    def __call__(
        self, block: nn.Module, x: Tensor, positions: Positions, cache: LayerCache
    ) -> Tensor:
        modes = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
        # modes, and subclasses of Tensor, see each operator
        if modes or type(x) is not Tensor or x.shape[0] * x.shape[1] > 1:
            return self.otherwise(block, x, positions, cache)
        if positions.index is not self.index:  # a step begins
            self.index = positions.index
            self.forget_if_changed()
        known = self.snapshots.get(cache)
        if known is None or known.block is not block:
            return self.first_time(block, x, positions, cache)
        if known.library is None:
            return self.otherwise(block, x, positions, cache)
        where = [value for value in positions if isinstance(value, Tensor)]
        [y] = known.library([known.kv, x, *where, *known.weights])
        return y

    def forget_if_changed(self) -> None:
        """Forget all snapshots where a text has begun, a hook come, a method been replaced, or
        somebody looked at a weight."""
        # RemovableHandle counts all hooks that there were
        counts = Transformer.n_texts, RemovableHandle.next_id, len(quantize.PLAIN)
        now = list(starmap(getattr, self.methods))
        if counts != self.counts or now != list(self.methods.values()):
            self.counts = counts
            self.snapshots.clear()
            self.methods.clear()
            contents.cache_clear()
            surroundings.cache_clear()

    def first_time(self, *given: Any) -> Tensor:
        """Look at a block as __call__ is given it, and find its library. The first of a kind runs
        in Python, to see what that leaves behind."""
        *_, cache = given
        new = self.snapshots[cache] = Snapshot(*given)
        name, y = new.fingerprint, None
        if name is None:
            return self.otherwise(*given)
        if name not in self.libraries:
            y = run_block(*given)
            has_state = Snapshot(*given).fingerprint != name
            self.libraries[name] = None if has_state else self.library(name, *given)
        new.library = self.libraries[name]
        for kind in new.kinds - {kind for kind, *_ in self.methods}:
            for key in chain(*map(held, kind.__mro__[:-1])):
                self.methods[kind, key, None] = getattr(kind, key)
        return self(*given) if y is None else y

    def library(self, name: str, *given: Any) -> Library | None:
        """The library of that name for a block as __call__ is given it, None if there is none or
        it cannot be made."""
        try:
            path = (self.folder or cache_folder() / "blocks") / f"{name}.pt2"
            if path.exists():
                return load(path)
            if self.build:
                return compile_to(path, *given)
            self.missing = True
        except Exception as error:  # of what a block does, of a compiler, or of a file system
            say_once(f"no step is compiled ahead of time: {first_line(error)}")
        return None


def undisturbed(library: Library, tensors: list[Tensor]) -> list[Tensor]:
    """Run a library. An exception that a signal raises in an operator of it that is Python, as
    oneDNN's product is, would abort the process, so Python's handlers are called after it."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets any
        return library(tensors)
    waiting: list[tuple[Any, ...]] = []
    handlers = {number: getsignal(number) for number in SIGNALS if callable(getsignal(number))}
    for number in handlers:
        signal(number, lambda *received: waiting.append(received))
    try:
        return library(tensors)
    finally:
        for number, handler in handlers.items():
            signal(number, handler)
        for received in waiting:
            handlers[received[0]](*received)


class FunctionOfTensors(nn.Module):
    """A block as a function of its cache's kv, x, the tensors of its positions and its weights, one
    after the other, which torch.export wants; everything else is part of what it does."""

    def __init__(self, block: nn.Module, positions: Positions):
        super().__init__()
        self.blocks = [block]  # hidden from nn.Module: its weights are to be arguments
        self.positions = positions
        self.places = list(places_of(block))  # of its weights

    def examples(self, x: Tensor, kv: Tensor) -> list[Tensor]:
        """Arguments of a step in the middle of a small cache, of a layer such as kv
        [2, 1, Hkv, S, D]."""
        generator = torch.Generator().manual_seed(0)

        def like(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():  # of tokens
                return torch.full_like(tensor, PLACES // 2)
            return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

        cache = kv.new_empty(2, 1, kv.shape[2], PLACES, kv.shape[4])
        where = [like(value) for value in self.positions if isinstance(value, Tensor)]
        [block] = self.blocks
        return [like(cache), like(x), *where, *weights_of(block)]

    def forward(self, kv: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        where = [next(given) if isinstance(v, Tensor) else v for v in self.positions]
        cache = LayerCache([kv], Places(kv.shape[3]), flash=True)
        [block] = self.blocks
        own = weights_of(block)
        try:
            for (holder, key), tensor in zip(self.places, given, strict=True):
                holder[key] = tensor
            return block(x, Positions(*where), cache)
        finally:
            for (holder, key), tensor in zip(self.places, own):
                holder[key] = tensor

    def agrees(self, library: Library, examples: list[Tensor]) -> bool:
        """Whether a library gives what the block does in Python, up to rounding."""
        kv, *others = examples
        results = []
        for run in (lambda tensors: [self(*tensors)], library):
            own = kv.clone()
            results.append([*run([own, *others]), own])
        return all((x - y).abs().max() <= 0.02 * x.abs().max() for x, y in zip(*results))

# --- what a block is ---


def places_of(block: nn.Module) -> Iterator[tuple[dict[str, Tensor], str]]:
    """Where the tensors are that the operators of a block read: a dictionary and a key."""
    for module in block.modules():
        order = vars(module).get("order")
        in_order = {} if order is None else order.tensors
        for holder in (module._parameters, module._buffers, in_order):
            for key, x in holder.items():
                if x is not None and type(x) is not products.Packed:
                    yield holder, key


def weights_of(block: nn.Module) -> list[Tensor]:
    return [holder[key] for holder, key in places_of(block)]


SETTINGS = (type(None), bool, int, float, str, torch.dtype)
NOT_SETTINGS = vars(nn.Module()).keys() - {"training"} | {"order"}


class NoLibrary(Exception):
    """A block is not plainly a function of tensors."""


class Snapshot:
    """A block with its cache, as they are now: its tensors, and a fingerprint of all that it does.

    That is None if it cannot be all: of what no file has, of hooks, of experts, which Python
    chooses, and of options of attention, which are operators in Python."""

    library: Library | None = None

    def __init__(self, block: nn.Module, x: Tensor, positions: Positions, cache: LayerCache):
        self.block, self.kv, self.weights = block, cache.kv, weights_of(block)
        self.kinds: set[type] = {LayerCache, Places}  # classes and modules whose code it runs
        self.modules: set[ModuleType] = {kernels}
        self.fingerprint: str | None = None
        with contextlib.suppress(NoLibrary):
            self.fingerprint = self.taken(x, positions, cache)

    def taken(self, x: Tensor, positions: Positions, cache: LayerCache) -> str:
        """The fingerprint, or NoLibrary."""
        if of_all._global_forward_hooks or of_all._global_forward_pre_hooks:
            raise NoLibrary
        lines = [of_cache(cache, x.dtype)]
        for name, value in [("x", x), *positions._asdict().items(), *enumerate(self.weights)]:
            lines.append(f"{name} {of_tensor(value) if torch.is_tensor(value) else value}")
        for name, module in self.block.named_modules():
            lines += self.of_part(name, module)
        holders = self.modules.union(*(kind.__mro__[:-1] for kind in self.kinds))
        text = [surroundings(), *sorted(lines), *sorted(map(contents, holders))]
        return hashlib.sha256("\n".join(text).encode()).hexdigest()[:32]

    def of_part(self, name: str, module: nn.Module) -> Iterator[str]:
        """The class and the settings of a module of the block."""
        options = module.options() if isinstance(module, Attention) else {}
        has_options = any(v is not None for key, v in options.items() if key != "scale")
        has_hooks = module._forward_hooks or module._forward_pre_hooks
        if has_options or has_hooks or hasattr(module, "stack") or module in quantize.PLAIN:
            raise NoLibrary
        self.kinds.add(type(module))
        yield f"{name} is a {type(module)}"
        of_rounding = {"error"} if isinstance(module, QuantizedLinear) else set()
        for key in vars(module).keys() - NOT_SETTINGS - of_rounding:
            yield f"{name}.{key} = {self.of_setting(vars(module)[key])}"

    def of_setting(self, value: Any) -> str:
        """A setting, of which nothing changes unless it is replaced."""
        if isinstance(value, SETTINGS):
            return repr(value)
        if isinstance(value, tuple):
            return str([self.of_setting(each) for each in value])
        if isinstance(value, partial):
            return self.of_setting((value.func, value.args, *value.keywords.items()))
        if isinstance(value, FunctionType):
            self.modules.add(home(value))
        elif type(value) in map(type, LAYOUTS.values()):
            self.kinds.add(type(value))
            return self.of_setting((type(value).__qualname__, *vars(value).items()))
        elif not isinstance(value, BuiltinFunctionType) or not is_torch(value):
            raise NoLibrary
        return f"{value.__module__}.{value.__qualname__}"


def of_cache(cache: LayerCache, dtype: torch.dtype) -> str:
    """NoLibrary: it is no layer of a plain KVCache of one row, on a CPU and of that dtype."""
    kv = cache.kv  # [2, 1, Hkv, S, D], of which S may be any
    plain = LayerCache([kv], Places(kv.shape[3]), flash=True)
    for ours, usual in ((cache, plain), (cache.places, plain.places)):
        if type(ours) is not type(usual) or vars(ours).keys() != vars(usual).keys():
            raise NoLibrary
    suits = cache.flash and type(kv) is Tensor and kv.is_cpu and kv.dtype == dtype
    if not suits or not kv.is_contiguous():
        raise NoLibrary
    return f"cache {kv.shape[2]} {kv.shape[4]}"


def of_tensor(tensor: Tensor) -> str:
    """NoLibrary: it is of a kind with operators of its own, or has other values than its memory."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_neg():
        raise NoLibrary
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return f"{tensor.dtype} {tuple(tensor.shape)} {strides} {tensor.layout}"


@lru_cache(maxsize=None)
def contents(holder: type | ModuleType) -> str:
    """What a class or a module holds when a text begins: functions of its own file, or imported,
    and numbers. NoLibrary: no file has all of it."""
    own = sys.modules[holder.__module__] if isinstance(holder, type) else holder
    if own.__name__ == "__main__" or getattr(own, "__file__", None) is None:
        raise NoLibrary  # a script's names change all the time
    found = os.stat(own.__file__)
    if max(found.st_mtime, found.st_ctime) > BEGAN:  # the first may be a copied file's
        raise NoLibrary  # it may run as it was, or be reloaded
    lines = [f"{own.__name__} {holder.__name__} {hash_of(own.__file__)}"]
    if own is not holder and not is_torch(own):
        lines.append(contents(own))
    for name, value in held(holder).items():
        function = behind(value)
        if not isinstance(function, FunctionType):
            if hasattr(value, "__get__"):  # it may be anything
                raise NoLibrary
            lines.append(f"{name} = {value!r}")
            continue
        module = home(function)
        defaults = of_constant((function.__defaults__, *(function.__kwdefaults__ or {}).items()))
        lines.append(f"{name} {type(value)} {hash_of(module.__file__)}")
        lines.append(f"{of_code(function.__code__)} {defaults}")
        if module is not own and (isinstance(holder, type) or name != function.__name__):
            raise NoLibrary  # in the place of another
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@lru_cache(maxsize=None)
def of_code(code: CodeType) -> str:
    """Where in its file a function is, and what it does. Code never changes: another is put."""
    return f"{code.co_firstlineno} {code.co_code!r} {code.co_names} {of_constant(code.co_consts)}"


def of_constant(value: Any) -> str:
    """A constant of a function's code, or a default of its arguments."""
    if isinstance(value, CodeType):
        return of_code(value)
    if isinstance(value, (tuple, frozenset)):
        parts = [of_constant(each) for each in value]
        return str(parts if isinstance(value, tuple) else sorted(parts))
    plain = isinstance(value, (*SETTINGS, bytes))
    return repr(value) if plain else str(getattr(value, "__qualname__", type(value)))


def held(holder: type | ModuleType) -> dict[str, Any]:
    """Functions, descriptors and numbers of a class or a module: of PyTorch's, to which other
    packages add some, those that matter."""
    found, of_torch = {}, is_torch(holder)
    for name, value in vars(holder).items():
        left_out = name in ("progress", "__dict__", "__weakref__")  # cli/ replaces the first
        # torch.compile puts functions among a module's names
        left_out |= isinstance(holder, ModuleType) and name.startswith(("__compiled", "__resume"))
        if left_out or of_torch and name not in ("__call__", "_call_impl", "forward"):
            continue
        is_number = isinstance(value, SETTINGS) and not name.startswith("__")
        is_method = isinstance(holder, type) and hasattr(value, "__get__")
        if is_number or is_method or isinstance(behind(value), FunctionType):
            found[name] = value
    return found


def behind(value: Any) -> Any:
    """The function of a property, a class method or a static one; anything else is itself."""
    return getattr(value, "fget", getattr(value, "__func__", value))


def home(function: FunctionType) -> ModuleType:
    """The module of a function. NoLibrary: it is written elsewhere, as one that was put into the
    place of another is, or it has values of its own, as closures have."""
    module = sys.modules.get(function.__module__)
    code = function.__code__
    if code.co_filename in (contextlib.__file__, _contextlib.__file__):  # their decorators
        return module
    own = set(code.co_freevars) - {"__class__"}  # which super() reads
    elsewhere = module is None or function.__globals__ is not vars(module)
    if own or elsewhere or code.co_filename != getattr(module, "__file__", None):
        raise NoLibrary
    return module


def is_torch(thing: Any) -> bool:
    where = getattr(thing, "__module__", None) or getattr(thing, "__name__", "")  # of a module
    return str(where).startswith("torch.")


@lru_cache
def surroundings() -> str:
    """What all blocks are in when a text begins: what makes libraries, PyTorch, what its operators
    heed, and a library perhaps not, and the machine."""
    ours = map(hash_of, (__file__, str(Path(model.__file__).with_name("generate.py"))))
    switches = (
        torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled, torch.backends.cuda.flash_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
    )
    versions = torch.__version__, torch.__config__.show()
    return "\n".join([*ours, *versions, str(switches), processor()])


@lru_cache
def hash_of(file: str) -> str:
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


def compile_to(
    path: Path, block: nn.Module, x: Tensor, positions: Positions, cache: LayerCache
) -> Library:
    """Make a block's library, for a cache with room for any number of tokens, and keep it there.
    ValueError: it gives something else than the Python, and is not kept."""
    from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir  # takes seconds

    say_once("compiling a block for this CPU, which takes some 15 seconds and is kept")
    for folder in reversed([path.parent, *path.parent.parents]):
        folder.mkdir(0o700, exist_ok=True)  # another process may make it at the same time
    refuse_others(folder.resolve(), folder)  # a compiler runs what it has put there
    function = FunctionOfTensors(block, positions)
    lengths = torch._dynamo.config.patch(capture_scalar_outputs=True)  # as symbols
    # they would lie in TMPDIR, where others may have put some, and are slower for one library
    headers = torch._inductor.config.patch({"aot_inductor.precompile_headers": False})
    with (
        scratch(path.parent, "compiling") as folder, temporary_cache_dir(str(folder)),
        warnings.catch_warnings(), lengths, headers, torch.inference_mode(False), torch.no_grad(),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch about itself
        examples = function.examples(x, cache.kv)
        any_length = {3: torch.export.Dim.DYNAMIC}, None, (None,) * (len(examples) - 2)
        program = torch.export.export(
            function, tuple(examples), dynamic_shapes=any_length, strict=False
        )
        unfinished = folder / path.name
        torch._inductor.aoti_compile_and_package(program, package_path=str(unfinished))
        unfinished.chmod(0o600)
        library = load(unfinished)
        if not function.agrees(library, examples):
            raise ValueError("a library gives something else than the Python")
        os.replace(unfinished, path)  # only now: other processes may load it at once
    with contextlib.suppress(FileNotFoundError):  # another process has thrown it away
        newest_first = sorted(path.parent.glob("*.pt2"), key=os.path.getmtime, reverse=True)
        for old in newest_first[KEPT:]:
            old.unlink()
    return library


def load(path: Path) -> Library:
    """A library out of a file. ValueError: that is damaged, and gone now, or others may have
    written it. RuntimeError: it cannot be loaded here.
    (torch._inductor.aoti_load_package makes the same, and imports Inductor for it.)"""
    unpacked = Path(tempfile.gettempdir()).resolve()
    refuse_others(unpacked, unpacked)
    path = path.parent.resolve() / path.name
    if path.is_symlink() or not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is no plain file")
    with path.open("rb") as file:  # which is loaded, whatever has its name by then
        refuse_others(path, file.fileno())
        try:
            with zipfile.ZipFile(file) as archive:
                for name in archive.namelist():  # BadZipFile: a checksum is another
                    archive.read(name)
        except zipfile.BadZipFile as error:
            path.unlink(missing_ok=True)
            raise ValueError(f"{path} was damaged, and is removed: {first_line(error)}") from error
        with contextlib.suppress(OSError):  # of a folder that may only be read
            os.utime(path)  # the last that is thrown away
        with scratch(unpacked, "loading"):
            name = f"/dev/fd/{file.fileno()}"
            library = torch._C._aoti.AOTIModelPackageLoader(name, "model", True, 1, -1).run
    # which lists operators that may be Python
    has_operators = any(name.endswith(".wrapper.json") for name in archive.namelist())
    return partial(undisturbed, library) if has_operators else library


@contextlib.contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """A workspace, for the temporary files of compilers and of the loader too."""
    with TMPDIR, workspace(parent, name) as folder:
        before = os.environ.get("TMPDIR")
        os.environ["TMPDIR"] = str(folder)
        try:
            yield folder
        finally:
            del os.environ["TMPDIR"]
            if before is not None:
                os.environ["TMPDIR"] = before


def refuse_others(path: Path, opened: Path | int) -> None:
    """ValueError if anybody but the user, a group of their own and root can write what was opened,
    or put another into its place."""
    for each, where in [(path, opened), *zip(path.parents, path.parents)]:
        found = os.stat(where)
        alone = found.st_gid == os.getegid() == os.geteuid() and not names_others(where)
        writable = stat.S_IWOTH if alone else stat.S_IWOTH | stat.S_IWGRP
        sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & writable and not sticky:
            raise ValueError(f"{each} can be written by other users, who might have made it")


def names_others(where: Path | int) -> bool:
    """Whether an access control list names users, who may do at most what is shown of the group."""
    with contextlib.suppress(AttributeError, OSError):  # of systems without such lists
        return "system.posix_acl_access" in os.listxattr(where)
    return False
