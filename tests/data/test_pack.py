"""A packed folder trains as the folder it was packed from; it is whole or not there."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.image_data import write_images

from coded_resnext.cli import main
from coded_resnext.cli.train import parse_command, run_recipe
from coded_resnext.data import image_folder as packing
from coded_resnext.data.augment import Augmentation, TrainTransform
from coded_resnext.data.datasets import load_dataset
from coded_resnext.data.image_folder import SHARD_TABLE, pack
from coded_resnext.data.image_sets import ImageSplits
from coded_resnext.data.labelled import ShardImages
from coded_resnext.data.loaders import TrainImages
from coded_resnext.data.preprocessing import Preprocessing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of 12 pixels in two classes; two of 40 x 30, one of them damaged, and another file."""
    for split in ("train", "test"):
        write_images(tmp_path / "data" / split, {"ant": 12, "bee": 12})
    ants = tmp_path / "data" / "train" / "ant"
    rows, columns = np.mgrid[:30, :40]
    pixels = np.stack([8 * rows, 6 * columns, 3 * (rows + columns)], -1).astype(np.uint8)
    Image.fromarray(pixels).save(ants / "large.png")
    content = (ants / "large.png").read_bytes()
    (ants / "damaged.png").write_bytes(content[: len(content) // 2])
    (ants / "notes.txt").write_text("no image")
    return tmp_path / "data"


def opened(data: Path) -> ImageSplits:
    return load_dataset("folder", data, storage="files")


@pytest.mark.parametrize("shard_images", [None, 7])
@pytest.mark.parametrize("workers", [0, 2])
def test_small_images_are_the_same_bytes(
    shard_images: int | None, workers: int, folder: Path
) -> None:
    out = folder.with_name("packed")
    data = pack(folder, out, shorter_side=20, shard_images=shard_images, workers=workers)
    before, after = opened(folder).train, opened(data).train
    assert isinstance(after, ShardImages) == (shard_images is not None)
    assert after.targets.tolist() == before.targets.tolist()
    for index in range(len(before)):
        name = Path(before.name(index)).name
        if name == "damaged.png":
            with pytest.raises(ValueError, match=r"damaged\.png: not a readable image"):
                after.image(index)
            continue
        image = after.image(index)
        if name == "large.png":
            assert image.size == (27, 20)
            expected = before.image(index).resize((27, 20), Image.Resampling.BICUBIC)
            assert np.abs(np.asarray(image, int) - np.asarray(expected)).mean() < 4
        else:
            assert np.array_equal(np.asarray(image), np.asarray(before.image(index)))
        assert name in after.name(index)
    assert sorted(path.name for path in out.parent.iterdir()) == ["data", "packed"]
    assert not list(out.rglob(".*"))


def test_an_interrupted_packing_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def until_the_tenth(path: Path, **options: Any) -> tuple[bytes, str]:
        calls.append(path)
        if len(calls) == 10:
            raise OSError(28, "No space left on device")
        return smaller(path, **options)

    smaller = packing.smaller
    monkeypatch.setattr(packing, "smaller", until_the_tenth)
    out = folder.with_name("packed")
    with pytest.raises(OSError, match="No space"):
        pack(folder, out, shorter_side=20)
    assert not out.exists()
    with pytest.raises(ValueError, match="holds another packing"):
        pack(folder, out, shorter_side=24)
    pack(folder, out, shorter_side=20)
    # The nine that were written are not made again.
    assert len(calls) == 10 + 50 - 9
    assert len(opened(out).train) == 26
    with pytest.raises(ValueError, match=r"out: .*packed: expected no such folder"):
        pack(folder, out, shorter_side=20)


def test_at_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.with_name("packed")
    line = ["pack", str(folder), str(out), "--workers", "0", "--shard-images", "9"]
    assert main.main(line) == 0
    assert f"--data-dir {out / SHARD_TABLE}" in capsys.readouterr().out
    assert main.main([*line, "--shorter-side", "0"]) == 2
    assert "shorter_side: expected 1 to 8192, got 0" in capsys.readouterr().err
    assert main.main(["pack", str(folder / "nowhere"), str(out) + "2"]) == 2


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("offset", "99999999", "expected bytes inside from-"),
        ("bytes", "0", "expected bytes inside"),
        ("bytes", "-5", "expected an offset and bytes"),
        ("offset", "", "expected an offset and bytes"),
        ("shard", "none.tar", "none.tar"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    column: str, value: str, message: str, folder: Path
) -> None:
    table = pack(folder, folder.with_name("packed"), shorter_side=20, shard_images=50)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[3][column] = value
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises((ValueError, OSError), match=message):
        opened(table)


def test_other_programs_read_the_shards(folder: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    table = pack(folder, folder.with_name("packed"), shorter_side=20, shard_images=20)
    shards = [str(path) for path in sorted(table.parent.glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len(samples) == 50
    images = opened(table)
    together = {images.train.encoded(index) for index in range(26)}
    assert {sample.get("png") or sample["jpg"] for sample in samples} >= together
    assert {sample["cls"] for sample in samples} == {b"0", b"1"}


@pytest.mark.parametrize("shard_images", [None, 9])
def test_a_packed_folder_gives_the_same_batches(shard_images: int | None, folder: Path) -> None:
    (folder / "train" / "ant" / "large.png").unlink()
    data = pack(folder, folder.with_name("packed"), shorter_side=12, shard_images=shard_images)
    preprocessing = Preprocessing(8, 3, (0.5,) * 3, (0.25,) * 3)
    transform = TrainTransform(Augmentation(aa="rand-m9-n2", reprob=0.5), preprocessing)
    passes = [
        list(TrainImages(opened(place).train, transform, 5, seed=2, max_damaged=0.1))
        for place in (folder, data)
    ]
    for before, after in zip(*passes, strict=True):
        assert (before.images == after.images).all()
        assert (before.targets == after.targets).all()


@pytest.mark.long
def test_a_packed_folder_trains_to_the_same_losses(folder: Path) -> None:
    """Bit for bit where nothing was resized, from a folder and from shards."""
    (folder / "train" / "ant" / "damaged.png").unlink()
    (folder / "train" / "ant" / "large.png").unlink()
    places = [folder]
    for name, shard_images in (("packed", None), ("shards", 9)):
        out = folder.with_name(name)
        places.append(pack(folder, out, shorter_side=12, shard_images=shard_images))
    losses = []
    for number, place in enumerate(places):
        out = folder.with_name(f"run{number}")
        line = f"--data-dir {place} --storage files --img-size 16 --epochs 2 --workers 0 \
            --warmup-epochs 0 --batch-size 8 --no-evaluation --device cpu --out {out}".split()
        run_recipe(parse_command(line, description="", default="folder"))
        rows = list(csv.DictReader((out / "metrics.csv").open()))
        losses.append([[row["total"], row["test_accuracy"]] for row in rows])
    assert losses[0] == losses[1] == losses[2]
