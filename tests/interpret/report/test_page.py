"""The page as text: one file, nothing from afar, names that stay text, headline numbers."""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import json
import re
from typing import Any

import pytest
from support.report_runs import ODD_NAMES, Run

from coded_resnext.interpret.report import gather, render
from coded_resnext.interpret.report.page import tiles


@pytest.fixture(scope="module")
def content(run: Run) -> dict[str, Any]:
    """Of the run."""
    return gather(run.folder)


def test_nothing_is_loaded_from_anywhere(content: dict[str, Any]) -> None:
    page = render(content)
    assert re.findall(r"<(?:link|img|script|iframe)[^>]*(?:src|href)=\"(?!data:)", page) == []
    assert "@import" not in page
    assert re.findall(r"url\(", page) == []
    assert "default-src 'none'; img-src data:;" in page


def test_the_policy_allows_exactly_the_pages_own_style_and_script(content: dict[str, Any]) -> None:
    page = render(content)
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])
    for tag, name in (("style", "style-src"), ("script", "script-src")):
        text = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert len(text) == 1
        digest = base64.b64encode(hashlib.sha256(text[0].encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy


def test_names_and_settings_stay_text(content: dict[str, Any]) -> None:
    odd = copy.deepcopy(content)
    odd["title"] = odd["command"] = odd["config"]["data"] = "</title><script>alert(2)</script>"
    odd["missing"] = [{"part": "<b>", "why": "<img src=x onerror=alert(3)>", "remedy": None}]
    page = render(odd)
    assert page.count("<script") == 2
    assert "<img src=x" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["class_names"] == list(ODD_NAMES)
    assert "alert(2)" not in json.dumps(data)


def test_headline_numbers(run: Run, content: dict[str, Any]) -> None:
    found = {tile["name"]: tile["value"] for tile in tiles(content)}
    evaluation = run.evaluation
    assert found["test accuracy"] == "80.00 %"
    first = 100 * evaluation.early_decoding.blocks[0].accuracy
    assert found["decoded at the first coded block"] == f"{first:.1f} %"
    assert found["mean average precision"] == f"{evaluation.one_class.mean_average_precision:.3f}"
    assert found["parameters"] == f"{sum(p.numel() for p in run.model.parameters()):,}"


def test_only_the_parts_that_there_is_content_for_are_on_the_page(
    content: dict[str, Any],
) -> None:
    sections = set(re.findall(r'<section id="([a-z-]+)"', render(content)))
    assert sections == {
        "overview",
        "paths",
        "early-decoding",
        "removal",
        "classifiers",
        "early-exit",
        "codebooks",
        "training",
        "configuration",
    }
    bare = {**content, "evaluation": None, "summary": None, "pictures": None, "codebooks": []}
    bare |= {"training_log": None, "cost": None, "class_names": None, "block_codebooks": []}
    assert re.findall(r'<section id="([a-z-]+)"', render(bare)) == ["overview", "configuration"]


def test_the_same_content_makes_the_same_page(content: dict[str, Any]) -> None:
    assert render(content) == render(copy.deepcopy(content))
