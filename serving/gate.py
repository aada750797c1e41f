"""The gate: the one process that clients talk to. It keeps frames, credit, the queue and the spool, and nothing else.

    clients DEALER ==tcp== ROUTER gate ROUTER ==ipc, folder 0700== DEALER workers

One thread, one loop. No scan is parsed or unpacked here and neither NumPy nor TensorFlow is imported; bulk never goes
over ipc, the workers find it in the spool. What a client can make the gate hold in memory is bounded: frames by
MAXMSGSIZE, messages by the high-water marks, answers by its outbox, uploads by credit, which is granted for what is on
disk.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import re
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zmq

from serving import protocol, supervisor
from serving.jobs import Job, JobTable, State

if TYPE_CHECKING:
    from serving.config import ServerConfig

TICK_MS, FLUSH_MS = 100, 5
MESSAGES_A_ROUND = 64
OUTBOX_MAX = 64
CLIENT_IDLE_S = 600.0
BUSY_MS = 500
STARTS_MAX = 3  # of a worker that ends before it is ready, in a row
RESTART_MAX_S = 30.0
PORT_MAX = 65535
IPC_FOLDER, IPC_SOCKET = ".ipc", "workers"
SOCKET_PATH_BYTES_MAX = 107  # of a Unix socket on Linux

log = logging.getLogger("serving.gate")


class Refusal(Exception):
    """A request that gets an ERROR instead of its answer."""

    def __init__(
        self, code: str, stage: str, text: str, fault: str = "input", retryable: bool = False, retry_after_ms: int = 0
    ) -> None:
        super().__init__(text)
        self.code = code
        self.stage = stage
        self.text = text
        self.fault = fault
        self.retryable = retryable
        self.retry_after_ms = retry_after_ms

    def message(self, job: bytes) -> protocol.Error:
        """As it goes to the client."""
        text = protocol.clean(self.text)
        return protocol.Error(job, self.code, self.stage, self.fault, self.retryable, self.retry_after_ms, text)


class CannotServe(Exception):
    """The server cannot start; `exit_code` and a sentence."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


@dataclass
class Outbox:
    """Answers that a connection has not taken yet; times in seconds of the monotonic clock."""

    heard: float
    waiting: deque[list[bytes]] = field(default_factory=deque)


def check_bind(address: str) -> None:
    """Refuses any address but TCP on loopback, since the connection is neither encrypted nor authenticated.

    The port has to be one: ZeroMQ takes a number beyond the largest and binds it modulo 65536.

    Raises:
        CannotServe: exit code 2.
    """
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    is_port = port == "*" or (re.fullmatch(r"[0-9]{1,5}", port) and int(port) <= PORT_MAX)
    with contextlib.suppress(ValueError):
        if address.startswith("tcp://") and is_port and ipaddress.ip_address(host.strip("[]")).is_loopback:
            return
    raise CannotServe(
        f"Expected 'bind' as tcp://, a loopback address, since the connection is not encrypted, and a port up to"
        f" {PORT_MAX} or *, such as tcp://127.0.0.1:5557, received {address}.",
        exit_code=2,
    )


def make_ipc_folder(spool: Path) -> Path:
    """Makes the folder (mode 0700) of the socket to the workers.

    In the spool, where the next server clears up what a killed one left; where the spool's path is too long for a
    socket, among the system's temporary files.

    Args:
        spool: absolute, and this server's alone.
    """
    folder = spool / IPC_FOLDER
    if len(os.fsencode(folder / IPC_SOCKET)) > SOCKET_PATH_BYTES_MAX:
        return Path(tempfile.mkdtemp(prefix="lvseg-"))
    folder.mkdir(mode=0o700)
    return folder


class Gate:
    """A server's sockets, jobs and workers.

    Args:
        config: the server's file.
        models: the models it serves.
        folders: version folder of each model's name.
        worker_command: what to start as a worker, supervisor.WORKER_COMMAND but for tests.

    Raises:
        CannotServe: the address is not loopback, or taken.
    """

    def __init__(
        self,
        config: ServerConfig,
        models: Sequence[protocol.Model],
        folders: Mapping[str, Path],
        worker_command: Sequence[str] = supervisor.WORKER_COMMAND,
    ) -> None:
        check_bind(config.bind)
        self.config = config
        self.models = tuple(models)
        self.folders = folders
        self.worker_command = worker_command
        self.spool = config.spool.resolve()
        self.jobs = JobTable(self.spool)
        self.outboxes: dict[bytes, Outbox] = {}
        self.workers: dict[bytes, supervisor.Worker] = {}
        self.was_ready = False
        self.failed_starts = 0
        self.restart_at = 0.0
        self.ipc_folder = make_ipc_folder(self.spool)
        self.context = zmq.Context()
        self.front = self.context.socket(zmq.ROUTER)
        self.back = self.context.socket(zmq.ROUTER)
        self._bind()

    def run(self, stopping: Callable[[], bool], on_ready: Callable[[], None]) -> None:
        """Serves until `stopping`.

        Args:
            stopping: asked ten times a second.
            on_ready: called once, when all workers have loaded and warmed up their models.

        Raises:
            CannotServe: a model cannot be served, or workers end before they are ready.
        """
        poller = zmq.Poller()
        poller.register(self.front, zmq.POLLIN)
        poller.register(self.back, zmq.POLLIN)
        check_at = 0.0
        while not stopping():
            unsent = any(box.waiting for box in self.outboxes.values())
            ready = dict(poller.poll(FLUSH_MS if unsent else TICK_MS))
            now = time.monotonic()
            if self.back in ready:
                self._drain(self.back, self._from_worker, now)
            if self.front in ready:
                self._drain(self.front, self._from_client, now)
            if now >= check_at:  # not at every message: both look at all workers and jobs
                check_at = now + TICK_MS / 2000
                self._watch_workers(now)
                self._expire(now)
            self._dispatch(now)
            self._flush()
            if not self.was_ready and len(self.workers) == self.config.workers:
                self.was_ready = all(worker.ready for worker in self.workers.values())
                if self.was_ready:
                    on_ready()

    def close(self) -> None:
        """Tells who waits, ends the workers, deletes what lies in the spool."""
        for job in self.jobs:
            if job.state is not State.FAILED:
                stopping = Refusal("SERVER_STOPPING", "queue", "The server stops; send the scan again.", "access", True)
                self._send(job.route, stopping.message(job.key))
        supervisor.end(list(self.workers.values()))
        for job in self.jobs:
            job.state = State.FAILED  # no worker is left to hold its folder
            self.jobs.remove(job)
        self.front.close(linger=500)
        self.back.close(linger=0)
        self.context.term()
        shutil.rmtree(self.ipc_folder, ignore_errors=True)

    # ---- sockets

    def _bind(self) -> None:
        for socket in (self.front, self.back):
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an answer to nobody is an error here, not silence
            socket.setsockopt(zmq.MAXMSGSIZE, protocol.FRAME_BYTES_MAX)
            socket.setsockopt(zmq.RCVHWM, 64)
            socket.setsockopt(zmq.SNDHWM, 64)
        self.front.setsockopt(zmq.HANDSHAKE_IVL, 3000)
        self.front.setsockopt(zmq.BACKLOG, 1024)
        self.front.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        self.front.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15000)
        self.front.setsockopt(zmq.HEARTBEAT_TTL, 30000)
        self.front.setsockopt(zmq.IPV6, int("[" in self.config.bind))
        self.back_endpoint = f"ipc://{self.ipc_folder}/{IPC_SOCKET}"
        for socket, address in ((self.front, self.config.bind), (self.back, self.back_endpoint)):
            try:
                socket.bind(address)
            except zmq.ZMQError as error:
                self.front.close(linger=0)
                self.back.close(linger=0)
                self.context.term()
                shutil.rmtree(self.ipc_folder)
                reason = "an address in use" if error.errno == errno.EADDRINUSE else f"'{error}'"
                raise CannotServe(f"Expected a free address to bind, received {reason} for {address}.", 2) from error
        self.endpoint = self.front.getsockopt_string(zmq.LAST_ENDPOINT)

    def _drain(self, socket: zmq.Socket[bytes], take: Callable[[bytes, list[bytes], float], None], now: float) -> None:
        for _ in range(MESSAGES_A_ROUND):  # then the other side gets its turn
            try:
                route, *frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            take(route, frames, now)

    def _send(self, route: bytes, message: Any) -> None:
        self._post(route, protocol.encode(message))

    def _post(self, route: bytes, frames: list[bytes]) -> None:
        """Sends at once, or keeps for later what the connection does not take; forgets connections that are gone."""
        box = self.outboxes.get(route)
        if box is None:
            return  # gone; its jobs stay for STATUS from another connection
        if not box.waiting:
            try:
                self.front.send_multipart([route, *frames], zmq.NOBLOCK)
                return
            except zmq.Again:
                pass
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                del self.outboxes[route]
                return
        box.waiting.append(frames)
        if len(box.waiting) > OUTBOX_MAX:
            log.info("a connection does not read its answers and is given up")
            del self.outboxes[route]

    def _flush(self) -> None:
        for route, box in list(self.outboxes.items()):
            waiting, box.waiting = box.waiting, deque()
            while waiting and route in self.outboxes and not box.waiting:
                self._post(route, waiting.popleft())
            box.waiting.extend(waiting)

    # ---- clients

    def _from_client(self, route: bytes, frames: list[bytes], now: float) -> None:
        box = self.outboxes.setdefault(route, Outbox(now))
        box.heard = now
        job = frames[2] if len(frames) > 2 and len(frames[2]) == protocol.KEY_BYTES else b""
        try:
            message = protocol.decode(frames, protocol.FROM_CLIENT)
            _HANDLERS[type(message)](self, route, message, now)
        except protocol.BadFrame as error:
            self._send(route, Refusal(error.code, "frame", error.text, "access").message(job))
        except Refusal as refusal:
            self._send(route, refusal.message(job))

    def _hello(self, route: bytes, message: protocol.Hello, now: float) -> None:
        if not message.proto_min <= protocol.VERSION <= message.proto_max:
            raise Refusal(
                "PROTO_UNSUPPORTED",
                "frame",
                f"Expected a client of protocol {protocol.VERSION}, received one of {message.proto_min} to"
                f" {message.proto_max}: update the older of the two.",
                "access",
            )
        limits = self.config.limits
        taken = protocol.Limits(limits.upload_bytes, limits.content_bytes, limits.members, limits.chunk_bytes)
        ready = any(worker.ready for worker in self.workers.values())
        self._send(route, protocol.Welcome(protocol.VERSION, protocol.BUILD, ready, taken, self.models))

    def _ping(self, route: bytes, message: protocol.Ping, now: float) -> None:
        self._send(route, protocol.Pong())

    def _submit(self, route: bytes, message: protocol.Submit, now: float) -> None:
        limits = self.config.limits
        known = [model.name for model in self.models]
        if message.model not in known:
            raise Refusal(
                "MODEL_UNKNOWN", "submit", f"Expected a model of {', '.join(known)}, received '{message.model}'."
            )
        for what, size, limit in (
            ("to be sent", message.bytes, limits.upload_bytes),
            ("unpacked", message.content_bytes, limits.content_bytes),
        ):
            if size > limit:
                raise Refusal(
                    "TOO_LARGE",
                    "submit",
                    f"Expected a scan of at most {limit} bytes {what}, received {size} bytes in {message.name}.",
                )
        if message.codec == "raw" and message.bytes != message.content_bytes:
            raise Refusal("BAD_FRAME", "submit", "Expected 'bytes' equal to 'content_bytes' for codec raw.", "access")
        full = self.jobs.queued >= limits.queue or self.jobs.receiving >= limits.uploads
        if full or len(list(self.jobs)) >= limits.jobs:
            raise Refusal(
                "BUSY",
                "submit",
                f"The server is busy: {self.jobs.queued} scans wait, {self.jobs.receiving} come in; try again later.",
                "access",
                True,
                BUSY_MS,
            )
        try:
            if shutil.disk_usage(self.spool).free - message.bytes < limits.spool_free_bytes:
                raise OSError(errno.ENOSPC, "below the mark")
            job = self.jobs.add(message, owner="", route=route, now=now)
        except OSError as error:
            raise self._storage_failure(error, "submit") from error
        job.until = min(message.bytes, limits.window_bytes)
        log.info("job %s: %s, %d bytes announced", job.label, message.model, message.bytes)
        self._send(route, protocol.Accepted(job.key, 0, job.until))

    def _chunk(self, route: bytes, message: protocol.Chunk, now: float) -> None:
        job = self._job(message.job, "upload")
        end = message.offset + len(message.payload)
        if job.state is not State.RECEIVING or message.offset != job.offset:
            raise Refusal(
                "BAD_OFFSET",
                "upload",
                f"Expected the upload to go on at byte {job.offset}, received a chunk at {message.offset} (job is"
                f" {job.state.value}); STATUS tells where to go on.",
                "access",
                True,
            )
        if end > job.until:
            raise Refusal(
                "OVER_CREDIT",
                "upload",
                f"Expected nothing beyond byte {job.until} yet, received {end}; STATUS tells where to go on.",
                "access",
                True,
            )
        job.route, job.touched = route, now
        try:
            self.jobs.write(job, message.payload)
        except OSError as error:
            self.jobs.remove(job)
            raise self._storage_failure(error, "upload") from error
        limits = self.config.limits
        if job.offset == job.submit.bytes:
            if not self.jobs.stored(job):
                self.jobs.remove(job)
                raise Refusal(
                    "DIGEST_MISMATCH",
                    "upload",
                    f"Expected the announced SHA-256, received other bytes in {job.submit.name}; send it again.",
                    "access",
                    True,
                )
            log.info("job %s: stored", job.label)
            self._send(route, protocol.Stored(job.key, job.submit.sha256))
            self._dispatch(now)
            self._tell(job)
        elif job.until < job.submit.bytes and job.until - job.offset <= limits.window_bytes // 2:
            job.until = min(job.submit.bytes, job.offset + limits.window_bytes)
            self._send(route, protocol.Credit(job.key, job.until))

    def _status(self, route: bytes, message: protocol.Status, now: float) -> None:
        job = self._job(message.job, "queue")
        job.route, job.touched = route, now
        self._tell(job)

    def _fetch(self, route: bytes, message: protocol.Fetch, now: float) -> None:
        job = self._job(message.job, "fetch")
        file = next((file for file in job.files if file.name == message.name), None)
        if file is None:
            known = ", ".join(file.name for file in job.files) or f"none yet, the job is {job.state.value}"
            raise Refusal("NO_SUCH_FILE", "fetch", f"Expected a result's file ({known}), received {message.name}.")
        if message.offset >= file.bytes:
            raise Refusal(
                "BAD_OFFSET", "fetch", f"Expected an offset below {file.bytes}, received {message.offset}.", "access"
            )
        job.route, job.touched = route, now
        try:
            with (job.folder / "result" / file.name).open("rb") as result:
                result.seek(message.offset)
                payload = result.read(message.bytes)
        except OSError as error:
            raise self._storage_failure(error, "fetch") from error
        self._send(route, protocol.Data(job.key, file.name, message.offset, payload))

    def _close(self, route: bytes, message: protocol.Close, now: float) -> None:
        job = self._job(message.job, "queue")
        for worker in self.workers.values():
            if worker.job is job:
                self._order(worker, protocol.Cancel(job.key))
        self.jobs.remove(job)
        log.info("job %s: closed", job.label)
        self._send(route, protocol.Closed(message.job))
        self._tell_queue()

    def _job(self, key: bytes, stage: str) -> Job:
        job = self.jobs.get(key, owner="")
        if job is None:
            raise Refusal("NOT_FOUND", stage, "Expected a job of this server, received an unknown key.", "access")
        return job

    def _storage_failure(self, error: OSError, stage: str) -> Refusal:
        log.error("the spool failed at %s: %s", stage, errno.errorcode.get(error.errno or 0, "unknown"))
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return Refusal(
                "STORAGE_FULL", stage, "The server's spool is full; try again later.", "server", True, 10 * BUSY_MS
            )
        return Refusal("STORAGE_FAILED", stage, "The server's spool cannot be used; tell its operator.", "server")

    def _tell(self, job: Job) -> None:
        """Sends what is to know about a job to the connection that asked last."""
        if job.error is not None:
            self._send(job.route, job.error)
        elif job.state is State.RECEIVING:
            self._send(job.route, protocol.Accepted(job.key, job.offset, job.until))
        elif job.state is State.DONE:
            self._send(job.route, protocol.Done(job.key, job.files))
        else:
            queued = protocol.Progress(job.key, "queue", self.jobs.position(job), 0, 0)
            self._send(job.route, job.progress or queued)

    def _tell_queue(self) -> None:
        for job in self.jobs:
            if job.state is State.QUEUED:
                self._tell(job)

    def _fail(self, job: Job, refusal: Refusal, now: float) -> None:
        log.info("job %s: failed at %s with %s", job.label, refusal.stage, refusal.code)
        if job.abandoned:
            job.state = State.FAILED
            self.jobs.remove(job)
            return
        self.jobs.fail(job, refusal.message(job.key), now)
        self._tell(job)

    # ---- workers

    def _from_worker(self, identity: bytes, frames: list[bytes], now: float) -> None:
        worker = self.workers.get(identity)
        if worker is None:
            return  # last words of a process that was given up; its job is with another already
        worker.heard = now
        try:
            message = protocol.decode(frames, protocol.FROM_WORKER)
        except protocol.BadFrame as error:
            log.error("worker %d: %s", worker.process.pid, error.text)
            self._lose(worker, now)
            return
        if isinstance(message, protocol.Ready):
            log.info("worker %d: ready", worker.process.pid)
            worker.ready, worker.stage = True, "idle"
            self.failed_starts = 0
        elif isinstance(message, protocol.Unable):
            self._unable(worker, message, now)
        elif not isinstance(message, protocol.Heartbeat):
            self._about_job(worker, message, now)

    def _about_job(self, worker: supervisor.Worker, message: Any, now: float) -> None:
        job = worker.job
        if job is None or job.key != message.job:
            log.error("worker %d: a word about a job that it does not have", worker.process.pid)
            return
        if isinstance(message, protocol.Step):
            if message.stage != worker.stage:
                worker.stage, worker.began = message.stage, now
            job.progress = protocol.Progress(job.key, message.stage, 0, message.done, message.total)
            job.touched = now
            box = self.outboxes.get(job.route)
            if box and not box.waiting and not job.abandoned:  # a slow reader gets the next one: only the last counts
                self._tell(job)
            return
        worker.job, worker.stage = None, "idle"
        if isinstance(message, protocol.Failed):
            self._fail(job, Refusal(message.code, message.stage, message.text, message.fault), now)
        elif job.abandoned:
            job.state = State.DONE
            self.jobs.remove(job)
        else:
            self.jobs.done(job, message.files, now)
            log.info("job %s: done", job.label)
            self._tell(job)

    def _unable(self, worker: supervisor.Worker, message: protocol.Unable, now: float) -> None:
        if not self.was_ready:
            raise CannotServe(message.text, exit_code=2)
        log.error("worker %d: %s: %s", worker.process.pid, message.code, message.text)
        self._lose(worker, now)

    def _order(self, worker: supervisor.Worker, message: Any) -> None:
        """Sends to a worker; one that cannot be reached is found by the watch."""
        try:
            self.back.send_multipart([worker.identity, *protocol.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.error("worker %d: cannot be reached (%s)", worker.process.pid, error.errno)

    def _dispatch(self, now: float) -> None:
        given = False
        for worker in self.workers.values():
            if worker.ready and worker.job is None and (job := self.jobs.next()):
                worker.job, worker.stage, worker.began, given = job, "unpack", now, True
                sent = job.submit
                work = protocol.Work(
                    job.key, sent.name, sent.kind, sent.model, sent.output, sent.codec, sent.content_bytes
                )
                self._order(worker, work)
        if given:
            self._tell_queue()

    def _watch_workers(self, now: float) -> None:
        """Starts what is missing; gives up what is dead, silent or stuck."""
        deadlines = self.config.deadlines
        for worker in list(self.workers.values()):
            stage_s = getattr(deadlines, f"{worker.stage}_s", None)
            if worker.process.poll() is not None:
                log.error("worker %d: ended with status %d", worker.process.pid, worker.process.returncode)
            elif now - worker.heard > (deadlines.silent_s if worker.ready else deadlines.start_s):
                log.error("worker %d: silent", worker.process.pid)
            elif stage_s is not None and now - worker.began > stage_s:
                log.error("worker %d: stuck at %s", worker.process.pid, worker.stage)
            else:
                continue
            self._lose(worker, now)
        limits = self.config.limits
        while len(self.workers) < self.config.workers and now >= self.restart_at:
            worker = supervisor.start(
                self.worker_command,
                self.back_endpoint,
                self.spool,
                self.folders,
                limits.members,
                limits.worker_memory_bytes,
                now,
            )
            self.workers[worker.identity] = worker

    def _lose(self, worker: supervisor.Worker, now: float) -> None:
        """Ends a worker for good and decides what becomes of its job."""
        supervisor.kill(worker)
        del self.workers[worker.identity]
        if not worker.ready:
            self.failed_starts += 1
            if self.failed_starts >= STARTS_MAX and not self.was_ready:
                raise CannotServe(
                    f"Expected workers that load their models, received {STARTS_MAX} that ended before; see above.", 1
                )
            self.restart_at = now + min(RESTART_MAX_S, 2.0 ** (self.failed_starts - 1))
        job = worker.job
        if job is None:
            return
        if job.abandoned or not self.jobs.again(job):
            text = (
                f"The process that worked on {job.submit.name} was lost {job.attempts} times, last at '{worker.stage}'."
            )
            self._fail(job, Refusal("POISON_INPUT", worker.stage, text), now)
            return
        log.info("job %s: queued again", job.label)
        job.progress = None
        self._tell_queue()

    # ---- time

    def _expire(self, now: float) -> None:
        deadlines = self.config.deadlines
        for job in self.jobs:
            idle_s = now - job.touched
            if job.state is State.QUEUED and now > job.expires:
                text = f"Expected a free worker in time, received none for {job.submit.name}; raise the time limit."
                self._fail(job, Refusal("EXPIRED", "queue", text, "access", True), now)
            elif job.state is State.RECEIVING and idle_s > deadlines.upload_idle_s:
                text = f"Expected the upload to go on, received nothing for {deadlines.upload_idle_s:.0f} s."
                self._fail(job, Refusal("EXPIRED", "upload", text, "access", True), now)
            elif job.state in (State.DONE, State.FAILED) and idle_s > deadlines.result_keep_s:
                log.info("job %s: nobody closed it", job.label)
                self.jobs.remove(job)
        for route, box in list(self.outboxes.items()):
            if now - box.heard > CLIENT_IDLE_S:
                del self.outboxes[route]


_HANDLERS: dict[type[Any], Callable[[Gate, bytes, Any, float], None]] = {
    protocol.Hello: Gate._hello,
    protocol.Ping: Gate._ping,
    protocol.Submit: Gate._submit,
    protocol.Chunk: Gate._chunk,
    protocol.Status: Gate._status,
    protocol.Fetch: Gate._fetch,
    protocol.Close: Gate._close,
}
