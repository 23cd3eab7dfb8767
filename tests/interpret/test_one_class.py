"""One-class classifiers against the golden network and scikit-learn."""

from __future__ import annotations

import json
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    precision_recall_curve,
    precision_score,
    recall_score,
)
from support.helpers import assert_alike, below, load_golden, relative_error
from support.small_networks import make_data

from coded_resnext.data.batches import batches
from coded_resnext.interpret import one_class, score_classes
from coded_resnext.interpret.evaluation import to_plain
from coded_resnext.interpret.one_class import (
    _draw_pairs,
    best_threshold,
    count_scores,
    paper_negatives,
    sweep,
)
from coded_resnext.models.published import published_model


def scores_by_keep(model, images):
    with torch.no_grad():
        columns = [model(images, keep=index)[:, index] for index in range(model.num_classes)]
    return torch.stack(columns, 1)


def test_scores_of_the_golden_network():
    meta, golden = load_golden("net_cifar10")
    model = published_model(below(golden, "state."), meta["architecture"])
    scored = score_classes(model, batches(golden["x"], golden["targets"], 2), "test")
    scores = torch.stack([torch.tensor(scored.of_class(k)[0]) for k in range(10)], 1)
    index = int(golden["single_class"])
    assert relative_error(scores[:, index], golden["single_class_logits"][:, index]) < 1e-10
    assert relative_error(scores, scores_by_keep(model.eval(), golden["x"])) < 1e-10
    assert torch.equal(scored.targets, golden["targets"])


@pytest.mark.long
def test_numbers_of_scikit_learn(network, data):
    train = make_data(network, 70, seed=2)
    result = one_class(network, train, data)
    # A threshold is the score of an image, of which every bit counts: by the same function.
    scored = [score_classes(network, loader, "test") for loader in (train, data)]
    train_scores, test_scores = (
        np.stack([scores.of_class(k)[0] for k in range(4)], 1) for scores in scored
    )
    assert_alike(torch.from_numpy(test_scores), scores_by_keep(network, data.images))
    for index, found in enumerate(result.classifiers):
        learned, wanted = (train.targets == index).numpy(), (data.targets == index).numpy()
        # The best threshold by trying all of them, lowest first.
        candidates = np.unique(train_scores[:, index])
        tried = [f1_score(learned, train_scores[:, index] >= t) for t in candidates]
        assert found.threshold == candidates[int(np.argmax(tried))]
        said = test_scores[:, index] >= found.threshold
        assert found.precision == precision_score(wanted, said, zero_division=0)
        assert found.recall == recall_score(wanted, said)
        assert found.f1 == f1_score(wanted, said)
        expected = average_precision_score(wanted, test_scores[:, index])
        assert found.average_precision == pytest.approx(expected, rel=1e-12)
        # The area under the stored points is the average precision, though points are left out.
        recall, precision = np.array(found.curve.recall), np.array(found.curve.precision)
        full = precision_recall_curve(wanted, test_scores[:, index])
        assert set(zip(precision, recall, strict=True)) <= set(zip(*full[:2], strict=True))
        assert (np.diff(recall) <= 0).all()
        assert (recall[0], recall[-1], precision[-1]) == (1, 0, 1)
        assert found.class_name == network.class_names[index]
        assert (found.positives, found.negatives) == (wanted.sum(), (~wanted).sum())
    values = [one.average_precision for one in result.classifiers]
    assert result.mean_average_precision == pytest.approx(np.mean(values))
    assert len(set(values)) == 4


def test_threshold_is_best_where_it_was_chosen(network, data):
    scores = scores_by_keep(network, data.images).numpy()
    loader = [(data.images, data.targets)]
    for index, one in enumerate(one_class(network, loader, loader).classifiers):
        positive = (data.targets == index).numpy()
        assert one.f1 == max(f1_score(positive, scores[:, index] >= t) for t in scores[:, index])


def test_histograms_count_every_image(network, data):
    scores = scores_by_keep(network, data.images).double().numpy()
    for index, one in enumerate(one_class(network, data, data).classifiers):
        positive = (data.targets == index).numpy()
        edges = np.array(one.histogram.edges)
        ends = [scores[:, index].min(), scores[:, index].max()]
        assert [edges[0], edges[-1]] == pytest.approx(ends, rel=1e-5)
        assert (sum(one.histogram.positives), sum(one.histogram.negatives)) == (
            positive.sum(),
            50 - positive.sum(),
        )
        middle = len(edges) // 2
        below_middle = (scores[positive, index] < edges[middle]).sum()
        assert sum(one.histogram.positives[:middle]) == below_middle


@pytest.mark.parametrize(
    ("scores", "positive", "expected"),
    [
        ([1.0, 2, 3, 4], [0, 0, 1, 1], 3.0),
        ([1.0, 2, 3, 4], [1, 1, 0, 0], 1.0),
        ([5.0, 5, 5], [1, 0, 0], 5.0),
        # At least 1: 2/3 * 1; at least 3: 1 * 1/2; F1 0.8 against 2/3.
        ([3.0, 1, 2], [1, 1, 0], 1.0),
        # F1 is 2/3 at 4 (precision 1, recall 1/2) and at 1 (1/2 and 1): the lowest wins.
        ([4.0, 3, 2, 1], [1, 0, 0, 1], 1.0),
        ([1.0, 2], [0, 0], None),
        ([1.0, 2], [1, 1], None),
    ],
)
def test_best_threshold_by_hand(scores, positive, expected):
    assert best_threshold(np.array(scores), np.array(positive, dtype=bool)) == expected


def test_a_class_without_images_has_no_numbers(network, data):
    some = data.targets != 2
    partial = batches(data.images[some], data.targets[some])
    untested = one_class(network, data, partial)
    missing = untested.classifiers[2]
    assert missing.threshold is not None
    assert missing.positives == 0
    for value in (missing.average_precision, missing.curve, missing.precision, missing.recall):
        assert value is None
    assert untested.average_precisions.count(None) == 1
    assert untested.mean_average_precision is not None

    unlearned = one_class(network, partial, data).classifiers[2]
    assert unlearned.average_precision is not None
    assert unlearned.threshold is unlearned.f1 is unlearned.precision is None
    json.dumps(to_plain(untested), allow_nan=False)


def test_one_image_of_a_class_gives_no_average_precision(network, data):
    """One over the rank of one image says nothing of a classifier; two images do."""
    others = (data.targets != 1).nonzero()[:, 0]
    own = (data.targets == 1).nonzero()[:, 0]
    for images in (1, 2):
        rows = torch.cat([others, own[:images]])
        test = batches(data.images[rows], data.targets[rows])
        result = one_class(network, data, test, outside_loader=data)
        found = result.classifiers[1]
        assert found.positives == images
        # What is counted at the threshold stands, whatever the number of images.
        assert found.recall in (0, 0.5, 1)
        known = [found.average_precision, found.outside.average_precision]
        assert [value is None for value in known] == [images == 1] * 2
        assert result.average_precisions.count(None) == (images == 1)


def test_the_same_loader_is_scored_once(network, data):
    class Counting(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    loader = Counting(data)
    assert one_class(network, loader, loader) == one_class(network, data, data)
    assert loader.passes == 1


def test_scores_that_are_no_numbers(network, data):
    with torch.no_grad():
        network.head.weight[1, 0] = torch.nan
    with pytest.raises(ValueError, match="scores: expected finite logits"):
        one_class(network, data, data)


def test_without_scikit_learn(network, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"scikit-learn.*coded-resnext\[report\]"):
        one_class(network, data, data)


def test_the_papers_protocol_draws_negatives_from_a_hundred_classes_on():
    assert [paper_negatives(classes) for classes in (10, 99, 100, 1000)] == [None, None, 9, 9]


def test_nine_others_for_each_of_the_class(network, data):
    scores = scores_by_keep(network, data.images).numpy()
    found = one_class(network, data, data, negatives_per_positive=2, seed=3)
    assert found.negatives_per_positive == 2
    for index, one in enumerate(found.classifiers):
        positive = (data.targets == index).numpy()
        assert one.positives == positive.sum()
        assert one.negatives == min(2 * one.positives, (~positive).sum())
        # The numbers are those of some two others for each.
        generator = np.random.default_rng((3, 3, 1, index))
        others = np.flatnonzero(~positive)
        chosen = others[generator.permutation(len(others))[: 2 * one.positives]]
        rows = np.concatenate([np.flatnonzero(positive), chosen])
        expected = average_precision_score(positive[rows], scores[rows, index])
        assert one.average_precision == pytest.approx(expected, abs=1e-12)
    assert one_class(network, data, data, negatives_per_positive=2, seed=3) == found
    other = one_class(network, data, data, negatives_per_positive=2, seed=4)
    assert other.average_precisions != found.average_precisions
    with pytest.raises(ValueError, match="negatives_per_positive: expected at least 1, got 0"):
        one_class(network, data, data, negatives_per_positive=0)


@pytest.mark.parametrize("few", [10, 10_000])
def test_negatives_are_other_images_each_once(few, monkeypatch):
    """Of many images they are drawn without a permutation of all of them for each class."""
    monkeypatch.setattr(sys.modules[score_classes.__module__], "FEW_OTHERS", few)
    targets = torch.arange(3000) % 7
    pairs = _draw_pairs(targets, [2, 5], [90, 10**6], (0, 3, 1), 7)
    assert torch.equal(pairs, pairs.sort().values)
    rows, columns = pairs // 7, pairs % 7
    for index, negatives in ((2, 90), (5, 3000 - int((targets == 5).sum()))):
        own = rows[columns == index]
        assert len(own.unique()) == len(own)
        assert torch.equal(own[targets[own] == index], (targets == index).nonzero()[:, 0])
        assert int((targets[own] != index).sum()) == negatives
    assert torch.equal(_draw_pairs(targets, [2, 5], [90, 10**6], (0, 3, 1), 7), pairs)
    assert not torch.equal(_draw_pairs(targets, [2, 5], [90, 10**6], (1, 3, 1), 7), pairs)


def test_some_classes_have_the_numbers_that_they_have_among_all(network, data):
    whole = one_class(network, data, data, seed=3)
    for count in (1, 3, 4, 9):
        some = one_class(network, data, data, classes=count, seed=3)
        computed = [one.computed for one in some.classifiers]
        assert sum(computed) == min(count, 4)
        for one, other in zip(some.classifiers, whole.classifiers, strict=True):
            assert one == other or (not one.computed and one.curve is one.histogram is None)
    with pytest.raises(ValueError, match="classes: expected at least 1, got 0"):
        one_class(network, data, data, classes=0)


def test_images_of_no_class(network, data):
    outside = make_data(network, 30, seed=9)
    # Their targets do not matter, not even impossible ones.
    loader = [(outside.images, outside.targets + 50)]
    found = one_class(network, data, data, outside_loader=loader)
    inside_scores = scores_by_keep(network, data.images).numpy()
    outside_scores = scores_by_keep(network, outside.images).numpy()
    for index, one in enumerate(found.classifiers):
        positive = (data.targets == index).numpy()
        # It is the score of an image, which another batch may round to a little less.
        least = one.threshold - 1e-6
        said = outside_scores[:, index] >= least
        assert one.outside.samples == 30
        assert one.outside.accepted == pytest.approx(said.mean())
        joined = np.concatenate([inside_scores[positive, index], outside_scores[:, index]])
        expected = average_precision_score(np.arange(len(joined)) < positive.sum(), joined)
        assert one.outside.average_precision == pytest.approx(expected, abs=1e-12)
        # The threshold stays, which was chosen on images of the classes.
        right = (inside_scores[positive, index] >= least).sum()
        assert one.outside.recall == one.recall == right / positive.sum()
        assert one.outside.precision == pytest.approx(right / max(right + said.sum(), 1))
        f1 = 2 * right / (right + said.sum() + positive.sum())
        assert one.outside.f1 == pytest.approx(f1)
        assert one.outside.balanced_accuracy == pytest.approx((one.recall + 1 - said.mean()) / 2)
        refused = (inside_scores[~positive, index] < least).mean()
        assert one.balanced_accuracy == pytest.approx((one.recall + refused) / 2)
        assert sum(one.histogram.outside) == 30
        assert one.histogram.edges[-1] == pytest.approx(joined.max(), abs=1e-5) or (
            joined.max() < inside_scores[:, index].max()
        )
    assert found.average_precisions == one_class(network, data, data).average_precisions


def test_dead_samples_are_counted(network, data):
    # Branch 0 of the last coded block, the only one of class 0 with branch 1, falls silent.
    with torch.no_grad():
        block = network.coded_blocks[2]
        block.expand.weight.view(16, 4, 2)[:, [0, 1]] = 0
    found = one_class(network, data, data)
    assert network.codebooks[2].words[0] == "1100"
    assert [one.dead for one in found.classifiers] == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.long
def test_points_of_a_long_curve():
    generator = np.random.default_rng(0)
    positive = np.arange(4000) % 4 == 0
    scores = generator.normal(size=4000) + positive
    full = precision_recall_curve(positive, scores)
    found = sweep(scores, positive)
    assert len(found.recall) == len(found.thresholds) == len(found.precision) == 256
    assert found.thresholds[-1] is None
    assert (found.precision[-1], found.recall[-1]) == (1.0, 0.0)
    for precision, recall, threshold in zip(
        found.precision[:-1], found.recall[:-1], found.thresholds[:-1], strict=True
    ):
        said = scores >= threshold
        assert precision == precision_score(positive, said)
        assert recall == recall_score(positive, said)
    assert set(found.thresholds[:-1]) <= set(full[2].tolist())
    # Where recall does not change precision still does, and an even choice of that is kept.
    separable = sweep(np.arange(1000.0), np.arange(1000) >= 990)
    assert sum(recall == 1 for recall in separable.recall) > 40


def test_scores_nearer_than_bins_are_counted():
    """rio-stac#68, skrub#2189, physt#79: nearly equal scores in float64 had no bins."""
    scores = 1.0 + 1e-16 * np.arange(6)
    scores[3:] = np.nextafter(1.0, 2.0)
    counted = count_scores(scores, np.arange(6) < 2, np.empty(0))
    assert sum(counted.positives) == 2
    assert sum(counted.negatives) == 4
    assert list(counted.edges) == sorted(set(counted.edges))


def test_the_lowest_of_equally_good_thresholds():
    """sentence-transformers#384: equal F1 differ in the last bit when computed by rates."""
    scores = np.array([1.0] * 5 + [0.0] * 7, np.float32)
    positive = np.array([1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0], bool)
    assert best_threshold(scores, positive) == 0.0
    random = np.random.default_rng(0)
    for _ in range(200):
        scores = random.integers(0, 5, 20).astype(np.float32)
        positive = random.random(20) < 0.4
        positive[:2] = True, False
        f1 = {
            float(t): Fraction(
                2 * int((positive & (scores >= t)).sum()), int((scores >= t).sum() + positive.sum())
            )
            for t in np.unique(scores)
        }
        assert best_threshold(scores, positive) == min(t for t in f1 if f1[t] == max(f1.values()))
