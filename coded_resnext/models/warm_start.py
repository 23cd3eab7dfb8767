"""Starting from the weights of a plain ResNeXt: timm's, torchvision's or a plain twin's.

The expand weight is dense in plain and coded blocks alike, so that a plain network's weights fit a
coded one tensor by tensor. What differs is adapted or left fresh, and said:

* the stem's convolution is brought to another number of image channels;
* a head for other classes stays fresh;
* coded blocks normalise branch energies, which changes the scale of what their last BatchNorm sees:
  its statistics are those of another network until `recalibrate_batch_norm`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from coded_resnext.files import load_tensors

from .resnext import CodedResNeXt

# Where training scripts put the weights when they store more than these.
_CONTAINERS = ("state_dict", "model")
_BLOCK_LAYERS = {
    "conv1": "reduce",
    "bn1": "reduce_bn",
    "conv2": "grouped",
    "bn2": "grouped_bn",
    "conv3": "expand",
    "bn3": "expand_bn",
    "downsample.0": "skip.0",
    "downsample.1": "skip.1",
}
_OTHER_LAYERS = {"conv1": "stem.0", "bn1": "stem.1", "fc": "head"}
_BLOCK_NAME = re.compile(rf"layer(\d+)\.(\d+)\.({'|'.join(map(re.escape, _BLOCK_LAYERS))})\.(\w+)$")


@dataclass(frozen=True)
class WarmStart:
    """What became of every tensor of a network that was started from other weights."""

    copied: tuple[str, ...]
    adapted: tuple[str, ...]
    """Brought to another shape: the stem's convolution for other image channels."""
    fresh: tuple[str, ...]
    """Left as they were: a head for other classes."""

    def __str__(self) -> str:
        return (
            f"{len(self.copied)} tensors copied; adapted: {', '.join(self.adapted) or 'none'}; "
            f"fresh: {', '.join(self.fresh) or 'none'}"
        )


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Returns the weights in a safetensors file or a PyTorch checkpoint; nothing in it is executed.

    Args:
        path: a file; in a PyTorch one the weights may lie under `state_dict` or `model`, and the
            settings of a training script beside them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, holds anything but tensors and plain values, or holds no
            weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file with weights, found none")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    try:
        # Scripts store their command line; a namespace is attributes and no code.
        with path.open("rb") as file:
            content = load_tensors(file, [argparse.Namespace])
    except ValueError as error:
        raise ValueError(f"{path}: not a readable checkpoint: {error}") from error
    for name in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(value, Tensor) for value in content.values())
    ):
        raise ValueError(f"{path}: expected weights by name, found none")
    # Wrappers for several devices and for compilation put their names before the network's.
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in content.items()}


def plain_state(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of a plain ResNeXt under our names; those that have them already stay.

    Args:
        state_dict: of timm's or torchvision's `resnext..`, which use the same names
            (`layer1.0.conv1.weight`), or of one of our networks.

    Raises:
        ValueError: a name belongs to no layer that our networks have.
    """
    if any(name.startswith("stages.") for name in state_dict):
        return {k: v for k, v in state_dict.items() if not k.endswith(".codewords")}
    renamed = {}
    for name, value in state_dict.items():
        found = _BLOCK_NAME.match(name)
        layer, _, parameter = name.rpartition(".")
        if found is not None:
            stage, block, layer, parameter = found.groups()
            ours = f"stages.{int(stage) - 1}.{block}.{_BLOCK_LAYERS[layer]}.{parameter}"
        elif layer in _OTHER_LAYERS:
            ours = f"{_OTHER_LAYERS[layer]}.{parameter}"
        else:
            raise ValueError(
                "state_dict: expected the names of a ResNeXt of timm or torchvision "
                f"(layer1.0.conv1.weight, ..), or ours; got {name!r}"
            )
        renamed[ours] = value
    return renamed


@torch.no_grad()
def load_plain_weights(model: CodedResNeXt, state_dict: Mapping[str, Tensor]) -> WarmStart:
    """Start a network, coded or plain, from the weights of a plain ResNeXt, in place.

    Args:
        model: its stages must have the source's depths and sizes. A head bias is copied when both
            have one; where the source alone has one, make the model with `head_bias=True`.
        state_dict: as for `plain_state`.

    Returns:
        What was copied, adapted and left fresh.

    Raises:
        ValueError: names that are missing or too many, or shapes that cannot be adapted; the
            message lists them, and the model is as it was.
    """
    source = plain_state(state_dict)
    target = {k: v for k, v in model.state_dict().items() if not k.endswith(".codewords")}
    head = source.get("head.weight")
    fresh_head = head is not None and head.shape != target["head.weight"].shape
    copied, adapted, fresh, problems = [], [], [], []
    values: dict[str, Tensor] = {}
    for name, value in target.items():
        found = source.get(name)
        if name.startswith("head.") and fresh_head:
            fresh.append(name)
        elif found is None:
            # Files of old versions do not count the batches.
            if not name.endswith("num_batches_tracked"):
                problems.append(f"no {name}")
        elif found.shape == value.shape:
            values[name] = found
            copied.append(name)
        elif name == "stem.0.weight" and found.shape[0::2] == value.shape[0::2]:
            values[name] = _to_channels(found, value.shape[1])
            adapted.append(name)
        else:
            problems.append(f"{name} is {list(found.shape)}, expected {list(value.shape)}")
    unknown = sorted(source.keys() - target.keys() - ({"head.bias"} if fresh_head else set()))
    problems += [f"{name}, which the model has not" for name in unknown]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" * (len(problems) > 8))
        raise ValueError(f"state_dict: does not fit the model: {shown}")
    for name, found in values.items():
        target[name].copy_(found)
    return WarmStart(tuple(copied), tuple(adapted), tuple(fresh))


def _to_channels(weight: Tensor, channels: int) -> Tensor:
    """Returns a first convolution `[C, from, k, k]` for other image channels.

    Grey images count as ones whose channels are equal: the weights are summed. Otherwise channels
    repeat in turn, scaled by the ratio of their numbers, as timm does.
    """
    before = weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, torch.arange(channels) % before] * (before / channels)


@torch.no_grad()
def recalibrate_batch_norm(
    model: CodedResNeXt, batches: Iterable[Tensor | tuple[Tensor, Tensor]]
) -> int:
    """Measure anew, in place, the statistics of the last BatchNorm of every coded block.

    Each gets the mean over the batches of their mean and variance, with all else in evaluation
    mode and no branch dropped.

    Args:
        model: with at least one coded block; it stays in the mode that it is in.
        batches: images `[B, C, H, W]`, alone or with targets. A few hundred images do.

    Returns:
        The number of images.

    Raises:
        ValueError: a network without coded blocks, or no batch.
    """
    norms = [block.expand_bn for block in model.coded_blocks]
    if not norms:
        raise ValueError("model: expected at least one coded block, got a plain network")
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    like = model.head.weight
    images = 0
    model.eval()
    try:
        for batch in batches:
            x = batch if isinstance(batch, Tensor) else batch[0]
            if not images:
                for norm in norms:
                    norm.reset_running_stats()
                    # Without momentum PyTorch averages over all batches alike.
                    norm.momentum = None
                    norm.train()
            model(x.to(like))
            images += len(x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    if not images:
        raise ValueError("batches: expected at least one, got none")
    return images
