"""What people do to a trained network, by what it is then used for; docs/tools.md has the table.

A cell agrees with the network's own layers, called one after another, or is refused by a ValueError
of one sentence that names the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as pruning
from support.small_networks import make_network
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from coded_resnext import CodedResNeXt, extract_classifier, extract_subset, use_grouped_kernels
from coded_resnext.deploy.cost import network_cost
from coded_resnext.deploy.early_exit import EarlyExit, exit_scores, predict_early
from coded_resnext.deploy.export import to_exported_program
from coded_resnext.deploy.extract import load_extracted, save_extracted
from coded_resnext.deploy.hub import Pretrained, from_pretrained, save_pretrained
from coded_resnext.interpret import trace
from coded_resnext.kernels.coded.reference import is_dead
from coded_resnext.models import block as block_module
from coded_resnext.models import layers
from coded_resnext.models.checkpoint import load_model, save_model
from coded_resnext.models.loss import decode

CLASS = 2
BATCH = 5
DOC = Path(__file__).parents[2] / "docs" / "tools.md"


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 1, 6, 6, generator=generator)


class LowRank(nn.Module):
    """An adapter: a frozen layer and a thin one beside it."""

    def __init__(self, inner: nn.Conv2d) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Conv2d(inner.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, inner.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.up(self.down(x))


class Doubled(nn.Conv2d):
    """A subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class FrozenNorm(nn.BatchNorm2d):
    """A BatchNorm that never trains, as detection libraries have it."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


def each(change: Callable[[nn.Module], None]) -> Callable[[CodedResNeXt], CodedResNeXt]:
    """Does something to every block."""

    def changed(model: CodedResNeXt) -> CodedResNeXt:
        for block in model.blocks:
            change(block)
        return model

    return changed


def dilate(block: Any) -> None:
    block.grouped.dilation = block.grouped.padding = (2, 2)


def dilate_alone(block: Any) -> None:
    """Nothing else differs: `same` is the padding that keeps the map, whatever the dilation."""
    if block.stride == 1:
        block.grouped.dilation, block.grouped.padding = (2, 2), "same"


def pad_by_reflection(block: Any) -> None:
    block.grouped.padding_mode = "reflect"
    block.grouped._reversed_padding_repeated_twice = [1, 1, 1, 1]


def fold_norms(block: Any, names: tuple[str, ...] = ("reduce", "grouped", "expand")) -> None:
    """As deployment tools do: one convolution with a bias, and nothing in the norm's place."""
    for name in names:
        norm = f"{name}_bn"
        setattr(block, name, fuse_conv_bn_eval(getattr(block, name), getattr(block, norm)))
        setattr(block, norm, nn.Identity())


def replace(block: Any, name: str, kind: type[nn.Module]) -> None:
    old = getattr(block, name)
    if issubclass(kind, LowRank):
        setattr(block, name, kind(old).eval())
    else:
        old.__class__ = kind


def to_empty(model: CodedResNeXt) -> CodedResNeXt:
    state = model.state_dict()
    with torch.device("meta"):
        fresh = CodedResNeXt.from_config(model.config, model.stage_codebooks)
    fresh.to_empty(device="cpu")
    fresh.load_state_dict({k: v for k, v in state.items() if "codewords" not in k}, strict=False)
    return fresh.eval()


def average(model: CodedResNeXt) -> nn.Module:
    averaged = AveragedModel(model, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(model)
    return averaged.eval()


def without_head(model: CodedResNeXt) -> CodedResNeXt:
    model.head, model.num_classes = nn.Identity(), 0
    return model


def other_head(model: CodedResNeXt) -> CodedResNeXt:
    model.head = nn.Sequential(nn.Dropout(0.0), nn.Linear(16, 4)).eval()
    return model


def quantised(model: CodedResNeXt) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def half_but_norms(model: CodedResNeXt) -> CodedResNeXt:
    model.bfloat16()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return model


DONE: dict[str, Callable[[CodedResNeXt], nn.Module]] = {
    "as it was made": lambda model: model,
    "`expand` pruned": each(lambda b: pruning.l1_unstructured(b.expand, "weight", 0.5)),
    "`grouped` pruned": each(lambda b: pruning.l1_unstructured(b.grouped, "weight", 0.5)),
    "pruned for good": each(
        lambda b: pruning.remove(pruning.l1_unstructured(b.expand, "weight", 0.5), "weight")
    ),
    "old weight norm": each(lambda b: weight_norm(b.expand) and None),
    "weight norm": each(lambda b: parametrizations.weight_norm(b.expand) and None),
    "adapter on `expand`": each(lambda b: replace(b, "expand", LowRank)),
    "`expand` of a subclass": each(lambda b: replace(b, "expand", Doubled)),
    "`reduce` of a subclass": each(lambda b: replace(b, "reduce", Doubled)),
    "hook that halves `expand`": each(
        lambda b: b.expand.register_forward_hook(lambda m, x, y: y / 2) and None
    ),
    "hook that records": each(
        lambda b: b.expand_bn.register_forward_hook(lambda *_: None) and None
    ),
    "`forward` replaced": each(
        lambda b: setattr(b.reduce, "forward", lambda x, c=b.reduce: nn.Conv2d.forward(c, 2 * x))
    ),
    "dilation and padding": each(dilate),
    "dilation alone": each(dilate_alone),
    "reflected padding": each(pad_by_reflection),
    "SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "frozen BatchNorm": each(lambda b: b.grouped_bn.eval().requires_grad_(False) and None),
    "BatchNorm of a subclass": each(lambda b: replace(b, "grouped_bn", FrozenNorm)),
    "other `eps` of BatchNorm": each(
        lambda b: [setattr(getattr(b, name), "eps", 0.1) for name in layers.NORM_NAMES] and None
    ),
    "every BatchNorm folded": each(fold_norms),
    "BatchNorm folded but the last": each(lambda b: fold_norms(b, ("reduce", "grouped"))),
    "float16": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "bfloat16, BatchNorm float32": half_but_norms,
    "dynamic quantisation": quantised,
    "`torch.compile`": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": lambda model: nn.DataParallel(model),
    "AveragedModel with buffers": average,
    "`to_empty` and weights": to_empty,
    "other head": other_head,
    "no head": without_head,
}


def inner(model: nn.Module) -> Any:
    while hasattr(model, "_orig_mod") or hasattr(model, "module"):
        model = getattr(model, "_orig_mod", None) or model.module  # type: ignore[assignment]
    return model


def by_layers(
    network: nn.Module, x: Tensor, kept: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The definition by calls of the layers alone: logits, and energies from branch outputs."""
    model = inner(network)
    x = model.stem(x)
    all_energies = []
    for block in model.blocks:
        h = F.relu(block.reduce_bn(block.reduce(x)))
        h = F.relu(block.grouped_bn(block.grouped(h)))
        if block.codebook is not None:
            hooks, block.expand._forward_hooks = block.expand._forward_hooks, {}
            outputs = []
            for branch in range(block.branches):
                alone = torch.zeros_like(h)
                part = slice(branch * block.width, (branch + 1) * block.width)
                alone[:, part] = h[:, part]
                outputs.append(block.expand(alone))
            block.expand._forward_hooks = hooks
            energy = torch.stack(outputs, 1).float().square().mean((2, 3, 4))
            scale = torch.ones_like(energy)
            if kept is not None:
                scale = block.codebook.codewords[kept].to(energy)
                energy = energy * scale
            mean = energy.mean(1, keepdim=True)
            inverse = torch.where(is_dead(mean), 0, 1 / mean)
            all_energies.append(energy * inverse)
            scale = (scale * inverse.sqrt()).repeat_interleave(block.width, 1)
            h = (h.float() * scale[:, :, None, None]).to(h.dtype)
        x = F.relu(block.expand_bn(block.expand(h)) + block.skip(x))
    return model.head(x.mean((2, 3))), all_energies


def near(actual: Any, expected: Any) -> None:
    """Equal within the roundings of some twenty layers in the dtype."""
    for one, other in zip(actual, expected, strict=True):
        tolerance = {torch.float16: 0.02, torch.bfloat16: 0.15}.get(DTYPE, 2e-4)
        torch.testing.assert_close(
            one.float(), other.float(), rtol=tolerance, atol=tolerance * other.abs().max().item()
        )


DTYPE = torch.float32


def cell_eval(network: Any, x: Tensor, tmp: Path) -> None:
    near([network(x)], [by_layers(network, x)[0]])


def cell_train(network: Any, x: Tensor, tmp: Path) -> None:
    model = inner(network)
    network.train()
    for block in model.blocks:
        block.drop.p = 0.0
        if not all(p.requires_grad for p in block.grouped_bn.parameters()):
            block.grouped_bn.eval()
    results = []
    for run in (lambda: network(x, return_energies=True), lambda: by_layers(network, x)):
        network.zero_grad()
        logits, energies = run()
        loss = logits.float().square().sum() + sum(e.float().pow(3).sum() for e in energies)
        loss.backward()
        gradients = [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
            for p in model.parameters()
        ]
        results.append((logits.detach(), torch.cat(gradients).float()))
    (logits, gradient), (expected, expected_gradient) = results
    near([logits], [expected])
    # Together, since the gradient of a weight before a BatchNorm may be nothing but rounding.
    error = (gradient - expected_gradient).norm() / expected_gradient.norm()
    assert float(error) < {torch.float16: 0.05, torch.bfloat16: 0.3}.get(DTYPE, 1e-4), error


def cell_keep(network: Any, x: Tensor, tmp: Path) -> None:
    near([network(x, keep=CLASS)], [by_layers(network, x, torch.full((BATCH,), CLASS))[0]])


def cell_energies(network: Any, x: Tensor, tmp: Path) -> None:
    near(network(x, return_energies=True)[1], by_layers(network, x)[1])


def cell_fused(network: Any, x: Tensor, tmp: Path) -> None:
    for block in inner(network).blocks:
        block.backend = "fused"
    cell_eval(network, x, tmp)
    with torch.no_grad():
        cell_eval(network, x, tmp)
        cell_keep(network, x, tmp)
    cell_train(network, x, tmp)


def cell_triton(network: Any, x: Tensor, tmp: Path) -> None:
    """In Triton's interpreter, for which small images are enough."""
    for block in inner(network).blocks:
        block.backend = "triton"
    x = x[:2, :, :4, :4]
    with torch.no_grad():
        near([network(x)], [by_layers(network, x)[0]])
    cell_energies(network, x, tmp)


def cell_extract(network: Any, x: Tensor, tmp: Path) -> None:
    expected = by_layers(network, x, torch.full((BATCH,), CLASS))[0][:, CLASS]
    for fold in (False, True):
        near([extract_classifier(network, CLASS, fold_batch_norm=fold)(x)], [expected])


def cell_exit(network: Any, x: Tensor, tmp: Path) -> None:
    criterion = EarlyExit.at_margin(network, 0.0)
    said = predict_early(network, x, criterion, return_energies=True)
    logits, energies = by_layers(network, x)
    near(said.energies[:1], energies[:1])
    never = EarlyExit.at_margin(network, 1.0)
    near([F.one_hot(predict_early(network, x, never).classes, 4)], [F.one_hot(logits.argmax(1), 4)])


def cell_save(network: Any, x: Tensor, tmp: Path) -> None:
    save_model(tmp / "m.safetensors", network)
    loaded = load_model(tmp / "m.safetensors").model
    for block in inner(network).blocks:  # A file holds weights, and no hooks.
        block.expand._forward_hooks.clear()
    near([loaded(x)], [by_layers(network, x)[0]])


def cell_share(network: Any, x: Tensor, tmp: Path) -> None:
    save_pretrained(Pretrained(network), tmp / "shared")
    loaded = from_pretrained(tmp / "shared").model
    for block in inner(network).blocks:
        block.expand._forward_hooks.clear()
    near([loaded(x)], [by_layers(network, x)[0]])


def cell_export(network: Any, x: Tensor, tmp: Path) -> None:
    program = to_exported_program(network, image_size=6)
    near([program.module()(x)], [by_layers(network, x)[0]])


def cell_extend(network: Any, x: Tensor, tmp: Path) -> None:
    near([inner(network).extend_classes(["eel"])(x)[:, :4]], [by_layers(network, x)[0]])


def cell_cost(network: Any, x: Tensor, tmp: Path) -> None:
    model = inner(network)
    counted: list[int] = []

    def count(layer: Any, inputs: Any, y: Tensor) -> None:
        each_output = layer.weight[0].numel() if callable(getattr(layer.weight, "numel", 0)) else 0
        counted.append(y[0].numel() * (each_output or layer.in_features))

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    pixels: list[int] = []
    for block in model.coded_blocks:
        handles.append(
            block.grouped.register_forward_hook(
                lambda m, x, y, b=block: pixels.append(
                    b.branches * b.width**2 * (y[0, 0].numel() + 1)
                )
            )
        )
    try:
        # Energies ask an adapter for its weight by a call of its own.
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    assert network_cost(network, 6).macs == sum(counted) + sum(pixels)


def cell_trace(network: Any, x: Tensor, tmp: Path) -> None:
    seen = trace(network, x[0])
    logits, energies = by_layers(network, x[:1])
    near([torch.tensor(seen.logits)], logits)
    for block, energy, own in zip(seen.blocks, energies, inner(network).coded_blocks, strict=True):
        near([torch.tensor(block.energies)], own.codebook.ratio * energy)
        assert block.prediction == int(decode(energy, own.codebook))


USES: dict[str, Callable[[Any, Tensor, Path], None]] = {
    "train a step": cell_train,
    "`eval`": cell_eval,
    "`keep`": cell_keep,
    "energies": cell_energies,
    "`fused`": cell_fused,
    "`triton`": cell_triton,
    "extract, fold": cell_extract,
    "early exit": cell_exit,
    "save and load": cell_save,
    "share": cell_share,
    "export": cell_export,
    "extend": cell_extend,
    "cost": cell_cost,
    "trace": cell_trace,
}


# Triton's interpreter and torch.export take seconds.
SLOW = ["`triton`", "export"]
# Of each kind of change one that `make test` takes.
QUICK = {
    *("as it was made", "`expand` pruned", "old weight norm", "adapter on `expand`"),
    *("hook that halves `expand`", "SyncBatchNorm", "frozen BatchNorm", "every BatchNorm folded"),
    *("bfloat16", "no head"),
}


def regular(setting: str, value: Any) -> Callable[..., str | None]:
    """The check of a convolution, but for one setting, which it takes to be the usual one."""
    check = layers._convolution

    def shortcut(conv: Any, *sizes: int) -> str | None:
        before = getattr(conv, setting)
        setattr(conv, setting, value)
        try:
            return check(conv, *sizes)
        finally:
            setattr(conv, setting, before)

    return shortcut


def outcome(done: str, use: str, tmp: Path) -> str:
    """`equal` or `refused`; anything else is an error of the test."""
    global DTYPE
    torch.manual_seed(3)
    network = DONE[done](make_network())
    DTYPE = inner(network).blocks[0].reduce.weight.dtype
    x = images().to(DTYPE)
    try:
        USES[use](network, x, tmp)
    except ValueError as error:
        text = str(error)
        assert "\n" not in text, text
        named = ("stem", "stages", "head", "tensors", "model", "expected")
        assert any(word in text for word in named), text
        return "refused"
    return "equal"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("done", "uses"),
    [
        pytest.param(done, uses, marks=[pytest.mark.long] * (uses == SLOW or done not in QUICK))
        for done in DONE
        for uses in ([use for use in USES if use not in SLOW], SLOW)
    ],
)
def test_a_network_in_other_hands(done: str, uses: list[str], tmp_path: Path) -> None:
    documented = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in DOC.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    }
    assert documented["network"] == list(USES)
    cells = [cell for row in documented.values() for cell in row]
    counts = f"{cells.count('equal')} cells are equal, {cells.count('refused')} are refused"
    assert counts in DOC.read_text(encoding="utf-8")
    expected = dict(zip(USES, documented[done], strict=True))
    assert {use: outcome(done, use, tmp_path) for use in uses} == {u: expected[u] for u in uses}


PLANTED: dict[str, tuple[str, Any, str, str]] = {
    # What the one place to ask would no longer see, and the cell that tells.
    "dilation": ("_convolution", regular("dilation", (1, 1)), "dilation alone", "`fused`"),
    "padding": ("_convolution", regular("padding_mode", "zeros"), "reflected padding", "`fused`"),
    "type": (
        "made_as",
        lambda m: nn.Conv2d if isinstance(m, nn.Conv2d) else type(m),
        "`reduce` of a subclass",
        "extract, fold",
    ),
    "hooks": ("_acted_on", lambda _: None, "hook that halves `expand`", "`fused`"),
    "weight": ("applied_weight", lambda m, *_: m.weight, "`expand` of a subclass", "`eval`"),
    "settings": ("DESCRIBED", (), "other `eps` of BatchNorm", "extend"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_shortcut_is_seen(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A way that looks at less than it should ends in another outcome than the table's."""
    name, shortcut, done, use = PLANTED[planted]
    for module in (layers, block_module):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, shortcut)
    with pytest.raises((AssertionError, KeyError, RuntimeError)):
        outcome(done, use, Path())


def test_the_energies_follow_a_pruned_expand() -> None:
    """pytorch#69353, peft#1612: the weight was read, and the hook that makes it came too late."""
    twins = [make_network(), make_network()]
    with torch.no_grad():
        for parameter in twins[1].parameters():
            parameter.mul_(torch.rand_like(parameter))
    for twin in twins:
        DONE["`expand` pruned"](twin)
    twins[1].load_state_dict(twins[0].state_dict())
    near([twins[1](images())], [twins[0](images())])


def test_grouped_convolutions_that_were_dilated_since() -> None:
    """segmentation_models.pytorch#125, diffusers#2633: kernels were given the stride alone."""
    conv = nn.Conv2d(8, 8, 3, 1, 1, groups=2)
    network = nn.Sequential(conv)
    assert use_grouped_kernels(network, "torch") == 1
    conv.dilation = conv.padding = (2, 2)
    x = torch.randn(2, 8, 6, 6)
    expected = F.conv2d(x, conv.weight, conv.bias, 1, 2, 2, 2)
    assert use_grouped_kernels(network, "triton") == 0
    conv.backend = "triton"
    near([network(x)], [expected])


def test_codewords_come_back_from_the_codebook() -> None:
    """pytorch#104187, timm#2350: `to_empty` left what memory held, and said nothing."""
    model = to_empty(make_network())
    for block in model.coded_blocks:
        assert torch.equal(block.codewords, block.codebook.codewords)
    other = make_network()
    model.load_state_dict(other.state_dict())
    near([model(images(), keep=1)], [other(images(), keep=1)])
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(torch.equal(b.codewords, b.codebook.codewords) for b in model.coded_blocks)


@pytest.mark.parametrize("decay", [None, 0.99, 0.7])
def test_averaging_buffers_leaves_codewords(decay: float | None) -> None:
    """pytorch#71763, lightning#20545: two booleans were subtracted."""
    model = make_network()
    rule = None if decay is None else get_ema_multi_avg_fn(decay)
    averaged = AveragedModel(model, multi_avg_fn=rule, use_buffers=True)
    for _ in range(4):
        averaged.update_parameters(model)
    near([averaged(images(), keep=CLASS)], [model(images(), keep=CLASS)])
    assert all(torch.equal(b.codewords, b.codebook.codewords) for b in averaged.module.coded_blocks)


def test_sync_batch_norm_is_cut_out_as_batch_norm() -> None:
    """yolov5#1018, mobile-vision#98."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(make_network())
    thin = extract_classifier(model, CLASS, skip_rank=0.5)
    whole = extract_classifier(model, CLASS)
    kinds = {type(m) for m in whole.modules() if "Norm" in type(m).__name__}
    assert kinds == {nn.BatchNorm2d}
    assert thin(images()).shape == (BATCH,)
    for block in model.blocks:
        block.reset_parameters()
        assert (block.expand_bn.weight == 0).all()
        assert (block.grouped_bn.weight == 1).all()


@pytest.mark.parametrize(("setting", "value"), [("eps", 0.1), ("normalize", False)])
def test_a_setting_that_no_file_has_is_not_lost(setting: str, value: Any, tmp_path: Path) -> None:
    """libreyolo#700, keras-resnet#36: what was read again, or extended, computed something else."""
    model = make_network()
    for module in model.modules():
        if hasattr(module, setting):
            setattr(module, setting, value)
    for make in (lambda: save_model(tmp_path / "m", model), lambda: model.extend_classes(["new"])):
        with pytest.raises(ValueError, match=rf"{setting}: expected .*, got {value};"):
            make()
    if setting == "eps":
        part = extract_classifier(model, CLASS)
        near([part(images())], [model(images(), keep=CLASS)[:, CLASS]])
        with pytest.raises(ValueError, match=r"eps: expected 1e-05, got 0\.1"):
            save_extracted(tmp_path / "m", part)
        folded = extract_subset(model, [CLASS], fold_batch_norm=True)
        save_extracted(tmp_path / "m", folded)
        near([load_extracted(tmp_path / "m").network(images())[:, 0]], [part(images())])
    assert not (tmp_path / "m").exists() or setting == "eps"


def test_refused_weights_leave_the_network_whole() -> None:
    """pytorch#40859, pytorch#173488: what fitted had been loaded by the time of the error."""
    model = make_network()
    state = make_network().state_dict()
    before = copy.deepcopy(model.state_dict())
    state["stages.3.0.codewords"] = ~state["stages.3.0.codewords"]
    state["stem.0.weight"] = state["stem.0.weight"] + 1
    with pytest.raises(ValueError, match="trained for other codewords"):
        nn.ModuleDict({"module": model}).load_state_dict(
            {f"module.{name}": value for name, value in state.items()}
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("keep", [[1, 2, 3, 0], True, "cat", 1.0, ["1", None, None]])
def test_keep_of_a_wrong_type_is_named(keep: Any) -> None:
    with pytest.raises(ValueError, match="keep: expected a class, a tensor of class indices"):
        make_network()(images(), keep=keep)


def test_keep_without_a_head_goes_by_the_codebooks() -> None:
    """timm#142, timm#2421."""
    model = make_network()
    expected = model.forward_head(model.features(images(), CLASS)[0], pre_logits=True)
    near([without_head(model)(images(), keep=CLASS)], [expected])


def test_early_predictions_are_ordinary_tensors() -> None:
    """dinov2#472, pytorch#161164: a temperature could not be fitted to what was said."""
    model = make_network()
    said = predict_early(model, images(), EarlyExit.at_margin(model, 0.5), return_energies=True)
    said.classes[0] = 3
    assert not said.energies[0].is_inference()
    scores = exit_scores(model, [(images(), torch.arange(len(images())) % 2)])
    temperature = torch.ones((), requires_grad=True)
    (scores.margins / temperature).sum().backward()
    assert temperature.grad is not None
    assert temperature.grad.isfinite()


def table(tmp: Path) -> str:
    """The matrix as docs/tools.md has it."""
    rows = [["network", *USES], ["---"] * (len(USES) + 1)]
    rows += [[done, *(outcome(done, use, tmp) for use in USES)] for done in DONE]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
