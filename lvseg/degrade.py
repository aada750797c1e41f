"""Scans made worse in known ways, with their truth: what a quality estimate is fitted and tried on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from lvseg.volume import Array, Volume

Degraded = tuple[Array, Array]  # canonical voxels float32 [S, H, W], and the mask that belongs to them


def _noise(image: Array, mask: Array, strength: float, random: np.random.Generator) -> Degraded:
    """Rician noise of a standard deviation of up to half the bright tissue."""
    sd = 0.5 * strength * _bright(image)
    real, imaginary = random.normal(0, sd, (2, *image.shape))
    low = image.min()
    return (np.hypot(image - low + real, imaginary) + low).astype(np.float32), mask


def _ghosts(image: Array, mask: Array, strength: float, random: np.random.Generator) -> Degraded:
    """Breathing ghosts along the rows: copies a fraction of the field away, of up to 0.6 of the image."""
    shift = int(image.shape[1] * random.uniform(0.1, 0.4))
    low = image.min()
    copies = np.roll(image - low, shift, axis=1) + np.roll(image - low, -shift, axis=1)
    return (image + 0.6 * strength * random.uniform(0.7, 1) * copies).astype(np.float32), mask


def _blur(image: Array, mask: Array, strength: float, random: np.random.Generator) -> Degraded:
    """Resolution lost in plane: a Gaussian of up to a fortieth of the rows."""
    sigma = strength * image.shape[1] / 40
    return ndimage.gaussian_filter(image, (0, sigma, sigma)).astype(np.float32), mask


def _kept_slices(mask: Array, strength: float, random: np.random.Generator) -> slice:
    """A field of view that ends within the organ: up to three quarters of its slices lost at its head or its feet."""
    inside = np.flatnonzero(mask.any(axis=(1, 2)))
    if inside.size < 2:
        return np.s_[:]
    lost = min(max(1, round(strength * 0.75 * inside.size)), inside.size - 1)
    return np.s_[inside[0] + lost :] if random.random() < 0.5 else np.s_[: inside[-1] + 1 - lost]


def _cysts(image: Array, mask: Array, strength: float, random: np.random.Generator) -> Degraded:
    """Large dark (or, as on T2, bright) balls in the organ, which belong to it."""
    inside = np.argwhere(mask > 0)
    if not inside.size:
        return image, mask
    changed = image.copy()
    low, bright = float(image.min()), _bright(image)
    extent = np.ptp(inside, axis=0) + 1
    for _ in range(1 + int(4 * strength)):
        centre = inside[random.integers(len(inside))]
        radii = np.maximum(extent * random.uniform(0.1, 0.15 + 0.2 * strength), 1)
        ball = sum(
            ((index - middle) / radius) ** 2
            for index, middle, radius in zip(np.ogrid[tuple(map(slice, image.shape))], centre, radii, strict=True)
        )
        level = low + bright * (0.05 if random.random() < 0.5 else 1.1)
        changed[(ball < 1) & (mask > 0)] = level
    return changed, mask


def _turned(image: Array, mask: Array, strength: float, random: np.random.Generator) -> Degraded:
    """Axes that are not what the file says: feet and head, front and back or left and right exchanged."""
    axes = [(0,), (1,), (2,), (1, 2)][random.integers(4)]
    return np.flip(image, axes).copy(), np.flip(mask, axes).copy()


def _shading(image: Array, mask: Array, strength: float, random: np.random.Generator) -> Degraded:
    """A coil that fades from one corner to the other, down to an eighth."""
    signs = random.choice((-1, 1), 2)
    rows, columns = (np.linspace(-1, 1, n) * sign for n, sign in zip(image.shape[1:], signs, strict=True))
    gain = np.exp(-strength * np.log(8) * (1 + (rows[:, None] + columns[None]) / 2) / 2)
    low = image.min()
    return ((image - low) * gain + low).astype(np.float32), mask


def _contrast(image: Array, mask: Array, strength: float, random: np.random.Generator) -> Degraded:
    """Another contrast: a gamma of up to 3 or down to a third."""
    low, bright = image.min(), _bright(image)
    gamma = 3.0 ** (strength * random.choice((-1, 1)))
    return (low + bright * (np.clip(image - low, 0, None) / bright) ** gamma).astype(np.float32), mask


TRUNCATED = "truncated"
CHANGES: dict[str, Callable[[Array, Array, float, np.random.Generator], Degraded]] = {
    "noise": _noise,
    "ghosts": _ghosts,
    "blur": _blur,
    "cysts": _cysts,
    "turned": _turned,
    "shading": _shading,
    "contrast": _contrast,
}
KINDS = (*CHANGES, TRUNCATED)


def degrade(scan: Volume, truth: Volume, kind: str, strength: float, seed: int) -> tuple[Volume, Volume]:
    """A worse scan, and its truth on the same grid.

    Args:
        scan: any real dtype, any orientation.
        truth: integer mask on the scan's grid.
        kind: of `KINDS`.
        strength: from 0, hardly anything, to 1, beyond what a reader would accept.
        seed: of what is drawn.

    Returns:
        Canonical volumes, float32 and uint8; metadata is kept.

    Raises:
        ValueError: for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"Expected one of {', '.join(KINDS)}, received {kind}.")
    image, mask = scan.canonical(), truth.canonical()
    random = np.random.default_rng([seed, KINDS.index(kind)])
    voxels, labels = image.voxels.astype(np.float32), mask.voxels.astype(np.uint8)
    if kind == TRUNCATED:
        kept = _kept_slices(labels, strength, random)
        affine = image.affine.copy()
        affine[:3, 3] += affine[:3, 0] * (kept.start or 0)
        return (
            Volume(voxels[kept], affine, image.source, dict(image.metadata)),
            Volume(labels[kept], affine, mask.source, dict(mask.metadata)),
        )
    voxels, labels = CHANGES[kind](voxels, labels, strength, random)
    return image.with_voxels(voxels), mask.with_voxels(labels)


def _bright(image: Array) -> float:
    """How far bright tissue lies above the darkest voxel."""
    return max(float(np.percentile(image, 99) - image.min()), 1e-6)
