"""Published weights: shapes and names that do not fit are said. Values: test_golden.py."""

from __future__ import annotations

import pytest
import torch
from support.helpers import below, imagenet_layout, load_golden

from coded_resnext import create_model
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


def test_the_published_imagenet_network_goes_both_ways() -> None:
    """The whole network in its published layout comes back bit for bit, and is the named one."""
    ratios = ["32/32", "32/32", "16/32", "8/32"]
    architecture, state = imagenet_layout([3, 4, 6, 3], ratios, 64, 1000)
    assert len(architecture) == 22
    assert "net_list.21.weight" in state
    model = published_model(state, architecture)
    with torch.device("meta"):
        named = create_model("coded_resnext50_32x4d", codebook_variant="paper")
    assert model.config == named.config
    assert [book.words for book in model.stage_codebooks] == [
        book.words for book in named.stage_codebooks
    ]
    back = published_model_state(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    # Branch by branch, the expand weight is the published one.
    block = model.coded_blocks[0]
    grouped = state["net_list.11.conv_expand.weight"].view(32, 1024, 16)
    assert torch.equal(block.expand.weight[:, 16 * 5 : 16 * 6, 0, 0], grouped[5])


def test_a_biased_head_and_another_probability() -> None:
    architecture, state = imagenet_layout([1, 1], ["10/10", "3/10"], 16, 10)
    state["net_list.7.bias"] = torch.rand(10)
    model = published_model(state, architecture, drop_branches=0.3)
    assert model.config["drop_branches"] == 0.3
    back = published_model_state(model)
    assert torch.equal(back["net_list.7.bias"], state["net_list.7.bias"])


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
        lambda a: [*a[:-3], "avgPoolWithMean", *a[-2:]],
    ],
)
def test_unknown_architecture(change: object) -> None:
    with pytest.raises(ValueError, match="architecture: expected"):
        published_model(NET_STATE, change(NET_META["architecture"]))  # type: ignore[operator]
