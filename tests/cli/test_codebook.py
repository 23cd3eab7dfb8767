"""The subcommand `codebook`, run as the command line runs it."""

import pytest

from coded_resnext.cli import codebook
from coded_resnext.cli.arguments import make_parser
from coded_resnext.codebooks.codebook import Codebook


@pytest.fixture
def run():
    def call(*arguments):
        args = make_parser().parse_args(["codebook", *map(str, arguments)])
        return getattr(codebook, args.function.partition(":")[2])(args)

    return call


def test_search_writes_a_codebook(run, tmp_path, capsys):
    path = tmp_path / "found.json"
    assert run("search", 10, 10, 5, "--seed", 1, "-o", path) == 0
    out, err = capsys.readouterr()
    assert "optimal: distance 4 with 10 pairs" in out
    assert err == ""
    codebook = Codebook.load(path)
    assert (codebook.classes, codebook.branches, codebook.active) == (10, 10, 5)
    assert codebook.distances[4] == 10


def test_search_prints_a_table(run, capsys):
    assert run("search", 4, 6, 3, "--effort", "fast") == 0
    assert "4 classes, 3 of 6 branches each" in capsys.readouterr().out


def test_search_shows_progress_on_a_terminal(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    run("search", 10, 10, 5)
    assert "best: distance 4, 10 pairs" in capsys.readouterr().err


def test_search_refuses_the_impossible(run):
    with pytest.raises(ValueError, match="only 6 different codewords, got 7 classes"):
        run("search", 7, 4, 2)


def test_show(run, tmp_path, capsys):
    png = tmp_path / "table.png"
    assert run("show", "10x5/10:paper", "--png", png) == 0
    out = capsys.readouterr().out
    assert "airplane    1010100011" in out
    assert "20 pairs at it, at least 10 are necessary" in out
    assert "       8  10        ####################\n" in out
    assert png.read_bytes().startswith(b"\x89PNG")


def test_show_says_what_drawing_needs(run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(
        ValueError, match=r"needs matplotlib: pip install 'coded-resnext\[report\]'"
    ):
        run("show", "10x5/10", "--png", tmp_path / "table.png")


def test_verify_good_words(run, tmp_path, capsys):
    path = tmp_path / "words.json"
    Codebook.shipped(100, 20, 4).save(path)
    assert run("verify", path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("yes") for line in lines)
    assert any("optimal: distance 4 with 660 pairs" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("0110\n1000\n", "NO   equal number of ones: word 0 has 2 ones, word 1 has 1"),
        ("0110\n0110\n", "NO   no word twice: word 0 occurs 2 times"),
        ("0110\n0120\n", "NO   words of 0 and 1 only: word 1 is '0120'"),
        ("0110\n110\n", "NO   words of equal length: word 0 has 4 digits, word 1 has 3"),
        ("0000\n0000\n", "NO   at least one active branch: least 0 ones"),
        ("0110\n", "NO   at least two classes: 1 words"),
        ('{"classes": 3, "codewords": ["01", "10"]}', 'NO   "classes" as stated: 2, stated 3'),
        ('{"sha256": "0", "codewords": ["01", "10"]}', "NO   sha256 as stated: "),
    ],
)
def test_verify_says_which_rule_is_broken(run, tmp_path, capsys, text, line):
    path = tmp_path / "words"
    path.write_text(text)
    assert run("verify", path) == 1
    assert line in capsys.readouterr().out


def test_verify_does_not_require_balance(run, tmp_path, capsys):
    path = tmp_path / "words"
    path.write_text("1100\n1010\n1001\n")
    assert run("verify", path) == 0
    assert "no   branches loaded equally, within one: 1 to 3" in capsys.readouterr().out


def test_verify_names_an_unreadable_file(run, tmp_path):
    path = tmp_path / "words.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"words\.json: expected JSON"):
        run("verify", path)
    with pytest.raises(FileNotFoundError):
        run("verify", tmp_path / "none")


def test_compare(run, capsys):
    assert run("compare", "10x5/10", "10x5/10:paper") == 0
    out = capsys.readouterr().out
    assert "pairs at it" in out
    assert "0 codewords occur in both" in out
    run("compare", "10x5/10", "10x5/10")
    assert "the same, in the same order" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["json", "csv", "txt"])
def test_export_is_read_back(run, tmp_path, ending):
    named = Codebook.shipped(10, 10, 3, "paper").with_class_names(
        [f"class {index}, of ten" for index in range(10)]
    )
    source, target = tmp_path / "source.json", tmp_path / f"target.{ending}"
    named.save(source)
    assert run("export", source, target) == 0
    assert Codebook.load(target) == named


def test_export_refuses_other_endings(run, tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.json, \.csv or \.txt, got '\.xls'"):
        run("export", "10x3/10", tmp_path / "words.xls")


def test_unknown_shipped_codebook(run):
    with pytest.raises(ValueError, match="no 'best' codebook of 7 x 3/10"):
        run("show", "7x3/10")


def test_search_looks_for_the_folder_before_the_work(run, monkeypatch, tmp_path):
    monkeypatch.setattr(codebook, "search", lambda *_: pytest.fail("the search had begun"))
    with pytest.raises(FileNotFoundError, match="--output: expected a folder"):
        run("search", 4, 6, 3, "-o", tmp_path / "nowhere" / "b.json")


def test_an_interrupted_search_keeps_the_best_and_says_so_by_its_status(run, monkeypatch, tmp_path):
    real = codebook.search
    monkeypatch.setattr(codebook, "search", lambda *a: real(*a)._replace(interrupted=True))
    path = tmp_path / "b.json"
    assert run("search", 4, 6, 3, "--effort", "fast", "-o", path) == 130
    assert Codebook.load(path).classes == 4


def test_search_prints_what_it_cannot_write(run, tmp_path, capsys):
    with pytest.raises(OSError, match="cannot write"):
        run("search", 4, 6, 3, "--effort", "fast", "-o", tmp_path)
    assert "4 classes, 3 of 6 branches each" in capsys.readouterr().out
