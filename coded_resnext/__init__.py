"""Coded ResNeXt: multi-branch networks whose branches are assigned to classes before training.

A name is imported from its module when it is first used, so that the command line can answer a
question for help without loading PyTorch.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .codebooks.codebook import Codebook
    from .deploy.early_exit import EarlyExit, EarlyPrediction, ExitScores, calibrate, exit_scores
    from .deploy.extract import (
        ExtractedClassifier,
        ExtractedNetwork,
        extract_classifier,
        extract_subset,
    )
    from .deploy.hub import Pretrained, from_pretrained, push_to_hub, save_pretrained
    from .models.block import CodedBottleneck, DropSubNNs
    from .models.grouped_conv import GroupedConv2d, use_grouped_kernels
    from .models.loss import CodedLoss, LossTerms, decode
    from .models.registry import create_model, list_models
    from .models.resnext import CodedResNeXt, Stage
    from .models.warm_start import load_weights
    from .training.warm_up import WarmUp, warm_up
    from .training.ways import choose_backend

# For every part of the package and for `setup.py`.
__version__ = "0.1.0"

if not Path(__file__).with_name("kernels").is_dir():
    raise ImportError(
        "coded_resnext/kernels: expected a link to ../kernels, which this checkout lacks; run "
        "`git config core.symlinks true` and `git checkout -- coded_resnext/kernels`, or install "
        "it with `pip install .` and import it from another folder"
    )

_MODULES = {
    "Codebook": "codebooks.codebook",
    "CodedBottleneck": "models.block",
    "CodedLoss": "models.loss",
    "CodedResNeXt": "models.resnext",
    "DropSubNNs": "models.block",
    "EarlyExit": "deploy.early_exit",
    "EarlyPrediction": "deploy.early_exit",
    "ExitScores": "deploy.early_exit",
    "ExtractedClassifier": "deploy.extract",
    "ExtractedNetwork": "deploy.extract",
    "GroupedConv2d": "models.grouped_conv",
    "LossTerms": "models.loss",
    "Pretrained": "deploy.hub",
    "Stage": "models.resnext",
    "WarmUp": "training.warm_up",
    "calibrate": "deploy.early_exit",
    "choose_backend": "training.ways",
    "create_model": "models.registry",
    "decode": "models.loss",
    "exit_scores": "deploy.early_exit",
    "extract_classifier": "deploy.extract",
    "extract_subset": "deploy.extract",
    "from_pretrained": "deploy.hub",
    "list_models": "models.registry",
    "load_weights": "models.warm_start",
    "push_to_hub": "deploy.hub",
    "save_pretrained": "deploy.hub",
    "use_grouped_kernels": "models.grouped_conv",
    "warm_up": "training.warm_up",
}

__all__ = [
    "Codebook",
    "CodedBottleneck",
    "CodedLoss",
    "CodedResNeXt",
    "DropSubNNs",
    "EarlyExit",
    "EarlyPrediction",
    "ExitScores",
    "ExtractedClassifier",
    "ExtractedNetwork",
    "GroupedConv2d",
    "LossTerms",
    "Pretrained",
    "Stage",
    "WarmUp",
    "calibrate",
    "choose_backend",
    "create_model",
    "decode",
    "exit_scores",
    "extract_classifier",
    "extract_subset",
    "from_pretrained",
    "list_models",
    "load_weights",
    "push_to_hub",
    "save_pretrained",
    "use_grouped_kernels",
    "warm_up",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
