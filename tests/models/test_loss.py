"""The training loss: its terms, and errors that name the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.helpers import needs_triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coded_resnext import Codebook, CodedLoss, CodedResNeXt, Stage
from coded_resnext.kernels import coding_loss
from coded_resnext.models.loss import masked_gradients

BOOKS = [
    Codebook.from_words(["1100", "0110", "0011"]),
    Codebook.from_words(["1000", "0100", "0010"]),
]
LOGITS = torch.tensor([[2.0, 0.5, -1.0], [0.0, 0.0, 1.0]])
ENERGIES = [torch.tensor([[2.0, 1.5, 0.5, 0.0]] * 2), torch.tensor([[1.0, 3.0, 0.0, 0.0]] * 2)]
TARGETS = torch.tensor([0, 2])
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]


def test_total_is_cross_entropy_plus_weighted_coding_losses() -> None:
    terms = CodedLoss(BOOKS, weight=3.0, exponent=2.0, threshold=0.1)(LOGITS, ENERGIES, TARGETS)
    coding = [
        coding_loss(e, book.codewords, TARGETS, exponent=2, threshold=0.1)
        for e, book in zip(ENERGIES, BOOKS, strict=True)
    ]
    expected = {
        "total": F.cross_entropy(LOGITS, TARGETS) + 3 * sum(coding),
        "cross_entropy": F.cross_entropy(LOGITS, TARGETS),
        "coding_1": coding[0],
        "coding_2": coding[1],
    }
    assert list(terms.named()) == list(expected)
    for name, value in terms.named().items():
        assert value.item() == pytest.approx(expected[name].item()), name
    assert terms.named()["total"] is terms.total
    assert [value.item() for value in terms.coding] == pytest.approx([c.item() for c in coding])


def test_label_smoothing_touches_the_cross_entropy_only() -> None:
    sharp = CodedLoss(BOOKS)(LOGITS, ENERGIES, TARGETS)
    smooth = CodedLoss(BOOKS, label_smoothing=0.1)(LOGITS, ENERGIES, TARGETS)
    # The same instructions on the same data.
    assert smooth.coding == sharp.coding
    smoothed = F.cross_entropy(LOGITS, TARGETS, label_smoothing=0.1)
    assert smooth.cross_entropy.item() == pytest.approx(smoothed.item())
    assert smooth.cross_entropy.item() != pytest.approx(sharp.cross_entropy.item())


def test_soft_targets_that_are_certain_equal_hard_ones() -> None:
    hard = CodedLoss(BOOKS)(LOGITS, ENERGIES, TARGETS)
    soft = CodedLoss(BOOKS)(LOGITS, ENERGIES, F.one_hot(TARGETS, 3).float())
    assert soft.total.item() == pytest.approx(hard.total.item())


def test_plain_network_has_the_cross_entropy_alone() -> None:
    terms = CodedLoss([])(LOGITS, [], TARGETS)
    assert terms.coding == ()
    assert terms.total == terms.cross_entropy


def test_terms_are_float32_for_half_precision_logits() -> None:
    terms = CodedLoss(BOOKS)(LOGITS.bfloat16(), ENERGIES, TARGETS)
    assert terms.total.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, "weight: .* at least 0, got -1.0"),
        ({"weight": float("inf")}, "weight: .* got inf"),
        ({"exponent": 0.5}, "exponent: .* at least 1, got 0.5"),
        ({"threshold": -0.1}, "threshold: .* got -0.1"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected 0 <= s < 1, got 1.0"),
    ],
)
def test_constructor_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodedLoss(BOOKS, **arguments)


def test_codebooks_of_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="codebooks: block 1 and block 0 differ"):
        CodedLoss([BOOKS[0], BOOKS[1].with_class_names(list("abc"))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, -1])}, "targets: expected classes 0 to 2, got -1"),
        ({"targets": torch.tensor([0, 3])}, "targets: expected classes 0 to 2, got 3"),
        ({"targets": torch.tensor([0, 1, 2])}, r"targets: expected shape \[2\] or \[2, 3\]"),
        ({"logits": torch.full((2, 3), torch.nan)}, "logits: expected finite numbers"),
        ({"logits": torch.zeros(0, 3)}, r"logits: expected \[B, K\] with B >= 1, got \[0, 3\]"),
        ({"energies": ENERGIES[:1]}, "energies: expected one tensor for each of 2 .* got 1"),
        ({"energies": [ENERGIES[0], ENERGIES[1] * torch.nan]}, "energies: expected finite"),
    ],
)
def test_forward_refuses(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"logits": LOGITS, "energies": ENERGIES, "targets": TARGETS}
    with pytest.raises(ValueError, match=message):
        CodedLoss(BOOKS)(**{**arguments, **change})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_seen_wherever_it_is(
    value: float, dtype: torch.dtype
) -> None:
    for size in (1, 7, 8, 33, 64):
        for place in {0, size // 2, size - 1}:
            logits = torch.randn(size, 3, dtype=dtype)
            logits[place, place % 3] = value
            for layout in (logits, logits.t().contiguous().t()):
                with pytest.raises(ValueError, match="logits: expected finite numbers"):
                    CodedLoss([])(layout, [], torch.zeros(size, dtype=torch.int64))


def test_a_step_pays_for_ignored_labels_only_where_there_are_some() -> None:
    """The usual step was slower by a tenth on small networks; both give the same numbers."""

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    counts, losses = [], []
    for targets in (TARGETS, torch.tensor([0, 2, -100])):
        names: list[str] = []
        filler = len(targets) - len(TARGETS)
        logits = torch.cat([LOGITS, LOGITS[:filler]])
        energies = [torch.cat([e, e[:filler]]) for e in ENERGIES]
        with Operations():
            losses.append(CodedLoss(BOOKS)(logits, energies, targets).total.item())
        counts.append((len(names), "masked_fill" in names))
    assert losses[0] == pytest.approx(losses[1])
    assert counts[0][0] < 0.8 * counts[1][0]
    assert [masked for _, masked in counts] == [False, True]


def test_values_that_are_not_checked_go_into_the_loss() -> None:
    loss = CodedLoss(BOOKS, check_values=False)
    terms = loss(LOGITS * torch.inf, [ENERGIES[0], ENERGIES[1] * torch.nan], TARGETS)
    assert [bool(term.isfinite()) for term in terms.coding] == [True, False]
    assert not terms.cross_entropy.isfinite()
    with pytest.raises(ValueError, match="targets: expected classes 0 to 2, got 3"):
        loss(LOGITS, ENERGIES, torch.tensor([0, 3]))


def terms_by_hand(
    logits: Tensor,
    energies: Tensor,
    words: list[list[int]],
    targets: Any,
    class_weight: list[float],
    exponent: float,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and coding loss of one block, sample by sample: only what has a label counts.

    The mean over class indices is divided by the weights of the labels, that over probabilities by
    the number of samples, as PyTorch documents `nn.CrossEntropyLoss`.
    """
    classes = range(logits.shape[1])
    ratio = sum(words[0]) / len(words[0])
    cross_entropy, coding, total = torch.zeros(()).double(), torch.zeros(()).double(), 0.0
    for row, values, target in zip(logits, energies, targets, strict=True):
        if isinstance(target, int) and target == -100:
            continue
        shares = [float(k == target) for k in classes] if isinstance(target, int) else target
        weight = sum(share * w for share, w in zip(shares, class_weight, strict=True))
        for k in classes:
            log = row[k] - row.exp().sum().log()
            cross_entropy = cross_entropy - shares[k] * class_weight[k] * log
        for n, value in enumerate(values):
            wanted = sum(share * word[n] for share, word in zip(shares, words, strict=True))
            coding = coding + weight * (ratio * value - wanted).abs() ** exponent / len(values)
        total += weight if isinstance(target, int) else 1.0
    return cross_entropy / total, coding / total


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("class_weight", [[1.0, 1.0, 1.0], [0.5, 2.0, 0.0]], ids=["equal", "own"])
@pytest.mark.parametrize(
    "targets",
    [
        [0, -100, 2, 1],
        [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]],
    ],
    ids=["without_a_label", "probabilities"],
)
def test_both_terms_obey_ignored_labels_and_class_weights(
    targets: Any, class_weight: list[float], backend: Any
) -> None:
    """focal_loss_torch#16: a term of one's own went on counting what cross-entropy left out."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if backend == "torch" else torch.float32
    logits = torch.randn(4, 3, generator=generator).to(dtype).requires_grad_()
    energies = (2 * torch.rand(4, 4, generator=generator)).to(dtype).requires_grad_()
    loss = CodedLoss(
        BOOKS[:1],
        weight=3.0,
        exponent=2.5,
        class_weight=torch.tensor(class_weight) if class_weight[0] != 1 else None,
        backend=backend,
    )
    labels = torch.tensor(targets, dtype=dtype if isinstance(targets[0], list) else torch.int64)
    terms = loss(logits, [energies], labels)
    words = BOOKS[0].codewords.int().tolist()
    leaves = [value.detach().double().requires_grad_() for value in (logits, energies)]
    expected = terms_by_hand(leaves[0], leaves[1], words, targets, class_weight, 2.5)
    # Powers by exp2 and log2 in float32; the order of a few sums in float64.
    tolerance = (
        {"rtol": 1e-12, "atol": 1e-14} if backend == "torch" else {"rtol": 2e-6, "atol": 1e-6}
    )
    for term, value in zip((terms.cross_entropy, terms.coding[0]), expected, strict=True):
        torch.testing.assert_close(term.double(), value, **tolerance)
    gradients = torch.autograd.grad(terms.total, [logits, energies])
    by_hand = torch.autograd.grad(expected[0] + 3 * expected[1], leaves)
    for gradient, value in zip(gradients, by_hand, strict=True):
        torch.testing.assert_close(gradient.double(), value, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_without_a_label_may_hold_anything(backend: Any) -> None:
    """pytorch#183608: what is left out has no gradient, even where its numbers are not finite."""
    energies = ENERGIES[0].clone()
    energies[1] = torch.nan
    energies.requires_grad_()
    loss = CodedLoss(BOOKS[:1], check_values=False, backend=backend)
    terms = loss(LOGITS, [energies], torch.tensor([0, -100]))
    alone = loss(LOGITS[:1], [energies[:1]], torch.tensor([0]))
    assert terms.total.item() == pytest.approx(alone.total.item())
    (gradient,) = torch.autograd.grad(terms.total, energies)
    assert gradient[0].isfinite().all()
    assert not gradient[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", [-1, 3, 7, -(2**40), 2**40])
def test_a_label_that_is_no_class_is_nan_where_values_are_not_read(
    label: int, backend: Any
) -> None:
    """pytorch#135546: under `torch.compile` -100 was class 900, and in the kernel class K was the
    next block's first one."""
    loss = CodedLoss(BOOKS, backend=backend, class_weight=torch.tensor([1.0, 0.5, 0.0]))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    logits, energies = (
        LOGITS.clone().requires_grad_(),
        [e.clone().requires_grad_() for e in ENERGIES],
    )
    terms = compiled(logits, energies, torch.tensor([0, label]))
    assert all(term.isnan() for term in (terms.cross_entropy, *terms.coding))
    gradients = torch.autograd.grad(terms.total, [logits, *energies])
    assert all(gradient.isnan().any() for gradient in gradients)
    good = compiled(logits, energies, torch.tensor([0, -100]))
    expected = loss(LOGITS[:1], [e[:1] for e in ENERGIES], TARGETS[:1])
    assert good.total.item() == pytest.approx(expected.total.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("class_weight", "message"),
    [
        (torch.ones(2), r"class_weight: expected floating-point numbers \[3\], got .* \[2\]"),
        (torch.tensor([1, 1, 1]), "class_weight: expected floating-point numbers .* torch.int64"),
        (torch.tensor([1.0, -1.0, 1.0]), "class_weight: expected finite numbers of at least 0"),
        (torch.tensor([1.0, torch.nan, 1.0]), "class_weight: expected finite numbers"),
    ],
)
def test_class_weights_that_are_none(class_weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodedLoss(BOOKS, class_weight=class_weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_as_labels(backend: Any) -> None:
    """pytorch#12670: what is to be ignored, and the number of classes, were brought to 8 bits."""
    codewords = torch.eye(20, dtype=torch.bool).repeat(15, 1)
    energies = 2 * torch.rand(3, 20, generator=torch.Generator().manual_seed(0))
    for labels in ([156, 3, 44], [255, 0, 156]):
        losses = [
            coding_loss(energies, codewords, torch.tensor(labels, dtype=dtype), backend=backend)
            for dtype in (torch.uint8, torch.int64)
        ]
        assert losses[0].item() == pytest.approx(losses[1].item())
    with pytest.raises(ValueError, match="targets: expected classes 0 to 2, got 156"):
        CodedLoss(BOOKS)(LOGITS, ENERGIES, torch.tensor([0, 156], dtype=torch.uint8))


@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_masked_gradients_are_those_of_the_definition(backend: Any) -> None:
    """As published: behind the normalisation, what other branches wrote is a constant."""
    torch.manual_seed(0)
    stages = [Stage(2, 8, 3, 4, 2), Stage(1, 12, 3, 4, 1, stride=2)]
    model = CodedResNeXt(stages, 3, codebooks=BOOKS, stem_channels=8, drop_branches=0.0)
    for block in model.double().blocks:
        torch.nn.init.normal_(block.expand_bn.weight)
        block.backend = backend
    x, targets = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 0])

    def defined(x: Tensor) -> Tensor:
        x = model.stem(x)
        for block in model.blocks:
            h = F.relu(block.grouped_bn(block.grouped(F.relu(block.reduce_bn(block.reduce(x))))))
            branches = h.unflatten(1, (4, -1))
            weight = block.expand.weight[:, :, 0, 0].unflatten(1, (4, -1))
            y = torch.einsum("bndhw,cnd->bnchw", branches, weight)
            y = y / y.square().mean((1, 2, 3, 4), keepdim=True).sqrt()
            own = block.codewords[targets][:, :, None, None, None]
            y = torch.where(own, y, y.detach()).sum(1)
            x = F.relu(block.expand_bn(y) + block.skip(x))
        return model.head(x.mean((2, 3)))

    def gradients(logits: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(F.cross_entropy(logits, targets), model.parameters()))

    expected = gradients(defined(x))
    with masked_gradients(model, targets):
        logits = model(x)
    torch.testing.assert_close(logits, defined(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(logits), expected, rtol=1e-8, atol=1e-12)
    # Outside of it, all branches learn again.
    assert not torch.allclose(gradients(model(x))[3], expected[3], rtol=1e-3)
    assert not any(block.expand._forward_hooks for block in model.blocks)


def test_the_definition_has_no_layers_to_mask_the_gradients_of() -> None:
    model = CodedResNeXt([Stage(1, 8, 3, 4, 2)], 3, codebooks=BOOKS[:1], backend="reference")
    with (
        pytest.raises(ValueError, match="backend: expected one that calls the layers"),
        masked_gradients(model, TARGETS),
    ):
        pass
