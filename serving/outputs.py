"""Where the client's answers go: names, and checks that nothing of the user's is harmed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from serving import protocol
from serving.durable import sync_names
from serving.errors import EXIT_BAD_INPUT, ClientError
from serving.scans import stem_of

SIDECAR_FORMAT, SIDECAR_LIMIT_BYTES = "lvseg 1", 64 * 1024  # what a server writes beside an oblique .vtk


def check_outputs(scans: Sequence[Path], outputs: Sequence[Path], report: Path | None = None) -> None:
    """Finds out, before a server is asked, whether the outputs can be written without harm to a scan or to each other.

    Args:
        scans: files or folders.
        outputs: the mask of each; a .vtk may bring a .vtk.json.
        report: a file for the measurements.

    Raises:
        ClientError: BAD_OUTPUT, exit code 2.
    """
    sources = [(scan, _place(scan)) for scan in scans]
    sidecars = [sidecar_of(out) for out in outputs if out.name.endswith(".vtk")]
    taken: set[Path] = set()
    for path in [*outputs, *sidecars, *([] if report is None else [report])]:
        place = _place(path)
        for scan, source in sources:
            if place == source or source in place.parents:
                raise ClientError(
                    "BAD_OUTPUT", f"Expected outputs apart from the scans, received {path} for {scan}.", EXIT_BAD_INPUT
                )
        if place in taken:
            raise ClientError(
                "BAD_OUTPUT",
                f"Expected outputs of different names, received two that go to {path} (a .vtk may bring a .vtk.json).",
                EXIT_BAD_INPUT,
            )
        taken.add(place)
        with writing(path):
            _check_writable(path)


def output_paths(scans: Sequence[Path], out: Path, output: str | None) -> list[Path]:
    """Where each scan's mask goes: `out` itself for one scan if it names a file, else <stem>.<format> in that folder.

    Args:
        scans: files or folders.
        out: a file .vtk, .nii.gz, .vti, .nrrd, .mha or .dcm, or a folder.
        output: format of the files, None for that of `out`, or vtk in a folder.

    Raises:
        ClientError: BAD_OUTPUT, exit code 2.
    """
    named = next((known for known in protocol.OUTPUTS if out.name.endswith(f".{known}")), None)
    with writing(out):
        is_folder = out.is_dir()
    if named and not is_folder:
        if len(scans) > 1:
            raise ClientError(
                "BAD_OUTPUT", f"Expected a folder for {len(scans)} scans, received the file {out}.", EXIT_BAD_INPUT
            )
        if output not in (None, named):
            raise ClientError("BAD_OUTPUT", f"Expected a name in .{output}, received {out}.", EXIT_BAD_INPUT)
        return [out]
    if out.suffix and not is_folder:
        names = ", ".join(f".{known}" for known in protocol.OUTPUTS)
        raise ClientError(
            "BAD_OUTPUT", f"Expected a file ending in one of {names}, or a folder, received {out}.", EXIT_BAD_INPUT
        )
    paths = [out / f"{stem_of(scan)}.{output or 'vtk'}" for scan in scans]
    twice = next((path for number, path in enumerate(paths) if path in paths[:number]), None)
    if twice:
        raise ClientError(
            "BAD_OUTPUT", f"Expected scans of different names, received two that give {twice}.", EXIT_BAD_INPUT
        )
    return paths


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what can go wrong with an output into a sentence."""
    try:
        yield
    except OSError as error:
        raise ClientError(
            "BAD_OUTPUT", f"Expected a place to write to, received '{error.strerror}' for {path}.", EXIT_BAD_INPUT
        ) from error


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it that are missing; their names are on the disk then. OSError if not."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing:
        sync_names(one.parent)


def sync_file(path: Path) -> None:
    """Waits until a file's bytes are on the disk; OSError if they cannot be."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _check_writable(path: Path) -> None:
    """Whether a file can be written there, its folder made if it is missing; OSError if not."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    folder = path.parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _place(path: Path) -> Path:
    """The path without links, so that two names of one place are the same."""
    return Path(os.path.realpath(path))


def sidecar_of(out: Path) -> Path:
    return out.with_name(out.name + ".json")


def is_sidecar(path: Path) -> bool:
    """Whether it is what a server wrote beside an earlier mask; a file of the user's own is not ours to delete."""
    if not path.is_file() or path.stat().st_size > SIDECAR_LIMIT_BYTES:
        return False
    try:
        geometry = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(geometry, dict) and geometry.get("format") == SIDECAR_FORMAT and "index_to_world_mm" in geometry
