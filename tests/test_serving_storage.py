"""Disks that are full, read-only or gone, and memory that does not suffice: told, and over once the reason is."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from bad_files import volume
from serving_fixtures import LIMIT_S, Server, make_models, running, start, until
from test_serving import Raw, expect_right_mask, expect_serving, scan_file, send_all, submit_of

from lvseg.errors import InputError
from lvseg.formats import write_volume
from serving import protocol, worker
from serving.connection import ClientError
from serving.jobs import STEPS, UPLOAD, WORK

DISK_MIB = 12
SHAPE = (100, 100, 100)
LABEL_BYTES = int(np.prod(SHAPE))
LIMITS = {"spool_free_bytes": 0, "chunk_bytes": 65536, "window_bytes": 262144}


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A small disk where `running(folder)` has its spool; skips where none may be mounted."""
    spool = folder / "spool"
    spool.mkdir()
    mounted = mount("-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", spool)
    if not mounted:
        pytest.skip("a disk of its own needs the right to mount one")
    try:
        yield spool
    finally:
        subprocess.run(["umount", "-l", spool], check=True)


def mount(*arguments: object) -> bool:
    """Whether that could be mounted."""
    if shutil.which("mount") is None:
        return False
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False).returncode == 0


class Ballast:
    """A file that takes the room on a disk."""

    def __init__(self, disk: Path) -> None:
        self.path = disk / "ballast"

    def leave(self, free_bytes: int) -> None:
        """Grows until no more than that is free."""
        with self.path.open("ab") as file:
            while (more := shutil.disk_usage(self.path.parent).free - free_bytes) > 0:
                with contextlib.suppress(OSError):  # somebody else has just taken a part of it
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, more)

    def remove(self) -> None:
        """Gives the room back."""
        self.path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with its spool on a small disk."""
    folder = tmp_path_factory.mktemp("server")
    with small_disk(folder), running(folder, limits=LIMITS) as one:
        yield one
        assert one.spooled() == []


def workers_of(server: Server) -> dict[str, list[int]]:
    return {kind: server.workers(kind) for kind in STEPS}


def expect_done_once_there_is_room(
    server: Server, scan: Path, mask: Path, fill: Callable[[str, Ballast], bool]
) -> list[str]:
    """Has a scan segmented by one call, during which the disk gets full.

    Args:
        server: its spool is on the disk.
        scan, mask: what is sent, and where the answer goes.
        fill: told each stage; fills the disk when its own has come, and says whether it did. The room is given back
            when the client waits to try again.

    Returns:
        The stages, in the order of their first time.
    """
    before = workers_of(server)
    stages: list[str] = []
    ballast, filled = Ballast(server.spool), False

    def watch(stage: str, done: int, total: int) -> None:
        nonlocal filled
        if stage not in stages:
            stages.append(stage)
        if stage == "retry":
            assert [path.name for path in server.spooled()] == [ballast.path.name]  # nothing half-written
            ballast.remove()
        elif not filled:
            filled = fill(stage, ballast)

    with server.connect() as client:
        client.segment(scan, "bright", mask, 3 * LIMIT_S, watch)
    expect_right_mask(scan, mask)
    until(lambda: server.spooled() == [], "nothing is left")
    assert server.process.poll() is None
    assert workers_of(server) == before
    return stages


def filling(server: Server, at: str, free_bytes: int) -> Callable[[str, Ballast], bool]:
    """Leaves that much room when a stage has come; the network, which was held, goes on then."""
    server.hold.touch()

    def fill(stage: str, ballast: Ballast) -> bool:
        if stage == at:
            ballast.leave(free_bytes)
            server.hold.unlink()
        return stage == at

    return fill


def test_a_disk_that_fills_up_during_an_upload_delays_the_scan(server: Server, tmp_path: Path) -> None:
    scan = write_volume(volume(SHAPE), tmp_path / "scan.nii.gz")[0]
    stages = expect_done_once_there_is_room(server, scan, tmp_path / "mask.nii.gz", filling(server, "send", 0))
    assert stages[:3] == ["pack", "send", "retry"]


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_a_disk_without_room_for_what_is_unpacked_delays_the_scan(server: Server, tmp_path: Path, suffix: str) -> None:
    """What comes in is smaller than what is made of it."""
    scan = volume(SHAPE)
    scan.voxels[:] = scan.voxels > 0
    path = write_volume(scan, tmp_path / f"scan{suffix}")[0]
    fill = filling(server, "pack", LABEL_BYTES)
    stages = expect_done_once_there_is_room(server, path, tmp_path / "mask.nii.gz", fill)
    assert stages.index("retry") < stages.index("segment")


def test_a_disk_that_is_full_at_the_network_s_answer_delays_the_scan(server: Server, tmp_path: Path) -> None:
    scan = write_volume(volume(SHAPE), tmp_path / "scan.nii.gz")[0]
    stages = expect_done_once_there_is_room(server, scan, tmp_path / "mask.nii.gz", filling(server, "segment", 0))
    assert "retry" in stages


@pytest.mark.parametrize("output", [known for known in protocol.OUTPUTS if known != "dcm"])  # it is no DICOM scan
def test_a_disk_without_room_for_the_result_delays_the_scan(server: Server, tmp_path: Path, output: str) -> None:
    scan = write_volume(volume(SHAPE), tmp_path / "scan.nii.gz")[0]
    fill = filling(server, "segment", LABEL_BYTES + 12 * 4096)  # the labels, and a few small files
    stages = expect_done_once_there_is_room(server, scan, tmp_path / f"mask.{output}", fill)
    assert stages.index("write") < stages.index("retry")


def test_a_scan_for_which_there_is_no_room_is_refused_before_a_byte(server: Server, tmp_path: Path) -> None:
    with Raw(server.endpoint) as peer:
        error = peer.ask(submit_of(bytes((DISK_MIB + 1) * 1024**2)))
        assert (error.code, error.stage, error.retryable) == ("STORAGE_FULL", "submit", True)
        assert error.retry_after_ms > 0
    assert server.spooled() == []
    expect_serving(server, tmp_path)


def test_a_server_does_not_start_on_a_disk_that_is_read_only(tmp_path: Path) -> None:
    make_models(tmp_path / "models")
    with small_disk(tmp_path) as disk:
        assert mount("-o", "remount,ro", disk)
        process = start(tmp_path, limits=LIMITS)
        output, _ = process.communicate(timeout=LIMIT_S)
    log = (tmp_path / "log").read_text()
    assert (process.returncode, output) == (2, "")
    assert "Read-only file system" in log
    assert "Traceback" not in log


@contextlib.contextmanager
def unwritable(folder: Path) -> Iterator[None]:
    """Lets nobody make a file in the folder; skips where that cannot be forbidden, as to root on some disks."""
    if os.geteuid():
        folder.chmod(0o500)
    elif subprocess.run(["chattr", "+i", folder], capture_output=True, check=False).returncode:
        pytest.skip("nothing forbids root to write here")
    try:
        yield
    finally:
        if os.geteuid():
            folder.chmod(0o700)
        else:
            subprocess.run(["chattr", "-i", folder], check=True)


@contextlib.contextmanager
def away(folder: Path) -> Iterator[None]:
    """Takes the folder away for a while."""
    elsewhere = folder.with_name("elsewhere")
    folder.rename(elsewhere)
    try:
        yield
    finally:
        elsewhere.rename(folder)


@pytest.mark.parametrize("fault", [unwritable, away])
def test_a_spool_that_cannot_be_written_to_is_told_and_used_again_afterwards(
    tmp_path: Path, fault: Callable[[Path], contextlib.AbstractContextManager[None]]
) -> None:
    scan = scan_file(tmp_path)
    with running(tmp_path, limits=LIMITS) as server, Raw(server.endpoint) as peer, server.connect() as client:
        with fault(server.spool):
            error = peer.ask(submit_of(scan.read_bytes()))
            assert (error.code, error.fault, error.retryable) == ("STORAGE_FAILED", "server", True)
            with pytest.raises(ClientError) as refused:
                client.segment(scan, "bright", tmp_path / "mask.nii.gz", LIMIT_S)
            assert (refused.value.code, refused.value.exit_code) == ("STORAGE_FAILED", 1)
        assert server.spooled() == []
        client.segment(scan, "bright", tmp_path / "mask.nii.gz", LIMIT_S)
        expect_right_mask(scan, tmp_path / "mask.nii.gz")
        assert server.process.poll() is None


@pytest.mark.parametrize("kind", ["unpack", "segment"])
def test_a_spool_that_cannot_be_read_is_not_blamed_on_the_scan(tmp_path: Path, kind: str) -> None:
    scan = write_volume(volume(), tmp_path / "scan.nii")[0]
    with running(tmp_path, limits=LIMITS) as server:
        for pid in server.workers(kind):
            os.kill(pid, signal.SIGSTOP)
        with Raw(server.endpoint) as peer:
            job = send_all(peer, scan.read_bytes(), name="scan.nii")
            folder = server.spool / job.hex()
            file = folder / UPLOAD if kind == "unpack" else folder / WORK / "scan.npy"
            if kind == "unpack":
                until(lambda: file.exists() and file.stat().st_size == scan.stat().st_size, "the scan is there")
            else:
                until((folder / WORK / "scan.json").exists, "the scan is unpacked")
            file.unlink()
            file.symlink_to("/proc/self/mem")  # a plain file that says EIO where nothing is mapped, as at its start
            for pid in server.workers(kind):
                os.kill(pid, signal.SIGCONT)
            error = peer.take_until(protocol.Error)
            assert (error.job, error.code, error.fault, error.retryable) == (job, "STORAGE_FAILED", "server", True)
            assert "Input/output error" in error.text and "scan.nii" in error.text and str(tmp_path) not in error.text
            assert peer.ask(protocol.Close(job)) == protocol.Closed(job)
        assert server.spooled() == []
        expect_serving(server, tmp_path)


def test_a_disk_that_fails_under_voxels_that_are_mapped_is_not_blamed_on_the_scan(tmp_path: Path) -> None:
    """Cut behind its header, the file is as one whose pages cannot be read: the kernel says SIGBUS for both."""
    scan = write_volume(volume(), tmp_path / "scan.nii")[0]
    with running(tmp_path, limits=LIMITS) as server:
        server.hold.touch()
        with Raw(server.endpoint) as peer:
            job = send_all(peer, scan.read_bytes(), name="scan.nii")
            until(lambda: server.runs("scan.nii"), "its voxels are mapped")
            os.truncate(server.spool / job.hex() / WORK / "scan.npy", 0)
            server.hold.unlink()
            error = peer.take_until(protocol.Error)
            assert (error.job, error.code, error.fault, error.retryable) == (job, "STORAGE_FAILED", "server", True)
            assert error.retry_after_ms > 0 and "scan.nii" in error.text
            assert peer.ask(protocol.Close(job)) == protocol.Closed(job)
        expect_serving(server, tmp_path)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.EIO, ("STORAGE_FAILED", "server")), (errno.EACCES, ("STORAGE_FAILED", "server")),
        (errno.ENOSPC, ("STORAGE_FULL", "server")), (errno.ENOMEM, ("OUT_OF_MEMORY", "server")),
        (errno.ENAMETOOLONG, ("NOT_READABLE", "input")), (errno.ENOTDIR, ("NOT_READABLE", "input")),
        (errno.ELOOP, ("NOT_READABLE", "input")),
    ],
)  # fmt: skip
def test_only_what_a_scan_cannot_bring_about_is_the_spool_s_fault(
    tmp_path: Path, number: int, told: tuple[str, str]
) -> None:
    """Else a scan that names an impossible file would be tried for ever."""
    work = protocol.Work(bytes(32), "a.mha", "file", "bright", 3, "", "vtk", "raw", 10, 0, 0)
    error = InputError("NOT_READABLE", "Expected a readable scan, received another.")
    error.__cause__ = OSError(number, os.strerror(number))
    assert worker._explained(error, work, tmp_path / "job", tmp_path, "read")[:2] == told


@pytest.mark.parametrize("error_name", ["MemoryError", "ResourceExhaustedError"])
def test_memory_that_does_not_suffice_delays_the_scan_and_costs_no_worker(tmp_path: Path, error_name: str) -> None:
    scan = scan_file(tmp_path)
    with running(tmp_path, limits=LIMITS) as server:
        before = workers_of(server)
        server.short.write_text(error_name)
        with Raw(server.endpoint) as peer:
            job = send_all(peer, scan.read_bytes())
            error = peer.take_until(protocol.Error)
            assert (error.job, error.code, error.stage) == (job, "OUT_OF_MEMORY", "segment")
            assert (error.fault, error.retryable, error.retry_after_ms > 0) == ("server", True, True)
            assert peer.ask(protocol.Close(job)) == protocol.Closed(job)
        assert server.spooled() == []
        told = []

        def watch(stage: str, done: int, total: int) -> None:
            if stage == "retry":
                told.append(stage)
                server.short.unlink(missing_ok=True)

        with server.connect() as client:
            client.segment(scan, "bright", tmp_path / "mask.nii.gz", 3 * LIMIT_S, watch)
        assert told == ["retry"]
        expect_right_mask(scan, tmp_path / "mask.nii.gz")
        assert workers_of(server) == before
        expect_serving(server, tmp_path)
