"""Ablations: networks and trainings that differ from a base by one change."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.models.resnext import CodedResNeXt, default_codebook

BASE = "base"
PLAIN = "plain twin"


@dataclass(frozen=True)
class Ablation:
    """One change of network or training; everything else stays."""

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of `CodedResNeXt` that change."""
    training: dict[str, Any] = field(default_factory=dict)
    """Fields of `TrainingConfig` that change."""
    ratios: Literal["less", "more", "all plain"] | None = None
    """Fewer or more active branches in every coded stage; "all plain" is the twin without code."""
    near_codewords: bool = False
    """Codebooks of the same size and loads whose minimum distance is 2."""


ABLATIONS = (
    Ablation(BASE),
    Ablation(PLAIN, ratios="all plain"),
    Ablation("exponent 2", training={"exponent": 2.0}),
    Ablation("exponent 1", training={"exponent": 1.0}),
    Ablation("concatenation", model={"aggregation": "concat"}),
    Ablation("DropSubNNs 0", model={"drop_branches": 0.0}),
    Ablation("masks not shared", model={"share_masks": False}),
    Ablation(
        "gradients masked",
        training={"mask_gradients": True, "coding_weight": 0.0, "torchcompile": ""},
    ),
    Ablation("coding weight 1", training={"coding_weight": 1.0}),
    Ablation("no normalisation", model={"normalize": False}),
    Ablation("codebook distance 2", near_codewords=True),
    Ablation("coding weight 0", training={"coding_weight": 0.0}),
    Ablation("coding weight 4", training={"coding_weight": 4.0}),
    Ablation("coding weight 10", training={"coding_weight": 10.0}),
    Ablation("coding weight 20", training={"coding_weight": 20.0}),
    Ablation("DropSubNNs 0.2", model={"drop_branches": 0.2}),
    Ablation("DropSubNNs 0.3", model={"drop_branches": 0.3}),
    Ablation("threshold 0.1", training={"threshold": 0.1}),
    Ablation("threshold 0.3", training={"threshold": 0.3}),
    Ablation("fewer active branches", ratios="less"),
    Ablation("more active branches", ratios="more"),
)


def select_ablations(names: Sequence[str] | None) -> list[Ablation]:
    """The ablations of these names, all without names; always with the base, to compare with.

    Raises:
        ValueError: there is no such ablation.
    """
    known = {ablation.name: ablation for ablation in ABLATIONS}
    for name in names or ():
        if name not in known:
            raise ValueError(f"rows: expected some of {', '.join(known)}; got {name!r}")
    return [one for one in ABLATIONS if names is None or one.name in {BASE, *names}]


def ablated_network(base: CodedResNeXt, ablation: Ablation, *, seed: int) -> CodedResNeXt:
    """Returns the network of an ablation, with fresh weights of a seed.

    Args:
        base: the coded network that is varied; only its configuration and codebooks count.
        ablation: what changes.
        seed: decides the weights. The base and its variants of one seed are drawn alike, and equal
            wherever they have the same tensors in the same order.

    Raises:
        ValueError: a change does not fit the network.
    """
    config = copy.deepcopy({**base.config, **ablation.model})
    books = list(base.stage_codebooks)
    coded = [stage for stage in config["stages"] if stage["active"] < stage["branches"]]
    if ablation.ratios == "all plain":
        for stage in coded:
            stage["active"] = stage["branches"]
        books = []
    elif ablation.ratios is not None:
        for stage in coded:
            stage["active"] = _other_active(stage["active"], stage["branches"], ablation.ratios)
        books = [
            default_codebook(base.num_classes, stage["branches"], stage["active"], base.class_names)
            for stage in coded
        ]
    if ablation.near_codewords:
        books = [near_codebook(book) for book in books]
    torch.manual_seed(seed)
    model = CodedResNeXt.from_config(
        config, books, class_names=base.class_names, backend=base.blocks[0].backend
    )
    norms = [
        [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        for network in (model, base)
    ]
    for module, original in zip(*norms, strict=True):
        module.momentum = original.momentum
    return model


def near_codebook(book: Codebook) -> Codebook:
    """Returns a codebook of the same size whose minimum distance is 2, the smallest there is.

    Class k works with the A branches from `k mod N` on, around the ring: neighbours share all but
    one. With K = N every branch works for A classes.

    Raises:
        ValueError: there are more classes than branches.
    """
    if book.classes > book.branches:
        raise ValueError(
            f"codebook: expected at most as many classes as branches, got {book.classes} and "
            f"{book.branches}"
        )
    words = torch.zeros(book.classes, book.branches, dtype=torch.bool)
    for index in range(book.classes):
        words[index, (index + torch.arange(book.active)) % book.branches] = True
    return Codebook(words, book.class_names)


def _other_active(active: int, branches: int, ratios: str) -> int:
    if ratios == "more":
        return min(branches - 1, active + max(1, round(0.4 * active)))
    return max(1, active - max(1, round(0.4 * active)))
