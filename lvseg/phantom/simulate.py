"""Writes simulated patients to folders.

    OUT/<patient>/image.nii.gz     int16, in the scanner's own axis directions
    OUT/<patient>/mask.nii.gz      uint8, 1 in the whole liver, vessels included
    OUT/<patient>/tissues.nii.gz   uint8, numbers of lvseg.phantom.anatomy.Tissue
    OUT/<patient>/truth.json       this patient's row of truth.csv, and the version that made it
    OUT/truth.csv                  a row for every patient in OUT, columns in `TRUTH_COLUMNS`

A patient's folder appears whole or not at all, so a run that was stopped goes on with the patients that are missing.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import joblib
import numpy as np

from lvseg.command import atomic, progress
from lvseg.errors import InputError
from lvseg.formats import write_volume
from lvseg.phantom.patients import draw_anatomy, patient_id
from lvseg.phantom.scanners import SCANNERS, image_patient

PHANTOM_VERSION = 1  # raised whenever the same seed and number give other voxels

# liver_volume_ml: true volume of the liver within the scan, from several samples a voxel.
# liver_volume_in_mask_ml: what the voxels of mask.nii.gz add up to.
# whole_liver_ml: true volume of all the liver, also what the field of view cuts off.
TRUTH_COLUMNS = ("patient", "scanner", "liver_volume_ml", "liver_volume_in_mask_ml", "whole_liver_ml")


def simulate(scanner: str, patients: int, seed: int, out: Path, jobs: int, first: int = 1) -> None:
    """Simulates patients number first, first + 1, ... of a seed and writes them; those that are there already are kept.

    Args:
        scanner: a name in `SCANNERS`.
        patients: how many, at least 1.
        seed: of the set, at least 0; the same seed and number is the same anatomy under every scanner.
        out: folder, made if missing.
        jobs: processes to use, -1 for one a core.
        first: number of the first patient, at least 1.

    Raises:
        InputError: BAD_ARGUMENT for values outside these ranges; FOLDER_IN_USE where `out` holds patients of another
            scanner or version.
    """
    out = Path(out)
    if scanner not in SCANNERS:
        raise InputError("BAD_ARGUMENT", f"Expected a scanner among {', '.join(SCANNERS)}, received {scanner!r}.")
    for name, value, least in (("patients", patients, 1), ("seed", seed, 0), ("first", first, 1)):
        if value < least:
            raise InputError("BAD_ARGUMENT", f"Expected {name} to be at least {least}, received {value}.")
    if jobs != -1 and jobs < 1:
        raise InputError("BAD_ARGUMENT", f"Expected jobs to be at least 1, or -1 for one a core, received {jobs}.")

    done = {row["patient"] for row in _finished(out, scanner)}
    numbers = [number for number in range(first, first + patients) if patient_id(seed, number) not in done]
    work = joblib.Parallel(n_jobs=min(jobs, max(1, len(numbers))), return_as="generator")(
        joblib.delayed(write_patient)(scanner, seed, number, out) for number in numbers
    )
    try:
        for _ in progress(work, f"simulating {scanner}", total=len(numbers)):
            pass
    finally:
        for number in numbers:  # a worker that was killed could not remove its own
            for left_over in out.glob(f".partial-*-{patient_id(seed, number)}"):
                shutil.rmtree(left_over, ignore_errors=True)
    _write_truth(out, _finished(out, scanner))


def write_patient(scanner: str, seed: int, number: int, out: Path) -> None:
    """Simulates one patient and writes its folder in one step."""
    scan = image_patient(draw_anatomy(seed, number), SCANNERS[scanner])
    patient = patient_id(seed, number)
    mask_ml = float(np.count_nonzero(scan.mask.voxels)) * scan.mask.voxel_volume_mm3 / 1000.0
    truth = {
        "patient": patient,
        "scanner": scanner,
        "liver_volume_ml": round(scan.liver_volume_ml, 2),
        "liver_volume_in_mask_ml": round(mask_ml, 2),
        "whole_liver_ml": round(scan.whole_liver_ml, 2),
        "version": PHANTOM_VERSION,
    }
    with atomic(out / patient) as folder:
        folder.mkdir()
        write_volume(scan.image, folder / "image.nii.gz")
        write_volume(scan.mask, folder / "mask.nii.gz")
        write_volume(scan.tissues, folder / "tissues.nii.gz")
        (folder / "truth.json").write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")


def _finished(out: Path, scanner: str) -> list[dict]:
    """The rows of all patients in the folder, in order of their ids."""
    rows = []
    for path in sorted(out.glob("sim*/truth.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        if (row["scanner"], row["version"]) != (scanner, PHANTOM_VERSION):
            raise InputError(
                "FOLDER_IN_USE",
                f"Expected a folder with patients of {scanner}, version {PHANTOM_VERSION}, received one of"
                f" {row['scanner']}, version {row['version']} in {path}.",
            )
        rows.append(row)
    return rows


def _write_truth(out: Path, rows: list[dict]) -> None:
    with atomic(out / "truth.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, TRUTH_COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
