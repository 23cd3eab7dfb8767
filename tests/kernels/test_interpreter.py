"""What kernels run on in tests: an interpreter with what all supported Tritons have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def made_in_its_dtype(out_ptr, VALUE: tl.constexpr):
    """The kernel makes numbers in the dtype of its output."""
    n = tl.arange(0, 16)
    tl.store(out_ptr + n, tl.full((16,), VALUE, out_ptr.dtype.element_ty))


@triton.jit
def meets_a_number(out_ptr, VALUE: tl.constexpr):
    """The kernel adds a Python number, which Triton makes in the dtype of the tile."""
    n = tl.arange(0, 16)
    tl.store(out_ptr + n, tl.load(out_ptr + n) + VALUE)


@triton.jit
def cast_to_its_dtype(out_ptr, VALUE: tl.constexpr):
    """The kernel makes numbers in float32 and casts them."""
    n = tl.arange(0, 16)
    tl.store(out_ptr + n, tl.full((16,), VALUE, tl.float32).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("kernel", [made_in_its_dtype, meets_a_number], ids=lambda k: k.__name__)
def test_a_number_in_bfloat16_is_refused(kernel: Any) -> None:
    """Triton 3.9 alone makes one; a kernel that needs it would fail with 3.6 to 3.8."""
    out = torch.zeros(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="get_bf16"):
        kernel[(1,)](out, VALUE=1.0)
    kernel[(1,)](out, VALUE=0.0)
    assert out.tolist() == [0.0] * 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_number_that_is_cast_is_made(dtype: torch.dtype) -> None:
    out = torch.zeros(16, dtype=dtype)
    cast_to_its_dtype[(1,)](out, VALUE=1.5)
    assert out.tolist() == [1.5] * 16
