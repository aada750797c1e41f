import numpy as np
import pytest

from lvseg.metrics import Overlap, dice, mean_dice, overlap_counts

#                       TP TP TP FN FN FP .  .
TRUTH = np.array([[[1, 1, 1, 1], [1, 0, 0, 0]]], np.uint8)
PREDICTION = np.array([[[1, 1, 1, 0], [0, 1, 0, 0]]], np.uint8)


def test_counts_by_hand():
    assert overlap_counts(PREDICTION, TRUTH) == Overlap(true_positive=3, false_positive=1, false_negative=2)


def test_dice_by_hand():
    assert dice(PREDICTION, TRUTH) == 2 * 3 / (2 * 3 + 1 + 2)


def test_dice_is_symmetric_and_one_for_the_same_mask():
    assert dice(TRUTH, PREDICTION) == dice(PREDICTION, TRUTH)
    assert dice(TRUTH, TRUTH) == 1.0


def test_dice_of_masks_apart_is_zero():
    assert dice(1 - TRUTH, TRUTH) == 0.0


def test_dice_counts_one_label_alone():
    prediction, truth = np.array([2, 2, 1, 0]), np.array([2, 1, 1, 2])
    assert dice(prediction, truth, label=2) == 2 * 1 / (2 + 2)
    assert dice(prediction, truth, label=1) == 2 * 1 / (1 + 2)


def test_mean_dice_is_that_of_the_classes_beside_the_background():
    found, truth = np.array([0, 1, 1, 2, 0]), np.array([0, 1, 2, 2, 2])
    assert mean_dice(found, truth, 3) == pytest.approx((2 / 3 + 2 / 4) / 2)
    assert mean_dice(found, truth, 4) == pytest.approx((2 / 3 + 2 / 4 + 1) / 3)  # nobody has the last class


def test_both_empty_agree_and_one_empty_does_not():
    empty = np.zeros_like(TRUTH)
    assert dice(empty, empty) == 1.0
    assert dice(empty, TRUTH) == 0.0
    assert dice(PREDICTION, empty) == 0.0
    assert Overlap().dice == 1.0


def test_counts_of_slices_add_up_to_the_volume():
    random = np.random.default_rng(0)
    prediction, truth = random.integers(0, 3, (2, 5, 7, 9))
    parts = sum((overlap_counts(*pair) for pair in zip(prediction, truth, strict=True)), start=Overlap())
    assert parts == overlap_counts(prediction, truth)
    assert parts.dice == dice(prediction, truth)


def test_volume_dice_is_not_the_mean_of_slices():
    truth = np.array([[1] * 8, [1] + [0] * 7])
    prediction = np.array([[1] * 8, [0] * 8])
    assert dice(prediction, truth) == 16 / 17


def test_bool_masks_count_like_integers():
    assert dice(PREDICTION.astype(bool), TRUTH) == dice(PREDICTION, TRUTH)


def test_many_voxels_do_not_overflow():
    full = np.ones(200_000, np.uint8)
    assert overlap_counts(full, full) == Overlap(true_positive=200_000)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"received \(1, 2, 4\) and \(2, 4\)"):
        dice(PREDICTION, TRUTH[0])


def test_probabilities_are_refused():
    with pytest.raises(ValueError, match="received dtype=float32"):
        dice(PREDICTION.astype(np.float32), TRUTH)


def test_precision_and_recall_by_hand():
    counts = Overlap(true_positive=6, false_positive=2, false_negative=4)
    assert counts.precision == 0.75 and counts.recall == 0.6
    assert 2 / (1 / counts.precision + 1 / counts.recall) == pytest.approx(counts.dice)  # their harmonic mean


def test_nothing_found_has_no_precision_and_nothing_there_no_recall():
    assert Overlap(false_negative=3).precision is None and Overlap(false_negative=3).recall == 0.0
    assert Overlap(false_positive=3).recall is None and Overlap(false_positive=3).precision == 0.0
