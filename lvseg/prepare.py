"""Command: dataset cards -> shards, a volume each, with a manifest beside them.

python -m lvseg.prepare --cfg experiments/volume.yaml
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import joblib
import numpy as np

from lvseg import command
from lvseg.cards import Card, Scan, find_scans, load_card
from lvseg.config import Data, add_experiment_arguments, load_experiment
from lvseg.errors import InputError
from lvseg.keys import digest
from lvseg.split import Split, split_patients
from lvseg.volume import Array, as_float32, check_same_grid

# Raise when what is written into a shard changes, so that old shards are not taken for new ones.
SHARD_FORMAT = 1


@dataclass(frozen=True)
class ShardSet:
    """The shards of one card: its folder, a manifest row a volume, and the class names."""

    card: Card
    folder: Path
    rows: list[dict[str, Any]]

    def files(self, patients: Sequence[str]) -> list[Path]:
        """Shards of these patients, in the manifest's order."""
        return [self.folder / row["file"] for row in self.rows if row["patient"] in patients]


def prepare(data: Data, jobs: int = -1) -> list[ShardSet]:
    """Makes the shards of an experiment that are missing, simulating patients first where a card says so.

    Args:
        data: the experiment's `data` keys.
        jobs: processes, -1 for one a core.

    Returns:
        One set a card, in the order of `data.datasets`.

    Raises:
        InputError: a card or scan that cannot be used; DUPLICATE_SCAN for the same voxels under two patient ids.
    """
    cards = [load_card(Path(path)) for path in data.datasets]
    names = [card.name for card, _ in cards]
    if len(set(names)) < len(names):
        raise InputError("BAD_CONFIG", f"Expected each card once in data.datasets, received {', '.join(names)}.")
    classes = {tuple(card.classes) for card, _ in cards}
    if len(classes) > 1:
        raise InputError("BAD_CONFIG", f"Expected the same labels in all of data.datasets, received {sorted(classes)}.")
    sets = [_prepare_card(card, root, data, jobs) for card, root in cards]
    _check_classes(sets)
    seen: dict[str, tuple[str, str]] = {}
    for shards in sets:
        for row in shards.rows:
            patient, where = seen.setdefault(row["voxels_sha256"], (row["patient"], shards.card.name))
            if patient != row["patient"]:
                raise InputError(
                    "DUPLICATE_SCAN",
                    f"Expected each scan under one patient id, received the same voxels for {patient} in card {where}"
                    f" and {row['patient']} in card {shards.card.name}.",
                )
    return sets


def _check_classes(sets: Sequence[ShardSet]) -> None:
    """Refuses a class that no mask of a card holds, which is a wrong value in the card more often than a rare organ."""
    for shards in sets:
        found = {label for row in shards.rows for label in row["classes"]}
        for label, name in enumerate(shards.card.classes):
            if label not in found:
                raise InputError(
                    "EMPTY_CLASS",
                    f"Expected {name} in the masks of card {shards.card.name}, received none of its values"
                    f" {shards.card.labels.get(name)} in {len(shards.rows)} volumes.",
                )


def split(data: Data, sets: Sequence[ShardSet]) -> Split:
    """The experiment's patients for training, validation and test; InputError BAD_SPLIT."""
    scanners: dict[str, list[str]] = {}
    for shards in sets:
        scanners.setdefault(shards.card.scanner, []).extend(row["patient"] for row in shards.rows)
    return split_patients(scanners, data.folds, data.fold, data.test_fraction, data.test_patients, data.folds_file)


def dataset_scans(data: Data) -> list[Scan]:
    """Every scan of an experiment's cards, for evaluation on the scans' own grids."""
    return [scan for path in data.datasets for scan in find_scans(*load_card(Path(path)))]


def _prepare_card(card: Card, root: Path, data: Data, jobs: int) -> ShardSet:
    if card.simulate is not None:
        from lvseg.phantom.simulate import simulate

        simulate(card.simulate.scanner, card.simulate.patients, card.simulate.seed, root, jobs)
    scans = find_scans(card, root)
    made_by = {
        "format": SHARD_FORMAT,
        "labels": list(card.labels.items()),  # their order numbers the classes
        "scanner": card.scanner,
        "axis": data.axis,
        "spacing_mm": data.spacing_mm,
        "size": data.size,
    }
    folder = Path(data.shards) / f"{card.name}-{digest(made_by)[:8]}"
    rows = [_finished_row(scan, folder) for scan in command.progress(scans, f"checking {card.name}")]
    missing = [number for number, row in enumerate(rows) if row is None]
    if missing:
        made = joblib.Parallel(n_jobs=min(jobs, len(missing)) if jobs > 0 else jobs, return_as="generator")(
            joblib.delayed(_write_shard)(scans[number], folder, data) for number in missing
        )
        labelled = zip(missing, made, strict=True)
        for number, row in command.progress(labelled, f"preparing {card.name}", total=len(missing)):
            rows[number] = row
    kept = [row for row in rows if row is not None]
    manifest = {"card": card.model_dump(), "made_by": made_by, "volumes": kept}
    with command.atomic(folder / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=1))
    return ShardSet(card, folder, kept)


def _finished_row(scan: Scan, folder: Path) -> dict[str, Any] | None:
    """The manifest row of a scan's shard if it is there and was made of the same files."""
    from lvseg import records

    path = _shard_path(scan, folder)
    if not path.exists():
        return None
    row = records.read_row(path)
    made_of = {"patient": scan.patient, "study": scan.study, "sources": _sources(scan)}
    return row if made_of.items() <= row.items() else None


def _write_shard(scan: Scan, folder: Path, data: Data) -> dict[str, Any]:
    """Writes a scan's shard and returns its manifest row."""
    from lvseg import records

    path = _shard_path(scan, folder)
    records.write_shard(harmonise_scan(scan, _sources(scan), data), path)
    return records.read_row(path)


def _shard_path(scan: Scan, folder: Path) -> Path:
    # Escaped, so that no two scans share a name: quote() leaves no + in either part.
    return folder / f"{quote(scan.patient, safe='')}+{quote(scan.study, safe='')}.tfrecord"


def _sources(scan: Scan) -> list[str]:
    return [_file_sha256(path) for path in (scan.image, scan.mask, scan.tissues) if path is not None]


def harmonise_scan(scan: Scan, sources: Sequence[str], data: Data) -> Any:
    """Reads a scan with its mask and harmonises both: a `records.Harmonised`.

    Raises:
        InputError: an unreadable file; GEOMETRY_MISMATCH if mask and image do not lie on one grid.
    """
    import tensorflow as tf

    from lvseg import preprocess, records
    from lvseg.formats import read_volume

    image = read_volume(scan.image)
    permutation = preprocess.AXIS_PERMUTATIONS[data.axis]
    canonical = image.canonical()
    voxels = canonical.voxels.transpose(permutation)
    slice_mm, row_mm, column_mm = (canonical.spacing_mm[axis] for axis in permutation)
    spacing_mm = tf.constant([slice_mm, row_mm, column_mm], tf.float32)
    intensities = tf.constant(as_float32(voxels, image.source))
    statistics = preprocess.statistics(intensities)
    target = data.spacing_mm

    def labels(path: Path, values: Sequence[Sequence[int]] | None) -> Array:
        mask = read_volume(path)
        check_same_grid(image, mask)
        found = mask.canonical().voxels.transpose(permutation)
        if values is not None:
            mapped = np.zeros(found.shape, np.uint8)
            for label, raw in enumerate(values, start=1):
                mapped[np.isin(found, raw)] = label
            found = mapped
        count = int(found.max()) + 1 if values is None else len(values) + 1
        return preprocess.harmonise_labels(
            tf.constant(found.astype(np.uint8)), spacing_mm, target, data.size, count
        ).numpy()

    return records.Harmonised(
        patient=scan.patient,
        study=scan.study,
        scanner=scan.card.scanner,
        dataset=scan.card.name,
        sources=tuple(sources),
        voxels_sha256=records.voxels_sha256(canonical.voxels, canonical.spacing_mm),
        shape=(voxels.shape[0], voxels.shape[1], voxels.shape[2]),
        spacing_mm=(slice_mm, row_mm, column_mm),
        statistics=statistics,
        image=preprocess.harmonise(intensities, spacing_mm, target, data.size, statistics.minimum).numpy(),
        mask=labels(scan.mask, list(scan.card.labels.values())),
        tissues=labels(scan.tissues, None) if scan.tissues is not None else None,
    )


def _file_sha256(path: Path) -> str:
    """sha256 of a file, or of the sorted contents of a folder of files."""
    if path.is_dir():
        parts = sorted(_file_sha256(member) for member in path.iterdir() if member.is_file())
        return hashlib.sha256("".join(parts).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="lvseg.prepare",
        description="Makes the shards of an experiment that are missing.",
        epilog="Example: python -m lvseg.prepare --cfg experiments/volume.yaml",
    )
    add_experiment_arguments(parser)
    parser.add_argument("--jobs", type=int, default=-1, help="processes (default: one a core)")

    def body(arguments: argparse.Namespace) -> None:
        if arguments.jobs == 0 or arguments.jobs < -1:
            raise InputError("BAD_ARGUMENT", f"Expected --jobs to be positive, or -1, received {arguments.jobs}.")
        experiment = load_experiment(arguments.cfg, arguments.set)
        for shards in prepare(experiment.data, arguments.jobs):
            print(f"{shards.card.name}: {len(shards.rows)} volumes in {shards.folder}")

    return command.run(parser, body, argv)


if __name__ == "__main__":
    sys.exit(main())
