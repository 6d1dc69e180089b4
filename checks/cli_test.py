"""Tests of cli/: the flags and statistics. None needs a model."""
import argparse
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.autograd import DeviceType

import cli.answer
import cli.stats
import generate
from batching import Stats
from checks.common import CPU_ENV, HERE
from cli.arguments import is_plain, make_parser, number, parse_args
from cli.errors import sentences
from cli.files import in_place_of
from cli.stats import PROFILED, copy_bandwidth, profile, read_trace, say_kernels, summarize
from formats.default import default_model

CPU = ["--device", "cpu"]


def test_what_cannot_be_read_is_said_though_stdout_is_closed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as end, sentences():
        raise OSError(errno.EIO, "Input/output error", "weights")
    assert end.value.code == 2
    said = "generate.py: error: cannot read or write weights: Input/output error\n"
    assert capsys.readouterr().err == said


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_while_the_program_begins_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.answer, "become_a_program", interrupt)
    with pytest.raises(SystemExit) as end:
        cli.main(None)
    assert end.value.code == 130


def test_ctrl_c_while_python_shuts_down_ends_it_without_a_word(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing catches an exception any more."""
    handlers = {signal.SIGHUP: signal.SIG_IGN}  # as under nohup
    monkeypatch.setattr(sys, "stdout", None)  # which else would get another encoding
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(signal, "getsignal", handlers.get)
    for answer in (interrupt, lambda argv, team: None):
        monkeypatch.setattr(cli.answer, "answer", answer)
        with pytest.raises(SystemExit) if answer is interrupt else nullcontext():
            cli.main(None)
        assert handlers == {
            signal.SIGINT: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL,
            signal.SIGHUP: signal.SIG_IGN,
        }


def test_a_signal_counts_though_leaving_what_it_cut_short_fails() -> None:
    """PyTorch has a mode off its stack for a moment, as while it makes layers on meta."""
    with pytest.raises(SystemExit) as end, sentences(), torch.device("meta"):
        torch.overrides._pop_mode()
        sys.exit(143)  # as SIGTERM's handler does
    assert end.value.code == 143
    with pytest.raises(RuntimeError, match="empty mode stack"), sentences(), torch.device("meta"):
        torch.overrides._pop_mode()


# --- statistics ---

STATS = Stats(
    load_s=1.5,
    prompt_tokens=60,
    new_tokens=40,
    first_token_s=[0.5, 0.25],
    steps_s=[0.004, 0.002, 0.001, 0.002, 0.003, 0.002, 0.002, 0.002, 0.002, 0.002],
    decode_tokens=36,
    row_steps=40,
    useful_row_steps=36,
    wall_s=0.8,
)
@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """One that has run, with 10**9 bytes of weights, and 100,000 bytes a token cached."""
    monkeypatch.setattr(cli.stats, "weight_bytes", lambda model, rows: 10**9)
    monkeypatch.setattr(cli.stats, "bytes_read", lambda cache, length: 100_000 * length)
    cache = SimpleNamespace(nbytes=400_000_000, max_batch_size=4)
    return SimpleNamespace(
        stats=STATS, device=torch.device("cpu"), cache=cache, k=0, models=lambda: ["a model"]
    )


@pytest.fixture
def ten_gb_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that copies at 10 GB/s."""

    def bandwidth(device: torch.device, nbytes: int) -> float:
        return 1e10

    monkeypatch.setattr(cli.stats, "copy_bandwidth", bandwidth)


def test_summary(
    engine: SimpleNamespace, ten_gb_s: None, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = summarize(engine, measure=True)
    # four requests hold 15 prompt tokens and, on average, 5 new ones, at 100,000 bytes; a step has
    # 3.6 of them
    read = 10**9 + 72 * 100_000
    want = {
        "load_s": 1.5,
        "compile_s": 0.0,
        "prompts": 4,
        "prompt_tokens": 60,
        "shared_prompt_tokens": 0,
        "first_token_s": 0.375,
        "new_tokens": 40,
        "ms_per_step": 2.0,
        "ms_per_step_p10": 2.0,
        "ms_per_step_p90": 3.0,
        "tokens_per_s": 36 / 0.022,
        "wall_s": 0.8,
        "wall_tokens_per_s": 50.0,
        "useful_row_share": 0.9,
        "bytes_per_step": read,
        "kv_cache_bytes": 400_000_000,
        "bandwidth_gb_s": 10.0,
        "bandwidth_share": read / 0.002 / 1e10,
    }
    assert summary.pop("peak_memory_gb") > 0
    assert summary == pytest.approx(want)
    assert list(summary) == list(want)
    json.dumps(summary)

    ready, speed, memory, reading = capsys.readouterr().err.splitlines()
    assert ready == "loaded in 1.5 s; 60 tokens in 4 prompts, median first token after 0.38 s"
    assert speed == (
        "40 new tokens in 0.80 s, 50.0 tokens/s; 2.00 ms a step, median; 90% of its rows had work"
    )
    assert memory.startswith("KV cache 400.0 MB, peak memory ")
    assert reading == (
        "a step reads 1.007 GB: 5036% of the 10 GB/s this machine copies at"
    )


def test_bandwidth_is_measured_by_a_benchmark_only(
    engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes half a second and memory of its own."""

    def bandwidth(device: torch.device, nbytes: int) -> float:
        raise AssertionError("measured")

    monkeypatch.setattr(cli.stats, "copy_bandwidth", bandwidth)
    summary = summarize(engine)
    assert not {"bandwidth_gb_s", "bandwidth_share"} & summary.keys()


def test_summary_of_a_compiled_run_of_one_token(
    engine: SimpleNamespace, ten_gb_s: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no decode step: the time to the first token stands for one."""
    engine.stats = Stats(
        load_s=1, compile_s=2, prompt_tokens=8, new_tokens=4, first_token_s=[0.5], wall_s=0.5)
    summary = summarize(engine)
    assert summary["ms_per_step"] == 500
    assert summary["tokens_per_s"] == summary["wall_tokens_per_s"] == 8
    start = "loaded in 1.0 s, compiled in 2.0 s; 8 tokens in 4 prompts, median first token after "
    assert capsys.readouterr().err.splitlines()[0] == f"{start}0.50 s"


def test_statistics_that_cannot_be_made_are_no_reason_to_fail(
    engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No memory to measure with, a clock that stands still: the rest is said."""

    def bandwidth(device: torch.device, nbytes: int) -> float:
        raise MemoryError("no room")

    monkeypatch.setattr(cli.stats, "copy_bandwidth", bandwidth)
    engine.stats = replace(STATS, steps_s=[0.0], wall_s=0.0, first_token_s=[0.0])
    summary = summarize(engine, measure=True)
    assert summary["new_tokens"] == 40 and "bandwidth_gb_s" not in summary
    json.dumps(summary, allow_nan=False)
    assert "what it took cannot be said: MemoryError: no room\n" in capsys.readouterr().err
    monkeypatch.setattr(cli.stats, "weight_bytes", bandwidth)
    assert summarize(engine) is None


def test_copy_bandwidth() -> None:
    assert 0 < copy_bandwidth("cpu", 2**16) < math.inf


@pytest.fixture
def multiplier() -> SimpleNamespace:
    """An engine with a model of two layers, one product each; a step takes 1 ms."""

    def timed_steps(n: int) -> list[float]:
        x = torch.ones(64, 64)
        for _ in range(2 * n):
            x @ x
        return [0.001] * n

    model = SimpleNamespace(layers=[1, 2])
    return SimpleNamespace(timed_steps=timed_steps, model=model, device=torch.device("cpu"))


def test_profile(
    multiplier: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "trace.json"
    with in_place_of(str(file), read_trace) as new:
        profile(multiplier, new)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("a decode step takes 1000 us, the kernels ")
    product = next(line for line in lines if line.endswith("aten::mm"))
    assert "%    1.0 x " in product
    assert lines[-1] == "open the trace in chrome://tracing or ui.perfetto.dev"
    assert json.loads(file.read_text())["traceEvents"]


@dataclass
class Row:
    """A row of a profile, its times in microseconds over PROFILED steps."""

    key: str
    device_type: DeviceType
    self_device_time_total: float
    is_user_annotation: bool = False
    self_cpu_time_total: float = 1e6
    count: int = PROFILED


class MadeUpTrace:
    """An eager step on a GPU: a product of 300 us, an addition of 100 us, and who called them."""

    def key_averages(self) -> list[Row]:
        return [
            Row("aten::mm", DeviceType.CPU, 300 * PROFILED),
            Row("aten::add", DeviceType.CPU, 100 * PROFILED),
            Row("gemm_kernel", DeviceType.CUDA, 300 * PROFILED),
            Row("add_kernel", DeviceType.CUDA, 100 * PROFILED),
            Row("Torch-Compiled Region", DeviceType.CUDA, 400 * PROFILED, is_user_annotation=True),
        ]


def test_a_profile_of_a_gpu_counts_each_kernel_once(capsys: pytest.CaptureFixture[str]) -> None:
    say_kernels(MadeUpTrace(), 500, 1, torch.device("cuda"))
    head, *rows = capsys.readouterr().err.splitlines()
    assert head.startswith("a decode step takes 500 us, the kernels 400 of them and gaps 100;")
    assert rows == [
        "  60.0%    1.0 x    300.0 us  gemm_kernel",
        "  20.0%    1.0 x    100.0 us  add_kernel",
    ]


@pytest.mark.parametrize("theirs", [b"my thesis", b"", b"{}", "a folder", "a pipe", "a link to it"])
def test_a_profile_takes_no_place_but_a_trace_s(theirs: bytes | str, tmp_path: Path) -> None:
    """Said before anything is loaded; what is there stays."""
    path = tmp_path / "trace.json"
    if theirs == "a folder":
        path.mkdir()
    elif theirs == "a pipe":
        os.mkfifo(path)
    elif theirs == "a link to it":
        path.symlink_to(tmp_path / "thesis")
        (tmp_path / "thesis").write_text("mine")
    else:
        path.write_bytes(theirs)
    there = path.lstat()
    with pytest.raises(ValueError, match=f"--profile {path} is there and no trace; choose another"):
        with in_place_of(str(path), read_trace):
            raise AssertionError("begun")
    # not the time of its last access: looking into it is allowed
    names = ("st_ino", "st_mode", "st_nlink", "st_size", "st_mtime_ns", "st_ctime_ns")
    assert all(getattr(path.lstat(), name) == getattr(there, name) for name in names)


def test_a_trace_replaces_one_when_it_is_whole(tmp_path: Path) -> None:
    """A link to it stays; nothing is left of one that could not be written to its end."""
    old = tmp_path / "old.json"
    old.write_bytes(b'{"schemaVersion": 1}')
    link = tmp_path / "link.json"
    link.symlink_to(old)
    with pytest.raises(OSError, match="No space left"):
        with in_place_of(str(link), read_trace) as new:
            new.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert old.read_bytes() == b'{"schemaVersion": 1}'
    with in_place_of(str(link), read_trace) as new:
        new.write_bytes(b"new")
    assert old.read_bytes() == b"new" and link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link.json", "old.json"]
    for path, message in (("/no/such/trace", "No such file"), (tmp_path / ("x" * 300), "too long")):
        with pytest.raises(OSError, match=message):
            with in_place_of(str(path), read_trace):
                raise AssertionError("begun")


# --- the flags ---

@pytest.mark.parametrize("parse, good, bad, message", [
    (number(int, 1), ["1", "99"], ["0", "-1"], "{} is not at least 1"),
    (number(int, 1, 4), ["1", "4"], ["0", "5"], "{} is not at least 1 and at most 4"),
    (number(float, 0), ["0", "inf", "1e9"], ["-0.1", "nan"], "{} is not at least 0"),
    (number(float, 0, 1), ["0", "1"], ["-1", "1.1"], "{} is not at least 0 and at most 1"),
    (number("top_p"), ["1e-9", "1"], ["0", "-1"], "{} is not above 0 and at most 1"),
])
def test_number(
    parse: Callable[[str], float], good: list[str], bad: list[str], message: str
) -> None:
    for text in good:
        assert parse(text) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError) as e:
            parse(text)
        assert str(e.value) == message.format(text)


def test_number_names_its_type() -> None:
    assert number(int, 1).__name__ == "whole number"
    assert number(float, 1).__name__ == "number"
    for text in ("1.5", "many"):
        with pytest.raises(ValueError):
            number(int, 1)(text)


def test_defaults() -> None:
    args = parse_args(CPU)
    assert args.device == torch.device("cpu")
    assert args.dtype is None  # the file says it
    assert args.compile is None  # what an earlier run compiled
    assert args.group_size == 32
    assert args.save is None
    assert args.prompt is None
    assert args.quantize == "auto"
    assert parse_args([*CPU, "--compile"]).compile is True


def test_a_benchmark_has_a_prompt() -> None:
    assert parse_args([*CPU, "--benchmark"]).prompt == "128"
    assert parse_args([*CPU, "--benchmark", "--prompt", "7"]).prompt == "7"


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_save_and_group_size(mode: str) -> None:
    quantize = [*CPU, "--quantize", mode]
    args = parse_args([*quantize, "--save", "folder", "--group_size", "64"])
    assert str(args.save) == "folder"
    assert args.group_size == 64
    assert parse_args(quantize).group_size == 32


SAVE = ["--quantize", "int8", "--save", "folder"]
SAVE_ALONE = "--save goes without --prompt, --prompts, --interactive, --benchmark and --profile"
OUTPUT = "--output goes with --prompts"
ONE_SOURCE = "--prompt goes without --prompts and --interactive"
CHAT_ALONE = (
    "--interactive goes without --json, --benchmark, --profile, --num_samples and --batch_size"
)
RANDOM_TOKENS = "--benchmark takes its --prompt as a number of random tokens"


@pytest.mark.parametrize("words, message", [
    (["--save", "folder"], "--save goes with --quantize"),
    ([*SAVE, "--prompt", "x"], SAVE_ALONE),
    ([*SAVE, "--prompt", ""], SAVE_ALONE),
    ([*SAVE, "--prompts", "x"], SAVE_ALONE),
    ([*SAVE, "--interactive"], SAVE_ALONE),
    ([*SAVE, "--benchmark"], SAVE_ALONE),
    ([*SAVE, "--profile", "x"], SAVE_ALONE),
    (["--group_size", "32"], "--group_size goes with --quantize"),
    (["--prompt", "x", "--prompts", "x"], ONE_SOURCE),
    (["--prompt", "", "--interactive"], ONE_SOURCE),
    (["--interactive", "--json"], CHAT_ALONE),
    (["--interactive", "--benchmark"], CHAT_ALONE),
    (["--interactive", "--profile", "x"], CHAT_ALONE),
    (["--interactive", "--num_samples", "2"], CHAT_ALONE),
    (["--interactive", "--batch_size", "2"], CHAT_ALONE),
    (["--benchmark", "--prompt", "words"], RANDOM_TOKENS),
    (["--benchmark", "--prompts", "x"], "--prompts goes without --interactive and --benchmark"),
    (["--interactive", "--prompts", "x"], "--prompts goes without --interactive and --benchmark"),
    (["--json_schema", "x", "--grammar", "x"], "--json_schema goes without --grammar"),
    (["--json", "--echo"], "--echo goes with --logprobs"),
    (["--shift"], "--shift goes with --interactive"),
    (["--quantize", "none", "--save", "x"], "--save goes with --quantize"),
    (["--quantize", "auto", "--calibrate", "x"], "--calibrate goes with --quantize int8 or int4"),
    (["--benchmark", "--stop", "x"], "--stop goes without --benchmark and --profile"),
    (["--profile", "x", "--stop", "x"], "--stop goes without --benchmark and --profile"),
    (["--output", "x"], OUTPUT),
    (["--output", "x", "--prompt", "x"], OUTPUT),
    (["--output", "x", "--interactive"], OUTPUT),
    (["--output", "x", "--prompts", "y", "--profile", "x"], "--output goes without --profile"),
    (["--stop", ""], "--stop takes no empty text, which would end every answer at once"),
    (["--system", "x"], "--system goes with --interactive or --chat"),
    (["--threads", "0"], "argument --threads: 0 is not at least 1 and at most 1024"),
    (["--compile_prefill"], "--compile_prefill goes with --compile"),
    (["--top_p", "0"], "argument --top_p: 0 is not above 0 and at most 1"),
    (["--batch_size", "1.5"], "argument --batch_size: invalid whole number value: '1.5'"),
])
def test_impossible_flags_get_one_sentence(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_args([*CPU, *words])


@pytest.mark.parametrize("words, message", [
    (["--group_size", "48", "--quantize", "int4"], "argument --group_size: invalid choice: "),
    (["--device", "abacus"], "--device abacus: "),
    (["--device", "cuda:99"], "--device cuda:99: "),
])
def test_impossible_values_get_one_sentence(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*$"):
        parse_args(words)


def test_every_flag_says_what_its_default_is() -> None:
    for action in make_parser()._actions:
        assert action.help
        # a switch is off, and three flags say in words what is done without them
        if action.nargs == 0 or action.dest in ("prompts", "profile"):
            continue
        assert "default" in action.help, action.dest


@pytest.mark.parametrize("words", [
    "", "--prompt x", "--prompt @x", "--prompt -", "--prompt= --threads 3", "--quantize int8",
    "--temperature 1 --top_k 5 --max_new_tokens 9 --no-compile",
])
def test_one_prompt_is_answered_by_generate_run(words: str) -> None:
    """So that what somebody changes there takes effect."""
    assert is_plain(parse_args([*CPU, *words.split()]))


@pytest.mark.parametrize("words", [
    "--prompt 12", "--prompts x", "--interactive", "--json", "--num_samples 2", "--batch_size 2",
    "--stop x", "--chat", "--seed 3 --temperature 1", "--tp 1", "--checkpoint_path x.json",
    "--speculate_k 2", "--dtype float32", "--kv_dtype int8", "--profile x", "--benchmark",
    "--quantize int4 --group_size 64", "--save x --quantize int8", "--max_seq_len 9",
])
def test_what_generate_run_does_not_know_is_not_left_to_it(words: str) -> None:
    assert not is_plain(parse_args([*CPU, *words.split()]))


# --- threads ---

def openmp_settings(**chosen: str) -> str:
    """What PyTorch's OpenMP says of its settings when generate.py has loaded it."""
    env = {name: value for name, value in CPU_ENV.items() if not name.startswith(("OMP_", "GOMP_"))}
    run = subprocess.run(
        [sys.executable, str(HERE / "generate.py"), "--threads", "0"], capture_output=True,
        text=True, env={**env, "OMP_DISPLAY_ENV": "VERBOSE", **chosen})
    return run.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="its wheels carry another OpenMP")
def test_threads_that_wait_sleep_soon_unless_the_user_chose() -> None:
    """The setting is there before PyTorch's OpenMP loads, which reads it once."""
    assert "GOMP_SPINCOUNT = '2000'" in openmp_settings()
    assert "GOMP_SPINCOUNT = '77'" in openmp_settings(GOMP_SPINCOUNT="77")
    assert "GOMP_SPINCOUNT = '2000'" not in openmp_settings(OMP_WAIT_POLICY="active")


def test_threads_are_as_many_as_the_flag_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    for flags in ([], ["--threads", "3"]):
        with pytest.raises(SystemExit):
            generate.main([*CPU, *flags, "--prompt", "@/no/such/file"])
    assert asked == [3]


# --- a download ---

@pytest.mark.parametrize("on_terminal", [False, True])
def test_a_download_shows_how_far_it_is_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on_terminal: bool
) -> None:
    commands = []

    def run(command: list[str], **options: object) -> None:
        commands.append(command)
        raise ValueError("no network")

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("sys.stderr.isatty", lambda: on_terminal, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="no network"):
        default_model()
    [command] = commands
    assert ("--quiet" in command) != on_terminal


def test_a_full_disk_is_a_sentence_before_the_default_model_comes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("subprocess.run", lambda *_, **options: pytest.fail("it was fetched"))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100e6))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"takes 276 MB while it comes, and {tmp_path}/gpt-flash"):
        default_model()


def test_long_loading_says_how_far_it_is_where_stderr_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "perf_counter", iter([0, 6, 11, 12, 18, 23, 24, 25]).__next__)
    assert list(cli.stats.counted("abcd", "loading")) == ["a", "b", "c", "d"]
    assert list(cli.stats.counted(iter(()), "loading", 0)) == []
    said = "loading: 2 of 4 layers after 12 s\nloading: 4 of 4 layers after 24 s\n"
    assert capsys.readouterr().err == said


def test_the_page_of_names_has_every_flag_and_no_other() -> None:
    flags = {flag for action in make_parser()._actions for flag in action.option_strings}
    page = (HERE / "cli/README.md").read_text()
    rows = re.findall(r"^\| (`--.*?) \|(.*?)\|", page, re.M)
    assert {flag for ours, _ in rows for flag in re.findall(r"--\w+", ours)} <= flags
    assert flags - set(re.findall(r"--\w+", page)) == {"-h", "--no-compile"}
    theirs = {name for _, names in rows for name in re.findall(r"`(\w+)`", names)}
    known = vars(transformers.GenerationConfig()).keys() | {
        "assistant_model", "attn_implementation", "device_map", "dtype", "input_ids",
        "apply_chat_template", "quantization_config", "set_seed"}
    assert theirs <= known
