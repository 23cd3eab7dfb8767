"""Tensors of more than 2^31 elements, of which little is there."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


class Holes:
    """Memory that is reserved and not there until it is touched, as 1-D tensors.

    A tensor's storage ends after `count` elements, however far a kernel reaches behind it: the
    interpreter copies storages.
    """

    def __init__(self, elements: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        # Python names the last flag from 3.13 on; without it Linux may want the whole in advance.
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        self.memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)

    def at(self, offset: int, count: int = 1) -> Tensor:
        """Elements from `offset` on."""
        start = offset * self.dtype.itemsize
        return torch.frombuffer(self.memory, dtype=self.dtype, count=count, offset=start)
