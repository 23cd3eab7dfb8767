"""A file is the old one or the new one, never a part; whoever writes results writes them so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coded_resnext import Codebook
from coded_resnext.files import write_atomically


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_codebook_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "codebook.json"
    old = Codebook([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]])
    old.save(path)

    def fail(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"no space.*older files are intact.*codebook\.json"):
        Codebook([[0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1]]).save(path)
    assert Codebook.load(path) == old
