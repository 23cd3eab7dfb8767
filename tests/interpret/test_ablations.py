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
from coded_resnext.interpret.comparing import (
    ABLATIONS,
    BASE,
    Ablation,
    ablated_network,
    measures,
    near_codebook,
    select_ablations,
)
from coded_resnext.interpret.results import load_evaluation

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
        keys = base.config.keys() | model.config.keys()
        differing = {key for key in keys if model.config.get(key) != base.config.get(key)}
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
    measured = measures(load_evaluation(tmp_path / "concatenation-3"))
    assert content["runs"]["concatenation"]["3"] == measured
    assert summary["test_accuracy"] == measured["accuracy"]
    assert (tmp_path / "base-3" / "evaluation.json").exists()
    again = command(tmp_path, *rows)
    assert again.stderr.count("epoch 1/1") == 0
    assert again.stdout == first.stdout


def test_a_folder_without_runs_has_no_table(tmp_path):
    empty = run_here(SCRIPT, "digits", "--out", tmp_path, "--table", "--seeds", 4)
    assert empty.returncode == 2
    assert "holds no finished run" in empty.stderr


# The study of CIFAR-100 as a CPU can do it: a small network, and few images, which are made up.
TINY = (
    *("--model", "coded_resnext17_10x4d", "--repeats", "1"),
    *("--dataset", "synthetic", "--train-images", "40", "--test-images", "30", "--epochs", "1"),
    *("--img-size", "8", "--batch-size", "20", "--threshold-images", "20", "--workers", "0"),
)


def test_the_study_of_cifar100_is_the_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Figures 5 and 6: mu, and p_drop, each varied alone in the published recipe."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import ablations
    import reproduce

    study = ablations.STUDIES["cifar100"]
    runs = reproduce.plan_runs(study.flags, study.rows, [1], tmp_path)
    assert {run.command.recipe.model.model for run in runs} == {"coded_resnext29_20x6d"}
    assert {run.command.recipe.training.total_epochs for run in runs} == {300}
    weights = [run.command.recipe.training.coding_weight for run in runs]
    assert sorted(weights) == [0, 1, 4, 6, 6, 6, 10, 20]
    dropped = [run.ablation.model.get("drop_branches", 0.1) for run in runs]
    assert sorted(dropped) == [0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2]
    [masked] = reproduce.plan_runs(study.flags, ["gradients masked"], [1], tmp_path)[1:]
    training = masked.command.recipe.training
    assert (training.mask_gradients, training.coding_weight) == (True, 0.0)
    refused = run_here(SCRIPT, "digits", "--coding-weight", 3, "--out", tmp_path)
    assert refused.returncode == 2
    assert "unrecognized arguments: --coding-weight 3" in refused.stderr


@pytest.mark.long
def test_the_study_of_cifar100_runs(tmp_path: Path):
    words = [sys.executable, SCRIPT, "cifar100", "--out", tmp_path, "--seeds", 0, *TINY]
    words += ["--rows", "gradients masked"]
    result = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    *_, base, masked = result.stdout.splitlines()
    assert base.startswith("| base | 1 | ")
    assert masked.startswith("| gradients masked | 1 | ")
    runs = (load_evaluation(tmp_path / name) for name in ("base-0", "gradients-masked-0"))
    assert len({run.weights_sha256 for run in runs}) == 2
