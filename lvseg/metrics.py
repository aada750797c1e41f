"""Overlap of a predicted mask with the true one, over a whole volume (not a mean over slices)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Overlap:
    """How many voxels two masks agree and disagree on; counts of parts of a volume add up to those of the whole.

    Args:
        true_positive: predicted and true.
        false_positive: predicted, not true.
        false_negative: true, not predicted.
    """

    true_positive: int = 0
    false_positive: int = 0
    false_negative: int = 0

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(
            self.true_positive + other.true_positive,
            self.false_positive + other.false_positive,
            self.false_negative + other.false_negative,
        )

    @property
    def dice(self) -> float:
        """2 TP / (2 TP + FP + FN), the report's equation 4, from 0 to 1; see `dice` for empty masks."""
        voxels = 2 * self.true_positive + self.false_positive + self.false_negative
        return 2 * self.true_positive / voxels if voxels else 1.0

    @property
    def precision(self) -> float | None:
        """TP / (TP + FP), the share of what was found that is so; None where nothing was found."""
        found = self.true_positive + self.false_positive
        return self.true_positive / found if found else None

    @property
    def recall(self) -> float | None:
        """TP / (TP + FN), the share of what is so that was found; None where there was nothing to find."""
        there = self.true_positive + self.false_negative
        return self.true_positive / there if there else None


def overlap_counts(prediction: Array, truth: Array, label: int = 1) -> Overlap:
    """Counts the voxels of one class on which two masks agree and disagree.

    Args:
        prediction: integer or bool [...], any shape.
        truth: integer or bool, the same shape.
        label: the class that counts.

    Returns:
        The counts; start from `Overlap()` and add them up to go through a volume in parts.

    Raises:
        ValueError: for shapes that differ, or for probabilities instead of labels.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.shape != truth.shape:
        raise ValueError(f"Expected masks of one shape, received {prediction.shape} and {truth.shape}.")
    for mask in (prediction, truth):
        if mask.dtype.kind not in "biu":
            raise ValueError(f"Expected masks of integers or bool, received dtype={mask.dtype}.")
    predicted, true = prediction == label, truth == label
    both = int(np.count_nonzero(predicted & true))
    return Overlap(both, int(np.count_nonzero(predicted)) - both, int(np.count_nonzero(true)) - both)


def dice(prediction: Array, truth: Array, label: int = 1) -> float:
    """The Sørensen-Dice coefficient of one class over a whole volume, 2 |X and Y| / (|X| + |Y|), from 0 to 1.

    Both masks empty is full agreement, 1.0: nothing was there and nothing was found. One of them empty is 0.0.

    Args:
        prediction: integer or bool [...], any shape.
        truth: integer or bool, the same shape.
        label: the class that counts.

    Raises:
        ValueError: for shapes that differ, or for probabilities instead of labels.
    """
    return overlap_counts(prediction, truth, label).dice


def mean_dice(prediction: Array, truth: Array, classes: int) -> float:
    """Mean `dice` over the classes 1 to `classes` - 1."""
    return sum(dice(prediction, truth, label) for label in range(1, classes)) / (classes - 1)
