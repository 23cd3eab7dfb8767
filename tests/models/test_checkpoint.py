"""Model files and training states: what comes back, what is refused, what a crash leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import assert_same_network

from coded_resnext import Codebook, create_model
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.models.checkpoint import load_model, save_model

PREPROCESSING = Preprocessing(size=8, channels=1, mean=(0.3,), std=(0.4,))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A model file with names, preprocessing and notes."""
    torch.manual_seed(0)
    model = create_model("coded_resnext_digits", class_names=list("abcdefghij"), head_bias=True)
    save_model(
        tmp_path / "model.safetensors", model, preprocessing=PREPROCESSING, training={"seed": 3}
    )
    return tmp_path / "model.safetensors"


def rewrite(path: Path, **changes: Any) -> None:
    """Change fields of the header and keep the tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["coded_resnext"])
    save_file(load_file(path), path, {"coded_resnext": json.dumps({**description, **changes})})


def test_round_trip(path: Path) -> None:
    torch.manual_seed(0)
    original = create_model("coded_resnext_digits", class_names=list("abcdefghij"), head_bias=True)
    loaded = load_model(path)
    assert not loaded.model.training
    assert loaded.preprocessing == PREPROCESSING
    assert loaded.training == {"seed": 3}
    assert loaded.model.codebooks == original.codebooks
    assert loaded.model.class_names == tuple("abcdefghij")
    x = torch.randn(2, 1, 8, 8)
    assert_same_network(loaded.model, original.eval(), x)
    # A folder stands for the model file in it.
    assert_same_network(load_model(path.parent).model, loaded.model, x)


def test_plain_and_float64_models_round_trip(tmp_path: Path) -> None:
    model = create_model("resnext_digits", class_names=list("klmnopqrst")).double().eval()
    save_model(tmp_path / "m.safetensors", model)
    loaded = load_model(tmp_path / "m.safetensors")
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    assert_same_network(loaded.model, model, x)
    assert loaded.model.class_names == model.class_names
    assert loaded.preprocessing is None


def test_expected_codebooks_are_compared(path: Path) -> None:
    books = list(load_model(path).model.stage_codebooks)
    load_model(path, codebooks=books)
    with pytest.raises(ValueError, match="codebooks: expected 2 as in the checkpoint, got 1"):
        load_model(path, codebooks=books[:1])
    swapped = [books[0], Codebook.from_words(books[1].words[::-1], books[1].class_names)]
    with pytest.raises(ValueError, match="codewords of coded stage 2 differ"):
        load_model(path, codebooks=swapped)
    renamed = [book.with_class_names(list("jihgfedcba")) for book in books]
    with pytest.raises(ValueError, match="classes and class order of the checkpoint"):
        load_model(path, codebooks=renamed)


def test_header_and_weights_must_agree_on_the_codewords(path: Path) -> None:
    books = [book.to_dict() for book in load_model(path).model.stage_codebooks]
    books[0]["codewords"] = books[0]["codewords"][::-1]
    rewrite(path, codebooks=books)
    with pytest.raises(ValueError, match="trained for other codewords"):
        load_model(path)


def test_class_order_of_header_and_codebooks_must_agree(path: Path) -> None:
    rewrite(path, class_names=list("jihgfedcba"))
    with pytest.raises(ValueError, match="class_names: expected the classes of the codebooks"):
        load_model(path)


def test_other_format_version(path: Path) -> None:
    rewrite(path, format_version=99)
    with pytest.raises(ValueError, match="format_version: expected 1, got 99"):
        load_model(path)


def test_truncated_foreign_and_missing_files(path: Path, tmp_path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a readable model file"):
        load_model(path)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not one of a Coded ResNeXt"):
        load_model(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none.safetensors: expected a model file"):
        load_model(tmp_path / "none.safetensors")


def test_missing_fields_and_tensors(path: Path) -> None:
    tensors = load_file(path)
    rewrite(path, config={"num_classes": 10})
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load_model(path)
    save_model(path, create_model("coded_resnext_digits"))
    del tensors["stem.0.weight"]
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"(?s)damaged or incomplete.*stem\.0\.weight"):
        load_model(path)


@pytest.mark.parametrize("wrap", ["compiled", "parallel", "compiled block"])
def test_a_wrapped_network_is_written_as_the_network(tmp_path: Path, wrap: str) -> None:
    """pytorch#101107, transformers#14218."""
    model = create_model("coded_resnext_digits")
    wrapped: torch.nn.Module = model
    if wrap == "compiled":
        wrapped = torch.compile(model, backend="eager")  # type: ignore[assignment]
    elif wrap == "parallel":
        wrapped = torch.nn.DataParallel(model)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    if wrap == "compiled block":
        block = torch.compile(model.blocks[0], backend="eager")
        model.stages[0][0] = block  # type: ignore[index]
    save_model(tmp_path / "m.safetensors", wrapped)
    loaded = load_model(tmp_path / "m.safetensors").model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


@pytest.mark.parametrize("bias", [False, True])
def test_a_replaced_head_is_refused_before_writing(tmp_path: Path, bias: bool) -> None:
    """timm#2003, lightning#20233."""
    model = create_model("coded_resnext_digits")
    model.head = torch.nn.Linear(200, 7, bias=bias)
    with pytest.raises(ValueError, match="head"):
        save_model(tmp_path / "m.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_tensors_keep_their_own_precision(tmp_path: Path) -> None:
    """A bfloat16 network whose last BatchNorm is in float32 comes back so."""
    model = create_model("coded_resnext_digits").bfloat16()
    model.blocks[-1].expand_bn.float()
    save_model(tmp_path / "m.safetensors", model)
    loaded = load_model(tmp_path / "m.safetensors").model.state_dict()
    assert {k: v.dtype for k, v in loaded.items()} == {
        k: v.dtype for k, v in model.state_dict().items()
    }


def test_a_network_does_not_change_with_its_file(path: Path) -> None:
    network = load_model(path).model
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(10000))
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())


def test_tied_weights_are_written_twice(tmp_path: Path) -> None:
    """safetensors#202: two names of one tensor ended in advice about another function."""
    model = create_model("coded_resnext_digits").eval()
    first, second = model.stages[1]
    second.grouped.weight = first.grouped.weight
    save_model(tmp_path / "tied.safetensors", model)
    x = torch.randn(2, 1, 8, 8)
    loaded = load_model(tmp_path / "tied.safetensors").model
    # Copies of the same numbers in the same network.
    torch.testing.assert_close(loaded(x), model(x))
