"""Accuracy of a network and of its early decoders, over one process or several."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from coded_resnext.kernels.checks import check_targets
from coded_resnext.models.loss import check_results, decode, not_finite
from coded_resnext.models.resnext import CodedResNeXt

from .processes import World

# Of the mean energy of a sample's branches, which is 1: what is less is nothing but rounding.
DEAD_SHARE = 1e-12
EvaluationLoader = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Accuracy:
    """Shares of correct predictions, 0..1."""

    final: float
    early: tuple[float, ...]
    """Accuracy of early decoding (9) for every coded block, 0..1."""
    balanced: float
    """Mean over the classes of the share of their samples that are classified correctly."""
    samples: int
    """Number of samples predicted, over all processes."""
    dead_branches: tuple[tuple[int, ...], ...] = ()
    """Of every coded block, the branches without energy for any of the samples."""

    def row(self, prefix: str = "") -> dict[str, float]:
        """Returns the numbers by the names under which they are logged."""
        early = {f"{prefix}early_decoding_{i}": a for i, a in enumerate(self.early, 1)}
        accuracies = {"test_accuracy": self.final, "test_balanced_accuracy": self.balanced}
        return {f"{prefix}{name}": value for name, value in accuracies.items()} | early


def measure_accuracy(
    model: CodedResNeXt, loader: EvaluationLoader, *, world: World | None = None
) -> Accuracy:
    """Measures the accuracy of the classifier and of every early decoder, in evaluation mode.

    Args:
        model: the network; its mode is left as it was.
        loader: batches `(images, targets)`. With several processes each gives its own samples;
            one may have fewer than another, or none.
        world: the processes that share the samples. All must call this.

    Raises:
        ValueError: no process has samples, targets are no classes of the network, or results are
            not finite.
    """
    accuracy, _ = measure_until_stopped(model, loader, world or World())
    return accuracy


@torch.inference_mode()
def measure_until_stopped(
    model: CodedResNeXt, loader: EvaluationLoader, world: World
) -> tuple[Accuracy, int]:
    """As `measure_accuracy`, and the signal that has ended it before all samples were seen, or 0.

    A process leaves its samples when a signal reaches it; the others finish theirs.
    """
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    codewords = [book.codewords.to(device) for book in model.codebooks]
    largest = [torch.zeros(book.branches, device=device) for book in model.codebooks]
    # The last entry counts the samples.
    counts = torch.zeros(2 + len(codewords), dtype=torch.int64, device=device)
    # Of every class the samples, and those that are classified correctly.
    by_class = torch.zeros(2, model.num_classes, dtype=torch.int64, device=device)
    bad = torch.zeros(1 + len(codewords), dtype=torch.bool, device=device)
    try:
        for images, targets in loader:
            check_targets(targets, len(images), model.num_classes)
            logits, energies = model(images.to(device), return_energies=True)
            bad |= not_finite(logits, energies)
            for most, values in zip(largest, energies, strict=True):
                torch.maximum(most, values.amax(0).to(most), out=most)
            early = [
                decode(e, words, check_values=False)
                for e, words in zip(energies, codewords, strict=True)
            ]
            targets = targets.to(device)
            correct = torch.stack([logits.argmax(1), *early]) == targets
            by_class[0].index_add_(0, targets, torch.ones_like(targets))
            by_class[1].index_add_(0, targets, correct[0].long())
            counts[:-1] += correct.sum(1)
            counts[-1] += len(targets)
            if world.signals.received:
                break
    finally:
        for module, training in modes:
            module.training = training
    check_results(model, world.maximum(bad.int()).bool())
    stop = int(world.maximum(torch.tensor(world.signals.received)))
    *correct_counts, samples = world.add(counts).tolist()
    if samples == 0:
        raise ValueError("loader: expected at least one sample, got none")
    final, *shares = (count / samples for count in correct_counts)
    dead = [
        tuple((world.maximum(most) <= DEAD_SHARE).nonzero().flatten().tolist()) for most in largest
    ]
    per_class, hits = world.add(by_class).double()
    balanced = float((hits / per_class)[per_class > 0].mean())
    return Accuracy(final, tuple(shares), balanced, samples, tuple(dead)), stop
