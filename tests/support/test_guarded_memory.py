"""Guarded memory notices what it is for."""

from __future__ import annotations

import pytest
import torch
from support.guarded_memory import GUARD, GuardedMemory, guarded_memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [0.0, torch.nan])
@pytest.mark.parametrize("place", [GUARD - 1, -GUARD])
def test_a_store_outside_is_noticed(dtype: torch.dtype, value: float, place: int) -> None:
    memory = GuardedMemory()
    inside = memory.empty((3, 5), dtype)
    buffer, _ = memory.buffers[0]
    assert buffer.isnan().all()
    inside.fill_(1)
    memory.check()
    buffer[place] = value
    with pytest.raises(AssertionError, match="a store before" if place > 0 else "a store behind"):
        memory.check()


def test_every_way_to_allocate_is_guarded() -> None:
    like = torch.ones(2, 3)
    with guarded_memory() as memory:
        tensors = [like.new_empty(4, 5), like.new_empty((4,)), torch.empty_like(like)]
        numbers = like.new_empty((2,), dtype=torch.int64)
        assert len(memory.buffers) == 4
    assert all(tensor.isnan().all() for tensor in tensors)
    assert (numbers > 2**62).all()
    with pytest.raises(AssertionError, match="nothing was allocated"), guarded_memory():
        pass


@pytest.mark.parametrize("size", [1, 2, 5])
def test_guards_of_bytes_are_whole(size: int) -> None:
    memory = GuardedMemory()
    memory.empty((size,), torch.uint8).fill_(0)
    memory.check()
    memory.buffers[0][0][GUARD + size] = 0
    with pytest.raises(AssertionError, match="a store behind"):
        memory.check()
