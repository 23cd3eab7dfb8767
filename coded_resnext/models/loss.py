"""The training loss of a coded network, (8) of docs/math.md, and early decoding, (9).

Early decoding reads the class off the branch energies of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.kernels import Backend, coding_losses, select_backend
from coded_resnext.kernels.checks import (
    check_class_weight,
    check_finite,
    check_items,
    check_kind,
    check_targets,
    checked_number,
    is_no_class,
    typed,
)
from coded_resnext.kernels.layout import accumulation_dtype
from coded_resnext.kernels.loss.reference import class_scores

from .resnext import CodedResNeXt


class LossTerms(NamedTuple):
    """The total loss and what it is made of, all scalars."""

    total: Tensor
    """`cross_entropy + weight * sum of coding`; call `backward` on this one."""
    cross_entropy: Tensor
    coding: tuple[Tensor, ...]
    """The coding loss (7) of every coded block, unweighted, in the order of the network."""

    def named(self) -> dict[str, Tensor]:
        """Returns every term by the name under which it is logged; blocks count from 1."""
        blocks = {f"coding_{index}": term for index, term in enumerate(self.coding, 1)}
        return {"total": self.total, "cross_entropy": self.cross_entropy, **blocks}


@contextmanager
def masked_gradients(model: CodedResNeXt, targets: Tensor) -> Iterator[None]:
    """Lets only the branches of an image's class learn from it, where a network is applied within.

    This is the paper's other way to specialise branches, which needs no coding loss: behind the
    normalisation, the gradient of a branch's output is zero unless the branch works for the class.

    Args:
        model: whose layers are as they were made.
        targets: class indices `[B]` of the images that it is applied to.

    Raises:
        ValueError: a block is computed by the definition, which calls no layer.
    """

    def learn(words: Tensor, layer: nn.Module, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        (scaled,) = inputs
        mask = words.repeat_interleave(scaled.shape[1] // words.shape[1], 1)[:, :, None, None]
        # Of one value: what the branches of the class wrote passes the gradient on, the rest not.
        active: Any = layer.forward(scaled * mask)
        learned: Tensor = active + (y - active).detach()
        return learned

    hooks = []
    for block in model.coded_blocks:
        if select_backend(block.backend) == "reference":
            raise ValueError(
                "backend: expected one that calls the layers of a block, to mask gradients; got "
                "'reference'"
            )
        words = block.codewords[targets]
        hooks.append(block.expand.register_forward_hook(partial(learn, words)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class CodedLoss(nn.Module):
    """Cross-entropy plus the weighted coding losses of all coded blocks, (8).

    Args:
        codebooks: the codebook of every coded block, as in `model.codebooks`; empty for a plain
            network, whose loss is the cross-entropy alone.
        weight: `mu >= 0`; 6 for CIFAR and 1 for ImageNet in the paper.
        exponent: `q >= 1` of (7).
        threshold: `t >= 0` of (7).
        label_smoothing: of the cross-entropy only, `0 <= s < 1`.
        class_weight: weights of the classes `[K]`, as `weight` of `nn.CrossEntropyLoss`; both terms
            obey it.
        ignore_index: the class index of samples without a label, which both terms leave out.
        check_values: refuse numbers on the CPU that are not finite. Without it they go into the
            loss, where the training engine finds them.
        backend: implementation of the coding losses, see `coded_resnext.kernels`.

    Raises:
        ValueError: a number is outside its range, or the codebooks differ in their classes.
    """

    class_weight: Tensor | None

    @typed
    def __init__(
        self,
        codebooks: Sequence[Codebook],
        *,
        weight: float = 6.0,
        exponent: float = 4.0,
        threshold: float = 0.0,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        check_values: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        for name, value, low in (
            ("weight", weight, 0.0),
            ("exponent", exponent, 1.0),
            ("threshold", threshold, 0.0),
        ):
            checked_number(name, value, low)
        if not 0 <= checked_number("label_smoothing", label_smoothing) < 1:
            raise ValueError(f"label_smoothing: expected 0 <= s < 1, got {label_smoothing}")
        check_items("codebooks", codebooks, Codebook)
        select_backend(backend)
        for index, codebook in enumerate(codebooks):
            if codebook.class_names != codebooks[0].class_names:
                raise ValueError(
                    f"codebooks: block {index} and block 0 differ in their classes or class order"
                )
        self.weight, self.exponent, self.threshold = weight, exponent, threshold
        if class_weight is not None:
            check_kind("class_weight", class_weight, (Tensor, Sequence, np.ndarray), "numbers [K]")
            try:
                class_weight = torch.as_tensor(class_weight)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"class_weight: expected numbers [K]: {error}") from error
            classes = codebooks[0].classes if codebooks else class_weight.numel()
            check_class_weight(class_weight, classes)
        self.ignore_index = ignore_index
        self.label_smoothing, self.check_values = label_smoothing, check_values
        self.backend: Backend = backend
        self.blocks = len(codebooks)
        self.register_buffer("class_weight", class_weight, persistent=False)
        for index, codebook in enumerate(codebooks):
            self.register_buffer(f"codewords_{index}", codebook.codewords, persistent=False)

    def codewords(self) -> list[Tensor]:
        """Returns the codewords `[K, N]` of every coded block, on the device of the loss."""
        return [self.get_buffer(f"codewords_{index}") for index in range(self.blocks)]

    def forward(self, logits: Tensor, energies: Sequence[Tensor], targets: Tensor) -> LossTerms:
        """Returns the loss of a batch.

        Args:
            logits: `[B, K]`, unnormalised.
            energies: normalised energies `[B, N]` of every coded block.
            targets: class indices `[B]`, or class probabilities `[B, K]` (MixUp, CutMix), for
                which the codeword in (7) is the probability-weighted mean of the codewords.

        Raises:
            ValueError: shapes that do not fit; on CPU tensors also classes out of range and
                numbers that are not finite. Values on other devices, and under `torch.compile`, are
                not read: a class out of range makes both terms NaN.
        """
        check_kind("logits", logits, Tensor, "a tensor [B, K]")
        check_items("energies", energies, Tensor)
        if logits.ndim != 2 or logits.shape[0] == 0:
            raise ValueError(f"logits: expected [B, K] with B >= 1, got {list(logits.shape)}")
        if len(energies) != self.blocks:
            raise ValueError(
                f"energies: expected one tensor for each of {self.blocks} coded blocks, "
                f"got {len(energies)}"
            )
        labelled = check_targets(targets, len(logits), logits.shape[1], self.ignore_index)
        check_class_weight(self.class_weight, logits.shape[1])
        if self.check_values:
            check_finite("logits", logits)
        cross_entropy = self._cross_entropy(logits, targets, labelled)
        coding = coding_losses(
            energies,
            self.codewords(),
            targets,
            exponent=self.exponent,
            threshold=self.threshold,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            check_values=self.check_values,
            backend=self.backend,
        ).losses
        total = cross_entropy
        if coding:
            total = total + self.weight * torch.stack(coding).sum()
        return LossTerms(total, cross_entropy, coding)

    def _cross_entropy(self, logits: Tensor, targets: Tensor, labelled: bool) -> Tensor:
        """Returns the mean over the batch; NaN for a class out of range that nobody has read.

        Args:
            logits: `[B, K]`.
            targets: `[B]` or `[B, K]`.
            labelled: whether all targets are known to be classes, or probabilities.
        """
        logits = logits.to(accumulation_dtype(logits.dtype))
        poison = None
        if targets.ndim == 1:
            targets = targets.long()
        if not labelled:
            # PyTorch ends the process on a GPU for an index outside, and under `torch.compile`
            # reads what lies there.
            outside = is_no_class(targets, logits.shape[1]) & (targets != self.ignore_index)
            targets = targets.masked_fill(outside, self.ignore_index)
            poison = torch.where(outside.any(), torch.nan, 1.0)
        cross_entropy = F.cross_entropy(
            logits,
            targets,
            weight=None if self.class_weight is None else self.class_weight.to(logits.dtype),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )
        return cross_entropy if poison is None else cross_entropy * poison

    def extra_repr(self) -> str:
        return (
            f"blocks={self.blocks}, weight={self.weight}, exponent={self.exponent}, "
            f"threshold={self.threshold}, label_smoothing={self.label_smoothing}, "
            f"class_weight={self.class_weight is not None}, ignore_index={self.ignore_index}"
        )


def decode(energies: Tensor, codebook: Codebook | Tensor, *, check_values: bool = True) -> Tensor:
    """Returns the class whose codeword is nearest to the energies.

    Args:
        energies: `[B, N]`, normalised or not: only their proportions matter.
        codebook: the codebook of the block, or its codewords `[K, N]`.
        check_values: refuse energies on the CPU that are not finite.

    Returns:
        Class indices `[B]`. Ties go to the lowest index; a sample without any energy ties between
        all classes.

    Raises:
        ValueError: the energies are not `[B, N]` with the codebook's N, or on the CPU not finite.
    """
    check_kind("energies", energies, Tensor, "a tensor [B, N]")
    check_kind("codebook", codebook, (Codebook, Tensor), "a Codebook or a tensor [K, N]")
    check_kind("check_values", check_values, bool, "True or False")
    codewords = codebook.codewords if isinstance(codebook, Codebook) else codebook
    if energies.ndim != 2 or energies.shape[1] != codewords.shape[1]:
        raise ValueError(
            f"energies: expected [B, {codewords.shape[1]}], got {list(energies.shape)}"
        )
    if check_values:
        check_finite("energies", energies)
    return read_class(energies, codewords.to(energies.device))[0]


def read_class(energies: Tensor, codewords: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what early decoding, (9), says, and its margin.

    Args:
        energies: normalised, `[B, N]`.
        codewords: `[K, N]`, `K >= 2`.

    Returns:
        Class indices `[B]`, the lowest on ties, and margins `[B]` from 0 to 1: the share of a
        sample's energy in the branches of the nearest codeword, less that of the second.
    """
    scores = class_scores(energies, codewords)
    best = scores.topk(2).values
    return scores.argmax(1), (best[:, 0] - best[:, 1]) / energies.shape[1]


def not_finite(logits: Tensor, energies: Sequence[Tensor]) -> Tensor:
    """Returns whether the energies of each coded block, then the logits, hold NaN or infinity.

    Args:
        logits: `[B, K]`.
        energies: of every coded block, `[B, N]`.

    Returns:
        Booleans `[blocks + 1]`, on the device of the logits.
    """
    return torch.stack([~values.isfinite().all() for values in (*energies, logits)])


def check_results(model: nn.Module, bad: Tensor) -> None:
    """Refuses results that hold NaN or infinity, of which `argmax` would still make a class.

    Args:
        model: the network, whose first tensor that is not finite is named.
        bad: from `not_finite`; the host waits for it.

    Raises:
        ValueError: something is not finite; the message names the first of the network.
    """
    flags = bad.tolist()
    if not any(flags):
        return
    first = flags.index(True)
    source = "logits" if first == len(flags) - 1 else f"energies of coded block {first + 1}"
    tensors = [
        name
        for name, value in model.state_dict().items()
        # A quantised layer has other things in its state.
        if isinstance(value, Tensor) and not bool(value.isfinite().all())
    ]
    cause = f"{tensors[0]} of the network is not" if tensors else "the network's tensors are"
    raise ValueError(
        f"model: expected finite results, got NaN or infinity in the {source}; {cause}"
    )
