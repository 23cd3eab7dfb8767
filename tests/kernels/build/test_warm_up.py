"""A warm-up leaves everything as it was, and nothing to compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import needs_triton
from torch import Tensor, nn

from coded_resnext import CodedLoss, CodedResNeXt, Stage, WarmUp, warm_up
from coded_resnext.kernels.prebuilt import toolchain
from coded_resnext.kernels.rows import LaunchRow

SCRIPT = Path(__file__).with_name("warm_up_a_layer.py")


def warmed(cache: Path) -> dict[str, Any]:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = {
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(cache),
        "CODED_RESNEXT_KERNELS": "",
    }
    result = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


@pytest.mark.long
def test_a_step_after_it_compiles_nothing(tmp_path: Path) -> None:
    first = warmed(tmp_path)
    assert first["launches"] == [
        "aggregate_forward",
        "coding_loss",
        "aggregate_backward",
        "weighted_gram",
    ]
    # Five samples, where the warm-up had two.
    assert first["asked"] == []
    assert (first["cache_hits"], first["compiled"]) == (0, 4)
    assert first["seconds"] > 0
    again = warmed(tmp_path)
    assert (again["cache_hits"], again["compiled"]) == (4, 0)


@pytest.mark.long
@needs_triton
def test_everything_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stages = [Stage(1, 16, 2, 8, 8), Stage(1, 16, 2, 10, 5, stride=2)]
    model = CodedResNeXt(
        stages, 10, stem_channels=8, in_channels=1, drop_branches=0.1, backend="triton"
    ).train()
    images = torch.rand(3, 1, 4, 4)
    criterion = CodedLoss(model.codebooks, backend="triton")
    model(images).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    launched: list[str] = []
    real = LaunchRow.launch

    def note(row: LaunchRow, grid: tuple[int, ...], *args: Any) -> None:
        launched.append(row.kernel)
        real(row, grid, *args)

    monkeypatch.setattr(LaunchRow, "launch", note)

    def loss(twin: nn.Module, few: Tensor) -> Tensor:
        assert twin is not model
        assert twin.training
        assert few.shape == (2, 1, 4, 4)
        logits, energies = twin(few, return_energies=True)
        return criterion(logits, energies, torch.tensor([1, 2])).total

    torch.manual_seed(7)
    with torch.no_grad():
        result = warm_up(model, images, loss)
    assert isinstance(result, WarmUp)
    actual = torch.rand(4)
    torch.manual_seed(7)
    assert torch.equal(actual, torch.rand(4))
    assert set(launched) >= {
        "coded.aggregate:aggregate_forward",
        "coded.aggregate:aggregate_backward",
        "coded.energy:weighted_gram",
        "loss.kernel:coding_loss",
    }
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


@needs_triton
@pytest.mark.parametrize("training", [True, False])
def test_the_kernels_of_the_calls_to_come(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation those without gradients, which differ."""
    stages = [Stage(1, 16, 2, 8, 8), Stage(1, 16, 2, 10, 5, stride=2)]
    model = CodedResNeXt(stages, 10, stem_channels=8, in_channels=1, backend="triton")
    model.train(training)
    launched: set[LaunchRow] = set()
    real = LaunchRow.launch

    def note(row: LaunchRow, grid: tuple[int, ...], *args: Any) -> None:
        launched.add(row)
        real(row, grid, *args)

    monkeypatch.setattr(LaunchRow, "launch", note)
    images = torch.rand(3, 1, 4, 4)
    warm_up(model, images)
    warmed = set(launched)
    launched.clear()
    with torch.set_grad_enabled(training):
        logits = model(images)
    if training:
        logits.sum().backward()
    assert launched == warmed


# The first two kernels that a process looks up.
LOOK_UP = """
from coded_resnext.kernels.build.build import shipped_rows
from coded_resnext.kernels.build.steps import install_stub_driver
install_stub_driver("sm90")
rows = {row.kernel: row for _, row in shipped_rows("sm90")}
for kernel in list(rows)[:2]:
    rows[kernel].function()
"""


@pytest.mark.parametrize(
    ("kernels", "built", "lines"),
    [(None, [], 1), (None, ["sm80"], 1), (None, ["sm90"], 0), ("", [], 0)],
)
def test_a_first_launch_says_what_compiles_in_parallel(
    kernels: str | None, built: list[str], lines: int, tmp_path: Path
) -> None:
    """A model that is called directly: its kernels are compiled one after the other."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    clean |= {"XDG_CACHE_HOME": str(tmp_path)}
    clean |= {} if kernels is None else {"CODED_RESNEXT_KERNELS": kernels}
    folder = tmp_path / "coded-resnext" / "kernels" / "-".join(("triton", *toolchain().values()))
    for arch in built:
        (folder / arch).mkdir(parents=True)
        index = {"format": 1, "arch": arch, "toolchain": toolchain(), "kernels": {}, "rows": {}}
        (folder / arch / "index.json").write_text(json.dumps(index))
    result = subprocess.run(
        [sys.executable, "-c", LOOK_UP], env=clean, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if "kernels" in line]
    assert len(said) == lines, result.stderr
    for line in said:
        assert line.startswith("no kernels were built for sm90: each is compiled when it is first")
        assert "`coded-resnext build-kernels`, or coded_resnext.warm_up" in line


def test_without_a_loss_the_logits_are_enough() -> None:
    seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    model[1].register_forward_hook(lambda module, _args, y: seen.append((module.training, y.shape)))
    assert (warm_up(model.eval(), torch.rand(6, 1, 2, 2)).compiled) == 0
    assert seen == [(False, (2, 3))]
    assert model[1].weight.grad is None


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (3, 8, 8)])
def test_bad_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images: expected \[2 or more, C, H, W\], got"):
        warm_up(nn.Identity(), torch.rand(shape))
