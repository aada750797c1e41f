"""One bare training step of the base U-Net: lvseg's network in TensorFlow, and the same network in PyTorch.

Bare means forward, loss, gradient and Adam's update, on one batch that lies on the device: no pipeline and no
augmentation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras

CHANNELS, CLASSES, DROPOUT, LEARNING_RATE = 3, 2, 0.5, 1.0e-4
Step = Callable[[], Any]


def made_up_batch(size: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Stacks float32 [batch, size, size, channels], labels uint8 [batch, size, size, 1]: noise, brighter in a disc."""
    rows, columns = np.mgrid[:size, :size] / size
    disc = (rows - 0.4) ** 2 + (columns - 0.5) ** 2 < 0.05
    stacks = np.random.default_rng(0).normal(disc[..., None], 0.3, (batch_size, size, size, CHANNELS))
    labels = np.broadcast_to(disc[..., None], (batch_size, size, size, 1))
    return stacks.astype(np.float32), labels.astype(np.uint8)


def tensorflow_step(
    size: int,
    width: int,
    batch_size: int,
    loss_name: str = "cross_entropy",
    jit_compile: bool | None = None,
    channels_first: bool = False,
) -> tuple[Step, int]:
    """lvseg's own network and loss with TensorFlow's fused Adam as one tf.function, and how many parameters it has.

    Args:
        size: pixels of a side; width: filters of the first block; loss_name: one of `lvseg.losses.NAMES`.
        jit_compile: as tf.function takes it.
        channels_first: the convolutions get [batch, channels, rows, columns].
    """
    import keras
    import tensorflow as tf

    from lvseg import draws
    from lvseg.losses import loss_function
    from lvseg.models.unet import unet

    model = unet(size, CHANNELS, CLASSES, width, dropout=DROPOUT)
    logits = keras.Model(model.inputs, model.get_layer("logits").output)
    stacks, labels = (tf.constant(values) for values in made_up_batch(size, batch_size))
    if channels_first:
        logits, stacks = with_channels_first(logits), tf.transpose(stacks, [0, 3, 1, 2])
    variables = logits.trainable_variables
    first, second = ([tf.Variable(tf.zeros(variable.shape)) for variable in variables] for _ in range(2))
    count = tf.Variable(0.0)
    loss_of = loss_function(loss_name)
    seeds = draws.sample_seeds(0, draws.ELASTIC_STREAM, 0, tf.range(batch_size))

    @tf.function(jit_compile=jit_compile)
    def step(stacks: tf.Tensor, labels: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            found = logits([stacks, seeds], training=True)
            if channels_first:
                found = tf.transpose(found, [0, 2, 3, 1])
            loss = tf.reduce_sum(loss_of(found, labels)) / batch_size
        gradients = tape.gradient(loss, variables)
        count.assign_add(1.0)
        for variable, m, v, gradient in zip(variables, first, second, gradients, strict=True):
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle, m=m.handle, v=v.handle, beta1_power=0.9**count, beta2_power=0.999**count,
                lr=LEARNING_RATE, beta1=0.9, beta2=0.999, epsilon=1e-7, grad=gradient,
            )  # fmt: skip
        return loss

    return lambda: step(stacks, labels, seeds), model.count_params()


def with_channels_first(model: keras.Model) -> keras.Model:
    """The same layers and initial weights for [batch, channels, rows, columns]."""
    import keras

    _, height, width, channels = model.inputs[0].shape
    inputs = [keras.Input((channels, height, width), name="stacks"), keras.Input((2,), dtype="int64", name="seeds")]

    def turned(layer: keras.layers.Layer) -> keras.layers.Layer:
        config = layer.get_config()
        if "data_format" in config:
            config["data_format"] = "channels_first"
        if isinstance(layer, keras.layers.Concatenate):
            config["axis"] = 1
        return layer.__class__.from_config(config)

    copy = keras.models.clone_model(model, input_tensors=inputs, clone_function=turned)
    copy.set_weights(model.get_weights())
    return copy


def torch_step(size: int, width: int, batch_size: int) -> tuple[Step, int]:
    """The same network, channels last, with the fused Adam, and how many parameters it has."""
    import torch
    from torch import nn
    from torch.nn import functional

    widths = [width * 2**level for level in range(5)]

    def block(before: int, filters: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(before, filters, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(filters, filters, 3, padding=1),
            nn.ReLU(inplace=True),
        )

    class UNet(nn.Module):
        """`lvseg.models.unet.unet`, the base network, layer by layer."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.ModuleList(map(block, [CHANNELS, *widths[:-1]], widths))
            upwards = widths[::-1]
            self.up = nn.ModuleList(
                nn.ConvTranspose2d(deep, filters, 2, stride=2) for deep, filters in itertools.pairwise(upwards)
            )
            self.decoder = nn.ModuleList(block(2 * filters, filters) for filters in upwards[1:])
            self.logits = nn.Conv2d(width, CLASSES, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bridges = []
            for level, encode in enumerate(self.encoder):
                x = encode(functional.max_pool2d(x, 2) if level else x)
                if level >= len(widths) - 2:
                    x = functional.dropout(x, DROPOUT, self.training)
                bridges.append(x)
            bridges.pop()
            for up, decode in zip(self.up, self.decoder, strict=True):
                x = decode(torch.cat([bridges.pop(), up(x)], dim=1))
            return self.logits(x)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = UNet().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)
    stacks, labels = (torch.from_numpy(values).to(device) for values in made_up_batch(size, batch_size))
    stacks, classes = stacks.permute(0, 3, 1, 2), labels[..., 0].long()  # a view: channels last in memory

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(stacks), classes)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, sum(parameter.numel() for parameter in model.parameters())
