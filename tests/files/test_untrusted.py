"""What strangers' files and neighbours on the machine could do, and do not: docs/security.md."""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import stat
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_networks import make_network
from support.tiny_training import make_model
from torture.files import _peak, _reset_peak

from coded_resnext import Codebook, files
from coded_resnext.cli import main
from coded_resnext.cli.codebook import draw
from coded_resnext.data.datasets import load_dataset
from coded_resnext.deploy.early_exit import EarlyExit
from coded_resnext.deploy.export import to_aot_package, to_onnx
from coded_resnext.deploy.hub import Pretrained, model_card
from coded_resnext.files import (
    load_tensors,
    make_folder,
    printable_lines,
    table_cell,
    write_atomically,
)
from coded_resnext.interpret import evaluate, save_evaluation
from coded_resnext.interpret.report import gather
from coded_resnext.interpret.report.page import read_log
from coded_resnext.kernels.prebuilt import INDEX, Prebuilt, find_prebuilt, read_index
from coded_resnext.models.checkpoint import load_model, read_tensors, save_model, write_tensors
from coded_resnext.training import run_folder
from coded_resnext.training.recipe import load_recipe
from coded_resnext.training.run_folder import RunFolder, load_state, save_state

ROOT = Path(__file__).parents[2]
MEGABYTES = 200 * 10**6
TITLE = "\x1b]0;PWN\x07"


class Growth:
    """Measures by how much the process's largest memory has grown, in bytes."""

    def __enter__(self) -> Growth:
        self.before = _reset_peak()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = _peak() - self.before
        self.seconds = time.perf_counter() - self.started


# X4: temporaries that others can foresee.


def test_a_link_at_a_temporary_name_is_not_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """turbovec#293, SDL#11887: even a guessed name is made anew or not at all."""
    precious = tmp_path / "bashrc"
    precious.write_text("precious")
    names = iter(["guessed", "other"])
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: next(names))
    out = tmp_path / "report.html"
    (tmp_path / ".report.html.guessed.tmp").symlink_to(precious)
    with pytest.raises(OSError, match="older files are intact"):
        write_atomically(out, b"page")
    write_atomically(out, b"page")
    assert precious.read_text() == "precious"
    assert not out.is_symlink()


def test_names_of_temporaries_differ_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, replace = list[str](), os.replace

    def noted(source: Path, *arguments: Any, **options: Any) -> None:
        names.append(source.name)
        replace(source, *arguments, **options)

    monkeypatch.setattr(os, "replace", noted)
    for _ in range(8):
        write_atomically(tmp_path / "file", b"")
    assert len(set(names)) == 8
    assert all(str(os.getpid()) != name.split(".")[-2] for name in names)


def evaluate_into(folder: Path) -> None:
    network = make_network()
    images = torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    evaluation = evaluate(network, None, [(images, torch.arange(12) % 4)], repeats=1)
    save_evaluation(evaluation, folder, csv=True, codebooks=network.codebooks)


def publish(folder: Path) -> None:
    arguments = [str(folder / "model.safetensors"), "--out", str(folder / "weights.safetensors")]
    save_model(folder / "model.safetensors", make_model())
    main.main(["convert", "--publish", *arguments])


@pytest.mark.parametrize(
    ("names", "write"),
    [
        (["figures/paths.png", "figures/paths.svg", "classes.csv"], evaluate_into),
        (["book.png"], lambda folder: draw(Codebook.shipped(10, 10, 3), folder / "book.png")),
        (["weights.safetensors"], publish),
        pytest.param(
            [".net.onnx.tmp"],
            lambda folder: to_onnx(make_network(), folder / "net.onnx"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_nothing_is_written_through_a_link_in_a_folder(
    tmp_path: Path, names: list[str], write: Callable[[Path], None]
) -> None:
    """turbovec#293: results and exports of a folder that was handed over, and what they make."""
    elsewhere = tmp_path / "authorized_keys"
    folder = tmp_path / "run"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(elsewhere)
    write(folder)
    assert not elsewhere.exists()


def test_a_folder_of_results_that_is_a_link_is_refused(tmp_path: Path) -> None:
    """SDL#11887: the figures of one folder replaced those of another."""
    (tmp_path / "else").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "figures").symlink_to(tmp_path / "else")
    with pytest.raises(ValueError, match="figures: expected a folder, got a link; remove it"):
        evaluate_into(tmp_path / "run")
    assert not any((tmp_path / "else").iterdir())


def test_a_compiled_package_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P6, turbovec#293: it was compiled into its final name, also where that was a link."""
    elsewhere, package = tmp_path / "precious", tmp_path / "net.pt2"
    package.symlink_to(elsewhere)

    def compile_into(_: object, *, package_path: str) -> None:
        Path(package_path).write_bytes(b"half")
        if fails:
            raise OSError("no space left on device")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_into)
    for fails in (True, False):
        with pytest.raises(RuntimeError, match="no space") if fails else nullcontext():
            to_aot_package(make_network(), package, image_size=6)
        assert not elsewhere.exists()
        assert package.is_symlink() == fails


def exchange(folder: Path, elsewhere: Path) -> None:
    """What a neighbour may do at any moment who can write in the folder above."""
    folder.rename(folder.with_name("mine"))
    folder.symlink_to(elsewhere)


descriptors = pytest.mark.skipif(
    os.open not in os.supports_dir_fd, reason="no descriptors of folders on this system"
)


@descriptors
@pytest.mark.parametrize("moment", ["before the file", "while it is written"])
def test_a_folder_that_is_exchanged_for_a_link_is_not_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """queens#277: filelock looked whether the name was a link, and then opened it."""
    elsewhere, figures = make_folder(tmp_path, "else"), make_folder(tmp_path / "run", "figures")
    if moment == "before the file":
        exchange(figures, elsewhere)
        with pytest.raises(OSError, match=r"older files are intact.*paths\.png"):
            write_atomically(figures / "paths.png", b"")
    else:
        name = files.secrets.token_hex
        monkeypatch.setattr(
            files.secrets, "token_hex", lambda n: (exchange(figures, elsewhere), name(n))[1]
        )
        write_atomically(figures / "paths.png", b"")
        assert (tmp_path / "run" / "mine" / "paths.png").exists()
    assert not any(elsewhere.iterdir())


@descriptors
def test_checkpoints_of_a_folder_that_is_exchanged_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """X1's window: the folder is a link by the time that older checkpoints are removed."""
    elsewhere = make_folder(tmp_path, "else")
    for index in range(4):
        (elsewhere / f"step-{index}.pt").touch()
    checkpoints = make_folder(tmp_path / "run", "checkpoints")

    def write(path: Path, content: bytes) -> None:
        write_atomically(path, content)
        if path.suffix == ".pt":
            exchange(checkpoints, elsewhere)

    monkeypatch.setattr(run_folder, "write_atomically", write)
    with pytest.raises(OSError, match="checkpoints"):
        save_state(tmp_path / "run", "step-9", {})
    assert len(list(elsewhere.iterdir())) == 4


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_file_that_is_its_owners_alone_stays_so(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o600)
    write_atomically(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# X1, X2: what is written stays in the run's folder.


@pytest.mark.parametrize("part", ["checkpoints", ".lock", "tensorboard", "metrics.csv"])
def test_a_run_whose_parts_are_links_is_refused(tmp_path: Path, part: str) -> None:
    """queens#277: a link in a folder that is handed on decides what is written, or emptied."""
    elsewhere = tmp_path / "docs"
    elsewhere.mkdir()
    (elsewhere / "thesis").write_text("thesis")
    run = tmp_path / "run"
    run.mkdir()
    (run / part).symlink_to(elsewhere / "thesis" if "." in part else elsewhere)
    with pytest.raises(ValueError, match=rf"expected files and folders of its own.*{part}"):
        RunFolder(run, {}, resume=True)
    assert (elsewhere / "thesis").read_text() == "thesis"


# X7: memory and time from small files.


def test_a_checkpoint_of_doubled_tuples_is_refused_at_once(tmp_path: Path) -> None:
    value: tuple[Any, ...] = (1,)
    for _ in range(60):
        value = (value, value)
    path = save_state(tmp_path, "step-1", {})
    content = io.BytesIO()
    torch.save({"state_version": value}, content)
    saved, torch_save = content.getvalue(), torch.save
    path.unlink()
    torch.save = lambda _, file: file.write(saved)
    try:
        save_state(tmp_path, "step-1", {})
    finally:
        torch.save = torch_save
    with pytest.raises(ValueError, match="state_version: expected 1, got"):
        load_state(tmp_path)


def test_a_checkpoint_that_lacks_a_part_is_refused_with_a_sentence(tmp_path: Path) -> None:
    from support.tiny_training import make_config, train

    config = make_config(epochs=1, warmup_epochs=0)
    train(tmp_path, config)
    state = load_state(tmp_path)
    assert state is not None
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    save_state(tmp_path, "step-1", {k: v for k, v in state.items() if k != "optimizer"})
    with pytest.raises(ValueError, match="its last checkpoint lacks a part"):
        train(tmp_path, config, resume=True)


def test_tensors_larger_than_their_file_are_refused() -> None:
    content = io.BytesIO()
    torch.save({"weight": torch.zeros(1).expand(32, 1, 3, 10**10)}, content)
    with pytest.raises(ValueError, match="bytes in a file of"):
        load_tensors(content)


def test_a_wide_log_is_refused(tmp_path: Path) -> None:
    """60,000 columns and rows of one cell: a cell for every pair took 6 GB."""
    (tmp_path / "metrics.csv").write_text(
        ",".join(f"c{i}" for i in range(60_000)) + "\n" + "1\n" * 60_000
    )
    with Growth() as growth, pytest.raises(ValueError, match="no epoch is finished"):
        read_log(tmp_path / "metrics.csv")
    assert growth.bytes < MEGABYTES


@pytest.mark.parametrize(
    "text", ["[" + "[]," * 3 * 10**6 + "[]]", "[" * 10**5, "[" * 400 + "]" * 400]
)
def test_json_is_limited_by_its_values_and_depth(tmp_path: Path, text: str) -> None:
    (tmp_path / "codebook.json").write_text(text)
    with Growth() as growth, pytest.raises(ValueError, match=r"codebook\.json: not a codebook"):
        Codebook.load(tmp_path / "codebook.json")
    assert growth.bytes < MEGABYTES


def save_archive(path: Path, **arrays: Any) -> None:
    """A set of four images, but for what is given."""
    sound: dict[str, Any] = {"classes": np.array(["a", "b"])}
    for split in ("train", "test"):
        sound[f"x_{split}"] = np.zeros((4, 32, 32, 3), np.uint8)
        sound[f"y_{split}"] = np.arange(4) % 2
    np.savez_compressed(path, **{**sound, **arrays})


def test_an_archive_that_grows_beyond_its_data_set_is_refused(tmp_path: Path) -> None:
    save_archive(tmp_path / "cifar10.npz", x_train=np.zeros((10**5, 32, 32, 3), np.uint8))
    assert (tmp_path / "cifar10.npz").stat().st_size < 2 * 10**6
    with Growth() as growth, pytest.raises(ValueError, match="arrays of more than 190 MiB"):
        load_dataset("cifar10", tmp_path)
    assert growth.bytes < MEGABYTES


@pytest.mark.parametrize("shape", [(10**12,), (2**62, 2**62)])
def test_an_archive_that_promises_terabytes_is_refused(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    save_archive(tmp_path / "sound.npz")
    header = str({"descr": "<i8", "fortran_order": False, "shape": shape})
    array = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header.encode() + b"\n"
    with (
        zipfile.ZipFile(tmp_path / "sound.npz") as sound,
        zipfile.ZipFile(tmp_path / "cifar10.npz", "w") as archive,
    ):
        for name in sound.namelist():
            archive.writestr(name, array if name == "y_train.npy" else sound.read(name))
    with pytest.raises(ValueError, match=r"cifar10\.npz: damaged, or not an archive of images"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("mark", [",", " ", ";", "x,"])
def test_a_long_line_of_a_codebook_takes_time_by_its_length(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "codebook.txt"
    path.write_text("a" + mark * 100_000 + "a\n")
    with Growth() as growth, pytest.raises(ValueError, match=r"codebook\.txt: not a codebook"):
        Codebook.load(path)
    # It was 5 s for a sixth of this.
    assert growth.seconds < 5


def test_a_codebook_with_an_endless_name_prints() -> None:
    words = [f"{index:012b}" for index in range(2**12) if index.bit_count() == 6]
    book = Codebook.from_words(words, ["x" * 3 * 10**6, *map(str, range(1, len(words)))])
    with Growth() as growth:
        text = str(book)
    assert len(text) < 10**6
    assert growth.bytes < MEGABYTES


def test_a_network_of_many_blocks_and_few_tensors_is_refused_before_it_is_made(
    tmp_path: Path,
) -> None:
    from coded_resnext.models.checkpoint import save_model

    path = tmp_path / "model.safetensors"
    save_model(path, make_network())
    description, _ = read_tensors(path)
    stage = description["config"]["stages"][0]
    description["config"]["stages"][0] = {**stage, "depth": 4000}
    write_tensors(path, {f"t{i}": torch.zeros(0) for i in range(4000)}, description)
    with Growth() as growth, pytest.raises(ValueError, match="blocks, and tensors for"):
        load_model(path)
    assert growth.seconds < 10


def test_a_recipe_that_uses_its_lists_again_and_again_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    (tmp_path / "recipe.yaml").write_text("\n".join([*lines, "lr: *a59"]))
    with pytest.raises(ValueError, match=r"recipe\.yaml: .*got an alias"):
        load_recipe(tmp_path / "recipe.yaml")


# X8, X9: text of others on terminal, card and table.


def test_the_library_prints_through_one_function() -> None:
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("coded_resnext", "train")
        for path in (ROOT / folder).rglob("*.py")
        if path != ROOT / "coded_resnext" / "files.py" and "kernels" not in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert calls == []
    assert printable_lines(f"a\n{TITLE}\u202e") == "a\n\\x1b]0;PWN\\x07\\u202e"


def test_reasons_and_paths_reach_the_terminal_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / f"r{TITLE.replace('/', '')}"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "metrics.csv").write_text(f"{TITLE}\n1{TITLE}\n")
    assert main.main(["report", str(folder)]) == 0
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / f"x{TITLE}.pt").write_text("x")
    with pytest.raises(ValueError, match="no checkpoint is readable"):
        load_state(folder)
    said = capsys.readouterr()
    assert "wrote" in said.out
    assert "damaged checkpoint" in said.err
    assert "\x1b" not in said.out + said.err
    assert "\x07" not in said.out + said.err


@pytest.mark.parametrize("example", ["onnx_classify.py", "onnx_early_exit.py"])
def test_examples_print_names_as_text(example: str) -> None:
    tree = ast.parse((ROOT / "examples" / example).read_text(encoding="utf-8"))
    [function] = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    scope: dict[str, Any] = {}
    exec(ast.unparse(function), scope)  # noqa: S102 - a file of this repository
    assert scope["shown"](f"é{TITLE}") == "é\\x1b]0;PWN\\x07"


def test_a_card_holds_no_markup_of_others() -> None:
    odd = "n\n\n<script>x</script> [x](javascript:1) ![t](https://evil/t.png) # y www.evil.org"
    notes = {odd: odd, "a|b": [odd]}
    card = model_card(
        Pretrained(
            make_network(), training=notes, results=notes, name=odd, license="mit\n## Results"
        )
    )
    body = card.split("---\n", 2)[2]
    assert "<script" not in body.replace("\\<script", "")
    assert "https://evil" not in body
    assert "](javascript" not in body.replace("\\](javascript", "")
    assert [line for line in body.splitlines() if line.startswith("## ")] == [
        "## Use",
        "## Training",
        "## Results",
        "## What it should not be used for",
    ]


def test_a_table_holds_no_formula_of_others() -> None:
    """tableExport#230: a spreadsheet computed a cell that began with `=`."""
    row = [table_cell(value) for value in ("=1+1", "@x", "-x", "+x", "cat", -1.5, None)]
    assert row == ["'=1+1", "'@x", "'-x", "'+x", "cat", -1.5, None]
    buffer = io.StringIO()
    csv.writer(buffer).writerow([table_cell(TITLE)])
    assert "\x1b" not in buffer.getvalue()


# X10: a sentence, whatever a value is.


@pytest.mark.parametrize(
    "changes",
    [{"margins": [int("9" * 400)]}, {"calibration": 5}, {"calibration": [1]}, {"margins": [{}]}],
)
def test_odd_values_of_early_exit_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "early_exit.json"
    path.write_text(json.dumps({"format_version": 1, "margins": [0.5], **changes}))
    with pytest.raises(ValueError, match=r"early_exit\.json: not an early-exit file"):
        EarlyExit.load(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("summary.json", '{"seconds": "x"}'),
        ("summary.json", '{"seconds": 1' + "0" * 400 + "}"),
        ("config.json", '{"a":' * 400 + "1" + "}" * 400),
        ("metrics.csv", "a\n" + "1" * 200_000),
        ("metrics.csv", "a\n" + '"' + "1" * 200_000),
        ("evaluation.json", '{"format_version": 3, "test_samples": 1' + "0" * 400 + "}"),
        ("early_exit_test.json", '{"early_accuracy": [], "macs_saved": 1}'),
    ],
)
def test_a_report_names_the_file_that_is_odd_and_shows_the_rest(
    tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(text)
    missing = [entry["why"] for entry in gather(tmp_path)["missing"]]
    assert any(why.startswith(f"{name} cannot be read: ") for why in missing)
    assert main.main(["report", str(tmp_path)]) == 0


# Caches of compiled kernels.


def write_index(folder: Path, **changes: Any) -> Path:
    """An index of one kernel with one file."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": 1, "arch": "sm90", "toolchain": {}, "kernels": {}, "rows": {}}
    (folder / INDEX).write_text(json.dumps({**content, **changes}))
    return folder / INDEX


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("mode", [0o777, 0o757])
def test_kernels_in_a_folder_that_others_may_write_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    write_index(tmp_path / "sm90")
    monkeypatch.setenv("CODED_RESNEXT_KERNELS", str(tmp_path))
    tmp_path.chmod(0o755)
    assert len(find_prebuilt()[0]) == 1
    (tmp_path / "sm90").chmod(mode)
    sources, faults = find_prebuilt()
    assert sources == []
    assert "others than this user may write to it" in faults[0]


@pytest.mark.parametrize("name", ["../x", "/dev/zero", "", "..", "a\0b"])
def test_names_of_kernels_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    kernels = Prebuilt(tmp_path, "sm90", {}, {"key": {name: "0"}, name: {"file": "0"}}, {})
    assert kernels.files("key") is None
    assert kernels.files(name) is None


@pytest.mark.parametrize("text", ["[" * 10**5, '{"format": 1, "kernels": []}', "[]", "1"])
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match="not an index of prebuilt kernels"):
        read_index(tmp_path / INDEX)
