"""What TensorBoard shows of a run: scalars, overlays, histograms, hyperparameters and a profile of chosen steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError

from lvseg import command

# Of each row of scalars: its column in metrics.csv, and its tag.
TAGS = {
    "loss": "loss/training",
    "dice": "dice/training",
    "validation_dice": "dice/validation",
    "validation_volume_error_percent": "error/volume_percent",
    "validation_fat_error_points": "error/fat_points",
    "learning_rate": "learning_rate",
    "loss_scale": "loss_scale",
    "input_wait_share": "time/input_wait_share",
    "step_seconds": "time/step_seconds",
}


class Board:
    """Writes a run's event files.

    Args:
        folder: of the logs; None writes nothing, as machines do whose chief is another.
        profile_steps: first and last step to profile, or None.
        first_step: that is written; what is there of it and later ones, which a run that goes on does again, goes.

    Raises:
        OSError: also from its methods, for a disk that is full or fails.
    """

    def __init__(self, folder: Path | None, profile_steps: Sequence[int] | None = None, first_step: int = 1) -> None:
        self._folder = folder
        if folder:
            _remove_from(folder, first_step)
        with self._to_disk():
            self._writer = tf.summary.create_file_writer(str(folder)) if folder else tf.summary.create_noop_writer()
        self._first, self._last = profile_steps or (0, 0)
        self._profiling = False

    def scalars(self, row: Mapping[str, Any]) -> None:
        """Writes a row's numbers, those it has, at its `step`."""
        with self._to_disk(), self._writer.as_default():
            for name, tag in TAGS.items():
                if row.get(name) is not None:
                    tf.summary.scalar(tag, row[name], step=row["step"])

    def image(self, tag: str, picture: Any, step: int) -> None:
        """Writes a picture, uint8 [H, W, 3]."""
        with self._to_disk(), self._writer.as_default():
            tf.summary.image(tag, picture[None], step=step)

    def histograms(self, variables: Mapping[str, Any], step: int) -> None:
        """Writes the distribution of every variable's values."""
        with self._to_disk(), self._writer.as_default():
            for name, values in variables.items():
                tf.summary.histogram(f"weights/{name}", values, step=step)

    def hyperparameters(self, config: Mapping[str, Any], dice: float) -> None:
        """Writes the resolved config's values, dotted names, and the validation Dice they led to."""
        from tensorboard.plugins.hparams import api

        with self._to_disk(), self._writer.as_default():
            api.hparams(dict(_flat(config)))
            tf.summary.scalar("hparams/best_validation_dice", dice, step=0)
            self._writer.flush()

    def before_step(self, number: int) -> None:
        """Begins the profile before its first step (or the first that is run of them)."""
        if self._folder and self._first <= number <= self._last and not self._profiling:
            tf.profiler.experimental.start(str(self._folder))
            self._profiling = True

    def after_step(self, number: int, synchronise: Any) -> None:
        """Ends the profile after its last step, once the device has done what it was given (`synchronise()`)."""
        if self._profiling and number >= self._last:
            synchronise()
            self._stop_profile()

    def close(self) -> None:
        """Writes what is left."""
        if self._profiling:
            self._stop_profile()
        with self._to_disk():
            self._writer.flush()

    def _to_disk(self) -> contextlib.AbstractContextManager[None]:
        return command.written_by_tensorflow(self._folder) if self._folder else contextlib.nullcontext()

    def _stop_profile(self) -> None:
        tf.profiler.experimental.stop()
        self._profiling = False


def _remove_from(folder: Path, step: int) -> None:
    """Removes from a run's event files a step and all later ones, and the hyperparameters, which its end is to have."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        records = list(_records_of(path.read_bytes()))
        kept = [record for record, event in records if _is_before(event, step)]
        if len(kept) < len(records):
            with command.atomic(path) as temporary:
                temporary.write_bytes(b"".join(kept))


def _records_of(content: bytes) -> Iterator[tuple[bytes, Any]]:
    """The records of an event file (8 bytes of length, 4 of checksum, the event, 4 of checksum) and their events.

    Ends, as all readers do, before one that a killed process left half or that a power cut damaged. Not by TensorFlow's
    own reader, which takes seconds for a long run.
    """
    first = 0
    while (end := first + 16 + int.from_bytes(content[first : first + 8], "little")) <= len(content):
        try:
            event = tf.compat.v1.Event.FromString(content[first + 12 : end - 4])
        except DecodeError:
            return
        yield content[first:end], event
        first = end


def _is_before(event: Any, step: int) -> bool:
    return event.step < step and not any(value.tag.lstrip("_").startswith("hparams") for value in event.summary.value)


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted names and plain values; lists and None as text."""
    values: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            values += _flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, bool | int | float | str | np.number)
            values.append((prefix + key, value if plain else str(value)))
    return values
