"""Tests of prompts from files: reading them, answers in order, records that a later run goes on
from, and the command line around them."""
import errno
import io
import json
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from batching import Engine
from batching.engine import Launch
from checks.common import CPU_ENV, HERE, PATIENCE_S, ours, read_to_end, run_cli
from cli.batch import InOrder, Records, answer_jobs, print_record, work_off
from cli.program import files_of
from cli.prompts import (
    SETTINGS, Job, Line, read_file, read_jobs, read_lines, read_prompt, read_text, samples,
)
from generate import NO_TEXT, Request, generate, load_tokenizer
from model import load_model
from parallel import Team

Outcome = tuple[int, str, str]  # exit code, stdout, stderr
ALONE = Team()  # of this process
DEFAULTS = {**dict.fromkeys(SETTINGS), "max_new_tokens": 9, "temperature": 0.0, "stop": []}


class Letters:
    """A tokenizer of one token a byte."""
    eos_ids = ()

    def ends(self, stop: list[str], prompt: list[int]) -> Callable[[list[int]], bool]:
        return lambda ids: False

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def encode(entry: dict) -> list[int]:
    """Ids of a prompt's bytes, or of the contents of its messages."""
    if "messages" in entry:
        text = "|".join(message["content"] for message in entry["messages"])
    else:
        text = entry["prompt"]
    if len(text) > 99:
        raise ValueError("too long")
    return list(text.encode())


def jobs_of(text: str | bytes, tmp_path: Path, name: str = "p.txt", n: int = 1,
            model: str = "a model", **defaults: object) -> list[Job]:
    """The jobs of a file with this text."""
    file = tmp_path / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_jobs(read_lines(str(file)), encode, {**DEFAULTS, **defaults}, n, model)


def prompts(jobs: list[Job]) -> list[str]:
    return [Letters().decode(job.prompt) for job in jobs]


# --- reading ---

def test_a_prompt_is_a_text_a_file_s_or_standard_input_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("\ufefftwo, \u00e9\n", encoding="utf-8")  # behind a byte order mark
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbffrom a pipe")))
    assert read_text("as it is", "the prompt") == "as it is"
    assert read_text("@@x @@", "the prompt") == "@x @@"
    assert read_text("", "the prompt") == ""
    assert read_prompt("-") == "from a pipe"
    assert read_text(f"@{file}", "the prompt") == "two, \u00e9\n"
    for name in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=f"cannot read the prompt @{name}: "):
            read_text(f"@{name}", "the prompt")
    monkeypatch.chdir(tmp_path)
    Path("@grammar").write_text("root")
    assert read_file("@grammar", "the grammar") == "root"  # a flag that takes a file takes its name


def test_standard_input_is_a_prompt_s_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system message or a grammar would take the lines of a conversation."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", None)
    assert read_text("-", "the system message") == "-"
    Path("-").write_text("of a file")
    for what in ("the prompt", "the system message"):
        assert read_text("@-", what) == "of a file"
    assert read_file("-", "the grammar -") == "of a file"


def test_bytes_that_are_no_utf_8_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    for source in ("-", f"@{tmp_path}/latin", "caf\udce9"):
        with pytest.raises(ValueError, match="^the prompt.* is not UTF-8: byte 0xe9$"):
            read_prompt(source)
    (tmp_path / "utf-16").write_bytes("one\ntwo".encode("utf-16"))
    with pytest.raises(ValueError, match="it is UTF-16, not UTF-8"):
        read_lines(str(tmp_path / "utf-16"))


@pytest.mark.parametrize("text, want", [
    ("one\n\n  \n two, \u00e9\n", ["one", " two, \u00e9"]),
    ("one\r\ntwo\r\n\r\n", ["one", "two"]),
    ("\ufeffone\ntwo", ["one", "two"]),
    ("a\u2028b\x0bc\x00d\n", ["a\u2028b\x0bc\x00d"]),
    ('one\n{"prompt": "two"}\n', ["one", '{"prompt": "two"}']),
    ('\ufeff\n {"prompt": "one"}\n{"prompt": "\u2028 two"}', ["one", "\u2028 two"]),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "x", "content": "b"}]}', ["a|b"]),
])
def test_lines_are_prompts(text: str, want: list[str], tmp_path: Path) -> None:
    jobs = jobs_of(text, tmp_path)
    assert prompts(jobs) == want
    assert [job.index for job in jobs] == list(range(len(want)))
    assert not any(job.error for job in jobs)


def test_lines_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n one\n")))
    assert read_lines("-") == [Line(2, " one", False)]


def test_a_closed_standard_input_has_no_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    for read in (read_lines, read_prompt):
        with pytest.raises(ValueError, match="cannot read .* -: standard input is closed"):
            read("-")


@pytest.mark.parametrize("content", [b"", b"\n \r\n\t\n", b"\xef\xbb\xbf"])
def test_a_file_without_prompts(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"no prompts in {file}"):
        read_lines(str(file))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name in (str(tmp_path), str(tmp_path / "missing"), "", "a\0b"):
        with pytest.raises(ValueError, match="cannot read --prompts "):
            read_lines(name)


def test_a_line_has_settings_of_its_own(tmp_path: Path) -> None:
    own = dict(
        max_new_tokens=3, temperature=1, top_k=5, top_p=0.5, min_p=0, seed=2**63 - 1, stop=["a"])
    text = json.dumps({"prompt": "x", **own}) + '\n{"prompt": "y"}\n'
    first, second = jobs_of(text, tmp_path, temperature=0.5, stop=["b"], seed=40)
    assert first.settings == dict.fromkeys(SETTINGS) | own
    assert second.settings == {**DEFAULTS, "temperature": 0.5, "stop": ["b"], "seed": 41}


def test_seeds_go_on_from_answer_to_answer(tmp_path: Path) -> None:
    """A bad line in between changes nobody's; a line's own seed is that of its first answer."""
    text = '{"prompt": "a"}\nbad\n{"prompt": "b", "seed": 5}\n{"prompt": "c"}\n'
    jobs = jobs_of(text, tmp_path, n=3, seed=100)
    good = [job for job in jobs if job.error is None]
    assert [job.settings["seed"] for job in good] == [100, 101, 102, 5, 6, 7, 109, 110, 111]
    assert [job.sample for job in good] == [0, 1, 2] * 3
    assert [job.index for job in jobs] == [0, 0, 0, 1, 2, 2, 2, 3, 3, 3]
    last = samples(0, "", [1], {**DEFAULTS, "seed": 2**63 - 1}, 2)
    assert [job.settings["seed"] for job in last] == [2**63 - 1, 0]
    assert {job.settings["seed"] for job in jobs_of("a\nb", tmp_path)} == {None}


BAD_LINES = [
    ('{"prompt": "x"', "not JSON: Expecting ',' delimiter at column 15"),
    ("plain", "not JSON: "),
    ("[1]", "not a JSON object"),
    ('"x"', "not a JSON object"),
    ("{}", "one of prompt and messages is needed, and not both"),
    ('{"prompt": "x", "messages": []}', "one of prompt and messages is needed, and not both"),
    ('{"prompt": 5}', "prompt must be a text, not 5"),
    ('{"prompt": null}', "prompt must be a text, not null"),
    ('{"prompt": ["x"]}', 'prompt must be a text, not ["x"]'),
    ('{"prompt": "\\ud800"}', "prompt has half a character, '\\ud800'"),
    ('{"prompt": "' + 100 * "x" + '"}', "too long"),
    ('{"promt": "x"}', 'unknown key "promt"; known are frequency_penalty, logprobs, max_new_tok'),
    ('{"messages": "hi"}', 'messages must be a list with messages, not "hi"'),
    ('{"messages": []}', "messages must be a list with messages, not []"),
    ('{"messages": ["hi"]}', 'a message is an object of role and content, not "hi"'),
    ('{"messages": [{"role": "user"}]}', "a message is an object of role and content, not {"),
    ('{"messages": [{"role": "user", "content": 1}]}', "content must be a text, not 1"),
    ('{"messages": [{"role": ["user"], "content": "x"}]}', 'role must be a text, not ["user"]'),
    ('{"prompt": "x", "temperature": "1"}', "temperature must be a number, not '1'"),
    ('{"prompt": "x", "temperature": -1}', "temperature: -1 is not at least 0 and at most 1000"),
    ('{"prompt": "x", "temperature": NaN}', "Out of range float values are not JSON"),
    ('{"prompt": "x", "id": 1e999}', "Out of range float values are not JSON"),
    ('{"prompt": "x", "temperature": 1' + 400 * "0" + "}", "temperature: 1000000"),
    ('{"prompt": "x", "temperature": null}', "temperature must be a number, not None"),
    ('{"prompt": "x", "top_k": 0}', "top_k: 0 is not at least 1"),
    ('{"prompt": "x", "top_k": 5.5}', "top_k must be a whole number, not 5.5"),
    ('{"prompt": "x", "top_k": true}', "top_k must be a whole number, not True"),
    ('{"prompt": "x", "top_k": 9999999999}', "top_k: 9999999999 is not at least 1 and at most"),
    ('{"prompt": "x", "top_p": 0}', "top_p: 0 is not above 0 and at most 1"),
    ('{"prompt": "x", "min_p": 1.1}', "min_p: 1.1 is not at least 0 and at most 1"),
    ('{"prompt": "x", "seed": -1}', "seed: -1 is not at least 0"),
    ('{"prompt": "x", "seed": 9223372036854775808}', "seed: 9223372036854775808 is not at least"),
    ('{"prompt": "x", "seed": 1' + 5000 * "0" + "}", "Exceeds the limit (4300 digits)"),
    ('{"prompt": "x", "max_new_tokens": 0}', "max_new_tokens: 0 is not at least 1"),
    ('{"prompt": "x", "stop": "a"}', 'stop must be a list of texts, none of them empty, not "a"'),
    ('{"prompt": "x", "stop": [1]}', "each text of stop must be a text, not 1"),
    ('{"prompt": "x", "stop": [""]}', "stop must be a list of texts, none of them empty, not ["),
    ('{"prompt": ' + 100_000 * "[", "JSON that is nested too deeply"),
    (b'{"prompt": "\xe9"}', "it is not UTF-8: byte 0xe9"),
    (b"\xff\xfe{\0", "it is not UTF-8: byte 0xff"),
    ('{"prompt": "a\0b"}', "not JSON: Invalid control character"),
]


@pytest.mark.parametrize("line, message", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_reported_and_the_others_are_not(
    line: str | bytes, message: str, tmp_path: Path
) -> None:
    raw = line.encode() if isinstance(line, str) else line
    text = b'{"prompt": "one"}\n\n' + raw + b'\n{"prompt": "two"}\n'
    before, bad, after = jobs_of(text, tmp_path, n=1)
    assert bad.error.startswith(f"line 3: {message}")
    assert len(bad.error) < 350 and "\n" not in bad.error
    assert bad.index == 1 and bad.prompt == []
    assert prompts([before, after]) == ["one", "two"]
    assert after.index == 2


@pytest.mark.parametrize("key", ["promt", 100 * "k"])
def test_what_is_said_of_an_unknown_key_has_an_end(key: str, tmp_path: Path) -> None:
    [job] = jobs_of(json.dumps({key: 1}), tmp_path)
    assert job.error.endswith("and handed on are id, metadata and what begins with x")


PASSED = {"id": 7, "metadata": {"max_tokens": [1, None]}, "x-from": "\u00e9\u2028\ud800"}


def test_what_a_line_hands_on_is_in_its_record(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    asked = {"prompt": "a", "max_tokens": 3, **PASSED}
    jobs = jobs_of(f'{json.dumps(asked)}\n{json.dumps({"promt": "b", "id": "bad"})}', tmp_path)
    assert jobs[0].settings["max_new_tokens"] == 3
    bad, good = sorted(answer_into(file, jobs), key=lambda record: "text" in record)
    assert good["text"] == "A" and PASSED.items() <= good.items()
    assert bad["id"] == "bad" and "error" in bad
    assert '"x-from": "\u00e9\\u2028\\ud800"' in file.read_text(encoding="utf-8")
    other = jobs_of(json.dumps(asked | {"id": 8}), tmp_path)
    assert other[0].digest != jobs[0].digest


def test_what_is_nested_too_deeply_to_be_written_is_not_handed_on(tmp_path: Path) -> None:
    limit = sys.getrecursionlimit()  # which others may have raised
    for n in range(limit - 100, limit):
        file = tmp_path / f"{n}.jsonl"
        answer_into(file, jobs_of(f'{{"prompt": "a", "x": {n * "["}{n * "]"}}}', tmp_path))
    assert "nested too deeply" in file.read_text()


def test_a_name_makes_a_file_json_lines(tmp_path: Path) -> None:
    jobs = jobs_of('plain\n{"prompt": "one"}\n', tmp_path, "p.jsonl")
    assert jobs[0].error.startswith("line 1: not JSON: ")
    assert prompts(jobs[1:]) == ["one"]


def test_a_digest_is_that_of_prompt_settings_and_model(tmp_path: Path) -> None:
    def digest(text: str, **defaults: object) -> str:
        return jobs_of(text, tmp_path, **defaults)[-1].digest

    same = digest("x")
    assert digest("x") == digest('{"prompt": "x"}') == digest("y\nx") == same
    others = [digest("x", seed=1), digest("x", temperature=1.0), digest("x", stop=["a"]),
              digest("y"), digest('{"prompt": "x", "top_k": 3}'), digest("x", model="another")]
    assert len({same, *others}) == 7


# --- answers ---

class Shouter:
    """An engine that answers a prompt with its text in capitals, in so many rows, a token of each
    in turn."""

    def __init__(self, rows: int = 3) -> None:
        self.rows = rows
        self.started: dict[int, float] = {}
        self.finish_reasons: dict[int, str] = {}

    def run(
        self, requests: list[Request], take_number: None = None
    ) -> Iterator[tuple[int, list[int]]]:
        waiting = list(range(len(requests)))
        running = {}
        self.finish_reasons.clear()
        while waiting or running:
            while waiting and len(running) < self.rows:
                number = waiting.pop(0)
                self.started[number] = time.perf_counter()
                text = Letters().decode(requests[number].prompt).upper()
                running[number] = list(text.encode())
            for number, left in list(running.items()):
                token = left.pop(0)
                if not left:
                    del running[number]
                    self.finish_reasons[number] = "length"
                yield number, [token]


WORDS = ["seventeen", "two", "three", "a", "\u00e9\u00e9", "five"]
FILE = "\n".join(WORDS)


def plain_jobs(*words: str, n: int = 1) -> list[Job]:
    jobs = []
    for index, word in enumerate(words):
        jobs += samples(index, word, list(word.encode()), DEFAULTS, n)
    return jobs


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_answers_are_printed_in_the_order_of_their_prompts(
    rows: int, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Shouter(rows)
    headed = [f"[{i}] {word}\n{word.upper()}\n\n" for i, word in enumerate(WORDS)]
    answers = answer_jobs(plain_jobs(*WORDS), engine, Letters())
    assert {answer["text"] for answer in answers} == {word.upper() for word in WORDS}
    assert capsys.readouterr().out == "".join(headed)
    answer_jobs(plain_jobs(*WORDS), engine, Letters(), team=ALONE)
    assert capsys.readouterr().out == "".join(headed)


def test_answers_as_json_are_printed_as_they_end(capsys: pytest.CaptureFixture[str]) -> None:
    answers = answer_jobs(plain_jobs(*WORDS), Shouter(), Letters(), write=print_record)
    assert {answer["text"] for answer in answers} == {word.upper() for word in WORDS}
    printed = list(map(json.loads, capsys.readouterr().out.split("\n")[:-1]))
    assert printed == answers


def test_without_a_tokenizer_there_are_answers_and_no_text(
    capsys: pytest.CaptureFixture[str]
) -> None:
    answers = answer_jobs(plain_jobs("ab", "c"), Shouter(), None)
    assert sorted(answer["new_tokens"] for answer in answers) == [1, 2]
    assert [answer["text"] for answer in answers] == ["", ""]
    assert capsys.readouterr().out == ""


def test_the_first_text_that_has_not_ended_is_printed_as_it_comes(
    capsys: pytest.CaptureFixture[str]
) -> None:
    screen = InOrder([])
    pushed = [(0, "a", False), (1, "x", False), (2, "z", True), (0, "b", False), (1, "y", False),
              (0, "c", True), (1, "!", True)]
    printed = []
    for number, piece, ended in pushed:
        screen.push(number, piece, ended)
        printed.append(capsys.readouterr().out)
    assert printed == ["a", "", "", "b", "", "cxy", "!z"]


def test_a_stop_string_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = samples(0, "", list(b"one two"), {**DEFAULTS, "stop": ["E T", "O"]}, 1)
    jobs += samples(1, "", list(b"one two"), {**DEFAULTS, "stop": ["E T", "WW"]}, 1)
    answer_jobs(jobs, Shouter(), Letters())
    assert capsys.readouterr().out == "[0] \n\n\n[1] \nON\n\n"


def test_several_answers_to_a_prompt_have_headings(capsys: pytest.CaptureFixture[str]) -> None:
    """On the screen as in a file of them; the only answer of a run needs none."""
    jobs = plain_jobs("ab", "c", n=2)
    answer_jobs(jobs, Shouter(), Letters(), team=ALONE)
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert heads == ["[0, sample 0] ab", "[0, sample 1] ab", "[1, sample 0] c", "[1, sample 1] c"]
    answer_jobs(plain_jobs("ab", n=2), Shouter(), Letters())
    assert capsys.readouterr().out == "[0, sample 0] ab\nAB\n\n[0, sample 1] ab\nAB\n\n"
    answer_jobs(plain_jobs("ab"), Shouter(), Letters())
    assert capsys.readouterr().out == "AB\n"


def test_records_come_as_answers_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_of(FILE.encode() + b"\n\xff\n", tmp_path)
    answer_jobs(jobs, Shouter(), Letters(), write=print_record, team=ALONE)
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert [record["index"] for record in found] == [6, 1, 3, 2, 4, 0, 5]
    bad, two, *_ = found
    assert bad == {"index": 6, "sample": 0, "error": "line 7: it is not UTF-8: byte 0xff",
                   "digest": jobs[6].digest}
    assert err == "line 7: it is not UTF-8: byte 0xff\n"
    assert two["text"] == "TWO" and two["finish_reason"] == "length"
    assert (two["prompt_tokens"], two["new_tokens"]) == (3, 3)
    assert 0 <= two["queued_s"] <= found[-1]["queued_s"]
    assert all(0 <= r["first_token_s"] <= r["total_s"] for r in found[1:])


def test_a_bad_line_leaves_a_gap_among_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_of(b"one\n\xff\ntwo\n\xfe", tmp_path)
    answer_jobs(jobs, Shouter(), Letters(), team=ALONE)
    out, err = capsys.readouterr()
    assert out == "[0] one\nONE\n\n[2] two\nTWO\n\n"
    assert err.count("not UTF-8") == 2


# --- records in a file ---

def answer_into(
    file: Path, jobs: list[Job], engine: Shouter | None = None
) -> list[dict[str, object]]:
    """What a run leaves in a file of records."""
    with Records(str(file)) as records:
        answer_jobs(
            [jobs[number] for number in records.left_of(jobs)], engine or Shouter(), Letters(),
            write=records.append, team=ALONE,
        )
    return [json.loads(line) for line in file.read_text().splitlines()]


def by_index(found: list[dict[str, object]]) -> list[tuple[object, object]]:
    return sorted((r["index"], r.get("text", r.get("error"))) for r in found)


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    """Jobs of which one is a bad line."""
    return jobs_of(FILE.encode() + b"\n\xff\n", tmp_path)


def test_a_run_goes_on_wherever_it_was_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every length that a killed run may leave of its file."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # most of the time
    file = tmp_path / "out.jsonl"
    jobs = jobs_of(b"one\n\xff\nthree\n", tmp_path)
    whole = answer_into(file, jobs)
    content = file.read_bytes()
    for size in range(0, len(content) + 1):
        file.write_bytes(content[:size])
        kept = content[:size].count(b"\n")
        asked = []

        class Noting(Shouter):
            def run(self, requests: list[Request], *rest: None) -> Iterator[tuple[int, list[int]]]:
                asked.extend(request.prompt for request in requests)
                return super().run(requests, *rest)

        found = answer_into(file, jobs, Noting())
        assert found[:kept] == whole[:kept]
        assert by_index(found) == by_index(whole)
        todo = {record["index"] for record in whole[kept:]} - {1}
        assert {job.index for job in jobs if job.prompt in asked} == todo
    assert capsys.readouterr().out == ""


def test_each_record_is_on_the_disk_before_the_next_is_begun(
    tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.jsonl"
    synced = []

    def note(descriptor: int) -> None:
        synced.append(file.read_bytes().count(b"\n"))

    monkeypatch.setattr(os, "fsync", note)
    answer_into(file, jobs)
    assert synced == list(range(1, len(jobs) + 1))


def test_waiting_counts_until_a_row_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy(Shouter):
        def run(self, requests: list[Request], *rest: None) -> Iterator[tuple[int, list[int]]]:
            self.started[0] = 3.0
            yield 0, [5]

    monkeypatch.setattr(time, "perf_counter", iter([0.0, 5.0]).__next__)
    [news] = work_off({0: plain_jobs("a")[0]}, Busy(), None, None)
    record = news.record
    assert (record["queued_s"], record["first_token_s"]) == (3.0, 2.0)


def test_each_record_is_in_the_file_before_the_next_answer_ends(
    tmp_path: Path, jobs: list[Job]
) -> None:
    file = tmp_path / "out.jsonl"
    sizes = []

    class Watching(Shouter):
        def run(self, requests: list[Request], *rest: None) -> Iterator[tuple[int, list[int]]]:
            for news in super().run(requests, *rest):
                sizes.append(file.read_bytes().count(b"\n"))
                yield news

    answer_into(file, jobs, Watching())
    assert sizes == sorted(sizes) and set(sizes) == set(range(1, 7))


def test_other_prompts_or_settings_are_refused(tmp_path: Path, jobs: list[Job]) -> None:
    file = tmp_path / "out.jsonl"
    answer_into(file, jobs)
    before = file.read_bytes()
    words = FILE.encode()
    others = [
        jobs_of(words.replace(b"two", b"TWO") + b"\n\xff\n", tmp_path),
        jobs_of(words + b"\n\xff\n", tmp_path, temperature=1.0),
        jobs_of(words + b"\n\xfe\n", tmp_path),
        jobs_of(words, tmp_path),
    ]
    for other in others:
        with pytest.raises(ValueError, match="answers another prompt .*choose another file"):
            answer_into(file, other)
        assert file.read_bytes() == before
    longer = jobs_of(words + b"\n\xff\nmore", tmp_path)
    assert by_index(answer_into(file, longer))[-1] == (7, "MORE")


@pytest.mark.parametrize("content", [
    b"a shopping list\n", b"a shopping list", b'{"prompt": "x"}\n', b'{"prompt": "x"}', b"[]\n",
    b"\0\0\0", b"\xff\n", b'{"index": [1], "sample": 0, "digest": "x"}\n', b"\n",
    b'{"index": Infinity, "sample": 0, "digest": "x"}\n',
    b'{"index": ' + 50_000 * b"[" + b"\n", b'{"index": 3}', b'{"index": 3, "sample": 1, "x',
    b'{"index": 0, "sample": 0, "text": "of another program"}',
])
def test_a_file_of_something_else_is_left_alone(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="line 1 of .*notes.txt is no answer of an earlier run"):
        Records(str(file))
    assert file.read_bytes() == content


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    for path, message in [
        (tmp_path, "Is a directory"), (tmp_path / "no" / "out", "No such file"),
        ("/dev/null", "is no plain file"), ("/dev/full", "is no plain file"),
        ("", "Is a directory"),
    ]:
        with pytest.raises(ValueError, match=message):
            Records(str(path))


@pytest.mark.parametrize("theirs", ["empty", "link", "put there meanwhile"])
def test_only_a_file_of_the_run_itself_is_removed(theirs: str, tmp_path: Path) -> None:
    """Where it has written nothing."""
    file = tmp_path / "out.jsonl"
    if theirs == "empty":
        file.touch()
    elif theirs == "link":
        file.symlink_to(tmp_path / "elsewhere.jsonl")
    with Records(str(file)):
        if theirs == "put there meanwhile":
            file.unlink()
            file.touch()
    assert os.listdir(tmp_path) == ["out.jsonl"]
    assert file.is_symlink() == (theirs == "link")


@pytest.mark.parametrize("gone", [False, True])
def test_a_file_that_is_replaced_meanwhile_ends_the_run(
    gone: bool, tmp_path: Path, jobs: list[Job]
) -> None:
    """What comes then would be lost, or written into what somebody else put there."""
    file = tmp_path / "out.jsonl"

    class Replacing(Shouter):
        def run(self, requests: list[Request], *rest: None) -> Iterator[tuple[int, list[int]]]:
            file.unlink()
            if not gone:
                file.write_text("mine")
            return super().run(requests, *rest)

    with pytest.raises(ValueError, match="was removed or replaced while this run had it open"):
        answer_into(file, jobs, Replacing())
    assert not file.exists() if gone else file.read_text() == "mine"


def test_half_an_answer_stays_until_the_run_goes_on(tmp_path: Path, jobs: list[Job]) -> None:
    """A run that fails before, by its model or its prompts, has changed nothing."""
    file = tmp_path / "out.jsonl"
    answer_into(file, jobs)
    half = file.read_bytes()[:-9]
    file.write_bytes(half)
    with Records(str(file)) as records:
        records.left_of(jobs)
    with pytest.raises(ValueError, match="answers another prompt"):
        answer_into(file, plain_jobs("other"))
    assert file.read_bytes() == half


def test_other_weights_at_the_same_path_are_others(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"some weights")
    without = files_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    before = files_of(tmp_path)
    assert before != without
    (tmp_path / "answers.jsonl").write_text("{}")  # an --output may lie beside them
    assert files_of(tmp_path) == before == files_of(os.path.relpath(tmp_path))
    file.write_bytes(b"same length:")
    assert files_of(tmp_path) != before


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    file = str(tmp_path / "out.jsonl")
    with Records(file):
        with pytest.raises(ValueError, match="another run is writing to --output"):
            Records(file)
    with Records(file):
        pass
    assert not Path(file).exists()  # nothing was written


def test_a_full_disk_keeps_what_was_written(
    tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full within the third record; with room again, the run goes on."""
    file = tmp_path / "out.jsonl"
    write = os.write
    room = [400]

    def short_write(fd: int, data: bytes) -> int:
        n = min(len(data), room[0], 100)
        if n == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= n
        return write(fd, data[:n])

    monkeypatch.setattr("os.write", short_write)
    with pytest.raises(ValueError, match="cannot write --output .*: No space left on device; wh"):
        answer_into(file, jobs)
    assert file.stat().st_size == 400
    kept = file.read_bytes().splitlines()[:-1]
    assert kept
    room[0] = 10**6
    found = answer_into(file, jobs)
    assert [json.loads(line) for line in kept] == found[:len(kept)]
    assert by_index(found) == by_index(answer_into(tmp_path / "whole.jsonl", jobs))


# --- the command line ---

@pytest.fixture
def cli(capfd: pytest.CaptureFixture, tiny: Path) -> Callable[..., Outcome]:
    """generate.py's main on the CPU, with the tiny model in float32."""
    flags = ["--device", "cpu", "--checkpoint_path", tiny, "--dtype", "float32"]
    return partial(run_cli, capfd, *flags, "--max_new_tokens", 10)


def texts(out: str) -> list[str]:
    """The texts of records, in the order of their indexes."""
    found = sorted(records(out), key=lambda r: (r["index"], r["sample"]))
    return [record.get("text") for record in found]


def records(out: str) -> list[dict]:
    """The records that --json or --output wrote; --json a line of the run behind them."""
    lines = list(map(json.loads, out.splitlines()))
    return lines if "index" in lines[-1] else lines[:-1]


REQUESTS = [
    {"prompt": "one two three"},
    {"prompt": "four", "temperature": 1.0, "seed": 3},
    {"messages": [{"role": "user", "content": "five"}], "max_new_tokens": 4},
    {"prompt": "six", "temperature": 2, "top_p": 0.9, "top_k": 50, "min_p": 0.001},
    {"prompt": "seven eight", "max_new_tokens": 1000},
]


@pytest.fixture
def request_file(tmp_path: Path) -> Path:
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps(request) + "\n" for request in REQUESTS))
    return file


def test_a_request_does_not_feel_its_neighbours(
    cli: Callable[..., Outcome], request_file: Path, tmp_path: Path
) -> None:
    """Rows of one, two and eight give each request what it gets in a file of its own."""
    flags = ["--json", "--seed", 5]
    code, alone, _ = cli("--prompts", request_file, *flags)
    assert code == 0
    want = texts(alone)
    for rows in (2, 8):
        code, out, _ = cli("--prompts", request_file, *flags, "--batch_size", rows)
        assert code == 0 and texts(out) == want
    for i in (1, 2):  # they have a seed of their own, or need none
        one = tmp_path / "one.jsonl"
        one.write_text(json.dumps(REQUESTS[i]))
        assert texts(cli("--prompts", one, "--json")[1]) == [want[i]]


def test_a_prompt_in_the_template_is_a_conversation_of_one_message(
    cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    file = tmp_path / "p.jsonl"
    message = {"role": "user", "content": "one two"}
    file.write_text(json.dumps({"prompt": "one two"}) + "\n" + json.dumps({"messages": [message]}))
    plain, chat = texts(cli("--prompts", file, "--json")[1])
    assert texts(cli("--prompts", file, "--json", "--chat")[1]) == [chat, chat] != [plain, chat]


def test_a_model_without_a_template_answers_the_other_lines(
    cli: Callable[..., Outcome], tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").unlink()
    file = tmp_path / "p.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "x"}]}\n{"prompt": "one"}')
    code, out, err = cli("--prompts", file, "--checkpoint_path", folder, "--json")
    assert code == 0 and len(records(out)) == 2
    assert "line 1: this model has no chat template" in err


def test_finish_reasons(cli: Callable[..., Outcome], request_file: Path) -> None:
    _, out, _ = cli("--prompts", request_file, "--json", "--max_seq_len", 60)
    found = {record["index"]: record for record in records(out)}
    assert found[2]["finish_reason"] == "length" and found[2]["new_tokens"] == 4
    last = found[4]
    assert last["finish_reason"] == "context"
    assert last["prompt_tokens"] + last["new_tokens"] == 60


def test_a_bad_line_has_a_record_and_the_run_goes_on(
    cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    file = tmp_path / "p.jsonl"
    lines = [b'{"prompt": "one"}', b"{", b"\xff", b'{"prompt": ""}',
             json.dumps({"prompt": 999 * "long "}).encode(), b'{"prompt": "two"}']
    file.write_bytes(b"\n".join(lines))
    code, out, err = cli("--prompts", file, "--json", "--batch_size", 2)
    found = records(out)
    errors = {record["index"]: record["error"] for record in found if "error" in record}
    assert code == 0 and len(found) == 6
    assert errors[1].startswith("line 2: not JSON: ")
    assert errors[2] == "line 3: it is not UTF-8: byte 0xff"
    assert errors[4].endswith("tokens leaves no room for a new one in the context of 256")
    for error in errors.values():
        assert error in err.splitlines()
    assert "4 of 6 answers missing, as what asks for them is wrong: see above" in err
    assert "2 of 6 answers cut after --max_new_tokens" in err


def test_a_file_of_bad_lines_only_fails(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("{\n{\n")
    code, out, err = cli("--prompts", file, "--json")
    assert code == 2 and len(out.splitlines()) == 2
    last = err.splitlines()[-1]
    assert last == f"generate.py: error: none of the 2 prompts of {file} could be answered"


def test_stop_strings_work_everywhere(
    cli: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole, _ = cli("--prompt", "one two")
    stop = whole[3:6]
    want = whole[:whole.index(stop)]
    assert cli("--prompt", "one two", "--stop", stop, "--stop", "\0 never")[1] == want + "\n"

    [result] = records(cli("--prompt", "one two", "--stop", stop, "--json")[1])
    assert result["text"] == want and result["finish_reason"] == "stop"
    assert result["new_tokens"] < 10

    file = tmp_path / "p.jsonl"
    own = {"prompt": "one two", "stop": [stop]}
    file.write_text(json.dumps(own) + '\n{"prompt": "one two"}\n')
    assert texts(cli("--prompts", file, "--json")[1]) == [want, whole[:-1]]
    file.write_text('{"prompt": "one two"}')
    assert cli("--prompts", file, "--stop", stop)[1] == f"[0] one two\n{want}\n\n"

    _, reply, _ = chat(cli, monkeypatch)
    stop = reply[2:4]
    assert chat(cli, monkeypatch, "--stop", stop)[1] == reply[:reply.index(stop)] + "\n"


def chat(cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, *flags: str) -> Outcome:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    return cli("--interactive", *flags)


def test_several_answers_to_one_prompt(cli: Callable[..., Outcome]) -> None:
    """As many as --num_samples says, whatever the rows; the seed of each is the next one."""
    flags = ["--prompt", "one", "--temperature", 1.0, "--json", "--seed"]
    _, out, _ = cli(*flags, 4, "--num_samples", 3)
    three = texts(out)
    assert len(set(three)) == 3
    for rows in (2, 8):
        _, out, _ = cli(*flags, 4, "--num_samples", 3, "--batch_size", rows)
        assert texts(out) == three
    assert texts(cli(*flags, 5, "--batch_size", 4)[1]) == [three[1]]


def test_a_second_run_goes_on(
    cli: Callable[..., Outcome], request_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "out.jsonl"
    flags = ["--prompts", request_file, "--seed", 1, "--batch_size", 2, "--output", file]
    code, out, _ = cli(*flags)
    whole = file.read_text()
    assert code == 0 and out == ""
    for size in (0, 500, len(whole)):
        file.write_text(whole[:size])
        code, out, err = cli(*flags)
        assert code == 0 and out == "" and file.read_text().startswith(whole[:size])
        n_kept = whole[:size].count("\n")
        assert (f"has {n_kept} answers already; {5 - n_kept} are left" in err) == (n_kept > 0)
        assert texts(file.read_text()) == texts(whole)
    monkeypatch.setattr("cli.program.load", None)  # what is answered needs no model
    code, out, err = cli(*flags)
    assert (code, out) == (0, "") and "has 5 answers already; 0 are left" in err
    code, _, err = cli(*flags, "--temperature", 0.5)
    assert code == 2 and "give the prompts and flags that it was begun with" in err


def test_a_text_to_calibrate_on_is_read_once(
    cli: Callable[..., Outcome], request_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that a pipe will do, and early, so that a typo shows at once."""
    flags = ["--prompts", request_file, "--quantize", "int8", "--calibrate"]
    end, begin = os.pipe()
    os.write(begin, 999 * b"one two ")
    os.close(begin)
    assert cli(*flags, f"/dev/fd/{end}", "--output", tmp_path / "out.jsonl")[0] == 0
    os.close(end)
    monkeypatch.setattr("cli.program.open_checkpoint", None)
    code, _, err = cli(*flags, "/no/such/text")
    assert code == 2 and "cannot read --calibrate /no/such/text: No such file" in err


def test_a_run_goes_on_only_with_what_its_answers_were_made_by(
    cli: Callable[..., Outcome], request_file: Path, tmp_path: Path
) -> None:
    """The text that the model is calibrated on, and what records hold of a prompt."""
    text = tmp_path / "text"
    text.write_text(999 * "one two ")
    file = tmp_path / "out.jsonl"
    flags = ["--prompts", request_file, "--output", file, "--logprobs", 0, "--seed", 1]
    flags += ["--quantize", "int8", "--calibrate", text]
    assert cli(*flags)[0] == cli(*flags)[0] == 0
    whole = file.read_text()
    assert cli(*flags, "--echo")[0] == 2
    text.write_text(999 * "three four ")
    code, _, err = cli(*flags)
    assert code == 2 and "or with other settings" in err and file.read_text() == whole


@pytest.mark.parametrize("flags, message", [
    ("--prompts {p} --output {p}", "--output goes to another file than --prompts comes from"),
    ("--prompts /dev/zero", "cannot read --prompts /dev/zero: it has more than 256 MiB"),
    ("--prompt @/dev/zero", "cannot read the prompt @/dev/zero: it has more than 256 MiB"),
    ("--prompts {p} --output /", "cannot write --output /: Is a directory"),
    ("--prompts {p} --output /no/such/folder", "cannot write --output /no/such/folder: No such"),
    ("--prompts /no/such/file", "cannot read --prompts /no/such/file: "),
    ("--prompts /", "cannot read --prompts /: "),
    ("--interactive --system @/no/such/file", "cannot read the system message @/no/such/file: "),
    ("--prompt x --output x", "--output goes with --prompts"),
    ("--interactive --output x", "--output goes with --prompts"),
    ("--prompts {p} --output x --profile y", "--output goes without --profile"),
    ("--prompt x --stop=", "--stop takes no empty text, which would end every answer at once"),
    ("--benchmark --stop x", "--stop goes without --benchmark"),
    ("--prompt x --temperature inf", "inf is not at least 0 and at most 1000"),
    ("--prompt x --temperature 1 --top_k 99999999999999999999", "--top_k"),
    ("--prompt 99999999999999", "leaves no room"),
    ("--prompt \ud8ff", "the prompt has half a character"),
])
def test_mistakes_get_one_sentence(
    cli: Callable[..., Outcome], request_file: Path, flags: str, message: str
) -> None:
    before = request_file.read_text()
    code, out, err = cli(*(word.format(p=request_file) for word in flags.split()))
    last = err.splitlines()[-1]
    assert code == 2 and out == "" and "Traceback" not in err
    assert last.startswith("generate.py: error: ") and message in last
    assert request_file.read_text() == before


@pytest.mark.parametrize("flags, message", [
    ("--prompt @/no/such/file", "cannot read the prompt @/no/such/file: "),
    ("--prompts /no/such/file", "cannot read --prompts /no/such/file: "),
    ("--prompts {p} --output /no/such/folder", "cannot write --output /no/such/folder: "),
    ("--interactive --system @/no/such/file", "cannot read the system message @/no/such/file: "),
    ("--prompt x --profile /no/such/file", "cannot read or write /no/such: "),
    ("--prompt x --profile /", "--profile / is there and no trace"),
    ("--prompt x --profile {p}", "is there and no trace"),
    ("--quantize int8 --save /dev/null/q", "cannot write /dev/null/q: "),
    ("--quantize int8 --save .", "exists already"),
    ("--prompt x --speculate_k 2 --draft_checkpoint_path /no/such/model", "/no/such/model"),
    ("--checkpoint_path /no/such/model", "/no/such/model"),
    ("--quantize int8 --save {p}", "exists already"),
])
def test_a_typo_in_a_path_shows_before_a_model_is_loaded(
    cli: Callable[..., Outcome], request_file: Path, monkeypatch: pytest.MonkeyPatch, flags: str,
    message: str,
) -> None:
    def load(*args: object, **options: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("generate.load_model", load)
    code, _, err = cli(*(word.format(p=request_file) for word in flags.split()))
    assert code == 2 and message in err


def test_a_number_of_random_tokens_says_so_and_how_to_mean_the_text(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, err = cli("--prompt", 19, "--json")
    assert records(out)[0]["prompt_tokens"] == 19
    assert "--prompt 19 is 19 random tokens, as in gpt-fast; for this text: printf 19 | " in err
    monkeypatch.setattr("sys.stdin", io.StringIO("19"))
    _, out, err = cli("--prompt", "-", "--json")
    assert records(out)[0]["prompt_tokens"] < 19 and "random tokens" not in err


def test_a_system_message_goes_in_front_of_each_prompt(
    cli: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file, a flag and a conversation; messages of one's own stay as they are."""
    file = tmp_path / "p.jsonl"
    system = {"role": "system", "content": "be kind"}
    user = {"role": "user", "content": "one two"}
    file.write_text("\n".join(json.dumps(entry) for entry in (
        {"prompt": "one two"}, {"messages": [system, user]}, {"messages": [user]})))
    flags = ["--chat", "--system", "be kind"]
    with_it, same, without = texts(cli("--prompts", file, "--json", *flags)[1])
    assert with_it == same != without
    _, out, _ = cli("--prompt", "one two", "--json", *flags)
    assert texts(out) == [same]
    monkeypatch.setattr("sys.stdin", io.StringIO("one two"))
    assert cli("--interactive", "--system", "be kind")[1] == same + "\n"


def test_an_answer_behind_one_that_ctrl_c_ended_is_that_of_the_whole_conversation(
    cli: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the engine had under way: a run with a cache of its own answers the same."""
    saved = tmp_path / "saved.json"
    steps = []
    launch = Engine.launch

    def interrupted(engine: Engine, began: float) -> Launch:
        steps.append(began)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return launch(engine, began)

    monkeypatch.setattr(Engine, "launch", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"one two\nthree\n/save {saved}\n"))
    cli("--interactive")
    messages = json.loads(saved.read_text())
    assert len(messages) == 4 and len(steps) > 5
    saved.write_text(json.dumps(messages[:2]))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/load {saved}\nthree\n"))
    assert cli("--interactive")[1] == messages[3]["content"] + "\n"


def test_regen_draws_other_numbers_whatever_the_seed(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    outs = []
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO("one\n/regen\n"))
        outs.append(cli("--interactive", "--seed", 3, "--temperature", 1, "--max_new_tokens", 5)[1])
    assert outs[0] == outs[1]
    half = len(outs[0]) // 2
    assert outs[0][:half] != outs[0][half:]


def test_a_run_says_how_many_answers_were_cut(cli: Callable[..., Outcome]) -> None:
    flags = ["--prompt", "one two", "--num_samples", 2]
    assert "2 of 2 answers cut after --max_new_tokens\n" in cli(*flags)[2]
    err = cli(*flags, "--max_seq_len", 9)[2]
    assert "2 of 2 answers cut where the context is full\n" in err
    whole = cli("--prompt", "one two")[1]
    assert " cut " not in cli("--prompt", "one two", "--stop", whole[3:6])[2]


def test_a_model_for_chats_that_says_nothing_to_a_prompt_is_asked_in_its_template(
    cli: Callable[..., Outcome], tiny: Path, tmp_path: Path
) -> None:
    """Whether batching/ is at work or not. The text begins with what ends it here."""
    model, tokenizer = load_model(tiny, dtype=torch.float32), load_tokenizer(tiny)
    prompts = ["one", *WORDS]
    [first], *firsts = generate(model, list(map(tokenizer.encode, prompts)), 1)
    other = WORDS[[ids != [first] for ids in firsts].index(True)]
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": first}))
    for flags in ([], ["--num_samples", 2]):
        code, out, err = cli("--checkpoint_path", folder, "--prompt", "one", *flags)
        assert code == 0 and NO_TEXT in err and " 0% of its rows" not in err
        assert NO_TEXT not in cli("--checkpoint_path", folder, "--prompt", other, *flags)[2]


def command(tiny: Path, *flags: object) -> list[str]:
    """generate.py's own process with the tiny model."""
    given = ["--device", "cpu", "--checkpoint_path", tiny, *flags]
    return [sys.executable, str(HERE / "generate.py"), *map(str, given)]


def test_a_reader_that_leaves_ends_the_run_quietly(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("one two\n" * 1000)  # whose answers a pipe does not hold
    run = subprocess.Popen(
        command(tiny, "--prompts", file, "--max_new_tokens", 50), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=CPU_ENV)
    assert run.stdout.readline() == b"[0] one two\n"
    run.stdout.close()
    assert not ours(run.stderr.read().decode()) and run.wait(PATIENCE_S) == 141


def test_progress_is_shown_on_a_terminal(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("one two\n" * 5)
    terminal, side = pty.openpty()
    flags = ["--prompts", file, "--json", "--max_new_tokens", 9]
    run = subprocess.Popen(
        command(tiny, *flags), stdout=subprocess.PIPE, stderr=side, env=CPU_ENV)
    os.close(side)
    shown = read_to_end(terminal)
    assert len(records(run.communicate()[0].decode())) == 5
    assert " 5/5 [" in shown and " tokens/s" in shown.split(" 5/5 [")[1]


def test_killed_runs_lose_and_repeat_nothing(tiny: Path) -> None:
    """Ten SIGKILLs at random moments; checks/kill.py does the same with more prompts and a real
    model."""
    flags = ["--prompts", 50, "--kills", 10, "--checkpoint_path", tiny, "--longest", 60]
    run = subprocess.run(
        [sys.executable, HERE / "checks" / "kill.py", *map(str, flags)], env=CPU_ENV,
        capture_output=True, text=True, timeout=PATIENCE_S)
    assert run.returncode == 0, run.stderr
    last = run.stdout.splitlines()[-1]
    assert last.endswith(" kills: 50 prompts, none lost, none repeated, all the same")
    assert int(last.split()[0]) >= 5
