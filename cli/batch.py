"""Answers to many prompts: in order, as records, and on from where an interrupted run ended."""
import fcntl
import json
import os
import stat
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from cli.prompts import Job
from formats.text import TextStream
from generate import Tokenizer, say
from parallel import Team

RECORD_START = b'{"index": '  # of every line that Records writes


class News(NamedTuple):
    """New tokens of a job."""
    number: int  # the job's, among those that run together
    ids: list[int]
    finish_reason: str | None  # eos, stop, length, context; None: it goes on
    started: float  # when it got its row, by time.perf_counter


Run = Callable[[list[Job]], Iterator[News]]  # runs jobs, and yields tokens as they come


@dataclass
class Answer:
    """An answer as far as it has come."""
    number: int  # of its job among those that run together
    job: Job
    stream: TextStream | None  # None: no text is made
    text: str = ""
    new_tokens: int = 0
    finish_reason: str | None = None
    queued_s: float = 0.0  # until it got its row
    first_token_s: float = 0.0  # from then on until its first token
    total_s: float = 0.0  # and until its last

    def push(self, news: News, began: float) -> str:
        """Take new tokens -> the text that they complete. began: when it was asked for."""
        self.queued_s = news.started - began
        self.total_s = time.perf_counter() - news.started
        if not self.new_tokens:
            self.first_token_s = self.total_s
        self.new_tokens += len(news.ids)
        self.finish_reason = news.finish_reason
        if self.stream is None:
            return ""
        piece = self.stream.push(news.ids, final=news.finish_reason is not None)
        self.text += piece
        return piece

    def record(self) -> dict[str, Any]:
        """What --json and --output say of it."""
        return {
            "index": self.job.index,
            "sample": self.job.sample,
            "text": self.text,
            "prompt_tokens": len(self.job.prompt),
            "new_tokens": self.new_tokens,
            "finish_reason": self.finish_reason,
            "queued_s": round(self.queued_s, 6),
            "first_token_s": round(self.first_token_s, 6),
            "total_s": round(self.total_s, 6),
            "digest": self.job.digest,
        }


def run_answers(
    jobs: list[Job], run: Run, tokenizer: Tokenizer | None
) -> Iterator[tuple[Answer, list[int], str]]:
    """Work jobs off -> (an answer so far, the tokens and the text that are new in it), as they
    come. tokenizer: None makes no text."""
    answers = []
    for number, job in enumerate(jobs):
        stream = None
        if tokenizer is not None:
            stream = TextStream(tokenizer, job.prompt, job.settings["stop"])
        answers.append(Answer(number, job, stream))
    began = time.perf_counter()
    for news in run(jobs):
        answer = answers[news.number]
        piece = answer.push(news, began)
        yield answer, news.ids, piece


# --- answers on the screen ---

class InOrder:
    """Prints several texts in the order of their numbers, though their pieces come as they like:
    those of the first text that has not ended are printed at once."""

    def __init__(self) -> None:
        self.turn = 0  # the number of the text that is being printed
        self.held: dict[int, str] = defaultdict(str)
        self.ended: set[int] = set()

    def push(self, number: int, piece: str, ended: bool) -> None:
        self.held[number] += piece
        if ended:
            self.ended.add(number)
        print(self.held.pop(self.turn, ""), end="", flush=True)
        while self.turn in self.ended:
            self.turn += 1
            print(self.held.pop(self.turn, ""), end="", flush=True)


def answer_live(
    jobs: list[Job], run: Run, tokenizer: Tokenizer | None, quiet: bool
) -> list[Answer]:
    """Print answers as they come, one after the other, and each of several under a heading
    (quiet: do not) -> all of them.

    tokenizer: None makes no text."""
    screen = InOrder()
    answers = {}
    headed = len(jobs) > 1
    several = any(job.sample for job in jobs)
    for answer, _, piece in run_answers(jobs, run, tokenizer):
        ended = answer.finish_reason is not None
        if headed and answer.number not in answers:
            piece = heading(answer.job, several) + piece
        answers[answer.number] = answer
        if ended:
            piece += "\n\n" if headed else "\n"
        if not quiet and tokenizer is not None:
            screen.push(answer.number, piece, ended)
    return [answers[number] for number in range(len(jobs))]


# --- the answers to a file ---

def answer_file(
    jobs: list[Job], run: Run, tokenizer: Tokenizer, *, as_json: bool, records: "Records | None",
    team: Team,
) -> None:
    """Answer a file's prompts and report the lines that are none, with a bar of progress if
    stderr is a terminal. The other processes of the team help_answer.

    records: the file that answers are appended to, which may have some already; None prints them.
    as_json: as they come, a JSON line each; otherwise in the prompts' order, each under a
    heading."""
    screen = InOrder()
    several = any(job.sample for job in jobs)
    done = {}
    if records is not None:
        records.check(jobs)
        done = records.done

    def write(number: int, record: dict[str, Any]) -> None:
        if records is not None:
            records.append(record)
        elif as_json:
            print(json.dumps(record), flush=True)
        else:
            text = ""
            if "text" in record:
                text = f"{heading(jobs[number], several)}{record['text']}\n\n"
            screen.push(number, text, ended=True)

    left = []
    for number, job in enumerate(jobs):
        if (job.index, job.sample) in done:
            continue
        if job.error is None:
            left.append(number)
        else:  # a line that is no prompt is done by saying so
            say(job.error)
            write(number, {
                "index": job.index, "sample": job.sample, "error": job.error, "digest": job.digest
            })
    if done:
        say(f"{records.path} has {len(done)} answers already; {len(left)} are left")
    team.broadcast(left)
    if left:
        answer_left(jobs, left, run, tokenizer, write, team)


def answer_left(
    jobs: list[Job], left: list[int], run: Run, tokenizer: Tokenizer,
    write: Callable[[int, dict[str, Any]], None], team: Team,
) -> None:
    """Answer the jobs of these numbers, and write each record as it comes."""
    with tqdm(
        total=len(jobs), initial=len(jobs) - len(left), unit="prompt", miniters=0, disable=None,
        nrows=20,  # a terminal without a size says that it has none, which would hide the bar
    ) as bar:
        n_tokens = 0
        began = time.perf_counter()
        for number, n_new, record in answers_of_all(
            [jobs[number] for number in left], run, tokenizer, team
        ):
            n_tokens += n_new
            speed = n_tokens / (time.perf_counter() - began)
            bar.set_postfix_str(f"{speed:.1f} tokens/s", refresh=False)
            bar.update(0)  # draws it anew if that is due
            if record is not None:
                with bar.external_write_mode():
                    write(left[number], record)
                bar.update(1)
    if team.n_groups > 1:
        seconds = time.perf_counter() - began
        say(f"{team.n_groups} groups: {n_tokens} new tokens in {seconds:.2f} s; the first of them:")


def answers_of_all(
    jobs: list[Job], run: Run, tokenizer: Tokenizer, team: Team
) -> Iterator[tuple[int, int, dict[str, Any] | None]]:
    """Work jobs off together with the other groups of the team -> (a job's number, how many new
    tokens it has, its record if it has ended), as they come."""
    ours = run_answers(jobs, run, tokenizer)
    n_left = len(jobs)
    working = True
    while working or n_left:
        news = next(ours, None)
        working = news is not None
        if working:
            answer, ids, _ = news
            record = answer.record() if answer.finish_reason else None
            n_left -= record is not None
            yield answer.number, len(ids), record
        elif n_left:
            time.sleep(0.01)  # others are still at work
        for number, record in team.receive():
            n_left -= 1
            yield number, record["new_tokens"], record


def help_answer(jobs: list[Job], run: Run, tokenizer: Tokenizer, team: Team) -> None:
    """What the processes of a team do while the first one answers a file."""
    left = team.broadcast(None)
    if not left:
        return
    for answer, _, _ in run_answers([jobs[number] for number in left], run, tokenizer):
        if answer.finish_reason is not None:
            team.send(answer.number, answer.record())


def heading(job: Job, several: bool) -> str:
    """A prompt's index and first words, and which of several answers follows."""
    sample = f", sample {job.sample}" if several else ""
    return f"[{job.index}{sample}] {job.title}\n"


class Records:
    """A file of answers, one JSON line each, that a run appends to and a later one goes on from.

    A line is written whole and is on the disk before the next one is begun, so that a run may be
    killed at any moment: what it may leave behind its last whole line is cut off. The file is
    locked, so that two runs do not share it. As a context it is closed at the end, and removed
    where it is empty. ValueError: it cannot be read or written, or holds anything else."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.done: dict[tuple[int, int], str] = {}  # (index, sample) -> digest
        try:
            self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as e:
            raise ValueError(f"cannot write --output {path}: {e.strerror}") from None
        try:
            self.lock()
            self.read()
        except BaseException:
            os.close(self.file)
            raise

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *exception: object) -> None:
        if os.fstat(self.file).st_size == 0:
            Path(self.path).unlink(missing_ok=True)
        os.close(self.file)

    def lock(self) -> None:
        """Keep other runs away until this process ends."""
        if not stat.S_ISREG(os.fstat(self.file).st_mode):
            raise ValueError(f"--output {self.path} is no plain file; --json prints answers")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing to --output {self.path}") from None
        except OSError as e:
            raise ValueError(f"cannot lock --output {self.path}: {e.strerror}") from None

    def read(self) -> None:
        """Note the answers that are there, and cut off what was not written to its end."""
        size = 0
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                torn = not line.endswith(b"\n")
                if torn and (line.startswith(RECORD_START) or RECORD_START.startswith(line)):
                    break
                key, digest = self.parse(line, number)
                self.done[key] = digest
                size += len(line)
        os.ftruncate(self.file, size)

    def parse(self, line: bytes, number: int) -> tuple[tuple[int, int], str]:
        """A line -> (index, sample), digest."""
        try:
            record = json.loads(line)
            return (int(record["index"]), int(record["sample"])), str(record["digest"])
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
            raise ValueError(
                f"line {number} of --output {self.path} is no answer of an earlier run; choose "
                "another file"
            ) from None

    def check(self, jobs: list[Job]) -> None:
        """ValueError if an answer that is there is none to these jobs."""
        digests = {(job.index, job.sample): job.digest for job in jobs}
        for (index, sample), digest in self.done.items():
            if digests.get((index, sample)) != digest:
                raise ValueError(
                    f"--output {self.path} answers another prompt {index}, or with other settings: "
                    "give the prompts and flags that it was begun with, or choose another file"
                )

    def append(self, record: dict[str, Any]) -> None:
        """Write a record and wait until it is on the disk."""
        line = json.dumps(record).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self.file, line):]
            os.fsync(self.file)
        except OSError as e:
            raise ValueError(
                f"cannot write --output {self.path}: {e.strerror}; what it has is kept, and the "
                "same command goes on from there"
            ) from None
