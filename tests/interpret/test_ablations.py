"""Ablations: what each changes and nothing else, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.script_runs import run_here

from coded_resnext import Codebook, create_model
from coded_resnext.interpret.ablations import (
    ABLATIONS,
    BASE,
    Ablation,
    ablated_network,
    near_codebook,
    select_ablations,
)

SCRIPT = Path(__file__).parents[2] / "train" / "ablations.py"


@pytest.fixture(scope="module")
def base():
    """The digits network."""
    return create_model("coded_resnext_digits")


def named(name: str) -> Ablation:
    return {ablation.name: ablation for ablation in ABLATIONS}[name]


def test_every_ablation_changes_what_it_says(base):
    torch.manual_seed(7)
    reference = create_model("coded_resnext_digits")
    same = ablated_network(base, named(BASE), seed=7)
    assert all(
        torch.equal(a, b) for a, b in zip(same.parameters(), reference.parameters(), strict=True)
    )
    assert same.config == base.config
    for ablation in ABLATIONS:
        model = ablated_network(base, ablation, seed=7)
        differing = {key for key in base.config if model.config[key] != base.config[key]}
        expected = set(ablation.model) | ({"stages"} if ablation.ratios else set())
        assert differing == expected, ablation.name
        assert (model.stage_codebooks == base.stage_codebooks) == (
            ablation.ratios is None and not ablation.near_codewords
        )
        assert bool(ablation.training or differing or ablation.near_codewords) == (
            ablation.name != BASE
        )
    actives = {
        name: [
            stage["active"] for stage in ablated_network(base, named(name), seed=0).config["stages"]
        ]
        for name in ("plain twin", "fewer active branches", "more active branches")
    }
    assert actives == {
        "plain twin": [10, 10, 10],
        "fewer active branches": [10, 3, 2],
        "more active branches": [10, 7, 4],
    }
    assert ablated_network(base, named("plain twin"), seed=0).coded_blocks == []


def test_settings_outside_the_configuration_are_kept(base):
    model = create_model("coded_resnext_digits")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.25
    for name in (BASE, "concatenation", "plain twin"):
        varied = ablated_network(model, named(name), seed=0)
        momenta = {m.momentum for m in varied.modules() if isinstance(m, torch.nn.BatchNorm2d)}
        assert momenta == {0.25}


def test_near_codewords():
    book = near_codebook(Codebook.shipped(10, 10, 3))
    assert book.min_distance == 2
    assert set(book.column_loads) == {3}
    assert (book.active, book.words[9]) == (3, "1100000001")
    with pytest.raises(ValueError, match="expected at most as many classes as branches"):
        near_codebook(Codebook.shipped(100, 20, 4))


def test_names():
    assert [one.name for one in select_ablations(["exponent 1"])] == [BASE, "exponent 1"]
    assert select_ablations(None) == list(ABLATIONS)
    with pytest.raises(ValueError, match=r"rows: expected some of base, .*; got 'exponent 7'"):
        select_ablations(["exponent 7"])


def command(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(SCRIPT), "digits", "--out", str(out), "--epochs", "1", *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_the_command_runs_what_is_missing(tmp_path):
    rows = ("--rows", "concatenation", "--seeds", "3")
    first = command(tmp_path, *rows)
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("epoch 1/1") == 2
    assert "| concatenation | 1 |" in first.stdout
    content = json.loads((tmp_path / "ablations.json").read_text())
    summary = json.loads((tmp_path / "concatenation-3" / "summary.json").read_text())
    assert content["runs"]["concatenation"]["3"] == summary["measures"]
    assert (tmp_path / "base-3" / "evaluation.json").exists()
    again = command(tmp_path, *rows)
    assert again.stderr.count("epoch 1/1") == 0
    assert again.stdout == first.stdout


def test_a_folder_without_runs_has_no_table(tmp_path):
    empty = run_here(SCRIPT, "digits", "--out", tmp_path, "--table", "--seeds", 4)
    assert empty.returncode == 2
    assert "holds no finished run" in empty.stderr
