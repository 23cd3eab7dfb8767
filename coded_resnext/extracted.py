"""A network that was cut out of a coded one: it holds the branches of some classes and no others.

Letters as in docs/math.md: B samples, N branches of the whole block, A of them kept, of width D,
C output channels, H x W maps of P pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels.gram import branch_grams
from .kernels.reference import accumulation_dtype, is_dead
from .layers import check_images
from .models import Stem
from .sizes import BlockSizes


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
