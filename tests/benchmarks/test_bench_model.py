"""The comparison of networks where there is no GPU: every contender at tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_kernels
import bench_model
import pytest
import torch
from bench_model import Contender, Runner
from PIL import Image
from timing import find_gpu

from coded_resnext import create_model
from coded_resnext.kernels.recompute import convolution as recompute


def run(monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_model.py", *map(str, options)])
    monkeypatch.setattr(bench_model.torch.cuda, "is_available", lambda: False)
    return bench_model.main()


@pytest.mark.long
def test_every_contender_is_right_and_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "model.json", tmp_path / "model.png"
    options = ("--tiny", "--no-compile", "--steps", 1, "--out", out, "--plot", picture)
    networks = ("--network", "resnext50_32x4d", "--network", "resnext29_20x6d")
    assert run(monkeypatch, *options, *networks) == 0
    content = json.loads(out.read_text())
    assert content["tiny"] is True
    assert content["machine"]["versions"]["torch"]
    names = {(row["network"], row["contender"]) for row in content["rows"]}
    ours = {
        "plain, torch, eager, nchw",
        "plain, torch, eager, nhwc",
        "plain, fused, eager, nhwc",
        "coded, torch, eager, nhwc",
        "coded, fused, eager, nhwc",
        "coded, fused, eager, nhwc, written",
        "coded, reference, eager, nhwc",
    }
    assert names == {
        *(("resnext50_32x4d", name) for name in {*ours, "timm, torch, eager, nhwc"}),
        *(("resnext29_20x6d", name) for name in ours),
    }
    for row in content["rows"]:
        assert row["wrong"] is None
        assert row["apart"] <= 1e-3
        assert row["train_images_per_second"] > 0
        assert row["infer_images_per_second"] == pytest.approx(2 / (row["infer_ms"] / 1000))
        if not row["contender"].startswith("timm"):
            assert 0 < 2 * row["infer_least_bytes"] < row["train_least_bytes"]
    assert "coded, fused, eager, nhwc" in capsys.readouterr().out
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(2**24) or []) > 10


def test_logits_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    build = Contender.build

    def wrong(self: Contender, *arguments: object) -> object:
        model = build(self, *arguments)  # type: ignore[arg-type]
        if self.backend == "fused":
            model.head.weight.data.mul_(1.01)
        return model

    monkeypatch.setattr(Contender, "build", wrong)
    monkeypatch.setattr(bench_model.torch.cuda, "is_available", lambda: False)
    content = bench_model.bench_models(["resnext29_10x11d"], steps=1, compiled=False, tiny=True)
    for row in content["rows"]:
        assert (row["wrong"] is not None) == (", fused," in row["contender"])
        assert ("train_ms" in row) == (row["wrong"] is None)
    assert "apart from those of the first plain" in bench_model.table(content["rows"])


@pytest.mark.long
def test_who_writes_the_last_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways to train differ in that alone, and lead to the same loss."""
    left: list[str] = []
    statistics = recompute.statistics

    def note(*arguments: Any) -> Any:
        left.append("one")
        return statistics(*arguments)

    monkeypatch.setattr(recompute, "statistics", note)
    images, targets = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    losses = []
    for written in (True, False):
        contender = Contender("coded", "fused", written=written)
        overrides = bench_model.tiny_overrides(contender)
        overrides |= {"drop_branches": 0.0}
        runner = Runner(contender, "resnext29_20x6d", images, targets, torch.float32, overrides)
        left.clear()
        losses.append([runner.train() for _ in range(3)])
        assert bool(left) != written
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def test_the_share_of_the_least_time() -> None:
    gpu = find_gpu("NVIDIA H200")
    assert gpu is not None
    model = create_model("coded_resnext50_32x4d")
    moved = bench_model.least_bytes(model, 256, 160, 2, training=True)
    assert moved == 2 * bench_model.least_bytes(model, 128, 160, 2, training=True)
    assert gpu.floor(moved) == pytest.approx(moved / gpu.bandwidth)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 0), "--steps: expected at least 1, got 0"),
        (("--batch", -1), "--batch: expected at least 1, got -1"),
        (("--network", "resnet18"), "invalid choice: 'resnet18'"),
        (("--plot", "nowhere/model.png"), "nowhere/model.png: expected a folder that exists"),
    ],
)
def test_bad_arguments(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[object, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "--tiny", "--out", tmp_path / "model.json", *options)
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--out", tmp_path / "model.json") == 2
    assert "no GPU was available: nothing was timed" in capsys.readouterr().err
    assert not (tmp_path / "model.json").exists()


def bench(*options: object) -> str:
    """What pytest says of the benchmarks of a GPU on a machine that has none."""
    benchmarks = Path(bench_model.__file__).with_name("bench_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", benchmarks, *map(str, options)],
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.long
def test_benchmarks_of_a_gpu_take_their_paths_without_one(tmp_path: Path) -> None:
    """Skipped with the reason, or tiny in the interpreter, where a wrong result is found."""
    pytest.importorskip("pytest_benchmark")
    words = bench("-k", "coding_loss")
    assert "no GPU was available; --dry takes the paths in the interpreter" in words
    assert "passed" not in words
    bench("--dry", "-k", "coding_loss and not compiled", "--results", tmp_path / "rows.json")
    content = json.loads((tmp_path / "rows.json").read_text())
    assert [row["what"] for row in content["rows"]] == [
        f"coding_loss, tiny, {which}: {form}"
        for form in ("kernel", "definition")
        for which in ("forward", "backward")
    ]


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_benchmark_of_what_is_wrong_fails(factor: float) -> None:
    x = torch.ones(3)
    bench_kernels.check((x, None), (1.01 * x, None))
    with pytest.raises(AssertionError):
        bench_kernels.check((factor * x, None), (x, None))


def test_every_kernel_is_benchmarked_at_the_sizes_of_the_paper() -> None:
    names = [case.name for case in bench_kernels.all_cases(dry=False)]
    assert len(set(names)) == len(names)
    for what in (
        *("branch_energy", "coded_aggregate", "coding_loss", "grouped convolution"),
        *("batch_norm, forward", "batch_norm, backward", "residual, forward", "residual, backward"),
        *(
            "1x1 convolution",
            "end of a block",
            "block c4, coded",
            "resnext50_32x4d, train",
            "resnext29_10x11d, infer",
        ),
    ):
        assert any(name.startswith(what) for name in names), what
    # Each beside itself compiled.
    compiled = {n.partition(", ")[0] for n in names if n.endswith("compiled")}
    assert compiled >= {
        *("grouped convolution", "1x1 convolution", "end of a block", "batch_norm", "residual")
    }
    steps = {name.partition(": ")[2] for name in names if name.startswith("resnext50_32x4d, train")}
    assert {"timm, torch, eager, nhwc", "plain, torch, compiled default, nhwc"} < steps
