"""Signals: noted once, doubled requests forgiven, the second one final."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from coded_resnext.data.loaders import ignore_signals
from coded_resnext.training.processes import SECONDS_OF_ONE_REQUEST, StopSignals, TrainingStopped

FORMER = (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def status_of(body: object) -> int:
    """How a forked child ends that runs the body and would return 7."""
    child = os.fork()
    if child == 0:
        try:
            body()  # type: ignore[operator]
        finally:
            os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_first_signal_is_noted_and_handlers_come_back() -> None:
    with StopSignals() as outer, outer as inner:
        assert not inner.received
        signal.raise_signal(signal.SIGINT)
        assert inner.received == signal.SIGINT
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == FORMER


def test_a_request_that_arrives_twice_is_one() -> None:
    """The terminal sends it to the whole group, and torchrun once more."""
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process(number: signal.Signals) -> None:
    def body() -> None:
        with StopSignals():
            signal.raise_signal(signal.SIGTERM)
            time.sleep(1.05)
            signal.raise_signal(number)

    assert status_of(body) == 128 + number


def test_a_second_signal_ends_a_process_inside_a_library() -> None:
    """Python's handlers do not run while the main thread is in C, as in a sum over processes."""

    def body() -> None:
        pid = os.getpid()

        def send() -> None:
            for _ in range(2):
                time.sleep(SECONDS_OF_ONE_REQUEST + 0.1)
                os.kill(pid, signal.SIGTERM)

        with StopSignals():
            threading.Thread(target=send, daemon=True).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 3 * 10**7)

    assert status_of(body) == 143


def test_a_forked_child_does_not_tell_its_parent_of_signals() -> None:
    def body() -> None:
        with StopSignals():
            for number in (signal.SIGTERM, signal.SIGINT):
                # The child's own handlers take note of it.
                assert status_of(lambda number=number: signal.raise_signal(number)) == 7
                time.sleep(SECONDS_OF_ONE_REQUEST + 0.1)

    assert status_of(body) == 7


def test_workers_survive_a_signal_to_the_group() -> None:
    def body() -> None:
        ignore_signals(3)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    assert status_of(body) == 7


def test_outside_the_main_thread_it_does_nothing() -> None:
    found: list[int] = []

    def body() -> None:
        with StopSignals() as signals:
            found.append(signals.received)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [0]


def test_exit_codes() -> None:
    assert TrainingStopped(signal.SIGTERM, "x").exit_code == 143
    assert TrainingStopped(signal.SIGINT, "x").exit_code == 130
    assert str(TrainingStopped(signal.SIGINT, "stopped: why")) == "stopped: why"


@pytest.mark.long
@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 0)])
def test_terminated_at_a_random_moment_short(tmp_path: Path, processes: int, workers: int) -> None:
    """The long version is `make torture`."""
    # In a process that has done nothing else: what libraries have started cannot be forked.
    code = (
        "import dataclasses, json, pathlib, sys; from torture.signals import terminate_forked; "
        "made = terminate_forked(pathlib.Path(sys.argv[1]), times=1, processes=int(sys.argv[2]), "
        "workers=int(sys.argv[3]), seed=0); print(json.dumps(dataclasses.asdict(made)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "runs"), str(processes), str(workers)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    made = json.loads(result.stdout.splitlines()[-1])
    assert [made[name] for name in ("tried", "clean", "current", "same_bits")] == [1] * 4
    assert made["slowest"] < 10
