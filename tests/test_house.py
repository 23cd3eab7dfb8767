"""Packages import one way, no folder holds too many files, and names say what they hold."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A package imports those above it. Packages of one row do not know each other.
ORDER = (
    ("kernels", "files"),
    ("codebooks", "data"),
    ("models",),
    ("training", "deploy"),
    ("interpret",),
    ("cli",),
    ("__main__",),
)
FLOOR = {name: floor for floor, names in enumerate(ORDER) for name in names}
MOST_FILES = 17
# Words that do not say what a name holds.
RETIRED = frozenset({"follow", "found", "looked_at", "place", "places", "unwritten"})


def modules(root: Path) -> dict[str, Path]:
    """The library's modules, named as they are imported once they are installed."""
    named = {}
    for folder, prefix in ((root / "coded_resnext", ()), (root / "kernels", ("coded_resnext",))):
        for path in folder.rglob("*.py"):
            parts = [*prefix, *path.relative_to(folder.parent).with_suffix("").parts]
            named[".".join(parts).removesuffix(".__init__")] = path
    return named


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Every module of the library that a module imports, inside functions and for types too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                source = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                if alias.name == "__version__":
                    continue
                submodule = f"{source}.{alias.name}"
                if submodule in known or source in known:
                    yield submodule if submodule in known else source


def room(module: str) -> str:
    """The package of a module, or the module itself where it stands at the top."""
    return module.split(".")[1] if "." in module else ""


def upward(root: Path) -> list[str]:
    """Imports that do not follow the order, as `importing -> imported`."""
    known = modules(root)
    return sorted(
        f"{name} -> {imported}"
        for name, path in known.items()
        for imported in imports(name, path, known)
        if room(name) != room(imported)
        and room(name) in FLOOR
        and FLOOR.get(room(imported), len(ORDER)) >= FLOOR[room(name)]
    )


def circle(root: Path) -> list[str]:
    """One circle of imports, or nothing. The `__init__` of a package does not count."""
    known = modules(root)
    graph = {
        name: {
            imported
            for imported in imports(name, path, known)
            if imported != name and known[imported].name != "__init__.py"
        }
        for name, path in known.items()
        if path.name != "__init__.py"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_packages_import_one_way() -> None:
    assert {room(name) for name in modules(ROOT)} - {""} <= FLOOR.keys()
    assert upward(ROOT) == []


def test_no_import_circle() -> None:
    assert circle(ROOT) == []


def test_no_folder_is_a_drawer() -> None:
    folders = {path.parent for path in ROOT.rglob("*.py") if not _is_foreign(path)}
    counts = {folder.relative_to(ROOT): len(list(folder.glob("*.py"))) for folder in folders}
    assert {str(folder): count for folder, count in counts.items() if count > MOST_FILES} == {}


def retired_names(root: Path) -> list[str]:
    """Identifiers outside the tests that are one of the retired names, as `file:line: name`."""
    paths = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _is_foreign(path, root) and path.relative_to(root).parts[0] != "tests"
    ]
    return [
        f"{path.relative_to(root)}:{line}: {name}"
        for path in paths
        for name, line in _identifiers(ast.parse(path.read_text(encoding="utf-8")))
        if name.strip("_") in RETIRED
    ]


def _identifiers(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every name that a module gives or uses, of variables, arguments, attributes and keywords."""
    for node in ast.walk(tree):
        for field in ("id", "arg", "attr", "name", "asname"):
            if isinstance(name := getattr(node, field, None), str):
                yield name, getattr(node, "lineno", 0)


def test_names_say_what_they_hold() -> None:
    assert retired_names(ROOT) == []


@pytest.mark.parametrize(
    "line",
    ["def f(places): ...", "self.looked_at = 1", "[found for found in ()]", "f(place=1)"],
)
def test_a_planted_name_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "planted.py").write_text(f"position = 1\n{line}\n", encoding="utf-8")
    planted = retired_names(tmp_path)
    assert planted
    assert all(each.startswith("kernels/planted.py:2: ") for each in planted)


def _is_foreign(path: Path, root: Path = ROOT) -> bool:
    """Whether a file belongs to an environment or a build."""
    return path.relative_to(root).parts[0] in (".venv", "build", "dist")


@pytest.mark.parametrize(
    ("where", "line", "found_by"),
    [
        ("kernels/layout.py", "from coded_resnext.models import block", upward),
        ("coded_resnext/data/loaders.py", "def f():\n    import coded_resnext.cli.main", upward),
        ("coded_resnext/deploy/cost.py", "from coded_resnext.training import step", upward),
        ("kernels/layout.py", "from .backend import select_backend", circle),
    ],
)
def test_a_planted_import_is_found(
    tmp_path: Path, where: str, line: str, found_by: Callable[[Path], list[str]]
) -> None:
    for path in modules(ROOT).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    before = found_by(tmp_path)
    with (tmp_path / where).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    assert found_by(tmp_path) != before
