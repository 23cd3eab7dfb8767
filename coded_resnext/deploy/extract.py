"""Cutting classifiers out of a coded network: the branches of some classes, and nothing else.

Removing branches by a mask, (10) of docs/math.md, still computes all of them. Here the rows of
reduce, the groups of the 3x3 convolution and the columns of expand that belong to other classes are
gone, as are the classifier's other rows. Stem, plain blocks and skip connections stay.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coded_resnext.kernels.coded.gram import branch_grams
from coded_resnext.kernels.coded.reference import is_dead
from coded_resnext.kernels.layout import accumulation_dtype
from coded_resnext.models.block import CodedBottleneck, check_images
from coded_resnext.models.resnext import CodedResNeXt, Stem
from coded_resnext.models.sizes import BlockSizes


@dataclass(frozen=True)
class ExtractedConfig:
    """The architecture of a network that was cut out."""

    stem: Stem
    stem_channels: int
    in_channels: int
    head_bias: bool
    folded: bool
    """Whether BatchNorm is folded into the convolutions."""
    blocks: tuple[BlockSizes, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ExtractedConfig:
        """Read what `to_dict` wrote."""
        return cls(**{**data, "blocks": tuple(BlockSizes(**block) for block in data["blocks"])})


def convolution(
    in_channels: int,
    channels: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    folded: bool,
) -> nn.Sequential:
    """A convolution with its BatchNorm, or with the bias that is left when that is folded in."""
    conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=folded)
    return nn.Sequential(conv) if folded else nn.Sequential(conv, nn.BatchNorm2d(channels))


class ExtractedBlock(nn.Module):
    """A bottleneck block with the kept branches only; energies are still divided by the whole N.

    Args:
        sizes: of the block, with the branches that are kept.
        folded: BatchNorm is folded into the convolutions. The energies need the expand weights
            without it, so that their `Q_n` of (11), `[A, D, D]`, is stored.
    """

    form: Tensor

    def __init__(self, sizes: BlockSizes, *, folded: bool) -> None:
        super().__init__()
        self.sizes, self.folded = sizes, folded
        wide, channels = sizes.wide, sizes.channels
        self.reduce = convolution(sizes.in_channels, wide, 1, folded=folded)
        self.grouped = convolution(
            wide, wide, 3, stride=sizes.stride, groups=sizes.branches, folded=folded
        )
        self.expand = convolution(wide, channels, 1, folded=folded)
        self.skip: nn.Module = nn.Identity()
        if sizes.has_projection and sizes.skip_rank is not None:
            self.skip = nn.Sequential(
                nn.Conv2d(sizes.in_channels, sizes.skip_rank, 1, bias=False),
                nn.Conv2d(sizes.skip_rank, channels, 1),
            )
        elif sizes.has_projection:
            self.skip = convolution(sizes.in_channels, channels, 1, folded=folded)
        if folded and sizes.is_coded:
            self.register_buffer("form", torch.zeros(sizes.branches, sizes.width, sizes.width))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C_in, H_in, W_in]` to `[B, C, H, W]`."""
        h = F.relu(self.reduce(x), inplace=True)
        h = F.relu(self.grouped(h), inplace=True)
        if self.sizes.is_coded:
            # Autocast would take the energies to half precision.
            if torch.is_autocast_enabled(h.device.type):
                with torch.autocast(h.device.type, enabled=False):
                    h = self._normalize(h)
            else:
                h = self._normalize(h)
        # In place: a further tensor of this size costs as much as a small convolution.
        y = self.expand(h)
        stride = self.sizes.stride
        # A 1x1 convolution with a stride is slower than without one on the pixels that it reads.
        y += self.skip(x if stride == 1 else x[:, :, ::stride, ::stride])
        return F.relu(y, inplace=True)

    def _normalize(self, h: Tensor) -> Tensor:
        """`h / sqrt(M)` by (3) and (11), or 0 for a sample without energy."""
        sizes = self.sizes
        assert sizes.normalized_by is not None
        wide = h.to(accumulation_dtype(h.dtype))
        expand = self.expand[0]
        assert isinstance(expand, nn.Conv2d)
        form = self.form if self.folded else branch_form(expand.weight, sizes.branches)
        energy = branch_grams(wide, sizes.branches).flatten(1) @ form.to(wide.dtype).view(-1, 1)
        count = sizes.channels * h.shape[2] * h.shape[3] * sizes.normalized_by
        # Rounding must not make the sum of squares negative.
        mean = energy.clamp_min(0) / count
        dead = is_dead(mean)
        scale = torch.where(dead, 0.0, torch.where(dead, 1.0, mean).rsqrt())
        return (wide * scale[:, :, None, None]).to(h.dtype)

    def extra_repr(self) -> str:
        of = self.sizes.normalized_by
        return f"branches={self.sizes.branches}" + (f" of {of}" if of else ", plain")


def branch_form(expand_weight: Tensor, branches: int) -> Tensor:
    """`Q_n = W_n^T W_n` of (11): `[C, A*D, 1, 1]` to `[A, D, D]`, in float32 at least."""
    weight = expand_weight.to(accumulation_dtype(expand_weight.dtype))
    per_branch = weight.reshape(weight.shape[0], branches, -1).transpose(0, 1)
    return torch.bmm(per_branch.transpose(1, 2), per_branch)


class ExtractedNetwork(nn.Module):
    """The part of a coded network that works for some classes.

    `extract_subset` makes one. Use it in evaluation mode, in which it is made and loaded.

    Args:
        config: the architecture.
        class_names: the classes, in the order of the logits.

    Raises:
        ValueError: there is no class.
    """

    def __init__(self, config: ExtractedConfig, class_names: Sequence[str]) -> None:
        super().__init__()
        if not class_names:
            raise ValueError("class_names: expected at least one class, got none")
        self.config = config
        self.class_names = tuple(class_names)
        small = config.stem == "conv3x3"
        layers = convolution(
            config.in_channels,
            config.stem_channels,
            3 if small else 7,
            stride=1 if small else 2,
            folded=config.folded,
        )
        layers.append(nn.ReLU(inplace=True))
        if not small:
            layers.append(nn.MaxPool2d(3, 2, 1))
        self.stem = layers
        self.blocks = nn.ModuleList(
            ExtractedBlock(sizes, folded=config.folded) for sizes in config.blocks
        )
        self.head = nn.Linear(
            config.blocks[-1].channels, len(self.class_names), bias=config.head_bias
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, in_channels, H, W]` to the logits `[B, len(class_names)]`.

        Raises:
            ValueError: `x` has the wrong rank or channels, or no samples.
        """
        check_images(x, self.config.in_channels)
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


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

    def __init__(
        self, config: ExtractedConfig, class_names: Sequence[str], threshold: float | None = None
    ) -> None:
        super().__init__(config, class_names)
        if len(self.class_names) != 1:
            raise ValueError(f"class_names: expected one class, got {len(self.class_names)}")
        self.threshold = None if threshold is None else float(threshold)

    @property
    def class_name(self) -> str:
        """The class that is told from all others."""
        return self.class_names[0]

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, in_channels, H, W]` to the logits `[B]` of the class."""
        return super().forward(x)[:, 0]

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Whether the images `[B, in_channels, H, W]` are of the class, booleans `[B]`.

        Raises:
            ValueError: the classifier has no threshold.
        """
        if self.threshold is None:
            raise ValueError(
                "threshold: expected a number, got None; give one to extract_classifier"
            )
        logits: Tensor = self(x)
        return logits >= self.threshold


Network = TypeVar("Network", bound=ExtractedNetwork)


def class_index(class_names: Sequence[str], wanted: int | str) -> int:
    """The index of a class that is given by its name or index.

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
    if not 0 <= wanted < len(class_names):
        raise ValueError(f"class: expected 0 to {len(class_names) - 1}, got {wanted}")
    return int(wanted)


def extract_classifier(
    model: CodedResNeXt,
    class_index_or_name: int | str,
    *,
    threshold: float | None = None,
    fold_batch_norm: bool = False,
    skip_rank: float | None = None,
) -> ExtractedClassifier:
    """Cut out the classifier of one class.

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
            blocks, an ablation (concatenation, no normalisation), or a rank outside its range.
    """
    index = class_index(model.class_names, class_index_or_name)
    config = _config(model, [index], fold_batch_norm, skip_rank)
    # Without storage, since every tensor is about to be filled.
    with torch.device("meta"):
        network = ExtractedClassifier(config, [model.class_names[index]], threshold)
    return _fill(network, model, [index])


def extract_subset(
    model: CodedResNeXt,
    classes: Sequence[int | str],
    *,
    fold_batch_norm: bool = False,
    skip_rank: float | None = None,
) -> ExtractedNetwork:
    """Cut out the network of several classes: it has the branches that work for any of them.

    Its logits are columns of the masked network's, with those unions as the masks. With all classes
    it is the whole network, on which BatchNorm can be folded and skips be thinned likewise.

    Args:
        model: as for `extract_classifier`.
        classes: indices or names, in the order that the logits shall have.
        fold_batch_norm, skip_rank: as for `extract_classifier`.

    Raises:
        ValueError: as `extract_classifier`; also no class, or one twice.
    """
    if isinstance(classes, str):
        raise ValueError(f"classes: expected a sequence of classes, got {classes!r}")
    indices = [class_index(model.class_names, wanted) for wanted in classes]
    if not indices or len(set(indices)) != len(indices):
        raise ValueError(f"classes: expected one or more, each once, got {list(classes)}")
    config = _config(model, indices, fold_batch_norm, skip_rank)
    names = [model.class_names[index] for index in indices]
    with torch.device("meta"):
        network = ExtractedNetwork(config, names)
    return _fill(network, model, indices)


def kept_branches(block: CodedBottleneck, classes: Sequence[int]) -> Tensor:
    """The branches of a block that work for any of the classes, ascending, `[A]`; all if plain."""
    if not block.is_coded:
        return torch.arange(block.branches)
    return block.codewords[list(classes)].any(0).nonzero().flatten().cpu()


def _config(
    model: CodedResNeXt, classes: Sequence[int], folded: bool, skip_rank: float | None
) -> ExtractedConfig:
    """The architecture of what is cut out."""
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
    if skip_rank is not None and not 0 < skip_rank <= 1:
        raise ValueError(f"skip_rank: expected a share 0 < skip_rank <= 1, got {skip_rank}")
    sizes = []
    for block in model.blocks:
        whole = BlockSizes.of(block)
        sizes.append(
            BlockSizes(
                in_channels=whole.in_channels,
                channels=whole.channels,
                width=whole.width,
                branches=len(kept_branches(block, classes)),
                stride=whole.stride,
                normalized_by=whole.normalized_by,
                skip_rank=_rank(whole, skip_rank),
            )
        )
    return ExtractedConfig(
        stem=model.config["stem"],
        stem_channels=model.config["stem_channels"],
        in_channels=model.config["in_channels"],
        head_bias=model.config["head_bias"],
        folded=folded,
        blocks=tuple(sizes),
    )


def _rank(sizes: BlockSizes, share: float | None) -> int | None:
    """The rank of a thinned skip; None where there is none, or where it would not be smaller."""
    if share is None or not sizes.has_projection:
        return None
    rank = max(1, round(share * min(sizes.in_channels, sizes.channels)))
    saves = rank * (sizes.in_channels + sizes.channels) < sizes.in_channels * sizes.channels
    return rank if saves else None


@torch.no_grad()
def _fill(network: Network, model: CodedResNeXt, classes: Sequence[int]) -> Network:
    """Give the network that was cut out the weights of the model."""
    like = model.head.weight
    network.to(like.dtype).to_empty(device=like.device)
    _copy(network.stem, model.stem[0], model.stem[1])
    for target, block in zip(network.blocks, model.blocks, strict=True):
        assert isinstance(target, ExtractedBlock)
        branches = kept_branches(block, classes)
        offsets = torch.arange(block.width)
        kept = (branches[:, None] * block.width + offsets).flatten().to(block.expand.weight.device)
        _copy(target.reduce, block.reduce, block.reduce_bn, rows=kept)
        _copy(target.grouped, block.grouped, block.grouped_bn, rows=kept)
        _copy(target.expand, block.expand, block.expand_bn, columns=kept)
        if target.folded and block.is_coded:
            target.form.copy_(branch_form(block.expand.weight[:, kept], len(branches)))
        if target.sizes.skip_rank is not None:
            _factorise(target.skip, block.skip)
        elif target.sizes.has_projection:
            assert isinstance(block.skip, nn.Sequential)
            _copy(target.skip, block.skip[0], block.skip[1])
    network.head.weight.copy_(model.head.weight[list(classes)])
    if model.head.bias is not None:
        network.head.bias.copy_(model.head.bias[list(classes)])
    return network.eval()


def _copy(
    target: nn.Module,
    conv: nn.Module,
    norm: nn.Module,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> None:
    """Copy a convolution and its BatchNorm, or some rows or columns, folding if the target is."""
    assert isinstance(target, nn.Sequential)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    into = target[0]
    assert isinstance(into, nn.Conv2d)
    every = slice(None)
    out, of = every if rows is None else rows, every if columns is None else columns
    if into.bias is not None:
        weight, bias = fold(conv, norm)
        into.weight.copy_(weight[out][:, of])
        into.bias.copy_(bias[out])
        return
    into.weight.copy_(conv.weight[out][:, of])
    into_norm = target[1]
    assert isinstance(into_norm, nn.BatchNorm2d)
    into_norm.eps, into_norm.momentum = norm.eps, norm.momentum
    for name, value in norm.state_dict().items():
        into_norm.state_dict()[name].copy_(value[out] if value.ndim else value)


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float64, of the convolution that does what both do in evaluation."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    gain = norm.weight.double() / (variance.double() + norm.eps).sqrt()
    weight = conv.weight.double() * gain[:, None, None, None]
    return weight, norm.bias.double() - mean.double() * gain


def _factorise(target: nn.Module, skip: nn.Module) -> None:
    """Fill two thin convolutions with the best approximation of a projection skip.

    Truncating the singular values of the weight with BatchNorm folded in is the best in the sum of
    squared weights for its rank.
    """
    assert isinstance(target, nn.Sequential)
    assert isinstance(skip, nn.Sequential)
    conv, norm = skip[0], skip[1]
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    weight, bias = fold(conv, norm)
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
