import numpy as np
import pytest

from lvseg.postprocess import STEPS, postprocess


def two_parts():
    labels = np.zeros((4, 10, 10), np.uint8)
    labels[1:3, 1:5, 1:5] = 1
    labels[2, 7:9, 7:9] = 1
    return labels


@pytest.mark.parametrize("turned", [slice(None), slice(None, None, -1)], ids=["largest first", "largest last"])
def test_only_the_largest_part_of_a_class_is_kept(turned):
    labels = two_parts()
    labels[0, 9, 0:2] = 2
    kept = postprocess(labels[turned, turned], ["largest_component"])
    expected = labels.copy()
    expected[2, 7:9, 7:9] = 0
    np.testing.assert_array_equal(kept, expected[turned, turned])
    assert labels[2, 7, 7] == 1  # what came in is left as it was


def test_parts_that_touch_at_an_edge_alone_are_two():
    labels = np.zeros((1, 4, 4), np.uint8)
    labels[0, 0:2, 0:2] = 1
    labels[0, 2, 2] = 1
    assert postprocess(labels, ["largest_component"]).sum() == 4


def test_holes_are_filled_in_each_slice_but_not_with_another_class():
    labels = np.zeros((2, 8, 8), np.uint8)
    labels[0, 1:7, 1:7] = 1
    labels[0, 3, 3] = 0
    labels[0, 4, 4] = 2
    labels[1, 1:7, 1] = 1
    expected = labels.copy()
    expected[0, 3, 3] = 1
    np.testing.assert_array_equal(postprocess(labels, ["fill_holes"]), expected)


def test_a_hole_of_a_part_that_goes_is_not_filled():
    labels = np.zeros((1, 12, 12), np.uint8)
    labels[0, 0:6, 0:6] = 1
    labels[0, 8:11, 8:11] = 1
    labels[0, 9, 9] = 0
    assert postprocess(labels, STEPS)[0, 8:].sum() == 0


@pytest.mark.parametrize("steps", [[], ["largest_component"], ["fill_holes"], list(STEPS)])
def test_doing_it_twice_changes_nothing_and_an_empty_mask_stays(steps):
    random = np.random.default_rng(2)
    labels = random.integers(0, 3, (3, 12, 12)).astype(np.uint8)
    once = postprocess(labels, steps)
    np.testing.assert_array_equal(postprocess(once, steps), once)
    assert not postprocess(np.zeros_like(labels), steps).any()


def test_another_step_is_refused():
    with pytest.raises(ValueError, match="Expected steps of largest_component, fill_holes, received smooth"):
        postprocess(two_parts(), ["smooth"])
