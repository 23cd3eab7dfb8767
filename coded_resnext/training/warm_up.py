"""Compiling kernels before the first step instead of in it, and the calls that need them.

`warm_up` does for one backend what `choose_backend` (ways.py) does for each. Both call a copy of
the network, after what is missing of the kernels of its GPU was compiled, on all cores.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from coded_resnext.files import say
from coded_resnext.kernels.backend import backends
from coded_resnext.kernels.build.build import BuildError, build, missing
from coded_resnext.kernels.checks import typed
from coded_resnext.kernels.layout import architecture
from coded_resnext.kernels.prebuilt import default_folder, folders
from coded_resnext.models.layers import copy_of

# Any number of samples launches the same kernels; BatchNorm needs more than one.
SAMPLES = 2

Loss = Callable[[nn.Module, Tensor], Tensor]


def build_kernels(device: torch.device) -> None:
    """Compiles what was not built of the kernels of a GPU, and says so; elsewhere it does nothing.

    Where they cannot be compiled now, or were to be in a folder that the user names, each is when
    it is first launched.
    """
    if device.type != "cuda" or backends()["triton"] is not None:
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    arch, folder = architecture(index), default_folder()
    if not arch.startswith("sm") or folder is None or folders() != [folder]:
        return
    try:
        if not missing([arch], folder):
            return
        with _alone(folder):
            # Another process may have built them meanwhile.
            if missing([arch], folder):
                say(f"compiling the kernels for {arch}, once, into {folder}", file=sys.stderr)
                build([arch], folder)
    except (BuildError, OSError) as error:
        say(f"they are compiled as they are needed instead: {error}", file=sys.stderr)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one of several processes build in a folder, while the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        # Windows has no such locks.
        with suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Calls:
    """Calls of a copy of a network: in training with gradients, in evaluation without.

    Args:
        twin: the copy, which is changed.
        images: of each call.
        loss: from the copy and the images to a scalar, in training; by default the mean square of
            what the copy returns.
        exact: whether to compute in float32 whatever autocast says.
    """

    def __init__(
        self, twin: nn.Module, images: Tensor, loss: Loss | None, *, exact: bool = False
    ) -> None:
        self.twin, self.images, self.exact = twin, images.detach(), exact
        self.loss = loss or (lambda network, batch: network(batch).float().square().mean())
        if exact:
            self.twin, self.images = twin.float(), self.images.float()

    def __call__(self, count: int = 1) -> Tensor:
        """Returns the loss of the last call, in evaluation what the copy returned."""
        kind, training = self.images.device.type, self.twin.training
        plain = torch.autocast(kind, enabled=False) if self.exact else nullcontext()
        for _ in range(count):
            with plain, torch.set_grad_enabled(training):
                if training:
                    self.twin.zero_grad(set_to_none=True)
                    result = self.loss(self.twin, self.images)
                    result.backward()
                else:
                    result = self.twin(self.images)
        return result


@dataclass(frozen=True)
class WarmUp:
    """Counts of the kernels that a warm-up found or compiled, and its time."""

    cache_hits: int
    """Kernels of this package that were there: prebuilt, or in Triton's cache."""
    compiled: int
    """Kernels that had to be compiled, one after the other: those of other sizes than the paper's
    networks have, or all of them where ninja could not."""
    seconds: float
    """Wall time of the warm-up, in seconds."""


@typed
def warm_up(
    model: nn.Module,
    images: Tensor,
    loss: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> WarmUp:
    """Runs one step on a copy of a model, so that all kernels of a real one are there afterwards.

    What was never built for this GPU is compiled first, in parallel. The model, its statistics and
    gradients, and the random numbers to come stay as they are. Call it in the mode (`train` or
    `eval`) and under the autocast of the calls to come; in evaluation they are without gradients.
    What depends on the number of samples, such as cuDNN's choice of algorithms, is not warmed up.

    Args:
        model: any, not yet wrapped for several processes.
        images: `[B, C, H, W]` as in a step, of which two are used; B at least 2.
        loss: from the copy and the images to a scalar, for losses with kernels of their own; by
            default the mean square of the logits.

    Raises:
        ValueError: fewer than two images.
    """
    if images.ndim != 4 or len(images) < SAMPLES:
        raise ValueError(f"images: expected [2 or more, C, H, W], got {tuple(images.shape)}")
    start = time.perf_counter()
    build_kernels(images.device)
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices), watched() as hits:
        Calls(copy_of(model), images[:SAMPLES], loss)()
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
    return WarmUp(hits.count(True), hits.count(False), time.perf_counter() - start)


@contextmanager
def watched() -> Iterator[list[bool]]:
    """Yields a list that grows by an entry for each of our kernels that Triton is asked for.

    True where it was found compiled. A kernel that the process has launched before is not asked
    for again.
    """
    hits: list[bool] = []
    try:
        from triton import knobs
    except ImportError:
        yield hits
        return
    before = knobs.compilation.listener

    def listen(**event: object) -> None:
        module = getattr(getattr(event["src"], "fn", None), "__module__", "")
        if module.startswith("coded_resnext."):
            hits.append(bool(event["cache_hit"]))
        if before is not None:
            before(**event)

    knobs.compilation.listener = listen
    try:
        yield hits
    finally:
        knobs.compilation.listener = before
