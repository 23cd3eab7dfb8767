"""`coded-resnext codebook`: search, show, verify, compare and export codebooks."""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.codebooks.files import ENDINGS, read_document
from coded_resnext.codebooks.quality import verify
from coded_resnext.codebooks.search import Progress, search
from coded_resnext.files import say, write_atomically

if TYPE_CHECKING:
    from coded_resnext.codebooks.codebook import Codebook


# 128 and the number of SIGINT.
INTERRUPTED = 130


def run_search(args: argparse.Namespace) -> int:
    """Searches a codebook, prints or writes it, and returns 130 where Ctrl-C ended the search."""
    if args.output is not None and not args.output.resolve().parent.is_dir():
        raise FileNotFoundError(f"--output: expected a folder at {args.output.parent}, found none")
    report = _progress_printer() if sys.stderr.isatty() else None
    result = search(args.classes, args.branches, args.active, args.effort, args.seed, report)
    if result.interrupted:
        say("interrupted: this is the best so far", file=sys.stderr)
    codebook = Codebook(torch.from_numpy(result.words))
    if args.output is None:
        say(codebook)
    else:
        try:
            codebook.save(args.output)
        except OSError:
            # What took minutes to find is not lost.
            say(codebook)
            raise
        say(f"{args.output}: {_summary(codebook)}")
    say(codebook.bounds)
    return INTERRUPTED if result.interrupted else 0


def _progress_printer() -> Callable[[Progress], None]:
    def show(progress: Progress) -> None:
        best = f"best: distance {progress.distance}, {progress.pairs} pairs"
        say(
            f"{progress.trying:40} {best if progress.distance else ''}", file=sys.stderr, flush=True
        )

    return show


def run_show(args: argparse.Namespace) -> int:
    """Prints the table, distances, loads and bounds of a codebook."""
    codebook = _read(args.codebook)
    say(codebook)
    say(codebook.bounds)
    say("\ndistance  pairs of classes")
    most = max(codebook.distances.values())
    for distance, pairs in codebook.distances.items():
        say(f"{distance:8}  {pairs:<9} {_bar(pairs, most)}")
    say("\n  branch  classes")
    for branch, load in enumerate(codebook.column_loads):
        say(f"{branch:8}  {load:<9} {_bar(load, max(codebook.column_loads))}")
    quality = codebook.quality()
    say(
        f"\nwith one branch in {1 / quality.flip_probability:.0f} wrong, "
        f"{quality.error:.2%} of the images get a wrong codeword "
        f"(+-{2 * quality.standard_error:.2%}; at most {quality.error_bound:.2%})"
    )
    if args.png is not None:
        draw(codebook, args.png)
        say(f"drawn: {args.png}")
    return 0


def _bar(value: int, most: int) -> str:
    return "#" * max(1 if value else 0, round(40 * value / max(most, 1)))


def run_verify(args: argparse.Namespace) -> int:
    """Prints which rules hold, and returns 1 when one that must hold does not."""
    try:
        rules = verify(read_document(args.file))
    except ValueError as error:
        raise ValueError(f"{args.file}: {error}") from error
    for rule in rules:
        mark = "yes" if rule.holds else ("NO" if rule.required else "no")
        say(f"{mark:4} {rule.name}: {rule.finding}")
    return 0 if all(rule.holds for rule in rules if rule.required) else 1


def run_compare(args: argparse.Namespace) -> int:
    """Prints the measures of two codebooks side by side."""
    first, second = _read(args.first), _read(args.second)
    say(f"{'':26} {args.first:>24} {args.second:>24}")
    left, right = _measures(first), _measures(second)
    for name, value in left.items():
        say(f"{name:26} {value:>24} {right[name]:>24}")
    if first.words == second.words:
        say("the codewords are the same, in the same order")
    elif sorted(first.words) == sorted(second.words):
        say("the codewords are the same, in another order")
    else:
        common = len(set(first.words) & set(second.words))
        say(f"{common} codewords occur in both")
    return 0


def _measures(codebook: Codebook) -> dict[str, str]:
    loads, bounds = codebook.column_loads, codebook.bounds
    return {
        "classes": str(codebook.classes),
        "active/branches": f"{codebook.active}/{codebook.branches}",
        "minimum distance": str(codebook.min_distance),
        "pairs at it": str(bounds.pairs_reached),
        "at least necessary": str(bounds.pairs),
        "largest distance possible": str(bounds.distance),
        "classes per branch": f"{min(loads)}..{max(loads)}",
        "wrong at 10 % flips": f"{codebook.quality(0.1).error:.2%}",
    }


def run_export(args: argparse.Namespace) -> int:
    """Writes a codebook in another form."""
    codebook = _read(args.codebook)
    if args.output.suffix.lower() not in ENDINGS:
        raise ValueError(
            f"output: expected a name that ends in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}, "
            f"got {args.output.suffix!r}"
        )
    codebook.save(args.output)
    say(f"{args.output}: {_summary(codebook)}")
    return 0


def _summary(codebook: Codebook) -> str:
    return str(codebook).splitlines()[0] + ", " + str(codebook).splitlines()[-1]


def _read(which: str) -> Codebook:
    """Returns the shipped codebook of a name, or that in a file."""
    match = re.fullmatch(r"(\d+)x(\d+)/(\d+)(?::(\w+))?", which)
    if match is None:
        return Codebook.load(which)
    classes, active, branches = (int(number) for number in match.groups()[:3])
    return Codebook.shipped(classes, branches, active, match[4] or "best")


# Beyond so many classes their names would overlap.
NAMED_CLASSES = 40


def draw(codebook: Codebook, path: str | Path) -> None:
    """Writes a PNG of a codebook.

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
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    write_atomically(path, drawn.getvalue())
