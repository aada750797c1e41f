"""What benchmarks share: timing, processes of their own, and rows that say what was wanted and what was measured."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

ROOT = Path(__file__).resolve().parents[1]
JSON_PREFIX = "rows: "


@dataclass(frozen=True)
class Row:
    """A line of the table: what was measured, the target in words, the figure in words, and whether it was met.

    `met` is None where there is no target.
    """

    what: str
    target: str
    measured: str
    met: bool | None = None


def seconds(function: Callable[[], Any], repeats: int, least_s: float = 0.0) -> list[float]:
    """Seconds of each call, after one that is not counted; goes on until `least_s` seconds have been measured."""
    function()
    times: list[float] = []
    while len(times) < repeats or sum(times) < least_s:
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return times


def median_s(function: Callable[[], Any], repeats: int, least_s: float = 0.0) -> float:
    """The median of `seconds`."""
    return statistics.median(seconds(function, repeats, least_s))


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    verdict = {True: "met", False: "**MISSED**", None: ""}
    lines = ["| what | target | measured | |", "|---|---|---|---|"]
    lines += [f"| {row.what} | {row.target} | {row.measured} | {verdict[row.met]} |" for row in rows]
    return "\n".join(lines)


def main(rows: Callable[[argparse.Namespace], list[Row]], parser: argparse.ArgumentParser) -> int:
    """Runs a benchmark as a command; exits with 0 whether or not a target is missed, which the table says."""
    parser.add_argument("--json", action="store_true", help="print the rows for run.py instead of a table")
    arguments = parser.parse_args()
    found = rows(arguments)
    if not found:  # one measurement in a process of its own, which has printed it
        return 0
    print(JSON_PREFIX + json.dumps([asdict(row) for row in found]) if arguments.json else table(found))
    return 0


def run_script(name: str, *arguments: object, environment: dict[str, str] | None = None) -> str:
    """Standard output of a script of this folder, run in a process of its own; one measurement is its last line."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
    )
    return done.stdout
