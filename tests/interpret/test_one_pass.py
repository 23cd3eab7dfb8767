"""An evaluation reads every image once, does the work that was planned, and says what it said."""

from __future__ import annotations

import json
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scale
import torch
from PIL import Image
from support.small_networks import make_data, make_network

from coded_resnext import create_model
from coded_resnext.data.batches import Batches
from coded_resnext.data.image_sets import FileImages
from coded_resnext.data.loaders import EvalImages
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.deploy.cost import BlockSizes, halved, head_macs, network_cost, stem_macs
from coded_resnext.interpret import evaluate, plan
from coded_resnext.interpret.results import text_tables
from coded_resnext.training.recipe import RECIPES, load_recipe

GOLDEN = Path(__file__).parents[1] / "golden" / "evaluation.json"
DRAWN = {
    "seed": 3,
    "repeats": 2,
    "negatives_per_positive": 2,
    "test_images": 20,
    "threshold_images": 30,
    "classes": 3,
}
GREY = Preprocessing(6, 1, (0.5,), (0.25,))


class Counted(Batches):
    """Counts the passes over it."""

    passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return super().__iter__()


def counted(data: Batches) -> Counted:
    return Counted(data.images, data.targets, data.batch_size)


def assert_near(found: Any, expected: Any, name: str = "") -> None:
    """Asserts that two trees are equal but for the rounding of their numbers.

    By it an image whose score is at the edge of two bins of a histogram may be in either.
    """
    if name.endswith(".histogram") and expected is not None:
        assert found["edges"] == pytest.approx(expected["edges"], abs=2e-5), name
        for key in expected.keys() - {"edges"}:
            moved = np.cumsum(found[key]) - np.cumsum(expected[key])
            assert moved[-1] == 0, f"{name}.{key}"
            assert np.abs(moved).sum() <= 1, f"{name}.{key}"
    elif isinstance(expected, dict):
        for key in expected:
            assert_near(found[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), name
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_near(one, other, f"{name}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=2e-5), name
    else:
        assert found == expected, name


@pytest.mark.parametrize(
    ("case", "options"), [("whole", {"seed": 5, "repeats": 2}), ("drawn", DRAWN)]
)
def test_the_figures_are_those_of_three_passes(case: str, options: dict[str, Any]) -> None:
    """What was stored when removal and one-class classifiers had passes of their own."""
    network = make_network()
    train, test, outside = (
        make_data(network, images, seed=seed) for images, seed in ((70, 2), (50, 1), (30, 9))
    )
    found = evaluate(network, train, test, outside_loader=outside, **options).to_dict()
    assert_near(found, json.loads(GOLDEN.read_text())[case])


@pytest.mark.parametrize(
    "options",
    [
        {"repeats": 2},
        {"repeats": 1, "negatives_per_positive": 2},
        {**DRAWN, "removal_images": 8},
        {"repeats": 1, "test_images": 20, "negatives_per_positive": 9, "classes": 1},
    ],
)
def test_every_image_is_read_once_and_the_work_is_the_planned_one(options: dict[str, Any]) -> None:
    """Counts the images that each block, stem and classifier sees, in multiply-accumulates."""
    network = make_network()
    loaders = [
        counted(make_data(network, images, seed=seed))
        for images, seed in ((70, 2), (50, 1), (30, 9))
    ]
    seen: Counter[int] = Counter()

    def count(name: int, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda _, inputs, __: seen.update({name: len(inputs[0])}))

    costs = {-1: stem_macs(network, 6, 6), -2: head_macs(network)}
    size = 6
    count(-1, network.stem)
    count(-2, network.head)
    for index, block in enumerate(network.blocks):
        sizes = BlockSizes.of(block)
        costs[index] = sizes.macs(size, size) + sizes.projection_macs(size, size)
        size = halved(size, sizes.stride)
        count(index, block.reduce)
    assert sum(costs.values()) == network_cost(network, 6).macs
    train, test, outside = loaders
    planned = plan(network, train, test, outside_loader=outside, image_size=(6, 6), **options)
    assert [loader.passes for loader in loaders] == [0, 0, 0]
    found = evaluate(network, train, test, outside_loader=outside, **options)
    assert [loader.passes for loader in loaders] == [1, 1, 1]
    assert sum(planned.macs.values()) == sum(costs[name] * seen[name] for name in costs)
    assert planned.images["removal"] == found.removal.samples
    assert planned.images["one-class classifiers"] == found.one_class_samples
    assert planned.images["thresholds"] == found.threshold_samples
    # Each table says how many images and classes it rests on.
    lines = text_tables(found)
    assert f"Branches were removed for {found.removal.samples} images" in lines
    assert f"Tested on {found.one_class_samples} of 50 images." in lines
    assert "Distances are those of 4 classes." in lines


def test_features_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 GiB of them was kept, and decided how many images counted."""
    network = make_network()
    module, kept, alive = sys.modules["coded_resnext.interpret.observe"], [], []
    trunk = module.trunk

    def noted(*arguments: Any) -> torch.Tensor:
        features: torch.Tensor = trunk(*arguments)
        alive.append(sum(reference() is not None for reference in kept))
        kept.append(weakref.ref(features))
        return features

    monkeypatch.setattr(module, "trunk", noted)
    data = make_data(network, 50, seed=1)
    loader = Batches(data.images, data.targets, 4)
    evaluate(network, loader, loader, repeats=1, test_images=20)
    assert len(kept) == 26
    # That of the batch before, while the next one is made.
    assert max(alive) <= 1


@pytest.mark.parametrize("name", ["imagenet", "imagenet_150"])
def test_imagenet_ends_within_twice_three_plain_passes(name: str) -> None:
    """38 hours of drawing came before the first image, and 668 images filled the memory."""
    data = load_recipe(RECIPES / f"{name}.yaml", {"data_dir": "x"}).data

    class Told(list[Any]):
        def __init__(self, images: int) -> None:
            self.targets = torch.arange(images) % 1000

    model = create_model("coded_resnext50_32x4d", codebook_variant="paper")
    planned = plan(
        model,
        Told(1_280_000),
        Told(50_000),
        image_size=(data.img_size,) * 2,
        repeats=data.repeats,
        test_images=data.eval_images,
        removal_images=data.removal_images,
        threshold_images=data.threshold_images,
    )
    assert planned.test_images == planned.images["observation"] == 50_000
    assert planned.passes <= 6
    assert f"{planned.passes:.1f} passes over the test images" in str(planned)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("task", "classes", "images", "seconds", "mib"),
    [
        ("start-up", 10_000, 200_000, 3, 50),
        ("observation", 10_000, 1000, 10, 400),
        ("drawing", 1000, 100_000, 20, 30),
    ],
)
def test_what_grew_with_classes_times_images(
    task: str, classes: int, images: int, seconds: float, mib: float
) -> None:
    """torchvision#557, fast-reid#503: 15 s, 1.7 GiB and a second draw for each class and part."""
    used, added = map(float, scale.measure(task, classes, images).split())
    assert used < seconds
    assert added < mib


@pytest.fixture
def files(tmp_path: Path) -> FileImages:
    """Six images of each class of the small network."""
    generator = np.random.default_rng(0)
    names = make_network().class_names
    for index in range(24):
        folder = tmp_path / names[index % 4]
        folder.mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (6, 6), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return FileImages.of_classes(tmp_path, names, every_class=True)


def test_a_damaged_image_leaves_a_gap_in_what_was_planned(files: FileImages) -> None:
    """It stays in the draws and is not scored; everything else is."""
    network = make_network()
    options: dict[str, Any] = {"repeats": 1, "negatives_per_positive": 2, "seed": 1}
    whole = evaluate(network, None, EvalImages(files, GREY, 5), **options)
    Path(files.name(7)).write_bytes(b"")
    found = evaluate(network, None, EvalImages(files, GREY, 5), **options)
    assert (whole.test_samples, found.test_samples) == (24, 23)
    assert "1 damaged images left out" in found.not_computed["test images"]
    assert found.one_class is not None
    assert whole.one_class is not None
    lost = [
        (before.positives - one.positives, before.negatives - one.negatives)
        for one, before in zip(
            found.one_class.classifiers, whole.one_class.classifiers, strict=True
        )
    ]
    assert [positives for positives, _ in lost] == [
        int(index == int(files.targets[7])) for index in range(4)
    ]
    assert all(negatives in (0, 1) for _, negatives in lost)


def test_of_drawn_training_images_no_others_are_read(
    files: FileImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of ImageNet's training images were decoded, twice, to choose thresholds on some."""
    network = make_network()
    read: list[str] = []
    image = FileImages.image

    def noted(self: FileImages, index: int) -> Image.Image:
        read.append(self.name(index))
        return image(self, index)

    monkeypatch.setattr(FileImages, "image", noted)
    test = make_data(network, 50, seed=1)
    found = evaluate(network, EvalImages(files, GREY, 8), test, repeats=1, threshold_images=12)
    assert found.threshold_samples == len(read) == len(set(read)) == 12
    assert found.provenance is not None
    assert found.provenance.thresholds is not None
    assert found.provenance.thresholds.samples == 12
