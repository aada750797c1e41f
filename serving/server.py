"""The server's command: checks what it is given, then runs the gate until it is told to stop."""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from lvseg.errors import InputError
from serving import protocol, supervisor
from serving.gate import IPC_FOLDER, CannotServe, Gate

EXAMPLE = """example:
  python -m serving.server --cfg serving/server.yaml --models models
  python -m serving.client submit scan.nii.gz --model volume -o liver.vtk
"""
_JOB_FOLDER = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger("serving.server")


def find_models(folder: Path) -> dict[str, Path]:
    """The newest version's folder of each task in a models folder, `models/<task>/<version>/`.

    Args:
        folder: the models folder.

    Raises:
        InputError: MODEL_UNAVAILABLE.
    """
    if not folder.is_dir():
        raise InputError("MODEL_UNAVAILABLE", f"Expected a folder of models, received no such folder: {folder}.")
    newest: dict[str, Path] = {}
    for task in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        versions = [path for path in task.iterdir() if path.is_dir() and re.fullmatch(r"[0-9]{1,9}", path.name)]
        if versions:
            newest[task.name] = max(versions, key=lambda path: int(path.name))
    for version in newest.values():
        if not (version / "saved_model.pb").is_file():
            raise InputError("MODEL_UNAVAILABLE", f"Expected a SavedModel, received no saved_model.pb in {version}.")
    if not newest:
        raise InputError("MODEL_UNAVAILABLE", f"Expected models as <task>/<version>/, received none in {folder}.")
    return newest


def describe(name: str, version: Path) -> protocol.Model:
    """What clients are told of a model.

    Args:
        name: of the task.
        version: its folder.

    Raises:
        InputError: MODEL_UNAVAILABLE: no digest of the weights in model.json, or a name that no request can say.
    """
    path = version / "model.json"
    try:
        digest = json.loads(path.read_text())["weights_sha256"]
        model = protocol.Model(name, int(version.name), digest)
        protocol.encode(protocol.Ready((model,)))  # refuses what WELCOME could not say
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            "MODEL_UNAVAILABLE",
            f"Expected a plain task name and a 'weights_sha256' for it, received neither in {path}.",
        ) from error
    return model


def claim_spool(folder: Path) -> int:
    """Makes the spool (mode 0700), locks it for this process and deletes what a server that was killed left there.

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
        raise InputError("SPOOL_UNUSABLE", f"Expected a spool of its own, received one in use: {folder}.") from error
    for left in folder.iterdir():
        if _JOB_FOLDER.fullmatch(left.name) or left.name == IPC_FOLDER:
            shutil.rmtree(left)
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


def main(argv: Sequence[str] | None = None, worker_command: Sequence[str] = supervisor.WORKER_COMMAND) -> int:
    """Runs the server.

    Args:
        argv: arguments, None for the process's own.
        worker_command: what to start as a worker; tests give one with a model of their own.

    Returns:
        0 after SIGTERM or SIGINT; 2 for a wrong configuration or an unusable model; 1 if workers cannot be kept alive.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    os.umask(0o077)  # scans and results are nobody else's to read
    stop_signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda caught, _frame: stop_signals.append(caught))
    try:
        _serve(arguments, stop_signals, worker_command)
    except InputError as error:
        print(f"{parser.prog}: {error.sentence}", file=sys.stderr)
        return 2
    except CannotServe as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _serve(arguments: argparse.Namespace, stop_signals: list[int], worker_command: Sequence[str]) -> None:
    from serving import config

    given = {key: getattr(arguments, key) for key in ("models", "bind", "spool")}
    settings = config.load(arguments.cfg, **given)
    folders = {name: path.resolve() for name, path in find_models(settings.models).items()}
    models = [describe(name, path) for name, path in folders.items()]
    if arguments.endpoint_file:
        check_endpoint_file(arguments.endpoint_file)
    lock = claim_spool(settings.spool)
    try:
        gate = Gate(settings, models, folders, worker_command)
        try:
            gate.run(lambda: bool(stop_signals), lambda: _report_ready(gate, arguments.endpoint_file))
        finally:
            gate.close()
            if arguments.endpoint_file and gate.was_ready:  # before, it may be that of another server
                arguments.endpoint_file.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _report_ready(gate: Gate, endpoint_file: Path | None) -> None:
    """One line on standard output, and the address in a file for programs that chose port 0."""
    if endpoint_file:
        temporary = endpoint_file.with_name(f".partial-{uuid.uuid4().hex[:8]}-{endpoint_file.name}")
        temporary.write_text(gate.endpoint + "\n")
        temporary.replace(endpoint_file)
    names = " ".join(f"{model.name}/{model.version}" for model in gate.models)
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
    parser.add_argument("--endpoint-file", type=Path, metavar="FILE", help="gets the address once the server is ready")
    return parser


if __name__ == "__main__":
    sys.exit(main())
