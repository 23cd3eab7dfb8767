"""The shipped codebooks: what is promised, and the same bits from their constructions."""

import hashlib
import json
from collections import Counter
from importlib.resources import files

import pytest

from coded_resnext import create_model
from coded_resnext.codebooks.codebook import Codebook
from coded_resnext.codebooks.constructions import (
    CONSTRUCTIONS,
    PAPER_TABLES,
    best_content,
    paper_content,
)
from coded_resnext.codebooks.files import Size, file_name, load_shipped, shipped_sizes

# classes, branches, active: distance, pairs at it, proved optimal.
PROMISED = {
    Size(10, 10, 3): (4, 30, True),
    Size(10, 10, 5): (4, 10, True),
    Size(100, 16, 4): (4, 1200, True),
    Size(100, 16, 8): (6, 1920, False),
    Size(100, 20, 4): (4, 660, True),
    Size(100, 20, 8): (8, 2885, False),
    Size(100, 20, 12): (8, 2885, False),
    Size(100, 20, 16): (4, 660, True),
    Size(1000, 32, 4): (4, 33312, True),
    Size(1000, 32, 8): (8, 43640, False),
    Size(1000, 32, 16): (12, 121088, False),
    Size(1000, 32, 24): (8, 43640, False),
}


# By variant and size: the first 16 digits of the SHA-256 of the published words, one a line, their
# least distance, and the fewest and most classes of a branch.
PUBLISHED = {
    "paper": {
        Size(1000, 32, 16): ("4e263d95588d64f2", 10, (499, 501)),
        Size(1000, 32, 24): ("0018042b357dfc62", 6, (749, 751)),
        Size(1000, 32, 4): ("5fdec7eebd706252", 4, (125, 125)),
        Size(1000, 32, 8): ("8151b2bcf5f0ba3c", 6, (249, 251)),
        Size(100, 20, 12): ("197e847f78d137f4", 8, (60, 60)),
        Size(100, 20, 16): ("54faa2964cb87e84", 4, (80, 80)),
        Size(100, 16, 4): ("01babc2527db8159", 4, (25, 25)),
        Size(100, 20, 4): ("c304160f7440a5af", 4, (20, 20)),
        Size(100, 16, 8): ("641216c4d237f652", 4, (50, 50)),
        Size(100, 20, 8): ("0b27ca62719d12af", 8, (40, 40)),
    },
    "paper_d8": {
        Size(1000, 32, 24): ("17d69922b96b6840", 8, (703, 838)),
        Size(1000, 32, 8): ("16e73416cb5af8cb", 8, (162, 297)),
    },
}


def test_all_promised_sizes_are_shipped():
    assert set(shipped_sizes()) == set(PROMISED) == set(CONSTRUCTIONS)
    assert set(shipped_sizes("paper")) == {*PAPER_TABLES, *PUBLISHED["paper"]}
    assert set(shipped_sizes("paper_d8")) == set(PUBLISHED["paper_d8"])


@pytest.mark.parametrize("size", PROMISED, ids=str)
def test_properties_counted_independently(size):
    """Plain Python on the file, nothing of the library."""
    name = file_name(size)
    data = json.loads(files("coded_resnext.codebooks").joinpath("data", name).read_text("utf-8"))
    words = data["codewords"]
    assert len(set(words)) == len(words) == size.classes
    assert {len(word) for word in words} == {size.branches}
    assert {word.count("1") for word in words} == {size.active}
    loads = {sum(word[column] == "1" for word in words) for column in range(size.branches)}
    assert loads == {size.classes * size.active // size.branches}
    numbers = [int(word, 2) for word in words]
    distances = Counter((a ^ b).bit_count() for i, a in enumerate(numbers) for b in numbers[:i])
    distance, pairs, _ = PROMISED[size]
    assert (min(distances), distances[min(distances)]) == (distance, pairs)
    assert data["provenance"]["construction"]


@pytest.mark.parametrize("size", PROMISED, ids=str)
def test_bounds_say_what_is_optimal(size):
    codebook = Codebook.shipped(*size)
    assert codebook.bounds.optimal_distance
    assert codebook.bounds.optimal == PROMISED[size][2]
    assert codebook.bounds.pairs_reached == codebook.distances[codebook.min_distance]


@pytest.mark.parametrize(
    "size", [size for size in PROMISED if size.active not in (12, 24)], ids=str
)
def test_construction_gives_the_shipped_bits(size):
    assert best_content(size) == load_shipped(size)


@pytest.mark.parametrize(
    ("size", "other"),
    [(Size(100, 20, 12), Size(100, 20, 8)), (Size(1000, 32, 24), Size(1000, 32, 8))],
)
def test_complements(size, other):
    swapped = [
        word.translate(str.maketrans("01", "10")) for word in load_shipped(other)["codewords"]
    ]
    assert sorted(swapped) == load_shipped(size)["codewords"]


@pytest.mark.parametrize("size", PAPER_TABLES, ids=str)
def test_published_tables(size):
    assert paper_content(size) == load_shipped(size, "paper")
    codebook = Codebook.shipped(*size, variant="paper")
    assert codebook.class_names[0] == "airplane"
    assert codebook.words[0] == {3: "1001001000", 5: "1010100011"}[size.active]


def test_codewords_say_which_table_they_are():
    """Whatever their names; the published one where the best is the same."""
    for variant in ("paper_d8", "paper", "best"):
        for size in shipped_sizes(variant):
            codebook = Codebook.shipped(*size, variant)
            same = size in shipped_sizes("paper") and codebook.words == tuple(
                load_shipped(size, "paper")["codewords"]
            )
            names = [f"class {index}" for index in range(size.classes)]
            assert codebook.with_class_names(names).variant == ("paper" if same else variant)
    assert Codebook.from_words(["1100", "0110", "0011"]).variant is None
    assert Codebook(Codebook.shipped(10, 10, 3).codewords.flip(0)).variant is None


def test_what_is_not_shipped_is_named():
    with pytest.raises(ValueError, match=r"no 'best' codebook of 7 x 3/10 .*; there are 10 x 3/10"):
        Codebook.shipped(7, 10, 3)
    with pytest.raises(ValueError, match=r"no 'paper' codebook of 37 x 8/20"):
        Codebook.shipped(37, 20, 8, variant="paper")
    with pytest.raises(ValueError, match=r"variant: expected one of best, paper, .* got 'worst'"):
        Codebook.shipped(10, 10, 3, variant="worst")


def test_a_damaged_file_is_refused(monkeypatch):
    monkeypatch.setattr("coded_resnext.codebooks.files.digest", lambda words: "other")
    with pytest.raises(ValueError, match=r"K10_3of10.json: .* do not match their sha256"):
        load_shipped(Size(10, 10, 3))


@pytest.mark.parametrize(
    ("variant", "size"),
    [(variant, size) for variant, rows in PUBLISHED.items() for size in rows],
    ids=str,
)
def test_published_tables_word_by_word(variant, size):
    """Those of CIFAR-100 and ImageNet; counted in plain Python."""
    sha256, distance, loads = PUBLISHED[variant][size]
    words = load_shipped(size, variant)["codewords"]
    assert hashlib.sha256("\n".join(words).encode()).hexdigest().startswith(sha256)
    assert len(set(words)) == len(words) == size.classes
    assert {(len(word), word.count("1")) for word in words} == {(size.branches, size.active)}
    numbers = [int(word, 2) for word in words]
    assert min((a ^ b).bit_count() for i, a in enumerate(numbers) for b in numbers[:i]) == distance
    counts = [sum(word[column] == "1" for word in words) for column in range(size.branches)]
    assert (min(counts), max(counts)) == loads


def test_a_network_takes_the_published_codebooks_by_name():
    published = create_model("coded_resnext29_20x6d", codebook_variant="paper")
    assert published.codebooks[0] == Codebook.shipped(100, 20, 8, "paper")
    assert create_model("coded_resnext29_20x6d").codebooks[0] == Codebook.shipped(100, 20, 8)
    best = create_model("coded_resnext29_10x11d", codebook_variant="best").codebooks
    assert best[0] == Codebook.shipped(10, 10, 5)
    with pytest.raises(ValueError, match=r"no 'paper' codebook of 37 x 8/20 .* is shipped"):
        create_model("coded_resnext29_20x6d", num_classes=37, codebook_variant="paper")
    with pytest.raises(ValueError, match="codebook_variant: expected none beside stages or code"):
        create_model("coded_resnext29_20x6d", codebooks=best, codebook_variant="paper")


def test_active_branches_of_the_stages_by_numbers():
    """The variants of the paper's appendix that change whole stages: 24/32, 4/32."""
    model = create_model("coded_resnext50_32x4d", active=(32, 24, 16, 4), codebook_variant="paper")
    ratios = [book.active for book in model.stage_codebooks]
    assert ratios == [24, 16, 4]
    assert model.stage_codebooks[2] == Codebook.shipped(1000, 32, 4, "paper")
    with pytest.raises(ValueError, match=r"active: expected 4 numbers from 1 to 32, .* got \[33\]"):
        create_model("coded_resnext50_32x4d", active=(33,))
