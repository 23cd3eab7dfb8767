"""Choose the margins of early exit for digits runs by cross-validation within the training images.

For each fold a network is trained by the run's recipe on the other folds; what its decoders say
about the fold that it has not seen goes into the calibration. The test images choose nothing: they
are measured at the end. The margins belong to the recipe, so that runs of it can share them.
Cost: one training of the recipe for each fold, at a minute and a half on two CPU cores.

    python train/early_exit.py runs/digits
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from coded_resnext.cli.main import ended_by_interrupt

with ended_by_interrupt():
    import torch
    from sklearn.model_selection import StratifiedKFold
    from torch import Tensor

    from coded_resnext import CodedResNeXt, EarlyExit, ExitScores, calibrate, exit_scores
    from coded_resnext.data.batches import RandomShift, TrainingBatches, batches
    from coded_resnext.data.datasets import DIGITS_NAME, load_digits_split
    from coded_resnext.data.preprocessing import SPLIT_SEED
    from coded_resnext.deploy.cost import network_cost
    from coded_resnext.deploy.early_exit import EXIT_FILE, predict_early
    from coded_resnext.files import say, write_atomically
    from coded_resnext.models.checkpoint import LoadedModel, load_model, weights_sha256
    from coded_resnext.training.config import TrainingConfig
    from coded_resnext.training.engine import fit
    from coded_resnext.training.processes import run_script
    from coded_resnext.training.run_folder import RunFolder, versions

MEASUREMENT_FILE = "early_exit_test.json"
SINGLE_IMAGES = 60


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0] if __doc__ else None,
        epilog=f"Writes {EXIT_FILE} and {MEASUREMENT_FILE} into every run. An interrupted "
        "cross-validation goes on where it stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", help="runs of one recipe; the first one's seed trains folds"
    )
    parser.add_argument("--folds", type=int, default=5, help="parts of the training images")
    parser.add_argument(
        "--folds-out", type=Path, help="folder of the folds' runs (RUN/folds of the first run)"
    )
    parser.add_argument(
        "--max-accuracy-loss",
        type=float,
        default=0.001,
        help="largest share of the held-out images that early exit may lose",
    )
    parser.add_argument(
        "--agreement", action="store_true", help="two consecutive decoders must agree"
    )
    parser.add_argument("--rounds", type=int, default=15, help="of measuring the time, at least 1")
    return parser.parse_args()


def cross_validate(loaded: LoadedModel, folds: int, folder: Path) -> ExitScores:
    """Returns what networks trained on the other folds say about every training image."""
    split = load_digits_split(loaded.training.get("split_seed", SPLIT_SEED))
    config = TrainingConfig(**loaded.training["config"])
    images, targets = split.train_images, split.train_targets
    splitter = StratifiedKFold(folds, shuffle=True, random_state=0)
    parts = []
    for number, (inside, outside) in enumerate(splitter.split(images, targets), 1):
        say(f"fold {number} of {folds}", file=sys.stderr)
        held_out = batches(images[outside], targets[outside])
        model = _fresh(loaded.model, config.seed)
        run = RunFolder(
            folder / f"fold-{number}",
            {"folds": folds, "network": model.config, "training": config.to_dict()},
            resume=True,
        )
        loader = TrainingBatches(
            images[inside],
            targets[inside],
            config.batch_size,
            seed=config.seed,
            augment=RandomShift(1),
        )
        fit(model, loader, held_out, config, run, preprocessing=split.preprocessing)
        parts.append(exit_scores(model.eval(), held_out))
    return ExitScores.joined(parts)


def _fresh(model: CodedResNeXt, seed: int) -> CodedResNeXt:
    """Returns the same architecture with weights of the seed."""
    torch.manual_seed(seed)
    fresh = CodedResNeXt.from_config(
        model.config, model.stage_codebooks, class_names=model.class_names
    )
    return fresh.to(memory_format=torch.channels_last)


def measure(
    model: CodedResNeXt, criterion: EarlyExit, images: Tensor, targets: Tensor, rounds: int
) -> dict[str, Any]:
    """Measures accuracy, multiply-accumulates and wall time with early exit and without."""
    whole = network_cost(model, images.shape[2]).macs
    early = predict_early(model, images, criterion)
    with torch.inference_mode():
        final = model(images).argmax(1)
    blocks = len(model.coded_blocks)
    row: dict[str, Any] = {
        "test_images": len(images),
        "accuracy": float((final == targets).double().mean()),
        "early_accuracy": float((early.classes == targets).double().mean()),
        "lost_images": int((final == targets).sum() - (early.classes == targets).sum()),
        "macs_saved": 1 - float(early.macs.double().mean()) / whole,
        "exits": early.exit_blocks.bincount(minlength=blocks + 1).tolist(),
    }
    for batch_size in (1, 256):
        count = SINGLE_IMAGES if batch_size == 1 else len(images) // batch_size * batch_size
        groups = images[:count].split(batch_size)
        early, full = _interleaved(
            rounds,
            lambda groups=groups: [predict_early(model, x, criterion) for x in groups],
            lambda groups=groups: [_classes(model, x) for x in groups],
        )
        row[f"full_ms_batch_{batch_size}"] = 1000 * full / len(groups)
        row[f"early_ms_batch_{batch_size}"] = 1000 * early / len(groups)
        row[f"early_over_full_batch_{batch_size}"] = early / full
    return row


@torch.inference_mode()
def _classes(model: CodedResNeXt, x: Tensor) -> Tensor:
    return model(x).argmax(1)


def _interleaved(rounds: int, *passes: Callable[[], object]) -> list[float]:
    """Returns median seconds of each, by turns, so that other load falls on all alike."""
    seconds: list[list[float]] = [[] for _ in passes]
    for round_ in range(rounds + 1):
        for times, run in zip(seconds, passes, strict=True):
            start = time.perf_counter()
            run()
            if round_:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def calibrate_runs(arguments: argparse.Namespace) -> None:
    """Cross-validates once, then writes and measures the criterion for every run."""
    if arguments.rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {arguments.rounds}")
    runs = [load_model(path) for path in arguments.runs]
    for path, run in zip(arguments.runs, runs, strict=True):
        if "config" not in run.training:
            raise ValueError(f"runs: expected runs with their recipe, got none in {path}")
        if run.training.get("data") != DIGITS_NAME:
            raise ValueError(
                f"runs: expected runs of train/digits.py, got {path}, trained on other images; "
                "`coded-resnext calibrate RUN DATA` is for any run"
            )
    recipes = [{**run.training["config"], "seed": None, "net": run.model.config} for run in runs]
    if any(recipe != recipes[0] for recipe in recipes):
        raise ValueError("runs: expected runs that differ in nothing but the seed")
    folder = arguments.folds_out or arguments.runs[0] / "folds"
    folder.mkdir(parents=True, exist_ok=True)
    scores = cross_validate(runs[0], arguments.folds, folder)
    chosen = calibrate(scores, arguments.max_accuracy_loss, agreement=arguments.agreement)
    criterion = EarlyExit(
        chosen.margins,
        chosen.agreement,
        {
            "samples": len(scores.targets),
            "folds": arguments.folds,
            "max_accuracy_loss": arguments.max_accuracy_loss,
            "held_out_accuracy": scores.accuracy(),
            "held_out_early_accuracy": scores.accuracy(chosen),
            "seed": runs[0].training["config"]["seed"],
        },
    )
    for path, loaded in zip(arguments.runs, runs, strict=True):
        own = replace(criterion, weights_sha256=weights_sha256(loaded.model))
        own.save(path / EXIT_FILE)
        split = load_digits_split(loaded.training.get("split_seed", SPLIT_SEED))
        model = loaded.model.to(memory_format=torch.channels_last)
        row = measure(model, criterion, split.test_images, split.test_targets, arguments.rounds)
        content = {
            **row,
            "weights_sha256": own.weights_sha256,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        text = json.dumps(content, indent=1) + "\n"
        write_atomically(path / MEASUREMENT_FILE, text.encode())
        say(
            f"{path}: accuracy {row['accuracy']:.4f}, with early exit {row['early_accuracy']:.4f} "
            f"at {row['macs_saved']:.1%} fewer MACs; time {row['early_over_full_batch_1']:.2f} at "
            f"batch 1, {row['early_over_full_batch_256']:.2f} at batch 256; exits {row['exits']}"
        )


def main() -> int:
    """Runs the command; returns 2 when the input is at fault, 130 or 143 after a signal."""
    arguments = parse_arguments()
    return run_script("early_exit.py", lambda: calibrate_runs(arguments))


if __name__ == "__main__":
    sys.exit(main())
