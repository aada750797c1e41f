"""Simulates patients under one scanner and writes them with their truth."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lvseg.command import run
from lvseg.phantom.simulate import PROTOCOLS, simulate


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lvseg.phantom",
        description=__doc__,
        epilog="example: python -m lvseg.phantom --scanner philips_volume --patients 5 --seed 1 --out patients",
    )
    parser.add_argument("--scanner", required=True, choices=list(PROTOCOLS), help="protocol to image with")
    parser.add_argument("--patients", required=True, type=int, help="how many")
    parser.add_argument("--seed", type=int, default=1, help="of the set of patients (default: %(default)s)")
    parser.add_argument("--first", type=int, default=1, help="number of the first patient (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=-1, help="processes (default: one a core)")
    parser.add_argument(
        "--contour-jitter", action="store_true", help="masks deviate from the truth as an operator's do (MR scanners)"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder; patients that are there already are kept")
    return run(parser, _body, argv)


def _body(arguments: argparse.Namespace) -> None:
    simulate(
        arguments.scanner,
        arguments.patients,
        arguments.seed,
        arguments.out,
        arguments.jobs,
        first=arguments.first,
        contour_jitter=arguments.contour_jitter,
    )
    print(f"{arguments.patients} patients of {arguments.scanner} and truth.csv are in {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
