"""How good a mask is likely to be, without the truth: an expected Dice for every scan, and which scans to check.

Four passes of the network, of which the mask needs one: the scan as it is, mirrored, at another contrast and shifted.
What a network is sure of it answers alike. To these come the doubt in its probabilities, how much each slice's mask
is like its neighbours', parts and holes, and the organ's size and brightness against those of other patients. A ridge
regression turns them into an expected Dice; it is fitted on the validation patients of a run, as they are and made
worse on purpose (`degrade`), since scans that went well do not tell what failing looks like.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from lvseg.keys import read_json
from lvseg.predict import Segmentation, Segmenter
from lvseg.volume import Array

FILE = "quality.json"  # of a run
GAMMA = 1.3
SHIFT_SHARE = 0.06  # of the picture's size; beyond the reach of a pooling's grid
LEAST_SCANS = 8
RIDGES = (0.1, 1.0, 10.0, 100.0)
LEAST_AGREEMENT = 0.85  # of a mask to be learned from, without a calibration
FLOOR = 0.01  # of the Dice error whose logarithm is fitted
# What is regressed on; in the units of `features`.
FEATURES = (
    "mirrored_dice", "contrast_dice", "shifted_dice", "neighbour_dice", "doubt", "largest_part", "holes",
    "volume_z", "brightness_z",
)  # fmt: skip
AGREEING = ("mirrored_dice", "contrast_dice", "shifted_dice", "neighbour_dice", "largest_part")
REASONS = {
    "mirrored_dice": "the mirrored scan gives another mask",
    "contrast_dice": "another contrast gives another mask",
    "shifted_dice": "the shifted scan gives another mask",
    "neighbour_dice": "the mask jumps from slice to slice",
    "doubt": "the network is in doubt",
    "largest_part": "the mask lies in several parts",
    "holes": "the mask has holes",
    "volume_z": "the volume is unusual",
    "brightness_z": "the organ's brightness is unusual",
}


def features(segmenter: Segmenter, answer: Segmentation) -> dict[str, float] | None:
    """What can be told of a mask without the truth; three more passes of the network.

    Args:
        segmenter: that made the answer.
        answer: of `Segmenter.segment` with keep=True.

    Returns:
        mirrored_dice, contrast_dice, shifted_dice (of the mask on the network's grid with those of the changed scan),
        neighbour_dice (mean over pairs of slices), largest_part and holes (shares of the mask), doubt (p (1 - p) over
        p, summed), volume_ml and brightness (mean of what the network saw inside). None for an empty mask, be it on the
        network's grid or on the scan's own.
    """
    slices, foreground = answer.slices, answer.foreground
    if slices is None or foreground is None:
        raise ValueError("Expected an answer with what the network saw, received one without; segment with keep=True.")
    mask, volume_ml = foreground > 0.5, float(sum(answer.measurements["volume_ml"].values()))
    if not mask.any() or not volume_ml:
        return None
    shift = max(1, round(SHIFT_SHARE * slices.shape[1]))
    changed = {
        "mirrored_dice": segmenter.foreground(slices[:, :, ::-1])[:, :, ::-1],
        "contrast_dice": segmenter.foreground(bent(slices)),
        "shifted_dice": shifted(segmenter.foreground(shifted(slices, shift)), -shift),
    }
    sizes = np.bincount(ndimage.label(mask)[0].ravel())[1:]
    filled = sum(int(np.count_nonzero(ndimage.binary_fill_holes(plane))) for plane in mask)
    pairs = [_dice(one, other) for one, other in itertools.pairwise(mask) if (one | other).any()]
    return {
        **{name: _dice(mask, other > 0.5) for name, other in changed.items()},
        "neighbour_dice": float(np.mean(pairs)) if pairs else 1.0,
        "doubt": float((foreground * (1 - foreground)).sum() / foreground.sum()),
        "largest_part": float(sizes.max() / sizes.sum()),
        "holes": filled / int(mask.sum()) - 1,
        "volume_ml": volume_ml,
        "brightness": float(slices[mask].mean()),
    }


def fit(found: Sequence[Mapping[str, float] | None], dice: Sequence[float], patients: Sequence[str],
        is_original: Sequence[bool]) -> dict[str, Any] | None:  # fmt: skip
    """Fits the calibration: what features say of Dice.

    The ridge is chosen by leaving out a patient at a time, with all that was made of that patient's scans; so is the
    error that is stated.

    Args:
        found: of `features` of each scan; those without a mask are left out, their Dice is expected to be 0.
        dice: the true ones; patients: a name for each scan; is_original: whether the scan is as it was acquired, which
            is what volumes and brightness are compared with.

    Returns:
        The calibration, JSON-able; None for too few scans or patients.
    """
    known = [index for index, each in enumerate(found) if each is not None]
    usual = [found[index] for index in known if is_original[index]]
    names = np.array([patients[index] for index in known])
    if len(known) < LEAST_SCANS or len(set(names)) < 3 or len(usual) < 3:
        return None
    usual_of = {
        key: _usual([math.log(each["volume_ml"]) if key == "volume" else each["brightness"] for each in usual if each])
        for key in ("volume", "brightness")
    }
    table = np.array([_row(each, usual_of) for index in known if (each := found[index]) is not None])
    target = np.log(1 - np.array([dice[index] for index in known]) + FLOOR)
    centre, scale = table.mean(axis=0), np.maximum(table.std(axis=0), 1e-9)
    table = (table - centre) / scale
    errors = {}
    for ridge in RIDGES:
        left_out = np.empty_like(target)
        for name in set(names):
            own = names == name
            left_out[own] = _predict(table[own], *_solve(table[~own], target[~own], ridge))
        errors[ridge] = _to_dice(left_out) - _to_dice(target)
    ridge = min(errors, key=lambda each: float((errors[each] ** 2).mean()))
    intercept, weights = _solve(table, target, ridge)
    return {
        "usual": usual_of,
        "features": list(FEATURES),
        "centre": centre.tolist(),
        "scale": scale.tolist(),
        "weights": weights.tolist(),
        "intercept": float(intercept),
        "ridge": ridge,
        "scans": len(known),
        "patients": len(set(names)),
        "left_out_mean_absolute_error": float(np.abs(errors[ridge]).mean()),
    }


def expected(calibration: Mapping[str, Any], found: Mapping[str, float] | None) -> tuple[float, list[str]]:
    """The expected Dice of a scan's mask, and what speaks most against it: at most two, the weightiest first."""
    if found is None:
        return 0.0, ["the mask is empty"]
    row = (np.array(_row(found, calibration["usual"])) - calibration["centre"]) / calibration["scale"]
    pulls = row * np.array(calibration["weights"])  # towards a larger error
    value = float(_to_dice(calibration["intercept"] + pulls.sum()))
    against = np.argsort(-pulls, kind="stable")[:2]
    return value, [REASONS[FEATURES[index]] for index in against if pulls[index] > 0.25]


def steps(chosen: Sequence[str] | None, card: Mapping[str, Any]) -> Sequence[str]:
    """The postprocessing that masks undergo: what was chosen, or else what the model's card says."""
    return card.get("postprocessing", ()) if chosen is None else chosen


def of_run(run: Path, card: Mapping[str, Any]) -> dict[str, Any] | None:
    """The calibration that an evaluation left in a run's folder, if it is of the model and postprocessing of a card."""
    if not (run / FILE).is_file():
        return None
    kept = read_json(run / FILE)
    made_for = (kept.get("weights_sha256"), kept.get("postprocessing"))
    return kept.get("calibration") if made_for == (card["weights_sha256"], list(steps(None, card))) else None


def doubt(found: Mapping[str, float] | None, card: Mapping[str, Any]) -> float:
    """How little a mask is to be trusted, 0 to 1: what is missing to the expected Dice, or to agreement with itself.

    Args:
        found: of `features`.
        card: of the model; without the calibration, the agreeing features count alike, that of the mirrored scan only
            where the network has seen such.
    """
    if found is None:
        return 1.0
    if (calibration := card.get("quality")) is not None:
        return 1.0 - expected(calibration, found)[0]
    names = [name for name in AGREEING if name != "mirrored_dice" or mirrors(card)]
    return 1.0 - float(np.mean([found[name] for name in names]))


def least_trust(info: Mapping[str, Any]) -> float:
    """What 1 less `doubt` has to be for a mask to be learned from: with a calibration, the Dice that the model of this
    card had on its validation patients, less the error of what is expected."""
    calibration = info.get("quality")
    if calibration is None:
        return LEAST_AGREEMENT
    return float(info["measured"]["validation_dice"]) - float(calibration["left_out_mean_absolute_error"])


def mirrors(info: Mapping[str, Any]) -> bool:
    """Whether a model, by its card, was trained on slices mirrored from left to right."""
    flip = info.get("experiment", {}).get("augment", {}).get("flip")
    return bool(flip and flip["columns"])


def bent(slices: Array) -> Array:
    """Slices at another contrast: bent between their lowest and nearly their highest intensity."""
    low, high = float(slices.min()), float(np.percentile(slices, 99.5))
    return low + (high - low) * np.clip((slices - low) / max(high - low, 1e-6), 0, None) ** GAMMA


def _row(found: Mapping[str, float], usual: Mapping[str, Mapping[str, float]]) -> list[float]:
    """Features on scales where equal steps mean about equal factors of the Dice error."""
    volume = math.log(found["volume_ml"]) - usual["volume"]["median"]
    brightness = found["brightness"] - usual["brightness"]["median"]
    values = {
        **{name: math.log(1 - found[name] + FLOOR) for name in AGREEING},
        "doubt": math.log(found["doubt"] + 1e-4),
        "holes": math.log(max(found["holes"], 0.0) + FLOOR),
        "volume_z": min(abs(volume) / usual["volume"]["spread"], 10.0),
        "brightness_z": min(abs(brightness) / usual["brightness"]["spread"], 10.0),
    }
    return [values[name] for name in FEATURES]


def _usual(values: Sequence[float]) -> dict[str, float]:
    median = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(np.array(values) - median)))
    return {"median": median, "spread": max(spread, 0.05 * abs(median), 1e-3)}


def _solve(table: Array, target: Array, ridge: float) -> tuple[float, Array]:
    middle, level = table.mean(axis=0), float(target.mean())
    own = table - middle
    weights = np.linalg.solve(own.T @ own + ridge * np.eye(own.shape[1]), own.T @ (target - level))
    return level - float(middle @ weights), weights


def _predict(table: Array, intercept: float, weights: Array) -> Array:
    return intercept + table @ weights


def _to_dice(logarithm: Any) -> Any:
    return np.clip(1 + FLOOR - np.exp(logarithm), 0, 1)


def _dice(one: Array, other: Array) -> float:
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / total if total else 1.0


def shifted(slices: Array, by: int) -> Array:
    """Moved by as many pixels down and right; what comes in is the edge's."""
    size = slices.shape[1]
    index = np.clip(np.arange(size) - by, 0, size - 1)
    return slices[:, index][:, :, index]
