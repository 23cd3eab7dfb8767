"""What the tests of kernels share: guarded memory, and the device that they run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from coded_resnext.kernels import launch
from guarded_memory import GuardedMemory, guarded_memory


@pytest.fixture
def memory() -> Iterator[GuardedMemory]:
    """Guards the tensors that operators allocate during the test, and checks them at its end."""
    with guarded_memory() as guarded:
        yield guarded


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: on the CPU, in Triton's interpreter."""
    assert launch.interpreted(), "TRITON_INTERPRET=1 was not set before Triton was imported"
    return torch.device("cpu")
