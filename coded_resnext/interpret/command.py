"""`coded-resnext eval`: the paper's evaluation of a trained network on a data set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..checkpoint import LoadedModel, load_model
from ..data import SPLIT_SEED, batches, load_digits_split
from ..image_folder import find_splits, image_folder
from .evaluate import Evaluation, evaluate
from .figures import save_figures
from .running import Loader

DIGITS = "digits"
EVALUATION_FILE = "evaluation.json"
# As in the evaluation at the end of a training, so that rounding is the same and all digits agree.
DIGITS_BATCH = 256
FOLDER_BATCH = 64


def add_parser(commands: Any) -> None:
    """Add `eval` to the commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "eval",
        help="the paper's evaluation of a trained network",
        description="Accuracy, early decoding, removal of branches and one-class classifiers of a "
        "trained network.",
        epilog="Thresholds of the one-class classifiers are chosen on training images; where "
        "there are none, on the test images themselves, which the output says.",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="model file, or the folder of a run that has one"
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        help="'digits' (the test images of scikit-learn's digits; ./digits is a folder), or a "
        "folder of images: DATA/CLASS/* or DATA/{train,test}/CLASS/*",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write evaluation.json and figures")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--seed", type=int, default=0, help="of the removed branches (default 0)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="of removing branches at random (default 5)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        help=f"images at a time (default {DIGITS_BATCH} for digits, {FOLDER_BATCH} for folders)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print, and write what was asked for; the exit status.

    Raises:
        ValueError: the data do not fit the model, or an argument is outside its range.
        OSError: a file cannot be read or written.
        ImportError: an optional package is missing; the message names the extra that has it.
    """
    loaded = load_model(arguments.checkpoint)
    batch_size = arguments.batch_size
    if batch_size is None:
        batch_size = DIGITS_BATCH if arguments.data == DIGITS else FOLDER_BATCH
    train_loader, test_loader = open_data(loaded, arguments.data, batch_size)
    evaluation = evaluate(
        loaded.model, train_loader, test_loader, seed=arguments.seed, repeats=arguments.repeats
    )
    text = json.dumps(evaluation.to_dict(), indent=1, allow_nan=False)
    print(text if arguments.json else evaluation)
    if arguments.out is not None:
        written = write_evaluation(evaluation, loaded, arguments.out, text)
        if not arguments.json:
            print("\n".join(["", *(f"wrote {path}" for path in written)]))
    return 0


def open_data(loaded: LoadedModel, data: str, batch_size: int) -> tuple[Loader | None, Loader]:
    """Loaders of the training images, None where there are none, and of the test images.

    Args:
        loaded: the model, whose classes and preprocessing the images must fit.
        data: `"digits"` or a folder.
        batch_size: images in a batch, at least 1.

    Raises:
        ValueError: the data do not fit the model.
        NotADirectoryError: the folder does not exist.
        ImportError: an optional package is missing.
    """
    model = loaded.model
    if data == DIGITS:
        if (model.num_classes, model.in_channels) != (10, 1):
            raise ValueError(
                "DATA: digits have 10 classes and 1 channel, the model has "
                f"{model.num_classes} and {model.in_channels}"
            )
        # The images that this network has not seen in training.
        split = load_digits_split(loaded.training.get("split_seed", SPLIT_SEED))
        return (
            batches(split.train_images, split.train_targets, batch_size),
            batches(split.test_images, split.test_targets, batch_size),
        )
    if loaded.preprocessing is None:
        raise ValueError(
            "CHECKPOINT: expected a model with a preprocessing, which says how an image becomes "
            "its input; this one has none"
        )
    train, test = find_splits(data, model.class_names)
    arguments = (model.class_names, loaded.preprocessing)
    return (
        None if train is None else image_folder(train, *arguments, batch_size=batch_size),
        image_folder(test, *arguments, batch_size=batch_size),
    )


def write_evaluation(
    evaluation: Evaluation, loaded: LoadedModel, folder: Path, text: str
) -> list[Path]:
    """Write evaluation.json and the figures; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / EVALUATION_FILE
    path.write_text(text + "\n", encoding="utf-8")
    return [path, *save_figures(evaluation, loaded.model.codebooks, folder)]
