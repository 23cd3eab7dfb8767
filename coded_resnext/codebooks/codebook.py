"""The codebook: which branches of a block work for which class.

A codebook is a binary matrix `codewords[K, N]`; `codewords[k, n]` is true when branch `n` works for
class `k`. Letters as in docs/math.md: `K` classes, `N` branches, `A` active branches per class.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coded_resnext.files import printable, write_atomically
from coded_resnext.kernels.checks import typed

from .annealing import grow
from .assignment import Assignment, assign
from .bounds import Bounds, codebook_bounds
from .files import (
    FORMAT_VERSION,
    Size,
    check_description,
    checked_names,
    load_shipped,
    read_document,
    variant_of,
    write_document,
)
from .quality import Quality, quality
from .search import Progress, search
from .words import Words, distance_histogram, first_duplicate, from_strings, is_balanced, to_strings

# Characters of a class name in a table of classes.
NAME_SHOWN = 60


class Codebook:
    """An immutable assignment of branches to classes.

    Every codeword has the same number of ones (each class gets the same resources) and no two
    classes share one. Column loads and distances are properties to look at, not requirements: the
    published codebooks are not all balanced.

    Args:
        codewords: `[K, N]` matrix of 0/1 or booleans, `K >= 2`.
        class_names: `K` distinct names in the order of the rows; `"0" .. "K-1"` when left out.

    Raises:
        ValueError: the matrix is not two-dimensional, holds anything but 0 and 1, has fewer than
            two rows, rows of unequal or zero weight, or equal rows; or the names do not fit.
    """

    def __init__(
        self,
        codewords: Tensor | Sequence[Sequence[int]],
        class_names: Sequence[str] | None = None,
    ) -> None:
        self._words = _checked_words(codewords)
        self._words.setflags(write=False)
        self._class_names = checked_names(class_names, len(self._words))

    @classmethod
    @typed
    def from_words(cls, words: Iterable[str], class_names: Sequence[str] | None = None) -> Codebook:
        """Returns a codebook from strings of 0 and 1, one per class, such as `"1001001000"`."""
        words = list(words)
        if len(words) < 2:
            raise ValueError(f"codewords: expected at least two classes, got {len(words)}")
        for index, word in enumerate(words):
            if not isinstance(word, str) or not word or set(word) - {"0", "1"}:
                raise ValueError(
                    "codewords: expected strings of 0 and 1, "
                    f"got {str(word)[:80]!r} for class {index}"
                )
            if len(word) != len(words[0]):
                raise ValueError(
                    f"codewords: expected {len(words[0])} digits in every word as in the first, "
                    f"got {len(word)} for class {index}"
                )
        return cls(torch.from_numpy(from_strings(words)), class_names)

    @classmethod
    @typed
    def shipped(cls, classes: int, branches: int, active: int, variant: str = "best") -> Codebook:
        """Returns a codebook that comes with the package.

        Args:
            classes: `K`.
            branches: `N`.
            active: `A`.
            variant: `"best"`, the best one known; `"paper"`, the published table; or `"paper_d8"`,
                a second published table for ImageNet.

        Raises:
            ValueError: none is shipped; the message names the sizes that are.
        """
        return cls.from_dict(load_shipped(Size(classes, branches, active), variant))

    @classmethod
    @typed
    def search(
        cls,
        classes: int,
        branches: int,
        active: int,
        *,
        effort: str = "default",
        seed: int = 0,
        class_names: Sequence[str] | None = None,
        report: Callable[[Progress], None] | None = None,
    ) -> Codebook:
        """Searches for the best balanced codebook: large distance, then few pairs at it.

        The same arguments give the same codebook. Ctrl-C ends the search with the best so far and a
        warning.

        Args:
            classes: `K`, from 2 to the number of different codewords, `C(N, A)`.
            branches: `N`.
            active: `A`, from 1 to `N`.
            effort: `"fast"` (a second), `"default"` (seconds) or `"thorough"` (minutes).
            seed: another seed gives another codebook.
            class_names: names of the classes.
            report: called with the progress of the search.

        Raises:
            ValueError: there is no such codebook, or an argument is not as described.
        """
        result = search(classes, branches, active, effort, seed, report)
        if result.interrupted:
            warnings.warn("search interrupted; the best codebook so far is kept", stacklevel=2)
        return cls(torch.from_numpy(result.words), class_names)

    @property
    def codewords(self) -> Tensor:
        """Returns a copy of the words, boolean `[K, N]` on the CPU."""
        return torch.from_numpy(self._words.astype(np.bool_))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Returns the `K` class names, in the order of the rows."""
        return self._class_names

    @property
    def classes(self) -> int:
        """Returns the number of classes `K`."""
        return len(self._words)

    @property
    def branches(self) -> int:
        """Returns the number of branches `N`."""
        return int(self._words.shape[1])

    @property
    def active(self) -> int:
        """Returns the number of branches `A` that work for each class."""
        return int(self._words[0].sum())

    @property
    def ratio(self) -> float:
        """Returns the share of the branches that work for a class, `r = A / N`."""
        return self.active / self.branches

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Returns the codewords as strings of 0 and 1."""
        return tuple(to_strings(self._words))

    @property
    def variant(self) -> str | None:
        """Returns the variant as which these codewords are shipped; None where they are not."""
        return variant_of(Size(self.classes, self.branches, self.active), self.words)

    @property
    def column_loads(self) -> tuple[int, ...]:
        """Returns the number of classes that each branch works for."""
        return tuple(self._words.sum(axis=0, dtype=np.int64).tolist())

    @cached_property
    def _distances(self) -> dict[int, int]:
        return distance_histogram(self._words)

    @property
    def distances(self) -> dict[int, int]:
        """Returns the number of class pairs at each Hamming distance, ascending."""
        return dict(self._distances)

    @property
    def min_distance(self) -> int:
        """Returns the smallest Hamming distance between the codewords of two classes."""
        return min(self._distances)

    @cached_property
    def bounds(self) -> Bounds:
        """Returns what is possible in this size, beside what this codebook reaches; prints as a
        sentence.

        The bounds are proved, in whole numbers: Johnson's on the minimum distance, a linear program
        on the number of pairs at it (docs/codebooks.md).
        """
        balanced = is_balanced(self._words)
        return codebook_bounds(self.classes, self.branches, self.active, self._distances, balanced)

    @typed
    def quality(
        self, flip_probability: float = 0.1, *, trials: int = 10_000, seed: int = 0
    ) -> Quality:
        """Returns distances, loads, and how often a class is mistaken when branches decide wrongly.

        Args:
            flip_probability: probability that a branch decides wrongly, from 0 to 0.5.
            trials: random patterns of wrong branches.
            seed: of these patterns.

        Raises:
            ValueError: an argument is out of range.
        """
        return quality(self._words, flip_probability, trials, seed)

    @typed
    def extend(self, new_classes: Sequence[str] | int, *, seed: int = 0) -> Codebook:
        """Returns a codebook for more classes: these rows, then new codewords of the same weight.

        The new codewords load the emptiest branches and keep the minimum distance, or come as near
        to it as annealing with this seed finds.

        Args:
            new_classes: names of the new classes, or their number.
            seed: of the annealing.

        Raises:
            ValueError: no class is added, there are not enough codewords, or a name is taken.
        """
        if isinstance(new_classes, str):
            raise ValueError(f"new_classes: expected names or a number, got {new_classes!r:.80}")
        if isinstance(new_classes, int):
            if new_classes < 1:
                raise ValueError(f"new_classes: expected at least 1, got {new_classes}")
            start = self.classes
            names = tuple(str(index) for index in range(start, start + new_classes))
        else:
            names = tuple(new_classes)
        # Checked before the work is done.
        all_names = checked_names(self._class_names + names, self.classes + len(names))
        return Codebook(torch.from_numpy(grow(self._words, len(names), seed)), all_names)

    @typed
    def assign(
        self, similarity: npt.ArrayLike, similar_classes: str = "far", *, seed: int = 0
    ) -> tuple[Codebook, Assignment]:
        """Deals the same codewords to the classes so that similar classes are far apart, or near.

        Args:
            similarity: `[K, K]` numbers >= 0 in the order of the classes, such as made by
                `coded_resnext.codebooks.similarity_from_confusions`.
            similar_classes: `"far"` or `"near"`.
            seed: of the local search.

        Returns:
            The new codebook, and the mean distance of similar classes before and after.

        Raises:
            ValueError: an argument is not as described.
        """
        assignment = assign(self._words, similarity, similar_classes, seed)
        words = self._words[assignment.order]
        return Codebook(torch.from_numpy(words), self._class_names), assignment

    def with_class_names(self, class_names: Sequence[str]) -> Codebook:
        """Returns the same codewords for classes of other names."""
        return Codebook(self.codewords, class_names)

    def index(self, class_name: str) -> int:
        """Returns the row of a class; a ValueError names the classes if there is no such class."""
        if class_name not in self._class_names:
            shown = ", ".join(self._class_names[:10]) + (", .." if self.classes > 10 else "")
            raise ValueError(f"class_name: expected one of {shown}; got {class_name!r}")
        return self._class_names.index(class_name)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready description; `from_dict` reads it back."""
        return {
            "format_version": FORMAT_VERSION,
            "classes": self.classes,
            "branches": self.branches,
            "active": self.active,
            "class_names": list(self._class_names),
            "codewords": list(self.words),
        }

    @classmethod
    def from_dict(cls, data: Any) -> Codebook:
        """Returns the codebook described by `to_dict`, every field checked against the words."""
        if not isinstance(data, dict) or not isinstance(data.get("codewords"), list):
            raise ValueError('codebook: expected an object with a list "codewords"')
        names = check_description(data, len(data["codewords"]))
        codebook = cls.from_words(data["codewords"], names)
        for field in ("classes", "branches", "active"):
            stated, actual = data.get(field), getattr(codebook, field)
            if stated is not None and stated != actual:
                raise ValueError(f"{field}: the file says {stated!r}, its codewords say {actual}")
        return codebook

    @typed
    def save(self, path: str | Path) -> None:
        """Writes the codebook as its file's ending says: `.csv`, `.txt`, or JSON for any other.

        Raises:
            OSError: names the file; what it held before is intact.
        """
        write_atomically(path, write_document(self.to_dict(), Path(path).suffix).encode())

    @classmethod
    @typed
    def load(cls, path: str | Path) -> Codebook:
        """Reads a codebook written by `save`, or words in JSON, text or CSV of any origin.

        Raises:
            ValueError: the file holds no codebook; the message names the file and what is wrong.
            OSError: the file cannot be read.
        """
        try:
            return cls.from_dict(read_document(path))
        except ValueError as error:
            raise ValueError(f"{path}: not a codebook: {error}") from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Codebook):
            return NotImplemented
        return self.words == other.words and self._class_names == other._class_names

    def __hash__(self) -> int:
        return hash((self.words, self._class_names))

    def __repr__(self) -> str:
        return f"Codebook(classes={self.classes}, branches={self.branches}, active={self.active})"

    def __str__(self) -> str:
        """Returns the table of classes and codewords, with its distances and column loads."""
        # A line is for a person: of a name that has no end, its beginning.
        names = [printable(name[:NAME_SHOWN]) for name in self._class_names]
        width = max(map(len, names))
        rows = [f"{name:<{width}}  {word}" for name, word in zip(names, self.words, strict=True)]
        loads = self.column_loads
        return "\n".join(
            [
                f"{self.classes} classes, {self.active} of {self.branches} branches each",
                *rows,
                f"minimum distance {self.min_distance} "
                f"({self.distances[self.min_distance]} pairs), "
                f"classes per branch {min(loads)}..{max(loads)}",
            ]
        )


def _checked_words(codewords: Tensor | Sequence[Sequence[int]]) -> Words:
    try:
        matrix = torch.as_tensor(codewords, device="cpu").detach().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"codewords: expected a matrix [classes, branches]: {error}") from error
    if matrix.ndim != 2 or matrix.shape[0] < 2 or matrix.shape[1] < 1:
        raise ValueError(
            "codewords: expected a matrix [classes, branches] with at least two classes, "
            f"got shape {list(matrix.shape)}"
        )
    if not ((matrix == 0) | (matrix == 1)).all():
        raise ValueError("codewords: expected only 0 and 1, got other values")
    words: Words = matrix.astype(np.uint8)
    weights = words.sum(axis=1, dtype=np.int64)
    if weights.min() < 1:
        raise ValueError(f"codewords: class {int(weights.argmin())} has no active branch")
    if (weights != weights[0]).any():
        odd = int(np.flatnonzero(weights != weights[0])[0])
        raise ValueError(
            f"codewords: expected the same number of ones in every row, got {weights[0]} "
            f"for class 0 and {weights[odd]} for class {odd}"
        )
    double = first_duplicate(words)
    if double is not None:
        raise ValueError(f"codewords: classes {double[0]} and {double[1]} have the same codeword")
    return words
