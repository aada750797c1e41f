"""The table of jobs: who sent what, how far it is, who is next. No sockets; all that a restart needs is here.

A job's states: RECEIVING (upload comes in) > QUEUED > RUNNING > DONE or FAILED, and gone when its owner closes it or
its time is up. Times are of the monotonic clock, in seconds.
"""

from __future__ import annotations

import enum
import hashlib
import secrets
import shutil
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from serving import protocol

ATTEMPTS_MAX = 2  # a scan that twice took its worker down is not given a third


class State(enum.Enum):
    """Where a job is on its way."""

    RECEIVING = "receiving"
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass
class Job:
    """One scan on its way.

    Args:
        key: 32 random bytes; under a plain connection, knowing it is the proof of owning the job.
        owner: who may see it ("" for anyone on a plain connection; with CURVE the client's public key).
        route: connection that its messages go to, the last one that asked.
        submit: what was announced.
        folder: its folder in the spool.
        touched: time of the last message or change, from which it ages.
        expires: time by which it has to run.
    """

    key: bytes
    owner: str
    route: bytes
    submit: protocol.Submit
    folder: Path
    touched: float
    expires: float
    state: State = State.RECEIVING
    offset: int = 0
    until: int = 0
    file: BinaryIO | None = None
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    attempts: int = 0
    progress: protocol.Progress | None = None
    files: tuple[protocol.ResultFile, ...] = ()
    error: protocol.Error | None = None
    abandoned: bool = False

    @property
    def label(self) -> str:
        """What a log may say about it."""
        return self.key.hex()[:12]


class JobTable:
    """All jobs of a server.

    Args:
        spool: folder that holds a folder a job.
    """

    def __init__(self, spool: Path) -> None:
        self._spool = spool
        self._jobs: dict[bytes, Job] = {}
        self._queue: deque[Job] = deque()

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs.values()))

    @property
    def queued(self) -> int:
        """How many wait for a worker."""
        return len(self._queue)

    @property
    def receiving(self) -> int:
        """How many are being uploaded."""
        return sum(job.state is State.RECEIVING for job in self._jobs.values())

    def add(self, submit: protocol.Submit, owner: str, route: bytes, now: float) -> Job:
        """A new job with its folder and open upload file.

        Raises:
            OSError: the spool cannot take it; nothing is left behind.
        """
        key = secrets.token_bytes(protocol.KEY_BYTES)
        job = Job(key, owner, route, submit, self._spool / key.hex(), now, now + submit.deadline_ms / 1000)
        job.folder.mkdir(mode=0o700)
        try:
            job.file = (job.folder / "upload").open("xb", buffering=0)
        except OSError:
            shutil.rmtree(job.folder)
            raise
        self._jobs[key] = job
        return job

    def get(self, key: bytes, owner: str) -> Job | None:
        """The owner's job of that key; somebody else's is as unknown as none at all."""
        job = self._jobs.get(key)
        return job if job and job.owner == owner and not job.abandoned else None

    def by_key(self, key: bytes) -> Job | None:
        """For the workers, who own no jobs."""
        return self._jobs.get(key)

    def write(self, job: Job, payload: bytes) -> None:
        """Appends to the upload.

        Raises:
            OSError: the spool is full or broken.
        """
        if job.file is None:
            raise ValueError(f"Expected an open upload, received state={job.state}.")
        view = memoryview(payload)
        while view:
            view = view[job.file.write(view) :]
        job.digest.update(payload)
        job.offset += len(payload)

    def stored(self, job: Job) -> bool:
        """Closes a whole upload and queues it, if it has the digest that was announced."""
        self._close_file(job)
        if job.digest.hexdigest() != job.submit.sha256:
            return False
        job.state = State.QUEUED
        self._queue.append(job)
        return True

    def next(self) -> Job | None:
        """Takes the first of the queue, or None."""
        if not self._queue:
            return None
        job = self._queue.popleft()
        job.state = State.RUNNING
        job.attempts += 1
        job.progress = None
        return job

    def again(self, job: Job) -> bool:
        """Puts a job whose worker was lost first in the queue, unless that happened too often."""
        if job.attempts >= ATTEMPTS_MAX:
            return False
        job.state = State.QUEUED
        self._queue.appendleft(job)
        return True

    def position(self, job: Job) -> int:
        """How many jobs will run before this one; 0 for one that runs."""
        return self._queue.index(job) if job.state is State.QUEUED else 0

    def done(self, job: Job, files: tuple[protocol.ResultFile, ...], now: float) -> None:
        """Keeps the result and deletes the scan."""
        job.state, job.files, job.touched = State.DONE, files, now
        (job.folder / "upload").unlink(missing_ok=True)
        shutil.rmtree(job.folder / "work", ignore_errors=True)

    def fail(self, job: Job, error: protocol.Error, now: float) -> None:
        """Keeps the reason and deletes everything else."""
        self._leave_queue(job)
        self._close_file(job)
        job.state, job.error, job.touched = State.FAILED, error, now
        shutil.rmtree(job.folder, ignore_errors=True)

    def remove(self, job: Job) -> None:
        """Forgets a job; one that runs only when its worker has let go of the folder."""
        if job.state is State.RUNNING:
            job.abandoned = True
            return
        self._leave_queue(job)
        self._close_file(job)
        shutil.rmtree(job.folder, ignore_errors=True)
        del self._jobs[job.key]

    def _leave_queue(self, job: Job) -> None:
        if job.state is State.QUEUED:
            self._queue.remove(job)

    @staticmethod
    def _close_file(job: Job) -> None:
        if job.file is not None:
            job.file.close()
            job.file = None
