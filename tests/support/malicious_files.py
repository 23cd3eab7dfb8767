"""Files that would run code, write elsewhere, or take all memory, if they were trusted."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from support.small_networks import make_network

from coded_resnext.models.checkpoint import describe_network, load_model
from coded_resnext.models.warm_start import read_state_dict
from coded_resnext.training.run_folder import load_state, save_state

MARK = "made-by-a-file"


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Restored:
    """Unpickled, it is given a state, which code of its class would act on."""

    def __getstate__(self) -> dict[str, str]:
        return {"command": MARK}

    def __setstate__(self, state: dict[str, str]) -> None:
        os.mkdir(state["command"])


@dataclass(frozen=True)
class Attack:
    """A file, and who would read it."""

    name: str
    suffix: str
    content: Callable[[], bytes]

    def read(self, folder: Path) -> None:
        """Load the file as what its ending says."""
        path = folder / f"file{self.suffix}"
        path.write_bytes(self.content())
        if self.suffix == ".safetensors":
            load_model(path)
        else:
            read_state_dict(path)

    def resume(self, folder: Path) -> None:
        """Resume from the file as from a checkpoint whose sum fits."""
        saved, torch_save = self.content(), torch.save
        torch.save = lambda _, file: file.write(saved)
        try:
            save_state(folder, "step-1", {})
        finally:
            torch.save = torch_save
        load_state(folder)


def _saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def _script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), buffer)
    return buffer.getvalue()


def _rewritten(content: bytes, *, compress: bool = False, outside: bool = False) -> bytes:
    """The archive of PyTorch compressed, or with an entry that points out of its folder."""
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with (
        zipfile.ZipFile(io.BytesIO(content)) as source,
        zipfile.ZipFile(buffer, "w", method) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
        if outside:
            target.writestr(f"../../{MARK}", b"x")
            target.writestr("archive/data.pkl", pickle.dumps(Call(os.mkdir, MARK), protocol=2))
    return buffer.getvalue()


def _network(**changes: Any) -> bytes:
    """A model file whose description was changed, beside tensors that are as they were."""
    model = make_network()
    description = {
        "format_version": 1,
        **describe_network(model),
        "preprocessing": None,
        "training": {},
    }
    for name, value in changes.items():
        description[name] = value(description[name]) if callable(value) else value
    return save(model.state_dict(), {"coded_resnext": json.dumps(description)})


def _staged(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**config, "stages": [{**stage, **changes} for stage in config["stages"]]}


def _header(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


HUGE = 10**9
ATTACKS = (
    Attack("a pickle that makes a folder", ".pth", lambda: pickle.dumps(Call(os.mkdir, MARK))),
    Attack(
        "a pickle that calls eval",
        ".pth",
        lambda: _saved(Call(eval, f"__import__('os').mkdir({MARK!r})")),
    ),
    Attack(
        "code among the weights",
        ".pth",
        lambda: _saved({"state_dict": {"a": Call(os.system, f"mkdir {MARK}")}}),
    ),
    Attack(
        "code in the old format",
        ".pth",
        lambda: _saved(Call(os.mkdir, MARK), _use_new_zipfile_serialization=False),
    ),
    Attack("a class that restores itself", ".pth", lambda: _saved({"a": Restored()})),
    Attack("a whole module", ".pth", lambda: _saved(torch.nn.Linear(1, 1))),
    Attack("TorchScript", ".pth", _script),
    Attack(
        "an entry that points out of the archive",
        ".pth",
        lambda: _rewritten(_saved({"a": torch.zeros(1)}), outside=True),
    ),
    Attack(
        "an archive that grows to 256 MiB",
        ".pth",
        lambda: _rewritten(_saved({"a": torch.zeros(2**26)}), compress=True),
    ),
    Attack(
        "a pickle under the name of safetensors",
        ".safetensors",
        lambda: pickle.dumps(Call(os.mkdir, MARK)),
    ),
    Attack("a header of 2^60 bytes", ".safetensors", lambda: struct.pack("<Q", 2**60) + b"{}"),
    Attack(
        "a tensor behind the end of the file",
        ".safetensors",
        lambda: _header(
            {"a": {"dtype": "F32", "shape": [HUGE, HUGE], "data_offsets": [0, 4]}}, b"1234"
        ),
    ),
    Attack(
        "a network of a terabyte",
        ".safetensors",
        lambda: _network(config=lambda c: _staged(c, channels=2**20)),
    ),
    Attack(
        "a network of a billion blocks",
        ".safetensors",
        lambda: _network(config=lambda c: _staged(c, depth=HUGE)),
    ),
    Attack(
        "a billion classes",
        ".safetensors",
        lambda: _network(config=lambda c: {**c, "num_classes": HUGE}, class_names=None),
    ),
    Attack(
        "an input of a terapixel",
        ".safetensors",
        lambda: _network(preprocessing={"size": 10**6, "channels": 1, "mean": [0.0], "std": [1.0]}),
    ),
    Attack(
        "JSON a hundred thousand deep",
        ".safetensors",
        lambda: _header({"__metadata__": {"coded_resnext": "[" * 10**5}}),
    ),
)
