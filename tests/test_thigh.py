"""Simulated thighs: every tissue where anatomy has it, in amounts that differ with age and sex as they do in people."""

from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from lvseg.phantom.anatomy import Tissue
from lvseg.phantom.fields import draw_controls, smooth_field
from lvseg.phantom.thigh import Thighs, draw_thighs

SEED = 7
FINE_MM = 0.5
INSIDE_FASCIA = (Tissue.MUSCLE, Tissue.INTERMUSCULAR_FAT)


@cache
def thighs(number: int) -> Thighs:
    return draw_thighs(SEED, number)


@cache
def fine_slice(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tissues [y, x] of the middle slice every 0.5 mm, and the positions x and y."""
    x, y = np.arange(-230.0, 230.0, FINE_MM), np.arange(-130.0, 140.0, FINE_MM)
    return thighs(number).tissues(x, y, np.array([0.0]))[0], x, y


def leg(number: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """One leg's tissues [y, x], the inner side at the first column, and the positions [y, x, 2] (outwards, back)."""
    map_, x, y = fine_slice(number)
    half = x >= 0 if side > 0 else x < 0
    part, outwards = map_[:, half], side * x[half]
    order = np.argsort(outwards)
    return part[:, order], np.stack(np.meshgrid(outwards[order], y), axis=-1)


def centroid(map_: np.ndarray, where: np.ndarray, *tissues: Tissue) -> np.ndarray:
    return where[np.isin(map_, tissues)].mean(axis=0)


@cache
def population() -> dict[str, np.ndarray]:
    """Areas in cm2 a leg, age and sex of forty patients."""
    x, y = np.arange(-240.0, 241.0, 2.5), np.arange(-140.0, 141.0, 2.5)
    rows = []
    for number in range(40):
        drawn = draw_thighs(3, number)
        counts = np.bincount(drawn.tissues(x, y, np.array([0.0])).ravel(), minlength=len(Tissue)) * 0.0625 / 2
        rows.append((drawn.age_years, drawn.male, *counts))
    table = np.array(rows)
    names = ("age_years", "male", *(tissue.name for tissue in Tissue))
    return dict(zip(names, table.T, strict=True))


@pytest.mark.parametrize("number", (1, 2, 3))
@pytest.mark.parametrize("side", (-1, 1))
def test_bone_and_vessels_lie_where_they_belong(number, side):
    map_, where = leg(number, side)
    muscle = centroid(map_, where, Tissue.MUSCLE)
    femur = centroid(map_, where, Tissue.BONE)
    assert np.linalg.norm(femur - muscle) < 25
    artery = centroid(map_, where, Tissue.BLOOD)
    assert artery[0] < femur[0] - 15  # in the adductor canal, at the inner side
    assert np.ptp(where[map_ == Tissue.BONE][:, 0]) == pytest.approx(28, abs=5)
    marrow_edge = ndimage.binary_dilation(map_ == Tissue.MARROW) & (map_ != Tissue.MARROW)
    assert np.all(map_[marrow_edge] == Tissue.BONE)


@pytest.mark.parametrize("number", (1, 2, 3))
def test_skin_encloses_fat_and_fascia_encloses_muscle(number):
    map_, _, _ = fine_slice(number)
    subcutaneous = ndimage.binary_dilation(map_ == Tissue.FAT)
    crossings = np.count_nonzero(subcutaneous & np.isin(map_, INSIDE_FASCIA))
    assert crossings < 0.002 * np.count_nonzero(np.isin(map_, INSIDE_FASCIA))
    around = ndimage.binary_dilation(map_ == Tissue.AIR) & (map_ != Tissue.AIR)
    assert np.mean(map_[around] == Tissue.SKIN) > 0.98  # the rest is where the legs touch


def test_muscles_are_distinct_bellies_with_fat_between_them():
    oldest = max(range(12), key=lambda number: thighs(number).age_years)
    for side in (-1, 1):
        map_, _ = leg(oldest, side)
        pieces, _ = ndimage.label(ndimage.binary_erosion(map_ == Tissue.MUSCLE, iterations=2))
        sizes_cm2 = np.sort(np.bincount(pieces.ravel())[1:])[::-1] * FINE_MM**2 / 100
        assert np.count_nonzero(sizes_cm2 > 0.8) >= 8
        assert sizes_cm2[0] < 0.5 * sizes_cm2.sum()


def test_a_thin_septum_runs_from_the_fascia_lata_to_the_femur():
    joined = 0
    for number in (1, 2, 3):
        for side in (-1, 1):
            map_, _ = leg(number, side)
            connective = map_ == Tissue.CONNECTIVE
            pieces, _ = ndimage.label(ndimage.binary_dilation(connective, np.ones((3, 3)), iterations=2))
            beside_fat = ndimage.binary_dilation(map_ == Tissue.FAT, iterations=2)
            beside_bone = ndimage.binary_dilation(map_ == Tissue.BONE, iterations=6)
            joined += bool(set(pieces[beside_fat]) & set(pieces[beside_bone]) - {0})
            half_thickness_mm = ndimage.distance_transform_edt(connective)[connective] * FINE_MM
            assert np.percentile(half_thickness_mm, 90) < 2.0
    assert joined >= 5  # vessels and the nerve may interrupt one


def test_amounts_are_those_of_people_and_differ_between_the_sexes():
    people = population()
    men, women = people["male"] == 1, people["male"] == 0
    assert min(men.sum(), women.sum()) > 8
    # 133 and 93 cm2 at 70 to 79 years: Goodpaster et al., J Appl Physiol 2001;90:2157.
    muscle, subcutaneous = people["MUSCLE"], people["FAT"]
    assert 105 < np.median(muscle[men]) < 150 and 70 < np.median(muscle[women]) < 110
    assert np.all((muscle > 45) & (muscle < 215))
    assert np.median(subcutaneous[women]) > 1.4 * np.median(subcutaneous[men])
    assert np.all((subcutaneous > 8) & (subcutaneous < 260))
    assert np.all((people["INTERMUSCULAR_FAT"] > 2) & (people["INTERMUSCULAR_FAT"] < 45))
    assert np.all((people["CONNECTIVE"] > 3) & (people["CONNECTIVE"] < 14))
    for name in ("MUSCLE", "FAT", "INTERMUSCULAR_FAT"):
        assert people[name].std() > 0.15 * people[name].mean()


def test_the_old_have_less_muscle_and_more_fat_between_it():
    people = population()
    share = people["INTERMUSCULAR_FAT"] / (people["INTERMUSCULAR_FAT"] + people["MUSCLE"])
    assert np.corrcoef(people["age_years"], share)[0, 1] > 0.35
    usual = [np.median(people["MUSCLE"][people["male"] == sex]) for sex in (0, 1)]
    muscle = people["MUSCLE"] / np.choose(people["male"].astype(int), usual)
    per_year = np.polyfit(people["age_years"], muscle, 1)[0]
    assert -0.010 < per_year < -0.002  # 0.5 to 0.6 % of the thigh: Kasai et al., Geriatr Gerontol Int 2015;15:700


def test_legs_of_one_person_resemble_each_other_without_being_mirror_images():
    for number in (1, 2, 3):
        (right, _), (left, _) = leg(number, -1), leg(number, 1)
        areas = [np.count_nonzero(part == Tissue.MUSCLE) for part in (right, left)]
        assert 0.8 < areas[0] / areas[1] < 1.25
        columns = min(right.shape[1], left.shape[1])
        same = right[:, :columns] == left[:, :columns]
        body = (right[:, :columns] != Tissue.AIR) | (left[:, :columns] != Tissue.AIR)
        assert same[body].mean() < 0.95


def test_thighs_taper_towards_the_knee():
    x, y = np.arange(-240.0, 241.0, 3.0), np.arange(-140.0, 141.0, 3.0)
    below, above = (np.count_nonzero(level) for level in thighs(1).tissues(x, y, np.array([-40.0, 40.0])))
    assert 1.02 * below < above < 1.4 * below


def test_a_patient_is_the_same_each_time_and_on_any_grid_and_each_number_another():
    x, y, z = np.arange(-200.0, 200.0, 3.1), np.arange(-100.0, 100.0, 2.7), np.arange(-6.0, 7.0, 3.0)
    whole = thighs(1).tissues(x, y, z)
    assert np.array_equal(draw_thighs(SEED, 1).tissues(x, y, z), whole)
    assert np.array_equal(thighs(1).tissues(x[5:90:4], y[3::2], z[1:3]), whole[1:3, 3::2, 5:90:4])
    assert not np.array_equal(thighs(2).tissues(x, y, z), whole)
    assert not np.array_equal(draw_thighs(SEED + 1, 1).tissues(x, y, z), whole)


def test_a_smooth_field_is_the_cubic_b_spline_of_its_control_points():
    controls = draw_controls(np.random.default_rng(0), (40.0, 90.0), 6.0)
    y, x = np.linspace(-19.0, 20.0, 23), np.linspace(-44.0, 41.0, 57)
    index = np.meshgrid(
        *(axis / 6.0 + (n - 1) / 2 for axis, n in zip((y, x), controls.shape, strict=True)), indexing="ij"
    )
    expected = ndimage.map_coordinates(controls, index, order=3, prefilter=False)
    assert smooth_field(controls, 6.0, (y, x)) == pytest.approx(expected, abs=1e-5)


def test_random_fields_have_unit_variance_and_their_own_scale():
    draw = np.random.default_rng(1)
    axis = np.arange(-300.0, 300.0, 1.7)
    for spacing_mm in (4.0, 15.0):
        field = smooth_field(draw_controls(draw, (620.0, 620.0), spacing_mm), spacing_mm, (axis, axis))
        assert field.std() == pytest.approx(1.0, rel=0.08)
        step = round(0.5 * spacing_mm / 1.7)
        near, far = (np.mean(field[:, :-lag] * field[:, lag:]) for lag in (step, 10 * step))
        assert near > 0.7 and abs(far) < 0.2
