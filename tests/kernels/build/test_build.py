"""Kernels compiled ahead of time: once, incrementally, found by the JIT, not trusted blindly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coded_resnext.cli import doctor, main
from coded_resnext.kernels.build import build as build_build
from coded_resnext.kernels.build.build import BuildError, build, missing
from coded_resnext.kernels.prebuilt import FOLDERS_VARIABLE, INDEX, read_index

HERE = Path(__file__).parent
SOURCE = "toy_launches:rows"
ROWS = ["scale 256", "scale 512", "sum"]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a copy of the toy kernels, on the path of this process and of its children.

    Its name has a space, and the environment a variable that would change what is compiled.
    """
    folder = tmp_path_factory.mktemp("toy kernels")
    for name in ("toy_launches.py", "launch_rows.py"):
        shutil.copy(HERE / name, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        patch.setenv("DISABLE_LLVM_OPT", "1")
        yield folder
    sys.modules.pop("toy_launches", None)


@pytest.fixture(scope="module")
def built(toys: Path) -> Path:
    """The toy kernels, built for sm_90."""
    entries = build(["sm90"], toys / "out", source=SOURCE)["sm90"]
    assert [entry["row"] for entry in entries] == ROWS
    assert len({entry["key"] for entry in entries}) == len(ROWS)
    return toys / "out"


def launch(toys: Path, kernels: Path, cache: Path) -> tuple[dict[str, Any], str]:
    """What launching the toys reports with these prebuilt kernels and this cache, and its log."""
    environment = {
        **{key: value for key, value in os.environ.items() if key != "DISABLE_LLVM_OPT"},
        FOLDERS_VARIABLE: str(kernels),
        "TRITON_CACHE_DIR": str(cache),
    }
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, str(toys / "launch_rows.py"), "sm90", SOURCE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


def test_a_second_build_has_nothing_to_do(
    built: Path, toys: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build(["sm90"], built, source=SOURCE)
    output = capfd.readouterr().out
    assert "no work to do" in output
    assert "compiled " not in output


def test_the_jit_finds_what_was_moved_and_is_read_only(
    built: Path, toys: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(built / "sm90", moved / "sm90")
    for path in moved.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    report, log = launch(toys, moved, tmp_path / "cache")
    assert report["found"] == dict.fromkeys(ROWS, True)
    assert report["launches"] == ["scale_kernel", "scale_kernel", "sum_kernel"]
    assert not (tmp_path / "cache").exists()
    assert "prebuilt" not in log


def test_damage_is_compiled_over(built: Path, toys: Path, tmp_path: Path) -> None:
    kernels = tmp_path / "damaged"
    shutil.copytree(built / "sm90", kernels / "sm90")
    index = read_index(kernels / "sm90" / INDEX)
    flipped, lost = (kernels / "sm90" / index.rows[name] for name in ("scale 256", "sum"))
    cubin = next(flipped.glob("*.cubin"))
    data = bytearray(cubin.read_bytes())
    data[len(data) // 2] ^= 1
    cubin.write_bytes(data)
    next(lost.glob("*.cubin")).unlink()
    # Beside them a folder with an index that is none.
    (kernels / "sm80").mkdir()
    (kernels / "sm80" / INDEX).write_text("{", encoding="utf-8")
    report, log = launch(toys, kernels, tmp_path / "cache")
    assert report["found"] == {"scale 256": False, "scale 512": True, "sum": False}
    assert len(report["launches"]) == 3
    assert log.count("is damaged; compiling it") == 2
    assert "not an index of prebuilt kernels" in log
    lacking = missing(["sm90", "sm80"], kernels, SOURCE)
    assert [line.rpartition(": ")[0] for line in lacking[:2]] == ["sm90: scale 256", "sm90: sum"]
    assert "not an index" in lacking[2]


@pytest.mark.long
def test_kernels_of_another_triton_are_left_out(built: Path, toys: Path, tmp_path: Path) -> None:
    kernels = tmp_path / "other"
    shutil.copytree(built / "sm90", kernels / "sm90")
    path = kernels / "sm90" / INDEX
    content = json.loads(path.read_text())
    content["toolchain"]["triton"] = "3.0.0"
    path.write_text(json.dumps(content))
    report, log = launch(toys, kernels, tmp_path / "cache")
    assert not any(report["found"].values())
    assert "they are for {'triton': '3.0.0'" in log
    assert "built by {'triton': '3.0.0'" in missing(["sm90"], kernels, SOURCE)[0]


@pytest.mark.long
def test_one_changed_row_is_one_compile(
    built: Path, toys: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = toys / "toy_launches.py"
    text = source.read_text()
    source.write_text(text.replace("(256, 512)", "(256, 128)"))
    sys.modules.pop("toy_launches")
    assert missing(["sm90"], built, SOURCE) == ["sm90: scale 128: not built"]
    old = read_index(built / "sm90" / INDEX).rows
    build(["sm90"], built, source=SOURCE)
    assert capfd.readouterr().out.count("compiled ") == 1
    new = read_index(built / "sm90" / INDEX).rows
    assert set(new) == {"scale 256", "scale 128", "sum"}
    assert new["scale 256"] == old["scale 256"]
    assert not (built / "sm90" / old["scale 512"]).exists()
    assert missing(["sm90"], built, SOURCE) == []
    source.write_text(text)
    sys.modules.pop("toy_launches")


@pytest.mark.long
def test_a_changed_source_is_compiled_again(
    built: Path, toys: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build(["sm90"], built, source=SOURCE)
    capfd.readouterr()
    source = toys / "toy_launches.py"
    text = source.read_text()
    # In a helper's constant: no row and no kernel's own text is different.
    source.write_text(text.replace("constexpr(0.5)", "constexpr(0.25)"))
    old = read_index(built / "sm90" / INDEX).rows
    build(["sm90"], built, source=SOURCE)
    assert capfd.readouterr().out.count("compiled ") == len(ROWS)
    new = read_index(built / "sm90" / INDEX).rows
    assert all(new[name] != old[name] for name in ROWS)
    source.write_text(text)


@pytest.mark.long
def test_a_kernel_that_does_not_compile_is_named(
    toys: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = (toys / "toy_launches.py").read_text().replace("(256, 512)", "(256, 300)")
    (toys / "broken_launches.py").write_text(text)
    with pytest.raises(BuildError, match="what failed stands above"):
        build(
            ["sm90"],
            tmp_path,
            source="broken_launches:rows",
            wanted=lambda name, _arch: name.startswith("scale"),
        )
    output = capfd.readouterr().out
    assert "compiled scale 256 for sm90" in output
    assert "scale 300 for sm90 does not compile" in output
    assert not (tmp_path / "sm90").exists()


def test_kernels_of_few_rows_share_a_step() -> None:
    """A step holds at most a dozen rows, and the rows of a kernel stand together."""
    counts = {"a": 5, "b": 7, "c": 30, "d": 1}
    rows = {
        f"{kernel} {n}": SimpleNamespace(kernel=f"module:{kernel}")
        for kernel, count in counts.items()
        for n in range(count)
    }
    steps = build_build._divide(rows)
    assert [name for part in steps.values() for name in part] == list(rows)
    sizes = {name: len(part) for name, part in steps.items()}
    assert sizes == {"a-0": 12, "c-0": 12, "c-12": 12, "c-24": 7}


def test_without_ninja_the_error_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(build_build, "find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="pip install ninja"):
        build_build.find_ninja()
    program = tmp_path / "ninja"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert build_build.find_ninja() == str(program)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_90"], "--arch: expected a capability from 80 on"),
        (["--arch", "75"], "--arch: expected a capability from 80 on"),
        (["--arch", "90", "--jobs", "0"], "--jobs: expected at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["build-kernels", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_check_of_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["build-kernels", "--arch", "90", "--check", "--out", str(tmp_path)]) == 1
    assert "sm90: " in capsys.readouterr().out


def test_a_user_without_a_home_has_no_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """fms-hf-tuning#367, triton#518: a container's user may have no HOME and no passwd entry."""

    def nobody(_uid: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", FOLDERS_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert list(doctor.prebuilt_kernels()) == [
        "none prebuilt in no folder; each is compiled when first used"
    ]


FIT = """
import sys
from coded_resnext.kernels import layout
from coded_resnext.kernels.build.steps import install_stub_driver
from coded_resnext.kernels.coded.rows import aggregate_backward, aggregate_forward
from coded_resnext.kernels.rows import CodedSizes, Variant
arch, memory, dtype, *sizes = sys.argv[1:]
driver = install_stub_driver(arch)
driver.get_device_properties = lambda device: {"max_shared_mem": int(memory)}
for make in (aggregate_forward, aggregate_backward):
    row = make(CodedSizes(*map(int, sizes)), Variant(dtype, drop=True, affine=True, arch=arch))
    print(layout.too_large(row, 0))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("arch", "memory", "dtype", "sizes"),
    [
        ("sm75", 65536, "fp32", (10, 44, 1024, 64)),
        ("sm86", 101376, "bf16", (32, 64, 2048, 49)),
        ("sm86", 16, "bf16", (10, 12, 256, 16)),
    ],
    ids=["README's network on a T4", "32x8d on an RTX 30", "a GPU with next to nothing"],
)
def test_what_a_gpu_has_is_asked_of_its_driver(
    arch: str, memory: int, dtype: str, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    """vllm#36802, mamba#387: kernels that were tried on large GPUs did not fit onto small ones."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", FIT, arch, str(memory), dtype, *map(str, sizes)],
        env={**clean, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    assert len(said) == 2
    assert all("and the GPU has 16" in line if memory == 16 else line == "None" for line in said)


def test_a_build_watches_every_source_of_the_kernels() -> None:
    """Those of operations too, whose folders lie beside the builder's."""
    from coded_resnext.kernels.build.steps import _source_files
    from coded_resnext.kernels.coded import energy

    watched = _source_files("toy_launches")
    assert {str(Path(module.__file__).resolve()) for module in (build_build, energy)} <= watched
