"""The server's `access` folder: its key, the clients it lets in, the models it may load. Files of mode 0600.

    access/server.json    the server's key pair
    access/clients.json   names and public keys of the clients that are let in
    access/models.json    digests of the model versions that may be loaded, and what was rolled back
    access/local.json     credentials for clients of this user on this computer

`python -m serving.admin` changes them; a running server sees a change within a tenth of a second. A list of clients
that is none, or that others can read, lets nobody in; where the system cannot read it, the last one holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from serving import keys
from serving.errors import KeyFileError, KeyFileUnreadable

SERVER, CLIENTS, MODELS, LOCAL, LOCK = "server.json", "clients.json", "models.json", "local.json", ".lock"
CLIENTS_FORMAT = "lvseg clients 1"
LOCAL_NAME = "local"
NAME_CHARACTERS_MAX = 64
CLIENTS_MAX = 10_000

log = logging.getLogger("serving.access")


class Watched:
    """A file of the access folder that is read again when it changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mark: tuple[int, ...] | None = None
        self._asked = False

    def ask_again(self) -> None:
        """Lets `changed` say so the next time."""
        self._asked = False

    def changed(self) -> bool:
        """Whether it is another file than when this was asked last; true the first time."""
        try:
            facts = self.path.stat()
            mark: tuple[int, ...] | None = (
                facts.st_ctime_ns,
                facts.st_size,
                facts.st_ino,
            )  # of every change, also of the mode
        except OSError:
            mark = None
        is_new, self._mark, self._asked = not self._asked or mark != self._mark, mark, True
        return is_new


class Clients:
    """Who is let in; safe to ask from several threads.

    Args:
        path: access/clients.json; a missing file lets nobody in.
    """

    def __init__(self, path: Path) -> None:
        self._file = Watched(path)
        self._lock = threading.Lock()
        self.names: dict[str, str] = {}  # by public key; another object after each change
        self.problem = ""  # why the list cannot be read at present

    def refresh(self) -> None:
        """Reads the file again if it changed, and for as long as it cannot be read."""
        with self._lock:
            if not self._file.changed():
                return
            try:
                self.names, problem = read_clients(self._file.path), ""
            except KeyFileUnreadable as error:  # which says nothing of who is on it
                problem = error.sentence
                self._file.ask_again()
                if problem != self.problem:
                    log.error("the clients stay as they are: %s", problem)
            except KeyFileError as error:
                self.names, problem = {}, ""
                log.error("nobody is let in: %s", error.sentence)
            self.problem = problem

    def name_of(self, key: str) -> str | None:
        """The client's name, or None where it is not let in."""
        return self.names.get(key)

    def callback(self, domain: str, key: bytes) -> bool:
        """What zmq.auth asks of a credentials provider."""
        self.refresh()
        return self.name_of(key.decode("ascii", "replace")) is not None


def read_clients(path: Path) -> dict[str, str]:
    """Names by public key.

    Raises:
        KeyFileError: the file cannot be read or is none of ours; a missing one has no clients.
    """
    if not keys.is_there(path):
        return {}
    content = keys.read_private(path)
    entries = content.get("clients")
    if content.get("format") != CLIENTS_FORMAT or type(entries) is not dict or len(entries) > CLIENTS_MAX:
        raise KeyFileError(f"Expected a list of clients, received another file: {path}.")
    for name, key in entries.items():
        if not is_name(name) or not keys.is_key(key):
            raise KeyFileError(f"Expected names with public keys, received another entry in {path}.")
    return {key: name for name, key in entries.items()}


def is_name(name: str) -> bool:
    """Whether a client may be called so in lists and logs."""
    return 0 < len(name) <= NAME_CHARACTERS_MAX and all(one.isalnum() or one in "-_." for one in name)


def allow_client(folder: Path, name: str, key: str) -> None:
    """Lets a client in.

    Raises:
        KeyFileError: for a name or a key that is none, or is taken.
    """
    if not is_name(name):
        raise KeyFileError(f"Expected a name of letters, digits, '-', '_' and '.', received {name!r}.")
    if not keys.is_key(key):
        raise KeyFileError(f"Expected a public key of {keys.KEY_CHARACTERS} characters of Z85, received {key!r}.")
    with changing(folder):
        names = read_clients(folder / CLIENTS)
        if name in names.values() or key in names:
            raise KeyFileError(
                f"Expected a new name and a new key, received one that is let in already: {name}"
                f" (revoke it first, or take another name)."
            )
        _write_clients(folder, {**names, key: name})


def revoke_client(folder: Path, name: str) -> None:
    """Lets a client in no more, from now on, open connections included.

    Raises:
        KeyFileError: no client of that name or key is let in.
    """
    with changing(folder):
        names = read_clients(folder / CLIENTS)
        left = {key: known for key, known in names.items() if name not in (key, known)}
        if len(left) == len(names):
            raise KeyFileError(f"Expected one of {', '.join(sorted(names.values())) or 'no clients'}, received {name}.")
        _write_clients(folder, left)


def first_start(folder: Path, server: str) -> keys.KeyPair:
    """The server's key pair; on the first call made, with credentials for this user's clients on this computer.

    Args:
        folder: the access folder.
        server: address that these credentials name from now on; "" for the one that they name.

    Raises:
        KeyFileError: a file that cannot be used or written.
    """
    with changing(folder):
        is_first = not keys.is_there(folder / SERVER)
        pair = keys.server_pair(folder / SERVER)
        if is_first and not (folder / CLIENTS).exists() and not (folder / LOCAL).exists():
            own = keys.new_pair()
            keys.write_credentials(folder / LOCAL, keys.Credentials(LOCAL_NAME, own, pair.public, server))
            _write_clients(folder, {own.public: LOCAL_NAME})
            log.info("keys made: clients of this user on this computer find theirs in %s", folder / LOCAL)
        with contextlib.suppress(KeyFileError):  # none there, or one of no use, which its clients are told
            local = keys.read_credentials(folder / LOCAL)
            if server not in ("", local.server):
                keys.write_credentials(folder / LOCAL, replace(local, server=server), may_replace=True)
        return pair


@contextlib.contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, so that two commands at once lose nothing of each other's.

    Raises:
        KeyFileError: the folder cannot be made or used.
    """
    is_new = not keys.is_there(folder)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        if is_new:
            _give_to_owner(folder)
        lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        try:
            keys.give_to_owner(lock, folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise _unusable(folder, error) from error
        yield
    finally:
        os.close(lock)


def _give_to_owner(folder: Path) -> None:
    """A folder that root makes is that of the owner of the place that it is in, who runs the server."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        keys.give_to_owner(descriptor, folder.resolve().parent)
    finally:
        os.close(descriptor)


def _unusable(folder: Path, error: OSError) -> KeyFileError:
    return KeyFileError(f"Expected a folder for keys, received '{error.strerror}' for {folder}.")


def _write_clients(folder: Path, names: dict[str, str]) -> None:
    content: dict[str, Any] = {"format": CLIENTS_FORMAT, "clients": {name: key for key, name in names.items()}}
    keys.write_private(folder / CLIENTS, content, replace=True)
