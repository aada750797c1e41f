"""Smooth random fields: what makes two bodies, and two spots of one tissue, differ.

Axes. Positions are world millimetres along each axis of a separable grid. Control points lie on a lattice centred on
the origin, whatever grid is asked for, so a field is a function of space like the anatomy itself.

Only additions and multiplications are used, each rounded as IEEE 754 says, so a field is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Mean of the squared weights of a cubic B-spline: what is left of the controls' variance along each axis.
SPLINE_VARIANCE = 151.0 / 315.0


def draw_controls(draw: np.random.Generator, extent_mm: Sequence[float], spacing_mm: float) -> npt.NDArray[np.float64]:
    """Control points of a field with mean 0 and standard deviation 1 over a box centred on the origin.

    Args:
        draw: the random stream.
        extent_mm: full size of the box along each axis; beyond it the outermost control points repeat.
        spacing_mm: distance between control points.

    Returns:
        float64, as many axes as `extent_mm`.
    """
    counts = [2 * int(extent / (2.0 * spacing_mm) + 2.0) + 1 for extent in extent_mm]
    return draw.standard_normal(counts) / SPLINE_VARIANCE ** (0.5 * len(counts))


def smooth_field(
    controls: npt.NDArray[np.float64], spacing_mm: float, axes_mm: Sequence[npt.NDArray[np.float64]]
) -> npt.NDArray[np.float32]:
    """A cubic B-spline field on a grid.

    Args:
        controls: float64, one axis for each of `axes_mm`.
        spacing_mm: distance between control points.
        axes_mm: positions along each axis.

    Returns:
        float32 in the shape of the grid.
    """
    values = controls
    for axis, positions in enumerate(axes_mm):
        place = positions / spacing_mm + 0.5 * (controls.shape[axis] - 1)
        first = np.floor(place)
        part = place - first
        rest = 1.0 - part
        weights = (
            rest * rest * rest,
            3.0 * part * part * part - 6.0 * part * part + 4.0,
            3.0 * rest * rest * rest - 6.0 * rest * rest + 4.0,
            part * part * part,
        )
        along = [1] * values.ndim
        along[axis] = len(positions)
        index = first.astype(np.int64) - 1
        sums: npt.NDArray[np.float64] | float = 0.0
        for step, weight in enumerate(weights):
            near = np.clip(index + step, 0, controls.shape[axis] - 1)
            sums = sums + np.take(values, near, axis=axis) * (weight * (1.0 / 6.0)).reshape(along)
        values = np.asarray(sums)
    return values.astype(np.float32)
