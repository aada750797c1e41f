"""Command: two evaluations of the same scans -> which run does better, and whether that could be chance.

python -m lvseg.compare runs/volume/base-fold0 runs/volume/best-fold0
"""

from __future__ import annotations

import argparse
import csv
import json
import math
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
        higher_is_better, first and second (means), only_first and only_second (scans that have the number in one alone,
        as a mask that is empty in the other has no distance), better, equal and worse (patients), and the numbers of
        `agreement.paired_difference` (second minus first). Where no scan has the number in both, n is 0 and no other
        of these is there.

    Raises:
        InputError: NOT_FOUND; BAD_SCANS if they are not of the same scans, or were held against other true masks.
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
    for key, row in tables[0].items():
        true = [each.get("true_voxels") for each in (row, tables[1][key])]
        if true[0] != true[1]:
            raise InputError(
                "BAD_SCANS",
                f"Expected the same true masks in both evaluations, received {true[0]} and {true[1]} voxels of"
                f" {' '.join(key)} in {first} and {second}.",
            )
    results = []
    for organ in dict.fromkeys(key[3] for key in tables[0]):
        keys = [key for key in tables[0] if key[3] == organ]
        for column, name, higher in MEASURES:
            numbers_of = [
                [_number(table[key], column, folder) for key in keys]
                for table, folder in zip(tables, (first, second), strict=True)
            ]
            pairs = [
                (key[1], one, other)
                for key, one, other in zip(keys, *numbers_of, strict=True)
                if one is not None and other is not None
            ]
            alone_first = [one is not None and other is None for one, other in zip(*numbers_of, strict=True)]
            alone_second = [one is None and other is not None for one, other in zip(*numbers_of, strict=True)]
            counted = {
                "class": organ,
                "measure": column,
                "name": name,
                "higher_is_better": higher,
                "only_first": sum(alone_first),
                "only_second": sum(alone_second),
            }
            if not pairs:
                if any(alone_first) or any(alone_second):
                    results.append({**counted, "n": 0})
                continue
            patients, ones, others = zip(*pairs, strict=True)
            numbers = agreement.paired_difference(ones, others, patients, seed)
            ends = [numbers.pop("higher"), numbers.pop("lower")]
            better, worse = ends if higher else ends[::-1]
            results.append(
                {
                    **counted,
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
    for line, row in enumerate(rows, start=1):
        if None in row or None in row.values():  # what is cut off would count as a number that this run lacks
            raise InputError("BAD_SCANS", f"Expected rows of one length, received another in row {line} of {path}.")
    table = {tuple(row[name] for name in KEY): row for row in rows}
    if len(table) < len(rows):
        raise InputError("BAD_SCANS", f"Expected a row a scan and class, received two of one in {path}.")
    return table


def _number(row: dict[str, str], column: str, folder: Path) -> float | None:
    """A row's measure as a number that is good or bad; errors by their size."""
    try:
        if column == "fat_error_points":
            fat = [row.get(f"{name}_fat_mean_percent") for name in ("predicted", "true")]
            number = abs(float(fat[0]) - float(fat[1])) if fat[0] and fat[1] else None
        else:
            value = row.get(column)
            number = abs(float(value)) if value else None
    except ValueError as error:
        raise InputError(
            "BAD_SCANS",
            f"Expected numbers in the columns of {column}, received {error} for patient {row['patient']} in {folder}.",
        ) from error
    if number is not None and not math.isfinite(number):
        raise InputError(
            "BAD_SCANS",
            f"Expected finite numbers in the columns of {column}, received {number} for patient {row['patient']} in"
            f" {folder}.",
        )
    return number


def print_results(results: Sequence[dict[str, Any]], first: Path, second: Path) -> None:
    """Prints a comparison as a table, a line a measure."""
    print(f"first: {first}\nsecond: {second}\n")
    print(
        f"{'measure':<38}{'scans':>6}{'first':>9}{'second':>9}{'difference':>12}{'95 % interval':>22}{'Wilcoxon p':>12}"
    )
    for result in (each for each in results if each["n"]):
        interval = result["intervals"]["mean_difference"]
        bounds = "-" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"
        print(
            f"{result['class'] + ', ' + result['name']:<38}{result['n']:>6}"
            f"{result['first']:>9.4f}{result['second']:>9.4f}"
            f"{result['mean_difference']:>+12.4f}{bounds:>22}{result['wilcoxon_p']:>12.3g}"
        )
    for result in results:
        for which, other in (("first", "second"), ("second", "first")):
            if count := result[f"only_{which}"]:
                print(
                    f"{result['class']}, {result['name']}: {count} scans have it in the {which} alone and are not"
                    f" compared (empty in the {other})"
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
