"""What a training script leaves in the run's folder once the network is trained and evaluated."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from .commands.report import write_report
from .data import Preprocessing
from .interpret import Evaluation, Loader, save_figures, save_pictures
from .models import CodedResNeXt
from .run_folder import DEAD_FILE, SUMMARY_FILE, RunFolder, versions
from .text_files import read_json

# What evaluation, figures and report need beyond the training: module and package.
NEEDED = {"jinja2": "jinja2", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}


def require_packages() -> None:
    """Refuse to start a training whose evaluation could not be finished.

    Raises:
        ImportError: a package that `write_results` or the experiments need is missing.
    """
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ImportError(
            f"the evaluation after the training needs {' and '.join(missing)}; "
            "install coded-resnext[report]"
        )


def write_results(
    run: RunFolder,
    model: CodedResNeXt,
    evaluation: Evaluation,
    test_loader: Loader,
    preprocessing: Preprocessing,
    history: Sequence[Mapping[str, float]],
    **summary: Any,
) -> None:
    """Write evaluation, figures, pictures, summary and report, and print where they are.

    Args:
        run: the run's folder.
        model: the trained network.
        evaluation: of it.
        test_loader: what it was evaluated on.
        preprocessing: of the test images.
        history: rows of `fit`.
        summary: further entries of the summary, JSON-ready.
    """
    dead = run.path / DEAD_FILE
    if dead.is_file():
        summary["dead_branches"] = read_json(dead)["blocks"]
    run.write_json("evaluation.json", evaluation.to_dict())
    run.write_json(
        SUMMARY_FILE,
        {
            **evaluation.summary(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": sum(row["seconds"] for row in history),
            "versions": versions(),
            "command": shlex.join(["python", *sys.argv]),
            **summary,
        },
    )
    figures = save_figures(evaluation, model.codebooks, run.path / "figures")
    if evaluation.samples is not None:
        save_pictures(evaluation.samples.positions, test_loader, preprocessing, run.path)
    print(f"\n{evaluation}\n\nsummary: {run.path / SUMMARY_FILE}")
    for figure in figures:
        if figure.suffix == ".png":
            print(f"picture: {figure}")
    print(f"report: {write_report(run.path)}")
