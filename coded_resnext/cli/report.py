"""`coded-resnext report`: the results of a run as one page to look at and to send."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.files import as_text, say, write_atomically
from coded_resnext.interpret.evaluation import Evaluation
from coded_resnext.interpret.figures import save_figures
from coded_resnext.interpret.report import gather, render
from coded_resnext.interpret.results import csv_tables, load_evaluation
from coded_resnext.models.checkpoint import find_model

REPORT_FILE = "report.html"


def run(arguments: argparse.Namespace) -> int:
    """Gathers the report, writes it, says where, and returns the exit status.

    Raises:
        ValueError: the folder holds nothing of a run.
        OSError: there is no such folder, or a file cannot be written.
        ImportError: Jinja is not installed.
    """
    folder = find_model(arguments.folder)
    content = gather(folder)
    written = []
    if arguments.csv is not None or arguments.figures is not None:
        evaluation = load_evaluation(folder)
        if arguments.csv is not None:
            written += _write_tables(evaluation, arguments.csv)
        if arguments.figures is not None:
            books = [Codebook.from_dict(book) for book in evaluation.codebooks]
            of_blocks = [books[block.codebook] for block in evaluation.blocks]
            written += save_figures(evaluation, of_blocks, arguments.figures)
    if arguments.json:
        say(json.dumps(content, indent=1, allow_nan=False))
        return 0
    written.append(_write_page(content, arguments.out or Path(arguments.folder) / REPORT_FILE))
    for path in written:
        say(f"wrote {path}")
    for entry in content["missing"]:
        say(f"missing: {entry['part']}: {entry['why']} {entry['remedy'] or ''}".rstrip())
    return 0


def _write_tables(evaluation: Evaluation, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in csv_tables(evaluation).items():
        write_atomically(folder / name, text.encode())
        written.append(folder / name)
    return written


def write_report(folder: Path) -> Path:
    """Writes the page of a run into its folder, and returns the path.

    Raises:
        As `gather` and `render`.
    """
    return _write_page(gather(folder), folder / REPORT_FILE)


def _write_page(content: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A command line, say, may hold names that are not UTF-8.
    write_atomically(path, as_text(render(content)).encode())
    return path
