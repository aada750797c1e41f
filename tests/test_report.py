"""The report's page: its numbers, that it is one file, and that a browser can sort and filter its list."""

import json
import re
import shutil
import subprocess

import numpy as np
import PIL.Image
import pytest

from lvseg import evaluate, figures, report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DICE = [0.95, 0.91, 0.97, 0.62, 0.96, 0.93, 0.94, 0.98]
PROVENANCE = {
    "made": "2026-01-01T00:00:00+00:00",
    "model": {"task": "fatfraction", "weights_sha256": "ab" * 32},
    "lvseg": "0.1.0",
    "runs": [{"versions": {"lvseg": "0.1.0"}, "seed": 0}, {"versions": {"lvseg": "0.1.0"}, "seed": 12345}],
    "datasets": [{"name": "set", "citation": "A <b>card</b> & co", "licence": "none", "card_sha256": "cd" * 32}],
    "measured_on": [{"name": "new", "citation": "Another study", "licence": "by hand", "card_sha256": "ef" * 32}],
}


def row(index, dice):
    true_ml, fat = 1000.0 + 100 * index, 2.0 + index
    return {
        "patient": f"p{index}", "study": "1", "scanner": "ge" if index % 2 else "philips", "class": "liver",
        "dataset": "set",
        "dice": dice, "precision": dice, "recall": None if index == 0 else dice, "voxel_error_percent": 1.0,
        "surface_dice_1mm": dice, "surface_dice_3mm": 1.0, "hausdorff_95_mm": None if index == 3 else 5.0,
        "mean_surface_distance_mm": 1.0, "predicted_voxels": 100, "true_voxels": 101,
        "predicted_volume_ml": true_ml + 10, "true_volume_ml": true_ml, "volume_error_percent": 1000 / true_ml,
        "predicted_fat_mean_percent": fat + 0.5, "true_fat_mean_percent": fat,
        "predicted_fat_median_percent": fat, "true_fat_median_percent": fat,
        "incomplete": "", "true_incomplete": "", "expected_dice": dice - 0.01, "check": "the network is in doubt",
        "flags": "liver: touches lowest slice" if index == 3 else "", "picture": f"pictures/p{index}.jpg",
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "pictures").mkdir()
    rows = [row(index, dice) for index, dice in enumerate(DICE)]
    for each in rows:
        PIL.Image.new("RGB", (40, 16), (10, 20, 30)).save(folder / each["picture"])
    options = evaluate.Options()
    summary = {
        "task": "fatfraction", "name": "best", "split": "test", "class": "liver", "postprocessing": [],
        "grades_percent": options.grades_percent, "palette": "colour_blind",
        **evaluate.summarise(rows, options),
        "by_scanner": {
            name: evaluate.summarise([each for each in rows if each["scanner"] == name], options)
            for name in ("ge", "philips")
        },
        "quality": {"mean_absolute_error": 0.01, "scans": 36, "patients": 4, "left_out_mean_absolute_error": 0.03},
    }  # fmt: skip
    points = [{**each, "predicted": each["predicted_volume_ml"], "true": each["true_volume_ml"]} for each in rows]
    figures.bland_altman(points, summary["volume_ml"], "liver volume", "ml", folder / "volume_bland_altman")
    report.write(folder, summary, rows, PROVENANCE)
    (folder / "summary.json").write_text(json.dumps(summary, allow_nan=False))
    return folder


def page_of(folder, rows):
    """The page of a few scans, and what was summed up of them."""
    PIL.Image.new("RGB", (40, 16)).save(folder / "p.jpg")
    options = evaluate.Options()
    parts = evaluate.summarise(rows, options)
    summary = {
        "task": "fatfraction", "name": "best", "split": "test", "class": "liver", "postprocessing": [],
        "grades_percent": options.grades_percent, "palette": "colour_blind", **parts, "by_scanner": {"ge": parts},
        "quality": {"mean_absolute_error": 0.01, "scans": 36, "patients": 4, "left_out_mean_absolute_error": 0.03},
    }  # fmt: skip
    report.write(folder, summary, [{**each, "picture": "p.jpg"} for each in rows], PROVENANCE)
    return (folder / "report.html").read_text(encoding="utf-8"), summary


def test_two_visits_of_one_patient_have_a_page_without_the_intervals_that_want_several(tmp_path):
    page, summary = page_of(tmp_path, [{**row(index, 0.9), "patient": "p", "study": str(index)} for index in range(2)])
    assert summary["steatosis_grades"]["intervals"]["share_equal"] is None
    assert "100.0 % of the scans are in their true class.</p>" in page
    assert "<b>2</b>scans of 1 patient</div>" in page


def test_one_scan_has_a_page_without_limits_of_agreement(tmp_path):
    page, _ = page_of(tmp_path, [row(0, 0.9)])
    assert "<b>1</b>scan of 1 patient</div>" in page and "- to -" not in page


def test_numbers_of_fat_say_of_how_many_scans_they_are(tmp_path):
    rows = [row(index, 0.9) for index in range(6)]
    rows[0] |= {f"predicted_fat_{key}_percent": None for key in ("mean", "median")}  # nothing was found
    for index in (1, 2):  # nothing is there, so that there is no true fat fraction, whatever was found
        rows[index] |= {f"true_fat_{key}_percent": None for key in ("mean", "median")}
        rows[index] |= {"true_volume_ml": 0.0, "volume_error_percent": None}
    page, summary = page_of(tmp_path, rows)
    assert summary["fat_fraction_percent"]["n"] == 3 and summary["fat_unmeasured"] == 1
    (counted,) = re.findall(r"agreement of fat are of the (\d+) scans.*?; (\d+) whose mask is empty", page)
    assert counted == ("3", "1")
    assert re.search(r"mean absolute error of volume, 4 scans", page)
    page, _ = page_of(tmp_path, rows[3:])
    assert "agreement of fat are of" not in page and "mean absolute error of volume</div>" in page


def test_a_page_of_validation_patients_says_that_they_chose_the_weights(tmp_path):
    page, summary = page_of(tmp_path, [row(0, 0.9)])
    report.write(tmp_path, {**summary, "split": "validation"}, [{**row(0, 0.9), "picture": "p.jpg"}], PROVENANCE)
    told = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "chosen by their Dice on validation patients" in told
    assert "chosen by their Dice on validation patients" not in page


def test_the_page_needs_nothing_else(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]", text)
    assert "default-src 'none'" in text
    assert text.count("data:image/jpeg;base64,") == len(DICE) and "data:image/svg+xml;base64," in text
    assert "A &lt;b&gt;card&lt;/b&gt; &amp; co" in text  # what cards say is text, not markup


def test_the_page_has_the_numbers_of_the_summary(folder):
    text, summary = (
        (folder / "report.html").read_text(encoding="utf-8"),
        json.loads((folder / "summary.json").read_text()),
    )
    dice = summary["dice"]
    low, high = dice["intervals"]["mean"]
    assert f"{np.mean(DICE):.3f} ({low:.3f} to {high:.3f})" in text
    assert summary["volume_ml"]["bias"] == pytest.approx(10.0) and summary["hausdorff_95_mm"]["scans"] == 7
    assert summary["fat_fraction_percent"]["bias"] == pytest.approx(0.5)
    # True fat of 2 to 9 %, half a point more predicted: 6 to 9 reach 5.56, and 5.5 does not.
    (steatosis,) = summary["steatosis"]
    assert steatosis["sensitivity"] == 1.0 and steatosis["specificity"] == 1.0
    # Thresholds of 3.2 and 5.56 %: of 2 to 9 %, the 3 that became 3.5 and the 5 that became 5.5 stay or move.
    grades = evaluate.summarise([row(i, d) for i, d in enumerate(DICE)], evaluate.Options(grades_percent=(3.2, 5.56)))
    assert grades["steatosis_grades"]["counts"] == [[1, 1, 0], [0, 2, 0], [0, 0, 4]]
    assert grades["steatosis_grades"]["share_equal"] == 7 / 8
    cells = re.findall(r"<td[^>]*>(.*?)</td>", text[text.index('id="grades"') : text.index("in their true class")])
    assert cells == ["below 5.56 %", "<b>4</b>", "0", "from 5.56 %", "0", "<b>4</b>"]
    assert report.grade_names([3.2, 5.56]) == ["below 3.2 %", "3.2 to 5.56 %", "from 5.56 %"]
    assert "Light blue where mask and truth agree" in text
    assert "measured on new</td><td>Another study. Licence: by hand. Card <code>" + "ef" * 32 in text
    assert "cd" * 32 in text and "member 2: run seed</td><td><code>12345" in text
    review = text[text.index("Check these first") : text.index("All scans")]
    assert re.findall(r">(p\d)</a>", review) == ["p3", "p1"]  # the fifth of eight scans with the least expected Dice


def browser(folder, tmp_path, script):
    """What a page's script leaves in the title after acting on the report as a reader would."""
    page = tmp_path / "page.html"
    text = (folder / "report.html").read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>")
    page.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=2000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return re.search(r"<title>(.*?)</title>", done.stdout).group(1)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_sorts_the_list_and_filters_it(folder, tmp_path):
    read = "[...document.querySelectorAll('#scans tbody tr')].filter(r => !r.hidden).map(r => r.cells[1].innerText)"
    click = "[...document.querySelectorAll('#scans th button')].find(b => b.textContent === 'NAME').click();"
    by_dice = [f"p{index}" for index in np.argsort(DICE, kind="stable")]
    once = browser(folder, tmp_path, click.replace("NAME", "Dice") + f"document.title = {read}.join(' ')")
    assert once.split() == by_dice
    twice = browser(folder, tmp_path, 2 * click.replace("NAME", "Dice") + f"document.title = {read}.join(' ')")
    assert twice.split() == by_dice[::-1]
    last = browser(folder, tmp_path, click.replace("NAME", "recall") + f"document.title = {read}.at(-1)")
    assert last == "p0"  # what has no number comes last
    last = browser(folder, tmp_path, 2 * click.replace("NAME", "recall") + f"document.title = {read}.at(-1)")
    assert last == "p0"  # either way
    filtered = browser(
        folder, tmp_path,
        "const box = document.getElementById('filter'); box.value = 'philips'; box.dispatchEvent(new Event('input'));"
        f"document.title = {read}.join(' ')",
    )  # fmt: skip
    assert filtered.split() == ["p0", "p2", "p4", "p6"]
