"""How far a patient is from the usual: what makes networks fail that have seen usual patients alone.

Every field changes one thing; the defaults change nothing, to the voxel. Lengths are those of a person of average size.
The shares of patients who have each are chosen so that a network meets them often, not as they occur among people.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Variety:
    """A patient's peculiarities; plain numbers are factors on what the usual patient has.

    Args:
        frame: of all lengths, below 0.85 for children; habitus: 0 for average and 2 for obese, None to draw the usual.
        halo: fat around organs, 0 where they touch; wall: of the muscles around the cavity.
        liver: of its volume, also for what a resection leaves; right, left_length, left_thickness, caudate: of lobes.
        wraps: the left lobe goes round the spleen; hangs: it reaches down apart from the rest; riedel: so does the
            right lobe.
        fissures: how many beside the usual one; resected: which side was taken out.
        gallbladder: 0 where it was taken out.
        gas, fluid: shares of the loops of bowel that hold them; near_loops: how many more lie against the liver.
        flexure_mm: how much higher the colon turns below the liver.
        stomach, spleen: of their sizes; kidneys_mm: how much higher the kidneys lie; kidney_cysts: how many.
        heart_mm: how much lower the heart lies on the diaphragm.
        ascites_mm: how far fluid reaches around the liver; effusion: of the fluid over the diaphragm, 0 for none.
        arms: they lie beside the body; scoliosis_mm: how far the spine bends to the side.
    """

    frame: float = 1.0
    habitus: float | None = None
    halo: float = 1.0
    wall: float = 1.0
    liver: float = 1.0
    right: float = 1.0
    left_length: float = 1.0
    left_thickness: float = 1.0
    caudate: float = 1.0
    wraps: bool = False
    hangs: bool = False
    riedel: bool = False
    fissures: int = 0
    resected: Literal["left", "right"] | None = None
    gallbladder: float = 1.0
    gas: float = 0.15
    fluid: float = 0.0
    near_loops: int = 0
    flexure_mm: float = 0.0
    stomach: float = 1.0
    spleen: float = 1.0
    kidneys_mm: float = 0.0
    kidney_cysts: int = 0
    heart_mm: float = 0.0
    ascites_mm: float = 0.0
    effusion: float = 0.0
    arms: bool = False
    scoliosis_mm: float = 0.0


USUAL = Variety()


def draw_variety(draw: np.random.Generator) -> Variety:
    """Peculiarities of one patient; most patients have several."""

    def between(low: float, high: float) -> float:
        return float(draw.uniform(low, high))

    def with_chance(share: float, low: float, high: float, otherwise: float) -> float:
        value, drawn = between(low, high), between(0.0, 1.0)
        return value if drawn < share else otherwise

    def has(share: float) -> bool:
        return between(0.0, 1.0) < share

    size, child, obese, lean = between(0.0, 1.0), between(0.5, 0.85), between(1.8, 3.2), between(-1.9, -1.2)
    is_child = size < 0.08
    side = between(0.0, 1.0)
    resected: Literal["left", "right"] | None = "right" if side < 0.05 else "left" if side < 0.1 else None
    of_volume = with_chance(0.3, 0.5, 0.8, between(0.85, 1.6))
    remains = between(0.4, 0.8)
    return Variety(
        frame=child if is_child else 1.0,
        habitus=obese if 0.08 <= size < 0.22 else lean if 0.22 <= size < 0.34 else None,
        halo=with_chance(0.35, 0.0, 0.0, between(0.2, 1.3)),
        wall=between(0.5, 1.4),
        liver=of_volume if resected is None else remains,
        right=between(0.85, 1.1),
        left_length=between(0.6, 1.7),
        left_thickness=between(0.55, 1.3),
        caudate=between(0.8, 1.7),
        wraps=has(0.2),
        hangs=has(0.3),
        riedel=has(0.15),
        fissures=int(between(0.0, 4.0)),
        resected=resected,
        gallbladder=0.0 if resected == "right" else with_chance(0.15, 0.0, 0.0, between(0.45, 1.9)),
        gas=between(0.0, 0.5),
        fluid=between(0.0, 0.5),
        near_loops=int(between(0.0, 14.0)) if resected is None else 14,
        flexure_mm=with_chance(0.4, 20.0, 60.0, 0.0),
        stomach=between(0.55, 1.4),
        spleen=between(0.65, 1.5),
        kidneys_mm=between(-15.0, 30.0),
        kidney_cysts=int(with_chance(0.3, 1.0, 4.0, 0.0)),
        heart_mm=between(0.0, 40.0),
        ascites_mm=with_chance(0.15, 4.0, 30.0, 0.0),
        effusion=with_chance(0.12, 0.4, 1.3, 0.0),
        arms=has(0.3),
        scoliosis_mm=with_chance(0.15, 8.0, 24.0, 0.0),
    )
