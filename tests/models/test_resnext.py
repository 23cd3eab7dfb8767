"""The network and its registry."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from support.helpers import assert_alike, relative_error

from coded_resnext import Codebook, CodedLoss, CodedResNeXt, Stage, create_model, list_models

STAGES = [Stage(1, 8, 2, 4, 4), Stage(2, 12, 2, 4, 2), Stage(1, 16, 3, 4, 1, stride=2)]
BOOKS = [
    Codebook.from_words(["1100", "0110", "0011"]),
    Codebook.from_words(["1000", "0100", "0010"]),
]


def make_model(**changes: Any) -> CodedResNeXt:
    """A small network: one plain block, two of one codebook, one of another."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "stages": STAGES,
        "num_classes": 3,
        "codebooks": BOOKS,
        "stem_channels": 8,
        **changes,
    }
    model = CodedResNeXt(**arguments)
    for block in model.blocks:
        torch.nn.init.ones_(block.expand_bn.weight)
    return model


IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnext29_10x11d", 4.64), ("resnext29_20x6d", 4.75), ("resnext50_32x4d", 25.03)],
)
def test_parameters_of_the_papers_networks(name: str, millions: float) -> None:
    for prefix in ("coded_", ""):
        parameters = sum(p.numel() for p in create_model(prefix + name).parameters())
        assert round(parameters / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("name", "ratios"),
    [
        ("coded_resnext29_10x11d", [5] * 3 + [3] * 3),
        ("coded_resnext29_20x6d", [8] * 3 + [4] * 3),
        ("coded_resnext50_32x4d", [16] * 6 + [8] * 3),
        ("coded_resnext50_32x4d_c3", [24] * 4 + [16] * 6 + [8] * 3),
        ("coded_resnext50_32x4d_c4", [16] * 3 + [8] * 6),
        ("coded_resnext50_32x4d_c5", [16] * 6 + [4] * 3),
        ("resnext50_32x4d", []),
    ],
)
def test_active_branches_of_the_papers_networks(name: str, ratios: list[int]) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert [book.active for book in model.codebooks] == ratios


@pytest.mark.parametrize("stage", ["c3", "c4", "c5"])
def test_variants_of_the_appendix_differ_in_ratios_alone(stage: str) -> None:
    with torch.device("meta"):
        base, model = (
            create_model(f"coded_resnext50_32x4d{end}", codebook_variant="paper")
            for end in ("", f"_{stage}")
        )
    sizes = [[p.shape for p in network.parameters()] for network in (base, model)]
    assert sizes[0] == sizes[1]
    assert [block.stride for block in model.blocks] == [block.stride for block in base.blocks]
    published = {
        active: Codebook.shipped(1000, 32, active, "paper").words for active in (4, 8, 16, 24)
    }
    assert all(book.words == published[book.active] for book in model.codebooks)
    with pytest.raises(ValueError, match="name: expected one of"):
        create_model(f"resnext50_32x4d_{stage}")


def test_cifar10_network_has_the_published_codebooks() -> None:
    model = create_model("coded_resnext29_10x11d")
    assert model.class_names[0] == "airplane"
    assert model.codebooks[0].words[0] == "1010100011"
    assert model.codebooks[-1].words[0] == "1001001000"
    renamed = create_model("coded_resnext29_10x11d", class_names=list("abcdefghij"))
    assert renamed.class_names == tuple("abcdefghij")
    assert renamed.codebooks[0].words == model.codebooks[0].words


@pytest.mark.parametrize("name", [n for n in list_models() if "50" not in n])
def test_every_named_network_predicts(name: str) -> None:
    model = create_model(name).eval()
    size = 8 if "digits" in name else 16
    x = torch.randn(2, model.in_channels, size, size)
    logits, energies = model(x, return_energies=True)
    assert logits.shape == (2, model.num_classes)
    assert logits.isfinite().all()
    assert len(energies) == len(model.codebooks)
    for values, book in zip(energies, model.codebooks, strict=True):
        assert values.shape == (2, book.branches)
        assert values.sum(1).tolist() == pytest.approx([book.branches] * 2, rel=1e-5)


def test_imagenet_stem_and_strides() -> None:
    model = make_model(stem="conv7x7")
    assert model.stem(torch.zeros(1, 3, 64, 64)).shape == (1, 8, 16, 16)
    assert [block.stride for block in model.blocks] == [1, 1, 1, 2]


def test_labels_are_never_needed_and_energies_are_optional() -> None:
    model = make_model().eval()
    logits, energies = model(IMAGES, return_energies=True)
    assert_alike(model(IMAGES), logits)
    assert [e.shape for e in energies] == [(5, 4)] * 3
    assert [e.dtype for e in energies] == [torch.float32] * 3


def test_blocks_of_one_codebook_share_a_drop_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(drop_branches=0.5).train()
    seen = []
    for block in model.coded_blocks:
        forward = block.forward
        monkeypatch.setattr(
            block,
            "forward",
            lambda x, forward=forward, **masks: (
                seen.append(masks["drop_mask"]) or forward(x, **masks)
            ),
        )
    model(IMAGES)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize(
    ("actives", "share_masks", "draws"),
    [((2, 4, 2), True, 1), ((2, 4, 4), True, 1), ((2, 2, 1), True, 2), ((2, 4, 2), False, 3)],
)
def test_a_drop_mask_is_kept_over_plain_blocks(
    actives: tuple[int, ...], share_masks: bool, draws: int
) -> None:
    """As published; `share_masks=False` is the ablation in which every block draws its own."""
    stages = [Stage(1 + (i == 0), 8, 2, 4, active) for i, active in enumerate(actives)]
    books = [BOOKS[2 - stage.active] for stage in stages if stage.is_coded]
    model = make_model(
        stages=stages, codebooks=books, drop_branches=0.5, share_masks=share_masks
    ).train()
    drawn = []
    for block in model.coded_blocks:
        block.drop.register_forward_hook(lambda *call: drawn.append(call[-1]))
    model(IMAGES)
    assert len(drawn) == draws
    again = CodedResNeXt.from_config(model.config, model.stage_codebooks)
    assert {block.drop.shared for block in again.blocks} == {share_masks}


def test_keep_by_class_by_sample_and_by_mask_agree() -> None:
    model = make_model().eval()
    one_class = model(IMAGES, keep=1)
    assert_alike(one_class, model(IMAGES, keep=torch.tensor([1] * 5)))
    masks = [book.codewords[1].expand(5, -1) for book in model.codebooks]
    assert_alike(one_class, model(IMAGES, keep=masks))
    classes = torch.tensor([0, 1, 2, 1, 0])
    per_sample = model(IMAGES, keep=classes)
    for index, label in enumerate(classes.tolist()):
        alone = model(IMAGES[index : index + 1], keep=label)
        assert relative_error(per_sample[index : index + 1], alone) < 1e-5
    assert_alike(model(IMAGES, keep=[None] * 3), model(IMAGES))
    assert relative_error(one_class, model(IMAGES)) > 1e-2


def test_keep_equals_the_definition_with_masks() -> None:
    fast, slow = make_model().double().eval(), make_model(backend="reference").double().eval()
    x = IMAGES.double()
    assert relative_error(fast(x, keep=2), slow(x, keep=2)) < 1e-12


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (3, "keep: expected classes 0 to 2, got 3"),
        (-1, "keep: expected classes 0 to 2, got -1"),
        (torch.tensor([0, 1, 2, 3, 0]), "keep: expected classes 0 to 2, got 3"),
        (torch.tensor([0, 1]), r"keep: .* 5 class indices.*\[2\]"),
        (torch.ones(5), "keep: expected a class"),
        ([None], "keep: expected a mask for each of 3 coded blocks, got 1"),
        ([torch.ones(5, 3), None, None], r"keep_mask: expected \[5, 4\], got \[5, 3\]"),
    ],
)
def test_keep_refuses(keep: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model()(IMAGES, keep=keep)


def test_plain_network_refuses_keep() -> None:
    model = make_model(stages=[Stage(1, 8, 2, 4, 4)], codebooks=None)
    with pytest.raises(ValueError, match="keep: expected None"):
        model(IMAGES, keep=0)
    assert model(IMAGES, return_energies=True)[1] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": []}, "stages: expected at least one"),
        ({"num_classes": 1}, "num_classes: expected an integer of at least 2, got 1"),
        ({"num_classes": 4}, r"codebooks: expected .*\(4, 4, 2\).* got \(3, 4, 2\)"),
        ({"codebooks": BOOKS[:1]}, "codebooks: expected one for each of 2 coded stages, got 1"),
        ({"codebooks": BOOKS[::-1]}, r"codebooks: expected .*\(3, 4, 2\).* got \(3, 4, 1\)"),
        (
            {"codebooks": [BOOKS[0], BOOKS[1].with_class_names(list("abc"))]},
            "codebooks: expected the same classes in the same order",
        ),
        ({"class_names": list("abc")}, "class_names: expected the classes of the codebooks"),
        ({"stem": "conv5x5"}, "stem: expected 'conv3x3' or 'conv7x7', got 'conv5x5'"),
        ({"in_channels": 0}, "in_channels: expected a positive integer, got 0"),
        ({"drop_branches": 1.5}, "drop_branches: .* got 1.5"),
    ],
)
def test_constructor_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, 2, 4, 4), "Stage.depth: expected a positive integer, got 0"),
        ((1, 8, 2, 4, 5), "Stage.active: expected at most 4 branches, got 5"),
        ((1, 8, 2.5, 4, 4), "Stage.width: expected a positive integer, got 2.5"),
    ],
)
def test_stage_refuses(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage(*arguments)


@pytest.mark.parametrize(
    "x", [torch.zeros(0, 3, 8, 8), torch.zeros(2, 1, 8, 8), torch.zeros(3, 8, 8)]
)
def test_forward_refuses_other_shapes(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"x: expected \[B, 3, H, W\] with B >= 1"):
        make_model()(x)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_images_in_bytes_are_refused_by_name(dtype: torch.dtype) -> None:
    """super-gradients#1073: "expected scalar type Byte but found Float", from within a layer."""
    with pytest.raises(ValueError, match="x: expected floating-point numbers, as preprocessed"):
        make_model()(torch.zeros(2, 3, 8, 8, dtype=dtype))


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"name: expected one of .*resnext29_10x11d.*'resnet'"):
        create_model("resnet")


def test_overrides_reach_the_network() -> None:
    model = create_model(
        "coded_resnext_digits", num_classes=4, in_channels=3, head_bias=True, drop_branches=0.0
    )
    assert model.head.bias is not None
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 4)
    assert {book.classes for book in model.codebooks} == {4}


def test_concat_ablation_writes_each_branch_into_its_channels() -> None:
    model = make_model(aggregation="concat").eval()
    block = model.coded_blocks[0]
    assert block.expand.weight.shape == (12, 2, 1, 1)
    h = torch.rand(2, 8, 3, 3)
    from coded_resnext.kernels import coded_aggregate

    keep = torch.tensor([[0, 1, 0, 0]] * 2)
    y, _ = coded_aggregate(h, block.expand.weight, 4, keep_mask=keep, aggregation="concat")
    assert (y[:, 3:6] != 0).any()
    assert (y[:, :3] == 0).all()
    assert (y[:, 6:] == 0).all()


def test_training_reduces_the_loss_of_a_batch() -> None:
    model = make_model()
    loss = CodedLoss(model.codebooks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    targets = torch.tensor([0, 1, 2, 1, 0])
    losses = []
    for _ in range(20):
        logits, energies = model(IMAGES, return_energies=True)
        total = loss(logits, energies, targets).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    # 0.02 to 0.08 over eight seeds of weights, here and under the oldest instructions of
    # tests/portability.py: AMD EPYC, torch 2.14.1, 2026-11-29.
    assert losses[-1] < 0.3 * losses[0]


def test_backends_train_alike() -> None:
    """The Gram form and the definition give the same losses over ten steps.

    In float64: in float32 one of eight seeds comes upon an activation that rounding puts on the
    other side of a ReLU, after which losses are 0.4 % apart.
    """
    curves = []
    for backend in ("reference", "torch"):
        model = make_model(backend=backend, drop_branches=0.2).double()
        loss = CodedLoss(model.codebooks)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        torch.manual_seed(3)
        curve = []
        for _ in range(10):
            logits, energies = model(IMAGES.double(), return_energies=True)
            total = loss(logits, energies, torch.tensor([0, 1, 2, 1, 0])).total
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            curve.append(total.item())
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)
    # Losses change from step to step by far more than that.
    assert min(abs(a - b) for a, b in pairwise(curves[0])) > 1e-4


def test_exports_with_dynamic_batch() -> None:
    model = make_model().eval()
    program = torch.export.export(
        model,
        (IMAGES,),
        {"return_energies": True},
        dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}, "return_energies": None},
    )
    for batch in (2, 5):
        logits, energies = program.module()(IMAGES[:batch], return_energies=True)
        expected_logits, expected = model(IMAGES[:batch], return_energies=True)
        assert relative_error(logits, expected_logits) < 1e-5
        assert relative_error(energies[-1], expected[-1]) < 1e-5


def test_compiles_for_batches_of_several_sizes() -> None:
    """From the second size on a batch is a symbol, and mixed precision gives energies of another
    dtype than the maps have."""
    model = make_model()
    compiled = torch.compile(model, backend="aot_eager")
    for batch in (4, 5):
        gradients = []
        for network in (model, compiled):
            torch.manual_seed(1)  # of DropSubNNs
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(IMAGES[:batch])
            logits.float().square().mean().backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert len(gradients[0]) > 20
        for eager, other in zip(*gradients, strict=True):
            assert relative_error(other, eager) < 0.05


@pytest.mark.parametrize("training", [pytest.param(True, marks=pytest.mark.long), False])
def test_compiles_whole(training: bool) -> None:
    model = make_model().double().train(training)
    loss = CodedLoss(model.codebooks)
    targets = torch.tensor([0, 1, 2, 1, 0])

    def step(x: torch.Tensor) -> torch.Tensor:
        logits, energies = model(x, return_energies=True)
        return loss(logits, energies, targets).total

    x = IMAGES.double()
    for block in model.coded_blocks:
        block.drop.p = 0.0
    parameters = list(model.parameters())
    expected = step(x)
    expected_grads = torch.autograd.grad(expected, parameters)
    # Capturing the whole step is the point here; generating code for it takes minutes on a CPU.
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    assert relative_error(found, expected) < 1e-12
    # Biases in front of a BatchNorm have gradients that are rounding noise alone.
    largest = max(float(grad.abs().max()) for grad in expected_grads)
    for grad, wanted in zip(torch.autograd.grad(found, parameters), expected_grads, strict=True):
        assert float((grad - wanted).abs().max()) < 1e-11 * largest


@pytest.mark.parametrize("head_bias", [False, True])
def test_extended_network_knows_what_it_knew(head_bias: bool) -> None:
    model = make_model(head_bias=head_bias, class_names=list("012")).double().eval()
    grown = model.extend_classes(["x"])
    assert grown.class_names == ("0", "1", "2", "x")
    assert not grown.training
    for old, new in zip(model.codebooks, grown.codebooks, strict=True):
        assert new.words[:3] == old.words
        assert new.classes == 4
    x = IMAGES.double()
    logits, energies = model(x, return_energies=True)
    grown_logits, grown_energies = grown(x, return_energies=True)
    assert grown_logits.shape == (5, 4)
    assert torch.equal(grown.head.weight[:3], model.head.weight)
    # A product with four rows instead of three may add up in another order.
    for found, expected in zip(
        [grown_logits[:, :3], *grown_energies], [logits, *energies], strict=True
    ):
        assert_alike(found, expected)
    with pytest.raises(ValueError, match="new_classes: expected at least one name"):
        model.extend_classes([])
    with pytest.raises(ValueError, match=r"new_classes: .* none of the known ones"):
        model.extend_classes(["1"])
    with pytest.raises(ValueError, match=r"new_classes: 4 branches with 1 active"):
        model.extend_classes(["x", "y"])


def test_energies_stay_float32_under_autocast() -> None:
    model = make_model()
    loss = CodedLoss(model.codebooks)
    with torch.autocast("cpu", torch.bfloat16):
        logits, energies = model(IMAGES, return_energies=True)
        terms = loss(logits, energies, torch.tensor([0, 1, 2, 1, 0]))
    assert logits.dtype == torch.bfloat16
    assert {e.dtype for e in energies} == {torch.float32}
    assert terms.total.dtype == torch.float32
    terms.total.backward()
    exact, _ = make_model()(IMAGES, return_energies=True)
    # 0.007 to 0.018 over eight seeds of weights, and of five of them under the oldest instructions
    # of tests/portability.py: AMD EPYC, torch 2.14.1, 2026-11-29.
    assert relative_error(logits.float(), exact) < 0.05
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_state_dict_round_trip_and_other_codewords() -> None:
    model = make_model()
    other = make_model(drop_branches=0.0)
    other.load_state_dict(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert_alike(other.eval()(IMAGES), model.eval()(IMAGES))
    swapped = [Codebook.from_words(["0110", "1100", "0011"]), BOOKS[1]]
    with pytest.raises(ValueError, match="other codewords"):
        make_model(codebooks=swapped).load_state_dict(model.state_dict())


@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_a_walk_is_the_forward_pass(backend: str) -> None:
    model = make_model(backend=backend).double().eval()
    images = IMAGES.double()
    with torch.no_grad():
        logits, energies = model(images, return_energies=True, keep=1)
        steps = list(model.walk(images, keep=1))
        assert [step.block for step in steps] == model.blocks
        walked = [step.energies for step in steps if step.energies is not None]
        for found, expected in zip(walked, energies, strict=True):
            assert torch.equal(found, expected)
        # Behind each block the network goes on from its map to the same logits.
        for position, step in enumerate(steps, 1):
            masks = [b.codewords[1].expand(5, -1) for b in model.blocks[position:]]
            last, _ = model.features(step.map, masks, start=position)
            assert relative_error(model.forward_head(last), logits) < 1e-12


@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_a_walk_goes_on_from_a_map_that_was_replaced(backend: str) -> None:
    model = make_model(backend=backend).double().eval()
    images = IMAGES.double()
    with torch.no_grad():
        for position, step in enumerate(model.walk(images)):
            if position == 1:
                step.map = step.map[[3, 0]]
        assert relative_error(model.forward_head(step.map), model(images[[3, 0]])) < 1e-12


def test_a_walk_stops_and_refuses() -> None:
    model = make_model().eval()
    with torch.no_grad():
        assert len(list(model.walk(IMAGES, stop=2))) == 2
        behind_stem, energies = model.features(IMAGES, stop=0)
        assert torch.equal(behind_stem, model.stem(IMAGES))
        assert energies == []
    # A sequence has a mask for each coded block of the walk: here two of three.
    with pytest.raises(ValueError, match="keep: expected a mask for each of 2 coded blocks, got 3"):
        model.walk(behind_stem, [None] * 3, start=2)
    with pytest.raises(ValueError, match=r"x: expected \[B, 3, H, W\]"):
        model.walk(IMAGES[:, :1])
