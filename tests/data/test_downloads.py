"""Downloads of data sets that broke off: fetched again, or refused by name."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coded_resnext.data.datasets import load_dataset

datasets = pytest.importorskip("torchvision").datasets


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An archive as CIFAR-10's, of ten images, where torchvision looks for it."""
    # Made as torchvision's own tests make theirs: files that it unpacks itself.
    import pickle

    rng = np.random.default_rng(0)
    folder = tmp_path / "made" / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    sums = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        content: dict[str, object] = {"label_names": [str(i) for i in range(10)]}
        if name != "batches.meta":
            pixels = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
            content = {"data": pixels, "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()  # noqa: S324
    archive = tmp_path / "server" / datasets.CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, datasets.CIFAR10.base_folder)
    digest = hashlib.md5(archive.read_bytes()).hexdigest()  # noqa: S324
    handler = partial(SimpleHTTPRequestHandler, directory=str(archive.parent))
    site = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{site.server_port}/{archive.name}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(datasets.CIFAR10, "url", url)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", digest)
    for listed in ("train_list", "test_list"):
        names = [name for name, _ in getattr(datasets.CIFAR10, listed)]
        monkeypatch.setattr(datasets.CIFAR10, listed, [[name, sums[name]] for name in names])
    meta = {**datasets.CIFAR10.meta, "md5": sums["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    yield archive
    site.shutdown()
    site.server_close()


@pytest.mark.parametrize("broken", ["archive", "unpacked", "missing"])
def test_a_download_that_broke_off(broken: str, server: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    whole = server.read_bytes()
    if broken == "archive":
        (data / server.name).write_bytes(whole[: len(whole) // 2])
    else:
        shutil.copytree(tmp_path / "made", data, dirs_exist_ok=True)
        victim = data / datasets.CIFAR10.base_folder / "data_batch_3"
        if broken == "unpacked":
            victim.write_bytes(victim.read_bytes()[:1000])
        else:
            victim.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=str(data)):
        load_dataset("cifar10", data)
    splits = load_dataset("cifar10", data, download=True)
    assert (len(splits.train), len(splits.test)) == (50, 10)
    # From now on it is there.
    again = load_dataset("cifar10", data)
    for index in range(50):
        assert isinstance(again.train.image(index), Image.Image)
        assert again.train.image(index).tobytes() == splits.train.image(index).tobytes()


def test_a_truncated_archive_of_our_own_is_refused(tmp_path: Path) -> None:
    arrays = {f"x_{s}": np.zeros((4, 32, 32, 3), np.uint8) for s in ("train", "test")}
    arrays |= {f"y_{s}": np.arange(4) for s in ("train", "test")}
    np.savez(tmp_path / "cifar10.npz", classes=np.array(list("abcd")), **arrays)
    path = tmp_path / "cifar10.npz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"cifar10\.npz: damaged"):
        load_dataset("cifar10", tmp_path)
