"""What each augmentation is worth on scanners never seen, and how many neighbouring slices, by small trainings.

    python experiments/ablation.py
    python experiments/ablation.py --only nothing everything bias_field

Most rows are a short training of a narrow network at 4.5 mm on the two simulated scanners of the report, with the
settings of experiments/anyscanner_volume_cpu.yaml of the augmentation they are named after and no others. Those in
pixels (elastic, blur, resolution) are not scaled from its 3 mm. All are measured on those validation patients of the
shipped model that phantom_varied_volume has, each under a scanner of its own. Rows land in runs/ablation/volume.csv, a
line a patient; what is there is not trained again, so a stopped run goes on: move the file away when the config
changes. Intervals are over patients alone; what another seed changes is seen in the rows of seed 1.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lvseg import agreement, command, devices, metrics, pipeline
from lvseg.config import Experiment
from lvseg.errors import InputError
from lvseg.keys import check_keys, read_yaml
from lvseg.predict import newest_version, shipped_model
from lvseg.prepare import prepare
from lvseg.step import Step

CONFIG = Path("experiments/anyscanner_volume_cpu.yaml")
KNOWN = ("data/phantom_philips_volume.yaml", "data/phantom_ge_volume.yaml")
VARIED = Path("data/phantom_varied_volume.yaml")
OUT = Path("runs/ablation/volume.csv")
COLUMNS = ("row", "made_of", "patient", "dice")
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
    f"{NOTHING}, seed 1": ((), {"seed": 1}),
    "everything": (EVERYTHING, {}),
    "everything, seed 1": (EVERYTHING, {"seed": 1}),
    "everything but contrast": (tuple(name for name in EVERYTHING if name != "contrast"), {}),
    "everything, no neighbours": (EVERYTHING, {"neighbours": 0}),
    "everything, two neighbours a side": (EVERYTHING, {"neighbours": 2}),
    "everything, on varied patients": (EVERYTHING, {"varied": True}),
}
ROWS: Mapping[str, tuple[Sequence[str], dict[str, Any]]] = {
    NOTHING: ((), {}),
    **{name: (names, {}) for name, names in ALONE.items()},
    **OTHERS,
}


def experiment_of(row: str, steps: int, width: int) -> Experiment:
    """A row's experiment: the config's settings of its augmentations, in a small network."""
    names, other = ROWS[row]
    values = read_yaml(CONFIG)
    values["seed"] = other.get("seed", 0)
    values["data"] |= {"datasets": [*map(str, KNOWN), str(VARIED)], "spacing_mm": [4.5, 4.5], "size": 96}
    values["data"] |= {"neighbours": other.get("neighbours", 1)}
    values["model"] |= {"width": width}
    values["augment"] = {key: value if key in names else None for key, value in values["augment"].items()}
    values["train"] |= {"steps": steps, "learning_rate": 1.0e-3, "warmup_steps": steps // 10}
    return check_keys(Experiment, values, str(CONFIG))


def dice_of(row: str, steps: int, width: int) -> dict[str, float]:
    """Trains a row's network and returns its Dice on every patient measured on, by id, on the network's grid."""
    experiment = experiment_of(row, steps, width)
    data, train = experiment.data, experiment.train
    cluster = devices.cluster(train.devices, train.batch_size)
    *known, varied = prepare(data)
    card = json.loads((newest_version(shipped_model("volume")) / "model.json").read_text(encoding="utf-8"))
    split = card["provenance"]["split"]  # nobody is measured on here who trained, or is kept from, the shipped model
    measured = varied.of(split["validation"])
    count = sum(len(shards.rows) for shards in known)
    seen = [varied.of(split["train"][:count])] if ROWS[row][1].get("varied") else known
    rows = [(shards.folder / line["file"], line["shape"][0]) for shards in seen for line in shards.rows]
    ids = sorted({line["patient"] for shards in [*known, varied] for line in shards.rows})
    reading = pipeline.Reading(data.size, data.neighbours, data.normalise, data.clip_percentiles, None, ids)
    batches = iter(pipeline.training_batches(
        [file for file, _ in rows], sum(slices for _, slices in rows),
        reading._replace(tissues=experiment.augment.contrast is not None),
        experiment.seed, train.batch_size, data.shuffle_slices, 0,
    ))  # fmt: skip
    step = Step(experiment, cluster, 2, 0.0, 1.0)  # normalise: patient brings every scan to 0..1
    for _ in command.progress(range(train.steps), f"training: {row}"):
        step(next(batches))
    if step.bad_step.numpy():
        raise FloatingPointError(f"Expected finite numbers, received others at step {int(step.bad_step.numpy())}.")
    volumes = pipeline.volume_samples(measured.files(ids), reading)
    return {
        line["patient"]: metrics.dice(step.labels(volume), volume.mask.numpy()[..., 0])
        for line, volume in zip(measured.rows, volumes, strict=True)
    }


def rows_of(path: Path) -> list[dict[str, str]]:
    """What was measured so far."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add(path: Path, row: str, made_of: str, found: Mapping[str, float]) -> None:
    """Adds a row's patients to the file, all or none."""
    known = rows_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with command.atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(known)
        writer.writerows(dict(zip(COLUMNS, (row, made_of, *each), strict=True)) for each in found.items())


def table(rows: Sequence[dict[str, str]]) -> str:
    """Mean Dice of each row and its difference to nothing, with 95 % intervals over patients, in Markdown."""
    found: dict[str, dict[str, float]] = {}
    for line in rows:
        found.setdefault(line["row"], {})[line["patient"]] = float(line["dice"])
    lines = ["| augmentation | mean Dice (95 % interval) | difference to nothing |", "|---|---|---|"]
    for row in [name for name in ROWS if name in found]:
        names = sorted(found[row])
        own = [found[row][name] for name in names]
        cells = [_mean(own, names, 0.0, "")]
        if row != NOTHING and NOTHING in found:
            gained = [found[row][name] - found[NOTHING][name] for name in names]
            cells.append(_mean(gained, names, -1.0, "+"))
        lines.append(f"| {row} | {cells[0]} | {cells[1] if len(cells) > 1 else '-'} |")
    return "\n".join(lines)


def _mean(values: Sequence[float], names: Sequence[str], low: float, sign: str) -> str:
    mean = agreement.average(values, agreement.Bootstrap(names), low, 1.0)
    first, last = mean["intervals"]["mean"] or (math.nan, math.nan)
    return f"{mean['mean']:{sign}.3f} ({first:{sign}.3f} to {last:{sign}.3f})"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="ablation", description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(ROWS), nargs="+", default=list(ROWS), metavar="ROW", help="of the table")
    parser.add_argument("--steps", type=int, default=300, help="of each training (default: %(default)s)")
    parser.add_argument("--width", type=int, default=8, help="of the network (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and do nothing else")

    def body(arguments: argparse.Namespace) -> None:
        made_of = f"{arguments.steps} steps of width {arguments.width}"
        done = rows_of(OUT)
        if not arguments.table and any(line["made_of"] != made_of for line in done):
            raise InputError(
                "BAD_ARGUMENT",
                f"Expected {OUT} to be of {made_of}, received rows of {done[0]['made_of']}; move it away first.",
            )
        there = {line["row"] for line in done}
        for row in [name for name in arguments.only if name not in there and not arguments.table]:
            add(OUT, row, made_of, dice_of(row, arguments.steps, arguments.width))
        print(table(rows_of(OUT)))

    return command.run(parser, body, None)


if __name__ == "__main__":
    sys.exit(main())
