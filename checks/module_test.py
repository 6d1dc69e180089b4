"""A model is a plain nn.Module, also where a CPU's products keep its weights in another order: what
is looked at, copied or changed is what a model shows whose layers have no layout."""
import copy
import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils import parametrize, prune

from batching import Engine
from checks.common import HERE, hf_folder
from cpu.products import Packed
from generate import Decoder, Request, compile_model, generate
from model import Transformer, load_model
from quantize import (
    LAYOUTS, PLAIN, Int4Linear, Linear, QuantizedLinear, save_quantized,
)

PROMPT = [list(range(5, 25))]
MODES = {
    "float32": dict(dtype=torch.float32),
    "bfloat16": dict(tie_word_embeddings=True),
    "int8": dict(quantize="int8"),
    "int4": dict(quantize="int4", dtype=torch.float32),
}
Load = Callable[[], Transformer]


@pytest.fixture(scope="module", params=MODES)
def load(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A model of that mode, anew each time."""
    options = dict(MODES[request.param])
    changes = {key: options.pop(key) for key in list(options) if key == "tie_word_embeddings"}
    folder = hf_folder(tmp_path_factory.mktemp("module") / "model", **changes)
    return lambda: load_model(folder, **options)


def down(model: Transformer) -> Any:
    return model.layers[0].mlp.down_proj


def numbers(layer: Any) -> Tensor:
    """What of a layer can be multiplied."""
    return layer.scales if hasattr(layer, "scales") else layer.weight


def logits(model: Transformer) -> Tensor:
    """Of a prompt and of three steps."""
    model.setup_caches(1, 32)
    tokens = torch.arange(7, 30)[None]
    found = [model(tokens[:, :20], torch.zeros(1, dtype=torch.int32))[:, -1]]
    for i in range(20, 23):
        position = torch.tensor([i], dtype=torch.int32)
        found.append(model(tokens[:, i:i + 1], position)[:, -1])
    return torch.cat(found).float()


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert (got.double() - want.double()).norm() <= 0.05 * want.double().norm()

@pytest.mark.parametrize("form", ["folder", "saved"])
def test_layers_are_in_order_when_they_are_loaded(load: Load, form: str, tmp_path: Path) -> None:
    """Nothing that loads them holds their tensors, or looks at them again."""
    model = load()
    if form == "saved" and any(isinstance(layer, QuantizedLinear) for layer in model.modules()):
        save_quantized(model, tmp_path / "saved")
        model = load_model(tmp_path / "saved", dtype=model.dtype)
    for layer in model.modules():
        layout = getattr(layer, "layout", None)
        assert layout is None or not hasattr(layout, "names") or layer.order is not None
    assert any(getattr(layer, "layout", None) is not None for layer in model.modules())

# --- what is done to a model, and what comes of it ---


def saved_and_loaded(model: Transformer) -> Transformer:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.zero_()
    generate(model, PROMPT, 2)
    model.load_state_dict(state)
    return model


def assigned(model: Transformer) -> Transformer:
    state = {name: x.clone() * (1.5 if "down" in name and x.is_floating_point() else 1)
             for name, x in model.state_dict().items()}
    generate(model, PROMPT, 2)
    model.load_state_dict({k: v.to(model.state_dict()[k].dtype) for k, v in state.items()},
                          assign=True)
    return model


def looked_at(model: Transformer) -> list[Tensor]:
    tensors = [*model.parameters(), *model.buffers()]
    shown = [x for p in tensors for x in (p[0].clone(), p.float().abs().max())]
    return [torch.tensor(sum(x.numel() for x in tensors)), *shown]


def edited(model: Transformer) -> Transformer:
    numbers(down(model)).mul_(2)
    return model


def edited_data(model: Transformer) -> Transformer:
    numbers(down(model)).data[3] *= 2
    tensor = numbers(model.layers[1].mlp.down_proj)
    tensor.data = tensor.detach() * 2
    return model


def edited_while_held(model: Transformer) -> Transformer:
    tensor = numbers(down(model))
    view = numbers(model.lm_head).data
    generate(model, PROMPT, 2)
    tensor.mul_(2)
    view.mul_(1.5)
    return model


def edited_between_steps(model: Transformer) -> list[Tensor]:
    model.setup_caches(1, 32)
    found = []
    for i in range(4):
        found.append(model(torch.tensor([[5]]), torch.tensor([i], dtype=torch.int32)))
        numbers(down(model)).mul_(1.3)
    return found


def embedding_edited(model: Transformer) -> Transformer:
    model.embed_tokens.weight.data[5:15] *= 2
    return model


def replaced(model: Transformer) -> Transformer:
    layer = down(model)
    if isinstance(layer, Linear):
        other = nn.Linear(layer.in_features, layer.out_features, bias=False)
        other.weight = layer.weight
        model.layers[0].mlp.down_proj = other
        logits(model)
    return edited(model)


def taken_from_another(model: Transformer) -> Transformer:
    one, two = down(model), model.layers[1].mlp.down_proj
    for name in ("weight", "scales", "zeros"):
        if hasattr(one, name):
            setattr(two, name, getattr(one, name))
    return edited(model)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def parametrized(model: Transformer) -> Transformer:
    if isinstance(down(model), Linear):
        parametrize.register_parametrization(down(model), "weight", Twice())
    return model


def pruned(model: Transformer) -> Transformer:
    if isinstance(down(model), Linear):
        prune.l1_unstructured(down(model), "weight", 0.3)
    return model


def stepped(model: Transformer) -> Transformer:
    floats = [p for p in model.parameters() if p.is_floating_point()]
    optimizer = torch.optim.SGD(floats, lr=0.3)
    logits(model)
    for p in floats:
        p.grad = p.detach().clone()
    optimizer.step()
    return model


def functional(model: Transformer) -> list[Tensor]:
    name = "layers.0.mlp.down_proj." + ("weight" if isinstance(down(model), Linear) else "scales")
    model.setup_caches(1, 32)
    twice = {name: numbers(down(model)) * 2}
    start = torch.zeros(1, dtype=torch.int32)
    return [torch.func.functional_call(model, twice, (torch.arange(n)[None], start))
            for n in (20, 1)]


def under_autocast(model: Transformer) -> list[Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return [logits(model)]


def on_meta(model: Transformer) -> list[Tensor]:
    return [torch.tensor(x.shape) for x in model.to("meta").state_dict().values() if x.is_meta]


def compiled(model: Transformer) -> Transformer:
    compiler = torch.compile
    eager = dict(backend="eager")
    with patch.object(torch, "compile", lambda f, options, **k: compiler(f, **eager, **k)):
        compile_model(model)
    logits(model)
    return edited(model)


DEEDS = [
    copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded, assigned,
    nn.Module.half, nn.Module.float, nn.Module.double, nn.Module.share_memory, looked_at, edited,
    edited_data, edited_while_held, edited_between_steps, embedding_edited, replaced,
    taken_from_another, parametrized, pruned, stepped, functional, under_autocast, on_meta,
    compiled,
]


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.__name__)
def test_what_is_done_to_a_model_is_done(load: Load, deed: Callable, used: bool) -> None:
    """As to one whose layers have no layout: new, and after a text."""
    def done() -> list[Tensor]:
        model = load()
        if used:
            generate(model, PROMPT, 2)
        torch._dynamo.reset()
        result = deed(model)
        return [logits(result)] if isinstance(result, nn.Module) else result

    with patch.dict(LAYOUTS, clear=True):
        wanted = done()
    for got, want in zip(done(), wanted, strict=True):
        close(got, want)


@pytest.mark.parametrize("inside", ["loading", "the cache", "generate"])
def test_inference_mode_may_be_around_anything(load: Load, inside: str) -> None:
    def mode(what: str) -> torch.inference_mode:
        return torch.inference_mode(what == inside)

    with mode("loading"):
        model = load()
    with mode("the cache"):
        model.setup_caches(1, 32)
    with mode("generate"):
        generate(model, PROMPT, 3)
    before = logits(model)
    edited(copy.deepcopy(model))
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(edited(model)), before)


@pytest.mark.parametrize("make", [Decoder, Engine, partial(Engine, speculate_k=2)])
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.1}])
def test_a_decoder_of_inference_mode_is_used_outside_too(
    load: Load, make: Callable[..., Decoder], settings: dict[str, float]
) -> None:
    model, prompts = load(), [*PROMPT, [9], [7, 8]]
    wanted = generate(model, prompts, 9, **settings)
    model.setup_caches(3, 64)
    with torch.inference_mode():
        decoder = make(model)
        assert generate(model, prompts, 9, engine=decoder, **settings) == wanted
    assert generate(model, prompts, 9, engine=decoder, **settings) == wanted
    for number, _ in decoder.run([Request(prompt, 9, **settings) for prompt in prompts]):
        decoder.end(number)


def test_defaults_of_pytorch_do_not_matter(load: Load) -> None:
    expected = generate(load(), PROMPT, 4, temperature=1.0, seed=1)
    with torch.device("meta"):
        assert generate(load(), PROMPT, 4, temperature=1.0, seed=1) == expected
    torch.set_default_dtype(torch.float64)
    try:
        assert generate(load(), PROMPT, 4, temperature=1.0, seed=1) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_models_take_turns_with_a_cache(load: Load) -> None:
    models = load(), load()
    models[0].setup_caches(1, 64)
    models[1].cache = models[0].cache
    prompts = PROMPT, [[9, 8, 7]]
    wanted = [generate(model, prompt, 12) for model, prompt in zip(models, prompts)]
    found: dict[int, list] = {}

    def answer(i: int) -> None:
        found[i] = generate(models[i], prompts[i], 12)

    threads = [threading.Thread(target=answer, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(0), found.get(1)] == wanted
    with pytest.raises(ValueError, match="at work with this model or cache"):
        generate(models[0], PROMPT, 2, stream=lambda *_: generate(models[1], PROMPT, 2))


def test_weights_are_packed_until_the_next_look_and_from_the_next_text_on(load: Load) -> None:
    """What can be asked without their values is no look; a view that somebody has keeps a layer
    plain."""
    model = load()
    layer = down(model)
    if LAYOUTS.get((layer.mode, "cpu")) is None or layer.mode == "int8":
        return
    hidden = numbers(layer)
    for x in (*model.parameters(), *model.buffers()):
        assert (x.shape, x.dtype, x.device, x.numel()) and x.nbytes == x.numel() * x.itemsize
    assert type(hidden) is Packed
    assert isinstance(hidden, nn.Parameter) == isinstance(layer, Linear)
    row = hidden[0]
    assert type(hidden) in (Tensor, nn.Parameter) and layer.order is None
    logits(model)
    assert layer.order is None
    del row
    logits(model)
    assert type(hidden) is Packed and numbers(layer) is hidden


def pack(layer: Any) -> Any:
    """As a text does when it begins."""
    if layer in PLAIN:
        layer.layout.pack(layer)
    return layer


@contextmanager
def interrupted(n: int) -> Iterator[list[int]]:
    """KeyboardInterrupt at the n-th line of ours that runs."""
    ran = [0]

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith((f"{HERE}/quantize", f"{HERE}/cpu")):
            return None
        ran[0] += event == "line"
        if event == "line" and ran[0] == n:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield ran
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)


@pytest.mark.parametrize("what", ["a look", "a text"])
def test_an_interrupt_leaves_a_layer_whole(load: Load, what: str) -> None:
    layer = down(load())
    x = torch.ones(1, layer.in_features, dtype=numbers(layer).dtype)
    want = layer(x)

    def text() -> None:
        pack(layer)(x)

    text()
    is_packed = layer.order is not None  # some CPUs have no products of bfloat16
    shown = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    n = 0
    while True:
        n += 1
        before, then = [text, layer.state_dict] if what == "a look" else [layer.state_dict, text]
        before()
        with interrupted(n) as ran:
            then()
        close(layer(x), want)
        assert all(torch.equal(layer.state_dict()[name], shown[name]) for name in shown)
        numbers(layer).mul_(2)
        if not isinstance(layer, Int4Linear):  # whose zeros are no multiples
            close(pack(layer)(x), 2 * want)
        numbers(layer).mul_(0.5)
        if ran[0] < n:
            break
    assert n > 3 or not is_packed
