"""What a trial needs of a mask: the organ's volume, whether the scan shows all of it, and how well numbers agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lvseg.volume import Volume

MM3_PER_ML = 1000.0
# Bland and Altman's limits hold 95 % of normally distributed errors; the report's equations 2 and 3.
LIMITS_OF_AGREEMENT_SD = 1.96
# The report counts the patients whose relative error is less than this.
CLOSE_PERCENT = 5.0


def volume_ml(mask: Volume, label: int = 1) -> float:
    """Volume of one class in millilitres: its voxels times the volume of a voxel.

    Args:
        mask: integer or bool voxels, any orientation.
        label: the class that counts.
    """
    return int(np.count_nonzero(mask.voxels == label)) * mask.voxel_volume_mm3 / MM3_PER_ML


def touches_edge(mask: Volume, label: int = 1) -> list[str]:
    """Names the borders of the scan that a class touches, where part of the organ may lie outside the scan.

    Args:
        mask: integer or bool voxels, any orientation.
        label: the class that counts.

    Returns:
        Of "lowest slice" (towards the feet), "highest slice" (towards the head) and "in-plane edge" (first or last row
        or column), in this order, those that apply; the slices are the canonical ones, whatever the file's order.
    """
    organ = mask.canonical().voxels == label
    borders = {
        "lowest slice": organ[0],
        "highest slice": organ[-1],
        "in-plane edge": np.concatenate([organ[:, [0, -1], :].ravel(), organ[:, :, [0, -1]].ravel()]),
    }
    return [name for name, border in borders.items() if border.any()]


def agreement(predicted: npt.ArrayLike, true: npt.ArrayLike) -> dict[str, Any]:
    """Agreement of one number a patient, such as liver volumes in ml, with the truth.

    An error is predicted minus true: positive is too much. Percentages are of the true number.

    Args:
        predicted: float [patients].
        true: float [patients], same unit and order.

    Returns:
        Plain numbers, in the unit that came in where the name says no other:
        n; bias (mean error); sd of the errors (n - 1; None for one patient);
        limit_of_agreement_lower, limit_of_agreement_upper (bias -+ 1.96 sd; None for one patient);
        mean_absolute_error; and, over the n_percent patients whose true number is above zero (None where there are
        none): mean_absolute_error_percent, largest_error_percent (absolute) and share_within_5_percent (0 to 1, of
        errors less than 5 %).

    Raises:
        ValueError: for no patients, lengths that differ, or numbers that are not finite.
    """
    predictions, truths = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    if predictions.ndim != 1 or predictions.shape != truths.shape or not predictions.size:
        raise ValueError(f"Expected two numbers for each patient, received {predictions.shape} and {truths.shape}.")
    if not (np.isfinite(predictions).all() and np.isfinite(truths).all()):
        raise ValueError(f"Expected finite numbers, received predicted={predictions} and true={truths}.")
    errors = predictions - truths
    bias = float(errors.mean())
    sd = float(errors.std(ddof=1)) if errors.size > 1 else None
    positive = truths > 0
    percent = 100 * np.abs(errors[positive]) / truths[positive]
    return {
        "n": errors.size,
        "bias": bias,
        "sd": sd,
        "limit_of_agreement_lower": None if sd is None else bias - LIMITS_OF_AGREEMENT_SD * sd,
        "limit_of_agreement_upper": None if sd is None else bias + LIMITS_OF_AGREEMENT_SD * sd,
        "mean_absolute_error": float(np.abs(errors).mean()),
        "n_percent": percent.size,
        "mean_absolute_error_percent": float(percent.mean()) if percent.size else None,
        "largest_error_percent": float(percent.max()) if percent.size else None,
        "share_within_5_percent": float((percent < CLOSE_PERCENT).mean()) if percent.size else None,
    }
