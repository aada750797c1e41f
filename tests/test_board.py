"""The event files of a run: a killed one's are cut back to its checkpoint, and a disk that is full is told as such."""

import errno
import resource

import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lvseg.board import Board


def steps_of(folder):
    """Of every tag the steps that readers find, as often as they find them."""
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    return {tag: [event.step for event in events.Tensors(tag)] for tag in events.Tags()["tensors"]}


def write(folder, steps, **settings):
    board = Board(folder, **settings)
    for step in steps:
        board.scalars({"step": step, "loss": 1.0 / step})
    board.hyperparameters({"seed": 3}, 0.5)
    board.close()


def test_what_is_done_again_is_logged_once(tmp_path):
    write(tmp_path, (25, 50, 75, 100))
    (first,) = tmp_path.iterdir()
    with first.open("ab") as file:
        file.write(b"half of an event")  # of a process that was killed meanwhile
    write(tmp_path, (75, 100, 125), first_step=75)
    write(tmp_path, (125, 150), first_step=125)
    assert steps_of(tmp_path) == {
        "loss/training": [25, 50, 75, 100, 125, 150],
        "hparams/best_validation_dice": [0],
        "_hparams_/session_start_info": [0],
    }


def test_a_record_that_a_power_cut_damaged_ends_its_file_as_it_does_for_readers(tmp_path):
    write(tmp_path, (25, 50, 75))
    (first,) = tmp_path.iterdir()
    content, last = first.read_bytes(), b"loss/training"
    at = content.rindex(last) - 2  # inside the third event
    first.write_bytes(content[:at] + b"\xff" * (len(content) - at))
    write(tmp_path, (50, 75), first_step=50)
    assert steps_of(tmp_path)["loss/training"] == [25, 50, 75]


def test_files_with_nothing_to_remove_stay_as_they_are(tmp_path):
    board = Board(tmp_path)
    board.scalars({"step": 25, "loss": 0.5})
    (first,) = tmp_path.iterdir()
    before = first.read_bytes(), first.stat().st_ino
    Board(tmp_path, first_step=26).close()
    assert (first.read_bytes(), first.stat().st_ino) == before


def test_a_machine_that_is_not_the_first_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(None, (25, 50))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_takes_no_more_is_an_error_of_the_system(tmp_path):
    board, limits = Board(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            for step in range(1, 100):
                board.scalars({"step": step, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(tmp_path)


def test_a_full_disk_has_the_system_s_number(tmp_path, monkeypatch):
    def full(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(tf.summary, "scalar", full)
    with pytest.raises(OSError) as error:
        Board(tmp_path).scalars({"step": 1, "loss": 1.0})
    assert error.value.errno == errno.ENOSPC
