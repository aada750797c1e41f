"""Sends scans to a server and writes the segmentations that come back; as a library (`Client`) and as a command.

    python -m serving.client submit scan.nii.gz --model volume -o liver.vtk

Nothing here waits without a limit: a server that is not there, does not answer or makes no progress ends in an error
with a sentence that says what to check. Runs without TensorFlow, NumPy and the rest of lvseg.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq

from serving import protocol
from serving.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_ERROR, EXIT_NETWORK, ClientError
from serving.outputs import check_outputs, is_sidecar, output_paths, sidecar_of, writing
from serving.scans import Package, check_readable, files_of, is_sent_unchanged, name_of, package, reading

SERVER = "tcp://127.0.0.1:5557"
CONNECT_S = 5.0
SILENCE_S = 20.0  # the server answers STATUS within milliseconds; this long without a word and it is gone
ASK_S = 2.0  # without news for this long, STATUS asks; it also finds the job again after a lost connection
FETCHES_AHEAD = 8
PLAIN_LINE_EVERY_S = 2.0
PORT_MAX = 65535

EXAMPLE = """examples:
  python -m serving.client submit scan.nii.gz --model volume -o liver.vtk
  python -m serving.client submit patient1/ patient2/ --model volume -o masks --format nii.gz --json volumes.json
  python -m serving.client models
  python -m serving.client ping
"""

OnProgress = Callable[[str, int, int], None]


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
                f"Expected the server at {server} to know the job, received '{sentence}' (it was restarted, or gave the"
                " job up; send the scan again)."
            )
        exit_codes = {"input": EXIT_BAD_INPUT, "access": EXIT_NETWORK, "server": EXIT_ERROR}
        super().__init__(error.code, sentence, exit_codes[error.fault])
        self.error = error


def check_model(name: str) -> None:
    """Refuses what no server can know as a model, such as a folder.

    Raises:
        ClientError: MODEL_UNKNOWN, exit code 2.
    """
    if not protocol.is_model_name(name):
        raise ClientError(
            "MODEL_UNKNOWN",
            f"Expected the name of a model such as volume (see the command models), received {name!r}.",
            EXIT_BAD_INPUT,
        )


class Client:
    """A connection to a server; use it in a `with` statement, from one thread.

    Args:
        server: its address, such as tcp://127.0.0.1:5557.
        connect_s: give up when no server takes the connection and greets within this.

    Raises:
        ClientError: BAD_ADDRESS, UNREACHABLE or PROTO_UNSUPPORTED, exit code 4 (2 for the address).
    """

    def __init__(self, server: str = SERVER, connect_s: float = CONNECT_S) -> None:
        self.server = server
        self._context = zmq.Context()
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
        try:
            self._connect(connect_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()
        self._context.term()

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

    def segment(
        self,
        scan: Path,
        model: str,
        out: Path,
        timeout_s: float = 600.0,
        on_progress: OnProgress = lambda stage, done, total: None,
    ) -> tuple[list[Path], dict[str, Any]]:
        """Has one scan segmented.

        Args:
            scan: a file, or a folder of DICOM files.
            model: name of a model that the server has.
            out: the mask's file, .vtk, .nii.gz, .vti, .nrrd or .mha; written whole or not at all.
            timeout_s: limit for everything together.
            on_progress: told the stage and how far it is, in bytes while sending and receiving, scans before this one
                while in the queue, slices or batches while segmenting.

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
        self._check_sizes(scan)
        sent = package(scan)
        with sent.file:
            self._check(sent.name, sent.bytes, sent.content_bytes, len(sent.members))
            accepted = self._announce(sent, model, output, limit)
            job = accepted.job
            try:
                self._upload(accepted, sent, limit, on_progress)
                done = self._wait(job, sent, limit, on_progress)
                return self._collect(job, done, sent, out, output, limit, on_progress)
            finally:
                self._forget(job)

    # ---- the steps of a job

    def _connect(self, connect_s: float) -> None:
        unfit = ClientError(
            "BAD_ADDRESS", f"Expected a server's address such as {SERVER}, received {self.server}.", EXIT_BAD_INPUT
        )
        port = re.fullmatch(r"tcp://[^;]+:([0-9]{1,5})", self.server)
        if not port or not 0 < int(port[1]) <= PORT_MAX:  # ZeroMQ takes any number modulo 65536
            raise unfit
        try:
            self._socket.connect(self.server)
        except zmq.ZMQError as error:
            raise unfit from error
        self.greeting = self.welcome(connect_s)

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

    def _announce(self, sent: Package, model: str, output: str, limit: float) -> protocol.Accepted:
        """A new job; waits, up to the limit, while the server is busy."""
        while True:
            left_ms = min(86_400_000, max(1, int(1000 * (limit - time.monotonic()))))
            submit = protocol.Submit(
                sent.name, sent.kind, model, output, sent.codec, sent.bytes, sent.content_bytes, sent.sha256, left_ms
            )
            answer_limit = min(limit, time.monotonic() + SILENCE_S)
            self._say(submit, answer_limit)
            try:
                accepted: protocol.Accepted = self._expect(protocol.Accepted, answer_limit)
                return accepted
            except Refused as refused:
                wait_s = refused.error.retry_after_ms / 1000
                if refused.code != "BUSY" or time.monotonic() + wait_s > limit:
                    raise
                time.sleep(wait_s)

    def _upload(self, accepted: protocol.Accepted, sent: Package, limit: float, on_progress: OnProgress) -> None:
        """Sends the bytes as credit allows. STATUS, whose answer says where to go on, repairs whatever goes wrong."""
        job, offset, until = accepted.job, accepted.offset, accepted.until
        asked = False  # for STATUS; chunks sent before its answer would be out of place
        messages = self._messages(job, limit, sent, lambda: f"{offset} of {sent.bytes} bytes were sent")
        while True:
            while not asked and offset < until:
                sent.file.seek(offset)
                payload = sent.file.read(min(self.greeting.limits.chunk_bytes, until - offset))
                self._say(protocol.Chunk(job, offset, payload), limit)
                offset += len(payload)
                on_progress("send", offset, sent.bytes)
            message = next(messages)
            if isinstance(message, protocol.Accepted):
                offset, until, asked = message.offset, message.until, False
            elif isinstance(message, protocol.Credit):
                until = max(until, message.until)
            elif isinstance(message, protocol.Stored | protocol.Progress | protocol.Done):
                return
            elif isinstance(message, protocol.Error):
                if message.code not in ("BAD_OFFSET", "OVER_CREDIT"):
                    raise Refused(message, self.server, sent.members)
                if not asked:
                    self._say(protocol.Status(job), limit)
                asked = True
            elif message is None:
                asked = True

    def _wait(self, job: bytes, sent: Package, limit: float, on_progress: OnProgress) -> protocol.Done:
        where = "it was sent"
        self._say(protocol.Status(job), limit)
        messages = self._messages(job, limit, sent, lambda: where)
        while True:
            message = next(messages)
            if isinstance(message, protocol.Done):
                return message
            if isinstance(message, protocol.Error):
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
        """Fetches the result; its files appear under their names only when all of them are whole."""
        measurements: dict[str, Any] = {}
        moves: list[tuple[Path, Path]] = []
        try:
            with writing(out):
                out.parent.mkdir(parents=True, exist_ok=True)
                for file in done.files:
                    pieces = self._fetch(job, file, sent, limit, on_progress)
                    if file.name == "measurements.json":
                        measurements = json.loads(b"".join(pieces))
                        continue
                    path = out.with_name(out.name + file.name.removeprefix(f"mask.{output}"))
                    moves.append((path.with_name(f".partial-{uuid.uuid4().hex[:8]}-{path.name}"), path))
                    with moves[-1][0].open("xb") as temporary:
                        temporary.writelines(pieces)
                paths = [path for _, path in moves]
                if output == "vtk" and (sidecar := sidecar_of(out)) not in paths and is_sidecar(sidecar):
                    sidecar.unlink()  # an earlier file's directions would be wrong for this one
                for temporary_path, path in reversed(moves):
                    temporary_path.replace(path)
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
        messages = self._messages(job, limit, sent, lambda: f"{got} of {file.bytes} bytes of the result came")
        while got < file.bytes:
            while asked < file.bytes and asked < got + FETCHES_AHEAD * chunk:
                self._say(protocol.Fetch(job, file.name, asked, chunk), limit)
                asked += chunk
            message = next(messages)
            if isinstance(message, protocol.Data) and (message.name, message.offset) == (file.name, got):
                digest.update(message.payload)
                got += len(message.payload)
                on_progress("receive", got, file.bytes)
                yield message.payload
            elif isinstance(message, protocol.Error):
                raise Refused(message, self.server, sent.members)
            elif message is None:
                asked = got
        if digest.hexdigest() != file.sha256:
            raise ClientError(
                "RESULT_CORRUPT",
                f"Expected the result as the server made it, received other bytes for {sent.name}.",
                EXIT_NETWORK,
            )

    def _forget(self, job: bytes) -> None:
        """Tells the server that it may delete the job; should that fail, the server's own time limit does it."""
        with contextlib.suppress(ClientError):
            limit = time.monotonic() + 2.0
            self._say(protocol.Close(job), limit)
            while (message := self._take(limit)) is not None:
                if isinstance(message, protocol.Closed | protocol.Error) and message.job == job:
                    return

    # ---- single messages

    def _messages(self, job: bytes, limit: float, sent: Package, where: Callable[[], str]) -> Iterator[Any]:
        """The job's messages as they come; None after ASK_S of silence, when STATUS has been sent.

        Raises:
            ClientError: TIMEOUT at the limit, UNREACHABLE after SILENCE_S without a word.
        """
        heard = asked = time.monotonic()
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
            message = self._take(min(limit, asked + ASK_S))
            if message is None and time.monotonic() >= asked + ASK_S:
                asked = time.monotonic()
                with contextlib.suppress(Unreachable):
                    self._say(protocol.Status(job), asked)
                yield None
            elif message is not None and message.job == job:
                heard = asked = time.monotonic()
                yield message

    def _expect(self, kind: type[Any], limit: float) -> Any:
        while (message := self._take(limit)) is not None:
            if isinstance(message, kind):
                return message
            if isinstance(message, protocol.Error) and not message.job:
                raise Refused(message, self.server)
        raise Unreachable(self.server)

    def _say(self, message: Any, limit: float) -> None:
        try:
            frames = protocol.encode(message)
        except protocol.BadFrame as error:
            raise ClientError(error.code, error.text, EXIT_BAD_INPUT) from error
        wait_ms = max(0, int(1000 * (limit - time.monotonic())))
        if not self._socket.poll(min(wait_ms, int(1000 * SILENCE_S)), zmq.POLLOUT):
            raise Unreachable(self.server)
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again as error:
            raise Unreachable(self.server) from error

    def _take(self, limit: float) -> Any:
        """The next message, or None at the limit."""
        if not self._socket.poll(max(0, int(1000 * (limit - time.monotonic())) + 1)):
            return None
        try:
            return protocol.decode(self._socket.recv_multipart(zmq.NOBLOCK), protocol.TO_CLIENT)
        except protocol.BadFrame as error:
            raise ClientError(
                error.code,
                f"Expected a server of protocol {protocol.MAGIC.decode()} at {self.server}, received other frames.",
                EXIT_NETWORK,
            ) from error


# ---- the command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0 done; 2 wrong use or a scan that cannot be used; 4 network or access; 1 anything else.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    with contextlib.suppress(ValueError):  # signals belong to the main thread
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        return int(arguments.run(arguments))
    except ClientError as error:
        print(f"{parser.prog}: {error.sentence}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; what was finished is kept.", file=sys.stderr)
        return EXIT_ERROR


def _submit(arguments: argparse.Namespace) -> int:
    check_model(arguments.model)
    for scan in arguments.scans:
        check_readable(scan)
    outputs = output_paths(arguments.scans, arguments.out, arguments.format)
    check_outputs(arguments.scans, outputs, arguments.json)
    results: list[dict[str, Any]] = []
    exit_code = EXIT_DONE
    with Client(arguments.server) as client, _progress() as show:
        for scan, out in zip(arguments.scans, outputs, strict=True):
            try:
                paths, measurements = client.segment(
                    scan, arguments.model, out, arguments.timeout_s, lambda *news, name=scan.name: show(name, *news)
                )
            except ClientError as error:
                if len(arguments.scans) == 1 or error.exit_code != EXIT_BAD_INPUT:
                    raise
                exit_code = EXIT_BAD_INPUT  # one bad scan of many costs that scan alone
                results.append({"scan": str(scan), "error": {"code": error.code, "text": error.sentence}})
                print(f"serving.client: {error.sentence}", file=sys.stderr)
                continue
            results.append({"scan": str(scan), "files": [str(path) for path in paths], **measurements})
            print(out)
    if arguments.json:
        temporary = arguments.json.with_name(f".partial-{uuid.uuid4().hex[:8]}-{arguments.json.name}")
        with writing(arguments.json):
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")
                temporary.replace(arguments.json)
            finally:
                temporary.unlink(missing_ok=True)
    return exit_code


def _models(arguments: argparse.Namespace) -> int:
    with Client(arguments.server) as client:
        for model in client.greeting.models:
            print(f"{model.name}/{model.version}  {model.sha256}")
    return EXIT_DONE


def _ping(arguments: argparse.Namespace) -> int:
    with Client(arguments.server) as client:
        state = "ready" if client.greeting.ready else "loading its models"
        print(f"{client.greeting.build}, {state}, {client.ping():.1f} ms")
    return EXIT_DONE


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, str, int, int], None]]:
    """What shows how far each scan is: bars on a terminal, else a line now and then."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bars:
            tasks: dict[str, Any] = {}

            def draw(name: str, stage: str, done: int, total: int) -> None:
                if name not in tasks:
                    tasks[name] = bars.add_task(name, total=None)
                label = f"{name}: {done} before it" if stage == "queue" else f"{name}: {stage}"
                bars.update(tasks[name], description=label, completed=done, total=total or None)

            yield draw
        return
    due = time.monotonic() + PLAIN_LINE_EVERY_S

    def write(name: str, stage: str, done: int, total: int) -> None:
        nonlocal due
        if time.monotonic() < due:
            return
        due = time.monotonic() + PLAIN_LINE_EVERY_S
        news = f", {done} before it" if stage == "queue" else f" {done} of {total}" if total else ""
        print(f"{name}: {stage}{news}", file=sys.stderr)

    yield write


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError(f"expected seconds between 0 and 86400, received {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving.client",
        description="Sends scans to a server and writes the segmentations that come back.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    server = argparse.ArgumentParser(add_help=False)
    server.add_argument("--server", default=SERVER, metavar="ADDRESS", help=f"default: {SERVER}")
    submit = commands.add_parser(
        "submit",
        parents=[server],
        help="have scans segmented",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    submit.add_argument("scans", nargs="+", type=Path, metavar="SCAN", help="a file, or a folder of DICOM files")
    submit.add_argument("--model", required=True, help="such as volume; see the command models")
    submit.add_argument(
        "-o", "--out", required=True, type=Path, help="a file .vtk, .nii.gz, .vti, .nrrd or .mha, or a folder"
    )
    submit.add_argument("--format", choices=protocol.OUTPUTS, help="of the files in a folder (default: vtk)")
    submit.add_argument("--json", type=Path, metavar="FILE", help="write the measurements here")
    submit.add_argument("--timeout-s", type=_seconds, default=600.0, metavar="S", help="for each scan (default: 600)")
    submit.set_defaults(run=_submit)
    commands.add_parser("models", parents=[server], help="list what the server serves").set_defaults(run=_models)
    commands.add_parser("ping", parents=[server], help="ask whether the server is there").set_defaults(run=_ping)
    return parser


if __name__ == "__main__":
    sys.exit(main())
