"""A study small enough to train on in seconds: bright ellipsoids in noise, seen by two scanners."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from lvseg.formats import write_volume
from lvseg.volume import Volume

ROOT = Path(__file__).parents[1]
PATIENTS = 10
# Name -> shape, spacing in mm and the sign of each axis against canonical; two scanners that store scans unlike.
SCANNERS = {"a": ((9, 40, 44), (5.0, 3.0, 3.0), (1, 1, 1)), "b": ((7, 52, 48), (6.0, 2.5, 2.5), (-1, 1, -1))}
EXPERIMENT = {
    "task": "volume",
    "name": "small",
    "seed": 3,
    "data": {
        "datasets": ["cards/a.yaml", "cards/b.yaml"],
        "shards": "shards",
        "spacing_mm": [4.0, 4.0],
        "size": 32,
        "neighbours": 1,
        "folds": 2,
        "test_patients": ["a-001", "b-001"],
        "shuffle_slices": 16,
    },
    "model": {"width": 4, "dropout": 0.1, "encoder": None, "residual": False},
    "augment": {"elastic": {"sigma_px": 1.0, "grid": 4}},
    "train": {
        "steps": 300,
        "batch_size": 4,
        "learning_rate": 3.0e-3,
        "deterministic": True,
        "validate_every": 100,
        "checkpoint_every": 50,
    },
}


def scan(scanner: str, number: int) -> tuple[Volume, Volume]:
    """A patient's image (int16) and mask (uint8): an organ of another size and place for each number."""
    shape, spacing_mm, signs = SCANNERS[scanner]
    random = np.random.default_rng([number, len(scanner), ord(scanner)])
    axes = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing_mm, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    centre, radii = random.uniform(-10, 10, 3), random.uniform((12, 22, 24), (20, 34, 36))
    mask = sum(((a - c) / r) ** 2 for a, c, r in zip((z, y, x), centre, radii, strict=True)) < 1
    body = (y / 58) ** 2 + (x / 62) ** 2 < 1
    image = random.normal(20, 5, shape) + 100 * body + 120 * mask
    flips = tuple(slice(None, None, sign) for sign in signs)
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, (own, mm, sign, count) in enumerate(zip((2, 1, 0), spacing_mm, signs, shape, strict=True)):
        affine[own, axis] = mm * sign
        affine[own, 3] = -sign * mm * (count - 1) / 2
    return (
        Volume(np.ascontiguousarray(image.astype(np.int16)[flips]), affine),
        Volume(np.ascontiguousarray(mask.astype(np.uint8)[flips]), affine),
    )


def write_study(folder: Path) -> Path:
    """Writes scans, cards and experiment below a folder and returns it."""
    for scanner in SCANNERS:
        for number in range(PATIENTS):
            image, mask = scan(scanner, number)
            patient = folder / "raw" / scanner / f"{scanner}-{number:03d}"
            patient.mkdir(parents=True)
            write_volume(image, patient / "image.nii.gz")
            write_volume(mask.with_voxels(mask.voxels * 7), patient / "organs.nii.gz")
        write_card(folder, scanner)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    return folder


def write_card(folder: Path, dataset: str, **changes: object) -> Path:
    """Writes a dataset's card, `cards/<dataset>.yaml`; `changes` replace keys."""
    card = {
        "name": f"set_{dataset}",
        "task": "volume",
        "scanner": dataset,
        "modality": "MR",
        "root": f"../raw/{dataset}",
        "image": "{patient}/image.nii.gz",
        "mask": "{patient}/organs.nii.gz",
        "labels": {"organ": [7]},
        "licence": "none",
        "citation": "made by the tests",
    }
    (folder / "cards").mkdir(exist_ok=True)
    path = folder / "cards" / f"{dataset}.yaml"
    path.write_text(yaml.safe_dump({**card, **changes}, sort_keys=False))
    return path


def command(folder: Path, module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module arguments` in a folder, as a user would."""
    return python(folder, "-m", module, *arguments)


def python(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs `python arguments` in a folder."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def rows(path: Path) -> list[dict[str, str]]:
    """A CSV file's rows."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def best_weights(run: Path) -> Path:
    """The one file of best weights that a finished run keeps."""
    (path,) = (run / "checkpoints").glob("best-*.npz")
    return path
