"""The codebook: which branches of a block work for which class.

A codebook is a binary matrix `codewords[K, N]`; `codewords[k, n]` is true when branch `n` works for
class `k`. Letters as in docs/math.md: `K` classes, `N` branches, `A` active branches per class.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coded_resnext.codebooks.shipped import Size, load_shipped

FORMAT_VERSION = 1


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
        matrix = torch.as_tensor(codewords).detach().cpu()
        _check_matrix(matrix)
        self._codewords = matrix.to(torch.bool, copy=True)
        self._class_names = _checked_names(class_names, len(matrix))

    @classmethod
    def from_words(cls, words: Iterable[str], class_names: Sequence[str] | None = None) -> Codebook:
        """A codebook from strings of 0 and 1, one per class, such as `"1001001000"`."""
        words = list(words)
        for index, word in enumerate(words):
            if not isinstance(word, str) or not word or set(word) - {"0", "1"}:
                raise ValueError(
                    f"codewords: expected strings of 0 and 1, got {str(word)[:80]!r} for class {index}"
                )
            if len(word) != len(words[0]):
                raise ValueError(
                    f"codewords: expected {len(words[0])} digits in every word as in the first, "
                    f"got {len(word)} for class {index}"
                )
        return cls([[int(digit) for digit in word] for word in words], class_names)

    @classmethod
    def shipped(cls, classes: int, branches: int, active: int, variant: str = "best") -> Codebook:
        """A codebook that comes with the package.

        Args:
            classes: `K`.
            branches: `N`.
            active: `A`.
            variant: `"best"`, the best one known, or `"paper"`, a published table.

        Raises:
            ValueError: none is shipped; the message names the sizes that are.
        """
        return cls.from_dict(load_shipped(Size(classes, branches, active), variant))

    @property
    def codewords(self) -> Tensor:
        """Boolean `[K, N]` on the CPU; a copy, so that the codebook stays what it is."""
        return self._codewords.clone()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The `K` class names, in the order of the rows."""
        return self._class_names

    @property
    def classes(self) -> int:
        """Number of classes `K`."""
        return self._codewords.shape[0]

    @property
    def branches(self) -> int:
        """Number of branches `N`."""
        return self._codewords.shape[1]

    @property
    def active(self) -> int:
        """Number of branches `A` that work for each class."""
        return int(self._codewords[0].sum())

    @property
    def ratio(self) -> float:
        """Share of the branches that work for a class, `r = A / N`."""
        return self.active / self.branches

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The codewords as strings of 0 and 1."""
        return tuple("".join("01"[bit] for bit in row) for row in self._codewords.int().tolist())

    @property
    def column_loads(self) -> tuple[int, ...]:
        """For each branch, the number of classes that it works for."""
        return tuple(self._codewords.sum(0).tolist())

    @cached_property
    def distances(self) -> dict[int, int]:
        """Histogram of the Hamming distances: distance to number of class pairs, ascending."""
        rows = self._codewords.to(torch.int32)
        overlap = (rows.float() @ rows.float().T).round().int()
        upper = torch.triu_indices(self.classes, self.classes, offset=1)
        distances, counts = (2 * (self.active - overlap[upper[0], upper[1]])).unique(
            return_counts=True
        )
        return dict(zip(distances.tolist(), counts.tolist(), strict=True))

    @property
    def min_distance(self) -> int:
        """Smallest Hamming distance between the codewords of two classes."""
        return min(self.distances)

    def with_class_names(self, class_names: Sequence[str]) -> Codebook:
        """The same codewords for classes of other names."""
        return Codebook(self._codewords, class_names)

    def index(self, class_name: str) -> int:
        """Row of a class; a ValueError names the classes when there is no such class."""
        if class_name not in self._class_names:
            shown = ", ".join(self._class_names[:10]) + (", .." if self.classes > 10 else "")
            raise ValueError(f"class_name: expected one of {shown}; got {class_name!r}")
        return self._class_names.index(class_name)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `from_dict` reads it back."""
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
        """The codebook described by `to_dict`, every field checked against the words."""
        if not isinstance(data, dict) or not isinstance(data.get("codewords"), list):
            raise ValueError('codebook: expected an object with a list "codewords"')
        version = data.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version: expected {FORMAT_VERSION}, got {version!r}")
        codebook = cls.from_words(data["codewords"], data.get("class_names"))
        for field in ("classes", "branches", "active"):
            stated, found = data.get(field), getattr(codebook, field)
            if stated is not None and stated != found:
                raise ValueError(f"{field}: the file says {stated!r}, its codewords say {found}")
        return codebook

    def save(self, path: str | Path) -> None:
        """Write the codebook as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Codebook:
        """Read a codebook written by `save`; a ValueError names the file and what is wrong."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
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
        """The table of classes and codewords, with its distances and column loads."""
        width = max(map(len, self._class_names))
        rows = [
            f"{name:<{width}}  {word}"
            for name, word in zip(self._class_names, self.words, strict=True)
        ]
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


def _check_matrix(matrix: Tensor) -> None:
    if matrix.ndim != 2 or matrix.shape[0] < 2 or matrix.shape[1] < 1:
        raise ValueError(
            "codewords: expected a matrix [classes, branches] with at least two classes, "
            f"got shape {list(matrix.shape)}"
        )
    if not bool(((matrix == 0) | (matrix == 1)).all()):
        raise ValueError("codewords: expected only 0 and 1, got other values")
    weights = (matrix != 0).sum(1)
    if int(weights.min()) < 1:
        raise ValueError(f"codewords: class {int(weights.argmin())} has no active branch")
    if not bool((weights == weights[0]).all()):
        odd = int((weights != weights[0]).nonzero()[0])
        raise ValueError(
            f"codewords: expected the same number of ones in every row, got {int(weights[0])} "
            f"for class 0 and {int(weights[odd])} for class {odd}"
        )
    seen: dict[tuple[Any, ...], int] = {}
    for index, row in enumerate((matrix != 0).tolist()):
        first = seen.setdefault(tuple(row), index)
        if first != index:
            raise ValueError(f"codewords: classes {first} and {index} have the same codeword")


def _checked_names(class_names: Sequence[str] | None, classes: int) -> tuple[str, ...]:
    if class_names is None:
        return tuple(map(str, range(classes)))
    names = tuple(class_names)
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names: expected {classes} strings, got {class_names!r:.80}")
    if len(names) != classes:
        raise ValueError(f"class_names: expected {classes} names, got {len(names)}")
    if len(set(names)) != classes:
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"class_names: expected distinct names, got {double!r} more than once")
    return names
