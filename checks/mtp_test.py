"""A layer that guesses the token after the next one: its guesses are transformers', and texts are
the same with it as without."""
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel
from transformers.modeling_layers import MtpModel

from batching import Engine, Stats
from batching.speculate import OwnLayer, PromptLookup
from checks.common import close
from formats.wrappers import plain_names
from generate import Request, compile_model, generate
from model import Transformer, load_model
from quantize import quantize_model, save_quantized

Checkpoint = Callable[[str], tuple[Path, PreTrainedModel]]  # the fixture: random ones, by name
NAMES = ["qwen3.5", "qwen3.5-moe", "qwen3-next"]
WEIGHTS = "model.safetensors"
PROMPTS = [[5, 6, 7], [9], list(range(10, 50)), list(range(10, 52)), [8, 3], [4] * 20]
# what files call the parts of transformers' layer
PARTS = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc",
         "post_norm": "norm", "mtp_block": "layers.0"}


class Guesser:
    """transformers' layer behind a random model, and a folder with both."""

    def __init__(self, folder: Path, hf: PreTrainedModel):
        self.hf, self.folder = hf, folder
        hf.config.num_mtp_layers, hf.config.mtp_layer_types = 1, ["full_attention"]
        self.mtp = MtpModel(hf, 1).eval()
        del hf.config.num_mtp_layers, hf.config.mtp_layer_types
        draw = torch.Generator().manual_seed(1)
        tensors = load_file(folder / WEIGHTS)
        for name, parameter in self.mtp.layers[0].named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.data = 0.15 * noise if parameter.dim() > 1 else parameter + 0.3 * noise
            part, _, rest = name.partition(".")
            tensors[f"mtp.{PARTS[part]}.{rest}"] = parameter.detach().clone()
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """Of the token that is to follow ids, by what the model makes of all but the last."""
        tokens = torch.tensor([ids])
        before = self.hf(tokens[:, :-1], output_hidden_states=True).hidden_states[-1]
        x, at = self.hf.get_input_embeddings()(tokens[:, 1:]), torch.arange(1, len(ids))[None]
        unseen = torch.full((len(ids) - 1,) * 2, -torch.inf).triu(1)[None, None]
        return self.hf.lm_head(self.mtp.layers[0](
            x, before, position_embeddings=self.mtp.rotary_emb(x, at), attention_mask=unseen,
            position_ids=at, past_key_values=None,
        ))[0, -1]


@pytest.fixture(scope="module", params=NAMES)
def guesser(
    request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Guesser:
    folder, hf = checkpoint(request.param)
    return Guesser(shutil.copytree(folder, tmp_path_factory.mktemp("mtp") / "model"), hf)


@pytest.fixture(scope="module")
def model(guesser: Guesser) -> Transformer:
    return load_model(guesser.folder, dtype=torch.float32)


def texts(model: Transformer, **settings: object) -> list[list[int]]:
    alone = []
    for i, prompt in enumerate(PROMPTS):
        model.setup_caches(1, 96)
        alone += generate(model, [prompt], 30, seed=i, **settings)
    return alone


def mostly_right(engine: Engine, wanted: list[list[int]]) -> None:
    """Let five of seven proposals be what will be drawn."""
    propose = engine.drafter.propose

    def better(token: Tensor, input_pos: Tensor, rows: slice, k: int, *rest: object) -> Tensor:
        proposals = propose(token, input_pos, rows, k, *rest).clone()
        for row, running in engine.running.items():
            first = int(input_pos[row]) + 1 - running.prompt_end
            for i, token in enumerate(wanted[running.number][first:first + k]):
                if (first + i) % 7 not in (0, 3):
                    proposals[row, i] = token
        return proposals

    engine.drafter.propose = better


def test_it_guesses_what_transformers_does_after_rejections_too(
    guesser: Guesser, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = texts(model)
    for chunk in 8192, 7:
        monkeypatch.setattr("batching.engine.PREFILL_CHUNK", chunk)
        engine = Engine(model, model.setup_caches(1, 96), speculate_k=4)
        mostly_right(engine, wanted[2:])
        ids = list(PROMPTS[2])
        for _, tokens in engine.run([Request(ids, 30)]):
            ids += tokens
            # a step may be under way behind a prompt, and the text may end within one
            if engine.running and len(ids) == int(engine.input_pos[0]) + 1:
                close(model.lm_head(engine.drafter.hidden)[0, 0], guesser.logits(ids), 5e-4)
        assert ids == PROMPTS[2] + wanted[2]
        accepted = engine.stats.speculation.accepted
        assert accepted[1] > accepted[2] > 0 == accepted[3]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.9}])
def test_texts_are_the_same_in_rows_that_are_refilled_and_share(
    model: Transformer, settings: dict[str, float]
) -> None:
    wanted = texts(model, **settings)
    for rows, k in (2, 3), (6, 1):
        engine = Engine(model, model.setup_caches(rows, 96), speculate_k=k)
        mostly_right(engine, wanted)
        requests = [Request(p, 30, seed=i, **settings) for i, p in enumerate(PROMPTS)]
        given: list[list[int]] = [[] for _ in requests]
        for number, tokens in engine.run(requests):
            given[number] += tokens
        assert given == wanted and sum(engine.stats.speculation.accepted) > 20
        assert engine.stats.shared_tokens > 0


def test_a_text_is_continued(model: Transformer) -> None:
    answers = []
    for k in 0, 3:
        engine = Engine(model, model.setup_caches(1, 96), speculate_k=k)
        ids = list(PROMPTS[2])
        for more in [], [7, 8, 9]:
            cached = engine.cache.cached[0] if more else 0
            prompt = [*ids[cached:], *more]
            ids += more + generate(model, [prompt], 20, cached=cached, engine=engine)[0]
        answers.append(ids)
    assert answers[0] == answers[1]


def test_a_compiled_step_has_no_graph_more_for_it(
    model: Transformer, no_inductor: None
) -> None:
    wanted = texts(model)[2]
    compile_model(model)
    counters.clear()
    model.setup_caches(1, 96)
    assert generate(model, PROMPTS[2:3], 30, speculate_k=2, compile=True) == [wanted]
    assert counters["stats"]["unique_graphs"] == 2 * 2  # kinds of layers, and lengths of a step
    model.setup_caches(1, 96)
    generate(model, PROMPTS[:1], 2, compile=False)  # for other tests


def test_it_is_saved_with_the_model(guesser: Guesser, tmp_path: Path) -> None:
    model = quantize_model(load_model(guesser.folder, dtype=torch.float32), "int8")
    save_quantized(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved", dtype=torch.float32)
    x = torch.randn(1, 2, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.mtp.fc(x), again.mtp.fc(x))
    stats = Stats()
    assert generate(again, [[5, 6, 7]], 20, speculate_k=3, stats=stats) == generate(
        model, [[5, 6, 7]], 20)
    assert stats.speculation.checked > 0


def test_it_is_found_beside_a_model_of_pictures() -> None:
    stored = {"model.language_model.layers.0.mlp.w": 1, "mtp.fc.weight": 2, "model.visual.w": 3}
    config = {"wrapper": "qwen3_5"}
    plain = plain_names(stored, config)
    assert plain == {"model.layers.0.mlp.w": 1, "model.mtp.fc.weight": 2} and config["mtp"]


def test_files_without_it_and_of_a_part_of_it(
    guesser: Guesser, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    def drafter(folder: Path) -> type:
        model = load_model(folder, dtype=torch.float32)
        model.setup_caches(1, 16)
        return type(Engine(model, speculate_k=1).drafter)

    assert drafter(guesser.folder) is OwnLayer
    folder = shutil.copytree(guesser.folder, tmp_path / "m")
    tensors = load_file(folder / WEIGHTS)
    del tensors["mtp.norm.weight"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=r"no tensor model\.mtp\.norm\.weight"):
        load_model(folder)
    without = {name: x for name, x in tensors.items() if not name.startswith("mtp.")}
    save_file(without, folder / WEIGHTS, {"format": "pt"})
    assert drafter(folder) is PromptLookup
