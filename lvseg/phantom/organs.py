"""Torso and organs in one person's proportions: how they are placed, and how they differ between people.

Axes. As in `lvseg.phantom.anatomy`: LPS millimetres. Places are written down for an average person, whose abdominal
cavity has the half diameters `AVERAGE_CAVITY_MM`, and moved to where they are in the person drawn.

Each part of the body draws from a random stream of its own, so a change to one part leaves the others as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lvseg.phantom.anatomy import Dome, Organ, Region, Tissue, Torso
from lvseg.phantom.shapes import Cone, Cut, Ellipsoid, Point, Shape, rotation, unit
from lvseg.phantom.variety import USUAL, Variety

MEDIAN_LIVER_ML = 1500.0
AVERAGE_CAVITY_MM = (127.0, 86.0, 90.0)  # half diameters to the side, the front and the back
VERTEBRA_PITCH_MM, DISC_MM = 33.0, 8.0
LOOSE_LOOPS, PACKED_LOOPS = 36, 64
FAR_MM = 330.0  # beyond any scan
CYSTS_IN, LESIONS_IN, FOCAL_FAT_IN = 0.20, 0.12, 0.15  # share of patients who have any

FAT, MUSCLE, BLOOD, VENOUS = Tissue.VISCERAL_FAT, Tissue.MUSCLE, Tissue.BLOOD, Tissue.VENOUS_BLOOD
FLUID = Tissue.FREE_FLUID
FASCIA_SHELLS = ((0.0, Tissue.CONNECTIVE), (-0.8, MUSCLE))
BONE_SHELLS = ((0.0, Tissue.BONE), (-2.0, Tissue.MARROW))
BODY_SHELLS = ((0.0, Tissue.BONE), (-1.2, Tissue.MARROW))  # of vertebrae: their end plates are thin


@dataclass(frozen=True)
class Build:
    """A person's proportions: `habitus` is 0 for average and 2 for obese, `frame` scales bones and organs."""

    habitus: float
    frame: float
    fat_mm: float
    halo_mm: float
    """Fat around organs."""
    cavity_mm: Point

    def place(self, x: float, y: float, z: float) -> Point:
        """Where a place of the average person is in this one."""
        side, front, back = self.cavity_mm
        depth = front / AVERAGE_CAVITY_MM[1] if y < 0 else back / AVERAGE_CAVITY_MM[2]
        return x * side / AVERAGE_CAVITY_MM[0], y * depth, z * self.frame

    @property
    def spine_y(self) -> float:
        """Middle of the vertebral bodies."""
        return 0.50 * self.cavity_mm[2]

    @property
    def aorta_y(self) -> float:
        """Middle of the aorta, in front of the spine."""
        return self.spine_y - 31 * self.frame

    @property
    def cava_top(self) -> Point:
        """Where the hepatic veins enter the vena cava."""
        return self.place(-20, 25, 58)


@dataclass(frozen=True)
class Hand:
    """Draws shapes in one person's proportions from one random stream; lengths are those of the average person."""

    draw: np.random.Generator
    build: Build
    variety: Variety = USUAL

    def vary(self, mean: float, sd: float) -> float:
        """Normal, without the tails beyond 2.2 standard deviations."""
        return mean + sd * min(max(float(self.draw.standard_normal()), -2.2), 2.2)

    def between(self, low: float, high: float) -> float:
        """Uniform."""
        return float(self.draw.uniform(low, high))

    def at(self, x: float, y: float, z: float, spread_mm: float = 2.5) -> Point:
        """A place, a little off."""
        return self.build.place(self.vary(x, spread_mm), self.vary(y, spread_mm), self.vary(z, spread_mm))

    def ellipsoid(
        self, centre: Point, semi_axes: Point, tilt_deg: Point = (0.0, 0.0, 0.0), spread: float = 0.06
    ) -> Ellipsoid:
        """An ellipsoid of about this size (relative spread) and tilt (6 degrees)."""
        x, y, z = (axis * self.build.frame * self.vary(1.0, spread) for axis in semi_axes)
        return Ellipsoid(centre, (x, y, z), rotation(*(math.radians(self.vary(angle, 6.0)) for angle in tilt_deg)))

    def tube(self, *points: tuple[Point, float]) -> tuple[Cone, ...]:
        """Cones from point to point, with the radius at each."""
        frame = self.build.frame
        return tuple(Cone(a, b, ra * frame, rb * frame) for (a, ra), (b, rb) in pairwise(points))


def draw_body(
    stream: Callable[[str], np.random.Generator], liver_ml: float, liver_scale: float, variety: Variety
) -> tuple[Torso, tuple[Organ, ...]]:
    """Torso and organs, in the order in which they are painted.

    Args:
        stream: the random numbers of each purpose.
        liver_ml: volume of the liver as it would be without peculiarities; decides over the person's size.
        liver_scale: of the liver beyond that of the person.
        variety: the person's peculiarities.
    """
    build = _draw_build(stream("build"), liver_ml, variety)

    def hand(name: str) -> Hand:
        return Hand(stream(name), build, variety)

    torso = _draw_torso(hand("torso"))
    organs = (
        *_draw_bowel(hand("bowel")),
        *_draw_upper_left(hand("stomach")),
        *_draw_liver(LiverSpace(hand("liver"), torso.domes[0].top_mm, liver_scale)),
        *_draw_findings(LiverSpace(hand("findings"), torso.domes[0].top_mm, liver_scale)),
        *_draw_kidneys(hand("kidneys")),
        *_draw_mesentery(hand("mesentery")),
        *_draw_chest(hand("chest")),
        *_draw_muscles(hand("muscles")),
        *_draw_spine(hand("spine")),
        *_draw_great_vessels(hand("vessels")),
        *_draw_effusion(hand("effusion")),
        *_draw_arms(hand("arms"), torso),
    )
    return torso, organs


def _draw_build(draw: np.random.Generator, liver_ml: float, variety: Variety) -> Build:
    habitus = 0.15 + 0.8 * min(max(float(draw.standard_normal()), -2.2), 2.2)
    if variety.habitus is not None:
        habitus = variety.habitus
    # People with large livers are large, or the cavity could not hold them.
    frame = 1.0 + 0.11 * math.log(liver_ml / MEDIAN_LIVER_ML) + 0.025 * float(draw.uniform(-1.7, 1.7))
    frame *= variety.frame
    return Build(
        habitus,
        frame,
        fat_mm=15.0 * math.exp(0.5 * habitus) * variety.frame,
        halo_mm=2.0 * math.exp(0.45 * habitus) * variety.halo,
        cavity_mm=(frame * (127 + 6 * habitus), frame * (86 + 9 * habitus), frame * (90 + 3 * habitus)),
    )


def _draw_torso(hand: Hand) -> Torso:
    vary, build = hand.vary, hand.build
    wall, steeper = hand.variety.wall * build.frame, 1.0 / hand.variety.frame

    def falls(right: tuple[float, float], left: tuple[float, float]) -> list[float]:
        return [vary(*fall) * steeper for fall in (right, left, (0.006, 0.0006), (0.0095, 8e-4))]

    return Torso(
        cavity_mm=build.cavity_mm,
        wall_mm=(vary(18, 2) * wall, vary(11, 1.5) * wall, vary(22, 2) * wall),
        fat_mm=(build.fat_mm * vary(1.0, 0.12), build.fat_mm * vary(1.0, 0.15), build.fat_mm * vary(1.15, 0.12)),
        skin_mm=2.0,
        rectus_mm=vary(62, 6) * build.frame,
        plane_mm=1.6 * math.exp(0.35 * build.habitus),
        squareness=vary(0.32, 0.08),
        chest_taper=vary(0.14, 0.03),
        waist_taper=vary(0.08, 0.04) - 0.05 * build.habitus,
        domes=(
            Dome(hand.at(-58, 2, 70), *falls((0.0135, 0.001), (0.0055, 0.0005))),
            Dome(hand.at(62, 2, 58), *falls((0.0055, 0.0005), (0.0135, 0.001))),
        ),
        rib_phase=hand.between(0, 1),
        costal_margin_mm=vary(-85, 8) * build.frame,
    )


def _draw_bowel(hand: Hand) -> list[Organ]:
    """Small bowel in the lower abdomen, loops at random in front of its bulk, then the colon as a frame around them.

    In lean people the bowel fills the cavity, in others fat keeps it apart.
    """
    halo_mm, variety = hand.build.halo_mm, hand.variety
    full = hand.vary(1.0, 0.07) - 0.14 * min(hand.build.habitus, 2.0)
    bulk = tuple(
        hand.ellipsoid(hand.at(x, y, z, 4.0), (a * full, b * full, c * full))
        for x, y, z, a, b, c in ((-38, -16, -130, 58, 54, 62), (40, -22, -125, 58, 52, 66), (0, -30, -185, 82, 46, 52))
    )
    organs = [Organ(bulk, ((0.0, Tissue.BOWEL),), blend_mm=10.0)]
    for number in range(PACKED_LOOPS + LOOSE_LOOPS + variety.near_loops):
        packed = number < PACKED_LOOPS
        radius = hand.vary(15, 3) * hand.build.frame
        if packed:
            centre = hand.build.place(
                full * hand.between(-84, 84), full * hand.between(-44, 44) - 22, hand.between(-225, -72)
            )
        elif number < PACKED_LOOPS + LOOSE_LOOPS:
            centre = hand.build.place(hand.between(-95, 95), hand.between(-72, 25), hand.between(-215, -22))
        else:
            highest = -15 if variety.resected is None else 45
            centre = hand.build.place(hand.between(-95, 50), hand.between(-74, 20), hand.between(-80, highest))
        semi_axes = (
            radius * hand.between(0.8, 2.2),
            radius * hand.between(0.8, 1.2),
            radius * hand.between(0.8, 1.7),
        )
        loop = Ellipsoid(centre, semi_axes, rotation(0.0, 0.0, hand.between(-0.8, 0.8)))
        content = _content(hand)
        wall_mm = hand.between(2.0, 6.0)  # collapsed loops show more wall than content
        organs.append(
            Organ((loop,), (((0.15 if packed else 0.7) * halo_mm, FAT), (0.0, Tissue.BOWEL), (-wall_mm, content)))
        )
    at = hand.at
    colon = hand.tube(
        (at(-92, 5, -220), 20),
        (at(-88, 0, -85 + variety.flexure_mm), 22),
        (at(-40, -55, -75 + 0.7 * variety.flexure_mm), 19),
        (at(30, -62, -80), 18),
        (at(88, -20, -28), 19),
        (at(100, 25, -90), 16),
        (at(98, 20, -220), 15),
    )
    shells = ((halo_mm, FAT), (0.0, Tissue.BOWEL), (-2.5, Tissue.BOWEL_CONTENT))
    gas = hand.between(-8, 18)  # gas fills the transverse colon, which lies in front, above this level
    level = Cut(hand.build.place(0, -66 + gas, 0), (0.0, 1.0, 0.0))
    transverse = colon[1:4]
    duodenum = hand.tube((at(-34, -4, -28), 11), (at(-46, 14, -46), 12), (at(-40, 20, -78), 12), (at(6, 6, -84), 10))
    return [
        *organs,
        Organ(colon, shells, blend_mm=8.0),
        Organ(transverse, ((-3.0, Tissue.GAS),), cuts=(level,), blend_mm=8.0),
        Organ(duodenum, ((halo_mm, FAT), (0.0, Tissue.BOWEL), (-4.0, Tissue.BOWEL_CONTENT)), blend_mm=6.0),
    ]


def _content(hand: Hand) -> Tissue:
    """What a loop of bowel holds."""
    drawn = hand.between(0, 1)
    if drawn < hand.variety.gas:
        return Tissue.GAS
    return Tissue.STOMACH_CONTENT if drawn > 1 - hand.variety.fluid else Tissue.BOWEL_CONTENT


def _draw_upper_left(hand: Hand) -> list[Organ]:
    """Spleen, hollowed by the stomach's bed of fat; pancreas; stomach with its gas."""
    at, halo_mm, frame = hand.at, hand.build.halo_mm, hand.build.frame
    size = hand.variety.spleen
    spleen = Organ(
        (hand.ellipsoid(at(88, 44, 16), (36 * size, 48 * size, 58 * size), (18.0, 0.0, -25.0), 0.12),),
        ((0.5 * halo_mm, FAT), (0.0, Tissue.SPLEEN)),
    )
    bed = Organ((hand.ellipsoid(at(44, 6, 16), (38, 42, 60)),), ((0.0, FAT),), margin_mm=0.0)
    pancreas = Organ(
        hand.tube((at(-28, -8, -44), 18), (at(-6, -8, -32), 13), (at(28, -2, -18), 12), (at(66, 26, -4), 10)),
        ((halo_mm, FAT), (0.0, Tissue.PANCREAS)),
        blend_mm=8.0,
    )
    full = hand.vary(1.0, 0.12) * hand.variety.stomach
    parts = (
        hand.ellipsoid(at(58, 2, 27), (33 * full, 38 * full, 30 * full)),
        hand.ellipsoid(at(56, -26, 3), (31 * full, 32 * full, 44 * full), (15.0, 0.0, 0.0)),
        hand.ellipsoid(at(22, -42, -32), (40, 20 * full, 18 * full)),
    )
    wall = ((halo_mm, FAT), (0.0, Tissue.STOMACH), (-4.5, Tissue.STOMACH_CONTENT))
    level = Cut(at(50, -34, 0, 8.0), (0.0, 1.0, 0.0))  # lying on the back, gas rises to the front
    return [
        spleen,
        bed,
        pancreas,
        Organ(parts, wall, blend_mm=14.0 * frame),
        Organ(parts, ((-5.0, Tissue.GAS),), cuts=(level,), blend_mm=14.0 * frame),
    ]


@dataclass(frozen=True)
class LiverSpace:
    """Where the liver hangs: under the right dome of the diaphragm, from which it grows away with its scale."""

    hand: Hand
    dome_mm: Point
    scale: float

    @property
    def wide(self) -> float:
        """Scale to the sides; large livers reach further to the left rather than down."""
        return self.scale**1.12

    @property
    def tall(self) -> float:
        """Scale along the body."""
        return self.scale**0.76

    def grown(self, place: Point) -> Point:
        """Where a place of a liver of average size is in this one."""
        (x, y, z), (dome_x, _, dome_z) = place, self.dome_mm
        return dome_x + self.wide * (x - dome_x), self.wide * y, dome_z + self.tall * (z - dome_z)

    def within(self, x: float, y: float, z: float, spread_mm: float = 2.0) -> Point:
        """A place in the average person's liver, a little off."""
        return self.grown(self.hand.at(x, y, z, spread_mm))

    def lobe(self, centre: Point, semi_axes: Point, tilt_deg: Point = (0.0, 0.0, 0.0), size: float = 1.0) -> Ellipsoid:
        """A part of the liver of about this size."""
        x, y, z = semi_axes
        return self.hand.ellipsoid(
            centre, (x * size * self.wide, y * size * self.wide, z * size * self.tall), tilt_deg, spread=0.05
        )


def _draw_liver(space: LiverSpace) -> list[Organ]:
    """Liver with its veins, the fissure between the lobes, gallbladder, portal and splenic vein."""
    hand, within, lobe = space.hand, space.within, space.lobe
    at, halo_mm, frame, variety = hand.at, hand.build.halo_mm, hand.build.frame, hand.variety
    visceral_side = unit((hand.vary(0.55, 0.05), hand.vary(0.26, 0.05), -0.80))
    left = (56 * variety.left_length, 34 * variety.left_thickness, 28 * variety.left_thickness)
    lobes = (
        lobe(within(-60, 2, 0), (74, 84, 80), size=variety.right),
        lobe(within(-14, -34, 22), (60, 46, 44), (0.0, -8.0, 0.0)),
        lobe(within(34, -46, 30, 5.0), left, (0.0, hand.vary(-10.0, 6.0), 12.0)),
        lobe(within(-6, 12, 14), (24, 20, 30), size=variety.caudate),
    )
    below, resection = Cut(within(-8, 14, -12, 3.0), visceral_side), _draw_resection(space)
    liver = Organ(
        lobes,
        ((0.5 * halo_mm, FAT), (0.0, Tissue.LIVER)),
        blend_mm=12.0 * frame,
        cuts=(below, *resection),
        margin_mm=2.0 + 0.3 * halo_mm,
    )
    fissure = Organ((hand.ellipsoid(within(14, -66, 2), (3.5, 30, 30), (0.0, 15.0, 10.0)),), ((0.0, FAT),))
    full = (13 * variety.gallbladder, 15 * variety.gallbladder, 28 * variety.gallbladder)
    gallbladder = Organ(
        (hand.ellipsoid(within(-46, -42, -42, 4.0), full, (-25.0, 0.0, 0.0), 0.15),),
        ((min(1.0, variety.halo), FAT), (0.0, Tissue.GALLBLADDER)),
    )
    around = [
        *_draw_more_lobes(space, resection),
        *_draw_ascites(space, liver),
        *_draw_fissures(space),
        *([gallbladder] if variety.gallbladder else []),
    ]

    cava, hilum = hand.build.cava_top, within(-22, 2, -8)
    right_vein = within(-62, 12, 40, 5.0)
    right_portal, left_portal = within(-58, 6, -2), within(2, -28, 14)
    hepatic = (
        hand.tube((cava, 6), (right_vein, 5), (within(-104, 26, 8, 6.0), 2.2)),
        hand.tube((right_vein, 3.5), (within(-98, -22, 32, 6.0), 1.8)),
        hand.tube((cava, 5.5), (within(-42, -26, 38, 5.0), 4.2), (within(-52, -62, 8, 6.0), 2.0)),
        hand.tube((cava, 5), (within(2, -22, 44, 4.0), 3.8), (within(44, -50, 32, 6.0), 1.8)),
    )
    from_portal = (
        hand.tube((hilum, 6), (right_portal, 5.5), (within(-86, 34, -22, 5.0), 2.8), (within(-106, 44, -34, 6.0), 1.6)),
        hand.tube((right_portal, 4.5), (within(-84, -26, -14, 5.0), 3.0), (within(-104, -44, -24, 6.0), 1.6)),
        hand.tube((right_portal, 4), (within(-80, 22, 30, 5.0), 2.4), (within(-92, 34, 46, 6.0), 1.5)),
        hand.tube((hilum, 5), (left_portal, 4.5), (within(34, -48, 26, 5.0), 2.2)),
        hand.tube((left_portal, 3.5), (within(-8, -58, 8, 5.0), 2.0)),
    )
    veins = [
        Organ(branch, ((0.0, tissue),), Region.BODY, only_in=Tissue.LIVER)
        for tissue, branches in ((Tissue.HEPATIC_VESSEL, hepatic), (Tissue.PORTAL_VESSEL, from_portal))
        for branch in branches
    ]
    blood = Tissue.PORTAL_BLOOD
    portal = Organ(hand.tube((at(2, 0, -36), 6), (hilum, 7)), ((2.0 + halo_mm, FAT), (0.0, blood)), blend_mm=4.0)
    splenic = Organ(hand.tube((at(2, 6, -34), 5), (at(36, 14, -14), 4.5), (at(74, 38, 6), 4)), ((0.0, blood),))
    return [liver, *veins, fissure, *around, portal, splenic]


def _draw_more_lobes(space: LiverSpace, resection: Sequence[Cut]) -> list[Organ]:
    """A left lobe that reaches far to the left under the wall of the chest, one whose lower end stands apart from the
    rest in the slices that show it, one that goes to the spleen and round it, and a right lobe that reaches far down;
    but for what was cut off.
    """
    variety, within = space.hand.variety, space.within
    lobes: list[tuple[Shape, ...]] = []
    radius = 20 * variety.left_thickness
    if variety.left_length > 1.0:  # an ellipsoid alone would end at the diaphragm, which falls to the side
        far = (variety.left_length - 1.0) / 0.7
        middle = within(56 + 30 * far, -52 + 8 * far, 22 - 8 * far, 4.0)
        tip = within(56 + 58 * far, -52 + 34 * far, 22 - 20 * far, 4.0)
        lobes.append(space.hand.tube((within(44, -50, 22, 4.0), radius), (middle, 0.9 * radius), (tip, 0.55 * radius)))
    if variety.hangs:
        lobes.append(space.hand.tube((within(30, -54, 22, 4.0), radius), (within(36, -62, -42, 8.0), 0.6 * radius)))
    if variety.riedel:
        lobes.append((space.lobe(within(-84, 0, -48, 5.0), (26, 42, 60)),))
    if variety.wraps:
        before = space.lobe(within(66, -46, 20, 4.0), (36, 22, 20))
        lobes.append((before, space.lobe(within(106, -8, 8, 4.0), (18, 46, 24), (0.0, 0.0, -18.0))))
    # Without fat around them, which would divide them from the rest.
    return [Organ(lobe, ((0.0, Tissue.LIVER),), blend_mm=8.0, cuts=tuple(resection)) for lobe in lobes]


def _draw_resection(space: LiverSpace) -> list[Cut]:
    """What a surgeon cut off."""
    side = space.hand.variety.resected
    if side is None:
        return []
    if side == "right":
        return [Cut(space.within(-36, 0, 0, 5.0), unit((-1.0, space.hand.vary(0.1, 0.1), space.hand.vary(0.0, 0.1))))]
    return [Cut(space.within(8, -40, 20, 5.0), unit((1.0, space.hand.vary(0.0, 0.1), space.hand.vary(0.0, 0.1))))]


def _draw_fissures(space: LiverSpace) -> list[Organ]:
    """Fat in folds of the liver: before the caudate lobe, and wherever else it happens to be."""
    hand, organs = space.hand, []
    for number in range(hand.variety.fissures):
        if number == 0:
            shape = hand.ellipsoid(space.within(2, -4, 24), (26, 2.5, 26), (0.0, 0.0, 20.0))
        else:
            centre = space.within(hand.between(-110, 40), hand.between(-60, 50), hand.between(-20, 50))
            shape = hand.ellipsoid(centre, (2.2, 26, 24), (0.0, 0.0, hand.between(-70, 70)), 0.2)
        organs.append(Organ((shape,), ((0.0, FAT),), Region.BODY, only_in=Tissue.LIVER))
    return organs


def _draw_ascites(space: LiverSpace, liver: Organ) -> list[Organ]:
    """Free fluid around the liver and, where there is more of it, in the flanks."""
    reach_mm, build = space.hand.variety.ascites_mm, space.hand.build
    if not reach_mm:
        return []
    around = Organ(
        liver.shapes, ((reach_mm, FLUID),), margin_mm=0.0, blend_mm=liver.blend_mm, cuts=liver.cuts, only_in=FAT
    )
    size = min(1.0, reach_mm / 20.0) * build.frame
    flanks = tuple(Ellipsoid(build.place(side * 92, 12, -110), (34 * size, 52 * size, 90 * size)) for side in (-1, 1))
    return [around, *(Organ((flank,), ((0.0, FLUID),), margin_mm=0.0, only_in=FAT) for flank in flanks)]


def _draw_findings(space: LiverSpace) -> list[Organ]:
    """Focal fat, lesions and cysts in the livers of some; each takes the place of liver alone."""
    hand = space.hand

    def somewhere() -> Point:
        """A place in the right lobe or, less often, in the left."""
        if hand.between(0, 1) < 0.75:
            x, y, z = hand.between(-112, -20), hand.between(-55, 58), hand.between(-50, 55)
        else:
            x, y, z = hand.between(-20, 50), hand.between(-62, -25), hand.between(10, 42)
        return space.grown(hand.build.place(x, y, z))

    def found(share: float, most: int) -> int:
        return int(hand.between(1, most + 1)) if hand.between(0, 1) < share else 0

    def inside(shape: Ellipsoid, *shells: tuple[float, Tissue]) -> Organ:
        return Organ((shape,), shells, Region.BODY, only_in=Tissue.LIVER)

    organs = []
    for _ in range(found(FOCAL_FAT_IN, 2)):
        size = hand.between(14, 34)
        shape = hand.ellipsoid(somewhere(), (size, 0.7 * size, 0.8 * size), (0.0, 0.0, hand.between(-40, 40)), 0.15)
        organs.append(inside(shape, (0.0, Tissue.FOCAL_FAT)))
    for _ in range(found(LESIONS_IN, 3)):
        radius = hand.between(5, 26)
        organs.append(inside(hand.ellipsoid(somewhere(), (radius, radius, radius), spread=0.15), (0.0, Tissue.LESION)))
    for _ in range(found(CYSTS_IN, 4)):
        radius = 4.0 * math.exp(hand.between(0, 1.7))
        organs.append(inside(hand.ellipsoid(somewhere(), (radius, radius, radius), spread=0.12), (0.0, Tissue.CYST)))
    return organs


def _draw_mesentery(hand: Hand) -> list[Organ]:
    """Vessels in the fat between the loops of bowel, and those of the kidneys."""
    at, build = hand.at, hand.build
    aorta, root = (10.0, build.aorta_y, -34.0), at(4, -6, -50)
    organs = []
    for tissue, x, width in ((BLOOD, 6.0, 3.2), (Tissue.PORTAL_BLOOD, -4.0, 4.6)):
        trunk = at(x, -12, -110)
        organs.append(Organ(hand.tube((root, width), (trunk, 0.85 * width)), ((0.0, tissue),)))
        for _ in range(4):
            end = build.place(hand.between(-75, 75), hand.between(-60, 10), hand.between(-190, -70))
            organs.append(Organ(hand.tube((trunk, 0.6 * width), (end, 0.35 * width)), ((0.0, tissue),)))
    cava_y = build.aorta_y
    for side, z in ((-1.0, -50.0), (1.0, -42.0)):
        hilum = at(48 * side, 40, z, 3.0)
        vein = hand.tube(((-22.0, cava_y, z + 6), 4.5), (hilum, 4.0))
        organs.append(Organ(vein, ((0.0, VENOUS),)))
        organs.append(Organ(hand.tube((aorta, 3.0), (hilum, 2.4)), ((0.0, BLOOD),)))
    return organs


def _draw_kidneys(hand: Hand) -> list[Organ]:
    """Kidneys in their fat, the right one lower, each with the fat of its sinus on the inner side."""
    frame, variety = hand.build.frame, hand.variety
    shells = (
        (1.5 * min(1.0, variety.halo) + 1.5 * hand.build.halo_mm, FAT),
        (0.0, Tissue.KIDNEY),
        (-8.0, Tissue.KIDNEY_MEDULLA),
    )
    organs = []
    for x, z, tilt_deg, inward in ((-62, -56, 8.0, 1.0), (60, -44, -8.0, -1.0)):
        centre = hand.at(x, 46, z + variety.kidneys_mm, 4.0)
        # The liver lies before the kidney and beside it, not behind: there is the fat of the back wall.
        behind = (centre[0] + inward * 10 * frame, centre[1] + 20 * frame, centre[2] - 2 * frame)
        organs.append(Organ((Ellipsoid(behind, (30 * frame, 26 * frame, 60 * frame)),), ((0.0, FAT),)))
        sinus = (centre[0] + inward * 13 * frame, centre[1] - 6 * frame, centre[2])
        organs += [
            Organ((hand.ellipsoid(centre, (27, 25, 54), (6.0, tilt_deg, 0.0), 0.08),), shells),
            Organ((hand.ellipsoid(sinus, (14, 8, 24), spread=0.1),), ((0.0, FAT),)),
        ]
        for _ in range(variety.kidney_cysts):
            radius = hand.between(5, 24)
            off = [hand.between(-reach, reach) * frame for reach in (24, 22, 48)]
            cyst = (centre[0] + off[0], centre[1] + off[1], centre[2] + off[2])
            organs.append(Organ((hand.ellipsoid(cyst, (radius, radius, radius)),), ((0.0, FLUID),)))
    return organs


def _draw_chest(hand: Hand) -> list[Organ]:
    """Mediastinum with the heart and its chambers on the diaphragm, and the oesophagus."""
    at, frame, aorta_y = hand.at, hand.build.frame, hand.build.aorta_y
    heart = at(24, -30, 104 - hand.variety.heart_mm, 4.0)
    tilt_deg = (0.0, 12.0, 25.0)
    left = (heart[0] + 24 * frame, heart[1] + 6 * frame, heart[2])
    right = (heart[0] - 20 * frame, heart[1] - 4 * frame, heart[2])
    # The lower it lies, the flatter on the diaphragm, and the less fat is between.
    margin_mm = 4.0 - 3.0 * min(1.0, hand.variety.heart_mm / 20.0)
    fat = (hand.ellipsoid(at(2, -22, 150), (42, 66, 120)), hand.ellipsoid(heart, (66, 52, 48), tilt_deg))
    oesophagus = hand.tube(((16.0, aorta_y - 18, 40.0), 6), ((6.0, aorta_y - 10, FAR_MM), 7))
    return [
        Organ(fat, ((0.0, FAT),), Region.THORAX, blend_mm=10.0),
        Organ((hand.ellipsoid(heart, (58, 44, 44), tilt_deg),), ((0.0, Tissue.HEART),), Region.THORAX, margin_mm),
        Organ((hand.ellipsoid(left, (24, 22, 28)),), ((0.0, BLOOD),), Region.THORAX, 9.0),
        Organ((hand.ellipsoid(right, (30, 26, 34)),), ((0.0, VENOUS),), Region.THORAX, 6.0),
        Organ(oesophagus, ((0.0, MUSCLE),), Region.THORAX),
    ]


def _draw_muscles(hand: Hand) -> list[Organ]:
    """Psoas, quadratus lumborum and crura of the diaphragm beside the spine, and the long muscles of the back."""
    build, vary = hand.build, hand.vary
    organs: list[Organ] = []
    for side in (-1, 1):
        psoas = hand.tube(
            (build.place(20 * side, 45, -28), 4),
            ((vary(38, 2) * side * build.frame, build.spine_y - 2, -120.0), 20),
            ((vary(52, 2) * side * build.frame, build.spine_y - 12, -240.0), 27),
        )
        crus_x = 8.0 + 16.0 * side
        crus = hand.tube(
            ((crus_x, build.aorta_y + 12, -70.0), 3.5),
            ((crus_x, build.aorta_y, 0.0), vary(6, 0.6)),
            ((crus_x, build.aorta_y - 6, 40.0), 4),
        )
        organs += [
            Organ(psoas, ((0.7 * build.halo_mm, FAT), (0.0, MUSCLE))),
            Organ(crus, ((0.0, MUSCLE),)),
        ]
    # The long muscles of a side fill the groove beside the spine: a flat bulk with a plane of fat in it.
    y, thickness = build.cavity_mm[2], vary(1.0, 0.08)
    back = []
    for side in (-1, 1):
        columns = [
            cone
            for x, deep, radius in ((18.0, 9.0, 15.0), (34.0, 6.0, 19.0), (49.0, 1.0, 14.0))
            for cone in hand.tube(
                ((side * x * build.frame, y + deep * build.frame, -FAR_MM), radius * thickness * 1.08),
                ((side * x * build.frame, y + deep * build.frame, FAR_MM), radius * thickness * 0.88),
            )
        ]
        shells = ((0.6 * build.halo_mm, Tissue.INTERMUSCULAR_FAT), *FASCIA_SHELLS)
        centre = (side * vary(29, 2) * build.frame, y + 4 * build.frame, 0.0)
        plane = Ellipsoid(
            centre, (max(0.45 * build.halo_mm, 0.3), 17 * build.frame, 2000.0), rotation(0.0, 0.0, 0.5 * side)
        )
        back += [
            Organ(tuple(columns), shells, Region.BODY, blend_mm=12.0 * build.frame),
            Organ((plane,), ((0.0, Tissue.INTERMUSCULAR_FAT),), Region.BODY, only_in=MUSCLE),
        ]
    quadratus = [
        Organ(
            hand.tube(
                ((side * 62 * build.frame, build.spine_y + 28, -FAR_MM), 15),
                ((side * 60 * build.frame, build.spine_y + 30, -70.0), 12),
                ((side * 50 * build.frame, build.spine_y + 34, -20.0), 5),
            ),
            ((0.4 * build.halo_mm, FAT), (0.0, MUSCLE)),
        )
        for side in (-1, 1)
    ]
    return [*organs, *quadratus, *back]


def _draw_spine(hand: Hand) -> list[Organ]:
    """Vertebral bodies with discs between them, their processes, and the canal, along the whole torso."""
    frame, y = hand.build.frame, hand.build.spine_y
    pitch = VERTEBRA_PITCH_MM * frame
    half = 0.5 * (pitch - DISC_MM * frame)
    first = hand.between(0, pitch) - 10 * pitch
    between_processes = hand.tube(((0.0, y + 44 * frame, -FAR_MM), 9), ((0.0, y + 44 * frame, FAR_MM), 8))
    discs = Ellipsoid((0.0, y, 0.0), (23 * frame, 16 * frame, 2000.0))
    organs = [
        Organ(between_processes, ((0.0, MUSCLE),), Region.BODY),
        Organ((discs,), ((0.0, Tissue.DISC),), Region.BODY),
    ]
    for z in (first + index * pitch for index in range(20)):
        ends = (Cut((0.0, 0.0, z + half), (0.0, 0.0, 1.0)), Cut((0.0, 0.0, z - half), (0.0, 0.0, -1.0)))
        body = Ellipsoid((0.0, y, z), (25 * frame, 18 * frame, 60.0))
        spinous = Ellipsoid((0.0, y + 50 * frame, z - 8 * frame), (4 * frame, 20 * frame, 11 * frame))
        root = (0.0, y + 32 * frame, z)
        transverse = [
            cone for side in (-36, 36) for cone in hand.tube((root, 6), ((side * frame, y + 38 * frame, z), 3.5))
        ]
        organs += [
            Organ((body,), BODY_SHELLS, Region.BODY, cuts=ends),
            Organ((spinous,), BONE_SHELLS, Region.BODY),
            Organ(tuple(transverse), BONE_SHELLS, Region.BODY),
        ]
    canal = hand.tube(((0.0, y + 25 * frame, -FAR_MM), 9), ((0.0, y + 25 * frame, FAR_MM), 9))
    return [*organs, Organ(canal, ((2.0, Tissue.INTERMUSCULAR_FAT), (0.0, Tissue.SPINAL_FLUID)), Region.BODY)]


def _draw_great_vessels(hand: Hand) -> list[Organ]:
    """Aorta in front of the spine, and the vena cava beside it, through the liver to the heart."""
    y, wide = hand.build.aorta_y, hand.vary(1.0, 0.08)
    aorta = hand.tube(
        ((10.0, y, -FAR_MM), 8 * wide),
        ((hand.vary(8, 2), y, 0.0), 10.5 * wide),
        ((hand.vary(14, 2), y + 8, 90.0), 12 * wide),
        ((20.0, y + 16, FAR_MM), 12.5 * wide),
    )
    cava = hand.tube(
        ((-22.0, y + 2, -FAR_MM), 10),
        ((hand.vary(-24, 2), y - 2, -20.0), 12 * wide),
        (hand.build.cava_top, 13),
        (hand.at(-16, 6, 100), 14),
    )
    return [
        Organ(aorta, ((1.5, FAT), (0.0, BLOOD)), Region.BODY),
        Organ(cava, ((0.0, VENOUS),), Region.BODY),
    ]


def _draw_effusion(hand: Hand) -> list[Organ]:
    """Fluid at the back of the chest, which lies there in front of the lung."""
    size = hand.variety.effusion
    if not size:
        return []
    return [
        Organ(
            (hand.ellipsoid(hand.at(side * 66, 62, 70, 5.0), (58 * size, 42 * size, 70 * size)),),
            ((0.0, FLUID),),
            Region.THORAX,
            margin_mm=0.0,
            only_in=Tissue.LUNG,
        )
        for side in (-1, 1)
        if hand.between(0, 1) < 0.75
    ]


def _draw_arms(hand: Hand, torso: Torso) -> list[Organ]:
    """Arms that lie beside the body: skin, fat and muscle around one bone."""
    if not hand.variety.arms:
        return []
    build, organs = hand.build, []
    body_mm = torso.cavity_mm[0] + torso.wall_mm[0] + torso.fat_mm[0]
    fat_mm = 3.0 + 0.35 * torso.fat_mm[0]
    radius = hand.vary(30, 3) * build.frame + fat_mm
    for side in (-1, 1):
        x = side * (body_mm + radius + hand.between(-8, 12))
        y = hand.between(-15, 55)
        ends = ((x, y + hand.between(-25, 25), -FAR_MM), (x, y + hand.between(-25, 25), FAR_MM))
        arm = (Cone(*ends, radius, 1.15 * radius),)
        bone = (Cone(*ends, 9 * build.frame, 12 * build.frame),)
        shells = ((0.0, Tissue.SKIN), (-torso.skin_mm, Tissue.FAT), (-torso.skin_mm - fat_mm, MUSCLE))
        organs += [
            Organ(arm, shells, Region.BODY, only_in=Tissue.AIR),
            Organ(bone, ((0.0, Tissue.BONE), (-4.0, Tissue.MARROW)), Region.BODY, only_in=MUSCLE),
        ]
    return organs
