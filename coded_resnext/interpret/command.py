"""`coded-resnext eval`: the paper's evaluation of a trained network on a data set."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ..checkpoint import LoadedModel, load_model
from ..data import SPLIT_SEED, Preprocessing, batches, load_digits_split
from ..image_folder import find_images, find_splits, image_folder, read_image
from ..kernels import Backend
from .budget import Budget, parse_duration
from .evaluate import evaluate
from .pictures import save_pictures
from .results import PROGRESS_FILE, save_evaluation, to_json
from .running import Loader

DIGITS = "digits"
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
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write evaluation.json and the figures, PNG and SVG; an interrupted evaluation goes "
        "on when the same command is given again",
    )
    parser.add_argument("--csv", action="store_true", help="write the tables as CSV into DIR too")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--outside",
        type=Path,
        metavar="FOLDER",
        help="images of none of the classes, in any subfolders, for the one-class classifiers",
    )
    parser.add_argument(
        "--negatives",
        metavar="N",
        help="images of other classes that a one-class classifier is tested with for each of its "
        "class, or 'all' (default: all of up to 100 classes, 9 of more)",
    )
    parser.add_argument(
        "--budget",
        metavar="TIME",
        help="such as 90s, 5m or 1h: compute what fits into that, seeded draws of images, classes "
        "and numbers of removed branches, and say what is missing",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="of removing branches at random (default 5)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        help=f"images at a time (default {DIGITS_BATCH} for digits, {FOLDER_BATCH} for folders)",
    )
    parser.add_argument(
        "--backend",
        choices=get_args(Backend),
        default="auto",
        help="who computes the blocks (%(default)s); with triton the network runs on the GPU",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print, and write what was asked for; the exit status.

    Raises:
        ValueError: the data do not fit the model, or an argument is outside its range.
        OSError: a file cannot be read or written.
        ImportError: an optional package is missing; the message names the extra that has it.
    """
    budget = Budget(parse_duration(arguments.budget) if arguments.budget else None)
    out: Path | None = arguments.out
    if arguments.csv and out is None:
        raise ValueError("--csv: expected --out DIR beside it, where the tables go")
    negatives = _negatives(arguments.negatives)
    loaded = load_model(arguments.checkpoint, backend=arguments.backend)
    # The kernels run there, or without one in Triton's interpreter.
    if arguments.backend == "triton" and torch.cuda.is_available():
        loaded.model.cuda()
    batch_size = arguments.batch_size
    if batch_size is None:
        batch_size = DIGITS_BATCH if arguments.data == DIGITS else FOLDER_BATCH
    train_loader, test_loader = open_data(loaded, arguments.data, batch_size)
    outside = None
    if arguments.outside is not None:
        outside = OutsideImages(arguments.outside, _preprocessing(loaded), batch_size)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    evaluation = evaluate(
        loaded.model,
        train_loader,
        test_loader,
        outside_loader=outside,
        seed=arguments.seed,
        repeats=arguments.repeats,
        negatives_per_positive=negatives,
        budget=budget,
        progress=None if out is None else out / PROGRESS_FILE,
    )
    print(to_json(evaluation) if arguments.json else evaluation)
    if out is not None:
        written = save_evaluation(
            evaluation, out, csv=arguments.csv, codebooks=loaded.model.codebooks
        )
        if evaluation.samples is not None and loaded.preprocessing is not None:
            positions = evaluation.samples.positions
            written.append(save_pictures(positions, test_loader, loaded.preprocessing, out))
        if not arguments.json:
            print("\n".join(["", *(f"wrote {path}" for path in written)]))
    return 0


class OutsideImages:
    """A loader of all images below a folder, which belong to none of the classes.

    Args:
        folder: where they are; also in folders inside it.
        preprocessing: from a PIL image to `[C, H, W]`.
        batch_size: images in a batch, at least 1.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no image; while iterating, a file is not a readable one.
    """

    def __init__(self, folder: Path, preprocessing: Preprocessing, batch_size: int) -> None:
        self.files = find_images([folder])
        self.preprocessing, self.batch_size = preprocessing, batch_size

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.files), self.batch_size):
            paths = self.files[start : start + self.batch_size]
            images = torch.stack([read_image(path, self.preprocessing) for path in paths])
            yield images, torch.zeros(len(images), dtype=torch.int64)


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
    arguments = (model.class_names, _preprocessing(loaded))
    train, test = find_splits(data, model.class_names)
    return (
        None if train is None else image_folder(train, *arguments, batch_size=batch_size),
        image_folder(test, *arguments, batch_size=batch_size),
    )


def _preprocessing(loaded: LoadedModel) -> Preprocessing:
    if loaded.preprocessing is None:
        raise ValueError(
            "CHECKPOINT: expected a model with a preprocessing, which says how an image becomes "
            "its input; this one has none"
        )
    return loaded.preprocessing


def _negatives(text: str | None) -> Any:
    if text is None:
        return "auto"
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--negatives: expected a number of at least 1 or 'all', got {text!r}")
    return int(text)
