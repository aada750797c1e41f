"""What can be told of scans that nobody segmented: how unsure a model is of them, and which are most worth segmenting.

Doubt is what is missing to the expected Dice (`lvseg.quality`) where the model's card has the calibration, or else to
a Dice of 1 between a scan's mask and those of the scan at another contrast, shifted and, for a network that has seen
such scans, mirrored, and between neighbouring slices. Those to segment are chosen one after another, each the one whose
doubt times its distance from all chosen before is largest, so that no two of them are alike.
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
from lvseg.predict import FAT_FRACTION_TASK, LIKE_CT, UNLIKE_CT, Segmentation, Segmenter, read_scan
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
        doubt = quality.doubt(own, segmenter.info)
        found.append(Look(path, doubt, _features(answer.slices, _spacing_mm(segmenter, volume), own)))
    if not found:
        raise InputError("NO_PATIENTS", f"Expected a scan that can be read, received none of {len(scans)}.")
    return found


def _segmented(
    segmenter: Segmenter, scans: Sequence[Path], modality: str | None, doing: str
) -> Iterator[tuple[Path, Volume, Segmentation]]:
    """Each scan that can be read, with its segmentation; the others, and copies, are named on stderr."""
    from lvseg import records

    seen: dict[str, Path] = {}
    for path in command.progress(scans, doing):
        try:
            volume = read_scan(path, segmenter.info["task"])
            own = records.voxels_sha256(volume.canonical().voxels)
            if own in seen:
                print(f"left aside: {path} has the voxels of {seen[own]}", file=sys.stderr)
                continue
            seen[own] = path
            answer = segmenter.segment(volume, keep=True, modality=modality)
            for flag in {LIKE_CT, UNLIKE_CT}.intersection(answer.measurements["flags"]):
                print(f"{path}: {flag}", file=sys.stderr)
            yield path, volume, answer
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
    segmenter: Segmenter, scans: Sequence[Path], folder: Path, least_trust: float, modality: str | None = None
) -> tuple[list[Path], list[Path]]:
    """Writes a model's own masks, the largest part of each, of the scans on which it can be trusted.

    Args:
        scans: as `predict.read_scan` takes; folder: where cards, scans and masks go.
        least_trust: 1 less `quality.doubt`.
        modality: of all, as `Segmenter.segment`; MR where neither it nor the files say, but scans that look otherwise
            than they are said to be are left aside then.

    Returns:
        The cards of those scans, one a modality, and which they are; the others are named on stderr.
    """
    trusted: list[Path] = []
    info, modalities = segmenter.info, set()
    is_fat = info["task"] == FAT_FRACTION_TASK
    for path, volume, answer in _segmented(segmenter, scans, modality, "segmenting"):
        if modality is None and {LIKE_CT, UNLIKE_CT}.intersection(answer.measurements["flags"]):
            print(f"left aside until --modality says whether it is a CT: {path}", file=sys.stderr)
            continue
        own = quality.features(segmenter, answer)
        trust = 1.0 - quality.doubt(own, segmenter.info)
        if trust < least_trust:
            print(f"left aside, since the mask can be trusted to {trust:.2f} only: {path}", file=sys.stderr)
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


def agreement_with_itself(step: Step, volume: Samples, mirrored: bool) -> float:
    """Mean Dice of what a network in training makes of a volume and of the same at another contrast, shifted and, if
    it has seen such, mirrored; all classes as one, 0 where nothing is marked."""
    from lvseg import metrics

    slope, intercept = (volume.scale.numpy()[:, :, part, np.newaxis, np.newaxis] for part in (0, 1))
    values = (volume.stack.numpy() * slope + intercept).astype(np.float32)
    shift = max(1, round(quality.SHIFT_SHARE * values.shape[-1]))

    def mask_of(changed: Array) -> Array:
        stack = ((changed - intercept) / slope).astype(np.float32)
        return np.asarray(step.labels(volume._replace(stack=stack)) > 0)

    def moved(slices: Array, by: int) -> Array:
        return quality.shifted(slices.reshape(-1, *slices.shape[-2:]), by).reshape(slices.shape)

    own = mask_of(values)
    pairs = [
        (own, mask_of(quality.bent(values))),
        (own, moved(mask_of(moved(values, shift)), -shift)),
        *([(own, mask_of(values[..., ::-1])[..., ::-1])] if mirrored else []),
    ]
    return float(np.mean([metrics.dice(one, other) if one.any() or other.any() else 0.0 for one, other in pairs]))


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
