"""What can be told of scans that nobody segmented: how unsure a model is of them, and which are most worth segmenting.

Doubt is what is missing to a Dice of 1 between a scan's mask and those of the scan mirrored, at another contrast and
shifted, and between neighbouring slices (`lvseg.quality`). Those to segment are chosen one after another, each the one
whose doubt times its distance from all chosen before is largest, so that no two of them are alike.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from lvseg import command, quality, waterfat
from lvseg.errors import InputError
from lvseg.formats import write_volume
from lvseg.postprocess import postprocess
from lvseg.predict import FAT_FRACTION_TASK, Segmentation, Segmenter, read_scan
from lvseg.volume import Array, Volume

if TYPE_CHECKING:
    from lvseg.pipeline import Samples
    from lvseg.step import Step

THUMBNAIL = 8  # pixels a side of the middle slice as it enters the distance
BINS = 16
LEAST_DOUBT = 0.02  # so that among scans of which the model is sure the most unlike ones come first


@dataclass(frozen=True)
class Look:
    """What a model makes of a scan: doubt from 0 to 1, and what tells scans apart, float64 [features]."""

    scan: Path
    doubt: float
    features: Array


def look(segmenter: Segmenter, scans: Sequence[Path], modality: str | None = None) -> list[Look]:
    """Looks at each scan with the model, four passes each; scans that cannot be read are named on stderr and left out.

    Args:
        scans: as `predict.read_scan` takes; modality: of all, as `Segmenter.segment`.

    Raises:
        InputError: NO_PATIENTS if none can be read.
    """
    found = []
    for path, volume, answer in _segmented(segmenter, scans, modality, "looking"):
        own = quality.features(segmenter, answer)
        doubt = 1.0 if own is None else 1.0 - float(np.mean([own[name] for name in quality.AGREEING]))
        found.append(Look(path, doubt, _features(answer.slices, _spacing_mm(segmenter, volume), own)))
    if not found:
        raise InputError("NO_PATIENTS", f"Expected a scan that can be read, received none of {len(scans)}.")
    return found


def _segmented(
    segmenter: Segmenter, scans: Sequence[Path], modality: str | None, doing: str
) -> Iterator[tuple[Path, Volume, Segmentation]]:
    """Each scan that can be read, with its segmentation; the others are named on stderr."""
    for path in command.progress(scans, doing):
        try:
            volume = read_scan(path, segmenter.info["task"])
            yield path, volume, segmenter.segment(volume, keep=True, modality=modality)
        except InputError as error:
            print(f"left aside: {error.sentence}", file=sys.stderr)


def _spacing_mm(segmenter: Segmenter, volume: Volume) -> list[float]:
    """Slice distance first, then in the plane, as the model sees the scan."""
    from lvseg.preprocess import AXIS_PERMUTATIONS

    canonical = volume.canonical().spacing_mm
    return [canonical[axis] for axis in AXIS_PERMUTATIONS[segmenter.info["axis"]]]


def suggest(looked: Sequence[Look], count: int) -> list[int]:
    """Places of the scans most worth segmenting, the most first.

    Args:
        looked: at least `count`, which is at least 1.
    """
    table = np.array([each.features for each in looked])
    doubt = np.maximum([each.doubt for each in looked], LEAST_DOUBT)
    chosen = [int(np.argmax(doubt))]
    while len(chosen) < count:
        apart = np.min([np.linalg.norm(table - table[place], axis=1) for place in chosen], axis=0)
        worth = doubt * apart
        worth[chosen] = -1.0
        chosen.append(int(np.argmax(worth)))
    return chosen


def write_own_masks(
    segmenter: Segmenter, scans: Sequence[Path], folder: Path, least_agreement: float, modality: str | None = None
) -> tuple[list[Path], list[Path]]:
    """Writes a model's own masks, the largest part of each, of the scans on which it agrees with itself.

    Args:
        scans: as `predict.read_scan` takes; folder: where cards, scans and masks go.
        least_agreement: Dice of a mask with the mirror image's.
        modality: of all, as `Segmenter.segment`; MR where neither it nor the files say.

    Returns:
        The cards of those scans, one a modality, and which they are; the others are named on stderr.
    """
    trusted: list[Path] = []
    info, modalities = segmenter.info, set()
    is_fat = info["task"] == FAT_FRACTION_TASK
    for path, volume, answer in _segmented(segmenter, scans, modality, "segmenting"):
        own = quality.features(segmenter, answer)
        if own is None or own["mirrored_dice"] < least_agreement:
            print(f"left aside, since the model does not agree with itself: {path}", file=sys.stderr)
            continue
        seen_as = "CT" if (modality or volume.metadata.get("modality")) == "CT" else "MR"
        patient = folder / seen_as / f"own-{len(trusted):04d}"
        patient.mkdir(parents=True)
        write_volume(waterfat.from_series(volume) if is_fat else volume, patient / "scan.nii.gz")
        modalities.add(seen_as)
        canonical = answer.mask.canonical().voxels
        mask = volume.from_canonical(postprocess(canonical, ["largest_component"]))
        write_volume(mask, patient / "mask.nii.gz")
        trusted.append(path)
    cards = []
    for each in sorted(modalities):
        card = {
            "name": f"own_masks_{each}",
            "task": info["task"],
            "scanner": f"unlabelled_{each}",
            "modality": each,
            "root": each,
            "image": "{patient}/scan.nii.gz",
            "mask": "{patient}/mask.nii.gz",
            "labels": {name: [label] for label, name in enumerate(info["labels"][1:], start=1)},
            "licence": "as the scans",
            "citation": "masks by the model itself",
        } | ({"kind": "fat_fraction", "scale": 1.0} if is_fat else {})
        cards.append(folder / f"own_masks_{each}.yaml")
        cards[-1].write_text(yaml.safe_dump(card), encoding="utf-8")
    return cards, trusted


def agreement_with_itself(step: Step, volume: Samples) -> float:
    """Dice of what a network in training makes of a volume and of its mirror image, all classes as one."""
    import tensorflow as tf

    own = step.labels(volume) > 0
    mirrored = step.labels(volume._replace(stack=tf.reverse(volume.stack, [3])))[:, :, ::-1] > 0
    total = int(own.sum()) + int(mirrored.sum())
    return 2 * int((own & mirrored).sum()) / total if total else 0.0


def _features(slices: Array | None, spacing_mm: Sequence[float], own: dict[str, Any] | None) -> Array:
    """Intensities, the middle slice in a few pixels, the slices' distance and height, and the size of the organ."""
    if slices is None:
        raise InputError("BAD_ARGUMENT", "Expected what the network saw, received none.")
    low, high = np.percentile(slices, [0.5, 99.5])
    scaled = np.clip((slices - low) / max(float(high - low), 1e-6), 0, 1)
    histogram = np.histogram(scaled, bins=BINS, range=(0, 1))[0] / scaled.size
    middle = scaled[len(scaled) // 2]
    step = middle.shape[0] // THUMBNAIL
    thumbnail = middle[: step * THUMBNAIL, : step * THUMBNAIL].reshape(THUMBNAIL, step, THUMBNAIL, step).mean((1, 3))
    size = math.log1p(own["volume_ml"] if own else 0.0)
    geometry = [math.log(spacing_mm[0]), math.log(len(slices) * spacing_mm[0]), size]
    # Each kind of feature counts alike, however many numbers it has.
    return np.concatenate(
        [
            np.repeat(np.sqrt(histogram), 4),
            thumbnail.ravel(),
            np.repeat(geometry, BINS * 4 // 3),
        ]
    )
