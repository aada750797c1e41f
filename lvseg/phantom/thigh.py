"""A pair of thighs as a function of space: which tissue lies at a point near the middle of the femora.

Axes. Positions are world millimetres in LPS: x towards the patient's left, y towards the back, z towards the head;
z = 0 is the middle of the femora, x = 0 lies between the legs. Grids are canonical, [slice, row, column] = [z, y, x].

A leg is drawn in coordinates of its own, as a left one: u towards the outside, v towards the back, from the middle of
the compartment that the fascia lata encloses; a right leg is a left one seen in a mirror. A point inside the fascia
belongs to the muscle whose ellipsoid is nearest. Where two are about equally near lies the fat between them, and midway
between the extensors and the others the septa that hold them apart.

What is computed for every voxel obeys the same restriction as in `lvseg.phantom.anatomy`: additions, multiplications,
divisions and square roots in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from lvseg.phantom.anatomy import Tissue
from lvseg.phantom.fields import draw_controls, smooth_field
from lvseg.phantom.patients import random_stream
from lvseg.phantom.shapes import Cone, Ellipsoid, Field, Shape, dot, f32, rotation, smooth_minimum

DISPLACEMENT_SPACING_MM, DISPLACEMENT_SD_MM = 32.0, 1.6
GAP_SPACING_MM = 14.0
EXTENT_MM = (80.0, 320.0, 520.0)  # z, y, x: where the random fields are defined
FAR_MM = 260.0  # along the leg, beyond any slice


class Compartment(IntEnum):
    """Groups of muscles that the septa divide."""

    EXTENSORS = 0
    ADDUCTORS = 1
    FLEXORS = 2


@dataclass(frozen=True)
class Muscle:
    """A belly: the ellipsoid that it would fill if it were alone."""

    compartment: Compartment
    shape: Ellipsoid


@dataclass(frozen=True)
class Inset:
    """Something painted over the muscles, with fat around it.

    Args:
        shape: in the leg's own coordinates.
        tissue: what it is made of.
        fat_mm: of the layer of intermuscular fat around it, 0 for none.
        in_fat: it lies in subcutaneous fat, and nowhere else.
    """

    shape: Shape
    tissue: Tissue
    fat_mm: float = 0.0
    in_fat: bool = False


@dataclass(frozen=True)
class Leg:
    """One thigh.

    Args:
        centre_mm: (x, y) of the compartment's middle at mid-femur.
        side: 1 for a left leg, -1 for a right one.
        turn: cosine and sine of the rotation outwards.
        muscles: the bellies, about which `reach_mm` and `gap_mm` say how far they spread and how much fat is between.
        septum_mm: thickness of the intermuscular septa.
        fascia: outer surface of the fascia lata; its thickness is `fascia_mm`, and `tract_mm` more at the outer side.
        skin: surface of the leg; `skin_mm` is the thickness of the skin.
        table_mm: how far behind the centre the leg is flattened by what it lies on, and the fascia `table_fat_mm` less.
        femur: cortical bone from the outside in to `cortex_mm` before the marrow.
        insets: vessels, nerve and tendons, painted in this order.
    """

    centre_mm: tuple[float, float]
    side: int
    turn: tuple[float, float]
    muscles: tuple[Muscle, ...]
    reach_mm: float
    gap_mm: float
    septum_mm: float
    fascia: Ellipsoid
    fascia_mm: float
    tract_mm: float
    skin: Ellipsoid
    skin_mm: float
    table_mm: float
    table_fat_mm: float
    femur: Cone
    cortex_mm: float
    insets: tuple[Inset, ...]

    def paint(self, tissues: npt.NDArray[np.uint8], x: Field, y: Field, z: Field, uneven: Field) -> None:
        """Paints the leg over air.

        Args:
            tissues: uint8 [z, y, x], changed in place.
            x, y, z: float32 in its shape, where each voxel lies in the undeformed body.
            uneven: float32 in its shape, about 1: how wide the gaps between muscles are there.
        """
        cosine, sine = self.turn
        lateral, back = (x - f32(self.centre_mm[0])) * f32(self.side), y - f32(self.centre_mm[1])
        u, v = dot((lateral, back), (cosine, sine)), dot((lateral, back), (-sine, cosine))

        flattened = back - f32(self.table_mm)
        skin = _smooth_maximum(self.skin.distance_mm(u, v, z), flattened, 26.0)
        np.copyto(tissues, np.uint8(Tissue.SKIN), where=skin < 0)
        inside = skin < f32(-self.skin_mm)
        np.copyto(tissues, np.uint8(Tissue.FAT), where=inside)
        fascia = _smooth_maximum(self.fascia.distance_mm(u, v, z), flattened + f32(self.table_fat_mm), 26.0)
        fascia = np.maximum(fascia, skin + f32(self.skin_mm + 1.5))

        outside = np.clip(u * f32(1.0 / self.fascia.semi_axes_mm[0]), f32(0.0), f32(1.0))
        thickness = f32(self.fascia_mm) + f32(self.tract_mm) * outside * outside
        np.copyto(tissues, np.uint8(Tissue.CONNECTIVE), where=fascia < 0)
        compartment = fascia < -thickness
        np.copyto(tissues, np.uint8(Tissue.INTERMUSCULAR_FAT), where=compartment)
        self._paint_muscles(tissues, compartment, u, v, z, uneven)

        for inset in self.insets:
            distance = inset.shape.distance_mm(u, v, z)
            allowed = tissues == Tissue.FAT if inset.in_fat else compartment
            if inset.fat_mm:
                np.copyto(tissues, np.uint8(Tissue.INTERMUSCULAR_FAT), where=allowed & (distance < f32(inset.fat_mm)))
            np.copyto(tissues, np.uint8(inset.tissue), where=allowed & (distance < 0))
        bone = self.femur.distance_mm(u, v, z)
        np.copyto(tissues, np.uint8(Tissue.BONE), where=bone < 0)
        np.copyto(tissues, np.uint8(Tissue.MARROW), where=bone < f32(-self.cortex_mm))

    def _paint_muscles(
        self,
        tissues: npt.NDArray[np.uint8],
        compartment: npt.NDArray[np.bool_],
        u: Field,
        v: Field,
        z: Field,
        uneven: Field,
    ) -> None:
        nearest, second, *groups = (np.full_like(u, 1e6) for _ in range(2 + len(Compartment)))
        for muscle in self.muscles:
            distance = muscle.shape.distance_mm(u, v, z)
            second = np.minimum(second, np.maximum(nearest, distance))
            nearest = np.minimum(nearest, distance)
            group = groups[muscle.compartment]
            np.minimum(group, distance, out=group)
        extensors, adductors, flexors = groups
        others = np.minimum(adductors, flexors)
        # Distances to two neighbours change by two millimetres for each one across the border between them.
        from_extensors = np.abs(extensors - others)
        beside_extensors = np.maximum(others - extensors, f32(0.0))
        among_others = np.abs(adductors - flexors)
        gap = uneven * f32(self.gap_mm)
        apart = (second - nearest > gap * f32(0.55)) & (from_extensors > gap) & (among_others + beside_extensors > gap)
        np.copyto(tissues, np.uint8(Tissue.MUSCLE), where=compartment & apart & (nearest < uneven * f32(self.reach_mm)))
        # The septum between adductors and flexors is the thinner one. Far from both neighbours, where their distances
        # run almost level, it must not swell.
        septum = np.minimum(from_extensors, f32(1.8) * among_others + beside_extensors)
        septum *= f32(1.0) + f32(0.3) * np.maximum(nearest - f32(5.0), f32(0.0))
        np.copyto(tissues, np.uint8(Tissue.CONNECTIVE), where=compartment & (septum < f32(self.septum_mm)))


@dataclass(frozen=True)
class Thighs:
    """Both thighs of one patient.

    Args:
        seed, number: name the patient, as for an `Anatomy`.
        age_years, male: what muscle and fat depend on.
        legs: right and left.
        displacement: float64 control points of the deformation, one array for each of x, y, z.
        unevenness: float64 control points of the gaps' width.
    """

    seed: int
    number: int
    age_years: float
    male: bool
    legs: tuple[Leg, Leg]
    displacement: tuple[npt.NDArray[np.float64], ...]
    unevenness: npt.NDArray[np.float64]

    def tissues(self, x_mm: npt.ArrayLike, y_mm: npt.ArrayLike, z_mm: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """The map of tissues on a grid.

        Args:
            x_mm, y_mm, z_mm: ascending positions of the columns, rows and slices.

        Returns:
            uint8 [slices, rows, columns] of `Tissue` numbers.
        """
        x, y, z = (np.asarray(axis, dtype=np.float64) for axis in (x_mm, y_mm, z_mm))
        tissues = np.zeros((len(z), len(y), len(x)), dtype=np.uint8)
        # A leg's half of the columns each; where legs touch, the plane between them is where skin meets skin.
        for leg, half in zip(self.legs, (x < 0.0, x >= 0.0), strict=True):
            if not half.any():
                continue
            columns = x[half]
            grid = [
                np.broadcast_to(axis.astype(np.float32), (len(z), len(y), len(columns)))
                for axis in (columns, y[:, None], z[:, None, None])
            ]
            moved = [
                axis + smooth_field(controls, DISPLACEMENT_SPACING_MM, (z, y, columns))
                for axis, controls in zip(grid, self.displacement, strict=True)
            ]
            uneven = smooth_field(self.unevenness, GAP_SPACING_MM, (z, y, columns))
            uneven = np.clip(f32(1.0) + f32(0.45) * uneven, f32(0.25), f32(2.2))
            part = np.zeros(moved[0].shape, dtype=np.uint8)
            leg.paint(part, moved[0], moved[1], moved[2], uneven)
            tissues[:, :, half] = part
        return tissues


def draw_thighs(seed: int, number: int) -> Thighs:
    """Draws the thighs of one patient: age, sex and build first, then each leg with small differences of its own.

    Muscle shrinks and the fat between muscles grows with age; men have more muscle, women more subcutaneous fat. In the
    Health ABC study muscle measured 133 (SD 22) cm2 in men and 93 (SD 18) cm2 in women of 70 to 79 years (Goodpaster et
    al., J Appl Physiol 2001;90:2157). The deep fascia is 0.6 to 1.1 mm thick (histology and sonography of the thigh,
    PubMed Central PMC7930759), the iliotibial tract 2 mm (Goh et al., J Clin Ultrasound 2003;31:239).

    Args:
        seed: of the set of patients, at least 0.
        number: of the patient within the set, at least 0.
    """
    draw = random_stream(seed, number, "thigh build")
    age_years = float(draw.uniform(30.0, 85.0))
    male = bool(draw.random() < 0.5)
    habitus = _normal(draw)
    old = (age_years - 30.0) / 55.0
    size = (1.15 if male else 1.0) * math.exp(0.055 * _normal(draw) + 0.03 * habitus) * (1.0 - 0.105 * old)
    fat_mm = (8.5 if male else 17.0) * math.exp(0.30 * habitus + 0.14 * _normal(draw))
    gap_mm = (0.6 + 1.5 * old + 0.2 * max(habitus, -1.0)) * math.exp(0.18 * _normal(draw))
    build = Build(male, old, size, fat_mm, max(gap_mm, 0.5), float(draw.uniform(3.0, 24.0)))
    moves = random_stream(seed, number, "thigh displacement")
    displacement = [
        np.clip(DISPLACEMENT_SD_MM * draw_controls(moves, EXTENT_MM, DISPLACEMENT_SPACING_MM), -6.0, 6.0)
        for _ in range(3)
    ]
    return Thighs(
        seed,
        number,
        age_years,
        male,
        (
            _draw_leg(seed, number, -1, build),
            _draw_leg(seed, number, 1, build),
        ),
        tuple(displacement),
        draw_controls(random_stream(seed, number, "thigh gaps"), EXTENT_MM, GAP_SPACING_MM),
    )


@dataclass(frozen=True)
class Build:
    """What both legs of a person share: `old` is 0 at 30 years and 1 at 85, `size` scales all but fat."""

    male: bool
    old: float
    size: float
    fat_mm: float
    gap_mm: float
    """Of fat between muscles."""
    apart_mm: float
    """Between the legs."""


def _draw_leg(seed: int, number: int, side: int, build: Build) -> Leg:
    """One leg of this build, drawn as a left one: mostly as the person's other leg, and a little of its own."""
    size, fat_mm, gap_mm, old = build.size, build.fat_mm, build.gap_mm, build.old
    shared = random_stream(seed, number, "thigh plan")
    own = random_stream(seed, number, "thigh right" if side < 0 else "thigh left")

    def normal() -> float:
        return 0.9 * _normal(shared) + 0.44 * _normal(own)

    def vary(mean: float, relative: float = 0.05) -> float:
        return mean * (1.0 + relative * normal())

    def ellipsoid(u: float, v: float, a: float, b: float, turn_deg: float, spread_mm: float = 1.4) -> Ellipsoid:
        centre = (size * (u + spread_mm * normal()), size * (v + spread_mm * normal()), 30.0 * normal())
        tilt = [math.radians(3.0 * normal()) for _ in range(2)]
        axes = rotation(tilt[0], tilt[1], math.radians(turn_deg + 5.0 * normal()))
        return Ellipsoid(centre, (size * vary(a, 0.07), size * vary(b, 0.07), vary(240.0)), axes)

    def tube(u: float, v: float, radius_mm: float, spread_mm: float = 1.5) -> Cone:
        place = (size * (u + spread_mm * normal()), size * (v + spread_mm * normal()))
        lean = (0.06 * normal() * FAR_MM, 0.06 * normal() * FAR_MM)
        return Cone(
            (place[0] - lean[0], place[1] - lean[1], -FAR_MM),
            (place[0] + lean[0], place[1] + lean[1], FAR_MM),
            0.92 * radius_mm,
            1.08 * radius_mm,
        )

    extensors, adductors, flexors = Compartment
    muscles = (
        Muscle(extensors, ellipsoid(5, -54, 24, 12, -3)),  # rectus femoris
        Muscle(extensors, ellipsoid(12, -25, 27, 15, 10)),  # vastus intermedius, around the front of the femur
        Muscle(extensors, ellipsoid(43, -12, 16, 43, -14)),  # vastus lateralis
        Muscle(extensors, ellipsoid(-24, -25, 15, 26, 12)),  # vastus medialis
        Muscle(extensors, ellipsoid(-49, -35, 7, 14, 36)),  # sartorius, which shares the front
        Muscle(adductors, ellipsoid(-34, 2, 15, 11, -12)),  # adductor longus
        Muscle(adductors, ellipsoid(-60, 13, 5.5, 17, -10)),  # gracilis
        Muscle(adductors, ellipsoid(-26, 25, 30, 15, -14)),  # adductor magnus
        Muscle(flexors, ellipsoid(-38, 47, 18, 11, 32)),  # semimembranosus
        Muscle(flexors, ellipsoid(-11, 56, 17, 12, 4)),  # semitendinosus
        Muscle(flexors, ellipsoid(21, 49, 20, 15, -22)),  # biceps femoris, long head
        Muscle(flexors, ellipsoid(26, 24, 13, 9, -25)),  # biceps femoris, short head
    )
    half = (size * vary(67.0, 0.02), size * vary(69.0, 0.02))
    inner, front, outer, back = (fat_mm * vary(share, 0.06) for share in (1.25, 0.85, 0.80, 1.15))
    skin_mm = vary(1.6, 0.1)
    # Thighs taper towards the knee: long ellipsoids whose middle lies towards the hip.
    fascia = Ellipsoid((0.0, 0.0, 90.0), (half[0] * 1.03, half[1] * 1.03, 380.0))
    surface = Ellipsoid(
        (0.5 * (outer - inner), 0.5 * (back - front), 110.0),
        (
            (half[0] + 0.5 * (outer + inner) + skin_mm) * 1.03,
            (half[1] + 0.5 * (front + back) + skin_mm) * 1.03,
            420.0,
        ),
    )
    wide_mm = 0.965 * surface.semi_axes_mm[0] - surface.centre_mm[0]  # towards the other leg, at mid-femur
    turn = math.radians(8.0 + 6.0 * normal())
    radius_mm = (14.6 if build.male else 13.0) * vary(1.0, 0.04)
    saphenous = (-(half[0] + 0.45 * inner) * 0.94, -(half[1] + 0.45 * front) * 0.34)
    insets = [
        Inset(tube(-41, -12, 4.6), Tissue.VENOUS_BLOOD, 1.0 + gap_mm),
        Inset(tube(-47, -15, 3.7), Tissue.BLOOD, 1.2),
        Inset(tube(-9, 9, 2.2), Tissue.VENOUS_BLOOD, 0.8 + 0.5 * gap_mm),
        Inset(tube(-6, 12, 1.6), Tissue.BLOOD, 0.6),
        Inset(ellipsoid(4, 37, 5.5, 3.0, 10), Tissue.CONNECTIVE, 0.8 + gap_mm),  # sciatic nerve in its sheath
        Inset(ellipsoid(-25, 45, 6.0, 0.9, 50), Tissue.CONNECTIVE),  # tendon of semimembranosus
        Inset(ellipsoid(5, -53, 0.8, 6.0, 0), Tissue.CONNECTIVE),  # central tendon of rectus femoris
        Inset(
            Cone((*saphenous, -FAR_MM), (*saphenous, FAR_MM), vary(2.0, 0.15), vary(2.3, 0.15)),
            Tissue.VENOUS_BLOOD,
            in_fat=True,
        ),
    ]
    return Leg(
        centre_mm=(side * (wide_mm + 0.5 * build.apart_mm), 3.0 * normal()),
        side=side,
        turn=(math.cos(turn), math.sin(turn)),
        muscles=muscles,
        reach_mm=vary(9.0 - 4.0 * old, 0.08),
        gap_mm=gap_mm,
        septum_mm=vary(1.2, 0.12),
        fascia=fascia,
        fascia_mm=vary(1.1, 0.1),
        tract_mm=vary(1.2, 0.2),
        skin=surface,
        skin_mm=skin_mm,
        table_mm=0.90 * (half[1] + back),
        table_fat_mm=max(0.55 * back, 3.0),
        femur=tube(8, -5, radius_mm),
        cortex_mm=vary(0.50 - 0.14 * old, 0.08) * radius_mm,
        insets=tuple(insets),
    )


def _smooth_maximum(first: Field, second: Field, over_mm: float) -> Field:
    return -smooth_minimum(-first, -second, over_mm)


def _normal(draw: np.random.Generator) -> float:
    """Standard normal without the tails beyond 2.2."""
    return min(max(float(draw.standard_normal()), -2.2), 2.2)
