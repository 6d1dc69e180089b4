"""What goes wrong, said in one sentence; and how the program ends."""
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from generate import say
from model import first_line
from quantize import HARMLESS


@contextmanager
def sentences() -> Iterator[None]:
    """Where what is asked cannot be done, the program leaves by exit code 2 and one sentence; bugs
    get none."""
    try:
        try:
            yield
        except Exception as e:
            raise signal_behind(e) or e
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where it is known what to say if that fails
    except KeyboardInterrupt:
        say("")
        sys.exit(130)
    except BrokenPipeError:  # whoever read stdout has left, as head does
        discard_output()
        sys.exit(141)  # as a process that the signal ends
    except OSError as e:
        discard_output()
        fail(f"cannot read or write {e.filename or 'the output'}: {e.strerror or first_line(e)}")
    except Exception as e:
        message = sentence_for(e)
        if message is None:  # a bug
            raise
        fail(message)


def sentence_for(error: Exception) -> str | None:
    """What to say of a mistake, of memory that is used up, and of what a device refuses."""
    if isinstance(error, ValueError):
        return str(error)
    return refused_memory(error) or refused_by_device(error)


def signal_behind(error: BaseException | None) -> BaseException | None:
    """What a signal raised, where leaving a `with` failed that it had cut short: as of a
    torch.device, while PyTorch has that mode off its stack for a moment."""
    while error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit)):
        error = error.__context__
    return error


@contextmanager
def afterthought() -> Iterator[None]:
    """Behind an answer nothing fails a run: what goes wrong here is said. A function that this
    decorates gives None then."""
    try:
        yield
    except Exception as e:
        say(f"what it took cannot be said: {type(e).__name__}: {first_line(e)}")


def fail(message: str) -> NoReturn:
    """Leave with a sentence: one line, its middle left out where it is long, as a path may be."""
    message = message.replace("\n", "\ufffd")  # as say replaces other control characters
    if len(message) > 600:
        message = f"{message[:300]} ... {message[-250:]}"
    say(f"generate.py: error: {message}")
    sys.exit(2)


def discard_output() -> None:
    """What stdout still holds goes nowhere, so that Python does not try again at its end."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def refused_memory(error: BaseException | None) -> str | None:
    """What to say of memory that is used up; None: it is not."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return first_line(error)
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            return (
                "there is not enough memory; lower --max_seq_len or --batch_size, or take a "
                "smaller model or --quantize"
            )
        error = error.__cause__ or error.__context__
    return None


def refused_by_device(error: Exception) -> str | None:
    """What to say of a step that the device does not compile or run, where PyTorch's compiler, a
    GPU or anything in Triton failed; None: that is not it."""
    while isinstance(error, torch.AcceleratorError) and error.__context__ is not None:
        error = error.__context__  # the end of a capture fails too, and masks what broke it
    frames = traceback.walk_tb(error.__traceback__)
    in_triton = any(f.f_globals.get("__name__", "").startswith("triton.") for f, _ in frames)
    known = torch._dynamo.exc.ShortenTraceback, torch.AcceleratorError
    if not in_triton and not isinstance(error, known):
        return None
    error = getattr(error, "inner_exception", error)  # what the compiler stumbled over
    said = getattr(error, "error_message", None)  # Triton's, without the source around it
    return (
        f"a step does not compile or run here, as {type(error).__name__} says: "
        f"{said or first_line(error)}; try --no-compile, --attention math or --device cpu"
    )


def become_a_program() -> None:
    """Signals become exceptions, so that whatever is half-written goes. Texts leave in UTF-8, but
    for a terminal of another encoding: what that cannot show is no reason to end, and what would
    drive it is only shown."""
    catch_signals(end_by_signal, signal.default_int_handler)
    if sys.stdout is not None:
        encoding = "utf-8"
        if sys.stdout.isatty():
            encoding = sys.stdout.encoding
            write = sys.stdout.write
            sys.stdout.write = lambda text: write(text.translate(HARMLESS))
        sys.stdout.reconfigure(encoding=encoding, errors="replace")


def catch_signals(end: Any, interrupt: Any) -> None:
    """Set what handles them, but for those that are ignored, as under nohup."""
    handlers = {signal.SIGTERM: end, signal.SIGHUP: end, signal.SIGINT: interrupt}
    for number, handler in handlers.items():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def end_by_signal(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # while what is half-written goes
    sys.exit(128 + number)
