"""Which of a folder's DICOM images belong together, and the choice among them where they are several stacks.

A series is what has one SeriesInstanceUID. Scanners put more than one stack of slices into a series: the water, fat,
in-phase and opposed-phase images of a Dixon scan, the echoes of a multi-echo one, magnitude and phase, the times of a
dynamic one. Images are of different stacks where they differ in the words of their image type (after the first two,
ORIGINAL or DERIVED and PRIMARY or SECONDARY), echo time, complex component or stack number; and where several lie at
one position, in whatever else tells them apart.

Nothing is picked: several series, or stacks, are an error that lists them, by nothing that names a patient. A choice is
written SERIES, SERIES/STACK or, where there is one series, STACK. SERIES is a SeriesInstanceUID or an ending of one, a
SeriesNumber or a SeriesDescription; STACK the words that the list shows for a stack, such as W or TE4.6, parted by
commas, or `all`: every image of the series in one stack, for a scanner that was inconsistent about a word. `*` as
SERIES is any: */W is the one stack of all series with that word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pydicom
from pydicom.uid import (
    BasicTextSRStorage,
    ComprehensiveSRStorage,
    EncapsulatedPDFStorage,
    EnhancedSRStorage,
    GrayscaleSoftcopyPresentationStateStorage,
    KeyObjectSelectionDocumentStorage,
    RawDataStorage,
    XRayRadiationDoseSRStorage,
)

from lvseg.errors import InputError
from lvseg.formats.dicom_file import DicomFile, functional_groups, number_or_none, text, values

# What scanners and archives export beside images: it has no pixels and belongs to no stack.
NO_IMAGES = frozenset(
    (
        BasicTextSRStorage,
        ComprehensiveSRStorage,
        EncapsulatedPDFStorage,
        EnhancedSRStorage,
        GrayscaleSoftcopyPresentationStateStorage,
        KeyObjectSelectionDocumentStorage,
        RawDataStorage,
        XRayRadiationDoseSRStorage,
    )
)
ALL, ANY_SERIES = "all", "*/"
UID_ENDING = 6
UID_ENDING_LEAST = 4
LISTED = 20
# What tells images at one position apart where nothing above does: the element, and how the list shows it.
WITHIN_POSITION = (
    ("EchoNumbers", "echo"),
    ("TemporalPositionIdentifier", "time"),
    ("TemporalPositionIndex", "time"),
    ("DiffusionBValue", "b"),
    ("NominalCardiacTriggerDelayTime", "trigger"),
    ("TriggerTime", "trigger"),
    ("InversionTime", "TI"),
    ("FlipAngle", "FA"),
    ("ConvolutionKernel", "kernel"),
    ("AcquisitionNumber", "acquisition"),
)
Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Frame:
    """One image: a file, or a frame of one, and the datasets that describe it, the most specific first."""

    file: DicomFile
    index: int
    groups: list[pydicom.Dataset]

    @property
    def words(self) -> tuple[str, ...]:
        """The image type, upper case."""
        return _image_type([*self.groups, self.file.header])

    @property
    def traits(self) -> tuple[tuple[str, ...], str, str, str]:
        """What makes it another stack wherever it lies."""
        echo_ms = echo_time_ms(self)
        stack = text(self.groups, "StackID")
        return (
            tuple(sorted(set(self.words[2:]))),
            "" if echo_ms is None else f"TE{round(echo_ms, 2):g}",
            text(self.groups, "ComplexImageComponent").upper(),
            f"stack{stack}" if stack else "",
        )

    @property
    def place(self) -> tuple[float, ...]:
        """Its position in mm, rounded, or nothing where it has none."""
        try:
            return tuple(round(float(str(mm)), 2) for mm in _raw(self.groups, "ImagePositionPatient"))
        except ValueError:
            return ()


@dataclass(frozen=True, eq=False)
class Stack:
    """Images that may make one volume, and the words that tell them from the other stacks of their series."""

    frames: list[Frame]
    label: tuple[str, ...]
    words: frozenset[str]


def echo_time_ms(frame: Frame) -> float | None:
    """Of classic images EchoTime, of enhanced ones EffectiveEchoTime."""
    classic = number_or_none(frame.groups, "EchoTime")
    return classic if classic is not None else number_or_none(frame.groups, "EffectiveEchoTime")


def is_no_image(file: DicomFile) -> bool:
    """Whether it is one of the objects that have no pixels by their kind."""
    return not file.pixels_at and text([file.header], "SOPClassUID") in NO_IMAGES and "Rows" not in file.header


def choose(files: Sequence[DicomFile], choice: str | None, path: Path) -> list[Frame]:
    """The images of one stack.

    Args:
        files: all that were found.
        choice: what the module's docstring says, or None where there has to be but one stack.
        path: of the folder, for messages.

    Raises:
        InputError: MULTIPLE_SERIES, UNKNOWN_SERIES, NO_PIXELS, UNSUPPORTED_FORMAT or INPUT_TRUNCATED.
    """
    images = [file for file in files if not is_no_image(file)]
    if not images:
        raise InputError("NO_PIXELS", f"Expected images, received DICOM objects without pixels alone in {path}.")
    groups = _grouped(images, _series_key)
    if choice is None:
        if len(groups) > 1:
            raise InputError(
                "MULTIPLE_SERIES",
                f"Expected one series, received {len(groups)} in {path}: {_listed(groups)} (choose one by its number,"
                " description or uid).",
            )
        return _only(groups[0], _stacks(groups[0]), path)
    if choice.strip().startswith(ANY_SERIES):
        return _with_word([stack for group in groups for stack in _stacks(group)], choice.strip()[2:], path).frames
    series, word = _chosen_series(groups, choice.strip())
    if series is None:
        raise InputError(
            "UNKNOWN_SERIES",
            f"Expected one of the series in {path}, received series={choice[:80]!r}, which fits none or several:"
            f" {_listed(groups)}.",
        )
    stacks = _stacks(series)
    if not word:
        return _only(series, stacks, path)
    if word.lower() == ALL:
        return [frame for stack in stacks for frame in stack.frames]
    return _with_word(stacks, word, path).frames


def _with_word(stacks: Sequence[Stack], word: str, path: Path) -> Stack:
    """The one stack whose label is, or else whose words hold, what is asked for; InputError UNKNOWN_SERIES."""
    asked = frozenset(part.strip().upper() for part in word.split(","))
    exact = [stack for stack in stacks if asked == frozenset(part.upper() for part in stack.label)]
    fitting = exact or [stack for stack in stacks if asked <= stack.words]
    if len(fitting) != 1:
        raise InputError(
            "UNKNOWN_SERIES",
            f"Expected one of the stacks {_stack_list(stacks)} in {path}, received {word[:80]!r}, which fits"
            f" {len(fitting)} of them.",
        )
    return fitting[0]


def _only(series: Sequence[DicomFile], stacks: Sequence[Stack], path: Path) -> list[Frame]:
    if len(stacks) > 1:
        number = text([series[0].header], "SeriesNumber")
        example = "/".join(part for part in (number, ",".join(stacks[0].label)) if part)
        places = [frame.place for stack in stacks for frame in stack.frames]
        whole = f", or {'/'.join(part for part in (number, ALL) if part)!r} for one stack of all"
        hint = whole if len(set(places)) == len(places) else ""
        raise InputError(
            "MULTIPLE_SERIES",
            f"Expected one stack of slices, received {len(stacks)} in {path}: {_describe(series)} in stacks"
            f" {_stack_list(stacks)} (choose one, such as series={example!r}{hint}).",
        )
    return stacks[0].frames


def _series_key(file: DicomFile) -> Hashable:
    header = file.header
    uid = str(header.get("SeriesInstanceUID") or "")
    # An anonymiser that empties the UIDs leaves these two to tell series apart.
    return (uid, "", "") if uid else ("", text([header], "SeriesDescription"), text([header], "SeriesNumber"))


def _grouped(items: Sequence[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """The items by key, in order of first appearance."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _chosen_series(groups: Sequence[list[DicomFile]], choice: str) -> tuple[list[DicomFile] | None, str]:
    """The one series that the choice means, and the rest of the choice, which is for its stacks."""
    attempts = [(choice, "")]
    if "/" in choice:
        name, _, word = choice.rpartition("/")
        attempts.append((name, word))
    for name, word in attempts:
        fitting = _named(groups, name)
        if len(fitting) == 1:
            return fitting[0], word
        if fitting:
            return None, ""
    return (groups[0], choice.removeprefix("/")) if len(groups) == 1 else (None, "")


def _named(groups: Sequence[list[DicomFile]], name: str) -> list[list[DicomFile]]:
    """The series of that UID, number, description or UID's ending, the first of these that fits any."""
    if not name:
        return list(groups)
    ending = name.removeprefix("...")

    def uid(files: list[DicomFile]) -> str:
        return text([files[0].header], "SeriesInstanceUID")

    rules: list[Callable[[list[DicomFile]], bool]] = [
        lambda files: uid(files) == name,
        lambda files: text([files[0].header], "SeriesNumber") == name,
        lambda files: text([files[0].header], "SeriesDescription").lower() == name.lower(),
        lambda files: len(ending) >= UID_ENDING_LEAST and uid(files).endswith(ending),
    ]
    for rule in rules:
        fitting = [files for files in groups if rule(files)]
        if fitting:
            return fitting
    return []


def _stacks(series: Sequence[DicomFile]) -> list[Stack]:
    """The series' stacks, with what tells them apart."""
    frames = [Frame(file, index, groups) for file in series for index, groups in enumerate(functional_groups(file))]
    if any(file.is_segmentation for file in series):
        return [Stack(frames, (), frozenset())]
    parts = [(part, ()) for part in _grouped(frames, lambda frame: frame.traits)]
    split = [piece for part, label in parts for piece in _split_by_place(part, label)]
    common = frozenset.intersection(*(_tokens(part[0]) for part, _ in split))
    stacks = []
    for part, extra in split:
        tokens = _tokens(part[0])
        own = [word for word in (*part[0].words[2:], *part[0].traits[1:]) if word and word.upper() not in common]
        label = tuple(dict.fromkeys([*own, *extra])) or tuple(part[0].words[2:3])
        stacks.append(Stack(part, label, tokens | frozenset(word.upper() for word in extra)))
    return stacks


def _split_by_place(frames: list[Frame], label: tuple[str, ...]) -> list[tuple[list[Frame], tuple[str, ...]]]:
    """Parts in which no two images lie at one position, as far as something tells them apart."""
    images_at = Counter(frame.place for frame in frames)
    most = max(images_at.values())
    if most == 1 or () in images_at:
        return [(frames, label)]
    for keyword, name in WITHIN_POSITION:
        parts = _grouped(frames, lambda frame, keyword=keyword: text(frame.groups, keyword))  # type: ignore[misc]
        if 1 < len(parts) <= most:
            return [
                piece
                for part in parts
                for piece in _split_by_place(part, (*label, f"{name}{text(part[0].groups, keyword)}"))
            ]
    return [(frames, label)]


def _tokens(frame: Frame) -> frozenset[str]:
    return frozenset(word.upper() for word in (*frame.words[2:], *frame.traits[1:]) if word)


def _image_type(groups: Sequence[pydicom.Dataset]) -> tuple[str, ...]:
    """FrameType of the frame's own groups, else ImageType."""
    return tuple(str(word).strip().upper() for word in _raw(groups, "FrameType") or _raw(groups, "ImageType"))


def _raw(groups: Sequence[pydicom.Dataset], keyword: str) -> list[object]:
    try:
        return next((values(group[keyword].value) for group in groups if keyword in group), [])
    except Exception:  # a value that pydicom cannot parse says nothing
        return []


def _listed(groups: Sequence[Sequence[DicomFile]]) -> str:
    """One clause a series."""
    clauses = []
    for series in groups[:LISTED]:
        try:
            stacks = _stacks(series)
        except InputError:  # of a series that nobody chose
            stacks = []
        clauses.append(_describe(series) + (f" in stacks {_stack_list(stacks)}" if len(stacks) > 1 else ""))
    more = f"; and {len(groups) - LISTED} more" if len(groups) > LISTED else ""
    return "; ".join(clauses) + more


def _describe(series: Sequence[DicomFile]) -> str:
    header = series[0].header
    uid = re.sub(r"[^0-9.]", "?", text([header], "SeriesInstanceUID"))
    description = text([header], "SeriesDescription")[:64] or "no description"
    kind = "\\".join(_image_type([header]))[:64]
    slices = sum(_frame_count(file) for file in series)
    return (
        f"{description!r} number {text([header], 'SeriesNumber') or 'none'} uid"
        f" {'...' + uid[-UID_ENDING:] if uid else 'none'} of image type"
        f" {kind!r} with {len(series)} files and {slices} slices"
    )


def _frame_count(file: DicomFile) -> int:
    try:
        return file.frames
    except InputError:
        return 0


def _stack_list(stacks: Sequence[Stack]) -> str:
    shown = [f"{','.join(stack.label)[:64]!r} with {len(stack.frames)} slices" for stack in stacks[:LISTED]]
    return "; ".join(shown) + (f"; and {len(stacks) - LISTED} more" if len(stacks) > LISTED else "")
