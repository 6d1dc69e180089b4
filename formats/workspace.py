"""Folders to write into until all is there, of which none is left behind."""
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def workspace(parent: Path, name: str) -> Iterator[Path]:
    """A new hidden folder in `parent`, gone at the end, by an exception too.

    A process that is killed leaves its own, so those of the same name that no process has locked
    are removed first: the lock ends with the process that has it."""
    prefix = f".gpt-flash-{name[:100]}-"
    remove_abandoned(parent, prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as folder:
        lock = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks: none removes it there
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield Path(folder)
        finally:
            os.close(lock)


def remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.iterdir():
        if not folder.name.startswith(prefix) or folder.is_symlink():
            continue
        with suppress(OSError):  # another user's, or gone meanwhile
            if time.time() - folder.stat().st_mtime < 1:  # perhaps not locked yet
                continue
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)
