"""How often the guard notices water and fat that are swapped, and how often it errs on pairs that are right.

python benchmarks/swap.py --patients 100 --seed 907
"""

from __future__ import annotations

import argparse
import sys

import joblib
from measure import Row, main

SCANNERS = ("philips_fat", "ge_fat", "siemens_fat")
LEAST_NOTICED, MOST_WRONG = 0.99, 0.01


def suspected(scanner: str, seed: int, number: int) -> tuple[bool, bool]:
    """Whether a simulated patient's pair looks swapped as it is, and with water and fat exchanged."""
    from lvseg.phantom.simulate import PROTOCOLS
    from lvseg.waterfat import from_water_fat

    images = PROTOCOLS[scanner].image(seed, number).images
    water, fat = images["water"], images["fat"]
    right, swapped = (from_water_fat(*pair).metadata["fat_fraction"]["swap"] for pair in ((water, fat), (fat, water)))
    return right["suspected"], swapped["suspected"]


def rows(arguments: argparse.Namespace) -> list[Row]:
    """A row for all scanners together: the share of each that was flagged."""
    work = [(scanner, number) for scanner in SCANNERS for number in range(1, arguments.patients + 1)]
    found = joblib.Parallel(n_jobs=-1)(
        joblib.delayed(suspected)(scanner, arguments.seed, number) for scanner, number in work
    )
    wrong, noticed = (sum(answers) for answers in zip(*found, strict=True))
    count = len(found)
    return [
        Row(
            f"swapped pairs that are flagged, of {count} simulated", f"at least {LEAST_NOTICED:.0%}",
            f"{noticed} ({noticed / count:.1%})", noticed >= LEAST_NOTICED * count,
        ),
        Row(
            f"right pairs that are flagged, of {count} simulated", f"below {MOST_WRONG:.0%}",
            f"{wrong} ({wrong / count:.1%})", wrong < MOST_WRONG * count,
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--patients", type=int, default=34, help="a scanner (default: %(default)s)")
    command.add_argument("--seed", type=int, default=907, help="of the patients (default: %(default)s)")
    sys.exit(main(rows, command))
