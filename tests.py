"""The promises of the core files, and of the seam; `python tests.py` runs this file and checks/.

Arguments go to pytest, as in `python tests.py -k cache`; where one names a file, only that runs.
Without a GPU the Triton kernels run in Triton's interpreter; with one the tests also run there.
"""
import checks  # before Triton is imported: it says whether Triton interprets

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceTrainer
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from batching import Engine
from checks.common import CHECKPOINTS, CPU_ENV, DEVICES, HERE, PROMPTS
from checks.common import close, hf_folder, hf_logits, positions, random_tokens
from generate import FILTERS, Decoder, Filter, Request, Sampling, Tokenizer
from generate import compile_model, generate, kind_of, sample
from kernels import flash_decode_reference
from model import FAMILIES, Block, KVCache, Transformer, load_model

pytest_plugins = ["checks.fixtures"]  # see checks/conftest.py
Checkpoint = Callable[[str], tuple[Path, PreTrainedModel]]  # the fixture: random ones, by name

# --- every family equals transformers ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attention", ["flash", "math"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_equals_transformers(
    checkpoint: Checkpoint, name: str, attention: str, device: str
) -> None:
    """Prefill, token by token, several at once, and rows of one batch at different depths."""
    folder, hf = checkpoint(name)
    model = load_model(folder, device=device, dtype=torch.float32)
    model.setup_caches(3, 64, attention=attention, rings=False)  # rows go back to any token
    tokens = random_tokens(3, 40)
    expected = hf_logits(hf, tokens)  # (B, T, vocab)

    def check(depths: list[int], n: int) -> None:
        """n tokens of each row, row b's behind depths[b] cached ones."""
        chunk = torch.stack([tokens[b, at:at + n] for b, at in enumerate(depths)])
        want = torch.stack([expected[b, at:at + n] for b, at in enumerate(depths)])
        close(model(chunk.to(device), positions(*depths, device=device)), want)

    check([0, 0, 0], 20)
    for depth in range(20, 25):
        check([depth, depth, depth], 1)
    check([25, 25, 25], 5)
    check([20, 20, 20], 20)  # a chunk of a prompt behind a cached prefix
    if model.cache.windows is None:  # or rows have a state, and cannot go back so far
        check([3, 39, 17], 1)
        check([5, 22, 0], 18)


@pytest.mark.parametrize("name", [
    "llama", "mistral", "qwen3", "gemma2", "gemma3", "gemma4", "gemma4-moe", "phi3", "lfm2",
])
def test_greedy_equals_transformers(checkpoint: Checkpoint, name: str) -> None:
    """A ragged batch gives each prompt what it gets alone in transformers."""
    folder, hf = checkpoint(name)
    model = load_model(folder, dtype=torch.float32)
    torch.manual_seed(2)
    prompts = [torch.randint(3, 131, (n,)).tolist() for n in (1, 13, 30, 2)]
    settings = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    for prompt, new in zip(prompts, generate(model, prompts, 20)):
        want = hf.generate(torch.tensor([prompt]), min_new_tokens=20, **settings)
        assert new == want[0, len(prompt):].tolist()


def loaded(checkpoint: Checkpoint, name: str = "llama") -> Transformer:
    """A random checkpoint in float32, where parity is exact enough to compare tokens."""
    return load_model(checkpoint(name)[0], dtype=torch.float32)

# --- the cache ---


def test_context_beyond_memory(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    with pytest.raises(ValueError, match="KV cache of 1 x 10000000000 tokens needs .* GB"):
        model.setup_caches(1, 10**10)


def test_cache_overflow_is_refused(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    with pytest.raises(ValueError, match="setup_caches"):
        model(random_tokens(1, 1), positions(0))
    model.setup_caches(1, 8)
    with pytest.raises(ValueError, match="exceed the cache of 8"):
        model(random_tokens(1, 5), positions(4))


@pytest.mark.parametrize("attention", ["flash", "math"])
def test_dead_positions_are_never_seen(checkpoint: Checkpoint, attention: str) -> None:
    """What lies beyond a row's live length does not change its logits, whatever the capacity."""
    model = loaded(checkpoint)
    tokens = random_tokens(1, 30)

    def decode(capacity: int, poison: float) -> Tensor:
        model.setup_caches(1, capacity, attention=attention)
        for layer in model.cache.whole:
            layer.kv.fill_(poison)
        model(tokens[:, :20], positions(0))
        steps = [model(tokens[:, i:i + 1], positions(i)) for i in range(20, 25)]
        return torch.cat(steps)

    clean = decode(32, 0.0)
    close(decode(32, 1e4), clean, 1e-5)
    close(decode(96, -1e4), clean, 1e-5)


def test_a_cache_needs_no_model() -> None:
    """Plain integers make one, and flash_decode runs through its layers."""
    cache = KVCache(2, 2, 16, max_batch_size=3, max_seq_len=32, dtype=torch.float32)
    assert len(cache.layers(slice(0, 3))) == 2
    torch.manual_seed(0)
    for whole, layer in zip(cache.whole, cache.layers(slice(1, 3))):
        q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16)
        whole.kv.normal_()
        # the reference appends too: it gets a copy of rows 1 and 2
        keys, values = whole.kv[:, 1:3].clone()
        want = flash_decode_reference(q, keys, values, positions(5, 20), k, v)
        close(layer.flash_decode(q, k, v, positions(5, 20)), want, 1e-5)
        assert torch.equal(whole.kv[:, 1:3], torch.stack((keys, values)))


def test_two_caches_in_turn(checkpoint: Checkpoint) -> None:
    """model(..., cache) reads and writes the cache that it is given, and no other."""
    folder, hf = checkpoint("llama")
    model = load_model(folder, dtype=torch.float32)
    first, second = random_tokens(2, 1, 30)
    texts = [(first, model.setup_caches(1, 32)), (second, model.setup_caches(1, 48))]
    for tokens, cache in texts:
        close(model(tokens[:, :20], positions(0), cache), hf_logits(hf, tokens)[:, :20])
    for i in range(20, 25):
        for tokens, cache in texts:
            close(model(tokens[:, i:i + 1], positions(i), cache), hf_logits(hf, tokens)[:, i:i + 1])


# --- sampling ---


PROBABILITIES = [0.5, 0.3, 0.15, 0.05]


def request(prompt: list[int] = PROMPTS[0], n: int = 12, **settings: object) -> Request:
    return Request(prompt, n, **settings)


def draw(logits: Tensor, requests: list[Request]) -> Tensor:
    """A token [B] for each row of logits [B, V], always with the same random numbers, of one
    stream."""
    requests = [dataclasses.replace(each, seed=0) for each in requests]
    sampling = Sampling.of(requests, torch.device("cpu"))
    position = torch.arange(len(requests), dtype=torch.int32)
    return sample(logits, sampling, kind_of(requests), position)


def draws(settings: dict, n: int = 4000) -> Tensor:
    """How often each token of PROBABILITIES is drawn."""
    logits = torch.tensor(PROBABILITIES).log().repeat(n, 1)
    picks = draw(logits, [request(**settings)] * n)
    return torch.bincount(picks, minlength=len(PROBABILITIES)) / n


@pytest.mark.parametrize("settings, want", [
    (dict(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
    (dict(temperature=0.0), [1, 0, 0, 0]),
    (dict(temperature=0.5), [0.685, 0.247, 0.062, 0.007]),
    (dict(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0]),
    (dict(temperature=1.0, top_k=9), [0.5, 0.3, 0.15, 0.05]),
    (dict(temperature=1.0, top_p=0.5), [1, 0, 0, 0]),
    (dict(temperature=1.0, top_p=0.6), [0.625, 0.375, 0, 0]),
    (dict(temperature=1.0, top_p=0.01), [1, 0, 0, 0]),
    (dict(temperature=1.0, min_p=0.5), [0.625, 0.375, 0, 0]),
    (dict(temperature=1.0, min_p=1.0), [1, 0, 0, 0]),
    (dict(temperature=1.0, top_k=3, top_p=0.9, min_p=0.5), [0.625, 0.375, 0, 0]),
], ids=str)
def test_sampling_distribution(settings: dict, want: list[float]) -> None:
    got, expected = draws(settings), torch.tensor(want)
    assert (got - expected).abs().max() < 0.03
    assert torch.equal(got > 0, expected > 0)


def drop_likeliest(probs: Tensor, setting: Tensor) -> Tensor:
    """A filter of a fork: none of as many of the likeliest tokens as the setting says."""
    rank = torch.arange(probs.shape[1])
    return probs.masked_fill(rank < setting, 0)


@dataclasses.dataclass(frozen=True)
class ForksRequest(Request):
    dropped: int | None = dataclasses.field(default=None, kw_only=True)


@pytest.mark.parametrize("settings", [
    {}, dict(top_k=3), dict(top_p=0.9), dict(min_p=0.01), dict(top_k=3, top_p=0.9),
], ids=str)
def test_a_sampler_that_is_added_to_filters_is_never_skipped(
    monkeypatch: pytest.MonkeyPatch, settings: dict
) -> None:
    """It is on for every row, or as the setting of its name says; other rows do without."""
    plain = request(temperature=1.0, **settings)
    fork = ForksRequest(PROMPTS[0], 12, 1.0, **settings)
    logits = torch.tensor(PROBABILITIES).log().repeat(999, 1)
    assert (draw(logits, [plain] * 999) == 0).any()
    monkeypatch.setitem(FILTERS, "dropped", Filter(drop_likeliest, 1.0))
    assert (draw(logits, [plain] * 999) > 0).all()  # no setting of that name
    monkeypatch.setitem(FILTERS, "dropped", Filter(drop_likeliest, 0.0))
    assert (draw(logits, [fork] * 999) == 0).any()
    drops = dataclasses.replace(fork, dropped=1)
    assert (draw(logits, [drops] * 999) > 0).all()
    mixed = draw(logits, [fork, drops, plain] * 333).view(-1, 3)
    assert ((mixed == 0).any(0) == torch.tensor([True, False, True])).all()

# --- generate ---


def test_generate_stops_at_eos_per_row(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    free = generate(model, PROMPTS, 12)
    eos = {free[0][3], free[2][7]}
    streamed = [[], [], []]

    def stream(row: int, ids: list[int]) -> None:
        streamed[row].extend(ids)

    out = generate(model, PROMPTS, 12, eos_ids=eos, stream=stream)
    for row, full in zip(out, free):
        ends = [i for i, token in enumerate(full) if token in eos]
        assert row == full[:min(ends, default=11) + 1]
    assert streamed == out and len(out[0]) <= 4


def test_seeds(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)

    def answers(seed: int | None) -> list[list[int]]:
        return generate(model, PROMPTS, 10, temperature=1.5, top_p=0.95, seed=seed)

    assert answers(1) == answers(1) != answers(2)
    assert answers(None) != answers(None)


def test_generate_continues_a_cache(checkpoint: Checkpoint) -> None:
    """Feeding a conversation turn by turn gives what feeding it whole gives."""
    model = loaded(checkpoint, "mistral")
    ids = random_tokens(45).tolist()
    whole = generate(model, [ids], 8)
    model.setup_caches(1, 60)
    generate(model, [ids[:20]], 1)
    assert generate(model, [ids[20:]], 8, cached=20) == whole


def test_long_prompts_prefill_in_chunks(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(checkpoint)
    whole = generate(model, PROMPTS, 8)
    monkeypatch.setattr("generate.PREFILL_CHUNK", 7)
    assert generate(model, PROMPTS, 8) == whole


def test_context_ends_generation(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    model.setup_caches(3, 34)
    assert [len(row) for row in generate(model, PROMPTS, 30)] == [30, 30, 4]
    model.setup_caches(3, 30)
    with pytest.raises(ValueError, match="30 tokens leaves no room"):
        generate(model, PROMPTS, 5)


@pytest.mark.parametrize("prompts, n, message", [
    ([], 5, "no prompt"),
    ([[]], 5, "empty"),
    ([[3], [131]], 5, "token 131"),
    ([[-1]], 5, "token -1"),
    ([[3]], 0, "max_new_tokens"),
])
def test_generate_refuses_before_it_allocates(
    checkpoint: Checkpoint, prompts: list[list[int]], n: int, message: str
) -> None:
    model = loaded(checkpoint)
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, n)
    assert model.cache is None


def is_last(last: int, tokens: list[int]) -> bool:
    """Request.ends: once that token comes; each comes in a list of its own."""
    return tokens == [last]


def ragged_requests(cached: int, free: list[list[int]]) -> list[Request]:
    """Greedy and sampled ones of all lengths, of which some end early. free: what the greedy ones
    say if nothing ends them."""
    return [
        request(PROMPTS[0], 9, cached=cached),
        request(PROMPTS[2], 14, temperature=1.5, top_p=0.9, seed=3, cached=cached),
        request(PROMPTS[1], 12, eos_ids=frozenset({free[1][5]}), cached=cached),
        request([40, 41], 1, cached=cached),
        request(list(range(60, 77)), 99, temperature=0.7, top_k=9, seed=1, cached=cached),
        request(PROMPTS[2], 12, ends=partial(is_last, free[2][4]), cached=cached),
        request([7] * 5, 20, temperature=1.0, min_p=0.05, seed=2, cached=cached),
    ]


@pytest.mark.parametrize("rows", [7, 3], ids=["a row for each", "fewer rows"])
@pytest.mark.parametrize("name, kv_dtype, cached", [
    ("llama", None, 0), ("mistral", None, 0), ("qwen3", torch.int8, 0), ("llama", None, 20),
])
def test_decoder_and_engine_say_the_same_tokens(
    checkpoint: Checkpoint, name: str, kv_dtype: torch.dtype | None, cached: int, rows: int
) -> None:
    """Whatever the requests are, and however many rows the Engine has to refill."""
    model = loaded(checkpoint, name)
    prefix = random_tokens(20).tolist()[:cached]
    model.setup_caches(len(PROMPTS), 90, kv_dtype)
    free = generate(model, [prefix + prompt for prompt in PROMPTS], 12)
    requests = ragged_requests(cached, free)
    answers = []
    for kind, n in ((Decoder, 7), (Engine, rows)):
        model.setup_caches(n, 90, kv_dtype)
        decoder = kind(model)
        if cached:
            generate(model, [prefix] * n, 1, engine=decoder)
        out = [[] for _ in requests]
        for number, tokens in decoder.run(requests):
            out[number] += tokens
        answers.append((out, dict(decoder.finish_reasons)))
    assert answers[0] == answers[1]
    out, reasons = answers[0]
    assert reasons[2] == "eos" and reasons[5] == "stop" and reasons[4] == "context"
    assert [len(out[i]) for i in (0, 1, 3, 6)] == [9, 14, 1, 20]


def test_a_decoder_has_a_row_for_each_prompt(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint)
    model.setup_caches(2, 64)
    with pytest.raises(ValueError, match="a batch of at least 3"):
        generate(model, PROMPTS, 4, engine=Decoder(model))
    with pytest.raises(ValueError, match="the same number of tokens cached"):
        list(Decoder(model).run([request(), request(cached=1)]))

# --- compile ---


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("attention", ["flash", "math"])
def test_compiled_decode(checkpoint: Checkpoint, attention: str, dynamo: None) -> None:
    """The blocks share one graph; neither prompts nor positions nor batches compile another."""
    model = loaded(checkpoint, "qwen2")
    eager = [generate(model, [prompt], 12)[0] for prompt in PROMPTS]
    model.setup_caches(2, 64, attention=attention)
    compile_model(model)
    for picked in ([0, 1], [2], [1, 2], [0]):
        prompts = [PROMPTS[i] for i in picked]
        assert generate(model, prompts, 12, compile=True) == [eager[i] for i in picked]
    assert graphs() == 1


def test_a_compiled_row_attends_without_python(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, dynamo: None
) -> None:
    """In one graph for every length, up to the last place of the cache."""
    model = loaded(checkpoint)
    tokens = random_tokens(1, 24)
    model.setup_caches(1, 24)
    eager = [model.decode(tokens[:, i:i + 1], positions(i)) for i in range(24)]
    monkeypatch.setattr("kernels._flash_decode_torch", None)  # what the operator calls
    compile_model(model)
    for i, expected in enumerate(eager):
        close(model.decode(tokens[:, i:i + 1], positions(i)), expected)
    assert graphs() == 1

# --- what a fork changes is obeyed ---


class Halved(Block):
    """A block that adds half of what it computes."""

    def forward(self, x: Tensor, *where: object) -> Tensor:
        return (x + super().forward(x, *where)) / 2


def decode_logits(model: Transformer, compiled: bool) -> Tensor:
    """One step of decode behind a prompt of 9 tokens."""
    model.setup_caches(1, 32)
    if compiled:
        compile_model(model)
    tokens = random_tokens(1, 10)
    model.prefill(tokens[:, :9], positions(0))
    return model.decode(tokens[:, 9:], positions(9))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_hooks_on_blocks_fire(checkpoint: Checkpoint, compiled: bool, dynamo: None) -> None:
    """Forward hooks change what a block returns, in prefill and in decode; one graph for all."""
    expected = decode_logits(with_blocks(checkpoint, Halved), compiled=False)
    model = loaded(checkpoint)
    fired = torch.zeros(1)

    def halve(block: Block, args: tuple, output: Tensor) -> Tensor:
        fired.add_(1)
        return (args[0] + output) / 2

    for block in model.layers:
        block.register_forward_hook(halve)
    close(decode_logits(model, compiled), expected, 1e-5)
    assert fired == 2 * model.config.n_layer
    assert graphs() == (1 if compiled else 0)


def test_compile_model_anew_takes_later_hooks(
    checkpoint: Checkpoint, dynamo: None, no_inductor: None
) -> None:
    expected = decode_logits(with_blocks(checkpoint, Halved), compiled=False)
    model = loaded(checkpoint)
    decode_logits(model, compiled=True)
    for block in model.layers:
        block.register_forward_hook(lambda block, args, output: (args[0] + output) / 2)
    close(decode_logits(model, compiled=True), expected, 1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("how", ["family", "class"])
def test_a_block_of_ones_own(
    checkpoint: Checkpoint, how: str, compiled: bool, dynamo: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A subclass's forward is what runs, given to a family or swapped in; one graph for all."""
    plain = decode_logits(loaded(checkpoint), compiled=False)
    expected = decode_logits(with_blocks(checkpoint, Halved), compiled=False)
    assert (expected - plain).abs().max() > 0.1
    if how == "class":
        model = with_blocks(checkpoint, Halved)
    else:
        family = dataclasses.replace(FAMILIES["llama"], block=Halved)
        monkeypatch.setitem(FAMILIES, "llama", family)
        model = loaded(checkpoint)
    close(decode_logits(model, compiled), expected, 1e-5)
    assert graphs() == (1 if compiled else 0)


def with_blocks(checkpoint: Checkpoint, kind: type[Block]) -> Transformer:
    model = loaded(checkpoint)
    for block in model.layers:
        block.__class__ = kind
    return model

# --- the real model ---


def test_capital_of_france(smollm: tuple[Transformer, Tokenizer]) -> None:
    model, tokenizer = smollm
    ids = tokenizer.encode("The capital of France is")
    assert tokenizer.decode(generate(model, [ids], 2)[0]) == " Paris."
    ids = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    out = generate(model, [ids], 50, eos_ids=tokenizer.eos_ids)[0]
    assert tokenizer.decode(out) == "The capital of France is Paris." and out[-1] == 2

# --- the seam: every folder can be deleted ---


# what each core file may import of the others
CORE = {
    "generate": {"model", "quantize"},
    "model": {"quantize", "kernels"},
    "quantize": {"benchmarks"},  # late, for perplexity: a public name that has moved there
    "kernels": set(),
}
LIBRARIES = {"torch", "triton", "sentencepiece", "safetensors", *sys.stdlib_module_names}
PARTS = ["families", "formats", "products", "batching", "processors", "parallel", "cpu",
         "cli", "calibration"]
FOLDERS = [*PARTS, "checks", "benchmarks", "examples"]
NEEDS = {"cli": {"batching", "formats", "parallel", "processors"}}  # of other folders


def modules(tree: ast.AST) -> set[str]:
    """What is imported anywhere in it, by full names; "": something relative."""
    names = set()
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        if isinstance(statement, ast.ImportFrom):
            names.add("" if statement.level else statement.module)
    return names


def check_late_imports(tree: ast.AST, allowed: set[str]) -> None:
    """Functions import nothing but what is slow to import and seldom needed."""
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            assert {module.split(".")[0] for module in modules(function)} <= allowed


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_itself_and_four_libraries(name: str) -> None:
    tree = ast.parse((HERE / f"{name}.py").read_text())
    imported = {module.split(".")[0] for module in modules(tree)}
    assert imported <= LIBRARIES | CORE[name]
    check_late_imports(tree, CORE[name] - set(CORE))


@pytest.mark.parametrize("folder", PARTS)
def test_folders_import_the_core_and_themselves(folder: str) -> None:
    others = {*FOLDERS, "tests"} - {folder} - NEEDS.get(folder, set())
    for path in (HERE / folder).glob("*.py"):
        tree = ast.parse(path.read_text())
        imported = {module.split(".")[0] for module in modules(tree)}
        assert not imported & (others | {""}), path  # "": none is relative
        check_late_imports(tree, {folder, "torch", "huggingface_hub", "llguidance"})


NO_FOLDER = "this copy of gpt-flash has no folder {}, which this needs"
# by folder: the sentences of a copy that is without, to what checks/in_copies.py wants
LACKS = {
    "families": [NO_FOLDER.format("families")] * 3,
    "formats": [NO_FOLDER.format("formats")] * 2 + ["stop strings (x) need a tokenizer that "
                                                    "formats/ made"],
    **{name: [NO_FOLDER.format(name)] for name in ("batching", "calibration", "processors")},
}


def copy_without(missing: list[str], copy: Path) -> Path:
    """The tree in another place, without some of its folders; the others are links."""
    copy.mkdir()
    for name in CORE:
        shutil.copy(HERE / f"{name}.py", copy)
    for folder in set(FOLDERS) - set(missing):
        (copy / folder).symlink_to(HERE / folder)
    return copy


def test_every_folder_can_be_deleted(tmp_path: Path) -> None:
    """Alone and with all others: a Llama says the same, and what is missing says so."""
    checkpoint = hf_folder(tmp_path / "model")
    SentencePieceTrainer.train(
        input=__file__, model_prefix=str(checkpoint / "tokenizer"), vocab_size=300,
        model_type="bpe", minloglevel=2,
    )
    without = [[], *([folder] for folder in FOLDERS), FOLDERS]
    copies = [copy_without(missing, tmp_path / str(i)) for i, missing in enumerate(without)]
    command = [sys.executable, HERE / "checks/in_copies.py", checkpoint, *copies]
    done = subprocess.run(command, capture_output=True, text=True, env=CPU_ENV)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(copies), done.stderr
    whole = answers[0]
    assert whole["n_modules"] <= 4  # with `import model`
    assert len(set(whole["tokens"][0])) > 1 and whole["text"].strip()
    for missing, answer in zip(without, answers):
        assert answer["tokens"] == whole["tokens"], missing
        if "cpu" not in missing:  # whose products round bfloat16 otherwise
            assert answer["text"] == whole["text"], missing
        lacks = [sentence for folder in LACKS if folder in missing for sentence in LACKS[folder]]
        assert answer["lacks"] == lacks, missing


def run_tests(arguments: list[str]) -> int:
    """pytest on the files that are named, or on everything, in a process for each core; threads of
    their own would only get into each other's way."""
    named = [argument for argument in arguments if Path(argument.split("::")[0]).is_file()]
    if named:
        return pytest.main(["-q", *arguments])
    os.environ["OMP_NUM_THREADS"] = "1"
    everything = ["-n", "auto", "--dist", "worksteal", str(HERE / "tests.py"), str(HERE / "checks")]
    return pytest.main(["-q", *everything, *arguments])


if __name__ == "__main__":
    sys.exit(run_tests(sys.argv[1:]))
