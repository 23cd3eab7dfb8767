"""Images a second on one core of what reads training images: ours, timm's, torchvision's, DALI.

All read the same files, ImageNet's recipe at 160 pixels, in this process and thread, batches of 50.
By turns, batch by batch, so that the machine's mood falls on all alike; the least time of each
batch counts. `device` is what the host has left to do where the device augments, with one library
and with both. Before anything is timed, its pictures are compared with those of the CPU's path.

    python -m pytest benchmarks/cpu/bench_input.py --benchmark-only --photographs FOLDER \
        --results benchmarks/results/cpu_input.json

FOLDER holds JPEGs, anywhere in it; of smaller ones copies of 375 pixels on the shorter side are
made, ImageNet's size. Without it synthetic scenes are taken, whose figures are not photographs'.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from coded_resnext.data.augment import Augmentation, TrainTransform
from coded_resnext.data.crops import has_nvimgcodec, has_simplejpeg
from coded_resnext.data.image_folder import find_images
from coded_resnext.data.image_sets import FileImages
from coded_resnext.data.loaders import TrainImages
from coded_resnext.data.on_device import StreamedTrainImages
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.training.recipe import RECIPES, load_recipe

IMAGES, BATCH, ROUNDS = 200, 50, 5
SHORTER_SIDE = 375
Pass = Iterator[Any]


def photographs(folder: Path | None) -> Iterator[Image.Image]:
    if folder is not None:
        files = find_images([folder])
        for index in np.linspace(0, len(files) - 1, IMAGES).astype(int).tolist():
            yield Image.open(files[index]).convert("RGB")
        return
    for seed in range(IMAGES):
        generator = np.random.default_rng(seed)
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        yield Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns `FOLDER/{a,b}/*.jpg` as large as ImageNet's, with a camera's noise, quality 90."""
    root = tmp_path_factory.mktemp("photographs")
    for number, image in enumerate(photographs(request.config.getoption("--photographs"))):
        scale = max(1.0, SHORTER_SIDE / min(image.size))
        width, height = (round(side * scale) for side in image.size)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        noise = np.random.default_rng(number).normal(0, 3, (*pixels.shape[:2], 1))
        target = root / "ab"[number % 2] / f"{number:04d}.jpg"
        target.parent.mkdir(exist_ok=True)
        Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(target, quality=90)
    return root


def ours(folder: Path, augmentation: Augmentation, preprocessing: Preprocessing) -> TrainImages:
    files = FileImages.of_classes(folder, ["a", "b"], every_class=True)
    if augmentation.augment_on == "cpu":
        transform = TrainTransform(augmentation, preprocessing)
        return TrainImages(files, transform, BATCH, seed=0)
    device = torch.device("cpu")
    return StreamedTrainImages(files, augmentation, preprocessing, BATCH, device=device, seed=0)


def host_part(loader: TrainImages) -> Pass:
    """Returns what worker processes do, without the device's part."""
    return iter(loader._loader)


def without_nvimgcodec(batches: Pass) -> Pass:
    while True:
        with patch("coded_resnext.data.crops._nvimgcodec", return_value=None):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def timms(folder: Path, augmentation: Augmentation, size: int) -> Callable[[], Pass]:
    from timm.data import create_dataset, create_loader

    made = create_loader(
        create_dataset("", root=str(folder)),
        input_size=(3, size, size),
        batch_size=BATCH,
        is_training=True,
        auto_augment=augmentation.aa,
        re_prob=augmentation.reprob,
        re_mode=augmentation.remode,
        re_count=augmentation.recount,
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=False,
        device=torch.device("cpu"),
    )
    return lambda: iter(made)


def torchvisions(folder: Path, augmentation: Augmentation, size: int) -> Callable[[], Pass]:
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    steps = [
        transforms.RandomResizedCrop(size),
        transforms.RandomHorizontalFlip(),
        transforms.RandAugment(2, 7),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        transforms.RandomErasing(augmentation.reprob, value="random"),
    ]
    images = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    made: Any = DataLoader(images, BATCH, shuffle=True, drop_last=True)
    return lambda: iter(made)


def dalis(folder: Path, size: int) -> Callable[[], Pass]:
    """Decoding of the crop, resizing and a flip, on the CPU and not ahead of being asked."""
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def, types

    when_asked = {"exec_async": False, "exec_pipelined": False, "exec_dynamic": False}

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, **when_asked)
    def make() -> Any:
        encoded, label = fn.readers.file(file_root=str(folder), random_shuffle=True)
        image = fn.decoders.image_random_crop(encoded, random_area=[0.08, 1.0])
        image = fn.resize(image, resize_x=size, resize_y=size, interp_type=types.INTERP_CUBIC)
        return fn.flip(image, horizontal=fn.random.coin_flip()), label

    pipe = make()
    pipe.build()
    return lambda: (pipe.run() for _ in range(IMAGES // BATCH))


@pytest.mark.skipif(not has_simplejpeg(), reason="simplejpeg is not installed")
def test_input(folder: Path, benchmark: Any, record: Callable[[dict[str, Any]], None]) -> None:
    torch.set_num_threads(1)
    recipe = load_recipe(RECIPES / "imagenet.yaml")
    preprocessing, asked = recipe.data.preprocessing, recipe.augmentation
    size = preprocessing.size
    loaders = {
        "cpu": ours(folder, replace(asked, augment_on="cpu"), preprocessing),
        "device, pillow": ours(folder, replace(asked, decoder="pillow"), preprocessing),
        "device, simplejpeg": ours(folder, replace(asked, decoder="simplejpeg"), preprocessing),
    }
    passes: dict[str, Callable[[], Pass]] = {
        name: lambda loader=loader: host_part(loader) for name, loader in loaders.items()
    }
    if has_nvimgcodec():
        both = passes["device, simplejpeg"]
        passes["device, simplejpeg"] = lambda: without_nvimgcodec(both())
        passes["device, simplejpeg and nvimgcodec"] = both
    passes["timm"] = timms(folder, asked, size)
    passes["torchvision ImageFolder"] = torchvisions(folder, asked, size)
    with suppress(pytest.skip.Exception):
        passes["DALI, crop alone"] = dalis(folder, size)
    difference = pixel_difference(folder, asked, preprocessing)
    assert difference < 2
    best = {name: [float("inf")] * (IMAGES // BATCH) for name in passes}

    def one_round() -> None:
        running = {name: start() for name, start in passes.items()}
        for number in range(IMAGES // BATCH):
            for name, batches in running.items():
                begun = time.process_time()
                next(batches)
                seconds = time.process_time() - begun
                best[name][number] = min(best[name][number], seconds)

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    rates = {name: IMAGES / sum(seconds) for name, seconds in best.items()}
    for name, rate in rates.items():
        record({"path": name, "images_per_second": rate, "ratio": rate / rates["cpu"]})
        print(f"\n{name}: {rate:.0f} images/s, {rate / rates['cpu']:.2f} times", end="")
    record({"path": "pixel difference of 255", "mean": difference})


def pixel_difference(folder: Path, asked: Augmentation, preprocessing: Preprocessing) -> float:
    """Returns the mean difference of the crops of both decoders, of 255."""
    plain = replace(asked, aa=None, reprob=0.0)
    crops = []
    for decoder in ("pillow", "simplejpeg"):
        loader = ours(folder, replace(plain, decoder=decoder), preprocessing)
        crops.append(torch.cat([read.batch.images for read in host_part(loader)]).float())
    return float((crops[0] - crops[1]).abs().mean())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_part(
    folder: Path, benchmark: Any, record: Callable[[dict[str, Any]], None]
) -> None:
    """What the device adds to a batch that the host has cut: transfer, RandAugment, erasing."""
    recipe = load_recipe(RECIPES / "imagenet.yaml")
    device = torch.device("cuda")
    files = FileImages.of_classes(folder, ["a", "b"], every_class=True)
    loader = StreamedTrainImages(
        files, recipe.augmentation, recipe.data.preprocessing, BATCH, device=device, seed=0
    )
    [read, *_] = list(host_part(loader))
    copies = 4
    pixels = read.batch.images.repeat(copies, 1, 1, 1).pin_memory()
    draws = read.draws.repeat(copies, 1).pin_memory()

    def one_round() -> None:
        positions = torch.arange(len(pixels), device=device)
        moved = (each.to(device, non_blocking=True) for each in (pixels, draws))
        images, numbers = moved
        loader._augment(images, positions, numbers)
        torch.cuda.synchronize()

    benchmark.pedantic(one_round, rounds=20, warmup_rounds=3)
    rate = len(pixels) / benchmark.stats.stats.median
    record({"path": "device", "images_per_second": rate})
