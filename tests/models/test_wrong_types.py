"""Every public argument of a wrong type is refused by a sentence that names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.small_networks import NARROW, make_network

from coded_resnext import (
    CodedBottleneck,
    CodedLoss,
    CodedResNeXt,
    DropSubNNs,
    Stage,
    decode,
    extract_classifier,
)
from coded_resnext.deploy.cost import network_cost
from coded_resnext.deploy.export import to_exported_program

NETWORK = make_network()
CODED = NETWORK.coded_blocks[0]
ENERGIES = torch.rand(3, 4)
STAGES = [Stage(1, 8, 2, 4, 2)]
BLOCK = {"in_channels": 4, "channels": 8, "width": 2, "branches": 4}
LOGITS, TARGETS = torch.zeros(3, 4), torch.tensor([0, 1, 2])
INPUT = torch.zeros(2, 12, 6, 6)

# What is called, arguments that it takes, and those of which another type is tried.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "network": (
        CodedResNeXt,
        {"stages": STAGES, "num_classes": 4, "codebooks": [NARROW]},
        "stages num_classes codebooks class_names stem stem_channels in_channels drop_branches "
        "aggregation backend image_size",
    ),
    "block": (
        CodedBottleneck,
        BLOCK | {"codebook": NARROW},
        "in_channels channels width branches codebook stride drop_branches aggregation "
        "normalized_by backend",
    ),
    "stage": (Stage, {"depth": 1, "channels": 8, "width": 2, "branches": 4, "active": 2}, "depth"),
    "forward": (NETWORK, {"x": torch.zeros(2, 1, 6, 6)}, "x keep"),
    "block's forward": (CODED, {"x": INPUT}, "x drop_mask keep_mask"),
    "loss": (
        CodedLoss,
        {"codebooks": [NARROW]},
        "codebooks weight exponent threshold label_smoothing class_weight backend",
    ),
    "loss's forward": (
        CodedLoss([NARROW]),
        {"logits": LOGITS, "energies": [ENERGIES], "targets": TARGETS},
        "logits energies targets",
    ),
    "decode": (decode, {"energies": ENERGIES, "codebook": NARROW}, "energies codebook"),
    "extract": (
        extract_classifier,
        {"model": NETWORK, "class_index_or_name": 1},
        "model class_index_or_name skip_rank",
    ),
    "extend": (NETWORK.extend_classes, {"new_classes": ["eel"]}, "new_classes seed"),
    "reset": (NETWORK.reset_classifier, {"num_classes": 4}, "num_classes codebooks class_names"),
    "cost": (network_cost, {"network": NETWORK, "image_size": 6}, "image_size"),
    "export": (to_exported_program, {"network": NETWORK}, "image_size"),
    "drop": (DropSubNNs, {}, "p"),
}
# What messages call these arguments.
NAMES = {"class_index_or_name": "class", "p": "drop_branches", "depth": "Stage.depth"}


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name, (_, _, tried) in CALLS.items() for argument in tried.split()],
)
def test_a_wrong_type_is_named(name: str, argument: str) -> None:
    """timm#1454, keras#14140: AttributeError and TypeError from somewhere within."""
    call, arguments, _ = CALLS[name]
    for wrong in (object(), {"a": 1}, b"cat", 1.5j):
        with pytest.raises(ValueError, match=rf"^{NAMES.get(argument, argument)}: expected"):
            call(**{**arguments, argument: wrong})
