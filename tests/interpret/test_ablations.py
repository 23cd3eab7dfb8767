"""Ablations: what each changes and nothing else, paired differences, and the command."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.small_networks import make_data, make_network

from coded_resnext import Codebook, create_model
from coded_resnext.interpret import evaluate
from coded_resnext.interpret.ablations import (
    ABLATIONS,
    BASE,
    COLUMNS,
    Ablation,
    find,
    markdown,
    measure,
    near_codebook,
    summarize,
    vary,
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
    same = vary(base, named(BASE), seed=7)
    assert all(
        torch.equal(a, b) for a, b in zip(same.parameters(), reference.parameters(), strict=True)
    )
    assert same.config == base.config
    for ablation in ABLATIONS:
        model = vary(base, ablation, seed=7)
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
        name: [stage["active"] for stage in vary(base, named(name), seed=0).config["stages"]]
        for name in ("plain twin", "fewer active branches", "more active branches")
    }
    assert actives == {
        "plain twin": [10, 10, 10],
        "fewer active branches": [10, 3, 2],
        "more active branches": [10, 7, 4],
    }
    assert vary(base, named("plain twin"), seed=0).coded_blocks == []


def test_settings_outside_the_configuration_are_kept(base):
    model = create_model("coded_resnext_digits")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.25
    for name in (BASE, "concatenation", "plain twin"):
        varied = vary(model, named(name), seed=0)
        momenta = {m.momentum for m in varied.modules() if isinstance(m, torch.nn.BatchNorm2d)}
        assert momenta == {0.25}


def test_near_codewords():
    book = near_codebook(Codebook.shipped(10, 10, 3))
    assert book.min_distance == 2
    assert set(book.column_loads) == {3}
    assert (book.active, book.words[9]) == (3, "1100000001")
    with pytest.raises(ValueError, match="expected at most as many classes as branches"):
        near_codebook(Codebook.shipped(100, 20, 4))


def test_measures_are_those_of_the_evaluation():
    network = make_network()
    found = evaluate(network, None, make_data(network, 50, seed=1), repeats=1)
    row = measure(found)
    assert set(row) == set(COLUMNS)
    assert row["accuracy"] == 0.8
    assert row["early decoding, last block"] == found.early_decoding.block_accuracy[2]
    assert row["one-class average precision"] == found.one_class.mean_average_precision
    removal = found.removal
    worst = min(block.inactive.accuracy[-1] for block in removal.blocks)
    assert row["points without inactive branches, worst block"] == pytest.approx(
        100 * (worst - 0.8)
    )
    first = removal.blocks[0].active.accuracy[-1]
    assert row["points without active branches, first block"] == pytest.approx(100 * (first - 0.8))


def test_comparison_is_seed_by_seed():
    base = {0: {"accuracy": 0.90}, 1: {"accuracy": 0.94}, 2: {"accuracy": 0.92}}
    other = {0: {"accuracy": 0.91}, 2: {"accuracy": 0.96}, 5: {"accuracy": 0.5}}
    found = summarize({BASE: base, "other": other, "new": {7: {"accuracy": 0.3}}})
    summary = found["other"]["accuracy"]
    assert summary.seeds == (0, 2, 5)
    assert summary.mean == pytest.approx(statistics.mean([0.91, 0.96, 0.5]))
    assert summary.deviation == pytest.approx(statistics.stdev([0.91, 0.96, 0.5]))
    assert summary.difference == pytest.approx((0.01 + 0.04) / 2)
    assert summary.difference_deviation == pytest.approx(statistics.stdev([0.01, 0.04]))
    assert found[BASE]["accuracy"].difference is None
    assert found["new"]["accuracy"].difference is found["new"]["accuracy"].deviation is None
    lines = markdown(found).splitlines()
    assert lines[2].startswith("| base | 3 | 92.00 ± 2.00 |")
    assert "(+2.50 ± 2.12)" in lines[3]
    assert lines[4].startswith("| new | 1 | 30.00 ± ? |")


def test_names():
    assert [one.name for one in find(["exponent 1"])] == [BASE, "exponent 1"]
    assert find(None) == list(ABLATIONS)
    with pytest.raises(ValueError, match=r"rows: expected some of base, .*; got 'exponent 7'"):
        find(["exponent 7"])


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
    empty = command(tmp_path, "--table", "--seeds", "4")
    assert empty.returncode == 2
    assert "holds no finished run" in empty.stderr
