"""`coded-resnext eval`: the paper's evaluation of a trained network on a data set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from coded_resnext.data.batches import batches
from coded_resnext.data.datasets import (
    DIGITS_NAME,
    find_image_folder,
    load_dataset,
    load_digits_split,
)
from coded_resnext.data.image_sets import ImageSplits
from coded_resnext.data.labelled import images_of_no_class
from coded_resnext.data.loaders import EvalImages
from coded_resnext.data.preprocessing import SPLIT_SEED, Preprocessing
from coded_resnext.files import require_room, say
from coded_resnext.interpret.evaluate import evaluate, plan
from coded_resnext.interpret.observe import Loader
from coded_resnext.interpret.results import (
    require_packages,
    save_evaluation,
    save_pictures,
    text_tables,
    to_json,
)
from coded_resnext.models.checkpoint import LoadedModel, load_model

DIGITS = "digits"
# As in the evaluation at the end of a training, so that rounding is the same and all digits agree.
DIGITS_BATCH = 256
FOLDER_BATCH = 64
# Results of a thousand classes with their figures and tables.
ROOM = 64 * 2**20
NAMED_SETS = ("cifar10", "cifar100", "synthetic")


def run(arguments: argparse.Namespace) -> int:
    """Evaluates, prints and writes what was asked for, and returns the exit status.

    Raises:
        ValueError: the data do not fit the model, or an argument is outside its range.
        OSError: a file cannot be read or written.
        ImportError: an optional package is missing; the message names the extra that has it.
    """
    out: Path | None = arguments.out
    if arguments.csv and out is None:
        raise ValueError("--csv: expected --out DIR beside it, where the tables go")
    if out is not None:
        require_packages("--out")
        require_room(out, ROOM)
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
        images = images_of_no_class([arguments.outside])
        outside = EvalImages(images, _preprocessing(loaded), batch_size)
    loaders = loaded.model, train_loader, test_loader
    options: dict[str, Any] = {
        "outside_loader": outside,
        "seed": arguments.seed,
        "repeats": arguments.repeats,
        "negatives_per_positive": negatives,
        "test_images": arguments.test_images,
        "removal_images": arguments.removal_images,
        "threshold_images": arguments.threshold_images,
        "classes": arguments.classes,
    }
    size = loaded.preprocessing.size if loaded.preprocessing else loaded.model.image_size
    say(plan(*loaders, image_size=(size, size), **options), file=sys.stderr)
    evaluation = evaluate(*loaders, **options)
    evaluation = evaluation.named(
        **data_names(arguments.data, train_loader),
        outside=None if arguments.outside is None else arguments.outside.resolve().name,
        training=loaded.training,
    )
    say(to_json(evaluation) if arguments.json else text_tables(evaluation))
    if out is not None:
        written = save_evaluation(
            evaluation, out, csv=arguments.csv, codebooks=loaded.model.codebooks
        )
        if evaluation.samples is not None and loaded.preprocessing is not None:
            positions = evaluation.samples.positions
            shown = (positions, test_loader, loaded.preprocessing, out, evaluation.images)
            written.append(save_pictures(*shown))
        if not arguments.json:
            say("\n".join(["", *(f"wrote {path}" for path in written)]))
    return 0


def open_data(loaded: LoadedModel, data: str, batch_size: int) -> tuple[Loader | None, Loader]:
    """Loaders of the training images, None where there are none, and of the test images.

    Args:
        loaded: the model, whose classes and preprocessing the images must fit.
        data: `"digits"`, one of `NAMED_SETS`, or a folder.
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
    preprocessing = _preprocessing(loaded)
    splits = _named_set(loaded, data) if data in NAMED_SETS else None
    splits = splits or _folder(loaded, data)
    say(splits, file=sys.stderr)
    train, test = (
        EvalImages(images, preprocessing, batch_size) if len(images) else None
        for images in (splits.train, splits.test)
    )
    if test is None:
        raise ValueError(f"DATA: expected at least one image to test on, found none in {data}")
    return train, test


def _named_set(loaded: LoadedModel, name: str) -> ImageSplits:
    """Returns CIFAR or synthetic images, the same part of them as in the run's training."""
    recipe = loaded.training.get("recipe") or {}
    part: dict[str, Any] = {}
    if recipe.get("dataset") == name:
        part = {key: recipe.get(key) for key in ("train_images", "test_images")}
        part["holdout"] = recipe.get("holdout", 0.0)
    splits = load_dataset(name, **part)
    if splits.class_names != loaded.model.class_names:
        raise ValueError(
            f"DATA: {name} has {len(splits.class_names)} classes, the model has others: "
            f"{loaded.model.num_classes}, the first of them {loaded.model.class_names[0]!r}"
        )
    return splits


def _folder(loaded: LoadedModel, data: str) -> ImageSplits:
    """Returns the images of a folder; of one that the run held images out of, its own split."""
    splits = find_image_folder(data, loaded.model.class_names)
    recipe = loaded.training.get("recipe") or {}
    holdout = recipe.get("holdout") if recipe.get("dataset") == "folder" else None
    if len(splits.train) or not holdout:
        return splits
    if splits.name != loaded.training.get("data"):
        say(
            f"the run held images of {loaded.training.get('data')!r} out; if {splits.name!r} is "
            "the same folder, it was trained on some of these images",
            file=sys.stderr,
        )
        return splits
    part = {key: recipe.get(key) for key in ("train_images", "test_images")}
    return find_image_folder(data, holdout=holdout).slice(holdout=holdout, **part)


def data_names(data: str, train_loader: Loader | None) -> dict[str, str]:
    """Returns the names of the data that `open_data` opened, for `Evaluation.named`."""
    name = DIGITS_NAME if data == DIGITS else data
    if data not in (DIGITS, *NAMED_SETS):
        name = Path(data).resolve().name
    return {"data": name, "test": "all" if train_loader is None else "test"}


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
