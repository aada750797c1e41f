"""Files of measured rows that a stopped script goes on from."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lvseg import command
from lvseg.errors import InputError


def number(text: str) -> float:
    """A finite number; ValueError for another text."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} for a number")
    return value


def number_or_none(text: str) -> float | None:
    """The same, or nothing."""
    return number(text) if text else None


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """A function that takes these names; ValueError for others."""

    def name(text: str) -> str:
        if text not in names:
            raise ValueError(f"{text} for one of {', '.join(names)}")
        return text

    return name


def rows_of(path: Path, columns: Mapping[str, Callable[[str], object]]) -> list[dict[str, str]]:
    """What was measured so far; nothing where there is no file.

    Args:
        columns: of the file, in order, each with a function that raises ValueError for what it cannot have.

    Raises:
        InputError: BAD_TABLE for a file with other columns, or with a row that lacks some or has what one cannot have.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            rows = list(table)
            if table.fieldnames != list(columns):
                raise ValueError(f"the columns {', '.join(table.fieldnames or ['none'])}")
        for line, row in enumerate(rows, start=1):
            if None in row or None in row.values():
                raise ValueError(f"row {line} of another length")
            for name, check in columns.items():
                check(row[name])
    except (ValueError, csv.Error) as error:
        raise InputError(
            "BAD_TABLE", f"Expected a table of {', '.join(columns)} in {path}, received {error}; move it away."
        ) from error
    return rows


def add_rows(
    path: Path, columns: Iterable[str], known: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]]
) -> None:
    """Writes known rows and new ones, all or none of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with command.atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(columns))
        table.writeheader()
        table.writerows([*known, *new])
