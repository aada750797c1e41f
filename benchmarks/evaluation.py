"""Seconds of the surface distances of one volume, and peak memory of an evaluation of few patients and of many.

The volumes are small, 12 x 128 x 128; kept in memory with their masks and probabilities the 72 more would take 110 MB.

python benchmarks/evaluation.py
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

from measure import Row, main, median_s, run_script

SHAPE, SPACING_MM = (55, 256, 256), (4.0, 1.6, 1.6)
SECONDS = 1.0
SLICES, SIZE = 12, 128
TRAINING, FEW, MANY = 8, 8, 80
MOST = 1.1  # times the memory at 8 patients


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Times in this process; each evaluation in a process of its own."""
    if arguments.one:
        found = json.loads(arguments.one)
        {"train": train, "evaluate": evaluate}[found["what"]](Path(found["folder"]), found["patients"])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)  # Linux counts in KiB
        return []
    seconds = surface_distances_s()
    result = [
        Row(f"surface distances of an ellipsoid of 1.4 l, {' x '.join(map(str, SHAPE))}", f"at most {SECONDS:g} s",
            f"{seconds:.2f} s", seconds <= SECONDS)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        peaks = []
        for patients in (FEW, MANY):
            for what in ("train", "evaluate"):
                one = json.dumps({"what": what, "folder": str(Path(folder) / str(patients)), "patients": patients})
                peak_mb = float(run_script("evaluation.py", "--one", one).splitlines()[-1])
            peaks.append(peak_mb)
    small, large = peaks
    figure = f"{large / small:.2f} times ({large:.0f} MB against {small:.0f} MB)"
    name = f"memory of lvseg.evaluate, {MANY} patients against {FEW}"
    return [*result, Row(name, f"at most {MOST} times", figure, large <= MOST * small)]


def surface_distances_s() -> float:
    """Median of a mask against the same one 3 mm lower and 5 mm to the side."""
    import numpy as np

    from lvseg.surfaces import surface_distances

    def ellipsoid(shift_mm: tuple[float, float, float]) -> np.ndarray:
        axes = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(SHAPE, SPACING_MM, strict=True)]
        grid = np.meshgrid(*axes, indexing="ij")
        return sum(((a - s) / r) ** 2 for a, s, r in zip(grid, shift_mm, (75, 65, 70), strict=True)) < 1

    predicted, true = ellipsoid((3, 0, 5)), ellipsoid((0, 0, 0))
    return median_s(lambda: surface_distances(predicted, true, SPACING_MM, (1, 3)), 7)


def train(folder: Path, patients: int) -> None:
    """A run of two steps on a few patients that has so many test patients."""
    import yaml
    from prepare import write_study

    from lvseg.train import main as train_main

    count = TRAINING + patients
    write_study(folder, count, (SLICES, SIZE, SIZE), (5.0, 1.75, 1.75), "nii", [count])
    experiment = {
        "task": "volume", "name": "memory",
        "data": {"datasets": [f"cards/{count}.yaml"], "shards": "shards", "spacing_mm": [1.75, 1.75], "size": SIZE,
                 "neighbours": 1, "folds": 2, "test_patients": [f"{number:04d}" for number in range(patients)]},
        "model": {"width": 4, "encoder": None, "residual": False},
        "train": {"steps": 2, "validate_every": 2, "checkpoint_every": 2},
    }  # fmt: skip
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    os.chdir(folder)
    train_main(["--cfg", "experiment.yaml"])


def evaluate(folder: Path, patients: int) -> None:
    """All of it, with the expected Dice and the page."""
    from lvseg.evaluate import evaluate_run

    os.chdir(folder)
    summary = evaluate_run(Path("runs/volume/memory-fold0"), "test")
    if summary["patients"] != patients:
        raise RuntimeError(f"Expected {patients} patients, received {summary['patients']}.")


if __name__ == "__main__":
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--one", help=argparse.SUPPRESS)
    sys.exit(main(rows, command))
