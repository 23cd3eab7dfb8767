"""Files of every format, of any content: what is wrong with one is the reader's own exception.

make test           30 files of each format
make test-all   10,000 files of each format
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.small_networks import make_network
from torture.files import _peak, _reset_peak, changed

from coded_resnext import Codebook
from coded_resnext.data.datasets import load_dataset
from coded_resnext.data.image_folder import read_image
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.deploy.early_exit import EarlyExit
from coded_resnext.deploy.extract import extract_classifier, load_extracted, save_extracted
from coded_resnext.deploy.hub import Pretrained, from_pretrained, save_pretrained
from coded_resnext.interpret import evaluate, load_evaluation, load_pictures, save_evaluation
from coded_resnext.interpret.report.page import read_log
from coded_resnext.kernels.prebuilt import read_index
from coded_resnext.models.checkpoint import load_model, save_model
from coded_resnext.models.warm_start import load_plain_weights, read_state_dict
from coded_resnext.training.recipe import load_recipe
from coded_resnext.training.run_folder import load_state

RECIPE = Path(__file__).parents[2] / "coded_resnext" / "training" / "recipes" / "cifar10_small.yaml"
MEGABYTES = 200 * 10**6
FEW, MANY = 30, 10_000
PREPROCESSING = Preprocessing(6, 1, (0.5,), (1.0,))
Format = tuple[Path, Callable[[], Any]]


def book(folder: Path, ending: str) -> Format:
    path = folder / f"codebook{ending}"
    Codebook.shipped(10, 10, 3).save(path)
    return path, lambda: str(Codebook.load(path))


def model(folder: Path) -> Format:
    path = folder / "model.safetensors"
    save_model(path, make_network(), preprocessing=PREPROCESSING)
    return path, lambda: load_model(path)


def extracted(folder: Path) -> Format:
    path = folder / "class.safetensors"
    save_extracted(path, extract_classifier(make_network(), 0), preprocessing=PREPROCESSING)
    return path, lambda: load_extracted(path)


def description(folder: Path) -> Format:
    save_pretrained(Pretrained(make_network()), folder)
    return folder / "config.json", lambda: from_pretrained(folder)


def weights(folder: Path) -> Format:
    path, network = folder / "weights.pth", make_network()
    torch.save({"state_dict": network.state_dict()}, path)
    return path, lambda: load_plain_weights(network, read_state_dict(path))


def checkpoint(folder: Path) -> Format:
    path = folder / "checkpoints" / "step-1.pt"
    path.parent.mkdir()
    state = {"state_version": 1, "step": 3, "model": make_network().state_dict(), "history": []}
    torch.save(state, path)

    def read() -> Any:
        content = (folder / "checkpoints" / "step-1.pt").read_bytes()
        line = f"{hashlib.sha256(content).hexdigest()}  step-1.pt\n"
        path.with_name("step-1.pt.sha256").write_text(line)
        return load_state(folder)

    return path, read


def evaluation(folder: Path) -> Format:
    images = torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    network = make_network()
    loader = [(images, torch.arange(12) % network.num_classes)]
    save_evaluation(evaluate(network, loader, loader, repeats=1), folder)
    return folder / "evaluation.json", lambda: load_evaluation(folder)


def text(name: str, content: str, read: Callable[[Path], Any]) -> Callable[[Path], Format]:
    def make(folder: Path) -> Format:
        path = folder / name
        path.write_text(content)
        return path, lambda: read(path)

    return make


def arrays(folder: Path) -> Format:
    path = folder / "cifar10.npz"
    parts: dict[str, Any] = {"classes": np.array(["a", "b"])}
    for split in ("train", "test"):
        parts[f"x_{split}"] = np.zeros((4, 32, 32, 3), np.uint8)
        parts[f"y_{split}"] = np.arange(4) % 2
    np.savez_compressed(path, **parts)
    return path, lambda: load_dataset("cifar10", folder)


def image(folder: Path) -> Format:
    from PIL import Image

    path = folder / "image.png"
    Image.new("RGB", (9, 7), (10, 20, 30)).save(path)
    return path, lambda: read_image(path, PREPROCESSING)


def labels(folder: Path) -> Format:
    image_file, _ = image(folder)
    for name in ("a", "b", "c"):
        image_file.rename(folder / f"{name}.png")
        image_file, _ = image(folder)
    rows = "path,label,split\na.png,cat,train\nb.png,dog,train\nc.png,cat,test\n"
    make = text("labels.csv", rows, lambda path: load_dataset("folder", path))
    return make(folder)


INDEX = {
    "format": 1,
    "arch": "sm90",
    "toolchain": {"triton": "3"},
    "kernels": {"key": {"a.cubin": "0"}},
    "rows": {"row": "key"},
}
EXIT = {"format_version": 1, "margins": [0.5, None], "agreement": True, "calibration": {"a": 1}}
PICTURES = {"format_version": 1, "pictures": {"0": "data:image/png;base64,AAAA"}}
FORMATS: dict[str, Callable[[Path], Format]] = {
    "codebook.json": lambda folder: book(folder, ".json"),
    "codebook.csv": lambda folder: book(folder, ".csv"),
    "codebook.txt": lambda folder: book(folder, ".txt"),
    "labels.csv": labels,
    "model.safetensors": model,
    "extracted.safetensors": extracted,
    "description.json": description,
    "weights.pth": weights,
    "checkpoint.pt": checkpoint,
    "evaluation.json": evaluation,
    "early_exit.json": text("early_exit.json", json.dumps(EXIT), EarlyExit.load),
    "pictures.json": text("pictures.json", json.dumps(PICTURES), load_pictures),
    "index.json": text("index.json", json.dumps(INDEX), lambda p: read_index(p).files("key")),
    "metrics.csv": text("metrics.csv", "epoch,lr\n1,0.1\n2,0.05\n", read_log),
    "recipe.yaml": text("recipe.yaml", RECIPE.read_text(encoding="utf-8"), load_recipe),
    "cifar10.npz": arrays,
    "image.png": image,
}


def read_any(make: Callable[[Path], Format], folder: Path, files: int) -> dict[str, int]:
    """Read so many files, changed or made up; how many were refused, and the memory taken."""
    path, read = make(folder)
    whole = path.read_bytes()
    read()
    figures = {"files": 0, "refused": 0, "growth": 0}
    contents = st.binary(max_size=200) | st.text().map(str.encode)

    def content_of(seed: int) -> bytes:
        return changed(whole, random.Random(seed))  # noqa: S311

    @settings(
        max_examples=files, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.integers(0, 2**62).map(content_of) | contents)
    def refuses(content: bytes) -> None:
        path.write_bytes(content)
        figures["files"] += 1
        before, sentence = _reset_peak(), "loaded as it is"
        try:
            read()
        except (ValueError, OSError) as error:
            figures["refused"] += 1
            sentence = str(error)
        figures["growth"] = max(figures["growth"], _peak() - before)
        # What is put aside is made anew.
        path.with_suffix(".damaged").unlink(missing_ok=True)
        assert len(sentence) > 10

    refuses()
    return figures


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="memory is read from /proc")
@pytest.mark.parametrize(
    "files", [FEW, pytest.param(MANY, marks=pytest.mark.long)], ids=["few", "many"]
)
@pytest.mark.parametrize("name", FORMATS)
def test_any_file_loads_or_is_refused_in_a_sentence(
    name: str,
    files: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    figures = read_any(FORMATS[name], tmp_path, int(os.environ.get("FUZZED_FILES", files)))
    record_property("figures", figures)
    assert figures["growth"] < MEGABYTES
    said = capsys.readouterr()
    assert not any(c in said.out + said.err for c in "\x1b\x07\u202e")
    with capsys.disabled():
        if files == MANY:
            print(f"\n{name}: {figures}")


def test_a_reader_that_lets_another_exception_out_would_be_noticed(tmp_path: Path) -> None:
    def make(folder: Path) -> Format:
        path = folder / "numbers"
        path.write_text("{}")
        return path, lambda: {b"{}": 0}[path.read_bytes()]

    with pytest.raises(KeyError):
        read_any(make, tmp_path, FEW)
