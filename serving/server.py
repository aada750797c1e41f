"""The server's command: checks what it is given, then runs the gate until it is told to stop."""

from __future__ import annotations

import argparse
import errno
import fcntl
import ipaddress
import os
import resource
import shutil
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from lvseg.errors import InputError
from serving import access, catalogue, crew, logs
from serving.errors import KeyFileError
from serving.gate import IPC_FOLDER, CannotServe, Gate, check_bind

EXAMPLE = """example:
  python -m serving.server --cfg serving/server.yaml --models models
  python -m serving.client submit scan.nii.gz --model volume -o liver.vtk
"""
OPEN_FILES = 65_536
LOOPBACK = "tcp://127.0.0.1:"


def claim_spool(folder: Path) -> int:
    """Makes the spool (mode 0700), locks it for this process and deletes the socket that a killed server left there.

    Args:
        folder: the spool.

    Returns:
        The lock's file descriptor; open, it holds the lock.

    Raises:
        InputError: SPOOL_UNUSABLE.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InputError(
            "SPOOL_UNUSABLE", f"Expected a folder to write to as 'spool', received '{error.strerror}' for {folder}."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        received = "one in use" if isinstance(error, BlockingIOError) else f"'{error.strerror}' for a lock"
        raise InputError("SPOOL_UNUSABLE", f"Expected a spool of its own, received {received}: {folder}.") from error
    shutil.rmtree(folder / IPC_FOLDER, ignore_errors=True)
    return lock


def check_endpoint_file(path: Path) -> None:
    """Makes the folder of the file that gets the address, so that nothing is missing once the models are loaded.

    Raises:
        InputError: BAD_OUTPUT.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(
            "BAD_OUTPUT", f"Expected a file to write as --endpoint-file, received '{error.strerror}' for {path}."
        ) from error


def main(argv: Sequence[str] | None = None, worker_command: Sequence[str] = crew.WORKER_COMMAND) -> int:
    """Runs the server.

    Args:
        argv: arguments, None for the process's own.
        worker_command: what to start as a worker; tests give one with a model of their own.

    Returns:
        0 after SIGTERM or SIGINT; 2 for a wrong configuration or an unusable model; 1 if workers cannot be kept alive,
        or the spool cannot be used.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    logs.to_standard_error()
    os.umask(0o077)  # scans and results are nobody else's to read
    stop_signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda caught, _frame: stop_signals.append(caught))
    try:
        _serve(arguments, stop_signals, worker_command)
    except (InputError, KeyFileError) as error:
        print(f"{parser.prog}: {error.sentence}", file=sys.stderr)
        return 2
    except CannotServe as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _serve(arguments: argparse.Namespace, stop_signals: list[int], worker_command: Sequence[str]) -> None:
    from serving import config

    given = {key: getattr(arguments, key) for key in ("models", "bind", "spool", "access", "http")}
    settings = config.load(arguments.cfg, **given)
    check_bind(settings.bind, arguments.insecure)
    catalogue.versions_in(settings.models)
    if arguments.endpoint_file:
        check_endpoint_file(arguments.endpoint_file)
    lock = claim_spool(settings.spool)
    try:
        pair = None if arguments.insecure else access.first_start(settings.access, local_address(settings.bind))
        catalogue.trust_on_first_start(settings.access, settings.models)
        _open_many_files()
        gate = Gate(settings, pair, worker_command)
        try:
            gate.run(lambda: len(stop_signals), lambda: _report_ready(gate, arguments.endpoint_file))
        finally:
            gate.close()
            if arguments.endpoint_file and gate.was_ready:  # before, it may be that of another server
                arguments.endpoint_file.unlink(missing_ok=True)
    finally:
        os.close(lock)


def local_address(bind: str) -> str:
    """What a client on this computer connects to, or "" where the port is not known beforehand."""
    host, _, port = bind.rpartition(":")
    if not port.isdigit() or port == "0":
        return ""
    host = host.removeprefix("tcp://")
    is_any = host == "*" or ipaddress.ip_address(host.strip("[]")).is_unspecified
    return LOOPBACK + port if is_any else bind


def _open_many_files() -> None:
    """A connection is an open file, and the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, OPEN_FILES), hard))


def _report_ready(gate: Gate, endpoint_file: Path | None) -> None:
    """One line on standard output, and the address in a file for programs that chose port 0.

    Raises:
        CannotServe: exit code 1: the file cannot be written.
    """
    if endpoint_file:
        temporary = endpoint_file.with_name(f".partial-{uuid.uuid4().hex[:8]}-{endpoint_file.name}")
        try:
            temporary.write_text(gate.endpoint + "\n")
            temporary.replace(endpoint_file)
        except OSError as error:
            text = f"Expected a file to write as --endpoint-file, received '{error.strerror}' for {endpoint_file}."
            raise CannotServe(text, 1) from error
    names = " ".join(f"{model.name}/{model.version}" for model in gate.workers.models)
    print(f"ready {gate.endpoint} {names}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving.server",
        description="Answers scans with segmentations until SIGTERM or Ctrl-C.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cfg", required=True, type=Path, help="the server's file, such as serving/server.yaml")
    parser.add_argument("--models", metavar="DIR", help="folder with <task>/<version>/, over the file's")
    parser.add_argument("--bind", metavar="ADDRESS", help="such as tcp://127.0.0.1:5557; port * picks one")
    parser.add_argument("--spool", metavar="DIR", help="where scans lie while they are worked on")
    parser.add_argument("--access", metavar="DIR", help="keys, and the lists of who and what is let in")
    parser.add_argument("--http", metavar="ADDRESS", help="for /livez, /readyz and /metrics, such as 127.0.0.1:9557")
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="without encryption and keys, for anyone on this computer; loopback only",
    )
    parser.add_argument("--endpoint-file", type=Path, metavar="FILE", help="gets the address once the server is ready")
    return parser


if __name__ == "__main__":
    sys.exit(main())
