"""A short training of a model that is there: half of every batch is new and half replayed, and checks decide how long.

What it comes to is the best of its checks, or nothing: where patients known before would lose too much, the weights are
taken halfway between those before and those trained, and where that does not help either they stay as they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from lvseg import command, metrics, pipeline
from lvseg.config import Experiment
from lvseg.errors import RunError
from lvseg.replay import CHECKED, Volumes
from lvseg.step import Step

Measure = Callable[[Step, pipeline.Samples], float]

CHECK_EVERY, PATIENCE = 50, 2
LEAST_STEPS = 25  # after which a version may be written, however little time there is
# Slices that a check reads of a group of patients, at most, evenly spread over each scan, and before and after alike.
# Of scans with own masks, each slice is looked at three times or four.
CHECKED_SLICES = {"left_out": 128, "adapted_on": 128, "own_masks": 48, "known": 192}
ENOUGH, MOST_FORGOTTEN = 0.001, 0.01  # Dice that a check has to gain, and that known patients may lose


class Tuned(NamedTuple):
    """What a short training came to.

    Args:
        weights: of the network, as `get_weights` has them; None where none were better than those before.
        interpolation: how far they lie from those before towards those trained.
        measured: by group its `patients`, how many slices of each scan were read at most (`slices_a_scan`), and their
            mean Dice `before` and `after`; `steps`, `steps_done`, `ended_by` and `minutes`.
    """

    weights: list[np.ndarray[Any, Any]] | None
    interpolation: float
    measured: dict[str, Any]


def fine_tune(
    step: Step,
    experiment: Experiment,
    groups: Mapping[str, Volumes],
    replayed: Volumes,
    reading: pipeline.Reading,
    minutes: float,
    measure: Measure | None = None,
) -> Tuned:
    """Trains until a check says that more would not help.

    Args:
        step: of the experiment, with the model's weights.
        groups: `adapted_on`, `left_out`, which decides where it has anybody, and `known`, which tells what is
            forgotten.
        replayed: the other half of every batch; nobody for none.
        minutes: of training and checks, at most.
        measure: in place of Dice for those adapted on.

    Raises:
        RunError: SIGTERM or Ctrl-C came.
        FloatingPointError: a step ended in numbers that are not finite.
    """
    # Of each group the scans that a check reads: many patients, or visits, take no longer than one.
    read = {name: group.spread(CHECKED) for name, group in groups.items()}
    train = experiment.train

    def checked() -> dict[str, float]:
        return check(step, read, reading, measure)

    def has_forgotten() -> bool:
        return bool(groups["known"].rows) and checks[-1]["known"] < checks[0]["known"] - MOST_FORGOTTEN

    started, done = time.monotonic(), 0
    checks = [checked()]
    a_check_s = time.monotonic() - started
    first = kept = step.model.get_weights()
    best, interpolation = 0, 1.0
    batches = iter(batches_of(experiment, groups["adapted_on"], replayed, reading))
    deciding, ended_by = "left_out" if groups["left_out"].rows else "adapted_on", "steps"
    with command.stop_requests() as is_to_stop:

        def heed() -> None:
            if is_to_stop():
                raise RunError("interrupted; nothing is written and the model stays as it is")

        for number in command.progress(range(1, train.steps + 1), "adapting"):
            heed()
            step(next(batches))
            done, late = number, time.monotonic() - started + 2 * a_check_s > 60 * minutes
            if number % CHECK_EVERY and number != train.steps and not late:
                continue
            if bad_step := int(step.bad_step.numpy()):
                raise FloatingPointError(
                    f"Expected finite numbers, received others at step {bad_step}; lower --learning-rate."
                )
            checks.append(checked())
            trained = candidate = step.model.get_weights()
            if has_forgotten():
                # Halfway between what it was and what it became it has most of either (Wortsman et al., CVPR 2022).
                candidate = [(before + after) / 2 for before, after in zip(first, trained, strict=True)]
                step.model.set_weights(candidate)
                checks[-1] = checked()
                step.model.set_weights(trained)
            heed()
            is_better = checks[-1][deciding] > checks[best][deciding] + ENOUGH
            if is_better and not has_forgotten() and number >= min(LEAST_STEPS, train.steps):
                best, kept = len(checks) - 1, candidate
                interpolation = 1.0 if candidate is trained else 0.5
            if number == train.steps:
                break
            if late or len(checks) - 1 - best >= PATIENCE:
                ended_by = "minutes" if late else "no gain"
                break
    measured: dict[str, Any] = {
        name: {
            "patients": len(group.patients),
            "slices_a_scan": slices_a_scan(name, group, measure is not None),
            "before": checks[0][name],
            "after": checks[best][name],
        }
        for name, group in read.items()
        if group.rows
    }
    taken = best * CHECK_EVERY if best < len(checks) - 1 else done if best else 0
    spent = (time.monotonic() - started) / 60
    measured |= {"steps": taken, "steps_done": done, "ended_by": ended_by, "minutes": spent}
    return Tuned(kept if best else None, interpolation, measured)


def reading_of(experiment: Experiment, info: Mapping[str, Any], patients: Sequence[str]) -> pipeline.Reading:
    """How shards are read for a model, from its experiment and its model.json."""
    data = experiment.data
    return pipeline.Reading(
        data.size, data.neighbours, data.normalise, data.clip_percentiles, info["global_bounds"], tuple(patients)
    )


def batches_of(experiment: Experiment, new: Volumes, replayed: Volumes, reading: pipeline.Reading) -> Any:
    """Batches of which one half is of the new study and the other replayed."""
    parts = [volumes for volumes in (new, replayed) if volumes.rows]
    reading = reading._replace(tissues=experiment.augment.contrast is not None)
    each = [
        pipeline.training_batches(
            volumes.files, volumes.slices, reading, experiment.seed + number,
            experiment.train.batch_size // len(parts), experiment.data.shuffle_slices, 0,
        )
        for number, volumes in enumerate(parts)
    ]  # fmt: skip
    if len(each) == 1:
        return each[0]
    return tf.data.Dataset.zip(tuple(each)).map(
        lambda one, other: pipeline.Samples(*(tf.concat(pair, axis=0) for pair in zip(one, other, strict=True)))
    )


def slices_a_scan(name: str, group: Volumes, own_masks: bool) -> int:
    """How many slices of each scan of a group a check reads, at most."""
    every = CHECKED_SLICES["own_masks" if own_masks and name == "adapted_on" else name]
    return max(1, every // len(group.rows))


def check(
    step: Step, groups: dict[str, Volumes], reading: pipeline.Reading, measure: Measure | None = None
) -> dict[str, float]:
    """Mean Dice over the patients of each group, or, of those adapted on, another measure."""
    return {
        name: _mean_dice(
            step,
            group,
            reading,
            measure if name == "adapted_on" else None,
            slices_a_scan(name, group, own_masks=measure is not None),
        )
        for name, group in groups.items()
        if group.rows
    }


def _mean_dice(step: Step, volumes: Volumes, reading: pipeline.Reading, measure: Measure | None, slices: int) -> float:
    """Mean over patients of their scans' Dice, of at most so many slices of a scan, evenly spread, all together."""
    found: dict[str, list[float]] = {}
    samples = pipeline.volume_samples(volumes.files, reading)
    for (patient, _, count, _), volume in zip(volumes.rows, samples, strict=True):
        if count > slices:
            chosen = np.linspace(0, count - 1, slices).round().astype(np.int32)
            volume = pipeline.Samples(*(tf.gather(values, chosen) for values in volume))
        if measure is not None:
            found.setdefault(patient, []).append(measure(step, volume))
            continue
        predicted, true = step.labels(volume), volume.mask.numpy()[..., 0]
        overlap = metrics.mean_dice(predicted, true, int(step.model.output_shape[-1]))
        found.setdefault(patient, []).append(overlap)
    return float(np.mean([np.mean(values) for values in found.values()]))
