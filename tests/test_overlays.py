import itertools
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from lvseg import overlays
from lvseg.overlays import overlay_figure, overlay_rgb
from lvseg.volume import Volume

Patient = tuple[Volume, Volume, Volume]

CANONICAL = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], float)
SPACING_MM = (5.0, 2.0, 2.0)
ON_BLACK = [tuple(round(channel / 2) for channel in rgb) for rgb in overlays.REPORT_COLOURS[:2]]
PURPLE, RED = ON_BLACK


def on_grid(voxels: np.ndarray) -> Volume:
    return Volume(voxels, CANONICAL @ np.diag([*SPACING_MM, 1.0]))


def turned(volume: Volume, order: tuple[int, ...], flips: tuple[bool, ...]) -> Volume:
    """The same voxels at the same places, as a file with its axes in another order and direction has them."""
    voxels, affine = np.transpose(volume.voxels, order), volume.affine[:, [*order, 3]].copy()
    for axis in np.flatnonzero(flips):
        voxels = np.flip(voxels, axis)
        affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
        affine[:3, axis] *= -1
    return Volume(voxels, affine)


def patient(organ: tuple[slice, slice, slice], missed: tuple[slice, slice, slice] | None = None) -> Patient:
    """A black scan of 200 x 200 x 200 mm, its predicted and its true mask."""
    scan, truth = np.zeros((40, 100, 100), np.float32), np.zeros((40, 100, 100), np.uint8)
    truth[organ] = 1
    predicted = truth.copy()
    if missed:
        predicted[missed] = 0
    return on_grid(scan), on_grid(predicted), on_grid(truth)


def picture(volumes: Patient, path: Path) -> np.ndarray:
    """uint8 [rows, columns, 3] of the written file."""
    overlay_figure(*volumes, path, "a patient")
    return np.rint(255 * matplotlib.image.imread(path)[..., :3]).astype(np.uint8)


def panels(pixels: np.ndarray) -> list[np.ndarray]:
    """The four pictures side by side: three axial, one coronal."""
    return np.array_split(pixels, 4, axis=1)


def where(pixels: np.ndarray, rgb: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns that have this colour, give or take the rounding of blending."""
    rows, columns = np.nonzero((np.abs(pixels.astype(int) - rgb) <= 1).all(axis=-1))
    return rows, columns


@pytest.mark.parametrize("palette", overlays.PALETTES.values(), ids=overlays.PALETTES)
def test_colours_at_known_pixels(palette):
    image = np.array([[0.0, 100.0, 100.0, 100.0]])
    rgb = overlay_rgb(
        image, np.array([[0, 1, 0, 1]], bool), np.array([[0, 1, 1, 0]], bool), window=(0, 200), palette=palette
    )
    grey = 127.5
    assert rgb.dtype == np.uint8
    assert rgb.shape == (1, 4, 3)
    np.testing.assert_array_equal(rgb[0, 0], [0, 0, 0])
    for column, colour in [(1, palette.agreement), (2, palette.missed), (3, palette.excess)]:
        np.testing.assert_allclose(rgb[0, column], (np.array(colour) + grey) / 2, atol=0.51)


def test_colours_are_the_reports():
    both, under, over, names = overlays.REPORT_COLOURS
    assert max(under) == under[0] > 2 * max(under[1:])  # red
    assert max(over) == over[2] > 2 * max(over[:2])  # blue
    assert min(both[0], both[2]) > 2 * both[1]  # purple
    assert names == ("purple", "red", "blue")


# Machado, Oliveira and Fernandes 2009: what full protanopia, deuteranopia and tritanopia make of linear RGB.
BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(rgb):
    """CIE L*a*b* (D65) of linear RGB."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    x, y, z = np.cbrt(np.clip(xyz / [0.9505, 1.0, 1.089], 0.008856, None))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def linear(rgb):
    rgb = np.array(rgb) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("kind", BLIND)
def test_colour_blind_readers_tell_the_colours_apart_in_grey_too(kind):
    colours = overlays.COLOUR_BLIND[:3]
    seen = [lab(np.clip(BLIND[kind] @ linear(colour), 0, 1)) for colour in colours]
    for one, other in itertools.combinations(range(3), 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 30  # a difference of 2.3 is just noticed
        assert abs(lab(linear(colours[one]))[0] - lab(linear(colours[other]))[0]) > 15


def test_each_slice_has_its_own_window_and_outliers_do_not_darken_it():
    ramp = np.linspace(0, 1, 10_000, dtype=np.float32).reshape(100, 100)
    stack = np.stack([ramp, 1000 * ramp + 5])
    stack[1, 0, 0] = 1e6
    nothing = np.zeros(stack.shape, bool)
    rgb = overlay_rgb(stack, nothing, nothing)
    assert (rgb[..., 0] == rgb[..., 1]).all()
    assert (rgb[..., 0] == rgb[..., 2]).all()
    np.testing.assert_allclose(rgb[:, 50, 0, 0], 127.5, atol=1.5)
    assert rgb[0, -1, -1, 0] == 255
    assert rgb[0, 0, 0, 0] == 0


def test_a_stack_is_coloured_as_its_slices_are():
    random = np.random.default_rng(0)
    stack, (predicted, true) = random.random((2, 3, 16, 17)), random.random((2, 2, 3, 16, 17)) > 0.5
    together = overlay_rgb(stack, predicted, true)
    for index in np.ndindex(2, 3):
        np.testing.assert_array_equal(together[index], overlay_rgb(stack[index], predicted[index], true[index]))


def test_inputs_stay_as_they_were():
    image, mask = np.random.default_rng(0).random((8, 8), np.float32), np.eye(8, dtype=bool)
    before = image.copy()
    overlay_rgb(image, mask, mask)
    np.testing.assert_array_equal(image, before)


def test_an_image_of_one_intensity_is_black():
    nothing = np.zeros((4, 4), bool)
    assert overlay_rgb(np.full((4, 4), 7), nothing, nothing).max() == 0


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="Expected one shape"):
        overlay_rgb(np.zeros((4, 4)), np.zeros((4, 4), bool), np.zeros((4, 5), bool))


def test_the_patients_right_is_left_front_and_head_are_up(tmp_path):
    front_right_head = (slice(25, 40), slice(5, 30), slice(5, 30))
    for panel in panels(picture(patient(front_right_head), tmp_path / "p.png")):
        rows, columns = where(panel, PURPLE)
        assert rows.size > 500
        pixels_per_mm = np.ptp(columns) / 50
        middle_column = panel.shape[1] / 2
        assert columns.max() < middle_column
        # The organ begins 10 mm (front) or 0 mm (head) below the top of the picture, which is 200 mm high; were it
        # upside down it would end there, and the scale bar in the lowest tenth would come before it.
        bar_row = where(panel, (255, 255, 255))[0].max()
        assert (bar_row - rows.max()) / pixels_per_mm > 80


def test_missed_parts_are_red_and_slices_follow_the_organ(tmp_path):
    organ = (slice(20, 41), slice(30, 70), slice(30, 70))
    only_in_the_highest_panel = (slice(34, 36), slice(30, 70), slice(30, 70))
    lowest, middle, highest, coronal = panels(picture(patient(organ, only_in_the_highest_panel), tmp_path / "p.png"))
    assert where(highest, RED)[0].size > 500
    assert where(highest, PURPLE)[0].size == 0
    for panel in (lowest, middle):
        assert where(panel, RED)[0].size == 0
        assert where(panel, PURPLE)[0].size > 500
    assert where(coronal, RED)[0].size > 100
    assert where(coronal, PURPLE)[0].size > where(coronal, RED)[0].size


def test_lengths_are_true_in_every_panel(tmp_path):
    organ_100_mm_wide_60_mm_deep_80_mm_high = (slice(10, 26), slice(20, 50), slice(25, 75))
    for panel, height_mm in zip(
        panels(picture(patient(organ_100_mm_wide_60_mm_deep_80_mm_high), tmp_path / "p.png")),
        (60, 60, 60, 80),
        strict=True,
    ):
        rows, columns = where(panel, PURPLE)
        pixels_per_mm = (np.ptp(columns) + 1) / 100
        assert np.ptp(rows) + 1 == pytest.approx(height_mm * pixels_per_mm, abs=3)
        white_rows, white_columns = where(panel, (255, 255, 255))
        bar = white_columns[white_rows == np.bincount(white_rows).argmax()]
        assert np.ptp(bar) + 1 == pytest.approx(50 * pixels_per_mm, abs=3)


@pytest.mark.parametrize(
    ("order", "flips"),
    [((2, 1, 0), (False, False, False)), ((1, 0, 2), (True, False, True)), ((0, 1, 2), (True, True, True))],
)
def test_the_files_orientation_does_not_matter(order, flips, tmp_path):
    volumes = patient((slice(8, 30), slice(20, 60), slice(10, 55)), (slice(8, 30), slice(20, 25), slice(10, 55)))
    volumes[0].voxels[:] = np.random.default_rng(0).random(volumes[0].shape)
    scan, predicted, true = (turned(volume, order, flips) for volume in volumes)
    own = picture((scan, predicted, true), tmp_path / "own.png")
    np.testing.assert_array_equal(own, picture(volumes, tmp_path / "canonical.png"))


def test_a_patient_without_any_organ_still_has_a_picture(tmp_path):
    nothing = (slice(0, 0), slice(0, 0), slice(0, 0))
    pixels = picture(patient(nothing), tmp_path / "deeper" / "p.png")
    assert where(pixels, PURPLE)[0].size == 0
    assert len(where(pixels, (255, 255, 255))[0]) > 100


def test_a_scan_of_one_column_and_a_title_with_dollars_make_a_picture(tmp_path):
    volumes = [on_grid(np.ones((40, 100, 1), dtype)) for dtype in (np.float32, np.uint8, np.uint8)]
    overlay_figure(volumes[0], volumes[1], volumes[2], tmp_path / "p.png", "a $patient_{ of $2")
    assert matplotlib.image.imread(tmp_path / "p.png").shape[0] < 2000


def test_masks_on_another_grid_are_refused(tmp_path):
    scan, predicted, true = patient((slice(8, 30), slice(20, 60), slice(10, 55)))
    moved = Volume(true.voxels, true.affine + np.eye(4, k=3))
    with pytest.raises(ValueError, match="received true with"):
        overlay_figure(scan, predicted, moved, tmp_path / "p.png", "a patient")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def stop_half_way(self, path, **_):
        Path(path).write_bytes(b"\x89PNG half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", stop_half_way)
    with pytest.raises(OSError, match="disk full"):
        overlay_figure(*patient((slice(8, 30), slice(20, 60), slice(10, 55))), tmp_path / "p.png", "a patient")
    assert list(tmp_path.iterdir()) == []
