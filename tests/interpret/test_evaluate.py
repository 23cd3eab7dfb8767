"""The whole evaluation: what it collects and draws, and experiments that cannot be done."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from support.small_networks import make_data

from coded_resnext import Codebook, CodedResNeXt, Stage, create_model
from coded_resnext.data.batches import batches
from coded_resnext.interpret import (
    EarlyDecoding,
    Evaluation,
    ExitCurve,
    Paths,
    Samples,
    evaluate,
    observe,
    one_class,
    remove_branches,
)
from coded_resnext.interpret.evaluation import to_plain
from coded_resnext.interpret.observe import draw_rows
from coded_resnext.interpret.results import text_tables
from coded_resnext.models.checkpoint import weights_sha256


def balanced(observed):
    said = balanced_accuracy_score(observed.targets, observed.predictions)
    return pytest.approx(float(said))


def test_collects_every_experiment(network, data):
    train = make_data(network, 70, seed=2)
    network.train()
    found = evaluate(network, train, data, seed=5, repeats=2)
    assert all(module.training for module in network.modules())
    assert found.is_coded
    observed = observe(network, data)
    assert found.early_decoding == EarlyDecoding.of(observed)
    assert found.early_exit == ExitCurve.of(observed, network)
    assert found.removal == remove_branches(network, data, seed=5, repeats=2)
    assert found.one_class == one_class(network, train, data, seed=5)
    assert to_plain(found.paths) == to_plain(Paths.of(observed))
    assert to_plain(found.samples) == to_plain(Samples.of(observed, seed=5))
    assert found.test_accuracy == found.early_decoding.accuracy == 0.8

    summary = found.summary()
    blocks = found.removal.blocks
    assert summary == {
        "test_accuracy": 0.8,
        "test_balanced_accuracy": balanced(observed),
        "early_decoding": list(found.early_decoding.block_accuracy),
        "single_class_average_precision": [
            one.average_precision for one in found.one_class.classifiers
        ],
        "removal_accuracy": found.removal.accuracy,
        "remove_active_accuracy": [block.active.accuracy[-1] for block in blocks],
        "remove_inactive_accuracy": [block.inactive.accuracy[-1] for block in blocks],
        "weights_sha256": weights_sha256(network),
        "measured_on": to_plain(found.images),
    }
    assert len(summary["early_decoding"]) == len(summary["remove_active_accuracy"]) == 3
    assert len(summary["single_class_average_precision"]) == 4
    description = found.to_dict()
    assert json.loads(json.dumps(description, allow_nan=False)) == description
    assert description["thresholds_from"] == "training data"
    assert description["removal"]["seed"] == 5


def test_thresholds_on_the_test_data_are_said(network, data):
    found = evaluate(network, None, data, repeats=1)
    assert found.one_class == one_class(network, data, data)
    assert found.to_dict()["thresholds_from"] == "test data"
    assert "on the test data itself" in text_tables(found)
    assert "optimistic" in text_tables(found)


def test_table_says_the_numbers(network, data):
    some = data.targets != 1
    found = evaluate(network, data, batches(data.images[some], data.targets[some]), repeats=1)
    lines = text_tables(found).splitlines()
    assert lines[0] == str(found)
    [row] = [line.split() for line in lines if line.strip().startswith("bee")]
    assert row == ["bee", "0", "n/a", "n/a", "n/a", "n/a"]
    assert any("3 of 4 classes" in line for line in lines)
    [inactive] = [line for line in lines if line.startswith("All inactive")]
    assert all(number[0] in "+-" for number in inactive.split()[-3:])


def test_plain_network_has_an_accuracy():
    torch.manual_seed(0)
    model = create_model("resnext_digits")
    images = torch.randn(9, 1, 8, 8)
    targets = model.eval()(images).argmax(1)
    targets[:3] = (targets[:3] + 1) % 10
    found = evaluate(model, None, batches(images, targets, 4))
    assert not found.is_coded
    assert found.classification.accuracy == found.test_accuracy
    assert set(found.not_computed) == {
        "early_decoding",
        "early_exit",
        "paths",
        "samples",
        "semantics",
        "removal",
        "one_class",
    }
    assert set(found.not_computed.values()) == {"a plain network, which has no coded block"}
    assert found.summary() == {
        "test_accuracy": pytest.approx(2 / 3),
        "test_balanced_accuracy": found.classification.balanced_accuracy,
        "early_decoding": [],
        "single_class_average_precision": [],
        "removal_accuracy": None,
        "remove_active_accuracy": [],
        "remove_inactive_accuracy": [],
        "weights_sha256": found.weights_sha256,
        "measured_on": to_plain(found.images),
    }
    assert "plain network" in text_tables(found)
    assert found.to_dict()["removal"] is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_of_many_classes_the_weakest_are_shown():
    torch.manual_seed(0)
    pairs = [(a, b) for a in range(7) for b in range(a)]
    book = Codebook([[int(n in pair) for n in range(7)] for pair in pairs])
    model = CodedResNeXt([Stage(1, 8, 1, 7, 2)], 21, codebooks=[book], stem_channels=4)
    images, targets = torch.randn(63, 3, 4, 4), torch.arange(63) % 21
    found = evaluate(model, None, batches(images, targets), repeats=1)
    lines = text_tables(found).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("The 20 weakest"))
    shown = [line.split()[0] for line in lines[start + 1 : start + 21]]
    values = found.one_class.average_precisions
    best = max(range(21), key=lambda index: values[index])
    assert sorted(map(int, shown)) == sorted(set(range(21)) - {best})
    assert int(shown[0]) == min(range(21), key=lambda index: values[index])


def test_a_loader_that_ends_is_refused(network, data):
    with pytest.raises(ValueError, match="test_loader: expected batches that can be iterated"):
        evaluate(network, None, iter(list(data)))
    with pytest.raises(ValueError, match="train_loader: expected batches that can be iterated"):
        evaluate(network, iter(list(data)), data)
    with pytest.raises(ValueError, match="loader: expected at least one batch"):
        evaluate(network, data, [])


@pytest.mark.parametrize(
    "experiment",
    [
        lambda model, observed: EarlyDecoding.of(observed),
        lambda model, observed: ExitCurve.of(observed, model),
        lambda model, observed: Paths.of(observed),
        lambda model, observed: Samples.of(observed),
        lambda model, observed: remove_branches(model, []),
        lambda model, observed: one_class(model, [], []),
    ],
)
def test_an_experiment_refuses_a_plain_network(experiment):
    model = create_model("resnext_digits")
    observed = observe(model, batches(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="model: expected at least one coded block, got a plain"):
        experiment(model, observed)


@pytest.mark.long
def test_draws_have_the_numbers_of_the_drawn_images(network, data):
    train = make_data(network, 70, seed=2)
    whole = evaluate(network, train, data, repeats=2, seed=3)
    drawing = {"test_images": 20, "threshold_images": 30, "classes": 3, "repeats": 2, "seed": 3}
    drawn = evaluate(network, train, data, **drawing)
    assert drawn.to_dict() == evaluate(network, train, data, **drawing).to_dict()
    rows = draw_rows(data.targets, 20, 3)
    # What one pass gives is of all images.
    for name in ("test_samples", "classification", "early_decoding", "early_exit"):
        assert getattr(drawn, name) == getattr(whole, name)
    assert drawn.removal == remove_branches(network, data, rows=rows, seed=3, repeats=2)
    learned = draw_rows(train.targets, 30, 3)
    assert drawn.threshold_samples == len(learned) < 35
    expected = one_class(
        network,
        batches(train.images[learned], train.targets[learned], 16),
        batches(data.images[rows], data.targets[rows], 16),
        classes=3,
        seed=3,
    )
    assert drawn.one_class == expected
    assert drawn.not_computed == {
        "removal": f"{len(rows)} of 50 test images, a seeded draw",
        "one_class": "3 of 4 classes, a seeded draw",
    }
    lines = text_tables(drawn)
    assert f"Branches were removed for {len(rows)} images, a seeded draw." in lines
    assert "Not computed, or not all: one_class: 3 of 4 classes, a seeded draw" in lines
    assert whole.not_computed == {}
    for name in ("test_images", "threshold_images", "classes"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            evaluate(network, train, data, **{name: 0})


def test_a_hundred_classes_are_tested_by_the_papers_protocol():
    """Nine negatives for each positive at K = 100 too, of other classes and of none of them."""
    torch.manual_seed(0)
    stages = [Stage(1, 16, 1, 20, 20), Stage(1, 16, 1, 20, 4)]
    books = [Codebook.shipped(100, 20, 4, "paper")]
    model = CodedResNeXt(stages, 100, codebooks=books, stem_channels=8).eval()
    torch.nn.init.normal_(model.blocks[1].expand_bn.weight)
    images = torch.randn(240, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    data = batches(images[:200], torch.arange(200) % 100)
    outside = batches(images[200:], torch.zeros(40, dtype=torch.long))
    found = evaluate(model, data, data, outside_loader=outside, repeats=1, classes=6)
    assert found.one_class.negatives_per_positive == 9
    computed = [one for one in found.one_class.classifiers if one.computed]
    assert len(computed) == 6
    for one in computed:
        assert (one.positives, one.negatives, one.outside.samples) == (2, 18, 18)
        assert None not in (one.balanced_accuracy, one.outside.precision, one.outside.f1)
        # Of the same images of the class.
        assert one.outside.recall == one.recall
    lines = text_tables(found)
    assert "Negatives: 9 images of other classes" in lines
    assert "against them its precision is" in lines


@pytest.mark.long
def test_a_thousand_classes():
    """The paper's numbers of classes, branches and images of other classes."""
    torch.manual_seed(0)
    book = Codebook.shipped(1000, 32, 8)
    stages = [Stage(1, 16, 1, 32, 32), Stage(2, 16, 1, 32, 8)]
    model = CodedResNeXt(stages, 1000, codebooks=[book], stem_channels=8).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.expand_bn.weight)
    images = torch.randn(2000, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    data = batches(images, torch.arange(2000) % 1000)
    found = evaluate(model, None, data, repeats=1, test_images=1000, classes=40)
    assert found.test_samples == 2000
    assert found.removal.samples == 1000
    computed = [one for one in found.one_class.classifiers if one.computed]
    assert len(computed) == 40
    for one in computed:
        assert (one.positives, one.negatives) == (1, 9)
        # Of one image there is a curve and no average precision.
        assert one.average_precision is None
        assert None not in (one.curve, one.threshold, one.f1)
    assert "Negatives: 9 images of other classes" in text_tables(found)
    described = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert Evaluation.from_dict(described).to_dict() == described


def test_images_of_one_class(network, data):
    only = data.targets == 3
    found = evaluate(network, data, batches(data.images[only], data.targets[only]), repeats=1)
    assert found.not_computed == {
        "semantics": "classes: expected images of at least three to compare their distances, "
        "got images of 1"
    }
    assert found.one_class.average_precisions == (None,) * 4
    assert found.one_class.classifiers[3].threshold is not None
    assert found.early_decoding.blocks[0].class_accuracy[:3] == (None,) * 3
    assert all(len(block.active.accuracy) > 1 for block in found.removal.blocks)
    json.dumps(found.to_dict(), allow_nan=False)


def test_training_data_of_other_classes(network, data):
    other = batches(data.images, data.targets + 1)
    found = evaluate(network, other, data, repeats=1)
    assert "expected classes 0 to 3 of the model, got 4" in found.not_computed["threshold data"]
    # gigagan-pytorch#27: thresholds were chosen on the test images then, without being asked.
    assert found.one_class is None
    assert "got 4" in found.not_computed["one_class"]
    with pytest.raises(ValueError, match="expected classes 0 to 3 of the model, got 4"):
        evaluate(network, None, other)


def test_without_scikit_learn_the_others_run(network, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    found = evaluate(network, data, data, repeats=1)
    assert found.one_class is None
    assert "scikit-learn" in found.not_computed["one_class"]
    assert len(found.removal.blocks) == 3


def test_results_that_are_no_numbers_are_refused(network, data):
    images = data.images.clone()
    images[3, 0, 0, 0] = torch.nan
    found = evaluate(network, batches(images, data.targets), data, repeats=1)
    assert "expected finite logits" in found.not_computed["threshold data"]
    assert len(found.removal.blocks) == 3
    with torch.no_grad():
        network.head.weight[1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"finite results.*head.weight of the network is not"):
        evaluate(network, data, data, repeats=1)


class _Shuffling:
    """A loader of one order in its first pass and another one in every later pass."""

    def __init__(self, data, passes=1):
        self.data, self.passes = data, passes

    def __iter__(self):
        count = len(self.data.targets)
        order = torch.arange(count) if self.passes > 0 else torch.arange(count).flip(0)
        self.passes -= 1
        yield from batches(self.data.images[order], self.data.targets[order], 16)


def test_a_loader_that_shuffles_is_refused(network, data):
    """ipex-llm#6308, ipex-llm#6326, skorch#499: a second pass had the order of the first."""
    with pytest.raises(ValueError, match="same images in the same order"):
        evaluate(network, None, _Shuffling(data), repeats=1, negatives_per_positive=2)
    # Where nothing is drawn there is one pass alone.
    evaluate(network, None, _Shuffling(data, passes=1), repeats=1)
    shuffled = evaluate(network, _Shuffling(data), data, repeats=1, negatives_per_positive=2)
    assert "same images in the same order" in shuffled.not_computed["threshold data"]


def test_cost_of_images_that_are_not_square(network):
    """ultralytics#9350, pytorch-OpCounter#8: one side was taken for both."""
    whole = []
    for height, width in ((16, 8), (8, 16)):
        images = torch.randn(12, 1, height, width, generator=torch.Generator().manual_seed(0))
        found = evaluate(network, None, batches(images, torch.arange(12) % 4), repeats=1)
        assert found.cost["macs"] == found.early_exit.network_macs
        # The whole network, and the products with all codewords that decode its blocks.
        decoding = sum(4 * book.branches for book in network.codebooks)
        assert found.early_exit.points[-1].macs == found.cost["macs"] + decoding
        whole.append(found.cost["macs"])
    assert whole[0] == whole[1]


def test_a_bfloat16_network_is_evaluated(network, data):
    """mteb#1297, pytorch#110285: NumPy has no bfloat16."""
    found = evaluate(network.bfloat16(), data, data, repeats=1)
    assert found.one_class is not None
    assert found.not_computed == {}
