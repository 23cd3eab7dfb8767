"""The page in a browser: what one chooses and moves shows the library's numbers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support
from support.report_runs import ODD_NAMES, Run

from coded_resnext import EarlyExit, decode
from coded_resnext.cli.report import write_report
from coded_resnext.deploy.early_exit import EXIT_FILE, predict_early
from coded_resnext.interpret import Paths, observe, score_classes, trace
from coded_resnext.models.checkpoint import find_model

pytestmark = pytest.mark.long

CLASSES = range(len(ODD_NAMES))


def choose_class(page: Any, index: int) -> None:
    page.select_option("#class-select", str(index))


def choose_sample(page: Any, index: int) -> None:
    page.locator(f'input[name="shown"][value="{index}"]').check(force=True)


def branches_shown(page: Any) -> list[tuple[int, bool, float]]:
    """(branch, works for the class, energy) of all bars, block by block."""
    texts = page.locator("#network-picture title").all_text_contents()
    found = [re.fullmatch(r"branch (\d+)(, works for the class)?: energy (.*)", t) for t in texts]
    return [(int(m[1]), m[2] is not None, float(m[3])) for m in found if m]


def expected_branches(run: Run, target: int, energies: list[Any]) -> list[tuple[int, bool, Any]]:
    return [
        (branch, bool(book.codewords[target, branch]), pytest.approx(energy, abs=6e-4))
        for book, block in zip(run.model.codebooks, energies, strict=True)
        for branch, energy in enumerate(block)
    ]


def test_choosing_a_class_lights_its_codewords_and_shows_its_energies(page: Any, run: Run) -> None:
    measured = Paths.of(observe(run.model, run.test))
    for target in CLASSES:
        choose_class(page, target)
        energies = [block[target].tolist() for block in measured.energies]
        assert branches_shown(page) == expected_branches(run, target, energies)
        lit = sum(book.active for book in run.model.codebooks)
        assert page.locator("#network-picture .track.lit").count() == lit
        assert page.locator("#network-picture .link.active").count() == lit
        inside = [
            f"{100 * block[target][book.codewords[target]].sum() / block[target].sum():.0f} %"
            for block, book in zip(measured.energies, run.model.codebooks, strict=True)
        ]
        assert page.locator("#network-picture .said").all_text_contents()[:-1] == inside


def test_choosing_a_test_image_shows_its_way(page: Any, run: Run) -> None:
    samples = run.evaluation.samples
    assert samples is not None
    criterion = EarlyExit.load(run.folder / EXIT_FILE)
    wavering = [i for i, block in enumerate(samples.settled) if block > 0]
    for index in (0, wavering[0], wavering[-1], len(samples.targets) - 1):
        position, target = samples.positions[index], samples.targets[index]
        assert int(run.test.targets[position]) == target
        choose_class(page, target)
        choose_sample(page, index)
        image = run.test.images[position : position + 1]
        traced = trace(run.model, image)
        energies = [block.energies for block in traced.blocks]
        assert branches_shown(page) == expected_branches(run, target, energies)
        rows = page.locator("#decoders tbody tr").all()
        for row, block in zip(rows, traced.blocks, strict=True):
            said = row.locator("td").nth(0)
            assert said.locator(".name").get_attribute("title") in (
                None,
                ODD_NAMES[block.prediction],
            )
            assert said.inner_text().startswith("✓" if block.prediction == target else "✗")
        with torch.inference_mode():
            _, all_energies = run.model(image, return_energies=True)
        decoded = [
            int(decode(e, b)) for e, b in zip(all_energies, run.model.codebooks, strict=True)
        ]
        settled = 3
        while settled and decoded[settled - 1] == traced.prediction:
            settled -= 1
        where = [*(f"block {number}" for number in (1, 2, 3)), "the classifier"]
        assert page.inner_text("#settles") == where[settled]
        left = int(predict_early(run.model, image, criterion).exit_blocks)
        assert page.inner_text("#leaves") == where[left]
        shown = page.locator("#reading img").get_attribute("src")
        assert shown == page.locator("#network-picture image").get_attribute("href")
        assert page.evaluate("document.querySelector('#reading img').naturalWidth") == 6


def test_a_misread_image_can_be_jumped_to(page: Any, run: Run) -> None:
    samples = run.evaluation.samples
    assert samples is not None
    value = page.locator("#sample-jump option").nth(1).get_attribute("value")
    assert samples.predictions[int(value)] != samples.targets[int(value)]
    page.select_option("#sample-jump", value)
    assert page.input_value("#class-select") == str(samples.targets[int(value)])
    assert page.is_checked(f'input[name="shown"][value="{value}"]')
    assert page.locator("#reading .wrong").count() >= 1


def test_all_classifiers_are_points_of_one_plot(page: Any, run: Run) -> None:
    """The paper's figure; the class that is chosen is marked there too."""
    one_class = run.evaluation.one_class
    assert one_class is not None
    plot = page.locator("#classifier-points")
    for look, part in (
        ("inactive", one_class.classifiers),
        ("active", [o.outside for o in one_class.classifiers]),
    ):
        known = [one for one in part if one is not None and one.precision is not None]
        assert plot.locator(f".chart .markers.{look} > *").count() == len(known) > 0
    places = set()
    for target in CLASSES:
        choose_class(page, target)
        mark = plot.locator(".chart .mark")
        places.add((mark.get_attribute("cx"), mark.get_attribute("cy")))
        assert plot.locator("summary").inner_text() == "Numbers"
    points = {(one.recall, one.precision) for one in one_class.classifiers}
    assert len(places) == len(points)


def test_the_threshold_moves_precision_and_recall(page: Any, run: Run) -> None:
    scored = score_classes(run.model, run.test, "test")
    targets = scored.targets
    for target in CLASSES:
        choose_class(page, target)
        slider = page.locator("#threshold")
        chosen = run.evaluation.one_class.classifiers[target]
        assert float(page.inner_text("#at-threshold")) == pytest.approx(chosen.threshold, abs=6e-4)
        stops = int(slider.get_attribute("max")) + 1
        seen = set()
        exact = sorted({t for t in (*chosen.curve.thresholds, chosen.threshold) if t is not None})
        assert stops == len(exact) > 5
        for place in np.linspace(0, stops - 1, 7).round().astype(int).tolist():
            slider.fill(str(place))
            threshold = exact[place]
            assert page.inner_text("#at-threshold") == f"{threshold:.3f}"
            expected = precision_recall_fscore_support(
                targets == target,
                scored.of_class(target)[0].astype(float) >= threshold,
                average="binary",
                zero_division=0,
            )
            for name, value in zip(("precision", "recall", "f1"), expected[:3], strict=True):
                assert float(page.inner_text(f"#at-{name}")) == pytest.approx(value, abs=6e-4)
            # What is read aloud is what is shown.
            assert slider.get_attribute("aria-valuetext") == (
                f"threshold {page.inner_text('#at-threshold')}: "
                f"precision {page.inner_text('#at-precision')}, "
                f"recall {page.inner_text('#at-recall')}"
            )
            seen.add(page.inner_text("#at-recall"))
        assert len(seen) > 3


def test_the_table_of_classifiers_sorts_and_chooses(page: Any, run: Run) -> None:
    classifiers = run.evaluation.one_class.classifiers
    for column, key in (("recall", "recall"), ("avg. prec.", "average_precision")):
        for direction in ("descending", "ascending"):
            page.get_by_role("button", name=column, exact=False).first.click()
            order = [
                int(row.get_attribute("data-class"))
                for row in page.locator("#classifier-table tbody tr").all()
            ]
            values = [getattr(classifiers[index], key) for index in order]
            assert values == sorted(values, reverse=direction == "descending")
            assert page.locator(f'th[aria-sort="{direction}"]').count() == 1
    row = page.locator('#classifier-table tr[data-class="2"]')
    cells = row.locator("td").all_text_contents()
    assert cells[2] == f"{classifiers[2].average_precision:.3f}"
    row.get_by_role("button").click()
    assert page.input_value("#class-select") == "2"
    assert ODD_NAMES[2] in page.inner_text("#classifier h3")


def test_the_margin_moves_accuracy_and_cost(page: Any, run: Run) -> None:
    curve = run.evaluation.early_exit
    slider = page.locator("#margin")
    last = int(slider.get_attribute("max"))
    assert last == len(curve.points) - 1
    for place in (0, last // 3, 2 * last // 3, last):
        slider.fill(str(place))
        margin = curve.points[place].margin
        criterion = EarlyExit((margin,) * 3)
        found = predict_early(run.model, run.test.images, criterion)
        accuracy = float((found.classes == run.test.targets).double().mean())
        assert page.inner_text("#exit-accuracy") == f"{100 * accuracy:.2f} %"
        macs = float(found.macs.double().mean())
        assert page.inner_text("#exit-macs") == f"{macs:,.0f}"
        exits = found.exit_blocks.bincount(minlength=4).tolist()
        bars = page.locator("#exit-bars .number").all_inner_texts()
        assert [int(text.split()[0]) for text in bars] == exits


def test_the_numbers_behind_the_pictures(page: Any, run: Run) -> None:
    def rows(section: str) -> list[list[str]]:
        page.locator(f"{section} details.numbers > summary").first.click()
        table = page.locator(f"{section} details.numbers table").first
        table.wait_for()
        return [row.locator("th,td").all_inner_texts() for row in table.locator("tbody tr").all()]

    early, removal = run.evaluation.early_decoding, run.evaluation.removal
    assert rows("#early-decoding") == [
        [f"block {n}", f"{100 * block.accuracy:.2f} %", f"{100 * block.agreement:.2f} %"]
        for n, block in enumerate(early.blocks, 1)
    ]
    curve = removal.blocks[1].inactive
    assert ["block 2", "inactive", "2", f"{100 * curve.accuracy[1]:.2f} %"] in [
        row[:4] for row in rows("#removal")
    ]
    distances = {row[0]: int(row[1]) for row in rows('[data-codebook="1"]')}
    words = run.model.stage_codebooks[1].codewords
    assert sorted(distances.values()) == sorted((words[1:] ^ words[0]).sum(1).tolist())


def test_odd_names_are_text(page: Any, pages: Any, run: Run) -> None:
    assert page.title().startswith("odd <b>run")
    names = page.locator("#classifier-table tbody .name").all()
    full = {name.get_attribute("title") or name.inner_text() for name in names}
    assert full == set(ODD_NAMES)
    assert {name.get_attribute("dir") for name in names} == {"auto"}
    assert "noise <b>bold</b>" in page.inner_text("#configuration")
    assert page.locator("script").count() == 2
    assert page.locator("b, i").count() == 0
    # The longest name makes nothing wider than a phone.
    phone = pages.open_run(run.folder, viewport={"width": 360, "height": 740})
    for target in CLASSES:
        choose_class(phone, target)
        assert phone.evaluate("document.documentElement.scrollWidth") == 360
    phone.close()


def test_the_keyboard_alone_suffices(page: Any) -> None:
    def focused(script: str = "e.id") -> Any:
        return page.evaluate(f"(() => {{ const e = document.activeElement; return {script} }})()")

    def tab_to(wanted: str, most: int = 60) -> None:
        for _ in range(most):
            page.keyboard.press("Tab")
            if focused(f"e.matches({wanted!r})"):
                assert focused("e.matches(':focus-visible')")
                return
        raise AssertionError(f"the Tab key does not reach {wanted}")

    page.keyboard.press("Tab")
    assert focused("e.textContent") == "Skip to the report"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main"
    tab_to("#class-select")
    page.keyboard.press("ArrowDown")
    assert page.input_value("#class-select") == "1"
    tab_to("#class-after")
    page.keyboard.press("Space")
    assert page.input_value("#class-select") == "2"
    tab_to('input[name="shown"]')
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#reading")
    tab_to("#energy-table summary")
    page.keyboard.press("Enter")
    # The table is filled when the browser says that its frame was opened, a moment later.
    page.wait_for_selector("#energy-table table", state="visible")
    tab_to(".sort")
    page.keyboard.press("Enter")
    assert page.locator("#classifier-table th").first.get_attribute("aria-sort") == "ascending"
    tab_to("#threshold")
    before = page.inner_text("#at-threshold")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert float(page.inner_text("#at-threshold")) > float(before)
    tab_to("#margin")
    page.keyboard.press("End")
    assert page.inner_text("#exit-margin") == "none leaves"


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)]
)
def test_axe_finds_no_serious_violation(pages: Any, run: Run, scheme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    viewport = {"width": width, "height": 844}
    page = pages.open_run(run.folder, color_scheme=scheme, viewport=viewport)
    choose_sample(page, run.evaluation.samples.targets.index(0))
    for summary in page.locator("details > summary").all():
        summary.click()
    # In quirks of half-finished transitions contrasts are those of no design.
    page.wait_for_timeout(300)
    found = axe.run(page).response["violations"]
    serious = [
        (violation["id"], [node["target"] for node in violation["nodes"]])
        for violation in found
        if violation["impact"] in ("serious", "critical")
    ]
    page.close()
    assert serious == []


def test_it_prints_and_reads_without_its_script(page: Any, pages: Any, run: Run) -> None:
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.is_visible("nav.sections")
    # Drawn by the script, which a busy machine may not have finished.
    page.wait_for_selector("#network-picture svg")
    assert page.pdf()[:5] == b"%PDF-"
    bare = pages.open_run(run.folder, java_script_enabled=False)
    assert f"{100 * run.evaluation.test_accuracy:.2f} %" in bare.inner_text("#overview")
    assert "switched off" in bare.inner_text("#overview")
    assert "python train.py --name '<i>'" in bare.inner_text("#configuration")
    bare.close()


def test_half_a_run_says_what_is_missing(pages: Any, run: Run, tmp_path: Any) -> None:
    half = tmp_path / "half"
    half.mkdir()
    for name in ("config.json", "metrics.csv", "model.safetensors"):
        shutil.copy(run.folder / name, half)
    text = (run.folder / "evaluation.json").read_text()
    (half / "evaluation.json").write_text(text[: len(text) // 2])
    page = pages.open_run(half)
    missing = page.inner_text("#missing")
    assert "Results: evaluation.json cannot be read" in missing
    assert "coded-resnext eval RUN DATA" in missing
    assert str(tmp_path) not in page.content()
    # What there is can be used.
    choose_class(page, 1)
    page.wait_for_selector("#network-picture .track.lit", state="attached")
    assert page.locator("#training-charts svg").count() >= 3
    assert page.locator("#classifiers").count() == 0
    page.close()
    assert pages.complaints == []


def test_a_thousand_classes_stay_small_and_quick(pages: Any, thousand: Run) -> None:
    path = pages.write(thousand.folder)
    assert path.stat().st_size < 15e6
    page = pages.open_run(thousand.folder)
    # Time of the page's thread, which does not depend on what else the machine is doing.
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    metrics = session.send("Performance.getMetrics")["metrics"]
    seconds = {metric["name"]: metric["value"] for metric in metrics}["TaskDuration"]
    assert 0.01 < seconds < 3
    assert page.input_value("#class-select") == "1"
    choose_class(page, 0)
    assert "no test image" in page.text_content("#network-text")
    # goaccess#2923: a class without a name left a button without one.
    assert "(class 0 has no name)" in page.text_content("#network-text")
    assert all(text.strip() for text in page.locator("button").all_text_contents())
    assert page.locator("#network-picture .track.lit").count() == 4 * 16 + 6 * 8 + 3 * 4
    page.fill("#class-find", "77")
    options = page.locator("#class-select option").all_inner_texts()
    assert len(options) == sum("77" in name for name in thousand.model.class_names)
    page.select_option("#class-select", "977")
    energies = [block[977].tolist() for block in thousand.evaluation.paths.energies]
    assert branches_shown(page) == expected_branches(thousand, 977, energies)
    page.get_by_role("button", name="Show all 1,000 classes").click()
    assert page.locator("#classifier-table tbody tr").count() == 1000
    assert "not computed, or not all: not asked for" in page.inner_text("#missing")
    page.close()
    assert pages.complaints == []


def test_axes_say_where_their_lines_are(pages: Any, run: Run, tmp_path: Path) -> None:
    """elastic-charts#1417, tinyplot#449, Chart.js#11595: 93, 95, 98 % at 92.5, 95 and 97.5."""
    folder = tmp_path / "close"
    shutil.copytree(run.folder, folder)
    for low, high in ((0.98, 0.994), (0.91, 0.99), (0.9995, 0.9999)):
        rows = [f"{n},{low + (high - low) * n / 5},1.00{n},{n}e-6" for n in range(1, 6)]
        log = "\n".join(["epoch,test_accuracy,total,lr", *rows])
        (folder / "metrics.csv").write_text(log + "\n")
        page = pages.open(write_report(folder))
        axes = 0
        for chart in page.locator(".chart svg").all():
            for anchor, place in (("end", "y"), ("middle", "x")):
                ticks = chart.locator(f'text.tick[text-anchor="{anchor}"]').all()
                texts = [tick.text_content() for tick in ticks]
                assert len(set(texts)) == len(texts)
                if len(ticks) < 2:
                    continue
                values = [float(text.removesuffix(" %")) for text in texts]
                places = [float(tick.get_attribute(place)) for tick in ticks]
                slope, start = np.polyfit(places, values, 1)
                error = np.abs(slope * np.array(places) + start - values).max()
                assert error < 1e-3 * (max(values) - min(values))
                axes += 1
        assert axes > 10
        page.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_every_axis_has_two_numbers(pages: Any, tmp_path: Path, width: int) -> None:
    """One number alone is no scale: the scores of a classifier had 0 and nothing else."""
    folder = shutil.copytree(find_model("digits"), tmp_path / "digits")
    page = pages.open(write_report(folder), viewport={"width": width, "height": 900})
    counts = [
        chart.locator(f'text.tick[text-anchor="{anchor}"]').count()
        for chart in page.locator(".chart svg").all()
        for anchor in ("end", "middle")
    ]
    assert len(counts) > 15
    assert min(counts) >= 2
    page.close()
