"""Charts: what they show is read back from the axes and from the SVG, as a reader of the page would see it."""

import csv
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes

from lvseg import figures
from lvseg.agreement import agreement

ROWS = [
    {"patient": f"p{index:02}", "scanner": "ge" if index % 2 else "philips", "true": 1000.0 + 50 * index,
     "predicted": 1000.0 + 50 * index + error}
    for index, error in enumerate([10, -20, 5, 0, 15, -5, 12, -8, 3, 250])
]  # fmt: skip


def texts(path: Path) -> str:
    return " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8")))


def write_run(folder: Path, dice: dict[int, float], **columns: dict[int, float]) -> Path:
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["step", "validation_dice", *columns])
        table.writeheader()
        for step, value in dice.items():
            table.writerow(
                {"step": step, "validation_dice": value} | {name: own[step] for name, own in columns.items()}
            )
    return folder


def test_scans_beyond_five_percent_are_named_and_no_others(tmp_path):
    figures.predicted_against_true(ROWS, "liver volume", "ml", tmp_path / "volume")
    shown = texts(tmp_path / "volume.svg")
    assert "p09" in shown and "p01" not in shown
    assert "philips (n = 5)" in shown and "ge (n = 5)" in shown and "true liver volume (ml)" in shown


def test_bland_altman_shows_bias_and_limits_and_names_who_is_outside(tmp_path):
    limits = agreement([row["predicted"] for row in ROWS], [row["true"] for row in ROWS])
    figures.bland_altman(ROWS, limits, "liver volume", "ml", tmp_path / "errors")
    shown = texts(tmp_path / "errors.svg")
    for name in ("bias", "limit_of_agreement_lower", "limit_of_agreement_upper"):
        assert f"{limits[name]:+.3g}" in shown.split()
    assert limits["bias"] > 0 > limits["limit_of_agreement_lower"]
    assert "p09" in shown and "p03" not in shown


def test_one_patient_has_a_chart_too(tmp_path):
    figures.bland_altman(ROWS[:1], agreement([1.0], [2.0]), "volume", "ml", tmp_path / "one")
    assert (tmp_path / "one.png").stat().st_size > 5000


def test_folds_of_one_name_are_a_line_with_the_range_around_it(tmp_path, monkeypatch, capsys):
    runs = [
        write_run(tmp_path / "runs/base-fold0", {100: 0.6, 200: 0.8}),
        write_run(tmp_path / "runs/base-fold1", {100: 0.8, 200: 0.9}),
        write_run(
            tmp_path / "runs/best-fold0", {100: 0.7, 200: 0.95}, validation_volume_error_percent={100: 9, 200: 3}
        ),
    ]
    drawn, filled = {}, []
    plot, fill = Axes.plot, Axes.fill_between
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda self, x, y, **style: (
            drawn.update({(self.get_ylabel(), style["label"]): (x, y)}) or plot(self, x, y, **style)
        ),
    )
    monkeypatch.setattr(
        Axes, "fill_between", lambda self, *band, **style: filled.append(band) or fill(self, *band, **style)
    )
    assert figures.main([*map(str, runs), "-o", str(tmp_path / "figures")]) == 0
    dice, volume = (label for column, _, label in figures.CURVES[:2])
    steps, means = drawn[dice, "base (2 folds)"]
    assert steps == [100, 200] and means == pytest.approx([0.7, 0.85])
    assert drawn[dice, "best"][1] == [0.7, 0.95] and drawn[volume, "best"][1] == [9.0, 3.0]
    assert filled == [([100, 200], [0.6, 0.8], [0.8, 0.9])]
    assert capsys.readouterr().out.count("\n") == 2  # no run has errors of fat
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "dice.svg", "dice.png", "volume_error.svg", "volume_error.png",
    }  # fmt: skip


def test_a_fold_that_ended_early_is_told_beside_the_mean_of_those_that_went_on(tmp_path, monkeypatch):
    runs = [
        write_run(tmp_path / "runs/base-fold0", {100: 0.6}),
        write_run(tmp_path / "runs/base-fold1", {100: 0.8, 200: 0.9}),
    ]
    labels, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *given, **style: labels.append(style["label"]) or plot(*given, **style))
    assert figures.main([*map(str, runs), "-o", str(tmp_path / "figures")]) == 0
    assert set(labels) == {"base (2 folds, 1 to 2 at a step)"}


def test_a_folder_that_is_no_run_is_told(tmp_path, capsys):
    assert figures.main([str(tmp_path), "-o", str(tmp_path / "figures")]) == 2
    assert "Expected a run folder with metrics.csv" in capsys.readouterr().err
    assert not (tmp_path / "figures").exists()


def test_keeping_only_the_best_by_a_perfect_estimate_is_the_best_possible(tmp_path, monkeypatch):
    drawn = {}
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, **style: drawn.update({style["label"]: y}) or plot(self, x, y, **style)
    )
    dice = [0.5, 0.9, 0.7]
    figures.risk_coverage(dice, dice, tmp_path / "chart")
    by_expected, best = drawn["by expected Dice"], drawn["by true Dice (the best possible)"]
    np.testing.assert_allclose(by_expected, [0.9, 0.8, 0.7])
    np.testing.assert_allclose(best, by_expected)
    figures.risk_coverage([0.9, 0.5, 0.7], dice, tmp_path / "chart")
    np.testing.assert_allclose(drawn["by expected Dice"], [0.5, 0.6, 0.7])


def test_the_same_chart_is_the_same_file_and_reads_in_grey(tmp_path):
    for name in ("one", "other"):
        figures.predicted_against_true(ROWS, "volume", "ml", tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()
    assert matplotlib.image.imread(tmp_path / "one.png").shape[2] == 4
    styles = [(figures.LINES[index], figures.MARKERS[index]) for index in range(len(figures.COLOURS))]
    assert len({str(line) for line, _ in styles}) == len({marker for _, marker in styles}) == len(styles)


def test_runs_of_two_tasks_are_two_lines_and_none_is_drawn_twice(tmp_path, capsys):
    runs = [write_run(tmp_path / task / "base-fold0", {100: 0.6}) for task in ("volume", "fatfraction")]
    assert figures.main([*map(str, runs), "-o", str(tmp_path / "figures")]) == 0
    shown = texts(tmp_path / "figures/dice.svg")
    assert "volume/base" in shown and "fatfraction/base" in shown and "folds" not in shown
    assert figures.main([str(runs[0]), str(runs[0]), "-o", str(tmp_path / "figures")]) == 2
    assert "Expected every run once" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "step,validation_dice\n", "step,validation_dice\n1,good\n", "dice\n0.5\n"])
def test_a_broken_table_is_one_sentence(tmp_path, capsys, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.csv").write_text(content)
    assert figures.main([str(tmp_path / "run"), "-o", str(tmp_path / "figures")]) == 2
    assert str(tmp_path / "run/metrics.csv") in capsys.readouterr().err
    assert not (tmp_path / "figures").exists()
