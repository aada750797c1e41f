"""Command: a model on the scans of patients it has not seen -> overlap, biomarkers and agreement, with a report.

python -m lvseg.evaluate --run runs/volume/best-fold0 --split test
python -m lvseg.evaluate --model models/volume --card data/my_study.yaml -o my_study
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from lvseg import agreement, biomarkers, command, figures, metrics, overlays, quality, report, waterfat
from lvseg.cards import read_image, read_labels
from lvseg.degrade import KINDS, degrade
from lvseg.errors import InputError
from lvseg.keys import read_json
from lvseg.postprocess import STEPS
from lvseg.predict import Segmenter
from lvseg.split import made_of, sources_of
from lvseg.study import EXTERNAL, SPLITS, Study, open_model, open_study, split_scans
from lvseg.surfaces import TOLERANCES_MM, surface_distances
from lvseg.volume import Array, Volume

REPORT = "report"
CALIBRATION_KINDS = 3
CALIBRATION_SCANS = 20  # more take minutes and tell nothing new
PROVENANCE = (
    "config_sha256", "shards_sha256", "split_sha256", "code_sha256", "encoder_weights", "started_from", "seed",
    "versions", "hardware", "started", "corrected",
)  # fmt: skip
OVERLAP = ("dice", "precision", "recall")
DISTANCES = ("hausdorff_95_mm", "mean_surface_distance_mm")


@dataclass(frozen=True)
class Options:
    """How an evaluation is done.

    Args:
        tolerances_mm: of the surface Dice; grades_percent: mean fat fractions at which steatosis grades begin, besides
            5.56 %.
        postprocessing: steps, None for what the model's card says; quality: whether to expect a Dice of every scan.
        seed: of the bootstrap; palette: of `overlays.PALETTES`.
    """

    tolerances_mm: Sequence[float] = TOLERANCES_MM
    grades_percent: Sequence[float] = (biomarkers.STEATOSIS_PERCENT,)
    postprocessing: Sequence[str] | None = None
    quality: bool = True
    seed: int = 0
    palette: str = "report"

    @property
    def thresholds_percent(self) -> list[float]:
        """At which steatosis grades begin, ascending."""
        return sorted({biomarkers.STEATOSIS_PERCENT, *self.grades_percent})


def evaluate_run(
    run: Path,
    split: str,
    options: Options | None = None,
    model: Path | None = None,
    out: Path | None = None,
    cards: Sequence[Path] = (),
) -> dict[str, Any]:
    """Segments a run's validation or test patients, or those of other datasets, and writes a report folder; returns the
    summary.

    Writes `patients.csv` (a row a scan and class), `summary.json`, `report.html`, charts, and overlays of the worst,
    the median and the best scan of each scanner, into the run's `report`. Memory does not grow with the number of
    scans beyond their rows.

    Args:
        run: folder; split: of `SPLITS`; options: None for the defaults.
        model: another model than the run's, such as an ensemble, with the expected Dice only where its model.json has
            the calibration, since members may have been trained on the validation patients.
        out: another folder than the run's own.
        cards: of other datasets, whose patients are measured instead of the run's.

    Raises:
        InputError: see `open_study`; BAD_OUTPUT for a folder of other files, which is left as it is.
    """
    options, folder = options or Options(), out or run / REPORT
    _check_output(folder, run if model is None and not cards else None)
    study = open_study(run, split, model, cards)
    calibration = (
        calibrate(study, options) if options.quality and model is None else _calibration_of(study.segmenter, options)
    )
    return _evaluate(study, options, calibration, folder)


def evaluate_model(model: Path, cards: Sequence[Path], out: Path, options: Options | None = None) -> dict[str, Any]:
    """Segments all patients of datasets that a model has not seen, whose run need not be there, and writes a report
    folder as `evaluate_run` does; returns the summary.

    Args:
        model: as `Segmenter`; cards: of the datasets; out: the folder; options: None for the defaults.

    Raises:
        InputError: see `open_model`; BAD_OUTPUT for a folder of other files, which is left as it is.
    """
    options = options or Options()
    _check_output(out, None)
    study = open_model(model, cards)
    return _evaluate(study, options, _calibration_of(study.segmenter, options), out)


def _calibration_of(segmenter: Segmenter, options: Options) -> dict[str, Any] | None:
    """The calibration that came with a model, where it is wanted and of the same postprocessing."""
    chosen, own = (list(quality.steps(each, segmenter.info)) for each in (options.postprocessing, None))
    return segmenter.info.get("quality") if options.quality and chosen == own else None


def _evaluate(study: Study, options: Options, calibration: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    with command.atomic(folder) as temporary:
        (temporary / "pictures").mkdir(parents=True)
        with (temporary / "patients.csv").open("w", newline="", encoding="utf-8") as file:
            for own in command.progress(
                _measured(study, options, calibration, temporary / "pictures"),
                f"evaluating {study.split}",
                len(study.scans),
            ):
                if not rows:
                    table = csv.DictWriter(file, list(own[0]))
                    table.writeheader()
                table.writerows(own)
                file.flush()
                rows += own
        summary = _summary(study, options, rows, calibration)
        (temporary / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False), encoding="utf-8")
        _draw(study, rows, summary, options, temporary)
        report.write(temporary, summary, rows, _provenance(study))
    return summary


def _check_output(out: Path, run: Path | None) -> None:
    """InputError BAD_OUTPUT for anything that writing a report would destroy, such as the own report of a run.

    Args:
        run: whose own report may be written, as its model is measured on its patients.
    """
    mine = {report.PAGE, "patients.csv", "summary.json", "pictures"}
    place = out.resolve()
    is_own = run is not None and place == (run / REPORT).resolve()
    if place.name == REPORT and (place.parent / "manifest.json").is_file() and not is_own:
        raise InputError("BAD_OUTPUT", f"Expected another folder than {out}, which is of the run's own model.")
    if not out.name or out.name == ".." or out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError("BAD_OUTPUT", f"Expected a folder for the report or nothing yet, received {out}.")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    others = sorted(name for name in names - mine if not name.endswith((".png", ".svg")))
    if names and (others or not (is_own or mine <= names)):
        what = f"{others[0]} in it" if others else "no report"
        raise InputError(
            "BAD_OUTPUT",
            f"Expected a new folder, or an earlier report, which is replaced, received {out} with {what}.",
        )


def _measured(
    study: Study, options: Options, calibration: dict[str, Any] | None, pictures: Path
) -> Iterator[list[dict[str, Any]]]:
    """Of each scan its rows, one a class; draws its picture."""
    for number, scan in enumerate(study.scans):
        image = read_image(scan)
        study.check_scan(scan, image)
        answer = study.segmenter.segment(
            image, postprocessing=options.postprocessing, keep=calibration is not None, modality=scan.card.modality
        )
        true = read_labels(scan, image)
        review: dict[str, Any] = {}
        if calibration is not None:
            value, reasons = quality.expected(calibration, quality.features(study.segmenter, answer))
            review = {"expected_dice": round(value, 4), "check": "; ".join(reasons)}
        name = f"{number:04d}_{scan.patient}_{scan.study}.jpg".replace("/", "_")
        overlays.strip(image, answer.mask, true, pictures / name, overlays.PALETTES[options.palette])
        rows = []
        for label, organ in enumerate(study.classes, start=1):
            mask, truth = answer.mask.canonical(), true.canonical()
            rows.append(
                {
                    "patient": scan.patient,
                    "study": scan.study,
                    "scanner": scan.card.scanner,
                    "dataset": scan.card.name,
                    "class": organ,
                    **overlap_row(mask.voxels == label, truth.voxels == label, mask.spacing_mm, options.tolerances_mm),
                    **_biomarker_row(image, answer.mask, true, label, options.thresholds_percent, study.has_fat),
                    **review,
                    "flags": "; ".join(flag.replace(";", ",") for flag in answer.measurements["flags"]),
                    "picture": f"pictures/{name}",
                }
            )
        yield rows


def overlap_row(
    predicted: Array, true: Array, spacing_mm: Sequence[float], tolerances_mm: Sequence[float]
) -> dict[str, Any]:
    """Overlap and surface distances of one class.

    Args:
        predicted, true: bool [S, H, W]; spacing_mm: (slice, row, column); tolerances_mm: of the surface Dice.

    Returns:
        dice, precision, recall (`metrics.Overlap`), voxel_error_percent (the share of the scan's voxels that are
        wrong: the mean absolute error a voxel), and those of `surfaces.surface_distances`.
    """
    counts = metrics.overlap_counts(predicted, true)
    wrong = counts.false_positive + counts.false_negative
    return {
        "dice": counts.dice,
        "precision": counts.precision,
        "recall": counts.recall,
        "voxel_error_percent": 100 * wrong / predicted.size,
        **surface_distances(predicted, true, spacing_mm, tolerances_mm),
    }


def _biomarker_row(
    image: Volume, mask: Volume, truth: Volume, label: int, grades_percent: Sequence[float], has_fat: bool
) -> dict[str, Any]:
    """Volumes and, in images of fat fractions, fat, predicted and true; of other images None if `has_fat`."""
    row: dict[str, Any] = {}
    for name, volume in (("predicted", mask), ("true", truth)):
        row[f"{name}_voxels"] = int(np.count_nonzero(volume.voxels == label))
        row[f"{name}_volume_ml"] = round(biomarkers.volume_ml(volume, label), 3)
    true_ml = row["true_volume_ml"]
    row["volume_error_percent"] = round(100 * (row["predicted_volume_ml"] - true_ml) / true_ml, 3) if true_ml else None
    if has_fat:
        is_fat = image.metadata.get("units") == "percent"
        for name, volume in (("predicted", mask), ("true", truth)):
            fat = (
                waterfat.fat_fraction_percent(image, volume, label)
                if is_fat
                else dict.fromkeys(("mean", "median", "sd"), None)
            )
            row |= {f"{name}_fat_{key}_percent": value for key, value in fat.items()}
            mean = fat["mean"]
            row[f"{name}_steatosis_grade"] = None if mean is None else biomarkers.steatosis_grade(mean, grades_percent)
    edges = {name: biomarkers.touches_edge(volume, label) for name, volume in (("predicted", mask), ("true", truth))}
    row["incomplete"] = "; ".join(edges["predicted"])  # the number is kept, but part of the organ may lie outside
    row["true_incomplete"] = "; ".join(edges["true"])
    return row


def summarise(rows: Sequence[dict[str, Any]], options: Options | None = None) -> dict[str, Any]:
    """Overlap and agreement of one class over scans, with 95 % intervals (`agreement`)."""
    options = options or Options()
    patients = [row["patient"] for row in rows]
    bootstrap = agreement.Bootstrap(patients, options.seed)
    shares = [*OVERLAP, *(f"surface_dice_{tolerance:g}mm" for tolerance in options.tolerances_mm)]
    summary: dict[str, Any] = {"patients": bootstrap.patients, "scans": len(rows)}
    for name in (*shares, *DISTANCES, "voxel_error_percent"):
        known = [(row[name], row["patient"]) for row in rows if row[name] is not None]
        if not known:
            summary[name] = None
            continue
        values, names = zip(*known, strict=True)
        own = bootstrap if len(known) == len(rows) else agreement.Bootstrap(names, options.seed)
        summary[name] = {
            "scans": len(known), **agreement.average(values, own, 0, 1 if name in shares else np.inf),
        }  # fmt: skip
    for name in ("volume_ml", "voxels"):
        predicted, true = ([row[f"{kind}_{name}"] for row in rows] for kind in ("predicted", "true"))
        summary[name] = agreement.agreement(predicted, true, patients, options.seed)
    summary["incomplete"] = sum(bool(row["incomplete"]) for row in rows)
    if "true_fat_mean_percent" in rows[0]:
        summary |= _fat(rows, options)
    return summary


def _fat(rows: Sequence[dict[str, Any]], options: Options) -> dict[str, Any]:
    known = [row for row in rows if None not in (row["predicted_fat_mean_percent"], row["true_fat_mean_percent"])]
    unmeasured = [
        row["true_fat_mean_percent"]
        for row in rows
        if row["true_fat_mean_percent"] is not None and row["predicted_fat_mean_percent"] is None
    ]
    if not known:
        nothing = ("fat_fraction_percent", "fat_fraction_median_percent", "steatosis", "steatosis_grades")
        return {**dict.fromkeys(nothing, None), "fat_unmeasured": len(unmeasured)}
    patients = [row["patient"] for row in known]
    found = {
        f"{kind}_{key}": [row[f"{kind}_fat_{key}_percent"] for row in known]
        for kind in ("predicted", "true")
        for key in ("mean", "median")
    }
    means, medians = ((found[f"predicted_{key}"], found[f"true_{key}"]) for key in ("mean", "median"))
    grades = [[biomarkers.steatosis_grade(value, options.thresholds_percent) for value in values] for values in means]
    return {
        # Percent of a percentage would mislead: errors are in points of fat fraction, the relative ones stay named so.
        "fat_fraction_percent": agreement.agreement(*means, patients=patients, seed=options.seed),
        "fat_fraction_median_percent": agreement.agreement(*medians, patients=patients, seed=options.seed),
        "steatosis": [
            {
                **agreement.detection(*means, threshold=grade, patients=patients),
                "unmeasured_at_or_above": sum(value >= grade for value in unmeasured),
            }
            for grade in options.thresholds_percent
        ],
        "steatosis_grades": agreement.same_class(
            *grades, classes=len(options.thresholds_percent) + 1, patients=patients
        ),
        # Scans of a known fat fraction whose mask is empty: in none of the above.
        "fat_unmeasured": len(unmeasured),
    }


def _summary(
    study: Study, options: Options, rows: Sequence[dict[str, Any]], calibration: dict[str, Any] | None
) -> dict[str, Any]:
    """The first class's numbers on top, as most cards have but one, those of the others under `classes`."""
    of_class = {organ: [row for row in rows if row["class"] == organ] for organ in study.classes}
    first = of_class[study.classes[0]]
    summary: dict[str, Any] = {
        "task": study.segmenter.info["task"],
        "name": study.segmenter.info.get("name"),
        "split": study.split,
        "class": study.classes[0],
        "encoder_weights": _encoder(made_of(study.segmenter.info)[0]),
        "postprocessing": list(
            study.segmenter.info.get("postprocessing", []) if options.postprocessing is None else options.postprocessing
        ),
        "grades_percent": list(options.thresholds_percent),
        "palette": options.palette,
        **summarise(first, options),
    }
    summary["by_scanner"] = {
        scanner: summarise([row for row in first if row["scanner"] == scanner], options)
        for scanner in sorted({row["scanner"] for row in first})
    }
    if len(study.classes) > 1:
        summary["classes"] = {organ: summarise(of_class[organ], options) for organ in study.classes[1:]}
    if calibration is not None:
        errors = [abs(row["expected_dice"] - row["dice"]) for row in _of_scans(rows)]
        summary["quality"] = {
            # Scans that the calibration was fitted on would look better than others.
            "mean_absolute_error": None if study.split == "validation" else float(np.mean(errors)),
            **{key: calibration[key] for key in ("scans", "patients", "left_out_mean_absolute_error")},
        }
    return summary


def _of_scans(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a scan, whose Dice is the mean over classes, as is the expected one."""
    scans: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        scans.setdefault(row["picture"], []).append(row)
    return [{**own[0], "dice": float(np.mean([row["dice"] for row in own]))} for own in scans.values()]


def calibrate(study: Study, options: Options) -> dict[str, Any] | None:
    """What features say of Dice, fitted once on the run's validation patients and kept beside its model."""
    path = study.run / quality.FILE
    try:
        every = split_scans(study.run, "validation", study.manifest)
    except InputError as error:
        without = "on which the expected Dice is calibrated (--no-quality leaves it out)"
        raise InputError(error.code, f"{error.sentence.removesuffix('.')}, {without}.") from error
    chosen = np.unique(np.linspace(0, len(every) - 1, min(len(every), CALIBRATION_SCANS)).round().astype(int))
    validation = [every[index] for index in chosen]
    made = {
        "weights_sha256": study.segmenter.info["weights_sha256"],
        "scans": [f"{scan.card.name} {scan.patient} {scan.study}" for scan in validation],
        "postprocessing": list(quality.steps(options.postprocessing, study.segmenter.info)),
    }
    if path.is_file():
        kept = read_json(path)
        if "calibration" not in kept:
            raise InputError("BAD_FILE", f"Expected a calibration, received none in {path}; remove it.")
        if {key: kept.get(key) for key in made} == made:
            return kept["calibration"]
    found, dice, patients, original = [], [], [], []
    label = f"calibrating the expected Dice on {len(validation)} validation scans"
    for number, scan in enumerate(command.progress(validation, label)):
        image = read_image(scan)
        # Three kinds of faults a scan, each scan the next three: all kinds come up, at half the passes of all for all.
        kinds = [KINDS[(CALIBRATION_KINDS * number + other) % len(KINDS)] for other in range(CALIBRATION_KINDS)]
        for worse_image, worse_truth, kind in versions(image, read_labels(scan, image), kinds, number):
            answer = study.segmenter.segment(
                worse_image, postprocessing=options.postprocessing, keep=True, modality=scan.card.modality
            )
            found.append(quality.features(study.segmenter, answer))
            dice.append(mean_dice(answer.mask, worse_truth, len(study.classes)))
            patients.append(scan.patient)
            original.append(kind is None)
    calibration = quality.fit(found, dice, patients, original)
    with command.atomic(path) as temporary:
        temporary.write_text(json.dumps({**made, "calibration": calibration}, indent=1), encoding="utf-8")
    return calibration


def mean_dice(mask: Volume, truth: Volume, classes: int) -> float:
    """The mean over classes of the Dice of two masks on one grid; what the expected Dice is expected to be."""
    return float(
        np.mean([metrics.dice(mask.voxels == label, truth.voxels == label) for label in range(1, classes + 1)])
    )


def versions(
    image: Volume, truth: Volume, kinds: Sequence[str], seed: int
) -> Iterator[tuple[Volume, Volume, str | None]]:
    """A scan and its truth as they are (kind None), and once of each of these kinds of `degrade`, strengths drawn."""
    yield image, truth, None
    for kind in kinds:
        strength = float(np.random.default_rng([seed, KINDS.index(kind), 1]).uniform(0.2, 1))
        yield *degrade(image, truth, kind, strength, seed), kind


def _draw(
    study: Study, rows: Sequence[dict[str, Any]], summary: dict[str, Any], options: Options, folder: Path
) -> None:
    """Charts of the first class, and overlays of the worst, the median and the best scan of each scanner."""
    organ = study.classes[0]
    first = [row for row in rows if row["class"] == organ]
    for key, columns, what, unit, name in (
        ("volume_ml", "volume_ml", f"{organ} volume", "ml", "volume"),
        ("fat_fraction_percent", "fat_mean_percent", f"mean fat fraction of the {organ}", "%", "fat_fraction"),
    ):
        if summary.get(key):
            points = [
                {**row, "predicted": row[f"predicted_{columns}"], "true": row[f"true_{columns}"]}
                for row in first
                if None not in (row[f"predicted_{columns}"], row[f"true_{columns}"])
            ]
            figures.predicted_against_true(points, what, unit, folder / f"{name}_predicted")
            figures.bland_altman(points, summary[key], what, unit, folder / f"{name}_bland_altman")
    if "quality" in summary:
        scans = _of_scans(rows)
        figures.risk_coverage(
            [row["expected_dice"] for row in scans], [row["dice"] for row in scans], folder / "risk_coverage"
        )
        points = [{**row, "predicted": row["expected_dice"], "true": row["dice"]} for row in scans]
        figures.expected_against_true_dice(points, folder / "expected_dice")
    for number, scanner in enumerate(summary["by_scanner"]):
        name_of = re.sub(r"[^\w.-]", "_", scanner)
        if name_of != scanner:
            name_of = f"{name_of}_{number}"  # two names may become one
        order = sorted((row["dice"], index) for index, row in enumerate(first) if row["scanner"] == scanner)
        chosen = {"median": order[len(order) // 2], "worst": order[0], "best": order[-1]}
        drawn: set[int] = set()
        for word, (dice, index) in chosen.items():
            if index in drawn:
                continue
            drawn.add(index)
            image, modality = read_image(study.scans[index]), study.scans[index].card.modality
            mask = study.segmenter.segment(image, postprocessing=options.postprocessing, modality=modality).mask
            title = f"{first[index]['patient']}, {scanner}: Dice {dice:.3f} (the {word} of {len(order)})"
            name = f"overlay_{name_of}.png" if word == "median" else f"overlay_{name_of}_{word}.png"
            true, palette = read_labels(study.scans[index], image), overlays.PALETTES[options.palette]
            overlays.overlay_figure(image, mask, true, folder / name, title, palette=palette)


def _provenance(study: Study) -> dict[str, Any]:
    """What made the model, or each member of an ensemble, and on what data it was measured."""
    info = study.segmenter.info
    trained_on = sources_of(info)
    measured_on = list({scan.card.name: scan.card.source for scan in study.scans}.values())
    if study.split != EXTERNAL:  # a card that changed since the training is there as it is now, too
        measured_on = [card for card in measured_on if card not in trained_on]
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "lvseg": metadata.version("lvseg"),
        "model": {key: info.get(key) for key in ("task", "name", "version", "weights_sha256", "spacing_mm", "size")},
        "runs": [_shown(made) for made in made_of(info)],
        "datasets": trained_on,
        "measured_on": measured_on,
    }


def _shown(made: Mapping[str, Any]) -> dict[str, Any]:
    """What a page says of a provenance: numbers in the place of names of patients."""
    shown = {key: made[key] for key in PROVENANCE if made.get(key) is not None}
    if encoder := _encoder(made):
        shown["encoder_weights"] = encoder
    if start := made.get("started_from"):
        shown["started_from"] = {key: start.get(key) for key in ("name", "weights_sha256")}
    if studies := made.get("adapted"):
        shown["adapted"] = "; ".join(
            f"{', '.join(study['cards']) or 'own masks'}: {len(study['patients']) or study.get('own_masks')} patients,"
            f" {len(study['left_out'])} left out"
            for study in studies
        )
    return {**shown, "patients": ", ".join(f"{name} {len(each)}" for name, each in made.get("split", {}).items())}


def _encoder(made: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an encoder started from, without the names of patients."""
    encoder = made.get("encoder_weights")
    return encoder and {key: encoder.get(key) for key in ("name", "sha256", "description")}


def print_summary(summary: dict[str, Any]) -> None:
    """Prints a summary as a table, a line a scanner."""
    fat = summary.get("fat_fraction_percent") is not None
    head = f"{'fat bias points':>17}" if fat else ""
    print(f"{'scanner':<20}{'patients':>9}{'Dice':>8}{'lowest':>8}{'volume bias ml':>16}{'error %':>9}{head}")
    for name, part in [*summary["by_scanner"].items(), ("all", summary)]:
        volume = part["volume_ml"]
        percent = volume["mean_absolute_error_percent"]
        fat_bias = (part.get("fat_fraction_percent") or {}).get("bias")
        own = "" if not fat else f"{'-':>17}" if fat_bias is None else f"{fat_bias:>17.2f}"
        print(
            f"{name:<20}{part['patients']:>9}{part['dice']['mean']:>8.3f}{part['dice']['minimum']:>8.3f}"
            f"{volume['bias']:>16.1f}{'-' if percent is None else f'{percent:.2f}':>9}"
            f"{own}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="lvseg.evaluate",
        description="Measures a run's model on patients it was not trained on and writes the run's report folder; or"
        " any model on other datasets (--model and --card without --run).",
        epilog="Example: python -m lvseg.evaluate --run runs/volume/best-fold0 --split test",
    )
    parser.add_argument("--run", type=Path, help="run folder")
    parser.add_argument("--split", choices=SPLITS, help="which of the run's patients (default: test)")
    parser.add_argument(
        "--model", type=Path, help="another model than the run's, such as an ensemble, or without a run"
    )
    parser.add_argument(
        "--card", type=Path, nargs="+", default=[], help="all patients of these datasets instead, none of them seen"
    )
    parser.add_argument("-o", "--out", type=Path, help="another folder than the run's report")
    parser.add_argument(
        "--tolerances-mm", type=float, nargs="+", default=list(TOLERANCES_MM), help="of the surface Dice"
    )
    parser.add_argument(
        "--grades-percent", type=float, nargs="+", default=[],
        help="mean fat fractions at which steatosis grades begin, besides 5.56",
    )  # fmt: skip
    parser.add_argument(
        "--postprocessing",
        choices=STEPS,
        nargs="*",
        help="steps instead of those of the model's card, none for none; on validation patients only",
    )
    parser.add_argument(
        "--no-quality", action="store_true", help="leave out the expected Dice, and three of four passes of the network"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.add_argument(
        "--palette",
        choices=list(overlays.PALETTES),
        default="report",
        help="colours of overlays (default: the report's)",
    )

    def body(arguments: argparse.Namespace) -> None:
        grades, tolerances = arguments.grades_percent, arguments.tolerances_mm
        if not all(0 < grade <= 100 for grade in grades):
            raise InputError("BAD_ARGUMENT", f"Expected --grades-percent above 0 and up to 100, received {grades}.")
        if not all(0 <= tolerance < math.inf for tolerance in tolerances):
            raise InputError("BAD_ARGUMENT", f"Expected --tolerances-mm of 0 or more, received {tolerances}.")
        if arguments.seed < 0:
            raise InputError("BAD_ARGUMENT", f"Expected --seed of 0 or more, received {arguments.seed}.")
        if arguments.split is not None and arguments.card:
            raise InputError(
                "BAD_ARGUMENT", "Expected --split or --card, received both; all patients of the cards are measured."
            )
        if arguments.postprocessing is not None and arguments.split != "validation":
            raise InputError(
                "BAD_ARGUMENT",
                "Expected --split validation with --postprocessing, so that no test patient decides about it; export"
                " the model with the steps chosen and measure that with --model.",
            )
        if arguments.run is None and not (arguments.model and arguments.card):
            received = "--model alone" if arguments.model else "--card alone" if arguments.card else "none of them"
            raise InputError("BAD_ARGUMENT", f"Expected --run, or --model with --card, received {received}.")
        for option in ("model", "card"):
            if getattr(arguments, option) and arguments.out is None:
                raise InputError(
                    "BAD_ARGUMENT",
                    f"Expected --out with --{option}, since a run's report is of its own model and patients.",
                )
        options = Options(
            tolerances, grades, arguments.postprocessing, not arguments.no_quality, arguments.seed, arguments.palette
        )
        run, model, cards, out = arguments.run, arguments.model, arguments.card, arguments.out
        summary = (
            evaluate_model(model, cards, out, options)
            if run is None
            else evaluate_run(run, arguments.split or "test", options, model, out, cards)
        )
        print_summary(summary)
        print(f"report: {(out or run / REPORT) / report.PAGE}")

    return command.run(parser, body, argv)


if __name__ == "__main__":
    sys.exit(main())
