"""Answers to many prompts: in order, as records, and on from where an interrupted run ended."""
import fcntl
import json
import os
import re
import stat
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from itertools import chain, repeat
from typing import Any, NamedTuple

from tqdm import tqdm

from batching import Engine
from cli.files import trying_to
from cli.prompts import Job
from cli.stats import NO_TIME
from formats.text import TextStream
from generate import Request, Tokenizer, say
from parallel import Team

# how the lines begin that Records writes, each number a 0
RECORD_STARTS = b'{"index": 0, "sample": 0, "text": ', b'{"index": 0, "sample": 0, "error": '
# what some take for the end of a line, and halves of characters, which UTF-8 cannot hold
ESCAPES = {i: f"\\u{i:04x}" for i in (0x85, 0x2028, 0x2029, *range(0xD800, 0xE000))}
Record = dict[str, Any]  # an answer as far as it has come, as --json and --output give it


class News(NamedTuple):
    """What is new of an answer, and its record as far as it has come."""
    number: int  # of its job
    n_tokens: int
    text: str
    record: Record

    @property
    def ended(self) -> bool:
        return self.record.get("finish_reason", "error") is not None


def new_record(job: Job) -> Record:
    record = {
        "text": "",
        "prompt_tokens": len(job.prompt),
        "new_tokens": 0,
        "finish_reason": None,  # eos, stop, length, context; None: it goes on
        "queued_s": 0.0,  # until it got its row
        "first_token_s": 0.0,  # from then on until its first token
        "total_s": 0.0,  # and until its last
    }
    answer = record if job.error is None else {"error": job.error}
    place = {"index": job.index, "sample": job.sample}
    return place | answer | {"digest": job.digest, **job.passed}


def as_line(record: Record) -> str:
    """A record as a line of JSON."""
    return json.dumps(record, ensure_ascii=False, default=str).translate(ESCAPES)


def print_record(record: Record) -> None:
    print(as_line(record), flush=True)


def work_off(
    jobs: dict[int, Job], engine: Engine, tokenizer: Tokenizer | None, team: Team | None
) -> Iterator[News]:
    """Answer jobs, by their numbers; of several groups of a team each takes some."""
    requests, streams = [], []
    for job in jobs.values():
        settings = dict(job.settings)
        stop = settings.pop("stop")
        if tokenizer is not None:
            streams.append(TextStream(tokenizer, job.prompt, stop))
            settings["eos_ids"] = tokenizer.eos_ids
            settings["ends"] = tokenizer.ends(stop, job.prompt) if stop else None
        requests.append(Request(job.prompt, **settings))
    records = list(map(new_record, jobs.values()))
    numbers = list(jobs)
    take_place = None
    if team is not None and team.n_groups > 1:
        take_place = partial(team.take_number, len(jobs))
    began = time.perf_counter()
    for place, ids in engine.run(requests, take_place):
        record = records[place]
        started = engine.started[place]
        record["total_s"] = round(time.perf_counter() - started, 6)
        if not record["new_tokens"]:
            record["queued_s"] = round(started - began, 6)
            record["first_token_s"] = record["total_s"]
        record["new_tokens"] += len(ids)
        add_logprobs(record, requests[place].prompt, ids, tokenizer)
        reason = record["finish_reason"] = engine.finish_reasons.get(place)
        text = streams[place].push(ids, final=reason is not None) if streams else ""
        record["text"] += text
        yield News(numbers[place], len(ids), text, record)


def add_logprobs(
    record: Record, prompt: list[int], ids: list[int], tokenizer: Tokenizer | None
) -> None:
    """Put what is known of new tokens, and with the first of a prompt's, into a record."""

    def named(token: int, logprob: float | None) -> dict[str, Any]:
        text = "" if tokenizer is None else tokenizer.decode([token])
        return {"id": token, "token": text, "logprob": logprob}

    for name, tokens in {"prompt_": prompt, "": ids}.items():
        logprobs = getattr(ids, f"{name}logprobs", ())
        tops = getattr(ids, f"{name}top_logprobs", ())
        for token, logprob, top in zip(tokens, logprobs, tops):
            likeliest = [named(*each) for each in (top or {}).items()]
            told = named(token, logprob) | {"top_logprobs": likeliest}
            record.setdefault(f"{name}logprobs", []).append(told)


def answers_of_all(
    jobs: list[Job], engine: Engine | None, tokenizer: Tokenizer | None, team: Team | None
) -> Iterator[News]:
    """The bad lines among jobs, and what work_off gives of the others, of all groups of the team in
    the first process: the others send it what they have. engine: None where all lines are bad."""
    good = {number: job for number, job in enumerate(jobs) if job.error is None}
    ours = work_off(good, engine, tokenizer, team) if good else ()
    shared = team is not None and team.n_groups > 1
    if shared and not team.is_first:
        for news in ours:
            if news.ended:
                team.send(news.number, news.record)
        return
    for number, job in enumerate(jobs):
        if job.error is not None:
            yield News(number, 0, "", new_record(job))
    n_left = len(good)
    for news in chain(ours, repeat(None) if shared else ()):
        if news is not None:
            n_left -= news.ended
            yield news
        elif n_left:
            time.sleep(0.01)  # others are still at work
        else:
            return
        for number, record in team.receive() if shared else ():
            n_left -= 1
            yield News(number, record["new_tokens"], record["text"], record)


class InOrder:
    """Prints several texts in the order of their numbers, those of jobs under their headings,
    though their pieces come as they like: those of the first text that has not ended at once, or
    (whole) when it ends."""

    def __init__(self, jobs: list[Job], whole: bool = False) -> None:
        self.turn = 0  # the number of the text that is being printed
        self.held: dict[int, str] = defaultdict(str, enumerate(job.heading for job in jobs))
        self.ended: set[int] = set()
        self.whole = whole

    def push(self, number: int, piece: str, ended: bool) -> None:
        self.held[number] += piece
        if ended:
            self.ended.add(number)
        while self.turn in self.ended or not self.whole:
            print(self.held.pop(self.turn, ""), end="", flush=True)
            if self.turn not in self.ended:
                break
            self.turn += 1


def answer_jobs(
    jobs: list[Job], engine: Engine | None, tokenizer: Tokenizer | None, *,
    write: Callable[[Record], None] | None = None, n_done: int = 0, team: Team | None = None,
) -> list[Record]:
    """Answer prompts, and report the lines that are none -> their records, as they ended.

    engine: None where all are such lines. write takes each record; None prints the texts in the
    prompts' order, those of several under their headings. tokenizer: None makes no text. n_done:
    other answers that are there already. team: its groups share the jobs, with a bar, and give the
    first process what they have; None: all are answered here, and a text is printed as it comes."""
    one = team is None and len(jobs) == 1
    screen = InOrder([] if one else jobs, whole=team is not None)

    def show(news: News) -> None:
        text = news.text
        if "error" in news.record:
            say(news.record["error"])
        elif news.ended:
            text += "\n" if one else "\n\n"
        if write is None and tokenizer is not None:
            screen.push(news.number, text, news.ended)
        elif write is not None and news.ended:
            write(news.record)

    n_tokens, began, ended = 0, time.perf_counter(), []
    with tqdm(
        total=n_done + len(jobs), initial=n_done, unit="prompt", miniters=0,
        disable=team is None or not jobs or None,  # None: unless stderr is a terminal
        nrows=20,  # a terminal without a size says that it has none, which would hide the bar
    ) as bar:
        for news in answers_of_all(jobs, engine, tokenizer, team):
            n_tokens += news.n_tokens
            speed = n_tokens / max(time.perf_counter() - began, NO_TIME)
            bar.set_postfix_str(f"{speed:.1f} tokens/s", refresh=False)
            with bar.external_write_mode() if news.ended else nullcontext():
                show(news)
            bar.update(news.ended)  # draws it anew if that is due
            if news.ended:
                ended.append(news.record)
    if n_tokens and team is not None and team.n_groups > 1:
        seconds = time.perf_counter() - began
        say(f"{team.n_groups} groups: {n_tokens} new tokens in {seconds:.2f} s; the first of them:")
    return ended


def is_begun(line: bytes) -> bool:
    """Whether a part of a line is the beginning of one that Records writes, or could be."""
    seen = re.sub(rb"\d+", b"0", line[:100])
    return any(seen.startswith(start) or start.startswith(seen) for start in RECORD_STARTS)


class Records:
    """A file of answers, one JSON line each, that a run appends to and a later one goes on from.

    A line is on the disk before the next one is begun, so that a run may be killed at any moment:
    what it left behind its last whole line is cut off before the first answer. The file is locked;
    as a context it is closed, and removed if this run made it and it is empty. ValueError: it
    cannot be read or written, holds anything else, or is no longer where it was."""

    def __init__(self, path: str) -> None:
        self.path = os.path.realpath(path)  # a link stays one
        self.made = not os.path.exists(self.path)
        make = os.O_CREAT | os.O_EXCL if self.made else 0
        with trying_to(f"write --output {path}"):
            self.file = os.open(self.path, os.O_RDWR | os.O_APPEND | make, 0o666)
        self.size = 0  # of the whole lines
        try:
            self.lock()
            self.done = self.read()  # (index, sample) -> digest
        except BaseException:
            os.close(self.file)
            raise

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.made and os.fstat(self.file).st_size == 0:
            with suppress(OSError, ValueError):
                self.check_place()
                os.unlink(self.path)
        os.close(self.file)

    def check_place(self) -> None:
        """ValueError if the path leads to another file by now, or to none."""
        with suppress(OSError):
            if os.path.samestat(os.fstat(self.file), os.stat(self.path)):
                return
        raise ValueError(f"--output {self.path} was removed or replaced while this run had it open")

    def lock(self) -> None:
        """Keep other runs away until this process ends."""
        if not stat.S_ISREG(os.fstat(self.file).st_mode):
            raise ValueError(f"--output {self.path} is no plain file; --json prints answers")
        with trying_to(f"lock --output {self.path}"):
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another run is writing to --output {self.path}") from None
        self.check_place()

    def read(self) -> dict[tuple[int, int], str]:
        """The answers that are there, as far as they were written to the ends of their lines."""
        done = {}
        with open(self.file, "rb", closefd=False) as lines:
            for number, line in enumerate(lines, start=1):
                ended = line.endswith(b"\n")
                try:
                    record = json.loads(line)
                    key = int(record["index"]), int(record["sample"])
                    digest = str(record["digest"])
                except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as e:
                    if isinstance(e, json.JSONDecodeError) and is_begun(line) and not ended:
                        break
                    raise ValueError(
                        f"line {number} of --output {self.path} is no answer of an earlier run; "
                        "choose another file"
                    ) from None
                if ended:
                    done[key] = digest
                    self.size += len(line)
        return done

    def left_of(self, jobs: list[Job]) -> list[int]:
        """The numbers of those without an answer. ValueError: one that is there is to no job."""
        asked = {(job.index, job.sample): job.digest for job in jobs}
        wrong = self.done.items() - asked.items()
        if wrong:
            (index, _), _ = min(wrong)
            raise ValueError(
                f"--output {self.path} answers another prompt {index}, or with other settings: "
                "give the prompts and flags that it was begun with, or choose another file"
            )
        return [number for number, place in enumerate(asked) if place not in self.done]

    def append(self, record: Record) -> None:
        """Write a record, behind the last whole one, and wait until it is on the disk."""
        self.check_place()
        line = as_line(record).encode() + b"\n"
        try:
            os.ftruncate(self.file, self.size)
            self.size += len(line)
            while line:
                line = line[os.write(self.file, line):]
            os.fsync(self.file)
        except OSError as e:
            raise ValueError(
                f"cannot write --output {self.path}: {e.strerror}; what it has is kept, and the "
                "same command goes on from there"
            ) from None
