"""What a report gathers from a run's folder, and what it says of damaged and missing files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.report_runs import ODD_NAMES, PREPROCESSING, Run, write

from coded_resnext import EarlyExit, create_model, extract_classifier
from coded_resnext.data.batches import batches
from coded_resnext.deploy.cost import network_cost
from coded_resnext.deploy.early_exit import predict_early
from coded_resnext.interpret import evaluate, load_pictures, save_evaluation
from coded_resnext.interpret.report import gather
from coded_resnext.models.checkpoint import save_model


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    """A copy of the run to damage."""
    return Path(shutil.copytree(run.folder, tmp_path / "run"))


def missing(folder: Path) -> dict[str, str]:
    """What the report of a folder says is missing, and why."""
    return {entry["part"]: entry["why"] for entry in gather(folder)["missing"]}


def test_a_whole_run_misses_nothing(run: Run) -> None:
    content = gather(run.folder)
    assert content["missing"] == []
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["class_names"] == list(ODD_NAMES)
    described = run.evaluation.to_dict()
    for key in ("paths", "removal", "one_class", "early_exit", "samples", "early_decoding"):
        assert content["evaluation"][key] == json.loads(json.dumps(described[key]))
    assert content["summary"] == run.evaluation.summary()
    assert content["training_log"]["total"] == [3.0, 1.5, 1.0, 0.75, 0.6]


def test_cost_and_codebooks_are_the_models(run: Run) -> None:
    content = gather(run.folder)
    whole, part = network_cost(run.model, 6), network_cost(extract_classifier(run.model, 0), 6)
    assert content["cost"]["network"] == whole.to_dict()
    assert content["cost"]["classifier"]["macs"] == part.macs
    assert content["cost"]["classifier"]["share_of_network"]["macs"] == part.macs / whole.macs
    for block, index in zip(run.model.codebooks, content["block_codebooks"], strict=True):
        book = content["codebooks"][index]
        assert book["words"] == list(block.words)
        assert book["distances"] == {str(k): v for k, v in block.distances.items()}
    assert [block["active"] for block in content["blocks"]] == [None, 3, 3, None, 2]


def test_pictures_and_exits_belong_to_the_samples(run: Run) -> None:
    content = gather(run.folder)
    positions = content["evaluation"]["samples"]["positions"]
    pictures = load_pictures(run.folder / "pictures.json")
    assert content["pictures"] == [pictures[position] for position in positions]
    criterion = EarlyExit.load(run.folder / "early_exit.json")
    found = predict_early(run.model, run.test.images[torch.tensor(positions)], criterion)
    assert content["sample_exits"] == found.exit_blocks.tolist()
    assert len(set(content["sample_exits"])) > 1


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def put(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text)

    return damage


@pytest.mark.parametrize(
    ("damage", "part", "why"),
    [
        (remove("evaluation.json"), "Results", "evaluation.json is not in the run's folder"),
        (cut("evaluation.json"), "Results", "evaluation.json cannot be read"),
        (put("evaluation.json", "[]"), "Results", "cannot be read: evaluation.json: not an"),
        (put("evaluation.json", '{"format_version": 1}'), "Results", "expected 3, got 1"),
        (remove("model.safetensors"), "The network", "model.safetensors is not in"),
        (cut("model.safetensors"), "The network", "not a readable model file"),
        (remove("config.json"), "Configuration", "config.json is not in"),
        (put("config.json", "7"), "Configuration", "expected a JSON object, got int"),
        (put("summary.json", "{"), "Summary", "summary.json cannot be read"),
        (put("metrics.csv", "epoch,total\n"), "Training curves", "no epoch is finished"),
        (put("metrics.csv", "epoch,total\n1,x\n"), "Training curves", "could not convert"),
        (remove("pictures.json"), "Pictures of the test images", "pictures.json is not in"),
        (put("pictures.json", "{}"), "Pictures of the test images", "not a file of pictures"),
        (put("early_exit.json", "{}"), "The margins of this run", "not an early-exit file"),
        (put("early_exit_test.json", "{}"), "The margins of this run", "early_accuracy"),
    ],
)
def test_what_is_missing_is_said_and_the_rest_is_there(
    folder: Path, damage: Callable[[Path], None], part: str, why: str
) -> None:
    damage(folder)
    content = gather(folder)
    [entry] = content["missing"]
    assert entry["part"] == part
    assert why in entry["why"]
    assert str(folder) not in json.dumps(content)
    if part != "Training curves":
        assert content["training_log"]["epoch"] == [1, 2, 3, 4, 5]
    if part not in ("Results", "Training curves"):
        assert content["evaluation"] is not None


def test_a_log_that_is_being_written_ends_with_its_last_whole_row(folder: Path) -> None:
    log = folder / "metrics.csv"
    log.write_text("epoch,total,lr\n1,2.5,0.1\n2,nan,\n3,0.")
    content = gather(folder)
    assert content["training_log"] == {"epoch": [1, 2], "total": [2.5, None], "lr": [0.1, None]}


def test_an_evaluation_alone_is_enough_for_the_paths(folder: Path, run: Run) -> None:
    whole = gather(folder)
    (folder / "model.safetensors").unlink()
    content = gather(folder)
    for key in ("class_names", "codebooks", "block_codebooks", "evaluation", "pictures"):
        assert content[key] == whole[key]
    assert [block["active"] for block in content["blocks"]] == [None, 3, 3, None, 2]
    assert content["cost"]["network"]["parameters"] == whole["cost"]["network"]["parameters"]


def test_results_of_another_network_are_not_shown(folder: Path) -> None:
    torch.manual_seed(0)
    save_model(folder / "model.safetensors", create_model("coded_resnext_digits"))
    content = gather(folder)
    assert content["evaluation"] is None
    assert missing(folder)["Results"].startswith("evaluation.json is of other weights than")


def test_what_was_not_drawn_is_said(folder: Path, run: Run) -> None:
    reasons = {"removal": "3 of 10 test images, a seeded draw", "threshold data": "no such classes"}
    save_evaluation(replace(run.evaluation, not_computed=reasons, samples=None), folder)
    assert missing(folder) == {
        "Removing branches": "not computed, or not all: 3 of 10 test images, a seeded draw.",
        "Single test images": "evaluation.json has no result of it.",
        "Threshold data": "not computed, or not all: no such classes.",
    }


def test_a_plain_network_misses_nothing_that_it_cannot_have(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("resnext_digits").eval()
    data = batches(torch.randn(20, 1, 8, 8), torch.arange(20) % 10)
    save_model(tmp_path / "model.safetensors", model, preprocessing=replace(PREPROCESSING, size=8))
    save_evaluation(evaluate(model, None, data), tmp_path)
    write(tmp_path / "config.json", {})
    assert set(missing(tmp_path)) == {"Summary", "Training curves"}
    content = gather(tmp_path)
    assert content["codebooks"] == []
    assert content["cost"]["classifier"] is None


def test_no_folder_and_a_folder_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="RUN: expected the folder of a run, found none"):
        gather(tmp_path / "none")
    with pytest.raises(
        ValueError, match=r"RUN: expected the folder of a run, got .*no file of one"
    ):
        gather(tmp_path)


def test_margins_for_another_number_of_blocks_are_not_used(folder: Path) -> None:
    EarlyExit((0.5,)).save(folder / "early_exit.json")
    content: dict[str, Any] = gather(folder)
    assert content["sample_exits"] is None
    assert "another number of blocks" in missing(folder)["The margins of this run"]
