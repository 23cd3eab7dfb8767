"""Print the summaries of several runs as a Markdown table, with mean and standard deviation.

    python train/compare.py runs/coded-* runs/plain-*

Runs whose folders differ only in a final number (`coded-0`, `coded-1`) are one group.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from coded_resnext.training.run_folder import SUMMARY_FILE

PRECISION = "one-class mean average precision"


def columns(summary: dict[str, Any]) -> dict[str, float]:
    """The numbers of a summary by column: percent, but for average precision and seconds."""
    row = {"test accuracy": 100 * summary["test_accuracy"]}
    for block, accuracy in enumerate(summary["early_decoding"], 1):
        row[f"early decoding {block}"] = 100 * accuracy
    precision = [p for p in summary["single_class_average_precision"] if p is not None]
    if precision:
        row[PRECISION] = statistics.fmean(precision)
    for kind in ("inactive", "active"):
        for block, accuracy in enumerate(summary[f"remove_{kind}_accuracy"], 1):
            if accuracy is None:  # not computed within the budget
                continue
            change = 100 * (accuracy - summary["test_accuracy"])
            row[f"points without {kind} branches {block}"] = change
    return {**row, "seconds": summary["seconds"]}


def table(groups: dict[str, list[dict[str, float]]]) -> str:
    """One row for each quantity, one column for each group."""
    names = list(dict.fromkeys(name for rows in groups.values() for row in rows for name in row))
    lines = [
        "| | " + " | ".join(f"{group} ({len(rows)} runs)" for group, rows in groups.items()) + " |",
        "|---|" + "---|" * len(groups),
    ]
    for name in names:
        digits = 4 if name == PRECISION else 2
        cells = [
            describe([row[name] for row in rows if name in row], digits) for rows in groups.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe(values: list[float], digits: int) -> str:
    """Mean, standard deviation (n - 1) and range of the runs."""
    if not values:
        return ""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    mean = statistics.fmean(values)
    return (
        f"{mean:.{digits}f} ± {spread:.{digits}f} "
        f"({min(values):.{digits}f} to {max(values):.{digits}f})"
    )


def main() -> int:
    """Read the folders and print the table; 2 when a run has no summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    groups: dict[str, list[dict[str, float]]] = {}
    for run in parser.parse_args().runs:
        path = run / SUMMARY_FILE
        if not path.exists():
            print(f"compare.py: {path}: no summary; is the run finished?", file=sys.stderr)
            return 2
        group = re.sub(r"[-_]?\d+$", "", run.resolve().name)
        summary = json.loads(path.read_text(encoding="utf-8"))
        groups.setdefault(group, []).append(columns(summary))
    print(table(groups))
    return 0


if __name__ == "__main__":
    sys.exit(main())
