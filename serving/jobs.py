"""The table of jobs: who sent what, how far it is, who is next. No sockets.

A job's states: RECEIVING (the upload comes in) > WAITING and RUNNING, once for each of STEPS > DONE or FAILED, and gone
when nobody wants it any more or its time is up.

What a client was told to be safe is safe: every change that a restart has to know is one transaction of an SQLite
database (write-ahead log, synchronous), made after the files it speaks of were flushed to the disk. Each job's folder
also holds `job.json`, from which the database is made anew should it be damaged.

    spool/jobs.sqlite
    spool/.damaged-<key>-<time>  a folder that cannot be understood, for the operator
    spool/.deleted-<key>  one that is being deleted
    spool/.alive          its time of change: when a server last used the spool
    spool/<key>/job.json  upload  work/  result/

Times are of the monotonic clock, in seconds, but for what the database keeps: seconds since 1970, by a clock that goes
on as it was at the start, whatever is done to the system's. A job does not age while no server runs, since nobody could
go on with an upload then, or fetch a result.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from serving import protocol
from serving.durable import sync_folder

LOSSES_MAX = 2  # a scan that twice took its worker down is not given a third
STEPS = ("unpack", "segment", "pack")  # each by a kind of worker of its own
FIRST_STAGES = ("unpack", "segment", "write")  # of each step
DATABASE, JOB, UPLOAD, WORK, RESULT = "jobs.sqlite", "job.json", "upload", "work", "result"
ALIVE, DELETED = ".alive", ".deleted-"
JOB_FOLDER = re.compile(r"[0-9a-f]{64}")
LOCKED_S = 2.0
UPLOAD_ACTIVE_S = 30.0
PIECE_BYTES = 1024 * 1024
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    key TEXT PRIMARY KEY, number INTEGER NOT NULL, owner TEXT NOT NULL, submit TEXT NOT NULL, model TEXT NOT NULL,
    state TEXT NOT NULL,
    offset INTEGER NOT NULL, losses INTEGER NOT NULL, created REAL NOT NULL, changed REAL NOT NULL,
    files TEXT NOT NULL, error TEXT NOT NULL
) STRICT
"""
COLUMNS = (
    "key",
    "number",
    "owner",
    "submit",
    "model",
    "state",
    "offset",
    "losses",
    "created",
    "changed",
    "files",
    "error",
)

log = logging.getLogger("serving.jobs")


class SpoolDamaged(Exception):
    """The database broke while the server ran: it has to start again, which makes it anew from the jobs' folders."""


class State(enum.Enum):
    """Where a job is on its way."""

    RECEIVING = "receiving"
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(eq=False)
class Job:
    """One scan on its way.

    Args:
        key: `protocol.job_key`.
        number: counts up from job to job; the order of the queue.
        owner: who may see it: the client's public key, or "" for anyone on a plain connection.
        submit: what was announced.
        model: the version that does it.
        folder: its folder in the spool.
        created: seconds since 1970.
        touched: time of the last message or change, from which it ages.
        turned_away: time at which its upload, which had stood still, last found no place to go on.
        expires: time by which it has to begin.
        routes: connections that want to hear of it.
        sender: the connection that uploads it.
        step: index in STEPS of what it waits for or is at.
        durable: bytes of the upload that are on disk for certain.
        began: time of the first byte; None where none has come since the start.
        credited: time of the last credit.
        waits: time since which it waits for a worker.
        queued_s: how long it waited for workers before.
        abandoned: nobody wants it any more; it goes once its worker lets go.
    """

    key: bytes
    number: int
    owner: str
    submit: protocol.Submit
    model: protocol.Model
    folder: Path
    created: float
    touched: float
    expires: float
    routes: set[bytes] = field(default_factory=set)
    sender: bytes = b""
    state: State = State.RECEIVING
    step: int = 0
    offset: int = 0
    durable: int = 0
    until: int = 0
    file: BinaryIO | None = None
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    losses: int = 0
    received_ms: int = 0
    began: float | None = None
    turned_away: float = -math.inf  # not 0, which is when this machine was started: a job may be older
    credited: float = 0.0
    waits: float = 0.0
    queued_s: float = 0.0
    progress: protocol.Progress | None = None
    files: tuple[protocol.ResultFile, ...] = ()
    error: protocol.Error | None = None
    abandoned: bool = False

    @property
    def label(self) -> str:
        """What a log may say about it."""
        return self.key.hex()[:12]


class JobTable:
    """All jobs of a server, as far as they go in its spool.

    Args:
        spool: folder that holds a folder a job; it has to be this process's alone.
        now: monotonic time.

    Raises:
        OSError: the spool cannot be used.
    """

    def __init__(self, spool: Path, now: float) -> None:
        self._spool = spool
        self._jobs: dict[bytes, Job] = {}
        self._lines: dict[int, deque[Job]] = {step: deque() for step in range(len(STEPS))}
        self._number = 0
        self._epoch = time.time() - time.monotonic()  # a clock that is set later makes no job older or younger
        self.problem = ""  # why the database could not be written to last time
        self._database = self._opened()
        self._pass_over_down_time()
        self._recover(now)

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs.values()))

    def __len__(self) -> int:
        return len(self._jobs)

    def close(self) -> None:
        """Lets go of the files; everything that is on disk stays for the next start."""
        self.alive()
        for job in self:
            self._close_file(job)
        self._database.close()

    # ---- how many

    def queued(self, but: Container[protocol.Model] = ()) -> int:
        """How many are still to be segmented, not counting those that wait for some versions."""
        return self.waiting(0, but) + self._unpacking + self.waiting(1, but)

    @property
    def _unpacking(self) -> int:
        return sum(job.state is State.RUNNING and job.step == 0 for job in self._jobs.values())

    def receiving(self, now: float) -> list[Job]:
        """Those whose upload has gone on lately; others hold nobody up, and go on where there is place and room."""
        return [job for job in self._jobs.values() if self.is_coming_in(job, now)]

    @staticmethod
    def is_coming_in(job: Job, now: float) -> bool:
        """Whether a job's upload has gone on lately."""
        return job.state is State.RECEIVING and now - job.touched < UPLOAD_ACTIVE_S

    def reserved_bytes(self, now: float) -> int:
        """What is still to be written for scans that come in or wait to be unpacked."""
        missing = sum(job.submit.bytes - job.offset + job.submit.content_bytes for job in self.receiving(now))
        return missing + sum(job.submit.content_bytes for job in self._lines[0])

    def waiting(self, step: int, but: Container[protocol.Model] = ()) -> int:
        """How many wait for a step, not counting those that some versions are to do."""
        return sum(job.model not in but for job in self._lines[step])

    def of_owner(self, owner: str) -> list[Job]:
        """An owner's jobs, the newest first."""
        own = (job for job in self._jobs.values() if job.owner == owner and not job.abandoned)
        return sorted(own, key=lambda job: -job.number)

    # ---- one job

    def get(self, key: bytes, owner: str) -> Job | None:
        """The owner's job of that key; somebody else's is as unknown as none at all."""
        job = self._jobs.get(key)
        return job if job and job.owner == owner and not job.abandoned else None

    def is_ending(self, key: bytes, owner: str) -> bool:
        """Whether the owner's job of that key was cancelled and its worker has not let go of it yet."""
        job = self._jobs.get(key)
        return job is not None and job.owner == owner and job.abandoned

    def add(self, key: bytes, submit: protocol.Submit, model: protocol.Model, owner: str, now: float) -> Job:
        """A new job with its folder and open upload file.

        Raises:
            OSError: the spool cannot take it; nothing is left behind.
        """
        self._number += 1
        expires = now + submit.deadline_ms / 1000
        job = Job(key, self._number, owner, submit, model, self._spool / key.hex(), time.time(), now, expires)
        _delete(job.folder)
        job.folder.mkdir(mode=0o700)
        try:
            _write_facts(job)
            job.file = (job.folder / UPLOAD).open("xb", buffering=0)
            self._save(job)
        except BaseException:
            self._close_file(job)
            _delete(job.folder)
            raise
        self._jobs[key] = job
        return job

    def assign(self, job: Job, model: protocol.Model) -> None:
        """Another version does a job that waits, since the one it was accepted for is not served any more.

        Should that not get to the disk, it is done again after a restart.
        """
        job.model = model
        with contextlib.suppress(OSError):
            _write_facts(job)
        self._save_later(job)

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

    def flush(self, job: Job) -> None:
        """Makes what came so far safe, so that an upload goes on from there after a crash.

        Raises:
            OSError: the spool is full or broken.
        """
        if job.file is not None:
            os.fdatasync(job.file.fileno())
        job.durable = job.offset
        self._save(job)

    def stored(self, job: Job, now: float) -> bool:
        """Closes a whole upload and queues it, if it has the digest that was announced; it is then safe.

        Raises:
            OSError: the spool is full or broken.
        """
        if job.digest.hexdigest() != job.submit.sha256:
            return False
        if job.file is not None:
            os.fsync(job.file.fileno())
        sync_folder(job.folder)
        sync_folder(self._spool)
        self._close_file(job)
        job.durable, job.waits = job.offset, now
        job.state, job.step = State.WAITING, 0
        try:
            self._save(job)
        except OSError:
            job.state = State.RECEIVING
            raise
        self._lines[0].append(job)
        return True

    def reopen(self, job: Job) -> None:
        """Opens the upload again after a restart, at its last safe byte.

        Raises:
            OSError: the spool is broken.
        """
        if job.file is not None:
            return
        path = job.folder / UPLOAD
        with path.open("r+b") as file:
            file.truncate(job.durable)
            digest = hashlib.sha256()
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
        job.digest = digest
        job.file = path.open("ab", buffering=0)

    # ---- the queue

    def next(self, step: int, now: float, can: Callable[[Job], bool] | None = None) -> Job | None:
        """Takes the first of those that wait for a step, or None.

        Args:
            step: index in STEPS.
            now: monotonic time.
            can: whether the worker can do a job; None for any.
        """
        line = self._lines[step]
        job = next((one for one in line if can is None or can(one)), None)
        if job is None:
            return None
        line.remove(job)
        job.state, job.progress = State.RUNNING, None
        job.queued_s += max(0.0, now - job.waits)
        return job

    def advance(self, job: Job, now: float) -> None:
        """The step is done; the job waits for the next one."""
        job.state, job.step, job.progress, job.waits = State.WAITING, job.step + 1, None, now
        line = self._lines[job.step]
        # In the order in which they came, whoever was faster before.
        line.insert(next((place for place, one in enumerate(line) if one.number > job.number), len(line)), job)

    def again(self, job: Job, now: float) -> bool:
        """Puts a job whose worker was lost first in the line, unless that happened too often."""
        job.losses += 1
        self._save_later(job)
        if job.losses >= LOSSES_MAX:
            return False
        job.state, job.progress, job.waits = State.WAITING, None, now
        self._lines[job.step].appendleft(job)
        return True

    def position(self, job: Job) -> int:
        """How many jobs that are not being segmented yet will be before this one."""
        if job.state is not State.WAITING or job.step > 1:
            return 0
        if job.step == 1:
            return self._lines[1].index(job)
        return len(self._lines[1]) + self._unpacking + self._lines[0].index(job)

    # ---- the end

    def done(self, job: Job, files: tuple[protocol.ResultFile, ...], now: float) -> None:
        """Keeps the result, made safe before it counts, and deletes the scan.

        Raises:
            OSError: the spool is broken.
        """
        for file in files:
            with (job.folder / RESULT / file.name).open("rb") as result:
                os.fsync(result.fileno())
        sync_folder(job.folder / RESULT)
        sync_folder(job.folder)
        job.state, job.files, job.touched, job.progress = State.DONE, files, now, None
        if self._save_later(job):  # else a restart needs the scan again
            (job.folder / UPLOAD).unlink(missing_ok=True)
        shutil.rmtree(job.folder / WORK, ignore_errors=True)

    def fail(self, job: Job, error: protocol.Error, now: float) -> None:
        """Keeps the reason and deletes everything else."""
        self._leave_line(job)
        self._close_file(job)
        job.state, job.error, job.touched, job.progress = State.FAILED, error, now, None
        self._save_later(job)
        _delete(job.folder)

    def remove(self, job: Job) -> None:
        """Forgets a job; the folder of one that runs goes when its worker has let go of it."""
        is_running = job.state is State.RUNNING
        if is_running:
            for name in (JOB, UPLOAD):  # without them no restart takes it up again
                with contextlib.suppress(OSError):
                    (job.folder / name).unlink(missing_ok=True)
        else:
            self._close_file(job)
            _delete(job.folder)  # before its row, from which a start would know it
        with _told_as_os_error():
            try:
                self._database.execute("DELETE FROM jobs WHERE key = ?", (job.key.hex(),))
            except sqlite3.OperationalError:
                log.error("job %s: its row stays until the next start", job.label)
        if is_running:
            job.abandoned = True
            job.routes.clear()
            return
        self._leave_line(job)
        del self._jobs[job.key]

    def alive(self) -> None:
        """Notes that a server runs, to be called now and then; what passes until the next start makes no job older."""
        with contextlib.suppress(OSError):  # a spool that fails is told elsewhere
            (self._spool / ALIVE).touch(mode=0o600)
            os.utime(self._spool / ALIVE, (self._date(),) * 2)  # by the clock of the rows, not the file system's

    def excuse(self, gap_s: float) -> None:
        """The server stood still for so long: no job is older for that, and none has to begin so much earlier."""
        self._epoch -= gap_s
        for job in self._jobs.values():
            job.touched += gap_s
            job.turned_away += gap_s
            job.expires += gap_s

    def probe(self) -> None:
        """Tries whether the database can be written to again; `problem` says so."""
        with _told_as_os_error():
            try:
                self._database.execute("PRAGMA busy_timeout=0")
                self._database.execute("BEGIN IMMEDIATE")
                self._database.execute("ROLLBACK")
                self.problem = ""
            except sqlite3.OperationalError as error:
                self.problem = str(error)
            finally:
                self._database.execute(f"PRAGMA busy_timeout={int(1000 * LOCKED_S)}")

    # ---- the database

    def _date(self) -> float:
        return self._epoch + time.monotonic()

    def _opened(self) -> sqlite3.Connection:
        path = self._spool / DATABASE
        try:
            return _connect(path)
        except sqlite3.OperationalError as error:  # locked, or the disk: both may be over at the next start
            raise OSError(errno.EIO, f"its database says '{error}'") from error
        except sqlite3.DatabaseError:
            aside = path.with_name(f"{DATABASE}.damaged-{int(time.time())}")
            log.error("the database is damaged: kept as %s, made anew from the jobs' folders", aside.name)
            path.replace(aside)
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            return _connect(path)

    def _save(self, job: Job) -> None:
        submit, model = json.dumps(asdict(job.submit)), json.dumps(asdict(job.model))
        files = json.dumps([asdict(file) for file in job.files])
        error = json.dumps({**asdict(job.error), "job": job.key.hex()}) if job.error else ""
        values = (
            job.key.hex(), job.number, job.owner, submit, model, job.state.value, job.durable, job.losses,
            job.created, self._date(), files, error,
        )  # fmt: skip
        marks = ", ".join("?" * len(COLUMNS))
        try:
            with _told_as_os_error():
                self._database.execute(f"INSERT OR REPLACE INTO jobs ({', '.join(COLUMNS)}) VALUES ({marks})", values)
        except OSError as error:
            self.problem = error.strerror or "unknown"
            raise
        self.problem = ""

    def _save_later(self, job: Job) -> bool:
        """As `_save`, where a failure costs no more than doing the job's last part again after a crash."""
        try:
            self._save(job)
        except OSError as error:
            log.error("job %s: its row could not be written (%s)", job.label, error.strerror)
            return False
        return True

    def _pass_over_down_time(self) -> None:
        """Gives each job the age that it had when a server last ran, whatever was done to the clock since."""
        with contextlib.suppress(FileNotFoundError):
            times = (self._date(), (self._spool / ALIVE).stat().st_mtime)
            with _told_as_os_error():
                self._database.execute("UPDATE jobs SET changed = ? - max(0, ? - changed)", times)
        self.alive()

    def _recover(self, now: float) -> None:
        """Takes over what an earlier server left: waiting jobs wait again, uploads go on, results are kept."""
        rows = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in self._rows()}
        for path in self._spool.glob(f"{DELETED}*"):
            shutil.rmtree(path, ignore_errors=True)
        folders = {path.name: path for path in self._spool.iterdir() if JOB_FOLDER.fullmatch(path.name)}
        made_anew = set()
        for name, folder in folders.items():
            old = rows.pop(name, None)
            row = old or _row_of(folder)
            job = _job_of(row, folder, now) if row else None
            if job is None or not self._take_over(job):
                self._put_away(folder, is_failed=job is not None and job.state is State.FAILED)
                with _told_as_os_error():
                    self._database.execute("DELETE FROM jobs WHERE key = ?", (name,))
            elif old is None or old["state"] != job.state.value:
                made_anew.add(job.key)
        for name, row in rows.items():  # failed ones have no folder
            job = _job_of(row, self._spool / name, now)
            if job is not None and job.state is State.FAILED:
                self._jobs[job.key] = job
                self._number = max(self._number, job.number)
            else:
                with _told_as_os_error():
                    self._database.execute("DELETE FROM jobs WHERE key = ?", (name,))
        for job in sorted(self._jobs.values(), key=lambda one: one.number):
            if job.state is State.WAITING:
                job.waits = now
                self._lines[0].append(job)
            if job.state is not State.FAILED:
                log.info("job %s: taken over, %s", job.label, job.state.value)
            if job.key in made_anew:  # rows that are right keep the time of their last change
                self._save_later(job)

    def _put_away(self, folder: Path, is_failed: bool) -> None:
        """Deletes what no job needs; what may be a scan or a result that nobody understands is the operator's."""
        if is_failed or not _is_damaged(folder):
            _delete(folder)
            return
        aside = folder.with_name(f".damaged-{folder.name}-{int(time.time())}")
        folder.rename(aside)
        log.error(
            "job %s: its folder cannot be understood: kept as %s until you delete it", folder.name[:12], aside.name
        )

    def _rows(self) -> list[tuple[Any, ...]]:
        with _told_as_os_error():
            return list(self._database.execute(f"SELECT {', '.join(COLUMNS)} FROM jobs"))

    def _take_over(self, job: Job) -> bool:
        """Whether a job's files are as its row says; puts it where it goes on."""
        upload = job.folder / UPLOAD
        size = upload.stat().st_size if upload.is_file() else -1
        if job.state is State.DONE:
            sizes = [(job.folder / RESULT / file.name, file.bytes) for file in job.files]
            if all(path.is_file() and path.stat().st_size == bytes_ for path, bytes_ in sizes) and sizes:
                shutil.rmtree(job.folder / WORK, ignore_errors=True)
                upload.unlink(missing_ok=True)
                self._keep(job)
                return True
            job.state = State.WAITING  # done again, where the scan is still there
        if job.state in (State.WAITING, State.RUNNING):
            job.files = ()
            if size != job.submit.bytes:
                return False
            job.state, job.step, job.offset, job.durable = State.WAITING, 0, size, size
            for name in (WORK, RESULT):
                shutil.rmtree(job.folder / name, ignore_errors=True)
        elif job.state is State.RECEIVING:
            if size < job.durable:
                return False
            job.offset = job.durable
        else:
            return False
        self._keep(job)
        return True

    def _keep(self, job: Job) -> None:
        self._jobs[job.key] = job
        self._number = max(self._number, job.number)

    def _leave_line(self, job: Job) -> None:
        if job.state is State.WAITING:
            self._lines[job.step].remove(job)

    @staticmethod
    def _close_file(job: Job) -> None:
        if job.file is not None:
            job.file.close()
            job.file = None


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=LOCKED_S, isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute(SCHEMA)
        (verdict,) = database.execute("PRAGMA quick_check").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        if [row[1] for row in database.execute("PRAGMA table_info(jobs)")] != list(COLUMNS):
            raise sqlite3.DatabaseError("the table is another version's")
    except sqlite3.Error:
        database.close()
        raise
    return database


@contextlib.contextmanager
def _told_as_os_error() -> Iterator[None]:
    """What SQLite says of the disk, as what the disk would say.

    Raises:
        OSError: ENOSPC for a full disk, EIO for a lock that lasts and whatever else may pass.
        SpoolDamaged: the database cannot be used any more.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        number = errno.ENOSPC if error.sqlite_errorcode == sqlite3.SQLITE_FULL else errno.EIO
        raise OSError(number, f"the database says '{error}'") from error
    except sqlite3.DatabaseError as error:
        raise SpoolDamaged(str(error)) from error


def _write_facts(job: Job) -> None:
    """A job's file, from which its row can be made anew."""
    facts = {"number": job.number, "owner": job.owner, "created": job.created}
    facts |= {"submit": asdict(job.submit), "model": asdict(job.model)}
    temporary = job.folder / f".partial-{JOB}"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(facts, file)
        file.flush()
        os.fsync(file.fileno())  # else a power cut leaves the name without the bytes; `stored` sees to the folder
    temporary.replace(job.folder / JOB)


def _delete(folder: Path) -> None:
    """Deletes a job's folder, which is none from the first moment on: a part of one would be taken for a job's.

    What a kill leaves of it goes at the next start.
    """
    gone = folder.with_name(DELETED + folder.name)
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(OSError):  # none there, or a disk that fails: then as much of it as can be
        folder.rename(gone)
    for path in (gone, folder):
        shutil.rmtree(path, ignore_errors=True)


def _is_damaged(folder: Path) -> bool:
    """Whether a folder that is no job holds one's bytes; one that was closed or never begun has lost its files."""
    there = {name for name in (JOB, UPLOAD, RESULT) if (folder / name).exists()}
    return UPLOAD in there or there == {JOB, RESULT}


def _row_of(folder: Path) -> dict[str, Any] | None:
    """What a job's folder tells where the database has lost it, but for its age, which begins anew.

    A result is one once the upload is gone, which is deleted when all of the result is on the disk: before that, a
    power cut may have left its files empty. A whole upload waits; a part of one begins again.

    Raises:
        OSError: the disk failed; what is there may be in order.
    """
    try:
        facts = json.loads((folder / JOB).read_bytes())
        submit, model = facts["submit"], json.dumps(facts["model"])
        is_done = not (folder / UPLOAD).exists()
        files = [asdict(described(path)) for path in sorted((folder / RESULT).glob("*"))] if is_done else []
        if files:
            state = State.DONE
        elif described(folder / UPLOAD).sha256 == submit["sha256"]:
            state = State.WAITING
        else:
            state = State.RECEIVING
        row: dict[str, Any] = {"key": folder.name, "state": state.value, "losses": 0, "offset": 0, "error": ""}
        row |= {**facts, "submit": json.dumps(submit), "model": model, "changed": time.time()}
        return {**row, "files": json.dumps(files)}
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, RecursionError, KeyError, TypeError):
        return None


def _job_of(row: Mapping[str, Any], folder: Path, now: float) -> Job | None:
    """A job from its row, or None where the row is none that this version wrote.

    Its time to begin counts anew: while no server ran, nothing could begin.
    """
    try:
        submit = protocol.Submit(**json.loads(row["submit"]))
        protocol.encode(submit)
        model = protocol.Model(**json.loads(row["model"]))
        protocol.encode(protocol.Ready((model,)))
        age_s = max(0.0, time.time() - float(row["changed"]))
        job = Job(
            bytes.fromhex(row["key"]), int(row["number"]), str(row["owner"]), submit, model, folder,
            float(row["created"]), now - age_s, now + submit.deadline_ms / 1000,
            state=State(row["state"]), durable=int(row["offset"]), losses=int(row["losses"]),
        )  # fmt: skip
        job.files = tuple(protocol.ResultFile(**file) for file in json.loads(row["files"]))
        if row["error"]:
            error = json.loads(row["error"])
            job.error = protocol.Error(**{**error, "job": bytes.fromhex(error["job"])})
            protocol.encode(job.error)
        protocol.encode(protocol.Done(job.key, job.files))
    except (ValueError, TypeError, KeyError):
        return None
    return job if (job.state is State.FAILED) == (job.error is not None) else None


def described(path: Path) -> protocol.ResultFile:
    """A file's name, size and digest."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return protocol.ResultFile(path.name, path.stat().st_size, digest)
