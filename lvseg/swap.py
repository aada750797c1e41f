"""The guard against water and fat that changed places: subcutaneous fat must be fatty.

Axes. Everything is done on canonical slices: [slice, row, column] from the feet to the head, front to back, the
patient's right to left (`lvseg.volume`).

In each slice the body is found, and two parts of it are compared: the rim, a few millimetres below the skin, where
subcutaneous fat lies, and the interior, mostly organs and muscle. A voxel is fatty above 50 %. What counts is the share
of fatty voxels in the rim minus that in the interior: a swap of water and fat turns both shares around 50 %, so it
changes the sign of the difference and nothing else, and people are told apart from swapped people by one number whose
two sides are equal. Where the body is cut by the edge of the image there is no air, and no rim is looked for.

It cannot see a swap that leaves the rim alone, such as one of the liver's dome only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from lvseg.volume import Array, Volume

FATTY_PERCENT = 50.0
# Depths below the body's surface in which subcutaneous fat is looked for. Skin ends at about 2 mm; in thin people the
# muscle of the wall begins at 6 mm. The band in which rim and interior differ most is taken.
RIM_BANDS_MM = ((2.5, 5.0), (4.0, 7.0), (6.0, 10.0))
INTERIOR_MM = 30.0
# A difference of shares nearer to zero than this decides nothing. It was 0.37 to 0.79 in the simulated scans that the
# limits were chosen with, and the negative of it in swapped ones.
UNDECIDED = 0.1
# The same for one slice, or one side of some slices; there it was 0.14 to 0.64.
PARTIAL = 0.15
SLICES_OF_A_SIDE = 3
LEAST_VOXELS, LEAST_SLICE_VOXELS = 200, 40
SIDES = ("right", "left")
# Without a signal image air is told from tissue by the jumps between neighbouring pixels, in points of fat fraction:
# noise over noise jumps by some 24 on average, tissue at a signal to noise ratio of 20 by some 6.
NOISY_JUMP_PERCENT, NOISY_SHARE, NOISY_WINDOW = 15.0, 0.45, 5
OPENING_PIXELS = 2


@dataclass(frozen=True)
class _Shares:
    """Share of fatty voxels in the rim minus that in the interior, [-1, 1], NaN where either has too few voxels.

    whole: float; slices: float64 [slices]; halves: float64 [slices, 2], the patient's right and left half of a slice.
    """

    whole: float
    slices: npt.NDArray[np.float64]
    halves: npt.NDArray[np.float64]
    rim_percent: float | None
    interior_percent: float | None


def check_swap(fraction: Volume, signal: Array | None = None) -> dict[str, Any]:
    """Whether water and fat look swapped in a fat-fraction image, as a whole or in part.

    Args:
        fraction: percent, any orientation; 0 where there is no signal, or anything where the scanner did not mask air.
        signal: bool in the shape of `fraction`, the voxels above the noise; None where only the fraction is known.

    Returns:
        JSON-able: suspected (bool); rim_fat_percent and interior_fat_percent (medians, None where not found);
        difference (share of fatty voxels, rim minus interior, -1 to 1, None likewise); decided_by ("whole body",
        "single slices", "one side" or "nothing"); slices (canonical, 0 at the feet, those that look swapped); side
        ("right", "left" or None).
    """
    canonical = fraction.canonical()
    if signal is not None:
        tissue, slices_reliable = fraction.with_voxels(signal).canonical().voxels, True
    else:
        tissue, slices_reliable = _tissue(canonical.voxels)
    shares = _shares(canonical, tissue)
    answer: dict[str, Any] = {
        "suspected": False,
        "rim_fat_percent": shares.rim_percent,
        "interior_fat_percent": shares.interior_percent,
        "difference": None if np.isnan(shares.whole) else round(shares.whole, 3),
        "decided_by": "nothing",
        "slices": [],
        "side": None,
    }
    if np.isnan(shares.whole):
        return answer
    swapped_slices = np.flatnonzero(np.nan_to_num(shares.slices) < -PARTIAL)
    if shares.whole < -UNDECIDED:
        return {**answer, "suspected": True, "decided_by": "whole body", "slices": swapped_slices.tolist()}
    if slices_reliable:
        swapped_halves = np.nan_to_num(shares.halves) < -PARTIAL
        for number, side in enumerate(SIDES):
            slices = np.flatnonzero(swapped_halves[:, number])
            run = _longest_run(swapped_halves[:, number].tolist())
            if run >= SLICES_OF_A_SIDE and not swapped_halves[slices, 1 - number].any():
                return {**answer, "suspected": True, "decided_by": "one side", "slices": slices.tolist(), "side": side}
        if swapped_slices.size:
            return {**answer, "suspected": True, "decided_by": "single slices", "slices": swapped_slices.tolist()}
    return {**answer, "decided_by": "whole body" if shares.whole > UNDECIDED else "nothing"}


def warnings_of(swap: dict[str, Any]) -> list[str]:
    """What a person should be told of the answer of `check_swap`: no sentence or one."""
    if swap["difference"] is None:
        return ["water and fat could not be checked for a swap: no rim of a body between air and interior was found"]
    medians = (
        f"the rim of the body, where subcutaneous fat lies, reads {swap['rim_fat_percent']:.0f} % and the interior"
        f" {swap['interior_fat_percent']:.0f} %"
    )
    if not swap["suspected"]:
        return [] if swap["decided_by"] != "nothing" else [f"water and fat could not be checked for a swap: {medians}"]
    if swap["decided_by"] == "whole body":
        return [f"water and fat look swapped: {medians}"]
    where = f"in slices {_ranges(swap['slices'])} (counted from 1 at the feet)"
    if swap["side"] is not None:
        where += f", on the patient's {swap['side']} side"
    return [f"water and fat look swapped {where}: the rim of the body is not fatty there"]


def _tissue(fraction: Array) -> tuple[Array, bool]:
    """Voxels that are no air, judged by fat fractions alone, and whether that holds slice by slice."""
    border = np.concatenate([fraction[:, [0, -1], :].ravel(), fraction[:, :, [0, -1]].ravel()])
    if np.mean(border == 0) > 0.5:  # air was set to zero; so was some of the leanest tissue, in between
        near = ndimage.generate_binary_structure(2, 1)[None]
        margin = ((0, 0), (OPENING_PIXELS + 1,) * 2, (OPENING_PIXELS + 1,) * 2)
        inside = (slice(None), *(slice(OPENING_PIXELS + 1, -OPENING_PIXELS - 1),) * 2)
        return ndimage.binary_closing(np.pad(fraction != 0, margin), near, OPENING_PIXELS)[inside], True
    jumps = np.zeros(fraction.shape, np.float32)
    for axis in (1, 2):
        if fraction.shape[axis] > 1:
            before = np.take(fraction, [0], axis)
            jumps += np.abs(np.diff(fraction, axis=axis, prepend=before)) > NOISY_JUMP_PERCENT
    noisy_share = ndimage.uniform_filter(jumps / 2, size=(1, NOISY_WINDOW, NOISY_WINDOW))
    return noisy_share < NOISY_SHARE, False


def _body(tissue: Array) -> Array:
    """The largest connected part of one slice's tissue, holes filled, thin bridges cut: bool [rows, columns]."""
    opened = ndimage.binary_opening(np.pad(tissue, 1), iterations=OPENING_PIXELS)
    parts, count = ndimage.label(opened)
    if not count:
        return np.zeros_like(tissue)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return ndimage.binary_fill_holes(parts == sizes.argmax())[1:-1, 1:-1]


def _shares(fraction: Volume, tissue: Array) -> _Shares:
    parts = (*RIM_BANDS_MM, (INTERIOR_MM, np.inf))
    # Of each part in each half of each slice: fatty voxels and all voxels.
    counts = np.zeros((fraction.shape[0], len(SIDES), len(parts), 2), np.int64)
    values: list[list[npt.NDArray[np.float32]]] = [[] for _ in parts]
    for number, (plane, here) in enumerate(zip(fraction.voxels, tissue, strict=True)):
        body = _body(here)
        if not body.any() or body.all():
            continue
        rows, columns = (slice(where.min(), where.max() + 1) for where in np.nonzero(body))
        # One voxel around the body, so that the air beside it is seen, and none beyond the edge of the image.
        box = tuple(slice(max(0, own.start - 1), own.stop + 1) for own in (rows, columns))
        depth_mm = ndimage.distance_transform_edt(body[box], sampling=fraction.spacing_mm[1:])
        if body[box].all():
            continue
        usable, boxed = body[box] & here[box], plane[box]
        middle = round(float(np.nonzero(body[box])[1].mean()))
        for part, (low, high) in enumerate(parts):
            within = usable & (depth_mm > low) & (depth_mm <= high)
            values[part].append(boxed[within])
            for side, half in enumerate((slice(None, middle), slice(middle, None))):
                chosen = boxed[:, half][within[:, half]]
                counts[number, side, part] = np.count_nonzero(chosen > FATTY_PERCENT), chosen.size

    whole = _differences(counts.sum((0, 1)), LEAST_VOXELS)
    if np.isnan(whole).all():
        nothing = np.full(len(counts), np.nan)
        return _Shares(np.nan, nothing, np.stack([nothing, nothing], 1), None, None)
    band = int(np.nanargmax(np.abs(whole)))
    return _Shares(
        float(whole[band]),
        _differences(counts.sum(1), LEAST_SLICE_VOXELS)[:, band],
        _differences(counts, LEAST_SLICE_VOXELS)[..., band],
        round(float(np.median(np.concatenate(values[band]))), 2),
        round(float(np.median(np.concatenate(values[-1]))), 2),
    )


def _differences(counts: Array, least: int) -> npt.NDArray[np.float64]:
    """Fatty share of each band minus that of the interior: [..., parts, 2] to [..., bands]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.where(counts[..., 1] >= least, counts[..., 0] / counts[..., 1], np.nan)
    return shares[..., :-1] - shares[..., -1:]


def _longest_run(flags: Sequence[bool]) -> int:
    return max((sum(1 for _ in run) for flag, run in groupby(flags) if flag), default=0)


def _ranges(slices: Sequence[int]) -> str:
    """`1-3, 7` for 0, 1, 2, 6."""
    runs: list[list[int]] = []
    for number in slices:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0] + 1}-{run[-1] + 1}" if len(run) > 1 else f"{run[0] + 1}" for run in runs)
