"""Command: a trained model and some patients of a new study -> the model's next version.

    python -m lvseg.adapt --model models/volume --card data/my_study.yaml --out models/volume
    python -m lvseg.adapt --model models/volume --unlabelled scans/* --suggest 3
    python -m lvseg.adapt --model models/volume --unlabelled scans/* --out models/volume

A short training on the new study's segmented patients, half of every batch replayed from patients that the model was
trained on, so that it keeps what it knew. Of four patients or more some are left out and decide when it ends, unless
only one of them is new; otherwise the patients themselves do. Without segmented patients the model's own masks of
unlabelled scans, where they can be trusted, take their place. All patients of the new study's cards are used, unless
--patients names some; test patients of the model's own training are neither learned from nor checked on.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvseg import command
from lvseg.cards import check_classes, load_card
from lvseg.config import Experiment, Train
from lvseg.errors import InputError
from lvseg.keys import check_keys
from lvseg.predict import CARD_KEYS, Segmenter, check_holds_versions, newest_version, version_of
from lvseg.prepare import prepare
from lvseg.quality import least_trust, mirrors
from lvseg.replay import Shard, Volumes, check_not_known, known, left_out, owners
from lvseg.split import SCAN_DIGITS, seen_by
from lvseg.suggest import agreement_with_itself, look, suggest, write_own_masks

if TYPE_CHECKING:
    from lvseg.devices import Cluster
    from lvseg.pipeline import Reading


@dataclass(frozen=True)
class Plan:
    """How an adaptation is done.

    Args:
        steps: at most; minutes: of training and checks, at most.
        learning_rate: where it begins; at the last of `steps` it is 0.
        replay: cards instead of those that the model was trained on, of patients that it knows or not, or none of them;
            None for the model's own.
        seed: of order, augmentation and dropout.
    """

    steps: int = 150
    minutes: float = 4.5  # with start and reading, five
    learning_rate: float = 3.0e-4
    replay: Sequence[Path] | None = None
    seed: int = 0


def adapt(
    model: Path, cards: Sequence[Path], out: Path, patients: Sequence[str] | None = None, plan: Plan | None = None
) -> dict[str, Any]:
    """Adapts a model to patients of a new study and writes its next version, unless it is no better.

    Args:
        model: as `Segmenter`; cards: of the new study; out: models/<task>, the version folder is made in it.
        patients: ids of the cards' patients to use, None for all.

    Returns:
        What was measured: `left_out`, `adapted_on` and `known`, each with `patients`, how many slices of each scan were
        read at most (`slices_a_scan`), and their mean Dice `before` and `after`; `steps`, of those `steps_done`, what
        it was `ended_by` ("steps", "minutes" or "no gain"), `minutes`, and `version`, the folder written, or None.

    Raises:
        InputError: BAD_MODEL for a model without its experiment or of several, and for cards of another task or other
            classes; BAD_SPLIT for patients that the model knows, unless from an adaptation, and for nobody to learn
            from; NOT_FOUND for patients that are not there; DUPLICATE_SCAN for scans that the model's datasets have;
            BAD_SCANS for those of which its clip_percentiles leave one intensity; BAD_OUTPUT for `out`; what
            preparation says.
        RunError: SIGTERM or Ctrl-C came while it trained; nothing is written.
    """
    plan, model = plan or Plan(), newest_version(model)  # looked up once: another may be written meanwhile
    info = _info(model)
    _check_out(out)
    for path in cards:
        check_classes(path, info["task"], info["labels"])
    _check_replay(info, plan)
    sources = _sources(info, cards)
    cluster, experiment = _cluster(info), _experiment(info, cards, plan)
    weights = _weights(model)
    every = Volumes.of_sets(prepare(experiment.data))
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
    if seen := sorted(fresh & (seen_by(info, model, "train", "validation") | {*split["test"]})):
        raise InputError(
            "BAD_SPLIT", f"Expected patients that the model does not know, received {', '.join(seen[:5])}."
        )
    # Who decided about an earlier adaptation never trains a later one, and the other way round.
    decided = set(chosen) & deciding
    spared = sorted({*decided, *left_out(sorted(fresh), len(chosen) - len(fresh), len(decided))})
    new = every.of(set(chosen) - set(spared))
    if not new.rows:
        raise InputError(
            "BAD_SPLIT",
            f"Expected patients to learn from, received {', '.join(spared[:5]) or 'nobody'} alone, who decided about an"
            " earlier adaptation and never train a later one.",
        )
    for before in earlier:  # which is replayed from its cards, or from those that take their place
        names, again_named = set(before["cards"]), {source["name"] for source in sources} & set(before["cards"])
        if again_named and names != again_named:
            raise InputError(
                "BAD_CONFIG",
                f"Expected all cards of the earlier adaptation to {' and '.join(before['cards'])}, received"
                f" {min(again_named)} without {min(names - again_named)}; give another study another name.",
            )
        gone = {*before["patients"], *before["left_out"]} - set(every.patients)
        if gone and again_named:
            raise InputError(
                "BAD_CONFIG",
                f"Expected the patients of the earlier adaptation to {before['cards'][0]} in its card, too, received"
                f" one without {min(gone)}; give another study another name.",
            )
    study = {
        "cards": [source["name"] for source in sources],
        "paths": [str(path) for path in cards],
        "cards_sha256": [source["card_sha256"] for source in sources],
        "patients": new.patients,
        "left_out": spared,
        "sources": sources,
    }
    return _adapt(weights, info, experiment, cluster, new, every.of(set(spared)), study, out, plan)


def adapt_to_own_masks(
    model: Path, scans: Sequence[Path], out: Path, plan: Plan | None = None, modality: str | None = None
) -> dict[str, Any]:
    """Adapts a model to scans that nobody segmented, by its own masks where they can be trusted; as `adapt`.

    Args:
        modality: "MR" or "CT", of all scans; None for what their files say, and for MR where they do not.

    Raises:
        InputError: as `adapt`; NO_PATIENTS if the model's mask of none of them can be trusted.
    """
    plan, model = plan or Plan(), newest_version(model)
    info = _info(model)
    _check_out(out)
    _check_replay(info, plan)
    cluster, least = _cluster(info), least_trust(info)
    weights = _weights(model)
    with tempfile.TemporaryDirectory() as folder:
        cards, trusted = write_own_masks(Segmenter(model), scans, Path(folder), least, modality)
        if not trusted:
            raise InputError(
                "NO_PATIENTS",
                f"Expected scans with a mask by the model that can be trusted to {least:.2f}, received {len(scans)}"
                " without; segment the ones that --suggest names.",
            )
        experiment = _experiment(info, cards, plan, shards=Path(folder) / "shards")
        new = Volumes.of_sets(prepare(experiment.data))
        nothing: dict[str, Any] = {"cards": [], "paths": [], "cards_sha256": [], "patients": [], "left_out": []}
        study = {**nothing, "sources": [], "own_masks": len(trusted)}
        sources = {f"own-{number:04d}": path for number, path in enumerate(trusted)}
        return _adapt(weights, info, experiment, cluster, new, Volumes(), study, out, plan, sources)


def _check_replay(info: dict[str, Any], plan: Plan) -> None:
    """Whether what is to be replayed is there, and of the model's classes."""
    named = info["experiment"]["data"]["datasets"] if plan.replay is None else plan.replay
    if missing := [path for path in named if not Path(path).is_file()]:
        raise InputError(
            "NOT_FOUND",
            f"Expected the cards that the model was trained on, to replay them, received none at {missing[0]}; name"
            " others with --replay, or none to do without, which forgets.",
        )
    for path in plan.replay or ():
        check_classes(path, info["task"], info["labels"])


def _sources(info: dict[str, Any], cards: Sequence[Path]) -> list[dict[str, str]]:
    """What to say of the new study's datasets, none of which has the name of another one that the model was shown."""
    provenance, own = info["provenance"], info["experiment"]["data"]["datasets"]
    shown = {source["name"] for source in provenance.get("datasets", [])}
    shown -= {name for study in provenance.get("adapted", []) for name in study["cards"]}  # they may grow
    sources = [load_card(path)[0].source for path in cards]
    for path, source in zip(cards, sources, strict=True):
        if source["name"] in shown and path.resolve() not in {Path(each).resolve() for each in own}:
            raise InputError(
                "BAD_CONFIG",
                f"Expected a study with a name of its own, received {source['name']} in {path}, as a dataset is named"
                " that the model was trained on.",
            )
    return sources


def _check_out(out: Path) -> None:
    """What would be found out when all is done."""
    there = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise InputError("BAD_OUTPUT", f"Expected --out to be a folder or nothing yet, received the file {there}.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError("BAD_OUTPUT", f"Expected --out to be a folder to write to, received {out}, where none can be.")
    check_holds_versions(out)


def _info(model: Path) -> dict[str, Any]:
    folder = newest_version(model)
    try:
        info = dict(json.loads((folder / "model.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError("MODEL_UNAVAILABLE", f"Expected model.json in {folder}, received none to read.") from error
    if missing := [key for key in CARD_KEYS if key not in info]:
        raise InputError(
            "MODEL_UNAVAILABLE",
            f"Expected a model that lvseg.export wrote, received one without {missing[0]} in {folder}.",
        )
    if "members" in info or "experiment" not in info:
        what = "an ensemble" if "members" in info else "one that an earlier version trained"
        raise InputError(
            "BAD_MODEL", f"Expected a model of one network with its experiment, received {what} in {folder}."
        )
    return {"version": version_of(folder), **info}


def _weights(model: Path) -> list[np.ndarray[Any, Any]]:
    """Read before anything else takes time, but after the device was chosen."""
    from lvseg import export

    return export.weights(newest_version(model))


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
            "decay_factor": Train.model_fields["decay_factor"].default,
            "early_stopping": None,
            "profile_steps": None,
        },
    }
    return check_keys(Experiment, values, "the model's experiment")


def _adapt(
    weights: Sequence[np.ndarray[Any, Any]],
    info: dict[str, Any],
    experiment: Experiment,
    cluster: Cluster,
    new: Volumes,
    spared: Volumes,
    study: dict[str, Any],
    out: Path,
    plan: Plan,
    sources: dict[str, Path] | None = None,
) -> dict[str, Any]:
    """`sources`: where the scans with the model's own masks come from, by their ids."""
    import tensorflow as tf

    from lvseg import export
    from lvseg.finetune import fine_tune, reading_of
    from lvseg.models.vgg import EncoderWeights
    from lvseg.step import Step, network

    if experiment.train.deterministic:
        tf.config.experimental.enable_op_determinism()
    trained_on = check_keys(Experiment, info["experiment"], "the model's experiment").data
    own = {*new.patients, *spared.patients}
    replayed, judging, every = known(info["provenance"], trained_on, experiment.data, plan.replay, own)
    if sources is not None:
        new = _without_known(new, every, sources)
        study = {**study, "own_masks": len(new.rows)}
    check_not_known(Volumes((*new.rows, *spared.rows)), every)
    scaling = info["input_scaling"]
    weights_of_encoder = info["provenance"].get("encoder_weights")
    step = Step(
        experiment, cluster, len(info["labels"]), scaling["dark"], scaling["bright"],
        weights_of_encoder and EncoderWeights(**weights_of_encoder),
    )  # fmt: skip
    step.model.set_weights(weights)
    reading = reading_of(experiment, info, (*new.patients, *spared.patients, *replayed.patients, *judging.patients))
    _check_seen((*new.rows, *spared.rows, *replayed.rows, *judging.rows), reading)

    groups = {"left_out": spared, "adapted_on": new, "known": judging}
    measure = functools.partial(agreement_with_itself, mirrored=mirrors(info)) if "own_masks" in study else None
    tuned = fine_tune(step, experiment, groups, replayed, reading, plan.minutes, measure)
    if tuned.weights is None:
        return {**tuned.measured, "version": None}
    made_by = {"seed": plan.seed, "interpolation": tuned.interpolation}  # between old and trained weights
    shown = {"train": replayed.patients, "validation": judging.patients}
    scans = {"train": (*new.rows, *replayed.rows), "validation": (*spared.rows, *judging.rows)}
    card = _card(info, {**study, **made_by}, tuned.measured, shown, plan.replay or (), scans)
    adapted = network(experiment, len(info["labels"]), step.offset, step.scale, "float32")
    adapted.set_weights(tuned.weights)
    folder = export.write_version(out, functools.partial(export.export_model, adapted, card))
    return {**tuned.measured, "version": str(folder)}


def _check_seen(rows: Sequence[Shard], reading: Reading) -> None:
    """InputError BAD_SCANS for a scan of which the model's clip_percentiles leave one intensity, as training has it."""
    from lvseg import pipeline

    if reading.clip_percentiles is None:
        return  # preparation refuses scans of one value
    low, high = reading.clip_percentiles
    for row, is_blank in zip(rows, pipeline.are_blank([row.file for row in rows], reading), strict=True):
        if is_blank:
            raise InputError(
                "BAD_SCANS",
                f"Expected more than one intensity between the {low:g}th and the {high:g}th percentile of every scan,"
                f" which is what the model sees, received one of patient {row.patient} ({row.file}).",
            )


def _card(
    info: dict[str, Any],
    study: dict[str, Any],
    measured: dict[str, Any],
    shown: dict[str, list[str]],
    replay: Sequence[Path],
    scans: Mapping[str, Sequence[Shard]],
) -> dict[str, Any]:
    """What the new version's model.json says, from the old one's.

    Args:
        scans: of everybody that the model was shown, by the part of the split that they join.
        shown: known patients, or others of the cards named for `replay`, by the part of the split that others join.
    """
    data, provenance = info["experiment"]["data"], info["provenance"]
    split, earlier = provenance["split"], provenance.get("adapted", [])
    scans_before = provenance.get("scans_sha256", {})
    # A later adaptation replays this one's datasets, too; a study that grew is there once, wherever its card lay.
    named = {name: path for each in earlier for name, path in zip(each["cards"], each["paths"], strict=True)}
    again = {Path(path).resolve() for path in (*study["paths"], *map(named.get, set(named) & set(study["cards"])))}
    datasets = [path for path in data["datasets"] if Path(path).resolve() not in again] + study["paths"]
    others = [load_card(path)[0].source for path in replay]
    sources = {card["name"]: card for card in [*others, *provenance.get("datasets", []), *study.pop("sources")]}
    known_before = {*split["train"], *split["validation"]}
    strangers = {part: set(names) - known_before for part, names in shown.items()}
    parent = {key: info.get(key) for key in ("name", "version", "weights_sha256", "measured")}
    return {
        **{key: value for key, value in info.items() if key not in ("weights_sha256", "version", "quality")},
        "measured": measured,
        "experiment": {**info["experiment"], "data": {**data, "datasets": datasets}},
        "provenance": {
            **provenance,
            "datasets": list(sources.values()),
            "split": {
                **split,
                "train": sorted({*split["train"], *study["patients"], *strangers["train"]}),
                "validation": sorted({*split["validation"], *study["left_out"], *strangers["validation"]}),
            },
            "scans_sha256": {
                **scans_before,
                **{
                    part: sorted({*scans_before.get(part, ()), *(row.voxels_sha256[:SCAN_DIGITS] for row in rows)})
                    for part, rows in scans.items()
                },
            },
            "adapted": [*earlier, {**study, "from": parent}],
        },
    }


def _without_known(new: Volumes, every: Volumes, sources: dict[str, Path]) -> Volumes:
    """Scans with the model's own masks, but for those of its datasets, which are named on stderr."""
    known_ones = {row.patient: owner for row, owner in owners(new, every)}
    for name, owner in known_ones.items():
        print(f"left aside: {sources[name]} has the voxels of the model's patient {owner}", file=sys.stderr)
    rest = new.of(set(new.patients) - set(known_ones))
    if not rest.rows:
        raise InputError("NO_PATIENTS", f"Expected scans that are new to the model, received {len(new.rows)} it knows.")
    return rest


def print_measured(measured: dict[str, Any], own_masks: bool) -> None:
    """Prints what an adaptation changed, a line a group of patients."""
    from lvseg.finetune import LEAST_STEPS

    names = {
        "left_out": "left out of the new study",
        "adapted_on": "of the new study, changed" if own_masks else "adapted on",
        "known": "known before",
    }
    print(f"{'mean Dice of patients':<30}{'patients':>9}{'slices each':>13}{'before':>8}{'after':>8}")
    for name, text in names.items():
        if name in measured:
            row = measured[name]
            slices = f"at most {row['slices_a_scan']}"
            print(f"{text:<30}{row['patients']:>9}{slices:>13}{row['before']:>8.3f}{row['after']:>8.3f}")
    if "known" not in measured:
        print("what it forgets was not measured: no patients known before were at hand for a check (see --replay)")
    if measured["ended_by"] == "minutes":
        print(f"the time was up after {measured['steps_done']} steps; --minutes gives more")
    if measured["version"] is None and measured["ended_by"] == "minutes" and measured["steps_done"] < LEAST_STEPS:
        print(f"nothing is written after fewer than {LEAST_STEPS} steps; the model stays as it is")
    elif measured["version"] is None:
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
    parser.add_argument("--modality", choices=("mr", "ct"), help="of --unlabelled, whatever their files say")
    parser.add_argument("--suggest", type=int, metavar="K", help="name the K of --unlabelled most worth segmenting")
    parser.add_argument("-o", "--out", type=Path, help="models/<task>; the version folder is made in it")
    parser.add_argument("--replay", type=Path, nargs="*", help="cards instead of the model's own; none for no replay")
    parser.add_argument("--steps", type=int, help=f"at most (default: {Plan.steps})")
    parser.add_argument("--minutes", type=float, help=f"of training and checks, at most (default: {Plan.minutes})")
    parser.add_argument("--learning-rate", type=float, help=f"(default: {Plan.learning_rate})")
    parser.add_argument("--seed", type=int, help=f"(default: {Plan.seed})")
    return command.run(parser, _body, argv)


def _body(arguments: argparse.Namespace) -> None:
    if bool(arguments.card) == bool(arguments.unlabelled):
        raise InputError("BAD_ARGUMENT", "Expected --card or --unlabelled, received both or neither.")
    modality = arguments.modality and arguments.modality.upper()
    if modality and arguments.card:
        raise InputError("BAD_ARGUMENT", "Expected --modality with --unlabelled only; cards say their own.")
    if arguments.patients and not arguments.card:
        raise InputError("BAD_ARGUMENT", "Expected --patients with --card only.")
    given = {name: getattr(arguments, name) for name in ("steps", "minutes", "learning_rate", "seed", "replay")}
    plan = Plan(**{name: value for name, value in given.items() if value is not None})
    for name, what, right in (
        ("steps", "of at least 1", plan.steps >= 1),
        ("minutes", "above 0", plan.minutes > 0),
        ("learning_rate", "above 0", plan.learning_rate > 0),
        ("seed", "of at least 0", plan.seed >= 0),
    ):
        if not right:
            option = name.replace("_", "-")
            raise InputError("BAD_ARGUMENT", f"Expected --{option} {what}, received {given[name]}.")
    if arguments.suggest is not None:
        if not arguments.unlabelled or not 1 <= arguments.suggest <= len(arguments.unlabelled):
            raise InputError(
                "BAD_ARGUMENT",
                f"Expected --suggest of 1 to as many as --unlabelled, {len(arguments.unlabelled)}, received"
                f" {arguments.suggest}.",
            )
        for name, value in {"out": arguments.out, **given}.items():
            if value is not None:
                option = name.replace("_", "-")
                raise InputError(
                    "BAD_ARGUMENT", f"Expected --suggest or --{option}, received both: nothing is adapted to yet."
                )
        looked = look(Segmenter(arguments.model), arguments.unlabelled, modality)
        for place in suggest(looked, min(arguments.suggest, len(looked))):
            print(f"{looked[place].scan}  (doubt {looked[place].doubt:.3f})")
        return
    if arguments.out is None:
        raise InputError("BAD_ARGUMENT", "Expected --out, where the next version goes, received none.")
    if arguments.card:
        measured = adapt(arguments.model, arguments.card, arguments.out, arguments.patients, plan)
    else:
        measured = adapt_to_own_masks(arguments.model, arguments.unlabelled, arguments.out, plan, modality)
    print_measured(measured, own_masks=not arguments.card)


if __name__ == "__main__":
    sys.exit(main())
