"""Patients with peculiarities: each changes what it says and nothing else, and the protocols that image them."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from lvseg.phantom import patients, varied
from lvseg.phantom.anatomy import WHOLE_LIVER, Anatomy, Tissue
from lvseg.phantom.patients import draw_anatomy, liver_volume_ml, patient_id, random_stream
from lvseg.phantom.physics import opposed_phase_echo_s
from lvseg.phantom.scan import Scan
from lvseg.phantom.scanners import image_patient
from lvseg.phantom.simulate import PROTOCOLS
from lvseg.phantom.varied import SLICE_MM, draw_scanner
from lvseg.phantom.variety import USUAL, Variety, draw_variety

SEED, NUMBER, STEP_MM = 12, 2, 4.0
X, Y, Z = (np.arange(-reach, reach + 1, STEP_MM) for reach in (300.0, 180.0, 180.0))
Map = np.ndarray
OPEN = (Tissue.VISCERAL_FAT, Tissue.FREE_FLUID)


@cache
def usual() -> Map:
    return draw_anatomy(SEED, NUMBER).tissues(X, Y, Z)


@pytest.fixture
def with_variety(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Anatomy]:
    """The same person with chosen peculiarities."""

    def draw(number: int = NUMBER, **peculiar: object) -> Anatomy:
        monkeypatch.setattr(patients, "draw_variety", lambda _: Variety(**peculiar))
        return draw_anatomy(SEED, number, varied=True)

    return draw


@pytest.fixture
def map_of(with_variety: Callable[..., Anatomy]) -> Callable[..., Map]:
    return lambda **peculiar: with_variety(**peculiar).tissues(X, Y, Z)


def liver(tissues: Map) -> Map:
    return np.isin(tissues, WHOLE_LIVER)


def touches(tissues: Map, *others: Tissue) -> int:
    """How many voxels of the liver have one of the others beside them."""
    return int((liver(tissues) & ndimage.binary_dilation(np.isin(tissues, others))).sum())


def test_nothing_peculiar_is_the_usual_patient(map_of):
    assert np.array_equal(map_of(), usual())


def test_arms_lie_outside_the_body_and_leave_it_alone(map_of):
    armed = map_of(arms=True)
    body = usual() != Tissue.AIR
    assert np.array_equal(armed[body], usual()[body])
    arms, count = ndimage.label((armed != Tissue.AIR) & ~body)
    sizes = np.sort(np.bincount(arms.ravel())[1:])
    assert count >= 2 and sizes[-2] > 0.7 * sizes[-1] and sizes[:-2].sum() < 0.01 * sizes[-1]
    middle = armed[len(Z) // 2]
    new = (middle != Tissue.AIR) & ~body[len(Z) // 2]
    assert {Tissue.SKIN, Tissue.FAT, Tissue.MUSCLE, Tissue.BONE} <= set(np.unique(middle[new]))
    around = ndimage.binary_dilation(new) & (middle == Tissue.AIR)
    rim = ndimage.binary_dilation(around) & new
    assert np.isin(middle[rim], (Tissue.SKIN, Tissue.FAT)).mean() > 0.95


def test_ascites_fills_what_was_fat_around_the_liver(map_of):
    ascites = map_of(ascites_mm=12.0)
    changed = ascites != usual()
    assert set(np.unique(usual()[changed])) == {Tissue.VISCERAL_FAT}
    assert set(np.unique(ascites[changed])) == {Tissue.FREE_FLUID}
    far = ndimage.distance_transform_edt(~liver(ascites), sampling=STEP_MM)[changed]
    flanks = np.abs(np.broadcast_to(X, ascites.shape)[changed]) > 50
    assert np.all((far < 30) | flanks) and (far < 8).sum() > 500
    more = map_of(ascites_mm=24.0)
    assert (more == Tissue.FREE_FLUID).sum() > 1.5 * (ascites == Tissue.FREE_FLUID).sum()


def test_an_effusion_lies_at_the_back_of_the_lung(map_of):
    effusion = map_of(effusion=1.0)
    changed = effusion != usual()
    assert set(np.unique(usual()[changed])) == {Tissue.LUNG} and np.all(effusion[changed] == Tissue.FREE_FLUID)
    y = np.broadcast_to(Y[:, None], effusion.shape)
    assert y[changed].mean() > y[usual() == Tissue.LUNG].mean() + 20


@pytest.mark.parametrize(("side", "sign"), [("right", -1), ("left", 1)])
def test_a_resection_takes_one_side_of_the_liver(with_variety, side, sign):
    left_over = with_variety(resected=side, liver=0.55)
    assert liver_volume_ml(left_over) == pytest.approx(0.55 * draw_anatomy(SEED, NUMBER).target_liver_ml, rel=0.05)
    x = np.broadcast_to(X, usual().shape)
    far = sign * x > (25 if side == "left" else 75)
    assert (liver(usual()) & far).sum() > 200
    assert (liver(left_over.tissues(X, Y, Z)) & far).sum() < 0.15 * (liver(usual()) & far).sum()


@pytest.mark.parametrize(
    ("side", "more"),
    [("left", {"left_length": 1.6}), ("left", {"hangs": True}), ("left", {"wraps": True}), ("right", {"riedel": True})],
)
def test_a_resection_leaves_no_lobe_behind_that_hung_on_what_was_cut_off(map_of, side, more):
    there = liver(map_of(**more)) & ~liver(usual())
    assert there.sum() > 50
    left_over = map_of(resected=side, liver=0.55, **more)
    pieces, _ = ndimage.label(liver(left_over), np.ones((3, 3, 3)))
    sizes = np.bincount(pieces.ravel())[1:]
    assert sizes.max() > 0.99 * sizes.sum()
    assert (liver(left_over) & there).sum() < 0.15 * there.sum()


def test_the_gallbladder_is_as_full_as_asked_or_gone(map_of):
    volumes = [(map_of(gallbladder=size) == Tissue.GALLBLADDER).sum() for size in (0.0, 0.6, 1.0, 1.8)]
    assert volumes[0] == 0 and volumes[1] < 0.5 * volumes[2] < 0.5 * volumes[3]


def test_without_fat_between_them_organs_touch_the_liver(map_of):
    neighbours = (Tissue.STOMACH, Tissue.BOWEL, Tissue.KIDNEY, Tissue.GALLBLADDER)
    assert touches(map_of(halo=0.0), *neighbours) > 2 * touches(usual(), *neighbours)
    assert touches(map_of(halo=0.0, near_loops=14), Tissue.BOWEL) > touches(map_of(halo=0.0), Tissue.BOWEL)


def test_a_left_lobe_can_hang_apart_and_go_round_the_spleen(map_of):
    def slices_in_pieces(tissues: Map) -> int:
        """Slices in which the liver is several pieces of more than 1 cm2."""
        pieces = [np.bincount(ndimage.label(plane)[0].ravel())[1:] for plane in liver(tissues)]
        return sum((sizes * STEP_MM**2 > 100).sum() > 1 for sizes in pieces)

    hanging = map_of(hangs=True)
    assert slices_in_pieces(hanging) >= slices_in_pieces(usual()) + 4
    sizes = np.bincount(ndimage.label(liver(hanging), np.ones((3, 3, 3)))[0].ravel())[1:]
    assert sizes.max() > 0.995 * sizes.sum()  # apart in slices, not in the body
    reach = [float(np.broadcast_to(X, usual().shape)[liver(map_)].max()) for map_ in (usual(), map_of(wraps=True))]
    assert reach[1] > reach[0] + 15
    assert touches(map_of(wraps=True, halo=0.0), Tissue.SPLEEN) > touches(map_of(halo=0.0), Tissue.SPLEEN)


def test_a_long_left_lobe_reaches_far_to_the_left_and_stays_of_one_piece(map_of):
    def reach_mm(**peculiar: object) -> float:
        tissues = map_of(**peculiar)
        sizes = np.bincount(ndimage.label(liver(tissues), np.ones((3, 3, 3)))[0].ravel())[1:]
        assert sizes.max() > 0.99 * sizes.sum()
        return float(np.broadcast_to(X, tissues.shape)[liver(tissues)].max())

    short, normal, longer, longest = (reach_mm(left_length=length) for length in (0.6, 1.0, 1.3, 1.7))
    assert short < normal - 5 and longer > normal + 8 and longest > normal + 25
    assert reach_mm(left_length=1.7, left_thickness=0.55) > normal + 20


def test_a_low_heart_lies_against_the_liver_and_shares_slices_with_it(map_of):
    def gap_mm_and_slices(**peculiar: object) -> tuple[float, int]:
        tissues = map_of(**peculiar)
        heart = np.isin(tissues, (Tissue.HEART, Tissue.BLOOD, Tissue.VENOUS_BLOOD)) & (np.abs(X - 24) < 60)
        heart &= ndimage.binary_dilation(tissues == Tissue.HEART, iterations=3)
        apart = ndimage.distance_transform_edt(~liver(tissues), sampling=STEP_MM)[tissues == Tissue.HEART].min()
        together = (liver(tissues).sum(axis=(1, 2)) > 25) & (heart.sum(axis=(1, 2)) > 25)
        return float(apart), int(together.sum())

    usual_gap, usual_slices = gap_mm_and_slices()
    gap, slices = gap_mm_and_slices(heart_mm=30.0, halo=0.0)
    assert gap <= 1.5 * STEP_MM < usual_gap and slices >= usual_slices + 4


SIZES = {
    "left_thickness": (0.55, 1.3, lambda map_: (liver(map_) & (X > 30)).sum()),
    "right": (0.85, 1.1, lambda map_: (liver(map_) & (X < -70)).sum()),
    "caudate": (0.8, 1.7, lambda map_: (liver(map_) & (np.abs(X) < 24) & (Y[:, None] > 12)).sum()),
    "wall": (0.5, 1.4, lambda map_: (map_ == Tissue.MUSCLE).sum()),
    "gas": (0.0, 0.5, lambda map_: (map_ == Tissue.GAS).sum()),
    "fluid": (0.0, 0.5, lambda map_: ((map_ == Tissue.STOMACH_CONTENT) & (Z[:, None, None] < -60)).sum()),
    "stomach": (0.55, 1.4, lambda map_: np.isin(map_, (Tissue.STOMACH, Tissue.STOMACH_CONTENT)).sum()),
    "spleen": (0.65, 1.5, lambda map_: (map_ == Tissue.SPLEEN).sum()),
}


@pytest.mark.parametrize("name", SIZES)
def test_what_is_larger_takes_more_room(map_of, name):
    low, high, size = SIZES[name]
    assert size(map_of(**{name: high})) > 1.1 * size(map_of(**{name: low})) >= 0


def test_kidneys_lie_as_high_as_asked_and_the_colon_turns_below_the_liver(map_of):
    def middle_mm(tissues: Map) -> float:
        z = np.broadcast_to(Z[:, None, None], tissues.shape)
        return float(z[np.isin(tissues, (Tissue.KIDNEY, Tissue.KIDNEY_MEDULLA))].mean())

    assert middle_mm(map_of(kidneys_mm=20.0)) == pytest.approx(middle_mm(usual()) + 20, abs=8)
    assert touches(map_of(flexure_mm=50.0, halo=0.0), Tissue.BOWEL) > 1.2 * touches(map_of(halo=0.0), Tissue.BOWEL)


def test_a_riedel_lobe_reaches_further_down(map_of):
    lowest = [Z[liver(map_).any(axis=(1, 2))][0] for map_ in (usual(), map_of(riedel=True))]
    assert lowest[1] < lowest[0] - 10


def test_fissures_are_fat_inside_the_liver_alone(map_of):
    cut = map_of(fissures=4)
    changed = (cut != usual()) & liver(usual()) & ~liver(cut)
    assert changed.sum() > 50 and set(np.unique(cut[changed])) == {Tissue.VISCERAL_FAT}


def test_children_and_the_obese_have_their_size(map_of, with_variety):
    def width_mm(tissues: Map) -> float:
        body = (tissues != Tissue.AIR).any(axis=(0, 1))
        return float(np.ptp(X[body]))

    child = with_variety(frame=0.6)
    assert width_mm(child.tissues(X, Y, Z)) == pytest.approx(0.6 * width_mm(usual()), abs=25)
    assert liver_volume_ml(child) == pytest.approx(0.6**3 * draw_anatomy(SEED, NUMBER).target_liver_ml, rel=0.05)
    fat = [(map_of(habitus=habitus) == Tissue.FAT).sum() for habitus in (-1.5, 0.0, 3.0)]
    assert fat[0] < 0.8 * fat[1] and fat[2] > 2 * fat[1]


def test_scoliosis_bends_the_spine_to_the_side(map_of):
    def bend_mm(tissues: Map) -> float:
        x = np.broadcast_to(X, tissues.shape)
        return float(np.ptp([x[index][plane == Tissue.SPINAL_FLUID].mean() for index, plane in enumerate(tissues)]))

    assert bend_mm(map_of(scoliosis_mm=20.0)) > bend_mm(usual()) + 15


def test_cysts_of_the_kidneys_hold_fluid(map_of):
    cysts = map_of(kidney_cysts=3) == Tissue.FREE_FLUID
    kidneys = np.isin(usual(), (Tissue.KIDNEY, Tissue.KIDNEY_MEDULLA))
    assert cysts.sum() > 20 and (cysts & ndimage.binary_dilation(kidneys, iterations=9)).sum() == cysts.sum()


def test_livers_have_the_volume_drawn_whatever_is_peculiar():
    for number in range(1, 9):
        anatomy = draw_anatomy(SEED, number, varied=True)
        assert liver_volume_ml(anatomy) == pytest.approx(anatomy.target_liver_ml, rel=0.05)


def test_most_patients_have_several_peculiarities_and_every_one_is_met():
    drawn = [draw_variety(random_stream(SEED, number, "variety")) for number in range(300)]
    assert drawn[7] == draw_variety(random_stream(SEED, 7, "variety"))
    for field in fields(Variety):
        values = [getattr(variety, field.name) for variety in drawn]
        assert len(set(values)) > 1, field.name
    for name, share in {"hangs": 0.3, "wraps": 0.2, "arms": 0.3, "riedel": 0.15}.items():
        assert np.mean([getattr(variety, name) for variety in drawn]) == pytest.approx(share, abs=0.09)
    assert {variety.resected for variety in drawn} == {None, "left", "right"}
    assert USUAL not in drawn


def test_varied_patients_are_other_people_than_the_usual_ones():
    assert patient_id(3, 7, varied=True) != patient_id(3, 7)
    assert [PROTOCOLS[name].varied for name in ("varied_volume", "varied_fat", "ge_volume", "ct_liver")] == [
        True, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["varied_volume", "varied_opposed", "varied_fat"])
def test_no_echo_comes_after_the_next_excitation(monkeypatch, name):
    monkeypatch.setattr(varied, "draw_anatomy", lambda *_, **__: None)
    monkeypatch.setattr(varied, "image_patient", lambda _, scanner: scanner.sequence)
    late = 0
    for number in range(100):
        sequence = varied.PROTOCOLS[name].image(SEED, number)
        drawn = draw_scanner(name, varied.PROTOCOLS[name].task, random_stream(SEED, number, f"scanner {name}")).sequence
        assert sequence.echo_times_ms[-1] + varied.READOUT_MS <= sequence.repetition_ms <= 10.0
        assert sequence.repetition_ms == max(drawn.repetition_ms, sequence.echo_times_ms[-1] + varied.READOUT_MS)
        late += sequence.repetition_ms > drawn.repetition_ms
    assert late < 50 and (late > 0 or name == "varied_opposed")  # whose only echo is early


@pytest.mark.parametrize("task", ["volume", "fatfraction"])
def test_every_patient_has_a_scanner_of_its_own(task):
    scanners = [draw_scanner("any", task, random_stream(SEED, number, "scanner any")) for number in range(200)]
    slice_mm = np.array([scanner.slice_mm for scanner in scanners])
    low, high = SLICE_MM[task]
    assert low - 0.06 <= slice_mm.min() < 1.2 * low and 0.85 * high < slice_mm.max() <= high + 0.06
    assert len({scanner.sequence for scanner in scanners}) > 150
    assert {scanner.sequence.field_t for scanner in scanners} == {1.5, 3.0}
    assert len({scanner.flips for scanner in scanners}) == 8
    slabs = [scanner for scanner in scanners if scanner.at is not None]
    assert 0.1 < len(slabs) / len(scanners) < 0.3
    assert max(scanner.slices * scanner.slice_mm for scanner in slabs) < 130
    for scanner in scanners:
        assert 330 < scanner.columns * scanner.pixel_mm < 500 and scanner.rows <= scanner.columns


@cache
def scan(name: str, number: int) -> Scan:
    return PROTOCOLS[name].image(SEED, number)


@pytest.mark.parametrize("name", ["varied_volume", "varied_opposed", "varied_fat"])
def test_a_varied_scan_has_the_files_and_truth_of_its_task(name):
    made, like = scan(name, 3), PROTOCOLS["philips_fat" if name == "varied_fat" else "philips_volume"].image(SEED, 3)
    assert set(made.images) == set(like.images) and list(made.truth) == list(like.truth)
    assert {key: volume.voxels.dtype for key, volume in made.images.items()} == {
        key: volume.voxels.dtype for key, volume in like.images.items()
    }
    labelled = np.isin(made.tissues.voxels, WHOLE_LIVER)
    assert np.all(labelled[made.mask.voxels == 1])
    if name != "varied_fat":
        assert np.array_equal(made.mask.voxels == 1, labelled)
    again = PROTOCOLS[name].image(SEED, 3)
    assert all(np.array_equal(made.images[key].voxels, again.images[key].voxels) for key in made.images)


def test_opposed_phase_draws_black_lines_where_liver_and_fat_meet():
    """In phase the border lies between its two sides in brightness; in opposed phase it is darker than either."""
    own = draw_scanner("in phase", "volume", random_stream(SEED, 3, "scanner varied_opposed"))
    sequence = replace(own.sequence, fat_left=None, echo_weights=(1.0,))
    sequence = replace(sequence, echo_times_ms=(2000.0 * opposed_phase_echo_s(sequence.field_t),))
    in_phase = image_patient(draw_anatomy(SEED, 3, varied=True), replace(own, sequence=sequence))

    def border_of(made: Scan) -> float:
        image, tissues = made.images["image"].canonical().voxels, made.tissues.canonical().voxels
        liver, fat = (tissues == tissue for tissue in (Tissue.LIVER, Tissue.VISCERAL_FAT))
        darkest = np.minimum(image[:, :, 1:], image[:, :, :-1])[liver[:, :, 1:] & fat[:, :, :-1]]
        assert len(darkest) > 200
        return float(np.median(darkest) / min(np.median(image[liver]), np.median(image[fat])))

    assert border_of(scan("varied_opposed", 3)) < 0.6 < 0.9 < border_of(in_phase)


def test_a_slab_shows_a_part_of_the_liver():
    drawn = {
        number: draw_scanner("x", "volume", random_stream(SEED, number, "scanner varied_volume"))
        for number in range(1, 60)
    }
    number = next(
        number for number, scanner in drawn.items() if scanner.at is not None and scanner.slices * scanner.slice_mm < 85
    )
    truth = scan("varied_volume", number).truth
    assert 0 < truth["liver_volume_ml"] < 0.9 * truth["whole_liver_ml"]
