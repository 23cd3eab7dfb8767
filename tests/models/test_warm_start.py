"""From a plain ResNeXt's weights: the same logits, a coded network that starts, clear refusals."""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.helpers import assert_alike
from support.random_networks import make_random
from torch import nn
from torch.optim.swa_utils import AveragedModel

from coded_resnext import Codebook, create_model, load_weights
from coded_resnext.models.checkpoint import save_model
from coded_resnext.models.warm_start import (
    load_plain_weights,
    plain_state,
    read_state_dict,
    recalibrate_batch_norm,
)

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def their_network(library: str) -> nn.Module:
    """`resnext50_32x4d` of timm or torchvision, random weights, nothing left at zero or one."""
    torch.manual_seed(0)
    if library == "timm":
        network = pytest.importorskip("timm").create_model("resnext50_32x4d")
    else:
        network = pytest.importorskip("torchvision").models.resnext50_32x4d()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.weight, 0.4, 0.8)
            nn.init.normal_(module.bias, 0, 0.1)
    return network.eval()


@pytest.mark.parametrize("library", ["timm", "torchvision"])
@torch.inference_mode()
def test_the_plain_twin_gives_the_same_logits(library):
    theirs = their_network(library)
    ours = create_model("resnext50_32x4d", head_bias=True).eval()
    report = load_plain_weights(ours, theirs.state_dict())
    assert report.adapted == report.fresh == ()
    assert len(report.copied) == len(theirs.state_dict())
    expected = theirs(IMAGES)
    # The same convolutions in the same order: what remains is the rounding of folding the mean.
    assert_alike(ours(IMAGES), expected)
    assert float(expected.std()) > 0.1


def test_a_coded_network_starts_from_it():
    theirs = their_network("timm")
    coded = create_model("coded_resnext50_32x4d", num_classes=10, in_channels=1, head_bias=True)
    fresh = copy.deepcopy(coded.head.state_dict())
    report = load_plain_weights(coded, theirs.state_dict())
    assert report.adapted == ("stem.0.weight",)
    assert report.fresh == ("head.weight", "head.bias")
    assert "fresh: head.weight, head.bias" in str(report)
    assert torch.equal(coded.head.weight, fresh["weight"])
    state = theirs.state_dict()
    # W_n, the columns of branch n, is what a grouped expand convolution of that branch would hold.
    block, conv = coded.stages[3][1], state["layer4.1.conv3.weight"]
    assert block.is_coded
    assert torch.equal(block.expand.weight, conv)
    grey = IMAGES.mean(1, keepdim=True)
    with torch.no_grad():
        expected = nn.functional.conv2d(
            grey.expand(-1, 3, -1, -1), state["conv1.weight"], None, 2, 3
        )
        torch.testing.assert_close(coded.stem[0](grey), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 5, 6])
def test_other_image_channels_as_timm_adapts_them(channels):
    adapt = pytest.importorskip("timm.models._manipulate").adapt_input_conv
    source = create_model("resnext_digits", in_channels=3).state_dict()
    target = create_model("resnext_digits", in_channels=channels)
    assert load_plain_weights(target, source).adapted == ("stem.0.weight",)
    expected = adapt(channels, source["stem.0.weight"].clone())
    torch.testing.assert_close(target.stem[0].weight.detach(), expected)


def test_recalibration_gives_the_last_batch_norm_of_coded_blocks_unit_outputs():
    twin = make_random("resnext_digits")
    model = create_model("coded_resnext_digits")
    load_plain_weights(model, twin.state_dict())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    model.train()
    model.stages[0].eval()
    assert recalibrate_batch_norm(model, images.split(16)) == 48
    assert model.training
    assert not model.stages[0].training
    assert model.coded_blocks[0].training
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {
        f"stages.{stage}.{block}.expand_bn.{name}"
        for stage in (1, 2)
        for block in (0, 1)
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    seen: dict[str, torch.Tensor] = {}
    norm = model.coded_blocks[0].expand_bn
    norm.register_forward_hook(lambda _, inputs, __: seen.update(y=inputs[0]))
    with torch.no_grad():
        model.eval()(images)
    y = seen["y"].double()
    torch.testing.assert_close(norm.running_mean.double(), y.mean((0, 2, 3)), rtol=0, atol=1e-5)
    parts = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in y.split(16)]).mean(0)
    torch.testing.assert_close(norm.running_var.double(), parts, rtol=1e-4, atol=1e-6)
    assert norm.momentum == 0.1
    with pytest.raises(ValueError, match="batches: expected at least one"):
        recalibrate_batch_norm(model, [])
    with pytest.raises(ValueError, match="model: expected at least one coded block"):
        recalibrate_batch_norm(twin, [images])


def test_what_does_not_fit_is_listed_and_changes_nothing():
    model = create_model("coded_resnext_digits")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    source = create_model("resnext_digits").state_dict()
    del source["stages.1.0.reduce.weight"]
    source["stages.2.1.expand.weight"] = torch.zeros(200, 7, 1, 1)
    source["head.bias"] = torch.zeros(10)
    with pytest.raises(ValueError, match="state_dict: does not fit the model") as caught:
        load_plain_weights(model, source)
    message = str(caught.value)
    assert "no stages.1.0.reduce.weight" in message
    assert "stages.2.1.expand.weight is [200, 7, 1, 1], expected [200, 120, 1, 1]" in message
    assert "head.bias, which the model has not" in message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    other_stem = create_model("resnext_digits", stem="conv7x7").state_dict()
    with pytest.raises(ValueError, match=r"stem\.0\.weight is \[32, 1, 7, 7\], expected"):
        load_plain_weights(model, other_stem)
    with pytest.raises(ValueError, match=r"expected the names of a ResNeXt .* 'blocks\.0\.attn'"):
        plain_state({"blocks.0.attn": torch.zeros(1)})


def test_files(tmp_path):
    state = create_model("resnext_digits").state_dict()
    save_file(state, tmp_path / "plain.safetensors")
    torch.save(
        {
            "state_dict": {f"module.{k}": v for k, v in state.items()},
            "args": argparse.Namespace(a=1),
        },
        tmp_path / "plain.pth",
    )
    for name in ("plain.safetensors", "plain.pth"):
        read = read_state_dict(tmp_path / name)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[k], state[k]) for k in state)
    with pytest.raises(FileNotFoundError, match="expected a file with weights"):
        read_state_dict(tmp_path / "none.pth")
    content = (tmp_path / "plain.safetensors").read_bytes()
    for length in (0, 30, len(content) - 1):
        (tmp_path / "cut.safetensors").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.safetensors: not a readable safetensors file"):
            read_state_dict(tmp_path / "cut.safetensors")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="expected weights by name, found none"):
        read_state_dict(tmp_path / "empty.pth")


class Attack:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("inside", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, inside):
    attack = Attack(str(tmp_path / "made"))
    torch.save({"state_dict": {"a": attack}} if inside else attack, tmp_path / "attack.pth")
    with pytest.raises(ValueError, match="anything else could run code"):
        read_state_dict(tmp_path / "attack.pth")
    assert not (tmp_path / "made").exists()


def written(model: nn.Module, folder: Path, way: str) -> Path:
    """A file with a network's weights as people have them."""
    state = model.state_dict()
    in_front = {f"{way}.{name}": value for name, value in state.items()}
    if way == "our model file of another name":
        save_model(folder / "epoch-7.pth", model)
        return folder / "epoch-7.pth"
    if way == "safetensors":
        save_file(state, folder / "weights.safetensors")
        return folder / "weights.safetensors"
    content: object = {
        "bare": state,
        "state_dict": {"epoch": 3, "state_dict": state},
        "model": {"model": state, "optimizer": {"lr": 0.1}},
        "compiled": torch.compile(model, backend="eager").state_dict(),
        "averaged": AveragedModel(model).state_dict(),
    }.get(way, in_front)
    torch.save(content, folder / "weights.pt")
    return folder / "weights.pt"


@pytest.mark.parametrize("network", ["coded_resnext_digits", "resnext_digits"])
@pytest.mark.parametrize(
    "way",
    [
        *("our model file of another name", "safetensors", "bare", "state_dict", "model"),
        *("compiled", "averaged", "module", "_orig_mod", "module._orig_mod", "net", "ema.model"),
    ],
)
def test_weights_are_read_however_they_were_written(network, way, tmp_path):
    """timm#1817, lightly-train#985: a wrapper's names, or a file's own name, kept weights out."""
    source = make_random(network)
    model = create_model(network)
    load_weights(model, written(source, tmp_path, way))
    for name, value in source.state_dict().items():
        # Copies of the same numbers.
        assert torch.equal(model.state_dict()[name], value), name


def test_weights_that_do_not_fit_are_refused_by_their_names(tmp_path):
    """jiant#688: what did not fit was left fresh, and nothing was said."""
    model = create_model("coded_resnext_digits", class_names=list("abcdefghij"))
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def said(way: str, source: nn.Module) -> str:
        with pytest.raises(ValueError, match=r"^/") as caught:
            load_weights(model, written(source, tmp_path, way))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        return str(caught.value)

    assert "head.weight is [4, 200], expected [10, 200]" in said(
        "bare", create_model("resnext_digits", num_classes=4)
    )
    assert "stem.0.weight is [32, 3, 3, 3], expected" in said(
        "module", create_model("resnext_digits", in_channels=3)
    )
    flipped = [Codebook(b.codewords.flip(0)) for b in model.stage_codebooks]
    other = create_model("coded_resnext_digits", codebooks=flipped)
    for way in ("bare", "our model file of another name"):
        assert "codewords of coded stage 1 differ" in said(way, other)
    named = create_model("coded_resnext_digits", class_names=list("jihgfedcba"))
    assert "expected weights for the classes a, b, c" in said(
        "our model file of another name", named
    )
    wrong = named.state_dict() | {"stages.1.0.codewords": torch.ones(10, 10, dtype=torch.bool)}
    torch.save(wrong, tmp_path / "ones.pt")
    with pytest.raises(ValueError, match=r"ones\.pt: stages\.1\.0\.codewords"):
        load_weights(model, tmp_path / "ones.pt")


def test_a_warm_start_says_which_codewords_are_not_the_weights_own():
    """timm#1278: a network of other branches took the weights, and said that nothing was fresh."""
    model = create_model("coded_resnext_digits")
    flipped = [Codebook(b.codewords.flip(0)) for b in model.stage_codebooks]
    source = create_model("coded_resnext_digits", codebooks=flipped)
    assert load_plain_weights(model, source.state_dict()).fresh == tuple(
        f"stages.{stage}.{block}.codewords" for stage in (1, 2) for block in (0, 1)
    )
