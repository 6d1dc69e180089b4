"""Minutes of random trouble: requests and cancels, corrupted files, kills, full disks, and files of
the user where others are to go.

    python checks/soak.py --minutes 10

Each case ends in the right text or in one sentence; no process hangs or crashes, no file is left
behind, no memory grows. Exit code 1, and the cases by number, where one does not: the same --seed
and --only NUMBER run one again. Files are corrupted a few bytes at a time, or one value of a JSON
file, so that most of each is as a loader expects it."""
import argparse
import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gguf
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import cli.program  # once: the runs are forked from here, so that starting takes no time
import generate as program
from batching import Engine
from checks.common import CHATML, byte_level_tokenizer, hf_folder
from checks.hostile import hostile_gguf, hostile_tokenizers
from cli.errors import become_a_program, sentences
from formats.tokenizer import sentencepiece_bpe
from generate import Request, generate
from model import load_model

LIMIT_S = 60  # that a run may take; most take a tenth of a second
MEMORY = 8 * 2**30  # addresses that a run may have
SENT = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
NASTY = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**40, 1.5, 1e308, float("nan"), float("inf"), "", "x",
    "\ud800", "\0", [], [[]], [None], ["x"], [0] * 1000, {}, {"x": {}},
]


class Soak:
    """The checkpoints that are spoiled, and how each kind of case goes: None, or what is wrong."""

    def __init__(self, folder: Path, draw: random.Random):
        self.folder = folder
        self.draw = draw
        self.plain = "--device cpu --prompt hello --max_new_tokens 3".split()
        self.base = [*self.plain, "--dtype", "float32"]
        self.checkpoints = make_checkpoints(folder / "checkpoints")
        self.model = load_model(self.checkpoints["safetensors"], dtype=torch.float32)
        self.model.setup_caches(3, 64)
        self.reference = load_model(self.checkpoints["safetensors"], dtype=torch.float32)
        self.engine = Engine(self.model)
        self.kinds: dict[str, Callable[[], str | None]] = {
            "requests": self.requests,
            "kills": self.kill,
            "full disk": self.full_disk,
            "in the way": self.in_the_way,
        }
        self.kinds |= {"hostile gguf": self.hostile_gguf, "hostile json": self.hostile_json}
        for name in self.checkpoints:
            self.kinds[f"corrupted {name}"] = self.corrupt

    # --- requests ---

    def requests(self) -> str | None:
        """Random requests, given up now and then, are answered as each is alone."""
        requests = [self.request() for _ in range(self.draw.randint(1, 6))]
        most = self.draw.choice([None, self.draw.randint(1, 40)])
        texts = [[] for _ in requests]
        news = self.engine.run(requests)
        for count, (number, ids) in enumerate(news, start=1):
            texts[number] += ids
            if count == most:
                news.close()
                break
        for request, text in zip(requests, texts):
            alone, = generate(
                self.reference, [request.prompt], request.max_new_tokens,
                temperature=request.temperature, top_k=request.top_k, top_p=request.top_p,
                seed=request.seed,
            )
            if text != (alone if most is None else alone[:len(text)]):
                return f"{request} gave {text}, alone {alone}"
        return None

    def request(self) -> Request:
        draw = self.draw
        prompt = [draw.randrange(600) for _ in range(draw.choice([1, 2, 7, 30, 60]))]
        return Request(
            prompt, draw.randint(1, 30), draw.choice([0, 0, 0.7, 2.0]),
            top_k=draw.choice([None, 1, 40]), top_p=draw.choice([None, 0.5, 0.99]),
            seed=draw.randrange(2**40),
        )

    # --- files ---

    def corrupt(self, name: str) -> str | None:
        """One file of a checkpoint is spoiled: the model answers, or a sentence says why not."""
        checkpoint = self.checkpoints[name]
        spoiled = self.folder / "spoiled" / checkpoint.name
        shutil.rmtree(spoiled.parent, ignore_errors=True)
        if checkpoint.is_dir():
            shutil.copytree(checkpoint, spoiled)
            file = self.draw.choice(sorted(spoiled.iterdir()))
        else:
            spoiled.parent.mkdir()
            file = Path(shutil.copy(checkpoint, spoiled))
        content = file.read_bytes()
        if file.suffix == ".json" and self.draw.random() < 0.7:
            content = spoil_json(content, self.draw)
        else:
            content = spoil_bytes(content, self.draw)
        file.write_bytes(content)
        flags = self.draw.choice([self.plain, self.base])  # which take two ways of loading
        code, err = self.run(["--checkpoint_path", spoiled, *flags])
        return problem_of(code, err, {0, 2})

    def hostile_gguf(self) -> str | None:
        """A file that claims what cannot be: a sentence, with little memory."""
        file = self.folder / "hostile.gguf"
        name, content = self.draw.choice(list(hostile_gguf().items()))
        file.write_bytes(content)
        code, err = self.run(["--checkpoint_path", file, *self.plain])
        found = problem_of(code, err, {2})
        return found and f"{name}: {found}"

    def hostile_json(self) -> str | None:
        """A tokenizer that fails while it is read or used: a sentence, at the latest."""
        folder = self.folder / "hostile"
        shutil.copytree(self.checkpoints["safetensors"], folder, dirs_exist_ok=True)
        file = folder / "tokenizer.json"
        name, content = self.draw.choice(list(hostile_tokenizers(file.read_text()).items()))
        file.write_bytes(content)
        code, err = self.run(["--checkpoint_path", folder, *self.plain])
        found = problem_of(code, err, {0, 2})
        return found and f"{name}: {found}"

    def full_disk(self) -> str | None:
        """A file ends at some size, or stdout takes nothing: one sentence, and nothing is left."""
        target = self.folder / "written"
        flags = ["--checkpoint_path", self.checkpoints["safetensors"], *self.base]
        write = self.draw.choice([
            ["--json"], ["--prompts", self.prompts(), "--output", target],
            ["--profile", target], ["--quantize", "int8", "--save", target],
        ])
        if write[0] in ("--prompts", "--quantize"):
            at = flags.index("--prompt")
            del flags[at:at + 2]
        limit = self.draw.randrange(200_000)
        if write == ["--json"]:
            code, err = self.run([*flags, *write], out="/dev/full")
        else:
            code, err = self.run([*flags, *write], most_bytes=limit)
        found = problem_of(code, err, {0, 2}) or self.leftovers()
        if found is None and target.is_dir() and code != 0:
            found = "a folder that is half-written"
        return found

    def kill(self) -> str | None:
        """A signal at a random moment of saving or of a file of prompts: nothing is left but whole
        answers, and the same command goes on."""
        target = self.folder / "written"
        save = ["--quantize", "int8", "--save", target]
        answer = ["--prompts", self.prompts(), "--output", target]
        flags = ["--device", "cpu", "--checkpoint_path", self.checkpoints["safetensors"]]
        flags += self.draw.choice([save, answer])
        sent = self.draw.choice([*sorted(SENT), signal.SIGKILL])
        code, err = self.run(flags, sent=sent, after=self.draw.uniform(0, 0.4))
        found = problem_of(code, err, {0, 128 + sent, -sent})
        if found is None and sent != signal.SIGKILL:
            found = self.leftovers()
        if found is None and not target.is_dir():
            for left in self.folder.glob(".gpt-flash-*"):
                os.utime(left, (0, 0))  # what is a second old is left alone
            code, err = self.run(flags)
            found = problem_of(code, err, {0}) or self.leftovers()
        return found

    def in_the_way(self) -> str | None:
        """Something of the user's lies where a file or folder is to go: it stays as it is wherever
        a run is refused, and a link stays a link."""
        target, theirs = self.folder / "written", self.folder / "theirs"
        self.draw.choice([
            lambda: target.write_text('{"index": 0, "sample": 0, "text": "theirs"}'),
            lambda: target.write_text('{"index": 0, "sample": 0, "te'),
            target.touch, target.mkdir, partial(os.mkfifo, target),
            partial(target.symlink_to, theirs),
            lambda: (theirs.write_text("theirs"), target.symlink_to(theirs)),
            lambda: (theirs.mkdir(), target.symlink_to(theirs)),
            lambda: (target.mkdir(), (target / "theirs").touch()),
        ])()
        before = [snapshot(target), snapshot(theirs)]
        flags = ["--checkpoint_path", self.checkpoints["safetensors"], "--device", "cpu"]
        flags += self.draw.choice([
            ["--prompts", self.prompts(), "--output", target],
            ["--prompts", self.prompts(), "--output", target, "--max_seq_len", 10**6],
            ["--prompts", target, "--output", target], ["--prompt", 5, "--profile", target],
            ["--quantize", "int8", "--save", self.draw.choice([target, target / "x"])],
        ])
        code, err = self.run(flags)
        found = problem_of(code, err, {0, 2}) or self.leftovers()
        if found is None and code == 2 and [snapshot(target), snapshot(theirs)] != before:
            found = f"changed what was there: {before}"
        if found is None and (before[0][0] == "link") != target.is_symlink():
            found = "a link has gone"
        return found

    def prompts(self) -> Path:
        file = self.folder / "prompts.txt"
        file.write_text("one\ntwo words\nthree\n" * 4)
        return file

    def leftovers(self) -> str | None:
        left = [path.name for path in self.folder.glob(".*")]
        return f"left behind: {left}" if left else None

    # --- runs ---

    def run(
        self, flags: list[object], out: str = os.devnull, most_bytes: int | None = None,
        sent: signal.Signals | None = None, after: float = 0.0,
    ) -> tuple[int | None, str]:
        """generate.py with these flags -> exit code, negative for a signal and None for a hang,
        and stderr."""
        log = self.folder / "stderr"
        signal.pthread_sigmask(signal.SIG_BLOCK, SENT)  # until the program has begun
        process = os.fork()
        if process == 0:
            become_a_run([str(flag) for flag in flags], out, log, most_bytes)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SENT)
        began = time.monotonic()
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
            passed = time.monotonic() - began
            if sent is not None and passed > after:
                os.kill(process, sent)
                sent = None
            if passed > LIMIT_S:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                return None, log.read_text(errors="replace")
            time.sleep(0.002)

    def case(self, kind: str) -> str | None:
        """One case of a kind -> what is wrong."""
        for name in ("written", "theirs"):
            if (self.folder / name).is_dir() and not (self.folder / name).is_symlink():
                shutil.rmtree(self.folder / name)
            (self.folder / name).unlink(missing_ok=True)
        if kind.startswith("corrupted "):
            return self.corrupt(kind.removeprefix("corrupted "))
        return self.kinds[kind]()


def become_a_run(flags: list[str], out: str, log: Path, most_bytes: int | None) -> None:
    """This process is generate.py from here on."""
    code = 1
    tqdm.set_lock(threading.RLock())  # its own is shared by forks: one killed with it stops all
    try:
        for number, path in ((1, out), (2, log)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", 1, encoding="utf-8", errors="replace", closefd=False)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        if most_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error and not a signal
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        with sentences():
            become_a_program()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SENT)
            program.main(flags)
        code = 0
    except SystemExit as e:
        code = e.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    finally:
        os._exit(code)


def snapshot(path: Path) -> tuple[str, object]:
    """What is at a path: its kind, and what it holds."""
    if path.is_symlink():
        return "link", os.readlink(path)
    if path.is_dir():
        return "folder", sorted(os.listdir(path))
    return ("file", path.read_bytes()) if path.is_file() else ("other", path.exists())


def problem_of(code: int | None, err: str, allowed: set[int]) -> str | None:
    """What is wrong with how a run ended."""
    lines = err.strip().splitlines() or [""]
    if code is None:
        return f"hangs: {lines[-1]}"
    if code not in allowed:
        return f"exit code {code}: {lines[-1]}"
    if "Traceback" in err:
        return f"a traceback: {lines[-1]}"
    sentence = lines[-1].startswith("generate.py: error: ") and len(lines[-1]) < 1000
    if code == 2 and not sentence:
        return f"no sentence: {lines[-1][:500]}"
    return None

# --- checkpoints, and how they are spoiled ---


def make_checkpoints(folder: Path) -> dict[str, Path]:
    """The same small random model in every format that is read."""
    plain = folder / "safetensors"
    folder.mkdir()
    hf_folder(plain, vocab_size=600, max_position_embeddings=64)
    backend, tokens, merges = byte_level_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.save(str(plain / "tokenizer.json"))
    settings = {"chat_template": CHATML, "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    (plain / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    tensors = load_file(plain / "model.safetensors")

    made = {"safetensors": plain}
    for name in ("index", "pickle", "tokenizer.model"):
        made[name] = Path(shutil.copytree(plain, folder / name))
    split(made["index"], tensors)
    (made["pickle"] / "model.safetensors").unlink()
    torch.save(tensors, made["pickle"] / "pytorch_model.bin")
    (made["tokenizer.model"] / "tokenizer.json").unlink()
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    kinds = [2, 3, 3, *[6] * 256, 1]
    processor = sentencepiece_bpe(pieces, [0.0] * len(pieces), kinds, 0, True)
    (made["tokenizer.model"] / "tokenizer.model").write_bytes(processor.serialized_model_proto())

    made["gguf"] = write_gguf(folder / "model.gguf", plain, tokens, merges)
    made["quantized"] = folder / "quantized"
    flags = ["--device", "cpu", "--checkpoint_path", plain, "--quantize", "int4"]
    program.main([str(flag) for flag in [*flags, "--save", made["quantized"]]])
    return made


def split(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Two files and their index in place of one file."""
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(2):
        file = f"model-0000{number}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::2]}
        save_file(part, folder / file)
        weight_map |= {name: file for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def write_gguf(path: Path, folder: Path, tokens: list[str], merges: list[list[str]]) -> Path:
    """The model of a folder, its matrices in Q8_0, and its vocabulary."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in load_file(folder / "model.safetensors").items():
        theirs = names.get_name(name, try_suffixes=(".weight",))
        if tensor.dim() == 1:
            writer.add_tensor(theirs, tensor.numpy())
        else:
            writer.add_tensor(theirs, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def spoil_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bytes that are others, a number that is huge, a piece that is missing, doubled or zero."""
    spoiled = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        end = len(spoiled) if draw.random() < 0.3 else min(len(spoiled), draw.choice([64, 4096]))
        at = draw.randrange(max(1, end))
        n = draw.choice([1, 4, 8, 100])
        how = draw.randrange(6)
        if how == 0:
            spoiled[at:at + 1] = bytes([draw.randrange(256)])
        elif how == 1:
            number = draw.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1])
            spoiled[at:at + 8] = number.to_bytes(8, "little")
        elif how == 2:
            del spoiled[at:at + n]
        elif how == 3:
            spoiled[at:at] = spoiled[at:at + n]
        elif how == 4:
            spoiled[at:at + n] = bytes(n)
        else:
            del spoiled[at:]
    return bytes(spoiled)


def spoil_json(content: bytes, draw: random.Random) -> bytes:
    """One value somewhere becomes another, or is missing."""
    tree = json.loads(content)
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = draw.choice(list(keys))
        below = node[key]
        deeper = isinstance(below, (dict, list)) and len(below) > 0
        if not deeper or draw.random() < 0.2:
            break
        node = below
    if draw.random() < 0.2:
        del node[key]
    else:
        node[key] = draw.choice(NASTY)
    return json.dumps(tree).encode()

# --- the program ---


def resident() -> int:
    """Bytes of memory that this process has."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", metavar="N", type=float, default=10)
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    parser.add_argument("--only", metavar="NUMBER", type=int, help="run this case alone")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork takes none along
    finds, ran = [], Counter()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(Path(folder), random.Random(args.seed))
        until = time.monotonic() + 60 * args.minutes
        number = 0 if args.only is None else args.only
        before = None
        while time.monotonic() < until:
            soak.draw.seed(f"{args.seed}-{number}")
            kind = soak.draw.choice(list(soak.kinds))
            found = soak.case(kind)
            ran[kind] += 1
            if found is not None:
                finds.append(found)
                print(f"case {number}, {kind}: {found}", flush=True)
            if args.only is not None:
                break
            number += 1
            if number == 200:  # by then all that is kept has been made
                before = resident()
        grown = 0 if before is None else resident() - before
    for kind, count in sorted(ran.items()):
        print(f"{count:6d} {kind}")
    print(f"{sum(ran.values())} cases, {len(finds)} finds, memory grew by {grown / 1e6:.0f} MB")
    if finds or grown > 100e6:
        sys.exit(1)


if __name__ == "__main__":
    main()
