"""Elastic deformation of slices: one random field a sample, applied to the image and to its mask.

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
from typing import Any, Literal

import elasticdeform
import numpy as np
import numpy.typing as npt
import scipy.ndimage
import tensorflow as tf

Array = npt.NDArray[Any]

# Widths in bits of the fields that `sample_seeds` packs; each word stays below 2**63, since int64 has a sign.
SEED_BITS, STREAM_BITS = 47, 16
STEP_BITS, INDEX_BITS = 31, 32
# Every use of a run's random numbers has a stream of its own; dropout layer k takes DROPOUT_STREAM + k.
ELASTIC_STREAM, SHUFFLE_STREAM, DROPOUT_STREAM = 0, 1, 16


def elastic(
    images: tf.Tensor, masks: tf.Tensor, seeds: tf.Tensor, sigma_px: float, grid: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Deforms slices and their masks by the same random fields, on the device the caller runs on.

    Args:
        images: float [B, size, size, C]; all channels of a sample move together.
        masks: uint8 [B, size, size, 1].
        seeds: int64 [B, 2], from `sample_seeds`.
        sigma_px: standard deviation of the control points' displacement, in pixels.
        grid: control points an axis, at least 2.

    Returns:
        Images (linear interpolation) and masks (nearest) of the shapes and dtypes that came in.

    Raises:
        ValueError: for slices that are not square, or whose size is unknown when traced.
    """
    _, height, width, _ = images.shape
    if height is None or height != width:
        raise ValueError(f"Expected square slices of a known size, received images.shape={images.shape}.")
    field = elastic_field(draw_displacement(seeds, sigma_px, grid), height)
    return warp(images, field, "linear"), warp(masks, field, "nearest")


def elastic_host(
    image: tf.Tensor, mask: tf.Tensor, seed: tf.Tensor, sigma_px: float, grid: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Deforms one sample as `elastic` does, but by elasticdeform on the CPU: the reference for studies and benchmarks.

    For `tf.data.Dataset.map`, before batching. It runs Python, so it cannot be compiled, exported or moved to a device.

    Args:
        image: float [H, W, C].
        mask: uint8 [H, W, 1].
        seed: int64 [2], one row of `sample_seeds`.
        sigma_px: standard deviation of the control points' displacement, in pixels.
        grid: control points an axis, at least 2.

    Returns:
        The image and the mask, shapes and dtypes as they came in.
    """
    displacement = draw_displacement(seed[tf.newaxis], sigma_px, grid)[0]
    deformed, deformed_mask = tf.numpy_function(
        _deform, [image, mask, displacement], [image.dtype, mask.dtype], stateful=False
    )
    return tf.ensure_shape(deformed, image.shape), tf.ensure_shape(deformed_mask, mask.shape)


def _deform(image: Array, mask: Array, displacement: Array) -> tuple[Array, Array]:
    deformed, deformed_mask = elasticdeform.deform_grid(
        [image, mask], displacement.astype(np.float64), order=[1, 0], mode="nearest", axis=(0, 1)
    )
    return deformed, deformed_mask


def sample_seeds(seed: int, stream: int, step: int | tf.Tensor, indices: tf.Tensor) -> tf.Tensor:
    """Packs what a random draw is keyed by into seeds for TensorFlow's stateless random numbers, without collisions.

    Bits, high to low: word 0 is seed (47), stream (16); word 1 is step (31), index (32).

    Args:
        seed: of the run, 0 to 2**47 - 1.
        stream: which use of randomness (deformation, a layer's dropout, ...), 0 to 2**16 - 1.
        step: of training, 0 to 2**31 - 1; a number or an integer scalar tensor.
        indices: integer [B], each sample's own global index, 0 to 2**32 - 1.

    Returns:
        int64 [B, 2].

    Raises:
        ValueError: for a seed, stream or step (as a number) outside its range; tensors are not looked into.
    """
    ranges = [("seed", seed, SEED_BITS), ("stream", stream, STREAM_BITS)]
    if isinstance(step, int):
        ranges.append(("step", step, STEP_BITS))
    for name, value, bits in ranges:
        if not 0 <= value < 2**bits:
            raise ValueError(f"Expected {name} from 0 to 2**{bits} - 1, received {name}={value}.")
    indices = tf.cast(indices, tf.int64)
    run = tf.zeros_like(indices) + (seed * 2**STREAM_BITS + stream)
    return tf.stack([run, tf.cast(step, tf.int64) * 2**INDEX_BITS + indices], axis=1)


def draw_displacement(seeds: tf.Tensor, sigma_px: float, grid: int) -> tf.Tensor:
    """Draws the control points' displacements, each sample's from its own seed alone.

    Args:
        seeds: int64 [B, 2].
        sigma_px: standard deviation in pixels.
        grid: control points an axis.

    Returns:
        float32 [B, 2, grid, grid] in pixels, (row, column) first; independent normal numbers.
    """

    def draw(seed: tf.Tensor) -> tf.Tensor:
        # TensorFlow's own normal (and uniform) numbers differ between its kernels and XLA; Philox's bits do not, so
        # the bits are drawn and made normal here (Box and Muller 1958), in float64 to round alike everywhere.
        bits = tf.random.stateless_uniform(
            [2, 2, grid, grid], seed, minval=None, maxval=None, dtype=tf.uint32, alg="philox"
        )
        uniform = (tf.cast(bits, tf.float64) + 0.5) * 2.0**-32
        normal = tf.sqrt(-2.0 * tf.math.log(uniform[0])) * tf.cos(2.0 * math.pi * uniform[1])
        return tf.cast(tf.cast(sigma_px, tf.float64) * normal, tf.float32)

    return tf.map_fn(draw, seeds, fn_output_signature=tf.TensorSpec([2, grid, grid], tf.float32))


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
    # In float64, since GPUs may multiply float32 matrices as TF32, whose 10-bit mantissa moves pixels by hundredths.
    spline = tf.constant(_spline_matrix(size, grid))
    field = tf.einsum("rg,bdgh,ch->brcd", spline, tf.cast(displacement_px, tf.float64), spline)
    return tf.cast(field, tf.float32)


@functools.cache
def _spline_matrix(size: int, grid: int) -> npt.NDArray[np.float64]:
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
    pixels = tf.reshape(tf.cast(images, carrier), [-1, height * width, channels])
    index = tf.reshape(rows * width + columns, [-1, height * width])
    moved = tf.reshape(tf.gather(pixels, index, batch_dims=1), [-1, height, width, channels])
    return tf.ensure_shape(tf.cast(moved, images.dtype), images.shape)


def _nearest_index(position: tf.Tensor, size: int) -> tf.Tensor:
    """int64, not int32: TensorFlow does int32 arithmetic on the host even when the tensors are on a GPU."""
    return tf.cast(tf.clip_by_value(tf.floor(position + 0.5), 0.0, size - 1.0), tf.int64)


def _plain_dense_image_warp(image: tf.Tensor, flow: tf.Tensor) -> tf.Tensor:
    """`dense_image_warp` of TensorFlow Addons in plain TensorFlow, where Addons does not load: image(p - flow(p))."""
    _, height, width, channels = image.shape
    top, row_weight = _cell(np.arange(height, dtype=np.float32)[:, np.newaxis] - flow[..., 0], height, image.dtype)
    left, column_weight = _cell(np.arange(width, dtype=np.float32) - flow[..., 1], width, image.dtype)
    pixels = tf.reshape(image, [-1, height * width, channels])

    def corner(row: tf.Tensor, column: tf.Tensor) -> tf.Tensor:
        index = tf.reshape(row * width + column, [-1, height * width])
        return tf.reshape(tf.gather(pixels, index, batch_dims=1), [-1, height, width, channels])

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
