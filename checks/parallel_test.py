"""Tests of one model over several processes, which talk by Gloo: the text of one process, groups
that share a file of prompts, and the end of all when one ends."""
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from checks.adapters_test import write_adapter
from checks.common import HERE, PATIENCE_S, SMALL, close, hf_folder, random_hf, run_cli, state_of
from checks.common import wait_until
from checks.parallel_worker import run_cases
from checks.ranks import ENV, Run, program
from generate import generate
from model import ModelConfig, load_model, open_checkpoint
from parallel.ranks import Ranks, local, piece, take_part
from parallel.ranks import load_model as load_part
from quantize import quantize_linear, save_quantized

PROMPTS = [[5, 6, 7], [9], list(range(10, 40))]
THREE = dict(num_attention_heads=12, num_key_value_heads=4, hidden_size=384, intermediate_size=256)
SEVEN = dict(
    THREE, model_type="qwen2", num_attention_heads=28, hidden_size=448, vocab_size=331,
    tie_word_embeddings=True,
)
SHARED = dict(THREE, num_key_value_heads=2)  # four ranks have two copies of each key/value head
PLAIN = dict(quantize=None, int8_kv=False, attention="auto", compile=False, options={})
SAMPLED = dict(temperature=1.0, seed=3)
FAMILIES = [
    "gemma2", "olmo2", "phi", "neox", "phi3", "glm4", "granite", "gpt-oss", "qwen2-moe",
    "qwen3-moe", "deepseek-v3",
]
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
    """The command line that starts n processes, behind flags of torchrun's own."""
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
        heads = dict(num_attention_heads=12, num_key_value_heads=4, hidden_size=192)
        if name == "neox":  # which has as many of keys
            heads["num_key_value_heads"] = 12
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
    shown = [*zip(CASES, alone, strict=True)]
    if n > 2:  # to compile takes a core half a minute in each
        shown = [each for each in shown if not each[0][1]["compile"]]
    cases = []
    for (name, case), _ in shown:
        cases.append(dict(case, path=str(folders[name]), prompts=PROMPTS, max_new_tokens=12))
    run = Run(tmp_path / "run", run_cases, [(cases, tmp_path / "results.json")] * n)
    assert run.wait() == 0, run.said()
    results = json.loads((tmp_path / "results.json").read_text())
    for ((name, case), (tokens, logits)), result in zip(shown, results, strict=True):
        assert result["tokens"] == [result["tokens"][0]] * n
        exact = case["quantize"] is None and not case["int8_kv"] and name != "seven-int8"
        if exact:
            assert result["tokens"][0] == tokens, (name, case)
        close(torch.tensor(result["logits"]), logits, 1e-4 if exact else 0.05)
        whole = 1.4 if name == "deepseek-v3" else 1.2  # all ranks make the vectors that are cached
        assert 1 / n <= result["share"] < whole / n
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
    gate, up = stored[name].read().chunk(2)  # of (2 * 64, 64)
    bias = "layers.0.mlp.experts.down_proj.1.bias"
    for rank in range(2):
        half = slice(32 * rank, 32 * rank + 32)
        part = part_of(tmp_path / "saved", rank, name, (64, 64))
        assert torch.equal(part, torch.cat((gate[half], up[half])))
        kept = stored[bias].read() if rank == 0 else torch.zeros(64)
        assert torch.equal(part_of(tmp_path / "saved", rank, bias, (64,)), kept)


def part_of(folder: Path, rank: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """What one of two ranks reads for a parameter of that shape."""
    checkpoint = open_checkpoint(folder)
    model = checkpoint.empty_model()
    take_part(checkpoint, model, Ranks(rank, 2))
    return checkpoint.parameter(model, name, torch.empty(shape, device="meta"))


def test_a_rank_has_its_part_of_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, module = hf_folder(tmp_path / "model", **THREE), "model.layers.0.mlp.up_proj"
    write_adapter(tmp_path / "adapter", open_checkpoint(folder).tensors, {module: 4})
    monkeypatch.setattr("parallel.ranks.join", lambda model, ranks: model)  # needs processes
    options = dict(dtype=torch.float32, adapter=tmp_path / "adapter")
    whole = load_model(folder, **options).layers[0].mlp.gate_up_proj.weight
    assert not torch.equal(whole, load_model(folder).layers[0].mlp.gate_up_proj.weight.float())
    gate, up = whole.chunk(2)
    for rank, parts in enumerate(zip(gate.chunk(2), up.chunk(2))):
        part = load_part(folder, Ranks(rank, 2), **options)
        assert torch.equal(part.layers[0].mlp.gate_up_proj.weight, torch.cat(parts))


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
    assert torch.equal(part, table.read()[:166])


@pytest.mark.parametrize("changes, n, message", [
    (dict(num_attention_heads=6, num_key_value_heads=3, hidden_size=96), 4,
     "6 query heads do not divide over 4 ranks; they would over 1, 2, 3, 6$"),
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


@pytest.mark.parametrize("name", ["gemma4", "lfm2", "qwen3.5"])
def test_layers_that_are_not_made_to_be_divided_are_refused(
    checkpoint: Callable[[str], tuple[Path, object]], name: str
) -> None:
    with pytest.raises(ValueError, match=f"the layers of {name}.* do not divide over ranks"):
        load_part(checkpoint(name)[0], Ranks(0, 2))


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


# generate.py, which goes no further when its --output has grown by 500 bytes
HELD = """
import sys, time
from pathlib import Path
import generate
from batching import Engine

output = Path(sys.argv[sys.argv.index("--output") + 1])

def size():
    return output.stat().st_size if output.exists() else 0

def held(*given, launch=Engine.launch, most=size() + 500):
    while size() > most:
        time.sleep(0.01)
    return launch(*given)

Engine.launch = held
generate.main()
"""


def test_groups_share_a_file_and_a_restart_goes_on(small: Path, tmp_path: Path) -> None:
    """When one of torchrun's processes is killed, it starts all again; killed itself, it leaves
    none behind; and two groups of two ranks go on."""
    prompts = tmp_path / "prompts.jsonl"
    lines = []
    for i in range(24):
        lines.append(json.dumps({"prompt": "ab" * (1 + i % 7), "max_new_tokens": 20 + 4 * i}))
    prompts.write_text("\n".join(lines))
    flags = [
        "--checkpoint_path", small, "--dtype", "float32", "--prompts", prompts, "--batch_size",
        "2", "--temperature", "1", "--seed", "7", "--output",
    ]
    together = tmp_path / "together.jsonl"
    held = tmp_path / "held.py"
    held.write_text(HELD)
    command = torchrun(2, "--max_restarts=1", held, *flags, together, "--tp", "1")
    run = subprocess.Popen(
        command, env=ENV | {"PYTHONPATH": str(HERE)}, stderr=subprocess.DEVNULL
    )
    wait_until(has_bytes(together, 501))
    before = children_of(run.pid)
    os.kill(before[-1], signal.SIGKILL)
    wait_until(lambda: len(set(children_of(run.pid)) - set(before)) == 2)
    n = len(answers(together))
    wait_until(has_bytes(together, 501 + together.stat().st_size))
    ranks = children_of(run.pid)
    run.kill()
    run.wait()
    wait_until(lambda: {state_of(rank) for rank in ranks} == {"Z"})
    assert len(ranks) == 2 and 0 < n < len(answers(together)) < 24

    expected = tmp_path / "alone.jsonl"
    alone = Run(tmp_path / "alone", program, [([*flags, expected],)])
    assert alone.wait() == 0, alone.said()
    for name in ("again", "nothing is left"):
        again = Run(tmp_path / name, program, [([*flags, together, "--tp", "2"],)] * 4)
        assert again.wait() == 0, again.said()
        assert answers(together) == answers(expected)


def has_bytes(file: Path, n: int) -> Callable[[], bool]:
    return lambda: file.exists() and file.stat().st_size >= n


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


def test_all_ranks_have_what_the_first_one_reads(small: Path, tmp_path: Path) -> None:
    """As a prompt, and line by line in a chat."""
    flags = ["--checkpoint_path", small, "--dtype", "float32", "--max_new_tokens", 8]
    text, chat = "äb\nba", ["--interactive"]
    runs = []
    for n, *asked in (1, "--prompt", text), (2, "--prompt", "-"), (1, *chat), (2, *chat):
        run = Run(tmp_path / f"{n}{asked[0]}", program, [([*flags, *asked],)] * n, stdin=text)
        assert run.wait() == 0, run.said()
        runs.append((run.folder / "out").read_text())
    assert runs[0] == runs[1] != "" and runs[2] == runs[3] != ""


# --- the end of one is the end of all ---

def one_sentence(stderr: str) -> str:
    """What generate.py said, once."""
    said = re.findall(r"^generate.py: error: (.*)$", stderr, re.MULTILINE)
    assert len(said) == 1, stderr
    return said[0]


@pytest.mark.parametrize("flags, message", [
    (["--tp", "2"], "3 processes do not divide into groups of --tp 2"),
    (["--seed", "-1"], "argument --seed: -1 is not at least 0 and at most 9223372036854775807"),
    ([], "4 query heads do not divide over 3 ranks; they would over 1, 2, 4"),
])
def test_a_wrong_number_is_said_once(
    flags: list[str], message: str, small: Path, tmp_path: Path
) -> None:
    """Though the first process comes late, and torchrun ends it when another one has left."""
    flags = ["--checkpoint_path", small, *flags]
    run = Run(tmp_path / "run", program, [(flags, 0.5), (flags,), (flags, 0.2)])
    assert run.wait() == 2
    assert one_sentence(run.said()) == message


def test_what_fails_in_one_rank_alone_is_said(small: Path, tmp_path: Path) -> None:
    flags = ["--checkpoint_path", small]
    run = Run(tmp_path / "run", program, [(flags,), ([*flags, "--device", "abacus"], 0.5)])
    assert run.wait() == 2
    assert "--device abacus" in one_sentence(run.said())


@pytest.mark.parametrize("other", [["--max_new_tokens", 5], ["--seed", 3, "--kv_dtype", "int8"]])
def test_ranks_with_other_arguments_are_refused(
    other: list[object], small: Path, tmp_path: Path
) -> None:
    """They would wait for each other. Where the same files are is no difference."""
    link = tmp_path / "link"
    link.symlink_to(small)
    flags = ["--prompt", "ab", "--seed", 3, "--max_new_tokens", 8]
    ranks = [([*flags, "--checkpoint_path", path],) for path in (small, link)]
    run = Run(tmp_path / "same", program, ranks)
    assert run.wait() == 0, run.said()
    others = [*flags[:4], *other, *ranks[1][0][6:]]
    run = Run(tmp_path / "run", program, [ranks[0], (others,)])
    assert run.wait() == 2
    message = "process 1 was started with other arguments than the first"
    assert one_sentence(run.said()) == message


def test_a_lost_rank_ends_the_others(small: Path, tmp_path: Path) -> None:
    """Also where no torchrun ends them."""
    flags = ["--checkpoint_path", small, "--num_samples", 1000, "--max_new_tokens", 100]
    run = Run(tmp_path / "run", program, [([*flags, "--prompt", "ab"],)] * 2)
    wait_until(has_bytes(run.folder / "out", 1))
    first, second = run.ranks
    second.kill()
    first.join(PATIENCE_S)
    assert first.exitcode == 2
    assert one_sentence(run.said()).startswith("another process has gone: ")


def test_tp_takes_torchrun(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_cli(capfd, "--checkpoint_path", small, "--tp", "2")
    assert code == 2
    assert "--tp 2 takes 2 processes: torchrun --nproc_per_node=2" in one_sentence(err)


PLACE = {
    "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


@pytest.mark.parametrize("changes, message", [
    ({}, "only 1 of 2 processes have come within "),
    ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x in the environment is no number from 1 to "),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    ({"WORLD_SIZE": "-3"}, "WORLD_SIZE=-3"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE="),
    ({"WORLD_SIZE": None}, "WORLD_SIZE="),
    ({"RANK": None}, "RANK="),
    ({"RANK": "0000000002"}, "RANK=0000000002"),
    ({"RANK": "2"}, "RANK=2 in the environment is no number from 0 to 1"),
    ({"MASTER_ADDR": None}, "MASTER_ADDR"),
    ({"MASTER_PORT": None}, "MASTER_PORT="),
    ({"MASTER_PORT": "http"}, "MASTER_PORT=http"),
    ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
])
def test_what_torchrun_would_not_set_is_refused(
    changes: dict[str, str | None], message: str, small: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("parallel.team.JOIN_S", 0.1)
    table = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in (PLACE | {"MASTER_PORT": str(table.port)} | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    code, _, err = run_cli(capfd, "--checkpoint_path", small, "--prompt", "ab")
    assert code == 2
    assert message in one_sentence(err)
