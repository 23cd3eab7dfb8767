"""`coded-resnext extract`: classifiers of single classes, cut out of a trained network."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.deploy.cost import network_cost
from coded_resnext.deploy.extract import (
    INDEX_FILE,
    ExtractedClassifier,
    ExtractedNetwork,
    class_index,
    extract_all,
    extract_classifier,
    extract_subset,
    file_name,
    save_extracted,
)
from coded_resnext.files import make_folder, printable, read_json, say
from coded_resnext.interpret.results import Companions
from coded_resnext.models.checkpoint import LoadedModel, load_model
from coded_resnext.models.resnext import CodedResNeXt

FOLDER = "classifiers"


def run(arguments: argparse.Namespace) -> int:
    """Cuts out, writes, says what it costs, and returns the exit status.

    Raises:
        ValueError: no such class, a network without coded blocks, codebooks that differ, or an
            argument outside its range.
        OSError: a file cannot be read or written.
    """
    if arguments.all == bool(arguments.classes):
        raise ValueError("CLASS: expected one or more classes, or --all, and not both")
    if arguments.threshold is not None and (arguments.all or len(arguments.classes) > 1):
        raise ValueError("--threshold: expected with one class only")
    books = [Codebook.load(path) for path in arguments.codebooks or ()]
    loaded = load_model(arguments.checkpoint, codebooks=books or None)
    companions = Companions(arguments.checkpoint, loaded.model)
    thresholds = companions.thresholds()
    options = {"fold_batch_norm": arguments.fold, "skip_rank": arguments.skip_rank}
    if arguments.all:
        folder = arguments.out or make_folder(companions.target, FOLDER)
        content = _extract_all(loaded, folder, thresholds, options)
    else:
        indices = [parse_class(loaded.model, text) for text in arguments.classes]
        part = _extract(loaded.model, indices, arguments.threshold, thresholds, options)
        name = (
            file_name(indices[0], part.class_names[0])
            if len(indices) == 1
            else f"classes-{'-'.join(map(str, indices))}.safetensors"
        )
        path = arguments.out or make_folder(companions.target, FOLDER) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_extracted(path, part, preprocessing=loaded.preprocessing)
        content = describe(loaded, part, path)
    say(json.dumps(content, indent=1, allow_nan=False) if arguments.json else _sentences(content))
    return 0


def parse_class(model: CodedResNeXt, text: str) -> int:
    """Returns the class of a name, or of an index when no class is named so."""
    if text not in model.class_names and text.isdecimal():
        return class_index(model.class_names, int(text))
    return class_index(model.class_names, text)


def describe(loaded: LoadedModel, part: ExtractedNetwork, path: Path) -> dict[str, Any]:
    """Returns what was written, and its cost beside that of the whole network."""
    size = loaded.preprocessing.size if loaded.preprocessing else loaded.model.image_size
    cost, whole = network_cost(part, size), network_cost(loaded.model, size)
    return {
        "file": str(path),
        "class_names": list(part.class_names),
        "threshold": part.threshold if isinstance(part, ExtractedClassifier) else None,
        "image_size": size,
        "cost": cost.to_dict(),
        "share_of_network": cost.relative_to(whole).to_dict(),
    }


def _extract(
    model: CodedResNeXt,
    indices: list[int],
    threshold: float | None,
    thresholds: dict[str, float],
    options: dict[str, Any],
) -> ExtractedNetwork:
    if len(indices) > 1:
        return extract_subset(model, indices, **options)
    if threshold is None:
        threshold = thresholds.get(model.class_names[indices[0]])
    return extract_classifier(model, indices[0], threshold=threshold, **options)


def _extract_all(
    loaded: LoadedModel,
    folder: Path,
    thresholds: dict[str, float],
    options: dict[str, Any],
) -> dict[str, Any]:
    index = extract_all(
        loaded.model,
        folder,
        thresholds={n: t for n, t in thresholds.items() if n in loaded.model.class_names},
        preprocessing=loaded.preprocessing,
        report=_show_progress,
        **options,
    )
    first = extract_classifier(loaded.model, 0, **options)
    content = describe(loaded, first, folder / INDEX_FILE)
    rows = read_json(index)["classifiers"]
    return {**content, "class_names": list(loaded.model.class_names), "classifiers": rows}


def _show_progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == of else ""
        sys.stderr.write(f"\rclassifier {done} of {of}{end}")
        sys.stderr.flush()


def _sentences(content: dict[str, Any]) -> str:
    cost, share = content["cost"], content["share_of_network"]
    several = "classifiers" in content
    with_threshold = [row for row in content.get("classifiers", []) if row["threshold"] is not None]
    lines = [f"wrote {content['file']}"]
    if several:
        lines.append(
            f"{len(content['classifiers'])} classifiers beside it, "
            f"{len(with_threshold)} with a threshold; the first:"
        )
    elif len(content["class_names"]) == 1:
        lines.append(
            f"class {printable(content['class_names'][0])}, "
            + (
                "no threshold (evaluate the run, or give --threshold)"
                if content["threshold"] is None
                else f"threshold {content['threshold']:.4f}"
            )
        )
    lines += [
        f"parameters  {cost['parameters']:>12,}  {share['parameters']:.1%} of the network, "
        f"{share['parameters_without_projections']:.1%} without projection skips",
        f"bytes       {cost['bytes']:>12,}  {share['bytes']:.1%}",
        f"MACs        {cost['macs']:>12,}  {share['macs']:.1%} at {content['image_size']} pixels, "
        f"{share['macs_without_projections']:.1%} without projection skips",
    ]
    return "\n".join(lines)
