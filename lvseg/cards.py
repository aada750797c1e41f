"""Dataset cards, `data/*.yaml`: where the scans of a dataset lie, whose they are and what their labels mean.

A card's paths are patterns below its root. `{patient}` and `{study}` stand for any part of a file's or folder's name,
`*` and `?` for what differs from patient to patient and means nothing; everything else is literal. Behind an id they do
not go on with its number or word, so that `{patient}*` of P1 finds nothing of P10. What a pattern finds for one patient
and study must be one file or folder: two are an error, never a choice made silently.
"""

from __future__ import annotations

import csv
import fnmatch
import glob
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from lvseg.errors import InputError
from lvseg.keys import Keys, check_keys, digest, read_yaml
from lvseg.volume import Volume

PLACEHOLDERS = ("patient", "study")
# The keys that name images, in the order they are read; a card has the keys of one group.
IMAGE_KEYS = (("image",), ("water", "fat"), ("in_phase", "opposed_phase"))
LARGEST_LABEL = 65535
MOST_CLASSES = 255  # beside the background: labels are written in 8 bits
MOST_NAMES = 5  # in a sentence that lists files or patients


class Simulate(Keys):
    """Simulated patients that preparation makes where the card's root does not hold them yet."""

    scanner: str
    patients: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)]


class PatientList(Keys):
    """A file below the card's root that names its patients.

    `.txt`: an id a line. `.csv`: the ids stand in `column`; `where` keeps the rows that have these values. `.json`:
    `key` is the dotted path of a list of ids, or of objects that have the id under `column`. `pattern` is a regular
    expression whose one group takes the id out of an entry such as ./imagesTr/amos_0507.nii.gz.
    """

    file: str
    column: str | None = None
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    where: dict[str, list[str]] = Field(default_factory=dict)
    key: str | None = None
    pattern: str | None = None


class Card(Keys):
    """One dataset.

    `root` is relative to the card's folder. The images are `image`, or the pair `water` and `fat`, or the pair
    `in_phase` and `opposed_phase`; a folder stands for a DICOM series, and `series` chooses one where there are several
    (one choice for all images, or one by image key). `kind: fat_fraction` makes the fat-fraction image in percent: of a
    pair, or of an `image` as the scanner stored it, where `scale` (percent a unit) overrides its fields.
    `mask` is one pattern, or one for each class. `labels` names each class and the values it has in the mask files, as
    numbers or ranges ("55-70"); every other value is background. `tissues` are maps in the numbering of
    `lvseg.phantom.anatomy.Tissue` (0 air to 32) and no other, which `augment.contrast` renders. `patient_pattern` is a
    regular expression for the ids that belong to the card, needed where a path could be read two ways, `patients` names
    them, and `patient_prefix` goes before them, so that the patients 1 of two hospitals stay two people. `spacing_mm`
    (row, column) is what the experiment takes where it names none.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    task: str
    scanner: str
    modality: Literal["MR", "CT"]
    root: str
    image: str | None = None
    water: str | None = None
    fat: str | None = None
    in_phase: str | None = None
    opposed_phase: str | None = None
    kind: Literal["intensity", "fat_fraction"] = "intensity"
    scale: Annotated[float, Field(gt=0)] | None = None
    series: str | dict[str, str] | None = None
    mask: str | dict[str, str]
    tissues: str | None = None
    labels: Annotated[dict[str, list[Any]], Field(min_length=1)]
    patients: list[str] | PatientList | None = None
    patient_pattern: str | None = None
    patient_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]*$")] = ""
    unlabelled: Literal["error", "skip"] = "error"
    spacing_mm: Annotated[list[Annotated[float, Field(gt=0, le=100)]], Field(min_length=2, max_length=2)] | None = None
    simulate: Simulate | None = None
    licence: str
    citation: str

    @property
    def source(self) -> dict[str, str]:
        """What to say of the dataset wherever its scans were used: name, licence, citation, images and card_sha256."""
        images = next(keys for keys in IMAGE_KEYS if getattr(self, keys[0]) is not None)
        facts = {"name": self.name, "licence": self.licence, "citation": self.citation, "images": ", ".join(images)}
        return {**facts, "card_sha256": digest(self.model_dump(mode="json"))}

    @model_validator(mode="after")
    def _check(self) -> Card:
        given = [key for group in IMAGE_KEYS for key in group if getattr(self, key) is not None]
        if tuple(given) not in IMAGE_KEYS:
            raise ValueError(
                "expected image, or water and fat, or in_phase and opposed_phase,"
                f" received {' and '.join(given) or 'none of them'}"
            )
        if (self.kind == "fat_fraction") != (self.task == "fatfraction"):
            raise ValueError(
                "expected kind: fat_fraction for the task fatfraction and only there, whose networks see percent,"
                f" received kind={self.kind} for {self.task}"
            )
        if len(given) == 2 and self.kind != "fat_fraction":
            raise ValueError(f"expected kind: fat_fraction beside {given[0]} and {given[1]}, received kind={self.kind}")
        if self.scale is not None and (self.kind != "fat_fraction" or len(given) == 2):
            raise ValueError(f"expected scale with an image of kind fat_fraction alone, received scale={self.scale}")
        if isinstance(self.series, dict) and set(self.series) - set(given):
            raise ValueError(f"expected series for {' and '.join(given)}, received one for {', '.join(self.series)}")
        for key, pattern in self._patterns():
            _check_pattern(key, pattern)
        if isinstance(self.mask, dict) and list(self.mask) != list(self.labels):
            raise ValueError(
                f"expected a mask for each of labels in their order ({', '.join(self.labels)}), received masks for"
                f" {', '.join(self.mask)}"
            )
        for key in ("patient_pattern", "patients.pattern"):
            expression = self.patient_pattern if key == "patient_pattern" else getattr(self.patients, "pattern", None)
            _check_expression(key, expression, groups=1 if key == "patients.pattern" else None)
        if self.patient_pattern is not None:
            used = _expression("{patient}", f"(?:{self.patient_pattern})")
            _check_expression("patient_pattern", self.patient_pattern, groups=None, used=used)
        self._check_labels()
        return self

    def _check_labels(self) -> None:
        if "background" in self.labels or not all(self.labels) or not all(self.labels.values()):
            raise ValueError(
                f"expected labels to be named, none of them background, each with values, received {self.labels}"
            )
        if len(self.labels) > MOST_CLASSES:
            raise ValueError(f"expected labels of at most {MOST_CLASSES} classes, received {len(self.labels)}")
        taken: dict[int, str] = {}
        for name, entries in self.labels.items():
            if isinstance(self.mask, dict):
                taken = {}  # each class has files of its own
            for entry in entries:
                low, high = _label_range(name, entry)
                for value in range(low, high + 1):
                    if value in taken:
                        raise ValueError(f"expected labels to share no value, received {value} twice in {self.labels}")
                    taken[value] = name

    def _patterns(self) -> list[tuple[str, str]]:
        """Every path pattern with its key."""
        masks = self.mask if isinstance(self.mask, dict) else {"": self.mask}
        patterns = [(key, getattr(self, key)) for group in IMAGE_KEYS for key in group]
        patterns += [(f"mask.{name}" if name else "mask", pattern) for name, pattern in masks.items()]
        return [(key, pattern) for key, pattern in [*patterns, ("tissues", self.tissues)] if pattern is not None]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, background first; the index is the label in shards and answers."""
        return ["background", *self.labels]

    @property
    def images(self) -> dict[str, str]:
        """The image patterns by key, in the order they are read."""
        return {key: getattr(self, key) for group in IMAGE_KEYS for key in group if getattr(self, key) is not None}

    @property
    def masks(self) -> dict[str, str]:
        """The mask patterns by class; one pattern for all classes stands under ``mask``."""
        return self.mask if isinstance(self.mask, dict) else {"mask": self.mask}

    def series_of(self, key: str) -> str | None:
        """Which series of an image's files is meant, None where there is but one."""
        return self.series.get(key) if isinstance(self.series, dict) else self.series


@dataclass(frozen=True)
class Scan:
    """One scan of a dataset with its files: whose it is and where it lies.

    Args:
        card: of its dataset; patient: id with the card's prefix; study: "1" where patterns have no {study}.
        images: path by image key of the card; masks: path by class, or under ``mask``; tissues: path or None.
    """

    card: Card
    patient: str
    study: str
    images: Mapping[str, Path]
    masks: Mapping[str, Path]
    tissues: Path | None

    @property
    def image(self) -> Path:
        """The first of its images, which names the scan."""
        return next(iter(self.images.values()))

    @property
    def mask(self) -> Path:
        """The first of its masks."""
        return next(iter(self.masks.values()))

    @property
    def files(self) -> list[Path]:
        """All its files and folders, in the order they are read."""
        return [*self.images.values(), *self.masks.values(), *([self.tissues] if self.tissues is not None else [])]


def load_card(path: Path) -> tuple[Card, Path]:
    """Reads and checks a card; returns it with the folder its scans lie in.

    Raises:
        InputError: NOT_FOUND, BAD_CONFIG.
    """
    card = check_keys(Card, read_yaml(path), str(path))
    return card, path.parent / card.root


def check_classes(path: Path, task: str, classes: Sequence[str]) -> None:
    """InputError BAD_MODEL for a card of another task or other classes, with the background, than a model's."""
    card, _ = load_card(path)
    if (card.task, card.classes) != (task, list(classes)):
        raise InputError(
            "BAD_MODEL",
            f"Expected a card of the model's task and classes, {task} with {', '.join(classes)}, received {card.task}"
            f" with {', '.join(card.classes)} in {path}.",
        )


def check_task(paths: Sequence[Path], task: str) -> None:
    """InputError BAD_CONFIG for cards of another task than an experiment's."""
    for path in paths:
        card, _ = load_card(path)
        if card.task != task:
            raise InputError(
                "BAD_CONFIG", f"Expected a card of the task {task}, received one of {card.task} in {path}."
            )


def agreed_spacing_mm(paths: Sequence[Path]) -> list[float] | None:
    """The target spacing (row, column) in mm that the cards of an experiment state, None if none does.

    Raises:
        InputError: NOT_FOUND, BAD_CONFIG; BAD_CONFIG also for cards that state different ones.
    """
    stated = {path: card.spacing_mm for path in paths if (card := load_card(path)[0]).spacing_mm is not None}
    if len({tuple(spacing) for spacing in stated.values()}) > 1:
        raise InputError(
            "BAD_CONFIG",
            "Expected one spacing_mm in all cards of an experiment, or data.spacing_mm to override them, received "
            + ", ".join(f"{spacing} in {path}" for path, spacing in stated.items())
            + ".",
        )
    return next(iter(stated.values()), None)


def find_scans(card: Card, root: Path) -> list[Scan]:
    """All scans of a card that have masks, sorted by patient and study; see `survey`."""
    return survey(card, root)[0]


def survey(card: Card, root: Path) -> tuple[list[Scan], list[Path]]:
    """Looks through a card's folder tree.

    Returns:
        The scans, sorted by patient and study, and the images that were left out for want of a mask.

    Raises:
        InputError: NOT_FOUND if there are none, a scan lacks a file, or a patient that the card names has none;
            AMBIGUOUS_PATH if a pattern finds several files for one patient and study, or one file for two.
        PermissionError: for a folder that cannot be read and may be of one of the card's patients.
    """
    key, pattern = next(iter(card.images.items()))
    found = _images(card, root, key, pattern)
    scans, unlabelled = [], []
    owners: dict[tuple[str, Path], tuple[str, str]] = {}  # of files beside the images
    for (patient, study), path in sorted(found.items()):
        images = {key: path}
        for other, its_pattern in list(card.images.items())[1:]:
            images[other] = _beside(card, root, other, its_pattern, patient, study, path, owners)
        masks: dict[str, Path] = {}
        for name, its_pattern in card.masks.items():
            mask_key = "mask" if name == "mask" and isinstance(card.mask, str) else f"mask.{name}"
            if card.unlabelled == "skip" and not _matches(root, its_pattern, patient, study):
                break
            masks[name] = _beside(card, root, mask_key, its_pattern, patient, study, path, owners)
        if len(masks) < len(card.masks):
            unlabelled.append(path)
            continue
        tissues = None
        if card.tissues is not None:
            tissues = _beside(card, root, "tissues", card.tissues, patient, study, path, owners)
        scans.append(Scan(card, card.patient_prefix + patient, study, images, masks, tissues))
    if not scans:
        what = f"{len(unlabelled)} without masks" if unlabelled else "no such files"
        raise InputError(
            "NOT_FOUND", f"Expected scans at {root / pattern} (key {key} of card {card.name}), received {what}."
        )
    return scans, unlabelled


def masks_without_scans(card: Card, root: Path) -> list[Path]:
    """Masks of patients and studies without an image, sorted: most likely the image has a name that the card misses."""
    listed = _listed(card, root)
    key, pattern = next(iter(card.images.items()))
    scans = {(patient, study) for patient, study, _ in _matching(card, root, key, pattern, listed)}
    patients = {patient for patient, _ in scans}
    return sorted(
        path
        for name, its_pattern in card.masks.items()
        for patient, study, path in _matching(card, root, f"mask.{name}", its_pattern, listed)
        if patient not in patients or ("{study}" in its_pattern and (patient, study) not in scans)
    )


def read_image(scan: Scan) -> Volume:
    """Reads a scan as its card says: the intensities of its image, or the fat fraction in percent.

    Returns:
        A volume in the orientation of the (first) file; float32 percent with ``metadata["fat_fraction"]`` for
        ``kind: fat_fraction``.

    Raises:
        InputError: what the formats and `lvseg.waterfat` say; BAD_CONFIG where a file says MR or CT and the card the
            other, by which training and evaluation would window it.
    """
    from lvseg.formats import read_volume

    volumes = {key: read_volume(path, scan.card.series_of(key)) for key, path in scan.images.items()}
    for key, volume in volumes.items():
        if volume.metadata.get("modality") in {"MR", "CT"} - {scan.card.modality}:
            raise InputError(
                "BAD_CONFIG",
                f"Expected scans of the modality of the card {scan.card.name}, {scan.card.modality}, received"
                f" {volume.metadata['modality']} in {scan.images[key]}.",
            )
    if scan.card.kind == "intensity":
        return volumes["image"]
    from lvseg import waterfat

    if "water" in volumes:
        return waterfat.from_water_fat(volumes["water"], volumes["fat"])
    if "in_phase" in volumes:
        return waterfat.from_in_opposed_phase(volumes["in_phase"], volumes["opposed_phase"])
    return waterfat.from_series(volumes["image"], scan.card.scale)


def read_labels(scan: Scan, image: Volume) -> Volume:
    """Reads a scan's mask or masks on the image's grid: uint8, 0 background, 1.. the card's classes in order.

    Args:
        scan: whose masks; image: from `read_image`.

    Raises:
        InputError: what the formats say; OVERLAPPING_LABELS if masks of two classes hold the same voxel.
    """
    from lvseg.formats import read_mask

    card = scan.card
    labels = np.zeros(image.shape, np.uint8)
    for name, path in scan.masks.items():
        mask = read_mask(path, image)
        own = [name] if isinstance(card.mask, dict) else list(card.labels)
        table = np.zeros(LARGEST_LABEL + 1, np.uint8)
        for label in own:
            for entry in card.labels[label]:
                low, high = _label_range(label, entry)
                table[low : high + 1] = card.classes.index(label)
        mapped = table[mask.voxels]
        shared = int(np.count_nonzero((labels > 0) & (mapped > 0)))
        if shared:
            raise InputError(
                "OVERLAPPING_LABELS",
                f"Expected each voxel in one class of card {card.name}, received {shared} in {name} and another one"
                f" in {path}.",
            )
        labels |= mapped
    return image.with_voxels(labels)


def read_tissues(scan: Scan, image: Volume) -> Volume | None:
    """Reads a simulated patient's tissue numbers on the image's grid, uint8; None where the card names none.

    Raises:
        InputError: what the formats say; BAD_TISSUES for numbers that are no tissue's.
    """
    from lvseg.formats import read_mask
    from lvseg.phantom.anatomy import Tissue

    if scan.tissues is None:
        return None
    tissues = read_mask(scan.tissues, image)
    highest = int(tissues.voxels.max(initial=0))
    if highest > max(Tissue):
        raise InputError(
            "BAD_TISSUES",
            f"Expected the tissues 0 to {max(Tissue):d} of lvseg.phantom.anatomy, received {highest} in {scan.tissues};"
            " maps in another numbering have to be renumbered, or left out of the card.",
        )
    return tissues.with_voxels(tissues.voxels.astype(np.uint8, copy=False))


def _images(card: Card, root: Path, key: str, pattern: str) -> dict[tuple[str, str], Path]:
    """The images of one key by (patient, study) as they stand in the paths."""
    listed = _listed(card, root)
    found: dict[tuple[str, str], list[Path]] = {}
    for patient, study, path in _matching(card, root, key, pattern, listed):
        if (other := _reading(card, pattern, listed, path.relative_to(root), lazy=True)) != (patient, study):
            raise InputError(
                "AMBIGUOUS_PATH",
                f"Expected one way to read the patient (and study) in a path, received {patient!r} ({study!r}) and"
                f" {other and other[0]!r} ({other and other[1]!r}) of {path} (key {key} of card {card.name}); give"
                " patient_pattern, or a pattern with more of what is alike in all paths.",
            )
        found.setdefault((patient, study), []).append(path)
    for (patient, study), paths in found.items():
        _check_one(card, key, patient, study, paths)
    if listed is not None:
        missing = sorted(listed - {patient for patient, _ in found})
        if missing:
            raise InputError(
                "NOT_FOUND",
                f"Expected a scan of every patient that patients of card {card.name} names, received none at"
                f" {root / pattern} for {_some(missing)}.",
            )
    return {who: paths[0] for who, paths in found.items()}


def _matching(
    card: Card, root: Path, key: str, pattern: str, listed: set[str] | None
) -> Iterator[tuple[str, str, Path]]:
    """Patient, study and path of whatever a pattern finds of the card's patients, by path."""
    parts = Path(pattern).parts

    def is_ours(folder: Path) -> bool:
        above = "/".join(parts[: len(folder.parts)])
        return "{patient}" not in above or _reading(card, above, listed, folder) is not None

    for path in sorted(_found(root, _glob(pattern, patient="*", study="*"), is_ours)):
        relative = path.relative_to(root)
        if _is_hidden(relative) or re.fullmatch(_expression(pattern), relative.as_posix()) is None:
            continue
        if any("\ud800" <= letter <= "\udfff" for letter in relative.as_posix()):
            raise InputError(
                "BAD_PATH",
                f"Expected names of files and folders in UTF-8, received {os.fsencode(path)!r} (key {key} of card"
                f" {card.name}); rename it.",
            )
        if (read := _reading(card, pattern, listed, relative)) is not None:
            yield *read, path


def _reading(
    card: Card, pattern: str, listed: set[str] | None, relative: Path, lazy: bool = False
) -> tuple[str, str] | None:
    """Patient and study in a path, None where it is of none of the card's patients.

    Args:
        lazy: with the shortest ids that fit instead of the longest.
    """
    ids = None
    if card.patient_pattern is not None:
        ids = f"(?:{card.patient_pattern})"
    elif listed is not None:
        ids = "|".join(re.escape(one) for one in sorted(listed, key=len, reverse=not lazy))
    match = re.fullmatch(_expression(pattern, ids, lazy), relative.as_posix())
    if match is None or (listed is not None and match["patient"] not in listed):
        return None
    return match["patient"], match.groupdict().get("study", "1")


def _expression(pattern: str, ids: str | None = None, lazy: bool = False) -> str:
    """The pattern as a regular expression: a group for the first of each placeholder, references for the others.

    Args:
        ids: a regular expression for {patient}; lazy: with the shortest text that fits a placeholder.
    """
    any_text = "[^/]+?" if lazy else "[^/]+"
    parts, seen = [], set()
    for token in _tokens(pattern):
        name = token[1:-1] if token.startswith("{") else ""
        if name:
            parts.append(
                f"(?P={name})" if name in seen else f"(?P<{name}>{ids if name == 'patient' and ids else any_text})"
            )
            seen.add(name)
        else:
            parts.append({"*": "[^/]*", "?": "[^/]"}.get(token, re.escape(token)))
    return "".join(parts)


def _tokens(pattern: str) -> list[str]:
    """Placeholders, wildcards and the text between them, of the pattern as paths are spelt: without ./ and a last /."""
    return re.split(r"(\{\w+\}|\*|\?)", Path(pattern).as_posix())


def _glob(pattern: str, patient: str, study: str) -> str:
    """The pattern for pathlib's glob: literal but for * and ?, with the placeholders filled in."""
    literal = re.sub(r"\[", "[[]", pattern)
    filled = literal.replace("{patient}", patient).replace("{study}", study)
    return re.sub(r"\*+", "*", filled)  # one beside a placeholder that stands for any is no ** of glob's


def _matches(root: Path, pattern: str, patient: str, study: str) -> list[Path]:
    found = _found(root, _glob(pattern, glob.escape(patient), glob.escape(study)))
    expression = _expression_of(pattern, {"patient": patient, "study": study})
    relative = ((path, path.relative_to(root)) for path in found)
    return sorted(
        path for path, own in relative if not _is_hidden(own) and re.fullmatch(expression, own.as_posix()) is not None
    )


def _found(root: Path, pattern: str, is_ours: Callable[[Path], bool] = lambda _: True) -> list[Path]:
    """What lies at a pattern of glob's below root, broken links included.

    pathlib's own glob passes over folders that may not be read and links to files that are not there: their patients
    would be missing without a word.

    Args:
        is_ours: whether a folder that cannot be read, relative to root, may hold what is looked for.

    Raises:
        PermissionError: for such a folder.
    """
    found = [root]
    for part in Path(pattern).parts:
        inside: list[Path] = []
        for folder in found:
            try:
                inside += _inside(folder, part)
            except PermissionError:
                if is_ours(folder.relative_to(root)):
                    raise
        found = inside
    return found


def _inside(folder: Path, part: str) -> list[Path]:
    """What of a folder a part of a pattern fits, but for what is hidden; nothing in what is no folder."""
    try:
        if glob.has_magic(part):
            fits = re.compile(fnmatch.translate(part)).fullmatch
            return [path for path in folder.iterdir() if fits(path.name) and not path.name.startswith(".")]
        (folder / part).lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
        return []
    return [folder / part]


def _expression_of(pattern: str, values: Mapping[str, str]) -> str:
    """The pattern of one patient and study; behind an id, * and ? do not go on with its number or word.

    So that P1* finds P1_2025 and P1a, but not what is of P10.
    """
    tokens, parts = [token for token in _tokens(pattern) if token], []
    for token, after in itertools.zip_longest(tokens, tokens[1:]):
        value = values[token[1:-1]] if token.startswith("{") else ""
        parts.append(re.escape(value) if value else {"*": "[^/]*", "?": "[^/]"}.get(token, re.escape(token)))
        if after in ("*", "?"):
            parts.append(r"(?!\d)" if value[-1:].isdigit() else r"(?![^\W\d_])" if value[-1:].isalpha() else "")
    return "".join(parts)


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _beside(
    card: Card,
    root: Path,
    key: str,
    pattern: str,
    patient: str,
    study: str,
    image: Path,
    owners: dict[tuple[str, Path], tuple[str, str]],
) -> Path:
    """The one file or folder of a key that belongs to an image.

    Args:
        owners: patient and study whose each file is, by key; whose this one is joins them.
    """
    paths = _matches(root, pattern, patient, study)
    if not paths:
        wanted = root / pattern.replace("{patient}", patient).replace("{study}", study)
        raise InputError(
            "NOT_FOUND", f"Expected {wanted} beside {image}, received no such file (key {key} of card {card.name})."
        )
    _check_one(card, key, patient, study, paths)
    whose = (patient, study if "{study}" in pattern else "")
    if (owner := owners.setdefault((key, paths[0]), whose)) != whose:
        raise InputError(
            "AMBIGUOUS_PATH",
            f"Expected a file or folder for each patient and study, received {paths[0]} for both"
            f" {'/'.join(filter(None, owner))} and {'/'.join(filter(None, whose))} (key {key} of card {card.name}).",
        )
    return paths[0]


def _check_one(card: Card, key: str, patient: str, study: str, paths: Sequence[Path]) -> None:
    if len(paths) > 1:
        raise InputError(
            "AMBIGUOUS_PATH",
            f"Expected one file or folder of patient {patient}, study {study}, for the key {key} of card {card.name},"
            f" received {_some(paths)}.",
        )


def _some(names: Iterable[object]) -> str:
    """The first few of many names, and how many more there are."""
    texts = [str(name) for name in names]
    more = len(texts) - MOST_NAMES
    return ", ".join(texts[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _listed(card: Card, root: Path) -> set[str] | None:
    """The patients that the card names, None where it takes all."""
    if card.patients is None:
        return None
    if isinstance(card.patients, list):
        return set(card.patients)
    wanted = card.patients
    path, where = root / wanted.file, f"(key patients of card {card.name})"
    if not path.is_file():
        raise InputError("NOT_FOUND", f"Expected a list of patients at {path}, received no such file {where}.")
    try:
        entries = _entries(path, wanted, where)
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise InputError(
            "BAD_CONFIG", f"Expected a list of patients, received '{error}' from {path} {where}."
        ) from error
    if wanted.pattern is not None:
        matches = [(entry, re.search(wanted.pattern, entry)) for entry in entries]
        for entry, match in matches:
            if match is None or match[1] is None:
                raise InputError(
                    "BAD_CONFIG",
                    f"Expected patients.pattern to match every entry, received {entry!r} in {path} {where}.",
                )
        entries = [match[1] for _, match in matches if match is not None]
    if not entries:
        raise InputError("BAD_CONFIG", f"Expected patients, received none in {path} {where}.")
    ids = set(entries)
    if card.patient_pattern is not None:  # a file that names the patients of several cards
        ids = {patient for patient in ids if re.fullmatch(card.patient_pattern, patient)}
    return ids


def _entries(path: Path, wanted: PatientList, where: str) -> list[str]:
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, delimiter=wanted.delimiter)
            for column in [wanted.column, *wanted.where]:
                if column is None or column not in (table.fieldnames or []):
                    raise InputError(
                        "BAD_CONFIG",
                        f"Expected a column {column or 'for patients.column'} among {table.fieldnames},"
                        f" received none in {path} {where}.",
                    )
            chosen = [
                (table.line_num, row[wanted.column or ""])
                for row in table
                if all(row[column] in values for column, values in wanted.where.items())
            ]
        for line, patient in chosen:
            if not patient:
                raise InputError(
                    "BAD_CONFIG",
                    f"Expected a patient in column {wanted.column}, received none in line {line} of {path} {where}.",
                )
        return [patient for _, patient in chosen]
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        values = reduce(
            lambda group, name: group.get(name) if isinstance(group, dict) else None,
            wanted.key.split(".") if wanted.key else [],
            json.loads(text),
        )
        if isinstance(values, list) and wanted.column is not None:
            values = [value.get(wanted.column) if isinstance(value, dict) else None for value in values]
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise InputError(
                "BAD_CONFIG",
                f"Expected a list of patient ids at {wanted.key or 'the top'}, received none in {path} {where}.",
            )
        return values
    if path.suffix == ".txt":
        return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    raise InputError("BAD_CONFIG", f"Expected a .txt, .csv or .json file of patients, received {path} {where}.")


def _label_range(name: str, entry: object) -> tuple[int, int]:
    """The lowest and highest value of an entry of labels: a number, or a range such as "55-70"."""
    low = high = 0
    if isinstance(entry, int) and not isinstance(entry, bool):
        low = high = entry
    elif isinstance(entry, str) and (match := re.fullmatch(r"(\d{1,5})-(\d{1,5})", entry)):
        low, high = int(match[1]), int(match[2])
    if not 1 <= low <= high <= LARGEST_LABEL:
        raise ValueError(
            f"expected labels.{name} to list whole numbers from 1 to {LARGEST_LABEL} or ranges such as 55-70,"
            f" received {entry!r}"
        )
    return low, high


def _check_pattern(key: str, pattern: str) -> None:
    names = re.findall(r"\{(.*?)\}", pattern)
    if "patient" not in names or set(names) - set(PLACEHOLDERS) or pattern.count("{") != len(names):
        raise ValueError(f"expected {key} to hold {{patient}} and at most {{study}} beside it, received {pattern}")
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts or "**" in pattern:
        raise ValueError(f"expected {key} to be a path below root, without .. and **, received {pattern}")


def _check_expression(key: str, expression: str | None, groups: int | None, used: str | None = None) -> None:
    """ValueError for what is no regular expression, or is none as it is used, within a larger one."""
    if expression is None:
        return
    try:
        compiled = re.compile(expression)
        re.compile(used or expression)
    except re.error as error:
        raise ValueError(f"expected {key} to be a regular expression, received {expression} ({error})") from error
    if groups is not None and compiled.groups != groups:
        raise ValueError(f"expected {key} to have one group, received {expression}")
