"""Command: two evaluations of the same scans -> which run does better, and whether that could be chance.

python -m lvseg.compare runs/volume/base-fold0 runs/volume/best-fold0
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvseg import agreement, command
from lvseg.errors import InputError

KEY = ("dataset", "patient", "study", "class")
# What is compared, what it is called, and whether more is better.
MEASURES = (
    ("dice", "Dice", True),
    ("hausdorff_95_mm", "95 % Hausdorff distance (mm)", False),
    ("volume_error_percent", "absolute volume error (%)", False),
    ("fat_error_points", "absolute fat-fraction error (points)", False),
)


def compare(first: Path, second: Path, seed: int = 0) -> list[dict[str, Any]]:
    """Paired comparison of two evaluations, class by class.

    Args:
        first: a run, or the folder of a report.
        second: likewise; of the same scans.
        seed: of the bootstrap.

    Returns:
        Of each class and measure, over the scans that have the number in both: class, measure, name,
        higher_is_better, first and second (means), better, equal and worse (patients), and the numbers of
        `agreement.paired_difference` (second minus first).

    Raises:
        InputError: NOT_FOUND; BAD_SCANS if they are not of the same scans.
    """
    tables = [_read(folder) for folder in (first, second)]
    missing = set(tables[0]) ^ set(tables[1])
    if missing:
        key = min(missing)
        has, lacks = (first, second) if key in tables[0] else (second, first)
        raise InputError(
            "BAD_SCANS",
            f"Expected two evaluations of the same scans, received {' '.join(key)} in {has} and not in {lacks}.",
        )
    results = []
    for organ in dict.fromkeys(key[3] for key in tables[0]):
        keys = [key for key in tables[0] if key[3] == organ]
        for column, name, higher in MEASURES:
            pairs = [
                (key[1], one, other)
                for key in keys
                if (one := _number(tables[0][key], column)) is not None
                and (other := _number(tables[1][key], column)) is not None
            ]
            if not pairs:
                continue
            patients, ones, others = zip(*pairs, strict=True)
            numbers = agreement.paired_difference(ones, others, patients, seed)
            ends = [numbers.pop("higher"), numbers.pop("lower")]
            better, worse = ends if higher else ends[::-1]
            results.append(
                {
                    "class": organ,
                    "measure": column,
                    "name": name,
                    "higher_is_better": higher,
                    "first": sum(ones) / len(ones),
                    "second": sum(others) / len(others),
                    "better": better,
                    "worse": worse,
                    **numbers,
                }
            )
    return results


def _read(folder: Path) -> dict[tuple[str, ...], dict[str, str]]:
    path = folder / "patients.csv"
    if not path.is_file():
        path = folder / "report" / "patients.csv"
    if not path.is_file():
        raise InputError("NOT_FOUND", f"Expected an evaluated run, received no {path}; run lvseg.evaluate first.")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError("BAD_FILE", f"Expected a table in UTF-8, received another file in {path}.") from error
    if not rows or not {*KEY, "dice"} <= set(rows[0]):
        raise InputError("BAD_SCANS", f"Expected rows that lvseg.evaluate wrote, received others in {path}.")
    table = {tuple(row[name] for name in KEY): row for row in rows}
    if len(table) < len(rows):
        raise InputError("BAD_SCANS", f"Expected a row a scan and class, received two of one in {path}.")
    return table


def _number(row: dict[str, str], column: str) -> float | None:
    """A row's measure as a number that is good or bad; errors by their size."""
    try:
        if column == "fat_error_points":
            fat = [row.get(f"{name}_fat_mean_percent") for name in ("predicted", "true")]
            return abs(float(fat[0]) - float(fat[1])) if fat[0] and fat[1] else None
        value = row.get(column)
        return abs(float(value)) if value else None
    except ValueError as error:
        raise InputError(
            "BAD_SCANS", f"Expected numbers in the columns of {column}, received {error} for patient {row['patient']}."
        ) from error


def print_results(results: Sequence[dict[str, Any]], first: Path, second: Path) -> None:
    """Prints a comparison as a table, a line a measure."""
    print(f"first: {first}\nsecond: {second}\n")
    print(
        f"{'measure':<38}{'scans':>6}{'first':>9}{'second':>9}{'difference':>12}{'95 % interval':>22}{'Wilcoxon p':>12}"
    )
    for result in results:
        interval = result["intervals"]["mean_difference"]
        bounds = "-" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"
        print(
            f"{result['class'] + ', ' + result['name']:<38}{result['n']:>6}"
            f"{result['first']:>9.4f}{result['second']:>9.4f}"
            f"{result['mean_difference']:>+12.4f}{bounds:>22}{result['wilcoxon_p']:>12.3g}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="lvseg.compare",
        description="Compares two evaluations of the same scans, patient by patient.",
        epilog="Example: python -m lvseg.compare runs/volume/base-fold0 runs/volume/best-fold0",
    )
    parser.add_argument("first", type=Path, help="a run, or the folder of a report")
    parser.add_argument("second", type=Path, help="another, of the same scans")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")

    def body(arguments: argparse.Namespace) -> None:
        if arguments.seed < 0:
            raise InputError("BAD_ARGUMENT", f"Expected --seed of 0 or more, received {arguments.seed}.")
        if arguments.json is not None and arguments.json.is_dir():
            raise InputError("BAD_OUTPUT", f"Expected a file for --json, received the folder {arguments.json}.")
        results = compare(arguments.first, arguments.second, arguments.seed)
        print_results(results, arguments.first, arguments.second)
        if arguments.json is not None:
            with command.atomic(arguments.json) as temporary:
                temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")

    return command.run(parser, body, argv)


if __name__ == "__main__":
    sys.exit(main())
