"""Which patients are for training, validation and test: by a hash of the patient's id, never by slice.

The hash of one id does not depend on the others, so adding patients moves nobody else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvseg.errors import InputError
from lvseg.keys import read_yaml

SCAN_DIGITS = 16  # of a scan's sha256 that a model keeps: by chance two of a million are alike in one case of 10^7


@dataclass(frozen=True)
class Split:
    """Patient ids of each part, sorted."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def made_of(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The provenance of a model, by its model.json, or of each member of an ensemble."""
    if "members" in info:
        return [made for member in info["members"] for made in made_of(member)]
    return [info.get("provenance") or {}]


def seen_by(info: Mapping[str, Any], model: Path, *parts: str) -> set[str]:
    """Patients whom a model, a member of an ensemble, or a model or encoder that one of them began with was shown.

    Of an encoder that others than `lvseg.pretrain` trained nobody knows whom it was shown.

    Args:
        info: the model's model.json; model: where it is.
        parts: "train" for those it was trained on, "validation" for those that chose it.

    Raises:
        InputError: BAD_MODEL for a model that does not say.
    """
    seen: set[str] = set()
    for made in made_of(info):
        for which, each in (("it", made), ("the one it began with", made.get("started_from"))):
            if each is not None and "split" not in each:
                raise InputError(
                    "BAD_MODEL", f"Expected a model that says whom {which} was trained on, received {model}."
                )
            seen.update(patient for part in parts for patient in (each or {}).get("split", {}).get(part, ()))
        encoder = made.get("encoder_weights") or {}
        seen.update(patient for part in parts for patient in encoder.get("split", {}).get(part, ()))
    return seen


def scans_seen_by(info: Mapping[str, Any], *parts: str) -> set[str]:
    """Digests of the scans, cut short to SCAN_DIGITS, that a model was shown, as `seen_by`, under whatever ids.

    Models of earlier versions say none.
    """
    began_with = ("started_from", "encoder_weights")
    made = [each for one in made_of(info) for each in (one, *(one.get(key) or {} for key in began_with))]
    return {digest for each in made for part in parts for digest in each.get("scans_sha256", {}).get(part, ())}


def sources_of(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, licence and citation of every dataset that a model, a member of an ensemble, or a model that one of them
    began with was trained on."""
    began_with = [made.get("started_from") or {} for made in made_of(info)]
    return list(
        {card["name"]: card for made in [*began_with, *made_of(info)] for card in made.get("datasets", [])}.values()
    )


def uniform(patient: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the patient's id and the purpose alone (first 8 bytes of a sha256)."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{patient}".encode()).digest()[:8], "big") / 2**64


def split_patients(
    scanners: Mapping[str, Sequence[str]],
    folds: int,
    fold: int,
    test_fraction: float,
    test_patients: Sequence[str] | None = None,
    folds_file: str | None = None,
) -> Split:
    """Divides patients into training, validation and test.

    Args:
        scanners: patient ids by scanner; one id under two scanners goes the same way under both.
        folds: how many folds the patients outside the test set form; fold: the one for validation.
        test_fraction: expected share of test patients, by hash.
        test_patients: their ids instead, where a set is small.
        folds_file: YAML with `folds`, a list of lists of patient ids, instead of the hash.

    Raises:
        InputError: BAD_SPLIT for an unknown patient, a scanner without test patients, or an empty fold.
    """
    patients = sorted({patient for ids in scanners.values() for patient in ids})
    if test_patients is not None:
        _known(test_patients, patients, "data.test_patients")
        test = set(test_patients)
    else:
        test = {patient for patient in patients if uniform(patient, "test") < test_fraction}
    for scanner, ids in sorted(scanners.items()):
        if (test_fraction > 0 or test_patients is not None) and not test.intersection(ids):
            raise InputError(
                "BAD_SPLIT",
                f"Expected test patients of every scanner, received none of the {len(set(ids))} of"
                f" {scanner}; name some in data.test_patients or raise data.test_fraction.",
            )
    rest = [patient for patient in patients if patient not in test]
    if folds_file is not None:
        assigned = _read_folds(Path(folds_file), folds, patients, test)
    else:
        assigned = {patient: int(uniform(patient, "fold") * folds) for patient in rest}
    for number in range(folds):
        if number not in assigned.values():
            fold_of = f"fold {number} of {folds}"
            found = f"{fold_of} for {len(rest)} patients; lower data.folds or give data.folds_file"
            if folds_file is not None:
                found = f"{fold_of} but those of the test set in {folds_file}"
            raise InputError("BAD_SPLIT", f"Expected patients in every fold, received none in {found}.")
    return Split(
        tuple(patient for patient in rest if assigned[patient] != fold),
        tuple(patient for patient in rest if assigned[patient] == fold),
        tuple(sorted(test)),
    )


def _read_folds(path: Path, folds: int, everybody: Sequence[str], test: set[str]) -> dict[str, int]:
    """The fold of every patient outside the test set; test patients may be listed, as in a file for all of a study."""
    patients = [patient for patient in everybody if patient not in test]
    lists = read_yaml(path).get("folds")
    if not isinstance(lists, list) or not all(isinstance(ids, list) for ids in lists) or len(lists) != folds:
        found = "none" if lists is None else f"{len(lists)} items" if isinstance(lists, list) else f"{lists}"
        raise InputError(
            "BAD_SPLIT",
            f"Expected a key folds with {folds} lists of patient ids (data.folds), received {found} in {path}.",
        )
    assigned: dict[str, int] = {}
    for number, ids in enumerate(lists):
        _known(ids, everybody, str(path))
        for patient in ids:
            if patient not in test and assigned.setdefault(patient, number) != number:
                raise InputError("BAD_SPLIT", f"Expected each patient once, received {patient} in two folds in {path}.")
    missing = [patient for patient in patients if patient not in assigned]
    if missing:
        raise InputError("BAD_SPLIT", f"Expected every patient in a fold, received none for {missing[0]} in {path}.")
    return assigned


def _known(ids: Sequence[str], patients: Sequence[str], where: str) -> None:
    for patient in ids:
        if not isinstance(patient, str):
            raise InputError(
                "BAD_SPLIT",
                f"Expected patient ids in quotes, received the {type(patient).__name__} {patient} in {where}.",
            )
        if patient not in patients:
            raise InputError("BAD_SPLIT", f"Expected ids of patients at hand, received {patient} in {where}.")
