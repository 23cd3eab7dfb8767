"""`coded-resnext info`: what a trained network is, and what it and its parts cost."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from coded_resnext.codebooks.files import IN_WORDS
from coded_resnext.deploy.cost import measure_latency, network_cost
from coded_resnext.deploy.early_exit import EarlyExit
from coded_resnext.deploy.extract import extract_classifier, extract_subset
from coded_resnext.files import printable, say
from coded_resnext.interpret.results import Companions
from coded_resnext.models.checkpoint import LoadedModel, load_model

SHOWN_CLASSES = 10


def run(arguments: argparse.Namespace) -> int:
    """Describes a model and returns the exit status.

    Raises:
        ValueError: a damaged file, or an image size that is not positive.
        OSError: a file cannot be read.
    """
    loaded = load_model(arguments.checkpoint)
    criterion = Companions(arguments.checkpoint, loaded.model).early_exit()
    content = describe(loaded, criterion, arguments.image_size, latency=arguments.latency)
    say(json.dumps(content, indent=1, allow_nan=False) if arguments.json else _sentences(content))
    return 0


def describe(
    loaded: LoadedModel, early_exit: EarlyExit | None, image_size: int | None, *, latency: bool
) -> dict[str, Any]:
    """Returns JSON-ready facts about a network and the classifier of its first class.

    Args:
        loaded: the network.
        early_exit: the criterion of the run, if it has one.
        image_size: in pixels; None takes that of the preprocessing.
        latency: measure the time of one image, both networks with BatchNorm folded in.
    """
    model = loaded.model
    if image_size is None:
        image_size = loaded.preprocessing.size if loaded.preprocessing else model.image_size
    whole = network_cost(model, image_size)
    content: dict[str, Any] = {
        "class_names": list(model.class_names),
        "in_channels": model.in_channels,
        "image_size": image_size,
        "stages": model.config["stages"],
        "codebooks": [
            {
                "branches": book.branches,
                "active": book.active,
                "min_distance": book.min_distance,
                "variant": book.variant,
            }
            for book in model.stage_codebooks
        ],
        "training": loaded.training,
        "cost": whole.to_dict(),
        "classifier": None,
        "early_exit": None if early_exit is None else early_exit.to_dict(),
    }
    if model.coded_blocks and model.config["aggregation"] == "sum":
        part = extract_classifier(model, 0)
        cost = network_cost(part, image_size)
        content["classifier"] = {
            "cost": cost.to_dict(),
            "share_of_network": cost.relative_to(whole).to_dict(),
        }
        if latency:
            folded = extract_subset(model, model.class_names, fold_batch_norm=True)
            one = extract_classifier(model, 0, fold_batch_norm=True)
            images = torch.randn(1, model.in_channels, image_size, image_size)
            images = images.to(model.head.weight)
            content["latency_ms"] = {
                "network": 1000 * measure_latency(folded, images),
                "classifier": 1000 * measure_latency(one, images),
            }
    return content


def _sentences(content: dict[str, Any]) -> str:
    names, cost = content["class_names"], content["cost"]
    shown = ", ".join(map(printable, names[:SHOWN_CLASSES]))
    shown += ", .." if len(names) > SHOWN_CLASSES else ""
    lines = [f"{len(names)} classes: {shown}"]
    books = iter(content["codebooks"])
    for number, stage in enumerate(content["stages"], 1):
        active, branches = stage["active"], stage["branches"]
        coded = "plain"
        if active < branches:
            words = IN_WORDS[next(books)["variant"]]
            coded = f"{active} of {branches} branches a class, {words}"
        lines.append(
            f"stage {number}: {stage['depth']} blocks, {stage['channels']} channels, "
            f"{branches} branches of width {stage['width']}, {coded}"
        )
    size = content["image_size"]
    lines += [
        f"parameters  {cost['parameters']:>14,}  in {cost['bytes']:,} bytes",
        f"MACs        {cost['macs']:>14,}  for one image of {size}x{size} pixels",
    ]
    if content["classifier"] is not None:
        part, share = content["classifier"]["cost"], content["classifier"]["share_of_network"]
        lines += [
            "the classifier of one class, by all tensors / without projection skips:",
            f"parameters  {part['parameters']:>14,}  {share['parameters']:.1%} / "
            f"{share['parameters_without_projections']:.1%}",
            f"MACs        {part['macs']:>14,}  {share['macs']:.1%} / "
            f"{share['macs_without_projections']:.1%}",
        ]
    else:
        lines.append("no classifiers can be cut out of this network")
    if "latency_ms" in content:
        times = content["latency_ms"]
        lines.append(
            f"one image, BatchNorm folded: network {times['network']:.2f} ms, "
            f"classifier {times['classifier']:.2f} ms"
        )
    if content["early_exit"] is not None:
        margins = ", ".join(
            "none" if margin is None else f"{margin:.3f}"
            for margin in content["early_exit"]["margins"]
        )
        lines.append(f"early exit at margins {margins}")
    return "\n".join(lines)
