"""Quantized GGUF files: every type gives its own integers, and the model is that of the file."""
import copy
import ctypes
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import gguf
import pytest
import torch
import torch.nn.functional as F
import transformers
from gguf import GGMLQuantizationType as GGML
from torch import Tensor

from benchmarks.quality import perplexity
from checks.common import (
    CPU_ENV, HERE, byte_level_tokenizer, random_blocks, run_cli, write_gguf,
)
from checks.hostile import GGUF, U32, hostile_gguf
from cpu.products import tile, tiling, untile, untile_rows
from formats.blocks import TYPES, dequantized, file_blocks, unpack
from formats.default import default_model
from formats.gguf_file import read_gguf
from formats.integers import AffineInt8Linear, FileInt4Linear, QuantizedEmbedding
from generate import Tokenizer, generate, load_tokenizer
from model import Transformer, load_model, open_checkpoint
from products import Int4OnGPU
from quantize import Linear, affine, say_once, save_quantized, unpack_nibbles

NAMES = [kind.name for kind in TYPES]
OF_16 = ["Q2_K", "Q3_K", "Q6_K"]  # inputs of a group
MIXED = "Q4_K_M"  # as llama.cpp mixes: v and down of some layers in 6 bits, and the vocabulary


def kind_in(mix: str) -> Callable[[str], GGML]:
    """How a file of that mix stores a matrix."""

    def kind_of(name: str) -> GGML:
        if mix != MIXED:
            return GGML[mix]
        wide = re.match(r"blk\.[02]\.(attn_v|ffn_down)|token_embd|output\.", name)
        return GGML.Q6_K if wide else GGML.Q4_K

    return kind_of


def random_llama(**settings: object) -> transformers.PreTrainedModel:
    """A random Llama whose sizes are whole blocks of 256."""
    sizes = dict(
        vocab_size=320, hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=512, max_position_embeddings=128,
    )
    config = transformers.LlamaConfig(**{**sizes, **settings})
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def file_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """file_of(mix, tied) -> a small GGUF file, made once."""
    folder = tmp_path_factory.mktemp("gguf")

    @torch.random.fork_rng(devices=[])  # a test draws the same whether it was made before or not
    def make(mix: str, tied: bool = False) -> Path:
        path = folder / f"{mix}-{tied}.gguf"
        if not path.exists():
            hf = random_llama(tie_word_embeddings=tied)
            write_gguf(path, hf.config, hf.state_dict(), kind_of=kind_in(mix))
        return path

    return make


# --- blocks ---

@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_exactly_what_gguf_reads(
    file_of: Callable[[str, bool], Path], name: str
) -> None:
    path = file_of(name)
    _, tensors = read_gguf(path)
    stored = tensors["blk.1.ffn_down.weight"]
    blocks = file_blocks(stored)
    parts = [part for _, part in blocks.slices(100)]
    q, scale, zero = [torch.cat(part) for part in zip(*parts)]
    assert q.shape == blocks.shape == (256, 512)
    assert int(q.max()) < 2**blocks.bits
    assert scale.shape == zero.shape == (256, 512 // (16 if name in OF_16 else 32))
    dense = (q.view(*scale.shape, -1) * scale[..., None] + zero[..., None]).flatten(1)
    assert torch.equal(dense, dequantized(stored))


@pytest.mark.parametrize("kind", TYPES)
def test_a_single_block_is_read_like_many(kind: GGML) -> None:
    """Its parts count as contiguous wherever they begin."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    data = torch.from_numpy(random_blocks((3, block), kind)).view(3, nbytes)
    one_by_one = [unpack(kind, row[None]) for row in data]
    for part, parts in zip(unpack(kind, data), zip(*one_by_one)):
        assert torch.equal(part, torch.cat(parts))


# --- layers ---

def test_packing_for_a_cpu_is_pytorchs() -> None:
    layout = tiling()
    if layout is None:
        pytest.skip("an unknown layout of int4 weights on this CPU")
    nibbles = torch.randint(16, (192, 64), dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1)
    assert torch.equal(tile(nibbles, *layout), packed)
    assert torch.equal(untile(packed, *layout), nibbles)
    index = torch.tensor([0, 191, 63, 64, 64, 5])
    assert torch.equal(untile_rows(packed, index, *layout), nibbles[index])


@pytest.mark.parametrize("N, K, group_size, bits", [
    (65, 96, 32, 8), (64, 64, 16, 6), (1030, 128, 32, 5), (1, 32, 16, 6),
])
def test_bytes_in_groups_are_the_integers_of_a_file(
    N: int, K: int, group_size: int, bits: int
) -> None:
    torch.manual_seed(N)
    q = torch.randint(2**bits, (N, K), dtype=torch.uint8)
    q[0, :2] = torch.tensor([0, 2**bits - 1])
    scale = (torch.rand(N, K // group_size) + 0.5).bfloat16().float()
    zero = -2.0**(bits - 1) * scale
    w = (q.view(N, -1, group_size) * scale[..., None] + zero[..., None]).flatten(1)
    layer = AffineInt8Linear(Linear(K, N, False), group_size)
    layer.take(slice(0, N), q, scale, zero, 2**(bits - 1))

    # the kernels for int4 read a byte as two nibbles
    x = torch.randn(3, K).bfloat16()
    pairs = torch.stack((x, 16 * x), -1).flatten(1)
    weight = affine(unpack_nibbles(layer.weight), 8, layer.scales, layer.zeros, torch.float32)
    y = F.linear(pairs.float(), weight)
    expected = F.linear(x.float(), w)
    bound = 6e-3 if N > 1 else 1e-2  # few numbers in bfloat16
    assert (y - expected).norm() < bound * expected.norm()

    # also as a GPU's has them
    on_gpu = copy.deepcopy(layer)
    on_gpu.layout = Int4OnGPU()
    assert on_gpu.layout.pack(on_gpu)
    y = on_gpu.layout.product(on_gpu, x)
    assert (y - expected).norm() < bound * expected.norm()
    for name, tensor in on_gpu.stored().items():
        assert torch.equal(tensor, getattr(layer, name))
    index = torch.tensor([[N - 1, 0]])
    embedding = QuantizedEmbedding(on_gpu, torch.float32)
    assert torch.equal(embedding(index), torch.cat(list(layer.dense(torch.float32)))[index])

    # and so does a CPU's operator
    layer.pack()
    dense = torch.cat(list(layer.dense(torch.float32)))
    # a part of a step: what a zero is rounded by
    assert (dense - w).abs().max() < 0.04 * scale.max()
    embedding = QuantizedEmbedding(layer, torch.float32)
    assert torch.equal(embedding(index), dense[index])
    for rows in (1, 3, 128, 129):
        x = torch.randn(rows, K)
        expected = F.linear(x, w)
        assert (layer(x) - expected).norm() < 1e-2 * expected.norm()


# --- models ---

def mean_kl(model: Transformer, reference: Transformer) -> float:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(320, (100,), generator=generator).tolist()
    _, kl = perplexity(model, ids, 128, reference=reference)
    return kl


@pytest.mark.parametrize("mix", [*NAMES, MIXED])
def test_the_integers_of_a_file_stay(file_of: Callable[[str, bool], Path], mix: str) -> None:
    path = file_of(mix)
    dequantized = load_model(path, dtype=torch.float32, quantize="none")
    model = load_model(path)
    assert model.dtype == torch.float32

    # four bits are the int4 layer's, the rest takes bytes
    block = model.layers[0]
    layers = [block.self_attn.qkv_proj, block.self_attn.o_proj, block.mlp.gate_up_proj,
              block.mlp.down_proj, model.lm_head, model.embed_tokens.table]
    small = layers[1:3] if mix == MIXED else []
    if mix in ("Q4_0", "Q4_1", "Q4_K"):
        small = layers
    for layer in layers:
        assert type(layer) is (FileInt4Linear if layer in small else AffineInt8Linear)

    # nothing is lost but the precision of scales: q and k are in Hugging Face's order too
    exact = dequantized.layers[0].self_attn.qkv_proj.stored()["weight"]
    kept = torch.cat(list(block.self_attn.qkv_proj.dense(torch.float32)))
    if mix in ("MXFP4", "NVFP4"):  # their scales have few bits
        assert torch.equal(kept, exact)
    else:
        assert (kept - exact).norm() < 3e-3 * exact.norm()
    assert 0 < mean_kl(model, dequantized) < 5e-4


def test_one_table_serves_a_tied_output_layer(
    file_of: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    """Also in a folder that was saved, which says the same."""
    path = file_of("Q8_0", True)
    model = load_model(path, dtype=torch.bfloat16)
    assert model.lm_head is model.embed_tokens.table
    assert mean_kl(model, load_model(path, quantize="none")) < 5e-4
    tokens = generate(model, [[1, 2, 3]], 8)
    save_quantized(model, tmp_path / "q")
    again = load_model(tmp_path / "q")
    assert again.lm_head is again.embed_tokens.table
    again.setup_caches(1, 128)
    assert generate(again, [[1, 2, 3]], 8) == tokens


def test_types_that_no_layer_holds_are_dequantized_and_said(
    file_of: Callable[[str, bool], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, with what they take in memory."""
    say_once.cache_clear()
    model = load_model(file_of("IQ3_S"), dtype=torch.bfloat16)
    said = capsys.readouterr().err
    assert said.count("IQ3_S weights are dequantized") == 1 and said.count("2.7 MB") == 1
    assert type(model.layers[0].mlp.down_proj) is Linear
    assert mean_kl(model, load_model(file_of("IQ3_S"), quantize="none")) == 0


@pytest.mark.parametrize("mix, dtype", [("F32", torch.bfloat16), ("Q4_0", torch.float32)])
def test_activations_take_their_precision_from_the_file(
    file_of: Callable[[str, bool], Path], mix: str, dtype: torch.dtype
) -> None:
    assert load_model(file_of(mix)).dtype == dtype
    assert load_model(file_of(mix), quantize="none").dtype == torch.bfloat16
    # a GPU's flash kernels refuse float32, and so does its cache
    on_gpu = open_checkpoint(file_of(mix)).default_dtype("auto", torch.device("cuda"))
    assert on_gpu == torch.bfloat16


def test_what_auto_made_is_saved(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a loss to report: the integers are those of the file."""
    path = default_model()
    folder = tmp_path / "q"
    code, _, err = run_cli(
        capfd, "--checkpoint_path", path, "--quantize", "auto", "--save", folder
    )
    assert code == 0
    assert "121 layers" in err
    assert "the file's own integers" in err
    before = load_model(path, quantize="auto", dtype=torch.float32)
    after = load_model(folder, dtype=torch.float32)
    ids = torch.arange(100, 108)[None]
    logits = []
    for model in (before, after):
        model.setup_caches(1, 16)
        logits.append(model(ids, torch.zeros(1, dtype=torch.int32)))
    assert torch.equal(*logits)


@pytest.mark.parametrize("share", [0.3, 0.99])
def test_a_truncated_file_is_one_sentence(
    file_of: Callable[[str, bool], Path], tmp_path: Path, share: float,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = file_of(MIXED).read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[:int(share * len(data))])
    code, out, err = run_cli(capfd, "--checkpoint_path", path, "--prompt", "3")
    assert code == 2
    assert out == ""
    assert "cut.gguf" in err
    assert err.count("\n") == 1


HOSTILE = hostile_gguf()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_its_own_size(tmp_path: Path, name: str) -> None:
    """Whatever it claims: without a list of 2^40 numbers in memory, or a minute of reading."""
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[name])
    began = time.thread_time()
    tracemalloc.start()
    with pytest.raises(ValueError) as e:
        load_tokenizer(path)
        load_model(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "\n" not in str(e.value)
    assert peak < 2**24 and time.thread_time() - began < 10


def test_no_model_of_more_layers_than_there_are_tensors_is_made(tmp_path: Path) -> None:
    """Which would take seconds."""
    file = GGUF()
    file.settings["llama.block_count"] = (U32, 2048)
    (tmp_path / "m.gguf").write_bytes(file.content())
    with pytest.raises(ValueError, match="has 11 tensors, too few for 2048 layers"):
        load_model(tmp_path / "m.gguf")


def test_the_hostile_files_are_else_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(GGUF().content())
    assert load_model(path).config.n_layer == 1
    assert load_tokenizer(path).encode("a", bos=False) == [259, 100]


def test_a_file_that_was_replaced_is_read_anew(
    file_of: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    path = Path(shutil.copy(file_of("Q4_0"), tmp_path / "x.gguf"))
    load_model(path)
    shutil.copy(file_of("Q8_0"), path)
    new, want = load_model(path), load_model(file_of("Q8_0"))
    assert torch.equal(*(model.lm_head.stored()["weight"] for model in (new, want)))


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    """A file in two parts, and the whole one."""
    hf = random_llama(hidden_size=64, intermediate_size=96)
    state = hf.state_dict()
    names = list(state)
    files = []
    for i, part in enumerate((names[:8], names[8:])):
        extra = [("add_uint16", "split.no", i), ("add_uint16", "split.count", 2)]
        file = tmp_path / f"m-{i + 1:05d}-of-00002.gguf"
        files.append(write_gguf(file, hf.config, {name: state[name] for name in part}, extra=extra))
    return [*files, write_gguf(tmp_path / "whole.gguf", hf.config, state)]


def test_the_parts_of_a_split_file_are_read_together(split: list[Path]) -> None:
    """Whichever is given."""
    *parts, whole = split
    want = load_model(whole).state_dict()
    for part in parts:
        got = load_model(part).state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_parts_that_do_not_belong_together_are_refused(split: list[Path]) -> None:
    first, second, _ = split
    renamed = first.with_name("first.gguf")
    shutil.copy(first, renamed)
    with pytest.raises(ValueError, match="first.gguf is not part 2 of 2 of a split GGUF"):
        load_model(renamed)
    shutil.copy(first, second)
    with pytest.raises(ValueError, match=f"{second.name} is not part 2"):
        load_model(first)
    second.unlink()
    with pytest.raises(ValueError, match=f"cannot read .*{second.name}: .*No such file"):
        load_model(first)


def test_files_that_are_no_model_of_this_machine_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "big") + bytes(100))
    with pytest.raises(ValueError, match="it is big-endian"):
        load_model(path)
    writer = gguf.GGUFWriter(path, "clip")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file,
                  writer.write_tensors_to_file, writer.close):
        write()
    with pytest.raises(ValueError, match="x.gguf is an mmproj"):
        load_model(path)


def test_the_default_model_keeps_its_answers(
    smollm: tuple[Transformer, Tokenizer], gpl: list[int]
) -> None:
    """Mean KL from the dequantized model on the first 512 tokens of a text."""
    reference, _ = smollm
    model = load_model()
    _, kl = perplexity(model, gpl[:513], reference=reference)
    assert 1e-4 < kl < 1e-3


# --- memory ---

PEAK = """
import sys
from pathlib import Path
import torch
from model import load_model

def peak() -> int:
    [line] = [x for x in open("/proc/self/status") if x.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

def run(path: str) -> None:
    model = load_model(Path(path))
    model.setup_caches(1, 64)
    model(torch.ones(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.int32))

torch.set_num_threads(2)
run(sys.argv[1])
before = peak()
run(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read peaks from")
@pytest.mark.parametrize("mix", ["Q4_0", "Q8_0", MIXED])
def test_a_quantized_file_takes_no_more_memory_than_it_must(
    file_of: Callable[[str, bool], Path], tmp_path: Path, mix: str
) -> None:
    """Peak of loading and of a step, in a process that is warm: 1.3 times the size of the file, and
    what a part of a layer takes while it is repacked. What is freed goes back at once, so that
    holes in the allocator's heap, which differ from run to run, do not count."""
    with torch.device("meta"):
        hf = random_llama(
            hidden_size=2048, num_attention_heads=16, intermediate_size=5632, num_hidden_layers=4
        )
    state = {name: torch.zeros(x.shape) for name, x in hf.state_dict().items()}
    path = write_gguf(tmp_path / "large.gguf", hf.config, state, kind_of=kind_in(mix))
    command = [sys.executable, "-c", PEAK, file_of(mix), path]
    env = CPU_ENV | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=env, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.3 * path.stat().st_size + 2**24


# --- files that llama.cpp wrote ---

@pytest.fixture(scope="module")
def llama_cpp() -> ModuleType:
    """llama-cpp-python, which is built from source and not among the tests' requirements."""
    return pytest.importorskip("llama_cpp", reason="needs pip install llama-cpp-python==0.3.36")


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a vocabulary, in float32: as llama.cpp's converter writes it."""
    hf = random_llama(vocab_size=600)
    _, tokens, merges = byte_level_tokenizer(["<|endoftext|>", "<|im_end|>"])
    path = tmp_path_factory.mktemp("llama_cpp") / "f32.gguf"
    return write_gguf(path, hf.config, hf.state_dict(), extra=[
        ("add_rope_dimension_count", 64),
        ("add_vocab_size", 600),
        ("add_tokenizer_model", "gpt2"),
        ("add_tokenizer_pre", "gpt-2"),
        ("add_token_list", tokens),
        ("add_token_merges", [" ".join(pair) for pair in merges]),
        ("add_token_types", [3, 3] + [1] * (len(tokens) - 2)),
        ("add_bos_token_id", 0),
        ("add_eos_token_id", 1),
    ])


def llama_cpp_logits(llama_cpp: ModuleType, path: Path, ids: list[int]) -> Tensor:
    llama = llama_cpp.Llama(
        str(path), n_ctx=128, n_batch=128, n_threads=2, logits_all=True, verbose=False
    )
    llama.eval(ids)
    return torch.tensor(llama.scores[:len(ids)]).float()


@pytest.mark.parametrize("mix", [
    "Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "IQ3_S", "IQ4_NL", "IQ4_XS",
])
def test_files_of_llama_cpps_quantizer(
    llama_cpp: ModuleType, float_file: Path, tmp_path: Path, mix: str
) -> None:
    """The model is the dequantized one, closer than llama.cpp's own, whose activations are
    int8."""
    path = tmp_path / f"{mix}.gguf"
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mix}")
    failed = llama_cpp.llama_model_quantize(
        str(float_file).encode(), str(path).encode(), ctypes.byref(settings)
    )
    assert failed == 0

    ids = torch.arange(3, 103)
    dequantized = load_model(path, dtype=torch.float32, quantize="none")
    kept = load_model(path)
    logps = []
    for model in (dequantized, kept):
        model.setup_caches(1, 128)
        logits = model(ids[None], torch.zeros(1, dtype=torch.int32))[0]
        logps.append(logits.log_softmax(-1))
    logps.append(llama_cpp_logits(llama_cpp, path, ids.tolist()).log_softmax(-1))
    exact, ours, theirs = logps

    def kl(logp: Tensor, reference: Tensor) -> float:
        return F.kl_div(logp, reference, reduction="batchmean", log_target=True).item()

    assert kl(ours, exact) < 1e-5  # measured: 2e-6, and 1e-5
    assert kl(theirs, exact) < 5e-5
