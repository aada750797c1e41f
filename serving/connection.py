"""A client's connection to a server, as a library.

    with Client() as client:
        paths, measurements = client.segment(Path("scan.nii.gz"), "volume", Path("liver.vtk"))

Nothing here waits without a limit: a server that is not there, does not let this client in, does not answer or makes no
progress ends in an error with a sentence that says what to check. A connection that is lost, and a server that is
started again, cost time but nothing else. Runs without TensorFlow, NumPy and the rest of lvseg.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import ipaddress
import json
import os
import re
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq

from serving import keys, protocol
from serving.durable import sync_names
from serving.errors import EXIT_BAD_INPUT, EXIT_ERROR, EXIT_NETWORK, ClientError, KeyFileError, KeyFileUnreadable
from serving.outputs import check_outputs, is_sidecar, make_folder, sidecar_of, sync_file, writing
from serving.scans import Package, check_readable, files_of, is_sent_unchanged, name_of, package, reading

SERVER = "tcp://127.0.0.1:5557"
CONNECT_S = 5.0
SILENCE_S = 60.0  # a server that is started again answers within this; without a word for longer it is gone
SLICE_S = 0.2  # of a wait, after which it is looked whether to stop
ASK_S = 2.0  # without news for this long, STATUS asks; it also finds the job again after a lost connection
ANNOUNCE_S = 5.0  # without an answer for this long, SUBMIT is sent again: it may have been lost with a server
NO_DATA_S = 15.0  # a slow link takes long for each DATA; after this long without any, what was asked for is lost
FETCHES_AHEAD = 8
PORT_MAX = 65535
DEADLINE_MS_MAX = 86_400_000
# A connection that breaks off as it begins: once may be a server that is just being stopped.
BROKEN_MAX = 3
EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
OUT_OF_PLACE = frozenset({"BAD_OFFSET", "OVER_CREDIT"})  # of chunks that came where the server is not, or not yet
CORRUPT_MAX = 2  # uploads that do not arrive as they were sent; then it is not the network
SHORT_MAX = 3  # tries for which the server's memory did not suffice; then it is the scan that is too large for it
RETRY_S = 0.1  # at least, before another try
# After these the job is left with the server, where the same call finds it again.
LEFT = frozenset({"BAD_OUTPUT", "UNREACHABLE"})
OWN_KEY, LOCAL_KEY, HOME_KEY = "LVSEG_KEY", Path("access/local.json"), Path(".config/lvseg/client.json")

OnProgress = Callable[[str, int, int], None]
OnResult = Callable[[list[Path], dict[str, Any]], None]


class Unreachable(ClientError):
    """Nobody answers at the server's address; exit code 4."""

    def __init__(self, server: str) -> None:
        super().__init__(
            "UNREACHABLE",
            f"Expected an answer from a server at {server}, received none: check that it runs (its line 'ready' shows"
            " its address) and that no firewall is between.",
            EXIT_NETWORK,
        )


class Refused(ClientError):
    """The server said no; `error` is its message."""

    def __init__(self, error: protocol.Error, server: str, members: Sequence[str] = ()) -> None:
        def local(match: re.Match[str]) -> str:
            number = int(match[1])
            return members[number - 1] if 1 <= number <= len(members) else match[0]

        sentence = re.sub(r"\b([0-9]{6})\.(?:bin|dcm|ima|000)\b", local, error.text)
        if (error.code, error.fault) == ("NOT_FOUND", "access"):  # the readers have a code of that name, too
            sentence = (
                f"Expected the server at {server} to know the job, received '{sentence}' (it gave the job up, or it is"
                " somebody else's; send the scan again)."
            )
        exit_codes = {"input": EXIT_BAD_INPUT, "access": EXIT_NETWORK, "server": EXIT_ERROR}
        super().__init__(error.code, sentence, exit_codes[error.fault])
        self.error = error


def check_model(name: str) -> None:
    """Refuses what no server can know as a model, such as a folder.

    Raises:
        ClientError: MODEL_UNKNOWN, exit code 2.
    """
    plain, _, version = name.partition("/")
    if not protocol.is_model_name(plain) or not re.fullmatch(r"([1-9][0-9]{0,8})?", version) or name.endswith("/"):
        raise ClientError(
            "MODEL_UNKNOWN",
            f"Expected the name of a model such as volume or volume/3 (see the command models), received {name!r}.",
            EXIT_BAD_INPUT,
        )


def find_credentials(path: Path | None = None) -> keys.Credentials:
    """This client's keys.

    Args:
        path: the file; None for the first of $LVSEG_KEY, access/local.json (which a server makes for clients of its
            user on its computer) and ~/.config/lvseg/client.json.

    Raises:
        ClientError: BAD_KEY, exit code 2.
    """
    named = os.environ.get(OWN_KEY)
    places = [path] if path else [Path(named)] if named else [LOCAL_KEY, Path.home() / HOME_KEY]
    place = next((one for one in places if _is_there(one)), places[-1])
    try:
        return keys.read_credentials(place)
    except KeyFileUnreadable as error:
        raise ClientError("BAD_KEY", error.sentence, EXIT_BAD_INPUT) from error
    except KeyFileError as error:
        more = "" if _is_there(place) else " Make one with: python -m serving.client keys new."
        raise ClientError("BAD_KEY", error.sentence + more, EXIT_BAD_INPUT) from error


def _is_there(place: Path) -> bool:
    """Whether there is such a file, as far as this user may know: another's `access` folder is closed to it."""
    try:
        return keys.is_there(place)
    except KeyFileUnreadable:
        return False


class Client:
    """A connection to a server; use it in a `with` statement, from one thread.

    Args:
        server: its address, such as tcp://127.0.0.1:5557; None for that in the credentials.
        credentials: this client's keys; None for those that `find_credentials` finds.
        insecure: without keys and encryption, which only a server on this computer takes.
        connect_s: give up when no server takes the connection and greets within this.
        stop: once it is set, every wait ends with KeyboardInterrupt.

    Raises:
        ClientError: BAD_KEY or BAD_ADDRESS, exit code 2; UNREACHABLE, SERVER_KEY_MISMATCH, NOT_AUTHORISED or
            PROTO_UNSUPPORTED, exit code 4.
    """

    def __init__(
        self,
        server: str | None = None,
        credentials: keys.Credentials | None = None,
        *,
        insecure: bool = False,
        connect_s: float = CONNECT_S,
        stop: threading.Event | None = None,
    ) -> None:
        if credentials is None and not insecure:
            credentials = find_credentials()
        self.server = server or (credentials.server if credentials else "") or SERVER
        self._credentials = credentials
        self._secure = credentials is not None
        self._stop = stop or threading.Event()
        self._broken = 0
        self._greeted = False
        self._connections = self._noticed = 0  # begun, and those of them in which a job was asked for again
        self._asked = False  # for a job's STATUS, which is still to be answered
        self._leaving = False  # while a job is closed, which is to be said even by a client that stops
        self._behind = False  # answers of a scan that ended badly may still come
        self._context = zmq.Context()
        self._open_socket()
        try:
            self._connect(connect_s)
        except BaseException:
            self.close()
            raise

    def _open_socket(self) -> None:
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a server that is not there
        self._socket.setsockopt(zmq.RECONNECT_IVL, 250)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 5000)
        self._socket.setsockopt(zmq.MAXMSGSIZE, protocol.FRAME_BYTES_MAX)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15000)
        self._socket.setsockopt(zmq.RCVHWM, 64)
        self._socket.setsockopt(zmq.SNDHWM, 64)
        self._socket.setsockopt(zmq.IPV6, "[" in self.server)
        if self._credentials is not None:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, self._credentials.server_key.encode())
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, self._credentials.pair.public.encode())
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, self._credentials.pair.secret.encode())
        self._monitor = self._socket.get_monitor_socket(EVENTS)
        self._poller = zmq.Poller()
        self._poller.register(self._monitor, zmq.POLLIN)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        self._close_socket()
        self._context.term()

    def _close_socket(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()

    def welcome(self, limit_s: float = CONNECT_S) -> protocol.Welcome:
        """What the server says of itself: limits, models, whether they are loaded.

        Raises:
            ClientError: UNREACHABLE or PROTO_UNSUPPORTED.
        """
        limit = time.monotonic() + limit_s
        self._say(protocol.Hello(protocol.VERSION, protocol.VERSION, protocol.BUILD), limit)
        return self._expect(protocol.Welcome, limit)

    def ping(self, limit_s: float = CONNECT_S) -> float:
        """The milliseconds that a word there and back takes.

        Raises:
            ClientError: UNREACHABLE.
        """
        began = time.monotonic()
        self._say(protocol.Ping(), began + limit_s)
        self._expect(protocol.Pong, began + limit_s)
        return 1000 * (time.monotonic() - began)

    def jobs(self, limit_s: float = CONNECT_S) -> protocol.Listing:
        """This client's jobs, the newest first.

        Raises:
            ClientError: UNREACHABLE.
        """
        limit = time.monotonic() + limit_s
        self._say(protocol.List(), limit)
        listing: protocol.Listing = self._expect(protocol.Listing, limit)
        return listing

    def cancel(self, job: bytes, limit_s: float = CONNECT_S) -> None:
        """Ends a job, done or not, for everyone who waits for it.

        Args:
            job: its key.
            limit_s: for the answer.

        Raises:
            ClientError: NOT_FOUND or UNREACHABLE.
        """
        limit = time.monotonic() + limit_s
        self._say(protocol.Cancel(job), limit)
        while (message := self._take(limit)) is not None:
            if isinstance(message, protocol.Cancelled) and message.job == job:
                return
            if isinstance(message, protocol.Error) and message.job == job:
                raise Refused(message, self.server)
        raise Unreachable(self.server)

    def segment(
        self,
        scan: Path,
        model: str,
        out: Path,
        timeout_s: float = 600.0,
        on_progress: OnProgress = lambda stage, done, total: None,
        modality: str = "",
        on_result: OnResult = lambda paths, measurements: None,
    ) -> tuple[list[Path], dict[str, Any]]:
        """Has one scan segmented. The same call again after whatever went wrong goes on where the server is.

        Args:
            scan: a file, or a folder of DICOM files.
            model: name of a model that the server has, with /<version> for another than the current one.
            out: the mask's file, .vtk, .nii.gz, .vti, .nrrd, .mha or .dcm (a DICOM segmentation, of a scan that is
                DICOM); written whole or not at all.
            timeout_s: limit for everything together.
            on_progress: told the stage and how far it is, in bytes while sending and receiving, scans before this one
                while in the queue, slices or batches while segmenting.
            modality: "CT" or "MR", whatever the scan's file says; "" for that.
            on_result: told what is returned, before the server is told that it may delete the result; where it raises
                BAD_OUTPUT, the same call finds the result again.

        Returns:
            The files written, `out` first, then `<out>.json` if the mask is an oblique .vtk; and the measurements.

        Raises:
            ClientError: anything else than an answer.
        """
        limit = time.monotonic() + timeout_s
        output = next((known for known in protocol.OUTPUTS if out.name.endswith(f".{known}")), None)
        if output is None:
            names = ", ".join(f".{known}" for known in protocol.OUTPUTS)
            raise ClientError("BAD_OUTPUT", f"Expected a file that ends in {names}, received {out}.", EXIT_BAD_INPUT)
        check_model(model)
        check_readable(scan)
        check_outputs([scan], [out])
        on_progress("pack", 0, 0)
        if self._behind:  # on a connection of its own no late answer can be taken for one about this scan
            self._close_socket()
            self._open_socket()
            self._connect(min(timeout_s, SILENCE_S))
            self._behind = False
        self._check_sizes(scan)
        sent = package(scan)
        name, _, version = model.partition("/")
        with sent.file:
            self._check(sent.name, sent.bytes, sent.content_bytes, len(sent.members))
            submit = protocol.Submit(
                sent.name, sent.kind, name, int(version or 0), modality, output, sent.codec, sent.bytes,
                sent.content_bytes, sent.sha256, DEADLINE_MS_MAX,
            )  # fmt: skip
            self._behind = True
            answer = self._repeat(submit, sent, out, limit, on_progress, on_result)
        self._behind = False
        return answer

    # ---- the steps of a job

    def _repeat(
        self,
        submit: protocol.Submit,
        sent: Package,
        out: Path,
        limit: float,
        on_progress: OnProgress,
        on_result: OnResult,
    ) -> tuple[list[Path], dict[str, Any]]:
        """Tries again where the server says that this may help; ends the job, unless the next call is to find it."""
        job, corrupt, short = b"", 0, 0
        try:
            while True:
                left_ms = min(DEADLINE_MS_MAX, max(1, int(1000 * (limit - time.monotonic()))))
                try:
                    accepted = self._announce(dataclasses.replace(submit, deadline_ms=left_ms), limit)
                    job = accepted.job
                    answer = self._run(accepted, submit.output, sent, out, limit, on_progress)
                    on_result(*answer)
                    return answer
                except Refused as refused:
                    corrupt += refused.code == "DIGEST_MISMATCH"
                    short += refused.code == "OUT_OF_MEMORY"
                    wait_s = max(RETRY_S, refused.error.retry_after_ms / 1000)
                    if not _may_help(refused.error, corrupt, short) or time.monotonic() + wait_s > limit:
                        raise
                    on_progress("retry", 0, 0)
                    self._sleep(wait_s)
        except ClientError as error:
            if error.code in LEFT:
                job = b""
            raise
        finally:
            if job:
                self._forget(job)

    def _run(
        self,
        accepted: protocol.Accepted,
        output: str,
        sent: Package,
        out: Path,
        limit: float,
        on_progress: OnProgress,
    ) -> tuple[list[Path], dict[str, Any]]:
        """A scan from the answer to its announcement to its result's files, wherever the server is with it."""
        self._upload(accepted, sent, limit, on_progress)
        done = self._wait(accepted.job, sent, limit, on_progress)
        return self._collect(accepted.job, done, sent, out, output, limit, on_progress)

    def _connect(self, connect_s: float) -> None:
        unfit = ClientError(
            "BAD_ADDRESS", f"Expected a server's address such as {SERVER}, received {self.server}.", EXIT_BAD_INPUT
        )
        place = re.fullmatch(r"tcp://([^;]+):([0-9]{1,5})", self.server)
        if not place or not 0 < int(place[2]) <= PORT_MAX:  # ZeroMQ takes any number modulo 65536
            raise unfit
        if not self._secure and not _is_loopback(place[1]):
            raise ClientError(
                "BAD_ADDRESS",
                f"Expected a server on this computer for a connection without keys, received {self.server}.",
                EXIT_BAD_INPUT,
            )
        try:
            self._socket.connect(self.server)
        except zmq.ZMQError as error:
            raise unfit from error
        self.greeting = self.welcome(connect_s)
        self._greeted, self._noticed = True, self._connections

    def _check_sizes(self, scan: Path) -> None:
        """What the files' sizes tell, before time and disk are spent on packing them."""
        with reading(scan):
            sizes = [path.stat().st_size for path in files_of(scan)]
        upload_bytes = sum(sizes) if is_sent_unchanged(scan) else 0
        self._check(name_of(scan), upload_bytes, sum(sizes), len(sizes) if scan.is_dir() else 0)

    def _check(self, name: str, upload_bytes: int, content_bytes: int, members: int) -> None:
        """Against the server's limits before a byte is sent; the server checks again."""
        limits = self.greeting.limits
        for what, size, limit in (
            ("bytes to send", upload_bytes, limits.upload_bytes),
            ("bytes", content_bytes, limits.content_bytes),
            ("files", members, limits.members),
        ):
            if size > limit:
                raise ClientError(
                    "TOO_LARGE", f"Expected at most {limit} {what}, received {size} in {name}.", EXIT_BAD_INPUT
                )

    def _announce(self, submit: protocol.Submit, limit: float) -> protocol.Accepted:
        """Where the upload begins or goes on: at its end, where the server has the scan already.

        Said again after ANNOUNCE_S of silence: the announcement, or its answer, may have gone down with a connection.
        """
        self._asked = False
        limit = min(limit, time.monotonic() + SILENCE_S)
        while True:
            self._say(submit, limit)
            accepted: protocol.Accepted | None = self._hear(
                protocol.Accepted, min(limit, time.monotonic() + ANNOUNCE_S)
            )
            if accepted is not None:
                return accepted
            if time.monotonic() >= limit:
                raise Unreachable(self.server)

    def _upload(self, accepted: protocol.Accepted, sent: Package, limit: float, on_progress: OnProgress) -> None:
        """Sends the bytes as credit allows.

        What says that the server is not where this client takes it to be makes it ask STATUS and wait for the answer.
        Any other ACCEPTED may be older than chunks that are under way, and its offset is none to go back to.
        """
        job, offset, until = accepted.job, accepted.offset, accepted.until
        lost = False
        messages = self._messages(job, limit, sent, lambda: f"{offset} of {sent.bytes} bytes were sent")
        while True:
            while not lost and offset < until:
                sent.file.seek(offset)
                payload = sent.file.read(min(self.greeting.limits.chunk_bytes, until - offset))
                self._say(protocol.Chunk(job, offset, payload), limit)
                offset += len(payload)
                on_progress("send", offset, sent.bytes)
            message = next(messages)
            if isinstance(message, protocol.Accepted) and lost:
                offset, until, lost = message.offset, message.until, False
            elif isinstance(message, protocol.Accepted):
                until, lost = max(until, message.until), message.offset < offset
                offset = max(offset, message.offset)  # ahead where another connection sends the same scan
            elif isinstance(message, protocol.Credit):
                until = max(until, message.until)
            elif isinstance(message, protocol.Stored | protocol.Progress | protocol.Done):
                return
            elif isinstance(message, protocol.Error):
                if message.code not in OUT_OF_PLACE and message.code != "SERVER_STOPPING":
                    raise Refused(message, self.server, sent.members)
                lost = True
            if lost:
                self._ask(job)

    def _wait(self, job: bytes, sent: Package, limit: float, on_progress: OnProgress) -> protocol.Done:
        where = "it was sent"
        self._ask(job)
        messages = self._messages(job, limit, sent, lambda: where)
        while True:
            message = next(messages)
            if isinstance(message, protocol.Done):
                return message
            if isinstance(message, protocol.Error) and message.code != "SERVER_STOPPING" and not _is_late(message):
                raise Refused(message, self.server, sent.members)
            if isinstance(message, protocol.Progress):
                queued = message.stage == "queue"
                where = f"{message.position} scans were before it" if queued else f"it was at '{message.stage}'"
                on_progress(message.stage, message.position if queued else message.done, message.total)

    def _collect(
        self,
        job: bytes,
        done: protocol.Done,
        sent: Package,
        out: Path,
        output: str,
        limit: float,
        on_progress: OnProgress,
    ) -> tuple[list[Path], dict[str, Any]]:
        """Fetches the result; its files appear under their names only when all of them are whole, and on the disk.

        The server deletes its own after that, and may be the one whose power does not fail.
        """
        measurements: dict[str, Any] = {}
        moves: list[tuple[Path, Path]] = []
        try:
            with writing(out):
                make_folder(out.parent)
                for file in done.files:
                    pieces = self._fetch(job, file, sent, limit, on_progress)
                    if file.name == "result.json":
                        measurements = json.loads(b"".join(pieces))
                        continue
                    path = out.with_name(out.name + file.name.removeprefix(f"mask.{output}"))
                    moves.append((path.with_name(f".partial-{uuid.uuid4().hex[:8]}-{path.name}"), path))
                    with moves[-1][0].open("xb") as temporary:
                        temporary.writelines(pieces)
                    sync_file(moves[-1][0])
                paths = [path for _, path in moves]
                if output == "vtk" and (sidecar := sidecar_of(out)) not in paths and is_sidecar(sidecar):
                    sidecar.unlink()  # an earlier file's directions would be wrong for this one
                for temporary_path, path in reversed(moves):
                    temporary_path.replace(path)
                sync_names(out.parent)
                return paths, measurements
        finally:
            for temporary_path, _ in moves:
                temporary_path.unlink(missing_ok=True)

    def _fetch(
        self, job: bytes, file: protocol.ResultFile, sent: Package, limit: float, on_progress: OnProgress
    ) -> Iterator[bytes]:
        """A file's bytes as they come; checks its digest at the end."""
        got = asked = 0
        digest = hashlib.sha256()
        chunk = self.greeting.limits.chunk_bytes
        connection, came = self._connections, time.monotonic()
        messages = self._messages(job, limit, sent, lambda: f"{got} of {file.bytes} bytes of the result came")
        while got < file.bytes:
            while asked < file.bytes and asked < got + FETCHES_AHEAD * chunk:
                self._say(protocol.Fetch(job, file.name, asked, chunk), limit)
                asked += chunk
            message = next(messages)
            if isinstance(message, protocol.Data) and (message.name, message.offset) == (file.name, got):
                digest.update(message.payload)
                got += len(message.payload)
                came = time.monotonic()
                on_progress("receive", got, file.bytes)
                if len(message.payload) < min(chunk, file.bytes - message.offset):
                    chunk, asked = len(message.payload), got  # started again meanwhile, the server gives smaller pieces
                yield message.payload
            elif isinstance(message, protocol.Error) and not _is_late(message):
                raise Refused(message, self.server, sent.members)
            elif message is None and (connection != self._connections or time.monotonic() - came >= NO_DATA_S):
                asked, connection, came = got, self._connections, time.monotonic()
        if digest.hexdigest() != file.sha256:
            raise ClientError(
                "RESULT_CORRUPT",
                f"Expected the result as the server made it, received other bytes for {sent.name}.",
                EXIT_NETWORK,
            )

    def _forget(self, job: bytes) -> None:
        """Tells the server that it may delete the job; should that fail, the server's own time limit does it."""
        self._leaving = True
        try:
            with contextlib.suppress(ClientError):
                limit = time.monotonic() + 2.0
                self._say(protocol.Close(job), limit)
                while (message := self._take(limit)) is not None:
                    if isinstance(message, protocol.Closed | protocol.Error) and message.job == job:
                        return
        finally:
            self._leaving = False

    # ---- single messages

    def _ask(self, job: bytes) -> None:
        """Asks where a job is, unless that is asked already: behind a slow link, answers take their time."""
        if self._asked:
            return
        with contextlib.suppress(Unreachable):  # no connection at present; the next one brings the question again
            self._say(protocol.Status(job), time.monotonic())
            self._asked = True

    def _messages(self, job: bytes, limit: float, sent: Package, where: Callable[[], str]) -> Iterator[Any]:
        """The job's messages as they come; None after ASK_S of silence or on a new connection, when it was asked for.

        Raises:
            ClientError: TIMEOUT at the limit, UNREACHABLE after SILENCE_S without a word.
        """
        heard = time.monotonic()
        ask_at = heard + ASK_S
        while True:
            now = time.monotonic()
            if now >= limit:
                raise ClientError(
                    "TIMEOUT",
                    f"Expected the result of {sent.name} in time, received none ({where()}): raise --timeout-s, or ask"
                    f" whether the server at {self.server} is overloaded.",
                    EXIT_NETWORK,
                )
            if now - heard >= SILENCE_S:
                raise ClientError(
                    "UNREACHABLE",
                    f"Expected news of {sent.name}, received nothing from {self.server} for {SILENCE_S:.0f} s"
                    f" ({where()}): check that the server still runs and that the network is up.",
                    EXIT_NETWORK,
                )
            if now >= ask_at or self._noticed != self._connections:
                self._noticed = self._connections
                ask_at = now + ASK_S
                self._ask(job)
                yield None
            message = self._take(min(limit, ask_at))
            if message is not None and message.job == job:
                heard = time.monotonic()
                ask_at = heard + ASK_S
                if isinstance(message, protocol.Accepted | protocol.Progress | protocol.Done):
                    self._asked = False
                yield message

    def _expect(self, kind: type[Any], limit: float) -> Any:
        message = self._hear(kind, limit)
        if message is None:
            raise Unreachable(self.server)
        return message

    def _hear(self, kind: type[Any], limit: float) -> Any:
        """The next message of a kind, or None at the limit."""
        while (message := self._take(limit)) is not None:
            if isinstance(message, kind):
                return message
            if isinstance(message, protocol.Error) and not message.job:
                raise Refused(message, self.server)
        return None

    def _say(self, message: Any, limit: float) -> None:
        try:
            frames = protocol.encode(message)
        except protocol.BadFrame as error:
            raise ClientError(error.code, error.text, EXIT_BAD_INPUT) from error
        limit = min(limit, time.monotonic() + SILENCE_S)
        while self._ready(zmq.POLLOUT, limit):
            if self._send(frames):
                return
        raise Unreachable(self.server)

    def _send(self, frames: Sequence[bytes]) -> bool:
        """Whether a message was begun: its connection may have ended since the socket was looked at.

        One that ends between two frames takes the message along, as it does all that is under way; ZeroMQ then drops
        what it is given until the message ends, so the rest must follow (libzmq, lb.cpp).
        """
        for number, frame in enumerate(frames, 1):
            try:
                self._socket.send(frame, zmq.NOBLOCK | (zmq.SNDMORE if number < len(frames) else 0))
            except zmq.Again:
                if number == 1:
                    return False
        return True

    def _take(self, limit: float) -> Any:
        """The next message, or None at the limit."""
        if not self._ready(zmq.POLLIN, limit):
            return None
        try:
            return protocol.decode(self._socket.recv_multipart(zmq.NOBLOCK), protocol.TO_CLIENT)
        except protocol.BadFrame as error:
            raise ClientError(
                error.code,
                f"Expected a server of protocol {protocol.MAGIC.decode()} at {self.server}, received other frames.",
                EXIT_NETWORK,
            ) from error

    def _ready(self, event: int, limit: float) -> bool:
        """Whether the socket can be read or written by the limit.

        Raises:
            ClientError: SERVER_KEY_MISMATCH or NOT_AUTHORISED, where the server will never talk to this client.
            KeyboardInterrupt: the client is to stop.
        """
        self._poller.register(self._socket, event)
        while True:
            if self._stop.is_set() and not self._leaving:
                raise KeyboardInterrupt
            left_s = limit - time.monotonic()
            found = dict(self._poller.poll(max(0, int(1000 * min(left_s, SLICE_S)) + 1)))
            if self._monitor in found:
                # Event and value as in zmq_socket_monitor(3); zmq.utils.monitor would bring asyncio along.
                self._heed(struct.unpack("=hi", self._monitor.recv_multipart()[0])[0])
            if self._socket in found:
                return True
            if left_s <= 0:
                return False

    def _heed(self, kind: int) -> None:
        """What ZeroMQ says of a connection as it begins; without it a client that is not let in would wait in vain."""
        if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._broken = 0
            self._connections += 1
            self._asked = False  # lost with the connection before
        elif kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise ClientError(
                "NOT_AUTHORISED",
                f"Expected a client that the server at {self.server} lets in, received one that it does not: its"
                " operator allows this client's key (python -m serving.client keys show) with serving.admin.",
                EXIT_NETWORK,
            )
        elif not self._greeted:  # later it is a server that is started again, behind something that takes connections
            self._broken += 1
            if self._broken < BROKEN_MAX and kind == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                return
            wrong = "whose key is that in this client's file" if self._secure else "without encryption (--insecure)"
            raise ClientError(
                "SERVER_KEY_MISMATCH",
                f"Expected a server at {self.server} {wrong}, received a connection that it breaks off: check the"
                " server's key (python -m serving.admin server-key) and address.",
                EXIT_NETWORK,
            )

    def _sleep(self, wait_s: float) -> None:
        if self._stop.wait(wait_s):
            raise KeyboardInterrupt


def _may_help(error: protocol.Error, corrupt: int, short: int) -> bool:
    """Whether the same announcement again may succeed.

    Args:
        error: the server's.
        corrupt: uploads so far that did not arrive as they were sent.
        short: tries so far for which the server's memory did not suffice.
    """
    if error.code == "DIGEST_MISMATCH":
        return corrupt <= CORRUPT_MAX
    if error.code == "OUT_OF_MEMORY":
        return short < SHORT_MAX
    return error.fault != "input" and (error.retryable or error.code == "NOT_FOUND")  # given up there, known here


def _is_late(error: protocol.Error) -> bool:
    """Whether it is about a chunk that was sent twice, when the server has the whole scan."""
    return error.stage == "upload" and error.code in OUT_OF_PLACE


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
