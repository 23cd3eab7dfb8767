"""Tables of trainings over several seeds beside published figures: accuracy, classes, removal."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .evaluate import Evaluation
from .removal import KINDS


@dataclass(frozen=True)
class FinishedRun:
    """A training and what was measured of it."""

    row: str
    """What was trained: an ablation's name."""
    seed: int
    evaluation: Evaluation
    seconds: float
    """Of the training, without the evaluation after it."""
    images_per_second: float
    """Median over the epochs."""
    memory_mib: float
    """Largest of the epochs."""


def accuracy_table(runs: Sequence[FinishedRun], paper: Mapping[str, float]) -> str:
    """A line for each row: the published accuracy, ours, the difference from the first row, cost.

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
                spread([run.evaluation.test_accuracy for run in group], 100, 2),
                "" if is_base else spread(changes, 100, 2, sign="+"),
                ", ".join(str(run.seed) for run in group),
                spread([run.seconds for run in group], 1, 0),
                spread([run.images_per_second for run in group], 1, 0),
                f"{max(run.memory_mib for run in group):.0f}",
            ]
        )
    titles = ["", "paper, %", "ours, %", "against the first row", "seeds", "training, s"]
    return _table([*titles, "images/s", "peak memory, MiB"], lines)


def class_table(runs: Sequence[FinishedRun]) -> str:
    """A line for each class, and their mean: its one-class classifier, over the seeds.

    Empty for plain networks. Average precision of telling the class from the other classes and from
    images of none of them; F1, and the share of the latter that is accepted, at the threshold.
    """
    found = [run.evaluation.one_class for run in runs]
    known = [one for one in found if one is not None]
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
    return _table([*titles, "accepted outside, %"], lines)


def removal_table(runs: Sequence[FinishedRun]) -> str:
    """A line for each coded block and kind of branch: accuracy with 0, 1, .. of them removed."""
    found = [run.evaluation.removal for run in runs]
    known = [removal for removal in found if removal is not None]
    if not known:
        return ""
    lines = []
    longest = 0
    for number, blocks in enumerate(zip(*(one.blocks for one in known), strict=True), 1):
        for kind in KINDS:
            curves = [getattr(block, kind).accuracy for block in blocks]
            cells = [spread([one.accuracy for one in known], 100, 1)]
            cells += [spread(_known(points), 100, 1) for points in zip(*curves, strict=True)]
            longest = max(longest, len(cells))
            lines.append([f"{number}, {kind}", *cells])
    titles = ["block, branches", *map(str, range(longest))]
    return _table(titles, [line + [""] * (len(titles) - len(line)) for line in lines])


def best(runs: Sequence[FinishedRun]) -> FinishedRun:
    """The run with the best test accuracy, of equal ones the first."""
    return max(runs, key=lambda run: run.evaluation.test_accuracy)


def spread(values: Sequence[float], scale: float, digits: int, *, sign: str = "") -> str:
    """Mean ± standard deviation (n - 1), `?` for that of one value; nothing for no value."""
    if not values:
        return ""
    deviation = f"{scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else "?"
    return f"{scale * statistics.fmean(values):{sign}.{digits}f} ± {deviation}"


def _class_cells(columns: Sequence[Sequence[float]]) -> list[str]:
    forms = ((1, 3), (1, 3), (1, 3), (100, 1))
    return [spread(values, *form) for values, form in zip(columns, forms, strict=True)]


def _by_row(runs: Iterable[FinishedRun]) -> dict[str, list[FinishedRun]]:
    rows: dict[str, list[FinishedRun]] = {}
    for run in runs:
        rows.setdefault(run.row, []).append(run)
    return rows


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = "|" + "---|" * len(titles)
    return "\n".join([_line(titles), rule, *map(_line, lines)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
