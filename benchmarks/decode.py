"""Decode end to end, side by side with peers in one process: milliseconds a token, time to first token, compile time.

    python benchmarks/decode.py --shape benchmarks/configs/TinyLlama-1.1B.json --contexts 128 --capacities 512 8192 \
        --variants bf16 int8 --peers transformers llama_cpp --gpt_fast ../gpt-fast

Weights are random, made here in the shape of --shape. At batch 1 every step reads all weights and the live part of the
KV cache once, so the floor of a step is those bytes over the memory's bandwidth, which is measured in the same run.
All contestants stand in memory at once and take turns, --rounds times --steps decode steps each at the same context
length, and the median of a contestant's steps counts. Results are added to the --json file; render.py draws from it."""
import argparse
import gc
import importlib.util
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
import torch._inductor.config

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import generate
import model as our_model

VARIANTS = {  # name -> (quantize, kv_dtype, attention)
    "bf16": (None, None, "auto"), "math": (None, None, "math"), "flash": (None, None, "flash"),
    "flash-int8kv": (None, torch.int8, "flash"), "int8": ("int8", None, "auto"), "int4": ("int4", None, "auto")}

def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()

class Ours:
    def __init__(self, shape, variant, device, compiled):
        quantize, self.kv_dtype, self.attention = VARIANTS[variant]
        self.name = f"gpt-flash {variant}" + " compiled" * (compiled and device == "cpu")
        self.model = our_model.load_model(shape, device=device, quantize=quantize)
        self.compiled = compiled
        if compiled:
            generate.compile_model(self.model)

    def setup(self, batch, capacity):
        self.model.setup_caches(batch, capacity, self.kv_dtype, self.attention)
        self.decode = generate.DecodeStep(self.model, batch, {})
        return self.decode.prepare() if self.compiled else 0.0

    def prefill(self, tokens):
        last = torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
        self.model(tokens, torch.zeros(len(tokens), dtype=torch.int32, device=tokens.device), start=0, last=last)
        self.context = tokens.shape[1]

    def step(self):
        self.decode.input_pos.fill_(self.context)
        self.decode.graph.replay() if self.decode.graph else self.decode.advance()

    def bytes_read(self, batch, context):
        cache = self.model.cache
        return self.model.weight_bytes() + batch * context * cache.nbytes / (cache.max_batch_size * cache.max_seq_len)

class GptFast:
    """gpt-fast from a checkout, through its own functions; its eager mode on a CPU, where compiling is slower."""
    def __init__(self, path, config, device, compiled, int8=False):
        modules, ours = {}, dict(sys.modules)
        for name in ("model", "tokenizer", "quantize", "generate"):  # ours have the same names: theirs get a prefix
            spec = importlib.util.spec_from_file_location(f"gpt_fast_{name}", path / f"{name}.py")
            modules[name] = sys.modules[name] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[name])
        sys.modules.update({name: ours[name] for name in modules if name in ours})
        self.generate, self.theirs, quantize = modules["generate"], modules["model"], modules["quantize"]
        self.name = "gpt-fast" + " int8" * int8 + " compiled" * (compiled and device == "cpu")
        args = self.theirs.ModelArgs(
            block_size=config.max_seq_len, vocab_size=config.vocab_size, n_layer=config.n_layer, n_head=config.n_head,
            dim=config.dim, intermediate_size=config.ffn_dim, n_local_heads=config.n_kv_head,
            rope_base=config.rope_theta)
        with torch.device("meta"):
            self.model = self.theirs.Transformer(args)
            if int8:
                quantize.replace_linear_weight_only_int8_per_channel(self.model)
        self.model.to_empty(device=device).eval()
        for tensor in [*self.model.parameters(), *self.model.buffers()]:  # all but int8 weights are bf16, scales too
            floating = tensor.is_floating_point()
            tensor.data = (tensor.data.bfloat16().normal_(std=0.02) if floating else tensor.data.random_(-127, 128))
        self.device, self.compiled, self.decode = device, compiled, self.generate.decode_one_token
        if compiled:
            self.decode = torch.compile(self.decode, mode="reduce-overhead", fullgraph=True)

    def setup(self, batch, capacity):
        self.model.max_seq_length = self.model.max_batch_size = -1
        with torch.device(self.device):
            self.model.setup_caches(batch, capacity)
        self.token = torch.zeros(batch, 1, dtype=torch.int32, device=self.device)
        self.context, start = 8, time.perf_counter()
        if self.compiled:
            for _ in range(3):
                self.step()
            synchronize()
        return time.perf_counter() - start if self.compiled else 0.0

    def prefill(self, tokens):
        input_pos = torch.arange(tokens.shape[1], device=self.device)
        self.generate.prefill(self.model, tokens, input_pos, temperature=1.0, top_k=1)
        self.context = tokens.shape[1]

    def step(self):
        pos = torch.full((1,), self.context, dtype=torch.int64, device=self.device)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            self.decode(self.model, self.token, pos, temperature=1.0, top_k=1)

class Transformers:
    """transformers: a static cache and a compiled forward on CUDA, a dynamic cache on a CPU, its faster mode there."""
    def __init__(self, hf, device, compiled):
        import transformers
        self.transformers, self.device, self.compiled = transformers, device, compiled and device != "cpu"
        self.name = "transformers"
        config = transformers.AutoConfig.for_model(**hf)
        with torch.device(device):
            torch.set_default_dtype(torch.bfloat16)
            self.model = transformers.AutoModelForCausalLM.from_config(config).eval()
            torch.set_default_dtype(torch.float32)
        self.forward = self.model.forward
        if self.compiled:
            self.forward = torch.compile(self.model.forward, mode="reduce-overhead", fullgraph=True)

    def setup(self, batch, capacity):
        self.capacity, self.token = capacity, torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        if not self.compiled:
            return 0.0
        start = time.perf_counter()
        self.prefill(self.token.expand(-1, 8))
        for _ in range(3):
            self.step()
        synchronize()
        return time.perf_counter() - start

    def prefill(self, tokens):
        config, n = self.model.config, tokens.shape[1]
        self.cache = (self.transformers.StaticCache(config=config, max_cache_len=self.capacity) if self.compiled
                      else self.transformers.DynamicCache(config=config))
        self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.position = torch.full((1, 1), n, device=self.device)

    def step(self):
        self.forward(self.token, past_key_values=self.cache, use_cache=True, position_ids=self.position)[0].argmax(-1)
        if not self.compiled:
            self.cache.crop(-1)

class LlamaCpp:
    """llama.cpp through llama-cpp-python, on a GGUF file of random weights written here."""
    def __init__(self, config, kind, threads):
        import gguf
        self.name, self.threads, self.llm = f"llama.cpp {kind}", threads, None
        self.folder = tempfile.TemporaryDirectory()
        writer = gguf.GGUFWriter(f"{self.folder.name}/m.gguf", "llama")
        writer.add_block_count(config.n_layer), writer.add_context_length(config.max_seq_len)
        writer.add_embedding_length(config.dim), writer.add_feed_forward_length(config.ffn_dim)
        writer.add_head_count(config.n_head), writer.add_head_count_kv(config.n_kv_head)
        writer.add_layer_norm_rms_eps(config.norm_eps), writer.add_rope_freq_base(config.rope_theta)
        writer.add_vocab_size(config.vocab_size), writer.add_tokenizer_model("llama")
        writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
        writer.add_token_scores([0.0] * config.vocab_size)
        writer.add_token_types([2, 3, 3] + [1] * (config.vocab_size - 3))
        quantization = gguf.GGMLQuantizationType[kind]
        dim, q, kv = config.dim, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        block = {"attn_q": (q, dim), "attn_k": (kv, dim), "attn_v": (kv, dim), "attn_output": (dim, q),
                 "ffn_gate": (config.ffn_dim, dim), "ffn_up": (config.ffn_dim, dim), "ffn_down": (dim, config.ffn_dim)}
        shapes = {"token_embd": (config.vocab_size, config.dim), "output": (config.vocab_size, config.dim),
                  **{f"blk.{i}.{name}": shape for i in range(config.n_layer) for name, shape in block.items()}}
        made = {}  # one random tensor a shape: the values do not matter to the time, the bytes do
        for name, shape in shapes.items():
            if shape not in made:
                made[shape] = gguf.quantize((torch.randn(shape) * 0.02).numpy(), quantization)
            writer.add_tensor(f"{name}.weight", made[shape], raw_dtype=quantization)
        norms = [f"blk.{i}.{name}" for i in range(config.n_layer) for name in ("attn_norm", "ffn_norm")]
        for name in ["output_norm", *norms]:
            writer.add_tensor(f"{name}.weight", torch.ones(dim).numpy())
        writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
        writer.close()

    def setup(self, batch, capacity):
        import llama_cpp
        if batch != 1:
            raise ValueError("llama.cpp takes part at batch 1 only")
        self.llm = None
        self.llm = llama_cpp.Llama(f"{self.folder.name}/m.gguf", n_ctx=capacity, n_threads=self.threads,
                                   n_threads_batch=self.threads, verbose=False)
        return 0.0

    def prefill(self, tokens):
        self.llm.reset()
        self.llm.eval(tokens[0].clamp(min=3).tolist())
        self.context = tokens.shape[1]

    def step(self):
        self.llm.n_tokens = self.context  # eval drops what lies behind
        self.llm.eval([5])

def timed(f):
    synchronize()
    start = time.perf_counter()
    f()
    synchronize()
    return time.perf_counter() - start

@torch.no_grad()
def measure(contestants, args, batch, context, capacity, vocab_size):
    """-> one row a contestant. Setup and prefill first, then the rounds of decode steps, in turns."""
    tokens = torch.randint(3, vocab_size, (batch, context), device=args.device)
    rows = {c.name: dict(contestant=c.name, batch=batch, context=context, capacity=capacity) for c in contestants}
    for c in contestants:
        rows[c.name]["compile_s"] = c.setup(batch, capacity)
    for _ in range(args.prefills):  # the last one counts
        for c in contestants:
            rows[c.name]["first_token_s"] = timed(lambda: c.prefill(tokens))
    steps = {c.name: [] for c in contestants}
    for round in range(args.rounds + 1):
        for c in contestants:
            times = [timed(c.step) for _ in range(args.steps)]
            if round:  # the first warms up
                steps[c.name] += times[1:]
    for c in contestants:
        ms = sorted(1e3 * s for s in steps[c.name])
        rows[c.name] |= dict(ms=statistics.median(ms), ms_p10=ms[len(ms) // 10], ms_p90=ms[-1 - len(ms) // 10],
                             tokens_per_s=batch * 1e3 / statistics.median(ms))
        if isinstance(c, Ours):
            rows[c.name]["bytes_read"] = c.bytes_read(batch, context)
        row = rows[c.name]
        print(f"{c.name:24} batch {batch} context {context:6} capacity {capacity:6}: {row['ms']:8.2f} ms a step "
              f"({row['ms_p10']:.2f} to {row['ms_p90']:.2f}), first token {row['first_token_s']:.2f} s, "
              f"compile {row['compile_s']:.1f} s", file=sys.stderr, flush=True)
    return list(rows.values())

def device_facts(device):
    """What a reader needs to know about the machine."""
    facts = dict(date=str(date.today()), torch=torch.__version__, python=platform.python_version())
    if device == "cpu":
        info = Path("/proc/cpuinfo")
        name = next((line.split(":")[1].strip() for line in (info.read_text() if info.exists() else "").splitlines()
                     if line.startswith("model name")), platform.processor())
        return facts | dict(device=f"{name}, {torch.get_num_threads()} threads")
    import triton
    return facts | dict(device=torch.cuda.get_device_name(), triton=triton.__version__, cuda=torch.version.cuda)

def contestants_of(args, config, hf):
    """The contestants that --variants and --peers ask for; those that cannot be had are named and left out."""
    made = [Ours(args.shape, v, args.device, compiled) for v in args.variants
            for compiled in ([True] if args.device != "cpu" else [False, True] if args.compile else [False])]
    gpu = args.device != "cpu"
    for peer in ["gpt-fast"] * bool(args.gpt_fast) + args.peers:
        try:
            if peer == "gpt-fast":
                made += [GptFast(args.gpt_fast, config, args.device, gpu, int8) for int8 in (False, True)
                         if ("int8" in args.variants if int8 else True)]
                made += [GptFast(args.gpt_fast, config, args.device, True)] * (args.compile and not gpu)
            elif peer == "transformers":
                made.append(Transformers(hf, args.device, gpu))
            else:
                kinds = {"int8": "Q8_0", "int4": "Q4_0"}
                made += [LlamaCpp(config, kind, torch.get_num_threads()) for kind in
                         dict.fromkeys(kinds.get(v, "BF16") for v in args.variants)]
        except ImportError as e:
            print(f"{peer} is left out: {e}", file=sys.stderr)
    return made

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--shape", type=Path, default=HERE / "configs" / "TinyLlama-1.1B.json", help="a config.json")
    p.add_argument("--contexts", type=int, nargs="+", default=[128], help="live tokens before each step")
    p.add_argument("--capacities", type=int, nargs="+", default=[512], help="room in the cache, in turn")
    p.add_argument("--batches", type=int, nargs="+", default=[1])
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=["bf16"], help="ours")
    p.add_argument("--peers", nargs="*", choices=["transformers", "llama_cpp"], default=[])
    p.add_argument("--gpt_fast", metavar="PATH", type=Path, help="a checkout of gpt-fast, a peer driven from there")
    p.add_argument("--compile", action="store_true", help="on a CPU, compiled contestants too; on CUDA all are")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--prefills", type=int, default=2, help="prompts read before decoding; the last one's time counts")
    p.add_argument("--steps", type=int, default=8, help="decode steps a round; the first does not count")
    p.add_argument("--json", metavar="FILE", type=Path, help="add the result to this file")
    args = p.parse_args()
    if args.gpt_fast and not (args.gpt_fast / "model.py").exists():
        p.error(f"--gpt_fast {args.gpt_fast} is not a checkout of gpt-fast")
    torch.set_num_threads(args.threads)
    torch._inductor.config.force_disable_caches = True  # compile times are those of a first run
    hf = our_model.read_json(args.shape)
    config, rows = our_model.ModelConfig.from_hf(hf), []
    contestants = contestants_of(args, config, hf)
    gc.collect()
    for batch in args.batches:
        for capacity in args.capacities:
            for context in (c for c in args.contexts if c < capacity):
                taking_part = [c for c in contestants if batch == 1 or not isinstance(c, LlamaCpp)]
                rows += measure(taking_part, args, batch, context, capacity, config.vocab_size)
    bandwidth = generate.copy_bandwidth(args.device, 2**28 if args.device == "cpu" else 2**30)
    result = device_facts(args.device) | dict(command=shlex.join(["python", "benchmarks/decode.py", *sys.argv[1:]]),
                                              shape=args.shape.stem, copy_gb_s=bandwidth / 1e9, rows=rows)
    if args.json:
        runs = json.loads(args.json.read_text()) if args.json.exists() else []
        args.json.write_text(json.dumps(runs + [result], indent=1) + "\n")
    print(json.dumps(result))

if __name__ == "__main__":
    main()
