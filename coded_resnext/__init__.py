"""Coded ResNeXt: multi-branch networks whose branches are assigned to classes before training.

A name is imported from its module when it is first used, so that the command line can answer a
question for help without loading PyTorch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .codebook import Codebook
    from .decode import decode
    from .early_exit import EarlyExit, EarlyPrediction
    from .exit_calibration import ExitScores, calibrate, exit_scores
    from .extract import extract_classifier, extract_subset
    from .extracted import ExtractedClassifier, ExtractedNetwork
    from .grouped_conv import GroupedConv2d, use_grouped_kernels
    from .layers import CodedBottleneck, DropSubNNs
    from .losses import CodedLoss, LossTerms
    from .models import CodedResNeXt
    from .pretrained import Pretrained, from_pretrained, push_to_hub, save_pretrained
    from .registry import create_model, list_models
    from .stages import Stage
    from .warm_up import WarmUp, warm_up

_MODULES = {
    "Codebook": "codebook",
    "CodedBottleneck": "layers",
    "CodedLoss": "losses",
    "CodedResNeXt": "models",
    "DropSubNNs": "layers",
    "EarlyExit": "early_exit",
    "EarlyPrediction": "early_exit",
    "ExitScores": "exit_calibration",
    "ExtractedClassifier": "extracted",
    "ExtractedNetwork": "extracted",
    "GroupedConv2d": "grouped_conv",
    "LossTerms": "losses",
    "Pretrained": "pretrained",
    "Stage": "stages",
    "WarmUp": "warm_up",
    "calibrate": "exit_calibration",
    "create_model": "registry",
    "decode": "decode",
    "exit_scores": "exit_calibration",
    "extract_classifier": "extract",
    "extract_subset": "extract",
    "from_pretrained": "pretrained",
    "list_models": "registry",
    "push_to_hub": "pretrained",
    "save_pretrained": "pretrained",
    "use_grouped_kernels": "grouped_conv",
    "warm_up": "warm_up",
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
    "create_model",
    "decode",
    "exit_scores",
    "extract_classifier",
    "extract_subset",
    "from_pretrained",
    "list_models",
    "push_to_hub",
    "save_pretrained",
    "use_grouped_kernels",
    "warm_up",
]


class _Package(ModuleType):
    """This package, in which a submodule does not hide the function that is named as it is.

    Python binds a submodule to its package once it is imported: `coded_resnext.decode` would be
    the module from then on.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
