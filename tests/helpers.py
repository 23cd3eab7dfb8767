"""What several tests share: golden tensors and errors relative to the largest value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coded_resnext.kernels.launch import HAS_TRITON
from torch import Tensor

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

# Of results in a dtype against float64 for inputs that are exact in it. Inputs of products and
# outputs are rounded to the dtype (half a unit in the last place is 5e-4 and 4e-3 for the half
# precisions), a few times in a row; sums are float32 (float64 for float64), of some hundred terms.
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}

GOLDEN = Path(__file__).parent / "golden"


def load_golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a golden file."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "meta"}
        return json.loads(str(arrays["meta"])), tensors


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; shapes and dtypes must agree."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    actual, expected = actual.detach(), expected.detach()
    assert actual.isfinite().all()
    scale = max(float(expected.abs().max()), 1e-300)
    return float((actual.to(expected.dtype) - expected).abs().max()) / scale
