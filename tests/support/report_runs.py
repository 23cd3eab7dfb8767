"""Runs for the tests of the report: one with odd class names, and one with a thousand classes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from support.small_networks import make_data, make_network

from coded_resnext import Codebook, CodedResNeXt, Stage, calibrate
from coded_resnext.data.batches import Batches, batches
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.deploy.cost import network_cost
from coded_resnext.interpret import (
    EarlyDecoding,
    Evaluation,
    ExitCurve,
    OneClass,
    OneClassClassifier,
    Paths,
    Samples,
    evaluate,
    observe,
    save_evaluation,
    save_pictures,
)
from coded_resnext.interpret.decoding import classification, scores_of
from coded_resnext.interpret.evaluation import BlockDescription
from coded_resnext.interpret.one_class import at_threshold, average_precision, count_scores, sweep
from coded_resnext.interpret.results import PICTURES_FILE, pictures_of
from coded_resnext.models.checkpoint import save_model

ODD_NAMES = (
    "<script>alert(1)</script>",
    ("a class with a name of three hundred letters " * 7)[:300],
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd (RTL)",
    "</textarea>&amp;'\"",
)
# The noise of `small_networks.make_images` has a mean of 0 and a deviation of about 1.4.
PREPROCESSING = Preprocessing(6, 1, (0.5,), (0.2,))


@dataclass(frozen=True)
class Run:
    """A run's folder and what its report is compared with."""

    folder: Path
    model: CodedResNeXt
    evaluation: Evaluation
    test: Batches


def odd_run(folder: Path) -> Run:
    """A whole run of a small network whose classes have names that a page could trip over."""
    folder.mkdir(parents=True)
    small = make_network()
    model = CodedResNeXt.from_config(
        small.config,
        [book.with_class_names(ODD_NAMES) for book in small.stage_codebooks],
        class_names=ODD_NAMES,
    ).eval()
    model.load_state_dict(small.state_dict())
    test = make_data(small, 120, seed=1)
    learned, outside = (make_data(small, 90, seed=seed) for seed in (2, 9))
    evaluation = evaluate(model, learned, test, outside_loader=outside, repeats=2)
    assert evaluation.samples is not None
    save_model(folder / "model.safetensors", model, preprocessing=PREPROCESSING)
    save_evaluation(evaluation, folder)
    positions = evaluation.samples.positions
    save_pictures(positions, test, PREPROCESSING, folder, evaluation.images)
    calibrate(scores_of(observe(model, make_data(small, 80, seed=3))), 0.05).save(
        folder / "early_exit.json"
    )
    write(folder / "config.json", {"data": "noise <b>bold</b>", "network": model.config})
    write(folder / "summary.json", {"command": "python train.py --name '<i>'", "seconds": 90.0})
    log = ["epoch,lr,total,cross_entropy,coding_1,coding_2,test_accuracy,early_decoding_1"]
    log += [f"{epoch},0.1,{3 / epoch},{2 / epoch},0.1,0.05,0.5,0.4" for epoch in range(1, 6)]
    (folder / "metrics.csv").write_text("\n".join(log) + "\n")
    return Run(folder, model, evaluation, test)


def write(path: Path, content: object) -> None:
    """A JSON file."""
    path.write_text(json.dumps(content))


def thousand_run(folder: Path) -> Run:
    """A thousand classes and 13 coded blocks of 32 branches, which are the paper's numbers.

    There is one image of every class, but none of the first, and two of the second. All is measured
    on a narrow network, but for the classifiers, whose scores are drawn.
    """
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    books = [Codebook.shipped(1000, 32, active) for active in (16, 8, 4)]
    depths = (4, 6, 3)
    stages = [
        Stage(depth, 32, 1, 32, book.active) for depth, book in zip(depths, books, strict=True)
    ]
    # A codebook may name a class by nothing.
    names = ("", *map(str, range(1, 1000)))
    books = [book.with_class_names(names) for book in books]
    model = CodedResNeXt(
        [Stage(3, 32, 1, 32, 32), *stages], 1000, codebooks=books, class_names=names
    ).eval()
    images = torch.randn(1000, 3, 12, 12)
    test = batches(images, torch.arange(1000).clamp(min=1), 250)
    observed = observe(model, test)
    evaluation = Evaluation(
        class_names=model.class_names,
        test_samples=1000,
        samples_per_class=(0, 2, *(1,) * 998),
        classification=classification(observed.predictions, observed.targets, 1000),
        codebooks=tuple(book.to_dict() for book in model.stage_codebooks),
        blocks=tuple(
            BlockDescription(books.index(book), index + 3)
            for index, book in enumerate(model.codebooks)
        ),
        cost=network_cost(model, 12).to_dict(),
        early_decoding=EarlyDecoding.of(observed),
        paths=Paths.of(observed),
        early_exit=ExitCurve.of(observed, model),
        samples=Samples.of(observed),
        one_class=drawn_classifiers(model.class_names),
        not_computed={"removal": "not asked for"},
    )
    assert evaluation.samples is not None
    save_model(
        folder / "model.safetensors",
        model,
        preprocessing=Preprocessing(12, 3, (0.5,) * 3, (0.2,) * 3),
    )
    save_evaluation(evaluation, folder)
    # As large as pictures get, and with more detail than most photographs have.
    large = F.interpolate(images, size=96, mode="bicubic") + 0.15 * torch.randn(1000, 3, 96, 96)
    pictures = pictures_of(large, Preprocessing(96, 3, (0.5,) * 3, (0.2,) * 3))
    content = {str(place): pictures[place] for place in evaluation.samples.positions}
    write(folder / PICTURES_FILE, {"format_version": 1, "pictures": content})
    return Run(folder, model, evaluation, test)


def drawn_classifiers(names: tuple[str, ...]) -> OneClass:
    """Fifty images of every class against nine times as many, as in the paper; 25 draws in turn."""
    rng = np.random.default_rng(0)
    positive = np.arange(500) < 50
    drawn = []
    for name in names[:25]:
        scores = (rng.standard_normal(500) + 2 * positive).astype(np.float32)
        drawn.append(
            OneClassClassifier(
                class_name=name,
                computed=True,
                positives=50,
                negatives=450,
                average_precision=average_precision(scores, positive),
                curve=sweep(scores, positive),
                threshold=1.0,
                histogram=count_scores(scores, positive, scores[:0]),
                **at_threshold(scores, positive, 1.0)._asdict(),
            )
        )
    actual = (replace(drawn[i % len(drawn)], class_name=name) for i, name in enumerate(names))
    return OneClass(tuple(actual), 9, 0)
