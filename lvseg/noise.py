"""The noise of a pair of MR images, measured in themselves, and what it adds to magnitudes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from lvseg.volume import Array

Floats = npt.NDArray[np.float64]

NOISE_PASSES = 1e-3  # share of voxels of pure noise that count as signal
MAGNITUDE_FREEDOM = 4.0  # two magnitudes are two real and two imaginary parts
RAYLEIGH_MEAN = math.sqrt(math.pi / 2)
BLOCK_PIXELS = 5
LEAST_BLOCKS = 20
# Standard deviation over mean of the root of W^2 + F^2 in air: 0.36 for magnitudes, 0.52 where the scanner kept the
# phase, less where many coils add up; tissue has less, and the edges of organs have any.
NOISE_VARIATION = (0.15, 0.75)
# The same of one image: 0.52 for a magnitude (Rayleigh), 0.76 for the size of a phase-sensitive one (half normal).
MAGNITUDE_VARIATION = 0.64
# Noise levels of blocks of air scatter by 7 %, so the densest window this wide, in their logarithm, holds most of them.
AIR_WINDOW = 0.25
MANY_SHARE = 0.25  # of what the fullest window holds
# Of the deviations in blocks of tissue, most of which have structure, the low end is noise: this quantile, in pure
# noise 0.749 sigma (chi with the 22 degrees of freedom that a plane leaves of 25 pixels).
TISSUE_QUANTILE, TISSUE_QUANTILE_SDS = 0.05, 0.749
# Edges of organs can pass for air where a scanner set air to zero, but not with noise that tissue does not have. In
# images interpolated to more pixels neighbours share their noise, and tissue shows less of it: with air in view, more
# is allowed.
AIR_OVER_TISSUE, AIR_OVER_TISSUE_IN_VIEW, FEW_ZEROS = 2.0, 4.0, 0.01


@dataclass(frozen=True)
class NoiseFloor:
    """The noise of a pair of images.

    threshold: a voxel is signal where the root of the sum of both squares exceeds it; 0 where noise is unknown.
    means: what pure noise reads on average in the first and the second image; None where it could not be measured.
    sds: sigma of the noise in the first and the second image, as the standard deviation of a real or imaginary part;
        0 for images without noise, None where it could not be measured.
    measured_in: "air", "tissue" or "nothing".
    magnitudes: whether the noise of air is that of magnitudes; None where air is not in view.
    """

    threshold: float
    means: tuple[float, float] | None
    sds: tuple[float, float] | None
    measured_in: str
    magnitudes: bool | None

    def signal(self, first: Floats, second: Floats) -> npt.NDArray[np.bool_]:
        """Which voxels are more than noise: bool in the shape of the images."""
        return first * first + second * second > self.threshold**2


def noise_floor(first: Array, second: Array) -> NoiseFloor:
    """Measures the noise of two images in themselves.

    In air the root of the sum of both squares varies by a known part of its mean: blocks of 5 x 5 pixels that vary like
    that are candidates, and the level at which most of them agree is the noise; edges of organs vary likewise, each at
    a level of its own. The sum's distribution there is taken as a scaled chi square with the mean and the variance that
    it has, which is exact for magnitudes (four degrees of freedom) and fits phase-sensitive images and several coils.
    Where the air was set to zero, or is not in view, the noise is the deviation from a plane in the most even blocks of
    bright tissue.

    Args:
        first, second: [slice, row, column] of one shape.
    """
    pairs = [_blocks(np.asarray(image, np.float64)) for image in (first, second)]
    energy = pairs[0] ** 2 + pairs[1] ** 2
    root = np.sqrt(energy)
    tissue = _tissue_noise(pairs, root)
    filled = np.count_nonzero(root, axis=1) > root.shape[1] / 2
    variation = _variation(root)
    air = np.flatnonzero(filled & (variation > NOISE_VARIATION[0]) & (variation < NOISE_VARIATION[1]))
    agreeing = _agreeing(np.sqrt(energy[air].mean(1)))
    if agreeing is not None:
        air = air[agreeing]
        mean, variance = float(energy[air].mean()), float(energy[air].var())
        freedom = min(max(2 * mean**2 / variance, 1.0), 64.0)
        in_view = np.mean(root == 0) < FEW_ZEROS
        most = math.inf if tissue is None else tissue * (AIR_OVER_TISSUE_IN_VIEW if in_view else AIR_OVER_TISSUE)
        if math.sqrt(mean / MAGNITUDE_FREEDOM) <= most and (in_view or tissue is not None):
            parts = [image[air].ravel() for image in pairs]
            magnitudes = all(float(_variation(part[None])[0]) < MAGNITUDE_VARIATION for part in parts)
            sds = [math.sqrt(float((part**2).mean()) / (2.0 if magnitudes else 1.0)) for part in parts]
            means = (float(parts[0].mean()), float(parts[1].mean()))
            return NoiseFloor(_threshold(mean, freedom), means, (sds[0], sds[1]), "air", magnitudes)
    if tissue is None:
        return NoiseFloor(0.0, None, None, "nothing", None)
    threshold = _threshold(MAGNITUDE_FREEDOM * tissue**2, MAGNITUDE_FREEDOM)
    return NoiseFloor(threshold, (RAYLEIGH_MEAN * tissue,) * 2, (tissue, tissue), "tissue", None)


def _threshold(mean: float, freedom: float) -> float:
    """Root of what a scaled chi square of this mean exceeds with the probability `NOISE_PASSES`."""
    return math.sqrt(mean * 2 / freedom * float(special.gammainccinv(freedom / 2, NOISE_PASSES)))


def _variation(values: Floats) -> Floats:
    """Standard deviation over mean of each row, 0 where the mean is."""
    mean = values.mean(1)
    return np.divide(values.std(1), mean, out=np.zeros(mean.shape), where=mean > 0)


def without_bias(magnitudes: Floats, sd: float) -> Floats:
    """The signals that would read these magnitudes on average, 0 below the mean of noise (Koay and Basser 2006).

    Args:
        magnitudes: float64, any shape; sd: sigma of their noise.
    """
    if sd == 0:
        return magnitudes
    signal = np.linspace(0.0, 40.0, 8001)  # in sd; beyond, the square root below is exact to 1e-4
    half = signal**2 / 4
    mean = RAYLEIGH_MEAN * ((1 + 2 * half) * special.ive(0, half) + 2 * half * special.ive(1, half))
    scaled = magnitudes / sd
    return sd * np.where(scaled < mean[-1], np.interp(scaled, mean, signal), np.sqrt(np.maximum(scaled**2 - 1, 0.0)))


def _tissue_noise(pairs: Sequence[Floats], root: Floats) -> float | None:
    """Standard deviation from a plane in blocks of bright, even tissue; None where there are too few."""
    mean = root.mean(1)
    lit = mean > 0
    if np.count_nonzero(lit) < LEAST_BLOCKS:
        return None
    even = lit & (mean >= np.median(mean[lit])) & (root.min(1) > 0.5 * mean)
    if np.count_nonzero(even) < LEAST_BLOCKS:
        return None
    chosen = [image[even] for image in pairs]
    # The stronger of the two images in a block: there the noise is normal.
    strongest = np.where((chosen[0].mean(1) >= chosen[1].mean(1))[:, None], chosen[0], chosen[1])
    steps = np.arange(BLOCK_PIXELS) - (BLOCK_PIXELS - 1) / 2
    row, column = (part.ravel() for part in np.meshgrid(steps, steps, indexing="ij"))
    basis = np.stack([np.ones(row.size), row, column], 1)
    basis /= np.linalg.norm(basis, axis=0)
    left = strongest - (strongest @ basis) @ basis.T
    levels = np.sqrt((left**2).sum(1) / (row.size - basis.shape[1]))
    return float(np.quantile(levels, TISSUE_QUANTILE)) / TISSUE_QUANTILE_SDS


def _blocks(image: Floats) -> Floats:
    """Square blocks of each slice, [blocks, pixels]; what is left over at two edges is left out."""
    slices, rows, columns = (
        image.shape[0],
        image.shape[1] // BLOCK_PIXELS,
        image.shape[2] // BLOCK_PIXELS,
    )
    whole = image[:, : rows * BLOCK_PIXELS, : columns * BLOCK_PIXELS]
    split = whole.reshape(slices, rows, BLOCK_PIXELS, columns, BLOCK_PIXELS)
    return split.transpose(0, 1, 3, 2, 4).reshape(-1, BLOCK_PIXELS**2)


def _agreeing(levels: Floats) -> Array | None:
    """Indices of the levels in the lowest of the windows, in the logarithm, that hold many; None if all hold too few.

    The lowest, not the fullest: tissue at a few times the noise may agree on a level as well.
    """
    order = np.argsort(levels)
    order = order[levels[order] > 0]
    if order.size < LEAST_BLOCKS:
        return None
    logarithms = np.log(levels[order])
    ends = np.searchsorted(logarithms, logarithms + AIR_WINDOW)
    counts = ends - np.arange(order.size)
    lowest = int(np.argmax(counts >= MANY_SHARE * counts.max()))  # on the slope up to the lowest peak
    near = np.searchsorted(logarithms, logarithms[lowest] + 2 * AIR_WINDOW)
    first = lowest + int(np.argmax(counts[lowest:near]))
    chosen = order[first : ends[first]]
    return chosen if chosen.size >= LEAST_BLOCKS else None
