"""Files of the user: read up to some length, and written whole or not at all."""
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, AnyStr

from safetensors import SafetensorError

from model import first_line
from quantize import workspace

LONGEST = 2**28  # bytes or characters of a file that is read


@contextmanager
def trying_to(do: str, *also: type[Exception]) -> Iterator[None]:
    """ValueError says what cannot be done where the system, safetensors or `also` raise."""
    try:
        yield
    except (OSError, SafetensorError, *also) as e:
        raise ValueError(f"cannot {do}: {getattr(e, 'strerror', None) or first_line(e)}") from None


def read_all(file: IO[AnyStr]) -> AnyStr:
    """What a file holds, or sends as a pipe does. ValueError: it has no end that is near."""
    content = file.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise ValueError(f"it has more than {LONGEST // 2**20} MiB")
    return content


@contextmanager
def in_place_of(path: str | Path, read: Callable[[Path], Any]) -> Iterator[Path]:
    """A file's path to write to, which takes the place of `path` at the end, with its mode, but not
    by an exception. ValueError: what is there is something else than `read` reads."""
    file = Path(os.path.realpath(path))  # a link to it stays
    try:
        if file.exists():
            read(Path(path))
    except ValueError as e:
        raise ValueError(f"{e}; choose another name, so that it stays as it is") from None
    with workspace(file.parent, "writing") as folder:
        new = folder / file.name
        new.touch()  # now, lest its name cannot be
        yield new
        if file.exists():
            shutil.copymode(file, new)
        new.replace(file)
