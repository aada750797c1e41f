"""How a model's Dice holds when a scan is changed: gamma, offset and scale, noise, slice distance, cuts of the slab.

    python experiments/robustness.py --model models/volume --card data/phantom_siemens_volume.yaml

Writes robustness.csv, a row a scan and change, with the Dice of the mask as it is and of its largest component, and
robustness.svg and .png with the mean curves, into --out. Prints the mean Dice with its 95 % interval over patients, and
that of the largest component.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from lvseg import agreement, command, figures, metrics
from lvseg.cards import read_image, read_labels
from lvseg.errors import InputError
from lvseg.postprocess import postprocess
from lvseg.study import open_model
from lvseg.volume import Array, Volume

Change = Callable[[Array, Array, float, tuple[float, float, float], np.random.Generator], tuple[Array, Array, float]]


def _range(image: Array) -> tuple[float, float]:
    return float(image.min()), float(np.percentile(image, 99.5))


def gamma(image: Array, mask: Array, value: float, spacing: tuple[float, float, float], random: np.random.Generator):
    """Intensities between darkest and brightest to a power."""
    low, high = _range(image)
    return low + (high - low) * np.clip((image - low) / (high - low), 0, None) ** value, mask, spacing[0]


def offset(image: Array, mask: Array, value: float, spacing: tuple[float, float, float], random: np.random.Generator):
    """Shares of the range added to every voxel."""
    low, high = _range(image)
    return image + value * (high - low), mask, spacing[0]


def scale(image: Array, mask: Array, value: float, spacing: tuple[float, float, float], random: np.random.Generator):
    """Intensities times a factor."""
    return image * value, mask, spacing[0]


def noise(image: Array, mask: Array, value: float, spacing: tuple[float, float, float], random: np.random.Generator):
    """Rician noise of a standard deviation in percent of the range."""
    low, high = _range(image)
    real, imaginary = (value / 100 * (high - low) * random.standard_normal(image.shape) for _ in range(2))
    return low + np.hypot(image - low + real, imaginary), mask, spacing[0]


def slice_mm(image: Array, mask: Array, value: float, spacing: tuple[float, float, float], random: np.random.Generator):
    """Slices as far apart, and as thick, as so many mm, the first where it was; liver is where most of a slice is."""
    own = np.arange(len(image)) * spacing[0]
    away = np.abs(own - np.arange(0, own[-1] + 1e-6, value)[:, None])
    if value < spacing[0]:
        reach = np.clip(1 - away / spacing[0], 0, None)  # between two slices
    else:
        reach = np.clip((value + spacing[0]) / 2 - away, 0, spacing[0])  # how much of each slice lies in the new one
    weights = reach / reach.sum(axis=1, keepdims=True)
    covered = np.einsum("sk,kij->sij", weights, mask > 0)
    return np.einsum("sk,kij->sij", weights, image), (covered >= 0.5).astype(np.uint8), value


def slab(image: Array, mask: Array, value: float, spacing: tuple[float, float, float], random: np.random.Generator):
    """A share of the liver's slices alone, anywhere in it."""
    liver = np.flatnonzero(mask.any(axis=(1, 2)))
    count = max(1, round(value * len(liver)))
    first = int(random.integers(liver[0], liver[-1] - count + 2))
    part = slice(0, len(image)) if value >= 1 else slice(first, first + count)
    return image[part], mask[part], spacing[0]


CHANGES: Mapping[str, tuple[Change, tuple[float, ...]]] = {
    "gamma": (gamma, (0.4, 0.5, 0.63, 0.8, 1.0, 1.25, 1.6, 2.0, 2.5)),
    "intensity offset (share of the range)": (offset, (-0.5, 0.0, 0.5, 1.0)),
    "intensity scale": (scale, (0.1, 1.0, 10.0)),
    "noise (% of the range)": (noise, (0.0, 2.5, 5.0, 10.0, 15.0)),
    "slice distance (mm)": (slice_mm, (2.0, 3.0, 5.0, 8.0, 12.0)),
    "share of the liver's slices": (slab, (0.15, 0.3, 0.5, 0.75, 1.0)),
}


def changed(image: Volume, truth: Volume, name: str, value: float, seed: int) -> tuple[Volume, Volume]:
    """A scan and its truth, canonical, after a change of this name and value."""
    scan, mask = image.canonical(), truth.canonical()
    random = np.random.default_rng([seed, list(CHANGES).index(name)])
    voxels, labels, distance = CHANGES[name][0](
        scan.voxels.astype(np.float32), mask.voxels, value, scan.spacing_mm, random
    )
    affine = scan.affine.copy()
    affine[:3, 0] *= distance / scan.spacing_mm[0]
    return Volume(voxels.astype(np.float32), affine, metadata=scan.metadata), Volume(labels, affine)


def measure(model: Path, cards: Sequence[Path], scans: int, out: Path) -> list[dict[str, object]]:
    """Writes and returns a row a scan and change.

    Raises:
        InputError: as `open_model` and `Study.check_scan`; NO_PATIENTS.
    """
    out.mkdir(parents=True, exist_ok=True)
    study, rows = open_model(model, cards), []
    names = dict.fromkeys(scan.card.name for scan in study.scans)
    chosen = [scan for name in names for scan in [scan for scan in study.scans if scan.card.name == name][:scans]]
    for seed, scan in enumerate(command.progress(chosen, "measuring")):
        image = read_image(scan)
        study.check_scan(scan, image)
        truth = read_labels(scan, image)
        truth = truth.with_voxels((truth.voxels == 1).astype(np.uint8))  # the first class is what is measured
        if not truth.voxels.any():
            print(f"left aside: {scan.patient} has no liver", file=sys.stderr)
            continue
        for name, (_, values) in CHANGES.items():
            for value in values:
                own, true = changed(image, truth, name, value, seed)
                mask = study.segmenter.segment(own, postprocessing=[], modality=scan.card.modality).mask.voxels
                row = {"patient": scan.patient, "change": name, "value": value, "dice": metrics.dice(mask, true.voxels)}
                largest = postprocess(mask, ["largest_component"])
                rows.append(row | {"dice_largest_component": metrics.dice(largest, true.voxels)})
    if not rows:
        raise InputError("NO_PATIENTS", f"Expected scans with a liver in {', '.join(map(str, cards))}, received none.")
    with command.atomic(out / "robustness.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return rows


def draw(rows: Sequence[Mapping[str, object]], out: Path) -> None:
    """The mean curves, one panel a change."""
    figure, axes = plt.subplots(2, 3, figsize=(10, 6), layout="constrained", sharey=True)
    for panel, (name, (_, values)) in zip(axes.flat, CHANGES.items(), strict=True):
        for key, style, label in (("dice", "-o", "as it is"), ("dice_largest_component", "--s", "largest component")):
            means = [
                np.mean([row[key] for row in rows if row["change"] == name and row["value"] == value])
                for value in values
            ]
            panel.plot(values, means, style, label=label, markersize=4)
        if name in ("gamma", "intensity scale"):
            panel.set_xscale("log")
            panel.set_xticks(values, [f"{value:g}" for value in values], fontsize=7)
            panel.minorticks_off()
        panel.set_xlabel(name)
        panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel("mean Dice")
    axes[1, 0].set_ylabel("mean Dice")
    axes[0, 0].legend(fontsize=8)
    figures.save(figure, out / "robustness")
    plt.close(figure)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="robustness", description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--card", type=Path, nargs="+", required=True)
    parser.add_argument("--scans", type=int, default=10, help="of each card (default: %(default)s)")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/robustness"))

    def body(arguments: argparse.Namespace) -> None:
        if arguments.scans < 1:
            raise InputError("BAD_ARGUMENT", f"Expected --scans of 1 or more, received {arguments.scans}.")
        rows = measure(arguments.model, arguments.card, arguments.scans, arguments.out)
        draw(rows, arguments.out)
        for name, (_, values) in CHANGES.items():
            for value in values:
                own = [row for row in rows if row["change"] == name and row["value"] == value]
                patients = agreement.Bootstrap([str(row["patient"]) for row in own])
                mean = agreement.average([float(str(row["dice"])) for row in own], patients, 0.0, 1.0)
                bounds = mean["intervals"]["mean"]  # none of fewer than five patients
                interval = "no interval" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"
                largest = np.mean([row["dice_largest_component"] for row in own])
                print(f"{name:<40}{value:>8g}{mean['mean']:>8.3f} ({interval}){largest:>8.3f}")

    return command.run(parser, body, None)


if __name__ == "__main__":
    sys.exit(main())
