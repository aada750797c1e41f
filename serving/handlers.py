"""What clients ask of the gate, one method a message, and what they are told of their jobs.

Everything here is about frames, credit, the queue and the spool; nothing waits, and nothing is sent but by `Replies`.
"""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving import access, crew, protocol
from serving.health import Metrics
from serving.jobs import FIRST_STAGES, RESULT, Job, JobTable, State
from serving.replies import Refusal, Replies

if TYPE_CHECKING:
    from serving.config import ServerConfig

SENDER_IDLE_S = 5.0  # after which another connection may go on with the same upload
BUSY_MS = 500
ROUTE_BYTES = 5  # of the routing ids that ZeroMQ makes, the first of them 0
CREDIT_EVERY_S = 5.0  # at least, so that a sender on a slow link knows that it is heard

log = logging.getLogger("serving.handlers")


@dataclass
class Rate:
    """How many announcements a client may still make, filled up as time goes by."""

    left: float
    at: float


class Handlers:
    """Takes what comes from clients.

    Args:
        config: the server's file.
        secure: whether connections are told apart by their keys.
        front: the ROUTER that clients talk to.
        clients: who is let in.
        jobs, workers, metrics: the gate's.
        order: sends a message to a worker.
    """

    def __init__(
        self,
        config: ServerConfig,
        secure: bool,
        front: Any,
        clients: access.Clients,
        jobs: JobTable,
        workers: crew.Crew,
        metrics: Metrics,
        order: Callable[[crew.Worker, Any], None],
    ) -> None:
        self.config = config
        self.secure = secure
        self.spool = config.spool.resolve()
        self.clients = clients
        self.jobs = jobs
        self.workers = workers
        self.metrics = metrics
        self.replies = Replies(front, metrics, self.read)
        self.rates: dict[str, Rate] = {}
        self.draining = False
        self.queue_moved = False
        self._order = order

    def take(self, route: bytes, frames: list[bytes], user: str, now: float) -> None:
        """Answers a message of a client, told apart by its key where connections have keys."""
        self.replies.heard(route, user, now)
        job = frames[2] if len(frames) > 2 and len(frames[2]) == protocol.KEY_BYTES else b""
        try:
            if self.secure and self.clients.name_of(user) is None:  # its connection is older than that
                raise Refusal("NOT_AUTHORISED", "frame", "Expected a client that is let in, received one that is not"
                              " any more: ask the server's operator.", "access")  # fmt: skip
            if len(route) != ROUTE_BYTES or route[0]:  # another client may take the same, and hear of this one's jobs
                raise Refusal("BAD_FRAME", "frame", "Expected a connection whose routing id is left to the server,"
                              " received one with an id of its own: do not set it.", "access")  # fmt: skip
            message = protocol.decode(frames, protocol.FROM_CLIENT)
            _HANDLERS[type(message)](self, route, message, user, now)
        except protocol.BadFrame as error:
            self._refuse(route, Refusal(error.code, "frame", error.text, "access"), job)
        except Refusal as refusal:
            self._refuse(route, refusal, job)

    def _refuse(self, route: bytes, refusal: Refusal, job: bytes) -> None:
        self.metrics.refused.labels(refusal.code).inc()
        self.replies.send(route, refusal.message(job))

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
        models = self.models()
        self.replies.send(route, protocol.Welcome(protocol.VERSION, protocol.BUILD, self.workers.ready, taken, models))

    def _ping(self, route: bytes, message: protocol.Ping, owner: str, now: float) -> None:
        self.replies.send(route, protocol.Pong())

    def _submit(self, route: bytes, message: protocol.Submit, owner: str, now: float) -> None:
        self._check_rate(owner, now)
        model = self._check_submit(message)
        key = protocol.job_key(owner, message, model.sha256)
        job = self.jobs.get(key, owner)
        if job is not None and (job.state is State.FAILED or job.model != model):  # done by a version taken back since
            if job.state is not State.FAILED:
                self.tell_all(job, self._cancelled(job), but=route)
            self._stop(job)
            self.jobs.remove(job)
            job = None
        if job is None:
            job = self._new_job(key, message, model, owner, now)
            job.sender = route
        else:
            self._check_goes_on(job, now)
        job.routes.add(route)
        job.touched = now
        job.expires = max(job.expires, now + message.deadline_ms / 1000)
        if job.state is not State.RECEIVING:  # nothing is to be sent
            self.replies.send(route, protocol.Accepted(key, message.bytes, message.bytes))
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
        models = self.models()
        model = self.meant(message, models)
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

    def meant(self, message: protocol.Submit, models: Sequence[protocol.Model]) -> protocol.Model | None:
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
        if len(self.jobs) >= limits.jobs:
            raise self._busy(f"The server is busy with {len(self.jobs)} jobs; try again later.")
        own = self.jobs.of_owner(owner)
        if len(own) >= limits.jobs_per_client:
            raise self._busy(f"Expected at most {limits.jobs_per_client} jobs of one client, received one more.")
        self._check_comes_in(own, now)
        try:
            self._check_room(message.bytes + message.content_bytes, now)
            job = self.jobs.add(key, message, model, owner, now)
        except OSError as error:
            raise self.storage_failure(error, "submit") from error
        job.until = min(message.bytes, limits.window_bytes)
        log.info("job %s: %s, %d bytes announced by %s", job.label, message.model, message.bytes, self._name(owner))
        return job

    def _check_goes_on(self, job: Job, now: float) -> None:
        """Whether an upload that stood still, and held no place meanwhile, may go on; it stays where it is if not."""
        if job.state is not State.RECEIVING or self.jobs.is_coming_in(job, now):
            return
        job.turned_away = now  # if it is: it was heard of
        self._check_comes_in(self.jobs.of_owner(job.owner), now)
        try:
            self._check_room(job.submit.bytes - job.offset + job.submit.content_bytes, now)
        except OSError as error:
            raise self.storage_failure(error, "upload") from error

    def _check_comes_in(self, own: Sequence[Job], now: float) -> None:
        """Whether one more of an owner, who has these jobs, may be uploaded."""
        limits, coming_in = self.config.limits, self.jobs.receiving(now)
        lacking = {entry.served for entry in self.workers.lacking}  # what waits for those holds nobody up
        queued = self.jobs.queued(but=lacking)
        if queued >= limits.queue or len(coming_in) >= limits.uploads:
            raise self._busy(f"The server is busy: {queued} scans wait, {len(coming_in)} come in; try again later.")
        if self.secure:
            self._check_share([job for job in own if job.model not in lacking or job in coming_in], coming_in)

    def _check_room(self, wanted_bytes: int, now: float) -> None:
        """OSError ENOSPC where the spool has no room for so many bytes beside what is coming already."""
        left = shutil.disk_usage(self.spool).free - self.jobs.reserved_bytes(now)
        if left - wanted_bytes < self.config.limits.spool_free_bytes:
            raise OSError(errno.ENOSPC, "below the mark")

    def _check_share(self, own: Sequence[Job], coming_in: Sequence[Job]) -> None:
        """Leaves the others half of the queue and of the uploads."""
        limits = self.config.limits
        waiting = sum(job.state is State.WAITING and job.step < crew.PACK for job in own)
        sending = sum(job in coming_in for job in own)
        if waiting + sending >= max(1, limits.queue // 2) or sending >= max(1, limits.uploads // 2):
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
        self._check_goes_on(job, now)
        if job.began is None:
            job.began = job.credited = now
        job.touched = now
        try:
            self.jobs.write(job, message.payload)
            self.metrics.received_bytes.inc(len(message.payload))
            if job.offset == job.submit.bytes:
                self._stored(job, now)
            elif self._is_due(job, now):
                self.jobs.flush(job)
                job.until, job.credited = min(job.submit.bytes, job.offset + self.config.limits.window_bytes), now
                self.replies.send(route, protocol.Credit(job.key, job.until))
        except OSError as error:
            refusal = self.storage_failure(error, "upload")
            self.fail(job, refusal, now)

    def _is_due(self, job: Job, now: float) -> bool:
        """Whether a sender should hear again: half its credit is used, or its link is slow."""
        goes_on = job.until < job.submit.bytes and job.until - job.offset <= self.config.limits.window_bytes // 2
        return goes_on or now - job.credited >= CREDIT_EVERY_S

    def _stored(self, job: Job, now: float) -> None:
        began = now if job.began is None else job.began
        if not self.jobs.stored(job, now):
            text = f"Expected the announced SHA-256, received other bytes in {job.submit.name}; send it again."
            self.fail(job, Refusal("DIGEST_MISMATCH", "upload", text, "access", True), now)
            return
        job.received_ms = int(1000 * (now - began))
        self.metrics.stage.labels("receive").observe(now - began)
        log.info("job %s: stored", job.label)
        for route in job.routes:
            self.replies.send(route, protocol.Stored(job.key, job.submit.sha256))
        self.tell_all(job)

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
        self.replies.send(route, protocol.Listing(len(jobs), tuple(facts)))

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
        self.replies.send(route, message)

    def read(self, owner: str, message: protocol.Fetch) -> Any:
        """The bytes that a FETCH asks for, read when the connection can take them."""
        job = self.jobs.get(message.job, owner)
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
            return self.storage_failure(error, "fetch").message(job.key)

    def _close(self, route: bytes, message: protocol.Close, owner: str, now: float) -> None:
        job = self._job(message.job, owner, "queue")
        job.routes.discard(route)
        news = protocol.Credit(job.key, job.until) if job.state is State.RECEIVING else None
        self.tell_all(job, news)  # what cannot be told is gone, and no reason to keep the job
        if not any(other in self.replies for other in job.routes):
            self._stop(job)
            self.jobs.remove(job)
            log.info("job %s: closed", job.label)
            self.queue_moved = True
        elif job.sender == route:
            job.sender = b""
        self.replies.send(route, protocol.Closed(message.job))

    def _cancel(self, route: bytes, message: protocol.Cancel, owner: str, now: float) -> None:
        job = self.jobs.get(message.job, owner)
        if job is None and not self.jobs.is_ending(message.job, owner):
            raise self._unknown("queue")
        if job is not None and job.state not in (State.DONE, State.FAILED):
            self.tell_all(job, self._cancelled(job), but=route)
            self.metrics.jobs_failed.labels("CANCELLED").inc()
        if job is not None:
            self._stop(job)
            self.jobs.remove(job)
            log.info("job %s: cancelled", job.label)
            self.queue_moved = True
        self.replies.send(route, protocol.Cancelled(message.job))

    def _cancelled(self, job: Job) -> protocol.Error:
        text = f"The job of {job.submit.name} was cancelled."
        return Refusal("CANCELLED", "queue", text, "access").message(job.key)

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
        return (self.clients.name_of(owner) or "a client unknown") if self.secure else "a local client"

    def models(self) -> tuple[protocol.Model, ...]:
        """What clients can ask for; while nothing is loaded, what will be."""
        generation = self.workers.serving or self.workers.coming
        return self.workers.models or tuple(entry.served for entry in (generation.entries if generation else ()))

    def storage_failure(self, error: OSError, stage: str) -> Refusal:
        """What a client hears of a spool that is full or broken; the log says what the system said."""
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
            self.replies.send(route, job.error)
        elif job.state is State.RECEIVING:
            self.replies.send(route, self._go_on(job, route, now))
        elif job.state is State.DONE:
            self.replies.send(route, protocol.Done(job.key, job.files))
        else:
            self.replies.send(route, self._progress(job))

    def _go_on(self, job: Job, route: bytes, now: float) -> protocol.Accepted:
        """Where an upload goes on, for the connection that sends it; another one takes over from one that went."""
        if route != job.sender:
            self.replies.send(job.sender, protocol.Credit(job.key, job.until))  # one that is gone is forgotten by this
            if self.replies.silent_s(job.sender, now) > SENDER_IDLE_S:
                job.sender = route
        if route != job.sender:
            return protocol.Accepted(job.key, job.offset, job.offset)
        try:
            self.jobs.reopen(job)
        except OSError as error:
            raise self.storage_failure(error, "upload") from error
        job.until = max(job.until, min(job.submit.bytes, job.offset + self.config.limits.window_bytes))
        return protocol.Accepted(job.key, job.offset, job.until)

    def _progress(self, job: Job) -> protocol.Progress:
        if job.progress is not None:
            return job.progress
        return protocol.Progress(job.key, _where(job), self.jobs.position(job), 0, 0)

    def tell_all(self, job: Job, message: Any = None, but: bytes = b"") -> None:
        """Sends the connections that want to hear of a job a message, or how far it is."""
        for route in list(job.routes):
            if route not in self.replies:
                job.routes.discard(route)
            elif route != but and message is not None:
                self.replies.send(route, message)
            elif route != but:
                self._tell(job, route, time.monotonic())

    def tell_queue(self) -> None:
        """Tells who waits the new places, once a turn however many moved."""
        if not self.queue_moved:
            return
        self.queue_moved = False
        for job in self.jobs:
            if job.state is State.WAITING and job.step < crew.PACK:
                self.tell_all(job)

    def fail(self, job: Job, refusal: Refusal, now: float) -> None:
        """Ends a job without a result and tells who waits for it."""
        log.info("job %s: failed at %s with %s", job.label, refusal.stage, refusal.code)
        if job.abandoned:
            job.state = State.FAILED
            self.jobs.remove(job)
            return
        self.metrics.jobs_failed.labels(refusal.code).inc()
        self.jobs.fail(job, refusal.message(job.key), now)
        self.tell_all(job)


def _where(job: Job) -> str:
    """A job's place on its way, as LISTING says it."""
    if job.state is State.RUNNING:
        return job.progress.stage if job.progress else FIRST_STAGES[job.step]
    return "queue" if job.state is State.WAITING else job.state.value


_HANDLERS: dict[type[Any], Callable[[Handlers, bytes, Any, str, float], None]] = {
    protocol.Hello: Handlers._hello,
    protocol.Ping: Handlers._ping,
    protocol.Submit: Handlers._submit,
    protocol.Chunk: Handlers._chunk,
    protocol.Status: Handlers._status,
    protocol.List: Handlers._list,
    protocol.Fetch: Handlers._fetch,
    protocol.Close: Handlers._close,
    protocol.Cancel: Handlers._cancel,
}
