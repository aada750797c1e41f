"""Peak memory of preparation and of the training pipeline, at 50 volumes and at 500.

The volumes are small, 12 x 128 x 128, so that 500 fit in the time. Kept in memory as 16 bits with their masks, the 450
more would take 250 MB. The pipeline draws the same number of slices from both.

python benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from pathlib import Path

from measure import Row, main, run_script

SLICES, SIZE = 12, 128
FEW, MANY = 50, 500
MOST = 1.1  # times the memory at 50 volumes; what a process takes varies by some per cent from run to run


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Each measurement in a process of its own."""
    if arguments.one:
        found = json.loads(arguments.one)
        {"write": write, "prepare": prepare, "pipeline": pipeline}[found["what"]](
            Path(found["folder"]), found["volumes"]
        )
        peaks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        print(json.dumps([peak / 1024 for peak in peaks]))  # Linux counts in KiB
        return []
    with tempfile.TemporaryDirectory() as folder:

        def peak_mb(what: str, volumes: int) -> list[float]:
            one = json.dumps({"what": what, "folder": folder, "volumes": volumes})
            found: list[float] = json.loads(run_script("memory.py", "--one", one).splitlines()[-1])
            return found

        peak_mb("write", MANY)
        result = []
        for what in ("prepare", "pipeline"):
            few, many = peak_mb(what, FEW), peak_mb(what, MANY)
            processes = [("", few[0], many[0])]
            if what == "prepare":
                processes = [(", its own process", few[0], many[0]), (", the larger of two workers", few[1], many[1])]
            for process, small, large in processes:
                figure = f"{large / small:.2f} times ({large:.0f} MB against {small:.0f} MB)"
                name = f"memory of {what}{process}, 500 volumes against 50"
                result.append(Row(name, f"at most {MOST} times", figure, large <= MOST * small))
    return result


def write(folder: Path, volumes: int) -> None:
    """The scans for preparation and the shards for the pipeline."""
    from prepare import write_study
    from volumes import write_shards

    write_study(folder, volumes, (SLICES, SIZE, SIZE), (5.0, 1.75, 1.75), "nii", [FEW, MANY])
    (folder / "shards").mkdir()
    write_shards(folder / "shards", volumes, SLICES, SIZE)


def prepare(folder: Path, volumes: int) -> None:
    """With two workers, which are ended so that their memory is known."""
    from joblib.externals.loky import get_reusable_executor
    from prepare import prepare_volumes

    prepare_volumes(folder, volumes, 2, SIZE)
    get_reusable_executor().shutdown(wait=True)


def pipeline(folder: Path, volumes: int) -> None:
    """As many slices as 500 volumes have."""
    from lvseg import pipeline

    files = sorted((folder / "shards").iterdir())[:volumes]
    reading = pipeline.Reading(SIZE, 1, "none", None, None)
    batches = iter(pipeline.training_batches(files, SLICES * volumes, reading, 0, 8, 8 * SLICES, 0))  # 8 open at a time
    for _ in range(MANY * SLICES // 8):
        next(batches)


if __name__ == "__main__":
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--one", help=argparse.SUPPRESS)
    sys.exit(main(rows, command))
