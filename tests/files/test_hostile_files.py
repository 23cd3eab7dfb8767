"""Files of strangers: nothing in them runs, writes, or takes more memory than they have bytes."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest
import torch
from support.malicious_files import ATTACKS, MARK, Attack
from support.small_networks import make_network
from torture.files import make_kinds, tamper_with

from coded_resnext import Codebook
from coded_resnext.cli import main
from coded_resnext.deploy.early_exit import EarlyExit
from coded_resnext.deploy.extract import extract_all, file_name, load_extracted
from coded_resnext.deploy.hub import Pretrained, from_pretrained, save_pretrained
from coded_resnext.files import LARGEST_TEXT
from coded_resnext.interpret.report import gather
from coded_resnext.training.recipe import LARGEST_YAML, load_recipe

ROOT = Path(__file__).parents[2]


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_a_malicious_checkpoint_is_refused_and_not_executed(
    attack: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a file would leave its mark, it is below the folder it is read in."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    with pytest.raises(ValueError, match="file") as caught:
        attack.read(inner)
    assert str(inner) in str(caught.value)
    if attack.suffix == ".pth":
        with pytest.raises(ValueError, match="no checkpoint is readable"):
            attack.resume(inner)
    assert not [name for name in everything(tmp_path) if MARK in name]


@pytest.mark.parametrize("index", range(5))
def test_tampered_files_load_exactly_or_are_refused_short(index: int, tmp_path: Path) -> None:
    """The long version is `make torture`."""
    kind = make_kinds(tmp_path)[index]
    found = tamper_with(kind, files=60, seed=index)
    assert found.tried == 60
    assert found.crashed == 0
    assert found.wrong == []
    assert found.loaded + found.refused == 60


def test_a_sum_that_is_not_compared_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tampering itself: without the comparison some files load and are not what was saved."""
    kind = make_kinds(tmp_path)[0]
    stated = json.loads((tmp_path / "shared" / "config.json").read_text())["sha256"]
    monkeypatch.setattr("coded_resnext.deploy.hub.file_sha256", lambda path: stated[path.name])
    assert tamper_with(kind, files=200, seed=0).wrong


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}


def faults(source: str) -> list[str]:
    """Uses in a file of what could run code of other files."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
            found += [name for name in names if name in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").partition(".")[0]
            found += [module] if module in FORBIDDEN_MODULES else []
        elif isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
            last = called.rpartition(".")[2]
            if called in FORBIDDEN_CALLS:
                found.append(called)
            if called.endswith("torch.load") or called == "torch.load":
                safe = given.get("weights_only")
                if not (isinstance(safe, ast.Constant) and safe.value is True):
                    found.append(called)
            if called.startswith("yaml.") and last in (
                "load",
                "load_all",
                "unsafe_load",
                "full_load",
            ):
                found.append(called)
            pickled = given.get("allow_pickle")
            if pickled is not None and not (
                isinstance(pickled, ast.Constant) and pickled.value is False
            ):
                found.append("allow_pickle")
            shell = given.get("shell")
            if called == "os.system" or (isinstance(shell, ast.Constant) and shell.value):
                found.append("a shell")
    return found


def test_no_source_runs_what_it_reads() -> None:
    folders = ("coded_resnext", "kernels", "train", "benchmarks", "examples")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 100
    assert {str(p): f for p in sources if (f := faults(p.read_text(encoding="utf-8")))} == {}
    assert faults("import pickle; from dill import loads; eval('1'); yaml.load(x)") == [
        "pickle",
        "dill",
        "eval",
        "yaml.load",
    ]
    assert faults("torch.load(f); torch.load(f, weights_only=False)") == ["torch.load"] * 2
    assert faults("np.load(f, allow_pickle=True); run(x, shell=True)") == [
        "allow_pickle",
        "a shell",
    ]


READERS = ("csv.reader", "csv.DictReader", "json.load", "torch.load", "np.load")


def test_json_csv_arrays_and_tensors_have_one_reader() -> None:
    """Two scripts read a run's log and summary without its limits."""
    others = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("coded_resnext", "train")
        for path in (ROOT / folder).rglob("*.py")
        if path != ROOT / "coded_resnext" / "files.py" and "kernels" not in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and (
            ast.unparse(node.func) in READERS
            or (ast.unparse(node.func) == "json.loads" and "read_" in ast.unparse(node))
        )
    ]
    assert others == []


@pytest.mark.parametrize(
    ("name", "read", "size"),
    [
        ("codebook.json", Codebook.load, LARGEST_TEXT),
        ("early_exit.json", EarlyExit.load, LARGEST_TEXT),
        ("recipe.yaml", load_recipe, LARGEST_YAML),
    ],
)
def test_text_that_is_too_large_is_refused(name: str, read, size: int, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b'["' + b"1" * size)
    limit = "16 MiB" if size == LARGEST_TEXT else "256 KiB"
    with pytest.raises(ValueError, match=rf"{name}: .*at most {limit}, the file is larger"):
        read(tmp_path / name)


def test_descriptions_that_are_too_large_are_refused(tmp_path: Path) -> None:
    folder = save_pretrained(Pretrained(make_network()), tmp_path)
    (folder / "config.json").write_bytes(b" " * (LARGEST_TEXT + 1))
    with pytest.raises(ValueError, match=r"config\.json: .* at most 16 MiB"):
        from_pretrained(folder)
    # A report says so of the file and shows the rest.
    missing = {entry["part"]: entry["why"] for entry in gather(folder)["missing"]}
    assert "at most 16 MiB" in missing["Configuration"]


@pytest.mark.parametrize(
    "text",
    [
        "lr: !!python/object/apply:os.mkdir [made-by-a-file]",
        "lr: !!timestamp x",
        "lr: !!int ''",
    ],
)
def test_odd_yaml_is_refused_and_nothing_of_it_runs(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"recipe\.yaml: not a readable YAML file"):
        load_recipe(tmp_path / "recipe.yaml")
    assert everything(tmp_path) == {"recipe.yaml"}


ODD_NAMES = (
    "../../made-by-a-file",
    "/tmp/made-by-a-file",  # noqa: S108
    "<script>alert('\"')</script>\nsecond line\r\x1b[2J",
    "\u202eright to left\u200f" + "a" * 300,
)


def odd_model():
    small = make_network()
    return type(small).from_config(
        small.config,
        [book.with_class_names(ODD_NAMES) for book in small.stage_codebooks],
        class_names=ODD_NAMES,
    )


def test_a_strangers_network_writes_only_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Class names are paths, markup, control characters: files keep to the folder they go to."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    stranger = Pretrained(odd_model(), name="../../made-by-a-file", license="mit\nx: y")
    save_pretrained(stranger, inner / "in")
    outside = everything(tmp_path)
    found = from_pretrained(inner / "in")
    assert found.model.class_names == ODD_NAMES
    save_pretrained(found, inner / "out")
    index = extract_all(found.model, inner / "out" / "classes")
    for command in (
        ["info", "in", "--image-size", "6"],
        ["report", "in", "--out", "out/report.html"],
        ["extract", "in", ODD_NAMES[2], "--out", "out/one.safetensors"],
    ):
        main.main(command)
    made = everything(tmp_path) - outside
    assert made
    assert all(name.startswith("a/b/out") for name in made), made
    rows = json.loads(index.read_text())["classifiers"]
    assert [row["class_name"] for row in rows] == list(ODD_NAMES)
    for row in rows:
        path = index.parent / row["file"]
        assert path.resolve().parent == index.parent
        assert load_extracted(path).network.class_names == (row["class_name"],)
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "\u202e" not in said.out + said.err
    assert "\\x1b[2J" in said.out
    assert "wrote out/report.html" in said.out


def test_names_of_files_hold_nothing_of_a_path() -> None:
    for index, name in enumerate((*ODD_NAMES, "..", "con", "\0", "\udcff")):
        made = file_name(index, name)
        assert made == os.path.basename(made)
        assert set(made) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")
        assert len(made) < 80


def test_predictions_of_odd_files_and_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from coded_resnext.data.preprocessing import Preprocessing
    from coded_resnext.models.checkpoint import save_model

    save_model(
        tmp_path / "m.safetensors", odd_model(), preprocessing=Preprocessing(6, 1, (0.5,), (1.0,))
    )
    names = [
        "a\nb.png",
        "\u202egnp.png",
        "'\"<i>.png",
        os.fsdecode(b"\xff.png"),
        "n" * 250 + ".png",
    ]
    for index, name in enumerate(names):
        Image.new("L", (6, 6), 40 * index).save(tmp_path / name)
    paths = [str(tmp_path / name) for name in names]
    assert main.main(["predict", str(tmp_path / "m.safetensors"), *paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(names)
    assert all(line.isprintable() for line in lines)
    assert "a\\nb.png" in lines[0]
    assert main.main(["predict", str(tmp_path / "m.safetensors"), *paths, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["file"] for row in rows] == paths
    # An error names the file, on one line.
    (tmp_path / "bad\n.png").write_bytes(b"no image")
    assert main.main(["predict", str(tmp_path / "m.safetensors"), str(tmp_path / "bad\n.png")]) == 2
    assert "not a readable image" in capsys.readouterr().err


def test_memory_of_a_compressed_archive_is_not_taken(tmp_path: Path) -> None:
    """A mutation would be to leave out the look into the archive: this many bytes then appear."""
    from torture.files import _peak, _reset_peak

    attack = next(a for a in ATTACKS if "256 MiB" in a.name)
    content = attack.content()
    assert len(content) < 2**20
    torch.zeros(1)
    before = _reset_peak()
    with pytest.raises(ValueError, match="an archive that is compressed"):
        Attack(attack.name, attack.suffix, lambda: content).read(tmp_path)
    assert _peak() - before < 32 * 2**20
