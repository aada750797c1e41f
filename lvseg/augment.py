"""Spatial augmentation of slices: one random field a sample, applied to the image and to its mask.

Axes. A batch of slices is [sample, row, column, channel]. A displacement or a field holds (row, column) in pixels and
says where a pixel's value comes from: output(p) = image(p + field(p)), the sign of `elasticdeform.deform_grid` and the
opposite of `dense_image_warp`. Beyond the image the outermost pixel goes on.

The same seeds give the same field on every device, eagerly, in a graph and compiled by XLA. Every operation has a
kernel for GPUs for the dtypes it meets here and compiles with XLA. Compile the caller with XLA where it can be done:
without it TensorFlow keeps the int32 index arithmetic of `dense_image_warp` on the host, and a batch's indices go there
and back on every call.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import elasticdeform
import numpy as np
import numpy.typing as npt
import scipy.ndimage
import tensorflow as tf

from lvseg import draws

Array = npt.NDArray[Any]


def spatial(
    images: tf.Tensor,
    masks: tf.Tensor,
    seeds: tf.Tensor,
    settings: Mapping[str, Mapping[str, Any] | None],
    spacing_mm: Sequence[float] = (1.0, 1.0),
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mirrors, turns, magnifies and then deforms slices and their masks, in one resampling.

    With centre c, the turn and magnification A of `similarity_field` and the elastic field e, a pixel's value is
    output(p) = mirrored image(c + A (p + e(p) - c)). Mirroring only renumbers pixels, so it is exact.

    Args:
        images: float [B, size, size, C]; all channels of a sample move together.
        masks: uint8 [B, size, size, 1].
        seeds: int64 [B, 2], from `draws.sample_seeds` with draws.ELASTIC_STREAM.
        settings: the experiment's keys of `elastic` (nothing here where it is "host"), `flip`, `rotate` and `scale`;
            null or absent is off.
        spacing_mm: of the pixels, (row, column), since a body turns in mm.

    Returns:
        Images (linear interpolation) and masks (nearest) of the shapes and dtypes that came in.

    Raises:
        ValueError: for slices that are not square, or whose size is unknown when traced.
    """
    elastic, flip, rotate, scale = (settings.get(name) for name in ("elastic", "flip", "rotate", "scale"))
    if elastic and elastic.get("where") == "host":
        elastic = None
    if not (elastic or flip or rotate or scale):
        return images, masks
    _, size, width, _ = images.shape
    if size is None or size != width:
        raise ValueError(f"Expected square slices of a known size, received images.shape={images.shape}.")
    if flip:
        drawn = draws.uniform_of_each(seeds, draws.FLIP_STREAM, 2)
        for axis, probability in ((1, flip["rows"]), (2, flip["columns"])):
            mirrored = (drawn[:, axis - 1] < probability)[:, tf.newaxis, tf.newaxis, tf.newaxis]
            images = tf.where(mirrored, tf.reverse(images, [axis]), images)
            masks = tf.where(mirrored, tf.reverse(masks, [axis]), masks)
    if not (elastic or rotate or scale):
        return images, masks
    field = None
    if elastic:
        field = elastic_field(draws.displacement(seeds, elastic["sigma_px"], elastic["grid"]), size)
    if rotate or scale:
        degrees, factor = tf.zeros([1], tf.float64), tf.ones([1], tf.float64)
        if rotate:
            bound = rotate["max_degrees"]
            degrees = draws.strength(seeds, draws.ROTATE_STREAM, rotate["probability"], -bound, bound)
        if scale:
            bound = math.log(scale["max_factor"])
            factor = tf.exp(draws.strength(seeds, draws.SCALE_STREAM, scale["probability"], -bound, bound))
        field = similarity_field(degrees, factor, size, field, spacing_mm)
    return warp(images, field, "linear"), warp(masks, field, "nearest")


def elastic(
    images: tf.Tensor, masks: tf.Tensor, seeds: tf.Tensor, sigma_px: float, grid: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Deforms slices and their masks by the same random fields, on the device the caller runs on.

    Args:
        images: float [B, size, size, C]; all channels of a sample move together.
        masks: uint8 [B, size, size, 1].
        seeds: int64 [B, 2], from `draws.sample_seeds`.
        sigma_px: standard deviation of the control points' displacement, in pixels.
        grid: control points an axis, at least 2.

    Returns:
        As `spatial`, which this is with nothing but `elastic` on; it raises the same.
    """
    return spatial(images, masks, seeds, {"elastic": {"sigma_px": sigma_px, "grid": grid}})


def elastic_host(
    image: tf.Tensor, mask: tf.Tensor, seed: tf.Tensor, sigma_px: float, grid: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Deforms one sample as `elastic` does, but by elasticdeform on the CPU: the reference for studies and benchmarks.

    For `tf.data.Dataset.map`, before batching. It runs Python, so it cannot be compiled, exported or moved to a device.

    Args:
        image: float [H, W, C].
        mask: uint8 [H, W, 1].
        seed: int64 [2], one row of `draws.sample_seeds`.
        sigma_px: standard deviation of the control points' displacement, in pixels.
        grid: control points an axis, at least 2.

    Returns:
        The image and the mask, shapes and dtypes as they came in.
    """
    displacement = draws.displacement(seed[tf.newaxis], sigma_px, grid)[0]
    deformed, deformed_mask = tf.numpy_function(
        _deform, [image, mask, displacement], [image.dtype, mask.dtype], stateful=False
    )
    return tf.ensure_shape(deformed, image.shape), tf.ensure_shape(deformed_mask, mask.shape)


def _deform(image: Array, mask: Array, displacement: Array) -> tuple[Array, Array]:
    deformed, deformed_mask = elasticdeform.deform_grid(
        [image, mask], displacement.astype(np.float64), order=[1, 0], mode="nearest", axis=(0, 1)
    )
    return deformed, deformed_mask


def elastic_field(displacement_px: tf.Tensor, size: int) -> tf.Tensor:
    """Interpolates control points' displacements to every pixel, as `elasticdeform.deform_grid` does.

    An interpolating cubic B-spline with mirror boundary; the first and last control points lie at the first and last
    pixel centres.

    Args:
        displacement_px: float32 [B, 2, G, G] in pixels, (row, column) first.
        size: pixels an axis of the slices, at least 2.

    Returns:
        float32 [B, size, size, 2] in pixels, (row, column) last.

    Raises:
        ValueError: for fewer than 2 control points or pixels an axis.
    """
    grid = displacement_px.shape[-1]
    if displacement_px.shape[1:] != (2, grid, grid) or grid is None or grid < 2 or size < 2:
        raise ValueError(
            "Expected displacements [B, 2, G, G] with G >= 2 and size >= 2, received"
            f" displacement_px.shape={displacement_px.shape} and size={size}."
        )
    return spline_surface(displacement_px, size)


def spline_surface(control: tf.Tensor, size: int) -> tf.Tensor:
    """Interpolates values at control points, float32 [B, D, G, G], to every pixel: float32 [B, size, size, D]."""
    # In float64, since GPUs may multiply float32 matrices as TF32, whose 10-bit mantissa moves pixels by hundredths.
    spline = tf.constant(spline_matrix(size, control.shape[-1]))
    surface = tf.einsum("rg,bdgh,ch->brcd", spline, tf.cast(control, tf.float64), spline)
    return tf.cast(surface, tf.float32)


@functools.cache
def spline_matrix(size: int, grid: int) -> npt.NDArray[np.float64]:
    """float64 [size, grid]: values at control points to values at pixels, prefilter and cubic B-spline in one."""
    position = np.linspace(0.0, grid - 1.0, size)
    basis = np.zeros((size, grid))
    for offset in (-1, 0, 1, 2):
        control = np.floor(position).astype(int) + offset
        distance = np.abs(position - control)
        weight = np.where(distance < 1, 2 / 3 - distance**2 + distance**3 / 2, np.maximum(2 - distance, 0) ** 3 / 6)
        control %= 2 * (grid - 1)
        np.add.at(basis, (np.arange(size), np.minimum(control, 2 * (grid - 1) - control)), weight)
    return basis @ scipy.ndimage.spline_filter1d(np.eye(grid), order=3, axis=0, mode="mirror")


def similarity_field(
    degrees: tf.Tensor,
    factor: tf.Tensor,
    size: int,
    elastic_px: tf.Tensor | None = None,
    spacing_mm: Sequence[float] = (1.0, 1.0),
) -> tf.Tensor:
    """Makes the field that turns and magnifies slices about their centre and then, if asked to, deforms them.

    Args:
        degrees: float64 [B], anticlockwise as displayed with rows downwards, as `np.rot90` turns.
        factor: float64 [B], above 1 to magnify.
        size: pixels an axis of the slices.
        elastic_px: float32 [B, size, size, 2] in pixels, (row, column), or None.
        spacing_mm: of the pixels, (row, column); the turn is one of angles in mm.

    Returns:
        float32 [B, size, size, 2] in pixels, (row, column).
    """
    radians = degrees * (math.pi / 180.0)
    cosine, sine = tf.cos(radians) / factor, tf.sin(radians) / factor
    along, across, rest = (tf.cast(part, tf.float32)[:, tf.newaxis, tf.newaxis] for part in (cosine, sine, cosine - 1))
    column = np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)
    row = column[:, np.newaxis]
    # Off its diagonal A goes from one axis to the other, and so to pixels of another length in mm.
    to_rows = across * (spacing_mm[1] / spacing_mm[0])
    to_columns = across * (spacing_mm[0] / spacing_mm[1])
    # (A - I) (p - c) + A e rather than A (p + e - c) - (p - c), which would round e where A is the identity.
    rows, columns = rest * row + to_rows * column, rest * column - to_columns * row
    if elastic_px is not None:
        rows += along * elastic_px[..., 0] + to_rows * elastic_px[..., 1]
        columns += along * elastic_px[..., 1] - to_columns * elastic_px[..., 0]
    return tf.stack([rows, columns], axis=-1)


def warp(images: tf.Tensor, field: tf.Tensor, interpolation: Literal["linear", "nearest"] = "linear") -> tf.Tensor:
    """Moves pixels along a field: output(p) = image(p + field(p)); beyond the image its outermost pixel goes on.

    Args:
        images: [B, H, W, C], H and W at least 2; floating for "linear", anything but complex for "nearest".
        field: float32 [B, H, W, 2] in pixels, (row, column).
        interpolation: "linear" between the four pixels around, or the "nearest" pixel (a position half-way between two
            takes the later one), which never makes a value that was not there.

    Returns:
        Shape and dtype of `images`.

    Raises:
        ValueError: for another interpolation, or linear interpolation of integers.
    """
    if interpolation == "nearest":
        return _warp_nearest(images, field)
    if interpolation != "linear":
        raise ValueError(f"Expected interpolation 'linear' or 'nearest', received interpolation={interpolation!r}.")
    if not images.dtype.is_floating:
        raise ValueError(f"Expected floating images for linear interpolation, received dtype={images.dtype.name}.")
    return _dense_image_warp(images, -field)


def _warp_nearest(images: tf.Tensor, field: tf.Tensor) -> tf.Tensor:
    # GPUs have gather kernels for int32 but none for the narrower integers: uint8 would silently run on the host.
    carrier = tf.int32 if images.dtype.is_integer and images.dtype.size < 4 else images.dtype
    _, height, width, channels = images.shape
    rows = _nearest_index(field[..., 0] + np.arange(height, dtype=np.float32)[:, np.newaxis], height)
    columns = _nearest_index(field[..., 1] + np.arange(width, dtype=np.float32), width)
    pixels = tf.reshape(tf.cast(images, carrier), [-1, channels])
    moved = tf.gather(pixels, rows * width + columns + _first_pixels(images))
    return tf.ensure_shape(tf.cast(moved, images.dtype), images.shape)


def _first_pixels(images: tf.Tensor) -> tf.Tensor:
    """Where each image, [B, H, W, C], begins in one list of all pixels: int64 [B, 1, 1]."""
    _, height, width, _ = images.shape
    return tf.range(tf.shape(images, tf.int64)[0])[:, tf.newaxis, tf.newaxis] * (height * width)


def _nearest_index(position: tf.Tensor, size: int) -> tf.Tensor:
    """int64, not int32: TensorFlow does int32 arithmetic on the host even when the tensors are on a GPU."""
    return tf.cast(tf.clip_by_value(tf.floor(position + 0.5), 0.0, size - 1.0), tf.int64)


def _plain_dense_image_warp(image: tf.Tensor, flow: tf.Tensor) -> tf.Tensor:
    """`dense_image_warp` of TensorFlow Addons in plain TensorFlow, where Addons does not load: image(p - flow(p))."""
    _, height, width, channels = image.shape
    top, row_weight = _cell(np.arange(height, dtype=np.float32)[:, np.newaxis] - flow[..., 0], height, image.dtype)
    left, column_weight = _cell(np.arange(width, dtype=np.float32) - flow[..., 1], width, image.dtype)
    pixels, first = tf.reshape(image, [-1, channels]), _first_pixels(image)

    def corner(row: tf.Tensor, column: tf.Tensor) -> tf.Tensor:
        return tf.gather(pixels, row * width + column + first)

    top_left, top_right = corner(top, left), corner(top, left + 1)
    bottom_left, bottom_right = corner(top + 1, left), corner(top + 1, left + 1)
    upper = column_weight * (top_right - top_left) + top_left
    lower = column_weight * (bottom_right - bottom_left) + bottom_left
    return tf.ensure_shape(row_weight * (lower - upper) + upper, image.shape)


def _cell(position: tf.Tensor, size: int, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """The pixel at or before each position, int64 [B, H, W], and the weight of the one after it, [B, H, W, 1]."""
    before = tf.clip_by_value(tf.floor(position), 0.0, size - 2.0)
    weight = tf.clip_by_value(position - before, 0.0, 1.0)
    return tf.cast(before, tf.int64), tf.cast(weight, dtype)[..., tf.newaxis]


try:
    with warnings.catch_warnings():
        # Addons says at import that it has reached its end of life; it is known, and this is its only use.
        warnings.filterwarnings("ignore", r"[\s\S]*TensorFlow Addons \(TFA\) has ended development", UserWarning)
        from tensorflow_addons.image import dense_image_warp as _dense_image_warp
except ImportError:  # TensorFlow newer than 2.15 or Python newer than 3.11, which Addons does not know
    _dense_image_warp = _plain_dense_image_warp
