"""The operators that check.py checks and times: one entry of OPERATORS each.

A new kernel joins by an entry: how its inputs are made, the kernel's call, its definition, what it
is timed against, and the bytes that it cannot avoid moving.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coded_resnext.kernels import branch_energy, coded_aggregate, coding_loss
from coded_resnext.kernels.coded import gram
from coded_resnext.kernels.coded import operator as coded_operator
from coded_resnext.kernels.loss import functional as loss_functional

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """A coded stage of a network at an image size; letters as in docs/math.md."""

    name: str
    batch: int
    branches: int
    width: int
    channels: int
    size: int
    """`H = W`, in pixels."""
    classes: int
    active: int

    @property
    def activations(self) -> int:
        """Elements of `h`."""
        return self.batch * self.branches * self.width * self.size**2

    @property
    def outputs(self) -> int:
        """Elements of `y`."""
        return self.batch * self.channels * self.size**2


IMAGENET = (
    Place("32x4d c4 160px", 256, 32, 16, 1024, 10, 1000, 16),
    Place("32x4d c5 160px", 256, 32, 32, 2048, 5, 1000, 8),
    Place("32x4d c4 224px", 256, 32, 16, 1024, 14, 1000, 16),
    Place("32x4d c5 224px", 256, 32, 32, 2048, 7, 1000, 8),
)
CIFAR = (
    Place("10x11d c3", 128, 10, 22, 512, 16, 10, 5),
    Place("10x11d c4", 128, 10, 44, 1024, 8, 10, 3),
    Place("20x6d c3", 128, 20, 12, 512, 16, 100, 8),
    Place("20x6d c4", 128, 20, 24, 1024, 8, 100, 4),
)
PLACES = (*IMAGENET, *CIFAR)
# For a dry run: as small as the interpreter needs it, odd where that costs nothing.
TINY = (Place("tiny", 3, 4, 4, 24, 5, 10, 2), Place("tiny odd", 2, 5, 3, 7, 3, 10, 2))

Form = Callable[[Tensors, Place], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Operator:
    """What is known about an operator outside its kernel."""

    name: str
    make_inputs: Callable[[Place, torch.Generator], Tensors]
    """Inputs in float32 on the generator's device; what is not floating point stays as it is."""
    differentiable: tuple[str, ...]
    """Inputs that get a gradient."""
    kernel: Form
    definition: Form
    """What is right; evaluated in float64, and timed."""
    least_bytes: Callable[[Place, int], tuple[int, int]]
    """For a size of an element: the least traffic of a forward and of a backward pass, each tensor
    moved once."""
    rivals: dict[str, Form] = field(default_factory=dict)
    """Other forms of the same, timed beside the kernel."""
    replaced: Form | None = None
    """What a network without coding would do here instead."""
    split: tuple[str, ...] = ()
    """Inputs with a batch dimension, when outputs have one too: the definition, which may need far
    more memory, is then evaluated for some samples at a time."""
    wide: tuple[str, ...] = ()
    """Inputs that stay float32 whatever the activations are."""
    opchecks: Callable[[Tensors, Place], list[tuple[Any, tuple[Any, ...]]]] | None = None
    """Calls of registered operators for `torch.library.opcheck`."""


def aggregate_inputs(place: Place, generator: torch.Generator) -> Tensors:
    """Rectified activations, an expand weight of unit gain, and a DropSubNNs mask."""
    device, wide = generator.device, place.branches * place.width

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    h = normal(place.batch, wide, place.size, place.size).relu()
    keep = torch.full((place.batch, place.branches), 0.9, device=device)
    return {
        "h": h.contiguous(memory_format=torch.channels_last),
        "weight": normal(place.channels, wide, 1, 1) / wide**0.5,
        "drop_mask": torch.bernoulli(keep, generator=generator) / 0.9,
    }


def aggregate_by(backend: str) -> Form:
    """The aggregate by a backend."""

    def run(inputs: Tensors, place: Place) -> tuple[Tensor, ...]:
        return coded_aggregate(
            inputs["h"],
            inputs["weight"],
            place.branches,
            drop_mask=inputs["drop_mask"],
            backend=backend,  # type: ignore[arg-type]
        )

    return run


def aggregate_bytes(place: Place, item: int) -> tuple[int, int]:
    """Forward reads `h` and writes `y`; backward reads both and `g_y`'s size again, writes `dh`."""
    weight = place.channels * place.branches * place.width
    forward = place.activations + place.outputs + weight
    return forward * item, (2 * place.activations + place.outputs + 2 * weight) * item


def aggregate_opchecks(inputs: Tensors, place: Place) -> list[tuple[Any, tuple[Any, ...]]]:
    """With both masks, and with the affine map in front and no mask."""
    per_branch = per_branch_weight(inputs, place).detach().clone().requires_grad_()
    h, drop = inputs["h"], inputs["drop_mask"]
    affine = [torch.rand(h.shape[1], device=h.device, requires_grad=True) for _ in range(2)]
    return [
        (
            coded_operator.normalize_branches,
            (h, per_branch, None, None, drop, torch.ones_like(drop)),
        ),
        (coded_operator.normalize_branches, (h, per_branch, *affine, None, None)),
    ]


def per_branch_weight(inputs: Tensors, place: Place) -> Tensor:
    """The expand weight, one matrix for each branch."""
    return gram.split_weight(inputs["weight"], place.branches, concatenate=False)


def energy_inputs(place: Place, generator: torch.Generator) -> Tensors:
    """Those of the aggregate that energies depend on."""
    inputs = aggregate_inputs(place, generator)
    return {name: inputs[name] for name in ("h", "weight")}


def energy_by(backend: str) -> Form:
    """The energies by a backend."""

    def run(inputs: Tensors, place: Place) -> tuple[Tensor, ...]:
        h, weight = inputs["h"], inputs["weight"]
        return (branch_energy(h, weight, place.branches, backend=backend),)  # type: ignore[arg-type]

    return run


def energy_opchecks(inputs: Tensors, place: Place) -> list[tuple[Any, tuple[Any, ...]]]:
    """With a removal mask, and with the affine map in front."""
    per_branch = per_branch_weight(inputs, place).detach().clone().requires_grad_()
    h = inputs["h"]
    keep = torch.ones(place.batch, place.branches, device=h.device)
    affine = [torch.rand(h.shape[1], device=h.device, requires_grad=True) for _ in range(2)]
    return [
        (coded_operator.branch_energy, (h, per_branch, None, None, keep)),
        (coded_operator.branch_energy, (h, per_branch, *affine, None)),
    ]


def energy_bytes(place: Place, item: int) -> tuple[int, int]:
    """Forward reads `h`; backward reads it again and writes its gradient."""
    weight = place.channels * place.branches * place.width
    sums = 4 * place.batch * place.branches
    forward = (place.activations + weight) * item + sums
    return forward, 2 * (place.activations + weight) * item + sums


def loss_inputs(place: Place, generator: torch.Generator) -> Tensors:
    """Energies as a half-trained network has them, and class indices."""
    device = generator.device
    energies = torch.rand(place.batch, place.branches, generator=generator, device=device)
    # Any rows of equal weight will do: a run of branches, one further for every class.
    first = torch.arange(place.classes, device=device)[:, None]
    branch = torch.arange(place.branches, device=device)
    return {
        "energies": 2 * energies,
        "codewords": (branch - first) % place.branches < place.active,
        "targets": torch.randint(place.classes, (place.batch,), generator=generator, device=device),
    }


def loss_by(backend: str) -> Form:
    """The coding loss by a backend."""

    def run(inputs: Tensors, _place: Place) -> tuple[Tensor, ...]:
        values = (inputs["energies"], inputs["codewords"], inputs["targets"])
        return (coding_loss(*values, backend=backend),)  # type: ignore[arg-type]

    return run


def loss_opchecks(inputs: Tensors, _place: Place) -> list[tuple[Any, tuple[Any, ...]]]:
    """Two blocks in one launch, with decoding, and soft targets."""
    energies = inputs["energies"].detach().expand(2, -1, -1).clone().requires_grad_()
    codewords = inputs["codewords"].expand(2, -1, -1).clone()
    soft = F.one_hot(inputs["targets"], codewords.shape[1]).float()
    shares = soft.mean(1)
    return [
        (
            loss_functional.coding_loss_operator,
            (energies, codewords, inputs["targets"], shares, 4.0, 0.0, True),
        ),
        (
            loss_functional.coding_loss_operator,
            (energies, codewords, soft, shares, 2.0, 0.1, False),
        ),
    ]


def loss_bytes(place: Place, _item: int) -> tuple[int, int]:
    """Energies and the codewords of the targets, each once; the gradient of the energies."""
    size = place.batch * place.branches
    return 5 * size + 12 * place.batch, 9 * size + 12 * place.batch


OPERATORS = (
    Operator(
        name="branch_energy",
        make_inputs=energy_inputs,
        differentiable=("h", "weight"),
        kernel=energy_by("triton"),
        definition=energy_by("reference"),
        least_bytes=energy_bytes,
        rivals={"gram": energy_by("torch")},
        split=("h",),
        opchecks=energy_opchecks,
    ),
    Operator(
        name="coded_aggregate",
        make_inputs=aggregate_inputs,
        differentiable=("h", "weight"),
        kernel=aggregate_by("triton"),
        definition=aggregate_by("reference"),
        least_bytes=aggregate_bytes,
        rivals={"gram": aggregate_by("torch")},
        replaced=lambda inputs, _place: (F.conv2d(inputs["h"], inputs["weight"]),),
        split=("h", "drop_mask"),
        wide=("drop_mask",),
        opchecks=aggregate_opchecks,
    ),
    Operator(
        name="coding_loss",
        make_inputs=loss_inputs,
        differentiable=("energies",),
        kernel=loss_by("triton"),
        definition=loss_by("reference"),
        least_bytes=loss_bytes,
        wide=("energies",),
        opchecks=loss_opchecks,
    ),
)
