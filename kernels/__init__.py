"""Coded operations: their definition, the exact Gram form, and the public operators."""

if not __name__.startswith("coded_resnext."):
    raise ImportError(
        f"this folder is installed as coded_resnext.kernels; import that instead of {__name__!r}"
    )

from .grouped_ops import ConvBackend, check_conv_backend, grouped_conv3x3
from .ops import Aggregation, Backend, backends, coded_aggregate, coding_loss, select_backend

__all__ = [
    "Aggregation",
    "Backend",
    "ConvBackend",
    "backends",
    "check_conv_backend",
    "coded_aggregate",
    "coding_loss",
    "grouped_conv3x3",
    "select_backend",
]
