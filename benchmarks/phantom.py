"""Seconds that one simulated patient takes on one core, for every protocol: anatomy and imaging, without writing files.

python benchmarks/phantom.py
"""

from __future__ import annotations

import argparse
import os
import sys

from measure import Row, main, median_s

MOST_S = 3.0


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Another patient in each repetition; this process is kept on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from lvseg.phantom.simulate import PROTOCOLS

    result = []
    for name, protocol in PROTOCOLS.items():
        patients = iter(range(1, arguments.patients + 2))
        seconds = median_s(lambda: protocol.image(1, next(patients)), arguments.patients)  # noqa: B023
        result.append(
            Row(f"simulate a patient, {name}", f"at most {MOST_S:g} s", f"{seconds:.2f} s", seconds <= MOST_S)
        )
    return result


if __name__ == "__main__":
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--patients", type=int, default=3, help="of which the median counts (default: 3)")
    sys.exit(main(rows, command))
