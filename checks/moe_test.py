"""Mixtures of experts: what tests.py does not ask of every family."""
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses import FakeTensorMode

from checks.common import BASE, close, hf_logits, random_hf
from cli.stats import weight_bytes
from families.experts import Experts
from formats.integers import FORMS, Blocks, mxfp4_blocks
from generate import compile_model
from model import ModelConfig, Transformer, load_model
from products.linear import mxfp4_values
from quantize import Linear, quantize_linear, quantize_model, save_quantized

Checkpoint = Callable[[str], tuple[Path, transformers.PreTrainedModel]]
FAMILIES = ["mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "deepseek-v3", "qwen3.5-moe"]


def tokens_of(*shape: int) -> Tensor:
    return torch.randint(131, shape, generator=torch.Generator().manual_seed(1))


def positions(*depths: int) -> Tensor:
    return torch.tensor(depths, dtype=torch.int32)


def check_decode(model: Transformer, hf: transformers.PreTrainedModel, tol: float = 2e-4) -> None:
    """A prompt, then token by token, of two rows."""
    model.setup_caches(2, 48)
    tokens = tokens_of(2, 30)
    expected = hf_logits(hf, tokens)
    close(model(tokens[:, :20], positions(0, 0)), expected[:, :20], tol)
    for i in range(20, 23):
        close(model(tokens[:, i:i + 1], positions(i, i)), expected[:, i:i + 1], tol)

# --- the model ---


@pytest.mark.parametrize("name", ["qwen2-moe", "gpt-oss"])
def test_compiled_decode_equals_transformers(checkpoint: Checkpoint, name: str) -> None:
    """One graph for all layers of a kind, though each has experts of its own."""
    folder, hf = checkpoint(name)
    model = load_model(folder, dtype=torch.float32)
    torch._dynamo.reset()
    compile_model(model, prefill=True)
    check_decode(model, hf)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_nobody_chose_is_not_read(checkpoint: Checkpoint, name: str) -> None:
    """Experts that no token goes to may hold NaN."""
    model = load_model(checkpoint(name)[0], dtype=torch.float32)
    mlp = model.layers[1].mlp
    experts = mlp.experts
    x = torch.randn(1, 1, model.config.dim)
    weights, ids = mlp.route(x)
    expected = experts(x, weights, ids)
    for i in set(range(experts.n_expert)) - set(ids.flatten().tolist()):
        for stack in (experts.gate_up_proj, experts.down_proj):
            stack[i] = Linear(stack[i].in_features, stack[i].out_features)
            stack[i].weight.data.fill_(float("nan"))
    assert torch.equal(experts(x, weights, ids), expected)


def test_stacks_of_transformers_5_are_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, hf = checkpoint("qwen3-moe")
    tensors = load_file(folder / "model.safetensors")
    stacked = {name: x for name, x in tensors.items() if ".experts." not in name}
    stacked |= {name: x for name, x in hf.state_dict().items() if ".experts." in name}
    assert "model.layers.1.mlp.experts.gate_up_proj" in stacked
    save_file(stacked, tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_decode(load_model(tmp_path, dtype=torch.float32), hf)

    config["num_local_experts"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unexpected tensor .*\.experts\.7\."):
        load_model(tmp_path)


def test_more_experts_than_there_are_is_refused(checkpoint: Checkpoint) -> None:
    hf = json.loads((checkpoint("mixtral")[0] / "config.json").read_text())
    with pytest.raises(ValueError, match="num_experts_per_tok is 5, but there are 4 experts"):
        ModelConfig.from_hf(hf | {"num_experts_per_tok": 5})
    hf["num_local_experts"] = None
    with pytest.raises(ValueError, match="neither num_experts nor num_local_experts"):
        ModelConfig.from_hf(hf)


def test_a_step_counts_the_experts_that_it_reads(checkpoint: Checkpoint) -> None:
    """Of 8 experts a token reads 3, two tokens 8 * (1 - (5 / 8) ** 2) on average."""
    model = load_model(checkpoint("qwen2-moe")[0], dtype=torch.float32)
    experts = [block.mlp.experts for block in model.layers[1:]]
    nbytes = sum(x.numel() * 4 for module in experts for x in module.parameters())
    all_bytes = sum(x.numel() * 4 for x in model.parameters())
    others = all_bytes - nbytes - model.embed_tokens.weight.numel() * 4
    assert weight_bytes(model) == others + nbytes * 3 // 8
    assert weight_bytes(model, 2) == round(others + nbytes * (1 - (5 / 8) ** 2))
    assert weight_bytes(model, 200) == others + nbytes


def test_copied_experts_are_their_own() -> None:
    experts = small_experts()
    mine = copy.deepcopy(experts)
    for layer in mine.down_proj:
        layer.bias = torch.nn.Parameter(torch.full([64], 7.0), requires_grad=False)
    x = torch.randn(1, 2, 64)
    weights = torch.full((1, 2, 2), 0.5)
    ids = torch.tensor([[[0, 1], [2, 0]]])
    run = torch.ops.gpt_flash.experts_one_by_one
    close(run(x, weights, ids, mine.key), run(x, weights, ids, experts.key) + 7, 1e-5)


def small_experts(bias: bool = False) -> Experts:
    """5 random experts, of which a token goes to 2."""
    torch.manual_seed(0)
    sizes = dict(BASE, hidden_size=64, intermediate_size=96)
    mixtral = dict(sizes, model_type="mixtral", num_local_experts=5, num_experts_per_tok=2)
    kind = type("Biased", (Experts,), dict(bias=True)) if bias else Experts
    return kind(ModelConfig.from_hf(mixtral)).requires_grad_(False)

# --- quantized experts ---


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_experts_are_what_each_is_alone_and_come_back(
    checkpoint: Checkpoint, tmp_path: Path, mode: str
) -> None:
    folder, _ = checkpoint("gpt-oss-mxfp4")  # whose sizes divide into groups
    plain = load_model(folder, dtype=torch.float32)
    model = quantize_model(load_model(folder, dtype=torch.float32), mode)
    ours = model.layers[1].mlp.experts.gate_up_proj[3]
    alone = plain.layers[1].mlp.experts.gate_up_proj[3]
    assert ours.mode == mode
    expected = quantize_linear(alone, mode).stored()
    for name, tensor in ours.stored().items():
        assert torch.equal(tensor, expected[name])
    del tensor  # whoever holds one keeps its layer plain, which rounds otherwise

    save_quantized(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved", dtype=torch.float32)
    tokens = tokens_of(2, 9)
    for each in (model, again):
        each.setup_caches(2, 16)
    close(again(tokens, positions(0, 0)), model(tokens, positions(0, 0)), 1e-6)


@pytest.mark.parametrize("mode", [None, "int8", "int4", "int8_grouped", "mxfp4"])
@pytest.mark.parametrize("rows, T", [(1, 1), (3, 1), (2, 16)])
def test_stacked_experts_give_what_single_ones_do(
    gpu_layouts: None, mode: str | None, rows: int, T: int
) -> None:
    """As on a GPU; more than 16 tokens a row take the layers out of the stacks."""
    experts = small_experts()
    for stack in (experts.gate_up_proj, experts.down_proj):
        for i, linear in enumerate(stack):
            stack[i] = random_layer(linear, mode)
    x = torch.randn(rows, T, 64)
    weights, ids = torch.rand(rows, T, 5).topk(2)
    expected = experts(x, weights, ids)
    for stack in (experts.gate_up_proj, experts.down_proj):
        for layer in stack:
            layer.pack()
            assert (layer.layout is None) == (mode is None)
        stack.stack()
    # the products of quantized layers are in bfloat16
    close(experts(x, weights, ids), expected, 1e-4 if mode is None else 1e-2)
    if mode is not None:
        grouped = experts.in_groups(x.bfloat16(), weights, ids)
        assert grouped.shape == x.shape
        close(grouped.float(), expected, 1e-2)
    by_kernel = mode in ("int8", "int4", "int8_grouped")  # that of a single layer
    close(experts.one_by_one(x, weights, ids), expected, 1e-2 if by_kernel else 1e-5)


@pytest.mark.parametrize("mode", [None, "int8"])
def test_a_prompt_asks_the_host_nothing(gpu_layouts: None, mode: str | None) -> None:
    """The tokens of a prompt in bfloat16 go to all experts at once."""
    experts = small_experts(bias=True).bfloat16()
    for stack in (experts.gate_up_proj, experts.down_proj):
        for i, linear in enumerate(stack):
            stack[i] = random_layer(linear, mode)
            stack[i].pack()
    x = torch.randn(2, 17, 64).bfloat16()
    weights, ids = torch.rand(2, 17, 5).topk(2)
    weights = weights.bfloat16()
    expected = experts(x, weights, ids)
    for stack in (experts.gate_up_proj, experts.down_proj):
        stack.stack()
    close(experts(x, weights, ids).float(), expected.float(), 2e-2)
    with FakeTensorMode(allow_non_fake_inputs=True):  # which has no numbers to tell the host
        assert experts(x, weights, ids).shape == x.shape


@pytest.mark.parametrize("rows, by_kernel", [(64, True), (2048, False)])
def test_the_kernels_grid_is_one_that_a_gpu_takes(
    gpu_layouts: None, monkeypatch: pytest.MonkeyPatch, rows: int, by_kernel: bool
) -> None:
    """A grid's second dimension has at most 65,535 programs, here one for a token's expert."""
    experts = small_experts().bfloat16()
    for stack in (experts.gate_up_proj, experts.down_proj):
        stack.stack()
    monkeypatch.setattr(Experts, "in_groups", lambda experts, x, *_: x)
    pairs = []
    monkeypatch.setattr(type(experts.gate_up_proj), "forward", lambda _, x, ids: (
        pairs.append(ids.numel()) or x.new_zeros(*ids.shape, 192 if x.dim() == 2 else 64)))
    x = torch.zeros(rows, 16, 64).bfloat16()
    ids = torch.zeros(rows, 16, 2, dtype=torch.int64)
    assert experts(x, torch.ones(rows, 16, 2).bfloat16(), ids).shape == x.shape
    assert bool(pairs) == by_kernel and all(n < 2**16 for n in pairs)


def random_layer(linear: Linear, mode: str | None) -> torch.nn.Module:
    """A Linear in that form, not packed."""
    if mode is None:
        return linear
    if mode in ("int8", "int4"):
        return quantize_linear(linear, mode)
    layer = FORMS[mode](linear, 32)
    N, K = linear.weight.shape
    for rows in layer.slices():
        layer.take(rows, *blocks_of(*random_mxfp4(N, K)).affine(rows), 16)
    return layer


class InMemory(NamedTuple):
    """A tensor with what formats/checkpoint.py's InFile has."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, rows: range) -> Tensor:
        return self.tensor[rows.start:rows.stop:rows.step]


def blocks_of(packed: Tensor, exponents: Tensor) -> Blocks:
    return mxfp4_blocks("w", InMemory(packed), InMemory(exponents), range(len(packed)))


def random_mxfp4(N: int, K: int) -> tuple[Tensor, Tensor]:
    """Nibbles and exponents as gpt-oss's files have them."""
    packed = torch.randint(0, 256, (N, K // 32, 16), dtype=torch.uint8)
    return packed, torch.randint(120, 126, (N, K // 32), dtype=torch.uint8)

# --- gpt-oss's files ---


@pytest.fixture(scope="module")
def mxfp4_checkpoint(
    tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, transformers.PreTrainedModel]:
    """A folder as OpenAI's are, and the model that transformers makes of its tensors."""
    folder = tmp_path_factory.mktemp("mxfp4")
    hf = random_hf("gpt-oss-mxfp4")
    state = hf.state_dict()
    tensors = {}
    for name in list(state):
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = state[name].contiguous()
            continue
        E, K, N = state[name].shape
        packed = torch.randint(0, 256, (E, N, K // 32, 16), dtype=torch.uint8)
        scales = torch.randint(121, 125, (E, N, K // 32), dtype=torch.uint8)
        tensors[f"{name}_blocks"] = packed
        tensors[f"{name}_scales"] = scales
        state[name].copy_(transformers.integrations.mxfp4.convert_moe_packed_tensors(
            packed, scales, dtype=torch.float32))
    save_file(tensors, folder / "model.safetensors")
    config = hf.config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}}
    config["architectures"] = ["GptOssForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder, hf


def test_mxfp4_files_equal_transformers(
    mxfp4_checkpoint: tuple[Path, transformers.PreTrainedModel]
) -> None:
    folder, hf = mxfp4_checkpoint
    check_decode(load_model(folder, dtype=torch.float32, quantize="none"), hf)


def test_mxfp4_stays_what_it_is(
    mxfp4_checkpoint: tuple[Path, transformers.PreTrainedModel]
) -> None:
    """quantize="auto": 8-bit integers stand for the same numbers, without any rounding."""
    folder, hf = mxfp4_checkpoint
    plain = load_model(folder, dtype=torch.float32, quantize="none")
    model = load_model(folder, dtype=torch.float32, quantize="auto")
    for ours, theirs in zip(model.layers, plain.layers):
        for stack in ("gate_up_proj", "down_proj"):
            layers = zip(getattr(ours.mlp.experts, stack), getattr(theirs.mlp.experts, stack))
            for layer, linear in layers:
                assert layer.mode == "int8_grouped"
                dense = torch.cat(list(layer.dense(torch.float32)))
                assert torch.equal(dense, linear.stored()["weight"])
    check_decode(model, hf, tol=2e-2)  # activations are rounded to bfloat16


def test_mxfp4_layer_holds_the_numbers_of_the_file(gpu_layouts: None) -> None:
    packed, exponents = random_mxfp4(70, 96)
    blocks = blocks_of(packed, exponents)
    linear = Linear(96, 70, bias=False)
    layer = FORMS["mxfp4"](linear)
    for rows, _ in blocks.slices(16):
        layer.take(rows, *blocks.affine(rows), 16)
    assert torch.equal(layer.scales, exponents)
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    expected = mxfp4_values(nibbles, exponents)
    assert torch.equal(torch.cat(list(layer.dense(torch.float32))), expected)
    stored = layer.stored()["weight"].clone()
    assert layer.pack().layout is not None
    assert torch.equal(layer.stored()["weight"], stored)
    assert torch.equal(torch.cat(list(layer.dense(torch.float32))), expected)


@pytest.mark.parametrize("missing", ["gate_up_proj_scales", "down_proj_blocks"])
def test_half_of_an_mxfp4_tensor_is_named(
    mxfp4_checkpoint: tuple[Path, transformers.PreTrainedModel], tmp_path: Path, missing: str
) -> None:
    folder, _ = mxfp4_checkpoint
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.1.mlp.experts.{missing}"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="no tensor .*layers.1.mlp.experts"):
        load_model(tmp_path)


@pytest.mark.parametrize("cut", [lambda x: x[:, :, :-1], lambda x: x[:, :-1], lambda x: x[:-1]])
def test_exponents_of_another_shape_are_named(
    mxfp4_checkpoint: tuple[Path, transformers.PreTrainedModel], tmp_path: Path, cut: Callable
) -> None:
    folder, _ = mxfp4_checkpoint
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    save_file(tensors | {name: cut(tensors[name]).contiguous()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj.* has shape"):
        load_model(tmp_path)
