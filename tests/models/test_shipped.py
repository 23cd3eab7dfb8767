"""The weights that come with the package: their accuracy, their papers, and every door to them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support.helpers import assert_same_network

import coded_resnext.models.timm_models  # noqa: F401
from coded_resnext import Codebook, CodedResNeXt, create_model, from_pretrained, list_models
from coded_resnext.cli.train import start_from
from coded_resnext.data.batches import batches
from coded_resnext.data.datasets import DATA_VARIABLE, load_dataset, load_digits_split
from coded_resnext.data.loaders import EvalImages
from coded_resnext.deploy.early_exit import predict_early
from coded_resnext.interpret.results import load_evaluation
from coded_resnext.models.checkpoint import (
    find_model,
    load_model,
    network_of,
    save_model,
    shipped_weights,
)
from coded_resnext.training.engine import EvaluationLoader, measure_accuracy
from coded_resnext.training.recipe import ModelConfig

# A million parameters in float32, and what the report shows.
LARGEST_FOLDER = 6 * 2**20


def images_of(name: str) -> EvaluationLoader:
    """The test images that shipped weights were measured on."""
    if name == "digits":
        split = load_digits_split()
        return batches(split.test_images, split.test_targets)
    if DATA_VARIABLE not in os.environ:
        pytest.skip(f"{DATA_VARIABLE} names no folder with the test images")
    preprocessing = load_model(name).preprocessing
    assert preprocessing is not None
    return EvalImages(load_dataset(name.split("_")[0]).test, preprocessing)


@pytest.mark.parametrize("name", shipped_weights())
def test_the_shipped_file_has_the_accuracy_that_it_claims(name: str) -> None:
    pretrained = from_pretrained(name)
    measured = measure_accuracy(pretrained.model, images_of(name))
    claimed = pretrained.results
    # Another processor may round an image across the border between two classes.
    assert measured.final == pytest.approx(claimed["test_accuracy"], abs=0.003)
    assert list(measured.early) == pytest.approx(claimed["early_decoding"], abs=0.006)


def test_the_digits_are_learned_and_may_leave_early() -> None:
    pretrained = from_pretrained("digits")
    criterion = pretrained.early_exit
    assert pretrained.results["test_accuracy"] > 0.98
    assert criterion is not None
    split = load_digits_split()
    early = predict_early(pretrained.model, split.test_images, criterion)
    right = (early.classes == split.test_targets).double().mean()
    assert float(right) == pytest.approx(pretrained.results["test_accuracy"], abs=0.006)
    assert float((early.exit_blocks < 3).double().mean()) > 0.9


@pytest.mark.parametrize("name", shipped_weights())
def test_shipped_weights_say_where_they_come_from(name: str) -> None:
    folder = find_model(name)
    pretrained = from_pretrained(name)
    summary = json.loads((folder / "summary.json").read_text())
    assert pretrained.license == "mit"
    # These files are older than networks that know the size of their images.
    sizes = {"image_size": create_model(network_of(name)).image_size}
    assert pretrained.model.config | sizes == create_model(network_of(name)).config | sizes
    assert pretrained.preprocessing is not None
    assert pretrained.training["config"]["seed"] == summary["seed"]
    assert pretrained.training["config"]["epochs"] == pretrained.training["epochs_done"]
    assert summary["command"].startswith("python train/")
    assert summary["versions"]["torch"]
    provenance = load_evaluation(folder).provenance
    assert provenance is not None
    assert provenance.test.split == "test"
    assert provenance.test.name is not None
    assert pretrained.thresholds.keys() == set(pretrained.model.class_names)
    card = (folder / "README.md").read_text()
    assert "licence of the weights: mit" in card
    assert f"| test\\_accuracy | {pretrained.results['test_accuracy']:.5g} |".replace("\\", "") in (
        card
    )
    assert sum(path.stat().st_size for path in folder.iterdir()) < LARGEST_FOLDER


@pytest.mark.parametrize("name", shipped_weights())
def test_every_door_gives_the_same_network(name: str) -> None:
    network = network_of(name)
    expected = load_model(name).model
    x = torch.randn(3, expected.in_channels, 32, 32)
    doors: list[CodedResNeXt] = [
        create_model(network, pretrained=True),
        from_pretrained(name).model,
        timm.create_model(network, pretrained=True),
        load_model(find_model(name)).model,
    ]
    for model in doors:
        assert model.class_names == expected.class_names
        assert model.codebooks == expected.codebooks
        assert_same_network(model.eval(), expected, x)
    assert network in timm.list_models(pretrained=True)
    assert list_models(pretrained=True) == [network_of(each) for each in shipped_weights()]


def test_timm_prepares_images_as_the_weights_want_them() -> None:
    model = timm.create_model("coded_resnext_digits", pretrained=True)
    prepare = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    preprocessing = load_model("digits").preprocessing
    assert preprocessing is not None
    for image in (Image.fromarray(pixels), Image.fromarray(pixels.repeat(3, 0).repeat(3, 1))):
        # A step of 8-bit intensities is 0.01 of the input, and libraries round the resized ones.
        torch.testing.assert_close(prepare(image), preprocessing(image), rtol=0, atol=0.03)


def test_pretrained_weights_for_other_classes_and_images() -> None:
    source = create_model("coded_resnext_digits", pretrained=True)
    model = create_model("coded_resnext_digits", pretrained=True, num_classes=4, in_channels=3)
    assert model.head.weight.shape[0] == 4
    assert model.codebooks[0].classes == 4
    for ours, theirs in zip(model.blocks, source.blocks, strict=True):
        torch.testing.assert_close(ours.reduce.weight, theirs.reduce.weight, rtol=0, atol=0)
    torch.testing.assert_close(
        model.stem[0].weight.sum(1), source.stem[0].weight.sum(1), rtol=1e-5, atol=1e-6
    )
    timms = timm.create_model("coded_resnext_digits", pretrained=True, num_classes=4, in_chans=3)
    torch.testing.assert_close(
        timms.blocks[1].reduce.weight, source.blocks[1].reduce.weight, rtol=0, atol=0
    )


def test_a_training_may_start_from_shipped_weights() -> None:
    model = create_model("coded_resnext_digits", in_channels=3)
    settings = ModelConfig("coded_resnext_digits", initial_checkpoint="digits")
    nothing_to_measure = create_autospec(EvalImages, instance=True)
    said = start_from(model, settings, nothing_to_measure)
    assert said.startswith("weights from digits: ")
    assert "adapted: stem.0.weight; fresh: none" in said
    shipped = create_model("coded_resnext_digits", pretrained=True)
    torch.testing.assert_close(model.head.weight, shipped.head.weight, rtol=0, atol=0)


def test_what_the_weights_cannot_be_for_is_refused() -> None:
    with pytest.raises(ValueError, match="pretrained: expected a network that weights are shipped"):
        create_model("coded_resnext50_32x4d", pretrained=True)
    books = create_model("coded_resnext_digits").stage_codebooks
    rotated = [Codebook(book.codewords.roll(1, 0)) for book in books]
    with pytest.raises(ValueError, match="codewords of coded stage 1 differ"):
        create_model("coded_resnext_digits", pretrained=True, codebooks=rotated)
    with pytest.raises(ValueError, match="does not fit the model"):
        create_model("coded_resnext_digits", pretrained=True, stem_channels=16)


def test_a_name_with_two_meanings_is_refused_and_a_path_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_model("digits").model
    Path("digits").mkdir()
    # What commands wrote there hides nothing.
    assert_same_network(load_model("digits").model, shipped, torch.randn(2, 1, 8, 8))
    own = create_model("coded_resnext_digits").eval()
    save_model("digits/model.safetensors", own)
    for read in (load_model, from_pretrained):
        with pytest.raises(ValueError, match=r"digits: expected one meaning, got two"):
            read("digits")
    for path in ("./digits", Path("digits"), "digits/model.safetensors"):
        assert_same_network(load_model(path).model, own, torch.randn(2, 1, 8, 8))
