"""Train the ablations of the paper's method over several seeds and print them as a table.

Every row differs from the base in one thing: exponent, threshold and weight of the coding loss,
DropSubNNs and whether blocks share its masks, gradients that are masked instead of the coding
loss, energy normalisation, concatenation instead of the sum, codewords that lie near each other,
active branches; the plain twin has no code at all. Rows are compared with the base of the same
seed. Results: docs/ablations.md.

    python train/ablations.py digits --epochs 15 --out runs/ablations
    python train/ablations.py cifar10 --out runs/ablations-cifar10 --seeds 0 1
    python train/ablations.py cifar100 --device cuda --amp --augment-on device --seeds 0 1
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coded_resnext.cli.main import ended_by_interrupt

with ended_by_interrupt():
    import digits
    import reproduce
    import torch

    from coded_resnext import CodedResNeXt
    from coded_resnext.data.batches import RandomShift, TrainingBatches, TrainLoader, batches
    from coded_resnext.data.datasets import DIGITS_NAME, load_digits_split
    from coded_resnext.data.preprocessing import Preprocessing
    from coded_resnext.files import read_json, say, write_atomically
    from coded_resnext.interpret import Loader, evaluate, save_evaluation
    from coded_resnext.interpret.comparing import (
        ABLATIONS,
        Ablation,
        ablated_network,
        ablation_table,
        measures,
        select_ablations,
        summarize,
    )
    from coded_resnext.interpret.results import load_evaluation
    from coded_resnext.training.config import TrainingConfig
    from coded_resnext.training.engine import fit
    from coded_resnext.training.processes import run_script, training_session
    from coded_resnext.training.run_folder import SUMMARY_FILE, RunFolder, versions

RESULTS_FILE = "ablations.json"
# Recipes, and the rows of each where none are named: on CIFAR-100 those of the paper's figures.
STUDIES = {
    "cifar10": reproduce.Scale(
        ("--config", "cifar10_small", "--repeats", "1"),
        tuple(ablation.name for ablation in ABLATIONS),
        "eight minutes and more a run on a CPU",
    ),
    "cifar100": reproduce.Scale(
        ("--config", "cifar100", "--repeats", "1"),
        (
            *("coding weight 0", "coding weight 1", "coding weight 4", "coding weight 10"),
            *("coding weight 20", "DropSubNNs 0", "DropSubNNs 0.2"),
        ),
        "of 300 epochs, for a GPU: not measured",
    ),
}


@dataclass(frozen=True)
class Task:
    """Network, data and recipe that the ablations change."""

    name: str
    base: CodedResNeXt
    config: TrainingConfig
    preprocessing: Preprocessing
    train_loader: Callable[[int], TrainLoader]
    """Makes the training loader for a seed."""
    train_in_order: Loader
    test_loader: Loader


def digits_task(epochs: int | None) -> Task:
    """Returns the task of the digits by the recipe of train/digits.py."""
    arguments = digits.parse_arguments([] if epochs is None else ["--epochs", str(epochs)])
    config = digits.training_config(arguments)
    split = load_digits_split()
    return Task(
        name=DIGITS_NAME,
        base=digits.make_model(arguments),
        config=config,
        preprocessing=split.preprocessing,
        train_loader=lambda seed: TrainingBatches(
            split.train_images,
            split.train_targets,
            config.batch_size,
            seed=seed,
            augment=RandomShift(1),
        ),
        train_in_order=batches(split.train_images, split.train_targets),
        test_loader=batches(split.test_images, split.test_targets),
    )


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line: its own flags, and those that are handed on to the recipe."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Runs that are finished are not run again; the command goes on with one that was "
        f"interrupted. OUT/{RESULTS_FILE} holds every run's measures. Other flags are those of "
        "train/cifar.py, and hold for all runs but the digits'. Rows: "
        + ", ".join(ablation.name for ablation in ABLATIONS)
        + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    costs = "; ".join(f"{name}: {study.cost}" for name, study in STUDIES.items())
    parser.add_argument("task", choices=["digits", *STUDIES], help=f"data and recipe; {costs}")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of runs")
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help="these, and the base; else the task's"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="of each row")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument(
        "--table", action="store_true", help="run nothing, print what the folder holds"
    )
    arguments, rest = parser.parse_known_args()
    if rest and arguments.task == "digits":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments, rest


def train(task: Task, ablation: Ablation, seed: int, folder: Path) -> None:
    """Trains and evaluates one row with one seed; nothing is done if that was done."""
    config = dataclasses.replace(task.config, seed=seed, **ablation.training)
    model = ablated_network(task.base, ablation, seed=seed)
    run = RunFolder(
        folder,
        {
            "data": task.name,
            "ablation": dataclasses.asdict(ablation),
            "network": model.config,
            "training": config.to_dict(),
        },
        resume=True,
    )
    if (folder / SUMMARY_FILE).exists():
        return
    say(f"{ablation.name}, seed {seed}: {folder}", file=sys.stderr)
    model = model.to(memory_format=torch.channels_last)
    history = fit(
        model,
        task.train_loader(seed),
        task.test_loader,
        config,
        run,
        preprocessing=task.preprocessing,
        notes={"data": task.name, "ablation": ablation.name},
    )
    evaluation = evaluate(model, task.train_in_order, task.test_loader, seed=seed, repeats=1)
    evaluation = evaluation.named(task.name, training=run.config)
    save_evaluation(evaluation, folder)
    run.write_json(
        SUMMARY_FILE,
        {
            **evaluation.summary(),
            "ablation": ablation.name,
            "seed": seed,
            "seconds": sum(row["seconds"] for row in history),
            "versions": versions(),
        },
    )


def collect(out: Path, rows: list[Ablation], seeds: list[int]) -> dict[str, dict[int, Any]]:
    """Returns the measures of the finished runs, by row and seed.

    Raises:
        ValueError: not all were measured on the same images.
    """
    finished: dict[str, dict[int, Any]] = {}
    images: dict[Any, Path] = {}
    for ablation in rows:
        for seed in seeds:
            path = reproduce.run_folder(out, ablation, seed) / SUMMARY_FILE
            if path.exists():
                summary = read_json(path)
                of_run = measures(load_evaluation(path.parent))
                finished.setdefault(ablation.name, {})[seed] = of_run
                images.setdefault((summary.get("measured_on") or {}).get("sha256"), path.parent)
    if len(images) > 1:
        others = " and ".join(map(str, images.values()))
        raise ValueError(f"out: {others} were measured on different images")
    return finished


def report(arguments: argparse.Namespace, rows: list[Ablation]) -> None:
    """Writes and prints what the folder holds."""
    runs = collect(arguments.out, rows, arguments.seeds)
    if not runs:
        raise ValueError(f"out: {arguments.out} holds no finished run of these rows and seeds")
    summaries = summarize(runs)
    content = {
        "task": arguments.task,
        "epochs": arguments.epochs,
        "runs": runs,
        "summaries": {
            name: {column: dataclasses.asdict(one) for column, one in columns.items()}
            for name, columns in summaries.items()
        },
        "versions": versions(),
        "command": shlex.join(["python", *sys.argv]),
    }
    text = json.dumps(content, indent=1, allow_nan=False)
    write_atomically(arguments.out / RESULTS_FILE, f"{text}\n".encode())
    say(ablation_table(summaries))


def train_and_report(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Trains what is missing, seed by seed so that all rows have some early on, and reports."""
    out, seeds = arguments.out, arguments.seeds
    if arguments.task in STUDIES:
        study = STUDIES[arguments.task]
        epochs = [] if arguments.epochs is None else ["--epochs", str(arguments.epochs)]
        names = arguments.rows or study.rows
        runs = reproduce.plan_runs([*study.flags, *rest, *epochs], names, seeds, out)
        if not arguments.table:
            reproduce.carry_out(runs)
        rows = select_ablations(names)
    else:
        rows = select_ablations(arguments.rows)
        if not arguments.table:
            with training_session():
                task = digits_task(arguments.epochs)
                for seed in seeds:
                    for ablation in rows:
                        train(task, ablation, seed, reproduce.run_folder(out, ablation, seed))
    report(arguments, rows)


def main() -> int:
    """Runs the command; returns 2 when the input is at fault, 130 or 143 after a signal."""
    arguments, rest = parse_arguments()
    return run_script("ablations.py", lambda: train_and_report(arguments, rest))


if __name__ == "__main__":
    sys.exit(main())
