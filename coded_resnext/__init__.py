"""Coded ResNeXt: multi-branch networks whose branches are assigned to classes before training."""

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
