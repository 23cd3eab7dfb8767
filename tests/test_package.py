"""The installed package: what importing it needs, and what a wrong import says."""

from __future__ import annotations

import ast
import pickle
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

import coded_resnext

ROOT = Path(__file__).parent.parent


def python(code: str, **options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, **options
    )


def test_kernels_are_a_part_of_the_package() -> None:
    from coded_resnext import kernels

    assert kernels.__name__ == "coded_resnext.kernels"


def test_stray_import_says_what_to_import() -> None:
    result = python("import kernels", cwd=str(ROOT))
    assert result.returncode != 0
    assert "import that instead" in result.stderr
    assert "coded_resnext.kernels" in result.stderr


EXTRAS = ("sklearn", "matplotlib", "tqdm", "tensorboard", "PIL", "onnx onnxruntime timm yaml")


@pytest.mark.parametrize(
    "missing",
    [" ".join(EXTRAS), *(pytest.param(one, marks=pytest.mark.long) for one in ("triton", *EXTRAS))],
)
def test_import_and_prediction_need_no_extra(missing: str) -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing.split()!r}))\n"
        "import torch, coded_resnext, coded_resnext.interpret\n"
        "model = coded_resnext.create_model('coded_resnext_digits').eval()\n"
        "print(tuple(model(torch.zeros(1, 1, 8, 8)).shape))"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(1, 10)"


def test_exports_are_sorted_and_exist() -> None:
    from coded_resnext import interpret, kernels

    for module in (coded_resnext, interpret, kernels):
        assert list(module.__all__) == sorted(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)


def test_names_are_imported_when_used_from_where_type_checkers_see_them() -> None:
    tree = ast.parse(Path(coded_resnext.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert seen == coded_resnext._MODULES
    assert sorted(seen) == coded_resnext.__all__
    assert set(seen) <= set(dir(coded_resnext))
    with pytest.raises(AttributeError, match="'coded_resnext' has no attribute 'train_everything'"):
        _ = coded_resnext.train_everything


def test_what_is_exported_can_be_pickled_by_name() -> None:
    for name in coded_resnext.__all__:
        exported = getattr(coded_resnext, name)
        assert pickle.loads(pickle.dumps(exported)) is exported  # noqa: S301


@pytest.mark.long
def test_no_submodule_hides_what_a_package_exports() -> None:
    """Python binds a submodule to its package when it is first imported, which may be late."""
    code = (
        "import importlib, pkgutil, types, coded_resnext.interpret, coded_resnext.kernels\n"
        "for name in ('coded_resnext', 'coded_resnext.interpret', 'coded_resnext.kernels'):\n"
        "    package = sys.modules[name]\n"
        "    for module in pkgutil.iter_modules(package.__path__):\n"
        "        if not module.name.startswith('_'):\n"
        "            importlib.import_module(f'{name}.{module.name}')\n"
        "    exported = {e: getattr(package, e) for e in package.__all__}\n"
        "    print(*(e for e, it in exported.items() if isinstance(it, types.ModuleType)))"
    )
    result = python(f"import sys\n{code}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_shipped_data_is_installed() -> None:
    result = python(
        "import coded_resnext as c; print(c.Codebook.shipped(1000, 32, 8).min_distance)", cwd="/"
    )
    assert result.stdout.strip() == "8", result.stderr


def test_the_package_says_its_version() -> None:
    from importlib.metadata import version

    assert coded_resnext.__version__ == version("coded-resnext")
    for arguments, start in ((["--version"], "coded-resnext 0."), (["-h"], "usage: coded-resnext")):
        command = [sys.executable, "-m", "coded_resnext", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stdout.startswith(start)


def test_recipes_are_reached_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who installs a wheel had an extra `train` and nothing to train with."""
    from coded_resnext.cli.main import main

    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    assert "one of cifar10, cifar100, " in " ".join(capsys.readouterr().out.split())
    arguments = ["train", "--data-dir", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    assert main([*arguments, "--no-evaluation"]) == 2
    assert "coded-resnext train: " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["info", "run", "--epochs", "3"])


@pytest.mark.long
def test_a_source_distribution_has_its_tests(tmp_path: Path) -> None:
    """Without helpers and conftest.py its collection ended with 42 errors."""
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
        [description] = [name for name in file.getnames() if re.fullmatch("[^/]+/PKG-INFO", name)]
        text = file.extractfile(description).read().decode()  # type: ignore[union-attr]
    wanted = ("tests", "docs", "train", "examples", "coded_resnext/training/recipes")
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in wanted
        for path in (ROOT / folder).rglob("*.*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert files <= names
    assert {"Makefile", "CHANGELOG.md", "CITATION.cff", "coded_resnext/kernels/backend.py"} <= names
    # A package index has no checkout that a relative link could lead into.
    assert not re.search(r"\]\((?!https?:)", text)


def test_workflows_and_images_name_what_exists() -> None:
    """A target or an extra that was renamed was noticed by the first push, or by a user."""
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    runs = [
        step["run"]
        for path in workflows
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
        for step in job["steps"]
        if "run" in step
    ]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    made = re.findall(r"\bmake ([\w./ -]+)", "\n".join(runs))
    assert {"lint", "type", "test", "docs"} <= set(made)
    for target in " ".join(made).split():
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target
    assert {"make lint", "make type", "make test-all"} <= set(
        (ROOT / ".ci/run").read_text().splitlines()
    )
    texts = [*runs, *((ROOT / name).read_text() for name in ("Dockerfile", "environment.yml"))]
    for path in re.findall(r"(?:bash|python|cp) ([\w./-]+/[\w./-]+)", "\n".join(runs)):
        assert (ROOT / path.removeprefix("checkout/")).exists(), path
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for extras in re.findall(r"(?:source|-e \.)\[([\w,]+)\]", "\n".join(texts)):
        assert all(f'"{extra}": ' in setup for extra in extras.split(",")), extras


def test_the_dockerfile_has_no_fault_that_hadolint_knows() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("no hadolint for this machine")
    command = [str(hadolint), str(ROOT / "Dockerfile")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("github-workflows", ".github/workflows/*.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
        ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("dependabot", ".github/dependabot.yml"),
        ("citation-file-format", "CITATION.cff"),
    ],
)
def test_what_github_reads_fits_its_schema(schema: str, pattern: str, tmp_path: Path) -> None:
    """A form with a fault is not shown to anybody, and nothing says so."""
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    files = sorted(ROOT.glob(pattern))
    assert files
    result = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    planted = tmp_path / "planted.yml"
    planted.write_text("[a, list]\n")
    assert subprocess.run([*command, planted], capture_output=True, check=False).returncode == 1
