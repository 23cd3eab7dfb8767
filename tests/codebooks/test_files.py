"""Words from JSON, text and CSV."""

import json

import pytest

from coded_resnext.codebooks.shipped import read_document
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
