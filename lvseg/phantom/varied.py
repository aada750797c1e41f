"""Patients with peculiarities, most under a scanner and a protocol of their own: what networks for any scanner learn.

Field strength, sequence, resolution, slices and how much of the liver they show, noise, coils and how the scanner
stores its axes are drawn for every patient, from ranges of abdominal gradient echoes in use; none of them is a protocol
of `lvseg.phantom.scanners`. `varied_philips` and `varied_ge` are such patients under two of those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from lvseg.phantom.patients import draw_anatomy, random_stream
from lvseg.phantom.physics import opposed_phase_echo_s
from lvseg.phantom.scan import Scan
from lvseg.phantom.scanners import FAT_FRACTION, SCANNERS, VOLUME, Scanner, Sequence, image_patient

SLICE_MM = {VOLUME: (3.0, 9.0), FAT_FRACTION: (4.0, 11.0)}
COVERED_MM, SLAB_MM, SLAB_SHARE = (200.0, 260.0), (60.0, 120.0), 0.2
VIEW_MM, PIXEL_MM = (380.0, 480.0), (1.4, 2.4)
ECHOES = 6
READOUT_MS = 1.0  # after the last echo, at least, before the next excitation


@dataclass(frozen=True)
class VariedScanner:
    """Another scanner for every patient.

    Args:
        name, task: as in files and cards.
        opposed: every patient is scanned with water and fat in opposed phase: black lines where they meet.
    """

    name: str
    task: str
    opposed: bool = False
    varied: ClassVar[bool] = True

    def image(self, seed: int, number: int) -> Scan:
        """Draws a patient with peculiarities and a scanner, and scans."""
        scanner = draw_scanner(self.name, self.task, random_stream(seed, number, f"scanner {self.name}"))
        sequence = _in_opposed_phase(scanner.sequence) if self.opposed else scanner.sequence
        scanner = replace(scanner, sequence=in_time(sequence))
        return image_patient(draw_anatomy(seed, number, varied=True), scanner)


PROTOCOLS: Mapping[str, VariedScanner | Scanner] = {
    protocol.name: protocol
    for protocol in (
        VariedScanner("varied_volume", VOLUME),
        VariedScanner("varied_opposed", VOLUME, opposed=True),
        VariedScanner("varied_fat", FAT_FRACTION),
        replace(SCANNERS["philips_volume"], name="varied_philips", varied=True),
        replace(SCANNERS["ge_volume"], name="varied_ge", varied=True),
    )
}


def draw_scanner(name: str, task: str, draw: np.random.Generator) -> Scanner:
    """A scanner with its protocol.

    Args:
        name: of the protocol; task: VOLUME or FAT_FRACTION.
        draw: the random stream.
    """

    def between(low: float, high: float) -> float:
        return float(draw.uniform(low, high))

    is_slab, at = between(0.0, 1.0) < SLAB_SHARE, between(0.1, 0.9)
    slice_mm = round(math.exp(between(*map(math.log, SLICE_MM[task]))), 1)
    covered_mm, slab_mm = between(*COVERED_MM), between(*SLAB_MM)
    pixel_mm = round(between(*PIXEL_MM), 2)
    columns = round(between(*VIEW_MM) / pixel_mm)
    field_t = 1.5 if between(0.0, 1.0) < 0.5 else 3.0
    return Scanner(
        name,
        task,
        slices=max(3, round((slab_mm if is_slab else covered_mm) / slice_mm)),
        rows=round(columns * between(0.8, 1.0)),
        columns=columns,
        slice_mm=slice_mm,
        pixel_mm=pixel_mm,
        sequence=(_draw_echo if task == VOLUME else _draw_echoes)(field_t, draw),
        liver_intensity=math.exp(between(math.log(150.0), math.log(3000.0))),
        noise=between(0.03, 0.1) if task == VOLUME else between(0.015, 0.045),
        shading=between(0.2, 0.7),
        flips=(between(0.0, 1.0) < 0.5, between(0.0, 1.0) < 0.5, between(0.0, 1.0) < 0.5),
        tilt_deg=6.0,
        at=at if is_slab else None,
    )


def _draw_echo(field_t: float, draw: np.random.Generator) -> Sequence:
    """One echo at any time, with or without fat suppression, or the water image of an opposed and an in-phase echo."""
    repetition_ms, flip_deg = float(draw.uniform(3.2, 8.0)), float(draw.uniform(6.0, 20.0))
    kind, echo_ms, left = float(draw.uniform()), float(draw.uniform(0.9, 5.0)), float(draw.uniform(0.05, 0.35))
    opposed_ms = 1000.0 * opposed_phase_echo_s(field_t)
    if kind < 0.25:
        return Sequence(field_t, repetition_ms, flip_deg, (opposed_ms, 2.0 * opposed_ms), (0.5, 0.5))
    return Sequence(field_t, repetition_ms, flip_deg, (echo_ms,), fat_left=left if kind < 0.55 else None)


def in_time(sequence: Sequence) -> Sequence:
    """The sequence with a repetition that is long enough for its last echo."""
    return replace(sequence, repetition_ms=max(sequence.repetition_ms, sequence.echo_times_ms[-1] + READOUT_MS))


def _in_opposed_phase(sequence: Sequence) -> Sequence:
    """The sequence with one echo, the first at which the main peak of fat is opposed to water."""
    echo_ms = 1000.0 * opposed_phase_echo_s(sequence.field_t)
    return replace(sequence, echo_times_ms=(echo_ms,), echo_weights=(1.0,), fat_left=None)


def _draw_echoes(field_t: float, draw: np.random.Generator) -> Sequence:
    """Six echoes, from which water and fat are separated."""
    first_ms = float(draw.uniform(1.0, 1.3))
    apart_ms = float(draw.uniform(*(0.95, 1.15) if field_t < 2 else (0.8, 1.0)))
    times = tuple(first_ms + apart_ms * echo for echo in range(ECHOES))
    return Sequence(field_t, float(draw.uniform(7.0, 10.0)), float(draw.uniform(3.0, 5.0)), times, ())
