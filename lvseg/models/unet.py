"""The report's U-Net: padding "same", 2 x 2 transposed convolutions, dropout in the two deepest blocks.

Sources: Ronneberger et al., 2015; Iglovikov and Shvets (TernausNet), 2018, for the VGG11 encoder and its decoder.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import keras

from lvseg.draws import DROPOUT_STREAM
from lvseg.models.layers import InstanceNormalization, StatelessDropout

DEPTH = 5
# Output channels of VGG11's convolutions, block by block (Simonyan and Zisserman, 2014, configuration A).
VGG11_WIDTHS = ((64,), (128,), (256, 256), (512, 512), (512, 512))


def unet(
    size: int,
    channels: int,
    classes: int,
    width: int = 64,
    encoder: str | None = None,
    residual: bool = False,
    dropout: float = 0.5,
    input_offset: float = 0.0,
    input_scale: float = 1.0,
    seed: int = 0,
    encoder_input: str = "spread",
    precision: str = "float32",
    norm: str | None = None,
) -> keras.Model:
    """Builds the network.

    Args:
        size: pixels of a side, a multiple of 16 (of 32 with VGG11).
        channels: slices of a stack.
        classes: with the background, which is class 0.
        width: filters of the first block, doubled at every pooling; with VGG11 the decoder's follow it.
        encoder: None for the base network, "vgg11" for the widths of the pretrained one (T).
        residual: short skips over the convolution blocks (R): a 1 x 1 projection of a block's input is added before
            its last ReLU.
        dropout: rate in the two deepest blocks.
        input_offset, input_scale: constants of the training patients; the network sees (intensity - offset) * scale.
        seed: of the initial weights (He et al., 2015, normal); each layer's follow from it and the layer's place.
        encoder_input: how VGG11's first kernels, made for three colours, meet the slices: "spread" over them (see
            `vgg.load_encoder`), or after a learned "projection" of the slices to three channels, each of which starts
            as their mean.
        precision: "float32", "mixed_bfloat16" or "mixed_float16"; weights, input scaling, logits and softmax are
            float32 in any case.
        norm: None, or "instance" (Ulyanov et al., 2016): every convolution of 3 x 3 is followed by a normalisation of
            each channel of each sample over its slice, before its ReLU.

    Returns:
        keras.Model of (stacks float32 [B, size, size, channels], seeds int64 [B, 2]) to probabilities float32
        [B, size, size, classes]; seeds only matter with training=True.

    Raises:
        ValueError: for an encoder, encoder_input, precision or norm that there is not; the pretrained encoder has none.
    """
    for name, value, known in (
        ("encoder", encoder, (None, "vgg11")),
        ("encoder_input", encoder_input, ("spread", "projection") if encoder else ("spread",)),
        ("precision", precision, ("float32", "mixed_bfloat16", "mixed_float16")),
        ("norm", norm, (None,) if encoder else (None, "instance")),
    ):
        if value not in known:
            raise ValueError(f"Expected one of {known} with encoder={encoder!r}, received {name}={value!r}.")
    stacks = keras.Input((size, size, channels), name="stacks")
    seeds = keras.Input((2,), dtype="int64", name="seeds")
    scaling = keras.layers.Rescaling(input_scale, -input_offset * input_scale, dtype="float32", name="input_scaling")
    x = scaling(stacks)

    if encoder is None:
        widths: list[tuple[int, ...]] = [(width * 2**level,) * 2 for level in range(DEPTH)]
    else:
        widths = [*VGG11_WIDTHS, (width * 8,)]
    seeds_of_layers = itertools.count(seed * 1000)

    def initial() -> keras.initializers.Initializer:
        return keras.initializers.HeNormal(seed=next(seeds_of_layers))

    if encoder_input == "projection":
        mean = keras.initializers.Constant(1.0 / channels)
        x = keras.layers.Conv2D(3, 1, kernel_initializer=mean, dtype=precision, name="enc0_projection")(x)

    bridges = []
    for level, filters in enumerate(widths, start=1):
        if level > 1:
            x = keras.layers.MaxPooling2D(2, dtype=precision, name=f"enc{level}_pool")(x)
        x = _block(x, filters, residual and level > 1, initial, precision, norm, f"enc{level}")
        if level > len(widths) - 2:
            stream = DROPOUT_STREAM + level
            x = StatelessDropout(dropout, stream, dtype=precision, name=f"enc{level}_dropout")(x, seeds)
        bridges.append(x)
    bridges.pop()

    for level in range(len(widths) - 1, 0, -1):
        bridge = bridges[level - 1]
        if encoder is None:
            filters, kernel, activation = widths[level - 1], 2, None
            up = filters[0]
        else:
            # TernausNet: a transposed 3 x 3 convolution with ReLU, then one 3 x 3 convolution on the bridge.
            up = width * min(4, 2 ** (level - 2)) if level > 1 else max(1, width // 2)
            filters, kernel, activation = ((2 * up if level > 1 else up),), 3, "relu"
        x = keras.layers.Conv2DTranspose(
            up,
            kernel,
            strides=2,
            padding="same",
            activation=activation,
            kernel_initializer=initial(),
            dtype=precision,
            name=f"dec{level}_up",
        )(x)
        x = keras.layers.Concatenate(dtype=precision, name=f"dec{level}_bridge")([bridge, x])
        x = _block(x, filters, residual, initial, precision, norm, f"dec{level}")

    logits = keras.layers.Conv2D(classes, 1, kernel_initializer=initial(), dtype="float32", name="logits")(x)
    probabilities = keras.layers.Softmax(dtype="float32", name="probabilities")(logits)
    return keras.Model([stacks, seeds], probabilities, name="unet")


def encoder_layers(model: keras.Model) -> list[Any]:
    """VGG11's eight convolutions in a model built with encoder="vgg11", in order; ValueError for another model."""
    layers = [
        model.get_layer(f"enc{level}_conv{number}")
        for level, widths in enumerate(VGG11_WIDTHS, start=1)
        for number in range(1, len(widths) + 1)
    ]
    filters, expected = [layer.filters for layer in layers], [count for widths in VGG11_WIDTHS for count in widths]
    if filters != expected:
        raise ValueError(f"Expected a model with VGG11's filters, {expected}, received {filters}.")
    return layers


def encoder_variables(model: keras.Model) -> list[Any]:
    """The kernels and biases of VGG11's convolutions, which freezing the encoder holds still.

    Short skips and the projection of the slices are not among them, since no pretrained weights go there. ValueError
    as of `encoder_layers`.
    """
    return [variable for layer in encoder_layers(model) for variable in layer.trainable_variables]


def _block(
    x: keras.KerasTensor,
    filters: tuple[int, ...],
    residual: bool,
    initial: Callable[[], keras.initializers.Initializer],
    precision: str,
    norm: str | None,
    name: str,
) -> keras.KerasTensor:
    """3 x 3 convolutions with norm and ReLU; with `residual` the block's projected input joins before the last ReLU."""
    conv = functools.partial(keras.layers.Conv2D, padding="same", dtype=precision)
    short = x
    for number, count in enumerate(filters, start=1):
        x = conv(count, 3, kernel_initializer=initial(), name=f"{name}_conv{number}")(x)
        if norm == "instance":
            x = InstanceNormalization(dtype=precision, name=f"{name}_norm{number}")(x)
        if residual and number == len(filters):
            short = conv(count, 1, kernel_initializer=initial(), name=f"{name}_short")(short)
            x = keras.layers.Add(dtype=precision, name=f"{name}_add")([x, short])
        x = keras.layers.ReLU(dtype=precision, name=f"{name}_relu{number}")(x)
    return x
