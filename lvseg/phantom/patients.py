"""Draws patients: who they are, how large and how fatty their livers are, and the anatomy that follows.

Axes. As in `lvseg.phantom.anatomy`: LPS millimetres.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

from lvseg.phantom.anatomy import CONTROL_SPACING_MM, WHOLE_LIVER, Anatomy, Tissue, control_count
from lvseg.phantom.organs import MEDIAN_LIVER_ML, draw_body
from lvseg.phantom.variety import USUAL, Variety, draw_variety

SMALLEST_LIVER_ML, LARGEST_LIVER_ML = 800.0, 3500.0
LIVER_LOG_SD = 0.28
# Log-normal with a quarter of the patients above 5.56 %, about the prevalence that Browning et al. 2004 found.
MEDIAN_LIVER_FAT_PERCENT, LIVER_FAT_LOG_SD, LARGEST_LIVER_FAT_PERCENT = 3.0, 0.915, 45.0
DISPLACEMENT_SD_MM = 5.5
SCOLIOSIS_WAVE_MM = 420.0


def random_stream(seed: int, number: int, name: str) -> np.random.Generator:
    """The random numbers of one purpose for one patient; other purposes and patients never shift them."""
    purpose = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, number, purpose])))


def patient_id(seed: int, number: int, varied: bool = False) -> str:
    """Names the anatomy, whatever scanner images it: ``sim0001-0007``, or ``var0001-0007`` with peculiarities."""
    return f"{'var' if varied else 'sim'}{seed:04d}-{number:04d}"


def liver_volume_ml(anatomy: Anatomy, step_mm: float = 3.0) -> float:
    """Volume of the whole liver with its vessels, counted on a cubic grid of this step."""
    reach_mm = float(np.abs(anatomy.displacement_mm).max())
    boxes = np.array([organ.box_mm() for organ in anatomy.organs if organ.shells[-1][1] == Tissue.LIVER])
    lowest, highest = boxes[:, 0].min(axis=0), boxes[:, 1].max(axis=0)
    axes = [np.arange(low, high, step_mm) for low, high in zip(lowest - reach_mm, highest + reach_mm, strict=True)]
    return float(np.isin(anatomy.tissues(*axes), WHOLE_LIVER).sum()) * step_mm**3 / 1000.0


def drawn_liver_ml(seed: int, number: int) -> float:
    """The liver volume aimed at, in ml: log-normal about 1.5 l, kept within 0.8 to 3.5 l."""
    volume_ml = MEDIAN_LIVER_ML * math.exp(LIVER_LOG_SD * random_stream(seed, number, "liver size").standard_normal())
    return min(max(volume_ml, SMALLEST_LIVER_ML), LARGEST_LIVER_ML)


def drawn_liver_fat_percent(seed: int, number: int) -> tuple[float, float]:
    """Fat fraction by proton density, in percent, of the liver (log-normal) and of its focal fat, where it has any."""
    draw = random_stream(seed, number, "liver fat")
    percent = MEDIAN_LIVER_FAT_PERCENT * math.exp(LIVER_FAT_LOG_SD * draw.standard_normal())
    percent = min(percent, LARGEST_LIVER_FAT_PERCENT)
    return percent, percent + float(draw.uniform(8.0, 20.0))


def draw_anatomy(seed: int, number: int, varied: bool = False) -> Anatomy:
    """Draws one patient; the liver is scaled until the map has the volume drawn.

    Args:
        seed: of the set of patients, at least 0.
        number: of the patient within the set, at least 0.
        varied: whether the patient has peculiarities (`lvseg.phantom.variety`).
    """
    variety = draw_variety(random_stream(seed, number, "variety")) if varied else USUAL
    usual_ml, (fat_percent, focal_percent) = drawn_liver_ml(seed, number), drawn_liver_fat_percent(seed, number)
    of_average_size_ml = usual_ml * variety.liver
    volume_ml = of_average_size_ml * variety.frame**3
    count = control_count()
    displacement = random_stream(seed, number, "displacement").normal(0.0, DISPLACEMENT_SD_MM, (3, count, count, count))
    displacement = np.clip(displacement, -2.5 * DISPLACEMENT_SD_MM, 2.5 * DISPLACEMENT_SD_MM)
    displacement[0] += _scoliosis(variety, random_stream(seed, number, "scoliosis"))

    scale = (of_average_size_ml / MEDIAN_LIVER_ML) ** 0.25
    for _ in range(6):
        torso, organs = draw_body(lambda name: random_stream(seed, number, name), usual_ml, scale, variety)
        anatomy = Anatomy(seed, number, volume_ml, fat_percent, focal_percent, torso, organs, displacement)
        ratio = volume_ml / liver_volume_ml(anatomy, step_mm=6.0)
        if abs(ratio - 1) < 0.01:
            break
        # Volume grows with the cube of the scale where the liver is free, and less where the cavity confines it.
        scale *= ratio**0.42
    return anatomy


def _scoliosis(variety: Variety, draw: np.random.Generator) -> npt.NDArray[np.float64]:
    """How far to the side points of each height lie, most at the back: float64 [z, y, 1] of the control points."""
    place = (np.arange(control_count()) - (control_count() - 1) / 2) * CONTROL_SPACING_MM
    along = np.sin(2.0 * math.pi * (place / SCOLIOSIS_WAVE_MM + draw.uniform()))
    at_back = np.clip((place + 60.0) / 120.0, 0.0, 1.0)
    return variety.scoliosis_mm * along[:, None, None] * at_back[:, None]
