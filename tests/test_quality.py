"""The expected Dice: features of networks whose behaviour is known, and a calibration with a planted truth."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from lvseg import quality
from lvseg.predict import Segmentation

SIZE = 48


class Network:
    """Stands for a segmenter: a function of slices, and a count of its passes."""

    def __init__(self, function):
        self.function, self.passes = function, 0

    def foreground(self, slices):
        self.passes += 1
        return self.function(np.ascontiguousarray(slices)).astype(np.float32)

    def answer(self, slices):
        found = self.function(slices).astype(np.float32)
        return Segmentation(None, {"volume_ml": {"liver": float(found.sum())}}, slices.astype(np.float32), found)


def ball(centre=(5, 22, 26), radius=9):
    grid = np.ogrid[:11, :SIZE, :SIZE]
    distance = ((grid[0] - centre[0]) * 2) ** 2 + sum((grid[axis] - centre[axis]) ** 2 for axis in (1, 2))
    return (distance < radius**2).astype(np.float32)


def test_a_network_that_answers_alike_is_trusted_in_three_more_passes():
    network = Network(lambda slices: slices > 0.2)
    found = quality.features(network, network.answer(ball()))
    assert network.passes == 3
    for name in ("mirrored_dice", "contrast_dice", "shifted_dice", "largest_part"):
        assert found[name] == 1.0
    assert found["doubt"] == 0 and found["holes"] == 0
    assert found["volume_ml"] == ball().sum() and found["brightness"] == 1.0


def test_doubt_is_of_what_the_network_has_seen_or_of_the_calibration():
    found = dict.fromkeys(quality.AGREEING, 0.9) | {"mirrored_dice": 0.1}
    mirrored = {"experiment": {"augment": {"flip": {"columns": 0.5}}}}
    assert quality.doubt(found, {}) == pytest.approx(0.1)
    assert quality.doubt(found, mirrored) == pytest.approx(1 - (4 * 0.9 + 0.1) / 5)
    assert quality.doubt(None, mirrored) == 1
    every = found | {"doubt": 0.1, "holes": 0.0, "volume_ml": 1500.0, "brightness": 0.5}
    flat = {"usual": {key: {"median": 0.0, "spread": 1.0} for key in ("volume", "brightness")},
            "centre": [0.0] * 9, "scale": [1.0] * 9, "weights": [0.0] * 9, "intercept": np.log(0.26)}  # fmt: skip
    assert quality.doubt(every, mirrored | {"quality": flat}) == pytest.approx(0.25)
    for flip, expected in ((None, False), ({"rows": 0.5, "columns": 0.0}, False), ({"columns": 0.5}, True)):
        assert quality.mirrors({"experiment": {"augment": {"flip": flip}}}) == expected
    assert not quality.mirrors({"members": []})
    card = {"measured": {"validation_dice": 0.9}}
    assert quality.least_trust(card) == 0.85
    assert quality.least_trust(card | {"quality": {"left_out_mean_absolute_error": 0.06}}) == pytest.approx(0.84)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("mirrored_dice", lambda slices: (slices > 0.2) & (np.arange(SIZE) > 20)),
        ("shifted_dice", lambda slices: (slices > 0.2) & (np.arange(SIZE) % 5 > 1)),
        ("contrast_dice", lambda slices: slices > 0.62),
    ],
)
def test_each_pass_notices_what_it_is_for(name, function):
    network = Network(function)
    slices = ball() * np.linspace(0.2, 1, SIZE, dtype=np.float32)
    found = quality.features(network, network.answer(slices))
    others = {"mirrored_dice", "shifted_dice", "contrast_dice"} - {name}
    assert found[name] < 0.97
    if name == "contrast_dice":
        assert all(found[other] > 0.999 for other in others)


def test_parts_holes_jumps_and_doubt_are_seen():
    network = Network(lambda slices: slices)
    plain = quality.features(network, network.answer(0.9 * ball()))
    parts = quality.features(network, network.answer(0.9 * np.maximum(ball(), ball((5, 40, 8), 4))))
    hollow = 0.9 * (ball() - ball(radius=3))
    holes = quality.features(network, network.answer(hollow))
    jumps = 0.9 * ball()
    jumps[4:7:2] = 0
    assert parts["largest_part"] < plain["largest_part"] == 1
    assert holes["holes"] > plain["holes"] == 0
    assert quality.features(network, network.answer(jumps))["neighbour_dice"] < plain["neighbour_dice"] - 0.1
    assert plain["doubt"] == pytest.approx(0.1)
    assert quality.features(network, network.answer(0.6 * ball()))["doubt"] == pytest.approx(0.4)


def test_an_empty_mask_has_no_features_and_is_expected_to_be_wrong():
    network = Network(np.zeros_like)
    assert quality.features(network, network.answer(ball())) is None
    assert quality.expected({}, None) == (0.0, ["the mask is empty"])


def test_a_mask_that_is_gone_on_the_scans_own_grid_is_an_empty_one():
    # A few pixels of the network's grid may be the likeliest class of no voxel, as may each of several classes.
    network = Network(lambda slices: slices > 0.2)
    answer = network.answer(ball())
    gone = dataclasses.replace(answer, measurements={"volume_ml": {"liver": 0.0}})
    assert quality.features(network, gone) is None and quality.features(network, answer) is not None


def test_an_answer_without_what_the_network_saw_is_refused():
    with pytest.raises(ValueError, match="keep=True"):
        quality.features(SimpleNamespace(), Segmentation(None, {}))


def simulated(seed, scans):
    """Features and Dice of scans where the error shows in mirrored and doubt, with noise in everything."""
    random = np.random.default_rng(seed)
    error = np.exp(random.uniform(np.log(0.02), np.log(0.8), scans))

    def noisy(value, spread):
        return float(np.clip(value * np.exp(random.normal(0, spread)), 0, 1))

    found = [
        {
            "mirrored_dice": 1 - noisy(own, 0.3), "contrast_dice": 1 - noisy(0.05, 0.5),
            "shifted_dice": 1 - noisy(own, 0.5), "neighbour_dice": 1 - noisy(0.1, 0.2), "doubt": noisy(own / 4, 0.3),
            "largest_part": 1 - noisy(0.01, 1), "holes": noisy(0.01, 1),
            "volume_ml": 1500 * float(np.exp(random.normal(0, 0.2))), "brightness": float(random.normal(100, 10)),
        }
        for own in error
    ]  # fmt: skip
    return found, list(1 - error)


def test_a_planted_relation_is_found_and_carries_over_to_other_scans():
    found, dice = simulated(1, 90)
    patients = [f"p{index // 9}" for index in range(90)]
    original = [index % 9 == 0 for index in range(90)]
    calibration = quality.fit(found, dice, patients, original)
    assert json.loads(json.dumps(calibration, allow_nan=False)) == calibration
    assert calibration["scans"] == 90 and calibration["patients"] == 10
    others, true = simulated(2, 200)
    expected = [quality.expected(calibration, each)[0] for each in others]
    assert stats.spearmanr(expected, true).statistic > 0.85
    error = np.abs(np.array(expected) - true).mean()
    assert error < 0.1
    assert calibration["left_out_mean_absolute_error"] == pytest.approx(error, rel=0.5)
    worst = int(np.argmin(true))
    assert quality.expected(calibration, others[worst])[1][0] in (
        quality.REASONS["mirrored_dice"], quality.REASONS["doubt"], quality.REASONS["shifted_dice"],
    )  # fmt: skip


def test_the_stated_error_is_of_patients_that_were_left_out():
    # Two scans of each patient with the same features and Dice, and nothing to learn across patients: leaving out one
    # of the two would look perfect.
    random = np.random.default_rng(3)
    found, _ = simulated(4, 12)
    dice = list(random.uniform(0.2, 0.99, 12))
    twice = [each for each in found for _ in range(2)]
    calibration = quality.fit(
        twice, [value for value in dice for _ in range(2)], [f"p{index // 2}" for index in range(24)], [True] * 24
    )
    assert calibration["left_out_mean_absolute_error"] > 0.1


def test_too_few_scans_or_patients_give_no_calibration():
    found, dice = simulated(5, 10)
    assert quality.fit(found[:7], dice[:7], list("abcdefg"), [True] * 7) is None
    assert quality.fit(found, dice, ["a"] * 5 + ["b"] * 5, [True] * 10) is None
    assert quality.fit([None] * 10, dice, list("abcdefghij"), [True] * 10) is None
