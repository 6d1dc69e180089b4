"""The command line: a run, prompts from a file, a conversation, mistakes, and how it ends."""
import functools
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor
from transformers import PreTrainedModel

import model as loading
from checks.common import CONFIG, CPU_ENV, HERE, PATIENCE_S, run_cli
from generate import Tokenizer, generate
from model import Transformer

Checkpoint = Callable[[str], tuple[Path, PreTrainedModel]]  # the fixture: random ones, by name
Run = tuple[int, str, str]  # exit code, stdout, stderr


@pytest.fixture
def cli(capfd: pytest.CaptureFixture) -> Callable[..., Run]:
    """generate.py's main on the CPU."""
    return functools.partial(run_cli, capfd, "--device", "cpu")


def test_default_run(cli: Callable[..., Run]) -> None:
    code, out, err = cli()
    assert code == 0 and out == "The capital of France is Paris.\n"
    for said in ("ms a token", "first token after", "peak memory"):
        assert said in err


def test_prompts_file(
    cli: Callable[..., Run], tmp_path: Path, smollm: tuple[Transformer, Tokenizer]
) -> None:
    model, tokenizer = smollm
    lines = [
        "The capital of France is",
        "One, two,",
        "The capital of Italy, a country in southern Europe, is",
    ]
    file = tmp_path / "p.txt"
    file.write_text("\n\n".join(lines) + "\n")
    alone = []
    for line in lines:
        new = generate(model, [tokenizer.encode(line)], 6)[0]
        alone.append(tokenizer.decode(new))
    words = "--quantize none --dtype float32 --batch_size 2 --max_new_tokens 6".split()
    code, out, err = cli("--prompts", file, *words, "--json")
    *records, run = map(json.loads, out.splitlines())
    records.sort(key=lambda record: record["index"])
    assert code == 0 and [record["text"] for record in records] == alone
    assert {record["finish_reason"] for record in records} == {"length"}
    assert run["new_tokens"] == 18 and run["library"] is False
    assert "18 new tokens" in err
    code, out, _ = cli("--prompts", file, *words)
    shown = [f"[{i}] {line}\n{text}\n\n" for i, (line, text) in enumerate(zip(lines, alone))]
    assert code == 0 and out == "".join(shown)


def test_interactive_keeps_the_cache(
    cli: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, smollm: tuple[Transformer, Tokenizer]
) -> None:
    """The second turn prefills only what is new, and answers as the whole conversation does."""
    model, tokenizer = smollm
    fed = []
    prefill = Transformer.prefill

    def watched(model: Transformer, tokens: Tensor, *args: object, **options: object) -> Tensor:
        fed.append(tokens[0].tolist())
        return prefill(model, tokens, *args, **options)

    monkeypatch.setattr(Transformer, "prefill", watched)
    question, more = "What is the capital of France?", "And of Italy?"
    chat_with(monkeypatch, model, f"{question}\n{more}")
    code, out, _ = cli("--interactive", "--max_new_tokens", 12)
    assert code == 0 and len(fed) == 2
    first, second = out.splitlines()
    ids = tokenizer.chat([
        {"role": "user", "content": question},
        {"role": "assistant", "content": first},
        {"role": "user", "content": more},
    ])
    assert len(fed[1]) < 20 and ids[-len(fed[1]):] == fed[1]
    model.setup_caches(1, 200)
    whole = generate(model, [ids], 12, eos_ids=tokenizer.eos_ids)[0]
    assert second == tokenizer.decode(whole)


def test_interactive_says_when_the_context_is_full(
    cli: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, smollm: tuple[Transformer, Tokenizer]
) -> None:
    chat_with(monkeypatch, smollm[0], "Tell me a story.\n" * 3 + "/clear\nHi\n")
    code, out, err = cli("--interactive", "--max_seq_len", 64)
    assert code == 0 and len(out.splitlines()) >= 2
    assert err.count("the context of 64 tokens is full") == 3


def chat_with(monkeypatch: pytest.MonkeyPatch, model: Transformer, said: str) -> None:
    """The next command line gets this model, and this on standard input."""
    def load(*args: object, **options: object) -> Transformer:
        return model

    monkeypatch.setattr("generate.load_model", load)
    monkeypatch.setattr("sys.stdin", io.StringIO(said))


@pytest.mark.parametrize("arguments, message", [
    ("--temperature -1", "--temperature: -1 is not at least 0"),
    ("--temperature warm", "invalid number value"),
    ("--temperature nan", "--temperature"),
    ("--top_p 0", "above 0"),
    ("--top_p 1.5", "at most 1"),
    ("--top_k 0", "--top_k"),
    ("--min_p 2", "--min_p"),
    ("--max_new_tokens 0", "--max_new_tokens"),
    ("--batch_size 1.5", "whole number"),
    ("--batch_size 1000000000000", "--batch_size"),
    ("--batch_size 4000 --prompt 8000", "KV cache"),
    ("--num_samples 1000000000000", "--num_samples"),
    ("--seed -3", "--seed"),
    ("--device abacus", "--device abacus"),
    ("--device cuda:99", "--device cuda:99"),
    ("--dtype int3", "--dtype"),
    ("--quantize int9", "--quantize"),
    ("--nonsense", "--nonsense"),
    ("--prompt x --interactive", "--prompt goes without"),
    ("--interactive --json", "--interactive"),
    ("--prompt @/no/such/file", "/no/such/file"),
    ("--prompts /no/such/file", "/no/such/file"),
    ("--prompt @/", "cannot read"),
    ("--prompt=", "empty"),
    ("--prompt 0", "empty"),
    ("--prompt 9000", "context of 8192"),
    ("--prompt 20 --max_seq_len 20", "no room"),
    ("--max_seq_len 9000", "8192"),
    ("--checkpoint_path /no/such/model", "/no/such/model"),
    ("--checkpoint_path /etc/hostname", "hostname"),
    ("--checkpoint_path /etc", "/etc"),
    ("--checkpoint_path=", "no such file"),
    ("--benchmark --prompt hello", "number of random tokens"),
    ("--compile_prefill", "goes with --compile"),
    ("--save never-made", "--quantize"),
    ("--save never-made --quantize int8 --prompt x", "--save"),
    ("--save /tmp --quantize int8", "exists already"),
    ("--quantize int4 --group_size 48", "--group_size"),
])
def test_mistakes_get_one_sentence(
    cli: Callable[..., Run], arguments: str, message: str
) -> None:
    code, out, err = cli(*arguments.split())
    last = err.strip().splitlines()[-1]
    assert code == 2 and out == "" and "Traceback" not in err
    assert last.startswith("generate.py: error: ") and message in last


def test_swapped_tokenizer(
    cli: Callable[..., Run], checkpoint: Checkpoint, tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder, _ = checkpoint("llama")
    shutil.copy(folder / "config.json", tmp_path)
    shutil.copy(folder / "model.safetensors", tmp_path)
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    code, _, err = cli("--checkpoint_path", tmp_path, "--prompt", "x")
    assert code == 2 and "the tokenizer has 600 tokens but the model only 131" in err


def test_control_tokens_beyond_the_model_are_no_reason_to_refuse() -> None:
    tokenizer = Tokenizer(None, 9, {"<s>": 1, "[PAD]": 8}, 1, set())
    tokenizer.check_fit(8)
    with pytest.raises(ValueError, match="tokenizer has 8 tokens but the model only 7"):
        tokenizer.check_fit(7)


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    """A bare config.json, which gives random weights."""
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(CONFIG))
    return path


def test_benchmark(
    cli: Callable[..., Run], shape: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling, which takes long and has tests of its own, leaves the steps as they are here."""
    monkeypatch.setattr("generate.compile_model", lambda *args, **options: None)
    options = "--benchmark --prompt 20 --max_new_tokens 5 --json --compile".split()
    code, out, _ = cli("--checkpoint_path", shape, *options)
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["compile_s"] > 0
    assert (result["prompt_tokens"], result["new_tokens"]) == (20, 5)
    steps = [result[f"ms_per_step{suffix}"] for suffix in ("_p10", "", "_p90")]
    assert steps == sorted(steps)


def test_profile(cli: Callable[..., Run], shape: Path, tmp_path: Path) -> None:
    trace = tmp_path / "t.json"
    words = ["--dtype", "float32", "--prompt", 20, "--profile", trace, "--json"]
    code, out, err = cli("--checkpoint_path", shape, *words)
    assert json.loads(out)["prompt_tokens"] == 20
    assert code == 0 and "_linear_pointwise" in err
    assert json.loads(trace.read_text())["traceEvents"]


def copy_without(folders: list[str], target: Path) -> Path:
    """The program in a copy of the tree that lacks some folders."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "checks", "benchmarks", *folders)
    return Path(shutil.copytree(HERE, target / "copy", ignore=left_out)) / "generate.py"


def run_copy(program: Path, *words: object) -> Run:
    command = [sys.executable, program, "--device", "cpu", *words]
    done = subprocess.run(
        list(map(str, command)), input="one\ntwo\n", capture_output=True, text=True, env=CPU_ENV
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("folder", ["batching", "formats", "parallel"])
def test_a_copy_without_a_folder_says_so_where_it_is_needed(
    folder: str, cli: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = copy_without([folder], tmp_path).parent
    monkeypatch.setattr(loading, "__file__", str(copied / "model.py"))  # beside which folders are
    code, out, err = cli("--prompts", "-")
    sentence = f"this copy of gpt-flash has no folder {folder}, which this needs"
    assert (code, out, err) == (2, "", f"generate.py: error: {sentence}\n")


def test_one_prompt_needs_neither_batching_nor_parallel(
    cli: Callable[..., Run], tiny: Path, tmp_path: Path
) -> None:
    program = copy_without(["batching", "parallel"], tmp_path)
    words = ["--checkpoint_path", tiny, "--prompt", "one two", "--max_new_tokens", 12]
    assert run_copy(program, *words)[:2] == cli(*words)[:2]


def test_a_copy_without_cli_needs_nothing_of_its_folder(tiny: Path, tmp_path: Path) -> None:
    """Which git leaves with what Python has put there; and its help says what it can."""
    program = copy_without(["cli"], tmp_path)
    (program.parent / "cli" / "__pycache__").mkdir(parents=True)
    words = ["--checkpoint_path", tiny, "--prompt", "@one"]
    assert run_copy(program, *words)[0] == 0
    code, out, _ = run_copy(program, "--help")
    assert code == 0 and "stdin" not in out and "@FILE" not in out


@pytest.mark.parametrize("command", [
    [sys.executable, "-I"],  # which -P is a part of
    ["bash", "-c", 'exec "$0" "$@" 2>&-', sys.executable],  # stderr is closed
])
def test_unusual_starts(command: list[str], checkpoint: Checkpoint, tmp_path: Path) -> None:
    """From another folder; an isolated Python does not look into the script's own either."""
    shape = checkpoint("llama")[0] / "config.json"
    words = ["--checkpoint_path", shape, "--prompt", "5", "--max_new_tokens", "3", "--json"]
    done = subprocess.run(
        [*command, HERE / "generate.py", "--device", "cpu", *words], stdout=subprocess.PIPE,
        env=CPU_ENV, cwd=tmp_path,
    )
    assert done.returncode == 0 and b'"new_tokens": 3' in done.stdout


@pytest.fixture
def ctrl_c_counts() -> Iterator[None]:
    """Programs that a test starts are interrupted as from a terminal, though the shell that runs
    the tests ignores it, as for a job in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_cleanly(ctrl_c_counts: None) -> None:
    """A real process, interrupted while it writes a long text."""
    command = [sys.executable, HERE / "generate.py", "--device", "cpu"]
    command += ["--prompt", "Once upon a time", "--max_new_tokens", "5000"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, env=CPU_ENV)
    assert process.stdout.read(20)  # it is writing
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130 and b"Traceback" not in err
