"""Cut-out classifiers on disk, one or all of a network, in safetensors with a JSON header."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.files import UNFIT, write_atomically
from coded_resnext.models.checkpoint import (
    check_tensors,
    check_version,
    read_tensors,
    write_tensors,
)
from coded_resnext.models.layers import check_settings
from coded_resnext.models.resnext import CodedResNeXt

from .extract import ExtractedClassifier, ExtractedConfig, ExtractedNetwork, extract_classifier

FORMAT_VERSION = 2
INDEX_VERSION = 1
KIND = "extracted"
INDEX_FILE = "index.json"


@dataclass(frozen=True)
class LoadedExtract:
    """The content of the file of a cut-out network."""

    network: ExtractedNetwork
    """The network in evaluation mode, an `ExtractedClassifier` when it is one of one class."""
    preprocessing: Preprocessing | None
    """How images become its input; None when the file does not say so."""


def save_extracted(
    path: str | Path, network: ExtractedNetwork, *, preprocessing: Preprocessing | None = None
) -> None:
    """Writes a cut-out network; an older file stays until this is complete.

    Args:
        path: the file.
        network: the network, or classifier with its threshold.
        preprocessing: how images become its input.

    Raises:
        ValueError: a layer was taken away, replaced or set otherwise, so that what is read again
            would be another network.
    """
    single = isinstance(network, ExtractedClassifier)
    state = network.state_dict()
    described = _described(network.config, network.class_names, single=single)
    check_settings(network, described, "a file does not say so; fold_batch_norm=True folds it")
    _check_tensors(described, state)
    description = {
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        "config": network.config.to_dict(),
        "class_names": list(network.class_names),
        "single": single,
        "threshold": network.threshold if isinstance(network, ExtractedClassifier) else None,
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
    }
    write_tensors(path, state, description)


def _described(
    config: ExtractedConfig, names: Sequence[str], *, single: bool, threshold: float | None = None
) -> ExtractedNetwork:
    """Returns the network of a description, whose tensors take no memory."""
    with torch.device("meta"):
        if single:
            return ExtractedClassifier(config, names, threshold)
        return ExtractedNetwork(config, names)


def _check_tensors(described: ExtractedNetwork, state: dict[str, Tensor]) -> None:
    check_tensors(described.to(state["head.weight"].dtype).state_dict(), state)


def load_extracted(path: str | Path) -> LoadedExtract:
    """Reads what `save_extracted` wrote; nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, one of another format version, or one of a whole network.
    """
    description, state = read_tensors(path)
    if description.get("kind") != KIND:
        raise ValueError(f"{path}: expected a cut-out classifier, got a whole network")
    check_version(path, description, (1, FORMAT_VERSION))
    if description["format_version"] == 1:
        state = {_name_since_version_2(name): value for name, value in state.items()}
    try:
        config = ExtractedConfig.from_dict(description["config"])
        names = description["class_names"]
        threshold = description["threshold"]
        network = _described(config, names, single=description["single"], threshold=threshold)
        _check_tensors(network, state)
        network.load_state_dict(state, assign=True)
        preprocessing = description["preprocessing"]
        if preprocessing is not None:
            preprocessing = Preprocessing.from_dict(preprocessing)
    except UNFIT as error:
        raise ValueError(f"{path}: damaged or incomplete classifier file: {error}") from error
    return LoadedExtract(network.eval(), preprocessing)


def _name_since_version_2(name: str) -> str:
    """Returns today's name of a tensor of version 1, where a pair of layers was a sequence."""
    match = re.fullmatch(r"(blocks\.\d+\.(?:reduce|grouped|expand))\.([01])\.(\w+)", name)
    if match is None:
        return name
    layer, place, tensor = match.groups()
    return f"{layer}.{tensor}" if place == "0" else f"{layer}_bn.{tensor}"


def file_name(index: int, class_name: str) -> str:
    """Returns the default file name of a classifier: its index and the ASCII part of its name."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", class_name).strip("-").lower()[:40]
    stem = f"class-{index}" if slug in ("", str(index)) else f"class-{index}-{slug}"
    return f"{stem}.safetensors"


def extract_all(
    model: CodedResNeXt,
    folder: str | Path,
    *,
    thresholds: Mapping[str, float | None] | None = None,
    preprocessing: Preprocessing | None = None,
    fold_batch_norm: bool = False,
    skip_rank: float | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Path:
    """Cuts out the classifiers of all classes and writes them to a folder with an index.

    Args:
        model: as for `extract_classifier`.
        folder: made when it does not exist.
        thresholds: of the classes that have one, by name.
        preprocessing: kept with every classifier.
        fold_batch_norm, skip_rank: as for `extract_classifier`.
        report: called after each class with the number done and the number of all.

    Returns:
        The index, a JSON file: class, file, threshold, parameters and bytes of every classifier.

    Raises:
        ValueError: as `extract_classifier`, or a threshold is for an unknown class.
        OSError: the folder cannot be written.
    """
    thresholds = thresholds or {}
    unknown = sorted(set(thresholds) - set(model.class_names))
    if unknown:
        raise ValueError(f"thresholds: expected classes of the model, got {unknown[0]!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for index, name in enumerate(model.class_names):
        classifier = extract_classifier(
            model,
            index,
            threshold=thresholds.get(name),
            fold_batch_norm=fold_batch_norm,
            skip_rank=skip_rank,
        )
        path = folder / file_name(index, name)
        save_extracted(path, classifier, preprocessing=preprocessing)
        rows.append(
            {
                "index": index,
                "class_name": name,
                "file": path.name,
                "threshold": classifier.threshold,
                "parameters": sum(p.numel() for p in classifier.parameters()),
                "bytes": path.stat().st_size,
            }
        )
        if report is not None:
            report(index + 1, model.num_classes)
    content = {"format_version": INDEX_VERSION, "classifiers": rows}
    index_path = folder / INDEX_FILE
    write_atomically(index_path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    return index_path
