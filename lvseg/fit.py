"""The training loop: batches to the compiled step, checkpoints, validation by patient, and the log."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from lvseg import augment, command, export, metrics, overlays, pipeline
from lvseg.board import Board
from lvseg.config import Experiment
from lvseg.devices import Cluster
from lvseg.errors import InputError, RunError
from lvseg.keys import digest, read_json
from lvseg.models.vgg import EncoderWeights
from lvseg.pipeline import Samples
from lvseg.predict import newest_version
from lvseg.prepare import ShardSet
from lvseg.split import Split, scans_seen_by, seen_by, sources_of
from lvseg.step import INFER_SLICES, Step, network

LOG_EVERY = 25
AGREE_EVERY = 5  # steps; a step may take seconds, and SLURM kills half a minute after it asks
OVERLAYS = 4
METRICS = (
    "step", "loss", "dice", "validation_dice", "validation_volume_error_percent", "validation_fat_error_points",
    "learning_rate", "input_wait_share", "step_seconds", "seconds",
)  # fmt: skip


def is_started(run: Path) -> bool:
    """Whether a run folder has a checkpoint to go on from; until then another config may replace the first."""
    return (run / "config.yaml").is_file() and (run / "checkpoints" / "checkpoint").is_file()


def _state_of(file: Path) -> tuple[int, int, int] | None:
    """What changes where a file is replaced or written to; None where there is none."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def mean_over_patients(scores: np.ndarray[Any, Any], patients: Iterable[Sequence[int]]) -> float:
    """The mean of a number a scan, each patient's scans counting as one; NaN, which a scan may be, counts in none.

    Args:
        scores: float64 [scans]; patients: of each the places of the scans.
    """
    known = [scores[places][~np.isnan(scores[places])] for places in patients]
    means = [float(np.mean(own)) for own in known if own.size]
    return float(np.mean(means)) if means else math.nan


class Fit:
    """One fold's training, from its last checkpoint on.

    Args:
        experiment: the config; sets: the shards; split: the patients; run: the run folder; cluster: the devices.

    Raises:
        InputError: weights that cannot be had; BAD_CHECKPOINT.
    """

    def __init__(self, experiment: Experiment, sets: list[ShardSet], split: Split, run: Path, cluster: Cluster) -> None:
        data, train = experiment.data, experiment.train
        if train.deterministic:
            tf.config.experimental.enable_op_determinism()
        self.experiment, self.run_folder, self.cluster = experiment, run, cluster
        self.classes = sets[0].card.classes
        rows = [(row, shards.folder / row["file"]) for shards in sets for row in shards.rows]
        self.training = [(row, file) for row, file in rows if row["patient"] in split.train]
        self.validation = [(row, file) for row, file in rows if row["patient"] in split.validation]
        self.files = [file for _, file in self.training]
        self._read_from = {file: _state_of(file) for _, file in (*self.training, *self.validation)}
        self.slices = sum(row["shape"][0] for row, _ in self.training)
        bounds, scaled = pipeline.training_bounds(self.files, data.size, data.clip_percentiles, split.train)
        self.global_bounds = bounds if data.normalise == "global" else None
        self.reading = pipeline.Reading(
            data.size, data.neighbours, data.normalise, data.clip_percentiles, self.global_bounds,
            (*split.train, *split.validation),
        )  # fmt: skip
        self._rendered = experiment.augment.contrast is not None
        if self._rendered and not any(shards.card.tissues for shards in sets):
            raise InputError(
                "BAD_CONFIG",
                "Expected a map of tissues in at least one of data.datasets for augment.contrast, received cards"
                f" without `tissues`: {', '.join(shards.card.name for shards in sets)}.",
            )
        if data.normalise == "none" and not scaled[0] < scaled[1]:
            raise InputError(
                "BAD_SCANS",
                f"Expected training scans of more than one intensity, received {scaled[0]:g} for both their 0.5th and"
                " 99.5th percentiles (medians); look at the page that lvseg.prepare writes, or set data.normalise.",
            )
        self._check_bounds()
        # What a checkpoint goes on from, it holds: the encoder's first weights need not be at hand any more.
        manifest = read_json(run / "manifest.json") if is_started(run) else {}
        known = manifest.get("encoder_weights")
        dark, bright = scaled if data.normalise == "none" else (0.0, 1.0)
        self.step = Step(experiment, cluster, len(self.classes), dark, bright, known and EncoderWeights(**known))
        self.best_dice = tf.Variable(-1.0, dtype=tf.float64, trainable=False)
        self.best_step = tf.Variable(0, dtype=tf.int64, trainable=False)
        # What early stopping wants beaten by min_delta, and how often it was not.
        self.to_beat = tf.Variable(-1.0, dtype=tf.float64, trainable=False)
        self.validations_since = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.checkpoint = tf.train.Checkpoint(
            **self.step.state,
            best_dice=self.best_dice,
            best_step=self.best_step,
            to_beat=self.to_beat,
            validations_since=self.validations_since,
        )
        self.manager = tf.train.CheckpointManager(self.checkpoint, str(run / "checkpoints"), max_to_keep=2)
        if is_started(run) and "split" not in (manifest.get("started_from") or {"split": None}):
            raise InputError(  # now, not when all is trained and is to be measured
                "BAD_CHECKPOINT",
                f"Expected a run that kept whom the model it began with had seen, received one of an earlier version in"
                f" {run}; give the experiment another name.",
            )
        self._restore()
        self.started_from = self._start_from() if not is_started(run) else manifest.get("started_from")
        self._agree()

    @property
    def first_step(self) -> int:
        """How many steps are done."""
        return int(self.step.number.numpy())

    @property
    def best_weights(self) -> Path:
        """The weights with the best validation Dice that the last checkpoint knows of."""
        return self.run_folder / "checkpoints" / f"best-{int(self.best_step)}.npz"

    def run(self) -> None:
        """Trains to the last step; asked to stop, it finishes the step at hand, saves a checkpoint and interrupts.

        A validation is not waited for then: who asks often kills half a minute later. It is the first that is done when
        the run goes on; several machines, none of which can leave a validation alone, decide before one begins.

        Raises:
            FloatingPointError: for a loss or gradients that are not finite, naming the step and its slices.
            InputError: BAD_RUN for a metrics.csv that training did not write.
            RunError: for a shard that was changed meanwhile, or a checkpoint that cannot be written.
        """
        train, first = self.experiment.train, int(self.step.number.numpy())
        left_over = self._lacks_validation(first)
        if not left_over and (first >= train.steps or self._stopped_early()):
            return
        new_from = first + (not left_over)  # of what was logged; a killed run may have come further than its checkpoint
        rows = [row for row in self._read_metrics() if int(row["step"]) < new_from]
        board = Board(self.run_folder / "logs" if self.cluster.is_chief else None, train.profile_steps, new_from)
        started = time.monotonic()
        with command.stop_requests() as stop_requested, contextlib.closing(board):
            if left_over:
                # Nothing is saved before the next checkpoint is due: the listed one of this step is never written over.
                done = self._validate_and_log(self._averages(first), rows, board, started, stop_requested)
                ends = first >= train.steps or self._stopped_early()
                if done and ends:
                    self._check_shards()
                    self._conclude(first, board)
                if not done or (ends and self._asked_alone(stop_requested)):
                    raise KeyboardInterrupt
                if ends:
                    return
            batches = self._read(self._distributed(first))
            waited, since, steps = 0.0, time.monotonic(), 0
            for number in command.progress(range(first + 1, train.steps + 1), "training"):
                board.before_step(number)
                before = time.monotonic()
                samples = next(batches)
                waited += time.monotonic() - before
                self.step(samples)
                board.after_step(number, self.step.sums.numpy)
                steps += 1
                validates = number % train.validate_every == 0 or number == train.steps
                saves = number % train.checkpoint_every == 0 or number == train.steps
                stops = self._stops(number, stop_requested)
                if validates or saves or stops or number % LOG_EVERY == 0:
                    self._check_finite()
                left_out = validates and stops
                if (validates or number % LOG_EVERY == 0) and not left_out:
                    row = self._averages(number)
                    seconds = time.monotonic() - since
                    row |= {"input_wait_share": waited / seconds, "step_seconds": seconds / steps}
                    if validates:
                        left_out = not self._validate_and_log(row, rows, board, started, stop_requested)
                    else:
                        self._log(row, board)
                    waited, since, steps = 0.0, time.monotonic(), 0
                stops = stops or left_out
                ends = validates and not left_out and (number == train.steps or self._stopped_early())
                if saves or stops or ends:
                    self._check_shards()
                if ends:  # before the last checkpoint, after which nothing is repeated
                    self._conclude(number, board)
                if (saves or stops or ends) and self.cluster.is_chief:
                    self._save(number)
                if stops:
                    print(f"stopped at step {number}; the same command goes on from there.")
                    raise KeyboardInterrupt
                if ends:
                    break
            if self._asked_alone(stop_requested):  # it came after the last validation
                raise KeyboardInterrupt

    def _lacks_validation(self, step: int) -> bool:
        """Whether a checkpoint was saved without the validation of its step, after which no sums are left."""
        train = self.experiment.train
        due = step > 0 and (step % train.validate_every == 0 or step == train.steps)
        return due and bool(self.step.sums.numpy()[0])

    def _validate_and_log(
        self,
        row: dict[str, Any],
        rows: list[dict[str, Any]],
        board: Board,
        started: float,
        stop_requested: Callable[[], bool],
    ) -> bool:
        """Validates and writes a row of metrics; False if asked to stop before that was done, and nothing changed."""
        found = self._validate(row["step"], board, lambda: self._asked_alone(stop_requested))
        if found is None:
            return False
        row |= {**found, "seconds": round(time.monotonic() - started, 1)}
        rows.append({name: row.get(name) for name in METRICS})
        if self.cluster.is_chief:
            self._write_metrics(rows)
            self._say(row)
        self._log(row, board)
        return True

    def _log(self, row: dict[str, Any], board: Board) -> None:
        board.scalars(row)
        self.step.sums.assign(tf.zeros_like(self.step.sums))

    def _conclude(self, number: int, board: Board) -> None:
        """Notes what the hyperparameters led to, once the last validation is done."""
        train = self.experiment.train
        board.hyperparameters(self.experiment.model_dump(), float(self.best_dice))
        if self._stopped_early():
            patience = train.early_stopping.patience if train.early_stopping else 0
            print(f"stopped early at step {number}: {patience} validations without a better Dice.")

    def export(self, folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
        """Exports the weights with the best validation Dice, in float32; returns the model card."""
        data, step = self.experiment.data, self.step
        model = network(self.experiment, len(self.classes), step.offset, step.scale, "float32")
        with np.load(self.best_weights) as arrays:
            model.set_weights([arrays[name] for name in sorted(arrays.files)])
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
            "ct_window_hu": data.ct_window_hu,
            "global_bounds": self.global_bounds,
            "input_scaling": {"offset": step.offset, "scale": step.scale, "dark": step.dark, "bright": step.bright},
            "batch_size": INFER_SLICES,
            "units": {"spacing_mm": "mm", "volume_ml": "ml"},
            "measured": {"validation_dice": float(self.best_dice), "validation_patients": len(self._patients())},
            "experiment": self.experiment.model_dump(),
            "provenance": manifest,
        }
        return export.export_model(model, card, folder)

    def _check_bounds(self) -> None:
        """InputError BAD_SCANS for a scan of which data.clip_percentiles leave one intensity, such as padding."""
        if self.reading.clip_percentiles is None:
            return  # preparation refuses scans of one value
        read = [*self.training, *self.validation]
        for (row, file), blank in zip(read, pipeline.are_blank([file for _, file in read], self.reading), strict=True):
            if blank:
                low, high = self.reading.clip_percentiles
                raise InputError(
                    "BAD_SCANS",
                    f"Expected data.clip_percentiles that differ in every scan, received one intensity for the"
                    f" {low:g}th and the {high:g}th of patient {row['patient']}, study {row['study']} ({file}).",
                )

    def _restore(self) -> None:
        path = self.manager.latest_checkpoint
        if not path:
            state = self.run_folder / "checkpoints" / "checkpoint"
            if state.is_file():  # TensorFlow takes one that it cannot read for none
                raise InputError("BAD_CHECKPOINT", f"Expected the list of checkpoints, received other text in {state}.")
            return
        try:
            self.checkpoint.restore(path).assert_consumed()
        except (AssertionError, LookupError, ValueError, tf.errors.OpError) as error:
            raise InputError(
                "BAD_CHECKPOINT",
                f"Expected a checkpoint of this version, received one that is damaged or does not fit in {path};"
                " delete the run folder, or give the experiment another name.",
            ) from error
        if self.cluster.is_chief:
            print(f"going on from step {int(self.step.number.numpy())} ({path})")

    def _start_from(self) -> dict[str, Any] | None:
        """Takes the weights of the model that the experiment starts from, and returns which they are."""
        named = self.experiment.model.start_from
        if named is None:
            return None
        folder = newest_version(Path(named))
        info = read_json(folder / "model.json")
        # Classes in another order have weights of the same shapes, and slices along another axis any.
        asked = {"task": self.experiment.task, "labels": self.classes, "axis": self.experiment.data.axis}
        if others := [key for key, value in asked.items() if info.get(key) != value]:
            raise InputError(
                "BAD_CONFIG",
                f"Expected a model of {' and '.join(f'{key} {asked[key]}' for key in others)} in model.start_from,"
                f" received {' and '.join(f'{key} {info.get(key)}' for key in others)} in {folder / 'model.json'}.",
            )
        weights, own = export.weights(folder), self.step.model.get_weights()
        if [array.shape for array in weights] != [array.shape for array in own]:
            raise InputError(
                "BAD_CONFIG",
                f"Expected the same network in model.start_from as in model, received another in {folder}.",
            )
        self.step.model.set_weights(weights)
        seen = {part: sorted(seen_by(info, folder, part)) for part in ("train", "validation")}
        which = {key: info.get(key) for key in ("name", "weights_sha256")}
        scans = {part: sorted(scans_seen_by(info, part)) for part in ("train", "validation")}
        return {**which, "split": seen, "scans_sha256": scans, "datasets": sources_of(info)}

    def _agree(self) -> None:
        """InputError BAD_CLUSTER if several machines are not about to do the same: another config, step or folder."""
        own = np.array([float(self.step.number.numpy()), float(int(digest(self.experiment.model_dump())[:12], 16))])
        if not np.allclose(self._over_machines(own), own * self.cluster.workers, rtol=1e-14, atol=0):
            raise InputError(
                "BAD_CLUSTER",
                "Expected every machine to run the same experiment from the same checkpoint, received others; start all"
                f" with one command on folders they share ({self.run_folder} here), and single runs without TF_CONFIG"
                " or as SLURM steps of one task.",
            )

    def _batches(self, step: int) -> tf.data.Dataset:
        data, elastic = self.experiment.data, self.experiment.augment.elastic
        deform = None
        if elastic is not None and elastic.where == "host":

            def deform(stack: tf.Tensor, mask: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                return augment.elastic_host(stack, mask, seed, elastic.sigma_px, elastic.grid)

        share = pipeline.Share(self.cluster.worker, self.cluster.workers, self.cluster.replicas)
        return pipeline.training_batches(
            self.files, self.slices, self.reading._replace(tissues=self._rendered), self.experiment.seed,
            self.experiment.train.batch_size, data.shuffle_slices, step, deform, share,
        )  # fmt: skip

    def _distributed(self, step: int) -> Iterator[Any]:
        """What each step takes: a batch, or one a device of this machine."""
        if self.cluster.strategy.num_replicas_in_sync == 1:
            return iter(self._batches(step))
        strategy = self.cluster.strategy
        return iter(strategy.distribute_datasets_from_function(lambda _: self._batches(step)))

    def _stops(self, number: int, requested: Callable[[], bool]) -> bool:
        """Whether to stop after this step; several machines agree on it now and then, since none can go on alone."""
        if self.cluster.workers == 1:
            return requested()
        agrees = number % AGREE_EVERY == 0 or number == self.experiment.train.steps
        return agrees and self._over_machines(np.array([float(requested())]))[0] > 0

    def _asked_alone(self, requested: Callable[[], bool]) -> bool:
        """Whether to stop amid what several machines do together, which one of them cannot leave."""
        return self.cluster.workers == 1 and requested()

    def _over_machines(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Sum of every machine's numbers, float64 [N]."""
        if self.cluster.workers == 1:
            return values
        # Each device brings the same, so the machine's share is divided among them.
        share = tf.constant(values / self.cluster.replicas, tf.float64)
        total = self._total(share)
        return np.asarray(self.cluster.strategy.experimental_local_results(total)[0])

    @tf.function(autograph=False, reduce_retracing=True)
    def _total(self, values: tf.Tensor) -> Any:
        def reduced(own: tf.Tensor) -> tf.Tensor:
            return tf.distribute.get_replica_context().all_reduce(
                tf.distribute.ReduceOp.SUM, tf.identity(own)
            )  # which puts it on a device

        return self.cluster.strategy.run(reduced, args=(values,))

    def _check_finite(self) -> None:
        """FloatingPointError if a step since the last check had a loss or gradients that were not finite."""
        step = int(self.step.bad_step.numpy())
        if not step:
            return
        samples = self.step.bad_samples.numpy()
        bad = samples[samples[:, 2] > 0]
        named = []
        for file, own, _ in (bad if len(bad) else samples).astype(int):
            row = self.training[file][0]
            study = f" study {row['study']}" if row["study"] else ""
            # Counted as people and viewers do, and as the overlays of a report are.
            named.append(f"slice {own + 1} of {row['shape'][0]} of patient {row['patient']}{study}")
        what = "a loss that is" if len(bad) else "gradients that are"
        raise FloatingPointError(
            f"Expected finite numbers, received {what} not finite at step {step} ({', '.join(named)});"
            " look at those scans, lower train.learning_rate or set train.clip_norm."
        )

    def _read(self, samples: Iterable[Any]) -> Iterator[Any]:
        """What is read of shards; RunError where one of them was changed meanwhile and cannot be read."""
        try:
            yield from samples
        except tf.errors.OpError:
            self._check_shards()
            raise

    def _check_shards(self) -> None:
        """RunError if a shard is no longer the one that the manifest has the hash of: every epoch opens them anew."""
        for row, file in (*self.training, *self.validation):
            state = _state_of(file)
            if state == self._read_from[file]:
                continue
            if state is None or hashlib.sha256(file.read_bytes()).hexdigest() != row["shard_sha256"]:
                raise RunError(
                    "Expected shards that stay as they are while a run trains on them, received"
                    f" {'none' if state is None else 'another'} at {file} than when it began; no checkpoint was written"
                    " since; put its scan back as it was and give the same command, or the experiment another name."
                )
            self._read_from[file] = state  # made anew of the same scan

    def _say(self, row: dict[str, Any]) -> None:
        print(
            f"step {row['step']} of {self.experiment.train.steps}: loss {row['loss']:.4f}, Dice {row['dice']:.3f},"
            f" validation Dice {row['validation_dice']:.4f} (best {float(self.best_dice):.4f}), {row['seconds']:.0f} s",
            flush=True,
        )

    def _averages(self, number: int) -> dict[str, Any]:
        """The averages since they were last reset."""
        steps, loss, positives, wrong, missed = self.step.sums.numpy()
        total = 2 * positives + wrong + missed
        row = {
            "step": number,
            "loss": loss / steps,
            "dice": 2 * positives / total if total else 1.0,
            "learning_rate": float(self.step.rate(tf.constant(number - 1, tf.int64))),
        }
        if self.experiment.train.precision == "mixed_float16":
            row["loss_scale"] = float(self.step.optimiser.loss_scale.numpy())
        return row

    def _validate(
        self, number: int, board: Board, stops: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Means over patients on the harmonised grid; keeps the weights if their Dice is the best so far.

        Args:
            number: of the step; board: for pictures; stops: asked before every scan; True ends it without a trace.

        Returns:
            None if it was ended, otherwise
            validation_dice, of the foreground's classes; validation_volume_error_percent, absolute, of the first class;
            validation_fat_error_points, absolute, of its mean fat fraction where that is the task, over the patients
            who have one.
        """
        # The same patients every time, spread over the datasets, so that every scanner is seen.
        shown = set(np.linspace(0, len(self.validation) - 1, OVERLAYS * self.cluster.is_chief).round().astype(int))
        own = set(range(self.cluster.worker, len(self.validation), self.cluster.workers))
        scores = np.zeros((3, len(self.validation)))
        pictures = {}
        read = sorted(own | shown)
        volumes = self._read(pipeline.volume_samples([self.validation[place][1] for place in read], self.reading))
        for place, volume in zip(read, volumes, strict=True):
            if stops():
                return None
            row, _ = self.validation[place]
            predicted = self.step.labels(volume)
            true = volume.mask.numpy()[..., 0]
            if place in own:
                overlap = metrics.mean_dice(predicted, true, len(self.classes))
                scores[:, place] = overlap, *self._errors(predicted, true, volume)
            if place in shown:
                study = f" {row['study']}" if row["study"] else ""
                largest = int(np.argmax(np.count_nonzero(true, axis=(1, 2))))
                grey = volume.stack[largest, self.reading.neighbours].numpy()
                tag = f"validation/{row['patient']}{study} {row['scanner']}"
                pictures[tag] = overlays.overlay_rgb(grey, predicted[largest] > 0, true[largest] > 0)
        for tag, picture in pictures.items():
            board.image(tag, picture, number)
        scores = self._over_machines(scores)
        dice, volume_error, fat_error = (mean_over_patients(kind, self._patients().values()) for kind in scores)
        found = {"validation_dice": dice, "validation_volume_error_percent": volume_error}
        if self.experiment.task == "fatfraction" and not math.isnan(fat_error):
            found["validation_fat_error_points"] = fat_error
        if self.experiment.train.histograms and self.cluster.is_chief:
            names = [
                variable.path if hasattr(variable, "path") else variable.name for variable in self.step.model.weights
            ]
            board.histograms(dict(zip(names, self.step.model.get_weights(), strict=True)), number)
        if dice > float(self.best_dice):
            self.best_dice.assign(dice)
            self.best_step.assign(number)
            if self.cluster.is_chief:
                arrays = {f"{index:04d}": value for index, value in enumerate(self.step.model.get_weights())}
                npz = io.BytesIO()  # not the file: a zip that cannot be ended says so beside the error's own sentence
                np.savez(npz, **arrays)
                with command.atomic(self.best_weights) as temporary:
                    temporary.write_bytes(npz.getbuffer())
        stopping = self.experiment.train.early_stopping
        if dice > float(self.to_beat) + (stopping.min_delta if stopping else 0.0):
            self.to_beat.assign(dice)
            self.validations_since.assign(0)
        else:
            self.validations_since.assign_add(1)
        return found

    def _errors(
        self, predicted: np.ndarray[Any, Any], true: np.ndarray[Any, Any], volume: Samples
    ) -> tuple[float, float]:
        """Absolute errors of the first class: volume in percent (of 1 voxel where there is none), fat in points (NaN
        where there is no organ, which has no fat fraction to be wrong about, or no fat in the task)."""
        found, organ = predicted == 1, true == 1
        count = int(organ.sum())
        error = 100 * abs(int(found.sum()) - count) / max(count, 1)
        if self.experiment.task != "fatfraction" or not count:
            return error, math.nan
        own = self.reading.neighbours  # the slice itself among its neighbours
        slope, intercept = volume.scale.numpy()[:, own, :2].T[..., None, None]
        percent = volume.stack[:, own].numpy() * slope + intercept
        fat = float(percent[found].mean()) if found.any() else 0.0  # nothing found is reported as no fat
        return error, abs(fat - float(percent[organ].mean()))

    def _patients(self) -> dict[str, list[int]]:
        """Of each validation patient the places of the scans, since some have several studies."""
        places: dict[str, list[int]] = {}
        for place, (row, _) in enumerate(self.validation):
            places.setdefault(row["patient"], []).append(place)
        return places

    def _save(self, number: int) -> None:
        """Writes a checkpoint, and only then forgets the weights that an older one called the best."""
        try:
            self.manager.save(checkpoint_number=number)
        except tf.errors.OpError as error:
            kept = self.manager.latest_checkpoint
            raise RunError(
                f"Expected to write a checkpoint into {self.run_folder / 'checkpoints'}, received"
                f" '{error.message.splitlines()[0]}'; the same command goes on from"
                f" {Path(kept).name if kept else 'the start'} when there is room."
            ) from error
        for path in self.best_weights.parent.glob("best-*.npz"):
            if path != self.best_weights:
                path.unlink()

    def _stopped_early(self) -> bool:
        stopping = self.experiment.train.early_stopping
        return stopping is not None and int(self.validations_since) >= stopping.patience

    def _read_metrics(self) -> list[dict[str, Any]]:
        path = self.run_folder / "metrics.csv"
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not all(set(row) <= set(METRICS) and (row.get("step") or "").isdecimal() for row in rows):
            raise InputError(
                "BAD_RUN",
                f"Expected metrics.csv as training wrote it, received other columns or steps in {path}; put it back as"
                " it was, or delete it and lose its rows.",
            )
        return rows

    def _write_metrics(self, rows: list[dict[str, Any]]) -> None:
        with (
            command.atomic(self.run_folder / "metrics.csv") as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            table = csv.DictWriter(file, METRICS)
            table.writeheader()
            table.writerows(rows)
