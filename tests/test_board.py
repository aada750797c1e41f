"""The event files of a run: a disk that is full is told as such."""

import errno
import resource

import pytest
import tensorflow as tf

from lvseg.board import Board


def write(folder, steps, **settings):
    board = Board(folder, **settings)
    for step in steps:
        board.scalars({"step": step, "loss": 1.0 / step})
    board.hyperparameters({"seed": 3}, 0.5)
    board.close()


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
