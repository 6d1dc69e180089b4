"""Redraw the tables of benchmarks/README.md, and the pictures beside it, from benchmarks/*.json.

    python benchmarks/render.py            # rewrites that file between its marks, and the pictures
    python benchmarks/render.py --check    # exit code 1 if it does not say what the results say"""
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from cli.arguments import Parser
from generate import say

README = HERE / "README.md"
BEGIN = "<!-- benchmarks: begin, written by benchmarks/render.py -->"
END = "<!-- benchmarks: end -->"

Run = dict[str, Any]  # what one run of benchmarks/decode.py wrote
Row = dict[str, Any]  # one contestant of it in one case
Case = tuple[int, int, int]  # batch, context, capacity


def runs() -> Iterator[tuple[Path, Run]]:
    """Every end-to-end result and its file; benchmarks/attention.py keeps a format of its own."""
    for file in sorted(HERE.glob("*.json")):
        content = json.loads(file.read_text())
        if isinstance(content, list):
            for run in content:
                yield file, run


def section() -> str:
    """What stands between the marks: a table a run, its picture below it."""
    parts = []
    for file, run in runs():
        parts.append(table(run))
        if has_curve(run):
            parts.append(f"![tokens/s against context]({picture_of(file, run).name})\n")
    return "\n".join(parts)


def table(run: Run) -> str:
    """One run in Markdown: a line a contestant, a column of ms a token for each case."""
    contestants: dict[str, dict[Case, Row]] = {}
    columns: dict[Case, str] = {}
    for row in run["rows"]:
        case = (row["batch"], row["context"], row["capacity"])
        columns[case] = column_title(row)
        contestants.setdefault(row["contestant"], {})[case] = row
    yardstick = contestants.get("gpt-fast")

    head = ["ms a token at context in capacity", *columns.values()]
    head += ["of floor", "first token, s", "compile, s"]
    lines = [markdown(head), "|---" + "|---:" * (len(head) - 1) + "|"]
    for name, cells in contestants.items():
        reference = yardstick if name != "gpt-fast" else None
        texts = [f"**{name}**" if name.startswith("gpt-flash") else name]
        texts += [time_cell(case, cells, reference) for case in columns]
        texts += summary_cells(cells, run["copy_gb_s"])
        lines.append(markdown(texts))

    note = describe(run)
    if yardstick:
        note += " In brackets: speed relative to gpt-fast."
    return "\n".join([note, "", *lines, "", "    " + run["command"], ""])


def column_title(row: Row) -> str:
    title = f"{row['context']} in {row['capacity']}"
    if row["batch"] > 1:
        title += f", batch {row['batch']}"
    return title


def markdown(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def time_cell(case: Case, cells: dict[Case, Row], reference: dict[Case, Row] | None) -> str:
    """A contestant's milliseconds, and its speed relative to another's."""
    if case not in cells:
        return ""
    ms = cells[case]["ms"]
    if reference is None:
        return f"{ms:.1f}"
    return f"{ms:.1f} ({reference[case]['ms'] / ms:.2f}x)"


def summary_cells(cells: dict[Case, Row], copy_gb_s: float) -> list[str]:
    """The share of the floor in the first case, the last case's first token, compile time."""
    rows = list(cells.values())
    first = rows[0]
    share = ""
    if "bytes_read" in first:
        floor_ms = first["bytes_read"] / copy_gb_s / 1e6
        share = f"{floor_ms / first['ms']:.0%}"
    compiled = ""
    if first["compile_s"]:
        compiled = f"{first['compile_s']:.1f}"
    return [share, f"{rows[-1]['first_token_s']:.2f}", compiled]


def describe(run: Run) -> str:
    return (
        f"{run['shape']} on {run['device']}, torch {run['torch']}, {run['date']}, which copies at "
        f"{run['copy_gb_s']:.0f} GB/s. Of floor: the time in which that moves a step's weights and "
        "live cache, as a share of the first column's."
    )


# --- pictures ---

def has_curve(run: Run) -> bool:
    contexts = {row["context"] for row in run["rows"]}
    return len(contexts) >= 3


def picture_of(file: Path, run: Run) -> Path:
    return HERE / f"{file.stem}-{run['shape']}.png"


def draw(run: Run, path: Path) -> None:
    """Tokens a second against context at the largest capacity, the bandwidth's floor dashed."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    capacity = max(row["capacity"] for row in run["rows"])
    curves: dict[str, list[Row]] = {}
    for row in run["rows"]:
        if row["capacity"] == capacity and row["batch"] == 1:
            curves.setdefault(row["contestant"], []).append(row)

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name, rows in curves.items():
        contexts = [row["context"] for row in rows]
        speeds = [row["tokens_per_s"] for row in rows]
        width = 2.5 if name.startswith("gpt-flash") else 1.2
        axes.plot(contexts, speeds, marker="o", label=name, linewidth=width)
    contexts, speeds = fastest_possible(curves, run["copy_gb_s"] * 1e9)
    axes.plot(contexts, speeds, "k--", label="copy bandwidth / bytes read")

    axes.set(
        xscale="log",
        xlabel="context (tokens in the cache)",
        ylabel="tokens/s",
        ylim=(0, None),
        title=f"{run['shape']}, {run['device']}, cache of {capacity}",
    )
    axes.legend(
        fontsize=8,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def fastest_possible(
    curves: dict[str, list[Row]], bandwidth: float
) -> tuple[list[int], list[float]]:
    """Contexts, and the tokens a second that the bandwidth allows the first curve of ours."""
    for rows in curves.values():
        if "bytes_read" in rows[0]:
            contexts = [row["context"] for row in rows]
            return contexts, [bandwidth / row["bytes_read"] for row in rows]
    return [], []


# --- the command line ---

def main() -> None:
    p = Parser("render.py", description=__doc__.splitlines()[0])
    p.add_argument("--check", action="store_true", help="only say whether tables and results agree")
    args = p.parse_args()
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n\n{section()}\n{END}{after}"
    if args.check:
        if new != text:
            say("benchmarks/README.md and *.json disagree: run python benchmarks/render.py")
            sys.exit(1)
        return

    README.write_text(new, encoding="utf-8")
    try:
        for file, run in runs():
            if has_curve(run):
                draw(run, picture_of(file, run))
    except ImportError:
        p.error("the tables are written, but the pictures need matplotlib: pip install matplotlib")


if __name__ == "__main__":
    main()
