"""Where a run's numbers go while it trains: progress bar, TensorBoard, Weights & Biases.

The CSV file is not here: it follows from the history in the checkpoint, see
`training/run_folder.py`.
"""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from coded_resnext.files import make_folder, say, write_atomically

try:
    from tqdm.auto import tqdm
except ImportError as error:
    raise ImportError("training shows its progress: pip install 'coded-resnext[train]'") from error


class ScalarLog(Protocol):
    """Takes numbers by name."""

    def write(self, prefix: str, values: Mapping[str, float], step: int) -> None:
        """Adds values after so many steps; the prefix says whether of a step or an epoch."""

    def close(self) -> None:
        """Writes what is buffered."""


class TensorBoardLog:
    """Scalars for TensorBoard.

    Args:
        folder: where the event files go.
        first_step: values of this step and later ones, left by an interrupted run, are dropped.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        # The writer's import goes through a module that its own library deprecates.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch.utils.tensorboard import SummaryWriter
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, prefix: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{prefix}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class WandbLog:
    """Scalars for Weights & Biases; a resumed run goes on in the same record.

    Args:
        folder: the run's folder; its name is the name of the record.
        config: of the run.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                "log_wandb: Weights & Biases is not installed: pip install wandb"
            ) from error
        record = folder / "wandb_id"
        identity = record.read_text(encoding="utf-8") if record.exists() else None
        self._run = wandb.init(
            project="coded-resnext",
            name=folder.resolve().name,
            dir=str(folder),
            config=config,
            id=identity,
            resume="allow",
        )
        write_atomically(record, self._run.id.encode())

    def write(self, prefix: str, values: Mapping[str, float], step: int) -> None:
        self._run.log({f"{prefix}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class Pace:
    """Says once, early in a run, whether the input or the network is the limit.

    Args:
        input_rate: images a second of the input alone, over all processes.
        images: of a step, over all processes.
        talks: whether it says anything.
    """

    # Compilers and recorded graphs are at work in the first steps.
    WARM_UP, MEASURED = 10, 10

    def __init__(self, input_rate: float, images: int, *, talks: bool) -> None:
        self.input_rate, self.images, self.talks = input_rate, images, talks
        self._seconds: list[float] = []

    def add(self, seconds: float) -> Pace | None:
        """Takes in the time of a step without its input; None as soon as it has said it."""
        self._seconds.append(seconds)
        if len(self._seconds) < self.WARM_UP + self.MEASURED:
            return self
        rate = self.images / statistics.median(self._seconds[self.WARM_UP :])
        if self.talks:
            limit = (
                "input is the limit; see `Reading JPEGs faster` in docs/training.md, and --workers"
                if self.input_rate < rate
                else "network is the limit"
            )
            say(
                f"input {self.input_rate:,.0f} images/s, network {rate:,.0f}: the {limit}",
                file=sys.stderr,
            )
        return None


class RunLog:
    """Everything that a run's main process shows; the other processes are silent.

    Args:
        folder: the run's folder, or None to be silent.
        config: of the run, for Weights & Biases.
        wandb: whether to log there.
        step: steps done before.
        steps: steps of the whole run.
    """

    def __init__(
        self, folder: Path | None, config: dict[str, Any], *, wandb: bool, step: int, steps: int
    ) -> None:
        self._logs: list[ScalarLog] = []
        if folder is not None:
            try:
                self._logs.append(
                    TensorBoardLog(make_folder(folder, "tensorboard"), first_step=step + 1)
                )
            except ImportError:
                say("TensorBoard is not installed: its logs are left out", file=sys.stderr)
            if wandb:
                self._logs.append(WandbLog(folder, config))
        self._talks = folder is not None
        self._bar = tqdm(
            total=steps,
            initial=step,
            unit="step",
            disable=not (self._talks and sys.stderr.isatty()),
        )

    def advance(self) -> None:
        """Moves the progress bar by a step."""
        self._bar.update()

    def step(self, epoch: str, values: Mapping[str, float], step: int) -> None:
        """Logs the metrics of a step."""
        shown = {name: f"{values[name]:.3f}" for name in ("total", "cross_entropy")}
        self._bar.set_postfix(epoch=epoch, **shown, refresh=False)
        for log in self._logs:
            log.write("step", values, step)

    def epoch(self, line: str, values: Mapping[str, float], step: int) -> None:
        """Logs the row of an epoch, and prints it as a line."""
        for log in self._logs:
            log.write("epoch", values, step)
        if self._talks and self._bar.disable:
            say(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Writes what is buffered."""
        self._bar.close()
        for log in self._logs:
            log.close()
