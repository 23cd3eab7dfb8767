"""Cutting classifiers out of a coded network: the branches of some classes, and nothing else.

Removing branches by a mask, (10) of docs/math.md, still computes all of them. Here the rows of
reduce, the groups of the 3x3 convolution and the columns of expand that belong to other classes are
gone, as are the classifier's other rows. Stem, plain blocks and skip connections stay.

On disk a cut-out network is a safetensors file with a JSON header.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.files import UNFIT, write_atomically
from coded_resnext.kernels.checks import check_kind, checked_number, typed
from coded_resnext.kernels.coded.gram import branch_forms, split_weight
from coded_resnext.kernels.layout import accumulation_dtype
from coded_resnext.models.block import CodedBottleneck, check_images, classify, features
from coded_resnext.models.checkpoint import (
    check_tensors,
    check_version,
    read_tensors,
    write_tensors,
)
from coded_resnext.models.fused.norm import fold
from coded_resnext.models.layers import PixelPicker, check_layers, check_settings
from coded_resnext.models.loss import check_results, not_finite
from coded_resnext.models.resnext import CodedResNeXt, Stem, make_stem, own_network

from .cost import BlockSizes

fx.wrap("check_images")
FORMAT_VERSION = 2
INDEX_VERSION = 1
KIND = "extracted"
INDEX_FILE = "index.json"


@dataclass(frozen=True)
class ExtractedConfig:
    """The architecture of a network that was cut out."""

    stem: Stem
    stem_channels: int
    in_channels: int
    head_bias: bool
    folded: bool
    """Says whether BatchNorm is folded into the convolutions."""
    blocks: tuple[BlockSizes, ...]
    image_size: int | None = None
    """Height and width, in pixels, of the images of the network that it was cut out of."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the architecture as JSON-ready data, which `from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ExtractedConfig:
        """Reads what `to_dict` returned."""
        return cls(**{**data, "blocks": tuple(BlockSizes(**block) for block in data["blocks"])})


def make_block(sizes: BlockSizes) -> CodedBottleneck:
    """Makes a block of these sizes, with fresh weights: it has the kept branches only.

    Its energies are still divided by the branches of the whole block.
    """
    block = CodedBottleneck(
        sizes.in_channels,
        sizes.channels,
        sizes.width,
        sizes.branches,
        stride=sizes.stride,
        normalized_by=sizes.normalized_by,
        backend="torch",
    )
    rank, stride = sizes.skip_rank, sizes.stride
    if rank or stride > 1:
        first = PixelPicker(sizes.in_channels, rank or sizes.channels, 1, stride, bias=False)
        second = nn.BatchNorm2d(sizes.channels)
        block.skip = nn.Sequential(first, nn.Conv2d(rank, sizes.channels, 1) if rank else second)
    return block


class ExtractedNetwork(nn.Module):
    """The part of a coded network that works for some classes.

    `extract_subset` makes one. Use it in evaluation mode, in which it is made and loaded.

    Args:
        config: the architecture.
        class_names: the classes, in the order of the logits.

    Raises:
        ValueError: there is no class.
    """

    @typed
    def __init__(self, config: ExtractedConfig, class_names: Sequence[str]) -> None:
        super().__init__()
        if not class_names:
            raise ValueError("class_names: expected at least one class, got none")
        self.config = config
        self.class_names = tuple(class_names)
        self.stem = make_stem(config.stem, config.in_channels, config.stem_channels)
        self.blocks = nn.ModuleList(make_block(sizes) for sizes in config.blocks)
        self.head = nn.Linear(
            config.blocks[-1].channels, len(self.class_names), bias=config.head_bias
        )
        if config.folded:
            _fold_batch_norm(self)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images `[B, in_channels, H, W]` to the logits `[B, len(class_names)]`.

        Raises:
            ValueError: `x` has the wrong rank or channels, or no samples.
        """
        check_images(x, self.config.in_channels)
        blocks: Any = list(self.blocks)
        return classify(self.head, features(blocks, self.stem(x))[0])


class ExtractedClassifier(ExtractedNetwork):
    """The part of a coded network that works for one class: it says yes or no.

    `extract_classifier` makes one.

    Args:
        config: the architecture.
        class_names: the one class.
        threshold: logits of at least this say yes; None when none was chosen.

    Raises:
        ValueError: there is not exactly one class.
    """

    @typed
    def __init__(
        self, config: ExtractedConfig, class_names: Sequence[str], threshold: float | None = None
    ) -> None:
        super().__init__(config, class_names)
        if len(self.class_names) != 1:
            raise ValueError(f"class_names: expected one class, got {len(self.class_names)}")
        self.threshold = None if threshold is None else checked_number("threshold", threshold)

    @property
    def class_name(self) -> str:
        """Returns the class that is told from all others."""
        return self.class_names[0]

    def forward(self, x: Tensor) -> Tensor:
        """Maps images `[B, in_channels, H, W]` to the logits `[B]` of the class."""
        return super().forward(x)[:, 0]

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Returns whether the images `[B, in_channels, H, W]` are of the class, booleans `[B]`.

        Raises:
            ValueError: the classifier has no threshold, or results are not finite.
        """
        if self.threshold is None:
            raise ValueError(
                "threshold: expected a number, got None; give one to extract_classifier"
            )
        logits: Tensor = self(x)
        check_results(self, not_finite(logits, ()))
        return logits >= self.threshold


Extracted = TypeVar("Extracted", bound=ExtractedNetwork)


def class_index(class_names: Sequence[str], wanted: int | str) -> int:
    """Returns the index of a class that is given by its name or index.

    Raises:
        ValueError: there is no such class; the message has the names that come nearest.
    """
    if isinstance(wanted, str):
        if wanted in class_names:
            return list(class_names).index(wanted)
        # Case is the commonest slip, and counts as a difference otherwise.
        lower = {name.lower(): name for name in class_names}
        near = [lower[name] for name in difflib.get_close_matches(wanted.lower(), lower)]
        hint = f"the nearest: {', '.join(near)}" if near else "none comes near"
        raise ValueError(
            f"class: expected one of the {len(class_names)} classes of the model, "
            f"got {wanted!r}; {hint}"
        )
    check_kind("class", wanted, Integral, "a name or a whole number")
    if not 0 <= wanted < len(class_names):
        raise ValueError(f"class: expected 0 to {len(class_names) - 1}, got {wanted}")
    return int(wanted)


@typed
def extract_classifier(
    model: nn.Module,
    class_index_or_name: int | str,
    *,
    threshold: float | None = None,
    fold_batch_norm: bool = False,
    skip_rank: float | None = None,
) -> ExtractedClassifier:
    """Cuts out the classifier of one class.

    Its logit is `model(x, keep=c)[:, c]` of the network in evaluation mode: energies are divided by
    the mean over the N branches of the whole block, (3). The weights are copies.

    Args:
        model: with at least one coded block, whose branches are summed.
        class_index_or_name: the class.
        threshold: logits of at least this say yes in `predict`.
        fold_batch_norm: fold every BatchNorm into its convolution: faster, for inference only.
        skip_rank: beyond the paper: replace every projection skip by two thin convolutions, its
            best approximation of this share of the full rank, `0 < skip_rank <= 1`, wherever that
            is smaller. The logit is then approximate.

    Returns:
        In evaluation mode, on the device and in the dtype of the model.

    Raises:
        ValueError: no such class (the nearest names are in the message), a network without coded
            blocks, an ablation (concatenation, no normalisation), layers that were changed or
            replaced, or a rank outside its range.
    """
    model = own_network(model)
    index = class_index(model.class_names, class_index_or_name)
    config = _config(model, [index], skip_rank)
    # Without storage, since every tensor is about to be filled.
    with torch.device("meta"):
        network = ExtractedClassifier(config, [model.class_names[index]], threshold)
    return _fill(network, model, [index], fold_batch_norm)


@typed
def extract_subset(
    model: nn.Module,
    classes: Sequence[int | str],
    *,
    fold_batch_norm: bool = False,
    skip_rank: float | None = None,
) -> ExtractedNetwork:
    """Cuts out the network of several classes: it has the branches that work for any of them.

    Its logits are columns of the masked network's, with those unions as the masks. With all classes
    it is the whole network, on which BatchNorm can be folded and skips be thinned likewise.

    Args:
        model: as for `extract_classifier`.
        classes: indices or names, in the order that the logits shall have.
        fold_batch_norm: as for `extract_classifier`.
        skip_rank: as for `extract_classifier`.

    Raises:
        ValueError: as `extract_classifier`; also no class, or one twice.
    """
    if isinstance(classes, str):
        raise ValueError(f"classes: expected a sequence of classes, got {classes!r}")
    model = own_network(model)
    indices = [class_index(model.class_names, wanted) for wanted in classes]
    if not indices or len(set(indices)) != len(indices):
        raise ValueError(f"classes: expected one or more, each once, got {list(classes)}")
    config = _config(model, indices, skip_rank)
    names = [model.class_names[index] for index in indices]
    with torch.device("meta"):
        network = ExtractedNetwork(config, names)
    return _fill(network, model, indices, fold_batch_norm)


def kept_branches(block: CodedBottleneck, classes: Sequence[int]) -> Tensor:
    """Returns the branches that work for any of the classes, ascending, `[A]`; all if plain."""
    if not block.is_coded:
        return torch.arange(block.branches)
    return block.codewords[list(classes)].any(0).nonzero().flatten().cpu()


def _config(
    model: CodedResNeXt, classes: Sequence[int], skip_rank: float | None
) -> ExtractedConfig:
    """Returns the architecture of what is cut out, before BatchNorm is folded."""
    if not all(block.normalize for block in model.coded_blocks):
        raise ValueError("model: expected one with energy normalisation, got the ablation without")
    if not model.coded_blocks:
        raise ValueError(
            "model: expected at least one coded block, got a plain network (ratio one), "
            "in which every branch works for every class"
        )
    if model.config["aggregation"] != "sum":
        raise ValueError(
            "model: expected a network that sums its branches, got one that concatenates them"
        )
    check_layers(model, "cutting out copies the weights of its own layers")
    if skip_rank is not None and not 0 < checked_number("skip_rank", skip_rank) <= 1:
        raise ValueError(f"skip_rank: expected a share 0 < skip_rank <= 1, got {skip_rank}")
    sizes = []
    for block in model.blocks:
        whole = BlockSizes.of(block)
        branches = len(kept_branches(block, classes))
        sizes.append(replace(whole, branches=branches, skip_rank=_rank(whole, skip_rank)))
    return ExtractedConfig(
        stem=model.config["stem"],
        stem_channels=model.config["stem_channels"],
        in_channels=model.config["in_channels"],
        head_bias=model.config["head_bias"],
        folded=False,
        blocks=tuple(sizes),
        image_size=model.image_size,
    )


def _rank(sizes: BlockSizes, share: float | None) -> int | None:
    """Returns the rank of a thinned skip; None where it would not be smaller, or there is none."""
    if share is None or not sizes.has_projection:
        return None
    rank = max(1, round(share * min(sizes.in_channels, sizes.channels)))
    saves = rank * (sizes.in_channels + sizes.channels) < sizes.in_channels * sizes.channels
    return rank if saves else None


@torch.no_grad()
def _fill(
    network: Extracted, model: CodedResNeXt, classes: Sequence[int], fold_batch_norm: bool
) -> Extracted:
    """Gives the network that was cut out the weights of the model."""
    like = model.head.weight
    network.to(like.dtype).to_empty(device=like.device)
    _load(network.stem, model.stem, model.stem.state_dict())
    for target, block in zip(network.blocks, model.blocks, strict=True):
        assert isinstance(target, CodedBottleneck)
        _load(target, block, _sliced(block, kept_branches(block, classes)))
        if BlockSizes.of(target).skip_rank is not None:
            _factorise(target.skip, block.skip)
    network.head.weight.copy_(model.head.weight[list(classes)])
    if model.head.bias is not None:
        network.head.bias.copy_(model.head.bias[list(classes)])
    if fold_batch_norm:
        _fold_batch_norm(network)
    return network.eval()


def _sliced(block: CodedBottleneck, branches: Tensor) -> dict[str, Tensor]:
    """Returns the state of a block with the channels of these branches alone."""
    channels = branches[:, None] * block.width + torch.arange(block.width)
    kept = channels.flatten().to(block.expand.weight.device)
    state = {}
    for name, value in block.state_dict().items():
        layer = name.split(".")[0]
        if layer in ("reduce", "reduce_bn", "grouped", "grouped_bn") and value.ndim:
            value = value[kept]
        elif layer == "expand":
            value = value[:, kept]
        if layer != "codewords":
            state[name] = value
    return state


def _load(target: nn.Module, source: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies a state and the settings of BatchNorm layers; a thinned skip is left as it is."""
    thinned = isinstance(target, CodedBottleneck) and BlockSizes.of(target).skip_rank is not None
    if thinned:
        state = {name: value for name, value in state.items() if not name.startswith("skip.")}
    own = target.state_dict()
    check_tensors(
        {name: value for name, value in own.items() if name in state or not thinned}, state
    )
    target.load_state_dict(state, strict=not thinned)
    for name, layer in target.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            other: Any = source.get_submodule(name)
            layer.eps, layer.momentum = other.eps, other.momentum


@torch.no_grad()
def _fold_batch_norm(network: ExtractedNetwork) -> None:
    """Folds every BatchNorm into its convolution, in place."""
    network.config = replace(network.config, folded=True)
    _fold_first(network.stem)
    for block in network.blocks:
        assert isinstance(block, CodedBottleneck)
        if block.is_coded:
            weight = split_weight(block.expand.weight, block.branches, concatenate=False)
            form = branch_forms(weight, accumulation_dtype(weight.dtype))
            block.form = form.to(weight.dtype)
        for name in ("reduce", "grouped", "expand"):
            conv, norm = getattr(block, name), getattr(block, f"{name}_bn")
            setattr(block, name, _folded(conv, norm))
            setattr(block, f"{name}_bn", nn.Identity())
        if isinstance(block.skip, nn.Sequential):
            _fold_first(block.skip)


def _fold_first(layers: nn.Sequential) -> None:
    """Folds the BatchNorm that follows the first convolution, if one does."""
    if isinstance(layers[1], nn.BatchNorm2d):
        layers[0] = _folded(layers[0], layers[1])
        del layers[1]


def _folded(conv: Any, norm: Any) -> nn.Conv2d:
    """Returns a convolution that does what both do in evaluation; its weights are rounded once."""
    both: nn.Conv2d = copy.deepcopy(conv)
    weight, bias = fold(conv, norm, torch.float64)
    both.weight = nn.Parameter(weight.to(conv.weight.dtype))
    both.bias = nn.Parameter(bias.to(conv.weight.dtype))
    return both


def _factorise(target: nn.Module, skip: Any) -> None:
    """Fills two thin convolutions with the best approximation of a projection skip.

    Truncating the singular values of the weight with BatchNorm folded in is the best in the sum of
    squared weights for its rank.
    """
    assert isinstance(target, nn.Sequential)
    conv, norm = skip[0], skip[1]
    weight, bias = fold(conv, norm, torch.float64)
    first, second = target[0], target[1]
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    left, values, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    rank = first.out_channels
    root = values[:rank].sqrt()
    first.weight.copy_((root[:, None] * right[:rank])[:, :, None, None])
    second.weight.copy_((left[:, :rank] * root)[:, :, None, None])
    assert second.bias is not None
    second.bias.copy_(bias)


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
    layer, number, tensor = match.groups()
    return f"{layer}.{tensor}" if number == "0" else f"{layer}_bn.{tensor}"


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
