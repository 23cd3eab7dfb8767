"""The training loop: epochs, accuracy, checkpoints, resuming, and what ends a run early.

A training script is

    def main(arguments):
        with training_session() as world:                       # training/processes.py
            model = create_model(...).to(world.device)
            config = TrainingConfig(...)
            run = RunFolder(out, {...}, resume=..., world=world)
            train_loader = ...                                  # data/batches.py
            fit(model, train_loader, test_loader, config, run, world=world)

    sys.exit(run_script("name.py", lambda: main(parse_arguments())))

and runs as it is, or under torchrun with as many processes as one likes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor

from coded_resnext.data.batches import ShuffledSamples, TrainLoader
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.files import UNFIT, brief, require_room, say
from coded_resnext.kernels.checks import check_kind, check_targets
from coded_resnext.models.checkpoint import describe_network, save_model
from coded_resnext.models.loss import check_results, decode, not_finite
from coded_resnext.models.resnext import CodedResNeXt

from .config import TrainingConfig
from .guard import NonFiniteError
from .logging import Pace, RunLog
from .processes import TrainingStopped, World
from .run_folder import (
    AVERAGE_FILE,
    BEST_FILE,
    DEAD_FILE,
    RunFolder,
    differences,
    get_rng_state,
    require_same,
    set_rng_state,
)
from .step import TrainStep

NON_FINITE_FILE = "non_finite.json"
FILES_SHOWN = 8
# Three checkpoints of weights, momenta and average, and three model files.
ROOM = 12
# Of the mean energy of a sample's branches, which is 1: what is less is nothing but rounding.
DEAD_SHARE = 1e-12
EvaluationLoader = Iterable[tuple[Tensor, Tensor]]


def fit(
    model: CodedResNeXt,
    train_loader: TrainLoader,
    test_loader: EvaluationLoader,
    config: TrainingConfig,
    run: RunFolder,
    *,
    world: World | None = None,
    preprocessing: Preprocessing | None = None,
    notes: dict[str, Any] | None = None,
    other_images: bool = False,
    input_rate: float | None = None,
) -> list[dict[str, float]]:
    """Trains a network, or goes on training it where the run's folder left off.

    All processes of a run call this with the same arguments but for the loaders' samples. After
    every epoch, and every `recovery_interval` steps, the folder holds a checkpoint from which a
    resumed run gives bit for bit what an uninterrupted one gives, on the same machine and number
    of processes; a signal saves one too. The model of the last epoch is the result: no epoch is
    chosen by its test accuracy. The one with the best is kept beside it, as `best.safetensors`.

    Args:
        model: the network, on its device; its weights are replaced when a run is resumed.
        train_loader: this process's training batches.
        test_loader: batches `(images, targets)` whose accuracy is logged; each process gives its
            own samples.
        config: optimizer, schedule, loss and precision.
        run: the run's folder.
        world: the processes, from `training_session`; left out, this one is alone.
        preprocessing: kept with the model.
        notes: kept with the model, JSON-ready, beside the configuration.
        other_images: go on with a run whose images have changed. Over other training images the
            epoch that was begun is begun anew, from the weights as they are; by other test images
            the best model is chosen anew.
        input_rate: images a second that the training loaders of all processes give alone, to be
            said beside those of the network; see `measure_input`.

    Returns:
        One row for every epoch: learning rate, loss terms, accuracies, speed and memory.

    Raises:
        ValueError: the model is wrapped or all of it frozen, the processes do not divide the batch,
            a batch has targets that are no classes
            of the network, the test batches can be iterated only once, or the folder's checkpoint
            is of another network, or of other images and `other_images` is not set.
        FloatingPointError: a step was not finite; the message says which step, where it came up
            first, and the files of its images. The folder holds the state before it.
        TrainingStopped: after SIGTERM or SIGINT; the folder holds the state after the last step.
        OSError: there is no room for checkpoints, or a file could not be written; the checkpoints
            before it are intact.
    """
    check_kind("model", model, CodedResNeXt, "a CodedResNeXt, which the run wraps and compiles")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model: expected a parameter to train, got all of them frozen")
    world = world or World(device=next(model.parameters()).device)
    config.local_batch_size(world.size)
    if isinstance(test_loader, Iterator):
        raise ValueError(
            "test_loader: expected batches that can be iterated after every epoch, got an iterator"
        )
    with world.signals:
        # What was frozen is known before anything is made of the network.
        weights = sum(value.nbytes for value in model.state_dict().values())
        world.on_main(lambda: require_room(run.path, ROOM * weights))
        state = world.on_main(run.load_state)
        if state is not None:
            _freeze(model, state.get("frozen"))
        training = _Training(
            model, train_loader, test_loader, config, run, world, preprocessing, notes or {}
        )
        if input_rate is not None:
            training.pace = Pace(input_rate, config.batch_size, talks=world.is_main)
        if state is not None:
            try:
                training.restore(state, other_images=other_images)
            except ValueError:
                raise
            except UNFIT as error:
                raise ValueError(
                    f"{run.path}: its last checkpoint lacks a part: {brief(error)}"
                ) from error
        return training.go()


@runtime_checkable
class _KnowsImages(Protocol):
    def fingerprint(self) -> dict[str, Any]: ...


class _Training:
    """The state of a run between its steps."""

    def __init__(
        self,
        model: CodedResNeXt,
        train_loader: TrainLoader,
        test_loader: EvaluationLoader,
        config: TrainingConfig,
        run: RunFolder,
        world: World,
        preprocessing: Preprocessing | None,
        notes: dict[str, Any],
    ) -> None:
        self.model, self.config, self.run, self.world = model, config, run, world
        self.train_loader, self.test_loader = train_loader, test_loader
        self.preprocessing, self.notes = preprocessing, notes
        self.steps_per_epoch = len(train_loader)
        self.data = {"steps_per_epoch": len(train_loader), **_fingerprint(train_loader)}
        self.test_data = _fingerprint(test_loader)
        told = {"run": run.config, "data": self.data, "test images": self.test_data}
        require_same(world, told)
        self.make_step = TrainStep(
            model,
            config,
            world,
            self.steps_per_epoch,
            class_weight=_class_weight(config, train_loader, model.num_classes),
        )
        self.history: list[dict[str, float]] = []
        # What the caller has frozen stays so; a network in evaluation mode is trained whole.
        self.frozen = [m for m in model.modules() if model.training and not m.training]
        self.step = 0
        self.restarted = 0
        """Steps of epochs that were begun anew over other images, by which checkpoints count on."""
        self.comparable = 0
        """The epoch from which on the test images are these, counted from 0."""
        self.is_resumed = False
        self.pace: Pace | None = None
        self.joined = False
        """Says whether the processes have joined their running statistics since the last step."""
        self.seconds = 0.0
        """Seconds spent on this epoch by the processes before this one."""
        self.started = time.perf_counter()
        """When this process began with the epoch."""

    def go(self) -> list[dict[str, float]]:
        """Trains to the end."""
        if not self.is_resumed:
            self._save(models=True)
            self._judge_average()
        self.log = RunLog(
            self.run.path if self.world.is_main else None,
            self.run.config,
            wandb=self.config.log_wandb,
            step=self.step,
            steps=self.config.total_epochs * self.steps_per_epoch,
        )
        try:
            while len(self.history) < self.config.total_epochs:
                self._epoch()
            # One that came while the last epoch was saved.
            stop = int(self.world.maximum(torch.tensor(self.world.signals.received)))
            if stop:
                self._stop(stop)
        except NonFiniteError as error:
            self._explain(error)
        finally:
            self.log.close()
        return self.history

    def _epoch(self) -> None:
        """Does what is left of an epoch: steps, evaluation, checkpoint."""
        self.started = time.perf_counter()
        if self.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first = self.step
        if self.step < (len(self.history) + 1) * self.steps_per_epoch:
            self._steps()
        images = (self.step - first) * self.config.batch_size
        rate = images / (time.perf_counter() - self.started)
        if not self.joined:
            self.make_step.join_statistics()
            self.joined = True
            # A test image that cannot be read then costs the evaluation and not the epoch.
            self._save()
        accuracy, stop = measure_until_stopped(self.model, self.test_loader, self.world)
        row, dead = accuracy.row(), accuracy.dead_branches
        if self.make_step.average is not None and not stop:
            accuracy, stop = measure_until_stopped(
                self.make_step.average.model, self.test_loader, self.world
            )
            row |= accuracy.row("ema_")
        if stop:
            self._stop(stop)
        row = {
            "epoch": len(self.history) + 1,
            "lr": self.config.lr_at(self.step - 1, self.steps_per_epoch),
            **self.make_step.means(self.steps_per_epoch),
            **row,
            "images_per_second": rate,
            "peak_memory_mib": max(self.world.gather(_peak_memory_mib(self.world.device))),
            "seconds": self._elapsed(),
        }
        if self.config.detect_dead_branches:
            row["dead_branches"] = sum(map(len, dead))
        self.history.append(row)
        self.seconds, self.started = 0.0, time.perf_counter()
        self._save(models=True)
        self.log.epoch(_describe(row, self.config.total_epochs), row, self.step)
        if self.config.detect_dead_branches:
            self.world.on_main(lambda: self._report_dead(dead))

    def _judge_average(self) -> None:
        """Says so where the moving average is going to be made of the fresh weights mostly."""
        config, steps = self.config, self.config.total_epochs * self.steps_per_epoch
        share = config.model_ema_decay**steps
        if config.model_ema and not config.model_ema_warmup and share > 0.5 and self.world.is_main:
            say(
                f"model_ema_decay: after the {steps} steps of this run {share:.0%} of the average "
                "are the weights that it began with; give a smaller one, or --model-ema-warmup",
                file=sys.stderr,
            )

    def _report_dead(self, dead: Sequence[Sequence[int]]) -> None:
        """Names the branches that no test image reaches; branches count from 0, blocks from 1."""
        blocks = {str(block): list(branches) for block, branches in enumerate(dead, 1) if branches}
        self.run.write_json(DEAD_FILE, {"epoch": len(self.history), "blocks": blocks})
        for block, branches in blocks.items():
            say(
                f"dead branches of coded block {block}, without energy for all classes: "
                f"{', '.join(map(str, branches))}",
                file=sys.stderr,
            )

    def _steps(self) -> None:
        """Makes the steps that are left of an epoch."""
        epoch, end = len(self.history) + 1, (len(self.history) + 1) * self.steps_per_epoch
        self.model.train()
        for module in self.frozen:
            module.training = False
        self.train_loader.set_epoch(epoch, self.step - (end - self.steps_per_epoch))
        self.joined = False
        for batch in self.train_loader:
            begun = time.perf_counter()
            self.make_step(batch, self.step)
            if self.pace is not None:
                self.make_step.finish()
                self.pace = self.pace.add(time.perf_counter() - begun)
            self.step += 1
            self.log.advance()
            if self.step % self.config.log_interval == 0:
                names, values = self.make_step.metrics, self.make_step.latest.tolist()
                shown = dict(zip(names, values, strict=True))
                shown["lr"] = self.make_step.lr
                self.log.step(f"{epoch}/{self.config.total_epochs}", shown, self.step)
            if self.make_step.stop:
                self._stop(self.make_step.stop)
            interval = self.config.recovery_interval
            if interval and self.step % interval == 0 and self.step < end:
                self._save()
        self.make_step.finish()
        if self.make_step.stop:
            self._stop(self.make_step.stop)
        if self.step != end:
            raise ValueError(
                f"train_loader: expected batches up to step {end}, its length says, got {self.step}"
            )

    def _save(self, *, models: bool = False) -> None:
        """Writes a checkpoint, and with `models` what the run has to show."""
        self.make_step.finish()
        local = {**self.make_step.local_state(), "rng": get_rng_state()}
        locals_ = self.world.gather(local)
        state = {
            "step": self.step,
            "history": self.history,
            "joined": self.joined,
            "seconds": self._elapsed(),
            "restarted": self.restarted,
            "network": describe_network(self.model),
            "data": self.data,
            "test_data": self.test_data,
            "comparable": self.comparable,
            "frozen": self._frozen_names(),
            "processes": locals_,
            **self.make_step.state(),
        }
        name = f"step-{self.step + self.restarted:09d}-epochs-{len(self.history):05d}"

        def write() -> None:
            if models:
                self._save_models()
            self.run.save_state(name, state)
            # Last: an epoch that is in the log can be resumed from.
            if models and self.history:
                self.run.write_metrics(self.history)

        self.world.on_main(write)

    def _save_models(self) -> None:
        """Saves the last epoch's model, its average, and the better of the two if it is the
        best."""
        training = {**self.notes, "config": self.config.to_dict(), "epochs_done": len(self.history)}

        def save(name: str, model: CodedResNeXt) -> None:
            path = self.run.path / name
            save_model(path, model, preprocessing=self.preprocessing, training=training)

        save(self.run.model_path.name, self.model)
        average = self.make_step.average
        if average is not None:
            save(AVERAGE_FILE, average.model)
        scores = [_best(row) for row in self.history[self.comparable :]]
        if scores and scores[-1] > max(scores[:-1], default=-1.0):
            last = self.history[-1]
            better = last.get("ema_test_accuracy", -1.0) > last["test_accuracy"]
            save(BEST_FILE, average.model if average is not None and better else self.model)

    def _frozen_names(self) -> dict[str, list[str]]:
        """Returns the names of parameters that are not trained, and of modules in evaluation."""
        return {
            "parameters": [n for n, p in self.model.named_parameters() if not p.requires_grad],
            "modules": [n for n, m in self.model.named_modules() if m in self.frozen],
        }

    def restore(self, state: dict[str, Any], *, other_images: bool) -> None:
        """Goes back to a checkpoint; raises as `fit`."""
        differing = differences(state["network"], describe_network(self.model))
        if differing:
            raise ValueError(
                f"model: the checkpoint in {self.run.path} is of another network: "
                f"{'; '.join(differing)}"
            )
        # Checkpoints of earlier versions do not know what they were trained and tested on, and of a
        # loader without a fingerprint nobody does.
        changed = differences(state.get("data", self.data), self.data)
        known = state.get("test_data") or self.test_data
        tested = differences(known, self.test_data) if self.test_data else []
        if (changed or tested) and not other_images:
            raise ValueError(
                f"data: the run in {self.run.path} was {'trained' if changed else 'tested'} on "
                f"other images: {'; '.join(changed or tested)}; give it the same ones, begin a new "
                "run, or go on with these (--other-images): over other training images the epoch "
                "is begun anew, and by other test images the best model is chosen anew"
            )
        self.is_resumed = True
        self.step, self.history = state["step"], state["history"]
        self.joined, self.seconds = state["joined"], state["seconds"]
        self.restarted = state.get("restarted", 0)
        self.comparable = len(self.history) if tested else state.get("comparable", 0)
        stored = state["processes"]
        if len(stored) == self.world.size:
            local = stored[self.world.rank]
        else:
            if self.world.is_main:
                say(
                    f"{self.run.path}: the run was on {len(stored)} processes and goes on with "
                    f"{self.world.size}: as good, but not the same bits",
                    file=sys.stderr,
                )
            local = _mean_process(stored)
        self.make_step.load(state, local)
        set_rng_state(local["rng"])
        if tested and self.world.is_main:
            say(
                f"other test images than before ({'; '.join(tested)}): accuracies up to epoch "
                f"{len(self.history)} are of those, and {BEST_FILE} is chosen anew",
                file=sys.stderr,
            )
        if changed:
            begun = len(self.history) * self.steps_per_epoch
            self.restarted += self.step - begun
            self.step, self.joined = begun, False
            self.make_step.sums.zero_()
            if self.world.is_main:
                say(
                    f"other images than before ({'; '.join(changed)}): epoch "
                    f"{len(self.history) + 1} is begun anew over them",
                    file=sys.stderr,
                )

    def _stop(self, signal_number: int) -> NoReturn:
        """Saves and ends, for a signal that all processes have agreed on."""
        self._save()
        raise TrainingStopped(
            signal_number,
            f"stopped: {self.run.path} holds the state after step {self.step}; "
            "the same command with --resume finishes the run",
        )

    def _explain(self, error: NonFiniteError) -> NoReturn:
        """Saves the state before a step that was not finite, and says where it came up."""
        self.step = error.step
        self._save()
        files = self.train_loader.describe(torch.tensor(error.indices))
        self.world.on_main(
            lambda: self.run.write_json(
                NON_FINITE_FILE, {"step": error.step, "terms": error.terms, "images": files}
            )
        )
        shown = ", ".join(files[:FILES_SHOWN])
        rest = f" and {len(files) - FILES_SHOWN} more" if len(files) > FILES_SHOWN else ""
        raise FloatingPointError(
            f"step {error.step} (epoch {error.step // self.steps_per_epoch + 1}) is not finite: "
            f"first the {error.terms[0]}; the weights are those before it; its images: "
            f"{shown}{rest} ({self.run.path / NON_FINITE_FILE} lists all)"
        )

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.started


def _freeze(model: CodedResNeXt, names: dict[str, list[str]] | None) -> None:
    """Freezes the parameters and modules that were frozen when a run began, and no others."""
    if names is None:
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names["parameters"])
    model.train()
    for name, module in model.named_modules():
        module.training = name not in names["modules"]


def _fingerprint(loader: object) -> dict[str, Any]:
    """Returns what tells the images of a loader from others, where the loader can say it."""
    return loader.fingerprint() if isinstance(loader, _KnowsImages) else {}


def _class_weight(config: TrainingConfig, loader: TrainLoader, classes: int) -> Tensor | None:
    """Returns weights `[K]` whose mean over the training images is 1; None for equal ones.

    Raises:
        ValueError: the loader does not tell the classes of its images.
    """
    if config.class_weight == "none":
        return None
    if not isinstance(loader, ShuffledSamples):
        raise ValueError(
            "class_weight: expected none, or a loader that has targets [n], got "
            f"{type(loader).__name__}"
        )
    counts = loader.targets.bincount(minlength=classes).clamp_min(1)
    return loader.samples / (classes * counts.float())


def _best(row: dict[str, float]) -> float:
    """Returns the accuracy by which `best.safetensors` is kept."""
    return max(row["test_accuracy"], row.get("ema_test_accuracy", 0.0))


def _mean_process(stored: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what a process begins with when their number has changed: means over those before."""
    columns = zip(*(process["statistics"] for process in stored), strict=True)
    return {
        "statistics": [torch.stack(c).double().mean(0).to(c[0].dtype) for c in columns],
        "sums": torch.stack([process["sums"] for process in stored]).mean(0),
        "rng": stored[0]["rng"],
    }


def _peak_memory_mib(device: torch.device) -> float:
    """Returns the GPU's peak in this epoch; on a CPU, the process's in its life."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if os.name != "posix":
        return 0.0
    import resource

    # Kilobytes on Linux, bytes on macOS.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _describe(row: dict[str, float], epochs: int) -> str:
    early = [f"{value:.1%}" for name, value in row.items() if name.startswith("early_decoding")]
    coded = f", early decoding {' '.join(early)}" if early else ""
    return (
        f"epoch {row['epoch']:.0f}/{epochs}: loss {row['total']:.3f}, "
        f"test accuracy {row['test_accuracy']:.2%} "
        f"(balanced {row['test_balanced_accuracy']:.2%}){coded}, "
        f"{row['images_per_second']:.0f} images/s"
    )


@dataclass(frozen=True)
class Accuracy:
    """Shares of correct predictions, 0..1."""

    final: float
    early: tuple[float, ...]
    """Accuracy of early decoding (9) for every coded block, 0..1."""
    balanced: float
    """Mean over the classes of the share of their samples that are classified correctly."""
    samples: int
    """Number of samples predicted, over all processes."""
    dead_branches: tuple[tuple[int, ...], ...] = ()
    """Of every coded block, the branches without energy for any of the samples."""

    def row(self, prefix: str = "") -> dict[str, float]:
        """Returns the numbers by the names under which they are logged."""
        early = {f"{prefix}early_decoding_{i}": a for i, a in enumerate(self.early, 1)}
        accuracies = {"test_accuracy": self.final, "test_balanced_accuracy": self.balanced}
        return {f"{prefix}{name}": value for name, value in accuracies.items()} | early


def measure_accuracy(
    model: CodedResNeXt, loader: EvaluationLoader, *, world: World | None = None
) -> Accuracy:
    """Measures the accuracy of the classifier and of every early decoder, in evaluation mode.

    Args:
        model: the network; its mode is left as it was.
        loader: batches `(images, targets)`. With several processes each gives its own samples;
            one may have fewer than another, or none.
        world: the processes that share the samples. All must call this.

    Raises:
        ValueError: no process has samples, targets are no classes of the network, or results are
            not finite.
    """
    accuracy, _ = measure_until_stopped(model, loader, world or World())
    return accuracy


@torch.inference_mode()
def measure_until_stopped(
    model: CodedResNeXt, loader: EvaluationLoader, world: World
) -> tuple[Accuracy, int]:
    """Returns the accuracy, and the signal that ended it before the last sample, or 0.

    A process leaves its samples when a signal reaches it; the others finish theirs.
    """
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    codewords = [book.codewords.to(device) for book in model.codebooks]
    largest = [torch.zeros(book.branches, device=device) for book in model.codebooks]
    # The last entry counts the samples.
    counts = torch.zeros(2 + len(codewords), dtype=torch.int64, device=device)
    # Of every class the samples, and those that are classified correctly.
    by_class = torch.zeros(2, model.num_classes, dtype=torch.int64, device=device)
    bad = torch.zeros(1 + len(codewords), dtype=torch.bool, device=device)
    try:
        for images, targets in loader:
            check_targets(targets, len(images), model.num_classes)
            logits, energies = model(images.to(device), return_energies=True)
            bad |= not_finite(logits, energies)
            for most, values in zip(largest, energies, strict=True):
                torch.maximum(most, values.amax(0).to(most), out=most)
            early = [
                decode(e, words, check_values=False)
                for e, words in zip(energies, codewords, strict=True)
            ]
            targets = targets.to(device)
            correct = torch.stack([logits.argmax(1), *early]) == targets
            by_class[0].index_add_(0, targets, torch.ones_like(targets))
            by_class[1].index_add_(0, targets, correct[0].long())
            counts[:-1] += correct.sum(1)
            counts[-1] += len(targets)
            if world.signals.received:
                break
    finally:
        for module, training in modes:
            module.training = training
    check_results(model, world.maximum(bad.int()).bool())
    stop = int(world.maximum(torch.tensor(world.signals.received)))
    *correct_counts, samples = world.add(counts).tolist()
    if samples == 0:
        raise ValueError("loader: expected at least one sample, got none")
    final, *shares = (count / samples for count in correct_counts)
    dead = [
        tuple((world.maximum(most) <= DEAD_SHARE).nonzero().flatten().tolist()) for most in largest
    ]
    per_class, hits = world.add(by_class).double()
    balanced = float((hits / per_class)[per_class > 0].mean())
    return Accuracy(final, tuple(shares), balanced, samples, tuple(dead)), stop
