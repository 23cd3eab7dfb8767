"""`coded-resnext convert`: published checkpoints and plain ResNeXts into networks of ours.

`coded-resnext pack`: a folder of images into one of smaller JPEGs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from safetensors.torch import save

from coded_resnext.data.image_folder import pack
from coded_resnext.files import as_text, read_json, say, write_atomically
from coded_resnext.models.checkpoint import MODEL_FILE, load_model, save_model
from coded_resnext.models.published import published_model, published_model_state
from coded_resnext.models.registry import create_model
from coded_resnext.models.warm_start import (
    Weights,
    load_plain_weights,
    read_state_dict,
    read_weights,
)


def run(arguments: argparse.Namespace) -> int:
    """Converts, writes, says what became of the weights, and returns the exit status.

    Raises:
        ValueError: a damaged file, one with code in it, or weights that do not fit.
        OSError: a file cannot be read or written.
    """
    if not arguments.network and (arguments.num_classes or arguments.in_channels):
        raise ValueError("--num-classes, --in-channels: expected with --network only")
    out: Path = arguments.out
    if out.suffix != ".safetensors":
        out = out / MODEL_FILE
    if out.exists():
        raise ValueError(f"--out: expected a new file, {out} exists")
    out.parent.mkdir(parents=True, exist_ok=True)
    names = None
    if arguments.classes is not None:
        names = arguments.classes.read_text(encoding="utf-8").split("\n")
        names = [name.strip() for name in names if name.strip()]
    if arguments.publish:
        state = published_model_state(load_model(arguments.source).model)
        write_atomically(out, save({name: value.contiguous() for name, value in state.items()}))
        say(f"wrote {out}: {len(state)} tensors under the published names")
        return 0
    if arguments.architecture is not None:
        try:
            architecture = read_json(arguments.architecture)
        except ValueError as error:
            raise ValueError(f"{arguments.architecture}: not JSON: {error}") from error
        state = read_state_dict(arguments.source)
        model = published_model(state, architecture, class_names=names)
        said = f"{len(model.coded_blocks)} of {len(model.blocks)} blocks are coded"
    else:
        weights = read_weights(arguments.source)
        model = create_model(arguments.network, **_overrides(arguments, weights, names))
        said = str(load_plain_weights(model, weights.state))
    save_model(out, model, training={"converted_from": Path(arguments.source).name})
    say(f"wrote {out}: {said}")
    return 0


def _overrides(
    arguments: argparse.Namespace, weights: Weights, names: list[str] | None
) -> dict[str, Any]:
    """Returns what the network has other than the registry says."""
    biases = ("fc.bias", "head.bias")
    overrides: dict[str, Any] = {"head_bias": any(k in weights.state for k in biases)}
    if weights.codebooks and not arguments.num_classes:
        names = names or list(weights.codebooks[0].class_names)
        # Branches go on working for the classes that they have learnt.
        if arguments.network.startswith("coded_") and (books := weights.codebooks_for(names)):
            overrides["codebooks"] = books
    if arguments.num_classes or names:
        overrides["num_classes"] = arguments.num_classes or len(names or ())
    if names:
        overrides["class_names"] = names
    if arguments.in_channels:
        overrides["in_channels"] = arguments.in_channels
    return overrides


def run_pack(arguments: argparse.Namespace) -> int:
    """Packs a folder for `coded-resnext pack`, and returns the exit status."""
    data = pack(
        Path(arguments.folder),
        Path(arguments.out),
        shorter_side=arguments.shorter_side,
        quality=arguments.quality,
        shard_images=arguments.shard_images,
        workers=arguments.workers,
    )
    say(f"packed: train with --data-dir {as_text(data)}")
    return 0
