"""Coded operations: their definition, the exact Gram form, Triton kernels, public operators."""

if not __name__.startswith("coded_resnext."):
    raise ImportError(
        f"this folder is installed as coded_resnext.kernels; import that instead of {__name__!r}"
    )

from .backend import (
    Backend,
    ConvBackend,
    backends,
    check_backend,
    check_conv_backend,
    select_backend,
)
from .checks import Aggregation
from .coded.functional import branch_energy, coded_aggregate
from .conv3x3.convolution import grouped_conv3x3
from .loss.functional import CodingLosses, coding_loss, coding_losses

__all__ = [
    "Aggregation",
    "Backend",
    "CodingLosses",
    "ConvBackend",
    "backends",
    "branch_energy",
    "check_backend",
    "check_conv_backend",
    "coded_aggregate",
    "coding_loss",
    "coding_losses",
    "grouped_conv3x3",
    "select_backend",
]
