"""The coded bottleneck block and what it is made of.

Letters as in docs/math.md: B samples, N branches of width D, C output channels, H x W maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.kernels import Aggregation, Backend, coded_aggregate, select_backend
from coded_resnext.kernels.checks import (
    check_integers,
    check_kind,
    checked_mask,
    checked_number,
    typed,
)
from coded_resnext.kernels.coded.functional import normalized_branches
from coded_resnext.kernels.coded.reference import aggregate_outputs
from coded_resnext.kernels.layout import accumulation_dtype
from coded_resnext.models.fused.block import fused_block, is_fused
from coded_resnext.models.fused.step import Map, like, ready
from coded_resnext.models.layers import applied_weight, is_seen_by_calls, unusual_layer

# A symbolic trace has these as one node each, since they ask for shapes.
for _function in (
    *("check_images", "coded_aggregate", "draw_mask", "normalized_branches"),
    "apart_from_batch_norm",
):
    fx.wrap(_function)


class DropSubNNs(nn.Module):
    """Draws the DropSubNNs mask (5): a branch is silenced with probability `p` in training.

    Args:
        p: probability, `0 <= p < 1`.
        shared: whether a network hands one mask to consecutive blocks of a codebook; False is an
            ablation.

    Raises:
        ValueError: `p` is outside that range.
    """

    def __init__(self, p: float = 0.1, *, shared: bool = True) -> None:
        super().__init__()
        if not 0 <= checked_number("drop_branches", p) < 1:
            raise ValueError(f"drop_branches: expected a probability 0 <= p < 1, got {p}")
        self.p, self.shared = float(p), shared

    def forward(self, batch: int, branches: int, like: Tensor) -> Tensor | None:
        """Draws a mask `[batch, branches]` of 0 and `1 / (1 - p)`; None where nothing is dropped.

        The mask is drawn on the device of `like` from PyTorch's default generator, in float32, or
        in float64 when `like` is.
        """
        if not self.training or self.p == 0:
            return None
        return draw_mask(batch, branches, self.p, like)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class EnergyRecord:
    """Takes up the energies of a block, which itself returns its map alone.

    It is no list or dict, since wrappers of modules copy those on the way.
    """

    energies: Tensor | None = None
    """Of the branches, `[B, N]`; None for a plain block."""


class CodedBottleneck(nn.Module):
    """A ResNeXt bottleneck block whose branches may be assigned to classes by a codebook.

    `reduce` 1x1, `grouped` 3x3 with one group per branch, `expand` 1x1, each with BatchNorm, and a
    skip connection. With a codebook the branch outputs are normalised by their energy before they
    are summed, (2)-(6); without one ("ratio one") this is the plain ResNeXt block. The expand
    weight is dense in both, `[C, N*D, 1, 1]`, so that the parameters are the same.

    Args:
        in_channels: channels of the input.
        channels: channels `C` of the output.
        width: channels `D` of one branch.
        branches: number of branches `N`.
        codebook: assignment of the branches to classes, or None for the plain block.
        stride: of the 3x3 convolution and the skip connection.
        drop_branches: DropSubNNs probability `0 <= p < 1`; only coded blocks drop branches.
        share_masks: as `shared` of `DropSubNNs`.
        aggregation: `"sum"`, or `"concat"`, the ablation of the paper's talk; a plain block sums.
        normalize: whether energies are normalised, (3)-(4); without it, an ablation, the branches
            are summed as they are and the block's energies are those of (2).
        normalized_by: for a block that was cut out of a coded one (deploy/extract.py) and has only
            some of its branches, but no codebook: the number `N` of branches of the whole block, by
            which the mean energy (3) is still divided.
        backend: implementation of the coded operation, see `coded_resnext.kernels`.

    Raises:
        ValueError: a size is not positive, the codebook has another number of branches,
            `channels` is not divisible by the branches that are to be concatenated, or
            `normalized_by` does not fit.

    Attributes:
        energies: of a coded block, an identity that its energies `[B, N]` go through, for hooks.
        normalized_by: the number of branches that the mean energy is over; None for a plain block.
        codewords: of the codebook, `[K, N]` in booleans, on the device of the weights. They are a
            constant and no buffer, so that neither averaging nor `to_empty` touches them; the state
            dict has them all the same, and loading compares them.
        form: None, or `Q_n [N, D, D]` of (11) in a block whose last BatchNorm is folded into its
            convolution, which then no longer tells the energies.
    """

    codewords: Tensor
    form: Tensor | None

    @typed
    def __init__(
        self,
        in_channels: int,
        channels: int,
        width: int,
        branches: int,
        codebook: Codebook | None = None,
        *,
        stride: int = 1,
        drop_branches: float = 0.0,
        share_masks: bool = True,
        aggregation: Aggregation = "sum",
        normalize: bool = True,
        normalized_by: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        sizes = {
            "in_channels": in_channels,
            "channels": channels,
            "width": width,
            "branches": branches,
            "stride": stride,
        }
        check_integers(**sizes)
        check_kind("codebook", codebook, (Codebook, type(None)), "a Codebook or None")
        if codebook is not None and codebook.branches != branches:
            raise ValueError(
                f"codebook: expected {branches} branches as in the block, got {codebook.branches}"
            )
        if aggregation not in ("sum", "concat"):
            raise ValueError(f"aggregation: expected 'sum' or 'concat', got {aggregation!r}")
        concatenate = codebook is not None and aggregation == "concat"
        if concatenate and channels % branches:
            raise ValueError(
                f"channels: expected a multiple of {branches} branches to concatenate, "
                f"got {channels}"
            )
        if normalized_by is not None:
            check_integers(normalized_by=normalized_by)
        if normalized_by is not None and (codebook is not None or normalized_by < branches):
            raise ValueError(
                f"normalized_by: expected at least {branches} branches and no codebook, "
                f"got {normalized_by}"
            )
        select_backend(backend)
        self.in_channels, self.branches, self.stride = in_channels, branches, stride
        self.width, self.channels = width, channels
        self.codebook = codebook
        self.aggregation: Aggregation = aggregation
        self.normalize = normalize
        self.normalized_by = normalized_by if codebook is None else branches
        self.backend: Backend = backend

        wide = branches * width
        self.reduce = nn.Conv2d(in_channels, wide, 1, bias=False)
        self.reduce_bn = nn.BatchNorm2d(wide)
        self.grouped = nn.Conv2d(wide, wide, 3, stride, 1, groups=branches, bias=False)
        self.grouped_bn = nn.BatchNorm2d(wide)
        self.expand = nn.Conv2d(
            wide, channels, 1, groups=branches if concatenate else 1, bias=False
        )
        self.expand_bn = nn.BatchNorm2d(channels)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.skip = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        p = drop_branches if codebook is not None else 0.0
        self.drop = DropSubNNs(p, shared=share_masks)
        if codebook is not None:
            self.codewords = codebook.codewords
        if self.is_coded:
            self.energies = nn.Identity()
        self.register_buffer("form", None)
        self.reset_parameters()

    @property
    def is_coded(self) -> bool:
        """Returns whether energies normalise the outputs, by a codebook or in a cut-out block."""
        return self.normalized_by is not None

    def reset_parameters(self) -> None:
        """Draws every convolution, Kaiming normal by fan-out; the last BatchNorm starts at zero.

        PyTorch's fan-out does not divide by the groups. The expand convolution of a coded block
        counts as the grouped one that it is, with N*C outputs.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                module.reset_parameters()
        if self.is_coded and self.aggregation == "sum":
            outputs = self.branches * self.expand.out_channels
            nn.init.normal_(self.expand.weight, std=math.sqrt(2 / outputs))
        nn.init.zeros_(self.expand_bn.weight)

    def draw_drop_mask(self, x: Tensor) -> Tensor | None:
        """Draws a DropSubNNs mask `[B, N]` for these samples; None where nothing is dropped."""
        mask: Tensor | None = self.drop(x.shape[0], self.branches, x)
        return mask

    def forward(
        self,
        x: Tensor,
        *,
        drop_mask: Tensor | None = None,
        keep_mask: Tensor | None = None,
        record: EnergyRecord | None = None,
    ) -> Tensor:
        """Applies the block.

        Args:
            x: `[B, C_in, H_in, W_in]`.
            drop_mask: DropSubNNs mask `[B, N]`, (5), as `draw_drop_mask` makes it. None lets the
                block draw its own in training; a model hands one to all blocks of a codebook.
            keep_mask: `[B, N]` of 0/1: branches to keep, (10).
            record: is given the normalised energies `[B, N]` of a coded block.

        Returns:
            `y [B, C, H, W]`.

        Raises:
            ValueError: `x` has the wrong rank or channels, or no samples; a mask has the wrong
                shape, or is given to a plain block.
        """
        check_images(x, self.in_channels)
        if not self.is_coded and (drop_mask is not None or keep_mask is not None):
            name = "drop_mask" if keep_mask is None else "keep_mask"
            raise ValueError(f"{name}: expected None, since this block has no codebook")
        if self.is_coded and drop_mask is None:
            drop_mask = self.draw_drop_mask(x)
        check_kind("record", record, (EnergyRecord, type(None)), "an EnergyRecord, or None")
        record = record or EnergyRecord()
        if is_fused(self, x):
            return ready(self.fused(x, drop_mask, keep_mask, record))
        h = activated(self.reduce_bn, self.reduce(x))
        h = activated(self.grouped_bn, self.grouped(h))
        if self.is_coded:
            y, energies = self._aggregate(h, drop_mask, keep_mask)
            record.energies = self.energies(energies)
        else:
            y = self.expand(h)
        y, residual = self.expand_bn(y), self.skip(x)
        # In place in networks for inference only, where BatchNorm is folded in: another tensor of
        # this size costs as much as a small convolution.
        y = y.add_(residual) if isinstance(self.expand_bn, nn.Identity) else y + residual
        return F.relu(y, inplace=True)

    def fused(
        self, x: Map, drop_mask: Tensor | None, keep_mask: Tensor | None, record: EnergyRecord
    ) -> Map:
        """Returns the block's output as the fused data flow leaves it; arguments as `forward`'s."""
        y, energies = fused_block(self, x, drop_mask=drop_mask, keep_mask=keep_mask)
        if energies is not None:
            record.energies = self.energies(energies)
        return y

    def _aggregate(
        self, h: Tensor, drop_mask: Tensor | None, keep_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.form is None and isinstance(self.expand_bn, nn.Identity):
            raise ValueError(
                "expand_bn: expected BatchNorm, got Identity; folded into `expand` it changes the "
                "energies, which extract_subset(model, classes, fold_batch_norm=True) keeps"
            )
        if is_seen_by_calls(self.expand):
            return self._aggregate_by_calls(h, drop_mask, keep_mask)
        concatenate = self.aggregation == "concat"
        # Parametrizations that change with every use give one weight to energies and convolution.
        with parametrize.cached() if parametrize.is_parametrized(self.expand) else nullcontext():
            groups = self.branches if concatenate else 1
            weight = applied_weight(self.expand, h.shape[1], groups, h)
            whole = self.normalize and self.normalized_by == self.branches and self.form is None
            if whole and select_backend(self.backend) == "reference":
                return coded_aggregate(
                    h,
                    weight,
                    self.branches,
                    drop_mask=drop_mask,
                    keep_mask=keep_mask,
                    aggregation=self.aggregation,
                    backend="reference",
                )
            scaled, energies = normalized_branches(
                h,
                weight,
                self.branches,
                drop_mask=drop_mask,
                keep_mask=keep_mask,
                aggregation=self.aggregation,
                backend=self.backend,
                branches_of_whole=self.normalized_by,
                normalize=self.normalize,
                form=self.form,
            )
            return apart_from_batch_norm(self.expand(scaled)), energies

    def _aggregate_by_calls(
        self, h: Tensor, drop_mask: Tensor | None, keep_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Follows the definition, on branch outputs of one call of `expand`.

        Raises:
            ValueError: an ablation or a cut-out block, to which the definition does not apply.
        """
        if not self.normalize or self.normalized_by != self.branches or self.form is not None:
            raise ValueError(
                "expand: expected a whole block of normalised energies where gradients of single "
                "samples are taken by hooks; torch.func.vmap takes them of every block"
            )
        concatenate, per_branch = self.aggregation == "concat", (self.branches, -1)
        if concatenate:
            outputs = torch.unflatten(self.expand(h), 1, per_branch)
        else:
            # The branches below one another, each with zeros in the channels of the others.
            own = torch.eye(self.branches, dtype=h.dtype, device=h.device)[:, None, :, None, None]
            stacked = torch.unflatten(h, 1, per_branch)[:, :, :, None] * own
            outputs = self.expand(stacked.flatten(1, 2).flatten(2, 3))
            outputs = torch.unflatten(outputs, 2, per_branch).transpose(1, 2)
        accumulate = accumulation_dtype(h.dtype)
        drop_mask = checked_mask("drop_mask", drop_mask, h, self.branches, accumulate)
        keep_mask = checked_mask("keep_mask", keep_mask, h, self.branches, accumulate)
        return aggregate_outputs(outputs, drop_mask, keep_mask, concatenate=concatenate)

    def unusual_layer(self, *, sizes_only: bool = False) -> str | None:
        """Returns which layer is not as it was made, and how; see models/layers.py."""
        if type(self).forward is not CodedBottleneck.forward:
            return f"forward: {type(self).__name__} has one of its own"
        return unusual_layer(self, sizes_only=sizes_only)

    def assign(self, codebook: Codebook) -> None:
        """Assigns the branches by another codebook of as many branches; weights stay."""
        self.codebook = codebook
        self._set_codewords()

    def _set_codewords(self) -> None:
        """Takes the codewords from the codebook to where the weights are; never to `meta`."""
        device = next(self.parameters()).device
        if self.codebook is not None:
            words = self.codebook.codewords
            self.codewords = words if device.type == "meta" else words.to(device)

    def check_codewords(self, state_dict: dict[str, Any], prefix: str = "") -> None:
        """Raises ValueError where a state dict has other codewords for this block than its own."""
        key = f"{prefix}codewords"
        stored = state_dict.get(key)
        if self.codebook is None or stored is None or stored.is_meta:
            return
        own = self.codebook.codewords
        if stored.shape != own.shape or not bool((stored.cpu() == own).all()):
            raise ValueError(
                f"{key}: the weights were trained for other codewords than this model has; "
                "build the model with the codebook of its checkpoint"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodedBottleneck:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._set_codewords()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.codebook is not None:
            destination[f"{prefix}codewords"] = self.codewords

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuses weights that were trained for other codewords."""
        self.check_codewords(state_dict, prefix)
        key = f"{prefix}codewords"
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.codebook is not None:
            unexpected_keys[:] = [name for name in unexpected_keys if name != key]
            if strict and key not in state_dict:
                missing_keys.append(key)
        self._set_codewords()

    def extra_repr(self) -> str:
        if self.codebook is not None:
            return f"branches={self.branches}, active={self.codebook.active}"
        whole = self.normalized_by
        return f"branches={self.branches}" + (f" of {whole}" if whole else ", plain")


def draw_mask(batch: int, branches: int, p: float, like: Tensor) -> Tensor:
    """Returns a mask `[batch, branches]` of 0, with probability `p`, and `1 / (1 - p)`."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    keep = torch.full((batch, branches), 1 - p, dtype=dtype, device=like.device)
    return torch.bernoulli(keep) / (1 - p)


def apart_from_batch_norm(y: Tensor) -> Tensor:
    """Returns `y`; in a symbolic trace this keeps tools from folding the BatchNorm behind it.

    They would fold it into the weight that the energies are taken of.
    """
    return y


def activated(norm: nn.Module, x: Tensor) -> Tensor:
    """Returns `relu(norm(x))`, in place where nobody else may have taken the norm's output."""
    watched = norm._forward_hooks or norm._backward_hooks or norm._backward_pre_hooks
    return F.relu(norm(x), inplace=not watched)


def check_images(x: Tensor, channels: int) -> None:
    """Refuses what is not a batch of maps `[B, channels, H, W]`."""
    check_kind("x", x, Tensor, f"a tensor [B, {channels}, H, W]")
    if x.ndim != 4 or x.shape[1] != channels or x.shape[0] == 0:
        raise ValueError(f"x: expected [B, {channels}, H, W] with B >= 1, got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x: expected floating-point numbers, as preprocessed, got {x.dtype}")


def apply_block(
    block: CodedBottleneck,
    x: Map,
    *,
    drop_mask: Tensor | None = None,
    keep_mask: Tensor | None = None,
) -> tuple[Map, Tensor | None]:
    """Applies a block, fused with the next where its backend says so.

    Args:
        block: what to apply.
        x: `[B, C_in, H_in, W_in]`, or what the block before has left to be computed.
        drop_mask, keep_mask: as for the block, which draws none here.

    Returns:
        `y [B, C, H, W]`, perhaps still to be computed, and the energies.
    """
    record = EnergyRecord()
    if is_fused(block, like(x)):
        return block.fused(x, drop_mask, keep_mask, record), record.energies
    y = block(ready(x), drop_mask=drop_mask, keep_mask=keep_mask, record=record)
    return y, record.energies


@dataclass
class Step:
    """The state of a walk behind one block. The next block goes on from `map`."""

    block: CodedBottleneck
    handed_over: Map
    """The block's output, which in the fused data flow the next block computes on the way."""
    energies: Tensor | None
    """Of the branches, `[B, N]`; None for a plain block."""

    @property
    def map(self) -> Tensor:
        """Returns the block's output `[B, C, H, W]`, computed when it is read.

        Setting it replaces what the next block goes on from, for instance by fewer samples.
        """
        self.handed_over = ready(self.handed_over)
        return self.handed_over

    @map.setter
    def map(self, value: Tensor) -> None:
        self.handed_over = value


def walk(
    blocks: Sequence[CodedBottleneck], x: Tensor, keep_masks: Sequence[Tensor | None] | None = None
) -> Iterator[Step]:
    """Applies blocks one after another and yields a `Step` behind each.

    Consecutive coded blocks of one codebook silence the same branches in training, (5), also where
    plain blocks lie between them.

    Args:
        blocks: the blocks, first to last.
        x: the input of the first, `[B, C_in, H, W]`.
        keep_masks: branches to keep, (10), `[B, N]` or None for every coded block; None keeps all.
    """
    masks: Iterator[Tensor | None] = iter(
        [None] * len(blocks) if keep_masks is None else keep_masks
    )
    drop_mask: Tensor | None = None
    codebook: Codebook | None = None
    handed_over: Map = x
    for block in blocks:
        arguments: dict[str, Tensor | None] = {}
        if block.is_coded:
            if codebook is None or block.codebook is not codebook or not block.drop.shared:
                drop_mask = block.draw_drop_mask(like(handed_over))
            arguments = {"drop_mask": drop_mask, "keep_mask": next(masks)}
            codebook = block.codebook
        step = Step(block, *apply_block(block, handed_over, **arguments))
        yield step
        handed_over = step.handed_over


def features(
    blocks: Sequence[CodedBottleneck], x: Tensor, keep_masks: Sequence[Tensor | None] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Returns the map at the end of a walk, `x` itself without blocks, and all its energies."""
    last: Step | None = None
    all_energies: list[Tensor] = []
    for last in walk(blocks, x, keep_masks):
        if last.energies is not None:
            all_energies.append(last.energies)
    return (x if last is None else last.map), all_energies


def classify(head: nn.Module, x: Tensor) -> Tensor:
    """Returns the logits `[B, K]` of a classifier for the map behind the last block."""
    logits: Tensor = head(x.mean((2, 3)))
    return logits
