"""What a user types, pastes or pipes in: line editing, history, messages of several lines."""
import os
import re
import select
import signal
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
ALARM_S = 0.2


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
        if COMMAND.match(line) and not opening:
            return line.removesuffix("\n")
        text = line = line[opening.end():] if opening else line
        while self.goes_on(line, quoted=opening is not None):
            line = self.read_line("... ")
            if not line or COMMAND.match(line) and not opening:
                self.held = line
                break
            text += line
        if opening:
            return opening[1] + text.rstrip().removesuffix(QUOTES)
        return text.removesuffix("\n")

    def goes_on(self, line: str, quoted: bool) -> bool:
        """Whether there are more lines of a message: up to its quotes, or as many as arrived
        together."""
        if quoted:
            return not line.rstrip().endswith(QUOTES)
        return self.on_terminal and bool(select.select([sys.stdin], [], [], PASTE_S)[0])

    def read_line(self, prompt: str) -> str:
        """The next line, with its end as readline() gives it; "": there is none."""
        if not self.edits:
            say(prompt, end="")
            return sys.stdin.readline()
        before = readline.get_current_history_length()
        try:
            # a Ctrl-C just before the wait for a key is seen when the next signal ends that
            signal.setitimer(signal.ITIMER_REAL, ALARM_S, ALARM_S)
            line = input(prompt)
        except EOFError:
            return ""
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
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
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    with suppress(OSError, RuntimeError):  # a home that cannot be written, or none
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        file = Path(state) / "gpt-flash" / "history"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        if file.is_file():  # no pipe, at which one waits for ever
            readline.read_history_file(file)
            return file
    return None
