"""What holds for the whole suite: Triton's interpreter, and the tests that are left out.

The interpreter is chosen when a kernel is first imported, so here, for the whole process. What has
to be compiled is compiled in processes of its own, with a clean environment.

Tests marked `long` are left out unless `--all` is given, which `make test-all` does.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
# Processes that tests start find tests/support/ as the tests themselves do.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
)

# What a script starts in its background ignores Ctrl-C, and so would all processes of the tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LEFT_OUT = pytest.StashKey[int]()


@pytest.fixture(autouse=True)
def _fresh_compiler(request: pytest.FixtureRequest) -> None:
    """Code that one test's graph could not take would be left alone in the graphs of all others."""
    if "compil" in request.node.name:
        import torch

        torch.compiler.reset()


@pytest.fixture(scope="session", autouse=True)
def _processes_that_fork() -> None:
    """A child has none of its parent's threads, and must not wait for them.

    GNU's OpenMP does wait, unless it uses one thread; and a first backward pass behind some
    libraries' starts threads, without which no child could train.
    """
    import torch

    torch.ones((), requires_grad=True).backward()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said once a process, each test may hear; nor is another test's step replayed."""
    from coded_resnext.kernels import backend, replay

    replay.forget()
    monkeypatch.setattr(backend, "_SAID", set())
    backend.choose_passes.cache_clear()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked long too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    long = [] if config.option.all else [item for item in items if item.get_closest_marker("long")]
    config.stash[LEFT_OUT] = len(long)
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in set(long)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Every worker of pytest-xdist collects all tests; it tells the process that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    left_out = getattr(node, "workeroutput", {}).get("left_out", 0)
    node.config.stash[LEFT_OUT] = max(left_out, node.config.stash.get(LEFT_OUT, 0))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    left_out = config.stash.get(LEFT_OUT, 0)
    if left_out:
        terminalreporter.write_line(
            f"{left_out} long tests were left out: `make test-all`, or pytest with --all, runs them"
        )
