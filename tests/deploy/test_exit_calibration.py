"""Margins chosen by hand on small tables, and on a network what was promised."""

from __future__ import annotations

import pytest
import torch
from support.small_networks import make_data, make_network

from coded_resnext import EarlyExit, ExitScores, calibrate, exit_scores
from coded_resnext.deploy.early_exit import predict_early


def make_scores(decoded, margins, final, targets):
    return ExitScores(
        torch.tensor(decoded), torch.tensor(margins), torch.tensor(final), torch.tensor(targets)
    )


# Five samples of class 0, two coded blocks. Behind the first block sample 2 would be lost (the
# classifier is right), and sample 4 is wrong either way.
SCORES = make_scores(
    decoded=[[0, 0], [0, 0], [1, 0], [0, 0], [1, 1]],
    margins=[[0.9, 0.9], [0.8, 0.9], [0.7, 0.9], [0.6, 0.9], [0.5, 0.9]],
    final=[0, 0, 0, 0, 1],
    targets=[0, 0, 0, 0, 0],
)


@pytest.mark.parametrize(
    ("loss", "margin", "accuracy"), [(0.0, 0.8, 0.8), (0.19, 0.8, 0.8), (0.2, 0.5, 0.6)]
)
def test_the_lowest_margin_within_the_limit(loss, margin, accuracy):
    criterion = calibrate(SCORES, loss)
    # The last coded block lets nothing go.
    assert criterion.margins == (pytest.approx(margin), None)
    assert SCORES.accuracy() == pytest.approx(0.8)
    assert SCORES.accuracy(criterion) == pytest.approx(accuracy)


def test_exits_of_the_table():
    assert SCORES.exits(calibrate(SCORES, 0.0)).tolist() == [0, 0, 2, 2, 2]
    assert SCORES.exits(EarlyExit((0.9, 0.0))).tolist() == [0, 1, 1, 1, 1]
    assert SCORES.exits(EarlyExit((0.0, 0.0), agreement=True)).tolist() == [1, 1, 2, 1, 1]


def test_a_tie_with_a_lost_sample_stays():
    scores = make_scores([[0, 0], [1, 0]], [[0.5, 1.0], [0.5, 1.0]], [0, 0], [0, 0])
    assert calibrate(scores, 0.0).margins == (None, None)
    assert calibrate(scores, 0.5).margins == (0.5, None)


def test_agreement_starts_at_the_second_block():
    scores = make_scores(
        decoded=[[0, 0, 0], [1, 0, 0], [1, 1, 0]],
        margins=[[0.9, 0.9, 0.9], [0.9, 0.8, 0.9], [0.9, 0.7, 0.9]],
        final=[0, 0, 0],
        targets=[0, 0, 0],
    )
    # Sample 1 does not agree; sample 2 agrees on the wrong class.
    criterion = calibrate(scores, 0.0, agreement=True)
    assert criterion.margins == (None, pytest.approx(0.9), None)
    assert scores.exits(criterion).tolist() == [1, 3, 3]


def test_what_was_lost_counts_for_later_blocks():
    """One of four may be lost, and the first block uses that up."""
    scores = make_scores(
        decoded=[[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]],
        margins=[[0.9, 0.9, 0.9], [0.1, 0.9, 0.9], [0.2, 0.8, 0.9], [0.3, 0.95, 0.9]],
        final=[0, 0, 0, 0],
        targets=[0, 0, 0, 0],
    )
    criterion = calibrate(scores, 0.25)
    assert criterion.margins == (pytest.approx(0.2), None, None)
    assert scores.accuracy(criterion) == 0.75


def test_scores_say_what_predict_early_does():
    network = make_network().double()
    data = make_data(make_network(), 60, seed=5)
    loader = [(images, targets) for images, targets in data]
    scores = exit_scores(network, loader)
    calibrated = calibrate(scores, 0.1)
    assert any(margin is not None for margin in calibrated.margins)
    # Margins are those of an image, which in another batch may be rounded otherwise.
    criterion = EarlyExit(tuple(m if m is None else m - 1e-9 for m in calibrated.margins))
    assert torch.equal(scores.exits(criterion), scores.exits(calibrated))
    found = predict_early(network, data.images.double(), criterion)
    assert torch.equal(found.exit_blocks, scores.exits(criterion))
    accuracy = float((found.classes == data.targets).double().mean())
    assert accuracy == scores.accuracy(criterion)
    assert scores.accuracy() - accuracy <= 0.1 + 1e-9
    halves = [exit_scores(network, loader[:2]), exit_scores(network, loader[2:])]
    joined = ExitScores.joined(halves)
    # The same batches: the same instructions on the same data.
    assert torch.equal(joined.margins, scores.margins)
    assert torch.equal(joined.targets, data.targets)


def test_bad_arguments():
    for loss in (-0.1, 1.0):
        with pytest.raises(ValueError, match="max_accuracy_loss: expected a share"):
            calibrate(SCORES, loss)
    with pytest.raises(ValueError, match="loader: expected at least one batch"):
        exit_scores(make_network(), [])
    with pytest.raises(ValueError, match="expected evaluation mode"):
        exit_scores(make_network().train(), [])
