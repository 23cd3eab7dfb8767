"""Models on disk: safetensors with everything that rebuilds the network in the header.

The header holds `format_version`, the architecture, the codebooks with the class order, the
preprocessing and how the network was trained. Nothing in such a file is executed on loading.

Weights that come with the package have names. Each is a folder `weights/NAME`, whose weights are
for the network `coded_resnext_NAME`: what `save_pretrained` writes, and beside it what the run was
measured to do. A new folder is all that new weights need.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.files import UNFIT, parse_json, write_atomically
from coded_resnext.kernels import Backend, check_backend

from .layers import check_layers, check_settings
from .resnext import CodedResNeXt, own_network

_FOLDER = Path(__file__).with_name("weights")
_CODED = "coded_resnext_"
FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
_HEADER = "coded_resnext"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Convolutions and BatchNorms of a block, at the least.
_TENSORS_OF_A_BLOCK = 18


def shipped_weights() -> list[str]:
    """Returns the names of the weights that come with the package."""
    return sorted(path.name for path in _FOLDER.iterdir() if path.is_dir())


def network_of(name: str) -> str:
    """Returns the name of the network that shipped weights are for."""
    return f"{_CODED}{name}"


def weights_of(network: str) -> Path | None:
    """Returns the folder of the weights shipped for a network, None where there are none."""
    name = network.removeprefix(_CODED)
    return _FOLDER / name if network_of(name) == network and name in shipped_weights() else None


def find_model(source: str | Path) -> Path:
    """Returns where a model lies: the folder of shipped weights for their name, or the path given.

    Args:
        source: text such as `"digits"` is a name where weights are shipped under it, and otherwise
            a path; `"./digits"` and a `Path` are always paths.

    Raises:
        ValueError: the name of shipped weights is also that of a run here.
    """
    if not isinstance(source, str) or source not in shipped_weights():
        return Path(source)
    if any(Path(source).glob("*.safetensors")):
        raise ValueError(
            f"{source}: expected one meaning, got two: the weights that come with the package, and "
            f"a folder with weights here; write ./{source} for the folder, or rename it"
        )
    return _FOLDER / source


@dataclass(frozen=True)
class LoadedModel:
    """The content of a model file."""

    model: CodedResNeXt
    """The network, in evaluation mode."""
    preprocessing: Preprocessing | None
    training: dict[str, Any]
    """How the network was trained, as the trainer wrote it."""


def save_model(
    path: str | Path,
    model: nn.Module,
    *,
    preprocessing: Preprocessing | None = None,
    training: dict[str, Any] | None = None,
) -> None:
    """Writes a network with its codebooks and classes; an older file stays until this is complete.

    Args:
        path: the file, usually `model.safetensors`.
        model: the network, or a wrapper of `torch.compile`, `DataParallel` or averaging around it.
        preprocessing: how images become its input.
        training: JSON-ready notes on how it was trained.

    Raises:
        ValueError: a layer was taken away, replaced or set otherwise, so that what is read again
            would be another network.
    """
    model = own_network(model)
    if isinstance(model.head, nn.Identity):
        raise ValueError("model: expected a network with its classifier, got one without")
    check_layers(model, "a file holds weights for the network's own layers", sizes_only=True)
    # Compiling a block puts its name before those of the layers.
    state = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    with torch.device("meta"):
        described = CodedResNeXt.from_config(
            model.config, model.stage_codebooks, class_names=model.class_names
        )
    check_settings(model, described, "a file does not say so")
    try:
        check_tensors(described.state_dict(), state, any_precision=True)
    except ValueError as error:
        raise ValueError(f"model: a file could not be read again: {error}") from error
    description = {
        "format_version": FORMAT_VERSION,
        **describe_network(model),
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "training": training or {},
    }
    write_tensors(path, state, description)


def describe_network(model: CodedResNeXt) -> dict[str, Any]:
    """Returns what weights must fit, JSON-ready: architecture, classes and codebooks."""
    return {
        "config": model.config,
        "class_names": list(model.class_names),
        "codebooks": [codebook.to_dict() for codebook in model.stage_codebooks],
    }


def weights_sha256(model: CodedResNeXt) -> str:
    """Returns the SHA-256 of a network's tensors, with their names, types and shapes.

    What was measured on a network carries it, so that it is not taken for another's.
    """
    digest = hashlib.sha256()
    for name, value in sorted(own_network(model).state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_model(
    path: str | Path,
    *,
    codebooks: Sequence[Codebook] | None = None,
    backend: Backend = "auto",
) -> LoadedModel:
    """Reads a network written by `save_model`.

    Args:
        path: the file, the folder of a run that has one, or the name of shipped weights.
        codebooks: the codebooks that the caller expects, one for each coded stage.
        backend: of the network; a file does not say who computed it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a model file, one of another format version, or one whose codewords or
            class order differ from those expected; or the backend cannot run here.
    """
    check_backend(backend)
    path = find_model(path)
    if path.is_dir():
        path = path / MODEL_FILE
    description, state = read_tensors(path)
    if "kind" in description:
        raise ValueError(
            f"{path}: expected a whole network, got a part of one; load_extracted reads it"
        )
    check_version(path, description, (FORMAT_VERSION,))
    try:
        stored = [Codebook.from_dict(data) for data in description["codebooks"]]
        model = _build(description, stored, state, backend)
        preprocessing = description["preprocessing"]
        if preprocessing is not None:
            preprocessing = Preprocessing.from_dict(preprocessing)
        training = description["training"]
        if not isinstance(training, dict):
            raise ValueError(f"training: expected an object, got {type(training).__name__}")
    except UNFIT as error:
        raise ValueError(f"{path}: damaged or incomplete model file: {error}") from error
    if codebooks is not None:
        check_codebooks(stored, codebooks)
    return LoadedModel(model.eval(), preprocessing, training)


def _build(
    description: dict[str, Any],
    codebooks: Sequence[Codebook],
    state: dict[str, Tensor],
    backend: Backend,
) -> CodedResNeXt:
    """Returns the network of a description with these weights.

    No memory is taken before it is known that the network is as large as the file's tensors.
    """
    names, config = description["class_names"], description["config"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names: expected a list of text")
    depths = [stage["depth"] for stage in config["stages"]]
    blocks = len(state) // _TENSORS_OF_A_BLOCK
    if sum(depths) > blocks:
        raise ValueError(f"stages: {sum(depths)} blocks, and tensors for {blocks} at most")
    with torch.device("meta"):
        shape = CodedResNeXt.from_config(config, codebooks, class_names=names)
    check_tensors(shape.state_dict(), state, any_precision=True)
    model = CodedResNeXt.from_config(config, codebooks, class_names=names, backend=backend)
    model.load_state_dict(state, assign=True)
    return model


def check_tensors(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], *, any_precision: bool = False
) -> None:
    """Refuses tensors of other names, shapes or types; a ValueError names them.

    With `any_precision` floating-point tensors may be of other floating-point types.
    """
    odd = sorted(expected.keys() ^ state.keys())
    if odd:
        said = [f"{'no' if name in expected else 'an unknown'} {name!r:.80}" for name in odd[:8]]
        raise ValueError(f"tensors: expected those of the network, got {', '.join(said)}")
    for name, value in expected.items():
        given = state[name]
        floats = any_precision and value.dtype in _FLOATS
        fits = given.dtype in (_FLOATS if floats else (value.dtype,))
        if given.shape != value.shape or not fits:
            raise ValueError(
                f"tensors: {name}: expected {list(value.shape)} {value.dtype}, "
                f"got {list(given.shape)} {given.dtype}"
            )


def write_tensors(
    path: str | Path, state: Mapping[str, Tensor], description: dict[str, Any]
) -> None:
    """Writes tensors under a JSON description, its `format_version` included."""
    tensors: dict[str, Tensor] = {}
    storages = set()
    for name, value in state.items():
        # The format has no tied weights: each name gets numbers of its own.
        storage = value.untyped_storage().data_ptr()
        tensors[name] = value.clone() if storage in storages else value.contiguous()
        storages.add(storage)
    write_atomically(path, save(tensors, metadata={_HEADER: json.dumps(description)}))


def read_tensors(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the description and the tensors of a file that `write_tensors` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one of other software.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a model file, found none")
    try:
        with safe_open(path, framework="pt") as file:
            description = parse_json((file.metadata() or {}).get(_HEADER, "null"))
            # A safe_open handle is no mapping; it has keys() alone. Its tensors lie in the file,
            # whose next writer would change them.
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, *UNFIT) as error:
        raise ValueError(f"{path}: not a readable model file: {error}") from error
    if not isinstance(description, dict):
        raise ValueError(f"{path}: a safetensors file, but not one of a Coded ResNeXt")
    return description, state


def is_model_file(path: str | Path) -> bool:
    """Returns whether a file says of itself that `save_model` wrote it, whatever its name is."""
    try:
        with safe_open(path, framework="pt") as file:
            return _HEADER in (file.metadata() or {})
    except (SafetensorError, OSError, *UNFIT):
        return False


def check_version(path: str | Path, description: dict[str, Any], versions: Sequence[int]) -> None:
    """Refuses a file of a format version that is none of these."""
    version = description.get("format_version")
    if version not in versions:
        expected = " or ".join(map(str, versions))
        raise ValueError(f"{path}: format_version: expected {expected}, got {version!r}")


def check_codebooks(stored: Sequence[Codebook], expected: Sequence[Codebook]) -> None:
    """Refuses codebooks that differ from those of a checkpoint.

    Raises:
        ValueError: says whether their number, their classes or class order, or the codewords of
            which stage differ.
    """
    if len(stored) != len(expected):
        raise ValueError(
            f"codebooks: expected {len(stored)} as in the checkpoint, got {len(expected)}"
        )
    for stage, (ours, theirs) in enumerate(zip(stored, expected, strict=True), 1):
        if ours.class_names != theirs.class_names:
            raise ValueError(
                "codebooks: expected the classes and class order of the checkpoint "
                f"({', '.join(ours.class_names[:5])}, ..), got "
                f"{', '.join(theirs.class_names[:5])}, .."
            )
        if ours.words != theirs.words:
            raise ValueError(
                f"codebooks: the codewords of coded stage {stage} differ from the checkpoint's"
            )
