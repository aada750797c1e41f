"""Command: an experiment file -> a trained, evaluated and exported network in a run folder.

    python -m lvseg.train --cfg experiments/volume.yaml

The same command again goes on from the last checkpoint. Every random number follows from (seed, step, sample), so a
resumed run equals one that was never stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from lvseg import command
from lvseg.cards import check_task
from lvseg.config import Experiment, add_experiment_arguments, load_experiment
from lvseg.errors import InputError
from lvseg.keys import changed_keys, check_keys, read_json, read_yaml
from lvseg.predict import newest_version
from lvseg.split import seen_by

if TYPE_CHECKING:
    from lvseg.devices import Cluster
    from lvseg.split import Split


def train(experiment: Experiment) -> None:
    """Trains an experiment's fold in its run folder, or goes on where it was stopped.

    Raises:
        InputError: input that cannot be used; CHANGED_CONFIG if the run was started with another config; BAD_RUN if it
            lost files that training writes, and is not begun anew over what is left.
    """
    run = experiment.run_folder
    if _is_finished(run, experiment):
        print(f"{run} is finished; give the experiment another name to train it anew.")
        return

    from lvseg import devices  # TensorFlow's seconds come after the cheap answers

    cluster = devices.cluster(experiment.train.devices, experiment.train.batch_size)
    with contextlib.ExitStack() as stack:
        if cluster.is_chief:
            stack.enter_context(command.alone(run.with_name(f".{run.name}.lock"), run, waits=False))
        stack.enter_context(devices.lost_machines_named())
        _train(experiment, run, cluster)


def _train(experiment: Experiment, run: Path, cluster: Cluster) -> None:
    from lvseg import prepare, provenance
    from lvseg.evaluate import Options, evaluate_run
    from lvseg.fit import Fit, is_started

    check_task([Path(path) for path in experiment.data.datasets], experiment.task)
    sets = prepare.prepare(experiment.data)
    split = prepare.split(experiment.data, sets)
    if experiment.model.start_from is not None and not is_started(run):
        _check_start(Path(experiment.model.start_from), split)
    seen = split.train + split.validation
    fit = Fit(experiment, [shards.of(seen) for shards in sets], replace(split, test=()), run, cluster)
    going_on = is_started(run)
    if (encoder := fit.step.encoder_weights) and encoder.split is not None and not going_on:
        where = f"model.encoder_weights={experiment.model.encoder_weights}"
        _check_judges(where, set(encoder.split["train"]), set(encoder.split["validation"]), split)
    manifest = provenance.manifest(experiment, sets, split, encoder, cluster, fit.started_from)
    manifest = provenance.continued(run, manifest, fit.first_step) if going_on else manifest
    if cluster.is_chief:
        _remove_left_overs(run, going_on)
        with command.atomic(run / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(experiment.model_dump(), sort_keys=False), encoding="utf-8")
        provenance.write(run, manifest)
    fit.run()
    if not cluster.is_chief:
        return
    exported = fit.export(run / "model", manifest)

    evaluate_run(run, "validation", Options(quality=False))
    finished = provenance.finished(manifest, exported["weights_sha256"])
    provenance.write(run, finished)
    print(f"trained: {run} (model in {run / 'model'}, look with: tensorboard --logdir {run.parent})")


def _check_start(model: Path, split: Split) -> None:
    """InputError BAD_SPLIT if the model to start from was trained on patients that judge this run."""
    info = read_json(newest_version(model) / "model.json")
    if "members" in info:
        raise InputError(
            "BAD_MODEL", f"Expected one trained network in model.start_from, received an ensemble in {model}."
        )
    trained_on, chosen_on = (seen_by(info, model, part) for part in ("train", "validation"))
    _check_judges(f"model.start_from={model}", trained_on, chosen_on, split)


def _check_judges(where: str, trained_on: set[str], chosen_on: set[str], split: Split) -> None:
    """InputError BAD_SPLIT if what a run begins with was trained on its validation or test patients, or chosen on the
    latter."""
    if judged := trained_on & {*split.validation, *split.test} | chosen_on & set(split.test):
        raise InputError(
            "BAD_SPLIT",
            f"Expected weights to begin with that know none of the patients that judge this run, received {where},"
            f" which knows {', '.join(sorted(judged)[:5])}.",
        )


def _remove_left_overs(run: Path, going_on: bool) -> None:
    """Removes what a killed process had begun to write, and all of a run that did not come to a checkpoint."""
    if not going_on:
        shutil.rmtree(run / "logs", ignore_errors=True)
        for path in [run / "metrics.csv", *(run / "checkpoints").glob("best-*.npz")]:
            path.unlink(missing_ok=True)
    for path in [*run.rglob(".partial-*"), *(run / "checkpoints").glob("ckpt-*_temp*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _is_finished(run: Path, experiment: Experiment) -> bool:
    """Whether the run is done; InputError CHANGED_CONFIG if it belongs to another config, BAD_RUN if it lacks files."""
    # Asked for against the order they are written in, so that of a run that begins meanwhile none seems to be missing.
    listed, manifest, config = (run / name for name in ("checkpoints/checkpoint", "manifest.json", "config.yaml"))
    was_listed, has_manifest = listed.is_file(), manifest.is_file()
    known = read_json(manifest) if has_manifest else {}
    finished = bool(known.get("finished"))
    # A process that is killed before its first checkpoint leaves none of these, and its run begins anew.
    trained = was_listed or (run / "model").exists() or any(each["first_step"] for each in known.get("sessions", []))
    needed = [config] if finished else [listed, manifest, config] if trained else [config] if has_manifest else []
    if missing := [path for path in needed if not path.is_file()]:
        raise InputError(
            "BAD_RUN",
            f"Expected a run folder as training leaves it, received one without"
            f" {' and '.join(path.relative_to(run).as_posix() for path in missing)} in {run}; put back what was"
            " deleted, delete the folder, or give the experiment another name.",
        )
    if not finished and not trained:
        return False
    # Keys that later versions know have their default in runs of earlier ones.
    keys = changed_keys(check_keys(Experiment, read_yaml(config), str(config)).model_dump(), experiment.model_dump())
    if keys:
        raise InputError(
            "CHANGED_CONFIG",
            f"Expected the config that the run was started with, received another {', '.join(keys)} than in {config};"
            " give the experiment another name.",
        )
    return finished


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="lvseg.train",
        description="Trains an experiment; missing shards are prepared first, a stopped run goes on.",
        epilog="Example: python -m lvseg.train --cfg experiments/volume.yaml --set data.fold=3",
    )
    add_experiment_arguments(parser)
    return command.run(parser, lambda arguments: train(load_experiment(arguments.cfg, arguments.set)), argv)


if __name__ == "__main__":
    sys.exit(main())
