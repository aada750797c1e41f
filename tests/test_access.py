"""Who is let in: keys, lists, wrong keys and revoked ones over real sockets, and jobs that are their owner's alone."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from serving_fixtures import LIMIT_S, Server, running, until
from test_serving import ROOT, expect_right_mask, scan_file, submit_of

from lvseg.errors import InputError
from serving import access, admin, client, connection, keys, protocol
from serving.connection import Client, ClientError
from serving.errors import KeyFileError
from serving.server import claim_spool, local_address


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server as it starts by default, with keys of its own making."""
    with running(tmp_path_factory.mktemp("secured"), secure=True) as server:
        yield server


def local(server: Server) -> keys.Credentials:
    """What the server made for clients on this computer."""
    return keys.read_credentials(server.models.parent / "access" / "local.json")


def newcomer(server: Server, name: str, let_in: bool = True) -> keys.Credentials:
    """Another client's keys."""
    pair = keys.new_pair()
    if let_in:
        access.allow_client(server.models.parent / "access", name, pair.public)
    return keys.Credentials(name, pair, local(server).server_key, server.endpoint)


def refusal(server: Server, credentials: keys.Credentials | None, **how: bool) -> tuple[str, int, float]:
    """Code, exit code and seconds of a connection that is not to be."""
    began = time.monotonic()
    with pytest.raises(ClientError) as refused:
        Client(server.endpoint, credentials, **how)
    assert refused.value.sentence.startswith("Expected ")
    return refused.value.code, refused.value.exit_code, time.monotonic() - began


@pytest.mark.parametrize(
    ("bind", "address"),
    [
        ("tcp://*:5557", "tcp://127.0.0.1:5557"),
        ("tcp://0.0.0.0:5557", "tcp://127.0.0.1:5557"),
        ("tcp://[::]:5557", "tcp://127.0.0.1:5557"),
        ("tcp://10.0.0.5:5557", "tcp://10.0.0.5:5557"),
        ("tcp://[::1]:5557", "tcp://[::1]:5557"),
        ("tcp://10.0.0.5:*", ""),
        ("tcp://10.0.0.5:0", ""),
    ],
)
def test_a_client_on_this_computer_is_told_where_the_server_listens(bind: str, address: str) -> None:
    assert local_address(bind) == address


def test_a_client_on_this_computer_is_told_where_the_server_listens_since_it_listens_elsewhere(tmp_path: Path) -> None:
    first = access.first_start(tmp_path, "")  # by the operator's command, which knows of no server
    made = keys.read_credentials(tmp_path / access.LOCAL)
    for address in ("tcp://127.0.0.1:5557", "tcp://127.0.0.1:6000"):
        assert access.first_start(tmp_path, address) == first
        assert keys.read_credentials(tmp_path / access.LOCAL) == dataclasses.replace(made, server=address)
    (tmp_path / access.LOCAL).write_text("{}")
    assert access.first_start(tmp_path, "tcp://127.0.0.1:7000") == first  # what is wrong with it is told to its clients
    assert (tmp_path / access.LOCAL).read_text() == "{}"


def test_a_public_key_is_none_that_a_command_takes_for_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = iter([(b"-" + bytes([65] * 39), bytes([66] * 40)), *(zmq.curve_keypair() for _ in range(2))])
    monkeypatch.setattr(keys.zmq, "curve_keypair", lambda: next(drawn))
    server = keys.new_pair()
    assert not server.public.startswith("-")
    dashed = "-" + server.public[1:]  # one of an earlier version, as README gives it
    path = tmp_path / "client.json"
    assert client.main(["keys", "new", "--name", "site a", f"--server-key={dashed}", "--key", str(path)]) == 0
    line = shlex.split(capsys.readouterr().out.splitlines()[-1])[3:]
    assert admin._parser().parse_args(line).key == keys.read_credentials(path).pair.public
    assert keys.read_credentials(path).server_key == dashed


def test_the_keys_that_the_first_start_makes_let_this_user_in(secured: Server, tmp_path: Path) -> None:
    scan = scan_file(tmp_path)
    with Client(secured.endpoint, local(secured)) as client:
        client.segment(scan, "bright", tmp_path / "mask.nii.gz", LIMIT_S)
    expect_right_mask(scan, tmp_path / "mask.nii.gz")
    folder = secured.models.parent / "access"
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(
        ["server.json", "clients.json", "models.json", "local.json", ".lock"], 0o600
    )
    assert folder.stat().st_mode & 0o777 == 0o700
    for pair in (keys.server_pair(folder / "server.json"), local(secured).pair):
        assert pair.secret not in secured.log.read_text()
        assert pair.secret not in repr(pair)


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("unknown client", "NOT_AUTHORISED"),
        ("wrong server key", "SERVER_KEY_MISMATCH"),
        ("no keys", "SERVER_KEY_MISMATCH"),
    ],
)
def test_who_is_not_let_in_hears_so_within_two_seconds(secured: Server, case: str, code: str) -> None:
    known = local(secured)
    if case == "unknown client":
        answer = refusal(secured, newcomer(secured, "stranger", let_in=False))
    elif case == "wrong server key":
        other = keys.Credentials("other", known.pair, keys.new_pair().public, "")
        answer = refusal(secured, other)
    else:
        answer = refusal(secured, None, insecure=True)
    assert answer[:2] == (code, 4)
    assert answer[2] < 2.0


def test_a_client_that_is_allowed_gets_in_at_once_and_one_that_is_revoked_is_out_at_once(
    secured: Server, tmp_path: Path
) -> None:
    site = newcomer(secured, "site-a")
    scan = scan_file(tmp_path)
    with Client(secured.endpoint, site) as client:
        client.segment(scan, "bright", tmp_path / "mask.vtk", LIMIT_S)
        access.revoke_client(secured.models.parent / "access", "site-a")
        began = time.monotonic()

        def out() -> ClientError | None:
            try:
                client.jobs()
            except ClientError as error:
                return error
            return None

        refused = until(out, "the open connection is refused")
        assert time.monotonic() - began < 2.0
        assert (refused.code, refused.exit_code) == ("NOT_AUTHORISED", 4)
    assert refusal(secured, site)[:2] == ("NOT_AUTHORISED", 4)
    with Client(secured.endpoint, local(secured)) as other:  # nobody else's harm
        other.segment(scan, "bright", tmp_path / "mask.vtk", LIMIT_S)


def test_a_revoked_client_hears_no_more_of_the_jobs_that_it_has_there(secured: Server, tmp_path: Path) -> None:
    folder = secured.models.parent / "access"
    secured.hold.touch()
    try:
        site = newcomer(secured, "site-b")
        with connected(site) as peer:
            job = upload(peer, scan_file(tmp_path, seed=5).read_bytes())
            access.revoke_client(folder, "site-b")

            def is_out() -> bool:
                return bool(ask(peer, protocol.Ping(), protocol.Pong, protocol.Error) != protocol.Pong())

            until(is_out, "it is refused")
            secured.hold.unlink()
            until(lambda: f"job {job.hex()[:12]}: done" in secured.log.read_text(), "its job is done")
            peer.send_multipart(protocol.encode(protocol.Ping()))
            error = take(peer, protocol.Error, protocol.Progress, protocol.Done)  # the next word after its last Ping's
            assert (type(error), error.code, error.job) == (protocol.Error, "NOT_AUTHORISED", b"")
            assert not peer.poll(0)
    finally:
        secured.hold.unlink(missing_ok=True)


def test_a_mode_that_is_put_right_is_seen(tmp_path: Path) -> None:
    access.allow_client(tmp_path, "site-a", keys.new_pair().public)
    clients = access.Clients(tmp_path / access.CLIENTS)
    (tmp_path / access.CLIENTS).chmod(0o644)
    clients.refresh()
    assert clients.names == {}
    (tmp_path / access.CLIENTS).chmod(0o600)
    clients.refresh()
    assert list(clients.names.values()) == ["site-a"]


def test_another_owner_s_job_is_as_unknown_as_none(secured: Server, tmp_path: Path) -> None:
    secured.hold.touch()
    try:
        mine, theirs = newcomer(secured, "mine"), newcomer(secured, "theirs")
        content = scan_file(tmp_path).read_bytes()
        with connected(mine) as owner, connected(theirs) as stranger:
            job = upload(owner, content)
            for message in (
                protocol.Status(job),
                protocol.Cancel(job),
                protocol.Close(job),
                protocol.Fetch(job, "mask.vtk", 0, 10),
                protocol.Chunk(job, 0, b"abc"),
            ):
                error = ask(stranger, message)
                assert (type(error), error.code) == (protocol.Error, "NOT_FOUND")
            assert ask(stranger, protocol.List()) == protocol.Listing(0, ())
            (listed,) = ask(owner, protocol.List(), protocol.Listing).jobs
            assert listed.job == job.hex()
            # The same scan from another owner is another job: an answer tells nobody that it was sent before.
            other = upload(stranger, content)
            assert other != job
            assert ask(owner, protocol.Cancel(job), protocol.Cancelled) == protocol.Cancelled(job)
            stranger.send_multipart(protocol.encode(protocol.Cancel(job)))  # while its worker may still have it
            error = take(stranger, protocol.Error, protocol.Cancelled)
            assert (type(error), error.code) == (protocol.Error, "NOT_FOUND")
            assert ask(stranger, protocol.Cancel(other), protocol.Cancelled) == protocol.Cancelled(other)
    finally:
        secured.hold.unlink()


def test_a_routing_id_of_its_own_lets_nobody_hear_of_another_owner_s_jobs(secured: Server, tmp_path: Path) -> None:
    mine, theirs = newcomer(secured, "first-of-the-id"), newcomer(secured, "second-of-the-id")
    with connected(mine, b"the id") as owner:
        told = ask(owner, submit_of(scan_file(tmp_path).read_bytes()))
        assert (type(told), told.code) == (protocol.Error, "BAD_FRAME")
        assert "routing id" in told.text
    with connected(mine) as owner, connected(theirs, b"the id") as stranger:
        job = upload(owner, scan_file(tmp_path).read_bytes())
        for message in (protocol.Status(job), protocol.Ping()):
            assert ask(stranger, message).code == "BAD_FRAME"
        take(owner, protocol.Done)
        assert not stranger.poll(0)
        assert ask(owner, protocol.Close(job), protocol.Closed) == protocol.Closed(job)


class connected:
    """A bare socket with keys, and a routing id where it is given one."""

    def __init__(self, credentials: keys.Credentials, routing_id: bytes = b"") -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if routing_id:
            self.socket.setsockopt(zmq.ROUTING_ID, routing_id)
        self.socket.setsockopt(zmq.CURVE_SERVERKEY, credentials.server_key.encode())
        self.socket.setsockopt(zmq.CURVE_PUBLICKEY, credentials.pair.public.encode())
        self.socket.setsockopt(zmq.CURVE_SECRETKEY, credentials.pair.secret.encode())
        self.socket.connect(credentials.server)

    def __enter__(self) -> zmq.Socket[bytes]:
        return self.socket

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.context.term()


def ask(peer: zmq.Socket[bytes], message: object, *kinds: type[object]) -> object:
    """The answer to a message, the first of some kinds."""
    peer.send_multipart(protocol.encode(message))
    return take(peer, *kinds)


def take(peer: zmq.Socket[bytes], *kinds: type[object]) -> object:
    while True:
        assert peer.poll(int(1000 * LIMIT_S)), "no answer"
        message = protocol.decode(peer.recv_multipart(), protocol.TO_CLIENT)
        if not kinds or isinstance(message, kinds):
            return message


def upload(peer: zmq.Socket[bytes], content: bytes) -> bytes:
    """A small scan as one chunk; the job's key."""
    accepted = ask(peer, submit_of(content), protocol.Accepted)
    ask(peer, protocol.Chunk(accepted.job, 0, content), protocol.Stored)
    return accepted.job


# ---- files


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o660])
def test_a_secret_that_others_can_read_is_refused_and_left_as_it_is(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "server.json"
    keys.server_pair(path)
    path.chmod(mode)
    content = path.read_bytes()
    with pytest.raises(KeyFileError, match=f"received mode {mode:04o}"):
        keys.server_pair(path)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (content, mode)


def test_secrets_are_written_for_their_owner_alone_and_never_over_others(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = tmp_path / "new" / "client.json"
        made = keys.Credentials("site", keys.new_pair(), keys.new_pair().public, "tcp://127.0.0.1:5557")
        keys.write_credentials(path, made)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert keys.read_credentials(path) == made
    with pytest.raises(KeyFileError, match="not overwritten"):
        keys.write_credentials(path, made)
    assert [one.name for one in path.parent.iterdir()] == ["client.json"]


def test_a_file_system_without_locks_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(KeyFileError, match="received 'No locks available' for"):
        access.allow_client(tmp_path / "access", "site", keys.new_pair().public)
    with pytest.raises(InputError, match="received 'No locks available' for a lock: ") as refused:
        claim_spool(tmp_path / "spool")
    assert refused.value.code == "SPOOL_UNUSABLE"


def test_who_was_revoked_is_out_after_a_power_cut_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list's bytes are on the disk before it gets its name, and its name before the command says so."""
    access.allow_client(tmp_path, "site", keys.new_pair().public)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    access.revoke_client(tmp_path, "site")
    assert synced == [(tmp_path / access.CLIENTS).stat().st_ino, tmp_path.stat().st_ino]


@pytest.mark.parametrize(
    "change",
    [
        {"public_key": "x" * 39},
        {"secret_key": 5},
        {"public_key": keys.new_pair().public},
        {"format": "another"},
        {"server_key": "~" * 40},
        {"name": None},
    ],
)
def test_a_file_with_other_keys_than_its_own_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "client.json"
    keys.write_credentials(path, keys.Credentials("site", keys.new_pair(), keys.new_pair().public, ""))
    content = {**json.loads(path.read_text()), **change}
    keys.write_private(path, content, replace=True)
    with pytest.raises(KeyFileError, match="Expected") as refused:
        keys.read_credentials(path)
    assert str(path) in refused.value.sentence


def test_a_list_that_cannot_be_read_lets_nobody_in(tmp_path: Path) -> None:
    pair = keys.new_pair()
    access.allow_client(tmp_path, "site", pair.public)
    clients = access.Clients(tmp_path / access.CLIENTS)
    clients.refresh()
    assert clients.name_of(pair.public) == "site"
    assert clients.callback("lvseg", pair.public.encode())
    (tmp_path / access.CLIENTS).chmod(0o644)
    os.utime(tmp_path / access.CLIENTS, ns=(1, 1))
    clients.refresh()
    assert clients.name_of(pair.public) is None
    assert not clients.callback("lvseg", pair.public.encode())


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_while_the_system_cannot_read_the_list_the_last_one_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    first, second = keys.new_pair().public, keys.new_pair().public
    access.allow_client(tmp_path, "first", first)
    clients = access.Clients(tmp_path / access.CLIENTS)
    clients.refresh()
    access.allow_client(tmp_path, "second", second)
    with monkeypatch.context() as failing:

        def refuse(path: Path, *_: object) -> int:
            raise OSError(code, os.strerror(code))

        failing.setattr(keys.os, "open", refuse)
        for _ in range(3):
            clients.refresh()
        assert list(clients.names.values()) == ["first"]
        assert os.strerror(code) in clients.problem
        assert caplog.text.count("stay as they are") == 1
    clients.refresh()  # though the file is as it was
    assert set(clients.names.values()) == {"first", "second"}
    assert clients.problem == ""
    (tmp_path / access.CLIENTS).unlink()
    clients.refresh()
    assert clients.names == {}


def test_a_disk_that_fails_amid_a_file_of_keys_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "server.json"
    keys.server_pair(path)
    whole = os.fdopen

    class Failing:
        def __init__(self, descriptor: int) -> None:
            self.file = whole(descriptor, "rb")

        def __enter__(self) -> Failing:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def fileno(self) -> int:
            return self.file.fileno()

        def read(self, _: int) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(keys.os, "fdopen", lambda descriptor, _: Failing(descriptor))
    with pytest.raises(KeyFileError, match="Input/output error") as told:
        keys.server_pair(path)
    assert str(path) in told.value.sentence


def test_what_root_writes_is_the_folder_s_owner_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the server, which runs as another user, can neither read the list nor take the lock."""
    folder, given = tmp_path / "access", {}
    folder.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    def give(descriptor: int, user: int, group: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        given[name.partition("clients.json")[1] or name] = (user, group)

    monkeypatch.setattr(os, "fchown", give)
    assert admin.main(["--access", str(folder), "allow-client", "site-a", keys.new_pair().public]) == 0
    facts = folder.stat()
    assert given == dict.fromkeys([access.LOCK, access.CLIENTS], (facts.st_uid, facts.st_gid))


def test_a_folder_that_root_makes_is_its_place_s_owner_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the server, which runs as another user, cannot start where its operator asked for its key before."""
    given = {}
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    def give(descriptor: int, user: int, group: int) -> None:
        given[Path(f"/proc/self/fd/{descriptor}").readlink()] = (user, group)

    monkeypatch.setattr(os, "fchown", give)
    assert admin.main(["--access", str(tmp_path / "access"), "server-key"]) == 0
    facts = tmp_path.stat()
    assert given[tmp_path / "access"] == (facts.st_uid, facts.st_gid)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_root_and_the_owner_of_the_folder_change_one_list(tmp_path: Path) -> None:
    folder = tmp_path / "access"
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    for name in ("site-a", "site-b"):  # the second time the list is that user's
        assert admin.main(["--access", str(folder), "allow-client", name, keys.new_pair().public]) == 0
    assert {(path.name, path.stat().st_uid) for path in folder.iterdir()} == {(".lock", 12345), ("clients.json", 12345)}
    os.chown(folder / access.CLIENTS, 23456, -1)
    with pytest.raises(KeyFileError, match="received one of user 23456"):
        access.read_clients(folder / access.CLIENTS)


def test_the_operator_s_command_allows_lists_and_revokes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, pair = ["--access", str(tmp_path / "access")], keys.new_pair()
    assert admin.main([*folder, "server-key"]) == 0
    assert keys.is_key(capsys.readouterr().out.strip())
    for _ in range(2):  # the second time the name is taken
        code = admin.main([*folder, "allow-client", "site-a", pair.public])
    assert code == 2
    assert "let in already: site-a" in capsys.readouterr().err
    assert admin.main([*folder, "clients"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()][-1] == ["site-a", pair.public]
    for arguments, sentence in (
        (["allow-client", "a b", keys.new_pair().public], "Expected a name of letters"),
        (["allow-client", "site-b", "no key"], "Expected a public key"),
        (["revoke-client", "site-b"], "Expected one of local, site-a, received site-b."),
    ):
        assert admin.main([*folder, *arguments]) == 2
        assert sentence in capsys.readouterr().err
    assert admin.main([*folder, "revoke-client", "site-a"]) == 0
    capsys.readouterr()
    assert admin.main([*folder, "clients"]) == 0
    assert pair.public not in capsys.readouterr().out


def test_a_client_elsewhere_makes_its_keys_and_is_let_in(secured: Server, tmp_path: Path) -> None:
    path, scan = tmp_path / "home" / "client.json", scan_file(tmp_path)

    def client(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "serving.client", *map(str, arguments)],
            cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, "LVSEG_KEY": str(path)},
        )  # fmt: skip

    submit = ("submit", scan, "--model", "bright", "-o", tmp_path / "mask.vtk")
    missing = client(*submit)
    assert (missing.returncode, "keys new" in missing.stderr) == (2, True)
    made = client("keys", "new", "--name", "site-x", "--server-key", local(secured).server_key, "--server",
                  secured.endpoint, "--key", path)  # fmt: skip
    assert made.returncode == 0, made.stderr
    outside = client(*submit)
    assert (outside.returncode, "lets in" in outside.stderr) == (4, True)
    name, public = client("keys", "show").stdout.split()
    assert admin.main(["--access", str(secured.models.parent / "access"), "allow-client", name, public]) == 0
    done = client(*submit)
    assert done.returncode == 0, done.stderr
    expect_right_mask(scan, tmp_path / "mask.vtk")


def test_keys_of_others_that_may_not_be_looked_for_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a folder with a server's `access`, which is its user's alone."""
    closed, own = tmp_path / ("x" * 300) / "local.json", tmp_path / connection.HOME_KEY  # the first fails as one would
    keys.write_credentials(own, keys.Credentials("own", keys.new_pair(), keys.new_pair().public, ""))
    monkeypatch.setattr(connection, "LOCAL_KEY", closed)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(connection.OWN_KEY, raising=False)
    assert connection.find_credentials().name == "own"
    with pytest.raises(ClientError) as refused:
        connection.find_credentials(closed)
    assert (refused.value.code, refused.value.exit_code) == ("BAD_KEY", 2)
    assert refused.value.sentence == f"Expected a file with keys, received 'File name too long' for {closed}."


def test_without_keys_only_a_server_on_this_computer_is_spoken_to() -> None:
    with pytest.raises(ClientError, match="on this computer") as refused:
        Client("tcp://192.0.2.1:5557", insecure=True)
    assert (refused.value.code, refused.value.exit_code) == ("BAD_ADDRESS", 2)


@pytest.mark.parametrize("text", ["#" * 40, "~" * 40, "a" * 39, "a" * 41, "é" * 40, "", None, 5])
def test_what_is_no_key_is_told_apart_from_one(text: object) -> None:
    assert not keys.is_key(text)
    assert keys.is_key(keys.new_pair().public)
