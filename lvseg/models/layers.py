"""Layers that the networks share, written for Keras 2.15 and Keras 3."""

from __future__ import annotations

import keras
import tensorflow as tf


class StatelessDropout(keras.layers.Layer):
    """Dropout whose mask depends on the sample's seeds and this layer alone, so a resumed run equals an unbroken one.

    Source: Srivastava et al., 2014 (inverted dropout: kept values are divided by 1 - rate).

    Args:
        rate: share of values set to zero, 0 <= rate < 1.
        stream: added to the seeds' stream; tells this layer's random numbers from other layers'.

    Call arguments:
        inputs: float [B, H, W, C]; seeds: int64 [B, 2], two numbers a sample as `draws.sample_seeds` makes them.
    """

    def __init__(self, rate: float, stream: int, **keywords: object) -> None:
        super().__init__(**keywords)
        self.rate = rate
        self.stream = stream

    def call(self, inputs: tf.Tensor, seeds: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training or self.rate == 0:
            return inputs
        own_seeds = seeds + tf.constant([self.stream, 0], tf.int64)
        shape = tf.shape(inputs)[1:]

        def keep(seed: tf.Tensor) -> tf.Tensor:
            # Whole bits, which are the same in every kernel; TensorFlow's uniform floats differ between them.
            bits = tf.random.stateless_uniform(shape, seed, None, None, tf.uint32, alg="philox")
            return bits >= tf.constant(round(self.rate * 2**32), tf.uint32)

        kept = tf.map_fn(keep, own_seeds, fn_output_signature=tf.bool)
        return tf.where(kept, inputs / (1 - self.rate), tf.zeros_like(inputs))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape

    def get_config(self) -> dict[str, object]:
        return {**super().get_config(), "rate": self.rate, "stream": self.stream}


class InstanceNormalization(keras.layers.Layer):
    """Normalises every channel of every sample over its slice, then scales and shifts it by learned numbers.

    Source: Ulyanov et al., 2016. Keras's GroupNormalization computes the same in many more operations, which make up
    most of an exported network's graph.

    Args:
        epsilon: added to the variance.

    Call arguments:
        inputs: float [B, H, W, C].
    """

    def __init__(self, epsilon: float = 1e-5, **keywords: object) -> None:
        super().__init__(**keywords)
        self.epsilon = epsilon

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.gamma = self.add_weight(name="gamma", shape=input_shape[-1:], initializer="ones")
        self.beta = self.add_weight(name="beta", shape=input_shape[-1:], initializer="zeros")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        # In float32 whatever the precision: half precision has too few digits for sums over a slice.
        values = tf.cast(inputs, tf.float32)
        mean, variance = tf.nn.moments(values, [1, 2], keepdims=True)
        gamma, beta = (tf.cast(weights, tf.float32) for weights in (self.gamma, self.beta))
        normalised = tf.nn.batch_normalization(values, mean, variance, beta, gamma, self.epsilon)
        return tf.cast(normalised, inputs.dtype)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape

    def get_config(self) -> dict[str, object]:
        return {**super().get_config(), "epsilon": self.epsilon}
