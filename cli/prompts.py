"""What to answer: prompts as flags and files give them, plain lines or JSON lines, checked."""
import io
import json
import re
import sys
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple, TextIO

from cli.files import read_all, trying_to
from generate import RANGES, Tokenizer

HANDED_ON = re.compile("id$|metadata$|x")  # keys of a line that its record has too
# what a line may set for itself
SETTINGS = (*(name for name in RANGES if name != "cached"), "stop")


@dataclass(frozen=True)
class Job:
    """An answer that is wanted, or what is wrong with the line that asks for it."""
    index: int  # of its prompt, from 0; blank lines do not count
    sample: int = 0  # which of the answers to it, from 0
    heading: str = ""  # the line above its answer, where there are several
    prompt: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)  # those of SETTINGS
    passed: dict[str, Any] = field(default_factory=dict)  # what its record has of the line
    error: str | None = None
    digest: str = ""  # the same prompt, settings and model have the same one


class Line(NamedTuple):
    """A line of a file of prompts."""
    number: int  # in the file, from 1
    content: str  # with a half of a character for each byte that is no UTF-8
    is_json: bool


class Asked(NamedTuple):
    """What the flags ask about, read before a model is loaded so that a typo shows at once."""
    lines: list[Line]  # of --prompts
    text: str | None  # of --prompt; None: there is none, or it is a number of random tokens
    system: str | None  # of --system
    grammar: str | None  # of --json_schema or --grammar
    calibrate: str | None  # the text of --calibrate


def standard_input() -> TextIO:
    """In UTF-8, whatever the locale says, with a byte order mark or without; what is none is for
    others to refuse."""
    if sys.stdin is None:
        raise ValueError("standard input is closed")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
    return sys.stdin


def read_prompt(source: str) -> str:
    """The text of --prompt: read_text's, or of standard input for -, which a conversation may read
    beside any other text."""
    return read_file(None, "the prompt -") if source == "-" else read_text(source, "the prompt")


def read_text(source: str, what: str) -> str:
    """A text as it is, or of @FILE; @@ begins one with an @ of its own. ValueError: it cannot be
    read."""
    if source.startswith("@") and not source.startswith("@@"):
        return read_file(source[1:], f"{what} {source}")
    check_text(what, source)
    return source.removeprefix("@")


def read_file(path: str | None, what: str) -> str:
    """The text of a file, None for standard input. ValueError: it cannot be read."""
    with trying_to(f"read {what}", ValueError):
        if path is None:
            text = read_all(standard_input())
        else:
            with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
                text = read_all(file)
    check_text(what, text)
    return text


def check_template(tokenizer: Tokenizer, system: str | None) -> None:
    """ValueError if the model's chat template fails, or leaves a system message out."""
    greeting = [{"role": "user", "content": "Hello"}]
    plain = tokenizer.chat(greeting)
    if system is not None and tokenizer.chat(with_system(system, greeting)) == plain:
        raise ValueError("this model's chat template leaves a system message out")


def with_system(system: str | None, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Messages behind the system's, if there is one."""
    if system is None:
        return messages
    return [{"role": "system", "content": system}, *messages]


def read_lines(path: str) -> list[Line]:
    """The lines of a file, - for standard input, that are not blank: JSON if its name ends in
    .jsonl or the first one begins with a brace. ValueError: there is none, or it cannot be read."""
    with trying_to(f"read --prompts {path}", ValueError):
        with nullcontext(standard_input().buffer) if path == "-" else open(path, "rb") as file:
            content = read_all(file)
        if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            raise ValueError("it is UTF-16, not UTF-8")
    content = content.removeprefix(BOM_UTF8)
    if not content.strip():
        raise ValueError(f"no prompts in {path}")
    is_json = path.endswith(".jsonl") or content.lstrip().startswith(b"{")
    lines = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            text = line.removesuffix(b"\r").decode(errors="surrogateescape")
            lines.append(Line(number, text, is_json))
    return lines


def read_jobs(
    lines: list[Line], encode: Callable[[dict[str, Any]], list[int]], defaults: dict[str, Any],
    n_samples: int, model: str,
) -> list[Job]:
    """The answers that lines ask for, n_samples each, in their order; one job with an error where a
    line asks for nothing sensible.

    encode: {"prompt": text} or {"messages": [...]} -> ids. defaults: the settings that a line does
    not give. A default seed is that of the first answer, the next one has the next; a line's own is
    that of its first sample. model: what is to answer; another one's answers have other digests."""
    jobs = []
    for index, line in enumerate(Line(*line) for line in lines):
        entry = {}
        try:
            entry = parse_line(line)
            check_entry(entry)
            settings = {name: entry.get(name, default) for name, default in defaults.items()}
            if "seed" not in entry and settings["seed"] is not None:
                settings["seed"] += index * n_samples
            asked = title_of(entry), encode(entry), settings
            jobs += samples(index, *asked, n_samples, model, handed_on(entry))
        except ValueError as e:
            digest = sha256(line.content.encode(errors="surrogateescape")).hexdigest()[:16]
            error = f"line {line.number}: {e!s:.300}"
            jobs.append(Job(index, passed=handed_on(entry), error=error, digest=digest))
    return jobs


def samples(
    index: int, title: str, prompt: list[int], settings: dict[str, Any], n_samples: int,
    model: str = "", passed: dict[str, Any] | None = None,
) -> list[Job]:
    """n_samples answers to a prompt that begins with title, with seeds in a row if it has one."""
    jobs = []
    passed = passed or {}
    for sample in range(n_samples):
        which = f"[{index}, sample {sample}]" if n_samples > 1 else f"[{index}]"
        own = dict(settings)
        if own["seed"] is not None:
            own["seed"] = (own["seed"] + sample) % 2**63
        asked = json.dumps([model, prompt, own | passed], sort_keys=True)
        digest = sha256(asked.encode()).hexdigest()[:16]
        jobs.append(Job(index, sample, f"{which} {title}\n", prompt, own, passed, digest=digest))
    return jobs


def parse_line(line: Line) -> dict[str, Any]:
    """{"prompt": text} or what a JSON line holds. ValueError: it is no JSON object."""
    check_text("it", line.content)
    if not line.is_json:
        return {"prompt": line.content}
    try:
        entry = json.loads(line.content)
        # more is around it when it is written, and others do not read NaN
        json.dumps([[[[[[[[entry]]]]]]]], allow_nan=False)
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON: {e.msg} at column {e.colno}") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    return entry


def handed_on(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if HANDED_ON.match(name)}


def check_entry(entry: dict[str, Any]) -> None:
    """ValueError says what is wrong. OpenAI's max_tokens becomes max_new_tokens."""
    if "max_tokens" in entry and "max_new_tokens" not in entry:
        entry["max_new_tokens"] = entry.pop("max_tokens")
    for name in entry:
        if name not in CHECKS and not HANDED_ON.match(name):
            raise ValueError(f"unknown key {brief(name)}; known are {', '.join(sorted(CHECKS))}, "
                             "and handed on are id, metadata and what begins with x")
    if ("prompt" in entry) == ("messages" in entry):
        raise ValueError("one of prompt and messages is needed, and not both")
    for name in filter(CHECKS.get, entry):
        CHECKS[name](name, entry[name])


def check_text(name: str, value: Any) -> None:
    """ValueError if it is no text, or one that UTF-8 cannot hold."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, not {brief(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        half = value[e.start]
        if "\udc80" <= half <= "\udcff":  # by which surrogateescape stands for a byte
            raise ValueError(f"{name} is not UTF-8: byte 0x{ord(half) - 0xDC00:02x}") from None
        raise ValueError(f"{name} has half a character, {half!a}") from None


def check_stop(name: str, stop: Any) -> None:
    """ValueError if it is not a list of texts that may end an answer."""
    if not isinstance(stop, list) or "" in stop:
        raise ValueError(f"{name} must be a list of texts, none of them empty, not {brief(stop)}")
    for text in stop:
        check_text(f"each text of {name}", text)


def check_messages(name: str, messages: Any) -> None:
    """ValueError if it is not a list of {"role": text, "content": text}."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name} must be a list with messages, not {brief(messages)}")
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError(f"a message is an object of role and content, not {brief(message)}")
        check_text("role", message["role"])
        check_text("content", message["content"])


# what a line of JSON may have -> what raises ValueError where it may not be so
CHECKS = {"prompt": check_text, "messages": check_messages, "stop": check_stop}
CHECKS |= {name: RANGES[name].check for name in SETTINGS if name in RANGES}


def title_of(entry: dict[str, Any]) -> str:
    """How a prompt, or a conversation's last message, begins, in one line."""
    text = entry["prompt"] if "prompt" in entry else entry["messages"][-1]["content"]
    return shorten(" ".join(text[:400].split()))


def brief(value: Any) -> str:
    """A value as JSON, cut to some length."""
    return shorten(json.dumps(value, default=repr))


def shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
