"""The experiment file: every key, its type and its default (the report's values); unknown keys are refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lvseg.cards import agreed_spacing_mm
from lvseg.errors import InputError
from lvseg.keys import Keys, check_keys, parse_yaml, read_yaml


class Data(Keys):
    """What is read, how it is harmonised and how patients are split."""

    datasets: Annotated[list[str], Field(min_length=1)]
    shards: str = "data/shards"
    axis: Literal["transversal", "coronal", "sagittal"] = "transversal"
    spacing_mm: Annotated[list[Annotated[float, Field(gt=0, le=100)]], Field(min_length=2, max_length=2)] = Field(
        default_factory=lambda: [1.75, 1.75]
    )
    size: Annotated[int, Field(ge=32, le=2048)] = 256
    neighbours: Annotated[int, Field(ge=0, le=32)] = 1
    normalise: Literal["none", "slice", "patient", "global"] = "none"
    clip_percentiles: (
        Annotated[list[Annotated[float, Field(ge=0, le=100)]], Field(min_length=2, max_length=2)] | None
    ) = None
    folds: Annotated[int, Field(ge=2)] = 10
    fold: Annotated[int, Field(ge=0)] = 0
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.11
    test_patients: list[str] | None = None
    folds_file: str | None = None
    shuffle_slices: Annotated[int, Field(ge=1)] = 512

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.fold >= self.folds:
            raise ValueError(f"expected fold below folds, received fold={self.fold} of folds={self.folds}")
        if self.clip_percentiles is not None and self.clip_percentiles[0] >= self.clip_percentiles[1]:
            raise ValueError(f"expected clip_percentiles to rise, received {self.clip_percentiles}")
        for percent in self.clip_percentiles or []:
            if abs(percent * 10 - round(percent * 10)) > 1e-6:
                raise ValueError(f"expected clip_percentiles in tenths of a per cent, received {percent}")
        return self


class Model(Keys):
    """The network: the report's U-Net, with its pretrained encoder (T) and short skips (R) as switches."""

    architecture: Literal["unet"] = "unet"
    width: Annotated[int, Field(ge=1, le=512)] = 64
    encoder: Literal["vgg11"] | None = "vgg11"
    encoder_weights: str = "imagenet"
    residual: bool = True
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5


class Elastic(Keys):
    """Elastic deformation (E)."""

    sigma_px: Annotated[float, Field(gt=0)] = 8.0
    grid: Annotated[int, Field(ge=4, le=64)] = 8
    where: Literal["device", "host"] = "device"


class Augment(Keys):
    """What is drawn anew for every sample."""

    elastic: Elastic | None = Elastic()


class Train(Keys):
    """How the network is optimised and how often it is looked at."""

    steps: Annotated[int, Field(ge=1, lt=2**31)] = 100_000
    batch_size: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1.0e-4
    schedule: Literal["constant", "cosine"] = "constant"
    beta_1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta_2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    loss: Literal["cross_entropy", "dice", "cross_entropy_dice"] = "cross_entropy"
    precision: Literal["float32"] = "float32"
    deterministic: bool = False
    validate_every: Annotated[int, Field(ge=1)] = 1000
    checkpoint_every: Annotated[int, Field(ge=1)] = 1000


class Experiment(Keys):
    """One experiment file, one run a fold."""

    task: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    runs: str = "runs"
    data: Data
    model: Model = Model()
    augment: Augment = Augment()
    train: Train = Train()

    @property
    def run_folder(self) -> Path:
        """Where the run lies: runs/<task>/<name>-fold<k>."""
        return Path(self.runs) / self.task / f"{self.name}-fold{self.data.fold}"

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        multiple = 32 if self.model.encoder == "vgg11" else 16
        if self.data.size % multiple:
            raise ValueError(
                f"expected data.size to be a multiple of {multiple} (the network halves it"
                f" {multiple.bit_length() - 1} times), received {self.data.size}"
            )
        return self


def load_experiment(path: Path, overrides: list[str] | None = None) -> Experiment:
    """Reads and checks an experiment file.

    Args:
        path: YAML.
        overrides: ``key.sub=value`` each, value in YAML.

    Where `data.spacing_mm` is null or absent, the cards' own spacing_mm takes its place, so that what is written into a
    run's config.yaml is what was used.

    Raises:
        InputError: NOT_FOUND, BAD_CONFIG; the sentence names the key, and the key that was probably meant.
    """
    values = read_yaml(path)
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            raise InputError("BAD_CONFIG", f"Expected --set key.sub=value, received --set {override}.")
        group = values
        *parents, last = key.split(".")
        for parent in parents:
            if group.get(parent) is None:
                group[parent] = {}
            group = group[parent]
            if not isinstance(group, dict):
                raise InputError("BAD_CONFIG", f"Expected a group of keys at {parent}, received --set {override}.")
        group[last] = parse_yaml(text, f"--set {override}")
    _resolve_spacing(values.get("data"))
    where = str(path) + (f" with --set {' --set '.join(overrides)}" if overrides else "")
    return check_keys(Experiment, values, where)


def _resolve_spacing(data: Any) -> None:
    """Fills `spacing_mm` of the raw `data` keys in from the cards; leaves wrong types for the check of all keys."""
    if not isinstance(data, dict) or data.get("spacing_mm") is not None:
        return
    named = data.get("datasets")
    if not isinstance(named, list) or not named or not all(isinstance(name, str) for name in named):
        return
    asked = "spacing_mm" in data  # null: without cards there is no answer; absent: the report's number stands
    paths = [Path(name) for name in named]
    spacing_mm = agreed_spacing_mm(paths) if asked or all(path.is_file() for path in paths) else None
    if spacing_mm is not None:
        data["spacing_mm"] = spacing_mm
    elif asked:
        raise InputError(
            "BAD_CONFIG",
            f"Expected spacing_mm in a card where data.spacing_mm is null, received none in {', '.join(named)}.",
        )


def add_experiment_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --cfg and --set, which every command on an experiment file takes."""
    parser.add_argument("--cfg", type=Path, required=True, help="experiment file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the file")
