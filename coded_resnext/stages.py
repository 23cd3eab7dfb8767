"""A run of equal blocks, and which codebook and class names a network of several gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .codebook import Codebook
from .codebooks.shipped import Size, shipped_sizes


@dataclass(frozen=True)
class Stage:
    """A run of bottleneck blocks of one size."""

    depth: int
    """Number of blocks."""
    channels: int
    """Output channels `C` of every block."""
    width: int
    """Channels `D` of one branch."""
    branches: int
    """Number of branches `N`."""
    active: int
    """Branches `A` that work for each class; all of them (`A = N`) is a plain stage."""
    stride: int = 1
    """Stride of the first block."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Stage.{name}: expected a positive integer, got {value!r}")
        if self.active > self.branches:
            raise ValueError(
                f"Stage.active: expected at most {self.branches} branches, got {self.active}"
            )

    @property
    def is_coded(self) -> bool:
        """Whether a codebook assigns the branches of this stage to classes."""
        return self.active < self.branches


def default_codebook(
    classes: int, branches: int, active: int, class_names: Sequence[str] | None = None
) -> Codebook:
    """The shipped codebook of a size, or the one that a seeded search finds."""
    size = Size(classes, branches, active)
    shipped = size in shipped_sizes()
    codebook = Codebook.shipped(*size) if shipped else Codebook.search(*size)
    return codebook if class_names is None else codebook.with_class_names(class_names)


def assign_codebooks(
    stages: Sequence[Stage],
    num_classes: int,
    codebooks: Sequence[Codebook] | None,
    class_names: Sequence[str] | None,
) -> list[Codebook | None]:
    """The codebook of every stage, None for plain ones; equal ones are one object."""
    coded = [stage for stage in stages if stage.is_coded]
    if codebooks is None:
        codebooks = [
            default_codebook(num_classes, stage.branches, stage.active, class_names)
            for stage in coded
        ]
    if len(codebooks) != len(coded):
        raise ValueError(
            f"codebooks: expected one for each of {len(coded)} coded stages, got {len(codebooks)}"
        )
    for stage, codebook in zip(coded, codebooks, strict=True):
        expected = (num_classes, stage.branches, stage.active)
        found = (codebook.classes, codebook.branches, codebook.active)
        if found != expected:
            raise ValueError(
                "codebooks: expected (classes, branches, active) = "
                f"{expected} as in the stage, got {found}"
            )
        if codebook.class_names != codebooks[0].class_names:
            raise ValueError("codebooks: expected the same classes in the same order in all")
    unique = {codebook: codebook for codebook in reversed(codebooks)}
    remaining = iter(codebooks)
    return [unique[next(remaining)] if stage.is_coded else None for stage in stages]


def check_class_names(
    codebooks: Sequence[Codebook | None], num_classes: int, class_names: Sequence[str] | None
) -> tuple[str, ...]:
    """The names of the classes; the codebooks' when there are any, and they must agree."""
    known = next((book.class_names for book in codebooks if book is not None), None)
    if class_names is None:
        return known or tuple(map(str, range(num_classes)))
    names = tuple(class_names)
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise ValueError(f"class_names: expected {num_classes} distinct names, got {len(names)}")
    if known is not None and names != known:
        raise ValueError("class_names: expected the classes of the codebooks, in their order")
    return names
