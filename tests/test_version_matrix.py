"""The versions that `make matrix` tries: those of setup.py, with rows that the docs show."""

from __future__ import annotations

import json
import re
from importlib import metadata

import pytest
import version_matrix
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from suite_runs import ROOT
from version_matrix import ENVIRONMENTS, TESTS, Environment, describe, last_uses, mismatches

PAIRS = [environment for environment in ENVIRONMENTS if not environment.options]
RESULTS = ROOT / "benchmarks" / "results" / "version_matrix.json"


def release(environment: Environment, name: str) -> Version:
    """The release that an environment asks for: 3.6 of `triton==3.6.*`."""
    wanted = dict(requirement.split("==") for requirement in environment.requirements)
    return Version(wanted[name].removesuffix(".*"))


def declared(name: str) -> SpecifierSet:
    """What setup.py asks for."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    found = re.findall(rf"""["']({name}[><=][^;"']*)""", text)
    assert len(found) == 1
    return Requirement(found[0]).specifier


def test_the_pairs_are_the_range_of_setup() -> None:
    torches = [release(pair, "torch") for pair in PAIRS]
    assert declared("torch") == SpecifierSet(f">={torches[0]}")
    # None is left out between the oldest and the newest.
    assert torches == [Version(f"2.{minor}") for minor in range(11, 11 + len(PAIRS))]
    tritons = [release(pair, "triton") for pair in PAIRS]
    after = f"{tritons[-1].major}.{tritons[-1].minor + 1}"
    assert declared("triton") == SpecifierSet(f">={tritons[0]},<{after}")
    assert tritons == sorted(tritons)


def test_the_installed_torch_asks_for_the_triton_of_its_pair() -> None:
    installed = Version(metadata.version("torch"))
    pairs = [p for p in PAIRS if release(p, "torch").release == installed.release[:2]]
    if not pairs:
        pytest.skip(f"torch {installed} is newer than the pairs")
    wanted = [Requirement(text) for text in metadata.requires("torch") or ()]
    tritons = [requirement for requirement in wanted if requirement.name == "triton"]
    if not tritons:
        pytest.skip(f"torch {installed} asks for no Triton")
    versions = {Version(s.version).release[:2] for s in tritons[0].specifier}
    assert versions == {release(pairs[0], "triton").release}


def test_the_tests_are_there() -> None:
    assert [path for path in TESTS if not (ROOT / path).exists()] == []


def test_an_environment_of_other_versions_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {"torch": "2.13.0+cpu", "triton": "3.9.0", "torchvision": "0.28.0+cpu", "numpy": None}
    assert list(mismatches(("torch==2.13.*", "torchvision==0.28.*"), there)) == []
    assert list(mismatches(("numpy==2.0.*",), there)) == ["numpy: expected 2.0.*, got None"]
    monkeypatch.setattr(version_matrix, "read_versions", lambda _python: there)
    arguments = "version_matrix --out no.json --only 2.13 --environment 2.13=nowhere"
    monkeypatch.setattr("sys.argv", arguments.split())
    with pytest.raises(SystemExit):
        version_matrix.main()
    assert "2.13: triton: expected 3.7.*, got 3.9.0" in capsys.readouterr().err


def test_a_shared_folder_is_removed_after_its_last_use() -> None:
    folders = {"2.11": True, "2.15": False, "2.15, Triton absent": True}
    chosen = [environment for environment in ENVIRONMENTS if environment.name in folders]
    assert last_uses(chosen) == list(folders.values())


def test_the_table_of_the_docs_is_that_of_the_results() -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert rows
    assert [describe(row) for row in rows if describe(row) not in text] == []
    for row in rows:
        environment = next(e for e in ENVIRONMENTS if e.name == row["name"])
        assert list(mismatches(environment.requirements, row["versions"])) == []
