"""The picture of the paths: the codebook beside the energies that the network really spends."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..codebook import Codebook
from .early_decoding import EarlyDecoding
from .figure_style import SHOWN_CLASSES, heading, label, new_figure
from .paths import Paths

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

# Monotone in lightness, so that it prints in grey, and made for red-green blindness.
COLOURS = "cividis"


def path_figure(
    paths: Paths, early_decoding: EarlyDecoding, codebooks: Sequence[Codebook]
) -> Figure:
    """One row for each codebook: its codewords, then the mean energies of each of its blocks.

    Args:
        paths: the energies.
        early_decoding: the accuracy of every block, said above its panel.
        codebooks: the codebook of every coded block.
    """
    stages = [
        (codebooks[rows[0]], rows)
        for _, group in groupby(range(len(codebooks)), key=lambda index: codebooks[index])
        for rows in [list(group)]
    ]
    classes = codebooks[0].classes
    columns = 1 + max(len(rows) for _, rows in stages)
    row_height = max(1.3, min(0.21 * classes, 4.6)) + 0.95
    names = [label(name) for name in codebooks[0].class_names]
    figure = new_figure(
        1.3
        + 0.07 * max(map(len, names))
        + columns * max(1.7, 0.17 * max(book.branches for book in codebooks)),
        len(stages) * row_height,
    )
    # The empty second column sets the design apart from the measurements.
    grid = figure.add_gridspec(
        len(stages), 1 + columns, width_ratios=[1, 0.02] + [1] * (columns - 1)
    )
    every_panel = []
    for row, (codebook, blocks) in enumerate(stages):
        panels = [
            figure.add_subplot(grid[row, column]) for column in (0, *range(2, 2 + len(blocks)))
        ]
        every_panel += panels
        mesh = _draw(panels[0], codebook.codewords.double().numpy())
        panels[0].set_title(
            f"Designed: the codebook\n{codebook.active} of {codebook.branches} branches per class"
        )
        _name_classes(panels[0], names)
        for panel, block in zip(panels[1:], blocks, strict=True):
            mesh = _draw(panel, paths.energies[block].numpy())
            decoded = 100 * early_decoding.block_accuracy[block]
            panel.set_title(f"Measured: coded block {block + 1}\nearly decoding {decoded:.1f} %")
            panel.set_yticks([])
        for panel in panels:
            panel.set_xlabel("branch", labelpad=2)
    bar = figure.colorbar(
        mesh, ax=every_panel, extend="max", shrink=0.7, aspect=30, pad=0.02, ticks=[0, 0.5, 1]
    )
    bar.ax.set_yticklabels(["0", "0.5", "1"])
    bar.set_label(r"codeword or energy $r\,\bar{E}$")
    bar.outline.set_visible(False)
    missing = sum(count == 0 for count in paths.samples_per_class)
    note = f" Grey rows: no test images ({missing} of {classes} classes)." if missing else ""
    heading(
        figure,
        "The paths of the classes: designed and measured",
        "Left: the branches that work for each class, chosen before training. Right: the energy of "
        "each branch in the trained network, mean over the images of a class, from silent (0) to "
        f"working (1). {sum(paths.samples_per_class)} test images.{note}",
    )
    return figure


def _draw(panel: Axes, values: NDArray[np.float64]) -> QuadMesh:
    """A matrix [K, N] on the common scale, first class on top."""
    import matplotlib

    classes, branches = values.shape
    few = classes <= 2 * SHOWN_CLASSES
    mesh = panel.pcolormesh(
        np.arange(branches + 1) + 0.5,
        np.arange(classes + 1) - 0.5,
        np.ma.masked_invalid(values),
        cmap=matplotlib.colormaps[COLOURS].with_extremes(bad="#BBBBBB"),
        vmin=0,
        vmax=1,
        edgecolors="white" if few else "none",
        linewidth=0.8 if few else 0,
        rasterized=not few,
    )
    panel.invert_yaxis()
    step = 1 if branches <= 12 else 5 if branches <= 40 else 10
    panel.set_xticks([1, *range(step, branches + 1, step)] if step > 1 else range(1, branches + 1))
    panel.tick_params(length=0, pad=2)
    panel.spines[:].set_visible(False)
    return mesh


def _name_classes(panel: Axes, names: Sequence[str]) -> None:
    if len(names) <= 2 * SHOWN_CLASSES:
        panel.set_yticks(range(len(names)), names)
        panel.set_ylabel("class")
    else:
        step = -(-len(names) // 10)
        panel.set_yticks(range(0, len(names), step), [str(i) for i in range(0, len(names), step)])
        panel.set_ylabel("class index")
