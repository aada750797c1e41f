"""Segments scans with an exported model; as a command, writes the masks and their measurements.

python -m lvseg.predict --model models/volume scan.nii.gz -o liver.vtk
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lvseg import allocator, biomarkers, command, waterfat
from lvseg.errors import InputError
from lvseg.formats import Algorithm, check_writable, places_of, read_volume, stem, write_mask
from lvseg.postprocess import postprocess
from lvseg.volume import Array, Volume, as_float32

FORMATS = ("vtk", "nii.gz", "vti", "nrrd", "mha", "dcm")
VERSION = re.compile(r"[0-9]+")  # a version folder's name
FAT_FRACTION_TASK = "fatfraction"  # a model of this task sees fat fractions in percent
# What of model.json is needed to use the model.
CARD_KEYS = ("task", "labels", "axis", "spacing_mm", "size", "neighbours", "batch_size", "weights_sha256")
SHIPPED = Path(__file__).parent / "shipped"
LEAST_MR = -500.0  # no MR is as negative, and every CT in Hounsfield units with air around or in the body is
LIKE_CT = "voxels look like Hounsfield units; if it is a CT, say so (--modality ct)"
UNLIKE_CT = (
    f"no voxel below {LEAST_MR:g}, so these may not be Hounsfield units: a CT may be stored with an offset; if it is an"
    " MR, say so (--modality mr)"
)
# Voxels brighter than this share of the scan's range (minimum to 99th percentile) count as tissue when the crop cuts.
TISSUE_SHARE = 0.15
DARK_SHARE = 0.01  # of a mask's voxels, which may have no signal before it is said


@dataclass(frozen=True)
class Segmentation:
    """A scan's mask, uint8 on the scan's own grid, and what was measured in it (JSON-able, units in the names).

    Args:
        mask, measurements: as said.
        slices: float32 [S, size, size], what the network saw; foreground: float32 [S, size, size], the probability of
            any class there. Both None unless `segment` was told to keep them.
        seconds: by the clock, of `prepare`, `infer` (the network alone) and `restore`.
    """

    mask: Volume
    measurements: dict[str, Any]
    slices: Array | None = None
    foreground: Array | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


class Stopwatch:
    """Seconds by the clock, added up by name; a GPU's work counts where its answer is waited for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def shipped_model(task: str) -> Path:
    """A task's model that comes with lvseg, trained on simulated patients alone (README.md beside it: its worth).

    Raises:
        InputError: MODEL_UNAVAILABLE for a task without one.
    """
    folder = SHIPPED / task
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in SHIPPED.glob("[!_]*/")))
        raise InputError(
            "MODEL_UNAVAILABLE",
            f"Expected a task that lvseg comes with a model for ({there}), received {task}; for others, train or name"
            " one.",
        )
    return folder


def newest_version(model: Path) -> Path:
    """The SavedModel folder that `model` means: itself, or its version folder with the highest number.

    Raises:
        InputError: MODEL_UNAVAILABLE.
    """
    if (model / "saved_model.pb").is_file():
        return model
    versions = [path for path in model.iterdir() if VERSION.fullmatch(path.name)] if model.is_dir() else []
    if not versions:
        raise InputError(
            "MODEL_UNAVAILABLE", f"Expected an exported model or a folder of its versions, received {model}."
        )
    return max(versions, key=lambda path: int(path.name))


def check_holds_versions(out: Path) -> None:
    """Refuses a folder for new versions that is a model or within one: it would not be the model that was allowed.

    Raises:
        InputError: BAD_OUTPUT.
    """
    for folder in (out, *out.absolute().parents):
        if (folder / "saved_model.pb").is_file():
            raise InputError(
                "BAD_OUTPUT",
                f"Expected --out to be a folder of versions, such as {folder.absolute().parent}, received {out}, where"
                f" {'a model is' if folder == out else f'the model {folder} is'}.",
            )


def damaged(folder: Path, error: Exception) -> InputError:
    """What to raise for a model's folder that cannot be loaded: MODEL_UNAVAILABLE."""
    return InputError(
        "MODEL_UNAVAILABLE",
        f"Expected a model that lvseg.export wrote, received a damaged or foreign one in {folder}"
        f" ({type(error).__name__}).",
    )


def version_of(folder: Path) -> int | None:
    """The version that a model's folder is named after, if it is."""
    return int(folder.name) if VERSION.fullmatch(folder.name) else None


def read_scan(path: Path, task: str, series: str | None = None) -> Volume:
    """Reads what a model of a task sees: for fat fractions also of a folder or zip with a water and a fat image.

    Args:
        path: whatever `read_volume` reads.
        task: of the model.
        series: which of several DICOM series.

    Raises:
        InputError: what `read_volume` and `waterfat.from_water_fat` say.
    """
    try:
        return read_volume(path, series)
    except InputError as error:
        if error.code != "MULTIPLE_SERIES" or task != FAT_FRACTION_TASK:
            raise
        pair = waterfat.pair_in(path, series)
        if pair is None:
            raise
    return waterfat.from_water_fat(*pair)


class Segmenter:
    """An exported model, loaded once, that segments scans one after another.

    Args:
        model: models/<task>/<version>, models/<task> for its newest version, or a run's model folder.

    Raises:
        InputError: MODEL_UNAVAILABLE if it is missing, incomplete or damaged.
    """

    def __init__(self, model: Path) -> None:
        import tensorflow as tf

        if not tf.config.get_visible_devices("GPU"):
            allocator.keep_memory()  # 15 % faster; without effect where TensorFlow has computed already
        folder = newest_version(model)
        try:
            self.info: dict[str, Any] = dict(json.loads((folder / "model.json").read_text(encoding="utf-8")))
            for key in CARD_KEYS:
                self.info[key]
            self.loaded = tf.saved_model.load(str(folder))
            signatures = self.loaded.signatures
            self._prepare, self.infer, self._restore = (signatures[name] for name in ("prepare", "infer", "restore"))
            found = weights_sha256(folder)
        except (OSError, ValueError, TypeError, LookupError, tf.errors.OpError) as error:
            raise damaged(folder, error) from error
        check_weights(found, self.info, folder)
        self.info.setdefault("version", version_of(folder))

    @property
    def algorithm(self) -> Algorithm:
        """What a DICOM segmentation says of the model."""
        facts = {key: self.info[key] for key in ("task", "version", "weights_sha256", "labels")}
        return Algorithm(**facts)

    def segment(
        self,
        scan: Volume,
        on_progress: Callable[[int, int], None] | None = None,
        postprocessing: Sequence[str] | None = None,
        keep: bool = False,
        modality: str | None = None,
    ) -> Segmentation:
        """Segments one scan.

        Args:
            scan: any real dtype, any orientation; for a model of fat fractions, one in any unit that
                `waterfat.from_series` can tell.
            on_progress: called with (slices done, slices in all) after every batch.
            postprocessing: of `postprocess.STEPS`; None for what the model's card says.
            keep: whether to keep what the network saw and answered.
            modality: "CT" or "MR", whatever the scan's own metadata say; None for those, which only DICOM has.

        Raises:
            InputError: NONFINITE_VOXELS, EMPTY_IMAGE, UNKNOWN_SCALE, DIMS_LIMIT.
        """
        import tensorflow as tf

        from lvseg.preprocess import AXIS_PERMUTATIONS, SLICES_MAX, windowed, without_padding

        image = waterfat.from_series(scan) if self.info["task"] == FAT_FRACTION_TASK else scan
        canonical = image.canonical()
        permutation = AXIS_PERMUTATIONS[self.info["axis"]]
        slices = canonical.shape[permutation[0]]
        if slices > SLICES_MAX:
            name = scan.source or "the scan"
            raise InputError("DIMS_LIMIT", f"Expected at most {SLICES_MAX} slices, received {slices} in {name}.")
        modality = modality or scan.metadata.get("modality")
        voxels = np.ascontiguousarray(intensities(canonical).transpose(permutation))
        voxels, padding = without_padding(voxels)
        is_ct, hu_like = modality == "CT", bool(voxels.min() < LEAST_MR)
        voxels = windowed(voxels, modality, self.info.get("ct_window_hu"))
        if voxels.min() == voxels.max():
            name = scan.source or "the scan"
            raise InputError("EMPTY_IMAGE", f"Expected tissue within the CT window, received none in {name}.")
        spacing_mm = tf.constant([canonical.spacing_mm[axis] for axis in permutation], tf.float32)

        clock = Stopwatch()
        with clock("prepare"):
            prepared = self._prepare(voxels=tf.constant(voxels), spacing_mm=spacing_mm)["slices"]
        labels = np.empty(voxels.shape, np.uint8)
        foreground = np.empty(prepared.shape, np.float32) if keep else None
        for first, last, probabilities in self._batches(prepared, clock):
            with clock("restore"):
                restored = self._restore(
                    probabilities=probabilities, shape=tf.constant(voxels.shape, tf.int32), spacing_mm=spacing_mm
                )["labels"].numpy()
            labels[first:last] = restored[: last - first]
            if foreground is not None:
                foreground[first:last] = 1 - probabilities[: last - first, :, :, 0].numpy()
            if on_progress is not None:
                on_progress(last, len(prepared))
        steps = self.info.get("postprocessing", []) if postprocessing is None else postprocessing
        if steps:
            labels = postprocess(labels, steps)
        mask = scan.from_canonical(labels.transpose(np.argsort(permutation)))
        measurements = self._measure(image, mask, cut_tissue(voxels, spacing_mm.numpy(), self.info))
        if padding is not None:
            measurements["flags"].append(
                f"voxels of {padding:g}, far below all others, were taken for padding and not for tissue"
            )
        if modality and modality not in ("MR", "CT"):
            measurements["flags"].append(f"the file says that it is of modality {modality}; it is taken for an MR")
        if hu_like and not is_ct:
            measurements["flags"].append(LIKE_CT)
        if is_ct and not hu_like:
            measurements["flags"].append(UNLIKE_CT)
        return Segmentation(mask, measurements, prepared.numpy() if keep else None, foreground, clock.seconds)

    def foreground(self, slices: Array) -> Array:
        """The probability of any class, float32 [S, size, size], for slices as the network sees them, of that shape."""
        import tensorflow as tf

        answers = np.empty(slices.shape, np.float32)
        for first, last, probabilities in self._batches(
            tf.constant(np.ascontiguousarray(slices, np.float32)), Stopwatch()
        ):
            answers[first:last] = 1 - probabilities[: last - first, :, :, 0].numpy()
        return answers

    def _batches(self, prepared: Any, clock: Stopwatch) -> Iterator[tuple[int, int, Any]]:
        """First and last slice (exclusive) of each batch, and its probabilities [batch_size, size, size, C]."""
        import tensorflow as tf

        from lvseg.preprocess import stack_neighbours

        count, batch_size = len(prepared), self.info["batch_size"]
        for first in range(0, count, batch_size):
            # The last batch is padded with the last slice: one shape of batch, so nothing is traced anew.
            chosen = tf.minimum(tf.range(first, first + batch_size), count - 1)
            with clock("prepare"):
                stacks = stack_neighbours(prepared, self.info["neighbours"], chosen)
            with clock("infer"):
                probabilities = self.infer(stacks=stacks)["probabilities"]
            yield first, min(first + batch_size, count), probabilities

    def _measure(self, scan: Volume, mask: Volume, cut: bool) -> dict[str, Any]:
        volumes, voxels, flags = {}, {}, []
        for label, name in enumerate(self.info["labels"][1:], start=1):
            voxels[name] = int(np.count_nonzero(mask.voxels == label))
            volumes[name] = biomarkers.volume_ml(mask, label)
            if not voxels[name]:
                flags.append(f"{name}: empty")
            flags += [f"{name}: touches {edge}" for edge in biomarkers.touches_edge(mask, label)]
        source = scan.metadata.get("slice_distance_source", "positions")
        if source != "positions":
            flags.append(f"slice distance from {source}, since one slice has no second position")
        flags += scan.metadata.get("slice_warnings", [])
        if "assumed" in str(scan.metadata.get("directions", "")):
            flags.append(f"directions of the scan: {scan.metadata['directions']}")
        if cut:
            flags.append("tissue beyond the network's field of view was left out")
        fat: dict[str, Any] = {}
        if scan.metadata.get("units") == "percent":
            provenance = dict(scan.metadata.get("fat_fraction", {}))
            flags += provenance.get("warnings", [])
            flags += self._fat_flags(scan, mask, provenance)
            provenance.pop("sources", None)  # paths of this machine, which the server's clients should not see
            fat = {
                "fat_fraction_percent": {
                    name: waterfat.fat_fraction_percent(scan, mask, label)
                    for label, name in enumerate(self.info["labels"][1:], start=1)
                },
                "fat_fraction_image": provenance,
            }
        return {
            "volume_ml": volumes,
            **fat,
            "voxels": voxels,
            "flags": flags,
            "model": {key: self.info[key] for key in ("task", "version", "weights_sha256")},
            "geometry": {
                "shape": list(scan.shape),
                "spacing_mm": list(scan.spacing_mm),
                "affine_lps": scan.affine.tolist(),
                "oblique": scan.is_oblique,
            },
        }

    def _fat_flags(self, fraction: Volume, mask: Volume, provenance: Mapping[str, Any]) -> list[str]:
        """What of a fat fraction is not to be trusted inside the mask, or by this network."""
        flags = []
        if provenance.get("noise_floor"):
            for label, name in enumerate(self.info["labels"][1:], start=1):
                inside = fraction.voxels[mask.voxels == label]
                share = float(np.mean(inside == 0)) if inside.size else 0.0
                if share > DARK_SHARE:
                    why = "no more signal than noise (iron, or far from the coil)"
                    if provenance.get("clipped_voxels"):  # which read 0 % as well
                        why += " or less fat than noise"
                    flags.append(
                        f"{name}: {100 * share:.0f} % of its voxels have {why} and count as 0 % fat: its fat fraction"
                        " is not to be trusted"
                    )
        if provenance.get("method") == waterfat.PHASE_METHOD and not any(
            source.get("images") == "in_phase, opposed_phase"
            for source in self.info.get("provenance", {}).get("datasets", [])
        ):
            flags.append(
                "the model was trained on fat fractions that do not fold at 50 %, as these of in phase and opposed"
                " phase do: look at the mask"
            )
        return flags


def weights_sha256(folder: Path) -> str:
    """sha256 over a SavedModel's variables files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted((folder / "variables").iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_weights(found: str, info: Mapping[str, Any], folder: Path) -> None:
    """InputError MODEL_UNAVAILABLE for weights, by their sha256, that are not those of their model.json."""
    if found != info["weights_sha256"]:
        raise InputError(
            "MODEL_UNAVAILABLE",
            f"Expected the weights that model.json names by weights_sha256, received others in {folder}.",
        )


def intensities(scan: Volume) -> Array:
    """A scan's voxels as float32 [S, H, W], checked to be an image.

    Raises:
        InputError: UNSUPPORTED_PIXEL_TYPE, NONFINITE_VOXELS, EMPTY_IMAGE.
    """
    name = scan.source or "the scan"
    if scan.voxels.dtype.kind not in "iufb":
        raise InputError("UNSUPPORTED_PIXEL_TYPE", f"Expected real voxels, received {scan.voxels.dtype} in {name}.")
    voxels = as_float32(scan.voxels, name)
    if voxels.min() == voxels.max():
        raise InputError("EMPTY_IMAGE", f"Expected an image, received one value, {voxels.min()}, everywhere in {name}.")
    return voxels


def cut_tissue(voxels: Array, spacing_mm: Sequence[float], info: dict[str, Any]) -> bool:
    """Whether tissue lies beyond the network's field of view, where the answer is background.

    Args:
        voxels: [S, H, W] along the model's axis; spacing_mm: (slice, row, column); info: of model.json.
    """
    outside = np.zeros(voxels.shape[1:], bool)
    for axis in (1, 2):
        reach = info["size"] * info["spacing_mm"][axis - 1] / 2
        distance = np.abs(np.arange(voxels.shape[axis]) - (voxels.shape[axis] - 1) / 2) * spacing_mm[axis]
        outside |= np.expand_dims(distance > reach, 2 - axis)
    if not outside.any():
        return False
    dark = float(voxels.min())
    bright = float(np.percentile(voxels[:: max(1, len(voxels) // 8)], 99))
    return bool((voxels[:, outside] > dark + TISSUE_SHARE * (bright - dark)).any())


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="lvseg.predict",
        description="Segments scans: files (.nii, .nii.gz, .nrrd, .mha, .mhd, .vtk, .vti, .dcm), or folders or zips of"
        " one DICOM series each.",
        epilog="Examples: python -m lvseg.predict --model models/volume scan.nii.gz -o liver.vtk;"
        " python -m lvseg.predict --model models/fatfraction --water water.nii.gz --fat fat.nii.gz -o liver.vtk",
    )
    parser.add_argument(
        "scans",
        nargs="*",
        type=Path,
        metavar="SCAN",
        help="an image; for fat, a fat-fraction image, or a folder or zip with a water and a fat series",
    )
    waterfat.add_pair_arguments(parser)
    parser.add_argument(
        "--scale", type=float, help="of a fat-fraction SCAN: percent a unit, where its file has no unit"
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="models/<task>/<version>, or models/<task> for the newest (default: the one for --task that comes with"
        " lvseg)",
    )
    parser.add_argument(
        "--task",
        choices=("volume", FAT_FRACTION_TASK),
        help="of the model that comes with lvseg (default: fatfraction for a pair or with --scale, otherwise volume)",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        required=True,
        help="a file .vtk, .nii.gz, .vti, .nrrd, .mha or, of a DICOM scan, .dcm (a DICOM segmentation), or a folder",
    )
    parser.add_argument("--format", choices=FORMATS, help="of the files in a folder (default: vtk)")
    parser.add_argument(
        "--series",
        metavar="SERIES[/STACK]",
        help="which of several DICOM series: its number, description or the end of its UID; and which of its stacks, by"
        " a word of its image type (12/W) or its echo time (12/TE4.6); where it is missing, the error lists them",
    )
    parser.add_argument(
        "--modality", choices=("mr", "ct"), help="of the scans, whatever their files say; NIfTI says nothing"
    )
    parser.add_argument("--json", type=Path, help="write the measurements here, a list with an entry a scan")
    return command.run(parser, _segment_scans, argv)


def _segment_scans(arguments: argparse.Namespace) -> int:
    pair = waterfat.given_pair(vars(arguments))
    if bool(pair) == bool(arguments.scans):
        raise InputError(
            "BAD_ARGUMENT",
            f"Expected SCAN, or --water and --fat, or --in-phase and --opposed-phase, received"
            f" {'both SCAN and a pair' if pair else 'none of them'}.",
        )
    if pair and (arguments.series is not None or arguments.scale is not None):
        raise InputError("BAD_ARGUMENT", "Expected --series and --scale with SCAN only; a pair has its own options.")
    scans = arguments.scans or [next(iter(pair.values()))]  # the first of a pair names the mask
    for path in [*arguments.scans, *pair.values()]:
        if not path.exists():
            raise InputError("NOT_FOUND", f"Expected a scan, received a path that does not exist: {path}.")
    outputs = output_paths(scans, arguments.out, arguments.format)
    check_outputs([*arguments.scans, *pair.values()], outputs, arguments.json)
    is_fat = bool(pair) or arguments.scale is not None
    if arguments.task is not None and arguments.model is not None:
        raise InputError("BAD_ARGUMENT", "Expected --task without --model, which has a task of its own.")
    model = arguments.model or shipped_model(arguments.task or (FAT_FRACTION_TASK if is_fat else "volume"))
    newest_version(model)  # a wrong folder is told before TensorFlow's seconds
    segmenter = Segmenter(model)
    if is_fat and segmenter.info["task"] != FAT_FRACTION_TASK:
        raise InputError(
            "BAD_ARGUMENT",
            f"Expected a model of the task {FAT_FRACTION_TASK} for fat fractions, received one of"
            f" {segmenter.info['task']} in {model}.",
        )
    results, failed = [], 0
    for path, out in command.progress(list(zip(scans, outputs, strict=True)), "segmenting"):
        try:
            if pair:
                scan = waterfat.read_pair(pair, vars(arguments))
            elif arguments.scale is not None:  # of a series of fractions; one made of water and fat has none
                scan = waterfat.from_series(read_volume(path, arguments.series), arguments.scale)
            else:
                scan = read_scan(path, segmenter.info["task"], arguments.series)
            check_writable(scan, out)
            answer = segmenter.segment(scan, modality=arguments.modality and arguments.modality.upper())
        except InputError as error:
            if len(scans) == 1:
                raise
            failed += 1  # one bad scan of many costs that scan alone
            results.append({"scan": str(path), "error": {"code": error.code, "text": error.sentence}})
            _write_results(arguments.json, results)
            print(f"lvseg.predict: {error.sentence}", file=sys.stderr)
            if out.exists():
                print(f"lvseg.predict: {out} is of an earlier call", file=sys.stderr)
            continue
        written = write_mask(answer.mask, out, segmenter.algorithm)
        results.append({"scan": str(path), "files": [str(file) for file in written], **answer.measurements})
        _write_results(arguments.json, results)
        volumes = ", ".join(f"{name} {volume:.1f} ml" for name, volume in answer.measurements["volume_ml"].items())
        for name, fat in answer.measurements.get("fat_fraction_percent", {}).items():
            volumes += f", {name} {fat['mean']:.1f} % fat" if fat["mean"] is not None else ""
        for warning in answer.measurements.get("fat_fraction_image", {}).get("warnings", []):
            print(f"lvseg.predict: warning: {path}: {warning}", file=sys.stderr)
        notes = f" ({'; '.join(answer.measurements['flags'])})" if answer.measurements["flags"] else ""
        print(f"{out}: {volumes}{notes}")
    return command.EXIT_BAD_INPUT if failed else command.EXIT_DONE


def _write_results(path: Path | None, results: Sequence[Mapping[str, Any]]) -> None:
    """After every scan, so that a call that is cut off leaves what it measured."""
    if path is not None:
        with command.atomic(path) as temporary:
            temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")


def output_paths(scans: Sequence[Path], out: Path, form: str | None) -> list[Path]:
    """Where each scan's mask goes: `out` itself for one scan if it names a file, else <stem>.<format> in that folder.

    Args:
        scans: the inputs; out: a file or a folder; form: one of `FORMATS`, or None for what `out` says, else vtk.

    Raises:
        InputError: BAD_OUTPUT for several scans into one file, two scans of one name, or a format that contradicts.
    """
    named = next((known for known in FORMATS if out.name.endswith(f".{known}")), None)
    if named is not None and not out.is_dir():
        if len(scans) > 1:
            raise InputError("BAD_OUTPUT", f"Expected a folder for {len(scans)} scans, received the file {out}.")
        if form not in (None, named):
            raise InputError("BAD_OUTPUT", f"Expected a file ending in .{form}, as --format says, received {out}.")
        return [out]
    if out.suffix and not out.is_dir():
        valid = ", ".join(f".{known}" for known in FORMATS)
        raise InputError("BAD_OUTPUT", f"Expected a file ending in one of {valid}, or a folder, received {out}.")
    outputs = [out / f"{stem(path)}.{form or 'vtk'}" for path in scans]
    for number, path in enumerate(outputs):
        if path in outputs[:number]:
            raise InputError("BAD_OUTPUT", f"Expected scans of different names, received two that give {path}.")
    return outputs


def check_outputs(scans: Sequence[Path], outputs: Sequence[Path], measurements: Path | None) -> None:
    """Refuses outputs that would overwrite a scan or each other, or that cannot be written: InputError BAD_OUTPUT."""
    sidecars = [path.with_name(f"{path.name}.json") for path in outputs]
    written = [*outputs, *sidecars, *([measurements] if measurements is not None else [])]
    inputs = places_of(scans)
    for number, path in enumerate(written):
        whole = path.resolve()
        if whole in inputs or any(parent in inputs for parent in whole.parents):
            raise InputError(
                "BAD_OUTPUT", f"Expected outputs beside the scans, received one that is a scan's own: {path}."
            )
        if whole in (other.resolve() for other in written[:number]):
            raise InputError("BAD_OUTPUT", f"Expected different outputs, received {path} twice.")
        if path.is_dir():
            raise InputError("BAD_OUTPUT", f"Expected a file to write, received the folder {path}.")


if __name__ == "__main__":
    sys.exit(main())
