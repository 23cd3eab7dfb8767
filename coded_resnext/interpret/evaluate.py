"""The paper's evaluation of a network, all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from coded_resnext.deploy.cost import network_cost
from coded_resnext.models.resnext import CodedResNeXt

from .budget import Budget, Ledger, take_turns
from .decoding import Classification, EarlyDecoding, ExitCurve, classification
from .observe import Gathered, Loader, Observations, Segment, gather_features, observe, segments
from .one_class import MANY_CLASSES, PAPER_NEGATIVES, OneClass, OneClassWork, Role, without_targets
from .paths import Paths
from .records import build, describe
from .removal import Removal, RemovalWork, check_draws
from .samples import Samples
from .semantic import Semantics

# Of the time that is left after the test images, for going through the training images.
TRAINING_SHARE = 0.25
CODED_EXPERIMENTS = (
    "early_decoding",
    "paths",
    "semantics",
    "early_exit",
    "samples",
    "removal",
    "one_class",
)
Result = TypeVar("Result")


def evaluate(
    model: CodedResNeXt,
    train_loader: Loader | None,
    test_loader: Loader,
    *,
    outside_loader: Loader | None = None,
    seed: int = 0,
    repeats: int = 5,
    negatives_per_positive: int | Literal["auto"] | None = "auto",
    budget: Budget | None = None,
    progress: Path | None = None,
) -> Evaluation:
    """Accuracy, early decoding, paths, semantics, removal of branches and one-class classifiers.

    An experiment that cannot be done is left out with the reason, and the others are done.

    Args:
        model: the network, on any device; its mode is left as found.
        train_loader: batches `(images [B, C, H, W], targets [B])` without augmentation, for the
            thresholds of the one-class classifiers; None chooses them on the test data.
        test_loader: batches of the data on which everything is measured.
        outside_loader: images of none of the classes, for the one-class classifiers; their targets
            do not matter.
        seed: of everything random, at least 0.
        repeats: of the random branch removals, at least 1.
        negatives_per_positive: images of other classes that a one-class classifier is tested with
            for each of its class; None for all, `"auto"` for all of up to 100 classes and the
            paper's 9 of more.
        budget: limit of time, under which seeded subsets are computed: images, classes, numbers of
            branches removed.
        progress: file in which finished steps are kept; with it an interrupted evaluation goes on
            where it was. It is deleted at the end, unless more time would compute more.

    Returns:
        The results; only the classification for a network without coded blocks.

    Raises:
        ValueError: the test loader has no batch or does not fit the model, a loader cannot be
            iterated twice, a number is outside its range, or `progress` belongs to another
            evaluation.
    """
    loaders = {"test": test_loader, "train": train_loader, "outside": outside_loader}
    for name, loader in loaders.items():
        if isinstance(loader, Iterator):
            raise ValueError(
                f"{name}_loader: expected batches that can be iterated again and again, "
                "got an iterator"
            )
    check_draws(seed, repeats)
    if negatives_per_positive == "auto":
        many = model.num_classes > MANY_CLASSES
        negatives_per_positive = PAPER_NEGATIVES if many else None
    budget = budget or Budget()
    ledger = Ledger(
        progress,
        {
            "network": _fingerprint(model),
            "backend": model.blocks[0].backend,
            "seed": seed,
            "repeats": repeats,
            "negatives_per_positive": negatives_per_positive,
            "limited": budget.is_limited,
            "data": [name for name, loader in loaders.items() if loader is not None],
        },
    )
    try:
        observed = _remembered(
            ledger,
            "test",
            lambda share: observe(model, test_loader, budget=budget, seed=seed, looked_at=share),
            lambda seen: seen.gathered,
        )
        return _Parts(model, observed, budget, ledger, seed).evaluate(
            train_loader, test_loader, outside_loader, repeats, negatives_per_positive
        )
    finally:
        ledger.write()


class _Parts:
    """An evaluation whose test images have been observed."""

    def __init__(
        self,
        model: CodedResNeXt,
        observed: Observations,
        budget: Budget,
        ledger: Ledger,
        seed: int,
    ) -> None:
        self.model, self.observed, self.budget = model, observed, budget
        self.ledger, self.seed = ledger, seed
        self.not_computed: dict[str, str] = {}

    def evaluate(
        self,
        train_loader: Loader | None,
        test_loader: Loader,
        outside_loader: Loader | None,
        repeats: int,
        negatives_per_positive: int | None,
    ) -> Evaluation:
        observed, gathered = self.observed, self.observed.gathered
        if observed.samples < gathered.available:
            self.not_computed["test images"] = (
                f"{observed.samples} of {gathered.available}, a seeded draw: budget"
            )
        early = paths = semantics = removal = one = exits = samples = None
        data: dict[Role, Gathered] = {}
        if not self.model.coded_blocks:
            for name in CODED_EXPERIMENTS:
                self.not_computed[name] = "a plain network, which has no coded block"
        else:
            early = EarlyDecoding.of(observed)
            measured = paths = Paths.of(observed)
            exits = ExitCurve.of(observed, self.model)
            samples = Samples.of(observed, seed=self.seed)
            semantics = self._try(
                "semantics", lambda: Semantics.of(observed, measured, seed=self.seed)
            )
            loaders: dict[Role, Loader] = {"test": test_loader}
            data["test"] = gathered
            others: tuple[tuple[Role, Loader | None], ...] = (
                ("threshold", train_loader),
                ("outside", outside_loader),
            )
            for role, loader in others:
                if loader is not None:
                    found = self._try(f"{role} data", partial(self._gather, role, loader))
                    if found is not None:
                        loaders[role], data[role] = loader, found
            removal, one = self._work(loaders, data, repeats, negatives_per_positive)
        codebooks = list(dict.fromkeys(observed.codebooks))
        places = [index for index, block in enumerate(self.model.blocks) if block.is_coded]
        if not (self.budget.is_limited and self.not_computed):
            self.ledger.remove()
        return Evaluation(
            class_names=observed.class_names,
            test_samples=observed.samples,
            available_samples=gathered.available,
            samples_per_class=tuple(
                observed.targets.bincount(minlength=self.model.num_classes).tolist()
            ),
            classification=classification(
                observed.predictions, observed.targets, self.model.num_classes
            ),
            codebooks=tuple(book.to_dict() for book in codebooks),
            blocks=tuple(
                BlockDescription(codebooks.index(book), place)
                for book, place in zip(observed.codebooks, places, strict=True)
            ),
            cost=network_cost(self.model, gathered.image_size[0]).to_dict(),
            early_decoding=early,
            paths=paths,
            semantics=semantics,
            early_exit=exits,
            samples=samples,
            removal=removal,
            one_class=one,
            thresholds_from="training data" if "threshold" in data else "test data",
            threshold_samples=len(data["threshold" if "threshold" in data else "test"].targets)
            if data
            else 0,
            outside_samples=len(data["outside"].targets) if "outside" in data else 0,
            budget_seconds=self.budget.seconds,
            not_computed=self.not_computed,
        )

    def _try(self, experiment: str, function: Callable[[], Result]) -> Result | None:
        """The result, or None with the reason noted."""
        try:
            return function()
        except (ValueError, ImportError) as error:
            self.not_computed[experiment] = str(error)
            return None

    def _gather(self, role: str, loader: Loader) -> Gathered:
        if role == "outside":
            loader = without_targets(loader)
        return _remembered(
            self.ledger,
            role,
            lambda share: gather_features(
                self.model,
                loader,
                f"{role} images",
                budget=self.budget,
                share=TRAINING_SHARE,
                seed=self.seed,
                looked_at=share,
            ),
            lambda seen: seen,
        )

    def _work(
        self,
        loaders: dict[Role, Loader],
        data: dict[Role, Gathered],
        repeats: int,
        negatives_per_positive: int | None,
    ) -> tuple[Removal | None, OneClass | None]:
        """The experiments that need passes of their own, step by step in turns."""
        model, budget = self.model, self.budget
        removal = RemovalWork(
            model,
            self.observed,
            seed=self.seed,
            repeats=repeats,
            budget=budget,
            ledger=self.ledger,
        )
        one = self._try(
            "one_class",
            lambda: OneClassWork(
                model,
                data,
                negatives_per_positive=negatives_per_positive,
                seed=self.seed,
                ledger=self.ledger,
            ),
        )
        failed = False

        def classify(given: dict[Role, Segment]) -> Iterator[None]:
            nonlocal failed
            try:
                if one is not None and not failed:
                    yield from one.steps(given)
            except ValueError as error:
                failed = True
                self.not_computed["one_class"] = str(error)

        others = {role: loader for role, loader in loaders.items() if role != "test"}
        if budget.is_limited:
            # Every class needs all its data at once, since there is no telling which are computed.
            every = {role: next(segments(model, loaders[role], data[role])) for role in loaders}
            take_turns(
                {"removal": removal.steps(every["test"]), "one_class": classify(every)}, budget
            )
        else:
            for segment in segments(model, loaders["test"], data["test"]):
                take_turns(
                    {"removal": removal.steps(segment), "one_class": classify({"test": segment})},
                    budget,
                )
            for role, loader in others.items():
                for segment in segments(model, loader, data[role]):
                    take_turns({"one_class": classify({role: segment})}, budget)
        removed = removal.result()
        computed, points = removed.points
        samples = self.observed.samples
        if computed < points or removed.samples < samples:
            self.not_computed["removal"] = (
                f"{computed} of {points} points, with {removed.samples} of {samples} images: budget"
            )
        if one is None or failed:
            return removed, None
        classes = one.result()
        if classes.computed < model.num_classes:
            self.not_computed["one_class"] = (
                f"{classes.computed} of {model.num_classes} classes, a seeded draw: budget"
            )
        return removed, classes


def _remembered(
    ledger: Ledger,
    role: str,
    look: Callable[[float | None], Result],
    gathered: Callable[[Result], Gathered],
) -> Result:
    """Look at data; an interrupted evaluation goes on with the share that it looked at."""
    key = f"looked at/{role}"
    result = look(ledger.get(key))
    ledger.put(key, gathered(result).looked_at)
    return result


def _fingerprint(model: CodedResNeXt) -> str:
    """What tells one network from another."""
    digest = hashlib.sha256(repr(sorted(model.config.items())).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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
    """Of the network for one image, as `coded_resnext.deploy.cost.Cost` describes it."""
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
