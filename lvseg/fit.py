"""The training loop: one compiled step, checkpoints, validation by patient, and what TensorBoard shows of it."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lvseg import augment, command, export, figures, metrics, pipeline
from lvseg.config import Experiment
from lvseg.losses import LOSSES
from lvseg.models import vgg
from lvseg.models.unet import unet
from lvseg.pipeline import Samples
from lvseg.prepare import ShardSet
from lvseg.split import Split

LOG_EVERY = 25
OVERLAYS = 4
# Slices a batch of validation and serving; one fixed number, so nothing is traced twice.
INFER_SLICES = 8
METRICS = ("step", "loss", "dice", "validation_dice", "learning_rate", "input_wait_share", "seconds")


class Fit:
    """One fold's training, from its last checkpoint on.

    Args:
        experiment: the config; sets: the shards; split: the patients; run: the run folder.

    Raises:
        InputError: weights that cannot be had.
    """

    def __init__(self, experiment: Experiment, sets: list[ShardSet], split: Split, run: Path) -> None:
        data, train = experiment.data, experiment.train
        if train.deterministic:
            tf.config.experimental.enable_op_determinism()
        self.experiment, self.run_folder = experiment, run
        self.classes = sets[0].card.classes
        self.files = [file for shards in sets for file in shards.files(split.train)]
        self.slices = sum(row["shape"][0] for shards in sets for row in shards.rows if row["patient"] in split.train)
        self.validation = [
            (row, shards.folder / row["file"])
            for shards in sets
            for row in shards.rows
            if row["patient"] in split.validation
        ]
        bounds, scaled = pipeline.training_bounds(self.files, data.size, data.clip_percentiles)
        self.global_bounds = bounds if data.normalise == "global" else None
        self.reading = pipeline.Reading(
            data.size, data.neighbours, data.normalise, data.clip_percentiles, self.global_bounds
        )
        low, high = scaled if data.normalise == "none" else (0.0, 1.0)
        offset, scale = low, 1.0 / (high - low)
        if experiment.model.encoder == "vgg11":
            offset, scale = low + vgg.IMAGENET_MEAN * (high - low), scale / vgg.IMAGENET_SD
        self.input_scaling = {"offset": offset, "scale": scale}

        model = experiment.model
        self.model = unet(
            data.size, 2 * data.neighbours + 1, len(self.classes), model.width, model.encoder, model.residual,
            model.dropout, offset, scale, experiment.seed,
        )  # fmt: skip
        self.logits = keras.Model(self.model.inputs, self.model.get_layer("logits").output)
        self.encoder_weights_sha256 = vgg.load_encoder(self.model, model.encoder_weights) if model.encoder else None
        self.optimizer = keras.optimizers.Adam(self._schedule(), beta_1=train.beta_1, beta_2=train.beta_2)
        self.optimizer.build(self.model.trainable_variables)
        self.step = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.best_dice = tf.Variable(-1.0, dtype=tf.float64, trainable=False)
        # Since the last log: steps, loss, true positives, false positives, false negatives of the foreground.
        self.sums = tf.Variable(tf.zeros([5], tf.float64), trainable=False)
        self.checkpoint = tf.train.Checkpoint(
            model=self.model, optimizer=self.optimizer, step=self.step, best_dice=self.best_dice, sums=self.sums
        )
        self.manager = tf.train.CheckpointManager(self.checkpoint, str(run / "checkpoints"), max_to_keep=2)
        if self.manager.latest_checkpoint:
            self.checkpoint.restore(self.manager.latest_checkpoint).assert_consumed()
            print(f"going on from step {int(self.step)} ({self.manager.latest_checkpoint})")
        self.train_step = tf.function(self._train_step, reduce_retracing=True)
        self.infer = tf.function(self._infer)
        # Compiled by XLA by itself: on a GPU its index arithmetic otherwise visits the host; on a CPU it is faster so.
        self.elastic = tf.function(_elastic, jit_compile=True)

    @property
    def best_weights(self) -> Path:
        """The weights with the best validation Dice so far."""
        return self.run_folder / "checkpoints" / "best.npz"

    def run(self) -> None:
        """Trains to the last step; asked to stop, it finishes the step at hand, saves a checkpoint and interrupts."""
        train, first = self.experiment.train, int(self.step)
        if first >= train.steps:
            return
        rows = [row for row in self._read_metrics() if int(row["step"]) <= first]
        writer = tf.summary.create_file_writer(str(self.run_folder / "logs"))
        batches = iter(self._batches(first))
        started = time.monotonic()
        waited, since = 0.0, started
        with command.stop_requests() as stop_requested, writer.as_default():
            for number in command.progress(range(first + 1, train.steps + 1), "training"):
                before = time.monotonic()
                samples = next(batches)
                waited += time.monotonic() - before
                self.train_step(samples)
                validates = number % train.validate_every == 0 or number == train.steps
                if validates or number % LOG_EVERY == 0:
                    row = self._scalars(number, waited / (time.monotonic() - since))
                    if validates:
                        row["validation_dice"] = self._validate(number)
                        row["seconds"] = round(time.monotonic() - started, 1)
                        rows.append(row)
                        self._write_metrics(rows)
                        self._say(row)
                    self.sums.assign(tf.zeros_like(self.sums))
                    waited, since = 0.0, time.monotonic()
                stops = stop_requested()
                if stops or number % train.checkpoint_every == 0 or number == train.steps:
                    self.manager.save(checkpoint_number=number)
                if stops:
                    print(f"stopped at step {number}; the same command goes on from there.")
                    raise KeyboardInterrupt

    def export(self, folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
        """Exports the weights with the best validation Dice; returns the model card."""
        with np.load(self.best_weights) as arrays:
            self.model.set_weights([arrays[name] for name in sorted(arrays.files)])
        data = self.experiment.data
        card = {
            "task": self.experiment.task,
            "name": self.experiment.name,
            "labels": self.classes,
            "axis": data.axis,
            "spacing_mm": list(data.spacing_mm),
            "size": data.size,
            "neighbours": data.neighbours,
            "normalisation": data.normalise,
            "clip_percentiles": data.clip_percentiles,
            "global_bounds": self.global_bounds,
            "input_scaling": self.input_scaling,
            "batch_size": INFER_SLICES,
            "units": {"spacing_mm": "mm", "volume_ml": "ml"},
            "measured": {"validation_dice": float(self.best_dice), "validation_patients": len(self.validation)},
            "provenance": manifest,
        }
        return export.export_model(self.model, card, folder)

    def _schedule(self) -> Any:
        train = self.experiment.train
        if train.schedule == "cosine":
            return keras.optimizers.schedules.CosineDecay(train.learning_rate, train.steps)
        return train.learning_rate

    def _batches(self, step: int) -> tf.data.Dataset:
        data, elastic = self.experiment.data, self.experiment.augment.elastic
        deform = None
        if elastic is not None and elastic.where == "host":

            def deform(stack: tf.Tensor, mask: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                return augment.elastic_host(stack, mask, seed, elastic.sigma_px, elastic.grid)

        return pipeline.training_batches(
            self.files, self.slices, self.reading, self.experiment.seed, self.experiment.train.batch_size,
            data.shuffle_slices, step, deform,
        )  # fmt: skip

    def _train_step(self, samples: Samples) -> None:
        """One step: augmentation, gradient, update, and the sums for the log."""
        train, elastic = self.experiment.train, self.experiment.augment.elastic
        seeds = augment.sample_seeds(
            self.experiment.seed, augment.ELASTIC_STREAM, self.step, tf.range(train.batch_size)
        )
        if elastic is not None and elastic.where == "device":
            stack, mask = self.elastic(
                tf.cast(samples.stack, tf.float32), samples.mask, seeds, elastic.sigma_px, elastic.grid
            )
            samples = samples._replace(stack=stack, mask=mask)
        stacks = pipeline.intensities(samples, self.experiment.data.normalise)
        with tf.GradientTape() as tape:
            logits = self.logits([stacks, seeds], training=True)
            # Divided by the global batch, so that the number of devices does not change the step.
            loss = tf.reduce_sum(LOSSES[train.loss](logits, samples.mask)) / train.batch_size
        gradients = tape.gradient(loss, self.model.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.model.trainable_variables, strict=True))
        self.step.assign_add(1)
        predicted = tf.argmax(logits, axis=-1) > 0
        true = samples.mask[..., 0] > 0
        counts = [tf.math.count_nonzero(a & b) for a, b in ((predicted, true), (predicted, ~true), (~predicted, true))]
        self.sums.assign_add(tf.stack([tf.cast(part, tf.float64) for part in (1.0, loss, *counts)]))

    def _say(self, row: dict[str, Any]) -> None:
        print(
            f"step {row['step']} of {self.experiment.train.steps}: loss {row['loss']:.4f}, Dice {row['dice']:.3f},"
            f" validation Dice {row['validation_dice']:.4f} (best {float(self.best_dice):.4f}), {row['seconds']:.0f} s",
            flush=True,
        )

    def _scalars(self, number: int, wait_share: float) -> dict[str, Any]:
        """Writes the averages since the last call to TensorBoard and returns them."""
        steps, loss, positives, wrong, missed = self.sums.numpy()
        total = 2 * positives + wrong + missed
        row = {
            "step": number,
            "loss": loss / steps,
            "dice": 2 * positives / total if total else 1.0,
            "learning_rate": float(tf.convert_to_tensor(self.optimizer.learning_rate)),
            "input_wait_share": wait_share,
        }
        for name, tag in (
            ("loss", "loss/training"),
            ("dice", "dice/training"),
            ("learning_rate", "learning_rate"),
            ("input_wait_share", "input_wait_share"),
        ):
            tf.summary.scalar(tag, row[name], step=number)
        if not np.isfinite(row["loss"]):
            raise FloatingPointError(f"The loss is {row['loss']} by step {number}; lower train.learning_rate.")
        return row

    def _infer(self, samples: Samples) -> tf.Tensor:
        stacks = pipeline.intensities(samples, self.experiment.data.normalise)
        seeds = tf.zeros([tf.shape(stacks)[0], 2], tf.int64)
        return tf.cast(tf.argmax(self.model([stacks, seeds], training=False), axis=-1), tf.uint8)

    def _validate(self, number: int) -> float:
        """Mean over patients of the foreground's Dice on the harmonised grid; keeps the weights if it is the best."""
        scores: list[float] = []
        # The same patients every time, spread over the datasets, so that every scanner is seen.
        shown = set(np.linspace(0, len(self.validation) - 1, OVERLAYS).round().astype(int).tolist())
        for place, (row, file) in enumerate(self.validation):
            (volume,) = pipeline.volume_samples(tf.constant(str(file)), self.reading)
            predicted = np.concatenate([self.infer(part).numpy() for part in _parts(volume)])[: len(volume.stack)]
            true = volume.mask.numpy()[..., 0]
            scores.append(float(np.mean([metrics.dice(predicted, true, c) for c in range(1, len(self.classes))])))
            if place in shown:
                largest = int(np.argmax(np.count_nonzero(true, axis=(1, 2))))
                grey = volume.stack[largest, self.reading.neighbours].numpy()
                picture = figures.overlay_rgb(grey, predicted[largest] > 0, true[largest] > 0)
                tf.summary.image(f"validation/{row['patient']} {row['scanner']}", picture[None], step=number)
        dice = float(np.mean(scores))
        tf.summary.scalar("dice/validation", dice, step=number)
        if dice > float(self.best_dice):
            arrays = {f"{index:04d}": value for index, value in enumerate(self.model.get_weights())}
            with command.atomic(self.best_weights) as temporary:
                np.savez(temporary, **arrays)
            self.best_dice.assign(dice)  # after the weights: a score without its weights could not be exported
        return dice

    def _read_metrics(self) -> list[dict[str, Any]]:
        path = self.run_folder / "metrics.csv"
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _write_metrics(self, rows: list[dict[str, Any]]) -> None:
        with (
            command.atomic(self.run_folder / "metrics.csv") as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            table = csv.DictWriter(file, METRICS)
            table.writeheader()
            table.writerows(rows)


def _elastic(
    stack: tf.Tensor, mask: tf.Tensor, seeds: tf.Tensor, sigma_px: float, grid: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """`augment.elastic` of stacks as they travel, channels first; XLA makes the two turns part of what it reads."""
    moved, mask = augment.elastic(tf.transpose(stack, [0, 2, 3, 1]), mask, seeds, sigma_px, grid)
    return tf.transpose(moved, [0, 3, 1, 2]), mask


def _parts(volume: Samples) -> Iterator[Samples]:
    """A volume's samples in batches of INFER_SLICES, the last one padded with the last slice."""
    count = volume.stack.shape[0]
    for first in range(0, count, INFER_SLICES):
        chosen = np.minimum(np.arange(first, first + INFER_SLICES), count - 1)
        yield Samples(*(tf.gather(values, chosen) for values in volume))
