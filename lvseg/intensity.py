"""Intensity augmentation of slices: coarser pixels, bias field, gamma and noise, drawn anew for every sample.

Masks stay as they are. Intensities are those that the network is trained on; `low` and `high` are the dark and the
bright ones among the training patients, `low` standing for no signal. Seeds, and what every operation here has to be
able to do, are as in `lvseg.augment`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from lvseg import augment, draws

# The share of the frequencies kept, from their end, over which the window falls from 1 to 0.
EDGE = 0.25


def intensity(
    stacks: tf.Tensor, seeds: tf.Tensor, settings: Mapping[str, Mapping[str, Any] | None], low: float, high: float
) -> tf.Tensor:
    """Changes the intensities of slices as other scanners would have.

    In the order in which they come about: tissue is averaged over pixels, coils weigh what they receive, the sequence's
    contrast bends it, and noise that nothing smooths any more comes last.

    Args:
        stacks: float32 [B, size, size, C]; all channels of a sample change alike, but each has its own noise.
        seeds: int64 [B, 2], from `draws.sample_seeds` with ELASTIC_STREAM.
        settings: the experiment's keys of `resolution`, `bias_field`, `gamma` and `noise`; null or absent is off.
        low, high: intensities.

    Returns:
        float32 [B, size, size, C]; the samples that undergo nothing exactly as they came in.

    Raises:
        ValueError: for a `high` that is not above `low`, slices that are not square, or whose size is unknown when
            traced.
    """
    changes = {"resolution": _coarser, "bias_field": _shaded, "gamma": _bent, "noise": _noisy}
    if not any(settings.get(name) for name in changes):
        return stacks
    _, size, width, _ = stacks.shape
    if size is None or size != width:
        raise ValueError(f"Expected square slices of a known size, received stacks.shape={stacks.shape}.")
    if not low < high:
        raise ValueError(f"Expected low below high, received low={low} and high={high}.")
    for name, change in changes.items():
        keys = settings.get(name)
        if keys:
            stacks = change(stacks, seeds, keys, low, high)
    return stacks


def coarsen(stacks: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blurs slices in their plane as if scanned with larger pixels and interpolated to the present ones.

    A scanner with larger pixels measures fewer spatial frequencies, dampens the last of them against ringing and fills
    the missing ones with zeros (Bernstein, Fain and Riederer, J Magn Reson Imaging 14:270, 2001). Here a Tukey window
    ends at the Nyquist frequency of the larger pixels, and the frequencies are those of the discrete cosine transform,
    to which the slice goes on as in a mirror: nothing wraps around, and the mean stays.

    Args:
        stacks: float32 [B, size, size, C], size known.
        factor: float64 [B], how many times as large the pixels are, at least 1.

    Returns:
        float32 [B, size, size, C].
    """
    size = stacks.shape[1]
    # In float64, since GPUs may multiply float32 matrices as TF32, whose 10-bit mantissa would show as noise.
    cosines = tf.constant(_cosines(size))
    frequency = factor[:, tf.newaxis] * (np.arange(size) / size)  # 1 is the Nyquist frequency of the larger pixels
    window = 0.5 + 0.5 * tf.cos(math.pi * tf.clip_by_value((frequency - (1.0 - EDGE)) / EDGE, 0.0, 1.0))
    low_pass = tf.einsum("ki,bkj->bij", cosines, window[:, :, tf.newaxis] * cosines)
    blurred = tf.einsum("bri,bijk->brjk", low_pass, tf.cast(stacks, tf.float64))
    return tf.cast(tf.einsum("bcj,brjk->brck", low_pass, blurred), tf.float32)


@functools.cache
def _cosines(size: int) -> npt.NDArray[np.float64]:
    """float64 [frequency, pixel]: the orthonormal discrete cosine transform (type 2)."""
    cosines = np.cos(np.pi / size * np.outer(np.arange(size), np.arange(size) + 0.5)) * np.sqrt(2 / size)
    cosines[0] /= np.sqrt(2)
    return cosines


def _coarser(stacks: tf.Tensor, seeds: tf.Tensor, keys: Mapping[str, Any], low: float, high: float) -> tf.Tensor:
    log_factor = draws.strength(seeds, draws.RESOLUTION_STREAM, keys["probability"], 0.0, math.log(keys["max_factor"]))
    return _where(log_factor, coarsen(stacks, tf.exp(log_factor)), stacks)


def _shaded(stacks: tf.Tensor, seeds: tf.Tensor, keys: Mapping[str, Any], low: float, high: float) -> tf.Tensor:
    """The logarithm of the field is a cubic B-spline, as N4 has it (Tustison et al., 2010)."""
    sigma = draws.strength(seeds, draws.BIAS_FIELD_STREAM, keys["probability"], keys["sigma"], keys["sigma"])
    control = draws.displacement(draws.of_stream(seeds, draws.BIAS_CONTROL_STREAM), keys["sigma"], keys["grid"])[:, :1]
    field = tf.exp(augment.spline_surface(control, stacks.shape[1]))
    return _where(sigma, low + (stacks - low) * field, stacks)


def _bent(stacks: tf.Tensor, seeds: tf.Tensor, keys: Mapping[str, Any], low: float, high: float) -> tf.Tensor:
    """Bends |share of the range| to a power and keeps the sign, so that it rises everywhere and low and high stay."""
    bound = math.log(keys["max_gamma"])
    log_gamma = draws.strength(seeds, draws.GAMMA_STREAM, keys["probability"], -bound, bound)
    share = (stacks - low) / (high - low)
    bent = tf.sign(share) * tf.abs(share) ** _of_sample(tf.exp(log_gamma))
    return _where(log_gamma, low + bent * (high - low), stacks)


def _noisy(stacks: tf.Tensor, seeds: tf.Tensor, keys: Mapping[str, Any], low: float, high: float) -> tf.Tensor:
    bound = keys["max_sigma_percent"] / 100.0 * (high - low)
    sigma = draws.strength(seeds, draws.NOISE_STREAM, keys["probability"], 0.0, bound)
    shape = stacks.shape[1:]
    count = math.prod(shape)

    def draw(seed: tf.Tensor) -> tf.Tensor:
        # In float32, since they are as many as pixels; two normal numbers of every pair (Box and Muller, 1958).
        uniform = draws.uniform(seed, [2, (count + 1) // 2], tf.float32)
        radius, angle = tf.sqrt(-2.0 * tf.math.log(uniform[0])), 2.0 * math.pi * uniform[1]
        normal = tf.concat([radius * tf.cos(angle), radius * tf.sin(angle)], axis=0)
        return tf.reshape(normal[:count], shape)

    normal = tf.map_fn(
        draw,
        draws.of_stream(seeds, draws.NOISE_PIXEL_STREAM),
        fn_output_signature=tf.TensorSpec(shape, tf.float32),
    )
    return stacks + _of_sample(sigma) * normal


def _where(strength: tf.Tensor, changed: tf.Tensor, stacks: tf.Tensor) -> tf.Tensor:
    """Keeps the samples whose strength is 0 as they are, to the bit."""
    return tf.where((strength != 0)[:, tf.newaxis, tf.newaxis, tf.newaxis], changed, stacks)


def _of_sample(values: tf.Tensor) -> tf.Tensor:
    return tf.cast(values, tf.float32)[:, tf.newaxis, tf.newaxis, tf.newaxis]
