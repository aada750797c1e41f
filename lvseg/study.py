"""Whose scans a model is measured on: patients of a run's split, or of other datasets, none of whom it has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvseg.cards import Scan, check_classes, load_card
from lvseg.config import load_experiment
from lvseg.errors import InputError
from lvseg.keys import read_json
from lvseg.predict import Segmenter
from lvseg.prepare import card_scans, dataset_scans, simulated_patients
from lvseg.split import SCAN_DIGITS, scans_seen_by, seen_by
from lvseg.volume import Volume

SPLITS = ("validation", "test")
EXTERNAL = "external"  # scans of other datasets than the run's


@dataclass
class Study:
    """A run's model and the scans of one part of its split, or a model and the scans of other datasets.

    Args:
        run: its folder, or the model's own; split: which part; scans: of its patients; segmenter: the model.
        manifest: of the run; empty where there is none.
        seen_scans: of `split.scans_seen_by`, of those parts of the model's split that are not measured on.
    """

    run: Path
    split: str
    scans: list[Scan]
    segmenter: Segmenter
    manifest: dict[str, Any]
    seen_scans: Set[str] = frozenset()
    classes: list[str] = field(init=False)
    has_fat: bool = field(init=False)

    def __post_init__(self) -> None:
        self.classes = list(self.segmenter.info["labels"][1:])
        # Where some scans are images of fat fractions, the others have empty columns.
        self.has_fat = any(scan.card.kind == "fat_fraction" for scan in self.scans)

    def check_scan(self, scan: Scan, image: Volume) -> None:
        """Refuses a scan, read by `read_image`, that the model was shown under another id: InputError BAD_SPLIT."""
        from lvseg import records

        if self.seen_scans and records.voxels_sha256(image.canonical().voxels)[:SCAN_DIGITS] in self.seen_scans:
            raise InputError(
                "BAD_SPLIT",
                "Expected scans that the model has not seen, received one that it was trained or chosen on under"
                f" another name: {next(iter(scan.images.values()))}.",
            )


def open_study(run: Path, split: str, model: Path | None = None, cards: Sequence[Path] = ()) -> Study:
    """Loads a run's model, or another one, with the scans of the run's validation or test patients, or of all patients
    of other datasets.

    Raises:
        InputError: NOT_FOUND if the run has no model or not all of these patients; BAD_MODEL for a model or cards of
            another task or other classes; BAD_SPLIT if the model was trained or chosen on them.
    """
    path, card = run / "manifest.json", run / "model" / "model.json"
    if not card.is_file() or not path.is_file():
        raise InputError("NOT_FOUND", f"Expected a trained run, received {run} without its model; train it first.")
    manifest, own = read_json(path), read_json(card)
    if not {"split", "datasets"} <= set(manifest) or split not in manifest["split"]:
        raise InputError("NOT_FOUND", f"Expected split and datasets of a trained run, received none in {path}.")
    segmenter = Segmenter(model or run / "model")
    if model is not None:
        for key in ("task", "labels"):
            if segmenter.info[key] != own[key]:
                raise InputError(
                    "BAD_MODEL",
                    f"Expected a model of the run's {key}, {own[key]}, received {segmenter.info[key]} in {model}.",
                )
    if not cards:
        for each in load_experiment(run / "config.yaml").data.datasets:  # cards that may have changed since
            check_classes(Path(each), segmenter.info["task"], segmenter.info["labels"])
    scans = _of_cards(cards, segmenter.info, model or run) if cards else split_scans(run, split, manifest)
    patients = {scan.patient for scan in scans}
    parts = ("train", "validation") if split == "test" or cards else ("train",)
    check_not_seen(segmenter.info, patients, model or run, parts)
    seen = scans_seen_by(segmenter.info, *parts)
    return Study(run, EXTERNAL if cards else split, scans, segmenter, manifest, seen)


def open_model(model: Path, cards: Sequence[Path]) -> Study:
    """Loads a model, whose run need not be there, with the scans of all patients of other datasets.

    Raises:
        InputError: MODEL_UNAVAILABLE; otherwise as `open_study`.
    """
    segmenter = Segmenter(model)
    scans = _of_cards(cards, segmenter.info, model)
    check_not_seen(segmenter.info, {scan.patient for scan in scans}, model)
    return Study(model, EXTERNAL, scans, segmenter, {}, scans_seen_by(segmenter.info, "train", "validation"))


def check_not_seen(
    info: Mapping[str, Any], patients: Set[str], model: Path, parts: Sequence[str] = ("train", "validation")
) -> None:
    """Refuses to measure a model on patients that it was trained or chosen on (`split.seen_by`).

    Args:
        info: its model.json; model: where it is; parts: of its split.

    Raises:
        InputError: BAD_SPLIT; BAD_MODEL for a model that does not say whom it was trained on.
    """
    if seen := patients & seen_by(info, model, *parts):
        raise InputError(
            "BAD_SPLIT",
            f"Expected patients that the model has not seen, received {min(seen)}, on whom {model} was trained or"
            " chosen.",
        )


def _of_cards(paths: Sequence[Path], info: Mapping[str, Any], model: Path) -> list[Scan]:
    """All scans of datasets with a model's task and classes; simulated patients are made where they are not."""
    names: list[str] = []
    for path in paths:
        check_classes(path, info["task"], info["labels"])
        card, root = load_card(path)
        if card.name in names:
            raise InputError("BAD_ARGUMENT", f"Expected each dataset once, received {card.name} twice, in {path}.")
        names.append(card.name)
        check_not_seen(info, set(simulated_patients(card, root)), model)  # before they are made
    return [scan for path in paths for scan in card_scans(path)]


def split_scans(run: Path, split: str, manifest: Mapping[str, Any]) -> list[Scan]:
    """Scans of all patients of a part of a run's split.

    Raises:
        InputError: NOT_FOUND if one of them is gone, or there is none.
    """
    patients = set(manifest["split"][split])
    scans = [scan for scan in dataset_scans(load_experiment(run / "config.yaml").data) if scan.patient in patients]
    gone = sorted(patients - {scan.patient for scan in scans})
    if gone or not scans:
        raise InputError(
            "NOT_FOUND",
            f"Expected scans of the {len(patients)} {split} patients of {run}, received none of"
            f" {', '.join(gone[:5])}{' and others' if len(gone) > 5 else ''}."
            if gone
            else f"Expected {split} patients in {run}, received none.",
        )
    return scans
