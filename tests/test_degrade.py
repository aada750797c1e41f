import numpy as np
import pytest
from small_study import scan

from lvseg.degrade import KINDS, degrade


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_made_worse_stays_a_scan_with_its_truth(kind):
    image, truth = scan("b", 1)
    kept = image.voxels.copy(), truth.voxels.copy()
    worse, mask = degrade(image, truth, kind, 0.8, seed=3)
    np.testing.assert_array_equal(image.voxels, kept[0])
    np.testing.assert_array_equal(truth.voxels, kept[1])
    assert worse.voxels.dtype == np.float32 and mask.voxels.dtype == np.uint8
    assert worse.shape == mask.shape and np.isfinite(worse.voxels).all()
    assert set(np.unique(mask.voxels)) == {0, 1}
    assert worse.shape[1:] == image.canonical().shape[1:]
    same = degrade(image, truth, kind, 0.8, seed=3)
    np.testing.assert_array_equal(worse.voxels, same[0].voxels)
    np.testing.assert_array_equal(mask.voxels, same[1].voxels)
    canonical = image.canonical()
    assert worse.shape != canonical.shape or not np.array_equal(worse.voxels, canonical.voxels)


@pytest.mark.parametrize("kind", ["noise", "ghosts", "blur", "cysts", "shading", "contrast"])
def test_a_stronger_fault_changes_more_and_the_truth_not_at_all(kind):
    image, truth = scan("a", 1)
    original = image.canonical().voxels.astype(float)
    changes = []
    for strength in (0.4, 1.0):
        worse, mask = degrade(image, truth, kind, strength, seed=3)
        changes.append(np.abs(worse.voxels - original).mean())
        np.testing.assert_array_equal(mask.voxels, truth.canonical().voxels)
    assert 0 < changes[0] < changes[1]


def test_a_truncated_scan_loses_part_of_the_organ_and_what_is_left_is_in_place():
    image, truth = scan("a", 1)
    worse, mask = degrade(image, truth, "truncated", 0.6, seed=1)
    assert 0 < mask.voxels.sum() < truth.voxels.sum()
    whole = image.canonical().voxels
    places = [first for first in range(len(whole) - len(worse.voxels) + 1)
              if np.array_equal(whole[first : first + len(worse.voxels)], worse.voxels)]  # fmt: skip
    assert len(places) == 1
    np.testing.assert_allclose(worse.world_mm([0, 0, 0]), image.canonical().world_mm([places[0], 0, 0]))


def test_a_turned_scan_keeps_image_and_truth_together():
    image, truth = scan("a", 1)
    worse, mask = degrade(image, truth, "turned", 1.0, seed=1)
    canonical = image.canonical().voxels
    assert sorted(worse.voxels.ravel()) == sorted(canonical.ravel().astype(np.float32))
    inside = canonical[truth.canonical().voxels > 0].mean()
    assert worse.voxels[mask.voxels > 0].mean() == pytest.approx(inside, rel=1e-5)


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"Expected one of noise, .* received rain"):
        degrade(*scan("a", 1), "rain", 1.0, 0)
