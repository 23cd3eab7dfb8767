"""A checkout is one package, as it lies and installed; an editable install compiles kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
PARTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "coded_resnext", "kernels")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Returns a copy of what an installation reads."""
    return copy_checkout(tmp_path / "check out")


def copy_checkout(folder: Path) -> Path:
    """Copies what an installation reads into a new folder, which it returns."""
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=ignored)
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


def python(folder: Path, code: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """Runs Python in a folder, with one path in front of what is installed."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


WHERE = (
    "import coded_resnext, coded_resnext.kernels as k; print(coded_resnext.__file__, k.__file__)"
)


@pytest.mark.long
def test_a_second_checkout_computes_with_its_own_kernels(checkout: Path, tmp_path: Path) -> None:
    """NIPET#18, pip#11467: parts of a package came from different places, without a word."""
    assert install(checkout, "").returncode == 0
    with zipfile.ZipFile(next((checkout / "dist").glob("*.whl"))) as wheel:
        # Type checkers and editors read a plain path, and run no import hook (pyright#11777).
        hooks = [name for name in wheel.namelist() if name.endswith((".py", ".pth"))]
        assert [Path(name).suffix for name in hooks] == [".pth"]
        path = wheel.read(hooks[0]).decode().strip()
    assert Path(path).samefile(checkout)

    second = copy_checkout(tmp_path / "second")
    for folder, expected in ((second, second), (tmp_path, checkout)):
        result = python(folder, WHERE, path)
        assert result.returncode == 0, result.stderr
        package, kernels = result.stdout.replace(".py ", ".py\n").splitlines()
        assert Path(package).samefile(expected / "coded_resnext" / "__init__.py")
        assert Path(kernels).samefile(expected / "kernels" / "__init__.py")


def test_a_checkout_is_imported_where_it_lies(checkout: Path) -> None:
    """pykdtree#69, lead-lag#5, NIPET#18: in its own folder the package lacked a part of itself."""
    result = python(checkout, f"{WHERE}; coded_resnext.kernels.backends()")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(str(checkout)) == 2


def test_a_wheel_has_no_module_that_is_gone(checkout: Path) -> None:
    """setuptools packs what lies in `build/lib`, where an earlier build left its modules."""
    gone = [Path("coded_resnext", "files.py"), Path("kernels", "tile.py")]
    for is_gone in (False, True):
        if is_gone:
            for path in gone:
                (checkout / path).unlink()
        subprocess.run([sys.executable, "setup.py", "-q", "bdist_wheel"], cwd=checkout, check=True)
        with zipfile.ZipFile(next((checkout / "dist").glob("*.whl"))) as wheel:
            names = wheel.namelist()
        held = {"coded_resnext/files.py", "coded_resnext/kernels/tile.py"} & set(names)
        assert len(held) == (0 if is_gone else 2)
        assert "coded_resnext/kernels/coded/energy.py" in names
        assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
            "coded_resnext"
        }


def test_without_links_the_sentence_says_what_to_do(checkout: Path) -> None:
    """A checkout on Windows may hold a text file in the place of the link; a wheel is whole."""
    link = checkout / "coded_resnext" / "kernels"
    link.unlink()
    link.write_text("../kernels")
    result = python(checkout, "import coded_resnext")
    assert "ImportError: coded_resnext/kernels: expected a link to ../kernels" in result.stderr
    subprocess.run([sys.executable, "setup.py", "-q", "bdist_wheel"], cwd=checkout, check=True)
    with zipfile.ZipFile(next((checkout / "dist").glob("*.whl"))) as wheel:
        assert "coded_resnext/kernels/coded/energy.py" in wheel.namelist()


@pytest.mark.long
def test_type_checkers_see_the_package_and_its_kernels(tmp_path: Path) -> None:
    """pylance-release#3262, pyright#11777: behind an import hook, every name was Any."""
    (tmp_path / "user.py").write_text(
        "from coded_resnext import create_model\n"
        "from coded_resnext.kernels import coded_aggregate\n"
        "reveal_type(create_model('x'))\n"
        "reveal_type(coded_aggregate)\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "user.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert 'Revealed type is "coded_resnext.models.resnext.CodedResNeXt"' in result.stdout
    assert 'Revealed type is "def (h: torch._tensor.Tensor' in result.stdout, result.stdout
    assert result.returncode == 0, result.stdout


def test_the_package_kernels_of_others_is_found_outside_of_the_checkout(tmp_path: Path) -> None:
    """In the checkout Python looks there first; README.md says so."""
    (tmp_path / "site" / "kernels").mkdir(parents=True)
    (tmp_path / "site" / "kernels" / "__init__.py").write_text("def get_kernel(): ...\n")
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    code = "from kernels import get_kernel; import coded_resnext.kernels as k; print(k.__file__)"
    result = python(tmp_path, code, path)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).samefile(ROOT / "kernels" / "__init__.py")
    refused = python(ROOT, "from kernels import get_kernel", path)
    assert "installed as coded_resnext.kernels" in refused.stderr
    assert "Hugging Face's `kernels`" in (ROOT / "README.md").read_text(encoding="utf-8")
