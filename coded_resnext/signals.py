"""SIGTERM and SIGINT in training: the step is finished and saved before the process ends."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# One request may arrive twice: from the terminal or the batch system, and from torchrun.
SECONDS_OF_ONE_REQUEST = 1.0


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
        """What a process that ends for this reason returns: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signal_number


class StopSignals:
    """Takes note of SIGTERM and SIGINT while it is entered; a second one ends the process at once.

    It may be entered within itself. Outside the main thread, where Python allows no handlers, it
    does nothing.

    Attributes:
        received: number of the signal that came first, 0 before.
    """

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0
        self._depth = 0
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self._former = {s: signal.signal(s, self._take_note) for s in STOP_SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._former.items():
                signal.signal(number, handler)
            self._former = {}

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._received_at = number, now
        elif now - self._received_at > SECONDS_OF_ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def ignore_signals(worker: int = 0) -> None:
    """Makes a data loader's worker survive a signal to the whole process group.

    The training process needs it for the step that it finishes. For `DataLoader(worker_init_fn=)`.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
