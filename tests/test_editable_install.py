"""A checkout is one package, as it lies and installed; an editable install compiles kernels."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
from support.helpers import needs_triton

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
    checkout: Path, archs: str, *options: str, python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the step of an editable install that makes its wheel."""
    return subprocess.run(
        [python, *options, "setup.py", "-q", "editable_wheel", "--dist-dir", "dist"],
        cwd=checkout,
        env={**os.environ, "CODED_RESNEXT_BUILD_ARCHS": archs, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def setuptools_alone(folder: Path) -> Path:
    """Makes a folder with setuptools and nothing else, as pip's build environment has it."""
    folder.mkdir(parents=True)
    installed = Path(setuptools.__file__).parent.parent
    for pattern in ("setuptools*", "_distutils_hack", "pkg_resources"):
        for path in installed.glob(pattern):
            (folder / path.name).symlink_to(path)
    return folder


def environment_with(folder: Path, *packages: str, at_start: str = "") -> str:
    """Makes an environment that has the packages of folders; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    [site] = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text("\n".join(packages))
    (site / "sitecustomize.py").write_text(at_start)
    return str(folder / "bin" / "python")


@pytest.fixture
def asking(checkout: Path) -> Path:
    """Returns a checkout whose builder says what it is asked for; compiling takes a minute."""
    command = checkout / "coded_resnext" / "cli" / "build_kernels.py"
    command.write_text(
        command.read_text().replace(
            "    archs = arguments.arch",
            "    print('asked for', arguments.arch)\n"
            "    print('kernels of', build.__code__.co_filename)\n"
            "    return int(arguments.arch == ['99'])\n    archs = arguments.arch",
            1,
        )
    )
    return checkout


def test_an_install_without_torch_or_a_gpu_says_so(asking: Path, tmp_path: Path) -> None:
    without = environment_with(tmp_path / "bare", str(setuptools_alone(tmp_path / "packages")))
    for archs in ("", "90"):
        result = install(asking, archs, python=without)
        assert result.returncode == 0, result.stderr
        assert "no kernels were compiled, since numpy is not installed yet" in result.stderr
        assert list((asking / "dist").glob("*.whl"))
    result = install(asking, "", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    assert "no kernels were compiled, since there is no GPU here for them" in result.stderr
    assert "`coded-resnext build-kernels` compiles them" in result.stderr


FAKE_GPU = """
import torch
torch.cuda.device_count = lambda: 2
torch.cuda.get_device_capability = lambda index: [(7, 5), {seen}][index]
"""


@pytest.mark.long
@pytest.mark.parametrize("isolated", [False, True])
def test_an_install_compiles_for_the_gpus_that_it_sees(
    asking: Path, tmp_path: Path, isolated: bool
) -> None:
    """By the environment's own packages, which pip hides behind a PYTHONPATH of its own."""
    own = [path for path in sys.path if path.endswith("site-packages")]
    hides = {"PYTHONPATH": str(setuptools_alone(tmp_path / "packages"))} if isolated else {}
    options = ["-S"] * isolated
    for seen, outcome in (("9, 0", "kernels compiled for sm_90 in"), ("9, 9", "were not compiled")):
        start = FAKE_GPU.format(seen=f"({seen})")
        gpu = environment_with(tmp_path / seen, *own, at_start=start)
        result = install(asking, "", *options, python=gpu, **hides)
        assert result.returncode == 0, result.stderr
        assert outcome in result.stderr
        assert f"asked for ['{seen[0]}{seen[-1]}']" in result.stdout
        assert f"kernels of {asking / 'coded_resnext'}" in result.stdout


@pytest.mark.long
def test_an_install_compiles_what_it_is_asked_for(asking: Path) -> None:
    result = install(asking, "90, 100")
    assert result.returncode == 0, result.stderr
    assert "asked for ['90', '100']" in result.stdout
    assert "kernels compiled for sm_90, sm_100 in" in result.stderr
    # Asked for, a failure is one.
    assert install(asking, "99").returncode != 0


@pytest.mark.long
@needs_triton
@pytest.mark.parametrize("builder", ["pip", "warm_up"])
def test_a_first_step_finds_what_was_built(builder: str, checkout: Path, tmp_path: Path) -> None:
    """It compiles nothing, whether an earlier pip or `warm_up` has built, on all cores.

    The builder's stub stands in the place of a GPU, and only the kernels of one layer are built.
    """
    rows = checkout / "kernels" / "build" / "build.py"
    text = rows.read_text()
    text = text.replace('("bf16", "fp16", "fp32")', '("fp32",)').replace("drop=True", "drop=False")
    of_a_layer = 'PAPER_SIZES = {"": CodedSizes(10, 4, 32, 16)}'
    text = text.replace("\nROW_MAKERS", f"\n{of_a_layer}\nROW_MAKERS")
    rows.write_text("\n".join(line for line in text.split("\n") if "    yield from " not in line))
    own = [path for path in sys.path if path.endswith("site-packages")]
    gpu = environment_with(tmp_path / "gpu", *own, at_start=FAKE_GPU.format(seen="(9, 0)"))
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    clean |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def run(*command: str, **environment: str) -> tuple[str, str]:
        result = subprocess.run(
            [gpu, *command],
            cwd=tmp_path,
            env={**clean, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout, result.stderr

    step = [str(ROOT / "tests" / "kernels" / "build" / "warm_up_a_layer.py")]
    if builder == "pip":
        options = ("--no-build-isolation", "--no-deps", "--no-index", "-v")
        output = "".join(run("-m", "pip", "install", *options, "-e", str(checkout)))
        assert re.search(r"kernels compiled for sm_90 in \d+ s with \d+ processes", output), output
    else:
        step.append("--build")
    places = {"PYTHONPATH": str(checkout), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    for is_new in (builder == "warm_up", False):
        output, said = run(*step, **places)
        *progress, line = output.splitlines()
        report = json.loads(line)
        assert (report["cache_hits"], report["compiled"]) == (4, 0)
        assert report["launches"][:2] == ["aggregate_forward", "coding_loss"]
        assert ("compiling the kernels for sm90, once, into" in said) == is_new
        assert any(re.match(r"\[\d+/\d+\] compile ", each) for each in progress) == is_new
        assert "no kernels were built" not in said
    assert not (tmp_path / "triton").exists()


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


@pytest.mark.long
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
    """In the checkout Python looks there first; docs/questions.md says so."""
    (tmp_path / "site" / "kernels").mkdir(parents=True)
    (tmp_path / "site" / "kernels" / "__init__.py").write_text("def get_kernel(): ...\n")
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    code = "from kernels import get_kernel; import coded_resnext.kernels as k; print(k.__file__)"
    result = python(tmp_path, code, path)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).samefile(ROOT / "kernels" / "__init__.py")
    refused = python(ROOT, "from kernels import get_kernel", path)
    assert "installed as coded_resnext.kernels" in refused.stderr
    questions = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
    assert "Hugging Face's `kernels`" in questions
