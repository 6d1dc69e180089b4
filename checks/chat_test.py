"""Tests of a conversation: its turns and commands, and what a terminal sends."""
import io
import json
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from checks.common import CPU_ENV, HERE, PATIENCE_S
from cli.chat import Chat
from cli.stats import LONG, with_bar

END = 0  # the token that ends a turn
Show = Callable[[int, list[int]], None]


class Letters:
    """A tokenizer of one token a character; a turn of a conversation ends with END."""
    eos_ids = {END}

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) for i in ids if i != END)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        ids = []
        for message in messages:
            ids += [*self.encode(f"{message['role'][0]}:{message['content']}"), END]
        return [*ids, *self.encode("a:")]


@dataclass
class FakeReply:
    """Gives prepared answers, shows them a token at a time, and keeps what it was asked.

    An answer that does not end with END was cut. An exception in it is raised in its place.
    cache holds the tokens that a real cache would: those behind `cached` are dropped, new ones are
    written, and so is every answered token but the last, which is never fed."""
    answers: list[list[int | BaseException]]
    room: int = 1000
    cache: list[int] = field(default_factory=list)
    calls: list[tuple[list[int], int]] = field(default_factory=list)
    seen: list[list[int]] = field(default_factory=list)  # all tokens in front of each answer
    attempts: list[int] = field(default_factory=list)

    def __call__(self, ids: list[int], cached: int, show: Show, attempt: int) -> str:
        new = ids[cached:]
        assert new and ids[:cached] == self.cache[:cached]
        self.calls.append((new, cached))
        self.attempts.append(attempt)
        self.cache = list(ids)
        self.seen.append(list(self.cache))
        answer = self.answers[len(self.calls) - 1]
        for token in answer:
            if isinstance(token, BaseException):
                raise token
            show(0, [token])
            self.cache.append(token)
        self.cache.pop()
        if answer[-1] == END:
            return "eos"
        return "context" if len(self.cache) + 1 == self.room else "length"


def chat(
    tokenizer: Letters, reply: FakeReply, room: int, stop: Sequence[str] = (),
    system: str | None = None, shift: bool = False,
) -> Chat:
    """A conversation with that in the place of a model, whose cache holds so many tokens."""
    settings = {"stop": stop, "max_new_tokens": 8, "temperature": 0.0, "top_k": None}
    settings["logprobs"] = None  # which no conversation shows
    made = Chat(SimpleNamespace(context=room), tokenizer, settings, system, shift)
    made.reply = lambda ids, cached, show: reply(ids, cached, show, made.attempt)
    return made


def talk(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], answers: list[list[int]], room: int = 1000,
    system: str | None = None, shift: bool = False,
) -> FakeReply:
    """Run a conversation in which the user writes these lines."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    reply = FakeReply(answers, room)
    chat(Letters(), reply, room, system=system, shift=shift).run()
    return reply


def spoken(text: str) -> list[int]:
    """An answer that ends its turn."""
    return [*Letters().encode(text), END]


def asked(text: str) -> list[int]:
    return Letters().encode(text)


# --- turns ---

def test_a_turn_feeds_only_what_is_new(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reply = talk(monkeypatch, ["one", "two"], [spoken("Hi"), spoken("Ho")])
    first = asked("u:one\0a:")
    # END closes the first answer but was never fed, so it is new in the second turn
    assert reply.calls == [(first, 0), (asked("\0u:two\0a:"), len(first) + len("Hi"))]
    assert capsys.readouterr().out == "Hi\nHo\n"


def test_what_follows_a_stop_string_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not printed, and the next turn's conversation ends in front of it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo"))
    reply = FakeReply([Letters().encode("Hi##u"), spoken("Ho")])
    chat(Letters(), reply, 1000, stop=["##", "never"]).run()
    assert reply.seen[1] == asked("u:one\0a:Hi\0u:two\0a:")
    assert capsys.readouterr().out == "Hi\nHo\n"


def test_the_reply_sees_the_whole_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = talk(monkeypatch, ["a", "b", "c"], [spoken("x"), spoken("y"), spoken("z")])
    assert reply.seen[-1] == asked("u:a\0a:x\0u:b\0a:y\0u:c\0a:")


def test_a_cut_answer_does_not_count_its_last_token_as_cached(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = Letters().encode("Hel")  # ended by max_new_tokens, not by END
    reply = talk(monkeypatch, ["one", "two"], [cut, spoken("Ho")])
    first, _ = reply.calls[0]
    new, cached = reply.calls[1]
    assert cached == len(first) + 2
    assert new[0] == ord("l")
    assert reply.seen[1] == asked("u:one\0a:Hel\0u:two\0a:")


def test_one_token_at_least_is_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template may drop the conversation, so that nothing of the new turn is new."""

    class Forgetful(Letters):
        def chat(self, messages: list[dict[str, str]]) -> list[int]:
            return [7, 8, 9]

    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    reply = FakeReply([spoken("Hi"), spoken("Ho")])
    chat(Forgetful(), reply, 1000).run()
    assert reply.calls == [([7, 8, 9], 0), ([9], 2)]


def test_blank_lines_and_prompts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reply = talk(monkeypatch, ["", "  one  ", "   "], [spoken("Hi")])
    assert reply.seen == [asked("u:one\0a:")]
    assert capsys.readouterr().err == "> " * 4 + "\n"


def test_quotes_make_several_lines_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ['"""one', "", '  two"""', '"""three"""', '"""', "/bye", '"""', '"""open', "end"]
    reply = talk(monkeypatch, lines, [spoken(".")] * 4)
    last = "".join(f"u:{text}\0a:.\0" for text in ("one\n\n  two", "three", "/bye"))
    assert reply.seen[-1] == asked(f"{last}u:open\nend\0a:")


@pytest.mark.parametrize("room, said", [
    (20, "this message is too long: with what the template adds it has 20 tokens, and the context "
         "of 20 has to hold an answer too\n"),
    (21, "the context of 21 tokens is full; /drop"),
])
def test_a_turn_that_does_not_fit_is_refused_and_forgotten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], room: int, said: str
) -> None:
    """A message that is too long alone is not the same as one that is so behind others."""
    long = "x" * (20 - len("u:\0a:"))
    reply = talk(monkeypatch, ["hi", long, "ho"], [spoken("y"), spoken("z")], room)
    assert reply.seen == [asked("u:hi\0a:"), asked("u:hi\0a:y\0u:ho\0a:")]
    err = capsys.readouterr().err
    assert said in err and err.count("context") == 1


@pytest.mark.parametrize("answer, said", [
    (Letters().encode("abc"), "the answer was cut: the context of {} tokens is full; /drop"),
    (spoken("ab"), ""),  # ended there by itself
    (Letters().encode("ab"), "the answer was cut after --max_new_tokens 2"),
])
def test_an_answer_says_why_it_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: list[int],
    said: str,
) -> None:
    room = len("u:hi\0a:") + 3
    talk(monkeypatch, ["hi"], [answer], room)
    err = capsys.readouterr().err
    assert said.format(room) in err and ("cut" in err) == bool(said)


def test_what_the_cache_has_lost_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where layers keep a sliding window only, which has passed the tokens to go on from."""

    class Forgetful(FakeReply):
        def __call__(self, ids: list[int], cached: int, show: Show, attempt: int) -> str:
            if 0 < cached < len(self.cache):
                raise ValueError("the window has passed them")
            return super().__call__(ids, cached, show, attempt)

    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/regen\ntwo\n"))
    reply = Forgetful([spoken("Hi"), spoken("Ho"), spoken("x")])
    chat(Letters(), reply, 1000).run()
    assert [cached for _, cached in reply.calls] == [0, 0, len("u:one\0a:Ho")]
    assert reply.seen[2] == asked("u:one\0a:Ho\0u:two\0a:")


def test_an_answer_that_breaks_off_is_not_printed_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [spoken("Hi"), [*Letters().encode("He"), ValueError("broken")], spoken("Ho")]
    reply = talk(monkeypatch, ["one", "two"], answers)
    assert len(reply.calls) == 2
    shown = capsys.readouterr()
    assert shown.out == "Hi\nHe" and "broken" in shown.err


# --- Ctrl-C ---

def test_ctrl_c_ends_the_answer_and_keeps_what_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [[*Letters().encode("Hel"), KeyboardInterrupt()], spoken("Ho")]
    reply = talk(monkeypatch, ["one", "two"], answers)
    assert reply.seen[1] == asked("u:one\0a:Hel\0u:two\0a:")
    assert reply.calls[1][1] == len("u:one\0a:He")  # the last one may not have been fed
    assert capsys.readouterr().out == "Hel\nHo\n"


def test_an_output_that_nobody_reads_ends_the_conversation(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BrokenPipeError):
        talk(monkeypatch, ["one", "two"], [[*Letters().encode("He"), BrokenPipeError()]])


def test_ctrl_c_before_an_answer_forgets_the_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is anything taken for cached that a half-read message has overwritten."""
    answers = [spoken("Hi"), [KeyboardInterrupt()], spoken("Ho")]
    reply = talk(monkeypatch, ["one", "/clear", "another", "one"], answers)
    assert reply.seen[2] == asked("u:one\0a:")
    assert reply.calls[2][1] == len("u:")
    assert "the answer had not begun" in capsys.readouterr().err


def test_ctrl_c_while_an_answer_is_printed_leaves_the_cache_known(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it hits: what a lost answer has overwritten is not taken for cached."""

    class Interrupted(Letters):
        def decode(self, ids: list[int]) -> str:
            if ids and ids[-1] == ord("!"):
                raise KeyboardInterrupt
            return super().decode(ids)

    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/clear\nand\none\n"))
    reply = FakeReply([spoken("Hi"), Letters().encode("H!"), spoken("Ho")])
    chat(Interrupted(), reply, 1000).run()
    assert reply.seen[2] == asked("u:one\0a:")


def test_two_ctrl_c_at_the_prompt_leave(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Keyboard(io.StringIO):
        def readline(self) -> str:
            line = super().readline()
            if line == "^C\n":
                raise KeyboardInterrupt
            return line

    monkeypatch.setattr("sys.stdin", Keyboard("^C\none\n^C\n^C\ntwo\n"))
    reply = FakeReply([spoken("Hi")])
    with pytest.raises(KeyboardInterrupt):
        chat(Letters(), reply, 1000).run()
    assert len(reply.calls) == 1
    assert capsys.readouterr().err.count("Ctrl-C again or Ctrl-D leaves") == 2


# --- commands ---

def test_clear_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = talk(monkeypatch, ["one", "/clear", "two"], [spoken("Hi"), spoken("Ho")], system="s")
    assert reply.seen[1] == asked("s:s\0u:two\0a:")


def test_bye_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert talk(monkeypatch, ["/bye", "one"], []).calls == []


def test_an_unknown_command_says_so_and_a_path_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/Clear", "/foo bar", "/usr/bin", " /foo", "/ x", "/* a */"]
    reply = talk(monkeypatch, lines, [spoken("y")] * 4)
    said = asked("u:/usr/bin\0a:y\0u:/foo\0a:y\0u:/ x\0a:y\0u:/* a */\0a:")
    assert reply.seen[-1] == said
    err = capsys.readouterr().err
    assert "unknown command /Clear; /help lists them" in err and "unknown command /foo;" in err


def test_help_names_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(monkeypatch, ["/help"], [])
    err = capsys.readouterr().err
    for name in "/clear /system /regen /save /load /stats /help /bye /drop".split():
        assert re.search(rf"^(> )?{name} ", err, re.MULTILINE)


def test_regen_answers_again_with_other_random_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/regen", "one", "/regen", "/regen", "two"]
    reply = talk(monkeypatch, lines, [spoken("Hi"), spoken("Ho"), spoken("Ho"), spoken("x")])
    assert reply.attempts == [0, 1, 2, 0]
    assert reply.seen[1] == reply.seen[0]
    assert reply.seen[3] == asked("u:one\0a:Ho\0u:two\0a:")
    err = capsys.readouterr().err
    assert "nothing was answered yet" in err
    assert err.count("the same answer; --temperature above 0 gives others") == 1


def test_regen_that_is_interrupted_keeps_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [spoken("Hi"), [KeyboardInterrupt()], spoken("Ho")]
    reply = talk(monkeypatch, ["one", "/regen", "two"], answers)
    assert reply.seen[2] == asked("u:one\0a:Hi\0u:two\0a:")
    assert "the same answer" not in capsys.readouterr().err


def test_drop_forgets_the_oldest_turns_and_keeps_the_system_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/drop", "a", "b", "c", "/drop 0", "/drop 4", "/drop x", "/drop 2", "d", "/drop", "e"]
    reply = talk(monkeypatch, lines, [spoken("y")] * 5, system="s")
    assert reply.seen[3] == asked("s:s\0u:c\0a:y\0u:d\0a:")
    assert reply.seen[4] == asked("s:s\0u:d\0a:y\0u:e\0a:")
    err = capsys.readouterr().err
    assert "there is nothing to drop" in err
    assert [n in err for n in ("1 to 3, not 0", "not 4", "not x")] == [True] * 3


def test_an_answer_that_was_cut_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/continue", "one", "/continue", "/continue", "two"]
    reply = talk(monkeypatch, lines, [asked("Hel"), spoken("lo"), spoken("Ho")])
    assert reply.calls[1] == (asked("l"), len("u:one\0a:He"))
    assert reply.seen[2] == asked("u:one\0a:Hello\0u:two\0a:")
    out, err = capsys.readouterr()
    assert out == "Hel\nlo\nHo\n"
    assert "cut after --max_new_tokens 3; /continue goes on with it" in err
    assert err.count("no answer was cut") == 2


def test_an_answer_by_a_grammar_does_not_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    """It would begin anew."""
    talk = chat(Letters(), FakeReply([asked("Hel")]), 1000)
    talk.settings["processors"] = [abs]
    for line in ("one", "/continue"):
        talk.take(line)
    assert talk.messages[-1]["content"] == "Hel"
    assert "by a grammar no answer goes on" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["/clear", "/drop"])
def test_an_answer_that_was_forgotten_does_not_go_on(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(monkeypatch, ["one", line, "/continue"], [asked("Hel")])
    assert "no answer was cut" in capsys.readouterr().err


def test_the_oldest_turns_go_where_they_may(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, answers = ["a", "b", "c", "d"], [spoken("y")] * 4
    reply = talk(monkeypatch, lines, answers, room=34, system="s", shift=True)
    before = "s:s\0u:b\0a:y\0u:c\0a:y\0u:d\0a:"
    assert len(before) + 8 == 34 and reply.seen[3] == asked(before)
    assert capsys.readouterr().err.count("dropped the oldest turn\n") == 1


def test_settings_can_be_set_and_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/set top_k 5", "/set temperature 0.5", "/set", "/set top_k -", "/set", "/set top_k x",
             "/set max_new_tokens -", "/set temperature 2000", "/set stop x", "/quit", "one"]
    assert not talk(monkeypatch, lines, []).calls
    said = capsys.readouterr().err.replace("> ", "\n").split("\n")
    assert list(filter(None, said)) == [
        "max_new_tokens 8, temperature 0.5, top_k 5",
        "max_new_tokens 8, temperature 0.5, top_k None",
        "top_k must be a whole number, not 'x'", "max_new_tokens must be a whole number, not '-'",
        "temperature: 2000.0 is not at least 0 and at most 1000",
        "max_new_tokens 8, temperature 0.5, top_k None",
    ]


def test_the_system_message_can_be_set_shown_and_taken_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "system.txt"
    file.write_text("brief\n")
    lines = ["/system", "a", "/system be kind", "/system", "b", f"/system @{file}", "c",
             "/system -", "d", "/system @/no/such", "e"]
    reply = talk(monkeypatch, lines, [spoken("y")] * 5)
    turns = ["a", "b", "c", "d"]
    starts = ["", "s:be kind\0", "s:brief\0", "", ""]
    for i, start in enumerate(starts):
        before = "".join(f"u:{text}\0a:y\0" for text in turns[:i])
        assert reply.seen[i] == asked(f"{start}{before}u:{'abcde'[i]}\0a:")
    err = capsys.readouterr().err
    assert "> no system message\n" in err and "> be kind\n" in err
    assert "cannot read the system message @/no/such: " in err


def test_a_template_without_a_system_message_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(Letters):
        def chat(self, messages: list[dict[str, str]]) -> list[int]:
            return super().chat([m for m in messages if m["role"] != "system"])

    chat(Deaf(), FakeReply([]), 1000)
    with pytest.raises(ValueError, match="template leaves a system message out"):
        chat(Deaf(), FakeReply([]), 1000, system="be kind")


def test_stats_say_what_an_answer_took(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(monkeypatch, ["/stats", "one", "two", "/stats"], [spoken("Hi"), spoken("Ho")], room=50)
    err = capsys.readouterr().err
    assert "> 0 answers; 0 of 50 tokens of context\n" in err
    n_tokens = len("u:one\0a:Hi\0u:two\0a:Ho\0a:")
    assert f"> 2 answers; {n_tokens} of 50 tokens of context\n" in err
    assert re.search(r"last answer: 3 tokens in .* s, .* tokens/s, .*; 10 of 19 prompt", err)


def test_a_saved_conversation_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "a talk.json"
    lines = ["one \u00e9", f"/save {file}", "two", f"/save {file}"]
    talk(monkeypatch, lines, [spoken("Hi"), spoken("Ho")], system="s")
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = json.loads(file.read_text())
    assert [message["role"] for message in messages] == roles
    assert [message["content"] for message in messages] == ["s", "one \u00e9", "Hi", "two", "Ho"]
    reply = talk(monkeypatch, ["x", f"/load {file}", "three"], [spoken("y"), spoken("z")])
    want = "s:s\0u:one \u00e9\0a:Hi\0u:two\0a:Ho\0u:three\0a:"
    assert reply.seen[1] == asked(want)
    assert os.listdir(tmp_path) == ["a talk.json"]


WRONG_FILES = [
    b"", b"{", b"[]", b'"x"', b"\xff", b'{"messages": []}', b"[1]", b"[" * 100_000,
    b'[{"role": "user", "content": "x"}]', b'[{"role": "system", "content": "x"}]',
    b'[{"role": "user", "content": 1}, {"role": "assistant", "content": "x"}]',
    b'[{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]',
]


@pytest.mark.parametrize("content", WRONG_FILES, ids=range(len(WRONG_FILES)))
def test_a_file_that_is_no_conversation_is_refused_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    content: bytes,
) -> None:
    file = tmp_path / "notes"
    file.write_bytes(content)
    lines = ["one", f"/load {file}", f"/save {file}", "two"]
    reply = talk(monkeypatch, lines, [spoken("Hi"), spoken("Ho")])
    assert reply.seen[1] == asked("u:one\0a:Hi\0u:two\0a:")
    said = [line for line in capsys.readouterr().err.splitlines() if str(file) in line]
    assert len(said) == 2 and all("cannot read a conversation from" in line for line in said)
    assert said[1].endswith("choose another name, so that it stays as it is")
    assert file.read_bytes() == content


def test_places_that_cannot_be_written_or_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    places = ["", "/no/such/x", tmp_path, pipe, "/dev/full", "x" * 5000, "a\0b"]
    lines = [f"/{verb} {place}" for place in places for verb in ("save", "load")]
    said = ["/save x", "one", *lines, "two"]
    talk(monkeypatch, said, [spoken("Hi"), spoken("Ho")], system="s")
    out, err = capsys.readouterr()
    assert out == "Hi\nHo\n" and "> there is nothing to save\n" in err
    said = err.split("> ")[3:-2]
    assert len(said) == 14 and all(line.count("\n") == 1 for line in said)
    assert os.listdir(tmp_path) == ["pipe"]


# --- a bar for long prompts ---

class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@dataclass
class Shaped:
    shape: tuple[int, ...]


@pytest.mark.parametrize("stream, n_tokens, shown", [
    (Terminal, LONG, True), (Terminal, LONG - 1, False), (io.StringIO, LONG, False),
])
def test_a_bar_counts_the_layers_of_a_long_prompt(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], n_tokens: int, shown: bool
) -> None:
    err = stream()
    monkeypatch.setattr("sys.stderr", err)

    def slowly(block: int, x: Shaped, *rest: object) -> tuple:
        time.sleep(0.15)
        if rest == ("interrupted",):
            raise KeyboardInterrupt
        return block, x, rest

    forward = with_bar(slowly, range(5))
    x = Shaped((1, n_tokens, 8))
    for layer in range(4):
        forward(layer, x)
    with pytest.raises(KeyboardInterrupt):
        forward(4, x, "interrupted")
    for layer in range(5):
        assert forward(layer, x, "more") == (layer, x, ("more",))
    text = err.getvalue()
    assert (f"reading {n_tokens} tokens" in text) == shown == ("4/5" in text)
    assert text.endswith("\r") or not shown  # it is gone


# --- a terminal ---

class Screen:
    """A process on a terminal of its own, as a person has it."""

    def __init__(self, command: list[str], home: Path) -> None:
        self.seen = ""
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ours may ignore it, as under nohup
            env = {**CPU_ENV, "XDG_STATE_HOME": str(home), "TERM": "xterm", "PYTHONPATH": str(HERE)}
            os.execve(sys.executable, [sys.executable, *command], env)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def wait_for(self, text: str) -> str:
        """All that was shown up to this text, since the last time."""
        end = time.monotonic() + PATIENCE_S
        while text not in self.seen:
            late = time.monotonic() > end
            self.read()
            assert text in self.seen or not late, f"{text!r} does not come: {self.seen!r}"
        shown, _, self.seen = self.seen.partition(text)
        return shown + text

    def read(self) -> bool:
        """Take what is there within a second -> whether more may come."""
        if not select.select([self.terminal], [], [], 1)[0]:
            return True
        try:
            new = os.read(self.terminal, 10_000)
        except OSError:  # the process has ended
            return False
        self.seen += new.decode(errors="replace")
        return bool(new)

    def close(self) -> tuple[int, str]:
        """Wait for the end -> exit code, and what was shown until then."""
        end = time.monotonic() + PATIENCE_S
        while self.read():
            assert time.monotonic() < end, f"it does not end: {self.seen!r}"
        _, status = os.waitpid(self.pid, 0)
        os.close(self.terminal)
        return os.waitstatus_to_exitcode(status), self.seen


ECHO = """
from cli.lines import Messages
source = Messages()
while True:
    try:
        print("got", ascii(source.read()))
    except (EOFError, KeyboardInterrupt) as e:
        print("got", type(e).__name__)
        if isinstance(e, EOFError):
            break
"""
UP = "\x1b[A"
LEFT = "\x1b[D"


def test_a_terminal_has_line_editing_and_a_history(tmp_path: Path) -> None:
    screen = Screen(["-c", ECHO], tmp_path)
    screen.wait_for("> ")
    for typed, got in [
        (f"ac{LEFT}b\n", "abc"),
        ("\x01x\n", "x"),
        (f"{UP}{UP}\n", "abc"),
    ]:
        screen.type(typed)
        screen.wait_for(f"got '{got}'\r\n")
        screen.wait_for("> ")
    screen.type("half")
    screen.wait_for("half")
    screen.type("\x03")
    screen.wait_for("got KeyboardInterrupt\r\n")
    screen.wait_for("> ")
    screen.type("\x04")
    screen.wait_for("got EOFError")
    assert screen.close()[0] == 0

    # and so has the next run
    assert (tmp_path / "gpt-flash" / "history").read_text().splitlines() == ["abc", "x", "abc"]
    screen = Screen(["-c", ECHO], tmp_path)
    screen.wait_for("> ")
    screen.type(f"{UP}{UP}\n\x04")
    screen.wait_for("got 'x'")
    assert screen.close()[0] == 0


INTERRUPT_UNHEARD = """
import ctypes
hook = ctypes.c_void_p.in_dll(ctypes.pythonapi, "PyOS_InputHook")  # called before each key's wait
hook.value = ctypes.cast(ctypes.pythonapi.PyErr_SetInterrupt, ctypes.c_void_p).value
"""


def test_ctrl_c_counts_in_the_moment_before_the_wait_for_a_key(tmp_path: Path) -> None:
    """Then it does not end that wait."""
    screen = Screen(["-c", INTERRUPT_UNHEARD + ECHO], tmp_path)
    screen.wait_for("got KeyboardInterrupt")
    os.kill(screen.pid, signal.SIGTERM)
    screen.close()


def test_two_chats_at_once_keep_the_history_of_both(tmp_path: Path) -> None:
    first, second = (Screen(["-c", ECHO], tmp_path) for _ in range(2))
    for screen, text in (first, "one"), (second, "two"), (second, "two"), (first, "three"):
        screen.wait_for("> ")
        screen.type(f"{text}\n")
        screen.wait_for(f"got '{text}'\r\n")
    for screen in (first, second):
        screen.wait_for("> ")
        screen.type("\x04")
        assert screen.close()[0] == 0
    assert (tmp_path / "gpt-flash" / "history").read_text().splitlines() == ["one", "two", "three"]


def test_pasted_lines_are_one_message(tmp_path: Path) -> None:
    """Marked as pasted by the terminal, or arriving together; up to a command."""
    screen = Screen(["-c", ECHO], tmp_path / "file" / "x")
    (tmp_path / "file").write_text("no folder, so no history")
    for typed, got in [
        ("\x1b[200~def f():\n\treturn 1\n\x1b[201~\n", "def f():\\n\\treturn 1\\n"),
        ('\x1b[200~"""Doc."""\nx = 1\x1b[201~\n', '"""Doc."""\\nx = 1'),
        ('\x1b[200~"""\nfoo\n"""\x1b[201~\n', "\\nfoo\\n"),
        ('\x1b[200~"""Doc."""\nx = """y"""\x1b[201~\n', '"""Doc."""\\nx = """y"""'),
        ("one\n two\nthree\n", "one\\n two\\nthree"),
        ("four\n/stats\n", "four'\r\ngot '/stats"),
        ('"""five\n', None),
        ('six"""\n', "five\\nsix"),
    ]:
        screen.wait_for("... " if typed.startswith("six") else "> ")
        screen.type(typed)
        if got is not None:
            screen.wait_for(f"got '{got}'\r\n")
    screen.wait_for("> ")
    screen.type("end\n\x04")
    screen.wait_for("got 'end'")
    screen.wait_for("got EOFError")
    assert screen.close()[0] == 0
