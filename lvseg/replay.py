"""Whose scans an adaptation reads: of the new study, of those replayed so that nothing is forgotten, and for checks."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from lvseg.cards import load_card
from lvseg.config import Data
from lvseg.errors import InputError
from lvseg.prepare import ShardSet, prepare, simulated_patients

T = TypeVar("T")
REPLAYED, CHECKED = 24, 12  # patients that are replayed, and that tell what is forgotten; scans that a check reads
LEAST_TO_LEAVE_OUT, LEFT_OUT_SHARE = 4, 0.25


class Shard(NamedTuple):
    """A prepared scan."""

    patient: str
    file: Path
    slices: int
    voxels_sha256: str


@dataclass(frozen=True)
class Volumes:
    """Shards of chosen patients, in the order of the manifests."""

    rows: tuple[Shard, ...] = ()

    @classmethod
    def of_sets(cls, sets: Sequence[ShardSet]) -> Volumes:
        """Everybody of prepared datasets."""
        return cls(
            tuple(
                Shard(row["patient"], shards.folder / row["file"], row["shape"][0], row["voxels_sha256"])
                for shards in sets
                for row in shards.rows
            )
        )

    def spread(self, most: int) -> Volumes:
        """At most so many scans: of patients evenly spread a scan each, then a second one, as far as it goes."""
        own = {patient: [row for row in self.rows if row.patient == patient] for patient in spread(self.patients, most)}
        in_turn = [row for visit in itertools.zip_longest(*own.values()) for row in visit if row is not None]
        chosen = set(in_turn[:most])
        return Volumes(tuple(row for row in self.rows if row in chosen))

    def of(self, patients: set[str]) -> Volumes:
        """Those of some patients."""
        return Volumes(tuple(row for row in self.rows if row.patient in patients))

    @property
    def patients(self) -> list[str]:
        """Their ids, sorted."""
        return sorted({row.patient for row in self.rows})

    @property
    def files(self) -> list[Path]:
        """Their shards."""
        return [row.file for row in self.rows]

    @property
    def slices(self) -> int:
        """How many slices they hold together."""
        return sum(row.slices for row in self.rows)


def left_out(patients: Sequence[str], others: int = 0, deciding: int = 0) -> list[str]:
    """Those that decide, by a hash of their ids: a quarter where there are enough, but never all.

    Args:
        patients: to choose among; others: how many more there are, and of those how many decide already (`deciding`).
    """
    every = len(patients) + others
    count = max(1, int(every * LEFT_OUT_SHARE)) - deciding if every >= LEAST_TO_LEAVE_OUT else 0
    ordered = sorted(patients, key=lambda name: hashlib.sha256(f"left out {name}".encode()).hexdigest())
    return sorted(ordered[: max(0, min(count, len(patients) - 1))])


def spread(each: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly spread."""
    if most <= 0 or not each:
        return []
    places = np.unique(np.linspace(0, len(each) - 1, min(most, len(each))).round().astype(int))
    return [each[place] for place in places]


def known(
    provenance: Mapping[str, Any], trained_on: Data, data: Data, cards: Sequence[Path] | None, new: set[str]
) -> tuple[Volumes, Volumes, Volumes]:
    """Patients to be replayed, those that tell what is forgotten, and everybody that was prepared for it.

    Half of either are of earlier adaptations, if there were some, the same number of each. Simulated patients are made
    where they are missing, but no more than are needed.

    Args:
        provenance: of the model's card; trained_on: its experiment's `data`; data: the adaptation's.
        cards: instead of the model's own, also of patients that it has not seen, a quarter of whom are for the check;
            none of them for no replay; None for the model's own.
        new: patients of the new study, who are among neither.

    Raises:
        InputError: NOT_FOUND for patients that are not there; what preparation says.
    """
    named = trained_on.datasets if cards is None else [str(path) for path in cards]
    if not named:
        return Volumes(), Volumes(), Volumes()
    split, studies = provenance["split"], provenance.get("adapted", [])
    replayed, checked = set(split["train"]), set(split["validation"])
    simulated = {path: simulated_patients(*load_card(Path(path))) for path in named}
    can_be = {name: there for of_card in simulated.values() for name, there in of_card.items() if name not in new}
    strangers_to_it = set(can_be) - replayed - checked - set(split["test"]) if cards is not None else set()
    made = _to_be_made(can_be, replayed, checked, strangers_to_it)
    # A card of which nobody is there and nobody is needed is as good as not named.
    needed = [
        path for path, of_card in simulated.items() if not of_card or any(of_card.values()) or made & set(of_card)
    ]
    own = data.model_copy(update={"datasets": needed, "shards": trained_on.shards})
    every = Volumes.of_sets(prepare(own, simulated=made)) if needed else Volumes()
    if cards is not None:
        strangers = sorted(set(every.patients) - replayed - checked - set(split["test"]) - new)
        checked |= set(left_out(strangers) or strangers[1:2])
        replayed |= set(strangers) - checked
    parts, there = [], set(every.patients) - new
    for part, most, of_study in ((replayed, REPLAYED, "patients"), (checked, CHECKED, "left_out")):
        # Where a study left nobody out, its patients tell what is forgotten of it.
        earlier: list[list[str]] = []
        for study in reversed(studies):  # one that grew is the same study, once
            names = (set(study[of_study] or study["patients"]) & there).difference(*earlier)
            earlier += [sorted(names)] if names else []
        a_study = max(1, most // 2 // len(earlier)) if earlier else 0
        chosen = spread([name for names in earlier for name in spread(names, a_study)], most)
        rest = sorted((there & part).difference(*earlier))
        parts.append(every.of({*chosen, *spread(rest, most - len(chosen))}))
    if not parts[0].rows:
        raise InputError(
            "NOT_FOUND",
            f"Expected patients to replay in {', '.join(named)}, received none that the model was trained on; name"
            " other cards with --replay, or none to do without, which forgets.",
        )
    return parts[0], parts[1], every


def _to_be_made(can_be: Mapping[str, bool], replayed: set[str], checked: set[str], strangers: set[str]) -> set[str]:
    """Ids of the simulated patients that are missing to those who are replayed and to those who are looked at.

    Args:
        can_be: who can be simulated, and whether they are there already.
        strangers: who of them may take the place of those that the model has seen.
    """
    made: set[str] = set()
    there, short = {name for name, is_there in can_be.items() if is_there}, 0
    for part, most in ((replayed, REPLAYED), (checked, CHECKED)):
        few = max(0, most - len(there & part))
        new = spread(sorted((set(can_be) & part) - there), few)
        made |= set(new)
        short += few - len(new)
    return made | set(spread(sorted(strangers - there), short - len(strangers & there)))


def owners(new: Volumes, every: Volumes) -> list[tuple[Shard, str]]:
    """Scans that somebody has already, and who."""
    owner = {row.voxels_sha256: row.patient for row in every.rows}
    return [(row, owner[row.voxels_sha256]) for row in new.rows if row.voxels_sha256 in owner]


def check_not_known(new: Volumes, every: Volumes) -> None:
    """Refuses scans that other patients of the datasets replayed have, who may be those the model is tested on.

    Raises:
        InputError: DUPLICATE_SCAN.
    """
    for row, other in owners(new, every):
        if other != row.patient:
            raise InputError(
                "DUPLICATE_SCAN",
                f"Expected scans that the model's datasets do not have, received those of their patient {other} for"
                f" {row.patient}.",
            )
