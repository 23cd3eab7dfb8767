"""Recipes: the published ones as files, layers of settings, the learning-rate rule, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from coded_resnext import Codebook, list_models
from coded_resnext.cli.train import make_model, parse_command
from coded_resnext.training.recipe import (
    GROUPS,
    RECIPES,
    SETTINGS,
    LearningRateRule,
    load_recipe,
    make_recipe,
    read_yaml,
)

# What a recipe file says about itself.
ABOUT_KEYS = ("source", "expected", "cost", "command")
TRAIN = Path(__file__).parents[2] / "train"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
LEAST: dict[str, Any] = {"model": "coded_resnext17_10x4d", "epochs": 2, "batch_size": 8, "lr": 0.1}


def published(name: str) -> dict[str, Any]:
    return load_recipe(RECIPES / f"{name}.yaml").settings()


@pytest.mark.parametrize("name", NAMES)
def test_recipe_files_say_what_they_are_and_can_be_run(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.model.model in list_models()
    assert set(recipe.about) == set(ABOUT_KEYS)
    words = recipe.about["command"].split()
    [script] = [word for word in words if word.startswith("train/")]
    assert (TRAIN.parent / script).is_file()
    # The command names this recipe, or it is the script's own.
    default = f'default="{name}"' in (TRAIN.parent / script).read_text()
    assert default or name in words


# The published values: of the paper (arXiv 2202.05343), the talk and the published code, which is
# followed where they differ (docs/training.md has the table). Not copied from our files.
CIFAR = {
    "epochs": 300,
    "batch_size": 512,
    "lr": 0.1,
    "min_lr": 1e-5,
    "warmup_epochs": 0.0,
    "cooldown_epochs": 0,
    "sched_on_updates": False,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "filter_bias_and_bn": False,
    "smoothing": 0.0,
    "crop_padding": 4,
    "hflip": 0.5,
    "aa_first": True,
    "reprob": 0.0,
    "coding_weight": 6.0,
    "drop_branches": 0.1,
    "bn_momentum": 0.1,
    "codebook_variant": "paper",
}
IMAGENET = {
    "warmup_epochs": 5.0,
    "warmup_lr": 1e-4,
    "warmup_prefix": False,
    "min_lr": 1e-5,
    "sched_on_updates": False,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "filter_bias_and_bn": True,
    "smoothing": 0.1,
    "img_size": 160,
    "test_resize": int(160 / 0.875),
    "crop_padding": None,
    "scale": (0.08, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "hflip": 0.5,
    "train_interpolation": "random",
    "coding_weight": 1.0,
    "drop_branches": 0.1,
    "bn_momentum": 0.1,
    "codebook_variant": "paper",
    "model": "coded_resnext50_32x4d",
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "cifar10": CIFAR
    | {
        "aa": "rand-m4-n3",
        "model": "coded_resnext29_10x11d",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2023, 0.1994, 0.2010),
    },
    "cifar100": CIFAR
    | {"aa": "rand-m2-n1", "model": "coded_resnext29_20x6d", "mean": (0.5071, 0.4867, 0.4408)},
    "imagenet": IMAGENET
    | {
        "epochs": 250,
        "cooldown_epochs": 10,
        "batch_size": 8 * 192,
        "lr": 0.6,
        "aa": "rand-m7-n2-mstd0.5",
        "reprob": 0.4,
        "remode": "pixel",
        "recount": 3,
    },
    "imagenet_150": IMAGENET
    | {
        "epochs": 150,
        "cooldown_epochs": 0,
        "batch_size": 1024,
        "lr": 0.4,
        "aa": "rand-m10-n2",
        "reprob": 0.0,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_named_as_published_has_the_published_values(name: str) -> None:
    settings = published(name)
    assert {key: settings[key] for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_learning_rate_of_every_epoch_is_the_published_one(name: str) -> None:
    """timm's scheduler for ImageNet, PyTorch's for CIFAR; no step has a rate of 0."""
    scheduler = pytest.importorskip("timm.scheduler")
    training = load_recipe(RECIPES / f"{name}.yaml").training
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=training.lr)
    expected = []
    if training.warmup_epochs:
        schedule = scheduler.CosineLRScheduler(
            optimizer,
            t_initial=training.epochs,
            lr_min=1e-5,
            warmup_t=5,
            warmup_lr_init=1e-4,
            cycle_limit=1,
        )
        for epoch in range(training.total_epochs):
            schedule.step(epoch)
            expected.append(optimizer.param_groups[0]["lr"])
    else:
        annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300, eta_min=1e-5)
        for _ in range(300):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            annealing.step()
    steps = 7
    rates = [training.lr_at(step, steps) for step in range(training.total_epochs * steps)]
    assert min(rates) > 0
    # The fifth epoch, the last of ImageNet's warm-up, for a person to look at.
    by_step = replace(training, sched_on_updates=True)
    judge = "timm" if training.warmup_epochs else "PyTorch"
    for step in range(4 * steps, 5 * steps):
        print(
            f"{name}, epoch 5, step {step % steps + 1} of {steps}: {rates[step]:.6f}, {judge} "
            f"{expected[4]:.6f}; with sched_on_updates {by_step.lr_at(step, steps):.6f}"
        )
    for step in range(steps):
        assert rates[step::steps] == pytest.approx(expected, rel=1e-9)


def test_step_by_step_the_rate_stays_near_the_published_one() -> None:
    """Within what one epoch changes it: a fifth of the warm-up, later a hundredth of lr."""
    recipe = load_recipe(RECIPES / "imagenet.yaml")
    by_epoch, steps = recipe.training, 20
    by_step = replace(by_epoch, sched_on_updates=True)
    apart = [
        abs(by_step.lr_at(step, steps) - by_epoch.lr_at(step, steps))
        for step in range(by_epoch.total_epochs * steps)
    ]
    assert max(apart[: 5 * steps]) <= by_epoch.lr / 5
    assert max(apart[5 * steps :]) <= by_epoch.lr / 100


def test_what_is_saved_makes_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "imagenet.yaml", {"batch_size": 192, "seed": 3})
    (tmp_path / "saved.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "saved.yaml")
    assert again.settings() == recipe.settings()
    assert again.about == recipe.about
    assert set(recipe.settings()) == set(SETTINGS) - {"lr_base", "lr_base_size", "lr_base_scale"}


def test_the_learning_rate_scales_with_the_batch() -> None:
    assert LearningRateRule(0.6, 1536)(192) == pytest.approx(0.075)
    assert LearningRateRule(0.1, 512, "sqrt")(128) == pytest.approx(0.05)
    recipe = load_recipe(RECIPES / "imagenet.yaml", {"batch_size": 192})
    assert recipe.training.lr == pytest.approx(0.075)
    assert recipe.describe_lr() == (
        "learning rate 0.075 = 0.6 for batches of 1536, scaled (linear) to 192, "
        "5 epochs of warm-up from 0.0001, cosine to 1e-05 at epoch 250, 10 epochs of cool-down"
    )
    # What is said last holds.
    fixed = load_recipe(RECIPES / "imagenet.yaml", {"batch_size": 192, "lr": 0.3})
    assert (fixed.training.lr, fixed.lr_rule) == (0.3, None)
    assert make_recipe(LEAST, {"lr_base": 0.2}).training.lr == 0.2 * 8 / 256


@pytest.mark.parametrize("name", NAMES)
def test_one_epoch_of_any_recipe(name: str) -> None:
    """timm#1010: fewer epochs than the warm-up of the recipe."""
    file = RECIPES / f"{name}.yaml"
    whole, recipe = load_recipe(file), load_recipe(file, {"epochs": 1})
    share = whole.training.warmup_epochs / whole.training.epochs
    assert recipe.training.warmup_epochs == pytest.approx(share)
    said = f"(shortened from {whole.training.warmup_epochs:g} with the number of epochs)"
    assert (said in recipe.describe_lr()) == (whole.training.warmup_epochs >= 1)
    with pytest.raises(ValueError, match="warmup_epochs: expected fewer than 1 epochs, got 1"):
        load_recipe(file, {"epochs": 1, "warmup_epochs": 1})


def test_flags_replace_settings() -> None:
    flags = (
        "-c cifar10 --epochs 3 --aa none --mean 0.1 0.2 0.3 --clip-grad 1 --amp "
        "--no-channels-last --train-images none --out here --resume --eval-images 90"
    )
    command = parse_command(flags.split(), description="", default="cifar100")
    settings = command.recipe.settings()
    assert settings["epochs"] == 3
    assert settings["aa"] is None
    assert settings["train_images"] is None
    assert settings["mean"] == (0.1, 0.2, 0.3)
    assert (settings["clip_grad"], settings["amp"], settings["channels_last"]) == (1.0, True, False)
    assert settings["model"] == "coded_resnext29_10x11d"
    assert (command.out, command.resume, command.evaluation) == (Path("here"), True, True)
    assert (settings["eval_images"], settings["threshold_images"]) == (90, None)
    unnamed = parse_command([], description="", default="cifar100")
    assert unnamed.recipe.model.model == "coded_resnext29_20x6d"
    assert unnamed.out == Path("runs/cifar100")


def test_the_papers_other_settings_are_flags() -> None:
    """Ratios by stage and mu = 4 on ImageNet, and a variant of the appendix by its name."""
    flags = "-c imagenet --active 32 24 16 4 --coding-weight 4 --model coded_resnext50_32x4d"
    recipe = parse_command(flags.split(), description="", default="cifar10").recipe
    assert recipe.training.coding_weight == 4
    with torch.device("meta"):
        model = make_model(recipe, [str(index) for index in range(1000)])
    assert [stage["active"] for stage in model.config["stages"]] == [32, 24, 16, 4]
    # The published codewords, where there are some of these sizes.
    for book in model.codebooks:
        assert book.words == Codebook.shipped(1000, 32, book.active, "paper").words
    flags = "-c imagenet --model coded_resnext50_32x4d_c4"
    recipe = parse_command(flags.split(), description="", default="cifar10").recipe
    with torch.device("meta"):
        model = make_model(recipe, [str(index) for index in range(1000)])
    assert [book.active for book in model.codebooks] == [16] * 3 + [8] * 6
    assert model.codebooks[3] is model.codebooks[-1]


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_command(["--help"], description="", default="cifar10")
    # Without white space, since argparse also breaks lines at hyphens.
    page = "".join(capsys.readouterr().out.split())
    for group in GROUPS:
        for name, hint in get_type_hints(group, include_extras=True).items():
            _, text = get_args(hint)
            assert text[0].isupper() or text.startswith("timm"), name
            assert text.endswith("."), name
            assert f"--{name.replace('_', '-')}" in page
            assert "".join(text.split()) in page


def test_unknown_flags_end_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--epoch", "3"], ["--epochs", "three"]):
        with pytest.raises(SystemExit, match="2"):
            parse_command(wrong, description="", default="cifar10")
    assert "invalid a whole number value: 'three'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "epoch: there is no such setting; did you mean epochs"),
        ({"colour": 1}, "colour: there is no such setting$"),
        ({"epochs": "3"}, "epochs: expected a whole number, got '3'"),
        ({"epochs": True}, "epochs: expected a whole number, got True"),
        ({"lr": "fast"}, "lr: expected a number, got 'fast'"),
        ({"amp": 1}, "amp: expected true or false, got 1"),
        ({"mean": 0.5}, "mean: expected a list, each a number, got 0.5"),
        ({"storage": "disk"}, "storage: expected one of auto, memory, files, got 'disk'"),
        ({"lr_base": 0.1, "lr": 0.1}, "lr: expected either lr or lr_base, got both"),
        ({"lr_base": 0.1, "batch_size": "8"}, "batch_size: expected a whole number, since lr_base"),
        ({"lr_base": -1}, "lr_base: expected a number above 0, got -1"),
        ({"about": "text"}, "about: expected texts by name, got 'text'"),
        (
            {"backend": "cuda"},
            "^backend: expected one of auto, reference, torch, fused, triton, got 'cuda'$",
        ),
        ({"repeats": 0}, "repeats: expected a positive integer, got 0"),
        ({"threshold_images": -1}, "threshold_images: expected a positive integer, got -1"),
        ({"bn_momentum": 0}, "bn_momentum: expected 0 < value <= 1, got 0"),
        ({"mean": [0.5]}, "mean: expected 3 numbers, got 1"),
        ({"test_resize": 8}, "resize: expected at least the size, 224 pixels, got 8"),
        ({"momentum": 1.5}, "momentum: expected 0 <= value < 1, got 1.5"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_recipe(LEAST, settings)


def test_what_is_left_out_has_its_default_or_is_asked_for() -> None:
    recipe = make_recipe(LEAST)
    assert recipe.training.weight_decay == 5e-4
    assert math.isclose(recipe.augmentation.ratio[0], 0.75)
    for name in ("model", "epochs", "batch_size", "lr"):
        rest = {key: value for key, value in LEAST.items() if key != name}
        with pytest.raises(ValueError, match=f"{name}: expected a value, since it has no default"):
            make_recipe(rest)


def test_numbers_in_yaml_may_have_exponents(tmp_path: Path) -> None:
    """To YAML 1e-4 is a text, since the number has no point."""
    path = tmp_path / "recipe.yaml"
    path.write_text("weight_decay: 1e-4\nmodel: x\nepochs: 1\nbatch_size: 1\nlr: 1\n")
    assert read_yaml(path)["weight_decay"] == "1e-4"
    assert load_recipe(path).training.weight_decay == 1e-4


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for content, message in (
        ("epochs: [", r"recipe\.yaml: not a readable YAML file"),
        ("- 1", r"recipe\.yaml: expected settings, one 'name: value' in a line"),
        ("1: 2", r"recipe\.yaml: expected settings"),
        ("bacth_size: 8", r"recipe\.yaml: bacth_size: .* did you mean batch_size"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_recipe(path)
    with pytest.raises(FileNotFoundError, match="config: expected a file, found none: nowhere"):
        load_recipe("nowhere")


def test_help_says_what_a_flag_takes_and_what_holds_without_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every flag took a VALUE, and nothing said which."""
    with pytest.raises(SystemExit):
        parse_command(["--help"], description="Trains.\n\n    python a\n    b", default="folder")
    out = capsys.readouterr().out
    said = " ".join(out.split())
    assert "\n    python a\n    b\n" in out
    assert "--dist-bn {reduce,broadcast}" in said
    assert "[--epochs N]" in said
    assert "--momentum NUMBER Nesterov momentum of SGD. [0.9]" in said
