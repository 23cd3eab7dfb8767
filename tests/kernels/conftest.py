"""Guarded memory for what the operators allocate while their kernels run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from coded_resnext.kernels import launch

# Elements before and behind every allocation; a multiple of 16 bytes for every dtype.
GUARD = 64
CANARY = 77


class GuardedMemory:
    """Stands in for PyTorch's allocations of uninitialised tensors.

    A tensor comes filled with NaN (the largest number for integers), so that a missing store shows,
    between canaries, so that a store outside shows.
    """

    def __init__(self) -> None:
        self.buffers: list[tuple[torch.Tensor, int]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> torch.Tensor:
        size = math.prod(shape)
        buffer = torch.full((size + 2 * GUARD,), CANARY, dtype=dtype, device=device)
        inside = buffer[GUARD : GUARD + size]
        inside.fill_(math.nan if dtype.is_floating_point else torch.iinfo(dtype).max)
        self.buffers.append((buffer, size))
        return inside.view(shape)

    def check(self) -> None:
        """No canary has changed."""
        for buffer, size in self.buffers:
            assert (buffer[:GUARD] == CANARY).all(), "a store before a tensor"
            assert (buffer[GUARD + size :] == CANARY).all(), "a store behind a tensor"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[GuardedMemory]:
    """Guards the tensors that operators allocate during the test, and checks them at its end."""
    guarded = GuardedMemory()
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def replaced(like: torch.Tensor, shape: Any, **options: Any) -> torch.Tensor:
        # Fakes and Triton's own allocations stay PyTorch's.
        if type(like) is not torch.Tensor or not isinstance(shape, tuple) or "device" in options:
            return new_empty(like, shape, **options)
        return guarded.empty(shape, options.get("dtype", like.dtype), like.device)

    def replaced_like(like: torch.Tensor, **options: Any) -> torch.Tensor:
        if options or type(like) is not torch.Tensor or not like.is_contiguous():
            return empty_like(like, **options)
        return guarded.empty(tuple(like.shape), like.dtype, like.device)

    monkeypatch.setattr(torch.Tensor, "new_empty", replaced)
    monkeypatch.setattr(torch, "empty_like", replaced_like)
    yield guarded
    assert guarded.buffers, "nothing was allocated through the guard"
    guarded.check()


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: on the CPU, in Triton's interpreter."""
    assert launch.interpreted(), "TRITON_INTERPRET=1 was not set before Triton was imported"
    return torch.device("cpu")
