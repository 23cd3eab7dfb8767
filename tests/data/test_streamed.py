"""Images cut on the host and augmented on the device: as on the CPU, whoever decodes them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.bad_images import FAILING
from torch import Tensor

from coded_resnext.cli.train import identity, parse_command, run_recipe
from coded_resnext.data.augment import Augmentation, TrainTransform
from coded_resnext.data.batches import Batch
from coded_resnext.data.crops import LazyImage, Part, cut, cut_parts, has_nvimgcodec, has_simplejpeg
from coded_resnext.data.datasets import find_image_folder
from coded_resnext.data.image_sets import FileImages, MemoryImages
from coded_resnext.data.loaders import TrainImages
from coded_resnext.data.on_device import HostCrops, StreamedTrainImages
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.models.checkpoint import load_model
from coded_resnext.training.processes import TrainingStopped
from coded_resnext.training.recipe import RECIPES, load_recipe

CPU = torch.device("cpu")
PREP = Preprocessing(32, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
IMAGENET = Augmentation(aa="rand-m7-n2-mstd0.5", reprob=0.6, recount=3, remode="const")
needs_simplejpeg = pytest.mark.skipif(not has_simplejpeg(), reason="simplejpeg is not installed")
needs_nvimgcodec = pytest.mark.skipif(not has_nvimgcodec(), reason="nvimgcodec is not installed")
decoders = pytest.mark.parametrize(
    "decoder", ["pillow", pytest.param("simplejpeg", marks=needs_simplejpeg)]
)
KINDS: list[dict[str, Any]] = [
    {},
    {"subsampling": 0},
    {"progressive": True},
    {"quality": 60},
    {"restart_marker_rows": 2},
    {"grey": True},
]


@pytest.fixture(params=["alone", pytest.param("with nvimgcodec", marks=needs_nvimgcodec)])
def regions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simplejpeg alone, and with the library that decodes regions."""
    if request.param == "alone":
        monkeypatch.setattr("coded_resnext.data.crops._nvimgcodec", lambda: None)


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """Waves, edges and a little noise: what a photograph has, and no more."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [
        np.sin(rows / generator.uniform(9, 40) + columns / generator.uniform(9, 40) + channel)
        for channel in range(3)
    ]
    pixels = 127 + 90 * np.stack(waves, -1) + generator.normal(0, 3, (height, width, 1))
    pixels[height // 3 :, width // 2 :] -= 60
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, **{"format": "JPEG", "quality": 92, **options})
    return buffer.getvalue()


def of_kind(image: Image.Image, grey: bool = False, **options: Any) -> bytes:
    return encoded(image.convert("L") if grey else image, **options)


def in_folder(folder: Path, *contents: bytes) -> FileImages:
    folder.mkdir(exist_ok=True)
    for number, content in enumerate(contents):
        (folder / f"{number:03d}.jpg").write_bytes(content)
    return FileImages.of_no_class([folder])


@pytest.fixture
def files(tmp_path: Path) -> FileImages:
    """Twenty-one JPEGs of different shapes in two classes; one is a PNG, one grey, one has inks."""
    for number in range(21):
        image = scene(60 + 7 * number, 150 - 4 * number, number)
        folder = tmp_path / "train" / ("ant", "bee")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        mode = {4: "L", 5: "CMYK"}.get(number, "RGB")
        ending = "png" if number == 6 else "jpg"
        image.convert(mode).save(folder / f"{number:02d}.{ending}", quality=92)
    found = find_image_folder(tmp_path, holdout=0.1).train
    assert isinstance(found, FileImages)
    return found


def cut_part(image: LazyImage, part: Part, side: int) -> np.ndarray[Any, Any]:
    [pixels] = cut_parts([image], [part], side)
    if isinstance(pixels, ValueError):
        raise pixels
    return pixels


def one_epoch(loader: TrainImages, epoch: int = 2, start_step: int = 0) -> list[Batch]:
    loader.set_epoch(epoch, start_step)
    return list(loader)


def streamed(images: Any, augmentation: Augmentation = IMAGENET, **options: Any) -> TrainImages:
    return StreamedTrainImages(images, augmentation, PREP, 6, device=CPU, seed=3, **options)


@needs_simplejpeg
@pytest.mark.usefixtures("regions")
@pytest.mark.parametrize("options", KINDS)
def test_a_part_is_what_pillow_decodes_and_resizes(options: dict[str, Any], tmp_path: Path) -> None:
    """At full scale they differ by single roundings, at reduced scale by two filters in a row."""
    images = in_folder(tmp_path, of_kind(scene(331, 250), **options))
    whole = images.image(0)
    for part in (
        Part(0, 0, 331, 250, True),
        Part(17, 33, 61, 49, False),
        Part(40, 11, 203, 187, True),
        Part(300, 240, 31, 10, True),
    ):
        lazy = LazyImage(images, 0)
        assert lazy.size == whole.size
        ours = cut_part(lazy, part, 24).astype(int)
        assert lazy._image is None
        scale = max(n for n in (1, 2, 4, 8) if n == 1 or min(part[2:4]) >= 24 * n)
        left, top = (round(edge / scale) * scale for edge in part[:2])
        right, bottom = (
            min(round((edge + length) / scale) * scale, most)
            for edge, length, most in zip(part[:2], part[2:4], whole.size, strict=True)
        )
        rounded = Part(left, top, right - left, bottom - top, part.is_bicubic)
        difference = np.abs(ours - cut(whole, rounded, 24))
        assert difference.mean() < (0.6 if scale == 1 else 4), part
        assert difference.max() <= 3 or scale > 1


@needs_nvimgcodec
@needs_simplejpeg
@pytest.mark.parametrize("options", [*KINDS, {"subsampling": 1}])
def test_regions_have_the_pixels_of_the_whole(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both libraries have libjpeg-turbo's exact arithmetic, so that a run may have one or both."""
    images = in_folder(tmp_path, *(of_kind(scene(97, 83, n), **options) for n in range(24)))
    generator = np.random.default_rng(0)
    parts = [
        Part(*map(int, corner), *map(int, size), bool(n % 2))
        for n, (corner, size) in enumerate(generator.integers([[0, 0], [1, 1]], 40, (24, 2, 2)))
    ]
    # Rows of the whole width lie in memory without gaps.
    parts[5:7] = Part(0, 3, 97, 30, True), Part(0, 40, 97, 1, False)
    lazy = [LazyImage(images, index) for index in range(len(images))]
    ours = cut_parts(lazy, parts, 24)
    decoded = []
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *_, **__: decoded.append(1))
    again = cut_parts(lazy[:3], parts[:3], 24) if not options.get("progressive") else ours[:3]
    assert not decoded
    monkeypatch.undo()
    monkeypatch.setattr("coded_resnext.data.crops._nvimgcodec", lambda: None)
    for a, b in zip([*ours, *again], [*cut_parts(lazy, parts, 24), *ours[:3]], strict=True):
        assert np.array_equal(a, b)


def turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, exif=exif)


def turned_by_xmp(image: Image.Image) -> bytes:
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    content = b"http://ns.adobe.com/xap/1.0/\x00" + packet
    segment = b"\xff\xe1" + (len(content) + 2).to_bytes(2) + content
    plain = encoded(image)
    return plain[:2] + segment + plain[2:]


@needs_simplejpeg
@pytest.mark.parametrize(
    "make",
    [
        turned,
        turned_by_xmp,
        lambda image: encoded(image.convert("CMYK")),
        lambda image: encoded(image, format="PNG"),
        lambda image: encoded(image.convert("I;16"), format="PNG"),
        lambda image: encoded(image.quantize(16), format="GIF"),
    ],
    ids=["exif", "xmp", "cmyk", "png", "sixteen bits", "palette"],
)
def test_odd_images_are_pillows(make: Callable[[Image.Image], bytes], tmp_path: Path) -> None:
    images = in_folder(tmp_path, make(scene(70, 50)))
    lazy, part = LazyImage(images, 0), Part(5, 6, 41, 40, True)
    assert np.array_equal(cut_part(lazy, part, 16), cut(images.image(0), part, 16))
    assert lazy.size == images.image(0).size


@needs_simplejpeg
def test_an_upright_exif_costs_nothing(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    images = in_folder(tmp_path, encoded(scene(70, 50), exif=exif))
    lazy = LazyImage(images, 0)
    cut_part(lazy, Part(0, 0, 50, 50, True), 16)
    assert lazy._image is None


@decoders
@pytest.mark.usefixtures("regions")
def test_damage_is_what_pillow_calls_damage(decoder: Any, tmp_path: Path) -> None:
    """Bytes that are changed or cut off, headers among them: the same error, or about the same
    picture, and nothing else."""
    generator = np.random.default_rng(0)
    whole = encoded(scene(90, 70))
    contents = [whole[:length] for length in (3, 20, 200, 700, len(whole) - 40)]
    for place in [*range(2, 700, 23), *generator.integers(600, len(whole), 40)]:
        changed = bytearray(whole)
        changed[place] ^= int(generator.integers(1, 256))
        contents.append(bytes(changed))
    # Below the part: the beginning of another image, of its size, and of its end.
    for marker in (b"\xff\xd8", b"\xff\xc0", b"\xff\xd9"):
        place = len(whole) * 9 // 10
        contents.append(whole[:place] + marker + whole[place + 2 :])
    images = in_folder(tmp_path, *contents)
    outcomes = {"same": 0, "refused": 0}
    for index in range(len(images)):
        part = Part(3, 4, 30, 30, False)
        try:
            expected = cut(images.image(index), part, 16)
        except ValueError:
            with pytest.raises(ValueError, match=f"{index:03d}.jpg: not a readable image"):
                cut_part(LazyImage(images, index, decoder), part, 16)
            outcomes["refused"] += 1
            continue
        ours = cut_part(LazyImage(images, index, decoder), part, 16)
        assert np.abs(ours.astype(int) - expected).mean() < 1.5
        outcomes["same"] += 1
    assert min(outcomes.values()) > 5


@needs_simplejpeg
@pytest.mark.skipif(not FAILING.exists(), reason="no such device")
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    images = in_folder(tmp_path, encoded(scene(20, 20)))
    (tmp_path / "000.jpg").unlink()
    (tmp_path / "000.jpg").symlink_to(FAILING)
    with pytest.raises(ValueError, match=r"000\.jpg"):
        LazyImage(images, 0)


@pytest.mark.parametrize("remode", ["const", "rand"])
def test_batches_are_those_of_the_cpu(remode: Any, files: FileImages) -> None:
    """Crops, flips, RandAugment and erasing by the same draws, in the same precision."""
    augmentation = replace(IMAGENET, remode=remode, vflip=0.3, decoder="pillow")
    expected = one_epoch(TrainImages(files, TrainTransform(augmentation, PREP), 6, seed=3))
    ours = one_epoch(streamed(files, augmentation))
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.targets, b.targets)
        assert torch.equal(a.images, b.images)


def test_noise_fills_the_rectangles_of_the_cpu(files: FileImages) -> None:
    """The noise is other noise, standard normal too."""
    plain, black, noisy = (
        torch.cat([batch.images for batch in one_epoch(streamed(files, augmentation))])
        for augmentation in (
            replace(IMAGENET, reprob=0.0, decoder="pillow"),
            replace(IMAGENET, decoder="pillow"),
            replace(IMAGENET, remode="pixel", decoder="pillow"),
        )
    )
    erased = (black != plain).any(1)
    assert torch.equal((noisy != plain).any(1), erased)
    noise = noisy.movedim(1, -1)[erased]
    assert noise.numel() > 3000
    assert abs(float(noise.mean())) < 0.06
    assert abs(float(noise.std()) - 1) < 0.06


@decoders
def test_workers_ranks_and_resuming_do_not_matter(decoder: Any, files: FileImages) -> None:
    augmentation = replace(IMAGENET, remode="pixel", decoder=decoder)
    expected = one_epoch(streamed(files, augmentation))
    assert len(expected) == 3
    for workers, start in ((0, 1), (2, 0)):
        again = one_epoch(streamed(files, augmentation, workers=workers), start_step=start)
        for a, b in zip(again, expected[start:], strict=True):
            assert torch.equal(a.images, b.images)
    shares = [one_epoch(streamed(files, augmentation, rank=r, world_size=2)) for r in (0, 1)]
    for first, second, batch in zip(*shares, expected, strict=True):
        joined = torch.stack([first.images, second.images], 1).flatten(0, 1)
        assert torch.equal(joined, batch.images)
    other = one_epoch(streamed(files, augmentation), epoch=3)
    assert not torch.equal(other[0].images, expected[0].images)


def test_images_in_memory_of_any_size(files: FileImages) -> None:
    pixels = [np.asarray(files.image(index)) for index in range(len(files))]
    memory = MemoryImages(pixels, files.targets, [files.name(i) for i in range(len(files))])
    augmentation = replace(IMAGENET, decoder="pillow")
    for a, b in zip(
        one_epoch(streamed(memory, augmentation)),
        one_epoch(streamed(files, augmentation)),
        strict=True,
    ):
        assert torch.equal(a.images, b.images)


def test_padded_crops_of_files(files: FileImages) -> None:
    augmentation = Augmentation(crop_padding=3, aa="rand-m4-n2")
    expected = one_epoch(TrainImages(files, TrainTransform(augmentation, PREP), 6, seed=3))
    for a, b in zip(one_epoch(streamed(files, augmentation)), expected, strict=True):
        assert torch.equal(a.images, b.images)
    with pytest.raises(ValueError, match="aa_first: expected RandAugment after the crop"):
        HostCrops(replace(augmentation, aa_first=True), PREP)


def test_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(RECIPES / "imagenet.yaml")
    asked = recipe.augmentation
    gpu = torch.device("cuda")
    for installed, decoder in ((True, "simplejpeg"), (False, "pillow")):
        monkeypatch.setattr("coded_resnext.data.augment.has_simplejpeg", lambda i=installed: i)
        settled = asked.settled(gpu)
        assert (settled.augment_on, settled.decoder) == ("device", decoder)
        settled = asked.settled(CPU)
        assert (settled.augment_on, settled.decoder) == ("cpu", "pillow")
    with pytest.raises(ImportError, match=r"decoder: .*coded-resnext\[fast\]"):
        replace(asked, decoder="simplejpeg").settled(gpu)
    # Who decodes decides about pixels; runs from before there was a choice are Pillow's.
    settings = [
        identity(replace(recipe, augmentation=replace(asked, decoder=decoder)))
        for decoder in ("auto", "pillow", "simplejpeg")
    ]
    assert "decoder" not in {*settings[0], *settings[1]}
    assert settings[2]["decoder"] == "simplejpeg"


@pytest.mark.long
def test_a_training_on_files_is_the_same_wherever_they_are_augmented(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number in range(24):
            folder = tmp_path / "data" / split / ("ant", "bee")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            scene(40 + number, 50, number).save(folder / f"{number}.jpg")

    def weights(place: str) -> dict[str, Tensor]:
        line = (
            f"--data-dir {tmp_path / 'data'} --storage files --img-size 16 --epochs 2 --workers 0 \
            --aa rand-m4-n2 --reprob 0.5 --remode const --warmup-epochs 0 --batch-size 8 \
            --no-evaluation --decoder pillow --augment-on {place}".split()
        )
        out = tmp_path / place
        run_recipe(
            parse_command(
                [*line, "--out", str(out), "--device", "cpu"], description="", default="folder"
            )
        )
        return dict(load_model(out).model.state_dict())

    first, second = weights("cpu"), weights("device")
    assert all(torch.equal(first[name], second[name]) for name in first)


@decoders
@pytest.mark.long
def test_a_run_that_was_cut_goes_on_to_the_same_bits(
    decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "test"):
        for number in range(24):
            folder = tmp_path / "data" / split / ("ant", "bee")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            scene(40 + number, 50, number).save(folder / f"{number}.jpg")

    def run(name: str, *more: str) -> dict[str, Tensor]:
        line = (
            f"--data-dir {tmp_path / 'data'} --storage files --img-size 16 --epochs 2 --workers 0 \
            --aa rand-m4-n2 --reprob 0.5 --warmup-epochs 0 --batch-size 8 --no-evaluation \
            --augment-on device --decoder {decoder} --device cpu --out {tmp_path / name}".split()
        )
        run_recipe(parse_command([*line, *more], description="", default="folder"))
        return dict(load_model(tmp_path / name).model.state_dict())

    whole = run("whole")
    passes = StreamedTrainImages.__iter__

    def with_a_signal(loader: StreamedTrainImages) -> Iterator[Batch]:
        for number, batch in enumerate(passes(loader)):
            if (loader.epoch, number) == (2, 1):
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(StreamedTrainImages, "__iter__", with_a_signal)
    with pytest.raises(TrainingStopped):
        run("cut")
    monkeypatch.undo()
    resumed = run("cut", "--resume")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
