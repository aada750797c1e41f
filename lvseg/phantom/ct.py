"""Simulated CT: one slice a patient, of the liver, of the abdomen or of both thighs, in Hounsfield units.

Axes. Slices are canonical grids ([slice, row, column] towards head, back and the patient's left), 1 x 512 x 512, as
scanners store a CT of a patient on the back: the first row in front, the first column at the patient's right. The
reconstruction field, 360 to 500 mm wide, is drawn to fit the patient, as an operator chooses it; the slice is 5 mm
thick, and that is what the affine says between slices.

What the scanner makes of the tissues: partial volume by several samples through the slice; texture, and streaks of fat
within muscle; the table, which is no part of the patient; the blur of a soft-tissue kernel; and noise with the spectrum
of filtered back-projection, which rises with frequency until the kernel ends it (Kijewski and Judy, Phys Med Biol
1987;32:565) and is strongest in the middle of the body, with some streaks along its longest way through. Values end at
-1024 and 3071 as in files of twelve bits; some scanners pad what lies outside the round field of view with -3024
(-2000 before the intercept of -1024), the others reconstruct the whole square.

All for 120 kV. Arithmetic per voxel is restricted as in `lvseg.phantom.anatomy`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar
from typing import Protocol as Interface

import numpy as np
import numpy.typing as npt

from lvseg.phantom.anatomy import WHOLE_LIVER, Anatomy, Tissue
from lvseg.phantom.fields import draw_controls, smooth_field
from lvseg.phantom.patients import draw_anatomy, random_stream
from lvseg.phantom.scan import Scan
from lvseg.phantom.shapes import f32
from lvseg.phantom.thigh import draw_thighs
from lvseg.volume import Volume

SIZE, SLICE_MM = 512, 5.0
SMALLEST_FIELD_MM, LARGEST_FIELD_MM = 360, 500  # the larger is what fits a gantry's detector
# Where a voxel is sampled: mm through the slice, and pixels from its centre along rows and columns. The centre comes
# first: it decides the label. Each axis is covered evenly.
SAMPLES = ((0.0, 0.0, 0.0), (-2.0, 0.2, -0.4), (-1.0, -0.4, 0.2), (1.0, 0.4, -0.2), (2.0, -0.2, 0.4))
LOWEST_HU, HIGHEST_HU, PADDING_HU = -1024, 3071, -3024
PADDED_SHARE = 0.35  # of the patients, as in sets of several makers

BLUR_MM, NOISE_BLUR_MM = 0.45, 0.55  # standard deviations of the kernel's point spread and of the noise's
STREAKS_SHARE = 0.12  # of the noise's variance
TEXTURES_MM = (3.5, 10.0)  # scales of a tissue's unevenness
MARBLING_MM, MARBLED_REGIONS_MM = 2.8, 12.0

LEAN_LIVER_HU, PURE_FAT_HU = 66.0, -106.0
"""Ends of the mixture in a fatty liver: their line is -1.7 HU for each percent of proton density fat fraction, the
calibration 0.58 percent for each HU below 66 (Starekova et al., Radiology 2021;301:250)."""


@dataclass(frozen=True)
class Attenuation:
    """How a tissue looks on CT, in HU.

    Args:
        hu: unenhanced mean.
        between: standard deviation between patients.
        within: standard deviation of the texture within the tissue.
        uptake: what iodine adds in the portal-venous phase.
    """

    hu: float
    between: float
    within: float
    uptake: float = 0.0


# Unenhanced means at 120 kV within the ranges that radiology texts give: fat -110 to -90, muscle 40 to 60, spleen 45 to
# 50, liver about 10 above it, kidney 30 to 35, blood 40 to 45, bile 0 to 15. Portal-venous phase, 70 s after injection:
# liver 105 to 115, spleen 120, portal vein 165.
ATTENUATION: Mapping[Tissue, Attenuation] = {
    Tissue.AIR: Attenuation(-1000, 0, 0),
    Tissue.SKIN: Attenuation(25, 8, 8, 8),
    Tissue.FAT: Attenuation(-105, 3, 5),
    Tissue.VISCERAL_FAT: Attenuation(-100, 4, 8),
    Tissue.MUSCLE: Attenuation(54, 5, 5, 10),
    Tissue.BONE: Attenuation(750, 80, 60),
    Tissue.MARROW: Attenuation(165, 40, 22, 15),  # trabecular bone of vertebrae
    Tissue.DISC: Attenuation(85, 8, 6, 3),
    Tissue.SPINAL_FLUID: Attenuation(18, 4, 4),  # with the nerve roots in it
    Tissue.LUNG: Attenuation(-845, 30, 40, 12),
    Tissue.HEART: Attenuation(43, 3, 4, 70),
    Tissue.BLOOD: Attenuation(42, 4, 2, 110),
    Tissue.LIVER: Attenuation(LEAN_LIVER_HU, 4, 3, 50),
    Tissue.HEPATIC_VESSEL: Attenuation(42, 4, 2, 115),
    Tissue.SPLEEN: Attenuation(48, 3, 3, 72),
    Tissue.KIDNEY: Attenuation(33, 3, 3, 150),
    Tissue.KIDNEY_MEDULLA: Attenuation(31, 3, 3, 130),
    Tissue.STOMACH: Attenuation(40, 4, 5, 40),
    Tissue.STOMACH_CONTENT: Attenuation(12, 10, 8),
    Tissue.BOWEL: Attenuation(38, 4, 6, 45),
    Tissue.BOWEL_CONTENT: Attenuation(25, 14, 22),
    Tissue.GAS: Attenuation(-985, 5, 5),
    Tissue.GALLBLADDER: Attenuation(8, 4, 2),
    Tissue.PANCREAS: Attenuation(40, 5, 9, 55),
    Tissue.VENOUS_BLOOD: Attenuation(42, 4, 2, 95),
    Tissue.PORTAL_BLOOD: Attenuation(42, 4, 2, 123),
    Tissue.PORTAL_VESSEL: Attenuation(42, 4, 2, 123),
    Tissue.CYST: Attenuation(6, 4, 1),
    Tissue.LESION: Attenuation(44, 7, 5, 30),
    Tissue.FOCAL_FAT: Attenuation(LEAN_LIVER_HU, 4, 4, 50),
    Tissue.CONNECTIVE: Attenuation(65, 6, 6, 5),
    Tissue.INTERMUSCULAR_FAT: Attenuation(-94, 4, 7),
    Tissue.FREE_FLUID: Attenuation(8, 5, 2),
}
# The shaft of the femur is dense, and its marrow is fat.
THIGH_ATTENUATION: Mapping[Tissue, Attenuation] = {
    **ATTENUATION,
    Tissue.BONE: Attenuation(1180, 90, 40),
    Tissue.MARROW: Attenuation(-45, 20, 12),
}
SAME_BLOOD = (
    Tissue.BLOOD, Tissue.VENOUS_BLOOD, Tissue.HEPATIC_VESSEL, Tissue.PORTAL_BLOOD, Tissue.PORTAL_VESSEL, Tissue.HEART,
)  # fmt: skip
SAME_LIVER = (Tissue.LIVER, Tissue.FOCAL_FAT)


class Body(Interface):
    """Anything that knows its tissues: an abdomen or a pair of thighs."""

    def tissues(self, x_mm: npt.ArrayLike, y_mm: npt.ArrayLike, z_mm: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """The map of tissues, uint8 [slices, rows, columns]."""


@dataclass(frozen=True)
class Subject:
    """A patient on the table, with the slice chosen.

    Args:
        body: the anatomy.
        z_mm: middle of the slice.
        hu: float32 [tissues], this patient's attenuation; `within` the texture's standard deviation.
        marbling: share of fat in the middle of the streaks within muscle, 0 to 1.
        facts: columns of the truth that follow from the patient.
    """

    body: Body
    z_mm: float
    hu: npt.NDArray[np.float32]
    within: npt.NDArray[np.float32]
    marbling: float
    facts: Mapping[str, float]


@dataclass(frozen=True)
class Label:
    """A class of the mask: its name in the truth's columns, and the tissues it takes in."""

    name: str
    tissues: tuple[Tissue, ...]


@dataclass(frozen=True)
class CtProtocol:
    """A protocol of one slice a patient.

    Args:
        name: as in files and cards.
        task: what its masks are for, as in cards.
        labels: classes of the mask, 1 for the first; all else is background, 0.
        noise_hu: median standard deviation of the noise in the middle of a body of average size.
        padded: share of patients whose scanner pads the corners of the field.
        also: tissues whose area the truth gives too.
        place: draws a patient and the level of the slice.
    """

    name: str
    task: str
    labels: tuple[Label, ...]
    noise_hu: float
    padded: float
    also: tuple[Label, ...]
    place: Callable[[int, int], Subject]
    varied: ClassVar[bool] = False

    def image(self, seed: int, number: int) -> Scan:
        """Draws one patient and scans it.

        Args:
            seed: of the set of patients, at least 0.
            number: of the patient within the set, at least 0.

        Returns:
            Volumes [1, 512, 512]: image int16 in HU, mask and tissues uint8. The truth holds, for each label,
            ``<label>_area_cm2``, the mean through the slice within the field of view, from several samples a voxel;
            ``<label>_area_in_mask_cm2``; ``<label>_mean_hu`` within the mask before noise; ``noise_hu`` in the middle
            of the body; and the facts of the patient.
        """
        subject = self.place(seed, number)
        draw = random_stream(seed, number, f"scan {self.name}")
        outline = _outline(subject)
        field = _choose_field(outline, draw)

        tissues = np.zeros((SIZE, SIZE), dtype=np.uint8)
        counts = np.zeros(len(Tissue), dtype=np.int64)
        clean = np.full((SIZE, SIZE), len(SAMPLES) * subject.hu[Tissue.AIR], dtype=np.float32)
        uneven = np.zeros((SIZE, SIZE), dtype=np.float32)
        muscle = np.zeros((SIZE, SIZE), dtype=np.float32)
        air = np.full((SIZE, SIZE), len(SAMPLES), dtype=np.float32)
        box = outline.box(field)
        for through_mm, row, column in SAMPLES:
            sample = subject.body.tissues(
                field.x_mm[box[1]] + column * field.pixel_mm,
                field.y_mm[box[0]] + row * field.pixel_mm,
                np.array([subject.z_mm + through_mm]),
            )[0]
            counts += np.bincount(sample.ravel(), minlength=len(Tissue))
            clean[box] += subject.hu[sample] - subject.hu[Tissue.AIR]
            uneven[box] += subject.within[sample]
            muscle[box] += sample == Tissue.MUSCLE
            air[box] -= sample != Tissue.AIR
            if through_mm == 0.0:
                tissues[box] = sample
        for total in (clean, uneven, muscle, air):
            total *= f32(1.0 / len(SAMPLES))

        _add_texture(clean, uneven, muscle, subject, field, random_stream(seed, number, f"texture {self.name}"))
        clean += air * _table(outline, field, draw)
        clean = _blur(np.pad(clean, 1, mode="edge"), BLUR_MM / field.pixel_mm)[1:-1, 1:-1]

        size_mm = float(np.sqrt((outline.right - outline.left) * (outline.back - outline.front)))
        noise_hu = self.noise_hu * float(np.exp(0.18 * _normal(draw))) * size_mm / 300.0
        noise = correlated_noise(random_stream(seed, number, f"noise {self.name}"), field.pixel_mm)
        noise *= f32(noise_hu)
        noise *= _noise_profile(outline, field)
        offset_hu = 1.5 * _normal(draw)  # scanners differ by some HU (Lamba et al., Am J Roentgenol 2014;203:1013)
        image = np.clip(np.rint(clean + noise + f32(offset_hu)), LOWEST_HU, HIGHEST_HU).astype(np.int16)
        if draw.random() < self.padded and outline.radius_mm(field) < 0.5 * field.pixel_mm * SIZE:
            image[field.outside_circle()] = PADDING_HU

        mask = np.zeros_like(tissues)
        truth: dict[str, float] = {}
        pixel_cm2 = field.pixel_mm**2 / 100.0
        for value, label in enumerate(self.labels, start=1):
            inside = np.isin(tissues, label.tissues)
            mask[inside] = value
            truth[f"{label.name}_area_cm2"] = float(counts[list(label.tissues)].sum()) * pixel_cm2 / len(SAMPLES)
            truth[f"{label.name}_area_in_mask_cm2"] = float(np.count_nonzero(inside)) * pixel_cm2
            truth[f"{label.name}_mean_hu"] = float(clean[inside].mean(dtype=np.float64))
        for label in self.also:
            truth[f"{label.name}_area_cm2"] = float(counts[list(label.tissues)].sum()) * pixel_cm2 / len(SAMPLES)
        affine = field.affine(subject.z_mm)
        return Scan(
            images={"image": _volume(image, affine)},
            mask=_volume(mask, affine),
            tissues=_volume(tissues, affine),
            truth={**truth, **subject.facts, "noise_hu": noise_hu, "slice_z_mm": subject.z_mm},
        )


def liver_hu(fat_percent: float, lean_hu: float = LEAN_LIVER_HU) -> float:
    """Attenuation in HU of liver with this proton density fat fraction in percent: a mixture of lean liver and fat."""
    share = fat_percent / 100.0
    return (1.0 - share) * lean_hu + share * PURE_FAT_HU


def correlated_noise(draw: np.random.Generator, pixel_mm: float) -> npt.NDArray[np.float32]:
    """Noise as filtered back-projection leaves it, standard deviation 1, float32 [512, 512].

    White noise, blurred as the kernel does, less most of its low frequencies, and some streaks from side to side.
    """
    reach = 2 * (1 + 1 + 2 + 4 + 8)  # of the filters on either side
    blur_px = NOISE_BLUR_MM / pixel_mm
    impulse = np.zeros((2 * reach + 1, 2 * reach + 1), dtype=np.float32)
    impulse[reach, reach] = 1.0
    noise = np.zeros((SIZE, SIZE), dtype=np.float32)
    for share, spread in ((1.0 - STREAKS_SHARE, lambda white: _band_pass(white, blur_px)), (STREAKS_SHARE, _streaks)):
        white = draw.standard_normal((SIZE + 2 * reach, SIZE + 2 * reach), dtype=np.float32)
        gain = (share / float(np.square(spread(impulse), dtype=np.float64).sum())) ** 0.5
        noise += spread(white)[reach:-reach, reach:-reach] * f32(gain)
    return noise


def _band_pass(white: npt.NDArray[np.float32], blur_px: float) -> npt.NDArray[np.float32]:
    fine = _blur(white, blur_px)
    middle = _spread(_spread(fine, 0, (1, 2)), 1, (1, 2))
    coarse = _spread(_spread(middle, 0, (4, 8)), 1, (4, 8))
    return fine - f32(0.52) * middle - f32(0.42) * coarse


def _streaks(white: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    along = _spread(white, 1, (1, 2, 4, 8))
    return _spread(along, 0, (1,)) - f32(0.9) * _spread(along, 0, (1, 2, 4))


def _spread(values: npt.NDArray[np.float32], axis: int, steps: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Weights of 1/4, 1/2, 1/4 at each of these distances in turn; the array goes round."""
    for step in steps:
        both = np.roll(values, step, axis) + np.roll(values, -step, axis)
        values = f32(0.5) * values + f32(0.25) * both
    return values


def _blur(values: npt.NDArray[np.float32], sd_px: float) -> npt.NDArray[np.float32]:
    """Three weights along rows and columns with this standard deviation, at most 0.7 pixels; the array goes round."""
    side = min(0.5 * sd_px * sd_px, 0.25)
    for axis in (0, 1):
        both = np.roll(values, 1, axis) + np.roll(values, -1, axis)
        values = f32(1.0 - 2.0 * side) * values + f32(side) * both
    return values


@dataclass(frozen=True)
class Field:
    """The reconstructed square: positions of its columns and rows in mm."""

    x_mm: npt.NDArray[np.float64]
    y_mm: npt.NDArray[np.float64]
    pixel_mm: float

    def affine(self, z_mm: float) -> npt.NDArray[np.float64]:
        """Voxel index (slice, row, column) to LPS mm, float64 [4, 4]."""
        affine = np.diag([0.0, 0.0, 0.0, 1.0])
        affine[2, 0], affine[1, 1], affine[0, 2] = SLICE_MM, self.pixel_mm, self.pixel_mm
        affine[:3, 3] = self.x_mm[0], self.y_mm[0], z_mm
        return affine

    def outside_circle(self) -> npt.NDArray[np.bool_]:
        """Pixels beyond the round field of view, bool [rows, columns]."""
        offset = np.arange(SIZE) - 0.5 * (SIZE - 1)
        return (offset * offset)[:, None] + offset * offset > (0.5 * SIZE) ** 2


@dataclass(frozen=True)
class Outline:
    """Where the body ends, in mm: its box, all its points on a coarse grid, and how far back it reaches in a column."""

    left: float
    right: float
    front: float
    back: float
    points_mm: npt.NDArray[np.float64]
    columns_mm: npt.NDArray[np.float64]
    backs_mm: npt.NDArray[np.float64]

    def box(self, field: Field, margin_mm: float = 8.0) -> tuple[slice, slice]:
        """Rows and columns of the field that hold the body."""
        rows = np.searchsorted(field.y_mm, (self.front - margin_mm, self.back + margin_mm))
        columns = np.searchsorted(field.x_mm, (self.left - margin_mm, self.right + margin_mm))
        return slice(*rows), slice(*columns)

    def radius_mm(self, field: Field) -> float:
        """How far the body reaches from the middle of the field."""
        middle = 0.5 * (field.x_mm[0] + field.x_mm[-1]), 0.5 * (field.y_mm[0] + field.y_mm[-1])
        squares = (self.points_mm[:, 0] - middle[0]) ** 2 + (self.points_mm[:, 1] - middle[1]) ** 2
        return float(np.sqrt(squares.max())) + 4.0


def _outline(subject: Subject) -> Outline:
    x, y = np.arange(-296.0, 297.0, 4.0), np.arange(-236.0, 237.0, 4.0)
    body = subject.body.tissues(x, y, np.array([subject.z_mm]))[0] != Tissue.AIR
    rows, columns = np.nonzero(body)
    filled = np.flatnonzero(body.any(axis=0))
    backs = y[len(y) - 1 - body[::-1, filled].argmax(axis=0)]
    return Outline(
        left=float(x[columns.min()]),
        right=float(x[columns.max()]),
        front=float(y[rows.min()]),
        back=float(y[rows.max()]),
        points_mm=np.stack([x[columns], y[rows]], axis=1),
        columns_mm=x[filled],
        backs_mm=backs,
    )


def _choose_field(outline: Outline, draw: np.random.Generator) -> Field:
    """A round number of millimetres about the body, which lies a little off the middle."""
    wide_mm = max(outline.right - outline.left, outline.back - outline.front)
    field_mm = int(min(max(wide_mm + draw.uniform(24.0, 110.0), SMALLEST_FIELD_MM), LARGEST_FIELD_MM))
    pixel_mm = field_mm / SIZE
    spare = max(0.0, 0.5 * (field_mm - wide_mm) - 6.0)
    middle_x = 0.5 * (outline.left + outline.right) + draw.uniform(-0.5, 0.5) * spare
    middle_y = 0.5 * (outline.front + outline.back) + draw.uniform(0.0, 0.5) * spare  # room is left for the table

    def axis(middle_mm: float) -> npt.NDArray[np.float64]:
        # Scanners report positions to some decimals; thousandths also survive the float32 of file headers.
        return round(middle_mm - 0.5 * (SIZE - 1) * pixel_mm, 3) + np.arange(SIZE) * pixel_mm

    return Field(axis(middle_x), axis(middle_y), pixel_mm)


def _noise_profile(outline: Outline, field: Field) -> npt.NDArray[np.float32]:
    """Standard deviation of the noise over that in the middle of the body, float32 [rows, columns]."""
    across = (field.x_mm - 0.5 * (outline.left + outline.right)) / (0.5 * (outline.right - outline.left))
    deep = (field.y_mm - 0.5 * (outline.front + outline.back)) / (0.5 * (outline.back - outline.front))
    return (1.0 / (1.0 + 0.5 * ((deep * deep)[:, None] + across * across))).astype(np.float32)


def _table(outline: Outline, field: Field, draw: np.random.Generator) -> npt.NDArray[np.float32]:
    """What the patient table adds to air, in HU: a mat on a hollowed shell of carbon fibre filled with foam.

    Returns:
        float32 [rows, columns].
    """
    half_mm, depth_mm = float(draw.uniform(205.0, 225.0)), float(draw.uniform(32.0, 55.0))
    bend = 1.0 / (2.0 * float(draw.uniform(450.0, 800.0)))
    mat_mm = float(draw.uniform(4.0, 12.0))
    shell_mm, shell_hu = float(draw.uniform(2.0, 3.5)), float(draw.uniform(850.0, 1250.0))
    middle_x = 0.5 * (outline.left + outline.right) + float(draw.uniform(-6.0, 6.0))
    on_table = np.abs(outline.columns_mm - middle_x) < half_mm
    offset = outline.columns_mm[on_table] - middle_x
    lowest_mm = float((outline.backs_mm[on_table] + bend * offset * offset).max()) + 5.0 + 0.3 * mat_mm

    x = field.x_mm - middle_x
    top = lowest_mm - bend * x * x
    bottom = top + depth_mm * np.maximum(1.0 - (x / half_mm) ** 2, 0.0)
    y = field.y_mm[:, None]
    pixel_mm = field.pixel_mm

    def within(low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.clip(np.minimum(y - low, high - y) / pixel_mm + 0.5, 0.0, 1.0)

    shells = np.maximum(within(top, top + shell_mm), within(bottom - shell_mm, bottom))
    added = np.maximum(shell_hu * shells, np.maximum(60.0 * within(top, bottom), 45.0 * within(top - mat_mm, top)))
    return (added * np.clip((half_mm - np.abs(x)) / pixel_mm + 0.5, 0.0, 1.0)).astype(np.float32)


def _add_texture(
    clean: npt.NDArray[np.float32],
    uneven: npt.NDArray[np.float32],
    muscle: npt.NDArray[np.float32],
    subject: Subject,
    field: Field,
    draw: np.random.Generator,
) -> None:
    """Adds each tissue's unevenness, and streaks of fat where fascicles of a muscle meet."""

    def random_field(spacing_mm: float) -> npt.NDArray[np.float32]:
        return smooth_field(draw_controls(draw, (620.0, 620.0), spacing_mm), spacing_mm, (field.y_mm, field.x_mm))

    for spacing_mm in TEXTURES_MM:
        clean += uneven * random_field(spacing_mm) * f32(0.71)
    streaks = np.maximum(f32(1.0) - np.abs(random_field(MARBLING_MM)) * f32(1.8), f32(0.0))
    streaks *= np.clip(f32(0.3) + f32(0.6) * random_field(MARBLED_REGIONS_MM), f32(0.0), f32(1.0))
    clean -= muscle * streaks * f32(subject.marbling * float(subject.hu[Tissue.MUSCLE] - PURE_FAT_HU))


def _draw_attenuation(
    table: Mapping[Tissue, Attenuation], draw: np.random.Generator, iodine: float, overrides: Mapping[Tissue, float]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """This patient's HU and texture of every tissue.

    Args:
        table: the means.
        draw: the random stream.
        iodine: 0 without contrast medium, about 1 in the portal-venous phase.
        overrides: HU added to the mean of a tissue.
    """
    drawn = [tissue for tissue in Tissue if tissue != Tissue.FREE_FLUID]
    off: dict[Tissue, float] = {tissue: _normal(draw) for tissue in drawn}
    off[Tissue.FREE_FLUID] = off[Tissue.SPINAL_FLUID]
    for group in (SAME_BLOOD, SAME_LIVER):
        off.update(dict.fromkeys(group, off[group[0]]))
    hu = [
        row.hu + row.between * off[tissue] + iodine * row.uptake + overrides.get(tissue, 0.0)
        for tissue, row in ((tissue, table[tissue]) for tissue in Tissue)
    ]
    return np.array(hu, dtype=np.float32), np.array([table[tissue].within for tissue in Tissue], dtype=np.float32)


def _place_torso(
    seed: int, number: int, purpose: str, enhanced: float, level: Callable[[Anatomy, np.random.Generator], float]
) -> Subject:
    """A patient of `lvseg.phantom.patients`, of whom a share `enhanced` was given contrast medium."""
    anatomy = draw_anatomy(seed, number)
    draw = random_stream(seed, number, f"attenuation {purpose}")
    iodine = float(draw.random() < enhanced) * (1.0 + 0.13 * _normal(draw))
    oral_hu = float(draw.random() < 0.2) * float(draw.uniform(90.0, 240.0))
    fat, focal = anatomy.liver_fat_percent, anatomy.focal_fat_percent
    uptake = ATTENUATION[Tissue.LIVER].uptake * iodine
    overrides = {
        Tissue.LIVER: liver_hu(fat) - LEAN_LIVER_HU - 0.01 * fat * uptake,
        Tissue.FOCAL_FAT: liver_hu(focal) - LEAN_LIVER_HU - 0.01 * focal * uptake,
        Tissue.STOMACH_CONTENT: oral_hu,
        Tissue.BOWEL_CONTENT: 0.8 * oral_hu,
    }
    hu, within = _draw_attenuation(ATTENUATION, draw, iodine, overrides)
    facts = {
        "liver_fat_percent": fat,
        "contrast_enhanced": float(iodine > 0),
    }
    return Subject(anatomy, level(anatomy, draw), hu, within, float(draw.uniform(0.05, 0.5)), facts)


def _present(anatomy: Anatomy, tissues: tuple[Tissue, ...]) -> npt.NDArray[np.float64]:
    """Levels, every 4 mm, at which there is one of these tissues, ascending."""
    across, deep, levels = np.arange(-200.0, 201.0, 8.0), np.arange(-150.0, 151.0, 8.0), np.arange(-240.0, 161.0, 4.0)
    return levels[np.isin(anatomy.tissues(across, deep, levels), tissues).any(axis=(1, 2))]


def _mid_liver(anatomy: Anatomy, draw: np.random.Generator) -> float:
    """A level about the middle of the liver's height."""
    levels = _present(anatomy, WHOLE_LIVER)
    return round(float(levels[0] + (levels[-1] - levels[0]) * draw.uniform(0.46, 0.72)), 3)


def _below_kidneys(anatomy: Anatomy, draw: np.random.Generator) -> float:
    """The level of the fourth lumbar vertebra and the navel, a little below the lower pole of the lower kidney."""
    levels = _present(anatomy, (Tissue.KIDNEY, Tissue.KIDNEY_MEDULLA))
    return round(float(levels[0] - draw.uniform(12.0, 34.0)), 3)


def _place_liver(seed: int, number: int) -> Subject:
    subject = _place_torso(seed, number, "ct_liver", 0.5, _mid_liver)
    parenchyma = {"liver_parenchyma_hu": float(subject.hu[Tissue.LIVER])}
    return replace(subject, facts={**subject.facts, **parenchyma})


def _place_abdomen(seed: int, number: int) -> Subject:
    return _place_torso(seed, number, "ct_abdomen", 0.25, _below_kidneys)


def _place_thighs(seed: int, number: int) -> Subject:
    """Both thighs at mid-femur, without contrast medium; muscle holds more fat in the old.

    In the Health ABC study it had 37 HU in men and 35 HU in women of 70 to 79 years (Goodpaster et al., J Appl Physiol
    2001;90:2157).
    """
    thighs = draw_thighs(seed, number)
    draw = random_stream(seed, number, "attenuation ct_thigh")
    old = (thighs.age_years - 30.0) / 55.0
    hu, within = _draw_attenuation(THIGH_ATTENUATION, draw, 0.0, {Tissue.MUSCLE: 3.0 - 15.0 * old})
    marbling = min(max(0.12 + 0.5 * old + 0.15 * _normal(draw), 0.02), 0.9)
    facts = {"age_years": thighs.age_years, "male": float(thighs.male)}
    return Subject(thighs, round(float(draw.uniform(-12.0, 12.0)), 3), hu, within, marbling, facts)


def _volume(voxels: npt.NDArray, affine: npt.NDArray[np.float64]) -> Volume:
    return Volume(voxels[np.newaxis], affine, metadata={"modality": "CT"})


def _normal(draw: np.random.Generator) -> float:
    """Standard normal without the tails beyond 2.2."""
    return min(max(float(draw.standard_normal()), -2.2), 2.2)


PROTOCOLS: Mapping[str, CtProtocol] = {
    protocol.name: protocol
    for protocol in (
        CtProtocol("ct_liver", "ct_liver", (Label("liver", WHOLE_LIVER),), 11.0, PADDED_SHARE, (), _place_liver),
        CtProtocol(
            "ct_abdomen",
            "ct_abdomen",
            (Label("visceral_fat", (Tissue.VISCERAL_FAT,)), Label("subcutaneous_fat", (Tissue.FAT,))),
            10.0,
            PADDED_SHARE,
            (Label("muscle", (Tissue.MUSCLE,)),),
            _place_abdomen,
        ),
        # Connective tissue is what is fibrous: fascia lata, septa, tendons, the sheath of the sciatic nerve. Skin, bone
        # and vessels are background.
        CtProtocol(
            "ct_thigh",
            "ct_thigh",
            (
                Label("fat", (Tissue.FAT, Tissue.INTERMUSCULAR_FAT)),
                Label("connective", (Tissue.CONNECTIVE,)),
                Label("muscle", (Tissue.MUSCLE,)),
            ),
            9.0,
            PADDED_SHARE,
            (Label("subcutaneous_fat", (Tissue.FAT,)), Label("intermuscular_fat", (Tissue.INTERMUSCULAR_FAT,))),
            _place_thighs,
        ),
    )
}
