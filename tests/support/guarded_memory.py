"""Memory that shows what a kernel did not write, and what it wrote or read where nothing is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from coded_resnext.kernels import replay

# Elements before and behind every tensor; a multiple of 16 bytes for every dtype.
GUARD = 64
# What uninitialised bytes are, in turn. Repeated they are a NaN in every floating dtype, one of
# its own: a NaN that a computation gives is another.
BYTES = (0xFD, 0x7F)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: Any = "cpu") -> Tensor:
    """A tensor that nobody has written: NaN, or a large number for integers."""
    tensor = torch.zeros(shape, dtype=dtype, device=device)
    for index, byte in enumerate(BYTES):
        tensor.view(-1).view(torch.uint8)[index :: len(BYTES)] = byte
    return tensor


class GuardedMemory:
    """Stands in for PyTorch's allocations of uninitialised tensors.

    A tensor comes poisoned, so that a missing store shows. Its guards are too, so that a read
    outside shows, and any store.
    """

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: Any = "cpu") -> Tensor:
        """A tensor between two guards, at an address as good as that of any other."""
        size = math.prod(shape)
        buffer = poisoned((size + 2 * GUARD,), dtype, device)
        self.buffers.append((buffer, size))
        return buffer[GUARD : GUARD + size].view(shape)

    def guarded(self, tensor: Tensor) -> Tensor:
        """A copy of a channels-last tensor between guards."""
        rows = tensor.permute(0, 2, 3, 1)
        copy = self.empty(tuple(rows.shape), tensor.dtype, tensor.device)
        copy.copy_(rows)
        return copy.permute(0, 3, 1, 2)

    def check(self) -> None:
        """Nothing was stored outside the tensors."""
        assert self.buffers, "nothing was allocated through the guard"
        for buffer, size in self.buffers:
            unwritten = poisoned(tuple(buffer.shape), buffer.dtype, buffer.device)
            same = buffer.view(torch.uint8) == unwritten.view(torch.uint8)
            for guard, where in (
                (same[: GUARD * buffer.itemsize], "before"),
                (same[(GUARD + size) * buffer.itemsize :], "behind"),
            ):
                assert guard.all(), f"a store {where} a tensor"


@contextmanager
def guarded_memory() -> Iterator[GuardedMemory]:
    """Guards the tensors that operators allocate meanwhile, and checks them at the end."""
    guarded = GuardedMemory()
    # Replays allocate in their own way.
    replay.forget()
    new_empty, empty_like = Tensor.new_empty, torch.empty_like

    def replaced(like: Tensor, *shape: Any, **options: Any) -> Tensor:
        # Fakes and Triton's own allocations stay PyTorch's.
        if type(like) is not Tensor or "device" in options:
            return new_empty(like, *shape, **options)
        sizes = shape if isinstance(shape[0], int) else tuple(shape[0])
        return guarded.empty(sizes, options.get("dtype", like.dtype), like.device)

    def replaced_like(like: Tensor, **options: Any) -> Tensor:
        if options or type(like) is not Tensor or not like.is_contiguous():
            return empty_like(like, **options)
        return guarded.empty(tuple(like.shape), like.dtype, like.device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", replaced)
        patch.setattr(torch, "empty_like", replaced_like)
        yield guarded
    guarded.check()
