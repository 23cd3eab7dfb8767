"""The figures of an evaluation, as PNG and SVG: readable in print and by colour-blind people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.files import printable

from .decoding import EarlyDecoding
from .evaluation import Evaluation
from .one_class import OneClass, OneClassClassifier
from .path_figure import (
    BLUE,
    INK,
    PALE,
    PANEL_NAME,
    SHOWN_CLASSES,
    SKY,
    VERMILLION,
    figure_style,
    heading,
    label,
    new_figure,
    path_figure,
    save_figure,
    shown_note,
    small_multiples,
)
from .paths import Semantics
from .removal import Removal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def save_figures(
    evaluation: Evaluation, codebooks: Sequence[Codebook], folder: str | Path
) -> list[Path]:
    """Draws an evaluation: paths, early decoding, removal, one-class classifiers, semantics.

    Nothing of matplotlib's global state changes, and equal results give equal SVG files.

    Args:
        evaluation: of a coded network; a plain one has nothing to draw and gives no file.
        codebooks: the codebook of every coded block, `model.codebooks`.
        folder: where the files go; made if missing.

    Returns:
        The paths of the files, a PNG and an SVG of every figure.

    Raises:
        ValueError: the codebooks are not those of the evaluation's blocks.
        ImportError: matplotlib is not installed.
    """
    early, paths = evaluation.early_decoding, evaluation.paths
    if early is None or paths is None:
        return []
    if len(codebooks) != len(paths.energies) or any(
        codebook.class_names != evaluation.class_names for codebook in codebooks
    ):
        raise ValueError(
            f"codebooks: expected one for each of {len(paths.energies)} coded blocks, with the "
            f"classes of the evaluation, got {len(codebooks)}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    saved = []
    with figure_style():
        figures = {
            "paths": path_figure(paths, early, codebooks),
            "early_decoding": early_decoding_figure(early),
        }
        if evaluation.removal:
            figures["removal"] = removal_figure(evaluation.removal)
            figures["removal_energy"] = removal_figure(evaluation.removal, energy=True)
        one, source = evaluation.one_class, evaluation.thresholds_from
        if one and _computed(one):
            figures["one_class_scores"] = score_figure(one, source)
            figures["precision_recall"] = precision_recall_figure(one, source)
            figures["one_class_points"] = points_figure(one, source)
        if evaluation.semantics:
            figures["semantics"] = semantic_figure(evaluation.semantics)
        for name, figure in figures.items():
            saved += save_figure(figure, folder, name, _description(evaluation))
    return saved


def _description(evaluation: Evaluation) -> str:
    """Returns what the figures are of, for their metadata."""
    weights = (evaluation.weights_sha256 or "unknown")[:12]
    return f"measured on {printable(evaluation.provenance or 'unknown')}; weights {weights}"


def early_decoding_figure(result: EarlyDecoding) -> Figure:
    """Draws accuracy of decoding each coded block, and its agreement with the output."""
    figure = new_figure(5.6, 3.2)
    panel = figure.add_subplot()
    depth = range(1, len(result.block_accuracy) + 1)
    whole = 100 * result.accuracy
    accuracy = [100 * share for share in result.block_accuracy]
    agreement = [100 * share for share in result.block_agreement]
    panel.axhline(whole, color=INK, linewidth=1, linestyle=":")
    panel.plot(depth, agreement, color=BLUE, linestyle="--", marker="s", markerfacecolor="white")
    panel.plot(depth, accuracy, color=VERMILLION, marker="o")
    for x, y in zip(depth, accuracy, strict=True):
        panel.annotate(
            f"{y:.1f}", (x, y), xytext=(0, -13), textcoords="offset points", ha="center", fontsize=8
        )
    low = min(*accuracy, *agreement, whole)
    # Room below for the numbers.
    panel.set_ylim(low - 0.12 * (100 - low) - 0.5, 100 + 0.02 * (100 - low) + 0.1)
    panel.set_xlim(0.6, len(depth) + 0.4)
    panel.set_xticks(depth)
    panel.set_xlabel("coded block, by depth")
    panel.set_ylabel("share of test images, %")
    panel.grid(axis="y")
    panel.set_axisbelow(True)
    lines = panel.get_lines()
    heading(
        figure,
        "Early decoding",
        "Each coded block alone names a class: the one whose codeword is nearest to the energies "
        f"of its branches. {result.samples} test images.",
        (
            [lines[2], lines[1], lines[0]],
            ["accuracy", "agreement with the network", f"network's accuracy, {whole:.1f} %"],
        ),
    )
    return figure


def removal_figure(result: Removal, *, energy: bool = False) -> Figure:
    """Draws accuracy, or energy left, against the removed branches, a panel for each block."""
    whole = 1.0 if energy else result.accuracy
    figure, panels = small_multiples(
        len(result.blocks),
        4,
        (2.0, 2.3),
        ("branches removed", "energy left, %" if energy else "accuracy, %"),
    )
    for index, (panel, block) in enumerate(zip(panels, result.blocks, strict=True)):
        panel.axhline(100 * whole, color=INK, linewidth=1, linestyle=":")
        for curve, style in (
            (block.active, (VERMILLION, "-", "o")),
            (block.inactive, (BLUE, "--", "s")),
        ):
            if energy:
                _removal_curve(
                    panel, curve.removed, whole, curve.energy, curve.energy_deviation, style
                )
            else:
                _removal_curve(panel, curve.removed, whole, curve.accuracy, curve.deviation, style)
        panel.set_title(f"coded block {index + 1}")
        panel.grid(axis="y")
    most = max(curve.removed[-1] for b in result.blocks for curve in (b.active, b.inactive))
    panels[0].set_xticks(range(0, most + 1, max(1, -(-most // 8))))
    panels[0].margins(x=0.05)
    draws = "once" if result.repeats == 1 else f"{result.repeats} times; band: ± 1 deviation"
    lines = panels[0].get_lines()
    heading(
        figure,
        "Removing branches from one block",
        ("Energy that the other branches of the block have" if energy else "Accuracy")
        + " when every image loses branches that work for its class (active), or others "
        f"(inactive). Branches drawn at random {draws}. {result.samples} test images.",
        (
            [lines[1], lines[2], lines[0]],
            ["active branches removed", "inactive branches removed", "nothing removed"],
        ),
    )
    return figure


def _removal_curve(
    panel: Axes,
    removed: Sequence[int],
    whole: float,
    means: Sequence[float],
    deviations: Sequence[float],
    style: tuple[str, str, str],
) -> None:
    colour, line, marker = style
    x = [0, *removed]
    centre = [100 * mean for mean in (whole, *means)]
    band = [100 * deviation for deviation in (0.0, *deviations)]
    low = [mean - deviation for mean, deviation in zip(centre, band, strict=True)]
    high = [mean + deviation for mean, deviation in zip(centre, band, strict=True)]
    panel.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0)
    panel.plot(x, centre, color=colour, linestyle=line, marker=marker, markersize=3.5)


def score_figure(result: OneClass, thresholds_from: str) -> Figure:
    """Draws histograms of the one-class classifiers' scores, a panel for each class."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown = _computed(result)
    figure, panels = small_multiples(
        len(shown),
        5,
        (1.75, 1.6),
        ("score: the logit of the class from its own branches alone", "share of images"),
        share_x=False,
    )
    for panel, one in zip(panels, shown, strict=True):
        assert one.histogram is not None
        edges = one.histogram.edges
        for counts, total, filled in (
            (one.histogram.negatives, one.negatives, True),
            (one.histogram.positives, one.positives, False),
        ):
            shares = [100 * count / max(total, 1) for count in counts]
            if filled:
                panel.stairs(shares, edges, fill=True, color=SKY)
            else:
                panel.stairs(shares, edges, color=VERMILLION, linewidth=1.3)
                panel.stairs(
                    shares,
                    edges,
                    fill=True,
                    facecolor="none",
                    hatch="////",
                    edgecolor=VERMILLION,
                    linewidth=0,
                )
        if one.outside and one.outside.samples:
            shares = [100 * count / one.outside.samples for count in one.histogram.outside]
            panel.stairs(shares, edges, color=INK, linewidth=0.9)
        if one.threshold is not None:
            panel.axvline(one.threshold, color=INK, linestyle="--", linewidth=1)
        f1 = "n/a" if one.f1 is None else f"{one.f1:.3f}"
        panel.set_title(f"{label(one.class_name, PANEL_NAME)}\nF1 {f1}")
        panel.locator_params(axis="x", nbins=4)
        panel.set_yticks([])
        panel.spines["left"].set_visible(False)
    heading(
        figure,
        "One-class classifiers: scores",
        "Without the branches of the other classes the network tells one class from the rest. "
        f"Threshold: best F1 on the {thresholds_from}.{shown_note(len(result.classifiers))}",
        (
            [
                Patch(facecolor="none", edgecolor=VERMILLION, hatch="////"),
                Patch(color=SKY),
                Line2D([], [], color=INK, linestyle="--", linewidth=1),
            ],
            ["test images of the class", "test images of all others", "threshold"],
        ),
    )
    return figure


def _computed(result: OneClass) -> list[OneClassClassifier]:
    """Returns the first classes that there are scores of."""
    return [one for one in result.classifiers if one.histogram is not None][:SHOWN_CLASSES]


def precision_recall_figure(result: OneClass, thresholds_from: str) -> Figure:
    """Returns precision-recall curves, a panel for each class, the others' pale behind it."""
    from matplotlib.lines import Line2D

    shown = _computed(result)
    figure, panels = small_multiples(len(shown), 5, (1.75, 1.7), ("recall", "precision"))
    for panel, one in zip(panels, shown, strict=True):
        for other in shown:
            if other.curve is not None:
                panel.plot(
                    other.curve.recall,
                    other.curve.precision,
                    color=PALE,
                    linewidth=0.8,
                    drawstyle="steps-post",
                )
        if one.curve is not None:
            panel.plot(
                one.curve.recall,
                one.curve.precision,
                color=BLUE,
                linewidth=1.6,
                drawstyle="steps-post",
            )
        if one.recall is not None and one.precision is not None:
            panel.plot(
                one.recall,
                one.precision,
                color=VERMILLION,
                marker="D",
                markersize=4.5,
                linestyle="none",
            )
        precision = "n/a" if one.average_precision is None else f"{one.average_precision:.3f}"
        panel.set_title(f"{label(one.class_name, PANEL_NAME)}\nAP {precision}")
    panels[0].set_xlim(-0.03, 1.03)
    panels[0].set_ylim(-0.03, 1.05)
    panels[0].set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    panels[0].set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    mean = result.mean_average_precision
    average = "n/a" if mean is None else f"{mean:.3f}"
    heading(
        figure,
        "One-class classifiers: precision and recall",
        f"On the test images. AP: average precision; its mean is {average}."
        + shown_note(len(result.classifiers)),
        (
            [
                Line2D([], [], color=BLUE, linewidth=1.6),
                Line2D([], [], color=PALE, linewidth=1.2),
                Line2D([], [], color=VERMILLION, marker="D", markersize=4.5, linestyle="none"),
            ],
            ["the class", "the other classes", f"at the best threshold of the {thresholds_from}"],
        ),
    )
    return figure


def points_figure(result: OneClass, thresholds_from: str) -> Figure:
    """Returns the paper's figure: the classifiers of all classes as points of one plot."""
    figure = new_figure(5.6, 4.6)
    panel = figure.add_subplot()
    known = [one for one in result.classifiers if one.precision is not None]
    outside = [one.outside for one in known if one.outside and one.outside.precision is not None]
    size = max(2.0, 5 - len(known) / 100)
    handles, names = [], []
    for points, name, colour, inside, marker in (
        (known, "against images of other classes", BLUE, BLUE, "o"),
        (outside, "against images of none of the classes", VERMILLION, "none", "^"),
    ):
        if points:
            handles += panel.plot(
                *np.array([(one.recall, one.precision) for one in points], float).T,
                color=colour,
                marker=marker,
                markersize=size,
                markerfacecolor=inside,
                linestyle="none",
            )
            names.append(name)
    panel.set_xlim(-0.02, 1.02)
    panel.set_ylim(-0.02, 1.02)
    panel.set_xlabel("recall")
    panel.set_ylabel("precision")
    panel.grid()
    panel.set_axisbelow(True)
    computed = sum(one.computed for one in result.classifiers)
    heading(
        figure,
        "One-class classifiers: all in one plot",
        f"A point for each of {computed} classes, on test images, at the threshold of the best F1 "
        f"on the {thresholds_from}.",
        (handles, names),
    )
    return figure


def semantic_figure(result: Semantics) -> Figure:
    """Distances between the energies of classes, by the distance of their codewords."""
    figure, panels = small_multiples(
        len(result.blocks),
        4,
        (2.0, 2.3),
        ("distance of the codewords, digits", "distance of the energies"),
    )
    for index, (panel, block) in enumerate(zip(panels, result.blocks, strict=True)):
        distances = [group.distance for group in block.by_distance]
        panel.plot(distances, [math.sqrt(d) for d in distances], color=INK, linestyle=":")
        panel.errorbar(
            distances,
            [group.energy_distance for group in block.by_distance],
            [group.energy_deviation for group in block.by_distance],
            color=BLUE,
            linestyle="none",
            marker="o",
            markersize=4,
            capsize=3,
        )
        correlation, p = block.confusion_correlation, block.confusion_p
        words = "n/a" if correlation is None or p is None else f"{correlation:+.2f}, p {p:.2f}"
        panel.set_title(f"coded block {index + 1}\nconfusion {words}")
        panel.grid(axis="y")
    panels[0].set_ylim(bottom=0)
    line, bar = panels[0].get_lines()[0], panels[0].containers[0]
    heading(
        figure,
        "Distances between classes: energies against codewords",
        "Every pair of classes; mean and deviation at each distance of the codewords. Confusion: "
        "Spearman's correlation of what lies beyond the codewords with the confusion of the two "
        f"classes, and p of random labels. {result.classes} classes.",
        ([bar, line], ["mean energies of the classes", "perfect energies"]),
    )
    return figure
