"""What each augmentation is worth on scanners never seen, and how many neighbouring slices, by small trainings.

    python experiments/ablation.py
    python experiments/ablation.py --only nothing everything bias_field

Most rows are short trainings, one a seed, of a narrow network at 4.5 mm on the two simulated scanners of the report,
with the augmentation they are named after and no other, as strong in mm as in experiments/anyscanner_volume_cpu.yaml.
All are measured on those validation patients of the shipped model that phantom_varied_volume has, each under a scanner
of its own. "varied_anatomy" trains on as many patients with peculiarities under the same two scanners instead, and
"on_varied_scans" on other patients and scanners of the set measured on. Rows land in runs/ablation/volume.csv, a line a
patient; what is there is not trained again, so a stopped run goes on, and rows of other settings are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rows import add_rows, number, rows_of

from lvseg import agreement, command, devices, metrics, pipeline
from lvseg.config import Experiment
from lvseg.errors import InputError
from lvseg.keys import check_keys, digest, read_yaml
from lvseg.predict import newest_version, shipped_model
from lvseg.prepare import ShardSet, prepare
from lvseg.step import Step

CONFIG = Path("experiments/anyscanner_volume_cpu.yaml")
KNOWN, PECULIAR, VARIED = "known", "peculiar", "varied"  # the same people never in two of them
CARDS = {
    KNOWN: ("data/phantom_philips_volume.yaml", "data/phantom_ge_volume.yaml"),
    PECULIAR: ("data/phantom_varied_philips.yaml", "data/phantom_varied_ge.yaml"),
    VARIED: ("data/phantom_varied_volume.yaml",),
}
OUT = Path("runs/ablation/volume.csv")
COLUMNS = {"row": str, "seed": int, "made_of": str, "patient": str, "dice": number}
SPACING_MM, SIZE = 4.5, 96
IN_PIXELS = {"elastic": "sigma_px", "blur": "max_sigma_px", "resolution": "max_factor"}  # of the config's grid
NOTHING = "nothing"
SPATIAL = ("elastic", "rotate", "scale")
# What of the config's augmentation each row has, and which other keys.
ALONE: Mapping[str, Sequence[str]] = {
    "spatial": SPATIAL,
    "contrast": ("contrast",),
    "bias_field": ("bias_field",),
    "blur": ("blur",),
    "noise": ("noise",),
    "resolution": ("resolution",),
    "gamma": ("gamma",),
    "thickness": ("thickness",),
    "ghosts": ("ghosts",),
    "field_of_view": ("field_of_view",),
    "table_and_arms": ("table", "arms"),
}
EVERYTHING = tuple(dict.fromkeys(name for names in ALONE.values() for name in names))
OTHERS: Mapping[str, tuple[Sequence[str], dict[str, Any]]] = {
    "varied_anatomy": ((), {"seen": PECULIAR}),
    "everything": (EVERYTHING, {}),
    "everything_but_contrast": (tuple(name for name in EVERYTHING if name != "contrast"), {}),
    "everything_but_thickness": (tuple(name for name in EVERYTHING if name != "thickness"), {}),
    "everything_without_neighbours": (tuple(name for name in EVERYTHING if name != "thickness"), {"neighbours": 0}),
    "everything_with_two_neighbours": (EVERYTHING, {"neighbours": 2}),
    "everything_on_varied_anatomy": (EVERYTHING, {"seen": PECULIAR}),
    "everything_on_varied_scans": (EVERYTHING, {"seen": VARIED}),
}
ROWS: Mapping[str, tuple[Sequence[str], dict[str, Any]]] = {
    NOTHING: ((), {}),
    **{name: (names, {}) for name, names in ALONE.items()},
    **OTHERS,
}


def experiment_of(row: str, seed: int, steps: int, width: int) -> Experiment:
    """A row's experiment: the config's settings of its augmentations, as strong in mm, in a small network."""
    names, other = ROWS[row]
    values = read_yaml(CONFIG)
    values["seed"] = seed
    for name, key in IN_PIXELS.items():
        values["augment"][name][key] *= values["data"]["spacing_mm"][0] / SPACING_MM
    values["data"] |= {
        "datasets": [card for cards in CARDS.values() for card in cards],
        "spacing_mm": [SPACING_MM] * 2,
        "size": SIZE,
    }
    values["data"] |= {"neighbours": other.get("neighbours", 1)}
    values["model"] |= {"width": width}
    values["augment"] = {key: value if key in names else None for key, value in values["augment"].items()}
    values["train"] |= {"steps": steps, "learning_rate": 1.0e-3, "warmup_steps": steps // 10}
    return check_keys(Experiment, values, str(CONFIG))


def split_of_shipped() -> dict[str, list[str]]:
    """Who trained the volume model that comes with lvseg, who chose it and who is kept from it."""
    card = json.loads((newest_version(shipped_model("volume")) / "model.json").read_text(encoding="utf-8"))
    return dict(card["provenance"]["split"])


def made_of(row: str, steps: int, width: int) -> str:
    """What a row's figures depend on besides the seed and the code, as 12 hexadecimal digits."""
    settings = experiment_of(row, 0, steps, width).model_dump(mode="json")
    cards = [read_yaml(Path(card)) for cards in CARDS.values() for card in cards]
    return digest([settings, ROWS[row][1].get("seen", KNOWN), cards, split_of_shipped()])[:12]


def dice_of(row: str, seed: int, steps: int, width: int, sets: Sequence[ShardSet]) -> dict[str, float]:
    """Trains a row's network and returns its Dice on every patient measured on, by id, on the network's grid.

    Args:
        sets: of the cards, in their order.
    """
    experiment = experiment_of(row, seed, steps, width)
    data, train, split = experiment.data, experiment.train, split_of_shipped()
    in_order = iter(sets)
    of_kind = {kind: [next(in_order) for _ in cards] for kind, cards in CARDS.items()}
    (varied,) = of_kind[VARIED]
    measured = varied.of(split["validation"])
    of_kind[VARIED] = [varied.of(split["train"])]
    seen = [line for shards in of_kind[ROWS[row][1].get("seen", KNOWN)] for line in _lines(shards)]
    seen = seen[: sum(len(shards.rows) for shards in of_kind[KNOWN])]  # as many as of the known scanners
    reading = pipeline.Reading(
        data.size, data.neighbours, data.normalise, data.clip_percentiles, None,
        [patient for patient, _, _ in seen], experiment.augment.contrast is not None,
    )  # fmt: skip
    batches = iter(pipeline.training_batches(
        [file for _, file, _ in seen], sum(slices for _, _, slices in seen), reading,
        experiment.seed, train.batch_size, data.shuffle_slices, 0,
    ))  # fmt: skip
    cluster = devices.cluster(train.devices, train.batch_size)
    step = Step(experiment, cluster, 2, 0.0, 1.0)  # normalise: patient brings every scan to 0..1
    for _ in command.progress(range(train.steps), f"training: {row}, seed {seed}"):
        step(next(batches))
    if step.bad_step.numpy():
        raise FloatingPointError(f"Expected finite numbers, received others at step {int(step.bad_step.numpy())}.")
    lines = _lines(measured)
    reading = reading._replace(patients=[patient for patient, _, _ in lines], tissues=False)
    volumes = pipeline.volume_samples([file for _, file, _ in lines], reading)
    return {
        patient: metrics.dice(step.labels(volume), volume.mask.numpy()[..., 0])
        for (patient, _, _), volume in zip(lines, volumes, strict=True)
    }


def _lines(shards: ShardSet) -> list[tuple[str, Path, int]]:
    """Patient, file and slices of each volume."""
    return [(line["patient"], shards.folder / line["file"], line["shape"][0]) for line in shards.rows]


def table(rows: Sequence[dict[str, str]]) -> str:
    """Mean Dice of each row for each seed, and its mean difference to nothing of the same seeds, in Markdown."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for line in rows:
        found.setdefault(line["row"], {}).setdefault(int(line["seed"]), {})[line["patient"]] = float(line["dice"])
    lines = [
        "| augmentation | mean Dice, of each seed | difference to nothing (95 % interval over patients) |",
        "|---|---|---|",
    ]
    base = found.get(NOTHING, {})
    for row in [name for name in ROWS if name in found]:
        dice = ", ".join(f"{np.mean(list(found[row][seed].values())):.3f}" for seed in sorted(found[row]))
        gained: dict[str, list[float]] = {}
        for seed in sorted(set(found[row]) & set(base)) if row != NOTHING else []:
            for patient, value in found[row][seed].items():
                gained.setdefault(patient, []).append(value - base[seed][patient])
        difference = "-"
        if gained:
            values = [float(np.mean(differences)) for differences in gained.values()]
            mean = agreement.average(values, agreement.Bootstrap(list(gained)), -1.0, 1.0)
            bounds = mean["intervals"]["mean"]  # none of fewer than five patients
            interval = "no interval" if bounds is None else f"{bounds[0]:+.3f} to {bounds[1]:+.3f}"
            difference = f"{mean['mean']:+.3f} ({interval})"
        lines.append(f"| {row} | {dice} | {difference} |")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    """Trains what is missing, every row with a seed before the next seed, and prints the table."""
    for name, least in (("steps", 1), ("width", 1), ("seeds", 1)):
        if getattr(arguments, name) < least:
            value = getattr(arguments, name)
            raise InputError("BAD_ARGUMENT", f"Expected --{name} of at least {least}, received {value}.")
    done = rows_of(OUT, COLUMNS)
    for line in done:
        if line["row"] not in ROWS or line["made_of"] != made_of(line["row"], arguments.steps, arguments.width):
            raise InputError(
                "BAD_ARGUMENT",
                f"Expected {OUT} to be of these settings and patients, received a row {line['row']!r} of others; move"
                " it away first.",
            )
    there = {(line["row"], int(line["seed"])) for line in done}
    missing = [
        (row, seed)
        for seed in range(arguments.seeds)
        for row in dict.fromkeys(arguments.only)
        if (row, seed) not in there
    ]
    sets = prepare(experiment_of(NOTHING, 0, arguments.steps, arguments.width).data) if missing else []
    for row, seed in missing:
        key = {"row": row, "seed": seed, "made_of": made_of(row, arguments.steps, arguments.width)}
        found = dice_of(row, seed, arguments.steps, arguments.width, sets)
        new = [{**key, "patient": patient, "dice": dice} for patient, dice in found.items()]
        add_rows(OUT, COLUMNS, rows_of(OUT, COLUMNS), new)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="ablation",
        description=__doc__.splitlines()[0],
        epilog="Rows: " + "; ".join(ROWS),
    )
    parser.add_argument("--only", choices=list(ROWS), nargs="+", default=list(ROWS), metavar="ROW", help="of the table")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of each training (default: %(default)s)")
    parser.add_argument("--width", type=int, default=8, help="of the network (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and do nothing else")

    def body(arguments: argparse.Namespace) -> None:
        if not arguments.table:
            with command.alone(OUT.parent / ".lock", OUT.parent, waits=False):
                run(arguments)
        print(table(rows_of(OUT, COLUMNS)))

    return command.run(parser, body, None)


if __name__ == "__main__":
    sys.exit(main())
