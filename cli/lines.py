"""What a user types, pastes or pipes in: line editing, history, messages of several lines."""
import os
import re
import select
import sys
from contextlib import suppress
from pathlib import Path

try:
    import readline
except ImportError:  # a Python built without it: lines are those of the terminal itself
    readline = None

from generate import say
from cli.prompts import standard_input

QUOTES = '"""'
COMMAND = re.compile(r"/[A-Za-z]\w*(?=\s|$)")
# quotes that begin a text, perhaps behind a command, and not the doc string of a pasted program
OPENING = re.compile(rf'((?:{COMMAND.pattern}\s+)?){QUOTES}(?!.*{QUOTES}\s*[^\s"])', re.DOTALL)
PASTE_S = 0.03  # a line that follows so soon was not typed


class Messages:
    """Reads messages from standard input: lines, lines that are pasted together on a terminal, and
    texts between two times three quotes. On a terminal there are line editing and a history."""

    def __init__(self) -> None:
        source = standard_input()
        self.on_terminal = source.isatty()
        self.edits = readline is not None and self.on_terminal and sys.stdout.isatty()
        self.history = start_editing() if self.edits else None
        self.held: str | None = None  # what was read behind a message: a command, or "", the end

    def read(self) -> str:
        """The next message. EOFError: there is none; KeyboardInterrupt: Ctrl-C was typed."""
        line = self.read_line("> ") if self.held is None else self.held
        self.held = None
        if not line:
            raise EOFError
        opening = OPENING.match(line)
        if opening:
            return opening[1] + self.read_quoted(line[opening.end():])
        if not COMMAND.match(line):
            line = self.read_pasted(line)
        return line.removesuffix("\n")

    def read_quoted(self, line: str) -> str:
        """The text up to the quotes that end a line, or to the end of the input."""
        text = line
        while not line.rstrip().endswith(QUOTES):
            line = self.read_line("... ")
            if not line:
                self.held = line
                break
            text += line
        return text.rstrip().removesuffix(QUOTES)

    def read_pasted(self, line: str) -> str:
        """A line and those that arrived with it, up to a command or the end of the input."""
        text = line
        while self.on_terminal and select.select([sys.stdin], [], [], PASTE_S)[0]:
            line = self.read_line("... ")
            if not line or COMMAND.match(line):
                self.held = line
                break
            text += line
        return text

    def read_line(self, prompt: str) -> str:
        """The next line, with its end as readline() gives it; "": there is none."""
        if not self.edits:
            say(prompt, end="")
            return sys.stdin.readline()
        before = readline.get_current_history_length()
        try:
            line = input(prompt)
        except EOFError:
            return ""
        n_new = readline.get_current_history_length() - before  # not a line that is typed again
        if self.history is not None:
            # a full disk, or a library that cannot, is no reason to end a conversation
            with suppress(OSError, AttributeError):
                readline.append_history_file(n_new, self.history)  # which other chats have too
        return f"{line}\n"


def start_editing() -> Path | None:
    """Set up line editing -> the file of its history, which is read; None if there can be none."""
    # pasted lines become one; Python switches that off, and libedit ignores it
    readline.parse_and_bind("set enable-bracketed-paste on")
    readline.set_history_length(1000)
    with suppress(OSError, RuntimeError):  # a home that cannot be written, or none
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        file = Path(state) / "gpt-flash" / "history"
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.touch()
        if file.is_file():  # no pipe, at which one waits for ever
            readline.read_history_file(file)
            return file
    return None
