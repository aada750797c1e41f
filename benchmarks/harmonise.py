"""Harmonising one volume of 28 x 320 x 320 onto 256 x 256: lvseg against scipy.ndimage and SimpleITK, and exactness.

python benchmarks/harmonise.py
"""

from __future__ import annotations

import argparse
import sys

from measure import Row, main, median_s

TARGET_MM, SIZE = (1.75, 1.75), 256
SHAPE, SPACING_MM = (28, 320, 320), (5.0, 1.5, 1.5)


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Each library with its own best way to do it, the same grid for all, the result a NumPy array."""
    import numpy as np
    import scipy.ndimage
    import SimpleITK as sitk
    import tensorflow as tf

    from lvseg import preprocess

    voxels = np.random.default_rng(0).normal(100, 30, SHAPE).astype(np.float32)
    # Pixel p of the result lies at `first + p * step` of an axis, in voxels.
    step = [target / own for target, own in zip(TARGET_MM, SPACING_MM[1:], strict=True)]
    first = [(count - 1) / 2 - (SIZE - 1) / 2 * by for count, by in zip(SHAPE[1:], step, strict=True)]

    spacing_mm, fill = tf.constant(SPACING_MM), tf.constant(0.0)

    def ours() -> np.ndarray:
        return preprocess.harmonise(tf.constant(voxels), spacing_mm, TARGET_MM, SIZE, fill).numpy()

    def by_scipy() -> np.ndarray:
        # A vector instead of a matrix is scipy's fast path for axes that keep their direction.
        return scipy.ndimage.affine_transform(
            voxels, [1.0, *step], offset=[0.0, *first], output_shape=(SHAPE[0], SIZE, SIZE), order=1, mode="nearest"
        )

    def by_scipy_slices() -> np.ndarray:
        result = np.empty((SHAPE[0], SIZE, SIZE), np.float32)
        for plane, out in zip(voxels, result, strict=True):
            scipy.ndimage.affine_transform(plane, step, offset=first, output=out, order=1, mode="nearest")
        return result

    def by_simpleitk() -> np.ndarray:
        image = sitk.GetImageFromArray(voxels)
        image.SetSpacing(SPACING_MM[::-1])
        resample = sitk.ResampleImageFilter()
        resample.SetInterpolator(sitk.sitkLinear)
        resample.SetSize((SIZE, SIZE, SHAPE[0]))
        resample.SetOutputSpacing((*TARGET_MM[::-1], SPACING_MM[0]))
        resample.SetOutputOrigin((first[1] * SPACING_MM[2], first[0] * SPACING_MM[1], 0.0))
        return sitk.GetArrayFromImage(resample.Execute(image))

    def exact() -> np.ndarray:
        """First-order interpolation in float64 from its definition, a hat function around each voxel."""
        rows, columns = (
            np.maximum(0.0, 1.0 - np.abs((start + np.arange(SIZE) * by)[:, None] - np.arange(count)))
            for start, by, count in zip(first, step, SHAPE[1:], strict=True)
        )
        return np.stack([rows @ plane.astype(np.float64) @ columns.T for plane in voxels])

    error = np.abs(ours() - exact()).max() / np.ptp(voxels)
    seconds = {call: [] for call in (ours, by_scipy, by_scipy_slices, by_simpleitk)}
    for _ in range(arguments.rounds):  # in turn, so that all meet the same neighbours on the machine
        for call, times in seconds.items():
            times.append(median_s(call, 3))
    ms = {call: 1000 * float(np.median(times)) for call, times in seconds.items()}

    def ratio(other: object, least: float | None, name: str) -> Row:
        times = ms[other] / ms[ours]
        target = f"at least {least:g} times as fast" if least else ""
        figure = f"{times:.1f} times ({ms[ours]:.1f} ms against {ms[other]:.1f} ms)"
        return Row(f"harmonise 28 x 320 x 320 against {name}", target, figure, times >= least if least else None)

    return [
        ratio(by_scipy, 10.0, "scipy.ndimage, order 1, the volume"),
        ratio(by_scipy_slices, None, "scipy.ndimage, order 1, slice by slice"),
        ratio(by_simpleitk, 1.0, "SimpleITK, linear"),
        Row("harmonise against exact interpolation", "at most 1e-4 of the range", f"{error:.1e}", bool(error <= 1e-4)),
    ]


if __name__ == "__main__":
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--rounds", type=int, default=9, help="medians of three calls each (default: 9)")
    sys.exit(main(rows, command))
