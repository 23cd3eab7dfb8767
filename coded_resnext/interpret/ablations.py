"""Ablations: what a training loses or gains by one change, over several seeds."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.models.resnext import CodedResNeXt, default_codebook

from .evaluate import Evaluation

BASE = "base"
PLAIN = "plain twin"


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
    Ablation("coding weight 1", training={"coding_weight": 1.0}),
    Ablation("no normalisation", model={"normalize": False}),
    Ablation("codebook distance 2", near_codewords=True),
    Ablation("coding weight 0", training={"coding_weight": 0.0}),
    Ablation("coding weight 10", training={"coding_weight": 10.0}),
    Ablation("coding weight 20", training={"coding_weight": 20.0}),
    Ablation("DropSubNNs 0.2", model={"drop_branches": 0.2}),
    Ablation("DropSubNNs 0.3", model={"drop_branches": 0.3}),
    Ablation("threshold 0.1", training={"threshold": 0.1}),
    Ablation("threshold 0.3", training={"threshold": 0.3}),
    Ablation("fewer active branches", ratios="less"),
    Ablation("more active branches", ratios="more"),
)

# The measures of a run by column: scale and decimals in a table, where shares become percent.
COLUMNS = {
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


def find(names: Sequence[str] | None) -> list[Ablation]:
    """The ablations of these names, all without names; always with the base, to compare with.

    Raises:
        ValueError: there is no such ablation.
    """
    known = {ablation.name: ablation for ablation in ABLATIONS}
    for name in names or ():
        if name not in known:
            raise ValueError(f"rows: expected some of {', '.join(known)}; got {name!r}")
    return [one for one in ABLATIONS if names is None or one.name in {BASE, *names}]


def vary(base: CodedResNeXt, ablation: Ablation, *, seed: int) -> CodedResNeXt:
    """The network of an ablation, with fresh weights of a seed.

    Args:
        base: the coded network that is varied; only its configuration and codebooks count.
        ablation: what changes.
        seed: of the weights. The base and its variants of one seed are drawn alike, and equal
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
    """A codebook of the same size whose minimum distance is 2, the smallest there is.

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


def measure(evaluation: Evaluation) -> dict[str, float]:
    """The measures of a run by column; those that do not apply are left out."""
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


@dataclass(frozen=True)
class Summary:
    """One measure of one ablation over seeds."""

    seeds: tuple[int, ...]
    mean: float
    deviation: float | None
    """Standard deviation (n - 1); None for one seed."""
    difference: float | None
    """Mean difference from the base, seed by seed; None where they share no seed."""
    difference_deviation: float | None
    """Standard deviation of these differences (n - 1); None for fewer than two seeds."""


def summarize(
    runs: Mapping[str, Mapping[int, Mapping[str, float]]],
) -> dict[str, dict[str, Summary]]:
    """Compare the runs of ablations with the base's.

    Args:
        runs: measures by name of the ablation and seed.

    Returns:
        Summaries by name of the ablation and measure.
    """
    base = runs.get(BASE, {})
    result: dict[str, dict[str, Summary]] = {}
    for name, by_seed in runs.items():
        result[name] = {}
        for column in COLUMNS:
            values = {seed: row[column] for seed, row in by_seed.items() if column in row}
            if not values:
                continue
            differences = [
                value - base[seed][column]
                for seed, value in values.items()
                if name != BASE and column in base.get(seed, {})
            ]
            result[name][column] = Summary(
                seeds=tuple(sorted(values)),
                mean=statistics.fmean(values.values()),
                deviation=_deviation(list(values.values())),
                difference=statistics.fmean(differences) if differences else None,
                difference_deviation=_deviation(differences),
            )
    return result


def markdown(summaries: Mapping[str, Mapping[str, Summary]]) -> str:
    """A row for each ablation: mean ± deviation, and below it the paired difference."""
    lines = [
        "| | seeds | " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for name, columns in summaries.items():
        seeds = sorted({seed for summary in columns.values() for seed in summary.seeds})
        cells = [_cell(columns.get(column), *form) for column, form in COLUMNS.items()]
        lines.append(f"| {name} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(summary: Summary | None, scale: int, digits: int) -> str:
    if summary is None:
        return ""

    def shown(value: float | None, sign: str = "") -> str:
        return "?" if value is None else f"{scale * value:{sign}.{digits}f}"

    text = f"{shown(summary.mean)} ± {shown(summary.deviation)}"
    if summary.difference is not None:
        text += f"<br>({shown(summary.difference, '+')} ± {shown(summary.difference_deviation)})"
    return text


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _other_active(active: int, branches: int, ratios: str) -> int:
    if ratios == "more":
        return min(branches - 1, active + max(1, round(0.4 * active)))
    return max(1, active - max(1, round(0.4 * active)))
