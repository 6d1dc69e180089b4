"""What prompts begin with alike is read once, whoever has it; the texts are the same."""
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from batching import Engine, load_row, save_row
from checks.chat_test import Letters
from checks.common import PROMPTS
from cli.chat import Chat
from generate import Request, compile_model, generate
from model import Transformer, load_model

Checkpoint = Callable[[str], tuple[Path, PreTrainedModel]]  # the fixture: random ones, by name


def random_prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 131, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PREFIX = random_prompt(40)
# two files of prompts: some begin alike, at other lengths, others not
ALIKE = [PREFIX + random_prompt(n, n) for n in (1, 9, 3, 5, 2)]
MIXED = [ALIKE[0], random_prompt(50, 7), PREFIX, ALIKE[1], PREFIX[:36] + [9, 8], PROMPTS[0], PREFIX]


def answers(engine: Engine, prompts: list[list[int]], **options: object) -> list[list[int]]:
    """Some tokens more for each prompt, or fewer."""
    requests = [Request(p, 6 + len(p) % 3, seed=len(p), **options) for p in prompts]
    out = [[] for _ in requests]
    for number, tokens in engine.run(requests):
        out[number] += tokens
    return out


@pytest.fixture(params=["llama", "mistral", "gemma3", "qwen3.5"])
def model(checkpoint: Checkpoint, request: pytest.FixtureRequest) -> Transformer:
    """Without windows, with some that keep little, and with states."""
    return load_model(checkpoint(request.param)[0], dtype=torch.float32)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("prompts", [ALIKE, MIXED, [PREFIX] * 6], ids=["alike", "mixed", "same"])
@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_texts_are_those_of_prompts_alone(
    model: Transformer, rows: int, prompts: list[list[int]], kv_dtype: torch.dtype | None
) -> None:
    model.setup_caches(1, 96, kv_dtype)
    alone = [answers(Engine(model), [prompt], temperature=0.9)[0] for prompt in prompts]
    model.setup_caches(rows, 96, kv_dtype)
    engine = Engine(model)
    assert answers(engine, prompts, temperature=0.9) == alone
    assert engine.stats.shared_tokens > 0 or prompts == MIXED


@pytest.mark.parametrize("k", [0, 3])
def test_each_token_is_read_once(checkpoint: Checkpoint, k: int) -> None:
    """Answers to one prompt, refilled too: all but its last token."""
    model = load_model(checkpoint("llama")[0], dtype=torch.float32)
    model.setup_caches(2, 96)
    read = []
    prefill = model.prefill

    def counted(tokens: torch.Tensor, *where: object, **options: object) -> torch.Tensor:
        read.append(tokens.numel())
        return prefill(tokens, *where, **options)

    model.prefill = counted
    engine = Engine(model, speculate_k=k)
    answers(engine, [PREFIX] * 7, temperature=1.0)
    assert sum(read) == 39 + 7
    assert engine.stats.shared_tokens == 6 * 39


def test_generate_shares_too(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint("llama")[0], dtype=torch.float32)
    out = generate(model, [PREFIX] * 4, 5, temperature=1.0, seed=3)
    for i in range(4):
        assert generate(model, [PREFIX], 5, temperature=1.0, seed=3 + i) == [out[i]]


def test_a_text_behind_cached_tokens_shares_nothing(checkpoint: Checkpoint) -> None:
    """Rows may have others there."""
    model = load_model(checkpoint("llama")[0], dtype=torch.float32)
    model.setup_caches(2, 96)
    model.prefill(torch.tensor([PROMPTS[2][:5], PROMPTS[2][5:10]]), torch.zeros(2).int())
    engine = Engine(model)
    out = answers(engine, [PREFIX, PREFIX], cached=5)
    assert engine.stats.shared_tokens == 0
    for row in range(2):
        whole = PROMPTS[2][5 * row:5 * row + 5] + PREFIX
        assert generate(model, [whole], 7) == [out[row]]

# --- rows in files ---


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize("room", [96, 80])
def test_a_row_goes_on_from_a_file(
    model: Transformer, kv_dtype: torch.dtype | None, room: int, tmp_path: Path
) -> None:
    """In every row of another cache, as if it had been read there."""
    tails = [[5, 6], [9]]
    whole = [generate(model, [PREFIX + tail], 8)[0] for tail in tails]
    if kv_dtype is not None:
        model.setup_caches(2, 96, kv_dtype)
        whole = generate(model, [PREFIX + tail for tail in tails], 8)
    model.setup_caches(1, 96, kv_dtype)
    generate(model, [PREFIX], 1)
    save_row(model, PREFIX, tmp_path / "prefix.safetensors")
    model.setup_caches(2, room, kv_dtype)
    ids = load_row(model, tmp_path / "prefix.safetensors")
    assert ids == PREFIX
    assert generate(model, tails, 8, cached=len(ids)) == whole


def test_a_row_serves_a_model_that_is_compiled_or_was_saved_meanwhile(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    loaded = load_model(checkpoint("llama")[0], dtype=torch.float32, quantize="int8")
    loaded.setup_caches(1, 96)
    generate(loaded, [PREFIX], 1)
    save_row(loaded, PREFIX, tmp_path / "row")
    compile_model(loaded)
    loaded.layers[0].mlp.down_proj.error = 0.0  # which no file says
    assert load_row(loaded, tmp_path / "row") == PREFIX


def test_a_row_of_another_model_or_cache_is_refused(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    file = tmp_path / "prefix.safetensors"
    model = load_model(checkpoint("llama")[0], dtype=torch.float32)
    model.setup_caches(1, 96)
    with pytest.raises(ValueError, match="40 tokens are not cached: the row has 0"):
        save_row(model, PREFIX, file)
    generate(model, [PREFIX], 1)
    save_row(model, PREFIX, file)
    model.setup_caches(1, 96, torch.int8)
    with pytest.raises(ValueError, match="is of another kind of cache"):
        load_row(model, file)
    model.setup_caches(1, 40)
    with pytest.raises(ValueError, match="40 cached and 1 new tokens exceed the cache of 40"):
        load_row(model, file)
    model.setup_caches(1, 96)
    for tensor in (model.layers[1].mlp.down_proj.weight, model.embed_tokens.weight):
        number = tensor[7, 9].clone()
        tensor[7, 9] += 1  # one number of many
        with pytest.raises(ValueError, match="was written with another model"):
            load_row(model, file)
        tensor[7, 9] = number
    scale, model.layers[0].self_attn.softmax_scale = model.layers[0].self_attn.softmax_scale, 0.5
    with pytest.raises(ValueError, match="was written with another model, or with other settings"):
        load_row(model, file)
    model.layers[0].self_attn.softmax_scale = scale
    tensors = load_file(file)
    with safe_open(file, "pt") as stored:
        said = stored.metadata()
    save_file(tensors, file, said | {"ids": json.dumps([10**6] * 40)})
    with pytest.raises(ValueError, match="has ids that are no tokens of the model"):
        load_row(model, file)
    next(iter(tensors.values())).view(-1)[99] += 1
    save_file(tensors, file, said)
    with pytest.raises(ValueError, match="cannot read what a row holds.*it is damaged"):
        load_row(model, file)
    file.write_bytes(b"mine")
    with pytest.raises(ValueError, match="cannot read what a row holds"):
        load_row(model, file)


def test_a_row_of_a_room_where_keys_turn_otherwise_is_refused(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """As with longrope, below the original context and above it."""
    model = load_model(checkpoint("phi3-longrope")[0], dtype=torch.float32)
    model.setup_caches(1, 20)
    generate(model, [PREFIX[:10]], 1)
    save_row(model, PREFIX[:10], tmp_path / "row")
    model.setup_caches(1, 24)
    assert load_row(model, tmp_path / "row") == PREFIX[:10]
    model.setup_caches(1, 96)
    with pytest.raises(ValueError, match="another model, or with other settings"):
        load_row(model, tmp_path / "row")


def test_a_conversation_is_not_read_again(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it was saved with its cache, and the model is the same."""
    file, penalty = tmp_path / "talk.json", "/set repetition_penalty 1.5"

    def new_chat(model: Transformer) -> Chat:
        model.setup_caches(1, 96)
        settings = dict(stop=(), max_new_tokens=4, temperature=0.0, repetition_penalty=None)
        settings["seed"] = None
        return Chat(Engine(model), Letters(), settings)

    model = load_model(checkpoint("llama")[0], dtype=torch.float32)
    chat = new_chat(model)
    chat.take("hello")
    chat.take(f"/save {file} +cache")
    chat.take("and now?")
    again = new_chat(model)
    again.take(f"/load {file}")
    again.take("and now?")
    assert again.messages == chat.messages
    _, cached = again.took.split(";")
    assert cached == chat.took.split(";")[1] != " 0 of 31 prompt tokens were cached"
    # but for a penalty of all that was said, whoever read it
    for lines in (f"/load {file}", penalty), (penalty, f"/load {file}"), ("hello", penalty):
        talk = new_chat(model)
        for line in (*lines, "and now?"):
            talk.take(line)
        assert "; 0 of" in talk.took
    other = new_chat(load_model(checkpoint("mistral")[0], dtype=torch.float32))
    other.take(f"/load {file}")
    assert "talk.json.cache was written with another model" in capsys.readouterr().err
    assert other.messages and not other.held
    (tmp_path / "talk.json.cache").write_text("mine")
    chat.take(f"/save {file} +cache")
    assert (tmp_path / "talk.json.cache").read_text() == "mine"
