"""What a user types, pastes or pipes in: line editing, history, messages of several lines."""
import io
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

from cli.arguments import say
from cli.prompts import standard_input

PROMPT = "> "
MORE = "... "  # where a message goes on
QUOTES = '"""'
COMMAND = re.compile(r"/[A-Za-z]\w*(?=\s|$)")
# a line that begins a quoted text, which may be what a command is about
OPENING = re.compile(rf"({COMMAND.pattern}\s+)?{QUOTES}")
PASTE_S = 0.03  # a line that follows so soon was not typed
HISTORY = 1000  # lines that are kept


class Messages:
    """Reads messages from standard input, one after the other.

    A line is a message; so are lines that are pasted together on a terminal, and a text between
    two times three quotes. On a terminal there are line editing and a history, kept in a file
    (XDG_STATE_HOME or ~/.local/state, as the XDG base directory specification has it)."""

    def __init__(self) -> None:
        source = standard_input()
        if isinstance(source, io.TextIOWrapper):  # what is no UTF-8 is for others to refuse
            source.reconfigure(encoding="utf-8", errors="surrogateescape")
        self.on_terminal = source.isatty()
        self.edits = readline is not None and self.on_terminal and sys.stdout.isatty()
        self.held: str | None = None  # a line that came with a message, and is the next one
        self.ended = False
        self.history: Path | None = None
        if self.edits:
            # pasted lines become one; Python switches that off, and libedit ignores it
            readline.parse_and_bind("set enable-bracketed-paste on")
            self.history = open_history()

    def read(self) -> str:
        """The next message. EOFError: there is none; KeyboardInterrupt: Ctrl-C was typed."""
        line = self.take_line(PROMPT)
        opening = OPENING.match(line)
        if opening and is_quoted(line[opening.end():]):
            return (opening[1] or "") + self.read_quoted(line[opening.end():])
        if COMMAND.match(line):
            return line
        return self.read_pasted(line)

    def read_quoted(self, line: str) -> str:
        """The text up to the quotes that end a line, or to the end of the input."""
        lines = [line]
        with suppress(EOFError):
            while not lines[-1].rstrip().endswith(QUOTES):
                lines.append(self.take_line(MORE))
        return "\n".join(lines).rstrip().removesuffix(QUOTES)

    def read_pasted(self, line: str) -> str:
        """A line and those that arrived with it, up to a command."""
        lines = [line]
        with suppress(EOFError):
            while self.on_terminal and select.select([sys.stdin], [], [], PASTE_S)[0]:
                line = self.take_line(MORE)
                if COMMAND.match(line):
                    self.held = line
                    break
                lines.append(line)
        return "\n".join(lines)

    def take_line(self, prompt: str) -> str:
        """The next line, without its end. EOFError: there is none, now or any more."""
        if self.held is not None:
            line = self.held
            self.held = None
            return line
        if self.ended:
            raise EOFError
        if self.edits:
            return self.edit_line(prompt)
        say(prompt, end="")
        line = sys.stdin.readline()
        self.ended = not line
        if self.ended:
            raise EOFError
        return line.removesuffix("\n")

    def edit_line(self, prompt: str) -> str:
        """A line that is edited on the terminal, and goes into the history."""
        try:
            line = input(prompt)
        except EOFError:
            self.ended = True
            raise
        if self.history is not None:
            with suppress(OSError):  # a full disk is no reason to end a conversation
                readline.write_history_file(self.history)
        return line


def is_quoted(text: str) -> bool:
    """Whether what follows three quotes is a quoted text, or the beginning of one. Lines that were
    pasted as one are if the next quotes end them; else they may be a program."""
    if "\n" not in text:
        return True
    _, quotes, rest = text.partition(QUOTES)
    return bool(quotes) and not rest.strip()


def open_history() -> Path | None:
    """Read the history -> its file; None if there can be none."""
    readline.set_history_length(HISTORY)
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        file = Path(state) / "gpt-flash" / "history"
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            readline.read_history_file(file)
    except (OSError, RuntimeError):  # a home that cannot be written, or none
        return None
    return file
