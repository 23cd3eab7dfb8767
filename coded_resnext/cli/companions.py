"""What lies beside a model file: thresholds, margins of early exit, results of its evaluation.

A folder may hold several model files, of which only one was measured. Each companion says which by
the SHA-256 of its weights, and is left out, with a line on stderr, for any other.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from coded_resnext.deploy.early_exit import EXIT_FILE, EarlyExit
from coded_resnext.files import LARGEST_RESULTS, UNFIT, read_json, say
from coded_resnext.interpret.results import EVALUATION_FILE
from coded_resnext.kernels.checks import checked_number
from coded_resnext.models.checkpoint import MODEL_FILE, weights_sha256
from coded_resnext.models.resnext import CodedResNeXt
from coded_resnext.models.shipped import find_model
from coded_resnext.training.run_folder import SUMMARY_FILE

# Of a run's summary: what was measured, and not where or how long.
RESULTS = (
    "test_accuracy",
    "test_balanced_accuracy",
    "early_decoding",
    "single_class_average_precision",
    "removal_accuracy",
    "remove_active_accuracy",
    "remove_inactive_accuracy",
)


class Companions:
    """The files beside a model file that were measured on its weights.

    Args:
        checkpoint: the model file, the folder of a run that has one, or a name of shipped weights.
        model: the network that was read from it.

    Attributes:
        folder: where they lie.
        target: the folder for what is made of the model: the same, and for shipped weights one of
            their name in the current folder.
    """

    def __init__(self, checkpoint: str | Path, model: CodedResNeXt) -> None:
        path = find_model(checkpoint)
        self.folder = path if path.is_dir() else path.parent
        self.target = self.folder if path == Path(checkpoint) else Path(checkpoint)
        self._is_model = path.is_dir() or path.name == MODEL_FILE
        self._sha256 = weights_sha256(model)

    def thresholds(self) -> dict[str, float]:
        """Returns the thresholds that the evaluation chose, of the classes that have one.

        Raises:
            ValueError: the file of the evaluation is damaged.
        """
        path = self.folder / EVALUATION_FILE
        content = self._read(path, "evaluation")
        try:
            rows = (content.get("one_class") or {}).get("classifiers", [])
            return {
                row["class_name"]: checked_number("threshold", row["threshold"])
                for row in rows
                if row["threshold"] is not None
            }
        except UNFIT as error:
            raise ValueError(f"{path}: not a readable evaluation: {error}") from error

    def early_exit(self) -> EarlyExit | None:
        """Returns the criterion of early exit, None where there is none; raises as its `load`."""
        path = self.folder / EXIT_FILE
        if not path.is_file():
            return None
        criterion = EarlyExit.load(path)
        return criterion if self._belongs(path, criterion.weights_sha256) else None

    def results(self) -> dict[str, Any]:
        """Returns what the run's summary says was measured; a ValueError where it is damaged."""
        content = self._read(self.folder / SUMMARY_FILE, "summary")
        return {key: content[key] for key in RESULTS if key in content}

    def _read(self, path: Path, kind: str) -> dict[str, Any]:
        """Returns the content of a JSON file, nothing where there is none or it is of others."""
        if not path.is_file():
            return {}
        try:
            content = read_json(path, LARGEST_RESULTS)
            if not isinstance(content, dict):
                raise ValueError(f"expected an object, got {type(content).__name__}")
        except ValueError as error:
            raise ValueError(f"{path}: not a readable {kind}: {error}") from error
        return content if self._belongs(path, content.get("weights_sha256")) else {}

    def _belongs(self, path: Path, sha256: object) -> bool:
        """Says whether a file is for these weights; one that does not say so is for the model's."""
        belongs = self._is_model if sha256 is None else sha256 == self._sha256
        if not belongs:
            say(f"{path}: measured on other weights, left out", file=sys.stderr)
        return belongs
