"""`coded-resnext predict`: the classes of image files, and the paths that they take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coded_resnext.data.image_sets import DamagedImages
from coded_resnext.data.labelled import images_of_no_class
from coded_resnext.data.loaders import EvalImages
from coded_resnext.deploy.cost import network_cost
from coded_resnext.deploy.early_exit import EXIT_FILE, EarlyExit, predict_early
from coded_resnext.files import printable, say
from coded_resnext.interpret.decoding import strongest
from coded_resnext.interpret.observe import evaluating, with_progress
from coded_resnext.interpret.results import Companions
from coded_resnext.models.checkpoint import LoadedModel, load_model
from coded_resnext.models.loss import check_results, not_finite, read_class
from coded_resnext.models.resnext import CodedResNeXt


def run(arguments: argparse.Namespace) -> int:
    """Classifies and prints; returns the exit status, 1 where an image could not be read.

    Raises:
        ValueError: no file is a readable image, the model has no preprocessing, or early exit was
            asked for and cannot be.
        OSError: a file cannot be read.
        ImportError: Pillow is not installed.
    """
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size: expected at least 1, got {arguments.batch_size}")
    loaded = load_model(arguments.checkpoint)
    if loaded.preprocessing is None:
        raise ValueError(
            "RUN: expected a model with a preprocessing, which says how an image becomes its "
            "input; this one has none"
        )
    criterion = None
    if arguments.early or arguments.margin is not None:
        companions = Companions(arguments.checkpoint, loaded.model)
        criterion = read_criterion(arguments.margin, companions, loaded.model)
    images = images_of_no_class(arguments.images)
    damaged = DamagedImages(images, 1.0)
    loader = EvalImages(images, loaded.preprocessing, arguments.batch_size, damaged=damaged)
    rows: list[dict[str, Any]] = []
    for batch in with_progress(loader.batches(), "predict"):
        files = [images.address(index) for index in batch.indices.tolist()]
        rows += classify(loaded.model, batch.images, files, criterion)
    if not rows:
        raise ValueError("IMAGES: expected at least one that can be read, got none")
    if arguments.json:
        say(json.dumps(rows, indent=1, allow_nan=False))
    else:
        say(_table(loaded, rows, criterion))
    return 1 if damaged.reasons else 0


def read_criterion(margin: float | None, companions: Companions, model: CodedResNeXt) -> EarlyExit:
    """Returns the criterion of one margin for all blocks, or the one that was calibrated for the
    run.

    Raises:
        ValueError: the margin is out of range, or the run has no calibrated ones.
    """
    if margin is not None:
        if not 0 <= margin <= 1:
            raise ValueError(f"--margin: expected a number from 0 to 1, got {margin}")
        return EarlyExit.at_margin(model, margin)
    criterion = companions.early_exit()
    if criterion is None:
        raise ValueError(
            f"--early: expected {companions.folder / EXIT_FILE} for these weights, found none; "
            "`coded-resnext calibrate RUN DATA` makes it, or give --margin"
        )
    return criterion


def classify(
    model: CodedResNeXt, images: Tensor, files: Sequence[str], criterion: EarlyExit | None
) -> list[dict[str, Any]]:
    """Returns a JSON-ready row for every image `[B, C, H, W]`.

    `exit_block` counts coded blocks from 1 and is None when the classifier decided; `path` has the
    A strongest branches of every coded block that was computed; `macs` are the multiply-accumulates
    that were spent. `shown_from` is the coded block from which on each of them, if it was computed,
    shows this class; None where the last one does not.
    """
    images = images.to(next(model.parameters()))
    blocks = len(model.coded_blocks)
    if criterion is not None:
        early = predict_early(model, images, criterion, return_energies=True)
        classes, exits, macs = early.classes, early.exit_blocks.tolist(), early.macs.tolist()
        all_energies: Sequence[Tensor] = early.energies
    else:
        with evaluating(model):
            logits, all_energies = model(images, return_energies=True)
        check_results(model, not_finite(logits, all_energies))
        classes = logits.argmax(1)
        exits = [blocks] * len(images)
        macs = [network_cost(model, images.shape[2]).macs] * len(images)
    shown_from = first_agreeing(model, all_energies, classes)
    rows = []
    for index, file in enumerate(files):
        computed = min(exits[index] + 1, blocks)
        rows.append(
            {
                "file": file,
                "class_name": model.class_names[int(classes[index])],
                "class": int(classes[index]),
                "exit_block": None if exits[index] == blocks else exits[index] + 1,
                "shown_from": shown_from[index],
                "path": [
                    list(strongest(energies[index], book.active))
                    for energies, book in zip(
                        all_energies[:computed], model.codebooks[:computed], strict=True
                    )
                ],
                "macs": macs[index],
            }
        )
    return rows


def first_agreeing(
    model: CodedResNeXt, energies: Sequence[Tensor], classes: Tensor
) -> list[int | None]:
    """Returns the coded block, from 1, from which on every computed block shows a sample's class.

    Args:
        model: with codewords of every block.
        energies: `[B, N]` of every coded block, NaN where a block was not computed.
        classes: of the samples, `[B]`.
    """
    first: list[int | None] = [None] * len(classes)
    # A block that was not computed says nothing, for or against.
    agreeing = torch.ones_like(classes, dtype=torch.bool)
    for number, (values, block) in reversed(
        list(enumerate(zip(energies, model.coded_blocks, strict=True), 1))
    ):
        computed = ~values.isnan().any(1)
        same = read_class(values, block.codewords)[0] == classes
        agreeing &= same | ~computed
        for index in (agreeing & computed).nonzero().flatten().tolist():
            first[index] = number
    return first


def _where(row: dict[str, Any], blocks: int, is_early: bool) -> str:
    """Says where a class was decided and, if that was at the end, where it was to be seen."""
    if row["exit_block"] is not None:
        return f"block {row['exit_block']}/{blocks}"
    if is_early or not blocks:
        return "classifier"
    if row["shown_from"] is None:
        return "classifier alone"
    return f"classifier, shown from block {row['shown_from']}/{blocks} on"


def _table(loaded: LoadedModel, rows: list[dict[str, Any]], criterion: EarlyExit | None) -> str:
    blocks = len(loaded.model.coded_blocks)
    files = [printable(row["file"]) for row in rows]
    names = [printable(row["class_name"]) for row in rows]
    file_width, name_width = max(map(len, files)), max(map(len, names))
    decided = [_where(row, blocks, criterion is not None) for row in rows]
    where_width = max(map(len, decided))
    lines = []
    for file, name, where, row in zip(files, names, decided, rows, strict=True):
        path = " | ".join(" ".join(map(str, branches)) for branches in row["path"])
        lines.append(f"{file:<{file_width}}  {name:<{name_width}}  {where:<{where_width}}  {path}")
    if criterion is not None:
        assert loaded.preprocessing is not None
        whole = network_cost(loaded.model, loaded.preprocessing.size).macs
        share = sum(row["macs"] for row in rows) / len(rows) / whole
        lines.append(f"{len(rows)} images at {share:.1%} of the whole network's MACs")
    return "\n".join(lines)
