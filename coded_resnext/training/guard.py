"""Numbers that are not finite: found on the device, told to the host one step later.

A step's losses and the norm of its gradient become flags on the device. The flags, the largest over
all processes, keep the optimizer from touching the weights, without the host's knowing. The host
reads them while the device is at the next step, so that neither waits for the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .processes import World


class NonFiniteError(Exception):
    """A step gave NaN or infinity; the weights and the optimizer are those before it.

    Args:
        step: the step, counted from 0 over the whole run.
        terms: names of what was not finite, in the order of the computation.
        indices: positions of the images in the data set, of the processes where it came up.
    """

    def __init__(self, step: int, terms: Sequence[str], indices: Sequence[int]) -> None:
        super().__init__(f"step {step}: {', '.join(terms)} not finite")
        self.step, self.terms, self.indices = step, list(terms), list(indices)


@dataclass
class _Pending:
    """A step whose flags the host has not read."""

    step: int
    indices: Tensor
    flags: Tensor
    """On the host: of all processes, then of this one."""
    copied: torch.cuda.Event | None
    turn: int


class StepGuard:
    """Decides on the device whether a step counts, and carries a stop signal to all processes.

    Args:
        names: of the flags, in the order of the computation; the last two are the gradient's and
            the optimizer's.
        tensors: what a step changes outside the optimizer (running statistics, sums). After a
            step that is not finite they are put back.
        world: the processes; they share the flags.
    """

    def __init__(self, names: Sequence[str], tensors: Sequence[Tensor], world: World) -> None:
        self._names, self._world = list(names), world
        self._tensors = list(tensors)
        self._copies = [[tensor.clone() for tensor in self._tensors] for _ in range(2)]
        self._turn = 0
        self._pending: _Pending | None = None

    def begin(self) -> None:
        """Keeps what the coming step changes."""
        self._turn = 1 - self._turn
        copy_all(self._copies[self._turn], self._tensors)

    def post(self, step: int, bad: Tensor, stop: int, indices: Tensor) -> Tensor:
        """Shares the flags of a step.

        Args:
            step: counted from 0 over the whole run.
            bad: booleans, one for each name, on the device.
            stop: a signal that this process has received, or 0.
            indices: positions of the batch's images.

        Returns:
            A float32 scalar on the device: 1 keeps a fused optimizer from changing anything.
        """
        local = torch.cat([bad.new_full((1,), stop, dtype=torch.int32), bad.int()])
        shared = self._world.maximum(local.clone())
        both = torch.cat([shared, local])
        event = None
        if both.device.type == "cuda":
            flags = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
            flags.copy_(both, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        else:
            flags = both.cpu()
        self._pending = _Pending(step, indices, flags, event, self._turn)
        return shared[1:].amax().float()

    def settle(self) -> int:
        """Reads the flags of the step posted last, if it has not been done.

        Returns:
            The signal that some process had received by that step, or 0; the same on all.

        Raises:
            NonFiniteError: on all processes; what the step changed is put back.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return 0
        if pending.copied is not None:
            pending.copied.synchronize()
        values = pending.flags.tolist()
        half = len(self._names) + 1
        stop, shared, local = values[0], values[1:half], values[half + 1 :]
        if not any(shared):
            return int(stop)
        copy_all(self._tensors, self._copies[pending.turn])
        terms = [name for name, flag in zip(self._names, shared, strict=True) if flag]
        # Gradient and optimizer are those of all processes: only the losses tell whose images it
        # was.
        gathered = self._world.gather((any(local[:-2]), pending.indices.tolist()))
        at_fault = [indices for is_at_fault, indices in gathered if is_at_fault]
        named = at_fault or [indices for _, indices in gathered]
        raise NonFiniteError(pending.step, terms, [i for indices in named for i in indices])

    def kept(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns the values that some of the guarded tensors had at `begin`."""
        position = {id(tensor): index for index, tensor in enumerate(self._tensors)}
        return [self._copies[self._turn][position[id(tensor)]] for tensor in tensors]


@torch.no_grad()
def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies tensors pairwise, those of a type together."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in targets):
        chosen = [i for i, tensor in enumerate(targets) if tensor.dtype == dtype]
        torch._foreach_copy_([targets[i] for i in chosen], [sources[i] for i in chosen])
