"""Intensity augmentation of slices as scanners differ, drawn anew for every sample: what lies beside the patient, thick
slices, coarse pixels, blur, coils, ghosts, gamma, noise and the field of view.

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
SMOOTHING = ("resolution", "blur")
DARK_SHARE = 0.1  # of the range, below which nothing of the patient is


def intensity(
    stacks: tf.Tensor, seeds: tf.Tensor, settings: Mapping[str, Mapping[str, Any] | None], low: float, high: float
) -> tf.Tensor:
    """Changes the intensities of slices as other scanners would have.

    In the order in which they come about: what lies in the scanner is averaged over slices and pixels, coils weigh what
    they receive, breathing repeats it, the sequence's contrast bends it, noise that nothing smooths any more comes on
    top, and what is outside the field of view is lost.

    Args:
        stacks: float32 [B, size, size, C]; all channels of a sample change alike, but each has its own noise.
        seeds: int64 [B, 2], from `draws.sample_seeds` with ELASTIC_STREAM.
        settings: the experiment's keys of `table`, `arms`, `thickness`, `resolution`, `blur`, `bias_field`, `ghosts`,
            `gamma`, `noise` and `field_of_view`; null or absent is off.
        low, high: intensities.

    Returns:
        float32 [B, size, size, C]; the samples that undergo nothing exactly as they came in.

    Raises:
        ValueError: for a `high` that is not above `low`, slices that are not square, or whose size is unknown when
            traced.
    """
    chosen: dict[str, Any] = {name: keys for name, keys in settings.items() if name in NAMES and keys}
    if not chosen:
        return stacks
    _, size, width, _ = stacks.shape
    if size is None or size != width:
        raise ValueError(f"Expected square slices of a known size, received stacks.shape={stacks.shape}.")
    if not low < high:
        raise ValueError(f"Expected low below high, received low={low} and high={high}.")
    if smoothing := {name: chosen[name] for name in SMOOTHING if name in chosen}:
        chosen["smooth"] = smoothing
    for name, change in CHANGES.items():
        if name in chosen:
            stacks = change(stacks, seeds, chosen[name], low, high)
    return stacks


def smooth(stacks: tf.Tensor, factor: tf.Tensor | float = 1.0, sigma_px: tf.Tensor | float = 0.0) -> tf.Tensor:
    """Blurs slices in their plane as if scanned with larger pixels and interpolated to the present ones, or otherwise.

    A scanner with larger pixels measures fewer spatial frequencies, dampens the last of them against ringing and fills
    the missing ones with zeros (Bernstein, Fain and Riederer, J Magn Reson Imaging 14:270, 2001). Here a Tukey window
    ends at the Nyquist frequency of the larger pixels, and the frequencies are those of the discrete cosine transform,
    to which the slice goes on as in a mirror: nothing wraps around, and the mean stays.

    Args:
        stacks: float32 [B, size, size, C], size known.
        factor: float64 [B], how many times as large the pixels are, at least 1; or one number.
        sigma_px: float64 [B], standard deviation in pixels of a Gaussian blur besides; or one number.

    Returns:
        float32 [B, size, size, C].
    """
    size = stacks.shape[1]
    each = tf.zeros([tf.shape(stacks)[0], 1], tf.float64)
    # In float32: half the time. A GPU may multiply with 10 bits (TF32), an error far below any scan's noise.
    cosines = tf.constant(_cosines(size).astype(np.float32))
    share = np.arange(size) / size  # 1 is the Nyquist frequency of the present pixels
    factor = each + tf.reshape(tf.cast(factor, tf.float64), [-1, 1])
    window = 0.5 + 0.5 * tf.cos(math.pi * tf.clip_by_value((factor * share - (1.0 - EDGE)) / EDGE, 0.0, 1.0))
    window = tf.where(factor > 1.0, window, 1.0)  # the present pixels have been through it
    window *= tf.exp(-0.5 * ((each + tf.reshape(tf.cast(sigma_px, tf.float64), [-1, 1])) * math.pi * share) ** 2)
    matrix = tf.einsum("ki,bkj->bij", cosines, tf.cast(window, tf.float32)[:, :, tf.newaxis] * cosines)
    return tf.einsum("bcj,brjk->brck", matrix, tf.einsum("bri,bijk->brjk", matrix, stacks))


@functools.cache
def _cosines(size: int) -> npt.NDArray[np.float64]:
    """float64 [frequency, pixel]: the orthonormal discrete cosine transform (type 2)."""
    cosines = np.cos(np.pi / size * np.outer(np.arange(size), np.arange(size) + 0.5)) * np.sqrt(2 / size)
    cosines[0] /= np.sqrt(2)
    return cosines


def _smoother(stacks: tf.Tensor, seeds: tf.Tensor, settings: Mapping[str, Any], low: float, high: float) -> tf.Tensor:
    """Coarser pixels and blur in one go, since each alone costs as much as both."""
    nothing = tf.zeros([tf.shape(stacks)[0]], tf.float64)
    log_factor, sigma = nothing, nothing
    if keys := settings.get("resolution"):
        bound = math.log(keys["max_factor"])
        log_factor = draws.strength(seeds, draws.RESOLUTION_STREAM, keys["probability"], 0.0, bound)
    if keys := settings.get("blur"):
        sigma = draws.strength(seeds, draws.BLUR_STREAM, keys["probability"], 0.0, keys["max_sigma_px"])
    return draws.where(log_factor + sigma != 0, lambda: smooth(stacks, tf.exp(log_factor), sigma), stacks)


def _thicker(stacks: tf.Tensor, seeds: tf.Tensor, keys: Mapping[str, Any], low: float, high: float) -> tf.Tensor:
    """The stack's own ends go on, as the volume's do."""
    share = draws.strength(seeds, draws.THICKNESS_STREAM, keys["probability"], 0.0, keys["max_share"])

    def thicker() -> tf.Tensor:
        before = tf.concat([stacks[..., :1], stacks[..., :-1]], axis=-1)
        after = tf.concat([stacks[..., 1:], stacks[..., -1:]], axis=-1)
        return stacks + draws.of_sample(share) * (before + after - 2.0 * stacks)

    return draws.where(share != 0, thicker, stacks)


def _ghosted(stacks: tf.Tensor, seeds: tf.Tensor, keys: Mapping[str, Any], low: float, high: float) -> tf.Tensor:
    """Two copies, up and down the axis along which the phase is encoded, each of half the share."""
    share = draws.strength(seeds, draws.GHOST_STREAM, keys["probability"], 0.0, keys["max_share"])

    def ghosted() -> tf.Tensor:
        drawn = draws.uniform_of_each(seeds, draws.GHOST_SHIFT_STREAM, 2)
        size = stacks.shape[1]
        # int64, whose arithmetic stays on a GPU.
        by = tf.cast(tf.round((0.15 + 0.35 * drawn[:, 0]) * size), tf.int64)[:, tf.newaxis]
        along_rows, ghosts = (drawn[:, 1] < 0.5)[:, tf.newaxis], tf.zeros_like(stacks)
        for sign in (1, -1):
            there = np.arange(size, dtype=np.int64)
            index = tf.math.floormod(there - sign * by, size)
            moved = tf.gather(stacks, tf.where(along_rows, index, there), axis=1, batch_dims=1)
            moved = tf.gather(moved, tf.where(along_rows, there, index), axis=2, batch_dims=1)
            ghosts += 0.5 * (moved - low)
        return stacks + draws.of_sample(share) * (ghosts - (stacks - low))

    return draws.where(share != 0, ghosted, stacks)


def _cut(stacks: tf.Tensor, seeds: tf.Tensor, keys: Mapping[str, Any], low: float, high: float) -> tf.Tensor:
    """What was outside is dark, as what a scan is padded with."""
    is_cut = draws.strength(seeds, draws.VIEW_STREAM, keys["probability"], 1.0, 1.0)

    def cut() -> tf.Tensor:
        sides = tf.cast(keys["max_share"] * draws.uniform_of_each(seeds, draws.VIEW_CUT_STREAM, 4), tf.float32)
        middle = (np.arange(stacks.shape[1], dtype=np.float32) + 0.5) / stacks.shape[1]
        rows = (middle > sides[:, 0, tf.newaxis]) & (middle < 1.0 - sides[:, 1, tf.newaxis])
        columns = (middle > sides[:, 2, tf.newaxis]) & (middle < 1.0 - sides[:, 3, tf.newaxis])
        inside = (rows[:, :, tf.newaxis] & columns[:, tf.newaxis, :])[..., tf.newaxis]
        return tf.where(inside, stacks, low)

    return draws.where(is_cut != 0, cut, stacks)


def _on_table(stacks: tf.Tensor, seeds: tf.Tensor, keys: Mapping[str, Any], low: float, high: float) -> tf.Tensor:
    """A curved plate in the lowest fifth of the slice, two walls and less signal between them."""
    is_there = draws.strength(seeds, draws.TABLE_STREAM, keys["probability"], 1.0, 1.0)

    def on_table() -> tf.Tensor:
        drawn = tf.cast(draws.uniform_of_each(seeds, draws.TABLE_SHAPE_STREAM, 5), tf.float32)
        drawn = drawn[:, :, tf.newaxis, tf.newaxis]
        row, column = _places(stacks.shape[1])
        depth = row - (0.8 + 0.15 * drawn[:, 0]) + (0.1 + 0.4 * drawn[:, 1]) * (column - 0.5) ** 2
        thickness = 0.02 + 0.05 * drawn[:, 2]
        within = (depth > 0) & (depth < thickness)
        wall = (depth < 0.25 * thickness) | (depth > 0.75 * thickness)
        bright = 0.05 + 0.75 * drawn[:, 3]
        share = tf.where(within, tf.where(wall, bright, bright * drawn[:, 4]), 0.0)
        return _in_the_dark(stacks, share, low, high)

    return draws.where(is_there != 0, on_table, stacks)


def _with_arms(stacks: tf.Tensor, seeds: tf.Tensor, keys: Mapping[str, Any], low: float, high: float) -> tf.Tensor:
    """Two ellipses at the sides: fat around muscle around two bones, each as bright as it happens to be."""
    is_there = draws.strength(seeds, draws.ARMS_STREAM, keys["probability"], 1.0, 1.0)

    def with_arms() -> tf.Tensor:
        drawn = tf.cast(draws.uniform_of_each(seeds, draws.ARMS_SHAPE_STREAM, 9), tf.float32)
        drawn = drawn[:, :, tf.newaxis, tf.newaxis]
        row, column = _places(stacks.shape[1])
        share = tf.zeros_like(stacks[..., 0])
        for side in (0, 1):
            from_edge = column if side == 0 else 1.0 - column
            across = (from_edge - 0.08 * drawn[:, 0 + side]) / (0.06 + 0.04 * drawn[:, 2])
            along = (row - (0.35 + 0.3 * drawn[:, 3 + side])) / (0.07 + 0.05 * drawn[:, 5])
            radius = tf.sqrt(across**2 + along**2)
            bones = tf.minimum(tf.sqrt(across**2 + (along - 0.35) ** 2), tf.sqrt(across**2 + (along + 0.35) ** 2))
            flesh = tf.where(radius < 0.8, drawn[:, 6], drawn[:, 7])
            share = tf.where(radius < 1.0, tf.where(bones < 0.2, drawn[:, 8], flesh), share)
        return _in_the_dark(stacks, share, low, high)

    return draws.where(is_there != 0, with_arms, stacks)


def _places(size: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Of every pixel its row [size, 1] and column [1, size] as shares of the slice."""
    middle = (np.arange(size, dtype=np.float32) + 0.5) / size
    return middle[:, None], middle[None, :]


def _in_the_dark(stacks: tf.Tensor, share: tf.Tensor, low: float, high: float) -> tf.Tensor:
    """Adds things, float32 [B, size, size] as shares of the range, where no slice of the stack shows anything."""
    is_dark = tf.reduce_max(stacks, axis=-1, keepdims=True) < low + DARK_SHARE * (high - low)
    return tf.where(is_dark & (share > 0)[..., tf.newaxis], low + share[..., tf.newaxis] * (high - low), stacks)


def _shaded(stacks: tf.Tensor, seeds: tf.Tensor, keys: Mapping[str, Any], low: float, high: float) -> tf.Tensor:
    """The logarithm of the field is a cubic B-spline, as N4 has it (Tustison et al., 2010)."""
    sigma = draws.strength(seeds, draws.BIAS_FIELD_STREAM, keys["probability"], keys["sigma"], keys["sigma"])

    def shaded() -> tf.Tensor:
        control = draws.displacement(draws.of_stream(seeds, draws.BIAS_CONTROL_STREAM), keys["sigma"], keys["grid"])
        return low + (stacks - low) * tf.exp(augment.spline_surface(control[:, :1], stacks.shape[1]))

    return draws.where(sigma != 0, shaded, stacks)


def _bent(stacks: tf.Tensor, seeds: tf.Tensor, keys: Mapping[str, Any], low: float, high: float) -> tf.Tensor:
    """Bends |share of the range| to a power and keeps the sign, so that it rises everywhere and low and high stay."""
    bound = math.log(keys["max_gamma"])
    log_gamma = draws.strength(seeds, draws.GAMMA_STREAM, keys["probability"], -bound, bound)

    def bent() -> tf.Tensor:
        share = (stacks - low) / (high - low)
        # Not a power, which XLA on a processor calls a function for; 0 stays within 1e-30 of 0.
        size = tf.exp(draws.of_sample(tf.exp(log_gamma)) * tf.math.log(tf.maximum(tf.abs(share), 1e-30)))
        return low + tf.sign(share) * size * (high - low)

    return draws.where(log_gamma != 0, bent, stacks)


def _noisy(stacks: tf.Tensor, seeds: tf.Tensor, keys: Mapping[str, Any], low: float, high: float) -> tf.Tensor:
    bound = keys["max_sigma_percent"] / 100.0 * (high - low)
    sigma = draws.strength(seeds, draws.NOISE_STREAM, keys["probability"], 0.0, bound)
    shape = stacks.shape[1:]
    count = math.prod(shape)

    def noisy() -> tf.Tensor:
        is_rician = keys.get("kind", "gaussian") == "rician"
        pairs = count if is_rician else (count + 1) // 2
        first, second = draws.normal_pairs(draws.of_stream(seeds, draws.NOISE_PIXEL_STREAM), pairs)
        if not is_rician:
            normal = tf.concat([first, second], axis=1)[:, :count]
            return stacks + draws.of_sample(sigma) * tf.reshape(normal, [-1, *shape])
        # A magnitude of two channels, with the signal in one (Gudbjartsson and Patz, Magn Reson Med 1995, 34:910).
        real, imaginary = (draws.of_sample(sigma) * tf.reshape(normal, [-1, *shape]) for normal in (first, second))
        return low + tf.sqrt((stacks - low + real) ** 2 + imaginary**2)

    return draws.where(sigma != 0, noisy, stacks)


# In the order in which they come about; `smooth` is all of SMOOTHING, and NAMES are the keys of an experiment.
CHANGES = {
    "table": _on_table, "arms": _with_arms, "thickness": _thicker, "smooth": _smoother, "bias_field": _shaded,
    "ghosts": _ghosted, "gamma": _bent, "noise": _noisy, "field_of_view": _cut,
}  # fmt: skip
NAMES = tuple(name for change in CHANGES for name in (SMOOTHING if change == "smooth" else (change,)))
