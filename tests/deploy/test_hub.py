"""Shared networks: the same bits in a fresh process, an honest card, damage that is named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from support.helpers import assert_same_network
from support.small_networks import NAMES, make_images, make_network

from coded_resnext import (
    EarlyExit,
    Pretrained,
    create_model,
    extract_classifier,
    from_pretrained,
    push_to_hub,
    save_pretrained,
)
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.deploy.hub import model_card

PREPROCESSING = Preprocessing(6, 1, (0.3,), (0.4,))
FRESH = """
import json, sys, torch
from coded_resnext import from_pretrained
found = from_pretrained(sys.argv[1])
x = torch.load(sys.argv[2], weights_only=True)
with torch.inference_mode():
    logits, energies = found.model(x, return_energies=True)
torch.save([logits, *energies], sys.argv[3])
print(json.dumps(found.description()))
"""


def make_pretrained(**changes: object) -> Pretrained:
    arguments = {
        "model": make_network(),
        "preprocessing": PREPROCESSING,
        "thresholds": {"bee": 0.1 + 0.2, "dog": -1.0},
        "early_exit": EarlyExit((0.25, None, 0.5), agreement=True, calibration={"samples": 7}),
        "training": {"data": "noise | lines\nof it", "config": {"epochs": 3, "learning_rate": 0.1}},
        "results": {"test_accuracy": 0.75, "early_decoding": [0.5, 0.625]},
        "name": "Four animals",
        "license": "mit",
    }
    return Pretrained(**{**arguments, **changes})


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_pretrained(make_pretrained(), tmp_path / "shared")


@pytest.mark.long
@torch.inference_mode()
def test_the_same_in_a_fresh_process(folder, tmp_path):
    shared = make_pretrained()
    x = make_images(5, seed=3)
    torch.save(x, tmp_path / "x.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, folder, tmp_path / "x.pt", tmp_path / "y.pt"],
        capture_output=True,
        text=True,
        check=True,
    )
    logits, energies = shared.model(x, return_energies=True)
    found = torch.load(tmp_path / "y.pt", weights_only=True)
    assert len(found) == 4
    # The same instructions on the same data: of one machine, and of as many threads.
    for ours, theirs in zip(found, [logits, *energies], strict=True):
        assert torch.equal(ours, theirs)
    description = json.loads(done.stdout)
    assert description == json.loads(json.dumps(shared.description()))
    assert description["class_names"] == NAMES
    assert description["thresholds"] == {"bee": 0.30000000000000004, "dog": -1.0}
    assert [len(book["codewords"]) for book in description["codebooks"]] == [4, 4]


def test_all_comes_back(folder):
    found, shared = from_pretrained(folder), make_pretrained()
    assert found.model.stage_codebooks == shared.model.stage_codebooks
    assert found.early_exit == shared.early_exit
    assert found.preprocessing == PREPROCESSING
    assert not found.model.training
    assert (found.name, found.license) == ("Four animals", "mit")
    content = json.loads((folder / "config.json").read_text())
    assert content["architecture"]["stages"][1]["active"] == 3
    assert set(content["sha256"]) == {"model.safetensors"}


def test_the_card(folder):
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "coded-resnext"\n')
    assert 'license: "mit"\n---\n' in card
    for said in (
        "# Four animals",
        "a Coded ResNeXt. In 3 coded blocks",
        "- 4 classes: ant, bee, cat, dog",
        "- input: 6x6 pixels, grey, intensities in 0..1 less 0.3, divided by 0.4",
        "- stage 2: 2 blocks of 12 channels, 5 branches of width 2, 3 of them for each class",
        "| data | noise / lines of it |",
        "| config.epochs | 3 |",
        "| test_accuracy | 0.75 |",
        "| early_decoding | 0.5, 0.625 |",
        "- 2 of 4 classes have a threshold",
        "margins 0.250, none, 0.500",
        "## What it should not be used for",
        "- Images of anything but its 4 classes",
    ):
        assert said in card, said


def test_the_card_of_one_of_which_nothing_is_known(tmp_path):
    plain = Pretrained(create_model("resnext_digits"))
    card = (save_pretrained(plain, tmp_path) / "README.md").read_text()
    assert "a plain ResNeXt" in card
    assert "How it was trained is not recorded." in card
    assert "No results are recorded." in card
    assert "licence of the weights: not stated" in card
    assert "license:" not in card
    assert "Thresholds" not in card
    assert from_pretrained(tmp_path).preprocessing is None


def test_notes_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="thresholds: expected classes of the model, got 'fly'"):
        make_pretrained(thresholds={"fly": 1.0})
    with pytest.raises(ValueError, match="early_exit: expected a margin for each of 3"):
        make_pretrained(early_exit=EarlyExit((0.5,)))
    for notes in ({"at": Path("x")}, {"loss": float("nan")}):
        with pytest.raises(ValueError, match="expected what JSON can hold"):
            save_pretrained(make_pretrained(training=notes), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_damage(folder):
    weights, config = folder / "model.safetensors", folder / "config.json"
    content, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(content[:-4])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected SHA-256"):
        from_pretrained(folder)
    changed = bytearray(content)
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(ValueError, match=r"model\.safetensors: expected SHA-256"):
        from_pretrained(folder)
    weights.write_bytes(content)
    config.write_text(text[:-20])
    with pytest.raises(ValueError, match=r"config\.json: not a readable description"):
        from_pretrained(folder)
    for key, value, message in (
        ("format_version", 2, "format_version: expected 1, got 2"),
        ("class_names", ["bee", "ant", "cat", "dog"], "class_names: expected what model"),
        ("thresholds", {"fly": 1}, "thresholds: expected classes of the model"),
        ("early_exit", {"margins": [1]}, "format_version: expected 1, got None"),
        ("sha256", {}, "not a readable description"),
    ):
        config.write_text(json.dumps({**json.loads(text), key: value}))
        with pytest.raises(ValueError, match=message):
            from_pretrained(folder)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: expected a file of save_pretr"):
        from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        push_to_hub(folder, "someone/four-animals")


def test_hub(folder, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    api = create_autospec(hub.HfApi, instance=True)
    api.upload_folder.return_value.commit_url = "https://hub/commit"
    monkeypatch.setattr(hub, "HfApi", lambda token: api)
    (folder / "secret.txt").write_text("stays here")
    url = push_to_hub(folder, "someone/four-animals", private=True)
    assert url == "https://hub/commit"
    api.create_repo.assert_called_once_with("someone/four-animals", private=True, exist_ok=True)
    uploaded = api.upload_folder.call_args.kwargs
    assert uploaded["allow_patterns"] == ["model.safetensors", "config.json", "README.md"]
    assert uploaded["folder_path"] == folder

    def fetch(repository, filename, **options):
        assert (repository, options["revision"]) == ("someone/four-animals", "v1")
        return str(folder / filename)

    fetched = create_autospec(hub.hf_hub_download, side_effect=fetch)
    monkeypatch.setattr(hub, "hf_hub_download", fetched)
    found = from_pretrained("someone/four-animals", revision="v1")
    assert [call.args[1] for call in fetched.call_args_list] == ["model.safetensors", "config.json"]
    x = make_images(2, seed=0)
    assert_same_network(found.model, make_network(), x)


def test_without_the_hub_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'coded-resnext\[hub\]'"):
        from_pretrained("someone/four-animals")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.2", None, 10**400, True])
def test_a_threshold_or_margin_that_is_no_number_is_refused(value: object) -> None:
    """transformers#10632, tensorboard#3057."""
    model = create_model("coded_resnext_digits").eval()
    with pytest.raises(ValueError, match="thresholds: 3"):
        Pretrained(model, thresholds={"3": value})  # type: ignore[dict-item]
    if value is not None:
        with pytest.raises(ValueError, match="threshold"):
            extract_classifier(model, 3, threshold=value)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="margins"):
            EarlyExit((value,))  # type: ignore[arg-type]


def test_numbers_of_numpy_and_torch_become_floats() -> None:
    """transformers#10632, tensorboard#3057."""
    pretrained = Pretrained(
        create_model("coded_resnext_digits"),
        thresholds={"3": np.float32(0.25)},
        early_exit=EarlyExit((torch.tensor(0.5), None, np.float32(0.25), None)),  # type: ignore[arg-type]
    )
    json.dumps(pretrained.description(), allow_nan=False)


def test_a_slip_in_the_path_or_a_file_gets_its_sentence(tmp_path: Path) -> None:
    """huggingface_hub#1464."""
    with pytest.raises(FileNotFoundError, match="neither"):
        from_pretrained(tmp_path / "not" / "there")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="got the file"):
        from_pretrained(tmp_path / "file")


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors"])
def test_a_link_is_not_published(tmp_path: Path, name: str) -> None:
    """huggingface_hub#2883, #4086: a token was uploaded as what the link was called."""
    folder = save_pretrained(Pretrained(create_model("coded_resnext_digits")), tmp_path / "d")
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="link"):
        push_to_hub(folder, "me/net")


def test_the_card_shows_markup_as_text() -> None:
    names = ["<img onerror>", "[x](javascript:y)", "![t](https://a/b)", *"defghij"]
    card = model_card(
        Pretrained(
            create_model("coded_resnext_digits", class_names=names),
            name="n\n\n<script>",
            license="mit\n## Results\n100 %",
            training={"note": "`<b>`"},
        )
    )
    body = card.split("---", 2)[2]
    assert not re.search(r"(?<!\\)<(script|img|b)|(?<!\\)\[(x|t)\]|^100 %", body, re.MULTILINE)
    assert len(re.findall(r"^## Results", body, re.MULTILINE)) == 1
