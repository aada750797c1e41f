"""The rows that curve.py measured, as a table and as curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from lvseg import agreement, figures

WAYS = {"report": "as in the report", "any": "for any scanner"}


@dataclass(frozen=True)
class Measure:
    """A column of the rows.

    Attributes:
        name: in words.
        unit: after a number; digits: after its point.
        maximum: what the number can be at all.
    """

    name: str
    unit: str
    digits: int
    maximum: float

    def text(self, mean: float, low: float, high: float) -> str:
        """A mean with its interval, where there is one."""
        interval = "no interval" if math.isnan(low) else f"{low:.{self.digits}f} to {high:.{self.digits}f}"
        return f"{mean:.{self.digits}f}{self.unit} ({interval})"


MEASURES = {
    "dice": Measure("mean Dice", "", 3, 1.0),
    "volume_error_percent": Measure("mean absolute volume error", " %", 2, math.inf),
    "fat_error_points": Measure("mean absolute fat error", " points", 2, math.inf),
}


@dataclass(frozen=True)
class Point:
    """What was measured with so many segmented patients of a new scanner.

    Attributes:
        measures: of each column that has values of two patients or more, the mean of the absolute values over patients
            and draws, and its 95 % interval over patients (NaN where there is none).
        dice_of_draws: mean Dice of each draw.
    """

    scanner: str
    way: str
    made_of: str
    patients: int
    measures: Mapping[str, tuple[float, float, float]]
    dice_of_draws: Sequence[float]

    @property
    def series(self) -> tuple[str, str]:
        """What a curve has one of."""
        return self.way, self.made_of


def points(rows: Sequence[Mapping[str, str]]) -> list[Point]:
    """The points of the curves, in order of scanner, way, what it was made of, and number of patients."""
    found: dict[tuple[str, str, str, int], list[Mapping[str, str]]] = {}
    for row in rows:
        found.setdefault((row["scanner"], row["way"], row["made_of"], int(row["patients"])), []).append(row)
    return [Point(*key, _measures(own), _draws(own)) for key, own in sorted(found.items())]


def _measures(rows: Sequence[Mapping[str, str]]) -> dict[str, tuple[float, float, float]]:
    means: dict[str, tuple[float, float, float]] = {}
    for column, measure in MEASURES.items():
        values = [(abs(float(row[column])), row["patient"]) for row in rows if row[column] not in ("", None)]
        if len({patient for _, patient in values}) > 1:
            numbers, names = zip(*values, strict=True)
            mean = agreement.average(numbers, agreement.Bootstrap(names), 0.0, measure.maximum)
            low, high = mean["intervals"]["mean"] or (math.nan, math.nan)
            means[column] = (mean["mean"], low, high)
    return means


def _draws(rows: Sequence[Mapping[str, str]]) -> list[float]:
    draws: dict[str, list[float]] = {}
    for row in rows:
        draws.setdefault(row["draw"], []).append(float(row["dice"]))
    return [float(np.mean(values)) for values in draws.values()]


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Means over patients and draws with 95 % intervals over patients, and the draws' least and greatest mean Dice, in
    Markdown."""
    names = ["new scanner", "way", "made of", "segmented patients", "draws", "mean Dice of each"]
    names += [measure.name for measure in MEASURES.values()]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for point in points(rows):
        draws = point.dice_of_draws
        spread = f"{min(draws):.3f} to {max(draws):.3f}" if len(draws) > 1 else "-"
        cells = [point.scanner, point.way, point.made_of, str(point.patients), str(len(draws)), spread]
        for column, measure in MEASURES.items():
            cells.append(measure.text(*point.measures[column]) if column in point.measures else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curves(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """The table as curves, a column of panels for each new scanner, with intervals and, of Dice, the mean of each draw.

    Args:
        path: without suffix; nothing is written where nothing was measured of two patients or more.
    """
    every = [point for point in points(rows) if point.measures]
    scanners, counts = sorted({point.scanner for point in every}), sorted({point.patients for point in every})
    series = sorted({point.series for point in every}, key=lambda each: (list(WAYS).index(each[0]), each[1]))
    shown = [column for column in MEASURES if any(column in point.measures for point in every)]
    if not shown:
        return
    size = max(5.5, 1.4 + 3 * len(scanners)), 0.6 + 0.25 * len(series) + 2.5 * len(shown)
    with mpl.rc_context(figures.STYLE):
        figure, axes = plt.subplots(
            len(shown), len(scanners), figsize=size, layout="constrained", sharex=True, sharey="row", squeeze=False
        )
        for column, panels in zip(shown, axes, strict=True):
            measure, own = MEASURES[column], [point for point in every if column in point.measures]
            is_logarithmic = measure.maximum == math.inf and all(point.measures[column][0] > 0 for point in own)
            for scanner, panel in zip(scanners, panels, strict=True):
                for number, (way, made_of) in enumerate(series):
                    line = [point for point in own if (point.scanner, *point.series) == (scanner, way, made_of)]
                    _curve(panel, line, column, counts, number, len(series), f"{WAYS[way]} ({made_of})")
                if is_logarithmic:  # errors may be of 100 % here and of 1 % there
                    panel.set_yscale("log")
                    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                    panel.yaxis.set_major_formatter(ScalarFormatter())
                    panel.yaxis.set_minor_formatter(NullFormatter())
                panel.set_xticks(range(len(counts)), list(map(str, counts)))
                panel.set_xlim(-0.5, len(counts) - 0.5)
                panel.grid(color="0.92", linewidth=0.6)
            panels[0].set_ylabel(f"{measure.name}{measure.unit and f' ({measure.unit.strip()})'}")
        for scanner, top, bottom in zip(scanners, axes[0], axes[-1], strict=True):
            top.set_title(f"onto {scanner}", fontsize=10)
            bottom.set_xlabel("segmented patients")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside upper center")
        figures.save(figure, path)
    plt.close(figure)


def _curve(
    panel: Axes, line: Sequence[Point], column: str, counts: Sequence[int], number: int, of: int, name: str
) -> None:
    """One of so many lines beside each other; where it has no point its place in the legend stays."""
    shift = min(0.14, 0.7 / of) * (number - (of - 1) / 2)
    places = [counts.index(point.patients) + shift for point in line]
    means, lows, highs = np.array([point.measures[column] for point in line]).reshape(-1, 3).T
    bars = np.maximum(np.nan_to_num(np.stack([means - lows, highs - means])), 0)  # no interval, no bar
    colour = figures.COLOURS[number % len(figures.COLOURS)]
    panel.errorbar(
        places, means, bars, color=colour, marker=figures.MARKERS[number % len(figures.MARKERS)], markersize=4,
        linestyle=figures.LINES[number // len(figures.COLOURS) % len(figures.LINES)], capsize=2, linewidth=1.2,
        label=name,
    )  # fmt: skip
    for place, point in zip(places, line, strict=True):
        if column == "dice" and len(point.dice_of_draws) > 1:
            panel.plot([place] * len(point.dice_of_draws), point.dice_of_draws, "_", color=colour, markersize=9)
