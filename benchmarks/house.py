"""Measures of the house: what a reader meets. `python benchmarks/report.py --house` prints them.

Lines of the core files and of everything but tests and benchmarks, files and functions that one
decode step of the default model runs through, modules behind `import model`, the longest class and
function, syntax nodes a line."""
from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent.parent
CORE = ("generate.py", "model.py", "kernels.py", "quantize.py", "tests.py")
FOLDERS = ("families", "formats", "products", "batching", "processors", "parallel", "cpu",
           "cli", "calibration")


class Source(NamedTuple):
    """What one file is like."""

    lines: int
    longest_class: int
    longest_function: int
    nodes: float  # syntax nodes a line of code


def read_source(path: Path) -> Source:
    text = path.read_text()
    tree = ast.parse(text)
    sizes: dict[str, int] = {"class": 0, "function": 0}
    for node in ast.walk(tree):
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            sizes[kind] = max(sizes[kind], node.end_lineno - node.lineno + 1)
    code = [line for line in text.splitlines() if line.strip() and not line.strip()[0] == "#"]
    nodes = sum(1 for _ in ast.walk(tree)) / max(1, len(code))
    return Source(text.count("\n"), sizes["class"], sizes["function"], nodes)


def sources() -> Iterator[tuple[str, Source]]:
    """The core's files, and those of the folders that are neither tests nor benchmarks."""
    for name in CORE:
        yield name, read_source(HERE / name)
    for folder in FOLDERS:
        for path in sorted((HERE / folder).glob("*.py")):
            yield f"{folder}/{path.name}", read_source(path)


def modules_behind_model() -> list[str]:
    """Our modules that `import model` loads in a new process."""
    program = (
        "import model, sys, pathlib\n"
        "for name, module in sys.modules.items():\n"
        "    file = getattr(module, '__file__', None)\n"
        "    if file and pathlib.Path.cwd() in pathlib.Path(file).parents: print(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def step_of_default_model() -> set[CodeType]:
    """Our functions that one decode step of the default model runs through."""
    sys.path.insert(0, str(HERE))
    from generate import Decoder, Request, load_model, load_tokenizer
    model = load_model()
    model.setup_caches(1, 64)
    decoder = Decoder(model)
    ids = load_tokenizer().encode("The capital of France is")
    steps = decoder.run([Request(ids, 8)])
    for _ in range(3):
        next(steps)
    seen: set[CodeType] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and Path(frame.f_code.co_filename).is_relative_to(HERE):
            seen.add(frame.f_code)

    sys.setprofile(note)
    try:
        decoder.step()
    finally:
        sys.setprofile(None)
    return {code for code in seen if code.co_name not in ("<genexpr>", "<listcomp>", "<lambda>")}


def measure() -> dict[str, float]:
    """All measures by name: what a test compares with its limits."""
    found = dict(sources())
    step = step_of_default_model()
    measures: dict[str, float] = {f"lines of {name}": found[name].lines for name in CORE}
    measures["lines of the core"] = sum(found[name].lines for name in CORE)
    rest = [source for name, source in found.items() if name != "tests.py"]
    measures["lines but for tests and benchmarks"] = sum(source.lines for source in rest)
    measures["longest class"] = max(source.longest_class for source in rest)
    measures["longest function"] = max(source.longest_function for source in rest)
    measures["files of a decode step"] = len({code.co_filename for code in step})
    measures["functions of a decode step"] = len(step)
    measures["modules behind import model"] = len(modules_behind_model())
    return measures


def main() -> None:
    for name, source in sources():
        print(
            f"{name:28} {source.lines:5} lines  {source.nodes:5.1f} nodes a line  longest class "
            f"{source.longest_class:3}, function {source.longest_function:2}"
        )
    step = step_of_default_model()
    for code in sorted(step, key=lambda code: (code.co_filename, code.co_firstlineno)):
        print(f"  a step runs {Path(code.co_filename).relative_to(HERE)}: {code.co_qualname}")
    for name, value in measure().items():
        print(f"{name:36} {value:g}")


if __name__ == "__main__":
    main()
