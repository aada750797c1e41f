"""What a scanner makes of a patient: protocols, and the imaging itself.

Axes. Scans are simulated on canonical grids ([slice, row, column] towards head, back and the patient's left) and then
flipped into the order in which the scanner stores them, so `image_patient` returns volumes as the files hold them, each
with its LPS affine. Contrasts imitate two families of sequences; they are not computed from relaxation times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lvseg.phantom.anatomy import WHOLE_LIVER, Anatomy, Tissue
from lvseg.phantom.patients import liver_volume_ml, random_stream
from lvseg.volume import Volume

# Where a voxel is sampled, in voxels from its centre (slice, row, column): partial volume through the slice and within.
# The centre comes first: it decides the label. Each axis is covered evenly.
SAMPLES = ((0.0, 0.0, 0.0), (-0.4, 0.2, -0.4), (-0.2, -0.4, 0.2), (0.2, 0.4, -0.2), (0.4, -0.2, 0.4))
TEXTURE_SPACING_MM = 9.0
POINT_SPREAD = (0.12, 0.76, 0.12)  # of the in-plane acquisition, in pixels


@dataclass(frozen=True)
class Scanner:
    """A scanner with its protocol.

    Args:
        name: as in files and cards.
        slices, rows, columns: of the stack.
        slice_mm, pixel_mm: distance between slices, which touch, and between pixels.
        flips: which of (slice, row, column) are stored against the canonical direction.
        signals: brightness of each tissue, the liver near 1.
        spread: tissues whose brightness differs widely between patients, with its relative standard deviation; that of
            all others is `usual_spread`.
        liver_intensity: stored value of brightness 1.
        noise: standard deviation of the noise in each of the two channels, in units of brightness.
        shading: strength of the coils' uneven sensitivity, 0 for none.
    """

    name: str
    slices: int
    rows: int
    columns: int
    slice_mm: float
    pixel_mm: float
    flips: tuple[bool, bool, bool]
    signals: Mapping[Tissue, float]
    spread: Mapping[Tissue, float]
    usual_spread: float
    liver_intensity: float
    noise: float
    shading: float


# T1-weighted gradient echo with fat suppression (THRIVE): fat and water dark, liver and pancreas bright.
FAT_SUPPRESSED_T1 = {
    Tissue.AIR: 0.0, Tissue.SKIN: 0.42, Tissue.FAT: 0.15, Tissue.VISCERAL_FAT: 0.18, Tissue.MUSCLE: 0.62,
    Tissue.BONE: 0.12, Tissue.MARROW: 0.36, Tissue.DISC: 0.44, Tissue.SPINAL_FLUID: 0.22, Tissue.LUNG: 0.07,
    Tissue.HEART: 0.66, Tissue.BLOOD: 0.55, Tissue.LIVER: 1.0, Tissue.HEPATIC_VESSEL: 0.64, Tissue.SPLEEN: 0.80,
    Tissue.KIDNEY: 0.95, Tissue.KIDNEY_MEDULLA: 0.72, Tissue.STOMACH: 0.76, Tissue.STOMACH_CONTENT: 0.35,
    Tissue.BOWEL: 0.80, Tissue.BOWEL_CONTENT: 0.60, Tissue.GAS: 0.02, Tissue.GALLBLADDER: 0.40, Tissue.PANCREAS: 1.06,
    Tissue.VENOUS_BLOOD: 0.55, Tissue.PORTAL_BLOOD: 0.55, Tissue.PORTAL_VESSEL: 0.64, Tissue.CYST: 0.3,
    Tissue.LESION: 0.7, Tissue.FOCAL_FAT: 0.85, Tissue.CONNECTIVE: 0.2, Tissue.INTERMUSCULAR_FAT: 0.18,
}  # fmt: skip

# Water image of a water-fat sequence with little T1 weighting: blood and fluids bright, liver darker than the spleen.
WATER = {
    Tissue.AIR: 0.0, Tissue.SKIN: 0.55, Tissue.FAT: 0.06, Tissue.VISCERAL_FAT: 0.09, Tissue.MUSCLE: 0.78,
    Tissue.BONE: 0.08, Tissue.MARROW: 0.50, Tissue.DISC: 1.05, Tissue.SPINAL_FLUID: 1.45, Tissue.LUNG: 0.10,
    Tissue.HEART: 1.00, Tissue.BLOOD: 1.65, Tissue.LIVER: 1.0, Tissue.HEPATIC_VESSEL: 1.40, Tissue.SPLEEN: 1.28,
    Tissue.KIDNEY: 1.45, Tissue.KIDNEY_MEDULLA: 1.62, Tissue.STOMACH: 1.05, Tissue.STOMACH_CONTENT: 1.2,
    Tissue.BOWEL: 1.05, Tissue.BOWEL_CONTENT: 1.15, Tissue.GAS: 0.02, Tissue.GALLBLADDER: 1.6, Tissue.PANCREAS: 1.12,
    Tissue.VENOUS_BLOOD: 1.65, Tissue.PORTAL_BLOOD: 1.65, Tissue.PORTAL_VESSEL: 1.4, Tissue.CYST: 1.6,
    Tissue.LESION: 1.2, Tissue.FOCAL_FAT: 0.9, Tissue.CONNECTIVE: 0.2, Tissue.INTERMUSCULAR_FAT: 0.09,
}  # fmt: skip

CONTENTS = {Tissue.STOMACH_CONTENT: 0.40, Tissue.BOWEL_CONTENT: 0.35, Tissue.GALLBLADDER: 0.40}

# How uneven a tissue looks at the scale of some voxels, relative to its brightness; 0.03 where not listed.
TEXTURE = {
    Tissue.FAT: 0.12, Tissue.VISCERAL_FAT: 0.25, Tissue.MUSCLE: 0.10, Tissue.MARROW: 0.12, Tissue.LUNG: 0.45,
    Tissue.HEART: 0.10, Tissue.BLOOD: 0.06, Tissue.LIVER: 0.035, Tissue.STOMACH_CONTENT: 0.20, Tissue.BOWEL: 0.15,
    Tissue.BOWEL_CONTENT: 0.30, Tissue.PANCREAS: 0.10,
}  # fmt: skip

SCANNERS: Mapping[str, Scanner] = {
    scanner.name: scanner
    for scanner in (
        # Philips 1.5 T, THRIVE: the report's first set.
        Scanner(
            "philips_volume", 55, 200, 200, 5.0, 2.0, (False, False, False),
            FAT_SUPPRESSED_T1, CONTENTS, 0.09, 620.0, 0.055, 0.40,
        ),
        # GE 3 T, water-fat: the report's second set. Stored from head to feet, and each slice turned half round.
        Scanner(
            "ge_volume", 28, 256, 256, 5.0, 1.5, (True, True, True),
            WATER, CONTENTS, 0.07, 2400.0, 0.060, 0.55,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Scan:
    """A simulated scan with its truth.

    Args:
        image: int16.
        mask: uint8, 1 in the whole liver, on the image's grid.
        tissues: uint8 numbers of `Tissue`, on the image's grid.
        liver_volume_ml: of the liver within the scan, from several samples a voxel.
        whole_liver_ml: of all the liver, also what the field of view cuts off.
    """

    image: Volume
    mask: Volume
    tissues: Volume
    liver_volume_ml: float
    whole_liver_ml: float


def image_patient(anatomy: Anatomy, scanner: Scanner) -> Scan:
    """Scans a patient: partial volume, texture, uneven coils, point spread, Rician noise.

    The operator centres the stack on the liver, to within some millimetres. The noise is drawn once per patient and
    scanner, from a stream of its own.

    Returns:
        Volumes [slices, rows, columns] of the protocol, in the direction in which the scanner stores them.
    """
    draw = random_stream(anatomy.seed, anatomy.number, f"scan {scanner.name}")
    x, y, z = _grid_mm(anatomy, scanner, draw)
    brightness = np.array(
        [
            scanner.signals[tissue] * np.exp(scanner.spread.get(tissue, scanner.usual_spread) * draw.standard_normal())
            for tissue in Tissue
        ],
        dtype=np.float32,
    )

    spacing_zyx = (scanner.slice_mm, scanner.pixel_mm, scanner.pixel_mm)
    signal = np.zeros((len(z), len(y), len(x)), dtype=np.float32)
    liver_samples = 0
    tissues = np.empty(0, dtype=np.uint8)
    for index, offset in enumerate(SAMPLES):
        dz, dy, dx = np.multiply(offset, spacing_zyx)
        sample = anatomy.tissues(x + dx, y + dy, z + dz)
        signal += brightness[sample]
        liver_samples += int(np.isin(sample, WHOLE_LIVER).sum())
        if index == 0:
            tissues = sample
    signal *= np.float32(1.0 / len(SAMPLES))

    _add_texture(signal, tissues, (z, y, x), random_stream(anatomy.seed, anatomy.number, f"texture {scanner.name}"))
    signal *= _coils(x, y, z, scanner.shading, draw)
    signal = _point_spread(signal)
    noise = random_stream(anatomy.seed, anatomy.number, f"noise {scanner.name}")
    image = _rician(signal, scanner.noise, noise) * np.float32(scanner.liver_intensity)
    stored = np.clip(np.rint(image), 0, np.iinfo(np.int16).max).astype(np.int16)

    mask = np.isin(tissues, WHOLE_LIVER).astype(np.uint8)
    sample_ml = float(np.prod(spacing_zyx)) / len(SAMPLES) / 1000.0
    return Scan(
        image=_as_stored(stored, (z, y, x), scanner),
        mask=_as_stored(mask, (z, y, x), scanner),
        tissues=_as_stored(tissues, (z, y, x), scanner),
        liver_volume_ml=liver_samples * sample_ml,
        whole_liver_ml=liver_volume_ml(anatomy),
    )


def _grid_mm(
    anatomy: Anatomy, scanner: Scanner, draw: np.random.Generator
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Ascending voxel centres along x, y and z: the body in the middle, the slices about the liver's middle."""
    coarse = [np.arange(-250.0, 250.0, 10.0), np.arange(-200.0, 200.0, 10.0), np.arange(-200.0, 150.0, 2.5)]
    map_ = anatomy.tissues(*coarse)
    in_liver = np.flatnonzero(np.isin(map_, WHOLE_LIVER).any(axis=(1, 2)))
    in_body = np.flatnonzero((map_ != Tissue.AIR).any(axis=(0, 2)))
    centre_z = 0.5 * (coarse[2][in_liver[0]] + coarse[2][in_liver[-1]]) + draw.uniform(-4, 4)
    centre_y = 0.5 * (coarse[1][in_body[0]] + coarse[1][in_body[-1]]) + draw.uniform(-8, 8)
    centre_x = draw.uniform(-6, 6)

    def axis(count: int, spacing_mm: float, centre_mm: float) -> npt.NDArray[np.float64]:
        # Scanners report positions to some decimals; thousandths also survive the float32 of file headers.
        first_mm = round(centre_mm - 0.5 * (count - 1) * spacing_mm, 3)
        return first_mm + np.arange(count) * spacing_mm

    return (
        axis(scanner.columns, scanner.pixel_mm, centre_x),
        axis(scanner.rows, scanner.pixel_mm, centre_y),
        axis(scanner.slices, scanner.slice_mm, centre_z),
    )


def _add_texture(
    signal: npt.NDArray[np.float32],
    tissues: npt.NDArray[np.uint8],
    axes: tuple[npt.NDArray[np.float64], ...],
    draw: np.random.Generator,
) -> None:
    """Multiplies the signal by 1 plus a smooth random field, as strong as each tissue is uneven."""
    strength = np.array([TEXTURE.get(tissue, 0.03) for tissue in Tissue], dtype=np.float32)
    weights = [_linear_weights(axis) for axis in axes]
    coarse = draw.standard_normal([weight.shape[1] for weight in weights])
    through, rows, columns = weights
    across = np.einsum("ijk,xk->ijx", coarse, columns)
    planes = np.einsum("ijx,yj->iyx", across, rows).astype(np.float32)
    for index, weight in enumerate(through):
        field = sum(planes[control] * np.float32(weight[control]) for control in np.flatnonzero(weight))
        signal[index] *= np.maximum(np.float32(1.0) + field * strength[tissues[index]], np.float32(0.0))


def _linear_weights(axis_mm: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Weights of linear interpolation between random values `TEXTURE_SPACING_MM` apart, float64 [positions, values]."""
    position = (axis_mm - axis_mm[0]) / TEXTURE_SPACING_MM
    values = np.arange(round(float(position[-1])) + 2)  # a count that no rounding error can change
    return np.maximum(1.0 - np.abs(position[:, None] - values), 0.0)


def _coils(
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.float64],
    z: npt.NDArray[np.float64],
    strength: float,
    draw: np.random.Generator,
) -> npt.NDArray[np.float32]:
    """Sensitivity, float32 [z, y, x]: brighter towards the coils in front and behind, less at the stack's ends."""
    across, deep, along = (axis / 150.0 for axis in (x, y - y.mean(), z - z.mean()))
    tilt = draw.normal(0.0, 0.35 * strength, 4)
    in_plane = (
        1.0
        + strength * (0.7 * deep**2)[:, None]
        + 0.3 * strength * across**2
        + tilt[0] * across
        + (tilt[1] * deep)[:, None]
        + tilt[2] * across * deep[:, None]
    )
    ends = 1.0 - 0.5 * strength * along**2 + tilt[3] * along
    return (np.maximum(ends, 0.2)[:, None, None] * np.clip(in_plane, 0.3, 3.0)).astype(np.float32)


def _point_spread(signal: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Blurs within the slice; the outermost pixels repeat."""
    before, here, after = (np.float32(weight) for weight in POINT_SPREAD)
    padded = np.pad(signal, ((0, 0), (1, 1), (0, 0)), mode="edge")
    signal = padded[:, :-2] * before + padded[:, 1:-1] * here + padded[:, 2:] * after
    padded = np.pad(signal, ((0, 0), (0, 0), (1, 1)), mode="edge")
    return padded[:, :, :-2] * before + padded[:, :, 1:-1] * here + padded[:, :, 2:] * after


def _rician(signal: npt.NDArray[np.float32], noise_sd: float, draw: np.random.Generator) -> npt.NDArray[np.float32]:
    """Magnitude of the signal with normal noise in the real and the imaginary channel."""
    real = draw.standard_normal(signal.shape, dtype=np.float32)
    real *= np.float32(noise_sd)
    real += signal
    imaginary = draw.standard_normal(signal.shape, dtype=np.float32)
    imaginary *= np.float32(noise_sd)
    return np.sqrt(real * real + imaginary * imaginary)


def _as_stored(voxels: npt.NDArray, axes: tuple[npt.NDArray[np.float64], ...], scanner: Scanner) -> Volume:
    """A canonical array in the scanner's own direction, with the affine that says so."""
    affine = np.zeros((4, 4))
    affine[3, 3] = 1.0
    for axis, (positions, flipped) in enumerate(zip(axes, scanner.flips, strict=True)):
        world = 2 - axis  # slices run along z, rows along y, columns along x
        affine[world, axis] = positions[0] - positions[1] if flipped else positions[1] - positions[0]
        affine[world, 3] = positions[-1] if flipped else positions[0]
    flipped_axes = [axis for axis, flipped in enumerate(scanner.flips) if flipped]
    return Volume(np.ascontiguousarray(np.flip(voxels, flipped_axes)), affine, metadata={"modality": "MR"})
