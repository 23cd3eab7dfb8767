"""What an evaluation found, as typed results that JSON holds and gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .early_decoding import Classification, EarlyDecoding
from .exit_curve import ExitCurve
from .one_class import OneClass
from .paths import Paths
from .records import build, describe
from .removal import Removal
from .samples import Samples
from .semantic import Semantics

FORMAT_VERSION = 2


@dataclass(frozen=True)
class BlockDescription:
    """A coded block, so that a reader of the results needs no network."""

    codebook: int
    """Its codebook among those of the evaluation."""
    block: int
    """Its place among all blocks, from 0."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found; a plain network has its classification alone, and None for the rest.

    Wherever something is None that would apply, `not_computed` has the reason.
    """

    class_names: tuple[str, ...]
    test_samples: int
    """Images that were classified, all unless time was limited."""
    available_samples: int
    """Images that the test data have."""
    samples_per_class: tuple[int, ...]
    """Of the images that were classified."""
    classification: Classification
    """By the whole network."""
    codebooks: tuple[dict[str, Any], ...]
    """The different codebooks, as `Codebook.to_dict` describes them."""
    blocks: tuple[BlockDescription, ...]
    """The coded blocks, in order."""
    cost: dict[str, int]
    """Of the network for one image, as `coded_resnext.cost.Cost` describes it."""
    early_decoding: EarlyDecoding | None = None
    paths: Paths | None = None
    semantics: Semantics | None = None
    early_exit: ExitCurve | None = None
    samples: Samples | None = None
    removal: Removal | None = None
    one_class: OneClass | None = None
    thresholds_from: Literal["training data", "test data"] = "training data"
    """The data on which the thresholds of the one-class classifiers were chosen."""
    threshold_samples: int = 0
    """Images among which they were chosen."""
    outside_samples: int = 0
    """Images of none of the classes."""
    budget_seconds: float | None = None
    """The limit of time; None without one."""
    not_computed: dict[str, str] = field(default_factory=dict)
    """By experiment the reason why it, or a part of it, is missing."""

    @property
    def test_accuracy(self) -> float:
        """Share of the test images that are classified correctly, 0 to 1."""
        return self.classification.accuracy

    @property
    def is_coded(self) -> bool:
        """Whether the network has coded blocks, and so more than a classification."""
        return bool(self.blocks)

    def summary(self) -> dict[str, Any]:
        """The headline numbers; the lists of a plain network are empty.

        `test_accuracy`; by coded block `early_decoding` (accuracy), `remove_active_accuracy` and
        `remove_inactive_accuracy` (all branches of the kind removed); by class
        `single_class_average_precision`. Shares, 0 to 1; None where one is not available.
        """
        blocks = self.removal.blocks if self.removal else ()
        return {
            "test_accuracy": self.test_accuracy,
            "early_decoding": list(
                self.early_decoding.block_accuracy if self.early_decoding else ()
            ),
            "single_class_average_precision": list(
                self.one_class.average_precisions if self.one_class else ()
            ),
            "remove_active_accuracy": [block.active.accuracy[-1] for block in blocks],
            "remove_inactive_accuracy": [block.inactive.accuracy[-1] for block in blocks],
        }

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description of everything; `from_dict` reads it back."""
        return {"format_version": FORMAT_VERSION, **describe(self)}

    @classmethod
    def from_dict(cls, data: Any) -> Evaluation:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: it is damaged, or of another format version.
        """
        if not isinstance(data, dict) or "format_version" not in data:
            raise ValueError("evaluation: expected an object with a format_version")
        content = dict(data)
        version = content.pop("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version: expected {FORMAT_VERSION}, got {version!r}")
        return build(cls, content, "evaluation")

    def __str__(self) -> str:
        """Tables for a person to read."""
        from .tables import text

        return text(self)
