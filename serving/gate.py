"""The gate: the one process that clients talk to. It keeps frames, credit, the queue and the spool, and nothing else.

    clients DEALER ==tcp, CURVE== ROUTER gate ROUTER ==ipc, folder 0700== DEALER workers

One thread, one loop. No scan is parsed or unpacked here and neither NumPy nor TensorFlow is imported; bulk never goes
over ipc, the workers find it in the spool. What a client can make the gate hold in memory is bounded: frames by
MAXMSGSIZE, whole messages by the high-water marks, answers by its outbox, which holds no file's bytes, uploads by
credit, which is granted for what is on disk. A client that is let in and sends one message of frames without end is
bounded by the memory limit of the service's unit alone: libzmq counts messages, not their frames.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zmq
import zmq.auth.thread
from zmq.utils.monitor import recv_monitor_message

from lvseg.errors import InputError
from serving import access, catalogue, crew, keys, protocol
from serving.errors import KeyFileError
from serving.health import Health, Metrics
from serving.jobs import RESULT, STEPS, Job, JobTable, SpoolDamaged, State

if TYPE_CHECKING:
    from serving.config import ServerConfig

TICK_MS, FLUSH_MS = 100, 5
MESSAGES_A_ROUND = 64
OUTBOX_MAX = 256
STOOD_STILL_S = 1.0  # a loop that took longer was stopped itself, with the machine or by a signal
SEND_HWM, RECEIVE_HWM = 8, 16  # messages of a connection that libzmq holds, of up to 1 MiB each
CLIENT_IDLE_S = 600.0
SENDER_IDLE_S = 5.0  # after which another connection may go on with the same upload
BUSY_MS = 500
CREDIT_EVERY_S = 5.0  # at least, so that a sender on a slow link knows that it is heard
AHEAD = 2  # scans that are unpacked before a process with models is free for them
PORT_MAX = 65535
IPC_FOLDER, IPC_SOCKET = ".ipc", "workers"
SOCKET_PATH_BYTES_MAX = 107  # of a Unix socket on Linux
ZAP_DOMAIN = "lvseg"
FAILED_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

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
    """The server cannot start, or go on; `exit_code` and a sentence."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


@dataclass
class Outbox:
    """Answers that a connection has not taken yet; times in seconds of the monotonic clock."""

    heard: float
    owner: str
    waiting: deque[Any] = field(default_factory=deque)

    def keep(self, message: Any) -> None:
        """For later; of a job's news only the last counts."""
        if isinstance(message, protocol.Progress):
            old = (one for one in self.waiting if isinstance(one, protocol.Progress) and one.job == message.job)
            if (first := next(old, None)) is not None:
                self.waiting.remove(first)
        self.waiting.append(message)


@dataclass
class Rate:
    """How many announcements a client may still make, filled up as time goes by."""

    left: float
    at: float


def check_bind(address: str, insecure: bool) -> None:
    """Refuses what is no TCP address, and without encryption any but loopback.

    The port has to be one: ZeroMQ takes a number beyond the largest and binds it modulo 65536.

    Raises:
        CannotServe: exit code 2.
    """
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    is_port = port == "*" or (re.fullmatch(r"[0-9]{1,5}", port) and int(port) <= PORT_MAX)
    with contextlib.suppress(ValueError):
        if address.startswith("tcp://") and is_port:
            place = ipaddress.ip_address("0.0.0.0" if host == "*" else host.strip("[]"))
            if not insecure or place.is_loopback:
                return
    kind = "a loopback address, since with --insecure the connection is not encrypted," if insecure else "an IP address"
    raise CannotServe(
        f"Expected 'bind' as tcp://, {kind} and a port up to {PORT_MAX} or *, such as tcp://127.0.0.1:5557, received"
        f" {address}.",
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
        pair: the server's keys; None for a plain connection.
        worker_command: what to start as a worker, crew.WORKER_COMMAND but for tests.

    Raises:
        CannotServe: an address that cannot be bound, or a spool that cannot be used.
        InputError: the address for monitoring cannot be bound.
    """

    def __init__(
        self,
        config: ServerConfig,
        pair: keys.KeyPair | None,
        worker_command: Sequence[str] = crew.WORKER_COMMAND,
    ) -> None:
        check_bind(config.bind, insecure=pair is None)
        self.config = config
        self.pair = pair
        self.spool = config.spool.resolve()
        self.clients = access.Clients(config.access / access.CLIENTS)
        self.allowed_models = access.Watched(config.access / access.MODELS)
        self.let_in = self.clients.names
        self.outboxes: dict[bytes, Outbox] = {}
        self.rates: dict[str, Rate] = {}
        self.metrics = Metrics()
        self.was_ready = False
        self.draining = False
        self.queue_moved = False
        self.spool_problem = ""
        try:
            self.jobs = JobTable(self.spool, time.monotonic())
        except (OSError, SpoolDamaged) as error:
            raise CannotServe(f"Expected a spool that can be used, received '{error}' for {self.spool}.", 1) from error
        self.ipc_folder = make_ipc_folder(self.spool)
        self.context = zmq.Context()
        self.guard: zmq.auth.thread.ThreadAuthenticator | None = None
        self.front = self.context.socket(zmq.ROUTER)
        self.back = self.context.socket(zmq.ROUTER)
        self.monitor = self.front.get_monitor_socket(FAILED_HANDSHAKES)
        self._secure()
        self._bind()
        self.workers = crew.Crew(config, self.back_endpoint, self.spool, worker_command)
        try:
            self.health = Health(config.http, self.metrics, self.reasons)
            if self.health.address:
                log.info("monitoring at %s", self.health.address)
        except BaseException:
            self.jobs.close()
            self._close_sockets(0)
            raise

    def run(self, stopping: Callable[[], int], on_ready: Callable[[], None]) -> None:
        """Serves until it is told to stop.

        Args:
            stopping: asked ten times a second, how often it was told: once lets the jobs at work be done, twice does
                not.
            on_ready: called once, when all workers have loaded and warmed up their models.

        Raises:
            CannotServe: no model can be served, workers end before they are ready, or the database broke.
        """
        poller = zmq.Poller()
        for socket in (self.front, self.back, self.monitor):
            poller.register(socket, zmq.POLLIN)
        check_at = measure_at = drained_at = 0.0
        turned = time.monotonic()
        try:
            while (asked := stopping()) < 2:
                unsent = any(box.waiting for box in self.outboxes.values())
                ready = dict(poller.poll(FLUSH_MS if unsent else TICK_MS))
                now = time.monotonic()
                if now - turned > STOOD_STILL_S:
                    self.workers.excuse(now - turned)
                turned = now
                self.health.turn(now)
                if asked and not self.draining:
                    self.draining, drained_at = True, now + self.config.deadlines.drain_s
                    log.info("stopping: jobs at work may be done, others wait in the spool for the next start")
                at_work = self.workers.busy() or self.jobs.waiting(crew.PACK)
                if self.draining and (not at_work or now >= drained_at):
                    return
                if self.monitor in ready:
                    self._count_handshakes()
                if self.back in ready:
                    self._drain(self.back, self._from_worker, now)
                if self.front in ready:
                    self._drain(self.front, self._from_client, now)
                if now >= check_at:  # not at every message: these look at all workers and jobs
                    check_at = now + TICK_MS / 2000
                    self._follow_lists()
                    self._watch_workers(now)
                    self._expire(now)
                if now >= measure_at:
                    measure_at = now + 1.0
                    self._measure()
                self._dispatch(now)
                self._tell_queue()
                self._flush()
                if not self.was_ready and self.workers.ready:
                    self.was_ready = True
                    on_ready()
        except SpoolDamaged as error:
            raise CannotServe(f"Expected a sound database in the spool, received '{error}'; start again.", 1) from error

    def close(self) -> None:
        """Tells who waits, ends the workers; what lies in the spool is there for the next start."""
        stopping = Refusal(
            "SERVER_STOPPING", "queue", "The server stops; it goes on with this scan when it starts again.", "access",
            True, BUSY_MS,
        )  # fmt: skip
        for job in self.jobs:
            if job.state not in (State.DONE, State.FAILED):
                self._tell_all(job, stopping.message(job.key))
        self.workers.end()
        self.jobs.close()
        self.health.close()
        self._close_sockets(500)

    def reasons(self) -> list[str]:
        """Why a scan sent now would not be done; asked from the thread of monitoring."""
        problems = []
        if self.draining:
            problems.append("the server stops")
        if not self.workers.ready:
            problems.append("models are being loaded" if not self.was_ready else "a worker is missing")
        problems += [f"the model {one.model}/{one.version} cannot be served" for one in self.workers.lacking]
        if self.spool_problem:
            problems.append(self.spool_problem)
        return problems

    # ---- sockets

    def _secure(self) -> None:
        if self.pair is None:
            return
        self.guard = zmq.auth.thread.ThreadAuthenticator(self.context, log=logging.getLogger("serving.zap"))
        self.guard.log.setLevel(logging.WARNING)
        self.guard.start()
        self.guard.configure_curve_callback(ZAP_DOMAIN, self.clients)
        self.front.setsockopt(zmq.CURVE_SERVER, 1)
        self.front.setsockopt(zmq.CURVE_SECRETKEY, self.pair.secret.encode())
        self.front.setsockopt(zmq.CURVE_PUBLICKEY, self.pair.public.encode())
        self.front.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN.encode())

    def _bind(self) -> None:
        for socket in (self.front, self.back):
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an answer to nobody is an error here, not silence
            socket.setsockopt(zmq.MAXMSGSIZE, protocol.FRAME_BYTES_MAX)
            socket.setsockopt(zmq.RCVHWM, RECEIVE_HWM)
            socket.setsockopt(zmq.SNDHWM, SEND_HWM)
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
                self.jobs.close()
                self._close_sockets(0)
                reason = "an address in use" if error.errno == errno.EADDRINUSE else f"'{error}'"
                raise CannotServe(f"Expected a free address to bind, received {reason} for {address}.", 2) from error
        self.endpoint = self.front.getsockopt_string(zmq.LAST_ENDPOINT)

    def _close_sockets(self, linger: int) -> None:
        self.front.disable_monitor()
        self.monitor.close(linger=0)
        self.front.close(linger=linger)
        self.back.close(linger=0)
        if self.guard is not None:
            self.guard.stop()
        self.context.term()
        shutil.rmtree(self.ipc_folder, ignore_errors=True)

    def _count_handshakes(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                recv_monitor_message(self.monitor, zmq.NOBLOCK)
                self.metrics.handshakes_failed.inc()

    def _drain(self, socket: Any, take: Callable[[bytes, list[bytes], str, float], None], now: float) -> None:
        for _ in range(MESSAGES_A_ROUND):  # then the other side gets its turn
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            user = ""
            if self.pair is not None and socket is self.front:
                with contextlib.suppress(zmq.ZMQError):
                    user = str(frames[-1].get("User-Id"))
            route, *rest = [frame.bytes for frame in frames]
            take(route, rest, user, now)

    def _send(self, route: bytes, message: Any) -> None:
        self._post(route, message)

    def _post(self, route: bytes, message: Any) -> None:
        """Sends at once, or keeps for later what the connection does not take; forgets connections that are gone.

        What is kept for later of a file is the request, not its bytes.
        """
        box = self.outboxes.get(route)
        if box is None:
            return  # gone; its jobs stay for STATUS from another connection
        if not box.waiting:
            answer = self._read(box, message) if isinstance(message, protocol.Fetch) else message
            try:
                self.front.send_multipart([route, *protocol.encode(answer)], zmq.NOBLOCK)
                if isinstance(answer, protocol.Data):
                    self.metrics.sent_bytes.inc(len(answer.payload))
                return
            except zmq.Again:
                pass
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                del self.outboxes[route]
                return
        box.keep(message)
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

    def _from_client(self, route: bytes, frames: list[bytes], user: str, now: float) -> None:
        box = self.outboxes.setdefault(route, Outbox(now, user))
        box.heard = now
        job = frames[2] if len(frames) > 2 and len(frames[2]) == protocol.KEY_BYTES else b""
        try:
            if self.pair is not None and self.clients.name_of(user) is None:  # its connection is older than that
                raise Refusal("NOT_AUTHORISED", "frame", "Expected a client that is let in, received one that is not"
                              " any more: ask the server's operator.", "access")  # fmt: skip
            message = protocol.decode(frames, protocol.FROM_CLIENT)
            _HANDLERS[type(message)](self, route, message, user, now)
        except protocol.BadFrame as error:
            self._refuse(route, Refusal(error.code, "frame", error.text, "access"), job)
        except Refusal as refusal:
            self._refuse(route, refusal, job)

    def _refuse(self, route: bytes, refusal: Refusal, job: bytes) -> None:
        self.metrics.refused.labels(refusal.code).inc()
        self._send(route, refusal.message(job))

    def _hello(self, route: bytes, message: protocol.Hello, owner: str, now: float) -> None:
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
        models = self._models()
        self._send(route, protocol.Welcome(protocol.VERSION, protocol.BUILD, self.workers.ready, taken, models))

    def _ping(self, route: bytes, message: protocol.Ping, owner: str, now: float) -> None:
        self._send(route, protocol.Pong())

    def _submit(self, route: bytes, message: protocol.Submit, owner: str, now: float) -> None:
        self._check_rate(owner, now)
        model = self._check_submit(message)
        key = protocol.job_key(owner, message, model.sha256)
        job = self.jobs.get(key, owner)
        if job is not None and (job.state is State.FAILED or job.model != model):  # done by a version taken back since
            self._stop(job)
            self.jobs.remove(job)
            job = None
        if job is None:
            job = self._new_job(key, message, model, owner, now)
            job.sender = route
        job.routes.add(route)
        job.touched = now
        job.expires = max(job.expires, now + message.deadline_ms / 1000)
        if job.state is not State.RECEIVING:  # nothing is to be sent
            self._send(route, protocol.Accepted(key, message.bytes, message.bytes))
        self._tell(job, route, now)

    def _check_rate(self, owner: str, now: float) -> None:
        limit = self.config.limits.submits_a_minute
        rate = self.rates.setdefault(owner, Rate(limit, now))
        rate.left = min(limit, rate.left + (now - rate.at) * limit / 60)
        rate.at = now
        if rate.left < 1:
            raise self._busy(f"Expected at most {limit} scans a minute from one client, received more; try again.")
        rate.left -= 1

    def _check_submit(self, message: protocol.Submit) -> protocol.Model:
        if self.draining:
            raise Refusal("SERVER_STOPPING", "submit", "The server stops; try again.", "access", True, 4 * BUSY_MS)
        limits = self.config.limits
        models = self._models()
        model = self._meant(message, models)
        if model is None:
            known = ", ".join(f"{one.name}/{one.version}" for one in models) or "none yet"
            asked = f"{message.model}/{message.version}" if message.version else message.model
            raise Refusal("MODEL_UNKNOWN", "submit", f"Expected a model of those served ({known}), received '{asked}'.")
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
        return model

    def _meant(self, message: protocol.Submit, models: Sequence[protocol.Model]) -> protocol.Model | None:
        """The version that an announcement means, of those served.

        A name alone means the model's current version, never another one that happens to be loaded.
        """
        generation = self.workers.serving or self.workers.coming
        entries = generation.entries if generation else ()
        version = message.version or next((one.version for one in entries if one.model == message.model), 0)
        return next((one for one in models if (one.name, one.version) == (message.model, version)), None)

    def _new_job(self, key: bytes, message: protocol.Submit, model: protocol.Model, owner: str, now: float) -> Job:
        limits = self.config.limits
        if self.jobs.is_ending(key, owner):
            raise self._busy("The same scan was cancelled just now and is about to end; try again.")
        coming_in = self.jobs.receiving(now)
        if self.jobs.queued >= limits.queue or len(coming_in) >= limits.uploads or len(self.jobs) >= limits.jobs:
            raise self._busy(
                f"The server is busy: {self.jobs.queued} scans wait, {len(coming_in)} come in; try again later."
            )
        own = self.jobs.of_owner(owner)
        if len(own) >= limits.jobs_per_client:
            raise self._busy(f"Expected at most {limits.jobs_per_client} jobs of one client, received one more.")
        if self.pair is not None:
            self._check_share(own, coming_in)
        try:
            left = shutil.disk_usage(self.spool).free - self.jobs.reserved_bytes(now)
            if left - message.bytes - message.content_bytes < limits.spool_free_bytes:
                raise OSError(errno.ENOSPC, "below the mark")
            job = self.jobs.add(key, message, model, owner, now)
        except OSError as error:
            raise self._storage_failure(error, "submit") from error
        job.until = min(message.bytes, limits.window_bytes)
        log.info("job %s: %s, %d bytes announced by %s", job.label, message.model, message.bytes, self._name(owner))
        return job

    def _check_share(self, own: Sequence[Job], coming_in: Sequence[Job]) -> None:
        """Leaves the others their half of the queue and of the uploads."""
        waiting = sum(job.state is State.WAITING and job.step < crew.PACK for job in own)
        sending = sum(job in coming_in for job in own)
        if waiting > self.config.limits.queue // 2 or sending > self.config.limits.uploads // 2:
            raise self._busy(f"Your {waiting} scans wait and {sending} come in, which is your share; try again later.")

    def _busy(self, text: str) -> Refusal:
        return Refusal("BUSY", "submit", text, "access", True, BUSY_MS)

    def _chunk(self, route: bytes, message: protocol.Chunk, owner: str, now: float) -> None:
        job = self._job(message.job, owner, "upload")
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
        if end > job.until or route != job.sender:
            raise Refusal(
                "OVER_CREDIT",
                "upload",
                f"Expected nothing beyond byte {job.until if route == job.sender else job.offset} yet, received {end};"
                " STATUS tells where to go on.",
                "access",
                True,
            )
        if job.began is None:
            job.began = job.credited = now
        job.touched = now
        try:
            self.jobs.write(job, message.payload)
            self.metrics.received_bytes.inc(len(message.payload))
            if job.offset == job.submit.bytes:
                self._stored(job, now)
            elif job.until < job.submit.bytes and self._is_due(job, now):
                self.jobs.flush(job)
                job.until, job.credited = min(job.submit.bytes, job.offset + self.config.limits.window_bytes), now
                self._send(route, protocol.Credit(job.key, job.until))
        except OSError as error:
            refusal = self._storage_failure(error, "upload")
            self._fail(job, refusal, now)

    def _is_due(self, job: Job, now: float) -> bool:
        """Whether a sender should hear again: half its credit is used, or its link is slow."""
        return job.until - job.offset <= self.config.limits.window_bytes // 2 or now - job.credited >= CREDIT_EVERY_S

    def _stored(self, job: Job, now: float) -> None:
        began = now if job.began is None else job.began
        if not self.jobs.stored(job, now):
            text = f"Expected the announced SHA-256, received other bytes in {job.submit.name}; send it again."
            self._fail(job, Refusal("DIGEST_MISMATCH", "upload", text, "access", True), now)
            return
        job.received_ms = int(1000 * (now - began))
        self.metrics.stage.labels("receive").observe(now - began)
        log.info("job %s: stored", job.label)
        for route in job.routes:
            self._send(route, protocol.Stored(job.key, job.submit.sha256))
        self._dispatch(now)
        self._tell_all(job)

    def _status(self, route: bytes, message: protocol.Status, owner: str, now: float) -> None:
        job = self._job(message.job, owner, "queue")
        job.routes.add(route)
        if job.state is not State.RECEIVING:
            job.touched = now
        self._tell(job, route, now)

    def _list(self, route: bytes, message: protocol.List, owner: str, now: float) -> None:
        jobs = self.jobs.of_owner(owner)
        facts = [
            protocol.JobFacts(
                job.key.hex(), job.submit.name[-protocol.LISTED_CHARACTERS_MAX :], job.submit.model, _where(job),
                self.jobs.position(job),
            )
            for job in jobs[: protocol.LISTED_MAX]
        ]  # fmt: skip
        self._send(route, protocol.Listing(len(jobs), tuple(facts)))

    def _fetch(self, route: bytes, message: protocol.Fetch, owner: str, now: float) -> None:
        job = self._job(message.job, owner, "fetch")
        file = next((file for file in job.files if file.name == message.name), None)
        if file is None:
            known = ", ".join(file.name for file in job.files) or f"none yet, the job is {job.state.value}"
            raise Refusal("NO_SUCH_FILE", "fetch", f"Expected a result's file ({known}), received {message.name}.")
        if message.offset >= file.bytes:
            raise Refusal(
                "BAD_OFFSET", "fetch", f"Expected an offset below {file.bytes}, received {message.offset}.", "access"
            )
        job.routes.add(route)
        job.touched = now
        self._post(route, message)

    def _read(self, box: Outbox, message: protocol.Fetch) -> Any:
        """The bytes that a FETCH asks for, read when the connection can take them."""
        job = self.jobs.get(message.job, box.owner)
        if job is None:
            return self._unknown("fetch").message(message.job)
        try:
            with (job.folder / RESULT / message.name).open("rb") as result:
                result.seek(message.offset)
                piece = result.read(min(message.bytes, self.config.limits.chunk_bytes))
                if not piece:
                    raise OSError(errno.EIO, "the file is shorter than it was")
                return protocol.Data(job.key, message.name, message.offset, piece)
        except OSError as error:
            return self._storage_failure(error, "fetch").message(job.key)

    def _close(self, route: bytes, message: protocol.Close, owner: str, now: float) -> None:
        job = self._job(message.job, owner, "queue")
        job.routes.discard(route)
        news = protocol.Credit(job.key, job.until) if job.state is State.RECEIVING else None
        self._tell_all(job, news)  # what cannot be told is gone, and no reason to keep the job
        if not any(other in self.outboxes for other in job.routes):
            self._stop(job)
            self.jobs.remove(job)
            log.info("job %s: closed", job.label)
            self.queue_moved = True
        elif job.sender == route:
            job.sender = b""
        self._send(route, protocol.Closed(message.job))

    def _cancel(self, route: bytes, message: protocol.Cancel, owner: str, now: float) -> None:
        job = self.jobs.get(message.job, owner)
        if job is None and not self.jobs.is_ending(message.job, owner):
            raise self._unknown("queue")
        if job is not None and job.state not in (State.DONE, State.FAILED):
            cancelled = Refusal("CANCELLED", "queue", f"The job of {job.submit.name} was cancelled.", "access")
            self._tell_all(job, cancelled.message(job.key), but=route)
            self.metrics.jobs_failed.labels("CANCELLED").inc()
        if job is not None:
            self._stop(job)
            self.jobs.remove(job)
            log.info("job %s: cancelled", job.label)
            self.queue_moved = True
        self._send(route, protocol.Cancelled(message.job))

    def _stop(self, job: Job) -> None:
        """Tells the worker that has a job, if any, to end it."""
        for worker in self.workers:
            if worker.job is job:
                self._order(worker, protocol.Stop(job.key))

    def _job(self, key: bytes, owner: str, stage: str) -> Job:
        job = self.jobs.get(key, owner)
        if job is None:
            raise self._unknown(stage)
        return job

    def _unknown(self, stage: str) -> Refusal:
        return Refusal("NOT_FOUND", stage, "Expected a job of this server, received an unknown key.", "access")

    def _name(self, owner: str) -> str:
        return (self.clients.name_of(owner) or "a client unknown") if self.pair else "a local client"

    def _models(self) -> tuple[protocol.Model, ...]:
        """What clients can ask for; before anything is loaded, what will be."""
        coming = self.workers.coming
        if self.workers.models or coming is None or self.workers.serving is not None:
            return self.workers.models or self._served()
        return tuple(entry.served for entry in coming.entries)

    def _served(self) -> tuple[protocol.Model, ...]:
        """What is served but for the moment in which its process is started again."""
        serving = self.workers.serving
        return tuple(entry.served for entry in serving.entries) if serving else ()

    def _storage_failure(self, error: OSError, stage: str) -> Refusal:
        log.error("the spool failed at %s: %s", stage, errno.errorcode.get(error.errno or 0, "unknown"))
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return Refusal(
                "STORAGE_FULL", stage, "The server's spool is full; try again later.", "server", True, 10 * BUSY_MS
            )
        return Refusal(
            "STORAGE_FAILED",
            stage,
            "The server's spool cannot be used; tell its operator.",
            "server",
            True,
            10 * BUSY_MS,
        )

    # ---- news of a job

    def _tell(self, job: Job, route: bytes, now: float) -> None:
        """Sends one connection what is to know about a job."""
        if job.error is not None:
            self._send(route, job.error)
        elif job.state is State.RECEIVING:
            self._send(route, self._go_on(job, route, now))
        elif job.state is State.DONE:
            self._send(route, protocol.Done(job.key, job.files))
        else:
            self._send(route, self._progress(job))

    def _go_on(self, job: Job, route: bytes, now: float) -> protocol.Accepted:
        """Where an upload goes on, for the connection that sends it; another one takes over from one that went."""
        if route != job.sender:
            self._send(job.sender, protocol.Credit(job.key, job.until))  # one that is gone is forgotten by this
            sender = self.outboxes.get(job.sender)
            if sender is None or now - sender.heard > SENDER_IDLE_S:
                job.sender = route
        if route != job.sender:
            return protocol.Accepted(job.key, job.offset, job.offset)
        try:
            self.jobs.reopen(job)
        except OSError as error:
            raise self._storage_failure(error, "upload") from error
        job.until = max(job.until, min(job.submit.bytes, job.offset + self.config.limits.window_bytes))
        return protocol.Accepted(job.key, job.offset, job.until)

    def _progress(self, job: Job) -> protocol.Progress:
        if job.progress is not None:
            return job.progress
        return protocol.Progress(job.key, _where(job), self.jobs.position(job), 0, 0)

    def _tell_all(self, job: Job, message: Any = None, but: bytes = b"") -> None:
        """Sends the connections that want to hear of a job a message, or how far it is."""
        for route in list(job.routes):
            if route not in self.outboxes:
                job.routes.discard(route)
            elif route != but and message is not None:
                self._send(route, message)
            elif route != but:
                self._tell(job, route, time.monotonic())

    def _tell_queue(self) -> None:
        """Tells who waits the new places, once a turn however many moved."""
        if not self.queue_moved:
            return
        self.queue_moved = False
        for job in self.jobs:
            if job.state is State.WAITING and job.step < crew.PACK:
                self._tell_all(job)

    def _fail(self, job: Job, refusal: Refusal, now: float) -> None:
        log.info("job %s: failed at %s with %s", job.label, refusal.stage, refusal.code)
        if job.abandoned:
            job.state = State.FAILED
            self.jobs.remove(job)
            return
        self.metrics.jobs_failed.labels(refusal.code).inc()
        self.jobs.fail(job, refusal.message(job.key), now)
        self._tell_all(job)

    # ---- workers

    def _from_worker(self, identity: bytes, frames: list[bytes], _user: str, now: float) -> None:
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
            log.info("worker %d: ready to %s", worker.process.pid, STEPS[worker.step])
            if not self.workers.became_ready(worker, message.models):
                log.error("worker %d: loads nothing of what is served", worker.process.pid)
                self._lose(worker, now)
            self._check_models()
        elif isinstance(message, protocol.Unable):
            log.error("model %s/%d: %s: %s", message.model, message.version, message.code, message.text)
            worker.failed.append(message)
        elif not isinstance(message, protocol.Heartbeat):
            self._about_job(worker, message, now)

    def _check_models(self) -> None:
        """Ends the server where its first models cannot be served; later ones that cannot are its operator's."""
        why = self.workers.reload_failed
        if why is None or self.workers.coming is not None:
            return
        if self.workers.serving is None:
            raise CannotServe(why, exit_code=2)
        self.workers.reload_failed = None
        self.metrics.reloads_failed.inc()

    def _about_job(self, worker: crew.Worker, message: Any, now: float) -> None:
        job = worker.job
        if job is None or job.key != message.job:
            log.error("worker %d: a word about a job that it does not have", worker.process.pid)
            return
        if isinstance(message, protocol.Step):
            if message.stage != worker.stage:
                self._stage_over(worker, now)
                worker.stage, worker.began = message.stage, now
            job.progress = protocol.Progress(job.key, message.stage, 0, message.done, message.total)
            job.touched = now
            for route in list(job.routes):
                box = self.outboxes.get(route)
                if box and not box.waiting and not job.abandoned:  # a slow reader gets the next: only the last counts
                    self._send(route, job.progress)
            return
        self._stage_over(worker, now)
        self.workers.release(worker)
        if isinstance(message, protocol.Failed):
            retryable = message.code in ("STORAGE_FULL", "OUT_OF_MEMORY")
            wait_ms = 10 * BUSY_MS if retryable else 0
            self._fail(job, Refusal(message.code, message.stage, message.text, message.fault, retryable, wait_ms), now)
        elif job.abandoned:
            job.state = State.DONE
            self.jobs.remove(job)
        elif job.step < len(STEPS) - 1:
            self.jobs.advance(job, now)
            self._tell_all(job)
        else:
            try:
                self.jobs.done(job, message.files, now)
            except OSError as error:
                self._fail(job, self._storage_failure(error, "write"), now)
                return
            self.metrics.jobs_done.labels(job.submit.model).inc()
            log.info("job %s: done", job.label)
            self._tell_all(job)

    def _stage_over(self, worker: crew.Worker, now: float) -> None:
        if worker.stage in ("unpack", "read", "segment", "write"):
            self.metrics.stage.labels(worker.stage).observe(now - worker.began)

    def _order(self, worker: crew.Worker, message: Any) -> None:
        """Sends to a worker; one that cannot be reached is found by the watch."""
        try:
            self.back.send_multipart([worker.identity, *protocol.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.error("worker %d: cannot be reached (%s)", worker.process.pid, error.errno)

    def _dispatch(self, now: float) -> None:
        steps = (crew.PACK, crew.SEGMENT, crew.UNPACK)  # what is nearly done first
        for step in steps[:1] if self.draining else steps:
            for worker in self.workers.idle(step):
                ahead = self.jobs.waiting(crew.SEGMENT)
                if step == crew.UNPACK and ahead >= AHEAD * self.workers.count(crew.SEGMENT):
                    break
                job = self.jobs.next(step, now, worker.holds if step == crew.SEGMENT else None)
                if job is not None:
                    self._give(worker, job, now)
                    self.queue_moved = True

    def _give(self, worker: crew.Worker, job: Job, now: float) -> None:
        worker.job, worker.began = job, now
        worker.stage = crew.FIRST_STAGES[worker.step]
        if worker.step == crew.PACK:
            self.metrics.stage.labels("queue").observe(job.queued_s)
        sent = job.submit
        self._order(
            worker,
            protocol.Work(
                job.key, sent.name, sent.kind, sent.model, job.model.version, sent.modality, sent.output, sent.codec,
                sent.content_bytes, job.received_ms, int(1000 * job.queued_s),
            ),
        )  # fmt: skip

    def _watch_workers(self, now: float) -> None:
        """Starts what is missing; gives up what is dead, silent or stuck."""
        for worker, what in self.workers.silent_or_stuck(now):
            if self.workers.get(worker.identity) is not worker:
                continue  # ended meanwhile, with its generation of models
            log.error("worker %d (%s): %s", worker.process.pid, STEPS[worker.step], what)
            self._lose(worker, now)
        if not self.draining:
            self.workers.start_missing(now)

    def _lose(self, worker: crew.Worker, now: float) -> None:
        """Ends a worker for good and decides what becomes of its job."""
        self.metrics.workers_lost.labels(STEPS[worker.step]).inc()
        job, stage = worker.job, worker.stage
        if not self.workers.lose(worker, now):
            text = f"Expected workers that get ready, received {crew.STARTS_MAX} that ended before; see above."
            raise CannotServe(text, 1)
        self._check_models()
        if job is None:
            return
        if job.abandoned or not self.jobs.again(job, now):
            text = f"The process that worked on {job.submit.name} was lost {job.losses} times, last at '{stage}'."
            self._fail(job, Refusal("POISON_INPUT", stage, text), now)
            return
        log.info("job %s: queued again", job.label)
        self.queue_moved = True

    # ---- time

    def _follow_lists(self) -> None:
        """Takes over what the operator's command changed."""
        self.clients.refresh()
        if self.clients.names is not self.let_in:
            self.let_in = self.clients.names
            revoked = [route for route, box in self.outboxes.items() if box.owner not in self.let_in]
            for route in revoked if self.pair is not None else ():
                del self.outboxes[route]
        if not self.allowed_models.changed():
            return
        try:
            listed = catalogue.read(self.allowed_models.path, self.config.models)
            entries = catalogue.to_serve(listed, self.config.serve)
            if others := catalogue.not_allowed(listed, self.config.models):
                log.warning("not served, since not allowed (serving.admin allow-model): %s", ", ".join(others))
        except (KeyFileError, InputError) as error:
            if self.workers.serving is None:
                raise CannotServe(error.sentence, 2) from error
            log.error("models stay as they are: %s", error.sentence)
            self.metrics.reloads_failed.inc()
            return
        serving = self.workers.serving
        if serving is not None and serving.entries == entries and not self.workers.lacking:
            if self.workers.coming is not None:  # rolled back before it took over
                self.workers.reject("the list names again what is served")
                self.workers.reload_failed = None
            return
        self.workers.bring(entries)
        self._check_models()

    def _expire(self, now: float) -> None:
        deadlines = self.config.deadlines
        served = self._models()
        for job in self.jobs:
            idle_s = now - job.touched
            if job.state is State.WAITING and job.step < crew.PACK and self.was_ready and job.model not in served:
                self._reassign(job, served, now)
            elif job.state is State.WAITING and job.step < crew.PACK and now > job.expires:
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

    def _reassign(self, job: Job, served: Sequence[protocol.Model], now: float) -> None:
        """What becomes of a job whose version is not served any more: the current one does it, unless it was named."""
        model = self._meant(job.submit, served)
        if model is None:
            text = f"Expected a model that is still served for {job.submit.name}, received one that is not."
            self._fail(job, Refusal("MODEL_UNAVAILABLE", "queue", text, "access", True, BUSY_MS), now)
            return
        try:
            self.jobs.assign(job, model)
        except OSError as error:
            self._fail(job, self._storage_failure(error, "queue"), now)

    def _measure(self) -> None:
        """The gauges, and whether the spool has room."""
        for state in State:
            self.metrics.jobs.labels(state.value).set(sum(job.state is state for job in self.jobs))
        self.metrics.clients.set(len(self.outboxes))
        for step, name in enumerate(STEPS):
            self.metrics.workers.labels(name).set(sum(one.ready and one.step == step for one in self.workers))
        self.metrics.model.clear()
        for model in self.workers.models:
            self.metrics.model.labels(model.name, str(model.version), model.sha256).set(1)
        try:
            free = shutil.disk_usage(self.spool).free
        except OSError as error:
            self.spool_problem = f"the spool cannot be used: {error.strerror}"
            return
        self.metrics.spool_free_bytes.set(free)
        if self.jobs.problem:
            self.jobs.probe()
        if free < self.config.limits.spool_free_bytes:
            self.spool_problem = "the spool has less room than limits.spool_free_bytes"
        elif not os.access(self.spool, os.W_OK):
            self.spool_problem = "the spool cannot be written to"
        else:
            self.spool_problem = f"the spool's database says '{self.jobs.problem}'" if self.jobs.problem else ""


def _where(job: Job) -> str:
    """A job's place on its way, as LISTING says it."""
    if job.state is State.RUNNING:
        return job.progress.stage if job.progress else crew.FIRST_STAGES[job.step]
    return "queue" if job.state is State.WAITING else job.state.value


_HANDLERS: dict[type[Any], Callable[[Gate, bytes, Any, str, float], None]] = {
    protocol.Hello: Gate._hello,
    protocol.Ping: Gate._ping,
    protocol.Submit: Gate._submit,
    protocol.Chunk: Gate._chunk,
    protocol.Status: Gate._status,
    protocol.List: Gate._list,
    protocol.Fetch: Gate._fetch,
    protocol.Close: Gate._close,
    protocol.Cancel: Gate._cancel,
}
