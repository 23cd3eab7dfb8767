"""From a recipe to a trained and evaluated network in a folder: what the training scripts share."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.codebooks.files import IN_WORDS, Size, shipped_sizes
from coded_resnext.data.augment import TrainTransform
from coded_resnext.data.datasets import Storage, decoded, load_dataset
from coded_resnext.data.image_sets import (
    DamagedImages,
    ImageSet,
    ImageSplits,
    MemoryImages,
    into_memory,
)
from coded_resnext.data.labelled import images_of_no_class
from coded_resnext.data.loaders import EvalImages, TrainImages, measure_input
from coded_resnext.data.on_device import (
    DeviceEvalImages,
    DeviceTrainImages,
    StreamedTrainImages,
    is_resident,
)
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.files import file_sha256, make_folder, read_json, say, write_atomically
from coded_resnext.interpret import Evaluation, Loader, evaluate, plan, save_figures, save_pictures
from coded_resnext.interpret.results import FIGURES_FOLDER, require_packages, text_tables
from coded_resnext.kernels import check_backend
from coded_resnext.kernels.backend import named_backend
from coded_resnext.models.checkpoint import MODEL_FILE, find_model
from coded_resnext.models.registry import create_model, network_arguments
from coded_resnext.models.resnext import CodedResNeXt
from coded_resnext.models.warm_start import load_plain_weights, read_weights, recalibrate_batch_norm
from coded_resnext.training.engine import fit
from coded_resnext.training.processes import TIMEOUT, World, run_script, training_session
from coded_resnext.training.recipe import (
    GROUPS,
    OWN_FLAGS,
    RECIPES,
    ModelConfig,
    Recipe,
    add_flags,
    load_recipe,
)
from coded_resnext.training.run_folder import (
    CONFIG_FILE,
    DEAD_FILE,
    SUMMARY_FILE,
    RunFolder,
    describe_machine,
    load_state,
    require_same,
    versions,
)
from coded_resnext.training.step import compiled, compiler_for, is_recorded
from coded_resnext.training.warm_up import build_kernels
from coded_resnext.training.ways import LIMIT, WAYS_FILE, Choice, choose_way, read_choice

from .report import write_report

RECIPE_FILE = "recipe.yaml"
# Images from which the last BatchNorm of coded blocks is measured when weights are plain ones.
CALIBRATION_IMAGES = 512
# In an epoch, for which the input alone is measured first, for some seconds.
STEPS_WORTH_MEASURING = 200
# How a run is carried out, but not what comes of it: a run may be resumed under other ones.
INCIDENTAL = (
    "data_dir",
    "download",
    "storage",
    "workers",
    "validation_batch_size",
    "max_damaged",
    "eval_images",
    "removal_images",
    "repeats",
    "threshold_images",
    "initial_checkpoint",
    "codebooks",
)
# The processes of a run may differ in these: where a machine has the images, and how it reads them.
OF_A_MACHINE = ("data_dir", "storage", "workers")


def open_data(recipe: Recipe, world: World | None = None) -> ImageSplits:
    """Returns the images that a recipe asks for; raises as `load_dataset`.

    Of processes that look into the same folder one lists it, and tells the others.
    """
    data = recipe.data

    def load(storage: Storage) -> ImageSplits:
        return load_dataset(
            data.dataset,
            data.data_dir,
            train_images=data.train_images,
            test_images=data.test_images,
            holdout=data.holdout,
            storage=storage,
            max_damaged=data.max_damaged,
            download=data.download,
        )

    if data.dataset != "folder" or world is None or len(set(world.gather(data.data_dir))) > 1:
        return load(data.storage)
    return decoded(world.on_main(lambda: load("files")), data.storage, data.max_damaged)


def stored_codebooks(run: Path) -> list[Codebook] | None:
    """Returns the codebooks of a run's checkpoint, or None where there is none."""
    state = load_state(run)
    if state is None:
        return None
    return [Codebook.from_dict(book) for book in state["network"]["codebooks"]]


def make_model(
    recipe: Recipe, class_names: Sequence[str], codebooks: Sequence[Codebook] | None = None
) -> CodedResNeXt:
    """Returns the network for the classes, with weights of the recipe's seed, on the CPU.

    Args:
        recipe: names the network and what its codebooks are.
        class_names: the classes.
        codebooks: those of a run that goes on, which needs no other file then.

    Raises:
        ValueError: there is no such network, its backend cannot run here, or a codebook does not
            fit it or the classes.
        OSError: a codebook file cannot be read.
    """
    settings = recipe.model
    check_backend(settings.backend)
    arguments: dict[str, Any] = {
        "backend": settings.backend,
        "class_names": class_names,
        "in_channels": 3,
        "drop_branches": settings.drop_branches,
        "head_bias": settings.head_bias,
    }
    # The published codebooks belong to CIFAR-10; any other set gets the best for its size.
    if recipe.data.dataset != "cifar10":
        arguments["num_classes"] = len(class_names)
    if codebooks and codebooks[0].class_names == tuple(class_names):
        arguments["codebooks"] = codebooks
    elif settings.codebooks:
        arguments["codebooks"] = [_codebook(path, class_names) for path in settings.codebooks]
    elif settings.codebook_variant and is_published(recipe, len(class_names)):
        arguments["codebook_variant"] = settings.codebook_variant
    elif (
        settings.initial_checkpoint
        and find_model(settings.initial_checkpoint).exists()
        and (books := read_weights(settings.initial_checkpoint).codebooks_for(class_names))
    ):
        # Branches go on working for the classes that they have learnt.
        arguments["codebooks"] = books
    if settings.active:
        arguments["active"] = settings.active
    torch.manual_seed(recipe.training.seed)
    model = create_model(settings.model, **arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = settings.bn_momentum
    return model


def is_published(recipe: Recipe, classes: int) -> bool:
    """Returns whether the variant of codebooks that a recipe names is shipped for its network."""
    stages = network_arguments(recipe.model.model, active=recipe.model.active or None)["stages"]
    shipped = shipped_sizes(recipe.model.codebook_variant or "best")
    sizes = [Size(classes, stage.branches, stage.active) for stage in stages if stage.is_coded]
    return all(size in shipped for size in sizes)


def codebooks_in_words(model: CodedResNeXt) -> str:
    """Returns which codewords a run trains, as a line for a person."""
    books = [f"{b.active}/{b.branches} {IN_WORDS[b.variant]}" for b in model.stage_codebooks]
    return f"codebooks: {', '.join(books) or 'none, the plain twin'}"


def _codebook(path: str, class_names: Sequence[str]) -> Codebook:
    codebook = Codebook.load(path)
    if codebook.classes != len(class_names):
        raise ValueError(
            f"codebooks: expected {len(class_names)} classes as in the data, got "
            f"{codebook.classes} in {path}; make one with `coded-resnext codebook search "
            f"{len(class_names)} {codebook.branches} {codebook.active} -o {path}`"
        )
    if codebook.class_names == tuple(map(str, range(codebook.classes))):
        return codebook.with_class_names(class_names)
    return codebook


def start_from(model: CodedResNeXt, settings: ModelConfig, calibration: EvalImages) -> str:
    """Gives a network the weights of `initial_checkpoint`, in place; says what was taken from it.

    The classifier is taken over only for the same classes. Weights of a plain network are made for
    other magnitudes than a coded block gives, so that BatchNorm is measured anew.

    Args:
        model: the network.
        settings: with `initial_checkpoint`.
        calibration: some hundred training images of all classes, without augmentation.

    Raises:
        ValueError: the weights are those of another architecture, or no weights.
        OSError: there is no such file.
    """
    path = settings.initial_checkpoint or ""
    weights = read_weights(path)
    names = weights.class_names or model.class_names
    other_classes = names != model.class_names and len(names) == model.num_classes
    state = dict(weights.state)
    if other_classes:
        state |= {k: v for k, v in model.state_dict().items() if k.startswith("head.")}
    try:
        taken = load_plain_weights(model, state)
    except ValueError as error:
        raise ValueError(
            f"initial_checkpoint: {path} is of another architecture than {settings.model}: {error}"
        ) from error
    text = f"weights from {path}: {taken}"
    if other_classes:
        text += "; the classifier is fresh all the same, since its classes are others"
    if model.coded_blocks and not weights.codebooks:
        images = recalibrate_batch_norm(model, calibration)
        text += f"; BatchNorm of the coded blocks measured on {images} images"
    return text


def identity(recipe: Recipe, run: Path | None = None) -> dict[str, Any]:
    """Returns the settings that decide what comes of a run; it is resumed under the same ones only.

    Args:
        recipe: the settings.
        run: folder of the run that goes on, which no longer needs the file that it started from.
    """
    settings = {k: v for k, v in recipe.settings().items() if k not in INCIDENTAL}
    # Backends round differently. Runs from before there was a choice are those of the default.
    settings["backend"] = named_backend(recipe.model.backend)
    # Where nobody has decided, nothing is cut out of JPEGs on the way to a device.
    if settings["decoder"] != "simplejpeg":
        del settings["decoder"]
    later: dict[str, Any] = {"backend": "auto", "class_weight": "none", "graph": "auto"}
    later |= dict.fromkeys(("balanced_sampler", "mask_gradients"), False)
    settings = {k: v for k, v in settings.items() if k not in later or v != later[k]}
    if recipe.model.initial_checkpoint is not None:
        path = _weights_file(recipe.model.initial_checkpoint)
        if run is None or path.exists():
            settings["initial_weights"] = file_sha256(path)
        else:
            stored = read_json(run / CONFIG_FILE)["recipe"]
            settings["initial_weights"] = stored.get("initial_weights")
    return settings


def _weights_file(checkpoint: str) -> Path:
    path = find_model(checkpoint)
    return path / MODEL_FILE if path.is_dir() else path


def run_recipe(
    command: Command, vary: Callable[[CodedResNeXt], CodedResNeXt] | None = None
) -> None:
    """Trains, evaluates and writes the folder; torchrun starts this on many processes.

    Args:
        command: what is asked for.
        vary: makes another network of the recipe's, with fresh weights.

    Raises:
        ValueError: the recipe, the data or the folder is at fault.
        OSError: files are missing, or cannot be written.
        ImportError: an optional package is missing.
        FloatingPointError, TrainingStopped: as `fit`.
    """
    start = time.perf_counter()
    recipe = command.recipe
    if command.evaluation:
        require_packages("the evaluation after the training")
    with training_session(command.device, timeout=command.timeout) as world:
        recipe = replace(recipe, augmentation=recipe.augmentation.settled(world.device))
        # First, since what a process does from here on follows from its settings.
        own = {k: v for k, v in recipe.settings().items() if k not in OF_A_MACHINE}
        require_same(world, {**own, "device": world.device.type})
        # The processes that do not divide the batch are a quicker answer than the data are.
        recipe.training.local_batch_size(world.size)
        check_backend(recipe.model.backend, world.device)
        if recipe.data.download:
            world.on_main(lambda: len(open_data(recipe).train))
        splits = open_data(recipe, world)
        books = world.on_main(lambda: stored_codebooks(command.out)) if command.resume else None
        model = make_model(recipe, splits.class_names, books)
        if vary is not None:
            model = vary(model)
        choice = way_of_run(command, recipe, model, splits, world, begun=books is not None)
        if choice is not None:
            recipe = with_way(recipe, choice)
            for block in model.blocks:
                block.backend = recipe.model.backend
        settings = identity(recipe, None if books is None else command.out)
        run = RunFolder(
            command.out,
            {"recipe": settings, "network": model.config},
            resume=command.resume,
            world=world,
        )
        if world.is_main:
            write_atomically(run.path / RECIPE_FILE, recipe.to_yaml().encode())
            words = "\n".join(
                [
                    settings_in_words(recipe),
                    codebooks_in_words(model),
                    *([] if choice is None else [str(choice)]),
                    computation_in_words(recipe, world, choice),
                ]
            )
            if choice is not None:
                run.write_json(WAYS_FILE, choice.to_dict())
            say(f"{splits}\n{words}", file=sys.stderr)
        if named_backend(recipe.model.backend) in ("fused", "triton"):
            world.on_main(lambda: build_kernels(world.device))
        outside_name = command.outside
        if command.evaluation and outside_name is not None and outside_name != ROTATED:
            # What is wrong with it is said now, and not after the training.
            world.on_main(lambda: len(open_outside(outside_name, splits, recipe)))
        loaders = make_loaders(recipe, splits, world)
        if recipe.model.initial_checkpoint and world.on_main(lambda: run.load_state() is None):
            some = splits.slice(train_images=min(CALIBRATION_IMAGES, len(splits.train)))
            taken = start_from(model, recipe.model, in_order(recipe, some.train))
            if world.is_main:
                say(taken, file=sys.stderr)
        rate = None
        # In a short run it would take longer than it could save.
        if len(loaders.train) >= STEPS_WORTH_MEASURING:
            rate = sum(world.gather(measure_input(loaders.train, recipe.data.workers)))
        history = fit(
            model.to(world.device),
            loaders.train,
            loaders.test_share,
            recipe.training,
            run,
            world=world,
            preprocessing=recipe.data.preprocessing,
            notes={"data": splits.name, "recipe": settings},
            other_images=command.other_images,
            input_rate=rate,
        )
        damaged = dict(splits.damaged)
        for counted in (loaders.train.damaged, loaders.test.damaged):
            for reasons in world.gather(counted.reasons):
                damaged |= reasons
    if not world.is_main or not command.evaluation:
        return
    outside = None
    if command.outside is not None:
        outside = in_order(recipe, open_outside(command.outside, splits, recipe))
    thresholds = loaders.train_in_order
    if recipe.data.threshold_images is not None:
        chosen = splits.slice(train_images=min(recipe.data.threshold_images, len(splits.train)))
        thresholds = in_order(recipe, chosen.train)
    data = recipe.data
    measuring: dict[str, Any] = {
        "outside_loader": outside,
        "repeats": data.repeats,
        "test_images": data.eval_images,
        "removal_images": data.removal_images,
    }
    say(plan(model, thresholds, loaders.test, image_size=(data.img_size,) * 2, **measuring))
    evaluation = evaluate(
        model,
        thresholds,
        loaders.test,
        **measuring,
    ).named(
        splits.name,
        outside=command.outside,
        training={"data": splits.name, "recipe": settings},
        settings={"threshold_images": data.threshold_images},
    )
    write_results(
        run,
        model,
        evaluation,
        loaders.test,
        recipe.data.preprocessing,
        history,
        seconds_with_evaluation=time.perf_counter() - start,
        seed=recipe.training.seed,
        damaged_images=damaged,
        machine=describe_machine(),
    )


@dataclass(frozen=True)
class Loaders:
    """The loaders of a run on one process."""

    train: TrainImages | DeviceTrainImages
    test_share: EvalImages | DeviceEvalImages
    """This process's test images."""
    train_in_order: EvalImages
    """All training images as they are in evaluation."""
    test: EvalImages
    """All test images."""


def make_loaders(recipe: Recipe, splits: ImageSplits, world: World) -> Loaders:
    """Returns the loaders that a recipe asks for; raises as they do."""
    data, training, augmentation = recipe.data, recipe.training, recipe.augmentation
    share: dict[str, Any] = {"rank": world.rank, "world_size": world.size}
    damaged = DamagedImages(splits.test, data.max_damaged)
    train: TrainImages | DeviceTrainImages
    test: EvalImages | DeviceEvalImages
    options: dict[str, Any] = {
        **share,
        "seed": training.seed,
        "workers": data.workers,
        "balanced": training.balanced_sampler,
    }
    on_device: dict[str, Any] = {
        "device": world.device,
        "around": partial(
            compiled,
            backend=compiler_for(training.torchcompile, world.device, recipe.model.backend),
        ),
    }
    shape, size = data.preprocessing, training.batch_size
    is_on_device = augmentation.augment_on == "device"
    if (
        is_on_device
        and augmentation.crop_padding is not None
        and is_resident(splits.train, data.preprocessing)
    ):
        train = DeviceTrainImages(splits.train, augmentation, shape, size, **on_device, **options)
    elif is_on_device:
        options["max_damaged"] = data.max_damaged
        train = StreamedTrainImages(splits.train, augmentation, shape, size, **on_device, **options)
    else:
        options["max_damaged"] = data.max_damaged
        transform = TrainTransform(augmentation, data.preprocessing)
        train = TrainImages(splits.train, transform, training.batch_size, **options)
    if is_on_device and is_resident(splits.test, data.preprocessing):
        test = DeviceEvalImages(
            splits.test,
            data.preprocessing,
            data.validation_batch_size,
            device=world.device,
            **share,
        )
    else:
        test = in_order(recipe, splits.test, damaged, world)
    train_in_order = in_order(recipe, splits.train, train.damaged)
    return Loaders(train, test, train_in_order, in_order(recipe, splits.test, damaged))


def in_order(
    recipe: Recipe,
    images: ImageSet,
    damaged: DamagedImages | None = None,
    world: World | None = None,
) -> EvalImages:
    """Images as a recipe evaluates them; all of them, or a process's share."""
    data, world = recipe.data, world or World()
    return EvalImages(
        images,
        data.preprocessing,
        data.validation_batch_size,
        rank=world.rank,
        world_size=world.size,
        workers=data.workers,
        damaged=damaged or DamagedImages(images, data.max_damaged),
    )


def settings_in_words(recipe: Recipe) -> str:
    """Returns what a person wants to see before the training begins."""
    lines = [f"{name}: {text}" for name, text in recipe.about.items()]
    training = recipe.training
    decayed = (
        "weights, not of biases and BatchNorm"
        if training.filter_bias_and_bn
        else "all parameters, BatchNorm's included"
    )
    return "\n".join(
        [
            *lines,
            f"{recipe.model.model}, batches of {training.batch_size}, {recipe.describe_lr()}",
            f"weight decay {training.weight_decay:g} of {decayed}; "
            f"BatchNorm momentum {recipe.model.bn_momentum:g}",
            f"evaluation: shorter side to {recipe.data.test_resize or recipe.data.img_size}, "
            f"centre {recipe.data.img_size} pixels",
        ]
    )


def way_of_run(
    command: Command,
    recipe: Recipe,
    model: CodedResNeXt,
    splits: ImageSplits,
    world: World,
    *,
    begun: bool,
) -> Choice | None:
    """Returns the way to compute the steps of a run, or None where it is not measured.

    A run that has begun keeps its way. Without being asked for, only GPUs are measured. Of several
    processes, the first one measures for all.
    """
    path = command.out / WAYS_FILE
    if begun:
        return world.on_main(lambda: read_choice(path) if path.is_file() else None)
    if command.tune_seconds is None and world.device.type != "cuda":
        return None
    seconds, steps = command.tune_seconds, None
    if seconds is None:
        epoch = len(splits.train) // recipe.training.batch_size
        seconds, steps = LIMIT, epoch * recipe.training.total_epochs
    return world.on_main(
        lambda: choose_way(
            model.to(world.device),
            recipe.data.img_size,
            recipe.training,
            world=world,
            backend=recipe.model.backend,
            seconds=seconds,
            run_steps=steps,
        )
    )


def with_way(recipe: Recipe, choice: Choice) -> Recipe:
    """Returns a recipe in which what was left at `auto` is as it was chosen."""
    way, model, training = choice.way, recipe.model, recipe.training
    if named_backend(model.backend) == "auto":
        model = replace(model, backend=way.backend)
    if training.torchcompile == "auto":
        training = replace(training, torchcompile=way.torchcompile)
    # What is recorded stays at `auto`, which goes on without where a run cannot be.
    if training.graph == "auto" and way.graph == "never":
        training = replace(training, graph="never")
    return replace(recipe, model=model, training=training)


def computation_in_words(recipe: Recipe, world: World, choice: Choice | None = None) -> str:
    """Returns how the steps are computed, what that gains, and by which settings it is done
    otherwise."""
    backend = named_backend(recipe.model.backend)
    compiler = compiler_for(recipe.training.torchcompile, world.device, recipe.model.backend)
    is_gpu = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if is_gpu else world.device.type
    parts = [
        f"backend {backend}",
        f"compiled by {compiler}" if compiler else "not compiled",
        *(["recorded as CUDA graphs"] if is_recorded(recipe.training, world.device, world) else []),
    ]
    gain = "not measured for this run" if choice is None else choice.gain
    text = f"steps on {device}: {', '.join(parts)}; {gain}"
    return f"{text} (--backend, --torchcompile, --graph, --tune-seconds)"


def main(script: str, description: str | None, *, default: str) -> int:
    """Runs the command line of a training script and returns the exit status, see `run_script`.

    Args:
        script: file of the script.
        description: of the script.
        default: the recipe that is used when none is named.
    """
    path = Path(script)

    def run() -> None:
        run_recipe(
            parse_command(
                None,
                description=description or "",
                default=default,
            )
        )

    return run_script(path.name, run)


def run(arguments: argparse.Namespace) -> int:
    """Trains by any recipe, as the training scripts do, and returns the exit status."""

    def train() -> None:
        run_recipe(
            parse_command(
                arguments.settings,
                description="Train a network by a recipe, evaluate it and write its report. "
                "Images of your own: --data-dir FOLDER with FOLDER/train/CLASS/* and test or val.",
                default="folder",
                prog="coded-resnext train",
            )
        )

    return run_script("coded-resnext train", train)


ROTATED = "rotated"


CIFAR = ("cifar10", "cifar100")


def open_outside(name: str, splits: ImageSplits, recipe: Recipe) -> ImageSet:
    """Images of none of the classes.

    Args:
        name: `"rotated"` for the test images turned by a quarter, `"cifar10"` or `"cifar100"` for
            the test images of these, found where the recipe looks for data; or a folder of images,
            a CSV or `hf:NAME`.
        splits: the data set.
        recipe: of the run.

    Raises:
        ValueError: the images are the data set's own, or a folder has none.
        OSError: there are no such images.
    """
    if name == ROTATED:
        return rotated(splits.test, recipe.data.max_damaged)
    if name not in CIFAR:
        return images_of_no_class([name])
    if name == recipe.data.dataset:
        raise ValueError(f"outside: expected another data set than {name}, which is the run's own")
    return load_dataset(name, recipe.data.data_dir, download=recipe.data.download).test


def rotated(images: ImageSet, max_damaged: float) -> MemoryImages:
    """Returns all images that can be read, turned by a quarter, counterclockwise; raises as
    `into_memory`.

    Args:
        images: any set.
        max_damaged: largest share of them that may be unreadable.
    """
    if not isinstance(images, MemoryImages):
        images = into_memory(images, DamagedImages(images, max_damaged))
    return MemoryImages(
        [np.rot90(np.asarray(images.image(index))) for index in range(len(images))],
        images.targets,
        [f"{images.name(index)}, turned" for index in range(len(images))],
    )


@dataclass(frozen=True)
class Command:
    """What the command line of a training script asks for."""

    recipe: Recipe
    out: Path
    resume: bool
    evaluation: bool
    device: str
    outside: str | None = None
    """Images of none of the classes, see `open_outside`."""
    other_images: bool = False
    """Go on with a run whose training images have changed, see `fit`."""
    timeout: float = TIMEOUT
    """Seconds that a process waits for another one."""
    tune_seconds: float | None = None
    """Measure the ways to compute a step for so long before the first one; None where a GPU is
    trained on for much longer than that takes."""


def parse_command(
    argv: Sequence[str] | None, *, description: str, default: str, prog: str | None = None
) -> Command:
    """Reads the command line of a training script.

    Args:
        argv: arguments; None takes those of the process.
        description: of the script.
        default: name of the recipe that is used when none is named.
        prog: the command, as its help says it; None for the name of the script.

    Raises:
        OSError, ValueError, ImportError: as `load_recipe`.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="Every setting of a recipe can be replaced by a flag. What holds where the\n"
        "recipe does not say stands in brackets. The run's folder gets recipe.yaml, the\n"
        "settings as they were used.",
        # Examples stay on lines of their own.
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser.add_argument(
        "-c", "--config", default=default, help=f"a YAML file, or one of {names} (%(default)s)"
    )
    parser.add_argument("--out", type=Path, help="the run's folder (runs/RECIPE)")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in the folder, if there is one"
    )
    parser.add_argument(
        "--other-images",
        action="store_true",
        help="with --resume, go on although the images have changed: the epoch that was begun is "
        "begun anew over other training images, the best model chosen anew by other test images",
    )
    parser.add_argument(
        "--no-evaluation",
        dest="evaluation",
        action="store_false",
        help="end with the training; --resume without this flag makes up for it",
    )
    parser.add_argument(
        "--outside",
        metavar="IMAGES",
        help="of none of the classes, for the one-class classifiers: rotated (the test images, "
        "turned by a quarter), cifar10, cifar100, a folder of images, a CSV or hf:NAME",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="SECONDS",
        help="that a process waits for another one of the run before it gives up (%(default)g)",
    )
    parser.add_argument(
        "--tune-seconds",
        type=float,
        metavar="SECONDS",
        help="time in which the ways to compute a step may be measured before the first one, to "
        "take the fastest where backend, torchcompile or graph is auto; 0 measures nothing (on a "
        f"GPU a twentieth of the run, at most {LIMIT:.0f}; elsewhere 0)",
    )
    for group in GROUPS:
        add_flags(parser, group)
    arguments = vars(parser.parse_args(argv))
    own = {name: arguments.pop(name) for name in OWN_FLAGS}
    named = RECIPES / f"{own['config']}.yaml"
    path = named if named.is_file() else Path(own["config"])
    recipe = load_recipe(path, arguments)
    out = own["out"] or Path("runs") / path.stem
    return Command(
        recipe,
        out,
        own["resume"],
        own["evaluation"],
        own["device"],
        own["outside"],
        own["other_images"],
        own["timeout"],
        own["tune_seconds"],
    )


def write_results(
    run: RunFolder,
    model: CodedResNeXt,
    evaluation: Evaluation,
    test_loader: Loader,
    preprocessing: Preprocessing,
    history: Sequence[Mapping[str, float]],
    **summary: Any,
) -> None:
    """Writes evaluation, figures, pictures, summary and report, and prints where they are.

    Args:
        run: the run's folder.
        model: the trained network.
        evaluation: of it.
        test_loader: what it was evaluated on.
        preprocessing: of the test images.
        history: rows of `fit`.
        summary: further entries of the summary, JSON-ready.
    """
    dead = run.path / DEAD_FILE
    if dead.is_file():
        summary["dead_branches"] = read_json(dead)["blocks"]
    run.write_json("evaluation.json", evaluation.to_dict())
    run.write_json(
        SUMMARY_FILE,
        {
            **evaluation.summary(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": sum(row["seconds"] for row in history),
            "versions": versions(),
            "command": shlex.join(["python", *sys.argv]),
            **summary,
        },
    )
    drawn = make_folder(run.path, FIGURES_FOLDER)
    figures = save_figures(evaluation, model.codebooks, drawn)
    if evaluation.samples is not None:
        positions = evaluation.samples.positions
        save_pictures(positions, test_loader, preprocessing, run.path, evaluation.images)
    say(f"\n{text_tables(evaluation)}\n\nsummary: {run.path / SUMMARY_FILE}")
    for figure in figures:
        if figure.suffix == ".png":
            say(f"picture: {figure}")
    say(f"report: {write_report(run.path)}")
