"""What every simulated protocol, MR or CT, hands back, and what it has to offer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol as Interface

from lvseg.volume import Volume


@dataclass(frozen=True)
class Scan:
    """A simulated scan with its truth; all volumes lie on one grid, in the direction in which the scanner stores them.

    Args:
        images: file stem to volume: "image", and for fat scans also "water" and "fat".
        mask: uint8 labels as an operator draws them.
        tissues: uint8 numbers of `lvseg.phantom.anatomy.Tissue`.
        truth: column of truth.csv to value; the same columns for every patient of a protocol.
    """

    images: Mapping[str, Volume]
    mask: Volume
    tissues: Volume
    truth: Mapping[str, float]


class Protocol(Interface):
    """A way to image a patient."""

    @property
    def name(self) -> str:
        """As in files and cards."""

    @property
    def task(self) -> str:
        """What its masks are for, as in cards: "volume", "fatfraction", ..."""

    @property
    def varied(self) -> bool:
        """Whether its patients have peculiarities, and so are other people than those of other protocols."""

    def image(self, seed: int, number: int) -> Scan:
        """Draws one patient and scans it; the same seed and number is the same anatomy under every protocol
        of usual patients, and under every one of varied patients."""
