"""How many segmented patients of a new scanner a network needs: the report's Table 2, its way and this project's.

    python experiments/curve.py --task volume --model runs/volume/anyscanner-cpu-fold0/model
    python experiments/curve.py --task volume --table

For each direction between the simulated scanners, and each number of segmented patients of the new one, two ways:
"report", training on the known scanners and those patients from the start, and "any", a model for any scanner
(--model), adapted to those patients by lvseg.adapt. Half of the new scanner's patients are for measuring alone. Every
number lands in runs/curve/<task>.csv, a row a patient; what is there is not measured again, so a stopped run goes on.
The column made_of tells by how many steps of which config, or from which model's weights and how its masks are
postprocessed; each has a curve of its own. Where adapting did not help, the model as it was is measured. Means with
intervals are printed, and drawn in runs/curve/<task>.svg and .png.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from points import WAYS, draw_curves, table
from rows import add_rows, number, number_or_none, one_of, rows_of

from lvseg import biomarkers, command, metrics, waterfat
from lvseg.adapt import Plan, adapt, print_measured
from lvseg.cards import Scan, check_classes, read_image, read_labels
from lvseg.config import Experiment
from lvseg.errors import InputError
from lvseg.keys import check_keys, digest, read_json, read_yaml
from lvseg.predict import Segmenter, newest_version
from lvseg.prepare import card_scans
from lvseg.study import check_not_seen
from lvseg.train import train

DIRECTIONS = {"ge": ("philips",), "philips": ("ge",), "siemens": ("philips", "ge")}  # new scanner: known ones
ENDINGS = {"volume": "volume", "fatfraction": "fat"}
CONFIGS = {"volume": "experiments/volume_cpu.yaml", "fatfraction": "experiments/fatfraction_cpu.yaml"}
COLUMNS = {
    "scanner": str,
    "way": one_of(list(WAYS)),
    "made_of": str,
    "patients": int,
    "draw": int,
    "patient": str,
    "dice": number,
    "volume_error_percent": number,
    "fat_error_points": number_or_none,
}
FOLDS = 5
OUT = Path("runs/curve")


def card_of(task: str, scanner: str) -> Path:
    """The card of a simulated scanner."""
    return Path(f"data/phantom_{scanner}_{ENDINGS[task]}.yaml")


def ordered(names: Sequence[str], purpose: str) -> list[str]:
    """Names in an order that follows from a hash of each."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{purpose} {name}".encode()).hexdigest())


def parts(scans: Sequence[Scan]) -> tuple[list[str], list[str]]:
    """Patients of a new scanner that may be segmented, and those that are for measuring alone."""
    names = ordered(sorted({scan.patient for scan in scans}), "curve")
    return names[len(names) // 2 :], names[: len(names) // 2]


def card_with(path: Path, patients: Sequence[str], out: Path) -> Path:
    """Writes a card of chosen patients alone, without their maps of tissues, which no real study has."""
    card = read_yaml(path)
    root = (path.parent / card["root"]).resolve()
    card |= {
        "name": f"curve_{out.stem}",
        "root": str(root),
        "patients": list(patients),
        "simulate": None,
        "tissues": None,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(yaml.safe_dump(card, sort_keys=False), encoding="utf-8")
    return out


def trained_as_in_the_report(task: str, scanner: str, patients: Sequence[str], name: str, steps: int | None) -> Path:
    """The model of a training on the known scanners and these patients of the new one, from the start."""
    known = [card_of(task, other) for other in DIRECTIONS[scanner]]
    cards, folds = [str(path) for path in known], [[] for _ in range(FOLDS)]
    for path in known:
        for place, patient in enumerate(ordered(sorted({scan.patient for scan in card_scans(path)}), "fold")):
            folds[place % FOLDS].append(patient)
    if patients:
        cards.append(str(card_with(card_of(task, scanner), patients, OUT / f"{name}.yaml")))
        folds[1] += patients  # fold 0 is for validation: of known scanners alone, as there are too few others
    values = read_yaml(Path(CONFIGS[task]))
    values["data"] |= {"datasets": cards, "folds": FOLDS, "fold": 0, "test_fraction": 0, "test_patients": None}
    if steps not in (None, values["train"]["steps"]):
        values["train"] |= {"steps": steps, "validate_every": steps, "checkpoint_every": min(200, steps)}
    values["name"] = f"{name}-{digest([values, folds])[:8]}"  # other patients or settings are another run
    values["data"]["folds_file"] = str(OUT / "folds" / f"{values['name']}.yaml")
    (OUT / "folds").mkdir(parents=True, exist_ok=True)
    Path(values["data"]["folds_file"]).write_text(yaml.safe_dump({"folds": folds}), encoding="utf-8")
    experiment = check_keys(Experiment, values, CONFIGS[task])
    train(experiment)
    return experiment.run_folder / "model"


def adapted(task: str, scanner: str, patients: Sequence[str], name: str, model: Path, made_of: str) -> Path:
    """The model adapted to these patients; as it was where there are none, or that did not help."""
    if not patients:
        return model
    card = card_with(card_of(task, scanner), patients, OUT / f"{name}.yaml")
    found = adapt(model, [card], OUT / "models" / made_of.replace(", ", "-") / name, None, Plan(minutes=math.inf))
    print_measured(found, own_masks=False)
    return Path(found["version"]) if found["version"] else model


def what_it_is_made_of(task: str, model: Path | None, steps: int | None) -> dict[str, str]:
    """Of each way what its numbers follow from, but for patients and code."""
    config = read_yaml(Path(CONFIGS[task]))
    made_of = {"report": f"{steps or config['train']['steps']} steps, config {digest(config)[:8]}"}
    if model is not None:
        info = read_json(model / "model.json")
        made_of["any"] = ", ".join([info["weights_sha256"][:16], *info.get("postprocessing", [])])
    return made_of


def measured(model: Path, scans: Sequence[Scan]) -> Iterator[dict[str, Any]]:
    """Of each scan its Dice and errors of volume and, where there is fat, of the mean fat fraction."""
    segmenter = Segmenter(model)
    for scan in command.progress(scans, f"measuring {model}"):
        image = read_image(scan)
        mask, truth = segmenter.segment(image, modality=scan.card.modality).mask, read_labels(scan, image)
        volumes = biomarkers.volume_ml(mask), biomarkers.volume_ml(truth)
        row: dict[str, Any] = {
            "patient": scan.patient,
            "dice": metrics.dice(mask.voxels, truth.voxels),
            "volume_error_percent": 100 * (volumes[0] - volumes[1]) / volumes[1],
            "fat_error_points": None,
        }
        if image.metadata.get("units") == "percent":
            found, true = (waterfat.fat_fraction_percent(image, labels)["mean"] for labels in (mask, truth))
            row["fat_error_points"] = None if true is None else (found or 0.0) - true  # nothing found is no fat
        yield row


def run(arguments: argparse.Namespace) -> None:
    """Measures what is missing."""
    task, path = arguments.task, OUT / f"{arguments.task}.csv"
    known = rows_of(path, COLUMNS)
    model = None if arguments.model is None else newest_version(arguments.model)  # another may come while this goes on
    made_of = what_it_is_made_of(task, model, arguments.steps)
    info = {} if model is None else read_json(model / "model.json")
    if info:
        for scanner in arguments.only:
            check_classes(card_of(task, scanner), info["task"], info["labels"])
    scans_of = {scanner: card_scans(card_of(task, scanner)) for scanner in arguments.only}
    parts_of = {scanner: parts(scans) for scanner, scans in scans_of.items()}
    most = min(len(pool) for pool, _ in parts_of.values())
    if not 0 <= min(arguments.patients) <= max(arguments.patients) <= most:
        raise InputError("BAD_ARGUMENT", f"Expected --patients from 0 to {most}, received {arguments.patients}.")
    if model is not None and "any" in arguments.ways:
        check_not_seen(info, {scan.patient for scans in scans_of.values() for scan in scans}, model)
    for row in known:
        if row["scanner"] in parts_of and row["patient"] not in parts_of[row["scanner"]][1]:
            raise InputError(
                "BAD_TABLE",
                f"Expected rows of the {row['scanner']} patients that are for measuring in {path}, received"
                f" {row['patient']}; move it away.",
            )
    done = {(row["scanner"], row["way"], row["made_of"], int(row["patients"]), int(row["draw"])) for row in known}
    wanted = [
        (scanner, count, draw, way)
        for scanner in scans_of
        for count in dict.fromkeys(arguments.patients)
        for draw in range(arguments.draws if 0 < count < len(parts_of[scanner][0]) else 1)  # others are all the same
        for way in dict.fromkeys(arguments.ways)
    ]
    for scanner, count, draw, way in wanted:
        if (scanner, way, made_of[way], count, draw) in done:
            continue
        pool, held_out = parts_of[scanner]
        chosen, name = ordered(pool, f"draw {draw}")[:count], f"curve-{task}-{scanner}-{count}-{draw}"
        print(f"{way}: {scanner}, {count} patients, draw {draw}: {', '.join(chosen)}", flush=True)
        if way == "report":
            made = trained_as_in_the_report(task, scanner, chosen, name, arguments.steps)
        else:
            made = adapted(task, scanner, chosen, name, model, made_of[way])
        key = {"scanner": scanner, "way": way, "made_of": made_of[way], "patients": count, "draw": draw}
        rows = [key | row for row in measured(made, [scan for scan in scans_of[scanner] if scan.patient in held_out])]
        add_rows(path, COLUMNS, rows_of(path, COLUMNS), rows)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="curve", description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=list(ENDINGS), required=True)
    parser.add_argument("--model", type=Path, help="of experiments/anyscanner_*.yaml, which the way 'any' begins with")
    parser.add_argument(
        "--patients", type=int, nargs="+", default=[0, 1, 3, 5, 10], help="numbers of segmented patients"
    )
    parser.add_argument("--draws", type=int, default=3, help="of the patients of each number")
    parser.add_argument("--only", choices=list(DIRECTIONS), nargs="+", default=list(DIRECTIONS), help="new scanners")
    parser.add_argument("--ways", choices=list(WAYS), nargs="+", default=list(WAYS))
    parser.add_argument("--steps", type=int, help="of trainings as in the report, instead of the config's")
    parser.add_argument("--table", action="store_true", help="print and draw what is there, and do nothing else")

    def body(arguments: argparse.Namespace) -> None:
        if "any" in arguments.ways and arguments.model is None and not arguments.table:
            raise InputError("BAD_ARGUMENT", "Expected --model with the way any, received none.")
        for option in ("draws", "steps"):
            if (value := getattr(arguments, option)) is not None and value < 1:
                raise InputError("BAD_ARGUMENT", f"Expected --{option} of 1 or more, received {value}.")
        if not arguments.table:
            with command.alone(OUT / ".lock", OUT, waits=False):
                run(arguments)
        rows = rows_of(OUT / f"{arguments.task}.csv", COLUMNS)
        print(table(rows))
        if rows:
            draw_curves(rows, OUT / arguments.task)

    return command.run(parser, body, None)


if __name__ == "__main__":
    sys.exit(main())
