"""The class `Codebook`: its rules, its measures and its files."""

import json
import time

import numpy as np
import pytest
import torch

from coded_resnext.codebooks.codebook import Codebook

ROWS = [[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]]


def test_measures_of_a_small_codebook():
    codebook = Codebook(ROWS, ["cat", "dog", "ship"])
    assert (codebook.classes, codebook.branches, codebook.active) == (3, 4, 2)
    assert codebook.ratio == 0.5
    assert codebook.words == ("1100", "0011", "1010")
    assert codebook.column_loads == (2, 1, 2, 1)
    assert codebook.distances == {2: 2, 4: 1}
    assert codebook.min_distance == 2
    assert codebook.index("ship") == 2
    assert torch.equal(codebook.codewords, torch.tensor(ROWS, dtype=torch.bool))
    assert repr(codebook) == "Codebook(classes=3, branches=4, active=2)"
    assert str(codebook).splitlines()[1:3] == ["cat   1100", "dog   0011"]
    assert "minimum distance 2 (2 pairs), classes per branch 1..2" in str(codebook)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_from_tensors(dtype):
    assert Codebook(torch.tensor(ROWS, dtype=dtype)) == Codebook(ROWS)


def test_is_immutable():
    source = torch.tensor(ROWS, dtype=torch.uint8)
    codebook = Codebook(source)
    source.zero_()
    codebook.codewords.zero_()
    codebook.distances.clear()
    assert codebook == Codebook(ROWS)
    assert codebook.distances == {2: 2, 4: 1}
    assert hash(codebook) == hash(Codebook(ROWS))


def test_equality_looks_at_names_and_words():
    assert Codebook(ROWS) != Codebook(ROWS, ["a", "b", "c"])
    assert Codebook(ROWS).with_class_names(["a", "b", "c"]) == Codebook(ROWS, ["a", "b", "c"])
    assert Codebook(ROWS) != Codebook(ROWS[::-1])
    assert Codebook(ROWS) != "a codebook"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 0]], "at least two classes, got shape [1, 2]"),
        ([1, 0], "expected a matrix [classes, branches]"),
        ([[1, 0], [1]], "expected a matrix [classes, branches]"),
        ([[1, 2], [2, 1]], "expected only 0 and 1, got other values"),
        ([[1.0, 0.5], [0.5, 1.0]], "expected only 0 and 1, got other values"),
        ([[0, 0], [0, 0]], "class 0 has no active branch"),
        (
            [[1, 0, 0], [0, 1, 1]],
            "the same number of ones in every row, got 1 for class 0 and 2 for class 1",
        ),
        ([[1, 0], [0, 1], [1, 0]], "classes 0 and 2 have the same codeword"),
    ],
)
def test_bad_matrices(rows, message):
    with pytest.raises(ValueError, match=r"^codewords: ") as error:
        Codebook(rows)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["01", "1x"], "expected strings of 0 and 1, got '1x' for class 1"),
        (["01", "100"], "expected 2 digits in every word as in the first, got 3 for class 1"),
        (["01"], "at least two classes, got 1"),
        ([], "at least two classes, got 0"),
        (["01", ""], "expected strings of 0 and 1, got '' for class 1"),
    ],
)
def test_bad_words(words, message):
    with pytest.raises(ValueError, match=r"^codewords: ") as error:
        Codebook.from_words(words)
    assert message in str(error.value)


def test_words_are_strings():
    message = r"^words: expected Iterable\[str\], got list of int and str$"
    with pytest.raises(ValueError, match=message):
        Codebook.from_words(["01", 10])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], "expected 3 names, got 2"),
        (["a", "b", "a"], "expected distinct names, got 'a' more than once"),
        ("abc", "expected 3 strings, got 'abc'"),
        ([1, 2, 3], r"expected 3 strings, got \[1, 2, 3\]"),
    ],
)
def test_bad_names(names, message):
    with pytest.raises(ValueError, match=f"class_names: {message}"):
        Codebook(ROWS, names)


def test_unknown_class():
    with pytest.raises(ValueError, match="class_name: expected one of 0, 1, 2; got 'cat'"):
        Codebook(ROWS).index("cat")


def test_save_and_load(tmp_path):
    codebook = Codebook(ROWS, ["cat", "dog", "ship"])
    codebook.save(tmp_path / "codebook.json")
    assert Codebook.load(tmp_path / "codebook.json") == codebook
    assert Codebook.from_dict(json.loads(json.dumps(codebook.to_dict()))) == codebook


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version: expected 1, got 2"),
        ({"classes": 4}, "classes: the file says 4, its codewords say 3"),
        ({"active": 1}, "active: the file says 1, its codewords say 2"),
        ({"codewords": "1100"}, 'an object with a list "codewords"'),
        ({"class_names": ["a"]}, "class_names: expected 3 names, got 1"),
    ],
)
def test_bad_files_are_named(tmp_path, change, message):
    path = tmp_path / "codebook.json"
    path.write_text(json.dumps({**Codebook(ROWS).to_dict(), **change}))
    with pytest.raises(ValueError, match=r"codebook\.json: not a codebook: ") as error:
        Codebook.load(path)
    assert message in str(error.value)


def test_search_extend_assign_and_bounds():
    codebook = Codebook.search(10, 10, 5, class_names=[f"class {i}" for i in range(10)])
    assert codebook.bounds.optimal
    assert str(codebook.bounds) == "optimal: distance 4 with 10 pairs"
    grown = codebook.extend(["new", "newer"])
    assert grown.words[:10] == codebook.words
    assert grown.class_names[9:] == ("class 9", "new", "newer")
    assert max(grown.column_loads) - min(grown.column_loads) <= 1
    assert Codebook.shipped(10, 10, 3).extend(2).class_names[-2:] == ("10", "11")
    similarity = np.ones((10, 10))
    similarity[0, 1] = 50.0
    assigned, result = codebook.assign(similarity)
    assert assigned.class_names == codebook.class_names
    assert sorted(assigned.words) == sorted(codebook.words)
    assert assigned.words == tuple(codebook.words[index] for index in result.order)
    first, second = (int(word, 2) for word in assigned.words[:2])
    assert (first ^ second).bit_count() == max(codebook.distances)
    assert codebook.quality(0.0).error == 0.0


@pytest.mark.parametrize(
    ("new_classes", "message"),
    [
        (["0"], "class_names: expected distinct names, got '0' more than once"),
        ("new", "new_classes: expected Sequence[str] | int, got str"),
        (0, "new_classes: expected at least 1, got 0"),
        ([], "new_classes: expected at least 1, got 0"),
        (-3, "new_classes: expected at least 1, got -3"),
        (10**6, "different codewords, 3 are in use"),
    ],
)
def test_extend_refuses(new_classes, message):
    with pytest.raises(ValueError, match=message):
        Codebook(ROWS).extend(new_classes)


def test_an_interrupted_search_warns(monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("coded_resnext.codebooks.search.anneal", interrupted)
    monkeypatch.setattr("coded_resnext.codebooks.search.full_orbits", interrupted)
    with pytest.warns(UserWarning, match="search interrupted; the best codebook so far is kept"):
        codebook = Codebook.search(10, 10, 3)
    assert codebook.classes == 10


def test_many_classes_are_quick(tmp_path):
    """21,841 classes: checks and distances without a matrix of all pairs."""
    rows = np.zeros((21_841, 64), dtype=np.uint8)
    order = np.random.default_rng(0).random(rows.shape).argsort(axis=1)[:, :16]
    np.put_along_axis(rows, order, 1, axis=1)
    start = time.process_time()
    codebook = Codebook(torch.from_numpy(rows))
    assert sum(codebook.distances.values()) == 21_841 * 21_840 // 2
    codebook.save(tmp_path / "large.json")
    assert Codebook.load(tmp_path / "large.json") == codebook
    # About 4 s on one core; the plain way takes minutes or 4 GB.
    assert time.process_time() - start < 30


def test_made_under_another_default_device() -> None:
    with torch.device("meta"):
        assert Codebook(ROWS) == Codebook(torch.tensor(ROWS, device="cpu"))
