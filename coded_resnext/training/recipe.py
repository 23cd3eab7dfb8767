"""A recipe: data, network and training of a run, as typed settings and as a YAML file."""

from __future__ import annotations

import argparse
import difflib
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from coded_resnext.data.augment import Augmentation
from coded_resnext.data.datasets import Storage
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.files import read_text
from coded_resnext.kernels import Backend
from coded_resnext.kernels.checks import check_integers

from .config import TrainingConfig

# The recipes that come with the package, by the names of their files.
RECIPES = Path(__file__).parent / "recipes"
CodebookVariant = Literal["best", "paper"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# What a recipe file says about itself.
ABOUT = "about"


@dataclass(frozen=True)
class DataConfig:
    """Data."""

    dataset: Annotated[
        str,
        "Name of the data set: cifar10, cifar100, synthetic, or folder for images in "
        "DATA_DIR/train/CLASS and DATA_DIR/test/CLASS (or val).",
    ] = "folder"
    data_dir: Annotated[
        str | None,
        "Folder that holds the data. The default is $CODED_RESNEXT_DATA, or ./data where that is "
        "not set. For the data set folder also a CSV with path, label and perhaps split, or "
        "hf:NAME for an image set of Hugging Face's datasets.",
    ] = None
    download: Annotated[bool, "Let torchvision download a CIFAR set that is not there."] = False
    storage: Annotated[
        Storage,
        "How the images of a folder are kept: memory decodes all of them once, files reads each "
        "one whenever it is needed, auto chooses by their size.",
    ] = "auto"
    train_images: Annotated[
        int | None, "Train on about this many images, the same share of every class."
    ] = None
    test_images: Annotated[
        int | None, "Test on about this many images, the same share of every class."
    ] = None
    holdout: Annotated[
        float,
        "Share of the training images that is held out and tested on instead of the test images, "
        "to choose settings.",
    ] = 0.0
    img_size: Annotated[int, "Height and width of the network's input, in pixels."] = 224
    test_resize: Annotated[
        int | None,
        "Shorter side, in pixels, to which an image is resized in evaluation before the centre is "
        "cut out. The default is the input's size.",
    ] = None
    mean: Annotated[
        tuple[float, ...], "Mean of each channel of the training images, on a scale from 0 to 1."
    ] = IMAGENET_MEAN
    std: Annotated[
        tuple[float, ...],
        "Standard deviation of each channel of the training images, on a scale from 0 to 1.",
    ] = IMAGENET_STD
    workers: Annotated[
        int,
        "Number of processes that read images, for each training process; 0 reads them in the "
        "training process itself.",
    ] = 4
    validation_batch_size: Annotated[int, "Images in a batch of evaluation, for each process."] = (
        256
    )
    max_damaged: Annotated[
        float,
        "Largest share of the training images, and of the test images, that may be unreadable; "
        "these images are left out.",
    ] = 0.01
    eval_images: Annotated[
        int | None,
        "Number of test images, about, from which the evaluation after the training removes "
        "branches and on which it tests the one-class classifiers. The default is all of them.",
    ] = None
    removal_images: Annotated[
        int | None,
        "Number of test images, about, from which it removes branches. The default is that of "
        "eval_images.",
    ] = None
    repeats: Annotated[int, "Random orders in which it removes them."] = 5
    threshold_images: Annotated[
        int | None,
        "Number of training images, about, on which the evaluation chooses the thresholds of the "
        "one-class classifiers. The default is all of them.",
    ] = None

    def __post_init__(self) -> None:
        for name in ("eval_images", "removal_images", "repeats", "threshold_images"):
            if getattr(self, name) is not None:
                check_integers(**{name: getattr(self, name)})

    @property
    def preprocessing(self) -> Preprocessing:
        """Returns how an image becomes the network's input in evaluation; raises ValueError."""
        return Preprocessing(self.img_size, 3, self.mean, self.std, self.test_resize)


@dataclass(frozen=True)
class ModelConfig:
    """Network."""

    model: Annotated[str, "Name of the network; coded_resnext.list_models() lists them."]
    drop_branches: Annotated[
        float, "Probability that DropSubNNs silences a branch in a training step, equation (5)."
    ] = 0.1
    head_bias: Annotated[
        bool,
        "Give the classifier a bias, as timm and torchvision do; the published networks have none.",
    ] = False
    codebooks: Annotated[
        tuple[str, ...],
        "Codebook files, one for each coded stage. Without them, codebooks are made for the "
        "number of classes.",
    ] = ()
    active: Annotated[
        tuple[int, ...],
        "Active branches of each stage, such as 32 32 16 8; a stage in which all branches are "
        "active is plain. The default is the network's.",
    ] = ()
    codebook_variant: Annotated[
        CodebookVariant | None,
        "Shipped codebooks to take: paper, the published ones, or best, those of the largest "
        "distance that is known. The default is those of the network.",
    ] = None
    bn_momentum: Annotated[
        float, "Weight of a new batch in the running statistics of BatchNorm."
    ] = 0.1
    backend: Annotated[
        Backend,
        "What computes the blocks: auto, torch (layer by layer), fused, triton, or reference.",
    ] = "auto"
    initial_checkpoint: Annotated[
        str | None,
        "Start from these weights: a run, a model file or shipped weights of this library, or the "
        "state dict of a plain ResNeXt of timm or torchvision.",
    ] = None

    def __post_init__(self) -> None:
        if self.codebook_variant is not None and self.codebooks:
            raise ValueError("codebook_variant: expected none beside codebooks, which name files")
        if not 0 < self.bn_momentum <= 1:
            raise ValueError(f"bn_momentum: expected 0 < value <= 1, got {self.bn_momentum}")


@dataclass(frozen=True)
class LearningRateRule:
    """Learning rate from the batch."""

    lr_base: Annotated[
        float,
        "Learning rate for a batch of lr_base_size images, instead of lr; it is scaled to the "
        "batch size in use.",
    ]
    lr_base_size: Annotated[int, "Batch size for which lr_base is meant."] = 256
    lr_base_scale: Annotated[
        Literal["linear", "sqrt"],
        "How the learning rate grows with the batch size: in proportion to it (linear) or to its "
        "square root (sqrt).",
    ] = "linear"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr_base) and self.lr_base > 0):
            raise ValueError(f"lr_base: expected a number above 0, got {self.lr_base}")
        if self.lr_base_size < 1:
            raise ValueError(f"lr_base_size: expected at least 1, got {self.lr_base_size}")

    def __call__(self, batch_size: int) -> float:
        """Returns the learning rate for a batch size over all processes."""
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
    full_warmup_epochs: float | None = None
    """The recipe's warm-up, where fewer epochs were asked for and it was shortened with them."""

    def settings(self) -> dict[str, Any]:
        """Returns all settings by name, the learning rate as the rule made it; JSON-ready.

        A recipe that is made from these is the same one.
        """
        groups = (self.data, self.augmentation, self.model, self.training)
        return {k: v for group in groups for k, v in asdict(group).items()}

    def to_yaml(self) -> str:
        """Returns the settings as a file that `load_recipe` reads."""
        return write_yaml({ABOUT: dict(self.about), **self.settings()})

    def describe_lr(self) -> str:
        """Returns the learning rates that the run goes through, and where they come from."""
        training, rule = self.training, self.lr_rule
        text = f"learning rate {training.lr:g}"
        if rule is not None:
            text += (
                f" = {rule.lr_base:g} for batches of {rule.lr_base_size}, scaled "
                f"({rule.lr_base_scale}) to {training.batch_size}"
            )
        text += f", {training.warmup_epochs:g} epochs of warm-up from {training.warmup_lr:g}"
        if self.full_warmup_epochs is not None:
            text += f" (shortened from {self.full_warmup_epochs:g} with the number of epochs)"
        text += f", cosine to {training.min_lr:g} at epoch {training.epochs}"
        return text + f", {training.cooldown_epochs} epochs of cool-down"


GROUPS = (DataConfig, Augmentation, ModelConfig, TrainingConfig, LearningRateRule)
OWN_FLAGS = (
    *(
        "config",
        "out",
        "resume",
        "other_images",
        "evaluation",
        "device",
        "outside",
        "tune_seconds",
    ),
    "timeout",
)
SETTINGS = tuple(field.name for group in GROUPS for field in fields(group))


def make_recipe(*layers: Mapping[str, Any]) -> Recipe:
    """Makes a recipe of layers of settings, in which a later one replaces an earlier one.

    A layer with `lr` also replaces an earlier `lr_base`, and the other way round. Where a layer has
    fewer epochs than the warm-up of an earlier one, the warm-up keeps its share of the epochs.

    Raises:
        ValueError: an unknown setting, a value of the wrong type or range, a missing one, or a
            layer with both `lr` and `lr_base`.
    """
    settings: dict[str, Any] = {}
    full_warmup: float | None = None
    for layer in layers:
        check_names(layer, [ABOUT, *SETTINGS])
        if (shorter := _shorter_warmup(settings, layer)) is not None:
            full_warmup = settings["warmup_epochs"]
            layer = {**layer, "warmup_epochs": shorter}
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
        full_warmup,
    )
    _ = recipe.data.preprocessing  # its checks
    return recipe


def _shorter_warmup(settings: Mapping[str, Any], layer: Mapping[str, Any]) -> float | None:
    """Returns a warm-up of the same share of the epochs, where a layer asks for so few epochs that
    they would all be warm-up; None where the warm-up stays, or the numbers are none."""
    values = (settings.get("warmup_epochs"), settings.get("epochs"), layer.get("epochs"))
    numbers = [v for v in values if isinstance(v, int | float) and v > 0]
    if "warmup_epochs" in layer or len(numbers) < len(values):
        return None
    warmup, before, after = numbers
    return warmup * after / before if warmup >= after else None


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Returns a recipe from its file, with some settings replaced.

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


Group = TypeVar("Group")


# Settings are a few kilobytes; what YAML is read into takes a hundred times its size.
LARGEST_YAML = 256 * 2**10


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Returns the keys and values of a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is larger than 256 KiB, no YAML, or no mapping; the message names the file.
        ImportError: PyYAML is missing.
    """
    yaml = _yaml()
    path = Path(path)
    try:
        text = read_text(path, LARGEST_YAML)
        # A few lines of what is used again in what is used again have no end.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
            raise ValueError("expected values as they are, got an alias (*)")
        content = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"config: expected a file, found none: {path}") from error
    except OSError:
        raise
    # PyYAML's own errors are not all that odd values and tags raise in it.
    except Exception as error:
        raise ValueError(f"{path}: not a readable YAML file: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path}: expected settings, one 'name: value' in a line")
    return content


def write_yaml(settings: Mapping[str, Any]) -> str:
    """Settings as YAML that `read_yaml` reads back."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    text: str = _yaml().safe_dump(plain, sort_keys=False, width=96, allow_unicode=True)
    return text


def check_names(settings: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuses a setting that does not exist.

    Raises:
        ValueError: names it, and the known ones that look alike.
    """
    for name in settings:
        if name not in known:
            alike = difflib.get_close_matches(name, known, 3, 0.7)
            hint = f"; did you mean {' or '.join(alike)}?" if alike else ""
            raise ValueError(f"{name}: there is no such setting{hint}")


def make_group(group: type[Group], settings: Mapping[str, Any]) -> Group:
    """Makes a group of those settings that are its own; what is left out has its default.

    Raises:
        ValueError: a value has the wrong type or range, or a setting without a default is missing.
    """
    hints = get_type_hints(group)
    values = {}
    for field in _fields(group):
        if field.name in settings:
            values[field.name] = convert(field.name, settings[field.name], hints[field.name])
        elif field.default is MISSING:
            raise ValueError(f"{field.name}: expected a value, since it has no default")
    return group(**values)


def convert(name: str, value: Any, hint: Any) -> Any:
    """Converts a value of YAML or of a flag; the number 1e-4 is a string to YAML.

    Raises:
        ValueError: it is no such value.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (each for each in inner if each is not type(None))
        return convert(name, value, hint)
    if origin is Literal and value in inner:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(convert(name, each, inner[0]) for each in value)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise ValueError(f"{name}: expected {_describe(hint)}, got {value!r}")


def add_flags(parser: argparse.ArgumentParser, group: type) -> None:
    """Adds a flag for every setting of a group; those that are not given leave no trace.

    Args:
        parser: the parser that gets the flags.
        group: a dataclass whose fields are annotated with the text of their flag's help.
    """
    hints = get_type_hints(group, include_extras=True)
    section = parser.add_argument_group((group.__doc__ or "").split("\n\n")[0].rstrip("."))
    for field in _fields(group):
        hint, text = get_args(hints[field.name])
        flag = f"--{field.name.replace('_', '-')}"
        options: dict[str, Any] = {
            # argparse formats help with %.
            "help": f"{text} [{_shown(field.default)}]".replace("%", "%%"),
            "default": argparse.SUPPRESS,
            "dest": field.name,
        }
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(hint) is tuple:
            options |= {"nargs": "*", "type": _parser(get_args(hint)[0]), "metavar": "VALUE"}
        else:
            options |= {"type": _parser(hint), "metavar": _metavar(hint)}
        section.add_argument(flag, **options)


def _metavar(hint: Any) -> str:
    """Returns what a flag takes: its choices, or the kind of its value in capitals."""
    choices = [
        choice
        for one in (hint, *get_args(hint))
        if get_origin(one) is Literal
        for choice in get_args(one)
    ]
    if choices:
        return "{" + ",".join(map(str, choices)) + "}"
    kinds = {int: "N", float: "NUMBER"}
    return next((kinds[one] for one in (hint, *get_args(hint)) if one in kinds), "TEXT")


def _shown(default: Any) -> str:
    if default is MISSING:
        return "as the recipe says"
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "none"
    return "none" if default is None else str(default)


def _parser(hint: Any) -> Callable[[str], Any]:
    """Returns what argparse calls on the text of a flag; the checks follow in `convert`."""

    def parse(text: str) -> Any:
        if get_origin(hint) in (Union, types.UnionType) and text.lower() == "none":
            return None
        for kind in (int, float):
            if kind in (hint, *get_args(hint)):
                return kind(text)
        return text

    parse.__name__ = _describe(hint)  # argparse says "invalid .. value"
    return parse


def _describe(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if each is type(None) else _describe(each) for each in inner)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        return f"a list, each {_describe(inner[0])}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]


def _fields(group: type) -> tuple[Field[Any], ...]:
    return fields(group)


def _yaml() -> types.ModuleType:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("recipes need PyYAML: pip install 'coded-resnext[train]'") from error
    module: types.ModuleType = yaml
    return module
