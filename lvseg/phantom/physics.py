"""Tissue parameters and the equations that turn them into signal.

The way from tissue to image is in three steps, so that a map of tissues can be imaged anew at any time: `draw_tissues`
gives one patient's parameters as plain arrays with one value a tissue; the equations below turn those arrays into what
a sequence sees of each tissue, again one value a tissue; and the map picks from them, voxel by voxel. All equations are
pure functions of numbers or arrays that NumPy broadcasts, in SI units (seconds, tesla, hertz), angles in degrees.

Where the numbers come from (units of the table: proton density relative to pure water, times in ms, R2' in 1/s):

- T1 and T2 of liver, spleen, pancreas, kidney cortex and medulla and subcutaneous fat at 1.5 and 3 T, and T2 of muscle
  and marrow: de Bazelaire et al., Radiology 2004;230:652.
- T1 of skeletal muscle, T1 and T2 of heart muscle, T2 of blood: Stanisz et al., Magn Reson Med 2005;54:507. T1 of blood
  at 1.5 T: the same; at 3 T: Lu et al., Magn Reson Med 2004;52:679.
- T1 of cerebrospinal fluid, hardly dependent on field: Rooney et al., Magn Reson Med 2007;57:308.
- Lung: T2* of about 2 ms at 1.5 T and 0.7 ms at 3 T, Yu et al., Magn Reson Med 2011;66:248.
- Cortical bone: T2* of about 0.4 ms and T1 of about 0.2 s, Reichert et al., Magn Reson Imaging 2005;23:611.
- Proton density: water content by Woodard and White, Br J Radiol 1986;59:1209, times density; triglyceride has about as
  many protons a volume as water.
- Fat fractions: liver from the patient; pancreas Kühn et al., Radiology 2015;276:129; vertebral marrow Kühn et al.,
  Radiology 2014;272:494; adipose tissue and muscle: usual values of water-fat studies.
- T1 of fat and of water in the liver, and the single R2* that both share: Hamilton et al., NMR Biomed 2011;24:784.
- The rest (T1 of water in marrow and adipose tissue, contents of stomach, bowel and gallbladder, walls, skin, discs,
  lesions) are estimates; so is R2', the decay by uneven field within a voxel, which is proportional to the field:
  R2* = 1/T2 + R2'. For liver it is chosen so that T2* is about 29 ms at 1.5 T, and in the range healthy people have:
  Schwenzer et al., Invest Radiol 2008;43:854.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lvseg.phantom.anatomy import Anatomy, Tissue
from lvseg.phantom.patients import random_stream

PerTissue = npt.NDArray[np.float64]  # [len(Tissue)]

GYROMAGNETIC_HZ_PER_T = 42.577e6

# The fat spectrum of the liver as distances from the water peak, Hamilton et al., NMR Biomed 2011;24:784.
FAT_PPM = np.array([0.60, -0.50, -1.95, -2.60, -3.40, -3.80])
FAT_AMPLITUDES = np.array([0.047, 0.039, 0.006, 0.120, 0.700, 0.088])

GAS_PPM, LUNG_PPM = 9.4, 7.0  # volume susceptibility above that of tissue; lung is about three quarters air


class Parameters(NamedTuple):
    """One tissue of an average person: pairs are at 1.5 and 3 T; `t1_spread` is the relative spread between people."""

    proton_density: float
    t1_ms: tuple[float, float]
    t2_ms: tuple[float, float]
    r2_prime_per_s: float
    fat_percent: float = 0.0
    fat_spread_percent: float = 0.0
    t1_spread: float = 0.05


_VENOUS = Parameters(0.82, (1441, 1584), (180, 100), 4)
_LIVER = Parameters(0.76, (586, 809), (46, 34), 12, t1_spread=0.06)
_NOTHING = Parameters(0.0, (1000, 1000), (100, 100), 0)

AVERAGE: Mapping[Tissue, Parameters] = {
    Tissue.AIR: _NOTHING,
    Tissue.SKIN: Parameters(0.65, (900, 1000), (30, 30), 20, fat_percent=8, fat_spread_percent=3),
    Tissue.FAT: Parameters(0.93, (600, 700), (58, 68), 5, fat_percent=93, fat_spread_percent=1.2),
    Tissue.VISCERAL_FAT: Parameters(0.92, (600, 700), (58, 68), 8, fat_percent=90.5, fat_spread_percent=1.4),
    Tissue.MUSCLE: Parameters(0.78, (1008, 1412), (27, 29), 4, fat_percent=2.5, fat_spread_percent=1),
    Tissue.BONE: Parameters(0.20, (220, 240), (0.4, 0.4), 0),
    Tissue.MARROW: Parameters(0.75, (900, 1100), (49, 49), 45, fat_percent=48, fat_spread_percent=7),
    Tissue.DISC: Parameters(0.80, (1000, 1150), (80, 75), 10),
    Tissue.SPINAL_FLUID: Parameters(1.00, (4200, 4300), (1800, 1700), 2),
    Tissue.LUNG: Parameters(0.22, (1200, 1400), (40, 40), 450),
    Tissue.HEART: Parameters(0.80, (1030, 1471), (40, 47), 6, fat_percent=1),
    Tissue.BLOOD: Parameters(0.83, (1441, 1664), (290, 275), 2),
    Tissue.LIVER: _LIVER,
    Tissue.HEPATIC_VESSEL: _VENOUS,
    Tissue.SPLEEN: Parameters(0.82, (1057, 1328), (79, 61), 6, fat_percent=0.5),
    Tissue.KIDNEY: Parameters(0.80, (966, 1142), (87, 76), 5, fat_percent=0.8),
    Tissue.KIDNEY_MEDULLA: Parameters(0.83, (1412, 1545), (85, 81), 7, fat_percent=0.8),
    Tissue.STOMACH: Parameters(0.78, (950, 1150), (60, 55), 10, fat_percent=2),
    Tissue.STOMACH_CONTENT: Parameters(0.95, (2200, 2400), (300, 250), 10, t1_spread=0.35),
    Tissue.BOWEL: Parameters(0.78, (850, 1050), (60, 55), 12, fat_percent=3),
    Tissue.BOWEL_CONTENT: Parameters(0.85, (1100, 1250), (120, 100), 20, fat_percent=2, t1_spread=0.4),
    Tissue.GAS: _NOTHING,
    Tissue.GALLBLADDER: Parameters(0.95, (1700, 1900), (400, 350), 2, t1_spread=0.4),
    Tissue.PANCREAS: Parameters(0.75, (584, 725), (46, 43), 7, fat_percent=5, fat_spread_percent=2),
    Tissue.VENOUS_BLOOD: _VENOUS,
    Tissue.PORTAL_BLOOD: _VENOUS,
    Tissue.PORTAL_VESSEL: _VENOUS,
    Tissue.CYST: Parameters(0.99, (3000, 3200), (700, 600), 2, t1_spread=0.15),
    Tissue.LESION: Parameters(0.83, (1250, 1600), (90, 75), 6, t1_spread=0.15),
    Tissue.FOCAL_FAT: _LIVER,
    Tissue.CONNECTIVE: Parameters(0.55, (700, 800), (6, 6), 60, fat_percent=4, fat_spread_percent=1),
    Tissue.INTERMUSCULAR_FAT: Parameters(0.90, (600, 700), (58, 68), 8, fat_percent=84, fat_spread_percent=3),
    Tissue.FREE_FLUID: Parameters(0.98, (2600, 2800), (600, 500), 2, t1_spread=0.2),  # an estimate too
}

LIVER_LIKE = (Tissue.LIVER, Tissue.FOCAL_FAT)
FAT_T1_MS = (343.0, 382.0)  # de Bazelaire et al. 2004, subcutaneous fat
LIVER_WATER_T1_MS = _LIVER.t1_ms
PROTON_DENSITY_SPREAD, FAT_T1_SPREAD, R2_PRIME_SPREAD, LIVER_R2_PRIME_SPREAD = 0.02, 0.04, 0.2, 0.45


@dataclass(frozen=True)
class TissueValues:
    """One patient's tissues at one field strength.

    Args:
        water, fat: float64 [tissues], proton densities relative to pure water; fat / (water + fat) is the fat fraction.
        water_t1_s, fat_t1_s: float64 [tissues] and one value for all fat.
        r2star_per_s: float64 [tissues], shared by water and fat.
    """

    water: PerTissue
    fat: PerTissue
    water_t1_s: PerTissue
    fat_t1_s: float
    r2star_per_s: PerTissue

    @property
    def fat_percent(self) -> PerTissue:
        """Proton-density fat fraction, float64 [tissues]; 0 where there are no protons."""
        return 100.0 * self.fat / np.maximum(self.water + self.fat, 1e-12)


def draw_tissues(anatomy: Anatomy, field_t: float) -> TissueValues:
    """The parameters of one patient's tissues; how the patient differs from the average is the same at every field.

    Args:
        anatomy: the patient; decides the fat fraction of the liver.
        field_t: between 1 and 3.5; relaxation times are interpolated from those at 1.5 and 3 T.
    """
    draw = random_stream(anatomy.seed, anatomy.number, "tissues")
    density, t1, r2_prime, fat = (_truncated_normal(draw) for _ in range(4))
    fat_t1 = float(np.exp(FAT_T1_SPREAD * draw.standard_normal()))
    rows = [AVERAGE[tissue] for tissue in Tissue]
    share = (field_t - 1.5) / 1.5

    def at_field(pairs: list[tuple[float, float]]) -> PerTissue:
        low, high = np.array(pairs).T
        return (low + (high - low) * share) / 1000.0

    fat_percent = np.array([row.fat_percent + row.fat_spread_percent * z for row, z in zip(rows, fat, strict=True)])
    fat_percent[Tissue.LIVER] = anatomy.liver_fat_percent
    fat_percent[Tissue.FOCAL_FAT] = anatomy.focal_fat_percent
    t1_spread = np.array([row.t1_spread for row in rows])
    prime_spread = np.array([LIVER_R2_PRIME_SPREAD if t in LIVER_LIKE else R2_PRIME_SPREAD for t in Tissue])
    # Focal fat is liver with more fat, and in all else the same.
    for variation in (density, t1, r2_prime):
        variation[Tissue.FOCAL_FAT] = variation[Tissue.LIVER]
        variation[[Tissue.HEPATIC_VESSEL, Tissue.PORTAL_BLOOD, Tissue.PORTAL_VESSEL]] = variation[Tissue.VENOUS_BLOOD]

    total = np.array([row.proton_density for row in rows]) * np.exp(PROTON_DENSITY_SPREAD * density)
    fat_share = np.clip(fat_percent, 0.0, 100.0) / 100.0
    primes = np.array([row.r2_prime_per_s for row in rows]) * np.exp(prime_spread * r2_prime)
    return TissueValues(
        water=total * (1.0 - fat_share),
        fat=total * fat_share,
        water_t1_s=at_field([row.t1_ms for row in rows]) * np.exp(t1_spread * t1),
        fat_t1_s=float(at_field([FAT_T1_MS])[0]) * fat_t1,
        r2star_per_s=1.0 / at_field([row.t2_ms for row in rows]) + primes * field_t / 1.5,
    )


def _truncated_normal(draw: np.random.Generator) -> PerTissue:
    own = np.clip(draw.standard_normal(len(Tissue) - 1), -2.2, 2.2)
    return np.append(own, own[Tissue.SPINAL_FLUID])  # FREE_FLUID, the last, is off by as much


def spoiled_gradient_echo(
    t1_s: npt.ArrayLike, repetition_s: float, flip_deg: float, echo_s: float = 0.0, r2star_per_s: npt.ArrayLike = 0.0
) -> npt.NDArray[np.float64]:
    """Steady-state signal of a spoiled gradient echo for a proton density of 1.

    sin(flip) (1 - E1) / (1 - cos(flip) E1) exp(-echo R2*) with E1 = exp(-repetition / T1): Ernst and Anderson, Rev Sci
    Instrum 1966;37:93.
    """
    e1 = np.exp(-repetition_s / np.asarray(t1_s, dtype=np.float64))
    flip = math.radians(flip_deg)
    steady = math.sin(flip) * (1.0 - e1) / (1.0 - math.cos(flip) * e1)
    return steady * np.exp(-echo_s * np.asarray(r2star_per_s, dtype=np.float64))


def fat_phasor(echo_s: npt.ArrayLike, field_t: float) -> npt.NDArray[np.complex128]:
    """Signal of fat relative to water of the same proton density, complex128 in the shape of `echo_s`, 1 at time 0."""
    frequencies_hz = FAT_PPM * 1e-6 * GYROMAGNETIC_HZ_PER_T * field_t
    turns = np.multiply.outer(np.asarray(echo_s, dtype=np.float64), frequencies_hz)
    return (np.exp(2j * np.pi * turns) * FAT_AMPLITUDES).sum(axis=-1)


def opposed_phase_echo_s(field_t: float) -> float:
    """The first echo time at which the main fat peak (methylene) is opposed to water; twice this is in phase."""
    return 0.5 / (abs(FAT_PPM[4]) * 1e-6 * GYROMAGNETIC_HZ_PER_T * field_t)


def fat_left_by_suppression(
    off_resonance_ppm: npt.NDArray[np.float32], base: float, half_width_ppm: float
) -> npt.NDArray[np.float32]:
    """Share of the fat signal that spectral inversion leaves: `base` in good field, towards all where it is off.

    The pulse reaches half a band around the fat peak; beyond `half_width_ppm` off resonance fat slips out of it within
    another half width. The olefinic protons near the water line are never reached, so `base` is at least their 4.7 %.
    """
    beyond = np.abs(off_resonance_ppm) * np.float32(1.0 / half_width_ppm) - np.float32(1.0)
    beyond = np.clip(beyond, np.float32(0.0), np.float32(1.0))
    slipped = beyond * beyond * (np.float32(3.0) - np.float32(2.0) * beyond)
    return np.float32(base) + np.float32(1.0 - base) * slipped


def susceptibility_ppm(tissues: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Volume susceptibility above that of tissue, in ppm, in the shape of the map."""
    table = np.zeros(len(Tissue))
    table[[Tissue.AIR, Tissue.GAS]] = GAS_PPM
    table[Tissue.LUNG] = LUNG_PPM
    return table[tissues]


def field_of_susceptibility_ppm(
    susceptibility: npt.NDArray[np.float64], spacing_mm: tuple[float, float, float]
) -> npt.NDArray[np.float64]:
    """Change of the main field, which points along z, by magnetised matter.

    The Fourier transform of the field of a dipole is 1/3 - kz^2/k^2: Marques and Bowtell, Concepts Magn Reson B
    2005;25:65. The box repeats, so give it room.

    Args:
        susceptibility: float64 [z, y, x], ppm.
        spacing_mm: of its samples along (z, y, x).

    Returns:
        float64 [z, y, x], ppm of the main field.
    """
    kz, ky, kx = (
        np.fft.fftfreq(count, spacing) if axis < 2 else np.fft.rfftfreq(count, spacing)
        for axis, (count, spacing) in enumerate(zip(susceptibility.shape, spacing_mm, strict=True))
    )
    square = kz[:, None, None] ** 2 + ky[:, None] ** 2 + kx**2
    square[0, 0, 0] = 1.0
    dipole = 1.0 / 3.0 - kz[:, None, None] ** 2 / square
    dipole[0, 0, 0] = 0.0  # the mean field is where the scanner puts its centre frequency
    return np.fft.irfftn(np.fft.rfftn(susceptibility) * dipole, susceptibility.shape, axes=(0, 1, 2))
