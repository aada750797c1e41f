"""Distances between the surfaces of two masks, in millimetres, on grids whose voxels need not be cubes.

Surfaces, their areas and distances are those of DeepMind's surface-distance (Nikolov et al., J Med Internet Res 2021,
23:e26151): elements between voxel centres, weighted by their area, so that a thick slice weighs as much as it should.
A mask's surface closes at the edge of the scan.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from lvseg.volume import Array

TOLERANCES_MM = (1.0, 3.0)
ROBUST_PERCENT = 95


def surface_distances(
    predicted: Array, true: Array, spacing_mm: Sequence[float], tolerances_mm: Sequence[float] = TOLERANCES_MM
) -> dict[str, float | None]:
    """Distances between the surfaces of one class's prediction and truth.

    Args:
        predicted: bool [S, H, W].
        true: bool [S, H, W].
        spacing_mm: (slice, row, column).
        tolerances_mm: below which two surfaces count as one.

    Returns:
        surface_dice_<t>mm for every tolerance t, from 0 to 1; hausdorff_95_mm, the larger of both directions' 95th
        percentiles; mean_surface_distance_mm, over the area of both surfaces. Two empty masks agree: surface Dice 1
        and distance 0. With one of them empty surface Dice is 0 and the distances, which are infinite, are None.

    Raises:
        ValueError: for shapes that differ.
    """
    if predicted.shape != true.shape or predicted.ndim != 3:
        raise ValueError(f"Expected two masks [S, H, W] of one shape, received {predicted.shape} and {true.shape}.")
    names = [f"surface_dice_{tolerance_mm:g}mm" for tolerance_mm in tolerances_mm]
    found, is_so = bool(predicted.any()), bool(true.any())
    if not (found and is_so):
        agrees = found == is_so
        distance = 0.0 if agrees else None
        return dict.fromkeys(names, float(agrees)) | {"hausdorff_95_mm": distance, "mean_surface_distance_mm": distance}
    with warnings.catch_warnings():  # it asks for SciPy's filters by their former names
        warnings.simplefilter("ignore", DeprecationWarning)
        import surface_distance

        surfaces = surface_distance.compute_surface_distances(
            true.astype(bool), predicted.astype(bool), tuple(map(float, spacing_mm))
        )
    areas = [surfaces["surfel_areas_gt"], surfaces["surfel_areas_pred"]]
    distances = [surfaces["distances_gt_to_pred"], surfaces["distances_pred_to_gt"]]
    total = sum(float(area.sum()) for area in areas)
    weighted = sum(float((area * distance).sum()) for area, distance in zip(areas, distances, strict=True))
    return {
        **{
            name: float(surface_distance.compute_surface_dice_at_tolerance(surfaces, tolerance_mm))
            for name, tolerance_mm in zip(names, tolerances_mm, strict=True)
        },
        "hausdorff_95_mm": float(surface_distance.compute_robust_hausdorff(surfaces, ROBUST_PERCENT)),
        "mean_surface_distance_mm": weighted / total,
    }
