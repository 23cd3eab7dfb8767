"""`coded-resnext export`: what is written, what it says, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.helpers import assert_same_network
from support.small_networks import make_images, make_network

from coded_resnext import EarlyExit, create_model, extract_classifier, from_pretrained
from coded_resnext.cli import main
from coded_resnext.models.checkpoint import load_model, save_model, weights_sha256

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def export(*arguments: object) -> int:
    return main.main(["export", *map(str, arguments)])


def refused(capsys, *arguments: object) -> str:
    """The one sentence of a refused command."""
    assert export(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("coded-resnext: ")
    assert error.count("\n") == 1
    return error


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.long
@torch.inference_mode()
def test_a_class_and_its_int8_variant(run_folder, network, tmp_path, capsys):
    for index in range(4):
        picture = Image.new("L", (9, 7), 60 * index)
        picture.putpixel((index, index), 255)
        picture.save(tmp_path / f"{index}.png")
    assert (
        export(run_folder, "--class", "bee", "--int8", tmp_path / "0.png", tmp_path / "1.png") == 0
    )
    path = run_folder / "export" / "class-1-bee.onnx"
    small = run_folder / "export" / "class-1-bee.int8.onnx"
    output = capsys.readouterr().out
    assert f"wrote {path} ({path.stat().st_size:,} bytes)" in output
    assert f"wrote {small} ({small.stat().st_size:,} bytes)" in output
    x = make_images(3, seed=1)
    (logits,) = session(path).run(None, {"images": x.numpy()})
    expected = extract_classifier(network, 1)(x)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)
    notes = session(path).get_modelmeta().custom_metadata_map
    assert json.loads(notes["threshold"]) == 0.25
    assert json.loads(notes["class_names"]) == ["bee"]


@torch.inference_mode()
def test_a_program(run_folder, network, tmp_path):
    out = tmp_path / "deep" / "net.pt2"
    assert export(run_folder / "model.safetensors", "--format", "program", "--out", out) == 0
    x = make_images(3, seed=1)
    torch.testing.assert_close(torch.export.load(out).module()(x), network(x))


@pytest.mark.long
@torch.inference_mode()
def test_heads_and_early_exit(run_folder):
    EarlyExit((0.5, None, 0.25)).save(run_folder / "early_exit.json")
    assert export(run_folder, "--heads") == 0
    outputs = session(run_folder / "export" / "heads.onnx").get_outputs()
    assert [output.name for output in outputs] == ["logits", "classes", "margins"]
    assert export(run_folder, "--early-exit") == 0
    folder = run_folder / "export" / "early-exit"
    assert len(list(folder.iterdir())) == 4
    notes = session(folder / "part-0.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(notes["early_exit"])["margins"] == [0.5, None, 0.25]


def test_shared(run_folder, network, capsys):
    EarlyExit((0.5, None, 0.25)).save(run_folder / "early_exit.json")
    summary = {"test_accuracy": 0.5, "command": "train.py --out secret", "seconds": 3.0}
    (run_folder / "summary.json").write_text(json.dumps(summary))
    assert export(run_folder, "--format", "shared", "--name", "Animals", "--license", "mit") == 0
    folder = run_folder / "export" / "shared"
    assert capsys.readouterr().out == f"wrote {folder}\n"
    found = from_pretrained(folder)
    assert found.thresholds == {"ant": 0.5, "bee": 0.25, "dog": -1.0}
    assert found.early_exit == EarlyExit((0.5, None, 0.25))
    assert found.results == {"test_accuracy": 0.5}
    assert "secret" not in (folder / "README.md").read_text()
    x = make_images(2, seed=0)
    assert_same_network(found.model, network, x)


def test_push(run_folder, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr(
        "coded_resnext.cli.export.push_to_hub",
        lambda folder, repository: pushed.append((folder, repository)) or "https://hub/commit",
    )
    assert export(run_folder, "--format", "shared", "--push", "someone/animals") == 0
    assert pushed == [(run_folder / "export" / "shared", "someone/animals")]
    assert "pushed https://hub/commit" in capsys.readouterr().out


def test_bad_requests(run_folder, tmp_path, capsys):
    assert "got 'be'; the nearest: bee" in refused(capsys, run_folder, "--class", "be")
    assert "calibrate RUN DATA` makes it" in refused(capsys, run_folder, "--early-exit")
    assert "--push: expected with" in refused(capsys, run_folder, "--push", "a/b")
    for options in (["--heads", "--format", "shared"], ["--int8", "x", "--format", "shared"]):
        assert "expected the whole network" in refused(capsys, run_folder, *options)
    for options in (["--early-exit", "--format", "program"], ["--int8", "x", "--format", "aot"]):
        assert "with --format onnx only" in refused(capsys, run_folder, *options)
    assert "not with --early-exit" in refused(capsys, run_folder, "--early-exit", "--int8", "x")
    assert "image_size: expected a positive" in refused(capsys, run_folder, "--image-size", "0")
    assert "found none" in refused(capsys, tmp_path / "nothing")
    (run_folder / "summary.json").write_text("{")
    assert "not a readable summary" in refused(capsys, run_folder, "--format", "shared")
    assert not any(path.is_file() for path in run_folder.glob("export/**/*"))


def test_a_program_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """pytorch#10577, LlamaFactory#1223, so-vits-svc#46."""
    save_model(tmp_path / "model.safetensors", create_model("coded_resnext_digits"))
    (tmp_path / "folder.pt2").mkdir()
    out = tmp_path / "folder.pt2"
    assert export(tmp_path, "--format", "program", "--out", out) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.pt2", "model.safetensors"]


def test_results_of_other_weights_stay_where_they_are(run_folder, network, tmp_path, capsys):
    """transformers#15547, transformers#12741."""
    sha = weights_sha256(network)
    for name in ("evaluation.json", "summary.json"):
        path = run_folder / name
        content = json.loads(path.read_text()) if path.exists() else {"test_accuracy": 0.45}
        path.write_text(json.dumps({**content, "weights_sha256": sha}))
    EarlyExit((0.5, None, 0.25), weights_sha256=sha).save(run_folder / "early_exit.json")
    best = run_folder / "best.safetensors"
    for same in (True, False):
        if not same:
            torch.nn.init.ones_(network.head.weight)
        save_model(best, network)
        capsys.readouterr()
        assert export(best, "--format", "shared", "--out", tmp_path / "shared") == 0
        assert capsys.readouterr().err.count("other weights, left out\n") == (0 if same else 3)
        shared = from_pretrained(tmp_path / "shared")
        assert bool(shared.results) == bool(shared.thresholds) == same
        assert (shared.early_exit is not None) == same
    assert main.main(["extract", str(best), "0", "--out", str(tmp_path / "c.safetensors")]) == 0
    assert "no threshold" in capsys.readouterr().out
    assert export(best, "--early-exit") == 2
    assert "for these weights" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_onnx_of_a_half_precision_run(dtype, tmp_path, capsys):
    """mteb#1297: the advice was a call of Python, which nobody has at a command line."""
    model = make_network()
    save_model(tmp_path / "half.safetensors", model.to(dtype))
    out = tmp_path / "half.onnx"
    assert export(tmp_path / "half.safetensors", "--image-size", 6, "--out", out) == 0
    said = capsys.readouterr().out
    assert f"written in float32, they were in {str(dtype).removeprefix('torch.')}" in said
    x = torch.randn(2, 1, 6, 6)
    (logits,) = onnxruntime.InferenceSession(str(out)).run(None, {"images": x.numpy()})
    expected = load_model(tmp_path / "half.safetensors").model.float()(x)
    torch.testing.assert_close(torch.from_numpy(logits), expected.detach(), rtol=1e-3, atol=1e-4)
