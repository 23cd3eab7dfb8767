"""Coded ResNeXt: multi-branch networks whose branches are assigned to classes before training."""

from .codebook import Codebook
from .decode import decode
from .layers import CodedBottleneck, DropSubNNs
from .losses import CodedLoss, LossTerms
from .models import CodedResNeXt, Stage
from .registry import create_model, list_models

__all__ = [
    "Codebook",
    "CodedBottleneck",
    "CodedLoss",
    "CodedResNeXt",
    "DropSubNNs",
    "LossTerms",
    "Stage",
    "create_model",
    "decode",
    "list_models",
]
