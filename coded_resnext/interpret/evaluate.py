"""The paper's evaluation of a network, all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from coded_resnext.data.loaders import EvalImages
from coded_resnext.deploy.cost import macs_from_coded, network_cost
from coded_resnext.models.checkpoint import weights_sha256
from coded_resnext.models.resnext import CodedResNeXt

from .decoding import EarlyDecoding, ExitCurve, Samples, classification
from .evaluation import BlockDescription, DigestedLoader, Evaluation, Provenance
from .observe import (
    DrawnImages,
    Loader,
    Observer,
    Use,
    draw_rows,
    read_targets,
    require_at_least,
    stream,
    without_targets,
)
from .one_class import (
    ClassScorer,
    ClassScores,
    OneClass,
    draw_classes,
    paper_negatives,
    score_classes,
)
from .paths import Paths, Semantics
from .removal import Remover, removal_passes

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
    test_images: int | None = None,
    threshold_images: int | None = None,
    removal_images: int | None = None,
    classes: int | None = None,
) -> Evaluation:
    """Measures accuracy, early decoding, paths, semantics, removal, and one-class classifiers.

    Every image is read once: what wants it is drawn by the classes beforehand, for which loaders
    that do not tell theirs, as `targets`, are read once more. An experiment that cannot be done is
    left out with the reason, and the others are done. Draws of images take the same share of every
    class, at least one image of each.

    Args:
        model: the network, on any device; its mode is left as found.
        train_loader: batches `(images [B, C, H, W], targets [B])` without augmentation, for the
            thresholds of the one-class classifiers; None chooses them on the test data. Where
            these images cannot be read, there are no one-class classifiers.
        test_loader: batches of the data on which everything is measured.
        outside_loader: images of none of the classes, for the one-class classifiers; their targets
            do not matter.
        seed: decides everything random; at least 0.
        repeats: random orders of the branch removals, at least 1.
        negatives_per_positive: images of other classes that a one-class classifier is tested with
            for each of its class; None for all, `"auto"` for the paper's 9 with 100 classes or
            more and all with fewer.
        test_images: test the one-class classifiers on about so many test images, and remove
            branches from these; None for all. What one pass gives, such as the accuracy, is
            measured on all of them in any case.
        threshold_images: choose the thresholds on about so many training images; None for all.
        removal_images: remove branches from about so many test images; None for `test_images`.
        classes: test the one-class classifiers of so many classes; None for all.

    Returns:
        The results; only the classification for a network without coded blocks.

    Raises:
        ValueError: the test loader has no batch or does not fit the model, a loader cannot be
            iterated twice, or a number is outside its range.
    """
    loaders = {"test": test_loader, "train": train_loader, "outside": outside_loader}
    for name, loader in loaders.items():
        if isinstance(loader, Iterator):
            raise ValueError(
                f"{name}_loader: expected batches that can be iterated again and again, "
                "got an iterator"
            )
    require_at_least(0, seed=seed)
    require_at_least(
        1,
        repeats=repeats,
        test_images=test_images,
        threshold_images=threshold_images,
        removal_images=removal_images,
    )
    chosen = draw_classes(model.num_classes, classes, seed)
    negatives = _negatives(model, negatives_per_positive)
    not_computed: dict[str, str] = {}
    attempt = partial(_attempt, not_computed)
    digested = {
        role: DigestedLoader(loader) for role, loader in loaders.items() if loader is not None
    }

    # All that one pass over the test images needs is drawn by their classes alone.
    observer = Observer(model, seed)
    uses: list[tuple[Use, Tensor | None]] = [(observer.add, None)]
    targets = scorer = None
    if model.coded_blocks:
        rows = removed = None
        if not (test_images is removal_images is negatives is None):
            targets = read_targets(model, digested["test"])
            rows, removed = (
                None if images is None else draw_rows(targets, images, seed)
                for images in (test_images, removal_images or test_images)
            )
        drawing: dict[str, Any] = {
            "classes": chosen,
            "negatives_per_positive": negatives,
            "seed": seed,
        }
        remover = Remover(model, seed, repeats)
        scorer = attempt(
            "one_class",
            lambda: ClassScorer(model, "test", targets=targets, rows=rows, **drawing),
        )
        uses.append((remover.add, removed))
        if scorer is not None:
            uses.append((scorer.add, rows))
    stream(model, digested["test"], "test images", uses, known=targets)
    observed = observer.result()
    codebooks = list(dict.fromkeys(observed.codebooks))
    indices = [index for index, block in enumerate(model.blocks) if block.is_coded]
    counts = observed.targets.bincount(minlength=model.num_classes)
    evaluation = Evaluation(
        class_names=observed.class_names,
        test_samples=observed.samples,
        samples_per_class=tuple(counts.tolist()),
        classification=classification(observed.predictions, observed.targets, model.num_classes),
        codebooks=tuple(book.to_dict() for book in codebooks),
        blocks=tuple(
            BlockDescription(codebooks.index(book), index)
            for book, index in zip(observed.codebooks, indices, strict=True)
        ),
        cost=network_cost(model, observed.image_size).to_dict(),
        not_computed=not_computed,
        weights_sha256=weights_sha256(model),
    )
    settings = {
        "seed": seed,
        "repeats": repeats,
        "negatives_per_positive": negatives,
        "test_images": test_images,
        "threshold_images": threshold_images,
        "removal_images": removal_images,
        "classes": classes,
    }
    if not model.coded_blocks:
        reason = "a plain network, which has no coded block"
        not_computed.update(dict.fromkeys(CODED_EXPERIMENTS, reason))
        provenance = Provenance.of({"test": digested["test"]}, settings)
        return replace(evaluation, provenance=provenance)

    test = None if scorer is None else attempt("one_class", scorer.result)
    one_class = threshold = outside = None
    if test is not None and train_loader is not None:

        def choose_thresholds() -> ClassScores:
            if threshold_images is not None:
                rows = draw_rows(read_targets(model, train_loader), threshold_images, seed)
                digested["train"] = DigestedLoader(_part(train_loader, rows))
            return score_classes(model, digested["train"], "threshold", **drawing)

        threshold = attempt("threshold data", choose_thresholds)
        # Thresholds that they were to choose are not chosen on the test images instead.
        if threshold is None:
            test, reason = None, not_computed["threshold data"]
            not_computed["one_class"] = f"no thresholds from the training images: {reason}"
    if test is not None:
        if outside_loader is not None:
            scoring = partial(score_classes, model, digested["outside"], "outside", test=test)
            outside = attempt("outside data", partial(scoring, **drawing))
        one_class = OneClass.of(
            model.class_names,
            test,
            threshold,
            outside,
            negatives_per_positive=negatives,
            seed=seed,
        )
    learned = threshold or test
    for name, read in digested.items():
        if isinstance(read.loader, EvalImages) and read.loader.damaged.reasons:
            not_computed[f"{name} images"] = str(read.loader.damaged)
    removal = remover.result()
    if removal.samples < observed.samples:
        not_computed["removal"] = (
            f"{removal.samples} of {observed.samples} test images, a seeded draw"
        )
    if observed.compared is not None:
        not_computed["semantics"] = (
            f"{len(observed.compared)} of {model.num_classes} classes, a seeded draw"
        )
    if one_class is not None and len(chosen) < model.num_classes:
        not_computed["one_class"] = f"{len(chosen)} of {model.num_classes} classes, a seeded draw"
    paths = Paths.of(observed)
    return replace(
        evaluation,
        early_decoding=EarlyDecoding.of(observed),
        paths=paths,
        semantics=attempt("semantics", lambda: Semantics.of(observed, paths, seed=seed)),
        early_exit=ExitCurve.of(observed, model),
        samples=Samples.of(observed, seed=seed),
        removal=removal,
        one_class=one_class,
        one_class_samples=0 if one_class is None or test is None else len(test.targets),
        thresholds_from="test data" if threshold is None else "training data",
        threshold_samples=0 if learned is None else len(learned.targets),
        outside_samples=0 if outside is None else len(outside.targets),
        provenance=Provenance.of(digested, settings),
    )


def _attempt(
    not_computed: dict[str, str], experiment: str, function: Callable[[], Result]
) -> Result | None:
    """Returns the result of an experiment, or None with the reason noted."""
    try:
        return function()
    except (ValueError, ImportError) as error:
        not_computed[experiment] = str(error)
        return None


def _part(loader: Loader, rows: Tensor) -> Loader:
    """Returns a loader of some images of a loader; others are not read, where it can leave them."""
    return loader.part(rows) if isinstance(loader, EvalImages) else DrawnImages(loader, rows)


def _negatives(model: CodedResNeXt, asked: int | Literal["auto"] | None) -> int | None:
    return paper_negatives(model.num_classes) if asked == "auto" else asked


@dataclass(frozen=True)
class Plan:
    """What an evaluation is going to do, in images and multiply-accumulates."""

    test_images: int
    """The images of the one pass over the test images."""
    images: dict[str, int]
    """The images that each kind of work wants, by its name."""
    macs: dict[str, int]
    """The multiply-accumulates of each kind of work."""
    network_macs: int
    """Those of the network for one image."""

    @property
    def passes(self) -> float:
        """Returns how many plain passes over the test images cost as much as all of this."""
        return sum(self.macs.values()) / (self.test_images * self.network_macs)

    def __str__(self) -> str:
        plain = self.test_images * self.network_macs
        parts = ", ".join(
            f"{name} {self.macs[name] / plain:.2f} ({images:,} images)"
            for name, images in self.images.items()
        )
        return f"planned: the work of {self.passes:.1f} passes over the test images: {parts}"


def plan(
    model: CodedResNeXt,
    train_loader: Loader | None,
    test_loader: Loader,
    *,
    image_size: tuple[int, int],
    outside_loader: Loader | None = None,
    seed: int = 0,
    repeats: int = 5,
    negatives_per_positive: int | Literal["auto"] | None = "auto",
    test_images: int | None = None,
    threshold_images: int | None = None,
    removal_images: int | None = None,
    classes: int | None = None,
) -> Plan:
    """Counts what `evaluate` does with the same arguments; reads the images' classes alone.

    Args:
        image_size: height and width of the images.
    """
    whole = network_cost(model, image_size).macs
    rest = macs_from_coded(model, *image_size)
    before = whole - rest[0] if rest else whole
    targets = read_targets(model, test_loader)
    images, macs = {"observation": len(targets)}, {"observation": len(targets) * whole}
    if not rest:
        return Plan(len(targets), images, macs, whole)
    chosen = draw_classes(model.num_classes, classes, seed)
    negatives = _negatives(model, negatives_per_positive)

    def add_pairs(name: str, of: Tensor, counted: Tensor, read: int) -> None:
        count = model.num_classes
        own, asked = (each.bincount(minlength=count)[:count] for each in (of, counted))
        others = len(of) - own
        if negatives is not None:
            others = torch.minimum(others, negatives * asked)
        pairs = int((own + others)[list(chosen)].sum())
        images[name], macs[name] = len(of), pairs * rest[0] + read * before

    removed = len(draw_rows(targets, removal_images or test_images, seed))
    passes = (removal_passes(book, repeats) for book in model.codebooks)
    of_image = rest[0] + sum(map(int.__mul__, passes, rest))
    images["removal"], macs["removal"] = removed, removed * of_image
    tested = targets[draw_rows(targets, test_images, seed)]
    add_pairs("one-class classifiers", tested, tested, 0)
    if train_loader is not None:
        learned = read_targets(model, train_loader)
        learned = learned[draw_rows(learned, threshold_images, seed)]
        add_pairs("thresholds", learned, learned, len(learned))
    if outside_loader is not None:
        strange = read_targets(model, without_targets(outside_loader))
        # Of no class: all of them are others'.
        add_pairs(
            "outside images", torch.full_like(strange, model.num_classes), tested, len(strange)
        )
    return Plan(len(targets), images, macs, whole)
