"""The picture of the class-to-class distances: energies against codewords."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .figure_style import BLUE, INK, heading, small_multiples
from .semantic import Semantics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        found, p = block.confusion_correlation, block.confusion_p
        said = "n/a" if found is None or p is None else f"{found:+.2f}, p {p:.2f}"
        panel.set_title(f"coded block {index + 1}\nconfusion {said}")
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
