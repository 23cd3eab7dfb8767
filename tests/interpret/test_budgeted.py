"""Evaluations in short time, interrupted ones, and ones in which an experiment cannot be done."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from support.small_networks import CountingClock, make_data, make_network

from coded_resnext import Codebook, CodedResNeXt, Stage, create_model
from coded_resnext.data.batches import batches
from coded_resnext.interpret import Budget, Evaluation, evaluate


def thousand_classes():
    """A small network for 1,000 classes, and one image of each."""
    torch.manual_seed(0)
    book = Codebook.shipped(1000, 32, 8)
    stages = [Stage(1, 16, 1, 32, 32), Stage(2, 16, 1, 32, 8)]
    model = CodedResNeXt(stages, 1000, codebooks=[book], stem_channels=8).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.expand_bn.weight)
    images = torch.randn(1000, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return model, batches(images, torch.randperm(1000))


@pytest.mark.long
def test_a_thousand_classes_in_short_time(tmp_path):
    model, data = thousand_classes()
    limit = 20_000
    clock = CountingClock(model.coded_blocks)
    found = evaluate(model, None, data, budget=Budget(limit, clock), repeats=2)
    # The last step that was begun may end later: some images through two blocks.
    assert clock() < limit
    assert found.test_samples == 1000
    computed, points = found.removal.points
    assert 4 <= computed < points == 2 * 32
    for block in found.removal.blocks:
        assert None not in (block.active.accuracy[-1], block.inactive.accuracy[-1])
    assert found.removal.samples < 1000
    assert 30 < found.one_class.computed < 1000
    for one in found.one_class.classifiers:
        if one.computed:
            # The paper's nine images of others for each of the class.
            assert (one.positives, one.negatives) == (1, 9)
            # Of one image there is a curve and no average precision.
            assert one.average_precision is None
            assert None not in (one.curve, one.threshold, one.f1)
        else:
            assert one.histogram is one.average_precision is one.threshold is None
    reason = f"{found.one_class.computed} of 1000 classes, a seeded draw: budget"
    assert found.not_computed["one_class"] == reason
    assert f"{computed} of 64 points" in found.not_computed["removal"]
    text = str(found)
    assert "Not computed, or not all: one_class" in text
    assert "Negatives: 9 images of other classes" in text
    described = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert Evaluation.from_dict(described).to_dict() == described


def test_what_is_computed_in_short_time_is_what_all_time_gives(network, data):
    whole = evaluate(network, None, data, repeats=2)
    short, again = (
        evaluate(network, None, data, repeats=2, budget=Budget(1200, clock))
        for clock in (CountingClock(network.coded_blocks), CountingClock(network.coded_blocks))
    )
    assert again.to_dict() == short.to_dict()
    computed, points = short.removal.points
    assert 0 < computed < points
    assert short.removal.samples == 50
    for block, complete in zip(short.removal.blocks, whole.removal.blocks, strict=True):
        for kind in ("active", "inactive"):
            some, every = getattr(block, kind), getattr(complete, kind)
            for index, accuracy in enumerate(some.accuracy):
                if accuracy is not None:
                    assert accuracy == every.accuracy[index]
                    assert some.energy[index] == pytest.approx(every.energy[index])
    for one, complete in zip(short.one_class.classifiers, whole.one_class.classifiers, strict=True):
        assert one == complete or not one.computed
    assert whole.not_computed == {}


def test_interrupted_work_goes_on(network, data, tmp_path, monkeypatch):
    path = tmp_path / "progress.json"
    train = make_data(network, 70, seed=2)
    wanted = evaluate(network, train, data, repeats=2)
    calls = []
    module = sys.modules["coded_resnext.interpret.one_class"]
    score = module.score

    def interrupted(*arguments):
        calls.append(arguments[2])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(module, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(network, train, data, repeats=2, progress=path)
    stored = json.loads(path.read_text())["steps"]
    assert sum(key.startswith("one_class") for key in stored) == 3
    assert any(key.startswith("removal") for key in stored)

    # Of another seed or network nothing is taken over.
    with pytest.raises(ValueError, match=r"progress of another evaluation \(seed differ\)"):
        evaluate(network, train, data, repeats=2, progress=path, seed=1)
    with torch.no_grad():
        network.head.weight += 1
    with pytest.raises(ValueError, match=r"another evaluation \(network differ\)"):
        evaluate(network, train, data, repeats=2, progress=path)
    with torch.no_grad():
        network.head.weight -= 1

    network = make_network()
    calls.clear()
    calls += [None] * 4
    found = evaluate(network, train, data, repeats=2, progress=path)
    assert found.to_dict() == wanted.to_dict()
    # Four classes on two data sets, three of which were done.
    assert len(calls) - 4 == 5
    assert not path.exists()


def test_damaged_progress_is_refused(network, data, tmp_path):
    path = tmp_path / "progress.json"
    for text in ("{", "[]", '{"format_version": 1}', '{"format_version": 9, "steps": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="not the progress of an evaluation"):
            evaluate(network, None, data, progress=path)


def test_a_plain_network_says_why(data):
    model = create_model("resnext_digits")
    images = torch.randn(20, 1, 8, 8)
    found = evaluate(model, None, batches(images, torch.arange(20) % 10))
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
    assert found.removal.points == (5 + 5 + 4, 5 + 5 + 4)
    json.dumps(found.to_dict(), allow_nan=False)


def test_training_data_of_other_classes(network, data):
    other = batches(data.images, data.targets + 1)
    found = evaluate(network, other, data, repeats=1)
    assert "expected classes 0 to 3 of the model, got 4" in found.not_computed["threshold data"]
    assert found.thresholds_from == "test data"
    assert found.one_class.computed == 4
    with pytest.raises(ValueError, match="expected classes 0 to 3 of the model, got 4"):
        evaluate(network, None, other)


def test_without_scikit_learn_the_others_run(network, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    found = evaluate(network, data, data, repeats=1)
    assert found.one_class is None
    assert "scikit-learn" in found.not_computed["one_class"]
    assert found.removal.points[0] == 14


def test_scores_that_are_no_numbers_stop_only_their_experiment(network, data):
    with torch.no_grad():
        network.head.weight[1, 0] = torch.nan
    found = evaluate(network, data, data, repeats=1)
    assert "expected finite logits" in found.not_computed["one_class"]
    assert found.removal.points[0] == 14


def test_subsets_of_images_in_very_short_time(network, data):
    clock = CountingClock([network.stem[0]])
    found = evaluate(network, data, data, repeats=1, budget=Budget(90, clock))
    assert found.test_samples < 50 == found.available_samples
    reason = f"{found.test_samples} of 50, a seeded draw: budget"
    assert found.not_computed["test images"] == reason
    assert sum(found.samples_per_class) == found.test_samples
    assert np.isfinite(found.test_accuracy)
