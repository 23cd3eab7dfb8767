"""The processes of a run: torchrun starts them, this joins them.

    torchrun --nproc_per_node=8 train/imagenet.py ...

Without torchrun the same script is a run of one process.
"""

from __future__ import annotations

import datetime
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from coded_resnext.data.loaders import STOP_SIGNALS
from coded_resnext.files import say

# One request may arrive twice: from the terminal or the batch system, and from torchrun.
SECONDS_OF_ONE_REQUEST = 1.0
# Seconds that a process waits for another one: of a slow disk or a long download, too.
TIMEOUT = 1800.0


class TrainingStopped(Exception):  # noqa: N818
    """A signal has ended the run; its folder holds the state after the last step.

    Args:
        signal_number: of the signal.
        message: what is said to the user.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(signal_number, message)
        self.signal_number, self.message = signal_number, message

    def __str__(self) -> str:
        return self.message

    @property
    def exit_code(self) -> int:
        """Returns the exit status for this reason: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signal_number


_entered: set[int] = set()
"""The descriptors to which this process's signals are written at present."""


class StopSignals:
    """Takes note of SIGTERM and SIGINT while it is entered; a second one ends the process at once.

    It ends it wherever it is: a thread of its own waits for the second one, since Python's handlers
    do not run while the main thread is in a library, such as in a sum over processes of which one
    has stopped. It may be entered within itself. Outside the main thread, where Python allows no
    handlers, it does nothing.

    Attributes:
        received: number of the signal that came first, 0 before.
    """

    def __init__(self) -> None:
        self.received = 0
        self._depth = 0
        self._former: dict[signal.Signals, Any] = {}
        self._former_wakeup = -1
        self._arrivals: socket.socket | None = None
        """What the numbers of signals are written to as they arrive; their thread reads them."""

    def __enter__(self) -> StopSignals:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self._former = {s: signal.signal(s, self._take_note) for s in STOP_SIGNALS}
            self._arrivals, read = socket.socketpair()
            self._arrivals.setblocking(False)
            self._former_wakeup = signal.set_wakeup_fd(
                self._arrivals.fileno(), warn_on_full_buffer=False
            )
            _entered.add(self._arrivals.fileno())
            self._ending = threading.Thread(target=_end_at_second, args=(read,), daemon=True)
            self._ending.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0 and self._arrivals is not None:
            signal.set_wakeup_fd(self._former_wakeup)
            for number, handler in self._former.items():
                signal.signal(number, handler)
            _entered.discard(self._arrivals.fileno())
            # Its thread reads what has arrived, and the end.
            self._arrivals.close()
            self._ending.join()
            self._arrivals, self._former = None, {}

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number


def _end_at_second(arrivals: socket.socket) -> None:
    """Ends the process at the second request among the signals that arrive."""
    first = None
    with arrivals:
        while content := arrivals.recv(1):
            if content[0] not in STOP_SIGNALS:
                continue
            now = time.monotonic()
            first = now if first is None else first
            if now - first > SECONDS_OF_ONE_REQUEST:
                # Without the clean-up of the interpreter, which the main thread may hold up.
                os._exit(128 + content[0])


def _keep_from_parent() -> None:
    """Keeps a forked child, such as a worker, from telling its parent of the child's signals."""
    if _entered:
        signal.set_wakeup_fd(-1)
        _entered.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_from_parent)


Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """This process and the others of its run."""

    rank: int = 0
    """Number of this process, counted from 0."""
    size: int = 1
    """Number of processes."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    signals: StopSignals = field(default_factory=StopSignals)

    @property
    def is_main(self) -> bool:
        """Returns whether this process writes the files and talks to the user."""
        return self.rank == 0

    @property
    def is_shared(self) -> bool:
        """Returns whether there are other processes."""
        return self.size > 1

    def on_main(self, function: Callable[[], Value]) -> Value:
        """Calls a function on the main process; its result, or its error, reaches all processes.

        All processes must call this. The result must be picklable.
        """
        result: Value | None = None
        error: Exception | None = None
        if self.is_main:
            try:
                result = function()
            except Exception as caught:
                error = caught
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def broadcast(self, value: Value) -> Value:
        """Returns the main process's value, on all processes."""
        if not self.is_shared:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Value) -> list[Value]:
        """Returns the values of all processes by rank, on all processes."""
        if not self.is_shared:
            return [value]
        values: list[Value | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def add(self, tensor: Tensor) -> Tensor:
        """Returns the sum over the processes, in place."""
        if self.is_shared:
            dist.all_reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """Returns the largest values over the processes, in place."""
        if self.is_shared:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor


@contextmanager
def training_session(device: str = "auto", *, timeout: float = TIMEOUT) -> Iterator[World]:
    """Joins the processes that torchrun has started, and leaves them in the end.

    From here on SIGTERM and SIGINT are taken note of, so that `fit` can save before it stops.

    Args:
        device: `"auto"` takes this process's GPU if there are any, and the CPU otherwise; or a
            device type such as `"cpu"` or `"cuda"`.
        timeout: seconds, above 0, after which a process that waits for another one gives up.

    Raises:
        ValueError: no such device, fewer GPUs than processes on this machine, or a time-out that
            is not above 0.
    """
    if not timeout > 0:
        raise ValueError(f"timeout: expected seconds above 0, got {timeout}")
    rank, size = _told("RANK", 0), _told("WORLD_SIZE", 1)
    target = _pick_device(device, _told("LOCAL_RANK", 0))
    if target.type == "cuda":
        torch.cuda.set_device(target)
    with StopSignals() as signals:
        if size > 1:
            # Objects and counts of the host go through gloo, whatever the device.
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo",
                timeout=datetime.timedelta(seconds=timeout),
            )
        try:
            yield World(rank, size, target, signals)
        except TrainingStopped:
            _leave()
            raise
        # After any other error the rest may wait in an operation that never ends; torchrun ends
        # them when this process has gone.
        _leave()


def _told(variable: str, default: int) -> int:
    """Returns a number that torchrun leaves in the environment; a ValueError names another text."""
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal():
        raise ValueError(f"{variable}: expected a number in the environment, got {text!r:.80}")
    return int(text)


def run_script(name: str, body: Callable[[], None]) -> int:
    """Runs the body of a training script and says in one sentence why it ended early.

    Args:
        name: of the script, before the sentence.
        body: the rest of the script.

    Returns:
        The exit status: 0; 1 for a step that was not finite, or another process that is gone; 2 for
        input at fault; 130 after SIGINT and 143 after SIGTERM.
    """
    rank = 0
    speaker = name
    try:
        rank = _told("RANK", 0)
        speaker = f"{name} (process {rank})" if rank else name
        body()
    except TrainingStopped as stopped:
        if not rank:
            say(f"\n{stopped}", file=sys.stderr)
        return stopped.exit_code
    except FloatingPointError as error:
        say(f"{speaker}: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        say(f"{speaker}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        # Gloo's come out of the backward pass without a class of their own.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0][:200]
        say(f"{speaker}: another process has ended, or gives no answer: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say(f"\n{speaker}: interrupted", file=sys.stderr)
        return 130
    return 0


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _pick_device(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device: expected a device such as cpu or cuda, got {device!r}"
        ) from error
    if target.type != "cuda":
        return target
    if not torch.cuda.is_available():
        raise ValueError("device: expected one that is here, got cuda without a usable GPU")
    if target.index is not None:
        return target
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected a GPU for each process, got {torch.cuda.device_count()} for process "
            f"{local_rank + 1} of this machine; choose a smaller --nproc_per_node"
        )
    return torch.device("cuda", local_rank)
