"""calibration/: rounding by a text loses less on another one."""
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import transformers
from torch import Tensor

import calibration
from benchmarks.quality import perplexity
from checks.common import close, hf_folder, run_cli
from checks.fixtures import GPL
from formats.default import default_model
from generate import load_tokenizer
from model import load_model, sources
from quantize import (
    Int4Linear, Int8Linear, Linear, QuantizedLinear, quantize_linear, save_quantized,
)
from safetensors.torch import save_file

# --- models with real weights ---


def train(folder: Path, ids: Tensor, steps: int = 200) -> None:
    """A small Llama that has learnt a text."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=600, hidden_size=128, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None,
    ))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.1)
    for _ in range(steps):
        starts = torch.randint(len(ids) - 128, (8,)).tolist()
        batch = torch.stack([ids[start:start + 128] for start in starts])
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def texts(tokenizer_folder: Path) -> tuple[list[int], list[int]]:
    """The beginning of the GPL-3 and its end, as tokens of 600."""
    if not GPL.exists():
        pytest.skip(f"no text to read: {GPL}")
    ids = load_tokenizer(tokenizer_folder).encode(GPL.read_text(encoding="utf-8"))
    return ids[:-3000], ids[-1500:]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path,
    texts: tuple[list[int], list[int]],
) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "model"
    train(folder, torch.tensor(texts[0]))
    for file in tokenizer_folder.iterdir():
        if "config" not in file.name:
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first blocks of the default model, its weights moved off their grid by a tenth of a
    step."""
    folder = tmp_path_factory.mktemp("moved") / "model"
    move_off_grid(folder, n_layer=6)
    return folder


def move_off_grid(folder: Path, n_layer: int) -> None:
    dense = load_model(default_model(), dtype=torch.float32, quantize="none")
    stored = load_model(default_model(), dtype=torch.float32)
    torch.manual_seed(0)
    tensors = {}
    for name, x in dense.state_dict().items():
        prefix, number, *_ = name.split(".")
        if prefix == "lm_head" or prefix == "layers" and int(number) >= n_layer:
            continue
        layer = stored.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, Int4Linear):
            _, steps, _ = layer.plain(slice(0, len(x)))  # (N, groups)
            x += 0.1 * steps.float().repeat_interleave(layer.group_size, 1) * torch.randn_like(x)
        parts = sources(dense, name, x)
        for part, tensor in zip(parts, x.split([n for n, *_ in parts.values()])):
            tensors[part] = tensor.contiguous()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = dense.config.hf | {"num_hidden_layers": n_layer}
    (folder / "config.json").write_text(json.dumps(config))


def loss(
    folder: Path, calibrate: list[int] | None, held_out: list[int], **options: object
) -> float:
    """Mean KL divergence on a text of a quantized model from the unquantized one."""
    reference = load_model(folder, dtype=torch.float32, quantize="none")
    model = load_model(folder, dtype=torch.float32, calibrate=calibrate, **options)
    _, kl = perplexity(model, held_out, reference=reference)
    return kl


@pytest.mark.parametrize("options, share", [
    (dict(quantize="int4"), 0.7),
    (dict(quantize="int4", group_size=128), 0.7),
    (dict(quantize="int8"), 1),
], ids=str)
def test_a_trained_model_loses_less_on_a_text_that_was_held_out(
    trained: Path, texts: tuple[list[int], list[int]], options: dict, share: float
) -> None:
    ids, held_out = texts
    plain = loss(trained, None, held_out, **options)
    assert loss(trained, ids[:8192], held_out, **options) < share * plain


@pytest.mark.parametrize("mode, share", [("int4", 0.8), ("int8", 0.95)])
def test_weights_off_their_grid_lose_less_on_a_text_that_was_held_out(
    moved: Path, gpl: list[int], mode: str, share: float
) -> None:
    ids, held_out = gpl[:1024], gpl[1024:1425]
    plain = loss(moved, None, held_out, quantize=mode)
    assert loss(moved, ids, held_out, quantize=mode) < share * plain

# --- rounding ---


def inputs_of(K: int, n: int = 600) -> Tensor:
    """n vectors of K values that depend on each other, a few of them large."""
    torch.manual_seed(0)
    scale = torch.ones(K).index_fill_(0, torch.tensor([3, K - 5]), 20.0)
    return torch.randn(n, K // 4) @ torch.randn(K // 4, K) * scale + torch.randn(n, K)


@pytest.mark.parametrize("mode, group_size, K", [
    ("int4", 32, 96), ("int4", 64, 192), ("int4", 128, 256), ("int8", 32, 100), ("int8", 32, 64),
])
def test_outputs_err_less_and_the_layer_says_by_how_much(
    mode: str, group_size: int, K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a weight is rounded in several chunks of rows."""
    monkeypatch.setattr(calibration, "CHUNK", 50)
    x = inputs_of(K)
    moment = x.T @ x
    damping = calibration.DAMPING * moment.diagonal() + 1e-3 * moment.diagonal().mean()
    x = torch.cat([x, damping.sqrt().diag()])  # as if they were inputs too
    linear = Linear(K, 120, bias=False).requires_grad_(False)
    expected = x @ linear.weight.T
    errors = []
    for calibrated in (False, True):
        layer = quantize_linear(linear, mode, group_size)
        if calibrated:
            calibration.round_by(moment, layer, linear.weight)
        weight = torch.cat([*layer.dense(torch.float32)])
        errors.append(float((x @ weight.T - expected).norm() / expected.norm()))
    plain, calibrated = errors
    assert calibrated < 0.6 * plain
    assert layer.error == pytest.approx(calibrated, rel=0.01)


def test_the_first_rounding_is_gptq() -> None:
    """By its definition: after each input, the others that are left move to where the error is
    smallest, which is found anew."""
    x = inputs_of(64).double()
    moment = x.T @ x
    linear = Linear(64, 5, bias=False).requires_grad_(False)
    layer = quantize_linear(linear, "int4")
    order = torch.randperm(64)
    expected = calibration.Grid(layer, slice(0, 5))
    w = linear.weight.T.double()
    for i, k in enumerate(order.tolist()):
        value = expected.nearest(k, w[k].float())
        left = order[i + 1:]
        inverse = torch.linalg.inv(moment[left][:, left])
        w = w.index_add(0, left, inverse @ moment[left, k, None] * (w[k] - value.double()))

    grid = calibration.Grid(layer, slice(0, 5))
    factor = torch.linalg.cholesky(torch.linalg.inv(moment[order][:, order]), upper=True)
    calibration.round_in_order(linear.weight.T.contiguous(), grid, factor.float(), order)
    assert (grid.q != expected.q).float().mean() < 0.02  # halves may round either way
    assert (grid.q != calibration.Grid(layer, slice(0, 5)).q).float().mean() > 0.2


def test_no_step_makes_the_error_larger() -> None:
    x = inputs_of(128)
    moment = x.T @ x
    linear = Linear(128, 40, bias=False).requires_grad_(False)
    w = linear.weight.T.contiguous()
    grid = calibration.Grid(quantize_linear(linear, "int4"), slice(0, 40))

    def error() -> Tensor:
        off = w - grid.values()
        return ((moment @ off) * off).sum(0)

    for _ in range(3):
        before = error()
        calibration.descend(w, grid, moment)
        assert (error() <= before * 1.001).all()
    assert grid.scale.equal(grid.scale.bfloat16().float())


def test_a_group_of_equal_weights_stays_finite() -> None:
    linear = Linear(64, 3, bias=False).requires_grad_(False)
    linear.weight[:, :32] = 0.25
    linear.weight[1] = 0
    layer = quantize_linear(linear, "int4")
    x = inputs_of(64)
    calibration.round_by(x.T @ x, layer, linear.weight)
    [weight] = layer.dense(torch.float32)
    assert weight[1].abs().max() == 0
    assert (weight - linear.weight).abs().max() < 0.1

# --- loading ---


def test_one_block_is_dense_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = []
    pass_block = calibration.Calibration.pass_block

    def count(self: calibration.Calibration) -> None:
        read = [x for x in self.model.layers.modules() if isinstance(x, Linear)]
        dense.append(sum(not x.weight.is_meta for x in read))
        pass_block(self)

    monkeypatch.setattr(calibration.Calibration, "pass_block", count)
    folder = hf_folder(tmp_path / "m", num_hidden_layers=4)
    model = load_model(folder, quantize="int4", calibrate=list(range(200)))
    assert dense == [4, 4, 4, 4]
    layers = [x for x in model.modules() if isinstance(x, QuantizedLinear)]
    assert [x.mode for x in layers] == ["int4"] * 16 + ["int8"]


def test_what_the_text_does_not_reach_is_rounded_as_without_it(
    checkpoint: Callable, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Here an expert, which the router of gpt-oss has a bias against."""
    folder, hf = checkpoint("gpt-oss-seven")
    bias = "model.layers.0.mlp.router.bias"
    tensors = hf.state_dict()
    tensors[bias] = tensors[bias].index_fill(0, torch.tensor(2), -1e4)
    shutil.copytree(folder, tmp_path / "m")
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    save_file(tensors, tmp_path / "m/model.safetensors")
    ids = torch.randint(hf.config.vocab_size, (300,)).tolist()
    plain, calibrated = [
        load_model(tmp_path / "m", quantize="int8", calibrate=each) for each in (None, ids)
    ]
    assert "the text does not reach 2 layers of experts: they are" in capfd.readouterr().err
    same = []
    for name, layer in plain.named_modules():
        if isinstance(layer, Int8Linear):
            one, other = layer.stored(), calibrated.get_submodule(name).stored()
            if one["weight"].equal(other["weight"]):
                same.append(name)
    experts = "layers.0.mlp.experts."
    assert same == [f"{experts}gate_up_proj.2", f"{experts}down_proj.2", "lm_head"]


@pytest.mark.parametrize("name", [
    "gemma3", "gemma4-moe", "olmo3", "qwen3-moe", "gpt-oss", "granite", "lfm2",
    "qwen3.5",
])
def test_other_families_pass_their_blocks_as_in_the_model(
    checkpoint: Callable, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes into the last block is what goes into it when the model reads the text."""
    folder, hf = checkpoint(name)
    ids = torch.randint(hf.config.vocab_size, (256,))
    seen = []
    monkeypatch.setattr(calibration, "PIECE", 64)
    monkeypatch.setattr(calibration, "BATCH", 3)  # 4 pieces: the last one is alone
    pass_block = calibration.Calibration.pass_block

    def note(self: calibration.Calibration) -> None:
        if self.block > 0:
            seen.append(self.hidden)
        pass_block(self)

    monkeypatch.setattr(calibration.Calibration, "pass_block", note)
    model = load_model(folder, dtype=torch.float32, quantize="int8", calibrate=ids)
    read = []
    for block in model.layers[1:]:
        block.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    model.setup_caches(4, 64)
    model(ids.view(4, 64), torch.zeros(4, dtype=torch.int32))
    for ours, theirs in zip(seen, read, strict=True):
        close(ours, theirs, 0.01)  # few tokens of an expert are bfloat16


def test_it_is_saved_and_loaded_like_any_quantized_model(tmp_path: Path) -> None:
    """So that ranks load their parts of it as of any other one."""
    folder = hf_folder(tmp_path / "m")
    ids = torch.randint(320, (300,)).tolist()
    saved = []
    for name, calibrate in (("plain", None), ("calibrated", ids)):
        model = load_model(folder, dtype=torch.float32, quantize="int4", calibrate=calibrate)
        save_quantized(model, tmp_path / name)
        saved.append((tmp_path / name / "config.json").read_text())
    assert saved[0] == saved[1]
    logits = []
    for each in (model, load_model(tmp_path / "calibrated", dtype=torch.float32)):
        each.setup_caches(1, 64)
        logits.append(each(torch.tensor([ids[:40]]), torch.zeros(1, dtype=torch.int32)))
    assert logits[0].equal(logits[1])

# --- mistakes ---


@pytest.mark.parametrize("options, message", [
    (dict(quantize="auto"), "goes with quantize int8 or int4, not auto"),
    (dict(calibrate=[1] * 127),
     "at least 128 tokens of the 320 of the vocabulary; the text has 127"),
    (dict(calibrate=[1] * 200 + [320]), "tokens of the 320"),
    (dict(calibrate=torch.full((200,), -1)), "tokens of the 320"),
], ids=str)
def test_what_cannot_calibrate_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    options = dict(quantize="int4", calibrate=[1] * 200) | options
    with pytest.raises(ValueError, match=message):
        load_model(hf_folder(tmp_path / "m"), **options)


def test_layers_that_take_more_than_the_last_one_gives_are_refused(checkpoint: Callable) -> None:
    folder, _ = checkpoint("gemma4")
    with pytest.raises(ValueError, match="calibrating is not possible for gemma4_text"):
        load_model(folder, quantize="int4", calibrate=[1] * 200)


@pytest.mark.parametrize("words, says", [
    ("--calibrate {text}", "--calibrate goes with --quantize int8 or int4"),
    ("--quantize int4 --calibrate {folder}/none", "No such file"),
    ("--quantize int4 --calibrate {short}", "the text has 2"),
    ("--quantize int4 --calibrate {short} --save {folder}/saved", "the text has 2"),
    ("--quantize int4 --calibrate {text} --checkpoint_path {quantized}", "is quantized already"),
])
def test_mistakes_are_one_line(
    tiny: Path, tmp_path: Path, words: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short").write_text("a b")
    shutil.copytree(tiny, tmp_path / "quantized")
    for file in (tmp_path / "quantized").glob("*.safetensors"):
        file.unlink()
    save_quantized(load_model(tiny, quantize="int8"), tmp_path / "q")
    for file in (tmp_path / "q").iterdir():
        shutil.copy(file, tmp_path / "quantized")
    before = sorted(tmp_path.iterdir())
    places = dict(text=__file__, folder=tmp_path, short=tmp_path / "short",
                  quantized=tmp_path / "quantized")
    words = [word.format(**places) for word in words.split()]
    code, out, err = run_cli(capfd, "--checkpoint_path", tiny, "--device", "cpu", *words)
    assert code == 2 and out == "" and says in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_line_saves_what_it_calibrates(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint_path", tiny, "--device", "cpu", "--quantize", "int4", "--calibrate",
             __file__, "--save", tmp_path / "q"]
    code, _, err = run_cli(capfd, *words)
    assert code == 0 and "largest relative error of a layer" in err, err
    ids = load_tokenizer(tiny).encode(Path(__file__).read_text())
    expected = load_model(tiny, quantize="int4", calibrate=ids).layers[1].mlp.down_proj.stored()
    stored = load_model(tmp_path / "q").layers[1].mlp.down_proj.stored()
    assert all(stored[name].equal(x) for name, x in expected.items())
