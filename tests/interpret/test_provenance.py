"""Results say what they were measured on, and what is of other images is not put beside them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from support.report_runs import Run, odd_run
from support.small_networks import make_data, make_network
from torch import Tensor

from coded_resnext.data.batches import batches
from coded_resnext.interpret import Evaluation, Provenance, evaluate, load_evaluation
from coded_resnext.interpret.evaluation import MOST_VALUES, DigestedLoader
from coded_resnext.interpret.figures import save_figures
from coded_resnext.interpret.report.page import gather, render
from coded_resnext.interpret.results import text_tables

ROLES = ("test", "thresholds", "outside")
CHANGES = {
    "other images": ("test", lambda images, targets: (images + 0.01, targets)),
    "other labels": ("test", lambda images, targets: (images, (targets + 1) % 4)),
    "another order": ("test", lambda images, targets: (images.flip(0), targets.flip(0))),
    "other outside images": ("outside", lambda images, targets: (images * 0.99, targets)),
    "another training split": ("thresholds", lambda images, targets: (images[1:], targets[1:])),
    "another preprocessing": ("test", lambda images, targets: ((images - 0.5) / 0.2, targets)),
}


def whole(data: object) -> tuple[Tensor, Tensor]:
    images, targets = zip(*data, strict=True)  # type: ignore[call-overload]
    return torch.cat(images), torch.cat(targets)


@cache
def measured(change: str | None = None, batch_size: int = 4) -> Provenance:
    """Of the small network, with one of its inputs changed."""
    network = make_network()
    data = {
        role: whole(make_data(network, count, seed=seed))
        for seed, (role, count) in enumerate(zip(ROLES, (12, 10, 6), strict=True))
    }
    if change is not None:
        role, function = CHANGES[change]
        data[role] = function(*data[role])
    test, thresholds, outside = (batches(*data[role], batch_size) for role in ROLES)
    result = evaluate(
        network, thresholds, test, outside_loader=outside, repeats=1, classes=1, test_images=4
    )
    assert result.provenance is not None
    return result.provenance


@pytest.mark.parametrize("change", CHANGES)
def test_an_evaluation_says_which_images_it_is_of(change: str) -> None:
    """moabb#628, big-ann-benchmarks#279: what does not know its input answers for another."""
    plain, other = measured(), measured(change)
    for role in ROLES:
        same = getattr(plain, role).sha256 == getattr(other, role).sha256
        assert same == (role != CHANGES[change][0])


def test_the_size_of_the_batches_does_not_matter() -> None:
    assert [getattr(measured(), role) for role in ROLES] == [
        getattr(measured(batch_size=5), role) for role in ROLES
    ]


def test_large_images_differ_by_what_is_in_every_row_and_column() -> None:
    """Of each only some values are looked at."""
    images = torch.rand(2, 3, 224, 224)

    def digest(images: Tensor) -> str:
        loader = DigestedLoader([(images, torch.tensor([0, 1]))])
        list(loader)
        assert loader.images is not None
        return loader.images.sha256

    assert images[0].numel() > MOST_VALUES
    for part in (
        (1, slice(None), slice(100, 101), slice(None)),
        (1, slice(None), slice(None), slice(100, 101)),
        (0, slice(2, 3), slice(60, 90), slice(60, 90)),
    ):
        changed = images.clone()
        changed[part] += 0.01
        assert digest(changed) != digest(images)
    assert digest(images.clone()) == digest(images)


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run of a small network."""
    return odd_run(tmp_path_factory.mktemp("provenance") / "run")


@pytest.fixture
def run(measured_run: Run, tmp_path: Path) -> Run:
    """A copy of the run, to be changed."""
    shutil.copytree(measured_run.folder, tmp_path / "run")
    return replace(measured_run, folder=tmp_path / "run")


def other_images(folder: Path, evaluation: Evaluation) -> None:
    """Writes an evaluation that says it was measured on other images, called B."""
    provenance = evaluation.named("B", test="test").provenance
    assert provenance is not None
    test = replace(provenance.test, sha256="f" * 64)
    changed = replace(evaluation, provenance=replace(provenance, test=test))
    (folder / "evaluation.json").write_text(json.dumps(changed.to_dict()))


def test_the_page_says_what_it_shows_results_of(run: Run) -> None:
    """shannon#257, EnergyPlusRegressionTool#30: results of B stood under the name of A."""
    summary = {**run.evaluation.summary(), "seconds": 90.0}
    (run.folder / "summary.json").write_text(json.dumps(summary))
    assert not gather(run.folder)["missing"]
    other_images(run.folder, run.evaluation)
    content = gather(run.folder)
    reasons = [entry["why"] for entry in content["missing"]]
    assert any("pictures of other images" in reason for reason in reasons)
    assert any("summary.json was measured on other images" in reason for reason in reasons)
    assert content["pictures"] is None
    page = render(content)
    assert (
        "measured on B test, 120 images · trained on noise &lt;b&gt;bold&lt;/b&gt; in 1.5" in page
    )


def test_results_of_other_weights_are_left_out(run: Run) -> None:
    changed = replace(run.evaluation, weights_sha256="0" * 64)
    (run.folder / "evaluation.json").write_text(json.dumps(changed.to_dict()))
    exits = json.loads((run.folder / "early_exit.json").read_text())
    (run.folder / "early_exit.json").write_text(json.dumps({**exits, "weights_sha256": "0"}))
    content = gather(run.folder)
    assert content["evaluation"] is None
    reasons = " ".join(entry["why"] for entry in content["missing"])
    assert "evaluation.json is of other weights than model.safetensors" in reasons
    assert "it is for other weights" in reasons


@pytest.mark.long
def test_tables_and_figures_carry_it(run: Run, tmp_path: Path) -> None:
    evaluation = load_evaluation(run.folder).named("digits", outside="letters")
    assert evaluation.provenance is not None
    digest = evaluation.provenance.test.sha256[:12]
    assert f"Measured on digits test: 120 images, {digest}" in text_tables(evaluation)
    drawings = save_figures(evaluation, run.model.codebooks, tmp_path / "figures")
    assert drawings
    for path in drawings:
        assert digest.encode() in path.read_bytes(), path
