"""A patient as a function of space: which tissue lies at a point.

Axes. Positions are world millimetres in LPS: x towards the patient's left, y towards the back, z towards the head. The
origin lies on the midline, in the middle of the abdominal cavity from front to back, at about the middle of the liver's
height. The grids evaluated here are canonical: [slice, row, column] = [z, y, x], all ascending.

A patient is drawn once (`lvseg.phantom.patients`): torso, diaphragm, organs made of smooth implicit shapes, and one
smooth random displacement of the whole. Nothing has a resolution until `Anatomy.tissues` is asked for a grid, so the
same patient can be scanned by any scanner.

What is computed for every voxel uses only additions, multiplications, divisions and square roots in float32, which IEEE
754 rounds the same way everywhere; exponentials and angles occur in the drawing of a patient alone, and sums of
products in the coarse displacement, both in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import reduce

import numpy as np
import numpy.typing as npt

from lvseg.phantom.shapes import Corners, Cut, Field, Point, Shape, f32, smooth_minimum, two_sided_square


class Tissue(IntEnum):
    """What a voxel is made of; the numbers are stored in files and never change."""

    AIR = 0
    SKIN = 1
    FAT = 2
    """Subcutaneous."""
    VISCERAL_FAT = 3
    MUSCLE = 4
    BONE = 5
    """Cortical bone."""
    MARROW = 6
    DISC = 7
    SPINAL_FLUID = 8
    LUNG = 9
    HEART = 10
    BLOOD = 11
    """Arterial: aorta and the left heart."""
    LIVER = 12
    HEPATIC_VESSEL = 13
    """Hepatic veins inside the liver: part of it, as operators draw it."""
    SPLEEN = 14
    KIDNEY = 15
    """Renal cortex."""
    KIDNEY_MEDULLA = 16
    STOMACH = 17
    """Stomach wall."""
    STOMACH_CONTENT = 18
    BOWEL = 19
    """Bowel wall."""
    BOWEL_CONTENT = 20
    GAS = 21
    GALLBLADDER = 22
    PANCREAS = 23
    VENOUS_BLOOD = 24
    """Vena cava and the right heart."""
    PORTAL_BLOOD = 25
    """Portal trunk and splenic vein, outside the liver."""
    PORTAL_VESSEL = 26
    """Branches of the portal vein inside the liver."""
    CYST = 27
    """Fluid inside the liver."""
    LESION = 28
    """Solid, inside the liver."""
    FOCAL_FAT = 29
    """Liver with more fat than the rest of it."""
    CONNECTIVE = 30
    """Fascia, tendon and other fibrous tissue."""
    INTERMUSCULAR_FAT = 31
    FREE_FLUID = 32
    """In the abdomen, in the chest and in cysts of the kidneys."""


WHOLE_LIVER = (
    Tissue.LIVER,
    Tissue.HEPATIC_VESSEL,
    Tissue.PORTAL_VESSEL,
    Tissue.CYST,
    Tissue.LESION,
    Tissue.FOCAL_FAT,
)

SUPPORTING_TISSUE_MM = 2.0  # diaphragm and peritoneum, between an organ and the wall of its cavity
RIB_PITCH_MM = 30.0
CONTROL_SPACING_MM = 45.0
CONTROL_HALF_EXTENT_MM = 315.0  # the displacement is zero beyond: no body reaches there
SLAB_VOXELS = 160_000  # evaluated at a time: the temporary fields stay in the processor's cache


class Region(IntEnum):
    """Where an organ may lie; it is cut off at the region's border."""

    BODY = 0
    ABDOMEN = 1
    THORAX = 2


@dataclass(frozen=True)
class Organ:
    """Something painted into the patient, over what was painted before it.

    Args:
        shapes: joined smoothly over `blend_mm`.
        shells: (distance, tissue) from the outside in: the tissue lies within that distance of the surface, in mm,
            negative inside. A positive distance of VISCERAL_FAT is the fat around the organ.
        region: where it may lie.
        margin_mm: kept from the border of the region.
        cuts: planes that end it, rounded over `blend_mm`.
        only_in: the one tissue that it replaces, None for any.
    """

    shapes: tuple[Shape, ...]
    shells: tuple[tuple[float, Tissue], ...]
    region: Region = Region.ABDOMEN
    margin_mm: float = SUPPORTING_TISSUE_MM
    blend_mm: float = 0.0
    cuts: tuple[Cut, ...] = ()
    only_in: Tissue | None = None

    def box_mm(self) -> Corners:
        """Lowest and highest corner of all that it paints, float64 [3] each."""
        corners = [shape.box_mm() for shape in self.shapes]
        grow = max(0.0, self.shells[0][0]) * 1.5 + self.blend_mm  # distances are to first order, so with some room
        lowest = np.min([corner[0] for corner in corners], axis=0) - grow
        return lowest, np.max([corner[1] for corner in corners], axis=0) + grow

    def distance_mm(self, x: Field, y: Field, z: Field, wall: Field, diaphragm: Field) -> Field:
        """Distance to its surface, negative inside; `wall` and `diaphragm` are the distances `Torso` gives."""
        join_mm = self.blend_mm
        inside = reduce(
            lambda first, second: smooth_minimum(first, second, join_mm),
            (shape.distance_mm(x, y, z) for shape in self.shapes),
        )
        for cut in self.cuts:
            inside = -smooth_minimum(-inside, -cut.distance_mm(x, y, z), join_mm)
        if self.region is Region.BODY:
            return inside
        inside = np.maximum(inside, wall + f32(self.margin_mm))
        if self.region is Region.ABDOMEN:
            return np.maximum(inside, diaphragm + f32(self.margin_mm))
        return np.maximum(inside, f32(self.margin_mm) - diaphragm)


@dataclass(frozen=True)
class Dome:
    """One half of the diaphragm: its top, and how fast it falls (1/mm) towards side, middle, front and back."""

    top_mm: Point
    fall_right: float
    fall_left: float
    fall_front: float
    fall_back: float

    def height_mm(self, x: Field, y: Field) -> Field:
        """z of the surface over (x, y)."""
        return (
            f32(self.top_mm[2])
            - two_sided_square(x - f32(self.top_mm[0]), self.fall_right, self.fall_left)
            - two_sided_square(y - f32(self.top_mm[1]), self.fall_front, self.fall_back)
        )


@dataclass(frozen=True)
class Torso:
    """Skin, fat, body wall with its muscles and ribs, and the cavity inside, divided by the diaphragm.

    Thicknesses and half diameters are (side, front, back), in mm. The wall of the belly is the rectus muscles in front,
    with the linea alba between them and the semilunar lines beside them, and three flat muscles at the side, with thin
    planes of fat between them. Over the ribs it is the muscles between the ribs, and the broad muscle of the back
    outside them; towards the front fat takes that muscle's place.
    """

    cavity_mm: Point
    wall_mm: Point
    fat_mm: Point
    skin_mm: float
    rectus_mm: float
    """Half the width of both rectus muscles."""
    plane_mm: float
    """Thickness of the planes of fat between muscles."""
    squareness: float
    chest_taper: float
    waist_taper: float
    domes: tuple[Dome, Dome]
    rib_phase: float
    costal_margin_mm: float

    def paint(self, x: Field, y: Field, z: Field) -> tuple[npt.NDArray[np.uint8], Field, Field]:
        """Tissues without organs, and the distances that confine organs.

        Returns:
            tissues: uint8 in the shape of x; the abdomen is all visceral fat, the thorax all lung.
            wall: float32, distance to the cavity's wall in mm, negative inside.
            diaphragm: float32, height over the diaphragm in mm, negative below.
        """
        across = x / self._narrowed(z)
        cavity = np.array(self.cavity_mm)
        muscle = cavity + self.wall_mm
        body = muscle + self.fat_mm

        outer = self._radius(across, y, body)
        cavity_radius = self._radius(across, y, cavity)
        wall = np.sqrt(across * across + y * y) * (f32(1.0) - f32(1.0) / (cavity_radius + f32(1e-6)))
        right, left = (dome.height_mm(x, y) for dome in self.domes)
        diaphragm = z + smooth_minimum(-right, -left, 14.0)

        tissues = np.zeros(x.shape, dtype=np.uint8)
        np.putmask(tissues, outer < 1, Tissue.SKIN)
        np.putmask(tissues, outer < f32(1.0 - self.skin_mm / body.mean()), Tissue.FAT)
        np.putmask(tissues, self._radius(across, y, muscle) < 1, Tissue.MUSCLE)
        self._paint_wall(tissues, x, y, z, wall)
        inside = wall < 0
        np.putmask(tissues, inside, Tissue.MUSCLE)
        np.putmask(tissues, inside & (diaphragm < f32(-0.5 * SUPPORTING_TISSUE_MM)), Tissue.VISCERAL_FAT)
        np.putmask(tissues, inside & (diaphragm > f32(0.5 * SUPPORTING_TISSUE_MM)), Tissue.LUNG)
        return tissues, wall, diaphragm

    def _radius(self, x: Field, y: Field, half_mm: npt.NDArray[np.float64]) -> Field:
        """1 on the outline with these half diameters (side, front, back), which is an ellipse made squarer."""
        side, front, back = half_mm
        u = x * f32(1.0 / side)
        u *= u
        v = two_sided_square(y, 1.0 / front**2, 1.0 / back**2)
        # Beyond the outline's bounding box the product must not grow, or far corners would count as inside again.
        return np.sqrt(u + v - np.minimum(u, f32(1.0)) * np.minimum(v, f32(1.0)) * f32(self.squareness))

    def _paint_wall(self, tissues: npt.NDArray[np.uint8], x: Field, y: Field, z: Field, wall: Field) -> None:
        """Puts planes of fat, fibrous bands and ribs into the ring of muscle around the cavity."""
        muscle = tissues == Tissue.MUSCLE
        # The costal margin rises towards the front.
        chest = z > f32(self.costal_margin_mm) - np.minimum(y, f32(0.0)) * f32(1.1)
        belly = muscle & ~chest
        aside, plane, thick = np.abs(x), f32(0.5 * self.plane_mm), f32(self.wall_mm[0])

        front = y < f32(-0.25 * self.cavity_mm[1])
        beside_rectus = np.abs(aside - f32(self.rectus_mm)) < f32(3.5)
        np.putmask(tissues, belly & front & beside_rectus & (wall > f32(3.0)), Tissue.INTERMUSCULAR_FAT)
        np.putmask(tissues, belly & front & (beside_rectus | (aside < f32(3.0))) & (wall < f32(3.0)), Tissue.CONNECTIVE)
        np.putmask(tissues, belly & front & (aside < f32(2.0)), Tissue.CONNECTIVE)
        flank = belly & (aside > f32(self.rectus_mm + 3.5)) & (y < f32(0.45 * self.cavity_mm[2]))
        between = np.minimum(np.abs(wall - thick * f32(0.30)), np.abs(wall - thick * f32(0.62)))
        np.putmask(tissues, flank & (between < plane), Tissue.INTERMUSCULAR_FAT)

        # Outside the ribs lies the broad muscle of the back, behind a line that moves to the back further down.
        outer = wall - f32(0.60 * self.wall_mm[0])
        over_ribs = muscle & chest & (outer > -plane)
        np.putmask(tissues, over_ribs & ((outer < plane) | (y < f32(-0.30 * self.cavity_mm[1]))), Tissue.FAT)
        self._paint_ribs(tissues, y, z, wall, chest)

    def _paint_ribs(
        self, tissues: npt.NDArray[np.uint8], y: Field, z: Field, wall: Field, chest: npt.NDArray[np.bool_]
    ) -> None:
        # Ribs fall from the back to the front.
        position = (z - y * f32(0.45)) * f32(1.0 / RIB_PITCH_MM) + f32(self.rib_phase)
        position -= np.floor(position)
        depth = wall - f32(0.30 * self.wall_mm[0])
        rib = (position < f32(0.40)) & chest & (np.abs(depth) < f32(4.0))
        np.putmask(tissues, rib & (tissues == Tissue.MUSCLE), Tissue.BONE)
        marrow = rib & (np.abs(position - f32(0.2)) < f32(0.14)) & (np.abs(depth) < f32(2.5))
        np.putmask(tissues, marrow & (tissues == Tissue.BONE), Tissue.MARROW)

    def reach_mm(self, z_mm: npt.NDArray[np.float64]) -> tuple[float, float, float]:
        """How far the undeformed body reaches to either side, to the front and to the back at these heights."""
        side, front, back = np.array(self.cavity_mm) + self.wall_mm + self.fat_mm
        return float(side * self._narrowed(z_mm.astype(np.float32)).max()), float(front), float(back)

    def _narrowed(self, z: Field) -> Field:
        """How wide the body is at this height, relative to its widest."""
        chest = np.maximum(z - f32(20.0), f32(0.0)) * f32(1.0 / 150.0)
        waist = np.maximum(f32(-50.0) - z, f32(0.0)) * f32(1.0 / 150.0)
        return f32(1.0) - chest * chest * f32(self.chest_taper) - waist * waist * f32(self.waist_taper)


@dataclass(frozen=True)
class Anatomy:
    """One patient.

    Args:
        seed, number: name the patient.
        target_liver_ml: the liver volume aimed at; the true one is measured on the map.
        liver_fat_percent: fat fraction of LIVER by proton density, in percent; focal_fat_percent: that of FOCAL_FAT.
        torso: all that is not an organ.
        organs: painted in this order, later over earlier.
        displacement_mm: float64 [3, n, n, n], (x, y, z) components of cubic B-spline control points at
            `CONTROL_SPACING_MM`, in [z, y, x] order.
    """

    seed: int
    number: int
    target_liver_ml: float
    liver_fat_percent: float
    focal_fat_percent: float
    torso: Torso
    organs: tuple[Organ, ...]
    displacement_mm: npt.NDArray[np.float64]

    def tissues(self, x_mm: npt.ArrayLike, y_mm: npt.ArrayLike, z_mm: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """The map of tissues on a grid.

        Args:
            x_mm, y_mm, z_mm: ascending positions of the columns, rows and slices.

        Returns:
            uint8 [slices, rows, columns] of `Tissue` numbers.
        """
        x, y, z = (np.asarray(axis, dtype=np.float64) for axis in (x_mm, y_mm, z_mm))
        tissues = np.zeros((len(z), len(y), len(x)), dtype=np.uint8)
        largest_mm = float(np.abs(self.displacement_mm).max())  # splines lie within their control points
        heights = np.linspace(z[0] - largest_mm, z[-1] + largest_mm, 64)
        side, front, back = self.torso.reach_mm(heights)
        boxes = [(np.array([-side, -front]), np.array([side, back]))]
        for low, high in (organ.box_mm() for organ in self.organs if organ.only_in is Tissue.AIR):
            boxes.append((low[:2], high[:2]))
        lowest = np.min([low for low, _ in boxes], axis=0) - largest_mm
        highest = np.max([high for _, high in boxes], axis=0) + largest_mm
        # Half a scan is air, which is known without asking.
        columns, rows = (slice(*np.searchsorted(at, ends)) for at, *ends in zip((x, y), lowest, highest, strict=True))
        if tissues[:, rows, columns].size:
            tissues[:, rows, columns] = self._body(x[columns], y[rows], z, largest_mm)
        return tissues

    def _body(
        self, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], z: npt.NDArray[np.float64], largest_mm: float
    ) -> npt.NDArray[np.uint8]:
        """The map on a grid close about the body, where nothing is displaced by more than `largest_mm`."""
        # einsum's own loops, not BLAS: its sums do not depend on the number of threads.
        across = np.einsum("cijk,xk->cijx", self.displacement_mm, _spline_weights(x))
        in_plane = np.einsum("cijx,yj->ciyx", across, _spline_weights(y)).astype(np.float32)
        through = _spline_weights(z)
        boxes = [organ.box_mm() for organ in self.organs]
        step = max(1, SLAB_VOXELS // (len(y) * len(x)))
        slabs = [slice(first, min(first + step, len(z))) for first in range(0, len(z), step)]
        tissues = np.empty((len(z), len(y), len(x)), dtype=np.uint8)
        for slab in slabs:
            moved = _displaced(x, y, z[slab], in_plane, through[slab])
            tissues[slab], wall, diaphragm = self.torso.paint(*moved)
            for organ, (lowest, highest) in zip(self.organs, boxes, strict=True):
                box = tuple(
                    slice(*np.searchsorted(axis, (low - largest_mm, high + largest_mm)))
                    for axis, low, high in zip((z[slab], y, x), lowest[::-1], highest[::-1], strict=True)
                )
                here = tissues[slab][box]
                if here.size:
                    _paint_organ(organ, here, [part[box] for part in moved], wall[box], diaphragm[box])
        return tissues


def _paint_organ(
    organ: Organ, tissues: npt.NDArray[np.uint8], position: Sequence[Field], wall: Field, diaphragm: Field
) -> None:
    x, y, z = position
    distance = organ.distance_mm(x, y, z, wall, diaphragm)
    allowed = tissues == organ.only_in if organ.only_in is not None else tissues != Tissue.AIR
    for depth_mm, tissue in organ.shells:
        # Fat around an organ fills its surroundings, but never replaces wall or lung.
        where = allowed & (distance < f32(depth_mm))
        if depth_mm > 0 and organ.region is not Region.BODY:
            where &= (wall < 0) & ((diaphragm < 0) == (organ.region is Region.ABDOMEN))
        np.copyto(tissues, np.uint8(tissue), where=where)


def _displaced(
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.float64],
    z: npt.NDArray[np.float64],
    in_plane: Field,
    through: npt.NDArray[np.float64],
) -> list[Field]:
    """Where each grid point lies in the undeformed patient: float32 [z, y, x] for each of x, y, z."""
    moved = [
        np.broadcast_to(axis.astype(np.float32), (len(z), len(y), len(x))).copy()
        for axis in (x, y[:, None], z[:, None, None])
    ]
    for index, weights in enumerate(through):
        for control in np.flatnonzero(weights):
            for component in range(3):
                moved[component][index] += in_plane[component, control] * f32(weights[control])
    return moved


def _spline_weights(position_mm: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Uniform cubic B-spline weights of the control points at each position, float64 [positions, controls]."""
    count = control_count()
    distance = np.abs(position_mm[:, None] / CONTROL_SPACING_MM - (np.arange(count) - (count - 1) / 2))
    near = (4 - 6 * distance**2 + 3 * distance**3) / 6
    far = np.maximum(2 - distance, 0) ** 3 / 6
    return np.where(distance < 1, near, far)


def control_count() -> int:
    return 2 * round(CONTROL_HALF_EXTENT_MM / CONTROL_SPACING_MM) + 1
