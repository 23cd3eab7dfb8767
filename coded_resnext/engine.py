"""The training loop."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batch import TrainLoader
from .checkpoint import save_model
from .config import TrainingConfig
from .data import Preprocessing, derive_seed
from .decode import decode
from .kernels.ops import check_targets
from .losses import CodedLoss
from .models import CodedResNeXt
from .run_folder import RunFolder, TensorBoardLog

try:
    from tqdm.auto import tqdm
except ImportError as error:
    raise ImportError("training shows its progress: pip install 'coded-resnext[train]'") from error

# Reading a loss makes the host wait for the device; the progress bar does so this often.
STEPS_BETWEEN_READINGS = 10


@dataclass(frozen=True)
class Accuracy:
    """Shares of correct predictions, 0..1."""

    final: float
    early: tuple[float, ...]
    """Of early decoding (9), for every coded block."""


@torch.inference_mode()
def measure_accuracy(model: CodedResNeXt, loader: Iterable[tuple[Tensor, Tensor]]) -> Accuracy:
    """Accuracy of the classifier and of every early decoder, in evaluation mode.

    Raises:
        ValueError: the loader gives no samples, or targets that are no classes of the network.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    correct = torch.zeros(1 + len(model.codebooks), dtype=torch.int64, device=device)
    samples = 0
    for images, targets in loader:
        check_targets(targets, len(images), model.num_classes)
        logits, energies = model(images.to(device), return_energies=True)
        predicted = [
            logits.argmax(1),
            *(decode(e, book) for e, book in zip(energies, model.codebooks, strict=True)),
        ]
        correct += (torch.stack(predicted) == targets.to(device)).sum(1)
        samples += len(targets)
    model.train(was_training)
    if samples == 0:
        raise ValueError("loader: expected at least one sample, got none")
    final, *early = (correct.double() / samples).tolist()
    return Accuracy(final, tuple(early))


def fit(
    model: CodedResNeXt,
    train_loader: TrainLoader,
    test_loader: Iterable[tuple[Tensor, Tensor]],
    config: TrainingConfig,
    run: RunFolder,
    *,
    preprocessing: Preprocessing | None = None,
    notes: dict[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Train a network, or go on training it where the run's folder left off.

    After every epoch the folder holds the log, the model and the state, so that an interrupted
    run is usable and can be resumed; the epochs that follow are bit for bit those of a run that
    was never interrupted, on the same machine. The model of the last epoch is the result: no epoch
    is chosen by its test accuracy.

    Args:
        model: the network, on its device; its weights are replaced when a run is resumed.
        train_loader: training batches.
        test_loader: batches whose accuracy is logged.
        config: optimizer, schedule and loss.
        run: the run's folder.
        preprocessing: kept with the model.
        notes: kept with the model, JSON-ready, beside the configuration.

    Returns:
        One row for every epoch: learning rate, loss terms and accuracies.

    Raises:
        ValueError: a batch has targets that are no classes of the network.
        FloatingPointError: the loss of an epoch is not finite; the folder holds the epoch before.
    """
    device = next(model.parameters()).device
    loss = CodedLoss(
        model.codebooks,
        weight=config.coding_weight,
        exponent=config.exponent,
        threshold=config.threshold,
        label_smoothing=config.smoothing,
    ).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
        fused=True,
    )
    history: list[dict[str, float]] = []
    state = run.load_state()
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]

    def save() -> None:
        training = {**(notes or {}), "config": config.to_dict(), "epochs_done": len(history)}
        save_model(run.model_path, model, preprocessing=preprocessing, training=training)
        run.save_state(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "history": history,
            }
        )
        # Last: an epoch that is in the log can be resumed from.
        if history:
            run.write_metrics(history)

    if state is None:
        save()
    log = TensorBoardLog(run.path / "tensorboard", first_epoch=len(history) + 1)
    steps = config.total_epochs * len(train_loader)
    bar = tqdm(
        total=steps,
        initial=len(history) * len(train_loader),
        unit="step",
        disable=not sys.stderr.isatty(),
    )
    try:
        for epoch in range(len(history) + 1, config.total_epochs + 1):
            start = time.perf_counter()
            row = {
                "epoch": epoch,
                **_train_epoch(model, loss, optimizer, train_loader, config, epoch, bar),
            }
            accuracy = measure_accuracy(model, test_loader)
            row["test_accuracy"] = accuracy.final
            row |= {f"early_decoding_{i}": a for i, a in enumerate(accuracy.early, 1)}
            row["seconds"] = time.perf_counter() - start
            history.append(row)
            save()
            log.write(epoch, row)
            if bar.disable:
                print(_describe(row, config.total_epochs), file=sys.stderr)
    finally:
        bar.close()
        log.close()
    return history


def _train_epoch(
    model: CodedResNeXt,
    loss: CodedLoss,
    optimizer: torch.optim.Optimizer,
    loader: TrainLoader,
    config: TrainingConfig,
    epoch: int,
    bar: Any,
) -> dict[str, float]:
    """One pass over the training data; the means of all loss terms and the last learning rate."""
    device = next(model.parameters()).device
    model.train()
    loader.set_epoch(epoch)
    sums: dict[str, Tensor] = {}
    rate = config.lr
    for index, (images, targets, _) in enumerate(loader):
        step = (epoch - 1) * len(loader) + index
        # DropSubNNs draws from the default generator; seeding it by step makes resuming exact.
        torch.manual_seed(derive_seed(config.seed, step, 0))
        rate = config.lr_at(step, len(loader))
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Here, where they still are on the host: the loss does not read an accelerator's values.
        check_targets(targets, len(images), model.num_classes)
        logits, energies = model(images.to(device), return_energies=True)
        terms = loss(logits, energies, targets.to(device))
        optimizer.zero_grad(set_to_none=True)
        terms.total.backward()
        optimizer.step()
        named = {name: term.detach() for name, term in terms.named().items()}
        sums = {name: sums[name] + term if sums else term for name, term in named.items()}
        if index % STEPS_BETWEEN_READINGS == 0:
            shown = {name: f"{float(term):.3f}" for name, term in named.items()}
            bar.set_postfix(epoch=f"{epoch}/{config.total_epochs}", **shown, refresh=False)
        bar.update()
    means = {name: float(total) / len(loader) for name, total in sums.items()}
    for name, value in means.items():
        if not -float("inf") < value < float("inf"):
            raise FloatingPointError(f"the mean of {name} over epoch {epoch} is {value}")
    return {"learning_rate": rate, **means}


def _describe(row: dict[str, float], epochs: int) -> str:
    early = [f"{value:.1%}" for name, value in row.items() if name.startswith("early_decoding")]
    coded = f", early decoding {' '.join(early)}" if early else ""
    return (
        f"epoch {row['epoch']:.0f}/{epochs}: loss {row['total']:.3f}, "
        f"test accuracy {row['test_accuracy']:.2%}{coded}"
    )
