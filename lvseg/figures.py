"""Charts of runs and of agreement; as a command, learning curves of several runs.

    python -m lvseg.figures runs/volume/base-fold0 runs/volume/base-fold1 runs/volume/best-fold0 -o figures

Every chart is written twice, as .svg and as .png. Colours are Okabe and Ito's, told apart by colour-blind readers, and
every series also has a line style or a marker of its own, so that charts can be read in grey.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lvseg.agreement import CLOSE_PERCENT
from lvseg.command import atomic, run
from lvseg.errors import InputError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH_INCH, HEIGHT_INCH = 6.4, 4.4
MOST_NAMED = 12  # outliers; more names than this cannot be read
# Of metrics.csv: column, name of the file, and what the axis says.
CURVES = (
    ("validation_dice", "dice", "Dice of validation patients"),
    ("validation_volume_error_percent", "volume_error", "mean absolute volume error of validation patients (%)"),
    ("validation_fat_error_points", "fat_error", "mean absolute fat-fraction error (percentage points)"),
)
FOLD = re.compile(r"-fold\d+$")
# Text stays text in SVG; the salt and the missing date make the same chart the same file.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "lvseg", "font.size": 10, "axes.spines.top": False,
         "axes.spines.right": False}  # fmt: skip


def learning_curves(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, str]]]], column: str, label: str, path: Path
) -> bool:
    """Draws a column of metrics.csv over training steps: the mean over folds with the range of the folds around it, and
    says so where not all folds have every step.

    Args:
        runs: of each name its folds, each the rows of a metrics.csv.
        column: of metrics.csv; label: of the axis.
        path: without suffix.

    Returns:
        Whether any run has that column; nothing is drawn otherwise.
    """
    figure, axes = _chart("training step", label)
    for number, (name, folds) in enumerate(runs.items()):
        curves = [
            {int(row["step"]): float(row[column]) for row in rows if row.get(column) not in (None, "")}
            for rows in folds
        ]
        curves = [curve for curve in curves if curve]
        if not curves:
            continue
        steps = sorted({step for curve in curves for step in curve})
        values = [[curve[step] for curve in curves if step in curve] for step in steps]
        colour = COLOURS[number % len(COLOURS)]
        # Folds that end early, or go on still, leave the mean to the others: it may leap without any fold doing so.
        least, most = min(map(len, values)), max(map(len, values))
        folds_of = (
            f" ({len(curves)} folds{f', {least} to {most} at a step' * (least < most)})" if len(curves) > 1 else ""
        )
        axes.plot(
            steps, [np.mean(each) for each in values], color=colour, linestyle=LINES[number % len(LINES)],
            label=f"{name}{folds_of}",
        )  # fmt: skip
        if len(curves) > 1:
            axes.fill_between(steps, [min(each) for each in values], [max(each) for each in values],
                              color=colour, alpha=0.18, linewidth=0)  # fmt: skip
    if not axes.lines:
        return False
    axes.legend(frameon=False)
    save(figure, path)
    return True


def predicted_against_true(rows: Sequence[Mapping[str, Any]], what: str, unit: str, path: Path) -> None:
    """Draws predicted over true numbers with the lines of 5 % error, and names the scans beyond them.

    Args:
        rows: patient, scanner, predicted and true of each scan.
        what: is measured; unit: of it.
        path: without suffix.
    """
    figure, axes = _chart(f"true {what} ({unit})", f"predicted {what} ({unit})")
    true, predicted = _columns(rows)
    top = 1.08 * max(float(true.max()), float(predicted.max()), 1e-9)
    ends = np.array([0.0, top])
    axes.plot(ends, ends, color="black", linewidth=0.8, label="equal")
    for sign, name in ((1, f"{CLOSE_PERCENT:g} % error"), (-1, None)):
        axes.plot(
            ends, ends * (1 + sign * CLOSE_PERCENT / 100), color="grey", linestyle="--", linewidth=0.8, label=name
        )
    _scatter(axes, rows, true, predicted)
    error = np.abs(predicted - true)
    _name(axes, rows, true, predicted, np.where(error >= CLOSE_PERCENT / 100 * true, error, 0))
    low = max(0.0, min(float(true.min()), float(predicted.min())) - 0.08 * top)
    axes.set(xlim=(low, top), ylim=(low, top), aspect="equal")
    axes.legend(frameon=False, loc="upper left", fontsize="small")
    save(figure, path)


def bland_altman(
    rows: Sequence[Mapping[str, Any]], limits: Mapping[str, Any], what: str, unit: str, path: Path
) -> None:
    """Draws errors over true numbers with bias, limits of agreement and their 95 % intervals; names those outside.

    The true number is on the axis, not the mean of both as where neither method is the truth (Krouwer, Stat Med 2008,
    27:778).

    Args:
        rows: patient, scanner, predicted and true of each scan.
        limits: of `agreement.agreement`.
        what: is measured; unit: of it and of the errors.
        path: without suffix.
    """
    figure, axes = _chart(f"true {what} ({unit})", f"predicted minus true ({unit})")
    true, predicted = _columns(rows)
    errors = predicted - true
    _scatter(axes, rows, true, errors)
    axes.axhline(0, color="black", linewidth=0.6)
    for name, style, said in (
        ("bias", "-", "bias"),
        ("limit_of_agreement_upper", "--", "95 % limits"),
        ("limit_of_agreement_lower", "--", None),
    ):
        value, interval = limits[name], limits["intervals"][name]
        if value is None:
            continue
        axes.axhline(value, color=COLOURS[0], linestyle=style, linewidth=1.2, label=said)
        axes.annotate(f"{value:+.3g}", (1.0, value), xycoords=("axes fraction", "data"), xytext=(3, 0),
                      textcoords="offset points", va="center", fontsize="small", annotation_clip=False)  # fmt: skip
        if interval is not None:
            axes.axhspan(*interval, color=COLOURS[0], alpha=0.12, linewidth=0)
    lower, upper = limits["limit_of_agreement_lower"], limits["limit_of_agreement_upper"]
    if lower is not None:
        _name(axes, rows, true, errors, np.where((errors < lower) | (errors > upper), np.abs(errors), 0))
    axes.legend(frameon=False, fontsize="small")
    save(figure, path)


def risk_coverage(expected: npt.ArrayLike, dice: npt.ArrayLike, path: Path) -> None:
    """Draws the mean Dice error of the scans that are kept when those of the lowest expected Dice are checked by hand.

    Args:
        expected: float [scans]; dice: float [scans], the truth; path: without suffix.
    """
    figure, axes = _chart("scans kept without a look (%)", "their mean Dice")
    quality, truth = np.asarray(expected, float), np.asarray(dice, float)
    count = np.arange(1, truth.size + 1)
    share = 100 * count / truth.size
    for order, colour, style, name in (
        (np.argsort(-quality, kind="stable"), COLOURS[0], "-", "by expected Dice"),
        (np.argsort(-truth, kind="stable"), COLOURS[2], ":", "by true Dice (the best possible)"),
    ):
        axes.plot(share, np.cumsum(truth[order]) / count, color=colour, linestyle=style, label=name)
    axes.axhline(truth.mean(), color="grey", linestyle="--", linewidth=0.8, label="at random")
    axes.legend(frameon=False, fontsize="small")
    save(figure, path)


def expected_against_true_dice(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the Dice that was expected without the truth over the true one.

    Args:
        rows: patient, scanner, predicted (the expected Dice) and true of each scan; path: without suffix.
    """
    figure, axes = _chart("true Dice", "expected Dice")
    true, expected = _columns(rows)
    low = max(0.0, min(float(true.min()), float(expected.min())) - 0.02)
    axes.plot([low, 1], [low, 1], color="black", linewidth=0.8, label="equal")
    _scatter(axes, rows, true, expected)
    axes.set(xlim=(low, 1.005), ylim=(low, 1.005), aspect="equal")
    axes.legend(frameon=False, loc="upper left", fontsize="small")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Writes a chart twice, as .svg and as .png; path: without suffix."""
    with mpl.rc_context(STYLE):
        for suffix, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 150})):
            with atomic(path.with_name(path.name + suffix)) as temporary:
                figure.savefig(temporary, **options)


def _chart(across: str, up: str) -> tuple[Figure, Axes]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCH, HEIGHT_INCH), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.grid(color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, axes


def _columns(rows: Sequence[Mapping[str, Any]]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    true, predicted = (np.array([row[key] for row in rows], np.float64) for key in ("true", "predicted"))
    return true, predicted


def _scatter(axes: Axes, rows: Sequence[Mapping[str, Any]], x: npt.NDArray[Any], y: npt.NDArray[Any]) -> None:
    scanners = np.array([row["scanner"] for row in rows])
    for number, scanner in enumerate(sorted(set(scanners))):
        chosen = scanners == scanner
        label = f"{scanner} (n = {chosen.sum()})"
        axes.scatter(x[chosen], y[chosen], s=26, color=COLOURS[number % len(COLOURS)], alpha=0.85,
                     marker=MARKERS[number % len(MARKERS)], linewidths=0, label=label)  # fmt: skip


def _name(
    axes: Axes, rows: Sequence[Mapping[str, Any]], x: npt.NDArray[Any], y: npt.NDArray[Any], size: npt.NDArray[Any]
) -> None:
    """Writes the patient beside the points of the largest sizes above zero."""
    for index in np.argsort(-size, kind="stable")[:MOST_NAMED]:
        if size[index] > 0:
            axes.annotate(str(rows[index]["patient"]), (x[index], y[index]), xytext=(5, 3), textcoords="offset points",
                          fontsize=7, parse_math=False)  # fmt: skip


def _metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv, whose numbers are numbers."""
    path = folder / "metrics.csv"
    if not path.is_file():
        raise InputError("NOT_FOUND", f"Expected a run folder with metrics.csv, received none at {path}.")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            int(row["step"])
            for column, _, _ in CURVES:
                float(row.get(column) or 0)
    except (ValueError, KeyError, csv.Error) as error:
        raise InputError("BAD_FILE", f"Expected the rows that training wrote, received others in {path}.") from error
    if not rows:
        raise InputError("BAD_FILE", f"Expected at least one validation, received none in {path}.")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="lvseg.figures",
        description="Draws Dice and errors over training steps for several runs, folds of one name together.",
        epilog="Example: python -m lvseg.figures runs/volume/base-fold* runs/volume/best-fold* -o figures",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the charts")

    def body(arguments: argparse.Namespace) -> None:
        folders = [folder.resolve() for folder in arguments.runs]
        if len(set(folders)) < len(folders):
            raise InputError("BAD_ARGUMENT", f"Expected every run once, received {' '.join(map(str, arguments.runs))}.")
        several = len({folder.parent for folder in folders}) > 1
        runs: dict[str, list[list[dict[str, str]]]] = {}
        for folder in folders:
            name = FOLD.sub("", folder.name)
            runs.setdefault(f"{folder.parent.name}/{name}" if several else name, []).append(_metrics(folder))
        for column, name, label in CURVES:
            if learning_curves(runs, column, label, arguments.out / name):
                print(f"{arguments.out / name}.svg, .png")

    return run(parser, body, argv)


if __name__ == "__main__":
    sys.exit(main())
