"""The limits of compiled kernels: kept by those that ship, and able to be broken.

Also here, since it needs the same compiled kernels: that the JIT finds what was built for it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import limits as static_limits
import pytest
import static
from limits import Limits, one_of_each
from sass import Code, Instruction, unequal_sums

from coded_resnext.kernels.build.build import build, shipped_rows
from coded_resnext.kernels.conv1x1 import rows as conv1x1_rows
from coded_resnext.kernels.conv1x1.rows import ProductSizes
from coded_resnext.kernels.conv3x3 import rows as conv3x3_rows
from coded_resnext.kernels.conv3x3.rows import GroupedSizes
from coded_resnext.kernels.prebuilt import FOLDERS_VARIABLE
from coded_resnext.kernels.recompute import rows as recompute_rows
from coded_resnext.kernels.rows import Variant

HERE = Path(static.__file__).parent
ARCHS = ("sm80", "sm90", "sm100")
LAUNCH = HERE.parents[1] / "tests" / "kernels" / "build" / "launch_rows.py"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command],
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `--quick` compiles, for every architecture that the limits hold for."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
        build(
            ARCHS,
            folder,
            source=static.ROWS,
            wanted=lambda name, arch: name in one_of_each(arch),
        )
    return folder


@pytest.mark.long
def test_shipped_kernels_keep_their_limits(compiled: Path, tmp_path: Path) -> None:
    out = tmp_path / "static.json"
    result = run(
        str(HERE / "static.py"),
        *("--quick", *(option for arch in ARCHS for option in ("--arch", arch))),
        *("--folder", str(compiled), "--out", str(out)),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no work to do" in result.stdout
    assert "0 limits broken" in result.stdout
    rows = static.read_rows(out.read_text())
    settings = {arch: dict(static_limits.rows(arch)) for arch in ARCHS}
    kernels = {row["row"]: settings[row["arch"]][row["row"]].kernel for row in rows}
    for arch in ARCHS:
        compiled_here = {kernels[row["row"]] for row in rows if row["arch"] == arch}
        assert compiled_here >= {row.kernel for _, row in shipped_rows(arch)}
    for row in rows:
        assert 16 <= row["registers"] <= 255
        assert row["instructions"] >= row["loop_instructions"] > 10
        assert row["spilled"] == 0
        limits = static.limits_for(
            kernels[row["row"]].partition(":")[2], settings[row["arch"]][row["row"]]
        )
        if limits.per_byte is not None:
            assert row["instructions_per_byte"] > 0.01


@pytest.mark.long
def test_lanes_of_a_sum_hold_the_same_bits(compiled: Path) -> None:
    """Of every shipped kernel; else what is stored, or read of it, need not repeat."""
    texts = [path.read_text() for path in (compiled / "build" / "cache").glob("*/*.ptx")]
    unequal = Counter[str]()
    for text in texts:
        kernel = re.search(r"\.entry (\w+)", text)
        assert kernel is not None
        unequal[kernel[1]] += unequal_sums(text)
    assert {"coding_loss", "aggregate_backward", "aggregate_forward"} <= unequal.keys()
    assert +unequal == {}


@pytest.mark.long
def test_float32_gradients_keep_their_registers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that spilled; `--quick` takes none in float32."""
    spilled = {
        ("energy_backward 10x11d c4 fp32", "sm80"),
        ("aggregate_backward 10x11d c4 fp32", "sm80"),
        ("aggregate_backward 32x4d c5 160px fp32", "sm90"),
        # With Triton 3.8: 2454 instructions.
        ("aggregate_backward 10x11d c4 fp32", "sm90"),
    }
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    figures = static.measure(["sm80", "sm90"], tmp_path, lambda *row: row in spilled, None)
    assert {(row["row"], row["arch"]) for row in figures} == spilled
    assert not any(row["spilled"] for row in figures), figures


@pytest.mark.long
def test_the_jit_finds_the_shipped_kernels(compiled: Path, tmp_path: Path) -> None:
    result = run(
        *(str(LAUNCH), "sm90", static.ROWS, *one_of_each("sm90")),
        PYTHONPATH=os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
        **{FOLDERS_VARIABLE: str(compiled)},
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert len(report["found"]) == len(report["launches"]) > 5
    assert all(report["found"].values()), report["found"]
    assert not (tmp_path / "cache").exists()


def test_every_shipped_kernel_has_limits() -> None:
    for arch in static.ARCHS:
        for name, row in shipped_rows(arch):
            assert static.limits_for(row.kernel.partition(":")[2], row) is not None, name


GOOD: dict[str, Any] = {
    "kernel": "some_kernel",
    "arch": "sm90",
    "registers": 100,
    "spilled": 0,
    "matrix_instructions": 4,
    "instructions_per_byte": 0.1,
    "loop_load_bits": {64: 1, 128: 3},
}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"spilled": 2}, "2 spilling instructions"),
        ({"matrix_instructions": 0}, "no tensor-core instruction"),
        ({"registers": 129}, "129 registers, at most 128"),
        ({"instructions_per_byte": 0.18}, "0.18 instructions per byte, at most 0.17"),
        ({"loop_load_bits": {64: 2, 128: 2}}, "expected mostly 128"),
        ({"loop_load_bits": {}}, None),
        ({"kernel": "unknown"}, "no limits are stated"),
    ],
)
def test_a_broken_limit_is_named(
    change: dict[str, Any], fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(registers=128, per_byte=0.17)
    monkeypatch.setitem(static_limits.LIMITS, "some_kernel", limits)
    sizes = (("WIDTH", 16), ("GROUP", 1))
    row = SimpleNamespace(kernel="some:some_kernel", args=("*bf16",), constexprs=sizes)
    faults = static.faults_of({**GOOD, **change}, row)
    if fault is None:
        assert faults == []
    else:
        assert len(faults) == 1
        assert fault in faults[0]


def test_limits_differ_by_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(static_limits.LIMITS, "some_kernel", Limits(registers=128))
    monkeypatch.setitem(static_limits.BY_VERSION, ("3.1", "some_kernel"), {"registers": 140})
    monkeypatch.setattr(static_limits.triton, "__version__", "3.1.0")
    assert static_limits.limits_of("some_kernel") == Limits(registers=140)
    monkeypatch.setattr(static_limits.triton, "__version__", "3.10.0")
    assert static_limits.limits_of("some_kernel") == Limits(registers=128)
    assert static_limits.limits_of("some_kernel", 64) == Limits(registers=128)
    monkeypatch.setitem(static_limits.LIMITS, "some_kernel 64", Limits(registers=200))
    assert static_limits.limits_of("some_kernel", 64) == Limits(registers=200)
    assert static_limits.limits_of("some_kernel", 32) == Limits(registers=128)


@pytest.mark.parametrize(
    ("release", "of_16", "stages_of_24", "gradient_stages"),
    [
        ("3.6", ((1, 1), (1, 1), (1, 1)), [1, 1, 2], [2, 1, 1]),
        ("3.7", ((1, 1), (1, 2), (1, 2)), [1, 1, 1], [1, 1, 1]),
        ("3.8", ((1, 1), (1, 2), (2, 1)), [1, 1, 1], [1, 1, 1]),
        ("3.9", ((1, 1), (1, 1), (1, 1)), [1, 1, 1], [1, 1, 1]),
    ],
)
def test_rows_of_one_version(
    release: str,
    of_16: tuple[tuple[int, int], ...],
    stages_of_24: list[int],
    gradient_stages: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What would spill with one version of Triton alone has a row of its own with it."""
    monkeypatch.setattr(conv3x3_rows, "triton_release", lambda: release)
    # The makers remember their rows: what they wrap does not.
    forward = conv3x3_rows.forward.__wrapped__
    gradient = conv3x3_rows.input_gradient.__wrapped__
    coded = [Variant(folded=True, energies=True, arch=arch) for arch in ARCHS]
    fused = [Variant(affine=True, statistics=True, arch=arch) for arch in ARCHS]
    rows = [forward(GroupedSizes(32, 16), variant) for variant in coded]
    assert tuple((row.num_warps, row.num_stages) for row in rows) == of_16
    assert [forward(GroupedSizes(20, 24), each).num_stages for each in coded] == stages_of_24
    assert [forward(GroupedSizes(20, 12), each).num_stages for each in coded] == [1, 1, 1]
    assert [forward(GroupedSizes(32, 32), each).num_stages for each in coded] == [1, 1, 1]
    second = [gradient(GroupedSizes(20, 24, stride=2), each).num_stages for each in fused]
    assert second == gradient_stages
    assert [gradient(GroupedSizes(20, 24), each).num_stages for each in fused] == [1, 1, 1]


def test_rows_that_ask_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between BatchNorms on sm_90, with windows that are filled up, in bfloat16; and no others."""
    makers = [
        make.__wrapped__
        for make in (
            conv3x3_rows.forward,
            conv3x3_rows.input_gradient,
            conv3x3_rows.weight_gradient,
        )
    ]
    fused = Variant(affine=True, statistics=True, arch="sm90")

    def stages(width: int, stride: int, variant: Variant) -> list[int]:
        groups = 20 if width in (6, 12, 24) else 32
        return [make(GroupedSizes(groups, width, stride), variant).num_stages for make in makers]

    assert stages(4, 1, fused) == stages(16, 1, fused) == [2, 2, 1]
    assert stages(8, 2, fused) == [2, 2, 2]
    assert stages(32, 1, fused) == stages(32, 2, fused) == [2, 2, 1]
    assert stages(24, 1, fused) == stages(12, 2, fused) == [1, 1, 1]
    for other in (
        replace(fused, arch="sm80"),
        replace(fused, arch="gfx942"),
        replace(fused, dtype="fp32"),
        replace(fused, dtype="fp16"),
        Variant(arch="sm90"),
    ):
        assert stages(4, 1, other) == stages(8, 2, other) == [1, 1, 1]
    # The gradient of the weight does so by hand, and gives up registers for more programs.
    for release, most in (("3.6", 176), ("3.8", 168), ("3.9", 176)):
        monkeypatch.setattr(conv3x3_rows, "triton_release", lambda release=release: release)
        for width, ahead in ((4, True), (16, True), (32, False), (24, False)):
            row = makers[2](GroupedSizes(20 if width == 24 else 32, width), fused)
            assert dict(row.constexprs)["AHEAD"] == ahead
            assert row.keywords.get("maxnreg") == (most if ahead else None)
    sizes = GroupedSizes(32, 4)
    assert conv3x3_rows.weight_splits(sizes, fused, 10**6) == 11 * 132 // 8
    assert conv3x3_rows.weight_splits(sizes, replace(fused, arch="sm80"), 10**6) == 1024 // 8


@pytest.mark.parametrize(
    ("release", "programs", "forward_rows"),
    [("3.6", [2, 2, 2], 128), ("3.7", [2, 2, 1], 128), ("3.9", [1, 1, 1], 64)],
)
def test_tiles_of_one_version(
    release: str, programs: list[int], forward_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two programs share a processor where no release keeps their registers in memory."""
    monkeypatch.setattr(conv1x1_rows, "triton_release", lambda: release)
    behind = Variant(statistics=True, output_gradient=True, signs=True, raw=False)
    sizes = [ProductSizes(*each, join=True) for each in ((256, 128), (256, 256), (512, 256))]
    tiles = [conv1x1_rows.tile_of("join_input_gradient", each, behind) for each in sizes]
    assert [tile.programs for tile in tiles] == programs
    assert [tile.registers for tile in tiles] == [128 * (count > 1) for count in programs]
    written = conv1x1_rows.tile_of("join_input_gradient", sizes[0], replace(behind, raw=True))
    assert (written.programs, written.registers) == (1, 0)
    assert conv1x1_rows.tile_of("product_forward", sizes[2], behind).m == forward_rows
    assert conv1x1_rows.tile_of("product_join", ProductSizes(128, 256), behind).registers == 128
    for other in (replace(behind, arch="sm100"), replace(behind, dtype="fp16")):
        assert conv1x1_rows.tile_of("product_join", ProductSizes(128, 256), other).registers == 0


def test_programs_that_a_processor_holds() -> None:
    # By registers, given by eight a thread; by shared memory; by warps.
    assert static.programs_held(168, 1, 2048, "sm90") == 12
    assert (
        static.programs_held(176, 1, 2048, "sm90") == static.programs_held(169, 1, 0, "sm90") == 11
    )
    assert static.programs_held(128, 8, 112 * 1024, "sm90") == 2
    assert static.programs_held(128, 8, 113 * 1024, "sm90") == 2
    assert static.programs_held(128, 8, 114 * 1024, "sm90") == 1
    assert static.programs_held(128, 8, 82 * 1024, "sm80") == 1
    assert static.programs_held(16, 8, 0, "sm90") == 8
    assert static.programs_held(64, 4, 0, "gfx942") is None


@pytest.mark.parametrize(("release", "stages"), [("3.6", [3, 3, 1]), ("3.9", [3, 3, 3])])
def test_moments_of_the_release_that_does_not_compile_loads_ahead(
    release: str, stages: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 3.6 on sm_100 (`Operations without parent blocks have no order`)."""
    monkeypatch.setattr(recompute_rows, "triton_release", lambda: release)
    moments = recompute_rows.moments.__wrapped__
    rows = [moments(128, Variant(affine=True, arch=arch)) for arch in ("sm80", "sm90", "sm100")]
    assert [row.num_stages for row in rows] == stages


def nested(unrolled: int) -> Code:
    """Ten instructions, a loop of 20 over samples, and in it one of 8 that holds some trips."""
    body = [Instruction(n, "FADD") for n in range(38)]
    for n in range(unrolled):
        body[20 + n] = Instruction(20 + n, "LDG.E.128")
    body[27] = Instruction(27, "BRA", 20)
    body[37] = Instruction(37, "BRA", 10)
    return Code(body, 32, 0, 32)


def row_of(**sizes: int) -> SimpleNamespace:
    """A row of one warp whose trips move 512 bytes, as one wide load of 32 lanes does."""
    return SimpleNamespace(
        constexprs=tuple(sizes.items()),
        num_warps=1,
        trip_bytes=512,
        sample_bytes=4096,
        steps=1,
    )


def test_all_work_on_a_sample_counts() -> None:
    # Per sample: 10 shared by 5, 20 outside the inner loop, 8 trips of its 8 instructions.
    row = row_of(PIXELS=128, BLOCK_P=16, SAMPLES=5, WINDOWS=1, GROUP=1, BRANCHES=1)
    assert static.instructions_per_byte(nested(1), row) == pytest.approx((2 + 20 + 64) / 4096)
    # A body that holds two trips runs half as often.
    assert static.instructions_per_byte(nested(2), row) == pytest.approx((2 + 20 + 32) / 4096)
    # A program with a quarter of the branches has a quarter of the bytes.
    row = row_of(PIXELS=128, BLOCK_P=16, SAMPLES=5, WINDOWS=2, GROUP=1, BRANCHES=8)
    assert static.instructions_per_byte(nested(1), row) == pytest.approx((2 + 20 + 64) / 1024)
    # Maps of any size: what a trip costs.
    assert static.instructions_per_byte(nested(1), row_of()) == pytest.approx(8 / 512)
    # Steps over windows instead of samples.
    row = row_of(PIXELS=128, BLOCK_P=16, STEPS=3, WINDOWS=2, GROUP=1, BRANCHES=6)
    assert static.instructions_per_byte(nested(1), row) == pytest.approx(
        (10 + 3 * 20 + 3 * 64) / 4096
    )


def test_the_clocks_of_a_loop() -> None:
    loop = [Instruction(0, "HGMMA.64x128x16.F32.BF16")] + [Instruction(n, "FADD") for n in range(7)]
    # Eight warps: two groups of four, each product 64 * 128 * 16 at 2048 a clock.
    assert static.loop_clocks(loop, 8, "sm90") == {"issue": 16, "products": 128}
    loop[0] = Instruction(0, "HMMA.16816.F32.BF16")
    assert static.loop_clocks(loop, 8, "sm80") == {"issue": 16, "products": 16}
    assert static.loop_clocks(loop[1:], 8, "sm80") == {}
