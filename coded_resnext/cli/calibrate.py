"""`coded-resnext calibrate`: the margins of early exit, chosen on held-out images of any run."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from coded_resnext.deploy.early_exit import EXIT_FILE, calibrate, exit_scores
from coded_resnext.files import printable, say
from coded_resnext.interpret.evaluation import DigestedLoader
from coded_resnext.interpret.results import EVALUATION_FILE, load_evaluation
from coded_resnext.models.checkpoint import find_model, load_model, weights_sha256

from .evaluate import data_names, open_data


def run(arguments: argparse.Namespace) -> int:
    """Chooses the margins, writes and prints them, and returns the exit status.

    Raises:
        ValueError: the data do not fit the model, are those that it was trained on, or an argument
            is outside its range; the network has no coded block.
        OSError: a file cannot be read or written.
        ImportError: an optional package is missing; the message names the extra that has it.
    """
    if not 0 <= arguments.max_accuracy_loss < 1:
        raise ValueError(
            "--max-accuracy-loss: expected a share 0 <= loss < 1, got "
            f"{arguments.max_accuracy_loss}"
        )
    checkpoint = Path(arguments.checkpoint)
    if not checkpoint.exists() and find_model(arguments.checkpoint).exists():
        raise ValueError(
            f"RUN: expected a model file or the folder of a run, got {arguments.checkpoint}, the "
            "name of weights that come with the package"
        )
    loaded = load_model(arguments.checkpoint)
    train_loader, held_out = open_data(loaded, arguments.data, arguments.batch_size)
    loader = DigestedLoader(held_out)
    scores = exit_scores(loaded.model, loader)
    assert loader.images is not None
    names = data_names(arguments.data, train_loader)
    images = replace(loader.images, name=names["data"], split=names["test"])
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    trained_on, tested_on = _known_images(folder)
    if images.sha256 == trained_on:
        raise ValueError(
            f"DATA: expected images that the network was not trained on, got "
            f"{printable(arguments.data)}, on which it was: every margin looks better than it is"
        )
    criterion = calibrate(scores, arguments.max_accuracy_loss, agreement=arguments.agreement)
    criterion = replace(
        criterion,
        weights_sha256=weights_sha256(loaded.model),
        calibration={
            "images": asdict(images),
            "max_accuracy_loss": arguments.max_accuracy_loss,
            "held_out_accuracy": scores.accuracy(),
            "held_out_early_accuracy": scores.accuracy(criterion),
        },
    )
    criterion.save(folder / EXIT_FILE)
    exits = scores.exits(criterion).bincount(minlength=len(criterion.margins) + 1).tolist()
    say(f"margins chosen on {images}")
    for number, (margin, count) in enumerate(zip(criterion.margins, exits, strict=False), 1):
        text = "no image leaves" if margin is None else f"margin {margin:.3f}, {count} images leave"
        say(f"coded block {number}: {text}")
    say(
        f"classifier: {exits[-1]} images; accuracy {scores.accuracy():.2%}, with early exit "
        f"{scores.accuracy(criterion):.2%} on these images"
    )
    if images.sha256 == tested_on:
        say("these are the test images of the run: measure early exit on others")
    say(f"wrote {folder / EXIT_FILE}")
    return 0


def _known_images(folder: Path) -> tuple[str | None, str | None]:
    """Returns the digests of the images that a run was trained and tested on, as far as known."""
    provenance = None
    if (folder / EVALUATION_FILE).is_file():
        provenance = load_evaluation(folder).provenance
    if provenance is None:
        return None, None
    thresholds = provenance.thresholds
    return thresholds.sha256 if thresholds else None, provenance.test.sha256
