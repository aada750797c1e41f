"""Machines that train together wait for each other here, before TensorFlow does.

TensorFlow's own wait can be ended by nothing but SIGKILL, since it takes SIGTERM for itself and never gives
control back to Python, and it does not say who is missing.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys
import time
from collections.abc import Sequence

from lvseg.errors import RunError

HELLO_S = 5.0  # within which whoever connects has to say which machine it is
AGAIN_S = 0.5
HERE, GO = b"lvseg", b"go"


def meet(addresses: Sequence[str], own: int) -> None:
    """Returns once all machines have called this; any signal ends the wait as it ends Python.

    The first machine listens at its address until then; the others connect to it, again and again.

    Args:
        addresses: "host:port" of every machine, in the same order everywhere.
        own: which of them this is.

    Raises:
        RunError: the first machine cannot listen at its port.
    """
    if own == 0:
        _gather(addresses)
    else:
        print(f"waiting for {addresses[0]}", file=sys.stderr, flush=True)
        while not _join(addresses[0], own):
            time.sleep(AGAIN_S)


def _gather(addresses: Sequence[str]) -> None:
    """The first machine's part: until every other one is connected."""
    port = int(addresses[0].rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        )
    except OSError as error:
        raise RunError(
            f"Expected to wait for the other machines at {addresses[0]}, received '{error.strerror}'; is the port free?"
        ) from error
    found: dict[int, socket.socket] = {}
    with server:
        while True:
            for gone in [place for place, connection in found.items() if _readable([connection], 0.0)]:
                found.pop(gone).close()  # it has nothing more to say: it died while it waited, and may come again
            missing = [address for number, address in enumerate(addresses) if number and number not in found]
            if not missing:
                break
            print(f"waiting for {', '.join(missing)}", file=sys.stderr, flush=True)
            if server in _readable([server, *found.values()], None):
                connection, _ = server.accept()
                place = _place(connection, len(addresses))
                if place is None:
                    connection.close()
                    continue
                if place in found:  # its power failed while it waited
                    found[place].close()
                found[place] = connection
    for connection in found.values():
        with contextlib.suppress(OSError):  # whoever dies now is missed by TensorFlow
            connection.sendall(GO)
    for connection in found.values():  # the others close first, so that this port is free for TensorFlow at once
        _received(connection, 1)
        connection.close()


def _readable(sockets: list[socket.socket], timeout_s: float | None) -> list[socket.socket]:
    return select.select(sockets, [], [], timeout_s)[0]


def _place(connection: socket.socket, machines: int) -> int | None:
    """Which machine has connected; None for anything else than a machine."""
    connection.settimeout(HELLO_S)
    name, _, place = _received(connection, len(HERE) + 5).partition(b" ")
    is_other = name == HERE and place.isdigit() and 0 < int(place) < machines
    return int(place) if is_other else None


def _join(address: str, own: int) -> bool:
    """Another machine's part: whether the first one was there and has said that all are."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=HELLO_S) as connection:
            connection.sendall(b"%s %04d" % (HERE, own))
            connection.settimeout(None)
            return _received(connection, len(GO)) == GO
    except OSError:
        return False


def _received(connection: socket.socket, count: int) -> bytes:
    """So many bytes, or what came before the other side closed, failed or was too slow."""
    data = b""
    try:
        while len(data) < count and (more := connection.recv(count - len(data))):
            data += more
    except OSError:
        pass
    return data
