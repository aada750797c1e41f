"""How well the expected Dice tells which scans to check: a trained run's test patients, some of them made worse.

python benchmarks/quality.py --run runs/volume/demo-fold0

The run's calibration is fitted on its validation patients (once; lvseg.evaluate does the same). Every test scan is
looked at as it is and once with every kind of `lvseg.degrade`, at other strengths and other random numbers than in the
calibration. Printed: Spearman's correlation of expected and true Dice, the error of the expected Dice, and what
checking the worst fifth by the list finds of the scans below a Dice of 0.9 in sets where these are at most 15 % (means
over 2,000 sets, each of all good scans and as many bad ones, drawn at random, as 15 % allow).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
from scipy import stats

from lvseg import command, evaluate, quality
from lvseg.cards import read_image, read_labels
from lvseg.degrade import KINDS
from lvseg.study import open_study

BAD_DICE, BAD_SHARE, CHECKED, SETS = 0.9, 0.15, 0.2, 2000
SEED = 7919  # far from those of the calibration


def measure(run: Path) -> list[dict[str, object]]:
    """A row a version of a test scan: patient, scanner, kind, Dice, expected Dice, reasons."""
    study = open_study(run, "test")
    calibration = evaluate.calibrate(study, evaluate.Options())
    if calibration is None:
        raise SystemExit("Expected enough validation scans for a calibration, received too few.")
    rows: list[dict[str, object]] = []
    for number, scan in enumerate(command.progress(study.scans, "looking at test scans")):
        image = read_image(scan)
        for worse, truth, kind in evaluate.versions(image, read_labels(scan, image), KINDS, SEED + number):
            answer = study.segmenter.segment(worse, keep=True, modality=scan.card.modality)
            expected, reasons = quality.expected(calibration, quality.features(study.segmenter, answer))
            dice = evaluate.mean_dice(answer.mask, truth, len(study.classes))
            rows.append({"patient": scan.patient, "scanner": scan.card.scanner, "kind": kind or "original",
                         "dice": dice, "expected_dice": expected, "reasons": reasons})  # fmt: skip
    return rows


def found_share(dice: np.ndarray, expected: np.ndarray, seed: int = 0) -> float:
    """Of the bad scans, the share among the checked ones; the mean over random sets with few bad ones."""
    random = np.random.default_rng(seed)
    good, bad = np.flatnonzero(dice >= BAD_DICE), np.flatnonzero(dice < BAD_DICE)
    count = min(len(bad), math.floor(BAD_SHARE / (1 - BAD_SHARE) * len(good)))
    if not count:
        return math.nan
    shares = []
    for _ in range(SETS):
        drawn = np.concatenate([good, random.choice(bad, count, replace=False)])
        order = drawn[np.argsort(expected[drawn], kind="stable")]
        checked = order[: math.ceil(CHECKED * len(order))]
        shares.append(np.isin(checked, bad).sum() / count)
    return float(np.mean(shares))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    rows = measure(arguments.run)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))
    dice, expected = (np.array([row[key] for row in rows], float) for key in ("dice", "expected_dice"))
    print(f"{'kind':<12}{'scans':>6}{'mean Dice':>11}{'lowest':>8}{'mean expected':>15}")
    for kind in dict.fromkeys(str(row["kind"]) for row in rows):
        own = np.array([row["kind"] == kind for row in rows])
        print(f"{kind:<12}{own.sum():>6}{dice[own].mean():>11.3f}{dice[own].min():>8.3f}{expected[own].mean():>15.3f}")
    print(f"\nscans {len(rows)}, below a Dice of {BAD_DICE}: {(dice < BAD_DICE).sum()}")
    print(f"Spearman's correlation of expected and true Dice: {stats.spearmanr(expected, dice).statistic:.3f}")
    print(f"mean absolute error of the expected Dice: {np.abs(expected - dice).mean():.3f}")
    print(
        f"checking the worst fifth finds {100 * found_share(dice, expected):.0f} % of the bad scans (15 % of the set)"
    )


if __name__ == "__main__":
    main()
