"""The training scripts on real images, short: CIFAR-10 and photographs, stopped and resumed."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.image_data import REAL_DATA, needs_cifar10, needs_photographs, write_images
from support.script_runs import run_here

from coded_resnext import Codebook, create_model
from coded_resnext.cli.report import write_report
from coded_resnext.cli.train import (
    codebooks_in_words,
    identity,
    make_model,
    open_outside,
    parse_command,
    run_recipe,
    start_from,
)
from coded_resnext.data.datasets import load_dataset
from coded_resnext.models.checkpoint import load_model, save_model
from coded_resnext.training import ways
from coded_resnext.training.processes import World
from coded_resnext.training.recipe import RECIPES, load_recipe
from coded_resnext.training.run_folder import differences
from coded_resnext.training.step import TrainStep
from coded_resnext.training.ways import Way, read_choice

TRAIN = Path(__file__).parents[2] / "train"
SMALL = ("--epochs", 2, "--warmup-epochs", 0, "--batch-size", 16, "--img-size", 12, "--workers", 0)


def command(script: str, *arguments: object, processes: int = 1) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*start, str(TRAIN / script), *map(str, arguments)]


def run(script: str, *arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(script, *arguments, processes=processes),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.long
@needs_cifar10
def test_a_slice_of_cifar10(tmp_path: Path) -> None:
    arguments = ("--config", "cifar10_small", "--data-dir", REAL_DATA, "--out", tmp_path / "run")
    arguments += ("--train-images", 500, "--test-images", 100, "--batch-size", 50)
    arguments += ("--epochs", 2, "--warmup-epochs", 0)
    result = run(
        "cifar.py", *arguments, "--eval-images", 20, "--threshold-images", 50, "--repeats", 1
    )
    assert result.returncode == 0, result.stderr
    assert "cifar10, 10 classes: 500 images (50 of each)" in result.stderr
    assert "weight decay 0.0005 of all parameters, BatchNorm's included" in result.stderr
    rows = metrics(tmp_path / "run")
    assert float(rows[1]["total"]) < float(rows[0]["total"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_accuracy"] == pytest.approx(float(rows[1]["test_accuracy"]))
    loaded = load_model(tmp_path / "run")
    assert loaded.model.class_names[0] == "airplane"
    # The published codewords of the first class, automobile or airplane alike, in order.
    assert loaded.model.codebooks[-1] == Codebook.shipped(
        10, 10, 3, variant="paper"
    ).with_class_names(loaded.model.class_names)
    # What was used can be used again, and nothing is overwritten.
    saved = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert saved.data.train_images == 500
    assert saved.training.lr == pytest.approx(0.1 * 50 / 128)
    again = run("cifar.py", *arguments)
    assert again.returncode == 2
    assert "holds a run already" in again.stderr


@pytest.mark.parametrize(
    ("changes", "classes", "said"),
    [
        ({}, 100, "8/20 the published codewords, 4/20 the published codewords"),
        (
            {"codebook_variant": "best"},
            100,
            "8/20 the best known codewords, 4/20 the best known codewords",
        ),
        ({}, 7, "8/20 codewords of its own, 4/20 codewords of its own"),
        ({"model": "resnext29_20x6d"}, 100, "none, the plain twin"),
    ],
)
def test_the_start_of_a_run_says_which_codewords_it_trains(
    changes: dict[str, Any], classes: int, said: str
) -> None:
    recipe = load_recipe(RECIPES / "cifar100.yaml", changes)
    with torch.device("meta"):
        model = make_model(recipe, [f"class {index}" for index in range(classes)])
    assert codebooks_in_words(model) == f"codebooks: {said}"
    published = [Codebook.shipped(100, 20, active, "paper").words for active in (8, 4)]
    trained = [book.words for book in model.stage_codebooks]
    assert (trained == published) == ("published" in said)


@pytest.mark.long
@needs_photographs
def test_photographs_on_two_processes_stopped_and_resumed(tmp_path: Path) -> None:
    """A thousand classes at 160 pixels: training, evaluation, checkpoint, SIGTERM, resumption."""
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(REAL_DATA / "imagenet-sample")
    arguments = ("--data-dir", tmp_path, "--out", tmp_path / "run", "--batch-size", 500)
    arguments += ("--model", "coded_resnext14_32x1d", "--epochs", 2, "--warmup-epochs", 0)
    arguments += ("--cooldown-epochs", 0, "--workers", 0, "--no-evaluation")
    process = subprocess.Popen(
        command("imagenet.py", *arguments, processes=2),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "metrics.csv").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "1000 classes: 1000 images (1 of each)" in errors
    assert "learning rate 0.195312 = 0.6 for batches of 1536" in errors
    assert "shorter side to 183, centre 160 pixels" in errors
    assert len(metrics(tmp_path / "run")) == 1
    result = run("imagenet.py", *arguments, "--resume", processes=2)
    assert result.returncode == 0, result.stderr
    rows = metrics(tmp_path / "run")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(0 < float(row["cross_entropy"]) < 10 for row in rows)
    loaded = load_model(tmp_path / "run")
    assert loaded.training["epochs_done"] == 2
    assert loaded.model.num_classes == 1000
    assert loaded.preprocessing is not None
    assert (loaded.preprocessing.size, loaded.preprocessing.resize) == (160, 183)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Three uneven classes."""
    write_images(tmp_path / "pets" / "train", {"ant": 9, "bee": 20, "cat": 31})
    write_images(tmp_path / "pets" / "val", {"ant": 1, "bee": 4, "cat": 4}, seed=1)
    return tmp_path / "pets"


def finetune(pets: Path, out: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run("finetune.py", *folder_of(pets, out), *arguments)


def folder_of(pets: Path, out: Path) -> tuple[object, ...]:
    return ("--config", "folder", "--data-dir", pets, "--out", out, "--no-evaluation", *SMALL)


@pytest.mark.long
def test_fine_tuning_a_coded_run_for_other_classes(pets: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = create_model("coded_resnext17_10x4d")
    save_model(tmp_path / "model.safetensors", source)
    result = finetune(
        pets, tmp_path / "out", "--initial-checkpoint", tmp_path, "--lr", 1e-9, "--epochs", 1
    )
    assert result.returncode == 0, result.stderr
    assert "fresh: head.weight" in result.stderr
    tuned = load_model(tmp_path / "out").model
    assert tuned.class_names == ("ant", "bee", "cat")
    assert tuned.num_classes == 3
    weights = source.state_dict()
    for name, value in tuned.state_dict().items():
        if name.endswith("conv.weight") or name in ("stem.0.weight", "stages.1.0.expand.weight"):
            assert torch.allclose(value, weights[name], atol=1e-5), name


@pytest.mark.parametrize("same", [True, False])
def test_a_classifier_is_taken_over_for_the_same_classes_only(tmp_path: Path, same: bool) -> None:
    torch.manual_seed(3)
    names = ["ant", "bee", "cat"]
    source = create_model("coded_resnext17_10x4d", num_classes=3, class_names=names)
    save_model(tmp_path / "model.safetensors", source)
    recipe = recipe_for(tmp_path, initial_checkpoint=str(tmp_path))
    model = make_model(recipe, names if same else names[::-1])
    text = start_from(model, recipe.model, [])
    assert torch.equal(model.head.weight, source.head.weight) == same
    assert torch.equal(model.stem[0].weight, source.stem[0].weight)
    assert ("the classifier is fresh" in text) != same


@pytest.mark.long
def test_fine_tuning_plain_weights_measures_batch_norm_anew(pets: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = create_model("resnext17_10x4d", num_classes=5)
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "plain.pth")
    result = finetune(pets, tmp_path / "out", "--initial-checkpoint", tmp_path / "plain.pth")
    assert result.returncode == 0, result.stderr
    assert "BatchNorm of the coded blocks measured on 60 images" in result.stderr
    assert len(metrics(tmp_path / "out")) == 2


def test_weights_of_another_architecture_are_refused(pets: Path, tmp_path: Path) -> None:
    torch.save(create_model("resnext_digits").state_dict(), tmp_path / "other.pth")
    arguments = folder_of(pets, tmp_path / "out")
    other = ("--initial-checkpoint", tmp_path / "other.pth")
    result = run_here(TRAIN / "finetune.py", *arguments, *other)
    assert result.returncode == 2
    assert "initial_checkpoint:" in result.stderr
    assert "is of another architecture than coded_resnext17_10x4d" in result.stderr


def test_images_of_none_of_the_classes(pets: Path, tmp_path: Path) -> None:
    """For one-class classifiers to refuse: the test images on their side, or a folder's."""
    splits = load_dataset("folder", pets)
    recipe = load_recipe(RECIPES / "cifar10_small.yaml", {"data_dir": str(tmp_path)})
    turned = open_outside("rotated", splits, recipe)
    assert len(turned) == len(splits.test) == 9
    for index in range(9):
        found, original = np.asarray(turned.image(index)), np.asarray(splits.test.image(index))
        # What was on the right is on top.
        assert np.array_equal(found[0], original[:, -1])
        assert turned.name(index) == f"{splits.test.name(index)}, turned"
    assert len(open_outside(str(pets / "train"), splits, recipe)) == 60
    with pytest.raises(ValueError, match="outside: expected another data set than cifar10"):
        open_outside("cifar10", splits, recipe)


def recipe_for(tmp_path: Path, **settings: Any) -> Any:
    return load_recipe(RECIPES / "folder.yaml", settings)


def test_codebooks_must_fit_the_classes(tmp_path: Path) -> None:
    names = ("ant", "bee", "cat")
    for active in (5, 3):
        Codebook.search(3, 10, active).save(tmp_path / f"{active}.json")
    books = [str(tmp_path / f"{active}.json") for active in (5, 3)]
    model = make_model(recipe_for(tmp_path, codebooks=books), names)
    assert model.codebooks[-1].words == Codebook.load(books[1]).words
    assert model.codebooks[-1].class_names == names
    Codebook.search(4, 10, 3).save(books[1])
    with pytest.raises(
        ValueError, match=r"expected 3 classes as in the data, got 4 .*search 3 10 3"
    ):
        make_model(recipe_for(tmp_path, codebooks=books), names)


def test_a_coded_run_keeps_its_codewords_for_the_same_classes(tmp_path: Path) -> None:
    names = [f"class {index}" for index in range(10)]
    published = create_model("coded_resnext17_10x4d", class_names=names)
    save_model(tmp_path / "model.safetensors", published)
    start = {"initial_checkpoint": str(tmp_path)}
    again = make_model(recipe_for(tmp_path, **start), names)
    assert again.codebooks == published.codebooks
    assert make_model(recipe_for(tmp_path), names).codebooks != published.codebooks
    renamed = make_model(recipe_for(tmp_path, **start), names[::-1])
    assert renamed.codebooks[0].words == Codebook.shipped(10, 10, 5).words


def test_a_run_is_what_its_first_weights_and_its_backend_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume with other weights to start from rewrote the recipe of a run that never was."""
    fresh = identity(recipe_for(tmp_path))
    for seed in (0, 1):
        torch.manual_seed(seed)
        (tmp_path / f"{seed}").mkdir()
        save_model(tmp_path / f"{seed}" / "model.safetensors", create_model("resnext_digits"))
    starts = [
        identity(recipe_for(tmp_path, initial_checkpoint=str(tmp_path / seed))) for seed in "01"
    ]
    assert len({start["initial_weights"] for start in starts}) == 2
    assert "initial_weights" not in fresh
    shutil.move(tmp_path / "0", tmp_path / "moved")
    assert identity(recipe_for(tmp_path, initial_checkpoint=str(tmp_path / "moved"))) == starts[0]
    # Backends round differently, whoever names them.
    monkeypatch.setenv("CODED_RESNEXT_BACKEND", "reference")
    named = identity(recipe_for(tmp_path))
    assert named == identity(recipe_for(tmp_path, backend="reference")) != fresh
    monkeypatch.setenv("CODED_RESNEXT_BACKEND", "")
    assert identity(recipe_for(tmp_path)) == fresh
    # These decide nothing of what comes of a run.
    assert identity(recipe_for(tmp_path, max_damaged=0.5, storage="files")) == fresh


def test_the_model_is_made_as_the_recipe_says(tmp_path: Path) -> None:
    names = [f"class {index}" for index in range(10)]
    recipe = recipe_for(tmp_path, bn_momentum=0.3, drop_branches=0.25, seed=5)
    model, again = make_model(recipe, names), make_model(recipe, names)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert {norm.momentum for norm in norms} == {0.3}
    assert model.config["drop_branches"] == 0.25
    assert torch.equal(model.head.weight, again.head.weight)
    other = make_model(recipe_for(tmp_path, seed=6), names)
    assert not torch.equal(model.head.weight, other.head.weight)
    # Ten classes of a folder are not CIFAR-10's: they get the best codebook, not the published one.
    assert model.codebooks[0].words == Codebook.shipped(10, 10, 5).words


@pytest.mark.parametrize("backend", ["auto", "torch", "fused", "reference"])
def test_the_backend_reaches_every_block_and_the_loss(tmp_path: Path, backend: str) -> None:
    recipe = recipe_for(tmp_path, backend=backend)
    model = make_model(recipe, ["ant", "bee", "cat"])
    assert {block.backend for block in model.blocks} == {backend}
    step = TrainStep(model, recipe.training, World(), steps_per_epoch=1)
    assert step.loss.backend == backend
    # Another backend rounds differently: it is another run. Older ones, without one, are auto's.
    assert identity(recipe).get("backend", "auto") == backend
    assert ("backend" in identity(recipe)) == (backend != "auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels can run")
def test_a_backend_that_cannot_run_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend: 'triton' was asked for but cannot run: "):
        make_model(recipe_for(tmp_path, backend="triton"), ["ant", "bee", "cat"])


def test_a_run_goes_on_under_its_own_backend_only(tmp_path: Path) -> None:
    stored, current = (identity(recipe_for(tmp_path, backend=b)) for b in ("fused", "auto"))
    assert differences(stored, current) == ["backend was 'fused', is None"]
    assert differences(current, identity(recipe_for(tmp_path))) == []


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (
            "finetune.py",
            ("--config", "folder", "--backend", "cuda"),
            "backend: expected one of auto, reference, torch, fused, triton, got 'cuda'",
        ),
        ("finetune.py", ("--config", "nowhere"), "config: expected a file, found none: nowhere"),
        (
            "finetune.py",
            ("--data-dir", "nowhere"),
            "nowhere: expected a folder of images",
        ),
        ("finetune.py", ("--data-dir", "nowhere", "--model", "resnet"), "expected a folder"),
        ("imagenet.py", ("--data-dir", "nowhere"), "nowhere: expected a folder"),
        ("cifar.py", ("--data-dir", "nowhere"), "nowhere: expected cifar10.npz"),
    ],
)
def test_bad_input_is_said_in_one_sentence(
    tmp_path: Path, script: str, arguments: tuple[str, ...], message: str
) -> None:
    result = run_here(TRAIN / script, *arguments, "--out", tmp_path)
    assert result.returncode == 2
    [line] = [line for line in result.stderr.splitlines() if "Warning" not in line]
    assert line.startswith(f"{script}: ")
    assert message in line


@pytest.mark.long
def test_a_run_keeps_the_way_that_was_measured(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it left open is measured once, said, written and shown; a resumed run keeps it."""
    monkeypatch.setattr(ways, "default_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(ways, "open_ways", lambda *_: [Way("torch"), Way("reference")])
    monkeypatch.setattr(ways, "FIRST", 1)
    monkeypatch.setattr(ways, "TIMED", 1)
    measured: list[str] = []
    milliseconds = ways._Step.milliseconds

    def by_plan(step: Any) -> float:
        measured.append(step.step.model.blocks[0].backend)
        return milliseconds(step) / (1e6 if measured[-1] == "reference" else 1)

    monkeypatch.setattr(ways._Step, "milliseconds", by_plan)
    out = tmp_path / "out"

    def go(*arguments: object) -> None:
        words = [*folder_of(pets, out), "--epochs", 1, *arguments]
        run_recipe(parse_command([str(w) for w in words], description="", default="folder"))

    go()
    assert measured == []
    shutil.rmtree(out)
    go("--tune-seconds", 60)
    assert measured == ["torch", "reference"]
    said = capsys.readouterr().err
    assert "taken: --backend reference --torchcompile '' --graph never" in said
    assert "steps on cpu: backend reference, not compiled; measured 0.0 ms, " in said
    choice = read_choice(out / "ways.json")
    assert choice.way.backend == "reference"
    assert load_recipe(out / "recipe.yaml").model.backend == "reference"
    page = Path(write_report(out)).read_text(encoding="utf-8")
    assert "Ways to compute a step" in page
    assert "--backend torch --torchcompile &#39;&#39; --graph never" in page
    # Resumed, it is not measured, and another way is another run.
    go("--resume")
    assert measured == ["torch", "reference"]
    with pytest.raises(ValueError, match="backend was 'reference', is 'torch'"):
        go("--resume", "--backend", "torch")
    # Another run of the same kind remembers.
    shutil.rmtree(out)
    go("--tune-seconds", 60)
    assert measured == ["torch", "reference"]
    assert read_choice(out / "ways.json") == choice
