"""Print the results of a benchmark run as a Markdown table.

`python benchmarks/render.py benchmarks/results/cpu_block_step.json`
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any


def render(content: dict[str, Any]) -> str:
    """Returns the table, the geometric means of its ratios, and where it comes from."""
    machine, rows = content["machine"], content["rows"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        "| " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|" + "---|" * len(columns),
    ]
    lines += [
        "| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows
    ]
    lines.append("")
    for column in columns:
        if "_over_" in column:
            for layout in dict.fromkeys(row.get("layout", "") for row in rows):
                ratios = [
                    row[column] for row in rows if column in row and row.get("layout", "") == layout
                ]
                if ratios:
                    lines.append(
                        f"{column.replace('_', ' ')} {layout}: geometric mean "
                        f"{statistics.geometric_mean(ratios):.3f}, "
                        f"{min(ratios):.3f} to {max(ratios):.3f}  "
                    )
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines.append(
        f"{machine['cpu']}, {machine['threads']} threads; {versions}; "
        f"commit {machine['commit']}, {machine['date']}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prints a file of results as Markdown.")
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    print(render(json.loads(parser.parse_args().results.read_text(encoding="utf-8"))))
