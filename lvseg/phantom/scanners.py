"""MR scanners with their protocols, and what they make of a patient.

The map of tissues comes first. Each tissue's proton density, T1 and R2* (`lvseg.phantom.physics`) and the sequence give
what a tissue contributes to each image, as tables with one value a tissue; voxels average the tables over the samples
that lie in them; then come field, coils, breathing, noise and the scanner's reconstruction.

Scans are simulated on canonical grids and then brought into the order in which the scanner stores them, so `image`
returns volumes as the files hold them, each with its LPS affine.

Columns of truth.csv:
    liver_volume_ml            true volume of the whole liver within the scan, from several samples a voxel
    liver_volume_in_mask_ml    what the voxels of mask.nii.gz add up to
    whole_liver_ml             true volume of all the liver, also what the field of view cuts off
    liver_fat_percent          proton-density fat fraction of liver tissue
    mask_fat_percent_mean      mean of that of the tissues at the mask's voxel centres
    steatosis                  1 where liver_fat_percent is above 5.56, else 0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lvseg.phantom import dixon, imaging, masks
from lvseg.phantom.anatomy import Anatomy, Tissue
from lvseg.phantom.patients import draw_anatomy, liver_volume_ml, random_stream
from lvseg.phantom.physics import (
    AVERAGE,
    FAT_T1_MS,
    LIVER_WATER_T1_MS,
    TissueValues,
    draw_tissues,
    fat_left_by_suppression,
    fat_phasor,
    spoiled_gradient_echo,
)
from lvseg.phantom.scan import Scan
from lvseg.phantom.shapes import Point, rotation
from lvseg.volume import Volume

VOLUME, FAT_FRACTION = "volume", "fatfraction"
STEATOSIS_PERCENT = 5.56
GAIN_SPREAD = 0.1  # receivers are adjusted to each patient
BREATHING_MM, LARGEST_BREATHING_MM = 3.0, 9.0  # during the scan, by how well the breath is held
GHOST_MEDIAN, GHOST_LOG_SD, LARGEST_GHOST = 0.012, 0.7, 0.06
FAT_MARGIN_MM = (8.0, 10.0)  # between the border of the liver and what operators draw for fat
SUPPRESSION_HALF_WIDTH_PPM = 1.1
FIELD_GUESS_SPACING_MM, FIELD_GUESS_SD_PPM = 60.0, 0.08
BACKGROUND_NOISE_SDS = 4.0


@dataclass(frozen=True)
class Sequence:
    """A spoiled gradient echo.

    Args:
        field_t: of the scanner.
        repetition_ms, flip_deg, echo_times_ms: of the sequence.
        echo_weights: what the image is made of, a weight an echo: (1,) for one echo, (0.5, 0.5) for the water image of
            an opposed-phase and an in-phase echo; empty where water and fat are separated from all echoes.
        fat_left: share of the fat signal that fat suppression leaves where the field is even; None without.
    """

    field_t: float
    repetition_ms: float
    flip_deg: float
    echo_times_ms: tuple[float, ...]
    echo_weights: tuple[float, ...] = (1.0,)
    fat_left: float | None = None

    @property
    def echo_times_s(self) -> npt.NDArray[np.float64]:
        """float64 [echoes]."""
        return np.array(self.echo_times_ms) / 1000.0

    def saturation(self, t1_s: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Signal of a proton density of 1 without decay, in the shape of `t1_s`."""
        return spoiled_gradient_echo(t1_s, self.repetition_ms / 1000.0, self.flip_deg)

    def nominal_saturation(self) -> tuple[float, float]:
        """`saturation` of the water and of the fat of an average liver."""
        share = (self.field_t - 1.5) / 1.5
        water_s, fat_s = ((low + (high - low) * share) / 1000.0 for low, high in (LIVER_WATER_T1_MS, FAT_T1_MS))
        return float(self.saturation(water_s)), float(self.saturation(fat_s))

    def contrast(self, values: TissueValues) -> npt.NDArray[np.float64]:
        """What each tissue's water and fat add to the image: float64 [3, tissues], water, real and imaginary fat."""
        decays = np.exp(-np.outer(self.echo_times_s, values.r2star_per_s))
        weighted = np.array(self.echo_weights)[:, None] * decays
        phasors = fat_phasor(self.echo_times_s, self.field_t)
        water = values.water * self.saturation(values.water_t1_s) * weighted.sum(axis=0)
        fat = values.fat * self.saturation(values.fat_t1_s) * (weighted * phasors[:, None]).sum(axis=0)
        return np.stack([water, fat.real, fat.imag])

    def first_echo(self, values: TissueValues) -> npt.NDArray[np.float64]:
        """What the echoes start from: float64 [3, tissues], water, fat, and their sum times R2*, at the first echo.

        Water and fat have the phase they had at time 0, so their later signal follows from time alone.
        """
        decay = np.exp(-self.echo_times_s[0] * values.r2star_per_s)
        water = values.water * self.saturation(values.water_t1_s) * decay
        fat = values.fat * self.saturation(values.fat_t1_s) * decay
        return np.stack([water, fat, (water + fat) * values.r2star_per_s])


@dataclass(frozen=True)
class Scanner:
    """A scanner with its protocol.

    Args:
        name: as in files and cards.
        task: VOLUME or FAT_FRACTION: what images it makes, and what operators draw on them.
        slices, rows, columns: of the stack.
        slice_mm, pixel_mm: distance between slices, which touch, and between pixels.
        sequence: how it measures.
        liver_intensity: stored value of an average liver; of pure water for fat scans.
        noise: standard deviation of the noise in each of the two channels (of each echo), as a share of an average
            liver's signal.
        shading: strength of the coils' uneven sensitivity, 0 for none.
        flips: which of (slice, row, column) are stored against the canonical direction.
        order: the canonical axis that each stored axis is.
        tilt_deg: how much patients lie turned, and the stack with them, at most, about each axis.
        breathes: whether breathing moves the patient at all.
        contour_jitter: masks deviate as an operator's do.
        at: where in the liver's height the stack's middle lies, 0 for the tip and 1 for the dome; None for where it
            shows most of the liver.
        varied: its patients have peculiarities (`lvseg.phantom.variety`).
    """

    name: str
    task: str
    slices: int
    rows: int
    columns: int
    slice_mm: float
    pixel_mm: float
    sequence: Sequence
    liver_intensity: float
    noise: float
    shading: float
    flips: tuple[bool, bool, bool] = (False, False, False)
    order: tuple[int, int, int] = (0, 1, 2)
    tilt_deg: float = 0.0
    breathes: bool = True
    contour_jitter: bool = False
    at: float | None = None
    varied: bool = False

    def image(self, seed: int, number: int) -> Scan:
        """Draws a patient and scans it."""
        return image_patient(draw_anatomy(seed, number, self.varied), self)


SCANNERS: Mapping[str, Scanner] = {
    scanner.name: scanner
    for scanner in (
        # Philips 1.5 T, THRIVE: the report's first set. Fat is inverted and nulled before the echoes.
        Scanner(
            "philips_volume", VOLUME, 55, 200, 200, 5.0, 2.0,
            Sequence(1.5, 4.0, 10.0, (1.9,), fat_left=0.15),
            liver_intensity=620.0, noise=0.055, shading=0.40,
        ),
        # GE 3 T, water-fat: the report's second set. The water image of two echoes, as if fat had one peak: some fat
        # stays. Stored from head to feet, and each slice turned half round.
        Scanner(
            "ge_volume", VOLUME, 28, 256, 256, 5.0, 1.5,
            Sequence(3.0, 5.2, 12.0, (1.15, 2.3), (0.5, 0.5)),
            liver_intensity=2400.0, noise=0.060, shading=0.55, flips=(True, True, True),
        ),
        # Siemens 3 T, VIBE in opposed phase: for tests on what no training has seen. Thin slices, fat bright, black
        # lines where fat and water meet; stored by tools that let the patient's left-right axis come first, and tilted.
        Scanner(
            "siemens_volume", VOLUME, 64, 196, 240, 3.0, 1.6,
            Sequence(3.0, 3.9, 9.0, (1.15,)),
            liver_intensity=260.0, noise=0.050, shading=0.30,
            flips=(False, True, False), order=(2, 1, 0), tilt_deg=6.0,
        ),
        # Philips 1.5 T, six echoes.
        Scanner(
            "philips_fat", FAT_FRACTION, 34, 208, 208, 6.0, 1.95,
            Sequence(1.5, 8.2, 5.0, (1.1, 2.1, 3.1, 4.1, 5.1, 6.1), ()),
            liver_intensity=1500.0, noise=0.024, shading=0.35,
        ),
        # GE 3 T, six echoes of two interleaved shots.
        Scanner(
            "ge_fat", FAT_FRACTION, 25, 224, 224, 10.0, 1.72,
            Sequence(3.0, 7.0, 3.0, (1.0, 1.8, 2.6, 3.4, 4.2, 5.0), ()),
            liver_intensity=900.0, noise=0.022, shading=0.50, flips=(True, True, True),
        ),
        # Siemens 3 T, six echoes.
        Scanner(
            "siemens_fat", FAT_FRACTION, 46, 148, 184, 4.0, 2.1,
            Sequence(3.0, 9.0, 3.0, (1.2, 2.2, 3.2, 4.2, 5.2, 6.2), ()),
            liver_intensity=300.0, noise=0.026, shading=0.30,
            flips=(False, True, False), order=(2, 1, 0), tilt_deg=6.0,
        ),
    )
}  # fmt: skip


def image_patient(anatomy: Anatomy, scanner: Scanner) -> Scan:
    """Scans a patient.

    The patient's tissues, the placing of the stack, the scan's own disturbances and its noise come from streams of
    their own, so each can change without the others.

    Returns:
        Volumes in the direction in which the scanner stores them: `image` (int16; float32 percent for fat scans, which
        have int16 `water` and `fat` too), mask and tissues uint8.
    """

    def stream(purpose: str) -> np.random.Generator:
        return random_stream(anatomy.seed, anatomy.number, f"{purpose} {scanner.name}")

    values = draw_tissues(anatomy, scanner.sequence.field_t)
    looked = imaging.survey(anatomy)
    counts, spacing_mm = (scanner.slices, scanner.rows, scanner.columns), (scanner.slice_mm, *(scanner.pixel_mm,) * 2)
    grid = imaging.place(looked, counts, spacing_mm, stream("stack"), scanner.at)
    draw = stream("scan")
    breathing_mm = min(abs(float(draw.normal(0.0, BREATHING_MM))), LARGEST_BREATHING_MM)
    ghost = min(GHOST_MEDIAN * math.exp(GHOST_LOG_SD * draw.standard_normal()), LARGEST_GHOST)
    gain = math.exp(GAIN_SPREAD * float(np.clip(draw.standard_normal(), -2.0, 2.0)))
    if not scanner.breathes:
        breathing_mm = ghost = 0.0

    separates = scanner.task == FAT_FRACTION
    tables = (scanner.sequence.first_echo if separates else scanner.sequence.contrast)(values)
    maps, tissues, liver_ml = imaging.sample(anatomy, grid, tables)
    imaging.blur_by_breathing(maps, grid.spacing_mm[0], breathing_mm)
    if separates:
        # The mean R2* of what is in a voxel, weighted by signal.
        np.divide(maps[2], maps[0] + maps[1], out=maps[2], where=maps[2] > 0)
    signals = maps[:2] if separates else maps
    imaging.add_texture(signals, tissues, grid, stream("texture"))
    off_resonance = imaging.off_resonance_ppm(looked, grid)
    if scanner.sequence.fat_left is not None:
        for index, ppm in enumerate(off_resonance):
            signals[1:, index] *= fat_left_by_suppression(ppm, scanner.sequence.fat_left, SUPPRESSION_HALF_WIDTH_PPM)
    signals *= imaging.coils(grid, scanner.shading, draw)
    imaging.add_ghosts(signals, grid, looked.body_mm()[0], ghost, draw)
    imaging.point_spread(signals)

    if separates:
        guess_error = imaging.random_smooth(grid, FIELD_GUESS_SPACING_MM, draw)
        images = _separated(maps, off_resonance, guess_error, scanner, gain, stream("noise"))
    else:
        liver = _average_liver_signal(scanner.sequence)
        magnitude = imaging.noisy_magnitude(maps[0] + maps[1], maps[2], scanner.noise * liver, stream("noise"))
        images = {"image": _as_int16(magnitude, scanner.liver_intensity * gain / liver)}

    mask = _mask(tissues, grid, scanner, stream)
    lies = _lies(scanner, stream("tilt"))

    def store(voxels: npt.NDArray) -> Volume:
        return imaging.stored(voxels, grid, scanner.flips, scanner.order, lies)

    in_mask = np.bincount(tissues[mask != 0], minlength=len(Tissue))
    voxel_ml = float(np.prod(grid.spacing_mm)) / 1000.0
    volumes = {name: store(voxels) for name, voxels in images.items()}
    if separates:
        volumes["image"] = _fat_fraction(volumes["water"], volumes["fat"])
    return Scan(
        images=volumes,
        mask=store(mask),
        tissues=store(tissues),
        truth={
            "liver_volume_ml": liver_ml,
            "liver_volume_in_mask_ml": float(in_mask.sum()) * voxel_ml,
            "whole_liver_ml": max(liver_ml, liver_volume_ml(anatomy, step_mm=4.0)),  # counted on different grids
            "liver_fat_percent": anatomy.liver_fat_percent,
            "mask_fat_percent_mean": float(in_mask @ values.fat_percent) / max(1, int(in_mask.sum())),
            "steatosis": float(anatomy.liver_fat_percent > STEATOSIS_PERCENT),
        },
    )


def _average_liver_signal(sequence: Sequence) -> float:
    """Signal of an average liver without fat: of the image, or of the first echo."""
    share = (sequence.field_t - 1.5) / 1.5
    liver = AVERAGE[Tissue.LIVER]
    t2_s = (liver.t2_ms[0] + (liver.t2_ms[1] - liver.t2_ms[0]) * share) / 1000.0
    r2star = 1.0 / t2_s + liver.r2_prime_per_s * sequence.field_t / 1.5
    decays = np.exp(-sequence.echo_times_s * r2star)
    weighted = float(decays @ np.array(sequence.echo_weights)) if sequence.echo_weights else float(decays[0])
    return liver.proton_density * sequence.nominal_saturation()[0] * weighted


def _separated(
    maps: imaging.Reals,
    off_resonance: imaging.Smooth,
    guess_error: imaging.Smooth,
    scanner: Scanner,
    gain: float,
    draw: np.random.Generator,
) -> dict[str, npt.NDArray[np.int16]]:
    """Echoes of water, fat and R2* with noise, and what the scanner separates from them.

    The scanner knows the field up to a smooth error, as from a search over whole regions, and refines it voxel by
    voxel. It divides out what an average liver's T1 makes of water and of fat. The phase that water and fat have in
    common is taken from their sum, and what is stored is the size of each along it: noise adds to the mean of a
    magnitude, and to this much less.
    """
    sequence = scanner.sequence
    times = sequence.echo_times_s
    phasors = fat_phasor(times, sequence.field_t)
    hz_per_ppm = np.float32(42.577 * sequence.field_t)
    noise_sd = np.float32(scanner.noise * _average_liver_signal(sequence))
    water_scale, fat_scale = (
        scanner.liver_intensity * gain / saturation for saturation in sequence.nominal_saturation()
    )
    stored = {name: np.empty(maps.shape[1:], dtype=np.int16) for name in ("water", "fat")}
    for index in range(maps.shape[1]):
        water, fat, r2star = (plane.ravel() for plane in maps[:, index])
        field_hz = off_resonance.slice(index).ravel() * hz_per_ppm
        guess_hz = field_hz + guess_error.slice(index).ravel() * (np.float32(FIELD_GUESS_SD_PPM) * hz_per_ppm)
        noise = draw.standard_normal((2, len(times), len(water)), dtype=np.float32)
        noise *= noise_sd
        real, imaginary = noise
        inside = np.flatnonzero(water + fat)
        w, f, r, hz = water[inside], fat[inside], r2star[inside], field_hz[inside]
        for echo, (time, phasor) in enumerate(zip(times, phasors, strict=True)):
            left = dixon.decay(r * np.float32(time - times[0]))
            re = (w + f * np.float32(phasor.real)) * left
            im = f * np.float32(phasor.imag) * left
            cosine, sine = dixon.turn(hz * np.float32(time))
            real[echo, inside] += re * cosine - im * sine
            imaginary[echo, inside] += re * sine + im * cosine
        least = BACKGROUND_NOISE_SDS * float(noise_sd)
        of_water, of_fat, *_ = dixon.separate_parts(real, imaginary, times, sequence.field_t, guess_hz, least)
        common_re, common_im = of_water[0] + of_fat[0], of_water[1] + of_fat[1]
        size = np.sqrt(common_re * common_re + common_im * common_im) + np.float32(1e-20)
        for name, (re, im), scale in (("water", of_water, water_scale), ("fat", of_fat, fat_scale)):
            along = np.abs(re * common_re + im * common_im) / size
            stored[name][index] = _as_int16(along, scale).reshape(maps.shape[2:])
    return stored


def _as_int16(signal: npt.NDArray[np.float32], scale: float) -> npt.NDArray[np.int16]:
    return np.clip(np.rint(signal * np.float32(scale)), 0, np.iinfo(np.int16).max).astype(np.int16)


def _fat_fraction(water: Volume, fat: Volume) -> Volume:
    """The scanner's own map of F / (W + F): float32 percent in steps of 0.1, without regard to noise, also in air."""
    total = water.voxels.astype(np.float32) + fat.voxels
    percent = np.rint(fat.voxels * np.float32(1000.0) / np.maximum(total, np.float32(1.0))) * np.float32(0.1)
    return Volume(percent.astype(np.float32), water.affine, metadata={**water.metadata, "units": "percent"})


def _mask(
    tissues: npt.NDArray[np.uint8], grid: imaging.Grid, scanner: Scanner, stream: Callable[[str], np.random.Generator]
) -> npt.NDArray[np.uint8]:
    """What an operator draws on this scan."""
    if scanner.task == VOLUME:
        mask = masks.whole_liver(tissues)
    else:
        mask = masks.within_liver(tissues, grid.spacing_mm, float(stream("margin").uniform(*FAT_MARGIN_MM)))
    return masks.drawn_by_hand(mask, grid, stream("hand")) if scanner.contour_jitter else mask


def _lies(scanner: Scanner, draw: np.random.Generator) -> tuple[Point, Point, Point]:
    """Where the patient's x, y and z axes point in the scanner."""
    return rotation(*(math.radians(angle) for angle in draw.uniform(-scanner.tilt_deg, scanner.tilt_deg, 3)))
