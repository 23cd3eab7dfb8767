"""A codebook as a picture: its table, the histogram of distances and the loads of the branches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..codebook import Codebook

# Beyond so many classes their names would overlap.
NAMED_CLASSES = 40


def draw(codebook: Codebook, path: str | Path) -> None:
    """Write a PNG of a codebook.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install 'coded-resnext[report]'") from None
    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2)
    table = figure.add_subplot(grid[:, 0])
    table.imshow(
        codebook.codewords.numpy(), cmap="Greys", aspect="auto", interpolation="nearest", vmax=1.3
    )
    table.set(title=f"{codebook.classes} classes", xlabel="branch", ylabel="class")
    if codebook.classes <= NAMED_CLASSES:
        table.set_yticks(range(codebook.classes), codebook.class_names)
    histogram = figure.add_subplot(grid[0, 1])
    histogram.bar(list(codebook.distances), list(codebook.distances.values()), width=1.2)
    histogram.set(title="distances", xlabel="Hamming distance", ylabel="pairs of classes")
    histogram.set_xticks(list(codebook.distances))
    loads = figure.add_subplot(grid[1, 1])
    loads.bar(range(codebook.branches), codebook.column_loads)
    loads.set(title="loads", xlabel="branch", ylabel="classes")
    figure.suptitle(
        f"{codebook.active} of {codebook.branches} branches per class: {codebook.bounds}",
        fontsize=10,
        wrap=True,
    )
    figure.savefig(path, format="png", dpi=120)
