"""The 1x1 convolutions and their gradients by the Triton kernels: tensors in, tensors out."""

from __future__ import annotations

from .launch import DTYPES

__all__ = ["DTYPES"]
