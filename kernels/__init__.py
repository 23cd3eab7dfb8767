"""Coded operations: their definition, the exact Gram form, Triton kernels, public operators."""

if not __name__.startswith("coded_resnext."):
    raise ImportError(
        f"this folder is installed as coded_resnext.kernels; import that instead of {__name__!r}"
    )

from .checks import Aggregation
from .conv1x1_ops import conv1x1, join_conv1x1
from .grouped_ops import ConvBackend, check_conv_backend, grouped_conv3x3
from .ops import (
    Backend,
    CodingLosses,
    Expanded,
    backends,
    branch_energy,
    check_backend,
    coded_aggregate,
    coded_expand,
    coding_loss,
    coding_losses,
    select_backend,
)

__all__ = [
    "Aggregation",
    "Backend",
    "CodingLosses",
    "ConvBackend",
    "Expanded",
    "backends",
    "branch_energy",
    "check_backend",
    "check_conv_backend",
    "coded_aggregate",
    "coded_expand",
    "coding_loss",
    "coding_losses",
    "conv1x1",
    "grouped_conv3x3",
    "join_conv1x1",
    "select_backend",
]
