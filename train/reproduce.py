"""Train coded and plain networks and ablations on CIFAR-10 over several seeds, into one table.

Three scales: `small`, reduced to fit a CPU; `short`, the published recipe with 60 epochs, and
`full`, its 300, both as a GPU wants them (bfloat16, compiled, images and augmentation on the GPU).
`--compare` trains nothing: it prints the summaries of any runs as a Markdown table. Runs whose
recipes differ in nothing but the seed are one group. Below the table is which runs are in a group,
and what its recipe has other than the first one's. Results: docs/reproduce.md.

    python train/reproduce.py --scale small --out runs/reproduce-small
    python train/reproduce.py --scale short --out runs/reproduce-short
    python train/reproduce.py --scale short --out runs/reproduce-short --plan
    python train/reproduce.py --compare runs/coded-* runs/plain-*
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from coded_resnext.cli.main import ended_by_interrupt

with ended_by_interrupt():
    import torch

    from coded_resnext.cli.report import REPORT_FILE
    from coded_resnext.cli.train import ROTATED, Command, identity, parse_command, run_recipe
    from coded_resnext.files import read_json, say, write_atomically
    from coded_resnext.interpret.comparing import (
        BASE,
        PLAIN,
        Ablation,
        FinishedRun,
        ablated_network,
        ablation_table,
        accuracy_table,
        best_run,
        class_table,
        describe_groups,
        group_runs,
        measures,
        removal_table,
        select_ablations,
        summarize,
        summary_table,
    )
    from coded_resnext.interpret.report.page import read_log
    from coded_resnext.interpret.results import load_evaluation
    from coded_resnext.training.processes import run_script
    from coded_resnext.training.run_folder import (
        CONFIG_FILE,
        FREE_SETTINGS,
        METRICS_FILE,
        SUMMARY_FILE,
        describe_machine,
        differences,
    )

TABLE_FILE, RESULTS_FILE = "reproduce.md", "reproduce.json"
# Test accuracy after the published training, percent; exponent 1 is the absolute value.
PAPER = {BASE: 94.41, PLAIN: 93.66, "exponent 2": 93.1, "exponent 1": 87.1}
PUBLISHED_ROWS = (BASE, PLAIN, "exponent 2", "exponent 1")
CIFAR_IMAGES = 50_000
GPU = (
    *("--amp", "--amp-dtype", "bfloat16", "--torchcompile", "inductor"),
    *("--augment-on", "device", "--workers", "8", "--device", "cuda"),
)


@dataclass(frozen=True)
class Scale:
    """A size of the experiment: which recipe, and what is changed in it."""

    flags: tuple[str, ...]
    """Flags of train/cifar.py."""
    rows: tuple[str, ...]
    cost: str


SCALES = {
    "small": Scale(
        (
            *("--config", "cifar10_small", "--train-images", "2500", "--test-images", "1000"),
            *("--epochs", "4", "--batch-size", "64", "--augment-on", "device"),
            *("--threshold-images", "300", "--repeats", "1", "--device", "cpu"),
        ),
        (*PUBLISHED_ROWS, "concatenation", "DropSubNNs 0", "coding weight 1"),
        "about a minute each on two CPU cores",
    ),
    "short": Scale(
        ("--config", "cifar10", "--epochs", "60", *GPU),
        PUBLISHED_ROWS,
        "of 60 epochs; seconds an epoch on a GPU: not measured",
    ),
    "full": Scale(
        ("--config", "cifar10", *GPU),
        PUBLISHED_ROWS,
        "of 300 epochs; seconds an epoch on a GPU: not measured",
    ),
}


@dataclass(frozen=True)
class PlannedRun:
    """One training."""

    ablation: Ablation
    seed: int
    command: Command

    @property
    def images(self) -> int:
        """Returns the number of images that the training goes through."""
        recipe = self.command.recipe
        return (recipe.data.train_images or CIFAR_IMAGES) * recipe.training.total_epochs

    @property
    def is_finished(self) -> bool:
        """Says whether the folder holds the results of this run.

        Raises:
            ValueError: it holds those of another one.
        """
        folder = self.command.out
        if not (folder / SUMMARY_FILE).exists():
            return False
        stored = read_json(folder / CONFIG_FILE)["recipe"]
        wanted = json.loads(json.dumps(identity(self.command.recipe)))
        if differing := differences(stored, wanted, ignore=FREE_SETTINGS):
            raise ValueError(f"out: {folder} holds a run of another kind: {'; '.join(differing)}")
        provenance = load_evaluation(folder).provenance
        if provenance is not None:
            outside = provenance.outside.name if provenance.outside else None
            measured = {**provenance.settings, "outside": outside}
            asked = self.measuring
            if differing := differences({name: measured.get(name) for name in asked}, asked):
                raise ValueError(
                    f"out: {folder} was measured in another way: {'; '.join(differing)}; without "
                    f"its {SUMMARY_FILE} it is measured again"
                )
        return True

    @property
    def measuring(self) -> dict[str, Any]:
        """Returns what the command asks the evaluation for."""
        data = self.command.recipe.data
        return {
            "outside": None if self.ablation.name == PLAIN else self.command.outside,
            "repeats": data.repeats,
            "test_images": data.eval_images,
            "removal_images": data.removal_images,
            "threshold_images": data.threshold_images,
        }

    def result(self) -> FinishedRun:
        """Returns the measurements of a finished run."""
        folder = self.command.out
        log = read_log(folder / METRICS_FILE)
        return FinishedRun(
            self.ablation.name,
            self.seed,
            load_evaluation(folder),
            read_json(folder / SUMMARY_FILE)["seconds"],
            statistics.median(value or 0.0 for value in log["images_per_second"]),
            max(value or 0.0 for value in log["peak_memory_mib"]),
        )


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line: its own flags, and those that are handed on to the recipe."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Other flags are those of train/cifar.py, and hold for all runs: --epochs, "
        "--data-dir, --device, --workers .. Finished runs are not run again, and the "
        "command goes on with one that was interrupted, on this machine or on one that OUT was "
        f"copied to. OUT/{TABLE_FILE} and OUT/{RESULTS_FILE} hold the results, OUT/{REPORT_FILE} "
        "the report of the coded run with the best test accuracy.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="small",
        help="; ".join(f"{name}: {scale.cost}" for name, scale in SCALES.items()),
    )
    parser.add_argument("--out", type=Path, help="folder of the runs (runs/reproduce-SCALE)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="these, and the base")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="(%(default)s)")
    parser.add_argument(
        "--outside",
        default=ROTATED,
        help="images of none of the classes: rotated, cifar100 or a folder (%(default)s)",
    )
    parser.add_argument("--plan", action="store_true", help="run nothing, print the runs and costs")
    parser.add_argument(
        "--table", action="store_true", help="run nothing, print what the folder holds"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run nothing, print the summaries of these finished runs beside each other",
    )
    arguments, rest = parser.parse_known_args(argv)
    if arguments.compare and rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.out = arguments.out or Path("runs") / f"reproduce-{arguments.scale}"
    return arguments, rest


def plan(arguments: argparse.Namespace, rest: Sequence[str]) -> list[PlannedRun]:
    """Returns all runs, seed by seed, so that all rows have some early on.

    Raises:
        ValueError: an unknown row, or a setting at fault.
    """
    scale = SCALES[arguments.scale]
    flags = [*scale.flags, *rest, "--outside", arguments.outside]
    return plan_runs(flags, arguments.rows or scale.rows, arguments.seeds, arguments.out)


def plan_runs(
    flags: Sequence[str], rows: Sequence[str], seeds: Sequence[int], out: Path
) -> list[PlannedRun]:
    """Runs of a recipe with these flags, seed by seed; raises as `plan`."""
    runs = []
    for seed in seeds:
        for ablation in select_ablations(rows):
            own = ["--out", str(run_folder(out, ablation, seed)), "--resume", f"--seed={seed}"]
            for key, value in ablation.training.items():
                flag = f"--{key.replace('_', '-')}"
                own.append(flag if value is True else f"{flag}={value}")
            command = parse_command([*flags, *own], description=__doc__ or "", default="cifar10")
            runs.append(PlannedRun(ablation, seed, command))
    return runs


def run_folder(out: Path, ablation: Ablation, seed: int) -> Path:
    """Returns where the run of a row and a seed is."""
    return out / f"{re.sub('[^a-z0-9.]+', '-', ablation.name.lower())}-{seed}"


def describe_plan(runs: Sequence[PlannedRun], cost: str) -> str:
    """Returns the runs and what they cost, by the speed of finished ones where there are some."""
    lines, left, speeds = [], 0.0, _speeds(runs)
    for run in runs:
        speed, state = speeds.get(run.ablation.name), "finished"
        if not run.is_finished:
            state = "training: time not measured"
            if speed:
                left += run.images / speed
                state = f"training: about {run.images / speed:.0f} s"
        training = run.command.recipe.training
        lines.append(
            f"{run.command.out}: {run.ablation.name}, seed {run.seed}, "
            f"{training.total_epochs} epochs, {run.images} images; {state}"
        )
    known = f"; trainings left whose speed is known: about {left / 60:.0f} minutes" if left else ""
    images = sum(run.images for run in runs if not run.is_finished)
    return "\n".join(
        [*lines, f"{len(runs)} runs ({cost}); {images} images left to train on{known}"]
    )


def _speeds(runs: Sequence[PlannedRun]) -> dict[str, float]:
    by_row: dict[str, list[float]] = {}
    for run in runs:
        if run.is_finished:
            by_row.setdefault(run.ablation.name, []).append(run.result().images_per_second)
    return {name: statistics.fmean(speeds) for name, speeds in by_row.items()}


def carry_out(runs: Sequence[PlannedRun]) -> None:
    """Trains and evaluates what is not finished."""
    for number, run in enumerate(runs, 1):
        if run.is_finished:
            continue
        say(
            f"run {number} of {len(runs)}: {run.ablation.name}, seed {run.seed}: {run.command.out}",
            file=sys.stderr,
        )
        # Compiled code of the networks before would count against the limit of recompilations.
        torch.compiler.reset()
        run_recipe(run.command, partial(ablated_network, ablation=run.ablation, seed=run.seed))


def report(runs: Sequence[PlannedRun], arguments: argparse.Namespace) -> str:
    """Writes and returns the tables of the finished runs.

    Raises:
        ValueError: no run is finished.
    """
    finished = [run for run in runs if run.is_finished]
    coded = [run for run in finished if run.ablation.name == BASE]
    if not coded:
        raise ValueError(f"out: {arguments.out} holds no finished run of the base")
    results = {run.command.out: run.result() for run in finished}
    by_row: dict[str, dict[int, Any]] = {}
    groups: dict[str, list[Any]] = {}
    summaries = {run.command.out: read_json(run.command.out / SUMMARY_FILE) for run in finished}
    for run in finished:
        name = run.ablation.name
        by_row.setdefault(name, {})[run.seed] = measures(results[run.command.out].evaluation)
        groups.setdefault(name, []).append(summaries[run.command.out])
    order = dict.fromkeys(run.ablation.name for run in runs)
    every = sorted(results.values(), key=lambda result: [*order].index(result.row))
    of_base = [results[run.command.out] for run in coded]
    chosen = coded[of_base.index(best_run(of_base))].command.out
    write_atomically(arguments.out / REPORT_FILE, (chosen / REPORT_FILE).read_bytes())
    machines = [summary["machine"] for summary in summaries.values()]
    outside = of_base[0].evaluation.outside_samples
    compared = summarize({name: by_row[name] for name in order if name in by_row})
    parts = [
        describe_setting(coded[0]),
        accuracy_table(every, PAPER),
        "By block:",
        summary_table({name: groups[name] for name in order if name in groups}),
        "Ablations:",
        ablation_table(compared),
        f"One-class classifiers of the base; outside: {outside} images, {arguments.outside}:",
        class_table(of_base),
        "Accuracy of the base, in percent, with so many branches of a block removed:",
        removal_table(of_base),
        f"Report of the best coded run: {arguments.out / REPORT_FILE}",
        describe_machines(machines),
    ]
    text = "\n\n".join(parts) + "\n"
    write_atomically(arguments.out / TABLE_FILE, text.encode())
    content = {
        "scale": arguments.scale,
        "paper": PAPER,
        "measures": by_row,
        "summaries": {str(path): summary for path, summary in summaries.items()},
        "machine": describe_machine(),
        "command": shlex.join(["python", *sys.argv]),
    }
    text_json = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(arguments.out / RESULTS_FILE, text_json.encode())
    return text


def describe_setting(run: PlannedRun) -> str:
    """Describes network, data, epochs and how a step is computed."""
    recipe = run.command.recipe
    data, training = recipe.data, recipe.training
    precision = training.amp_dtype if training.amp else "float32"
    return (
        f"{recipe.model.model}, {training.total_epochs} epochs of "
        f"{data.train_images or 'all'} training images in batches of {training.batch_size}, tested "
        f"on {data.test_images or 'all'} images; augmentation on "
        f"{recipe.augmentation.augment_on} ({recipe.augmentation.aa or 'crops and flips alone'}), "
        f"{precision}, {training.torchcompile or 'not compiled'}. Mean ± standard deviation "
        "(n - 1) over the seeds."
    )


def describe_machines(machines: Sequence[dict[str, Any]]) -> str:
    """Returns the machines, versions, commits and dates of the runs, each once."""
    texts = [
        f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} threads, "
        f"torch {machine['versions']['torch']}, Python {machine['versions']['python']}, "
        f"commit {machine['commit']}, {machine['date']}."
        for machine in machines
    ]
    return " ".join(dict.fromkeys(texts))


def compare(runs: Sequence[Path]) -> str:
    """Returns the table of finished runs, with mean and deviation, and what is in its groups.

    Raises:
        ValueError: a run has no summary, or counts twice.
    """
    groups = group_runs(runs)
    summaries = {g.name: [summary for _, summary in g.runs.values()] for g in groups}
    return f"{summary_table(summaries)}\n\n{describe_groups(groups)}"


def train_and_report(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Prints the plan or a comparison, or trains what is missing and prints the tables."""
    if arguments.compare:
        say(compare(arguments.compare))
        return
    runs = plan(arguments, rest)
    if arguments.plan:
        say(describe_plan(runs, SCALES[arguments.scale].cost))
        return
    if not arguments.table:
        carry_out(runs)
    say(f"\n{report(runs, arguments)}")
    say(f"written to {arguments.out / TABLE_FILE}", file=sys.stderr)


def main() -> int:
    """Runs the command; returns 2 when the input is at fault, 130 or 143 after a signal."""
    arguments, rest = parse_arguments()
    return run_script("reproduce.py", lambda: train_and_report(arguments, rest))


if __name__ == "__main__":
    sys.exit(main())
