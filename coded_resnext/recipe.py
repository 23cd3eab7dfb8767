"""A recipe: data, network and training of a run, as typed settings and as a YAML file."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from .augment import Augmentation
from .config import TrainingConfig
from .data import Preprocessing
from .datasets import Storage
from .interpret.budget import parse_duration
from .kernels import Backend
from .settings import add_flags, check_names, make_group, read_yaml, write_yaml

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# What a recipe file says about itself.
ABOUT = "about"
ABOUT_KEYS = ("source", "expected", "cost", "command")


@dataclass(frozen=True)
class DataConfig:
    """Data."""

    dataset: str = "folder"
    """cifar10, cifar100, synthetic, or folder: DATA_DIR/train/CLASS/* with test or val."""
    data_dir: str | None = None
    """Where the data are; unset, $CODED_RESNEXT_DATA, or ./data."""
    download: bool = False
    """Let torchvision fetch a CIFAR set that is not there."""
    storage: Storage = "auto"
    """Of a folder: memory decodes all images once, files reads them every time, auto decides."""
    train_images: int | None = None
    """Train on about so many images, the same share of every class."""
    test_images: int | None = None
    """Test on about so many images."""
    holdout: float = 0.0
    """Test on this share of the training images instead, to choose settings."""
    img_size: int = 224
    """Height and width of the network's input."""
    test_resize: int | None = None
    """What the shorter side is resized to before the centre is cut out in evaluation; unset, the
    input's size."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Of the three channels, intensities 0 to 1."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation of the three channels."""
    workers: int = 4
    """Processes that read images, for each training process; 0 reads in the training process."""
    validation_batch_size: int = 256
    """Images at a time in evaluation, for each process."""
    max_damaged: float = 0.01
    """Largest share of training images that may be unreadable, and are skipped."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the network's input in evaluation; raises ValueError."""
        return Preprocessing(self.img_size, 3, self.mean, self.std, self.test_resize)


@dataclass(frozen=True)
class ModelConfig:
    """Network."""

    model: str
    """A network of the library, see `coded_resnext.list_models()`."""
    drop_branches: float = 0.1
    """DropSubNNs: probability that a branch is silenced in a training step, (5)."""
    head_bias: bool = False
    """Whether the classifier has a bias: not as published, but as in timm and torchvision."""
    codebooks: tuple[str, ...] = ()
    """Codebook files, one for each coded stage; unset, they are made for the classes."""
    bn_momentum: float = 0.1
    """Share of a new batch in the running statistics of BatchNorm."""
    backend: Backend = "auto"
    """Who computes the blocks: auto, torch (layer by layer), fused, triton, or reference."""
    initial_checkpoint: str | None = None
    """Start from these weights: a run or model file of this library, or the state dict of a plain
    ResNeXt of timm or torchvision."""

    def __post_init__(self) -> None:
        if not 0 < self.bn_momentum <= 1:
            raise ValueError(f"bn_momentum: expected 0 < value <= 1, got {self.bn_momentum}")


@dataclass(frozen=True)
class LearningRateRule:
    """Learning rate from the batch."""

    lr_base: float
    """In place of lr: the learning rate for batches of lr_base_size, scaled to the batch."""
    lr_base_size: int = 256
    """Batch for which lr_base is meant."""
    lr_base_scale: Literal["linear", "sqrt"] = "linear"
    """How the learning rate grows with the batch."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr_base) and self.lr_base > 0):
            raise ValueError(f"lr_base: expected a number above 0, got {self.lr_base}")
        if self.lr_base_size < 1:
            raise ValueError(f"lr_base_size: expected at least 1, got {self.lr_base_size}")

    def __call__(self, batch_size: int) -> float:
        """The learning rate for a batch size over all processes."""
        share = batch_size / self.lr_base_size
        return self.lr_base * (math.sqrt(share) if self.lr_base_scale == "sqrt" else share)


@dataclass(frozen=True)
class Recipe:
    """All that decides a run's result."""

    data: DataConfig
    augmentation: Augmentation
    model: ModelConfig
    training: TrainingConfig
    about: Mapping[str, str]
    """Source, expected accuracy, cost and command, as the recipe's file says."""
    lr_rule: LearningRateRule | None = None
    """The rule that the learning rate was made by."""

    def settings(self) -> dict[str, Any]:
        """All settings by name, the learning rate as the rule made it; JSON-ready.

        A recipe that is made from these is the same one.
        """
        groups = (self.data, self.augmentation, self.model, self.training)
        return {k: v for group in groups for k, v in asdict(group).items()}

    def to_yaml(self) -> str:
        """The settings as a file that `load_recipe` reads."""
        return write_yaml({ABOUT: dict(self.about), **self.settings()})

    def describe_lr(self) -> str:
        """The learning rates that the run goes through, and where they come from."""
        training, rule = self.training, self.lr_rule
        text = f"learning rate {training.lr:g}"
        if rule is not None:
            text += (
                f" = {rule.lr_base:g} for batches of {rule.lr_base_size}, scaled "
                f"({rule.lr_base_scale}) to {training.batch_size}"
            )
        text += f", {training.warmup_epochs:g} epochs of warm-up"
        text += f", cosine to {training.min_lr:g} at epoch {training.epochs}"
        return text + f", {training.cooldown_epochs} epochs of cool-down"


_GROUPS = (DataConfig, Augmentation, ModelConfig, TrainingConfig, LearningRateRule)
_OWN_FLAGS = (
    *("config", "out", "resume", "evaluation", "budget", "device"),
    *("outside", "threshold_images", "repeats"),
)
SETTINGS = tuple(field.name for group in _GROUPS for field in fields(group))


def make_recipe(*layers: Mapping[str, Any]) -> Recipe:
    """A recipe from layers of settings; what a later layer says replaces what an earlier one says.

    A layer with `lr` also replaces an earlier `lr_base`, and the other way round.

    Raises:
        ValueError: an unknown setting, a value of the wrong type or range, a missing one, or a
            layer with both `lr` and `lr_base`.
    """
    settings: dict[str, Any] = {}
    for layer in layers:
        check_names(layer, [ABOUT, *SETTINGS])
        if layer.get("lr") is not None and layer.get("lr_base") is not None:
            raise ValueError("lr: expected either lr or lr_base, got both")
        if layer.get("lr") is not None:
            settings.pop("lr_base", None)
        if layer.get("lr_base") is not None:
            settings.pop("lr", None)
        settings |= layer
    about = settings.get(ABOUT) or {}
    if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
        raise ValueError(f"{ABOUT}: expected texts by name, got {about!r}")
    rule = None
    if settings.get("lr_base") is not None:
        rule = make_group(LearningRateRule, settings)
        if not isinstance(settings.get("batch_size"), int):
            raise ValueError("batch_size: expected a whole number, since lr_base scales with it")
        settings["lr"] = rule(settings["batch_size"])
    recipe = Recipe(
        make_group(DataConfig, settings),
        make_group(Augmentation, settings),
        make_group(ModelConfig, settings),
        make_group(TrainingConfig, settings),
        about,
        rule,
    )
    _ = recipe.data.preprocessing  # its checks
    return recipe


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from its file, with some settings replaced.

    Raises:
        OSError: the file cannot be read.
        ValueError: as `make_recipe`; the message names the file when it is at fault.
        ImportError: PyYAML is missing.
    """
    content = read_yaml(path)
    try:
        check_names(content, [ABOUT, *SETTINGS])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return make_recipe(content, overrides or {})


@dataclass(frozen=True)
class Command:
    """What the command line of a training script asks for."""

    recipe: Recipe
    out: Path
    resume: bool
    evaluation: bool
    budget: float
    """Seconds that the evaluation may take."""
    device: str
    outside: str | None = None
    """Images of none of the classes, see `outside.open_outside`."""
    threshold_images: int | None = None
    """Training images on which the one-class classifiers choose their thresholds; None for all."""
    repeats: int = 5
    """Of the random branch removals."""


def parse_command(
    argv: Sequence[str] | None, *, description: str, recipes: Path, default: str
) -> Command:
    """Read the command line of a training script.

    Args:
        argv: arguments; None takes those of the process.
        description: of the script.
        recipes: the folder of the recipe files.
        default: name of the recipe that is used when none is named.

    Raises:
        OSError, ValueError, ImportError: as `load_recipe`.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Every setting of a recipe can be replaced by a flag. The run's folder gets "
        "recipe.yaml, the settings as they were used.",
        allow_abbrev=False,
    )
    names = ", ".join(sorted(path.stem for path in recipes.glob("*.yaml")))
    parser.add_argument(
        "-c", "--config", default=default, help=f"a YAML file, or one of {names} (%(default)s)"
    )
    parser.add_argument("--out", type=Path, help="the run's folder (runs/RECIPE)")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in the folder, if there is one"
    )
    parser.add_argument(
        "--no-evaluation",
        dest="evaluation",
        action="store_false",
        help="end with the training; --resume without this flag makes up for it",
    )
    parser.add_argument(
        "--budget", default="30m", help="time for the evaluation, such as 90s or 1h (%(default)s)"
    )
    parser.add_argument(
        "--outside",
        metavar="IMAGES",
        help="of none of the classes, for the one-class classifiers: rotated (the test images, "
        "turned by a quarter), cifar10, cifar100, or a folder of images",
    )
    parser.add_argument(
        "--threshold-images",
        type=int,
        metavar="N",
        help="choose the thresholds of the one-class classifiers on about so many training images",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="of the random branch removals (%(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    for group in _GROUPS:
        add_flags(parser, group, leave_out=())
    arguments = vars(parser.parse_args(argv))
    own = {name: arguments.pop(name) for name in _OWN_FLAGS}
    named = recipes / f"{own['config']}.yaml"
    path = named if named.is_file() else Path(own["config"])
    recipe = load_recipe(path, arguments)
    out = own["out"] or Path("runs") / path.stem
    budget = parse_duration(own["budget"])
    return Command(
        recipe,
        out,
        own["resume"],
        own["evaluation"],
        budget,
        own["device"],
        own["outside"],
        own["threshold_images"],
        own["repeats"],
    )
