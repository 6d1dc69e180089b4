"""The first minutes on a GPU: whether it runs, whether it is right, how fast it is.

    python benchmarks/device.py --seconds 500 --out FOLDER

Each part is a process of its own with a limit, as a fault spoils a process for good, and each
result is a line that is appended to FOLDER/results.jsonl at once: whenever the command ends, what
it found is there. table.md is written anew behind each part, the pictures at the end, log.txt has
what the parts print. Weights are random, so nothing is needed but this folder, the core's packages
and pytest; gpt-fast takes part where --gpt_fast says where it is. `benchmarks/render.py --device
FOLDER/results.jsonl` puts the results into this project's tables. Without a GPU the same parts run
on the CPU in small, so that the command itself is known to work."""
from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "checks")]


def in_child(work: Callable[[], Any]) -> int:
    """Start a process that does it, in a group of its own -> its number. It ends with 1 where the
    work raises or returns False, and with this process if that is killed."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        threading.Thread(target=end_with, args=[parent], daemon=True).start()
        code = int(work() is False)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_with(parent: int) -> None:
    """Kill this process and all that it started once its parent is gone: on a GPU that is lent,
    nothing else would end them."""
    while os.getppid() == parent:
        time.sleep(0.1)
    os.killpg(0, signal.SIGKILL)


# asked in another process: one that has asked cannot start any that use the GPU
CUDA = os.waitpid(in_child(torch.cuda.is_available), 0)[1] == 0
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import render
from cli.arguments import Parser, number
from generate import say
from model import first_line

SHAPE = HERE / "configs" / "Llama-3-8B.json"
SMALL_SHAPE = dict(
    model_type="llama", vocab_size=320, hidden_size=64, num_hidden_layers=2, head_dim=16,
    num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
    max_position_embeddings=256,
)
CAPACITY = 9216 if CUDA else 96
CONTEXTS = (128, 1024, 8192) if CUDA else (16, 32, 64)
BATCHES = (1, 8) if CUDA else (1,)
PROMPTS = (512, 1024, 2048, 4096, 8192, 16384) if CUDA else (16, 32, 64)
ROOMS = (512, 1024) if CUDA else (64,)
VARIANTS = ("bf16", "int8", "int4")

Line = dict[str, Any]  # of results.jsonl: "part" and what the part says


@dataclass
class Job:
    """What a part is told, and where its results go."""

    part: str
    out: Path
    shape: Path
    gpt_fast: Path | None
    only: str | None  # a case of smoke
    ends: float  # time.monotonic()

    def emit(self, **line: Any) -> None:
        with open(self.out / "results.jsonl", "a") as file:
            file.write(json.dumps({"part": self.part, **line}) + "\n")
        say(f"{self.part}: {line}")

    def lines(self, part: str) -> list[Line]:
        """What another part has said."""
        return [line for line in self.all_lines() if line["part"] == part]

    def all_lines(self) -> list[Line]:
        """The results so far."""
        return render.read_lines(self.out / "results.jsonl")

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a large copy."""
        return next((x["copy_gb_s"] * 1e9 for x in self.lines("machine") if "copy_gb_s" in x), nan)

    @property
    def flash_works(self) -> bool:
        """Whether all its cases of smoke ran and were right; those of products come behind them."""
        said = self.lines("smoke")
        cases = [line for line in said if "ok" in line]
        of_products = [line["name"].startswith("product") for line in cases]
        right = all(line["ok"] for line, of_product in zip(cases, of_products) if not of_product)
        return right and (any(of_products) or not said)

    def has(self, seconds: float) -> bool:
        """Whether there is that much time left for another case on a GPU."""
        return not CUDA or self.ends - time.monotonic() > seconds


# --- whether it runs, whether it is right ---


def machine(job: Job) -> None:
    """What a reader needs to know of it."""
    from decode import device_facts
    from cli.stats import copy_bandwidth
    device = "cuda" if CUDA else "cpu"
    facts = device_facts(device) | {"shape": job.shape.stem, "command": " ".join(sys.argv)}
    if CUDA:
        properties = torch.cuda.get_device_properties(0)
        facts["memory_gb"] = properties.total_memory / 1e9
        facts["multiprocessors"] = properties.multi_processor_count
        facts["l2_mb"] = properties.L2_cache_size / 1e6
    job.emit(**facts, copy_gb_s=copy_bandwidth(device, 2**30 if CUDA else 2**24) / 1e9)
    x = torch.ones(1, 1, 8, 64, dtype=torch.bfloat16, device=device)
    F.scaled_dot_product_attention(x, x, x)  # a GPU's first call makes the order
    order = torch._C._get_sdp_priority_order()
    job.emit(sdpa_order=[SDPBackend(each).name for each in order])


def smoke(job: Job) -> None:
    """A line a case; behind a fault of the device nothing more can be said."""
    for name, check in smoke_cases().items():
        if job.only not in (None, name):
            continue
        try:
            check()
            job.emit(name=name, ok=True)
        except Exception as e:
            job.emit(name=name, ok=False, why=f"{type(e).__name__}: {e}"[:300])
            if isinstance(e, torch.AcceleratorError):
                raise


def smoke_cases() -> dict[str, Callable[[], Any]]:
    """The kernels against their references, small cases first, attention before products."""
    import kernels_test as of_attention
    cases: dict[str, Callable[[], Any]] = {}
    # of as many rows each, for which a kernel is compiled
    lengths = ([0, 1, 17], [300, 3000, 64], [30000, 7, 65]) if CUDA else ([0, 1, 17],)
    for lens in lengths:
        for T in (1, 5, 16):
            for kind in ("bf16", "int8"):
                cases[f"flash_decode {kind}, T = {T} behind {lens}"] = partial(
                    check_attention, lens, T, int8=kind == "int8")
    for T in (1, 5, 16):
        cases[f"flash_decode ring, T = {T}"] = partial(check_ring, T)
    if CUDA:
        cases["replayed graph"] = of_attention.test_cuda_graph_follows_the_lengths
        cases["two streams"] = of_attention.test_two_graphs_can_replay_on_two_streams
    for rows in (1, 8, 16, 33):
        for form in ("int8", "int4", "mxfp4"):
            cases[f"product of {form}, {rows} rows"] = partial(check_product, form, rows)
    return cases


def check_attention(lens: list[int], T: int, int8: bool) -> None:
    import kernels_test as test
    heads = dict(Hkv=8, G=4, D=128) if CUDA else {}
    call = test.make(lens, T=T, dtype=torch.bfloat16, int8=int8, append=True, **heads)
    test.check(test.run_torch, call)


def check_ring(T: int) -> None:
    import kernels_test as test
    lens = [0, 17, 33, 150]
    whole = test.make(lens, T=T, dtype=torch.bfloat16, append=True, window=34 - T)
    test.check(test.run_torch, test.as_ring(whole, lens, S=33))


def check_product(form: str, rows: int) -> None:
    import products_test as test
    from products import linear
    N, K = (512, 4096) if CUDA else (24, 128)
    x = test.vectors(rows, K).bfloat16()
    if form == "mxfp4":
        weights = test.expert_weights(form, 4, N, K, torch.bfloat16)
        ids = test.random_choices(rows, 2, 4)
        got = linear.experts_linear(x[:, 0], ids, *weights)
        want = linear.experts_linear_reference(x[:, 0].float(), ids, *weights)
    elif form == "int8":
        weights = test.int8_weights(N, K)
        got = linear.int8_linear(x, *weights)
        want = linear.linear_reference(x.float(), *weights)
    else:
        weights = test.int4_weights(N, K, 32)
        got = linear.packed_int4_linear(x, *linear.pack_int4(*weights))
        want = test.int4_reference(x.float(), *weights)
    test.check_linear(got, want)


def sanitizer(job: Job) -> None:
    """compute-sanitizer's words on the smallest case of smoke that failed."""
    failed = [line["name"] for line in job.lines("smoke") if not line.get("ok", True)]
    if not failed or shutil.which("compute-sanitizer") is None:
        return
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as says:
        command = ["compute-sanitizer", sys.executable, __file__, "--out", folder]
        command += ["--only", failed[0]]
        process = subprocess.Popen(command, stdout=says, stderr=subprocess.STDOUT)
        try:
            process.wait(job.ends - time.monotonic() - 2)
        except subprocess.TimeoutExpired:
            process.kill()  # and not what it runs, for which a pipe would be waited: run_part does
        says.seek(0)
        job.emit(name=failed[0], says=says.read()[-3000:])


class Reporter:
    """A plugin of pytest: a line a test."""

    def __init__(self, job: Job):
        self.job = job

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.failed:
            why = {"why": report.longreprtext[-300:]} if report.failed else {}
            name = report.nodeid.rpartition("::")[2]
            if not report.skipped:
                self.job.emit(name=name, ok=report.passed, **why)


def tests(job: Job, file: str, small: str) -> None:
    """Tests, over many processes where there are as many cores. small: which run on a CPU."""
    import pytest
    arguments = ["-q", "--noconftest", "-p", "no:cacheprovider", str(HERE.parent / "checks" / file)]
    if not CUDA:
        os.environ["GPT_FLASH_TEST_DEVICE"] = "cpu"
        arguments += ["-k", small]
    elif os.cpu_count() >= 4:
        try:
            import xdist
            arguments += ["-n", str(min(14, os.cpu_count() - 2))]
            # Inductor would start as many processes as there are cores in each of these
            os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        except ImportError:
            say("pytest-xdist is not there: one process")
    code = pytest.main(arguments, plugins=[Reporter(job)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!r}")

# --- how fast it is ---


def attempt(job: Job, case: str, seconds: float, work: Callable[[], Any]) -> None:
    """One of several cases, if there is time for it. Where it fails the others are tried all the
    same, but not behind a fault of the device."""
    if not job.has(seconds):
        return job.emit(left_out=f"{case}: no time left")
    try:
        work()
    except Exception as e:
        traceback.print_exc()
        job.emit(left_out=f"{case}: {first_line(e)}")
        if isinstance(e, torch.AcceleratorError):
            raise
    free_memory()


def ours(job: Job, variant: str) -> Any:
    """A model of that variant as decode.py measures it. Its name says so where the kernel is not
    used, as it failed or did not end in smoke."""
    import decode
    made = decode.Ours(job.shape, variant, "cuda" if CUDA else "cpu", compiled=CUDA)
    if not job.flash_works:
        made.variant = made.variant._replace(attention="math")
        made.name += ", math attention"
    return made


def measure(job: Job, contestants: list[Any], batch: int, context: int) -> None:
    """Emit a row of decode.py for each."""
    import decode
    device = "cuda" if CUDA else "cpu"
    args = argparse.Namespace(device=device, prefills=1, rounds=3, steps=9 if CUDA else 2)
    case = decode.Case(batch, context, CAPACITY)
    vocab_size = json.loads(job.shape.read_text())["vocab_size"]
    for row in decode.measure(contestants, case, args, vocab_size):
        if "bytes_read" in row:
            row["share"] = row["bytes_read"] / job.bandwidth / (row["ms"] / 1e3)
        job.emit(**row)


def decode_steps(job: Job) -> None:
    """Of each kind of weights, at several contexts in one capacity. Single rows of all kinds come
    first: compiling one may take half a minute."""
    for batch, variant in itertools.product(BATCHES, VARIANTS):
        attempt(job, f"{variant}, batch {batch}", 8, partial(steps_of, job, batch, variant))


def steps_of(job: Job, batch: int, variant: str) -> None:
    model = ours(job, variant)
    for context in CONTEXTS:
        case = f"{variant}, batch {batch}, context {context}"
        attempt(job, case, 8, partial(measure, job, [model], batch, context))


def profile(job: Job) -> None:
    """The kernels with most time of a step behind the first context."""
    for variant in ("bf16", "int4"):
        attempt(job, variant, 8, partial(kernels_of, job, variant))


def kernels_of(job: Job, variant: str) -> None:
    import decode
    from cli.stats import PROFILED, say_kernels
    model = ours(job, variant)
    model.setup(1, CAPACITY)
    model.context = CONTEXTS[0]
    model.step()
    with torch.profiler.profile() as trace:
        seconds = decode.timed(partial(decode.repeat, model.step, PROFILED))
    n_layer, device = len(model.model.layers), model.model.device
    step_us = 1e6 * seconds / PROFILED
    for us, calls, name in say_kernels(trace, step_us, n_layer, device)[:12]:
        job.emit(variant=variant, step_us=step_us, us=us, calls=calls, kernel=name[:100])


def attention_cases(module: Any) -> Iterator[Any]:
    if not CUDA:
        yield from list(module.cpu_cases())[:2]
        return
    for case in module.gpu_cases():
        known = case.group == "llama3-8b" and len(case.lens) == 1
        if known and case.lens[0] in (1024, 8192, 32768, 131072):
            yield case
    for case in module.gpu_cases():
        if case.group == "flash-attention":
            yield case


def attention(job: Job) -> None:
    """Beside PyTorch's own, out of graphs."""
    import attention as module
    kernels = module.contestants()
    for name in ("SDPA math", "SDPA math compiled", "SDPA efficient"):
        kernels.pop(name, None)
    fixed = {name: kernel for name, kernel in kernels.items() if name != "FlexAttention"}
    if not job.flash_works:
        return job.emit(left_out="flash_decode failed")
    def compare(case: Any) -> None:
        some = fixed if case.group == "flash-attention" else kernels  # others compile for each
        for row in module.measure(case, some, job.bandwidth, 20 if CUDA else 1):
            job.emit(**row)

    for case in attention_cases(module):
        name = f"{case.group}, batch {len(case.lens)}, length {max(case.lens)}"
        attempt(job, name, 3, partial(compare, case))


def prefill(job: Job) -> None:
    """Seconds of a prompt's first pass and of one more."""
    for variant in VARIANTS:
        attempt(job, variant, 3, partial(prompts_of, job, variant))


def prompts_of(job: Job, variant: str) -> None:
    import decode
    model = ours(job, variant)
    model.model.setup_caches(1, max(PROMPTS))
    for n in PROMPTS if variant == "bf16" else PROMPTS[2:3]:
        tokens = torch.ones(1, n, dtype=torch.int64, device=model.model.device)
        first, again = (decode.timed(partial(model.prefill, tokens)) for _ in range(2))
        job.emit(variant=variant, tokens=n, first_ms=1e3 * first, ms=1e3 * again)


def rooms(job: Job) -> None:
    """Steps by either attention in little room, where auto takes math; each is compiled for."""
    import decode
    model = ours(job, "bf16")

    def step_in(room: int, how: str) -> None:
        model.variant = model.variant._replace(attention=how)
        compile_s = model.setup(1, room)
        model.context = room - 1
        ms = decode.summarize(decode.time_steps(model, 20), 1)["ms"]
        job.emit(room=room, attention=how, ms=ms, compile_s=compile_s)

    ways = ("flash", "math") if job.flash_works else ("math",)
    for room, how in itertools.product(ROOMS, ways):
        attempt(job, f"{how} in {room}", 12, partial(step_in, room, how))


def free_memory() -> None:
    gc.collect()  # a compiled model holds itself
    if CUDA:
        torch.cuda.empty_cache()


def peer(job: Job, name: str) -> None:
    """Another project's steps of the same shape, where it is there."""
    if name == "gpt-fast" and job.gpt_fast is None:
        return job.emit(left_out="no --gpt_fast PATH")
    import decode
    from model import ModelConfig
    hf = json.loads(job.shape.read_text())
    device = "cuda" if CUDA else "cpu"
    try:
        if name == "gpt-fast":
            config = ModelConfig.from_hf(hf)
            made = decode.GptFast(job.gpt_fast, config, device, compiled=CUDA)
        else:
            made = decode.Transformers(hf, device)
    except ImportError as e:
        return job.emit(left_out=str(e))
    for context in CONTEXTS[:2]:
        attempt(job, f"context {context}", 3, partial(measure, job, [made], 1, context))


def pictures(job: Job) -> None:
    """attention.png and decode.png, of what there is."""
    try:
        import matplotlib
    except ImportError:
        return job.emit(left_out="no matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot
    import attention as module
    run = render.run_of(job.all_lines())
    if render.has_curve(run):
        render.draw(run, job.out / "decode.png")
    rows = [line for line in job.lines("attention") if line.get("us")]
    if rows:
        path = str(job.out / "attention.png")
        module.plot(path, pyplot, rows, job.bandwidth, run["device"])

# --- one after the other ---


class Part(NamedTuple):
    name: str
    seconds: float  # in proportion; what one leaves, the next ones have
    run: Callable[[Job], None]


PARTS = [
    Part("machine", 15, machine),
    Part("smoke", 50, smoke),  # some 24 kernels are compiled, one after the other
    Part("sanitizer", 30, sanitizer),  # which has little to do where nothing failed
    Part("cuda_test", 70, partial(tests, file="cuda_test.py", small="llama and not bfloat16")),
    Part("kernels_test", 60, partial(tests, file="kernels_test.py", small="no_rows")),
    Part("decode", 100, decode_steps),
    Part("profile", 25, profile),
    Part("attention", 60, attention),
    Part("prefill", 30, prefill),
    # these two compile all layers, where ours has one: a minute or more each
    Part("gpt-fast", 75, partial(peer, name="gpt-fast")),
    Part("transformers", 60, partial(peer, name="transformers")),
    Part("rooms", 40, rooms),
    Part("pictures", 10, pictures),
]


def run_part(part: Part, job: Job) -> None:
    """In a process of its own, killed with all that it started where the time is over."""
    began = time.monotonic()

    def work() -> None:
        with open(job.out / "log.txt", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        part.run(job)

    pid = in_child(work)
    how = "limit"
    try:
        while time.monotonic() < job.ends:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                how = "done" if code == 0 else f"exit code {code}, see log.txt"
                break
            time.sleep(0.05)
    finally:
        try:
            os.killpg(pid, signal.SIGKILL)  # and what it left running
        except ProcessLookupError:
            pass
        if how == "limit":
            os.waitpid(pid, 0)
    job.emit(ended=how, seconds=round(time.monotonic() - began, 2))


def run(args: argparse.Namespace, shape: Path) -> None:
    if not CUDA:
        say("device.py: PyTorch sees no GPU: the same parts in small, on the CPU")
    began = time.monotonic()
    job = Job("", args.out, args.shape or shape, args.gpt_fast, args.only, began + args.seconds)
    if args.only:  # here: under compute-sanitizer
        job.part = "smoke"
        return smoke(job)
    planned = 0.0
    for part in PARTS:
        planned += part.seconds / sum(each.seconds for each in PARTS) * args.seconds
        job.part = part.name
        job.ends = began + planned
        if args.parts and part.name not in args.parts:
            continue
        run_part(part, job)
        table = render.device_section(job.all_lines())
        (args.out / "table.md").write_text(table)
    print(table)


def main() -> None:
    p = Parser("device.py", description=__doc__.splitlines()[0])
    add = p.add_argument
    add("--out", metavar="FOLDER", type=Path, required=True, help="where the results go")
    add("--seconds", metavar="N", type=number(float, 10), default=500.0,
        help="in all, from 10; default: 500")
    add("--parts", metavar="PART", nargs="+", choices=[part.name for part in PARTS],
        help="of %(choices)s; default: all")
    add("--shape", metavar="FILE", type=Path,
        help="a config.json; default: Llama-3-8B's, on a CPU a tiny one")
    add("--gpt_fast", metavar="PATH", type=Path, help="a checkout of gpt-fast, a further peer")
    add("--only", metavar="CASE", help="one case of smoke alone, in this process")
    args = p.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "results.jsonl").open("x").close()
    except OSError as e:
        other = "; results of each run take a folder of their own" * isinstance(e, FileExistsError)
        p.error(f"cannot make --out {args.out}/results.jsonl: {e.strerror}{other}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends the part too
    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPE
        if not CUDA:
            shape = Path(folder) / "tiny.json"
            shape.write_text(json.dumps(SMALL_SHAPE))
        run(args, shape)


if __name__ == "__main__":
    main()
