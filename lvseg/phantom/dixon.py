"""Water and fat from several echoes.

Signal at echo time t: (W + F d(t)) exp(i 2 pi f t - R2* t), where d is the six-peak phasor of fat and f the local
change of the main field. `separate` finds W, F, f and R2* voxel by voxel: linear least squares for W and F where f and
R2* are known, and Gauss-Newton steps on f and R2* where they are not, as in Yu et al., Magn Reson Med 2008;60:1122.

Everything a voxel goes through is additions, multiplications, divisions and square roots in float32, real and imaginary
parts written out, with polynomials for turning and decay, which IEEE 754 rounds the same way on every machine; only
constants of the echo times come from float64 functions and LAPACK.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lvseg.phantom.physics import FAT_AMPLITUDES, FAT_PPM, GYROMAGNETIC_HZ_PER_T, fat_phasor

Reals = npt.NDArray[np.float32]
Pair = tuple[Reals, Reals]  # real and imaginary part

CHUNK = 8192  # voxels at a time: the temporary arrays stay in the processor's cache
LARGEST_R2STAR_PER_S = 600.0
LARGEST_STEP_HZ = 60.0
SEARCH_HZ_PER_T = (
    110.0  # fields looked at without a first guess: to both sides, as far as to half the fat shift and more
)
SEARCH_STEP_HZ = 10.0
SEARCH_R2STAR_PER_S = (20.0, 70.0, 140.0)
FIRST_R2STAR_PER_S = 35.0
STEPS_AFTER_SEARCH, STEPS_AFTER_GUESS = 8, 2


@dataclass(frozen=True)
class Separation:
    """What the echoes of each voxel say.

    Args:
        water, fat: complex64, signals at time 0, with the phase they have in common.
        field_hz: float32, change of the main field.
        r2star_per_s: float32.
    """

    water: npt.NDArray[np.complex64]
    fat: npt.NDArray[np.complex64]
    field_hz: Reals
    r2star_per_s: Reals


def separate(
    echoes: npt.NDArray[np.complexfloating],
    echo_times_s: npt.ArrayLike,
    field_t: float,
    field_hz: npt.NDArray[np.floating] | None = None,
    least_signal: float = 0.0,
    steps: int | None = None,
) -> Separation:
    """Water, fat, field and R2* from three or more echoes.

    Args:
        echoes: complex [echoes, ...].
        echo_times_s: [echoes], ascending.
        field_t: of the scanner.
        field_hz: a first guess of the local field in the shape of a voxel map; None searches over all fields between
            plus and minus `SEARCH_HZ_PER_T` x field_t, which is slow.
        least_signal: voxels whose first echo is weaker are taken as background: no field, no decay.
        steps: of Gauss-Newton; by default `STEPS_AFTER_SEARCH` or `STEPS_AFTER_GUESS`.

    Raises:
        ValueError: fewer than 3 echoes, or not one time an echo.
    """
    times = np.asarray(echo_times_s, dtype=np.float64)
    if times.ndim != 1 or len(times) < 3 or len(times) != len(echoes):
        raise ValueError(
            f"Expected 3 or more echoes with a time each, received {len(echoes)} echoes and times {times}."
        )
    shape = echoes.shape[1:]
    flat = echoes.reshape(len(times), -1)
    real, imaginary = flat.real.astype(np.float32), flat.imag.astype(np.float32)
    guess = None if field_hz is None else np.asarray(field_hz, dtype=np.float32).ravel()
    water, fat, field, r2star = separate_parts(real, imaginary, times, field_t, guess, least_signal, steps)
    return Separation(
        (water[0] + 1j * water[1]).astype(np.complex64).reshape(shape),
        (fat[0] + 1j * fat[1]).astype(np.complex64).reshape(shape),
        field.reshape(shape),
        r2star.reshape(shape),
    )


def separate_parts(
    real: Reals,
    imaginary: Reals,
    times: npt.NDArray[np.float64],
    field_t: float,
    field_hz: Reals | None,
    least_signal: float = 0.0,
    steps: int | None = None,
) -> tuple[Pair, Pair, Reals, Reals]:
    """`separate` on real and imaginary parts, float32 [echoes, voxels]: water, fat (pairs of [voxels]), field, R2*."""
    model = _Model(times, field_t)
    count = real.shape[1]
    out = np.zeros((6, count), dtype=np.float32)
    first = real[0] * real[0] + imaginary[0] * imaginary[0]
    inside = first >= np.float32(least_signal * least_signal)
    for start in range(0, count, CHUNK):
        part = slice(start, min(start + CHUNK, count))
        chunk = [(real[echo, part], imaginary[echo, part]) for echo in range(len(times))]
        if not np.all(inside[part]):
            water, fat = model.water_and_fat(chunk)
            out[0, part], out[1, part], out[2, part], out[3, part] = *water, *fat
        where = np.flatnonzero(inside[part])
        if not len(where):
            continue
        if len(where) < part.stop - part.start:
            chunk = [(re[where], im[where]) for re, im in chunk]
        if field_hz is None:
            field, r2star, water, fat = model.search(chunk, STEPS_AFTER_SEARCH if steps is None else steps)
        else:
            r2star = np.full(len(where), FIRST_R2STAR_PER_S, dtype=np.float32)
            guess = field_hz[part][where]
            field, r2star, water, fat = model.refine(
                chunk, guess, r2star, STEPS_AFTER_GUESS if steps is None else steps
            )
        out[:, start + where] = (*water, *fat, field, r2star)
    return (out[0], out[1]), (out[2], out[3]), out[4], out[5]


class _Model:
    """Least squares for one set of echo times; its matrices are the same for every voxel."""

    def __init__(self, times: npt.NDArray[np.float64], field_t: float) -> None:
        self.times, self.field_t = times, field_t
        phasor = fat_phasor(times, field_t)
        columns = np.stack([np.ones_like(phasor), phasor], axis=1)
        self.solve = np.linalg.pinv(columns)  # [2, echoes]
        basis, _ = np.linalg.qr(columns, mode="complete")
        self.rest = basis[:, 2:].conj().T  # [echoes - 2, echoes]: what no water and no fat explains
        self.rest_water = self.rest @ times.astype(complex)
        self.rest_fat = self.rest @ (times * phasor)
        self.drift = self.solve @ (columns * times[:, None])  # [2, 2]: what water and fat times time look like

    def water_and_fat(self, demodulated: list[Pair]) -> tuple[Pair, Pair]:
        return _combine(demodulated, self.solve[0]), _combine(demodulated, self.solve[1])

    def refine(self, echoes: list[Pair], field: Reals, r2star: Reals, steps: int) -> tuple[Reals, Reals, Pair, Pair]:
        """Gauss-Newton on field and R2*; water and fat follow the last step to first order."""
        demodulated = self._demodulate(echoes, field, r2star)
        water, fat = self.water_and_fat(demodulated)
        for remaining in reversed(range(steps)):
            up_re, up_im, norm = (np.zeros_like(field) for _ in range(3))
            for row, of_water, of_fat in zip(self.rest, self.rest_water, self.rest_fat, strict=True):
                left_re, left_im = _combine(demodulated, row)
                slope_re, slope_im = _combine([water, fat], np.array([of_water, of_fat]))
                up_re += slope_re * left_re + slope_im * left_im
                up_im += slope_re * left_im - slope_im * left_re
                norm += slope_re * slope_re + slope_im * slope_im
            norm = np.float32(1.0) / np.maximum(norm, np.float32(1e-20))
            limit = np.float32(2.0 * np.pi * LARGEST_STEP_HZ)
            turned = np.clip(up_im * norm, -limit, limit)
            slower = np.clip(r2star - up_re * norm, np.float32(0.0), np.float32(LARGEST_R2STAR_PER_S))
            change = r2star - slower, turned  # echoes behave as if multiplied by 1 + time x this
            field, r2star = field + turned * np.float32(0.5 / np.pi), slower
            if remaining:
                demodulated = self._demodulate(echoes, field, r2star)
                water, fat = self.water_and_fat(demodulated)
            else:
                drifts = [_product(_combine([water, fat], weights), change) for weights in self.drift]
                water, fat = _difference(water, drifts[0]), _difference(fat, drifts[1])
        return field, r2star, water, fat

    def search(self, echoes: list[Pair], steps: int) -> tuple[Reals, Reals, Pair, Pair]:
        """`refine` from where a coarse grid of fields and R2* leaves least unexplained.

        Water at one field looks much like fat at a field one fat shift away, and a coarse grid may take the wrong one:
        both neighbours are refined too, and the one that leaves least is the answer.
        """
        reach = SEARCH_HZ_PER_T * self.field_t
        fields = np.arange(-reach, reach + SEARCH_STEP_HZ, SEARCH_STEP_HZ)
        best = np.full(echoes[0][0].shape, np.inf, np.float32)
        field, r2star = np.zeros_like(best), np.zeros_like(best)
        for tried_r2star in SEARCH_R2STAR_PER_S:
            for tried_field in fields:
                # Undone in the constants instead of in every voxel.
                undo = np.exp((-2j * np.pi * tried_field + tried_r2star) * self.times)
                left = self._unexplained(echoes, self.rest * undo)
                better = left < best
                best[better] = left[better]
                field[better], r2star[better] = tried_field, tried_r2star
        shift_hz = abs(FAT_PPM[FAT_AMPLITUDES.argmax()]) * 1e-6 * GYROMAGNETIC_HZ_PER_T * self.field_t
        answers = [self.refine(echoes, field + np.float32(by), r2star, steps) for by in (0.0, -shift_hz, shift_hz)]
        chosen = np.argmin(
            [self._unexplained(self._demodulate(echoes, found, rate), self.rest) for found, rate, *_ in answers], axis=0
        )

        def choose(*values: Reals) -> Reals:
            return np.choose(chosen, values)

        fields_hz, r2stars, waters, fats = zip(*answers, strict=True)
        water = choose(*(re for re, _ in waters)), choose(*(im for _, im in waters))
        fat = choose(*(re for re, _ in fats)), choose(*(im for _, im in fats))
        return choose(*fields_hz), choose(*r2stars), water, fat

    def _unexplained(self, demodulated: list[Pair], rest: npt.NDArray[np.complexfloating]) -> Reals:
        left = np.zeros_like(demodulated[0][0])
        for row in rest:
            re, im = _combine(demodulated, row)
            left += re * re + im * im
        return left

    def _demodulate(self, echoes: list[Pair], field: Reals, r2star: Reals) -> list[Pair]:
        """The echoes without field and decay."""
        undone = []
        for time, (re, im) in zip(self.times, echoes, strict=True):
            cosine, sine = turn(field * np.float32(time))
            growth = np.float32(1.0) / decay(r2star * np.float32(time))
            undone.append(((re * cosine + im * sine) * growth, (im * cosine - re * sine) * growth))
        return undone


def _combine(parts: list[Pair], weights: npt.NDArray[np.complexfloating]) -> Pair:
    """Sum of complex fields times complex constants."""
    total_re, total_im = np.zeros_like(parts[0][0]), np.zeros_like(parts[0][0])
    for (re, im), weight in zip(parts, weights, strict=True):
        weight_re, weight_im = np.float32(weight.real), np.float32(weight.imag)
        total_re += re * weight_re
        total_re -= im * weight_im
        total_im += re * weight_im
        total_im += im * weight_re
    return total_re, total_im


def _product(one: Pair, other: Pair) -> Pair:
    return one[0] * other[0] - one[1] * other[1], one[0] * other[1] + one[1] * other[0]


def _difference(one: Pair, other: Pair) -> Pair:
    return one[0] - other[0], one[1] - other[1]


def turn(turns: Reals) -> Pair:
    """Cosine and sine of an angle in full turns, to about 1e-6, the same on every machine."""
    x = turns - np.rint(turns)
    y = (np.float32(0.25) - np.abs(x)) * np.float32(2.0 * np.pi)  # cos(2 pi x) is the sine of this, within a quarter
    return _sine(y), _sine_of_turn(x)


def _sine_of_turn(x: Reals) -> Reals:
    quarter = np.float32(0.25)
    folded = np.where(np.abs(x) > quarter, np.copysign(np.float32(0.5), x) - x, x)
    return _sine(folded * np.float32(2.0 * np.pi))


def _sine(y: Reals) -> Reals:
    """Taylor's series to the eleventh power, for angles within a quarter turn."""
    square = y * y
    value = np.full_like(y, -1.0 / 39916800.0)
    for coefficient in (1.0 / 362880.0, -1.0 / 5040.0, 1.0 / 120.0, -1.0 / 6.0, 1.0):
        value *= square
        value += np.float32(coefficient)
    return value * y


def decay(exponent: Reals) -> Reals:
    """exp(-exponent) for exponents from 0 to about 5, to a relative 1e-4, the same on every machine."""
    eighth = exponent * np.float32(-0.125)
    value = np.full_like(exponent, 1.0 / 720.0)
    for coefficient in (1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0):
        value *= eighth
        value += np.float32(coefficient)
    value *= value
    value *= value
    value *= value
    return value
