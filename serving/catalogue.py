"""Which model versions are served: those of `models/<name>/<version>/` whose digest stands in the allow-list.

A TensorFlow model is a program, so loading one is running code: only versions whose digest, over every byte of the
folder, an operator has put on the list (access/models.json, a list for each models folder) are loaded. On the server's
first start with a models folder, when there is no list yet, it is made of what lies there.

Of each model the newest allowed version that was not rolled back is the current one. `serve` in the server's file keeps
others loaded beside it.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lvseg.errors import InputError
from serving import access, keys, protocol
from serving.errors import KeyFileError

FORMAT = "lvseg models 1"
VERSION = re.compile(r"[1-9][0-9]{0,8}")
PIECE_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Entry:
    """A version on the list: its digest, the day it was allowed, whether it was rolled back."""

    model: str
    version: int
    sha256: str
    allowed: str
    rolled_back: bool = False

    @property
    def served(self) -> protocol.Model:
        """As clients hear of it."""
        return protocol.Model(self.model, self.version, self.sha256)


def versions_in(folder: Path) -> dict[str, list[int]]:
    """The versions that lie in a models folder, ascending, by the model's name.

    Raises:
        InputError: MODEL_UNAVAILABLE where there is no such folder, or none in it, or it cannot be read.
    """
    try:
        is_folder = folder.is_dir()
    except OSError as error:
        raise _unreadable(folder, error) from error
    if not is_folder:
        raise InputError("MODEL_UNAVAILABLE", f"Expected a folder of models, received no such folder: {folder}.")
    found: dict[str, list[int]] = {}
    for model in _folders_in(folder):
        versions = [int(path.name) for path in _folders_in(model) if VERSION.fullmatch(path.name)]
        if versions and not protocol.is_model_name(model.name):
            raise InputError("MODEL_UNAVAILABLE", f"Expected a plain name for a model, received {model}.")
        if versions:
            found[model.name] = sorted(versions)
    if not found:
        raise InputError("MODEL_UNAVAILABLE", f"Expected models as <name>/<version>/, received none in {folder}.")
    return found


def digest_of(version: Path) -> str:
    """SHA-256 over the names, sizes and bytes of all files of a version folder, in the names' order.

    Raises:
        InputError: MODEL_UNAVAILABLE: no model there, or it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for needed in ("saved_model.pb", "model.json"):
            if not (version / needed).is_file():
                raise InputError("MODEL_UNAVAILABLE", f"Expected a SavedModel, received no {needed} in {version}.")
        for path in sorted(version.rglob("*")):
            if path.is_symlink():  # what it leads to could change, and would not be in the digest
                raise InputError(
                    "MODEL_UNAVAILABLE", f"Expected files and folders in a model, received a link: {path}."
                )
            if path.is_dir():
                continue
            name = path.relative_to(version).as_posix().encode()
            digest.update(b"%d %s %d\n" % (len(name), name, path.stat().st_size))
            with path.open("rb") as file:
                while piece := file.read(PIECE_BYTES):
                    digest.update(piece)
    except OSError as error:
        raise InputError(
            "MODEL_UNAVAILABLE", f"Expected a model that can be read, received '{error.strerror}' in {version}."
        ) from error
    return digest.hexdigest()


def read(path: Path, models: Path) -> tuple[Entry, ...]:
    """The allow-list of a models folder, empty where nothing of it was allowed yet.

    Raises:
        KeyFileError: it cannot be read, or is none.
    """
    return _lists(path).get(str(models.resolve()), ())


def folders(path: Path) -> dict[str, tuple[Entry, ...]]:
    """All lists by models folder.

    Raises:
        KeyFileError: they cannot be read, or are none.
    """
    return _lists(path)


def trust_on_first_start(folder: Path, models: Path) -> None:
    """Makes the list of the versions that lie there, where the models folder has none yet.

    Raises:
        InputError: MODEL_UNAVAILABLE.
        KeyFileError: the list cannot be read or written.
    """
    with access.changing(folder):
        path = folder / access.MODELS
        if str(models.resolve()) in _lists(path):
            return
        there = versions_in(models).items()
        entries = [_entry(models, model, version) for model, versions in there for version in versions]
        _write(path, models, entries)
        access.log.info("models allowed on first start: %s", ", ".join(f"{one.model}/{one.version}" for one in entries))


def not_allowed(entries: Sequence[Entry], models: Path) -> list[str]:
    """Versions that lie in the models folder and are not on its list.

    Raises:
        InputError: MODEL_UNAVAILABLE.
    """
    known = {_id(entry) for entry in entries}
    there = versions_in(models).items()
    return [f"{name}/{version}" for name, versions in there for version in versions if (name, version) not in known]


def allow(folder: Path, version: Path) -> Entry:
    """Puts a version folder, `<models>/<name>/<version>`, on the list as it is now; undoes a rollback of it.

    Raises:
        InputError: MODEL_UNAVAILABLE.
        KeyFileError: the list cannot be read or written.
    """
    version = Path.cwd() / version  # links stay, since a server goes by the names in its models folder
    if not VERSION.fullmatch(version.name) or not protocol.is_model_name(version.parent.name):
        raise InputError("MODEL_UNAVAILABLE", f"Expected a folder <models>/<name>/<version>, received {version}.")
    models = version.parent.parent
    entry = _entry(models, version.parent.name, int(version.name))
    with access.changing(folder):
        path = folder / access.MODELS
        others = [one for one in read(path, models) if _id(one) != _id(entry)]
        _write(path, models, [*others, entry])
    return entry


def roll_back(folder: Path, models: Path, model: str) -> tuple[Entry, Entry]:
    """Marks the current version of a model as rolled back, so that the one before it is current.

    Returns:
        What was current, and what is now.

    Raises:
        InputError: MODEL_UNAVAILABLE: there is no version to go back to.
        KeyFileError: the list cannot be read or written.
    """
    with access.changing(folder):
        path = folder / access.MODELS
        entries = read(path, models)
        usable = sorted((one for one in entries if one.model == model and not one.rolled_back), key=_id)
        if len(usable) < 2:
            known = ", ".join(f"{one.model}/{one.version}" for one in entries if not one.rolled_back) or "no models"
            raise InputError(
                "MODEL_UNAVAILABLE",
                f"Expected a model with an earlier allowed version, received {model} (allowed in {models}: {known}).",
            )
        current, before = usable[-1], usable[-2]
        withdrawn = replace(current, rolled_back=True)
        _write(path, models, [withdrawn if one is current else one for one in entries])
    return current, before


def to_serve(entries: Sequence[Entry], beside: Mapping[str, Sequence[int]]) -> tuple[Entry, ...]:
    """What should be loaded: of each model the current version first, then those that `beside` names.

    Whether they are there and sound is found out by loading them: falling back to another version would be silent.

    Args:
        entries: the list.
        beside: `serve` of the server's file.
    """
    chosen: list[Entry] = []
    for model in sorted({entry.model for entry in entries}):
        own = [entry for entry in entries if entry.model == model]
        current = max((one for one in own if not one.rolled_back), key=_id, default=None)
        chosen += [current] if current else []
        chosen += [one for one in own if one.version in beside.get(model, ()) and one is not current]
    return tuple(chosen)


def _folders_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: OSError) -> InputError:
    return InputError(
        "MODEL_UNAVAILABLE", f"Expected folders that can be read, received '{error.strerror}' for {folder}."
    )


def _entry(models: Path, model: str, version: int) -> Entry:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Entry(model, version, digest_of(models / model / str(version)), today)


def _id(entry: Entry) -> tuple[str, int]:
    return entry.model, entry.version


def _lists(path: Path) -> dict[str, tuple[Entry, ...]]:
    if not keys.is_there(path):
        return {}
    content = keys.read_private(path)
    lists = content.get("folders")
    try:
        if content.get("format") != FORMAT or type(lists) is not dict:
            raise ValueError
        found = {models: tuple(Entry(**entry) for entry in entries) for models, entries in lists.items()}
        for entry in (entry for entries in found.values() for entry in entries):
            protocol.encode(protocol.Ready((entry.served,)))  # refuses what WELCOME could not say
            if type(entry.rolled_back) is not bool or type(entry.allowed) is not str:
                raise ValueError
    except (ValueError, TypeError) as error:
        raise KeyFileError(f"Expected a list of allowed models, received another file: {path}.") from error
    return found


def _write(path: Path, models: Path, entries: Sequence[Entry]) -> None:
    lists = {**_lists(path), str(models.resolve()): tuple(sorted(entries, key=_id))}
    content = {name: [asdict(entry) for entry in own] for name, own in lists.items()}
    keys.write_private(path, {"format": FORMAT, "folders": content}, replace=True)
