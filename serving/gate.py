"""The gate: the one process that clients talk to. It keeps frames, credit, the queue and the spool, and nothing else.

    clients DEALER ==tcp, CURVE== ROUTER gate ROUTER ==ipc, folder 0700== DEALER workers

One thread, one loop; `Handlers` answers the clients. No scan is parsed or unpacked here, neither NumPy nor TensorFlow
is imported; bulk never goes over ipc, the workers find it in the spool. What a client can make the gate hold in memory
is bounded: frames by MAXMSGSIZE, whole messages by the high-water marks, answers by `Replies`, which hold no file's
bytes, uploads by credit, which is granted for what is on disk. A client that is let in and sends one message of frames
without end is bounded by the memory limit of the service's unit alone: libzmq counts messages, not their frames.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zmq
import zmq.auth.thread
from zmq.utils.monitor import recv_monitor_message

from lvseg.errors import InputError
from serving import access, catalogue, crew, keys, protocol
from serving.errors import KeyFileError, KeyFileUnreadable
from serving.handlers import BUSY_MS, Handlers
from serving.health import Health, Metrics
from serving.jobs import FIRST_STAGES, STEPS, Job, JobTable, SpoolDamaged, State
from serving.replies import Refusal

if TYPE_CHECKING:
    from serving.config import ServerConfig

TICK_MS, FLUSH_MS = 100, 50
MESSAGES_A_ROUND = 64
STOOD_STILL_S = 1.0  # a turn that took longer stood still itself, with the machine, by a signal or for a disk
SEND_HWM, RECEIVE_HWM = 8, 16  # messages of a connection that libzmq holds, of up to 1 MiB each
CLIENT_IDLE_S = 600.0
AHEAD = 2  # scans that are unpacked before a process with models is free for them
PORT_MAX = 65535
IPC_FOLDER, IPC_SOCKET = ".ipc", "workers"
SOCKET_PATH_BYTES_MAX = 107  # of a Unix socket on Linux
ZAP_DOMAIN = "lvseg"
FAILED_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

log = logging.getLogger("serving.gate")


class CannotServe(Exception):
    """The server cannot start, or go on; `exit_code` and a sentence."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


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
        self.metrics = Metrics()
        self.was_ready = False
        self.spool_problem = ""
        self.models_problem = ""  # why the list of models could not be taken over
        try:
            self.jobs = JobTable(self.spool, time.monotonic())
            self.ipc_folder = make_ipc_folder(self.spool)
        except (OSError, SpoolDamaged) as error:
            raise CannotServe(f"Expected a spool that can be used, received '{error}' for {self.spool}.", 1) from error
        self.context = zmq.Context()
        self.guard: zmq.auth.thread.ThreadAuthenticator | None = None
        self.front = self.context.socket(zmq.ROUTER)
        self.back = self.context.socket(zmq.ROUTER)
        self.monitor = self.front.get_monitor_socket(FAILED_HANDSHAKES)
        self._secure()
        self._bind()
        self.workers = crew.Crew(config, self.back_endpoint, self.spool, worker_command)
        self.handlers = Handlers(
            config, pair is not None, self.front, self.clients, self.jobs, self.workers, self.metrics, self._order
        )
        self.replies = self.handlers.replies
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
                ready = dict(poller.poll(FLUSH_MS if self.replies.waiting else TICK_MS))
                now = time.monotonic()
                if now - turned > STOOD_STILL_S:
                    self.workers.excuse(now - turned)
                    self.jobs.excuse(now - turned)
                turned = now
                self.health.turn(now)
                if asked and not self.handlers.draining:
                    self.handlers.draining, drained_at = True, now + self.config.deadlines.drain_s
                    log.info("stopping: jobs at work may be done, others wait in the spool for the next start")
                at_work = self.workers.busy() or self.jobs.waiting(crew.PACK)
                if self.handlers.draining and (not at_work or now >= drained_at):
                    return
                if self.monitor in ready:
                    self._count_handshakes()
                if self.back in ready:
                    self._drain(self.back, self._from_worker, now)
                if self.front in ready:
                    self._drain(self.front, self.handlers.take, now)
                if now >= check_at:  # not at every message: these look at all workers and jobs
                    check_at = now + TICK_MS / 2000
                    self._follow_lists()
                    self._watch_workers(now)
                    self._expire(now)
                if now >= measure_at:
                    measure_at = now + 1.0
                    self._measure()
                self._dispatch(now)
                self.handlers.tell_queue()
                self.replies.flush()
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
                self.handlers.tell_all(job, stopping.message(job.key))
        self.workers.end()
        self.jobs.close()
        self.health.close()
        self._close_sockets(500)

    def reasons(self) -> list[str]:
        """Why a scan sent now would not be done; asked from the thread of monitoring."""
        problems = []
        if self.handlers.draining:
            problems.append("the server stops")
        if not self.workers.ready:
            problems.append("models are being loaded" if not self.was_ready else "a worker is missing")
        problems += [f"the model {one.model}/{one.version} cannot be served" for one in self.workers.lacking]
        if self.spool_problem:
            problems.append(self.spool_problem)
        if self.clients.problem:
            problems.append("the list of clients cannot be read; the last one holds")
        if self.models_problem:
            problems.append("the list of models cannot be read; the last one holds")
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
                if not self.replies.is_behind(route):  # a slow reader gets the next: only the last counts
                    self.replies.send(route, job.progress)
            return
        self._stage_over(worker, now)
        self.workers.release(worker)
        if isinstance(message, protocol.Failed):
            retryable = message.code in ("STORAGE_FULL", "STORAGE_FAILED", "OUT_OF_MEMORY")
            wait_ms = 10 * BUSY_MS if retryable else 0
            self.handlers.fail(
                job, Refusal(message.code, message.stage, message.text, message.fault, retryable, wait_ms), now
            )
        elif job.abandoned:
            job.state = State.DONE
            self.jobs.remove(job)
        elif job.step < len(STEPS) - 1:
            self.jobs.advance(job, now)
            self.handlers.tell_all(job)
        else:
            try:
                self.jobs.done(job, message.files, now)
            except OSError as error:
                self.handlers.fail(job, self.handlers.storage_failure(error, "write"), now)
                return
            self.metrics.jobs_done.labels(job.submit.model).inc()
            log.info("job %s: done", job.label)
            self.handlers.tell_all(job)

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
        lacking = self._lacking()

        def can_go_on(job: Job) -> bool:
            return job.model not in lacking

        for step in steps[:1] if self.handlers.draining else steps:
            for worker in self.workers.idle(step):
                ahead = self.jobs.waiting(crew.SEGMENT, but=lacking)  # else they would hold up all others
                if step == crew.UNPACK and ahead >= AHEAD * self.workers.count(crew.SEGMENT):
                    break
                can = {crew.SEGMENT: worker.holds, crew.UNPACK: can_go_on}.get(step)
                job = self.jobs.next(step, now, can)
                if job is not None:
                    self._give(worker, job, now)
                    self.handlers.queue_moved = True

    def _give(self, worker: crew.Worker, job: Job, now: float) -> None:
        worker.job, worker.began = job, now
        worker.stage = FIRST_STAGES[worker.step]
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
        if not self.handlers.draining:
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
        if worker.process.returncode == -signal.SIGBUS:
            # A file that is read as memory could not be read; a second worker would find the same.
            text = f"The disk failed under the process that worked on {job.submit.name}; tell the server's operator."
            self.handlers.fail(job, Refusal("STORAGE_FAILED", stage, text, "server", True, 10 * BUSY_MS), now)
            return
        if job.abandoned or not self.jobs.again(job, now):
            text = f"The process that worked on {job.submit.name} was lost {job.losses} times, last at '{stage}'."
            self.handlers.fail(job, Refusal("POISON_INPUT", stage, text), now)
            return
        log.info("job %s: queued again", job.label)
        self.handlers.queue_moved = True

    # ---- time

    def _follow_lists(self) -> None:
        """Takes over what the operator's command changed."""
        self.clients.refresh()
        if self.clients.names is not self.let_in:
            self.let_in = self.clients.names
            if self.pair is not None:
                self.replies.forget_owners_but(self.let_in)
                for job in self.jobs:
                    if job.owner not in self.let_in:
                        job.routes.clear()
        if not self.allowed_models.changed():
            return
        try:
            listed = catalogue.read(self.allowed_models.path, self.config.models)
        except KeyFileError as error:
            if self.workers.serving is None:
                raise CannotServe(error.sentence, 2) from error
            if isinstance(error, KeyFileUnreadable):  # which says nothing of what is on it
                self.allowed_models.ask_again()
            if error.sentence != self.models_problem:
                log.error("models stay as they are: %s", error.sentence)
                self.metrics.reloads_failed.inc()
            self.models_problem = error.sentence
            return
        self.models_problem = ""
        entries = catalogue.to_serve(listed, self.config.serve)
        self._tell_not_served(listed)
        serving = self.workers.serving
        if serving is not None and serving.entries == entries and not self.workers.lacking:
            if self.workers.coming is not None:  # rolled back before it took over
                self.workers.reject("the list names again what is served")
                self.workers.reload_failed = None
            return
        self.workers.bring(entries)
        self._check_models()

    def _tell_not_served(self, listed: Sequence[catalogue.Entry]) -> None:
        """Logs the versions that somebody may expect to be served, and that are not."""
        try:
            others = catalogue.not_allowed(listed, self.config.models)
        except InputError as error:  # such as a folder of another user's: what is on the list is served all the same
            log.error("%s", error.sentence)
            others = []
        if others:
            log.warning("not served, since not allowed (serving.admin allow-model): %s", ", ".join(others))
        known = {(one.model, one.version) for one in listed}
        named = ((model, version) for model, versions in self.config.serve.items() for version in versions)
        if missing := [f"{model}/{version}" for model, version in named if (model, version) not in known]:
            log.warning("not served, though 'serve' names it, since it is not on the list: %s", ", ".join(missing))

    def _expire(self, now: float) -> None:
        deadlines = self.config.deadlines
        served = self.handlers.models()
        lacking = self._lacking()
        for job in self.jobs:
            idle_s = now - max(job.touched, job.turned_away)
            is_waiting = job.state is State.WAITING and job.step < crew.PACK
            if is_waiting and job.model in lacking:  # its operator may mend that, here or at another start
                if now > job.expires:
                    model = f"{job.model.name}/{job.model.version}"
                    text = f"Expected {model} to be loaded in time for {job.submit.name}; tell the server's operator."
                    self.handlers.fail(job, Refusal("EXPIRED", "queue", text, "access", True), now)
            elif is_waiting and self.was_ready and job.model not in served:
                self._reassign(job, served, now)
            elif is_waiting and not job.losses and now > job.expires:
                text = f"Expected a free worker in time, received none for {job.submit.name}; raise the time limit."
                self.handlers.fail(job, Refusal("EXPIRED", "queue", text, "access", True), now)
            elif job.state is State.RECEIVING and idle_s > deadlines.upload_idle_s:
                text = f"Expected the upload to go on, received nothing for {deadlines.upload_idle_s:.0f} s."
                self.handlers.fail(job, Refusal("EXPIRED", "upload", text, "access", True), now)
            elif job.state in (State.DONE, State.FAILED) and idle_s > deadlines.result_keep_s:
                log.info("job %s: nobody closed it", job.label)
                self.jobs.remove(job)
        waited_for = (job for job in self.jobs if job.state not in (State.DONE, State.FAILED))
        self.replies.forget_silent(now, CLIENT_IDLE_S, {route for job in waited_for for route in job.routes})

    def _lacking(self) -> set[protocol.Model]:
        return {entry.served for entry in self.workers.lacking}

    def _reassign(self, job: Job, served: Sequence[protocol.Model], now: float) -> None:
        """What becomes of a job whose version is not served any more: the current one does it, unless it was named."""
        model = self.handlers.meant(job.submit, served)
        if model is None:
            text = f"Expected a model that is still served for {job.submit.name}, received one that is not."
            self.handlers.fail(job, Refusal("MODEL_UNAVAILABLE", "queue", text, "access", True, BUSY_MS), now)
            return
        self.jobs.assign(job, model)

    def _measure(self) -> None:
        """The gauges, and whether the spool has room; notes that the server runs."""
        self.jobs.alive()
        for state in State:
            self.metrics.jobs.labels(state.value).set(sum(job.state is state for job in self.jobs))
        self.metrics.clients.set(len(self.replies))
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
