"""Compare the ratios of two benchmark runs, and fail if one has fallen by more than a fifth.

    pytest benchmarks/bench_merge.py --benchmark-only --benchmark-json=new.json
    python benchmarks/compare.py benchmarks/results/merge.json new.json

Each file is the output of pytest-benchmark or only its ratios, as written by ``--reduce``. The repository keeps only
ratios, because times in seconds depend on the machine.

    python benchmarks/compare.py --reduce new.json benchmarks/results/merge.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mudsc_fast._files import atomic_write

#: A ratio may fall to this share of its old value.
LEAST_SHARE = 0.8

#: Ratios by name for each benchmark; higher is better.
Ratios = dict[str, dict[str, float]]


def load(path: Path) -> Ratios:
    """Return the ratios in a file.

    Raises
    ------
    ValueError
        If the file is not JSON or has no ratios.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if "benchmarks" in document:
        ratios = {entry["name"]: _ratios(entry["extra_info"]) for entry in document["benchmarks"]}
    else:
        ratios = document.get("ratios", {})
    found = {name: values for name, values in ratios.items() if values}
    if not found:
        raise ValueError(f"{path} holds no ratios")
    return found


def _ratios(info: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in info.get("ratios", {}).items()}


def regressions(old: Ratios, new: Ratios) -> list[str]:
    """Return a line for each ratio of `old` that has fallen by more than a fifth or is missing from `new`."""
    lines = []
    for name, ratios in old.items():
        for ratio, before in ratios.items():
            now = new.get(name, {}).get(ratio)
            if now is None:
                lines.append(f"{name}: {ratio} was {before:g}, is missing")
            elif now < LEAST_SHARE * before:
                lines.append(f"{name}: {ratio} was {before:g}, is {now:g}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two files, or reduce one. Return 1 if a ratio has fallen, and 2 if a file cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="the file to compare with, or to reduce")
    parser.add_argument("new", type=Path, help="the file to compare, or to write")
    parser.add_argument("--reduce", action="store_true", help="write the ratios of the first file to the second")
    options = parser.parse_args(arguments)
    try:
        old = load(options.old)
        if options.reduce:
            with atomic_write(options.new) as temporary:
                temporary.write_text(json.dumps({"ratios": old}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            return 0
        fallen = regressions(old, load(options.new))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(fallen) if fallen else f"no ratio fell below {LEAST_SHARE:g} of its old value")
    return 1 if fallen else 0


if __name__ == "__main__":
    raise SystemExit(main())
