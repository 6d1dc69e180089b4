"""The house stays small: what `python benchmarks/report.py --house` prints has limits."""
from __future__ import annotations

import pytest

from benchmarks.house import CORE, HERE, measure

# Each is what was reached, at most: whoever needs more takes something out first.
LIMITS = {
    "lines of generate.py": 928,
    "lines of model.py": 1221,
    "lines of kernels.py": 960,
    "lines of quantize.py": 520,
    "lines of tests.py": 700,
    "lines of the core": 4214,
    "lines but for tests and benchmarks": 15365,
    "longest class": 300,
    "longest function": 50,
    "files of a decode step": 6,
    "functions of a decode step": 39,
    "modules behind import model": 3,
}


@pytest.fixture(scope="module")
def measures() -> dict[str, float]:
    return measure()


@pytest.mark.parametrize("name", LIMITS)
def test_the_house_stays_within_its_limits(name: str, measures: dict[str, float]) -> None:
    assert measures[name] <= LIMITS[name]


def test_readme_says_how_long_the_files_are() -> None:
    readme = (HERE / "README.md").read_text()
    for name in CORE:
        n = (HERE / name).read_text().count("\n")
        assert f"| `{name}` | {n:,} |" in readme


def test_no_line_has_more_than_100_columns() -> None:
    files = [*HERE.glob("*.py"), *HERE.glob("*/*.py")]
    long = [
        f"{file.relative_to(HERE)}:{number}" for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > 100
    ]
    assert not long
