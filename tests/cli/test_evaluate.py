"""`coded-resnext eval` on digits and on folders of images."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from coded_resnext import Codebook, CodedResNeXt, Stage, create_model
from coded_resnext.cli import evaluate as evaluate_command
from coded_resnext.cli.arguments import make_parser
from coded_resnext.data.batches import batches
from coded_resnext.data.datasets import DIGITS_NAME, find_image_folder, load_digits_split
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.interpret import evaluate, results
from coded_resnext.interpret.results import text_tables
from coded_resnext.models.checkpoint import load_model, save_model

PREPROCESSING = Preprocessing(8, 1, (0.3,), (0.4,))


def run(*arguments: object) -> int:
    return evaluate_command.run(make_parser().parse_args(["eval", *map(str, arguments)]))


def make_model(classes: int, **arguments: object) -> CodedResNeXt:
    """Small, for grey images."""
    torch.manual_seed(0)
    stages = [Stage(1, 10, 1, 10, 3)]
    model = CodedResNeXt(stages, classes, stem_channels=4, in_channels=1, **arguments)
    torch.nn.init.normal_(model.blocks[0].expand_bn.weight)
    return model.eval()


@pytest.fixture
def model() -> CodedResNeXt:
    """Three classes, "0" to "2"."""
    words = ["1110000000", "0011100000", "0000011001"]
    return make_model(3, codebooks=[Codebook.from_words(words)])


@pytest.fixture
def checkpoint(model, tmp_path):
    """A run folder with the model."""
    save_model(tmp_path / "model.safetensors", model, preprocessing=PREPROCESSING)
    return tmp_path


def write_images(folder, seed=0, classes=range(3)):
    """Three random images of every class; returns what the network should see."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for index in classes:
        (folder / str(index)).mkdir(parents=True)
        for number in range(3):
            pixels = torch.randint(256, (8, 8), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / str(index) / f"{number}.png")
            images.append(PREPROCESSING.normalize(pixels[None] / 255))
            targets.append(index)
    return torch.stack(images), torch.tensor(targets)


def test_digits(tmp_path, capsys):
    model = make_model(10)
    save_model(tmp_path / "model.safetensors", model)
    assert run(tmp_path, "digits", "--json", "--repeats", 1) == 0
    printed = json.loads(capsys.readouterr().out)
    split = load_digits_split()
    expected = evaluate(
        model,
        batches(split.train_images, split.train_targets),
        batches(split.test_images, split.test_targets),
        repeats=1,
    )
    assert printed == expected.named(DIGITS_NAME).to_dict()
    assert printed["test_samples"] == 360
    assert printed["thresholds_from"] == "training data"


def test_folder_without_training_images(model, checkpoint, tmp_path, capsys):
    images, targets = write_images(tmp_path / "data")
    out = tmp_path / "out"
    arguments = ("--seed", 3, "--repeats", 2, "--test-images", 6, "--classes", 2, "--out", out)
    assert run(checkpoint / "model.safetensors", tmp_path / "data", *arguments) == 0
    options = {"seed": 3, "repeats": 2, "test_images": 6, "classes": 2}
    expected = evaluate(model, None, batches(images, targets, 64), **options)
    expected = expected.named("data", test="all")
    assert json.loads((out / "evaluation.json").read_text()) == expected.to_dict()
    printed = capsys.readouterr().out
    assert text_tables(expected) in printed
    assert expected.removal.samples == 6
    assert "on the test data itself" in printed
    pictures = sorted(path.name for path in (out / "figures").glob("*.png"))
    assert len(pictures) == 8
    assert all(name in printed for name in pictures)


def test_images_that_a_run_held_out_are_not_mixed_with_those_it_was_trained_on(
    model, tmp_path, capsys
):
    """Of a plain folder of classes; under another name it cannot be known, which is said."""
    folder = tmp_path / "data"
    write_images(folder)
    splits = find_image_folder(folder, holdout=0.3).slice(holdout=0.3)
    notes = {"data": splits.name, "recipe": {"dataset": "folder", "holdout": 0.3}}
    save_model(tmp_path / "m.safetensors", model, preprocessing=PREPROCESSING, training=notes)
    loaded = load_model(tmp_path / "m.safetensors")
    loaders = evaluate_command.open_data(loaded, str(folder), 4)
    for loader, images, count in zip(loaders, (splits.train, splits.test), (6, 3), strict=True):
        assert loader is not None
        assert [loader.images.name(i) for i in range(count)] == list(map(images.name, range(count)))
        assert len(loader.images) == len(images) == count
    assert "held images" not in capsys.readouterr().err
    folder.rename(tmp_path / "other")
    train, test = evaluate_command.open_data(loaded, str(tmp_path / "other"), 4)
    assert (train, len(test.images)) == (None, 9)
    assert "the run held images of 'data' out; if 'other' is the same" in capsys.readouterr().err


def test_folder_with_training_images(model, checkpoint, tmp_path, capsys):
    train = write_images(tmp_path / "data" / "train", seed=1)
    test = write_images(tmp_path / "data" / "test", seed=2)
    arguments = ("--json", "--repeats", 1, "--threshold-images", 3)
    assert run(checkpoint, tmp_path / "data", *arguments) == 0
    expected = evaluate(model, batches(*train), batches(*test), repeats=1, threshold_images=3)
    assert json.loads(capsys.readouterr().out) == expected.named("data").to_dict()
    assert (expected.thresholds_from, expected.threshold_samples) == ("training data", 3)


def test_data_that_do_not_fit(model, checkpoint, tmp_path):
    write_images(tmp_path / "two", classes=range(2))
    (tmp_path / "two" / "other").mkdir()
    with pytest.raises(ValueError, match="3 classes of the network, got also other"):
        run(checkpoint, tmp_path / "two")
    with pytest.raises(NotADirectoryError, match="expected a folder of images"):
        run(checkpoint, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"DATA: digits have 10 classes and 1 channel.* 3 and 1"):
        run(checkpoint, "digits")
    save_model(tmp_path / "bare.safetensors", model)
    with pytest.raises(ValueError, match="CHECKPOINT: expected a model with a preprocessing"):
        run(tmp_path / "bare.safetensors", tmp_path / "two")


def test_the_backend_that_is_asked_for_computes(checkpoint, tmp_path, monkeypatch):
    write_images(tmp_path / "data")
    seen = []
    original = evaluate_command.evaluate

    def watched(model, *rest, **options):
        seen.append({block.backend for block in model.blocks})
        return original(model, *rest, **options)

    monkeypatch.setattr(evaluate_command, "evaluate", watched)
    for backend in ("torch", "fused", "reference"):
        arguments = ("--json", "--repeats", 1, "--backend", backend)
        assert run(checkpoint, tmp_path / "data", *arguments) == 0
    assert seen == [{"torch"}, {"fused"}, {"reference"}]


def test_a_missing_package_is_named_before_the_work(checkpoint, tmp_path, monkeypatch):
    """All was computed for hours, and then `--out` wanted matplotlib."""
    write_images(tmp_path / "data")
    monkeypatch.setattr(evaluate_command, "evaluate", lambda *_, **__: pytest.fail("too late"))
    monkeypatch.setattr(results, "find_spec", lambda name: None if name == "matplotlib" else name)
    with pytest.raises(ImportError, match=r"^--out needs matplotlib; install .*\[report\]"):
        run(checkpoint, tmp_path / "data", "--out", tmp_path / "out")


def test_room_for_the_results_is_looked_for_before_the_work(checkpoint, tmp_path, monkeypatch):
    """so-vits-svc#46, LlamaFactory#1223: hours of work ended at a full disk."""
    write_images(tmp_path / "data")
    monkeypatch.setattr(evaluate_command, "evaluate", lambda *_, **__: pytest.fail("too late"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        run(checkpoint, tmp_path / "data", "--out", tmp_path / "file")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(OSError, match=r"expected 64 MiB of free space, got 1.*out"):
        run(checkpoint, tmp_path / "data", "--out", tmp_path / "out")


def test_a_run_on_a_named_set_is_evaluated_on_its_part_of_it(tmp_path, monkeypatch):
    """`coded-resnext eval RUN cifar10` expected a folder, for a run that was told to come here."""
    names = [f"class {index}" for index in range(10)]
    model = create_model("coded_resnext17_10x4d", class_names=names)
    recipe = {"dataset": "synthetic", "train_images": 20, "test_images": 10, "holdout": 0.0}
    preprocessing = Preprocessing(32, 3, (0.5,) * 3, (0.2,) * 3)
    path = tmp_path / "model.safetensors"
    save_model(path, model, preprocessing=preprocessing, training={"recipe": recipe})
    train, test = evaluate_command.open_data(load_model(path), "synthetic", 5)
    assert [sum(len(targets) for _, targets in part) for part in (train, test)] == [20, 10]
    save_model(path, make_model(3), preprocessing=preprocessing, training={"recipe": recipe})
    with pytest.raises(ValueError, match="DATA: synthetic has 10 classes, the model has others: 3"):
        evaluate_command.open_data(load_model(path), "synthetic", 5)


def test_a_backend_that_there_is_not(checkpoint, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(checkpoint, "digits", "--backend", "cuda")
    assert "--backend: invalid choice: 'cuda'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels can run")
def test_a_backend_that_cannot_run_is_not_a_damaged_file(checkpoint, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"^backend: 'triton' was asked for but cannot run: "):
        run(checkpoint, "digits", "--backend", "triton")


def test_an_evaluation_into_the_folder_of_another_is_as_a_fresh_one(model, tmp_path, monkeypatch):
    """moabb#628, big-ann-benchmarks#279: it took the scores of the images that were there before.

    Each input is changed in turn: mean average precision was 0.944 where a fresh run said 0.084.
    """
    monkeypatch.setattr(results, "save_figures", lambda *_: [])

    def evaluated(name, out, test=2, train=1, outside=9, classes=(0, 1, 2), batch=64, mean=0.3):
        folder = tmp_path / name
        if not folder.exists():
            write_images(folder / "data" / "train", seed=train)
            write_images(folder / "data" / "test", seed=test, classes=classes)
            write_images(folder / "outside", seed=outside)
            preprocessing = Preprocessing(8, 1, (mean,), (0.4,))
            save_model(folder / "model.safetensors", model, preprocessing=preprocessing)
        arguments = ("--outside", folder / "outside", "--batch-size", batch, "--repeats", 1)
        assert run(folder, folder / "data", *arguments, "--out", tmp_path / out) == 0
        return {
            name: (tmp_path / out / name).read_text()
            for name in (results.EVALUATION_FILE, results.PICTURES_FILE)
        }

    before = evaluated("before", "out")
    for change in (
        {"test": 3},
        {"classes": (1, 2, 0)},
        {"outside": 4},
        {"train": 5},
        {"batch": 2},
        {"mean": 0.2},
    ):
        name = next(iter(change))
        after = evaluated(name, "out", **change)
        assert after == evaluated(name, f"fresh-{name}", **change), name
        # Sums of other batches round otherwise.
        assert after != before or name == "batch", name
