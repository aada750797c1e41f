"""Dataset cards, `data/*.yaml`: where the scans of a dataset lie, whose they are and what their labels mean."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lvseg.errors import InputError
from lvseg.keys import Keys, check_keys, read_yaml

PLACEHOLDERS = ("patient", "study")


class Simulate(Keys):
    """Simulated patients that preparation makes where the card's root does not hold them yet."""

    scanner: str
    patients: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)]


class Card(Keys):
    """One dataset.

    `root` is relative to the card's folder. `image`, `mask` and `tissues` are paths below it that hold `{patient}` and,
    where a patient was scanned more than once, `{study}`; a folder stands for a DICOM series. `labels` names each class
    and the values it has in the mask files; every other value is background.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    task: str
    scanner: str
    modality: Literal["MR", "CT"]
    root: str
    image: str
    mask: str
    tissues: str | None = None
    labels: Annotated[dict[str, list[Annotated[int, Field(ge=1, le=255)]]], Field(min_length=1)]
    simulate: Simulate | None = None
    licence: str
    citation: str

    @model_validator(mode="after")
    def _check(self) -> Card:
        for key in ("image", "mask", "tissues"):
            pattern = getattr(self, key)
            if pattern is None:
                continue
            names = re.findall(r"\{(.*?)\}", pattern)
            if "patient" not in names or set(names) - set(PLACEHOLDERS) or pattern.count("{") != len(names):
                raise ValueError(
                    f"expected {key} to hold {{patient}} and at most {{study}} beside it, received {pattern}"
                )
            if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
                raise ValueError(f"expected {key} to be a path below root, received {pattern}")
        values = [value for own in self.labels.values() for value in own]
        if len(set(values)) < len(values):
            raise ValueError(f"expected labels to share no value, received {self.labels}")
        if "background" in self.labels or not all(self.labels) or not all(self.labels.values()):
            raise ValueError(f"expected labels to be named, none of them background, received {self.labels}")
        return self

    @property
    def classes(self) -> list[str]:
        """Names of the classes, background first; the index is the label in shards and answers."""
        return ["background", *self.labels]


@dataclass(frozen=True)
class Scan:
    """One scan of a dataset with its files: whose it is and where it lies."""

    card: Card
    patient: str
    study: str
    image: Path
    mask: Path
    tissues: Path | None


def load_card(path: Path) -> tuple[Card, Path]:
    """Reads and checks a card; returns it with the folder its scans lie in.

    Raises:
        InputError: NOT_FOUND, BAD_CONFIG.
    """
    card = check_keys(Card, read_yaml(path), str(path))
    return card, path.parent / card.root


def find_scans(card: Card, root: Path) -> list[Scan]:
    """All scans of a card, sorted by patient and study.

    Raises:
        InputError: NOT_FOUND if there are none, or a scan lacks its mask.
    """
    pattern = re.escape(card.image)
    for name in PLACEHOLDERS:
        group = rf"\{{{name}\}}"
        pattern = pattern.replace(group, rf"(?P<{name}>[^/]+)", 1).replace(group, rf"(?P={name})")
    scans = []
    for image in sorted(root.glob(re.sub(r"\{.*?\}", "*", card.image))):
        match = re.fullmatch(pattern, image.relative_to(root).as_posix())
        if match is None or any(part.startswith(".") for part in image.relative_to(root).parts):
            continue
        found = {"study": "1", **match.groupdict()}
        mask = root / card.mask.format(**found)
        tissues = root / card.tissues.format(**found) if card.tissues else None
        for path in (mask, tissues):
            if path is not None and not path.exists():
                raise InputError(
                    "NOT_FOUND", f"Expected {path} beside {image}, received no such file (card {card.name})."
                )
        scans.append(Scan(card, found["patient"], found["study"], image, mask, tissues))
    if not scans:
        raise InputError(
            "NOT_FOUND", f"Expected scans at {root / card.image} for card {card.name}, received no such files."
        )
    return scans
