"""`coded-resnext convert`: weights of other software, published names, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import assert_same_network, below, imagenet_layout, load_golden

from coded_resnext import Codebook, create_model
from coded_resnext.cli import main
from coded_resnext.models.checkpoint import load_model, save_model
from coded_resnext.models.published import published_model

DIGITS = "coded_resnext_digits"
META, GOLDEN = load_golden("net_cifar10")
PUBLISHED = below(GOLDEN, "state.")


def convert(*arguments: object) -> int:
    return main.main(["convert", *map(str, arguments)])


def refused(capsys, *arguments: object) -> str:
    """The one sentence of a refused command."""
    assert convert(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("coded-resnext: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture
def architecture(tmp_path):
    path = tmp_path / "architecture.json"
    path.write_text(json.dumps(META["architecture"]))
    return path


@torch.inference_mode()
def test_published_names_in_and_out(tmp_path, architecture, capsys):
    torch.save({"state_dict": PUBLISHED}, tmp_path / "published.pth")
    names = tmp_path / "names.txt"
    names.write_text("\n".join("abcdefghij") + "\n")
    out = tmp_path / "run"
    arguments = ("--architecture", architecture, "--classes", names, "--out", out)
    assert convert(tmp_path / "published.pth", *arguments) == 0
    assert "3 of 4 blocks are coded" in capsys.readouterr().out
    model = load_model(out).model
    expected = published_model(PUBLISHED, META["architecture"]).eval()
    x = torch.randn(2, 3, 16, 16, dtype=model.head.weight.dtype)
    assert_same_network(model, expected, x)
    assert model.class_names == tuple("abcdefghij")
    assert convert(out, "--publish", "--out", tmp_path / "back.safetensors") == 0
    back = load_file(tmp_path / "back.safetensors")
    for name, value in PUBLISHED.items():
        assert torch.equal(back[name], value), name


def test_the_published_imagenet_layout_in_and_out(tmp_path, architecture, capsys):
    """Its description as it stands there; what comes back is the same bits under the same names."""
    layers, state = imagenet_layout([1, 1, 2], ["32/32", "16/32", "8/32"], 16, 1000)
    architecture.write_text(json.dumps(layers))
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    arguments = ("--architecture", architecture, "--out", tmp_path / "run")
    assert convert(tmp_path / "published.pth", *arguments) == 0
    assert "3 of 4 blocks are coded" in capsys.readouterr().out
    assert convert(tmp_path / "run", "--publish", "--out", tmp_path / "back.safetensors") == 0
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_plain_weights_start_a_coded_network(tmp_path, capsys):
    plain = create_model("resnext_digits")
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    out = tmp_path / "coded.safetensors"
    options = ("--network", "coded_resnext_digits", "--out", out)
    assert (
        convert(tmp_path / "plain.safetensors", *options, "--num-classes", 4, "--in-channels", 3)
        == 0
    )
    assert "adapted: stem.0.weight; fresh: head.weight" in capsys.readouterr().out
    loaded = load_model(out)
    assert loaded.model.num_classes == 4
    assert loaded.training == {"converted_from": "plain.safetensors"}
    ours = loaded.model.coded_blocks[2].expand.weight
    assert torch.equal(ours, plain.stages[2][0].expand.weight)


@pytest.mark.parametrize("way", ["state dict", "model file"])
def test_codewords_stay_with_the_weights_that_were_trained_for_them(way, tmp_path, capsys):
    """timm#1278: the network kept its own, for which the weights were never trained."""
    flipped = [Codebook(b.codewords.flip(0)) for b in create_model(DIGITS).stage_codebooks]
    names = list("abcdefghij")
    source = create_model(
        DIGITS, codebooks=[b.with_class_names(names) for b in flipped], class_names=names
    )
    path = tmp_path / "weights.pt"
    if way == "state dict":
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, path)
    else:
        save_model(path, source)
    assert convert(path, "--network", DIGITS, "--out", tmp_path / "out") == 0
    assert "fresh: none" in capsys.readouterr().out
    model = load_model(tmp_path / "out").model
    assert [b.words for b in model.stage_codebooks] == [b.words for b in flipped]
    assert model.class_names == (tuple("0123456789") if way == "state dict" else tuple(names))
    assert torch.equal(model.head.weight, source.head.weight)


def test_refusals(tmp_path, architecture, capsys):
    save_file(create_model("resnext_digits").state_dict(), tmp_path / "plain.safetensors")
    plain, out = tmp_path / "plain.safetensors", tmp_path / "out"
    said = refused(capsys, plain, "--network", "coded_resnext29_20x6d", "--out", out)
    assert "stem.0.weight is [32, 1, 3, 3], expected [64, 3, 3, 3]" in said
    said = refused(capsys, plain, "--architecture", architecture, "--out", out)
    assert "expected a tensor 'Mask_perClass'" in said
    architecture.write_text("[")
    assert "not JSON" in refused(capsys, plain, "--architecture", architecture, "--out", out)
    assert "name: expected one of" in refused(capsys, plain, "--network", "vgg", "--out", out)
    assert "with --network only" in refused(
        capsys, plain, "--publish", "--num-classes", 3, "--out", out
    )
    torch.save({"state_dict": {"a": print}}, tmp_path / "code.pth")
    said = refused(capsys, tmp_path / "code.pth", "--network", "resnext_digits", "--out", out)
    assert "could run code" in said
    assert not list(out.glob("*"))
    assert "expected a new file" in refused(
        capsys, plain, "--network", "resnext_digits", "--out", plain
    )
