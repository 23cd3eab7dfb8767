"""What the tests of the commands share."""

from __future__ import annotations

import json

import pytest
from support.small_networks import NAMES, make_network

from coded_resnext import CodedResNeXt
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.models.checkpoint import save_model

PREPROCESSING = Preprocessing(6, 1, (0.3,), (0.4,))


@pytest.fixture
def network() -> CodedResNeXt:
    """Four classes; three coded blocks of two codebooks with a plain block between them."""
    return make_network()


@pytest.fixture
def run_folder(network, tmp_path):
    """A run with the network, and an evaluation that chose thresholds for three classes."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_model(folder / "model.safetensors", network, preprocessing=PREPROCESSING)
    thresholds = [0.5, 0.25, None, -1.0]
    rows = [
        {"class_name": name, "threshold": threshold}
        for name, threshold in zip(NAMES, thresholds, strict=True)
    ]
    (folder / "evaluation.json").write_text(json.dumps({"one_class": {"classifiers": rows}}))
    return folder
