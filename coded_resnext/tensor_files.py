"""PyTorch files of unknown origin: tensors and plain values alone, in no more memory than the file.

Whatever else a pickle names is refused before it is looked up. An archive that is compressed is
refused too, since PyTorch writes none: a few megabytes could become as many gigabytes.
"""

from __future__ import annotations

import re
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
        ValueError: a file that is damaged, that holds anything else, or an archive with compressed
            or overlapping parts.
    """
    size = file.seek(0, 2)
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if compressed or sum(entry.file_size for entry in entries) > size:
                raise ValueError("an archive that is compressed")
        file.seek(0)
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(file, map_location="cpu", weights_only=True)
    # What loading raises depends on what the file is.
    except Exception as error:
        raise ValueError(
            "expected tensors and plain values, which is all that is loaded, since anything else "
            f"could run code; got: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """Why PyTorch refuses a file, without its advice to trust the file instead."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named:
        return f"a reference to {named[1]}"
    return str(error).splitlines()[0].split("In PyTorch 2.6")[0][:200] if str(error) else "nothing"
