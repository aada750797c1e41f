"""Volumes a second that lvseg.prepare turns from scans into shards, with one worker and with two.

A worker is a process that computes with one thread. What counts is the rate once the work is under way, read off the
times at which the shards were written, since processes take seconds to start, however much there is to do.

python benchmarks/prepare.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measure import Row, main, run_script

SHAPE, SPACING_MM, SIZE = (28, 320, 320), (5.0, 1.5, 1.5), 256
VOLUMES, WARM_UP = 40, 8
ONE_THREAD = {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1", "OMP_NUM_THREADS": "1"}


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Each run in a process of its own, one and two workers in turn."""
    if arguments.folder:
        print(prepare_volumes(arguments.folder, VOLUMES, arguments.jobs, SIZE))
        return []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_study(folder, VOLUMES, SHAPE, SPACING_MM, "nii.gz", [VOLUMES])
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(arguments.rounds):
            for jobs, found in rates.items():
                output = run_script("prepare.py", "--folder", folder, "--jobs", jobs, environment=ONE_THREAD)
                found.append(float(output.splitlines()[-1]))
    one, two = (statistics.median(found) for found in rates.values())
    figure = f"{two / one:.2f} times ({two:.2f} against {one:.2f} volumes/s)"
    return [Row("prepare 28 x 320 x 320, two workers against one", "at least 1.7 times", figure, two >= 1.7 * one)]


def prepare_volumes(folder: Path, volumes: int, jobs: int, size: int) -> float:
    """Prepares the first `volumes` of a study from the calling process; the volumes a second after the first few."""
    from lvseg.config import Data
    from lvseg.prepare import prepare

    os.chdir(folder)
    with tempfile.TemporaryDirectory(dir=folder) as shards:
        data = Data(datasets=[f"cards/{volumes}.yaml"], shards=shards, spacing_mm=[1.75, 1.75], size=size)
        prepare(data, jobs=jobs)
        written = sorted(path.stat().st_mtime for path in Path(shards).rglob("*.tfrecord"))
    if len(written) != volumes:
        raise RuntimeError(f"Expected {volumes} shards, received {len(written)}.")
    return (volumes - 1 - WARM_UP) / (written[-1] - written[WARM_UP])


def write_study(
    folder: Path,
    volumes: int,
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    suffix: str,
    cards: Sequence[int],
) -> None:
    """Scans with masks of made-up patients, and cards of the first so many of them."""
    import numpy as np
    import yaml
    from volumes import made_up

    from lvseg.formats import write_volume
    from lvseg.volume import Volume

    affine = np.diag([spacing_mm[2], spacing_mm[1], spacing_mm[0], 1.0])[:, [2, 1, 0, 3]]
    for number in range(volumes):
        image, mask = made_up(number, shape[0], shape[1])
        patient = folder / "raw" / f"{number:04d}"
        patient.mkdir(parents=True)
        write_volume(Volume(image.astype(np.int16), affine), patient / f"image.{suffix}")
        write_volume(Volume(mask, affine), patient / f"mask.{suffix}")
    (folder / "cards").mkdir()
    for count in cards:
        chosen = folder / f"raw{count}"
        chosen.mkdir()
        for number in range(count):
            (chosen / f"{number:04d}").symlink_to(folder / "raw" / f"{number:04d}")
        card = {
            "name": f"set{count}", "task": "volume", "scanner": "made_up", "modality": "MR", "root": str(chosen),
            "image": "{patient}/image." + suffix, "mask": "{patient}/mask." + suffix, "labels": {"organ": [1]},
            "licence": "none", "citation": "made by the benchmarks",
        }  # fmt: skip
        (folder / "cards" / f"{count}.yaml").write_text(yaml.safe_dump(card, sort_keys=False))


if __name__ == "__main__":
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--rounds", type=int, default=3, help="of which the median counts (default: 3)")
    command.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    command.add_argument("--jobs", type=int, help=argparse.SUPPRESS)
    sys.exit(main(rows, command))
