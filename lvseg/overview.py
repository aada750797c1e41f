"""A page that shows what preparation read: a picture a scan, its numbers, and which scans to look at first.

It is made from a shards folder alone (shards and manifest.json), so it can be made again where the scans are not at
hand: `summary.html`, one file that needs no network, and `summary.csv` with the same numbers.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from scipy import ndimage

from lvseg import command, page, workers
from lvseg.errors import InputError
from lvseg.volume import Array
from lvseg.workers import Engine

PAGE, TABLE = "summary.html", "summary.csv"
PICTURE_PX = 256  # about; small grids are enlarged by a whole factor
JPEG_QUALITY = 85
# Contours of the classes, in turn; bright against grey levels and told apart by colour-blind readers.
COLOURS = ((255, 214, 0), (0, 200, 255), (255, 90, 200), (120, 255, 80))
# What is shown black and white: the abdominal soft-tissue window of CT in HU, the whole scale of a fat fraction in
# percent, and these percentiles of the scan for everything else.
CT_WINDOW_HU, FAT_FRACTION_WINDOW, WINDOW_PERCENTILES = (-160.0, 240.0), (0.0, 100.0), (0.5, 99.5)
FATTY_LIVER_PERCENT = 5.56
# A scan is unusual where its modified z-score, 0.6745 (x - median) / MAD, is beyond 3.5 (B. Iglewicz and D. Hoaglin,
# How to Detect and Handle Outliers, ASQC 1993). Fewer scans than this have no usable median absolute deviation.
UNUSUAL_Z, MAD_TO_SD, LEAST_SCANS = 3.5, 1.4826, 8
LARGEST_PART = 0.98  # a class with less than this share in its largest connected part is worth a look
BORDER_TOLERANCE_MM = 1.0
# Findings that more than this share of the scans have say something about the protocol, not about a scan.
COMMON_SHARE = 0.5
COMMON = {
    "ends": "the mask reaches the first or the last slice, so the organ may be larger than the scan",
    "edge": "the mask reaches the edge of the network's field, which is smaller than the scan",
    "empty": "a class is missing from the mask",
    "parts": "the mask lies in separate parts",
}
# A row or column is air where less than a share of its pixels is brighter than a share of the window.
AIR_SHARE, AIR_PIXELS, PICTURE_MARGIN = 0.1, 0.04, 0.04


@dataclass(frozen=True)
class Quantity:
    """One number a scan that is compared over scans.

    Args:
        key: in the entries; name, unit: for people.
        logarithm: whether scans differ by factors rather than by amounts (volumes, spacings).
        floor: the smallest standard deviation that counts, in the unit, or as a share where `logarithm`; differences
            well below it are no news however alike the other scans are.
    """

    key: str
    name: str
    unit: str
    logarithm: bool
    floor: float
    digits: int = 0


def write(folder: Path, engine: Engine | None = None) -> Path:
    """Writes a shards folder's page and table; returns the page.

    Args:
        folder: with manifest.json; engine: where shards are read, by default one process a core.

    Raises:
        InputError: NOT_FOUND without a manifest; BAD_SHARD.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise InputError("NOT_FOUND", f"Expected prepared shards, received no manifest at {path}; prepare them first.")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    wanted = [
        (folder.absolute() / row["file"], row, manifest["made_by"], manifest["card"]) for row in manifest["volumes"]
    ]
    read = workers.each(describe, wanted, engine or Engine())
    entries = list(command.progress(read, f"looking at {manifest['card']['name']}", total=len(wanted)))
    quantities = _quantities(manifest, entries)
    for entry, reasons in zip(entries, unusual(entries, quantities, manifest["card"]["scanner"]), strict=True):
        entry["findings"] += [("unusual", reason) for reason in reasons]
    common = _common(entries)
    for entry in entries:
        own = [reason for kind, reason in entry["findings"] if kind not in common]
        entry |= {"reasons": own, "notes": [reason for kind, reason in entry["findings"] if kind in common]}
    with command.atomic(folder / PAGE) as temporary:
        temporary.write_text(_page(manifest, entries, quantities, common), encoding="utf-8")
    with command.atomic(folder / TABLE) as temporary:
        _write_table(entries, temporary)
    return folder / PAGE


def describe(what: tuple[Path, Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]) -> dict[str, Any]:
    """One scan's numbers, warnings and picture; runs in a worker.

    Args:
        what: the shard, its manifest row, and the manifest's `made_by` and `card`.

    Returns:
        JSON-able: patient, study, shape, spacings, intensities, volumes in ml (of one slice also areas in cm^2) on the
        shard's own grid, parts, fat fractions in percent, `findings` (kind and sentence), `picture` (JPEG, data URI).
    """
    import tensorflow as tf

    from lvseg import records

    path, row, made_by, card = what
    slices = records.decode(next(iter(tf.data.TFRecordDataset(str(path)))), made_by["size"])
    mask, stored = slices.mask.numpy(), slices.image.numpy()
    slope, intercept = float(slices.slope), float(slices.intercept)
    table = slices.statistics.percentiles.numpy()
    slice_mm, row_mm, column_mm = row["spacing_mm"]
    target_row_mm, target_column_mm = made_by["spacing_mm"]
    held = np.flatnonzero((mask > 0).any(axis=(1, 2)))
    is_fat_fraction = "fat_fraction" in row["metadata"]
    entry: dict[str, Any] = {
        "patient": row["patient"], "study": row["study"], "scan": ", ".join(row.get("scan", [])), "file": row["file"],
        "slices": row["shape"][0], "rows": row["shape"][1], "columns": row["shape"][2],
        "slice_mm": slice_mm, "row_mm": row_mm, "column_mm": column_mm,
        "minimum": row["minimum"], "maximum": row["maximum"],
        "p1": float(np.interp(1, np.linspace(0, 100, len(table)), table)),
        "p50": float(np.interp(50, np.linspace(0, 100, len(table)), table)),
        "p99": float(np.interp(99, np.linspace(0, 100, len(table)), table)),
        "slices_with_mask": len(held),
    }  # fmt: skip
    metadata = row["metadata"]
    findings = [
        (kind, f"{warning[0].upper()}{warning[1:].rstrip('.')}.")
        for kind, warnings in (
            ("slices", metadata.get("slice_warnings", [])),
            ("fat_fraction", metadata.get("fat_fraction", {}).get("warnings", [])),
        )
        for warning in warnings
        if warning
    ]
    pixel_cm2 = target_row_mm * target_column_mm / 100
    for label, name in enumerate(card["labels"], start=1):
        voxels, parts, share = _parts(mask == label)
        if row["shape"][0] == 1:
            entry[f"area_cm2 {name}"] = voxels * pixel_cm2
        entry |= {f"volume_ml {name}": voxels * pixel_cm2 * slice_mm / 10, f"parts {name}": parts}
        if not voxels:
            findings.append(("empty", f"The mask holds no {name}."))
        elif share < LARGEST_PART:
            reason = f"The {name} lies in {parts} separate parts, {share:.0%} of it in the largest."
            findings.append(("parts", reason))
    if is_fat_fraction:
        inside = stored[mask == 1] * np.float64(slope) + intercept
        values = np.percentile(inside, (5, 50, 95)) if inside.size else np.full(3, math.nan)
        entry |= {
            "fat_percent_mean": float(inside.mean()) if inside.size else math.nan,
            "fat_percent_p5": float(values[0]),
            "fat_percent_median": float(values[1]),
            "fat_percent_p95": float(values[2]),
        }
    findings += _cut_off(mask, row, made_by)
    middle = int(held[len(held) // 2]) if held.size else mask.shape[0] // 2
    window = _window(card, is_fat_fraction, table)
    flip = slice(None, None, -1 if made_by["axis"] != "transversal" else 1)  # the head is up
    picture = picture_jpeg(
        stored[middle][flip] * np.float64(slope) + intercept,
        mask[middle][flip],
        window,
        target_row_mm / target_column_mm,
    )
    entry["middle_slice"] = middle + 1
    entry["picture"] = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    entry["findings"] = findings
    return entry


def unusual(entries: Sequence[Mapping[str, Any]], quantities: Sequence[Quantity], scanner: str) -> list[list[str]]:
    """Why each scan is unlike the others of its scanner: a list of sentences a scan, empty where it is not.

    Args:
        entries: of one scanner; quantities: what is compared; scanner: its name, for the sentences.
    """
    reasons: list[list[str]] = [[] for _ in entries]
    for quantity in quantities:
        values = [_comparable(entry.get(quantity.key), quantity) for entry in entries]
        usable = [value for value in values if value is not None]
        if len(usable) < LEAST_SCANS:
            continue
        median = statistics.median(usable)
        spread = max(MAD_TO_SD * statistics.median(abs(value - median) for value in usable), quantity.floor)
        shown = page.number(math.exp(median) if quantity.logarithm else median, quantity.digits)
        for own, entry, value in zip(reasons, entries, values, strict=True):
            if value is not None and abs(value - median) > UNUSUAL_Z * spread:
                z, unit = (value - median) / spread, quantity.unit
                own.append(
                    f"The {quantity.name} of {page.number(entry[quantity.key], quantity.digits)} {unit} is unusual for"
                    f" {scanner}, whose median is {shown} {unit} (robust z {z:+.1f})."
                )
    return reasons


def picture_jpeg(image: Array, mask: Array, window: tuple[float, float], aspect: float = 1.0) -> bytes:
    """A slice in grey, without the air around it, with the outline of each class in its colour, as a JPEG.

    Args:
        image: real [H, W]; mask: uint8 [H, W]; window: intensities shown black and white.
        aspect: height of a pixel over its width.
    """
    low, high = window
    share = np.clip((image - low) / (high - low if high > low else 1.0), 0, 1)
    crop = _crop(share > AIR_SHARE, mask > 0)
    grey, mask = np.rint(255 * share[crop]).astype(np.uint8), mask[crop]
    factor = max(1, round(PICTURE_PX / grey.shape[1]))
    size = (grey.shape[1] * factor, max(1, round(grey.shape[0] * factor * aspect)))
    rgb = np.array(PIL.Image.fromarray(grey).resize(size, PIL.Image.Resampling.BILINEAR).convert("RGB"))
    large = np.array(PIL.Image.fromarray(mask).resize(size, PIL.Image.Resampling.NEAREST))
    for label in range(1, int(mask.max()) + 1):
        organ = large == label
        rgb[organ & ~ndimage.binary_erosion(organ, border_value=1)] = COLOURS[(label - 1) % len(COLOURS)]
    stream = io.BytesIO()
    PIL.Image.fromarray(rgb).save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return stream.getvalue()


def _crop(bright: Array, organ: Array) -> tuple[slice, slice]:
    """A square around what is not air, with a margin; within the picture, so it may be a smaller one at its edges."""
    where = [
        np.flatnonzero((bright.mean(axis=1 - axis) > AIR_PIXELS) | organ.any(axis=1 - axis)) for axis in (0, 1)
    ]  # fmt: skip
    if not all(indices.size for indices in where):
        return np.s_[:], np.s_[:]
    side = (1 + 2 * PICTURE_MARGIN) * max(indices[-1] - indices[0] + 1 for indices in where)
    middles = [(indices[0] + indices[-1] + 1) / 2 for indices in where]
    rows, columns = (
        slice(max(0, math.floor(middle - side / 2)), min(count, math.ceil(middle + side / 2)))
        for middle, count in zip(middles, bright.shape, strict=True)
    )
    return rows, columns


def _parts(organ: Array) -> tuple[int, int, float]:
    """Voxels of an organ, its face-connected parts, and the largest part's share."""
    box = ndimage.find_objects(organ.astype(np.uint8))
    if not box:
        return 0, 0, 1.0
    numbered, parts = ndimage.label(organ[box[0]])
    sizes = np.bincount(numbered.ravel())[1:]
    return int(sizes.sum()), int(parts), float(sizes.max() / sizes.sum())


def _cut_off(mask: Array, row: Mapping[str, Any], made_by: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Findings about masks that end where the scan or the network's field of view ends."""
    findings = []
    if mask.shape[0] > 1:
        ends = [name for name, index in (("first", 0), ("last", -1)) if mask[index].any()]
        if ends:
            reason = f"The mask reaches the {' and the '.join(ends)} slice: the organ may go on outside the scan."
            findings.append(("ends", reason))
    sides = (("high", mask[:, [0, -1], :].any()), ("wide", mask[:, :, [0, -1]].any()))
    for axis, (name, reached) in enumerate(sides, start=1):
        scan_mm, field_mm = (
            row["shape"][axis] * row["spacing_mm"][axis],
            made_by["size"] * made_by["spacing_mm"][axis - 1],
        )
        if reached and scan_mm > field_mm + BORDER_TOLERANCE_MM:
            reason = (
                f"The mask reaches the edge of the network's field: the scan is {scan_mm:.0f} mm {name}, the field"
                f" {field_mm:.0f} mm (data.size x data.spacing_mm)."
            )
            findings.append(("edge", reason))
    return findings


def _common(entries: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The kinds of findings that most of the scans have, and how many do."""
    counts = {kind: sum(any(own == kind for own, _ in entry["findings"]) for entry in entries) for kind in COMMON}
    return {kind: count for kind, count in counts.items() if len(entries) > 1 and count > COMMON_SHARE * len(entries)}


def _window(card: Mapping[str, Any], is_fat_fraction: bool, table: Array) -> tuple[float, float]:
    if is_fat_fraction:
        return FAT_FRACTION_WINDOW
    if card["modality"] == "CT":
        return CT_WINDOW_HU
    low, high = np.interp(WINDOW_PERCENTILES, np.linspace(0, 100, len(table)), table)
    return float(low), float(high)


def _measure(entries: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    """What a class is measured by: key, name and unit of the area where every scan is one slice, else of the volume."""
    if entries and all(entry["slices"] == 1 for entry in entries):
        return "area_cm2", "area", "cm\u00b2"
    return "volume_ml", "volume", "ml"


def _quantities(manifest: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> list[Quantity]:
    """What is compared over the scans of this folder."""
    labels, modality = list(manifest["card"]["labels"]), manifest["card"]["modality"]
    key, measure, unit = _measure(entries)
    chosen = [
        Quantity(f"{key} {name}", f"{name} {measure}", unit, True, 0.02, int(key == "area_cm2")) for name in labels
    ]
    if any("fat_percent_mean" in entry for entry in entries):
        chosen.append(Quantity("fat_percent_mean", f"mean fat fraction of the {labels[0]}", "%", True, 0.1, 2))
        scale, floor = "%", 1.0
    elif modality == "CT":
        scale, floor = "HU", 15.0
    else:
        scale, floor = "", 0.02 * statistics.median([abs(entry["p99"]) for entry in entries] or [0.0])
    chosen += [
        Quantity("slices", "number of slices", "slices", False, 1.0),
        Quantity("slices_with_mask", "number of slices with a mask", "slices", False, 1.0),
        Quantity("slice_mm", "slice distance", "mm", True, 0.01, 2),
        Quantity("row_mm", "row spacing", "mm", True, 0.01, 3),
        Quantity("column_mm", "column spacing", "mm", True, 0.01, 3),
        Quantity("p50", "median intensity", scale, False, floor, 1),
        Quantity("p99", "99th percentile of the intensity", scale, False, floor, 1),
    ]
    if modality != "CT":  # what a CT stores outside its round field differs from one reconstruction to the next
        chosen.append(Quantity("minimum", "lowest intensity", scale, False, floor, 1))
    return chosen


def _comparable(value: Any, quantity: Quantity) -> float | None:
    if value is None or not math.isfinite(value) or (quantity.logarithm and value <= 0):
        return None
    return math.log(value) if quantity.logarithm else float(value)


def _page(
    manifest: Mapping[str, Any],
    entries: Sequence[dict[str, Any]],
    quantities: Sequence[Quantity],
    common: Mapping[str, int],
) -> str:
    labels = list(manifest["card"]["labels"])
    patients = {entry["patient"] for entry in entries}
    means = [entry.get("fat_percent_mean", math.nan) for entry in entries]
    fat_percent = [mean for mean in means if math.isfinite(mean)]  # an empty mask has none
    return page.template("overview.html").render(
        card=manifest["card"],
        made_by=manifest["made_by"],
        versions=manifest["versions"],
        unlabelled=manifest["unlabelled"],
        entries=entries,
        patients=len(patients),
        labels=labels,
        measure=_measure(entries),
        colours=[f"rgb{COLOURS[number % len(COLOURS)]}" for number in range(len(labels))],
        is_fat_fraction=any("fat_percent_mean" in entry for entry in entries),
        fatty=sum(mean > FATTY_LIVER_PERCENT for mean in fat_percent),
        fat_measured=len(fat_percent),
        fatty_liver_percent=FATTY_LIVER_PERCENT,
        flagged=sorted((entry for entry in entries if entry["reasons"]), key=lambda entry: -len(entry["reasons"])),
        common=[(count, COMMON[kind]) for kind, count in common.items()],
        plots=[_plot(entries, quantity) for quantity in quantities],
        least_scans=LEAST_SCANS,
        unusual_z=UNUSUAL_Z,
    )


def _plot(entries: Sequence[Mapping[str, Any]], quantity: Quantity) -> dict[str, Any]:
    """Median, quartiles and range of a quantity, and where its dots lie between 0 and 1."""
    known = [entry for entry in entries if _comparable(entry.get(quantity.key), quantity) is not None]
    values = np.array([entry[quantity.key] for entry in known], np.float64)
    if not values.size:
        return {"quantity": quantity, "scans": 0, "dots": []}
    low, high = float(values.min()), float(values.max())
    width = high - low if high > low else 1.0
    middle = 0.5 if high == low else 0.0
    quartiles = np.percentile(values, (25, 50, 75))
    return {
        "quantity": quantity,
        "scans": len(known),
        "low": low,
        "high": high,
        "quartiles": [float(value) for value in quartiles],
        "box": [float((value - low) / width) + middle for value in quartiles],
        "dots": [
            {
                "x": (entry[quantity.key] - low) / width + middle,
                "y": (number * 0.618034) % 1.0,  # spread evenly by the golden ratio, the same on every making
                "who": f"{entry['patient']}, study {entry['study']}",
                "value": entry[quantity.key],
                "flagged": any(quantity.name in reason for reason in entry["reasons"]),
            }
            for number, entry in enumerate(known)
        ],
    }


def _write_table(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    left_out = ("picture", "findings", "reasons", "notes")
    names = list(dict.fromkeys(name for entry in entries for name in entry if name not in left_out))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*(name.replace(" ", "_") for name in names), "reasons", "notes"])
        for entry in entries:
            numbers = [f"{value:.6g}" if isinstance(value, float) else value for value in map(entry.get, names)]
            table.writerow([*numbers, " ".join(entry["reasons"]), " ".join(entry["notes"])])
