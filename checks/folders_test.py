"""Folders as people have them: which files count, what names may be, and models in wrappers."""
import copy
import hashlib
import http.server
import json
import shutil
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor

from checks.common import BASE, DELTA, GEMMA4, LATENT, MANY_EXPERTS, close, hf_logits
from checks.formats_test import MakeCheckpoint, logits_of
from formats.checkpoint import resolve
from model import Checkpoint, load_model
from quantize import say_once

IDS = torch.arange(3, 20)[None]
NAME = "model.safetensors"


@pytest.fixture
def llama(checkpoint: MakeCheckpoint, tmp_path: Path) -> tuple[Path, transformers.PreTrainedModel]:
    """A folder to change, and the model in it."""
    folder, hf = checkpoint("llama")
    shutil.copytree(folder, tmp_path / "llama")
    return tmp_path / "llama", hf


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: x.contiguous() for name, x in tensors.items()}, file)


def renamed(folder: Path, new_name: Callable[[str], str]) -> None:
    tensors = load_file(folder / NAME)
    save({new_name(name): x for name, x in tensors.items()}, folder / NAME)


# --- which files count ---

@pytest.mark.parametrize("other", [
    "model_old.safetensors", "model.fp16.safetensors", "model-best.safetensors",
    "consolidated.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors",
])
def test_other_files_beside_the_weights_are_left_alone(
    llama: tuple[Path, transformers.PreTrainedModel], other: str
) -> None:
    folder, _ = llama
    before = logits_of(folder)
    tensors = {name: torch.zeros_like(x) for name, x in load_file(folder / NAME).items()}
    save(tensors, folder / other)
    assert torch.equal(logits_of(folder), before)
    alone = Checkpoint.from_folder(folder)  # where there is no formats/
    assert all(x.any() for name, x in alone.tensors.items() if name in tensors)


def test_a_single_file_counts_more_than_an_index(
    llama: tuple[Path, transformers.PreTrainedModel]
) -> None:
    """As in transformers; and an index more than other sets of parts."""
    folder, hf = llama
    want = logits_of(folder)
    hf.save_pretrained(folder, max_shard_size="40KB")
    for file in folder.glob("model-*-of-*.safetensors"):
        save({name: 2 * x for name, x in load_file(file).items()}, file)
    save(hf.state_dict(), folder / NAME)
    assert torch.equal(logits_of(folder), want)
    (folder / NAME).unlink()
    shutil.copy(next(folder.glob("model-00001-*")), folder / "model-00001-of-00009.safetensors")
    assert not torch.equal(logits_of(folder), want)  # the index's
    (folder / f"{NAME}.index.json").unlink()
    with pytest.raises(ValueError, match="no model.safetensors.index.json, and its parts model"):
        load_model(folder)


def test_a_set_that_lacks_a_part_is_refused(
    llama: tuple[Path, transformers.PreTrainedModel]
) -> None:
    folder, hf = llama
    hf.save_pretrained(folder, max_shard_size="40KB")
    for name in (NAME, f"{NAME}.index.json"):
        (folder / name).unlink()
    (folder / "model-00002-of-00011.safetensors").unlink()
    with pytest.raises(ValueError, match="to model-00011-of-00011.safetensors are not one whole"):
        load_model(folder)


def test_consolidated_files_count_where_there_is_nothing_else(
    llama: tuple[Path, transformers.PreTrainedModel]
) -> None:
    folder, _ = llama
    before = logits_of(folder)
    (folder / NAME).rename(folder / "consolidated.safetensors")
    assert torch.equal(logits_of(folder), before)


def test_pickles_of_the_old_format(llama: tuple[Path, transformers.PreTrainedModel]) -> None:
    folder, hf = llama
    before = logits_of(folder)
    (folder / NAME).unlink()
    file = folder / "pytorch_model.bin"
    torch.save(hf.state_dict(), file, _use_new_zipfile_serialization=False)
    assert torch.equal(logits_of(folder), before)


# --- names ---

@pytest.mark.parametrize("new_name", [
    lambda name: name.removeprefix("model."),
    lambda name: name.replace("model.", "transformer."),
    lambda name: name.replace("model.", "model.language_model."),
    lambda name: f"language_model.{name}",
    lambda name: f"module.{name}",
    lambda name: f"pretrained_model.{name}",
], ids=["", "transformer", "model.language_model", "language_model", "module", "pretrained_model"])
def test_names_may_begin_in_other_ways(
    llama: tuple[Path, transformers.PreTrainedModel], new_name: Callable[[str], str]
) -> None:
    folder, _ = llama
    before = logits_of(folder)
    renamed(folder, new_name)
    assert torch.equal(logits_of(folder), before)


def test_surplus_heads_get_one_warning(
    llama: tuple[Path, transformers.PreTrainedModel], capsys: pytest.CaptureFixture[str]
) -> None:
    """And what follows from the configuration none."""
    folder, _ = llama
    before = logits_of(folder)
    tensors = load_file(folder / NAME)
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8)
                   for i in range(3)}
    save(tensors | frequencies, folder / NAME)
    load_model(folder)
    assert "WARNING" not in capsys.readouterr().err
    save(tensors | {f"v_head.{x}": torch.ones(1) for x in "abc"}, folder / NAME)
    say_once.cache_clear()
    assert torch.equal(logits_of(folder), before)
    load_model(folder)
    err = capsys.readouterr().err
    assert err.count("WARNING") == err.count("v_head.a (and 2 more)") == 1


def test_layers_that_guess_further_tokens_are_left_out(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of families that have none here, whose names look like those of a model."""
    folder = shutil.copytree(checkpoint("qwen3-moe")[0], tmp_path / "m")
    before = logits_of(folder)
    names = "fc", "layers.0.self_attn.q_proj", "layers.0.mlp.experts.0.up_proj"
    more = {f"mtp.{name}.weight": torch.ones(8, 8) for name in names}
    save(load_file(folder / NAME) | more, folder / NAME)
    say_once.cache_clear()
    assert torch.equal(logits_of(folder), before)
    assert capsys.readouterr().err.count("mtp.fc.weight (and 2 more)") == 1


def test_an_output_layer_of_its_own_counts_though_it_is_tied(
    llama: tuple[Path, transformers.PreTrainedModel]
) -> None:
    folder, hf = llama
    change_config(folder, tie_word_embeddings=True)
    close(logits_of(folder), hf_logits(hf, IDS))
    assert not load_model(folder).config.tied
    tensors = load_file(folder / NAME)
    save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / NAME)
    model = load_model(folder)
    assert model.config.tied and model.lm_head.weight is model.embed_tokens.weight


def test_of_two_tied_tensors_either_may_be_stored(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder, hf = checkpoint("llama-tied-bias")
    shutil.copy(folder / "config.json", tmp_path)
    save_model(hf, str(tmp_path / NAME))
    assert "model.embed_tokens.weight" not in load_file(tmp_path / NAME)
    assert torch.equal(logits_of(tmp_path), logits_of(folder))
    change_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="no tensor model.embed_tokens.weight"):
        load_model(tmp_path)


# --- models in wrappers ---

EYES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            image_size=32, patch_size=16)
QWEN_EYES = dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2, patch_size=4,
                 intermediate_size=48, out_hidden_size=64)
MROPE = dict(type="mrope", mrope_section=[2, 3, 3])
WRAPPED = {  # transformers' class -> settings of its text_config, and of its vision_config
    "Gemma3": (dict(sliding_window=9, rope_scaling=dict(rope_type="linear", factor=8.0)), EYES),
    "Gemma4": (GEMMA4, EYES | dict(num_key_value_heads=2, head_dim=16)),
    "Mistral3": (dict(model_type="mistral", sliding_window=None),
                 EYES | dict(model_type="pixtral", head_dim=16)),
    "Mistral3 with Ministral3": (dict(model_type="ministral3"),
                                 EYES | dict(model_type="pixtral", head_dim=16)),
    "Mistral3 with Mistral4": (
        dict(LATENT, model_type="mistral4", num_key_value_heads=4, pad_token_id=0, head_dim=20),
        EYES | dict(model_type="pixtral", head_dim=16)),
    "Llava": (dict(model_type="llama"), EYES | dict(model_type="clip_vision_model")),
    "InternVL": (dict(model_type="qwen2"), EYES),
    "SmolVLM": (dict(model_type="llama", pad_token_id=0), EYES),
    "Qwen2VL": (dict(rope_scaling=MROPE), QWEN_EYES),
    "Qwen3VL": (dict(tie_word_embeddings=True, rope_scaling=MROPE | dict(type="default")),
                QWEN_EYES | dict(deepstack_visual_indexes=[0])),
    "Qwen3_5": (DELTA, QWEN_EYES),
    "Qwen3_5Moe": (DELTA | MANY_EXPERTS, QWEN_EYES),
}


def wrapped(name: str, folder: Path) -> transformers.PreTrainedModel:
    """A random checkpoint of a model that takes pictures too."""
    text, vision = copy.deepcopy(WRAPPED[name])  # as transformers writes into its arguments
    name = name.split()[0]
    text = BASE | dict(hidden_size=64, num_attention_heads=4, head_dim=16) | text
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    hf = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval().float()
    with torch.no_grad():
        for x in hf.parameters():
            x.normal_(std=0.15) if x.dim() > 1 else x.add_(0.3 * torch.randn_like(x))
    hf.save_pretrained(folder)
    return hf


@pytest.mark.parametrize("name", WRAPPED)
def test_the_model_of_texts_in_a_wrapper_equals_transformers(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = wrapped(name, tmp_path)
    say_once.cache_clear()
    close(logits_of(tmp_path), hf_logits(hf, IDS))
    load_model(tmp_path)
    assert capsys.readouterr().err.count("pictures and sound are left out") == 1


@pytest.mark.parametrize("name, dropped", [
    ("Gemma3", ["model_type", "num_hidden_layers", "tie_word_embeddings"]),
    ("Llava", ["model_type", "num_attention_heads"]),
    ("Mistral3 with Ministral3", ["num_attention_heads", "num_hidden_layers"]),
    ("Qwen3VL", ["model_type", "num_attention_heads", "rope_parameters"]),
    ("Qwen2VL", ["num_key_value_heads", "rope_parameters", "rms_norm_eps"]),
])
def test_what_a_text_config_leaves_out_is_what_transformers_takes(
    name: str, dropped: list[str], tmp_path: Path
) -> None:
    """Bare configurations: their shapes are compared."""
    text, _ = WRAPPED[name]
    kind = getattr(transformers, f"{name.split()[0]}Config").model_type
    text = BASE | dict(hidden_size=512, num_attention_heads=16) | text
    text = {key: value for key, value in text.items() if key not in dropped}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(dict(model_type=kind, text_config=text)))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).get_text_config()
    ours = load_model(file, quantize="none").config
    rope = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
    assert ours.n_layer == theirs.num_hidden_layers
    assert ours.n_head == theirs.num_attention_heads
    assert ours.n_kv_head == theirs.num_key_value_heads
    assert ours.norm_eps == theirs.rms_norm_eps
    assert max(each.theta for each in ours.ropes) == rope["rope_theta"]


def test_settings_of_texts_may_stand_beside_those_of_pictures(tmp_path: Path) -> None:
    """As in the files of Qwen2-VL and Qwen2.5-VL."""
    hf = wrapped("Qwen2VL", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.pop("text_config")
    (tmp_path / "config.json").write_text(json.dumps(
        text | config | {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": MROPE}))
    close(logits_of(tmp_path), hf_logits(hf, IDS))


def test_a_wrapper_that_reads_its_prompt_in_both_directions_is_refused(tmp_path: Path) -> None:
    text = BASE | dict(model_type="gemma")
    change = dict(model_type="paligemma", architectures=["PaliGemmaForConditionalGeneration"])
    (tmp_path / "config.json").write_text(json.dumps(change | dict(text_config=text)))
    with pytest.raises(ValueError, match="unsupported architecture 'PaliGemma"):
        load_model(tmp_path / "config.json")


# --- the hub, from a server in this process ---

class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub, for one repository."""

    folder: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        here = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
        files = {str(file.relative_to(self.folder)): file.read_bytes() for file in here}
        headers, found = {}, None
        if "/tree/" in path:
            found = [dict(type="file", path=name, size=len(content), oid=sha1(content))
                     for name, content in files.items()]
        elif path.startswith("/api/models/"):
            found = dict(id="org/name", _id="x", sha="a" * 40, private=False, downloads=0, likes=0,
                         tags=[], siblings=[dict(rfilename=name) for name in files])
        content = json.dumps(found).encode()
        if found is None:
            content = files[path.partition("/resolve/")[2].partition("/")[2]]
            headers = {"ETag": f'"{sha1(content)}"', "X-Repo-Commit": "a" * 40}
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(
    llama: tuple[Path, transformers.PreTrainedModel], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[Path]:
    """A hub with org/name, whose files lie in a folder -> the folder."""
    Hub.folder, _ = llama
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in dict(HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download",
        lambda *args, real=huggingface_hub.snapshot_download, **kwargs: real(
            *args, cache_dir=tmp_path / "cache", endpoint=address, **kwargs))
    yield Hub.folder
    server.shutdown()
    server.server_close()


def test_copies_of_the_weights_are_not_fetched(hub: Path) -> None:
    (hub / "original").mkdir()
    for name in ("original/model.safetensors", "original/params.json", "consolidated.safetensors",
                 "pytorch_model.bin", "model.fp16.safetensors"):
        (hub / name).write_bytes(b"x" * 100)
    folder = resolve("org/name")
    fetched = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert fetched == {"config.json", "generation_config.json", NAME}


@pytest.mark.parametrize("kind", ["shards", "bin", "bin parts"])
def test_a_hub_model_may_have_parts_and_pickles(
    hub: Path, llama: tuple[Path, transformers.PreTrainedModel], kind: str
) -> None:
    _, hf = llama
    before = logits_of(hub)
    (hub / NAME).unlink()
    items = list(hf.state_dict().items())
    if kind == "shards":
        hf.save_pretrained(hub, max_shard_size="40KB")
        index = dict(weight_map={name: "pytorch_model-00001-of-00001.bin" for name, _ in items})
        (hub / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    elif kind == "bin":
        torch.save(dict(items), hub / "pytorch_model.bin")
    else:
        torch.save(dict(items[:7]), hub / "pytorch_model-00001-of-00002.bin")
        torch.save(dict(items[7:]), hub / "pytorch_model-00002-of-00002.bin")
    assert torch.equal(logits_of("org/name"), before)
    shutil.rmtree(hub)  # from here on the cache is all there is
    assert torch.equal(logits_of("org/name"), before)


def test_a_part_of_a_model_in_the_cache_is_completed(hub: Path) -> None:
    """As a program leaves it that asks for the tokenizer alone."""
    huggingface_hub.snapshot_download("org/name", allow_patterns="*.json")
    assert torch.equal(logits_of("org/name"), logits_of(hub))
