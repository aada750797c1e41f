"""The experiment file: every key, its type and its default (the report's values); unknown keys are refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
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
    ct_window_hu: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
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
        if self.ct_window_hu is not None and self.ct_window_hu[0] + 1 > self.ct_window_hu[1]:
            raise ValueError(f"expected ct_window_hu to rise by 1 or more, received {self.ct_window_hu}")
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
    encoder_input: Literal["spread", "projection"] = "spread"
    freeze_encoder_steps: Annotated[int, Field(ge=0)] = 0
    start_from: str | None = None
    residual: bool = True
    norm: Literal["instance"] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5


class Elastic(Keys):
    """Elastic deformation (E)."""

    sigma_px: Annotated[float, Field(gt=0)] = 8.0
    grid: Annotated[int, Field(ge=4, le=64)] = 8
    where: Literal["device", "host"] = "device"


class Chance(Keys):
    """An augmentation that a sample undergoes with a probability."""

    probability: Annotated[float, Field(gt=0, le=1)] = 1.0


class Flip(Keys):
    """Mirrors slices, each axis with its own probability: rows (front and back), columns (right and left)."""

    rows: Annotated[float, Field(ge=0, le=1)] = 0.0
    columns: Annotated[float, Field(ge=0, le=1)] = 0.5

    @model_validator(mode="after")
    def _check(self) -> Flip:
        if not self.rows and not self.columns:
            raise ValueError("expected rows or columns above 0 in flip, received 0 for both")
        return self


class Rotate(Chance):
    """Turns slices around their centre, in mm, uniformly up to an angle either way."""

    max_degrees: Annotated[float, Field(gt=0, le=180)] = 15.0


class Scale(Chance):
    """Magnifies or shrinks slices around their centre, log-uniformly up to a factor either way."""

    max_factor: Annotated[float, Field(gt=1, le=4)] = 1.2


class Gamma(Chance):
    """Bends intensities, log-uniformly up to an exponent either way."""

    max_gamma: Annotated[float, Field(gt=1, le=10)] = 1.5


class BiasField(Chance):
    """Multiplies a slice by a smooth field, as receiver coils do."""

    sigma: Annotated[float, Field(gt=0, le=2)] = 0.3
    grid: Annotated[int, Field(ge=4, le=64)] = 4


class Noise(Chance):
    """Adds noise of a standard deviation up to this share of the intensity range, Gaussian or as magnitudes have it."""

    kind: Literal["gaussian", "rician"] = "gaussian"
    max_sigma_percent: Annotated[float, Field(gt=0, le=100)] = 5.0


class Resolution(Chance):
    """Blurs slices as if scanned with pixels up to this many times as large."""

    max_factor: Annotated[float, Field(gt=1, le=8)] = 2.0


class Blur(Chance):
    """Blurs slices in their plane by a Gaussian of a standard deviation up to this."""

    max_sigma_px: Annotated[float, Field(gt=0, le=8)] = 1.0


class Thickness(Chance):
    """Mixes every slice with its neighbours in the stack, up to this share of each, as thicker slices do."""

    max_share: Annotated[float, Field(gt=0, le=0.3333)] = 0.25


class Ghosts(Chance):
    """Adds shifted copies of up to this share of the signal along rows or columns, as breathing does."""

    max_share: Annotated[float, Field(gt=0, le=0.5)] = 0.1


class FieldOfView(Chance):
    """Cuts up to this share of the slice off at every side.

    No more than a fifth: the mask stays, and beyond it livers lie in what was cut off (in a fifth of the samples at
    0.3), so that the network would learn to see them where the image is dark.
    """

    max_share: Annotated[float, Field(gt=0, le=0.2)] = 0.15


class Table(Chance):
    """Puts a table below the patient, where the slice is dark."""


class Arms(Chance):
    """Puts arms beside the patient, where the slice is dark."""


class Contrast(Chance):
    """Renders simulated patients anew from their tissues: by sequences drawn at random, random intensities, or both; or
    their fat fraction in percent."""

    kind: Literal["physics", "random", "mixture", "fraction"] = "mixture"
    partial_volume: Annotated[float, Field(ge=0, le=0.25)] = 0.25


class Augment(Keys):
    """What is drawn anew for every sample; all but the report's elastic deformation are off until asked for."""

    elastic: Elastic | None = Elastic()
    flip: Flip | None = None
    rotate: Rotate | None = None
    scale: Scale | None = None
    gamma: Gamma | None = None
    bias_field: BiasField | None = None
    noise: Noise | None = None
    resolution: Resolution | None = None
    blur: Blur | None = None
    thickness: Thickness | None = None
    ghosts: Ghosts | None = None
    field_of_view: FieldOfView | None = None
    table: Table | None = None
    arms: Arms | None = None
    contrast: Contrast | None = None

    @model_validator(mode="after")
    def _check(self) -> Augment:
        if self.contrast is not None and self.elastic is not None and self.elastic.where == "host":
            raise ValueError(
                "expected elastic.where=device with contrast, which renders what was deformed, received"
                " elastic.where=host"
            )
        return self


class EarlyStopping(Keys):
    """Ends training when the validation Dice has not risen by `min_delta` for `patience` validations."""

    patience: Annotated[int, Field(ge=1)] = 10
    min_delta: Annotated[float, Field(ge=0)] = 0.0


class Train(Keys):
    """How the network is optimised and how often it is looked at."""

    steps: Annotated[int, Field(ge=1, lt=2**31)] = 100_000
    batch_size: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1.0e-4
    schedule: Literal["constant", "cosine", "polynomial", "step"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_steps: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    decay_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    beta_1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta_2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    loss: Literal["cross_entropy", "dice", "cross_entropy_dice", "focal"] = "cross_entropy"
    class_weights: list[Annotated[float, Field(ge=0)]] | None = None
    focal_gamma: Annotated[float, Field(ge=0)] = 2.0
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    devices: Literal["auto", "cpu", "gpu", "all"] = "auto"
    jit_compile: bool | None = None
    deterministic: bool = False
    validate_every: Annotated[int, Field(ge=1)] = 1000
    checkpoint_every: Annotated[int, Field(ge=1)] = 1000
    early_stopping: EarlyStopping | None = None
    histograms: bool = False
    profile_steps: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Train:
        if (self.schedule == "step") != bool(self.decay_steps):
            raise ValueError(
                f"expected decay_steps with schedule=step and only there, received schedule={self.schedule} and"
                f" decay_steps={self.decay_steps}"
            )
        for key, setting, only in (("focal_gamma", "loss", "focal"), ("decay_factor", "schedule", "step")):
            usual = type(self).model_fields[key].default  # which the config of every run states
            if getattr(self, setting) != only and getattr(self, key) != usual:
                raise ValueError(
                    f"expected {key} with {setting}={only} only, received {getattr(self, key)} with"
                    f" {setting}={getattr(self, setting)}"
                )
        for key in ("beta_1", "beta_2"):
            if np.float32(getattr(self, key)) >= 1:
                raise ValueError(f"expected {key} below 1 in float32, received {getattr(self, key)!r}")
        stopping = self.early_stopping
        if stopping is not None and stopping.patience * self.validate_every > self.steps:
            raise ValueError(
                f"expected early_stopping.patience times validate_every={self.validate_every} up to steps={self.steps},"
                f" received patience={stopping.patience}, with which no run ends early"
            )
        if self.loss == "dice" and self.class_weights is not None:
            raise ValueError("expected no class_weights with loss=dice, which counts the classes alike as it is")
        if self.decay_steps != sorted(set(self.decay_steps)):
            raise ValueError(f"expected decay_steps to rise, received {self.decay_steps}")
        if self.jit_compile and self.deterministic:
            raise ValueError(
                "expected jit_compile only without deterministic, since XLA knows no deterministic gradient of max"
                " pooling, received both"
            )
        if self.class_weights is not None and not any(self.class_weights):
            raise ValueError(f"expected class_weights that are not all 0, received {self.class_weights}")
        for key, last in (("warmup_steps", self.warmup_steps), ("decay_steps", max(self.decay_steps, default=0))):
            if last >= self.steps:
                raise ValueError(f"expected {key} below steps={self.steps}, received {last}")
        if self.profile_steps is not None and self.profile_steps[1] > self.steps:
            raise ValueError(f"expected profile_steps up to steps={self.steps}, received {self.profile_steps}")
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"expected profile_steps first and last, received {self.profile_steps}")
        return self


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
        contrast = self.augment.contrast
        if contrast is not None and (contrast.kind == "fraction") != (self.task == "fatfraction"):
            raise ValueError(
                "expected augment.contrast.kind=fraction for the task fatfraction and only there, whose images are in"
                f" percent, received {contrast.kind} for {self.task}"
            )
        for name in ("table", "arms"):
            if getattr(self.augment, name) is not None and self.data.axis != "transversal":
                raise ValueError(
                    f"expected data.axis=transversal with augment.{name}, which lies below or beside the patient in"
                    f" such slices, received {self.data.axis}"
                )
        self._check_percent()
        if self.augment.thickness is not None and not self.data.neighbours:
            raise ValueError(
                "expected data.neighbours of 1 or more with augment.thickness, which mixes them, received 0"
            )
        if contrast is not None and contrast.kind == "fraction" and self.data.normalise != "none":
            raise ValueError(
                "expected data.normalise=none with augment.contrast.kind=fraction, which is in percent, received"
                f" {self.data.normalise}"
            )
        if self.model.encoder is None and self.model.encoder_input != "spread":
            raise ValueError(f"expected encoder=vgg11 for encoder_input={self.model.encoder_input}, received null")
        if self.model.encoder is not None and self.model.norm is not None:
            raise ValueError(
                f"expected encoder=null for norm={self.model.norm}, which the pretrained encoder was trained without,"
                f" received {self.model.encoder}"
            )
        if self.model.start_from is not None and self.model.encoder and self.model.encoder_weights != "none":
            raise ValueError(
                "expected encoder_weights=none with model.start_from, which replaces them, received"
                f" {self.model.encoder_weights}"
            )
        if self.model.encoder is None and self.model.freeze_encoder_steps:
            raise ValueError("expected encoder=vgg11 for freeze_encoder_steps, received null")
        if self.model.freeze_encoder_steps > self.train.steps:
            raise ValueError(
                f"expected model.freeze_encoder_steps up to train.steps={self.train.steps}, received"
                f" {self.model.freeze_encoder_steps}"
            )
        untrained = self.model.encoder_weights == "none" and self.model.start_from is None
        if self.model.encoder and untrained and self.model.freeze_encoder_steps == self.train.steps:
            raise ValueError(
                f"expected model.freeze_encoder_steps below train.steps={self.train.steps} with encoder_weights=none,"
                f" whose encoder would stay as it was drawn, received {self.model.freeze_encoder_steps}"
            )
        return self

    def _check_percent(self) -> None:
        """ValueError for what makes no sense of fat fractions in percent, in which air is noise and not dark."""
        if self.task != "fatfraction":
            return
        for name in ("table", "arms"):
            if getattr(self.augment, name) is not None:
                raise ValueError(
                    f"expected no augment.{name} for the task fatfraction, in whose images what is dark is not air but"
                    " tissue without fat"
                )
        if self.data.ct_window_hu is not None:
            raise ValueError(
                "expected no data.ct_window_hu for the task fatfraction, whose images are in percent, received"
                f" {self.data.ct_window_hu}"
            )
        noise = self.augment.noise
        of_magnitudes = {
            "bias_field": self.augment.bias_field is not None,
            "noise.kind=rician": noise is not None and noise.kind == "rician",
        }
        for name, is_on in of_magnitudes.items():
            if is_on and self.augment.contrast is None:
                raise ValueError(
                    f"expected no augment.{name} for the task fatfraction without contrast, since it is what happens to"
                    " magnitudes and not to percent"
                )


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
