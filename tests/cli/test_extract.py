"""`coded-resnext extract`: files, thresholds, what is printed, and what is refused."""

from __future__ import annotations

import json

from support.helpers import assert_same_network
from support.small_networks import NARROW, WIDE, make_images

from coded_resnext import create_model, extract_classifier
from coded_resnext.cli import main
from coded_resnext.deploy.cost import network_cost
from coded_resnext.deploy.extract import load_extracted
from coded_resnext.models.checkpoint import save_model


def extract(*arguments: object) -> int:
    return main.main(["extract", *map(str, arguments)])


def refused(capsys, *arguments: object) -> str:
    """The one sentence of a refused command."""
    assert extract(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("coded-resnext: ")
    assert error.count("\n") == 1
    return error


def test_one_class_with_the_threshold_of_the_run(run_folder, network, capsys):
    assert extract(run_folder, "bee") == 0
    path = run_folder / "classifiers" / "class-1-bee.safetensors"
    output = capsys.readouterr().out
    assert f"wrote {path}" in output
    assert "class bee, threshold 0.2500" in output
    loaded = load_extracted(path)
    x = make_images(4, seed=3)
    assert_same_network(loaded.network, extract_classifier(network, 1), x)
    assert loaded.network.threshold == 0.25
    assert loaded.preprocessing.size == 6
    share = network_cost(loaded.network, 6).relative_to(network_cost(network, 6))
    assert f"{share.parameters:.1%} of the network" in output
    assert f"{share.parameters_without_projections:.1%} without projection skips" in output


def test_options(run_folder, tmp_path, capsys):
    out = tmp_path / "deep" / "c.safetensors"
    arguments = ("--out", out, "--threshold", "-0.5", "--fold", "--skip-rank", "0.3", "--json")
    # A number is an index where no class is named so.
    assert extract(run_folder / "model.safetensors", "2", *arguments) == 0
    content = json.loads(capsys.readouterr().out)
    network = load_extracted(out).network
    assert content["file"] == str(out)
    assert content["class_names"] == ["cat"] == list(network.class_names)
    assert content["threshold"] == network.threshold == -0.5
    assert network.config.folded
    assert network.config.blocks[1].skip_rank is None
    assert network.config.blocks[0].skip_rank == 2
    assert content["cost"] == network_cost(network, 6).to_dict()


def test_without_a_threshold(run_folder, capsys):
    assert extract(run_folder, "cat") == 0
    assert "no threshold" in capsys.readouterr().out


def test_several_classes(run_folder):
    assert extract(run_folder, "dog", "ant") == 0
    network = load_extracted(run_folder / "classifiers" / "classes-3-0.safetensors").network
    assert network.class_names == ("dog", "ant")


def test_all_classes(run_folder, capsys):
    assert extract(run_folder, "--all", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    index = json.loads((run_folder / "classifiers" / "index.json").read_text())
    assert content["classifiers"] == index["classifiers"]
    assert [row["threshold"] for row in index["classifiers"]] == [0.5, 0.25, None, -1.0]
    assert len(list((run_folder / "classifiers").glob("*.safetensors"))) == 4
    assert extract(run_folder, "--all") == 0
    assert "4 classifiers beside it, 3 with a threshold" in capsys.readouterr().out


def test_bad_requests(run_folder, capsys):
    assert "got 'be'; the nearest: bee" in refused(capsys, run_folder, "be")
    assert "class: expected 0 to 3, got 4" in refused(capsys, run_folder, "4")
    assert "or --all, and not both" in refused(capsys, run_folder)
    assert "or --all, and not both" in refused(capsys, run_folder, "bee", "--all")
    assert "with one class only" in refused(capsys, run_folder, "--all", "--threshold", "1")
    assert "skip_rank: expected" in refused(capsys, run_folder, "bee", "--skip-rank", "2")
    assert "found none" in refused(capsys, run_folder / "nothing", "bee")
    assert not (run_folder / "classifiers").exists()


def test_codebooks_that_differ(run_folder, tmp_path, capsys):
    paths = [tmp_path / "wide.json", tmp_path / "narrow.json"]
    for book, path in zip((WIDE, NARROW), paths, strict=True):
        book.save(path)
    assert extract(run_folder, "bee", "--codebooks", *paths) == 0
    WIDE.with_class_names(["bee", "ant", "cat", "dog"]).save(paths[0])
    assert "class order of the checkpoint" in refused(
        capsys, run_folder, "bee", "--codebooks", *paths
    )


def test_damaged_files(run_folder, capsys):
    (run_folder / "evaluation.json").write_text("{")
    assert "not a readable evaluation" in refused(capsys, run_folder, "bee")
    path = run_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "not a readable model file" in refused(capsys, run_folder, "bee")


def test_a_plain_network(tmp_path, capsys):
    save_model(tmp_path / "model.safetensors", create_model("resnext_digits"))
    assert "ratio one" in refused(capsys, tmp_path, "3")
