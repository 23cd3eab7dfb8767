"""Several runs beside each other and beside published figures: mean and deviation over seeds.

Runs may be ablations: networks and trainings that differ from a base by one change.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.files import read_json
from coded_resnext.models.resnext import CodedResNeXt, default_codebook
from coded_resnext.training.run_folder import CONFIG_FILE, FREE_SETTINGS, SUMMARY_FILE, differences

from .evaluation import Evaluation
from .removal import KINDS

BASE = "base"
PLAIN = "plain twin"
# The measures of a run by column: scale and decimals in a table, where shares become percent.
MEASURES = {
    "accuracy": (100, 2),
    "early decoding, first block": (100, 1),
    "early decoding, last block": (100, 1),
    "one-class average precision": (1, 4),
    "one-class F1": (1, 3),
    "dead one-class samples": (100, 1),
    "energy outside the path": (100, 1),
    "points without active branches, first block": (1, 1),
    "points without inactive branches, worst block": (1, 1),
}
AVERAGE_PRECISION = "one-class mean average precision"


@dataclass(frozen=True)
class Ablation:
    """One change of network or training; everything else stays."""

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of `CodedResNeXt` that change."""
    training: dict[str, Any] = field(default_factory=dict)
    """Fields of `TrainingConfig` that change."""
    ratios: Literal["less", "more", "all plain"] | None = None
    """Fewer or more active branches in every coded stage; "all plain" is the twin without code."""
    near_codewords: bool = False
    """Codebooks of the same size and loads whose minimum distance is 2."""


ABLATIONS = (
    Ablation(BASE),
    Ablation(PLAIN, ratios="all plain"),
    Ablation("exponent 2", training={"exponent": 2.0}),
    Ablation("exponent 1", training={"exponent": 1.0}),
    Ablation("concatenation", model={"aggregation": "concat"}),
    Ablation("DropSubNNs 0", model={"drop_branches": 0.0}),
    Ablation("masks not shared", model={"share_masks": False}),
    Ablation(
        "gradients masked",
        training={"mask_gradients": True, "coding_weight": 0.0, "torchcompile": ""},
    ),
    Ablation("coding weight 1", training={"coding_weight": 1.0}),
    Ablation("no normalisation", model={"normalize": False}),
    Ablation("codebook distance 2", near_codewords=True),
    Ablation("coding weight 0", training={"coding_weight": 0.0}),
    Ablation("coding weight 4", training={"coding_weight": 4.0}),
    Ablation("coding weight 10", training={"coding_weight": 10.0}),
    Ablation("coding weight 20", training={"coding_weight": 20.0}),
    Ablation("DropSubNNs 0.2", model={"drop_branches": 0.2}),
    Ablation("DropSubNNs 0.3", model={"drop_branches": 0.3}),
    Ablation("threshold 0.1", training={"threshold": 0.1}),
    Ablation("threshold 0.3", training={"threshold": 0.3}),
    Ablation("fewer active branches", ratios="less"),
    Ablation("more active branches", ratios="more"),
)


def select_ablations(names: Sequence[str] | None) -> list[Ablation]:
    """Returns the ablations of these names, or all, always with the base to compare with.

    Raises:
        ValueError: there is no such ablation.
    """
    known = {ablation.name: ablation for ablation in ABLATIONS}
    for name in names or ():
        if name not in known:
            raise ValueError(f"rows: expected some of {', '.join(known)}; got {name!r}")
    return [one for one in ABLATIONS if names is None or one.name in {BASE, *names}]


def ablated_network(base: CodedResNeXt, ablation: Ablation, *, seed: int) -> CodedResNeXt:
    """Returns the network of an ablation, with fresh weights of a seed.

    Args:
        base: the coded network that is varied; only its configuration and codebooks count.
        ablation: what changes.
        seed: decides the weights. The base and its variants of one seed are drawn alike, and equal
            wherever they have the same tensors in the same order.

    Raises:
        ValueError: a change does not fit the network.
    """
    config = copy.deepcopy({**base.config, **ablation.model})
    books = list(base.stage_codebooks)
    coded = [stage for stage in config["stages"] if stage["active"] < stage["branches"]]
    if ablation.ratios == "all plain":
        for stage in coded:
            stage["active"] = stage["branches"]
        books = []
    elif ablation.ratios is not None:
        for stage in coded:
            stage["active"] = _other_active(stage["active"], stage["branches"], ablation.ratios)
        books = [
            default_codebook(base.num_classes, stage["branches"], stage["active"], base.class_names)
            for stage in coded
        ]
    if ablation.near_codewords:
        books = [near_codebook(book) for book in books]
    torch.manual_seed(seed)
    model = CodedResNeXt.from_config(
        config, books, class_names=base.class_names, backend=base.blocks[0].backend
    )
    norms = [
        [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        for network in (model, base)
    ]
    for module, original in zip(*norms, strict=True):
        module.momentum = original.momentum
    return model


def near_codebook(book: Codebook) -> Codebook:
    """Returns a codebook of the same size whose minimum distance is 2, the smallest there is.

    Class k works with the A branches from `k mod N` on, around the ring: neighbours share all but
    one. With K = N every branch works for A classes.

    Raises:
        ValueError: there are more classes than branches.
    """
    if book.classes > book.branches:
        raise ValueError(
            f"codebook: expected at most as many classes as branches, got {book.classes} and "
            f"{book.branches}"
        )
    words = torch.zeros(book.classes, book.branches, dtype=torch.bool)
    for index in range(book.classes):
        words[index, (index + torch.arange(book.active)) % book.branches] = True
    return Codebook(words, book.class_names)


def _other_active(active: int, branches: int, ratios: str) -> int:
    if ratios == "more":
        return min(branches - 1, active + max(1, round(0.4 * active)))
    return max(1, active - max(1, round(0.4 * active)))


@dataclass(frozen=True)
class FinishedRun:
    """A training and what was measured of it."""

    row: str
    """Name of the ablation that was trained."""
    seed: int
    evaluation: Evaluation
    seconds: float
    """Wall time of the training, in seconds, without the evaluation after it."""
    images_per_second: float
    """Median of the epochs' images per second."""
    memory_mib: float
    """Largest peak memory of the epochs, in MiB."""


@dataclass(frozen=True)
class Summary:
    """One measure of one ablation over seeds."""

    seeds: tuple[int, ...]
    """The seeds that have the measure."""
    mean: float
    """Mean over the seeds."""
    deviation: float | None
    """Standard deviation (n - 1); None for one seed."""
    difference: float | None
    """Mean difference from the base, seed by seed; None where they share no seed."""
    difference_deviation: float | None
    """Standard deviation of these differences (n - 1); None for fewer than two seeds."""


def summarize(
    runs: Mapping[str, Mapping[int, Mapping[str, float]]],
) -> dict[str, dict[str, Summary]]:
    """Compares the runs of ablations with the base's.

    Args:
        runs: measures by name of the ablation and seed.

    Returns:
        Summaries by name of the ablation and measure.
    """
    base = runs.get(BASE, {})
    summaries: dict[str, dict[str, Summary]] = {}
    for name, by_seed in runs.items():
        summaries[name] = {}
        for measure in MEASURES:
            values = {seed: row[measure] for seed, row in by_seed.items() if measure in row}
            if not values:
                continue
            differences = [
                value - base[seed][measure]
                for seed, value in values.items()
                if name != BASE and measure in base.get(seed, {})
            ]
            summaries[name][measure] = Summary(
                seeds=tuple(sorted(values)),
                mean=statistics.fmean(values.values()),
                deviation=deviation_of(list(values.values())),
                difference=statistics.fmean(differences) if differences else None,
                difference_deviation=deviation_of(differences),
            )
    return summaries


def ablation_table(summaries: Mapping[str, Mapping[str, Summary]]) -> str:
    """Returns a line for each ablation: mean ± deviation, and below it the paired difference."""
    lines = []
    for name, of_ablation in summaries.items():
        seeds = {seed for summary in of_ablation.values() for seed in summary.seeds}
        cells = [_summary_cell(of_ablation.get(key), *form) for key, form in MEASURES.items()]
        lines.append([name, str(len(seeds)), *cells])
    return markdown_table(["", "seeds", *MEASURES], lines)


def _summary_cell(summary: Summary | None, scale: int, digits: int) -> str:
    if summary is None:
        return ""
    text = _with_deviation(summary.mean, summary.deviation, scale, digits)
    if summary.difference is not None:
        paired = (summary.difference, summary.difference_deviation)
        text += f"<br>({_with_deviation(*paired, scale, digits, sign='+')})"
    return text


def measures(evaluation: Evaluation) -> dict[str, float]:
    """Returns the measures of a run by name; those that do not apply are left out."""
    row = {"accuracy": evaluation.test_accuracy}
    early, removal, paths = evaluation.early_decoding, evaluation.removal, evaluation.paths
    if early and removal and paths:
        row["early decoding, first block"] = early.block_accuracy[0]
        row["early decoding, last block"] = early.block_accuracy[-1]
        row["energy outside the path"] = statistics.fmean(paths.outside)
        changes = {
            kind: [
                100 * (accuracy - removal.accuracy)
                for block in removal.blocks
                if (accuracy := getattr(block, kind).accuracy[-1]) is not None
            ]
            for kind in ("active", "inactive")
        }
        row["points without active branches, first block"] = changes["active"][0]
        row["points without inactive branches, worst block"] = min(changes["inactive"])
    if evaluation.one_class:
        classifiers = evaluation.one_class.classifiers
        for name, values in (
            ("one-class average precision", [one.average_precision for one in classifiers]),
            ("one-class F1", [one.f1 for one in classifiers]),
            ("dead one-class samples", [one.dead for one in classifiers]),
        ):
            known = [value for value in values if value is not None]
            if known:
                row[name] = statistics.fmean(known)
    return row


def accuracy_table(runs: Sequence[FinishedRun], paper: Mapping[str, float]) -> str:
    """Returns a line for each row: published accuracy, ours, difference from the first, cost.

    Args:
        runs: of the rows in the order of the table; the first one is compared with.
        paper: published accuracies in percent, by row.
    """
    by_row = _by_row(runs)
    base = {run.seed: run for run in next(iter(by_row.values()), [])}
    lines = []
    for name, group in by_row.items():
        pairs = [(run, base[run.seed]) for run in group if run.seed in base]
        changes = [
            run.evaluation.test_accuracy - one.evaluation.test_accuracy for run, one in pairs
        ]
        is_base = any(run is one for run, one in pairs)
        lines.append(
            [
                name,
                f"{paper[name]:g}" if name in paper else "",
                mean_and_deviation([run.evaluation.test_accuracy for run in group], 100, 2),
                "" if is_base else mean_and_deviation(changes, 100, 2, sign="+"),
                ", ".join(str(run.seed) for run in group),
                mean_and_deviation([run.seconds for run in group], 1, 0),
                mean_and_deviation([run.images_per_second for run in group], 1, 0),
                f"{max(run.memory_mib for run in group):.0f}",
            ]
        )
    titles = ["", "paper, %", "ours, %", "against the first row", "seeds", "training, s"]
    return markdown_table([*titles, "images/s", "peak memory, MiB"], lines)


def class_table(runs: Sequence[FinishedRun]) -> str:
    """Returns a line for each class, and their mean: its one-class classifier, over the seeds.

    Empty for plain networks. Average precision of telling the class from the other classes and from
    images of none of them; F1, and the share of the latter that is accepted, at the threshold.
    """
    known = [one for run in runs if (one := run.evaluation.one_class) is not None]
    if not known:
        return ""
    lines = []
    means: list[list[list[float]]] = []
    for classifiers in zip(*(one.classifiers for one in known), strict=True):
        outside = [one.outside for one in classifiers if one.outside]
        columns = [
            _known(one.average_precision for one in classifiers),
            _known(one.f1 for one in classifiers),
            _known(one.average_precision for one in outside),
            _known(one.accepted for one in outside),
        ]
        means.append(columns)
        lines.append([classifiers[0].class_name, *_class_cells(columns)])
    # By seed, where every class has every number; otherwise the mean would be of other classes.
    whole = [
        [statistics.fmean(values) for values in zip(*(c[index] for c in means), strict=True)]
        if len({len(c[index]) for c in means}) == 1
        else []
        for index in range(4)
    ]
    lines.append(["mean", *_class_cells(whole)])
    titles = ["class", "average precision", "F1", "average precision, outside"]
    return markdown_table([*titles, "accepted outside, %"], lines)


def removal_table(runs: Sequence[FinishedRun]) -> str:
    """Returns a line for each coded block and kind of branch: accuracy with 0, 1, .. of them
    removed."""
    known = [one for run in runs if (one := run.evaluation.removal) is not None]
    if not known:
        return ""
    lines = []
    longest = 0
    for number, blocks in enumerate(zip(*(one.blocks for one in known), strict=True), 1):
        for kind in KINDS:
            curves = [getattr(block, kind).accuracy for block in blocks]
            cells = [mean_and_deviation([one.accuracy for one in known], 100, 1)]
            cells += [mean_and_deviation(points, 100, 1) for points in zip(*curves, strict=True)]
            longest = max(longest, len(cells))
            lines.append([f"{number}, {kind}", *cells])
    titles = ["block, branches", *map(str, range(longest))]
    return markdown_table(titles, [line + [""] * (len(titles) - len(line)) for line in lines])


@dataclass(frozen=True)
class Group:
    """Finished runs of one recipe, measured on the same images, each with a seed of its own."""

    recipe: Any
    """What `config.json` says, without the seed, and `measured_on`, the digest of the images."""
    runs: dict[int | None, tuple[Path, Mapping[str, Any]]]
    """The folder and the summary of the run of each seed."""

    @property
    def name(self) -> str:
        """Returns the folder of the first run."""
        return str(next(folder for folder, _ in self.runs.values()))


def group_runs(folders: Iterable[Path]) -> list[Group]:
    """Groups finished runs by their recipes, whatever their folders are called.

    Args:
        folders: of runs.

    Raises:
        FileNotFoundError: a run has no configuration or no summary.
        ValueError: a file is damaged, or two runs have the same recipe and the same seed.
    """
    groups: list[Group] = []
    for folder in folders:
        for name, words in ((SUMMARY_FILE, "summary; is the run finished?"), (CONFIG_FILE, "one")):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name}: no {words}")
        recipe, seed = _without_seed(read_json(folder / CONFIG_FILE))
        summary = read_json(folder / SUMMARY_FILE)
        recipe["measured_on"] = (summary.get("measured_on") or {}).get("sha256")
        same = (g for g in groups if not differences(g.recipe, recipe, ignore=FREE_SETTINGS))
        if (group := next(same, None)) is None:
            groups.append(group := Group(recipe, {}))
        if seed in group.runs:
            raise ValueError(
                f"runs: {group.runs[seed][0]} and {folder} have the same recipe and seed {seed}; "
                "expected every run once"
            )
        group.runs[seed] = folder, summary
    return groups


def _without_seed(config: Any) -> tuple[Any, int | None]:
    """Returns the description of a run without its seed, and the seed."""
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG_FILE}: expected an object, got {type(config).__name__}")
    seeds = [part.pop("seed") for part in (config, *config.values()) if _has_seed(part)]
    return config, seeds[0] if seeds else None


def _has_seed(part: Any) -> bool:
    return isinstance(part, dict) and "seed" in part


def describe_groups(groups: Sequence[Group]) -> str:
    """Returns the folders and seeds of every group, and what differs from the first one."""
    lines = []
    for group in groups:
        runs = ", ".join(f"{folder} (seed {seed})" for seed, (folder, _) in group.runs.items())
        line = f"{group.name}: {runs}"
        if differing := differences(groups[0].recipe, group.recipe, ignore=FREE_SETTINGS):
            line += f"; in the first group {'; '.join(differing)}"
        lines.append(line)
    return "\n".join(lines)


def summary_table(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Returns a line for each number of the summaries: mean ± deviation of a group, and range.

    Args:
        groups: the contents of `summary.json` of the runs of each group.
    """
    numbers = {group: [_summary_numbers(one) for one in runs] for group, runs in groups.items()}
    names = dict.fromkeys(name for runs in numbers.values() for one in runs for name in one)
    lines = []
    for name in names:
        digits = 4 if name == AVERAGE_PRECISION else 2
        cells = []
        for runs in numbers.values():
            values = [one[name] for one in runs if name in one]
            cell = mean_and_deviation(values, 1, digits)
            if len(values) > 1:
                cell += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
            cells.append(cell)
        lines.append([name, *cells])
    titles = [
        f"{name} ({len(runs)} run{'s' if len(runs) > 1 else ''})" for name, runs in groups.items()
    ]
    return markdown_table(["", *titles], lines)


def _summary_numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a summary by name: percent, but for average precision and seconds."""
    numbers = {"test accuracy": 100 * summary["test_accuracy"]}
    for block, accuracy in enumerate(summary["early_decoding"], 1):
        numbers[f"early decoding {block}"] = 100 * accuracy
    precisions = _known(summary["single_class_average_precision"])
    if precisions:
        numbers[AVERAGE_PRECISION] = statistics.fmean(precisions)
    for kind in ("inactive", "active"):
        for block, accuracy in enumerate(summary[f"remove_{kind}_accuracy"], 1):
            # Evaluations that once had a limit of time may lack some.
            # Those from before `removal_accuracy` do not say of which images the removals are.
            whole = summary.get("removal_accuracy")
            if accuracy is not None and whole is not None:
                change = 100 * (accuracy - whole)
                numbers[f"points without {kind} branches {block}"] = change
    return {**numbers, "seconds": summary["seconds"]}


def best_run(runs: Sequence[FinishedRun]) -> FinishedRun:
    """Returns the run with the best test accuracy, of equal ones the first."""
    return max(runs, key=lambda run: run.evaluation.test_accuracy)


def mean_and_deviation(
    values: Sequence[float], scale: float, digits: int, *, sign: str = ""
) -> str:
    """Returns mean ± standard deviation (n - 1), `?` for one value; nothing for none."""
    if not values:
        return ""
    return _with_deviation(statistics.fmean(values), deviation_of(values), scale, digits, sign=sign)


def deviation_of(values: Sequence[float]) -> float | None:
    """Returns the standard deviation (n - 1); None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def markdown_table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Cells as a Markdown table."""
    rows = ["| " + " | ".join(cells) + " |" for cells in (titles, *lines)]
    return "\n".join([rows[0], "|" + "---|" * len(titles), *rows[1:]])


def _with_deviation(
    mean: float, deviation: float | None, scale: float, digits: int, *, sign: str = ""
) -> str:
    after = "?" if deviation is None else f"{scale * deviation:.{digits}f}"
    return f"{scale * mean:{sign}.{digits}f} ± {after}"


def _class_cells(columns: Sequence[Sequence[float]]) -> list[str]:
    forms = ((1, 3), (1, 3), (1, 3), (100, 1))
    return [mean_and_deviation(values, *form) for values, form in zip(columns, forms, strict=True)]


def _by_row(runs: Iterable[FinishedRun]) -> dict[str, list[FinishedRun]]:
    rows: dict[str, list[FinishedRun]] = {}
    for run in runs:
        rows.setdefault(run.row, []).append(run)
    return rows


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
