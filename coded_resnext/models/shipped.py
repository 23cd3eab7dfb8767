"""Weights that come with the package, by name.

Each is a folder `weights/NAME`, whose weights are for the network `coded_resnext_NAME`: what
`save_pretrained` writes, and beside it what the run was measured to do. A new folder is all that
new weights need.
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).with_name("weights")
_CODED = "coded_resnext_"


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
