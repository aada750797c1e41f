"""An evaluation as one HTML file: numbers with their uncertainty, pictures, which scans to check, what made it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lvseg import command, overlays, page

PAGE = "report.html"
# Of the table of agreement: section of summary.json, key in it, what it says, unit, decimals.
LINES = (
    ("dice", "mean", "Dice, mean", "", 3),
    ("dice", "median", "Dice, median", "", 3),
    ("dice", "minimum", "Dice, lowest", "", 3),
    ("precision", "mean", "precision, mean", "", 3),
    ("recall", "mean", "recall, mean", "", 3),
    ("hausdorff_95_mm", "mean", "95 % Hausdorff distance, mean", "mm", 1),
    ("mean_surface_distance_mm", "mean", "surface distance, mean", "mm", 2),
    ("voxel_error_percent", "mean", "wrong voxels of the scan, mean", "%", 2),
)
AGREEMENT = (
    ("bias", "bias", 1),
    ("sd", "standard deviation of errors", 1),
    ("limit_of_agreement_lower", "95 % limit of agreement, lower", 1),
    ("limit_of_agreement_upper", "95 % limit of agreement, upper", 1),
    ("mean_absolute_error", "mean absolute error", 1),
)
RELATIVE = (
    ("bias_percent", "bias, relative", 2),
    ("limit_of_agreement_lower_percent", "95 % limit of agreement, lower, relative", 2),
    ("limit_of_agreement_upper_percent", "95 % limit of agreement, upper, relative", 2),
    ("mean_absolute_error_percent", "mean absolute error, relative", 2),
    ("median_absolute_error_percent", "median absolute error, relative", 2),
    ("largest_error_percent", "largest absolute error, relative", 2),
)
COEFFICIENTS = (
    ("share_within_5_percent", "share within 5 % of the true number", 3),
    ("concordance", "Lin's concordance", 4),
    ("icc_a1", "ICC(A,1)", 4),
)
CHECK_SHARE = 0.2  # of the scans, at the head of the list for review
CHARTS = (
    ("volume_predicted", "Predicted over true volume; names beyond 5 %"),
    ("volume_bland_altman", "Errors of volume, bias and limits of agreement with their 95 % intervals"),
    ("fat_fraction_predicted", "Predicted over true mean fat fraction; names beyond 5 % of it"),
    ("fat_fraction_bland_altman", "Errors of fat fraction in points, with bias and limits"),
    ("expected_dice", "Expected Dice, without the truth, over the true one"),
    ("risk_coverage", "Mean Dice of the scans kept, where those of the lowest expected Dice are checked by hand"),
)


def write(
    folder: Path, summary: Mapping[str, Any], rows: Sequence[dict[str, Any]], provenance: Mapping[str, Any]
) -> Path:
    """Writes a report folder's page from its numbers and pictures, and returns it.

    Args:
        folder: with the charts (.svg), overlays (overlay_*.png) and `pictures/`; summary: of summary.json; rows: of
            patients.csv; provenance: what made the model and the report.
    """
    judged = [row for row in rows if row["class"] == summary["class"] and row.get("expected_dice") is not None]
    review = sorted(judged, key=lambda row: (row["expected_dice"], row["patient"]))
    others = summary.get("classes", {})
    of_first = f"{summary['class']}, " if others else ""  # what is on top, and of each scanner, is of the first class
    parts = [(f"{of_first}{name}", part) for name, part in (("all", summary), *summary["by_scanner"].items())]
    parts += [(f"{name}, all", part) for name, part in others.items()]
    stream = page.template(
        "report.html"
    ).stream(
        summary=summary,
        rows=rows,
        parts=[name for name, _ in parts] if len(parts) > 2 else [parts[0][0]],
        table=table([part for _, part in parts] if len(parts) > 2 else [summary]),
        steatosis=summary.get("steatosis"),
        grades=summary.get("steatosis_grades"),
        grade_names=grade_names(summary.get("grades_percent", ())),
        colours=overlays.PALETTES[summary["palette"]].names,
        charts=[(page.data_uri(path), text) for name, text in CHARTS if (path := folder / f"{name}.svg").is_file()],
        overlays=[(path.stem.replace("_", " "), page.data_uri(path)) for path in sorted(folder.glob("overlay_*.png"))],
        picture=lambda row: page.data_uri(folder / row["picture"]),  # one at a time, whatever the number of scans
        check=review[: math.ceil(CHECK_SHARE * len(review))],
        provenance=provenance,
    )
    path = folder / PAGE
    with command.atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(stream)
    return path


def table(parts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[str]]]:
    """The table of agreement: of each number what it is, its unit, and its value with interval in every part."""
    lines = []
    for section, key, name, unit, digits in LINES:
        lines.append((name, unit, [_value(part, section, key, digits) for part in parts]))
    for tolerance in sorted(key for key in parts[0] if key.startswith("surface_dice_")):
        name = f"surface Dice within {tolerance.removeprefix('surface_dice_').removesuffix('mm')} mm, mean"
        lines.append((name, "", [_value(part, tolerance, "mean", 3) for part in parts]))
    for section, what, unit, more in (
        ("volume_ml", "volume", "ml", 0),
        ("fat_fraction_percent", "fat fraction", "points", 1),
    ):
        if any(part.get(section) for part in parts):
            for chosen, own_unit, own_more in ((AGREEMENT, unit, more), (RELATIVE, "%", 0), (COEFFICIENTS, "", 0)):
                for key, name, digits in chosen:
                    values = [_value(part, section, key, digits + own_more) for part in parts]
                    lines.append((f"{what}: {name}", own_unit, values))
    return lines


def grade_names(grades_percent: Sequence[float]) -> list[str]:
    """What to call the classes that these thresholds make: "below 5.56 %", "5.56 to 16.3 %", "from 16.3 %"."""
    if not grades_percent:
        return []
    between = [f"{low:g} to {high:g} %" for low, high in itertools.pairwise(grades_percent)]
    return [f"below {grades_percent[0]:g} %", *between, f"from {grades_percent[-1]:g} %"]


def _value(part: Mapping[str, Any], name: str, key: str, digits: int) -> str:
    """A number with its interval, "0.963 (0.958 to 0.967)", and of how many scans it is where not of all."""
    section = part.get(name)
    if section is None or section.get(key) is None:
        return "-"
    interval = section["intervals"].get(key)
    bounds = "" if interval is None else f" ({page.number(interval[0], digits)} to {page.number(interval[1], digits)})"
    scans = section.get("scans", section.get("n_percent" if key.endswith("_percent") else "n"))
    return page.number(section[key], digits) + bounds + (f", {scans} scans" if scans < part["scans"] else "")
