"""`coded-resnext models`: the networks, and the weights that come with the package."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from coded_resnext.deploy.hub import from_pretrained
from coded_resnext.files import say
from coded_resnext.models.checkpoint import find_model, network_of, shipped_weights
from coded_resnext.models.registry import create_model, list_models


def run(arguments: argparse.Namespace) -> int:
    """Prints both lists and returns the exit status.

    Raises:
        ValueError: shipped weights are damaged.
    """
    content = {
        "networks": [describe_network(name) for name in list_models()],
        "weights": [describe_weights(name) for name in shipped_weights()],
    }
    say(json.dumps(content, indent=1, allow_nan=False) if arguments.json else tables(content))
    return 0


def describe_network(name: str) -> dict[str, Any]:
    """Returns the sizes of a named network, without making its weights."""
    with torch.device("meta"):
        model = create_model(name)
    return {
        "network": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "classes": model.num_classes,
        "in_channels": model.in_channels,
        "blocks": len(model.blocks),
        "coded_blocks": len(model.coded_blocks),
    }


def describe_weights(name: str) -> dict[str, Any]:
    """Returns what is known about shipped weights, once their checksum and content are checked."""
    pretrained = from_pretrained(name)
    files = [path for path in find_model(name).iterdir() if path.is_file()]
    return {
        "weights": name,
        "network": network_of(name),
        "class_names": list(pretrained.model.class_names),
        "data": pretrained.training.get("data"),
        "epochs": pretrained.training.get("epochs_done"),
        "license": pretrained.license,
        "bytes": sum(path.stat().st_size for path in files),
        "test_accuracy": pretrained.results.get("test_accuracy"),
        "results": dict(pretrained.results),
    }


def tables(content: dict[str, Any]) -> str:
    """Returns both lists as text."""
    lines = [f"{'network':<28} {'parameters':>12} {'classes':>8}  images  coded blocks"]
    for row in content["networks"]:
        images = "grey" if row["in_channels"] == 1 else "RGB"
        coded = f"{row['coded_blocks']} of {row['blocks']}"
        sizes = f"{row['parameters']:>12,} {row['classes']:>8}"
        lines.append(f"{row['network']:<28} {sizes}  {images:<6}  {coded}")
    lines += ["", f"{'weights':<16} {'test accuracy':>13} {'epochs':>7} {'MB':>5}  licence  data"]
    for row in content["weights"]:
        accuracy = row["test_accuracy"]
        lines.append(
            f"{row['weights']:<16} {'not stated' if accuracy is None else f'{accuracy:.2%}':>13} "
            f"{row['epochs'] or '-':>7} {row['bytes'] / 1e6:>5.1f}  {row['license'] or '-':<7}  "
            f"{row['data'] or '-'}"
        )
    return "\n".join(lines)
