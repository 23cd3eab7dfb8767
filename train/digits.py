"""Train a Coded ResNeXt on scikit-learn's handwritten digits, evaluate it, and draw its paths.

Data: 1,797 real 8x8 images of 10 classes, stratified 80/20 split. Cost: about a minute and a half
on two CPU cores. Expected test accuracy and the plain twin's: docs/reproduce.md.

    python train/digits.py --out runs/digits
    python train/digits.py --out runs/digits-plain --plain
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from coded_resnext.cli.main import ended_by_interrupt

with ended_by_interrupt():
    import torch

    from coded_resnext import CodedResNeXt, create_model
    from coded_resnext.cli.train import write_results
    from coded_resnext.data.batches import RandomShift, TrainingBatches, batches
    from coded_resnext.data.datasets import DIGITS_NAME, DigitsSplit, load_digits_split
    from coded_resnext.data.preprocessing import SPLIT_SEED
    from coded_resnext.interpret import evaluate
    from coded_resnext.interpret.results import require_packages
    from coded_resnext.kernels import Backend, check_backend
    from coded_resnext.kernels.backend import named_backend
    from coded_resnext.training.config import TrainingConfig
    from coded_resnext.training.engine import fit
    from coded_resnext.training.processes import run_script
    from coded_resnext.training.run_folder import RunFolder


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line, or these arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0] if __doc__ else None,
        epilog="The run's folder holds report.html to look at, model.safetensors, summary.json, "
        "metrics.csv, the split, TensorBoard logs, and the figures as PNG and SVG.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="the run's folder")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in the folder, if there is one"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, order, shifts and dropped branches"
    )
    parser.add_argument("--epochs", type=int, default=50, help="passes over the training images")
    parser.add_argument(
        "--plain", action="store_true", help="train the plain twin: no codebook, cross-entropy only"
    )
    parser.add_argument(
        "--coding-weight", type=float, default=3.0, help="mu: weight of the coding losses, (8)"
    )
    parser.add_argument(
        "--drop-branches",
        type=float,
        default=0.1,
        help="DropSubNNs: probability that a branch is silenced in a training step, (5)",
    )
    parser.add_argument(
        "--exponent", type=float, default=4.0, help="q of the coding loss, (7): 4, 2 or 1"
    )
    parser.add_argument(
        "--concat",
        action="store_true",
        help="the ablation that concatenates the branches instead of summing them",
    )
    parser.add_argument(
        "--backend", choices=get_args(Backend), default="auto", help="who computes the blocks"
    )
    parser.add_argument(
        "--detect-dead-branches",
        action="store_true",
        help="name, after every epoch, branches without energy for every test image",
    )
    return parser.parse_args(argv)


def make_model(arguments: argparse.Namespace) -> CodedResNeXt:
    """Returns the network that the command line asks for, with weights of the seed."""
    check_backend(arguments.backend, "cpu")
    torch.manual_seed(arguments.seed)
    if arguments.plain:
        model = create_model("resnext_digits", backend=arguments.backend)
    else:
        model = create_model(
            "coded_resnext_digits",
            backend=arguments.backend,
            drop_branches=arguments.drop_branches,
            aggregation="concat" if arguments.concat else "sum",
        )
    # A third faster than NCHW for grouped convolutions this small.
    return model.to(memory_format=torch.channels_last)


def training_config(arguments: argparse.Namespace) -> TrainingConfig:
    """Returns the recipe; it was chosen on parts of the training images, see docs/reproduce.md."""
    return TrainingConfig(
        epochs=arguments.epochs,
        batch_size=64,
        lr=0.1,
        weight_decay=1e-3,
        coding_weight=arguments.coding_weight,
        exponent=arguments.exponent,
        smoothing=0.1,
        seed=arguments.seed,
        detect_dead_branches=arguments.detect_dead_branches,
    )


def train(arguments: argparse.Namespace, digits: DigitsSplit) -> None:
    """Trains, evaluates and writes the folder."""
    start = time.perf_counter()
    require_packages("the evaluation after the training")
    model = make_model(arguments)
    config = training_config(arguments)
    backend = named_backend(arguments.backend)
    run = RunFolder(
        arguments.out,
        {
            "data": DIGITS_NAME,
            "split_seed": SPLIT_SEED,
            "network": model.config,
            "training": config.to_dict(),
            # Runs that began before there was a choice are those of auto.
            **({} if backend == "auto" else {"backend": backend}),
        },
        resume=arguments.resume,
    )
    run.write_json(
        "split.json",
        {"train": digits.train_indices.tolist(), "test": digits.test_indices.tolist()},
    )
    train_loader = TrainingBatches(
        digits.train_images,
        digits.train_targets,
        config.batch_size,
        seed=config.seed,
        augment=RandomShift(1),
    )
    test_loader = batches(digits.test_images, digits.test_targets)
    history = fit(
        model,
        train_loader,
        test_loader,
        config,
        run,
        preprocessing=digits.preprocessing,
        notes={"data": DIGITS_NAME, "split_seed": SPLIT_SEED},
    )
    evaluation = evaluate(model, batches(digits.train_images, digits.train_targets), test_loader)
    evaluation = evaluation.named(DIGITS_NAME, training=run.config)
    write_results(
        run,
        model,
        evaluation,
        test_loader,
        digits.preprocessing,
        history,
        seconds_with_evaluation=time.perf_counter() - start,
        seed=arguments.seed,
    )


def main() -> int:
    """Runs the command; returns 2 when the input is at fault, 130 or 143 after a signal."""
    arguments = parse_arguments()
    return run_script("digits.py", lambda: train(arguments, load_digits_split()))


if __name__ == "__main__":
    sys.exit(main())
