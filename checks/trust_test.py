"""Tests of what happens when something is wrong: arguments, files, devices, signals, full disks.

Each mistake gets one sentence and exit code 2, or a ValueError with the same sentence; never a
traceback, a text that is wrong without a word, or a file left behind."""
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import generate as program
from batching import Engine
from checks.common import CPU_ENV, HERE, hf_folder, ours, read_to_end, run_cli, wait_until
from checks.soak import make_checkpoints
from cli.errors import become_a_program
from formats import default
from formats.default import default_model
from formats.settings import check_settings
from generate import Request, generate, load_tokenizer
from model import Transformer, load_model, require_memory
from quantize import HARMLESS, quantize_model, save_quantized, workspace, write_quantized

PROMPT = list(range(10, 30))
Outcome = tuple[int, bytes, str]  # exit code, stdout, stderr


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, talking_folder: Callable[..., Path]
) -> Path:
    """A checkpoint with small random weights and a tokenizer."""
    return talking_folder(tmp_path_factory.mktemp("trust") / "model", max_position_embeddings=64)


@pytest.fixture
def model(folder: Path) -> Transformer:
    return load_model(folder, dtype=torch.float32)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """The checkpoint in a folder that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file)

# --- what is cached ---


def test_cached_tokens_are_kept_or_refused(model: Transformer) -> None:
    whole, = generate(model, [PROMPT], 8)
    more = [50, 51]
    want = generate(model, [PROMPT + whole[:7] + more], 8)
    model.cache = None
    generate(model, [PROMPT], 20)  # makes a cache that holds these and no more
    message = "behind 27 cached tokens these prompts need a cache of 1 x"
    with pytest.raises(ValueError, match=message):
        generate(model, [more], 30, cached=27)
    generate(model, [PROMPT], 8)
    assert generate(model, [more], 8, cached=27) == want
    with pytest.raises(ValueError, match="37 tokens are not cached: one row has 36"):
        generate(model, [more], 1, cached=37)
    model.setup_caches(2, 64)
    generate(model, [PROMPT], 8)
    with pytest.raises(ValueError, match="no room for a new one in the 0 places that are left"):
        generate(model, [more], 8, cached=200)
    with pytest.raises(ValueError, match="one row has 0"):
        generate(model, [more, more], 8, cached=20)


def test_a_shorter_text_ends_what_is_cached(model: Transformer) -> None:
    model.setup_caches(1, 64)
    generate(model, [PROMPT], 8)
    generate(model, [PROMPT[:5]], 2)
    with pytest.raises(ValueError, match="one row has 6"):
        generate(model, [[50]], 8, cached=20)


def test_tokens_that_were_read_before_a_stream_broke_are_cached(model: Transformer) -> None:
    """As where Ctrl-C ends an answer of a conversation, which then goes on."""
    model.setup_caches(1, 64)
    seen = []

    def break_off(number: int, ids: list[int]) -> None:
        seen.extend(ids)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, [PROMPT], 20, stream=break_off)
    got = generate(model, [[50]], 8, cached=24)
    assert got == generate(model, [PROMPT + seen[:4] + [50]], 8)


def test_tokens_that_the_model_was_fed_are_cached(model: Transformer) -> None:
    model.setup_caches(1, 64)
    want = generate(model, [PROMPT], 8)
    model.setup_caches(1, 64)
    model(torch.tensor([PROMPT[:17]]), torch.zeros(1, dtype=torch.int32))
    model(torch.tensor([PROMPT[17:19]]), torch.tensor([17], dtype=torch.int32))
    assert generate(model, [PROMPT[19:]], 8, cached=19) == want


def test_chunks_of_a_prompt_are_all_cached(model: Transformer) -> None:
    model.setup_caches(1, 64)
    tokens = torch.tensor([PROMPT])
    for start in (0, 10):
        model.prefill(tokens[:, start:start + 10], torch.tensor([start], dtype=torch.int32))
    got = generate(model, [[50]], 4, cached=20)
    model.cache = None
    assert got == generate(model, [PROMPT + [50]], 4)


def test_a_text_ends_with_the_models_context(model: Transformer) -> None:
    assert len(generate(model, [PROMPT], 100)[0]) == 64 - len(PROMPT)
    model.setup_caches(1, 200)
    assert len(generate(model, [PROMPT], 100)[0]) == 64 - len(PROMPT)
    with pytest.raises(ValueError, match="a prompt of 64 tokens leaves no room .* context of 64"):
        generate(model, [[5] * 64], 1)
    out, = Engine(model, context=200).run([Request([5] * 64, 1)])  # if one means it
    assert len(out[1]) == 1

# --- arguments ---


@pytest.mark.parametrize("name, values", [
    ("temperature", [-1, float("nan"), float("inf"), "hot", None]),
    ("top_p", [0, -1, 2, float("nan"), "x"]),
    ("min_p", [2, -1, float("nan")]),
    ("top_k", [0, -3, 1.5]),
    ("seed", [-1, 1.5, "x"]),
    ("cached", [-1, 1.5]),
    ("max_new_tokens", [0, -1, 1.5, "3", None]),
    ("eos_ids", [5, [None], ["a"], "ab"]),
    ("stop", ["abc", [""], [3]]),
    ("speculate_k", [-1, 16, 1.5, "3"]),
])
def test_arguments_that_make_no_sense_are_refused_by_name(
    model: Transformer, name: str, values: list[object]
) -> None:
    for value in values:
        options = {"max_new_tokens": 4, name: value}
        with pytest.raises(ValueError, match=f"^{name}"):
            generate(model, [[5, 6]], **options)


@pytest.mark.parametrize("prompts, message", [
    ("hello", "prompts must be a list, each a list.*not 'hello'"),
    (torch.tensor([[1, 2]]), "prompts must be a list.*tolist.*not tensor"),
    (iter([[1]]), "prompts must be a list"),
    (None, "prompts must be a list"),
    (["hello"], "prompt must be a list of token ids.*not 'hello'"),
    ([torch.tensor([1, 2])], "prompt must be a list of token ids.*tolist.*not tensor"),
    ([1, 2], "prompt must be a list.*not 1"),
    ([[1.5]], r"prompt must be a list.*not \[1.5\]"),
    ([[True]], r"prompt must be a list.*not \[True\]"),
    ([], "there is no prompt"),
    ([[5], []], "a prompt is empty"),
    ([[600]], "token 600, outside the vocabulary of 600"),
])
def test_prompts_that_are_no_token_ids_get_a_sentence(
    model: Transformer, prompts: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, 4)
    assert generate(model, [[np.int64(5)]], 4) == generate(model, [[5]], 4)


@pytest.mark.parametrize("options, message", [
    (dict(max_batch_size=0), "a KV cache of 0 x 8 tokens holds none"),
    (dict(max_seq_len=-3), "a KV cache of 1 x -3 tokens holds none"),
    (dict(kv_dtype=torch.int64), "not torch.int64"),
    (dict(kv_dtype="int8"), "not int8"),
    (dict(attention="foo"), "no attention 'foo'"),
])
def test_caches_that_cannot_be_are_refused(
    model: Transformer, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.setup_caches(**{"max_batch_size": 1, "max_seq_len": 8, **options})


@pytest.mark.parametrize("options, message", [
    (dict(dtype=torch.int32), "no model can have the dtype torch.int32"),
    (dict(dtype="float32"), "no model can have the dtype float32"),
    (dict(device="abacus"), "no model can be on device abacus"),
    (dict(device="meta"), "no model can be on device meta"),
])
def test_models_that_cannot_be_are_refused(
    folder: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(folder, **options)


def test_threads_take_turns(model: Transformer) -> None:
    prompts = [[i, i + 1] for i in range(4)]
    model.setup_caches(1, 64)
    want = [generate(model, [prompt], 12) for prompt in prompts]
    got = [[] for _ in prompts]

    def work(i: int) -> None:
        for _ in range(3):
            got[i].append(generate(model, [prompts[i]], 12))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [[text] * 3 for text in want]


def test_generate_inside_its_own_stream_is_refused(model: Transformer) -> None:
    def again(number: int, ids: list[int]) -> None:
        generate(model, [[5]], 1)

    with pytest.raises(ValueError, match="generate is at work with this model"):
        generate(model, [PROMPT], 4, stream=again)
    assert len(generate(model, [PROMPT], 4)[0]) == 4

# --- checkpoints ---


@pytest.mark.parametrize("dtype", [
    torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int8,
], ids=str)
def test_weights_of_no_floating_dtype_are_refused(copied: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensor(copied, name, lambda tensor: tensor.to(dtype))
    with pytest.raises(ValueError, match=f"tensor {name} has dtype {dtype}"):
        load_model(copied)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.1.input_layernorm"])
def test_weights_that_are_not_finite_are_refused(copied: Path, name: str, value: float) -> None:
    """1e30 is a number, but none in float16."""
    def spoil(tensor: Tensor) -> Tensor:
        tensor.view(-1)[7] = value
        return tensor

    change_tensor(copied, f"{name}.weight", spoil)
    with pytest.raises(ValueError, match="not finite in torch.float16"):
        load_model(copied, dtype=torch.float16)
    if value == 1e30:
        load_model(copied, dtype=torch.bfloat16)


WINDOW = dict(model_type="qwen2", use_sliding_window=True, sliding_window=8)


@pytest.mark.parametrize("changes, message", [
    (dict(model_type=["llama"]), "makes no sense .*unhashable type: 'list'"),
    (dict(architectures=5), "makes no sense .*'int' object is not iterable"),
    (dict(WINDOW, layer_types="x"), "layer_types = 'x', not an entry for each of 2"),
    (dict(WINDOW, layer_types=["foo", "bar"]), "'bar'.*: only full_attention and sliding_attent"),
    (dict(WINDOW, layer_types=["full_attention"]), "layer_types = .*, not an entry for each of 2"),
    (dict(model_type="jamba", layer_types=["linear_attention", "full_attention"]),
     "unsupported architecture"),
    (dict(num_experts=2**12), "num_experts = 4096: it must be at most 2048"),
    (dict(moe_intermediate_size=2**25), "moe_intermediate_size = 33554432: it must be at most"),
    (dict(max_position_embeddings=None, model_max_length=10**30), "model_max_length = 10+: it"),
    (dict(max_window_layers=-3), "max_window_layers = -3: it must be a whole number from 0"),
    (dict(max_window_layers=1.5), "max_window_layers = 1.5: it must be a whole number"),
    (dict(num_hidden_layers=10**9), "num_hidden_layers = 1000000000: it must be at most 2048"),
    (dict(rope_theta=-10**30), "rope_theta = -10+: it must be at most"),
    (dict(model_type="glm4", partial_rotary_factor=0.5, head_dim=2**31),
     "head_dim = 2147483648: it must be at most 65536"),
    (dict(vocab_size=10**30), r"vocab_size = 10+: it must be at most"),
    (dict(rope_theta=10**400), "rope_theta = 10+: it must be at most"),
    (dict(rope_theta=float("inf")), "rope_theta = inf: it must be a finite number"),
    (dict(use_sliding_window="no"), "use_sliding_window = 'no': it must be true or false"),
    (dict(use_parallel_residual="false"), "use_parallel_residual = .*true or false"),
    (dict(tie_word_embeddings="false"), "tie_word_embeddings = .*true or false"),
    (dict(rope_scaling=dict(type=["x"])), "unsupported rope type .*'x'"),
    (dict(rope_scaling=dict(type="linear", factors=[0] * 8)), "factors = .*numbers above 0"),
    (dict(rope_scaling=dict(type="linear", factors="abc")), "factors = .*numbers above 0"),
    (dict(rope_scaling=dict(type="linear", factors=[1.0, 2])), "makes no sense"),
    (dict(rope_scaling=dict(type="yarn", factor=float("nan"))), "factor = nan"),
    (dict(hidden_act=["silu"]), r"unsupported hidden_act \['silu'\]"),
])
def test_settings_that_make_no_sense_are_refused(
    copied: Path, changes: dict[str, object], message: str
) -> None:
    change_config(copied, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(copied)


def test_a_window_from_a_layer_on_needs_no_list_of_layers(tmp_path: Path) -> None:
    """As files have it that are older than layer_types."""
    made = hf_folder(
        tmp_path / "model", model_type="qwen2", num_hidden_layers=3, sliding_window=4,
        use_sliding_window=True, max_window_layers=1,
    )
    assert load_model(made).config.windows == (None, 4, 4)


def test_half_as_much_again_as_is_free_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path("/proc/meminfo").read_text()
    monkeypatch.setattr(Path, "read_text", lambda path: text)  # it changes all the time
    available = re.search(r"MemAvailable:\s+(\d+)", text)
    free = 1024 * int(available[1])
    with pytest.raises(ValueError, match="it needs .* GB but cpu has .* GB free; try less"):
        require_memory(1.5 * free, "cpu", "it", "try less")
    require_memory(0.5 * free, "cpu", "it", "try less")


def test_saved_weights_can_be_read_by_whom_the_configuration_can(
    model: Transformer, tmp_path: Path
) -> None:
    save_quantized(quantize_model(model, "int8"), tmp_path / "saved")
    files = [tmp_path / "saved" / name for name in ("model.safetensors", "config.json")]
    assert files[0].stat().st_mode == files[1].stat().st_mode


def test_settings_of_real_models_are_accepted() -> None:
    """Those that look strange: null, Infinity inside a list, sizes of mixtures of experts."""
    check_settings(dict(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"], layer_types=None, head_dim=None,
        sliding_window=None, num_hidden_layers=126, vocab_size=262208, intermediate_size=53248,
        time_step_limit=[0.0, float("inf")], rope_scaling=None, rope_theta=1e7,
        rope_parameters=dict(rope_type="linear", factors=[1.0, 32.5]), max_window_layers=0,
        num_experts=512, use_cache=True, torch_dtype="bfloat16", initializer_range=0.02,
        max_position_embeddings=4096, model_max_length=10**30,
    ))


@pytest.mark.parametrize("eos", ["x", -1, 1.5, True, [2, "x"], [[1]], {"a": 1}])
def test_an_eos_that_is_no_token_is_refused(copied: Path, eos: object) -> None:
    change_config(copied, eos_token_id=eos)
    with pytest.raises(ValueError, match="config.json has eos_token_id .*, which is no token"):
        load_tokenizer(copied)


@pytest.mark.parametrize("content, message", [
    ('{"a":' + "[" * 100_000, "maximum recursion depth"),
    ('{"a": ' + "9" * 5000 + "}", "4300 digits"),
    ("[]", "not a JSON object"),
    ("{", "Expecting"),
    ("\xff", "codec"),
])
def test_a_config_that_is_no_json_object_gets_one_line(
    copied: Path, content: str, message: str
) -> None:
    (copied / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as e:
        load_model(copied)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("device", [None, "/dev/zero"], ids=["pipe", "device"])
@pytest.mark.parametrize("name", [
    "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja",
    "tokenizer_config.json", "generation_config.json",
])
def test_a_pipe_in_place_of_a_file_is_refused(
    copied: Path, name: str, device: str | None
) -> None:
    """Opening it would wait for a writer for ever, and a device may have no end."""
    (copied / name).unlink(missing_ok=True)
    if device is None:
        os.mkfifo(copied / name)
    else:
        (copied / name).symlink_to(device)
    with pytest.raises(ValueError, match="no plain file|no tokenizer.json"):
        load_tokenizer(copied)
        load_model(copied)


@pytest.mark.parametrize("value", [
    [1, 2], {"a": 5}, {"a": None}, {5: torch.zeros(2).to_sparse()},
    {"a": torch.zeros(2, device="meta")},
    {"a": torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)},
], ids=["list", "number", "none", "sparse", "meta", "quantized"])
@pytest.mark.filterwarnings("ignore")
def test_odd_pickles_are_refused(copied: Path, value: object) -> None:
    (copied / "model.safetensors").unlink()
    file = copied / "pytorch_model.bin"
    torch.save(value, file)
    with pytest.raises(ValueError, match=f"cannot read {file}: "):
        load_model(copied)


def write_odd_gguf(path: Path, settings: dict[str, object], tensors: dict[str, np.ndarray]) -> Path:
    """A GGUF file of arch llama with these settings, numbers or arrays of them."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in settings.items():
        if isinstance(value, int):
            writer.add_uint32(f"llama.{name}", value)
        elif isinstance(value, str):
            writer.add_string(f"llama.{name}", value)
        else:
            writer.add_array(f"llama.{name}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SIZES = {
    "block_count": 1, "embedding_length": 32, "feed_forward_length": 32, "context_length": 64,
    "attention.head_count": 4,
}
TABLE = {"token_embd.weight": np.zeros((40, 32), np.float32)}


@pytest.mark.parametrize("settings, tensors, message", [
    ({}, {"token_embd.weight": np.zeros(8, np.float32)}, "no tensor blk.0"),
    ({"attention.head_count": [4, 4]}, {}, "num_attention_heads"),
    ({"rope.dimension_count": [1, 2]}, {}, "makes no sense"),
    ({"block_count": "many"}, {}, "num_hidden_layers"),
    ({"block_count": 2**31}, {}, "num_hidden_layers = 2147483648: it must be at most"),
    ({}, {"rope_freqs.weight": np.ones(3, np.float32)}, "makes no sense"),
    ({}, {"rope_freqs.weight": np.zeros(4, np.float32)}, "factors = .*above 0"),
])
def test_odd_gguf_files_are_refused(
    tmp_path: Path, settings: dict[str, object], tensors: dict[str, np.ndarray], message: str
) -> None:
    path = write_odd_gguf(tmp_path / "x.gguf", SIZES | settings, TABLE | tensors)
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_every_checkpoint_that_the_soak_spoils_is_whole(tmp_path: Path) -> None:
    for path in make_checkpoints(tmp_path / "made").values():
        assert load_model(path).config.n_layer == 2
        ids = load_tokenizer(path).encode("ab")
        assert ids


def test_a_tokenizer_says_which_entry_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="cannot read the tokenizer of .*: there is no 'merges'"):
        load_tokenizer(path)


@pytest.mark.parametrize("path", ["x" * 5000, "x" * 5000 + ".json", "a\0b"])
def test_impossible_paths_get_a_sentence(path: str) -> None:
    with pytest.raises(ValueError, match="no such file or folder, nor a model the hub can give"):
        load_model(path)

# --- the command line ---


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], folder: Path) -> Callable[..., tuple[int, str, str]]:
    """generate.py's main with the small model."""
    def run(*words: object) -> tuple[int, str, str]:
        flags = ["--device", "cpu", "--dtype", "float32", "--max_new_tokens", 8]
        return run_cli(capfd, "--checkpoint_path", folder, *flags, *words)

    return run


@pytest.mark.parametrize("words, message", [
    (["--prompt", "x", "--device", ""], "--device : "),
    (["--prompt", "x", "--device", "meta"], "--device meta: "),
    (["--prompt", "x", "--device", "hpu"], "--device hpu: "),
    (["--prompt", "x", "--seed", "9" * 5000], "--seed"),
    (["--prompt", "x", "--checkpoint_path", "y" * 5000], "no such file or folder"),
    (["--prompt", "@" + "x" * 5000], "cannot read the prompt"),
    (["--quantize", "int8", "--save", "x" * 5000], "cannot write"),
])
def test_mistakes_get_one_short_sentence(
    cli: Callable[..., tuple[int, str, str]], words: list[str], message: str
) -> None:
    code, out, err = cli(*words)
    last = err.splitlines()[-1]
    assert code == 2 and out == "" and "Traceback" not in err
    assert last.startswith("generate.py: error: ") and message in last and len(last) < 700


@pytest.mark.parametrize("words, named", [
    (["--top_p", "0.5", "--seed", "3"], "--top_p, --seed"),
    (["--top_k", "5", "--min_p", "0.1"], "--top_k, --min_p"),
    (["--top_k", "5", "--temperature", "1"], None),
    (["--prompt", "9", "--seed", "3"], None),
])
def test_settings_that_do_nothing_are_named(
    cli: Callable[..., tuple[int, str, str]], words: list[str], named: str | None
) -> None:
    code, _, err = cli("--prompt", "one", *words)
    note = f"note: {named} changes nothing at --temperature 0, which draws no tokens"
    assert code == 0 and (note in err) == (named is not None) == ("note: " in err)


@pytest.mark.parametrize("words", [[], ["--dtype", "float32"]], ids=["plain", "more"])
@pytest.mark.parametrize("size", [2**50, 2**62])
def test_a_cpu_without_the_memory_says_so(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, size: int,
    words: list[str],
) -> None:
    def too_large(*_: object, **options: object) -> None:
        torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr("generate.Decoder.__init__", too_large)  # and that of an Engine
    code, _, err = run_cli(
        capfd, "--checkpoint_path", folder, "--device", "cpu", "--prompt", "x", *words
    )
    assert code == 2 and "there is not enough memory; lower --max_seq_len" in err


@pytest.mark.parametrize("words", [[], ["--dtype", "float32"]], ids=["plain", "more"])
def test_a_bug_stays_a_traceback(
    monkeypatch: pytest.MonkeyPatch, folder: Path, words: list[str]
) -> None:
    def broken(*_: object, **options: object) -> None:
        torch.ones(2) @ torch.ones(3)

    monkeypatch.setattr("generate.Decoder.__init__", broken)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        program.main(["--checkpoint_path", str(folder), "--device=cpu", "--prompt", "x", *words])

# --- as a process: streams, signals, what is left behind ---


def in_a_process(
    work: Callable[[], None], out: Path, encoding: str = "utf-8", wait: bool = True
) -> tuple[int, int]:
    """Run generate.py in a child of this process, where importing takes no time ->
    (its id, its exit code, negative for the signal that ended it)."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            for number, path in ((1, out), (2, out.with_suffix(".err"))):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
            sys.stdout = open(1, "w", encoding=encoding, closefd=False)
            sys.stderr = open(2, "w", closefd=False)
            torch.set_num_threads(1)  # those of the parent did not come along
            become_a_program()
            work()
            code = 0
        except SystemExit as e:
            code = e.code
        finally:
            os._exit(code)
    return process, exit_code(process) if wait else 0


def exit_code(process: int) -> int:
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def commanded(folder: Path, *words: object) -> Callable[[], None]:
    flags = ["--device", "cpu", "--checkpoint_path", folder, *words]
    return lambda: program.main([str(flag) for flag in flags])


@pytest.mark.parametrize("words", [["--prompt", "x"], ["--prompt", "x", "--json"], ["--help"]])
def test_a_full_disk_behind_stdout_gets_one_sentence(
    folder: Path, tmp_path: Path, words: list[str]
) -> None:
    out = tmp_path / "full"
    out.symlink_to("/dev/full")
    _, code = in_a_process(commanded(folder, *words), out)
    err = out.with_suffix(".err").read_text().splitlines()
    want = "generate.py: error: cannot read or write the output: No space left on device"
    assert code == 2 and err[-1] == want


def test_text_leaves_in_utf8(folder: Path, tmp_path: Path) -> None:
    """Whatever the locale, where it goes to no terminal."""
    out = tmp_path / "out"
    work = commanded(folder, "--prompt", "\N{SLIGHTLY SMILING FACE}", "--max_new_tokens", 40)
    _, code = in_a_process(work, out, encoding="ascii")
    assert code == 0 and not out.read_bytes().decode().isascii()


ESCAPES = "a\x1b[2J\rb\nc\x07\x9b"


@pytest.mark.parametrize("file, content", [
    (None, ""),
    ("config.json", json.dumps({"model_type": "llama", "hidden_act": ESCAPES})),
    ("tokenizer.json", json.dumps({"model": {"type": ESCAPES}})),
    ("chat_template.jinja", f"{{{{ raise_exception({ESCAPES!r}) }}}}"),
], ids=["names", "settings", "tokenizer", "template"])
def test_no_sentence_drives_the_terminal(
    capfd: pytest.CaptureFixture[str], copied: Path, tmp_path: Path, file: str | None, content: str
) -> None:
    """Names of files and what they say may have been chosen to."""
    folder = copied.rename(tmp_path / ESCAPES)
    if file is not None:
        (folder / file).write_text(content)
    words = [] if file is not None else ["--prompt", f"@{ESCAPES}"]
    code, _, err = run_cli(capfd, "--device", "cpu", "--checkpoint_path", folder, *words)
    assert code == 2 and err.count("\n") == 1 and err.rstrip("\n").isprintable()


def test_a_text_drives_no_terminal_and_is_else_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    ours, theirs = os.openpty()
    with open(theirs, "w") as terminal, open(tmp_path / "file", "w") as file:
        for out in (terminal, file):
            monkeypatch.setattr(sys, "stdout", out)
            become_a_program()
            print(f"\tx{ESCAPES}", flush=True)
    shown = read_to_end(ours)
    assert shown == "\tx" + ESCAPES.translate(HARMLESS).replace("\n", "\r\n") + "\r\n"
    assert (tmp_path / "file").read_bytes().decode() == f"\tx{ESCAPES}\n"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_saving_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals
) -> None:
    def slowly(model: Transformer, new: Path) -> None:
        write_quantized(model, new)
        time.sleep(60)

    monkeypatch.setattr("cli.program.write_quantized", slowly)
    target = tmp_path / "to" / "saved"
    work = commanded(folder, "--quantize", "int8", "--save", target)
    before = signal.signal(sent, signal.SIG_DFL)  # nohup ignores one, which stays so
    process, _ = in_a_process(work, tmp_path / "out", wait=False)
    signal.signal(sent, before)
    wait_until(lambda: list(tmp_path.glob(".gpt-flash-saved-*/saved/config.json")))
    os.kill(process, sent)
    assert exit_code(process) == 128 + sent
    assert not target.parent.exists() and not list(tmp_path.glob(".gpt-flash-*"))


def script(path: Path, line: str) -> str:
    """An executable that stands for Python, of one line of shell."""
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


def test_sigterm_while_downloading_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what pip wrote into its own temporary folder."""
    pip = script(tmp_path / "python", 'head -c 9999 /dev/zero > "$TMPDIR/part"; exec sleep 60')
    monkeypatch.setattr(sys, "executable", pip)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = tmp_path / "cache" / "gpt-flash"
    process, _ = in_a_process(
        lambda: program.main(["--device", "cpu"]), tmp_path / "out", wait=False
    )
    wait_until(lambda: list(cache.glob(".gpt-flash-fetching-*/part")))
    os.kill(process, signal.SIGTERM)
    assert exit_code(process) == 143
    assert list(cache.iterdir()) == []


def test_what_a_killed_run_left_goes_and_what_another_uses_stays(tmp_path: Path) -> None:
    def die() -> None:
        with workspace(tmp_path, "x") as folder:
            (folder / "large").write_bytes(bytes(1000))
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_process(die, tmp_path / "out")[1] == -signal.SIGKILL
    left, = tmp_path.glob(".gpt-flash-x-*")
    others = tmp_path / ".gpt-flash-y-12345678"
    others.mkdir()
    for folder in (left, others):
        os.utime(folder, (0, 0))
    pipe = tmp_path / ".gpt-flash-x-pipe"  # as others may put into a folder for all
    os.mkfifo(pipe)
    os.utime(pipe, (0, 0))
    new = tmp_path / ".gpt-flash-x-abcdefgh"  # of a run that has not locked it yet
    new.mkdir()
    os.utime(new, (2**32, 2**32))  # a moment ago, however slow this machine is
    with workspace(tmp_path, "x") as mine:
        assert not left.exists() and others.exists() and new.exists()
        os.utime(mine, (0, 0))
        with workspace(tmp_path, "x"):
            assert mine.exists()
    assert not mine.exists()


def test_a_failed_download_says_why_and_what_to_do_offline(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "echo 'No space left on device' >&2; exit 1"
    monkeypatch.setattr(sys, "executable", script(tmp_path / "python", why))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code, _, err = run_cli(capfd, "--device", "cpu")
    assert code == 2 and "No space left on device\n" in err
    assert "pip says why above. Offline: on a machine" in err
    assert list((tmp_path / "cache" / "gpt-flash").iterdir()) == []


@pytest.mark.parametrize("cache", ["/proc/nope", "/etc/hostname", "/" + "x" * 5000])
def test_absurd_cache_folders_get_a_sentence(monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    with pytest.raises(ValueError, match="cannot keep the default model .*set XDG_CACHE_HOME"):
        default_model()


# what Python runs as it starts, so that Ctrl-C comes when a module is looked for
CTRL_C = """
import os, signal, sys, types

def find_spec(name, path=None, target=None):
    if name == {!r}:
        os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, types.SimpleNamespace(find_spec=find_spec))
"""


@pytest.mark.parametrize("module", ["argparse", "torch.nn", "sentencepiece", "cli.answer"])
def test_ctrl_c_during_the_imports_is_quiet(module: str, tmp_path: Path) -> None:
    """A program started from here begins with Ctrl-C as any other has it, under nohup too."""
    (tmp_path / "sitecustomize.py").write_text(CTRL_C.format(module))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, HERE / "generate.py", "--device", "cpu", "--prompt", "x"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=CPU_ENV | {"PYTHONPATH": str(tmp_path)},
    )
    signal.signal(signal.SIGINT, before)
    out, err = process.communicate()
    assert process.returncode in (-signal.SIGINT, 130)
    assert (out, ours(err.decode())) == (b"", "")


def test_a_reader_that_leaves_early_ends_the_help_quietly() -> None:
    command = f"{sys.executable} {HERE / 'generate.py'} --help | true"
    result = subprocess.run(command, shell=True, stderr=subprocess.PIPE, env=CPU_ENV)
    assert result.returncode == 0 and not ours(result.stderr.decode())


def test_another_default_model_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit of it may have flipped. It is looked at once for each change, and stays."""
    looked = []

    def sha256(content: bytes) -> object:
        looked.append(content)
        return hashlib.new("sha256", content)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(default.hashlib, "sha256", sha256)
    monkeypatch.setattr(default, "SHA256_OF_FILE", hashlib.new("sha256", b"model").hexdigest())
    file = tmp_path / "gpt-flash" / default.FILE
    file.parent.mkdir()
    file.write_bytes(b"model")
    assert default_model() == default_model() == file
    assert looked == [b"model"]
    before = file.stat()

    def change() -> bool:
        file.write_bytes(b"modem")
        os.utime(file, ns=(before.st_mtime_ns,) * 2)  # as what copies files and their times does
        return file.stat().st_ctime_ns > before.st_ctime_ns

    wait_until(change)  # a file system's clock may go by seconds
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{file} is damaged or another model; remove it"):
            default_model()
    assert file.read_bytes() == b"modem"
    file.write_bytes(b"model")
    assert default_model() == file
