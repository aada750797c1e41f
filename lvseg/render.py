"""Simulation as augmentation: stacks of simulated patients rendered anew from their maps of tissues, at every step.

What a network has seen at every contrast it does not need to be shown at a new one. Each sample is imaged by a sequence
of its own. "physics": a spoiled gradient echo (any echo time, fat suppression, contrast agent, water, fat and fat
fraction) or a T2-weighted spin echo of tissues that vary about the literature's values (`lvseg.phantom.physics`).
"random": every tissue an intensity of its own, as in SynthSeg (Billot et al., Med Image Anal 2023, 86:102789).
"fraction": the fat fraction in percent, of patients of any fatness. All have a smooth texture in every tissue, and
pixels that belong to several tissues, where water and fat of opposite phase cancel. Noise, coils, blur and the like
are `lvseg.intensity`'s, for real scans too.

Seeds, and what every operation here has to be able to do, are as in `lvseg.augment`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from lvseg import augment, draws
from lvseg.phantom.anatomy import Tissue
from lvseg.phantom.physics import AVERAGE, FAT_AMPLITUDES, FAT_PPM, FAT_T1_MS, GYROMAGNETIC_HZ_PER_T

Kind = Literal["physics", "random", "mixture", "fraction"]

TISSUES = len(Tissue)
WIDER = 2.0  # times the spread between people that `physics` knows of, for what it does not
# Of a contrast agent: relaxivity between those of the usual ones in plasma at 1.5 T (Rohrer et al., Invest Radiol 2005,
# 40:715), and concentrations in mmol/l without agent and in four phases, which are estimates.
RELAXIVITY_L_PER_MMOL_S = 4.5
PHASES = ("none", "arterial", "portal", "late", "hepatobiliary")
CONCENTRATIONS = {
    Tissue.BLOOD: (4.0, 2.0, 1.0, 0.4), Tissue.HEART: (1.0, 0.8, 0.4, 0.2), Tissue.LIVER: (0.3, 0.8, 0.5, 1.2),
    Tissue.FOCAL_FAT: (0.3, 0.8, 0.5, 1.0), Tissue.HEPATIC_VESSEL: (0.1, 1.8, 0.9, 0.4),
    Tissue.PORTAL_VESSEL: (0.5, 2.0, 1.0, 0.4), Tissue.PORTAL_BLOOD: (0.5, 2.0, 1.0, 0.4),
    Tissue.VENOUS_BLOOD: (0.5, 1.6, 1.0, 0.4), Tissue.SPLEEN: (2.0, 1.2, 0.7, 0.3),
    Tissue.KIDNEY: (3.0, 2.0, 1.5, 0.6), Tissue.KIDNEY_MEDULLA: (0.5, 1.5, 1.5, 0.6),
    Tissue.PANCREAS: (1.5, 0.8, 0.4, 0.2), Tissue.MUSCLE: (0.1, 0.2, 0.2, 0.1),
    Tissue.STOMACH: (0.5, 0.7, 0.4, 0.2), Tissue.BOWEL: (0.5, 0.7, 0.4, 0.2), Tissue.LESION: (0.9, 0.4, 0.3, 0.1),
    Tissue.SKIN: (0.1, 0.3, 0.3, 0.1), Tissue.GALLBLADDER: (0.0, 0.0, 0.0, 0.6),
}  # fmt: skip
LIVER_FAT_PERCENT = (0.5, 40.0)
# How often each image is made: a gradient echo as it is and with its fat suppressed, water, fat and fat fraction of
# several echoes, and a T2-weighted spin echo with and without suppression.
IMAGES = ("echo", "suppressed", "water", "fat", "fraction", "t2")
SHARES = (0.35, 0.2, 0.15, 0.05, 0.1, 0.15)
FRACTION_SHARES = tuple(float(image == "fraction") for image in IMAGES)
RANDOM_SHARE = {"physics": 0.0, "mixture": 0.5, "random": 1.0, "fraction": 0.0}
READOUT_S = 0.001  # after an echo, at least, before the next excitation
ROUGHEST = {"physics": 0.06, "random": 0.15}  # standard deviation of a tissue's texture, relatively, at most
TEXTURE_GRID = 32
BRIGHT_SHARE = 0.02  # of the pixels lie above what is scaled to the bright intensity
STEP = 8  # every so many pixels are looked at for it


def contrast(
    stacks: tf.Tensor,
    tissues: tf.Tensor,
    seeds: tf.Tensor,
    kind: Kind,
    probability: float,
    low: float,
    high: float,
    partial_volume: float = 0.0,
) -> tf.Tensor:
    """Renders the samples that have a map of tissues; those without one stay as they are, to the bit.

    Args:
        stacks: float32 [B, size, size, C], what the network would see.
        tissues: uint8 [B, size, size, C], of `Tissue`; nothing but air where there is no map.
        seeds: int64 [B, 2], from `draws.sample_seeds` with ELASTIC_STREAM.
        kind: "mixture" is either with the same probability.
        probability: of a sample being rendered.
        low, high: intensities of no signal and of bright tissue among those that the network sees; not used for
            "fraction", whose percents are what they are.
        partial_volume: share of a pixel's signal, at most, that comes from its neighbour on either side, along rows and
            along columns; drawn for each sample.

    Returns:
        float32 [B, size, size, C].

    Raises:
        ValueError: for maps of another shape than the stacks, or a size unknown when traced.
    """
    if stacks.shape[1:] != tissues.shape[1:] or stacks.shape[1] is None:
        raise ValueError(
            f"Expected maps of the stacks' shape, received stacks.shape={stacks.shape} and"
            f" tissues.shape={tissues.shape}."
        )
    chosen = draws.uniform_of_each(seeds, draws.CONTRAST_STREAM, 4)
    has_map = tf.reduce_max(tf.cast(tissues, tf.float32), axis=[1, 2, 3]) > float(Tissue.AIR)

    def rendered() -> tf.Tensor:
        return _rendered(tissues, seeds, chosen, kind, low, high, partial_volume)

    return draws.where(has_map & (chosen[:, 0] < probability), rendered, stacks)


def _rendered(
    tissues: tf.Tensor, seeds: tf.Tensor, chosen: tf.Tensor, kind: Kind, low: float, high: float, partial_volume: float
) -> tf.Tensor:
    """All samples rendered; `chosen`, float64 [B, 4], has what they differ by as wholes."""
    _, size, _, channels = tissues.shape
    shares = FRACTION_SHARES if kind == "fraction" else SHARES
    signal, roughness = signals(seeds, shares), draws.uniform_of_each(seeds, draws.ROUGHNESS_STREAM, TISSUES)
    is_random = chosen[:, 1, tf.newaxis] < RANDOM_SHARE[kind]
    if RANDOM_SHARE[kind]:
        signal = tf.where(is_random[..., tf.newaxis], _in_phase(_random(seeds)), signal)
    roughest = [tf.constant(ROUGHEST[name], tf.float64) for name in ("random", "physics")]
    roughness *= tf.where(is_random, *roughest)
    table = tf.concat([signal, roughness[..., tf.newaxis]], axis=-1)
    # XLA would compute the table anew at every pixel that looks it up, which takes a third longer
    # (benchmarks/render.py); a product of matrices, here with 1, it computes once.
    table = tf.cast(tf.matmul(table, tf.eye(table.shape[-1], dtype=tf.float64)), tf.float32)
    # Channels first, so that rows of pixels are worked on together. GPUs have gather kernels for int32 but none for the
    # narrower integers. With a frame, pixels at the edge have neighbours like any other.
    framed = tf.cast(_framed(tf.transpose(tissues, [0, 3, 1, 2])), tf.int32)
    picked = tf.gather(table, framed, batch_dims=1)
    control = draws.normal_of_each(draws.of_stream(seeds, draws.TEXTURE_STREAM), channels * TEXTURE_GRID**2)
    control = tf.reshape(tf.cast(control, tf.float32), [-1, channels, TEXTURE_GRID, TEXTURE_GRID])
    spline = tf.constant(np.pad(augment.spline_matrix(size, TEXTURE_GRID), ((1, 1), (0, 0)), "edge"), tf.float32)
    rough = tf.maximum(1.0 + picked[..., 2] * tf.einsum("rg,bdgh,ch->bdrc", spline, control, spline), 0.0)
    share = draws.of_sample(partial_volume * chosen[:, 3])
    real, imaginary = (_shared(picked[..., part] * rough, share) for part in (0, 1))
    rendered = tf.sqrt(real * real + imaginary * imaginary)
    if kind == "fraction":
        shown = 100.0 * tf.minimum(rendered, 1.0)
    else:
        shown = low + (high - low) * (rendered / _bright(rendered) * draws.of_sample(0.8 + 0.5 * chosen[:, 2]))
    return tf.transpose(shown, [0, 2, 3, 1])


def signals(seeds: tf.Tensor, shares: Sequence[float] | None = None) -> tf.Tensor:
    """What every tissue sends to an image whose sequence and patient are drawn at random, with its phase.

    Args:
        seeds: int64 [B, 2], as `contrast`.
        shares: how often each of IMAGES is made, adding up to 1; None for SHARES.

    Returns:
        float64 [B, tissues, 2], real and imaginary part, with water as the real axis.
    """
    drawn = draws.uniform_of_each(seeds, draws.SEQUENCE_STREAM, 16)
    z = tf.clip_by_value(
        tf.reshape(draws.normal_of_each(draws.of_stream(seeds, draws.TISSUE_STREAM), 5 * TISSUES), [-1, 5, TISSUES]),
        -2.2,
        2.2,
    )
    at_3t = tf.cast(drawn[:, 0] < 0.5, tf.float64)[:, tf.newaxis]
    field_t = 1.5 + 1.5 * at_3t
    rows = [AVERAGE[tissue] for tissue in Tissue]

    def column(values: list[float]) -> npt.NDArray[np.float64]:
        return np.array(values, np.float64)

    def seconds(pairs: list[tuple[float, float]]) -> tf.Tensor:
        at_one_half, at_three = np.array(pairs, np.float64).T / 1000.0
        return at_one_half + (at_three - at_one_half) * at_3t

    density = column([row.proton_density for row in rows]) * tf.exp(0.04 * z[:, 0])
    t1 = seconds([row.t1_ms for row in rows]) * tf.exp(WIDER * column([row.t1_spread for row in rows]) * z[:, 1])
    t2 = seconds([row.t2_ms for row in rows]) * tf.exp(0.15 * z[:, 2])
    r2star = 1.0 / t2 + column([row.r2_prime_per_s for row in rows]) * tf.exp(0.4 * z[:, 3]) * field_t / 1.5
    fat = column([row.fat_percent for row in rows]) + WIDER * column([row.fat_spread_percent for row in rows]) * z[:, 4]
    of_liver = _log_between(*LIVER_FAT_PERCENT, drawn[:, 1])
    fat = _set(fat, Tissue.LIVER, of_liver)
    fat = _set(fat, Tissue.FOCAL_FAT, of_liver + 5.0 + 20.0 * drawn[:, 2])
    fat = tf.clip_by_value(fat, 0.0, 100.0) / 100.0

    agent = _one_of([0.5, 0.125, 0.125, 0.125, 0.125], drawn[:, 3])
    amounts = np.zeros((len(PHASES), TISSUES))
    for tissue, concentrations in CONCENTRATIONS.items():
        amounts[1:, tissue] = concentrations
    amount = tf.gather(tf.constant(amounts), agent) * tf.exp(0.3 * z[:, 0])
    t1 = 1.0 / (1.0 / t1 + RELAXIVITY_L_PER_MMOL_S * amount)
    fat_t1 = np.array(FAT_T1_MS)[0] / 1000.0 + (FAT_T1_MS[1] - FAT_T1_MS[0]) / 1000.0 * at_3t

    repetition, echo, flip = _timing(drawn, field_t)
    saturated = spoiled_gradient_echo(t1, repetition, flip * (math.pi / 180.0))
    saturated_fat = spoiled_gradient_echo(fat_t1, repetition, flip * (math.pi / 180.0))
    decay = tf.exp(-echo * r2star)
    water, lipid = density * (1.0 - fat) * saturated * decay, density * fat * saturated_fat * decay
    turns = 2.0 * math.pi * echo * field_t * (FAT_PPM * 1e-6 * GYROMAGNETIC_HZ_PER_T)
    real = tf.reduce_sum(FAT_AMPLITUDES * tf.cos(turns), axis=1, keepdims=True)
    imaginary = tf.reduce_sum(FAT_AMPLITUDES * tf.sin(turns), axis=1, keepdims=True)
    left = (0.02 + 0.25 * drawn[:, 9])[:, tf.newaxis]

    def echo_of(of_fat: tf.Tensor) -> tf.Tensor:
        return tf.stack([water + of_fat * real, of_fat * imaginary], axis=-1)

    has_signal = tf.cast(density > 0.3, tf.float64)  # of others a scanner finds no fraction above its noise
    spin_repetition, spin_echo = _log_between(1.5, 6.0, drawn[:, 10]), _log_between(0.05, 0.13, drawn[:, 11])
    spin_fat = tf.where(drawn[:, 12, tf.newaxis] < 0.5, tf.ones_like(left), left)
    recovered = density * (1.0 - tf.exp(-spin_repetition[:, tf.newaxis] / t1)) * tf.exp(-spin_echo[:, tf.newaxis] / t2)
    images = tf.stack(
        [
            echo_of(lipid),
            echo_of(left * lipid),
            _in_phase(water),
            _in_phase(lipid),
            _in_phase(has_signal * fat),
            _in_phase(recovered * ((1.0 - fat) + spin_fat * fat)),
        ],
        axis=1,
    )
    return tf.gather(images, _one_of(shares or SHARES, drawn[:, 13]), batch_dims=1)


def _timing(drawn: tf.Tensor, field_t: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Repetition and echo time in s and flip angle in degrees, [B, 1] each, of gradient echoes."""
    opposed = 0.5 / (abs(FAT_PPM[4]) * 1e-6 * GYROMAGNETIC_HZ_PER_T * field_t)
    other = (0.0008 + 0.005 * drawn[:, 8])[:, tf.newaxis]
    which = drawn[:, 7, tf.newaxis]
    echo = tf.where(which < 1 / 3, opposed, tf.where(which < 2 / 3, 2.0 * opposed, other))
    # Volumes are excited as a whole with short repetitions, single slices with long ones; echoes take time to be read.
    is_volume = (drawn[:, 4] < 0.7)[:, tf.newaxis]
    repetition = tf.where(is_volume, _log_between(0.003, 0.012, drawn[:, 5])[:, tf.newaxis],
                          _log_between(0.09, 0.25, drawn[:, 5])[:, tf.newaxis])  # fmt: skip
    flip = tf.where(is_volume, 5.0 + 15.0 * drawn[:, 6, tf.newaxis], 50.0 + 35.0 * drawn[:, 6, tf.newaxis])
    return tf.maximum(repetition, echo + READOUT_S), echo, flip


def spoiled_gradient_echo(t1_s: tf.Tensor, repetition_s: tf.Tensor, flip: tf.Tensor) -> tf.Tensor:
    """Steady state for a proton density of 1, flip in radians; `lvseg.phantom.physics` has the same in NumPy."""
    e1 = tf.exp(-repetition_s / t1_s)
    return tf.sin(flip) * (1.0 - e1) / (1.0 - tf.cos(flip) * e1)


def _in_phase(signal: tf.Tensor) -> tf.Tensor:
    """Real signals as complex ones: another axis at the end, of real and imaginary part."""
    return tf.stack([signal, tf.zeros_like(signal)], axis=-1)


def _shared(images: tf.Tensor, share: tf.Tensor) -> tf.Tensor:
    """Images [B, C, size + 2, size + 2] without their frame: [B, C, size, size]; pixels get a share, float32
    [B, 1, 1, 1], from either neighbour, both ways."""
    own = images[:, :, 1:-1]
    images = own + share * (images[:, :, :-2] + images[:, :, 2:] - 2.0 * own)
    own = images[..., 1:-1]
    return own + share * (images[..., :-2] + images[..., 2:] - 2.0 * own)


def _framed(maps: tf.Tensor) -> tf.Tensor:
    """Maps [B, C, H, W] with their outermost pixels once more on every side: [B, C, H + 2, W + 2]."""
    maps = tf.concat([maps[:, :, :1], maps, maps[:, :, -1:]], axis=2)
    return tf.concat([maps[..., :1], maps, maps[..., -1:]], axis=3)


def _random(seeds: tf.Tensor) -> tf.Tensor:
    """Intensities of their own; half the time vessels are like the organ around them, and air is mostly dark."""
    drawn = draws.uniform_of_each(seeds, draws.RANDOM_TISSUE_STREAM, TISSUES + 4)
    table, own = drawn[:, :TISSUES], drawn[:, TISSUES:]
    liver = table[:, Tissue.LIVER]
    table = _set(table, Tissue.FOCAL_FAT, liver * (0.7 + 0.6 * table[:, Tissue.FOCAL_FAT]))
    for vessel in (Tissue.HEPATIC_VESSEL, Tissue.PORTAL_VESSEL):
        near = liver + 0.2 * (table[:, vessel] - 0.5)
        table = _set(table, vessel, tf.where(own[:, 0] < 0.5, near, table[:, vessel]))
    dark = own[:, 1] < 0.95
    for empty in (Tissue.AIR, Tissue.GAS, Tissue.LUNG):
        faint = (0.04 if empty is not Tissue.LUNG else 0.15) * table[:, empty]
        table = _set(table, empty, tf.where(dark, faint, table[:, empty]))
    return tf.maximum(table, 0.0)


def _bright(rendered: tf.Tensor) -> tf.Tensor:
    """Of each sample, [B, C, size, size], the intensity that few pixels exceed: float32 [B, 1, 1, 1], above 0."""
    some = rendered[..., ::STEP, ::STEP]
    some = tf.reshape(some, [-1, math.prod(some.shape[1:])])
    values = tf.sort(some, axis=1)
    bright = values[:, round((1.0 - BRIGHT_SHARE) * (values.shape[1] - 1))]
    # A slice that shows next to nothing of the body, or of its fat alone, is not blown up to all of the range.
    bright = tf.maximum(bright, 0.5 * tf.reduce_max(rendered, axis=[1, 2, 3]))
    return tf.maximum(bright, 1e-6)[:, tf.newaxis, tf.newaxis, tf.newaxis]


def _one_of(shares: Sequence[float], drawn: tf.Tensor) -> tf.Tensor:
    """Which of several things each number, float64 [B] uniform between 0 and 1, chooses: int32 [B]."""
    edges = tf.constant(np.cumsum(shares)[:-1], tf.float64)
    return tf.reduce_sum(tf.cast(drawn[:, tf.newaxis] >= edges, tf.int32), axis=1)


def _log_between(lowest: float, highest: float, drawn: tf.Tensor) -> tf.Tensor:
    return tf.exp(math.log(lowest) + math.log(highest / lowest) * drawn)


def _set(table: tf.Tensor, tissue: Tissue, values: tf.Tensor) -> tf.Tensor:
    """A table [B, tissues] with one column replaced, by values [B]."""
    return tf.where(np.arange(TISSUES) == int(tissue), values[:, tf.newaxis], table)
