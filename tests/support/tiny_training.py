"""A network, data and settings with which training takes milliseconds a step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from coded_resnext import Codebook, CodedResNeXt, Stage
from coded_resnext.data.batches import Batch, RandomShift, TrainingBatches, batches
from coded_resnext.data.loaders import ignore_signals
from coded_resnext.data.preprocessing import derive_seed
from coded_resnext.training.config import TrainingConfig
from coded_resnext.training.engine import fit
from coded_resnext.training.run_folder import RunFolder

BOOK = Codebook.from_words(["1100", "0110", "0011"])
TARGETS = torch.arange(24) % 3
# One bright quarter for each class.
IMAGES = torch.zeros(24, 1, 6, 6)
for _index, _label in enumerate(TARGETS.tolist()):
    IMAGES[_index, 0, 3 * (_label // 2) :, 3 * (_label % 2) :] = 1 + 0.01 * _index


def make_model(**changes: Any) -> CodedResNeXt:
    """Two blocks, the second coded."""
    torch.manual_seed(0)
    stages = [Stage(1, 8, 2, 4, 4), Stage(1, 8, 2, 4, 2)]
    arguments: dict[str, Any] = {"in_channels": 1, "stem_channels": 8, "drop_branches": 0.3}
    return CodedResNeXt(stages, 3, codebooks=[BOOK], **{**arguments, **changes})


def make_config(**changes: Any) -> TrainingConfig:
    """Four epochs of three steps."""
    arguments: dict[str, Any] = {"epochs": 4, "batch_size": 8, "lr": 0.1, "warmup_epochs": 1}
    return TrainingConfig(**{**arguments, **changes})


def make_loader(config: TrainingConfig, **changes: Any) -> TrainingBatches:
    """All images, shifted."""
    arguments: dict[str, Any] = {"seed": config.seed, "augment": RandomShift(1), **changes}
    return TrainingBatches(IMAGES, TARGETS, config.batch_size, **arguments)


class Samples(Dataset[tuple[Tensor, int, int]]):
    """Images that a worker shifts, by (seed, epoch, sample)."""

    epoch = 1

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        generator = torch.Generator().manual_seed(derive_seed(0, self.epoch, index))
        draws = torch.rand(1, 2, generator=generator)
        return RandomShift(1)(IMAGES[index : index + 1], draws)[0], int(TARGETS[index]), index


class WorkerLoader:
    """A training loader whose images are made by worker processes."""

    def __init__(self, config: TrainingConfig, workers: int, **changes: Any) -> None:
        self.order = make_loader(config, **changes)
        self.samples = Samples()
        self.workers = workers
        self.describe = self.order.describe

    def __len__(self) -> int:
        return len(self.order)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.samples.epoch = epoch
        self.order.set_epoch(epoch, start_step)

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            self.samples,
            batch_sampler=[batch.indices.tolist() for batch in self.order],
            num_workers=self.workers,
            worker_init_fn=ignore_signals if self.workers else None,
            generator=torch.Generator().manual_seed(0),
        )
        for images, targets, indices in loader:
            yield Batch(images, targets, indices)


def train(
    folder: Path,
    config: TrainingConfig,
    *,
    resume: bool = False,
    model: CodedResNeXt | None = None,
    loader: Any = None,
    **options: Any,
) -> tuple[CodedResNeXt, list[dict[str, float]]]:
    """Train in a folder, with options of `fit`; the model and the history."""
    model = model or make_model()
    loader = loader or make_loader(config)
    run = RunFolder(folder, config.to_dict(), resume=resume)
    return model, fit(model, loader, batches(IMAGES, TARGETS), config, run, **options)


def without_cost(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The rows without what differs from run to run."""
    cost = ("images_per_second", "peak_memory_mib", "seconds")
    return [{k: v for k, v in row.items() if k not in cost} for row in history]


def assert_same(a: Any, b: Any, place: str = "") -> None:
    """Nested dictionaries and sequences whose tensors agree bit for bit.

    For what is copied, and for the same steps on one machine with as many threads, which is what
    docs/reliability.md promises.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{place}[{index}]")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype, place
        assert torch.equal(a, b), place
    else:
        assert a == b, place
