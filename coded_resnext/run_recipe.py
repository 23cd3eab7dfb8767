"""From a recipe to a trained and evaluated network in a folder: what the training scripts share."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .augment import TrainTransform
from .checkpoint import MODEL_FILE, load_model
from .codebook import Codebook
from .datasets import load_dataset
from .engine import fit
from .image_sets import ImageSplits
from .interpret import evaluate, save_figures
from .loaders import EvalImages, TrainImages
from .models import CodedResNeXt
from .recipe import Command, ModelConfig, Recipe
from .registry import create_model
from .run_folder import SUMMARY_FILE, RunFolder, versions
from .warm_start import load_plain_weights, read_state_dict, recalibrate_batch_norm

RECIPE_FILE = "recipe.yaml"
# Images from which the last BatchNorm of coded blocks is measured when weights are plain ones.
CALIBRATION_IMAGES = 512
# How a run is carried out, but not what comes of it: a run may be resumed under other ones.
INCIDENTAL = (
    "data_dir",
    "download",
    "storage",
    "workers",
    "validation_batch_size",
    "initial_checkpoint",
    "codebooks",
    "log_interval",
    "log_wandb",
    "recovery_interval",
)


def open_data(recipe: Recipe) -> ImageSplits:
    """The images that a recipe asks for; raises as `load_dataset`."""
    data = recipe.data
    return load_dataset(
        data.dataset,
        data.data_dir,
        train_images=data.train_images,
        test_images=data.test_images,
        holdout=data.holdout,
        storage=data.storage,
        max_damaged=data.max_damaged,
        download=data.download,
    )


def make_model(recipe: Recipe, class_names: Sequence[str]) -> CodedResNeXt:
    """The network for the classes, with weights of the recipe's seed, on the CPU.

    Raises:
        ValueError: there is no such network, or a codebook does not fit it or the classes.
        OSError: a codebook file cannot be read.
    """
    settings = recipe.model
    arguments: dict[str, Any] = {
        "class_names": class_names,
        "in_channels": 3,
        "drop_branches": settings.drop_branches,
        "head_bias": settings.head_bias,
    }
    # The published codebooks belong to CIFAR-10; any other set gets the best for its size.
    if recipe.data.dataset != "cifar10":
        arguments["num_classes"] = len(class_names)
    if settings.codebooks:
        arguments["codebooks"] = [_codebook(path, class_names) for path in settings.codebooks]
    torch.manual_seed(recipe.training.seed)
    model = create_model(settings.model, **arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = settings.bn_momentum
    return model


def _codebook(path: str, class_names: Sequence[str]) -> Codebook:
    codebook = Codebook.load(path)
    if codebook.classes != len(class_names):
        raise ValueError(
            f"codebooks: expected {len(class_names)} classes as in the data, got "
            f"{codebook.classes} in {path}; make one with `coded-resnext codebook search "
            f"{len(class_names)} {codebook.branches} {codebook.active} -o {path}`"
        )
    if codebook.class_names == tuple(map(str, range(codebook.classes))):
        return codebook.with_class_names(class_names)
    return codebook


def start_from(model: CodedResNeXt, settings: ModelConfig, calibration: EvalImages) -> str:
    """Give a network the weights of `initial_checkpoint`, in place; says what was taken from it.

    The classifier is taken over only for the same classes. Weights of a plain network are made for
    other magnitudes than a coded block gives, so that BatchNorm is measured anew.

    Args:
        model: the network.
        settings: with `initial_checkpoint`.
        calibration: training images without augmentation.

    Raises:
        ValueError: the weights are those of another architecture, or no weights.
        OSError: there is no such file.
    """
    path = Path(settings.initial_checkpoint or "")
    ours = path.is_dir() or path.name == MODEL_FILE
    loaded = load_model(path) if ours else None
    state = loaded.model.state_dict() if loaded else read_state_dict(path)
    if loaded and loaded.model.class_names != model.class_names:
        fresh = {k: v for k, v in model.state_dict().items() if k.startswith("head.")}
        state = {k: v for k, v in state.items() if not k.startswith("head.")} | fresh
    try:
        taken = load_plain_weights(model, state)
    except ValueError as error:
        raise ValueError(
            f"initial_checkpoint: {path} is of another architecture than {settings.model}: {error}"
        ) from error
    text = f"weights from {path}: {taken}"
    was_coded = loaded is not None and bool(loaded.model.coded_blocks)
    if model.coded_blocks and not was_coded:
        batches = -(-CALIBRATION_IMAGES // calibration.batch_size)
        images = recalibrate_batch_norm(model, islice(calibration, batches))
        text += f"; BatchNorm of the coded blocks measured on {images} images"
    return text


def run_recipe(command: Command) -> None:
    """Train, evaluate and write the folder.

    Raises:
        ValueError: the recipe, the data or the folder is at fault.
        OSError: files are missing, or cannot be written.
        ImportError: an optional package is missing.
    """
    start = time.perf_counter()
    recipe = command.recipe
    training, data = recipe.training, recipe.data
    splits = open_data(recipe)
    model = make_model(recipe, splits.class_names)
    identity = {k: v for k, v in recipe.settings().items() if k not in INCIDENTAL}
    run = RunFolder(
        command.out, {"recipe": identity, "network": model.config}, resume=command.resume
    )
    (run.path / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    print(f"{splits}\n{settings_in_words(recipe)}", file=sys.stderr)
    train_loader = TrainImages(
        splits.train,
        TrainTransform(recipe.augmentation, data.preprocessing),
        training.batch_size,
        seed=training.seed,
        workers=data.workers,
        max_damaged=data.max_damaged,
    )
    train_in_order, test_loader = (
        EvalImages(images, data.preprocessing, data.validation_batch_size, workers=data.workers)
        for images in (splits.train, splits.test)
    )
    if recipe.model.initial_checkpoint and run.load_state() is None:
        print(start_from(model, recipe.model, train_in_order), file=sys.stderr)
    if training.channels_last:
        model = model.to(memory_format=torch.channels_last)
    history = fit(
        model,
        train_loader,
        test_loader,
        training,
        run,
        preprocessing=data.preprocessing,
        notes={"data": splits.name, "recipe": identity},
    )
    if not command.evaluation:
        return
    evaluation = evaluate(model, train_in_order, test_loader)
    save_figures(evaluation, model.codebooks, run.path / "figures")
    run.write_json("evaluation.json", evaluation.to_dict())
    run.write_json(
        SUMMARY_FILE,
        {
            **evaluation.summary(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": sum(row["seconds"] for row in history),
            "seconds_with_evaluation": time.perf_counter() - start,
            "versions": versions(),
            "seed": training.seed,
            "damaged_images": train_loader.damaged.reasons,
            "command": shlex.join(["python", *sys.argv]),
        },
    )
    print(f"\n{evaluation}\n\nsummary: {run.path / SUMMARY_FILE}")


def settings_in_words(recipe: Recipe) -> str:
    """What a person wants to see before the training begins."""
    lines = [f"{name}: {text}" for name, text in recipe.about.items()]
    training = recipe.training
    return "\n".join(
        [
            *lines,
            f"{recipe.model.model}, batches of {training.batch_size}, {recipe.describe_lr()}",
            f"weight decay {training.weight_decay:g} on all parameters, BatchNorm's included; "
            f"BatchNorm momentum {recipe.model.bn_momentum:g}",
            f"evaluation: shorter side to {recipe.data.test_resize or recipe.data.img_size}, "
            f"centre {recipe.data.img_size} pixels",
        ]
    )
