"""Runs over seeds beside each other: measures, means, deviations, differences seed by seed."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
from support.small_networks import make_data, make_network

from coded_resnext.interpret import evaluate
from coded_resnext.interpret.comparing import (
    BASE,
    MEASURES,
    FinishedRun,
    ablation_table,
    accuracy_table,
    best_run,
    mean_and_deviation,
    measures,
    summarize,
)


def test_measures_are_those_of_the_evaluation():
    network = make_network()
    found = evaluate(network, None, make_data(network, 50, seed=1), repeats=1)
    row = measures(found)
    assert set(row) == set(MEASURES)
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
    lines = ablation_table(found).splitlines()
    assert lines[2].startswith("| base | 3 | 92.00 ± 2.00 |")
    assert "(+2.50 ± 2.12)" in lines[3]
    assert lines[4].startswith("| new | 1 | 30.00 ± ? |")


def test_tables_over_seeds():
    network = make_network()
    evaluation = evaluate(network, None, make_data(network, 50, seed=1), repeats=1)

    def run(row, seed, accuracy):
        whole = dataclasses.replace(evaluation.classification, accuracy=accuracy)
        changed = dataclasses.replace(evaluation, classification=whole)
        return FinishedRun(row, seed, changed, 100.0 + seed, 50.0, 1000.0 + seed)

    runs = [run("base", 0, 0.5), run("base", 1, 0.6), run("other", 0, 0.55), run("other", 1, 0.61)]
    lines = accuracy_table(runs, {"base": 94.41}).splitlines()
    assert lines[2] == "| base | 94.41 | 55.00 ± 7.07 |  | 0, 1 | 100 ± 1 | 50 ± 0 | 1001 |"
    assert lines[3] == "| other |  | 58.00 ± 4.24 | +3.00 ± 2.83 | 0, 1 | 100 ± 1 | 50 ± 0 | 1001 |"
    assert best_run(runs) is runs[3]


def test_a_mean_says_its_deviation_where_there_is_one():
    assert mean_and_deviation([0.5, 0.6], 100, 1) == "55.0 ± 7.1"
    assert mean_and_deviation([0.5], 100, 1, sign="+") == "+50.0 ± ?"
    assert mean_and_deviation([], 1, 0) == ""
