"""The volume model that comes with lvseg on a scan of 55 x 256 x 256: the whole command, its start included.

python benchmarks/shipped.py
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import ROOT, Row, main, median_s

MOST_S = 20.0


def rows(arguments: argparse.Namespace) -> list[Row]:
    """The one row."""
    from lvseg.formats import write_volume
    from lvseg.phantom.scanners import SCANNERS

    scanner = dataclasses.replace(SCANNERS["philips_volume"], slices=55, rows=256, columns=256, pixel_mm=1.75)
    with tempfile.TemporaryDirectory() as folder:
        scan = Path(folder) / "scan.nii.gz"
        write_volume(scanner.image(1, 1).images["image"], scan)
        command = [sys.executable, "-m", "lvseg.predict", str(scan), "-o", str(Path(folder) / "liver.vtk")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}

        def predict() -> None:
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        seconds = median_s(predict, 3)
    what = "lvseg.predict with the shipped model, 55 x 256 x 256, from the command to the .vtk file"
    return [Row(what, f"at most {MOST_S:g} s", f"{seconds:.1f} s", seconds <= MOST_S)]


if __name__ == "__main__":
    sys.exit(main(rows, argparse.ArgumentParser(description=__doc__)))
