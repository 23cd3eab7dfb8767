"""Codewords from JSON, text and CSV, and what is written reads back."""

import json
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.codebooks.files import read_document
from coded_resnext.codebooks.quality import verify
from coded_resnext.files import LARGEST_TEXT

WORDS = ["0110", "1001", "0011"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("0110\n1001\n0011\n", None),
        ("# a comment\n\n0 1 1 0\n1 0 0 1\n0 0 1 1\n", None),
        ("0,1,1,0\n1,0,0,1\n0,0,1,1\n", None),
        ("cat 0110\ndog 1001\nold ship, large 0011\n", ["cat", "dog", "old ship, large"]),
        ('cat,0,1,1,0\ndog,1,0,0,1\n"ship, large",0,0,1,1\n', ["cat", "dog", "ship, large"]),
        ('cat,0110\r\ndog,1001\r\n"ship, large",0011\r\n', ["cat", "dog", "ship, large"]),
        (json.dumps(WORDS), None),
        (json.dumps({"codewords": [[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 1, 1]]}), None),
        (json.dumps({"codewords": WORDS, "class_names": ["a", "b", "c"]}), ["a", "b", "c"]),
    ],
)
def test_formats(tmp_path, text, names):
    path = tmp_path / "words"
    path.write_bytes(text.encode())
    document = read_document(path)
    assert document["codewords"] == WORDS
    assert document.get("class_names") == names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "one codeword per line, got none"),
        (b"\xff\xfe\x00", "expected text in UTF-8"),
        (b'{"words": []}', 'a list "codewords"'),
        (b'{"codewords": [', "expected JSON"),
        (b"0" * (LARGEST_TEXT + 1), "at most 16 MiB, the file is larger"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "words"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_document(path)


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "words"
    with path.open("wb") as file:
        file.truncate(100 * 1024 * 1024)
    with pytest.raises(ValueError, match="at most 16 MiB"):
        read_document(path)


# What cannot be written as UTF-8 is no name.
NAMES = st.lists(
    st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=6, unique=True
)


@pytest.mark.parametrize("ending", [".json", ".csv", ".txt"])
@given(names=NAMES)
@settings(max_examples=300, deadline=None)
def test_any_names_survive_a_round_trip(tmp_path_factory, ending, names):
    """datagrunt#73, #217, visidata#2458: a class called #1 vanished from its own export."""
    words = ["".join("01"[i in ones] for i in range(4)) for ones in combinations(range(4), 2)]
    codebook = Codebook.from_words(words[: len(names)], names)
    path = tmp_path_factory.getbasetemp() / f"book{ending}"
    codebook.save(path)
    assert Codebook.load(path) == codebook


@pytest.mark.parametrize("ending", [".json", ".csv", ".txt"])
@pytest.mark.parametrize(
    "names",
    [
        ["#1", "a", "b", "c"],
        ["0", "1", "2", "3"],
        ["0", "1", "10", "01"],
        ["[", "{", '"', "'"],
        ["a,", "b;", "c\t", "d "],
        ["class", "", " ", "\n"],
        ["a 0110", "0110", "=1+1", '"a""b" 0110'],
    ],
)
def test_names_that_look_like_something_else(tmp_path, ending, names):
    codebook = Codebook.from_words(["1100", "1010", "1001", "0110"], names)
    path = tmp_path / f"book{ending}"
    codebook.save(path)
    assert Codebook.load(path) == codebook


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#1 1100\na 0110\n", "'#1' may be a comment, or a class whose codeword is 1100"),
        ("a 0110\n# 1100\n", "may be a comment"),
        ("#1,1,1,0,0\na,0,1,1,0\n", "may be a comment"),
        ("a 1100\nb 0110\n0011\nd 1001\n", "got none for class 2, 0011"),
        ('"a b" c 0110\n', "expected a codeword after"),
    ],
)
def test_what_has_two_readings_is_refused(tmp_path, text, message):
    path = tmp_path / "words"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_document(path)


def test_comments_that_are_no_words(tmp_path):
    path = tmp_path / "words"
    path.write_text("# distance 2 of 10\n0110\n# the second half\n1001\n")
    assert read_document(path) == {"codewords": ["0110", "1001"]}


@pytest.mark.parametrize(
    "text",
    [
        "a 1100\na 0110\n",
        '{"codewords": ["10", "01"], "class_names": ["a"]}',
        '{"codewords": ["10", "01"], "class_names": [1, 2]}',
        '{"codewords": ["10", "01"], "format_version": 99}',
    ],
)
def test_what_verify_passes_can_be_loaded(tmp_path, text):
    path = tmp_path / "words"
    path.write_text(text)
    with pytest.raises(ValueError, match="not a codebook"):
        Codebook.load(path)
    assert not all(rule.holds for rule in verify(read_document(path)) if rule.required)
