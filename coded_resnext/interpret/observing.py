"""What a network does with every image of a loader: one pass, from which experiments are computed.

Letters as in docs/math.md: n samples, K classes, N branches, A of them active for each class.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codebook import Codebook
from ..decode import decode
from ..kernels.reference import is_dead
from ..models import CodedResNeXt
from .budget import Budget
from .gathering import Found, Gathered, gather
from .running import Loader, evaluating

# Of a limited time, for this pass; what it leaves is for the experiments that need more passes.
TIME_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class Observations:
    """Predictions and energies of n images; all tensors are on the CPU."""

    class_names: tuple[str, ...]
    codebooks: tuple[Codebook, ...]
    """Of every coded block; none for a plain network."""
    gathered: Gathered
    """The pass itself: targets, places in the loader, features."""
    predictions: Tensor
    """Classes that the network says, `[n]`."""
    confidences: Tensor
    """Softmax probability of each, `[n]`."""
    energies: tuple[Tensor, ...]
    """Normalised energies, (4), of every coded block, `[n, N]`."""
    decoded: tuple[Tensor, ...]
    """Early decoding, (9), of every coded block, `[n]`."""
    probabilities: Tensor
    """Mean softmax probabilities by true class, `[K, K]` in float64; NaN rows without images."""

    @property
    def targets(self) -> Tensor:
        """True classes, `[n]`."""
        return self.gathered.targets

    @property
    def samples(self) -> int:
        """The number of images, n."""
        return len(self.predictions)

    @property
    def accuracy(self) -> float:
        """Share of the images that the network classifies correctly."""
        return int((self.predictions == self.targets).sum()) / self.samples


def observe(
    model: CodedResNeXt,
    loader: Loader,
    *,
    budget: Budget | None = None,
    seed: int = 0,
    looked_at: float | None = None,
) -> Observations:
    """Run a network on every image once.

    Args:
        model: coded or plain; its mode is left as found.
        loader: batches of images `[B, C, H, W]` and class indices `[B]`.
        budget: under a limit, a seeded subset of the images is run when all would take more than
            half of the time that remains.
        seed: of that subset.
        looked_at: share of the images to run, in place of what the time suffices for.

    Raises:
        ValueError: the loader has no batch, or targets are not class indices of the model.
    """
    names = [f"energies_{index}" for index in range(len(model.coded_blocks))]
    with evaluating(model), _first_coded_input(model) as seen:

        def compute(images: Tensor) -> tuple[Tensor | None, Found]:
            seen.clear()
            logits, energies = model(images, return_energies=True)
            accurate = torch.float64 if logits.dtype == torch.float64 else torch.float32
            found = {"logits": logits.to(accurate), **dict(zip(names, energies, strict=True))}
            return (seen[0] if seen else None), found

        gathered = gather(
            model,
            loader,
            "test images",
            compute,
            budget=budget,
            share=TIME_SHARE,
            seed=seed,
            looked_at=looked_at,
        )
    found = gathered.found
    likely = found["logits"].softmax(1)
    energies = tuple(
        found[name] if block.normalize else _normalized(found[name])
        for name, block in zip(names, model.coded_blocks, strict=True)
    )
    sums = torch.zeros(model.num_classes, model.num_classes, dtype=torch.float64)
    sums.index_add_(0, gathered.targets, likely.double())
    counts = gathered.targets.bincount(minlength=model.num_classes)
    predictions = found["logits"].argmax(1)
    return Observations(
        class_names=model.class_names,
        codebooks=model.codebooks,
        gathered=gathered,
        predictions=predictions,
        confidences=likely.gather(1, predictions[:, None])[:, 0],
        energies=energies,
        decoded=tuple(
            decode(energy, book) for energy, book in zip(energies, model.codebooks, strict=True)
        ),
        # A class without images divides 0 by 0: NaN.
        probabilities=sums / counts[:, None],
    )


def _normalized(energies: Tensor) -> Tensor:
    """(4), of the energies (2) that the ablation without normalisation returns."""
    mean = energies.mean(1, keepdim=True)
    return torch.where(is_dead(mean), 0.0, energies / mean)


@contextmanager
def _first_coded_input(model: CodedResNeXt) -> Iterator[list[Tensor]]:
    """A list that holds, after a pass, the input of the first coded block."""
    seen: list[Tensor] = []
    blocks = model.coded_blocks
    if not blocks:
        yield seen
        return
    handle = blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
