"""Every public argument of a wrong type is refused by a sentence that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_networks import NARROW, make_network
from torch import nn

import coded_resnext
from coded_resnext import (
    Codebook,
    CodedBottleneck,
    CodedLoss,
    CodedResNeXt,
    DropSubNNs,
    EarlyExit,
    ExitScores,
    ExtractedClassifier,
    ExtractedNetwork,
    GroupedConv2d,
    Pretrained,
    Stage,
    calibrate,
    choose_backend,
    create_model,
    decode,
    exit_scores,
    extract_classifier,
    extract_subset,
    from_pretrained,
    list_models,
    load_weights,
    push_to_hub,
    save_pretrained,
    use_grouped_kernels,
    warm_up,
)
from coded_resnext.deploy.cost import network_cost
from coded_resnext.deploy.early_exit import predict_early
from coded_resnext.deploy.export import to_exported_program

NETWORK = make_network()
CODED = NETWORK.coded_blocks[0]
ENERGIES = torch.rand(3, 4)
STAGES = [Stage(1, 8, 2, 4, 2)]
BLOCK = {"in_channels": 4, "channels": 8, "width": 2, "branches": 4}
LOGITS, TARGETS = torch.zeros(3, 4), torch.tensor([0, 1, 2])
INPUT = torch.zeros(2, 12, 6, 6)
IMAGES = torch.zeros(2, 1, 6, 6)
EXIT = EarlyExit.at_margin(NETWORK, 0.5)
SCORES = exit_scores(NETWORK, [(IMAGES, TARGETS[:2])])
CLASSIFIER = extract_classifier(NETWORK, 1, threshold=0.0)
SIZES = {"classes": 4, "branches": 4, "active": 2}
CONV = {"in_channels": 8, "out_channels": 8, "groups": 2}
PATH = Path("no such file")

# What is called, arguments that it takes, and those of which another type is tried.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "Codebook": (Codebook, {"codewords": [[1, 0], [0, 1]]}, "codewords class_names"),
    "Codebook.from_words": (Codebook.from_words, {"words": ["10", "01"]}, "words class_names"),
    "Codebook.shipped": (
        Codebook.shipped,
        {"classes": 10, "branches": 10, "active": 3},
        "classes branches active variant",
    ),
    "Codebook.search": (
        Codebook.search,
        SIZES | {"effort": "fast"},
        "classes branches active effort seed class_names report",
    ),
    "Codebook.quality": (NARROW.quality, {"trials": 10}, "flip_probability trials seed"),
    "Codebook.extend": (NARROW.extend, {"new_classes": 1}, "new_classes seed"),
    "Codebook.assign": (
        NARROW.assign,
        {"similarity": np.ones((4, 4))},
        "similarity similar_classes seed",
    ),
    "Codebook.with_class_names": (NARROW.with_class_names, {}, "class_names"),
    "Codebook.index": (NARROW.index, {}, "class_name"),
    "Codebook.from_dict": (Codebook.from_dict, {}, "data"),
    "Codebook.load": (Codebook.load, {}, "path"),
    "Codebook.save": (NARROW.save, {}, "path"),
    "CodedResNeXt": (
        CodedResNeXt,
        {"stages": STAGES, "num_classes": 4, "codebooks": [NARROW]},
        "stages num_classes codebooks class_names stem stem_channels in_channels drop_branches "
        "head_bias aggregation normalize backend image_size",
    ),
    "CodedResNeXt.forward": (NETWORK, {"x": IMAGES}, "x return_energies keep"),
    "CodedResNeXt.extend_classes": (
        NETWORK.extend_classes,
        {"new_classes": ["eel"]},
        "new_classes seed",
    ),
    "CodedResNeXt.reset_classifier": (
        NETWORK.reset_classifier,
        {"num_classes": 4},
        "num_classes codebooks class_names",
    ),
    "CodedResNeXt.features": (NETWORK.features, {"x": IMAGES}, "x keep start stop"),
    "CodedBottleneck": (
        CodedBottleneck,
        BLOCK | {"codebook": NARROW},
        "in_channels channels width branches codebook stride drop_branches aggregation "
        "normalize normalized_by backend",
    ),
    "CodedBottleneck.forward": (CODED, {"x": INPUT}, "x drop_mask keep_mask record"),
    "Stage": (
        Stage,
        {"depth": 1, "channels": 8, "width": 2, "branches": 4, "active": 2},
        "depth channels width branches active stride",
    ),
    "DropSubNNs": (DropSubNNs, {}, "p"),
    "GroupedConv2d": (GroupedConv2d, CONV, "in_channels out_channels groups stride backend"),
    "use_grouped_kernels": (use_grouped_kernels, {"model": nn.ReLU()}, "model backend"),
    "CodedLoss": (
        CodedLoss,
        {"codebooks": [NARROW]},
        "codebooks weight exponent threshold label_smoothing class_weight ignore_index "
        "check_values backend",
    ),
    "CodedLoss.forward": (
        CodedLoss([NARROW]),
        {"logits": LOGITS, "energies": [ENERGIES], "targets": TARGETS},
        "logits energies targets",
    ),
    "decode": (
        decode,
        {"energies": ENERGIES, "codebook": NARROW},
        "energies codebook check_values",
    ),
    "create_model": (
        create_model,
        {"name": "coded_resnext_digits", "head_bias": True},
        "name pretrained",
    ),
    "list_models": (list_models, {}, "pretrained"),
    "load_weights": (load_weights, {"model": NETWORK, "path": PATH}, "model path"),
    "extract_classifier": (
        extract_classifier,
        {"model": NETWORK, "class_index_or_name": 1},
        "model class_index_or_name threshold fold_batch_norm skip_rank",
    ),
    "extract_subset": (
        extract_subset,
        {"model": NETWORK, "classes": [1, 2]},
        "model classes fold_batch_norm skip_rank",
    ),
    "ExtractedNetwork": (
        ExtractedNetwork,
        {"config": CLASSIFIER.config, "class_names": ["ant"]},
        "config class_names",
    ),
    "ExtractedClassifier": (
        ExtractedClassifier,
        {"config": CLASSIFIER.config, "class_names": ["ant"]},
        "config class_names threshold",
    ),
    "ExtractedClassifier.forward": (CLASSIFIER, {}, "x"),
    "ExtractedClassifier.predict": (CLASSIFIER.predict, {}, "x"),
    "EarlyExit": (
        EarlyExit,
        {"margins": (0.5, 0.5, 0.5)},
        "margins agreement calibration weights_sha256",
    ),
    "EarlyExit.at_margin": (
        EarlyExit.at_margin,
        {"model": NETWORK, "margin": 0.5},
        "model margin agreement",
    ),
    "EarlyExit.from_dict": (EarlyExit.from_dict, {}, "data"),
    "EarlyExit.load": (EarlyExit.load, {}, "path"),
    "EarlyExit.save": (EXIT.save, {}, "path"),
    "predict_early": (
        predict_early,
        {"model": NETWORK, "x": IMAGES, "criterion": EXIT},
        "model x criterion return_energies",
    ),
    "exit_scores": (exit_scores, {"model": NETWORK, "loader": []}, "model loader"),
    "ExitScores.joined": (ExitScores.joined, {}, "parts"),
    "ExitScores.exits": (SCORES.exits, {}, "criterion"),
    "ExitScores.accuracy": (SCORES.accuracy, {}, "criterion"),
    "calibrate": (calibrate, {"scores": SCORES}, "scores max_accuracy_loss agreement"),
    "Pretrained": (
        Pretrained,
        {"model": NETWORK},
        "model preprocessing thresholds early_exit training results name license",
    ),
    "save_pretrained": (
        save_pretrained,
        {"pretrained": Pretrained(NETWORK), "folder": PATH},
        "pretrained folder",
    ),
    "from_pretrained": (
        from_pretrained,
        {"source": "digits"},
        "source revision token cache_dir",
    ),
    "push_to_hub": (
        push_to_hub,
        {"folder": PATH, "repository": "a/b"},
        "folder repository private revision token message",
    ),
    "choose_backend": (
        choose_backend,
        {"model": NETWORK, "images": IMAGES},
        "model images loss seconds anew",
    ),
    "warm_up": (warm_up, {"model": NETWORK, "images": IMAGES}, "model images loss"),
    "network_cost": (network_cost, {"network": NETWORK, "image_size": 6}, "network image_size"),
    "to_exported_program": (
        to_exported_program,
        {"network": NETWORK},
        "network image_size preprocessing",
    ),
}
# Public names that hold results, which nobody makes.
OUTCOMES = {"EarlyPrediction", "LossTerms", "WarmUp"}
# What messages call these arguments.
NAMES = {
    "p": "drop_branches",
    "Codebook.from_dict data": "codebook",
    "EarlyExit.from_dict data": "early exit",
}
MAPPINGS = ("calibration", "thresholds", "training", "results")


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name, (_, _, tried) in CALLS.items() for argument in tried.split()],
)
def test_a_wrong_type_is_named(name: str, argument: str) -> None:
    """timm#1454, keras#14140: AttributeError and TypeError from somewhere within."""
    call, arguments, _ = CALLS[name]
    said = NAMES.get(f"{name} {argument}", NAMES.get(argument, argument))
    wrong_values = [object(), b"cat", 1.5j, *([] if argument in MAPPINGS else [{"a": 1}])]
    for wrong in wrong_values:
        with pytest.raises(ValueError, match=rf"^(Stage\.)?{said}: expected"):
            call(**{**arguments, argument: wrong})


def test_every_public_name_is_tried() -> None:
    assert set(coded_resnext.__all__) <= {name.split(".")[0] for name in CALLS} | OUTCOMES
