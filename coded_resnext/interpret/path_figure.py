"""The picture of the paths: the codebook beside the energies that the network really spends."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.files import printable, write_atomically

from .decoding import EarlyDecoding
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
    """Draws a row for each codebook: its codewords, then the mean energies of its blocks.

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
    """Draws a matrix [K, N] on the common scale, first class on top."""
    import matplotlib

    classes, branches = values.shape
    few = classes <= 2 * SHOWN_CLASSES
    mesh = panel.pcolormesh(
        np.arange(branches + 1) - 0.5,
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
    panel.set_xticks(range(0, branches, step))
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
    """Sets the style of all figures, for as long as they are made and saved.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("figures need matplotlib; install coded-resnext[report]") from error
    with matplotlib.rc_context({**_STYLE, "font.sans-serif": _families()}):
        yield


# Families for the scripts that the usual one lacks; the first that has a letter draws it.
FAMILY = "DejaVu Sans"
FALLBACKS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR"),
    *("Noto Sans", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji"),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic"),
    *("Malgun Gothic", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Arial Unicode MS"),
)


def _families() -> list[str]:
    """Returns the usual family, and those that are installed of the user's and the fallbacks."""
    from matplotlib import font_manager, rcParams

    installed = {font.name for font in font_manager.fontManager.ttflist}
    wanted = dict.fromkeys((*rcParams["font.sans-serif"], *FALLBACKS))
    return [FAMILY, *(name for name in wanted if name in installed and name != FAMILY)]


def new_figure(width: float, height: float) -> Figure:
    """Returns a white figure of a size in inches that pyplot knows nothing of."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, folder: Path, name: str, description: str) -> list[Path]:
    """Writes a figure as PNG and SVG, whose bytes follow from the figure and its description."""
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=200, metadata={"Description": description})
    # The arrangement is found while the first one is drawn; finding it again would take as long.
    figure.set_layout_engine("none")
    figure.savefig(svg, format="svg", metadata={"Date": None, "Description": description})
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path, file in zip(paths, (png, svg), strict=True):
        write_atomically(path, file.getvalue())
    return paths


def small_multiples(
    count: int,
    columns: int,
    size: tuple[float, float],
    labels: tuple[str, str],
    *,
    share_x: bool = True,
) -> tuple[Figure, list[Axes]]:
    """Returns a figure with `count` panels of a size in inches, in rows of at most `columns`.

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
    """Makes a figure taller by a title, how to read it, and the handles and labels of a legend."""
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
    """Returns a class name that fits beside an axis.

    A dollar sign starts no formula, and marks of writing direction are spelled out. What stands
    beside a name goes into a line of its own: letters from right to left would mirror it too.
    """
    name = printable(name) or "(no name)"
    short = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return short.replace("$", r"\$")


def shown_note(classes: int) -> str:
    """Says so where not all classes are shown."""
    return f" First {SHOWN_CLASSES} of {classes} classes." if classes > SHOWN_CLASSES else ""
