"""Command: dataset cards -> shards, a volume each, with a manifest and a page that shows what was read beside them.

    python -m lvseg.prepare --cfg experiments/volume.yaml             makes the shards that are missing
    python -m lvseg.prepare --cfg experiments/volume.yaml --check     reads them back and verifies them

A shard appears whole or not at all, so a run that was killed goes on with the shards that are missing; they come out
byte for byte as those of a run that was not.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from lvseg import cards, command, workers
from lvseg.cards import Card, Scan, load_card, survey
from lvseg.config import Data, add_experiment_arguments, load_experiment
from lvseg.errors import InputError
from lvseg.formats import files_of
from lvseg.keys import digest
from lvseg.split import Split, split_patients
from lvseg.volume import Volume, as_float32
from lvseg.workers import Engine

# Raise when what is written into a shard changes, so that old shards are not taken for new ones.
SHARD_FORMAT = 5
MANIFEST = "manifest.json"
PACKAGES = ("lvseg", "tensorflow", "numpy", "nibabel", "pydicom", "highdicom", "SimpleITK", "vtk")
# Of a scan's metadata, what is kept with the shard; nothing that names a person.
KEPT_METADATA = ("modality", "manufacturer", "units", "fat_fraction", "slice_warnings")
LEAST_STEPS = 250  # of a shard's values from a scan's 0.5th to its 99.5th percentile
HASHING_THREADS = 8  # they wait for the disk more than for a core


@dataclass(frozen=True)
class ShardSet:
    """The shards of one card: its folder, a manifest row a volume, and the class names."""

    card: Card
    folder: Path
    rows: list[dict[str, Any]]

    def files(self, patients: Sequence[str]) -> list[Path]:
        """Shards of these patients, in the manifest's order."""
        return [self.folder / row["file"] for row in self.rows if row["patient"] in patients]

    def of(self, patients: Sequence[str]) -> ShardSet:
        """The set without anybody else's shards: what training gets, so that it cannot name a test patient's."""
        return replace(self, rows=[row for row in self.rows if row["patient"] in patients])


@dataclass(frozen=True)
class Task:
    """One scan to make a shard of: absolute paths, since a worker may have another working folder."""

    scan: Scan
    root: Path
    path: Path
    data: Data
    sources: tuple[str, ...] | None


def prepare(
    data: Data, jobs: int = -1, engine: Engine | None = None, simulated: Collection[str] | None = None
) -> list[ShardSet]:
    """Makes the shards of an experiment that are missing, simulating patients first where a card says so.

    Args:
        data: the experiment's `data` keys.
        jobs: processes, -1 for one a core.
        engine: where the work is done instead of in `jobs` processes of this machine.
        simulated: ids of the patients that are simulated where they are missing; None for all that the cards say.

    Returns:
        One set a card, in the order of `data.datasets`.

    Raises:
        InputError: a card or scan that cannot be used; DUPLICATE_SCAN for the same voxels under two patient ids.
    """
    engine = engine or Engine(jobs=jobs)
    loaded = _load_cards(data)
    for card, root in loaded:
        simulate_missing(card, root, engine.jobs, simulated)
    sets = [_prepare_card(card, root, data, engine) for card, root in loaded]
    _check_classes(sets)
    _check_duplicates(sets, [root for _, root in loaded])
    return sets


def _load_cards(data: Data) -> list[tuple[Card, Path]]:
    """The experiment's cards with their roots, which fit together; InputError if they do not."""
    loaded = [load_card(Path(path)) for path in data.datasets]
    names = [card.name for card, _ in loaded]
    if len(set(names)) < len(names):
        raise InputError("BAD_CONFIG", f"Expected each card once in data.datasets, received {', '.join(names)}.")
    classes = {tuple(card.classes) for card, _ in loaded}
    if len(classes) > 1:
        raise InputError("BAD_CONFIG", f"Expected the same labels in all of data.datasets, received {sorted(classes)}.")
    kinds = {card.name: card.kind for card, _ in loaded}
    if len(set(kinds.values())) > 1:
        raise InputError("BAD_CONFIG", f"Expected one kind of image in all of data.datasets, received {kinds}.")
    return loaded


def _check_duplicates(sets: Sequence[ShardSet], roots: Sequence[Path]) -> None:
    """Refuses the same canonical voxels under two patient ids, in whatever orientation or dtype they are stored."""
    seen: dict[str, tuple[str, str]] = {}
    for shards, root in zip(sets, roots, strict=True):
        for row in shards.rows:
            where = f"{row['patient']} ({root / row['scan'][0]}, card {shards.card.name})"
            patient, first = seen.setdefault(row["voxels_sha256"], (row["patient"], where))
            if patient != row["patient"]:
                raise InputError(
                    "DUPLICATE_SCAN",
                    f"Expected each scan under one patient id, received the same voxels for patients {first} and"
                    f" {where}.",
                )


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
    return [scan for path in data.datasets for scan in _survey(*load_card(Path(path)))[0]]


def _made_by(card: Card, data: Data) -> dict[str, Any]:
    """What decides over a shard's content beside the scan's files; another value gets another folder."""
    window = {"ct_window_hu": data.ct_window_hu} if card.modality == "CT" and data.ct_window_hu is not None else {}
    return {
        **window,
        "format": SHARD_FORMAT,
        "labels": list(card.labels.items()),  # their order numbers the classes
        "masks": "one a class" if isinstance(card.mask, dict) else "one",
        "scanner": card.scanner,
        "images": list(card.images),
        "kind": card.kind,
        "scale": card.scale,
        "series": card.series,
        "axis": data.axis,
        "spacing_mm": data.spacing_mm,
        "size": data.size,
    }


def _folder(card: Card, data: Data) -> Path:
    return Path(data.shards) / f"{card.name}-{digest(_made_by(card, data))[:8]}"


def card_scans(path: Path) -> list[Scan]:
    """All scans of a card, simulated first where it says so and they are not there yet."""
    card, root = load_card(path)
    simulate_missing(card, root)
    return _survey(card, root)[0]


def _survey(card: Card, root: Path) -> tuple[list[Scan], list[Path]]:
    """As `cards.survey`; of simulated patients those of the card alone, whoever else was left in its folder."""
    scans, unlabelled = survey(card, root)
    own = simulated_patients(card, root)
    return [scan for scan in scans if not own or scan.patient in own], unlabelled


def simulate_missing(card: Card, root: Path, jobs: int = -1, only: Collection[str] | None = None) -> None:
    """Makes the patients, or those of these ids, of a card that says how to simulate them, where they are missing."""
    if card.simulate is not None:
        from lvseg.phantom.simulate import simulate

        if only is not None:
            only = {name.removeprefix(card.patient_prefix) for name in only}
        simulate(card.simulate.scanner, card.simulate.patients, card.simulate.seed, root, jobs, only=only)


def simulated_patients(card: Card, root: Path) -> dict[str, bool]:
    """Ids of the patients that a card says how to simulate, and whether they are there; none for other cards."""
    if card.simulate is None:
        return {}
    from lvseg.phantom.patients import patient_id
    from lvseg.phantom.simulate import protocol_of

    seed, varied = card.simulate.seed, protocol_of(card.simulate.scanner).varied
    names = [patient_id(seed, number, varied) for number in range(1, card.simulate.patients + 1)]
    return {card.patient_prefix + name: (root / name).is_dir() for name in names}


def _prepare_card(card: Card, root: Path, data: Data, engine: Engine) -> ShardSet:
    scans, unlabelled = _survey(card, root)
    if unlabelled:
        print(
            f"{card.name}: {len(unlabelled)} of {len(scans) + len(unlabelled)} scans have no mask and are left out, the"
            f" first is {unlabelled[0]}",
            file=sys.stderr,
        )
    if alone := cards.masks_without_scans(card, root):
        print(
            f"{card.name}: {len(alone)} masks have no scan and are left out, the first is {alone[0]}", file=sys.stderr
        )
    folder = _folder(card, data)
    folder.mkdir(parents=True, exist_ok=True)
    with command.alone(folder.parent / f".{folder.name}.lock", folder):
        for left_over in folder.glob(".partial-*"):  # a worker that was killed could not remove its own
            left_over.unlink(missing_ok=True)
        rows = _make_shards(card, root, scans, folder, data, engine)
        manifest = {
            "card": card.model_dump(),
            "card_sha256": digest(card.model_dump()),
            "made_by": _made_by(card, data),
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
            "unlabelled": [path.relative_to(root).as_posix() for path in unlabelled],
            "volumes": rows,
        }
        with command.atomic(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        left = sorted({path.name for path in folder.glob("*.tfrecord")} - {row["file"] for row in rows})
    if left:
        print(
            f"{card.name}: {len(left)} shards are of scans that the card does not find any more, the first is"
            f" {folder / left[0]}; delete them if nothing else needs them",
            file=sys.stderr,
        )
    for row in rows:
        for warning in warnings_of(row):
            print(f"{card.name}: {row['patient']}, {root / row['scan'][0]}: {warning}", file=sys.stderr)
    return ShardSet(card, folder, rows)


def warnings_of(row: Mapping[str, Any]) -> list[str]:
    """What a scan's files have against its slices and its fat fraction, of its row of the manifest."""
    metadata = row["metadata"]
    return [*metadata.get("slice_warnings", []), *metadata.get("fat_fraction", {}).get("warnings", [])]


def _make_shards(
    card: Card, root: Path, scans: Sequence[Scan], folder: Path, data: Data, engine: Engine
) -> list[dict[str, Any]]:
    """The manifest rows of all scans; shards that are there and were made of the same files are kept."""
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        # They hash and no more: TensorFlow, which reads shards, crashes now and then where two threads call it.
        hashed = zip(scans, threads.map(functools.partial(_sources_if_made, folder=folder), scans), strict=True)
        checked = command.progress(hashed, f"checking {card.name}", total=len(scans))
        found = [(_finished(scan, folder, sources) if sources else None, sources) for scan, sources in checked]
    rows = [row for row, _ in found]
    missing = [number for number, row in enumerate(rows) if row is None]
    tasks = [_task(scans[number], root, folder, data, found[number][1]) for number in missing]
    made = zip(missing, workers.each(_make_shard, tasks, engine), strict=True)
    for number, row in command.progress(made, f"preparing {card.name}", total=len(missing)):
        rows[number] = row
    return [
        {**row, "scan": [path.relative_to(root).as_posix() for path in scan.images.values()]}
        for scan, row in zip(scans, rows, strict=True)
        if row is not None
    ]


def _sources_if_made(scan: Scan, folder: Path) -> tuple[str, ...] | None:
    """The hashes of a scan's files if there is a shard of it."""
    return _sources(scan) if _shard_path(scan, folder).exists() else None


def _finished(scan: Scan, folder: Path, sources: tuple[str, ...]) -> dict[str, Any] | None:
    """The manifest row of a scan's shard if it was made of files with these hashes."""
    from lvseg import records

    row = records.read_row(_shard_path(scan, folder))
    made_of = {"patient": scan.patient, "study": scan.study, "sources": list(sources)}
    return row if made_of.items() <= row.items() else None


def _make_shard(task: Task) -> dict[str, Any]:
    """Writes a scan's shard and returns its manifest row; runs in a worker."""
    from lvseg import records

    sources = task.sources if task.sources is not None else _sources(task.scan)
    records.write_shard(harmonise_scan(task.scan, sources, task.data, task.root), task.path)
    return records.read_row(task.path)


def _task(scan: Scan, root: Path, folder: Path, data: Data, sources: tuple[str, ...] | None) -> Task:
    absolute = replace(
        scan,
        images={key: path.absolute() for key, path in scan.images.items()},
        masks={key: path.absolute() for key, path in scan.masks.items()},
        tissues=scan.tissues.absolute() if scan.tissues is not None else None,
    )
    return Task(absolute, root.absolute(), _shard_path(scan, folder).absolute(), data, sources)


def _shard_path(scan: Scan, folder: Path) -> Path:
    # Escaped, so that no two scans share a name: quote() leaves no + in either part.
    return folder / f"{quote(scan.patient, safe='')}+{quote(scan.study, safe='')}.tfrecord"


def _sources(scan: Scan) -> tuple[str, ...]:
    return tuple(
        hashlib.sha256("\0".join(each).encode()).hexdigest() if len(each) > 1 else each[0]
        for each in ([_sha256(path) for path in files_of(file)] for file in scan.files)
    )


def harmonise_scan(scan: Scan, sources: Sequence[str], data: Data, root: Path | None = None) -> Any:
    """Reads a scan with its mask and harmonises both: a `records.Harmonised`.

    Args:
        scan: whose files; sources: their sha256, in order.
        data: the experiment's `data` keys.
        root: the folder that paths in the metadata are told from, so that a shard does not depend on where it lies.

    Raises:
        InputError: an unreadable file; GEOMETRY_MISMATCH if mask and image do not lie on one grid; EMPTY_IMAGE for an
            image of one value or a CT without tissue in its window; OUTLIER where the brightest or darkest voxels would
            leave tissue too few of the values that a shard has; DIMS_LIMIT.
    """
    import tensorflow as tf

    from lvseg import preprocess, records

    image = cards.read_image(scan)
    permutation = preprocess.AXIS_PERMUTATIONS[data.axis]
    canonical = image.canonical()
    voxels = canonical.voxels.transpose(permutation)
    slice_mm, row_mm, column_mm = (canonical.spacing_mm[axis] for axis in permutation)
    spacing_mm = tf.constant([slice_mm, row_mm, column_mm], tf.float32)
    if len(voxels) > preprocess.SLICES_MAX:
        raise InputError(
            "DIMS_LIMIT", f"Expected at most {preprocess.SLICES_MAX} slices, received {len(voxels)} in {image.source}."
        )
    own, _ = preprocess.without_padding(as_float32(voxels, image.source))
    if own.min() == own.max():
        raise InputError(
            "EMPTY_IMAGE", f"Expected an image, received one value, {own.min()}, everywhere in {image.source}."
        )
    seen = preprocess.windowed(own, scan.card.modality, data.ct_window_hu)
    if seen.min() == seen.max():
        raise InputError("EMPTY_IMAGE", f"Expected tissue within data.ct_window_hu, received none in {image.source}.")
    intensities = tf.constant(seen)
    statistics = preprocess.statistics(intensities)
    _check_steps(statistics, image)
    target = data.spacing_mm

    def harmonised(labels: Volume) -> Any:
        found = labels.canonical().voxels.transpose(permutation)
        return preprocess.harmonise_labels(tf.constant(found), spacing_mm, target, data.size).numpy()

    tissues = cards.read_tissues(scan, image)
    kept = {key: image.metadata[key] for key in KEPT_METADATA if image.metadata.get(key) not in (None, "", [])}
    return records.Harmonised(
        patient=scan.patient,
        study=scan.study,
        scanner=scan.card.scanner,
        dataset=scan.card.name,
        sources=tuple(sources),
        voxels_sha256=records.voxels_sha256(canonical.voxels),
        shape=(voxels.shape[0], voxels.shape[1], voxels.shape[2]),
        spacing_mm=(slice_mm, row_mm, column_mm),
        statistics=statistics,
        image=preprocess.harmonise(intensities, spacing_mm, target, data.size, statistics.minimum).numpy(),
        mask=harmonised(cards.read_labels(scan, image)),
        tissues=None if tissues is None else harmonised(tissues),
        metadata=_relative(kept, f"{root}/" if root is not None else ""),
    )


def _check_steps(statistics: Any, image: Volume) -> None:
    """InputError OUTLIER if a shard's 16 bits, spread from minimum to maximum, are too coarse for what lies between."""
    from lvseg import preprocess, records

    lowest, highest = float(statistics.minimum), float(statistics.maximum)
    dark, bright = (float(preprocess.percentile(statistics.percentiles, percent)) for percent in (0.5, 99.5))
    step = (highest - lowest) / records.LARGEST_STORED
    # Whole numbers of steps of 1 and less come out as they went in, however few they are.
    exact = step <= 1 and np.issubdtype(image.voxels.dtype, np.integer)
    if bright > dark and step > (bright - dark) / LEAST_STEPS and not exact:
        raise InputError(
            "OUTLIER",
            f"Expected intensities of which the highest lies near the others, received {highest:g} where the 99.5th"
            f" percentile is {bright:g} (lowest {lowest:g}, 0.5th percentile {dark:g}) in {image.source}; 16 bits leave"
            f" {(bright - dark) / step:.0f} values between those percentiles.",
        )


def _relative(values: Any, prefix: str) -> Any:
    """JSON-able values with paths below `prefix` cut to what comes after it."""
    if isinstance(values, str):
        return values.replace(prefix, "") if prefix else values
    if isinstance(values, dict):
        return {key: _relative(value, prefix) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_relative(value, prefix) for value in values]
    return values


def _sha256(path: Path) -> str:
    """sha256 of a file, or of the names and contents of all files below a folder."""
    if path.is_dir():
        files = [member for member in sorted(path.rglob("*")) if member.is_file()]
        parts = [f"{member.relative_to(path).as_posix()}\0{_sha256(member)}" for member in files]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check(data: Data, engine: Engine) -> list[str]:
    """Reads the shards of an experiment back and verifies them against their manifests, without the scans.

    Returns:
        A sentence for every shard that is bad, missing, or in no manifest; empty if all are whole.

    Raises:
        InputError: NOT_FOUND where nothing was prepared yet.
    """
    problems = []
    for card, _ in _load_cards(data):
        folder = _folder(card, data)
        if not (folder / MANIFEST).is_file():
            raise InputError("NOT_FOUND", f"Expected prepared shards, received none at {folder}; prepare them first.")
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            rows = {row["file"]: row for row in manifest["volumes"]}
        except (ValueError, KeyError, TypeError):
            problems.append(f"{folder / MANIFEST}: expected a manifest, received a damaged file")
            continue
        if manifest.get("made_by") != json.loads(json.dumps(_made_by(card, data))):
            problems.append(f"{folder / MANIFEST}: expected the card's own made_by, received another")
        there = {path.name for path in folder.glob("*.tfrecord")}
        problems += [f"{folder / name}: expected a shard, received none" for name in sorted(set(rows) - there)]
        problems += [
            f"{folder / name}: expected a row of this shard in {MANIFEST}, received none"
            for name in sorted(there - set(rows))
        ]
        whole = [
            (folder.absolute() / name, rows[name], len(card.classes), data.size) for name in sorted(there & set(rows))
        ]
        verdicts = workers.each(_check_shard, whole, engine)
        for (path, *_), verdict in command.progress(
            zip(whole, verdicts, strict=True), f"verifying {card.name}", total=len(whole)
        ):
            if verdict:
                problems.append(f"{folder / path.name}: {verdict}")
    return problems


def _check_shard(what: tuple[Path, dict[str, Any], int, int]) -> str:
    """What is wrong with a shard that has this manifest row, empty if nothing is; runs in a worker."""
    import tensorflow as tf

    from lvseg import records

    path, row, classes, size = what
    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != row["shard_sha256"]:
                return "expected the bytes that the manifest has the hash of, received others"
        own = records.read_row(path)
        for key, value in own.items():
            if row.get(key) != value:
                return f"expected {key} as in the manifest, received another"
        slices = records.decode(next(iter(tf.data.TFRecordDataset(str(path)))), size)
        image, mask = slices.image.numpy(), slices.mask.numpy()
    except InputError as error:
        return error.sentence.rstrip(".")
    except (KeyError, ValueError, tf.errors.OpError) as error:
        return f"expected slices that can be read, received '{' '.join(str(error).split())[:200]}'"
    shape = (row["shape"][0], size, size)
    if image.shape != shape or mask.shape != shape:
        return f"expected slices of shape {shape}, received {image.shape} and masks of {mask.shape}"
    found = np.unique(mask).tolist()
    if found != row["classes"] or max(found) >= classes:
        return f"expected masks of the classes {row['classes']}, received {found}"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="lvseg.prepare",
        description="Makes the shards of an experiment that are missing, and a page that shows what was read.",
        epilog="Example: python -m lvseg.prepare --cfg experiments/volume.yaml",
    )
    add_experiment_arguments(parser)
    parser.add_argument("--jobs", type=int, default=-1, help="processes (default: one a core)")
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="processes of this machine, or a Ray cluster"
    )
    parser.add_argument("--address", help="of a running Ray cluster (default: start one on this machine)")
    parser.add_argument(
        "--check", action="store_true", help="verify the shards that are there instead; 2 if one is bad"
    )

    def body(arguments: argparse.Namespace) -> None:
        if arguments.jobs == 0 or arguments.jobs < -1:
            raise InputError("BAD_ARGUMENT", f"Expected --jobs to be positive, or -1, received {arguments.jobs}.")
        if arguments.address and arguments.engine != "ray":
            raise InputError("BAD_ARGUMENT", f"Expected --engine ray with --address, received {arguments.engine}.")
        workers.single_thread()  # this process computes beside its workers, or alone with --jobs 1
        experiment = load_experiment(arguments.cfg, arguments.set)
        cards.check_task([Path(path) for path in experiment.data.datasets], experiment.task)
        engine = Engine(arguments.engine, arguments.jobs, arguments.address)
        with workers.session(engine):
            if arguments.check:
                _verify(experiment.data, engine)
            else:
                _prepare_and_show(experiment.data, engine)

    return command.run(parser, body, argv)


def _prepare_and_show(data: Data, engine: Engine) -> None:
    from lvseg import overview

    for shards in prepare(data, engine=engine):
        page = overview.write(shards.folder, engine)
        print(f"{shards.card.name}: {len(shards.rows)} volumes in {shards.folder}, look at {page}")


def _verify(data: Data, engine: Engine) -> None:
    problems = check(data, engine)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise InputError(
            "BAD_SHARDS",
            f"Expected shards as they were prepared, received {len(problems)} that are not, named above; delete them"
            " and prepare again.",
        )
    print("every shard is as it was prepared")


if __name__ == "__main__":
    # Through the module's own name, so that workers can import what they are asked to call.
    from lvseg.prepare import main as command_main

    sys.exit(command_main())
