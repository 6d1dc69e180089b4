"""A conversation in the terminal that keeps the KV cache between turns."""
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from batching import Engine, load_row, read_row, save_row
from cli.files import in_place_of, read_all, trying_to
from cli.lines import COMMAND, QUOTES, Messages
from cli.prompts import check_messages, check_template, check_text, read_text, with_system
from cli.stats import NO_TIME, plural
from formats.text import TextStream
from generate import RANGES, Request, Tokenizer, generate, say

Message = dict[str, str]  # role and content


class Chat:
    """Messages and their answers; only what is new of a conversation is prefilled.

    settings: generate's. Its stop strings are neither printed nor part of the conversation.
    system: a first message that says how to answer. shift: let go of turns to make room.
    ValueError where the model has no chat template, or one that does not take a system message."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, settings: dict[str, Any],
        system: str | None = None, shift: bool = False,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = {name: settings[name] for name in settings if name != "logprobs"}  # unseen
        self.room = engine.context  # the tokens that the cache holds
        self.messages: list[Message] = []  # of the user and the assistant in turn
        self.held: list[int] = []  # the ids whose keys and values are in the cache
        self.begun: list[int] = []  # the ids of the last answer, if it was cut
        self.shift = shift
        self.attempt = 0  # how often the last message was answered before
        self.took = ""  # what the last answer did, in a sentence
        self.left = False
        check_template(tokenizer, system)
        self.system = system

    def run(self) -> None:
        """Take messages and commands until there are no more, or Ctrl-C is typed twice instead of
        one: KeyboardInterrupt."""
        source = Messages()
        if source.on_terminal:
            say("/help lists the commands, Ctrl-C ends an answer, Ctrl-D leaves")
        interrupted = False
        while not self.left:
            try:
                text = source.read()
            except EOFError:
                say("")  # what the shell says next has a line of its own
                return
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                say("\nCtrl-C again or Ctrl-D leaves")
                continue
            interrupted = False
            try:
                self.take(text)
            except KeyboardInterrupt:
                say("")

    def take(self, text: str) -> None:
        """Do a command, or answer a message; what cannot be done is said."""
        command = COMMAND.match(text)
        try:
            if command and command[0] not in COMMANDS:
                say(f"unknown command {command[0]}; /help lists them, and a message may begin with "
                    "a blank")
            elif command:
                do, _, _ = COMMANDS[command[0]]
                do(self, text[command.end():].strip())
            elif text.strip():
                check_text("the message", text)
                self.attempt = 0
                self.complete([*self.messages, {"role": "user", "content": text.strip()}])
        except ValueError as e:
            say(str(e))

    # --- answers ---

    def complete(self, messages: list[Message], begun: Sequence[int] = ()) -> str:
        """Answer messages, of which the last one is the user's, behind what is begun of the answer,
        and keep them with it -> why it ended. ValueError: there is no room for it; it is
        forgotten."""
        ids = [*self.encode(messages), *begun]
        wanted = min(self.settings["max_new_tokens"], self.room // 2)
        while self.shift and len(messages) > 1 and len(ids) + wanted > self.room:
            messages = messages[2:]
            ids = [*self.encode(messages), *begun]
            say("dropped the oldest turn")
        if len(ids) >= self.room:
            alone = len(self.encode(messages[-1:]))
            if alone < self.room:
                raise ValueError(f"no room for {len(ids)} tokens and an answer: {self.full()}")
            raise ValueError(
                f"this message is too long: with what the template adds it has {alone} tokens, and "
                f"the context of {self.room} has to hold an answer too"
            )
        # at least one token is fed, for its logits
        cached = min(len(os.path.commonprefix([ids, self.held])), len(ids) - 1)
        new, reason = self.show_reply(ids, cached)
        if not new:
            say("the answer had not begun")
            return reason
        answer = [*begun, *new]
        self.begun = [] if reason in ("eos", "stop") else answer
        self.held = ids + new[:-1]  # the last token was never fed back
        content = TextStream(self.tokenizer, stop=self.settings["stop"]).push(answer, final=True)
        self.messages = [*messages, {"role": "assistant", "content": content}]
        if reason == "length":
            say(f"the answer was cut after --max_new_tokens {len(new)}; /continue goes on with it")
        elif reason == "context":
            say(f"the answer was cut: {self.full()}")
        return reason

    def show_reply(self, ids: list[int], cached: int) -> tuple[list[int], str]:
        """Print the reply to a conversation's ids as it comes -> its tokens, why it ended."""
        self.held = ids[:cached]  # what follows is overwritten, however this ends
        text = TextStream(self.tokenizer, ids, self.settings["stop"])
        answer = []
        times = [time.perf_counter()]

        def show(row: int, new: list[int]) -> None:
            answer.extend(new)
            times.append(time.perf_counter())
            print(text.push(new), end="", flush=True)

        try:
            reason = self.reply(ids, cached, show)
        except KeyboardInterrupt:
            reason = "interrupted"
        except ValueError:  # a window may have passed the tokens cached
            if cached == 0 or answer:
                raise
            return self.show_reply(ids, 0)
        print(text.push([], final=True), flush=True)
        if answer:
            total_s = max(times[-1] - times[0], NO_TIME)
            self.took = (
                f"last answer: {len(answer)} tokens in {total_s:.2f} s, "
                f"{len(answer) / total_s:.1f} tokens/s, the first one after "
                f"{times[1] - times[0]:.2f} s; {cached} of {len(ids)} prompt tokens were cached"
            )
        return answer, reason

    def reply(self, ids: list[int], cached: int, show: Callable[[int, list[int]], None]) -> str:
        """Generate behind ids, of which the first `cached` are in the cache -> why it ended."""
        seed = self.settings["seed"]
        if seed is not None:
            seed = (seed + self.attempt) % 2**63
        generate(
            self.engine.model, [ids[cached:]], cached=cached, stream=show, engine=self.engine,
            eos_ids=self.tokenizer.eos_ids, tokenizer=self.tokenizer,
            **(self.settings | {"seed": seed}),
        )
        return self.engine.finish_reasons[0]

    # --- the conversation ---

    def encode(self, messages: list[Message]) -> list[int]:
        return self.tokenizer.chat(with_system(self.system, messages))

    def full(self) -> str:
        return (
            f"the context of {self.room} tokens is full; /drop drops the oldest turn, /clear "
            "starts a new conversation"
        )

    # --- commands ---

    def help(self, argument: str) -> None:
        for name, (_, usage, text) in COMMANDS.items():
            say(f"{name + ' ' + usage:21} {text}")
        say(f"{QUOTES:21} begins and ends a message of several lines; pasted lines are one too")

    def clear(self, argument: str) -> None:
        self.messages = []
        say("a new conversation")

    def set_system(self, argument: str) -> None:
        if not argument:
            say("no system message" if self.system is None else self.system)
            return
        system = None
        if argument != "-":
            system = read_text(argument, "the system message").strip()
        check_template(self.tokenizer, system)
        self.system = system

    def regenerate(self, argument: str) -> None:
        if not self.messages:
            raise ValueError("nothing was answered yet")
        before = self.messages[-1]
        self.attempt += 1
        reason = self.complete(self.messages[:-1])
        if reason != "interrupted" and self.messages[-1] == before:
            say("the same answer; --temperature above 0 gives others")

    def continue_(self, argument: str) -> None:
        if not (self.messages and self.begun):
            raise ValueError("no answer was cut")
        if self.settings.get("processors"):  # a grammar, of which each answer is a whole one
            raise ValueError("by a grammar no answer goes on: /set max_new_tokens, and /regen")
        self.complete(self.messages[:-1], self.begun)

    def set(self, argument: str) -> None:
        known = {name: value for name, value in self.settings.items() if name in RANGES}
        name, _, value = argument.partition(" ")
        if name not in known:
            raise ValueError(", ".join(f"{name} {value}" for name, value in known.items()))
        with suppress(ValueError):
            value = RANGES[name].kind(value)
        if value != "-" or getattr(Request, name, 0) is not None:  # without which some do nothing
            RANGES[name].check(name, value)
        self.settings = self.settings | {name: None if value == "-" else value}
        if name == "repetition_penalty":  # of tokens that are read from now on: of all again
            self.held = []

    def drop(self, argument: str) -> None:
        n_turns = len(self.messages) // 2
        if not n_turns:
            raise ValueError("there is nothing to drop")
        n = argument or "1"
        if not n.isdecimal() or not 1 <= int(n) <= n_turns:
            raise ValueError(f"/drop takes a number from 1 to {n_turns}, not {n}")
        self.messages = self.messages[2 * int(n):]
        say(f"dropped {n}, {len(self.messages) // 2} left")

    def save(self, argument: str) -> None:
        if not self.messages:
            raise ValueError("there is nothing to save")
        name, _, also = argument.rpartition(" ")
        file = named_file(name if also == "+cache" else argument)
        messages = with_system(self.system, self.messages)
        text = json.dumps(messages, ensure_ascii=False, indent=1) + "\n"
        with trying_to(f"write {file}"), in_place_of(file, read_conversation) as new:
            new.write_text(text, encoding="utf-8")
        say(f"{len(messages)} messages are in {file}")
        if also == "+cache":
            file = cache_of(file)
            with trying_to(f"write {file}"), in_place_of(file, read_row) as new:
                save_row(self.engine.model, self.held, new)
            say(f"what was read of them is in {file}, {file.stat().st_size / 1e6:.1f} MB")

    def load(self, argument: str) -> None:
        file = named_file(argument)
        system, messages = read_conversation(file)
        check_template(self.tokenizer, system)
        self.tokenizer.chat(with_system(system, messages))  # a template may refuse it
        self.system = system
        self.messages, self.begun = messages, []
        self.attempt = 0
        say(f"{plural(len(messages) // 2, 'turn')} from {file}")
        self.held = []
        if cache_of(file).exists() and self.settings.get("repetition_penalty") is None:
            self.held = load_row(self.engine.model, cache_of(file))

    def stats(self, argument: str) -> None:
        used = len(self.encode(self.messages)) if self.messages else 0
        used = f"{min(used, self.room)} of {self.room} tokens of context"
        say(f"{plural(len(self.messages) // 2, 'answer')}; {used}")
        if self.took:
            say(self.took)

    def leave(self, argument: str) -> None:
        self.left = True


# name -> what does it, what goes with it, and what /help says
COMMANDS = {
    "/clear": (Chat.clear, "", "start a new conversation, with the same system message"),
    "/regen": (Chat.regenerate, "", "answer the last message again"),
    "/continue": (Chat.continue_, "", "go on with an answer that was cut"),
    "/set": (Chat.set, "NAME VALUE", "temperature 0.7, say, - for its default; alone: show all"),
    "/drop": (Chat.drop, "N", "forget the N oldest messages and their answers; 1"),
    "/system": (
        Chat.set_system, "TEXT|@FILE|-", "say how to answer, - for nothing; alone: show it"
    ),
    "/save": (
        Chat.save, "FILE [+cache]", "write the conversation to FILE, as JSON; also what was read"
    ),
    "/load": (Chat.load, "FILE", "go on with the conversation in FILE"),
    "/stats": (Chat.stats, "", "say how full the context is, and what the last answer took"),
    "/help": (Chat.help, "", "list the commands"),
    "/bye": (Chat.leave, "", "leave, as Ctrl-D and /quit do"),
    "/quit": (Chat.leave, "", "the same"),
}


# --- conversations in files ---

def named_file(argument: str) -> Path:
    if not argument:
        raise ValueError("a file's name is missing")
    return Path(os.path.expanduser(argument))


def read_conversation(file: Path) -> tuple[str | None, list[Message]]:
    """What a file has: the system message, None where there is none, and those of user and
    assistant in turn. ValueError: it has anything else, or cannot be read."""
    with trying_to(f"read a conversation from {file}", ValueError, RecursionError):
        if file.exists() and not file.is_file():
            raise ValueError("it is no plain file")
        with open(file, encoding="utf-8-sig") as text:
            messages = json.loads(read_all(text))
        check_messages("messages", messages)
        system = None
        if messages[0]["role"] == "system":
            system = messages.pop(0)["content"]
        roles = [message["role"] for message in messages]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            raise ValueError("its messages are not those of user and assistant in turn")
    return system, messages


def cache_of(file: Path) -> Path:
    """Beside a conversation's file, what the cache holds of it."""
    return file.with_name(file.name + ".cache")
