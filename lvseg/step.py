"""One training step, compiled: augmentation, gradient and update on every device, and what the log needs of it."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lvseg import augment, draws, intensity, losses, pipeline, render
from lvseg.config import Experiment
from lvseg.devices import Cluster
from lvseg.errors import InputError
from lvseg.models import vgg
from lvseg.models.unet import encoder_variables, unet
from lvseg.optimiser import Adam, learning_rate, tf_variable
from lvseg.pipeline import Samples

# Slices a batch of validation and serving; one fixed number, so nothing is traced twice.
INFER_SLICES = 8
SPATIAL = ("elastic", "flip", "rotate", "scale")


def network(experiment: Experiment, classes: int, offset: float, scale: float, precision: str) -> keras.Model:
    """The experiment's network, with weights drawn from its seed; it sees (intensity - offset) * scale."""
    data, model = experiment.data, experiment.model
    return unet(
        data.size, 2 * data.neighbours + 1, classes, model.width, model.encoder, model.residual, model.dropout,
        offset, scale, experiment.seed, encoder_input=model.encoder_input, precision=precision,
        norm=model.norm,
    )  # fmt: skip


class Step:
    """The network, its optimiser and everything else that a checkpoint holds; called with `Samples`, it trains a step.

    Args:
        experiment: the config; cluster: the devices; classes: with the background.
        dark, bright: intensities of the training patients that the network sees as about 0 and 1.
        known_weights: what the encoder of a run that goes on started from, which then need not be at hand.

    Raises:
        InputError: encoder weights that cannot be had; BAD_CONFIG for class weights of another number of classes.
    """

    def __init__(
        self,
        experiment: Experiment,
        cluster: Cluster,
        classes: int,
        dark: float,
        bright: float,
        known_weights: vgg.EncoderWeights | None = None,
    ) -> None:
        model, train = experiment.model, experiment.train
        if train.jit_compile and cluster.workers * cluster.replicas > 1:
            raise InputError(
                "BAD_CONFIG",
                "Expected train.jit_compile on one device, received it with"
                f" {cluster.workers * cluster.replicas}; set it to null.",
            )
        if train.class_weights is not None and len(train.class_weights) != classes:
            raise InputError(
                "BAD_CONFIG",
                f"Expected one of train.class_weights for each of the {classes} classes, the background first, received"
                f" {len(train.class_weights)}.",
            )
        self.experiment, self.cluster, self.dark, self.bright = experiment, cluster, dark, bright
        self.offset, self.scale = dark, 1.0 / (bright - dark)
        if model.encoder == "vgg11":  # the scale that its weights were trained on
            self.offset, self.scale = dark + vgg.IMAGENET_MEAN * (bright - dark), self.scale / vgg.IMAGENET_SD
        self._a_device = train.batch_size // (cluster.workers * cluster.replicas)
        with cluster.strategy.scope():
            self.model = network(experiment, classes, self.offset, self.scale, train.precision)
            self.encoder_weights = self._load_encoder(known_weights) if model.encoder else None
            self._logits = keras.Model(self.model.inputs, self.model.get_layer("logits").output)
            self._variables = self.model.trainable_variables
            encoder = {id(variable) for variable in encoder_variables(self.model)} if model.encoder else set()
            self.optimiser = Adam(
                self._variables,
                [model.freeze_encoder_steps if id(variable) in encoder else 0 for variable in self._variables],
                train.beta_1,
                train.beta_2,
                train.clip_norm,
                scales_loss=train.precision == "mixed_float16",
            )
            self.number = _state(0, tf.int64)  # steps done
            # Since the last reset: steps, loss, true positives, false positives, false negatives of the foreground.
            self.sums = _state([0.0] * 5, tf.float64)
            # The first step whose loss or gradients were not finite, or 0; and of its samples file, slice and whether
            # its loss was the one.
            self.bad_step = _state(0, tf.int64)
            self.bad_samples = _state([[0.0] * 3] * train.batch_size, tf.float64)
        self._loss = losses.loss_function(train.loss, train.class_weights, train.focal_gamma)
        settings = experiment.augment.model_dump()
        on_host = settings["elastic"] is not None and settings["elastic"]["where"] == "host"
        self._spatial = {
            name: settings[name] for name in SPATIAL if settings[name] and not (name == "elastic" and on_host)
        }
        self._intensity = {name: settings[name] for name in intensity.NAMES if settings[name]}
        self._contrast = settings["contrast"]
        # Compiled by XLA by themselves: on a GPU their indices otherwise visit the host; on a CPU it is faster.
        self.move = tf.function(self._move, autograph=False, jit_compile=True)
        change = self._change_each if draws.one_by_one() else self._change
        self.change = tf.function(change, autograph=False, jit_compile=True)
        self._infer = tf.function(self._classes, autograph=False)
        self._run = tf.function(self._on_all, autograph=False, reduce_retracing=True, jit_compile=train.jit_compile)

    def _load_encoder(self, known: vgg.EncoderWeights | None) -> vgg.EncoderWeights:
        try:
            return vgg.load_encoder(self.model, self.experiment.model.encoder_weights)
        except InputError as error:
            if known is None or error.code != "WEIGHTS_UNAVAILABLE":
                raise
            return known

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        # A list of variables, not the model, so that either Keras goes on from the other's checkpoints.
        weights = [tf_variable(variable) for variable in self.model.weights]
        return {"weights": weights, "step": self.number, "sums": self.sums, "optimiser": self.optimiser.state}

    def __call__(self, samples: Any) -> None:
        """Trains a step on this machine's part of a batch: `Samples`, or one such a device."""
        self._run(samples)

    def labels(self, volume: Samples) -> np.ndarray[Any, Any]:
        """What the network makes of all slices of a volume: uint8 [S, size, size] of classes.

        Args:
            volume: of `pipeline.volume_samples`.
        """
        count = volume.stack.shape[0]
        answers = []
        for first in range(0, count, INFER_SLICES):
            # The last batch is padded with the last slice: one shape of batch, so nothing is traced anew.
            chosen = np.minimum(np.arange(first, first + INFER_SLICES), count - 1)
            answers.append(self._infer(Samples(*(tf.gather(values, chosen) for values in volume))).numpy())
        return np.concatenate(answers)[:count]

    def _classes(self, samples: Samples) -> tf.Tensor:
        stacks = pipeline.intensities(samples, self.experiment.data.normalise)
        seeds = tf.zeros([tf.shape(stacks)[0], 2], tf.int64)
        return tf.cast(tf.argmax(self.model([stacks, seeds], training=False), axis=-1), tf.uint8)

    def rate(self, step: tf.Tensor) -> tf.Tensor:
        """The learning rate of a step, int64 scalar counted from 0: float32 scalar."""
        train = self.experiment.train
        return learning_rate(
            step, train.learning_rate, train.schedule, train.steps, train.warmup_steps,
            train.decay_steps, train.decay_factor,
        )  # fmt: skip

    def _on_all(self, samples: Any) -> None:
        self.cluster.strategy.run(self.on_device, args=(samples,))

    def on_device(self, samples: Samples) -> None:
        """One device's part of a step; every random number follows from a sample's place in the global batch."""
        train, context = self.experiment.train, tf.distribute.get_replica_context()
        first = context.replica_id_in_sync_group * self._a_device
        step = tf.convert_to_tensor(self.number)
        seeds = draws.sample_seeds(self.experiment.seed, draws.ELASTIC_STREAM, step, first + tf.range(self._a_device))
        if self._spatial:
            stack, mask, tissues = self.move(tf.cast(samples.stack, tf.float32), samples.mask, samples.tissues, seeds)
            samples = samples._replace(stack=stack, mask=mask, tissues=tissues)
        stacks = pipeline.intensities(samples, self.experiment.data.normalise)
        if self._intensity or self._contrast:
            stacks = self.change(stacks, samples.tissues, seeds)

        with tf.GradientTape() as tape:
            logits = self._logits([stacks, seeds], training=True)
            loss_of_sample = self._loss(logits, samples.mask, _over_devices)
            # Divided by the global batch, so that the number of devices does not change the step.
            loss = tf.reduce_sum(loss_of_sample) / train.batch_size
            scaled = self.optimiser.scaled(loss)
        gradients = tape.gradient(scaled, self._variables)
        predicted, true = tf.argmax(logits, axis=-1) > 0, samples.mask[..., 0] > 0
        counts = [tf.math.count_nonzero(a & b) for a, b in ((predicted, true), (predicted, ~true), (~predicted, true))]
        sums = tf.stack([tf.cast(part, tf.float64) for part in (loss, *counts)])
        bad = tf.cast(~tf.math.is_finite(loss_of_sample), tf.float64)[:, None]
        report = tf.concat([tf.cast(samples.source, tf.float64), bad], axis=1)
        report = tf.pad(report, [[first, train.batch_size - self._a_device - first], [0, 0]])
        gradients = _over_devices(gradients)
        sums, report = _over_devices([sums, report])  # of another dtype, which a reduction cannot mix

        losses_finite = tf.math.is_finite(sums[0])
        # float16's scale is lowered first; where it is 1, as it is in other precisions, nothing is left to lower.
        at_lowest = tf.convert_to_tensor(self.optimiser.loss_scale) <= 1.0
        gradients_finite = self.optimiser.apply(gradients, self.rate(step), step, losses_finite)
        went_well = losses_finite & (gradients_finite | ~at_lowest)
        is_first = ~went_well & (tf.convert_to_tensor(self.bad_step) == 0)
        self.bad_samples.assign(tf.where(is_first, report, tf.convert_to_tensor(self.bad_samples)))
        self.bad_step.assign(tf.where(is_first, step + 1, tf.convert_to_tensor(self.bad_step)))
        self.sums.assign_add(tf.concat([tf.ones([1], tf.float64), sums], axis=0))
        self.number.assign_add(1)

    def _move(
        self, stack: tf.Tensor, mask: tf.Tensor, tissues: tf.Tensor, seeds: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Spatial augmentation of stacks as they travel, channels first; XLA makes the turns part of what it reads."""
        labels = tf.concat([mask, tf.transpose(tissues, [0, 2, 3, 1])], axis=-1)
        images, spacing_mm = tf.transpose(stack, [0, 2, 3, 1]), self.experiment.data.spacing_mm
        moved, labels = augment.spatial(images, labels, seeds, self._spatial, spacing_mm)
        return tf.transpose(moved, [0, 3, 1, 2]), labels[..., :1], tf.transpose(labels[..., 1:], [0, 3, 1, 2])

    def _change(self, stacks: tf.Tensor, tissues: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
        """The sample's own contrast comes first, then what scanners do to any."""
        if self._contrast:
            maps = tf.transpose(tissues, [0, 2, 3, 1])
            stacks = render.contrast(
                stacks, maps, seeds, self._contrast["kind"], self._contrast["probability"], self.dark, self.bright,
                self._contrast["partial_volume"],
            )  # fmt: skip
        return intensity.intensity(stacks, seeds, self._intensity, self.dark, self.bright)

    def _change_each(self, stacks: tf.Tensor, tissues: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
        """Sample by sample, which leaves out what a sample does not undergo (`draws.where`)."""

        def of_one(sample: tuple[tf.Tensor, tf.Tensor, tf.Tensor]) -> tf.Tensor:
            return self._change(*(values[tf.newaxis] for values in sample))[0]

        changed = tf.TensorSpec(stacks.shape[1:], stacks.dtype)
        return tf.map_fn(of_one, (stacks, tissues, seeds), fn_output_signature=changed)


def _over_devices(values: Any) -> Any:
    """Adds tensors up over all devices, differentiably."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return values
    return context.all_reduce(tf.distribute.ReduceOp.SUM, values)


def _state(value: Any, dtype: tf.DType) -> tf.Variable:
    """A variable that all devices hold the same value of."""
    return tf.Variable(value, dtype=dtype, trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
