"""What an editable install says and does when it is asked to compile the kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
PARTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "coded_resnext", "kernels")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what an installation reads."""
    folder = tmp_path / "check out"
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder)
    return folder


def install(
    checkout: Path, archs: str, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the step of an editable install that makes its wheel."""
    return subprocess.run(
        [sys.executable, *options, "setup.py", "-q", "editable_wheel", "--dist-dir", "dist"],
        cwd=checkout,
        env={**os.environ, "CODED_RESNEXT_BUILD_ARCHS": archs, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_isolated_build_says_that_it_skips(checkout: Path) -> None:
    # As in pip's build environment there is setuptools, and not torch nor triton.
    packages = checkout / "isolated"
    packages.mkdir()
    installed = Path(setuptools.__file__).parent.parent
    for pattern in ("setuptools*", "_distutils_hack", "pkg_resources"):
        for path in installed.glob(pattern):
            (packages / path.name).symlink_to(path)
    result = install(checkout, "90", "-S", PYTHONPATH=str(packages))
    assert result.returncode == 0, result.stderr
    assert "no kernels are compiled. Install with --no-build-isolation" in result.stderr
    assert list((checkout / "dist").glob("*.whl"))
    quiet = install(checkout, "", "-S", PYTHONPATH=str(packages))
    assert "no kernels" not in quiet.stderr


@pytest.mark.long
def test_a_build_in_place_runs_the_builder_of_this_checkout(checkout: Path) -> None:
    # What it compiles is not the question here, and would take a minute.
    command = checkout / "coded_resnext" / "cli" / "build_kernels.py"
    text = command.read_text()
    shutil.copy(command, checkout / "original")
    command.write_text(
        text.replace(
            "    archs = arguments.arch",
            "    print('asked for', arguments.arch)\n"
            "    print('kernels of', build.__code__.co_filename)\n"
            "    return 0\n    archs = arguments.arch",
        )
    )
    result = install(checkout, "90, 100")
    assert result.returncode == 0, result.stderr
    assert "asked for ['90', '100']" in result.stdout
    shutil.copy(checkout / "original", command)
    failed = install(checkout, "ninety")
    assert failed.returncode != 0
    assert "--arch: expected a capability" in failed.stderr
