"""Fat-fraction images, in percent, from what a scanner gives; as a command, writes one with its provenance.

python -m lvseg.waterfat --water water.nii.gz --fat fat.nii.gz -o fraction.nii.gz

Three ways lead to one. Water and fat images: F / (W + F). In-phase and opposed-phase images: (I - O) / 2I, which
cannot tell f from 100 % - f, so it reads 0 to 50 % and is wrong above. A fat-fraction series as the scanner made it,
brought to percent.

Noise. In magnitude images air is no zero, and F / (W + F) of two equal noises is about 50 %. So a voxel counts as
signal where W^2 + F^2 exceeds what noise alone exceeds in one voxel of a thousand, and has the fraction 0 elsewhere: a
rule of each voxel by itself, without smoothing, under which a voxel of water at six times the noise survives in 98 of
100. The noise is measured in the images (`lvseg.noise`). The same noise lifts small fractions, since a magnitude has no
negative values: fat of true signal 0 reads what air reads, sqrt(pi / 2) sigma on average, 4 points at a signal to noise
ratio of 30 (Liu et al., Magn Reson Med 2007;58:354). Their remedy, magnitude discrimination, needs the complex images,
which are gone here. What remains (`remove_noise_bias`) is to replace each magnitude by the signal that would read it on
average (Koay and Basser, J Magn Reson 2006;179:317): that halves the bias at signal 0 and leaves a tenth of sigma above
1 sigma. It is off unless asked for, since it is wrong for scanners that keep the phase, and the size of the bias stands
in the provenance.

Every image has its provenance in ``metadata["fat_fraction"]``: method, sources, scale, noise_floor, clipped_voxels,
swap (`lvseg.swap`) and warnings, sentences for people. T1 weighting, the fat spectrum and T2* are not corrected except
as said below: what comes out is the signal fat fraction of the images that went in, and the proton density fat fraction
only where the scanner made it so.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lvseg import command
from lvseg.errors import InputError
from lvseg.formats import places_of, read_volume, stem, write_volume
from lvseg.formats.dicom_origin import Origin
from lvseg.noise import Floats, NoiseFloor, noise_floor, without_bias
from lvseg.swap import check_swap, warnings_of
from lvseg.volume import Array, Volume, as_float32, check_same_grid

# Noise bias below this many points of fat fraction is not worth a warning; fatty liver begins at 5.56 %.
NOISE_BIAS_TOLD_PERCENT = 2.0
# Between the noise of water and fat; what T1 takes from each, where the scanner divides it out, makes up to 1.5.
SCALES_DIFFER = 2.0
SCALES_TOLD = 0.01  # of one another, where the files say them

GYROMAGNETIC_MHZ_PER_T = 42.577
FAT_SHIFT_PPM = 3.4  # of the methylene peak from water, as in the six-peak spectra of Hamilton et al. 2011
# Cosine of the phase between water and fat, from which an echo counts as in phase or, negative, as opposed.
PHASE_COSINE = 0.5
# Where water and fat share a voxel the opposed-phase signal falls far below the in-phase one, never far above it.
CANCELLED, LEAST_CANCELLED_VOXELS = 0.5, 50

# Percent a unit, by UCUM code (DICOM's measurement units), by Rescale Type (PS3.3 C.11.1.1.2) and as people write it.
UNITS = {
    "%": 1.0, "percent": 1.0, "pct": 1.0, "percentage": 1.0, "10*-2": 1.0,
    "fraction": 100.0, "ratio": 100.0, "{ratio}": 100.0,
    "[ppth]": 0.1, "10*-3": 0.1, "permille": 0.1, "per mille": 0.1, "‰": 0.1,
}  # fmt: skip
# These say nothing: DICOM's "1" is "no units", US is "unspecified", Philips writes "normalized" for display values.
NO_UNITS = frozenset(("", "1", "us", "normalized", "no units", "none", "arbitrary units", "au", "a.u.", "[arb'u]"))
# Highest values (99.9th percentile) that can mean but one scale in a scan with some fat in it; the gaps are refused.
RANGES = ((0.5, 1.5, 100.0), (30.0, 150.0, 1.0), (500.0, 1500.0, 0.1))
BEYOND_PERCENT, BEYOND_SHARE = 20.0, 0.1
NO_FAT_PERCENT = 20.0

PHASE_METHOD = "in phase and opposed phase: (I - O) / 2I"
PAIRS = (("water", "fat"), ("in_phase", "opposed_phase"))
WATER_WORDS, FAT_WORDS = frozenset(("W", "WATER")), frozenset(("F", "FAT"))
IN_PHASE_WORDS = frozenset(("IP", "IN", "IN_PHASE", "INPHASE"))
OPPOSED_WORDS = frozenset(("OP", "OPP", "OUT", "OUT_PHASE", "OUT_OF_PHASE", "OPP_PHASE", "OPPOSED_PHASE", "OPPHASE"))
FRACTION_WORDS = frozenset(("FF", "PDFF", "FP", "FAT_PERCENT"))
FRACTION_NAME = re.compile(r"pdff|fat.?(frac|perc)|(?<![a-z])ff(?![a-z])", re.IGNORECASE)
# Facts of a file that its fat fraction does not have, since they described other values.
NOT_INHERITED = frozenset(("image_type", "rescale_type", "real_world_values", "signal_scale", "units", "fat_fraction"))


def from_water_fat(water: Volume, fat: Volume, remove_noise_bias: bool = False) -> Volume:
    """The fat fraction F / (W + F) in percent, 0 where there is only noise.

    Args:
        water, fat: magnitude images of one scan in the same unit, any real dtype, on one grid in any orientation.
        remove_noise_bias: takes off both what noise adds to magnitudes (module docstring).

    Returns:
        float32 percent, 0 to 100, on the water image's grid; provenance in ``metadata["fat_fraction"]``.

    Raises:
        InputError: GEOMETRY_MISMATCH, NONFINITE_VOXELS, BAD_VALUES for images that go far below zero, or BAD_ARGUMENT
            where the bias cannot be removed since the images are not magnitudes or show too little of their noise.
    """
    check_same_grid(water, fat)
    signals = _magnitudes((water, _on_grid_of(water, fat)))
    floor = noise_floor(*(water.with_voxels(values).canonical().voxels for values in signals))
    signal = floor.signal(*signals)
    total = signals[0] + signals[1]
    typical = float(np.median(total[signal])) if signal.any() else 0.0
    bias_percent = None if floor.means is None else 100 * floor.means[1] / typical if typical > 0 else 0.0
    if remove_noise_bias:
        if floor.sds is None:
            raise InputError(
                "BAD_ARGUMENT",
                "Expected images whose noise can be measured to remove its bias, received too little air and even"
                f" tissue for that in {water.source or 'the water image'}.",
            )
        if floor.magnitudes is False:
            raise InputError(
                "BAD_ARGUMENT",
                "Expected magnitudes to remove the bias of their noise, received images whose air is that of a"
                f" phase-sensitive reconstruction in {water.source or 'the water image'}.",
            )
        signals = [without_bias(values, sd) for values, sd in zip(signals, floor.sds, strict=True)]
    percent, clipped = _ratio(signals[1], signals[0] + signals[1], signal)

    warnings = _same_image(signals) + _of_one_scan(water, fat)
    ratio = floor.sds[0] / floor.sds[1] if floor.sds is not None and floor.sds[1] > 0 else 1.0
    if not 1 / SCALES_DIFFER < ratio < SCALES_DIFFER:
        warnings.append(
            f"water and fat seem to be stored on different scales: the noise of the air is {ratio:.2f} times as strong"
            " in the water image, so fat fractions may be wrong"
        )
    if bias_percent is not None and bias_percent > NOISE_BIAS_TOLD_PERCENT and not remove_noise_bias:
        warnings.append(
            f"noise lifts fat fractions near 0 % by about {bias_percent:.1f} points"
            + ("" if floor.measured_in == "air" else " if these images are magnitudes")
        )
    provenance = {
        "method": "water and fat: F / (W + F)",
        "sources": {"water": _facts(water), "fat": _facts(fat)},
        "scale": {"percent_per_unit": 100.0, "from": "ratio of two images"},
        "noise_floor": {
            **_floor_facts(floor, signal),
            "bias_at_zero_fat_percent": None if bias_percent is None else round(bias_percent, 3),
            "bias_removed": remove_noise_bias,
        },
        "clipped_voxels": clipped,
    }
    swap = check_swap(water.with_voxels(percent), signal)
    warnings += warnings_of(swap)
    if _named_only(water, FAT_WORDS, WATER_WORDS) or _named_only(fat, WATER_WORDS, FAT_WORDS):
        warnings.append("the files' own ImageType names them the other way round: water as fat or fat as water")
        if swap["decided_by"] == "nothing":
            swap = {**swap, "suspected": True, "decided_by": "image type"}
    return _fraction(water, percent, {**provenance, "swap": swap, "warnings": warnings})


def from_in_opposed_phase(in_phase: Volume, opposed_phase: Volume, t2star_ms: float | None = None) -> Volume:
    """The fat fraction (I - O) / 2I in percent from magnitudes, 0 to 50 %: it cannot be told which half it is in.

    O is the difference of water and fat without its sign, so a voxel of 80 % fat reads 20 %: right for a liver below
    50 %, wrong for adipose tissue, where swapped water and fat would not show either. Between the two echoes the signal
    also decays with T2*: with the opposed echo first, O is too bright and the fraction too low by about
    50 % (1 - 2f) (exp(dTE / T2*) - 1), 5 points for 2.3 ms and 25 ms. Fractions below 0 become 0, which lifts the mean
    of lean tissue by up to 0.4 standard deviations of its noise.

    Args:
        in_phase, opposed_phase: magnitude images of one scan in the same unit, on one grid in any orientation.
        t2star_ms: T2* of the tissue of interest, to undo that decay; None to leave it.

    Returns:
        float32 percent, 0 to 50, on the in-phase image's grid; provenance in ``metadata["fat_fraction"]``.

    Raises:
        InputError: as `from_water_fat`; NEEDS_ECHO_TIMES for t2star_ms without known echo times.
    """
    check_same_grid(in_phase, opposed_phase)
    images = (in_phase, opposed_phase)
    signals = _magnitudes((in_phase, _on_grid_of(in_phase, opposed_phase)))
    floor = noise_floor(*(in_phase.with_voxels(values).canonical().voxels for values in signals))
    signal = floor.signal(*signals)
    swap, warnings = _check_phases(images, signals, signal)
    warnings += _same_image(signals) + _of_one_scan(*images)
    times_ms = [_echo_time_ms(image) for image in images]
    decay = 1.0
    if t2star_ms is not None:
        if not t2star_ms > 0:
            raise InputError("BAD_ARGUMENT", f"Expected a T2* above 0 ms, received {t2star_ms}.")
        if times_ms[0] is None or times_ms[1] is None:
            raise InputError(
                "NEEDS_ECHO_TIMES",
                "Expected one echo time in each file to correct for T2*, received none in"
                f" {in_phase.source or 'the in-phase image'} or {opposed_phase.source or 'the opposed-phase image'}.",
            )
        decay = math.exp((times_ms[0] - times_ms[1]) / t2star_ms)
    percent, clipped = _ratio(signals[0] * decay - signals[1], 2 * signals[0] * decay, signal)
    percent = np.minimum(percent, np.float32(50.0))
    provenance = {
        "method": PHASE_METHOD,
        "sources": {"in_phase": _facts(in_phase), "opposed_phase": _facts(opposed_phase)},
        "scale": {"percent_per_unit": 100.0, "from": "ratio of two images"},
        "noise_floor": _floor_facts(floor, signal),
        "clipped_voxels": clipped,
        "t2star_ms": t2star_ms,
        "ambiguity": "fractions above 50 % read as 100 % minus themselves: valid for tissue below 50 % only",
        "t2star_bias": (
            "the decay of the signal between the echoes is "
            + ("left in: fractions are too low where the opposed echo comes first" if t2star_ms is None else "undone")
        ),
        "swap": swap,
        "warnings": warnings,
    }
    return _fraction(in_phase, percent, provenance)


def from_series(series: Volume, scale: float | None = None) -> Volume:
    """A fat-fraction series as the scanner made it, brought to percent.

    The scale is, in this order: the one given; that of the unit the file states (measurement units of its real world
    value mapping, or Rescale Type; rescale slope and intercept are applied already); else that of its range, where only
    one is possible: 0 to 1, 0 to 100 or 0 to 1000. Vendors differ (percent, tenths of a percent, percent with an
    offset), and no list of vendors is kept here, since software versions differ too and files do not say.

    Args:
        series: any real dtype; an image that is a fat fraction of this module already comes back as it is.
        scale: percent a unit of the stored values, as read: 1 for percent, 100 for fractions, 0.1 for tenths.

    Returns:
        float32 percent, clipped to 0 to 100, background as the scanner left it; provenance in
        ``metadata["fat_fraction"]``. Clipping lifts the mean of lean tissue, whose noise a scanner that keeps the phase
        stores below 0 as well, by up to 0.4 standard deviations of that noise.

    Raises:
        InputError: UNKNOWN_SCALE where neither file nor range tells, or they contradict; NONFINITE_VOXELS;
            BAD_ARGUMENT for a scale that is no positive number.
    """
    if scale is None and series.metadata.get("units") == "percent" and "fat_fraction" in series.metadata:
        return series
    values = as_float32(series.voxels, series.source).astype(np.float64)
    factor, found = _scale(series, values, scale)
    stretched = values * factor
    percent = np.clip(stretched, 0.0, 100.0).astype(np.float32)
    clipped = int(np.count_nonzero((stretched < 0) | (stretched > 100)))
    swap = check_swap(series.with_voxels(percent))
    warnings = warnings_of(swap)
    if float(np.percentile(stretched, 99.9)) < NO_FAT_PERCENT:
        warnings.append(
            f"no voxel of this fat fraction is fatty (the highest is {stretched.max():.1f} %): its scale may be wrong"
        )
    if found == "range of values" and factor != 1.0:
        warnings.append(f"the file states no unit: from its range of values a unit is taken as {factor:g} %")
    provenance = {
        "method": "fat-fraction series of the scanner",
        "sources": {"series": _facts(series)},
        "scale": {
            "percent_per_unit": factor,
            "from": found,
            "lowest_value": float(values.min()),
            "highest_value": float(values.max()),
        },
        "noise_floor": None,
        "clipped_voxels": clipped,
        "swap": swap,
        "warnings": warnings,
    }
    return _fraction(series, percent, provenance)


def pair_in(path: Path, series: str | None = None) -> tuple[Volume, Volume] | None:
    """The water and the fat image of a folder or zip of DICOM files that has one stack of each, else None.

    They are known by the word of their image type: W and F, or WATER and FAT. Of two studies they are no pair.

    Args:
        series: which series they are of, without a stack; None for any.

    Raises:
        InputError: what `read_volume` says of either, other than that there is none.
    """
    for water, fat in (("W", "F"), ("WATER", "FAT")):
        try:
            pair = read_volume(path, f"{series or '*'}/{water}"), read_volume(path, f"{series or '*'}/{fat}")
            return None if _differ(*pair, "study") else pair
        except InputError as error:
            if error.code != "UNKNOWN_SERIES":
                raise
    return None


def fat_fraction_percent(fraction: Volume, mask: Volume, label: int = 1) -> dict[str, float | None]:
    """Fat fraction inside one class of a mask: its mean, median and standard deviation (n), None where it is empty.

    Args:
        fraction: percent; mask: integer voxels of the same shape in the same orientation.
    """
    inside = fraction.voxels[mask.voxels == label].astype(np.float64)
    if not inside.size:
        return {"mean": None, "median": None, "sd": None}
    return {"mean": float(inside.mean()), "median": float(np.median(inside)), "sd": float(inside.std())}


def _magnitudes(images: Sequence[Volume]) -> list[Floats]:
    """A pair's voxels as float64; phase-sensitive images, which dip below zero by noise only, pass as well.

    Raises:
        InputError: NONFINITE_VOXELS, BAD_VALUES.
    """
    pair = [as_float32(image.voxels, image.source).astype(np.float64) for image in images]
    highest = max(float(np.percentile(values, 99.9)) for values in pair)
    for image, values in zip(images, pair, strict=True):
        low = float(np.percentile(values, 0.1))
        if low < min(0.0, -0.2 * highest):
            raise InputError(
                "BAD_VALUES",
                f"Expected magnitude images, zero or above, received values down to {low:g} beside {highest:g} in"
                f" {image.source or 'an image'}.",
            )
    return pair


def _same_image(signals: Sequence[Floats]) -> list[str]:
    """What to say of a pair of which both are one image, which has one fraction everywhere: no sentence or one."""
    if not np.array_equal(signals[0], signals[1]):
        return []
    return ["both images are the same, voxel for voxel: the fat fraction says nothing if one file was given twice"]


def _of_one_scan(first: Volume, second: Volume) -> list[str]:
    """What the files of a pair have against its being two images of one scan, on one scale."""
    # Those of the first image go on with its metadata.
    known = first.metadata.get("slice_warnings", [])
    warnings = [warning for warning in second.metadata.get("slice_warnings", []) if warning not in known]
    scales = [image.metadata.get("signal_scale") for image in (first, second)]
    if scales[0] and scales[1] and abs(scales[0] / scales[1] - 1) > SCALES_TOLD:
        warnings.append(
            f"the two images are stored on different scales, {scales[0]:g} and {scales[1]:g} a unit of signal by the"
            " maker's own scale slope, so fat fractions are wrong: convert both to the scanner's own signal first"
        )
    if _differ(first, second, "study"):
        warnings.append("the two images are of different studies (StudyInstanceUID)")
    elif _differ(first, second, "frame_of_reference"):
        warnings.append(
            "the two images have different frames of reference (FrameOfReferenceUID): the patient may have moved"
        )
    return warnings


def _differ(first: Volume, second: Volume, uid: str) -> bool:
    """Whether the images' files have UIDs of that kind that are not the same."""
    origins = [image.origin for image in (first, second)]
    found = [
        {getattr(one, uid) for one in origin.images} - {""} if isinstance(origin, Origin) else set()
        for origin in origins
    ]
    return bool(found[0] and found[1]) and found[0] != found[1]


def _on_grid_of(image: Volume, other: Volume) -> Volume:
    """The other volume's voxels in this one's orientation; their grids are known to be the same."""
    return replace(image.from_canonical(other.canonical().voxels), source=other.source)


def _ratio(part: Floats, whole: Floats, signal: Array) -> tuple[npt.NDArray[np.float32], int]:
    """100 part / whole within 0 to 100 where there is signal, 0 elsewhere, and how many voxels had to be clipped."""
    usable = signal & (whole > 0)
    percent = np.divide(100 * part, whole, out=np.zeros(whole.shape), where=usable)
    clipped = int(np.count_nonzero((percent < 0) | (percent > 100)))
    return np.clip(percent, 0.0, 100.0).astype(np.float32), clipped


def _check_phases(
    images: Sequence[Volume], signals: Sequence[Floats], signal: Array
) -> tuple[dict[str, Any], list[str]]:
    """Whether in phase and opposed phase changed places, by echo times, by cancellation, and what to say of it."""
    warnings, swapped_by = [], []
    phases = [_phase_cosine(image) for image in images]
    for image, name, cosine, sign in zip(images, ("in phase", "opposed"), phases, (1, -1), strict=True):
        if cosine is not None and abs(cosine) < PHASE_COSINE:
            warnings.append(
                f"the echo time of the {name} image, {_echo_time_ms(image):g} ms, is neither in phase nor opposed at"
                f" {image.metadata['field_strength_t']:g} T"
            )
        elif cosine is not None and cosine * sign < 0:
            swapped_by.append("echo times")
            warnings.append(
                f"the echo time of the {name} image, {_echo_time_ms(image):g} ms, is that of the other one at"
                f" {image.metadata['field_strength_t']:g} T: in phase and opposed phase look swapped"
            )
    both = (signals[0][signal], signals[1][signal])
    weaker = int(np.count_nonzero(both[1] < CANCELLED * both[0]))
    stronger = int(np.count_nonzero(both[0] < CANCELLED * both[1]))
    if stronger >= LEAST_CANCELLED_VOXELS and stronger > 2 * weaker:
        swapped_by.append("cancellation")
        warnings.append(
            "in phase and opposed phase look swapped: water and fat cancel each other in the image given as in phase"
            f" ({stronger} voxels, {weaker} in the other)"
        )
    if _named_only(images[0], OPPOSED_WORDS, IN_PHASE_WORDS) or _named_only(images[1], IN_PHASE_WORDS, OPPOSED_WORDS):
        swapped_by.append("image type")
        warnings.append("the files' own ImageType names in phase and opposed phase the other way round")
    answer = {
        "suspected": bool(swapped_by),
        "of": "in phase and opposed phase; water and fat cannot be told apart in such a pair",
        "decided_by": ", ".join(dict.fromkeys(swapped_by)) or "cancellation",
        "cancelled_voxels": {"opposed_phase": weaker, "in_phase": stronger},
    }
    return answer, warnings


def _phase_cosine(image: Volume) -> float | None:
    """Cosine of the phase between water and fat at the image's echo; None where echo time or field are unknown."""
    time_ms, field_t = _echo_time_ms(image), image.metadata.get("field_strength_t")
    if time_ms is None or not field_t:
        return None
    return math.cos(2 * math.pi * FAT_SHIFT_PPM * GYROMAGNETIC_MHZ_PER_T * float(field_t) * time_ms * 1e-3)


def _echo_time_ms(image: Volume) -> float | None:
    """The one echo time of an image, None where it has none or several."""
    times = {float(time) for time in image.metadata.get("echo_times_ms") or ()}
    return times.pop() if len(times) == 1 else None


def _scale(series: Volume, values: Floats, scale: float | None) -> tuple[float, str]:
    """Percent a unit, and where that is known from."""
    name = series.source or "the series"
    low, high = (float(value) for value in np.percentile(values, (0.1, 99.9)))
    help_text = "give the scale, percent a unit: 1 for percent, 100 for fractions, 0.1 for tenths of a percent"
    if scale is not None:
        if not (math.isfinite(scale) and scale > 0):
            raise InputError("BAD_ARGUMENT", f"Expected a scale above 0, percent a unit, received {scale}.")
        factor, found = scale, "given"
    else:
        stated = [str(series.metadata.get(key) or "").strip().lower() for key in ("units", "rescale_type")]
        stated = [text for text in stated if text not in NO_UNITS]
        known = [(text, unit) for text in stated if (unit := _unit(text)) is not None]
        if len({unit for _, unit in known}) > 1:
            raise InputError(
                "UNKNOWN_SCALE",
                f"Expected one unit, received {known[0][0][:40]!r} and {known[1][0][:40]!r} in {name}; {help_text}.",
            )
        if stated and not known:
            raise InputError(
                "UNKNOWN_SCALE",
                f"Expected a fat fraction in percent, as a fraction or in tenths of a percent, received the unit"
                f" {stated[0][:40]!r} in {name}; if it is one, {help_text}.",
            )
        mappings = [one for one in series.metadata.get("real_world_values") or () if _unit(one["units"].lower())]
        if not known and mappings:
            one = mappings[0]
            by = "a table"
            if one["slope"] is not None:
                by = f"another slope and intercept ({one['slope']:g}, {one['intercept']:g})"
            raise InputError(
                "UNKNOWN_SCALE",
                f"Expected a fat fraction whose rescale slope and intercept give its unit, received a real world value"
                f" mapping to {one['units'][:40]!r} of {by} in {name}; {help_text}.",
            )
        if not known:
            words = _words(series)
            one_signal = words & (WATER_WORDS | FAT_WORDS | IN_PHASE_WORDS | OPPOSED_WORDS)
            named = any("FRAC" in word or word in FRACTION_WORDS for word in words)
            named |= bool(FRACTION_NAME.search(str(series.metadata.get("series_description", ""))))
            if one_signal and not named:
                raise InputError(
                    "UNKNOWN_SCALE",
                    f"Expected a fat fraction, received an image whose ImageType names {', '.join(sorted(one_signal))}"
                    f" in {name}; if it is one, {help_text}.",
                )
            whole_numbers = series.voxels.dtype.kind in "iub"  # which no fractions between 0 and 1 can be
            # Up to 1000 is also what signals are stored as, so a DICOM file has to call itself a fat fraction.
            unnamed = series.metadata.get("format") == "DICOM" and not named
            for least, most, factor in RANGES:
                unlikely = (whole_numbers and factor == 100.0) or (unnamed and factor == 0.1)
                if least <= high <= most and low >= -0.5 * high and not unlikely:
                    return factor, "range of values"
            raise InputError(
                "UNKNOWN_SCALE",
                "Expected fat fractions up to about 1 or 100, or up to 1000 in a file that calls itself one, received"
                f" values from {low:g} to {high:g} without a unit in {name}; if it is one, {help_text}.",
            )
        (text, factor), *_ = known
        found = f"unit {text[:40]!r}"
    beyond = np.mean((values * factor < -BEYOND_PERCENT) | (values * factor > 100 + BEYOND_PERCENT))
    if beyond > BEYOND_SHARE:
        raise InputError(
            "UNKNOWN_SCALE",
            f"Expected fat fractions between 0 and 100 %, received {low * factor:g} to {high * factor:g} % by the scale"
            f" that is {found} in {name}; {help_text}.",
        )
    return factor, found


def _unit(text: str) -> float | None:
    """Percent a unit of the first word that is one."""
    return next((UNITS[word] for word in (text, *re.split(r"[\s/;,()|]+", text)) if word in UNITS), None)


def _words(image: Volume) -> frozenset[str]:
    """The words of ImageType, in capitals."""
    return frozenset(
        word.strip() for entry in image.metadata.get("image_type") or () for word in str(entry).upper().split("\\")
    )


def _named_only(image: Volume, words: frozenset[str], others: frozenset[str]) -> bool:
    """Whether the image's ImageType has one of the words and none of the others."""
    own = _words(image)
    return bool(own & words) and not own & others


def _facts(image: Volume) -> dict[str, Any]:
    """What identifies a source and bears on its fat fraction."""
    facts: dict[str, Any] = {"file": image.source}
    for key in (
        "series_instance_uid", "series_description", "manufacturer", "manufacturer_model", "field_strength_t",
        "echo_times_ms", "repetition_time_ms", "flip_angle_deg", "image_type", "units", "rescale_type",
        "real_world_values", "signal_scale",
    ):  # fmt: skip
        value = image.metadata.get(key)
        if value not in (None, "", (), []):
            facts[key] = list(value) if isinstance(value, tuple | list) else value
    return facts


def _floor_facts(floor: NoiseFloor, signal: Array) -> dict[str, Any]:
    return {
        "threshold": floor.threshold,
        "sds": None if floor.sds is None else list(floor.sds),
        "measured_in": floor.measured_in,
        "magnitudes": floor.magnitudes,
        "rule": "a voxel is signal where the root of the sum of both images' squares exceeds the threshold, else 0 %",
        "background_voxels": int(np.count_nonzero(~signal)),
    }


def _fraction(image: Volume, percent: npt.NDArray[np.float32], provenance: Mapping[str, Any]) -> Volume:
    kept = {key: value for key, value in image.metadata.items() if key not in NOT_INHERITED}
    metadata = {**kept, "units": "percent", "fat_fraction": dict(provenance)}
    return replace(image, voxels=percent, metadata=metadata)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="lvseg.waterfat",
        description="Makes a fat-fraction image in percent from water and fat images, from an in-phase and"
        " opposed-phase pair, or from a fat-fraction series of any scale; its provenance goes beside it.",
        epilog="Example: python -m lvseg.waterfat --water water.nii.gz --fat fat.nii.gz -o fraction.nii.gz",
    )
    add_pair_arguments(parser)
    parser.add_argument("--series", type=Path, help="instead of a pair: a fat-fraction image as the scanner made it")
    parser.add_argument(
        "--series-choice", metavar="CHOICE", help="which DICOM series of --series, where there are several"
    )
    parser.add_argument("--scale", type=float, help="percent a unit of --series, where the file does not say it")
    parser.add_argument("--t2star", type=float, metavar="MS", help="undo the decay between the echoes of a phase pair")
    parser.add_argument(
        "--remove-noise-bias", action="store_true", help="take what noise adds to magnitudes off water and fat"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="a file .nii.gz, .nii, .nrrd, .mha, .vti or .vtk")
    return command.run(parser, _write_fraction, argv)


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name a pair of images, and which DICOM series each is where there are several."""
    for pair in PAIRS:
        for name, other in (pair, pair[::-1]):
            option = name.replace("_", "-")
            parser.add_argument(
                f"--{option}", type=Path, help=f"the {option} image, beside --{other.replace('_', '-')}"
            )
            parser.add_argument(
                f"--{option}-series",
                metavar="CHOICE",
                help=f"which DICOM series of --{option}, where there are several, such as 12 or 12/W",
            )


def given_pair(arguments: Mapping[str, Any]) -> dict[str, Path]:
    """The paths of water and fat, or of in_phase and opposed_phase, as the options gave them; empty without any.

    Raises:
        InputError: BAD_ARGUMENT for half a pair or two of them, one image given as both, or the choice of a series of
            an image not given.
    """
    names = [name for pair in PAIRS for name in pair]
    given = {name: arguments[name] for name in names if arguments[name] is not None}
    if given and tuple(given) not in PAIRS:
        received = " ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(
            "BAD_ARGUMENT", f"Expected --water and --fat, or --in-phase and --opposed-phase, received {received}."
        )
    if given and len({(path.resolve(), arguments[f"{name}_series"]) for name, path in given.items()}) == 1:
        received = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(
            "BAD_ARGUMENT", f"Expected two images, received the same for {received}: {next(iter(given.values()))}."
        )
    for name in names:
        if arguments[f"{name}_series"] is not None and name not in given:
            option = name.replace("_", "-")
            raise InputError("BAD_ARGUMENT", f"Expected --{option} beside --{option}-series, received none.")
    return given


def read_pair(files: Mapping[str, Path], arguments: Mapping[str, Any], **options: Any) -> Volume:
    """Reads what `given_pair` gave and makes the fat fraction of it; options go to the function of that pair."""
    first, second = (read_volume(path, arguments[f"{name}_series"]) for name, path in files.items())
    if "water" in files:
        return from_water_fat(first, second, **options)
    return from_in_opposed_phase(first, second, **options)


def _write_fraction(arguments: argparse.Namespace) -> None:
    files = given_pair(vars(arguments))
    if (arguments.series is None) == (not files):
        raise InputError(
            "BAD_ARGUMENT",
            "Expected --water and --fat, or --in-phase and --opposed-phase, or --series, received"
            f" {'a pair and --series' if files else 'none of them'}.",
        )
    # Each of these options belongs to one way, and elsewhere it would do nothing.
    options: dict[str, Any] = {}
    for key, value, belongs in (
        ("scale", arguments.scale, "--series"),
        ("t2star_ms", arguments.t2star, "--in-phase"),
        ("remove_noise_bias", arguments.remove_noise_bias or None, "--water"),
    ):
        if value is None:
            continue
        if belongs != (f"--{next(iter(files)).replace('_', '-')}" if files else "--series"):
            raise InputError("BAD_ARGUMENT", f"Expected {key}={value} with {belongs} only.")
        options[key] = value
    beside = arguments.out.with_name(f"{stem(arguments.out)}.json")
    _check_output((arguments.out, beside), [*files.values()] or [arguments.series])
    if files:
        fraction = read_pair(files, vars(arguments), **options)
    else:
        fraction = from_series(read_volume(arguments.series, arguments.series_choice), **options)
    provenance = fraction.metadata["fat_fraction"]
    with command.atomic(beside) as temporary:
        temporary.write_text(json.dumps(provenance, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        write_volume(fraction, arguments.out)
    for warning in provenance["warnings"]:
        print(f"lvseg.waterfat: warning: {warning}", file=sys.stderr)
    print(f"{arguments.out}: {provenance['method']}; provenance in {beside}")


def _check_output(outputs: Sequence[Path], sources: Sequence[Path]) -> None:
    """Refuses outputs that are an input, lie in one, or are folders: InputError BAD_OUTPUT."""
    # The JSON beside an input, as converters of DICOM write it, is the user's own.
    inputs = places_of(path for source in sources for path in (source, source.with_name(f"{stem(source)}.json")))
    for path in outputs:
        whole = path.resolve()
        if whole in inputs or any(parent in inputs for parent in whole.parents):
            raise InputError("BAD_OUTPUT", f"Expected outputs beside the inputs, received an input's own: {path}.")
        if path.is_dir():
            raise InputError("BAD_OUTPUT", f"Expected a file to write, received the folder {path}.")


if __name__ == "__main__":
    sys.exit(main())
