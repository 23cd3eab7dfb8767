"""In timm: registration, timm's own generic tests on our networks, weights that come and go.

timm's tests are in its source distribution only. `make timm-tests` fetches it; without it those
tests are skipped.
"""

from __future__ import annotations

import importlib.util
import re
import tarfile
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.helpers import assert_alike, assert_same_network
from support.random_networks import make_random

from coded_resnext import Codebook, CodedLoss, CodedResNeXt, create_model, list_models
from coded_resnext.models.checkpoint import load_model, save_model

timm = pytest.importorskip("timm")
pytest.importorskip("torchvision", reason="timm's tests of models import it")
timm_models = pytest.importorskip("coded_resnext.models.timm_models")

SOURCES = Path(__file__).parents[2] / "build" / "timm"
# Variants that differ in codewords, for which timm's tests have no eye.
VARIANTS = [name for name in list_models() if name[-3:-1] == "_c"]
CODED = [n for n in list_models() if n.startswith("coded_") and n not in VARIANTS]
# Made for grey 8x8 images; some of timm's tests feed larger ones in colour to every network.
COLOUR = [name for name in CODED if "digits" not in name]
# timm has a plain one itself.
PLAIN = [n for n in list_models() if n not in (*CODED, *VARIANTS, "resnext50_32x4d")]
# timm's generic tests: name, arguments behind that of the network, networks.
GENERIC = [
    ("test_model_forward", (1,), CODED + PLAIN),
    ("test_model_backward", (2,), CODED + PLAIN),
    ("test_model_default_cfgs", (1, "meta"), CODED + PLAIN),
    ("test_model_forward_features", (1,), CODED + PLAIN),
    ("test_model_forward_intermediates", (1,), CODED + PLAIN),
    ("test_model_forward_intermediates_features", (1,), CODED + PLAIN),
    ("test_prune_intermediate_layers_contract", (), CODED),
    ("test_prune_intermediate_layers_params_used", (), CODED),
    ("test_prune_intermediate_layers_last_feature", (True,), COLOUR),
    ("test_prune_to_stem_feature", (), COLOUR),
    ("test_forward_intermediates_stop_early_final_norm", ({},), COLOUR),
    ("test_head_hidden_size", ({},), COLOUR),
    ("test_catavgmax_unsupported", (), CODED),
]
# The other generic ones, and why they are not called. Those that are not listed here test one
# family of timm's networks, weights from the network, or the pruning of one network by name.
LEFT_OUT = {
    "test_model_forward_torchscript": "no TorchScript: what forward returns depends on a flag",
    "test_model_forward_fx": "torch.fx does not trace the checks of the input; torch.export does",
    "test_model_backward_fx": "as test_model_forward_fx",
    "test_model_forward_fx_torchscript": "as test_model_forward_fx",
    "test_model_forward_torchscript_with_features_fx": "as test_model_forward_fx",
    "test_model_default_cfgs_non_std": "for transformers; ours pass the standard one",
    "test_model_inference": "compares with published weights",
    "test_model_load_pretrained": "needs published weights",
    "test_model_features_pretrained": "needs published weights",
    "test_reset_classifier_keeps_pool": "pools by the maximum; ours by the mean alone",
    "test_features_only_grad_checkpointing_backward": "no gradient checkpointing",
}


@pytest.fixture(scope="module")
def timm_tests(request: pytest.FixtureRequest) -> ModuleType:
    """timm's `tests/test_models.py`, of the installed version."""
    archive = SOURCES / f"timm-{timm.__version__}.tar.gz"
    if not archive.is_file():
        pytest.skip(f"timm's tests are not here: `make timm-tests` fetches {archive.name}")
    member = f"timm-{timm.__version__}/tests/test_models.py"
    path = SOURCES / member
    path.parent.mkdir(parents=True, exist_ok=True)
    # `extract` with a filter is younger than Python 3.11.
    with tarfile.open(archive) as sources:
        content = sources.extractfile(member)
        assert content is not None
        path.write_bytes(content.read())
    spec = importlib.util.spec_from_file_location("timm_test_models", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    for marker in set(re.findall(r"pytest\.mark\.(\w+)", path.read_text())):
        request.config.addinivalue_line("markers", marker)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        # There timm leaves some of its tests away.
        patch.delenv("GITHUB_ACTIONS", raising=False)
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "arguments", "network"),
    [(name, arguments, network) for name, arguments, names in GENERIC for network in names],
)
def test_generic(timm_tests, name, arguments, network):
    torch.manual_seed(0)
    getattr(timm_tests, name)(network, *arguments)


def test_what_is_left_out_exists(timm_tests):
    for name in LEFT_OUT:
        assert callable(getattr(timm_tests, name, None)), name


def test_all_but_timms_own_are_registered():
    assert sorted(timm.list_models(module="timm_models")) == sorted(CODED + PLAIN + VARIANTS)
    ours = timm.create_model("coded_resnext50_32x4d", num_classes=7, in_chans=1)
    assert ours.default_cfg["architecture"] == "coded_resnext50_32x4d"
    assert type(timm.create_model("resnext50_32x4d")).__module__.startswith("timm.")


def test_it_is_the_network_of_the_registry():
    expected = make_random("coded_resnext_digits")
    model = timm.create_model("coded_resnext_digits", drop_rate=0.5).eval()
    model.load_state_dict(expected.state_dict())
    x = torch.randn(3, 1, 8, 8)
    logits, energies = model(x, return_energies=True)
    reference = expected(x, return_energies=True)
    for found, wanted in zip([logits, *energies], [reference[0], *reference[1]], strict=True):
        assert_alike(found, wanted)
    assert_alike(model(x, keep=3), expected(x, keep=3))
    assert_alike(model.forward_head(model.forward_features(x)), logits)
    assert CodedLoss(model.codebooks)(logits, energies, torch.tensor([0, 1, 2])).total > 0
    # Dropout, before the classifier, is for training alone.
    assert not torch.equal(model.train()(x), logits)


def test_features_are_the_maps_behind_the_stages():
    model = make_random("coded_resnext_digits")
    features = timm.create_model("coded_resnext_digits", features_only=True).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(2, 1, 8, 8)
    expected = [model.stem(x)]
    for stage in model.stages:
        y = expected[-1]
        for block in stage:
            y = block(y)
        expected.append(y)
    found = features(x)
    assert len(found) == 4
    for one, other in zip(found, expected, strict=True):
        assert_alike(one, other)
    assert features.feature_info.channels() == [32, 60, 120, 200]
    assert features.feature_info.reduction() == [1, 1, 2, 2]


def test_other_classes():
    model = timm.create_model("coded_resnext_digits")
    expand = model.coded_blocks[0].expand.weight.clone()
    model.reset_classifier(3, class_names=["ant", "bee", "cat"])
    assert model.class_names == ("ant", "bee", "cat") == model.codebooks[0].class_names
    assert model.codebooks[0] == Codebook.search(3, 10, 5, class_names=["ant", "bee", "cat"])
    assert torch.equal(model.coded_blocks[0].codewords, model.codebooks[0].codewords)
    assert torch.equal(model.coded_blocks[0].expand.weight, expand)
    assert model(torch.randn(2, 1, 8, 8), keep=2).shape == (2, 3)
    kept = model.codebooks
    model.reset_classifier(3)
    assert model.codebooks == kept
    with pytest.raises(AssertionError, match="global_pool: expected 'avg'"):
        model.reset_classifier(3, "max")


def test_weights_of_a_plain_network_by_file(tmp_path):
    plain = make_random("resnext_digits")
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "plain.pth")
    model = timm.create_model(
        "coded_resnext_digits",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "plain.pth"), "num_classes": 10},
    )
    assert torch.equal(model.coded_blocks[3].expand.weight, plain.stages[2][1].expand.weight)
    assert torch.equal(model.head.weight, plain.head.weight)


def test_saved_networks_are_networks_of_ours(tmp_path):
    model = timm.create_model("coded_resnext_digits", num_classes=4).eval()
    save_model(tmp_path / "model.safetensors", model)
    loaded = load_model(tmp_path).model
    x = torch.randn(2, 1, 8, 8)
    assert type(loaded) is CodedResNeXt
    assert_same_network(loaded, model, x)
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="model: expected a network with its classifier"):
        save_model(tmp_path / "model.safetensors", model)
    assert load_model(tmp_path).model.num_classes == 4


def test_reset_of_a_network_without_timm():
    model = create_model("coded_resnext_digits").double().eval()
    model.reset_classifier(12)
    assert model.config["num_classes"] == model.num_classes == 12
    assert model.head.weight.dtype == torch.float64
    assert not model.head.training
    rebuilt = CodedResNeXt.from_config(model.config, model.stage_codebooks).double()
    rebuilt.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="num_classes: expected an integer of at least 2, got 1"):
        model.reset_classifier(1)


def test_pretrained_weights_of_other_codewords_are_refused(tmp_path: Path) -> None:
    """timm#819, timm#1278, simple-HRNet#79."""
    name = "coded_resnext_digits"
    books = create_model(name).stage_codebooks
    file = tmp_path / "mine.safetensors"

    def pretrained() -> CodedResNeXt:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)})

    mine = create_model(name, codebooks=[Codebook(book.codewords.flip(0)) for book in books])
    save_model(file, mine)
    with pytest.raises(ValueError, match="other codewords"):
        pretrained()
    mine = create_model(name)
    save_model(file, mine)
    assert_same_network(pretrained().eval(), mine.eval(), torch.randn(2, 1, 8, 8))


def test_a_grey_network_has_one_mean_and_one_deviation() -> None:
    """timm#976, timm#2234: three numbers went with one channel."""
    config = timm.data.resolve_model_data_config(timm.create_model("coded_resnext_digits"))
    assert (len(config["mean"]), len(config["std"])) == (1, 1)
