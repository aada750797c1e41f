"""Command: a run's model on the scans of its held-out patients -> Dice and liver volume, on each scan's own grid.

python -m lvseg.evaluate --run runs/volume/best-fold0 --split test
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvseg import biomarkers, command, figures, metrics
from lvseg.cards import Scan, read_image, read_labels
from lvseg.config import load_experiment
from lvseg.errors import InputError
from lvseg.keys import read_yaml
from lvseg.predict import Segmenter
from lvseg.prepare import dataset_scans
from lvseg.volume import Volume

SPLITS = ("validation", "test")


def evaluate_run(run: Path, split: str) -> dict[str, Any]:
    """Segments a run's validation or test patients and writes its report folder; returns the summary.

    Writes `report/patients.csv` (a row a scan), `report/summary.json`, and `report/overlay_<scanner>.png` of the scan
    with the median Dice of each scanner. Dice is of the first class of the card.

    Raises:
        InputError: NOT_FOUND if the run has no model.
    """
    experiment = load_experiment(run / "config.yaml")
    manifest = run / "manifest.json"
    if not (run / "model" / "model.json").is_file() or not manifest.is_file():
        raise InputError("NOT_FOUND", f"Expected a trained run, received {run} without its model; train it first.")
    made = read_yaml(manifest)
    patients = set(made["split"][split])
    scans = [scan for scan in dataset_scans(experiment.data) if scan.patient in patients]
    if not scans:
        raise InputError("NOT_FOUND", f"Expected scans of {split} patients, received none in the split of {manifest}.")
    segmenter = Segmenter(run / "model")

    rows = [_row(scan, segmenter) for scan in command.progress(scans, f"evaluating {split}")]
    summary = {"split": split, "encoder_weights": made.get("encoder_weights"), **summarise(rows)}
    summary["by_scanner"] = {
        scanner: summarise([row for row in rows if row["scanner"] == scanner])
        for scanner in sorted({row["scanner"] for row in rows})
    }
    with command.atomic(run / "report") as report:
        report.mkdir()
        (report / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        with (report / "patients.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        for scanner in summary["by_scanner"]:
            _overlay(scans, rows, scanner, segmenter, report / f"overlay_{scanner}.png")
    return summary


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Dice and agreement of volumes over scans; bias and limits are predicted minus true, in ml."""
    dice = np.array([row["dice"] for row in rows])
    return {
        "patients": len({row["patient"] for row in rows}),
        "scans": len(rows),
        "dice": {"mean": float(dice.mean()), "median": float(np.median(dice)), "minimum": float(dice.min())},
        "volume_ml": biomarkers.agreement(
            [row["predicted_volume_ml"] for row in rows], [row["true_volume_ml"] for row in rows]
        ),
    }


def _row(scan: Scan, segmenter: Segmenter) -> dict[str, Any]:
    predicted, true = _answer(scan, segmenter)
    predicted_ml, true_ml = biomarkers.volume_ml(predicted), biomarkers.volume_ml(true)
    return {
        "patient": scan.patient,
        "study": scan.study,
        "scanner": scan.card.scanner,
        "dice": metrics.dice(predicted.voxels, true.voxels),
        "predicted_volume_ml": round(predicted_ml, 3),
        "true_volume_ml": round(true_ml, 3),
        "volume_error_percent": round(100 * (predicted_ml - true_ml) / true_ml, 3) if true_ml else None,
        "flags": "; ".join(f"touches {edge}" for edge in biomarkers.touches_edge(predicted)),
    }


def _answer(scan: Scan, segmenter: Segmenter) -> tuple[Volume, Volume]:
    """The model's mask and the true one on the scan's canonical grid, both with 1 for the card's first class."""
    image = read_image(scan)
    mask, true = segmenter.segment(image).mask.canonical(), read_labels(scan, image).canonical()
    return mask.with_voxels((mask.voxels == 1).astype(np.uint8)), mask.with_voxels((true.voxels == 1).astype(np.uint8))


def _overlay(
    scans: Sequence[Scan], rows: Sequence[dict[str, Any]], scanner: str, segmenter: Segmenter, path: Path
) -> None:
    chosen = sorted((row["dice"], index) for index, row in enumerate(rows) if row["scanner"] == scanner)
    dice, index = chosen[len(chosen) // 2]
    predicted, true = _answer(scans[index], segmenter)
    title = f"{rows[index]['patient']}, {scanner}: Dice {dice:.3f} (the median of {len(chosen)})"
    figures.overlay_figure(read_image(scans[index]).canonical(), predicted, true, path, title)


def print_summary(summary: dict[str, Any]) -> None:
    """Prints a summary as a table, a line a scanner."""
    print(f"{'scanner':<20}{'patients':>9}{'Dice':>8}{'lowest':>8}{'volume bias ml':>16}{'error %':>9}")
    for name, part in [*summary["by_scanner"].items(), ("all", summary)]:
        volume = part["volume_ml"]
        percent = volume["mean_absolute_error_percent"]
        print(
            f"{name:<20}{part['patients']:>9}{part['dice']['mean']:>8.3f}{part['dice']['minimum']:>8.3f}"
            f"{volume['bias']:>16.1f}{'-' if percent is None else f'{percent:.2f}':>9}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="lvseg.evaluate",
        description="Measures a run's model on patients it was not trained on and writes the run's report folder.",
        epilog="Example: python -m lvseg.evaluate --run runs/volume/best-fold0 --split test",
    )
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--split", choices=SPLITS, default="test", help="which patients (default: test)")

    def body(arguments: argparse.Namespace) -> None:
        print_summary(evaluate_run(arguments.run, arguments.split))
        print(f"report: {arguments.run / 'report'}")

    return command.run(parser, body, argv)


if __name__ == "__main__":
    sys.exit(main())
