"""Recipes: the published ones as files, layers of settings, the learning-rate rule, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from coded_resnext import list_models
from coded_resnext.cli.train import parse_command
from coded_resnext.training.recipe import (
    ABOUT_KEYS,
    GROUPS,
    RECIPES,
    SETTINGS,
    LearningRateRule,
    load_recipe,
    make_recipe,
    read_yaml,
)

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


def test_cifar_is_as_published() -> None:
    common = {
        "epochs": 300,
        "batch_size": 512,
        "lr": 0.1,
        "min_lr": 1e-4,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "crop_padding": 4,
        "hflip": 0.5,
        "coding_weight": 6.0,
        "drop_branches": 0.1,
        "bn_momentum": 0.1,
        "warmup_epochs": 0.0,
        "reprob": 0.0,
        "smoothing": 0.0,
    }
    ten, hundred = published("cifar10"), published("cifar100")
    for settings in (ten, hundred):
        assert {name: settings[name] for name in common} == common
    assert (ten["aa"], hundred["aa"]) == ("rand-m4-n3", "rand-m2-n1")
    assert (ten["model"], hundred["model"]) == (
        "coded_resnext29_10x11d",
        "coded_resnext29_20x6d",
    )


def test_imagenet_is_as_published() -> None:
    later, earlier = published("imagenet"), published("imagenet_150")
    expected = {
        "epochs": 250,
        "warmup_epochs": 5.0,
        "cooldown_epochs": 10,
        "batch_size": 8 * 192,
        "lr": 0.6,
        "weight_decay": 1e-4,
        "img_size": 160,
        "test_resize": 183,
        "aa": "rand-m7-n2-mstd0.5",
        "reprob": 0.4,
        "recount": 3,
        "coding_weight": 1.0,
        "drop_branches": 0.1,
        "crop_padding": None,
        "model": "coded_resnext50_32x4d",
    }
    assert {name: later[name] for name in expected} == expected
    changed = {name for name in later if later[name] != earlier[name]}
    assert changed == {"epochs", "lr", "aa", "batch_size"}
    assert (earlier["epochs"], earlier["lr"], earlier["batch_size"]) == (150, 0.4, 1024)
    assert earlier["aa"] == "rand-m10-n2-mstd0.5"


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
        "5 epochs of warm-up, cosine to 0 at epoch 250, 10 epochs of cool-down"
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
