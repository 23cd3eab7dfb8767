"""The documentation's site: no warning, no dead link, nothing from elsewhere, in a browser too."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from support.browser import chromium

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
# What a browser fetches by itself; an <a> waits for a click.
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src"}


class Links(HTMLParser):
    """What a page refers to, and the anchors that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[str, str]] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := values.get(key))}
        target = values.get(FETCHED.get(tag, "href" if tag == "a" else ""))
        # A page names its own address for search engines.
        if target is not None and values.get("rel") != "canonical":
            self.links.append((tag, target))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    # A quiet build counts no warnings, and fails at none.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert "WARNING" not in said
    return folder


def dead_links(site: Path) -> Iterator[str]:
    """What leads to no page, no anchor, or makes a browser ask another machine."""
    pages = {path: Links(path) for path in site.rglob("*.html")}
    for page, content in pages.items():
        # An error page is shown at any address, so that its links are absolute.
        if page.name == "404.html":
            continue
        for tag, link in content.links:
            target, anchor = urldefrag(unquote(link))
            if target.startswith("data:"):
                continue
            if "://" in target or target.startswith(("//", "mailto:")):
                if tag != "a":
                    yield f"{page.name}: fetches {link}"
                continue
            path = (page.parent / target).resolve() if target else page
            if not path.is_file():
                yield f"{page.name}: {link} leads nowhere"
            elif anchor and path in pages and anchor not in pages[path].anchors | {"__top"}:
                yield f"{page.name}: {link} has no such anchor"


def test_no_link_is_dead(site: Path) -> None:
    assert sorted(dead_links(site)) == []


@pytest.mark.parametrize(
    "planted",
    ["<a href='none.html'>", "<a href='index.html#none'>", "<script src='https://a.org/b.js'>"],
)
def test_a_planted_fault_is_seen(tmp_path: Path, planted: str) -> None:
    (tmp_path / "index.html").write_text(f"<p id='here'><a href='#here'>fine</a>{planted}")
    assert len(list(dead_links(tmp_path))) == 1


@pytest.mark.parametrize(
    "package", ["coded_resnext", "coded_resnext.kernels", "coded_resnext.interpret"]
)
def test_every_public_name_is_in_the_reference(site: Path, package: str) -> None:
    pages = [Links(path) for path in (site / "api").glob("*.html")]
    anchors = set().union(*(page.anchors for page in pages))
    exported = importlib.import_module(package).__all__
    assert {name for name in exported if f"{package}.{name}" not in anchors} == set()


def test_pages_fit_a_phone_and_a_search_finds_from_the_disk(site: Path) -> None:
    requests: list[str] = []
    with chromium() as browser:
        for page in (
            "index.html",
            "reproduce.html",
            "gallery.html",
            "api/networks.html",
            "commands.html",
        ):
            opened = browser.new_page(viewport={"width": 390, "height": 844})
            opened.on("request", lambda request: requests.append(request.url))
            opened.goto((site / page).as_uri())
            width = "document.documentElement.scrollWidth"
            assert opened.evaluate(width) <= 390, page
        opened = browser.new_page()
        opened.on("request", lambda request: requests.append(request.url))
        opened.goto((site / "index.html").as_uri())
        opened.locator(".md-search__input").click()
        opened.keyboard.type("early exit")
        opened.wait_for_selector(".md-search-result__item")
        assert opened.locator(".md-search-result__item").count() > 3
    assert [url for url in requests if not url.startswith(("file:", "data:", "about:"))] == []
