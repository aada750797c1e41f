"""What every command shares: exit codes, progress, and files that are never half-written."""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import os
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import TypeVar

from lvseg.errors import InputError, RunError

Item = TypeVar("Item")

EXIT_DONE, EXIT_ERROR, EXIT_BAD_INPUT = 0, 1, 2
PLAIN_LINE_EVERY_S = 10.0
# Errors of the operating system that a better argument avoids; others, such as a full disk, are not the user's.
WRONG_PATH = frozenset(
    (
        errno.EACCES,
        errno.EEXIST,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    )
)


def run(parser: argparse.ArgumentParser, body: Callable[[argparse.Namespace], int | None], argv: Sequence[str] | None):
    """Runs a command's body and turns its outcome into an exit code.

    Args:
        parser: of the command's arguments.
        body: does the work; returns an exit code, or None for done.
        argv: the arguments, None for those of the process.

    Returns:
        0 done; 2 bad input, with the sentence on stderr; 1 interrupted, a number that is not finite, or RunError. Any
        other exception propagates (Python exits 1).
    """
    arguments = parser.parse_args(argv)
    with contextlib.suppress(ValueError):  # signals belong to the main thread; elsewhere the caller handles them
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        return body(arguments) or EXIT_DONE
    except InputError as error:
        print(f"{parser.prog}: {error.sentence}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        # What cannot be read or written: a full disk, a folder that is a file, missing rights.
        name = f" at {error.filename}" if error.filename else ""
        print(
            f"{parser.prog}: Expected to read or write a file, received '{error.strerror or error}'{name}.",
            file=sys.stderr,
        )
        return EXIT_BAD_INPUT if error.errno in WRONG_PATH else EXIT_ERROR
    except (FloatingPointError, RunError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; what was finished is kept.", file=sys.stderr)
        return EXIT_ERROR


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM and Ctrl-C are only noted; yields what tells whether one came.

    An exception out of a signal handler can strike inside TensorFlow's C++ calls into Python and crash the process.
    """
    came: list[int] = []
    kept = {}
    with contextlib.suppress(ValueError):  # signals belong to the main thread; elsewhere nobody sends them here
        for number in (signal.SIGTERM, signal.SIGINT):
            kept[number] = signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, renamed to it when the block ends well, removed otherwise.

    Keeps the suffixes of `path`, since writers choose the format by them. Works for files and for folders.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():  # which is whole under one name or the other until the new one is
            replaced = path.rename(path.with_name(f".partial-{uuid.uuid4().hex[:8]}-{path.name}"))
            try:
                temporary.replace(path)
            except BaseException:
                replaced.rename(path)
                raise
            shutil.rmtree(replaced)
        else:
            temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def written_by_tensorflow(path: Path) -> Iterator[None]:
    """OSError for what TensorFlow cannot write to `path`, a full disk above all: its own errors have no sentence."""
    import tensorflow as tf

    try:
        yield
    except tf.errors.OpError as error:
        names = {tf.errors.ResourceExhaustedError: errno.ENOSPC, tf.errors.PermissionDeniedError: errno.EACCES}
        number = next((number for kind, number in names.items() if isinstance(error, kind)), errno.EIO)
        raise OSError(number, os.strerror(number), str(path)) from error


@contextlib.contextmanager
def alone(lock: Path, folder: Path, waits: bool = True) -> Iterator[None]:
    """Keeps other processes that ask for the file `lock` off `folder` within the block; a killed one's hold ends.

    Args:
        lock: created if it is not there.
        folder: that is worked on, for the message.
        waits: until the other process is done; otherwise InputError IN_USE if there is one.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waits:
                raise InputError(
                    "IN_USE", f"Expected one process at a time, received a second while another works on {folder}."
                ) from None
            print(f"waiting for another preparation of {folder}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def progress(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Passes items on and shows how far it is: a bar where stderr is a terminal, plain lines elsewhere."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, description=label, total=total, console=Console(stderr=True))
        return
    started = last = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= PLAIN_LINE_EVERY_S:
            last = now
            print(f"{label}: {count}{f' of {total}' if total else ''}, {now - started:.0f} s", file=sys.stderr)
