"""Files that were tampered with: each loads exactly or is refused with a sentence.

Every file is read in a forked process, so that a crash is one more outcome and memory can be told.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from support.small_networks import make_network

from coded_resnext import Codebook
from coded_resnext.deploy.hub import Pretrained, from_pretrained, save_pretrained
from coded_resnext.models.checkpoint import load_model
from coded_resnext.training.recipe import RECIPES, Recipe, load_recipe, make_recipe

SPARE_BYTES = 64 * 2**20
RECIPE = RECIPES / "cifar10_small.yaml"
ODD = (None, True, -1, 0, 1, 1e308, -1e-300, 2**63, 10**30, "", "a" * 300, "\u202e\n<b>", [], {})


@dataclass
class Tampered:
    """What became of files of one kind."""

    tried: int = 0
    loaded: int = 0
    refused: int = 0
    crashed: int = 0
    wrong: list[str] = field(default_factory=list)
    largest_growth: int = 0
    """Bytes of memory above what is allowed for the file; negative when all stayed below."""


@dataclass(frozen=True)
class Kind:
    """A kind of file: the one that is tampered with, how it is read, and what must come back."""

    name: str
    path: Path
    read: Callable[[], Any]
    same: Callable[[Any, Any], bool]


def make_kinds(folder: Path) -> list[Kind]:
    """Whole files of every kind in a folder."""
    model = make_network()
    save_pretrained(Pretrained(model), folder / "shared")
    weights, config = (folder / "shared" / n for n in ("model.safetensors", "config.json"))
    book = folder / "codebook.json"
    Codebook.shipped(10, 10, 3).save(book)
    recipe = folder / "recipe.yaml"
    recipe.write_bytes(RECIPE.read_bytes())

    def fits(tampered: Any, whole: Any) -> bool:
        """Without a checksum: names, shapes and types of all tensors, and it computes."""
        state, expected = tampered.model.state_dict(), whole.model.state_dict()
        tampered.model(
            torch.zeros(1, tampered.model.in_channels, 6, 6, dtype=whole.model.head.weight.dtype)
        )
        return state.keys() == expected.keys() and all(
            value.dtype == expected[name].dtype and value.shape == expected[name].shape
            for name, value in state.items()
        )

    def same_weights(tampered: Any, whole: Any) -> bool:
        state, expected = tampered.model.state_dict(), whole.model.state_dict()
        return tampered.description() == whole.description() and all(
            torch.equal(state[name], value) for name, value in expected.items()
        )

    shared = weights.parent
    return [
        Kind("safetensors with its sum", weights, lambda: from_pretrained(shared), same_weights),
        Kind("safetensors alone", weights, lambda: load_model(weights), fits),
        Kind("description of a network", config, lambda: from_pretrained(shared), fits),
        Kind("JSON codebook", book, lambda: Codebook.load(book), _is_codebook),
        Kind("YAML recipe", recipe, lambda: load_recipe(recipe), _is_recipe),
    ]


def _is_codebook(tampered: Codebook, whole: Codebook) -> bool:
    """A flipped digit makes another codebook that is one: no sum tells them apart."""
    return Codebook.from_dict(tampered.to_dict()) == tampered


def _is_recipe(tampered: Recipe, whole: Recipe) -> bool:
    """Written and read it is the same; a changed number is another recipe."""
    return make_recipe(yaml.safe_load(tampered.to_yaml())).settings() == tampered.settings()


def tamper_with(kind: Kind, *, files: int, seed: int, most: int = 50) -> Tampered:
    """Read so many versions of a file that was tampered with; the file is whole in the end."""
    whole = kind.path.read_bytes()
    tampered, draw = Tampered(largest_growth=-SPARE_BYTES), random.Random(seed)  # noqa: S311
    expected = kind.read()
    for start in range(0, files, most):
        versions = [changed(whole, draw) for _ in range(min(most, files - start))]
        _in_child(kind, expected, versions, tampered)
    kind.path.write_bytes(whole)
    return tampered


def _in_child(kind: Kind, expected: Any, versions: list[bytes], tampered: Tampered) -> None:
    begin = 0
    while begin < len(versions):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read_end)
            try:
                with os.fdopen(write_end, "w") as pipe:
                    for content in versions[begin:]:
                        print(json.dumps(_outcome(kind, expected, content)), file=pipe, flush=True)
            finally:
                os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end) as pipe:
            outcomes = [json.loads(line) for line in pipe]
        os.waitpid(child, 0)
        for outcome in outcomes:
            tampered.loaded += outcome["loaded"]
            tampered.refused += outcome["refused"]
            tampered.wrong += outcome["wrong"]
            tampered.largest_growth = max(tampered.largest_growth, outcome["growth"])
        tampered.tried += len(outcomes)
        begin += len(outcomes)
        if begin < len(versions):
            # The child did not come to the end of this one.
            tampered.crashed += 1
            tampered.tried += 1
            begin += 1


def _outcome(kind: Kind, expected: Any, content: bytes) -> dict[str, Any]:
    kind.path.write_bytes(content)
    result: dict[str, Any] = {"loaded": 0, "refused": 0, "wrong": []}
    before = _reset_peak()
    try:
        value = kind.read()
    except (ValueError, OSError) as error:
        result["refused"] = 1
        if len(str(error)) < 10:
            result["wrong"].append(f"{kind.name}: no sentence: {error!r}")
    except BaseException as error:
        result["wrong"].append(f"{kind.name}: {error!r}")
    else:
        result["loaded"] = 1
        if not kind.same(value, expected):
            result["wrong"].append(f"{kind.name}: loaded, and is not what was saved")
    result["growth"] = _peak() - before - 2 * len(content) - SPARE_BYTES
    if result["growth"] > 0:
        result["wrong"].append(f"{kind.name}: {result['growth']} bytes more than allowed")
    return result


def _reset_peak() -> int:
    """Bytes in memory; from here on `_peak` counts."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


def changed(content: bytes, draw: random.Random) -> bytes:
    """The content with one to three faults: of bits, bytes, lengths, or values in its JSON."""
    for _ in range(draw.randint(1, 3)):
        content = draw.choice(FAULTS)(content, draw) or b"\0"
    return content


def _flip(content: bytes, draw: random.Random) -> bytes:
    place = _place(content, draw)
    return (
        content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
    )


def _place(content: bytes, draw: random.Random) -> int:
    """Headers are where things go wrong: half of the places are in the first kilobytes."""
    most = min(len(content), 8192) if draw.random() < 0.5 else len(content)
    return draw.randrange(most)


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def _remove(content: bytes, draw: random.Random) -> bytes:
    place = _place(content, draw)
    return content[:place] + content[place + draw.randint(1, 64) :]


def _insert(content: bytes, draw: random.Random) -> bytes:
    place = _place(content, draw)
    return content[:place] + draw.randbytes(draw.randint(1, 64)) + content[place:]


def _repeat(content: bytes, draw: random.Random) -> bytes:
    place = _place(content, draw)
    part = content[place : place + draw.randint(1, 256)]
    return content[:place] + part * draw.randint(2, 20) + content[place:]


def _length(content: bytes, draw: random.Random) -> bytes:
    """Another length in front of the header of safetensors."""
    value = draw.choice([0, 1, 2**63, 2**64 - 1, 100_000_001, len(content), draw.randrange(2**20)])
    return value.to_bytes(8, "little") + content[8:]


def _value(content: bytes, draw: random.Random) -> bytes:
    """An odd value somewhere in the JSON, of a text or of the header of safetensors."""
    try:
        if content[:1] == b"{":
            document = json.loads(content)
            return json.dumps(_odd(document, draw)).encode()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        metadata = header.get("__metadata__", {})
        if "coded_resnext" in metadata and draw.random() < 0.7:
            described = _odd(json.loads(metadata["coded_resnext"]), draw)
            metadata["coded_resnext"] = json.dumps(described)
        else:
            header = _odd(header, draw)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + size :]
    except (ValueError, TypeError, AttributeError, OverflowError):
        return _flip(content, draw)


def _odd(document: Any, draw: random.Random) -> Any:
    """One value of a JSON document replaced, or, of a number, changed a little."""
    if isinstance(document, dict) and document and draw.random() < 0.95:
        key = draw.choice(list(document))
        return {**document, key: _odd(document[key], draw)}
    if isinstance(document, list) and document and draw.random() < 0.9:
        place = draw.randrange(len(document))
        return [*document[:place], _odd(document[place], draw), *document[place + 1 :]]
    if type(document) is int and draw.random() < 0.5:
        return document * draw.choice([-1, 2, 1000, 10**9]) + draw.choice([0, 1])
    return draw.choice(ODD)


FAULTS = (_flip, _flip, _cut, _remove, _insert, _repeat, _length, _value, _value, _value)
