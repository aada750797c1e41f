"""CURVE keys (RFC 26) in files that nobody but their owner can read; used by the server and by its clients.

    server   access/server.json    its key pair
    client   client.json           its key pair, the server's public key and address

Keys are 40 characters of Z85 (RFC 32). Files are JSON, mode 0600. One that others can read is refused, not repaired:
its secret may be known already.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import struct
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from serving.durable import sync_names
from serving.errors import KeyFileError, KeyFileUnreadable

KEY_CHARACTERS = 40
SERVER_FORMAT, CLIENT_FORMAT = "lvseg server key 1", "lvseg client key 1"
FILE_BYTES_MAX = 1024 * 1024


@dataclass(frozen=True)
class KeyPair:
    """Both halves of a key in Z85; the secret one is shown in no message."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True)
class Credentials:
    """What a client needs to talk to a server: its own key pair, the server's public key, and the server's address."""

    name: str
    pair: KeyPair
    server_key: str
    server: str


def new_pair() -> KeyPair:
    """A fresh key pair; the public key does not begin with a dash, which commands would take for an option."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode()) if not public.startswith(b"-") else new_pair()


def is_key(text: object) -> bool:
    """Whether it is a public or secret key in Z85."""
    if type(text) is not str or len(text) != KEY_CHARACTERS:
        return False
    try:
        return len(z85.decode(text.encode("ascii"))) == 32
    except (KeyError, ValueError, struct.error):  # the last for five characters beyond 32 bits
        return False


def write_private(path: Path, content: Mapping[str, Any], replace: bool = False) -> None:
    """Writes a JSON file with mode 0600, whole or not at all; it is on the disk then.

    Args:
        path: its folder is made, mode 0700, if it is missing.
        content: what JSON can say.
        replace: whether a file of that name may be there.

    Raises:
        KeyFileError: there is one, or it cannot be written.
    """
    temporary = path.with_name(f".partial-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o600)  # whatever the umask is
            give_to_owner(file.fileno(), path.parent)
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            os.link(temporary, path)  # fails where a file is, which replacing would not
        sync_names(path.parent)  # else a power cut lets in again who was revoked
    except FileExistsError as error:
        raise KeyFileError(f"Expected no file there yet, received one at {path}; it is not overwritten.") from error
    except OSError as error:
        raise KeyFileError(f"Expected a place to write to, received '{error.strerror}' for {path}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def give_to_owner(descriptor: int, folder: Path) -> None:
    """A file that root makes in somebody's folder is that user's, or who runs the server could not read it."""
    if os.geteuid() == 0:
        facts = folder.stat()
        os.fchown(descriptor, facts.st_uid, facts.st_gid)


def is_there(path: Path) -> bool:
    """Whether there is a file of that name.

    Raises:
        KeyFileUnreadable: nobody can tell, since its folder cannot be searched.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unreadable(path, error) from error
    return True


def read_private(path: Path) -> dict[str, Any]:
    """Reads a JSON file that must be its owner's alone.

    Raises:
        KeyFileError: missing, readable by others, somebody else's, or no JSON object.
        KeyFileUnreadable: the system cannot read it, or this user may not.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not be waited for
    except FileNotFoundError as error:
        raise KeyFileError(f"Expected a file with keys, received no such file: {path}.") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise KeyFileError(f"Expected a file with keys, received something else at {path}.")
        if facts.st_mode & 0o077:
            raise KeyFileError(
                f"Expected a file that its owner alone can read (mode 0600), received mode"
                f" {stat.S_IMODE(facts.st_mode):04o} for {path}: its secret may be known, so make new keys."
            )
        if facts.st_uid not in _owners(path.parent):
            raise KeyFileError(f"Expected a file of this user, received one of user {facts.st_uid}: {path}.")
        try:
            text = file.read(FILE_BYTES_MAX + 1)
        except OSError as error:
            raise _unreadable(path, error) from error
    try:
        if len(text) > FILE_BYTES_MAX:
            raise ValueError
        content = json.loads(text)
        if type(content) is not dict:
            raise ValueError
    except (ValueError, RecursionError) as error:
        raise KeyFileError(f"Expected a JSON object with keys, received something else in {path}.") from error
    return content


def _owners(folder: Path) -> set[int]:
    """Whose files count: this user's and root's; for root, who works in somebody's folder, that user's, too."""
    user = os.geteuid()
    return {user, 0} if user else {0, folder.stat().st_uid}


def _unreadable(path: Path, error: OSError) -> KeyFileUnreadable:
    return KeyFileUnreadable(f"Expected a file with keys, received '{error.strerror}' for {path}.")


def server_pair(path: Path) -> KeyPair:
    """The server's key pair, made on the first call.

    Raises:
        KeyFileError: as `read_private` and `write_private`, or for keys that are none.
    """
    if not is_there(path):
        pair = new_pair()
        write_private(path, {"format": SERVER_FORMAT, "public_key": pair.public, "secret_key": pair.secret})
    content = read_private(path)
    _check(content, SERVER_FORMAT, ("public_key", "secret_key"), path)
    return KeyPair(content["public_key"], content["secret_key"])


def write_credentials(path: Path, credentials: Credentials, may_replace: bool = False) -> None:
    """Writes a client's file, in the place of an earlier one where it may replace that.

    Raises:
        KeyFileError: it is there already and not to be replaced, or cannot be written.
    """
    content = {
        "format": CLIENT_FORMAT,
        "name": credentials.name,
        "public_key": credentials.pair.public,
        "secret_key": credentials.pair.secret,
        "server_key": credentials.server_key,
        "server": credentials.server,
    }
    write_private(path, content, may_replace)


def read_credentials(path: Path) -> Credentials:
    """Reads a client's file.

    Raises:
        KeyFileError: as `read_private`, or for keys that are none.
    """
    content = read_private(path)
    _check(content, CLIENT_FORMAT, ("public_key", "secret_key", "server_key"), path)
    if type(content.get("name")) is not str or type(content.get("server")) is not str:
        raise KeyFileError(f"Expected 'name' and 'server' as texts, received something else in {path}.")
    pair = KeyPair(content["public_key"], content["secret_key"])
    return Credentials(content["name"], pair, content["server_key"], content["server"])


def _check(content: Mapping[str, Any], expected: str, names: tuple[str, ...], path: Path) -> None:
    if content.get("format") != expected:
        raise KeyFileError(f"Expected 'format' as '{expected}', received another file: {path}.")
    for name in names:
        if not is_key(content.get(name)):
            raise KeyFileError(f"Expected '{name}' as {KEY_CHARACTERS} characters of Z85, received others in {path}.")
    public = zmq.curve_public(content["secret_key"].encode()).decode()
    if public != content["public_key"]:
        raise KeyFileError(f"Expected two halves of one key, received a 'public_key' of another in {path}.")


def lines_of(names: Mapping[str, str]) -> Iterator[str]:
    """A line a key, for people."""
    for key, name in sorted(names.items(), key=lambda entry: entry[1]):
        yield f"{name:20}  {key}"
