"""Command: a trained model and some patients of a new study -> the model's next version.

    python -m lvseg.adapt --model models/volume --card data/my_study.yaml --out models/volume
    python -m lvseg.adapt --model models/volume --unlabelled scans/* --suggest 3
    python -m lvseg.adapt --model models/volume --unlabelled scans/* --out models/volume

A short training on the new study's segmented patients, half of every batch replayed from patients that the model was
trained on, so that it keeps what it knew. With four patients or more some are left out and decide when it ends;
otherwise the patients themselves do. Without segmented patients the model's own masks of unlabelled scans, where it
agrees with itself, take their place. All patients of the new study's cards are used, unless --patients names some; test
patients of the model's own training are never read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvseg import command
from lvseg.cards import check_classes, load_card
from lvseg.config import Data, Experiment
from lvseg.errors import InputError
from lvseg.keys import check_keys, digest
from lvseg.predict import Segmenter, newest_version
from lvseg.prepare import ShardSet, prepare
from lvseg.suggest import agreement_with_itself, look, suggest, write_own_masks

if TYPE_CHECKING:
    from lvseg.devices import Cluster
    from lvseg.step import Step

STEPS, CHECK_EVERY, PATIENCE = 150, 50, 2
LEARNING_RATE = 3.0e-4
MOST_MINUTES = 4.5  # with start and reading, five
REPLAYED, KNOWN_CHECKED = 24, 12  # patients of those that the model was trained on, and chosen by
KNOWN_SLICES = 16  # at most, of each scan of known patients, evenly spread: a check reads them before and after alike
LEAST_TO_LEAVE_OUT, LEFT_OUT_SHARE = 4, 0.25
ENOUGH, MOST_FORGOTTEN = 0.001, 0.01  # Dice that a check has to gain, and that known patients may lose
LEAST_AGREEMENT = 0.9  # Dice of a scan's mask with that of its mirror image, for the mask to be learned from


@dataclass(frozen=True)
class Plan:
    """How an adaptation is done.

    Args:
        steps: at most; minutes: of training and checks, at most.
        learning_rate: where it begins; at the last of `steps` it is 0.
        replay: cards instead of those that the model was trained on, or none of them; None for the model's own.
        seed: of order, augmentation and dropout.
    """

    steps: int = STEPS
    minutes: float = MOST_MINUTES
    learning_rate: float = LEARNING_RATE
    replay: tuple[Path, ...] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Volumes:
    """Shards of chosen patients: (patient, file, slices) each, in the order of the manifests."""

    rows: tuple[tuple[str, Path, int], ...]

    @property
    def patients(self) -> list[str]:
        """Their ids, sorted."""
        return sorted({patient for patient, _, _ in self.rows})

    @property
    def files(self) -> list[Path]:
        """Their shards."""
        return [file for _, file, _ in self.rows]

    @property
    def slices(self) -> int:
        """How many slices they hold together."""
        return sum(slices for _, _, slices in self.rows)


def adapt(
    model: Path, cards: Sequence[Path], out: Path, patients: Sequence[str] | None = None, plan: Plan | None = None
) -> dict[str, Any]:
    """Adapts a model to patients of a new study and writes its next version, unless it is no better.

    Args:
        model: as `Segmenter`; cards: of the new study; out: models/<task>, the version folder is made in it.
        patients: ids of the cards' patients to use, None for all.

    Returns:
        What was measured: `left_out`, `adapted_on` and `known`, each with `patients` and their mean Dice `before` and
        `after`, `known` also the most `slices_a_scan` that were read; `steps`, `minutes`, and `version`, the folder
        that was written, or None.

    Raises:
        InputError: BAD_MODEL for a model without its experiment or of several, and for cards of another task or other
            classes; BAD_SPLIT for patients that the model knows, unless from an adaptation; NOT_FOUND for patients that
            are not there; what preparation says.
    """
    plan = plan or Plan()
    info = _info(model)
    for path in cards:
        check_classes(path, info["task"], info["labels"])
    cluster, experiment = _cluster(info), _experiment(info, cards, plan)
    every = _volumes(prepare(experiment.data))
    chosen = every.patients if patients is None else list(dict.fromkeys(patients))
    if missing := sorted(set(chosen) - set(every.patients)):
        raise InputError(
            "NOT_FOUND",
            f"Expected patients of {', '.join(map(str, cards))}, received {', '.join(missing[:5])}, of whom there are"
            " no scans.",
        )
    split, earlier = info["provenance"]["split"], info["provenance"].get("adapted", [])
    again = {name for study in earlier for name in study["patients"]}
    deciding = {name for study in earlier for name in study["left_out"]}
    fresh = set(chosen) - again - deciding
    if known := sorted(fresh & {name for part in split.values() for name in part}):
        raise InputError(
            "BAD_SPLIT", f"Expected patients that the model does not know, received {', '.join(known[:5])}."
        )
    # Who decided about an earlier adaptation never trains a later one, and the other way round.
    left_out = sorted(set(chosen) & deciding) or _left_out(sorted(fresh))
    new = _of(every, set(chosen) - set(left_out))
    study = {
        "cards": [load_card(path)[0].name for path in cards],
        "paths": [str(path) for path in cards],
        "cards_sha256": [digest(load_card(path)[0].model_dump(mode="json")) for path in cards],
        "patients": new.patients,
        "left_out": left_out,
    }
    return _adapt(model, info, experiment, cluster, new, _of(every, set(left_out)), study, out, plan)


def adapt_to_own_masks(
    model: Path, scans: Sequence[Path], out: Path, plan: Plan | None = None, modality: str | None = None
) -> dict[str, Any]:
    """Adapts a model to scans that nobody segmented, by its own masks where it agrees with itself; as `adapt`.

    Args:
        modality: "MR" or "CT", of all scans; None for what their files say, and for MR where they do not.

    Raises:
        InputError: as `adapt`; NO_PATIENTS if the model agrees with itself on none of them.
    """
    plan = plan or Plan()
    info = _info(model)
    cluster = _cluster(info)
    with tempfile.TemporaryDirectory() as folder:
        cards, trusted = write_own_masks(Segmenter(model), scans, Path(folder), LEAST_AGREEMENT, modality)
        if not trusted:
            raise InputError(
                "NO_PATIENTS",
                f"Expected scans on which the model agrees with itself, received {len(scans)} below a Dice of"
                f" {LEAST_AGREEMENT} with their mirror images; segment the ones that --suggest names.",
            )
        experiment = _experiment(info, cards, plan, shards=Path(folder) / "shards")
        new = _volumes(prepare(experiment.data))
        study: dict[str, Any] = {"cards": [], "paths": [], "cards_sha256": [], "patients": [], "left_out": []}
        own_masks = {"own_masks": len(trusted)}
        return _adapt(model, info, experiment, cluster, new, Volumes(()), study | own_masks, out, plan)


def _info(model: Path) -> dict[str, Any]:
    folder = newest_version(model)
    try:
        info = dict(json.loads((folder / "model.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError("MODEL_UNAVAILABLE", f"Expected model.json in {folder}, received none to read.") from error
    if "members" in info or "experiment" not in info:
        what = "an ensemble" if "members" in info else "one that an earlier version trained"
        raise InputError(
            "BAD_MODEL", f"Expected a model of one network with its experiment, received {what} in {folder}."
        )
    return info


def _cluster(info: dict[str, Any]) -> Cluster:
    """The device, chosen before TensorFlow computes anything."""
    from lvseg import devices

    own = info["experiment"]["train"]
    return devices.cluster("cpu" if own["devices"] == "cpu" else "auto", _batch_size(info))


def _batch_size(info: dict[str, Any]) -> int:
    """The model's own, made even: half of a batch is replayed."""
    own: int = info["experiment"]["train"]["batch_size"]
    return max(2, own + own % 2)


def _experiment(info: dict[str, Any], cards: Sequence[Path], plan: Plan, shards: Path | None = None) -> Experiment:
    """The model's own experiment, on other datasets and for a few steps."""
    own = info["experiment"]
    elastic = own["augment"].get("elastic")
    values = {
        **own,
        "seed": plan.seed,
        "data": {
            **own["data"],
            "datasets": [str(path) for path in cards],
            "test_patients": None,
            "folds_file": None,
            **({"shards": str(shards)} if shards is not None else {}),
        },
        "model": {**own["model"], "freeze_encoder_steps": 0},
        "augment": {**own["augment"], "elastic": elastic and {**elastic, "where": "device"}},
        "train": {
            **own["train"],
            "steps": plan.steps,
            "batch_size": _batch_size(info),
            "learning_rate": plan.learning_rate,
            "schedule": "cosine",
            "warmup_steps": 0,
            "decay_steps": [],
            "early_stopping": None,
            "profile_steps": None,
        },
    }
    return check_keys(Experiment, values, "the model's experiment")


def _volumes(sets: Sequence[ShardSet]) -> Volumes:
    return Volumes(
        tuple((row["patient"], shards.folder / row["file"], row["shape"][0]) for shards in sets for row in shards.rows)
    )


def _of(volumes: Volumes, patients: set[str]) -> Volumes:
    return Volumes(tuple(row for row in volumes.rows if row[0] in patients))


def _left_out(patients: Sequence[str]) -> list[str]:
    """Those that decide, by a hash of their ids, where there are enough to spare some."""
    if len(patients) < LEAST_TO_LEAVE_OUT:
        return []
    ordered = sorted(patients, key=lambda name: hashlib.sha256(f"left out {name}".encode()).hexdigest())
    return sorted(ordered[: max(1, int(len(patients) * LEFT_OUT_SHARE))])


def _known(info: dict[str, Any], data: Data, plan: Plan) -> tuple[Volumes, Volumes]:
    """Patients that the model was trained on, to be replayed, and those that it was chosen by, to see what it forgets.

    Simulated patients are made where they are missing, but no more than are needed.
    """
    named = info["experiment"]["data"]["datasets"] if plan.replay is None else [str(path) for path in plan.replay]
    if not named:
        return Volumes(()), Volumes(())
    if missing := [path for path in named if not Path(path).is_file()]:
        raise InputError(
            "NOT_FOUND",
            f"Expected the cards that the model was trained on, to replay them, received none at {missing[0]}; name"
            " others with --replay, or none to do without, which forgets.",
        )
    own = data.model_copy(update={"datasets": named, "shards": info["experiment"]["data"]["shards"]})
    simulated = sum(load_card(Path(path))[0].simulate is not None for path in named)
    at_most = math.ceil(2 * (REPLAYED + KNOWN_CHECKED) / max(1, simulated))
    every = _volumes(prepare(own, simulated_at_most=at_most))
    split = info["provenance"]["split"]
    parts = []
    for part, most in (("train", REPLAYED), ("validation", KNOWN_CHECKED)):
        there = [name for name in every.patients if name in set(split[part])]
        spread = np.unique(np.linspace(0, len(there) - 1, min(most, len(there))).round().astype(int))
        parts.append(_of(every, {there[index] for index in spread}))
    if not parts[0].rows:
        raise InputError(
            "NOT_FOUND",
            f"Expected patients that the model was trained on in {', '.join(named)}, received none of them; name other"
            " cards with --replay, or none to do without, which forgets.",
        )
    return parts[0], parts[1]


def _adapt(
    model: Path,
    info: dict[str, Any],
    experiment: Experiment,
    cluster: Cluster,
    new: Volumes,
    left_out: Volumes,
    study: dict[str, Any],
    out: Path,
    plan: Plan,
) -> dict[str, Any]:
    import tensorflow as tf

    from lvseg import export
    from lvseg.models.vgg import EncoderWeights
    from lvseg.step import Step, network

    if experiment.train.deterministic:
        tf.config.experimental.enable_op_determinism()
    replayed, known = _known(info, experiment.data, plan)
    train, scaling = experiment.train, info["input_scaling"]
    weights_of_encoder = info["provenance"].get("encoder_weights")
    step = Step(
        experiment, cluster, len(info["labels"]), scaling["dark"], scaling["bright"],
        weights_of_encoder and EncoderWeights(**weights_of_encoder),
    )  # fmt: skip
    step.model.set_weights(export.weights(newest_version(model)))
    reading = _reading(experiment, info, (*new.patients, *left_out.patients, *replayed.patients, *known.patients))

    groups = {"left_out": left_out, "adapted_on": new, "known": known}

    def check() -> dict[str, float]:
        return _check(step, groups, reading, own_masks="own_masks" in study)

    def has_forgotten() -> bool:
        return bool(known.rows) and checks[-1]["known"] < checks[0]["known"] - MOST_FORGOTTEN

    started, done = time.monotonic(), 0
    checks = [check()]
    a_check_s = time.monotonic() - started
    first = kept = step.model.get_weights()
    best, interpolation = 0, 1.0
    batches = iter(_batches(experiment, new, replayed, reading))
    deciding = "left_out" if left_out.rows else "adapted_on"
    for number in command.progress(range(1, train.steps + 1), "adapting"):
        step(next(batches))
        done, late = number, time.monotonic() - started + 2 * a_check_s > 60 * plan.minutes
        if number % CHECK_EVERY and number != train.steps and not late:
            continue
        if int(step.bad_step.numpy()):
            raise FloatingPointError(
                f"Expected finite numbers, received others at step {int(step.bad_step.numpy())}; lower --learning-rate."
            )
        checks.append(check())
        trained = candidate = step.model.get_weights()
        if has_forgotten():
            # Halfway between what it was and what it became, a network has most of either (Wortsman et al., CVPR 2022).
            candidate = [(before + after) / 2 for before, after in zip(first, trained, strict=True)]
            step.model.set_weights(candidate)
            checks[-1] = check()
            step.model.set_weights(trained)
        if not has_forgotten() and checks[-1][deciding] > checks[best][deciding] + ENOUGH:
            best, kept = len(checks) - 1, candidate
            interpolation = 1.0 if candidate is trained else 0.5
        if late or len(checks) - 1 - best >= PATIENCE:
            break
    minutes = (time.monotonic() - started) / 60
    measured: dict[str, Any] = {
        name: {"patients": len(group.patients), "before": checks[0][name], "after": checks[best][name]}
        for name, group in groups.items()
        if group.rows
    }
    if known.rows:
        measured["known"]["slices_a_scan"] = KNOWN_SLICES
    measured |= {"steps": best * CHECK_EVERY if best < len(checks) - 1 else done if best else 0, "minutes": minutes}
    if not best:
        return {**measured, "version": None}
    folder = export.next_version(out)
    split = info["provenance"]["split"]
    data = info["experiment"]["data"]
    datasets = list(dict.fromkeys([*data["datasets"], *study["paths"]]))  # a later adaptation replays this one's, too
    parent = {key: info.get(key) for key in ("name", "version", "weights_sha256", "measured")}
    made_by = {"from": parent, "seed": plan.seed, "interpolation": interpolation}  # between old and trained weights
    card = {
        **{key: value for key, value in info.items() if key not in ("weights_sha256", "version")},
        "measured": measured,
        "experiment": {**info["experiment"], "data": {**data, "datasets": datasets}},
        "provenance": {
            **info["provenance"],
            "split": {
                **split,
                "train": sorted({*split["train"], *study["patients"]}),
                "validation": sorted({*split["validation"], *study["left_out"]}),
            },
            "adapted": [*info["provenance"].get("adapted", []), {**study, **made_by}],
        },
    }
    adapted = network(experiment, len(info["labels"]), step.offset, step.scale, "float32")
    adapted.set_weights(kept)
    export.export_model(adapted, card, folder)
    return {**measured, "version": str(folder)}


def _reading(experiment: Experiment, info: dict[str, Any], patients: Sequence[str]) -> Any:
    from lvseg import pipeline

    data = experiment.data
    return pipeline.Reading(
        data.size, data.neighbours, data.normalise, data.clip_percentiles, info["global_bounds"], tuple(patients)
    )


def _batches(experiment: Experiment, new: Volumes, replayed: Volumes, reading: Any) -> Any:
    """Batches of which one half is of the new study and the other replayed."""
    import tensorflow as tf

    from lvseg import pipeline

    parts = [volumes for volumes in (new, replayed) if volumes.rows]
    reading = reading._replace(tissues=experiment.augment.contrast is not None)
    each = [
        pipeline.training_batches(
            volumes.files, volumes.slices, reading, experiment.seed + number,
            experiment.train.batch_size // len(parts), experiment.data.shuffle_slices, 0,
        )
        for number, volumes in enumerate(parts)
    ]  # fmt: skip
    if len(each) == 1:
        return each[0]
    return tf.data.Dataset.zip(tuple(each)).map(
        lambda one, other: pipeline.Samples(*(tf.concat(pair, axis=0) for pair in zip(one, other, strict=True)))
    )


def _check(step: Step, groups: dict[str, Volumes], reading: Any, own_masks: bool) -> dict[str, float]:
    """Mean Dice over the patients of each group; of scans with the model's own masks, that with their mirror images."""
    return {
        name: _mean_dice(
            step,
            group,
            reading,
            measure=agreement_with_itself if own_masks and name == "adapted_on" else None,
            slices=KNOWN_SLICES if name == "known" else None,
        )
        for name, group in groups.items()
        if group.rows
    }


def _mean_dice(step: Step, volumes: Volumes, reading: Any, measure: Any = None, slices: int | None = None) -> float:
    """Mean over patients of their scans' Dice, of all slices together or of so many of them, evenly spread."""
    import tensorflow as tf

    from lvseg import metrics, pipeline

    found: dict[str, list[float]] = {}
    samples = pipeline.volume_samples([file for _, file, _ in volumes.rows], reading)
    for (patient, _, count), volume in zip(volumes.rows, samples, strict=True):
        if slices is not None and count > slices:
            chosen = np.linspace(0, count - 1, slices).round().astype(np.int32)
            volume = pipeline.Samples(*(tf.gather(values, chosen) for values in volume))
        if measure is not None:
            found.setdefault(patient, []).append(measure(step, volume))
            continue
        predicted, true = step.labels(volume), volume.mask.numpy()[..., 0]
        overlap = metrics.mean_dice(predicted, true, int(step.model.output_shape[-1]))
        found.setdefault(patient, []).append(overlap)
    return float(np.mean([np.mean(values) for values in found.values()]))


def print_measured(measured: dict[str, Any], own_masks: bool) -> None:
    """Prints what an adaptation changed, a line a group of patients."""
    names = {
        "left_out": "left out of the new study",
        "adapted_on": "of the new study, mirrored" if own_masks else "adapted on",
        "known": f"known before, {KNOWN_SLICES} slices a scan",
    }
    print(f"{'mean Dice of patients':<30}{'patients':>9}{'before':>8}{'after':>8}")
    for name, text in names.items():
        if name in measured:
            row = measured[name]
            print(f"{text:<30}{row['patients']:>9}{row['before']:>8.3f}{row['after']:>8.3f}")
    if measured["version"] is None:
        print("no better than before, so nothing is written; the model stays as it is")
    else:
        print(f"written: {measured['version']} ({measured['steps']} steps, {measured['minutes']:.1f} min of training)")


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="lvseg.adapt",
        description="Adapts a model to a new study: by segmented patients (--card), or by scans alone (--unlabelled),"
        " of which --suggest names those most worth segmenting.",
        epilog="Example: python -m lvseg.adapt --model models/volume --card data/my_study.yaml --out models/volume",
    )
    parser.add_argument("--model", type=Path, required=True, help="models/<task>/<version>, or models/<task>")
    parser.add_argument("--card", type=Path, nargs="+", default=[], help="datasets of the new study")
    parser.add_argument("--patients", nargs="+", help="of the cards; all without it")
    parser.add_argument("--unlabelled", type=Path, nargs="+", default=[], metavar="SCAN", help="as lvseg.predict takes")
    parser.add_argument("--modality", choices=("mr", "ct"), help="of --unlabelled, where files do not tell, as NIfTI")
    parser.add_argument("--suggest", type=int, metavar="K", help="name the K of --unlabelled most worth segmenting")
    parser.add_argument("-o", "--out", type=Path, help="models/<task>; the version folder is made in it")
    parser.add_argument("--replay", type=Path, nargs="*", help="cards instead of the model's own; none for no replay")
    parser.add_argument("--steps", type=int, default=STEPS, help="at most (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=MOST_MINUTES, help="of training and checks, at most (default: %(default)s)"
    )
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return command.run(parser, _body, argv)


def _body(arguments: argparse.Namespace) -> None:
    if bool(arguments.card) == bool(arguments.unlabelled):
        raise InputError("BAD_ARGUMENT", "Expected --card or --unlabelled, received both or neither.")
    modality = arguments.modality and arguments.modality.upper()
    if modality and arguments.card:
        raise InputError("BAD_ARGUMENT", "Expected --modality with --unlabelled only; cards say their own.")
    if arguments.suggest is not None:
        if not arguments.unlabelled or not 1 <= arguments.suggest <= len(arguments.unlabelled):
            raise InputError(
                "BAD_ARGUMENT",
                f"Expected --suggest of 1 to as many as --unlabelled, {len(arguments.unlabelled)}, received"
                f" {arguments.suggest}.",
            )
        looked = look(Segmenter(arguments.model), arguments.unlabelled, modality)
        for place in suggest(looked, min(arguments.suggest, len(looked))):
            print(f"{looked[place].scan}  (doubt {looked[place].doubt:.3f})")
        return
    if arguments.out is None:
        raise InputError("BAD_ARGUMENT", "Expected --out, where the next version goes, received none.")
    for name, what, right in (
        ("steps", "of at least 1", arguments.steps >= 1),
        ("minutes", "above 0", arguments.minutes > 0),
        ("learning_rate", "above 0", arguments.learning_rate > 0),
        ("seed", "of at least 0", arguments.seed >= 0),
    ):
        if not right:
            option, value = name.replace("_", "-"), getattr(arguments, name)
            raise InputError("BAD_ARGUMENT", f"Expected --{option} {what}, received {value}.")
    replay = None if arguments.replay is None else tuple(arguments.replay)
    plan = Plan(arguments.steps, arguments.minutes, arguments.learning_rate, replay, arguments.seed)
    if arguments.card:
        measured = adapt(arguments.model, arguments.card, arguments.out, arguments.patients, plan)
    else:
        if arguments.patients:
            raise InputError("BAD_ARGUMENT", "Expected --patients with --card only.")
        measured = adapt_to_own_masks(arguments.model, arguments.unlabelled, arguments.out, plan, modality)
    print_measured(measured, own_masks=not arguments.card)


if __name__ == "__main__":
    sys.exit(main())
