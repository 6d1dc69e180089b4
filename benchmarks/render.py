"""Redraw the tables of benchmarks/README.md and README.md, and the pictures, of what was measured.

That is in benchmarks/*.json, and in benchmarks/device.jsonl once a GPU was at hand:

    python benchmarks/render.py                         # rewrites both between their marks
    python benchmarks/render.py --device results.jsonl  # keeps these results of a GPU first
    python benchmarks/render.py --check                 # exit code 1 if they disagree"""
import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from cli.arguments import Parser
from generate import say

DEVICE = HERE / "device.jsonl"
NOTHING_YET = (
    "**Nothing has run on a GPU yet** (`python benchmarks/device.py --out FOLDER` tries all):\n"
    "kernels run in Triton's interpreter against references and are compiled ahead of time."
)
NOT_MEASURED = (
    "**Not measured yet: everything on a GPU.** `python benchmarks/device.py --out FOLDER` on a\n"
    "CUDA machine fills the gap in some eight minutes."
)

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
    text = f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"
    if reference is None or case not in reference:
        return text
    return f"{text} ({reference[case]['ms'] / ms:.2f}x)"


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


# --- what a GPU said: lines of benchmarks/device.py ---

Line = dict[str, Any]


def device_lines() -> list[Line]:
    return read_lines(DEVICE) if DEVICE.exists() else []


def read_lines(file: Path) -> list[Line]:
    """The results in it; a line that was cut off in the middle is left out."""
    lines = []
    for text in file.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def of_part(lines: list[Line], part: str, key: str) -> list[Line]:
    """The lines of a part that have something to say."""
    return [line for line in lines if line["part"] == part and key in line]


def run_of(lines: list[Line]) -> Run:
    """The decode steps as a run of benchmarks/decode.py."""
    [facts] = of_part(lines, "machine", "device")
    rows = of_part(lines, "decode", "ms")
    for part in ("gpt-fast", "transformers"):
        rows += of_part(lines, part, "ms")
    return facts | {"rows": rows}


def is_verified(lines: list[Line]) -> bool:
    """Whether all comparisons with a CPU and with references ran and were right."""
    parts = ("smoke", "cuda_test", "kernels_test")
    found = [of_part(lines, part, "ok") for part in parts]
    ended = [line["ended"] == "done" for part in parts for line in of_part(lines, part, "ended")]
    right = all(line["ok"] for each in found for line in each)
    return all(found) and ended == [True] * len(parts) and right


def device_section(lines: list[Line]) -> str:
    """All that a run of benchmarks/device.py says, in Markdown, however far it came."""
    if not of_part(lines, "machine", "device"):
        return "Nothing was found out.\n"
    run = run_of(lines)
    verified = "" if is_verified(lines) else "**Unverified: not all checks ran and passed.** "
    versions = ", ".join(f"{name} {run[name]}" for name in ("torch", "triton") if name in run)
    parts = [f"{verified}{run['device']}, {versions}.\n", checks_table(lines)]
    if run["rows"]:
        parts.append(table(run))
    shown = {
        "profile": ("variant", "step_us", "us", "calls", "kernel"),
        "attention": ("group", "batch", "length", "kernel", "us", "share", "why"),
        "prefill": ("variant", "tokens", "first_ms", "ms"),
        "rooms": ("room", "attention", "ms", "compile_s"),
    }
    for part, keys in shown.items():
        rows = of_part(lines, part, keys[0])
        if rows:
            parts.append(plain_table(part, keys, rows))
    return "\n".join(parts)


def checks_table(lines: list[Line]) -> str:
    """How each part ended, how many of its checks passed, what failed, and what was left out."""
    rows = [["part", "passed", "failed", "seconds", "ended"]]
    failed = []
    for line in lines:
        if "ended" in line:
            checks = of_part(lines, line["part"], "ok")
            right = Counter(check["ok"] for check in checks)
            counts = [str(right[True] or ""), str(right[False] or "")]
            rows.append([line["part"], *counts, f"{line['seconds']:.0f}", line["ended"]])
            failed += [f"- {x['name']}: {x.get('why', '')}" for x in checks if not x["ok"]]
        if "left_out" in line:
            failed.append(f"- {line['part']}, left out: {line['left_out']}")
    texts = [text.replace("\n", " ") for text in failed]
    return in_columns(rows) + "\n".join(["", *texts, ""] if texts else [])


def plain_table(title: str, keys: tuple[str, ...], rows: list[Line]) -> str:
    texts = [[title if key == keys[0] else key for key in keys]]
    for row in rows:
        texts.append([text_of(row.get(key)) for key in keys])
    return in_columns(texts)


def text_of(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def in_columns(rows: list[list[str]]) -> str:
    lines = [markdown(rows[0]), "|" + "---|" * len(rows[0]), *map(markdown, rows[1:])]
    return "\n".join(lines) + "\n"


def gpu_paragraph(lines: list[Line]) -> str:
    """README's words on GPUs: that nothing has run there, or a table of the decode steps."""
    if not lines:
        return NOTHING_YET
    run = run_of(lines)
    cells: dict[str, dict[Case, Row]] = {}
    for row in run["rows"]:
        case = (row["batch"], row["context"], row["capacity"])
        cells.setdefault(row["contestant"], {})[case] = row
    columns = {case: row for of_one in cells.values() for case, row in of_one.items()}
    texts = [[f"{run['shape']}, ms a step at", *map(column_title, columns.values())]]
    for name, of_one in cells.items():
        texts.append([name, *(share_cell(of_one.get(case)) for case in columns)])
    verified = "" if is_verified(lines) else " Not all checks passed there."
    note = f"On one {run['device']}, torch {run['torch']}, {run['date']}.{verified} In brackets:"
    return f"{note}\nshare of the copy bandwidth.\n\n{in_columns(texts)}".rstrip()


def share_cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row['ms']:.2f}" + (f" ({row['share']:.0%})" if "share" in row else "")

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

def between(text: str, mark: str, new: str) -> str:
    """A page with other words between two marks."""
    before, begin, rest = text.partition(f"<!-- {mark}: begin")
    first_line, _, rest = rest.partition("\n")
    _, end, after = rest.partition(f"<!-- {mark}: end")
    assert begin and end, f"there is no mark {mark}"
    return f"{before}{begin}{first_line}\n{new}\n{end}{after}"


def pages() -> dict[Path, str]:
    """What the pages are to be."""
    lines = device_lines()
    page = HERE / "README.md"
    text = between(page.read_text(encoding="utf-8"), "benchmarks", f"\n{section()}")
    text = between(text, "device", device_section(lines) if lines else NOT_MEASURED)
    first = HERE.parent / "README.md"
    return {page: text, first: between(first.read_text("utf-8"), "gpu", gpu_paragraph(lines))}


def main() -> None:
    p = Parser("render.py", description=__doc__.splitlines()[0])
    p.add_argument("--check", action="store_true", help="only say whether tables and results agree")
    p.add_argument("--device", metavar="FILE", type=Path, help="results of benchmarks/device.py")
    args = p.parse_args()
    if args.device is not None:
        try:
            lines = read_lines(args.device)
            if "triton" not in run_of(lines):
                raise ValueError("it ran on a CPU")
        except (OSError, ValueError, KeyError, TypeError) as e:
            p.error(f"--device {args.device} has no results of benchmarks/device.py: {e!r:.100}")
        DEVICE.write_text("".join(json.dumps(line) + "\n" for line in lines))
    new = pages()
    wrong = [page for page, text in new.items() if page.read_text(encoding="utf-8") != text]
    if args.check:
        if wrong:
            say("README.md or benchmarks/README.md and the results disagree: run "
                "python benchmarks/render.py")
            sys.exit(1)
        return

    for page, text in new.items():
        page.write_text(text, encoding="utf-8")
    try:
        for file, run in runs():
            if has_curve(run):
                draw(run, picture_of(file, run))
    except ImportError:
        p.error("the tables are written, but the pictures need matplotlib: pip install matplotlib")


if __name__ == "__main__":
    main()
