"""Redraw the README's benchmark tables, and the pictures beside the results, from benchmarks/*.json.

    python benchmarks/render.py            # rewrites README.md between its benchmark marks, and the pictures
    python benchmarks/render.py --check    # exit code 1 if the README does not say what the results say"""
import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin, written by benchmarks/render.py -->", "<!-- benchmarks: end -->"

def runs():
    """(file, run) of every end-to-end result; benchmarks/attention.py keeps its own format."""
    for file in sorted(HERE.glob("*.json")):
        content = json.loads(file.read_text())
        if isinstance(content, list):
            yield from ((file, run) for run in content)

def table(run):
    """One run as a Markdown table: a line a contestant, a column of ms a token for each (batch, context, capacity)."""
    rows, columns = {}, {}
    for row in run["rows"]:
        key = row["batch"], row["context"], row["capacity"]
        columns[key] = f"{row['context']} in {row['capacity']}" + f", batch {row['batch']}" * (row["batch"] > 1)
        rows.setdefault(row["contestant"], {})[key] = row
    peer = next((name for name in rows if name == "gpt-fast"), None)
    head = ["ms a token at context in capacity", *columns.values(), "of floor", "first token, s", "compile, s"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name, cells in rows.items():
        texts = [f"**{name}**" if name.startswith("gpt-flash") else name]
        for key in columns:
            ms = cells[key]["ms"] if key in cells else float("nan")
            ratio = f" ({rows[peer][key]['ms'] / ms:.2f}x)" if peer and name != peer else ""
            texts.append(f"{ms:.1f}{ratio}" if key in cells else "")
        first, last = list(cells.values())[0], list(cells.values())[-1]
        floor_ms = first.get("bytes_read", 0) / run["copy_gb_s"] / 1e6
        texts += [f"{floor_ms / first['ms']:.0%}" if floor_ms else "", f"{last['first_token_s']:.2f}",
                  f"{first['compile_s']:.1f}" if first["compile_s"] else ""]
        lines.append("| " + " | ".join(texts) + " |")
    note = (f"{run['shape']} on {run['device']}, torch {run['torch']}, {run['date']}, which copies at "
            f"{run['copy_gb_s']:.0f} GB/s. Of floor: the time in which that moves a step's weights and live cache, as "
            "a share of the first column's.")
    if peer:
        note += " In brackets: speed relative to gpt-fast."
    return "\n".join([note, "", *lines, "", "    " + run["command"], ""])

def draw(run, path):
    """Tokens a second against context at the largest capacity, one line a contestant, the bandwidth floor dashed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    capacity = max(row["capacity"] for row in run["rows"])
    lines = {}
    for row in run["rows"]:
        if row["capacity"] == capacity and row["batch"] == 1:
            lines.setdefault(row["contestant"], []).append(row)
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name, rows in lines.items():
        axes.plot([r["context"] for r in rows], [r["tokens_per_s"] for r in rows], marker="o", label=name,
                  linewidth=2.5 if name.startswith("gpt-flash") else 1.2)
    floor = next((rows for rows in lines.values() if "bytes_read" in rows[0]), [])
    axes.plot([r["context"] for r in floor], [run["copy_gb_s"] * 1e9 / r["bytes_read"] for r in floor], "k--",
              label="copy bandwidth / bytes read")
    axes.set(xscale="log", xlabel="context (tokens in the cache)", ylabel="tokens/s", ylim=(0, None),
             title=f"{run['shape']}, {run['device']}, cache of {capacity}")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)), axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)

def pictures():
    """(run, path) of the runs that have a curve to show: three contexts or more."""
    for i, (file, run) in enumerate(runs()):
        if len({row["context"] for row in run["rows"]}) >= 3:
            yield run, HERE / f"{file.stem}-{run['shape']}.png"

def section():
    parts = []
    for file, run in runs():
        parts.append(table(run))
        parts += [f"![tokens/s against context](benchmarks/{p.name})\n" for other, p in pictures() if other == run]
    return "\n".join(parts)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--check", action="store_true", help="only say whether the README agrees with the results")
    args = p.parse_args()
    text = README.read_text()
    before, rest = text.split(BEGIN)
    new = f"{before}{BEGIN}\n\n{section()}\n{END}{rest.split(END)[1]}"
    if args.check:
        sys.exit(0 if new == text else "README.md and benchmarks/*.json disagree: run python benchmarks/render.py")
    README.write_text(new)
    for run, path in pictures():
        draw(run, path)

if __name__ == "__main__":
    main()
