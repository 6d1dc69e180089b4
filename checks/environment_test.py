"""What surrounds the program: little memory, another locale."""
import subprocess
import sys
from pathlib import Path

from checks.common import CPU_ENV, HERE, ours

PROGRAM = [sys.executable, str(HERE / "generate.py"), "--device", "cpu"]


def test_too_little_memory_to_start_is_said_in_a_sentence() -> None:
    limited = ["bash", "-c", 'ulimit -v 300000; exec "$@"', "bash", *PROGRAM]
    done = subprocess.run(limited, env=CPU_ENV, capture_output=True, text=True)
    assert done.returncode == 2
    [sentence] = ours(done.stderr).splitlines()
    assert sentence.startswith("generate.py: error: ")


def test_a_current_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    leave = ["bash", "-c", 'rmdir ../gone; exec "$@"', "bash", *PROGRAM]
    done = subprocess.run(
        leave, env=CPU_ENV, cwd=tmp_path / "gone", capture_output=True, text=True
    )
    sentence = "generate.py: error: the current folder has been deleted: MKL does not load in it\n"
    assert (done.returncode, ours(done.stderr)) == (2, sentence)


def test_texts_are_utf8_in_any_locale(tiny: Path) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    flags = ["--checkpoint_path", str(tiny), "--prompts", "-", "--max_new_tokens", "2"]
    done = subprocess.run(
        [*PROGRAM, *flags], env=CPU_ENV | ascii_only, input="grün\n".encode(), capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[0] grün\n".encode())
