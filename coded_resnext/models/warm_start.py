"""Weights of any origin: the file of one of our networks, or a plain ResNeXt's to start from.

A file says itself what it is: its name decides nothing. The expand weight is dense in plain and
coded blocks alike, so that a plain network's weights fit a coded one tensor by tensor. What differs
is adapted or left fresh, and said:

* the stem's convolution is brought to another number of image channels;
* a head for other classes stays fresh;
* coded blocks normalise branch energies, which changes the scale of what their last BatchNorm sees:
  its statistics are those of another network until `recalibrate_batch_norm`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.files import load_tensors
from coded_resnext.kernels.checks import typed

from .checkpoint import check_codebooks, find_model, is_model_file, load_model
from .resnext import CodedResNeXt, own_network

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
# The first layer's weight in our networks, and in timm's and torchvision's.
_FIRST = ("stem.0.weight", "conv1.weight")
_CODEWORDS_NAME = re.compile(r"stages\.(\d+)\.\d+\.codewords$")
_BLOCK_NAME = re.compile(rf"layer(\d+)\.(\d+)\.({'|'.join(map(re.escape, _BLOCK_LAYERS))})\.(\w+)$")


@dataclass(frozen=True)
class WarmStart:
    """What became of every tensor of a network that was started from other weights."""

    copied: tuple[str, ...]
    adapted: tuple[str, ...]
    """Brought to another shape: the stem's convolution for other image channels."""
    fresh: tuple[str, ...]
    """Left as they were: a head for other classes, and codewords that are not the weights' own."""

    def __str__(self) -> str:
        return (
            f"{len(self.copied)} tensors copied; adapted: {', '.join(self.adapted) or 'none'}; "
            f"fresh: {', '.join(self.fresh) or 'none'}"
        )


class Weights(NamedTuple):
    """The weights in a file, and what it says of them."""

    state: dict[str, Tensor]
    codebooks: tuple[Codebook, ...]
    """Of the coded stages for which the weights were trained; none for a plain network."""
    class_names: tuple[str, ...] | None
    """In their order; None where the file has no names."""

    def codebooks_for(self, class_names: Sequence[str]) -> tuple[Codebook, ...]:
        """Returns the codebooks under these names of the classes; none if these are others."""
        fits = self.class_names in (None, tuple(class_names))
        if not fits or any(book.classes != len(class_names) for book in self.codebooks):
            return ()
        return tuple(book.with_class_names(class_names) for book in self.codebooks)


def read_weights(path: str | Path) -> Weights:
    """Returns the weights in a model file, or in one of `read_state_dict`.

    Args:
        path: a file, the folder of a run that has a model file, or a name of shipped weights.

    Raises:
        FileNotFoundError, ValueError: as `load_model` and `read_state_dict`.
    """
    path = find_model(path)
    if path.is_dir() or is_model_file(path):
        model = load_model(path).model
        return Weights(model.state_dict(), tuple(model.stage_codebooks), model.class_names)
    state = read_state_dict(path)
    books: dict[int, Codebook] = {}
    for name, value in state.items():
        if block := _CODEWORDS_NAME.match(name):
            try:
                book = Codebook(value)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}: {name}: not the codewords of a block: {error}"
                ) from error
            if books.setdefault(int(block[1]), book) != book:
                raise ValueError(f"{path}: {name}: expected the codewords of its stage, got others")
    return Weights(state, tuple(books[stage] for stage in sorted(books)), None)


@typed
def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads the weights in a file into a network that they fit whole, in place.

    Args:
        model: the network, or a wrapper around it. Where it has class names of its own, they are
            those of the weights; where they are `"0" .. "K-1"`, nobody has named them.
        path: as for `read_weights`: a model file of `save_model`, or a state dict in safetensors or
            a PyTorch checkpoint, bare or under `state_dict` or `model`, with `module.`, `net.`,
            `_orig_mod.` and the like in front of the names or not. A plain network's weights have
            no codewords: a coded network then keeps its own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one with code in it; weights for other classes or codewords;
            tensors that are missing, too many or of another shape, which the message lists. The
            network is as it was.
    """
    network, weights = own_network(model), read_weights(path)
    unnamed = tuple(map(str, range(network.num_classes)))
    names = weights.class_names or unnamed
    if names != network.class_names and unnamed not in (names, network.class_names):
        raise ValueError(
            f"{path}: expected weights for the classes {', '.join(network.class_names[:5])}, .., "
            f"got {', '.join(names[:5])}, .."
        )
    try:
        if weights.codebooks and network.stage_codebooks:
            own = [Codebook(book.codewords) for book in network.stage_codebooks]
            check_codebooks([Codebook(book.codewords) for book in weights.codebooks], own)
        load_plain_weights(network, weights.state, adapt=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


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
    with path.open("rb") as file:
        # The length of the header in eight bytes, and JSON: neither a pickle nor an archive.
        is_safetensors = file.read(9)[4:] == b"\0\0\0\0{"
    if is_safetensors or path.suffix == ".safetensors":
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
    # Compiled blocks have a name within, averaging adds a count, and wrappers and training modules
    # put one before all names.
    state = {k.replace("_orig_mod.", ""): v for k, v in content.items() if k != "n_averaged"}
    ends = [k.removesuffix(f) for k in state for f in _FIRST if f".{k}".endswith(f".{f}")]
    before = min(ends, key=len, default="")
    within = all(name.startswith(before) for name in state)
    return {k.removeprefix(before): v for k, v in state.items()} if within else state


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
        of_block = _BLOCK_NAME.match(name)
        layer, _, parameter = name.rpartition(".")
        if of_block is not None:
            stage, block, layer, parameter = of_block.groups()
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
def load_plain_weights(
    model: CodedResNeXt, state_dict: Mapping[str, Tensor], *, adapt: bool = True
) -> WarmStart:
    """Starts a network, coded or plain, from the weights of a plain ResNeXt, in place.

    Args:
        model: its stages must have the source's depths and sizes. A head bias is copied when both
            have one; where the source alone has one, make the model with `head_bias=True`.
        state_dict: as for `plain_state`.
        adapt: bring the stem to other image channels, and leave a head for other classes and
            codewords for others fresh; False refuses these too.

    Returns:
        What was copied, adapted and left fresh.

    Raises:
        ValueError: names that are missing or too many, or shapes that cannot be adapted; the
            message lists them, and the model is as it was.
    """
    source = plain_state(state_dict)
    target = {k: v for k, v in model.state_dict().items() if not k.endswith(".codewords")}
    head = source.get("head.weight")
    fresh_head = adapt and head is not None and head.shape != target["head.weight"].shape
    copied, adapted, fresh, problems = [], [], [], []
    values: dict[str, Tensor] = {}
    for name, value in target.items():
        given = source.get(name)
        if name.startswith("head.") and fresh_head:
            fresh.append(name)
        elif given is None:
            # Files of old versions do not count the batches.
            if not name.endswith("num_batches_tracked"):
                problems.append(f"no {name}")
        elif given.shape == value.shape:
            values[name] = given
            copied.append(name)
        elif adapt and name == "stem.0.weight" and _fits_but_for_channels(given, value):
            values[name] = _to_channels(given, value.shape[1])
            adapted.append(name)
        else:
            problems.append(f"{name} is {list(given.shape)}, expected {list(value.shape)}")
    unknown = sorted(source.keys() - target.keys() - ({"head.bias"} if fresh_head else set()))
    problems += [f"{name}, which the model has not" for name in unknown]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" * (len(problems) > 8))
        raise ValueError(f"state_dict: does not fit the model: {shown}")
    for name, given in values.items():
        target[name].copy_(given)
    own = {k: v for k, v in model.state_dict().items() if k.endswith(".codewords")}
    fresh += [k for k in own if k in state_dict and not _equal(own[k], state_dict[k])]
    return WarmStart(tuple(copied), tuple(adapted), tuple(fresh))


def _equal(own: Tensor, other: Tensor) -> bool:
    return own.shape == other.shape and bool((own.cpu() == other.cpu()).all())


def _fits_but_for_channels(weight: Tensor, expected: Tensor) -> bool:
    """Returns whether a first convolution is the expected one but for its image channels."""
    if weight.ndim != 4 or weight.shape[1] == 0:
        return False
    return weight[:, :1].shape == expected[:, :1].shape


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
    """Measures anew, in place, the statistics of the last BatchNorm of every coded block.

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
