"""Tests of one model over several processes, which talk by Gloo: the text of one process, groups
that share a file of prompts, and the end of all when one ends."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checks.common import CPU_ENV, HERE, SMALL, close, hf_folder, random_hf
from generate import generate
from model import ModelConfig, load_model, open_checkpoint
from parallel.ranks import Ranks, local, piece, take_part
from quantize import quantize_linear, save_quantized

ENV = {**CPU_ENV, "OMP_NUM_THREADS": "1"}
PROMPTS = [[5, 6, 7], [9], list(range(10, 40))]
THREE = dict(num_attention_heads=12, num_key_value_heads=4, hidden_size=384, intermediate_size=256)
SEVEN = dict(
    THREE, model_type="qwen2", num_attention_heads=28, hidden_size=448, vocab_size=331,
    tie_word_embeddings=True,
)
SHARED = dict(THREE, num_key_value_heads=2)  # four ranks have two copies of each key/value head
PLAIN = dict(quantize=None, int8_kv=False, attention="auto", compile=False, options={})
SAMPLED = dict(temperature=1.0, seed=3)
FAMILIES = ["gemma2", "olmo2", "phi3", "granite", "gpt-oss", "qwen2-moe", "qwen3-moe"]
CASES = [
    *((family, PLAIN) for family in FAMILIES),
    ("three", PLAIN),
    ("three", PLAIN | dict(options=SAMPLED)),
    ("three", PLAIN | dict(attention="math")),
    ("three", PLAIN | dict(compile=True)),
    ("seven", PLAIN),
    ("seven", PLAIN | dict(options=dict(SAMPLED, speculate_k=4))),
    ("shared", PLAIN),
    ("three", PLAIN | dict(quantize="int8")),
    ("three", PLAIN | dict(quantize="int4")),
    ("three", PLAIN | dict(int8_kv=True)),
    ("seven-int8", PLAIN),
]


def torchrun(n: int, *command: object) -> list[str]:
    """The command line that starts n processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={n}", *map(str, command)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parallel")
    made = {}
    for name, settings in (("three", THREE), ("seven", SEVEN), ("shared", SHARED)):
        made[name] = hf_folder(folder / name, **settings)
    made["seven-int8"] = folder / "seven-int8"
    save_quantized(load_model(made["seven"], quantize="int8"), made["seven-int8"])
    for name in FAMILIES:
        made[name] = folder / name
        heads = dict(num_attention_heads=12, num_key_value_heads=4, hidden_size=96)
        random_hf(name, **heads).save_pretrained(made[name])
    return made


Said = tuple[list[list[int]], Tensor]  # the tokens, and the logits behind the last prompt


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> list[Said]:
    """What one process says in each case; compiled or not makes no difference."""
    said = []
    for name, case in CASES:
        model = load_model(folders[name], dtype=torch.float32, quantize=case["quantize"])
        kv_dtype = torch.int8 if case["int8_kv"] else None
        model.setup_caches(len(PROMPTS), 64, kv_dtype, case["attention"])
        tokens = generate(model, PROMPTS, 12, **case["options"])
        logits = model.prefill(torch.tensor(PROMPTS[-1:]), torch.zeros(1, dtype=torch.int32))
        said.append((tokens, logits[0, -1]))
    return said


@pytest.mark.parametrize("n", [2, 4])
def test_ranks_together_say_what_one_process_says(
    n: int, folders: dict[str, Path], alone: list[Said], tmp_path: Path
) -> None:
    """All ranks the same; quantized layers round what they multiply, so that there the order of a
    sum may change a token."""
    cases = []
    for name, case in CASES:
        cases.append(dict(case, path=str(folders[name]), prompts=PROMPTS, max_new_tokens=12))
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    worker = HERE / "checks/parallel_worker.py"
    command = torchrun(n, worker, tmp_path / "cases.json", tmp_path / "results.json")
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    for (name, case), result, (tokens, logits) in zip(CASES, results, alone, strict=True):
        assert result["tokens"] == [result["tokens"][0]] * n
        exact = case["quantize"] is None and not case["int8_kv"] and name != "seven-int8"
        if exact:
            assert result["tokens"][0] == tokens, (name, case)
        close(torch.tensor(result["logits"]), logits, 1e-4 if exact else 0.05)
        assert 1 / n <= result["share"] < 1.2 / n
        if case["quantize"]:
            assert result["layers_compared"] == 2 * 4 + 1


# --- a rank's part ---

def test_a_rank_of_a_padded_or_shared_dimension() -> None:
    whole = torch.arange(10)[:, None] * torch.ones(1, 3)
    parts = [piece(whole, (3, 3), Ranks(rank, 4)) for rank in range(4)]
    assert torch.equal(torch.cat(parts)[:10], whole)
    assert not torch.cat(parts)[10:].any()
    shared = [piece(whole, (5, 3), Ranks(rank, 4)) for rank in range(4)]
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(torch.cat(shared[1:3]), whole)
    assert torch.equal(piece(whole, (10, 3), Ranks(3, 4)), whole)


def test_a_rank_reads_its_part_of_saved_experts(tmp_path: Path) -> None:
    """Whose names have a number last: gate and up are cut each, and a bias is there once."""
    source = tmp_path / "model"
    random_hf("gpt-oss", intermediate_size=64, hidden_size=64).save_pretrained(source)
    save_quantized(load_model(source, quantize="int8"), tmp_path / "saved")
    stored = open_checkpoint(tmp_path / "saved").tensors
    name = "layers.0.mlp.experts.gate_up_proj.1.weight"
    gate, up = stored[name].chunk(2)  # of (2 * 64, 64)
    bias = "layers.0.mlp.experts.down_proj.1.bias"
    for rank in range(2):
        half = slice(32 * rank, 32 * rank + 32)
        part = part_of(tmp_path / "saved", rank, name, (64, 64))
        assert torch.equal(part, torch.cat((gate[half], up[half])))
        kept = stored[bias] if rank == 0 else torch.zeros(64)
        assert torch.equal(part_of(tmp_path / "saved", rank, bias, (64,)), kept)


def part_of(folder: Path, rank: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """What one of two ranks reads for a parameter of that shape."""
    checkpoint = open_checkpoint(folder)
    model = checkpoint.empty_model()
    take_part(checkpoint, model, Ranks(rank, 2))
    return checkpoint.parameter(model, name, torch.empty(shape, device="meta"))


def test_a_tied_output_layer_that_was_saved_in_floats_is_read_from_the_embedding(
    tmp_path: Path
) -> None:
    folder = hf_folder(tmp_path / "model", **SEVEN)
    model = load_model(folder)
    for name, layer in list(model.named_modules()):
        if name.endswith("_proj"):
            model.set_submodule(name, quantize_linear(layer, "int8"))
    save_quantized(model, tmp_path / "saved")
    table = open_checkpoint(tmp_path / "saved").tensors["embed_tokens.weight"]  # (331, 448)
    part = part_of(tmp_path / "saved", 0, "lm_head.weight", (166, 448))
    assert torch.equal(part, table[:166])


@pytest.mark.parametrize("changes, n, message", [
    (dict(num_attention_heads=6, num_key_value_heads=3, hidden_size=96), 4,
     "6 query heads do not divide over 4 ranks"),
    (dict(num_attention_heads=12, num_key_value_heads=3, hidden_size=96), 2,
     "3 key/value heads do not divide over 2 ranks"),
    (dict(intermediate_size=66), 4, "66 hidden units of the feed-forward do not divide over 4"),
    (dict(num_attention_heads=8, hidden_size=64, intermediate_size=64, vocab_size=60), 8,
     "a vocabulary of 60 is too small for 8 ranks"),
])
def test_what_does_not_divide_is_refused(changes: dict[str, int], n: int, message: str) -> None:
    config = ModelConfig.from_hf({**SMALL, **changes})
    with pytest.raises(ValueError, match=message):
        local(config, Ranks(0, n))


# --- one file of prompts ---

@pytest.fixture(scope="module")
def small(
    tmp_path_factory: pytest.TempPathFactory, talking_folder: Callable[..., Path]
) -> Path:
    return talking_folder(tmp_path_factory.mktemp("small") / "model")


def answers(file: Path) -> dict[int, str]:
    """The texts in an --output by their prompts; each is there once."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    texts = {record["index"]: record["text"] for record in records}
    assert len(texts) == len(records)
    return texts


def test_groups_share_a_file_and_a_restart_goes_on(small: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = []
    for i in range(24):
        lines.append(json.dumps({"prompt": "ab" * (1 + i % 7), "max_new_tokens": 20 + 4 * i}))
    prompts.write_text("\n".join(lines))
    flags = [
        HERE / "generate.py", "--checkpoint_path", small, "--dtype", "float32", "--prompts",
        prompts, "--batch_size", "2", "--temperature", "1", "--seed", "7", "--output",
    ]
    expected = tmp_path / "alone.jsonl"
    subprocess.run([sys.executable, *map(str, flags), expected], env=ENV, check=True)

    # two groups of two ranks, of which one is killed when the first answers are there
    together = tmp_path / "together.jsonl"
    command = torchrun(4, *flags, together, "--tp", "2")
    run = subprocess.Popen(command, env=ENV, stderr=subprocess.DEVNULL)
    while run.poll() is None and (not together.exists() or together.stat().st_size < 500):
        time.sleep(0.02)
    os.kill(children_of(run.pid)[-1], signal.SIGKILL)
    assert run.wait(60) != 0
    before = answers(together)
    assert 0 < len(before) < 24

    for _ in range(2):  # the second time nothing is left to do
        again = subprocess.run(command, env=ENV, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert answers(together) == answers(expected)


def test_all_ranks_have_what_the_first_one_reads(small: Path) -> None:
    command = torchrun(2, HERE / "generate.py", "--checkpoint_path", small, "--prompt", "-")
    flags = ["--dtype", "float32", "--max_new_tokens", "8"]
    done = subprocess.run([*command, *flags], input="ab", env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, HERE / "generate.py", "--checkpoint_path", small, "--prompt", "ab"]
    alone = subprocess.run([*command, *flags], env=ENV, capture_output=True, text=True)
    assert done.stdout == alone.stdout


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, in their order."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, rest = stat.read_text().rpartition(")")
        except OSError:  # it has ended
            continue
        if int(rest.split()[1]) == pid:
            found.append(int(stat.parent.name))
    return sorted(found)


# --- the end of one is the end of all ---

def one_sentence(stderr: str) -> str:
    """What generate.py said, once; torchrun reports what it started in its own words."""
    said = re.findall(r"^generate.py: error: (.*)$", stderr, re.MULTILINE)
    assert len(said) == 1, stderr
    return said[0]


def test_tp_takes_torchrun(small: Path) -> None:
    command = [sys.executable, HERE / "generate.py", "--checkpoint_path", small, "--tp", "2"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--tp 2 takes 2 processes: torchrun --nproc_per_node=2" in one_sentence(done.stderr)


@pytest.mark.parametrize("flags, message", [
    (["--tp", "2"], "3 processes do not divide into groups of --tp 2"),
    (["--seed", "-1"], "argument --seed: -1 is not at least 0 and at most 9223372036854775807"),
    ([], "4 query heads do not divide over 3 ranks"),
])
def test_a_wrong_number_is_said_once(flags: list[str], message: str, small: Path) -> None:
    command = torchrun(3, HERE / "generate.py", "--checkpoint_path", small, *flags)
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode != 0
    assert one_sentence(done.stderr) == message


def test_a_peer_that_does_not_come(small: Path) -> None:
    env = {**ENV, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, HERE / "generate.py", "--checkpoint_path", small]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "1" in one_sentence(done.stderr)


def test_a_lost_rank_ends_the_others(small: Path, tmp_path: Path) -> None:
    """Also where no torchrun ends them."""
    command = [
        sys.executable, HERE / "generate.py", "--checkpoint_path", small, "--prompt", "ab",
        "--num_samples", "1000", "--max_new_tokens", "100",
    ]
    out = tmp_path / "out"
    runs = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    for rank in range(2):
        place = {
            "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }
        runs.append(subprocess.Popen(
            command, env={**ENV, **place}, stdout=out.open("w"), stderr=subprocess.PIPE, text=True
        ))
    first, second = runs
    while first.poll() is None and out.stat().st_size == 0:  # until it answers
        time.sleep(0.02)
    second.kill()
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == 2
    assert one_sentence(stderr).startswith("another process has gone: ")
    second.communicate()
