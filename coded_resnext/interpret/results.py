"""The results of an evaluation in a folder: JSON, CSV and figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..atomic_file import write_atomically
from ..codebook import Codebook
from ..text_files import LARGEST_RESULTS, read_json
from .evaluation import Evaluation
from .figures import save_figures
from .tables import csv_tables

EVALUATION_FILE = "evaluation.json"
PROGRESS_FILE = "evaluation.progress.json"


def to_json(evaluation: Evaluation) -> str:
    """The text of `evaluation.json`."""
    return json.dumps(evaluation.to_dict(), indent=1, allow_nan=False)


def save_evaluation(
    evaluation: Evaluation,
    folder: str | Path,
    *,
    csv: bool = False,
    codebooks: Sequence[Codebook] | None = None,
) -> list[Path]:
    """Write `evaluation.json`, and what else is asked for.

    Args:
        evaluation: the results.
        folder: made if missing.
        csv: write the tables too, as `NAME.csv`.
        codebooks: draw the figures too; `model.codebooks`.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {EVALUATION_FILE: to_json(evaluation) + "\n"}
    if csv:
        files |= csv_tables(evaluation)
    for name, content in files.items():
        write_atomically(folder / name, content.encode())
    written = [folder / name for name in files]
    if codebooks is not None:
        written += save_figures(evaluation, codebooks, folder)
    return written


def load_evaluation(path: str | Path) -> Evaluation:
    """Read the results that `save_evaluation` wrote.

    Args:
        path: the file, or the folder that has it.

    Raises:
        ValueError: the file is damaged, or of another format version; the message names it.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = path / EVALUATION_FILE
    try:
        return Evaluation.from_dict(read_json(path, LARGEST_RESULTS))
    except ValueError as error:
        raise ValueError(f"{path}: not an evaluation: {error}") from error
