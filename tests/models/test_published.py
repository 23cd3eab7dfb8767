"""Published weights: shapes and names that do not fit are said. Values: test_golden.py."""

from __future__ import annotations

import pytest
import torch
from support.helpers import below, load_golden

from coded_resnext.models.published import (
    published_block,
    published_block_state,
    published_model,
    published_model_state,
)

META, GOLDEN = load_golden("block_cifar10_5of10_train")
STATE = below(GOLDEN, "state.")
NET_META, NET = load_golden("net_cifar10")
NET_STATE = below(NET, "state.")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in STATE.items()}
    block = published_block(state, stride=1)
    assert {p.dtype for p in block.parameters()} == {dtype}
    back = published_block_state(block)
    for name, value in state.items():
        assert torch.equal(back[name], value), name


def test_numpy_arrays_are_taken() -> None:
    block = published_block({k: v.numpy() for k, v in STATE.items()}, stride=1)
    assert torch.equal(block.reduce.weight, STATE["conv_reduce.weight"])


def test_all_ones_make_a_plain_block_and_back() -> None:
    plain = below(NET_STATE, "net_list.3.")
    block = published_block(plain, stride=1)
    assert block.codebook is None
    back = published_block_state(block, num_classes=10)
    assert back["Mask_perClass"].shape == (10, 10)
    assert back["Mask_perClass"].all()
    with pytest.raises(ValueError, match="num_classes: expected the number of classes"):
        published_block_state(block)


def test_stages_are_recognised() -> None:
    model = published_model(NET_STATE, NET_META["architecture"], class_names=list("abcdefghij"))
    assert [stage["depth"] for stage in model.config["stages"]] == [1, 2, 1]
    assert model.codebooks[0] is model.codebooks[1]
    assert model.class_names == tuple("abcdefghij")


def test_imagenet_stem_and_a_biased_head_go_both_ways() -> None:
    torch.manual_seed(0)
    layers = ["conv7_in3_out16", "bn2D_in16", "relu", "maxPool3", [16, 16, 2, 1, "10/10", 0.1]]
    architecture = [*layers, "avgPool8", "flatten", "linear_in16"]
    block = {
        "Mask_perClass": torch.ones(3, 10).bool(),
        "conv_reduce.weight": torch.randn(20, 16, 1, 1),
        "conv_internal.weight": torch.randn(20, 2, 3, 3),
        "conv_expand.weight": torch.randn(16, 20, 1, 1),
    }
    norms = {"bn_reduce": 20, "bn_internal": 20, "bn_expand": 16}
    for name, channels in norms.items():
        for kind in ("weight", "bias", "running_mean", "running_var"):
            block[f"{name}.{kind}"] = torch.rand(channels)
    state = {f"net_list.4.{k}": v for k, v in block.items()}
    state |= {f"net_list.1.{k}": torch.rand(16) for k in ("weight", "bias")}
    state |= {f"net_list.1.running_{k}": torch.rand(16) for k in ("mean", "var")}
    state |= {"net_list.0.weight": torch.randn(16, 3, 7, 7)}
    state |= {"net_list.7.weight": torch.randn(3, 16), "net_list.7.bias": torch.randn(3)}
    model = published_model(state, architecture)
    assert model.config["stem"] == "conv7x7"
    assert model.config["drop_branches"] == 0.1
    back = {k: v for k, v in published_model_state(model).items() if "num_batches" not in k}
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_reduce.weight": None}, "state_dict: expected a tensor 'conv_reduce.weight'"),
        ({"bn_internal.bias": None}, "state_dict: expected a tensor 'bn_internal.bias'"),
        (
            {"conv_internal.weight": torch.zeros(36, 4, 3, 3)},
            "conv_internal.weight: expected 10 branches of width 4 .* got shape",
        ),
        (
            {"conv_expand.weight": torch.zeros(641, 4, 1, 1)},
            r"conv_expand.weight: expected \[10 \* C, D, 1, 1\]",
        ),
        (
            {"Mask_perClass": torch.eye(10) + torch.eye(10).roll(1, 0) * torch.eye(10)[0]},
            "codewords: expected the same number of ones in every row",
        ),
    ],
)
def test_block_that_does_not_fit(change: dict[str, torch.Tensor | None], message: str) -> None:
    state = {k: v for k, v in {**STATE, **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        published_block(state, stride=1)


def test_wrong_shapes_and_strangers_are_named() -> None:
    with pytest.raises(ValueError, match=r"expand_bn\.bias is \[3\], expected \[64\]"):
        published_block({**STATE, "bn_expand.bias": torch.zeros(3)}, stride=1)
    architecture = NET_META["architecture"]
    wrong = {**NET_STATE, "net_list.1.weight": torch.zeros(5)}
    with pytest.raises(ValueError, match=r"net_list\.1\.weight is \[5\], expected \[16\]"):
        published_model(wrong, architecture)
    missing = {k: v for k, v in NET_STATE.items() if k != "net_list.1.bias"}
    with pytest.raises(ValueError, match=r"no net_list\.1\.bias"):
        published_model(missing, architecture)
    stranger = {**NET_STATE, "net_list.3.extra.weight": torch.zeros(5)}
    with pytest.raises(ValueError, match=r"architecture alone, got net_list\.3\.extra\.weight"):
        published_model(stranger, architecture)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[:3],
        lambda a: ["conv5_in3_out16", *a[1:]],
        lambda a: [*a[:-3], "maxPool8", *a[-2:]],
        lambda a: [*a[:4], "relu", *a[4:]],
    ],
)
def test_unknown_architecture(change: object) -> None:
    with pytest.raises(ValueError, match="architecture: expected"):
        published_model(NET_STATE, change(NET_META["architecture"]))  # type: ignore[operator]
