"""What the tests of the report share: runs, and one browser for the pages made of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import Run, odd_run, thousand_run

from coded_resnext.interpret.report import gather, render

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run whose classes have odd names."""
    return odd_run(tmp_path_factory.mktemp("report") / "odd <b>run")


@pytest.fixture(scope="session")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a thousand classes."""
    return thousand_run(tmp_path_factory.mktemp("report") / "thousand")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One headless Chromium; skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        # Chromium refuses to be root inside its sandbox.
        chromium = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Pages:
    """Opens reports, and collects what they should never do: errors, requests, dialogs."""

    def __init__(self, browser: Any, folder: Path) -> None:
        self.browser, self.folder = browser, folder
        self.complaints: list[str] = []

    def write(self, run_folder: Path) -> Path:
        """Make the page of a run, once."""
        path = self.folder / f"{run_folder.name}.html"
        if not path.exists():
            path.write_text(render(gather(run_folder)), encoding="utf-8")
        return path

    def open(self, run_folder: Path, **options: Any) -> Any:
        """The page of a run, ready to use."""
        page = self.browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}"))
        page.on("request", self._request)
        page.goto(self.write(run_folder).as_uri())
        if options.get("java_script_enabled", True):
            page.wait_for_selector("html[data-ready]", state="attached")
        return page

    def _request(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:")) or request.url.count("file:") > 1:
            self.complaints.append(f"request: {request.url}")


@pytest.fixture(scope="session")
def pages(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """The pages of this session."""
    return Pages(browser, tmp_path_factory.mktemp("pages"))


@pytest.fixture
def page(pages: Pages, run: Run) -> Iterator[Any]:
    """The report of the run; nothing that a test does on it may bring an error or a request."""
    opened = pages.open(run.folder)
    yield opened
    opened.close()
    assert pages.complaints == []
