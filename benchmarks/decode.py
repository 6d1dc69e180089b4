"""Decode end to end, beside peers in one process: milliseconds a token, first token, compile time.

    python benchmarks/decode.py --shape benchmarks/configs/TinyLlama-1.1B.json --contexts 128 \\
        --capacities 512 8192 --variants bf16 int8 --peers transformers llama_cpp \\
        --gpt_fast ../gpt-fast

Weights are random, made here in the shape of --shape; of a GGUF file there they are its own, which
llama.cpp then reads too. At batch 1 every step reads all weights and
the live part of the KV cache once, so the floor of a step is those bytes over the memory's
bandwidth, which is measured in the same run. All contestants stand in memory at once and take
turns, --rounds times --steps decode steps each at the same context length, and the median of a
contestant's steps counts. Results are added to the --json file as they come; render.py draws from
it."""
from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch._inductor.config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import gguf
except ImportError:  # it is wanted for llama.cpp only
    gguf = None

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from cli.arguments import Parser, number
from cli.stats import bytes_read, copy_bandwidth, weight_bytes
from generate import Decoder, prepare_steps, say
from kernels import triton
from model import ModelConfig, first_line, load_model, open_checkpoint

DTYPES = ("bfloat16", "float16", "float32")

# --- measuring ---


class Case(NamedTuple):
    """Rows decoded at once, tokens cached in each, and the cache's room."""

    batch: int
    context: int
    capacity: int


class Contestant:
    """What takes part. The steps of all contestants do the same work."""

    name = ""
    single_row = False  # takes part at batch 1 only

    def setup(self, batch: int, capacity: int) -> float:
        """Make a cache -> the seconds that compiling took."""
        raise NotImplementedError

    def prefill(self, tokens: Tensor) -> None:
        """Read a prompt, tokens [B, T], from the beginning of the cache."""
        raise NotImplementedError

    def step(self) -> None:
        """Decode one token a row behind the prompt, always at the same position."""
        raise NotImplementedError

    def bytes_read(self, case: Case) -> float | None:
        """Bytes that a step reads at least; None: not known."""
        return None


@torch.no_grad()
def measure(
    contestants: list[Contestant], case: Case, args: argparse.Namespace, vocab_size: int
) -> list[dict]:
    """-> one row a contestant. Setup and prefill first, then rounds of decode steps, in turns."""
    say(f"batch {case.batch}, context {case.context}, capacity {case.capacity}:")
    shape = (case.batch, case.context)
    tokens = torch.randint(3, vocab_size, shape, device=args.device)  # (B, T)
    rows = {c.name: {"contestant": c.name, **case._asdict()} for c in contestants}

    def set_up(c: Contestant) -> None:
        rows[c.name]["compile_s"] = c.setup(case.batch, case.capacity)
        say(f"  {c.name} is ready, after {rows[c.name]['compile_s']:.1f} s of compiling")

    def read(c: Contestant) -> None:
        rows[c.name]["first_token_s"] = timed(partial(c.prefill, tokens))
        say(f"  {c.name} has read the prompts in {rows[c.name]['first_token_s']:.2f} s")

    # the last time that the prompt is read counts; a first round of steps warms up
    for work in [set_up, *[read] * args.prefills, lambda c: time_steps(c, args.steps)]:
        contestants = those_that_can(work, contestants)
    steps = {c.name: [] for c in contestants}
    for _ in range(args.rounds):
        for c in contestants:
            steps[c.name] += time_steps(c, args.steps)

    for c in contestants:
        row = rows[c.name]
        row.update(summarize(steps[c.name], case.batch))
        nbytes = c.bytes_read(case)
        if nbytes is not None:
            row["bytes_read"] = nbytes
        tell(row)
    return [rows[c.name] for c in contestants]


def those_that_can(work: Callable[[Contestant], Any], all_: list[Contestant]) -> list[Contestant]:
    """Let all of them work -> those that did not fail. The last one's fault is raised, and so is
    one of the device, behind which it can do nothing more."""
    able = []
    for i, contestant in enumerate(all_):
        try:
            work(contestant)
            able.append(contestant)
        except Exception as e:
            if isinstance(e, torch.AcceleratorError) or not able and i == len(all_) - 1:
                raise
            say(f"  {contestant.name} is left out: {first_line(e)}")
    return able


def time_steps(contestant: Contestant, n: int) -> list[float]:
    """Seconds of n steps but the first, which finds other contestants' data in the caches."""
    seconds = [timed(contestant.step) for _ in range(n)]
    return seconds[1:]


def timed(work: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summarize(seconds: list[float], batch: int) -> dict[str, float]:
    ms = sorted(1e3 * s for s in seconds)
    tenth = len(ms) // 10
    median = statistics.median(ms)
    return {
        "ms": median,
        "ms_p10": ms[tenth],
        "ms_p90": ms[-1 - tenth],
        "tokens_per_s": batch * 1e3 / median,
    }


def tell(row: dict) -> None:
    say(
        f"{row['contestant']:24} batch {row['batch']} context {row['context']:6} "
        f"capacity {row['capacity']:6}: {row['ms']:8.2f} ms a step "
        f"({row['ms_p10']:.2f} to {row['ms_p90']:.2f}), "
        f"first token {row['first_token_s']:.2f} s, compile {row['compile_s']:.1f} s"
    )


# --- ours ---

class Variant(NamedTuple):
    quantize: str | None = None
    dtype: torch.dtype | None = torch.bfloat16  # of activations; None: as the file wants it
    kv_dtype: torch.dtype | None = None
    attention: str = "auto"


VARIANTS = {
    "auto": Variant(quantize="auto", dtype=None),
    "auto-bf16": Variant(quantize="auto"),
    "bf16": Variant(),
    "math": Variant(attention="math"),
    "flash": Variant(attention="flash"),
    "flash-int8kv": Variant(kv_dtype=torch.int8, attention="flash"),
    "int8": Variant(quantize="int8"),
    "int4": Variant(quantize="int4"),
}


class Ours(Contestant):
    def __init__(self, shape: Path, variant: str, device: str, compiled: bool):
        self.name = label(f"gpt-flash {variant}", device, compiled)
        self.variant = VARIANTS[variant]
        self.compiled = compiled
        say(f"{self.name}: making the weights")
        self.model = load_model(
            shape, device=device, dtype=self.variant.dtype, quantize=self.variant.quantize
        )
        self.decoder: Decoder | None = None
        self.context = 0
        if compiled:
            prepare_steps(self.model, wanted=True)

    def setup(self, batch: int, capacity: int) -> float:
        self.decoder = None  # its graphs hold the cache before
        self.model.setup_caches(batch, capacity, self.variant.kv_dtype, self.variant.attention)
        self.decoder = Decoder(self.model, compiled=self.compiled)
        return self.decoder.prepare()

    def prefill(self, tokens: Tensor) -> None:
        B, T = tokens.shape
        input_pos = torch.zeros(B, dtype=torch.int32, device=tokens.device)
        last = torch.full((B,), T - 1, device=tokens.device)
        self.model.prefill(tokens, input_pos, cached=0, last=last)
        self.context = T

    def step(self) -> None:
        self.decoder.input_pos.fill_(self.context)
        self.decoder.step()

    def bytes_read(self, case: Case) -> float:
        of_cache = case.batch * bytes_read(self.model.cache, case.context)
        return weight_bytes(self.model, case.batch) + of_cache


def label(name: str, device: str, compiled: bool) -> str:
    """On a CPU it says which are compiled; on CUDA all are."""
    if compiled and device == "cpu":
        return f"{name} compiled"
    return name


# --- gpt-fast ---


GPT_FAST_MODULES = ("model", "tokenizer", "quantize", "generate")  # in the order they need another


def load_gpt_fast(path: Path) -> dict[str, ModuleType]:
    """gpt-fast's modules out of a checkout, without disturbing ours of the same names.

    While they are loaded they find each other by their own names. Afterwards those names are ours
    again, and theirs have a prefix, by which torch.compile finds them."""
    search_path = list(sys.path)
    ours = {name: sys.modules.pop(name, None) for name in GPT_FAST_MODULES}
    theirs = {}
    try:
        for name in GPT_FAST_MODULES:
            spec = importlib.util.spec_from_file_location(f"gpt_fast_{name}", path / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            theirs[name] = module
    finally:
        sys.path[:] = search_path
        for name, module in ours.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
    return theirs


class GptFast(Contestant):
    """gpt-fast from a checkout, through its own functions, with random weights."""

    def __init__(
        self, path: Path, config: ModelConfig, device: str, compiled: bool, int8: bool = False
    ):
        self.name = label("gpt-fast int8" if int8 else "gpt-fast", device, compiled)
        self.device = device
        self.compiled = compiled
        self.context = 8  # while compiling
        modules = load_gpt_fast(path)
        self.generate = modules["generate"]
        self.model = self.make_model(modules, config, int8)
        self.decode = self.generate.decode_one_token
        if compiled:
            self.decode = torch.compile(self.decode, mode="reduce-overhead", fullgraph=True)

    def make_model(
        self, modules: dict[str, ModuleType], config: ModelConfig, int8: bool
    ) -> torch.nn.Module:
        args = modules["model"].ModelArgs(
            block_size=config.max_seq_len,
            vocab_size=config.vocab_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            dim=config.dim,
            intermediate_size=config.ffn_dim,
            n_local_heads=config.n_kv_head,
            rope_base=rope_theta(config),
        )
        with torch.device("meta"):
            model = modules["model"].Transformer(args)
            if int8:
                modules["quantize"].replace_linear_weight_only_int8_per_channel(model)
        model.to_empty(device=self.device).eval()
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():  # all but int8 weights, whose scales are bf16 too
                tensor.data = tensor.data.bfloat16().normal_(std=0.02)
            else:
                tensor.data.random_(-127, 128)
        return model

    def setup(self, batch: int, capacity: int) -> float:
        self.model.max_seq_length = -1  # else a larger cache of before would stay
        self.model.max_batch_size = -1
        with torch.device(self.device):
            self.model.setup_caches(batch, capacity)
        self.token = torch.zeros(batch, 1, dtype=torch.int32, device=self.device)
        if not self.compiled:
            return 0.0
        return timed(partial(repeat, self.step, 3))

    def prefill(self, tokens: Tensor) -> None:
        input_pos = torch.arange(tokens.shape[1], device=self.device)
        self.generate.prefill(self.model, tokens, input_pos, temperature=1.0, top_k=1)
        self.context = tokens.shape[1]

    def step(self) -> None:
        input_pos = torch.full((1,), self.context, dtype=torch.int64, device=self.device)
        with sdpa_kernel(SDPBackend.MATH):
            self.decode(self.model, self.token, input_pos, temperature=1.0, top_k=1)


def rope_theta(config: ModelConfig) -> float:
    """Of the first layer, which in the shapes that peers run here is that of all."""
    return config.ropes[0].theta


def repeat(work: Callable[[], None], times: int) -> None:
    for _ in range(times):
        work()


# --- transformers ---

class Transformers(Contestant):
    """transformers: compiled with a static cache on CUDA; on a CPU, where that is slower, eager
    with a dynamic one."""

    name = "transformers"

    def __init__(self, hf: dict, device: str):
        self.library = importlib.import_module("transformers")
        self.device = device
        self.compiled = device != "cpu"
        config = self.library.AutoConfig.for_model(**hf)
        with torch.device(device):
            model = self.library.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self.model = model.eval()
        self.forward = self.model.forward
        if self.compiled:
            self.forward = torch.compile(self.forward, mode="reduce-overhead", fullgraph=True)

    def setup(self, batch: int, capacity: int) -> float:
        self.capacity = capacity
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        if not self.compiled:
            return 0.0
        prompt = self.token.expand(-1, 8)
        return timed(partial(self.prefill, prompt)) + timed(partial(repeat, self.step, 3))

    def prefill(self, tokens: Tensor) -> None:
        config = self.model.config
        if self.compiled:
            self.cache = self.library.StaticCache(config=config, max_cache_len=self.capacity)
        else:
            self.cache = self.library.DynamicCache(config=config)
        self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.position = torch.full((1, 1), tokens.shape[1], device=self.device)

    def step(self) -> None:
        out = self.forward(
            self.token, past_key_values=self.cache, use_cache=True, position_ids=self.position
        )
        out.logits.argmax(-1)
        if not self.compiled:
            self.cache.crop(-1)


# --- llama.cpp ---

class LlamaCpp(Contestant):
    """llama.cpp through llama-cpp-python, on a GGUF file, or on one of random weights of a kind
    that is written here."""

    single_row = True

    def __init__(self, file: Path | None, config: ModelConfig, kind: str, threads: int):
        self.name = f"llama.cpp {kind}"
        self.library = importlib.import_module("llama_cpp")
        self.threads = threads
        self.llm = None
        self.context = 0
        if file is None:
            self.folder = tempfile.TemporaryDirectory()
            file = Path(self.folder.name) / "model.gguf"
            write_gguf(file, config, gguf.GGMLQuantizationType[kind])
        self.file = str(file)

    def setup(self, batch: int, capacity: int) -> float:
        self.llm = None  # the old one goes before the new one comes
        self.llm = self.library.Llama(
            self.file, n_ctx=capacity, n_threads=self.threads, n_threads_batch=self.threads,
            verbose=False,
        )
        return 0.0

    def prefill(self, tokens: Tensor) -> None:
        self.llm.reset()
        self.llm.eval(tokens[0].tolist())
        self.context = tokens.shape[1]

    def step(self) -> None:
        self.llm.n_tokens = self.context  # eval drops what lies behind
        self.llm.eval([5])


def write_gguf(path: Path, config: ModelConfig, kind: gguf.GGMLQuantizationType) -> None:
    """A llama of that shape with random weights of that kind."""
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer, config)
    made: dict[tuple[int, int], np.ndarray] = {}  # one a shape: time depends on the bytes only
    for name, shape in gguf_shapes(config).items():
        if shape not in made:
            made[shape] = gguf.quantize((torch.randn(shape) * 0.02).numpy(), kind)
        writer.add_tensor(f"{name}.weight", made[shape], raw_dtype=kind)

    norms = ["output_norm"]
    for i in range(config.n_layer):
        norms += [f"blk.{i}.attn_norm", f"blk.{i}.ffn_norm"]
    for name in norms:
        writer.add_tensor(f"{name}.weight", torch.ones(config.dim).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_vocab_size(config.vocab_size)
    # a vocabulary of any pieces: <unk>, <s>, </s>, and the rest
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([2, 3, 3] + [1] * (config.vocab_size - 3))


def gguf_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """llama.cpp's names of the matrices, without .weight, and their shapes."""
    dim = config.dim
    q_size = config.n_head * config.head_dim
    kv_size = config.n_kv_head * config.head_dim
    block = {
        "attn_q": (q_size, dim),
        "attn_k": (kv_size, dim),
        "attn_v": (kv_size, dim),
        "attn_output": (dim, q_size),
        "ffn_gate": (config.ffn_dim, dim),
        "ffn_up": (config.ffn_dim, dim),
        "ffn_down": (dim, config.ffn_dim),
    }
    shapes = {"token_embd": (config.vocab_size, dim), "output": (config.vocab_size, dim)}
    for i in range(config.n_layer):
        for name, shape in block.items():
            shapes[f"blk.{i}.{name}"] = shape
    return shapes


LLAMA_CPP_KINDS = {"int8": "Q8_0", "int4": "Q4_0"}  # beside those variants; beside others BF16


# --- the command line ---

def make_contestants(
    args: argparse.Namespace, config: ModelConfig, hf: dict
) -> list[Contestant]:
    """Those that --variants and --peers ask for; a peer that cannot be had is left out."""
    made = []
    for variant in args.variants:
        for compiled in compiled_or_not(args):
            made.append(Ours(args.shape, variant, args.device, compiled))
    makers = {
        "gpt-fast": partial(make_gpt_fast, args, config),
        "transformers": partial(make_transformers, args, hf),
        "llama_cpp": partial(make_llama_cpp, args, config),
    }
    peers = list(args.peers)
    if args.gpt_fast:
        peers.insert(0, "gpt-fast")
    for peer in peers:
        try:
            made += makers[peer]()
        except ImportError as e:
            say(f"{peer} is left out: {e}")
    return made


def compiled_or_not(args: argparse.Namespace) -> list[bool]:
    if args.device != "cpu":
        return [True]
    return [False, True] if args.compile else [False]


def make_gpt_fast(args: argparse.Namespace, config: ModelConfig) -> list[Contestant]:
    cuda = args.device != "cpu"
    made = [GptFast(args.gpt_fast, config, args.device, cuda)]
    if "int8" in args.variants:
        made.append(GptFast(args.gpt_fast, config, args.device, cuda, int8=True))
    if args.compile and not cuda:
        made.append(GptFast(args.gpt_fast, config, args.device, compiled=True))
    return made


def make_transformers(args: argparse.Namespace, hf: dict) -> list[Contestant]:
    return [Transformers(hf, args.device)]


def make_llama_cpp(args: argparse.Namespace, config: ModelConfig) -> list[Contestant]:
    importlib.import_module("gguf")
    if args.shape.suffix == ".gguf":
        return [LlamaCpp(args.shape, config, args.shape.stem, args.threads)]
    kinds = dict.fromkeys(LLAMA_CPP_KINDS.get(variant, "BF16") for variant in args.variants)
    return [LlamaCpp(None, config, kind, args.threads) for kind in kinds]


def device_facts(device: str) -> dict[str, str]:
    """What a reader needs to know of the machine."""
    facts = {
        "date": str(date.today()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device == "cpu":
        facts["device"] = f"{cpu_name()}, {torch.get_num_threads()} threads"
    else:
        facts["device"] = torch.cuda.get_device_name(device)
        facts["triton"] = triton.__version__
        facts["cuda"] = torch.version.cuda
    return facts


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def parse_args() -> argparse.Namespace:
    p = Parser("decode.py", description=__doc__.splitlines()[0])
    add = p.add_argument
    count = number(int, 1)
    add("--shape", type=Path, default=HERE / "configs" / "TinyLlama-1.1B.json",
        help="a config.json or a GGUF file; default: TinyLlama-1.1B's config.json")
    add("--contexts", metavar="N", type=count, nargs="+", default=[128],
        help="live tokens before each step, from 1; default: 128")
    add("--capacities", metavar="N", type=count, nargs="+", default=[512],
        help="room in the cache, in turn; contexts that do not fit are left out; default: 512")
    add("--batches", metavar="N", type=count, nargs="+", default=[1],
        help="rows at once, in turn, from 1; default: 1")
    add("--variants", nargs="+", choices=VARIANTS, default=["bf16"],
        help="ours; auto: a GGUF file's weights as they are; default: bf16")
    add("--peers", nargs="*", choices=["transformers", "llama_cpp"], default=[],
        help="others beside ours; default: none")
    add("--gpt_fast", metavar="PATH", type=Path, help="a checkout of gpt-fast, a further peer")
    add("--compile", action="store_true",
        help="on a CPU: compiled contestants too; on CUDA all are")
    add_machine(p)
    add("--rounds", metavar="N", type=count, default=5,
        help="turns of each contestant, from 1; default: 5")
    add("--prefills", metavar="N", type=count, default=2,
        help="prompts read before decoding, from 1; the last one's time counts; default: 2")
    add("--steps", metavar="N", type=number(int, 2), default=8,
        help="decode steps a turn, from 2; the first does not count; default: 8")
    add("--json", metavar="FILE", type=Path, help="add the result to this file")
    args = p.parse_args()
    if args.gpt_fast and not all((args.gpt_fast / f"{m}.py").exists() for m in GPT_FAST_MODULES):
        p.error(f"--gpt_fast {args.gpt_fast} is not a checkout of gpt-fast")
    if min(args.contexts) >= max(args.capacities):
        p.error("every one of --contexts is too long for each of --capacities")
    return args


def add_machine(parser: argparse.ArgumentParser) -> None:
    """The flags that say where a benchmark runs."""
    parser.add_argument(
        "--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, ...; default: cuda")
    parser.add_argument(
        "--threads", metavar="N", type=number(int, 1), default=torch.get_num_threads(),
        help="of a CPU, from 1; default: PyTorch's, %(default)s here")


def device(name: str) -> str:
    """An argparse type: a device that is there."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise argparse.ArgumentTypeError(f"{name}: {first_line(e)}") from None
    return name


def earlier_runs(path: Path | None) -> list[dict]:
    """What is in the --json file; ValueError if it could not be added to."""
    if path is None or not path.exists():
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"--json {path}: there is no folder {path.parent}")
        return []
    try:
        runs = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"cannot read --json {path}: {first_line(e)}") from None
    if not isinstance(runs, list):
        raise ValueError(f"--json {path} does not hold results of this program")
    return runs


def run(args: argparse.Namespace) -> None:
    runs = earlier_runs(args.json)
    torch.set_num_threads(args.threads)
    torch._inductor.config.force_disable_caches = True  # compile times are those of a first run
    hf = open_checkpoint(args.shape).config
    config = ModelConfig.from_hf(hf)
    if max(args.contexts) >= config.max_seq_len:
        longest = max(args.contexts)
        raise ValueError(f"--contexts {longest} exceeds the shape's {config.max_seq_len} tokens")
    contestants = make_contestants(args, config, hf)
    gc.collect()

    nbytes = 2**28 if args.device == "cpu" else 2**30
    bandwidth = copy_bandwidth(torch.device(args.device), nbytes)
    result = device_facts(args.device)
    result["command"] = shlex.join(["python", "benchmarks/decode.py", *sys.argv[1:]])
    result["shape"] = args.shape.stem
    result["copy_gb_s"] = bandwidth / 1e9
    result["rows"] = rows = []
    for batch in args.batches:
        taking_part = [c for c in contestants if batch == 1 or not c.single_row]
        for capacity in args.capacities:
            for context in args.contexts:
                if context < capacity:
                    case = Case(batch, context, capacity)
                    rows += measure(taking_part, case, args, config.vocab_size)
                    if args.json:
                        args.json.write_text(json.dumps([*runs, result], indent=1) + "\n")

    print(json.dumps(result))


def main() -> None:
    args = parse_args()
    try:
        run(args)
    except (ValueError, torch.OutOfMemoryError) as e:
        say(f"decode.py: error: {first_line(e)}")
        sys.exit(2)


if __name__ == "__main__":
    main()
