"""The results of an evaluation in a folder: JSON, CSV and figures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.files import LARGEST_RESULTS, UNFIT, make_folder, read_json, write_atomically

from .evaluate import Evaluation
from .figures import save_figures
from .observe import Loader
from .provenance import Images
from .tables import csv_tables

EVALUATION_FILE = "evaluation.json"
PICTURES_FILE = "pictures.json"
FIGURES_FOLDER = "figures"
PICTURES_VERSION = 1
# Larger images are made smaller, in pixels; up to the other size they are kept without loss.
LARGEST, LOSSLESS = 96, 48


# What evaluation, figures, pictures and report need: module and package.
NEEDED = {
    "PIL": "Pillow",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
}


def require_packages(work: str) -> None:
    """Refuses to begin work whose results could not be written at its end.

    Args:
        work: what needs the packages, for the message.

    Raises:
        ImportError: names those that are missing, and the extra that has them.
    """
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ImportError(f"{work} needs {' and '.join(missing)}; install coded-resnext[report]")


def to_json(evaluation: Evaluation) -> str:
    """Returns the text of `evaluation.json`."""
    return json.dumps(evaluation.to_dict(), indent=1, allow_nan=False)


def save_evaluation(
    evaluation: Evaluation,
    folder: str | Path,
    *,
    csv: bool = False,
    codebooks: Sequence[Codebook] | None = None,
) -> list[Path]:
    """Writes `evaluation.json`, and what else is asked for.

    Args:
        evaluation: the results.
        folder: made if missing.
        csv: write the tables too, as `NAME.csv`.
        codebooks: draw the figures too, into its folder `figures`; `model.codebooks`.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {EVALUATION_FILE: to_json(evaluation) + "\n"}
    if csv:
        files |= csv_tables(evaluation)
    for name, content in files.items():
        write_atomically(folder / name, content.encode())
    written = [folder / name for name in files]
    if codebooks is not None:
        written += save_figures(evaluation, codebooks, make_folder(folder, FIGURES_FOLDER))
    return written


def load_evaluation(path: str | Path) -> Evaluation:
    """Reads the results that `save_evaluation` wrote.

    Args:
        path: the file, or the folder that has it.

    Raises:
        ValueError: the file is damaged, or of another format version; the message names it.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = path / EVALUATION_FILE
    try:
        return Evaluation.from_dict(read_json(path, LARGEST_RESULTS))
    except UNFIT as error:
        raise ValueError(f"{path}: not an evaluation: {error}") from error


def save_pictures(
    positions: Sequence[int],
    loader: Loader,
    preprocessing: Preprocessing,
    folder: str | Path,
    images: Images | None = None,
) -> Path:
    """Writes pictures of some images of a loader as JSON.

    Args:
        positions: places in the loader, counted from 0.
        loader: batches of images `[B, C, H, W]` and class indices, in the same order always.
        preprocessing: what made the images; undone, so that they can be looked at.
        folder: the folder that gets the file.
        images: what the loader gives, as the evaluation's `provenance.test` says.

    Returns:
        The file.

    Raises:
        ValueError: the loader has fewer images, or other channels than the preprocessing.
        ImportError: Pillow is not installed.
    """
    wanted, pictures = set(positions), dict[int, str]()
    start = 0
    for batch, _ in loader:
        if len(pictures) == len(wanted):
            break
        here = sorted(wanted.intersection(range(start, start + len(batch))))
        if here:
            rows = torch.tensor([position - start for position in here])
            pictures.update(zip(here, pictures_of(batch[rows], preprocessing), strict=True))
        start += len(batch)
    if missing := wanted - pictures.keys():
        raise ValueError(f"positions: expected places below {start}, got {max(missing)}")
    content: dict[str, Any] = {
        "format_version": PICTURES_VERSION,
        "images_sha256": None if images is None else images.sha256,
        "pictures": {str(position): pictures[position] for position in sorted(pictures)},
    }
    path = Path(folder) / PICTURES_FILE
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def load_pictures(path: str | Path, images: Images | None = None) -> dict[int, str]:
    """Reads pictures by their place in the loader, as `data:` addresses.

    Args:
        path: the file.
        images: those that the pictures must be of; None takes any.

    Raises:
        ValueError: the file is damaged, of another format version, or of other images.
        OSError: it cannot be read.
    """
    try:
        content = read_json(path)
        if content["format_version"] != PICTURES_VERSION:
            raise ValueError(
                f"format_version: expected {PICTURES_VERSION}, got {content['format_version']!r}"
            )
        pictures = {int(place): picture for place, picture in content["pictures"].items()}
        if images is not None and content.get("images_sha256") not in (None, images.sha256):
            raise ValueError("it has pictures of other images than those that were measured")
    except UNFIT as error:
        raise ValueError(f"{path}: not a file of pictures: {error}") from error
    if not all(isinstance(p, str) and p.startswith("data:image/") for p in pictures.values()):
        raise ValueError(f"{path}: not a file of pictures: expected data:image/ addresses")
    return pictures


def pictures_of(images: Tensor, preprocessing: Preprocessing) -> list[str]:
    """Network inputs `[B, C, H, W]` as `data:` addresses of pictures, the preprocessing undone.

    Small ones are PNG without loss, larger ones JPEG of at most 96 pixels.

    Raises:
        ValueError: the channels are not those of the preprocessing.
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need Pillow; pip install pillow") from error
    if images.shape[1] != preprocessing.channels:
        raise ValueError(
            f"images: expected {preprocessing.channels} channels as the preprocessing has, "
            f"got {images.shape[1]}"
        )
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std)
    )
    pixels = ((images.float().cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    addresses = []
    for picture in pixels.permute(0, 2, 3, 1).numpy():
        image = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
        image.thumbnail((LARGEST, LARGEST))
        kind = "png" if max(image.size) <= LOSSLESS else "jpeg"
        buffer = io.BytesIO()
        # Of no effect on PNG.
        image.save(buffer, kind, optimize=True, quality=80)
        text = base64.b64encode(buffer.getvalue()).decode("ascii")
        addresses.append(f"data:image/{kind};base64,{text}")
    return addresses
