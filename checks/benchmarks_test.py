"""The benchmarks run, and their README says what their results say."""
import copy
import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks import attention, decode, quality, quantizers, render
from benchmarks.decode import write_gguf
from checks.common import CONFIG, CPU_ENV, HERE, PATIENCE_S, hf_folder, ours, state_of, wait_until
from formats import save_tokenizer
from formats.default import default_model
from generate import Tokenizer
from model import ModelConfig, load_model


def python(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """python as users run it, in the repository's folder."""
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=HERE, env=CPU_ENV, capture_output=True, text=True)

# --- benchmarks/render.py ---


def test_readme_says_what_the_results_say() -> None:
    done = python("benchmarks/render.py", "--check")
    assert done.returncode == 0, done.stderr


MACHINE = dict(part="machine", device="GPU", torch="2.11.0", triton="3.6.0", date="today",
               copy_gb_s=4000.0, shape="Llama-3-8B", command="device.py --out x")


def device_lines(smoke: bool = True) -> list[dict[str, Any]]:
    """What benchmarks/device.py may find on a GPU."""
    step = dict(batch=1, context=128, capacity=9216, compile_s=9.0, first_token_s=0.1)
    ended = [dict(part=part, ended="done", seconds=3.0)
             for part in ("smoke", "cuda_test", "kernels_test", "decode")]
    return [
        MACHINE,
        dict(part="smoke", name="int8, 1 rows", ok=smoke, why="wrong"),
        dict(part="cuda_test", name="test_tokens", ok=True),
        dict(part="kernels_test", name="test_fuzz", ok=True),
        dict(part="decode", contestant="gpt-flash bf16", ms=4.0, share=0.9375, bytes_read=15e9,
             tokens_per_s=250.0, **step),
        dict(part="gpt-fast", contestant="gpt-fast", ms=6.0, tokens_per_s=160.0, **step),
        dict(part="transformers", left_out="not there"),
        *ended,
    ]


def test_results_of_a_gpu_take_the_place_of_the_sentence_that_there_are_none() -> None:
    assert "Nothing has run on a GPU" in render.gpu_paragraph([])
    text = render.gpu_paragraph(device_lines())
    assert "| gpt-flash bf16 | 4.00 (94%) |" in text
    assert "| gpt-fast | 6.00 |" in text
    assert "Nothing has run" not in text and "Not all checks" not in text


def test_results_with_a_failed_check_say_so() -> None:
    failed = device_lines(smoke=False)
    assert "Not all checks passed" in render.gpu_paragraph(failed)
    assert "Unverified" in render.device_section(failed)
    assert "- int8, 1 rows: wrong" in render.device_section(failed)
    cut_off = [line for line in device_lines() if line["part"] != "cuda_test"]
    assert "Unverified" in render.device_section(cut_off)
    assert "Unverified" not in render.device_section(device_lines())


def test_there_is_a_table_wherever_results_are_cut_off(tmp_path: Path) -> None:
    """In the middle of a line too."""
    text = "".join(json.dumps(line) + "\n" for line in device_lines())
    file = tmp_path / "results.jsonl"
    for n in range(len(text)):
        file.write_text(text[:n])
        lines = render.read_lines(file)
        assert len(lines) in (text.count("\n", 0, n), text.count("\n", 0, n + 1))
        assert ("GPU, torch 2.11.0" in render.device_section(lines)) == bool(lines)


def test_results_that_were_cut_off_go_into_the_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for page in ("README.md", "benchmarks/README.md"):
        (tmp_path / page).write_text((HERE / page).read_text())
    monkeypatch.setattr(render, "HERE", folder)
    monkeypatch.setattr(render, "DEVICE", folder / "device.jsonl")
    found = "".join(json.dumps(line) + "\n" for line in device_lines())
    (tmp_path / "found").write_text(found[:-9])
    monkeypatch.setattr(sys, "argv", ["render.py", "--device", str(tmp_path / "found")])
    render.main()
    assert "| gpt-flash bf16 | 4.00 (94%) |" in (tmp_path / "README.md").read_text()
    assert "**Unverified" not in (folder / "README.md").read_text()
    assert render.device_lines() == device_lines()[:-1]

# --- benchmarks/device.py ---

@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """It, on a CPU, without what it leaves in the environment."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "path", [str(HERE / "benchmarks"), *sys.path])
    from benchmarks import device
    return device


OF_FLASH = dict(part="smoke", name="flash_decode bf16", ok=True)
OF_PRODUCT = dict(part="smoke", name="product of int8, 1 rows", ok=True)
LIMIT = dict(part="smoke", ended="limit")


@pytest.mark.parametrize("said, works", [
    ([], True),
    ([OF_FLASH, OF_PRODUCT], True),
    ([OF_FLASH, OF_PRODUCT | dict(ok=False)], True),
    ([OF_FLASH | dict(ok=False), OF_PRODUCT], False),
    ([OF_FLASH, LIMIT], False),  # it hung in one of its own
    ([LIMIT], False),
])
def test_flash_is_timed_unless_its_own_checks_fail_or_hang(
    device: ModuleType, tmp_path: Path, said: list[dict[str, Any]], works: bool
) -> None:
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    assert device.Job("decode", tmp_path, tmp_path, None, None, 0.0).flash_works == works


@pytest.mark.parametrize("kind", [ValueError, torch.OutOfMemoryError, RuntimeError])
def test_weights_that_fail_leave_others_their_rows(
    device: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """As where there is no room for them, or a kernel does not compile."""
    def ours(job: Any, variant: str) -> str:
        if variant == "bf16":
            raise kind("loading x needs 16.1 GB but cuda has 8.0 GB free; take a smaller one")
        return variant

    monkeypatch.setattr(device, "ours", ours)
    monkeypatch.setattr(device, "measure", lambda job, models, *_: job.emit(variant=models[0]))
    device.decode_steps(device.Job("decode", tmp_path, tmp_path, None, None, 0.0))
    lines = results_in(tmp_path)
    assert lines[0]["left_out"].startswith("bf16, batch 1: loading x needs 16.1 GB")
    assert {line["variant"] for line in lines[1:]} == {"int8", "int4"}
    table = render.device_section([MACHINE, *lines])
    assert "- decode, left out: bf16, batch 1: loading x" in table


def test_behind_a_fault_of_the_device_nothing_is_tried(
    device: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ours(job: Any, variant: str) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(device, "ours", ours)
    with pytest.raises(torch.AcceleratorError):
        device.decode_steps(device.Job("decode", tmp_path, tmp_path, None, None, 0.0))
    [line] = results_in(tmp_path)
    assert "illegal memory access" in line["left_out"]


def test_rows_say_where_the_kernel_was_not_used(device: ModuleType, tmp_path: Path) -> None:
    """Of weights that only look like those of the rows beside them."""
    (tmp_path / "tiny.json").write_text(json.dumps(CONFIG))
    job = device.Job("decode", tmp_path, tmp_path / "tiny.json", None, None, 0.0)
    (tmp_path / "results.jsonl").write_text(json.dumps(LIMIT) + "\n")
    made = device.ours(job, "bf16")
    assert made.name.endswith("bf16, math attention") and made.variant.attention == "math"


def test_a_part_ends_with_the_command_however_that_ends(
    device: ModuleType, tmp_path: Path
) -> None:
    """And so does what the part has started: a GPU that is lent is free for the next command."""
    started = tmp_path / "started"

    def part() -> None:
        helper = subprocess.Popen(["sleep", str(PATIENCE_S)])
        started.write_text(f"{os.getpid()} {helper.pid} all")
        helper.wait()

    command = device.in_child(lambda: device.in_child(part) and signal.pause())
    wait_until(lambda: started.exists() and started.read_text().endswith("all"))
    os.kill(command, signal.SIGKILL)
    os.waitpid(command, 0)
    for process in started.read_text().split()[:2]:
        wait_until(lambda: state_of(int(process)) == "Z")


def test_what_the_sanitizer_said_is_kept_where_its_time_is_over(
    device: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a process that runs another one, which outlives it, and is not waited for."""
    tool = tmp_path / "compute-sanitizer"
    sleeper = tmp_path / "sleeper"
    tool.write_text(
        f"#!/bin/sh\necho Invalid __global__ write\nsleep 999 &\necho $! > '{sleeper}'\nwait\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "results.jsonl").write_text(json.dumps(OF_FLASH | dict(ok=False)) + "\n")

    def time_is_over(process: subprocess.Popen, seconds: float) -> None:
        wait_until(lambda: sleeper.exists() and sleeper.read_text().endswith("\n"))
        raise subprocess.TimeoutExpired(process.args, seconds)

    monkeypatch.setattr(subprocess.Popen, "wait", time_is_over)
    device.sanitizer(device.Job("sanitizer", tmp_path, tmp_path, None, None, 0.0))
    os.kill(int(sleeper.read_text()), signal.SIGKILL)  # it is still there
    assert results_in(tmp_path)[-1]["says"] == "Invalid __global__ write\n"


# as on a machine that has what the core needs, and no more
DEVICE_COMMAND = """
import runpy
import sys
sys.modules["gguf"] = None
runpy.run_path("benchmarks/device.py", run_name="__main__")
"""


def results_in(folder: Path) -> list[dict[str, Any]]:
    file = folder / "results.jsonl"
    if not file.exists():
        return []
    *lines, _ = file.read_text().split("\n")  # the last one may not be whole yet
    return list(map(json.loads, lines))


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes on a GPU")
def test_the_command_for_a_gpu_runs_on_a_cpu_in_small(tmp_path: Path) -> None:
    """All of its parts, with a result of each and no more files than one may bring back."""
    done = python("-c", DEVICE_COMMAND, "--seconds", "9000", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    lines = results_in(tmp_path / "out")
    log = (tmp_path / "out" / "log.txt").read_text()
    ended = {line["part"]: line["ended"] for line in lines if "ended" in line}
    assert set(ended.values()) == {"done"}, log
    assert list(ended) == [
        "machine", "smoke", "sanitizer", "cuda_test", "kernels_test", "decode", "profile",
        "attention", "prefill", "gpt-fast", "transformers", "rooms", "pictures",
    ]
    said = {line["part"] for line in lines if "ended" not in line}
    assert ended.keys() - said <= {"sanitizer", "pictures"}
    assert all(line.get("ok", True) for line in lines), log
    for part in ("decode", "prefill"):
        of_part = [str(line) for line in lines if line["part"] == part]
        assert all(any(kind in text for text in of_part) for kind in ("bf16", "int8", "int4"))
    table = (tmp_path / "out" / "table.md").read_text()
    assert "**gpt-flash int4**" in table and "Unverified" not in table
    assert len(list((tmp_path / "out").iterdir())) <= 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes on a GPU")
def test_what_was_found_before_the_command_is_killed_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "benchmarks/device.py", "--out", str(out)]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, cwd=HERE, env=CPU_ENV, **quiet)

    def has_found_some() -> bool:
        assert process.poll() is None
        return sum(line["part"] == "smoke" for line in results_in(out)) >= 3

    try:
        wait_until(has_found_some)
    finally:
        process.terminate()
    assert process.wait(PATIENCE_S) != 0
    lines = results_in(out)
    assert lines[0]["part"] == "machine" and lines[0]["copy_gb_s"] > 0
    assert sum(line["part"] == "smoke" for line in lines) >= 3
    assert "| machine |" in (out / "table.md").read_text()
    again = python("benchmarks/device.py", "--out", out)
    assert again.returncode == 2 and "File exists" in again.stderr
    assert results_in(out)[:len(lines)] == lines

# --- benchmarks/decode.py ---


def test_decode_benchmark_runs(tmp_path: Path) -> None:
    """A tiny shape, with transformers beside ours."""
    shape = tmp_path / "tiny.json"
    shape.write_text(json.dumps(CONFIG))
    results = tmp_path / "results.json"
    done = python(
        "benchmarks/decode.py",
        "--shape", shape,
        "--contexts", "8",
        "--capacities", "32",
        "--variants", "bf16", "int8", "flash-int8kv",
        "--peers", "transformers",
        "--rounds", "1",
        "--steps", "3",
        "--device", "cpu",
        "--json", results,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    ours = ["gpt-flash bf16", "gpt-flash int8", "gpt-flash flash-int8kv"]
    assert [row["contestant"] for row in rows] == [*ours, "transformers"]
    assert all(row["ms"] > 0 for row in rows)
    assert json.loads(results.read_text())[0]["rows"] == rows


class Peer(decode.Contestant):
    """Fails at one of its three works, or at none."""

    def __init__(self, fails: str, error: type[Exception] = RuntimeError):
        self.name = f"fails in {fails}"
        self.fails, self.error = fails, error

    def work(self, name: str) -> float:
        if name == self.fails:
            raise self.error("a peer that knows no such torch")
        return 0.0

    def setup(self, batch: int, capacity: int) -> float:
        return self.work("setup")

    def prefill(self, tokens: Tensor) -> None:
        self.work("prefill")

    def step(self) -> None:
        self.work("step")


def test_a_peer_that_fails_leaves_others_their_rows() -> None:
    """Unless it is the last, or the device has gone."""
    case, args = decode.Case(1, 4, 8), Namespace(device="cpu", prefills=2, rounds=1, steps=2)
    peers = [Peer(fails) for fails in ("setup", "prefill", "step", "nothing")]
    [row] = decode.measure(peers, case, args, 9)
    assert row["contestant"] == "fails in nothing" and row["ms"] >= 0
    with pytest.raises(RuntimeError, match="knows no such torch"):
        decode.measure(peers[:3], case, args, 9)
    with pytest.raises(torch.AcceleratorError):
        decode.measure([Peer("setup", torch.AcceleratorError), peers[-1]], case, args, 9)


def test_decode_benchmark_takes_a_gguf_file() -> None:
    done = python(
        "benchmarks/decode.py",
        "--shape", default_model(),
        "--contexts", "8",
        "--capacities", "32",
        "--variants", "auto",
        "--rounds", "1",
        "--steps", "3",
        "--device", "cpu",
    )
    assert done.returncode == 0, done.stderr
    [row] = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert row["contestant"] == "gpt-flash auto"
    # of the integers as they are: half of what bfloat16 is
    assert row["bytes_read"] < 1.2e8


def test_llama_cpp_gets_a_file_of_the_shape(tmp_path: Path) -> None:
    config = ModelConfig.from_hf({**CONFIG, "rope_theta": 5e5})
    file = tmp_path / "model.gguf"
    write_gguf(file, config, GGMLQuantizationType.BF16)
    model = load_model(file)
    for name in ("n_layer", "n_head", "n_kv_head", "dim", "ffn_dim", "vocab_size"):
        assert getattr(model.config, name) == getattr(config, name)
    assert model.config.ropes[0].theta == config.ropes[0].theta

# --- benchmarks/batching.py ---


def test_batching_benchmark_runs(tmp_path: Path) -> None:
    """All contestants make the same tokens, and ours wastes the fewest row-steps."""
    shape = tmp_path / "tiny.json"
    shape.write_text(json.dumps(CONFIG))
    done = python(
        "benchmarks/batching.py",
        "--shape", shape,
        "--prompts", "9",
        "--shortest", "2",
        "--longest", "30",
        "--batch_size", "3",
        "--device", "cpu",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert rows.keys() == {"continuous", "fixed", "transformers"}
    assert len({row["new_tokens"] for row in rows.values()}) == 1
    shares = [rows[name]["useful_share"] for name in ("transformers", "fixed", "continuous")]
    assert shares == sorted(shares) and shares[-1] > 0.9
    assert rows["continuous"]["steps"] < rows["fixed"]["steps"]

# --- benchmarks/speculate.py ---


def test_speculate_benchmark_runs(talking_folder: Callable[..., Path], tmp_path: Path) -> None:
    """With one draft and prompt lookup; plain decoding says the same."""
    folder = talking_folder(tmp_path / "model", max_position_embeddings=2048)
    done = python(
        "benchmarks/speculate.py",
        "--checkpoint_path", folder,
        "--speculate_k", "2",
        "--draft_quantize", "int8",
        "--dtype", "float32",
        "--max_new_tokens", "6",
        "--rounds", "1",
        "--device", "cpu",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    ways = ["plain", "lookup 2", "int8 draft 2"]
    rows = result["rows"]
    assert [(row["text"], row["how"]) for row in rows] == [
        *(("edit", how) for how in ways), *(("story", how) for how in ways)
    ]
    assert all(row["runs_with_the_same_text"] == 1 for row in rows)
    for shares in result["agreement"].values():
        best = shares["agreement_of_rejection_sampling"]
        assert 0.8 < shares["agreement_of_common_noise"] < best + 0.05

# --- benchmarks/attention.py ---


def test_benchmark_runs(tmp_path: Path) -> None:
    """Every kernel that takes part has a time, or a reason why it has none."""
    results = tmp_path / "results.json"
    done = python(
        "benchmarks/attention.py",
        "--only", "ragged", "int8",
        "--rounds", "1",
        "--json", results,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(results.read_text())
    assert result["copy_bandwidth"] > 0
    rows = result["rows"]
    assert {row["group"] for row in rows} == {"ragged", "int8"}
    for row in rows:
        if row["kernel"] == "ours":
            assert row["us"] > 0
        if row["us"] is None:
            assert row["why"]


def test_compiled_peers_stay_compiled(dynamo: None, no_inductor: None) -> None:
    """However many shapes there are: behind dynamo's limit of eight they would run eagerly."""
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=8):
        kernel = attention.compiled(attention.sdpa_math)
        for n in range(1, 13):
            case = attention.Case("", 8, 2, 64, [16 * n], 16 * n, torch.bfloat16)
            kernel(attention.make_inputs(case))
            assert counters["stats"]["unique_graphs"] == n


def test_rows_are_written_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A run that ends in the middle leaves what it measured."""
    def fail_behind_one(x: attention.Inputs) -> Tensor:
        if x.common_len is None:
            return attention.ours(x)
        raise torch.AcceleratorError("a fault of the device")

    results = tmp_path / "results.json"
    flags = ["--only", "ragged", "int8", "--rounds", "1", "--json", str(results)]
    monkeypatch.setattr(sys, "argv", ["attention.py", *flags])
    monkeypatch.setattr(attention, "contestants", lambda: {"ours": fail_behind_one})
    monkeypatch.setattr(attention, "copy_bandwidth", lambda *_: 1e10)
    with pytest.raises(torch.AcceleratorError, match="a fault"):
        attention.main()
    [row] = json.loads(results.read_text())["rows"]
    assert row["group"] == "ragged" and row["us"] > 0


def test_a_case_that_ours_cannot_do_leaves_others_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And ends the run with an exit code."""
    def fail_at_first(x: attention.Inputs) -> Tensor:
        if x.common_len is None:
            raise RuntimeError("out of resource: shared memory")
        return attention.ours(x)

    results = tmp_path / "results.json"
    flags = ["--only", "ragged", "int8", "--rounds", "1", "--json", str(results)]
    monkeypatch.setattr(sys, "argv", ["attention.py", *flags])
    kernels = {"ours": fail_at_first, "SDPA math": attention.sdpa_math}
    monkeypatch.setattr(attention, "contestants", lambda: kernels)
    monkeypatch.setattr(attention, "copy_bandwidth", lambda *_: 1e10)
    with pytest.raises(SystemExit, match="ours failed in 1 cases: RuntimeError: out of resource"):
        attention.main()
    rows = json.loads(results.read_text())["rows"]
    assert [row["us"] is None for row in rows] == [True, False, False, False]


PLOT_WITHOUT_MATPLOTLIB = """
import runpy
import sys
sys.modules["matplotlib"] = None
sys.argv = ["attention.py", "--plot", "x.png"]
runpy.run_path("benchmarks/attention.py", run_name="__main__")
"""


def test_plot_needs_matplotlib() -> None:
    done = python("-c", PLOT_WITHOUT_MATPLOTLIB)
    assert done.returncode == 2, done.stderr
    assert "needs matplotlib" in done.stderr

# --- benchmarks/quality.py ---


def test_quality_prints_a_table(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "model", vocab_size=49152)
    save_tokenizer(default_model(), folder)
    text = tmp_path / "text"
    text.write_text("It was the best of times, it was the worst of times, " * 5)
    other_text = tmp_path / "other text"
    other_text.write_text("It was the age of wisdom, it was the age of foolishness, " * 15)
    done = python(
        "benchmarks/quality.py",
        "--checkpoint_path", folder,
        "--perplexity", text,
        "--calibrate", other_text,
        "--dtype", "float32",
        "--device", "cpu",
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    # weights and cache, from the most bytes to the fewest
    assert [row[:2] for row in rows] == [
        ["float32", "float32"],
        ["float32", "int8"],
        ["int8", "float32"],
        ["int8", "int8"],
        ["int8+text", "float32"],
        ["int4", "float32"],
        ["int4", "int8"],
        ["int4+text", "float32"],
    ]
    assert rows[5][7] == rows[7][7] and rows[2][7] == rows[4][7]  # text costs no bytes
    megabytes = [float(row[7]) for row in rows if row[0][-5:] != "+text"]
    assert megabytes == sorted(megabytes, reverse=True)
    # the first row is what the others are compared with: change, mean and largest KL, tokens
    assert rows[0][3:7] == ["+0.00%", "0.00e+00", "0.00e+00", "0.00%"]
    assert all(0 < float(row[4]) < float(row[5]) for row in rows[1:])


def test_a_model_reads_its_own_text_and_what_changes_it_shows(tmp_path: Path) -> None:
    reference = load_model(hf_folder(tmp_path / "model"), dtype=torch.float32)
    tokenizer = Tokenizer(None, 320, {}, None, {7})
    ids = quality.own_text(reference, tokenizer, 300)
    assert len(ids) == 300 and len(set(ids)) > 100
    assert ids == quality.own_text(reference, tokenizer, 300)
    assert [ids[i] for i in (0, 128, 256)] == [7, 7, 7]  # the model's context is 128

    # one token of the vocabulary is likelier everywhere
    model = load_model(hf_folder(tmp_path / "other"), dtype=torch.float32)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(320).index_fill_(0, torch.tensor(3), 9.0))
    same = quality.measure(copy.copy(reference), ids[:60], reference=reference)
    other = quality.measure(model, ids[:60], reference=reference)
    assert same[1:] == (0, 0, 0) and other.changed == 1
    assert 1 < other.kl < other.max_kl < 9


def test_what_llama_cpp_is_given_is_the_model(tmp_path: Path) -> None:
    model = load_model(hf_folder(tmp_path / "model"), dtype=torch.float32)
    quantizers.write_gguf(model, tmp_path / "f32.gguf")
    other, nbytes = quantizers.load(tmp_path / "f32.gguf", dtype=torch.float32)
    assert nbytes == sum(x.nbytes for x in model.parameters()) - model.embed_tokens.weight.nbytes
    ids = list(range(100))
    logits = []
    for each in (model, other):
        each.setup_caches(1, 128)
        logits.append(each(torch.tensor([ids]), torch.zeros(1, dtype=torch.int32)))
    assert logits[0].equal(logits[1])

    matrix = quantizers.importance(model, ids)
    inputs = model.layers[0].input_layernorm(model.embed(torch.tensor(ids)))
    for name in ("attn_q", "attn_k", "attn_v"):
        assert torch.allclose(matrix[f"blk.0.{name}.weight"], inputs.square().mean(0), rtol=1e-4)
    shapes = {
        x.name: x.shape[0] for x in GGUFReader(tmp_path / "f32.gguf").tensors
        if len(x.shape) == 2 and x.name != "token_embd.weight"
    }
    assert {name: len(x) for name, x in matrix.items()} == shapes


@pytest.mark.parametrize("args, message", [
    ("", "--perplexity"),
    ("--perplexity /nowhere/at-all", "cannot read /nowhere/at-all"),
    ("--perplexity README.md --checkpoint_path /nowhere/at-all", "no such file"),
    ("--perplexity README.md --modes int3", "invalid choice"),
    ("--perplexity README.md --group_size 48", "invalid choice"),
    ("--perplexity README.md --device nonsense", "--device nonsense"),
    ("--perplexity README.md --own_text 9", "not allowed with"),
    ("--own_text 1", "at least 2"),
])
def test_mistakes_get_one_line(args: str, message: str) -> None:
    done = python("benchmarks/quality.py", *args.split())
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert ours(done.stderr).count("\n") == 1
    assert not done.stdout
