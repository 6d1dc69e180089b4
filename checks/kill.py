"""Kill a run of prompts at random moments, start it again each time, and compare what it wrote
with what an uninterrupted run wrote.

    python checks/kill.py --prompts 500 --kills 10 [--checkpoint_path PATH]

Exit code 1 if an answer is lost, repeated or another."""
import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

import cli.program  # once: the runs are forked from here, so that starting them takes no time
import generate

TIMES = ("queued_s", "first_token_s", "total_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint_path", help="default: the default model")
    parser.add_argument("--prompts", metavar="N", type=int, default=500)
    parser.add_argument("--kills", metavar="N", type=int, default=10)
    parser.add_argument("--batch_size", metavar="N", type=int, default=8)
    parser.add_argument("--longest", metavar="N", type=int, default=24, help="new tokens")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of prompts and moments")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.jsonl")
        prompts.write_text(lines(args, draw))
        # in float32, where a text does not depend on which others are on the way with it
        flags = ["--device", "cpu", "--dtype", "float32", "--batch_size", args.batch_size]
        flags += ["--prompts", prompts, "--seed", 7, "--temperature", 0.8]
        if args.checkpoint_path is not None:
            flags += ["--checkpoint_path", args.checkpoint_path]
        whole = Path(folder, "whole.jsonl")
        began = time.perf_counter()
        process = start([*flags, "--output", whole])
        while n_lines(whole) == 0:
            if os.waitpid(process, os.WNOHANG) != (0, 0):
                sys.exit("the run without a kill has failed")
            time.sleep(0.01)
        load_s = time.perf_counter() - began
        wait(process)
        work_s = time.perf_counter() - began - load_s
        print(f"{args.prompts} prompts: {load_s:.1f} s to begin, {work_s:.1f} s", flush=True)

        killed = Path(folder, "killed.jsonl")
        flags += ["--output", killed]
        n_kills = kill_often(flags, killed, args, load_s, work_s, draw)
        print(compare(records(whole), records(killed), args.prompts, n_kills))


def lines(args: argparse.Namespace, draw: random.Random) -> str:
    """Prompts of different lengths and limits, and now and then a line that is none."""
    text = []
    for i in range(args.prompts):
        if i % 25 == 24:
            text.append('{"prompt": "half a line')
        else:
            words = draw.choices("one two three four five six seven".split(), k=draw.randint(1, 20))
            limit = draw.randint(1, args.longest)
            text.append(json.dumps({"prompt": " ".join(words), "max_new_tokens": limit}))
    return "\n".join(text) + "\n"


def start(flags: list[object]) -> int:
    """Run generate.py with these flags in a process of its own -> its id."""
    process = os.fork()
    if process:
        return process
    tqdm.set_lock(threading.RLock())  # its own is shared by forks: one killed with it stops all
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    try:
        generate.main([str(flag) for flag in flags])
        os._exit(0)
    except BaseException:
        os._exit(1)


def wait(process: int) -> None:
    _, status = os.waitpid(process, 0)
    if status:
        sys.exit(f"a run has failed with status {status}")


def kill_often(
    flags: list[object], file: Path, args: argparse.Namespace, load_s: float, work_s: float,
    draw: random.Random,
) -> int:
    """Start runs and kill them until one is left to end -> how many were killed.

    load_s, work_s: what a run takes to begin and to end. Each is killed at a random moment,
    sometimes before it has begun, and leaves some of the work to the next, on a machine that has
    become faster meanwhile too."""
    n_kills = 0
    while n_kills < args.kills:
        n_done = n_lines(file)
        share = (args.prompts - n_done) / (args.kills - n_kills + 1)  # of the answers
        process = start(flags)
        moment = time.perf_counter() + draw.uniform(0, load_s + share / args.prompts * work_s)
        while time.perf_counter() < moment and n_lines(file) < n_done + share:
            time.sleep(0.001)
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if not os.WIFSIGNALED(status):
            break
        n_kills += 1
        print(f"killed; {n_lines(file)} answers are there", flush=True)
    wait(start(flags))
    return n_kills


def n_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def records(file: Path) -> list[dict[str, object]]:
    """A file's records by index, without what differs from run to run."""
    found = []
    for line in file.read_text().splitlines():
        record = json.loads(line)
        found.append({name: value for name, value in record.items() if name not in TIMES})
    return sorted(found, key=lambda record: record["index"])


def compare(
    whole: list[dict[str, object]], killed: list[dict[str, object]], n_prompts: int, n_kills: int
) -> str:
    """Exits where the two runs did not write the same, each prompt once."""
    indexes = [record["index"] for record in killed]
    lost = set(range(n_prompts)) - set(indexes)
    repeated = len(indexes) - len(set(indexes))
    if lost or repeated:
        sys.exit(f"{len(lost)} lost, {repeated} repeated")
    others = [mine["index"] for mine, want in zip(killed, whole, strict=True) if mine != want]
    if others:
        sys.exit(f"other answers to {others}")
    return f"{n_kills} kills: {n_prompts} prompts, none lost, none repeated, all the same"


if __name__ == "__main__":
    main()
