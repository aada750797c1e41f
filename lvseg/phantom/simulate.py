"""Writes simulated patients to folders.

    OUT/<patient>/image.nii.gz     int16, or float32 for a fat fraction in percent, in the scanner's own axis directions
    OUT/<patient>/water.nii.gz     int16, of fat scans; and fat.nii.gz
    OUT/<patient>/mask.nii.gz      uint8 labels as an operator draws them
    OUT/<patient>/tissues.nii.gz   uint8, numbers of lvseg.phantom.anatomy.Tissue
    OUT/<patient>/truth.json       this patient's row of truth.csv, and what made it
    OUT/truth.csv                  a row for every patient in OUT: patient, scanner, and the protocol's own columns

The columns of the MR protocols are described in `lvseg.phantom.scanners`. A patient's folder appears whole or not at
all, so a run that was stopped goes on with the patients that are missing.
"""

from __future__ import annotations

import csv
import functools
import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from lvseg import workers
from lvseg.command import alone, atomic, progress
from lvseg.errors import InputError
from lvseg.formats import write_volume
from lvseg.keys import read_json
from lvseg.phantom import ct, varied
from lvseg.phantom.patients import patient_id
from lvseg.phantom.scan import Protocol
from lvseg.phantom.scanners import SCANNERS, Scanner
from lvseg.workers import Engine

PHANTOM_VERSION = 4  # raised whenever the same seed and number give other voxels


PROTOCOLS: dict[str, Protocol] = {**SCANNERS, **varied.PROTOCOLS, **ct.PROTOCOLS}


def protocol_of(scanner: str) -> Protocol:
    """What a scanner's name in `PROTOCOLS` stands for; InputError BAD_ARGUMENT for others."""
    if scanner not in PROTOCOLS:
        raise InputError("BAD_ARGUMENT", f"Expected a scanner among {', '.join(PROTOCOLS)}, received {scanner!r}.")
    return PROTOCOLS[scanner]


def simulate(
    scanner: str,
    patients: int,
    seed: int,
    out: Path,
    jobs: int,
    first: int = 1,
    contour_jitter: bool = False,
    only: Collection[str] | None = None,
) -> None:
    """Simulates patients number first, first + 1, ... of a seed and writes them; those that are there already are kept.

    Args:
        scanner: a name in `PROTOCOLS`.
        patients: how many, at least 1.
        seed: of the set, at least 0; the same seed and number is the same anatomy under every scanner.
        out: folder, made if missing.
        jobs: processes to use, -1 for one a core.
        first: number of the first patient, at least 1.
        contour_jitter: masks deviate as an operator's do; MR protocols only.
        only: ids; of those patients, the ones among them.

    Raises:
        InputError: BAD_ARGUMENT for values outside these ranges; FOLDER_IN_USE where `out` holds patients of another
            scanner, version or kind of mask; BAD_FILE for a damaged truth.json there.
        RunError: a process was killed; what was finished is kept.
    """
    out = Path(out)
    protocol = protocol_of(scanner)
    for name, value, least in (("patients", patients, 1), ("seed", seed, 0), ("first", first, 1)):
        if value < least:
            raise InputError("BAD_ARGUMENT", f"Expected {name} to be at least {least}, received {value}.")
    if jobs != -1 and jobs < 1:
        raise InputError("BAD_ARGUMENT", f"Expected jobs to be at least 1, or -1 for one a core, received {jobs}.")
    if contour_jitter:
        if not isinstance(protocol, Scanner):
            raise InputError(
                "BAD_ARGUMENT",
                f"Expected one of {', '.join(SCANNERS)} with contour jitter, received {scanner}.",
            )
        protocol = replace(protocol, contour_jitter=True)

    made_by = {"scanner": scanner, "version": PHANTOM_VERSION, "contour_jitter": contour_jitter}
    numbers = range(first, first + patients)
    wanted = [number for number in numbers if only is None or patient_id(seed, number, protocol.varied) in only]
    with alone(out / ".lock", out):
        _simulate(protocol, seed, wanted, out, jobs, made_by)


def _simulate(
    protocol: Protocol, seed: int, wanted: Iterable[int], out: Path, jobs: int, made_by: Mapping[str, object]
) -> None:
    """What `simulate` does while no other process writes patients into the folder."""
    done = {row["patient"] for row in _finished(out, made_by)}
    names = {number: patient_id(seed, number, protocol.varied) for number in wanted}
    numbers = [number for number in wanted if names[number] not in done]
    write = functools.partial(write_patient, protocol, seed, out=out, made_by=made_by)
    work = workers.each(write, numbers, Engine(jobs=jobs))
    try:
        for _ in progress(work, f"simulating {protocol.name}", total=len(numbers)):
            pass
    finally:
        for number in numbers:  # a worker that was killed could not remove its own
            for left_over in out.glob(f".partial-*-{names[number]}"):
                shutil.rmtree(left_over, ignore_errors=True)
    _write_truth(out, _finished(out, made_by))


def write_patient(protocol: Protocol, seed: int, number: int, out: Path, made_by: Mapping[str, object]) -> None:
    """Simulates one patient and writes its folder in one step."""
    scan = protocol.image(seed, number)
    patient = patient_id(seed, number, protocol.varied)
    truth = {name: round(float(value), 4) for name, value in scan.truth.items()}
    with atomic(out / patient) as folder:
        folder.mkdir()
        for stem, volume in {**scan.images, "mask": scan.mask, "tissues": scan.tissues}.items():
            write_volume(volume, folder / f"{stem}.nii.gz")
        row = {"patient": patient, **made_by, "truth": truth}
        (folder / "truth.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


def _finished(out: Path, made_by: Mapping[str, object]) -> list[dict]:
    """What truth.json holds of all patients in the folder, in order of their ids."""
    rows = []
    for path in sorted(out.glob("[!.]*/truth.json")):
        row = read_json(path)
        received = {name: row.get(name) for name in made_by}
        if received != made_by:
            raise InputError(
                "FOLDER_IN_USE",
                f"Expected a folder of patients with {_said(made_by)}, received {_said(received)} in {path}.",
            )
        if not (isinstance(row.get("patient"), str) and isinstance(row.get("truth"), dict)):
            raise InputError(
                "BAD_FILE", f"Expected patient and truth of a simulated patient, received none of one in {path}."
            )
        rows.append(row)
    return rows


def _said(made_by: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in made_by.items())


def _write_truth(out: Path, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row["truth"]))
    with atomic(out / "truth.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, ["patient", "scanner", *columns], lineterminator="\n")
        table.writeheader()
        table.writerows({"patient": row["patient"], "scanner": row["scanner"], **row["truth"]} for row in rows)
