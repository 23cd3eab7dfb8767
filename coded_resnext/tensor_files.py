"""PyTorch files of unknown origin: tensors and plain values alone, in no more memory than the file.

Whatever else a pickle names is refused before it is looked up. An archive that is compressed is
refused too, since PyTorch writes none: a few megabytes could become as many gigabytes.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from typing import Any, BinaryIO

import torch


def load_tensors(file: BinaryIO, allowed: Sequence[type] = ()) -> Any:
    """The content of a file of `torch.save`, on the CPU.

    Args:
        file: open for reading bytes, and seekable.
        allowed: classes that may occur beside tensors and plain values.

    Raises:
        ValueError: an archive with compressed or overlapping parts.
        Exception: whatever PyTorch raises for a file that is damaged or holds anything else.
    """
    size = file.seek(0, 2)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if compressed or sum(entry.file_size for entry in entries) > size:
            raise ValueError("expected an archive that is not compressed")
    file.seek(0)
    with torch.serialization.safe_globals(list(allowed)):
        return torch.load(file, map_location="cpu", weights_only=True)
