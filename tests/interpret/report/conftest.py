"""What the tests of the report share: runs, and one browser for the pages made of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import Pages, chromium
from support.report_runs import Run, odd_run, thousand_run

from coded_resnext.interpret.report import gather, render


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run whose classes have odd names."""
    return odd_run(tmp_path_factory.mktemp("report") / "odd <b>run")


@pytest.fixture(scope="session")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a thousand classes."""
    return thousand_run(tmp_path_factory.mktemp("report") / "thousand")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One headless Chromium; skipped where there is none."""
    with chromium() as started:
        yield started


class Reports(Pages):
    """Reports of runs."""

    def __init__(self, browser: Any, folder: Path) -> None:
        super().__init__(browser)
        self.folder = folder

    def write(self, run_folder: Path) -> Path:
        """Make the page of a run, once."""
        path = self.folder / f"{run_folder.name}.html"
        if not path.exists():
            path.write_text(render(gather(run_folder)), encoding="utf-8")
        return path

    def open_run(self, run_folder: Path, **options: Any) -> Any:
        """The page of a run, ready to use."""
        return self.open(self.write(run_folder), **options)


@pytest.fixture(scope="module")
def pages(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """The pages of this session."""
    return Reports(browser, tmp_path_factory.mktemp("pages"))


@pytest.fixture
def page(pages: Reports, run: Run) -> Iterator[Any]:
    """The report of the run; nothing that a test does on it may bring an error or a request."""
    opened = pages.open_run(run.folder)
    yield opened
    opened.close()
    assert pages.complaints == []
