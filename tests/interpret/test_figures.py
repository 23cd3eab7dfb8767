"""Figures: there, not empty, reproducible, and made without touching global state."""

from __future__ import annotations

import struct
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import font_manager
from matplotlib.image import imread
from support.small_networks import make_data, make_network

from coded_resnext import Codebook, CodedResNeXt, Stage, create_model
from coded_resnext.data.batches import batches
from coded_resnext.interpret import evaluate, save_figures
from coded_resnext.interpret.path_figure import figure_style, label

FIGURES = [
    "paths",
    "early_decoding",
    "removal",
    "removal_energy",
    "one_class_scores",
    "precision_recall",
    "one_class_points",
    "semantics",
]


@pytest.mark.long
def test_files_are_pictures_and_reproducible(tmp_path):
    model = make_network()
    data = make_data(model, 50, seed=1)
    found = evaluate(model, None, data, repeats=2)
    before = matplotlib.rcParams.copy()
    # Another test of this process may have imported it.
    sys.modules.pop("matplotlib.pyplot", None)
    saved = save_figures(found, model.codebooks, tmp_path / "first")
    again = save_figures(found, model.codebooks, tmp_path / "second")
    assert matplotlib.rcParams.copy() == before
    assert "matplotlib.pyplot" not in sys.modules
    names = [f"{figure}{suffix}" for figure in FIGURES for suffix in (".png", ".svg")]
    assert [path.relative_to(tmp_path / "first").as_posix() for path in saved] == names
    for path, twin in zip(saved, again, strict=True):
        content = path.read_bytes()
        assert content == twin.read_bytes(), path.name
        if path.suffix == ".svg":
            assert ElementTree.fromstring(content).tag.endswith("svg")  # noqa: S314
            assert b"dc:date" not in content
            continue
        assert content.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", content[16:24])
        assert min(width, height) > 500
        # Ink on a white ground, in more than one colour, and nothing cut off at the border.
        pixels = imread(path)[..., :3]
        assert 0.02 < (pixels.min(2) < 0.95).mean() < 0.8
        assert len(np.unique((255 * pixels[::3, ::3]) @ np.array([1, 256, 65536]))) > 20
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border.min(1) > 0.95).mean() > 0.98, path.name


@pytest.mark.long
def test_odd_names_missing_classes_and_many_of_them(tmp_path, recwarn):
    torch.manual_seed(0)
    pairs = [(a, b) for a in range(10) for b in range(a)]
    names = ["$\\frac$", "<script>", "n" * 300, "100 %", *map(str, range(41))]
    book = Codebook([[int(n in pair) for n in range(10)] for pair in pairs], names)
    model = CodedResNeXt([Stage(1, 8, 1, 10, 2)], 45, codebooks=[book], stem_channels=4)
    loader = batches(torch.randn(60, 3, 4, 4), torch.arange(60) % 30)
    found = evaluate(model, None, loader, repeats=1)
    assert len(save_figures(found, model.codebooks, tmp_path)) == 2 * len(FIGURES)
    assert [str(warning.message) for warning in recwarn] == []


def test_names_of_other_scripts_and_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """yolov5#6522, matplotlib#14269: boxes for letters; a name that mirrored its own number."""
    assert label("\u202eevil") == "\\u202eevil"
    assert label("") == "(no name)"
    entries = [SimpleNamespace(name=name) for name in ("DejaVu Sans", "Noto Sans CJK SC", "Mine")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", entries)
    monkeypatch.setitem(matplotlib.rcParams, "font.sans-serif", ["Mine", "Gone"])
    with figure_style():
        families = matplotlib.rcParams["font.sans-serif"]
    assert families == ["DejaVu Sans", "Mine", "Noto Sans CJK SC"]


def test_plain_network_has_no_figures(tmp_path):
    model = create_model("resnext_digits")
    found = evaluate(model, None, batches(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])))
    assert save_figures(found, model.codebooks, tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_codebooks_of_another_network(network, data, tmp_path):
    found = evaluate(network, None, data, repeats=1)
    with pytest.raises(ValueError, match="codebooks: expected one for each of 3 coded blocks"):
        save_figures(found, network.stage_codebooks, tmp_path)


def test_without_matplotlib(network, data, tmp_path, monkeypatch):
    found = evaluate(network, None, data, repeats=1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"matplotlib.*coded-resnext\[report\]"):
        save_figures(found, network.codebooks, tmp_path)


@pytest.mark.long
def test_importing_needs_no_optional_package():
    code = (
        "import sys, coded_resnext.interpret\n"
        "print([m for m in ('matplotlib', 'sklearn', 'PIL') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"
