"""What the figures share: colours, sizes, labels, and saving without touching global state."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours for all kinds of colour vision.
BLUE = "#0072B2"
SKY = "#56B4E9"
VERMILLION = "#D55E00"
GREY = "#777777"
PALE = "#D0D0D0"
INK = "#222222"

# Small multiples and class names stay readable up to here; of more classes the first are shown.
SHOWN_CLASSES = 20
# Letters of a class name above a panel.
PANEL_NAME = 11

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.usetex": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.6,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    # Without a salt the identifiers inside an SVG differ from run to run.
    "svg.hashsalt": "coded-resnext",
    "svg.fonttype": "path",
}


@contextmanager
def figure_style() -> Iterator[None]:
    """The style of all figures, for as long as they are made and saved.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("figures need matplotlib; install coded-resnext[report]") from error
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """A white figure of a size in inches that pyplot knows nothing of."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG, whose bytes follow from the figure alone."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    figure.savefig(paths[0], dpi=200)
    # The arrangement is found while the first one is drawn; finding it again would take as long.
    figure.set_layout_engine("none")
    figure.savefig(paths[1], metadata={"Date": None})
    return paths


def small_multiples(
    count: int,
    columns: int,
    size: tuple[float, float],
    labels: tuple[str, str],
    *,
    share_x: bool = True,
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels of a size in inches, in rows of at most `columns`.

    The labels are those of the horizontal axes together and of the vertical ones, which are shared.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = new_figure(max(columns * size[0], 5.6) + 0.4, rows * size[1] + 0.4)
    grid = figure.subplots(rows, columns, sharex=share_x, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for panel in panels[count:]:
        panel.remove()
    # Above a missing panel the numbers of the last row would be missing too.
    for panel in panels[max(0, count - columns) : count]:
        panel.xaxis.set_tick_params(labelbottom=True)
    for row in grid:
        row[0].set_ylabel(labels[1])
    figure.supxlabel(labels[0], fontsize=9)
    return figure, panels[:count]


def heading(
    figure: Figure,
    title: str,
    explanation: str,
    legend: tuple[Sequence[Any], Sequence[str]] | None = None,
) -> None:
    """Make a figure taller by a title, how to read it, and the handles and labels of a legend."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(explanation, int(14.5 * width))
    legend_from_top = 0.38 + 0.175 * len(lines)
    reserved = legend_from_top + (0.28 if legend else 0.05)
    total = height + reserved
    figure.set_size_inches(width, total)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, height / total))
    left = 0.08 / width
    figure.text(left, 1 - 0.07 / total, title, fontsize=12, fontweight="bold", va="top")
    figure.text(left, 1 - 0.33 / total, "\n".join(lines), va="top", linespacing=1.35)
    if legend:
        figure.legend(
            *legend,
            loc="upper left",
            bbox_to_anchor=(left, 1 - legend_from_top / total),
            ncols=len(legend[1]),
            borderaxespad=0,
            borderpad=0.0,
            handlelength=2.6,
            columnspacing=1.6,
        )


def label(name: str, longest: int = 18) -> str:
    """A class name that fits beside an axis; a dollar sign starts no formula."""
    short = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return short.replace("$", r"\$")


def shown_note(classes: int) -> str:
    """Says so where not all classes are shown."""
    return f" First {SHOWN_CLASSES} of {classes} classes." if classes > SHOWN_CLASSES else ""
