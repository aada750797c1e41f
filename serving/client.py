"""The client's command: sends scans to a server and writes the segmentations that come back.

    python -m serving.client submit scan.nii.gz --model volume -o liver.vtk

`serving.connection` is the same as a library. Runs without TensorFlow, NumPy and the rest of lvseg.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from serving import keys, protocol
from serving.connection import HOME_KEY, Client, Refused, check_model, find_credentials
from serving.durable import sync_names
from serving.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_ERROR, EXIT_NETWORK, ClientError, KeyFileError
from serving.outputs import check_outputs, make_folder, output_paths, sync_file, writing
from serving.scans import check_readable, files_of, making_room, reading, stem_of, suffix_by_content

PLAIN_LINE_EVERY_S = 2.0
LOOK_EVERY_S, SETTLED_S, PATIENCE_S = 1.0, 5.0, 10.0  # of --watch
DONE_EVERY_S = 60.0  # --watch looks whether a scan that is done has changed: thousands of files would keep a share busy
# Of the network or of the access, and so of every scan; anything else costs the one scan that it happened to.
OF_ALL = frozenset(
    {"UNREACHABLE", "NOT_AUTHORISED", "SERVER_KEY_MISMATCH", "PROTO_UNSUPPORTED", "BAD_ADDRESS", "BAD_KEY"}
)
WORST_FIRST = (EXIT_ERROR, EXIT_NETWORK, EXIT_BAD_INPUT, EXIT_DONE)
STDIN = Path("-")
Show = Callable[[str, str, int, int], None]  # a scan's name, and what `segment` tells of it
Mark = tuple[int, ...] | None  # number of files, bytes together, time of the last change in ns since 1970
MARK = "scan_mark"  # its name in what is written of a scan

EXAMPLE = """examples:
  python -m serving.client submit scan.nii.gz --model volume -o liver.vtk
  python -m serving.client submit patient1/ patient2/ --model volume -o masks --format nii.gz --json volumes.json
  python -m serving.client submit --watch incoming --model volume -o masks
  python -m serving.client keys new --name site-a --server-key='KEY' --server tcp://segmentation.example:5557
  python -m serving.client status
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0 done; 2 wrong use or a scan that cannot be used; 4 network or access; 1 anything else. Of several scans the
        worst: 1, then 4, then 2.
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
    except KeyFileError as error:
        print(f"{parser.prog}: {error.sentence}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; what was finished is kept.", file=sys.stderr)
        return EXIT_ERROR


# ---- submit


def _submit(arguments: argparse.Namespace) -> int:
    check_model(arguments.model)
    if bool(arguments.scans) == bool(arguments.watch):
        raise ClientError("BAD_ARGUMENT", "Expected SCAN or --watch, received both or neither.", EXIT_BAD_INPUT)
    if arguments.watch and arguments.json:
        raise ClientError(
            "BAD_ARGUMENT",
            "Expected --json without --watch, which writes the measurements of each scan beside its mask.",
            EXIT_BAD_INPUT,
        )
    if arguments.watch:
        return _watch(arguments)
    with _from_stdin(arguments.scans) as scans:
        for scan in scans:
            check_readable(scan)
        outputs = output_paths(scans, arguments.out, arguments.format)
        check_outputs(scans, outputs, arguments.json)
        with _progress() as show:
            return _segment_all(arguments, list(zip(scans, outputs, strict=True)), show)


def _segment_all(arguments: argparse.Namespace, scans: Sequence[tuple[Path, Path]], show: Show) -> int:
    """Several scans at once, each over a connection of its own, so that one is sent while another is worked on.

    What is to be said of a scan is written before the server is told that it may delete its result, with what was said
    of others, now or by an earlier call, in the order of the scans.

    Returns:
        The worst exit code of any scan, of WORST_FIRST.

    Raises:
        ClientError: what ends all of it: one of OF_ALL, or whatever happened to the one scan there is.
    """
    import concurrent.futures  # not for --help

    stop = threading.Event()
    own = threading.local()
    clients: list[Client] = []
    found: dict[str, dict[str, Any]] = {}
    exit_codes = [EXIT_DONE]
    earlier = _said_earlier(arguments.json)  # of scans whose turn has not come yet, it stays
    writes, not_written = threading.Lock(), []

    def keep(scan: Path, result: dict[str, Any]) -> None:
        with writes:
            found[str(scan)] = result
            said = {**earlier, **found}
            try:
                if arguments.json:
                    _write_json(arguments.json, [said[str(each)] for each, _ in scans if str(each) in said])
            except ClientError as error:
                not_written.append(error)
                raise

    def one(scan: Path, out: Path) -> None:
        if not hasattr(own, "client"):
            own.client = _client(arguments, stop)
            clients.append(own.client)
        try:
            _segment(own.client, arguments, scan, out, show, functools.partial(keep, scan))
        except ClientError as error:
            if error in not_written:  # the result stays with the server; other scans go on
                return
            if len(scans) == 1 or error.code in OF_ALL:
                raise
            print(f"serving.client: {error.sentence}", file=sys.stderr)  # one scan of many costs that scan alone
            exit_codes.append(error.exit_code)
            with contextlib.suppress(ClientError):
                keep(scan, _failure(scan, error))

    pool = concurrent.futures.ThreadPoolExecutor(min(arguments.at_once, len(scans)))
    try:
        tasks = [pool.submit(one, scan, out) for scan, out in scans]
        for task in concurrent.futures.as_completed(tasks):
            task.result()
    finally:
        stop.set()  # after an error, or Ctrl-C, which only the main thread hears
        pool.shutdown(cancel_futures=True)
        for client in clients:
            client.close()
    if not_written:
        print(f"serving.client: {not_written[0].sentence}", file=sys.stderr)
        exit_codes.append(not_written[0].exit_code)
    return min(exit_codes, key=WORST_FIRST.index)


def _said_earlier(path: Path | None) -> dict[str, dict[str, Any]]:
    """What a table of an earlier call says, by scan; nothing where there is none, or the file is another one."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return {each["scan"]: each for each in json.loads(path.read_bytes())} if path else {}
    return {}


def _segment(
    client: Client,
    arguments: argparse.Namespace,
    scan: Path,
    out: Path,
    show: Show,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """One scan; what is to be said of it is kept before the server may forget it."""
    client.segment(
        scan, arguments.model, out, arguments.timeout_s, lambda *news: show(scan.name, *news),
        (arguments.modality or "").upper(),
        lambda paths, measurements: keep(
            {"scan": str(scan), "files": [str(path) for path in paths], **measurements}
        ),
    )  # fmt: skip
    print(out, flush=True)


def _failure(scan: Path, error: ClientError) -> dict[str, Any]:
    return {"scan": str(scan), "error": {"code": error.code, "text": error.sentence}}


# ---- submit --watch


def _watch(arguments: argparse.Namespace) -> int:
    """Segments what is dropped into a folder, until Ctrl-C. Done is a scan whose measurements or failure are there.

    A scan counts as whole once it has not changed for SETTLED_S, and goes again where it changed later. Each goes its
    own way: one that has to wait for the network or the server holds up no other, as long as fewer than --at-once do.
    """
    import concurrent.futures

    folder, out = arguments.watch, arguments.out
    try:
        is_folder = folder.is_dir()
    except OSError as error:
        raise ClientError(
            "NOT_READABLE", f"Expected a folder to watch, received '{error.strerror}' for {folder}.", EXIT_BAD_INPUT
        ) from error
    if not is_folder:
        raise ClientError("NOT_FOUND", f"Expected a folder to watch, received {folder}.", EXIT_BAD_INPUT)
    with writing(out):
        make_folder(out)
    if out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents:
        raise ClientError("BAD_OUTPUT", f"Expected -o apart from the folder watched, received {out}.", EXIT_BAD_INPUT)
    _client(arguments, threading.Event()).close()  # a wrong address or key is told at once
    stop = threading.Event()
    settling: dict[Path, tuple[Mark, float]] = {}
    done: dict[Path, float] = {}
    tasks: dict[Path, concurrent.futures.Future[None]] = {}  # by mask
    was_there = True
    pool = concurrent.futures.ThreadPoolExecutor(arguments.at_once)
    try:
        with _progress() as show:
            while True:
                for mask in [mask for mask, task in tasks.items() if task.done()]:
                    tasks.pop(mask).result()  # raises only what is a fault of this program
                try:
                    for scan, mask, mark in _settled(arguments, settling, done):
                        if mask not in tasks:
                            tasks[mask] = pool.submit(_segment_dropped, arguments, scan, mask, mark, show, stop)
                    was_there = True
                except OSError as error:  # such as a share that went away
                    if was_there:
                        print(f"serving.client: Expected a folder to watch, received '{error.strerror}' for {folder};"
                              " it may come back.", file=sys.stderr)  # fmt: skip
                    was_there = False
                time.sleep(LOOK_EVERY_S)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _settled(
    arguments: argparse.Namespace, settling: dict[Path, tuple[Mark, float]], done: dict[Path, float]
) -> Iterator[tuple[Path, Path, Mark]]:
    """The scans of the watched folder that are whole and not done, each with its mask and what it looks like.

    Args:
        arguments: of the command.
        settling: what each scan looked like, and since when; brought up to date here.
        done: when to look again at each scan that is done; brought up to date here.
    """
    now = time.monotonic()
    scans_of: dict[Path, list[Path]] = {}
    for scan in sorted(path for path in arguments.watch.iterdir() if not path.name.startswith(".")):
        scans_of.setdefault(arguments.out / f"{stem_of(scan)}.{arguments.format or 'vtk'}", []).append(scan)
    owners = {mask: scans[0] if len(scans) == 1 else _owner(mask, scans) for mask, scans in scans_of.items()}
    for mask, scan in ((mask, scan) for mask, scans in scans_of.items() for scan in scans):
        if (other := owners[mask]) != scan:
            if scan not in settling:  # told once
                settling[scan] = (None, now)
                print(f"serving.client: Expected scans of different names, received {scan.name}, whose mask would be"
                      f" that of {other.name}.", file=sys.stderr)  # fmt: skip
            continue
        said = [path for path in (_result_of(mask), _failure_of(mask)) if path.exists()]
        if said and now < done.get(scan, 0.0):
            continue
        mark = _mark(scan)
        if any(_is_about(path, mark) for path in said):
            done[scan] = now + DONE_EVERY_S
            continue
        done.pop(scan, None)
        if scan not in settling or settling[scan][0] != mark:
            settling[scan] = (mark, now)
        elif mark is not None and now - settling[scan][1] >= SETTLED_S:
            yield scan, mask, mark


def _owner(mask: Path, scans: Sequence[Path]) -> Path:
    """Of several scans that would have one mask the one whose answer is there, or else the first."""
    for path in (_result_of(mask), _failure_of(mask)):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            said = json.loads(path.read_bytes())
            names = [scan for scan in scans if isinstance(said, dict) and said.get("scan") == str(scan)]
            if names:
                return names[0]
    return scans[0]


def _segment_dropped(
    arguments: argparse.Namespace, scan: Path, mask: Path, mark: Mark, show: Show, stop: threading.Event
) -> None:
    """Segments a scan, or writes down why it cannot be; after anything else it will be found again, a while later."""

    def keep(result: dict[str, Any]) -> None:
        if _mark(scan) != mark and os.path.lexists(scan):  # one that was taken away since is done all the same
            for name in [*result["files"], _result_of(mask)]:  # what an earlier answer says was of an earlier mask
                with writing(mask):
                    Path(name).unlink(missing_ok=True)
            raise ClientError(
                "SCAN_CHANGED",
                f"Expected a scan that is whole, received one that changed after it was sent: {scan} (its answer is"
                " dropped, and it is sent again once it has settled).",
                EXIT_ERROR,
            )
        _write_json(_result_of(mask), {**result, MARK: mark})
        with contextlib.suppress(OSError):  # of what was there before under the scan's name
            _failure_of(mask).unlink(missing_ok=True)

    try:
        with _client(arguments, stop) as client:
            _segment(client, arguments, scan, mask, show, keep)
    except ClientError as error:
        print(f"serving.client: {error.sentence}", file=sys.stderr)
        if _is_of_scan(error) and _mark(scan) == mark:
            with contextlib.suppress(ClientError):  # no room for it
                _write_json(_failure_of(mask), {**_failure(scan, error), MARK: mark})
                return
        stop.wait(PATIENCE_S)


def _is_of_scan(error: ClientError) -> bool:
    """Whether the same scan would end the same way, rather than the network, the access or this computer."""
    if error.code in OF_ALL or error.code == "MODEL_UNKNOWN":
        return False
    if error.code == "OUT_OF_MEMORY":  # it was tried a few times
        return True
    if isinstance(error, Refused):
        return error.error.fault != "access" and not error.error.retryable
    return error.exit_code == EXIT_BAD_INPUT and error.code != "BAD_OUTPUT"


def _result_of(mask: Path) -> Path:
    return mask.with_name(mask.name + ".result.json")


def _failure_of(mask: Path) -> Path:
    return mask.with_name(mask.name + ".failed.json")


def _is_about(path: Path, mark: Mark) -> bool:
    """Whether what a file says of a scan is said of the scan as it is; of one that cannot be looked at it is.

    A file that is cut short says nothing. One of an earlier version, without a mark, is believed.
    """
    try:
        said = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    except OSError:
        return True  # not to be read, but there
    return isinstance(said, dict) and (not mark or said.get(MARK) in (None, list(mark)))


def _mark(scan: Path) -> Mark:
    """What changes while a scan is still being copied; None as long as there is not a byte of it."""
    try:
        with reading(scan):
            facts = [path.stat() for path in files_of(scan)]
    except ClientError as error:
        return None if error.code == "NOT_FOUND" else ()
    size = sum(one.st_size for one in facts)
    return (len(facts), size, max(one.st_mtime_ns for one in facts)) if size else None


@contextlib.contextmanager
def _from_stdin(scans: Sequence[Path]) -> Iterator[list[Path]]:
    """The scans, with `-` as a file of what standard input holds, named by what it is."""
    if STDIN not in scans:
        yield list(scans)
        return
    if len(scans) > 1:
        raise ClientError("BAD_ARGUMENT", "Expected - alone, received other scans beside it.", EXIT_BAD_INPUT)
    with making_room(STDIN):
        temporary = tempfile.TemporaryDirectory(prefix="lvseg-")
    with temporary as folder:
        path = Path(folder) / "stdin"
        with making_room(STDIN), path.open("xb") as file:
            while piece := sys.stdin.buffer.read(1024 * 1024):
                file.write(piece)
        named = path.with_name("stdin" + suffix_by_content(path))
        path.rename(named)
        yield [named]


def _write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all; it is on the disk then."""
    temporary = path.with_name(f".partial-{uuid.uuid4().hex[:8]}-{path.name}")
    with writing(path):
        make_folder(path.parent)
        try:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
            sync_file(temporary)
            temporary.replace(path)
            sync_names(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


# ---- the other commands


def _client(arguments: argparse.Namespace, stop: threading.Event | None = None) -> Client:
    if arguments.insecure:
        return Client(arguments.server, insecure=True, stop=stop)
    return Client(arguments.server, find_credentials(arguments.key), stop=stop)


def _models(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        for model in client.greeting.models:
            print(f"{model.name}/{model.version}  {model.sha256}")
    return EXIT_DONE


def _ping(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        state = "ready" if client.greeting.ready else "loading its models"
        print(f"{client.greeting.build}, {state}, {client.ping():.1f} ms")
    return EXIT_DONE


def _status(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        listing = client.jobs()
    for job in listing.jobs:
        place = f", {job.position} before it" if job.state == "queue" else ""
        print(f"{job.job[:12]}  {job.model:16}  {job.state}{place}  {job.name}")
    if listing.total > len(listing.jobs):
        print(f"and {listing.total - len(listing.jobs)} older ones")
    return EXIT_DONE


def _cancel(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        for given in arguments.jobs:
            found = [job for job in client.jobs().jobs if given and job.job.startswith(given.lower())]
            is_key = re.fullmatch(r"[0-9a-f]{64}", given.lower())
            if len(found) != 1 and not is_key:
                raise ClientError(
                    "NOT_FOUND",
                    f"Expected the beginning of one job's key (see the command status), received {given!r}, with which"
                    f" {len(found)} begin.",
                    EXIT_BAD_INPUT,
                )
            client.cancel(bytes.fromhex(found[0].job if found else given))
            print(f"{given} is cancelled.")
    return EXIT_DONE


def _new_key(arguments: argparse.Namespace) -> int:
    if not keys.is_key(arguments.server_key):
        raise ClientError(
            "BAD_KEY",
            f"Expected the server's public key as --server-key, {keys.KEY_CHARACTERS} characters (its operator gets it"
            f" with: python -m serving.admin server-key), received {arguments.server_key}.",
            EXIT_BAD_INPUT,
        )
    path = arguments.key or Path.home() / HOME_KEY
    pair = keys.new_pair()
    keys.write_credentials(path, keys.Credentials(arguments.name, pair, arguments.server_key, arguments.server or ""))
    print(f"Keys written to {path}. The server's operator lets them in with:")
    print(f"  python -m serving.admin allow-client {shlex.quote(arguments.name)} {shlex.quote(pair.public)}")
    return EXIT_DONE


def _show_key(arguments: argparse.Namespace) -> int:
    credentials = find_credentials(arguments.key)
    print(f"{credentials.name}  {credentials.pair.public}")
    return EXIT_DONE


@contextlib.contextmanager
def _progress() -> Iterator[Show]:
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


def _few(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 64:
        raise argparse.ArgumentTypeError(f"expected 1 to 64, received {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving.client",
        description="Sends scans to a server and writes the segmentations that come back.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    key = argparse.ArgumentParser(add_help=False)
    key.add_argument(
        "--key", type=Path, metavar="FILE",
        help=f"this client's keys (default: $LVSEG_KEY, access/local.json, then ~/{HOME_KEY})",
    )  # fmt: skip
    server = argparse.ArgumentParser(add_help=False, parents=[key])
    server.add_argument("--server", metavar="ADDRESS", help="default: the one in the file of keys, or this computer")
    server.add_argument(
        "--insecure", action="store_true", help="without keys, for a server that runs so on this computer"
    )
    submit = commands.add_parser(
        "submit",
        parents=[server],
        help="have scans segmented",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    submit.add_argument(
        "scans", nargs="*", type=Path, metavar="SCAN", help="a file, a folder or a zip of DICOM files, - for stdin"
    )
    submit.add_argument("--watch", type=Path, metavar="FOLDER", help="segment what is put there, until Ctrl-C")
    submit.add_argument("--model", required=True, help="such as volume, or volume/3; see the command models")
    submit.add_argument(
        "-o",
        "--out",
        required=True,
        type=Path,
        help="a file .vtk, .nii.gz, .vti, .nrrd, .mha or, of a DICOM scan, .dcm, or a folder",
    )
    submit.add_argument("--format", choices=protocol.OUTPUTS, help="of the files in a folder (default: vtk)")
    submit.add_argument("--json", type=Path, metavar="FILE", help="write the measurements here")
    submit.add_argument(
        "--modality", choices=("mr", "ct"), help="of the scans, whatever their files say; NIfTI says nothing"
    )
    submit.add_argument("--timeout-s", type=_seconds, default=600.0, metavar="S", help="for each scan (default: 600)")
    submit.add_argument("--at-once", type=_few, default=4, metavar="N", help="scans under way at a time (default: 4)")
    submit.set_defaults(run=_submit)
    commands.add_parser("status", parents=[server], help="list this client's jobs").set_defaults(run=_status)
    cancel = commands.add_parser("cancel", parents=[server], help="end jobs")
    cancel.add_argument("jobs", nargs="+", metavar="JOB", help="its key, or how it begins")
    cancel.set_defaults(run=_cancel)
    commands.add_parser("models", parents=[server], help="list what the server serves").set_defaults(run=_models)
    commands.add_parser("ping", parents=[server], help="ask whether the server is there").set_defaults(run=_ping)
    of_keys = commands.add_parser("keys", help="make and show this client's keys").add_subparsers(
        required=True, metavar="COMMAND"
    )
    new = of_keys.add_parser("new", parents=[key], help="make a pair of keys; the secret one stays here")
    new.add_argument("--name", required=True, help="what the server's operator calls this client")
    new.add_argument("--server-key", required=True, metavar="KEY", help="the server's public key")
    new.add_argument("--server", metavar="ADDRESS", help="where it is, such as tcp://10.0.0.5:5557")
    new.set_defaults(run=_new_key)
    of_keys.add_parser("show", parents=[key], help="this client's public key").set_defaults(run=_show_key)
    return parser


if __name__ == "__main__":
    sys.exit(main())
