"""`coded-resnext report`: the results of a run as one page to look at and to send."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically
from ..interpret.report import gather, render

REPORT_FILE = "report.html"


def add_parser(commands: Any) -> None:
    """Add `report` to the commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        help="the results of a run as one web page",
        description="Write one HTML file, which needs no network, of what the run's folder holds: "
        "paths, test images, removed branches, one-class classifiers, early exit, codebooks, "
        "training and configuration.",
        epilog="Nothing is measured here: `coded-resnext eval RUN DATA --out RUN` makes results. "
        "What a run does not have the page lists.",
    )
    parser.add_argument("folder", metavar="RUN", type=Path, help="the folder of a run")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"the page (default: RUN/{REPORT_FILE})"
    )
    parser.add_argument(
        "--csv", type=Path, metavar="DIR", help="also write the results' tables as CSV"
    )
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="also draw the results as PNG and SVG"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the content as JSON instead of writing the page"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Gather, write, and say where; the exit status.

    Raises:
        ValueError: the folder holds nothing of a run.
        OSError: there is no such folder, or a file cannot be written.
        ImportError: Jinja is not installed.
    """
    content = gather(arguments.folder)
    written = []
    if arguments.csv is not None or arguments.figures is not None:
        evaluation = load_evaluation(arguments.folder)
        if arguments.csv is not None:
            written += save_tables(evaluation, arguments.csv)
        if arguments.figures is not None:
            written += save_figures(evaluation, codebooks_of(evaluation), arguments.figures)
    if arguments.json:
        print(json.dumps(content, indent=1, allow_nan=False))
        return 0
    written.append(write_page(content, arguments.out or arguments.folder / REPORT_FILE))
    for path in written:
        print(f"wrote {path}")
    for entry in content["missing"]:
        print(f"missing: {entry['part']}: {entry['why']} {entry['remedy'] or ''}".rstrip())
    return 0


def write_page(content: dict[str, Any], path: Path) -> Path:
    """Write the page of what `gather` found; the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(content).encode())
    return path
