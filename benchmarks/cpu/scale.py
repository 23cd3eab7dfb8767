"""Seconds and memory against classes and images, by synthetic loaders and networks of no work.

    python benchmarks/cpu/scale.py                          all rows as a table
    python benchmarks/cpu/scale.py observation 1000 2000    one row, in this process
    python benchmarks/cpu/scale.py imagenet                 a twentieth of ImageNet's evaluation

What grows is the bookkeeping: the network is a block of a few channels on images of four pixels.
Every row is measured in a process of its own; seconds are those of the processor. Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from bench_block import added_mib
from torch import Tensor

from coded_resnext import Codebook, CodedResNeXt, Stage, create_model
from coded_resnext.data.image_folder import Files
from coded_resnext.data.image_sets import FileImages, ImageSplits
from coded_resnext.interpret import Paths, Semantics, evaluate, observe, plan
from coded_resnext.interpret.one_class import ClassScorer
from coded_resnext.training.recipe import RECIPES, load_recipe
from coded_resnext.training.run_folder import RunFolder

# Classes and images of every row; of a history the second is its number of epochs.
ROWS = {
    "start-up": [(10, 200_000), (1000, 200_000), (10_000, 200_000), (1000, 1_280_000)],
    "listing": [(10, 1000), (10, 10_000), (1000, 10_000)],
    "observation": [(10, 2000), (10, 200_000), (1000, 2000), (10_000, 2000), (10_000, 10_000)],
    "distances": [(100, 100), (1000, 1000), (2000, 2000), (10_000, 10_000)],
    "drawing": [(10, 10_000), (1000, 50_000), (1000, 1_000_000), (10_000, 1_000_000)],
    "evaluation": [(10, 1000), (10, 10_000), (1000, 10_000), (10_000, 10_000)],
    "history": [(1, 100), (1, 1000), (1, 10_000)],
}


class Noise:
    """Batches of noise that knows its classes: each in turn."""

    def __init__(self, classes: int, images: int, size: int = 4, batch: int = 500) -> None:
        self.targets = torch.arange(images) % classes
        self.size, self.batch = size, batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for targets in self.targets.split(self.batch):
            yield torch.randn(len(targets), 3, self.size, self.size, generator=generator), targets


def network(classes: int) -> CodedResNeXt:
    """Returns one coded block of 32 branches, 8 of them for each class."""
    draw, words = np.random.default_rng(0), dict[bytes, np.ndarray]()
    while len(words) < classes:
        word = draw.permutation(np.arange(32) < 8)
        words[word.tobytes()] = word
    torch.manual_seed(0)
    book = Codebook(np.stack(list(words.values())).astype(int).tolist())
    return CodedResNeXt([Stage(1, 16, 1, 32, 8)], classes, codebooks=[book], stem_channels=8).eval()


def start_up(classes: int, images: int) -> Callable[[], object]:
    names = [f"{index:07d}.png" for index in range(images)]
    files = Files(Path("images"), names, [1] * images)
    train = FileImages(files, torch.arange(images) % classes)
    splits = ImageSplits("noise", tuple(map(str, range(classes))), train, train.subset([0]))
    return splits.slice


def listing(classes: int, images: int) -> Callable[[], object]:
    folder = TemporaryDirectory()
    root = Path(folder.name)
    names = [f"{index:05d}" for index in range(classes)]
    for name in names:
        (root / name).mkdir()
    for index in range(images):
        (root / names[index % classes] / f"{index:07d}.png").write_bytes(b"x")
    return lambda: (FileImages.of_classes(root, names, every_class=True), folder.cleanup)


def observation(classes: int, images: int) -> Callable[[], object]:
    model, loader = network(classes), Noise(classes, images)
    return lambda: observe(model, loader)


def distances(classes: int, images: int) -> Callable[[], object]:
    observed = observe(network(classes), Noise(classes, images))
    paths = Paths.of(observed)
    return lambda: Semantics.of(observed, paths)


def drawing(classes: int, images: int) -> Callable[[], object]:
    model, targets = network(classes), Noise(classes, images).targets
    return lambda: ClassScorer(model, "test", negatives_per_positive=9, targets=targets)


def evaluation(classes: int, images: int) -> Callable[[], object]:
    model, loader = network(classes), Noise(classes, images)
    some = {"repeats": 1, "removal_images": 1000, "classes": 100, "negatives_per_positive": 9}
    return lambda: evaluate(model, None, loader, **some)  # type: ignore[arg-type]


def history(_: int, epochs: int) -> Callable[[], object]:
    names = [f"metric_{index}" for index in range(15)]
    rows = [dict.fromkeys(names, epoch / 7) for epoch in range(epochs)]
    folder = TemporaryDirectory()
    run = RunFolder(folder.name, {})
    run.save_state("step-1", {"history": rows[:-1]})
    run.write_metrics(rows[:-1])

    def save() -> None:
        run.save_state("step-2", {"history": rows})
        run.write_metrics(rows)
        folder.cleanup()

    return save


TASKS = {
    "start-up": start_up,
    "listing": listing,
    "observation": observation,
    "distances": distances,
    "drawing": drawing,
    "evaluation": evaluation,
    "history": history,
}


def measure(task: str, classes: int, images: int) -> str:
    """Returns the seconds that it takes, and the MiB that it adds to the process at its peak."""
    TASKS[task](10, 100)()  # imports what the work needs
    work = TASKS[task](classes, images)
    start = time.process_time()
    memory = added_mib(work)
    return f"{time.process_time() - start:.3g} {memory:.0f}"


def imagenet(classes: int = 50, images: int = 2500, size: int = 32) -> None:
    """Print what the evaluation of a twentieth takes, and three plain passes over these images.

    Of the 1,000 classes of the network a twentieth have images, so that for each of these there are
    as many images and draws as in the recipe.
    """
    model = create_model("coded_resnext50_32x4d", codebook_variant="paper").eval()
    data = load_recipe(RECIPES / "imagenet.yaml", {"data_dir": "."}).data
    draws = {
        "test_images": data.eval_images,
        "removal_images": data.removal_images,
        "threshold_images": data.threshold_images,
    }
    options: Any = {"repeats": data.repeats}
    options |= {name: count // 20 for name, count in draws.items() if count}
    train, test = (Noise(classes, images, size, 100) for _ in range(2))
    planned = plan(model, train, test, image_size=(size, size), **options)
    print(f"{planned}; {sum(planned.macs.values()) / 1e9:,.0f} G multiply-accumulates")
    start = time.process_time()
    with torch.inference_mode():
        for pixels, _ in test:
            model(pixels)
    plain = time.process_time() - start
    start = time.process_time()
    evaluation = evaluate(model, train, test, **options)
    seconds = time.process_time() - start
    ratio = seconds / plain / 3
    print(f"plain pass {plain:.1f} s; evaluation {seconds:.1f} s, {ratio:.2f} of three such passes")
    print(f"on {evaluation.test_samples:,} images, {evaluation.threshold_samples:,} of training")


def main() -> None:
    """Prints one row, or all of them as a table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("work", nargs="?", choices=[*ROWS, "imagenet"], help="all if left out")
    parser.add_argument(
        "sizes", nargs="*", type=int, metavar="N", help="classes and images: one row"
    )
    args = parser.parse_args()
    if args.work == "imagenet":
        imagenet()
        return
    if args.sizes:
        if len(args.sizes) != 2:
            parser.error(f"N: expected classes and images, got {len(args.sizes)} numbers")
        print(measure(args.work, *args.sizes))
        return
    print("| work | classes | images | seconds | MiB |\n|---|---|---|---|---|")
    for task in [args.work] if args.work else ROWS:
        for classes, images in ROWS[task]:
            command = [sys.executable, __file__, task, str(classes), str(images)]
            row = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            print(f"| {task} | {classes:,} | {images:,} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
