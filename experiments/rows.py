"""Files of measured rows that a stopped script goes on from."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lvseg import command
from lvseg.errors import InputError


def rows_of(path: Path, columns: Sequence[str], numbers: Sequence[str]) -> list[dict[str, str]]:
    """What was measured so far; nothing where there is no file.

    Args:
        columns: of the file, in order; numbers: those that have a number in every row.

    Raises:
        InputError: BAD_TABLE for a file with other columns, or with a row that lacks some or has text for a number.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            rows = list(table)
            if table.fieldnames != list(columns):
                raise ValueError(f"the columns {', '.join(table.fieldnames or ['none'])}")
        for number, row in enumerate(rows, start=1):
            if None in row or None in row.values():
                raise ValueError(f"row {number} of another length")
            for name in numbers:
                float(row[name])
    except (ValueError, csv.Error) as error:
        raise InputError(
            "BAD_TABLE", f"Expected a table of {', '.join(columns)} in {path}, received {error}; move it away."
        ) from error
    return rows


def add_rows(
    path: Path, columns: Sequence[str], known: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]]
) -> None:
    """Writes known rows and new ones, all or none of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with command.atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(columns))
        table.writeheader()
        table.writerows([*known, *new])
