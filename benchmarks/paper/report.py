"""Outcomes as a CSV file, as a Markdown table with means and deviations over pairs, and as a picture."""

from __future__ import annotations

import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from mudsc_fast._files import atomic_write
from paper.methods import Outcome

COLUMNS = ("pair", "method", "joint", "mean", "task 1", "task 2", "balance", "seconds")
Row = dict[str, str]


def row_of(pair: int, outcome: Outcome) -> Row:
    """Return a row of the CSV file."""
    numbers = {name: f"{value:.2f}" for name, value in outcome.scores.items()}
    balance = "" if outcome.balance is None else f"{outcome.balance:g}"
    return {
        "pair": str(pair),
        "method": outcome.method,
        **numbers,
        "balance": balance,
        "seconds": f"{outcome.seconds:.2f}",
    }


def _settings_file(path: Path) -> Path:
    return path.with_suffix(".settings.json")


def read(path: Path, settings: Sequence[str]) -> list[Row]:
    """Return the rows of an earlier run's CSV file, or no rows if the file does not exist.

    Raises
    ------
    SystemExit
        If the file was written with other settings, because its rows and new ones could not be compared.
    """
    if not path.exists():
        return []
    record = _settings_file(path)
    found = json.loads(record.read_text(encoding="utf-8")) if record.exists() else ["unknown settings"]
    if found != list(settings):
        differing = "\n  ".join(line for line in found if line not in settings)
        raise SystemExit(
            f"{path} holds results of other settings: remove it, or choose another --output. It was written with\n"
            f"  {differing}"
        )
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[Row], settings: Sequence[str]) -> None:
    """Write the CSV file and its settings; existing files are replaced atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(_settings_file(path)) as temporary:
        temporary.write_text(json.dumps(list(settings), indent=1), encoding="utf-8")
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


def table(title: str, notes: Sequence[str], rows: Sequence[Row], published: Mapping[str, float]) -> str:
    """Return a Markdown section with one row per method: mean and standard deviation over the pairs in percent."""
    by_method: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_method[row["method"]].append(row)
    shown = [name for name in COLUMNS[2:6] if any(row.get(name) for row in rows)]
    lines = [f"## {title}", "", *(f"- {note}" for note in notes), ""]
    lines.append("| method | pairs | " + " | ".join(f"{name}, %" for name in shown) + " | published, % |")
    lines.append("| --- " * (len(shown) + 3) + "|")
    for method, found in by_method.items():
        cells = [method, str(len(found))]
        for name in shown:
            values = [float(row[name]) for row in found if row.get(name)]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}" if values else "")
        cells.append(f"{published[method]:.2f}" if method in published else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_table(
    path: Path, title: str, notes: Sequence[str], rows: Sequence[Row], published: Mapping[str, float]
) -> None:
    """Write the Markdown section to a file and print it."""
    text = table(title, notes, rows, published)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)


def picture(path: Path, title: str, rows: Sequence[Row], measure: str = "accuracy") -> None:
    """Save a bar chart of the joint score by method or, without joint scores, of the mean over the tasks."""
    from matplotlib.figure import Figure

    by_method: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_method[row["method"]].append(float(row.get("joint") or row["mean"]))
    joint = any(row.get("joint") for row in rows)
    methods = [method for method in by_method if not joint or method != "parents"]
    means = [statistics.mean(by_method[method]) for method in methods]
    spreads = [statistics.stdev(by_method[m]) if len(by_method[m]) > 1 else 0.0 for m in methods]
    figure = Figure(figsize=(7, 0.32 * len(methods) + 1.2), layout="constrained")
    axes = figure.subplots()
    colors = ["#1a73e8" if "refit" in m else "#669df6" if "dual" in m else "#9aa0a6" for m in methods]
    bars = axes.barh(methods, means, xerr=spreads, color=colors)
    axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.set_xlabel(f"joint {measure}, %" if joint else f"mean {measure} of the tasks, %")
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130, format=path.suffix.removeprefix("."))
